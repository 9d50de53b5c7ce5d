"""Training with the last, smaller batch of an epoch, as the CRD benchmark does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from distill.__main__ import main
from distill.data import Digits
from distill.data.samplers import ResumableLoader, ShuffledSampler
from distill.errors import UserError
from distill.training.run_info import smallest_batch
from tests.program import KD, RKD, TEACHER, TINY, in_a_process
from tests.stages import curves

IMAGES = 50
"""The training images of `FEW`: 3 x 16 + 2."""

FEW = ["--data.labels_per_class=5", "--data.labeled_only=true"]

HEADS = [
    *KD,
    *RKD,
    *("--model.heads.sp.head=SP", "--model.heads.trg.head=TRG", "--model.heads.trg.head.local_weight=0"),
    "--model.heads.trg.head.tokens_per_image=1",
    *("--model.heads.rrd.head=RRD", "--model.heads.rrd.head.size=30"),
    *("--model.heads.crd.head=CRD", f"--model.heads.crd.head.samples={IMAGES}", "--model.heads.crd.head.negatives=8"),
]
RUN = [*TINY, *TEACHER, *FEW, "--data.drop_last=false", "--trainer.limit_train_batches=1.0"]
EVERY_STEP = [
    *("--trainer.log_every_n_steps=1", "--checkpoint.every_n_train_steps=1", "--checkpoint.monitor=null"),
    *("--checkpoint.save_top_k=-1", "--checkpoint.filename={step}"),
]


def few(batch_size: int = 16, drop_last: bool = False) -> Digits:
    return Digits(batch_size=batch_size, drop_last=drop_last, labels_per_class=5, labeled_only=True)


def batches(loader: DataLoader[dict[str, torch.Tensor]]) -> list[list[int]]:
    return [batch["index"].tolist() for batch in loader]


def test_as_in_the_public_code_an_epoch_ends_with_a_smaller_batch() -> None:
    full, whole = (batches(few(drop_last=drop).train_dataloader()) for drop in (True, False))
    assert whole[:-1] == full
    assert [len(batch) for batch in whole] == [16] * 3 + [2]
    assert sorted(index for batch in whole for index in batch) == list(range(IMAGES))
    assert len(few().train_dataloader()) == 4


def test_two_ranks_share_the_smaller_batch_evenly() -> None:
    data = few()
    samples = data.samples("train")
    alone = batches(data.train_dataloader())
    shares = [
        batches(ResumableLoader(samples, sampler=ShuffledSampler(samples, 2, rank, 0), batch_size=8, drop_last=False))
        for rank in range(2)
    ]
    assert [{*first, *second} for first, second in zip(*shares, strict=True)] == [set(batch) for batch in alone]
    assert {len(share[-1]) for share in shares} == {1}


@pytest.mark.parametrize("loaded", [2, 3, 4])
def test_a_resumed_loader_goes_on_before_and_after_the_smaller_batch(loaded: int) -> None:
    data, resumed = few(), few()
    loader = data.train_dataloader()
    assert isinstance(loader, ResumableLoader)
    whole = batches(loader)
    iterator = iter(loader)
    for _ in range(loaded):
        next(iterator)
    resumed.load_state_dict(data.state_dict())
    assert batches(resumed.train_dataloader()) == whole[loaded:]


class OnThreeRanks(Digits):
    """The digits as one of three processes gets them."""

    def _ranks(self) -> tuple[int, int]:
        return 3, 0


def test_images_that_cannot_be_dealt_evenly_are_refused_before_anything_is_written() -> None:
    OnThreeRanks().setup("fit")
    with pytest.raises(
        UserError, match="data.drop_last is false, but the 1078 .* evenly to 3 processes: 1 would be left"
    ):
        OnThreeRanks(drop_last=False).setup("fit")


def test_fewer_images_than_a_batch_are_one_smaller_batch() -> None:
    data = few(batch_size=64)
    data.setup("fit")
    assert [len(batch) for batch in batches(data.train_dataloader())] == [IMAGES]


class Numbers(Dataset[int]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        return index


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(10))


def test_heads_are_prepared_with_the_smallest_batch_that_occurs() -> None:
    assert smallest_batch(DataLoader(Numbers(), 4)) == 2
    assert smallest_batch(DataLoader(Numbers(), 4), batches=3) == 2
    assert smallest_batch(DataLoader(Numbers(), 4), batches=2) == 4, "the run does not reach the last batch"
    assert smallest_batch(DataLoader(Numbers(), 5)) == 5
    assert smallest_batch(DataLoader(Numbers(), 40)) == 10
    assert smallest_batch(DataLoader(Numbers(), 4, drop_last=True)) == 4
    assert smallest_batch(DataLoader(Stream(), 4)) == 4
    assert smallest_batch(object()) is None


def test_a_head_that_the_smaller_batch_does_not_fit_is_refused_before_step_0(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trg = ["--model.heads.trg.head=TRG", "--model.heads.trg.head.tokens_per_image=1"]
    given = [*RUN, *trg, "--data.batch_size=48", f"--trainer.default_root_dir={tmp_path}/run"]
    assert main(["fit", *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "model.heads.trg.head: neighbors is 8, but a batch has 2 nodes" in line


def test_check_shows_the_smaller_batch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *RUN]) == 0
    assert "2 images x 1 devices" in capsys.readouterr().out
    assert main(["check", *RUN, "--data.drop_last=true"]) == 0
    assert "last batch" not in capsys.readouterr().out


def test_memories_and_relations_at_every_scope_take_the_smaller_batch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixing = ["--data.mixing.mixup=0.4", "--data.mixing.cutmix=0.4"]
    given = [*RUN, *HEADS, *mixing, *EVERY_STEP, f"--trainer.default_root_dir={tmp_path}/run"]
    assert main(["fit", *given]) == 0, capsys.readouterr().err
    assert len(curves(tmp_path)) == 4
    heads = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    prefix = "distiller.objective.heads."
    assert int(heads[f"{prefix}rrd.queue.count"]) == IMAGES
    assert int(heads[f"{prefix}crd.calls"]) == 4
    assert bool((heads[f"{prefix}crd.bank.label"] >= 0).all()), "every image has been in a batch"


@pytest.mark.slow
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_run_resumed_around_the_smaller_batch_ends_with_the_same_bits(accumulated: int, tmp_path: Path) -> None:
    settings = [*RUN, *HEADS, *EVERY_STEP, "--data.mixing.mixup=0.4", "--trainer.max_epochs=2"]
    settings += [f"--trainer.accumulate_grad_batches={accumulated}"]
    assert main(["fit", *settings, f"--trainer.default_root_dir={tmp_path}/run"]) == 0
    checkpoints = tmp_path / "run/checkpoints"
    expected = torch.load(checkpoints / "last.ckpt", weights_only=True)
    steps = 4 if accumulated == 1 else 2
    assert expected["global_step"] == 2 * steps
    for step in range(1, 2 * steps):
        folder = tmp_path / f"resumed-{step}"
        given = [f"--trainer.default_root_dir={folder}", f"--ckpt_path={checkpoints}/step={step}.ckpt"]
        assert main(["fit", *settings, *given]) == 0
        resumed = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        assert all(torch.equal(tensor, resumed[name]) for name, tensor in expected["state_dict"].items()), step


@pytest.mark.slow
def test_two_processes_train_on_the_smaller_batch_as_one_does(tmp_path: Path) -> None:
    networks = ["--model.student.name=test_vit", "--model.teacher=Timm", "--model.teacher.name=test_vit2"]
    heads = [*KD, *RKD, "--model.heads.sp.head=SP", "--model.heads.trg.head=TRG", "--model.heads.trg.head.neighbors=1"]
    heads += ["--model.heads.trg.head.mode=paper", "--model.heads.trg.head.tokens_per_image=1"]
    states = []
    for size, more in ((16, []), (8, ["--trainer.devices=2", "--trainer.strategy=ddp"])):
        folder = tmp_path / str(size)
        given = [*RUN, *networks, *heads, f"--data.batch_size={size}", *more, f"--trainer.default_root_dir={folder}"]
        process = in_a_process("fit", *given, cwd=tmp_path)
        assert process.returncode == 0, process.stderr
        checkpoint = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
        assert checkpoint["global_step"] == 4
        states.append(checkpoint["state_dict"])
    for name, tensor in states[0].items():
        torch.testing.assert_close(
            states[1][name], tensor, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: name + text
        )
