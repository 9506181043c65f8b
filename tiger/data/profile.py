"""The profile of a catalog: counts, missing values, quantiles."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tiger.data.histories import Histories
from tiger.data.readers.merge import PIECE, num_distinct

_QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)


def build_profile(
    table: pa.Table, histories: Histories, dropped: dict[str, int], text_fields: list[str]
) -> dict[str, Any]:
    """Return the counts and quantiles of a catalog, for profile.json and for its health checks."""
    columns = {name: _missing_and_distinct(table[name]) for name in table.column_names}
    return {
        "items": table.num_rows,
        "users": len(histories),
        "interactions": len(histories.items),
        "training_examples": histories.training_examples(),
        "validation_users": len(histories.evaluation("valid")),
        "test_users": len(histories.evaluation("test")),
        "text_fields": text_fields,
        "columns": columns,
        "text_characters": _quantiles(np.asarray(pc.utf8_length(table["text"]))),
        "history_length": _quantiles(np.diff(histories.offsets)),
        "dropped": dropped,
    }


def _missing_and_distinct(column: pa.ChunkedArray) -> dict[str, int]:
    if not pa.types.is_nested(column.type):
        present = column.drop_null()
        if pa.types.is_string(column.type):
            present = present.filter(pc.not_equal(present, ""))
        return {"missing": len(column) - len(present), "distinct": num_distinct(present)}
    missing, distinct = 0, set()
    for begin in range(0, len(column), PIECE):
        for value in column.slice(begin, PIECE).to_pylist():
            if value in (None, []):
                missing += 1
            else:
                distinct.add(
                    hash(json.dumps(value, sort_keys=True, default=str))
                )  # hashes, because the texts themselves take gigabytes
    return {"missing": missing, "distinct": len(distinct)}


def _quantiles(values: npt.NDArray[Any]) -> dict[str, float]:
    return {f"{q:.0%}": float(np.quantile(values, q)) for q in _QUANTILES} | {"mean": round(float(values.mean()), 2)}


def format_profile(profile: dict[str, Any]) -> str:
    """Return the profile as lines of text."""
    lines = [
        f"{profile['items']:,} items, {profile['users']:,} users, {profile['interactions']:,} interactions; "
        f"{profile['training_examples']:,} training examples, {profile['validation_users']:,} validation and "
        f"{profile['test_users']:,} test users"
    ]
    for name, figures in profile["columns"].items():
        lines.append(f"  {name:<16} {figures['distinct']:>9,} distinct {figures['missing']:>9,} missing")
    lines += [
        f"  {name}: " + ", ".join(f"{quantile} {value:g}" for quantile, value in profile[name].items())
        for name in ("text_characters", "history_length")
    ]
    lines.append("  dropped: " + ", ".join(f"{count:,} {what}" for what, count in profile["dropped"].items()))
    return "\n".join(lines)
