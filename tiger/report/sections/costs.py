"""Time, memory and money by stage."""

from __future__ import annotations

from tiger.report.figures import picture
from tiger.report.finished import FinishedRun
from tiger.report.markup import Html, figure, seconds, table

TITLE = "Time, memory and cost"


def render(run: FinishedRun) -> Html:
    """Return seconds per stage as bars, and a table; stages of an earlier run count with the time they took then."""
    names = [artifact.kind.replace("_", " ") for artifact in run.stages]
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
    for artifact, value in zip(run.stages, times, strict=True):
        memory = artifact.manifest.get("peak_memory_bytes")
        shown = f"{memory / 1e9:.2f} GB" if memory else None
        cost = [f"$ {value / 3600 * price:.2f}"] if price is not None else []
        rows.append((artifact.kind, seconds(value), shown, *cost))
    total = sum(times)
    cost = [f"$ {total / 3600 * price:.2f}"] if price is not None else []
    rows.append(("all stages", seconds(total), None, *cost))
    caption = (
        "Peak memory: of all processes of the run on the driver's machine, sampled every second. Without "
        "scale.dollars_per_hour there is no cost."
    )
    return Html(figure(drawn.svg, caption) + table(heads, rows))
