"""What a student's embeddings are worth on a data set, by nearest neighbors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader

from distill.data import ImageData, Split
from distill.errors import UserError
from distill.functional import neighbor_votes
from distill.networks import Network

_CHUNK = 2**26
"""How many similarities are held at a time: 256 MiB."""


@dataclass(frozen=True)
class Probed:
    """Of how many test images the class was found, by a memory of how many training images."""

    right: int
    tested: int
    remembered: int

    @property
    def top1(self) -> float:
        """The share that is right."""
        return self.right / self.tested


def probe(student: Network, data: ImageData, neighbors: int = 20, temperature: float = 0.07) -> Probed:
    """Classify the test images of `data` by the weighted vote of the nearest training images.

    Images of another size than the student was trained with are resized to that. Training images come as `data` gives
    them: to remember them as they are, make it with `augment=False`. Images without a label are left out.

    Args:
        student: a built network with an embedding; it runs in eval mode, on the GPU if there is one.
        data: the data set, which may have other classes than the student was trained with.
        neighbors: how many training images vote.
        temperature: of the weight of a vote, see `neighbor_votes`.

    Raises:
        UserError: the student has no embedding, or a setting does not fit the data.
    """
    if student.spec.embedding is None:
        raise UserError(f"ckpt_path: {student.name} gives no embedding, so it has no neighbors")
    if data.image_shape[0] != student.image_shape[0]:
        raise UserError(
            f"data: its images have {data.image_shape[0]} channels, the student was trained with "
            f"{student.image_shape[0]}"
        )
    if neighbors < 1:
        raise UserError(f"neighbors must be at least 1, given {neighbors}")
    if temperature <= 0:
        raise UserError(f"temperature must be above 0, given {temperature}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student = student.to(device).eval()
    data.prepare_data()
    memory, labels = _embeddings(student, data, "train", device)
    if neighbors > len(labels):
        raise UserError(f"neighbors is {neighbors}, more than the {len(labels)} labeled training images")
    queries, wanted = _embeddings(student, data, "test", device)
    chunk = max(1, _CHUNK // len(memory))
    votes = neighbor_votes(queries, memory, labels, data.num_classes, neighbors, temperature, chunk)
    return Probed(right=int((votes.argmax(dim=1) == wanted).sum()), tested=len(wanted), remembered=len(labels))


@torch.no_grad()
def _embeddings(student: Network, data: ImageData, split: Split, device: torch.device) -> tuple[Tensor, Tensor]:
    """Embeddings `[N, d]` and labels `[N]` of the labeled images of a split."""
    size = student.image_shape[1:]
    embeddings, labels = [], []
    for batch in DataLoader(data.samples(split), batch_size=data.batch_size, num_workers=data.num_workers):
        image = batch["image"].to(device)
        if image.shape[-2:] != size:
            image = interpolate(image, size, mode="bilinear", antialias=True)
        embeddings.append(student(image)["embedding"].float())
        labels.append(batch["label"].to(device))
    label = torch.cat(labels)
    return torch.cat(embeddings)[label >= 0], label[label >= 0]
