"""Explore semantic IDs: metrics of their quality, and an HTML page of their prefixes.

    tiger explore RUN [--page FILE.html]
    tiger explore CODES.parquet [--page FILE.html]

RUN is a semantic_ids artifact, or the folder that contains one. CODES.parquet is any Parquet file with a column `codes`
(lists of equal length) and optionally `item_id`, `title`, `category`, `vector`.
"""

from __future__ import annotations

import argparse
import html
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tiger.core.artifacts import Artifact, newest, open_artifact
from tiger.core.config import MAX_LISTED
from tiger.core.errors import DataError, TigerError
from tiger.core.storage import MANIFEST, Folder
from tiger.embedding.vectors import load_embeddings
from tiger.metrics.codes import category_agreement, code_metrics, gini, nearest_neighbors, neighbor_prefix_agreement
from tiger.semantic_ids.assignment import SemanticIds, packed

_CATEGORY_COLUMNS = ("category_leaf", "category")
_MOST_CODES = 1 << 24  # per level; each is counted
_WORD = re.compile(r"[^\W\d_]{3,}")


@dataclass(frozen=True)
class CodedItems:
    """Items with their codes, titles, categories and embeddings.

    Attributes:
        codes: [N, L], without the collision level.
        sizes: number of codes per level.
        collisions: [N], collision codes; zeros if there is no collision level.
        names: [N], titles, or ids if there are no titles.
        categories: [N], None for an item without one; None if there is no such column.
        vectors: float32 [N, d], embeddings; None if there are none.
        reconstruction_error: reconstruction error of these codes, as recorded in their artifact.
        unique_of_nearest: unique ratio of the codes before collisions were resolved, likewise.
    """

    codes: npt.NDArray[np.int64]
    sizes: tuple[int, ...]
    collisions: npt.NDArray[np.int64]
    names: list[str]
    categories: list[str | None] | None = None
    vectors: npt.NDArray[np.float32] | None = None
    reconstruction_error: float | None = None
    unique_of_nearest: float | None = None


# --- metrics ----------------------------------------------------------------------------------------------------


def figures(items: CodedItems) -> dict[str, float]:
    """Return all metrics in one flat dict; `report` describes them."""
    found: dict[str, float] = {"items": len(items.codes)}
    for level, size in enumerate(items.sizes):
        found[f"gini@{level + 1}"] = gini(np.bincount(items.codes[:, level], minlength=size))
    found |= code_metrics(items.codes, items.sizes)
    whole = np.concatenate([items.codes, items.collisions[:, None]], axis=1)
    found["unique_ratio_with_collision_level"] = len(np.unique(packed(whole))) / len(whole)
    found["largest_group"] = int(np.unique(packed(items.codes), return_counts=True)[1].max())
    if items.unique_of_nearest is not None:
        found["unique_ratio_of_nearest_codes"] = items.unique_of_nearest
    if items.reconstruction_error is not None:
        found["reconstruction_error"] = items.reconstruction_error
    if items.vectors is not None:
        found |= neighbor_prefix_agreement(items.codes, nearest_neighbors(items.vectors))
    if items.categories is not None:
        for depth in range(1, items.codes.shape[1] + 1):
            found[f"category_agreement@{depth}"], found["category_agreement of any two items"] = category_agreement(
                items.codes, items.categories, depth
            )
    return found


def largest_groups(items: CodedItems, count: int = 3) -> list[tuple[tuple[int, ...], list[str]]]:
    """Return the tuples of codes shared by the most items (at least two), with these items' names; largest first."""
    _, inverse, sizes = np.unique(packed(items.codes), return_inverse=True, return_counts=True)
    groups = []
    for key in np.argsort(-sizes, kind="stable")[:count]:
        if sizes[key] > 1:
            members = np.flatnonzero(inverse == key)
            groups.append((tuple(items.codes[members[0]].tolist()), [items.names[member] for member in members]))
    return groups


