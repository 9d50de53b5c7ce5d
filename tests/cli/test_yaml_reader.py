"""Configuration files are checked before the parser reads them: one sentence with the file and the line."""

from __future__ import annotations

import os

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.__main__ import main
from distill.cli.program import run
from distill.cli.yaml_reader import check_files, parse_yaml
from distill.data import Digits
from distill.data.longtail import LongTail
from distill.errors import UserError
from tests.program import TEACHER, TINY

BOMB = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefg", "bcdefgh", strict=True)
)
FILES = {
    "not in UTF-8": ("model: {}\n# ü".encode("latin-1"), "a.yaml is not encoded in UTF-8: line 2 holds the byte 0xfc"),
    "UTF-16": ("model: {}".encode("utf-16"), "a.yaml is not encoded in UTF-8"),
    "binary": (b"\x89PNG\x00\x01", "a.yaml is a binary file, expected YAML"),
    "a control character": (b"model: \x07", "a.yaml is no text"),
    "empty": (b"", "a.yaml is empty"),
    "only comments": (b"# nothing\n", "a.yaml is empty"),
    "a list": (b"- model\n", "a.yaml holds a list"),
    "a word": (b"model\n", "a.yaml holds only 'model'"),
    "an alias of itself": (b"model: &a\n  heads: *a\n", "a.yaml, line 1: this value contains itself by an alias"),
    "aliases without end": (
        BOMB.encode(),
        "a.yaml, line 6: the aliases (`*name`) stand for more than 1,000,000 values",
    ),
    "an unknown alias": (b"model: 1\ndata: *a\n", "a.yaml, line 2: this is not valid YAML: found undefined alias"),
    "a tab": (b"model:\n\theads: 1\n", "a.yaml, line 2: this is not valid YAML: YAML does not allow tabs"),
    "an open bracket": (b"model: {heads: [\n", "a.yaml, line 1: this is not valid YAML"),
    "two documents": (
        b"model: {}\n---\ndata: {}\n",
        "a.yaml, line 2: this is not valid YAML: expected a single document",
    ),
    "code": (b"model: !!python/object:os.system {}\n", "a.yaml, line 1: this is not valid YAML: could not determine"),
    "a key that is true": (b"model:\n  on: 1\n", "a.yaml, line 2: YAML does not read the key 'on' as text"),
    "a section given twice": (
        b"trainer: {}\nmodel: {}\ntrainer: {}\n",
        "a.yaml: the key 'trainer' is given twice, in line 1 and in line 3: remove one of them",
    ),
    "a head given twice": (
        b"model:\n  heads:\n    kd: 1\n    rkd: 2\n    kd: 3\n",
        "a.yaml: the key 'kd' is given twice, in line 3 and in line 5: remove one of them",
    ),
    "a key given twice in a line": (b"trainer: {a: 1, a: 2}\n", "a.yaml: the key 'a' is given twice in line 1"),
    "a key given twice in a list": (b"a: [{b: 1,\n  b: 2}]\n", "the key 'b' is given twice, in line 1 and in line 2"),
}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("content", "expected"), FILES.values(), ids=FILES)
@pytest.mark.parametrize("option", [["--config=a.yaml"], ["--config", "a.yaml"], ["-c", "a.yaml"]])
def test_a_file_that_cannot_be_used_is_named_with_its_line(content, expected, option, tmp_path):
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(UserError) as error:
        check_files(option)
    assert expected in str(error.value)


def test_a_missing_file_is_named_with_a_similar_one(tmp_path):
    (tmp_path / "digits.yaml").write_text("a: 1")
    with pytest.raises(UserError, match=r"^config: there is no file 'digts.yaml': did you mean 'digits.yaml'\?$"):
        check_files(["--config=digts.yaml"])


