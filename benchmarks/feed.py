"""Random batches out of memory-mapped shards, against RAM and against plain h5py."""

from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import data
import h5py
import numpy as np
import torch
from harness import Row, Setting, cpu_note, interleaved, quotients
from numpy.typing import NDArray

from ood_heatmap.cache.shards import Rows
from ood_heatmap.pipeline import feed as pipeline_feed
from ood_heatmap.pipeline.feed import TrainingSet, _allocate_ring, _BatchReader, _iter_groups

BATCH = 200
BARS = {"shard order": 0.95, "global shuffle": 0.80}
BAR_CHUNKED, BAR_CONTIGUOUS = 100, 10
Int64 = NDArray[np.int64]
Gather = Callable[[Int64], object]


def rows(setting: Setting) -> Iterator[Row]:
    """Compare with RAM for both orders, then with h5py."""
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
        note = "heatmaps, 512 features and prediction, as the streaming feed's reader fills a batch"
        yield against_ram(
            setting, f"streaming feed, {order}", order, bar, ours, reference, num_ood, note
        )
    yield from against_h5py(setting, columns["heatmap"], ram["heatmap"])


class Readers:
    """The same gather of one column, from the cache and from RAM, into the same buffer."""

    def __init__(self, column: Rows, array: NDArray[Any]) -> None:
        self.column, self.array = column, array
        self.out = np.empty((BATCH, *column.shape[1:]), column.dtype)

    def cache(self, batch: Int64) -> None:
        """Gather out of the memory-mapped shards."""
        self.column.take(batch, out=self.out)

    def ram(self, batch: Int64) -> None:
        """Gather out of an array; ``clip`` spares NumPy a second copy, so this is its fastest."""
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


def orders(kind: str, num_rows: int) -> Iterator[list[Int64]]:
    """Yield the batches of one epoch after the other."""
    # so few rows would be one group, that is a plain shuffle: here a group is a single chunk
    group = 1 if kind == "shard order" else pipeline_feed._GROUP
    for epoch in count():
        with patch.object(pipeline_feed, "_GROUP", group):
            order = np.concatenate(list(_iter_groups(num_rows, 0, epoch)))
        # ascending in a batch, as the training takes them
        starts = range(0, num_rows - BATCH + 1, BATCH)
        yield [np.sort(order[start : start + BATCH]) for start in starts]


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
    """Compare one gather with the same from RAM, in the same order."""
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
    """Return a function that gathers a few epochs and says how many rows that were."""

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
            ascending = np.argsort(batch)  # h5py takes nothing else
            out = np.empty((BATCH, *dataset.shape[1:]), dataset.dtype)
            out[ascending] = dataset[batch[ascending]]
        return num_batches * BATCH

    return work
