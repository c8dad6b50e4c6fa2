"""A plan says what the stage then takes, and leaves everything as it was."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from click.testing import CliRunner
from safetensors.torch import save_file

from ood_heatmap.cache.shards import map_shard
from ood_heatmap.classifier import load_classifier
from ood_heatmap.cli import main
from ood_heatmap.cli_stages import plan
from ood_heatmap.pipeline import plan as module
from ood_heatmap.pipeline import schedule
from ood_heatmap.pipeline.config import IndexConfig, TargetsConfig, TrainConfig
from ood_heatmap.pipeline.index import build_index
from ood_heatmap.pipeline.plan import (
    Plan,
    _find_shortages,
    format_plan,
    plan_index,
    plan_targets,
    plan_train,
)
from ood_heatmap.pipeline.targets import build_targets
from ood_heatmap.source_array import from_array
from ood_heatmap.sources import open_images

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "_PROBE_SECONDS", 0.0)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def array_bytes(run: Path, stage: str) -> int:
    shards = [map_shard(path) for path in (run / stage).glob("*.h5")]
    return sum(array.nbytes for shard in shards for array in shard.values())


def test_the_index_takes_what_was_planned(run, data, classifier):
    found = plan_index(open_images(str(data / "id")), classifier, IndexConfig(batch_size=16))
    weights = sum(item.nbytes for item in classifier.network.state_dict().values())
    assert found.rows == 80
    assert found.disk == array_bytes(run, "index") + 80 * 8 * 4 + weights
    assert found.on_gpu == 0
    assert found.seconds == pytest.approx(80 / found.rate)


@pytest.mark.parametrize(("cores", "shards"), [(1, 3), (8, 4), (64, 6)])
def test_shards_that_wait_to_be_written_count_as_memory(
    data, classifier, monkeypatch, cores, shards
):
    images, config = open_images(str(data / "id")), IndexConfig(batch_size=16, shard_mb=128)
    monkeypatch.setattr(schedule, "num_cores", lambda: cores)
    monkeypatch.setattr(module, "_peak_host_bytes", lambda: 0)
    bank = 4 * len(images) * classifier.num_features
    planned = plan_index(images, classifier, config)
    assert planned.host - bank == shards * 128_000_000


def test_the_targets_take_what_was_planned(run, data):
    images, config = open_images(str(data / "ood")), TargetsConfig(batch_size=16, patched=0.0)
    found = plan_targets(run, images, CPU, config)
    assert found.rows == 50
    assert found.disk == array_bytes(run, "targets")
    patched = plan_targets(run, images, CPU, TargetsConfig(batch_size=16, patched=0.5))
    assert (patched.rows, patched.disk) == (75, found.disk * 1.5)


def test_rows_of_photographs_through_a_resnet50_take_what_was_planned(tmp_path):
    """A real network at 224 px: its maps of 2048 and 1024 channels are projected."""
    torch.manual_seed(0)
    save_file(
        torchvision.models.resnet50(num_classes=4).state_dict(), tmp_path / "weights.safetensors"
    )
    classifier = load_classifier(
        "torchvision/resnet50", weights=tmp_path / "weights.safetensors", num_classes=4, num_maps=2
    )
    generator = np.random.default_rng(0)
    id_images, ood = (
        from_array(generator.integers(0, 256, (count, 224, 224, 3)).astype(np.uint8))
        for count in (6, 4)
    )
    index_config, targets_config = IndexConfig(batch_size=4), TargetsConfig(batch_size=4, patched=0)
    planned = plan_index(id_images, classifier, index_config)
    run, num_weights = tmp_path / "run", sum(item.nbytes for item in classifier.network.buffers())
    num_weights += sum(item.nbytes for item in classifier.network.parameters())
    build_index(run, id_images, classifier, index_config)
    # image, features, maps of 128 x 7 x 7 and 32 x 14 x 14 in float16, class, label and row
    assert array_bytes(run, "index") == 6 * (150_528 + 8_192 + 12_544 + 12_544 + 16)
    assert planned.disk == array_bytes(run, "index") + 6 * 8_192 + num_weights
    planned = plan_targets(run, ood, CPU, targets_config)
    build_targets(run, ood, CPU, targets_config)
    # heatmap and presence at 56 px, features, maps, six numbers
    assert array_bytes(run, "targets") == 4 * (18_816 + 3_136 + 8_192 + 2 * 12_544 + 26)
    assert planned.disk == array_bytes(run, "targets")


def test_training_takes_what_was_planned(run):
    found = plan_train(run, CPU, TrainConfig(epochs=3, batch_size=32, width=32, feature_maps=0))
    decoder = (run / "decoder" / "decoder.safetensors").stat().st_size  # of the same width
    assert found.disk == pytest.approx(4 * decoder, rel=0.1)
    assert found.rows == 130
    assert found.seconds == pytest.approx(3 * 128 / found.rate)
    assert found.feed == "resident"


def test_a_resident_feed_counts_as_memory_and_a_streaming_one_does_not(run, monkeypatch):
    monkeypatch.setattr(module, "_peak_host_bytes", lambda: 0)
    config: dict[str, Any] = {"epochs": 1, "batch_size": 32, "width": 32, "feature_maps": 0}
    resident, streaming = (
        plan_train(run, CPU, TrainConfig(**config, feed=feed)) for feed in ("resident", "streaming")
    )
    assert streaming.host == 0
    assert resident.host == 130 * (8 * 4 + 4) + 50 * 16 * 16 * (3 * 2 + 1)


def test_what_does_not_fit_is_named(tmp_path):
    small = Plan(rows=1, disk=1, host=1, on_gpu=0, seconds=75, rate=2)
    assert _find_shortages(small, tmp_path / "run", CPU) == []
    lines = format_plan(small, tmp_path / "not" / "there", CPU)
    assert "time    about 1 min 15 s on cpu, from 2 images/s" in lines
    assert lines[-1] == "all of it fits"
    large = Plan(rows=1, disk=10**18, host=10**17, on_gpu=0, seconds=1, rate=1)
    disk, memory = _find_shortages(large, tmp_path / "not" / "there", CPU)
    assert disk.startswith(f"does not fit: the disk of {tmp_path}: 1,000,000,000,000 MB are needed")
    assert memory.startswith("does not fit: RAM: 100,000,000,000 MB are needed")


def test_plan_takes_the_arguments_of_each_stage_and_writes_nothing(run, data, spec, tmp_path):
    index = [tmp_path / "new", "--id", data / "id", "--classifier", spec]
    commands = {
        "index": [*index, "--weights", data / "weights.safetensors"],
        "targets": [run, "--ood", data / "ood", "--limit", 40],
        "train": [run, "--epochs", 2, "--width", 32, "--batch-size", 32],
    }
    before = tree(tmp_path)
    for name, arguments in commands.items():
        planned, stage = plan.commands[name], main.commands[name]
        assert [item.to_info_dict() for item in planned.params] == [
            item.to_info_dict() for item in stage.params
        ]
        typed = ["plan", name, *arguments, "--device", "cpu"]
        result = CliRunner().invoke(main, [str(item) for item in typed])
        assert result.exit_code == 0, result.output
        for word in ("rows ", "disk ", "memory ", "time ", "all of it fits"):
            assert word in result.output
    assert "feed    resident" in result.output
    assert tree(tmp_path) == before
    assert not (tmp_path / "new").exists()


def test_a_plan_of_what_is_not_there_yet_is_one_line(run, tmp_path):
    (tmp_path / "empty").mkdir()
    result = CliRunner().invoke(main, ["plan", "train", str(tmp_path / "empty"), "--device", "cpu"])
    assert result.exit_code == 1
    assert "has no index stage: run `ood-heatmap index" in result.output
