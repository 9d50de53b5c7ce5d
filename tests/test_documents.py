"""The documents show only what works: commands and Python blocks run as they stand, and links lead somewhere."""

import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
import timm
import torch
import yaml

import distill
from distill.__main__ import main
from distill.testing import check_head
from tests.program import ROOT, TINY, in_a_process

TOP = ROOT / "README.md"
_ORDER = ["README.md", "distill", "experiments", ".github"]  # later commands need runs of earlier ones
DOCUMENTS = sorted(
    [
        *(TOP, ROOT / ".github/CONTRIBUTING.md"),
        *(path for folder in ("distill", "experiments") for path in (ROOT / folder).rglob("*.md")),
    ],
    key=lambda path: (_ORDER.index(path.relative_to(ROOT).parts[0]), path),
)
SHELL = ("sh", "bash", "shell", "console")
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
TEACHER = Path("runs/digits/teacher/checkpoints/last.ckpt")


def name_of(document):
    return str(document.relative_to(ROOT))


def blocks(document, *languages):
    """The fenced blocks of a document in one of some languages."""
    return [dedent(text) for _, language, text in FENCE.findall(document.read_text()) if language in languages]


def commands(document):
    """The `distill` commands of a document, indented or in a fenced shell block."""
    plain = re.findall(r"^    (\S.*)", FENCE.sub("", document.read_text()), re.MULTILINE)
    fenced = [line.strip() for block in blocks(document, *SHELL) for line in block.splitlines()]
    return [line for line in [*plain, *fenced] if re.match(r"(\w+=\S+ )*distill ", line)]


def block(first_line):
    """The fenced block that begins with a line, in any document."""
    found = [
        text for path in DOCUMENTS for text in blocks(path, "python", "yaml") if text.startswith(first_line + "\n")
    ]
    assert found, f"no document has a block {first_line!r}"
    return found[0]


FOUNDATION = commands(ROOT / "experiments/foundation/README.md")  # run by test_foundation.py, with photos
COMMANDS = list(dict.fromkeys(command for document in DOCUMENTS for command in commands(document)))
STAGES = [
    text for path in DOCUMENTS for text in blocks(path, "yaml") if text.startswith("model:\n") and "After" in text
]


@pytest.fixture
def beside_the_project(tmp_path, monkeypatch):
    """A folder in which the documents' relative paths hold, and nothing of the project is written to."""
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    for document in DOCUMENTS:
        for text in blocks(document, "python", "yaml"):
            if named := re.match(r"# (\w+\.(?:py|yaml))\n", text):
                (tmp_path / named[1]).write_text(text)
    generator = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        images = generator.integers(0, 256, (64, 3, 32, 32), dtype=np.uint8)
        np.savez(tmp_path / f"{split}.npz", images=images, labels=np.arange(64) % 10)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_are_commands():
    assert len(commands(TOP)) >= 6


def test_the_top_readme_is_short():
    assert len(TOP.read_text().splitlines()) <= 220


@pytest.mark.parametrize("command", [line for line in COMMANDS if " fit " in line])
def test_a_fit_command_is_understood(command, beside_the_project, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(beside_the_project))
    words = shlex.split(command)
    with pytest.raises(SystemExit) as stop:
        main([*words[words.index("distill") + 1 :], "--print_config"])
    assert stop.value.code == 0, capsys.readouterr().err


@pytest.mark.parametrize("stages", STAGES)
def test_stages_of_training_are_understood(stages, beside_the_project, capsys):
    (beside_the_project / "stages.yaml").write_text(stages)
    configs = ["--config=experiments/digits/distill.yaml", "--config=stages.yaml"]
    with pytest.raises(SystemExit) as stop:
        main(["fit", *configs, "--print_config"])
    printed = capsys.readouterr()
    assert stop.value.code == 0, printed.err
    assert "After" in printed.out


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_block_can_be_parsed(document):
    for text in blocks(document, "python"):
        compile(text, name_of(document), "exec")
    for text in blocks(document, "yaml"):
        yaml.safe_load(text)


