"""A catalog to which items were appended after its model was trained: rows of new items, and what is read of all.

Artifacts of kind `semantic_ids` form a chain: each append names the one that it continues, down to the IDs that a model
was trained with. Items keep their indices; those of the catalog come first, then those of each append.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tiger.core.artifacts import Artifact, open_artifact
from tiger.core.errors import ArtifactError, ConfigError, DataError
from tiger.core.storage import Folder
from tiger.data.catalog import Catalog, CatalogConfig
from tiger.data.item_names import ITEMS
from tiger.data.prepare.items import SHOWN, add_texts, find_text_columns, join_by_name
from tiger.data.readers.merge import clean_batches, fullest_rows

DELETED = "deleted.parquet"
KIND = "semantic_ids"


def is_append(semantic_ids: Artifact) -> bool:
    """Return whether semantic IDs are those of an append, and not of a tokenizer's training."""
    return KIND in semantic_ids.manifest["inputs"]


def chain(semantic_ids: Artifact) -> list[Artifact]:
    """Return the semantic IDs of a training and of all appends up to the given one, in this order."""
    found = [semantic_ids]
    while is_append(found[0]):
        found.insert(0, found[0].inputs[KIND])
    return found


def require_chain(semantic_ids: Artifact, model: Artifact) -> None:
    """Check that semantic IDs continue those that a model was trained with.

    Raises:
        ArtifactError: they continue other ones, or the model has none.
    """
    if KIND not in model.inputs:
        raise ArtifactError(f"{model.folder.uri} was trained without semantic IDs; items cannot be appended to it")
    origin, trained = chain(semantic_ids)[0], model.inputs[KIND]
    if origin.fingerprint != trained.fingerprint:
        raise ArtifactError(
            f"{semantic_ids.folder.uri} continues {origin.home.uri}, but the model was trained with "
            f"{trained.home.uri}; append the items to this model (tiger append MODEL)"
        )


def open_append(folder: str | None, model: Artifact, key: str) -> dict[str, Artifact]:
    """Return the semantic IDs of an append to a model's, by their kind; nothing without a folder.

    Args:
        folder: their folder.
        model: model artifact.
        key: the configuration key that names the folder, for messages.

    Raises:
        ArtifactError: they do not continue those of the model.
        ConfigError: they are not in the model's folder.
    """
    if folder is None:
        return {}
    opened = open_artifact(folder.rstrip("/"), expected_kind=KIND)
    require_chain(opened, model)
    if opened.home.parent.uri != model.home.parent.uri:
        raise ConfigError(f"{key}: {opened.home.uri} is not in the model's folder, {model.home.parent.uri}")
    return {KIND: opened}


class GrownCatalog(Catalog):
    """A catalog with the items of appends, deleted ones included; the histories are those of the catalog."""

    def __init__(self, catalog: Artifact | str, semantic_ids: Artifact) -> None:
        """Open a catalog with the items of an append."""
        super().__init__(catalog)
        self.semantic_ids = semantic_ids
        self.n_items = semantic_ids.metrics["items"]

    @property
    def items_folder(self) -> Folder:
        """The folder with items.parquet."""
        return self.semantic_ids.folder

    @cached_property
    def items(self) -> pa.Table:
        """items.parquet of the append: all items, in the order of item ids."""
        return self.semantic_ids.folder.read_table(ITEMS)


def open_catalog(catalog: Artifact, semantic_ids: Artifact | None = None) -> Catalog:
    """Return the catalog of a model, with the items of an append if its semantic IDs are given."""
    if semantic_ids is not None and is_append(semantic_ids):
        return GrownCatalog(catalog, semantic_ids)
    return Catalog(catalog)


def items_folder(catalog: Artifact, semantic_ids: Artifact | None = None) -> Folder:
    """Return the folder with items.parquet of a catalog, or of an append to it."""
    return open_catalog(catalog, semantic_ids).items_folder


