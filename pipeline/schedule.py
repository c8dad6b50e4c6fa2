"""The shards of a stage: which rows each contains, which are missing, and writing them.

The schedule follows from the rows and their size alone, so that the shards are the same for any
number of processes and any batch size.
"""

import contextlib
import hashlib
import logging
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from ood_heatmap.cache.files import (
    require_space,
)
from ood_heatmap.cache.manifest import (
    HASH_THREADS,
    UNFINISHED,
    Manifest,
    hash_json,
)
from ood_heatmap.cache.shards import (
    Column,
    Header,
    Rows,
    map_shard,
    open_rows,
    read_header,
    write_shard,
)
from ood_heatmap.cache.stamps import (
    Stamp,
    read_stamps,
    write_stamps,
)
from ood_heatmap.cores import num_cores
from ood_heatmap.distributed import broadcast, is_main, rank, world_size
from ood_heatmap.errors import DamagedCacheError, OodHeatmapError, StaleCacheError
from ood_heatmap.images import ImageSet
from ood_heatmap.pipeline.meter import Meter
from ood_heatmap.pipeline.run import format_command
from ood_heatmap.pipeline.stage import INTERMEDIATE, Stage

log = logging.getLogger(__name__)

# each is a memory map in every later stage
_MAX_SHARDS = 20_000
# network file systems cache directory entries for up to a minute
_SHARED_SECONDS = 90.0
# threads that write shards, each of which holds one in memory
_MAX_WRITERS, _CORES_PER_WRITER = 4, 4


@dataclass(frozen=True)
class ShardTask:
    """A shard to write.

    Args:
        name: Name of the file.
        positions: ``(M,)`` int64 positions, ascending, among all images with the same prefix.
        source_rows: ``(M,)`` int64 rows of the image set; except for unreadable images, the shard's
            dataset ``row``.
        source: Hash of the stamps of those images; "" if they have none.
    """

    name: str
    positions: NDArray[np.int64]
    source_rows: NDArray[np.int64]
    source: str = ""

    @property
    def rows_hash(self) -> str:
        """sha256 of the rows, stored in the shard to detect one with other rows."""
        return hashlib.sha256(np.asarray(self.source_rows, "<i8").tobytes()).hexdigest()


@dataclass(frozen=True)
class Schedule:
    """The shards of a stage, and those assigned to this rank.

    Args:
        manifest: Manifest of the stage if it is complete, otherwise None.
        tasks: All shards in order, by filename prefix.
        own: The shards that this rank writes, by filename prefix.
    """

    manifest: Manifest | None
    tasks: Mapping[str, Sequence[ShardTask]]
    own: Mapping[str, Sequence[ShardTask]]

    @property
    def names(self) -> list[str]:
        """Filenames of all shards, in order."""
        return [task.name for tasks in self.tasks.values() for task in tasks]

    @property
    def num_own_rows(self) -> int:
        """Number of rows that this rank writes."""
        return sum(len(task.positions) for tasks in self.own.values() for task in tasks)


