"""Small networks for the tests."""

from torch import Tensor, nn


class Branching(nn.Module):
    """Network with a layer that returns two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.split = Split()
        self.head = nn.Linear(8, 10)

    def forward(self, image: Tensor) -> Tensor:
        left, right = self.split(image)
        scores: Tensor = self.head(left + right)
        return scores


class Split(nn.Module):
    """Layer that returns the two halves of a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(3, 16)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        left, right = self.project(image.mean((2, 3))).chunk(2, dim=1)
        return left, right


class Plain(nn.Module):
    """Perceptron with logits and an embedding but no tokens."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8), nn.ReLU(), nn.Linear(8, num_classes))

    def forward(self, image: Tensor) -> Tensor:
        scores: Tensor = self.layers(image)
        return scores


class Convolutional(nn.Module):
    """Network without a linear layer, which averages a map of scores."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Conv2d(3, 10, 3)

    def forward(self, image: Tensor) -> Tensor:
        scores: Tensor = self.scores(image)
        return scores.mean((2, 3))
