"""Stage 3: the decoder learns what it should, the same every time, also when it is stopped."""

import copy
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ood_heatmap.cache.manifest import Manifest
from ood_heatmap.errors import DamagedCacheError, OodHeatmapError, StaleCacheError
from ood_heatmap.heatmap import score, target_heatmap
from ood_heatmap.pipeline import train as module
from ood_heatmap.pipeline.config import TargetsConfig, TrainConfig
from ood_heatmap.pipeline.feed import TrainingBatch, _iter_groups
from ood_heatmap.pipeline.progress import Progress
from ood_heatmap.pipeline.run import (
    Index,
    open_decoder,
    open_index,
    open_targets,
    read_manifest,
)
from ood_heatmap.pipeline.stage import Stage
from ood_heatmap.pipeline.step import lr_at, make_step
from ood_heatmap.pipeline.targets import build_targets
from ood_heatmap.pipeline.train import train_decoder
from ood_heatmap.sources import open_images

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "epochs": 4,
    "batch_size": 32,
    "width": 32,
    "feature_maps": 0,
    "overwrite": True,
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "_CHECKPOINT_SECONDS", 0.0)


def weights(run) -> bytes:
    return (run / "decoder" / "decoder.safetensors").read_bytes()


def history(run) -> list[float]:
    lines = (run / "decoder" / "history.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize("target", ["magnitude", "signed"])
def test_the_loss_falls_and_ood_images_score_higher(run, target):
    train_decoder(
        run,
        CPU,
        TrainConfig(**{**SMALL, "epochs": 60, "lr": 2e-3, "stack": "plain"}, target=target),
    )
    losses = history(run)
    assert losses[-1] < 0.85 * losses[0]
    index = open_index(run)
    decoder = open_decoder(run, index.manifest, CPU).decoder
    scores = []
    for columns in (index.columns, open_targets(run, index).columns):
        features = torch.from_numpy(columns["features"].read())
        prediction = torch.from_numpy(columns["prediction"].read())
        with torch.no_grad():
            scores.append(score(decoder(features, prediction)).mean().item())
    assert scores[1] > scores[0]


@pytest.fixture
def in_float64(monkeypatch):
    """Train in float64: runs that round differently then differ by 1e-12 and not by 1e-3.

    In float32 rounding decides now and then on which side of 0 a ReLU's input is, which moves all
    weights of that unit by a whole step of Adam: after 12 steps a run differs from its float64 twin
    by 1e-6 to 1e-1 of what it has learnt, depending on seed and processor.
    """
    make = module._new_decoder
    monkeypatch.setattr(
        module, "_new_decoder", lambda *given, **kind: make(*given, **kind).double()
    )


def train_by_the_formulas(run, config) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Return weights and losses of the same training, written out with plain indexing."""
    index = open_index(run)
    targets = open_targets(run, index).columns
    features, prediction = (
        torch.from_numpy(np.concatenate([index.columns[name].read(), targets[name].read()]))
        for name in ("features", "prediction")
    )
    stored = np.concatenate([np.zeros((80, 3, 16, 16), np.int16), targets["heatmap"].read()])
    targets_of_all = target_heatmap(torch.from_numpy(stored), signed=False)
    torch.manual_seed(config.seed)
    decoder = module._new_decoder(index, 16, config)
    optimizer = torch.optim.Adam(decoder.parameters(), config.lr, betas=(0.5, 0.999))
    losses = []
    for epoch in range(config.epochs):
        for rows in np.split(next(_iter_groups(130, config.seed, epoch))[:128], 4):
            target = targets_of_all[rows]
            found = decoder(features[rows], prediction[rows])
            loss = ((1 + 5 * target) * (found - target) ** 2).sum() / 32
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return decoder.state_dict(), np.mean(np.split(np.array(losses), config.epochs), axis=1).tolist()


PAPER: dict[str, Any] = {
    "stack": "dcgan",
    "target": "magnitude",
    "schedule": "constant",
    "lr": 2e-4,
    "region_weight": 0.0,
}


def test_training_is_the_plain_loop_over_cached_arrays(run, in_float64):
    """The truth: the same steps written out with plain indexing and torch's own Adam."""
    config = TrainConfig(**{**SMALL, "epochs": 2}, **PAPER)
    train_decoder(run, CPU, config)
    wanted, losses = train_by_the_formulas(run, config)
    assert history(run) == pytest.approx(losses, rel=1e-6)  # summed in float32
    for name, value in state(run).items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-7, atol=1e-9)


