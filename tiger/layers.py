"""The layers of the encoder-decoder: attention, feed-forward, and what a beam remembers of the codes before.

Pre-norm. Names of shapes are those of `model.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Past = list[tuple[Tensor, Tensor]]
"""Keys and values of the places so far, each [B, Q, H, E], or [B, 1, H, E] where all beams of a user share a place."""


def of_parents(past: list[Past], parents: Tensor) -> list[Past]:
    """What the layers remember, for beams that go on from the beams `parents` int64 [B, Q] of the step before."""
    batch = torch.arange(len(parents), device=parents.device)[:, None]

    def chosen(x: Tensor) -> Tensor:
        if x.shape[1] == 1:  # the first place: the same for all
            return x
        return x.flatten(0, 1).index_select(0, (batch * x.shape[1] + parents).flatten()).unflatten(0, parents.shape)

    return [[(chosen(key), chosen(value)) for key, value in places] for places in past]


class Attention(nn.Module):
    """Multi-head attention on PyTorch's fused kernels; keys and values can be made once and used many times."""

    def __init__(self, d_model: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(d_model, heads * head_dim, bias=False)
        self.key_value = nn.Linear(d_model, 2 * heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, d_model, bias=False)

    def keys_values(self, x_BSM: Tensor, places: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values, each [B, H, S, E]; keys turned by their places [S], where places are relative."""
        both = self.key_value(x_BSM).unflatten(-1, (2, self.heads, -1))
        key, value = both.permute(2, 0, 3, 1, 4)
        return (key if places is None else turn(key, places)), value

    def one_key_value(self, x_BQM: Tensor) -> tuple[Tensor, Tensor]:
        """Key and value [B, Q, H, E] of every query's own place."""
        key, value = self.key_value(x_BQM).unflatten(-1, (2, self.heads, -1)).unbind(2)
        return key, value

    def over_places(self, x_BQM: Tensor, past: Past) -> Tensor:
        """Every query over one key and value of its own a place.

        For the few places of a semantic ID this takes less than half the time of the fused kernel, which is called with
        one query a beam and wants all places in one tensor.
        """
        query_BQHE = self.query(x_BQM).unflatten(-1, (self.heads, -1))
        scores_BQHP = (
            torch.stack([(query_BQHE * key).sum(-1) for key, _ in past], dim=-1) * query_BQHE.shape[-1] ** -0.5
        )
        weights = scores_BQHP.softmax(-1).unsqueeze(-1).unbind(-2)
        mixed_BQHE = weights[0] * past[0][1]
        for weight, (_, value) in zip(weights[1:], past[1:], strict=True):
            mixed_BQHE = torch.addcmul(mixed_BQHE, weight, value)
        return self.out(mixed_BQHE.flatten(2))

    def forward(
        self,
        x_BQM: Tensor,
        key_value: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        causal: bool = False,
        places: Tensor | None = None,
    ) -> Tensor:
        query_BHQE = self.query(x_BQM).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        if places is not None:
            query_BHQE = turn(query_BHQE, places)
        mixed_BHQE = F.scaled_dot_product_attention(query_BHQE, *key_value, attn_mask=mask, is_causal=causal)
        return self.out(mixed_BHQE.transpose(1, 2).flatten(2))


def turn(x_BHSE: Tensor, places: Tensor) -> Tensor:
    """Rotary places (Su et al. 2021, RoFormer): a score depends on the difference of two places only.

    Wavelengths run from 6 to 600 items, because histories are short.
    """
    half = x_BHSE.shape[-1] // 2
    angles = places[:, None] * torch.logspace(0, -2, half, device=x_BHSE.device)
    cos, sin = angles.cos().to(x_BHSE.dtype), angles.sin().to(x_BHSE.dtype)
    first, second = x_BHSE[..., :half], x_BHSE[..., half : 2 * half]
    turned = [first * cos - second * sin, first * sin + second * cos, x_BHSE[..., 2 * half :]]
    return torch.cat(turned, dim=-1)


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

    def forward(self, x_BSM: Tensor, mask: Tensor | None, places: Tensor | None) -> Tensor:
        normed = self.attention_norm(x_BSM)
        key_value = self.attention.keys_values(normed, places)
        x_BSM = x_BSM + self.dropout(self.attention(normed, key_value, mask, places=places))
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
        places: Tensor | None,
    ) -> Tensor:
        """All codes of all targets at once, each attending to the codes of its own target that come before it.

        Args:
            x_BQM: `levels` queries a target, targets one after another.
            places: of the queries, [Q].
        """
        normed = self.self_norm(x_BQM).unflatten(1, (-1, levels)).flatten(0, 1)
        attended = self.self_attention(normed, self.self_attention.keys_values(normed), causal=True)
        return self._rest(x_BQM + self.dropout(attended.view_as(x_BQM)), memory, mask, places)

    def step(
        self, x_BQM: Tensor, past: Past, memory: tuple[Tensor, Tensor], mask: Tensor | None, places: Tensor | None
    ) -> tuple[Tensor, Past]:
        """One place of Q beams a user; returns their states and `past` with this place."""
        normed = self.self_norm(x_BQM)
        past = [*past, self.self_attention.one_key_value(normed)]
        x_BQM = x_BQM + self.self_attention.over_places(normed, past)
        return self._rest(x_BQM, memory, mask, places), past

    def _rest(self, x: Tensor, memory: tuple[Tensor, Tensor], mask: Tensor | None, places: Tensor | None) -> Tensor:
        x = x + self.dropout(self.cross_attention(self.cross_norm(x), memory, mask, places=places))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
