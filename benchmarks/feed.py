"""Random batches from shards: against RAM, against the throughput of the disk, and against h5py."""

import gc
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count, cycle
from pathlib import Path
from typing import Any
from unittest.mock import patch

import data
import h5py
import numpy as np
import torch
from harness import Row, Setting, cpu_note, figure, interleaved, quotients
from numpy.typing import NDArray

from ood_heatmap.cache.reader import _LARGE_ROW
from ood_heatmap.cache.shards import Rows, open_rows, write_shard
from ood_heatmap.pipeline import feed as pipeline_feed
from ood_heatmap.pipeline.feed import (
    TrainingSet,
    _allocate_ring,
    _BatchReader,
    _iter_groups,
    _StreamingFeed,
)

CPU = torch.device("cpu")
BATCH = 200
BARS = {"shard order": 0.95, "global shuffle": 0.80}
BAR_DISK = 0.90
BAR_CHUNKED, BAR_CONTIGUOUS = 100, 10
# reads that are under way at once when the disk itself is timed, and the bytes of one in sequence
DISK_THREADS, DISK_BYTES = 16, 4 << 20
Int64 = NDArray[np.int64]
Gather = Callable[[Int64], object]


def rows(setting: Setting) -> Iterator[Row]:
    """Compare with RAM for both orders, with the disk, then with h5py."""
    num_ood = setting.pick(quick=4_000 + pipeline_feed._CHUNK, cpu=20_000)
    training_set = data.training_set(setting.scratch / "feed", 1_000, num_ood)
    columns = training_set.ood_columns
    ram = {name: item.read() for name, item in columns.items()}
    for order, bar in BARS.items():
        readers, note = Readers(columns["heatmap"], ram["heatmap"]), "heatmaps, 3 x 32 x 32 int16"
        yield against_ram(
            setting, f"Rows.take, {order}", order, bar, readers.cache, readers.ram, num_ood, note
        )
    for order, bar in BARS.items():
        ours, reference = streaming(training_set, ram, setting.device)
        note = "heatmaps, 512 features and prediction, as one reader thread fills a batch"
        yield against_ram(
            setting, f"streaming feed, {order}", order, bar, ours, reference, num_ood, note
        )
    yield from against_h5py(setting, columns["heatmap"], ram["heatmap"])
    # what is mapped cannot be dropped from the page cache
    del training_set, columns, ram, readers, ours, reference
    yield from of_images(setting, "32 px", setting.scratch / "feed", BATCH)
    yield from of_images(setting, "224 px", large_rows(setting), setting.pick(quick=20, cpu=50))


def large_rows(setting: Setting) -> Path:
    """Write rows of the size of ImageNet's: 224 px, 2048 features, a map of 2048 x 7 x 7."""
    folder, size = setting.scratch / "large", setting.pick(quick=40, cpu=180)
    generator = np.random.default_rng(0)
    shared: dict[str, NDArray[Any]] = {
        "features": generator.random((size, 2048), np.float32),
        "prediction": np.zeros(size, np.int32),
        "feature_maps_1": generator.random((size, 2048, 7, 7), np.float32).astype(np.float16),
    }
    heatmap = generator.integers(-255, 256, (size, 3, 224, 224), np.int16)
    for name in ("id", "ood"):
        (folder / name).mkdir(parents=True)
    write_shard(folder / "id" / "0.h5", {name: item[:20] for name, item in shared.items()})
    for number in range(setting.pick(quick=3, cpu=8)):
        write_shard(folder / "ood" / f"{number}.h5", {**shared, "heatmap": heatmap})
    return folder


