"""Stamps: size and time of a file when its checksum was computed, so that it is not read again.

A file with the size and modification time of its stamp counts as unchanged; any other is hashed.
Stamps are derived data: without them, as after a copy that does not preserve times, everything is
hashed once and stamped again. They also contain the header of each shard, since HDF5 takes about a
millisecond to open a file. Damage that changes no time, as by a faulty disk, is found by
``verify``.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ood_heatmap.cache.files import write_bytes
from ood_heatmap.cache.manifest import FileRecord, Manifest, check_files
from ood_heatmap.cache.shards import Header, read_header
from ood_heatmap.errors import OodHeatmapError

STAMPS = ".stamps.jsonl"
# a change within one tick of the file system's clock does not change the time of a file
_TICK_NS = 20_000_000
# raised for a line that holds no stamp: other JSON, infinite numbers, lists in lists
_NO_STAMP = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
# before the checksum over the rest of a line
_CHECKSUM = ', "checksum": "'


@dataclass(frozen=True)
class Stamp:
    """Size, time, checksum and header of a file when it was last read in full.

    Args:
        name: Name of the file in its stage.
        record: Size and checksum.
        mtime_ns: Modification time; -1 if unknown, or too recent to detect a later change.
        header: Header of a shard; None for other files.
        source: Hash of the stamps of the images that a shard was made from; "" if unknown.
    """

    name: str
    record: FileRecord
    mtime_ns: int = -1
    header: Header | None = None
    source: str = ""

    def fits(self, path: Path) -> bool:
        """Return whether a file exists with the size and time of the stamp; does not read it."""
        try:
            status = path.stat()
        except OSError:
            return False
        return (status.st_size, status.st_mtime_ns) == (self.record.num_bytes, self.mtime_ns)

    def to_line(self) -> str:
        """Return a line of JSON with a checksum."""
        content = {
            "name": self.name,
            "sha256": self.record.sha256,
            "num_bytes": self.record.num_bytes,
            "mtime_ns": self.mtime_ns,
            "header": None if self.header is None else self.header.to_json(),
            "source": self.source,
        }
        text = json.dumps(content)
        return f'{text[:-1]}{_CHECKSUM}{_hash(text[:-1])}"}}\n'

    @staticmethod
    def from_line(line: str) -> "Stamp":
        """Parse a line; of one that is damaged, or of an earlier version, only the record.

        Raises:
            ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError: The line
                holds no stamp.
        """
        content = json.loads(line)
        record = FileRecord(str(content["sha256"]), int(content["num_bytes"]))
        stamp = Stamp(str(content["name"]), record)
        text, _, checksum = line.rpartition(_CHECKSUM)
        if checksum.rstrip() != f'{_hash(text)}"}}':
            return stamp
        header = None if content["header"] is None else Header.from_json(content["header"])
        return replace(stamp, mtime_ns=content["mtime_ns"], header=header, source=content["source"])


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def make_stamp(name: str, path: Path, *, source: str = "") -> Stamp:
    """Read a file in full and return its stamp under a name."""
    mtime_ns = _modified_ns(path)
    return _to_stamp(name, path, FileRecord.from_file(path), mtime_ns, source)


def match_stamp(path: Path, stamps: Sequence[Stamp]) -> Stamp | None:
    """Return the stamp that a file fits, None without one.

    If its time is another, the file is read in full, and the stamp has its present time.
    """
    current = next((stamp for stamp in stamps if stamp.fits(path)), None)
    if current is not None or not stamps or not path.is_file():
        return current
    mtime_ns, record = _modified_ns(path), FileRecord.from_file(path)
    same = next((stamp for stamp in stamps if stamp.record == record), None)
    return same and _to_stamp(same.name, path, record, mtime_ns, same.source)


def _to_stamp(name: str, path: Path, record: FileRecord, mtime_ns: int, source: str = "") -> Stamp:
    """Return the stamp of a file that has just been hashed."""
    is_settled = time.time_ns() - mtime_ns > _TICK_NS
    header = read_header(path) if name.endswith(".h5") else None
    return Stamp(name, record, mtime_ns if is_settled else -1, header, source)


def _modified_ns(path: Path) -> int:
    """Return the modification time of a file in nanoseconds, -1 if it is missing."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return -1


def parse_stamps(text: str) -> Iterator[Stamp]:
    """Parse lines of stamps; those that hold no record are skipped."""
    for line in text.splitlines():
        # a killed process may truncate the last line of its journal, and a copied run contain any
        with contextlib.suppress(*_NO_STAMP):
            yield Stamp.from_line(line)


def current_stamps(directory: Path, manifest: Manifest) -> dict[str, Stamp]:
    """Return the stamps, by name, of files that are as they were when they matched the manifest."""
    stamps = read_stamps(directory, manifest)
    return {name: stamp for name, stamp in stamps.items() if stamp.fits(directory / name)}


def read_stamps(directory: Path, manifest: Manifest) -> dict[str, Stamp]:
    """Return the stamps, by name, of files with the checksums that are in the manifest."""
    try:
        text = (directory / STAMPS).read_text("utf-8", "replace")
    except OSError:
        return {}
    stamps = {stamp.name: stamp for stamp in parse_stamps(text)}
    return {
        name: stamps[name]
        for name, record in manifest.files.items()
        if name in stamps and stamps[name].record == record
    }


def write_stamps(directory: Path, stamps: Iterable[Stamp]) -> None:
    """Write the stamps of a stage; those of a directory that is read-only are not kept."""
    content = "".join(stamp.to_line() for stamp in stamps)
    with contextlib.suppress(OodHeatmapError):
        write_bytes(directory / STAMPS, content.encode())


def check_unstamped(
    directory: Path, manifest: Manifest, *, command: str, skip: Collection[str] = ()
) -> None:
    """Verify the files of a stage: those without a current stamp in full, and stamp them.

    Args:
        directory: Directory of the stage.
        manifest: Manifest of the stage.
        command: The command that builds the stage, for messages.
        skip: Names of files to skip.

    Raises:
        DamagedCacheError: A file is missing or changed; names the file.
    """
    stamps = read_stamps(directory, manifest)
    # before the files are hashed: one that changes meanwhile must not look unchanged
    modified = {
        name: _modified_ns(directory / name)
        for name in manifest.files.keys() - set(skip)
        if name not in stamps or not stamps[name].fits(directory / name)
    }
    if modified:
        others = manifest.files.keys() - modified
        check_files(directory, manifest, command=command, skip=others)
        for name, mtime_ns in modified.items():
            source = stamps[name].source if name in stamps else ""
            stamps[name] = _to_stamp(name, directory / name, manifest.files[name], mtime_ns, source)
        write_stamps(directory, stamps.values())
