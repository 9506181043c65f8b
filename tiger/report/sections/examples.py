"""Users with their histories and recommendations, as titles."""

from __future__ import annotations

from tiger.data.catalog import Catalog
from tiger.report.finished import FinishedRun
from tiger.report.markup import Html, escaped

TITLE = "Example users"

_USERS, _HISTORY, _LIST = 6, 6, 6
_CHARACTERS = 140  # of a title


def render(run: FinishedRun) -> Html | None:
    """Return the last items of the first users next to what is recommended to them; None without recommendations."""
    if run.recommendations is None:
        return None
    catalog, parts = run.catalog, []
    table = run.recommendations.folder.read_table("recommendations").slice(0, _USERS)
    for user, items, scores in zip(*(table[name].to_pylist() for name in table.column_names), strict=True):
        history = catalog.histories.of(user)
        earlier = len(history) - _HISTORY
        past = "".join(f"<li>{_title(catalog, item)}</li>" for item in history[-_HISTORY:])
        more = f"<p>after {earlier} earlier ones</p>" if earlier > 0 else ""
        found = "".join(
            f"<li>{_title(catalog, item)} <i>{score:.2f}</i></li>"
            for item, score in zip(items[:_LIST], scores[:_LIST], strict=True)
            if item >= 0
        )
        name = escaped(catalog.histories.source_ids[user])
        parts.append(
            f'<div class="user"><h3>{name}</h3><div><h4>took</h4>{more}<ul>{past}</ul></div>'
            f"<div><h4>may take next</h4><ol>{found}</ol></div></div>"
        )
    note = "<p>The last items of the first users, oldest first, and their lists with log-probabilities.</p>"
    return Html(note + "".join(parts))


def _title(catalog: Catalog, item: int) -> str:
    title = catalog.titles[item]
    return escaped(title if len(title) <= _CHARACTERS else f"{title[:_CHARACTERS]}...")
