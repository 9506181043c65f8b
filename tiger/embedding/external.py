"""External vectors joined to the items of a catalog by their ids."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tiger.core.errors import DataError, HealthError
from tiger.data.readers.lines import foreign_format
from tiger.data.readers.row_counts import listed
from tiger.data.readers.table import Wanted
from tiger.data.readers.values import has_id_type, id_texts
from tiger.data.sources.base import RawFile
from tiger.embedding.encoder import EmbeddingConfig
from tiger.embedding.vectors import unusable

log = logging.getLogger(__name__)


_JOINED_ROWS = 8_192  # imported vectors that are read at a time


_NAMED = 10  # items listed in an error


_FIT = ": numbers are greater than 65,504, or all less than 6e-8; set embedding.storage_dtype = float32"


def own_item_ids(files: Sequence[RawFile], config: EmbeddingConfig) -> list[str]:
    """Return the sorted source ids in files of vectors: the items if vectors are imported without a catalog.

    Raises:
        DataError: a file is not a table, a column is missing or of another type, a row has no id, or there are no rows.
    """
    found: set[str] = set()
    for file, batch in _own_batches(files, config, [config.vectors_id]):
        ids = id_texts(batch.column(config.vectors_id))
        if ids.null_count:
            raise DataError(f"{file}: {ids.null_count:,} rows without {config.vectors_id}")
        found.update(ids.to_pylist())
    if not found:
        raise DataError(f"{_names(files)}: the table has no rows; correct embedding.import_path")
    return sorted(found)


def _names(files: Sequence[RawFile]) -> str:
    return ", ".join(map(str, files[:3])) + (f" and {len(files) - 3:,} more" if len(files) > 3 else "")


def _own_batches(
    files: Sequence[RawFile], config: EmbeddingConfig, columns: list[str]
) -> Iterator[tuple[RawFile, pa.RecordBatch]]:
    for file in files:
        try:
            with file.open() as stream, pq.ParquetFile(stream) as parquet:
                _check_columns(file, parquet.schema_arrow, config)
                for batch in parquet.iter_batches(_JOINED_ROWS, columns=columns):
                    yield file, batch
        except (pa.ArrowException, OSError) as error:
            raise _not_parquet(file, config, error) from None


def _not_parquet(file: RawFile, config: EmbeddingConfig, error: Exception) -> DataError:
    if isinstance(error, OSError) and error.errno is not None:  # of the file system; those of Parquet have none
        return file.unreadable(error)
    with file.open() as stream:
        what = foreign_format(stream.read(16))
    if what:
        return DataError(
            f"{file}: {what}; own vectors are a Parquet file with the columns {config.vectors_id} and "
            f"{config.vectors_column}, one row per item: write one, and set embedding.import_path to it"
        )
    reason = str(error).partition("\n")[0][:200]
    return DataError(f"{file}: not a readable Parquet file ({reason}); correct embedding.import_path")


def _check_columns(file: RawFile, schema: pa.Schema, config: EmbeddingConfig) -> None:
    name, column = config.vectors_id, config.vectors_column
    Wanted({name: "embedding.vectors_id", column: "embedding.vectors_column"}).check(file, schema.names)
    id_type = schema.field(name).type
    if not has_id_type(id_type.value_type if pa.types.is_dictionary(id_type) else id_type):
        raise DataError(
            f"{file}: column {name} has type {id_type}; an id must be text or a number. Correct embedding.vectors_id"
        )
    kind = schema.field(column).type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not is_list or not (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)):
        raise DataError(
            f"{file}: column {column} has type {kind}, not lists of numbers; correct embedding.vectors_column"
        )


class VectorJoin:
    """Join external vectors to items by their source ids, batch by batch.

    Memory holds the id of every item and one batch. Vectors of items that are not in the catalog are left out and
    counted in `unknown`.
    """

    def __init__(self, source_ids: Sequence[str], config: EmbeddingConfig) -> None:
        """Index the source ids.

        Args:
            source_ids: ids of the items in the raw data, in the order of their item ids.
            config: names of the columns, and the dtype of the stored vectors.
        """
        self.config, self.storage = config, config.storage_dtype
        self.id, self.column = config.vectors_id, config.vectors_column
        self.row_of = {name: row for row, name in enumerate(source_ids)}
        self.file_of = np.full(len(self.row_of), -1, np.int32)  # index of the file with an item's vector
        self.dimension: int | None = None
        self.dimension_from = self.unknown_example = ""
        self.unknown = 0

    def tables(self, files: Sequence[RawFile]) -> Iterator[pa.Table]:
        """Yield tables of item_id int32 and vector of the catalog's items, in the order of the files.

        Raises:
            DataError: a file is not a table, a column is missing or of another type, an item is duplicated, vectors
                differ in length, or an item of the catalog has no vector.
            HealthError: a vector of a catalog item is NaN, infinite, zero, or does not fit into `storage`.
        """
        index = {file: number for number, file in enumerate(files)}
        for file, batch in _own_batches(files, self.config, [self.id, self.column]):
            if len(table := self._joined(file, index[file], files, batch)):
                yield table
        self._check_complete(files)

    def _joined(self, file: RawFile, index: int, files: Sequence[RawFile], batch: pa.RecordBatch) -> pa.Table:
        ids, lists = id_texts(batch.column(self.id)), batch.column(self.column)
        if ids.null_count:
            raise DataError(f"{file}: {ids.null_count:,} rows without {self.id}")
        names = ids.to_pylist()
        rows = np.array([self.row_of.get(name, -1) for name in names], np.int64)
        known = rows >= 0
        if not known.all():
            self.unknown_example = self.unknown_example or names[int(np.flatnonzero(~known)[0])]
            self.unknown += int((~known).sum())
        kept = np.flatnonzero(known)
        rows, lists = rows[kept], lists.take(pa.array(kept))

        def named(at: npt.NDArray[np.int64]) -> str:
            return listed(names[kept[each]] for each in at)

        is_duplicate = self.file_of[rows] >= 0
        _, first = np.unique(rows, return_index=True)
        is_duplicate[np.setdiff1d(np.arange(len(rows)), first)] = True
        if len(twice := np.flatnonzero(is_duplicate)):
            before = int(self.file_of[rows[twice[0]]])
            also = f", {names[kept[twice[0]]]} also in {files[before]}" if before not in (-1, index) else ""
            raise DataError(f"{file}: {len(twice):,} duplicate items: {named(twice)}{also}; keep one vector per item")
        self.file_of[rows] = index
        if lists.null_count:
            missing = np.flatnonzero(np.asarray(lists.is_null()))
            raise DataError(f"{file}: {len(missing):,} rows without {self.column}, for items {named(missing)}")
        vectors = self._matrix(file, lists)
        if len(bad := unusable(vectors)):
            raise HealthError(
                f"{file}: vectors of {len(bad):,} items are NaN, infinite or zero: {named(bad)}; correct the vectors"
            )
        with np.errstate(over="ignore"):
            stored = vectors.astype(self.storage)
        if len(bad := unusable(stored)):
            raise HealthError(
                f"{file}: vectors of {len(bad):,} items cannot be stored as {self.storage}: {named(bad)}{_FIT}"
            )
        inner = pa.FixedSizeListArray.from_arrays(pa.array(stored.ravel()), self.dimension or 1)
        return pa.table({"item_id": pa.array(rows, pa.int32()), "vector": inner})

    def _matrix(self, file: RawFile, lists: pa.Array) -> npt.NDArray[np.float32]:
        lengths = np.asarray(pc.list_value_length(lists))
        if self.dimension is None and len(lengths):
            self.dimension, self.dimension_from = int(lengths[0]), str(file)
            if not self.dimension:
                raise DataError(f"{file}: vectors are empty")
        if len(other := np.flatnonzero(lengths != self.dimension)):
            raise DataError(
                f"{file}: a vector has {lengths[other[0]]:,} dimensions, the previous ones (from "
                f"{self.dimension_from}) have {self.dimension:,}"
            )
        flat = lists.flatten().to_numpy(zero_copy_only=False)
        matrix: npt.NDArray[np.float32] = flat.astype(np.float32).reshape(len(lists), self.dimension or 1)
        return matrix

    def _check_complete(self, files: Sequence[RawFile]) -> None:
        missing = np.flatnonzero(self.file_of < 0)
        where = _names(files)
        if len(missing):
            names = list(self.row_of)
            found = f"; ids in the file that are not in the catalog: {self.unknown:,}" if self.unknown else ""
            found += f", such as {self.unknown_example!r}" if self.unknown else ""
            raise DataError(
                f"{where}: {len(missing):,} of {len(names):,} items of the catalog have no vector: "
                f"{listed(names[row] for row in missing[:_NAMED].tolist())}"
                + (f" and {len(missing) - _NAMED:,} more" if len(missing) > _NAMED else "")
                + f"{found}. Check embedding.vectors_id, the column of the ids; add the vectors, or remove these items "
                "from data.items"
            )
        if self.unknown:
            log.warning(
                "%s: left out %s vectors of items that are not in the catalog, such as %r",
                where, f"{self.unknown:,}", self.unknown_example,
            )  # fmt: skip
