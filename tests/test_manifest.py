"""Manifests: what a stage was made from decides whether it may be used; what differs is named."""

import json
from dataclasses import replace

import pytest

from ood_heatmap.cache.files import write_json
from ood_heatmap.cache.manifest import (
    Manifest,
    Stage,
    check_files,
    differing_fields,
    fingerprint_of,
    read_manifest,
    require_from,
)
from ood_heatmap.errors import DamagedCacheError, OodHeatmapError, StaleCacheError

INPUTS = {"classifier": {"weights": "a" * 64, "mean": [0.5, 0.5]}, "options": {"shard_mb": 8}}


def made(run, inputs=INPUTS, name="index") -> Manifest:
    stage = Stage(run, name, inputs)
    assert stage.begin() is None
    (stage.directory / "data.bin").write_bytes(b"content")
    return stage.finish("hash", {"rows": 3}, ["data.bin"])


def test_a_fingerprint_does_not_depend_on_the_order_of_keys():
    assert fingerprint_of({"a": 1, "b": [2, {"c": 3, "d": 4}]}) == fingerprint_of(
        {"b": [2, {"d": 4, "c": 3}], "a": 1}
    )
    assert fingerprint_of({"a": 1}) != fingerprint_of({"a": 2})


def test_what_is_written_is_read_back(tmp_path):
    manifest = made(tmp_path)
    assert read_manifest(tmp_path, "index") == manifest
    check_files(tmp_path, manifest)
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == [
        "data.bin",
        "manifest.json",
    ]


def test_how_fast_it_was_changes_nothing_else_in_the_manifest(tmp_path):
    stage = Stage(tmp_path, "index", INPUTS)
    stage.begin()
    before = stage.finish("", {}, [])
    stage.add_speed({"images_per_second": 5.0})
    after = read_manifest(tmp_path, "index")
    assert after.speed == {"images_per_second": 5.0}
    assert replace(after, speed={}) == before


def test_a_finished_stage_begun_again_is_finished(tmp_path):
    manifest = made(tmp_path)
    assert Stage(tmp_path, "index", INPUTS).begin() == manifest


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        (
            {**INPUTS, "classifier": {**INPUTS["classifier"], "weights": "b" * 64}},
            "classifier.weights",
        ),
        ({**INPUTS, "classifier": {**INPUTS["classifier"], "mean": [0.5, 0.4]}}, "classifier.mean"),
        ({**INPUTS, "options": {"shard_mb": 9}}, "options.shard_mb"),
        ({**INPUTS, "options": {"shard_mb": 8, "new": 1}}, "options.new"),
        ({"options": {"shard_mb": 8}}, "classifier"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_every_changed_input_is_refused_by_name(tmp_path, changed, field, finished):
    if finished:
        made(tmp_path)
    else:
        Stage(tmp_path, "index", INPUTS).begin()
    with pytest.raises(StaleCacheError, match=f"another {field} \\(") as caught:
        Stage(tmp_path, "index", changed).begin()
    assert "--overwrite" in str(caught.value)


def test_overwrite_discards_what_was_made_otherwise(tmp_path):
    made(tmp_path)
    stage = Stage(tmp_path, "index", {**INPUTS, "options": {"shard_mb": 9}})
    assert stage.begin(overwrite=True) is None
    assert [path.name for path in stage.directory.iterdir()] == ["unfinished.json"]


def test_overwrite_keeps_what_fits(tmp_path):
    manifest = made(tmp_path)
    assert Stage(tmp_path, "index", INPUTS).begin(overwrite=True) == manifest


def test_differing_fields_by_dotted_name():
    found = list(differing_fields({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 9}, "e": 4}))
    assert found == [("a.c", 2, 9), ("d", 3, None), ("e", None, 4)]


def test_a_missing_stage_names_the_command(tmp_path):
    with pytest.raises(OodHeatmapError, match=r"no decoder stage: run `ood-heatmap train"):
        read_manifest(tmp_path, "decoder")
    Stage(tmp_path, "decoder", INPUTS).begin()
    with pytest.raises(OodHeatmapError, match="unfinished decoder stage"):
        read_manifest(tmp_path, "decoder")


def test_an_edited_manifest_is_refused(tmp_path):
    made(tmp_path)
    path = tmp_path / "index" / "manifest.json"
    content = json.loads(path.read_text())
    content["inputs"]["options"]["shard_mb"] = 1000
    write_json(path, content)
    with pytest.raises(DamagedCacheError, match="does not fit its own fingerprint"):
        read_manifest(tmp_path, "index")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": 1, "stage": 3}'])
def test_a_damaged_manifest_is_one_line(tmp_path, text):
    made(tmp_path)
    (tmp_path / "index" / "manifest.json").write_text(text)
    with pytest.raises(OodHeatmapError, match=r"manifest\.json is damaged"):
        read_manifest(tmp_path, "index")


def test_another_format_is_refused_by_number(tmp_path):
    made(tmp_path)
    (tmp_path / "index" / "manifest.json").write_text('{"format": 7}')
    with pytest.raises(OodHeatmapError, match="format 7, this version reads 1"):
        read_manifest(tmp_path, "index")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(b"conten"), "has 6 bytes, not 7"),
        (lambda path: path.write_bytes(b"cOntent"), "has changed since it was written"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, damage, words):
    manifest = made(tmp_path)
    damage(tmp_path / "index" / "data.bin")
    with pytest.raises(DamagedCacheError, match=f"data.bin {words}"):
        check_files(tmp_path, manifest)


def test_a_stage_of_another_stage_before_it_is_refused(tmp_path):
    index = made(tmp_path)
    targets = made(tmp_path, {"index": index.fingerprint}, "targets")
    require_from(targets, index, tmp_path)
    other = made(tmp_path / "other", {**INPUTS, "options": {"shard_mb": 9}})
    with pytest.raises(StaleCacheError, match=r"made from another index .*ood-heatmap targets"):
        require_from(targets, other, tmp_path)
