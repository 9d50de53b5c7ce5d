"""Types of objects that training programs store beside weights, and that may be read without running code."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import fractions
import pathlib
import types
import uuid
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
from torch.torch_version import TorchVersion


@cache
def harmless_types() -> list[Any]:
    """Return the list for `torch.serialization.safe_globals`: each a type, or a type and the name it stands for.

    Types of the standard library and of NumPy are read as they are or as a plainer type: a path of any system as a
    pure path, a `defaultdict` as a `dict`, a `deque` as a `list`. Configurations of other packages are read as
    mappings or as empty objects, whether or not those packages are installed.
    """
    return [*_STANDARD, *_renamed(), *_numpy(), TorchVersion]


_STANDARD = (
    argparse.Namespace,
    datetime.date,
    datetime.datetime,
    datetime.time,
    datetime.timedelta,
    datetime.timezone,
    decimal.Decimal,
    fractions.Fraction,
    types.SimpleNamespace,
    uuid.UUID,
    frozenset,
    range,
    slice,
    *(bool, bytes, dict, float, int, list, set, str, tuple),  # as default factories
)

_MAPPINGS = (
    "addict.addict.Dict",
    "easydict.EasyDict",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning_utilities.core.attribute_dict.AttributeDict",
    "mmcv.utils.config.ConfigDict",
    "mmengine.config.config.ConfigDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "yacs.config.CfgNode",
)

_CONFIGURATIONS = (
    *(f"omegaconf.base.{name}" for name in ("ContainerMetadata", "Metadata")),
    *(f"omegaconf.nodes.{name}Node" for name in ("Any", "Boolean", "Bytes", "Float", "Integer", "Path", "String")),
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "typing.Any",
)


class _Ignored:
    """An object of which nothing is kept."""

    def __new__(cls, *_: object, **__: object) -> _Ignored:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        """Keep nothing."""


def _plain_dict(*_: object) -> dict[Any, Any]:
    return {}


def _plain_list(*_: object) -> list[Any]:
    return []


def _renamed() -> Iterator[tuple[Any, str]]:
    yield _plain_dict, "collections.defaultdict"
    yield _plain_list, "collections.deque"
    for module in ("pathlib", "pathlib._local"):
        for name in ("Path", "PosixPath", "PurePath", "PurePosixPath"):
            yield pathlib.PurePosixPath, f"{module}.{name}"
        for name in ("WindowsPath", "PureWindowsPath"):
            yield pathlib.PureWindowsPath, f"{module}.{name}"
    yield from ((collections.OrderedDict, name) for name in _MAPPINGS)
    yield from ((_Ignored, name) for name in _CONFIGURATIONS)


def _numpy() -> Iterator[Any]:
    yield from (np.ndarray, np.dtype)
    yield from {type(np.dtype(code)) for code in (*np.typecodes["All"], np.dtype([("a", "i4")]))}
    for module in ("numpy._core.multiarray", "numpy.core.multiarray"):  # of NumPy 2 and 1
        yield np.ndarray(0).__reduce__()[0], f"{module}._reconstruct"
        yield np.float64(0).__reduce__()[0], f"{module}.scalar"
    for scalar in {type(np.dtype(code).type(0)) for code in "?bhilqBHILQefdFD"}:
        yield scalar, f"numpy.{scalar.__name__}"
    yield np.bool_, "numpy.bool_"
