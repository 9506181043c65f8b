"""Curves of both trainings: losses by level next to models that know no history, and validation."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes

from tiger.report.figures import COLORS, INK, MUTED, picture
from tiger.report.finished import FinishedRun
from tiger.report.markup import Html, figure, method_name

TITLE = "Training"


def render(run: FinishedRun) -> Html | None:
    """Return the curves of the model and of the tokenizer; None if nothing was trained."""
    parts = [part for part in (_model(run), _tokenizer(run)) if part]
    return Html("".join(parts)) if parts else None


def _model(run: FinishedRun) -> str:
    records = run.training_log("model")
    if not records:
        return ""
    metrics = run.model.metrics
    levels = sorted(name for name in records[-1] if name.startswith("loss@"))
    losses = levels or ["loss"]
    references = metrics.get("reference_losses", {})
    with picture("Loss by level and validation metrics of the model", columns=len(losses) + 1, height=2.9) as drawn:
        for level, (axes, name) in enumerate(zip(drawn.axes, losses, strict=False)):
            steps, values = _curve(records, name)
            axes.plot(steps, values, "o-", color=COLORS[0], markersize=3)
            for kind, style, below in (("uniform", "--", False), ("popularity", ":", True)):
                if level < len(references.get(kind, ())):
                    _reference(axes, references[kind][level], kind, style, below)
            axes.set(title=f"Loss (nats), level {level + 1}" if levels else "Loss (nats)", xlabel="step")
            _from_zero(axes)
        axes = drawn.axes[-1]
        for color, name in zip(COLORS, ("recall@10", "ndcg@10"), strict=False):
            steps, values = _curve(records, name)
            axes.plot(steps, values, "o-", color=color, markersize=3)
            chosen = [(step, value) for step, value in zip(steps, values, strict=True) if step == metrics["best_step"]]
            axes.plot(*np.reshape(chosen, (-1, 2)).T, "o", markersize=8, markerfacecolor="none", color=color)
            axes.annotate(name, (0.97, values[-1]), xycoords=("axes fraction", "data"), xytext=(0, -14),
                          textcoords="offset points", ha="right", fontsize=8, color=color)  # fmt: skip
        popular = run.result.splits["valid"].methods.get("popularity")
        if popular and "recall@10" in popular.metrics:
            _reference(axes, popular.metrics["recall@10"], "popularity, recall@10", ":")
        axes.set(title="Validation", xlabel="step")
        _from_zero(axes)
    name = method_name(next(iter(run.methods)))
    early = " It stopped early." if metrics["stopped_early"] else ""
    caption = (
        f"{name}: {metrics['steps']:,} steps; the weights of step {metrics['best_step']:,} (circles) are best on "
        f"validation.{early}"
    )
    if references:
        caption += " Dashed: every existing code equally probable. Dotted: codes as frequent as in training."
    return figure(drawn.svg, caption)


def _tokenizer(run: FinishedRun) -> str:
    records = run.training_log("tokenizer")
    if not records:
        return ""
    levels = sorted(name for name in records[-1] if name.startswith("perplexity@"))
    with picture("Training of the tokenizer", columns=3, height=2.7) as drawn:
        error, perplexity, unique = drawn.axes
        error.plot(*_curve(records, "reconstruction_error"), "o-", markersize=3)
        error.set(title="Reconstruction error", xlabel="step")
        for name in levels:
            perplexity.plot(*_curve(records, name), "o-", markersize=3, label=f"level {name.partition('@')[2]}")
        perplexity.set(title="Codes in effective use (perplexity)", xlabel="step")
        perplexity.legend(loc="lower right")
        unique.plot(*_curve(records, "unique_ratio"), "o-", markersize=3)
        unique.set(title="Distinct code tuples / items", xlabel="step")
        for axes in drawn.axes:
            _from_zero(axes)
    caption = "Tokenizer. Error: 1 would be the mean vector for every item. It starts at the codes of k-means."
    return figure(drawn.svg, caption)


def _curve(records: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    known = [record for record in records if record.get(name) is not None]
    return [record["step"] for record in known], [record[name] for record in known]


def _from_zero(axes: Axes) -> None:
    """Let the vertical axis begin at 0, with room for a label above the highest value."""
    axes.set_ylim(0, axes.dataLim.y1 * 1.12 or 1)


def _reference(axes: Axes, value: float, name: str, style: str, below: bool = False) -> None:
    axes.axhline(value, color=MUTED, linestyle=style, linewidth=1.2)
    axes.annotate(name, (0.97, value), xycoords=("axes fraction", "data"), xytext=(0, -2 if below else 2),
                  textcoords="offset points", ha="right", va="top" if below else "bottom", fontsize=8,
                  color=INK)  # fmt: skip
