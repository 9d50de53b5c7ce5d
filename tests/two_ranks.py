"""Pool of processes in one group, started once per session, so that a call takes milliseconds."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.pool import Pool
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class RankPool:
    """Runs functions on all ranks of a process group, which starts with the first call.

    Args:
        ranks: number of processes.
        timeout: seconds that a call may take before it fails, not including the start of the processes.
        backend: `gloo`, or `nccl` with a CUDA device of its own for each rank.
    """

    def __init__(self, ranks: int = 2, timeout: float = 60.0, backend: str = "gloo") -> None:
        self.ranks = ranks
        self.timeout = timeout
        self.backend = backend
        self._pool: Pool | None = None

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call `function(*args)` on every rank at once.

        Args:
            function: a function of an importable module (not of `conftest`), which may use collectives.
            args: arguments that can be pickled.

        Returns:
            The results, by rank.

        Raises:
            Exception: what the function raised on any rank, or a TimeoutError; the next call starts new processes.
        """
        # Bytes, since torch would otherwise put tensors into memory shared by the ranks.
        jobs = [pickle.dumps((function, args))] * self.ranks
        try:
            if self._pool is None:
                self._pool = self._start()
            results = self._pool.map_async(_call, jobs, chunksize=1).get(self.timeout)
        except BaseException:
            self.close()
            raise
        return [result for _, result in sorted((pickle.loads(item) for item in results), key=lambda item: item[0])]

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.terminate()
            self._pool.join()
            self._pool = None

    def _start(self) -> Pool:
        context = get_context("spawn")
        ranks = context.Queue()
        for rank in range(self.ranks):
            ranks.put(rank)
        self._directory = tempfile.TemporaryDirectory()  # unlike ports, files cannot collide between pools
        file = Path(self._directory.name) / "group"
        pool = context.Pool(self.ranks, _join, (ranks, self.ranks, file, self.timeout, self.backend))
        try:
            pool.map_async(_ready, range(self.ranks), chunksize=1).get(300)
        except BaseException:
            pool.terminate()
            raise
        return pool


def _join(ranks: Queue[int], world_size: int, file: Path, timeout: float, backend: str) -> None:
    import distill.heads  # noqa: F401  # here, so that it does not count towards the first call

    torch.set_num_threads(1)
    # A rank waiting for a failed one gives up before the caller does, so that the caller gets the actual error.
    give_up = timedelta(seconds=timeout / 2)
    rank = ranks.get()
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, f"file://{file}", give_up, world_size=world_size, rank=rank)


def _ready(_: int) -> None:
    dist.barrier()


def _call(job: bytes) -> bytes:
    dist.barrier()  # so that no process takes two jobs
    function, args = pickle.loads(job)
    return pickle.dumps((dist.get_rank(), function(*args)))
