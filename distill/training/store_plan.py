"""The plan of a store: what a teacher's answers are, which of them a store is to hold, and which it lacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import nn

from distill.data import ImageData, Split
from distill.data.identity import split_identity
from distill.errors import UserError, under
from distill.networks import FrozenTeacher, Teacher
from distill.store import Difference, Quantity, Request, Rows, StoreIndex, differences, read_state, write_state
from distill.store.index import INDEX
from distill.store.requests import FEATURES
from distill.store.stored_teacher import CLASSIFIER, spec_to_json
from distill.training.batches import dummy_batch
from distill.training.comparison import distillation_terms
from distill.training.distillation import DistillationModule
from distill.training.stored import run_identity, segment_settings, versions
from distill.training.storing import Missing, answers, missing, rows_of


@dataclass(frozen=True)
class StorePlan:
    """The content of a store as it is to be.

    Attributes:
        folder: of the store.
        teacher: name of the teacher.
        index: of the store as it will be.
        requests: of the terms.
        quantities: by split, those that the terms and the metrics read.
        lacking: by split, what is to be computed.
    """

    folder: Path
    teacher: str
    index: StoreIndex
    requests: Mapping[str, Request]
    quantities: Mapping[Split, Sequence[Quantity]]
    lacking: Sequence[Missing]

    @property
    def bytes(self) -> int:
        """The size of the files to write."""
        return sum(each.bytes for each in self.lacking)

    def share(self, part: int, parts: int) -> StorePlan:
        """Return the plan of one of several processes, the first of which is number 0."""
        return replace(self, lacking=[each.share(part, parts) for each in self.lacking])

    def readers(self, quantity: Quantity) -> list[str]:
        """Return the names of the terms that read a quantity."""
        return [term for term, request in self.requests.items() if request.asks_for(quantity.name)]


def plan_store(
    trainer: Trainer,
    module: DistillationModule,
    data: ImageData,
    teacher: str,
    splits: Sequence[Split],
    folder: Path,
    network: Any = None,
) -> StorePlan:
    """Plan a store of what the terms of a module compare with, or the completion of one that exists.

    Args:
        trainer: which has the precision and the callbacks.
        module: with the teacher and the terms, on the CPU.
        data: the images, set up.
        teacher: name of the teacher.
        splits: whose images are seen.
        folder: of the store, which need not exist.
        network: configuration of the teacher's network, with which `verify` makes it again.

    Raises:
        UserError: the folder has a store of something else.
    """
    requests = module.distiller.objective.requests(teacher)
    device = trainer.strategy.root_device.type
    described = _teacher_identity(trainer, module, teacher)
    identity = {**run_identity(data), **described, "network": network, "device": device}
    quantities = _quantities(module, teacher, requests, segment_settings(trainer))
    index = _existing(folder, identity) or StoreIndex(identity, {}, {})
    wanted: dict[Split, Sequence[Quantity]] = {}
    for split in splits:
        wanted[split] = quantities["train" if split == "train" else "evaluation"]
        images = split_identity(data, split)
        if split in index.splits and index.images[split] != images:
            raise UserError(f"output: {str(folder)!r} is a store of other images of {split!r}: give another folder")
        draws = (data.draws or 1) * len(data.train_views) if split == "train" else 1
        rows = rows_of(images["images"], draws, data.batch_size, max((each.bytes for each in wanted[split]), default=1))
        if split in index.splits:
            rows = Rows(rows.images, draws, index.splits[split].per_shard)
        with under("output"):
            index = index.adding(split, rows, wanted[split], images)
    index = index.described(identity)
    return StorePlan(folder, teacher, index, requests, wanted, missing(folder, index, wanted))


def write_states(module: DistillationModule, teacher: str, requests: Mapping[str, Request], folder: Path) -> None:
    """Write the frozen tensors that summaries depend on, and the teacher's classifier if it is linear.

    What the store has already is left as it is.
    """
    if (classifier := _linear_classifier(module.teachers[teacher])) is not None:
        tensors = {"weight": classifier.weight, "bias": classifier.bias}
        given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        if not _is_written(folder, CLASSIFIER, given):
            write_state(folder, CLASSIFIER, given)
    for term, request in requests.items():
        state = module.terms[term].head.summary_state()
        if state and not _is_written(folder, request.prefix, state):
            write_state(folder, request.prefix, state)


def _is_written(folder: Path, name: str, state: Mapping[str, torch.Tensor]) -> bool:
    try:
        written = read_state(folder, name)
    except UserError:
        return False
    return written.keys() == state.keys() and all(torch.equal(written[key], state[key].cpu()) for key in state)


def _existing(folder: Path, identity: Mapping[str, Any]) -> StoreIndex | None:
    """Return the index of the store in a folder, `None` if there is none; a store must be of the same answers."""
    if not (folder / INDEX).exists():
        return None
    index = StoreIndex.read(folder)
    found = [*index.differences(identity), *_network_differences(index.identity, identity)]
    known = index.identity.get("taps", {})
    for name, tap in identity["taps"].items():
        if name in known and known[name] != tap:
            raise UserError(f"output: {str(folder)!r} has {known[name]} as tap {name!r}, not {tap}: rename the tap")
    if found:
        raise UserError(f"output: {str(folder)!r} is a store of something else: {'; '.join(map(str, found))}")
    return index


def _network_differences(stored: Mapping[str, Any], given: Mapping[str, Any]) -> list[Difference]:
    """Compare how the networks are made, where both are known, but for weights and taps, which are compared apart."""
    known, new = ({**(identity.get("network") or {})} for identity in (stored, given))
    if not known or not new:
        return []
    for recipe in (known, new):
        settings = recipe.get("init_args") or {}  # a class of a user may have none
        recipe["init_args"] = {key: value for key, value in settings.items() if key not in _APART}
    return differences({"network": known}, {"network": new})


_APART = ("weights", "pretrained", "drop_classifier", "taps", "layout")


def _teacher_identity(trainer: Trainer, module: DistillationModule, name: str) -> dict[str, Any]:
    teacher = module.teachers[name]
    features = spec_to_json(teacher.spec)
    taps = {tap: {"shape": shape} for tap, shape in features.pop("maps").items()}
    described: dict[str, Any] = {"name": teacher.name, "fingerprint": teacher.fingerprint, "features": features}
    if isinstance(teacher, FrozenTeacher):
        described |= {"classifies": _linear_classifier(teacher) is not None}
        layers = teacher.network.tap_layers
        taps = {tap: {**shape, "layer": layers.get(tap, tap)} for tap, shape in taps.items()}
    described |= _pass_identity(trainer, module, teacher)
    return {"teacher": described, "taps": taps, "versions": versions()}


def _pass_identity(trainer: Trainer, module: DistillationModule, teacher: Teacher) -> dict[str, Any]:
    """Return what a teacher's answers depend on besides its weights; of an ensemble, what those of its members do."""
    if not isinstance(teacher, FrozenTeacher):
        members = {name: module.teachers[name] for name in teacher.of}
        return {"members": {name: _pass_identity(trainer, module, member) for name, member in members.items()}}
    network = teacher.network
    dtype = str(teacher.dtype).removeprefix("torch.") if teacher.dtype else f"of precision {trainer.precision}"
    images = {name: getattr(network, name).flatten().tolist() for name in ("mean", "std")}
    return {"dtype": dtype, "input": list(network.input_shape), **images}


