"""Mahalanobis distances and the sum of three equal their literal formulas in float64."""

import numpy as np
import pytest
import torch
from sklearn.covariance import ledoit_wolf

from ood_heatmap.distances import Mahalanobis, Standardization, three_terms

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


def distance_of(mahalanobis, queries):
    return mahalanobis(torch.from_numpy(queries)).numpy()


def close(found, wanted, tolerance=2e-4):
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance)


def test_mahalanobis_is_the_smallest_distance_to_a_class_mean():
    features, labels, queries = draw()
    means, centred = less_class_means(features.astype(np.float64), labels)
    wanted = smallest(queries, means, sum(np.outer(row, row) for row in centred) / len(features))
    close(distance_of(Mahalanobis.fit(features, labels), queries), wanted)


def test_mahalanobis_leaves_out_directions_in_which_no_id_image_varies():
    features, labels, queries = draw()

    def with_dead_ones(features):
        return np.concatenate([features, np.zeros_like(features), features], axis=1)

    dead = Mahalanobis.fit(with_dead_ones(features), labels)
    alive = distance_of(Mahalanobis.fit(features, labels), queries)
    close(distance_of(dead, with_dead_ones(queries)), alive)


@pytest.mark.parametrize("fit", [Mahalanobis.fit, Mahalanobis.fit_unit])
def test_the_classes_that_are_there_count(fit):
    features, labels, queries = draw()
    two = labels % 2
    # 0 and 3: nobody in 1 and 2
    found, wanted = (distance_of(fit(features, item), queries) for item in (two * 3, two))
    close(found, wanted)


# more images than are taken at once; fewer images than features
@pytest.mark.parametrize(("num_features", "count"), [(12, 300), (12, 2500), (300, 60)])
def test_mahalanobis_pp_is_that_of_unit_length_features_with_ledoit_wolf(num_features, count):
    features, labels, queries = draw(num_features, count)
    means, centred = less_class_means(unit(features), labels)
    covariance, shrinkage = ledoit_wolf(centred, assume_centered=True)
    assert 0 < shrinkage < 1
    score = Mahalanobis.fit_unit(features, labels)
    found = distance_of(score, queries)
    close(found, smallest(unit(queries), means, covariance))
    close(distance_of(score, 7 * queries), found, 1e-6)


# the mean of three copies is rounded
@pytest.mark.parametrize("copies", [1, 3])
def test_mahalanobis_pp_of_one_image_per_class_is_the_euclidean_distance(copies):
    features, _, queries = draw(count=5)
    distance = ((unit(queries)[:, None] - unit(features)) ** 2).sum(axis=2).min(axis=1)
    fitted = Mahalanobis.fit_unit(np.tile(features, (copies, 1)), np.tile(np.arange(5), copies))
    close(distance_of(fitted, queries), distance)


def three_scores(num_held_out=100):
    """Return the maximum logit, a distance and a squared one of held-out images and of queries."""
    generator = np.random.default_rng(1)
    logit = generator.normal(size=140)
    distance, squared = generator.gamma(2, 0.1, 140), generator.gamma(3, 2, 140)
    columns = [item.astype(np.float32) for item in (-logit, distance, squared)]
    return [item[:num_held_out] for item in columns], [item[num_held_out:] for item in columns]


def test_the_sum_of_three_is_its_formula():
    """Minus maximum logit, log cosine distance, log Mahalanobis++, each standardised on ID."""
    held_out, queries = three_scores()

    def terms(max_logit, distance, squared):
        cosine = distance.astype(np.float64) ** 2 / 2
        return np.array([max_logit, np.log(cosine), np.log(squared.astype(np.float64))])

    mean, std = terms(*held_out).mean(axis=1), terms(*held_out).std(axis=1)
    wanted = ((terms(*queries) - mean[:, None]) / std[:, None]).sum(axis=0)
    standardization = Standardization.fit(three_terms(*held_out))
    found = standardization(three_terms(*queries)).sum(axis=1)
    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-12)


def test_each_term_has_mean_0_and_std_1_on_held_out_images():
    terms = three_terms(*three_scores()[0])
    standardised = Standardization.fit(terms)(terms)
    np.testing.assert_allclose(standardised.mean(axis=0), 0, atol=1e-9)
    np.testing.assert_allclose(standardised.std(axis=0), 1, atol=1e-9)


def test_a_term_that_is_equal_for_all_but_for_rounding_is_divided_by_1():
    """The kNN distance of held-out images that are all in the training set, for one."""
    terms = np.log(np.full((7, 1), 1e-3)) + np.linspace(0, 1e-8, 7)[:, None]
    assert terms.std() > 0
    others = np.log(np.array([[0.01], [0.5]]))
    np.testing.assert_allclose(Standardization.fit(terms)(others), others - terms.mean())


def test_the_sum_of_copies_of_one_image_is_finite():
    held_out, queries = three_scores(num_held_out=1)
    standardization = Standardization.fit(three_terms(held_out[0], 0 * held_out[1], held_out[2]))
    assert np.isfinite(standardization(three_terms(queries[0], 0 * queries[1], queries[2]))).all()
