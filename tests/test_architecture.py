"""The plan of the house: imports point downward, and the package is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "distill"

# The rooms from the ground up; a room may use what stands before it, or beside it in the same row.
FLOORS = [
    ["errors"],
    ["functional", "distributed", "schedules", "randomness"],
    ["features"],
    ["memory", "superpixels", "metrics"],
    ["plotting"],
    ["networks", "data"],
    ["heads"],
    ["objective", "testing"],
    ["training"],
    ["runs"],
    ["callbacks"],
    ["export"],
    ["knn"],
    ["cli"],
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
        assert len(file.read_text().splitlines()) <= 400, f"{file} has grown too long"


@pytest.mark.parametrize("module", ["distill", "distill.heads", "distill.networks", "distill.functional"])
def test_import_is_light(module):
    heavy = "{'torchvision', 'timm', 'wandb', 'lightning', 'matplotlib', 'sklearn'}"
    code = f"import sys, {module}; loaded = {heavy} & set(sys.modules); assert not loaded, loaded"
    subprocess.run([sys.executable, "-c", code], check=True)
