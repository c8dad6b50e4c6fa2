"""The manifest of a finished stage: inputs, fingerprint, results, and a checksum of every file."""

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ood_heatmap.cache.files import hash_file, read_error, write_json
from ood_heatmap.errors import DamagedCacheError, OodHeatmapError, StaleCacheError

FORMAT = 2
MANIFEST, UNFINISHED = "manifest.json", "unfinished.json"
HASH_THREADS = min(16, 2 * (os.cpu_count() or 1))
_TYPES = {
    "stage": str,
    "inputs": dict,
    "content": str,
    "results": dict,
    "files": dict,
    "speed": dict,
    "format": int,
    "fingerprint": str,
}


def hash_json(content: object) -> str:
    """Return the sha256 of a JSON value, independent of key order."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class FileRecord:
    """Hexadecimal sha256 and size in bytes of a finished file."""

    sha256: str
    num_bytes: int

    @staticmethod
    def from_file(path: Path) -> "FileRecord":
        """Hash a file and return its record."""
        return FileRecord(hash_file(path), path.stat().st_size)

    def matches(self, path: Path) -> bool:
        """Return whether a file exists and has the recorded size and hash."""
        return path.is_file() and self == FileRecord.from_file(path)


@dataclass(frozen=True)
class Manifest:
    """Metadata of a finished stage.

    Args:
        stage: Name of the stage and of its directory.
        inputs: Everything the result depends on and that is known at the start; nested JSON.
        content: sha256 of the images, known once all were read; empty if the stage reads none.
        results: Results for later stages; JSON.
        files: Maps file name to its record.
        speed: Throughput of the last run that worked on the stage, the environments (device,
            version of PyTorch) in which it was computed, and time, version and command line. No
            fingerprint depends on it: only it and the manifest's checksum differ between two
            builds from the same inputs.
        format: Version of the on-disk format.
        fingerprint: sha256 of format, stage, inputs and content; later stages depend on it.
    """

    stage: str
    inputs: Mapping[str, Any]
    content: str
    results: Mapping[str, Any]
    files: Mapping[str, FileRecord]
    speed: Mapping[str, Any] = field(default_factory=dict)
    format: int = FORMAT
    fingerprint: str = field(default="")

    def __post_init__(self) -> None:
        fingerprint = hash_json([self.format, self.stage, self.inputs, self.content])
        object.__setattr__(self, "fingerprint", fingerprint)

    def to_json(self) -> dict[str, Any]:
        """Return the content of ``manifest.json``: the fields and a checksum over all of them."""
        content = asdict(self)
        return {**content, "checksum": hash_json(content)}

    def shard_paths(self, directory: Path) -> list[Path]:
        """Return the paths of the HDF5 shards, in order."""
        return [directory / name for name in sorted(self.files) if name.endswith(".h5")]


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write the manifest of a stage, always as its last file."""
    write_json(directory / MANIFEST, manifest.to_json())


def read_manifest(directory: Path, *, command: str) -> Manifest:
    """Read the manifest of a finished stage; verify its checksum and the types of its fields.

    Args:
        directory: Directory of the stage.
        command: The command that builds the stage, for messages.

    Raises:
        OodHeatmapError: The stage is missing or unfinished, or the manifest cannot be read.
        StaleCacheError: The manifest has another format version.
        DamagedCacheError: The manifest was edited or damaged.
    """
    path = directory / MANIFEST
    if not path.is_file():
        state = "an unfinished" if (directory / UNFINISHED).is_file() else "no"
        raise OodHeatmapError(
            f"{directory.parent} has {state} {directory.name} stage: run `{command}` first."
        )
    content = read_json(path, command=command)
    if content.get("format") != FORMAT:
        raise StaleCacheError(
            f"{path} has format {content.get('format')!s:.20}, this version reads {FORMAT}. "
            f"{_again(command)}"
        )
    checksum = content.pop("checksum", None)
    wrong = [name for name, kind in _TYPES.items() if type(content.get(name)) is not kind]
    if wrong or content.keys() != _TYPES.keys():
        raise DamagedCacheError(
            f"{path} is damaged (field {(wrong or ['unknown'])[0]}). {_again(command)}"
        )
    if checksum != hash_json(content):
        raise DamagedCacheError(
            f"{path} does not match its own checksum: it was edited. {_again(command)}"
        )
    files = {name: _to_record(path, name, item, command) for name, item in content["files"].items()}
    manifest = Manifest(**{**content, "files": files})
    if manifest.fingerprint != content["fingerprint"] or manifest.stage != directory.name:
        raise DamagedCacheError(f"{path} is the manifest of another stage. {_again(command)}")
    return manifest


