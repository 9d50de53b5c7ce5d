"""The networks of the CRD benchmark, written out as functions of a checkpoint under that benchmark's own names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Seen:
    """What the benchmark reads: stem, stages and embedding, the stages' pre-activations, and the logits."""

    features: list[Tensor]
    pre_activations: list[Tensor]
    logits: Tensor


class Checkpoint(dict[str, Tensor]):
    """Tensors by name, drawn when first asked for: one pass of a network makes its checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(5)

    def drawn(self, name: str, shape: tuple[int, ...], scale: float, offset: float = 0.0) -> Tensor:
        if name not in self:
            self[name] = offset + scale * torch.randn(shape, generator=self.generator)
        assert self[name].shape == shape
        return self[name].double()

    def conv(self, x: Tensor, name: str, out: int, kernel: int, stride: int = 1, groups: int = 1) -> Tensor:
        fan_in = x.shape[1] // groups * kernel**2
        weight = self.drawn(f"{name}.weight", (out, x.shape[1] // groups, kernel, kernel), (2 / fan_in) ** 0.5)
        return F.conv2d(x, weight, None, stride, kernel // 2, 1, groups)

    def bn(self, x: Tensor, name: str) -> Tensor:
        d = (x.shape[1],)
        weight, bias = self.drawn(f"{name}.weight", d, 0.1, 1.0), self.drawn(f"{name}.bias", d, 0.1)
        mean, var = self.drawn(f"{name}.running_mean", d, 0.1), self.drawn(f"{name}.running_var", d, 0.05, 1.0)
        self[f"{name}.num_batches_tracked"] = torch.tensor(7)
        mean, var, weight, bias = (tensor.view(1, -1, 1, 1) for tensor in (mean, var, weight, bias))
        return (x - mean) / torch.sqrt(var + 1e-5) * weight + bias

    def linear(self, x: Tensor, name: str, out: int = 100) -> Tensor:
        weight = self.drawn(f"{name}.weight", (out, x.shape[1]), x.shape[1] ** -0.5)
        return x @ weight.T + self.drawn(f"{name}.bias", (out,), 0.1)


def mean(x: Tensor) -> Tensor:
    return x.sum((2, 3)) / (x.shape[2] * x.shape[3])


def relu(x: Tensor) -> Tensor:
    return x * (x > 0)


def shuffle(x: Tensor, groups: int) -> Tensor:
    per_group = x.shape[1] // groups
    return x[:, [group * per_group + place for place in range(per_group) for group in range(groups)]]


def resnet(c: Checkpoint, x: Tensor, blocks: int, widths: tuple[int, ...]) -> Seen:
    x = relu(c.bn(c.conv(x, "conv1", widths[0], 3), "bn1"))
    features, pre_activations = [x], []
    for i in (1, 2, 3):
        for j in range(blocks):
            name, stride = f"layer{i}.{j}", 2 if i > 1 and j == 0 else 1
            y = relu(c.bn(c.conv(x, f"{name}.conv1", widths[i], 3, stride), f"{name}.bn1"))
            y = c.bn(c.conv(y, f"{name}.conv2", widths[i], 3), f"{name}.bn2")
            if stride == 2 or x.shape[1] != widths[i]:
                x = c.bn(c.conv(x, f"{name}.downsample.0", widths[i], 1, stride), f"{name}.downsample.1")
            before = x + y
            x = relu(before)
        features.append(x)
        pre_activations.append(before)
    features.append(mean(x))
    return Seen(features, pre_activations, c.linear(features[-1], "fc"))


def resnet18(c: Checkpoint, x: Tensor, classes: int = 100) -> Seen:
    x = relu(c.bn(c.conv(x, "conv1", 64, 3), "bn1"))
    features, pre_activations = [x], []
    for i, width in enumerate([64, 128, 256, 512], 1):
        for j in range(2):
            name, stride = f"layer{i}.{j}", 2 if i > 1 and j == 0 else 1
            y = relu(c.bn(c.conv(x, f"{name}.conv1", width, 3, stride), f"{name}.bn1"))
            y = c.bn(c.conv(y, f"{name}.conv2", width, 3), f"{name}.bn2")
            if i > 1 and j == 0:
                x = c.bn(c.conv(x, f"{name}.shortcut.0", width, 1, stride), f"{name}.shortcut.1")
            before = x + y
            x = relu(before)
        features.append(x)
        pre_activations.append(before)
    features.append(mean(x))
    return Seen(features, pre_activations, c.linear(features[-1], "linear", classes))


def resnet50(c: Checkpoint, x: Tensor) -> Seen:
    x = relu(c.bn(c.conv(x, "conv1", 64, 3), "bn1"))
    features, pre_activations = [x], []
    for i, (blocks, width) in enumerate([(3, 64), (4, 128), (6, 256), (3, 512)], 1):
        for j in range(blocks):
            name, stride = f"layer{i}.{j}", 2 if i > 1 and j == 0 else 1
            y = relu(c.bn(c.conv(x, f"{name}.conv1", width, 1), f"{name}.bn1"))
            y = relu(c.bn(c.conv(y, f"{name}.conv2", width, 3, stride), f"{name}.bn2"))
            y = c.bn(c.conv(y, f"{name}.conv3", width * 4, 1), f"{name}.bn3")
            if j == 0:
                x = c.bn(c.conv(x, f"{name}.shortcut.0", width * 4, 1, stride), f"{name}.shortcut.1")
            before = x + y
            x = relu(before)
        features.append(x)
        pre_activations.append(before)
    features.append(mean(x))
    return Seen(features, pre_activations, c.linear(features[-1], "linear"))


def wrn(c: Checkpoint, x: Tensor, blocks: int, factor: int) -> Seen:
    x = c.conv(x, "conv1", 16, 3)
    features, pre_activations = [x], []
    for i, width in enumerate([16 * factor, 32 * factor, 64 * factor], 1):
        for j in range(blocks):
            name, stride = f"block{i}.layer.{j}", 2 if i > 1 and j == 0 else 1
            normed = c.bn(x, f"{name}.bn1")
            if i > 1 and j == 0:
                pre_activations.append(normed)
            y = c.conv(relu(normed), f"{name}.conv1", width, 3, stride)
            y = c.conv(relu(c.bn(y, f"{name}.bn2")), f"{name}.conv2", width, 3)
            if x.shape[1] != width:
                x = c.conv(relu(normed), f"{name}.convShortcut", width, 1, stride)
            x = x + y
        features.append(x)
    pre_activations.append(c.bn(x, "bn1"))
    features.append(mean(relu(pre_activations[-1])))
    return Seen(features, pre_activations, c.linear(features[-1], "fc"))


def vgg(c: Checkpoint, x: Tensor, counts: tuple[int, ...]) -> Seen:
    features, pre_activations = [], []
    for i, (count, width) in enumerate(zip(counts, (64, 128, 256, 512, 512), strict=True)):
        if i in (1, 2, 3):
            x = F.max_pool2d(x, 2)
        for j in range(count):
            x = c.conv(x, f"block{i}.{3 * j}", width, 3)
            x = x + c.drawn(f"block{i}.{3 * j}.bias", (width,), 0.1).view(1, -1, 1, 1)
            before = c.bn(x, f"block{i}.{3 * j + 1}")
            x = relu(before)
        features.append(x)
        pre_activations.append(before)
    features.append(mean(x))
    return Seen(features, pre_activations[1:], c.linear(features[-1], "classifier"))


def mobilenetv2(c: Checkpoint, x: Tensor) -> Seen:
    x = relu(c.bn(c.conv(x, "conv1.0", 16, 3, 2), "conv1.1"))
    features = [x]
    rows = [(1, 8, 1, 1), (6, 12, 2, 1), (6, 16, 3, 2), (6, 32, 4, 2), (6, 48, 3, 1), (6, 80, 3, 2), (6, 160, 1, 1)]
    for i, (expansion, out, count, first_stride) in enumerate(rows):
        for j in range(count):
            name, stride, wide = f"blocks.{i}.{j}.conv", first_stride if j == 0 else 1, x.shape[1] * expansion
            y = relu(c.bn(c.conv(x, f"{name}.0", wide, 1), f"{name}.1"))
            y = relu(c.bn(c.conv(y, f"{name}.3", wide, 3, stride, wide), f"{name}.4"))
            y = c.bn(c.conv(y, f"{name}.6", out, 1), f"{name}.7")
            x = x + y if j > 0 else y
        if i in (1, 2, 4, 6):
            features.append(x)
    x = relu(c.bn(c.conv(x, "conv2.0", 1280, 1), "conv2.1"))
    features.append(mean(x))
    return Seen(features, features[1:-1], c.linear(features[-1], "classifier.0"))


def shufflenetv1(c: Checkpoint, x: Tensor) -> Seen:
    x = relu(c.bn(c.conv(x, "conv1", 24, 1), "bn1"))
    features, pre_activations = [x], []
    for i, (out, count) in enumerate([(240, 4), (480, 8), (960, 4)], 1):
        for j in range(count):
            name, groups = f"layer{i}.{j}", 1 if i == 1 and j == 0 else 3
            made = out - x.shape[1] if j == 0 else out
            y = relu(c.bn(c.conv(x, f"{name}.conv1", made // 4, 1, 1, groups), f"{name}.bn1"))
            y = c.conv(shuffle(y, groups), f"{name}.conv2", made // 4, 3, 2 if j == 0 else 1, made // 4)
            y = c.conv(relu(c.bn(y, f"{name}.bn2")), f"{name}.conv3", made, 1, 1, 3)
            y = c.bn(y, f"{name}.bn3")
            before = torch.cat([y, F.avg_pool2d(x, 3, 2, 1)], 1) if j == 0 else x + y
            x = relu(before)
        features.append(x)
        pre_activations.append(before)
    features.append(mean(x))
    return Seen(features, pre_activations, c.linear(features[-1], "linear"))


def shufflenetv2(c: Checkpoint, x: Tensor) -> Seen:
    x = relu(c.bn(c.conv(x, "conv1", 24, 1), "bn1"))
    features, pre_activations = [x], []
    for i, (out, count) in enumerate([(116, 4), (232, 8), (464, 4)], 1):
        half = out // 2
        for j in range(count):
            name, d = f"layer{i}.{j}", x.shape[1]
            if j == 0:
                left = c.bn(c.conv(x, f"{name}.conv1", d, 3, 2, d), f"{name}.bn1")
                left = c.bn(c.conv(left, f"{name}.conv2", half, 1), f"{name}.bn2")
                right = relu(c.bn(c.conv(x, f"{name}.conv3", half, 1), f"{name}.bn3"))
                right = c.bn(c.conv(right, f"{name}.conv4", half, 3, 2, half), f"{name}.bn4")
                right = c.bn(c.conv(right, f"{name}.conv5", half, 1), f"{name}.bn5")
                x = shuffle(torch.cat([relu(left), relu(right)], 1), 2)
            else:
                kept, changed = x[:, :half], x[:, half:]
                changed = relu(c.bn(c.conv(changed, f"{name}.conv1", half, 1), f"{name}.bn1"))
                changed = c.bn(c.conv(changed, f"{name}.conv2", half, 3, 1, half), f"{name}.bn2")
                changed = c.bn(c.conv(changed, f"{name}.conv3", half, 1), f"{name}.bn3")
                before = torch.cat([kept, changed], 1)
                x = shuffle(torch.cat([kept, relu(changed)], 1), 2)
        features.append(x)
        pre_activations.append(before)
    x = relu(c.bn(c.conv(x, "conv2", 1024, 1), "bn2"))
    features.append(mean(x))
    return Seen(features, pre_activations, c.linear(features[-1], "linear"))


NARROW, FOUR = (16, 16, 32, 64), (32, 64, 128, 256)

REFERENCES: dict[str, Callable[[Checkpoint, Tensor], Seen]] = {
    "resnet8_cifar": lambda c, x: resnet(c, x, 1, NARROW),
    "resnet20_cifar": lambda c, x: resnet(c, x, 3, NARROW),
    "resnet8x4_cifar": lambda c, x: resnet(c, x, 1, FOUR),
    "resnet32x4_cifar": lambda c, x: resnet(c, x, 5, FOUR),
    "resnet18_cifar": resnet18,
    "resnet50_cifar": resnet50,
    "wrn_16_1_cifar": lambda c, x: wrn(c, x, 2, 1),
    "wrn_16_2_cifar": lambda c, x: wrn(c, x, 2, 2),
    "wrn_40_2_cifar": lambda c, x: wrn(c, x, 6, 2),
    "vgg8_cifar": lambda c, x: vgg(c, x, (1, 1, 1, 1, 1)),
    "vgg13_cifar": lambda c, x: vgg(c, x, (2, 2, 2, 2, 2)),
    "vgg19_cifar": lambda c, x: vgg(c, x, (2, 2, 4, 4, 4)),
    "mobilenetv2_half_cifar": mobilenetv2,
    "shufflenetv1_cifar": shufflenetv1,
    "shufflenetv2_cifar": shufflenetv2,
}
