"""Every health check with its threshold."""

from __future__ import annotations

from tiger.report.finished import FinishedRun
from tiger.report.markup import Html, paragraph, stage_name, table

TITLE = "Health"


def render(run: FinishedRun) -> Html:
    """Return all checks of all stages; a failed one with its likely cause."""
    rows = []
    for artifact in run.stages:
        for check in artifact.health:
            bound = ("at most " if check["upper"] else "at least ") + f"{check['threshold']:.4g}"
            status = Html('<span class="good">passed</span>')
            if not check["healthy"]:
                status = Html(f'<span class="bad">failed</span>: {check["cause"]}')
            rows.append((stage_name(artifact.kind), check["name"], float(check["value"]), bound, status))
    text = "Every stage checks its output, and the run stops at the first check that fails."
    return Html(paragraph(text) + table(["stage", "check", "value", "threshold", "result"], rows))
