"""`distill export`: the student alone, for use without this project."""

from __future__ import annotations

from distill.cli.parser import command_parser
from distill.export import Format, export, load_student


def run_export(args: list[str]) -> None:
    """Run `distill export`: write the file and print the code that loads it."""
    parser = command_parser("export")
    parser.add_argument("--ckpt_path", type=str, required=True, help="A checkpoint of `distill fit`.")
    parser.add_argument("--output", type=str, required=True, help="The file to write; it must not exist.")
    parser.add_argument(
        "--format",
        type=Format,
        default="safetensors",
        help="`safetensors`: the weights under the network's own names; `onnx` and `torch` (a `torch.export` program): "
        "the whole student from an image in [0, 1] to logits, normalization included.",
    )
    given = parser.parse_args(args[1:])
    student = load_student(given.ckpt_path)
    print(export(student, given.output, given.format))
