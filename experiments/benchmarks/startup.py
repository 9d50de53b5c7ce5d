"""The start of the program: processor seconds of `--help`, against importing Lightning.

python experiments/benchmarks/startup.py
"""

from __future__ import annotations

import resource
import subprocess
import sys
from statistics import median

from timing import CONSOLE, Bound, Run, command_line, table

OVERHEAD = 1.3
"""What `distill fit --help` may cost, against importing Lightning."""
BASELINE = "import lightning.pytorch"
COMMANDS = {
    BASELINE: ["-c", BASELINE],
    "distill --help": ["-m", "distill", "--help"],
    "distill fit --help": ["-m", "distill", "fit", "--help"],
    "distill export --help": ["-m", "distill", "export", "--help"],
    "distill probe --help": ["-m", "distill", "probe", "--help"],
}


def measure(run: Run) -> list[Bound]:
    """Print a table; return the bound on `distill fit --help`."""
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(run.repeat(5)):
        for name, arguments in COMMANDS.items():
            seconds[name].append(processor_seconds(arguments))
    baseline = median(seconds[BASELINE])
    rows = [[name, f"{median(each):.2f}", f"{median(each) / baseline:.2f}"] for name, each in seconds.items()]
    CONSOLE.print(table("The start of the program", ["", "processor seconds (median)", "ratio"], rows))
    help_seconds = median(seconds["distill fit --help"])
    return [Bound("9 startup, distill fit --help / import lightning", help_seconds / baseline, at_most=OVERHEAD)]


def processor_seconds(arguments: list[str]) -> float:
    """User and system time of a Python process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    command_line(measure, __doc__.splitlines()[0])
