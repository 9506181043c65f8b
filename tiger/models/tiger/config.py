"""Configuration of the generative model: presets, sizes, and how it is trained."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from tiger.models.base import ModelConfig, ModelTraining
from tiger.training.loop import Precision

_PAPER: dict[str, Any] = {
    "encoder": "bidirectional", "encoder_input": "codes", "input_norm": False, "softmax": "codes",
    "num_user_tokens": 2000,
}  # fmt: skip
_TRIE: dict[str, Any] = {
    "encoder": "causal", "encoder_input": "items", "input_norm": True, "softmax": "trie", "num_user_tokens": 0,
}  # fmt: skip

PRESETS: dict[str, dict[str, Any]] = {
    # Two small layers: minutes on a CPU.
    "small": _TRIE | {"d_model": 64, "num_heads": 4, "head_dim": 16, "d_ff": 256, "num_layers": 2, "dropout": 0.3},
    # Twice that, for a GPU or a larger catalog.
    "medium": _TRIE | {"d_model": 128, "num_heads": 4, "head_dim": 32, "d_ff": 512, "num_layers": 3, "dropout": 0.2},
    # Rajput et al. 2023, section 4: 4 layers, 6 heads of 64, MLP 1024, dropout 0.1, 2,000 user tokens.
    "tiger-paper": _PAPER
    | {"d_model": 128, "num_heads": 6, "head_dim": 64, "d_ff": 1024, "num_layers": 4, "dropout": 0.1},
    # The best open recipe of the same model: deeper, dropout 0.2, no user tokens.
    "tiger-tuned": _PAPER
    | {"num_user_tokens": 0}
    | {"d_model": 128, "num_heads": 6, "head_dim": 64, "d_ff": 1024, "num_layers": 6, "dropout": 0.2},
}


class TigerTraining(ModelTraining):
    """How the generative model is trained."""

    epochs: int = Field(30, ge=0, description="maximum number of passes over all targets")
    batch_size: int = Field(256, ge=1, description="targets per step, over all workers")
    learning_rate: float = Field(1e-3, gt=0, description="AdamW's peak learning rate")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's weight decay")
    warmup_steps: int = Field(200, ge=0, description="steps of linear warm-up, before a cosine to zero")
    validate_every_epochs: float = Field(1.0, gt=0, description="epochs between two validations by beam search")
    validation_users: int | None = Field(
        2000, ge=1, description="maximum number of users that choose the best weights; none: all"
    )
    validation_beam: int = Field(20, ge=10, description="beam of that validation")
    patience: int = Field(5, ge=1, description="validations without a better NDCG@10 before training stops")
    precision: Precision = Field("auto", description="auto: the faster one, by measurement")


class TigerConfig(ModelConfig):
    """Size and parts of the model; a key that is given overrides the preset."""

    inputs: ClassVar[tuple[str, ...]] = ("catalog", "semantic_ids")

    kind: Literal["tiger"] = Field("tiger", description="the model generates the semantic ID of the next item")

    preset: Literal["small", "medium", "tiger-paper", "tiger-tuned"] = Field(
        "small", description="parts and sizes by name; keys below that are not given take the preset's value"
    )
    d_model: int | None = Field(None, ge=8, description="width of the residual stream")
    num_heads: int | None = Field(None, ge=1, description="attention heads")
    head_dim: int | None = Field(None, ge=4, description="width of a head; num_heads x head_dim need not be d_model")
    d_ff: int | None = Field(None, ge=8, description="width of the feed-forward layers")
    num_layers: int | None = Field(None, ge=1, description="layers of the encoder, and of the decoder")
    dropout: float | None = Field(None, ge=0, lt=1, description="dropout on every sublayer's output")
    encoder: Literal["bidirectional", "causal"] | None = Field(
        None,
        description="bidirectional: one example per target, as in the paper; causal: one pass over a history trains "
        "all its targets",
    )
    encoder_input: Literal["codes", "items"] | None = Field(
        None, description="codes: one token per code of an item, as in the paper; items: one token per item"
    )
    input_norm: bool | None = Field(
        None,
        description="RMSNorm on what the first layers of encoder and decoder read: embeddings start short, and the "
        "outputs of the layers would drown them; not in the paper",
    )
    softmax: Literal["trie", "codes"] | None = Field(
        None,
        description="trie: hierarchical softmax over the children of each node of the semantic-ID trie, with an output "
        "vector per node; items bring their text embedding and a learned vector; codes: an output vector per code, as "
        "in the paper",
    )
    softmax_support: Literal["level", "children"] = Field(
        "level",
        description="with softmax = codes: normalize over all codes of a level, as in the paper, or over those that "
        "exist after the codes before them",
    )
    item_vectors: bool = Field(
        True,
        description="with softmax = trie: a learned vector per item; false: text alone, for catalogs whose vectors do "
        "not fit a worker",
    )
    item_dropout: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="fraction of items whose learned vector is left out at a step; prepares for new items",
    )
    max_history_items: int = Field(20, ge=1, description="most recent items of a history that a prediction attends to")
    num_user_tokens: int | None = Field(
        None, ge=0, description="buckets of a token for the user (the paper: 2,000); 0: none"
    )
    training: TigerTraining = TigerTraining()

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        preset = PRESETS.get(values.get("preset", "small"), {})  # an unknown name is rejected by its type
        values = {**values, **{key: value for key, value in preset.items() if values.get(key) is None}}
        if values.get("encoder") == "causal" and values.get("num_user_tokens"):
            raise ValueError("encoder = causal has no user token: set num_user_tokens = 0 or encoder = bidirectional")
        return values

    @property
    def layer_args(self) -> tuple[int, int, int, int, float]:
        """Arguments of every transformer layer: d_model, num_heads, head_dim, d_ff, dropout."""
        return (self.d_model or 0, self.num_heads or 0, self.head_dim or 0, self.d_ff or 0, self.dropout or 0.0)

    @property
    def context_items(self) -> int:
        """Most recent items of a history that are read: those that reach a prediction, and one more.

        A causal encoder passes older items on from layer to layer. The first item that is read carries the start
        embedding, which must not be seen if the history is longer.
        """
        if self.encoder == "causal":
            return self.max_history_items + (self.num_layers or 0) * (self.max_history_items - 1) + 1
        return self.max_history_items
