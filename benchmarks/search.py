"""Search of the nearest ID image of the same predicted class, against the released code."""

from collections.abc import Iterator
from itertools import cycle

import numpy as np
import torch
from harness import Row, Setting, cpu_note, figure, interleaved, quotients
from numpy.typing import NDArray
from sklearn.metrics.pairwise import euclidean_distances

from ood_heatmap.cache.neighbours import Bank, order_by_class

BAR = 20
# a call of so many queries, in many classes, is compared with one of all queries
SMALL_CALL, MANY_CLASSES, BAR_SMALL_CALL = 256, 1000, 3
WIDTH, LATENT = 512, 32
Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]


def rows(setting: Setting) -> Iterator[Row]:
    """Compare at 10, 100 and 1000 classes, on the CPU and on the GPU if there is one."""
    devices = dict.fromkeys((torch.device("cpu"), setting.device))
    for num_classes in (10, 100, MANY_CLASSES):
        for device in devices:
            yield from search(setting, num_classes, device)


def search(setting: Setting, num_classes: int, device: torch.device) -> Iterator[Row]:
    """Compare at one number of classes; at many of them also small calls with one large."""
    num_bank, num_queries = (
        setting.pick(quick=10_000, cpu=50_000),
        setting.pick(quick=2_000, cpu=10_000),
    )
    num_sample = setting.pick(quick=40, cpu=200)
    features, label = clusters(num_classes, num_bank + num_queries)
    bank_label, row = label[:num_bank], np.arange(num_bank)
    order = order_by_class(bank_label, row)
    queries, query_label = features[num_bank:], label[num_bank:]
    parts = (features[:num_bank][order], bank_label[order], row[order])
    bank = Bank(*parts, device=device)
    found = bank.nearest(queries, query_label)
    starts = cycle(range(0, num_queries - num_sample + 1, num_sample))

    def ours() -> int:
        bank.nearest(queries, query_label)
        return num_queries

    def small_calls() -> int:
        for start in range(0, num_queries, SMALL_CALL):
            call = slice(start, start + SMALL_CALL)
            bank.nearest(queries[call], query_label[call])
        return num_queries

    def reference() -> int:
        start = next(starts)
        sample = slice(start, start + num_sample)
        ids = reference_nearest(queries[sample], query_label[sample], by_class)
        np.testing.assert_array_equal(ids, found.row[sample])
        return num_sample

    def build() -> int:
        Bank(*parts, device=device).nearest(queries, query_label)
        return num_queries

    by_class = {
        each: (features[:num_bank][bank_label == each], row[bank_label == each])
        for each in np.unique(bank_label).tolist()
    }
    variants = {"ours": ours, "reference": reference, "build": build}
    if num_classes == MANY_CLASSES:
        variants["small"] = small_calls
    times = interleaved(variants, setting.windows, device)
    whole, built = (float(np.median(times[name].wall)) for name in ("ours", "build"))
    with_build = float(np.median(times["reference"].wall)) / built
    note = (
        f"{num_bank:,} x {WIDTH} bank, {num_queries:,} queries, reference timed on {num_sample} a "
        f"window, their ids equal; {found.num_proven / num_queries:.1%} proven in float32, "
        f"{found.num_scanned} scanned; {cpu_note(times['reference'], times['ours'])}; with "
        f"building the bank once {figure(with_build)} "
        f"(building takes {figure(built / whole - 1)} of the search)"
    )
    name = f"search, {num_classes} classes, on {device.type}"
    ratios = quotients(times["reference"].wall, times["ours"].wall)
    yield Row(f"{name}: reference / ours", ratios, BAR, note)
    if num_classes == MANY_CLASSES:
        name += f": calls of {SMALL_CALL} queries / one call"
        ratios = quotients(times["small"].wall, times["ours"].wall)
        note = f"{num_queries:,} queries; {cpu_note(times['small'], times['ours'])}"
        yield Row(name, ratios, BAR_SMALL_CALL, note, at_most=True)


def clusters(num_classes: int, count: int, width: int = WIDTH) -> tuple[Float32, Int64]:
    """Return features like those after a ReLU, in low-dimensional clusters, and their classes."""
    generator = np.random.default_rng(num_classes)
    centres = generator.normal(0, 1, (num_classes, width)).astype(np.float32)
    mix = generator.normal(0, LATENT**-0.5, (LATENT, width)).astype(np.float32)
    label = generator.integers(num_classes, size=count)
    latent = generator.normal(0, 1, (count, LATENT)).astype(np.float32)
    return np.maximum(centres[label] + latent @ mix, 0), label


def reference_nearest(
    queries: Float32, label: Int64, by_class: dict[int, tuple[Float32, Int64]]
) -> list[int]:
    """Return the nearest row of each query, with a distance call and a full argsort per query.

    The structure is that of the released code, but looking up the rows of a class is not timed.
    """
    nearest = []
    for query, each in zip(queries, label.tolist(), strict=True):
        features, row = by_class[each]
        distance = euclidean_distances(query[None], features)[0]
        nearest.append(int(row[np.argsort(distance)[0]]))
    return nearest