def test_a_folder_is_named_with_a_file_in_it(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.yaml").write_text("a: 1")
    with pytest.raises(UserError, match=r"^folder is a folder, expected a file, such as 'folder/a.yaml'$"):
        check_files(["--config=folder"])


def test_a_loop_of_links_is_refused(tmp_path):
    (tmp_path / "a.yaml").symlink_to("a.yaml")
    with pytest.raises(UserError, match="a.yaml cannot be read: Too many levels of symbolic links"):
        check_files(["--config=a.yaml"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("a: 1")
    (tmp_path / "a.yaml").chmod(0)
    with pytest.raises(UserError, match="a.yaml cannot be read: permission denied"):
        check_files(["--config=a.yaml"])


@pytest.mark.parametrize("content", ["a list", "aliases without end", "an unknown alias", "a section given twice"])
@pytest.mark.parametrize(
    "option",
    [
        ["--model.student=a.yaml"],
        ["--model=a.yaml"],
        ["--model.heads.kd.head=a.yaml"],
        pytest.param(["--data=a.yaml"], marks=pytest.mark.slow),
        pytest.param(["--data.mixing=a.yaml"], marks=pytest.mark.slow),
        pytest.param(["--trainer=a.yaml"], marks=pytest.mark.slow),
        pytest.param(["--trainer.callbacks=a.yaml"], marks=pytest.mark.slow),
        pytest.param(["--trainer.callbacks=[a.yaml]"], marks=pytest.mark.slow),
    ],
)
def test_a_file_that_the_parser_takes_for_a_part_of_the_configuration_is_checked(content, option, tmp_path, capsys):
    (tmp_path / "a.yaml").write_bytes(FILES[content][0])
    assert main(["check", *TINY, *TEACHER, *option]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"distill: {FILES[content][1]}")
    assert len(error.splitlines()) == 1


def test_a_file_named_in_a_file_is_checked_relative_to_it(tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "outer.yaml").write_text("model: {student: inner.yaml}")
    (tmp_path / "folder" / "inner.yaml").write_text("a: 1\na: 2\n")
    assert main(["check", *TINY[:2], "--config=folder/outer.yaml"]) == 2
    twice = "folder/inner.yaml: the key 'a' is given twice, in line 1 and in line 2"
    assert capsys.readouterr().err.startswith(f"distill: {twice}")


class Annotated(Digits):
    """Digits with a file of annotations, or several.

    Args:
        annotations: name of the file.
        more: further ones.
        tail: a file or a class.
    """

    def __init__(self, annotations: str, more: list[str] | None = None, tail: str | LongTail = "") -> None:
        super().__init__(batch_size=16)
        self.found = [annotations, *(more or []), tail]


ANNOTATIONS = {
    "a mapping": '{"images": [1]}',
    "a list": '[{"image": 1}]',
    "keys given twice": '{"image": 1, "image": 2}',
    "more values than a configuration has": '{"images": [' + ", ".join(["[1, 2, 3]"] * 1000) + "]}",
    "no YAML": '{"image": [',
}


@pytest.mark.parametrize("content", ANNOTATIONS)
def test_other_files_of_the_same_kind_are_the_users_own(content, tmp_path, monkeypatch):
    monkeypatch.setattr("distill.cli.yaml_reader._MOST_NODES", 1000)
    (tmp_path / "own.json").write_text(ANNOTATIONS[content])
    own = ["--data=tests.cli.test_yaml_reader.Annotated", "--data.annotations=own.json", "--data.more=[own.json]"]
    cli = run(["check", *TINY[2:], *own, "--data.tail=own.json"])
    assert cli.datamodule.found == ["own.json"] * 3


def test_other_files_that_a_configuration_file_names_are_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "own.json").write_text("[1]")
    data = {"class_path": "tests.cli.test_yaml_reader.Annotated", "init_args": {"annotations": "own.json"}}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"data": data}))
    assert run(["check", *TINY[2:], "--config=a.yaml"]).datamodule.found == ["own.json", ""]


def test_merged_keys_may_be_overridden_and_aliases_used_again():
    parse_yaml("base: &base {lr: 1, steps: 2}\na: {<<: *base, lr: 3}\nb: *base\n", "a.yaml")


TREES = st.recursive(st.integers(0, 3), lambda inner: st.dictionaries(st.text("xyz", min_size=1), inner), max_leaves=6)


@settings(max_examples=30)
@given(TREES)
def test_a_file_whose_keys_differ_passes_and_one_key_more_does_not(tree):
    text = yaml.safe_dump({"key": tree}, default_flow_style=False)
    parse_yaml(text, "a.yaml")
    with pytest.raises(UserError, match=r"'key' is given twice, in line 1 and in line \d+"):
        parse_yaml(f"{text.removesuffix('...' + chr(10))}\nkey: again\n", "a.yaml")
