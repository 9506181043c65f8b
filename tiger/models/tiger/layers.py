"""Transformer layers of the encoder-decoder: attention with rotary positions, feed-forward, and the decoder's KV cache.

Pre-norm. The shape suffixes are those of `model.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KVCache = list[tuple[Tensor, Tensor]]
"""One (key, value) per decoded position: each [B, Q, H, E], or [B, 1, H, E] for a position that all beams share."""


def reorder_cache(cache: list[KVCache], beam_indices: Tensor) -> list[KVCache]:
    """Reorder the cache of every layer to follow the selected beams.

    Args:
        beam_indices: int64 [B, Q], the beam of the previous step that each beam continues.
    """
    batch = torch.arange(len(beam_indices), device=beam_indices.device)[:, None]

    def gather_beams(x: Tensor) -> Tensor:
        if x.shape[1] == 1:  # shared by all beams
            return x
        rows = (batch * x.shape[1] + beam_indices).flatten()
        return x.flatten(0, 1).index_select(0, rows).unflatten(0, beam_indices.shape)

    return [[(gather_beams(key), gather_beams(value)) for key, value in layer] for layer in cache]


class Attention(nn.Module):
    """Multi-head attention on PyTorch's fused kernels; projected keys and values can be reused."""

    def __init__(self, d_model: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(d_model, heads * head_dim, bias=False)
        self.key_value = nn.Linear(d_model, 2 * heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, d_model, bias=False)

    def project_key_value(self, x_BSM: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return keys and values, each [B, H, S, E]; keys with rotary embedding if `positions` [S] are given."""
        both = self.key_value(x_BSM).unflatten(-1, (2, self.heads, -1))
        key, value = both.permute(2, 0, 3, 1, 4)
        return (key if positions is None else apply_rotary_embedding(key, positions)), value

    def project_key_value_step(self, x_BQM: Tensor) -> tuple[Tensor, Tensor]:
        """Return the key and value [B, Q, H, E] of one decoded position."""
        key, value = self.key_value(x_BQM).unflatten(-1, (2, self.heads, -1)).unbind(2)
        return key, value

    def attend_to_cache(self, x_BQM: Tensor, cache: KVCache) -> Tensor:
        """Attend to the cache: every query to its own key and value per position.

        For the few positions of a semantic ID this takes less than half the time of the fused kernel, which would be
        called with one query per beam and needs all positions in one tensor.
        """
        query_BQHE = self.query(x_BQM).unflatten(-1, (self.heads, -1))
        scores_BQHP = (
            torch.stack([(query_BQHE * key).sum(-1) for key, _ in cache], dim=-1) * query_BQHE.shape[-1] ** -0.5
        )
        weights = scores_BQHP.softmax(-1).unsqueeze(-1).unbind(-2)
        mixed_BQHE = weights[0] * cache[0][1]
        for weight, (_, value) in zip(weights[1:], cache[1:], strict=True):
            mixed_BQHE = torch.addcmul(mixed_BQHE, weight, value)
        return self.out(mixed_BQHE.flatten(2))

    def forward(
        self,
        x_BQM: Tensor,
        key_value: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        causal: bool = False,
        positions: Tensor | None = None,
    ) -> Tensor:
        query_BHQE = self.query(x_BQM).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        if positions is not None:
            query_BHQE = apply_rotary_embedding(query_BHQE, positions)
        mixed_BHQE = F.scaled_dot_product_attention(query_BHQE, *key_value, attn_mask=mask, is_causal=causal)
        return self.out(mixed_BHQE.transpose(1, 2).flatten(2))


def apply_rotary_embedding(x_BHSE: Tensor, positions: Tensor) -> Tensor:
    """Apply rotary position embedding (RoPE; Su et al. 2021): scores depend on relative positions only.

    Wavelengths run from 6 to 600 items, because histories are short.
    """
    half = x_BHSE.shape[-1] // 2
    angles = positions[:, None] * torch.logspace(0, -2, half, device=x_BHSE.device)
    cos, sin = angles.cos().to(x_BHSE.dtype), angles.sin().to(x_BHSE.dtype)
    first, second = x_BHSE[..., :half], x_BHSE[..., half : 2 * half]
    rotated = [first * cos - second * sin, first * sin + second * cos, x_BHSE[..., 2 * half :]]
    return torch.cat(rotated, dim=-1)


class FeedForward(nn.Sequential):
    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__(
            nn.Linear(d_model, d_ff, bias=False), nn.ReLU(inplace=True), nn.Linear(d_ff, d_model, bias=False)
        )


class EncoderLayer(nn.Module):
    def __init__(self, d_model: int, heads: int, head_dim: int, d_ff: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.RMSNorm(d_model), Attention(d_model, heads, head_dim)
        self.feed_forward_norm, self.feed_forward = nn.RMSNorm(d_model), FeedForward(d_model, d_ff)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BSM: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        normed = self.attention_norm(x_BSM)
        key_value = self.attention.project_key_value(normed, positions)
        x_BSM = x_BSM + self.dropout(self.attention(normed, key_value, mask, positions=positions))
        return x_BSM + self.dropout(self.feed_forward(self.feed_forward_norm(x_BSM)))


class DecoderLayer(nn.Module):
    def __init__(self, d_model: int, heads: int, head_dim: int, d_ff: int, dropout: float) -> None:
        super().__init__()
        self.self_norm, self.self_attention = nn.RMSNorm(d_model), Attention(d_model, heads, head_dim)
        self.cross_norm, self.cross_attention = nn.RMSNorm(d_model), Attention(d_model, heads, head_dim)
        self.feed_forward_norm, self.feed_forward = nn.RMSNorm(d_model), FeedForward(d_model, d_ff)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x_BQM: Tensor,
        levels: int,
        memory: tuple[Tensor, Tensor],
        mask: Tensor | None,
        positions: Tensor | None,
    ) -> Tensor:
        """Decode all codes of all targets at once; each attends to the earlier codes of its own target.

        Args:
            x_BQM: `levels` queries per target, targets one after another.
            positions: positions of the queries, [Q].
        """
        normed = self.self_norm(x_BQM).unflatten(1, (-1, levels)).flatten(0, 1)
        attended = self.self_attention(normed, self.self_attention.project_key_value(normed), causal=True)
        return self._cross_attention_and_mlp(x_BQM + self.dropout(attended.view_as(x_BQM)), memory, mask, positions)

    def step(
        self,
        x_BQM: Tensor,
        cache: KVCache,
        memory: tuple[Tensor, Tensor],
        mask: Tensor | None,
        positions: Tensor | None,
    ) -> tuple[Tensor, KVCache]:
        """Decode one position for Q beams per user; return the hidden states and the extended cache."""
        normed = self.self_norm(x_BQM)
        cache = [*cache, self.self_attention.project_key_value_step(normed)]
        x_BQM = x_BQM + self.self_attention.attend_to_cache(normed, cache)
        return self._cross_attention_and_mlp(x_BQM, memory, mask, positions), cache

    def _cross_attention_and_mlp(
        self, x: Tensor, memory: tuple[Tensor, Tensor], mask: Tensor | None, positions: Tensor | None
    ) -> Tensor:
        x = x + self.dropout(self.cross_attention(self.cross_norm(x), memory, mask, positions=positions))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
