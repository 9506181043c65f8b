"""The encoder-decoder that reads a history as codes and generates the semantic ID of the next item, code by code.

TIGER, section 3.2: a bidirectional encoder over the history's codes, a causal decoder over the target's. Pre-norm,
learned position embeddings instead of T5's relative biases: a bias with a gradient disables fused attention on CPU.

Names of shapes: B batch, N items of a history, L levels of a semantic ID (the collision level counted), S = N * L
tokens, Q queries, H heads, E head dimension, M model dimension, V codes of all levels, K codes of one level, C columns
of an item: its codes, and its number where the model has a dense head.
"""

from __future__ import annotations

import math
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from tiger.core.config import Config
from tiger.models.tiger.batches import PAD
from tiger.models.tiger.layers import DecoderLayer, EncoderLayer, KVCache
from tiger.training.loop import Precision, TrainingConfig

PRESETS: dict[str, dict[str, Any]] = {
    # Two small layers: minutes on a CPU.
    "small": {"d_model": 64, "num_heads": 4, "head_dim": 16, "d_ff": 256, "num_layers": 2, "dropout": 0.1},
    # Twice that; the laptop's choice for a catalog of Beauty's size.
    "medium": {"d_model": 128, "num_heads": 4, "head_dim": 32, "d_ff": 512, "num_layers": 3, "dropout": 0.1},
    # Rajput et al. 2023, section 4: 4 layers, 6 heads of 64, MLP 1024, dropout 0.1.
    "tiger-paper": {"d_model": 128, "num_heads": 6, "head_dim": 64, "d_ff": 1024, "num_layers": 4, "dropout": 0.1},
    # The best open recipe: deeper, dropout 0.2.
    "tiger-tuned": {"d_model": 128, "num_heads": 6, "head_dim": 64, "d_ff": 1024, "num_layers": 6, "dropout": 0.2},
}


class ModelTraining(TrainingConfig):
    """How the generative model is trained."""

    epochs: int = Field(30, ge=0, description="passes over all examples, at most")
    batch_size: int = Field(256, ge=1, description="examples per step, over all workers")
    learning_rate: float = Field(1e-3, gt=0, description="AdamW's peak learning rate")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's weight decay")
    warmup_steps: int = Field(200, ge=0, description="steps of linear warm-up, before a cosine to zero")
    validate_every_epochs: float = Field(1.0, gt=0, description="epochs between two validations by beam search")
    patience: int = Field(5, ge=1, description="validations without a better NDCG@10 before training stops")
    validation_users: int = Field(2000, ge=1, description="users that choose the checkpoint, at most")
    validation_beam: int = Field(20, ge=10, description="beam of that validation")
    precision: Precision = Field("auto", description="auto: the faster one, by measurement")


class ModelConfig(Config):
    """Size of the model; a key that is given beats the preset."""

    preset: Literal["small", "medium", "tiger-paper", "tiger-tuned"] = Field(
        "small", description="sizes by name; keys below that are none take the preset's value"
    )
    d_model: int | None = Field(None, ge=8, description="width of the residual stream")
    num_heads: int | None = Field(None, ge=1, description="attention heads")
    head_dim: int | None = Field(None, ge=4, description="width of a head; num_heads x head_dim need not be d_model")
    d_ff: int | None = Field(None, ge=8, description="width of the feed-forward layers")
    num_layers: int | None = Field(None, ge=1, description="layers of the encoder, and of the decoder")
    dropout: float | None = Field(None, ge=0, lt=1, description="dropout on every sublayer's output")
    encoder: Literal["bidirectional", "causal"] = Field(
        "bidirectional",
        description="bidirectional: one example per target, as in the paper; causal: an encoder that sees earlier "
        "items only, so that one pass trains all targets of a history",
    )
    encoder_input: Literal["codes", "items"] = Field(
        "codes",
        description="codes: the encoder reads one token per code; items: one per item, the sum of its codes' "
        "embeddings",
    )
    dense: float = Field(
        0.0,
        ge=0,
        description="weight of the loss of a dense head that compares the encoder's last state with every item, as in "
        "LIGER; items then bring their text embedding and a learned vector (needs encoder_input = items); 0: none",
    )
    dense_share: float = Field(
        0.9, ge=0, le=1, description="of the dense head in an item's score; 0: generation alone, 1: the head alone"
    )
    dense_search: Literal["guided", "candidates"] = Field(
        "guided",
        description="guided: beam search sees, for every prefix, the best that the dense head gives any item below it; "
        "candidates: the head orders what generation alone has found, for catalogs too large to score whole",
    )
    dense_negatives: int | None = Field(
        None, ge=1, description="items drawn at every step for the dense head's loss to compare with; none: all"
    )
    dense_repeats: bool = Field(
        True, description="the dense head learns what it means that an item stands in the history already"
    )
    start_of_history_embedding: bool = Field(
        True,
        description="with a causal encoder, the first item that is read of a history carries a learned vector (LOG.md)",
    )
    max_history_items: int = Field(20, ge=1, description="most recent items of a history that are read")
    num_user_tokens: int = Field(0, ge=0, description="buckets of a token for the user (the paper: 2,000); 0 for none")
    training: ModelTraining = ModelTraining()
    seed: int = Field(0, ge=0, description="seed of weights, dropout and order")

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        preset = PRESETS.get(values.get("preset", "small"), {})  # an unknown name is refused by its type
        if values.get("encoder") == "causal" and values.get("num_user_tokens"):
            raise ValueError("encoder = causal has no user token: set num_user_tokens = 0 or encoder = bidirectional")
        if values.get("dense") and values.get("encoder_input") != "items":
            raise ValueError(
                "dense > 0 needs encoder_input = items: text and learned vector are parts of an item's token"
            )
        return {**values, **{key: value for key, value in preset.items() if values.get(key) is None}}


