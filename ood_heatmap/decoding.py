"""Prefetched decoding of image sets in batches, in threads or in processes.

Threads start immediately and copy nothing, but Python holds the GIL between decoding and resizing:
on an Intel Xeon with 16 cores, four threads decoded 1,200 photographs per second at 224 px and
fourteen 1,000; one thread decoded 8,400 PNG files of 32 px per second and fourteen 2,600.
"""

import ctypes
import hashlib
import logging
import shutil
import signal
import sys
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from ood_heatmap.cores import local_world_size
from ood_heatmap.errors import OodHeatmapError
from ood_heatmap.images import (
    ImageSet,
    Transform,
    UnreadableImageError,
    apply_transform,
    exif_orientation,
)

log = logging.getLogger(__name__)
_Item = TypeVar("_Item")
_Done = TypeVar("_Done")
# fewer batches are decoded before processes have started
_MIN_CHUNKS = 4
_MIN_PROCESSES = 3
_SHARED_MEMORY = "/dev/shm"
_BATCHES_AHEAD = 2
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Unreadable:
    """An unreadable image that was skipped.

    Args:
        row: Row of the set.
        name: Name in the set.
        reason: Short reason.
    """

    row: int
    name: str
    reason: str


@dataclass(frozen=True)
class Batch:
    """A batch of decoded images.

    Args:
        rows: ``(B,)`` rows of the set, ascending, without unreadable images.
        pixels: ``(B, 3, H, W)`` uint8.
        digests: Concatenated sha256 of each image's bytes.
        masks: ``(B, h, h)`` uint8 if the set has masks, otherwise empty.
        modes: Number of images converted to RGB, by original mode.
        notes: Number of images with another peculiarity, by description.
        skipped: Unreadable images.
        seconds: Wall time of the thread or process that decoded it.
        cpu_seconds: CPU time of the same.
    """

    rows: NDArray[np.int64]
    pixels: NDArray[np.uint8]
    digests: bytes
    masks: NDArray[np.uint8] = field(default_factory=lambda: np.empty((0, 0, 0), np.uint8))
    modes: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    skipped: tuple[Unreadable, ...] = ()
    seconds: float = 0.0
    cpu_seconds: float = 0.0


def decode(
    images: ImageSet,
    rows: NDArray[np.int64],
    transform: Transform,
    *,
    skip_unreadable: bool = False,
) -> Batch:
    """Read and transform a batch of images.

    Raises:
        UnreadableImageError: An image is unreadable and ``skip_unreadable`` is False.
    """
    started, cpu_started = time.perf_counter(), time.thread_time()
    if images.array is not None and transform.keeps(*images.array.shape[2:]):
        pixels = np.ascontiguousarray(images.array[rows])
        batch = Batch(rows, pixels, b"".join(hashlib.sha256(image).digest() for image in pixels))
    else:
        batch = _decode_each(images, rows, transform, skip_unreadable)
    return replace(
        batch,
        seconds=time.perf_counter() - started,
        cpu_seconds=time.thread_time() - cpu_started,
    )


def _decode_each(
    images: ImageSet, rows: NDArray[np.int64], transform: Transform, skip_unreadable: bool
) -> Batch:
    """Read and transform images one by one."""
    pixels = np.empty((len(rows), 3, transform.size, transform.size), np.uint8)
    kept: list[int] = []
    digests: list[bytes] = []
    masks: list[NDArray[np.uint8]] = []
    skipped: list[Unreadable] = []
    modes, notes = Counter[str](), Counter[str]()
    for row in rows.tolist():
        name = images.names[row]
        try:
            image, digest = images.read(row)
            pixels[len(kept)] = apply_transform(transform, image, name)
        except UnreadableImageError as error:
            if not skip_unreadable:
                raise
            skipped.append(Unreadable(row, name, error.reason))
            continue
        kept.append(row)
        digests.append(digest)
        masks += [images.mask(row)] if images.mask else []
        if isinstance(image, Image.Image):
            modes.update([image.mode] if image.mode != "RGB" else [])
            notes.update(_iter_notes(image))
    return Batch(
        np.array(kept, np.int64),
        pixels[: len(kept)],
        b"".join(digests),
        np.array(masks, np.uint8),
        modes,
        notes,
        tuple(skipped),
    )


def _iter_notes(image: Image.Image) -> Iterator[str]:
    """Yield peculiarities of an image that its owner may not expect."""
    if exif_orientation(image) != 1:
        yield "rotated by EXIF orientation"
    if image.mode.startswith("I") and np.asarray(image).max() < 4096:
        yield "nearly black: 16-bit grey values below 4096 of 65535"


def iter_batches(
    images: ImageSet,
    chunks: Iterable[NDArray[np.int64]],
    transform: Transform,
    *,
    workers: int,
    skip_unreadable: bool = False,
) -> Iterator[Batch]:
    """Decode images ahead of their use, in order.

    Uses processes if there are at least three workers and enough batches, otherwise threads; the
    batches are the same.

    Args:
        images: The set.
        chunks: Rows of each batch, ascending.
        transform: The transform of all images.
        workers: Number of threads or processes; one batch is prefetched per thread, two per
            process.
        skip_unreadable: Skip unreadable images instead of raising.

    Raises:
        UnreadableImageError: An image is unreadable; names the image.
        OodHeatmapError: A decoding process was killed.
    """
    chunks = list(chunks)
    if _use_processes(images, chunks, transform, workers):
        dataset = _Chunks(images, chunks, transform, skip_unreadable)
        return _iter_in_processes(dataset, min(workers, len(chunks)))
    return prefetch(
        lambda rows: decode(images, rows, transform, skip_unreadable=skip_unreadable),
        chunks,
        workers=workers,
    )