def test_twice_the_same_gives_the_same_bytes(run):
    train_decoder(run, CPU, TrainConfig(**SMALL, seed=5))
    first = weights(run)
    train_decoder(run, CPU, TrainConfig(**SMALL, seed=6))
    assert weights(run) != first
    train_decoder(run, CPU, TrainConfig(**SMALL, seed=5))
    assert weights(run) == first


@pytest.mark.parametrize("stop_after", [1, 3])
def test_a_stopped_training_goes_on_to_the_same_bytes(run, monkeypatch, stop_after, tree):
    config = TrainConfig(**SMALL)
    train_decoder(run, CPU, config)
    unbroken = tree(run / "decoder")
    train_decoder(run, CPU, TrainConfig(**SMALL, seed=1))
    save_checkpoint, count = module._save_checkpoint, [0]

    def stop(*arguments):
        save_checkpoint(*arguments)
        count[0] += 1
        if count[0] == stop_after:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "_save_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        train_decoder(run, CPU, config)
    assert len(history(run)) == stop_after
    monkeypatch.setattr(module, "_save_checkpoint", save_checkpoint)
    train_decoder(run, CPU, config)
    assert tree(run / "decoder") == unbroken


@pytest.mark.parametrize("feed", ["memory", "streaming"])
def test_all_feeds_train_the_same_decoder(run, feed):
    train_decoder(run, CPU, TrainConfig(**SMALL, feed="resident"))
    resident = weights(run)
    (run / "decoder" / "manifest.json").unlink()
    train_decoder(run, CPU, TrainConfig(**SMALL, feed=feed))
    assert weights(run) == resident


def test_feature_maps_are_taken_when_asked_for(run):
    manifest = train_decoder(run, CPU, TrainConfig(**{**SMALL, "feature_maps": 2}))
    assert manifest.results["decoder"]["map_shapes"] == [[8, 4, 4], [6, 8, 8]]
    decoder = open_decoder(run, read_manifest(run, "index"), CPU).decoder
    assert len(list(decoder.get_submodule("maps").children())) == 2


def test_feature_maps_that_were_not_cached_are_one_line(run):
    with pytest.raises(OodHeatmapError, match="cached 2 feature maps, --feature-maps asks for 3"):
        train_decoder(run, CPU, TrainConfig(**{**SMALL, "feature_maps": 3}))


def test_the_image_head_does_not_depend_on_the_pairing(run, data):
    """Nor does any score: beside the image head they see no target."""
    found = {}
    for pairing in ("nearest", "random"):
        targets = TargetsConfig(batch_size=16, patched=1.0, pairing=pairing, overwrite=True)
        build_targets(run, open_images(str(data / "ood")), CPU, targets)
        train_decoder(run, CPU, TrainConfig(epochs=2, batch_size=32, overwrite=True))
        found[pairing] = load_file(run / "decoder" / "decoder.safetensors")
    heads: dict[bool, set[str]] = {True: set(), False: set()}
    for name, values in found["nearest"].items():
        heads[torch.equal(values, found["random"][name])].add(name.partition(".")[0])
    assert {"image_head", "image"} <= heads[True] - heads[False]
    # the place head shares its convolutions with the difference to the partner
    assert heads[False] == {"maps", "deepest", "places", "place", "difference"}


