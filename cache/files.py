"""Atomic writes (temporary file, fsync, rename), checksums, and the lock of a directory."""

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from ood_heatmap.errors import OodHeatmapError

try:
    import fcntl
except ImportError:
    # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

_LOCK_NAME, _HOLDER_NAME = ".lock", ".lock.holder"
# Windows has no such flag, and makes symbolic links for administrators only
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}
# how HDF5, FAISS, PyTorch and safetensors quote an errno in the text of their own exceptions
_QUOTED_ERRNO = re.compile(r"(?:errno ?=? ?|os error )(\d+)", re.IGNORECASE)
_QUOTED_TEXT = {os.strerror(code): code for code in (errno.ENOSPC, errno.EDQUOT, errno.EIO)}


def sync(path: Path) -> None:
    """Flush a file, or the entries of a directory, to disk (``os.fsync``)."""
    if sys.platform == "win32" and path.is_dir():
        # a directory cannot be opened there
        return
    # Windows flushes only what is open for writing
    descriptor = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path, *, record: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, renamed to ``path`` only if the block succeeds.

    Args:
        path: The file to write or replace.
        record: Called with the complete temporary file just before the rename.

    Raises:
        OodHeatmapError: The disk is full, or the directory is missing or read-only.
    """
    # deterministic name: the leftover of a killed run is overwritten by the next run
    scratch = path.with_name(_scratch_name(path.name))
    try:
        # unlink a leftover or a planted symbolic link: a library would write through it
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
        raise _write_error(path, refused) from error
    finally:
        # fails as well on a read-only disk, and must not hide the first error
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


def _scratch_name(name: str) -> str:
    """Return the name of a file's temporary file, within the 255 bytes that file systems allow."""
    if len(os.fsencode(name)) > 240:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return f".{name}.tmp"


def system_error(error: BaseException) -> OSError | None:
    """Return the OSError behind an exception, also where a library wraps it; otherwise None.

    HDF5, FAISS and PyTorch raise RuntimeError and safetensors raises its own class, with the errno
    only in the text.
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


def _write_error(path: Path, error: OSError) -> OodHeatmapError:
    """Return the error for a failed write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = ""
        with contextlib.suppress(OSError):
            free = f" ({shutil.disk_usage(path.parent).free / 1e6:.0f} MB free)"
        return OodHeatmapError(
            f"no space left for {path}{free}. Finished files are kept: "
            "make room and run the same command again."
        )
    return OodHeatmapError(f"cannot write {path}: {error.strerror or error}.")


def read_error(path: Path, error: OSError) -> OodHeatmapError:
    """Return the error for a failed read; the file itself need not be damaged."""
    return OodHeatmapError(f"cannot read {path}: {error.strerror or error}.")


def make_directory(path: Path) -> None:
    """Create a directory and its parents.

    Raises:
        OodHeatmapError: The directory cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _write_error(path, error) from error


def remove_directory(path: Path) -> None:
    """Remove a directory atomically, as seen by readers.

    It is renamed to a hidden name first, so that a kill in between leaves no partial directory. Of
    a symbolic link only the link is removed.

    Raises:
        OodHeatmapError: The directory cannot be removed.
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
        raise _write_error(path, error) from error


def move(source: Path, target: Path) -> None:
    """Rename a file, or a directory to a name that is free, atomically.

    Raises:
        OodHeatmapError: It cannot be renamed.
    """
    try:
        os.replace(source, target)
        sync(target.parent)
    except OSError as error:
        raise _write_error(target, error) from error


def require_space(directory: Path, num_bytes: int) -> None:
    """Fail before the work starts if ``num_bytes`` do not fit on the disk.

    Raises:
        OodHeatmapError: The disk has less free space.
    """
    free = shutil.disk_usage(directory).free
    if num_bytes > free:
        raise OodHeatmapError(
            f"{directory} needs {num_bytes / 1e6:,.0f} MB and the disk has {free / 1e6:,.0f} MB "
            "free. Make room, or choose a run directory on another disk."
        )


def reserve(descriptor: int, num_bytes: int) -> None:
    """Allocate the blocks of a whole file, so that a full disk raises before the first write."""
    # missing on macOS
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, num_bytes)


