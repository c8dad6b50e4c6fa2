"""The figures equal independent formulas, with ties and on tiny sets."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ood_heatmap.metrics import (
    METRICS,
    RankedScores,
    bootstrap_weights,
    detection_metrics,
    interval,
    weighted_metrics,
)

tied_scores = st.lists(st.integers(-3, 3), min_size=1, max_size=25).map(
    lambda values: np.array(values, dtype=np.float32)
)


def by_definition(id_scores, ood_scores):
    """Count pairs and thresholds one by one."""
    ids, oods = id_scores.astype(float), ood_scores.astype(float)
    thresholds = sorted(set(ids) | set(oods))
    pairs = [(ood > one) + 0.5 * (ood == one) for ood in oods for one in ids]

    def average_precision(positive, negative, levels):
        total, before = 0.0, 0.0
        for level in levels:
            found, wrong = np.sum(positive >= level), np.sum(negative >= level)
            recall = found / len(positive)
            total += (recall - before) * found / (found + wrong)
            before = recall
        return total

    def fpr(positive, negative, levels):
        for level in levels:  # the strictest threshold that keeps 95 % of the positives
            if np.sum(positive >= level) >= 0.95 * len(positive) - 1e-9:
                return np.mean(negative >= level)
        raise AssertionError

    down = thresholds[::-1]
    return {
        "auroc": np.mean(pairs),
        "aupr_out": average_precision(oods, ids, down),
        "aupr_in": average_precision(-ids, -oods, [-level for level in thresholds]),
        "fpr95_ood_pos": fpr(oods, ids, down),
        "fpr95_id_pos": fpr(-ids, -oods, [-level for level in thresholds]),
    }


@given(tied_scores, tied_scores)
@settings(max_examples=200, deadline=None)
def test_every_figure_equals_its_definition(id_scores, ood_scores):
    found = detection_metrics(id_scores, ood_scores)
    for key, value in by_definition(id_scores, ood_scores).items():
        assert getattr(found, key) == pytest.approx(value, abs=1e-12), key


@given(tied_scores, st.lists(tied_scores, min_size=1, max_size=3), st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_weights_are_repetitions(id_scores, ood_sets, seed):
    generator = np.random.default_rng(seed)
    id_weights, *ood_weights = (
        bootstrap_weights(len(scores), 3, generator) for scores in (id_scores, *ood_sets)
    )
    id_ranked, *ood_ranked = map(RankedScores.rank, (id_scores, *ood_sets))
    found = weighted_metrics(id_ranked, ood_ranked, id_weights, ood_weights)
    assert found.shape == (3, len(ood_sets), len(METRICS))
    for number, row in enumerate(found):
        repeated = np.repeat(id_scores, id_weights[number])
        for of_set, scores, weights in zip(row, ood_sets, ood_weights, strict=True):
            wanted = detection_metrics(repeated, np.repeat(scores, weights[number]))
            for key, value in zip(METRICS, of_set, strict=True):
                assert value == pytest.approx(getattr(wanted, key), abs=1e-12), key


def test_resamples_in_parts_are_those_at_once(monkeypatch):
    generator = np.random.default_rng(0)
    sets = [generator.normal(mean, 1, count).round(1) for mean, count in ((0, 50), (1, 30), (2, 9))]
    weights, *ood_weights = (bootstrap_weights(len(scores), 7, generator) for scores in sets)
    id_scores, *ood_scores = map(RankedScores.rank, sets)
    at_once = weighted_metrics(id_scores, ood_scores, weights, ood_weights)
    # two resamples of 50 + 30 images in 8 bytes each
    monkeypatch.setattr("ood_heatmap.metrics._CHUNK_BYTES", 2 * 8 * 80)
    in_parts = weighted_metrics(id_scores, ood_scores, weights, ood_weights)
    np.testing.assert_array_equal(in_parts, at_once)


def test_counts_of_many_images_do_not_overflow():
    """60,000 ID and 60,000 OOD images are 3.6e9 pairs: more than 32 bits hold."""
    id_scores, ood_scores = np.zeros(60_000), np.ones(60_000)
    weights = np.ones((1, 60_000), np.int32)
    ranked = [RankedScores.rank(scores) for scores in (id_scores, ood_scores)]
    found = weighted_metrics(ranked[0], ranked[1:], weights, [weights])
    assert found[0, 0].tolist() == [1, 1, 1, 0, 0]


def test_the_two_conventions_of_fpr95_differ_and_are_named():
    # 95 % of 20 ID images are accepted up to a score of 19: 3 of 4 OOD images come in as well.
    # All 4 OOD images are flagged from a score of 5 on: so are 16 of 20 ID images.
    found = detection_metrics(np.arange(1.0, 21), np.array([5.0, 6, 7, 99]))
    assert found.fpr95_id_pos == 3 / 4
    assert found.fpr95_ood_pos == 16 / 20


def test_perfect_and_reversed_scores():
    low, high = np.arange(30.0), np.arange(100.0, 140)
    perfect, reversed_ = detection_metrics(low, high), detection_metrics(high, low)
    assert (perfect.auroc, perfect.fpr95_id_pos, perfect.fpr95_ood_pos) == (1, 0, 0)
    assert (reversed_.auroc, reversed_.fpr95_id_pos, reversed_.fpr95_ood_pos) == (0, 1, 1)
    assert perfect.prevalence_ood == 40 / 70


def test_an_empty_set_is_refused():
    with pytest.raises(ValueError, match="both sets need images, got 0 ID, 3 OOD"):
        detection_metrics(np.array([]), np.arange(3.0))


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """Gaussian scores one deviation apart: the true AUROC is Phi(1 / sqrt 2)."""
    truth, covered = 0.7602499, 0
    for seed in range(100):
        generator = np.random.default_rng(seed)
        id_scores, ood_scores = generator.normal(0, 1, 150), generator.normal(1, 1, 100)
        weights = [bootstrap_weights(count, 200, generator) for count in (150, 100)]
        ranked = [RankedScores.rank(scores) for scores in (id_scores, ood_scores)]
        found = weighted_metrics(ranked[0], ranked[1:], weights[0], weights[1:])
        low, high = interval(found[:, 0, METRICS.index("auroc")])
        covered += low <= truth <= high
    assert 88 <= covered <= 100
