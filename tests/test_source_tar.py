"""WebDataset shards: grouping, labels, positions, the cache of listings; faults in one line."""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import tarfile

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ood_heatmap import packed, source_tar, tar_index
from ood_heatmap.decoding import decode, iter_batches, prefetch
from ood_heatmap.errors import OodHeatmapError
from ood_heatmap.images import Transform, UnreadableImageError
from ood_heatmap.pipeline.config import IndexConfig, TargetsConfig
from ood_heatmap.pipeline.index import build_index
from ood_heatmap.pipeline.targets import build_targets
from ood_heatmap.sources import open_images

EIGHT = Transform(8)


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(buffer, "png")
    return buffer.getvalue()


def write_tar(path, members, **options):
    """Write a tar file of (name, content) pairs."""
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return str(path)


def values_of(images, rows=None):
    rows = np.arange(len(images)) if rows is None else rows
    return decode(images, rows, EIGHT).pixels[:, 0, 0, 0].tolist()


def test_samples_are_grouped_by_their_names_up_to_the_first_dot(tmp_path):
    write_tar(
        tmp_path / "s-0.tar",
        [
            ("__meta__/note.jpg", png(99)),
            ("a/1.cls", b"2\n"),
            ("a/1.PNG", png(10)),
            ("a/1.seg.png", png(99)),
            ("a/2.json", json.dumps({"caption": "x", "label": 0}).encode()),
            ("a/2.jpeg", png(11)),
            ("b/2.left.png", png(12)),
            ("b/2.txt", b"no label"),
            ("b/3.txt", b"no image"),
            (".hidden.png", png(99)),
            ("no suffix", b""),
        ],
    )
    write_tar(tmp_path / "s-1.tar", [("a/1.png", png(13)), ("a/1.json", b"[]")])
    images = open_images(str(tmp_path))
    assert list(images.names) == [
        "s-0.tar/a/1.PNG",
        "s-0.tar/a/2.jpeg",
        "s-0.tar/b/2.left.png",
        "s-1.tar/a/1.png",
    ]
    assert images.labels.tolist() == [2, 0, -1, -1]
    assert (images.classes, images.has_class_names) == (("0", "1", "2"), False)
    assert values_of(images) == [10, 11, 12, 13]
    assert images.digest(3) == hashlib.sha256(png(13)).digest()
    stats = [os.stat(tmp_path / name) for name in ("s-0.tar", "s-1.tar")]
    stamps = [[item.st_size, item.st_mtime_ns] for item in stats]
    assert images.stamps is not None
    assert images.stamps.tolist() == [stamps[0]] * 3 + [stamps[1]]


def test_samples_without_an_image_are_counted(tmp_path, caplog):
    path = write_tar(tmp_path / "a.tar", [("1.png", png(0)), ("2.txt", b""), ("3.cls", b"1")])
    assert len(open_images(path)) == 1
    assert "samples without an image: 2" in caplog.text


def labelled(path, samples):
    """Write samples of (suffix, content) pairs beside an image."""
    members = []
    for number, pairs in enumerate(samples):
        members += [(f"{number}.{suffix}", content) for suffix, content in pairs]
        members.append((f"{number}.png", png(number)))
    return write_tar(path, members)


def test_class_names_in_cls_and_json(tmp_path):
    samples = [[("cls", b"dog")], [("json", b'{"cls": "cat", "label": "emu"}')], []]
    images = open_images(labelled(tmp_path / "a.tar", samples))
    assert images.class_names == ("dog", "emu")
    assert images.labels.tolist() == [0, 1, -1]


def test_a_text_that_all_samples_of_a_class_share_is_its_name(tmp_path):
    both = [[("cls", b"1"), ("txt", b"dog\n")], [("cls", b"0"), ("txt", b"cat")]]
    images = open_images(labelled(tmp_path / "names.tar", both * 2))
    assert images.class_names == ("cat", "dog")
    assert images.labels.tolist() == [1, 0, 1, 0]
    captions = [*both, [("cls", b"1"), ("txt", b"a dog that runs")]]
    assert open_images(labelled(tmp_path / "captions.tar", captions)).class_names == ()
    same = [[("cls", b"1"), ("txt", b"x")], [("cls", b"0"), ("txt", b"x")]]
    assert open_images(labelled(tmp_path / "same.tar", same)).class_names == ()


