"""Stage 2: each OOD image with its own nearest ID image, exactly, and what the stage refuses."""

import threading
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from simulated_cuda import CUDA, simulated_cuda

from ood_heatmap.cache.neighbours import Bank
from ood_heatmap.errors import OodHeatmapError, StaleCacheError, UsageError
from ood_heatmap.heatmap import stored_target, target_heatmap
from ood_heatmap.images import Transform
from ood_heatmap.patches import MIXED, SQUARES, draw_patch
from ood_heatmap.pipeline import audit, schedule
from ood_heatmap.pipeline import targets as module
from ood_heatmap.pipeline.config import TargetsConfig
from ood_heatmap.pipeline.patched import PastePlan, draw_paste_plan, pasted_images
from ood_heatmap.pipeline.run import Index, open_index, open_targets
from ood_heatmap.pipeline.targets import build_targets
from ood_heatmap.pipeline.verify import verify
from ood_heatmap.source_array import from_array
from ood_heatmap.sources import open_images

CPU = torch.device("cpu")


def columns_of(run):
    index = open_index(run)
    return index, open_targets(run, index).columns


def ood_pixels(data, rows, transform) -> np.ndarray:
    images = open_images(str(data / "ood"))
    return np.stack([transform(images.read(int(row))[0]) for row in rows])


