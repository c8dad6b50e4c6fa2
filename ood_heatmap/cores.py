"""Cores of this process, ranks and memory of this machine, without PyTorch."""

import os


def local_world_size() -> int:
    """Return the number of ranks on this machine, 1 without torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def physical_memory() -> int:
    """Return the bytes of RAM; 8 GB where the system does not say, as on Windows."""
    if not hasattr(os, "sysconf"):
        return 8_000_000_000
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def num_cores() -> int:
    """Return the number of cores for this process: its share of those available, at least 1."""
    granted = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
    return max(1, len(granted) // local_world_size())
