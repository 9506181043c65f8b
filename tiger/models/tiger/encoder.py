"""The encoder: a history of items -> states, and what the decoder reads of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiger.models.padding import PAD
from tiger.models.tiger.config import TigerConfig
from tiger.models.tiger.items import ItemEmbedding
from tiger.models.tiger.layers import Dropout, EncoderLayer
from tiger.semantic_ids.trie import Trie


@dataclass(frozen=True)
class EncodedHistory:
    """A batch of encoded histories, made once per user.

    Attributes:
        key_values: keys and values [B, H, S, E] of the cross-attention, per decoder layer.
        mask: bool [B, 1, 1, S], the keys that may be read; None if all may.
        next_position: [1] position of the item to be generated, if positions are relative.
        user_state: [B, M] the state at the most recent item.
        items: int64 [B, N] the history that predictions attend to, PAD in front.
    """

    key_values: list[tuple[Tensor, Tensor]]
    mask: Tensor | None
    next_position: Tensor | None
    user_state: Tensor
    items: Tensor


class HistoryEncoder(nn.Module):
    """Encode histories int64 [B, N], PAD in front of shorter ones.

    Bidirectional: learned embeddings of the position, counted from the end. Causal: rotary positions, an attention
    window of `max_history_items`, and a learned start embedding on the first item, because relative positions alone do
    not tell where a history begins.
    """

    def __init__(self, config: TigerConfig, num_levels: int) -> None:
        super().__init__()
        d_model = config.d_model or 0
        self.causal, self.max_items, self.context = (
            config.encoder == "causal",
            config.max_history_items,
            config.context_items,
        )
        self.tokens_per_item = 1 if config.encoder_input == "items" else num_levels
        self.position_embedding = None if self.causal else nn.Embedding(config.max_history_items, d_model)
        self.start_embedding = nn.Parameter(torch.zeros(d_model)) if self.causal else None
        self.user_embedding = nn.Embedding(config.num_user_tokens, d_model) if config.num_user_tokens else None
        self.input_norm = nn.RMSNorm(d_model) if config.input_norm else nn.Identity()
        self.dropout = Dropout(config.dropout or 0.0)
        layers = (EncoderLayer(*config.layer_args) for _ in range(config.num_layers or 0))
        self.layers: list[EncoderLayer] = cast("Any", nn.ModuleList(layers))
        self.norm = nn.RMSNorm(d_model)

    def forward(self, items: ItemEmbedding, trie: Trie, history: Tensor, user: Tensor | None = None) -> Tensor:
        """Return states [B, S, M] of histories int64 [B, N]; S = N x tokens per item, plus the user's token."""
        valid_BN = history != PAD
        x_BNWM = self._tokens(items, trie, history)
        if self.causal:
            return self._encode_causal(x_BNWM, valid_BN)
        assert self.position_embedding is not None
        positions = torch.arange(self.max_items - history.shape[1], self.max_items, device=history.device)
        x_BSM = (x_BNWM + self.position_embedding(positions)[:, None]).flatten(1, 2)
        if self.user_embedding is not None:
            if user is None:
                raise ValueError("this model reads a user token: pass the users")
            x_BSM = torch.cat([self.user_embedding(user)[:, None], x_BSM], dim=1)
        mask, x_BSM = self.key_mask(history), self.dropout(self.input_norm(x_BSM))
        for layer in self.layers:
            x_BSM = layer(x_BSM, mask, None)
        return self.norm(x_BSM)

    def key_mask(self, history: Tensor) -> Tensor | None:
        """Return which tokens a prediction after the history may attend to, bool [B, 1, 1, S].

        None if all may: attention then takes its fastest path. On a GPU there is always a mask, because asking would
        wait for the device.
        """
        valid_BN = history != PAD
        if self.causal:
            valid_BN = valid_BN & (torch.arange(-history.shape[1], 0, device=history.device) >= -self.max_items)
        if history.device.type == "cpu" and bool(valid_BN.all()):
            return None
        valid_BS = valid_BN.repeat_interleave(self.tokens_per_item, 1)
        if self.user_embedding is not None:
            valid_BS = F.pad(valid_BS, (1, 0), value=True)
        return valid_BS[:, None, None, :]

    def window(self, num_items: int, device: torch.device) -> Tensor:
        """Return which items each item may attend to, bool [N, N]: itself and those before it, `max_items` in all."""
        item = torch.arange(num_items, device=device)
        return (item[None, :] <= item[:, None]) & (item[None, :] > item[:, None] - self.max_items)

    def _encode_causal(self, x_BNWM: Tensor, valid_BN: Tensor) -> Tensor:
        assert self.start_embedding is not None
        width, item = self.tokens_per_item, torch.arange(valid_BN.shape[1], device=valid_BN.device)
        # A padding item attends to anything: no query may be without any key.
        visible_BNN = self.window(len(item), item.device) & (valid_BN[:, None, :] | ~valid_BN[:, :, None])
        mask = visible_BNN.repeat_interleave(width, 1).repeat_interleave(width, 2)[:, None]
        first_BN = valid_BN & ~F.pad(valid_BN, (1, -1))
        x_BSM = (x_BNWM + first_BN[:, :, None, None] * self.start_embedding).flatten(1, 2)
        x_BSM, positions = self.dropout(self.input_norm(x_BSM)), item.repeat_interleave(width)
        for layer in self.layers:
            x_BSM = layer(x_BSM, mask, positions)
        return self.norm(x_BSM)

    def _tokens(self, items: ItemEmbedding, trie: Trie, history: Tensor) -> Tensor:
        """Return the tokens of every item, [B, N, tokens per item, M]."""
        codes_BNLM: Tensor = items.code_embedding(items.codes(trie, history))
        if self.tokens_per_item > 1:
            return codes_BNLM
        token_BNM = codes_BNLM.sum(2)
        if items.text_projection is not None:
            token_BNM = token_BNM + items.content(history.clamp_min(0))
        return token_BNM[:, :, None]
