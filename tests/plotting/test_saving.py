"""Pictures are written whole or not at all."""

import os
import resource

import pytest
from matplotlib.figure import Figure

from distill.plotting.saving import save_figure


def figure():
    drawn = Figure()
    drawn.subplots().plot([0, 1])
    return drawn


@pytest.fixture
def _on_a_full_disk():
    """Let no file grow beyond 1000 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".SVG", b"<?xml")])
def test_the_suffix_is_the_format_and_the_folder_is_created(suffix, start, tmp_path):
    path = save_figure(figure(), tmp_path / "new" / f"curve{suffix}")
    assert path.read_bytes().startswith(start)
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.usefixtures("_on_a_full_disk")
def test_a_full_disk_keeps_the_older_picture(tmp_path):
    (tmp_path / "curve.png").write_bytes(b"good")
    with pytest.raises(OSError, match="too large"):
        save_figure(figure(), tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes() == b"good"
    assert os.listdir(tmp_path) == ["curve.png"]
