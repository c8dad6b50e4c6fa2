"""Atomic writes (temporary file, fsync, rename), checksums, and the lock of a directory."""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from ood_heatmap.errors import OodHeatmapError

log = logging.getLogger(__name__)

LOCK_NAME = ".lock"
# how HDF5, FAISS, PyTorch and safetensors quote the operating system in errors of their own
_QUOTED_ERRNO = re.compile(r"(?:errno ?=? ?|os error )(\d+)", re.IGNORECASE)
_QUOTED_TEXT = {os.strerror(code): code for code in (errno.ENOSPC, errno.EDQUOT, errno.EIO)}


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a directory, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path, *, record: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; put it in place only if the block succeeds.

    Args:
        path: The file to write or replace.
        record: Called with the finished temporary file just before it gets its name.

    Raises:
        OodHeatmapError: The disk is full, or the directory is missing or read-only.
    """
    # the name is fixed for a path, so that a killed run's leftover is overwritten by the next one
    scratch = path.with_name(scratch_name(path.name))
    try:
        # a leftover, or a link that somebody put there: a library would write through it
        scratch.unlink(missing_ok=True)
        yield scratch
        sync(scratch)
        if record is not None:
            record(scratch)
        os.replace(scratch, path)
        sync(path.parent)
        log.debug("wrote %s", path)
    except (OSError, RuntimeError, SafetensorError) as error:
        refused = system_error(error)
        if refused is None:
            raise
        raise write_error(path, refused) from error
    finally:
        # on a read-only disk this fails too, and must not hide why
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


def scratch_name(name: str) -> str:
    """Return the name of the temporary file of a file; 255 bytes at most, as file systems allow."""
    if len(os.fsencode(name)) > 240:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return f".{name}.tmp"


def system_error(error: BaseException) -> OSError | None:
    """Return what the operating system said when a library wraps it in an error of its own.

    HDF5, FAISS and PyTorch raise RuntimeError and safetensors its own class, with the errno in the
    text alone. None for every other error.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error
    text = str(error)
    quoted = _QUOTED_ERRNO.search(text)
    code = int(quoted[1]) if quoted else None
    if code is None:
        code = next((code for words, code in _QUOTED_TEXT.items() if words in text), None)
    if code is not None:
        return OSError(code, os.strerror(code))
    return error if isinstance(error, OSError) else None


def write_error(path: Path, error: OSError) -> OodHeatmapError:
    """Return the one line for a write that the operating system refused."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = ""
        with contextlib.suppress(OSError):
            free = f" ({shutil.disk_usage(path.parent).free / 1e6:.0f} MB free)"
        return OodHeatmapError(
            f"no space left for {path}{free}. What is finished is kept: "
            "make room and start the same command again."
        )
    return OodHeatmapError(f"cannot write {path}: {error.strerror or error}.")


def read_error(path: Path, error: OSError) -> OodHeatmapError:
    """Return the one line for a read that the operating system refused: not a damaged file."""
    return OodHeatmapError(f"cannot read {path}: {error.strerror or error}.")


def make_directory(path: Path) -> None:
    """Make a directory and its parents, or say in one line why not."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(path, error) from error


def remove_directory(path: Path) -> None:
    """Remove a directory in one step as far as a reader can see, or say in one line why not.

    It first gets a hidden name, so that a kill in the middle leaves no half of it in sight. A
    symbolic link to a directory is removed, and what it points to is kept.
    """
    discarded = path.with_name(f".{path.name}.discarded")
    try:
        for item in (discarded, path):
            if item is path and os.path.lexists(path):
                os.rename(path, discarded)
                sync(path.parent)
            if discarded.is_symlink():
                discarded.unlink()
            elif discarded.exists():
                shutil.rmtree(discarded)
    except OSError as error:
        raise write_error(path, error) from error


