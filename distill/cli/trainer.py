"""Lightning's Trainer with the commands `check` and `plot`."""

from __future__ import annotations

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch import Trainer as LightningTrainer

from distill.callbacks.pictures import PicturesOnce, can_plot
from distill.cli.check import print_set_up
from distill.cli.rehearsal import rehearse_fit
from distill.errors import UserError
from distill.heads import Head, shipped
from distill.training.classification import ClassificationModule


class Trainer(LightningTrainer):
    """Lightning's Trainer, extended by `check` and `plot`."""

    def check(self, model: LightningModule, datamodule: LightningDataModule | None = None) -> None:
        """Check the configuration and print networks, heads and data, without training."""
        rehearse_fit(self, model, datamodule)
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
