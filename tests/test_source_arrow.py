"""Arrow and Parquet files, as Hugging Face data sets are stored; every fault ends in one line."""

import hashlib
import io
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import h5py
import numpy as np
import pytest
from PIL import Image

from ood_heatmap import source_parquet
from ood_heatmap.decoding import decode, iter_batches, prefetch
from ood_heatmap.errors import OodHeatmapError, UsageError
from ood_heatmap.images import Transform, UnreadableImageError
from ood_heatmap.pipeline.config import IndexConfig
from ood_heatmap.pipeline.index import build_index
from ood_heatmap.sources import open_images

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

EIGHT = Transform(8)
CLASSES = ["dog", "cat", "emu"]
KINDS = ("arrow", "parquet")


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(buffer, "png")
    return buffer.getvalue()


def make_table(count, *, features=None, **columns):
    """Make a table as `datasets` does: images, labels, and what the columns are."""
    images = [
        {"bytes": png(row), "path": None if row % 2 else f"im{row}.png"} for row in range(count)
    ]
    columns = {"image": images, "label": [row % 3 for row in range(count)], **columns}
    columns = {name: values for name, values in columns.items() if values is not None}
    if features is None:
        features = {
            "image": {"_type": "Image"},
            "label": {"_type": "ClassLabel", "names": CLASSES},
        }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.table(columns).replace_schema_metadata(metadata)


def write(path, table, *, group=3):
    """Write a table in the kind of its suffix, in groups of a few rows."""
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=group)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=group)
    return str(path)


