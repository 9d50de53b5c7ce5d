"""Wasserstein distance between class distributions: WKD-L (Lv, Yang, Li, 2024)."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import Any, Literal

import torch
from torch import Tensor

from distill import functional
from distill.distributed import gather
from distill.errors import one_of, require_above, require_at_least
from distill.features import Features, FeatureSpec
from distill.functional.labels import hard_labels
from distill.heads.base import Batch, LogitHead, Scope
from distill.heads.parts.classifier import ClassifierHead, classifier_of
from distill.heads.parts.labeled import mean_over_labeled, require_other_classes
from distill.memory import ClassBank, refuse_other_shapes
from distill.schedules import Number, require_values_above, value_at


class WKDL(ClassifierHead, LogitHead):
    """Transport between the classes other than the target, which costs more between less related classes.

    The loss is L_t + `gamma` D_WD, mean over the samples: L_t = -p_t(y) log p_s(y) is NKD's part on the target at
    temperature 1; D_WD is the least cost, with an entropy, of moving the student's distribution over the other classes
    to the teacher's, both at `temperature`, by Sinkhorn's iterations. It is not 0 for equal distributions. Moving from
    class i to j costs c_ij = 1 - exp(-`sharpness` (1 - IR(i, j))), with the interrelation IR of the teacher's classes.

    With `cost: classifier`, IR is the cosine of the rows of the teacher's classifier (`fc` in the authors' code). With
    `cost: features` it is the linear CKA of the two classes' features. The published figures rest on the latter, which
    a script computes beforehand from all training images without augmentation, for CIFAR-100 from every position of the
    last map; here it is computed from the first `samples` embeddings of each class that occur in training, which are
    then kept, and until then from those that there are. (Classes of which nothing is known cost the most.) They take
    classes x samples x d numbers.

    The target of a soft label `[B, K]` is its largest class. A sample without a label (-1, or a soft label of zeros) is
    ignored: the mean runs over the labeled samples of all ranks, and is 0 if there are none.

    The authors' code for CIFAR-100: gamma 600 and temperature 8 for ResNet-32x4 with ResNet-8x4, 200 and 6 for WRN-40-2
    with ShuffleNetV1, 200 and 8 or 60 and 4 beside WKD-F. From epoch 150 to 240 gamma alone falls to 0 along half a
    cosine wave, once per epoch there.

    Args:
        gamma: weight of the transport beside the target, a number or a schedule; 600 as in the authors' code for
            ResNet-32x4 with ResNet-8x4.
        temperature: T of the other classes, a number or a schedule; 8 likewise.
        cost: the source of the interrelations, `classifier` or `features`.
        sharpness: k of the costs; 1 as in the authors' code; 0 takes 1 - IR itself.
        regularization: divisor of the costs in Sinkhorn's kernel; 0.05 likewise.
        iterations: of Sinkhorn; 10 likewise.
        samples: n, stored embeddings per class with `cost: features`.

    Raises:
        UserError: an unknown cost, or a number out of its range.
    """

    batch_needs = frozenset({"label"})
    bank: ClassBank | None

    def __init__(
        self,
        gamma: Number = 600.0,
        temperature: Number = 8.0,
        cost: Literal["classifier", "features"] = "classifier",
        sharpness: float = 1.0,
        regularization: float = 0.05,
        iterations: int = 10,
        samples: int = 64,
    ) -> None:
        super().__init__()
        self.cost = one_of("cost", cost, ("classifier", "features"))
        require_values_above(0, temperature=temperature)
        require_above(0, regularization=regularization)
        require_at_least(0, sharpness=sharpness)
        require_at_least(1, iterations=iterations)
        require_at_least(2, samples=samples)
        self.gamma, self.temperature, self.sharpness = gamma, temperature, sharpness
        self.regularization, self.iterations, self.samples = regularization, iterations, samples
        self.bank = None
        self.scope: Scope = "image" if cost == "classifier" else "memory"
        self.classifiers = frozenset({"teacher"} if cost == "classifier" else ())
        self.needs = frozenset({"logits"} if cost == "classifier" else {"logits", "embedding"})

    def needs_of(self, side: Literal["student", "teacher"]) -> AbstractSet[str]:
        """Return the logits, and for costs from features also the teacher's embedding."""
        return frozenset({"logits"}) if side == "student" else self.needs

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Build the memory of the costs from features, and check the numbers of classes.

        Raises:
            UserError: they differ, or there are fewer than two.
        """
        super().build(student, teacher)
        require_other_classes(self, student)
        (self.width,) = teacher["embedding"]
        if self.cost == "features":
            (classes,) = student["logits"]
            self.bank = ClassBank(classes, self.samples, self.width)

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Compare logits `[B, K]` with logits `[B, K]`, given labels `[B]` or `[B, K]`."""
        logits, cost = (student["logits"], teacher["logits"]), self.costs(teacher)
        gamma, temperature = (value_at(number, self.progress) for number in (self.gamma, self.temperature))

        def loss(target: Tensor) -> Tensor:
            transport = functional.transport_among_others(
                *logits, target, cost, temperature, self.regularization, self.iterations
            )
            return functional.target_cross_entropy(*logits, target) + gamma * transport

        if self.bank is not None and self.training:  # after the costs have been computed
            self.bank.enter(gather(teacher["embedding"]), gather(hard_labels(batch["label"])))
        return mean_over_labeled(loss, batch["label"])

    def costs(self, teacher: Features) -> Tensor:
        """Return the costs of moving mass between the classes, `[K, K]`, in the type of the teacher's logits."""
        like = teacher["logits"]
        if self.bank is not None:
            interrelation = functional.linear_cka(self.bank.rows.to(like.dtype), self.bank.present)
        else:
            units = torch.eye(self.width, dtype=like.dtype, device=like.device)
            classify = classifier_of(teacher)
            interrelation = functional.class_cosines((classify(units) - classify(torch.zeros_like(units[:1]))).mT)
        return functional.class_costs(interrelation, self.sharpness)

    def filled(self) -> Tensor | None:
        """Return the filled share of the memory; `None` with costs from the classifier."""
        return None if self.bank is None else self.bank.present.to(torch.float32).mean()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        refuse_other_shapes(self, state_dict, prefix, {"bank.flat": "the bank (classes x samples + 1, width)"})
        super()._load_from_state_dict(state_dict, prefix, *args)
