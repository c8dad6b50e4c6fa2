"""Several processes under torchrun: what they exchange, and that they make what one makes."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from ood_heatmap import HeatmapDetector, devices, distributed
from ood_heatmap.cli import main
from ood_heatmap.devices import choose_device, stage_device
from ood_heatmap.errors import OodHeatmapError, UsageError

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@contextmanager
def started(command: list[str], log: Path, *, restarts: int = 0) -> Iterator[subprocess.Popen[str]]:
    """Start a command of ours in two processes under torchrun; it ends with the block."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
    counts = ["--nproc-per-node", "2", "--max-restarts", str(restarts)]
    with log.open("w") as file:
        process = subprocess.Popen(
            [*launcher, *counts, *command], env=ENVIRONMENT, stdout=file, stderr=file, text=True
        )
        try:
            yield process
        finally:
            process.terminate()  # torchrun ends its processes with it
            process.wait()


def run_in_two(command: list[str], log: Path) -> tuple[int, str]:
    """Return the exit code of a command under torchrun, and all that it printed."""
    with started(command, log) as process:
        code = process.wait(timeout=300)
    return code, log.read_text()


@pytest.fixture(scope="module")
def arrays(data, tmp_path_factory) -> Path:
    """Return a folder with ID and OOD sets of several 1 MB shards."""
    folder, generator = tmp_path_factory.mktemp("arrays"), np.random.default_rng(0)
    for name, count in (("id", 3000), ("ood", 1500)):
        coarse = generator.integers(0, 256, (count, 4, 4, 3)).astype(np.uint8)
        np.savez(folder / f"{name}.npz", images=coarse.repeat(4, axis=1).repeat(4, axis=2))
    return folder


def commands(run: Path, arrays: Path, data: Path, spec: str) -> list[list[str]]:
    common = ["--shard-mb", "1", "--batch-size", "64", "--device", "cpu"]
    classifier = ["--classifier", spec, "--weights", f"{data}/weights.safetensors"]
    classifier += ["--feature-maps", "1"]
    program = str(Path(sys.executable).parent / "ood-heatmap")
    return [
        [program, "index", str(run), "--id", f"{arrays}/id.npz", *classifier, *common],
        [program, "targets", str(run), "--ood", f"{arrays}/ood.npz", *common],
    ]


@pytest.fixture(scope="module")
def alone(arrays, data, spec) -> Path:
    """Return a run with the first two stages made by one process."""
    for command in commands(arrays / "alone", arrays, data, spec):
        subprocess.run(command, check=True, capture_output=True, env=ENVIRONMENT)
    return arrays / "alone"


@pytest.mark.slow
def test_two_processes_make_what_one_makes_byte_for_byte(alone, arrays, data, spec, tmp_path, tree):
    wanted = tree(alone)
    assert len([name for name in wanted if name.startswith("index/images")]) > 2
    for command in commands(tmp_path / "run", arrays, data, spec):
        code, printed = run_in_two(command, tmp_path / "log")
        assert code == 0, printed
        assert printed.count("next: ood-heatmap") == 1  # one process speaks for all
    assert tree(tmp_path / "run") == wanted


@pytest.mark.slow
def test_two_processes_evaluate_as_one_does_byte_for_byte(alone, arrays, data, tmp_path, tree):
    program, one, two = commands(alone, arrays, data, "")[0][0], tmp_path / "one", tmp_path / "two"
    train = ["--epochs", "1", "--width", "16", "--device", "cpu"]
    shutil.copytree(alone, one)
    subprocess.run(
        [program, "train", str(one), *train], check=True, capture_output=True, env=ENVIRONMENT
    )
    shutil.copytree(one, two)
    sets = ["--id", f"{arrays}/id.npz", "--ood", f"ood={arrays}/ood.npz", "--near", "ood"]
    options = [*sets, "--batch-size", "100", "--gallery", "4", "--device", "cpu"]
    options += ["--allow-suspicious"]  # it tests on the training images
    subprocess.run(
        [program, "evaluate", str(one), *options], check=True, capture_output=True, env=ENVIRONMENT
    )
    code, printed = run_in_two([program, "evaluate", str(two), *options], tmp_path / "log")
    assert code == 0, printed
    assert printed.count("next: ood-heatmap") == 1
    assert tree(two) == tree(one)
    figures = [json.loads(line) for line in (two / "log.jsonl").read_text().splitlines()]
    scored = {line["set"]: line for line in figures if line["stage"] == "evaluate"}
    assert {name: line["processes"] for name, line in scored.items()} == {
        "id": 2,
        "calibration": 2,
        "mixtures": 2,
        "ood": 2,
    }
    assert sum(line["images"] for line in scored.values()) == 3000 + 1500 + 1000


