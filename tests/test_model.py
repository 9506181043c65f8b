from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import random_ids
from test_decoding import SIZES, histories, small_model

from tiger.core.config import build
from tiger.core.errors import ConfigError
from tiger.models.tiger.batches import PAD, columns, user_token_ids
from tiger.models.tiger.model import PRESETS, ModelConfig, TigerModel

KINDS = [{}, {"encoder_input": "items"}, {"encoder_input": "items", "dense": 0.5}]


def model_and_items(kind: dict[str, object], **changes: object) -> tuple[TigerModel, np.ndarray]:
    """A model of 20 items, and what it reads of each."""
    model = small_model(SIZES, items=20, **kind, **changes)
    return model, columns(random_ids(np.random.default_rng(0), 20, SIZES), bool(model.dense))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_padding_changes_nothing(kind: dict[str, object]) -> None:
    """A history alone equals the same history beside longer ones."""
    (model, items), rng = model_and_items(kind), np.random.default_rng(0)
    history, target = torch.from_numpy(items[rng.integers(0, 20, (1, 3))]), torch.from_numpy(items[:1])
    padded = torch.cat([torch.full((1, 4, model.columns), PAD), history], dim=1)
    torch.testing.assert_close(model(history, target), model(padded, target))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_fast_one_pass_equals_one_example_per_target(kind: dict[str, object]) -> None:
    """Nothing of a target or of what follows it reaches its history; padding changes nothing."""
    (model, items), rng = model_and_items(kind, encoder="causal", max_history_items=6), np.random.default_rng(0)
    sequence = torch.from_numpy(items[rng.integers(0, 20, (3, 7))])
    together = model(sequence, torch.full((3,), 6))
    alone = sum(model(sequence[:, : length + 1], torch.ones(3, dtype=torch.int64)) for length in range(1, 7))
    torch.testing.assert_close(together, alone)
    last_two = model(sequence, torch.full((3,), 2))
    torch.testing.assert_close(
        last_two, sum(model(sequence[:, : length + 1], torch.ones(3, dtype=torch.int64)) for length in (5, 6))
    )
    padded = torch.cat([torch.full((3, 4, model.columns), PAD), sequence], dim=1)
    torch.testing.assert_close(model(padded, torch.full((3,), 6)), together)


def test_fast_targets_see_the_most_recent_items_only() -> None:
    """With an encoder that carries nothing from item to item, an item before the window changes nothing."""
    model, rng = small_model(SIZES, encoder="causal", max_history_items=2), np.random.default_rng(0)
    torch.nn.init.zeros_(model.encoder[0].attention.out.weight)
    codes = random_ids(rng, 20, SIZES).codes.astype(np.int64)
    sequence, one = torch.from_numpy(codes[rng.integers(0, 20, (1, 6))]), torch.ones(1, dtype=torch.int64)
    outside, inside = sequence.clone(), sequence.clone()
    outside[0, 2] = (sequence[0, 2] + 1) % 3
    inside[0, 3] = (sequence[0, 3] + 1) % 3
    assert torch.equal(model(sequence, one), model(outside, one))
    assert not torch.equal(model(sequence, one), model(inside, one))


def test_the_mark_stands_on_the_first_item_that_is_read_and_on_no_other() -> None:
    """With an encoder that carries nothing from item to item; the models are alike but for the mark."""
    states, codes = [], random_ids(np.random.default_rng(0), 20, SIZES).codes.astype(np.int64)
    history = torch.from_numpy(codes[[[1, 2, 3, 4], [5, 6, 7, 8]]])
    history[1, :2] = PAD
    for mark in (False, True):
        model = small_model(SIZES, encoder="causal", start_of_history_embedding=mark, encoder_input="items")
        torch.nn.init.zeros_(model.encoder[0].attention.out.weight)
        states.append(model._encode_causal(history)[0])
    differs = (states[0] - states[1]).abs().sum(2) > 1e-6
    assert differs.tolist() == [[True, False, False, False], [False, False, True, False]]


def test_only_the_most_recent_items_are_read() -> None:
    model, rng = small_model(SIZES, max_history_items=4), np.random.default_rng(0)
    codes = random_ids(rng, 20, SIZES).codes.astype(np.int64)
    history, target = torch.from_numpy(codes[rng.integers(0, 20, (2, 9))]), torch.from_numpy(codes[:2])
    torch.testing.assert_close(model(history, target), model(history[:, -4:], target))


def test_the_decoder_does_not_see_the_code_it_predicts() -> None:
    """Changing a code changes the loss of its own level and of later ones, never of earlier ones."""
    model, rng = small_model(SIZES), np.random.default_rng(0)
    codes = random_ids(rng, 20, SIZES).codes
    history = histories(rng, codes, users=1, longest=3)
    memory = model.encode(history)
    scores = []
    for last in (0, 1):
        x = model._decoder_input(torch.tensor([[1, 2, last]]))
        for layer, key_value in zip(model.decoder, memory.key_values, strict=True):
            x = layer(x, len(SIZES), key_value, memory.mask, None)
        scores.append(x)
    torch.testing.assert_close(scores[0], scores[1])