def test_every_ood_image_is_paired_with_its_own_nearest_id_image(data, classifier, finished_run):
    index, columns = columns_of(finished_run)
    output = classifier(torch.from_numpy(ood_pixels(data, range(50), classifier.config.transform)))
    np.testing.assert_allclose(columns["features"].read(), output.features, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(columns["prediction"].read(), output.logits.argmax(dim=1))
    bank = index.columns["features"].read().astype(np.float64)
    id_class = index.columns["prediction"].read()
    stored = zip(
        columns["features"].read(),
        columns["prediction"].read(),
        columns["nearest"].read(),
        strict=True,
    )
    for number, (features, prediction, nearest) in enumerate(stored):
        distance = np.sqrt(((bank - features) ** 2).sum(axis=1))
        distance[id_class != prediction] = np.inf
        assert nearest == distance.argmin()
        np.testing.assert_allclose(columns["distance"].read()[number], distance.min(), rtol=1e-6)


def test_the_ood_images_come_back_exactly_from_the_shards_alone(data, classifier, finished_run):
    with (
        h5py.File(finished_run / "targets" / "targets-00000.h5") as targets,
        h5py.File(finished_run / "index" / "images-00000.h5") as index,
    ):
        scale = targets["heatmap"].attrs["scale"]
        heatmap = targets["heatmap"][...] * scale
        nearest = index["images"][...][targets["nearest"][...]]
        found = np.rint(nearest - 255 * heatmap).astype(np.uint8)
        rows = targets["row"][...]
    np.testing.assert_array_equal(found, ood_pixels(data, rows, classifier.config.transform))


def test_a_limit_draws_the_same_rows_every_time(data, run, tmp_path):
    images = open_images(str(data / "ood"))
    draws = [
        module.choose_rows(images, TargetsConfig(patched=0.0, limit=20, seed=seed))
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).any()
    assert len(np.unique(draws[0])) == 20
    assert (np.diff(draws[0]) > 0).all()
    build_targets(
        run, images, CPU, TargetsConfig(patched=0.0, limit=20, batch_size=16, overwrite=True)
    )
    np.testing.assert_array_equal(columns_of(run)[1]["row"].read(), draws[0])


def test_fewer_images_than_asked_for_is_one_line(data, run):
    with pytest.raises(OodHeatmapError, match="has 50 images, --limit asks for 51"):
        build_targets(
            run, open_images(str(data / "ood")), CPU, TargetsConfig(patched=0.0, limit=51)
        )


def test_a_class_without_id_images_searches_all(data, spec, run, tmp_path, monkeypatch):
    index = open_index(run)
    lost = int(np.bincount(open_targets(run, index).columns["prediction"].read()).argmax())
    bank_of = Index.bank

    def without_the_class(self, device):
        bank, prediction = bank_of(self, device), np.sort(self.columns["prediction"].read())
        kept = prediction != lost
        return Bank(bank.features[kept], prediction[kept], bank.row[kept], device=device)

    monkeypatch.setattr(Index, "bank", without_the_class)
    config = TargetsConfig(patched=0.0, batch_size=8, overwrite=True, seed=1)
    manifest = build_targets(run, open_images(str(data / "ood")), CPU, config)
    columns = columns_of(run)[1]
    mine = columns["prediction"].read() == lost
    assert manifest.results["num_without_class"] == mine.sum() > 0
    np.testing.assert_array_equal(columns["same_class"].read() == 0, mine)
    others = index.columns["prediction"].read() != lost
    features = index.columns["features"].read().astype(np.float64)
    for query, nearest in zip(
        columns["features"].read()[mine], columns["nearest"].read()[mine], strict=True
    ):
        distance = np.where(others, ((features - query) ** 2).sum(axis=1), np.inf)
        assert nearest == distance.argmin()


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_the_pairs_do_not_depend_on_the_batch_size(data, run, batch_size):
    before = {name: rows.read() for name, rows in columns_of(run)[1].items()}
    config = TargetsConfig(patched=0.0, batch_size=batch_size, overwrite=True, seed=9)
    build_targets(run, open_images(str(data / "ood")), CPU, config)
    after = columns_of(run)[1]
    for name in ("nearest", "heatmap", "prediction", "same_class"):
        np.testing.assert_array_equal(after[name].read(), before[name])
    np.testing.assert_allclose(after["distance"].read(), before["distance"], rtol=1e-4)


def test_pairing_over_all_classes_matches_brute_force(data, run):
    config = TargetsConfig(patched=0.0, pairing="any", batch_size=16, overwrite=True)
    build_targets(run, open_images(str(data / "ood")), CPU, config)
    index, columns = columns_of(run)
    bank = index.columns["features"].read().astype(np.float64)
    distance = ((columns["features"].read()[:, None] - bank) ** 2).sum(axis=2)
    np.testing.assert_array_equal(columns["nearest"].read(), distance.argmin(axis=1))
    np.testing.assert_allclose(columns["distance"].read(), np.sqrt(distance.min(axis=1)), rtol=1e-6)
    assert columns["same_class"].read().all()


def test_scrambled_pairing_reads_a_list_by_class_in_the_order_of_images(data, run):
    before = {name: rows.read() for name, rows in columns_of(run)[1].items()}
    config = TargetsConfig(patched=0.0, pairing="scrambled", batch_size=16, overwrite=True)
    build_targets(run, open_images(str(data / "ood")), CPU, config)
    index, columns = columns_of(run)
    appended = []
    for label in range(4):  # as the released code fills its list
        appended += before["nearest"][before["prediction"] == label].tolist()
    assert columns["nearest"].read().tolist() == appended
    assert (columns["nearest"].read() != before["nearest"]).mean() > 0.3
    partner = index.columns["features"].take(np.array(appended)).astype(np.float64)
    distance = np.sqrt(((columns["features"].read() - partner) ** 2).sum(axis=1))
    np.testing.assert_allclose(columns["distance"].read(), distance, rtol=1e-6)


def test_random_pairing_keeps_the_class(data, run):
    config = TargetsConfig(patched=0.0, pairing="random", batch_size=16, overwrite=True)
    build_targets(run, open_images(str(data / "ood")), CPU, config)
    index, columns = columns_of(run)
    partner = index.columns["prediction"].take(columns["nearest"].read())
    np.testing.assert_array_equal(partner, columns["prediction"].read())


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (TargetsConfig(patched=0.0, seed=1), "options.seed"),
        (TargetsConfig(patched=0.0, limit=10), "options.limit"),
        (TargetsConfig(patched=0.0, pairing="random"), "options.pairing"),
        (TargetsConfig(patched=0.0, shard_mb=1), "options.shard_mb"),
        (TargetsConfig(patched=0.5), "options.patched"),
    ],
)
def test_other_options_are_refused_by_name(data, run, config, field):
    with pytest.raises(StaleCacheError, match=f"different {field}"):
        build_targets(run, open_images(str(data / "ood")), CPU, config)


