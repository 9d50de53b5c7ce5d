from __future__ import annotations

import torch

from distill.plotting.distributions import draw_distributions


def test_each_image_has_a_plot_of_both_distributions_over_the_teachers_most_probable_rows() -> None:
    student = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.3, 0.2]])
    teacher = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]])
    figure = draw_distributions(student, teacher, rows=2)
    drawn = [[line.get_ydata().tolist() for line in axes.lines] for axes in figure.axes]
    expected = [[[0.5, 0.3], [0.2, 0.7]], [[0.6, 0.3], [0.5, 0.2]]]
    torch.testing.assert_close(torch.tensor(drawn), torch.tensor(expected))
    assert [line.get_label() for line in figure.axes[0].lines] == ["teacher", "student"]
    assert figure.axes[0].get_yscale() == "log"


def test_a_memory_of_fewer_rows_is_drawn_whole() -> None:
    shares = torch.full((1, 3), 1 / 3)
    assert all(len(line.get_ydata()) == 3 for line in draw_distributions(shares, shares).axes[0].lines)