def test_patterns_name_shards_in_order(tmp_path):
    for number in range(12):
        write_tar(tmp_path / f"{number:02}.tar", [("x.png", png(number))])
    assert values_of(open_images(f"{tmp_path}/{{03..11}}.tar")) == list(range(3, 12))
    assert values_of(open_images(f"{tmp_path}/0*.tar")) == list(range(10))
    assert values_of(open_images(str(tmp_path / "07.tar"))) == [7]


def test_tar_files_beside_images_or_class_folders_are_left_out(tmp_path, caplog):
    write_tar(tmp_path / "a.tar", [("x.png", png(1))])
    (tmp_path / "y.png").write_bytes(png(2))
    assert values_of(open_images(str(tmp_path))) == [2]
    (tmp_path / "y.png").unlink()
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "z.png").write_bytes(png(3))
    assert values_of(open_images(str(tmp_path))) == [3]
    assert "files skipped: .tar 1" in caplog.text


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@given(
    members=st.lists(
        st.tuples(st.text("aB./\u00fc", min_size=1, max_size=60), st.binary(max_size=1500)),
        max_size=6,
    ),
    width=st.integers(1, 4),
)
def test_members_are_those_that_tarfile_lists(form, members, width, tmp_path_factory):
    path = tmp_path_factory.mktemp("tars") / "a.tar"
    # no part of a name is longer than USTAR can store
    write_tar(
        path, [(f"{name}/" * width + "x.y", content) for name, content in members], format=form
    )
    with tarfile.open(path) as tar:
        wanted = [(item.name, item.offset_data, item.size) for item in tar.getmembers()]
    with path.open("rb") as file:
        found = [tuple(member[:3]) for member in tar_index._iter_members(file)]
    assert found == wanted


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_any_length_and_bytes_are_read(tmp_path, form):
    names = ["d" * 300 + "/x.png", "caf\udce9.png", "two\nlines.png", "../../up.png", "/root.png"]
    path = write_tar(
        tmp_path / "a.tar", [(name, png(i)) for i, name in enumerate(names)], format=form
    )
    images = open_images(path)
    shown = [name.replace("\udce9", "\\udce9").replace("\n", "\\n") for name in names]
    assert list(images.names) == [f"a.tar/{name}" for name in shown]
    assert values_of(images) == list(range(5))


def test_only_regular_files_count_and_nothing_is_extracted(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo(f"{kind.decode()}.png")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        member = tarfile.TarInfo("../evil.png")
        member.size = len(png(5))
        tar.addfile(member, io.BytesIO(png(5)))
    assert values_of(open_images(str(path))) == [5]
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.tar"]
    assert not (tmp_path.parent / "evil.png").exists()


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([[("jpg", png(1))]], r"several images in the sample of 0.jpg \(jpg, png\)"),
        ([[("cls", b"\xff")]], r"the label 0.cls in .*a.tar cannot be read"),
        ([[("cls", b"1" * 2000)]], r"0.cls in .* cannot be read \(2000 bytes are too many\)"),
        ([[("cls", b"-5")]], "a.tar has the label -5"),
        ([[("json", b"{")]], r"the label 0.json in .*a.tar cannot be read"),
        ([[("json", b"[" * 200_000)]], r"the label 0.json in .*a.tar cannot be read"),
        ([[("json", b" " * (2**24 + 1))]], r"0.json in .* cannot be read \(16777217 bytes"),
        ([[("cls", b"0"), ("CLS", b"1")]], r"has 0.CLS twice in one sample"),
        ([], "contains no images"),
    ],
)
def test_what_is_wrong_with_a_sample_is_one_line(tmp_path, samples, message):
    with pytest.raises(OodHeatmapError, match=message):
        open_images(labelled(tmp_path / "a.tar", samples))


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        (".tar.gz", gzip.compress),
        (".tgz", gzip.compress),
        (".tar.bz2", bz2.compress),
        (".tar.xz", lzma.compress),
        (".tar.zst", lambda content: b"\x28\xb5\x2f\xfd" + content),
        (".tar", gzip.compress),
    ],
)
def test_compressed_shards_are_refused_with_the_way_out(tmp_path, suffix, compress):
    whole = write_tar(tmp_path / "a.tar", [("x.png", png(1))])
    content = (tmp_path / "a.tar").read_bytes()
    os.unlink(whole)
    (tmp_path / f"b{suffix}").write_bytes(compress(content))
    for source in (tmp_path / f"b{suffix}", tmp_path):
        with pytest.raises(OodHeatmapError, match=r"is compressed .*Decompress it to a \.tar file"):
            open_images(str(source))


