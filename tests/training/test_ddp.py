"""Training on two ranks with the Trainer's DDP."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from distill.data import Digits, ExponentialTail, Mixing
from distill.distributed import rank, world_size
from distill.errors import UserError
from distill.heads.crd import CRD
from distill.heads.kd import KD
from distill.heads.rkd import RKD
from distill.heads.rrd import RRD
from distill.networks import Ensemble
from distill.networks.torch_module import TorchModule
from distill.objective import Term
from distill.schedules import Until
from distill.training.ddp import SyncBatchNorms, _require_equal_data
from distill.training.distillation import DistillationModule
from tests.nets import Plain
from tests.two_ranks import RankPool

pytestmark = pytest.mark.slow

STUDENT = "distiller.student.model."


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    """A separate pool with a long timeout, since its first call loads Lightning and timm."""
    ranks = RankPool(timeout=240.0)
    yield ranks
    ranks.close()


class InPool(LightningEnvironment):
    """Lightning environment for the existing ranks of a pool."""

    creates_processes_externally = True

    def world_size(self) -> int:
        return world_size()

    def global_rank(self) -> int:
        return rank()

    def local_rank(self) -> int:
        return rank()


def _fit(
    folder: Path,
    seeds: tuple[int, int] = (0, 0),
    static_graph: bool = False,
    batch_size: int = 16,
    data: Mapping[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Tensor]:
    """Return the state after training in float64, with Lightning's DDP or in one process.

    Unless `settings` say otherwise, training takes four batches of 16 images.
    """
    module, trainer = _set_up(folder, seeds[rank()], static_graph, **settings)
    trainer.fit(module, Digits(batch_size=batch_size // world_size(), **(data or {})))
    return module.state_dict()


def _set_up(
    folder: Path,
    seed: int = 0,
    static_graph: bool = False,
    student: Callable[[], nn.Module] = Plain,
    teacher: Callable[[], nn.Module] = Plain,
    module: Mapping[str, Any] = {},  # only read
    ddp: Mapping[str, Any] = {},  # only read
    teacher_seed: int = 0,
    **settings: Any,
) -> tuple[DistillationModule, Trainer]:
    torch.manual_seed(teacher_seed)
    networks = {"student": TorchModule(student()), "teacher": TorchModule(teacher())}
    torch.manual_seed(seed)
    strategy = DDPStrategy(cluster_environment=InPool(), process_group_backend="gloo", static_graph=static_graph, **ddp)
    defaults = {
        "heads": {
            "kd": Term(KD()),
            "rkd": Term(RKD()),
            "rrd": Term(RRD(size=50, width=8)),
            "crd": Term(CRD(1078, 64, 8)),
        },
        "optimizer": partial(torch.optim.SGD, lr=0.1),
        "num_classes": 10,
        "image_shape": (3, 32, 32),
    }
    return DistillationModule(**networks, **{**defaults, **deepcopy(dict(module))}), Trainer(
        accelerator="cpu",
        devices=world_size(),
        strategy=strategy if world_size() > 1 else "auto",
        precision="64-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **{"max_epochs": 1, "limit_train_batches": 4, "limit_val_batches": 0, **settings},
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"static_graph": True},
        {"accumulate_grad_batches": 2},
        {"module": {"lr_scaling": "linear", "lr_base_size": 64}},
        {"gradient_clip_val": 0.1},
        {"max_epochs": 3, "limit_train_batches": 22},
        {"data": {"mixing": Mixing(mixup=0.4, cutmix=0.4)}, "max_epochs": 2, "limit_train_batches": 6},
        {"data": {"mixing": Mixing(mixup=0.4, cutmix=0.4)}, "batch_size": 18},
        {"data": {"repetitions": 3}},
        {"data": {"class_balanced": True}},
    ],
    ids=[
        "plain",
        "static graph",
        "accumulation",
        "scaled learning rate",
        "clipped gradients",
        "several epochs",
        "mixing",
        "mixing of odd batches",
        "repeated augmentation",
        "balanced classes",
    ],
)
def test_two_ranks_end_with_the_weights_of_one_process(settings: Any, pool: RankPool, tmp_path: Path) -> None:
    expected = _fit(tmp_path, **settings)
    initial = _set_up(tmp_path)[0].state_dict()
    assert not torch.equal(expected[f"{STUDENT}layers.1.weight"].float(), initial[f"{STUDENT}layers.1.weight"])
    for actual in pool.run(partial(_fit, tmp_path, **settings)):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_two_ranks_with_several_teachers_end_with_the_weights_of_one_process(pool: RankPool, tmp_path: Path) -> None:
    torch.manual_seed(7)
    heads = {
        "kd": Term(KD(), teacher="both"),
        "rkd": Term(RKD(), Until(1.0, steps=2), teacher="other"),  # from then on, nothing reads `third`
        "kd_third": Term(KD(), Until(1.0, steps=2), teacher="third"),
        "rrd": Term(RRD(size=64, width=8), teacher="teacher"),
    }
    teachers = {"other": TorchModule(Plain()), "third": TorchModule(Plain()), "both": Ensemble(["teacher", "other"])}
    settings = {"module": {"heads": heads, "teachers": teachers}}
    expected = _fit(tmp_path, **settings)
    for actual in pool.run(partial(_fit, tmp_path, **settings)):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_ranks_with_different_seeds_hold_the_same_memories(pool: RankPool, tmp_path: Path) -> None:
    first, second = pool.run(_fit, tmp_path, (1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)


class FigureRecorder(Callback):
    """Records the logged figures of all steps."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.steps.append(dict(trainer.callback_metrics))


