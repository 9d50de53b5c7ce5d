"""The benchmarks' statistics, and a run of every part."""

import random
import re
import subprocess
import sys
import time

import pytest
import torch

from tests.program import ROOT

BENCHMARKS = ROOT / "experiments" / "benchmarks"
PARTS = [
    *("step", "heads", "kernels", "superpixels", "teacher", "data", "scaling", "checkpoint", "startup", "shares"),
    *("store", "scale", "ranks", "overhead", "compilation"),
]


@pytest.fixture
def timing(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import timing

    return timing


def test_the_spread_is_minimum_and_quartiles(timing):
    seconds = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert timing.spread(seconds) == (1.0, 2.0, 3.0, 4.0)


def test_the_spread_of_one_round_is_that_round(timing):
    assert timing.spread([7.0]) == (7.0,) * 4


def test_a_round_that_was_slow_for_all_does_not_change_the_median_ratio(timing):
    drawn = random.Random(0)
    machine = [drawn.uniform(1, 10) for _ in range(9)]
    assert timing.median_ratio([1.5 * slow for slow in machine], machine) == pytest.approx(1.5)


def test_every_contender_runs_once_a_round_and_the_warm_up_does_not_count(timing):
    calls = []
    contenders = {name: lambda name=name: calls.append(name) for name in "abc"}
    run = timing.Run(torch.device("cpu"))
    seconds = timing.interleaved(contenders, 4, run, "")
    assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys("abc", 4)
    rounds = [calls[start : start + 3] for start in range(0, len(calls), 3)]
    assert len(rounds) == 4 + run.warm_up
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1


def test_what_is_timed_is_the_contender_alone(timing):
    contenders = {"slow": lambda: time.sleep(0.02), "fast": lambda: None}
    seconds = timing.interleaved(contenders, 2, timing.Run(torch.device("cpu")), "")
    assert min(seconds["slow"]) >= 0.02
    assert min(seconds["fast"]) < 0.01


def test_peak_memory_is_what_is_allocated_at_a_time(timing):
    def work():
        for _ in range(3):
            large = torch.empty(1 << 20)
            small = torch.empty(1 << 19)
            del large, small

    assert timing.peak_bytes(work, torch.device("cpu")) == pytest.approx(4 * ((1 << 20) + (1 << 19)), rel=0.01)


@pytest.mark.parametrize(
    ("limits", "met"),
    [({"at_most": 1.0}, True), ({"at_most": 0.9}, False), ({"at_least": 1.0}, True), ({"at_least": 1.1}, False)],
)
def test_a_bound_is_met_up_to_its_limit(timing, limits, met):
    assert timing.Bound("x", 1.0, **limits).met is met


def test_a_figure_that_is_not_a_number_meets_no_bound(timing):
    assert not timing.Bound("x", float("nan"), at_most=1.0).met
    assert not timing.Bound("x", float("nan"), at_least=1.0).met


def test_the_parts_are_those_of_the_program_and_of_its_readme():
    program = (BENCHMARKS / "__main__.py").read_text()
    assert re.findall(r'"(\w+)"', re.search(r"PARTS = \[(.*?)\]", program, re.DOTALL)[1]) == PARTS
    assert re.findall(r"\| \d+ \| `(\w+)\.py`", (BENCHMARKS / "README.md").read_text()) == PARTS


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_a_part_runs(part, tmp_path):
    output = tmp_path / "runs" / "benchmark.txt"
    words = ["--only", part, "--rounds", "1", "--tiny", "--output", str(output)]
    found = subprocess.run(
        [sys.executable, str(BENCHMARKS), *words], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    assert "┃" in output.read_text()
