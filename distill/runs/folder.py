"""The folder of a run: claimed by one process, which locks it, and joined by the other processes of the run."""

from __future__ import annotations

import errno
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_only

from distill.errors import UserError
from distill.runs.lock import LOCK, FolderIsLockedError, FolderLock
from distill.runs.refusals import (
    holds_run,
    refuse_checkpoints_of_another,
    refuse_used_folder,
    training_began,
)

_VARIABLE = "DISTILL_RUN_FOLDER"


class RunFolder:
    """The folder that a run writes to.

    The process of global rank 0 claims it with `claim`, before anything is built, and releases it at the end. The
    other processes take the same folder with `join`, and never choose one themselves.

    Attributes:
        path: the folder.
        checkpoint: the checkpoint that training continues from, if there is one.
    """

    def __init__(self, path: Path, checkpoint: Path | None = None) -> None:
        self.path = path
        self.checkpoint = checkpoint
        self._locks: list[FolderLock] = []
        self._created: list[Path] = []  # folders that did not exist before, from the outermost to the innermost
        self._present: set[Path] = set()  # content of the folder before the run

    def __reduce__(self) -> Any:
        """Copy the folder to another process without its locks."""
        return RunFolder, (self.path, self.checkpoint)

    @classmethod
    def claim(
        cls,
        root: str | Path | None,
        *,
        resume: bool,
        wait: float = 10.0,
        checkpoints: str | Path | None = None,
        branch: bool = False,
    ) -> RunFolder:
        """Create and lock the folder of a run; call this on global rank 0 only.

        Args:
            root: the requested folder; defaults to the first unused of `runs/run-1`, `runs/run-2`, ... (with `resume`,
                the last used), or to `runs/<wandb run id>` in a wandb sweep.
            resume: whether the run that the folder already holds is to be continued.
            wait: seconds to wait for the end of another process that writes to the folder, such as a job that is being
                requeued. A folder chosen by number is not waited for: the next number is taken.
            checkpoints: a folder for the checkpoints outside of the run's folder; it is locked as well.
            branch: whether the run continues a checkpoint of another run; with it, a `root` that already holds a run
                gives `root/resumed-1`, `root/resumed-2`, ...

        Raises:
            UserError: the folder is in use, already holds a run although `resume` is False, or cannot be written; or
                `checkpoints` holds those of another run.
        """
        requested = _sweep_folder() if root is None else Path(root).expanduser()
        checkpoints = None if checkpoints is None else Path(checkpoints).expanduser()
        run = cls(default_folder(root))
        try:
            if resume:
                run._take(run.path, wait)
            elif requested is None:
                run._take_unused(Path("runs"), "run")
            else:
                run._take_new(requested, wait, branch)
            if checkpoints is not None and checkpoints.resolve() != (run.path / "checkpoints").resolve():
                run._take(checkpoints, wait, "checkpoint.dirpath")
                if not resume:
                    refuse_checkpoints_of_another(checkpoints)
        except BaseException as error:
            run.release(failed=True)
            if isinstance(error, OSError):
                raise UserError(
                    f"trainer.default_root_dir: the folder {str(error.filename or run.path)!r} cannot be written "
                    f"({error.strerror}); give another"
                ) from error
            raise
        os.environ[_VARIABLE] = json.dumps({"launcher": os.getpid(), "path": str(run.path)})
        return run

    @classmethod
    def join(cls) -> RunFolder | None:
        """Return the folder that global rank 0 has claimed; call this on all other ranks.

        Before the process group exists, only processes started by Lightning's launcher know the folder, from an
        environment variable; in others, such as torchrun's, the result is `None`. Once the group exists, it is received
        from rank 0, which must call `share` at the same time.
        """
        if _has_group():
            facts: list[Any] = [None]
            dist.broadcast_object_list(facts)
            path, checkpoint = facts[0]
            return cls(Path(path), checkpoint)
        announced = json.loads(os.environ.get(_VARIABLE, "{}"))
        # The variable may also come from an unrelated run that has started this process's launcher.
        return cls(Path(announced["path"])) if announced.get("launcher") == os.getppid() else None

    def share(self) -> None:
        """Send the folder to all other ranks, which must call `join` at the same time."""
        dist.broadcast_object_list([(str(self.path), self.checkpoint)])

    def release(self, failed: bool = False) -> None:
        """Release the locks.

        Args:
            failed: whether the run failed; if so before its training began, all that it has created is removed.
        """
        if self._locks:
            os.environ.pop(_VARIABLE, None)
        undo = failed and not training_began(self.path)
        if undo and self._locks:
            self._remove_content()
        for lock in self._locks:
            lock.release()
        self._locks = []
        if undo:
            for folder in reversed(self._created):
                with suppress(OSError):  # another run has begun to use it
                    folder.rmdir()

    def _take_new(self, folder: Path, wait: float, branch: bool) -> None:
        """Take a folder that must not hold a run yet."""
        if not holds_run(folder):
            self._take(folder, wait)
            if not holds_run(folder):  # look again: another run may have used it while this one waited for the lock
                return
            self._locks.pop().release()
        if not branch:
            refuse_used_folder(folder)
        self._take_unused(folder, "resumed")

    def _take_unused(self, parent: Path, name: str) -> None:
        """Create and lock the first unused folder `<parent>/<name>-<number>`."""
        number = 1
        while True:
            self.path = parent / f"{name}-{number}"
            try:
                if not self.path.exists():
                    self._create(self.path, exclusively=True)
                    self._locks.append(FolderLock(self.path))
                    return
            except (FileExistsError, FolderIsLockedError):  # another run has been faster
                pass
            number += 1

    def _take(self, folder: Path, wait: float, key: str = "trainer.default_root_dir") -> None:
        """Create a folder unless it exists, and lock it."""
        self._create(folder)
        try:
            self._locks.append(FolderLock(folder, wait))
        except FolderIsLockedError as error:
            raise UserError(
                f"{key}: {str(folder)!r} is in use by another run ({error}); wait for its end, or give another folder"
            ) from None
        except FileNotFoundError:  # another run that was refused has just removed it
            self._take(folder, wait, key)
            return
        self._present |= set(folder.iterdir())

    def _create(self, folder: Path, exclusively: bool = False, attempts: int = 10) -> None:
        """Create a folder and its parents, and note those that did not exist."""
        for path in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
            try:
                path.mkdir()
            except FileExistsError:  # created by another process at this moment
                if exclusively and path == folder:
                    raise
            except FileNotFoundError:  # its parent has been removed by a run that was refused
                if attempts == 0:
                    raise
                return self._create(folder, exclusively, attempts - 1)
            else:
                self._created.append(path)
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
        return None

    def _remove_content(self) -> None:
        """Remove what the run has created in its folder: everything in a new one, empty folders in another."""
        for path in self.path.iterdir():
            if path.name == LOCK or path in self._present:
                continue
            if self.path in self._created and not path.is_dir():
                path.unlink()
            elif self.path in self._created or (path.is_dir() and not any(file.is_file() for file in path.rglob("*"))):
                shutil.rmtree(path, ignore_errors=True)


def default_folder(root: str | Path | None) -> Path:
    """Return the folder of an existing run: `root`, that of the wandb sweep's run, or the latest `runs/run-N`."""
    return Path(root).expanduser() if root is not None else _sweep_folder() or _latest(Path("runs"), "run")


def is_first_rank() -> bool:
    """Return True in the process of global rank 0, also before Lightning knows the ranks."""
    # On the other nodes of a run with Lightning's launcher, the first process has no rank yet.
    node = 0 if "RANK" in os.environ else int(os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", 0)))
    return getattr(rank_zero_only, "rank", 0) == 0 and (node == 0 or _has_group())


def _has_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def _sweep_folder() -> Path | None:
    """Return the folder named by wandb's run id if a wandb agent has started this run."""
    run = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None
    return Path("runs") / run if run else None


def _latest(parent: Path, name: str) -> Path:
    """Return the folder `<parent>/<name>-<number>` with the highest number; number 1 if there is none."""
    numbers = [path.name.removeprefix(f"{name}-") for path in parent.glob(f"{name}-*")]
    return parent / f"{name}-{max((int(number) for number in numbers if number.isdigit()), default=1)}"
