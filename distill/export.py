"""Export of the student for use without this project."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
import yaml
from jsonargparse import ArgumentParser
from torch import Tensor, nn

import distill.networks.timm
import distill.networks.torch_module  # noqa: F401  # registers the networks' short names
from distill.errors import UserError
from distill.networks import Network
from distill.runs.checkpoints import read_checkpoint
from distill.training.loading import STUDENT
from distill.training.weight_averaging import WeightsChoice, evaluated_weights

Format = Literal["safetensors", "onnx", "torch"]


def load_student(ckpt_path: str | Path, weights: WeightsChoice | None = None) -> Network:
    """Rebuild the student of a checkpoint, with its weights, in eval mode; the teacher is not needed.

    Args:
        ckpt_path: the checkpoint.
        weights: `averaged` or `current` weights of a run with a weight average; by default the averaged ones, with a
            message.

    Raises:
        UserError: the checkpoint is missing, broken, or was not written by `distill fit`, or it has no averaged
            weights, which were asked for.
    """
    checkpoint = read_checkpoint(ckpt_path)
    if "distill_config" not in checkpoint:
        raise UserError(f"ckpt_path: {str(ckpt_path)!r} has no configuration; only `distill fit` writes one")
    config = yaml.safe_load(checkpoint["distill_config"])["model"]["student"]
    # The student's initial weights are not needed.
    for name, empty in (("pretrained", False), ("weights", None), ("drop_classifier", False)):
        if name in config["init_args"]:
            config["init_args"][name] = empty
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Network, "student")
    student: Network = parser.instantiate_classes(parser.parse_object({"student": config})).student
    student.build(checkpoint["distill"]["num_classes"], tuple(checkpoint["distill"]["image_shape"]))
    tensors = {
        name.removeprefix(STUDENT): tensor
        for name, tensor in evaluated_weights(checkpoint, weights, "weights").items()
        if name.startswith(STUDENT)
    }
    student.load_state_dict(tensors)
    return student.eval()


def export(student: Network, output: str | Path, format: Format = "safetensors") -> str:
    """Write a student to `output` and return Python code that loads it.

    Args:
        student: a built network.
        output: the file to write.
        format: see `distill export --help`.

    Raises:
        UserError: `output` exists, or a package that the format needs is not installed.
    """
    path = Path(output)
    if path.exists():
        raise UserError(f"output: {str(path)!r} exists and is not overwritten")
    path.parent.mkdir(parents=True, exist_ok=True)
    return _WRITERS[format](student, path)


class _Logits(nn.Module):
    """A network that returns only logits, for images in [0, 1]."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.network(image)["logits"]
        return logits


def _write_safetensors(student: Network, path: Path) -> str:
    from safetensors.torch import save_file

    weights = {name: tensor.contiguous().clone() for name, tensor in student.model.state_dict().items()}
    save_file(weights, path, metadata={"format": "pt"})
    return student.loading_code(str(path))


def _write_onnx(student: Network, path: Path) -> str:
    try:
        import onnxscript  # noqa: F401  # used by torch.onnx
    except ImportError:
        raise UserError("format: onnx needs the packages onnx and onnxscript: install distill[onnx]") from None
    image = torch.rand(2, *student.image_shape)
    torch.onnx.export(
        _Logits(student),
        (image,),
        str(path),
        dynamo=True,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes={"image": {0: torch.export.Dim("batch")}},
        external_data=False,
        verbose=False,
    )
    return (
        "import onnxruntime\n"
        f'session = onnxruntime.InferenceSession("{path}")\n'
        '(logits,) = session.run(None, {"image": image})  # image: float32 [B, C, H, W] in [0, 1]'
    )


def _write_torch(student: Network, path: Path) -> str:
    image = torch.rand(2, *student.image_shape)
    program = torch.export.export(_Logits(student), (image,), dynamic_shapes={"image": {0: torch.export.Dim("batch")}})
    torch.export.save(program, path)
    return (
        "import torch\n"
        f'network = torch.export.load("{path}").module()\n'
        "logits = network(image)  # image: float32 [B, C, H, W] in [0, 1]"
    )


_WRITERS: dict[str, Callable[[Network, Path], str]] = {
    "safetensors": _write_safetensors,
    "onnx": _write_onnx,
    "torch": _write_torch,
}
