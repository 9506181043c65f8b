"""Ray Tune over the tokenizer: each trial trains inside its own function.

A trainer inside a trial would cost 25 to 45 s a trial and needs the dashboard to let go of its resources. The vectors
go into the object store once and are read from there by all trials of a node.

Finished trials are noted in a journal of plain JSON, one file a trial, written when the trial ends. A sweep that was
killed reads it and goes on: sampler and scheduler are told what was found, and no finished trial runs again. Tune's own
restart state is not used: it is pickled, and it is written every few seconds, so that trials go missing from it.
"""

from __future__ import annotations

import functools
import json
import logging
import operator
import socket
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna.distributions as distributions
import pyarrow as pa
import ray
import ray.exceptions
import ray.util
import torch
import torch.distributed as dist
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import ConcurrencyLimiter
from ray.tune.search.optuna import OptunaSearch
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from tiger import training
from tiger.artifacts import SCRATCH, Folder
from tiger.device import assigned_device, pretended_gpus
from tiger.diagnostics import nearest_neighbours
from tiger.errors import HealthError, ResourceError
from tiger.learning import learn_tokenizer
from tiger.progress import Progress
from tiger.run import RunConfig
from tiger.scale import cluster, placement
from tiger.scale.watch import Watch, watching
from tiger.search import SearchConfig, Space, apply, judge, table
from tiger.training import Hooks

log = logging.getLogger(__name__)

_METRIC = "objective"
_TABLE_EVERY = 30.0  # seconds
_FAILED = -1e9  # the objective of a trial that could not be trained: Tune and Optuna take numbers only


def search_tokenizer(run: RunConfig, search: SearchConfig, vectors: torch.Tensor, target: Folder) -> pa.Table:
    """Runs the trials, or those that an earlier, killed search has left to do.

    Args:
        target: the artifact being made; the journal lies in its scratch folder.

    Returns:
        one row a trial, the best first: `trial`, its values, the figures of its best look, `looks` and `epochs` made,
        `seconds`, `status`, `failure`.

    Raises:
        HealthError: no trial ended with a figure.
    """
    cluster.connect(target)
    workers = search.workers_per_trial
    if search.gpus_per_trial:
        cluster.wait_for_gpus(run.scale.gpus, "tune", run.scale.wait_minutes)
    plan = placement.plan_trials(
        cluster.shape(), workers=workers, cpus=search.cpus_per_trial, gpus=search.gpus_per_trial,
        concurrent=search.concurrent,
    )  # fmt: skip
    cluster.wait_for([plan.bundle] * workers, "tune", run.scale.wait_minutes)
    journal = _Journal(target.child(f"{SCRATCH}/trials"), search)
    left = search.trials - len(journal.trials)
    if journal.trials:
        log.info("tune: %d of %d trials are in the journal and do not run again", len(journal.trials), search.trials)
    if left > 0:
        trainable = tune.with_resources(
            tune.with_parameters(
                _trial,
                run=run.model_dump(mode="json", serialize_as_any=True),
                search=search.model_dump(mode="json"),
                vectors=vectors.numpy(),
                neighbours=nearest_neighbours(vectors.numpy()),
            ),
            tune.PlacementGroupFactory([plan.bundle.resources] * workers),
        )
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                num_samples=left,
                search_alg=ConcurrencyLimiter(_searcher(run, search, journal), plan.maximum),
                scheduler=_scheduler(search, journal),
                reuse_actors=workers == 1,  # a group's other processes end with the trial's resources
            ),
            run_config=tune.RunConfig(
                name=f"tune-{len(journal.trials)}",
                storage_path=f"{target.uri}/{SCRATCH}",
                callbacks=[journal],
                verbose=0,
            ),
        )
        try:
            with watching("tune", "", storage=target) as journal.watch:
                tuner.fit()
        except (tune.TuneError, ray.exceptions.RayError) as error:
            reason = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "")
            raise ResourceError(
                f"tune: the sweep was lost: {reason}. The same command continues it; logs: {cluster.log_folder()}"
            ) from error
    rows = _rows(journal.trials, search)
    if not any(row["status"] == "finished" for row in rows):
        raise HealthError("no trial of the search ended with a figure: look at the search space, and at a single run")
    return pa.Table.from_pylist(rows)


