"""The result in six numbers."""

from __future__ import annotations

from tiger.report.finished import FinishedRun
from tiger.report.markup import Html, escaped, method_name, seconds

TITLE = "Summary"


def render(run: FinishedRun) -> Html:
    """Return Recall@10 with its interval, the margin over the best baseline, new items, health, size and time."""
    split = run.result.splits["test"]
    name, best = next(iter(split.methods.items()))
    metric = "recall@10" if "recall@10" in best.metrics else next(iter(best.metrics))
    low, high = best.ci95[metric]
    cards = [(f"{best.metrics[metric]:.4f}", f"{method_name(name)}, test {metric} (95 %: {low:.4f} to {high:.4f})")]
    others = {other: result.metrics[metric] for other, result in split.methods.items() if other != name}
    if others:
        strongest = max(others, key=others.__getitem__)
        difference, low, high = split.paired[strongest][metric]
        cards.append(
            (f"{difference:+.4f}", f"over {method_name(strongest)}, the best other method ({low:+.4f} to {high:+.4f})")
        )
    if unseen := best.by_target_popularity.get("0 to 0"):
        cards.append((f"{unseen.recall:.4f}", f"recall@10 of items never seen in training ({unseen.users:,} users)"))
    checks = [check for artifact in run.stages for check in artifact.health]
    healthy = sum(check["healthy"] for check in checks)
    cards.append((f"{healthy} / {len(checks)}", "health checks passed"))
    counts = run.catalog.artifact.metrics
    cards.append((f"{counts['items']:,}", f"items; {counts['users']:,} users, {counts['interactions']:,} interactions"))
    total = sum(artifact.manifest["seconds"] for artifact in run.stages)
    cards.append((seconds(total), f"for all {len(run.stages)} stages"))
    shown = "".join(f"<div><b>{escaped(value)}</b><span>{escaped(meaning)}</span></div>" for value, meaning in cards)
    return Html(f'<div class="cards">{shown}</div>')
