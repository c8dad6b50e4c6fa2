"""Which device computes."""

import ctypes
import ctypes.util
import functools

import torch

from ood_heatmap.errors import UsageError


def choose_device(name: str = "auto") -> torch.device:
    """Return the device of a name.

    ``auto`` (a GPU where there is one), ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        UsageError: A GPU is asked for that is not there.
    """
    keep_freed_memory()
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"there is no device {name!r}: use auto, cpu, cuda or cuda:N.") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"there is no support for {name!r}: use auto, cpu, cuda or cuda:N.")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if not torch.cuda.is_available() or (device.index or 0) >= count:
            raise UsageError(
                f"{name} is asked for and this machine has {count} GPUs. Use --device cpu."
            )
        return torch.device("cuda", device.index or 0)
    return device


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
