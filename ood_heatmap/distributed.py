"""One process or many: what the stages need to share the work under torchrun.

    torchrun --no-python --nproc-per-node 2 ood-heatmap index ...

Without torchrun every function here does what one process needs: nothing.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed
from torch.distributed.rendezvous import rendezvous

from ood_heatmap.errors import OodHeatmapError

Value = TypeVar("Value")
TIMEOUT = timedelta(hours=12)  # rank 0 hashes and writes while the others wait


def rank() -> int:
    """Return the number of this process, 0 for the first or the only one."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    """Return how many processes share the work."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_main() -> bool:
    """Tell whether this process speaks and writes for all."""
    return rank() == 0


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the other processes that torchrun started, if it did.

    Args:
        device: Of this process; NCCL between GPUs, gloo between CPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed.is_initialized():
        yield
        return
    # objects go through gloo in either case, so that no GPU memory is taken for them
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # torchrun keeps one store over all its restarts, and the addresses of dead processes in it:
    # without a name of its own for each start, the processes of the second wait for them forever
    store, own_rank, size = next(iter(rendezvous("env://", timeout=TIMEOUT)))
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = distributed.PrefixStore(start, store)  # type: ignore[attr-defined]
    distributed.init_process_group(
        backend, store=store, rank=own_rank, world_size=size, timeout=TIMEOUT
    )
    try:
        yield
    finally:
        distributed.destroy_process_group()


def barrier() -> None:
    """Wait for all processes."""
    gather(None)


@contextmanager
def main_first() -> Iterator[None]:
    """Let rank 0 go through the block before the others: it fetches or makes what they then find.

    When it fails there, no other process starts.
    """
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


def gather(value: Value) -> list[Value]:
    """Return the value of every process, in the order of ranks, in every process.

    Raises:
        OodHeatmapError: Another process has ended before its time; its own message says why.
    """
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    try:
        distributed.all_gather_object(values, value)
    except RuntimeError as error:
        raise OodHeatmapError(
            f"process {rank()} of {world_size()} has lost the others: see the message of the one "
            "that failed. What is finished is kept: start the same command again."
        ) from error
    return values


def from_main(value: Value | None) -> Value:
    """Return rank 0's value on every rank; what the others pass does not matter."""
    values: list[Any] = gather(value)
    result: Value = values[0]
    return result