def _trial(
    values: dict[str, Any],
    run: dict[str, Any],
    search: dict[str, Any],
    vectors: np.ndarray,
    neighbours: tuple[np.ndarray, np.ndarray],
) -> None:
    """One trial: trains a tokenizer and reports every look at it; as rank 0 of a process group where it has several."""
    workers = search["workers_per_trial"]
    if workers == 1:
        _learn(values, run, search, vectors, neighbours)
        return
    with socket.socket() as probe:
        probe.bind(("", 0))
        address = f"tcp://{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"
    others = ray.remote(_member).options(
        num_cpus=search["cpus_per_trial"],
        num_gpus=search["gpus_per_trial"],
        scheduling_strategy=PlacementGroupSchedulingStrategy(ray.util.get_current_placement_group()),
    )
    arguments = (address, workers, values, run, search, ray.put(vectors), ray.put(neighbours))
    running = [others.remote(rank, *arguments) for rank in range(1, workers)]
    _member(0, address, workers, values, run, search, vectors, neighbours)
    ray.get(running)


def _member(rank: int, address: str, workers: int, *arguments: Any) -> None:
    """One process of a trial's group."""
    backend = "nccl" if arguments[2]["gpus_per_trial"] and not pretended_gpus() else "gloo"
    dist.init_process_group(backend, init_method=address, rank=rank, world_size=workers)
    try:
        _learn(*arguments)
    finally:
        dist.destroy_process_group()


def _learn(
    values: dict[str, Any],
    run: dict[str, Any],
    search: dict[str, Any],
    vectors: np.ndarray,
    neighbours: tuple[np.ndarray, np.ndarray],
) -> None:
    settings = SearchConfig.model_validate(search)
    config = apply(RunConfig.model_validate(run), _decoded(values, settings), settings.looks).tokenizer
    steps_per_epoch = config.training.schedule(len(vectors), config.seed).steps_per_epoch

    def report(figures: dict[str, Any]) -> None:
        if training.rank() == 0 and (
            figures["step"] or not config.training.epochs
        ):  # the look before the first step is no result of training
            tune.report(figures | {"epochs": figures["step"] / steps_per_epoch})

    device = assigned_device(ray.get_gpu_ids() if settings.gpus_per_trial else [])
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(settings.cpus_per_trial)))
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
        if training.rank() == 0:
            tune.report({_METRIC: _FAILED, "failure": str(error), "epochs": 0.0})


class _Journal(tune.Callback):
    """The trials that ended, one JSON file each: `values` (as the sampler has them), `looks`, `status`."""

    def __init__(self, folder: Folder, search: SearchConfig) -> None:
        self.folder, self.search = folder, search
        self.trials: list[dict[str, Any]] = [
            folder.read_json(name) for name in folder.files() if name.endswith(".json")
        ]
        self._running: dict[str, dict[str, Any]] = {}
        self._shown = time.monotonic()
        self._progress = Progress("tune", search.trials, "trials", done=len(self.trials))
        self.watch: Watch | None = None

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if self.watch:
            self.watch.progress()
        kept = {key: value for key, value in result.items() if isinstance(value, (int, float, str)) and "/" not in key}
        self._entry(trial)["looks"].append(kept)
        if time.monotonic() - self._shown >= _TABLE_EVERY:
            self._show()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._note(trial, "finished")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._note(trial, "failed")

    def _note(self, trial: Any, status: str) -> None:
        entry = self._entry(trial)
        del self._running[trial.trial_id]
        looks = entry["looks"]
        entry["status"] = "failed" if not looks or any("failure" in look for look in looks) else status
        entry["trial"] = len(self.trials)
        self.folder.write_json(f"{entry['trial']:05d}.json", entry)
        self.trials.append(entry)
        log.info(
            "tune: trial %d %s after %d of %d looks with %.4f; %s",
            entry["trial"], entry["status"], len(looks), self.search.looks, _value(entry),
            _decoded(trial.config, self.search),
        )  # fmt: skip
        self._progress.add(1)
        if len(self.trials) == self.search.trials:
            self._progress.close()

    def _entry(self, trial: Any) -> dict[str, Any]:
        new = {"trial": None, "values": trial.config, "looks": [], "status": "running"}
        return self._running.setdefault(trial.trial_id, new)

    def _show(self) -> None:
        """The best trials so far and those under way."""
        self._shown = time.monotonic()
        best, running = (_rows(trials, self.search) for trials in (self.trials, list(self._running.values())))
        for line in table(best[:5] + running, list(self.search.space)):
            log.info("tune: %s", line)


