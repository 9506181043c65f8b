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

    def project_code_key_value(self, x_BQM: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of codes, each [B, Q, H, E], without rotary embedding."""
        key, value = self.key_value(x_BQM).unflatten(-1, (2, self.heads, -1)).unbind(2)
        return key, value

    def attend_to_cache(self, x_BQM: Tensor, cache: KVCache) -> Tensor:
        """Attend to the cache: every query to its own key and value per position."""
        query_BQHE = self.query(x_BQM).unflatten(-1, (self.heads, -1))
        return self.out(_attend_to_own(query_BQHE, cache).flatten(2))

    def attend_within_target(self, x_TLM: Tensor) -> Tensor:
        """Attend causally within each of T targets, from each of its L codes to itself and those before."""
        if x_TLM.device.type != "cpu":
            return self(x_TLM, self.project_key_value(x_TLM), causal=True)
        queries = self.query(x_TLM).unflatten(-1, (self.heads, -1)).unbind(1)
        keys, values = (x.unbind(1) for x in self.project_code_key_value(x_TLM))
        cache = list(zip(keys, values, strict=True))
        mixed = [_attend_to_own(query, cache[: level + 1]) for level, query in enumerate(queries)]
        return self.out(torch.stack(mixed, dim=1).flatten(2))

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


def _attend_to_own(query: Tensor, cache: KVCache) -> Tensor:
    """Attend from each query [..., H, E] to its own key and value per position, each [..., H, E] or of a shape like it.

    For the few positions of a semantic ID this takes less than half the time of the fused kernel on a CPU, which would
    be called with one query per beam or target and needs all positions in one tensor.
    """
    scores = torch.stack([(query * key).sum(-1) for key, _ in cache]) * query.shape[-1] ** -0.5
    weights = scores.softmax(0).unsqueeze(-1).unbind()  # over a last dimension of 2 or 3 it takes seven times as long
    mixed = weights[0] * cache[0][1]
    for weight, (_, value) in zip(weights[1:], cache[1:], strict=True):
        mixed = torch.addcmul(mixed, weight, value)
    return mixed


class Dropout(nn.Dropout):
    """Dropout whose mask takes 16 random bits per element on a CPU; p is then rounded to a multiple of 1 / 65,536.

    PyTorch draws a double per element there, which took a tenth of a training step (LOG.md, 2026-11-29).
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p or x.device.type != "cpu":
            return super().forward(x)
        bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)  # None: to 2^63 - 1
        dropped = min(round(self.p * 2**16), 2**16 - 1)  # of 2^16 numbers
        kept = bits.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 2**15
        return x * (kept * (2**16 / (2**16 - dropped))).to(x.dtype)


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
        self.dropout = Dropout(dropout)

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
        self.dropout = Dropout(dropout)

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
        attended = self.self_attention.attend_within_target(normed)
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
        cache = [*cache, self.self_attention.project_code_key_value(normed)]
        x_BQM = x_BQM + self.self_attention.attend_to_cache(normed, cache)
        return self._cross_attention_and_mlp(x_BQM, memory, mask, positions), cache

    def _cross_attention_and_mlp(
        self, x: Tensor, memory: tuple[Tensor, Tensor], mask: Tensor | None, positions: Tensor | None
    ) -> Tensor:
        x = x + self.dropout(self.cross_attention(self.cross_norm(x), memory, mask, positions=positions))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
