"""Two runs next to each other: results, the options in which they differ, trainings, codes, times."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tiger.core.artifacts import Artifact
from tiger.report.figures import COLORS, interval_dots, picture
from tiger.report.finished import FinishedRun
from tiger.report.markup import Html, Number, figure, method_name, paragraph, seconds, stage_name, table

Section = tuple[str, str]


def sections(first: FinishedRun, second: FinishedRun) -> list[Section]:
    """Return the titles and contents of all sections."""
    runs = {"A": first, "B": second}
    return [
        ("Results", _results(runs)),
        ("What differs", _differences(runs)),
        ("Training", _training(runs)),
        ("Stages", _stages(runs)),
    ]


def _results(runs: dict[str, FinishedRun]) -> str:
    split = {name: run.result.splits["test"] for name, run in runs.items()}
    own = {
        f"{name}: {method_name(next(iter(each.methods)))}": next(iter(each.methods.values()))
        for name, each in split.items()
    }
    first, second = own.values()
    metrics = [name for name in ("recall@10", "ndcg@10") if name in first.metrics and name in second.metrics]
    rows = []
    for metric in [name for name in first.metrics if name in second.metrics]:
        one, other = first.metrics[metric], second.metrics[metric]
        intervals = [f"{low:.4f} to {high:.4f}" for low, high in (first.ci95[metric], second.ci95[metric])]
        apart = first.ci95[metric][1] < second.ci95[metric][0] or second.ci95[metric][1] < first.ci95[metric][0]
        told = Html('<span class="good">intervals apart</span>') if apart else "intervals overlap"
        rows.append((metric, one, intervals[0], other, intervals[1], Number(f"<b>{other - one:+.4f}</b>"), told))
    parts = []
    if metrics:
        with picture("Both runs on test", columns=len(metrics), height=1.6, sharey=True) as drawn:
            for axes, metric in zip(drawn.axes, metrics, strict=True):
                values, intervals_of = [r.metrics[metric] for r in own.values()], [r.ci95[metric] for r in own.values()]
                interval_dots(axes, list(own), values, intervals_of, COLORS[: len(own)])
                axes.set(title=metric)
        parts.append(figure(drawn.svg, "Test, every item allowed, 95 % intervals over users."))
    parts.append(table(["metric", "A", "95 %", "B", "95 %", "B minus A", ""], rows))
    same = runs["A"].catalog.artifact.fingerprint == runs["B"].catalog.artifact.fingerprint
    if not same:
        parts.append(paragraph("The two runs have different catalogs: their users and targets differ."))
    return "".join(parts)


def _differences(runs: dict[str, FinishedRun]) -> str:
    flat = {name: dict(_options(run)) for name, run in runs.items()}
    keys = list(dict.fromkeys([*flat["A"], *flat["B"]]))
    rows = [(key, *(str(flat[name].get(key, "-")) for name in runs)) for key in keys
            if flat["A"].get(key) != flat["B"].get(key)]  # fmt: skip
    return table(["option", "A", "B"], rows) if rows else paragraph("All options of all stages are equal.")


def _options(run: FinishedRun) -> Iterator[tuple[str, Any]]:
    for artifact in run.stages:
        yield from _flat(artifact.manifest["config"], artifact.kind)
        yield from (
            (f"{artifact.kind} source {role}", digest[:16]) for role, digest in artifact.manifest["source"].items()
        )
        yield from (
            (f"{artifact.kind} version of {name}", value) for name, value in artifact.manifest["versions"].items()
        )


def _flat(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}.{key}")
        else:
            yield f"{prefix}.{key}", value


def _training(runs: dict[str, FinishedRun]) -> str:
    logs = {name: run.training_log("model") for name, run in runs.items()}
    with picture("Trainings of both runs", columns=2, height=2.8) as drawn:
        for axes, metric in zip(drawn.axes, ("loss", "ndcg@10"), strict=True):
            for color, (name, records) in zip(COLORS, logs.items(), strict=False):
                points = [(record["step"], record[metric]) for record in records if record.get(metric) is not None]
                axes.plot(*np.array(points).reshape(-1, 2).T, "o-", color=color, markersize=3, label=name)
            axes.set(title="loss (nats), training" if metric == "loss" else f"{metric}, validation", xlabel="step")
            axes.legend()
    return figure(drawn.svg, "Losses of different vocabularies of codes are not comparable; validation is.")


def _stages(runs: dict[str, FinishedRun]) -> str:
    kinds = list(dict.fromkeys(artifact.kind for run in runs.values() for artifact in run.stages))
    rows = []
    for kind in kinds:
        found = [run.artifact(kind) for run in runs.values()]
        same = all(found) and len({artifact.fingerprint for artifact in found if artifact}) == 1
        rows.append((stage_name(kind), *(_named(artifact) for artifact in found), "the same artifact" if same else ""))
    return table(["stage", "A", "B", ""], rows)


def _named(artifact: Artifact | None) -> str | None:
    if artifact is None:
        return None
    healthy = sum(check["healthy"] for check in artifact.health)
    return f"{artifact.fingerprint}, {seconds(artifact.manifest['seconds'])}, {healthy}/{len(artifact.health)} checks"
