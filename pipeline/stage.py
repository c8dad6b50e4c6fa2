"""The protocol of every stage: lock, resume or refuse, shard schedule, atomic writes, commit.

Starting a stage records its inputs. Its files are written atomically, with their checksums recorded
before the rename. Committing writes the manifest as the last file. A stage started again resumes if
its inputs are equal, and raises if they differ.
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

# checkpoint of an unfinished stage that has one
CHECKPOINT = "last.ckpt"
# checksums of the files that one rank has written in an unfinished stage
_JOURNAL, _JOURNALS = "checksums-{:05d}.jsonl", "checksums-*.jsonl"


@contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold the lock of a run; rank 0 holds it for all ranks."""
    with locked(run) if is_main() else nullcontext():
        yield


@dataclass
class Stage:
    """The directory of a stage while it is being built.

    Args:
        run: The run directory.
        name: Name of the stage and its directory.
        inputs: Everything the result depends on and that is known at the start; JSON.
        environment: What its rounding depends on, see ``devices.describe_environment``.
    """

    run: Path
    name: str
    inputs: Mapping[str, Any]
    environment: Mapping[str, Any] = field(default_factory=dict)
    _records: dict[str, list[FileRecord]] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        # normalize to what is read back from JSON: tuples become lists
        self.inputs = json.loads(json.dumps(self.inputs))

    @property
    def directory(self) -> Path:
        """Directory of the stage."""
        return self.run / self.name

    @property
    def fingerprint(self) -> str:
        """sha256 of the inputs, stored in every shard."""
        return hash_json([FORMAT, self.name, self.inputs])

    def resume_or_start(self, *, overwrite: bool) -> Manifest | None:
        """Start the stage, or resume it if its directory exists; rank 0 acts for all ranks.

        Args:
            overwrite: Discard a stage made from different inputs, and rebuild damaged files.

        Returns:
            The manifest if the stage is complete, otherwise None.

        Raises:
            StaleCacheError: The stage was started with different inputs; names the fields.
            DamagedCacheError: A file of the complete stage is missing or damaged.
        """
        return broadcast(self.prepare(overwrite=overwrite) if is_main() else None)

    def prepare(self, *, overwrite: bool) -> Manifest | None:
        """Start or resume as ``resume_or_start`` does, without broadcasting; call it on rank 0."""
        # leftover of a run killed while discarding
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
            if self._is_undamaged(manifest, overwrite=overwrite):
                self._remove_unfinished()
                return manifest
            self._reopen(manifest)
        self._write_unfinished(self._environments())
        return None

    def _environments(self) -> list[Mapping[str, Any]]:
        """Return the environments in which the unfinished stage was computed so far."""
        path = self.directory / UNFINISHED
        if not path.is_file():
            return []
        found = read_json(path, command=format_command(self.run, self.name)).get("environments", [])
        return [item for item in found if isinstance(item, Mapping)]

    def _write_unfinished(self, before: Sequence[Mapping[str, Any]]) -> None:
        """Record inputs and environments of the unfinished stage; warn if those differ.

        Args:
            before: Environments in which it was computed so far.
        """
        is_new = bool(self.environment) and self.environment not in before
        if before and is_new:
            changes = differing_fields(before[-1], self.environment)
            log.warning(
                "%s was started with another %s: what is computed now may be rounded differently",
                self.directory,
                ", ".join(f"{name} ({old}, now {new})" for name, old, new in changes),
            )
        if is_new or not (self.directory / UNFINISHED).is_file():
            environments = [*before, self.environment] if is_new else before
            content = {"format": FORMAT, "inputs": self.inputs, "environments": environments}
            write_json(self.directory / UNFINISHED, content)

    def _manifest_before(self) -> Manifest | None:
        """Return the manifest of a complete stage with these inputs, or None.

        Raises:
            StaleCacheError: The stage was started with different inputs, or by another version.
            DamagedCacheError: The manifest or the recorded inputs cannot be read.
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
                f"{self.directory} was made with a different {', '.join(fields[:4])}. "
                "Use another run directory, or add --overwrite to rebuild this stage."
            )

    def _is_undamaged(self, manifest: Manifest, *, overwrite: bool) -> bool:
        """Return whether the files of a complete stage are undamaged.

        Sizes are always compared, checksums only with ``overwrite``.

        Raises:
            DamagedCacheError: A file is damaged, and ``overwrite`` is not given.
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
        """Turn a complete stage into an unfinished one: intact files stay, damaged are rebuilt."""
        log.warning("%s is damaged: rebuilding its damaged files", self.directory)
        lines = [_journal_line(name, record) for name, record in manifest.files.items()]
        journal = self.directory / _JOURNAL.format(rank())
        with replacing(journal) as scratch:
            scratch.write_text("".join(lines), "utf-8")
        self._write_unfinished(manifest.speed.get("environments", []))
        (self.directory / MANIFEST).unlink()
        sync(self.directory)
        self._records = None

    def discard(self) -> None:
        """Remove the stage atomically, as seen by readers."""
        remove_directory(self.directory)
        self._records = None

    def writing(self, name: str) -> AbstractContextManager[Path]:
        """Return a context manager that yields a temporary path for a file of the stage.

        On success the file's checksum is recorded and then the file is renamed: a file without a
        record, or with another checksum, never becomes part of the stage.

        Raises:
            OodHeatmapError: The disk is full or read-only.
        """
        make_directory((self.directory / name).parent)
        return replacing(self.directory / name, record=lambda scratch: self.record(name, scratch))

    def record(self, name: str, path: Path) -> None:
        """Record the size and checksum of a file under its final name."""
        record = FileRecord.from_file(path)
        journal = self.directory / _JOURNAL.format(rank())
        append_text(journal, _journal_line(name, record))
        if self._records is not None:
            self._records.setdefault(name, []).append(record)

    def is_intact(self, name: str) -> bool:
        """Return whether a file of the unfinished stage exists and matches a recorded checksum."""
        path = self.directory / name
        records = self._all_records().get(name, [])
        return path.is_file() and bool(records) and FileRecord.from_file(path) in records

    def _all_records(self) -> dict[str, list[FileRecord]]:
        if self._records is None:
            records = defaultdict(list)
            for journal in sorted(self.directory.glob(_JOURNALS)):
                for line in journal.read_text("utf-8", "replace").splitlines():
                    # a killed process may truncate its last line: that file was not yet renamed
                    with contextlib.suppress(ValueError, KeyError, TypeError):
                        item = json.loads(line)
                        record = FileRecord(str(item["sha256"]), int(item["num_bytes"]))
                        records[str(item["name"])].append(record)
            self._records = dict(records)
        return self._records

    def commit(
        self,
        results: Results,
        names: Iterable[str],
        *,
        content: str = "",
        speed: Mapping[str, Any] | None = None,
    ) -> Manifest:
        """Write the manifest, the last file of a stage; call it on rank 0 after a barrier.

        Args:
            results: Results of the stage.
            names: Names of the stage's files, all written through ``writing`` or ``record``.
            content: sha256 of the images that were read, or "".
            speed: Throughput of this run, also logged to ``log.jsonl``. With the environments in
                which the stage was computed it is in the manifest.
        """
        # read the journals again: other ranks have written since
        self._records = None
        files = {name: self._find_record(name) for name in names}
        about = {**(speed or {}), "environments": self._environments()}
        # normalize to what is read back from JSON
        values, about = (json.loads(json.dumps(item)) for item in (results.to_json(), about))
        manifest = Manifest(self.name, self.inputs, content, values, files, about)
        write_manifest(self.directory, manifest)
        self._remove_unfinished()
        if speed:
            log_event(self.run, COMMANDS[self.name], **about)
        return manifest

    def _find_record(self, name: str) -> FileRecord:
        records = self._all_records().get(name, [])
        # written several times, or without a record: hash the file
        if len(set(records)) != 1:
            return FileRecord.from_file(self.directory / name)
        check_size(self.directory / name, records[0], command=format_command(self.run, self.name))
        return records[0]

    def _remove_unfinished(self) -> None:
        """Remove the files that only an unfinished stage needs."""
        paths = [self.directory / name for name in (UNFINISHED, CHECKPOINT)]
        for path in [*paths, *self.directory.glob(_JOURNALS)]:
            path.unlink(missing_ok=True)


