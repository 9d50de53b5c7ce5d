"""The neighbors that student and teacher have in common, against a plain computation, and on two ranks."""

import numpy
import pytest
import torch

from distill.distributed import own_rows, rank, world_size
from distill.functional.neighbors import shared_neighbors
from distill.metrics import NeighborAgreement


def plainly(student, teacher, neighbors):
    """The definition, image by image, in NumPy."""
    shares = []
    for index in range(len(student)):
        found = []
        for embedding in (student.double().numpy(), teacher.double().numpy()):
            unit = embedding / numpy.linalg.norm(embedding, axis=1, keepdims=True)
            order = [row for row in numpy.argsort(-(unit @ unit[index])) if row != index]
            found.append(set(order[:neighbors]))
        shares.append(len(found[0] & found[1]) / neighbors)
    return torch.tensor(shares)


def embeddings(count=37):
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(count, 9, generator=generator)
    return teacher[:, :5] + torch.randn(count, 5, generator=generator), teacher


@pytest.mark.parametrize("neighbors", [1, 4, 10])
@pytest.mark.parametrize("chunk", [None, 5, 37])
def test_the_shares_are_those_of_the_definition(neighbors, chunk):
    student, teacher = embeddings()
    torch.testing.assert_close(
        shared_neighbors(student, teacher, neighbors, chunk), plainly(student, teacher, neighbors).float()
    )


def test_equal_embeddings_agree_fully_and_unrelated_ones_by_chance():
    teacher = torch.randn(400, 8, generator=torch.Generator().manual_seed(1))
    student = torch.randn(400, 3, generator=torch.Generator().manual_seed(2))
    assert shared_neighbors(teacher, teacher).mean() == 1
    assert float(shared_neighbors(student, teacher).mean()) == pytest.approx(10 / 399, abs=0.01)


def test_of_few_images_all_others_are_neighbors_and_one_image_has_none():
    student, teacher = embeddings(4)
    metric = NeighborAgreement()
    metric.update(student, teacher, torch.ones(4, dtype=torch.bool))
    assert metric.compute() == 1
    metric.reset()
    metric.update(student[:1], teacher[:1], torch.ones(1, dtype=torch.bool))
    assert metric.compute().isnan()


def test_images_that_only_pad_a_batch_do_not_count():
    student, teacher = embeddings()
    metric = NeighborAgreement(neighbors=4)
    for rows in torch.arange(37).split(10):
        metric.update(student[rows], teacher[rows], torch.ones(len(rows), dtype=torch.bool))
    metric.update(student[:3], teacher[-3:], torch.zeros(3, dtype=torch.bool))
    torch.testing.assert_close(metric.compute(), plainly(student, teacher, 4).float().mean())


def _agreement(count):
    """Return the metric of images dealt as an EvaluationSampler deals them; the last ranks are padded."""
    student, teacher = embeddings(count)
    positions = torch.arange(-(-count // world_size()) * world_size())
    metric = NeighborAgreement(neighbors=4)
    for rows in own_rows(positions).split(5):
        metric.update(student[rows % count], teacher[rows % count], rows < count)
    return metric.compute(), rank()


def test_two_ranks_count_every_image_once_and_get_the_value_of_one_process(pool):
    expected, _ = _agreement(37)
    (first, _), (second, _) = pool.run(_agreement, 37)
    assert first == second == expected
