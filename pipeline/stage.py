"""The protocol of every stage: lock, resume or refuse, shard schedule, atomic writes, commit.

A stage is started (its inputs are written down), filled with whole files whose checksums are
recorded before they get their names, and committed (the manifest, written last). Started again
with equal inputs it resumes; with others it is refused.
"""

import contextlib
import hashlib
import json
import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ood_heatmap import __version__
from ood_heatmap.cache.files import (
    append_text,
    locked,
    make_directory,
    remove_directory,
    remove_scratch,
    replacing,
    require_space,
    sync,
    write_json,
)
from ood_heatmap.cache.manifest import (
    FORMAT,
    MANIFEST,
    UNFINISHED,
    FileRecord,
    Manifest,
    abbreviate,
    check_size,
    differing_fields,
    hash_json,
    read_json,
    write_manifest,
)
from ood_heatmap.cache.shards import Column, map_shard, read_attributes, write_shard
from ood_heatmap.distributed import broadcast, is_main, rank, world_size
from ood_heatmap.errors import DamagedCacheError, OodHeatmapError, StaleCacheError
from ood_heatmap.images import ImageSet
from ood_heatmap.pipeline.meter import Meter
from ood_heatmap.pipeline.results import Results
from ood_heatmap.pipeline.run import COMMANDS, format_command, read_manifest

log = logging.getLogger(__name__)

CHECKPOINT = "last.ckpt"  # of a stage that has one, while it is unfinished
# checksums of the files that one rank has written, while the stage is unfinished
_JOURNAL, _JOURNALS = "checksums-{:05d}.jsonl", "checksums-*.jsonl"


@contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold a run's lock on rank 0, for all ranks."""
    with locked(run) if is_main() else nullcontext():
        yield


