"""Eval mode for a while: each layer returns to its own mode."""

import pytest
from torch import nn

from distill.networks.modes import eval_mode


def test_each_layer_returns_to_its_own_mode_after_any_end():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4), nn.Dropout()))
    network[1].eval()
    network[2][0].eval()
    before = [layer.training for layer in network.modules()]
    with eval_mode(network):
        assert not any(layer.training for layer in network.modules())
    assert [layer.training for layer in network.modules()] == before
    with pytest.raises(RuntimeError, match="in between"), eval_mode(network):
        raise RuntimeError("in between")
    assert [layer.training for layer in network.modules()] == before
