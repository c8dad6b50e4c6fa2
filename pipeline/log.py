"""``log.jsonl`` in a run directory: when each stage ran, on what, and how fast.

The one file of a run that differs from one run to the next; no fingerprint depends on it.
"""

import json
import time
from pathlib import Path
from typing import Any

from ood_heatmap import __version__


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
