"""Whether a catalog has drifted away from what its tokenizer and model were trained on, after an append.

New items are compared with those of the training, and each metric has what is to be expected without drift:

- distance: the fraction of new items whose text is further from the nearest trained text than 95 % of the trained ones
  are from each other; and the squared error of their nearest codes, next to that of trained items. The latter counts
  only with the former: a tokenizer of few items fits these more closely than any others;
- prefix churn: the fraction of new items with a prefix that no trained item has. Without drift it is about the
  fraction of trained items that are alone with their prefix (Good 1953);
- crowding: the fraction of items whose prefix is nearly full, and that of new items without their nearest codes;
- utilization: codes that any item has, per level, before and after;
- growth: all items appended since the training, next to the trained ones;
- recall of new items, if there are interactions with them.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field

from tiger.core.config import Config
from tiger.metrics.codes import code_metrics
from tiger.semantic_ids.assignment import SemanticIds, packed

FAR = 0.95
"""Quantile of the distances between trained texts beyond which a text counts as far from all of them."""

FULL = 0.9
"""Fraction of the last level's codes from which a prefix counts as crowded."""

_UNUSUAL = 2 * (1 - FAR)
"""Fraction of far texts from which the error of the codes counts."""

_FEW = 20  # new items below which fractions of them say little


class DriftLimits(Config):
    """When to train again."""

    max_error_ratio: float = Field(
        1.5, gt=0, description="error of new items under their nearest codes / that of trained items"
    )
    max_far_fraction: float = Field(
        0.3,
        ge=0,
        le=1,
        description="fraction of new items further from all trained texts than 95 % of these from each other",
    )
    max_prefix_churn: float = Field(
        0.25, ge=0, description="fraction of new items with a new prefix, above what is expected without drift"
    )
    max_moved_fraction: float = Field(
        0.3, ge=0, le=1, description="fraction of new items without their nearest codes, above that of trained items"
    )
    max_crowded_fraction: float = Field(
        0.05, ge=0, le=1, description="increase of the fraction of items whose prefix is nearly full"
    )
    max_growth: float = Field(0.5, gt=0, description="items appended since the training / trained items")
    min_recall_ratio: float = Field(
        3.0, ge=0, description="Recall@10 of new items among new items / that of random lists, if it is measured"
    )


class DriftReport(BaseModel):
    """The content of drift.json."""

    verdict: Literal["continue", "retrain now"]
    reasons: list[str] = Field(description="limits that are exceeded, with values")
    metrics: dict[str, float] = Field(
        description="of the new items; names that end in _trained are those to compare with"
    )

    def __str__(self) -> str:
        """Format the verdict and the metrics."""
        reasons = f": {'; '.join(self.reasons)}" if self.reasons else ""
        rows = [f"  {name:<32}{value:>12.4g}" for name, value in self.metrics.items()]
        return "\n".join([f"drift: {self.verdict}{reasons}", *rows])


def drift_metrics(
    ids: SemanticIds,
    num_trained: int,
    num_before: int,
    moved: npt.NDArray[np.bool_],
    moved_trained: float,
    errors: npt.NDArray[np.floating],
    trained_errors: npt.NDArray[np.floating],
    distances: npt.NDArray[np.floating],
    trained_distances: npt.NDArray[np.floating],
) -> dict[str, float]:
    """Return the metrics of an append.

    Args:
        ids: semantic IDs of all items, in order: trained, appended before, new.
        num_trained: items of the training.
        num_before: items before this append, at least `num_trained`.
        moved: bool [n], whether each new item has other codes than its nearest ones.
        moved_trained: fraction of trained items for which that holds.
        errors: [n] squared errors of the new items' nearest codes.
        trained_errors: [m] those of a sample of trained items.
        distances: [n] distance of each new text to the nearest trained one.
        trained_distances: [m] distance of each trained text to the nearest other one.
    """
    codes, sizes = ids.codes[:, : ids.levels].astype(np.int64), ids.level_sizes[: ids.levels]
    prefixes = packed(codes, sizes) // sizes[-1]
    trained, new = prefixes[:num_trained], prefixes[num_before:]
    _, inverse, counts = np.unique(trained, return_inverse=True, return_counts=True)
    metrics = {
        "new_items": float(len(new)),
        "growth": (len(ids) - num_trained) / num_trained,
        "crowded_fraction": _crowded(prefixes, sizes[-1]),
        "crowded_fraction_trained": _crowded(trained, sizes[-1]),
    }
    after, before = code_metrics(codes, sizes), code_metrics(codes[:num_trained], sizes)
    for level in range(1, ids.levels + 1):
        metrics[f"utilization@{level}"] = after[f"usage@{level}"]
        metrics[f"utilization@{level}_trained"] = before[f"usage@{level}"]
    if len(new):
        metrics |= {
            "error_ratio": float(errors.mean() / max(float(trained_errors.mean()), 1e-12)),
            "far_fraction": float((distances > np.quantile(trained_distances, FAR)).mean()),
            "prefix_churn": float((~np.isin(new, trained)).mean()),
            "prefix_churn_trained": float((counts[inverse] == 1).mean()),
            "moved_fraction": float(moved.mean()),
            "moved_fraction_trained": moved_trained,
        }
    return metrics


