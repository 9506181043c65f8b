"""The contract, held over every file in tiger/tokenizers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tiger.config import shipped_plugins
from tiger.diagnostics import code_figures
from tiger.errors import ConfigError, HealthError
from tiger.learning import encode_all, learn_tokenizer
from tiger.tokenizers import TokenizerConfig

KINDS = shipped_plugins("tiger.tokenizers")
CPU = torch.device("cpu")


def config(kind: str, **changes: object) -> TokenizerConfig:
    training = {} if kind == "rkmeans" else {"training": {"epochs": 20, "batch_size": 128}}
    return TokenizerConfig.resolve({"kind": kind, "codebook_size": 16, **training, **changes})


def clusters(items: int = 800, dim: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(40, dim, generator=generator)
    return centers.repeat(items // 40, 1) + torch.randn(items, dim, generator=generator)


def test_the_shipped_kinds() -> None:
    assert {"rqvae", "rkmeans"} <= set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_have_the_contracts_form_and_are_used(kind: str) -> None:
    vectors = clusters()
    tokenizer, result = learn_tokenizer(config(kind), vectors, device=CPU)
    codes = encode_all(tokenizer, vectors, CPU)
    assert codes.dtype == torch.int64
    assert codes.shape == (800, 3)
    figures = code_figures(codes.numpy(), 16)
    assert all(figures[f"usage@{level}"] == 1 for level in (1, 2, 3))
    assert figures["unique_ratio"] > 0.4
    assert result.best["reconstruction_error"] < 0.75  # half of the variance is noise that no code can hold
    one_by_one = torch.cat([tokenizer.encode(row[None]) for row in vectors[:50]])
    assert torch.equal(one_by_one, codes[:50])


@pytest.mark.parametrize("kind", KINDS)
def test_equal_seeds_give_equal_tokenizers_and_other_seeds_others(kind: str) -> None:
    vectors = clusters()
    first, again, other = (learn_tokenizer(config(kind, seed=s), vectors, device=CPU)[0] for s in (1, 1, 2))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert not torch.equal(first.encode(vectors), other.encode(vectors))


@pytest.mark.parametrize("kind", KINDS)
def test_each_level_brings_the_reconstruction_closer(kind: str) -> None:
    vectors = clusters()
    errors = []
    for levels in (1, 2, 3):
        _, result = learn_tokenizer(config(kind, levels=levels), vectors, device=CPU)
        errors.append(result.best["reconstruction_error"])
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("kind", KINDS)
def test_forward_gives_one_loss_per_row(kind: str) -> None:
    vectors = clusters()
    tokenizer, _ = learn_tokenizer(config(kind), vectors, device=CPU)
    losses = tokenizer(vectors[:7])
    assert losses.shape == (7,)
    assert (losses >= 0).all()
    torch.testing.assert_close(losses[3:4], tokenizer(vectors[3:4]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_codebook_larger_than_the_catalog_is_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"codebook_size = 16 .* 10 items .* at most 10"):
        learn_tokenizer(config(kind), clusters()[:10], device=CPU)


@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_dimension_is_harmless(kind: str) -> None:
    vectors = clusters()
    vectors[:, 3] = 5.0
    tokenizer, result = learn_tokenizer(config(kind), vectors, device=CPU)
    assert np.isfinite(result.best["reconstruction_error"])
    assert torch.isfinite(tokenizer.decode(tokenizer.encode(vectors))).all()


def test_lloyd_refits_keep_codes_alive_where_gradients_alone_lose_them() -> None:
    vectors = clusters(1600)
    usage = {}
    for lloyd in (True, False):
        _, result = learn_tokenizer(config("rqvae", lloyd=lloyd, codebook_size=64), vectors, device=CPU)
        usage[lloyd] = result.log[-1]["usage@1"]
    assert usage[True] > 0.95
    assert usage[True] > usage[False]


def test_an_exploding_learning_rate_stops_before_the_step() -> None:
    exploding = {"epochs": 5, "batch_size": 128, "learning_rate": 1e30, "clip_norm": 1e30, "warmup_steps": 0}
    with pytest.raises(HealthError, match="not finite at step"):
        learn_tokenizer(config("rqvae", training=exploding), clusters(), device=CPU)