def _figures(folder: Path) -> list[dict[str, Tensor]]:
    recorder = FigureRecorder()
    _fit(folder, log_every_n_steps=3, limit_train_batches=5, callbacks=[recorder])
    return recorder.steps


def test_logged_terms_are_means_over_the_ranks_on_the_steps_that_are_shown(pool: RankPool, tmp_path: Path) -> None:
    expected, ranks = _figures(tmp_path), pool.run(_figures, tmp_path)
    assert {"train/loss", "train/kd_weighted", "train/rrd/student_entropy", "train/lr"} <= expected[2].keys()
    for steps in ranks:
        assert steps[0] == steps[1] == {}, "what no step shows is not reduced, and no rank has figures of its own"
        for step in (2, 4):
            torch.testing.assert_close(steps[step], expected[step], rtol=1e-6, atol=1e-7)
        assert steps[3] == steps[2]


def _plateau_rates(folder: Path) -> list[Tensor]:
    from lightning.pytorch.cli import ReduceLROnPlateau

    scheduler = partial(ReduceLROnPlateau, monitor="train/loss", patience=0, threshold=0.5)
    recorder = FigureRecorder()
    module = {"scheduler": scheduler, "scheduler_interval": "step"}
    _fit(folder, module=module, limit_train_batches=5, callbacks=[recorder], log_every_n_steps=4)
    return [step["train/lr"] for step in recorder.steps if "train/lr" in step]


def test_a_plateau_scheduler_of_every_step_sees_the_mean_on_all_ranks(pool: RankPool, tmp_path: Path) -> None:
    first, second = pool.run(_plateau_rates, tmp_path)
    assert first == second
    assert first[-1] == _plateau_rates(tmp_path)[-1] < first[0]


