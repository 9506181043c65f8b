"""Figures of a running stage for whoever watches: TensorBoard and MLflow here, Prometheus in `on_ray/metrics.py`.

A stage calls `record`; where its figures go is settled once, by the job. Without a sink they go nowhere.
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
"""(stage, step, {figure: value}); `recall@10` is the figure recall at 10."""

_sinks: list[Sink] = []


class TrackingConfig(Config):
    """Where losses, code usage, rates and metrics go while a job runs, beside the log."""

    tensorboard: str | None = Field(None, min_length=1, description="a local folder for TensorBoard; none: not written")
    mlflow: str | None = Field(None, min_length=1, description="MLflow's tracking URI; none: not used")
    experiment: str = Field("tiger", min_length=1, description="MLflow's experiment")


def record(stage: str, step: int, figures: Mapping[str, Any]) -> None:
    """Hands the numbers among `figures` to every sink. One that fails is said to and switched off: the run goes on.

    Args:
        step: training steps, rows, or 0 for figures that come once.
    """
    numbers = {name: float(value) for name, value in figures.items() if isinstance(value, int | float)}
    for sink in list(_sinks):
        try:
            sink(stage, step, numbers)
        except Exception as error:  # a library's own, of any kind
            _sinks.remove(sink)
            log.warning("figures are no longer tracked by %s: %r", getattr(sink, "__qualname__", sink), error)


@contextlib.contextmanager
def recording(*sinks: Sink) -> Iterator[None]:
    """Figures go to these sinks, too, until the end of the block."""
    _sinks.extend(sinks)
    try:
        yield
    finally:
        _sinks[:] = [sink for sink in _sinks if sink not in sinks]


@contextlib.contextmanager
def tensorboard(folder: str, run: str) -> Iterator[Sink]:
    """A sink that writes `FOLDER/RUN` with the writer that Ray Tune brings along, tensorboardX."""
    from tensorboardX import SummaryWriter

    with SummaryWriter(f"{folder}/{run}", flush_secs=10) as writer:

        def sink(stage: str, step: int, figures: Mapping[str, float]) -> None:
            for name, value in _named(stage, figures).items():
                writer.add_scalar(name, value, step)

        yield sink


@contextlib.contextmanager
def mlflow(uri: str, experiment: str, run: str, parameters: Mapping[str, Any]) -> Iterator[Sink]:
    """A sink that logs to a run of an MLflow server, with the configuration, without its secrets, as its parameters.

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

        def sink(stage: str, step: int, figures: Mapping[str, float]) -> None:
            # By its id: a run is the active one of its thread, and figures of a training come from another.
            library.log_metrics(_named(stage, figures), step=step, run_id=active.info.run_id)

        yield sink


def _named(stage: str, figures: Mapping[str, float]) -> dict[str, float]:
    """Names that TensorBoard and MLflow both allow: `recall@10` on test is `test/recall_at_10`."""
    return {f"{stage}/{name.replace('@', '_at_')}": value for name, value in figures.items()}
