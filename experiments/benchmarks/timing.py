"""Timing of contenders side by side, their peak memory, and tables of times and bounds."""

from __future__ import annotations

import argparse
import platform
import random
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from statistics import median, quantiles
from time import perf_counter, process_time

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

CONSOLE = Console(width=120, record=True)
PACKAGES = ("torch", "lightning", "timm", "torchdistill", "nvidia-modelopt", "scikit-image")


class Seconds(dict[str, list[float]]):
    """Seconds of each call of each contender, round by round.

    Attributes:
        peaks: on a GPU, bytes that a call of each allocates at most, beyond those from before.
    """

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__((name, []) for name in names)
        self.peaks: dict[str, int] = {}


@dataclass(frozen=True)
class Run:
    """Settings of a part.

    Attributes:
        device: the device that torch computes on.
        rounds: the number of calls of each contender; each part has its own default.
        tiny: whether to use sizes that only show in seconds that a part works; its figures mean nothing.
        processor: whether contenders are timed by the processor's time of this process, not by the wall clock.
    """

    device: torch.device
    rounds: int | None = None
    tiny: bool = False
    processor: bool = False

    @property
    def on_gpu(self) -> bool:
        """True if torch computes on CUDA."""
        return self.device.type == "cuda"

    @property
    def warm_up(self) -> int:
        """The number of rounds that do not count."""
        return 20 if self.on_gpu and not self.tiny else 1

    def repeat(self, rounds: int) -> int:
        """Return the rounds of a part with the default `rounds`; three times as many on a GPU, where they are short."""
        return self.rounds or rounds * (3 if self.on_gpu else 1)


@dataclass(frozen=True)
class Bound:
    """A figure and its bound.

    Attributes:
        what: its name.
        measured: the figure.
        at_most: its upper bound, if given.
        at_least: its lower bound, if given.
    """

    what: str
    measured: float
    at_most: float | None = None
    at_least: float | None = None

    @property
    def met(self) -> bool:
        """True if the figure keeps it; one that is not a number does not."""
        above = self.at_least is None or self.measured >= self.at_least
        return above and (self.at_most is None or self.measured <= self.at_most)


def command_line(measure: Callable[[Run], list[Bound]], description: str | None) -> None:
    """Run one part alone."""
    run, _ = given_run(argparse.ArgumentParser(description=description))
    print_machine(run.device)
    show_bounds(measure(run))


def given_run(parser: argparse.ArgumentParser) -> tuple[Run, argparse.Namespace]:
    """Parse the command line into the settings, and whatever else the parser knows."""
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, help="number of calls of each contender; each part has its own default")
    parser.add_argument("--tiny", action="store_true", help="only show that it works, in seconds")
    parser.add_argument(
        "--processor", action="store_true", help="time contenders by the processor's time: beside other work, on a CPU"
    )
    given = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning")
    return Run(torch.device(given.device), given.rounds, given.tiny, given.processor), given


def interleaved(contenders: Mapping[str, Callable[[], object]], rounds: int, run: Run, title: str) -> Seconds:
    """Time all contenders: a round calls each once, in a random order, after warm-up rounds that do not count.

    Other load on the machine then falls on all of them alike.
    """
    clock = process_time if run.processor and not run.on_gpu else partial(now, run.device)
    seconds = Seconds(contenders)
    order = random.Random(0)
    for number in track(range(rounds + run.warm_up), description=title, console=CONSOLE, transient=True):
        for name in order.sample(list(contenders), len(contenders)):
            started = clock()
            contenders[name]()
            if number >= run.warm_up:
                seconds[name].append(clock() - started)
    if run.on_gpu:
        seconds.peaks = {name: peak_bytes(work, run.device) for name, work in contenders.items()}
    return seconds


def now(device: torch.device) -> float:
    """Return the time in seconds, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Return the peak bytes of tensors that `work` allocates, beyond those from before."""
    if device.type == "cuda":
        before = start_of_peak(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        work()
    assert measured.profiler is not None
    events = [event for event in measured.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


def start_of_peak(device: torch.device) -> int:
    """Let CUDA's peak memory begin anew, and return the bytes allocated now."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def spread(seconds: Sequence[float]) -> tuple[float, float, float, float]:
    """Return minimum, first quartile, median and third quartile."""
    if len(seconds) == 1:
        return (seconds[0],) * 4
    first, middle, third = quantiles(seconds, n=4, method="inclusive")
    return min(seconds), first, middle, third


def ratios(seconds: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """Divide times round by round: what slows a whole round down cancels."""
    return [time / base for time, base in zip(seconds, baseline, strict=True)]


def median_ratio(seconds: Sequence[float], baseline: Sequence[float]) -> float:
    """Return the median of the rounds' ratios."""
    return median(ratios(seconds, baseline))


def comparison(
    title: str,
    seconds: Seconds,
    baseline: str,
    more: Mapping[str, Mapping[str, str]] | None = None,
    failed: Mapping[str, str] | None = None,
) -> None:
    """Print a table of contenders: milliseconds, and ratios to the baseline.

    Args:
        title: title of the table.
        seconds: seconds of each contender.
        baseline: the contender to compare with.
        more: further columns, with a text per contender.
        failed: reasons of contenders that could not run.
    """
    if seconds.peaks:
        more = {**(more or {}), "peak MB": {name: megabytes(peak) for name, peak in seconds.peaks.items()}}
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
    """Return a table with the first column to the left and figures to the right."""
    shown = Table(title=title)
    shown.title_justify = "left"
    for number, column in enumerate(head):
        shown.add_column(column, justify="right" if number else "left")
    for row in rows:
        shown.add_row(*row)
    return shown


def milliseconds(seconds: float) -> str:
    """Format milliseconds with three digits."""
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def megabytes(count: float) -> str:
    """Format megabytes with three digits."""
    value = count / 1e6
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def show_bounds(bounds: Sequence[Bound]) -> None:
    """Print each bound with its figure."""
    rows = []
    for bound in bounds:
        limit = f"at most {bound.at_most:.4g}" if bound.at_most is not None else f"at least {bound.at_least:.4g}"
        rows.append([bound.what, limit, f"{bound.measured:.4g}", "met" if bound.met else "NOT MET"])
    if rows:
        CONSOLE.print(table("Bounds", ["", "bound", "measured", ""], rows))


def print_machine(device: torch.device) -> None:
    """Print the machine and the versions."""
    cores = torch.get_num_threads()
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()}, {cores} threads"
    CONSOLE.print(f"{where}; Python {platform.python_version()}, {', '.join(_versions())}")


def _versions() -> list[str]:
    versions = []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            versions.append(f"no {name}")
    return versions