def _validated(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    settings = {"limit_val_batches": 1.0, "num_sanity_val_steps": 0, "ddp": {"broadcast_buffers": False}}
    module, trainer = _set_up(folder, student=WithBatchNorm, teacher=WithBatchNorm, **settings)
    trainer.fit(module, Digits(batch_size=8))
    return {name: value for name, value in trainer.callback_metrics.items() if "val/" in name}, module.state_dict()


def _evaluated(folder: Path, state: dict[str, Tensor], batch_size: int, split: str) -> dict[str, Tensor]:
    module, trainer = _set_up(folder, student=WithBatchNorm, teacher=WithBatchNorm, limit_val_batches=1.0)
    module.load_state_dict(state)
    data = Digits(batch_size=batch_size, longtail=ExponentialTail(imbalance=0.1))
    getattr(trainer, split)(module, data, verbose=False)
    return dict(trainer.callback_metrics)


def test_a_validation_of_two_ranks_is_that_of_the_checkpoint_in_one_process(pool: RankPool, tmp_path: Path) -> None:
    (first, state), (second, _) = pool.run(_validated, tmp_path)
    expected = _evaluated(tmp_path, state, 64, "validate")
    assert {"val/top1", "val/calibration_error", "val/agreement", "val/kl_to_teacher"} <= expected.keys()
    for figures in (first, second):
        torch.testing.assert_close(figures, expected, rtol=1e-5, atol=0)


def test_a_test_of_two_ranks_counts_every_image_once(pool: RankPool, tmp_path: Path) -> None:
    state = _set_up(tmp_path, student=WithBatchNorm, teacher=WithBatchNorm)[0].state_dict()
    expected = _evaluated(tmp_path, state, 64, "test")
    assert {"test/few", "test/balanced", "test/kl_to_teacher", "test/recall/3"} <= expected.keys()
    for figures in pool.run(_evaluated, tmp_path, state, 7, "test"):  # of 449 images, with 225 on each rank
        torch.testing.assert_close(figures, expected, rtol=1e-5, atol=0)


def _other_teachers(folder: Path) -> None:
    module, trainer = _set_up(folder, teacher_seed=rank())
    trainer.fit(module, Digits(batch_size=8))


def test_ranks_with_other_teachers_are_refused(pool: RankPool, tmp_path: Path) -> None:
    message = (
        "model.teacher: rank 0 and rank 1 have different weights of 'teacher': load them from a file, or seed all "
        "ranks alike before the networks are made"
    )
    assert pool.run(_refusal, _other_teachers, tmp_path) == [message, message]


class BroadcastRecorder(Callback):
    """Records the buffers that DDP broadcasts from rank 0."""

    names: set[str]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        wrapped = cast(DistributedDataParallel, trainer.strategy.model)
        self.names = {name for name, _ in wrapped.module.named_buffers()} - wrapped.parameters_to_ignore


def _broadcast_names(folder: Path) -> set[str]:
    recorder = BroadcastRecorder()
    module, trainer = _set_up(folder, student=WithBatchNorm, callbacks=[recorder])
    trainer.fit(module, Digits(batch_size=8))
    return recorder.names


def test_ddp_broadcasts_the_students_statistics_but_neither_memories_nor_the_teacher(
    pool: RankPool, tmp_path: Path
) -> None:
    for names in pool.run(_broadcast_names, tmp_path):
        assert f"{STUDENT}norm.running_mean" in names
        assert not any(name.startswith(("distiller.objective.", "distiller.teachers.")) for name in names)


def _refusal(function: Callable[..., Any], *args: Any) -> str:
    try:
        function(*args)
    except UserError as error:
        return str(error)
    return "none"


def test_a_static_graph_with_accumulation_is_refused(pool: RankPool, tmp_path: Path) -> None:
    message = (
        "trainer.accumulate_grad_batches is 2, but DDP cannot accumulate with a static graph: set static_graph of "
        "trainer.strategy to false"
    )
    fit = partial(_fit, tmp_path, static_graph=True, accumulate_grad_batches=2)
    assert pool.run(_refusal, fit) == [message, message]


def _unequal_data() -> None:
    _require_equal_data(DataLoader(TensorDataset(torch.zeros(10 + 4 * rank())), batch_size=4))


def _equal_data() -> None:
    _require_equal_data(DataLoader(TensorDataset(torch.zeros(10)), batch_size=4))
    _require_equal_data(DataLoader(Endless(), batch_size=4))
    _require_equal_data(None)


class Endless(IterableDataset[int]):
    """Data set without a length."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(rank()))


def test_unequal_data_are_rejected_on_every_rank_instead_of_hanging(pool: RankPool) -> None:
    message = (
        "data: rank 0 has 3 batches of 4 from 10 samples, but rank 1 has 4 batches of 4 from 14 samples: give every "
        "rank equally many, as a DistributedSampler does"
    )
    assert pool.run(_refusal, _unequal_data) == [message, message]
    assert pool.run(_refusal, _equal_data) == ["none", "none"]


class WithBatchNorm(nn.Module):
    """Student with a plain BatchNorm and one of timm's that contains its activation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=4)
        self.norm = BatchNormAct2d(4)
        self.plain = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 10)

    def forward(self, image: Tensor) -> Tensor:
        scores: Tensor = self.fc(self.plain(self.norm(self.stem(image))).mean((2, 3)))
        return scores


def _fit_synchronized(folder: Path) -> None:
    module, trainer = _set_up(folder, student=WithBatchNorm, sync_batchnorm=True)
    trainer.fit(module, Digits(batch_size=8))


def test_synchronized_batch_norm_is_refused_on_cpus(pool: RankPool, tmp_path: Path) -> None:
    message = "trainer.sync_batchnorm works only on GPUs, given a CPU: set it to false"
    assert pool.run(_refusal, _fit_synchronized, tmp_path) == [message, message]


def test_only_the_students_batch_norm_is_synchronized_and_keeps_its_activations(tmp_path: Path) -> None:
    module, _ = _set_up(tmp_path, student=WithBatchNorm, teacher=WithBatchNorm)
    assert module.teacher is not None
    image, names = torch.rand(4, 3, 32, 32), list(module.state_dict())
    before = module.eval()(image)
    network = cast(WithBatchNorm, module.student.model)
    original = network.norm

    by_torch = nn.SyncBatchNorm.convert_sync_batchnorm(deepcopy(network))
    assert not torch.allclose(by_torch(image), before), "torch's own conversion is sufficient: the plugin is not needed"

    plugin = SyncBatchNorms()
    assert plugin.apply(module) is module
    assert isinstance(network.norm, nn.SyncBatchNorm)
    assert isinstance(network.plain, nn.SyncBatchNorm)
    assert not any(isinstance(layer, nn.SyncBatchNorm) for layer in module.teacher.network.modules())
    assert list(module.state_dict()) == names
    assert torch.equal(module(image), before)

    network.norm.running_mean.fill_(1.0)  # type: ignore[union-attr]  # as training would
    trained = module(image)
    plugin.revert(module)
    assert network.norm is original
    assert torch.equal(module(image), trained)
    assert not torch.equal(trained, before)
