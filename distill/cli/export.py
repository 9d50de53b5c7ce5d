"""The `distill export` command."""

from __future__ import annotations

from distill.cli.jsonargparse_internals import adapted_jsonargparse
from distill.cli.parser import WEIGHTS_HELP, command_parser
from distill.export import Format, export, load_student
from distill.training.weight_averaging import WeightsChoice


def run_export(args: list[str]) -> None:
    """Export the student of a checkpoint and print the code that loads the written file."""
    parser = command_parser("export")
    parser.add_argument("--ckpt_path", type=str, required=True, help="A checkpoint of `distill fit`.")
    parser.add_argument("--output", type=str, required=True, help="The file to write; it must not exist yet.")
    parser.add_argument(
        "--format",
        type=Format,
        default="safetensors",
        help="`safetensors`: the weights under the network's own names; `onnx` and `torch` (a `torch.export` program): "
        "the whole student from an image in [0, 1] to logits, normalization included.",
    )
    parser.add_argument("--weights", type=WeightsChoice | None, default=None, help=WEIGHTS_HELP)
    with adapted_jsonargparse():
        options = parser.parse_args(args[1:])
    student = load_student(options.ckpt_path, weights=options.weights)
    print(export(student, options.output, options.format))
