"""Stage 1: what is in the index, and what it refuses."""

import json
import shutil
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ood_heatmap.classifier import load_classifier
from ood_heatmap.errors import DamagedCacheError, OodHeatmapError, StaleCacheError
from ood_heatmap.pipeline.config import IndexConfig
from ood_heatmap.pipeline.index import build_index
from ood_heatmap.pipeline.run import open_index
from ood_heatmap.sources import open_images

CONFIG = IndexConfig(batch_size=16)


def test_the_shards_hold_what_the_classifier_says_of_each_image(data, classifier, finished_run):
    images = open_images(str(data / "id"))
    pixels = np.stack([np.asarray(images.read(row)[0]).transpose(2, 0, 1) for row in range(80)])
    output = classifier(torch.from_numpy(pixels))
    columns = open_index(finished_run).columns
    np.testing.assert_array_equal(columns["images"].read(), pixels)
    np.testing.assert_allclose(columns["features"].read(), output.features, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(columns["prediction"].read(), output.logits.argmax(dim=1))
    np.testing.assert_array_equal(columns["label"].read(), np.repeat(np.arange(4), 20))
    np.testing.assert_array_equal(columns["row"].read(), np.arange(80))
    for number, item in enumerate(output.maps, start=1):
        found = columns[f"feature_maps_{number}"].read()
        assert found.dtype == np.float16
        np.testing.assert_allclose(found, item, rtol=2e-3, atol=1e-4)


def test_the_manifest_reports_accuracy_counts_and_range(data, finished_run):
    index = open_index(finished_run)
    results, columns = index.manifest.results, index.columns
    prediction, label = columns["prediction"].read(), columns["label"].read()
    assert results["accuracy"] == (prediction == label).mean()
    assert results["class_counts"] == [int((prediction == c).sum()) for c in range(4)]
    assert results["feature_min"] == columns["features"].read().min()
    assert results["feature_max"] == columns["features"].read().max()
    assert results["classes"] == [f"class{c}" for c in range(4)]
    assert "faiss" in results["backend"]


def test_anyone_can_read_a_shard_with_h5py(finished_run):
    with h5py.File(finished_run / "index" / "images-00000.h5") as file:
        assert file["images"].shape == (80, 3, 16, 16)
        assert "RGB" in file["images"].attrs["about"]
        assert all("about" in file[name].attrs for name in file)


def test_small_shards_hold_the_same_rows(data, classifier, finished_run, tmp_path, monkeypatch):
    from ood_heatmap.pipeline import index as module

    monkeypatch.setattr(module, "bytes_per_row", lambda _: 1_000_000 // 32)
    build_index(
        tmp_path / "run",
        open_images(str(data / "id")),
        classifier,
        IndexConfig(batch_size=16, workers=2, shard_mb=1),
    )
    small, large = open_index(tmp_path / "run"), open_index(finished_run)
    assert len(list((tmp_path / "run" / "index").glob("*.h5"))) == 3
    for name, rows in large.columns.items():
        np.testing.assert_array_equal(small.columns[name].read(), rows.read())
    assert (tmp_path / "run" / "index" / "index.faiss").read_bytes() == (
        finished_run / "index" / "index.faiss"
    ).read_bytes()


def test_started_again_it_is_finished(data, classifier, run):
    before = {path: path.read_bytes() for path in (run / "index").glob("[!.]*.*")}
    build_index(run, open_images(str(data / "id")), classifier, CONFIG)
    assert before == {path: path.read_bytes() for path in (run / "index").glob("[!.]*.*")}


def test_other_weights_are_refused_by_name(data, spec, run):
    other = load_classifier(
        spec, weights=data / "weights.safetensors", mean=(0.5, 0.5, 0.5), num_maps=2
    )
    with pytest.raises(StaleCacheError, match=r"different classifier\.mean"):
        build_index(run, open_images(str(data / "id")), other, CONFIG)


def test_autocast_changes_the_features_a_little_and_the_fingerprint(data, spec, run, tmp_path):
    other = load_classifier(spec, weights=data / "weights.safetensors", num_maps=2, autocast=True)
    images = open_images(str(data / "id"))
    message = r"different classifier\.autocast \(False, now True\)"
    with pytest.raises(StaleCacheError, match=message):
        build_index(run, images, other, CONFIG)
    build_index(tmp_path / "other", images, other, CONFIG)
    found, exact = open_index(tmp_path / "other"), open_index(run).columns["features"].read()
    features = found.columns["features"].read()
    assert (features != exact).any()
    np.testing.assert_allclose(features, exact, rtol=0.05, atol=0.02)
    assert found.classifier(torch.device("cpu")).config.autocast


def test_an_image_changed_behind_the_listings_back_is_noticed(data, classifier, run, tmp_path):
    folder = shutil.copytree(data / "id", tmp_path / "id")
    build_index(run, open_images(str(folder)), classifier, CONFIG)  # the same images elsewhere
    path = folder / "class1" / "003.png"
    content = bytearray(path.read_bytes())
    content[-20] ^= 1  # same name, same size
    path.write_bytes(bytes(content))
    with pytest.raises(StaleCacheError, match=r"images\.content differs"):
        build_index(run, open_images(str(folder)), classifier, CONFIG)


def test_a_lost_faiss_file_is_made_again(run):
    path = run / "index" / "index.faiss"
    before = path.read_bytes()
    path.unlink()
    open_index(run).bank(torch.device("cpu"))
    assert path.read_bytes() == before


def test_a_changed_byte_in_a_shard_is_refused(run):
    path = run / "index" / "images-00000.h5"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(DamagedCacheError, match=r"images-00000\.h5 has changed since"):
        open_index(run)


def test_a_damaged_file_is_made_again_as_the_message_says(data, classifier, run, tree):
    before = tree(run / "index")
    (run / "index" / "images-00000.h5").unlink()
    with pytest.raises(DamagedCacheError, match=r"images-00000\.h5 is missing.* --overwrite"):
        build_index(run, open_images(str(data / "id")), classifier, CONFIG)
    images = open_images(str(data / "id"))
    build_index(run, images, classifier, replace(CONFIG, overwrite=True))
    assert tree(run / "index") == before


def test_classes_that_do_not_match_are_refused(data, classifier, tmp_path):
    shutil.copytree(data / "id", tmp_path / "id")
    shutil.rmtree(tmp_path / "id" / "class3")
    images = open_images(str(tmp_path / "id"))
    with pytest.raises(
        OodHeatmapError, match=r"has 3 classes, but the classifier has 4.*--ignore-labels"
    ):
        build_index(tmp_path / "run", images, classifier, CONFIG)
    manifest = build_index(
        tmp_path / "run", images, classifier, IndexConfig(batch_size=16, ignore_labels=True)
    )
    assert manifest.results["classes"] == []


def test_features_that_are_not_finite_name_the_image(data, classifier, tmp_path):
    with torch.no_grad():
        classifier.network.layer1[0].bias.fill_(float("nan"))
    with pytest.raises(OodHeatmapError, match=r"NaN or infinite features for class0/000\.png"):
        build_index(tmp_path / "run", open_images(str(data / "id")), classifier, CONFIG)


def test_an_unreadable_image_stops_the_stage_and_can_be_skipped(data, classifier, tmp_path):
    folder = shutil.copytree(data / "id", tmp_path / "id")
    (folder / "class2" / "005.png").write_bytes(b"broken")
    images = open_images(str(folder))
    with pytest.raises(OodHeatmapError, match=r"class2/005\.png is not a readable image"):
        build_index(tmp_path / "run", images, classifier, CONFIG)
    assert not (tmp_path / "run" / "index" / "manifest.json").exists()
    manifest = build_index(
        tmp_path / "other", images, classifier, IndexConfig(batch_size=16, skip_unreadable=True)
    )
    assert manifest.results["skipped"] == ["class2/005.png"]
    index = open_index(tmp_path / "other")
    assert 45 not in index.columns["row"].read()
    place = index.positions(np.array([46]))
    wanted = np.asarray(Image.open(folder / "class2" / "006.png")).transpose(2, 0, 1)
    np.testing.assert_array_equal(index.columns["images"].take(place)[0], wanted)


def test_a_device_out_of_memory_gets_smaller_batches(
    data, classifier, tmp_path, monkeypatch, caplog
):
    forward, sizes = classifier.network.forward, []

    def limited(images):
        sizes.append(len(images))
        if len(images) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(images)

    monkeypatch.setattr(classifier.network, "forward", limited)
    build_index(tmp_path / "run", open_images(str(data / "id")), classifier, CONFIG)
    assert {16, 8, 4} <= set(sizes)
    assert "batch size reduced to 4" in caplog.text
    assert len(open_index(tmp_path / "run").columns["row"]) == 80


def test_the_log_and_the_manifest_say_how_fast_it_was(finished_run):
    lines = [json.loads(line) for line in (finished_run / "log.jsonl").read_text().splitlines()]
    assert lines[0]["stage"] == "index"
    assert lines[0]["images"] == 80
    assert lines[0]["images_per_second"] > 0
    speed = open_index(finished_run).manifest.speed
    assert speed.items() <= lines[0].items()
    assert 0 <= speed.get("share_of_ceiling", 0) <= 1
    for part in ("decode", "embed", "write"):
        assert speed["wait_seconds"][part] >= 0


def test_ignored_labels_are_unknown_everywhere(data, classifier, tmp_path):
    images = open_images(str(data / "id"))
    config = IndexConfig(batch_size=16, ignore_labels=True)
    results = build_index(tmp_path / "run", images, classifier, config).results
    assert results["accuracy"] is None
    assert results["classes"] == []
    assert results["num_labelled"] == 0
    columns = open_index(tmp_path / "run").columns
    assert (columns["label"].read() == -1).all()
    with pytest.raises(StaleCacheError, match=r"options\.ignore_labels"):
        build_index(tmp_path / "run", images, classifier, IndexConfig(batch_size=16))


def test_one_unknown_label_does_not_hide_the_accuracy_of_the_others(data, classifier, tmp_path):
    images = open_images(str(data / "id"))
    labels = images.labels.copy()
    labels[5] = -2
    results = build_index(
        tmp_path / "run", replace(images, labels=labels), classifier, IndexConfig(batch_size=16)
    ).results
    prediction = open_index(tmp_path / "run").columns["prediction"].read()
    others = np.delete(np.arange(80), 5)
    assert results["accuracy"] == (prediction == labels)[others].mean()
    assert results["num_labelled"] == 79


def test_a_classifier_that_guesses_is_suspicious_and_one_that_knows_is_not(
    data, classifier, spec, tmp_path
):
    images = open_images(str(data / "id"))
    first = build_index(tmp_path / "first", images, classifier, IndexConfig()).results
    assert "accuracy is" in first["warnings"][0]
    assert "a network is random without --weights" in first["warnings"][0]
    assert first["suspicious"] == first["warnings"]
    prediction = open_index(tmp_path / "first").columns["prediction"].read()
    right = replace(images, labels=prediction)  # as if the folders were what it predicts
    knows = build_index(tmp_path / "second", right, classifier, IndexConfig()).results
    assert knows["warnings"] == knows["suspicious"] == []
    order = (prediction + 1) % 4  # the same in another order
    other = replace(images, labels=order.astype(np.int32))
    permuted = build_index(tmp_path / "third", other, classifier, IndexConfig()).results
    assert "100.00% with the best assignment" in permuted["suspicious"][0]


def test_a_classifier_that_answers_otherwise_is_refused_whatever_its_hashes_say(run, monkeypatch):
    index, device = open_index(run), torch.device("cpu")
    index.classifier(device)
    normal = torch.nn.functional.conv2d

    def other_library(*arguments, **options):
        return normal(*arguments, **options) * 1.05

    monkeypatch.setattr(torch.nn.functional, "conv2d", other_library)
    with pytest.raises(StaleCacheError, match="returns different features than when the run was"):
        index.classifier(device)


def test_the_probe_of_an_index_is_a_few_of_its_own_rows(run):
    probe = load_file(run / "index" / "probe.safetensors")
    columns = open_index(run).columns
    rows = np.unique(np.linspace(0, 79, 8).astype(int))
    for name, found in probe.items():
        np.testing.assert_array_equal(found.numpy(), columns[name].take(rows))
    assert {"images", "features", "feature_maps_1"} <= probe.keys()