def test_a_damaged_or_truncated_shard_is_named(tmp_path):
    path = tmp_path / "a.tar"
    members = [(f"{number}.png", png(number)) for number in range(4)]
    write_tar(path, members)
    whole = path.read_bytes()
    # a header and one block of data for each
    for cut in (0, 100, 512 + 20, 2 * 1024 - 10, 2 * 1024 + 100, 3 * 1024 + 512 + 20):
        path.write_bytes(whole[:cut])
        with pytest.raises(OodHeatmapError, match=r"a\.tar cannot be read as a tar file"):
            open_images(str(path))
    for position in (0, 1024 + 5, 2 * 1024 + 130, 3 * 1024 + 150):
        flipped = bytearray(whole)
        flipped[position] ^= 0xFF
        path.write_bytes(flipped)
        with pytest.raises(OodHeatmapError, match=r"a\.tar cannot be read as a tar file"):
            open_images(str(path))
    path.write_bytes(b"hello" * 1000)
    with pytest.raises(OodHeatmapError, match=r"a\.tar cannot be read as a tar file"):
        open_images(str(path))
    # the end marker alone may be missing
    path.write_bytes(whole[: 4 * 1024])
    assert values_of(open_images(str(path))) == [0, 1, 2, 3]


def test_an_unreadable_image_is_named_by_its_member(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("1.png", png(1)), ("2.png", b"text"), ("3.png", png(3))])
    images = open_images(path)
    with pytest.raises(UnreadableImageError, match=rf"{path}/2\.png is not a readable image"):
        decode(images, np.arange(3), EIGHT)
    batch = decode(images, np.arange(3), EIGHT, skip_unreadable=True)
    assert batch.rows.tolist() == [0, 2]
    assert [item.name for item in batch.skipped] == ["a.tar/2.png"]


def test_a_shard_that_changes_while_it_is_read_is_an_error(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("1.png", png(1)), ("2.png", png(2))])
    images = open_images(path)
    write_tar(path, [("1.png", png(1)), ("2.png", png(2)), ("3.png", png(3))])
    with pytest.raises(OodHeatmapError, match=r"a\.tar has changed since it was listed"):
        decode(images, np.arange(2), EIGHT, skip_unreadable=True)


@pytest.fixture
def hundred(tmp_path):
    """Return a folder of 100 shards of 2 images; the value of an image is its row."""
    for number in range(100):
        members = [(f"{item}.png", png(2 * number + item)) for item in range(2)]
        write_tar(tmp_path / f"{number:03}.tar", members)
    return str(tmp_path)


def test_any_number_of_shards_needs_few_descriptors_from_many_threads(hundred):
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    def read(rows) -> tuple[int, list[int]]:
        images, most, found = open_images(hundred), 0, []
        for values in prefetch(lambda part: values_of(images, part), rows, workers=8):
            most = max(most, count())
            found += values
        return most, found

    before = count()
    rows = np.random.default_rng(0).permutation(200).reshape(40, 5)
    most, found = read(rows)
    assert found == rows.ravel().tolist()
    # 16 open files, one more in each thread, and the listing itself
    assert most - before <= 16 + 8 + 1
    assert count() == before


