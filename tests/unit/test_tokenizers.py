"""The contract, held over every file in tiger/tokenizers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tiger.core.config import shipped_plugins
from tiger.core.errors import ConfigError, DataError, HealthError
from tiger.evaluation.health import check_tokenizer, require
from tiger.metrics.codes import code_metrics
from tiger.semantic_ids.assignment import SemanticIdsConfig, assign
from tiger.tokenizers._residual import Level, QuantizeWithCommitment, rotation_trick
from tiger.tokenizers.base import TokenizerConfig, suitable_codebook_size
from tiger.tokenizers.kmeans import kmeans, nearest, sinkhorn_potentials
from tiger.tokenizers.rqvae import RQVAE
from tiger.tokenizers.train import encode_dataset, fit_tokenizer

KINDS = shipped_plugins("tiger.tokenizers")
CPU = torch.device("cpu")


def config(kind: str, **changes: object) -> TokenizerConfig:
    training = {"training": {"epochs": 20, "batch_size": 128}} if kind == "rqvae" else {}
    return TokenizerConfig.resolve({"kind": kind, "codebook_size": 16, **training, **changes})


def clusters(items: int = 800, dim: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(40, dim, generator=generator)
    return centers.repeat(items // 40, 1) + torch.randn(items, dim, generator=generator)


def test_the_shipped_kinds() -> None:
    assert {"rqvae", "rkmeans", "opq"} <= set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_have_the_contracts_form_and_are_used(kind: str) -> None:
    vectors = clusters()
    tokenizer, result = fit_tokenizer(config(kind), vectors, device=CPU)
    codes = encode_dataset(tokenizer, vectors, CPU)
    assert codes.dtype == torch.int64
    assert codes.shape == (800, 3)
    figures = code_metrics(codes.numpy(), 16)
    assert all(figures[f"usage@{level}"] == 1 for level in (1, 2, 3))
    assert figures["unique_ratio"] > 0.4
    assert result.best["reconstruction_error"] < 0.75  # half of the variance is noise that no code can hold
    one_by_one = torch.cat([tokenizer.encode(row[None]) for row in vectors[:50]])
    assert torch.equal(one_by_one, codes[:50])


@pytest.mark.parametrize("kind", KINDS)
def test_equal_seeds_give_equal_tokenizers_and_other_seeds_others(kind: str) -> None:
    vectors = clusters()
    first, again, other = (fit_tokenizer(config(kind, seed=s), vectors, device=CPU)[0] for s in (1, 1, 2))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert not torch.equal(first.encode(vectors), other.encode(vectors))


@pytest.mark.parametrize("kind", KINDS)
def test_each_level_brings_the_reconstruction_closer(kind: str) -> None:
    vectors = clusters()
    errors = []
    for levels in (1, 2, 3):
        _, result = fit_tokenizer(config(kind, num_levels=levels), vectors, device=CPU)
        errors.append(result.best["reconstruction_error"])
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("kind", KINDS)
def test_forward_gives_one_loss_per_row(kind: str) -> None:
    vectors = clusters()
    tokenizer, _ = fit_tokenizer(config(kind), vectors, device=CPU)
    losses = tokenizer(vectors[:7])
    assert losses.shape == (7,)
    assert (losses >= 0).all()
    torch.testing.assert_close(losses[3:4], tokenizer(vectors[3:4]))


@pytest.mark.parametrize("items", [1, 2, 15])
@pytest.mark.parametrize("kind", KINDS)
def test_a_codebook_larger_than_the_catalog_is_refused(kind: str, items: int) -> None:
    with pytest.raises(ConfigError, match=rf"codebook_size = 16 .* {items} items .* at most {items}"):
        fit_tokenizer(config(kind), clusters()[:items], device=CPU)


@pytest.mark.parametrize("kind", KINDS)
def test_a_codebook_as_large_as_the_catalog_has_a_code_for_every_item(kind: str) -> None:
    vectors = clusters()[:16]
    tokenizer, _ = fit_tokenizer(config(kind), vectors, device=CPU)
    assert len(tokenizer.encode(vectors).unique(dim=0)) == 16


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_is_not_finite_is_named(kind: str) -> None:
    vectors = clusters()
    vectors[[7, 70], 2] = torch.nan
    with pytest.raises(HealthError, match=r"embeddings of 2 items are not finite, including \[7, 70\]"):
        fit_tokenizer(config(kind), vectors, device=CPU)


@pytest.mark.parametrize("kind", KINDS)
def test_identical_items_end_in_a_verdict_and_not_in_silence(kind: str) -> None:
    vectors = clusters()[:1].repeat(800, 1)
    tokenizer, _ = fit_tokenizer(config(kind), vectors, device=CPU)
    codes = encode_dataset(tokenizer, vectors, CPU).numpy()
    latents = tokenizer.latent(tokenizer.standardize(vectors)).detach().numpy()
    with pytest.raises(HealthError, match="maps all items to one point"):
        require(check_tokenizer(latents, codes, 16))


@pytest.mark.parametrize("policy", ["extra_code", "nearest_free"])
@pytest.mark.parametrize("kind", KINDS)
def test_three_hundred_identical_items(kind: str, policy: str) -> None:
    """With 800 others and a last level of 16 codes: unique IDs, or one clear error if they do not fit."""
    vectors = torch.cat([clusters(), clusters()[:1].repeat(300, 1)])
    tokenizer, _ = fit_tokenizer(config(kind), vectors, device=CPU)
    codes = encode_dataset(tokenizer, vectors, CPU).numpy()
    costs = tokenizer.assignment_costs(vectors)
    settings = {"collision_policy": policy, "collision_codes": 400}
    ids = assign(codes, 16, SemanticIdsConfig(**settings), costs)
    assert len(np.unique(ids.codes, axis=0)) == 1100
    few = 200 if policy == "extra_code" else 8  # nearest_free: some twenty items are left per code of the last level
    with pytest.raises(DataError, match=rf"the collision level has {few} codes .* are their texts equal\?"):
        assign(codes, 16, SemanticIdsConfig(**settings | {"collision_codes": few}), costs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_dimension_is_harmless(kind: str) -> None:
    vectors = clusters()
    vectors[:, 3] = 5.0
    tokenizer, result = fit_tokenizer(config(kind), vectors, device=CPU)
    assert np.isfinite(result.best["reconstruction_error"])
    assert torch.isfinite(tokenizer.decode(tokenizer.encode(vectors))).all()


@pytest.mark.parametrize("kind", KINDS)
def test_last_costs_against_decoding_every_last_code(kind: str) -> None:
    """The order of the costs is that of the errors, for tokenizers whose decoder is linear."""
    changes = {"hidden_dims": (), "training": {"epochs": 0}} if kind == "rqvae" else {}
    vectors = clusters()
    tokenizer, _ = fit_tokenizer(config(kind, **changes), vectors, device=CPU)
    some = vectors[:20]
    codes, costs = tokenizer.encode(some), tokenizer.last_level_costs(some)
    assert costs.shape == (20, 16)
    errors = []
    for code in range(16):
        changed = codes.clone()
        changed[:, -1] = code
        errors.append(tokenizer.errors(some, changed))
    truth = torch.stack(errors, dim=1)
    differences = truth - truth[:, :1]
    torch.testing.assert_close(costs - costs[:, :1], differences, atol=2e-2 * float(differences.abs().max()), rtol=0)


def test_wide_latents_and_many_rows_of_one_code_train_the_same_twice() -> None:
    """Gradients of rows that chose one code are summed: on several threads in one order, too."""
    vectors = clusters(320, 384)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        settings = config("rqvae", training={"epochs": 4, "batch_size": 256})
        first, again = (fit_tokenizer(settings, vectors, device=CPU)[0].state_dict() for _ in range(2))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())


VARIANTS: list[dict[str, object]] = [
    {"codebook_update": "ema", "ema_decay": 0.9},
    {"codebook_update": "gradient"},
    {"codebook_update": "gradient", "reset_dead_codes": False},
    {"gradient_estimator": "rotation"},
    {"distance": "euclidean"},
    {"distance": "cosine"},
    {"linear_skip": False},
    {"latent_dim": 8},
    {"latent_dim": 32},
    {"reconstruction_reduction": "mean"},
    {"sinkhorn_last_level": True},
    {"hidden_dims": ()},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_option_trains_and_keeps_its_codes(variant: dict[str, object]) -> None:
    vectors = clusters()
    tokenizer, result = fit_tokenizer(config("rqvae", **variant), vectors, device=CPU)
    figures = code_metrics(encode_dataset(tokenizer, vectors, CPU).numpy(), 16)
    assert all(figures[f"usage@{level}"] > 0.8 for level in (1, 2, 3))
    assert result.best["reconstruction_error"] < 0.85
    assert torch.isfinite(tokenizer.last_level_costs(vectors[:9])).all()


def test_training_resumes_from_where_k_means_ends() -> None:
    vectors = clusters()
    plain = config("rqvae", hidden_dims=(), training={"epochs": 0})
    _, start = fit_tokenizer(plain, vectors, device=CPU)
    _, kmeans = fit_tokenizer(config("rkmeans"), vectors, device=CPU)
    _, trained = fit_tokenizer(config("rqvae"), vectors, device=CPU)
    assert start.best["reconstruction_error"] == pytest.approx(kmeans.best["reconstruction_error"], abs=1e-5)
    assert trained.best["reconstruction_error"] < kmeans.best["reconstruction_error"]


def test_without_linear_path_gradients_alone_lose_codes_and_refits_or_resets_keep_them() -> None:
    vectors = clusters(1600)
    usage = {}
    for update, reset in (("lloyd", True), ("gradient", True), ("gradient", False)):
        variant = {"codebook_update": update, "reset_dead_codes": reset, "linear_skip": False, "codebook_size": 64}
        variant |= {"distance": "euclidean", "hidden_dims": (256, 128), "latent_dim": 64, "dropout": 0.1}
        _, result = fit_tokenizer(config("rqvae", **variant), vectors, device=CPU)
        usage[update, reset] = result.log[-1]["usage@1"]
    assert usage["lloyd", True] > 0.95
    assert usage["gradient", True] > usage["gradient", False]


def test_balancing_prices_even_out_the_last_level() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(2000, 4, generator=generator) ** 3
    centroids = kmeans(points, 16, iterations=20, generator=generator)
    before = nearest(points, centroids)[0].bincount(minlength=16)
    after = nearest(points, centroids, sinkhorn_potentials(points, centroids))[0].bincount(minlength=16)
    assert after.max() * 3 < before.max()


def test_the_rotation_trick_turns_gradients_and_keeps_values() -> None:
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(6, 5, generator=generator, requires_grad=True)
    quantized = torch.randn(6, 5, generator=generator)
    passed = rotation_trick(latent, quantized)
    torch.testing.assert_close(passed, quantized)
    passed.sum().backward()
    stretch = quantized.norm(dim=1) / latent.detach().norm(dim=1)
    assert latent.grad is not None
    torch.testing.assert_close(latent.grad.norm(dim=1), stretch * 5**0.5)  # a rotation keeps lengths


def test_an_exploding_learning_rate_stops_before_the_step() -> None:
    exploding = {"epochs": 5, "batch_size": 128, "learning_rate": 1e30, "max_grad_norm": 1e30, "warmup_steps": 0}
    with pytest.raises(HealthError, match="not finite at step"):
        fit_tokenizer(config("rqvae", training=exploding), clusters(), device=CPU)


@pytest.mark.parametrize("distance", ["euclidean", "mixed", "cosine"])
def test_written_out_gradients_are_those_of_autograd(distance: str) -> None:
    """The loss as TIGER states it, differentiated by autograd, against the gradients that training uses."""
    tokenizer, _ = fit_tokenizer(config("rqvae", distance=distance), clusters(), device=CPU)
    assert isinstance(tokenizer, RQVAE)
    latent = tokenizer.latent(tokenizer.standardize(clusters()[:50])).detach().double().requires_grad_()
    codebooks = tokenizer.codebooks.detach().double().requires_grad_()
    levels = [
        Level(*(t if t.dtype == torch.int64 else t.double() for t in vars(level).values()))
        for level in tokenizer.quantize(latent.detach().float())
    ]
    rest, length, expected, total = latent, torch.ones(50, 1).double(), torch.zeros(50).double(), 0
    for codebook, level in zip(codebooks, levels, strict=True):
        relative = level.length / length
        rest, length = rest / relative, level.length
        point, chosen = rest / level.size, codebook[level.code]
        pull = (point.detach() - chosen).square().sum(1) + 0.25 * (point - chosen.detach()).square().sum(1)
        expected, total = expected + length.squeeze(1).square() * pull, total + length * chosen.detach()
        rest = rest - chosen.detach()
    toward = torch.randn(50, latent.shape[1], generator=torch.Generator().manual_seed(3)).double()
    passed = latent + (total - latent).detach()
    truth = torch.autograd.grad((expected * torch.arange(50)).sum() + (passed * toward).sum(), [latent, codebooks])
    loss, quantized = QuantizeWithCommitment.apply(latent, codebooks, levels, 0.25)
    found = torch.autograd.grad((loss * torch.arange(50)).sum() + (quantized * toward).sum(), [latent, codebooks])
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(quantized, passed, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(found, truth, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("items", "size"), [(20, 4), (300, 16), (2000, 64), (12_101, 512)])
def test_a_suitable_codebook_has_16_to_32_items_per_code(items: int, size: int) -> None:
    assert suitable_codebook_size(items) == size
