"""Reading a file of weights: what it holds, or what it is instead."""

from __future__ import annotations

import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from distill.errors import UserError
from distill.networks.harmless_types import harmless_types

_DEPTH = 12
"""Depth to which containers are searched for tensors."""

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""Parts of names that torch.compile, FSDP and activation checkpointing insert anywhere."""


def read_weights_file(path: str | Path) -> dict[str, Tensor]:
    """Return all tensors of a file under dotted names that begin with the keys of the containers they lie in.

    Reads safetensors and what `torch.save` writes, whatever the file's suffix. Objects other than tensors are
    skipped; those outside a list of harmless types are refused, so that no code of the file runs.

    Raises:
        UserError: the file cannot be read or holds no tensors; the message says what it is instead.
    """
    path = Path(path).expanduser()
    where = f"weights file {str(path)!r}"
    if not path.is_file():
        raise UserError(f"{where} {_instead_of_a_file(path)}")
    try:
        with path.open("rb") as file:
            head = file.read(4096)
        content = _read(path, head)
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error.strerror or error}") from error
    except UserError as error:
        raise UserError(f"{where} cannot be read: {error}") from error
    tensors: dict[str, Tensor] = {}
    _collect(content, (), tensors, set())
    if not tensors:
        raise UserError(f"{where} contains no named tensors{_keys(content)}")
    plain = {_without_wrappers(name): tensor for name, tensor in tensors.items()}
    return plain if len(plain) == len(tensors) else tensors


def keeps_order(path: str | Path) -> bool:
    """Return whether a file has its tensors in the order of the network that was saved; safetensors sorts them."""
    with Path(path).expanduser().open("rb") as file:
        return not _is_safetensors(file.read(16))


def some(names: Sequence[str], shown: int = 2) -> str:
    """Return the first names quoted, and how many more there are."""
    listed = ", ".join(map(repr, names[:shown]))
    return listed + (f" and {len(names) - shown} more" if len(names) > shown else "")


def _collect(value: Any, path: tuple[str, ...], found: dict[str, Tensor], parents: set[int]) -> None:
    """Add the tensors of nested mappings and lists; a container that holds itself is entered once."""
    if isinstance(value, Tensor):
        found.setdefault(".".join(path), value)
    elif isinstance(value, Mapping | list | tuple) and len(path) < _DEPTH and id(value) not in parents:
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            if isinstance(key, str) or not isinstance(value, Mapping):  # optimizers number their state
                _collect(item, (*path, str(key)), found, parents | {id(value)})


def _keys(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f", but {type(content).__name__}"
    keys = [str(key) for key in islice(content, 9)]
    return f"; its keys are {some(keys, 8)}" if keys else "; it is an empty mapping"


def _without_wrappers(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _read(path: Path, head: bytes) -> Any:
    """Return the content of a file of weights; a `UserError` says what another file is."""
    if not head:
        raise UserError("it is empty")
    if _is_safetensors(head):
        return _read_safetensors(path)
    if head.startswith(b"PK\x03\x04"):
        _require_torch_archive(path)
    elif (kind := _other_kind(path, head)) is not None:
        raise UserError(f"it is {kind}")
    # A file and not its path, whose suffix torch.load would believe.
    with torch.serialization.safe_globals(harmless_types()), path.open("rb") as file:
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # each format fails in its own way
            raise UserError(_reason(file, head, error)) from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:
        raise UserError(f"it is a truncated or damaged safetensors file ({_first_line(error)})") from error


def _is_safetensors(head: bytes) -> bool:
    """Return whether the file begins with the length of a JSON header and an opening brace."""
    length = int.from_bytes(head[:8], "little")
    return len(head) > 9 and head[8:9] == b"{" and 2 <= length < 2**30 and head[:8].count(0) >= 4


def _require_torch_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        raise UserError("it is truncated or not a file of weights (an archive without its end)") from None
    for kind, is_kind in _ARCHIVES.items():
        if any(map(is_kind, names)):
            raise UserError(f"it is {kind}")
    if not any(name.rpartition("/")[2] == "data.pkl" for name in names):
        raise UserError(f"it is a zip archive of other files ({some(names)}): unpack it")


_STATE_DICT = "save the state dict alone, with torch.save(model.state_dict(), path)"

_ARCHIVES: dict[str, Callable[[str], bool]] = {
    f"a TorchScript archive, a whole program: load it with torch.jit.load and {_STATE_DICT}": lambda name: (
        "/code/" in name or name.endswith(("/constants.pkl", "/bytecode.pkl"))
    ),
    f"a torch.export archive, a whole program: load it with torch.export.load and {_STATE_DICT}": lambda name: (
        name.rpartition("/")[2] in ("archive_format", "serialized_exported_program.json")
    ),
    "a NumPy archive (.npz), not a file of torch": lambda name: name.endswith(".npy"),
}

_BEGINNINGS: dict[bytes, str] = {
    b"version https://git-lfs": "a Git LFS pointer in place of the file: fetch the file with `git lfs pull`",
    b"\x1f\x8b": "compressed by gzip (.gz or .tar.gz): unpack it",
    b"BZh": "compressed by bzip2: unpack it",
    b"\xfd7zXZ": "compressed by xz: unpack it",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it",
    b"7z\xbc\xaf": "a 7z archive: unpack it",
    b"Rar!": "a RAR archive: unpack it",
    b"\x89HDF": "an HDF5 file of Keras or TensorFlow, not a file of torch",
    b"\x93NUMPY": "a NumPy array, not a file of torch",
    b"GGUF": "a GGUF file, not a file of torch",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"%PDF": "a PDF document",
}


def _other_kind(path: Path, head: bytes) -> str | None:
    """Return what a file is that neither safetensors nor torch has written, or `None`."""
    for beginning, kind in _BEGINNINGS.items():
        if head.startswith(beginning):
            return kind
    if b"pytorch" in head[:64] and head.startswith(b"\x08"):
        return f"an ONNX program: {_STATE_DICT}"
    if tarfile.is_tarfile(path):
        return "a tar archive: unpack it"
    text = _text(head)
    if text is None:
        return None
    start = text.lstrip("\ufeff \t\r\n").lower()
    if start.startswith(("<!doctype html", "<html", "<head", "<body")) or "<html" in start[:1000]:
        return "an HTML page, perhaps of a download that needs a login: download the file itself"
    if start.startswith("<"):
        return "an XML document, perhaps the answer of a server: download the file itself"
    if "weight_map" in text:
        return "the index of weights in several files: join them into one"
    if start.startswith("{") and _is_json(path):
        return "a JSON document"
    return f"text that begins {text.split(chr(10))[0][:40]!r}"


def _text(head: bytes) -> str | None:
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4:  # not a letter cut in two at the end
            return None
        text = head[: error.start].decode()
    return text if all(letter.isprintable() or letter in "\ufeff\t\r\n\f" for letter in text) else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except ValueError:
        return False
    return True


def _reason(file: BinaryIO, head: bytes, error: Exception) -> str:
    message = str(error)
    if isinstance(error, pickle.UnpicklingError):
        try:
            file.seek(0)
            unsafe = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
        except Exception:
            unsafe = []
        if unsafe:
            return f"besides tensors it contains {some(unsafe)}, which are not loaded for safety: {_STATE_DICT}"
        if "Unsupported operand" in message and (head.startswith(b"PK") or head[1] < 6):
            return "it was saved with a pickle protocol other than torch's: save it with torch.save's default"
    if head[:1] == b"\x80" and "magic number" in message.lower():
        return "it is a pickle that torch.save did not write"
    return f"it is truncated or not a file of weights ({type(error).__name__})"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:80]


def _instead_of_a_file(path: Path) -> str:
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if file.suffix in _SUFFIXES)
        return "is a folder" + (f": give a file in it, such as {some(files)}" if files else "")
    if str(path).startswith(("http:/", "https:/", "hf:/", "s3:/")):
        return "is an address: download the file and give its path"
    return "is not a regular file" if path.exists() else "does not exist"


_SUFFIXES = {".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".tar"}
