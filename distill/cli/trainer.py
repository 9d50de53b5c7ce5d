"""Lightning's Trainer with the commands `check`, `plot`, `store` and `weigh`."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector

from distill.callbacks.gradient_meter import At
from distill.callbacks.pictures import PicturesOnce, can_plot
from distill.cli.check import print_set_up, read_all_images
from distill.cli.rehearsal import rehearse_fit
from distill.cli.run_folder import write_to
from distill.cli.store import SPLITS, store
from distill.cli.weigh import weigh
from distill.errors import UserError
from distill.heads import Head, shipped
from distill.runs.folder import RunFolder
from distill.training.classification import ClassificationModule


class Trainer(LightningTrainer):
    """Lightning's Trainer, extended by the folder of a run, and by `check`, `plot`, `store` and `weigh`."""

    has_run_folder: bool = False
    """Whether `fit` writes to the folder of a run."""
    run_folder: RunFolder | None = None
    """The folder; processes that do not know it receive it from rank 0 when `fit` begins."""

    @property
    def default_root_dir(self) -> str:
        """The folder of the run, if there is one, for what Lightning writes, such as checkpoints of jobs on SLURM."""
        return super().default_root_dir if self.run_folder is None else str(self.run_folder.path)

    def load_only_given_checkpoints(self) -> None:
        """Load no checkpoint that `ckpt_path` does not give, as Lightning does on SLURM."""
        self._checkpoint_connector = _GivenCheckpoints(self)

    def _fit_impl(
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: Any = None,
        weights_only: bool | None = None,
    ) -> None:
        """Agree with rank 0 on the folder and the checkpoint, as soon as all processes exist, and train."""
        if self.has_run_folder and self.world_size > 1:
            self.strategy.setup_environment()  # starts the process group, as Lightning would a little later
            if self.is_global_zero and self.run_folder is not None:
                self.run_folder.checkpoint = ckpt_path
                self.run_folder.share()
            elif (run := RunFolder.join()) is not None:
                self.run_folder, ckpt_path = run, run.checkpoint
                write_to(run, self)
        elif self.has_run_folder and self.run_folder is None:
            raise UserError(
                "trainer.devices: this process trains alone, but a variable of its environment (RANK, LOCAL_RANK, "
                "NODE_RANK or SLURM_PROCID) calls it another than the first of a run; unset it, or give all devices"
            )
        super()._fit_impl(model, train_dataloaders, val_dataloaders, datamodule, ckpt_path, weights_only)

    def check(
        self, model: LightningModule, datamodule: LightningDataModule | None = None, read_data: bool = False
    ) -> None:
        """Check the configuration and print networks, heads and data, without training.

        Args:
            model: the module.
            datamodule: the module's data.
            read_data: also read every image once and list those that cannot be read; `--data` alone stands for
                `--read_data=true`.

        Raises:
            UserError: an image cannot be read.
        """
        rehearse_fit(self, model, datamodule)
        print_set_up(model, datamodule, self)
        if read_data and datamodule is not None:
            read_all_images(datamodule)

    def plot(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        output: str = "pictures",
        images: int = 4,
        ckpt_path: str | None = None,
    ) -> None:
        """Plot what the heads compare on the first validation images.

        Args:
            model: the module.
            datamodule: the module's data.
            output: the folder for the pictures, one per term whose head can plot.
            images: number of images per picture.
            ckpt_path: a checkpoint with the student to plot; without one, the student is untrained.

        Raises:
            UserError: no head can plot, or `images` is below 1.
        """
        terms = model.terms.values() if isinstance(model, ClassificationModule) else []
        if images < 1:
            raise UserError(f"images must be at least 1, given {images}")
        if not any(can_plot(term.head) for term in terms):
            plotting = ", ".join(name for name, head in shipped().items() if head.plot is not Head.plot)
            raise UserError(f"model.heads: none of the heads can plot; those that can are {plotting}")
        pictures = PicturesOnce(output, images)
        self.callbacks.append(pictures)  # type: ignore[attr-defined]  # Lightning's Trainer has them
        self.limit_val_batches = 1
        self.validate(model, datamodule=datamodule, ckpt_path=ckpt_path, verbose=False)
        for path in pictures.written:
            print(path)

    def store(
        self,
        model: LightningModule,
        output: str,
        datamodule: LightningDataModule | None = None,
        splits: list[Literal["train", "val", "test"]] | None = None,
        shard: str = "1/1",
        teacher: str | None = None,
        force: bool = False,
    ) -> None:
        """Store a teacher's answers to all draws of all images, for trainings with a `StoredTeacher`.

        Args:
            model: the module.
            output: folder of the store. What an earlier call has written is kept: a call that was interrupted goes on,
                and a term that is new adds what it compares with.
            datamodule: the module's data, whose `draws` must be given.
            splits: whose answers to store, `--splits train val` by default; those of `val` and `test` are for metrics.
            shard: part of the files that this process writes, such as `1/4` of four.
            teacher: name of the teacher, where there are several.
            force: also store whole feature maps.
        """
        store(self, model, datamodule, output, splits or SPLITS, shard, teacher, force)

    def weigh(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        steps: int = 50,
        warmup: int = 20,
        share: float = 0.5,
        at: At = "parameters",
        ckpt_path: str | None = None,
        output: str | None = None,
    ) -> None:
        """Train for a while and print the weight at which each term has a share of the gradient; keep nothing.

        Args:
            model: the module.
            datamodule: the module's data.
            steps: number of optimizer steps in which the gradients of all terms are measured.
            warmup: number of optimizer steps before, with the configured weights; more if memories fill up later.
            share: norm of a term's weighted gradient relative to the task's, above 0; it may exceed 1.
            at: where gradients are compared: at the student's `parameters` below its classifier, its `embedding` or
                its `tokens`.
            ckpt_path: a checkpoint whose weights to start from; without one, the student is untrained.
            output: a new file for the weights, a configuration to add to the one given.
        """
        weigh(self, model, datamodule, steps, warmup, share, at, ckpt_path, output)


class _GivenCheckpoints(_CheckpointConnector):
    """Lightning's connector, without its search for a checkpoint that a job on SLURM has left."""

    @property
    def _hpc_resume_path(self) -> None:
        return None
