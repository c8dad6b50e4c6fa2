"""The manifest of a finished stage: inputs, fingerprint, results, and a checksum of every file."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ood_heatmap.cache.files import read_error, sha256_of, write_json
from ood_heatmap.errors import DamagedCacheError, OodHeatmapError, StaleCacheError

FORMAT = 2
MANIFEST, UNFINISHED = "manifest.json", "unfinished.json"
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


def fingerprint_of(content: object) -> str:
    """Return the sha256 of anything JSON can say, independent of the order of its keys."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class FileRecord:
    """The size in bytes and the hexadecimal sha256 of a finished file."""

    sha256: str
    num_bytes: int

    @staticmethod
    def of(path: Path) -> "FileRecord":
        """Return the record of a file as it is now."""
        return FileRecord(sha256_of(path), path.stat().st_size)

    def fits(self, path: Path) -> bool:
        """Tell whether a file is there, and is the one that was recorded."""
        return path.is_file() and self == FileRecord.of(path)


@dataclass(frozen=True)
class Manifest:
    """The table of contents of a finished stage.

    Args:
        stage: Its name, also the name of its directory.
        inputs: Everything the result depends on that is known before the work; nested, JSON.
        content: sha256 of the images themselves, known once all were read; empty where there were
            none.
        results: What the stage hands on; JSON.
        files: File name to its record.
        speed: Throughput of the last run that worked on the stage. No fingerprint depends on it,
            and with the checksum over the manifest it is all that differs when a stage is made
            again.
        format: Version of the format on disk.
        fingerprint: sha256 of format, stage, inputs and content: what later stages depend on.
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
        made_from = fingerprint_of([self.format, self.stage, self.inputs, self.content])
        object.__setattr__(self, "fingerprint", made_from)

    def to_json(self) -> dict[str, Any]:
        """Return what ``manifest.json`` holds: the fields, and a checksum over all of them."""
        content = asdict(self)
        return {**content, "checksum": fingerprint_of(content)}

    def shard_paths(self, directory: Path) -> list[Path]:
        """Return the HDF5 shards in order."""
        return [directory / name for name in sorted(self.files) if name.endswith(".h5")]


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write the manifest of a stage, the last of its files."""
    write_json(directory / MANIFEST, manifest.to_json())


def read_manifest(directory: Path, *, command: str) -> Manifest:
    """Return the manifest of a finished stage, its checksum and the types of its fields checked.

    Args:
        directory: Of the stage.
        command: The command line that makes the stage, for the error.

    Raises:
        OodHeatmapError: The stage is missing or unfinished, or the manifest cannot be read.
        StaleCacheError: It has another format.
        DamagedCacheError: It was edited or damaged.
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
    if checksum != fingerprint_of(content):
        raise DamagedCacheError(
            f"{path} does not fit its own checksum: it was edited. {_again(command)}"
        )
    files = {name: _to_record(path, name, item, command) for name, item in content["files"].items()}
    manifest = Manifest(**{**content, "files": files})
    if manifest.fingerprint != content["fingerprint"] or manifest.stage != directory.name:
        raise DamagedCacheError(f"{path} is the manifest of something else. {_again(command)}")
    return manifest


def _to_record(path: Path, name: str, item: object, command: str) -> FileRecord:
    """Return the record of a file whose name cannot lead out of the stage's directory."""
    relative = PurePosixPath(name)
    if relative.parts and not relative.is_absolute() and ".." not in relative.parts:
        match item:
            case {"sha256": str(sha256), "num_bytes": int(num_bytes)}:
                return FileRecord(sha256, num_bytes)
    raise DamagedCacheError(f"{path} is damaged (file {name!r:.80}). {_again(command)}")


def _again(command: str) -> str:
    return f"Run `{command}` again with --overwrite."


def read_json(path: Path, *, command: str) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        OodHeatmapError: It cannot be read.
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
    directory: Path, manifest: Manifest, *, command: str, skip: Sequence[str] = ()
) -> None:
    """Make sure that every file of a stage is there and unchanged; every byte is read.

    Args:
        directory: Of the stage.
        manifest: Of the stage.
        command: The command line that makes the stage, for the error.
        skip: Names of files that do not matter now.

    Raises:
        DamagedCacheError: Names the file.
    """
    for name, record in manifest.files.items():
        if name not in skip:
            check_size(directory / name, record, command=command)
            if sha256_of(directory / name) != record.sha256:
                raise _changed(directory / name, command)


def read_file(directory: Path, manifest: Manifest, name: str, *, command: str) -> bytes:
    """Return a file of a stage; exactly the bytes that are returned were checked.

    Another process may replace the file between a check and a read.

    Args:
        directory: Of the stage.
        manifest: Of the stage.
        name: Of the file.
        command: The command line that makes the stage, for the error.

    Raises:
        DamagedCacheError: The file is missing or has changed.
        OodHeatmapError: It cannot be read.
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
    """Make sure that a file is there and has its size; not a byte of it is read.

    Raises:
        DamagedCacheError: Names the file.
    """
    if not path.is_file():
        raise DamagedCacheError(f"{path} is missing. {_again(command)}")
    num_bytes = path.stat().st_size
    if num_bytes != record.num_bytes:
        raise DamagedCacheError(
            f"{path} has {num_bytes} bytes, not {record.num_bytes}. {_again(command)}"
        )


def differing_fields(before: object, now: object, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted name, value before, value now) of every field in which nested inputs differ."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys([*before, *now]):
            yield from differing_fields(
                before.get(key), now.get(key), f"{name}.{key}" if name else str(key)
            )
    elif before != now:
        yield name, before, now


def abbreviate(value: object) -> str:
    """Return a value for a message: a hash by its first eight digits, anything long cut off."""
    # a whole group of inputs is there on one side alone, such as an image set
    text = "given" if isinstance(value, Mapping) else "none" if value is None else str(value)
    is_hash = len(text) == 64 and set(text) <= set("0123456789abcdef")
    return text[:8] if is_hash else text[:57] + "..." if len(text) > 60 else text
