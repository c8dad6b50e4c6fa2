"""When each stage ran, on what, and how fast: ``log.jsonl`` in a run directory, and manifests.

The log, and ``speed`` in a manifest, are all of a run that differs from one run to the next; no
fingerprint depends on them.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ood_heatmap import __version__
from ood_heatmap.cache.manifest import Stage


def log_event(run: Path, stage: str, **figures: Any) -> None:
    """Append one line."""
    line = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "stage": stage,
        "version": __version__,
        **figures,
    }
    with (run / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def log_speed(stage: Stage, command: str, figures: Mapping[str, Any]) -> None:
    """Append one line for a finished stage, and keep the figures in its manifest too.

    Nothing where there was nothing left to do.
    """
    if figures.get("images"):
        log_event(stage.run, command, **figures)
        stage.add_speed(figures)