def of_images(setting: Setting, size: str, folder: Path, batch: int) -> Iterator[Row]:
    """Compare the whole streaming feed with a gather from RAM, then cold with the disk."""
    run = StreamedFeed(folder, batch)
    epochs = setting.pick(quick=1, cpu=10 if size == "32 px" else 2)
    for order in BARS:
        variants = {"ours": run.epochs(order, epochs), "reference": run.from_ram(order, epochs)}
        times = interleaved(variants, setting.windows, CPU)
        ratios = quotients(times["reference"].wall, times["ours"].wall)
        note = (
            f"{run.note}, {run.feed.num_readers} reader threads, warm page cache, against "
            f"numpy.take(out=) in one; {cpu_note(times['reference'], times['ours'])}"
        )
        name = f"whole streaming feed, {size}, {order}: share of the gather from RAM"
        yield Row(name, ratios, 0.95, note)
    run.arrays.clear()
    # small rows never go past the page cache
    for direct in (False, True) if run.row_bytes >= _LARGE_ROW else (False,):
        for order in BARS:
            yield from against_disk(setting, run, size, order, direct=direct)


def against_disk(
    setting: Setting, run: "StreamedFeed", size: str, order: str, *, direct: bool
) -> Iterator[Row]:
    """Compare an epoch that finds nothing in the page cache with the rate of the disk itself."""
    try:
        disk = run.disk_reads(random=order == "global shuffle")
        os.close(os.open(run.files[0], os.O_RDONLY | os.O_DIRECT))
    # tmpfs and some network file systems
    except (OSError, AttributeError):
        return
    variants = {"ours": run.epochs(order, 1), "disk": disk}
    times = interleaved(variants, setting.windows, CPU, lambda: run.forget(direct=direct))
    ratios = quotients(times["disk"].wall, times["ours"].wall)
    way = "past the page cache" if direct else "through the page cache"
    rates = (1 / np.median(times[name].wall) / 1e6 for name in ("disk", "ours"))
    own, ours = (figure(rate) for rate in rates)
    note = (
        f"{run.note}; {DISK_THREADS} direct reads at once of "
        f"{run.disk_bytes(random=order == 'global shuffle') >> 10} KiB get {own} MB/s, the feed "
        f"{ours} MB/s with {1e9 * np.median(times['ours'].cpu):.2g} s of CPU time per GB"
    )
    yield Row(
        f"cold streaming feed, {size}, {order}, {way}: share of the disk", ratios, BAR_DISK, note
    )


