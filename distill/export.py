"""Export of the student for use without this project."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import torch
import yaml
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from distill.errors import UserError
from distill.given import require_no_objects
from distill.networks import Network, TorchModule
from distill.runs.checkpoints import read_checkpoint
from distill.training.loading import STUDENT
from distill.training.weight_averaging import WeightsChoice, evaluated_weights

Format = Literal["safetensors", "onnx", "torch"]


def load_student(
    ckpt_path: str | Path, *, weights: WeightsChoice | None = None, student: nn.Module | None = None
) -> Network:
    """Rebuild the student of a checkpoint, with its weights, in eval mode; the teacher is not needed.

    Args:
        ckpt_path: a checkpoint.
        weights: `averaged` or `current` weights of a run with a weight average; by default the averaged ones, with a
            message.
        student: a module like the one that the run was given as an object, or a network of `distill.networks`; its
            weights are overwritten. A run whose configuration says its student needs none.

    Raises:
        UserError: the checkpoint is missing, broken, or does not say its student, or its weights do not fit `student`.
    """
    checkpoint = read_checkpoint(ckpt_path)
    network = student if isinstance(student, Network) else _configured(checkpoint, str(ckpt_path), student)
    network.build(checkpoint["distill"]["num_classes"], tuple(checkpoint["distill"]["image_shape"]))
    network.restore_facts(checkpoint["distill"].get("student", {}))
    tensors = {
        name.removeprefix(STUDENT): tensor
        for name, tensor in evaluated_weights(checkpoint, weights, "weights").items()
        if name.startswith(STUDENT)
    }
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        if student is None:
            raise
        reason = " ".join(line.strip() for line in str(error).splitlines()[1:2])
        raise UserError(f"student: {network.name} does not fit the weights of {str(ckpt_path)!r} ({reason})") from None
    return network.eval()


def _configured(checkpoint: dict[str, Any], path: str, module: nn.Module | None) -> Network:
    """Return the network of a checkpoint's configuration, around `module` if it is given."""
    if "distill_config" not in checkpoint:
        if module is not None:
            return TorchModule(module)
        raise UserError(
            f"ckpt_path: {path!r} has no configuration; only `distill fit` writes one: give the student, as in "
            "load_student(path, student=network)"
        )
    config = yaml.safe_load(checkpoint["distill_config"])["model"]["student"]
    # The student's initial weights are not needed.
    for name, empty in (("pretrained", False), ("weights", None), ("drop_classifier", False)):
        if name in config["init_args"]:
            config["init_args"][name] = empty
    if module is not None:
        if "module" not in config["init_args"]:
            raise UserError(
                f"student: {path!r} says itself what its student is ({config['class_path']}): leave the module out"
            )
        config["init_args"]["module"] = module
    require_no_objects(config)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Network, "student")
    network: Network = parser.instantiate_classes(parser.parse_object({"student": config})).student
    return network


def export(student: Network, output: str | Path, format: Format = "safetensors") -> str:
    """Write a student to `output` and return Python code that loads it.

    The file appears under its name when it is whole, with the permissions of any new file.

    Args:
        student: a built network.
        output: the file to write.
        format: see `distill export --help`.

    Raises:
        UserError: `output` exists or cannot be written, in which case nothing of it is left, or a package that the
            format needs is not installed.
    """
    path = Path(output).expanduser()
    if os.path.lexists(path):
        raise _exists(path)
    data, code = _FORMATS[format](student, path)
    _write_new(path, data)
    return code


def _write_new(path: Path, data: bytes | memoryview) -> None:
    """Write a new file, all of it or nothing, not even the folders it was to lie in.

    The data are written to a temporary file beside `path`, which then gets its name.
    """
    missing = list(takewhile(lambda folder: not os.path.lexists(folder), path.parents))
    part = path.with_name(f"{path.name}.{uuid4().hex[:8]}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _give_name(part, path)
    except BaseException as error:  # an interrupt, too
        with suppress(OSError):
            part.unlink(missing_ok=True)
        with suppress(OSError):  # a folder that another process uses by now stays
            for folder in missing:
                folder.rmdir()
        if not isinstance(error, OSError):
            raise
        if isinstance(error, FileExistsError) and os.path.lexists(path):
            raise _exists(path) from None
        if (inside := next((str(folder) for folder in path.parents if folder.is_file()), None)) is not None:
            raise UserError(f"output: {str(path)!r} cannot lie in {inside!r}, which is a file") from None
        size = f"{memoryview(data).nbytes / 2**20:.1f} MiB"
        raise UserError(
            f"output: {str(path)!r} ({size}) cannot be written ({error.strerror or error}); nothing is left of it"
        ) from error


def _give_name(part: Path, path: Path) -> None:
    """Rename a file, unless another process has written `path` in the meantime."""
    try:
        os.link(part, path)
    except FileExistsError:
        raise
    except OSError:  # no hard links on this file system
        part.rename(path)
    else:
        part.unlink()


def _exists(path: Path) -> UserError:
    return UserError(f"output: {str(path)!r} exists and is not overwritten")


class _Output(nn.Module):
    """A network that returns only logits, or without a classifier its embedding, for images in [0, 1]."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        output: Tensor = self.network(image)[self.network.output_feature]
        return output


# Each format's data are made in memory: torch's and ONNX's own writers leave a part of the file on a full disk, and
# torch's then aborts the process.


def _safetensors(student: Network, path: Path) -> tuple[bytes | memoryview, str]:
    from safetensors.torch import save

    weights = {name: tensor.contiguous().clone() for name, tensor in student.model.state_dict().items()}
    return save(weights, metadata={"format": "pt"}), student.loading_code(str(path))


def _onnx(student: Network, path: Path) -> tuple[bytes | memoryview, str]:
    try:
        import onnxscript  # noqa: F401  # used by torch.onnx
    except ImportError:
        raise UserError("format: onnx needs the packages onnx and onnxscript: install distill[onnx]") from None
    image = torch.rand(2, *student.image_shape)
    program = torch.onnx.export(
        _Output(student),
        (image,),
        dynamo=True,
        input_names=["image"],
        output_names=[student.output_feature],
        dynamic_shapes={"image": {0: torch.export.Dim("batch")}},
        verbose=False,
    )
    assert program is not None
    code = (
        "import onnxruntime\n"
        f"session = onnxruntime.InferenceSession({str(path)!r})\n"
        f'({student.output_feature},) = session.run(None, {{"image": image}})  # image: float32 [B, C, H, W] in [0, 1]'
    )
    try:
        return program.model_proto.SerializeToString(), code
    except Exception as error:  # protobuf's own, if the file would have more than 2 GiB
        raise UserError(f"format: onnx cannot hold this student in one file ({error}): choose torch") from error


def _torch(student: Network, path: Path) -> tuple[bytes | memoryview, str]:
    image = torch.rand(2, *student.image_shape)
    program = torch.export.export(_Output(student), (image,), dynamic_shapes={"image": {0: torch.export.Dim("batch")}})
    content = io.BytesIO()
    torch.export.save(program, content)
    code = (
        "import torch\n"
        f"network = torch.export.load({str(path)!r}).module()\n"
        f"{student.output_feature} = network(image)  # image: float32 [B, C, H, W] in [0, 1]"
    )
    return content.getbuffer(), code


_FORMATS: dict[str, Callable[[Network, Path], tuple[bytes | memoryview, str]]] = {
    "safetensors": _safetensors,
    "onnx": _onnx,
    "torch": _torch,
}
"""For each format, the function that returns the content of the file and Python code that loads it."""
