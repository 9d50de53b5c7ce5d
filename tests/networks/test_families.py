"""What is promised of every family of timm, and of those of the CRD benchmark."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.features import Features
from distill.networks import Timm

QUICK = (
    "test_byobnet",
    "test_convnext",
    "test_efficientnet",
    "test_mambaout",
    "test_maxvit",
    "test_nfnet",
    "test_resnet",
    "test_vit",
    "deit_tiny_distilled_patch16_224",
    "mobilenetv2_half_cifar",
    "resnet8_cifar",
    "wrn_16_1_cifar",
)

SLOW = (
    "test_vit_relpos",
    "levit_128s",
    "pit_ti_224",
    "resnetv2_18",
    "shufflenetv1_cifar",
    "shufflenetv2_cifar",
    "vgg8_cifar",
    "beit_base_patch16_224",
    "cait_xxs24_224",
    "coat_tiny",
    "convit_tiny",
    "convmixer_768_32",
    "convnext_atto",
    "cpubone_nano",
    "crossvit_tiny_240",
    "cs3darknet_focus_s",
    "cspnext_tiny",
    "davit_tiny",
    "deit_tiny_patch16_224",
    "densenet121",
    "dla46x_c",
    "dpn48b",
    "edgenext_xx_small",
    "efficientformer_l1",
    "efficientformerv2_s0",
    "efficientnet_b0",
    "efficientvim_m1",
    "efficientvit_b0",
    "efficientvit_m0",
    "eva02_tiny_patch14_224",
    "fasternet_t0",
    "fastvit_t8",
    "focalnet_tiny_srf",
    "gcvit_xxtiny",
    "ghostnet_050",
    "gmlp_ti16_224",
    "halonet_h1",
    "hardcorenas_b",
    "hgnetv2_b0",
    "hiera_tiny_224",
    "hrnet_w18_small",
    "iformer_t",
    "inception_next_atto",
    "inception_v3",
    "lcnetv2_small",
    "legacy_seresnet18",
    "levit_conv_128s",
    "lowformer_b0",
    "mixer_s32_224",
    "mobilenetv3_small_050",
    "mobilenetv4_conv_small_035",
    "mobilevit_xxs",
    "mvitv2_tiny",
    "naflexvit_base_patch16_gap",
    "nest_tiny",
    "nextvit_small",
    "pit_ti_distilled_224",
    "poolformer_s12",
    "pvt_v2_b0",
    "rdnet_tiny",
    "regnetx_002",
    "repghostnet_050",
    "repvit_m1",
    "res2net50_14w_8s",
    "resmlp_12_224",
    "resnest14d",
    "resnet18",
    "rexnet_100",
    "samvit_base_patch16_224",
    "selecsls42",
    "sequencer2d_s",
    "shvit_s1",
    "skresnet18",
    "starnet_s050",
    "swiftformer_xs",
    "swin_tiny_patch4_window7_224",
    "swinv2_cr_tiny_224",
    "swinv2_tiny_window8_256",
    "test_coatnet",
    "tiny_vit_5m_224",
    "tnt_s_legacy_patch16_224",
    "tresnet_m",
    "twins_svt_small",
    "vgg11",
    "visformer_tiny",
    "vit_tiny_patch16_224",
    "vit_tiny_patch16_dinov3_qkvb",
    "vit_tiny_r_s16_p8_224",
    "vitamin_small_224",
    "volo_d1_224",
    "ese_vovnet19b_slim_dw",
    "xception41p",
    "xcit_nano_12_p8_224",
)

OWN_SIZE = {"efficientformer_l1": 224, "halonet_h1": 256, "inception_v3": 299}
"""Families that take no images of the size used here."""

SQUARE = {"convit_tiny", "efficientformer_l1", "halonet_h1", "inception_v3", "nest_tiny"}
"""Families that take square images only."""


MIXED = {
    "convmixer_768_32",
    "cpubone_nano",
    "levit_128s",
    "levit_conv_128s",
    "lowformer_b0",
    "shvit_s1",
    "tiny_vit_5m_224",
}
"""Families that, with random weights, spread a change over the whole image."""


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_family_gives_all_features(name: str) -> None:
    network = build(name, num_classes=7)
    image = torch.rand(2, *network.image_shape, generator=torch.Generator().manual_seed(1))
    model = network.model
    with torch.no_grad():
        features = network(image)
        prepared = network.prepare(image)
        torch.testing.assert_close(features.logits, model(prepared), rtol=1e-5, atol=1e-5)
        check_embedding(model, prepared, features)
        if name in MIXED:
            check_tokens_against_timm(model, prepared, features)
        else:
            check_tokens(network, image, features)
    check_train_mode(network, image)
    assert set(network.state_dict()) == {f"model.{key}" for key in model.state_dict()}
    assert build(name, num_classes=4).spec.logits == (4,)


def build(name: str, num_classes: int) -> Timm:
    torch.manual_seed(0)
    network = Timm(name, image_size=OWN_SIZE.get(name))
    network.build(num_classes, (3, 128, 128) if name in SQUARE else (3, 128, 192))
    return network.eval()


def check_embedding(model: Any, prepared: Tensor, features: Features) -> None:
    """It is what timm calls the features before the logits, and a linear classifier makes the logits of it."""
    assert features.embedding is not None
    before_logits = model.forward_head(model.forward_features(prepared), pre_logits=True)
    torch.testing.assert_close(features.embedding, before_logits.flatten(1), rtol=1e-5, atol=1e-5)
    beside_others = getattr(model, "aux_head", None) is not None  # volo adds what each token votes for
    if isinstance(classifier := model.get_classifier(), nn.Linear) and not beside_others:
        torch.testing.assert_close(classifier(features.embedding), features.logits, rtol=1e-5, atol=1e-5)


def check_tokens(network: Timm, image: Tensor, features: Features) -> None:
    """What changes on one side of a wide image changes the tokens of that side more than what changes opposite."""
    assert features.tokens is not None
    assert features.grid is not None
    height, width = features.grid
    assert features.tokens.shape[1] == height * width
    rows, columns = image.shape[-2] // 4, image.shape[-1] // 4

    def center(*changed: slice) -> Tensor:
        """Where the tokens change, as (row, column), if these pixels change."""
        other = image.clone()
        other[:, :, *changed] = 1 - other[:, :, *changed]
        tokens = network(other).tokens
        assert tokens is not None
        assert features.tokens is not None
        change = (tokens - features.tokens).double().norm(dim=-1).mean(0).view(height, width)
        change = change / change.sum()
        return torch.stack([(change.sum(1) * torch.arange(height)).sum(), (change.sum(0) * torch.arange(width)).sum()])

    everywhere = slice(None)
    assert height == 1 or center(slice(-rows, None), everywhere)[0] > center(slice(rows), everywhere)[0]
    assert width == 1 or center(everywhere, slice(-columns, None))[1] > center(everywhere, slice(columns))[1]


def check_tokens_against_timm(model: Any, prepared: Tensor, features: Features) -> None:
    """They are the cells of the last map that timm gives by another way."""
    last = model.forward_intermediates(prepared, indices=1, norm=True, intermediates_only=True)[-1]
    assert features.tokens is not None
    assert features.grid == tuple(last.shape[-2:])
    torch.testing.assert_close(features.tokens[:, -1], last[:, :, -1, -1])
    torch.testing.assert_close(features.tokens[:, features.grid[1] - 1], last[:, :, 0, -1])


def check_train_mode(network: Timm, image: Tensor) -> None:
    """Tokens and embedding reach the first layer, and each BatchNorm is updated once."""
    network.train()
    norms = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)]
    before = [int(norm.num_batches_tracked) for norm in norms]
    features = network(image)
    assert [int(norm.num_batches_tracked) for norm in norms] == [count + 1 for count in before]
    assert isinstance(features.logits, Tensor)
    assert features.logits.shape == (2, 7)
    first = next(layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)).weight
    for tensor in (features.tokens, features.embedding):
        direction = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(2))
        (gradient,) = torch.autograd.grad((tensor * direction).sum(), first, retain_graph=True)
        assert gradient.isfinite().all()
        assert gradient.any()
