"""Hyperparameter tuning of the tokenizer with Ray Tune: each trial trains inside its own function.

A Ray Train trainer inside a trial would cost 25 to 45 s per trial and requires the dashboard to release resources. The
vectors are put into the object store once, and all trials of a node read them from there.

Finished trials are recorded in a journal of plain JSON, one file per trial, written when the trial ends. An interrupted
sweep resumes from it: finished trials are replayed into sampler and scheduler, and are not run again. Tune's own
restart state is not used: it is pickled, and it is written only every few seconds, so that trials can be missing.

The number of trials is in the fingerprint of a sweep. So a sweep with more trials is another artifact; it starts with
the journal of the sweep of its family (`TuningStageConfig.family`) with the most trials, finished or killed.
"""

from __future__ import annotations

import functools
import json
import logging
import operator
import re
import socket
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna.distributions as distributions
import pyarrow as pa
import pyarrow.fs as pafs
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

from tiger.core.device import assigned_device, pretended_gpus
from tiger.core.errors import HealthError, ResourceError, last_line
from tiger.core.progress import Progress
from tiger.core.storage import SCRATCH, Folder
from tiger.metrics.codes import nearest_neighbors
from tiger.on_ray import cluster, placement
from tiger.on_ray.watch import Watch, watching
from tiger.run import RunConfig
from tiger.tokenizers.train import fit_tokenizer
from tiger.training import loop as training
from tiger.training.loop import Callbacks
from tiger.tuning import Space, TuningConfig, apply, judge, require_possible, table

log = logging.getLogger(__name__)

_METRIC = "objective"
_TABLE_EVERY = 30.0  # seconds
_FAILED = -1e9  # the objective of a trial that could not be trained: Tune and Optuna accept only numbers


def tune_tokenizer(
    run: RunConfig, tuning: TuningConfig, vectors: torch.Tensor, target: Folder, family: str = ""
) -> pa.Table:
    """Run the trials, or the remaining ones of an interrupted sweep.

    Args:
        run: the configuration to vary.
        tuning: the search space and its options.
        vectors: embeddings float32 [N, d].
        target: folder of the artifact that is being written; the journal is in its scratch folder, and at the end in
            its `journal.json`.
        family: fingerprint shared by sweeps that can continue each other; empty: start without trials of others.

    Returns:
        One row per trial, best first: `trial`, its values, the metrics of its best evaluation, `looks` (evaluations)
        and `epochs` made, `seconds`, `status`, `failure`.

    Raises:
        ConfigError: a key of the space does not exist, or a value is invalid.
        HealthError: all trials failed.
    """
    require_possible(run, tuning)
    cluster.connect(target)
    workers = tuning.workers_per_trial
    if tuning.gpus_per_trial:
        cluster.wait_for_gpus(run.scale.gpus, "tune", run.scale.wait_minutes)
    plan = placement.plan_trials(
        cluster.shape(), workers=workers, cpus=tuning.cpus_per_trial, gpus=tuning.gpus_per_trial,
        concurrent=tuning.max_concurrent_trials,
    )  # fmt: skip
    cluster.wait_for([plan.bundle] * workers, "tune", run.scale.wait_minutes)
    if family:
        target.child(SCRATCH).write_json("family.json", family)
        _inherit(target, family, tuning.num_trials)
    journal = _Journal(target.child(f"{SCRATCH}/trials"), tuning)
    left = tuning.num_trials - len(journal.trials)
    if journal.trials:
        log.info(
            "tune: %d of %d trials are in the journal and are not run again", len(journal.trials), tuning.num_trials
        )
    if left > 0:
        trainable = tune.with_resources(
            tune.with_parameters(
                _trial,
                run=run.model_dump(mode="json", serialize_as_any=True),
                tuning=tuning.model_dump(mode="json"),
                vectors=vectors.numpy(),
                neighbors=nearest_neighbors(vectors.numpy()),
            ),
            tune.PlacementGroupFactory([plan.bundle.resources] * workers),
        )
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                num_samples=left,
                search_alg=ConcurrencyLimiter(_searcher(run, tuning, journal), plan.maximum),
                scheduler=_scheduler(tuning, journal),
                reuse_actors=workers == 1,  # the other processes of a group end with the trial's resources
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
            raise ResourceError(
                f"tune: the sweep failed: {last_line(error)}. Rerun to resume it; logs: {cluster.log_folder()}"
            ) from error
    rows = _rows(journal.trials, tuning)
    if not any(row["status"] == "finished" for row in rows):
        raise HealthError("all trials failed; check the search space and try a single run")
    target.write_json("journal.json", {"family": family, "trials": journal.trials})
    return pa.Table.from_pylist(rows)


