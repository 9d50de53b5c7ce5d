"""The `distill probe` command."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from distill.cli.construction import construction
from distill.cli.jsonargparse_internals import adapted_jsonargparse, instantiating
from distill.cli.numbers import refuse_numbers
from distill.cli.parser import WEIGHTS_HELP, command_parser
from distill.cli.short_names import import_named_classes
from distill.cli.yaml_reader import check_files
from distill.data import ImageData
from distill.export import load_student
from distill.knn import ProbeResult, probe
from distill.networks import Network
from distill.training.weight_averaging import WeightsChoice


def run_probe(args: list[str]) -> None:
    """Classify the test images by a weighted kNN vote over a student's embeddings and print the accuracy."""
    import_named_classes()
    parser = command_parser("probe")
    parser.add_argument("--ckpt_path", type=str, required=True, help="A checkpoint of `distill fit`.")
    parser.add_subclass_arguments(ImageData, "data", required=True, help="The data set to probe on.")
    parser.add_argument("--neighbors", type=int, default=20, help="Number of training images that vote.")
    parser.add_argument(
        "--temperature", type=float, default=0.07, help="Temperature of a vote's weight, exp(cosine / temperature)."
    )
    parser.add_argument("--weights", type=WeightsChoice | None, default=None, help=WEIGHTS_HELP)
    check_files(args[1:])
    with adapted_jsonargparse():
        options = parser.parse_args(args[1:])
        refuse_numbers(options.as_dict(), "probe")
        if "augment" in options.data.init_args:
            options.data.init_args.augment = False  # the training images are embedded without augmentation
        student = load_student(options.ckpt_path, weights=options.weights)
        with construction("data"), instantiating():
            data: ImageData = parser.instantiate_classes(options).data
    Console().print(_table(student, data, probe(student, data, options.neighbors, options.temperature)))


def _table(student: Network, data: ImageData, result: ProbeResult) -> Table:
    table = Table()
    for name in ("student", "data set", "training images", "test images", "kNN top-1 (%)"):
        table.add_column(name)
    counts = f"{result.memory_size:,}", f"{result.tested:,}"
    table.add_row(student.name, type(data).__name__, *counts, f"{100 * result.top1:.1f}")
    return table
