"""Sections of raw files: which CSV files are cut, and that reading the sections is reading the whole."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.section_reading import read_parts
from tiger.core.runner import InProcess
from tiger.data.prepare import sources
from tiger.data.readers import sections
from tiger.data.sources.base import DatasetConfig, Files, raw_file

HEADER = "user_id,item_id,timestamp\n"
ROWS = "".join(f'"u{n % 7}","i{n}",{1_500_000_000 + n}\n' for n in range(40))


def cut(path: Path, section: int, chunk: int, **options: Any) -> tuple[sources.SourceData, sources.SourceData]:
    """Return a file in sections, and as a whole."""
    values = {"kind": "tables", "items": [str(path)], "interactions": [str(path)], **options}
    config, files = DatasetConfig.resolve(values), Files([], [raw_file(str(path))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sections, "SECTION_BYTES", section)
        patch.setattr(sections, "_CHUNK", chunk)
        return (
            sources.cut(config, files, sources.scan_files(config, files), InProcess()),
            sources.whole(config, files),
        )


@pytest.mark.parametrize("chunk", [3, 4, 7, 64])
@pytest.mark.parametrize(("text", "is_cut"), [
    (HEADER + ROWS, True),
    (HEADER + ROWS.replace('"', ""), True),
    ("\ufeff" + '"user_id","item_id","timestamp"\n' + ROWS, True),
    (HEADER + ROWS.replace("\n", "\r\n"), True),
    (HEADER + ROWS.replace("i3", 'i""3'), True),
    (HEADER + ROWS.replace("i3", "i,3"), True),
    (HEADER + ROWS.replace("i3", "i\n3"), False),
    (HEADER + ROWS.replace('"i30"', 'i"30'), False),
    (HEADER + ROWS.replace('"i30"', '"i30'), False),
    (HEADER + ROWS.replace('"i30"', ' "i30"'), False),
    ((HEADER + ROWS).replace(",", ";"), True),
    ((HEADER + ROWS).replace(",", "::"), False),
])  # fmt: skip
def test_quoted_tables_are_cut_where_lines_are_records(tmp_path: Path, text: str, is_cut: bool, chunk: int) -> None:
    path = tmp_path / "events.csv"
    path.write_bytes(text.encode())
    parts, whole = cut(path, 100, chunk, separator="::") if "::" in text else cut(path, 100, chunk)
    assert (parts.num_parts("interactions") > 1) == is_cut
    found = read_parts(parts, "interactions")
    assert found == read_parts(whole, "interactions")
    assert found[1]["read"] >= 38


def test_random_quotes_are_read_alike(tmp_path: Path) -> None:
    """Texts of few characters, so that quotes stand everywhere; some hundred of them are cut."""
    rng, path, num_cut = random.Random(0), tmp_path / "events.csv", 0
    fields = ['"a"', "b", '"c""d"', '""', '"e,f"', "7"]
    for _ in range(500):
        odd = rng.choice(["", "", '"', 'x"', '"\n', '" ', "\r"])
        lines = [",".join(rng.choices(fields, k=3)) for _ in range(12)]
        at = rng.randrange(12)
        lines[at] = lines[at].replace(rng.choice(fields), odd, 1) if odd else lines[at]
        path.write_bytes((HEADER + "\n".join(lines) + rng.choice(["", "\n"])).encode())
        parts, whole = cut(path, 20, rng.choice([1, 5, 16]))
        num_cut += parts.num_parts("interactions") > 1
        assert read_parts(parts, "interactions") == read_parts(whole, "interactions"), path.read_text()
    assert num_cut > 100
