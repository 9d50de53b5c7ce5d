"""Classification by nearest neighbors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def neighbor_votes(
    queries: Tensor,
    memory: Tensor,
    labels: Tensor,
    num_classes: int,
    neighbors: int = 20,
    temperature: float = 0.07,
    chunk: int | None = None,
) -> Tensor:
    """Return the class votes of the nearest neighbors of embeddings.

    With s_i = cos(q, m_i), the k rows of the memory with the largest s_i vote with weight exp(s_i / tau):
        p_c = sum over {i among the k: y_i = c} exp(s_i / tau) / sum over the k exp(s_i / tau).

    Args:
        queries: q, `[Q, d]`.
        memory: m, `[N, d]`.
        labels: y, `[N]`, from 0 to `num_classes` - 1.
        num_classes: K.
        neighbors: k, at most N.
        temperature: tau; 0.07 as in Wu et al. (2018).
        chunk: queries compared with the memory at a time; by default all.

    Returns:
        `[Q, K]`; rows sum to 1.
    """
    memory = normalize(memory, dim=1)
    votes = []
    for part in torch.split(normalize(queries, dim=1), chunk or max(1, len(queries))):
        similarity, nearest = (part @ memory.T).topk(neighbors, dim=1)
        weight = (similarity / temperature).softmax(dim=1)
        votes.append(weight.new_zeros(len(part), num_classes).scatter_add(1, labels[nearest], weight))
    return torch.cat(votes)