def report(items: CodedItems) -> str:
    """Format the metrics as a table by level, and the largest groups by name."""
    found, levels = figures(items), range(1, items.codes.shape[1] + 1)
    lines = [f"{'':<34}" + "".join(f"level {level:<6}" for level in levels)]
    meanings = {
        "usage": "codebook utilization",
        "perplexity": "perplexity (effective codes)",
        "gini": "Gini of code frequencies",
        "unique": "distinct prefixes / items",
        "overlap": "neighbors with the same prefix",
        "category_agreement": "category agreement of pairs",
    }
    for name, meaning in meanings.items():
        if f"{name}@1" in found:
            lines.append(f"{meaning:<34}" + "".join(f"{found.pop(f'{name}@{level}'):<12.4g}" for level in levels))
    lines += ["", *(f"{name.replace('_', ' '):<34}{value:.6g}" for name, value in found.items())]
    for codes, names in largest_groups(items):
        lines += ["", f"{len(names)} items share {codes}:", *(f"  {name}" for name in names[:8])]
        lines += [f"  ... and {len(names) - 8} more"] if len(names) > 8 else []
    return "\n".join(lines)


# --- HTML page --------------------------------------------------------------------------------------------------


def distinctive_words(names: list[str], among: Counter[str], total: int, count: int = 5) -> list[str]:
    """Return the words with the largest p log(p / q): p is their frequency in the group, q the overall frequency.

    Args:
        names: names of the group.
        among: number of all names in which each word occurs.
        total: number of all names.
        count: maximum number of words.
    """
    own = Counter(word for name in names for word in title_words(name))
    score = {w: n / len(names) * np.log((n / len(names)) / (among[w] / total)) for w, n in own.items() if n > 1}
    return [word for word in sorted(score, key=lambda word: (-score[word], word)) if score[word] > 0][:count]


def title_words(name: str) -> set[str]:
    """Return the words of a name that `distinctive_words` counts: three letters or more, in lower case."""
    return {word.lower() for word in _WORD.findall(name)}


def prefix_tree(items: CodedItems, examples: int = 5, widest: Sequence[int] = (300,)) -> str:
    """Render the tree of prefixes as nested HTML lists to be opened: sizes, distinctive words, categories, titles.

    Args:
        items: the items.
        examples: maximum titles per tuple of codes.
        widest: maximum children per prefix by level, largest first; the last number is for all further levels. The
            number of omitted ones is shown.
    """
    among = Counter(word for name in items.names for word in title_words(name))
    order = np.argsort(packed(items.codes), kind="stable")

    def children(rows: npt.NDArray[np.int64], depth: int) -> Iterator[str]:
        codes, most = items.codes[rows, depth], widest[min(depth, len(widest) - 1)]
        starts = np.flatnonzero(np.concatenate([[True], codes[1:] != codes[:-1]]))
        groups = sorted(np.split(rows, starts[1:]), key=len, reverse=True)
        for group in groups[:most]:
            yield node(group, depth + 1)
        if len(groups) > most:
            left = sum(map(len, groups[most:]))
            yield f"<p>{len(groups) - most} smaller ones, with {left:,} items, are not shown</p>"

    def node(rows: npt.NDArray[np.int64], depth: int) -> str:
        prefix = ", ".join(str(code) for code in items.codes[rows[0], :depth])
        names = [items.names[row] for row in rows]
        if depth == items.codes.shape[1]:
            more = f" <i>and {len(names) - examples} more</i>" if len(names) > examples else ""
            return f"<p><code>{prefix}</code> {'; '.join(map(html.escape, names[:examples]))}{more}</p>"
        about = html.escape(", ".join(distinctive_words(names, among, len(items.names))) or names[0])
        if items.categories is not None:
            known = Counter(items.categories[row] for row in rows if items.categories[row] is not None)
            if known:
                name, count = known.most_common(1)[0]
                about += f" <i>{html.escape(str(name))}: {count / len(rows):.0%}</i>"
        head = f"<code>{prefix}</code> <b>{len(rows):,}</b> {about}"
        return f"<details><summary>{head}</summary>{''.join(children(rows, depth))}</details>"

    return "".join(children(order, 0))


