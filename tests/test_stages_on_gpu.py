"""All four stages on the simulated GPU: what is stored is what the CPU stores."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from simulated_cuda import CUDA, refuse_waiting, simulated_cuda

from ood_heatmap.pipeline import train as module
from ood_heatmap.pipeline.config import EvaluateConfig, LocalizeConfig, TrainConfig
from ood_heatmap.pipeline.evaluate import evaluate
from ood_heatmap.pipeline.localize import localize
from ood_heatmap.pipeline.run import Index
from ood_heatmap.pipeline.train import train_decoder
from ood_heatmap.sources import open_images


@contextmanager
def strict_gpu() -> Iterator[torch.device]:
    """Yield the simulated GPU, for which no epoch of a training may wait."""
    show_progress = module._show_progress

    def strict(*arguments):
        with refuse_waiting(CUDA):
            yield from show_progress(*arguments)

    with simulated_cuda(), mock.patch.object(module, "_show_progress", strict):
        yield CUDA


@pytest.fixture(scope="module")
def gpu_run(make_run: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with all four stages, made on the simulated GPU."""
    with strict_gpu() as device:
        return make_run(tmp_path_factory.mktemp("runs") / "gpu", device)


def history(run: Path) -> list[float]:
    lines = (run / "decoder" / "history.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def assert_same_decoder(run: Path, other: Path) -> None:
    """Make sure that two trainings agree; the learning rate of a GPU is a float32."""
    assert history(run) == pytest.approx(history(other), rel=1e-6)
    ours, theirs = (load_file(item / "decoder" / "decoder.safetensors") for item in (run, other))
    for name, item in theirs.items():
        np.testing.assert_allclose(ours[name], item, rtol=0, atol=1e-6, err_msg=name)


def test_shards_and_index_are_those_of_the_cpu_byte_by_byte(gpu_run, finished_run):
    names = [
        path.relative_to(finished_run)
        for stage in ("index", "targets")
        for path in (finished_run / stage).iterdir()
        if path.suffix in (".h5", ".faiss")
    ]
    assert len(names) > 2
    for name in names:
        assert (gpu_run / name).read_bytes() == (finished_run / name).read_bytes(), name


def test_decoder_and_evaluation_are_those_of_the_cpu(gpu_run, finished_run):
    assert_same_decoder(gpu_run, finished_run)
    for path in (finished_run / "evaluation").glob("scores-*.npz"):
        with np.load(path) as theirs, np.load(gpu_run / "evaluation" / path.name) as ours:
            assert ours.files == theirs.files
            for name in theirs.files:
                if theirs[name].dtype.kind == "f":
                    np.testing.assert_allclose(
                        ours[name], theirs[name], rtol=1e-4, atol=1e-5, err_msg=name
                    )
                else:
                    np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_few_queries_do_not_move_the_bank_to_a_gpu(gpu_run, data, tmp_path, monkeypatch):
    """The report and localize search for some hundred images."""
    run = shutil.copytree(gpu_run, tmp_path / "run")
    shutil.rmtree(run / "evaluation")
    banks, open_bank = [], Index.bank
    monkeypatch.setattr(
        Index, "bank", lambda index, device: banks.append(open_bank(index, device)) or banks[-1]
    )
    test, far = (open_images(str(data / name)) for name in ("test", "far"))
    with simulated_cuda():
        evaluate(run, test, {"far": far}, CUDA, EvaluateConfig(batch_size=16, gallery=2))
        localize(run, test, {"far": far}, CUDA, LocalizeConfig(count=2))
    assert [bank.device.type for bank in banks] == ["cpu", "cpu"]


@pytest.mark.parametrize(
    ("feed", "step"), [("resident", "eager"), ("pinned", "graph"), ("streaming", "graph")]
)
@pytest.mark.parametrize("stack", ["split", "plain", "dcgan"])
def test_every_feed_and_step_trains_as_the_cpu(gpu_run, tmp_path, feed, step, stack):
    target = "presence" if stack == "split" else "magnitude"
    options: dict[str, Any] = {
        "epochs": 1,
        "batch_size": 32,
        "width": 16,
        "stack": stack,
        "target": target,
        "overwrite": True,
    }
    for name in ("cpu", "gpu"):
        shutil.copytree(gpu_run, tmp_path / name)
    train_decoder(tmp_path / "cpu", torch.device("cpu"), TrainConfig(**options))
    with strict_gpu() as device:
        train_decoder(tmp_path / "gpu", device, TrainConfig(**options, feed=feed, step=step))
    assert_same_decoder(tmp_path / "gpu", tmp_path / "cpu")
