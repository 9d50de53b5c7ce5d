"""The modules with the real Trainer: teacher, terms, checkpoints and metrics."""

import csv
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

from distill.data import Digits, ExponentialTail
from distill.errors import UserError
from distill.heads.kd import KD
from distill.heads.ldam import LDAM
from distill.heads.logit_adjustment import LogitAdjustment
from distill.heads.rkd import RKD
from distill.networks import Timm
from distill.objective import Term
from distill.schedules import Linear, Until
from distill.training.classification import ClassificationModule
from distill.training.distillation import DistillationModule

SETTINGS = {"optimizer": partial(torch.optim.SGD, lr=0.01), "num_classes": 10, "image_shape": (3, 32, 32)}


def distillation(seed=0, teacher="test_resnet", **kwargs):
    torch.manual_seed(seed)
    heads = {"kd": Term(KD()), "rkd": Term(RKD())}
    return DistillationModule(
        student=Timm("test_efficientnet"), teacher=Timm(teacher), **{"heads": heads, **SETTINGS, **kwargs}
    )


def fit(module, tmp_path, ckpt_path=None, **kwargs):
    trainer = Trainer(
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **{"logger": False, "max_steps": 3, "limit_val_batches": 0, **kwargs},
    )
    trainer.fit(module, Digits(batch_size=8), ckpt_path=ckpt_path)
    return trainer


def test_fit_changes_no_bit_of_the_teacher(tmp_path):
    module = distillation()
    before = {name: tensor.clone() for name, tensor in module.teacher.network.state_dict().items()}
    student = {name: tensor.clone() for name, tensor in module.student.state_dict().items()}
    fit(module, tmp_path)
    module.train()
    assert not any(layer.training for layer in module.teacher.network.modules())
    after = module.teacher.network.state_dict()
    assert any("running_mean" in name for name in before), "the test needs a teacher with BatchNorm"
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in module.teacher.network.parameters())
    assert not all(torch.equal(tensor, module.student.state_dict()[name]) for name, tensor in student.items())


def test_teacher_is_not_in_the_checkpoint_nor_in_the_optimizer(tmp_path):
    module = distillation()
    trainer = fit(module, tmp_path)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert {name.split(".")[0] for name in checkpoint["state_dict"]} == {"distiller"}
    optimized = sum(len(group["params"]) for group in checkpoint["optimizer_states"][0]["param_groups"])
    assert optimized == len(list(module.student.parameters()))
    assert "hyper_parameters" not in checkpoint


def test_a_resumed_run_rebuilds_its_teacher(tmp_path):
    fit(distillation(), tmp_path).save_checkpoint(tmp_path / "a.ckpt")
    trainer = fit(distillation(), tmp_path, ckpt_path=tmp_path / "a.ckpt", max_steps=5)
    assert trainer.global_step == 5


def test_a_resumed_run_rejects_another_teachers_weights(tmp_path):
    fit(distillation(seed=0), tmp_path).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"model.teacher: the checkpoint was trained with test_resnet \(weights \w+\)"):
        fit(distillation(seed=1), tmp_path, ckpt_path=tmp_path / "a.ckpt", max_steps=5)


def test_ddp_does_not_broadcast_the_teacher():
    module = distillation()
    names = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    assert names
    assert not any(name.startswith("teacher") for name in names), "DDP broadcasts all tensors of the module"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_teacher_computes_in_its_own_dtype(dtype, tmp_path):
    module = distillation(teacher_dtype=dtype)
    matrices = (parameter for parameter in module.teacher.network.parameters() if parameter.ndim > 1)
    assert {parameter.dtype for parameter in matrices} == {getattr(torch, dtype)}
    assert fit(module, tmp_path).global_step == 3


def test_the_loss_is_the_weighted_sum_of_the_terms(tmp_path):
    torch.manual_seed(3)
    batch = {"image": torch.rand(8, 3, 32, 32), "label": torch.arange(8), "index": torch.arange(8)}
    module = distillation(heads={"kd": Term(KD(), 0.5), "rkd": Term(RKD(), 2.0)}).eval()
    module.log_dict = module.log = lambda *args, **kwargs: None
    student, teachers = module.extract_features(batch)
    values = {name: term.head(student, teachers["teacher"], batch) for name, term in module.terms.items()}
    expected = values["task"] + 0.5 * values["kd"] + 2.0 * values["rkd"]
    torch.testing.assert_close(module.training_step(batch, 0), expected)


def logged(tmp_path, every):
    """Return the logged rows of a run of 5 steps, by step, and its metrics for callbacks."""
    logger = CSVLogger(tmp_path, name="", version=f"{every}")
    trainer = fit(distillation(), tmp_path, logger=logger, max_steps=5, log_every_n_steps=every)
    with (tmp_path / f"{every}" / "metrics.csv").open() as file:
        return {int(row["step"]): row for row in csv.DictReader(file)}, trainer.callback_metrics


def test_steps_between_logging_intervals_are_skipped_and_the_others_unchanged(tmp_path):
    (rows, metrics), (every_second, same_metrics) = logged(tmp_path, 1), logged(tmp_path, 2)
    assert list(rows) == [0, 1, 2, 3, 4]
    assert every_second == {step: rows[step] for step in (1, 3)}
    assert {"train/kd", "train/kd_weight", "train/kd_weighted", "train/lr", "train/loss"} <= rows[1].keys()
    assert all(rows[1].values())
    assert {name: float(value) for name, value in same_metrics.items()} == {
        name: float(value) for name, value in metrics.items()
    }


def test_weights_follow_their_schedules(tmp_path):
    module = distillation(heads={"kd": Term(KD(), Linear(0.0, 3.0)), "rkd": Term(RKD(), Until(1.0, steps=2))})
    trainer = fit(module, tmp_path, log_every_n_steps=1)
    assert float(trainer.callback_metrics["train/kd_weight"]) == pytest.approx(3.0 * 2 / 3)
    assert float(trainer.callback_metrics["train/rkd_weight"]) == 0.0


