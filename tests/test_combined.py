"""The default score: its formula, and the choice of its weight."""

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from sklearn.metrics import roc_auc_score

from ood_heatmap.baselines import gen
from ood_heatmap.classifier import Output
from ood_heatmap.combined import (
    TERMS,
    WEIGHTS,
    Combination,
    CombinedParts,
    CombinedScorer,
    KnnDistance,
    make_bank,
)
from ood_heatmap.distances import Mahalanobis


def scores(count: int, shifts: dict[str, float], seed: int) -> dict[str, np.ndarray]:
    """Return scores by name; distances are positive."""
    generator = np.random.default_rng(seed)
    found = {name: generator.normal(shift, 1, count) for name, shift in shifts.items()}
    return {
        name: (values if name in ("gen", "heatmap") else np.exp(values)).astype(np.float32)
        for name, values in found.items()
    }


def shifts(of_distances: float, learned: float) -> dict[str, float]:
    return {**dict.fromkeys(TERMS[:3], of_distances), "heatmap": learned}


def by_the_formula(held_out, queries, weight):
    total = 0.0
    for name in ("gen", "knn", "mahalanobis_pp", "heatmap"):
        ours, theirs = held_out[name].astype(float), queries[name].astype(float)
        if name in ("knn", "mahalanobis_pp"):
            ours, theirs = np.log(ours), np.log(theirs)
        z = (theirs - ours.mean()) / ours.std()
        total = total + (weight * z if name == "heatmap" else z)
    return total


def test_a_score_is_the_sum_of_standardised_terms():
    held_out, queries = scores(300, shifts(0, 0), 0), scores(50, shifts(1, 2), 1)
    mixtures = scores(200, shifts(1, 1), 2)
    combination = Combination.fit(held_out, mixtures, "heatmap")
    wanted = by_the_formula(held_out, queries, combination.weight)
    np.testing.assert_allclose(combination(queries), wanted, rtol=1e-5, atol=1e-5)
    assert combination.names == (*TERMS[:3], "heatmap")


def test_the_weight_is_the_largest_that_costs_a_point_at_most():
    for learned in (-1.0, -0.3, 0.0, 0.3, 1.0, 3.0):
        held_out, mixtures = scores(400, shifts(0, 0), 3), scores(400, shifts(0.7, learned), 4)
        combination = Combination.fit(held_out, mixtures, "heatmap")
        label = np.repeat([0, 1], 400)
        auroc = [
            roc_auc_score(
                label,
                np.r_[by_the_formula(held_out, held_out, w), by_the_formula(held_out, mixtures, w)],
            )
            for w in WEIGHTS
        ]
        assert combination.mixture_auroc == pytest.approx(auroc, abs=1e-4)
        assert combination.weight == max(
            w for w, found in zip(WEIGHTS, auroc, strict=True) if found >= auroc[0] - 0.01
        )


def test_a_learned_score_that_misses_the_style_of_id_images_counts_for_little():
    held_out = scores(400, shifts(0, 0), 5)
    fooled = Combination.fit(held_out, scores(400, shifts(0.7, -1), 6), "heatmap")
    good = Combination.fit(held_out, scores(400, shifts(0.7, 1), 6), "heatmap")
    assert fooled.weight <= 0.25
    assert good.weight == 4


def test_levels_are_anchored_at_quantiles_of_held_out_images():
    held_out, places = scores(401, shifts(0, 0), 7), scores(401, {"heatmap": -2}, 8)["heatmap"]
    combination = Combination.fit(held_out, scores(200, shifts(1, 1), 2), "heatmap", places)
    total = by_the_formula(held_out, held_out, combination.weight)
    # of 401: half, 95 % and 99 % are below
    for found, values, high in (
        (combination.level, total, 380),
        (combination.local, places.astype(float), 396),
    ):
        median, top = np.sort(values)[[200, high]]
        wanted = 3 * (values - top) / (top - median)
        found_here = found(torch.from_numpy(values)).numpy()
        np.testing.assert_allclose(found_here, wanted, rtol=1e-4, atol=1e-4)


def test_without_a_scale_levels_are_the_values_themselves():
    same = {name: 0 * item + 1 for name, item in scores(40, shifts(0, 0), 7).items()}
    flat = Combination.fit(same, None, "heatmap")
    assert flat.level(torch.tensor([0.0, 2.0])).tolist() == [0, 2]
    assert flat.local(torch.tensor([0.0, 2.0])) is None


def test_without_mixtures_the_weight_is_the_smallest():
    assert Combination.fit(scores(50, shifts(0, 0), 7), None, "heatmap").weight == 0.25


def test_too_few_held_out_images_do_not_choose_the_weight():
    mixtures = scores(200, shifts(0.7, 1), 6)
    weights = [
        Combination.fit(scores(count, shifts(0, 0), 5), mixtures, "heatmap").weight
        for count in (19, 200)
    ]
    assert weights == [0.25, 4]


def test_held_out_images_of_the_training_set_leave_the_other_terms_their_weight():
    """All have the same kNN distance, which float32 does not tell from 0."""
    held_out, queries = scores(50, shifts(0, 0), 14), scores(50, shifts(1, 1), 15)
    held_out["knn"] = np.linspace(0, 1e-4, 50, dtype=np.float32)
    combination = Combination.fit(held_out, None, "heatmap")
    assert np.abs(combination(queries)).max() < 100
    queries["gen"] += 1
    changed = combination(queries)
    queries["gen"] -= 1
    step = 1 / held_out["gen"].astype(float).std()
    np.testing.assert_allclose(changed - combination(queries), step, rtol=1e-4)


