"""Choice of the device, and the process settings of the command line."""

import ctypes
import ctypes.util
import functools
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ood_heatmap.distributed import local_world_size, process_group
from ood_heatmap.errors import OodHeatmapError, UsageError

# what allocators other than PyTorch's own for GPUs report: the driver, cuBLAS and cuDNN, cuDNN that
# finds no algorithm for the workspace left, and the CPU's
_OUT_OF_MEMORY = (
    "out of memory",
    "ALLOC_FAILED",
    "ALLOCATION_FAILED",
    "unable to find an engine",
    "can't allocate memory",
)


def choose_device(name: str = "auto") -> torch.device:
    """Resolve a device name.

    Args:
        name: ``auto`` (a GPU if there is one), ``cpu``, ``cuda`` or ``cuda:N``. Under torchrun
            ``auto`` and ``cuda`` give each local rank its own GPU.

    Raises:
        UsageError: The GPU does not exist, or one GPU is named for several ranks.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"there is no device {name!r}: use auto, cpu, cuda or cuda:N.") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"there is no support for {name!r}: use auto, cpu, cuda or cuda:N.")
    return _local_gpu(name, device.index) if device.type == "cuda" else device


def _local_gpu(name: str, index: int | None) -> torch.device:
    """Return the GPU that was named, or the one of this local rank."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    num_ranks = local_world_size()
    if index is not None and num_ranks > 1:
        raise UsageError(f"{name} is one GPU for {num_ranks} processes. Use --device cuda.")
    index = int(os.environ.get("LOCAL_RANK", "0")) if index is None else index
    if index >= num_gpus:
        needed = f"{num_ranks} processes need a GPU each" if num_ranks > 1 else f"{name} is needed"
        raise UsageError(f"{needed} and this machine has {num_gpus} GPUs. Use --device cpu.")
    return torch.device("cuda", index)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that a smaller batch may fit.

    PyTorch's own allocator raises ``torch.OutOfMemoryError``; libraries that allocate beside it
    arrive as a plain ``RuntimeError`` or ``torch.AcceleratorError``.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    message = str(error)
    return isinstance(error, RuntimeError) and any(text in message for text in _OUT_OF_MEMORY)


@contextmanager
def stage_device(name: str = "auto") -> Iterator[torch.device]:
    """Yield the device of a command, inside the process group if torchrun started it.

    The command line runs every stage in this block. It also sets the memory allocator for the
    whole process, which the library leaves alone.

    Args:
        name: See ``choose_device``.
    """
    keep_freed_memory()
    device = choose_device(name)
    with process_group(device):
        yield device


@contextmanager
def kernel_selection(*, deterministic: bool) -> Iterator[None]:
    """Select the algorithms of GPU kernels for the block; nothing changes on a CPU.

    By default cuDNN measures which algorithm is the fastest for the one shape that all batches of a
    stage have. What it chooses, and with it the rounding, may differ from run to run.

    Args:
        deterministic: Use only algorithms that compute the same bits every time on one device.

    Raises:
        OodHeatmapError: PyTorch has no deterministic algorithm for an operation.
    """
    debug_mode, benchmark = torch.get_deterministic_debug_mode(), torch.backends.cudnn.benchmark
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    if deterministic:
        # cuBLAS reads it when it is first used
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.set_deterministic_debug_mode("error")
        # for debugging: it would write all memory twice
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not deterministic
    try:
        yield
    except RuntimeError as error:
        operation, found, _ = str(error).partition(" does not have a deterministic implementation")
        if not found:
            raise
        raise OodHeatmapError(
            f"--deterministic is not possible here: {operation} has no deterministic "
            "implementation in PyTorch. Leave it out, or use --device cpu."
        ) from error
    finally:
        torch.set_deterministic_debug_mode(debug_mode)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = benchmark


def describe_environment(device: torch.device, *, deterministic: bool) -> dict[str, Any]:
    """Return what the rounding of a result depends on, for a manifest: JSON."""
    return {
        "device": _device_name(device),
        "torch": torch.__version__,
        "deterministic": deterministic,
    }


def _device_name(device: torch.device) -> str:
    """Return the name of a GPU, or of the processor and the instructions that PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text("utf-8", "replace").splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.machine()
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}"


@functools.cache
def keep_freed_memory() -> None:
    """Make the C library reuse large freed blocks instead of returning them to the system.

    A setting of the whole process, for the command line only. Without it every activation of every
    batch is mapped anew and its pages are faulted in one by one, up to half of the time of a
    forward pass on a CPU (1024 images per batch: 2.4 times the images per second with it).
    """
    try:
        library = ctypes.CDLL(ctypes.util.find_library("c"))
        mallopt = library.mallopt
    except (OSError, AttributeError, TypeError):  # not glibc: nothing to set
        return
    mmap_max, trim_threshold = -4, -1
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)
