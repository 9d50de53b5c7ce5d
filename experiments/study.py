"""Runs methods x pairs x seeds of a study, and writes one table of them.

    python experiments/study.py digits --teacher experiments/digits/teacher.yaml --seeds 5
    python experiments/study.py cifar100 --methods student kd rrd_kd --pairs resnet32x4_resnet8x4 --seeds 3 --gpus 2
    python experiments/study.py digits --seeds 2 -- --trainer.max_epochs=2

A study is a folder beside this file: recipe.yaml, pairs/, methods/, and published.csv if there are figures to compare
with. Each run has a process and a folder of its own. A finished run is skipped, an unfinished one goes on from its last
epoch: start the same command again after whatever stopped it. What follows `--` goes to every run's `distill fit`.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from time import perf_counter
from typing import Any

import yaml
from rich.progress import MofNCompleteColumn, Progress
from study_table import CONSOLE, Finished, published, summary, write

from distill.errors import UserError, one_of

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Run:
    """One training: its place in the grid, its folder, and what `distill fit` is given."""

    pair: str
    method: str
    seed: int
    folder: Path
    arguments: tuple[str, ...]

    @property
    def result(self) -> dict[str, Any] | None:
        """What `work` has written, `None` as long as it has not.

        Raises:
            UserError: it is the result of other arguments or configurations.
        """
        file = self.folder / "result.json"
        if not file.exists():
            return None
        found: dict[str, Any] = json.loads(file.read_text())
        if (found["arguments"], found["configs"]) != (list(self.arguments), self.configs):
            raise UserError(
                f"{str(file)!r} is of a run with other arguments or configurations: give another --root, or remove "
                "its folder"
            )
        return found

    @property
    def configs(self) -> list[Any]:
        """What stands in its configuration files."""
        files = (argument.removeprefix("--config=") for argument in self.arguments if argument.startswith("--config="))
        return [yaml.safe_load(Path(file).read_text()) for file in files]

    def __str__(self) -> str:
        return f"{self.pair} {self.method} seed {self.seed}"


def main(args: list[str]) -> int:
    """Run the grid; returns 1 if a run has failed, 2 after a mistake of the user's."""
    own, passed = (args[: args.index("--")], args[args.index("--") + 1 :]) if "--" in args else (args, [])
    given = _parser().parse_args(own)
    try:
        failed = study(given, passed)
    except UserError as error:
        print(f"study: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("study: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return int(failed)


def study(given: argparse.Namespace, passed: Sequence[str]) -> bool:
    """Run what is not finished, and write the table; returns whether a run has failed."""
    folder = HERE / given.study
    parts = {kind: sorted(file.stem for file in (folder / kind).glob("*.yaml")) for kind in ("pairs", "methods")}
    if not all(parts.values()):
        raise UserError(f"{given.study!r} is no study: {str(folder)!r} holds no pairs/*.yaml and methods/*.yaml")
    chosen = {kind: getattr(given, kind) or known for kind, known in parts.items()}
    for kind, names in chosen.items():
        for name in names:
            one_of(f"--{kind}", name, parts[kind])
    for name in ("seeds", "jobs"):
        if getattr(given, name) < 1:
            raise UserError(f"--{name} must be at least 1, given {getattr(given, name)}")
    root = given.root or Path("runs/study") / given.study
    quiet = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")
    weights: tuple[str, ...] = ()
    if given.teacher:
        arguments = (f"--config={given.teacher}", *quiet, *passed)
        teacher = Run("all pairs", "teacher", 0, root / "teacher", arguments)
        problems = perform([teacher], given.jobs, given.gpus)
        if teacher.result is None:
            raise UserError(problems[0])
        weights = (f"--model.teacher.weights={teacher.result['checkpoint']}",)
    runs = []
    for pair in chosen["pairs"]:
        for method in chosen["methods"]:
            configs = [f"--config={folder / part}.yaml" for part in ("recipe", f"pairs/{pair}", f"methods/{method}")]
            model = yaml.safe_load((folder / "methods" / f"{method}.yaml").read_text()).get("model", {})
            taught = weights if model.get("teacher", True) else ()  # a method may do without one
            for seed in range(given.seeds):
                arguments = (*configs, f"--seed_everything={seed}", *taught, *quiet, *passed)
                runs.append(Run(pair, method, seed, root / pair / method / f"seed-{seed}", arguments))
    runs.sort(key=lambda run: run.seed)  # so that a study that is stopped has all rows, of fewer seeds
    problems = perform(runs, given.jobs, given.gpus)
    finished: Finished = {}
    for run in runs:
        if (result := run.result) is not None:
            finished.setdefault((run.pair, run.method), []).append(result)
    write(summary(finished, published(folder / "published.csv")), finished, root, given.picture or root / "study.png")
    for problem in problems:
        CONSOLE.print(problem, style="red", markup=False, highlight=False, soft_wrap=True)
    return bool(problems)


def perform(runs: Sequence[Run], jobs: int, gpus: int) -> list[str]:
    """Run what has no result yet, `jobs` at a time; returns a sentence for each run that came to none."""
    todo = [run for run in runs if run.result is None]
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    # Forked from a process that has imported everything and computed nothing: a run then begins at once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distill.cli.program", "timm", "torchvision.transforms.v2"])
    slots: list[int] = list(range(jobs))
    running: dict[Any, tuple[Run, int, Any]] = {}
    problems: list[str] = []
    queue = iter(todo)
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=CONSOLE) as progress:
        bar = progress.add_task("runs", total=len(runs), completed=len(runs) - len(todo))
        try:
            while True:
                while slots and (run := next(queue, None)) is not None:
                    slot = slots.pop(0)
                    process = context.Process(target=work, args=(run, slot % gpus if gpus else None))
                    process.start()
                    running[process.sentinel] = run, slot, process
                if not running:
                    return problems
                for sentinel in wait(list(running)):
                    run, slot, process = running.pop(sentinel)
                    process.join()
                    slots.append(slot)
                    progress.advance(bar)
                    if run.result is None:
                        log = run.folder / "log.txt"
                        said = (log.read_text().splitlines() or ["nothing"])[-1] if log.exists() else "nothing"
                        problems.append(f"{run}: no result (exit code {process.exitcode}, see {log}): {said}")
                    shown = problems[-1] if run.result is None else f"{run}: {run.result['last']:.2f} %"
                    progress.console.print(shown, markup=False, highlight=False, soft_wrap=True)
        finally:
            for _, _, process in running.values():
                process.terminate()
            for _, _, process in running.values():
                process.join(30)
                process.kill()


