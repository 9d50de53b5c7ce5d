from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.errors import UserError
from distill.superpixels import slic
from distill.superpixels.clustering import cell_grid
from distill.superpixels.color import rgb_to_lab
from distill.superpixels.fast_slic import is_installed
from distill.superpixels.pixels import _PART
from distill.superpixels.quality import compactness, connectivity, explained_variation
from tests.superpixels.photos import photos

needs_fast_slic = pytest.mark.skipif(not is_installed(), reason="fast-slic is not installed")
SIZES = [(224, 196), (32, 16), (32, 64)]
CROPS = {224: 2, 32: 8}


def in_torch(images: Tensor, segments: int, **options: Any) -> Tensor:
    return slic(images, segments, backend="torch", **options)


def by_pixel(image: Tensor, grid: tuple[int, int], weight: float, iterations: int) -> Any:
    """The same algorithm, pixel by pixel in float64."""
    from skimage.color import rgb2lab

    colors = rgb2lab(image.permute(1, 2, 0).double().numpy())
    height, width = colors.shape[:2]
    pixels = [(y, x) for y in range(height) for x in range(width)]
    features = {
        (y, x): np.array([*colors[y, x], weight * y * grid[0] / height, weight * x * grid[1] / width])
        for y, x in pixels
    }
    home = {(y, x): (y * grid[0] // height, x * grid[1] // width) for y, x in pixels}
    cells = [(a, b) for a in range(grid[0]) for b in range(grid[1])]
    near = {c: [n for n in cells if abs(n[0] - c[0]) <= 1 and abs(n[1] - c[1]) <= 1] for c in cells}
    centers = {c: np.mean([features[p] for p in pixels if home[p] == c], axis=0) for c in cells}
    labels = np.zeros((height, width), dtype=int)
    for _ in range(iterations):
        of_cell: dict[Any, list[Any]] = {c: [] for c in cells}
        stacked = {c: np.stack([centers[n] for n in near[c]]) for c in cells}
        for p in pixels:
            distances = ((stacked[home[p]] - features[p]) ** 2).sum(1)
            best = near[home[p]][int(distances.argmin())]
            of_cell[best].append(features[p])
            labels[p] = best[0] * grid[1] + best[1]
        centers = {c: np.mean(of_cell[c], axis=0) if of_cell[c] else centers[c] for c in cells}
    return labels


def boundaries(labels: Tensor) -> Tensor:
    edges = torch.zeros_like(labels, dtype=torch.bool)
    edges[:, 1:] |= labels.diff(dim=1) != 0
    edges[:, :, 1:] |= labels.diff(dim=2) != 0
    return edges


def boundary_recall(labels: Tensor, of: Tensor) -> float:
    """Share of the boundary pixels of `of` that lie within 2 pixels of those of `labels`."""
    wide = torch.nn.functional.max_pool2d(boundaries(labels).float(), 5, 1, 2) > 0
    return wide[boundaries(of)].double().mean().item()


@pytest.mark.parametrize(
    ("size", "segments", "weight"),
    [((48, 48), 16, 10.0), ((37, 51), 12, 10.0), ((20, 30), 150, 30.0), ((16, 16), 1, 10.0), ((9, 9), 81, 5.0)],
)
def test_labels_are_those_of_the_algorithm_pixel_by_pixel(size: Any, segments: int, weight: float) -> None:
    images = photos(64)[:2, :, : size[0], : size[1]]
    labels = in_torch(images, segments, compactness=weight, iterations=5)
    expected = [by_pixel(image, cell_grid(segments, *size), weight, 5) for image in images]
    assert (labels == torch.from_numpy(np.stack(expected))).double().mean().item() >= 0.999


def of_all_pixels(image: Tensor, grid: tuple[int, int], weight: float, iterations: int) -> Any:
    """The same algorithm in float64, the distances of all pixels to one neighbor after another."""
    from skimage.color import rgb2lab

    (height, width), (rows, columns) = image.shape[1:], grid
    y, x = (each.ravel() for each in np.mgrid[:height, :width])
    colors = rgb2lab(image.permute(1, 2, 0).double().numpy()).reshape(-1, 3)
    features = np.column_stack([colors, weight * y * rows / height, weight * x * columns / width])
    down, right = y * rows // height, x * columns // width
    labels = down * columns + right
    centers = np.zeros((rows * columns, 5))
    for _ in range(iterations):
        count = np.bincount(labels, minlength=len(centers))
        sums = np.stack([np.bincount(labels, each, len(centers)) for each in features.T], axis=1)
        centers = np.where(count[:, None] > 0, sums / np.maximum(count, 1)[:, None], centers)
        least = np.full(len(labels), np.inf)
        for a in (-1, 0, 1):
            for b in (-1, 0, 1):
                row, column = down + a, right + b
                there = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
                candidate = np.where(there, row * columns + column, 0)
                distance = np.where(there, ((features - centers[candidate]) ** 2).sum(1), np.inf)
                labels = np.where(distance < least, candidate, labels)
                least = np.minimum(distance, least)
    return labels.reshape(height, width)


@pytest.mark.parametrize("chosen", [[0, 5], pytest.param(list(range(12)), marks=pytest.mark.slow)])
def test_labels_at_full_size_are_those_of_the_algorithm_in_double_precision(chosen: list[int]) -> None:
    images = photos(224)[chosen]
    labels = in_torch(images, 196)
    expected = [of_all_pixels(image, (14, 14), 10.0, 10) for image in images]
    assert (labels == torch.from_numpy(np.stack(expected))).double().mean().item() >= 0.999


def test_images_in_several_parts_have_the_labels_of_each_alone() -> None:
    images = photos(224)[:3]
    assert len(images) * images[0, 0].numel() > _PART
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        together = in_torch(images, 100, connected=True, iterations=3)
        alone = [in_torch(image.unsqueeze(0), 100, connected=True, iterations=3) for image in images]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize(("size", "segments"), SIZES)
def test_segments_are_as_good_as_those_of_scikit_image(size: int, segments: int) -> None:
    from skimage.segmentation import slic as reference

    images = photos(size, CROPS[size])
    own = in_torch(images, segments)
    options: Any = {"compactness": 10.0, "max_num_iter": 10, "enforce_connectivity": False, "start_label": 0}
    others = torch.from_numpy(np.stack([reference(i.permute(1, 2, 0).numpy(), segments, **options) for i in images]))
    assert int(others.max()) + 1 == segments
    difference = explained_variation(images, own) - explained_variation(images, others)
    worst, mean = (-0.03, -0.01) if size == 224 else (-0.07, -0.02)
    assert difference.min().item() >= worst
    assert difference.mean().item() >= mean
    if size == 224:
        assert abs(compactness(own).mean().item() - compactness(others).mean().item()) <= 0.03
        assert boundary_recall(own, others) >= 0.96
        assert boundary_recall(others, own) >= 0.96


@pytest.mark.parametrize(("size", "segments"), SIZES)
def test_segments_are_better_than_the_grid_that_they_start_from(size: int, segments: int) -> None:
    images = photos(size, CROPS[size])
    rows, columns = cell_grid(segments, size, size)
    pixel = torch.arange(size)
    grid = ((pixel * rows // size).unsqueeze(1) * columns + pixel * columns // size).expand(len(images), -1, -1)
    gained = explained_variation(images, in_torch(images, segments)) - explained_variation(images, grid)
    assert gained.mean().item() >= 0.10


@pytest.mark.parametrize(("size", "segments"), SIZES)
def test_repaired_segments_are_connected_and_all_there(size: int, segments: int) -> None:
    images = photos(size, CROPS[size])
    loose, repaired = in_torch(images, segments), in_torch(images, segments, connected=True)
    assert connectivity(loose).min().item() < 1.0
    assert connectivity(repaired).tolist() == [1.0] * len(images)
    for before, after in zip(loose, repaired, strict=True):
        assert torch.equal(before.unique(), after.unique())


@needs_fast_slic
def test_repaired_segments_are_as_good_as_those_of_fast_slic() -> None:
    images = photos(224)
    own = explained_variation(images, in_torch(images, 196, connected=True)).mean()
    other = explained_variation(images, slic(images, 196, backend="fast_slic")).mean()
    assert own.item() >= other.item() - 0.02


@pytest.mark.parametrize("connected", [False, True])
def test_noise_is_segmented_too(connected: bool) -> None:
    images = torch.rand(2, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    labels = in_torch(images, 35, connected=connected)
    assert labels.unique().tolist() == list(range(35))
    if connected:
        assert connectivity(labels).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("connected", [False, True])
@pytest.mark.parametrize(
    ("shape", "segments"),
    [
        ((3, 33, 47), 20),
        ((1, 32, 32), 16),
        ((3, 7, 5), 1),
        ((3, 7, 5), 35),
        ((3, 1, 30), 9),
        ((3, 30, 1), 7),
        ((1, 1, 1), 1),
    ],
)
def test_labels_are_in_reach_of_home_whatever_the_size(shape: Any, segments: int, connected: bool) -> None:
    images = torch.rand(2, *shape, generator=torch.Generator().manual_seed(1))
    labels = in_torch(images, segments, connected=connected)
    rows, columns = cell_grid(segments, *shape[1:])
    assert rows * columns <= segments
    assert labels.dtype == torch.int64
    assert labels.shape == (2, *shape[1:])
    assert 0 <= int(labels.min()) <= int(labels.max()) < rows * columns
    if not connected:
        home = torch.arange(shape[1]) * rows // shape[1], torch.arange(shape[2]) * columns // shape[2]
        assert int((labels // columns - home[0].unsqueeze(1)).abs().max()) <= 1
        assert int((labels % columns - home[1]).abs().max()) <= 1


@pytest.mark.parametrize("connected", [False, True])
def test_an_image_of_one_color_keeps_the_grid(connected: bool) -> None:
    labels = in_torch(torch.full((1, 3, 24, 24), 0.4), 9, connected=connected)
    expected = (torch.arange(24) // 8).unsqueeze(1) * 3 + torch.arange(24) // 8
    assert torch.equal(labels[0], expected)


def test_as_many_segments_as_pixels_are_the_pixels() -> None:
    images = photos(32)[:2, :, :8, :8]
    labels = in_torch(images, 64, compactness=1000.0)
    assert labels.tolist() == [torch.arange(64).view(8, 8).tolist()] * 2


def test_a_batch_of_one_is_a_row_of_a_batch_and_a_repetition_is_the_same() -> None:
    images = photos(64)
    labels = in_torch(images, 25, connected=True)
    assert torch.equal(labels, in_torch(images, 25, connected=True))
    assert torch.equal(labels[3:4], in_torch(images[3:4], 25, connected=True))


@pytest.mark.parametrize("backend", ["torch", pytest.param("fast_slic", marks=needs_fast_slic)])
def test_memory_layout_type_and_gray_do_not_matter(backend: Any) -> None:
    images = photos(64)[:3]
    expected = slic(images, 25, backend=backend)
    assert torch.equal(expected, slic(images.to(memory_format=torch.channels_last), 25, backend=backend))
    twice = images.repeat_interleave(2, dim=3)[..., ::2]
    assert not twice.is_contiguous()
    assert torch.equal(expected, slic(twice, 25, backend=backend))
    for kind in (torch.float16, torch.bfloat16):
        assert torch.equal(
            slic(images.to(kind), 25, backend=backend), slic(images.to(kind).float(), 25, backend=backend)
        )
    gray = images[:, :1]
    assert torch.equal(slic(gray, 25, backend=backend), slic(gray.repeat(1, 3, 1, 1), 25, backend=backend))


def test_autocast_changes_nothing_and_no_gradient_is_kept() -> None:
    images = photos(64)[:2].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        labels = in_torch(images, 25)
    assert torch.equal(labels, in_torch(images.detach(), 25))


def test_colors_are_those_of_scikit_image() -> None:
    from skimage.color import rgb2lab

    images = torch.cat([photos(64)[:3], torch.rand(1, 3, 64, 64), torch.zeros(1, 3, 64, 64), torch.ones(1, 3, 64, 64)])
    expected = torch.from_numpy(rgb2lab(images.double().permute(0, 2, 3, 1).numpy())).permute(0, 3, 1, 2)
    torch.testing.assert_close(rgb_to_lab(images.double()), expected, rtol=0, atol=2e-3)
    torch.testing.assert_close(rgb_to_lab(images), expected.float(), rtol=0, atol=2e-3)


@pytest.mark.slow
def test_compiled_it_gives_the_same_labels_in_one_graph() -> None:
    images = photos(64)[:2]
    compiled = torch.compile(in_torch, fullgraph=True)
    labels = compiled(images, 25, iterations=3)
    assert (labels == in_torch(images, 25, iterations=3)).double().mean().item() >= 0.999


@pytest.mark.slow
@pytest.mark.parametrize("warns", [False, True])
def test_repair_leaves_deterministic_mode_as_it_was(warns: bool) -> None:
    expected = in_torch(photos(64), 25, connected=True)
    torch.use_deterministic_algorithms(True, warn_only=warns)
    try:
        assert torch.equal(in_torch(photos(64), 25, connected=True), expected)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled() == warns
    finally:
        torch.use_deterministic_algorithms(False)


@needs_fast_slic
@pytest.mark.parametrize(
    ("shape", "segments"), [((3, 224, 224), 196), ((3, 8, 8), 64), ((1, 1, 1), 1), ((3, 200, 210), 40000)]
)
def test_fast_slic_gives_labels_from_zero_each_connected(shape: Any, segments: int) -> None:
    images = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0))
    labels = slic(images, segments, backend="fast_slic", compactness=40.0)
    assert labels.dtype == torch.int64
    assert connectivity(labels).tolist() == [1.0] * 3
    for image in labels:
        assert image.unique().tolist() == list(range(int(image.max()) + 1))
        assert int(image.max()) < segments


@needs_fast_slic
def test_fast_slic_gives_the_same_in_any_batch_and_with_any_number_of_threads() -> None:
    images, threads = photos(64), torch.get_num_threads()
    alone = torch.cat([slic(image.unsqueeze(0), 25, backend="fast_slic") for image in images])
    try:
        torch.set_num_threads(3)
        together = slic(images, 25, backend="fast_slic")
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone, together)
    assert torch.equal(alone, slic(images, 25))


def test_without_fast_slic_auto_takes_torch_and_asking_for_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    images = photos(32)
    monkeypatch.setitem(sys.modules, "fast_slic", None)
    assert torch.equal(slic(images, 16), in_torch(images, 16))
    with pytest.raises(UserError, match="not installed"):
        slic(images, 16, backend="fast_slic")


@pytest.mark.parametrize(
    ("images", "arguments", "message"),
    [
        (torch.rand(1, 3, 8, 8), {"segments": 65}, "from 1 to 64 for images of 8 x 8 pixels, given 65"),
        (torch.rand(1, 3, 8, 8), {"segments": 0}, "given 0"),
        (torch.rand(1, 3, 8, 8), {"segments": 4, "compactness": 0}, "compactness must be above 0"),
        (torch.rand(1, 3, 8, 8), {"segments": 4, "iterations": 0}, "iterations must be at least 1, given 0"),
        (torch.rand(1, 3, 8, 8), {"segments": 4, "backend": "fast-slic"}, "did you mean 'fast_slic'"),
        (torch.full((1, 3, 8, 8), float("nan")), {"segments": 4}, "NaN"),
        (torch.rand(3, 8, 8), {"segments": 4}, r"given torch.float32 of shape \(3, 8, 8\)"),
        (torch.rand(1, 4, 8, 8), {"segments": 4}, r"\(1, 4, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), {"segments": 4}, "torch.uint8"),
        (torch.rand(0, 3, 8, 8), {"segments": 4}, r"\(0, 3, 8, 8\)"),
    ],
)
def test_what_does_not_fit_is_told(images: Tensor, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        slic(images, **arguments)
