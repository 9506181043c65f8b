"""Read a table of a source in the parts that it was cut into."""

from __future__ import annotations

from typing import Any

from tiger.data.prepare import sources
from tiger.data.readers.row_counts import RowCounts


def read_parts(data: sources.SourceData, role: Any) -> tuple[list[Any], dict[str, Any], list[str]]:
    """Return the rows of all parts of a table, their counts, and the columns; NaN equals itself."""
    rows, counts, names = [], RowCounts(role), dict[str, None]()
    for part in range(data.num_parts(role)):
        batches, of_part = data.read(role, part, ("item_id", "user_id"))
        shift = counts.in_order
        for batch in batches:
            names |= dict.fromkeys(batch.schema.names)
            own = batch.to_pylist()
            own = [row | {"time": row["time"] + shift} if of_part.in_order else row for row in own]
            rows += map(repr, own)  # NaN does not equal itself
        counts.add(of_part)
    return rows, counts.record(), list(names)
