"""`verify` finds what is wrong, by name, also what a checksum made after the fault cannot find."""

import json

import h5py
import pytest

from ood_heatmap.cache.files import write_json
from ood_heatmap.cache.manifest import file_record
from ood_heatmap.errors import DamagedCacheError
from ood_heatmap.pipeline.verify import verify


def test_a_whole_run_is_said_to_be_whole(run):
    lines = verify(run)
    assert [line.split(":")[0] for line in lines] == [
        "index",
        "targets",
        "targets",
        "decoder",
        "evaluation",
    ]
    assert "50 of 50 paired again, all equal" in lines[2]


@pytest.mark.parametrize("stage", ["index", "targets", "decoder", "evaluation"])
def test_one_flipped_bit_in_any_file_is_found(run, stage):
    for path in sorted((run / stage).rglob("*")):
        if path.is_dir() or path.name == "manifest.json":
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


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [("nearest", 3, "its nearest ID row is"), ("same_class", 0, "same_class is wrong")],
)
def test_a_wrong_pair_is_found_behind_a_right_checksum(run, column, value, words):
    path = run / "targets" / "targets-00000.h5"
    with h5py.File(path, "r+") as file:
        row = 7 if file[column][7] != value else 8
        file[column][row] = value
    manifest = json.loads((run / "targets" / "manifest.json").read_text())
    manifest["files"][path.name] = file_record(path)
    write_json(run / "targets" / "manifest.json", manifest)
    with pytest.raises(DamagedCacheError, match=f"row {row} of .*{words}"):
        verify(run)


def test_stages_that_are_not_made_yet_are_said(run):
    import shutil

    shutil.rmtree(run / "decoder")
    shutil.rmtree(run / "evaluation")
    assert verify(run, num_samples=5)[-2:] == ["decoder: not made yet", "evaluation: not made yet"]
