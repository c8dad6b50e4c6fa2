"""Without what only POSIX systems have: every stage runs, and a second writer is refused."""

import subprocess
import sys

import pytest

# The libraries are loaded first: they know their systems. Then everything that Windows lacks and
# this package uses somewhere is taken away. What Windows does differently is not simulated, such as
# refusing to rename a file that is open.
WINDOWS = """
import mmap, os, sys
import faiss, filelock, h5py, matplotlib.figure, pytorch_ood.detector, safetensors.torch
import scipy.stats, sklearn.neural_network, torch, torchvision, tqdm, click, PIL.Image
missing = {
    os: "O_NOFOLLOW O_DIRECT O_CLOEXEC posix_fallocate posix_fadvise preadv pread pwrite sysconf "
    "sched_getaffinity getuid geteuid fork RWF_NOWAIT mkfifo chown",
    mmap: "PROT_READ PROT_WRITE MAP_SHARED MAP_PRIVATE",
}
for module, names in missing.items():
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
"""


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WINDOWS + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_every_module_can_be_imported():
    done = run_python(
        "import importlib, pkgutil, ood_heatmap\n"
        "for module in pkgutil.walk_packages(ood_heatmap.__path__, 'ood_heatmap.'):\n"
        "    if not module.name.endswith('__main__'):\n"
        "        importlib.import_module(module.name)\n"
        "import ood_heatmap.cache.files, ood_heatmap.pipeline.train\n"
        "print(len([name for name in sys.modules if name.startswith('ood_heatmap.')]))"
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 50


@pytest.mark.slow
def test_every_stage_runs(data, spec, tmp_path):
    code = """
from ood_heatmap.cli import main
data, spec, run = sys.argv[1:]
common = ["--allow-suspicious", "--device", "cpu"]
weights = ["--weights", f"{data}/weights.safetensors"]
commands = [
    ["index", run, "--id", f"{data}/id", "--classifier", spec, *weights, *common],
    ["targets", run, "--ood", f"{data}/ood", "--limit", "40", *common],
    ["plan", "train", run, "--epochs", "1", "--batch-size", "32", "--width", "16"],
    ["train", run, "--epochs", "1", "--batch-size", "32", "--width", "16", "--device", "cpu"],
    ["evaluate", run, "--id", f"{data}/test", "--ood", f"{data}/far", *common],
    ["predict", run, f"{data}/far", "--out", f"{run}/out", "--device", "cpu"],
    ["verify", run],
]
for command in commands:
    main.main(command, standalone_mode=False)
"""
    done = run_python(code, data, spec, tmp_path / "run")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "40 of 40 paired again" in done.stdout
    # the same bytes as with the memory map and the reads of POSIX
    assert sorted(path.name for path in tmp_path.glob("run/.lock*")) == [".lock"]


def test_a_second_writer_is_refused_by_name(tmp_path):
    code = """
import subprocess
from pathlib import Path
from ood_heatmap.cache.files import locked
from ood_heatmap.errors import OodHeatmapError

run, depth = Path(sys.argv[1]), int(sys.argv[2])
try:
    with locked(run):
        print("held by", os.getpid(), flush=True)
        if depth:
            command = [sys.executable, "-c", sys.orig_argv[2], str(run), "0"]
            subprocess.run(command, check=True)
except OodHeatmapError as error:
    print(error)
"""
    done = run_python(code, tmp_path, 1)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    holder = first.removeprefix("held by ")
    assert f"is being written by process {holder} on" in second
    # released: the next one holds it
    done = run_python(code, tmp_path, 0)
    assert done.stdout.startswith("held by"), done.stderr
    assert not (tmp_path / ".lock.holder").exists()


def test_a_killed_writer_leaves_the_run_free(tmp_path):
    code = """
from pathlib import Path
from ood_heatmap.cache.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    if sys.argv[2] == "die":
        os._exit(9)
"""
    assert run_python(code, tmp_path, "die").returncode == 9
    done = run_python(code, tmp_path, "live")
    assert (done.returncode, done.stdout) == (0, "held\n"), done.stderr
