"""Ranks, collectives and the process group: what the stages need to run under torchrun.

    torchrun --no-python --nproc-per-node 2 ood-heatmap index ...

Without torchrun the world size is 1 and every function here returns at once.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed
from torch.distributed.rendezvous import rendezvous

from ood_heatmap.errors import OodHeatmapError

_Value = TypeVar("_Value")

# the other ranks wait while rank 0 hashes and writes
_TIMEOUT = timedelta(hours=12)


def rank() -> int:
    """Return the rank of this process, 0 without a process group."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks, 1 without a process group."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_main() -> bool:
    """Return whether this is rank 0, which logs and writes for all ranks."""
    return rank() == 0


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Initialise the process group of torchrun for the block; without torchrun do nothing.

    Args:
        device: Device of this rank. GPU tensors go through NCCL, everything else through gloo.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed.is_initialized():
        yield
        return
    # objects go through gloo in either case, so that they take no GPU memory
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    _connect(backend)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def _connect(backend: str) -> None:
    """Initialise the process group from the environment of torchrun.

    Raises:
        OodHeatmapError: The other ranks cannot be reached.
    """
    try:
        # torchrun keeps one store, with the addresses of dead processes in it, over all restarts:
        # without a prefix per restart the restarted ranks would wait for the dead ones forever
        store, own_rank, size = next(iter(rendezvous("env://", timeout=_TIMEOUT)))
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = distributed.PrefixStore(restart, store)  # type: ignore[attr-defined]
        distributed.init_process_group(
            backend, store=store, rank=own_rank, world_size=size, timeout=_TIMEOUT
        )
    except RuntimeError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OodHeatmapError(
            f"rank {os.environ.get('RANK')} on {socket.gethostname()} cannot reach the other ranks "
            f"({reason:.200}). On several nodes, give torchrun a --master-addr that all reach, and "
            "set GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) to the network interface, such as "
            "eth0, if a node's name resolves to 127.0.1.1."
        ) from error


def barrier() -> None:
    """Block until all ranks have reached this call."""
    all_gather(None)


@contextmanager
def main_process_first() -> Iterator[None]:
    """Run the block on rank 0 before the other ranks, which then find what it downloaded or wrote.

    If rank 0 fails, the other ranks do not enter the block.
    """
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


def all_gather(value: _Value) -> list[_Value]:
    """Return the values of all ranks, in the order of ranks, on every rank.

    Raises:
        OodHeatmapError: Another rank has exited; its own message says why.
    """
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    with _lost_contact():
        distributed.all_gather_object(values, value)
    return values


def broadcast(value: _Value | None) -> _Value:
    """Return the value of rank 0 on every rank; what the other ranks pass does not matter.

    Raises:
        OodHeatmapError: Another rank has exited; its own message says why.
    """
    values: list[Any] = [value]
    if world_size() > 1:
        with _lost_contact():
            distributed.broadcast_object_list(values)
    result: _Value = values[0]
    return result


@contextmanager
def _lost_contact() -> Iterator[None]:
    """Say what a failed collective means."""
    try:
        yield
    except RuntimeError as error:
        raise OodHeatmapError(
            f"rank {rank()} of {world_size()} lost contact with the other ranks: see the message "
            f"of the one that failed. Finished work is kept: run the same command again to resume."
        ) from error
