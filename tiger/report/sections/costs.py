"""Time, memory and money by stage."""

from __future__ import annotations

from tiger.report.figures import picture
from tiger.report.finished import FinishedRun
from tiger.report.markup import Html, Number, figure, seconds, stage_name, table

TITLE = "Time, memory and cost"


def render(run: FinishedRun) -> Html:
    """Return seconds per stage as bars, and a table; stages of an earlier run count with the time they took then."""
    names = [stage_name(artifact.kind) for artifact in run.stages]
    times = [float(artifact.manifest["seconds"]) for artifact in run.stages]
    with picture("Seconds per stage", width=7, height=0.7 + 0.28 * len(names)) as drawn:
        (axes,) = drawn.axes
        bars = axes.barh(names, times, height=0.62)
        axes.bar_label(bars, [seconds(value) for value in times], padding=4)
        axes.invert_yaxis()
        axes.margins(x=0.16)
        axes.set(xlabel="seconds")
        axes.grid(axis="y", visible=False)
    price = run.dollars_per_hour
    heads = ["stage", "time", "peak memory", *(["cost"] if price is not None else [])]
    rows = []
    for artifact, name, value in zip(run.stages, names, times, strict=True):
        memory = artifact.manifest.get("peak_memory_bytes")
        shown = Number(f"{memory / 1e9:.2f} GB") if memory else None
        rows.append((name, Number(seconds(value)), shown, *_cost(value, price)))
    total = sum(times)
    rows.append(("all stages", Number(seconds(total)), None, *_cost(total, price)))
    caption = "Peak memory: of all processes of the run on the driver's machine, sampled every second."
    if price is None:
        caption += " Costs are shown if scale.dollars_per_hour is set."
    return Html(figure(drawn.svg, caption) + table(heads, rows))


def _cost(seconds_taken: float, dollars_per_hour: float | None) -> list[Number]:
    return [] if dollars_per_hour is None else [Number(f"$ {seconds_taken / 3600 * dollars_per_hour:.2f}")]
