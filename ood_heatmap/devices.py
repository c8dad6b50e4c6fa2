"""Which device computes."""

import ctypes
import ctypes.util
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ood_heatmap.distributed import process_group
from ood_heatmap.errors import UsageError


def choose_device(name: str = "auto") -> torch.device:
    """Return the device of a name.

    ``auto`` (a GPU where there is one), ``cpu``, ``cuda`` or ``cuda:N``. Under torchrun ``auto``
    and ``cuda`` are a GPU of its own for each process of a machine.

    Raises:
        UsageError: A GPU is asked for that is not there, or one for several processes.
    """
    keep_freed_memory()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"there is no device {name!r}: use auto, cpu, cuda or cuda:N.") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"there is no support for {name!r}: use auto, cpu, cuda or cuda:N.")
    return own_gpu(name, device.index) if device.type == "cuda" else device


def own_gpu(name: str, index: int | None) -> torch.device:
    """Return the GPU of this process: the one asked for, or its own under torchrun."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if index is not None and processes > 1:
        raise UsageError(f"{name} is one GPU for {processes} processes. Use --device cuda.")
    index = int(os.environ.get("LOCAL_RANK", "0")) if index is None else index
    if index >= count:
        wanted = f"{processes} processes take one each" if processes > 1 else f"{name} is asked for"
        raise UsageError(f"{wanted} and this machine has {count} GPUs. Use --device cpu.")
    return torch.device("cuda", index)


@contextmanager
def stage_device(name: str = "auto") -> Iterator[torch.device]:
    """Yield the device of this process, joined with the others that torchrun started.

    Every stage runs inside this block, so that they all share their work in the same way.

    Args:
        name: As of ``choose_device``.
    """
    device = choose_device(name)
    with process_group(device):
        yield device


@functools.cache
def keep_freed_memory() -> None:
    """Let the C library keep large blocks for the next batch instead of giving them back.

    Otherwise every activation of every batch is mapped anew and its pages are faulted in one by
    one: up to half of the time of a forward pass on a CPU (2.4 times as many images a second
    without it, in batches of 1024).
    """
    try:
        library = ctypes.CDLL(ctypes.util.find_library("c"))
        mallopt = library.mallopt
    except (OSError, AttributeError, TypeError):  # not glibc: nothing to set
        return
    mmap_max, trim_threshold = -4, -1
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)