def page(items: CodedItems) -> str:
    """Render the whole tree of prefixes and the metrics as one HTML page without scripts."""
    style = (
        "body{font:14px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em}"
        "details details,details p{margin-left:1.5em}p{margin:.1em 0}i{color:#57606a}"
        "code{background:#eff1f3;padding:0 .3em}summary{cursor:pointer}"
        "@media(prefers-color-scheme:dark){body{background:#0d1117;color:#e6edf3}code{background:#262c36}i{color:#9198a1}}"
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Semantic IDs</title>'
        f'<meta name="viewport" content="width=device-width"><style>{style}</style>'
        f"<h1>Semantic IDs of {len(items.codes):,} items</h1>"
        "<p>Each line is a prefix: its codes, the number of items with it, the distinctive words of their titles, and "
        "their most frequent category.</p>"
        f"{prefix_tree(items)}<h2>Metrics</h2><pre>{html.escape(report(items))}</pre></html>\n"
    )


# --- inputs -----------------------------------------------------------------------------------------------------


def of_artifact(artifact: Artifact) -> CodedItems:
    """Read the items of a semantic_ids artifact, with titles, categories and embeddings from its inputs."""
    ids = SemanticIds.read(artifact.folder)
    inputs = artifact.inputs
    embeddings = inputs.get("item_vectors") or inputs["embeddings"]  # what was quantized
    table = embeddings.folder.read_table("items.parquet")
    return CodedItems(
        codes=ids.codes[:, : ids.levels].astype(np.int64),
        sizes=ids.level_sizes[: ids.levels],
        collisions=ids.collisions.astype(np.int64),
        names=_names(table),
        categories=_categories(table),
        vectors=load_embeddings(embeddings.folder).numpy(),
        reconstruction_error=artifact.metrics["reconstruction_error"],
        unique_of_nearest=artifact.metrics["unique_ratio_of_nearest_codes"],
    )


def of_parquet(path: str) -> CodedItems:
    """Read the items of any Parquet file with a column `codes`.

    Raises:
        DataError: no such file, no column `codes`, or codes that are missing, negative or of different lengths.
    """
    if not Path(path).is_file():
        raise DataError(f"{path} does not exist")
    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} is not a Parquet file: {error}") from None
    if "codes" not in table.column_names:
        names = ", ".join(table.column_names[:MAX_LISTED])
        raise DataError(f"{path} has no column `codes`; its columns: {names}")
    rows = table["codes"].to_pylist()
    width = len(rows[0] or []) if rows else 0
    for number, row in enumerate(rows):
        if not row or len(row) != width or any(not isinstance(code, int) or code < 0 for code in row):
            raise DataError(f"{path}, row {number}: codes must be {width or 'some'} integers from 0, not {row}")
        if max(row) >= _MOST_CODES:
            raise DataError(f"{path}, row {number}: codes must be less than {_MOST_CODES:,}, not {max(row)}")
    if not rows:
        raise DataError(f"{path} has no rows")
    codes = np.array(rows, np.int64)
    return CodedItems(
        codes=codes,
        sizes=tuple(int(size) for size in codes.max(axis=0) + 1),
        collisions=np.zeros(len(codes), np.int64),
        names=_names(table),
        categories=_categories(table),
        vectors=np.array(table["vector"].to_pylist(), np.float32) if "vector" in table.column_names else None,
    )


def _names(table: pa.Table) -> list[str]:
    for column in ("title", "source_id", "item_id"):
        if column in table.column_names:
            return ["(no title)" if value in (None, "") else str(value) for value in table[column].to_pylist()]
    return [f"row {number}" for number in range(table.num_rows)]


def _categories(table: pa.Table) -> list[str | None] | None:
    for column in _CATEGORY_COLUMNS:
        if column in table.column_names:
            return [None if value is None else str(value) for value in table[column].to_pylist()]
    return None


def main(arguments: list[str]) -> int:
    """Print the report and, with `--page`, write the HTML page; return the exit code."""
    parser = argparse.ArgumentParser(
        "tiger explore", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("source", help="a run, a semantic_ids artifact, or a Parquet file with a column `codes`")
    parser.add_argument("--page", metavar="FILE.html", help="write an HTML explorer of the prefixes")
    options = parser.parse_args(arguments)
    try:
        if options.source.endswith(".parquet"):
            items = of_parquet(options.source)
        elif Folder(options.source).exists(MANIFEST):
            items = of_artifact(open_artifact(options.source, expected_kind="semantic_ids"))
        else:
            items = of_artifact(newest(options.source, "semantic_ids"))
        print(report(items))
        if options.page:
            Path(options.page).write_text(page(items), encoding="utf-8")
            print(f"\n{options.page}: open it in a browser")
    except TigerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
