"""Times contenders side by side, and prints tables of it."""

from __future__ import annotations

import platform
import random
from collections.abc import Callable, Mapping
from importlib.metadata import version
from statistics import quantiles
from time import perf_counter

import torch
from rich.console import Console
from rich.progress import track

CONSOLE = Console(width=110)


def interleaved(
    contenders: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, title: str
) -> dict[str, list[float]]:
    """Seconds of each call: a round runs all contenders once, in a random order, after one round that does not count.

    What else the machine does then falls on all of them alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    order = random.Random(0)
    for number in track(range(rounds + 1), description=title, console=CONSOLE, transient=True):
        for name in order.sample(list(contenders), len(contenders)):
            started = _now(device)
            contenders[name]()
            if number > 0:
                seconds[name].append(_now(device) - started)
    return seconds


def spread(seconds: list[float]) -> tuple[float, float, float, float]:
    """Minimum, first quartile, median and third quartile."""
    first, middle, third = quantiles(seconds, n=4, method="inclusive")
    return min(seconds), first, middle, third


def print_machine(device: torch.device) -> None:
    """Say where and with what the figures were taken."""
    cores = torch.get_num_threads()
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()}, {cores} threads"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "scikit-image"))
    CONSOLE.print(f"{where}; Python {platform.python_version()}, {packages}")


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()