def save_to_disk(folder, tables):
    """Write tables as Dataset.save_to_disk does."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05}-of-{len(tables):05}.arrow" for i in range(len(tables))]
    for name, table in zip(names, tables, strict=True):
        write(folder / name, table)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "x"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return str(folder)


def values_of(images, rows=None):
    rows = np.arange(len(images)) if rows is None else rows
    return decode(images, rows, EIGHT).pixels[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_labels_and_names_are_those_of_the_table(tmp_path, kind):
    path = write(tmp_path / f"a.{kind}", make_table(8))
    images = open_images(path)
    assert values_of(images) == list(range(8))
    assert values_of(images, np.array([6, 1])) == [6, 1]
    assert images.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert images.class_names == tuple(CLASSES)
    assert list(images.names[:3]) == [f"a.{kind}/{name}" for name in ("im0.png", "1", "im2.png")]
    assert images.digest(3) == hashlib.sha256(png(3)).digest()
    status = os.stat(path)
    assert images.stamps is not None
    assert images.stamps.tolist() == [[status.st_size, status.st_mtime_ns]] * 8


def test_a_saved_data_set_is_opened_in_the_order_of_its_files(tmp_path):
    table = make_table(10)
    folder = save_to_disk(tmp_path / "set", [table.slice(4), table.slice(0, 4)])
    write(tmp_path / "set" / "data-00007-of-00009.arrow", table)
    images = open_images(folder)
    assert values_of(images) == [4, 5, 6, 7, 8, 9, 0, 1, 2, 3]
    assert images.labels.tolist() == [1, 2, 0, 1, 2, 0, 0, 1, 2, 0]


def test_splits_are_named_one_by_one(tmp_path):
    save_to_disk(tmp_path / "all" / "train", [make_table(3)])
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(UsageError, match="all has the splits train, test: name one"):
        open_images(str(tmp_path / "all"))
    assert len(open_images(str(tmp_path / "all" / "train"))) == 3
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        write(tmp_path / "hub" / f"{name}.parquet", make_table(2))
    (tmp_path / "hub" / "README.md").write_text("")
    with pytest.raises(UsageError, match=r"several splits, test and train: .*'.*/hub/test-\*'"):
        open_images(str(tmp_path / "hub"))
    assert len(open_images(f"{tmp_path}/hub/train-*")) == 4


def test_an_arrow_file_with_an_index_is_read_too(tmp_path):
    path = tmp_path / "a.arrow"
    table = make_table(7)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    assert values_of(open_images(str(path))) == list(range(7))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("large", [False, True])
def test_plain_bytes_without_features_are_images(tmp_path, kind, large):
    content = pa.array([png(5), None, png(7)], pa.large_binary() if large else pa.binary())
    table = pa.table({"id": [1.5, 2.5, 3.5], "jpg": content, "label": ["b", None, "a"]})
    images = open_images(write(tmp_path / f"a.{kind}", table))
    batch = decode(images, np.arange(3), EIGHT, skip_unreadable=True)
    assert batch.pixels[:, 0, 0, 0].tolist() == [5, 7]
    assert [item.name for item in batch.skipped] == [f"a.{kind}/1"]
    assert images.labels.tolist() == [1, -1, 0]
    assert images.class_names == ("a", "b")


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_of_nothing_but_images_has_a_row_for_each(tmp_path, kind):
    table = pa.table({"jpg": [png(value) for value in range(7)]})
    images = open_images(write(tmp_path / f"a.{kind}", table))
    assert list(images.names) == [f"a.{kind}/{row}" for row in range(7)]
    assert values_of(images) == list(range(7))


@pytest.mark.parametrize("kind", KINDS)
def test_sliced_and_null_structs_keep_their_rows(tmp_path, kind):
    table = make_table(9)
    images = table.column("image").to_pylist()
    images[5] = None
    table = make_table(9, image=images).slice(2, 6)
    found = open_images(write(tmp_path / f"a.{kind}", table, group=4))
    batch = decode(found, np.arange(6), EIGHT, skip_unreadable=True)
    assert batch.rows.tolist() == [0, 1, 2, 4, 5]
    assert batch.pixels[:, 0, 0, 0].tolist() == [2, 3, 4, 6, 7]


@pytest.mark.parametrize("kind", KINDS)
def test_a_null_image_is_one_without_bytes_whatever_lies_beneath(tmp_path, kind):
    fields = [pa.array([png(value) for value in range(3)]), pa.array(["a", "b", "c"])]
    mask = pa.array([False, True, False])
    structs = pa.StructArray.from_arrays(fields, ["bytes", "path"], mask=mask)
    images = open_images(write(tmp_path / f"a.{kind}", pa.table({"image": structs})))
    batch = decode(images, np.arange(3), EIGHT, skip_unreadable=True)
    assert batch.pixels[:, 0, 0, 0].tolist() == [0, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_columns_that_are_no_labels_leave_images_unlabelled(tmp_path, kind):
    kinds = {"_type": "ClassLabel", "names": CLASSES}
    features = {"image": {"_type": "Image"}, "fine": kinds, "coarse": kinds}
    two = make_table(2, features=features, label=None, fine=[0, 1], coarse=[1, 0])
    none = make_table(2, label=[0.5, 1.5])
    for number, table in enumerate((two, none)):
        images = open_images(write(tmp_path / f"{number}.{kind}", table))
        assert images.labels.tolist() == [-1, -1]
    features.pop("coarse")
    one = make_table(2, features=features, label=None, fine=[2, 1])
    assert open_images(write(tmp_path / f"one.{kind}", one)).labels.tolist() == [2, 1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": None}, r"has no column of images \(label\)"),
        ({"image": [], "label": []}, "it has no rows"),
        (
            {"image": None, "left": [b"x"], "right": [b"x"], "label": [0]},
            "images left, right: keep",
        ),
        ({"label": [0, 1, 7]}, "has the label 7: class numbers are 0 to 2"),
        ({"label": ["x" * 1001] * 3}, "has a label that is not a class"),
    ],
)
def test_what_is_wrong_with_a_table_is_one_line(tmp_path, kind, columns, message):
    table = make_table(3, **columns)
    if columns.get("image") == []:
        table = make_table(3).slice(0, 0)
    with pytest.raises(OodHeatmapError, match=message):
        open_images(write(tmp_path / f"a.{kind}", table))


def test_files_of_different_classes_are_refused(tmp_path):
    other = {
        "image": {"_type": "Image"},
        "label": {"_type": "ClassLabel", "names": ["x", "y", "z"]},
    }
    for kind in KINDS:
        write(tmp_path / kind / f"0.{kind}", make_table(3))
        write(tmp_path / kind / f"1.{kind}", make_table(3, features=other))
        with pytest.raises(OodHeatmapError, match="have different class names"):
            open_images(str(tmp_path / kind))


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_named(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    write(path, make_table(20))
    whole = path.read_bytes()
    for content in (b"", b"text" * 9, whole[:40], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(OodHeatmapError, match=rf"a\.{kind} cannot be read as an? \w+ file"):
            open_images(str(path))
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(OodHeatmapError, match="saved contains no images"):
        open_images(str(tmp_path / "saved"))
    (tmp_path / "saved" / "state.json").write_text('{"_data_files": [1]}')
    with pytest.raises(OodHeatmapError, match="saved is not a data set of `datasets`"):
        open_images(str(tmp_path / "saved"))


@pytest.mark.parametrize("kind", KINDS)
def test_any_flipped_byte_is_an_error_or_an_image_and_no_crash(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    write(path, make_table(6))
    whole = bytearray(path.read_bytes())
    for position in range(0, len(whole), max(1, len(whole) // 60)):
        damaged = whole.copy()
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        try:
            images = open_images(str(path))
            decode(images, np.arange(len(images)), EIGHT, skip_unreadable=True)
        except OodHeatmapError:
            continue


def test_a_compressed_arrow_file_is_refused_with_the_way_out(tmp_path):
    path, table = tmp_path / "a.arrow", make_table(6)
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with (
        pa.OSFile(str(path), "wb") as file,
        pa.ipc.new_stream(file, table.schema, options=options) as stream,
    ):
        stream.write_table(table)
    with pytest.raises(OodHeatmapError, match=r"a\.arrow is compressed.*Dataset\.save_to_disk"):
        open_images(str(path))


def test_a_row_group_that_cannot_be_read_in_pieces_is_refused(tmp_path, monkeypatch, caplog):
    path = write(tmp_path / "a.parquet", make_table(6))
    monkeypatch.setattr(source_parquet, "_LARGE_GROUP", 100)
    open_images(path)
    assert "row groups of 0 MB, and each worker holds one in memory" in caplog.text
    monkeypatch.setattr(source_parquet, "_MAX_GROUP", 100)
    with pytest.raises(OodHeatmapError, match=r"row group of .* with row_group_size=100"):
        open_images(path)


@pytest.mark.parametrize("kind", KINDS)
def test_an_unreadable_image_is_named_by_its_file_and_path(tmp_path, kind):
    images = make_table(4).column("image").to_pylist()
    images[2]["bytes"] = b"text"
    path = write(tmp_path / f"a.{kind}", make_table(4, image=images))
    with pytest.raises(UnreadableImageError, match=rf"{path}/im2\.png is not a readable image"):
        values_of(open_images(path))


def test_images_saved_as_paths_are_read_from_their_files(tmp_path):
    for value in range(3):
        (tmp_path / f"{value}.png").write_bytes(png(value))
    paths = [{"bytes": None, "path": str(tmp_path / f"{value}.png")} for value in (2, 0, 1)]
    typed = pa.array(paths, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    images = open_images(save_to_disk(tmp_path / "set", [make_table(3, image=typed)]))
    assert values_of(images) == [2, 0, 1]
    assert images.labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path, kind):
    path = write(tmp_path / f"a.{kind}", make_table(6))
    images = open_images(path)
    write(tmp_path / f"a.{kind}", make_table(7))
    with pytest.raises(OodHeatmapError, match=rf"a\.{kind} has changed since it was listed"):
        decode(images, np.arange(6), EIGHT, skip_unreadable=True)


@pytest.mark.parametrize("kind", KINDS)
def test_threads_and_processes_read_the_same_in_any_order(tmp_path, kind):
    for number in range(5):
        write(tmp_path / "set" / f"{number}.{kind}", make_table(40).slice(8 * number, 8))
    before = len(os.listdir("/proc/self/fd"))
    images = open_images(str(tmp_path / "set"))
    assert len(os.listdir("/proc/self/fd")) == before
    rows = np.random.default_rng(0).permutation(40).reshape(8, 5)
    threads = list(prefetch(lambda part: values_of(images, part), rows, workers=4))
    processes = [
        batch.pixels[:, 0, 0, 0].tolist() for batch in iter_batches(images, rows, EIGHT, workers=3)
    ]
    assert threads == processes == rows.tolist()


def test_a_row_group_that_fails_once_is_read_again(tmp_path, monkeypatch):
    images = open_images(write(tmp_path / "a.parquet", make_table(6)))
    assert values_of(images, np.array([1])) == [1]
    with monkeypatch.context() as patch:
        patch.setattr(source_parquet, "_read_group", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            images.read(4)
    assert values_of(images, np.array([1, 4])) == [1, 4]


def test_each_thread_keeps_its_own_row_group(tmp_path, monkeypatch):
    images = open_images(write(tmp_path / "a.parquet", make_table(6)))
    read_group, read = source_parquet._read_group, []

    def counted(file, group):
        read.append(group)
        return read_group(file, group)

    monkeypatch.setattr(source_parquet, "_read_group", counted)
    images.read(0)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(values_of, images, np.array([3, 4])).result() == [3, 4]
    assert values_of(images, np.array([1, 2])) == [1, 2]
    assert read == [0, 1]


def test_the_listing_changes_with_what_is_known_without_reading(tmp_path):
    for kind in KINDS:
        tables = [make_table(4), make_table(5), make_table(4, label=[0, 0, 0, 0])]
        listings = {open_images(write(tmp_path / f"a.{kind}", table)).listing for table in tables}
        assert len(listings) == 3
        (tmp_path / "b").mkdir(exist_ok=True)
        same = write(tmp_path / "b" / f"a.{kind}", make_table(4))
        assert open_images(same).listing in listings


def test_without_pyarrow_the_way_out_is_named(tmp_path, monkeypatch):
    paths = [write(tmp_path / f"a.{kind}", make_table(1)) for kind in KINDS]
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    for path in paths:
        with pytest.raises(
            UsageError, match=r"without pyarrow: pip install 'ood-heatmap\[arrow\]'"
        ):
            open_images(path)


@pytest.mark.parametrize("kind", KINDS)
def test_tables_make_the_same_rows_as_the_folder(data, classifier, tmp_path, kind):
    paths = sorted((data / "id").rglob("*.png"))
    images = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
    labels = [int(path.parent.name.removeprefix("class")) for path in paths]
    write(tmp_path / f"id.{kind}", make_table(len(paths), features={}, image=images, label=labels))
    found = {}
    for name, source in (("folder", data / "id"), ("table", tmp_path / f"id.{kind}")):
        config = IndexConfig(batch_size=16)
        manifest = build_index(tmp_path / name, open_images(str(source)), classifier, config)
        found[name] = (manifest.content, manifest.results["accuracy"])
    assert found["folder"] == found["table"]
    with (
        h5py.File(tmp_path / "folder" / "index" / "images-00000.h5") as wanted,
        h5py.File(tmp_path / "table" / "index" / "images-00000.h5") as made,
    ):
        for column in wanted:
            np.testing.assert_array_equal(made[column][...], wanted[column][...])
