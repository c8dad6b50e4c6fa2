"""What a stage made, and from what.

Inputs, fingerprints, checksums, and the order in which they become visible.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ood_heatmap.cache.files import make_directory, remove_scratch, sha256_of, write_json
from ood_heatmap.errors import DamagedCacheError, OodHeatmapError, StaleCacheError

FORMAT = 1
FINISHED, UNFINISHED = "manifest.json", "unfinished.json"
CHECKPOINT = "last.ckpt"  # of a stage that has one; both are only there while a stage is unfinished
# a stage is named as its directory; this is what one types to make it
COMMANDS = {
    "index": "index",
    "targets": "targets",
    "decoder": "train",
    "evaluation": "evaluate",
    "localization": "localize",
}


def fingerprint_of(content: object) -> str:
    """Return the sha256 of anything JSON can say, independent of the order of its keys."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Manifest:
    """The table of contents of a finished stage.

    Args:
        stage: Its name, also the name of its directory.
        inputs: Everything the result depends on that is known before the work; nested, JSON.
        content: sha256 of the images themselves, known once all were read; empty where there were
            none.
        results: What the stage wants to hand on; JSON.
        files: File name to ``{"sha256": ..., "num_bytes": ...}``.
        speed: How fast the stage was and could have been, of the last run that worked on it. No
            fingerprint depends on it, and it is all that differs when a stage is made again.
    """

    stage: str
    inputs: Mapping[str, Any]
    content: str
    results: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]
    speed: Mapping[str, Any] = field(default_factory=dict)
    format: int = FORMAT
    fingerprint: str = field(default="")

    def __post_init__(self) -> None:
        made_from = fingerprint_of([self.format, self.stage, self.inputs, self.content])
        if self.fingerprint not in ("", made_from):
            raise DamagedCacheError(
                f"the manifest of stage {self.stage} does not fit its own fingerprint: it was "
                f"edited or "
                f"damaged. Run `ood-heatmap {COMMANDS.get(self.stage, self.stage)}` again with "
                f"--overwrite."
            )
        object.__setattr__(self, "fingerprint", made_from)

    def shard_paths(self, directory: Path) -> list[Path]:
        """Return the HDF5 shards in order."""
        return [directory / name for name in sorted(self.files) if name.endswith(".h5")]


