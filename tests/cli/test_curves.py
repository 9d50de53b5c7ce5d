"""`distill curves`: one picture or one page of several runs."""

import csv
import json
import re
import resource
from base64 import b64decode
from html.parser import HTMLParser

import pytest

from distill.__main__ import main
from distill.cli.curves import sections
from distill.plotting.curves import draw_sections, running_mean
from distill.runs.logged import differing_keys, read_runs

TERMS = ["task", *(f"term{number}" for number in range(19))]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_run(folder, lr=0.1, terms=("task", "kd"), steps=6, shares=True, results=True):
    """Write the files of a run as it does itself: rows of training and of validation, and a line cut off."""
    folder.mkdir(parents=True)
    rows = []
    for step in range(steps):
        row = {"step": step, "epoch": 0, "train/loss": 2.0 / (step + 1), "train/lr": lr}
        for number, term in enumerate(terms):
            row |= {
                f"train/{term}": 1.0 + step,
                f"train/{term}_weight": number,
                f"train/{term}_weighted": number * step,
            }
            row |= {f"train/{term}/gradient_share": 0.5} if shares else {}
        rows.append(row | {"train/kd/own": 3.0})
    rows.append({"step": steps - 1, "epoch": 0, "val/top1": 0.5})
    rows.append({"step": steps - 1, "epoch": 0, "val/top1": "nan"})
    names = list(dict.fromkeys(name for row in rows for name in row))
    with (folder / "metrics.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, names)
        table.writeheader()
        table.writerows(rows)
        file.write("7")
    if results:
        model = {"optimizer": {"init_args": {"lr": lr}}}
        configuration = {"model": model, "trainer": {"default_root_dir": str(folder), "max_epochs": 1}}
        last = {"epoch": 0, "step": steps, "val/top1": 0.5}
        content = {"last": last, "best": last, "epochs": 1, "steps": steps, "configuration": configuration}
        (folder / "results.json").write_text(json.dumps(content))


def test_a_full_disk_leaves_nothing_of_a_picture(tmp_path, capsys):
    write_run(tmp_path / "run")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        assert main(["curves", "run", "--output=new/curves.svg"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert capsys.readouterr().err == "distill: output: 'new/curves.svg' cannot be written: File too large\n"
    assert not list((tmp_path / "new").iterdir())


def test_a_picture_shows_every_curve_of_every_run(tmp_path, capsys):
    write_run(tmp_path / "runs/a")
    write_run(tmp_path / "runs/b", terms=("task",), shares=False)
    assert main(["curves", "runs/a", "runs/b/metrics.csv", "--output=new/curves.png"]) == 0
    assert capsys.readouterr().out == "new/curves.png\n"
    assert (tmp_path / "new/curves.png").read_bytes().startswith(b"\x89PNG")
    runs = read_runs(["runs/a", "runs/b"])
    first, terms, rest = sections(runs)
    assert [panel[0] for panel in first.rows[0][1]] == ["val/top1", "train/loss", "train/lr"]
    assert [name for name, _ in terms.rows] == ["task", "kd"]
    assert terms.columns == ["value", "weighted value", "weight", "share of the gradient"]
    assert [panel[0] for panel in rest.rows[0][1]] == ["train/kd/own"]
    value = terms.rows[0][1][0][1]
    assert list(value) == ["a", "b"]
    assert value["a"] == (list(range(6)), [1.0 + step for step in range(6)])
    assert list(terms.rows[1][1][3][1]) == ["a"], "where it was logged"
    assert runs["a"].curves["val/top1"] == ([5], [0.5]), "what is not finite is left out"


@pytest.mark.slow
def test_the_panels_of_twenty_terms_do_not_overlap(tmp_path):
    for name in "abc":
        write_run(tmp_path / name, terms=TERMS)
    runs = read_runs(["a", "b", "c"])
    figure = draw_sections(sections(runs), list(runs), {term: {} for term in TERMS})
    boxes = [axes.get_position() for axes in figure.axes]
    assert len(boxes) == 3 + 4 * 20 + 1 + 1
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= 1 and box.y1 <= 1 for box in boxes)
    for number, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:number])
    width, height = figure.get_size_inches()
    assert min(box.width * width for box in boxes) > 1.5
    assert min(box.height * height for box in boxes) > 0.7
    lines = [line for axes in figure.axes[:-1] for line in axes.lines]
    assert len({line.get_color() for line in lines}) == 3, "one color per run"
    assert len({axes.get_xlim() for axes in figure.axes[:-1]}) == 1, "panels share the labels of their steps"


