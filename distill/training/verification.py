"""Recomputing rows of a stored teacher, with its network made again."""

from __future__ import annotations

from typing import Any

import torch
from jsonargparse import ArgumentParser
from torch.utils.data import default_collate

from distill.data import ImageData
from distill.data.dataset import key_of_stored
from distill.distiller import Distiller
from distill.errors import UserError
from distill.networks import FrozenTeacher, Network
from distill.precision import at_least_float32
from distill.randomness import derive_seed, unchanged_states
from distill.store import StoredTeacher
from distill.superpixels import add_segments
from distill.superpixels.pixels import backend_on
from distill.training.storing import answers

TOLERANCES = {False: 1e-5, True: 3e-2}
"""Largest difference of a number x, relative to 1 + |x|: of rows in float32 of a CPU, and of rounded ones."""


def verify(teacher: StoredTeacher, distiller: Distiller, data: ImageData, num_classes: int) -> None:
    """Recompute `teacher.verify` rows of the training images on the CPU and compare them with the stored ones.

    Autocast is that of the store. Rows that were computed in half precision, or on a GPU, whose convolutions round
    more, must agree less closely. Terms on segments that only a GPU computes are left out.

    Raises:
        UserError: the network cannot be made again, has other weights, or computes other rows.
    """
    network = _network(teacher, num_classes, data.image_shape)
    count, rows = teacher.verify, teacher.rows("train")
    numbers = [derive_seed("row", number) % len(rows) for number in range(count)]
    draws, indices = [row // rows.rows.images for row in numbers], [row % rows.rows.images for row in numbers]
    dataset: Any = data.keyed_dataloader("train", ()).dataset
    views = len(data.train_views)
    keys = [key_of_stored(draw, index, views) for draw, index in zip(draws, indices, strict=True)]
    batch = default_collate(dataset.__getitems__(keys))
    settings = [dict(each.key["segments"]) for each in teacher.quantities("train") if "segments" in each.key]
    if settings and (settings[0].pop("mean"), settings[0].pop("std")) == (0.0, 1.0) and _runs_here(settings[0]):
        batch = add_segments(batch, **settings[0])
    requests = {
        term: request for term, request in teacher.requests.items() if not request.on_segments or "segments" in batch
    }
    objective = distiller.objective
    identity = teacher.index.identity
    dtype: str = identity["teacher"]["dtype"]
    autocast = _autocast(dtype)
    tolerance = TOLERANCES["16" in dtype or identity.get("device", "cpu") != "cpu"]
    with torch.no_grad(), torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        found = answers(objective, requests, (), network(batch["image"]), batch)
    stored = rows.batch(draws, indices)
    for name, computed in found.items():
        expected, computed = at_least_float32(stored[name]), at_least_float32(computed)
        wrong = (computed - expected).abs() > tolerance * (1 + expected.abs())
        if wrong.any():
            row = int(wrong.flatten(1).any(dim=1).nonzero()[0])
            raise UserError(
                f"verify: {name!r} of image {indices[row]} in draw {draws[row] // views} is another in the store "
                f"{teacher.path!r} than the network computes (by {float((computed - expected).abs().max()):.2g})"
            )


def _autocast(dtype: str) -> torch.dtype | None:
    """Return the half precision of a trainer that the description of a teacher's dtype names; `None` without one."""
    return {"of precision bf16-mixed": torch.bfloat16, "of precision 16-mixed": torch.float16}.get(dtype)


def _runs_here(segments: dict[str, Any]) -> bool:
    try:
        backend_on(torch.device("cpu"), segments["segments"], segments["backend"])
    except UserError:
        return False
    return True


def _network(teacher: StoredTeacher, num_classes: int, image_shape: tuple[int, int, int]) -> FrozenTeacher:
    """Make the teacher's network again, as it was for the store."""
    identity = teacher.index.identity
    if (configuration := identity.get("network")) is None:
        raise UserError(f"verify: the store {teacher.path!r} does not say how to make its teacher: leave it out")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--network", type=Network)
    with unchanged_states():
        network: Network = parser.instantiate_classes(parser.parse_object({"network": configuration})).network
        network.build(num_classes, image_shape, learns=False)
    named = identity["teacher"]["dtype"]
    frozen = FrozenTeacher(network, None if named.startswith("of precision") else getattr(torch, named))
    if frozen.fingerprint != teacher.fingerprint:
        raise UserError(
            f"verify: the store {teacher.path!r} is of weights {teacher.fingerprint[:12]}, but {frozen.name} now has "
            f"{frozen.fingerprint[:12]}: its weights have changed, or were random"
        )
    return frozen