def test_a_file_that_another_thread_evicts_is_still_read(hundred, monkeypatch):
    monkeypatch.setattr(packed, "_MAX_OPEN_FILES", 1)
    images, pread = open_images(hundred), os.pread

    def evicting(descriptor, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(os, "pread", pread)
            # closes the first file, unless something refers to it; the number would be used again
            images.read(50)
        return pread(descriptor, *arguments)

    monkeypatch.setattr(os, "pread", evicting)
    assert np.asarray(images.read(20)[0])[0, 0, 0] == 20


def test_processes_read_what_threads_read(hundred):
    images = open_images(hundred)
    # open before the processes start
    images.digest(0)
    rows = np.random.default_rng(0).permutation(200).reshape(10, 20)
    batches = iter_batches(images, rows, EIGHT, workers=3)
    found = [batch.pixels[:, 0, 0, 0].tolist() for batch in batches]
    assert found == rows.tolist()


def test_progress_is_logged_where_listing_takes_long(hundred, monkeypatch, caplog):
    monkeypatch.setattr(source_tar, "_LOG_SECONDS", -1.0)
    with caplog.at_level("INFO"):
        open_images(hundred)
    assert f"{hundred}: listed 100 of 100 tar files" in caplog.text


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_shard_is_listed_once(tmp_path, cache, monkeypatch):
    samples = [[("cls", b"1"), ("txt", b"dog")], [("cls", b"0"), ("txt", b"cat")], []]
    path = labelled(tmp_path / "a.tar", samples)
    first = open_images(path)
    (file,) = (cache / "ood_heatmap" / "tar").iterdir()

    def read(*arguments):
        raise AssertionError("listed again")

    with monkeypatch.context() as patch:
        patch.setattr(tar_index, "_read_index", read)
        again = open_images(path)
    assert again.describe() == first.describe()
    assert list(again.names) == list(first.names)
    assert again.labels.tolist() == first.labels.tolist()
    assert again.classes == first.classes == ("cat", "dog")
    assert values_of(again) == [0, 1, 2]
    # the same size at another time
    labelled(tmp_path / "a.tar", [samples[1], samples[0], []])
    assert open_images(path).labels.tolist() == [0, 1, -1]
    for damaged in (b"", b"text", file.read_bytes()[:-9]):
        file.write_bytes(damaged)
        assert open_images(path).labels.tolist() == [0, 1, -1]
    assert [item.name for item in file.parent.iterdir()] == [file.name]


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, cache):
    cache.write_text("a file where the folder would be")
    path = write_tar(tmp_path / "a.tar", [("1.png", png(1))])
    assert values_of(open_images(path)) == values_of(open_images(path)) == [1]


def test_the_listing_changes_with_names_sizes_labels_and_not_with_the_place(tmp_path):
    def listing(*pairs, name="a.tar", folder="one"):
        (tmp_path / folder).mkdir(exist_ok=True)
        return open_images(write_tar(tmp_path / folder / name, pairs)).listing

    before = listing(("1.png", png(1)), ("1.cls", b"0"))
    assert listing(("1.png", png(1)), ("1.cls", b"0"), folder="two") == before
    others = [
        listing(("2.png", png(1)), ("2.cls", b"0")),
        listing(("1.png", png(1)), ("1.cls", b"1")),
        listing(("1.png", png(1) + b" "), ("1.cls", b"0")),
        listing(("1.png", png(1)), ("1.cls", b"0"), name="b.tar"),
    ]
    assert len({before, *others}) == 5


def test_shards_make_the_same_rows_as_the_folder(data, classifier, tmp_path):
    paths = sorted((data / "id").rglob("*.png"))
    for number in range(3):
        members = []
        for i, path in list(enumerate(paths))[number * 30 : number * 30 + 30]:
            label = path.parent.name.removeprefix("class")
            members += [(f"{i}.png", path.read_bytes()), (f"{i}.cls", label.encode())]
        write_tar(tmp_path / f"id-{number}.tar", members)
    (tmp_path / "ood").mkdir()
    ood = [(f"{path.stem}.png", path.read_bytes()) for path in sorted((data / "ood").iterdir())]
    write_tar(tmp_path / "ood" / "0.tar", ood)
    sources = {
        "folder": (data / "id", data / "ood"),
        "tar": (tmp_path / "id-{0..2}.tar", tmp_path / "ood"),
    }
    contents = {}
    for kind, (id_source, ood_source) in sources.items():
        run = tmp_path / kind
        index = build_index(
            run, open_images(str(id_source)), classifier, IndexConfig(batch_size=16)
        )
        config = TargetsConfig(batch_size=16, patched=0.5, limit=40)
        cpu = torch.device("cpu")
        targets = build_targets(run, open_images(str(ood_source)), cpu, config)
        contents[kind] = (index.content, targets.content, index.results["accuracy"])
    assert contents["tar"] == contents["folder"]
    for name in (
        "index/images-00000.h5",
        "targets/targets-00000.h5",
        "targets/targets-patched-00000.h5",
    ):
        with (
            h5py.File(tmp_path / "folder" / name) as wanted,
            h5py.File(tmp_path / "tar" / name) as found,
        ):
            assert set(found) == set(wanted)
            for column in wanted:
                np.testing.assert_array_equal(found[column][...], wanted[column][...])
