"""Share a detector on the Hugging Face Hub: one bundle, and a model card with its figures.

Needs the extra ``hub``.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ood_heatmap import __version__
from ood_heatmap.bundle import to_bundle
from ood_heatmap.detector import HeatmapDetector
from ood_heatmap.errors import OodHeatmapError, UsageError, printable
from ood_heatmap.verdict import default_method, fpr_key, verdict

# name of the bundle in a repository
BUNDLE = "detector.safetensors"
_TAGS = ["out-of-distribution-detection", "ood-detection", "image-classification", "heatmap"]
_MEANS = ("mean near", "mean far", "mean all")


def push_to_hub(
    run: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    commit_message: str = "Upload the detector",
    trust_code: bool = False,
) -> str:
    """Upload the bundle of a run, and a model card with its classifier and figures.

    A README.md that the repository already has is replaced.

    Args:
        run: A run directory; without an evaluation, the card has no figures.
        repo_id: Repository, such as ``name/detector``; created if it does not exist.
        private: Whether a new repository is private.
        token: Access token; by default that of ``hf auth login``.
        commit_message: Title of the commit.
        trust_code: Trust the model code of the run, see ``HeatmapDetector.load``.

    Returns:
        Address of the commit.

    Raises:
        UsageError: huggingface_hub is not installed.
        OodHeatmapError: The run cannot be bundled, or the Hub refuses or does not answer.
    """
    run = Path(run)
    with _hub_errors(repo_id):
        from huggingface_hub import CommitOperationAdd, HfApi

        bundle = to_bundle(HeatmapDetector.load(run, "cpu", trust_code=trust_code))
        files = {BUNDLE: bundle, "README.md": model_card(run, repo_id).encode()}
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(name, content) for name, content in files.items()],
            commit_message=commit_message,
        )
    return str(commit.commit_url)


def from_pretrained(
    repo_id: str,
    *,
    revision: str | None = None,
    device: str = "auto",
    false_alarm: float | None = None,
    token: str | None = None,
    trust_code: bool = False,
) -> HeatmapDetector:
    """Download a bundle from the Hub, or take it from the cache, and load the detector.

    Args:
        repo_id: Repository, such as ``name/detector``.
        revision: Branch, tag or commit; by default the newest.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        false_alarm: Share of ID images that may be called OOD; as evaluated if None.
        token: Access token; by default that of ``hf auth login``.
        trust_code: Trust the model code in the bundle, see ``HeatmapDetector.load``. Read it first:
            it may be anyone's.

    Raises:
        UsageError: huggingface_hub is not installed.
        OodHeatmapError: The repository has no bundle, or the Hub does not answer; or the bundle
            cannot be loaded.
    """
    with _hub_errors(repo_id):
        from huggingface_hub import hf_hub_download

        path = hf_hub_download(repo_id, BUNDLE, revision=revision, token=token)
    return HeatmapDetector.load(path, device, false_alarm, trust_code=trust_code)


@contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """Raise errors of the client as one line that names the repository."""
    try:
        yield
    except OodHeatmapError:
        raise
    except ImportError as error:
        raise UsageError(
            f"the Hub needs a package that is not installed ({error}): "
            "pip install 'ood-heatmap[hub]'."
        ) from error
    # it raises errors of many types, also of its HTTP client
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise OodHeatmapError(
            f"cannot reach {repo_id} on the Hugging Face Hub ({type(error).__name__}: {reason})."
        ) from error


def model_card(run: Path, repo_id: str) -> str:
    """Return the model card of a run: metadata in YAML, then Markdown.

    Args:
        run: A run directory.
        repo_id: Repository that the example downloads.

    Raises:
        OodHeatmapError: A stage of the run is missing or damaged.
    """
    from huggingface_hub import EvalResult, ModelCardData

    from ood_heatmap.pipeline.run import read_manifest, read_result

    classifier = read_manifest(run, "index").inputs["classifier"]
    evaluated = (run / "evaluation" / "manifest.json").is_file()
    metrics = read_result(run, "evaluation", "metrics.json") if evaluated else None
    rows = _rows(metrics) if metrics else []
    results = [
        EvalResult(
            task_type="out-of-distribution-detection",
            dataset_type=printable(row["set"]),
            dataset_name=printable(row["set"]),
            metric_type="roc_auc",
            metric_value=round(row["auroc"], 4),
            metric_name="AUROC",
        )
        for row in rows
        if row["set"] not in _MEANS
    ]
    data = ModelCardData(
        library_name="ood_heatmap",
        tags=_TAGS,
        model_name=repo_id.rpartition("/")[2],
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---\n{_describe(repo_id, classifier)}{_figures(metrics, rows)}"


def _rows(metrics: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the rows of the default score whose metrics are known."""
    default = default_method(metrics)
    rows = [row for row in metrics["table"] if row["method"] == default]
    return [row for row in rows if row["auroc"] is not None and not math.isnan(row["auroc"])]


def _describe(repo_id: str, classifier: Mapping[str, Any]) -> str:
    """Return title, purpose and use."""
    spec, size = printable(str(classifier["spec"])), classifier["transform"]["size"]
    return f"""
# {repo_id.rpartition("/")[2]}

Shows whether, and where, an image is not what a fixed image classifier was trained on. The
classifier is `{spec}`: {classifier["num_classes"]} classes, input of {size} x {size} pixels. Made
with ood_heatmap {__version__}.

```python
from ood_heatmap.adapters.hub import from_pretrained

detector = from_pretrained("{repo_id}")
result = detector(["photo.jpg"])
result.score, result.is_ood, result.heatmap
```

Larger scores are more out-of-distribution (OOD). Decisions hold for images like the in-distribution
(ID) images that it was calibrated with.
"""


def _figures(metrics: Mapping[str, Any] | None, rows: list[Mapping[str, Any]]) -> str:
    """Return the table of the default score and the verdict, or that there is none."""
    if metrics is None:
        return (
            "\nThis detector has not been evaluated: it has no threshold and takes no decisions.\n"
        )
    key = fpr_key(metrics)
    lines = ["| OOD test set | AUROC | FPR95 |", "|---|---|---|"]
    for row in rows:
        name = printable(row["set"]).replace("|", r"\|")
        lines.append(f"| {name} | {100 * row['auroc']:.2f} | {100 * row[key]:.2f} |")
    positive = "ID" if key == "fpr95_id_pos" else "OOD"
    table = "\n".join(lines)
    warnings = len(metrics.get("warnings", ()))
    doubt = f"\n\nThe evaluation gave {warnings} warnings." if warnings else ""
    return f"""
## Evaluation

{verdict(metrics)}

{table}

Shares in percent; FPR95 takes {positive} as the positive class.{doubt}
"""