def read_manifest(run: Path, stage: str) -> Manifest:
    """Return the manifest of a finished stage.

    Raises:
        OodHeatmapError: The stage is missing, unfinished, or its manifest is damaged or of another
            format.
    """
    path = run / stage / FINISHED
    if not path.is_file():
        state = "an unfinished" if (run / stage / UNFINISHED).is_file() else "no"
        raise OodHeatmapError(
            f"{run} has {state} {stage} stage: run `ood-heatmap {COMMANDS[stage]} {run} ...` first."
        )
    try:
        content = json.loads(path.read_text("utf-8"))
        if content["format"] != FORMAT:
            raise OodHeatmapError(
                f"{path} has format {content['format']}, this version reads {FORMAT}. "
                f"Run `ood-heatmap {COMMANDS[stage]}` again with --overwrite."
            )
        return Manifest(**content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCacheError(
            f"{path} is damaged ({error}). Run `ood-heatmap {COMMANDS[stage]}` again with "
            f"--overwrite."
        ) from error


def require_from(manifest: Manifest, previous: Manifest, run: Path) -> None:
    """Refuse a stage that was made from another state of the stage before it."""
    made_from, now = manifest.inputs[previous.stage], previous.fingerprint
    if made_from != now:
        raise StaleCacheError(
            f"{run / manifest.stage} was made from another {previous.stage} (fingerprint "
            f"{short(made_from)}, "
            f"now {short(now)}). Run `ood-heatmap {COMMANDS[manifest.stage]} {run} ...` again "
            f"with --overwrite."
        )


def differing_fields(before: object, now: object, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted name, value before, value now) of every field in which two nested inputs
    differ."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys([*before, *now]):
            yield from differing_fields(
                before.get(key), now.get(key), f"{name}.{key}" if name else str(key)
            )
    elif before != now:
        yield name, before, now


def short(value: object) -> str:
    """Return a value for a message; a hash by its first eight digits."""
    text = str(value)
    return text[:8] if len(text) == 64 else text


def file_record(path: Path) -> dict[str, Any]:
    """Return the size and checksum of a finished file."""
    return {"sha256": sha256_of(path), "num_bytes": path.stat().st_size}


def check_files(run: Path, manifest: Manifest, *, leave_out: Sequence[str] = ()) -> None:
    """Make sure that every file of a stage is there and unchanged; every byte is read.

    Args:
        run: The run directory.
        manifest: Of the stage.
        leave_out: Names of files that do not matter now.

    Raises:
        DamagedCacheError: Names the file.
    """
    for name, record in manifest.files.items():
        if name in leave_out:
            continue
        path = run / manifest.stage / name
        way_out = (
            f"Delete {run / manifest.stage / FINISHED} and the file, and start the same "
            f"`ood-heatmap {COMMANDS[manifest.stage]}` again."
        )
        if not path.is_file():
            raise DamagedCacheError(f"{path} is missing. {way_out}")
        if path.stat().st_size != record["num_bytes"]:
            raise DamagedCacheError(
                f"{path} has {path.stat().st_size} bytes, not {record['num_bytes']}. {way_out}"
            )
        if sha256_of(path) != record["sha256"]:
            raise DamagedCacheError(f"{path} has changed since it was written. {way_out}")


@dataclass(frozen=True)
class Stage:
    """The directory of a stage while it is being made.

    A stage is begun (its inputs are written down), filled with whole files, and finished (manifest
    last). Begun again
    with equal inputs it goes on; with others it is refused.
    """

    run: Path
    name: str
    inputs: Mapping[str, Any]

    @property
    def directory(self) -> Path:
        """Where the stage's files are."""
        return self.run / self.name

    @property
    def settings_fingerprint(self) -> str:
        """The hash of the inputs, written into every shard."""
        return fingerprint_of([FORMAT, self.name, self.inputs])

    def begin(self, *, overwrite: bool = False) -> Manifest | None:
        """Make the directory, or take it up where it was.

        Args:
            overwrite: Discard what is there when it was made from other inputs.

        Returns:
            The manifest when the stage is finished already, otherwise None.

        Raises:
            StaleCacheError: It was begun with other inputs; names the fields.
        """
        make_directory(self.directory)
        remove_scratch(self.directory)
        before = self.inputs_before()
        if before is not None and before != json.loads(json.dumps(self.inputs)):
            if not overwrite:
                raise self.stale(before)
            shutil.rmtree(self.directory)
            make_directory(self.directory)
            before = None
        if (self.directory / FINISHED).is_file():
            self.tidy()
            return read_manifest(self.run, self.name)
        if before is None:
            write_json(self.directory / UNFINISHED, {"format": FORMAT, "inputs": self.inputs})
        return None

    def inputs_before(self) -> Mapping[str, Any] | None:
        """Return what the directory was begun with, or None when it was not, or when nobody can
        tell any more."""
        for name in (FINISHED, UNFINISHED):
            path = self.directory / name
            if path.is_file():
                try:
                    before: Mapping[str, Any] = json.loads(path.read_text("utf-8"))["inputs"]
                except (ValueError, KeyError, TypeError) as error:
                    raise DamagedCacheError(
                        f"{path} is damaged ({error}). Delete {self.directory} and run the stage "
                        f"again."
                    ) from error
                return before
        return None

    def stale(self, before: Mapping[str, Any]) -> StaleCacheError:
        """Return the error that names what differs."""
        fields = [
            f"{name} ({short(old)}, now {short(new)})"
            for name, old, new in differing_fields(before, json.loads(json.dumps(self.inputs)))
        ]
        return StaleCacheError(
            f"{self.directory} was made with another {', '.join(fields[:4])}. Name another run "
            f"directory, "
            "or add --overwrite to make this stage again."
        )

    def finish(self, content: str, results: Mapping[str, Any], names: list[str]) -> Manifest:
        """Write the manifest, the last file of a stage.

        Args:
            content: sha256 of the images that were read, or "".
            results: What later stages and readers want to know; JSON.
            names: The stage's files, all whole.
        """
        files = {name: file_record(self.directory / name) for name in names}
        manifest = Manifest(self.name, self.inputs, content, results, files)
        write_json(self.directory / FINISHED, asdict(manifest))
        self.tidy()
        return manifest

    def add_speed(self, figures: Mapping[str, Any]) -> None:
        """Write into the manifest of the finished stage how fast it was."""
        manifest = replace(read_manifest(self.run, self.name), speed=figures)
        write_json(self.directory / FINISHED, asdict(manifest))

    def tidy(self) -> None:
        """Remove what only an unfinished stage needs."""
        for name in (UNFINISHED, CHECKPOINT):
            (self.directory / name).unlink(missing_ok=True)