def test_equal_scores_but_for_rounding_have_no_scale():
    same = scores(1, shifts(0, 0), 16)
    held_out = {name: np.repeat(values, 30) for name, values in same.items()}
    held_out["gen"] = held_out["gen"] * (1 + np.linspace(0, 3e-7, 30)).astype(np.float32)
    combination = Combination.fit(held_out, None, "heatmap")
    low, high = combination.level(torch.tensor([0.0, 2.0])).tolist()
    assert high - low == pytest.approx(2, abs=1e-4)


def test_a_distance_of_zero_is_not_minus_infinity():
    held_out = scores(50, shifts(0, 0), 8)
    held_out["knn"][0] = 0
    assert np.isfinite(Combination.fit(held_out, held_out, "heatmap")(held_out)).all()


def unit(rows: np.ndarray) -> np.ndarray:
    wide = rows.astype(np.float64)
    return wide / np.linalg.norm(wide, axis=1, keepdims=True)


def kth_distance(queries: np.ndarray, features: np.ndarray, k: int) -> np.ndarray:
    """Return the kNN distance by brute force, in float64 but for the rounding of the bank."""
    bank = make_bank(torch.from_numpy(features)).double().numpy()
    np.testing.assert_allclose(bank, unit(features), rtol=5e-4, atol=1e-7)
    return np.sort(np.linalg.norm(unit(queries)[:, None] - bank, axis=2), axis=1)[:, k - 1]


@pytest.mark.parametrize("k", [1, 3, 50, 200])
# float32 similarities, 1 less half of a squared distance, cannot order the closest
@pytest.mark.parametrize("spread", [1.0, 0.01, 0.002])
def test_the_knn_distance_is_that_of_brute_force(k, spread):
    generator = np.random.default_rng(k)
    features, queries = (
        (1 + spread * generator.normal(size=(count, 64))).astype(np.float32) for count in (50, 30)
    )
    found = KnnDistance(make_bank(torch.from_numpy(features)))(torch.from_numpy(queries), k)
    assert found.dtype == torch.float32
    wanted = kth_distance(queries, features, min(k, 50))
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


@pytest.mark.parametrize("with_layers", [False, True])
def test_the_detectors_score_is_that_of_the_table(with_layers):
    """The same from tensors, after a round trip through a file, as from the scores by name."""
    generator = np.random.default_rng(9)
    features = generator.normal(size=(60, 8)).astype(np.float32)
    maps = generator.normal(size=(60, 5, 3, 3)).astype(np.float16)
    labels = np.arange(60) % 3
    layers = (0,) if with_layers else ()

    def join(rows: np.ndarray, maps: np.ndarray) -> np.ndarray:
        items = rows.astype(float), maps.astype(float).mean(axis=(2, 3))
        unit = [item / np.linalg.norm(item, axis=1, keepdims=True) for item in items]
        return np.concatenate(unit, axis=1).astype(np.float32)

    near = Mahalanobis.fit_unit(features, labels)
    joined = Mahalanobis.fit_unit(join(features, maps), labels)

    def by_name(count: int) -> tuple[Output, dict[str, np.ndarray]]:
        queries = generator.normal(size=(count, 8)).astype(np.float32)
        logits = generator.normal(size=(count, 3)).astype(np.float32)
        other = generator.normal(size=(count, 5, 3, 3)).astype(np.float32)
        scores = {
            "gen": gen(logits),
            "knn": kth_distance(queries, features, 4).astype(np.float32),
            "mahalanobis_pp": near(torch.from_numpy(queries)).float().numpy(),
            "heatmap": generator.normal(size=count).astype(np.float32),
        }
        if with_layers:
            # maps are cached in float16
            rows = torch.from_numpy(join(queries, other.astype(np.float16)))
            scores["mahalanobis_pp_layers"] = joined(rows).float().numpy()
        tensors = (torch.from_numpy(item) for item in (queries, logits, other))
        values, of_logits, of_maps = tensors
        return Output(values, of_logits, (of_maps,)), scores

    _, held_out = by_name(40)
    _, mixtures = by_name(30)
    places = generator.normal(size=40).astype(np.float32)
    combination = Combination.fit(held_out, mixtures, "heatmap", places)
    parts = CombinedParts(combination, 4, near, layers, joined if with_layers else None)
    tensors, metadata = parts.to_tensors()
    again = load(save(tensors, metadata))
    restored = CombinedParts.from_tensors(again, metadata)
    for name, item in restored.to_tensors()[0].items():
        assert torch.equal(item, tensors[name])
    scorer = CombinedScorer(restored, make_bank(torch.from_numpy(features)))
    output, scores = by_name(20)
    found = scorer(output, torch.from_numpy(scores["heatmap"])).numpy()
    np.testing.assert_allclose(found, combination(scores), rtol=1e-5, atol=1e-5)


def test_a_missing_tensor_is_named():
    generator = np.random.default_rng(10)
    features = generator.normal(size=(20, 4)).astype(np.float32)
    combination = Combination.fit(scores(50, shifts(0, 0), 11), None, "heatmap")
    parts = CombinedParts(combination, 2, Mahalanobis.fit_unit(features, np.arange(20) % 2))
    tensors, metadata = parts.to_tensors()
    del tensors["features.whiten"]
    with pytest.raises(KeyError, match="whiten"):
        CombinedParts.from_tensors(tensors, metadata)