class StreamedFeed:
    """A streaming feed on a CPU, and what its speed is compared with.

    Args:
        folder: Shards in ``id`` and ``ood``.
        batch: Rows of a batch.
    """

    def __init__(self, folder: Path, batch: int) -> None:
        self.folder, self.files = folder, sorted(folder.glob("*/*.h5"))
        training_set = self.open()
        self.batch, self.num_rows = batch, len(training_set)
        self.feed = _StreamingFeed(training_set, CPU, batch)
        self.num_readers = self.feed.num_readers
        self.row_bytes = self.feed.slots[0].row_bytes
        # of the files: ID rows have no heatmap there
        self.bytes_read = sum(path.stat().st_size for path in self.files) / self.num_rows
        self.arrays = {
            name: item.read()
            for name, item in training_set.ood_columns.items()
            if name in (*training_set.names, "heatmap")
        }
        self.note = f"{self.num_rows:,} rows of {self.row_bytes / 1e3:.0f} kB, batch {batch}"

    def open(self) -> TrainingSet:
        """Open the shards."""
        id_columns, ood_columns = (
            open_rows(sorted((self.folder / name).glob("*.h5"))) for name in ("id", "ood")
        )
        return TrainingSet(id_columns, ood_columns, int("feature_maps_1" in id_columns))

    def epochs(self, order: str, num_epochs: int) -> Callable[[], int]:
        """Return a function that takes all batches of epochs, and says how many bytes it read."""
        remaining = orders(order, self.num_rows, self.batch)

        def work() -> int:
            batches = (batch for _ in range(num_epochs) for batch in next(remaining))
            taken = self.feed.batches(batches)
            return round(sum(len(batch.features) for batch in taken) * self.bytes_read)

        return work

    def from_ram(self, order: str, num_epochs: int) -> Callable[[], int]:
        """Return a function that gathers as many bytes from arrays into the same ring buffer."""
        num_rows = len(self.arrays["heatmap"])
        remaining, slots = orders(order, num_rows, self.batch), cycle(self.feed.slots)

        def work() -> int:
            taken = 0
            for _ in range(num_epochs):
                for batch, slot in zip(next(remaining), slots, strict=False):
                    for name, array in self.arrays.items():
                        np.take(array, batch, axis=0, out=slot.arrays[name], mode="clip")
                    taken += len(batch)
            return round(taken * self.bytes_read)

        return work

    def forget(self, *, direct: bool) -> None:
        """Open the shards anew and drop them from the page cache: mapped pages stay there."""
        self.feed.reader = None  # type: ignore[assignment]
        gc.collect()
        for path in self.files:
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self.feed.reader = _BatchReader(self.open(), direct=direct)
        self.feed.num_readers = pipeline_feed._NUM_DIRECT_READERS if direct else self.num_readers

    def disk_bytes(self, *, random: bool) -> int:
        """Return the size of the disk's own reads: at random, of the columns of a row."""
        blocks = max(1, self.row_bytes // (2 * mmap.PAGESIZE))
        return blocks * mmap.PAGESIZE if random else DISK_BYTES

    def disk_reads(self, *, random: bool) -> Callable[[], int]:
        """Return a function that reads all files past the page cache, and says how many bytes."""
        size = self.disk_bytes(random=random)
        reads = [
            (number, offset)
            for number, path in enumerate(self.files)
            for offset in range(0, path.stat().st_size, size)
        ]
        if random:
            reads = [reads[number] for number in np.random.default_rng(0).permutation(len(reads))]

        def work() -> int:
            with opened_direct(self.files) as files, ThreadPoolExecutor(DISK_THREADS) as executor:
                # each thread takes every sixteenth read, so that they go through the files together
                parts = (reads[number::DISK_THREADS] for number in range(DISK_THREADS))
                return sum(executor.map(lambda part: read_blocks(files, part, size), parts))

        return work


@contextmanager
def opened_direct(paths: list[Path]) -> Iterator[list[int]]:
    """Yield descriptors for reads past the page cache."""
    files = [os.open(path, os.O_RDONLY | os.O_DIRECT) for path in paths]
    try:
        yield files
    finally:
        for file in files:
            os.close(file)


def read_blocks(files: list[int], reads: list[tuple[int, int]], size: int) -> int:
    """Read blocks of files, one after the other; return the bytes."""
    with mmap.mmap(-1, size) as buffer:
        return sum(os.preadv(files[number], [buffer], offset) for number, offset in reads)


class Readers:
    """The same gather of one column, from the cache and from RAM, into the same buffer."""

    def __init__(self, column: Rows, array: NDArray[Any]) -> None:
        self.column, self.array = column, array
        self.out = np.empty((BATCH, *column.shape[1:]), column.dtype)

    def cache(self, batch: Int64) -> None:
        """Gather from the memory-mapped shards."""
        self.column.take(batch, out=self.out)

    def ram(self, batch: Int64) -> None:
        """Gather from an array; fastest with ``mode="clip"``, where NumPy makes no second copy."""
        np.take(self.array, batch, axis=0, out=self.out, mode="clip")


def streaming(
    training_set: TrainingSet, ram: Mapping[str, NDArray[Any]], device: torch.device
) -> tuple[Gather, Gather]:
    """Return the streaming feed's gather of all columns, and the same from RAM."""
    buffers, outs, *_ = (
        {name: item.numpy() for name, item in slot.items()}
        for slot in _allocate_ring(training_set, device, BATCH)
    )
    reader = _BatchReader(training_set)

    def ours(batch: Int64) -> None:
        reader.read(batch + training_set.num_id, buffers)

    def reference(batch: Int64) -> None:
        for name, out in outs.items():
            np.take(ram[name], batch, axis=0, out=out, mode="clip")

    return ours, reference


def orders(kind: str, num_rows: int, size: int = BATCH) -> Iterator[list[Int64]]:
    """Yield the batches of each epoch."""
    # so few rows are one group, which is a full shuffle: use groups of a single chunk here
    group = 1 if kind == "shard order" else pipeline_feed._GROUP
    for epoch in count():
        with patch.object(pipeline_feed, "_GROUP", group):
            order = np.concatenate(list(_iter_groups(num_rows, 0, epoch)))
        # ascending in each batch, as in training
        starts = range(0, num_rows - size + 1, size)
        yield [np.sort(order[start : start + size]) for start in starts]


def against_ram(
    setting: Setting,
    name: str,
    order: str,
    bar: float,
    ours: Gather,
    reference: Gather,
    num_rows: int,
    note: str,
) -> Row:
    """Compare a gather with the same gather from RAM, in the same order."""
    epochs = setting.pick(quick=1, cpu=20)
    variants = {
        "ours": epoch_of(ours, orders(order, num_rows), epochs),
        "reference": epoch_of(reference, orders(order, num_rows), epochs),
    }
    times = interleaved(variants, setting.windows, setting.device)
    note = (
        f"{num_rows:,} rows in a warm page cache, batch {BATCH}, against numpy.take(out=); {note}; "
        f"{cpu_note(times['reference'], times['ours'])}"
    )
    ratios = quotients(times["reference"].wall, times["ours"].wall)
    return Row(f"{name}: share of the gather from RAM", ratios, bar, note)


def epoch_of(work_on: Gather, batches: Iterator[list[Int64]], epochs: int) -> Callable[[], int]:
    """Return a function that gathers a few epochs and returns the number of rows."""

    def work() -> int:
        done = 0
        for _ in range(epochs):
            for batch in next(batches):
                work_on(batch)
                done += len(batch)
        return done

    return work


def against_h5py(setting: Setting, column: Rows, array: NDArray[Any]) -> Iterator[Row]:
    """Compare with fancy indexing of a plain HDF5 dataset, in a global shuffle."""
    readers = Readers(column, array)
    with (
        naive(setting.scratch / "contiguous.h5", array, chunks=None) as contiguous,
        naive(setting.scratch / "chunked.h5", array, chunks=True) as chunked,
    ):
        chunks = chunked["heatmap"].chunks
        variants = {
            "ours": epoch_of(readers.cache, orders("global shuffle", len(array)), 1),
            "contiguous": some_of(contiguous["heatmap"], setting.pick(quick=3, cpu=10)),
            "chunked": some_of(chunked["heatmap"], setting.pick(quick=1, cpu=3)),
        }
        times = interleaved(variants, setting.windows, setting.device)
    layouts = {"contiguous": (BAR_CONTIGUOUS, "no chunks"), "chunked": (BAR_CHUNKED, chunks)}
    for layout, (bar, shape) in layouts.items():
        ratios = quotients(times[layout].wall, times["ours"].wall)
        note = f"{len(array):,} heatmaps, batch {BATCH}, global shuffle; {shape}"
        yield Row(f"Rows.take: h5py fancy indexing, {layout} / ours", ratios, bar, note)


def naive(path: Path, array: NDArray[Any], *, chunks: bool | None) -> h5py.File:
    """Return an open HDF5 file with one dataset, laid out as h5py does on its own."""
    with h5py.File(path, "w") as file:
        file.create_dataset("heatmap", data=array, chunks=chunks)
    return h5py.File(path, "r")


def some_of(dataset: h5py.Dataset, num_batches: int) -> Callable[[], int]:
    """Return a function that reads a few batches by fancy indexing."""
    epochs = orders("global shuffle", len(dataset))

    def work() -> int:
        for batch in next(epochs)[:num_batches]:
            # h5py supports only ascending indices
            ascending = np.argsort(batch)
            out = np.empty((BATCH, *dataset.shape[1:]), dataset.dtype)
            out[ascending] = dataset[batch[ascending]]
        return num_batches * BATCH

    return work