class Links(HTMLParser):
    """Collects what a page loads, its tags that stay open, and its text."""

    def __init__(self):
        super().__init__()
        self.sources, self.open, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.mark.slow
def test_a_page_needs_no_other_file(tmp_path):
    write_run(tmp_path / "a<b")
    write_run(tmp_path / "c", lr=0.2)
    write_run(tmp_path / "unfinished", results=False)
    pictures = tmp_path / "c/pictures"
    pictures.mkdir()
    for name in ("rrd-epoch-2", "rrd-epoch-10", "gradient_shares"):
        (pictures / f"{name}.png").write_bytes(b"\x89PNG" + name.encode())
    assert main(["curves", "a<b", "c", "unfinished", "--output=page.html"]) == 0
    page = Links()
    text = (tmp_path / "page.html").read_text()
    page.feed(text)
    assert not page.open
    assert len(page.sources) == 3, "curves and two pictures"
    contents = [b64decode(source.removeprefix("data:image/png;base64,"), validate=True) for source in page.sources]
    assert all(content.startswith(b"\x89PNG") for content in contents)
    assert contents[1:] == [b"\x89PNGgradient_shares", b"\x89PNGrrd-epoch-10"], "the latest of each"
    assert not re.search(r"url\(|@import|<script|<link", text)
    assert "a<b" in page.text
    assert "Without results.json, which is written at the end of a run: unfinished." in page.text
    assert re.search(r"model\.optimizer\.lr\s*0\.1\s*0\.2", page.text)
    assert "max_epochs" in page.text, "absent in a run without a configuration"
    assert "default_root_dir" not in page.text


def test_runs_are_named_by_what_distinguishes_them(tmp_path):
    for name in ("x/1/kd", "x/2/kd", "x/2/rkd"):
        write_run(tmp_path / name)
    assert list(read_runs(["x/1/kd", "x/2/kd", "x/2/rkd"])) == ["1/kd", "2/kd", "2/rkd"]
    assert list(read_runs(["x/1/kd"])) == ["kd"]
    assert differing_keys(read_runs(["x/1/kd", "x/2/kd"])) == {}


def test_a_running_mean_is_that_of_the_neighbors():
    assert running_mean([1.0, 2.0, 6.0, 3.0], 1) == pytest.approx([1.5, 3.0, 11 / 3, 4.5])


MISTAKES = {
    "no run": (["nowhere", "--output=c.png"], "'nowhere' has no metrics.csv: give the folder of a run whose logger"),
    "no figure": (["empty", "--output=c.png"], "has no figures yet"),
    "twice": (["a", "a/metrics.csv", "--output=c.png"], "the run 'a' is given twice"),
    "a kind of file": (["a", "--output=c.txt"], "output: 'c.txt' must end with .png, .svg, .pdf or .html"),
    "a file that exists": (["a", "--output=here.png"], "output: 'here.png' already exists and is not overwritten"),
    "a file in place of a folder": (["a", "--output=here.png/c.png"], "output: 'here.png' is a file: give a folder"),
    "too long a name": (["a", f"--output={'c' * 300}.html"], "cannot be used: File name too long"),
    "a full name": (["a", f"--output={'c' * 250}.html"], "cannot be written: File name too long"),
    "broken results": (["broken", "--output=c.html"], "'broken/results.json' cannot be read"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_reported_in_one_sentence(mistake, tmp_path, capsys):
    write_run(tmp_path / "a")
    write_run(tmp_path / "broken")
    (tmp_path / "broken/results.json").write_text('{"last"')
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/metrics.csv").write_text("step,train/loss\n")
    (tmp_path / "here.png").write_text("mine")
    args, message = MISTAKES[mistake]
    assert main(["curves", *args]) == 2
    assert message in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"a", "broken", "empty", "here.png"}
