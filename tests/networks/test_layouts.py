"""Outputs of tapped layers have their channels first, whatever the layout in which the layer gives them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from distill.__main__ import main
from distill.errors import UserError
from distill.features import Features
from distill.heads import AT, FSP, SP, ReviewKD
from distill.networks import Timm, TorchModule
from distill.networks.layouts import axes_that_move
from distill.networks.passes import other_sizes
from tests.program import TINY

SHAPE = (3, 64, 96)


def images(shape: tuple[int, int, int] = SHAPE) -> torch.Tensor:
    return torch.rand(2, *shape, generator=torch.Generator().manual_seed(1))


def built(name: str, shape: tuple[int, int, int] = SHAPE, **arguments) -> Timm:
    torch.manual_seed(0)
    network = Timm(name, **arguments)
    network.build(5, shape)
    return network.eval()


@given(
    channels=st.integers(1, 300),
    stride=st.sampled_from([1, 2, 4, 7, 8, 16, 32]),
    size=st.tuples(st.integers(32, 600), st.integers(32, 600)),
    number=st.integers(0, 2),
    order=st.permutations([1, 2, 3]),
)
def test_two_sizes_show_the_axes(channels, stride, size, number, order):
    other = other_sizes(*size)[number]
    # Equal growth does not show which axis holds the rows, nor do a few cells, whose numbers are rounded.
    assume(order.index(2) < order.index(3) or (number < 2 and min(size) >= 4 * stride))
    shapes = [(n, channels, math.ceil(h / stride), math.ceil(w / stride)) for n, (h, w) in ((2, size), (3, other))]
    given = [tuple(shape[axis] for axis in (0, *order)) for shape in shapes]
    axes = axes_that_move(given[0], given[1], (other[0] / size[0], other[1] / size[1]))
    assert axes is not None
    assert tuple(given[0][axis] for axis in axes) == shapes[0]


@pytest.mark.parametrize(
    ("shape", "other", "axes"),
    [
        ((2, 197, 64), (3, 393, 64), (0, 1, 2)),
        ((2, 64, 196), (3, 64, 392), (0, 2, 1)),
        ((2, 1, 64), (3, 1, 64), (0, 1, 2)),
        ((2, 64, 1), (3, 64, 1), (0, 2, 1)),
        ((2, 64, 1, 1), (3, 64, 1, 1), (0, 1, 2, 3)),
        ((2, 1, 1, 64), (3, 1, 1, 64), (0, 3, 1, 2)),
        ((2, 64, 7, 1), (3, 64, 9, 1), (0, 1, 2, 3)),
        ((2, 1, 7, 7), (3, 1, 9, 11), (0, 1, 2, 3)),
        ((2, 3, 197, 197), (3, 3, 393, 393), (0, 1, 2, 3)),
        ((2, 8, 64), (3, 8, 64), None),
        ((2, 64, 7, 7), (3, 64, 7, 7), None),
        ((2, 16, 49, 32), (3, 24, 49, 32), None),
        ((2, 4, 5), (3, 8, 9), None),
        ((32, 49, 64), (96, 49, 64), None),
    ],
)
def test_what_the_sizes_show(shape, other, axes):
    assert axes_that_move(shape, other, (2, 3)) == axes


SMALL_SWIN = {"depths": (1, 2, 1), "embed_dim": 24, "num_heads": (1, 2, 4), "window_size": 4}

FAMILIES = {  # name -> size, options and taps
    "swin_tiny_patch4_window7_224": ((3, 64, 96), SMALL_SWIN),
    "test_mambaout": ((3, 64, 96), {}),
    "test_convnext": ((3, 64, 96), {}),
    "test_resnet": ((3, 32, 32), {}),
}
SLOW_FAMILIES = {
    "swinv2_tiny_window8_256": ((3, 64, 96), SMALL_SWIN),
    "swinv2_cr_tiny_224": ((3, 224, 224), {}),
    "sequencer2d_s": ((3, 64, 96), {"layers": (1, 1, 1, 1)}),
    "sam2_hiera_tiny": ((3, 128, 128), {}),
    "nest_tiny": ((3, 64, 64), {}),
    "gcvit_xxtiny": ((3, 128, 192), {}),
    "focalnet_tiny_srf": ((3, 64, 96), {}),
    "davit_tiny": ((3, 64, 96), {}),
    "test_maxvit": ((3, 64, 96), {}),
    "test_coatnet": ((3, 64, 96), {}),
    "test_efficientnet": ((3, 64, 96), {}),
    "edgenext_xx_small": ((3, 64, 96), {}),
    "pvt_v2_b0": ((3, 64, 96), {}),
    "poolformer_s12": ((3, 64, 96), {}),
    "efficientformerv2_s0": ((3, 64, 96), {}),
    "fastvit_t8": ((3, 64, 96), {}),
    "inception_next_atto": ((3, 64, 96), {}),
    "mobilenetv3_small_050": ((3, 64, 96), {}),
    "regnetx_002": ((3, 64, 96), {}),
    "resnetv2_18": ((3, 64, 96), {}),
    "vgg11": ((3, 64, 96), {}),
}


@pytest.mark.parametrize("name", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_FAMILIES)])
def test_the_maps_of_a_family_are_those_that_timm_gives_channels_first(name):
    shape, options = (FAMILIES | SLOW_FAMILIES)[name]
    bare = built(name, shape, options=options).model
    features = [info for info in bare.feature_info if info["module"] in dict(bare.named_modules())]
    network = built(name, shape, options=options, taps=[info["module"] for info in features])
    with torch.no_grad():
        maps = network(images(shape)).maps
        prepared = network.prepare(images(shape))
        ours = network.model.forward_intermediates(prepared, intermediates_only=True)
    assert features
    equal = 0
    for info in features:
        tensor = maps[info["module"]]
        assert network.spec.maps[info["module"]] == tensor.shape[1:]
        assert tensor.shape[1] == info["num_chs"]
        for cells, side in zip(tensor.shape[2:], shape[1:], strict=True):
            assert abs(cells * info["reduction"] - side) < info["reduction"]
        equal += any(other.shape == tensor.shape and torch.allclose(other, tensor, atol=1e-5) for other in ours)
    assert equal >= len(features) - 1  # some families normalize the last one


TOKENS = {"test_vit": ["blocks.0", "blocks.0.attn"]}
SLOW_TOKENS = {
    "deit_tiny_distilled_patch16_224": ["blocks.3"],
    "mixer_s32_224": ["blocks.0", "blocks.0.mlp_tokens"],  # the latter gives [B, d, N]
    "levit_128s": ["stages.0", "stages.2"],
    "pit_ti_224": ["transformers.0.blocks"],
    "hiera_tiny_224": ["blocks.0", "blocks.11"],
    "cait_xxs24_224": ["blocks.0", "blocks_token_only.0"],
    "twins_svt_small": ["blocks.0.0"],
    "mvitv2_tiny": ["stages.0.blocks.0.norm1"],
}


@pytest.mark.parametrize("name", [*TOKENS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_TOKENS)])
def test_sequences_have_their_channels_last(name):
    layers = (TOKENS | SLOW_TOKENS)[name]
    network = built(name, (3, 224, 224), taps=layers)
    widths = {module.weight.shape[0] for module in network.modules() if getattr(module, "weight", None) is not None}
    for layer in layers:
        length, width = network.spec.maps[layer]
        assert width in widths
        assert width != length


def test_a_layer_within_a_channels_last_family_that_gives_channels_first_stays_so():
    taps = {"first": "patch_embed.proj", "last": "patch_embed", "block": "layers.1.blocks.1"}
    network = built("swin_tiny_patch4_window7_224", taps=taps, options=SMALL_SWIN)
    maps = network(images()).maps
    assert network.spec.maps == {"first": (24, 16, 24), "last": (24, 16, 24), "block": (48, 8, 12)}
    assert torch.allclose(maps["last"], network.model.patch_embed.norm(maps["first"].movedim(1, -1)).movedim(-1, 1))


class Raw(nn.Module):
    """Swin's own pass up to a stage."""

    def __init__(self, network: Timm, stage: int) -> None:
        super().__init__()
        self.network, self.stage = network, stage

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        model = self.network.model
        x = model.patch_embed(self.network.prepare(image))
        for stage in model.layers[: self.stage + 1]:
            x = stage(x)
        return x.permute(0, 3, 1, 2).contiguous()