@dataclass
class Stage:
    """The directory of a stage while it is being made.

    Args:
        run: The run directory.
        name: Of the stage and its directory.
        inputs: All that the result depends on, known before the work; JSON.
    """

    run: Path
    name: str
    inputs: Mapping[str, Any]
    _records: dict[str, list[FileRecord]] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        # as it will be read back: tuples are lists then
        self.inputs = json.loads(json.dumps(self.inputs))

    @property
    def directory(self) -> Path:
        """Where the stage's files are."""
        return self.run / self.name

    @property
    def fingerprint(self) -> str:
        """sha256 of the inputs, written into every shard."""
        return hash_json([FORMAT, self.name, self.inputs])

    def resume_or_start(self, *, overwrite: bool) -> Manifest | None:
        """Make the directory, or resume in the one that is there; on rank 0, for all ranks.

        Args:
            overwrite: Discard what was made from other inputs, and make damaged files again.

        Returns:
            The manifest when the stage is complete, otherwise None.

        Raises:
            StaleCacheError: It was started with other inputs; names the fields.
            DamagedCacheError: A file of the complete stage is missing or damaged.
        """
        return broadcast(self.prepare(overwrite=overwrite) if is_main() else None)

    def prepare(self, *, overwrite: bool) -> Manifest | None:
        """Do the work of ``resume_or_start``, on rank 0 alone."""
        # what a kill in the middle of discarding has left
        remove_directory(self.directory.with_name(f".{self.name}.discarded"))
        try:
            manifest = self._manifest_before()
        except (StaleCacheError, DamagedCacheError):
            if not overwrite:
                raise
            self.discard()
            manifest = None
        make_directory(self.directory)
        remove_scratch(self.directory)
        if manifest is not None:
            if self._is_whole(manifest, overwrite=overwrite):
                self._remove_unfinished()
                return manifest
            self._reopen(manifest)
        elif not (self.directory / UNFINISHED).is_file():
            write_json(self.directory / UNFINISHED, {"format": FORMAT, "inputs": self.inputs})
        return None

    def _manifest_before(self) -> Manifest | None:
        """Return the manifest of a complete stage with these inputs, or None.

        Raises:
            StaleCacheError: The stage was started with other inputs, or by another version.
            DamagedCacheError: Nobody can tell any more.
        """
        command = format_command(self.run, self.name)
        if (self.directory / MANIFEST).is_file():
            manifest = read_manifest(self.run, self.name)
            self._require_inputs(manifest.inputs)
            return manifest
        if (self.directory / UNFINISHED).is_file():
            content = read_json(self.directory / UNFINISHED, command=command)
            if content.get("format") != FORMAT:
                raise StaleCacheError(
                    f"{self.directory} was started by another version. "
                    f"Run `{command}` again with --overwrite."
                )
            self._require_inputs(content.get("inputs"))
        return None

    def _require_inputs(self, before: object) -> None:
        fields = [
            f"{name} ({abbreviate(old)}, now {abbreviate(new)})"
            for name, old, new in differing_fields(before, self.inputs)
        ]
        if fields:
            raise StaleCacheError(
                f"{self.directory} was made with another {', '.join(fields[:4])}. "
                "Name another run directory, or add --overwrite to make this stage again."
            )

    def _is_whole(self, manifest: Manifest, *, overwrite: bool) -> bool:
        """Tell whether the files of a complete stage are there; with overwrite, every byte.

        Raises:
            DamagedCacheError: One is not, and it may not be made again.
        """
        if overwrite:
            return all(
                record.matches(self.directory / name) for name, record in manifest.files.items()
            )
        command = format_command(self.run, self.name)
        for name, record in manifest.files.items():
            check_size(self.directory / name, record, command=command)
        return True

    def _reopen(self, manifest: Manifest) -> None:
        """Make a complete stage unfinished: its whole files stay, the damaged are made again."""
        log.warning("%s is damaged: its damaged files are made again", self.directory)
        lines = [_journal_line(name, record) for name, record in manifest.files.items()]
        journal = self.directory / _JOURNAL.format(rank())
        with replacing(journal) as scratch:
            scratch.write_text("".join(lines), "utf-8")
        write_json(self.directory / UNFINISHED, {"format": FORMAT, "inputs": self.inputs})
        (self.directory / MANIFEST).unlink()
        sync(self.directory)
        self._records = None

    def discard(self) -> None:
        """Remove all that the stage holds, in one step as far as a reader can see."""
        remove_directory(self.directory)
        self._records = None

    def writing(self, name: str) -> AbstractContextManager[Path]:
        """Return a context that yields a temporary path for a file of the stage.

        On success the file's checksum is recorded, and then it gets its name: a file that is not
        on record, or not as it was recorded, is never taken into the stage.

        Raises:
            OodHeatmapError: The disk is full or read-only.
        """
        make_directory((self.directory / name).parent)
        return replacing(self.directory / name, record=lambda scratch: self.record(name, scratch))

    def record(self, name: str, path: Path) -> None:
        """Put the size and checksum of a file on record under the name that it will have."""
        record = FileRecord.from_file(path)
        journal = self.directory / _JOURNAL.format(rank())
        append_text(journal, _journal_line(name, record))
        if self._records is not None:
            self._records.setdefault(name, []).append(record)

    def is_intact(self, name: str) -> bool:
        """Tell whether a file of the unfinished stage is there, as one of its ranks wrote it."""
        path = self.directory / name
        records = self._all_records().get(name, [])
        return path.is_file() and bool(records) and FileRecord.from_file(path) in records

    def _all_records(self) -> dict[str, list[FileRecord]]:
        if self._records is None:
            found = defaultdict(list)
            for journal in sorted(self.directory.glob(_JOURNALS)):
                for line in journal.read_text("utf-8", "replace").splitlines():
                    # the last line of a killed process may be cut short: its file has no name yet
                    with contextlib.suppress(ValueError, KeyError, TypeError):
                        item = json.loads(line)
                        record = FileRecord(str(item["sha256"]), int(item["num_bytes"]))
                        found[str(item["name"])].append(record)
            self._records = dict(found)
        return self._records

    def commit(
        self,
        results: Results,
        names: Iterable[str],
        *,
        content: str = "",
        speed: Mapping[str, Any] | None = None,
    ) -> Manifest:
        """Write the manifest, the last file of a stage; on rank 0, after all ranks have written.

        Args:
            results: What the stage hands on.
            names: The stage's files, all written through ``writing`` or ``record``.
            content: sha256 of the images that were read, or "".
            speed: Throughput of this run of the stage; also a line of ``log.jsonl``.
        """
        self._records = None  # the other ranks have written since
        files = {name: self._record_of(name) for name in names}
        # as it will be read back
        values, speed = (json.loads(json.dumps(item)) for item in (results.to_json(), speed or {}))
        manifest = Manifest(self.name, self.inputs, content, values, files, speed)
        write_manifest(self.directory, manifest)
        self._remove_unfinished()
        if speed:
            log_event(self.run, COMMANDS[self.name], **speed)
        return manifest

    def _record_of(self, name: str) -> FileRecord:
        records = self._all_records().get(name, [])
        if len(set(records)) != 1:  # written more than once, or not through us: look
            return FileRecord.from_file(self.directory / name)
        check_size(self.directory / name, records[0], command=format_command(self.run, self.name))
        return records[0]

    def _remove_unfinished(self) -> None:
        """Remove what only an unfinished stage needs."""
        own = [self.directory / name for name in (UNFINISHED, CHECKPOINT)]
        for path in [*own, *self.directory.glob(_JOURNALS)]:
            path.unlink(missing_ok=True)


def _journal_line(name: str, record: FileRecord) -> str:
    # on a line of its own even after one that was cut short
    return "\n" + json.dumps({"name": name, **asdict(record)}) + "\n"


