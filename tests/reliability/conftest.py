"""Fixtures of the reliability tests, and the table of what was tried, held and failed."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lab import Lab, Ledger

LEDGER = Ledger()


@pytest.fixture(scope="session")
def ledger() -> Ledger:
    """Return where trials are counted."""
    return LEDGER


@pytest.fixture(scope="session")
def lab(
    data: Path, tree: Callable[[Path], dict[str, bytes]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Lab]:
    """Return the states of a small run and a worker for disturbed commands."""
    lab = Lab(tmp_path_factory.mktemp("lab"), (data / "network.py").read_text(), tree)
    yield lab
    lab.close()


@pytest.fixture
def shimmed(lab: Lab) -> Lab:
    """Return the lab where faults can be injected."""
    if lab.shim is None:
        pytest.skip("faults are injected on Linux by a library that cc compiles; there is no cc")
    return lab


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table."""
    if LEDGER.tried:
        terminalreporter.section("reliability")
        for line in LEDGER.table():
            terminalreporter.write_line(line)