def test_bfloat16_trains_near_float32(run):
    train_decoder(run, CPU, TrainConfig(**SMALL))
    single = history(run)
    train_decoder(run, CPU, TrainConfig(**SMALL, precision="bfloat16"))
    np.testing.assert_allclose(history(run), single, rtol=0.05)
    with safe_open(run / "decoder" / "decoder.safetensors", "pt") as file:
        dtypes = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert dtypes == {torch.float32}


def test_a_larger_batch_than_there_are_images_is_all_images(run):
    train_decoder(run, CPU, TrainConfig(**{**SMALL, "batch_size": 10_000}))
    assert len(history(run)) == 4


@pytest.mark.parametrize("option", ["epochs", "batch_size", "lr", "seed", "target", "width"])
def test_other_settings_are_refused_by_name(run, option):
    other = {"epochs": 9, "batch_size": 9, "lr": 5e-3, "seed": 9, "target": "signed", "width": 64}
    settings = {
        **TrainConfig(epochs=2, batch_size=32, width=32, feature_maps=0).__dict__,
        option: other[option],
        **({"stack": "plain"} if option == "target" else {}),
    }
    with pytest.raises(StaleCacheError, match=rf"different .*options.{option} "):
        train_decoder(run, CPU, TrainConfig(**settings))


def test_a_loss_that_is_not_finite_stops_and_says_what_to_do(run):
    for _ in range(2):  # again the same
        with pytest.raises(
            OodHeatmapError, match=r"no longer finite .* lower --lr and --overwrite"
        ):
            train_decoder(run, CPU, TrainConfig(**{**SMALL, "lr": 1e38}))
    assert [path.name for path in (run / "decoder").iterdir()] == ["unfinished.json"]
    train_decoder(run, CPU, TrainConfig(**SMALL))


def test_weights_that_the_last_step_made_infinite_are_not_kept(run, monkeypatch):
    """Their loss was finite: it is that of the weights before the step."""

    def make_breaking_step(decoder, *arguments):
        kind, step = make_step(decoder, *arguments)

        def breaking_step(batch):
            loss = step(batch)
            with torch.no_grad():
                decoder.difference.bias[0] = torch.inf
            return loss

        return kind, breaking_step

    monkeypatch.setattr(module, "make_step", make_breaking_step)
    config = TrainConfig(**{**SMALL, "epochs": 1, "batch_size": 130})
    with pytest.raises(OodHeatmapError, match="no longer finite in epoch 1"):
        train_decoder(run, CPU, config)
    assert [path.name for path in (run / "decoder").iterdir()] == ["unfinished.json"]


def stop_after(epochs: int, run, config, monkeypatch) -> None:
    """Train until a checkpoint holds some epochs, as a kill would leave it."""
    check_finite = module._check_finite

    def stop(losses, decoder):
        check_finite(losses, decoder)
        if len(losses) > epochs:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_check_finite", stop)
        with pytest.raises(KeyboardInterrupt):
            train_decoder(run, CPU, config)


@pytest.fixture
def unbroken(run, tree) -> dict[str, bytes]:
    """Return the stage of an unbroken training, which is removed again."""
    train_decoder(run, CPU, TrainConfig(**SMALL))
    made = tree(run / "decoder")
    shutil.rmtree(run / "decoder")
    return made


@pytest.mark.parametrize("damage", ["a flipped bit", "a cut", "nothing in it"])
def test_a_damaged_checkpoint_is_said_and_training_starts_over(
    run, unbroken, tree, monkeypatch, caplog, damage
):
    stop_after(2, run, TrainConfig(**SMALL), monkeypatch)
    path = run / "decoder" / "last.ckpt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # among the weights: torch.load does not look at checksums
    kept = {"a flipped bit": len(content), "a cut": 1000, "nothing in it": 0}[damage]
    path.write_bytes(content[:kept])
    train_decoder(run, CPU, TrainConfig(**SMALL))
    assert "last.ckpt is damaged: training starts over from the first epoch" in caplog.text
    assert tree(run / "decoder") == unbroken


