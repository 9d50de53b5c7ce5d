"""The plan of the house: imports point downward, and the package is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "distill"

# The rooms from the ground up; a room may use what stands before it, or beside it in the same row.
FLOORS = [
    ["errors", "configurable", "files"],
    ["functional", "distributed", "schedules", "randomness"],
    ["features"],
    ["views", "precision"],
    ["memory", "superpixels", "metrics"],
    ["plotting"],
    ["networks", "data"],
    ["store"],
    ["heads"],
    ["terms", "testing"],
    ["objective"],
    ["distiller"],
    ["gradients"],
    ["training", "given"],
    ["runs"],
    ["knn"],
    ["callbacks"],
    ["export"],
    ["cli"],
    ["api"],
    ["__main__"],
]
HEIGHT = {room: height for height, floor in enumerate(FLOORS) for room in floor}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(file: Path) -> set[str]:
    """The modules that a file imports, at its top or inside its functions."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_downward(file):
    room = room_of(file)
    if room == "__init__":
        return
    assert room in HEIGHT, f"{room} has no floor in this test's plan"
    for name in imported(file):
        parts = name.split(".")
        if parts[0] == "distill" and len(parts) > 1 and (used := parts[1]) in HEIGHT:
            assert HEIGHT[used] <= HEIGHT[room], f"{file.name} imports {name} from above"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_nothing_below_the_modules_knows_lightning(file):
    if room_of(file) != "data" and HEIGHT.get(room_of(file), 0) < HEIGHT["training"]:
        assert not any(name.split(".")[0] in ("lightning", "pytorch_lightning") for name in imported(file))


def test_files_fit_in_the_head():
    for file in FILES:
        assert len(file.read_text().splitlines()) <= 300, f"{file} has grown too long"


def attributes(file: Path) -> set[str]:
    """The private attributes that a file reads or writes of a trainer, a strategy or a loop, as source text."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            source = ast.unparse(node)
            if not source.startswith("super().") and any(
                word in source for word in ("trainer", "strategy", "loop", "_ddp_kwargs", "_layer_sync")
            ):
                found.add(source)
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_lightnings_private_state_is_touched_in_one_file(file):
    if file.name != "lightning_internals.py":
        assert not attributes(file)


HEAVY = "{'torchvision', 'timm', 'wandb', 'lightning', 'matplotlib', 'sklearn'}"


def assert_not_loaded(code: str, modules: str = HEAVY) -> None:
    """Run code in a fresh process and look at what it has imported."""
    check = f"import sys\n{code}\nloaded = {modules} & set(sys.modules); assert not loaded, loaded"
    subprocess.run([sys.executable, "-c", check], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    "module", ["distill", "distill.heads, distill.networks, distill.functional, distill.objective"]
)
def test_import_is_light(module):
    assert_not_loaded(f"import {module}")


@pytest.mark.parametrize("args", [[], ["--help"], ["--version"], ["fitt"]])
def test_the_program_answers_without_importing_torch(args):
    assert_not_loaded(f"from distill.__main__ import main; main({args})", "{'torch', 'lightning', 'jsonargparse'}")
