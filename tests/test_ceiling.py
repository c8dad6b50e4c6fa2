"""The ceiling: a network that sees the pixels learns from the run's own patched images."""

import shutil

import numpy as np
import pytest
import torch

from ood_heatmap.errors import UsageError
from ood_heatmap.localization import localization_metrics
from ood_heatmap.patches import PatchKinds, draw_patch, paste_all
from ood_heatmap.pipeline import ceiling as module
from ood_heatmap.pipeline.ceiling import train_ceiling
from ood_heatmap.pipeline.config import LocalizeConfig, TargetsConfig
from ood_heatmap.pipeline.run import open_index, open_targets, redraw_paste_plan
from ood_heatmap.pipeline.stage import Stage
from ood_heatmap.pipeline.targets import build_targets
from ood_heatmap.source_array import from_array
from ood_heatmap.sources import open_images

CPU = torch.device("cpu")
CONFIG = LocalizeConfig(batch_size=16, workers=1)


@pytest.fixture(scope="module")
def patched_run(finished_run, data, tmp_path_factory):
    """Return a run whose targets have patched images."""
    run = shutil.copytree(finished_run, tmp_path_factory.mktemp("ceiling") / "run")
    config = TargetsConfig(batch_size=16, patched=1.0, limit=30, overwrite=True)
    build_targets(run, open_images(str(data / "ood")), CPU, config)
    return run


def stage_in(folder):
    """Return the stage of ``localize`` in a run of its own, just begun."""
    folder.mkdir()
    stage = Stage(folder, "localization", {})
    stage.resume_or_start(overwrite=False)
    return stage


def opened(run):
    index = open_index(run)
    return index, open_targets(run, index)


def test_it_is_trained_with_the_patched_images_of_the_targets(patched_run, data):
    index, targets = opened(patched_run)
    images = open_images(str(data / "ood"))
    plan = redraw_paste_plan(targets, index)
    pixels, presence = module._read_patched(index, plan, images, 16, CONFIG)
    columns = {name: column.read() for name, column in targets.columns.items()}
    patched = columns["patched"] == 1
    id_images = index.columns["images"].take(index.positions(columns["nearest"][patched]))
    np.testing.assert_array_equal(pixels, id_images - columns["heatmap"][patched])
    np.testing.assert_array_equal(presence, columns["presence"][patched])
    pixels, presence = module._read_patched(index, plan, images, 8, CONFIG)
    halved = columns["presence"][patched].reshape(-1, 8, 2, 8, 2).mean(axis=(2, 4))
    np.testing.assert_allclose(presence, halved, atol=1.01)
    assert pixels.shape == (30, 3, 8, 8)


def test_no_more_images_are_read_than_it_is_trained_with_once(patched_run, data, monkeypatch):
    index, targets = opened(patched_run)
    images, plan = open_images(str(data / "ood")), redraw_paste_plan(targets, index)
    monkeypatch.setattr(module, "_NUM_PIXELS", 12 * 16**2 + 5)
    pixels, presence = module._read_patched(index, plan, images, 16, CONFIG)
    assert len(pixels) == len(presence) == 12


def test_it_finds_what_differs_in_the_pixels_and_is_the_same_every_time(monkeypatch):
    """White patches in dark images are found almost perfectly by a network that sees them."""
    generator = np.random.default_rng(0)
    dark = generator.integers(0, 100, (80, 3, 16, 16)).astype(np.uint8)
    bright = generator.integers(155, 256, (80, 3, 16, 16)).astype(np.uint8)
    patches = [draw_patch(16, 0, row, PatchKinds(edges=("hard",))) for row in range(80)]
    pixels, masks = paste_all(dark, bright, patches)
    monkeypatch.setattr(module, "_NUM_PIXELS", 64 * 256 * 10)

    def trained_scores(count):
        torch.manual_seed(3)
        network = module._UNet()
        presence = torch.from_numpy(255 * masks[:64].astype(np.uint8))
        module._train(network, torch.from_numpy(pixels[:64]), presence, CPU)
        with torch.inference_mode():
            return network(module._to_input(torch.from_numpy(pixels[64:count]), 16)).numpy()

    scores = trained_scores(80)
    assert localization_metrics(scores, masks[64:]).pixel_auroc > 0.95
    np.testing.assert_array_equal(trained_scores(80), scores)


