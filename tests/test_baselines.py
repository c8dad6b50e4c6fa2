"""Every baseline equals its literal formula in float64, and larger is more OOD."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from pytorch_ood.detector import GEN, fDBD
from sklearn.covariance import ledoit_wolf
from torch import nn

from ood_heatmap import baselines
from ood_heatmap.cache.flat import k_nearest, unit_length

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


def outputs_of(features, logits, maps=()):
    """Return outputs with the spatial mean of each map, and the deviation of the first."""
    means = [item.mean(axis=(2, 3)) for item in maps]
    std = maps[0].std(axis=(2, 3), ddof=1) if maps else features[:, :0]
    return baselines.Outputs(features, logits.argmax(axis=1), means, std)


@pytest.fixture
def data(drawn):
    """Return what all methods are fitted on, with two feature maps, and inputs to score."""
    generator = np.random.default_rng(2)

    def outputs(features):
        logits = drawn["head"](torch.from_numpy(features)).numpy()
        noise = generator.normal(size=(len(features), NUM_FEATURES, 3, 3))
        # the mean of the deepest is the features
        deepest = features[:, :, None, None] + noise - noise.mean(axis=(2, 3), keepdims=True)
        shallow = features[:, :5, None, None] ** 2 + noise[:, :5]
        maps = [item.astype(np.float16).astype(np.float32) for item in (deepest, shallow)]
        return outputs_of(features, logits, maps), logits

    (of_id, _), (of_ood, _), (of_queries, logits) = (
        outputs(drawn[name]) for name in ("features", "auxiliary", "queries")
    )
    fit_data = baselines.FitData(
        of_id, drawn["labels"], of_ood, drawn["head"], [1], noise=0.5, seed=0
    )
    return fit_data, baselines.ScoreInputs(of_queries, logits, logits[:, 0])


def test_scores_of_huge_features_are_finite(data):
    """A squared distance of them is beyond float32."""
    fit_data, inputs = data
    huge = replace(inputs.outputs, features=inputs.outputs.features * np.float32(1e20))
    for name, score in baselines.fit_methods(fit_data).items():
        assert np.isfinite(score(replace(inputs, outputs=huge))).all(), name


def doubled(outputs):
    return baselines.Outputs(
        np.tile(outputs.features, (2, 1)),
        np.tile(outputs.prediction, 2),
        [np.tile(item, (2, 1)) for item in outputs.map_means],
        np.tile(outputs.map_std, (2, 1)),
    )


def test_fitted_methods_come_out_of_a_pickle_the_same(data):
    """Rank 0 fits them and sends them to the other ranks."""
    fit_data, inputs = data
    fitted = baselines.fit_methods(fit_data)
    assert list(fitted) == [method.name for method in baselines.METHODS]
    content = pickle.dumps(fitted)
    twice = replace(fit_data, id=doubled(fit_data.id), labels=np.tile(fit_data.labels, 2))
    # what is sent does not grow with the images that were fitted on
    assert abs(len(pickle.dumps(baselines.fit_methods(twice))) - len(content)) < 1000
    for name, score in pickle.loads(content).items():
        np.testing.assert_array_equal(score(inputs), fitted[name](inputs))


def test_gen_is_the_generalized_entropy_of_the_100_most_probable_classes():
    logits = np.random.default_rng(0).normal(0, 3, (20, 130)).astype(np.float32)
    powers = np.exp(logits.astype(np.float64))
    largest = np.sort(powers / powers.sum(axis=1, keepdims=True), axis=1)[:, -100:]
    close(baselines.gen(logits), (largest**0.1 * (1 - largest) ** 0.1).sum(axis=1), 1e-6)
    few = torch.from_numpy(logits[:, :10])
    # its score is the mean over classes
    close(baselines.gen(logits[:, :10]), 10 * GEN.score(few, gamma=0.1).numpy())


def test_gen_keeps_the_order_of_confident_images():
    logits = np.array([[30, 0, 0], [35, 0, 0], [40, 0, 0]], dtype=np.float32)
    assert (np.diff(baselines.gen(logits)) < 0).all()


def fdbd_of(features, head, queries):
    logits = head(torch.from_numpy(queries)).numpy()
    inputs = baselines.ScoreInputs(outputs_of(queries, logits), logits, logits[:, 0])
    return baselines.fdbd(features, head)(inputs)


def test_fdbd_is_the_mean_distance_to_the_decision_boundaries(drawn):
    weight, bias = head_of(drawn["head"])
    mean, wanted = drawn["features"].mean(axis=0, dtype=np.float64), []
    for query in drawn["queries"].astype(np.float64):
        logits = weight @ query + bias
        top = logits.argmax()
        distances = [
            (logits[top] - logits[other]) / np.linalg.norm(weight[top] - weight[other])
            for other in range(NUM_CLASSES)
            if other != top
        ]
        wanted.append(-np.mean(distances) / np.linalg.norm(query - mean))
    found = fdbd_of(drawn["features"], drawn["head"], drawn["queries"])
    close(found, wanted)
    theirs = fDBD(None, drawn["head"]).fit_features(torch.from_numpy(drawn["features"]))
    close(found, theirs.predict_features(torch.from_numpy(drawn["queries"])).numpy())


def test_fdbd_of_two_classes_with_one_weight_counts_the_boundaries_there_are(drawn):
    head = nn.Linear(NUM_FEATURES, NUM_CLASSES).requires_grad_(False)
    head.weight[1] = head.weight[0]
    assert np.isfinite(fdbd_of(drawn["features"], head, drawn["queries"])).all()


def test_layers_are_the_features_and_the_means_of_the_other_maps(data):
    """Each of unit length; Mahalanobis++ of both side by side."""
    fit_data, inputs = data

    def joined(outputs):
        means = [outputs.features, outputs.map_means[1]]
        return np.concatenate([unit_length(item) for item in means], axis=1)

    score = baselines.fit_methods(fit_data)["mahalanobis_pp_layers"]
    features = joined(fit_data.id).astype(np.float64)
    labels = fit_data.labels
    means = np.stack([features[labels == label].mean(axis=0) for label in range(NUM_CLASSES)])
    inverse = np.linalg.inv(ledoit_wolf(features - means[labels], assume_centered=True)[0])
    difference = joined(inputs.outputs)[:, None] - means
    wanted = np.einsum("qld,de,qle->ql", difference, inverse, difference).min(axis=1)
    close(score(inputs), wanted, tolerance=1e-3)


def test_layers_are_left_out_without_another_map(data):
    """With one map alone, or where the means of all are the features."""
    fit_data, _ = data
    one = replace(fit_data.id, map_means=fit_data.id.map_means[1:])
    for given in (replace(fit_data, id=one, layers=[0]), replace(fit_data, layers=[])):
        assert "mahalanobis_pp_layers" not in baselines.fit_methods(given)


def test_the_mlp_sees_what_the_decoder_sees(data, monkeypatch):
    """Features, deviations of the deepest map, and the predicted class."""
    fit_data, inputs = data
    seen = []
    monkeypatch.setattr(
        baselines,
        "mlp",
        lambda *sets, **more: seen.append((sets, more)) or (lambda rows, classes: (rows, classes)),
    )
    score = baselines.fit_methods(fit_data)["mlp"]
    sets = [fit_data.id, fit_data.ood, inputs.outputs]
    wanted = [(np.concatenate([one.features, one.map_std], axis=1), one.prediction) for one in sets]
    (*fitted, num_classes), more = seen[0]
    for found, expected in zip([*fitted, score(inputs)], wanted, strict=True):
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_array_equal(found[1], expected[1])
    assert (num_classes, more) == (NUM_CLASSES, {"noise": 0.5, "seed": 0})


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
