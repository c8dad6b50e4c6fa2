"""Manifests: every byte counts, every type is checked, and what differs is named."""

import json
from dataclasses import replace

import pytest

from ood_heatmap.cache.files import write_json
from ood_heatmap.cache.manifest import (
    FileRecord,
    Manifest,
    abbreviate,
    check_files,
    differing_fields,
    hash_json,
    read_file,
    read_manifest,
    write_manifest,
)
from ood_heatmap.errors import DamagedCacheError, OodHeatmapError, StaleCacheError

INPUTS = {"classifier": {"weights": "a" * 64, "mean": [0.5, 0.5]}, "options": {"shard_mb": 8}}
COMMAND = "ood-heatmap index runs/x ..."
RESULTS = {"classes": ["cat", "dog"], "feature_max": 2.5}


@pytest.fixture
def directory(tmp_path):
    """Return a finished stage."""
    directory = tmp_path / "index"
    directory.mkdir()
    path = directory / "data.bin"
    path.write_bytes(b"content")
    files = {"data.bin": FileRecord.from_file(path)}
    speed = {"images_per_second": 5.0}
    write_manifest(directory, Manifest("index", INPUTS, "hash", RESULTS, files, speed))
    return directory


def read(directory):
    return read_manifest(directory, command=COMMAND)


def test_a_fingerprint_does_not_depend_on_the_order_of_keys():
    assert hash_json({"a": 1, "b": [2, {"c": 3, "d": 4}]}) == hash_json(
        {"b": [2, {"d": 4, "c": 3}], "a": 1}
    )
    assert hash_json({"a": 1}) != hash_json({"a": 2})


def test_what_is_written_is_read_back(directory):
    manifest = read(directory)
    assert (manifest.inputs, manifest.results, manifest.content) == (INPUTS, RESULTS, "hash")
    assert manifest.files["data.bin"].num_bytes == 7
    check_files(directory, manifest, command=COMMAND)


def test_only_inputs_and_content_are_in_the_fingerprint(directory):
    manifest = read(directory)
    assert replace(manifest, speed={}, results={}).fingerprint == manifest.fingerprint
    assert replace(manifest, content="other").fingerprint != manifest.fingerprint
    assert replace(manifest, inputs={}).fingerprint != manifest.fingerprint


def test_every_flipped_bit_of_a_manifest_is_found(directory):
    path = directory / "manifest.json"
    before, manifest = path.read_bytes(), read(directory)
    for at in range(len(before)):
        for bit in (0, 3, 5):
            changed = bytearray(before)
            changed[at] ^= 1 << bit
            path.write_bytes(bytes(changed))
            try:
                after = read(directory)
            except OodHeatmapError:
                continue
            # what is left are the spaces between the tokens
            assert after == manifest, f"byte {at}, bit {bit}"


@pytest.mark.parametrize(
    "change",
    [
        {"results": {"classes": ["dog", "cat"]}},
        {"speed": {"images_per_second": 50.0}},
        {"files": {}},
        {"results": []},
        {"files": []},
        {"inputs": None},
        {"format": True},
        {"content": 1},
        {"unknown": 1},
    ],
)
@pytest.mark.parametrize("honest", [True, False], ids=["new checksum", "old checksum"])
def test_an_edited_manifest_is_refused_and_never_a_traceback(directory, change, honest):
    path = directory / "manifest.json"
    content = json.loads(path.read_text()) | change
    if honest:
        del content["checksum"]
        content["checksum"] = hash_json(content)
    write_json(path, content)
    plausible = {"results", "speed", "files"} & change.keys()
    if honest and plausible and isinstance(change[plausible.pop()], dict):
        read(directory)
    else:
        with pytest.raises(OodHeatmapError, match=rf"manifest\.json .*Run `{COMMAND}` again"):
            read(directory)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../b", "", ".."])
@pytest.mark.parametrize("record", [{"sha256": "a", "num_bytes": 3}, {"sha256": 1}, [], None])
def test_a_file_name_cannot_lead_out_of_the_stage(directory, name, record):
    path = directory / "manifest.json"
    content = json.loads(path.read_text()) | {"files": {name: record}}
    del content["checksum"]
    write_json(path, {**content, "checksum": hash_json(content)})
    with pytest.raises(DamagedCacheError, match="is damaged"):
        read(directory)


def test_the_manifest_of_another_stage_is_refused(directory):
    (directory.parent / "targets").mkdir()
    (directory / "manifest.json").rename(directory.parent / "targets" / "manifest.json")
    with pytest.raises(DamagedCacheError, match="the manifest of another stage"):
        read(directory.parent / "targets")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100_000, '{"format": 2, "stage": 3}'])
def test_a_damaged_manifest_is_one_line(directory, text):
    (directory / "manifest.json").write_text(text)
    with pytest.raises(OodHeatmapError, match=r"manifest\.json (is damaged|has format)") as caught:
        read(directory)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [1, 7, None, "2"])
def test_another_format_is_refused_by_number(directory, number):
    write_json(directory / "manifest.json", {"format": number})
    with pytest.raises(StaleCacheError, match=f"has format {number}, this version reads 2"):
        read(directory)


def test_a_manifest_that_cannot_be_read_is_not_called_damaged(directory, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("pathlib.Path.read_text", refuse)
    with pytest.raises(OodHeatmapError, match=r"cannot read .*: Input/output error") as caught:
        read(directory)
    assert "--overwrite" not in str(caught.value)


def test_a_missing_stage_names_the_command(tmp_path):
    (tmp_path / "index").mkdir()
    with pytest.raises(OodHeatmapError, match=f"has no index stage: run `{COMMAND}` first"):
        read(tmp_path / "index")
    (tmp_path / "index" / "unfinished.json").touch()
    with pytest.raises(OodHeatmapError, match="has an unfinished index stage"):
        read(tmp_path / "index")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(b"conten"), "has 6 bytes, not 7"),
        (lambda path: path.write_bytes(b"cOntent"), "has changed since it was written"),
    ],
)
def test_a_damaged_file_is_named(directory, damage, words):
    manifest = read(directory)
    damage(directory / "data.bin")
    with pytest.raises(DamagedCacheError, match=f"data.bin {words}"):
        check_files(directory, manifest, command=COMMAND)
    check_files(directory, manifest, command=COMMAND, skip=["data.bin"])


def test_only_the_bytes_that_were_checked_are_returned(directory, monkeypatch):
    manifest = read(directory)
    assert read_file(directory, manifest, "data.bin", command=COMMAND) == b"content"
    (directory / "data.bin").write_bytes(b"cOntent")
    with pytest.raises(DamagedCacheError, match=r"data\.bin has changed since it was written"):
        read_file(directory, manifest, "data.bin", command=COMMAND)

    def refuse(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(OodHeatmapError, match=r"cannot read .*data\.bin: Input/output error"):
        read_file(directory, manifest, "data.bin", command=COMMAND)


def test_differing_fields_by_dotted_name():
    found = list(differing_fields({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 9}, "e": 4}))
    assert found == [("a.c", 2, 9), ("d", 3, None), ("e", None, 4)]


def test_long_values_are_cut_and_hashes_shortened():
    assert abbreviate("0123abcd" * 8) == "0123abcd"
    assert abbreviate("x" * 64) == "x" * 57 + "..."
    assert abbreviate(3) == "3"
