"""What a command prints: its results and warnings on stdout, its log on stderr."""

import logging
import os
import sys
from typing import TYPE_CHECKING

import click

from ood_heatmap.errors import OodHeatmapError, printable

if TYPE_CHECKING:
    from ood_heatmap.pipeline.results import Results

_LOG = logging.getLogger("ood_heatmap")
_LEVEL = "ood_heatmap.level"


def conclude(results: "Results", next_command: str = "", *, allow_suspicious: bool = True) -> None:
    """Print the summary and warnings of a stage, and the next command.

    Raises:
        OodHeatmapError: A result is suspicious and that is not allowed.
    """
    for line in results.summary():
        click.echo(line)
    for warning in results.warnings:
        click.echo(f"{click.style('warning:', fg='yellow')} {printable(warning)}", err=True)
    if results.suspicious and not allow_suspicious:
        raise OodHeatmapError(
            "the stage is complete, but its result is suspicious (see the warning). Correct the "
            "command and add --overwrite, or add --allow-suspicious if it is intended."
        )
    if next_command:
        click.echo(f"next: ood-heatmap {next_command}")


class _LineFormatter(logging.Formatter):
    """Format a record as one line, even if names in it have line breaks; tracebacks keep theirs."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))


def log_to_stderr(context: click.Context) -> None:
    """Send log records to stderr: this package's from INFO on, or as set by -v and -q."""
    handler = logging.StreamHandler(sys.stderr)
    # a terminal shows the day; a file is read days later
    times = "%H:%M:%S" if sys.stderr.isatty() else "%Y-%m-%d %H:%M:%S"
    handler.setFormatter(_LineFormatter("%(asctime)s %(message)s", times))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    context.call_on_close(lambda: _LOG.setLevel(logging.NOTSET))
    _set_level(context.meta.get(_LEVEL, logging.INFO))


def _set_level(level: int) -> None:
    # under torchrun, rank 0 logs for all ranks
    _LOG.setLevel(level if os.environ.get("RANK", "0") == "0" else logging.ERROR)


def choose_level(context: click.Context, level: int) -> None:
    """Set the log level of this package, before or after ``log_to_stderr``."""
    context.meta[_LEVEL] = level
    _set_level(level)