def require_space(directory: Path, num_bytes: int) -> None:
    """Raise before the work, not after it, when ``num_bytes`` do not fit on the disk."""
    free = shutil.disk_usage(directory).free
    if num_bytes > free:
        raise OodHeatmapError(
            f"{directory} needs {num_bytes / 1e6:,.0f} MB and the disk has {free / 1e6:,.0f} MB "
            "free. Make room, or name a run directory on another disk."
        )


def reserve(descriptor: int, num_bytes: int) -> None:
    """Reserve blocks for a whole file, so that a full disk shows now and not in the middle."""
    if hasattr(os, "posix_fallocate"):  # not on macOS
        os.posix_fallocate(descriptor, 0, num_bytes)


def write_bytes(
    path: Path, content: bytes, *, record: Callable[[Path], None] | None = None
) -> None:
    """Write a file atomically.

    Args:
        path: The file to write or replace.
        content: All of it.
        record: As for ``replacing``.
    """
    with replacing(path, record=record) as scratch:
        scratch.write_bytes(content)


def to_json(content: Mapping[str, Any]) -> bytes:
    """Return the content of a JSON file."""
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    write_bytes(path, to_json(content))


def save_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    record: Callable[[Path], None] | None = None,
) -> None:
    """Write a safetensors file atomically; the same tensors give the same bytes.

    safetensors' own writer puts a temporary file of mode 0600 beside the path and leaves it there
    when it is killed.

    Args:
        path: The file to write or replace.
        tensors: On any device; written in row-major order.
        metadata: One entry at most: several come in a different order every time.
        record: As for ``replacing``.
    """
    on_host = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_bytes(path, save(on_host, dict(metadata) if metadata else None), record=record)


def sha256_of(path: Path) -> str:
    """Return the hexadecimal sha256 of a file's bytes.

    Raises:
        OodHeatmapError: It cannot be read.
    """
    try:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    except OSError as error:
        raise read_error(path, error) from error
    return digest.hexdigest()


def remove_scratch(directory: Path) -> None:
    """Remove what a killed run left half-written; call it while holding the lock."""
    for pattern in (".*.tmp", ".tmp??????"):  # ours, and safetensors' of earlier versions
        for scratch in directory.rglob(pattern):
            with contextlib.suppress(OSError):
                scratch.unlink(missing_ok=True)


def append_text(path: Path, text: str) -> None:
    """Append text to a file and wait until it is on the disk.

    A symbolic link is not followed: a run directory may come from somebody else.

    Raises:
        OodHeatmapError: The disk is full or read-only, or the path is a link.
    """
    try:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        with open(os.open(path, flags, 0o666), "a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise write_error(path, error) from error


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the only right to write in a directory.

    HDF5's own locks can be switched off, and then a second writer destroys the first one's file.
    The kernel drops this lock with the process, so a killed run leaves none behind.

    Raises:
        OodHeatmapError: Another process holds it (named by host and process id), or the lock file
            cannot be opened or locked.
    """
    path = directory / LOCK_NAME
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OodHeatmapError(f"{path} is a symbolic link. Remove it.") from error
        raise write_error(path, error) from error
    try:
        _lock(descriptor, directory)
        _describe_holder(descriptor, f"process {os.getpid()} on {socket.gethostname()}")
        try:
            yield
        finally:
            _describe_holder(descriptor, "")
    finally:
        # closing drops the lock; an error of it must not hide why the block failed
        with contextlib.suppress(OSError):
            os.close(descriptor)


def _lock(descriptor: int, directory: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        text = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
        raise OodHeatmapError(
            f"{directory} is being written by {text or 'another process'}. "
            "Wait for it, or name another directory."
        ) from None
    except OSError as error:
        raise OodHeatmapError(
            f"{directory} is on a file system without locks ({error.strerror}). "
            "Name a directory on another one."
        ) from error


def _describe_holder(descriptor: int, text: str) -> None:
    # for the message of a second writer alone: a full disk must not end the work here
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)
