"""What is raised while a configuration becomes objects is the user's mistake, with few exceptions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser

import distill.heads
from distill.__main__ import main
from distill.cli.construction import construction
from distill.cli.jsonargparse_internals import adapted_jsonargparse
from distill.errors import ConstructionError, UserError, under
from distill.networks.timm import Timm
from distill.training.classification import ClassificationModule
from tests.program import TINY


def test_an_exception_becomes_a_user_error_with_key_and_reason():
    message = r"^data: no such file or directory: 'nowhere' \(.*, line \d+\)$"
    with pytest.raises(ConstructionError, match=message), construction("data"):
        Path("nowhere").read_text()


def test_the_innermost_key_is_named():
    message = "^model.heads.kd.head: too hot"
    with pytest.raises(ConstructionError, match=message), construction("trainer"), under("model.heads.kd.head"):
        raise ValueError("too hot")


def test_a_user_error_keeps_its_sentence():
    with pytest.raises(UserError, match=r"^model.student: no layer$"), construction("trainer"):
        raise UserError("model.student: no layer")


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), SystemExit(3)])
def test_lack_of_memory_and_exits_pass(error):
    with pytest.raises(type(error)) as found, construction("model"):
        raise error
    assert found.value is error


def test_an_interrupt_passes():
    with pytest.raises(KeyboardInterrupt), construction("model"):
        raise KeyboardInterrupt


def test_a_missing_attribute_in_a_line_of_ours_is_no_mistake_of_the_user():
    with pytest.raises(AttributeError, match="no_such_name"), construction("model"):
        distill.no_such_name  # noqa: B018  # raised in distill/__init__.py


def test_a_missing_attribute_in_a_line_of_the_user_is_his_mistake():
    message = "AttributeError: 'int' object has no attribute 'x'"
    with pytest.raises(ConstructionError, match=message), construction("model"):
        (5).x  # noqa: B018


def test_exceptions_pass_once_everything_is_made():
    with pytest.raises(ValueError, match="later"), construction("model", until=lambda: True):
        raise ValueError("later")


def test_the_object_whose_method_raises_gives_the_key():
    class Data:
        def setup(self):
            raise ValueError("no images")

    data = Data()
    with pytest.raises(ConstructionError, match="^data: no images"), construction("trainer", {"data": data}):
        data.setup()


def test_in_python_nothing_is_converted():
    module = ClassificationModule(
        Timm("test_resnet"), lambda groups: torch.optim.SGD(groups, lr=-0.1), num_classes=3, image_shape=(3, 32, 32)
    )
    with pytest.raises(ValueError, match="Invalid learning rate: -0.1") as found:
        module.configure_optimizers()
    assert not isinstance(found.value, UserError)


@pytest.mark.parametrize("debug", ["", "1"])
def test_the_traceback_is_shown_on_demand(debug, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DISTILL_DEBUG", debug)
    assert main(["fit", *TINY, "--checkpoint.mode=best"]) == 2
    error = capsys.readouterr().err
    assert ("MisconfigurationException" in error) == ("Traceback" in error) == (debug == "1")
    assert ("DISTILL_DEBUG=1 shows the traceback" in error) == (debug == "")
    assert "distill: checkpoint.mode: `mode` can be min, max but got best" in error


def test_a_whole_number_stays_one_whatever_the_order_of_the_types():
    with adapted_jsonargparse():
        parser = ArgumentParser()
        parser.add_argument("--batches", type=float | int | None)
        values = [parser.parse_args([f"--batches={given}"]).batches for given in ("2", "2.0", "0.5", "null")]
    assert [(value, type(value)) for value in values] == [(2, int), (2.0, float), (0.5, float), (None, type(None))]
