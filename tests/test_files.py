"""The lock of a run directory, and what a refused write says."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time

import pytest

from ood_heatmap.cache.files import (
    hash_file,
    locked,
    make_directory,
    remove_directory,
    remove_scratch,
    replacing,
    require_space,
    write_bytes,
    write_json,
)
from ood_heatmap.errors import OodHeatmapError

HOLD = """
import sys, time
from pathlib import Path
from ood_heatmap.cache.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(run) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "HDF5_USE_FILE_LOCKING": "FALSE"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_writer_is_refused_by_name(tmp_path):
    with holder(tmp_path) as process:
        try:
            with (
                pytest.raises(OodHeatmapError, match=f"being written by process {process.pid} on"),
                locked(tmp_path),
            ):
                pass
        finally:
            process.kill()


def test_a_killed_writer_leaves_the_run_free(tmp_path):
    with holder(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    for _ in range(50):  # the kernel drops the lock with the process
        try:
            with locked(tmp_path):
                return
        except OodHeatmapError:
            time.sleep(0.02)
    pytest.fail("the lock outlived its process")


def test_a_released_lock_leaves_an_empty_file(tmp_path):
    with locked(tmp_path):
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()
    assert (tmp_path / ".lock").read_text() == ""


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OodHeatmapError, match=r"cannot write .*file/run"):
        make_directory(tmp_path / "file" / "run")


def test_too_little_space_is_said_before_the_work(tmp_path):
    with pytest.raises(OodHeatmapError, match=r"needs 1,000,000,000,000 MB and the disk has"):
        require_space(tmp_path, 10**18)


def test_json_is_written_whole(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert (tmp_path / "a.json").read_text() == '{\n "a": 1\n}\n'


def test_sha256_is_that_of_the_standard_example(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert (
        hash_file(tmp_path / "abc")
        == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


def test_an_error_of_a_library_is_the_system_s_only_if_it_says_so(tmp_path):
    with (
        pytest.raises(OodHeatmapError, match=r"cannot write .*a: Input/output error"),
        replacing(tmp_path / "a"),
    ):
        raise RuntimeError("Can't write data (errno = 5, error message = 'Input/output error')")
    with pytest.raises(RuntimeError, match="wrong shape"), replacing(tmp_path / "a"):
        raise RuntimeError("wrong shape")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["n" * 255, "\N{SNOWMAN}" * 85])
def test_a_name_of_the_longest_kind_can_be_written(tmp_path, name):
    write_bytes(tmp_path / name, b"content")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == b"content"


def test_a_directory_that_cannot_be_removed_is_named_and_whole(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "file").touch()
    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OodHeatmapError, match=r"cannot write .*stage: Permission denied"):
        remove_directory(tmp_path / "stage")
    assert (tmp_path / "stage" / "file").is_file()


def test_what_killed_runs_left_is_removed_and_nothing_else(tmp_path):
    (tmp_path / "figures").mkdir()
    kept = [".lock", "a.tmp", ".tmp", ".tmpAbc12", "figures/roc.png"]
    for name in [*kept, ".a.h5.tmp", "figures/.roc.png.tmp", ".tmpAbc123"]:
        (tmp_path / name).touch()
    remove_scratch(tmp_path)
    found = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")]
    assert sorted(found) == sorted([*kept, "figures"])


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(OodHeatmapError, match=r"cannot read .*missing: No such file"):
        hash_file(tmp_path / "missing")


def test_a_lock_that_cannot_be_opened_is_one_line(tmp_path):
    with pytest.raises(OodHeatmapError, match=r"cannot write .*missing/\.lock"):
        locked(tmp_path / "missing").__enter__()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOLCK, r"file system without locks \(No locks available\)\. Mount it with locks"),
        (errno.ENOSYS, "file system without locks .* choose a directory on another file system"),
        (errno.EOPNOTSUPP, "file system without locks"),
        (errno.EACCES, "is being written by another process"),
        (errno.EAGAIN, "is being written by another process"),
        (errno.EIO, "cannot lock .*: Input/output error"),
    ],
)
def test_a_refused_lock_is_one_line_with_the_way_out(tmp_path, monkeypatch, code, words):
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OodHeatmapError, match=words):
        locked(tmp_path).__enter__()
