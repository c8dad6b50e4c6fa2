"""The interface of OpenOOD's postprocessors, which its Evaluator calls."""

import importlib
import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from ood_heatmap import HeatmapDetector
from ood_heatmap.adapters import openood
from ood_heatmap.adapters.openood import HeatmapPostprocessor


@pytest.fixture
def postprocessor(finished_run) -> HeatmapPostprocessor:
    return HeatmapPostprocessor(HeatmapDetector.load(finished_run, "cpu"))


def batches(count: int = 10, size: int = 4) -> list[dict[str, torch.Tensor]]:
    """Return what OpenOOD's loaders yield."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % 4
    return [
        {"data": data, "label": label, "index": label}
        for data, label in zip(images.split(size), labels.split(size), strict=True)
    ]


def test_inference_returns_prediction_confidence_and_label_of_every_image(postprocessor):
    postprocessor.setup(postprocessor.net, {}, {})
    prediction, confidence, label = postprocessor.inference(
        postprocessor.net, batches(), progress=False
    )
    result = postprocessor.detector(torch.cat([batch["data"] for batch in batches()]))
    np.testing.assert_array_equal(prediction, result.prediction)
    # larger is more ID
    np.testing.assert_allclose(confidence, -result.score, rtol=1e-5)
    np.testing.assert_array_equal(label, np.arange(10) % 4)
    assert prediction.dtype == label.dtype == np.int64
    # as their own inference is called
    assert len(postprocessor.inference(postprocessor.net, batches())) == 3


def test_postprocess_takes_uint8_and_normalized_floats(postprocessor):
    data = batches()[0]["data"]
    config = postprocessor.detector.classifier.config
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.mean, config.std))
    prediction, confidence = postprocessor.postprocess(postprocessor.net, data)
    again = postprocessor.postprocess(postprocessor.net, (data / 255 - mean) / std)
    torch.testing.assert_close(again[0], prediction)
    torch.testing.assert_close(again[1], confidence, rtol=1e-4, atol=1e-6)


def test_the_network_returns_logits_of_the_runs_classifier(postprocessor):
    data = batches()[0]["data"]
    net = postprocessor.net
    assert isinstance(net, torch.nn.Module)
    torch.testing.assert_close(net(data), postprocessor.detector.classifier(data).logits)
    np.testing.assert_array_equal(net(data).argmax(dim=1), postprocessor.detector(data).prediction)


def test_there_is_nothing_to_search(postprocessor):
    # what the Evaluator asks before it starts
    assert not postprocessor.APS_mode
    assert postprocessor.hyperparam_search_done


def test_with_openood_it_is_one_of_its_postprocessors(monkeypatch, finished_run):
    class BasePostprocessor:
        def __init__(self, config):
            raise AssertionError("needs a config")

    package, module = ModuleType("openood"), ModuleType("openood.postprocessors")
    vars(module)["BasePostprocessor"] = BasePostprocessor
    monkeypatch.setitem(sys.modules, "openood", package)
    monkeypatch.setitem(sys.modules, "openood.postprocessors", module)
    try:
        kind = importlib.reload(openood).HeatmapPostprocessor
        assert isinstance(kind(HeatmapDetector.load(finished_run, "cpu")), BasePostprocessor)
    finally:
        monkeypatch.undo()
        importlib.reload(openood)
