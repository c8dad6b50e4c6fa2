"""The protocol of every stage: lock, resume or refuse, atomic writes, commit.

Starting a stage records its inputs. Its files are written atomically, with their checksums recorded
before the rename. Committing writes the manifest as the last file. A stage started again resumes if
its inputs are equal, and raises if they differ.
"""

import json
import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from ood_heatmap import __version__
from ood_heatmap.cache.files import (
    append_text,
    locked,
    make_directory,
    remove_directory,
    remove_scratch,
    replacing,
    sync,
    write_json,
)
from ood_heatmap.cache.manifest import (
    FORMAT,
    HASH_THREADS,
    MANIFEST,
    UNFINISHED,
    Manifest,
    abbreviate,
    check_files,
    check_size,
    differing_fields,
    hash_json,
    read_json,
    write_manifest,
)
from ood_heatmap.cache.shards import (
    Header,
)
from ood_heatmap.cache.stamps import (
    Stamp,
    make_stamp,
    match_stamp,
    parse_stamps,
    read_stamps,
    write_stamps,
)
from ood_heatmap.distributed import broadcast, is_main, rank
from ood_heatmap.errors import DamagedCacheError, OodHeatmapError, StaleCacheError
from ood_heatmap.pipeline.config import COMMAND_LINE
from ood_heatmap.pipeline.results import Results
from ood_heatmap.pipeline.run import COMMANDS, format_command, read_manifest

log = logging.getLogger(__name__)

