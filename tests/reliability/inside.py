"""What trials do in a fork of the worker, beside the command line; called by ``Lab.call``."""

import hashlib
import json
import random
import resource
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ood_heatmap.cache.flat import read_index
from ood_heatmap.cache.shards import open_rows
from ood_heatmap.calibration import Calibration
from ood_heatmap.detector import HeatmapDetector
from ood_heatmap.errors import OodHeatmapError
from ood_heatmap.pipeline.run import read_manifest

MEMORY = 8 << 30  # bytes a reader may allocate, whatever a file says
HEADER = 4096  # bytes of a file in which damage does most


def check_rows(folder: str, pattern: str, count: int) -> None:
    """Make sure that the shards of a stage hold each row once, in order."""
    paths = sorted(Path(folder).glob(pattern))
    rows = np.concatenate([h5py.File(path)["row"][:] for path in paths])
    assert len(rows) == len(np.unique(rows)), "rows are double"
    assert (np.diff(rows) > 0).all(), "rows do not ascend"
    assert len(rows) == count, f"{len(rows)} rows, not {count}"


def load(run: str) -> None:
    """Print which decoder and which calibration the detector of a run has."""
    detector = HeatmapDetector.load(run, "cpu")
    values = detector.decoder.state_dict().values()
    weights = b"".join(value.numpy().tobytes() for value in values)
    scores = b"" if detector.calibration is None else detector.calibration.scores.tobytes()
    print(*(hashlib.sha256(item).hexdigest()[:8] for item in (weights, scores)), "loaded")


def fingerprint_of(content: object) -> str:
    """Return the hash of JSON as manifests have it."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def record(path: str) -> dict[str, Any]:
    """Return a file's entry in a manifest."""
    content = Path(path).read_bytes()
    return {"sha256": hashlib.sha256(content).hexdigest(), "num_bytes": len(content)}


def forge(run: str, stage: str, change: str) -> None:
    """Change a manifest as somebody would who knows the format: all hashes fit.

    Args:
        run: The run directory.
        stage: Whose manifest is changed; later stages are made to fit.
        change: Python statements about ``content``, the manifest; ``record`` is there too.
    """
    changed: dict[str, str] = {}
    for name in ("index", "targets", "decoder", "evaluation", "localization"):
        path = Path(run, name, "manifest.json")
        text = path.read_text()
        for old, new in changed.items():
            text = text.replace(old, new)
        content = json.loads(text)
        if name == stage:
            exec(change, {"content": content, "record": record})
        del content["checksum"]
        made_from = [content[key] for key in ("format", "stage", "inputs", "content")]
        before, content["fingerprint"] = content["fingerprint"], fingerprint_of(made_from)
        changed[before] = content["fingerprint"]
        path.write_text(json.dumps({**content, "checksum": fingerprint_of(content)}))


def _read_shard(path: Path) -> None:
    for rows in open_rows([path]).values():
        rows.take(np.arange(len(rows)))


def _read_index(path: Path) -> None:
    with h5py.File(path.with_name("images-00000.h5")) as file:
        num_features = file["features"].shape[1]
    num_rows = json.loads(path.with_name("manifest.json").read_text())["results"]["num_images"]
    read_index(path, num_rows, num_features).sum()


READERS: dict[str, Callable[[Path], object]] = {
    "run/index/images-00000.h5": _read_shard,
    "run/index/index.faiss": _read_index,
    "run/index/manifest.json": lambda path: read_manifest(path.parent.parent, "index"),
    "run/evaluation/calibration.safetensors": lambda path: Calibration.from_bytes(
        path.read_bytes(), path.name
    ),
}


def fuzz(place: str, name: str, count: int) -> None:
    """Read a file in many damaged versions; print a line for each that is no typed error."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    path, dice, read = Path(place, name), random.Random(0), READERS[name]
    original = path.read_bytes()
    read(path)
    for number in range(count):
        path.write_bytes(_damaged(original, dice))
        try:
            read(path)
        except OodHeatmapError:
            pass
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            print("FAILED", number, type(error).__name__, " ".join(str(error).split()), at)


def _damaged(original: bytes, dice: random.Random) -> bytes:
    changed = bytearray(original)
    for _ in range(dice.choice([1, 1, 2, 8, 64])):
        at = dice.randrange(min(len(changed), HEADER))
        flipped = changed[at] ^ (1 << dice.randrange(8))
        changed[at] = dice.choice([0, 255, dice.randrange(256), flipped])
    if dice.random() < 0.1:
        del changed[dice.randrange(len(changed)) :]
    return bytes(changed)
