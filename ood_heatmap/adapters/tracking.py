"""Log the training of the decoder, epoch by epoch, to TensorBoard or MLflow.

Both need their package: the extra ``tensorboard`` or ``mlflow``.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from ood_heatmap.errors import OodHeatmapError, UsageError

log = logging.getLogger(__name__)

_EXPERIMENT = "ood_heatmap"
_TAG = "ood_heatmap.training"


@dataclass(frozen=True)
class Epoch:
    """What a training reports after an epoch.

    Args:
        number: Its number, from 1 on.
        loss: Mean loss over its batches and all ranks.
        lr: Learning rate of its last step.
        images_per_second: Throughput over all ranks.
    """

    number: int
    loss: float
    lr: float
    images_per_second: float

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics by the names under which they are logged."""
        return {
            "train/loss": self.loss,
            "train/lr": self.lr,
            "train/images_per_second": self.images_per_second,
        }


EpochCallback: TypeAlias = Callable[[Epoch], None]


@contextmanager
def open_trackers(
    specs: Sequence[str], run: Path, training: str, options: Mapping[str, Any]
) -> Iterator[list[EpochCallback]]:
    """Yield the callbacks that log each epoch; they are opened before the training starts.

    A resumed training continues its own curves, and no epoch is logged twice. Call on rank 0.

    Args:
        specs: ``tensorboard[:DIR]``, by default in ``tensorboard/`` of the run, or
            ``mlflow[:URI]``, by default where MLflow's own settings say.
        run: The run directory.
        training: Fingerprint of the training; the same when it is resumed.
        options: Settings of the training, logged with it.

    Raises:
        UsageError: A tracker is unknown or its package is not installed.
        OodHeatmapError: The directory cannot be written, or the server does not answer.
    """
    with ExitStack() as stack:
        yield [_open_tracker(spec, run, training, options, stack) for spec in specs]


def _open_tracker(
    spec: str, run: Path, training: str, options: Mapping[str, Any], stack: ExitStack
) -> EpochCallback:
    """Open one tracker; the stack closes it."""
    name, _, place = spec.partition(":")
    if name not in ("tensorboard", "mlflow"):
        raise UsageError(f"--log must be tensorboard[:DIR] or mlflow[:URI], got {spec!r}.")
    try:
        if name == "tensorboard":
            folder = Path(place) if place else run / "tensorboard"
            tracker: Any = _TensorBoard(folder / training[:8])
        else:
            tracker = _Mlflow(place or None, run, training, options)
    except ImportError as error:
        raise UsageError(
            f"--log {name} needs a package that is not installed ({error}): "
            f"pip install 'ood-heatmap[{name}]'."
        ) from error
    # clients and writers raise errors of many types
    except Exception as error:
        raise OodHeatmapError(f"cannot log to {spec}: {_first_line(error)}.") from error
    stack.push(tracker.close)
    return _tolerant(spec, tracker.log)


def _tolerant(spec: str, callback: EpochCallback) -> EpochCallback:
    """Wrap a callback so that its first error ends the logging and not the training."""
    failed = False

    def tolerant(epoch: Epoch) -> None:
        nonlocal failed
        if failed:
            return
        try:
            callback(epoch)
        # a server or disk that fails must not cost the training
        except Exception as error:
            failed = True
            log.warning(
                "cannot log to %s (%s): epochs from %d on are in history.jsonl only",
                *(spec, _first_line(error), epoch.number),
            )

    return tolerant


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


class _TensorBoard:
    """Writes event files, one directory for each training.

    Args:
        folder: Directory of the training.
    """

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder, self._make_writer = folder, SummaryWriter
        self._writer: Any = None
        self._made = [path for path in (folder, folder.parent) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)

    def log(self, epoch: Epoch) -> None:
        """Write the scalars of an epoch."""
        if self._writer is None:
            # epochs behind the last checkpoint are trained again: their first scalars are purged
            self._writer = self._make_writer(str(self._folder), purge_step=epoch.number)
        for name, value in epoch.metrics.items():
            self._writer.add_scalar(name, value, epoch.number)
        self._writer.flush()

    def close(self, *_: object) -> None:
        """Close the event file; remove the directories that were made if nothing was logged."""
        if self._writer is not None:
            self._writer.close()
            return
        with suppress(OSError):
            for path in self._made:
                path.rmdir()


class _Mlflow:
    """Logs to an MLflow run, one for each training.

    Args:
        uri: Tracking URI; None for MLflow's own settings.
        run: The run directory, whose name becomes that of the MLflow run.
        training: Fingerprint of the training, by which a resumed one finds its MLflow run.
        options: Logged as parameters.
    """

    def __init__(
        self, uri: str | None, run: Path, training: str, options: Mapping[str, Any]
    ) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._client, self._metric, self._param = MlflowClient(uri), Metric, Param
        self._name, self._training, self._options = run.resolve().name, training, options
        experiment = self._client.get_experiment_by_name(_EXPERIMENT)
        self._experiment_id = (
            experiment.experiment_id if experiment else self._client.create_experiment(_EXPERIMENT)
        )
        self._run_id = ""
        self._last = 0

    def log(self, epoch: Epoch) -> None:
        """Log the metrics of an epoch that has not been logged before."""
        if not self._run_id:
            self._run_id = self._find_run() or self._new_run()
        if epoch.number > self._last:
            now = int(1000 * time.time())
            metrics = [
                self._metric(name, value, now, epoch.number)
                for name, value in epoch.metrics.items()
            ]
            # all or none of them
            self._client.log_batch(self._run_id, metrics=metrics)

    def _find_run(self) -> str:
        """Return the id of the MLflow run of this training, running again, or ""."""
        query = f"tags.`{_TAG}` = '{self._training}'"
        found = self._client.search_runs([self._experiment_id], query, max_results=1)
        if not found:
            return ""
        run_id = str(found[0].info.run_id)
        self._client.update_run(run_id, status="RUNNING")
        history = self._client.get_metric_history(run_id, "train/loss")
        self._last = max((metric.step for metric in history), default=0)
        return run_id

    def _new_run(self) -> str:
        """Create the MLflow run and log the settings of the training."""
        run = self._client.create_run(
            self._experiment_id, run_name=self._name, tags={_TAG: self._training}
        )
        params = [self._param(name, str(value)) for name, value in self._options.items()]
        self._client.log_batch(run.info.run_id, params=params)
        return str(run.info.run_id)

    def close(self, error_type: type[BaseException] | None, *_: object) -> None:
        """Set the status of the MLflow run."""
        if not self._run_id:
            return
        status = "FINISHED" if error_type is None else "FAILED"
        try:
            self._client.set_terminated(self._run_id, status)
        # the training is over
        except Exception as error:
            log.warning("cannot set the status of the MLflow run (%s)", _first_line(error))
