"""The protocol of a stage: resume or refuse, nothing taken in that is not on record, commit."""

import json
import os
import shlex
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from ood_heatmap import __version__
from ood_heatmap.cache import files, stamps
from ood_heatmap.cache import manifest as manifests
from ood_heatmap.cache.manifest import FileRecord
from ood_heatmap.cache.shards import Header, map_shard, write_shard
from ood_heatmap.cache.stamps import Stamp, check_unstamped
from ood_heatmap.errors import DamagedCacheError, OodHeatmapError, StaleCacheError
from ood_heatmap.images import ImageSet
from ood_heatmap.options import CommandGroup
from ood_heatmap.pipeline import schedule
from ood_heatmap.pipeline import stage as protocol
from ood_heatmap.pipeline.config import IndexConfig, TargetsConfig
from ood_heatmap.pipeline.index import build_index
from ood_heatmap.pipeline.results import Results
from ood_heatmap.pipeline.run import read_manifest
from ood_heatmap.pipeline.schedule import ShardTask, content_hash, require_rows
from ood_heatmap.pipeline.stage import Stage
from ood_heatmap.pipeline.targets import build_targets
from ood_heatmap.sources import open_images

INPUTS: dict[str, Any] = {
    "classifier": {"weights": "a" * 64, "mean": [0.5, 0.5]},
    "options": {"shard_mb": 8},
}


def start(run: Path, inputs=INPUTS, *, overwrite: bool = False) -> Stage:
    stage = Stage(run, "index", inputs)
    assert stage.resume_or_start(overwrite=overwrite) is None
    return stage


def write(stage: Stage, name: str, content: bytes) -> None:
    with stage.writing(name) as scratch:
        scratch.write_bytes(content)


def make(run: Path, inputs=INPUTS, speed=None):
    stage = start(run, inputs)
    write(stage, "data.bin", b"content")
    write(stage, "figures/roc.png", b"picture")
    files = ["data.bin", "figures/roc.png"]
    return stage.commit(Results(warnings=("odd",)), files, content="hash", speed=speed)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_committed_stage_holds_its_files_and_the_manifest(tmp_path):
    manifest = make(tmp_path)
    assert read_manifest(tmp_path, "index") == manifest
    assert names(tmp_path / "index") == [".stamps.jsonl", "data.bin", "figures", "manifest.json"]
    assert Stage(tmp_path, "index", INPUTS).resume_or_start(overwrite=False) == manifest
    assert Stage(tmp_path, "index", INPUTS).resume_or_start(overwrite=True) == manifest


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
    make(tmp_path) if finished else start(tmp_path)
    with pytest.raises(StaleCacheError, match=f"different {field} \\(.*--overwrite"):
        Stage(tmp_path, "index", changed).resume_or_start(overwrite=False)
    start(tmp_path, changed, overwrite=True)
    assert names(tmp_path / "index") == ["unfinished.json"]
    assert names(tmp_path) == ["index"]


@pytest.mark.parametrize("damage", ["", "[", '{"format": 1}', '{"format": 99, "inputs": {}}'])
@pytest.mark.parametrize("name", ["manifest.json", "unfinished.json"])
def test_overwrite_is_a_way_out_of_whatever_is_there(tmp_path, damage, name):
    make(tmp_path) if name == "manifest.json" else start(tmp_path)
    (tmp_path / "index" / name).write_text(damage)
    with pytest.raises(OodHeatmapError, match="--overwrite"):
        Stage(tmp_path, "index", INPUTS).resume_or_start(overwrite=False)
    start(tmp_path, overwrite=True)


HERE = {"device": "one processor", "torch": "2.14.1", "deterministic": False}
THERE = {**HERE, "device": "another"}


def test_a_stage_resumed_on_another_device_says_so_and_names_both(tmp_path, caplog):
    for _ in range(2):  # stopped and resumed where it was started: nothing to say
        Stage(tmp_path, "index", INPUTS, HERE).resume_or_start(overwrite=False)
    assert not caplog.text
    for _ in range(2):
        stage = Stage(tmp_path, "index", INPUTS, THERE)
        stage.resume_or_start(overwrite=False)
    assert caplog.text.count("started with another device (one processor, now another)") == 1
    write(stage, "data.bin", b"content")
    assert stage.commit(Results(), ["data.bin"]).speed["environments"] == [HERE, THERE]