def test_a_resumed_training_takes_the_ranges_of_its_inputs_from_the_checkpoint(
    run, unbroken, tree, monkeypatch
):
    stop_after(2, run, TrainConfig(**SMALL), monkeypatch)
    # to compute them would fail
    monkeypatch.setattr(module, "input_ranges", None)
    train_decoder(run, CPU, TrainConfig(**SMALL))
    assert tree(run / "decoder") == unbroken


@pytest.mark.parametrize("state", [[], {}, {"fingerprint": "other"}, {"history": [1]}])
def test_a_checkpoint_that_is_another_thing_is_one_line(run, monkeypatch, state):
    config = TrainConfig(**{**SMALL, "seed": 3})
    stop_after(1, run, config, monkeypatch)
    path = run / "decoder" / "last.ckpt"
    if isinstance(state, dict):
        state = {**torch.load(path, weights_only=True), **state} if state else state
    stage = Stage(
        run, "decoder", json.loads((path.parent / "unfinished.json").read_text())["inputs"]
    )
    with stage.writing("last.ckpt") as scratch:
        torch.save(state, scratch)
    with pytest.raises(DamagedCacheError, match=r"cannot resume from .*last\.ckpt .* Delete it"):
        train_decoder(run, CPU, config)
    path.unlink()
    train_decoder(run, CPU, config)


