from __future__ import annotations

from typing import Any

import pytest
import torch

from distill.errors import UserError
from distill.superpixels import segment_tokens
from tests.golden import GOLDEN, Q


@pytest.mark.parametrize("figure", GOLDEN["segment_tokens"])
def test_pooled_tokens_are_the_golden_ones(figure: dict[str, Any]) -> None:
    segments = torch.tensor(figure["inputs"]["segments"])
    pooled, present = segment_tokens(Q([12, 3], 95).unsqueeze(0), (3, 4), segments.unsqueeze(0), 5)
    expected = torch.tensor(figure["pooled"], dtype=torch.float64)
    torch.testing.assert_close(pooled[0], expected, rtol=1e-12, atol=1e-15)
    assert present[0].tolist() == figure["present"]


@pytest.mark.parametrize(("grid", "size"), [((3, 4), (7, 9)), ((7, 7), (5, 5)), ((2, 2), (8, 6)), ((1, 1), (1, 1))])
def test_a_segment_is_the_mean_over_the_patches_that_its_pixels_centers_lie_in(grid: Any, size: Any) -> None:
    tokens = Q([2, grid[0] * grid[1], 3], 4)
    segments = torch.arange(2 * size[0] * size[1]).view(2, *size) % 4
    pooled, present = segment_tokens(tokens, grid, segments, 6)
    for image in range(2):
        for label in range(6):
            where = (segments[image] == label).nonzero().tolist()
            patches = [
                int((y + 0.5) / size[0] * grid[0]) * grid[1] + int((x + 0.5) / size[1] * grid[1]) for y, x in where
            ]
            expected = tokens[image, patches].mean(0) if patches else torch.zeros(3, dtype=torch.float64)
            torch.testing.assert_close(pooled[image, label], expected)
            assert present[image, label].item() == bool(where)


def test_cells_as_segments_are_average_pooling() -> None:
    tokens = Q([2, 16, 3], 8)
    cells = (torch.arange(8).view(8, 1) // 4 * 2 + torch.arange(8) // 4).expand(2, 8, 8)
    pooled, _ = segment_tokens(tokens, (4, 4), cells, 4)
    expected = torch.nn.functional.avg_pool2d(tokens.mT.unflatten(2, (4, 4)), 2).flatten(2).mT
    torch.testing.assert_close(pooled, expected)


def test_other_labels_belong_to_no_segment() -> None:
    tokens = Q([1, 4, 3], 8)
    segments = torch.tensor([[[0, -1], [7, 0]]])
    pooled, present = segment_tokens(tokens, (2, 2), segments, 2)
    torch.testing.assert_close(pooled[0, 0], tokens[0, [0, 3]].mean(0))
    assert present.tolist() == [[True, False]]
    assert not pooled[0, 1].any()


def test_gradient_is_the_derivative() -> None:
    segments = torch.arange(48).view(1, 6, 8) % 3
    assert torch.autograd.gradcheck(
        lambda tokens: segment_tokens(tokens, (3, 4), segments, 4)[0], (Q([1, 12, 2], 3).requires_grad_(),)
    )


@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_integer_type_give_the_same(kind: torch.dtype) -> None:
    segments = torch.arange(48).view(1, 6, 8) % 5
    tokens = Q([1, 12, 3], 3).float()
    pooled, _ = segment_tokens(tokens, (3, 4), segments.to(kind), 5)
    assert torch.equal(pooled, segment_tokens(tokens, (3, 4), segments, 5)[0])


@pytest.mark.parametrize(
    ("segments", "count", "message"),
    [
        (torch.zeros(3, 6, 8, dtype=torch.long), 5, r"\[B, H, W\] for 2 images, .* \(3, 6, 8\)"),
        (torch.zeros(2, 1, 6, 8, dtype=torch.long), 5, r"\(2, 1, 6, 8\)"),
        (torch.zeros(2, 6, 8), 5, "torch.float32"),
        (torch.zeros(2, 6, 8, dtype=torch.long), 0, "count must be at least 1, given 0"),
    ],
)
def test_segments_that_do_not_fit_are_told(segments: torch.Tensor, count: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        segment_tokens(Q([2, 12, 3], 1), (3, 4), segments, count)


def test_tokens_off_the_grid_are_told() -> None:
    with pytest.raises(UserError, match="12 tokens of a 3 x 4 grid"):
        segment_tokens(Q([2, 13, 3], 1), (3, 4), torch.zeros(2, 6, 8, dtype=torch.long), 2)
