"""The callback that draws what heads compare, under the real command line."""

import torch

from distill.cli import run
from tests.cli import KD, TEACHER, TINY

HEADS = [*TEACHER, *KD, "--model.heads.rrd.head=RRD", "--model.heads.rrd.head.size=32"]


def test_heads_that_can_are_drawn_and_training_is_not_disturbed(tmp_path):
    drawn = run(["fit", *TINY, *HEADS, "--trainer.callbacks=HeadPictures", f"--trainer.default_root_dir={tmp_path}/a"])
    plain = run(["fit", *TINY, *HEADS, f"--trainer.default_root_dir={tmp_path}/b"])
    pictures = list((tmp_path / "a" / "pictures").iterdir())
    assert [picture.name for picture in pictures] == ["rrd-epoch-0.png"], "KD has no picture, RRD has one"
    assert pictures[0].read_bytes().startswith(b"\x89PNG")
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(drawn.model.state_dict()[name], tensor), name