def _trial(
    values: dict[str, Any],
    run: dict[str, Any],
    tuning: dict[str, Any],
    vectors: np.ndarray,
    neighbors: tuple[np.ndarray, np.ndarray],
) -> None:
    """Train a tokenizer and report every evaluation; with several workers per trial, as rank 0 of a process group."""
    workers = tuning["workers_per_trial"]
    if workers == 1:
        _learn(values, run, tuning, vectors, neighbors)
        return
    with socket.socket() as probe:
        probe.bind(("", 0))
        address = f"tcp://{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"
    others = ray.remote(_member).options(
        num_cpus=tuning["cpus_per_trial"],
        num_gpus=tuning["gpus_per_trial"],
        scheduling_strategy=PlacementGroupSchedulingStrategy(ray.util.get_current_placement_group()),
    )
    arguments = (address, workers, values, run, tuning, ray.put(vectors), ray.put(neighbors))
    running = [others.remote(rank, *arguments) for rank in range(1, workers)]
    _member(0, address, workers, values, run, tuning, vectors, neighbors)
    ray.get(running)


def _member(rank: int, address: str, workers: int, *arguments: Any) -> None:
    """Run one process of a trial's process group."""
    backend = "nccl" if arguments[2]["gpus_per_trial"] and not pretended_gpus() else "gloo"
    dist.init_process_group(backend, init_method=address, rank=rank, world_size=workers)
    try:
        _learn(*arguments)
    finally:
        dist.destroy_process_group()


def _learn(
    values: dict[str, Any],
    run: dict[str, Any],
    tuning: dict[str, Any],
    vectors: np.ndarray,
    neighbors: tuple[np.ndarray, np.ndarray],
) -> None:
    settings = TuningConfig.model_validate(tuning)
    config = apply(RunConfig.model_validate(run), _decoded(values, settings), settings.num_evaluations).tokenizer
    steps_per_epoch = config.training.schedule(len(vectors), config.seed).steps_per_epoch

    def report(figures: dict[str, Any]) -> None:
        if training.rank() == 0 and (
            figures["step"] or not config.training.epochs
        ):  # the evaluation before the first step is not a result of training
            tune.report(figures | {"epochs": figures["step"] / steps_per_epoch})

    device = assigned_device(ray.get_gpu_ids() if settings.gpus_per_trial else [])
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(settings.cpus_per_trial)))
    try:
        fit_tokenizer(
            config,
            torch.from_numpy(np.array(vectors)),  # the object store's copy is read-only
            device=device,
            hooks=Callbacks(report=report),
            judge=judge(settings.weights, neighbors),
        )
    except HealthError as error:
        log.warning("trial ended: %s", error)
        if training.rank() == 0:
            tune.report({_METRIC: _FAILED, "failure": str(error), "epochs": 0.0})


