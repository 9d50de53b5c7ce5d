"""Small networks for the tests."""

from torch import Tensor, nn


class Plain(nn.Module):
    """A perceptron: logits and an embedding, no tokens."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8), nn.ReLU(), nn.Linear(8, num_classes))

    def forward(self, image: Tensor) -> Tensor:
        scores: Tensor = self.layers(image)
        return scores