def test_the_manifest_has_time_version_and_command_line(tmp_path):
    @click.group("ood-heatmap", cls=CommandGroup)
    def group():
        pass

    @group.command()
    @click.argument("text")
    def store(text):
        make(tmp_path, speed={"images": 7})

    begin = datetime.now(timezone.utc).replace(microsecond=0)
    assert CliRunner().invoke(group, ["store", "two words"]).exit_code == 0
    speed = read_manifest(tmp_path, "index").speed
    assert begin <= datetime.strptime(speed["time"], "%Y-%m-%dT%H:%M:%S%z")
    assert speed["version"] == __version__
    assert shlex.split(speed["command"]) == ["ood-heatmap", "store", "two words"]
    (line,) = (tmp_path / "log.jsonl").read_text("utf-8").splitlines()
    assert json.loads(line) == {"stage": "index", **speed}


def test_called_from_python_a_stage_has_no_command_line(tmp_path):
    make(tmp_path)
    assert "command" not in read_manifest(tmp_path, "index").speed


def test_a_damaged_stage_that_is_rebuilt_on_another_device_says_so(tmp_path, caplog):
    stage = Stage(tmp_path, "index", INPUTS, HERE)
    stage.resume_or_start(overwrite=False)
    write(stage, "data.bin", b"content")
    stage.commit(Results(), ["data.bin"])
    (tmp_path / "index" / "data.bin").write_bytes(b"damaged")
    stage = Stage(tmp_path, "index", INPUTS, THERE)
    assert stage.resume_or_start(overwrite=True) is None
    assert "started with another device (one processor, now another)" in caplog.text


def test_a_stage_that_an_older_version_started_has_no_environment_and_goes_on(tmp_path, caplog):
    Stage(tmp_path, "index", INPUTS).resume_or_start(overwrite=False)
    path = tmp_path / "index" / "unfinished.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({name: content[name] for name in ("format", "inputs")}))
    stage = Stage(tmp_path, "index", INPUTS, HERE)
    assert stage.resume_or_start(overwrite=False) is None
    assert not caplog.text
    write(stage, "data.bin", b"content")
    assert stage.commit(Results(), ["data.bin"]).speed["environments"] == [HERE]


def test_a_kill_while_the_old_stage_is_removed_leaves_nothing_of_it(tmp_path, monkeypatch):
    make(tmp_path)

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", kill)
    with pytest.raises(KeyboardInterrupt):
        Stage(tmp_path, "index", {}).resume_or_start(overwrite=True)
    monkeypatch.undo()
    assert names(tmp_path) == [".index.discarded"]
    start(tmp_path)
    assert names(tmp_path) == ["index"]
    assert names(tmp_path / "index") == ["unfinished.json"]


def test_a_link_in_place_of_a_stage_is_removed_and_not_what_it_points_to(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "unfinished.json").write_text("{}")
    (tmp_path / "index").symlink_to(tmp_path / "elsewhere")
    start(tmp_path, overwrite=True)
    assert (tmp_path / "elsewhere" / "unfinished.json").is_file()


def test_a_file_is_on_record_before_it_has_its_name(tmp_path, monkeypatch):
    stage = start(tmp_path)

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    write(stage, "last.ckpt", b"one")
    monkeypatch.setattr(os, "replace", kill)
    with pytest.raises(KeyboardInterrupt):
        write(stage, "last.ckpt", b"two")
    monkeypatch.undo()
    stage = start(tmp_path)
    assert stage.is_intact("last.ckpt")  # the old one, whole
    write(stage, "last.ckpt", b"two")
    assert start(tmp_path).is_intact("last.ckpt")
    (tmp_path / "index" / "last.ckpt").write_bytes(b"twO")
    assert not start(tmp_path).is_intact("last.ckpt")
    assert not stage.is_intact("of-somebody-else")


