"""Table of the program's commands."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module


@dataclass(frozen=True)
class Command:
    """Description of a command and of the function that runs it.

    Args:
        summary: one line for `distill --help`.
        example: command line shown by `distill <command> --help`.
        runner: `module:function`, called with the command name and its arguments; imported when the command runs.
    """

    summary: str
    example: str
    runner: str = "distill.cli.program:run"

    def run(self, name: str, args: list[str]) -> None:
        """Import the runner and call it with `[name, *args]`."""
        module, _, function = self.runner.partition(":")
        getattr(import_module(module), function)([name, *args])


_DIGITS = "--config experiments/digits/distill.yaml"
_LAST = "--ckpt_path runs/digits/distill/checkpoints/last.ckpt"

COMMANDS = {
    "fit": Command("Train a student, with or without a teacher.", f"distill fit {_DIGITS} --model.heads.kd.weight=0.5"),
    "validate": Command("Evaluate a checkpoint on the validation images.", f"distill validate {_DIGITS} {_LAST}"),
    "test": Command("Evaluate a checkpoint on the test images.", f"distill test {_DIGITS} {_LAST}"),
    "predict": Command("Predict the classes of the test images.", f"distill predict {_DIGITS} {_LAST}"),
    "check": Command(
        "Check a configuration and show its networks, heads and data.",
        f"distill check {_DIGITS}",
        "distill.cli.check:run_check",
    ),
    "plot": Command(
        "Draw what the heads compare.",
        "distill plot --config experiments/digits/serkd.yaml --ckpt_path runs/digits/serkd/checkpoints/last.ckpt "
        "--output runs/digits/serkd/pictures",
    ),
    "weigh": Command(
        "Measure each term's share of the gradient, and compute weights from it.",
        f"distill weigh {_DIGITS} --share 0.5 --output weights.yaml",
    ),
    "store": Command(
        "Store a teacher's answers, for trainings without running it.",
        f"distill store {_DIGITS} --data.draws=4 --output stores/digits",
        "distill.cli.store:run_store",
    ),
    "curves": Command(
        "Draw the curves of one or several runs.",
        "distill curves runs/digits/distill --output curves.png",
        "distill.cli.curves:run_curves",
    ),
    "export": Command(
        "Export the student of a checkpoint.",
        f"distill export {_LAST} --output student.safetensors",
        "distill.cli.export:run_export",
    ),
    "probe": Command(
        "Evaluate a student's embeddings by k-nearest-neighbor classification.",
        f"distill probe {_LAST} --data Digits",
        "distill.cli.probe:run_probe",
    ),
}


def help_text() -> str:
    """Return the text of `distill --help`."""
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    return (
        "usage: distill COMMAND [OPTIONS]\n\n"
        "Relation distillation for image models.\n\n"
        f"commands:\n{lines}\n\n"
        "`distill COMMAND --help` lists a command's options. Every configuration key is an option:\n"
        f"  {COMMANDS['fit'].example}\n\n"
        "A mistake is told in one sentence; with DISTILL_DEBUG=1 in the environment, its traceback is shown, too."
    )
