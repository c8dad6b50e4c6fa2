"""Weights of a network: read from the usual kinds of checkpoint, loaded strictly, and hashed."""

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ood_heatmap.errors import OodHeatmapError

log = logging.getLogger(__name__)

_NESTED_KEYS = ("state_dict", "model_state_dict", "model", "net", "network")
# training-only heads of GoogLeNet and Inception v3; checkpoints come with and without them
_AUXILIARY_HEADS = ("aux1.", "aux2.", "AuxLogits.")
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")


def load_weights(path: Path) -> dict[str, Tensor]:
    """Load the state dict from a safetensors file or a checkpoint; pickled code never runs.

    A state dict under one of the usual keys of a checkpoint is found.

    Raises:
        OodHeatmapError: The file is missing, damaged, contains pickled code, or no tensors.
    """
    if not path.is_file():
        raise OodHeatmapError(f"there is no weights file {path}.")
    try:
        content: Any
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    # a damaged file can raise any exception in the unpickler
    except Exception as error:
        raise OodHeatmapError(
            f"{path} cannot be loaded as plain weights ({_reason(error)}). Save the state dict as "
            "safetensors: safetensors.torch.save_file(model.state_dict(), path)."
        ) from error
    return _unwrap(content, path)


def _reason(error: Exception) -> str:
    """Shorten a loader's message to the pickled class or the fault behind it."""
    text = str(error).strip()
    pickled = re.search(r"GLOBAL (\S+) was not an allowed", text)
    if pickled:
        return f"it contains a pickled {pickled[1]}"
    if not text or "weights_only" in text or isinstance(error, KeyError):
        return "not a PyTorch checkpoint, or damaged"
    return text.splitlines()[0].partition(". ")[0]


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    """Return the state dict under one of the usual keys of a checkpoint."""
    if not isinstance(content, Mapping):
        raise OodHeatmapError(f"{path} contains no state dict, but a {type(content).__name__}.")
    joined = _join_released(content)
    if joined is not None:
        return joined
    for key in _NESTED_KEYS:
        if isinstance(content.get(key), Mapping):
            averaged = [name for name in content if "ema" in str(name).lower().split("_")]
            if averaged:
                log.warning(
                    "%s: loaded %s; it also contains averaged weights (%s): to use those, save "
                    "them in a separate file",
                    path,
                    key,
                    averaged[0],
                )
            return _unwrap(content[key], path)
    state = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not state:
        raise OodHeatmapError(
            f"{path} contains no state dict, but {first_few(list(map(str, content))) or 'nothing'}"
            f"; searched under {', '.join(_NESTED_KEYS)}."
        )
    return state


def _join_released(checkpoint: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """Join the separate state dicts of backbone and head in the reference's checkpoints.

    Returns None unless the checkpoint has ``net_state_dict`` and ``cls_state_dict``.
    """
    joined: dict[str, Tensor] = {}
    for key in ("net_state_dict", "cls_state_dict"):
        state = checkpoint.get(key)
        if not isinstance(state, Mapping):
            return None
        joined |= {str(name).removeprefix("module."): value for name, value in state.items()}
    return joined


def load_state_dict(network: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load a state dict strictly; a prefix common to all its keys is removed if necessary.

    Args:
        network: The network to load it into.
        state: Weights by name.
        path: File that they come from, for messages.

    Raises:
        OodHeatmapError: Keys are missing, unexpected, or of another shape; the message names them.
    """
    own = network.state_dict()
    state = _to_own_names(state, own)
    state = {
        name: value
        for name, value in state.items()
        if name in own or not name.startswith(_AUXILIARY_HEADS)
    }
    missing = [
        name for name in own if name not in state and not name.endswith("num_batches_tracked")
    ]
    unexpected = [name for name in state if name not in own]
    reshaped = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(value.shape)}"
        for name, value in own.items()
        if name in state and state[name].shape != value.shape
    ]
    if not (missing or unexpected or reshaped):
        # updated in place: the network's own dict carries the version numbers of its modules
        own.update(state)
        network.load_state_dict(own)
        return
    try:
        # modules may convert keys of earlier versions, as torchvision's transformers do
        network.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        faults = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
        text = "; ".join(f"{fault}: {first_few(names)}" for fault, names in faults.items() if names)
        raise OodHeatmapError(
            f"{path} does not fit the classifier ({text}). Check --classifier and --num-classes."
        ) from error


def _to_own_names(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the keys of a state dict to those of the network, if a known convention applies.

    DataParallel prepends ``module.``, Lightning the name of an attribute such as ``model.``, and
    ``torch.compile`` inserts ``_orig_mod.`` anywhere. Keys in torchvision's DenseNet files have
    more dots than those of its networks.

    Args:
        state: Weights by name.
        own: State dict of the network.
    """
    state = {name.replace("_orig_mod.", ""): value for name, value in state.items()}
    candidates = [
        state,
        {_OLD_DENSENET.sub(r"\1\2", name): value for name, value in state.items()},
    ]
    while len({name.partition(".")[:2] for name in state}) == 1 and "." in next(iter(state)):
        state = {name.partition(".")[2]: value for name, value in state.items()}
        candidates.append(state)
    return max(candidates, key=lambda candidate: len(candidate.keys() & own.keys()))


def hash_weights(network: nn.Module) -> str:
    """Return the sha256 over names, shapes, dtypes and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        # counts training steps, no effect in eval mode
        if name.endswith("num_batches_tracked"):
            continue
        digest.update(f"{name}\0{tuple(value.shape)}\0{value.dtype}\n".encode())
        data = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(data.numpy().tobytes())
    return digest.hexdigest()


def first_few(names: Sequence[str], count: int = 4) -> str:
    """Return the first few names and the number of the others."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