@pytest.mark.parametrize(
    "first_line", ["from functools import partial", "from distill import Distiller, Objective, Progress, Term, Timm"]
)
def test_the_readmes_python_runs_as_it_stands(first_line, beside_the_project, capsys):
    TEACHER.parent.mkdir(parents=True)
    torch.save(timm.create_model("resnet10t", num_classes=10).state_dict(), TEACHER)
    exec(compile(block(first_line), "README.md", "exec"), {"__name__": "readme"})
    assert re.search(r"'rkd': \d|test/agreement", capsys.readouterr().out)


@pytest.mark.slow
def test_the_readmes_head_trains(beside_the_project):
    quick = [word for word in TINY if "student" not in word and "optimizer" not in word]
    command = next(line for line in commands(TOP) if "my_heads.yaml" in line)
    found = in_a_process(
        *shlex.split(command.partition("distill ")[2]),
        *(*quick, "--model.teacher.weights=null", "--trainer.log_every_n_steps=1"),
        cwd=beside_the_project,
    )
    assert found.returncode == 0, found.stderr
    assert "train/mine_weighted" in (beside_the_project / "runs/digits/mine/metrics.csv").read_text()


def test_the_readmes_heads_fulfill_the_contract(beside_the_project, monkeypatch):
    monkeypatch.syspath_prepend(str(beside_the_project))
    check_head(import_module("my_heads").CosineRelation)
    check_head(import_module("my_projection").ProjectedEmbedding)


def test_the_readmes_data_set_trains(beside_the_project, monkeypatch):
    monkeypatch.syspath_prepend(str(beside_the_project))
    quick = [word for word in TINY if "--data=" not in word and "student" not in word and "optimizer" not in word]
    command = next(line for line in commands(TOP) if "my_data" in line)
    assert main([*shlex.split(command.partition("distill ")[2]), *quick]) == 0
    assert (beside_the_project / "runs/mine/results.json").exists()


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_link_leads_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", document.read_text())):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = document.parent / path if path else document
        assert file.exists(), f"{name_of(document)} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{name_of(document)} links to {target}"


def anchors(document):
    """The anchors of a document's headings, as its host makes them."""
    headings = re.findall(r"^#+ (.+)", FENCE.sub("", document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_path_that_is_named_exists(document):
    for path in re.findall(r"`((?:distill|experiments|tests|\.github)/[\w/.]+)`", document.read_text()):
        assert (ROOT / path).exists(), f"{name_of(document)} names {path}"
    for path in re.findall(
        r"(?<![\w/.])((?:experiments|tests)/[\w/.]+\.(?:py|yaml|csv|png|txt))\b", document.read_text()
    ):
        assert (ROOT / path).exists(), f"{name_of(document)} names {path}"


def test_the_table_of_heads_lists_those_there_are():
    from distill.heads import shipped

    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (ROOT / "distill/heads/README.md").read_text().splitlines()
        if line.startswith("|")
    ]
    column = next(row.index("class") for row in rows if "class" in row)
    listed = {name for row in rows if len(row) > column for name in re.findall(r"`([A-Z]\w*)`", row[column])}
    assert listed - {"CrossEntropy"} == shipped().keys() - {"CrossEntropy"}


def test_the_citation_names_this_version():
    assert f"Version {distill.__version__}," in TOP.read_text()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_command_runs_as_it_stands(beside_the_project):
    (beside_the_project / "bin").mkdir()
    program = beside_the_project / "bin" / "distill"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m distill "$@"\n')
    program.chmod(0o755)
    for command in COMMANDS:
        if command in FOUNDATION:
            continue
        found = subprocess.run(
            f'export PATH="$PWD/bin:$PATH"; {command}', shell=True, capture_output=True, text=True, timeout=600
        )
        assert found.returncode == 0, f"{command}\n{found.stderr[-2000:]}"
    assert Path("student.safetensors").exists()