def work(run: Run, gpu: int | None) -> None:
    """In a process of its own: train, test the last and the best epoch, and write the result when all is done."""
    run.folder.mkdir(parents=True, exist_ok=True)
    with open(run.folder / "log.txt", "a") as log, open(run.folder / "lock", "w") as lock:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        if gpu is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
        fcntl.flock(lock, fcntl.LOCK_EX)  # another study may be at this run, or what a killed one has left behind
        if run.result is not None:
            return
        try:
            result = trained(run)
        except UserError as error:
            print(f"distill: {error}", file=sys.stderr)
            sys.exit(2)
        part = run.folder / "result.json.part"
        part.write_text(json.dumps(result, indent=1))
        part.replace(run.folder / "result.json")


def trained(run: Run) -> dict[str, Any]:
    """Top-1 (%) on the test images after the last and the best epoch of a run, begun anew or resumed."""
    from distill.cli.program import run as distill

    started = perf_counter()
    before = _newest(run.folder)
    if before is None:  # it was killed in its first epoch
        for rest in ("config.yaml", "metrics.csv"):
            (run.folder / rest).unlink(missing_ok=True)
        shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
    resumed = [] if before is None else [f"--ckpt_path={before}"]
    fitted = distill(["fit", *run.arguments, f"--trainer.default_root_dir={run.folder}", *resumed])
    seconds = perf_counter() - started
    last = _newest(run.folder)
    if last is None:
        raise UserError(f"the run has left no checkpoint in {str(run.folder)!r}")
    best = max(run.folder.rglob("best.ckpt"), key=_score)
    tested = [
        fitted.trainer.test(fitted.model, fitted.datamodule, ckpt_path=str(file), verbose=False)[0]
        for file in (last, best)
    ]
    return {
        "last": 100 * tested[0]["test/top1"],
        "best": 100 * tested[1]["test/top1"],
        "agreement": 100 * tested[0]["test/agreement"] if "test/agreement" in tested[0] else None,
        "seconds": None if resumed else seconds,
        "checkpoint": str(last),
        "arguments": list(run.arguments),
        "configs": run.configs,
    }


def _newest(folder: Path) -> Path | None:
    return max(folder.rglob("last.ckpt"), key=lambda file: file.stat().st_mtime, default=None)


def _score(file: Path) -> tuple[float, int]:
    """What a checkpoint was kept for, its validation top-1; of equals the earliest epoch counts as better."""
    from distill.cli.program import read_checkpoint

    checkpoint = read_checkpoint(file)
    (kept,) = (state for name, state in checkpoint["callbacks"].items() if name.startswith("RunCheckpoint"))
    return float(kept["best_model_score"]), -int(checkpoint["epoch"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", help="the folder's name: digits, cifar100")
    parser.add_argument("--pairs", nargs="+", help="of teacher and student; all if not given")
    parser.add_argument("--methods", nargs="+", help="all if not given")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each with its share of the CPU's cores")
    parser.add_argument("--gpus", type=int, default=0, help="deal the jobs to this many GPUs")
    parser.add_argument("--teacher", type=Path, help="configuration of a teacher that is trained first, for all pairs")
    parser.add_argument("--root", type=Path, help="where the runs go; runs/study/STUDY if not given")
    parser.add_argument("--picture", type=Path, help="where the picture goes; study.png beside the table if not given")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
