"""Evaluation of a student's embeddings by their nearest neighbors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader

from distill.data import ImageData, Split
from distill.errors import UserError, require_above, require_at_least
from distill.functional import neighbor_votes
from distill.networks import Network
from distill.networks.modes import eval_mode

_CHUNK = 2**26
"""Number of similarities in memory at a time: 256 MiB."""


@dataclass(frozen=True)
class ProbeResult:
    """The result of classifying test images by their nearest training images.

    Attributes:
        correct: number of test images whose class was predicted correctly.
        tested: number of labeled test images.
        memory_size: number of labeled training images.
    """

    correct: int
    tested: int
    memory_size: int

    @property
    def top1(self) -> float:
        """The fraction of correct predictions."""
        return self.correct / self.tested


def probe(
    student: Network,
    data: ImageData,
    neighbors: int = 20,
    temperature: float = 0.07,
    queries: Split = "test",
    device: torch.device | None = None,
) -> ProbeResult:
    """Classify the test images of `data` by a weighted vote of the nearest training images.

    Images are resized to the size that the student was trained with. Training images are augmented as `data` is
    configured: use `augment=False` for the plain images. They are those that a run on `data` trains on, after any
    `longtail`, in one view, with the labels that `data` gives them; images without a label are left out.

    Args:
        student: a built network with an embedding; it runs in eval mode, on the GPU if there is one.
        data: the data set, whose classes need not be those that the student was trained with.
        neighbors: number of training images that vote.
        temperature: of the weight of a vote, see `neighbor_votes`.
        queries: the split whose images are classified.
        device: to compute on; by default the GPU if there is one.

    Raises:
        UserError: the student has no embedding, no training image or none of `queries` has a label, or a setting does
            not fit the data.
    """
    if student.spec.embedding is None:
        raise UserError(f"ckpt_path: {student.name} gives no embedding, so it has no neighbors")
    if data.num_classes == 0:
        raise UserError(f"data: {type(data).__name__} has no labels, by which neighbors could vote")
    if data.image_shape[0] != student.image_shape[0]:
        raise UserError(
            f"data: its images have {data.image_shape[0]} channels, the student was trained with "
            f"{student.image_shape[0]}"
        )
    require_at_least(1, neighbors=neighbors)
    require_above(0, temperature=temperature)
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data.prepare_data()
    with eval_mode(student.to(device)):
        embeddings, targets = _embeddings(student, data, queries, device)
        if not len(targets):
            raise UserError(f"data: none of its {queries} images has a label, by which a prediction could be judged")
        memory, labels = _embeddings(student, data, "train", device)
        if neighbors > len(labels):
            raise UserError(f"neighbors is {neighbors}, more than the {len(labels)} labeled training images")
    chunk = max(1, _CHUNK // len(memory))
    votes = neighbor_votes(embeddings, memory, labels, data.num_classes, neighbors, temperature, chunk)
    correct = int((votes.argmax(dim=1) == targets).sum())
    return ProbeResult(correct=correct, tested=len(targets), memory_size=len(labels))


@torch.no_grad()
def _embeddings(student: Network, data: ImageData, split: Split, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return embeddings `[N, d]` and labels `[N]` of the labeled images of a split."""
    size = student.image_shape[1:]
    samples = data.used_samples(split)
    if not len(samples):
        raise UserError(f"data: {type(data).__name__} has no {split} images")
    embeddings, labels = [], []
    generator = torch.Generator().manual_seed(0)  # a training goes on afterwards
    for batch in DataLoader(samples, batch_size=data.batch_size, num_workers=data.num_workers, generator=generator):
        image = batch["image"].to(device)
        if image.shape[-2:] != size:
            image = interpolate(image, size, mode="bilinear", antialias=True)
        embeddings.append(student(image)["embedding"].float())
        labels.append(batch["label"].to(device))
    label = torch.cat(labels)
    return torch.cat(embeddings)[label >= 0], label[label >= 0]
