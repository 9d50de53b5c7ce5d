"""Advice on rows that are read next: they come into memory, others do not, and nothing changes."""

import ctypes
import mmap
import os
import time

import pytest
import torch

from distill.store import Quantity
from distill.store.read_ahead import read_ahead
from distill.store.shards import map_shard, shard_path, write_shard
from tests.store.sample_stores import KEY

LARGE = Quantity("large", (mmap.PAGESIZE,), torch.float32)  # four pages a row


def in_memory(rows):
    """Whether all pages of each row are in memory."""
    pages = -(-rows[0].nbytes // mmap.PAGESIZE)
    found = []
    for row in rows:
        states = (ctypes.c_ubyte * (pages + 1))()
        first = row.data_ptr() & -mmap.PAGESIZE
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(first), ctypes.c_size_t(row.nbytes), states) == 0
        found.append(all(state & 1 for state in states[:pages]))
    return found


def test_only_the_rows_that_are_asked_for_come_into_memory(tmp_path):
    values = torch.arange(1500.0).repeat_interleave(mmap.PAGESIZE).reshape(1500, mmap.PAGESIZE)  # 24 MB
    write_shard(tmp_path, "train", LARGE, 0, values, KEY)
    file = os.open(shard_path(tmp_path, "train", LARGE, 0), os.O_RDONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)
    rows = map_shard(tmp_path, "train", LARGE, 0, 1500, KEY)
    asked = [800, 1499]
    before = in_memory(rows)
    if any(before[row] for row in asked):
        pytest.skip("this file system is in memory, or reads large files at once")
    read_ahead(rows, torch.tensor(asked))
    deadline = time.monotonic() + 5
    while not all(in_memory(rows)[row] for row in asked) and time.monotonic() < deadline:
        time.sleep(0.001)
    after = in_memory(rows)
    assert all(after[row] for row in asked)
    assert sum(after) - sum(before) < 300, "the rows, with what the system itself reads around each; not all 1500"
    assert torch.equal(rows[asked], values[asked])
