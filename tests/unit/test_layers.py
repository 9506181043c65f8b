from __future__ import annotations

import pytest
import torch

from tiger.models.tiger.layers import Attention, Dropout


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.999999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_keeps_the_given_fraction_and_the_mean(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.full((301, 7, 97), 2.0, dtype=dtype, requires_grad=True)
    found = Dropout(p)(x)
    assert found.dtype == dtype
    kept = (found != 0).float()
    expected = max(round((1 - p) * 2**16), 1) / 2**16
    assert abs(kept.mean().item() - expected) < 4 * (expected * p / x.numel()) ** 0.5
    scale = torch.tensor(1 / expected, dtype=dtype)
    assert torch.equal(found[found != 0].unique(), (2 * scale)[None])
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert torch.equal(gradient, kept.to(dtype) * scale)  # the mask of the forward pass


def test_dropped_elements_are_independent() -> None:
    """Elements share a 64-bit number with three others; neither they nor two calls may be alike."""
    torch.manual_seed(0)
    first, second = ((Dropout(0.5)(torch.ones(1 << 18)) > 0).float() - 0.5 for _ in range(2))
    limit = 4 * 0.25 * (1 << 18) ** -0.5
    assert abs((first * second).mean().item()) < limit
    for distance in (1, 2, 3, 4, 64):
        assert abs((first[distance:] * first[:-distance]).mean().item()) < limit


def test_dropout_follows_the_seed_and_is_off_in_evaluation() -> None:
    x, dropout = torch.randn(5, 3), Dropout(0.4)
    torch.manual_seed(1)
    first, other = dropout(x), dropout(x)
    torch.manual_seed(1)
    assert torch.equal(dropout(x), first)
    assert not torch.equal(first, other)
    assert dropout.eval()(x) is x
    assert Dropout(0.0)(x) is x


@pytest.mark.parametrize("levels", [1, 2, 3, 5])
def test_attention_within_a_target_equals_the_fused_kernel(levels: int) -> None:
    torch.manual_seed(0)
    attention = Attention(d_model=8, heads=2, head_dim=6)
    x = torch.randn(7, levels, 8, requires_grad=True)
    weight = torch.randn(7, levels, 8)
    inputs = (x, *attention.parameters())
    fused = attention(x, attention.project_key_value(x), causal=True)
    found = attention.attend_within_target(x)
    torch.testing.assert_close(found, fused)
    expected = torch.autograd.grad((fused * weight).sum(), inputs)
    gradients = torch.autograd.grad((found * weight).sum(), inputs)
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other)
