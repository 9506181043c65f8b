"""Write the index table at the top of LOG.md from the titles of its entries: `uv run python .ci/log_index.py`.

A title is `DATE: what (verdict)`. A test compares the table with the titles.
"""

from __future__ import annotations

import re
from pathlib import Path

LOG = Path(__file__).parents[1] / "LOG.md"
BEGIN, END = "<!-- index -->\n", "<!-- end of the index -->\n"
_TITLE = re.compile(r"(?m)^## (\d{4}-\d\d-\d\d): (.*?)(?: \((.*)\))?$")


def index(text: str) -> str:
    """Return the table of all entries."""
    rows = ["| date | experiment | verdict |", "|---|---|---|"]
    for date, what, verdict in _TITLE.findall(text):
        anchor = re.sub(r"[^\w -]", "", f"{date}: {what}{f' ({verdict})' if verdict else ''}".lower()).replace(" ", "-")
        if "--" in anchor:  # GitHub keeps both hyphens, MkDocs one: no link would work on both
            raise ValueError(f"LOG.md: the title of {date}: {what} has a lone sign between spaces: write it as a word")
        cells = (date, f"[{what}](#{anchor})", verdict or "no verdict")
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def updated(text: str) -> str:
    """Return the log with its table."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + index(text) + END + rest.partition(END)[2]


if __name__ == "__main__":
    LOG.write_text(updated(LOG.read_text("utf-8")), encoding="utf-8")
