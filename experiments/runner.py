"""Runner of trainings: a process and a folder per run, tested at its end, resumed after a kill.

A run is `distill fit --resume`, and then `distill test` of its last and of its best checkpoint. Beside the files of any
run (`results.json`, `checkpoints/`, ...) its folder holds the output, `log.txt`, and at the end the test, `test.json`.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from distill.errors import UserError

CONSOLE = Console(width=110)

Result = dict[str, Any]
"""The content of `test.json`: `last` and `best`, figures of the test (`test/top1`, ...) of the checkpoints that are
tested; `validation`, those of the last validation; `parameters` of the student; `seconds` of the training; `given`, the
arguments and configurations behind them."""


@dataclass(frozen=True)
class Run:
    """One training and its test.

    Attributes:
        name: its name in messages.
        folder: the folder it writes to.
        fit: arguments of `distill fit`, besides the folder.
        test: arguments of `distill test`, besides the checkpoint; those of `fit` if not given.
        tested: the checkpoints that are tested, of `last` and `best`.
    """

    name: str
    folder: Path
    fit: tuple[str, ...]
    test: tuple[str, ...] | None = None
    tested: tuple[str, ...] = ("last", "best")

    @property
    def last(self) -> Path:
        """The checkpoint of the last step."""
        return self.folder / "checkpoints" / "last.ckpt"

    @property
    def best(self) -> Path:
        """The checkpoint of the best validation, under the name that `checkpoint` gives it."""
        from distill.runs.named_checkpoints import named_checkpoint

        return named_checkpoint("best", self.folder, self.folder / "checkpoints")

    @property
    def fit_command(self) -> list[str]:
        """The training, begun or resumed, as arguments of `distill`."""
        return ["fit", *self.fit, f"--trainer.default_root_dir={self.folder}", "--resume"]

    @property
    def test_command(self) -> list[str]:
        """The test of the last step, as arguments of `distill`."""
        return ["test", *(self.fit if self.test is None else self.test), f"--ckpt_path={self.last}"]

    @property
    def given(self) -> dict[str, Any]:
        """Arguments and the content of their configuration files, to recognize the result of the same run."""
        arguments = [list(self.fit), list(self.fit if self.test is None else self.test)]
        return {"arguments": arguments, "configs": [configs(each) for each in arguments]}

    @property
    def result(self) -> Result | None:
        """The content of `test.json`; `None` until the run is finished.

        Raises:
            UserError: it is the result of other arguments or configurations.
        """
        file = self.folder / "test.json"
        if not file.exists():
            return None
        result: Result = json.loads(file.read_text())
        if result["given"] != self.given:
            raise UserError(
                f"{str(file)!r} is of a run with other arguments or configurations: give another --root, or remove "
                "its folder"
            )
        return result


def program(name: str, command: Callable[[], list[str]]) -> int:
    """Run the command of a program, and print the problems that it returns.

    Returns:
        The exit code: 1 if there are problems, 2 after a user's error, 130 after Ctrl+C.
    """
    try:
        problems = command()
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command resumes", file=sys.stderr)
        return 130
    for problem in problems:
        CONSOLE.print(problem, style="red", markup=False, highlight=False, soft_wrap=True)
    return int(bool(problems))


def split(args: list[str]) -> tuple[list[str], list[str]]:
    """Split a command line at `--`: what follows goes to every `distill fit` and `distill test`."""
    return (args[: args.index("--")], args[args.index("--") + 1 :]) if "--" in args else (args, [])


def configs(arguments: Sequence[str]) -> list[Any]:
    """Return the contents of the configuration files among the arguments."""
    files = [argument.removeprefix("--config=") for argument in arguments if argument.startswith("--config=")]
    return [yaml.safe_load(Path(file).read_text()) for file in files]


def forks() -> ForkServerContext:
    """Return what forks a process that has imported everything and computed nothing: a run then begins at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distill.cli.program", "timm", "torchvision.transforms.v2"])
    return context


