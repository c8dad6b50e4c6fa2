"""Files that are whole or absent: scratch file, fsync, rename; checksums.

The lock of a run directory.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ood_heatmap.errors import OodHeatmapError

LOCK_NAME = ".lock"


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a directory, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a scratch path beside ``path``; put it in place only if the block succeeds.

    Raises:
        OodHeatmapError: The disk is full, or the directory is missing or read-only.
    """
    # the name is fixed for a path, so that a killed run's leftover is overwritten by the next one
    scratch = path.with_name(f".{path.name}.tmp")
    try:
        yield scratch
        sync(scratch)
        os.replace(scratch, path)
        sync(path.parent)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        scratch.unlink(missing_ok=True)


def write_error(path: Path, error: OSError) -> OodHeatmapError:
    """Return the one line for a write that the operating system refused."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(path.parent).free
        return OodHeatmapError(
            f"no space left for {path} ({free / 1e6:.0f} MB free). What is finished is kept: "
            "make room and start the same command again."
        )
    return OodHeatmapError(f"cannot write {path}: {error.strerror or error}.")


def make_directory(path: Path) -> None:
    """Make a directory and its parents, or say in one line why not."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(path, error) from error


def require_space(directory: Path, num_bytes: int) -> None:
    """Raise before the work, not after it, when ``num_bytes`` do not fit on the disk."""
    free = shutil.disk_usage(directory).free
    if num_bytes > free:
        raise OodHeatmapError(
            f"{directory} needs {num_bytes / 1e6:,.0f} MB and the disk has {free / 1e6:,.0f} MB "
            f"free. "
            "Make room, or name a run directory on another disk."
        )


def reserve(descriptor: int, num_bytes: int) -> None:
    """Reserve blocks for a whole file, so that a full disk shows now and not in the middle."""
    if hasattr(os, "posix_fallocate"):  # not on macOS
        os.posix_fallocate(descriptor, 0, num_bytes)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON whole, or leave nothing behind."""
    with replacing(path) as scratch:
        scratch.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")


def sha256_of(path: Path) -> str:
    """Return the hexadecimal sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def remove_scratch(directory: Path) -> None:
    """Remove what a killed run left half-written; call it while holding the lock."""
    for scratch in directory.glob(".*.tmp"):
        scratch.unlink(missing_ok=True)


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the only right to write in a run directory.

    HDF5's own locks can be switched off, and then a second writer destroys the first one's file:
    hence our own.
    The kernel drops the lock with the process, so a killed run leaves none behind.

    Raises:
        OodHeatmapError: Another process holds it (named by host and process id).
    """
    path = run / LOCK_NAME
    try:
        file = path.open("a+")
    except OSError as error:
        raise write_error(path, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise OodHeatmapError(
                f"{run} is being written by {holder}. Wait for it, or name another run directory."
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)
