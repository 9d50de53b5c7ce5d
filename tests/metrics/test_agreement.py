import torch

from distill.metrics import IGNORE_INDEX, Agreement, TeacherDivergence, classification_metrics


def test_agreement_is_the_share_of_equal_choices_among_those_that_count():
    student = torch.eye(4)
    teacher = torch.eye(4)[[0, 1, 3, 2]]
    metric = Agreement()
    metric.update(student, teacher, torch.tensor([True, True, True, False]))
    assert metric.compute() == torch.tensor(2 / 3)


def test_divergence_is_the_mean_kl_from_teacher_to_student():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)
    metric = TeacherDivergence()
    metric.update(student[:4], teacher[:4], torch.ones(4, dtype=torch.bool))
    metric.update(student[4:], teacher[4:], torch.ones(2, dtype=torch.bool))
    p, q = teacher.softmax(1), student.softmax(1)
    torch.testing.assert_close(metric.compute().double(), (p * (p / q).log()).sum(1).mean(), rtol=1e-5, atol=0)


def test_samples_that_only_fill_up_are_not_counted():
    metrics = classification_metrics(10, "test")
    probability = torch.eye(10)[:4]
    metrics.update(probability, torch.tensor([0, 1, 5, IGNORE_INDEX]))
    metrics.update(probability, torch.tensor([IGNORE_INDEX] * 4))
    found = metrics.compute()
    assert found["test/top1"] == torch.tensor(2 / 3)
    torch.testing.assert_close(found["test/calibration_error"], torch.tensor(1 / 3))
    assert set(found) == {"test/top1", "test/top5", "test/calibration_error"}


def test_top5_is_left_out_where_it_is_trivial():
    assert set(classification_metrics(5, "val").keys()) == {"val/top1", "val/calibration_error"}
