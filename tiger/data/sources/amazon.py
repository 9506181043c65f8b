"""Amazon review data of the McAuley lab: 2014, 2018 and 2023, metadata and reviews, plain or gzip.

The generations differ in field names and units; a record is read by the field names that it has:

            item id               user id      time                    brand    categories
    2014    asin                  reviewerID   unixReviewTime (s)      brand    categories: list of paths
    2018    asin                  reviewerID   unixReviewTime (s)      brand    category: one path
    2023    parent_asin           user_id      timestamp (ms)          store    categories: one path

2014 metadata contain one Python dict literal per line, which is not JSON; all other files contain JSON lines.
Sources: https://cseweb.ucsd.edu/~jmcauley/datasets/amazon/links.html (2014),
https://cseweb.ucsd.edu/~jmcauley/datasets/amazon_v2/ (2018), https://amazon-reviews-2023.github.io (2023).
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field, model_validator

from tiger.core.errors import DataError
from tiger.data.download import download
from tiger.data.readers.raw_files import files_in
from tiger.data.readers.row_counts import listed
from tiger.data.readers.sections import Scan, text_sections
from tiger.data.sources.base import (
    INTERACTIONS,
    DatasetConfig,
    Files,
    InvalidRow,
    RawFile,
    Role,
    RowCounts,
    batches,
    expand,
    identifier,
    lines,
    log_files,
    parse_record,
    unix_micros,
)

ITEMS = pa.schema(
    [
        ("source_id", pa.string()),
        ("title", pa.string()),
        ("brand", pa.string()),
        ("categories", pa.list_(pa.list_(pa.string()))),
        ("price", pa.float64()),
        ("description", pa.string()),
        ("features", pa.list_(pa.string())),
    ]
)

_TEXTS = ("title", "brand", "categories", "description", "features")

_FILE, _FIVE_CORE = re.compile(r"\.jsonl?(\.gz)?$"), re.compile(r"_5\.jsonl?(\.gz)?$")

_URLS = {
    "2014": (
        "http://snap.stanford.edu/data/amazon/productGraph/categoryFiles/meta_{category}.json.gz",
        "http://snap.stanford.edu/data/amazon/productGraph/categoryFiles/reviews_{category}_5.json.gz",
    ),
    "2018": (
        "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2/metaFiles2/meta_{category}.json.gz",
        "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2/categoryFilesSmall/{category}_5.json.gz",
    ),
    "2023": (
        "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_2023/raw/meta_categories/meta_{category}.jsonl.gz",
        "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_2023/raw/review_categories/{category}.jsonl.gz",
    ),
}


class Config(DatasetConfig):
    """Location of the files: a folder, single files or URLs, or a category to download."""

    kind: str = Field("amazon", description="source of raw data: synthetic, amazon, tables, or a dotted module name")
    path: str | None = Field(None, description="folder or URI (s3://, gs://) with meta_* and the review files")
    items: list[str] = Field([], description="metadata files or URLs, if no folder or category is given")
    interactions: list[str] = Field([], description="review files or URLs, if no folder or category is given")
    category: str | None = Field(
        None, pattern=r"^\w+$", description="public category to download, such as Beauty or Toys_and_Games"
    )
    version: Literal["2014", "2018", "2023"] = Field("2014", description="generation of the category to download")

    # file contents are fingerprinted, not their location
    unfingerprinted = DatasetConfig.unfingerprinted | {"path", "items", "interactions", "category", "version"}

    @model_validator(mode="after")
    def _one_source(self) -> Config:
        if self.path is None and self.category is None and not (self.items and self.interactions):
            raise ValueError("set path (a folder), category (to download), or both items and interactions")
        return self


def locate(config: Config, cache: Path) -> Files:
    """Find the files in the folder, or download them.

    Raises:
        DataError: a file or folder is missing, or the folder contains no metadata or no reviews.
    """
    if config.items and config.interactions:
        return log_files(Files(expand(config.items, "data.items"), expand(config.interactions, "data.interactions")))
    if config.path is None:
        items, interactions = (url.format(category=config.category) for url in _URLS[config.version])
        return log_files(Files([download(items)], [download(interactions)]))
    found = files_in(config.path, "data.path")
    names_found = [file for file in found if _FILE.search(file.name)]
    items_found = [file for file in names_found if file.name.startswith("meta_")]
    reviews = [file for file in names_found if not file.name.startswith("meta_")]
    five_core = {_FILE.sub("", file.name) for file in reviews if _FIVE_CORE.search(file.name)}
    reviews = [file for file in reviews if f"{_FILE.sub('', file.name)}_5" not in five_core]
    if not items_found or not reviews:
        raise DataError(
            f"{config.path} needs meta_*.json[.gz] and reviews_*.json[.gz]; it contains "
            f"{listed(file.name for file in found) or 'no files'}; correct data.path"
        )
    return log_files(Files(items_found, reviews))


def parts(config: DatasetConfig, role: Role, files: list[RawFile], scans: list[Scan]) -> list[RawFile] | None:
    """Return sections of the files that can be read independently, in order; None: they are read as a whole."""
    if role == "items" and not any(map(_is_usable, itertools.islice(lines(files[0]), 1_000))):
        return None  # reading all of it tells whether any row can be used
    return [section for file, scanned in zip(files, scans, strict=True) for section in text_sections(file, scanned)]


def _is_usable(line: tuple[int, bytes | None]) -> bool:
    try:
        return any(_item(parse_record(line[1]))[name] for name in _TEXTS)
    except InvalidRow:
        return False


def read_items(
    config: DatasetConfig, files: Files, ledger: RowCounts, fields: Collection[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """Yield metadata rows with schema ITEMS, in file order.

    Args:
        config: the options.
        files: the files to read.
        ledger: counts of rows.
        fields: the fields to return; an empty batch with all fields comes first then. None: all.

    Raises:
        DataError: no row of all files has a title, brand, category, description or feature; lists the fields that were
            found.
    """
    found_fields: Counter[str] = Counter()
    usable = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal usable
        for path in files.items:
            for number, line in lines(path):
                try:
                    record = parse_record(line)
                    found_fields.update(str(key) for key in record)
                    row = _item(record)
                except InvalidRow as reason:
                    ledger.skip(path, number, str(reason), reason.detail)
                    continue
                ledger.keep()
                usable += any(row[name] for name in _TEXTS)
                yield row

    schema = ITEMS
    if fields is not None:
        yield pa.RecordBatch.from_pylist([], schema=ITEMS)
        schema = pa.schema([field for field in ITEMS if field.name == "source_id" or field.name in fields])
    yield from batches(rows(), schema)
    if found_fields and not usable and not files.partial:
        found = ", ".join(f"{name} ({count:,})" for name, count in found_fields.most_common(20))
        raise DataError(
            f"{', '.join(map(str, files.items))}: no row has an item id and a title, brand, categories or "
            f"description; fields found: {found}. Another format? Read it with data.kind=tables"
        )


def read_interactions(config: DatasetConfig, files: Files, ledger: RowCounts) -> Iterator[pa.RecordBatch]:
    """Yield reviews with schema INTERACTIONS, in file order."""

    def rows() -> Iterator[dict[str, Any]]:
        for path in files.interactions:
            for number, line in lines(path):
                try:
                    row = _interaction(parse_record(line))
                except InvalidRow as reason:
                    ledger.skip(path, number, str(reason), reason.detail)
                    continue
                ledger.keep()
                yield row

    return batches(rows(), INTERACTIONS)


def _item(record: dict[str, Any]) -> dict[str, Any]:
    return {
        "source_id": identifier(_first(record, "parent_asin", "asin"), "asin or parent_asin"),
        "title": _text(record.get("title")),
        "brand": _text(_first(record, "brand", "store")),
        "categories": _paths(_first(record, "categories", "category")),
        "price": _price(record.get("price")),
        "description": _text(record.get("description")),
        "features": _strings(_first(record, "features", "feature")),
    }


def _interaction(record: dict[str, Any]) -> dict[str, Any]:
    user = identifier(_first(record, "reviewerID", "user_id"), "reviewerID or user_id")
    item = identifier(_first(record, "parent_asin", "asin"), "asin or parent_asin")
    if "unixReviewTime" in record:
        return {"user": user, "item": item, "time": unix_micros(record["unixReviewTime"], "s")}
    return {"user": user, "item": item, "time": unix_micros(record.get("timestamp"), "ms")}


def _first(record: dict[str, Any], *names: str) -> Any:
    return next((record[name] for name in names if record.get(name) is not None), None)


def _text(value: Any) -> str | None:
    """Join a string, a number, a list of texts, or a dict of texts into one string; None if it is empty."""
    text = " ".join(_strings(value))
    return text or None


def _strings(value: Any) -> list[str]:
    if value is None or isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
        return []
    if isinstance(value, dict):
        return [f"{key}: {text}" for key, inner in value.items() for text in _strings(inner)]
    if isinstance(value, (list, tuple, set, frozenset)):
        inner_values = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
        return list(itertools.chain.from_iterable(map(_strings, inner_values)))
    text = str(value).strip()
    return [text] if text else []


def _paths(value: Any) -> list[list[str]]:
    """Return categories as a list of paths: 2014 has a list of paths, later years have a single one."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(path, (list, tuple)) for path in value):
        return [path for path in map(_strings, value) if path]
    path = _strings(value)
    return [path] if path else []


def _price(value: Any) -> float | None:
    """Parse a price from a number or from text such as "$1,299.00"; for a range, return the lower end."""
    if isinstance(value, str):
        match = re.search(r"\d[\d,]*(?:\.\d+)?", value[:64])
        value = match.group().replace(",", "") if match else None
    if value is None or isinstance(value, (bool, list, dict, tuple, set)):
        return None
    try:
        price = float(value)
    except (ValueError, OverflowError):
        return None
    return price if math.isfinite(price) and price >= 0 else None
