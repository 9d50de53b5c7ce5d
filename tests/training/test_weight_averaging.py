"""Weight averages have averaged parameters and BatchNorm statistics, and the current memories and counters."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from torch.optim.swa_utils import get_ema_multi_avg_fn

from distill.data import Digits
from distill.errors import UserError
from distill.heads.kd import KD
from distill.heads.rrd import RRD
from distill.networks import Timm
from distill.objective import Term
from distill.testing import no_waiting
from distill.training.distillation import DistillationModule
from distill.training.weight_averaging import WeightsAverage, evaluated_weights

QUEUE = "distiller.objective.heads.rrd.queue."
SETTINGS = {"optimizer": partial(torch.optim.SGD, lr=0.1), "num_classes": 10, "image_shape": (3, 32, 32)}


class Record(Callback):
    """Notes the state after every step and the one that a validation evaluates; saves after every epoch."""

    def __init__(self, file):
        self.states, self.validated, self.file = [], [], file

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.file)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.states.append({name: tensor.clone() for name, tensor in pl_module.state_dict().items()})

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.validated.append({name: tensor.clone() for name, tensor in pl_module.state_dict().items()})


def train(folder, averaging, ckpt_path=None, epochs=1, **settings):
    torch.manual_seed(0)
    module = DistillationModule(
        student=Timm("test_resnet"),
        teacher=Timm("test_resnet"),
        heads={"kd": Term(KD()), "rrd": Term(RRD(size=20, width=4))},
        **{**SETTINGS, **settings},
    )
    record = Record(folder / "a.ckpt")
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_train_batches=3,
        limit_val_batches=1,
        max_epochs=epochs,
        callbacks=[averaging, record],
        default_root_dir=folder,
    )
    trainer.fit(module, Digits(batch_size=8), ckpt_path=ckpt_path)
    return module, record, torch.load(folder / "a.ckpt", weights_only=True)


def is_averaged(name):
    return not name.startswith((QUEUE, "distiller.objective.factors")) and not name.endswith("num_batches_tracked")


AVERAGES = {
    "EMA": (lambda: EMAWeightAveraging(decay=0.5), lambda states: (states[0] + states[1]) / 4 + states[2] / 2),
    "EMA of groups": (
        lambda: WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(0.5)),
        lambda states: (states[0] + states[1]) / 4 + states[2] / 2,
    ),
    "SWA": (lambda: WeightAveraging(), lambda states: sum(states) / 3),
    "EMA of every second step": (
        lambda: EMAWeightAveraging(decay=0.5, update_every_n_steps=2),
        lambda states: (states[0] + states[2]) / 2,
    ),
}


@pytest.mark.parametrize("name", AVERAGES)
def test_only_parameters_and_statistics_are_averaged(name, tmp_path):
    make, mean = AVERAGES[name]
    module, record, checkpoint = train(tmp_path, make())
    assert int(record.states[-1][f"{QUEUE}count"]) == 24
    averaged = [key for key in record.states[0] if is_averaged(key)]
    assert any(key.endswith("running_var") for key in averaged)
    for state in (module.state_dict(), checkpoint["state_dict"]):
        for key, tensor in state.items():
            states = [step[key] for step in record.states]
            expected = mean(states) if key in averaged else states[-1]
            torch.testing.assert_close(tensor, expected, msg=lambda text, key=key: f"{key}: {text}")
    assert all(torch.equal(tensor, record.states[-1][key]) for key, tensor in checkpoint["current_model_state"].items())


def test_without_buffers_only_parameters_are_averaged(tmp_path):
    module, record, _ = train(tmp_path, EMAWeightAveraging(decay=0.5, use_buffers=False))
    for key, buffer in module.named_buffers():
        assert torch.equal(buffer, record.states[-1].get(key, buffer)), key


def test_a_validation_has_the_current_statistics_where_they_are_not_averaged(tmp_path):
    _, record, _ = train(tmp_path, EMAWeightAveraging(decay=0.5, use_buffers=False), epochs=2)
    for epoch, validated in enumerate(record.validated):
        trained = record.states[3 * epoch + 2]
        statistics = [key for key in trained if key.endswith("running_var")]
        assert statistics
        assert all(torch.equal(validated[key], trained[key]) for key in statistics)


def test_an_average_that_has_not_begun_has_the_current_weights(tmp_path):
    module, record, checkpoint = train(tmp_path, EMAWeightAveraging(decay=0.5, update_starting_at_step=100))
    for state in (module.state_dict(), checkpoint["state_dict"], record.validated[0]):
        assert all(torch.equal(tensor, record.states[-1][key]) for key, tensor in state.items())


def test_an_average_has_the_frozen_teacher_itself_and_waits_for_no_device(tmp_path):
    averaging = EMAWeightAveraging(decay=0.5)
    module, _, _ = train(tmp_path, averaging)
    average = averaging._average_model
    assert average.module.teachers["teacher"].network is module.teachers["teacher"].network
    with no_waiting("cpu"):
        average.update_parameters(module)
    again = WeightsAverage.of(average)
    again.load_state_dict(average.state_dict())
    assert again.has_begun


def test_a_test_in_the_trainer_that_has_trained_takes_the_averaged_weights_of_a_checkpoint(tmp_path):
    averaging = EMAWeightAveraging(decay=0.5)
    module, _, checkpoint = train(tmp_path, averaging)
    module.trainer.limit_test_batches = 1
    module.trainer.test(module, Digits(batch_size=8), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    for name, tensor in module.student.state_dict().items():
        assert torch.equal(tensor, checkpoint["state_dict"][f"distiller.student.{name}"])


def test_a_validation_can_take_the_current_weights_and_changes_neither(tmp_path):
    ends = {}
    for choice in (None, "averaged", "current"):
        module, record, _ = train(tmp_path, EMAWeightAveraging(decay=0.5), evaluation_weights=choice, epochs=2)
        ends[choice] = record.states[-1], module.state_dict(), record.validated[0], record.states[2]
    for choice in ("averaged", "current"):
        for one, two in zip(ends[None][:2], ends[choice][:2], strict=True):
            assert all(torch.equal(tensor, two[key]) for key, tensor in one.items())
    weight = "distiller.student.model.conv1.0.weight"
    for choice, validated_current in ((None, False), ("averaged", False), ("current", True)):
        _, _, validated, trained = ends[choice]
        assert torch.equal(validated[weight], trained[weight]) is validated_current


@pytest.mark.parametrize("choice", [None, "averaged", "current"])
def test_test_and_export_take_the_weights_that_are_asked_for_and_say_so(choice, tmp_path, caplog):
    _, _, checkpoint = train(tmp_path, EMAWeightAveraging(decay=0.5), evaluation_weights=choice)
    module = DistillationModule(student=Timm("test_resnet"), evaluation_weights=choice, **SETTINGS)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, limit_test_batches=1)
    caplog.clear()
    trainer.test(module, Digits(batch_size=8), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    taken, missed = ("current", "averaged") if choice == "current" else ("averaged", "current")
    assert f"the {taken} weights are taken; model.evaluation_weights={missed} takes the {missed} ones" in caplog.text
    content = checkpoint["current_model_state" if choice == "current" else "state_dict"]
    loaded = module.student.state_dict()
    assert loaded
    assert all(torch.equal(tensor, content[f"distiller.student.{key}"]) for key, tensor in loaded.items())
    assert evaluated_weights(checkpoint, choice, "weights").keys() == content.keys()


def test_averaged_weights_that_do_not_exist_cannot_be_taken():
    with pytest.raises(UserError, match="weights is averaged, but the checkpoint is of a run without a weight average"):
        evaluated_weights({"state_dict": {}}, "averaged", "weights")
    assert evaluated_weights({"state_dict": {"a": torch.ones(1)}}, "current", "weights").keys() == {"a"}