def test_probabilities_of_all_ids_sum_to_one() -> None:
    model, rng = small_model(SIZES), np.random.default_rng(0)
    every = torch.cartesian_prod(*(torch.arange(size) for size in SIZES))
    history = histories(rng, random_ids(rng, 20, SIZES).codes, users=1, longest=3)
    losses = model(history.expand(len(every), -1, -1), every) * len(SIZES)
    assert torch.exp(-losses).sum().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_build(preset: str) -> None:
    config = build(ModelConfig, {"preset": preset, "dropout": 0.3})
    assert config.dropout == 0.3
    assert config.num_layers == PRESETS[preset]["num_layers"]
    model = TigerModel(config, (4, 4, 4))
    assert model(torch.zeros(2, 3, 3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64)).shape == (2,)


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ConfigError, match="preset"):
        build(ModelConfig, {"preset": "huge"})


def test_user_tokens_are_stable() -> None:
    assert user_token_ids(["a", "b", "a"], 2000).tolist() == [928, 1668, 928]


def test_an_item_token_is_the_sum_of_its_codes() -> None:
    """The order of an item's codes over its levels cannot matter to a sum, and which codes they are must."""
    model = small_model((4, 4), encoder_input="items")
    with torch.no_grad():
        model.code_embedding.weight[4:] = model.code_embedding.weight[:4]  # both levels embed alike
    target = torch.tensor([[0, 1]])
    first, swapped, other = (model(torch.tensor([[codes]]), target) for codes in ([1, 2], [2, 1], [1, 3]))
    torch.testing.assert_close(first, swapped)
    assert not torch.equal(first, other)


def test_the_dense_loss_is_the_cross_entropy_over_all_items() -> None:
    model, items = model_and_items(KINDS[2])
    history, target = torch.from_numpy(items[None, :3]), torch.from_numpy(items[7:8])
    torch.nn.init.normal_(model.repeats)
    of_codes, of_items = model.losses(history, target)
    query = model.encode(history).query
    scores = query @ model.item_embeddings().T
    scores[:, :3] += query @ model.repeats  # the history is items 0, 1 and 2
    torch.testing.assert_close(of_items, -scores.log_softmax(-1)[:, 7])
    torch.testing.assert_close(model(history, target), of_codes + 0.5 * of_items)


def test_repeats_count_and_both_ways_to_score_agree() -> None:
    model, items = model_and_items(KINDS[2])
    torch.nn.init.normal_(model.repeats)
    history = torch.from_numpy(items[[[4, 2, 4], [1, 5, 3]]])
    history[1, 0] = -1
    memory, keys = model.encode(history), model.item_embeddings()
    scores = model.dense_logits(memory.query, keys, memory.last)
    worth, plain = memory.query @ model.repeats, memory.query @ keys.T
    torch.testing.assert_close((scores - plain)[0, [4, 2, 1]], worth[0] * torch.tensor([2.0, 1.0, 0.0]))
    torch.testing.assert_close((scores - plain)[1, [5, 3, 1, 0]], worth[1] * torch.tensor([1.0, 1.0, 0.0, 0.0]))
    asked = torch.tensor([[4, 0, 2], [3, 3, 1]])
    some = model.dense_logits_of(memory.query, keys[asked], memory.last, asked)
    torch.testing.assert_close(some, scores.gather(1, asked))
    same_for_all = model.dense_logits_of(memory.query, keys[asked[0]], memory.last, asked[0])
    torch.testing.assert_close(same_for_all, scores[:, asked[0]])


def test_a_dense_head_needs_item_tokens_and_texts() -> None:
    with pytest.raises(ConfigError, match="encoder_input"):
        build(ModelConfig, {"dense": 0.5})
    with pytest.raises(ValueError, match="pass vectors"):
        TigerModel(build(ModelConfig, {"dense": 0.5, "encoder_input": "items"}), SIZES)


def test_a_sampled_softmax_stands_for_the_whole_one() -> None:
    """The mean of the exponent of the loss over draws is that of the loss over all items; evaluation takes all."""
    rng = np.random.default_rng(8)
    read = columns(random_ids(rng, 55, SIZES), True)
    sequence, targets = histories(rng, read, users=16, longest=4).clamp_min(0), torch.full((16,), 2)
    kind = {"encoder": "causal", "encoder_input": "items", "dense": 0.5, "dropout": 0.0}
    whole, sampled = small_model(SIZES, 3, 55, **kind), small_model(SIZES, 3, 55, **kind, dense_negatives=28)
    for model in (whole, sampled):
        torch.nn.init.normal_(model.item_embedding.weight, std=0.3, generator=torch.Generator().manual_seed(0))
        torch.nn.init.normal_(model.repeats, std=0.3, generator=torch.Generator().manual_seed(1))
    history, item = sequence[:, :-1], sequence[:, -1, -1]
    query = whole.encode(history).query.detach()
    numbers = history[..., -1]
    truth = whole._dense_loss(query, item, numbers)
    assert torch.equal(truth, sampled._dense_loss(query, item, numbers))
    sampled.train()
    torch.manual_seed(0)
    with torch.no_grad():
        drawn = torch.stack([sampled._dense_loss(query, item, numbers) for _ in range(3_000)])
    assert float(drawn.std(0).mean()) > 0.01  # it is a draw
    torch.testing.assert_close(drawn.exp().mean(0), truth.detach().exp(), atol=0, rtol=0.05)
    with torch.no_grad():
        both = sampled.losses(sequence, targets)
    assert all(torch.isfinite(loss).all() for loss in both if loss is not None)