@pytest.mark.parametrize(
    "make", [lambda: AT(["mid"]), lambda: SP("mid"), lambda: FSP(["early", "mid"]), lambda: ReviewKD(["early", "mid"])]
)
def test_a_heads_value_is_that_of_the_permuted_outputs(make):
    student, teacher = (
        built("swin_tiny_patch4_window7_224", taps={"early": "layers.0", "mid": "layers.1"}, options=options)
        for options in (SMALL_SWIN, {**SMALL_SWIN, "depths": (2, 1, 1)})
    )
    image = images()

    def value(read) -> torch.Tensor:
        torch.manual_seed(0)
        head = make()
        head.build(student.spec, teacher.spec)
        return head(read(student), read(teacher), {"image": image})

    def permuted(network: Timm) -> Features:
        return Features(maps={"early": Raw(network, 0)(image), "mid": Raw(network, 1)(image)})

    with torch.no_grad():
        assert value(permuted).isfinite()
        torch.testing.assert_close(value(lambda network: network(image)), value(permuted))


def test_check_shows_the_map_with_its_channels_first(capsys):
    student = ["--model.student.name=test_mambaout", "--model.student.taps={mid: stages.1}"]
    assert main(["check", *TINY, *student]) == 0
    shape = built("test_mambaout", (3, 32, 32), taps={"mid": "stages.1"}).spec.maps["mid"]
    assert shape == (32, 4, 4)
    assert " 32 x 4 x 4 " in next(line for line in capsys.readouterr().out.splitlines() if "tap mid" in line)


