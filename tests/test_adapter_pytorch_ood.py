"""pytorch-ood's benchmark and metrics run with the detector."""

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_ood.benchmark import Benchmark
from pytorch_ood.detector import MaxSoftmax
from pytorch_ood.metrics import OODMetrics
from sklearn.metrics import roc_auc_score
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms.functional import normalize, to_tensor

from ood_heatmap import HeatmapDetector
from ood_heatmap.adapters.pytorch_ood import PytorchOodDetector
from ood_heatmap.errors import UsageError


@pytest.fixture
def adapter(finished_run) -> PytorchOodDetector:
    return PytorchOodDetector.load(finished_run, "cpu")


def noise(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3, 16, 16)).astype(np.uint8)


def sample(seed: int, count: int, label: int) -> TensorDataset:
    return TensorDataset(torch.from_numpy(noise(seed, count)), torch.full((count,), label))


class Noise(Benchmark):  # type: ignore[misc]
    """Two OOD sets, one of them darker."""

    ood_names = ["noise", "dark"]  # noqa: RUF012

    def train_set(self):
        return sample(0, 4, 1)

    def test_sets(self, known=True, unknown=True):
        dark = TensorDataset(torch.from_numpy(noise(3, 15) // 8), torch.full((15,), -1))
        return [sample(1, 20, 1) + other for other in (sample(2, 15, -1), dark)]


def test_a_benchmark_gives_the_metrics_of_the_detectors_scores(adapter, finished_run):
    rows = Noise().evaluate(adapter, {"batch_size": 8})
    detector = HeatmapDetector.load(finished_run, "cpu")
    is_ood = np.repeat([0, 1], [20, 15])
    for row, dataset, name in zip(rows, Noise().test_sets(), Noise.ood_names, strict=True):
        score = detector(torch.stack([image for image, _ in dataset])).score
        assert row["Dataset"] == name
        assert row["AUROC"] == pytest.approx(roc_auc_score(is_ood, score), abs=1e-6)
    # beside a detector of its own
    classifier = detector.classifier
    baseline = MaxSoftmax(lambda images: classifier(images).logits)
    both = Noise().evaluate([adapter, baseline], {"batch_size": 8})
    assert [row["AUROC"] for row in both if row["Detector"] == "PytorchOodDetector"] == [
        row["AUROC"] for row in rows
    ]


def test_metrics_take_the_scores(adapter):
    metrics = OODMetrics()
    for images, labels in DataLoader(sample(1, 9, 0) + sample(2, 9, -1), batch_size=4):
        metrics.update(adapter(images), labels)
    assert 0 <= metrics.compute()["AUROC"] <= 1


def test_normalized_floats_score_as_the_images_they_were_made_of(adapter):
    images = noise(1, 5)
    config = adapter.detector.classifier.config
    pictures = [Image.fromarray(image.transpose(1, 2, 0)) for image in images]
    floats = torch.stack(
        [normalize(to_tensor(picture), config.mean, config.std) for picture in pictures]
    )
    wanted = adapter.predict(torch.from_numpy(images))
    assert isinstance(wanted, torch.Tensor)
    torch.testing.assert_close(adapter.predict(floats), wanted, rtol=1e-4, atol=1e-6)
    with pytest.raises(UsageError):
        adapter.predict(torch.from_numpy(images).long())


def test_the_transform_is_that_of_the_run(adapter):
    picture = Image.fromarray(noise(1, 1)[0].transpose(1, 2, 0)).resize((40, 30))
    pixels = adapter.transform(picture)
    assert pixels.shape == (3, 16, 16)
    score = adapter.predict(torch.from_numpy(pixels[None]))
    np.testing.assert_allclose(score.numpy(), adapter.detector(picture).score, rtol=1e-5)


def test_it_moves(adapter, finished_run):
    assert adapter.device == torch.device("cpu")
    assert adapter.to("cpu") is adapter
    assert adapter.to("meta").device.type == "meta"
