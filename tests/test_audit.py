"""Overlaps between the sets of a run are found by targets, evaluate and audit, and named."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from ood_heatmap.classifier import load_classifier
from ood_heatmap.cli import main
from ood_heatmap.duplicates import hash_pixels, relative_difference
from ood_heatmap.errors import DamagedCacheError
from ood_heatmap.pipeline import audit as audits
from ood_heatmap.pipeline.audit import (
    AUDIT,
    audit,
    audit_index,
    audit_open_targets,
    audit_training_sets,
)
from ood_heatmap.pipeline.config import AuditConfig, EvaluateConfig, IndexConfig, TargetsConfig
from ood_heatmap.pipeline.evaluate import evaluate
from ood_heatmap.pipeline.index import build_index
from ood_heatmap.pipeline.run import open_index, open_targets
from ood_heatmap.pipeline.targets import build_targets
from ood_heatmap.sources import open_images

CPU = torch.device("cpu")
CONFIG = EvaluateConfig(batch_size=16, examples=3)


def pixels_of(data, run, name):
    transform = open_index(run).classifier_config.transform
    paths = sorted((data / name).rglob("*.png"))
    return np.stack([transform(Image.open(path)) for path in paths])


def overlaps(texts):
    return [text for text in texts if " are also in " in text or " almost equal to " in text]


def test_the_hashes_of_a_run_are_those_of_the_images_themselves(data, run):
    config = TargetsConfig(batch_size=16, patched=1.0, limit=30, overwrite=True)
    build_targets(run, open_images(str(data / "ood")), CPU, config)
    index = open_index(run)
    targets = open_targets(run, index)
    id_pixels, ood_pixels = pixels_of(data, run, "id"), pixels_of(data, run, "ood")
    np.testing.assert_array_equal(audit_index(index).pixel_hash, hash_pixels(id_pixels))
    found = audit_open_targets(targets, index)
    rows = targets.columns["row"].read()[:30]
    np.testing.assert_array_equal(found.pixel_hash, hash_pixels(ood_pixels[rows]))
    nearest = targets.columns["nearest"].read()[:30]
    np.testing.assert_array_equal(found.nearest, nearest)
    wanted = relative_difference(ood_pixels[rows], id_pixels[nearest])
    np.testing.assert_allclose(found.difference, wanted)
    names = sorted(path.name for path in (data / "ood").iterdir())
    assert [found.name_of(number) for number in range(30)] == [names[row] for row in rows]


def test_what_targets_store_of_the_images_is_what_reading_them_again_gives(run, monkeypatch):
    index = open_index(run)
    targets = open_targets(run, index)
    computed = [audit_index(index), audit_open_targets(targets, index)]
    files = {name: item for name, item in targets.manifest.files.items() if name != AUDIT}
    without = replace(targets, manifest=replace(targets.manifest, files=files))

    def fail(*_):
        raise AssertionError("the images are read again")

    with monkeypatch.context() as patched:
        for name in ("_hash_all", "_difference_within", "measure_targets"):
            patched.setattr(audits, name, fail)
        stored = audit_training_sets(index, targets)
        # of an earlier version
        with pytest.raises(AssertionError, match="read again"):
            audit_training_sets(index, without)
    for found in (stored, audit_training_sets(index, without)):
        for item, wanted in zip(found, computed, strict=True):
            assert (item.title, item.name_of(3)) == (wanted.title, wanted.name_of(3))
            for field in ("pixel_hash", "nearest", "difference"):
                np.testing.assert_array_equal(getattr(item, field), getattr(wanted, field))
    path = run / "targets" / AUDIT
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedCacheError, match=r"audit\.npz"):
        audit_training_sets(index, targets)


def test_the_difference_within_the_id_set_is_to_the_nearest_other_image(data, spec, tmp_path):
    """Over several shards, by brute force."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (3000, 4, 4, 3)).astype(np.uint8)
    coarse[7] = coarse[2900]
    np.savez(tmp_path / "id.npz", images=coarse.repeat(4, axis=1).repeat(4, axis=2))
    classifier = load_classifier(spec, weights=data / "weights.safetensors")
    images = open_images(str(tmp_path / "id.npz"))
    build_index(tmp_path / "run", images, classifier, IndexConfig(shard_mb=1))
    index = open_index(tmp_path / "run")
    assert len(list(index.columns["features"])) > 1
    features = index.columns["features"].read().astype(np.float64)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    rows = np.arange(0, 3000, 3)
    squared = ((features[rows, None] - features) ** 2).sum(axis=2)
    squared[np.arange(1000), rows] = np.inf
    pixels = index.columns["images"].read()
    wanted = relative_difference(pixels[rows], pixels[squared.argmin(axis=1)])
    found = audit_index(index).difference
    assert (np.isclose(found, wanted)).mean() > 0.99  # but for ties of float32


def test_targets_of_the_id_images_themselves_are_suspicious(data, run, tmp_path):
    mixed = tmp_path / "mixed"
    shutil.copytree(data / "ood", mixed)
    for number, path in enumerate(sorted((data / "id").rglob("*.png"))[:60:10]):
        shutil.copy(path, mixed / f"copy{number}.png")
    config = TargetsConfig(batch_size=16, patched=0.0, overwrite=True)
    some = build_targets(run, open_images(str(mixed)), CPU, config).results
    (text,) = overlaps(some["warnings"])
    assert f"6 of 56 images of the OOD training set ({mixed}) are also in" in text
    assert "copy0.png = class0/000.png, copy1.png = class0/010.png, copy2.png = class1/000" in text
    assert not some["suspicious"]
    same = build_targets(run, open_images(str(data / "id")), CPU, config).results
    assert "80 of 80 images of the OOD training set" in same["suspicious"][0]


