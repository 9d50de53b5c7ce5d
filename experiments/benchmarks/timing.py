"""Times contenders side by side, measures their peak memory, and prints tables and bounds."""

from __future__ import annotations

import argparse
import platform
import random
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from statistics import median, quantiles
from time import perf_counter

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

CONSOLE = Console(width=120, record=True)
PACKAGES = ("torch", "lightning", "timm", "torchdistill", "nvidia-modelopt", "scikit-image")
Seconds = dict[str, list[float]]
"""The seconds of each call of each contender, round by round."""


@dataclass(frozen=True)
class Run:
    """How a part is run.

    Attributes:
        device: where torch computes.
        rounds: how often each contender runs; each part has its own number if not given.
        tiny: networks and sizes that show in seconds whether a part works; its figures mean nothing.
    """

    device: torch.device
    rounds: int | None = None
    tiny: bool = False

    @property
    def on_gpu(self) -> bool:
        """Whether torch computes on CUDA."""
        return self.device.type == "cuda"

    @property
    def warm_up(self) -> int:
        """Rounds that do not count."""
        return 20 if self.on_gpu and not self.tiny else 1

    def repeat(self, rounds: int) -> int:
        """The rounds of a part whose own number is `rounds`; three times as many on a GPU, where they are short."""
        return self.rounds or rounds * (3 if self.on_gpu else 1)


@dataclass(frozen=True)
class Bound:
    """A figure and what it is to keep.

    Attributes:
        what: is measured.
        measured: the figure.
        at_most: what it must not be above, if given.
        at_least: what it must not be below, if given.
    """

    what: str
    measured: float
    at_most: float | None = None
    at_least: float | None = None

    @property
    def met(self) -> bool:
        """Whether it is kept; a figure that is not a number keeps none."""
        above = self.at_least is None or self.measured >= self.at_least
        return above and (self.at_most is None or self.measured <= self.at_most)


def command_line(measure: Callable[[Run], list[Bound]], description: str | None) -> None:
    """Run one part by itself."""
    run, _ = given_run(argparse.ArgumentParser(description=description))
    print_machine(run.device)
    show_bounds(measure(run))


def given_run(parser: argparse.ArgumentParser) -> tuple[Run, argparse.Namespace]:
    """The run that the command line asks for, and whatever else the parser knows."""
    parser.add_argument("--device", default="cpu", help="where torch computes: cpu or cuda")
    parser.add_argument("--rounds", type=int, help="how often each contender runs; each part has its own number")
    parser.add_argument("--tiny", action="store_true", help="only show that it works, in seconds")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning")
    return Run(torch.device(given.device), given.rounds, given.tiny), given


def interleaved(contenders: Mapping[str, Callable[[], object]], rounds: int, run: Run, title: str) -> Seconds:
    """Seconds of each call: a round runs all contenders once, in a random order, after rounds that do not count.

    What else the machine does then falls on all of them alike.
    """
    seconds: Seconds = {name: [] for name in contenders}
    order = random.Random(0)
    for number in track(range(rounds + run.warm_up), description=title, console=CONSOLE, transient=True):
        for name in order.sample(list(contenders), len(contenders)):
            started = now(run.device)
            contenders[name]()
            if number >= run.warm_up:
                seconds[name].append(now(run.device) - started)
    return seconds


def now(device: torch.device) -> float:
    """The time in seconds at which the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most bytes of tensors that `work` holds at a time, beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        work()
    assert measured.profiler is not None
    events = [event for event in measured.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def spread(seconds: Sequence[float]) -> tuple[float, float, float, float]:
    """Minimum, first quartile, median and third quartile."""
    if len(seconds) == 1:
        return (seconds[0],) * 4
    first, middle, third = quantiles(seconds, n=4, method="inclusive")
    return min(seconds), first, middle, third


def ratios(own: Sequence[float], other: Sequence[float]) -> list[float]:
    """Time over time, round by round: what slows a whole round down cancels."""
    return [mine / theirs for mine, theirs in zip(own, other, strict=True)]


def median_ratio(own: Sequence[float], other: Sequence[float]) -> float:
    """The median of the rounds' ratios."""
    return median(ratios(own, other))


def comparison(
    title: str,
    seconds: Seconds,
    baseline: str,
    more: Mapping[str, Mapping[str, str]] | None = None,
    failed: Mapping[str, str] | None = None,
) -> None:
    """Print a table of contenders: milliseconds, and ratios to one of them.

    Args:
        title: of the table.
        seconds: of each contender.
        baseline: the contender to compare with.
        more: further columns, a text for each contender.
        failed: why others could not run.
    """
    head = ["", "ms (best)", "quartiles", "ratio (best)", "ratio (median)", *(more or {})]
    rows = []
    for name, times in seconds.items():
        best, *quarters = spread(times)
        further = [texts.get(name, "") for texts in (more or {}).values()]
        rows.append(
            [
                name,
                milliseconds(best),
                " / ".join(map(milliseconds, quarters)),
                f"{best / min(seconds[baseline]):.3f}",
                f"{median_ratio(times, seconds[baseline]):.3f}",
                *further,
            ]
        )
    CONSOLE.print(table(title, head, rows))
    for name, reason in (failed or {}).items():
        CONSOLE.print(f"{name} did not run: {reason}", markup=False)


def table(title: str, head: Iterable[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table whose first column names and whose others count."""
    made = Table(title=title)
    made.title_justify = "left"
    for number, column in enumerate(head):
        made.add_column(column, justify="right" if number else "left")
    for row in rows:
        made.add_row(*row)
    return made


def milliseconds(seconds: float) -> str:
    """Three figures of it."""
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def megabytes(count: float) -> str:
    """Three figures of it."""
    value = count / 1e6
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def show_bounds(bounds: Sequence[Bound]) -> None:
    """Print each bound with what was measured."""
    rows = []
    for bound in bounds:
        limit = f"at most {bound.at_most:.4g}" if bound.at_most is not None else f"at least {bound.at_least:.4g}"
        rows.append([bound.what, limit, f"{bound.measured:.4g}", "met" if bound.met else "NOT MET"])
    if rows:
        CONSOLE.print(table("Bounds", ["", "to reach", "measured", ""], rows))


def print_machine(device: torch.device) -> None:
    """Say where and with what the figures were taken."""
    cores = torch.get_num_threads()
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()}, {cores} threads"
    CONSOLE.print(f"{where}; Python {platform.python_version()}, {', '.join(_versions())}")


def _versions() -> list[str]:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return found