def _crowded(prefixes: npt.NDArray[np.int64], codes: int) -> float:
    """Return the fraction of items whose prefix has nearly as many items as the last level has codes."""
    _, counts = np.unique(prefixes, return_counts=True)
    return float(counts[counts >= FULL * codes].sum() / len(prefixes))


def judge(metrics: dict[str, float], limits: DriftLimits) -> DriftReport:
    """Compare the metrics of an append with the limits."""

    def above(name: str) -> float:
        return metrics.get(name, 0.0) - metrics.get(f"{name}_trained", 0.0)

    checks: list[tuple[bool, str]] = [
        (
            metrics["growth"] > limits.max_growth,
            f"{metrics['growth']:.0%} of the trained items were appended (append.limits.max_growth = "
            f"{limits.max_growth:.0%})",
        ),
        (
            above("crowded_fraction") > limits.max_crowded_fraction,
            f"prefixes are nearly full for {metrics['crowded_fraction']:.1%} of the items, "
            f"{metrics['crowded_fraction_trained']:.1%} at the training (append.limits.max_crowded_fraction)",
        ),
    ]
    if metrics["new_items"] >= _FEW:
        checks += _checks_of_new_items(metrics, limits, above("prefix_churn"), above("moved_fraction"))
    if "recall_ratio" in metrics:
        checks.append(
            (
                metrics["recall_ratio"] < limits.min_recall_ratio,
                f"new items are found {metrics['recall_ratio']:.1f} times as often as by chance "
                f"(append.limits.min_recall_ratio = {limits.min_recall_ratio:g})",
            )
        )
    reasons = [reason for exceeded, reason in checks if exceeded]
    return DriftReport(verdict="retrain now" if reasons else "continue", reasons=reasons, metrics=metrics)


def _checks_of_new_items(
    metrics: dict[str, float], limits: DriftLimits, churn: float, moved: float
) -> list[tuple[bool, str]]:
    return [
        (
            metrics["error_ratio"] > limits.max_error_ratio and metrics["far_fraction"] > _UNUSUAL,
            f"new texts are {metrics['error_ratio']:.2f} times as far from the codebooks as the trained ones "
            f"(append.limits.max_error_ratio = {limits.max_error_ratio:g})",
        ),
        (
            metrics["far_fraction"] > limits.max_far_fraction,
            f"{metrics['far_fraction']:.0%} of the new texts are further from all trained ones than {FAR:.0%} of these "
            f"from each other (append.limits.max_far_fraction = {limits.max_far_fraction:.0%})",
        ),
        (
            churn > limits.max_prefix_churn,
            f"{metrics['prefix_churn']:.0%} of the new items have new prefixes, {metrics['prefix_churn_trained']:.0%} "
            f"are expected (append.limits.max_prefix_churn = {limits.max_prefix_churn:.0%} more)",
        ),
        (
            moved > limits.max_moved_fraction,
            f"{metrics['moved_fraction']:.0%} of the new items did not get their nearest codes, of the trained ones "
            f"{metrics['moved_fraction_trained']:.0%} (append.limits.max_moved_fraction)",
        ),
    ]
