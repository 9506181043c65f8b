"""Sampler and scheduler of a sweep, into which the trials of the journal are replayed."""

from __future__ import annotations

import functools
import json
import operator
from types import SimpleNamespace
from typing import Any

import optuna.distributions as distributions
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from tiger.on_ray.tune_journal import METRIC, Journal, best_objective
from tiger.run import RunConfig
from tiger.tuning import Space, TuningConfig


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


def searcher_of(run: RunConfig, tuning: TuningConfig, journal: Journal) -> OptunaSearch:
    """Return a sampler seeded with the trials of the journal, and with the base configuration if it is not one."""
    standing, inside = base_values(run, tuning)
    untried = standing not in [trial["values"] for trial in journal.trials]
    seed = tuning.seed + len(journal.trials)  # a resumed sweep must not sample the same values again
    sampler: BaseSampler = TPESampler(seed=seed) if tuning.sampler == "tpe" else RandomSampler(seed=seed)
    space = {key: _distribution(space) for key, space in tuning.space.items()}
    searcher = _Searcher(
        space,
        METRIC,
        "max",
        points_to_evaluate=[standing] if untried and inside else None,
        sampler=sampler,
        outside=standing if untried and not inside else None,
    )
    for trial in journal.trials:
        if inside or trial["values"] != standing:
            searcher.add_evaluated_point(trial["values"], best_objective(trial))
    return searcher


def scheduler_of(tuning: TuningConfig, journal: Journal) -> ASHAScheduler:
    """Return an ASHA scheduler into which the trials of the journal have been replayed."""
    scheduler = ASHAScheduler(
        metric=METRIC,
        mode="max",
        max_t=tuning.num_evaluations,
        grace_period=tuning.grace_period,
        reduction_factor=tuning.reduction_factor,
    )
    for trial in journal.trials:
        known = SimpleNamespace(trial_id=f"journal-{trial['trial']}")
        scheduler.on_trial_add(None, known)
        for evaluation in trial["evaluations"]:
            scheduler.on_trial_result(None, known, evaluation)
    return scheduler


def _distribution(space: Space) -> distributions.BaseDistribution:
    if space.choices is not None:
        return distributions.CategoricalDistribution([json.dumps(choice) for choice in space.choices])  # scalars only
    low, high = space.bounds()
    if space.integer:
        return distributions.IntDistribution(int(low), int(high), log=space.log)
    return distributions.FloatDistribution(low, high, log=space.log)


def base_values(run: RunConfig, tuning: TuningConfig) -> tuple[dict[str, Any], bool]:
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
