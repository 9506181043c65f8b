"""The decoder: an encoded history and the codes chosen so far -> a state that the softmax reads."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from tiger.models.tiger.config import TigerConfig
from tiger.models.tiger.encoder import EncodedHistory
from tiger.models.tiger.items import ItemEmbedding
from tiger.models.tiger.layers import DecoderLayer, Dropout, KVCache


class CodeDecoder(nn.Module):
    """Decode the codes of an item one after the other."""

    def __init__(self, config: TigerConfig, num_levels: int) -> None:
        super().__init__()
        d_model = config.d_model or 0
        self.bos_embedding = nn.Parameter(torch.zeros(d_model))
        self.level_embedding = nn.Embedding(num_levels, d_model)
        self.input_norm = nn.RMSNorm(d_model) if config.input_norm else nn.Identity()
        self.dropout = Dropout(config.dropout or 0.0)
        layers = (DecoderLayer(*config.layer_args) for _ in range(config.num_layers or 0))
        self.layers: list[DecoderLayer] = cast("Any", nn.ModuleList(layers))
        self.norm = nn.RMSNorm(d_model)

    def project_key_values(self, x_BSM: Tensor, positions: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """Return keys and values of the encoder's states, per layer."""
        return [layer.cross_attention.project_key_value(x_BSM, positions) for layer in self.layers]

    def forward(
        self,
        items: ItemEmbedding,
        codes: Tensor,
        key_values: list[tuple[Tensor, Tensor]],
        mask: Tensor | None,
        positions: Tensor | None,
    ) -> Tensor:
        """Return states [B, T, L, M] for all codes of T targets per row at once (teacher forcing).

        Args:
            codes: int64 [B, T, L], rows of `items.code_embedding`.
            positions: [T] positions of the targets, if positions are relative.
        """
        batch, num_targets, levels = codes.shape
        before = items.code_embedding(codes[..., :-1])
        x = torch.cat([self.bos_embedding.expand(batch, num_targets, 1, -1), before], dim=2)
        x_BQM = self.dropout(self.input_norm(x + self.level_embedding.weight)).flatten(1, 2)
        repeated = None if positions is None else positions.repeat_interleave(levels)
        for layer, key_value in zip(self.layers, key_values, strict=True):
            x_BQM = layer(x_BQM, levels, key_value, mask, repeated)
        return self.norm(x_BQM).unflatten(1, (num_targets, levels))

    def step(
        self, items: ItemEmbedding, level: int, codes: Tensor | None, cache: list[KVCache], encoded: EncodedHistory
    ) -> tuple[Tensor, list[KVCache]]:
        """Decode one code for Q beams per user.

        Args:
            level: which code is to be generated.
            codes: int64 [B, Q], rows of `items.code_embedding` of the codes chosen at the level before; None at level
                0, where Q is 1.
            cache: of every layer, as the step before returned it and `reorder_cache` put it in order; [] at level 0.

        Returns:
            states [B, Q, M], and the extended cache.
        """
        if codes is None:
            batch = encoded.user_state.shape[0]
            x_BQM = (self.bos_embedding + self.level_embedding.weight[0]).expand(batch, 1, -1)
        else:
            x_BQM = items.code_embedding(codes) + self.level_embedding.weight[level]
        x_BQM, extended = self.input_norm(x_BQM), []
        for index, (layer, key_value) in enumerate(zip(self.layers, encoded.key_values, strict=True)):
            x_BQM, kept = layer.step(
                x_BQM, cache[index] if cache else [], key_value, encoded.mask, encoded.next_position
            )
            extended.append(kept)
        return self.norm(x_BQM), extended