def test_parts_of_a_batch_train_it_as_the_whole_does(monkeypatch):
    torch.manual_seed(1)
    pixels = torch.randint(0, 256, (10, 3, 16, 16), dtype=torch.uint8)
    presence = (pixels[:, 0] > 127).to(torch.uint8) * 255
    monkeypatch.setattr(module, "_NUM_PIXELS", 10 * 256 * 3)
    trained = []
    for at_once in (10 * 256, 3 * 256):
        monkeypatch.setattr(module, "_MAX_PIXELS_AT_ONCE", at_once)
        torch.manual_seed(0)
        network = module._UNet()
        before = {name: item.clone() for name, item in network.state_dict().items()}
        # small steps: Adam's first ones are as large for gradients of rounding errors
        monkeypatch.setattr(torch.optim, "AdamW", torch.optim.SGD)
        module._train(network, pixels, presence, CPU)
        trained.append(network.state_dict())
    for name, item in trained[0].items():
        torch.testing.assert_close(trained[1][name], item, rtol=1e-3, atol=1e-6)
        assert not torch.equal(item, before[name])


def test_scores_have_the_size_of_the_images_and_the_seed_decides(
    patched_run, data, monkeypatch, tmp_path
):
    monkeypatch.setattr(module, "_NUM_PIXELS", 1)
    monkeypatch.setattr(module, "_MAX_SIDE", 8)
    index, targets = opened(patched_run)
    images, state = open_images(str(data / "ood")), torch.random.get_rng_state()
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 16, 16)).astype(np.uint8)
    scores = [
        train_ceiling(
            stage_in(tmp_path / str(number)),
            *(index, targets, images, CPU, LocalizeConfig(seed=seed, workers=1)),
        )(pixels)
        for number, seed in enumerate((0, 0, 1))
    ]
    assert scores[0].shape == (5, 16, 16)
    np.testing.assert_array_equal(scores[0], scores[1])
    assert not np.array_equal(scores[0], scores[2])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_an_interrupted_measurement_does_not_train_it_again(
    patched_run, data, monkeypatch, tmp_path
):
    monkeypatch.setattr(module, "_NUM_PIXELS", 20_000)
    index, targets = opened(patched_run)
    images = open_images(str(data / "ood"))
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 16, 16)).astype(np.uint8)
    stage = stage_in(tmp_path / "run")
    scores = train_ceiling(stage, index, targets, images, CPU, CONFIG)(pixels)
    monkeypatch.setattr(module, "_train", lambda *_: pytest.fail("it is trained again"))
    resumed = Stage(stage.run, "localization", {})
    assert resumed.resume_or_start(overwrite=False) is None
    again = train_ceiling(resumed, index, targets, images, CPU, CONFIG)(pixels)
    np.testing.assert_array_equal(again, scores)


def test_another_training_set_and_no_patched_images_are_one_line(
    patched_run, finished_run, data, tmp_path
):
    stage = stage_in(tmp_path / "run")
    index, targets = opened(patched_run)
    other = from_array(np.zeros((3, 16, 16, 3), np.uint8))
    with pytest.raises(UsageError, match=r"is not the OOD training set of .*, which is .*ood"):
        train_ceiling(stage, index, targets, other, CPU, CONFIG)
    index, targets = opened(finished_run)
    with pytest.raises(UsageError, match="have no patched images"):
        train_ceiling(stage, index, targets, open_images(str(data / "ood")), CPU, CONFIG)


@pytest.mark.parametrize("size", [8, 15, 33])
def test_any_size_goes_through_the_network(size):
    assert module._UNet()(torch.zeros(2, 3, size, size)).shape == (2, size, size)
