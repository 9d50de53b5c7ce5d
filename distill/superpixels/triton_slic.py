"""SLIC in Triton kernels, for images on a GPU: the k-means of `Clustering` without a tensor of all distances.

A program of a kernel works on one cell of one image and on nothing that another one writes, so results are
reproducible. To load this file takes Triton, which torch brings along where it has CUDA. Kernels have no types, since
Triton would read them as values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from distill.superpixels.association import Grid
from distill.superpixels.clustering import FAR
from distill.superpixels.color import TO_XYZ

_BLOCK = 256
"""Pixels of a cell that are worked on at a time."""

_FAR = tl.constexpr(FAR)
_XR, _XG, _XB = (tl.constexpr(weight) for weight in TO_XYZ[0])
_YR, _YG, _YB = (tl.constexpr(weight) for weight in TO_XYZ[1])
_ZR, _ZG, _ZB = (tl.constexpr(weight) for weight in TO_XYZ[2])


def triton_clustering(
    images: Tensor, grid: Grid, compactness: float, iterations: int, last_centers: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the labels of the pixels, their colors, and the colors of the centers, all in float32.

    Args:
        images: `[B, 3, H, W]` or `[B, 1, H, W]` on a GPU, of any floating type, in [0, 1].
        grid: as for `Clustering`, like the next two.
        compactness: m.
        iterations: of k-means.
        last_centers: whether centers move after the last assignment too.

    Returns:
        `[B, H, W]` int64 in `0 .. p q - 1`; CIELAB, `[B, 3, H, W]`; and `[B, p q, 3]`.
    """
    images = images.expand(-1, 3, -1, -1)
    count, height, width, cells = len(images), *images.shape[2:], grid[0] * grid[1]
    colors = torch.empty(count, 3, height, width, device=images.device)
    labels = torch.empty(count, height, width, dtype=torch.int64, device=images.device)
    base, sums = colors.new_empty(count * cells, 5), colors.new_empty(count * cells, 6, 9)
    scale = compactness * grid[0] / height, compactness * grid[1] / width
    launch, size = (count * cells,), (height, width, *grid, *scale)
    largest = -(-height // grid[0]) * -(-width // grid[1])
    block = min(_BLOCK, triton.next_power_of_2(largest))
    with torch.cuda.device_of(images):  # type: ignore[no-untyped-call]  # torch has no types there
        _begin[launch](images, colors, base, *images.stride(), *size, block)
        centers = base.clone()
        for iteration in range(1, iterations + 1):
            is_last = iteration == iterations
            _assign[launch](colors, base, centers, sums, labels, *size, is_last, block)
            if last_centers or not is_last:
                _move[launch](sums, base, centers, *grid, num_warps=1)
    return labels, colors, centers[:, :3].view(count, cells, 3)


@triton.jit
def _begin(
    images,
    colors,
    base,
    image_stride,
    channel_stride,
    row_stride,
    column_stride,
    height,
    width,
    p,
    q,
    down,
    right,
    block: tl.constexpr,
):
    """Write the colors of a cell, and the mean of its colors and positions."""
    cell = tl.program_id(0)
    image, top, left, rows, columns = _place(cell, height, width, p, q)
    images += image.to(tl.int64) * image_stride
    colors += image.to(tl.int64) * 3 * height * width
    sum_of_light, sum_of_a, sum_of_b = 0.0, 0.0, 0.0
    for start in range(0, rows * columns, block):
        pixel = start + tl.arange(0, block)
        present = pixel < rows * columns
        y, x = top + pixel // columns, left + pixel % columns
        source, target = images + y * row_stride + x * column_stride, colors + y * width + x
        red = tl.load(source, mask=present, other=0.0).to(tl.float32)
        green = tl.load(source + channel_stride, mask=present, other=0.0).to(tl.float32)
        blue = tl.load(source + 2 * channel_stride, mask=present, other=0.0).to(tl.float32)
        light, a, b = _lab(_linear(red), _linear(green), _linear(blue))
        tl.store(target, light, mask=present)
        tl.store(target + height * width, a, mask=present)
        tl.store(target + 2 * height * width, b, mask=present)
        sum_of_light += tl.sum(tl.where(present, light, 0.0), 0)
        sum_of_a += tl.sum(tl.where(present, a, 0.0), 0)
        sum_of_b += tl.sum(tl.where(present, b, 0.0), 0)
    tl.store(base + cell * 5, sum_of_light / (rows * columns))
    tl.store(base + cell * 5 + 1, sum_of_a / (rows * columns))
    tl.store(base + cell * 5 + 2, sum_of_b / (rows * columns))
    tl.store(base + cell * 5 + 3, (top + (rows - 1) * 0.5) * down)
    tl.store(base + cell * 5 + 4, (left + (columns - 1) * 0.5) * right)


@triton.jit
def _assign(
    colors,
    base,
    centers,
    sums,
    labels,
    height,
    width,
    p,
    q,
    down,
    right,
    is_last: tl.constexpr,
    block: tl.constexpr,
):
    """Assign the pixels of a cell to the nearest of nine centers, and write their sums for each center.

    The features of pixels and centers are taken relative to the mean of the cell, so that they are small.
    """
    cell = tl.program_id(0)
    row, column = cell // q % p, cell % q
    image, top, left, rows, columns = _place(cell, height, width, p, q)
    colors += image.to(tl.int64) * 3 * height * width
    labels += image.to(tl.int64) * height * width
    slot = tl.arange(0, 16)
    neighbor, inside = _neighbors(slot, cell, row, column, p, q)
    base_light, base_a, base_b = tl.load(base + cell * 5), tl.load(base + cell * 5 + 1), tl.load(base + cell * 5 + 2)
    near_light = base_light - tl.load(centers + neighbor * 5)
    near_a = base_a - tl.load(centers + neighbor * 5 + 1)
    near_b = base_b - tl.load(centers + neighbor * 5 + 2)
    near_y = tl.load(base + cell * 5 + 3) - tl.load(centers + neighbor * 5 + 3)
    near_x = tl.load(base + cell * 5 + 4) - tl.load(centers + neighbor * 5 + 4)
    squares = near_light * near_light + near_a * near_a + near_b * near_b + near_y * near_y + near_x * near_x
    half = tl.where(inside, 0.5 * squares, _FAR)
    none = tl.zeros([16], tl.float32)
    sum_of_light, sum_of_a, sum_of_b, sum_of_y, sum_of_x, number = none, none, none, none, none, none
    for start in range(0, rows * columns, block):
        pixel = start + tl.arange(0, block)
        present = pixel < rows * columns
        line, step = pixel // columns, pixel % columns
        offset = (top + line) * width + left + step
        light = (tl.load(colors + offset, mask=present, other=0.0) - base_light)[None, :]
        a = (tl.load(colors + height * width + offset, mask=present, other=0.0) - base_a)[None, :]
        b = (tl.load(colors + 2 * height * width + offset, mask=present, other=0.0) - base_b)[None, :]
        y = ((line - (rows - 1) * 0.5) * down)[None, :]
        x = ((step - (columns - 1) * 0.5) * right)[None, :]
        # Half the squared distance, minus half the pixel's square.
        distance = near_light[:, None] * light + near_a[:, None] * a + near_b[:, None] * b
        distance += near_y[:, None] * y + near_x[:, None] * x + half[:, None]
        nearest = (distance == tl.min(distance, 0)[None, :]) & present[None, :]
        sum_of_light += tl.sum(tl.where(nearest, light, 0.0), 1)
        sum_of_a += tl.sum(tl.where(nearest, a, 0.0), 1)
        sum_of_b += tl.sum(tl.where(nearest, b, 0.0), 1)
        sum_of_y += tl.sum(tl.where(nearest, y, 0.0), 1)
        sum_of_x += tl.sum(tl.where(nearest, x, 0.0), 1)
        number += tl.sum(tl.where(nearest, 1.0, 0.0), 1)
        if is_last:
            first = tl.min(tl.where(nearest, slot[:, None], 16), 0)
            first = tl.where(first == 16, 4, first)  # a NaN pixel stays in its cell
            label = (row + first // 3 - 1) * q + column + first % 3 - 1
            tl.store(labels + offset, label.to(tl.int64), mask=present)
    target, is_center = sums + cell * 54 + slot, slot < 9
    tl.store(target, sum_of_light, mask=is_center)
    tl.store(target + 9, sum_of_a, mask=is_center)
    tl.store(target + 18, sum_of_b, mask=is_center)
    tl.store(target + 27, sum_of_y, mask=is_center)
    tl.store(target + 36, sum_of_x, mask=is_center)
    tl.store(target + 45, number, mask=is_center)


@triton.jit
def _move(sums, base, centers, p, q):
    """Move a center to the mean of its pixels, which nine cells have added up; one without pixels stays."""
    cell = tl.program_id(0)
    slot = tl.arange(0, 16)
    neighbor, inside = _neighbors(slot, cell, cell // q % p, cell % q, p, q)
    source = sums + neighbor * 54 + 8 - slot  # what a neighbor has added up for the cell on its opposite side
    count = tl.load(source + 45, mask=inside, other=0.0)
    total = tl.sum(count, 0)
    for feature in tl.static_range(5):
        part = tl.load(source + feature * 9, mask=inside, other=0.0) + count * tl.load(base + neighbor * 5 + feature)
        mean = tl.sum(part, 0) / tl.maximum(total, 1.0)
        target = centers + cell * 5 + feature
        tl.store(target, tl.where(total > 0, mean, tl.load(target)))


@triton.jit
def _place(cell, height, width, p, q):
    """Return the image of a cell, its first pixel, and its number of pixels down and right."""
    row, column = cell // q % p, cell % q
    top, left = (row * height + p - 1) // p, (column * width + q - 1) // q
    rows = ((row + 1) * height + p - 1) // p - top
    columns = ((column + 1) * width + q - 1) // q - left
    return cell // (p * q), top, left, rows, columns


@triton.jit
def _neighbors(slot, cell, row, column, p, q):
    """Return the cells around a cell, row by row, and whether they exist; the cell itself where one does not."""
    down, right = slot // 3 - 1, slot % 3 - 1
    inside = (row + down >= 0) & (row + down < p) & (column + right >= 0) & (column + right < q) & (slot < 9)
    return tl.where(inside, cell + down * q + right, cell), inside


@triton.jit
def _linear(value):
    """Return linear sRGB."""
    power = tl.exp2(2.4 * tl.log2(tl.maximum(value + 0.055, 0.0) / 1.055))
    return tl.where(value > 0.04045, power, value / 12.92)


@triton.jit
def _lab(red, green, blue):
    """Return CIELAB of linear sRGB."""
    x = _root(red * _XR + green * _XG + blue * _XB)
    y = _root(red * _YR + green * _YG + blue * _YB)
    z = _root(red * _ZR + green * _ZG + blue * _ZB)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


@triton.jit
def _root(value):
    """Return the cube root, and a line near 0."""
    power = tl.exp2(tl.log2(tl.maximum(value, 0.0)) / 3)
    return tl.where(value > 0.008856, power, 7.787 * value + 16 / 116)
