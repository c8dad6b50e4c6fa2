"""Choice of the device, and the process settings of the command line."""

import ctypes
import ctypes.util
import functools
import logging
import os
import platform
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits

from ood_heatmap.cores import local_world_size
from ood_heatmap.distributed import process_group
from ood_heatmap.errors import OodHeatmapError, UsageError

log = logging.getLogger(__name__)
_DRIVER_FILE = Path("/proc/driver/nvidia/version")
# major version of CUDA to that of the driver
_MIN_DRIVER = {12: 525, 13: 580}
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
        name = "cuda" if _cuda_is_available() else "cpu"
        if name == "cpu" and (reason := _why_no_cuda()):
            log.warning("computing on the CPU: %s", reason)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"there is no device {name!r}: use auto, cpu, cuda or cuda:N.") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"there is no support for {name!r}: use auto, cpu, cuda or cuda:N.")
    return _local_gpu(name, device.index) if device.type == "cuda" else device


def _local_gpu(name: str, index: int | None) -> torch.device:
    """Return the GPU that was named, or the one of this local rank."""
    num_gpus = torch.cuda.device_count() if _cuda_is_available() else 0
    num_ranks = local_world_size()
    if index is not None and num_ranks > 1:
        raise UsageError(f"{name} is one GPU for {num_ranks} processes. Use --device cuda.")
    index = int(os.environ.get("LOCAL_RANK", "0")) if index is None else index
    if index >= num_gpus:
        needed = f"{num_ranks} processes need a GPU each" if num_ranks > 1 else f"{name} is needed"
        reason = "" if num_gpus else _why_no_cuda()
        have = reason or f"this machine has {num_gpus} GPUs"
        raise UsageError(f"{needed} and {have}. Use --device cpu.")
    return torch.device("cuda", index)


def _cuda_is_available() -> bool:
    """Return whether PyTorch can use a GPU, without a warning; see ``_why_no_cuda``."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "CUDA initialization", UserWarning)
        return torch.cuda.is_available()


def _why_no_cuda() -> str:
    """Return why PyTorch cannot use the GPU that this machine has; "" if it has none or hides it.

    Source: NVIDIA, CUDA Compatibility, "Minimum driver versions" (CUDA 12: 525, CUDA 13: 580).
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1")
    if hidden or not any(Path("/dev").glob("nvidia[0-9]*")):
        return ""
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built without CUDA. Install a build with it"
    driver, major = _driver_version(), int(torch.version.cuda.split(".")[0])
    needed = _MIN_DRIVER.get(major)
    if driver and needed and int(driver.split(".")[0]) < needed:
        return (
            f"the NVIDIA driver {driver} is too old for PyTorch {torch.__version__}, built for "
            f"CUDA {torch.version.cuda}, which needs {needed} or later. Update the driver, or "
            "install a PyTorch built for an older CUDA"
        )
    return f"PyTorch {torch.__version__} cannot use the NVIDIA GPU (driver {driver or 'unknown'})"


def _driver_version() -> str:
    """Return the version of the loaded NVIDIA driver; "" if it does not say."""
    try:
        found = re.search(r"Module.*?(\d+(?:\.\d+)+)", _DRIVER_FILE.read_text("utf-8"))
    except OSError:
        return ""
    return found[1] if found else ""


def computes_in_bfloat16(device: torch.device) -> bool:
    """Return whether a GPU has bfloat16 arithmetic; PyTorch emulates it on older ones, slowly."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


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

    The command line runs every stage in this block. It also configures the memory allocator of the
    process, which the library itself does not.

    Args:
        name: See ``choose_device``.
    """
    keep_freed_memory()
    device = choose_device(name)
    with process_group(device):
        yield device


@contextmanager
def kernel_selection(*, deterministic: bool, benchmark: bool = False) -> Iterator[None]:
    """Select the algorithms of GPU kernels for the block; nothing changes on a CPU.

    Args:
        deterministic: Use only algorithms that compute the same bits every time on one device.
        benchmark: Let cuDNN measure which algorithm is the fastest for the one shape that all
            batches of a stage have, unless ``deterministic``. What it chooses, and with it the
            rounding, may differ from run to run. The classifiers that were tried do not gain by
            it: a ResNet-50 at 224 px embeds 9,180 images/s with it and without (H200).

    Raises:
        OodHeatmapError: PyTorch has no deterministic algorithm for an operation.
    """
    debug_mode, before = torch.get_deterministic_debug_mode(), torch.backends.cudnn.benchmark
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    if deterministic:
        # cuBLAS reads it when it is first used
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.set_deterministic_debug_mode("error")
        # for debugging: it would write all memory twice
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = benchmark and not deterministic
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
        torch.backends.cudnn.benchmark = before


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Let NumPy and SciPy multiply in one thread for the block, also in processes forked in it.

    Their products are small here, and their threads spin while PyTorch's and FAISS's compute: the
    patches of a photograph took 3.9 ms instead of 0.5 on two cores. FAISS's own BLAS and PyTorch's
    keep their threads.
    """
    # the name in the wheels of both; elsewhere they may share a BLAS with FAISS
    with threadpool_limits({"libscipy_openblas": 1}):
        yield


@contextmanager
def at_most_threads(count: int) -> Iterator[None]:
    """Let PyTorch compute in at most so many threads for the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(count, before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


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

    A setting of the whole process, for the command line only. Without it, every activation of every
    batch is a new mapping whose pages are faulted in one by one, up to half of the time of a
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