# checkpoint of an unfinished stage that has one
CHECKPOINT = "last.ckpt"
# checksums of the files that one rank has written in an unfinished stage
_JOURNAL, _JOURNALS = "checksums-{:05d}.jsonl", "checksums-*.jsonl"
# suffix of files with what is computed of a shard for the end of the stage
INTERMEDIATE = ".intermediate"


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
        environment: Everything that rounding depends on, see ``devices.describe_environment``.
    """

    run: Path
    name: str
    inputs: Mapping[str, Any]
    environment: Mapping[str, Any] = field(default_factory=dict)
    _stamps: dict[str, list[Stamp]] | None = field(default=None, repr=False)

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
        command = format_command(self.run, self.name)
        if overwrite:
            try:
                check_files(self.directory, manifest, command=command)
            except DamagedCacheError:
                return False
            return True
        for name, record in manifest.files.items():
            check_size(self.directory / name, record, command=command)
        return True

    def _reopen(self, manifest: Manifest) -> None:
        """Turn a complete stage into an unfinished one: intact files stay, damaged are rebuilt."""
        log.warning("%s is damaged: rebuilding its damaged files", self.directory)
        known = read_stamps(self.directory, manifest)
        # without times: whatever is damaged may be so without another time
        stamps = [
            replace(known.get(name, Stamp(name, record)), mtime_ns=-1)
            for name, record in manifest.files.items()
        ]
        journal = self.directory / _JOURNAL.format(rank())
        with replacing(journal) as scratch:
            scratch.write_text(_journal_lines(stamps), "utf-8")
        self._write_unfinished(manifest.speed.get("environments", []))
        (self.directory / MANIFEST).unlink()
        sync(self.directory)
        self._stamps = None

    def discard(self) -> None:
        """Remove the stage atomically, as seen by readers."""
        remove_directory(self.directory)
        self._stamps = None

    def writing(self, name: str, *, source: str = "") -> AbstractContextManager[Path]:
        """Return a context manager that yields a temporary path for a file of the stage.

        On success the file's checksum is recorded and then the file is renamed: a file without a
        record, or with another checksum, never becomes part of the stage.

        Args:
            name: Name of the file in the stage.
            source: As for ``record``.

        Raises:
            OodHeatmapError: The disk is full or read-only.
        """
        make_directory((self.directory / name).parent)
        return replacing(self.directory / name, record=partial(self.record, name, source=source))

    def record(self, name: str, path: Path, *, source: str = "") -> None:
        """Record size, time and checksum of a file under its final name.

        Args:
            name: Name of the file in the stage.
            path: The file, still under its temporary name.
            source: Hash of the stamps of the images that it was made from; "" if unknown.
        """
        self.append([make_stamp(name, path, source=source)])

    def append(self, stamps: Sequence[Stamp]) -> None:
        """Append stamps to the journal of this rank."""
        append_text(self.directory / _JOURNAL.format(rank()), _journal_lines(stamps))
        if self._stamps is not None:
            for stamp in stamps:
                self._stamps.setdefault(stamp.name, []).append(stamp)

    def is_intact(self, name: str) -> bool:
        """Return whether a file of the unfinished stage exists and is as recorded."""
        return bool(self.match_stamps([name]))

    def match_stamps(self, names: Sequence[str]) -> dict[str, Stamp]:
        """Return the stamps of those files of the unfinished stage that are as recorded, by name.

        A file with another time than recorded is read in full.
        """
        stamps = self._all_stamps()
        with ThreadPoolExecutor(HASH_THREADS) as pool:
            found = pool.map(
                lambda name: match_stamp(self.directory / name, stamps.get(name, [])), names
            )
            return {stamp.name: stamp for stamp in found if stamp is not None}

    def sources(self, names: Sequence[str], manifest: Manifest | None) -> dict[str, str]:
        """Return hashes of the stamps of the images that files were made from, by name.

        Args:
            names: Names of the files.
            manifest: Manifest of the stage if it is complete, otherwise None.
        """
        if manifest is None:
            stamps = self.match_stamps(names)
        else:
            stamps = read_stamps(self.directory, manifest)
        return {name: stamps[name].source for name in names if name in stamps}

    def headers(self, names: Iterable[str]) -> dict[str, Header]:
        """Return the known headers of shards of the unfinished stage, by name."""
        # read the journals again: other ranks have written since
        self._stamps = None
        stamps = self._all_stamps()
        found = {
            name: stamp.header
            for name in names
            for stamp in stamps.get(name, [])
            if stamp.fits(self.directory / name)
        }
        return {name: header for name, header in found.items() if header is not None}

    def _all_stamps(self) -> dict[str, list[Stamp]]:
        if self._stamps is None:
            stamps = defaultdict(list)
            for journal in sorted(self.directory.glob(_JOURNALS)):
                for stamp in parse_stamps(journal.read_text("utf-8", "replace")):
                    stamps[stamp.name].append(stamp)
            self._stamps = dict(stamps)
        return self._stamps

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
            speed: Throughput of this run, also logged to ``log.jsonl``. It is in the manifest with
                the environments in which the stage was computed, the time, the version and the
                command line.
        """
        # read the journals again: other ranks have written since
        self._stamps = None
        stamps = [self._find_stamp(name) for name in names]
        files = {stamp.name: stamp.record for stamp in stamps}
        about = {**(speed or {}), "environments": self._environments(), **_provenance()}
        # normalize to what is read back from JSON
        values, about = (json.loads(json.dumps(item)) for item in (results.to_json(), about))
        manifest = Manifest(self.name, self.inputs, content, values, files, about)
        write_stamps(self.directory, stamps)
        write_manifest(self.directory, manifest)
        self._remove_unfinished()
        if speed:
            log_event(self.run, COMMANDS[self.name], **about)
        return manifest

    def _find_stamp(self, name: str) -> Stamp:
        path, stamps = self.directory / name, self._all_stamps().get(name, [])
        # written several times, or without a record: hash the file
        if len({stamp.record for stamp in stamps}) != 1:
            return make_stamp(name, path)
        check_size(path, stamps[-1].record, command=format_command(self.run, self.name))
        return stamps[-1]

    def _remove_unfinished(self) -> None:
        """Remove the files that only an unfinished stage needs."""
        for pattern in (UNFINISHED, CHECKPOINT, _JOURNALS, f"*{INTERMEDIATE}"):
            for path in self.directory.glob(pattern):
                path.unlink(missing_ok=True)


def _journal_lines(stamps: Iterable[Stamp]) -> str:
    # the leading line break ends a truncated line before it
    return "".join("\n" + stamp.to_line() for stamp in stamps)


def _provenance() -> dict[str, str]:
    """Return the time, the version, and the command line unless it is called from Python."""
    found = {"time": _now(), "version": __version__}
    context = click.get_current_context(silent=True)
    command = context.meta.get(COMMAND_LINE) if context is not None else None
    return found if command is None else {**found, "command": command}


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def log_event(run: Path, command: str, /, **stats: Any) -> None:
    """Append a line with time, version and stats of a command to ``log.jsonl`` of a run."""
    line = {
        "time": _now(),
        "stage": command,
        "version": __version__,
        **stats,
    }
    try:
        append_text(run / "log.jsonl", json.dumps(line, ensure_ascii=False) + "\n")
    except OodHeatmapError as error:
        # the stage is complete: do not fail because of the log
        log.warning("%s", error)