def test_a_record_cut_short_counts_for_nothing(tmp_path):
    write(start(tmp_path), "a.bin", b"a")
    journal = next((tmp_path / "index").glob("checksums-*"))
    journal.write_text(journal.read_text() + journal.read_text()[:20])
    stage = start(tmp_path)
    assert stage.is_intact("a.bin")
    write(stage, "b.bin", b"b")
    assert start(tmp_path).is_intact("b.bin")


@pytest.mark.parametrize("damage", ["missing", "shorter", "flipped", "flipped by the disk"])
def test_overwrite_makes_the_damaged_file_of_a_complete_stage_again_and_no_other(tmp_path, damage):
    manifest = make(tmp_path)
    path = tmp_path / "index" / "data.bin"
    os.utime(path, (10**9, 10**9))
    check_unstamped(path.parent, manifest, command="")
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(b"conten" if damage == "shorter" else b"cOntent")
    if damage == "flipped by the disk":
        os.utime(path, (10**9, 10**9))
    stage = Stage(tmp_path, "index", INPUTS)
    if not damage.startswith("flipped"):  # `verify` reads every byte, a start does not
        with pytest.raises(DamagedCacheError, match=r"data\.bin.*--overwrite"):
            stage.resume_or_start(overwrite=False)
    assert stage.resume_or_start(overwrite=True) is None
    assert stage.is_intact("figures/roc.png")
    assert not stage.is_intact("data.bin")
    write(stage, "data.bin", b"content")
    again = stage.commit(Results(warnings=("odd",)), manifest.files, content="hash")
    assert replace(again, speed={}) == replace(manifest, speed={})


def test_a_file_that_vanished_before_the_commit_is_named(tmp_path):
    stage = start(tmp_path)
    write(stage, "data.bin", b"content")
    (tmp_path / "index" / "data.bin").unlink()
    with pytest.raises(DamagedCacheError, match=r"data\.bin is missing"):
        stage.commit(Results(), ["data.bin"])


@pytest.mark.parametrize("target", [".lock", "log.jsonl"])
def test_a_link_in_a_run_directory_is_not_written_through(tmp_path, target, caplog):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / target).symlink_to(tmp_path / "precious")
    if target == ".lock":
        with (
            pytest.raises(OodHeatmapError, match="is a symbolic link"),
            protocol.run_lock(tmp_path),
        ):
            pass
    else:
        protocol.log_event(tmp_path, "index")
        assert "cannot write" in caplog.text
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_link_in_place_of_the_list_of_checksums_is_not_written_through(tmp_path):
    (tmp_path / "precious").write_text("precious")
    stage = start(tmp_path / "run")
    (stage.directory / "checksums-00000.jsonl").symlink_to(tmp_path / "precious")
    with pytest.raises(OodHeatmapError, match=r"cannot write .*checksums-00000"):
        write(stage, "data.bin", b"content")
    assert not (stage.directory / "data.bin").exists()
    assert (tmp_path / "precious").read_text() == "precious"


def shard_of(stage: Stage, rows: list[int], num_skipped: int) -> ShardTask:
    arrays = {"row": np.array(rows, np.int64)}
    write_shard(stage.directory / "a.h5", arrays, attributes={"num_skipped": num_skipped})
    return ShardTask("a.h5", np.arange(4), np.array([2, 5, 7, 9]))


@pytest.mark.parametrize(("rows", "num_skipped"), [([2, 5, 7, 9], 0), ([2, 7, 9], 1), ([], 4)])
def test_rows_of_a_shard_less_those_left_out(tmp_path, rows, num_skipped):
    stage = start(tmp_path)
    require_rows(stage, [shard_of(stage, rows, num_skipped)])


