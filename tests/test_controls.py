"""The controls minimise the loss that they state, and are the same for the same seed."""

import numpy as np
import pytest
import torch

from ood_heatmap import controls

NUM_CLASSES = 3


def draw(count, shift=0.0, seed=0):
    """Return inputs of different scales, and classes."""
    generator = np.random.default_rng(seed)
    inputs = (generator.normal(size=(count, 6)) + shift) * np.array([1, 10, 0.1, 1, 1, 0]) + 5
    return inputs.astype(np.float32), generator.integers(NUM_CLASSES, size=count)


def standardised(id_inputs, ood_inputs, queries):
    both = np.concatenate([id_inputs, ood_inputs]).astype(np.float64)
    mean, deviation = both.mean(axis=0), both.std(axis=0)
    is_ood = np.repeat([0, 1], [len(id_inputs), len(ood_inputs)])
    return (both - mean) / deviation, is_ood, (queries - mean) / deviation


def test_logistic_regression_is_at_the_minimum_of_its_loss():
    """There the gradient is 0: the weights are the sum of residual times input.

    It stops where no component of the mean gradient exceeds 1e-4, scikit-learn's tolerance.
    """
    (id_inputs, _), (ood_inputs, _), (drawn, _) = draw(300), draw(100, 1.0, 1), draw(40, 0.5, 2)
    id_inputs, ood_inputs, drawn = id_inputs[:, :5], ood_inputs[:, :5], drawn[:, :5]
    inputs, is_ood, queries = standardised(id_inputs, ood_inputs, drawn)
    score = controls.logistic_regression(id_inputs, ood_inputs)
    both = np.concatenate([id_inputs, ood_inputs])
    residual = is_ood - 1 / (1 + np.exp(-score(both).astype(np.float64)))
    gradient = 1e-4 * len(inputs)
    assert abs(residual.sum()) < gradient
    found, weights = score(drawn), residual @ inputs
    error = np.abs(found - found[0] - (queries - queries[0]) @ weights)
    assert (error <= gradient * np.abs(queries - queries[0]).sum(axis=1) + 1e-3).all()


def mlp(id_set, ood_set, noise=0.0, seed=0):
    return controls.mlp(id_set, ood_set, NUM_CLASSES, noise=noise, seed=seed)


def test_the_mlp_gives_the_log_odds_of_balanced_classes(monkeypatch):
    """On inputs that say nothing the odds are even, whatever the number of images of each kind."""
    # the last input alone, which is constant
    (id_inputs, id_classes), (ood_inputs, ood_classes) = draw(2000), draw(200, seed=1)
    score = mlp((id_inputs[:, 5:], id_classes * 0), (ood_inputs[:, 5:], ood_classes * 0))
    assert abs(score(id_inputs[:, 5:], id_classes * 0)).max() < 0.05


def test_the_mlp_uses_the_predicted_class():
    """Nothing else tells these apart: OOD images are all predicted as class 0."""
    (inputs, classes), (ood_inputs, _) = draw(600), draw(600, seed=1)
    kept = classes != 0
    zeros = np.zeros(600, np.int64)
    score = mlp((inputs[kept], classes[kept]), (ood_inputs, zeros))
    queries, _ = draw(100, seed=2)
    assert np.median(score(queries, zeros[:100])) > 2
    assert np.median(score(queries, zeros[:100] + 1)) < -2


def test_the_log_odds_are_those_of_the_trained_network(monkeypatch):
    networks, train = [], controls._train
    monkeypatch.setattr(
        controls,
        "_train",
        lambda network, *rest: networks.append(network) or train(network, *rest),
    )
    id_set, ood_set, (queries, classes) = draw(300), draw(100, 1.0, 1), draw(50, 0.5, 2)
    score = mlp(id_set, ood_set, noise=0.5)
    mean, std = id_set[0].mean(axis=0), id_set[0].std(axis=0)
    scaled = torch.from_numpy((queries - mean) / np.where(std > 0, std, 1))
    wanted = networks[0](scaled, torch.from_numpy(classes)).detach().numpy()
    np.testing.assert_allclose(score(queries, classes), wanted, rtol=1e-3, atol=1e-4)


def test_the_mlp_is_the_same_for_the_same_seed_and_noise_alone():
    id_set, ood_set, queries = draw(300), draw(100, 1.0, 1), draw(50, 0.5, 2)
    state = torch.random.get_rng_state()
    first, again, other, quiet = (
        mlp(id_set, ood_set, noise, seed)(*queries)
        for noise, seed in ((0.5, 0), (0.5, 0), (0.5, 1), (0.0, 0))
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (first != quiet).any()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_small_products_of_the_mlp_use_few_threads(monkeypatch):
    threads, before = [], torch.get_num_threads()
    monkeypatch.setattr(controls, "_train", lambda *_: threads.append(torch.get_num_threads()))
    try:
        torch.set_num_threads(4)
        for width in (6, 1024, 4096):
            pair = np.zeros((2, width), np.float32), np.zeros(2, np.int64)
            controls.mlp(pair, pair, NUM_CLASSES, noise=0, seed=0)
        assert threads == [1, 3, 4]
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_noise_makes_the_mlp_less_certain():
    id_set, ood_set, queries = draw(300), draw(300, 1.0, 1), draw(50, 0.5, 2)
    certain, uncertain = (abs(mlp(id_set, ood_set, noise)(*queries)).mean() for noise in (0, 2))
    assert uncertain < certain / 2


@pytest.mark.parametrize("fit", [controls.logistic_regression, None])
def test_clear_ood_has_a_higher_score(fit):
    id_set, ood_set, far = draw(300), draw(100, 1.0, 1), draw(50, 3.0, 2)
    if fit is None:
        score = mlp(id_set, ood_set, 0.5)
        assert np.median(score(*far)) > np.median(score(*id_set))
    else:
        score = fit(id_set[0], ood_set[0])
        assert np.median(score(far[0])) > np.median(score(id_set[0]))
