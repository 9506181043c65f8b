"""Ray Tune over the tokenizer: each trial trains inside its own function.

A trainer inside a trial would cost 25 to 45 s a trial and needs the dashboard to let go of its resources. The vectors
go into the object store once and are read from there by all trials of a node.
"""

from __future__ import annotations

import functools
import json
import logging
import operator
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from optuna.samplers import TPESampler
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator
from ray.tune.search.optuna import OptunaSearch

from tiger.artifacts import SCRATCH, Folder
from tiger.diagnostics import nearest_neighbours
from tiger.errors import HealthError
from tiger.learning import learn_tokenizer
from tiger.progress import Progress
from tiger.run import RunConfig
from tiger.scale import cluster
from tiger.search import SearchConfig, Space, apply, judge
from tiger.training import Hooks

log = logging.getLogger(__name__)

_METRIC = "objective"


def search_tokenizer(run: RunConfig, search: SearchConfig, vectors: torch.Tensor, target: Folder) -> pa.Table:
    """Runs the trials, or goes on with those that an earlier, killed search left in the target's scratch folder.

    Returns:
        one row a trial: `trial`, its values, the figures of its best look, `epochs` made, `status`.

    Raises:
        HealthError: no trial ended with a figure.
    """
    cluster.connect()
    cluster.require(search.cpus_per_trial, search.gpus_per_trial, "a trial")
    room = (cluster.cluster_cpus() - cluster.RESERVED_CPUS) / search.cpus_per_trial
    if search.gpus_per_trial:
        room = cluster.cluster_gpus() / search.gpus_per_trial
    concurrent = search.concurrent or max(1, int(room))
    plain = run.model_dump(mode="json", serialize_as_any=True)
    trainable = tune.with_resources(
        tune.with_parameters(
            _trial,
            run=plain,
            search=search.model_dump(mode="json"),
            vectors=vectors.numpy(),
            neighbours=nearest_neighbours(vectors.numpy()),
        ),
        {"cpu": search.cpus_per_trial} | ({"gpu": search.gpus_per_trial} if search.gpus_per_trial else {}),
    )
    path = f"{target.uri}/{SCRATCH}/tune"
    progress = Progress("tune", search.trials, "trials")
    if tune.Tuner.can_restore(path):
        log.info("tune: going on with the trials in %s", path)
        tuner = tune.Tuner.restore(path, trainable=trainable, resume_unfinished=True, restart_errored=True)
    else:
        tuner = tune.Tuner(
            trainable,
            param_space={key: _domain(space) for key, space in search.space.items()},
            tune_config=tune.TuneConfig(
                metric=_METRIC,
                mode="max",
                num_samples=search.trials,
                max_concurrent_trials=concurrent,
                search_alg=_sampler(run, search),
                scheduler=ASHAScheduler(
                    max_t=search.looks, grace_period=search.grace, reduction_factor=search.reduction
                ),
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=f"{target.uri}/{SCRATCH}",
                callbacks=[_Live(progress)],
                verbose=0,
            ),
        )
    results = tuner.fit()
    progress.close()
    return _table(results, search)


def _trial(
    values: dict[str, Any],
    run: dict[str, Any],
    search: dict[str, Any],
    vectors: np.ndarray,
    neighbours: tuple[np.ndarray, np.ndarray],
) -> None:
    """One trial: trains a tokenizer and reports every look at it."""
    settings = SearchConfig.model_validate(search)
    config = apply(RunConfig.model_validate(run), _decoded(values, settings), settings.looks).tokenizer
    steps_per_epoch = config.training.schedule(len(vectors), config.seed).steps_per_epoch

    def report(figures: dict[str, Any]) -> None:
        if figures["step"] or not config.training.epochs:  # the look before the first step is no result of training
            tune.report(figures | {"epochs": figures["step"] / steps_per_epoch})

    device = torch.device("cuda" if settings.gpus_per_trial and torch.cuda.is_available() else "cpu")
    try:
        learn_tokenizer(
            config,
            torch.from_numpy(np.array(vectors)),  # the object store's copy is read-only
            device=device,
            hooks=Hooks(report=report),
            judge=judge(settings.weights, neighbours),
        )
    except HealthError as error:
        log.warning("trial ended: %s", error)
        tune.report({_METRIC: -1e9, "failure": str(error), "epochs": 0.0})


def _domain(space: Space) -> Any:
    if space.choices is not None:
        return tune.choice([json.dumps(choice) for choice in space.choices])  # Optuna's choices are scalars
    if space.integer:
        bounds = int(space.low or 0), int(space.high or 0)
        return tune.lograndint(*bounds) if space.log else tune.randint(*bounds)
    return tune.loguniform(space.low, space.high) if space.log else tune.uniform(space.low, space.high)


def _decoded(values: dict[str, Any], search: SearchConfig) -> dict[str, Any]:
    """A trial's values as the configuration has them."""
    return {key: json.loads(value) if search.space[key].choices is not None else value for key, value in values.items()}


def _sampler(run: RunConfig, search: SearchConfig) -> Any:
    """The first trial is the configuration as it stands, where the space holds it."""
    current: dict[str, Any] = {}
    plain = run.model_dump(mode="json", serialize_as_any=True)
    for key, space in search.space.items():
        value: Any = functools.reduce(operator.getitem, key.split("."), plain)
        if space.choices is not None:
            if value in space.choices:
                current[key] = json.dumps(value)
        elif (space.low or 0) <= value <= (space.high or 0):
            current[key] = value
    points = [current] if len(current) == len(search.space) else None
    if search.sampler == "random":
        return BasicVariantGenerator(points_to_evaluate=points, random_state=search.seed)
    return OptunaSearch(points_to_evaluate=points, sampler=TPESampler(seed=search.seed))


class _Live(tune.Callback):
    """A line for every trial that ended, with the best so far."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.best = progress, -np.inf

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        value = trial.last_result.get(_METRIC, -np.inf)
        self.best = max(self.best, value)
        log.info("tune: %s ended with %.4f after %s looks, best %.4f", trial.trial_id, value, iteration, self.best)
        self.progress.add(1)


def _table(results: tune.ResultGrid, search: SearchConfig) -> pa.Table:
    rows: list[dict[str, Any]] = []
    for result in results:
        history = result.metrics_dataframe
        figures = dict(result.metrics or {})
        if history is not None and _METRIC in history:
            figures = history.loc[history[_METRIC].idxmax()].to_dict() | {"epochs": float(history["epochs"].max())}
        names = [name for name in figures if "@" in name]
        names += ["unique_ratio", "reconstruction_error", _METRIC, "epochs"]
        kept = {name: float(figures[name]) if name in figures else None for name in names}
        values = _decoded(result.config or {}, search)
        status = "failed" if result.error or "failure" in figures else "finished"
        rows.append({"trial": figures.get("trial_id"), **values, **kept, "status": status})
    if not any(row["status"] == "finished" for row in rows):
        raise HealthError("no trial of the search ended with a figure: look at the search space, and at a single run")
    return pa.Table.from_pylist(sorted(rows, key=lambda row: row[_METRIC] or -np.inf, reverse=True))