def test_other_images_are_refused_by_name(data, run):
    with pytest.raises(StaleCacheError, match=r"different images\.num_images \(50, now 25\)"):
        build_targets(run, open_images(str(data / "far")), CPU, TargetsConfig(patched=0.0))


def test_an_index_made_anew_makes_the_targets_stale(run, tmp_path, data, classifier):
    from ood_heatmap.pipeline.config import IndexConfig
    from ood_heatmap.pipeline.index import build_index

    config = IndexConfig(batch_size=16, shard_mb=1, overwrite=True)
    build_index(run, open_images(str(data / "id")), classifier, config)
    with pytest.raises(StaleCacheError, match="built from a different index"):
        columns_of(run)


def test_without_an_index_the_first_command_is_named(data, tmp_path):
    with pytest.raises(OodHeatmapError, match="no index stage: run `ood-heatmap index"):
        build_targets(tmp_path, open_images(str(data / "ood")), CPU, TargetsConfig(patched=0.0))


@pytest.mark.parametrize(
    ("per_class", "waiting_bytes", "wanted"),
    [(1, 2**30, [32] * 9 + [12]), (100, 2**30, [224, 76]), (100, 1, [32] * 9 + [12])],
)
def test_shards_wait_for_enough_queries_or_until_memory_is_full(
    run, monkeypatch, per_class, waiting_bytes, wanted
):
    monkeypatch.setattr(module, "bytes_per_row", lambda _: 1_000_000 // 32)
    monkeypatch.setattr(module, "_QUERIES_PER_CLASS", per_class)
    monkeypatch.setattr(module, "max_pending_bytes", lambda: waiting_bytes)
    sizes, pair = [], module._pair

    def counting(shards, index, bank, config):
        assert len(bank.classes) == 2
        sizes.append(sum(len(shard.rows) for shard in shards))
        return pair(shards, index, bank, config)

    monkeypatch.setattr(module, "_pair", counting)
    pixels = np.random.default_rng(0).integers(0, 256, (300, 16, 16, 3)).astype(np.uint8)
    config = TargetsConfig(patched=0.0, batch_size=16, shard_mb=1, overwrite=True)
    build_targets(run, from_array(pixels), CPU, config)
    assert sizes == wanted
    index, columns = columns_of(run)
    found = index.bank(CPU).nearest(columns["features"].read(), columns["prediction"].read())
    np.testing.assert_array_equal(columns["nearest"].read(), found.row)


@pytest.mark.parametrize(
    ("free", "ranks", "queries"),
    # a rank of eight on a machine of 2 TB: 40 queries of each of 1,000 classes
    [(2 << 40, 8, 40_000), (256 << 30, 1, 40_000), (4 << 30, 1, 1_400)],
)
def test_a_search_waits_for_as_many_images_as_the_memory_allows(monkeypatch, free, ranks, queries):
    monkeypatch.setattr(module, "available_memory", lambda _: free)
    monkeypatch.setattr(module, "local_world_size", lambda: ranks)
    # bytes at 224 px: the image, 2,048 features, 1,000 logits, a map of 2,048 x 7 x 7, the row
    row_bytes = 3 * 224**2 + 4 * 2048 + 4 * 1000 + 2 * 2048 * 49 + 8
    assert queries * row_bytes <= module.max_pending_bytes() <= max(free // 16 // ranks, 512 << 20)


def test_targets_are_computed_beside_the_loop_that_feeds_the_device(run, data, monkeypatch):
    threads = []

    def watched(*arrays):
        threads.append(threading.current_thread())
        return stored_target(*arrays)

    monkeypatch.setattr(module, "stored_target", watched)
    config = TargetsConfig(patched=1.0, batch_size=16, overwrite=True)
    build_targets(run, open_images(str(data / "ood")), CPU, config)
    assert len(threads) == 2
    assert threading.main_thread() not in threads


@pytest.mark.parametrize(("pairing", "kind"), [("nearest", "cuda"), ("random", "cpu")])
def test_a_bank_that_is_not_searched_stays_in_host_memory(run, data, monkeypatch, pairing, kind):
    devices, bank = [], Index.bank

    def watched(index, device):
        devices.append(device.type)
        return bank(index, device)

    monkeypatch.setattr(Index, "bank", watched)
    config = TargetsConfig(pairing=pairing, patched=0.0, batch_size=16, overwrite=True)
    images = open_images(str(data / "ood"))
    (run / "targets" / "manifest.json").unlink()
    build_targets(run, images, CPU, config)
    wanted = columns_of(run)[1]["nearest"].read()
    (run / "targets" / "manifest.json").unlink()
    with simulated_cuda():
        build_targets(run, images, CUDA, config)
    assert devices == ["cpu", kind]
    np.testing.assert_array_equal(columns_of(run)[1]["nearest"].read(), wanted)


def test_what_the_audit_needs_is_measured_beside_the_targets_or_from_their_files(
    run, data, monkeypatch
):
    """An earlier version measured nothing beside: its images are recovered from the files."""
    monkeypatch.setattr(schedule, "rows_per_shard", lambda *_: 16)
    measure, images = audit.measure_targets, open_images(str(data / "ood"))
    config = TargetsConfig(batch_size=16, patched=0.5, overwrite=True)
    monkeypatch.setattr(module, "measure_targets", None)
    build_targets(run, images, CPU, replace(config, seed=1))
    assert not list((run / "targets").glob("*.intermediate"))
    beside = (run / "targets" / "audit.npz").read_bytes()
    monkeypatch.setattr(module, "measure_targets", measure)
    monkeypatch.setattr(module, "write_intermediate", lambda *_: None)
    (run / "targets" / "manifest.json").unlink()
    build_targets(run, images, CPU, replace(config, seed=1))
    assert (run / "targets" / "audit.npz").read_bytes() == beside


def test_names_of_patched_images_are_looked_up_only_when_asked_for(finished_run):
    asked = []

    class Names(list[str]):
        def __getitem__(self, row):
            asked.append(row)
            return super().__getitem__(row)

    images = replace(from_array(np.zeros((3, 16, 16, 3), np.uint8)), names=Names("abc"))
    plan = PastePlan(np.arange(4), np.array([2, 0, 1, 2]), seed=0)
    columns = open_index(finished_run).columns
    pasted = pasted_images(images, columns["images"], plan, Transform(16), 8)
    assert (len(pasted), asked) == (4, [])
    assert list(pasted.names) == ["c", "a", "b", "c"]


def build_patched(run, images, **options) -> dict[str, np.ndarray]:
    """Build targets with patched images anew and return the columns of those alone."""
    config = TargetsConfig(**{"patched": 1.5, "batch_size": 16, **options}, overwrite=True)
    build_targets(run, images, CPU, config)
    columns = {name: rows.read() for name, rows in columns_of(run)[1].items()}
    return {name: column[columns["patched"] == 1] for name, column in columns.items()}


def test_patched_images_are_id_images_with_a_square_of_their_ood_image(data, classifier, run):
    columns = build_patched(run, open_images(str(data / "ood")), patch_shapes="squares")
    nearest = columns_of(run)[0].columns["images"].take(columns["nearest"])
    pixels = ood_pixels(data, columns["row"], classifier.config.transform)
    assert len(pixels) == 75
    sides = set()
    for heatmap, id_image, ood_image in zip(columns["heatmap"], nearest, pixels, strict=True):
        changed = np.flatnonzero(heatmap.any(axis=(0, 2))), np.flatnonzero(heatmap.any(axis=(0, 1)))
        (top, bottom), (left, right) = ((places[0], places[-1] + 1) for places in changed)
        sides.add(max(bottom - top, right - left))
        middle = ((top + bottom) // 2, (left + right) // 2)
        # in the middle of the square the image is the OOD image's, wherever it was cut out
        value = (id_image - heatmap)[:, middle[0], middle[1]]
        assert (ood_image == value[:, None, None]).all(axis=0).any()
    assert sides <= {4, 6, 8, 10}
    assert len(sides) > 2


@pytest.mark.parametrize("patch_shapes", ["mixed", "squares"])
def test_presence_is_how_much_of_the_ood_image_is_seen(data, run, patch_shapes):
    images = open_images(str(data / "ood"))
    columns = build_patched(run, images, patch_shapes=patch_shapes)
    kinds = SQUARES if patch_shapes == "squares" else MIXED
    for number, (presence, heatmap) in enumerate(
        zip(columns["presence"], columns["heatmap"], strict=True)
    ):
        opacity = draw_patch(16, 0, number, kinds).presence(16)
        np.testing.assert_array_equal(presence, np.rint(255 * opacity))
        # nothing else has changed, and the change is the opacity of a difference of at most 255
        assert not heatmap[:, presence == 0].any()
        assert (np.abs(heatmap).max(axis=0) <= np.rint(255 * opacity)).all()
    assert (columns["presence"].max(axis=(1, 2)) > 0).all()
    everything = columns_of(run)[1]
    is_ood = everything["patched"].read() == 0
    assert (everything["presence"].read()[is_ood] == 255).all()


def test_presence_of_a_smaller_heatmap_is_the_average_of_an_area(run):
    plan = draw_paste_plan(20, 50, np.arange(30), seed=1)
    for number in (3, 0, 19):
        presence = plan.presence(number, 32, 8)
        opacity = draw_patch(32, 1, number).presence(32).astype(np.float64)
        wanted = 255 * opacity.reshape(8, 4, 8, 4).mean(axis=(1, 3))
        np.testing.assert_allclose(presence, wanted, atol=0.501)


def test_patched_images_are_embedded_like_any_other(data, classifier, run):
    columns = build_patched(run, open_images(str(data / "ood")))
    index = columns_of(run)[0]
    images = index.columns["images"].take(columns["nearest"]) - columns["heatmap"]
    output = classifier(torch.from_numpy(images.astype(np.uint8)))
    np.testing.assert_allclose(columns["features"], output.features, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(columns["prediction"], output.logits.argmax(dim=1))
    for number, maps in enumerate(output.maps, start=1):
        np.testing.assert_allclose(columns[f"feature_maps_{number}"], maps, rtol=1e-2, atol=1e-2)
    original = index.columns["features"].take(columns["nearest"]).astype(np.float64)
    distance = np.sqrt(((columns["features"] - original) ** 2).sum(axis=1))
    np.testing.assert_allclose(columns["distance"], distance, rtol=1e-6)


def test_every_ood_and_id_image_is_used_as_often_as_any_other(data, run):
    columns = build_patched(run, open_images(str(data / "ood")), patched=3.2)
    assert len(columns["row"]) == 160
    assert set(np.bincount(columns["row"]).tolist()) == {3, 4}
    assert set(np.bincount(columns["nearest"]).tolist()) == {2}


def test_patched_images_leave_the_pairs_as_they_are_and_do_not_depend_on_the_batch(data, run):
    before = {name: rows.read() for name, rows in columns_of(run)[1].items()}
    images = open_images(str(data / "ood"))
    first, second = (build_patched(run, images, batch_size=size) for size in (7, 64))
    for name in ("row", "nearest", "heatmap", "prediction"):
        np.testing.assert_array_equal(first[name], second[name])
        after = columns_of(run)[1][name].read()
        np.testing.assert_array_equal(after[: len(before[name])], before[name])
    manifest = open_targets(run, open_index(run)).manifest
    assert (manifest.results["num_images"], manifest.results["num_patched"]) == (50, 75)


def test_a_lost_shard_of_patched_images_is_made_again_byte_for_byte(data, run, monkeypatch, tree):
    monkeypatch.setattr(module, "bytes_per_row", lambda _: 1_000_000 // 32)
    images = open_images(str(data / "ood"))
    build_patched(run, images, shard_mb=1)
    folder = run / "targets"
    before = tree(folder)
    assert len(before) == len(["manifest", "audit"]) + 2 + 3
    for name in ("manifest.json", "targets-patched-00001.h5", "targets-00001.h5"):
        (folder / name).unlink()
    build_patched(run, images, shard_mb=1)
    assert tree(folder) == before


def test_an_image_that_cannot_be_read_is_in_no_patched_image(data, run, tmp_path):
    import shutil

    folder = shutil.copytree(data / "ood", tmp_path / "ood")
    (folder / "007.png").write_bytes(b"broken")
    columns = build_patched(run, open_images(str(folder)), skip_unreadable=True, patched=2.0)
    assert len(columns["row"]) == 98
    assert 7 not in columns["row"]
    shutil.rmtree(run / "decoder")
    assert verify(run)[3] == "targets: 98 of 98 pasted again, all equal"


def test_smaller_targets_are_area_averages_of_the_difference(data, classifier, run):
    images, exact = open_images(str(data / "ood")), TargetsConfig(patched=0.5, batch_size=16)
    averaged, stored = replace(exact, heatmap_size=8), []
    for config in (exact, averaged):
        build_targets(run, images, CPU, replace(config, overwrite=True))
        targets = open_targets(run, open_index(run))
        stored.append({name: rows.read() for name, rows in targets.columns.items()})
    full, small = (columns.pop("heatmap") for columns in stored)
    opacity, averages = (columns.pop("presence").astype(np.float64) for columns in stored)
    wanted = opacity.reshape(75, 8, 2, 8, 2).mean(axis=(2, 4))
    # the opacity is rounded as well
    np.testing.assert_allclose(averages, wanted, rtol=0, atol=1)
    for name, column in stored[0].items():
        np.testing.assert_array_equal(column, stored[1][name], err_msg=name)
    assert small.shape == (75, 2, 3, 8, 8)
    blocks = full.reshape(75, 3, 8, 2, 8, 2).astype(np.float64) / 255
    for signed, values in ((True, blocks), (False, np.abs(blocks))):
        target = target_heatmap(torch.from_numpy(small), signed=signed)
        # each of two parts is rounded to a level of 255
        np.testing.assert_allclose(target, values.mean(axis=(3, 5)), rtol=0, atol=1.01 / 255)
    assert (targets.heatmap_size, targets.is_averaged) == (8, True)
    options = targets.manifest.inputs["options"]
    assert options["heatmap_size"] == 8
    assert build_targets(run, images, CPU, averaged).fingerprint == targets.manifest.fingerprint
    with pytest.raises(StaleCacheError, match=r"options.heatmap_size \(8, now none\)"):
        build_targets(run, images, CPU, exact)


@pytest.mark.parametrize("asked", [None, 16])
def test_targets_of_the_images_own_size_are_exact_by_default(run, data, asked):
    config = TargetsConfig(patched=0.0, batch_size=16, heatmap_size=asked)
    before = open_targets(run, open_index(run)).manifest
    # already complete
    assert build_targets(run, open_images(str(data / "ood")), CPU, config) == before
    assert before.inputs["options"]["heatmap_size"] is None


def test_targets_larger_than_the_images_are_refused(run, data):
    config = TargetsConfig(heatmap_size=17)
    with pytest.raises(UsageError, match=r"--heatmap-size 17 is above the 16 px .* at most 16"):
        build_targets(run, open_images(str(data / "ood")), CPU, config)


def test_shards_of_small_targets_bound_the_images_in_memory(run, data, monkeypatch):
    monkeypatch.setattr(module, "bytes_per_row", lambda _: 100)
    monkeypatch.setattr(schedule, "rows_per_shard", lambda _, size, __: 16 * 768 // size)
    config = TargetsConfig(patched=0.0, batch_size=16, heatmap_size=4, overwrite=True)
    build_targets(run, open_images(str(data / "ood")), CPU, config)
    # 16 images of 3x16x16 values
    assert [len(shard) for shard in columns_of(run)[1]["row"]] == [16, 16, 16, 2]


def test_images_of_smaller_targets_are_measured_again_when_a_shard_is_lost(data, run, tree):
    config = TargetsConfig(patched=0.5, batch_size=16, heatmap_size=8, overwrite=True)
    images = open_images(str(data / "ood"))
    build_targets(run, images, CPU, config)
    before = tree(run / "targets")
    # what the intact shards were measured with is gone by now
    (run / "targets" / "targets-patched-00000.h5").unlink()
    build_targets(run, images, CPU, config)
    assert tree(run / "targets") == before
