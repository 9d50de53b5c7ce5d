"""Weights under the names of another program, matched by their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from distill.errors import UserError

_COUNTERS = (".num_batches_tracked", ".total_ops", ".total_params")
"""Ends of names of tensors that programs store or leave out as they like."""


def match_in_order(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    file: str,
    drop_classifier: bool = False,
    classifier: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Give a file's tensors the names of the model's tensors in the same place.

    Args:
        model: the network.
        tensors: in the order of the file.
        file: its name in messages.
        drop_classifier: leave out the classifier, whose tensors take their places nevertheless; in a network without
            one, leave out what the file has after the last.
        classifier: names of the model's classifier layers.

    Returns:
        The file's tensors under the names of the model's state dict.

    Raises:
        UserError: their number or a shape differs.
    """
    expected_tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(_COUNTERS)}
    given = [(name, tensor) for name, tensor in tensors.items() if not name.endswith(_COUNTERS)]
    layers = tuple(f"{layer}." for layer in classifier)
    if drop_classifier and not any(name.startswith(layers) for name in expected_tensors):
        given = given[: len(expected_tensors)]
    if len(given) != len(expected_tensors):
        raise UserError(
            f"{file} has {len(given)} tensors and {type(model).__name__} {len(expected_tensors)}, so they "
            "cannot be matched by order"
        )
    matched: dict[str, Tensor] = {}
    for (name, tensor), (key, expected) in zip(given, expected_tensors.items(), strict=True):
        if drop_classifier and key.startswith(layers):
            continue
        if tensor.shape != expected.shape:
            remedy = ""
            if key.startswith(layers) and tensor.shape[1:] == expected.shape[1:]:
                remedy = f": set num_classes: {tensor.shape[0]}, or drop_classifier: true to leave the classifier out"
            raise UserError(
                f"{file} cannot be matched by order: its tensor {len(matched) + 1}, {name!r}, is {list(tensor.shape)}, "
                f"but {key!r} is {list(expected.shape)}{remedy}"
            )
        matched[key] = tensor
    return matched
