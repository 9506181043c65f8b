"""The journal of a sweep: one JSON file per ended trial, from which an interrupted or larger sweep continues."""

from __future__ import annotations

import json
import logging
import operator
import re
import time
from collections.abc import Iterator
from typing import Any

import pyarrow.fs as pafs
from ray import tune

from tiger.core.errors import ArtifactError, TigerError
from tiger.core.progress import Progress
from tiger.core.storage import SCRATCH, Folder
from tiger.on_ray.watch import Watch
from tiger.tuning import TuningConfig, table

log = logging.getLogger(__name__)

METRIC = "objective"
FAILED = -1e9  # the objective of a trial that could not be trained: Tune and Optuna accept only numbers
_TABLE_EVERY = 30.0  # seconds


class Journal(tune.Callback):
    """Records ended trials, one JSON file each: `values` (in the sampler's form), `evaluations`, `status`."""

    def __init__(self, folder: Folder, tuning: TuningConfig) -> None:
        self.folder, self.tuning = folder, tuning
        noted = [folder.read_json(name) for name in folder.files() if name.endswith(".json")]
        self.trials = _require_evaluations(noted, folder)[: tuning.num_trials]
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
        self._entry(trial)["evaluations"].append(kept)
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
        evaluations = entry["evaluations"]
        failed = not evaluations or any("failure" in evaluation for evaluation in evaluations)
        entry["status"] = "failed" if failed else status
        entry["trial"] = len(self.trials)
        self.folder.write_json(f"{entry['trial']:05d}.json", entry)
        self.trials.append(entry)
        log.info(
            "tune: trial %d %s after %d of %d evaluations with %.4f; %s",
            entry["trial"], entry["status"], len(evaluations), self.tuning.num_evaluations, best_objective(entry),
            decoded(trial.config, self.tuning),
        )  # fmt: skip
        self._progress.add(1)
        if len(self.trials) == self.tuning.num_trials:
            self._progress.close()

    def _entry(self, trial: Any) -> dict[str, Any]:
        new = {"trial": None, "values": trial.config, "evaluations": [], "status": "running"}
        return self._running.setdefault(trial.trial_id, new)

    def _show(self) -> None:
        """Log the best trials so far and the running ones."""
        self._shown = time.monotonic()
        best, running = (trial_rows(trials, self.tuning) for trials in (self.trials, list(self._running.values())))
        for line in table(best[:5] + running, list(self.tuning.space)):
            log.info("tune: %s", line)


def inherit_trials(target: Folder, family: str, at_most: int) -> None:
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
                    yield _require_evaluations(journal["trials"], sweep)
            elif re.fullmatch(rf"(attempt-\w+/)?{SCRATCH}/family\.json", name) and sweep.read_json(name) == family:
                folder = name.removesuffix("family.json") + "trials/"
                noted = [other for other in names if other.startswith(folder) and other.endswith(".json")]
                yield _require_evaluations([sweep.read_json(other) for other in noted], sweep)
        except (
            ArtifactError,
            OSError,
            ValueError,
            KeyError,
            TypeError,
        ) as error:  # being deleted, or not as we wrote it
            log.warning("tune: %s/%s is skipped: %s", sweep.uri, name, error)


def _require_evaluations(trials: list[dict[str, Any]], where: Folder) -> list[dict[str, Any]]:
    """Return the trials of a journal.

    Raises:
        ArtifactError: an earlier version wrote it, which recorded the evaluations under another key.
    """
    if any("evaluations" not in trial for trial in trials):
        raise ArtifactError(
            f"{where.uri}: the journal of trials is of an earlier version (a trial has no `evaluations`); delete the "
            "folder to run its trials again"
        )
    return trials


def trial_rows(trials: list[dict[str, Any]], tuning: TuningConfig) -> list[dict[str, Any]]:
    """Return the rows of `tune_tokenizer`, best first."""
    rows: list[dict[str, Any]] = []
    for trial in trials:
        evaluations = trial["evaluations"]
        best: dict[str, Any] = max(evaluations, key=operator.itemgetter(METRIC), default={})
        names = ["unique_ratio", "reconstruction_error", METRIC, *(name for name in best if "@" in name)]
        metrics = {name: None if best.get(METRIC, FAILED) == FAILED else best.get(name) for name in names}
        failures = (evaluation["failure"] for evaluation in evaluations if "failure" in evaluation)
        rows.append(
            {"trial": trial["trial"], **decoded(trial["values"], tuning), **metrics}
            | {
                "evaluations": len(evaluations),
                "epochs": max((evaluation["epochs"] for evaluation in evaluations), default=0.0),
                "seconds": sum(evaluation["time_this_iter_s"] for evaluation in evaluations),
                "status": trial["status"],
                "failure": next((str(TigerError.from_record(json.loads(failure))) for failure in failures), None),
            }
        )
    rows.sort(key=lambda row: (FAILED if row[METRIC] is None else row[METRIC], -(row["trial"] or 0)), reverse=True)
    return rows


def decoded(values: dict[str, Any], tuning: TuningConfig) -> dict[str, Any]:
    """Convert a trial's values from the sampler's form to that of the configuration."""
    return {key: json.loads(value) if tuning.space[key].choices is not None else value for key, value in values.items()}


def best_objective(trial: dict[str, Any]) -> float:
    """Return the best objective over the evaluations of a trial, `FAILED` if there is none."""
    return max((evaluation[METRIC] for evaluation in trial["evaluations"]), default=FAILED)