def _to_record(path: Path, name: str, item: object, command: str) -> FileRecord:
    """Parse the record of a file; reject names that lead out of the stage's directory."""
    relative = PurePosixPath(name)
    if relative.parts and not relative.is_absolute() and ".." not in relative.parts:
        match item:
            case {"sha256": str(sha256), "num_bytes": int(num_bytes)}:
                return FileRecord(sha256, num_bytes)
    raise DamagedCacheError(f"{path} is damaged (file {name!r:.80}). {_again(command)}")


def _again(command: str) -> str:
    return f"Run `{command}` again with --overwrite."


def read_json(path: Path, *, command: str) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        OodHeatmapError: The file cannot be read.
        DamagedCacheError: It is not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise read_error(path, error) from error
    except (ValueError, RecursionError) as error:
        raise DamagedCacheError(f"{path} is damaged ({error!s:.100}). {_again(command)}") from error
    if not isinstance(content, dict):
        raise DamagedCacheError(f"{path} is damaged (not an object). {_again(command)}")
    return content


def check_files(
    directory: Path, manifest: Manifest, *, command: str, skip: Collection[str] = ()
) -> None:
    """Verify size and sha256 of every file of a stage; reads every byte, in threads.

    Args:
        directory: Directory of the stage.
        manifest: Manifest of the stage.
        command: The command that builds the stage, for messages.
        skip: Names of files to skip.

    Raises:
        DamagedCacheError: A file is missing or changed; names the file.
    """
    checked = {name: record for name, record in manifest.files.items() if name not in set(skip)}
    for name, record in checked.items():
        check_size(directory / name, record, command=command)
    # hashing releases the GIL, and a disk is fastest with several reads in flight
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        hashes = pool.map(hash_file, [directory / name for name in checked])
        for (name, record), sha256 in zip(checked.items(), hashes, strict=True):
            if sha256 != record.sha256:
                pool.shutdown(cancel_futures=True)
                raise _changed(directory / name, command)


def read_file(directory: Path, manifest: Manifest, name: str, *, command: str) -> bytes:
    """Return the verified bytes of a file of a stage.

    The returned bytes themselves are hashed: another process may replace the file between a check
    and a read.

    Args:
        directory: Directory of the stage.
        manifest: Manifest of the stage.
        name: Name of the file.
        command: The command that builds the stage, for messages.

    Raises:
        DamagedCacheError: The file is missing or has changed.
        OodHeatmapError: The file cannot be read.
    """
    path, record = directory / name, manifest.files[name]
    check_size(path, record, command=command)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise read_error(path, error) from error
    if hashlib.sha256(content).hexdigest() != record.sha256:
        raise _changed(path, command)
    return content


def _changed(path: Path, command: str) -> DamagedCacheError:
    return DamagedCacheError(f"{path} has changed since it was written. {_again(command)}")


def check_size(path: Path, record: FileRecord, *, command: str) -> None:
    """Verify that a file exists and has the recorded size; its content is not read.

    Raises:
        DamagedCacheError: It is missing or has another size; names the file.
    """
    if not path.is_file():
        raise DamagedCacheError(f"{path} is missing. {_again(command)}")
    num_bytes = path.stat().st_size
    if num_bytes != record.num_bytes:
        raise DamagedCacheError(
            f"{path} has {num_bytes} bytes, not {record.num_bytes}. {_again(command)}"
        )


def differing_fields(before: object, now: object, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted name, old value, new value) for each field in which nested inputs differ."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys([*before, *now]):
            yield from differing_fields(
                before.get(key), now.get(key), f"{name}.{key}" if name else str(key)
            )
    elif before != now:
        yield name, before, now


def abbreviate(value: object) -> str:
    """Shorten a value for a message: a hash to eight digits, long text to 60 characters."""
    # a whole group of inputs, such as an image set, can exist on one side only
    text = "given" if isinstance(value, Mapping) else "none" if value is None else str(value)
    is_hash = len(text) == 64 and set(text) <= set("0123456789abcdef")
    return text[:8] if is_hash else text[:57] + "..." if len(text) > 60 else text