class _Journal(tune.Callback):
    """Records ended trials, one JSON file each: `values` (in the sampler's form), `looks` (evaluations), `status`."""

    def __init__(self, folder: Folder, tuning: TuningConfig) -> None:
        self.folder, self.tuning = folder, tuning
        self.trials: list[dict[str, Any]] = [
            folder.read_json(name) for name in folder.files() if name.endswith(".json")
        ][: tuning.num_trials]
        self._running: dict[str, dict[str, Any]] = {}
        self._shown = time.monotonic()
        self._progress = Progress("tune", tuning.num_trials, "trials", done=len(self.trials))
        self.watch: Watch | None = None

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Record an evaluation; log a table at most every `_TABLE_EVERY` seconds."""
        if self.watch:
            self.watch.progress()
        kept = {key: value for key, value in result.items() if isinstance(value, (int, float, str)) and "/" not in key}
        self._entry(trial)["looks"].append(kept)
        if time.monotonic() - self._shown >= _TABLE_EVERY:
            self._show()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Write a finished or stopped trial to the journal."""
        self._note(trial, "finished")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Write a failed trial to the journal."""
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
            "tune: trial %d %s after %d of %d evaluations with %.4f; %s",
            entry["trial"], entry["status"], len(looks), self.tuning.num_evaluations, _value(entry),
            _decoded(trial.config, self.tuning),
        )  # fmt: skip
        self._progress.add(1)
        if len(self.trials) == self.tuning.num_trials:
            self._progress.close()

    def _entry(self, trial: Any) -> dict[str, Any]:
        new = {"trial": None, "values": trial.config, "looks": [], "status": "running"}
        return self._running.setdefault(trial.trial_id, new)

    def _show(self) -> None:
        """Log the best trials so far and the running ones."""
        self._shown = time.monotonic()
        best, running = (_rows(trials, self.tuning) for trials in (self.trials, list(self._running.values())))
        for line in table(best[:5] + running, list(self.tuning.space)):
            log.info("tune: %s", line)


def _inherit(target: Folder, family: str, at_most: int) -> None:
    """Copy the trials of the sweep of this family with the most trials, if it has more than this sweep."""
    home = target.parent if target.uri.rpartition("/")[2].startswith("attempt-") else target
    own = target.child(f"{SCRATCH}/trials")
    most: list[dict[str, Any]] = []
    where = ""
    for info in home.parent.entries(recursive=False):
        if info.type == pafs.FileType.Directory and info.base_name.startswith("tuning-"):
            sibling = home.parent.child(info.base_name)
            if sibling.uri != home.uri:
                for trials in _trials_of(sibling, family):
                    if len(trials) > len(most):
                        most, where = trials, sibling.uri
    most = most[:at_most]
    if len(most) > len(own.files()):
        for number, trial in enumerate(most):
            own.write_json(f"{number:05d}.json", trial | {"trial": number})
        log.info("tune: continuing with %d trials of %s", len(most), where)


def _trials_of(sweep: Folder, family: str) -> Iterator[list[dict[str, Any]]]:
    """Yield the trials of a sweep, finished or not, if it is of this family; on object stores, for each attempt."""
    names = sorted(info.path[len(sweep.path) + 1 :] for info in sweep.entries() if info.type == pafs.FileType.File)
    for name in names:
        try:
            if re.fullmatch(r"(attempt-\w+/)?journal\.json", name):
                journal = sweep.read_json(name)
                if journal["family"] == family:
                    yield journal["trials"]
            elif re.fullmatch(rf"(attempt-\w+/)?{SCRATCH}/family\.json", name) and sweep.read_json(name) == family:
                folder = name.removesuffix("family.json") + "trials/"
                noted = [other for other in names if other.startswith(folder) and other.endswith(".json")]
                yield [sweep.read_json(other) for other in noted]
        except (OSError, ValueError, KeyError, TypeError) as error:  # being deleted, or not as we wrote it
            log.warning("tune: %s/%s is skipped: %s", sweep.uri, name, error)


def _value(trial: dict[str, Any]) -> float:
    return max((look[_METRIC] for look in trial["looks"]), default=_FAILED)


class _Searcher(OptunaSearch):
    """OptunaSearch whose first trial may be outside of the space; Optuna does not see that trial."""

    def __init__(self, *arguments: Any, outside: dict[str, Any] | None, **named: Any) -> None:
        self._outside, self._untold = outside, set[str]()
        super().__init__(*arguments, **named)

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """Return the values of the next trial."""
        if self._outside is None:
            suggested: dict[str, Any] | None = super().suggest(trial_id)
            return suggested
        values, self._outside = self._outside, None
        self._untold.add(trial_id)
        return values

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Pass an evaluation to Optuna, unless the trial is outside of the space."""
        if trial_id not in self._untold:
            super().on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Pass the end of a trial to Optuna, unless the trial is outside of the space."""
        if trial_id not in self._untold:
            super().on_trial_complete(trial_id, result, error)


def _searcher(run: RunConfig, tuning: TuningConfig, journal: _Journal) -> OptunaSearch:
    """Return a sampler seeded with the trials of the journal, and with the base configuration if it is not one."""
    standing, inside = _standing(run, tuning)
    untried = standing not in [trial["values"] for trial in journal.trials]
    seed = tuning.seed + len(journal.trials)  # a resumed sweep must not sample the same values again
    sampler: BaseSampler = TPESampler(seed=seed) if tuning.sampler == "tpe" else RandomSampler(seed=seed)
    space = {key: _distribution(space) for key, space in tuning.space.items()}
    searcher = _Searcher(
        space,
        _METRIC,
        "max",
        points_to_evaluate=[standing] if untried and inside else None,
        sampler=sampler,
        outside=standing if untried and not inside else None,
    )
    for trial in journal.trials:
        if inside or trial["values"] != standing:
            searcher.add_evaluated_point(trial["values"], _value(trial))
    return searcher


def _scheduler(tuning: TuningConfig, journal: _Journal) -> ASHAScheduler:
    """Return an ASHA scheduler into which the trials of the journal have been replayed."""
    scheduler = ASHAScheduler(
        metric=_METRIC,
        mode="max",
        max_t=tuning.num_evaluations,
        grace_period=tuning.grace_period,
        reduction_factor=tuning.reduction_factor,
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


def _decoded(values: dict[str, Any], tuning: TuningConfig) -> dict[str, Any]:
    """Convert a trial's values from the sampler's form to that of the configuration."""
    return {key: json.loads(value) if tuning.space[key].choices is not None else value for key, value in values.items()}


def _standing(run: RunConfig, tuning: TuningConfig) -> tuple[dict[str, Any], bool]:
    """Return the values of the base configuration in the sampler's form, and whether the space contains them."""
    values: dict[str, Any] = {}
    inside = True
    plain = run.model_dump(mode="json", serialize_as_any=True)
    for key, space in tuning.space.items():
        value: Any = functools.reduce(operator.getitem, key.split("."), plain)
        if space.choices is not None:
            # The choice itself, not the value: 0 and 0.0 are equal values with different JSON.
            equal = [choice for choice in space.choices if _is_same(choice, value)]
            values[key] = json.dumps(equal[0] if equal else value)
            inside &= bool(equal)
        else:
            low, high = space.bounds()
            values[key] = value
            inside &= isinstance(value, (int, float)) and low <= value <= high
    return values, inside


def _is_same(first: Any, second: Any) -> bool:
    return first == second and isinstance(first, bool) == isinstance(second, bool)


def _rows(trials: list[dict[str, Any]], tuning: TuningConfig) -> list[dict[str, Any]]:
    """Return the rows of `tune_tokenizer`, best first."""
    rows: list[dict[str, Any]] = []
    for trial in trials:
        best: dict[str, Any] = max(trial["looks"], key=operator.itemgetter(_METRIC), default={})
        names = ["unique_ratio", "reconstruction_error", _METRIC, *(name for name in best if "@" in name)]
        figures = {name: None if best.get(_METRIC, _FAILED) == _FAILED else best.get(name) for name in names}
        rows.append(
            {"trial": trial["trial"], **_decoded(trial["values"], tuning), **figures}
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