def rows_per_shard(num_rows: int, bytes_per_row: int, shard_mb: int) -> int:
    """Return the rows of a shard: at most ``shard_mb`` megabytes, and at least one.

    More if a stage of ``num_rows`` would otherwise have more than 20,000 shards: each is a memory
    map, and Linux allows a process 65,530.
    """
    return max(1, shard_mb * 1_000_000 // bytes_per_row, -(-num_rows // _MAX_SHARDS))


def _make_tasks(
    prefix: str, images: ImageSet, source_rows: NDArray[np.int64], size: int
) -> list[ShardTask]:
    """Split rows into shards of ``size`` rows.

    Shard boundaries depend only on the rows and their size, not on the batch size or world size.
    """
    starts = range(0, len(source_rows), size)
    return [
        ShardTask(
            f"{prefix}-{number:05d}.h5",
            np.arange(start, min(start + size, len(source_rows))),
            source_rows[start : start + size],
            source_hash(images, source_rows[start : start + size]),
        )
        for number, start in enumerate(starts)
    ]


def source_hash(images: ImageSet, rows: NDArray[np.int64]) -> str:
    """Hash size and time of the files of images, to detect changes without reading them.

    Returns:
        An empty string if size and time are unknown.
    """
    if images.stamps is None:
        return ""
    return hashlib.sha256(images.stamps[rows].astype("<i8").tobytes()).hexdigest()


def schedule_shards(
    stage: Stage,
    images: ImageSet,
    rows_by_prefix: Mapping[str, NDArray[np.int64]],
    bytes_per_row: int,
    *,
    shard_mb: int,
    overwrite: bool,
    other_bytes: int = 0,
    computed_bytes: int = 0,
) -> Schedule:
    """Start or resume a stage of shards; missing shards are assigned to ranks round-robin.

    Args:
        stage: The stage.
        images: The set that the shards are made from.
        rows_by_prefix: Maps filename prefix to the rows of the set.
        bytes_per_row: Bytes of one row of a shard.
        shard_mb: Maximum size of a shard in megabytes.
        overwrite: As for ``Stage.resume_or_start``.
        other_bytes: Bytes of the files that are written beside the shards.
        computed_bytes: Bytes of what a row is computed from, if it is larger: ``shard_mb`` bounds
            the memory as well.

    Raises:
        OodHeatmapError: The stage was made from different inputs or is damaged, the disk is too
            small, or this rank sees another run directory than rank 0.
    """
    largest = max(bytes_per_row, computed_bytes)
    size = rows_per_shard(sum(map(len, rows_by_prefix.values())), largest, shard_mb)
    tasks = {
        prefix: _make_tasks(prefix, images, rows, size) for prefix, rows in rows_by_prefix.items()
    }
    all_tasks = [task for same_prefix in tasks.values() for task in same_prefix]
    manifest, missing = broadcast(
        _scan_shards(stage, images, all_tasks, overwrite=overwrite) if is_main() else (None, [])
    )
    if manifest is not None:
        log.info("%s is already complete", stage.directory)
        return Schedule(manifest, tasks, {})
    num_rows = sum(len(all_tasks[number].positions) for number in missing)
    if is_main():
        log.info(
            "%s: %d rows to write, %.0f MB", stage.name, num_rows, num_rows * bytes_per_row / 1e6
        )
        require_space(stage.run, num_rows * bytes_per_row + other_bytes)
    _require_shared(stage)
    own_names = {all_tasks[number].name for number in missing[rank() :: world_size()]}
    own = {
        prefix: [task for task in same_prefix if task.name in own_names]
        for prefix, same_prefix in tasks.items()
    }
    return Schedule(None, tasks, own)


def _require_shared(stage: Stage) -> None:
    """Verify that this rank sees the stage that rank 0 has started.

    Raises:
        OodHeatmapError: It does not, even after caches of a network file system have expired.
    """
    deadline = time.monotonic() + _SHARED_SECONDS
    while not (stage.directory / UNFINISHED).is_file():
        if time.monotonic() > deadline:
            raise OodHeatmapError(
                f"rank {rank()} on {socket.gethostname()} does not see {stage.directory}, which "
                "rank 0 has created. All nodes must share the run directory: use a path on a "
                "network file system that is the same on every node."
            )
        time.sleep(0.2)


def _scan_shards(
    stage: Stage, images: ImageSet, tasks: Sequence[ShardTask], *, overwrite: bool
) -> tuple[Manifest | None, list[int]]:
    """Return the manifest if the stage is complete, and the positions of missing shards."""
    manifest = stage.prepare(overwrite=overwrite)
    try:
        missing = _missing_shards(stage, images, tasks, manifest)
    except StaleCacheError:
        if not overwrite:
            raise
        stage.discard()
        stage.prepare(overwrite=False)
        manifest, missing = None, list(range(len(tasks)))
    return manifest, missing


def _missing_shards(
    stage: Stage, images: ImageSet, tasks: Sequence[ShardTask], manifest: Manifest | None
) -> list[int]:
    """Return the positions of shards that are missing, damaged or contain other rows.

    Args:
        stage: The stage.
        images: The set that the shards are made from.
        tasks: All shards.
        manifest: Manifest of the stage if it is complete, otherwise None.

    Raises:
        StaleCacheError: The images of a finished shard have changed.
        DamagedCacheError: The stage is complete, but its shards are not those of the tasks.
    """
    names = [task.name for task in tasks]
    found = stage.match_stamps(names) if manifest is None else _find_stamps(stage, manifest, names)
    finished = {
        task.name: found[task.name]
        for task in tasks
        if task.name in found and _contains(found[task.name], stage, task)
    }
    missing = [number for number, name in enumerate(names) if name not in finished]
    if manifest is not None and missing:
        raise DamagedCacheError(
            f"{stage.directory / names[missing[0]]} is not the expected shard. "
            f"Delete {stage.directory} and run `{format_command(stage.run, stage.name)}` again."
        )
    renewed = _require_same_images(
        stage, images, [(task, finished[task.name]) for task in tasks if task.name in finished]
    )
    if renewed and manifest is None:
        stage.append(renewed)
    elif renewed:
        write_stamps(stage.directory, {**found, **{item.name: item for item in renewed}}.values())
    if len(missing) < len(tasks) and manifest is None:
        done = len(tasks) - len(missing)
        log.info("%s: %d of %d shards already exist", stage.directory, done, len(tasks))
    return missing


def _find_stamps(stage: Stage, manifest: Manifest, names: Sequence[str]) -> dict[str, Stamp]:
    """Return the stamps of shards of a complete stage; unknown headers are read."""
    found = read_stamps(stage.directory, manifest)
    for name in manifest.files.keys() & set(names):
        path, stamp = stage.directory / name, found.get(name, Stamp(name, manifest.files[name]))
        if stamp.header is None or not stamp.fits(path):
            header = None
            with contextlib.suppress(DamagedCacheError):
                header = read_header(path)
            found[name] = replace(stamp, header=header)
    return found


def _require_same_images(
    stage: Stage, images: ImageSet, finished: Sequence[tuple[ShardTask, Stamp]]
) -> list[Stamp]:
    """Verify that shards were made from the current images.

    Images are read again only if size or time of a file was not recorded or has changed.

    Returns:
        Stamps with the current size and time of the images, of shards whose images were read.

    Raises:
        StaleCacheError: An image has changed.
    """
    changed = [item for item in finished if not item[0].source or item[0].source != item[1].source]
    if changed:
        num_rows = sum(len(task.source_rows) for task, _ in changed)
        log.info("%s: comparing %d images with those of finished shards", images.source, num_rows)
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        digests = _Digests(images, pool)
        for task, stamp in changed:
            rows = map_shard(stage.directory / task.name, stamp.header)["row"]
            content = digests.content_hash(rows)
            if stamp.header is None or stamp.header.attributes.get("content") != content:
                raise StaleCacheError(
                    f"{stage.directory / task.name} was made from other images (images.content "
                    f"differs in rows {task.source_rows[0]} to {task.source_rows[-1]} of "
                    f"{images.source}). Add --overwrite to rebuild this stage."
                )
    return [replace(stamp, source=task.source) for task, stamp in changed if task.source]


class _Digests:
    """The sha256 of the current images of a set; each image is read once, in threads."""

    def __init__(self, images: ImageSet, pool: ThreadPoolExecutor) -> None:
        self._images, self._pool = images, pool
        self._is_known = np.zeros(len(images), bool)
        self._digests = np.empty((len(images), 32), np.uint8)

    def content_hash(self, rows: NDArray[np.int64]) -> str | None:
        """Hash the current images; None if one can no longer be read."""
        unknown = np.unique(rows[~self._is_known[rows]])
        # adjacent rows to one thread: those of a Parquet file are read in groups
        parts = np.array_split(unknown, HASH_THREADS)
        try:
            digests = b"".join(self._pool.map(self._digests_of, parts))
        except (OSError, OodHeatmapError):
            return None
        self._digests[unknown] = np.frombuffer(digests, np.uint8).reshape(-1, 32)
        self._is_known[unknown] = True
        return content_hash(self._digests[rows].tobytes())

    def _digests_of(self, rows: NDArray[np.int64]) -> bytes:
        return b"".join(map(self._images.digest, rows.tolist()))


def _contains(stamp: Stamp, stage: Stage, task: ShardTask) -> bool:
    """Return whether a shard was written by this stage and for the rows of a task."""
    if stamp.header is None:
        return False
    attributes = stamp.header.attributes
    return (
        attributes.get("fingerprint") == stage.fingerprint
        and attributes.get("rows") == task.rows_hash
        # what is read of it later: the journal of a copied run can contain anything
        and "row" in stamp.header.datasets
        and isinstance(attributes.get("content"), str)
        and isinstance(attributes.get("num_skipped", -1), int)
    )


def content_hash(digests: bytes) -> str:
    """Hash the images of a shard, given their concatenated sha256 digests."""
    return hashlib.sha256(digests).hexdigest()


def stage_content(stage: Stage, names: Sequence[str]) -> str:
    """Hash all images of a stage, given the content hashes of its shards."""
    headers = stage.headers(names)
    return hash_json([_header(stage, headers, name).attributes["content"] for name in names])


def open_shards(stage: Stage, names: Sequence[str]) -> dict[str, Rows]:
    """Open the shards of an unfinished stage as one array per dataset."""
    return open_rows([stage.directory / name for name in names], headers=stage.headers(names))


def _header(stage: Stage, headers: Mapping[str, Header], name: str) -> Header:
    """Return the header of a shard, read from the file if it is unknown."""
    return headers.get(name) or read_header(stage.directory / name)


def require_rows(stage: Stage, tasks: Sequence[ShardTask]) -> None:
    """Verify that the shards contain the rows of their tasks, each once and in order.

    Rows that a shard has skipped as unreadable, and counted, may be missing.

    Raises:
        DamagedCacheError: A shard is missing or has other rows; names the shard.
    """
    headers = stage.headers([task.name for task in tasks])
    for task in tasks:
        path = stage.directory / task.name
        if not path.is_file():
            raise DamagedCacheError(
                f"{path} is missing: it was removed, or written by a rank on a node that does not "
                f"share {stage.run}. Run the same command again, on nodes that share it."
            )
        header = _header(stage, headers, task.name)
        num_skipped = int(header.attributes.get("num_skipped", -1))
        found = map_shard(path, header)["row"]
        if not _is_subsequence(found, task.source_rows) or len(found) + num_skipped != len(
            task.source_rows
        ):
            raise DamagedCacheError(
                f"{path} does not contain each of the rows {task.source_rows[0]} to "
                f"{task.source_rows[-1]} once. Delete it and run the stage again."
            )


def _is_subsequence(found: NDArray[np.int64], wanted: NDArray[np.int64]) -> bool:
    """Return whether values are in another array, in the same order."""
    if np.array_equal(found, wanted):
        return True
    remaining = iter(wanted.tolist())
    return all(value in remaining for value in found.tolist())


def _intermediate_name(task: ShardTask) -> str:
    """Return the name of the file with what is computed of a shard for the end of the stage."""
    return f"{Path(task.name).stem}{INTERMEDIATE}"


def write_intermediate(stage: Stage, task: ShardTask, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write what is computed of a shard for the end of the stage, which removes it.

    Call it before the shard is written, so that a shard taken over from a killed process has it.
    """
    with stage.writing(_intermediate_name(task)) as scratch:
        scratch.write_bytes(save(dict(arrays)))


def iter_intermediates(
    stage: Stage, tasks: Sequence[ShardTask]
) -> Iterator[dict[str, NDArray[Any]] | None]:
    """Yield what was computed of each shard; None if an earlier version wrote it."""
    names = [_intermediate_name(task) for task in tasks]
    intact = stage.match_stamps(names)
    for name in names:
        yield load((stage.directory / name).read_bytes()) if name in intact else None


def num_writers() -> int:
    """Return how many threads of this process write shards, each of which holds one in memory."""
    return max(1, min(_MAX_WRITERS, num_cores() // _CORES_PER_WRITER))


class BackgroundWriter:
    """Writes shards in background threads while the next is computed.

    Errors surface on a later call. One thread hashes and writes half a gigabyte per second; one
    shard per thread is held in memory.
    """

    def __init__(self, stage: Stage, meter: Meter) -> None:
        self.stage, self.meter = stage, meter
        self._num_threads = num_writers()
        self._executor = ThreadPoolExecutor(self._num_threads)
        self._pending: deque[Future[float]] = deque()

    def write(
        self,
        task: ShardTask,
        make_arrays: Callable[[], Mapping[str, NDArray[Any]]],
        columns: Mapping[str, Column],
        *,
        content: str,
    ) -> None:
        """Enqueue one shard; waits for the oldest pending one if all threads are busy.

        Args:
            task: The shard.
            make_arrays: Returns array by dataset name; called in the thread, so that the device
                gets its next batch meanwhile.
            columns: Expected dtype and shape of each dataset.
            content: Hash of the shard's images.
        """
        self._wait(self._num_threads - 1)
        self._pending.append(
            self._executor.submit(self._write_now, task, make_arrays, columns, content)
        )

    def _write_now(
        self,
        task: ShardTask,
        make_arrays: Callable[[], Mapping[str, NDArray[Any]]],
        columns: Mapping[str, Column],
        content: str,
    ) -> float:
        """Write one shard and return the seconds that it took."""
        started = time.perf_counter()
        arrays = make_arrays()
        attributes: dict[str, str | int] = {
            "fingerprint": self.stage.fingerprint,
            "content": content,
            "rows": task.rows_hash,
            "num_skipped": len(task.positions) - len(arrays["row"]),
        }
        write_shard(
            self.stage.directory / task.name,
            arrays,
            attributes=attributes,
            columns=columns,
            record=partial(self.stage.record, task.name, source=task.source),
        )
        return time.perf_counter() - started

    def _wait(self, num_pending: int) -> None:
        """Wait until at most so many writes are pending, and raise their errors."""
        with self.meter.waiting("write"):
            while len(self._pending) > num_pending:
                self.meter.thread_seconds["write"] += self._pending.popleft().result()

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(self, *_: object) -> None:
        # finished shards are kept on any error
        try:
            self._wait(0)
        finally:
            self._executor.shutdown()