def available_items(semantic_ids: Artifact) -> npt.NDArray[np.bool_] | None:
    """Return which items may be recommended, bool [items]: those that are not deleted; None for all."""
    if not is_append(semantic_ids):
        return None
    available = np.ones(semantic_ids.metrics["items"], bool)
    available[np.asarray(semantic_ids.folder.read_table(DELETED)["item_id"])] = False
    return None if available.all() else available


@dataclass(frozen=True)
class MergedItems:
    """Published items with the rows of files.

    Attributes:
        items: all items, with the columns of the published ones: those with updated fields, and the new ones behind.
        new: number of new items.
        updates: int64, the published items that the files have again.
        duplicates: rows left out because the files have a fuller one for the item.
        ignored: columns that the published items do not have.
    """

    items: pa.Table
    new: int
    updates: npt.NDArray[np.int64]
    duplicates: int
    ignored: list[str]

    @property
    def updated(self) -> int:
        """Number of published items that the files have again."""
        return len(self.updates)


def merge_items(published: pa.Table, batches: Iterable[pa.RecordBatch], config: CatalogConfig) -> MergedItems:
    """Merge rows of new and updated items into the table of published ones.

    Rows are cleaned, and of several for one item the fullest is kept, by the rules of the catalog. An update replaces
    all fields, and the text, of an item; its vectors and its semantic ID stay.

    Args:
        published: items.parquet.
        batches: rows of the files: `source_id` and fields.
        config: the catalog's options.

    Raises:
        DataError: a text field is missing, or a field's type is not that of the published items.
    """
    named: dict[str, None] = {}
    rows = list(clean_batches(batches, (*config.text_fields, *SHOWN), named))
    if not sum(len(table) for table in rows):
        return MergedItems(published, 0, np.zeros(0, np.int64), 0, [])
    table = join_by_name(rows)
    given = fullest_rows(table)
    duplicates = len(table) - len(given)
    columns = find_text_columns(config.text_fields, given.column_names)
    ignored = sorted(set(named) - set(published.column_names))
    made = {"item_id", "text", *({"category_leaf"} if "category_leaf" not in given.column_names else ())}
    fields = [field for field in published.schema if field.name not in made]
    table = add_texts(_as_published(given, fields), columns)
    table = _as_published(table, list(published.schema))
    at = pc.index_in(table["source_id"], value_set=published["source_id"])
    updates, new = table.filter(at.is_valid()), table.filter(at.is_null())
    order = np.arange(len(published))
    known = np.asarray(at.drop_null()).astype(np.int64)
    order[known] = len(published) + np.arange(len(updates))
    merged = pa.concat_tables([pa.concat_tables([published, updates]).take(pa.array(order)), new])
    numbers = pa.array(np.arange(len(merged)), published.schema.field("item_id").type)
    merged = merged.set_column(merged.column_names.index("item_id"), "item_id", numbers)
    return MergedItems(merged, len(new), known, duplicates, ignored)


def _as_published(table: pa.Table, fields: list[pa.Field]) -> pa.Table:
    """Return the columns of the published items, null where the table does not have them.

    Text in place of a number is read as one, and text in place of a list as a list of it.
    """
    columns = []
    for field in fields:
        if field.name not in table.column_names:
            columns.append(pa.nulls(len(table), field.type))
            continue
        column = table[field.name].combine_chunks()
        try:
            while _depth(column.type) < _depth(field.type):
                ends = np.cumsum(np.asarray(column.is_valid()), dtype=np.int32)
                offsets = pa.array(np.concatenate([[0], ends]).astype(np.int32))
                column = pa.ListArray.from_arrays(offsets, column.drop_null(), mask=column.is_null())
            columns.append(column.cast(field.type))
        except pa.ArrowException as error:
            reason = str(error).partition("\n")[0][:200]
            raise DataError(
                f"append.items: the column {field.name} has type {table[field.name].type}, that of the catalog "
                f"{field.type}: {reason}"
            ) from None
    return pa.table(columns, schema=pa.schema(fields))


def _depth(kind: pa.DataType) -> int:
    """Return how many lists a type is nested in."""
    nested = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return 1 + _depth(kind.value_type) if nested else 0
