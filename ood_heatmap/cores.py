"""Number of cores of this process and of ranks on this machine, without PyTorch."""

import os


def local_world_size() -> int:
    """Return the number of ranks on this machine, 1 without torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def num_cores() -> int:
    """Return the number of cores for this process: its share of those available, at least 1."""
    granted = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
    return max(1, len(granted) // local_world_size())
