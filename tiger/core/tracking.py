"""Metric tracking: TensorBoard and MLflow here, Prometheus in `on_ray/metrics.py`.

A stage calls `record`; the job chooses the sinks once. Without a sink, metrics are discarded.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pydantic import Field

from tiger.core.config import Config, flat
from tiger.core.errors import ResourceError
from tiger.core.logs import redact

log = logging.getLogger(__name__)

Sink = Callable[[str, int, Mapping[str, float]], None]
"""(stage, step, {metric: value}); `recall@10` is the metric recall at cutoff 10."""

_sinks: list[Sink] = []


class TrackingConfig(Config):
    """Where losses, codebook utilization, rates and metrics go while a job runs, in addition to the log."""

    tensorboard: str | None = Field(None, min_length=1, description="local folder for TensorBoard; none: off")
    mlflow: str | None = Field(None, min_length=1, description="MLflow tracking URI; none: off")
    experiment: str = Field("tiger", min_length=1, description="MLflow experiment")


def record(stage: str, step: int, metrics: Mapping[str, Any]) -> None:
    """Send the numbers among `metrics` to every sink. A failing sink is logged and disabled; the run continues.

    Args:
        stage: prefix of the metrics' names.
        step: training steps, rows, or 0 for metrics that are logged once.
        metrics: metrics by name; values that are not numbers are ignored.
    """
    numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
    for sink in list(_sinks):
        try:
            sink(stage, step, numbers)
        except Exception as error:  # libraries raise errors of any kind
            _sinks.remove(sink)
            log.warning("metrics are no longer tracked by %s: %r", getattr(sink, "__qualname__", sink), error)


@contextlib.contextmanager
def recording(*sinks: Sink) -> Iterator[None]:
    """Add these sinks until the end of the block."""
    _sinks.extend(sinks)
    try:
        yield
    finally:
        _sinks[:] = [sink for sink in _sinks if sink not in sinks]


@contextlib.contextmanager
def tensorboard(folder: str, run: str) -> Iterator[Sink]:
    """Yield a sink that writes `FOLDER/RUN` with tensorboardX, a dependency of Ray Tune."""
    from tensorboardX import SummaryWriter

    with SummaryWriter(f"{folder}/{run}", flush_secs=10) as writer:

        def sink(stage: str, step: int, metrics: Mapping[str, float]) -> None:
            for name, value in _named(stage, metrics).items():
                writer.add_scalar(name, value, step)

        yield sink


@contextlib.contextmanager
def mlflow(uri: str, experiment: str, run: str, parameters: Mapping[str, Any]) -> Iterator[Sink]:
    """Yield a sink that logs to a run of an MLflow server, with the redacted configuration as its parameters.

    Args:
        uri: MLflow tracking URI.
        experiment: name of the experiment.
        run: name of the run.
        parameters: nested tables of plain values.

    Raises:
        ResourceError: MLflow is not installed, or the server does not answer.
    """
    try:
        import mlflow as library
    except ModuleNotFoundError:
        raise ResourceError("tracking.mlflow needs MLflow: `uv sync --extra mlflow`") from None
    library.set_tracking_uri(uri)
    try:
        library.set_experiment(experiment)
        active = library.start_run(run_name=run)
    except library.exceptions.MlflowException as error:
        raise ResourceError(f"tracking.mlflow = {uri}: {str(error).splitlines()[0]}") from None
    with active:
        library.log_params({key: redact(str(value)) for key, value in flat(parameters).items() if value is not None})

        def sink(stage: str, step: int, metrics: Mapping[str, float]) -> None:
            # Pass run_id: the active MLflow run is thread-local, and training metrics arrive from another thread.
            library.log_metrics(_named(stage, metrics), step=step, run_id=active.info.run_id)

        yield sink


def _named(stage: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """Rename metrics so that TensorBoard and MLflow both accept them: `recall@10` on test is `test/recall_at_10`."""
    return {f"{stage}/{name.replace('@', '_at_')}": value for name, value in metrics.items()}
