"""Features, their shapes, and taps."""

import copy
import pickle

import pytest
import torch
from torch import nn

from distill.errors import UserError
from distill.features import Features, FeatureSpec, Taps, find_layer


def chain(**layers: nn.Module) -> nn.Sequential:
    network = nn.Sequential()
    for name, layer in layers.items():
        network.add_module(name, layer)
    return network


def test_features_are_read_by_name():
    features = Features(logits=torch.ones(2, 3), maps={"stem": torch.zeros(2, 4)})
    assert features["logits"] is features.logits
    assert features["stem"] is features.maps["stem"]


def test_a_feature_that_is_not_there_is_named_with_what_is():
    features = Features(logits=torch.ones(2, 3), maps={"stem": torch.zeros(2, 4)})
    with pytest.raises(UserError, match="gives no 'tokens': known are 'logits' and 'stem'"):
        features["tokens"]
    with pytest.raises(UserError, match="did you mean 'stem'"):
        FeatureSpec.of(features)["stm"]


def test_apply_reaches_every_tensor_and_keeps_the_grid():
    features = Features(torch.ones(2, 3), torch.ones(2, 4), torch.ones(2, 6, 4), (2, 3), {"stem": torch.ones(2, 5)})
    doubled = features.apply(lambda tensor: 2 * tensor)
    for name in ("logits", "embedding", "tokens", "stem"):
        assert torch.equal(doubled[name], 2 * features[name])
    assert doubled.grid == (2, 3)


def test_the_spec_has_the_shapes_without_the_batch():
    features = Features(torch.ones(2, 3), None, torch.ones(2, 6, 4), (2, 3), {"stem": torch.ones(2, 5, 7)})
    assert FeatureSpec.of(features) == FeatureSpec((3,), None, (6, 4), (2, 3), {"stem": (5, 7)})


def test_taps_give_outputs_and_inputs_of_the_pass():
    network = chain(first=nn.Linear(3, 4), last=nn.Linear(4, 2))
    image = torch.rand(5, 3)
    taps = Taps(network, outputs={"hidden": "first"}, inputs={"read": "last"})
    with taps as tensors:
        network(image)
    assert torch.equal(tensors["hidden"], network.first(image))
    assert torch.equal(tensors["read"], network.first(image))


def test_taps_keep_nothing_after_the_pass():
    network = chain(first=nn.Linear(3, 4))
    taps = Taps(network, outputs={"hidden": "first"})
    with taps:
        network(torch.rand(5, 3))
    assert not taps.tensors


def test_a_layer_that_runs_twice_gives_its_last_output():
    layer = nn.Linear(3, 3)
    network = nn.Sequential(layer, layer)
    image = torch.rand(5, 3)
    with Taps(network, outputs={"hidden": "0"}) as tensors:
        network(image)
    assert torch.equal(tensors["hidden"], layer(layer(image)))


def test_a_layer_that_is_not_there_is_named_with_near_matches():
    with pytest.raises(UserError, match="no layer 'frist' in Sequential: did you mean 'first'"):
        Taps(chain(first=nn.Linear(3, 4)), outputs={"hidden": "frist"})
    with pytest.raises(UserError, match="no layer ''"):
        find_layer(chain(first=nn.Linear(3, 4)), "")


def test_a_layer_that_returns_no_tensor_is_refused():
    network = chain(recurrent=nn.LSTM(3, 4))
    taps = Taps(network, outputs={"hidden": "recurrent"})
    with taps, pytest.raises(UserError, match="'recurrent' returns tuple, not a tensor: tap a layer inside it"):
        network(torch.rand(5, 3))


@pytest.mark.parametrize("overwriting", [nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True)])
def test_a_protected_tap_holds_what_its_layer_returned(overwriting):
    network = chain(first=nn.Linear(3, 4), overwriting=overwriting).eval()
    taps = Taps(network, outputs={"hidden": "first"})
    image = torch.randn(50, 3)
    with torch.no_grad(), taps:
        network(image)
        taps.protect()
    with taps as tensors:
        network.train()(image)
    assert torch.equal(tensors["hidden"], network.first(image))


def test_a_tap_that_nothing_overwrites_is_not_copied():
    network = chain(first=nn.Linear(3, 4), relu=nn.ReLU())
    taps = Taps(network, outputs={"hidden": "first"})
    outputs = []
    network.first.register_forward_hook(lambda layer, inputs, output: outputs.append(output))
    with taps:
        network(torch.randn(5, 3))
        taps.protect()
    with taps as tensors:
        network(torch.randn(5, 3))
    assert tensors["hidden"] is outputs[-1]


def test_taps_work_in_inference_mode():
    network = chain(first=nn.Linear(3, 4))
    with torch.inference_mode(), Taps(network, outputs={"hidden": "first"}) as tensors:
        output = network(torch.rand(5, 3))
    assert tensors["hidden"] is output


def test_protect_refuses_a_layer_that_takes_no_part():
    network = chain(first=nn.Linear(3, 4))
    network.first.register_module("unused", nn.Linear(2, 2))
    taps = Taps(network, outputs={"hidden": "first.unused"})
    with taps:
        network(torch.rand(5, 3))
        with pytest.raises(UserError, match="'first.unused' takes no part"):
            taps.protect()


def test_a_replaced_layer_is_read_under_its_name():
    network = chain(first=nn.Linear(3, 4), norm=nn.BatchNorm1d(4)).eval()
    taps = Taps(network, outputs={"normed": "norm"})
    network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    with taps as tensors:
        output = network(torch.rand(5, 3))
    assert isinstance(network.norm, nn.SyncBatchNorm)
    assert tensors["normed"] is output


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_writes_into_its_own_taps(copied):
    network = chain(first=nn.Linear(3, 4))
    taps = Taps(network, outputs={"hidden": "first"})
    other_network, other_taps = copied((network, taps))
    with taps as tensors, other_taps as other_tensors:
        other_network(torch.rand(5, 3))
    assert "hidden" in other_tensors
    assert "hidden" not in tensors
