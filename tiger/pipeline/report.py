"""Write the report of a run, or of two runs next to each other, as one HTML file.

    tiger report RUN [--output FILE.html] [--dollars-per-hour PRICE]
    tiger report RUN_A RUN_B [--output FILE.html]

RUN is the folder of a run's artifacts, of which the last evaluation is reported, or an evaluation-... or report-... in
it. Every `tiger pipeline` ends with such a report, in report-.../report.html.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pydantic import Field

from tiger.core.artifacts import Artifact, Draft, stage
from tiger.core.config import Config
from tiger.core.errors import TigerError
from tiger.report.finished import FinishedRun, open_run
from tiger.run import RunConfig

PAGE = "report.html"
FORMAT = 2  # increase it if the page changes, so that finished runs get a new one


class ReportConfig(Config):
    """What determines a report, besides its inputs."""

    page_format: int = Field(FORMAT, description="version of the page")
    dollars_per_hour: float | None = Field(None, description="price of the machines, for the costs of the stages")


def report(run: RunConfig, evaluation: Artifact, recommendations: Artifact) -> Artifact:
    """Return the report of an evaluation and of the recommendations of the same model."""
    config = ReportConfig(dollars_per_hour=run.scale.dollars_per_hour)
    inputs = {"evaluation": evaluation, "recommendations": recommendations}
    return write_report.build(run.root, config, inputs, config, evaluation, recommendations)


@stage("report", verb="report")
def write_report(draft: Draft, config: ReportConfig, evaluation: Artifact, recommendations: Artifact) -> None:
    """Render the page."""
    from tiger.report import page  # matplotlib takes a second to import

    finished = FinishedRun(evaluation, recommendations, config.dollars_per_hour)
    draft.folder.write_bytes(PAGE, page.render(finished).encode())


def main(arguments: list[str]) -> int:
    """Write the page to a file; return the exit code."""
    parser = argparse.ArgumentParser("tiger report", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="one run, or two to compare")
    parser.add_argument("--output", metavar="FILE.html", default=PAGE, help="the file to write (default: report.html)")
    parser.add_argument("--dollars-per-hour", type=float, help="price of the machines, to report costs")
    options = parser.parse_args(arguments)
    if len(options.runs) > 2:
        parser.error("one run is reported, or two are compared")
    try:
        from tiger.report import page

        runs = [open_run(run, options.dollars_per_hour) for run in options.runs]
        text = page.render(runs[0]) if len(runs) == 1 else page.render_comparison(*runs)
        Path(options.output).write_text(text, encoding="utf-8")
    except TigerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: {options.output} cannot be written: {error.strerror}; choose another --output", file=sys.stderr)
        return 5
    print(f"{options.output}: open it in a browser")
    return 0