def torchvision(name: str) -> nn.Module:
    from torchvision import models

    torch.manual_seed(0)
    match name:
        case "swin":
            return models.SwinTransformer([4, 4], 16, [1, 1], [1, 2], [4, 4], num_classes=5)
        case "vit":
            return models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5)
        case "maxvit":
            return models.MaxVit((64, 64), 8, 4, [8, 16], [1, 1], 8, 0.0, num_classes=5)
        case "convnext":
            block = models.convnext.CNBlockConfig
            return models.ConvNeXt([block(8, 16, 1), block(16, None, 1)], num_classes=5)
    raise ValueError(name)


@pytest.mark.parametrize(
    ("name", "size", "maps"),
    [
        ("swin", (64, 96), {"features.1": (16, 16, 24), "features.3": (32, 8, 12), "features.0.0": (16, 16, 24)}),
        ("convnext", (64, 96), {"features.1": (8, 16, 24), "features.1.0.block.3": (32, 16, 24)}),
        ("maxvit", (64, 64), {"stem": (8, 32, 32), "blocks.0": (8, 16, 16), "blocks.1": (16, 8, 8)}),
        ("vit", (32, 32), {"encoder.layers.encoder_layer_0": (17, 16), "conv_proj": (16, 4, 4)}),
    ],
)
def test_torchvisions_networks_are_read_rightly(name, size, maps):
    network = TorchModule(torchvision(name), taps=list(maps))
    network.build(5, (3, *size))
    assert network.spec.maps == maps