def write_bytes(
    path: Path, content: bytes, *, record: Callable[[Path], None] | None = None
) -> None:
    """Write a file atomically.

    Args:
        path: The file to write or replace.
        content: Content of the file.
        record: As for ``replacing``.
    """
    with replacing(path, record=record) as scratch:
        scratch.write_bytes(content)


def to_json(content: Mapping[str, Any]) -> bytes:
    """Serialize to the bytes of a JSON file."""
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
    """Write a safetensors file atomically and deterministically.

    ``safetensors.torch.save_file`` would create a temporary file of mode 0600 beside the path and
    leave it there when killed.

    Args:
        path: The file to write or replace.
        tensors: On any device; written in row-major order.
        metadata: At most one entry: safetensors writes several in random order.
        record: As for ``replacing``.
    """
    on_host = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_bytes(path, save(on_host, dict(metadata) if metadata else None), record=record)


def hash_file(path: Path) -> str:
    """Return the hexadecimal sha256 of a file.

    Raises:
        OodHeatmapError: The file cannot be read.
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
    """Remove the temporary files of killed runs; call it while holding the lock."""
    # ours, and those of safetensors' own writer, used by earlier versions
    for pattern in (".*.tmp", ".tmp??????"):
        for scratch in directory.rglob(pattern):
            with contextlib.suppress(OSError):
                scratch.unlink(missing_ok=True)


def append_text(path: Path, text: str) -> None:
    """Append text to a file and flush it to disk.

    Symbolic links are not followed: a run directory may come from an untrusted source.

    Raises:
        OodHeatmapError: The disk is full or read-only, or the path is a link.
    """
    try:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | _NO_FOLLOW
        with open(os.open(path, flags, 0o666), "a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _write_error(path, error) from error


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the exclusive write lock of a directory.

    HDF5's own locks can be switched off, and then a second writer corrupts the first one's file.
    The kernel releases this lock when the process ends, so a killed run leaves no stale lock.

    Raises:
        OodHeatmapError: Another process holds the lock (named by host and process id), or the lock
            file cannot be opened or locked.
    """
    if fcntl is None:
        with _locked_without_fcntl(directory):
            yield
        return
    path = directory / _LOCK_NAME
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _NO_FOLLOW, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OodHeatmapError(f"{path} is a symbolic link. Remove the link.") from error
        raise _write_error(path, error) from error
    try:
        _lock(descriptor, directory)
        _describe_holder(descriptor, _this_process())
        try:
            yield
        finally:
            _describe_holder(descriptor, "")
    finally:
        # closing releases the lock; a failure to close must not hide an error of the block
        with contextlib.suppress(OSError):
            os.close(descriptor)


def _lock(descriptor: int, directory: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        # NFS passes the lock to the server, which may refuse it with either
        text = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
        raise _lock_error(directory, text) from None
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise OodHeatmapError(
                f"{directory} is on a file system without locks ({error.strerror}). Mount it with "
                "locks (Lustre: -o flock; NFS: without nolock, with a running lockd), or choose a "
                "directory on another file system."
            ) from error
        raise OodHeatmapError(f"cannot lock {directory}: {error.strerror}.") from error


@contextmanager
def _locked_without_fcntl(directory: Path) -> Iterator[None]:
    """Hold the lock on Windows, where a locked file cannot be read: the holder has its own file."""
    from filelock import FileLock, Timeout

    lock, holder = FileLock(directory / _LOCK_NAME, timeout=0), directory / _HOLDER_NAME
    try:
        lock.acquire()
    except Timeout:
        text = ""
        with contextlib.suppress(OSError):
            text = holder.read_text("utf-8", "replace")
        raise _lock_error(directory, text) from None
    except OSError as error:
        raise _write_error(directory / _LOCK_NAME, error) from error
    try:
        with contextlib.suppress(OSError):
            holder.write_text(_this_process(), "utf-8")
        yield
    finally:
        with contextlib.suppress(OSError):
            holder.unlink(missing_ok=True)
        lock.release()


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _lock_error(directory: Path, holder: str) -> OodHeatmapError:
    """Return the error for a second writer."""
    return OodHeatmapError(
        f"{directory} is being written by {holder or 'another process'}. "
        "Wait for it, or use another directory."
    )


def _describe_holder(descriptor: int, text: str) -> None:
    # only for the message to a second writer: a full disk must not abort the run here
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)
