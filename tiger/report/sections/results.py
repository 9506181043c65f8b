"""Metrics of all methods on test, with intervals."""

from __future__ import annotations

from tiger.report.figures import interval_dots, picture
from tiger.report.finished import FinishedRun
from tiger.report.markup import Html, Number, details, figure, method_name, paragraph, table

TITLE = "Results"


def render(run: FinishedRun) -> Html:
    """Return the dot plot, the paired differences, and all metrics."""
    split = run.result.splits["test"]
    methods = split.methods
    first = next(iter(methods))
    known = list(methods[first].metrics)
    metrics = [name for name in known if name in ("recall@10", "ndcg@10")] or known[:2]
    names = [method_name(name) for name in methods]
    height = 0.9 + 0.38 * len(names)
    with picture("Test metrics with 95 % intervals", columns=len(metrics), height=height, sharey=True) as drawn:
        for axes, metric in zip(drawn.axes, metrics, strict=True):
            results = methods.values()
            interval_dots(axes, names, [r.metrics[metric] for r in results], [r.ci95[metric] for r in results])
            axes.set(title=metric)
    caption = (
        f"{split.users:,} test users; lists of items from the whole catalog, no sampled negatives. Lines: 95 % "
        "intervals over users."
    )
    paired = [
        (f"{method_name(first)} minus {method_name(other)}", Number(f"<b>{value:+.4f}</b>"),
         f"{low:+.4f} to {high:+.4f}",
         Html('<span class="good">excludes 0</span>') if low > 0 or high < 0 else "includes 0")
        for other, differences in split.paired.items() if metrics[0] in differences
        for value, low, high in [differences[metrics[0]]]
    ]  # fmt: skip
    heads = ["metric", *(method_name(name) for name in methods)]
    rows = [(name, *(result.metrics[name] for result in methods.values())) for name in methods[first].metrics]
    without = [(name, *(result.exclude_seen[name] for result in methods.values())) for name in methods[first].metrics]
    lists = [(name, *(result.lists[name] for result in methods.values())) for name in methods[first].lists]
    valid = run.result.splits["valid"].methods
    on_valid = [(name, *(result.metrics[name] for result in valid.values())) for name in valid[first].metrics]
    return Html(
        figure(drawn.svg, caption)
        + (table([f"paired, {metrics[0]}", "difference", "95 % interval", ""], paired) if paired else "")
        + details("All metrics on test, every item allowed", table(heads, rows))
        + details("Without the items of the history", table(heads, without))
        + details("Of all lists together", table(heads, lists))
        + details("On validation", table(["metric", *(method_name(name) for name in valid)], on_valid))
        + paragraph("The checkpoint was chosen on validation; test was looked at once.")
    )
