"""Hyperparameter tuning of the tokenizer, without Ray: search space, objective, and reports.

The search space is a TOML file next to the configuration, such as `beauty-cpu.tune.toml` next to `beauty-cpu.toml`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, SerializeAsAny, model_validator

from tiger.core.config import MAX_LISTED, Config, build, fingerprint, overridden, with_override
from tiger.core.errors import ConfigError
from tiger.core.resources import FixedResources, Resources
from tiger.core.tables import format_table
from tiger.metrics.codes import neighbor_prefix_agreement
from tiger.run import RunConfig
from tiger.tokenizers.base import TokenizerConfig
from tiger.tokenizers.train import Judge


class Space(Config):
    """Values of one key: `choices`, or all numbers from `low` to `high`."""

    choices: list[Any] | None = Field(None, min_length=1, description="values to choose from")
    low: float | None = Field(None, description="smallest value")
    high: float | None = Field(None, description="largest value")
    log: bool = Field(False, description="sample uniformly on a logarithmic scale")
    integer: bool = Field(False, description="sample integers")

    @model_validator(mode="after")
    def _one_kind(self) -> Space:
        if (self.choices is None) == (self.low is None or self.high is None):
            raise ValueError("set either choices, or low and high")
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise ValueError("low must be less than high")
        if self.log and self.low is not None and self.low <= 0:
            raise ValueError("a logarithmic scale requires low > 0")
        return self

    def bounds(self) -> tuple[float, float]:
        """Return the smallest and the largest value of a numeric space."""
        assert self.low is not None and self.high is not None
        return self.low, self.high


class Weights(Config):
    """objective = unique x unique ratio - reconstruction x error + overlap x overlap@1."""

    unique: float = Field(1.0, ge=0, description="weight of the unique-code ratio, in [0, 1]")
    reconstruction: float = Field(1.0, ge=0, description="weight of the normalized reconstruction error")
    overlap: float = Field(1.0, ge=0, description="weight of the neighbor overlap at depth 1, in [0, 1]")


class TuningConfig(Config):
    """Search space, objective, sampler, early stopping, and resources.

    A sweep can be resumed with other resources, because they are not in its fingerprint.
    """

    unfingerprinted: ClassVar[frozenset[str]] = frozenset({"max_concurrent_trials"})

    num_trials: int = Field(24, ge=1, description="number of trials; the first one is the base configuration")
    sampler: Literal["tpe", "random"] = Field("tpe", description="Optuna's TPE, or random sampling")
    max_concurrent_trials: int | None = Field(
        None, ge=1, description="concurrent trials; none: as many as resources allow"
    )
    resources: FixedResources = Resources()  # of one trial; several workers form a DDP group
    num_evaluations: int = Field(
        10, ge=2, description="evaluations per full trial, after each of which it may be stopped early"
    )
    grace_period: int = Field(2, ge=1, description="evaluations before a trial may be stopped early")
    reduction_factor: float = Field(3, gt=1, description="reduction factor of ASHA: one in this many trials continues")
    seed: int = Field(0, ge=0, description="seed of the sampler")
    weights: Weights = Weights()
    space: dict[str, Space] = Field({}, description="dotted keys of the configuration and their values")

    @model_validator(mode="after")
    def _tokenizer_only(self) -> TuningConfig:
        wrong = [key for key in self.space if not key.startswith("tokenizer.")]
        if wrong:
            raise ValueError(f"only tokenizer keys can be tuned; {', '.join(wrong[:MAX_LISTED])} is not one")
        if self.grace_period > self.num_evaluations:
            raise ValueError(
                f"grace_period = {self.grace_period} is more than num_evaluations = {self.num_evaluations}: no trial "
                "could be stopped early"
            )
        return self


class TuningStageConfig(Config):
    """The configuration that determines the result of a sweep."""

    tokenizer: SerializeAsAny[TokenizerConfig]
    tuning: TuningConfig

    def family(self, embeddings: str) -> str:
        """Return a fingerprint that is equal for two sweeps if one can continue the trials of the other.

        Args:
            embeddings: the fingerprint of the embeddings.
        """
        identity = self.identity()
        del identity["tuning"]["num_trials"]
        return fingerprint(identity, embeddings)


def apply(run: RunConfig, values: dict[str, Any], num_evaluations: int | None) -> RunConfig:
    """Return the configuration with a trial's values, evaluated `num_evaluations` times during training.

    Args:
        run: the base configuration.
        values: dotted keys and their values.
        num_evaluations: evaluations during training; None: as configured.

    Raises:
        ConfigError: a key does not exist or a value is invalid.
    """
    plain = overridden(RunConfig, run.model_dump(mode="json", serialize_as_any=True), values)
    if num_evaluations is None:
        return build(RunConfig, plain)
    epochs = build(RunConfig, plain).tokenizer.training.epochs
    plain = with_override(plain, "tokenizer.training.validate_every_epochs", max(1.0, epochs / num_evaluations))
    return build(RunConfig, plain)


def require_possible(run: RunConfig, tuning: TuningConfig) -> None:
    """Validate the values of every key of the space, so that errors are reported before the first trial.

    Raises:
        ConfigError: the space is empty, a key does not exist, or one of its values is invalid.
    """
    if not tuning.space:
        raise ConfigError("tuning.space is empty: add at least one key of the tokenizer, with choices or low and high")
    for key, space in tuning.space.items():
        if space.choices is not None:
            for choice in space.choices:
                apply(run, {key: choice}, None)
            continue
        low, high = space.bounds()
        for bound in (low, high):
            apply(run, {key: bound}, None)
        if not space.integer:
            try:
                apply(run, {key: low + (high - low) / 3 + 1e-3 * (high - low)}, None)
            except ConfigError as error:
                raise ConfigError(f"{error}; set tuning.space.{key}: integer = true for integers") from None


def judge(weights: Weights, neighbors: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]) -> Judge:
    """Return the objective as an argument of `fit_tokenizer`: (codes, metrics) -> overlap metrics and objective."""

    def objective_of(codes: npt.NDArray[np.int64], found: dict[str, float]) -> dict[str, float]:
        overlap = neighbor_prefix_agreement(codes, neighbors)
        objective = (
            weights.unique * found["unique_ratio"]
            - weights.reconstruction * found["reconstruction_error"]
            + weights.overlap * overlap["overlap@1"]
        )
        return overlap | {"objective": objective}

    return objective_of


def table(rows: list[dict[str, Any]], keys: list[str]) -> list[str]:
    """Format trials as aligned lines of text with a header.

    Args:
        rows: rows as in trials.parquet; missing metrics are None.
        keys: the tuned keys; their last components are column names.
    """
    metrics = ["objective", "unique_ratio", "reconstruction_error", "overlap@1"]
    cells = [["trial", "status", "evaluations", "epochs", *metrics, *(key.rsplit(".", 1)[-1] for key in keys)]]
    for row in rows:
        start = ["" if row["trial"] is None else str(row["trial"]), row["status"], str(row["evaluations"])]
        numbers = ["" if row.get(name) is None else f"{row[name]:.4f}" for name in metrics]
        values = [f"{row[key]:.3g}" if isinstance(row[key], float) else str(row[key]) for key in keys]
        cells.append([*start, f"{row['epochs']:.0f}", *numbers, *values])
    return format_table(cells)


def plot_trials(trials: list[dict[str, Any]], keys: list[str]) -> str:
    """Plot the objective against each tuned key, one panel per key, as SVG; the best trial is filled."""
    from tiger.report.figures import COLORS, picture, standalone  # matplotlib takes a second to import

    scored = [trial for trial in trials if trial["objective"] is not None]
    best = max(scored, key=lambda trial: trial["objective"])
    columns = min(3, len(keys))
    rows = -(-len(keys) // columns)
    size = {"width": 3.2 * columns, "height": 2.6 * rows, "sharey": True}
    with picture("Objective by tuned key", rows, columns, **size) as drawn:
        for axes, key in zip(drawn.axes, keys, strict=False):
            values = [trial[key] for trial in scored]
            is_number = all(isinstance(value, (int, float)) for value in values)
            places = values if is_number else [str(value) for value in values]
            for trial, place in zip(scored, places, strict=True):
                fill, order = (COLORS[0], 3) if trial is best else ("none", 2)
                dot = axes.plot([place], [trial["objective"]], "o", color=COLORS[0], markerfacecolor=fill, zorder=order)
                dot[0].set_gid(f"trial-{key}")
            if is_number and min(values) > 0 and max(values) / min(values) > 10:
                axes.set_xscale("log")
            axes.set(title=key)
        for axes in drawn.axes[len(keys) :]:
            axes.set_visible(False)
        drawn.axes[0].set_ylabel("objective")
    return standalone(drawn.svg)