def _linear_classifier(teacher: Teacher) -> nn.Linear | None:
    """Return the layer that computes a teacher's logits from its embedding, if it is linear."""
    classify = teacher.network.classify if isinstance(teacher, FrozenTeacher) else None
    layer = None if classify is None else classify.model.get_submodule(classify.layer)
    return layer if type(layer) is nn.Linear else None


def _quantities(
    module: DistillationModule, teacher: str, requests: Mapping[str, Request], segments: Mapping[str, Any] | None
) -> dict[str, list[Quantity]]:
    """Return the quantities that are read in `train`, and in `evaluation` by metrics and by terms without memory."""
    image = module.student.dummy_images()
    objective = module.distiller.objective
    batch: dict[str, Any] = {}
    for term in requests:
        batch |= dummy_batch(image, objective.terms[term].head, module.num_classes)
    batch.pop("view", None)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        features = module.distiller.teacher_features({"image": image, **batch}, [teacher])[teacher]
        metrics = [name for name in FEATURES[:2] if getattr(features, name) is not None]
        found = answers(objective, requests, metrics, features, batch)
    quantities: dict[str, Quantity] = {}
    for name, tensor in found.items():
        request = next((request for request in requests.values() if request.asks_for(name)), None)
        key = {} if request is None else request.key(segments)
        quantities[name] = Quantity(name, tuple(tensor.shape[1:]), tensor.dtype, key)
    evaluated = [request for term, request in requests.items() if term in distillation_terms(objective)]
    return {
        "train": [
            each for name, each in quantities.items() if any(request.asks_for(name) for request in requests.values())
        ],
        "evaluation": [
            each
            for name, each in quantities.items()
            if name in metrics or any(request.asks_for(name) for request in evaluated)
        ],
    }
