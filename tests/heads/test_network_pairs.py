"""The heads that compare any networks, as they are by default, between a CNN and a transformer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distill.heads import shipped
from distill.networks import Timm

CNN: dict[str, Any] = {"name": "test_resnet"}
TRANSFORMER: dict[str, Any] = {"name": "test_vit", "options": {"patch_size": 8}}


@pytest.mark.parametrize("pair", [(CNN, TRANSFORMER), (TRANSFORMER, CNN)], ids=["student CNN", "student ViT"])
def test_a_cnn_and_a_transformer_are_compared(pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    torch.manual_seed(0)
    student, teacher = (Timm(**arguments) for arguments in pair)
    for network in (student, teacher):
        network.build(10, (3, 64, 64))
    image = torch.rand(4, 3, 64, 64)
    for name in ("SP", "PKT", "CC", "RepDistillerCC", "IRG", "NST", "DIST", "RKD"):
        head = shipped()[name]()
        head.check(student.spec, teacher.spec)
        head.build(student.spec, teacher.spec)
        loss = head(student(image), teacher(image), {})
        (first,) = torch.autograd.grad(loss, next(student.parameters()))
        assert bool(loss.isfinite()), name
        assert bool(first.isfinite().all()), name
        assert bool(first.any()), name
        assert loss.item() > 0, name