def test_a_schedule_over_an_endless_run_is_rejected_before_step_0(tmp_path):
    module = distillation(heads={"kd": Term(KD(), Linear(0.0, 3.0))})
    with pytest.raises(UserError, match=r"model.heads.kd.weight: Linear over a run without an end"):
        fit(module, tmp_path, max_steps=-1, max_epochs=-1)


def test_a_classification_module_trains_without_a_teacher(tmp_path):
    module = ClassificationModule(student=Timm("test_resnet"), **SETTINGS)
    trainer = fit(module, tmp_path)
    assert trainer.global_step == 3
    assert set(module.terms) == {"task"}


def test_terms_that_need_no_labels_train_on_unlabeled_images(tmp_path):
    module = distillation(task=Term(KD(), 0.0))
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_steps=2,
        limit_val_batches=0,
    )
    trainer.fit(module, Digits(batch_size=8, labels_per_class=1))
    assert "train/task" not in trainer.callback_metrics
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


def test_weight_decay_can_exempt_biases_norms_and_parameters_named_by_the_network():
    adamw = partial(torch.optim.AdamW, weight_decay=0.1)
    module = ClassificationModule(Timm("test_vit"), **{**SETTINGS, "optimizer": adamw}, weight_decay_on="matrices")
    optimizer = module.configure_optimizers()
    with_decay, without_decay = optimizer.param_groups
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    assert (with_decay["weight_decay"], without_decay["weight_decay"]) == (0.1, 0.0)
    assert {
        "distiller.student.model.pos_embed",
        "distiller.student.model.cls_token",
        "distiller.student.model.norm.weight",
    } <= {names[id(parameter)] for parameter in without_decay["params"]}
    assert all(parameter.ndim > 1 for parameter in with_decay["params"])
    assert len(with_decay["params"]) + len(without_decay["params"]) == len(names)


@pytest.mark.parametrize("precision", ["bf16-mixed", "32"])
def test_weights_stay_finite_at_any_precision(precision, tmp_path):
    module = distillation()
    fit(module, tmp_path, precision=precision)
    assert all(weight.isfinite().all() and weight.dtype == torch.float32 for weight in module.student.parameters())


@pytest.mark.slow
def test_compiled_networks_give_the_eager_loss_and_keep_the_names_of_weights(tmp_path):
    batch = {"image": torch.rand(8, 3, 32, 32), "label": torch.arange(8), "index": torch.arange(8)}
    losses, gradients, modules = [], [], []
    for which in ("none", "both"):
        torch.manual_seed(0)
        networks = {
            "student": Timm("test_vit", taps={"mid": "blocks.1"}),
            "teacher": Timm("test_vit2", taps={"mid": "blocks.1"}),
        }
        heads = {"kd": Term(KD()), "rkd": Term(RKD(of="mid"))}
        module = DistillationModule(**networks, heads=heads, compile=which, **SETTINGS)
        module.log_dict = module.log = lambda *args, **kwargs: None
        for _ in range(2):  # the second pass runs the code compiled in the first
            module.zero_grad()
            loss = module.training_step(batch, 0)
            loss.backward()
        losses.append(loss.detach())
        gradients.append({name: weight.grad for name, weight in module.named_parameters()})
        modules.append(module)
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5)
    assert list(modules[1].state_dict()) == list(modules[0].state_dict())
    assert modules[1].student._compiled_call_impl is not None


def test_a_test_on_long_tailed_data_reports_many_medium_and_few_shot_accuracy(tmp_path):
    module = ClassificationModule(student=Timm("test_resnet"), **SETTINGS)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    data = Digits(longtail=ExponentialTail(0.02, many=50, few=10))
    (metrics,) = trainer.test(module, data, verbose=False)
    recall = [metrics[f"test/recall/{label}"] for label in range(10)]
    groups = {"many": recall[:2], "medium": recall[2:6], "few": recall[6:], "balanced": recall}
    for name, recalls in groups.items():
        assert metrics[f"test/{name}"] == pytest.approx(sum(recalls) / len(recalls), rel=1e-5)
    labels = torch.cat([batch["label"] for batch in data.test_dataloader()]).bincount()
    assert metrics["test/top1"] == pytest.approx(float((torch.tensor(recall) * labels).sum() / 449), rel=1e-5)
    (plain,) = trainer.test(module, Digits(), verbose=False)
    assert set(plain) == {"test/top1", "test/top5", "test/calibration_error"}


def test_a_loss_receives_the_class_counts_before_step_0(tmp_path):
    module = ClassificationModule(student=Timm("test_resnet"), task=Term(LDAM()), **SETTINGS)
    data = Digits(batch_size=8, longtail=ExponentialTail(0.02))
    trainer = Trainer(accelerator="cpu", logger=False, max_steps=1, limit_val_batches=0, default_root_dir=tmp_path)
    trainer.fit(module, data)
    assert module.terms["task"].head.counts.tolist() == data.class_counts()
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert saved["distiller.objective.heads.task.counts"].tolist() == data.class_counts()


def test_a_loss_that_needs_class_counts_rejects_data_without_them(tmp_path):
    module = ClassificationModule(student=Timm("test_resnet"), task=Term(LogitAdjustment()), **SETTINGS)
    trainer = Trainer(accelerator="cpu", logger=False, max_steps=1, limit_val_batches=0, default_root_dir=tmp_path)
    loader = Digits(batch_size=8).train_dataloader()
    with pytest.raises(UserError, match="model.task.head: LogitAdjustment needs to know how many training"):
        trainer.fit(module, loader)
