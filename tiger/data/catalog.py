"""Raw rows -> the catalog: items with dense ids and one text each, users with histories in time order, and splits.

Rules, in the order in which they are applied; every row that one of them drops is counted in the profile.

1. Of several rows for one item, the most complete one (most non-empty fields) is kept; ties are broken by the
   lexicographic order of the cleaned fields, so that the result does not depend on the order of rows or files. The
   fields are those of the text, the title, the categories and the price; others are not kept.
2. Interactions with items that have no row in the catalog are dropped; above
   `max_unknown_item_fraction` the stage fails.
3. Equal interactions (user, item and time) count once; of a user's several interactions with one item the first in
   time is kept (`repeats = "first"`), or all are.
4. k-core: users and items with fewer than `k_core` interactions are dropped iteratively until convergence.
5. Items and users are numbered in the order of their source ids. Items without interactions are left out.
6. A history is in time order, to the microsecond. Ties are broken by `tie_break`: file order, at random by `seed` (a
   hash of user and item), or item id.
7. leave-one-out: a user's last item is the test target, the one before it the validation target, the remaining ones
   are for training (TIGER, section 4.1). temporal: two points in time cut all histories; the first item after each is a
   target.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field

from tiger.core.artifacts import Artifact, open_artifact
from tiger.core.config import Config
from tiger.core.errors import ArtifactError
from tiger.core.external_sort import MemoryStore
from tiger.core.runner import InProcess
from tiger.core.storage import Folder
from tiger.data.histories import Histories, read_histories
from tiger.data.item_names import display_titles
from tiger.data.prepare.build import DROPPED_INTERACTIONS, ONE_RANGE, UNKNOWN, build_catalog, check_unknown
from tiger.data.prepare.raw import Batches, Unchecked
from tiger.data.readers.row_counts import RowCounts
from tiger.data.texts import TextColumn


class CatalogConfig(Config):
    """How raw rows become items, texts and histories."""

    text_fields: list[str] = Field(
        ["title", "brand", "categories", "price", "description"],
        min_length=1,
        description="fields of an item's text, in order",
    )
    k_core: int = Field(5, ge=0, description="minimum interactions per user and item (0 = no filter)")
    duplicates: Literal["first", "all"] = Field("first", description="which of a user's interactions per item to keep")
    tie_break: Literal["file", "shuffle", "id"] = Field(
        "file", description="order of a user's interactions at equal times"
    )
    split: Literal["leave-one-out", "temporal"] = Field(
        "leave-one-out", description="how evaluation targets are chosen"
    )
    valid_fraction: float = Field(0.1, gt=0, lt=0.5, description="temporal: fraction of interactions for validation")
    test_fraction: float = Field(0.1, gt=0, lt=0.5, description="temporal: fraction of interactions for testing")
    max_unknown_item_fraction: float = Field(
        0.05, ge=0, le=1, description="maximum fraction of interactions with unknown items"
    )
    seed: int = Field(0, ge=0, description="seed of shuffled ties")

    unfingerprinted = frozenset({"max_unknown_item_fraction"})  # a limit that does not affect the stage's output


class Catalog:
    """A catalog artifact, or its folder; tables are read on first access."""

    def __init__(self, artifact: Artifact | str) -> None:
        artifact = open_artifact(artifact) if isinstance(artifact, str) else artifact
        if artifact.kind != "catalog":
            raise ArtifactError(f"{artifact.folder.uri} is a {artifact.kind} artifact where a catalog is needed")
        self.artifact = artifact
        self.n_items: int = artifact.metrics["items"]

    @property
    def items_folder(self) -> Folder:
        """The folder with items.parquet."""
        return self.artifact.folder

    @cached_property
    def items(self) -> pa.Table:
        """items.parquet: one row per item, in the order of item ids."""
        return self.artifact.folder.read_table("items.parquet")

    @cached_property
    def titles(self) -> list[str]:
        """Display title of each item, see `display_titles`."""
        titles: list[str] = display_titles(self.items).to_pylist()
        return titles

    @cached_property
    def source_ids(self) -> Sequence[str]:
        """Original id of each item in the raw data."""
        return TextColumn(self.items["source_id"])

    @cached_property
    def item_index(self) -> dict[str, int]:
        """Index of each item by its original id."""
        return {name: item for item, name in enumerate(self.source_ids)}

    @cached_property
    def histories(self) -> Histories:
        """All users' histories."""
        return read_histories(self.artifact.folder)


def check_limits(artifact: Artifact, max_bad_row_fraction: float, max_unknown_item_fraction: float) -> None:
    """Compare the counts of a finished catalog with the limits, which may be stricter than when it was made.

    The limits are not part of its fingerprint, because they do not change its content.

    Raises:
        DataError: more rows were skipped, or more interactions dropped because their items are unknown, than allowed.
    """
    for table, record in artifact.metrics["rows"].items():
        RowCounts.from_record(table, record).check(max_bad_row_fraction)
    profile = artifact.folder.read_json("profile.json")
    dropped = profile["dropped"]
    read = profile["interactions"] + sum(dropped.get(what, 0) for what in DROPPED_INTERACTIONS)
    check_unknown(dropped[UNKNOWN], read, max_unknown_item_fraction)


def make(
    config: CatalogConfig, items: Iterable[pa.RecordBatch], interactions: Iterable[pa.RecordBatch], folder: Folder
) -> dict[str, Any]:
    """Apply the rules above in this process, write items.parquet, histories.parquet and profile.json.

    Returns:
        The profile.

    Raises:
        DataError: no item or user is left, a text field does not exist, too many interactions have unknown items, or a
            split by time leaves no validation or test users.
    """
    return build_catalog(
        config, Batches(items, interactions), folder, store=MemoryStore(), runner=InProcess(), sizes=ONE_RANGE,
        reading=Unchecked(),
    )  # fmt: skip
