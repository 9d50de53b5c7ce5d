"""Superpixels on a device: the CPU's values, and no wait."""

from __future__ import annotations

import pytest
import torch

from distill.superpixels import add_segments, slic, soft_association, soft_superpixels
from distill.superpixels.clustering import cell_grid
from distill.testing import no_waiting
from tests.superpixels.photos import photos


def test_a_batch_has_the_labels_that_each_image_has_alone_on_the_cpu(device: torch.device) -> None:
    images = photos(64)[:4]
    alone = torch.cat([slic(image.unsqueeze(0), 36, backend="torch") for image in images])
    labels = slic(images.to(device), 36, backend="torch")
    assert labels.device.type == device.type
    assert (labels.cpu() == alone).double().mean().item() >= 0.999


def test_segments_of_a_batch_on_a_gpu_do_not_wait(cuda: torch.device) -> None:
    batch = {"image": photos(64)[:4].to(cuda)}
    with no_waiting(cuda):
        segments = add_segments(batch, segments=36)["segments"]
    assert segments.shape == (4, 64, 64)


@pytest.mark.parametrize(
    ("side", "segments", "connected", "dtype"),
    [(64, 36, False, torch.float32), (224, 196, True, torch.float32), (61, 30, False, torch.bfloat16)],
    ids=["even cells", "connected", "uneven cells, half precision"],
)
def test_triton_has_the_labels_of_torch(
    side: int, segments: int, connected: bool, dtype: torch.dtype, cuda: torch.device
) -> None:
    images = photos(side)[:4].to(cuda, dtype)
    expected, found = (slic(images, segments, connected=connected, backend=backend) for backend in ("torch", "triton"))
    assert (found == expected).double().mean().item() >= 0.999
    torch.testing.assert_close(slic(images, segments, connected=connected, backend="triton"), found, rtol=0, atol=0)


def test_soft_superpixels_are_those_of_float64_on_the_cpu_and_do_not_wait(device: torch.device) -> None:
    tokens = torch.randn(3, 36, 8, generator=torch.Generator().manual_seed(0))
    given, grid, target = tokens.to(device), (6, 6), cell_grid(9, 6, 6)
    with no_waiting(device):
        found = soft_association(given, grid, target), soft_superpixels(given, grid, target)
    exact = soft_association(tokens.double(), grid, target), soft_superpixels(tokens.double(), grid, target)
    for tensor, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(tensor.cpu().double(), expected, rtol=1e-4, atol=1e-5)