class Last(nn.Module):
    """A net whose map has its channels last, of one size or of all."""

    def __init__(self, fixed: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 4, stride=4)
        self.move = Permute()
        self.mix = nn.Linear(6, 6)
        self.position = nn.Parameter(torch.rand(16, 24, 6)) if fixed else None
        self.place = nn.Identity()
        self.head = nn.Linear(6, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.move(self.stem(image))
        x = self.place(x if self.position is None else x + self.position)
        return self.head(self.mix(x).mean((1, 2)))


class Permute(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 2, 3, 1)


def of(module: nn.Module, shape: tuple[int, int, int] = SHAPE, **arguments) -> TorchModule:
    torch.manual_seed(0)
    network = TorchModule(module, **arguments)
    network.build(5, shape)
    return network.eval()


def test_tokens_and_embedding_of_a_channels_last_layer_are_read_rightly():
    network = of(Last(fixed=False), tokens="mix", embedding="mix", taps={"mid": "mix"})
    features = network(images())
    raw = network.model.mix(network.model.move(network.model.stem(images())))
    assert features.grid == (16, 24)
    assert torch.equal(features.tokens, raw.flatten(1, 2))
    torch.testing.assert_close(features.embedding, raw.mean((1, 2)))
    assert torch.equal(features.maps["mid"], raw.permute(0, 3, 1, 2))


def test_a_network_of_one_size_needs_the_layout_where_nothing_shows_it():
    sentence = r"do not show the axes of 'mid', \[2, 16, 24, 6\] of layer 'mix': give layout: \{mid: NCHW\} or NHWC"
    with pytest.raises(UserError, match=sentence):
        of(Last(fixed=True), taps={"mid": "mix"})
    for layout in ("NHWC", {"mid": "NHWC"}):
        assert of(Last(fixed=True), taps={"mid": "mix"}, layout=layout).spec.maps == {"mid": (6, 16, 24)}
    mixed = of(Last(fixed=True), taps={"mid": "mix", "first": "stem"}, layout="NHWC")  # what the passes show counts
    assert mixed.spec.maps == {"mid": (6, 16, 24), "first": (6, 16, 24)}


@pytest.mark.parametrize(
    ("layout", "sentence"),
    [
        ({"mid": "NCHW"}, r"layout: 'mid' is not NCHW: in \[2, 16, 24, 6\] of layer 'mix', axis 1 changes"),
        ({"mid": "NLC"}, r"layout: 'mid' cannot be NLC, layer 'mix' gives \[2, 16, 24, 6\]"),
        ({"mdi": "NHWC"}, "layout: there is no tap 'mdi': did you mean 'mid'"),
    ],
)
def test_a_layout_that_is_wrong_is_refused(layout, sentence):
    with pytest.raises(UserError, match=sentence):
        of(Last(fixed=False), taps={"mid": "mix"}, layout=layout)


def test_windows_folded_into_the_batch_are_refused():
    with pytest.raises(UserError, match=r"'layers.1.blocks.0.attn' gives .* first axis is not the images"):
        built("swin_tiny_patch4_window7_224", taps=["layers.1.blocks.0.attn"], options=SMALL_SWIN)


class Conditional(nn.Module):
    """A net whose pass depends on its values, and that keeps what it has computed for a size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 4, stride=4)
        self.head = nn.Linear(6, 5)
        self.kept: dict[str, torch.Tensor] = {}

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.kept["size"] = torch.ones(image.shape[-2:])
        x = self.stem(image) if float(image.mean()) > -1 else self.stem(image[..., :1])
        return self.head(x.mean((2, 3)) * self.kept["size"].mean())


def test_a_pass_that_depends_on_values_is_run_with_data_and_leaves_no_trace():
    network = of(Conditional(), taps={"mid": "stem"})
    assert network.spec.maps == {"mid": (6, 16, 24)}
    assert network.model.kept["size"].shape == SHAPE[1:]
    assert network(images()).logits.isfinite().all()


def test_finding_layouts_draws_nothing_from_the_global_generator():
    def drawn(**arguments) -> torch.Tensor:
        built("swin_tiny_patch4_window7_224", options=SMALL_SWIN, **arguments)
        return torch.rand(1)

    assert torch.equal(drawn(), drawn(taps=["layers.1"]))
