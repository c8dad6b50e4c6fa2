"""Progress without a terminal: a line every 30 seconds, with a rate and an end that are right."""

import logging
from datetime import datetime, timedelta

import pytest

from ood_heatmap.pipeline import progress as module
from ood_heatmap.pipeline.progress import Progress, format_end, format_rate


class Clock:
    """Stands in for the module ``time``."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def monotonic(self) -> float:
        return self.seconds


class Noon(datetime):
    """A day on which it is always twelve."""

    @classmethod
    def now(cls, tz: object = None) -> "Noon":
        return cls(2031, 5, 6, 12)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(module, "time", found)
    monkeypatch.setattr(module, "datetime", Noon)
    return found


def run_stage(clock: Clock, *, images: int, seconds: float, count: int = 10) -> None:
    """Process images, ``count`` at a time."""
    progress = Progress(images, "index")
    for _ in range(0, images, count):
        clock.seconds += seconds * count / images
        progress.update(count)
    progress.close()


def test_without_a_terminal_a_line_every_30_seconds_says_when_it_ends(clock, caplog):
    caplog.set_level(logging.INFO)
    run_stage(clock, images=1200, seconds=120)  # 10 images/s
    # the end is two minutes after the start, of which half a minute and more are over
    assert caplog.messages == [
        "index: 300 of 1200 images, 10 images/s, ends about 12:01",
        "index: 600 of 1200 images, 10 images/s, ends about 12:01",
        "index: 900 of 1200 images, 10 images/s, ends about 12:00",
        "index: 1200 of 1200 images, 10 images/s, ends about 12:00",
    ]


def test_an_unknown_number_of_images_has_no_end(clock, caplog):
    caplog.set_level(logging.INFO)
    progress = Progress(0, "probe")
    clock.seconds += 40
    progress.update(60)
    progress.close()
    assert caplog.messages == ["probe: 60 images, 1.5 images/s"]


def test_a_short_stage_logs_no_progress(clock, caplog):
    caplog.set_level(logging.INFO)
    run_stage(clock, images=1200, seconds=29)
    assert caplog.messages == []


def test_an_image_that_takes_minutes_gets_a_line_of_its_own(clock, caplog):
    caplog.set_level(logging.INFO)
    run_stage(clock, images=3, seconds=1200, count=1)
    assert caplog.messages[0] == "index: 1 of 3 images, 0.0025 images/s, ends about 12:13"
    assert len(caplog.messages) == 3


def test_quiet_and_other_ranks_show_nothing(clock, caplog, monkeypatch):
    run_stage(clock, images=1200, seconds=120)  # at level WARNING
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(module, "is_main", lambda: False)
    run_stage(clock, images=1200, seconds=120)
    assert caplog.messages == []


def test_in_a_terminal_a_bar_moves_and_nothing_is_logged(clock, caplog, monkeypatch):
    class Bar:
        disable = False

        def __init__(self, **settings: object) -> None:
            assert settings["total"] == 1200
            self.done, self.closed = 0, False
            bars.append(self)

        def update(self, count: int) -> None:
            self.done += count

        def close(self) -> None:
            self.closed = True

    bars: list[Bar] = []
    monkeypatch.setattr(module, "tqdm", Bar)
    caplog.set_level(logging.INFO)
    run_stage(clock, images=1200, seconds=120)
    assert [(bar.done, bar.closed) for bar in bars] == [(1200, True)]
    assert caplog.messages == []


def test_an_end_on_another_day_has_its_date(clock):
    assert format_end(60) == "ends about 12:01"
    assert format_end(timedelta(hours=11, minutes=59).total_seconds()) == "ends about 23:59"
    assert format_end(timedelta(days=40).total_seconds()) == "ends about 2031-06-15 12:00"
    assert format_end(timedelta(hours=12).total_seconds()) == "ends about 2031-05-07 00:00"


@pytest.mark.parametrize(
    ("rate", "text"), [(0.257, "0.26"), (9.94, "9.9"), (10.4, "10"), (1e4, "10000")]
)
def test_a_slow_rate_has_two_digits(rate, text):
    assert format_rate(rate) == f"{text} images/s"