@pytest.mark.parametrize("checkpoints", ["each epoch", "the last alone"])
def test_killed_before_the_last_history_it_is_written_from_the_checkpoint(
    run, unbroken, tree, monkeypatch, checkpoints
):
    if checkpoints == "the last alone":
        monkeypatch.setattr(module, "_CHECKPOINT_SECONDS", 3600.0)
    write_history = module._write_history

    def killed(stage, losses):
        if len(losses) == SMALL["epochs"]:
            raise KeyboardInterrupt
        write_history(stage, losses)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_write_history", killed)
        with pytest.raises(KeyboardInterrupt):
            train_decoder(run, CPU, TrainConfig(**SMALL))
    assert (run / "decoder" / "last.ckpt").is_file()
    train_decoder(run, CPU, TrainConfig(**SMALL))
    assert tree(run / "decoder") == unbroken


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("raised", "error"), [(FULL, OodHeatmapError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_a_checkpoint_that_cannot_be_written_leaves_nothing_behind(
    run, unbroken, tree, monkeypatch, raised, error
):
    write_bytes = Path.write_bytes

    def fail_half_way(path, content):
        if "last.ckpt" not in path.name:
            return write_bytes(path, content)
        write_bytes(path, content[: len(content) // 2])
        raise raised

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fail_half_way)
        with pytest.raises(error):
            train_decoder(run, CPU, TrainConfig(**SMALL))
    assert [path.name for path in (run / "decoder").iterdir()] == ["unfinished.json"]
    train_decoder(run, CPU, TrainConfig(**SMALL))
    assert tree(run / "decoder") == unbroken


def test_a_stopped_training_is_not_resumed_with_other_settings(run, monkeypatch):
    stop_after(1, run, TrainConfig(**SMALL), monkeypatch)
    other = {**SMALL, "lr": 5e-3, "overwrite": False}
    with pytest.raises(StaleCacheError, match=r"different options\.lr "):
        train_decoder(run, CPU, TrainConfig(**other))
    train_decoder(run, CPU, TrainConfig(**{**other, "overwrite": True}))
    assert len(history(run)) == SMALL["epochs"]


@pytest.mark.parametrize("ceiling", [1e-3, 1e9])
def test_the_output_says_how_near_the_ceiling_it_came(run, caplog, monkeypatch, ceiling):
    caplog.set_level("INFO")
    monkeypatch.setattr("ood_heatmap.pipeline.train.measure_ceiling", lambda *_: ceiling)
    train_decoder(run, CPU, TrainConfig(**SMALL))
    assert ("% of the ceiling" in caplog.text) == (ceiling == 1e9)
    assert ("the ceiling could not be measured" in caplog.text) == (ceiling == 1e-3)
    assert "resident feed" in caplog.text
    last = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    assert last["stage"] == "train"
    assert read_manifest(run, "decoder").speed.items() <= last.items()
    # a share above 1 says that the ceiling is wrong
    assert ("share_of_ceiling" in last) == ("ceiling_images_per_second" in last) == (ceiling == 1e9)
    assert last.get("share_of_ceiling", 0) <= 1


def test_a_decoder_of_another_index_is_refused(run):
    index = read_manifest(run, "index")
    other = Manifest("index", {"other": 1}, index.content, index.results, index.files)
    with pytest.raises(StaleCacheError, match="built from a different index"):
        open_decoder(run, other, CPU)


def test_a_step_without_memory_is_one_line(run, monkeypatch):
    def full(*_):
        raise torch.AcceleratorError("CUDA error: out of memory")

    monkeypatch.setattr(module, "make_step", lambda *_: ("eager", full))
    with pytest.raises(OodHeatmapError, match=r"steps of 32 images .* Use a smaller --batch-size"):
        train_decoder(run, CPU, TrainConfig(**SMALL))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
# said once in a process, by whichever of these is the first
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("step", ["eager", "graph"])
@pytest.mark.parametrize("feed", ["resident", "memory", "streaming"])
def test_an_epoch_never_waits_for_the_gpu(run, monkeypatch, feed, step):
    show_progress = module._show_progress

    def strict(*arguments):
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield from show_progress(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(module, "_show_progress", strict)
    config = TrainConfig(**SMALL, feed=feed, step=step)
    train_decoder(run, torch.device("cuda", 0), config)
    assert len(history(run)) == 4


TRAIN = """
import os, signal, sys
from ood_heatmap.cli import main
from ood_heatmap.pipeline import train as module

module._CHECKPOINT_SECONDS = 0.0
make, save_checkpoint, die_after = module._new_decoder, module._save_checkpoint, int(sys.argv[1])


def and_die(*arguments):
    save_checkpoint(*arguments)
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first and os.environ["RANK"] == "1" and len(arguments[-1]) == die_after:
        os.kill(os.getpid(), signal.SIGKILL)


module._save_checkpoint = and_die
module._new_decoder = lambda *given, **kind: make(*given, **kind).double()
main(["train", *sys.argv[2:]])
"""


def train_with_two_processes(run, *options, die_after) -> str:
    """Start the command under torchrun and return what it says."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
    launcher += ["--nproc-per-node", "2", "--max-restarts", "1"]
    command = [sys.executable, "-c", TRAIN, die_after, run, "--device", "cpu", *options]
    found = subprocess.run(
        [*launcher, *map(str, command)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
    return found.stderr


@pytest.mark.slow
def test_two_processes_train_what_one_trains_also_when_one_is_killed(run, in_float64):
    """33 images a batch: one process takes 17 of them, the other 16."""
    alone = TrainConfig(**{**SMALL, "batch_size": 33, "feature_maps": 1})
    train_decoder(run, CPU, alone)
    wanted, losses = state(run), history(run)
    options = ["--epochs", 4, "--batch-size", 33, "--width", 32, "--feature-maps", 1]
    train_decoder(run, CPU, TrainConfig(**SMALL, seed=1))
    output = train_with_two_processes(run, *options, "--overwrite", die_after=2)
    assert "resuming after epoch" in output
    assert history(run) == pytest.approx(losses, rel=1e-6)  # summed in float32
    for name, value in state(run).items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-7, atol=1e-9)
    last = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    assert last["processes"] == 2


def state(run) -> dict[str, torch.Tensor]:
    return load_file(run / "decoder" / "decoder.safetensors")


@pytest.mark.parametrize(
    ("image_size", "size", "width", "widths"),
    [
        (64, 64, 0, (2048, 1024, 512, 256, 128)),  # the reference's
        (224, 56, 0, (256, 128, 64, 32)),
        (64, 32, 0, (512, 256, 128, 64)),
        (224, 56, 64, (64, 32, 16, 16)),
    ],
)
def test_widths_without_a_reference_are_bounded(run, image_size, size, width, widths):
    manifest = open_index(run).manifest
    results = copy.deepcopy(manifest.results)
    results["num_features"] = 2048
    results["classifier"]["transform"]["size"] = image_size
    index = Index(run, replace(manifest, results=results), {})
    config = TrainConfig(feature_maps=0, width=width, stack="dcgan", target="signed")
    assert module.decoder_config(index, size, config).widths == widths


def test_ranges_of_the_plain_stack_are_mean_and_deviation_of_the_id_images(run):
    index = open_index(run)
    decoder = module._new_decoder(index, 16, TrainConfig(feature_maps=2, width=32))
    features, maps = (
        index.columns[name].read().astype(np.float64) for name in ("features", "feature_maps_1")
    )
    inputs = np.concatenate([features, maps.std(axis=(2, 3), ddof=1)], axis=1)

    def wanted(values: np.ndarray) -> np.ndarray:
        spread = np.where(values.std(axis=0) > 0, values.std(axis=0), 1)  # a dead one stays
        return np.stack([values.mean(axis=0), values.mean(axis=0) + spread])

    np.testing.assert_allclose(decoder.feature_range, wanted(inputs), rtol=1e-4, atol=1e-5)
    places = maps.transpose(0, 2, 3, 1).reshape(-1, maps.shape[1])
    np.testing.assert_allclose(
        decoder.get_buffer("map_range_0"), wanted(places), rtol=1e-4, atol=1e-5
    )


def test_noise_is_a_function_of_seed_and_epoch():
    config = TrainConfig(feature_maps=0, width=32, batch_size=6, noise=0.5)
    empty = TrainingBatch(torch.zeros(6, 8), torch.zeros(6), torch.zeros(6))

    def drawn(seed: int, epoch: int) -> torch.Tensor:
        generator = module._noise_generator(seed, epoch, CPU)
        batches = [module._add_noise(empty, generator, 8, config) for _ in range(400)]
        return torch.stack([batch.noise for batch in batches if batch.noise is not None])

    assert torch.equal(drawn(0, 1), drawn(0, 1))
    assert not torch.equal(drawn(0, 1), drawn(0, 2))
    assert not torch.equal(drawn(0, 1), drawn(1, 1))
    # 19,200 numbers: 0.02 is four standard errors of their deviation
    assert drawn(0, 1).std() == pytest.approx(0.5, rel=0.02)
    for other in (replace(config, noise=0.0), replace(config, stack="dcgan")):
        assert module._add_noise(empty, module._noise_generator(0, 1, CPU), 8, other) is empty


def test_the_cosine_schedule_rises_for_a_tenth_and_ends_near_nothing():
    config = TrainConfig(lr=2.0)
    rates = [lr_at(step, 100, config) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0)  # half of the way down
    assert 0 < rates[99] < 0.001
    assert {lr_at(step, 100, replace(config, schedule="constant")) for step in (0, 50, 99)} == {2.0}


def test_an_epochs_progress_has_an_end(monkeypatch):
    shown: list[int] = []
    monkeypatch.setattr(Progress, "update", lambda progress, count: shown.append(count))
    batches: Any = iter(range(10))
    config = TrainConfig(batch_size=7)
    found: list[Any] = list(module._show_progress(batches, 4, 0, config))
    assert found == [0, 1, 2, 3]
    assert shown == [7] * 4
    assert next(batches) == 4


def test_an_epoch_says_when_the_last_one_ends(run, caplog):
    caplog.set_level("INFO")
    train_decoder(run, CPU, TrainConfig(**{**SMALL, "epochs": 3, "overwrite": True}))
    first, _, last = re.findall(r"epoch ./3 .*", caplog.text)
    assert re.search(r" images/s, ends about (\d{4}-\d\d-\d\d )?\d\d:\d\d$", first)
    assert last.endswith(" images/s")
