"""Every baseline equals its literal formula in float64, and larger is more OOD."""

import pickle

import numpy as np
import pytest
import torch
from torch import nn

from ood_heatmap import baselines
from ood_heatmap.cache.neighbours import k_nearest, unit_length

NUM_FEATURES, NUM_CLASSES = 12, 4


@pytest.fixture
def drawn():
    """Return non-negative ID features, their classes, queries, auxiliary OOD features, a head."""
    generator = np.random.default_rng(0)
    centres = generator.gamma(2, 1, (NUM_CLASSES, NUM_FEATURES))
    labels = generator.integers(NUM_CLASSES, size=300)

    def features(count, classes, noise):
        drawn = centres[classes] + noise * generator.normal(size=(count, NUM_FEATURES))
        return np.maximum(drawn, 0).astype(np.float32)

    torch.manual_seed(0)
    head = nn.Linear(NUM_FEATURES, NUM_CLASSES).requires_grad_(False)
    head.weight.mul_(3)
    return {
        "features": features(300, labels, 0.5),
        "labels": labels,
        "queries": features(40, generator.integers(NUM_CLASSES, size=40), 0.8),
        "auxiliary": generator.gamma(2, 1, (100, NUM_FEATURES)).astype(np.float32),
        "head": head,
    }


def head_of(head):
    return head.weight.numpy().astype(np.float64), head.bias.numpy().astype(np.float64)


def free_energy(logits):
    return -np.log(np.exp(logits).sum(axis=1))


def close(found, wanted, tolerance=2e-4):
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance)


def test_logits_give_msp_max_logit_and_energy():
    logits = np.random.default_rng(0).normal(0, 3, (20, 5)).astype(np.float32)
    powers = np.exp(logits.astype(np.float64))
    close(baselines.maximum_softmax(logits), 1 - powers.max(axis=1) / powers.sum(axis=1))
    close(baselines.maximum_logit(logits), -logits.max(axis=1))
    close(baselines.energy(logits), free_energy(logits.astype(np.float64)))


def test_confident_images_keep_their_order():
    logits = np.array([[30, 0], [35, 0], [40, 0]], dtype=np.float32)
    assert (np.diff(baselines.maximum_softmax(logits)) < 0).all()


