"""Progress of a stage: a bar in a terminal; a log line every 30 seconds where there is none."""

import logging
import time
from datetime import datetime, timedelta

from tqdm import tqdm

from ood_heatmap.distributed import is_main

_log = logging.getLogger(__name__)
_SECONDS = 30.0


class Progress:
    """Shows how many images are done, how fast, and when the last will be; on rank 0.

    Args:
        total: Images to process; 0 if unknown.
        label: What is being done, such as the name of the stage.
    """

    def __init__(self, total: int, label: str) -> None:
        self.total, self.label, self.done = total, label, 0
        is_shown = is_main() and _log.isEnabledFor(logging.INFO)
        self._bar = tqdm(
            total=total,
            desc=label,
            unit=" images",
            disable=None if is_shown else True,
            leave=False,
        )
        self._logs = is_shown and self._bar.disable
        self._started = self._last = time.monotonic()

    def update(self, count: int) -> None:
        """Count further images."""
        self.done += count
        self._bar.update(count)
        if self._logs and time.monotonic() - self._last >= _SECONDS:
            self._last = time.monotonic()
            seconds = self._last - self._started
            _log.info("%s", _format_progress(self.label, self.done, self.total, seconds))

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()


def _format_progress(label: str, done: int, total: int, seconds: float) -> str:
    """Format the progress after some seconds as one line."""
    rate = done / seconds
    if not total:
        return f"{label}: {done} images, {format_rate(rate)}"
    text = f"{label}: {done} of {total} images, {format_rate(rate)}"
    return f"{text}, {format_end((total - done) / rate)}" if done else text


def format_rate(rate: float) -> str:
    """Format images/s."""
    return f"{rate:{'.0f' if rate >= 10 else '.2g'}} images/s"


def format_end(seconds: float) -> str:
    """Format the time at which what takes some more seconds ends."""
    end = datetime.now() + timedelta(seconds=seconds)
    form = "%H:%M" if end.date() == datetime.now().date() else "%Y-%m-%d %H:%M"
    return f"ends about {end:{form}}"
