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

import json
import logging
import socket
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.exceptions
import ray.util
import torch
import torch.distributed as dist
from ray import tune
from ray.tune.search import ConcurrencyLimiter
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from tiger.core.device import assigned_device, pretended_gpus
from tiger.core.errors import HealthError, ResourceError
from tiger.core.storage import SCRATCH, Folder
from tiger.metrics.codes import nearest_neighbors
from tiger.on_ray import cluster, placement
from tiger.on_ray.failures import reason
from tiger.on_ray.tune_journal import FAILED, METRIC, Journal, decoded, inherit_trials, trial_rows
from tiger.on_ray.tune_sampler import scheduler_of, searcher_of
from tiger.on_ray.watch import watching
from tiger.run import RunConfig
from tiger.tokenizers.train import fit_tokenizer
from tiger.training import loop as training
from tiger.training.loop import Callbacks
from tiger.tuning import TuningConfig, apply, judge, require_possible

log = logging.getLogger(__name__)


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
        One row per trial, best first: `trial`, its values, the metrics of its best evaluation, `evaluations`
        and `epochs` made, `seconds`, `status`, `failure`.

    Raises:
        ConfigError: a key of the space does not exist, or a value is invalid.
        HealthError: all trials failed.
    """
    require_possible(run, tuning)
    cluster.connect(target)
    resources, workers = tuning.resources, tuning.resources.num_workers or 1
    if resources.gpus:
        cluster.wait_for_gpus(run.scale.gpus, "tune", run.scale.wait_minutes)
    plan = placement.plan_trials(
        cluster.shape(), workers=workers, cpus=resources.cpus or 1.0, gpus=resources.gpus or 0.0,
        concurrent=tuning.max_concurrent_trials,
    )  # fmt: skip
    cluster.wait_for([plan.bundle] * workers, "tune", run.scale.wait_minutes)
    if family:
        target.child(SCRATCH).write_json("family.json", family)
        inherit_trials(target, family, tuning.num_trials)
    journal = Journal(target.child(f"{SCRATCH}/trials"), tuning)
    if journal.trials:
        log.info(
            "tune: %d of %d trials are in the journal and are not run again", len(journal.trials), tuning.num_trials
        )
    if len(journal.trials) < tuning.num_trials:
        _run_trials(run, tuning, vectors, target, journal, plan)
    rows = trial_rows(journal.trials, tuning)
    if not any(row["status"] == "finished" for row in rows):
        raise HealthError("all trials failed; check the search space and try a single run")
    target.write_json("journal.json", {"family": family, "trials": journal.trials})
    return pa.Table.from_pylist(rows)


def _run_trials(
    run: RunConfig, tuning: TuningConfig, vectors: torch.Tensor, target: Folder, journal: Journal, plan: placement.Plan
) -> None:
    """Run the trials that are not in the journal.

    Raises:
        ResourceError: Ray Tune or the cluster fails.
    """
    workers = tuning.resources.num_workers or 1
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
            num_samples=tuning.num_trials - len(journal.trials),
            search_alg=ConcurrencyLimiter(searcher_of(run, tuning, journal), plan.maximum),
            scheduler=scheduler_of(tuning, journal),
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
            f"tune: the sweep failed: {reason(error)}. Rerun to resume it; logs: {cluster.log_folder()}"
        ) from error


def _trial(
    values: dict[str, Any],
    run: dict[str, Any],
    tuning: dict[str, Any],
    vectors: np.ndarray,
    neighbors: tuple[np.ndarray, np.ndarray],
) -> None:
    """Train a tokenizer and report every evaluation; with several workers per trial, as rank 0 of a process group."""
    resources = TuningConfig.model_validate(tuning).resources
    workers = resources.num_workers or 1
    if workers == 1:
        _learn(values, run, tuning, vectors, neighbors)
        return
    with socket.socket() as probe:
        probe.bind(("", 0))
        address = f"tcp://{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"
    others = ray.remote(_member).options(
        num_cpus=resources.cpus or 1.0,
        num_gpus=resources.gpus or 0.0,
        scheduling_strategy=PlacementGroupSchedulingStrategy(ray.util.get_current_placement_group()),
    )
    arguments = (address, workers, values, run, tuning, ray.put(vectors), ray.put(neighbors))
    running = [others.remote(rank, *arguments) for rank in range(1, workers)]
    _member(0, address, workers, values, run, tuning, vectors, neighbors)
    ray.get(running)


def _member(rank: int, address: str, workers: int, *arguments: Any) -> None:
    """Run one process of a trial's process group."""
    backend = "nccl" if arguments[2]["resources"]["gpus"] and not pretended_gpus() else "gloo"
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
    config = apply(RunConfig.model_validate(run), decoded(values, settings), settings.num_evaluations).tokenizer
    steps_per_epoch = config.training.schedule(len(vectors), config.seed).steps_per_epoch

    def report(metrics: dict[str, Any]) -> None:
        if training.rank() == 0 and (
            metrics["step"] or not config.training.epochs
        ):  # the evaluation before the first step is not a result of training
            tune.report(metrics | {"epochs": metrics["step"] / steps_per_epoch})

    device = assigned_device(ray.get_gpu_ids() if settings.resources.gpus else [])
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(settings.resources.cpus or 1)))
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
            tune.report({METRIC: FAILED, "failure": json.dumps(error.to_record()), "epochs": 0.0})
