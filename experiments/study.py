"""Study of methods x pairs x seeds, and one table of their means.

    python experiments/study.py digits --teacher experiments/digits/teacher.yaml --seeds 5
    python experiments/study.py cifar100 --methods student kd rrd_kd --pairs resnet32x4_resnet8x4 --seeds 3 --gpus 2
    python experiments/study.py digits --seeds 2 -- --trainer.max_epochs=2
    python experiments/study.py digits --seeds 5 --draws 10

A study is a folder beside this file: recipe.yaml, pairs/, methods/, and published.csv if there are figures to compare
with. Each run has a process and a folder of its own. Finished runs are skipped, and an unfinished one resumes from its
last checkpoint: run the same command again. What follows `--` goes to every `distill fit` and `distill test`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from runner import Run, perform, program, split
from study_store import fixed_draws, replay, store
from study_table import Finished, published, scores, summary, write

from distill.errors import UserError, one_of, require_at_least

HERE = Path(__file__).resolve().parent
QUIET = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")


def main(args: list[str]) -> int:
    """Run the grid; return 1 if a run has failed, 2 after a user's error."""
    args, more = split(args)
    given = _parser().parse_args(args)
    return program("study", lambda: study(given, more))


def study(given: argparse.Namespace, more: Sequence[str]) -> list[str]:
    """Finish all runs, and write the table.

    Args:
        given: the command line.
        more: arguments for every run.

    Returns:
        A sentence for each run that failed.

    Raises:
        UserError: there is no such study, or something in it has another name; or the teacher's run failed.
    """
    folder = HERE / given.study
    known = {kind: sorted(file.stem for file in (folder / kind).glob("*.yaml")) for kind in ("pairs", "methods")}
    if not all(known.values()):
        raise UserError(f"{given.study!r} is no study: {str(folder)!r} holds no pairs/*.yaml and methods/*.yaml")
    for kind, names in known.items():
        for name in getattr(given, kind) or ():
            one_of(f"--{kind}", name, names)
    require_at_least(1, **{"--seeds": given.seeds, "--jobs": given.jobs, "--draws": given.draws})
    root = given.root or Path("runs/study") / given.study
    weights: tuple[str, ...] = ()
    if given.teacher:
        teacher = _run("teacher", root / "teacher", (f"--config={given.teacher}", *QUIET, *more))
        if problems := perform([teacher], given.jobs, given.gpus):
            raise UserError(problems[0])
        weights = (f"--model.teacher.weights={teacher.last}",)
    more = (*fixed_draws(given.draws), *QUIET, *more)
    pairs, methods = given.pairs or known["pairs"], given.methods or known["methods"]
    teachers = {pair: _teachers(folder, root / pair, pair, methods, weights, more, given.draws) for pair in pairs}
    runs = [
        (
            (pair, method),
            _run(
                f"{pair} {method} seed {seed}",
                root / pair / method / f"seed-{seed}",
                (*_configs(folder, pair, method), *teachers[pair][method], f"--seed_everything={seed}", *more),
            ),
        )
        for seed in range(given.seeds)  # the outermost, so that a study that is stopped has all rows, of fewer seeds
        for pair in pairs
        for method in methods
    ]
    problems = perform([run for _, run in runs], given.jobs, given.gpus)
    finished: Finished = {}
    for row, run in runs:
        if (result := run.result) is not None:
            finished.setdefault(row, []).append(scores(result))
    write(summary(finished, published(folder / "published.csv")), finished, root, given.picture or root / "study.png")
    return problems


def _configs(folder: Path, pair: str, method: str | None = None) -> tuple[str, ...]:
    """The configurations of a pair and a method.

    A method's values for one pair, `methods/METHOD/PAIR.yaml`, come last if there are any.
    """
    of_method = () if method is None else (f"methods/{method}", f"methods/{method}/{pair}")
    parts = ("recipe", f"pairs/{pair}", *of_method)
    return tuple(f"--config={file}" for part in parts if (file := folder / f"{part}.yaml").exists())


def _teachers(
    folder: Path,
    root: Path,
    pair: str,
    methods: Sequence[str],
    weights: tuple[str, ...],
    more: Sequence[str],
    draws: int | None,
) -> dict[str, tuple[str, ...]]:
    """The arguments for the teacher by method, none for a method without one; with `draws` it is stored first."""
    texts = {method: (folder / "methods" / f"{method}.yaml").read_text() for method in methods}
    taught = [method for method in methods if yaml.safe_load(texts[method]).get("model", {}).get("teacher", True)]
    arguments = {method: weights if method in taught else () for method in methods}
    if draws is not None and taught:
        fits = {method: (*_configs(folder, pair, method), *weights, *more) for method in taught}
        stored = store(root, (*_configs(folder, pair), *weights, *more), fits)
        arguments |= dict.fromkeys(stored, replay(root))
    return arguments


def _run(name: str, folder: Path, arguments: tuple[str, ...]) -> Run:
    return Run(name, folder, arguments, (*arguments, "--trainer.logger=false"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", help="name of the folder: digits, cifar100")
    parser.add_argument("--pairs", nargs="+", help="pairs of teacher and student; all if not given")
    parser.add_argument("--methods", nargs="+", help="methods; all if not given")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0 on")
    parser.add_argument("--jobs", type=int, default=2, help="number of runs at a time")
    parser.add_argument("--gpus", type=int, default=0, help="number of GPUs that the jobs are dealt to")
    parser.add_argument("--teacher", type=Path, help="configuration of a teacher to train first, for all pairs")
    parser.add_argument(
        "--draws",
        type=int,
        help="run the teacher of each pair once, on so many fixed versions of each image, and store it",
    )
    parser.add_argument("--root", type=Path, help="folder of all runs; runs/study/STUDY if not given")
    parser.add_argument("--picture", type=Path, help="file of the picture; ROOT/study.png if not given")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
