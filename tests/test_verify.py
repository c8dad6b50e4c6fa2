"""`verify` finds what is wrong, by name, also what a checksum made after the fault cannot find."""

import shutil
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch

from ood_heatmap.cache.manifest import FileRecord, write_manifest
from ood_heatmap.cache.neighbours import squared_distances
from ood_heatmap.cache.stamps import STAMPS
from ood_heatmap.errors import DamagedCacheError
from ood_heatmap.pipeline import verify as module
from ood_heatmap.pipeline.config import TargetsConfig
from ood_heatmap.pipeline.run import read_manifest
from ood_heatmap.pipeline.targets import build_targets
from ood_heatmap.pipeline.verify import verify
from ood_heatmap.sources import open_images, reopen_listed


def test_a_whole_run_is_said_to_be_whole(run):
    lines = verify(run)
    assert [line.split(":")[0] for line in lines] == [
        "index",
        "targets",
        "targets",
        "decoder",
        "evaluation",
        "localization",
    ]
    assert "50 of 50 paired again, all equal" in lines[2]


@pytest.mark.parametrize("stage", ["index", "targets", "decoder", "evaluation"])
def test_one_flipped_bit_in_any_file_is_found(run, stage):
    for path in sorted((run / stage).rglob("*")):
        # the page is drawn again from report.json
        if path.is_dir() or path.name in ("manifest.json", "report.html", STAMPS):
            continue
        before = path.read_bytes()
        for place in (0, len(before) // 2, len(before) - 1):
            content = bytearray(before)
            content[place] ^= 4
            path.write_bytes(bytes(content))
            with pytest.raises(DamagedCacheError, match=path.name):
                verify(run)
        path.write_bytes(before)
    verify(run)


def change(run, name, column, row, value):
    """Change one value of a targets shard, and the checksum with it."""
    path = run / "targets" / name
    with h5py.File(path, "r+") as file:
        assert np.any(file[column][row] != value)
        file[column][row] = value
    manifest = read_manifest(run, "targets")
    files = {**manifest.files, name: FileRecord.from_file(path)}
    write_manifest(run / "targets", replace(manifest, files=files))


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("nearest", 79, "its nearest ID row is"),
        ("same_class", 0, "same_class is wrong"),
        ("distance", 0.01, "0.01 is stored"),
        ("heatmap", 256, "nearest minus heatmap is not an image"),
        ("presence", 254, "its presence is not 255 everywhere"),
    ],
)
def test_a_wrong_pair_is_found_behind_a_right_checksum(run, column, value, words):
    change(run, "targets-00000.h5", column, 7, value)
    with pytest.raises(DamagedCacheError, match=f"row 7 of .*{words}"):
        verify(run)


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("nearest", 79, "it was pasted into another ID row"),
        ("heatmap", 1, "its heatmap is not the change made by the patch"),
        ("presence", 1, "its presence is not the opacity of the patch"),
        ("distance", 0.01, "0.01 is stored"),
    ],
)
def test_a_wrong_patched_image_is_found_behind_a_right_checksum(run, data, column, value, words):
    config = TargetsConfig(patched=0.5, limit=40, seed=3, batch_size=16, overwrite=True)
    build_targets(run, open_images(str(data / "ood")), torch.device("cpu"), config)
    shutil.rmtree(run / "decoder")
    assert verify(run)[2:4] == [
        "targets: 40 of 40 paired again, all equal",
        "targets: 20 of 20 pasted again, all equal",
    ]
    change(run, "targets-patched-00000.h5", column, 7, value)
    with pytest.raises(DamagedCacheError, match=f"patched row 7 of .*{words}"):
        verify(run)


@pytest.fixture
def averaged(run, data, tmp_path):
    """Return a run with averaged targets, and the folder that it was made from."""
    folder = shutil.copytree(data / "ood", tmp_path / "images")
    config = TargetsConfig(patched=0.5, batch_size=16, heatmap_size=8, overwrite=True)
    build_targets(run, open_images(str(folder)), torch.device("cpu"), config)
    shutil.rmtree(run / "decoder")
    return run, folder


@pytest.mark.parametrize("name", ["targets-00000.h5", "targets-patched-00000.h5"])
def test_averages_are_made_again_from_the_images(averaged, name):
    run, _ = averaged
    assert verify(run)[2:5] == [
        "targets: 50 of 50 paired again, all equal",
        "targets: 25 of 25 pasted again, all equal",
        "targets: averaged to 8 px, from the images again, all equal",
    ]
    with h5py.File(run / "targets" / name) as file:
        value = file["heatmap"][7]
    value[0, 0, 0, 0] ^= 1
    change(run, name, "heatmap", 7, value)
    with pytest.raises(DamagedCacheError, match=r"row 7 of .*is not the average of nearest"):
        verify(run)


@pytest.mark.parametrize("name", ["targets-00000.h5", "targets-patched-00000.h5"])
def test_without_the_images_averages_are_bounded_by_those_of_black_and_white(averaged, name):
    run, folder = averaged
    folder.rename(folder.with_name("moved"))
    reopen_listed.cache_clear()
    last = (
        f"targets: averaged to 8 px, only their bounds checked: {folder} was moved or has changed"
    )
    assert verify(run)[4] == last
    # the nearest ID image is nowhere both white and black
    change(run, name, "heatmap", 7, 255)
    with pytest.raises(DamagedCacheError, match=r"row 7 of .*is not an average of differ"):
        verify(run)


@pytest.mark.parametrize("name", ["targets-00000.h5", "targets-patched-00000.h5"])
def test_a_wrong_row_is_found_behind_a_right_checksum(run, data, name):
    config = TargetsConfig(patched=0.5, limit=40, seed=3, batch_size=16, overwrite=True)
    build_targets(run, open_images(str(data / "ood")), torch.device("cpu"), config)
    change(run, name, "row", 7, 49)
    with pytest.raises(DamagedCacheError, match="does not contain each of the drawn rows"):
        verify(run)


@pytest.mark.parametrize("pairing", ["random", "any", "scrambled"])
def test_other_pairings_are_checked_too(run, data, pairing):
    config = TargetsConfig(patched=0.0, pairing=pairing, batch_size=16, overwrite=True)
    build_targets(run, open_images(str(data / "ood")), torch.device("cpu"), config)
    shutil.rmtree(run / "decoder")
    assert "50 of 50 paired again" in verify(run)[2]
    change(run, "targets-00000.h5", "nearest", 7, 99)
    with pytest.raises(DamagedCacheError, match="row 7 of"):
        verify(run)


def test_stages_that_are_not_made_yet_are_said(run):
    shutil.rmtree(run / "decoder")
    shutil.rmtree(run / "evaluation")
    assert verify(run, num_samples=5)[-3:] == [
        "decoder: not made yet",
        "evaluation: not made yet",
        "localization: not made yet",
    ]


def test_no_more_rows_are_compared_at_once_than_a_chunk(run, data, monkeypatch):
    config = TargetsConfig(patched=0.0, pairing="any", batch_size=16, overwrite=True)
    build_targets(run, open_images(str(data / "ood")), torch.device("cpu"), config)
    shutil.rmtree(run / "decoder")
    compared = []
    compute = squared_distances

    def count(queries, rows):
        compared.append(len(rows))
        return compute(queries, rows)

    monkeypatch.setattr(module, "squared_distances", count)
    monkeypatch.setattr(module, "_CHUNK", 7)
    assert "50 of 50 paired again" in verify(run)[2]
    assert max(compared) == 7
    assert sum(compared) == 50 * 80