class Memory:
    """A batch of encoded histories: per decoder layer the keys and values [B, H, S, E], made once a user.

    `next_position` [1] is the position of the item to be generated, where positions are relative; `query` [B, M] is the
    encoder's last state, which a dense head compares with items; `last` [B, N] is the last column of the history, there
    the items' numbers, negative where there is none.
    """

    def __init__(
        self,
        key_values: list[tuple[Tensor, Tensor]],
        mask: Tensor | None,
        next_position: Tensor | None,
        query: Tensor,
        last: Tensor,
    ) -> None:
        self.key_values, self.mask, self.next_position, self.query, self.last = (
            key_values,
            mask,
            next_position,
            query,
            last,
        )


class TigerModel(nn.Module):
    """p(semantic ID of the next item | codes of the history), the product of one softmax per level."""

    def __init__(self, config: ModelConfig, level_sizes: tuple[int, ...], vectors: Tensor | None = None) -> None:
        """
        Args:
            level_sizes: codes of every level of the semantic IDs; the vocabulary is made from it.
            vectors: float32 [items, d] text embeddings, for a model with a dense head. They are not part of its state.
        """
        super().__init__()
        d_model, layers = config.d_model or 0, config.num_layers or 0  # the preset has filled them
        shape = (d_model, config.num_heads or 0, config.head_dim or 0, config.d_ff or 0, config.dropout or 0.0)
        self.level_sizes, self.max_items, self.fast = level_sizes, config.max_history_items, config.encoder == "causal"
        self.tokens_per_item = (
            1 if config.encoder_input == "items" else len(level_sizes)
        )  # tokens of an item in the encoder
        self.dense, self.dense_share, self.dense_search = config.dense, config.dense_share, config.dense_search
        self.dense_negatives = config.dense_negatives
        if config.dense:
            if vectors is None:
                raise ValueError("a model with a dense head reads the items' text embeddings: pass vectors")
            standardized = (vectors - vectors.mean(0)) / vectors.std().clamp_min(1e-8)
            self.register_buffer("vectors", standardized, persistent=False)
            self.item_embedding = nn.Embedding(len(vectors), d_model)
            self.text = nn.Linear(vectors.shape[1], d_model, bias=False)
        self.repeats = nn.Parameter(torch.zeros(d_model)) if config.dense and config.dense_repeats else None
        starts = torch.tensor([0, *level_sizes[:-1]]).cumsum(0)
        self.register_buffer("level_offsets", starts, persistent=False)
        self.code_embedding = nn.Embedding(sum(level_sizes), d_model)
        self.recency = None if self.fast else nn.Embedding(config.max_history_items, d_model)
        self.start = nn.Parameter(torch.empty(d_model))
        self.level_embedding = nn.Embedding(len(level_sizes), d_model)
        self.user_embedding = nn.Embedding(config.num_user_tokens, d_model) if config.num_user_tokens else None
        self.dropout = nn.Dropout(config.dropout or 0.0)
        self.encoder: list[EncoderLayer] = cast("Any", nn.ModuleList(EncoderLayer(*shape) for _ in range(layers)))
        self.encoder_norm = nn.RMSNorm(d_model)
        self.decoder: list[DecoderLayer] = cast("Any", nn.ModuleList(DecoderLayer(*shape) for _ in range(layers)))
        self.decoder_norm = nn.RMSNorm(d_model)
        self.apply(_initialize)
        nn.init.normal_(self.start, std=0.05)
        if config.dense:  # the three parts of an item's token begin at equal length
            nn.init.normal_(self.text.weight, std=0.05 * self.text.in_features**-0.5)
        self.first = nn.Parameter(torch.empty(d_model)) if self.fast and config.start_of_history_embedding else None
        if self.first is not None:
            nn.init.normal_(self.first, std=0.05)

    level_offsets: Tensor
    vectors: Tensor

    @property
    def columns(self) -> int:
        """Of an item in histories and targets: its codes, and its number for a dense head."""
        return len(self.level_sizes) + bool(self.dense)

    def item_embeddings(self, items: Tensor | None = None) -> Tensor:
        """What the dense head compares a history with, [items, M]; of some items [n] or of all."""
        if items is None:
            keys: Tensor = self.item_embedding.weight + self.text(self.vectors)
        else:
            keys = self.item_embedding(items) + self.text(self.vectors[items])
        return keys

    def dense_logits(self, query: Tensor, keys: Tensor, history: Tensor) -> Tensor:
        """Scores float32 [B, items] of the dense head for every item.

        What an item is worth for standing in the history, each time, is learned: a linear function of the query. Where
        nobody takes an item twice the head learns to leave those out, which their likeness to the history speaks for.

        Args:
            query: [B, M] encoder states.
            keys: `item_embeddings()`.
            history: int64 [B, N] numbers of the items that the query knows, negative where there is none.
        """
        scores = (query @ keys.T).float()
        if self.repeats is None:
            return scores
        worth = (query @ self.repeats).float()[:, None] * (history >= 0)
        return scores.scatter_add(1, history.clamp_min(0), worth)

    def dense_logits_of(self, query: Tensor, keys: Tensor, history: Tensor, items: Tensor) -> Tensor:
        """The same for some items [B, R] or [R] alone, whose keys are [B, R, M] or [R, M]: float32 [B, R]."""
        scores = (keys @ query[:, :, None]).squeeze(2).float()
        if self.repeats is None:
            return scores
        times = (items[..., None] == history[:, None, :]).sum(2)
        return scores + (query @ self.repeats).float()[:, None] * times

    def forward(self, history: Tensor, target: Tensor, extra: Tensor | None = None) -> Tensor:
        """Loss of each row, float32 [B]: that of the codes and, weighted, that of the dense head; see `losses`."""
        of_codes, of_items = self.losses(history, target, extra)
        return of_codes if of_items is None else of_codes + self.dense * of_items

    def losses(self, history: Tensor, target: Tensor, extra: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Cross-entropies of each row: of a target's codes, averaged over levels, and of the item in the dense head.

        Args:
            history: int64 [B, N, C], PAD in front of shorter histories. With a causal encoder a sequence whose last
                items are targets and histories of later targets at once.
            target: int64 [B, C]. With a causal encoder int64 [B], how many of the last items are targets; the loss is
                the sum over them.
            extra: int64 [B] user tokens, where the model has them. With a causal encoder int64 [targets of all rows],
                where they are among the B x (N - 1) items that follow another one (`SequenceExamples.collate`);
                without it they are searched for on the device, which synchronizes with it.

        Returns:
            two float32 [B], the second None without a dense head.
        """
        if self.fast:
            return self._causal_losses(history, target, extra)
        memory, levels = self.encode(history, extra), len(self.level_sizes)
        x_BLM = self._decoder_input(target[:, :levels])
        for layer, key_value in zip(self.decoder, memory.key_values, strict=True):
            x_BLM = layer(x_BLM, levels, key_value, memory.mask, None)
        of_codes = self._cross_entropy(self.decoder_norm(x_BLM), target[:, :levels])
        return of_codes, self._dense_loss(memory.query, target[:, -1], memory.last) if self.dense else None

    def _causal_losses(self, sequence: Tensor, targets: Tensor, wanted: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """One pass over a sequence for all its targets.

        The encoder is causal over items, so that its state at an item knows nothing of later ones; a target's queries
        attend to the `max_items` items before it.
        """
        levels, n_items = len(self.level_sizes), sequence.shape[1]
        history, target = sequence[:, :-1], sequence[:, 1:].clamp_min(0)
        x_BSM, valid_BN = self._encode_causal(history)
        item = torch.arange(n_items - 1, device=sequence.device)
        # Target t is item t + 1 of the sequence: it sees the items up to t, the last max_items of them.
        window_TN = (item[None, :] <= item[:, None]) & (item[None, :] > item[:, None] - self.max_items)
        target_mask_BT = item >= n_items - 1 - targets[:, None]
        visible_BTN = window_TN & (
            valid_BN[:, None, :] | ~target_mask_BT[:, :, None]
        )  # no query may be without any key
        mask = visible_BTN.repeat_interleave(levels, 1).repeat_interleave(self.tokens_per_item, 2)[:, None]
        codes = target[..., :levels]
        x_BQM = self._decoder_input(codes.flatten(0, 1)).unflatten(0, codes.shape[:2]).flatten(1, 2)
        places_Q = (item + 1).repeat_interleave(levels)
        for layer in self.decoder:
            key_value = layer.cross_attention.project_key_value(x_BSM, item.repeat_interleave(self.tokens_per_item))
            x_BQM = layer(x_BQM, levels, key_value, mask, places_Q)
        if wanted is None:
            wanted = target_mask_BT.flatten().nonzero().squeeze(1)

        def of_targets(x: Tensor) -> Tensor:
            """Select [targets of all rows, ...] from [B, T, ...]."""
            return x.flatten(0, 1).index_select(0, wanted)

        def summed(losses: Tensor) -> Tensor:
            """[targets of all rows] -> [B]."""
            return losses.new_zeros(target_mask_BT.numel()).index_copy(0, wanted, losses).view_as(target_mask_BT).sum(1)

        x_TLM = of_targets(self.decoder_norm(x_BQM).unflatten(1, (-1, levels)))
        of_codes = summed(self._cross_entropy(x_TLM, of_targets(codes)))
        if not self.dense:
            return of_codes, None
        history_items_BTN = torch.where(visible_BTN, history[:, None, :, -1], PAD)
        of_items = self._dense_loss(of_targets(x_BSM), of_targets(target[..., -1]), of_targets(history_items_BTN))
        return of_codes, summed(of_items)

    def _dense_loss(self, query_BM: Tensor, item: Tensor, history_BN: Tensor) -> Tensor:
        """Cross-entropy [B] over all items, or over the target and items drawn for the step, as many for every row.

        A drawn item stands for items / drawn others, so its score goes up by the logarithm of that: the sampled softmax
        (Jean et al. 2015) of a uniform draw. A row's own target among the drawn does not count.
        """
        count, items = self.dense_negatives, len(self.item_embedding.weight)
        if count is None or count >= items or not self.training:
            return F.cross_entropy(
                self.dense_logits(query_BM, self.item_embeddings(), history_BN), item, reduction="none"
            )
        drawn = torch.randint(items, (count,), device=item.device)
        of_target = self.dense_logits_of(query_BM, self.item_embeddings(item)[:, None], history_BN, item[:, None])
        of_drawn = self.dense_logits_of(query_BM, self.item_embeddings(drawn), history_BN, drawn) + math.log(
            items / count
        )
        of_drawn = of_drawn.masked_fill(drawn == item[:, None], -torch.inf)
        return torch.cat([of_target, of_drawn], dim=1).logsumexp(1) - of_target.squeeze(1)

    def encode(self, history: Tensor, user: Tensor | None = None) -> Memory:
        """Reads histories int64 [B, N, C]; at most the last `max_items` of them."""
        history = history[:, -self.max_items :]
        if self.fast:
            x_BSM, valid_BN = self._encode_causal(history)
            valid_BS = valid_BN.repeat_interleave(self.tokens_per_item, 1)
            item = torch.arange(history.shape[1] + 1, device=history.device)
            positions = item[:-1].repeat_interleave(self.tokens_per_item)
            key_values = [layer.cross_attention.project_key_value(x_BSM, positions) for layer in self.decoder]
            return Memory(key_values, self._key_mask(valid_BS), item[-1:], x_BSM[:, -1], history[..., -1])
        recency = torch.arange(self.max_items - history.shape[1], self.max_items, device=history.device)
        assert self.recency is not None
        x_BSM = (self._embed(history) + self.recency(recency)[:, None]).flatten(1, 2)
        valid_BS = (history[:, :, 0] != PAD).repeat_interleave(self.tokens_per_item, 1)
        if self.user_embedding is not None:
            if user is None:
                raise ValueError("this model reads a user token: pass the users")
            x_BSM = torch.cat([self.user_embedding(user)[:, None], x_BSM], dim=1)
            valid_BS = F.pad(valid_BS, (1, 0), value=True)
        mask = self._key_mask(valid_BS)
        x_BSM = self.dropout(x_BSM)
        for layer in self.encoder:
            x_BSM = layer(x_BSM, mask, None)
        x_BSM = self.encoder_norm(x_BSM)
        key_values = [layer.cross_attention.project_key_value(x_BSM) for layer in self.decoder]
        return Memory(key_values, mask, None, x_BSM[:, -1], history[..., -1])

    def _encode_causal(self, history: Tensor) -> tuple[Tensor, Tensor]:
        """Encoder states [B, S, M] that know their own item and those before it, and which items exist, [B, N]."""
        valid_BN, width = history[:, :, 0] != PAD, self.tokens_per_item
        item = torch.arange(history.shape[1], device=history.device)
        seen_BNN = (item[None, :] <= item[:, None]) & (valid_BN[:, None, :] | ~valid_BN[:, :, None])
        mask = seen_BNN.repeat_interleave(width, 1).repeat_interleave(width, 2)[:, None]
        x_BNWM = self._embed(history)
        if self.first is not None:  # relative positions alone do not tell where a history begins
            first_BN = valid_BN & ~F.pad(valid_BN, (1, -1))
            x_BNWM = x_BNWM + first_BN[:, :, None, None] * self.first
        x_BSM, positions = self.dropout(x_BNWM.flatten(1, 2)), item.repeat_interleave(width)
        for layer in self.encoder:
            x_BSM = layer(x_BSM, mask, positions)
        return self.encoder_norm(x_BSM), valid_BN

    def _embed(self, history: Tensor) -> Tensor:
        """The encoder's tokens of every item, [B, N, tokens of an item, M]."""
        codes = history[..., : len(self.level_sizes)]
        codes_BNLM: Tensor = self.code_embedding(torch.where(codes == PAD, 0, codes + self.level_offsets))
        if self.tokens_per_item > 1:
            return codes_BNLM
        token_BNM = codes_BNLM.sum(2)
        if self.dense:
            item = history[..., -1].clamp_min(0)
            token_BNM = token_BNM + self.item_embedding(item) + self.text(self.vectors[item])
        return token_BNM[:, :, None]

    @staticmethod
    def _key_mask(valid_BS: Tensor) -> Tensor | None:
        """[B, 1, 1, S], or None without padding: attention takes its fastest path then.

        On a GPU the mask is always there, because asking would wait for the device.
        """
        if valid_BS.device.type == "cpu" and bool(valid_BS.all()):
            return None
        return valid_BS[:, None, None, :]

    def _cross_entropy(self, x_BLM: Tensor, target: Tensor) -> Tensor:
        losses = [
            F.cross_entropy(self._logits(x_BLM[:, level], level).float(), target[:, level], reduction="none")
            for level in range(len(self.level_sizes))
        ]
        return torch.stack(losses).mean(0)

    def step(
        self, level: int, codes: Tensor | None, past: list[KVCache], memory: Memory
    ) -> tuple[Tensor, list[KVCache]]:
        """One decoding step for Q beams a user.

        Args:
            level: which code is to be generated.
            codes: int64 [B, Q], the codes chosen at the level before; None at level 0, where Q is 1.
            past: of every layer, as the step before gave it and `reorder_cache` put it in order; [] at level 0.

        Returns:
            log-probabilities float32 [B, Q, K] over the codes of `level`, and the new `past`.
        """
        if codes is None:
            x_BQM = (self.start + self.level_embedding.weight[0]).expand(memory.key_values[0][0].shape[0], 1, -1)
        else:
            x_BQM = self.code_embedding(codes + self.level_offsets[level - 1]) + self.level_embedding.weight[level]
        present = []
        for index, (layer, key_value) in enumerate(zip(self.decoder, memory.key_values, strict=True)):
            x_BQM, kept = layer.step(x_BQM, past[index] if past else [], key_value, memory.mask, memory.next_position)
            present.append(kept)
        return self._logits(self.decoder_norm(x_BQM), level).float().log_softmax(-1), present

    def _decoder_input(self, target: Tensor) -> Tensor:
        before = self.code_embedding(target[:, :-1] + self.level_offsets[:-1])
        x_BLM = torch.cat([self.start.expand(len(target), 1, -1), before], dim=1)
        return self.dropout(x_BLM + self.level_embedding.weight)

    def _logits(self, x: Tensor, level: int) -> Tensor:
        """Scores [..., K] of one level's codes only: the embedding of a code is also its output vector."""
        begin = sum(self.level_sizes[:level])
        return F.linear(x, self.code_embedding.weight[begin : begin + self.level_sizes[level]])


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.05)
