"""What the methods are fitted on is what the caches hold of the classifier's outputs."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ood_heatmap.baselines import Outputs
from ood_heatmap.classifier import load_classifier
from ood_heatmap.pipeline import fitting
from ood_heatmap.pipeline.config import TrainConfig
from ood_heatmap.pipeline.fitting import fit_data
from ood_heatmap.pipeline.run import open_index, open_targets
from ood_heatmap.projection import fit_projection

CPU = torch.device("cpu")


@pytest.mark.parametrize("num_maps", [0, 1])
def test_the_mlp_is_fitted_on_the_inputs_and_noise_of_the_decoder(run, num_maps):
    index = open_index(run)
    targets = open_targets(run, index)
    found = fit_data(index, targets, index.classifier(CPU), num_maps, 0)
    assert found.noise == TrainConfig().noise
    for stage, outputs in ((index, found.id), (targets, found.ood)):
        columns = {name: column.read() for name, column in stage.columns.items()}
        maps = torch.from_numpy(columns["feature_maps_1"].astype(np.float32))
        std = maps.std(dim=(2, 3)).numpy()[:, : 10**6 * num_maps]
        np.testing.assert_allclose(outputs.map_std, std, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(outputs.prediction, columns["prediction"])


@pytest.mark.parametrize(("projected", "layers"), [((), [1]), ((0,), [1]), ((0, 1), [])])
def test_layers_are_whole_maps_whose_mean_is_not_the_features(data, spec, projected, layers):
    """That of the deepest of the test classifier is."""
    classifier = load_classifier(spec, weights=data / "weights.safetensors", num_maps=2)
    pixels = torch.randint(256, (40, 3, 16, 16), generator=torch.Generator().manual_seed(0)).byte()
    maps, names = classifier(pixels).maps, classifier.map_names
    classifier.project({names[number]: fit_projection([maps[number]], 5) for number in projected})
    output = classifier(pixels)
    means = [item.half().float().mean(dim=(2, 3)).numpy() for item in output.maps]
    features = output.features.numpy()
    outputs = Outputs(features, output.logits.argmax(dim=1).numpy(), means, features[:, :0])
    assert fitting._layers(outputs, classifier) == layers
    # a map of as many channels is not the features by that alone
    other = replace(outputs, features=features[::-1])
    assert fitting._layers(other, classifier) == [n for n in (0, 1) if n not in projected]
