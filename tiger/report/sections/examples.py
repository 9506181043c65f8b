"""Users with their histories and recommendations, as titles."""

from __future__ import annotations

from collections.abc import Sequence

from tiger.data.catalog import Catalog
from tiger.data.item_names import shortened
from tiger.data.user_tables import shard_files
from tiger.models.shard import TABLE
from tiger.report.finished import FinishedRun
from tiger.report.markup import Html, escaped

TITLE = "Example users"

_USERS, _HISTORY, _LIST = 6, 6, 6
_CHARACTERS = 140  # of a title


def render(run: FinishedRun) -> Html | None:
    """Return the last items of the first users next to what is recommended to them; None without recommendations."""
    if run.recommendations is None:
        return None
    catalog, parts, folder = run.catalog, [], run.recommendations.folder
    first = shard_files(folder.child(TABLE))[0]
    table = folder.read_table(f"{TABLE}/{first}").slice(0, _USERS)
    of_catalog = "events" not in run.recommendations.metrics  # else the users are those of files
    for row in table.to_pylist():
        history: Sequence[int] = catalog.histories.of(row["user_id"]).tolist() if of_catalog else []
        earlier = len(history) - _HISTORY
        past = "".join(f"<li>{_title(catalog, item)}</li>" for item in history[-_HISTORY:])
        more = f"<p>after {earlier} earlier {'item' if earlier == 1 else 'items'}</p>" if earlier > 0 else ""
        scores = row.get("scores") or [None] * len(row["items"])
        found = "".join(
            f"<li>{_title(catalog, item)}{'' if score is None else f' <i>{score:.2f}</i>'}</li>"
            for item, score in zip(row["items"][:_LIST], scores[:_LIST], strict=True)
            if item >= 0
        )
        parts.append(
            f'<div class="user"><h3>{escaped(row["user"])}</h3><div><h4>took</h4>{more}<ul>{past}</ul></div>'
            f"<div><h4>may take next</h4><ol>{found}</ol></div></div>"
        )
    note = "<p>The last items of the first users, oldest first, and their lists with log-probabilities.</p>"
    return Html(note + "".join(parts))


def _title(catalog: Catalog, item: int) -> str:
    return escaped(shortened(catalog.titles[item], _CHARACTERS))