def log_event(run: Path, command: str, **stats: Any) -> None:
    """Append a line to ``log.jsonl`` of a run: when a command ran, on what, and how fast."""
    line = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "stage": command,
        "version": __version__,
        **stats,
    }
    try:
        append_text(run / "log.jsonl", json.dumps(line, ensure_ascii=False) + "\n")
    except OodHeatmapError as error:
        # the work is done: a log is no reason to fail
        log.warning("%s", error)


@dataclass(frozen=True)
class ShardTask:
    """A shard to be written.

    Args:
        name: Of its file.
        positions: ``(M,)`` int64, ascending, among all images of the kind.
        source_rows: ``(M,)`` int64 rows of the image set that they are made from: the shard's
            dataset ``row``, unreadable images aside.
    """

    name: str
    positions: NDArray[np.int64]
    source_rows: NDArray[np.int64]

    @property
    def rows_hash(self) -> str:
        """sha256 of the rows, an attribute of the shard: a shard of other rows is not this one."""
        return hashlib.sha256(np.asarray(self.source_rows, "<i8").tobytes()).hexdigest()


@dataclass(frozen=True)
class Schedule:
    """Which shards a stage consists of, and which of them this rank writes.

    Args:
        manifest: Of the complete stage, when nothing is left to do.
        tasks: All shards in order, by filename prefix.
        own: Those that this rank writes.
    """

    manifest: Manifest | None
    tasks: Mapping[str, Sequence[ShardTask]]
    own: Mapping[str, Sequence[ShardTask]]

    @property
    def names(self) -> list[str]:
        """Names of all shards, in order."""
        return [task.name for tasks in self.tasks.values() for task in tasks]

    @property
    def num_own_rows(self) -> int:
        """Rows that this rank writes."""
        return sum(len(task.positions) for tasks in self.own.values() for task in tasks)


