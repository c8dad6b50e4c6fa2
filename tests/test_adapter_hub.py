"""A run goes to the Hugging Face Hub and comes back; the Hub's client is mocked."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import create_autospec

import numpy as np
import pytest

from ood_heatmap import HeatmapDetector
from ood_heatmap.adapters import hub
from ood_heatmap.errors import OodHeatmapError, UsageError

huggingface_hub = pytest.importorskip("huggingface_hub")
REPOSITORY = "someone/c10-detector"


@pytest.fixture
def server(tmp_path, monkeypatch) -> Path:
    """Return the folder of a Hub without network; calls must fit the client's signatures."""
    folder = tmp_path / "hub"
    api = create_autospec(huggingface_hub.HfApi, instance=True)

    def create(repo_id, **_):
        (folder / repo_id).mkdir(parents=True, exist_ok=True)

    def commit(repo_id, operations, **_):
        for operation in operations:
            path = folder / repo_id / operation.path_in_repo
            path.write_bytes(operation.path_or_fileobj)
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/1")

    def download(repo_id, filename, **_):
        path = folder / repo_id / filename
        if not path.is_file():
            raise FileNotFoundError(f"404: no {filename} in {repo_id}\nand more\n")
        return str(path)

    api.create_repo.side_effect, api.create_commit.side_effect = create, commit
    fetch = create_autospec(huggingface_hub.hf_hub_download, side_effect=download)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token=None: api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    return folder


def test_a_detector_comes_back_as_it_was(run, server):
    address = hub.push_to_hub(run, REPOSITORY, private=True)
    assert address == f"https://huggingface.co/{REPOSITORY}/commit/1"
    huggingface_hub.HfApi().create_repo.assert_called_once_with(
        REPOSITORY, private=True, exist_ok=True
    )
    assert sorted(path.name for path in (server / REPOSITORY).iterdir()) == [
        "README.md",
        hub.BUNDLE,
    ]
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3)).astype(np.uint8)
    wanted = HeatmapDetector.load(run, "cpu", 0.3)
    shutil.rmtree(run)
    found = hub.from_pretrained(
        REPOSITORY, revision="v1", device="cpu", false_alarm=0.3, trust_code=True
    )
    assert huggingface_hub.hf_hub_download.call_args.kwargs["revision"] == "v1"
    np.testing.assert_array_equal(found(images).score, wanted(images).score)
    assert found.threshold == wanted.threshold


def test_the_card_has_the_figures_of_the_evaluation(run):
    card = huggingface_hub.ModelCard(hub.model_card(run, REPOSITORY))
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text("utf-8"))
    rows = {row["set"]: row for row in metrics["table"] if row["method"] == metrics["default"]}
    assert card.data.library_name == "ood_heatmap"
    assert {result.dataset_name: result.metric_value for result in card.data.eval_results} == {
        name: pytest.approx(rows[name]["auroc"], abs=1e-4) for name in ("far", "near")
    }
    for name, row in rows.items():
        cells = f"| {name} | {100 * row['auroc']:.2f} | {100 * row['fpr95_id_pos']:.2f} |"
        assert cells in card.text
    assert f'from_pretrained("{REPOSITORY}")' in card.text
    assert "4 classes, input of 16 x 16 pixels" in card.text


def test_the_card_names_no_path_of_this_machine(run, data):
    card = hub.model_card(run, REPOSITORY)
    assert "`network.py:network`" in card
    assert str(data) not in card
    assert str(run) not in card


def test_a_run_that_is_not_evaluated_says_so(run):
    shutil.rmtree(run / "evaluation")
    card = huggingface_hub.ModelCard(hub.model_card(run, REPOSITORY))
    assert card.data.eval_results is None
    assert "has not been evaluated" in card.text


def test_what_goes_wrong_is_one_line(run, server, monkeypatch):
    with pytest.raises(OodHeatmapError, match=rf"{REPOSITORY} on the .*404: no") as caught:
        hub.from_pretrained(REPOSITORY)
    assert "\n" not in str(caught.value)
    huggingface_hub.HfApi().create_repo.side_effect = ConnectionError("no route")
    with pytest.raises(OodHeatmapError, match="ConnectionError: no route"):
        hub.push_to_hub(run, REPOSITORY)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (lambda: hub.push_to_hub(run, REPOSITORY), lambda: hub.from_pretrained(REPOSITORY)):
        with pytest.raises(UsageError, match=r"pip install 'ood-heatmap\[hub\]'"):
            call()


def test_a_run_without_a_decoder_is_not_uploaded(run, server):
    shutil.rmtree(run / "decoder")
    with pytest.raises(OodHeatmapError, match="train"):
        hub.push_to_hub(run, REPOSITORY)
    assert not server.exists()