def _journal_line(name: str, record: FileRecord) -> str:
    # the leading line break ends a truncated line before it
    return "\n" + json.dumps({"name": name, **asdict(record)}) + "\n"


def log_event(run: Path, command: str, **stats: Any) -> None:
    """Append a line with time, version and stats of a command to ``log.jsonl`` of a run."""
    line = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "stage": command,
        "version": __version__,
        **stats,
    }
    try:
        append_text(run / "log.jsonl", json.dumps(line, ensure_ascii=False) + "\n")
    except OodHeatmapError as error:
        # the stage is complete: do not fail because of the log
        log.warning("%s", error)


@dataclass(frozen=True)
class ShardTask:
    """A shard to write.

    Args:
        name: Name of the file.
        positions: ``(M,)`` int64 positions, ascending, among all images with the same prefix.
        source_rows: ``(M,)`` int64 rows of the image set; except for unreadable images, the shard's
            dataset ``row``.
    """

    name: str
    positions: NDArray[np.int64]
    source_rows: NDArray[np.int64]

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


def _make_tasks(
    prefix: str, source_rows: NDArray[np.int64], bytes_per_row: int, shard_mb: int
) -> list[ShardTask]:
    """Split rows into shards of at most ``shard_mb`` megabytes, at least one row each.

    Shard boundaries depend only on the rows and their size, not on the batch size or world size.
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
        rows_by_prefix: Maps filename prefix to the rows of the set.
        bytes_per_row: Bytes of one row of a shard.
        shard_mb: Maximum size of a shard in megabytes.
        overwrite: As for ``Stage.resume_or_start``.

    Raises:
        OodHeatmapError: The stage was made from different inputs or is damaged, or the disk is too
            small.
    """
    tasks = {
        prefix: _make_tasks(prefix, rows, bytes_per_row, shard_mb)
        for prefix, rows in rows_by_prefix.items()
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
        require_space(stage.run, num_rows * bytes_per_row)
    own_names = {all_tasks[number].name for number in missing[rank() :: world_size()]}
    own = {
        prefix: [task for task in same_prefix if task.name in own_names]
        for prefix, same_prefix in tasks.items()
    }
    return Schedule(None, tasks, own)


def _scan_shards(
    stage: Stage, images: ImageSet, tasks: Sequence[ShardTask], *, overwrite: bool
) -> tuple[Manifest | None, list[int]]:
    """Return the manifest if the stage is complete, and the positions of missing shards."""
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
    """Return the positions of shards that are missing, damaged or contain other rows.

    Raises:
        StaleCacheError: The images of a finished shard have changed.
        DamagedCacheError: The stage is complete, but its shards are not those of the tasks.
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
                "Add --overwrite to rebuild this stage."
            )
    if complete and missing:
        raise DamagedCacheError(
            f"{stage.directory / tasks[missing[0]].name} is not the expected shard. "
            f"Delete {stage.directory} and run `{format_command(stage.run, stage.name)}` again."
        )
    if len(missing) < len(tasks) and not complete:
        done = len(tasks) - len(missing)
        log.info("%s: %d of %d shards already exist", stage.directory, done, len(tasks))
    return missing


def _current_content_hash(images: ImageSet, rows: NDArray[np.int64]) -> str | None:
    """Hash images as they are now; None if one cannot be read any more."""
    try:
        return content_hash(b"".join(images.digest(int(row)) for row in rows))
    except (OSError, OodHeatmapError):
        return None


def content_hash(digests: bytes) -> str:
    """Hash the images of a shard, given their concatenated sha256 digests."""
    return hashlib.sha256(digests).hexdigest()


def stage_content(stage: Stage, names: Iterable[str]) -> str:
    """Hash all images of a stage, given the content hashes of its shards."""
    return hash_json([read_attributes(stage.directory / name)["content"] for name in names])


def require_rows(stage: Stage, tasks: Iterable[ShardTask]) -> None:
    """Verify that the shards contain the rows of their tasks, each once and in order.

    Rows that a shard has skipped as unreadable, and counted, may be missing.

    Raises:
        DamagedCacheError: A shard has other rows; names the shard.
    """
    for task in tasks:
        path = stage.directory / task.name
        num_skipped = int(read_attributes(path).get("num_skipped", -1))
        found, wanted = map_shard(path)["row"], iter(task.source_rows.tolist())
        in_order = all(row in wanted for row in found.tolist())
        if not in_order or len(found) + num_skipped != len(task.source_rows):
            raise DamagedCacheError(
                f"{path} does not contain each of the rows {task.source_rows[0]} to "
                f"{task.source_rows[-1]} once. Delete it and run the stage again."
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
        """Enqueue one shard; waits for the previous one first.

        Args:
            task: The shard.
            arrays: Maps dataset name to array.
            columns: Expected dtype and shape of each dataset.
            content: Hash of the shard's images.
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
        """Wait for the pending write, and raise its error."""
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