def perform(
    runs: Sequence[Run],
    jobs: int = 1,
    gpus: int = 0,
    verbose: bool = False,
    finished: Callable[[Run, Result], None] = lambda run, result: None,
) -> list[str]:
    """Finish all runs that have no result yet.

    Args:
        runs: the runs, in the order in which they begin.
        jobs: the number of runs at a time, each with its share of the CPU's cores.
        gpus: the number of GPUs that the jobs are dealt to; 0 leaves the choice to the trainer.
        verbose: whether commands and their output are shown, instead of a progress bar; else it goes to `log.txt`.
        finished: called with each run that has been finished, and its result.

    Returns:
        A sentence for each run that failed.
    """
    todo = [run for run in runs if run.result is None]
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    context = forks()
    slots = list(range(jobs))
    running: dict[Any, tuple[Run, int, Any]] = {}
    problems: list[str] = []
    queue = iter(todo)
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=CONSOLE, disable=verbose) as progress:
        bar = progress.add_task("runs", total=len(runs), completed=len(runs) - len(todo))
        try:
            while True:
                while slots and (run := next(queue, None)) is not None:
                    slot = slots.pop(0)
                    process = context.Process(target=work, args=(run, slot % gpus if gpus else None, verbose))
                    process.start()
                    running[process.sentinel] = run, slot, process
                if not running:
                    return problems
                for sentinel in wait(list(running)):
                    run, slot, process = running.pop(sentinel)
                    process.join()
                    slots.append(slot)
                    progress.advance(bar)
                    if (result := run.result) is None:
                        problems.append(_problem(run, process.exitcode, verbose))
                        message = problems[-1]
                    else:
                        finished(run, result)
                        figures = {**result.get("validation", {}), **result.get("last", {})}
                        top1 = next((figures[name] for name in ("test/top1", "val/top1") if name in figures), None)
                        message = f"{run.name}: finished" if top1 is None else f"{run.name}: {100 * top1:.2f} %"
                    CONSOLE.print(message, markup=False, highlight=False, soft_wrap=True)
        finally:
            for _, _, process in running.values():
                process.terminate()
            for _, _, process in running.values():
                process.join(30)
                process.kill()


def work(run: Run, gpu: int | None, verbose: bool) -> None:
    """Finish a run, in a process of its own; exit with 2 after a user's error."""
    run.folder.mkdir(parents=True, exist_ok=True)
    if not verbose:
        with open(run.folder / "log.txt", "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
    with open(run.folder / "lock", "w") as lock:
        if gpu is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
        fcntl.flock(lock, fcntl.LOCK_EX)  # held by another runner on the same folder, or by what a killed one left
        if run.result is not None:
            return
        from distill.files import write_atomic

        try:
            result = fit_and_test(run, verbose)
        except UserError as error:
            print(f"distill: {error}", file=sys.stderr)
            sys.exit(2)
        write_atomic(run.folder / "test.json", json.dumps(result, indent=1).encode())


def fit_and_test(run: Run, verbose: bool) -> Result:
    """Train, or resume, and test the checkpoints that are to be tested."""
    from distill.cli.program import DistillCLI
    from distill.cli.program import run as distill

    def command(arguments: list[str]) -> DistillCLI:
        if verbose:
            CONSOLE.print(
                f"\n$ distill {shlex.join(arguments)}", style="bold", markup=False, highlight=False, soft_wrap=True
            )
        return distill(arguments)

    program = command(run.fit_command)
    results = json.loads((run.folder / "results.json").read_text())
    figures: dict[str, Mapping[str, float]] = {}
    if run.tested:
        program = command(run.test_command)
        figures["last"] = {name: float(figure) for name, figure in program.trainer.callback_metrics.items()}
    if "best" in run.tested:
        figures["best"] = figures["last"]
        if results["best"] is not None and results["best"]["step"] != results["last"]["step"]:
            (best,) = program.trainer.test(program.model, program.datamodule, ckpt_path=str(run.best), verbose=False)
            figures["best"] = dict(best)
    return {
        **figures,
        "validation": {name: value for name, value in results["last"].items() if name.startswith("val/")},
        "parameters": sum(parameter.numel() for parameter in program.model.student.parameters()),
        "seconds": results["wall_seconds"],
        "given": run.given,
    }


def _problem(run: Run, exit_code: int | None, verbose: bool) -> str:
    if verbose:
        return f"{run.name}: no result (exit code {exit_code}, see above)"
    log = run.folder / "log.txt"
    lines = log.read_text().splitlines() if log.exists() else []
    return f"{run.name}: no result (exit code {exit_code}, see {log}): {lines[-1] if lines else 'nothing'}"
