"""Every snippet of the page on adapters runs as it is printed."""

import re
import shlex
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from pytorch_ood.benchmark import CIFAR10_OpenOOD
from torch.utils.data import DataLoader

from ood_heatmap.cli import main

PAGE = Path(__file__).parent.parent / "docs" / "adapters.md"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def sections() -> dict[str, list[tuple[str, str]]]:
    """Return language and text of the snippets of each section."""
    parts = re.split(r"^## (.*)$", PAGE.read_text("utf-8"), flags=re.MULTILINE)
    return {
        name: [(match[1], match[2]) for match in _BLOCK.finditer(text)]
        for name, text in zip(parts[1::2], parts[2::2], strict=True)
    }


def write_images(folder: Path, count: int, seed: int) -> None:
    folder.mkdir(parents=True)
    images = np.random.default_rng(seed).integers(0, 256, (count, 32, 40, 3)).astype(np.uint8)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:03d}.png")


def write_benchmark(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Put a small copy of what the benchmark downloads where it looks for it."""
    monkeypatch.setenv("TORCH_HOME", str(folder / "torch"))
    lists = folder / "torch/hub/openood_benchmark_imglist/benchmark_imglist/cifar10"
    lists.mkdir(parents=True)
    names = {
        CIFAR10_OpenOOD._train_imglist,
        CIFAR10_OpenOOD._val_id_imglist,
        CIFAR10_OpenOOD._val_ood_imglist,
        CIFAR10_OpenOOD._test_id_imglist,
        *(name for _, name in CIFAR10_OpenOOD._ood_imglists),
    }
    for seed, name in enumerate(CIFAR10_OpenOOD._download_names):
        write_images(folder / "data" / name, 5, seed)
    for name in names:
        images = name.removesuffix(".txt").partition("_")[2]
        label = 0 if images == "cifar10" else -1
        lines = [f"{images}/{number:03d}.png {label}\n" for number in range(5)]
        (lists / name).write_text("".join(lines))


class Evaluator:
    """Calls a postprocessor as OpenOOD's evaluator does, on random images."""

    def __init__(self, net, *, id_name, preprocessor, postprocessor):
        assert id_name == "cifar10"
        assert not postprocessor.APS_mode
        image = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
        self.net, self.postprocessor = net, postprocessor
        pixels = preprocessor(Image.fromarray(image))
        dataset: Any = [{"data": pixels, "label": 1}] * 6
        self.loader: DataLoader[Any] = DataLoader(dataset, batch_size=4)
        postprocessor.setup(net, {"test": self.loader}, {})

    def eval_ood(self):
        for batch in self.loader:
            assert len(self.net.eval()(batch["data"])) == len(batch["data"])
        return self.postprocessor.inference(self.net, self.loader, True)


def fake_modules(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stand in for packages that the tests do not install; return what FiftyOne was given."""
    calls: list[Any] = []
    dataset = SimpleNamespace(sort_by=lambda *given, **options: calls.append((given, options)))

    def from_dir(folder, dataset_type):
        assert (Path(folder) / "samples.json").is_file()
        calls.append(dataset_type)
        return dataset

    contents: dict[str, dict[str, Any]] = {
        "openood": {},
        "openood.evaluation_api": {"Evaluator": Evaluator},
        "fiftyone": {
            "types": SimpleNamespace(FiftyOneDataset="FiftyOneDataset"),
            "Dataset": SimpleNamespace(from_dir=from_dir),
            "launch_app": calls.append,
        },
    }
    for name, content in contents.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def fake_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what is pushed in the working directory."""
    import huggingface_hub

    def commit(repo_id, operations, **_):
        for operation in operations:
            Path(operation.path_in_repo).write_bytes(operation.path_or_fileobj)
        return SimpleNamespace(commit_url="address")

    api = SimpleNamespace(create_repo=lambda *_, **__: None, create_commit=commit)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token=None: api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo_id, name, **_: name)


@pytest.fixture
def workplace(run, tmp_path, monkeypatch) -> Path:
    """Return a folder with all that the page names, as the working directory."""
    (tmp_path / "runs").mkdir()
    run.rename(tmp_path / "runs" / "c10")
    for seed, name in enumerate(("test/a", "test/b", "ood/c")):
        write_images(tmp_path / "photos" / name, 15, seed)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    write_benchmark(monkeypatch, tmp_path)
    return tmp_path


NEEDED = {"TensorBoard": "tensorboard", "MLflow": "mlflow", "Hugging Face Hub": "huggingface_hub"}


@pytest.mark.parametrize("name", [name for name, blocks in sections().items() if blocks])
def test_snippets_run_as_printed(name, workplace, monkeypatch, capsys):
    if name in NEEDED:
        pytest.importorskip(NEEDED[name])
    calls = fake_modules(monkeypatch)
    if name in ("TensorBoard", "MLflow"):
        # not trained yet
        shutil.rmtree("runs/c10/decoder")
    if name == "Hugging Face Hub":
        fake_hub(monkeypatch)
    scope: dict[str, Any] = {}
    for language, text in sections()[name]:
        if language == "python":
            exec(compile(text, f"{PAGE.name}, {name}", "exec"), scope)
            continue
        assert language == "sh"
        for line in text.splitlines():
            # in one process, with or without torchrun
            command, *arguments = shlex.split(re.sub("^torchrun .* -- ", "", line))
            assert command == "ood-heatmap"
            result = CliRunner().invoke(main, arguments)
            assert result.exit_code == 0, result.output
    output = capsys.readouterr().out
    if name == "pytorch-ood":
        assert output.count("AUROC ") == 6
    if name == "FiftyOne":
        assert calls[:2] == ["FiftyOneDataset", (("ood_score",), {"reverse": True})]
    if name == "MLflow":
        assert len(list((workplace / "runs/c10/tensorboard").iterdir())) == 1


def test_the_benchmark_takes_seven_lines():
    _, text = sections()["pytorch-ood"][0]
    assert len([line for line in text.splitlines() if line]) <= 7


def test_every_section_has_a_snippet():
    assert all(sections().values())
    assert len(sections()) == 7