def test_vim_is_the_virtual_logit_less_the_energy(drawn):
    features, queries = (drawn[name].astype(np.float64) for name in ("features", "queries"))
    weight, bias = head_of(drawn["head"])
    origin = -np.linalg.pinv(weight) @ bias
    values, vectors = np.linalg.eigh((features - origin).T @ (features - origin))
    residual = vectors[:, np.argsort(values)[: NUM_FEATURES - NUM_FEATURES // 2]]

    def length(rows):
        return np.linalg.norm((rows - origin) @ residual, axis=1)

    alpha = (features @ weight.T + bias).max(axis=1).mean() / length(features).mean()
    wanted = alpha * length(queries) + free_energy(queries @ weight.T + bias)
    # pytorch-ood has the eigenvectors in float32, which knows them to some 1e-4
    found = baselines.vim(drawn["features"], drawn["head"])(drawn["queries"])
    close(found, wanted, tolerance=2e-3)


def test_react_is_the_energy_of_clipped_features(drawn):
    weight, bias = head_of(drawn["head"])
    limit = np.percentile(drawn["features"], 90)
    clipped = np.minimum(drawn["queries"].astype(np.float64), limit)
    assert (clipped < drawn["queries"]).any()
    wanted = free_energy(clipped @ weight.T + bias)
    close(baselines.react(drawn["features"], drawn["head"])(drawn["queries"]), wanted)


def test_ash_is_the_energy_of_pruned_and_sharpened_features(drawn):
    weight, bias = head_of(drawn["head"])
    wanted = []
    for query in drawn["queries"].astype(np.float64):
        kept = np.sort(query)[round(NUM_FEATURES * 0.65) :].min()
        pruned = np.where(query >= kept, query, 0)
        sharpened = pruned * np.exp(query.sum() / pruned.sum())
        wanted.append(free_energy((sharpened @ weight.T + bias)[None])[0])
    close(baselines.ash(drawn["head"])(drawn["queries"]), wanted)


def test_ash_stays_finite_on_features_of_zero_and_below(drawn):
    _, bias = head_of(drawn["head"])
    zero = np.zeros((1, NUM_FEATURES), np.float32)
    close(baselines.ash(drawn["head"])(zero), free_energy(bias[None]))
    below = np.full((1, NUM_FEATURES), -1e-6, np.float32)
    below[0, :4], below[0, 4] = 1e-6, 300  # its sum is far above what is kept
    below[0, 5:] = -299
    assert np.isfinite(baselines.ash(drawn["head"])(below)).all()


def test_a_head_without_a_bias_is_one_of_zeros(drawn):
    without = nn.Linear(NUM_FEATURES, NUM_CLASSES, bias=False).requires_grad_(False)
    zeros = nn.Linear(NUM_FEATURES, NUM_CLASSES).requires_grad_(False)
    zeros.weight.copy_(without.weight)
    zeros.bias.zero_()
    for make in (baselines.vim, baselines.react, lambda _, head: baselines.ash(head)):
        scores = [make(drawn["features"], head)(drawn["queries"]) for head in (without, zeros)]
        close(*scores)


def standardised(drawn):
    both = np.concatenate([drawn["features"], drawn["auxiliary"]]).astype(np.float64)
    mean, deviation = both.mean(axis=0), both.std(axis=0)
    is_ood = np.repeat([0, 1], [len(drawn["features"]), len(drawn["auxiliary"])])
    return (both - mean) / deviation, is_ood, (drawn["queries"] - mean) / deviation


def test_logistic_regression_is_at_the_minimum_of_its_loss(drawn):
    """There the gradient is 0: the weights are the sum of residual times input.

    It stops where no component of the mean gradient exceeds 1e-4, scikit-learn's tolerance.
    """
    inputs, is_ood, queries = standardised(drawn)
    score = baselines.logistic_regression(drawn["features"], drawn["auxiliary"])
    both = np.concatenate([drawn["features"], drawn["auxiliary"]])
    residual = is_ood - 1 / (1 + np.exp(-score(both).astype(np.float64)))
    gradient = 1e-4 * len(inputs)
    assert abs(residual.sum()) < gradient
    found, weights = score(drawn["queries"]), residual @ inputs
    error = np.abs(found - found[0] - (queries - queries[0]) @ weights)
    assert (error <= gradient * np.abs(queries - queries[0]).sum(axis=1) + 1e-3).all()


def test_the_mlp_gives_the_log_odds_of_its_probabilities(drawn, monkeypatch):
    fitted = []
    fit = baselines._fit_quietly
    monkeypatch.setattr(
        baselines, "_fit_quietly", lambda model, *data: (fitted.append(model), fit(model, *data))
    )
    score = baselines._small_mlp(drawn["features"], drawn["auxiliary"], seed=0)
    probability = fitted[0].predict_proba(drawn["queries"])[:, 1].astype(np.float64)
    np.testing.assert_allclose(1 / (1 + np.exp(-score(drawn["queries"]))), probability, rtol=1e-4)


def test_the_mlp_is_the_same_for_the_same_seed_alone(drawn):
    first, again, other = (
        baselines._small_mlp(drawn["features"], drawn["auxiliary"], seed)(drawn["queries"])
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_every_method_scores_clear_ood_higher(drawn):
    far = np.random.default_rng(1).gamma(2, 1, (40, NUM_FEATURES)).astype(np.float32) * 2
    features, auxiliary = (drawn[name] for name in ("features", "auxiliary"))
    for score in (
        baselines.logistic_regression(features, auxiliary),
        baselines._small_mlp(features, auxiliary, 0),
    ):
        assert np.median(score(far)) > np.median(score(features))


def test_fitted_methods_come_out_of_a_pickle_the_same(drawn):
    """Rank 0 fits them and sends them to the other ranks."""
    data = baselines.FitData(
        drawn["features"], drawn["labels"], drawn["auxiliary"], drawn["head"], seed=0
    )
    logits = drawn["head"](torch.from_numpy(drawn["queries"])).numpy()
    inputs = baselines.ScoreInputs(drawn["queries"], logits, logits[:, 0])
    fitted = baselines.fit_methods(data)
    assert list(fitted) == [method.name for method in baselines.METHODS]
    content = pickle.dumps(fitted)
    # what is sent does not grow with the images that were fitted on
    assert len(content) < 100_000
    for name, score in pickle.loads(content).items():
        np.testing.assert_array_equal(score(inputs), fitted[name](inputs))


@pytest.mark.parametrize(
    ("sizes", "k"),
    [
        ([5000] * 10, 50),
        ([500] * 100, 50),
        ([0, 100, 100], 25),
        ([20] * 10, 5),
        ([3] * 10, 1),
        ([1, *([100] * 99)], 25),
        ([8, 1000], 26),
    ],
)
def test_k_is_a_quarter_of_a_small_class(sizes, k):
    """Never above 50; a rare class or an empty one does not lower it."""
    assert baselines.choose_neighbours(sizes) == k


def test_k_from_the_class_sizes_tells_ood_where_a_fixed_one_does_not():
    """Sixteen images a class: the 50th neighbour of an ID image is of another class."""
    generator = np.random.default_rng(0)

    def normal(*shape):
        return generator.normal(size=shape).astype(np.float32)

    centres = normal(8, 16) * 3
    bank, test = (
        unit_length(centres[np.arange(8).repeat(count)] + normal(8 * count, 16))
        for count in (16, 20)
    )
    ood = unit_length(normal(160, 16) * 3)

    def auroc(k):
        ids, oods = (k_nearest(rows, bank, k)[0][:, -1] for rows in (test, ood))
        return (oods[:, None] > ids).mean()

    assert baselines.choose_neighbours([16] * 8) == 4
    assert auroc(4) > 0.95
    assert auroc(50) < 0.8
