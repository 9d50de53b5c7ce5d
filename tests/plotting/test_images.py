import torch

from distill.plotting.images import YELLOW, enlarged, grid_of_pictures, mean_colors, with_borders


def test_borders_run_where_labels_change_and_nowhere_else():
    image = torch.zeros(3, 256, 256)
    labels = torch.zeros(256, 256, dtype=torch.long)
    labels[:, 100:] = 1
    drawn = with_borders(image, labels)
    assert torch.allclose(drawn[:, :, 100], torch.tensor(YELLOW).unsqueeze(1).expand(3, 256))
    assert drawn.any(0).nonzero()[:, 1].unique().tolist() == [100], "all else is as it was"


def test_labels_of_tokens_are_drawn_over_the_pixels_that_they_stand_for():
    drawn = with_borders(torch.zeros(3, 224, 224), torch.tensor([[0, 1], [0, 1]]))
    assert drawn.shape == (3, 448, 448), "enlarged by a whole factor"
    assert (drawn.sum(0) > 0).nonzero()[:, 1].unique().tolist() == [224]


def test_small_and_gray_images_are_enlarged_without_new_colors():
    image = torch.rand(1, 8, 6)
    large = enlarged(image)
    assert large.shape[0] == 3
    assert large.shape[1] * 6 == large.shape[2] * 8
    assert set(large.unique().tolist()) == set(image.unique().tolist())


def test_superpixels_of_single_tokens_keep_the_mean_colors_of_their_cells():
    image = torch.rand(3, 8, 8)
    painted = mean_colors(image, torch.eye(16), (4, 4))
    assert torch.allclose(painted, torch.nn.functional.avg_pool2d(image, 2), atol=1e-6)


def test_matrices_of_a_row_have_one_scale_and_differences_lie_around_0():
    row = {
        "a": ("image", torch.rand(3, 4, 4)),
        "b": ("relation", torch.eye(3)),
        "c": ("relation", 2 * torch.eye(3)),
        "d": ("difference", -torch.eye(3)),
    }
    figure = grid_of_pictures([row, row])
    drawn = {axes.get_title(): axes.images[0].get_clim() for axes in figure.axes if axes.get_title()}
    assert drawn["b"] == drawn["c"] == (0.0, 2.0)
    assert drawn["d"] == (-1.0, 1.0)
