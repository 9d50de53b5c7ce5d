"""Lightning's Trainer with the commands `check`, `plot` and `weigh`."""

from __future__ import annotations

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch import Trainer as LightningTrainer

from distill.callbacks.gradient_meter import At
from distill.callbacks.pictures import PicturesOnce, can_plot
from distill.cli.check import print_set_up
from distill.cli.weigh import weigh
from distill.errors import UserError
from distill.heads import Head, shipped
from distill.training.classification import ClassificationModule


class Trainer(LightningTrainer):
    """Lightning's Trainer, extended by `check`, `plot` and `weigh`."""

    def check(self, model: LightningModule, datamodule: LightningDataModule | None = None) -> None:
        """Check the configuration and print networks, heads and data, without training."""
        print_set_up(model, datamodule, self)

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
