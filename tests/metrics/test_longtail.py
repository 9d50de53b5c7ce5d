import pytest
import torch

from distill.metrics import IGNORE_INDEX, LongTailAccuracy

LABEL = [0, 0, 0, 0, 1, 1, 2, 3, 3, 3]
CHOSEN = [0, 0, 0, 1, 1, 0, 3, 3, 3, 2]
RECALL = [3 / 4, 1 / 2, 0, 2 / 3]


def logits(chosen):
    return torch.nn.functional.one_hot(torch.tensor(chosen), 5).float()


def test_recall_of_classes_and_means_of_groups_each_image_counted_once():
    metric = LongTailAccuracy(5, {"many": [0, 1], "medium": [], "few": [2, 3, 4]})
    metric.update(logits(CHOSEN[:6]), torch.tensor(LABEL[:6]))
    metric.update(logits([*CHOSEN[6:], 0]), torch.tensor([*LABEL[6:], IGNORE_INDEX]))
    found = metric.compute()
    assert {name: found[name].item() for name in ("many", "few", "balanced")} == pytest.approx(
        {"many": (RECALL[0] + RECALL[1]) / 2, "few": (RECALL[2] + RECALL[3]) / 2, "balanced": sum(RECALL) / 4}
    )
    assert [found[f"recall/{label}"].item() for label in range(4)] == pytest.approx(RECALL)
    assert found["recall/4"].isnan(), "a class without a test image has no recall"
    assert "medium" not in found, "nor has a group without a class"


def test_on_a_balanced_test_the_mean_recall_of_a_group_is_the_accuracy_on_its_images():
    generator = torch.Generator().manual_seed(0)
    label, scores = torch.arange(5).repeat(20), torch.randn(100, 5, generator=generator)
    metric = LongTailAccuracy(5, {"few": [1, 4]})
    metric.update(scores, label)
    own = (label == 1) | (label == 4)
    assert metric.compute()["few"].item() == pytest.approx((scores.argmax(1) == label)[own].float().mean().item())
