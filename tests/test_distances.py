"""Mahalanobis distances and the sum of three equal their literal formulas in float64."""

import numpy as np
import pytest
from safetensors.torch import load, save
from sklearn.covariance import ledoit_wolf

from ood_heatmap.distances import Mahalanobis, SumOfThree

NUM_CLASSES = 4


def draw(num_features=12, count=300):
    """Return ID features, their classes, and queries, of which some are ID and some are not."""
    generator = np.random.default_rng(0)
    centres = generator.gamma(2, 1, (NUM_CLASSES, num_features))
    labels = generator.integers(NUM_CLASSES, size=count)
    features = centres[labels] + 0.5 * generator.normal(size=(count, num_features))
    queries = [
        centres[generator.integers(NUM_CLASSES, size=20)]
        + generator.normal(size=(20, num_features)),
        generator.gamma(2, 1, (20, num_features)),
    ]
    return features.astype(np.float32), labels, np.concatenate(queries).astype(np.float32)


def unit(rows):
    wide = rows.astype(np.float64)
    return wide / np.sqrt((wide**2).sum(axis=1))[:, None]


def less_class_means(features, labels):
    """Return the class means, and each row less its own."""
    means = np.stack([features[labels == label].mean(axis=0) for label in np.unique(labels)])
    return means, features - means[np.unique(labels, return_inverse=True)[1]]


def smallest(queries, means, covariance):
    inverse = np.linalg.inv(covariance)
    return [min((query - mean) @ inverse @ (query - mean) for mean in means) for query in queries]


def close(found, wanted, tolerance=2e-4):
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance)


def test_mahalanobis_is_the_smallest_distance_to_a_class_mean():
    features, labels, queries = draw()
    means, centred = less_class_means(features.astype(np.float64), labels)
    wanted = smallest(queries, means, sum(np.outer(row, row) for row in centred) / len(features))
    close(Mahalanobis.fit(features, labels)(queries), wanted)


def test_mahalanobis_leaves_out_directions_in_which_no_id_image_varies():
    features, labels, queries = draw()

    def with_dead_ones(features):
        return np.concatenate([features, np.zeros_like(features), features], axis=1)

    dead = Mahalanobis.fit(with_dead_ones(features), labels)
    close(dead(with_dead_ones(queries)), Mahalanobis.fit(features, labels)(queries))


@pytest.mark.parametrize("fit", [Mahalanobis.fit, Mahalanobis.fit_unit])
def test_the_classes_that_are_there_count(fit):
    features, labels, queries = draw()
    two = labels % 2
    # 0 and 3: nobody in 1 and 2
    close(fit(features, two * 3)(queries), fit(features, two)(queries))


# more images than are taken at once; fewer images than features
@pytest.mark.parametrize(("num_features", "count"), [(12, 300), (12, 2500), (300, 60)])
def test_mahalanobis_pp_is_that_of_unit_length_features_with_ledoit_wolf(num_features, count):
    features, labels, queries = draw(num_features, count)
    means, centred = less_class_means(unit(features), labels)
    covariance, shrinkage = ledoit_wolf(centred, assume_centered=True)
    assert 0 < shrinkage < 1
    score = Mahalanobis.fit_unit(features, labels)
    close(score(queries), smallest(unit(queries), means, covariance))
    close(score(7 * queries), score(queries), 1e-6)


def test_mahalanobis_pp_of_one_image_per_class_is_the_euclidean_distance():
    features, _, queries = draw(count=5)
    distance = ((unit(queries)[:, None] - unit(features)) ** 2).sum(axis=2).min(axis=1)
    close(Mahalanobis.fit_unit(features, np.arange(5))(queries), distance)


def k_smallest_cosine_distance(queries, bank, k):
    return np.sort(1 - unit(queries) @ unit(bank).T, axis=1)[:, k - 1]


@pytest.fixture
def fitted():
    """Return the sum fitted on 100 held-out images, its arguments, and the arguments of queries."""
    features, labels, queries = draw()
    held_out, features, labels = features[:100], features[100:], labels[100:]
    weight = np.random.default_rng(1).normal(size=(12, NUM_CLASSES)).astype(np.float32)

    def arguments(rows, k=3):
        distance = np.sqrt(2 * k_smallest_cosine_distance(rows, features, k))
        return rows, rows @ weight, distance.astype(np.float32)

    mahalanobis = Mahalanobis.fit_unit(features, labels)
    features_out, logits, distance = arguments(held_out)
    score = SumOfThree.fit(mahalanobis, features_out, logits, distance, neighbours=3)
    return score, (features_out, logits, distance), arguments(queries)


def test_the_sum_is_its_formula(fitted):
    """Minus maximum logit, log cosine distance, log Mahalanobis++, each standardised on ID."""
    score, held_out, queries = fitted

    def terms(features, logits, distance):
        squared = score.mahalanobis(features).astype(np.float64)
        return np.array([-logits.max(axis=1), np.log(distance**2 / 2), np.log(squared)])

    mean, std = terms(*held_out).mean(axis=1), terms(*held_out).std(axis=1)
    wanted = ((terms(*queries) - mean[:, None]) / std[:, None]).sum(axis=0)
    close(score(*queries), wanted)
    assert (score(*queries)[20:].mean() > score(*held_out)).mean() > 0.99


def test_each_term_has_mean_0_and_std_1_on_held_out_images(fitted):
    score, held_out, _ = fitted
    terms = score.terms(*held_out)
    np.testing.assert_allclose(terms.mean(axis=0), 0, atol=1e-9)
    np.testing.assert_allclose(terms.std(axis=0), 1, atol=1e-9)


def test_the_sum_comes_out_of_a_safetensors_file_exactly(fitted):
    score, _, queries = fitted
    tensors = load(save(score.to_tensors()))
    again = SumOfThree.from_tensors(tensors)
    assert again.neighbours == score.neighbours
    np.testing.assert_array_equal(again(*queries), score(*queries))
    with pytest.raises(KeyError, match="whiten"):
        SumOfThree.from_tensors({k: v for k, v in tensors.items() if not k.endswith("whiten")})


def test_the_sum_of_copies_of_one_image_is_finite(fitted):
    score, (features, logits, distance), _ = fitted
    one = SumOfThree.fit(score.mahalanobis, features[:1], logits[:1], 0 * distance[:1], 3)
    assert np.isfinite(one(features, logits, 0 * distance)).all()