def _value(trial: dict[str, Any]) -> float:
    return max((look[_METRIC] for look in trial["looks"]), default=_FAILED)


def _searcher(run: RunConfig, search: SearchConfig, journal: _Journal) -> OptunaSearch:
    """Told of the trials in the journal; at the start, of the configuration as it stands, where the space holds it."""
    points = None if journal.trials else _standing(run, search)
    seed = search.seed + len(journal.trials)  # going on must not draw the same values again
    sampler: BaseSampler = TPESampler(seed=seed) if search.sampler == "tpe" else RandomSampler(seed=seed)
    space = {key: _distribution(space) for key, space in search.space.items()}
    searcher = OptunaSearch(space, _METRIC, "max", points_to_evaluate=points, sampler=sampler)
    for trial in journal.trials:
        searcher.add_evaluated_point(trial["values"], _value(trial))
    return searcher


def _scheduler(search: SearchConfig, journal: _Journal) -> ASHAScheduler:
    """With the looks of the trials in the journal on its rungs."""
    scheduler = ASHAScheduler(
        metric=_METRIC, mode="max", max_t=search.looks, grace_period=search.grace, reduction_factor=search.reduction
    )
    for trial in journal.trials:
        known = SimpleNamespace(trial_id=f"journal-{trial['trial']}")
        scheduler.on_trial_add(None, known)
        for look in trial["looks"]:
            scheduler.on_trial_result(None, known, look)
    return scheduler


def _distribution(space: Space) -> distributions.BaseDistribution:
    if space.choices is not None:
        return distributions.CategoricalDistribution([json.dumps(choice) for choice in space.choices])  # scalars only
    low, high = space.bounds()
    if space.integer:
        return distributions.IntDistribution(int(low), int(high), log=space.log)
    return distributions.FloatDistribution(low, high, log=space.log)


def _decoded(values: dict[str, Any], search: SearchConfig) -> dict[str, Any]:
    """A trial's values as the configuration has them."""
    return {key: json.loads(value) if search.space[key].choices is not None else value for key, value in values.items()}


def _standing(run: RunConfig, search: SearchConfig) -> list[dict[str, Any]] | None:
    values: dict[str, Any] = {}
    plain = run.model_dump(mode="json", serialize_as_any=True)
    for key, space in search.space.items():
        value: Any = functools.reduce(operator.getitem, key.split("."), plain)
        if space.choices is not None:
            if value not in space.choices:
                return None
            values[key] = json.dumps(value)
        else:
            low, high = space.bounds()
            if not low <= value <= high:
                return None
            values[key] = value
    return [values]


def _rows(trials: list[dict[str, Any]], search: SearchConfig) -> list[dict[str, Any]]:
    """What `search_tokenizer` returns of each trial, the best first."""
    rows: list[dict[str, Any]] = []
    for trial in trials:
        best: dict[str, Any] = max(trial["looks"], key=operator.itemgetter(_METRIC), default={})
        names = ["unique_ratio", "reconstruction_error", _METRIC, *(name for name in best if "@" in name)]
        figures = {name: None if best.get(_METRIC, _FAILED) == _FAILED else best.get(name) for name in names}
        rows.append(
            {"trial": trial["trial"], **_decoded(trial["values"], search), **figures}
            | {
                "looks": len(trial["looks"]),
                "epochs": max((look["epochs"] for look in trial["looks"]), default=0.0),
                "seconds": sum(look["time_this_iter_s"] for look in trial["looks"]),
                "status": trial["status"],
                "failure": next((look["failure"] for look in trial["looks"] if "failure" in look), None),
            }
        )
    rows.sort(key=lambda row: (_FAILED if row[_METRIC] is None else row[_METRIC], -(row["trial"] or 0)), reverse=True)
    return rows
