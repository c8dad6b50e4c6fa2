"""Fixtures: a small classifier, small image sets, and runs made from them once."""

import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).parent.parent
# test the installed package, whatever kind of install it is
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != CHECKOUT]

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image
from safetensors.torch import save_file
from simulated_cuda import CUDA, simulated_cuda

from ood_heatmap.cache.stamps import STAMPS
from ood_heatmap.classifier import Classifier, load_classifier
from ood_heatmap.pipeline.config import EvaluateConfig, IndexConfig, TargetsConfig, TrainConfig
from ood_heatmap.pipeline.evaluate import evaluate
from ood_heatmap.pipeline.index import build_index
from ood_heatmap.pipeline.page import REPORT
from ood_heatmap.pipeline.targets import build_targets
from ood_heatmap.pipeline.train import train_decoder
from ood_heatmap.sources import open_images

# how long an example takes says nothing on a machine that is shared
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

CPU = torch.device("cpu")
SIZE, NUM_CLASSES = 16, 4
NETWORK = """
import torch
from torch import nn


class Network(nn.Module):
    input_size = 16

    def __init__(self, num_classes):
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU())
        self.linear = nn.Linear(8, num_classes)

    def forward(self, images):
        return self.linear(self.layer2(self.layer1(images)).mean(dim=(2, 3)))


def network(num_classes=4):
    return Network(num_classes)
"""


def write_images(folder: Path, count: int, seed: int, *, size: int = SIZE) -> Path:
    """Write random PNG images, smooth enough for the classifier to tell apart."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        coarse = generator.integers(0, 256, (4, 4, 3)).astype(np.uint8)
        Image.fromarray(coarse).resize((size, size)).save(folder / f"{number:03d}.png")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _state_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what tests write of trust in code and of listings out of the home directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let SIGINT raise KeyboardInterrupt: a job in the background of a shell ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def tree() -> Callable[[Path], dict[str, bytes]]:
    """Return what reads all that must not differ when a stage is made again, by path.

    Every file but the log, the stamps and the page of the report, which hold times, and the options
    as typed; of manifests all but ``speed`` and the checksum over it.
    """

    def read(folder: Path) -> dict[str, bytes]:
        found = {}
        for path in sorted(folder.rglob("*")):
            if path.is_dir() or path.name in ("log.jsonl", "run.yaml", REPORT, STAMPS):
                continue
            content = path.read_bytes()
            if path.name == "manifest.json":
                manifest = json.loads(content)
                # the checksum is over all of the manifest
                del manifest["speed"], manifest["checksum"]
                content = json.dumps(manifest).encode()
            found[path.relative_to(folder).as_posix()] = content
        return found

    return read


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with sets ``id`` (by class), ``ood``, ``test``, ``far``, and a classifier."""
    root = tmp_path_factory.mktemp("data")
    for label in range(NUM_CLASSES):
        write_images(root / "id" / f"class{label}", 20, seed=label)
    write_images(root / "ood", 50, seed=10, size=20)
    write_images(root / "test", 30, seed=11)
    write_images(root / "far", 25, seed=12, size=24)
    (root / "network.py").write_text(NETWORK)
    torch.manual_seed(0)
    scope: dict[str, Any] = {}
    exec(NETWORK, scope)
    network = scope["network"]()
    with torch.no_grad():
        network.linear.weight.mul_(20)  # so that several classes are predicted
    save_file(network.state_dict(), root / "weights.safetensors")
    return root


@pytest.fixture(scope="session")
def spec(data: Path) -> str:
    """Return the SPEC of the test classifier."""
    return f"{data / 'network.py'}:network"


@pytest.fixture
def classifier(data: Path, spec: str) -> Classifier:
    """Return the test classifier with two feature maps."""
    return load_classifier(spec, weights=data / "weights.safetensors", num_maps=2)


@pytest.fixture(scope="session")
def make_run(data: Path, spec: str) -> Callable[..., Path]:
    """Return what makes all four stages in a directory, with the settings given for each."""

    def make(
        run: Path,
        device: torch.device = CPU,
        classifier: Classifier | None = None,
        **settings: Any,
    ) -> Path:
        if classifier is None:
            classifier = load_classifier(spec, weights=data / "weights.safetensors", num_maps=2)
        classifier, ood = classifier.to(device), open_images(str(data / "ood"))
        shared: dict[str, Any] = {"batch_size": 16, **settings}
        build_index(run, open_images(str(data / "id")), classifier, IndexConfig(**shared))
        build_targets(run, ood, device, TargetsConfig(**shared, patched=0.0))
        train: dict[str, Any] = {"epochs": 2, "batch_size": 32, "width": 32, "feature_maps": 0}
        train |= {name: value for name, value in settings.items() if name != "workers"}
        train_decoder(run, device, TrainConfig(**train))
        evaluate(
            run,
            open_images(str(data / "test")),
            {"far": open_images(str(data / "far")), "near": ood},
            device,
            EvaluateConfig(**shared, near=("near",), neighbours=5, examples=3),
        )
        return run

    return make


@pytest.fixture(scope="session")
def finished_run(make_run: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with all four stages. Copy it before changing it: see ``run``."""
    return make_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """Return a copy of the finished run."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


_GPU = pytest.param(
    "GPU",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    ],
)


@pytest.fixture(params=["simulated GPU", _GPU])
def gpu(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Return a GPU: the simulated one and, where there is one, a real one."""
    with simulated_cuda() if request.param == "simulated GPU" else nullcontext():
        yield CUDA


@pytest.fixture(params=["CPU", "simulated GPU", _GPU])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Return the CPU or a GPU, see ``gpu``."""
    with simulated_cuda() if request.param == "simulated GPU" else nullcontext():
        yield CPU if request.param == "CPU" else CUDA
