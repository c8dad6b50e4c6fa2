"""Trackers log each epoch of a training once, also when it is stopped and resumed."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch.distributed.run import get_args_parser

from ood_heatmap.adapters.tracking import Epoch, open_trackers
from ood_heatmap.cli import main
from ood_heatmap.errors import OodHeatmapError, UsageError
from ood_heatmap.pipeline import train as module
from ood_heatmap.pipeline.config import TrainConfig
from ood_heatmap.pipeline.run import read_manifest
from ood_heatmap.pipeline.step import lr_at
from ood_heatmap.pipeline.train import train_decoder

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"epochs": 4, "batch_size": 32, "width": 32, "feature_maps": 0, "seed": 1}
# 80 ID and 50 OOD images
BATCHES = 130 // 32


def losses(run: Path) -> list[float]:
    lines = (run / "decoder" / "history.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def train(run: Path, *log: str, **settings: Any) -> None:
    train_decoder(run, CPU, TrainConfig(**{**SMALL, "overwrite": True, **settings}, log=log))


def stop_without_checkpoint(run: Path, monkeypatch: pytest.MonkeyPatch, *log: str) -> None:
    """Train two epochs with a checkpoint after the first only, so that the second is repeated."""
    save = module._save_checkpoint

    def save_once(*arguments: Any) -> None:
        save(*arguments)
        monkeypatch.setattr(module, "_save_checkpoint", stop)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(module, "_save_checkpoint", save_once)
    with pytest.raises(KeyboardInterrupt):
        train(run, *log)
    monkeypatch.setattr(module, "_save_checkpoint", save)


def test_callbacks_are_told_every_epoch(run):
    epochs: list[Epoch] = []
    config = TrainConfig(**SMALL, overwrite=True)
    train_decoder(run, CPU, config, [epochs.append])
    assert [epoch.number for epoch in epochs] == [1, 2, 3, 4]
    assert [epoch.loss for epoch in epochs] == losses(run)
    wanted = [lr_at(BATCHES * epoch - 1, BATCHES * 4, config) for epoch in (1, 2, 3, 4)]
    assert [epoch.lr for epoch in epochs] == wanted
    assert all(epoch.images_per_second > 0 for epoch in epochs)
    train_decoder(run, CPU, TrainConfig(**SMALL), [epochs.append])
    assert len(epochs) == 4  # nothing was trained


def test_other_ranks_tell_nothing(monkeypatch):
    epochs: list[Epoch] = []
    monkeypatch.setattr(module, "is_main", lambda: False)
    module._report([epochs.append], Epoch(1, 0.5, 0.1, 10.0))
    assert epochs == []


def test_torchrun_passes_the_option_on():
    # without the separator it takes --log for an abbreviation of its own options
    command = ["ood-heatmap", "train", "run", "--log", "tensorboard"]
    given = get_args_parser().parse_args(["--nproc-per-node", "2", "--no-python", "--", *command])
    assert [given.training_script, *given.training_script_args] == command


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    """Return step and value of every event that TensorBoard shows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    accumulator = EventAccumulator(str(folder)).Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(name)]


def test_tensorboard_shows_each_epoch_once_also_after_a_resume(run, monkeypatch):
    pytest.importorskip("tensorboard")
    stop_without_checkpoint(run, monkeypatch, "tensorboard")
    train(run, "tensorboard")
    (folder,) = (run / "tensorboard").iterdir()
    shown = scalars(folder, "train/loss")
    assert [step for step, _ in shown] == [1, 2, 3, 4]
    assert [value for _, value in shown] == pytest.approx(losses(run))
    assert len(scalars(folder, "train/lr")) == len(scalars(folder, "train/images_per_second")) == 4


def test_a_training_that_is_complete_leaves_no_empty_directory(run):
    pytest.importorskip("tensorboard")
    options = read_manifest(run, "decoder").inputs["options"]
    train_decoder(run, CPU, TrainConfig(**options, log=("tensorboard",)))
    assert not (run / "tensorboard").exists()


def test_tensorboard_keeps_trainings_with_other_settings_apart(run, tmp_path):
    pytest.importorskip("tensorboard")
    place = f"tensorboard:{tmp_path / 'curves'}"
    train(run, place, epochs=1)
    train(run, place, epochs=2)
    folders = list((tmp_path / "curves").iterdir())
    assert sorted(len(scalars(folder, "train/loss")) for folder in folders) == [1, 2]
    assert not (run / "tensorboard").exists()


@pytest.fixture
def mlflow(tmp_path, monkeypatch) -> tuple[Any, str]:
    """Return a client of MLflow without a server, and its URI."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = pytest.importorskip("mlflow").MlflowClient
    uri = (tmp_path / "mlruns").as_uri()
    return client(uri), uri


def test_mlflow_shows_each_epoch_once_also_after_a_resume(run, monkeypatch, mlflow):
    client, uri = mlflow
    stop_without_checkpoint(run, monkeypatch, f"mlflow:{uri}")
    experiment = client.get_experiment_by_name("ood_heatmap").experiment_id
    (found,) = client.search_runs([experiment])
    assert found.info.status == "FAILED"
    train(run, f"mlflow:{uri}")
    (found,) = client.search_runs([experiment])
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "run"
    assert found.data.params["width"] == "32"
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [metric.step for metric in history] == [1, 2, 3, 4]
    assert [metric.value for metric in history] == losses(run)
    train(run, f"mlflow:{uri}", epochs=1)
    assert len(client.search_runs([experiment])) == 2


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_a_missing_package_is_one_line_before_anything_is_discarded(run, monkeypatch, name, tree):
    before = tree(run)
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    result = CliRunner().invoke(main, ["train", str(run), "--overwrite", "--log", name])
    assert result.exit_code == 2
    assert f"--log {name} needs a package that is not installed" in result.output
    assert f"pip install 'ood-heatmap[{name}]'" in result.output
    assert tree(run) == before


@pytest.mark.parametrize("spec", ["wandb", "tensorboard/x", ""])
def test_an_unknown_tracker_is_refused(tmp_path, spec):
    with (
        pytest.raises(UsageError, match=r"must be tensorboard\[:DIR\] or mlflow\[:URI\]"),
        open_trackers([spec], tmp_path, "0" * 64, {}),
    ):
        pass


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "file").write_text("")
    place = f"tensorboard:{tmp_path / 'file'}"
    with (
        pytest.raises(OodHeatmapError, match="cannot log to tensorboard:") as caught,
        open_trackers([place], tmp_path, "0" * 64, {}),
    ):
        pass
    assert "\n" not in str(caught.value)


def test_a_tracker_that_fails_later_costs_a_warning_and_not_the_training(tmp_path, caplog):
    pytest.importorskip("tensorboard")
    with open_trackers(["tensorboard"], tmp_path, "0" * 64, {}) as (callback,):
        # not a directory any more
        (tmp_path / "tensorboard" / "00000000").rmdir()
        (tmp_path / "tensorboard" / "00000000").write_text("")
        callback(Epoch(1, 0.5, 0.1, 10.0))
        callback(Epoch(2, 0.5, 0.1, 10.0))
    (message,) = caplog.messages
    assert message.startswith("cannot log to tensorboard")
    assert "epochs from 1 on are in history.jsonl only" in message