def test_a_name_that_nobody_knows_any_more_is_a_row(data, run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(data / "ood", copy)
    (copy / "049.png").unlink()
    config = TargetsConfig(batch_size=16, patched=0.0, overwrite=True)
    build_targets(run, open_images(str(copy)), CPU, config)
    shutil.rmtree(copy)
    index = open_index(run)
    assert audit_open_targets(open_targets(run, index), index).name_of(7) == "row 7"


def test_names_are_found_in_whatever_order_the_classes_were_numbered(data, spec, tmp_path):
    for name, number in (("10", 0), ("9", 1), ("2", 2), ("1", 3)):
        shutil.copytree(data / "id" / f"class{number}", tmp_path / "id" / name)
    classifier = load_classifier(spec, weights=data / "weights.safetensors")
    images = open_images(str(tmp_path / "id"), class_order="natural")
    build_index(tmp_path / "run", images, classifier, IndexConfig())
    name_of = audit_index(open_index(tmp_path / "run")).name_of
    assert [name_of(position) for position in (0, 20, 79)] == [
        "1/000.png",
        "2/000.png",
        "10/019.png",
    ]


@pytest.mark.parametrize(
    ("id_name", "ood_name", "words"),
    [
        ("id", "far", "images of the ID test set ({id}) are also in the ID training set ({id})"),
        ("test", "ood", "images of the OOD test set x ({ood}) are also in the OOD training set"),
        ("test", "id", "images of the OOD test set x ({ood}) are also in the ID training set"),
        ("test", "test", "images of the OOD test set x ({ood}) are also in the ID test set"),
    ],
)
def test_an_evaluation_on_training_images_is_suspicious(data, run, id_name, ood_name, words):
    shutil.rmtree(run / "evaluation")
    id_images, ood_images = (open_images(str(data / name)) for name in (id_name, ood_name))
    manifest = evaluate(run, id_images, {"x": ood_images}, CPU, CONFIG)
    wanted = words.format(id=data / id_name, ood=data / ood_name)
    assert any(wanted in text for text in manifest.results["suspicious"])


def test_an_honest_evaluation_has_no_overlap(data, run):
    shutil.rmtree(run / "evaluation")
    test, far = open_images(str(data / "test")), open_images(str(data / "far"))
    manifest = evaluate(run, test, {"far": far}, CPU, CONFIG)
    assert not overlaps(manifest.results["warnings"])


def test_held_out_images_that_are_tested_are_suspicious(data, run):
    shutil.rmtree(run / "evaluation")
    test, far = open_images(str(data / "test")), open_images(str(data / "far"))
    again = open_images(str(data / "test"))
    manifest = evaluate(run, test, {"far": far}, CPU, CONFIG, calibration_images=again)
    (text,) = overlaps(manifest.results["suspicious"])
    assert "30 of 30 images of the ID test set" in text
    assert "are also in the held-out ID images" in text


def test_audit_finds_what_an_evaluation_would(data, run):
    def find(*names, **sets):
        id_sets = {name: open_images(str(data / name)) for name in names}
        ood_sets = {title: open_images(str(data / name)) for title, name in sets.items()}
        return audit(run, id_sets, ood_sets, CPU, AuditConfig(batch_size=16))

    assert find("test", far="far") == []
    found = find("test", near="ood", same="test")
    assert [finding.suspicious for finding in found] == [True, True]
    assert "50 of 50 images of near are also in the OOD training set" in found[0].text
    assert "30 of 30 images of same are also in test" in found[1].text
    shutil.rmtree(run / "targets")
    assert len(find("test", near="ood")) == 0


def test_audit_as_typed(data, run):
    def run_command(*arguments):
        command = ["audit", run, *arguments, "--device", "cpu"]
        return CliRunner().invoke(main, [str(item) for item in command])

    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    result = run_command("--id", data / "test", "--ood", f"far={data / 'far'}")
    assert result.exit_code == 0, result.output
    assert "no image is in two sets" in result.output
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    result = run_command("--id", data / "id", "--ood", data / "far")
    assert result.exit_code == 1
    assert "80 of 80 images" in result.output
    assert "Traceback" not in result.output
    assert run_command("--id", data / "id", "--allow-suspicious").exit_code == 0


def test_a_resumed_evaluation_knows_the_overlaps_too(data, run):
    config = replace(CONFIG, near=("near",), neighbours=5)
    sets = {"far": open_images(str(data / "far")), "near": open_images(str(data / "ood"))}
    test = open_images(str(data / "test"))
    before = evaluate(run, test, sets, CPU, replace(config, overwrite=True))
    (run / "evaluation" / "scores-near.npz").unlink()
    after = evaluate(run, test, sets, CPU, replace(config, overwrite=True))
    assert after.results == before.results
    assert "50 of 50 images of the OOD test set near" in overlaps(after.results["suspicious"])[0]