def _make_tasks(
    prefix: str, source_rows: NDArray[np.int64], bytes_per_row: int, shard_mb: int
) -> list[ShardTask]:
    """Split rows into shards of at most ``shard_mb`` megabytes (of one row at least).

    A function of the rows and their size alone: neither the batch size nor the number of ranks
    moves a shard's borders.
    """
    size = max(1, shard_mb * 1_000_000 // bytes_per_row)
    starts = range(0, len(source_rows), size)
    return [
        ShardTask(
            f"{prefix}-{number:05d}.h5",
            np.arange(start, min(start + size, len(source_rows))),
            source_rows[start : start + size],
        )
        for number, start in enumerate(starts)
    ]


def schedule_shards(
    stage: Stage,
    images: ImageSet,
    rows_by_prefix: Mapping[str, NDArray[np.int64]],
    bytes_per_row: int,
    *,
    shard_mb: int,
    overwrite: bool,
) -> Schedule:
    """Start or resume a stage of shards; missing shards are assigned to ranks round-robin.

    Args:
        stage: The stage.
        images: The set that the shards are made from.
        rows_by_prefix: Rows of the set that the images of each kind are made from, by filename
            prefix of the kind's shards.
        bytes_per_row: Bytes of one image in a shard.
        shard_mb: Megabytes of a shard.
        overwrite: As of ``Stage.resume_or_start``.

    Raises:
        OodHeatmapError: The stage was made from something else, is damaged, or the disk is too
            small.
    """
    tasks = {
        prefix: _make_tasks(prefix, rows, bytes_per_row, shard_mb)
        for prefix, rows in rows_by_prefix.items()
    }
    everything = [task for part in tasks.values() for task in part]
    manifest, missing = broadcast(
        _scan_shards(stage, images, everything, overwrite=overwrite) if is_main() else (None, [])
    )
    if manifest is not None:
        log.info("%s is already complete", stage.directory)
        return Schedule(manifest, tasks, {})
    num_rows = sum(len(everything[number].positions) for number in missing)
    if is_main():
        log.info(
            "%s: %d rows to write, %.0f MB", stage.name, num_rows, num_rows * bytes_per_row / 1e6
        )
        require_space(stage.run, num_rows * bytes_per_row)
    own = {everything[number].name for number in missing[rank() :: world_size()]}
    mine = {prefix: [task for task in part if task.name in own] for prefix, part in tasks.items()}
    return Schedule(None, tasks, mine)


def _scan_shards(
    stage: Stage, images: ImageSet, tasks: Sequence[ShardTask], *, overwrite: bool
) -> tuple[Manifest | None, list[int]]:
    """Return the manifest of a complete stage, and the positions of its missing shards."""
    manifest = stage.prepare(overwrite=overwrite)
    try:
        missing = _missing_shards(stage, images, tasks, complete=manifest is not None)
    except StaleCacheError:
        if not overwrite:
            raise
        stage.discard()
        stage.prepare(overwrite=False)
        manifest, missing = None, list(range(len(tasks)))
    return manifest, missing


def _missing_shards(
    stage: Stage, images: ImageSet, tasks: Sequence[ShardTask], *, complete: bool
) -> list[int]:
    """Return the positions of shards that are not there, not whole, or hold other rows.

    Raises:
        StaleCacheError: The images of a finished shard have changed since.
        DamagedCacheError: The stage is complete and its shards are not those of the tasks.
    """
    missing = []
    for number, task in enumerate(tasks):
        path = stage.directory / task.name
        attributes = read_attributes(path) if path.is_file() else {}
        fits = (
            attributes.get("fingerprint") == stage.fingerprint
            and attributes.get("rows") == task.rows_hash
            and (complete or stage.is_intact(task.name))
        )
        if not fits:
            missing.append(number)
        elif attributes.get("content") != _current_content_hash(images, map_shard(path)["row"]):
            raise StaleCacheError(
                f"{path} was made from other images (images.content differs in rows "
                f"{task.source_rows[0]} to {task.source_rows[-1]} of {images.source}). "
                "Add --overwrite to make this stage again."
            )
    if complete and missing:
        raise DamagedCacheError(
            f"{stage.directory / tasks[missing[0]].name} is not the shard that belongs there. "
            f"Delete {stage.directory} and run `{format_command(stage.run, stage.name)}` again."
        )
    if len(missing) < len(tasks) and not complete:
        done = len(tasks) - len(missing)
        log.info("%s: %d of %d shards are already there", stage.directory, done, len(tasks))
    return missing


def _current_content_hash(images: ImageSet, rows: NDArray[np.int64]) -> str | None:
    """Return the hash of images as they are now, None when one is gone."""
    try:
        return content_hash(b"".join(images.digest(int(row)) for row in rows))
    except (OSError, OodHeatmapError):
        return None


def content_hash(digests: bytes) -> str:
    """Return the hash of a shard's images from the sha256 of each."""
    return hashlib.sha256(digests).hexdigest()


def stage_content(stage: Stage, names: Iterable[str]) -> str:
    """Return the hash of all images of a stage from those of its shards."""
    return hash_json([read_attributes(stage.directory / name)["content"] for name in names])


def require_rows(stage: Stage, tasks: Iterable[ShardTask]) -> None:
    """Make sure that the shards hold the rows of their tasks, each once and in order.

    Those that a shard has left out as unreadable, and counts, may be missing.

    Raises:
        DamagedCacheError: Names the shard.
    """
    for task in tasks:
        path = stage.directory / task.name
        num_skipped = int(read_attributes(path).get("num_skipped", -1))
        found, wanted = map_shard(path)["row"], iter(task.source_rows.tolist())
        in_order = all(row in wanted for row in found.tolist())
        if not in_order or len(found) + num_skipped != len(task.source_rows):
            raise DamagedCacheError(
                f"{path} does not hold the rows {task.source_rows[0]} to {task.source_rows[-1]} "
                "that it should, each once. Delete it and start the stage again."
            )


class BackgroundWriter:
    """Writes shards in a background thread while the next is computed.

    Errors surface on the next call.
    """

    def __init__(self, stage: Stage, meter: Meter) -> None:
        self.stage, self.meter = stage, meter
        self._executor = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def write(
        self,
        task: ShardTask,
        arrays: Mapping[str, NDArray[Any]],
        columns: Mapping[str, Column],
        *,
        content: str,
    ) -> None:
        """Write one shard after the one before.

        Args:
            task: Which.
            arrays: Its datasets.
            columns: What they must be.
            content: Hash of its images.
        """
        attributes: dict[str, str | int] = {
            "fingerprint": self.stage.fingerprint,
            "content": content,
            "rows": task.rows_hash,
            "num_skipped": len(task.positions) - len(arrays["row"]),
        }
        self.wait()
        self._last = self._executor.submit(self._write_now, task.name, arrays, columns, attributes)

    def _write_now(
        self,
        name: str,
        arrays: Mapping[str, NDArray[Any]],
        columns: Mapping[str, Column],
        attributes: Mapping[str, str | int],
    ) -> None:
        started = time.perf_counter()
        write_shard(
            self.stage.directory / name,
            arrays,
            attributes=attributes,
            columns=columns,
            record=lambda scratch: self.stage.record(name, scratch),
        )
        self.meter.thread_seconds["write"] += time.perf_counter() - started

    def wait(self) -> None:
        """Wait for the shard that is being written."""
        with self.meter.waiting("write"):
            if self._last is not None:
                self._last.result()

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(self, *_: object) -> None:
        # finished shards are kept on any error
        try:
            self.wait()
        finally:
            self._executor.shutdown()
