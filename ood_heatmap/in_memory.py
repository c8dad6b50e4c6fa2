"""Networks that are passed from Python: a run records their weights' hash, not how to make them."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from weakref import WeakValueDictionary

from torch import nn

from ood_heatmap.errors import OodHeatmapError
from ood_heatmap.networks import IN_MEMORY
from ood_heatmap.user_code import describe_error

_passed: ContextVar[nn.Module | None] = ContextVar("passed_network", default=None)
# networks that runs were made with in this process, by the hash of their weights
_known: "WeakValueDictionary[str, nn.Module]" = WeakValueDictionary()


def spec_of(network: nn.Module) -> str:
    """Return the SPEC that a run records for a network."""
    return f"{IN_MEMORY}{type(network).__name__}"


@contextmanager
def passing_network(network: nn.Module | None) -> Iterator[None]:
    """Use a network for the runs opened in this context that were made with one in memory."""
    token = _passed.set(network if network is not None else _passed.get())
    try:
        yield
    finally:
        _passed.reset(token)


def remember_network(network: nn.Module, weights: str) -> None:
    """Find this network again in this process, as long as something else refers to it.

    Args:
        network: The network as it was passed.
        weights: Hash of its weights in the run.
    """
    _known[weights] = network


def copy_network(network: nn.Module) -> nn.Module:
    """Return a copy of a network: its classifier freezes it and moves it to a device.

    Raises:
        OodHeatmapError: The network cannot be copied.
    """
    try:
        return copy.deepcopy(network)
    except Exception as error:
        raise OodHeatmapError(
            f"the network cannot be copied ({describe_error(error)}). Name the function that makes "
            "it instead: network='file.py:function'."
        ) from error


def find_network(spec: str, weights: str) -> nn.Module:
    """Return a copy of the network that a run was made with.

    Args:
        spec: SPEC recorded in the run.
        weights: Hash of its weights.

    Raises:
        OodHeatmapError: It was not passed, and nothing in this process was made with it.
    """
    network = _passed.get()
    if network is None:
        network = _known.get(weights)
    if network is None:
        raise OodHeatmapError(
            f"the run's classifier is a network that was passed from Python "
            f"({spec.removeprefix(IN_MEMORY)}, weights {weights[:8]}): pass it again as network=. "
            "Commands can open a run only if it was indexed with --classifier."
        )
    return copy_network(network)
