from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distill.superpixels.color import rgb_to_lab
from distill.superpixels.connectivity import connect, connected_components
from distill.superpixels.quality import compactness, connectivity, explained_variation


def flooded(labels: Tensor) -> Tensor:
    """Pieces of one label map, by flooding."""
    pieces = torch.full_like(labels, -1)
    height, width = labels.shape
    for start in range(labels.numel()):
        if pieces.flatten()[start] >= 0:
            continue
        waiting = [divmod(start, width)]
        while waiting:
            y, x = waiting.pop()
            if pieces[y, x] >= 0:
                continue
            pieces[y, x] = start
            waiting += [
                (a, b)
                for a, b in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1))
                if 0 <= a < height and 0 <= b < width and labels[a, b] == labels[y, x]
            ]
    return pieces


def spiral(size: int) -> Tensor:
    """One winding path of label 1 through label 0."""
    labels = torch.zeros(size, size, dtype=torch.long)
    y, x, down, right = 0, 0, 0, 1
    labels[0, 0] = 1
    for turn in range(size):
        for _ in range(size - 1 - 2 * (max(turn - 1, 0) // 2)):
            y, x = y + down, x + right
            if not (0 <= y < size and 0 <= x < size):
                return labels
            labels[y, x] = 1
        down, right = right, -down
    return labels


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (13, 11)])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_pieces_are_those_found_by_flooding(size: tuple[int, int], count: int) -> None:
    labels = torch.randint(count, (4, *size), generator=torch.Generator().manual_seed(count))
    assert torch.equal(connected_components(labels), torch.stack([flooded(image) for image in labels]))


def test_winding_pieces_are_found_whole() -> None:
    labels = torch.stack([spiral(24), torch.ones(24, 24, dtype=torch.long)])
    assert torch.equal(connected_components(labels), torch.stack([flooded(image) for image in labels]))


def test_the_largest_piece_stays_and_others_join_what_looks_alike() -> None:
    labels = torch.tensor([[[0, 0, 0, 1, 1], [0, 0, 0, 1, 2], [2, 2, 2, 2, 2], [1, 2, 2, 2, 2]]])
    centers = torch.tensor([[[10.0, 0, 0], [50.0, 0, 0], [90.0, 0, 0]]])
    colors = centers[0, labels].permute(0, 3, 1, 2)
    repaired = connect(labels, colors, centers)
    assert repaired.tolist() == [[[0, 0, 0, 1, 1], [0, 0, 0, 1, 2], [2, 2, 2, 2, 2], [2, 2, 2, 2, 2]]]


def test_a_piece_of_the_same_size_stays_where_it_comes_first() -> None:
    labels = torch.tensor([[[0, 1, 0]]])
    centers = torch.zeros(1, 2, 3)
    assert connect(labels, torch.zeros(1, 3, 1, 3), centers).tolist() == [[[0, 1, 1]]]


def test_explained_variation_is_one_minus_the_variance_within() -> None:
    images = torch.rand(2, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(5, (2, 12, 12), generator=torch.Generator().manual_seed(1))
    for image, segments, found in zip(rgb_to_lab(images), labels, explained_variation(images, labels), strict=True):
        within = sum(
            (image[:, segments == k] - image[:, segments == k].mean(1, keepdim=True)).square().sum() for k in range(5)
        )
        total = (image - image.mean((1, 2), keepdim=True)).square().sum()
        assert found.item() == pytest.approx(1 - float(within / total))


def test_one_segment_explains_nothing_and_each_pixel_by_itself_everything() -> None:
    images = torch.rand(1, 3, 4, 4)
    assert explained_variation(images, torch.zeros(1, 4, 4, dtype=torch.long)).item() == pytest.approx(0.0, abs=1e-12)
    assert explained_variation(images, torch.arange(16).view(1, 4, 4)).item() == pytest.approx(1.0)
    assert explained_variation(torch.ones(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long)).item() == 1.0


def test_squares_have_the_compactness_of_a_square_and_strips_less() -> None:
    squares = ((torch.arange(12) // 4).unsqueeze(1) * 3 + torch.arange(12) // 4).unsqueeze(0)
    strips = torch.arange(12).unsqueeze(1).expand(1, 12, 12)
    assert compactness(squares).item() == pytest.approx(math.pi / 4)
    assert compactness(strips).item() == pytest.approx(4 * math.pi * 12 / 26**2)


def test_connectivity_is_the_share_in_the_largest_pieces() -> None:
    labels = torch.tensor([[[0, 0, 1, 0], [1, 1, 1, 0]], [[0, 0, 1, 1], [0, 0, 1, 1]]])
    assert connectivity(labels).tolist() == [6 / 8, 1.0]
