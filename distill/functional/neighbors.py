"""Nearest neighbors that two embeddings of the same images have in common."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def shared_neighbors(student: Tensor, teacher: Tensor, neighbors: int = 10, chunk: int | None = None) -> Tensor:
    """Return, for each image, the share of its nearest images in the teacher that are among its nearest in the student.

    With N_k(i) the k images with the largest cosine to image i, itself left out: |N_k^S(i) n N_k^T(i)| / k. Of two
    unrelated embeddings the mean is about k / (n - 1).

    >>> embedding = torch.randn(40, 6)
    >>> shared_neighbors(2 * embedding, embedding).mean()
    tensor(1.)

    Args:
        student: `[n, d_s]`, n at least 2.
        teacher: `[n, d_t]`, of the same images in the same order.
        neighbors: k; of fewer than k others, all count.
        chunk: images compared with all others at a time; by default all.

    Returns:
        float32 `[n]`, from 0 to 1.
    """
    count = len(student)
    nearest = min(neighbors, count - 1)
    embeddings = normalize(student, dim=1), normalize(teacher, dim=1)
    shares = []
    for first in range(0, count, chunk or count):
        rows = torch.arange(first, min(first + (chunk or count), count), device=student.device)
        found = []
        for embedding in embeddings:
            cosine = embedding[rows] @ embedding.T
            cosine.scatter_(1, rows.unsqueeze(1), -torch.inf)
            found.append(cosine.topk(nearest, dim=1).indices)
        common = (found[0].unsqueeze(2) == found[1].unsqueeze(1)).any(dim=2).sum(dim=1)
        shares.append(common.float() / nearest)
    return torch.cat(shares)