def _use_processes(
    images: ImageSet, chunks: list[NDArray[np.int64]], transform: Transform, workers: int
) -> bool:
    """Return whether decoding in processes is possible and worth their start."""
    in_memory = images.array is not None and transform.keeps(*images.array.shape[2:])
    worth_it = workers >= _MIN_PROCESSES and len(chunks) >= _MIN_CHUNKS and not in_memory
    # a forked process shares the image set without a copy; fork is safe on Linux only
    if not worth_it or sys.platform != "linux":
        return False
    batch_bytes = max(map(len, chunks)) * 3 * transform.size**2
    # all ranks of this machine take theirs at the same time
    needed = (_BATCHES_AHEAD * min(workers, len(chunks)) + 1) * batch_bytes * local_world_size()
    free = _free_shared_memory()
    if needed > free:
        log.warning(
            "%s has %d MB free and %d processes need %d MB: decoding in threads, which is slower",
            _SHARED_MEMORY,
            free // 10**6,
            workers,
            needed // 10**6,
        )
    return needed <= free


def _free_shared_memory() -> int:
    """Return the free bytes of shared memory; 0 where the system has none, as some containers."""
    try:
        return shutil.disk_usage(_SHARED_MEMORY).free
    except OSError:
        return 0


# the pixels, in shared memory, and the rest of a batch; or an error
_Sent: TypeAlias = tuple[Tensor, Batch] | Exception


class _Chunks(Dataset[_Sent]):
    """Batches of an image set as a map-style dataset, decoded on access."""

    def __init__(
        self,
        images: ImageSet,
        chunks: list[NDArray[np.int64]],
        transform: Transform,
        skip_unreadable: bool,
    ) -> None:
        self.images, self.chunks, self.transform = images, chunks, transform
        self.skip_unreadable = skip_unreadable

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, item: int) -> _Sent:
        """Return a batch, or the error: raised here, its message would become a traceback."""
        try:
            batch = decode(
                self.images,
                self.chunks[item],
                self.transform,
                skip_unreadable=self.skip_unreadable,
            )
        except Exception as error:
            return error
        return torch.from_numpy(batch.pixels), replace(batch, pixels=_NO_PIXELS)


_NO_PIXELS = np.empty((0, 3, 0, 0), np.uint8)


def _iter_in_processes(dataset: _Chunks, workers: int) -> Iterator[Batch]:
    """Yield the batches, decoded in forked processes."""
    with _forking():
        loader = DataLoader(
            dataset,
            batch_size=None,
            num_workers=workers,
            collate_fn=_unchanged,
            worker_init_fn=_end_with_parent,
            multiprocessing_context="fork",
            prefetch_factor=_BATCHES_AHEAD,
        )
        batches = _start(loader)
    while True:
        try:
            sent = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            # DataLoader raises RuntimeError if a worker has died
            raise OodHeatmapError(
                "a process that decodes images was killed: memory or the space of "
                f"{_SHARED_MEMORY} may be exhausted. Use fewer --workers."
            ) from error
        if isinstance(sent, Exception):
            raise sent
        pixels, batch = sent
        yield replace(batch, pixels=pixels.numpy())


def _start(loader: DataLoader[_Sent]) -> Iterator[_Sent]:
    """Start the processes.

    Raises:
        OodHeatmapError: The system allows no more processes, or no more open files.
    """
    try:
        return iter(loader)
    except OSError as error:
        raise OodHeatmapError(
            f"{loader.num_workers} processes that decode images cannot be started "
            f"({error.strerror}). Use fewer --workers."
        ) from error


@contextmanager
def _forking() -> Iterator[None]:
    """Silence warnings about a fork with threads, and about more workers than cores.

    The processes only decode: they take no lock that another thread may hold, use no CUDA, and exit
    without clean-up.
    """
    with warnings.catch_warnings(), _interrupt_deferred(), _without_sigchld_handler():
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        yield


@contextmanager
def _interrupt_deferred() -> Iterator[None]:
    """Raise an interrupt (Ctrl-C) of the block at its end: Python loses one during a fork."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: received.append(number))
    try:
        yield
    finally:
        # None is a handler that is not of Python, which cannot be set again
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
    if received:
        signal.raise_signal(signal.SIGINT)


@contextmanager
def _without_sigchld_handler() -> Iterator[None]:
    """Keep DataLoader from installing its handler for workers that die.

    It raises wherever the main thread is. Without it a dead worker is noticed where the next batch
    is waited for, within 5 seconds.
    """
    before = signal_handling._SIGCHLD_handler_set
    signal_handling._SIGCHLD_handler_set = True
    try:
        yield
    finally:
        signal_handling._SIGCHLD_handler_set = before


def _unchanged(sent: Any) -> Any:
    return sent


def _end_with_parent(_: int) -> None:
    """Leave an interrupt to the parent; die when that is killed: its run lock is shared."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def prefetch(
    function: Callable[[_Item], _Done], items: Iterable[_Item], *, workers: int
) -> Iterator[_Done]:
    """Yield ``function(item)`` in order, computed in threads, up to ``workers`` items ahead."""
    waiting: deque[Future[_Done]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
