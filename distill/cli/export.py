"""`distill export`: the student alone, for use without this project."""

from __future__ import annotations

from distill.cli.program import Parser
from distill.export import Format, export, load_student


def run_export(args: list[str]) -> None:
    """Parse the command line of `distill export`, write the file and print how to load it."""
    parser = Parser(prog="distill export", description="Write the student of a checkpoint alone.")
    parser.add_argument("--ckpt_path", type=str, required=True, help="A checkpoint of `distill fit`.")
    parser.add_argument("--output", type=str, required=True, help="The file to write; it must not exist.")
    parser.add_argument(
        "--format",
        type=Format,
        default="safetensors",
        help="`safetensors`: the weights under the network's own names; `onnx` and `torch` (a `torch.export` program): "
        "the whole student from an image in [0, 1] to logits, normalization included.",
    )
    given = parser.parse_args(args)
    student = load_student(given.ckpt_path)
    print(export(student, given.output, given.format))
