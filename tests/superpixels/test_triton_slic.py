"""The Triton kernels where there is no GPU: interpreted, and refused."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from distill.errors import UserError
from distill.superpixels import slic


@pytest.mark.slow
def test_the_interpreted_kernels_have_the_labels_colors_and_centers_of_torch() -> None:
    pytest.importorskip("triton", reason="needs Triton, which torch brings along where it has CUDA")
    program = [sys.executable, "-W", "ignore", "-m", "tests.superpixels.interpreted"]
    run = subprocess.run(program, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_the_kernels_compile_for_a_gpu() -> None:
    triton = pytest.importorskip("triton", reason="needs Triton, which torch brings along where it has CUDA")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from distill.superpixels import triton_slic

    number, whole = "*fp32", dict.fromkeys(("height", "width", "p", "q"), "i32") | {"down": "fp32", "right": "fp32"}
    strides = dict.fromkeys(("image_stride", "channel_stride", "row_stride", "column_stride"), "i32")
    of_cell = {"colors": number, "base": number, "centers": number, "sums": number, "labels": "*i64", **whole}
    for kernel, signature, constants in (
        (triton_slic._begin, {"images": "*bf16", "colors": number, "base": number, **strides, **whole}, {"block": 256}),
        (triton_slic._assign, of_cell, {"is_last": False, "block": 64}),
        (triton_slic._assign, of_cell, {"is_last": True, "block": 256}),
        (triton_slic._move, {"sums": number, "base": number, "centers": number, "p": "i32", "q": "i32"}, {}),
    ):
        signature = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
        compiled = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
        assert "cubin" in compiled.asm


def test_images_in_cpu_memory_are_refused() -> None:
    with pytest.raises(UserError, match="backend 'triton' needs images on a GPU and the package triton, given images"):
        slic(torch.rand(1, 3, 8, 8), 4, backend="triton")
