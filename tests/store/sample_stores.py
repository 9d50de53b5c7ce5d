"""Small stores, and conditions under which to use them."""

import os
import resource
from contextlib import contextmanager

import torch

from distill.store import Quantity, Rows, StoredRows, write_shard

KEY = "0123456789abcdef"


def random_rows(quantity: Quantity, rows: Rows, seed: int = 0) -> torch.Tensor:
    """Random numbers for all rows of a quantity."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(rows), *quantity.shape, generator=generator).to(quantity.dtype)


def write_all(folder, quantity: Quantity, rows: Rows, values: torch.Tensor, split="train", key=KEY) -> None:
    for number in range(rows.shards):
        of = rows.of(number)
        write_shard(folder, split, quantity, number, values[of.start : of.stop], key)


def read_all(folder, quantity: Quantity, rows: Rows, split="train", key=KEY) -> torch.Tensor:
    """The rows in the order in which they are stored."""
    stored = StoredRows(folder, split, [quantity], rows, key)
    stored.check()
    samples = [(draw, index) for draw in range(rows.draws) for index in range(rows.images)]
    return stored.batch(*zip(*samples, strict=True))[quantity.name]


def files(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@contextmanager
def files_of_at_most(size: int):
    """No file can be written beyond `size` bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def in_a_fork(function) -> int:
    """The exit code of a forked process that runs a function: 0 if nothing is raised."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