def test_what_runs_in_one_process_says_so_under_torchrun(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = CliRunner().invoke(main, ["predict", str(tmp_path), str(tmp_path)])
    assert result.exit_code != 0
    assert (
        "predict runs in one process: start it without torchrun"
        in str(result.exception) + result.output
    )


@pytest.mark.slow
def test_what_one_process_cannot_read_ends_all_with_its_name(data, spec, arrays, tmp_path):
    folder = tmp_path / "id"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.png").write_bytes(b"broken")
    command = commands(tmp_path / "run", arrays, data, spec)[0]
    command[command.index("--id") + 1] = str(folder)
    code, printed = run_in_two(command, tmp_path / "log")
    assert code != 0
    assert "0.png is not a readable image" in printed
    assert not (tmp_path / "run" / "index" / "manifest.json").exists()


@pytest.mark.slow
def test_a_killed_process_is_started_again_and_the_stage_ends_the_same(
    alone, arrays, data, spec, tmp_path, tree
):
    run = tmp_path / "run"
    index, _ = commands(run, arrays, data, spec)
    log = tmp_path / "log"
    with started(index, log, restarts=2) as process:
        kill_once_it_has_begun(process, run)
        assert process.wait(timeout=300) == 0, log.read_text()
    assert "exitcode: -9" in log.read_text()
    assert tree(run / "index") == tree(alone / "index")


def kill_once_it_has_begun(process: subprocess.Popen[str], run: Path) -> None:
    """Kill the second of a launcher's processes as soon as the stage has begun."""
    children: list[int] = []
    while len(children) < 2:  # looked up before: the stage is over in a moment
        children = children_of(process)
        assert process.poll() is None
    while not (run / "index" / "unfinished.json").exists():
        assert process.poll() is None
        time.sleep(0.005)
    os.kill(children[1], signal.SIGKILL)


@contextmanager
def two_nodes(command: list[str], folder: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start a command as torchrun does on two machines; each has a group of processes."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = ["--master-addr", "127.0.0.1", "--master-port", str(free.getsockname()[1])]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--no-python", "--nnodes", "2"]
    nodes = []
    for node in ("0", "1"):
        with (folder / node).open("w") as log:
            started = [*launcher, *address, "--node-rank", node, *command]
            nodes.append(subprocess.Popen(started, env=ENVIRONMENT, stdout=log, stderr=log))
    try:
        yield nodes
    finally:
        for process in nodes:
            kill_node(process)


def children_of(process: subprocess.Popen[Any]) -> list[int]:
    """Return the processes that a launcher has started."""
    asked = ["ps", "-o", "pid=", "--ppid", str(process.pid)]
    return [int(pid) for pid in subprocess.run(asked, capture_output=True).stdout.split()]


def kill_node(launcher: subprocess.Popen[bytes]) -> None:
    """Kill a launcher and its processes at once, as a machine without power."""
    for pid in (*children_of(launcher), launcher.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    launcher.wait()


@pytest.mark.slow
def test_two_nodes_of_which_one_dies_make_what_one_process_makes(
    alone, arrays, data, spec, tmp_path, tree
):
    run = tmp_path / "run"
    index, targets = commands(run, arrays, data, spec)
    with two_nodes(index, tmp_path / "killed") as nodes:
        while not (run / "index" / "unfinished.json").exists():
            assert nodes[0].poll() is None
            time.sleep(0.005)
        kill_node(nodes[1])
        assert nodes[0].wait(timeout=100) != 0
    assert "rank 0 of 2 lost contact with the other ranks" in (tmp_path / "killed/0").read_text()
    assert not (run / "index" / "manifest.json").exists()
    for name, command in (("index", index), ("targets", targets)):
        with two_nodes(command, tmp_path / name) as nodes:
            codes = [node.wait(timeout=300) for node in nodes]
        assert codes == [0, 0], (tmp_path / name / "0").read_text()
    assert tree(run) == tree(alone)


def test_ranks_that_cannot_be_reached_are_one_line_with_the_way_out(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("Gloo connectFullMesh failed with ... Connection refused\nframe #0")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed, "rendezvous", refuse)
    with (
        pytest.raises(
            OodHeatmapError, match=r"cannot reach .*refused\)\..*GLOO_SOCKET_IFNAME"
        ) as error,
        distributed.process_group(torch.device("cpu")),
    ):
        pass
    assert "\n" not in str(error.value)


def test_one_process_exchanges_nothing():
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.all_gather({"a": 1}) == [{"a": 1}]
    assert distributed.broadcast(3) == 3
    with distributed.process_group(torch.device("cpu")), distributed.main_process_first():
        distributed.barrier()


def test_only_the_command_line_sets_the_memory_allocator_of_the_process(finished_run, monkeypatch):
    calls = []
    monkeypatch.setattr(devices, "keep_freed_memory", lambda: calls.append(1))
    choose_device("cpu")
    HeatmapDetector.load(finished_run, "cpu")
    assert calls == []
    with stage_device("cpu") as device:
        assert device == torch.device("cpu")
    assert calls == [1]


def test_under_torchrun_each_process_takes_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto") == torch.device("cuda", 0)
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda", 1)
    with pytest.raises(UsageError, match=r"cuda:1 is one GPU for 3 processes\. Use --device cuda"):
        choose_device("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UsageError, match="3 processes need a GPU each and this machine has 2"):
        choose_device("auto")