@pytest.mark.parametrize(
    ("rows", "num_skipped"),
    [([2, 5, 7], 0), ([2, 5, 5, 9], 0), ([5, 2, 7, 9], 0), ([2, 5, 7, 8], 0), ([2, 5, 7, 9], 1)],
)
def test_lost_doubled_strange_and_swapped_rows_of_a_shard_are_refused(tmp_path, rows, num_skipped):
    stage = start(tmp_path)
    with pytest.raises(
        DamagedCacheError, match=r"a\.h5 does not contain each of the rows 2 to 9 once"
    ):
        require_rows(stage, [shard_of(stage, rows, num_skipped)])


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    """Return a file of 2,500 images: three shards of a megabyte."""
    coarse = np.random.default_rng(0).integers(0, 256, (2500, 4, 4, 3)).astype(np.uint8)
    path = tmp_path_factory.mktemp("arrays") / "images.npz"
    np.savez(path, images=coarse.repeat(4, axis=1).repeat(4, axis=2))
    return path


@pytest.fixture
def stop_after_first_shard(monkeypatch):
    """Return what makes the next stage stop when its first shard is written."""

    def arm() -> None:
        def write_one(*args, **kwargs):
            write_shard(*args, **kwargs)
            monkeypatch.setattr(schedule, "write_shard", interrupt)

        def interrupt(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr(schedule, "write_shard", write_one)

    yield arm
    monkeypatch.undo()


@pytest.mark.parametrize("sizes", [(64, 85), (85, 64), (256, 7)])
def test_another_batch_size_at_restart_loses_and_doubles_no_row(
    arrays, classifier, tmp_path, tree, sizes, stop_after_first_shard, monkeypatch
):
    images, device = open_images(str(arrays)), classifier.device

    def index(run, size):
        return build_index(run, images, classifier, IndexConfig(batch_size=size, shard_mb=1))

    def targets(run, size):
        config = TargetsConfig(batch_size=size, shard_mb=1, patched=0.5)
        return build_targets(run, images, device, config)

    unbroken, run = tmp_path / "unbroken", tmp_path / "run"
    for build in (index, targets):
        build(unbroken, sizes[0])
        stop_after_first_shard()
        with pytest.raises(KeyboardInterrupt):
            build(run, sizes[0])
        monkeypatch.undo()
        build(run, sizes[1])
        build(run, sizes[0])  # complete: nothing is written into it
    for stage in ("index", "targets"):
        paths = sorted((run / stage).glob("*.h5"))
        assert len(paths) > 2
        whole = np.concatenate(
            [map_shard(path)["row"] for path in paths if "patched" not in str(path)]
        )
        np.testing.assert_array_equal(whole, np.arange(2500))
    mine, theirs = tree(run), tree(unbroken)
    # the features of another batch size may differ in the last bit
    assert mine.keys() == theirs.keys()
    fields = ("inputs", "fingerprint", "content")
    for name in ("index/manifest.json", "targets/manifest.json"):
        one, other = (json.loads(found[name]) for found in (mine, theirs))
        assert [one[field] for field in fields] == [other[field] for field in fields]


def test_damaged_shards_of_an_unfinished_stage_are_made_again(
    arrays, classifier, tmp_path, tree, stop_after_first_shard, monkeypatch
):
    images, config = open_images(str(arrays)), IndexConfig(batch_size=64, shard_mb=1)
    build_index(tmp_path / "unbroken", images, classifier, config)
    stop_after_first_shard()
    with pytest.raises(KeyboardInterrupt):
        build_index(tmp_path / "run", images, classifier, config)
    monkeypatch.undo()
    path = tmp_path / "run" / "index" / "images-00000.h5"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(bytes(content))
    build_index(tmp_path / "run", images, classifier, config)
    assert tree(tmp_path / "run") == tree(tmp_path / "unbroken")


@pytest.fixture
def ood(data, tmp_path):
    """Return a folder of 50 images whose times are long past."""
    folder = Path(shutil.copytree(data / "ood", tmp_path / "ood"))
    for path in folder.iterdir():
        os.utime(path, (10**9, 10**9))
    return folder


def counted(images: ImageSet) -> tuple[ImageSet, list[int]]:
    """Return an image set, and the rows whose bytes are read to compare them, as they are read."""
    rows: list[int] = []

    class Reader:
        def read(self, row):
            return images.read(row)

        def digest(self, row):
            rows.append(row)
            return images.digest(row)

    return replace(images, reader=Reader()), rows


@pytest.mark.parametrize("finished", [True, False])
def test_images_are_read_again_once_and_only_if_size_or_time_differ(
    run, ood, finished, monkeypatch
):
    config = TargetsConfig(batch_size=16, patched=2.0, shard_mb=1, overwrite=True)

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(schedule, "_MAX_SHARDS", 10)
    build_targets(run, open_images(str(ood)), torch.device("cpu"), config)
    if not finished:
        manifest = read_manifest(run, "targets")
        Stage(run, "targets", manifest.inputs)._reopen(manifest)
        monkeypatch.setattr(protocol.Stage, "commit", stop)

    def read_at_start() -> list[int]:
        images, rows = counted(open_images(str(ood)))
        with nullcontext() if finished else pytest.raises(KeyboardInterrupt):
            build_targets(run, images, torch.device("cpu"), replace(config, overwrite=False))
        return rows

    assert read_at_start() == []
    for path in ood.iterdir():
        os.utime(path, (10**9 + 1, 10**9 + 1))
    # the patched images are made from the same
    assert sorted(read_at_start()) == list(range(50))
    assert read_at_start() == []


@pytest.mark.parametrize(
    ("attributes", "names", "is_taken"),
    [
        ({}, ["row"], True),
        ({"fingerprint": "other"}, ["row"], False),
        ({"rows": "other"}, ["row"], False),
        ({"content": 5}, ["row"], False),
        ({"num_skipped": "none"}, ["row"], False),
        ({}, ["features"], False),
    ],
)
def test_a_shard_is_taken_over_only_with_all_that_a_stage_writes(
    tmp_path, attributes, names, is_taken
):
    stage, rows = Stage(tmp_path, "index", {}), np.arange(3)
    task = ShardTask("a.h5", rows, rows)
    own: dict[str, str | int] = {
        "fingerprint": stage.fingerprint,
        "rows": task.rows_hash,
        "content": "",
        "num_skipped": 0,
    }
    datasets = dict.fromkeys(names, (0, (3,), np.dtype(np.int64)))
    stamp = Stamp("a.h5", FileRecord("", 0), header=Header({**own, **attributes}, datasets))
    assert schedule._contains(stamp, stage, task) == is_taken


def test_adjacent_images_are_read_again_by_one_thread(ood):
    """Of a Parquet file each thread reads whole groups of rows."""
    images, threads = open_images(str(ood)), dict[int, int]()

    class Reader:
        read = images.read

        def digest(self, row: int) -> bytes:
            threads[row] = threading.get_ident()
            time.sleep(0.001)
            return images.digest(row)

    rows = np.arange(len(images))
    with ThreadPoolExecutor(manifests.HASH_THREADS) as pool:
        content = schedule._Digests(replace(images, reader=Reader()), pool).content_hash(rows)
    assert content == content_hash(b"".join(map(images.digest, range(len(images)))))
    changes = sum(threads[row] != threads[row - 1] for row in range(1, len(images)))
    assert changes < manifests.HASH_THREADS


def test_finished_shards_are_not_hashed_again_unless_their_time_differs(
    arrays, classifier, tmp_path, stop_after_first_shard, monkeypatch
):
    monkeypatch.setattr(stamps, "_TICK_NS", -1)
    images, config = open_images(str(arrays)), IndexConfig(batch_size=64, shard_mb=1)
    stop_after_first_shard()
    with pytest.raises(KeyboardInterrupt):
        build_index(tmp_path, images, classifier, config)
    monkeypatch.undo()
    hash_file, hashed = files.hash_file, []

    def count(path: Path) -> str:
        hashed.append(path.name)
        return hash_file(path)

    monkeypatch.setattr(manifests, "hash_file", count)
    stage = Stage(tmp_path, "index", {})
    path = stage.directory / "images-00000.h5"
    assert stage.is_intact(path.name)
    assert hashed == []
    os.utime(path)
    assert stage.is_intact(path.name)
    assert hashed == [path.name]


@pytest.mark.parametrize(
    ("num_rows", "num_bytes", "wanted"),
    [
        (1000, 500_000, 256),
        (1000, 10**9, 1),
        # of 20,000 shards at most
        (5_120_000, 500_000, 256),
        (5_120_001, 500_000, 257),
        (30_000_000, 510_000, 1500),
    ],
)
def test_shards_grow_only_with_a_stage_that_would_have_too_many(num_rows, num_bytes, wanted):
    assert schedule.rows_per_shard(num_rows, num_bytes, 128) == wanted
    assert -(-num_rows // wanted) <= 20_000


def test_the_space_for_the_index_is_required_too(arrays, classifier, tmp_path, monkeypatch):
    # of an image: pixels, 8 features, row, prediction, label, two feature maps of float16
    shards = 2500 * (3 * 16 * 16 + 4 * 8 + 8 + 4 + 4 + 2 * (8 * 4 * 4 + 6 * 8 * 8))
    faiss = 2500 * 4 * 8
    usage = shutil.disk_usage(tmp_path)
    for free, words in ((shards + faiss, "the disk has"), (0, "the disk has")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        with pytest.raises(OodHeatmapError, match=words):
            build_index(tmp_path, open_images(str(arrays)), classifier, IndexConfig(shard_mb=1))


def test_a_rank_that_does_not_see_the_run_of_rank_0_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(schedule, "_SHARED_SECONDS", 0.0)
    schedule._require_shared(start(tmp_path))
    with pytest.raises(OodHeatmapError, match=r"does not see .*All nodes must share the run"):
        schedule._require_shared(Stage(tmp_path / "elsewhere", "index", INPUTS))


def test_a_shard_that_is_missing_at_the_end_is_named(tmp_path):
    stage = start(tmp_path)
    task = shard_of(stage, [2, 5, 7, 9], 0)
    (stage.directory / task.name).unlink()
    with pytest.raises(DamagedCacheError, match=r"a\.h5 is missing: .* does not share"):
        require_rows(stage, [task])


def test_changed_images_are_refused_and_overwrite_makes_the_stage_again(data, classifier, run):
    path = next((data / "id").rglob("*.png"))
    before = path.read_bytes()
    try:
        path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        images, config = open_images(str(data / "id")), IndexConfig(batch_size=16)
        with pytest.raises(StaleCacheError, match=r"images\.content differs.*--overwrite"):
            build_index(run, images, classifier, config)
        content = read_manifest(run, "index").content
        made = build_index(run, images, classifier, replace(config, overwrite=True))
        assert made.content != content
    finally:
        path.write_bytes(before)


def test_shards_are_the_same_however_many_threads_write_them(
    arrays, classifier, tmp_path, tree, monkeypatch
):
    images, threads = open_images(str(arrays)), set()

    def write_noting_thread(*args, **kwargs):
        threads.add(threading.get_ident())
        # the next shard is there before this one is written
        time.sleep(0.2)
        write_shard(*args, **kwargs)

    monkeypatch.setattr(schedule, "write_shard", write_noting_thread)
    for cores, num_threads in ((1, 1), (64, 4)):
        threads.clear()
        monkeypatch.setattr(schedule, "num_cores", lambda cores=cores: cores)
        run = tmp_path / str(cores)
        build_index(run, images, classifier, IndexConfig(shard_mb=1))
        assert len(threads) == num_threads
    one, several = tree(tmp_path / "1"), tree(tmp_path / "64")
    assert len([name for name in one if name.endswith(".h5")]) == 5
    assert {name: one[name] for name in one if name.endswith(".h5")} == {
        name: several[name] for name in several if name.endswith(".h5")
    }


def test_an_error_of_any_writing_thread_surfaces(arrays, classifier, tmp_path, monkeypatch):
    def fail_on_second(path, *args, **kwargs):
        if "00001" in path.name:
            raise OodHeatmapError("the disk is full")
        write_shard(path, *args, **kwargs)

    monkeypatch.setattr(schedule, "write_shard", fail_on_second)
    monkeypatch.setattr(schedule, "num_cores", lambda: 64)
    with pytest.raises(OodHeatmapError, match="the disk is full"):
        build_index(tmp_path, open_images(str(arrays)), classifier, IndexConfig(shard_mb=1))
    assert len(list((tmp_path / "index").glob("*.h5"))) == 4
