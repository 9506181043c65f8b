"""The generative model: what a prediction reads, and that its losses are the probabilities that search adds up."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.factories import (
    KINDS,
    PAPER,
    SIZES,
    losses,
    model_of_random_ids,
    random_histories,
    random_ids,
    small_model,
    toy_histories,
)
from tiger.core.config import build
from tiger.core.errors import ConfigError
from tiger.models.padding import PAD
from tiger.models.sampling import hash_users
from tiger.models.tiger.batches import make_examples
from tiger.models.tiger.config import PRESETS, TigerConfig
from tiger.models.tiger.model import TigerModel
from tiger.models.tiger.softmax import TrieSoftmax
from tiger.models.tiger.train import reference_losses
from tiger.semantic_ids.trie import Trie


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_padding_changes_nothing(kind: dict[str, object]) -> None:
    model, rng = model_of_random_ids(20, **kind), np.random.default_rng(0)
    history, target = torch.from_numpy(rng.integers(0, 20, (1, 3))), torch.tensor([0])
    padded = torch.cat([torch.full((1, 4), PAD), history], dim=1)
    torch.testing.assert_close(losses(model, history, target), losses(model, padded, target))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_losses_of_batches_are_those_of_each_target_alone(kind: dict[str, object]) -> None:
    """One pass over sequences, windows of long histories and batches of all lengths change no target's loss.

    Each target alone is predicted from its most recent items, as at inference.
    """
    model = model_of_random_ids(20, max_history_items=3, num_layers=2, **kind)
    histories = toy_histories(np.random.default_rng(3), 8, 20)
    examples = make_examples(
        histories, model.config, Trie(random_ids(np.random.default_rng(0), 20, SIZES)), known(model)
    )
    together = sum(
        float((model(*batch.inputs).detach().sum(1) * batch.weights).sum()) for batch in examples.batches(0, 0, 16)
    )
    alone, count = 0.0, 0
    for user in range(len(histories)):
        begin = int(histories.offsets[user])
        for position in range(begin + 1, int(histories.train_end[user])):
            history = torch.from_numpy(histories.items[begin:position].astype(np.int64))[None]
            target = torch.from_numpy(histories.items[position : position + 1].astype(np.int64))
            alone += float(losses(model, history[:, -model.encoder.context :], target).detach().sum())
            count += 1
    assert len(examples) == count == histories.training_examples()
    assert together == pytest.approx(alone, rel=1e-5)


def known(model: TigerModel) -> list[torch.Tensor]:
    return [torch.ones(count, dtype=torch.bool) for count in model.trie.num_nodes]


def test_a_causal_encoder_has_a_window_and_a_start_embedding() -> None:
    """With an encoder that carries nothing from item to item, an item before the window changes nothing.

    The start embedding is on the first item of a history, and on no other.
    """
    model = model_of_random_ids(20, max_history_items=2, **PAPER | {"encoder": "causal"})
    torch.nn.init.zeros_(model.encoder.layers[0].attention.out.weight)
    sequence, target = torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([6])
    outside, inside = sequence.clone(), sequence.clone()
    outside[0, 2], inside[0, 3] = 9, 9
    assert torch.equal(losses(model, sequence, target), losses(model, outside, target))
    assert not torch.equal(losses(model, sequence, target), losses(model, inside, target))
    history = torch.tensor([[1, 2, 3, 4], [PAD, PAD, 7, 8]])
    before = model.encoder(model.items, model.trie, history)
    with torch.no_grad():
        model.encoder.start_embedding += 1.0
    width = model.encoder.tokens_per_item
    changed = (model.encoder(model.items, model.trie, history) - before).abs().sum(2)[:, ::width] > 1e-6
    assert changed.tolist() == [[True, False, False, False], [False, False, True, False]]


def test_a_bidirectional_encoder_reads_only_the_most_recent_items() -> None:
    model, rng = model_of_random_ids(20, max_history_items=4, **PAPER), np.random.default_rng(0)
    history = torch.from_numpy(rng.integers(0, 20, (2, 9)))
    torch.testing.assert_close(model.encode(history).user_state, model.encode(history[:, -4:]).user_state)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), items=st.integers(2, 50), kind=st.sampled_from(KINDS))
def test_probabilities_sum_to_one_over_what_the_softmax_knows(seed: int, items: int, kind: dict[str, object]) -> None:
    """Over all items; with softmax over the codes of a level, over all tuples of codes, real or not: less for items."""
    model, rng = model_of_random_ids(items, seed, **kind), np.random.default_rng(seed)
    history = random_histories(rng, items, 1, 5).expand(items, -1)
    total = torch.exp(-losses(model, history, torch.arange(items)).sum(1)).sum().item()
    if model.config.softmax == "codes" and model.config.softmax_support == "level":
        assert total < 1 + 1e-5
    else:
        assert total == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("encoder", ["causal", "bidirectional"])
def test_gathered_softmax_equals_the_dense_one_in_values_and_gradients(encoder: str) -> None:
    """The slow truth: for every target, all nodes of a level, those with another parent masked."""
    model, rng = model_of_random_ids(40, encoder=encoder), np.random.default_rng(1)
    head, trie = model.softmax, model.trie
    assert isinstance(head, TrieSoftmax)
    targets, history = torch.from_numpy(rng.integers(0, 40, 30)), random_histories(rng, 40, 30, 6)
    x, state = torch.randn(30, trie.depth, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    everything = [np.ones(count, bool) for count in trie.num_nodes]
    gathered = head.losses(model.items, trie, x, state, history, targets, trie.siblings(targets.numpy(), everything))
    dense = torch.zeros(30, trie.depth)
    for level in range(trie.depth):
        vectors = head.vectors_of(model.items, trie, level, torch.arange(trie.num_nodes[level]))
        query = x[:, level] + head.query_projection[level](state)
        repeats = torch.zeros(30, trie.num_nodes[level])
        for row in range(30):
            for item in history[row].tolist():
                if item >= 0:
                    repeats[row, trie.paths[item, level].long()] += 1
        worth = query @ head.repeats[level].T
        logits = query @ vectors.T + worth[:, :1] * repeats / trie.num_items_below(level)
        logits = logits + (worth[:, 1:] * repeats if level < trie.depth - 1 else 0)
        parents = torch.zeros(trie.num_nodes[level], dtype=torch.long)
        if level:
            parents[trie.paths[:, level].long()] = trie.paths[:, level - 1].long()
            own = trie.paths[targets, level - 1].long()
            logits = logits.masked_fill(parents[None] != own[:, None], -torch.inf)
        dense[:, level] = torch.nn.functional.cross_entropy(logits, trie.paths[targets, level].long(), reduction="none")
    torch.testing.assert_close(gathered, dense)
    weights = [x, state, *(p for p in model.parameters() if p.requires_grad)]
    for one, other in zip(
        torch.autograd.grad(gathered.sum(), weights, allow_unused=True),
        torch.autograd.grad(dense.sum(), weights, allow_unused=True),
        strict=True,
    ):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_items_that_training_never_sees_are_left_out_of_its_softmax() -> None:
    """They have no learned vector, and no share of the probability; at inference they have one."""
    ids = random_ids(np.random.default_rng(0), 30, SIZES)
    model, rng = small_model(ids), np.random.default_rng(0)
    counts = torch.from_numpy(rng.integers(0, 2, 30))
    nodes = model.set_training_counts(counts)
    seen = counts.nonzero().squeeze(1)
    assert model.items.learned is not None
    assert not model.items.learned.weight[counts == 0].any()
    history = random_histories(rng, 30, 1, 5)
    flat = Trie(ids).sibling_tensors(seen.numpy(), [mask.numpy() for mask in nodes])
    sequence = torch.cat([history.expand(len(seen), -1), seen[:, None]], dim=1)
    positions = torch.arange(1, len(seen) + 1) * 5 - 1
    in_training = model(sequence, torch.ones_like(seen), positions, *flat)
    assert torch.exp(-in_training.sum(1)).sum().item() == pytest.approx(1, abs=1e-4)
    model.softmax.known_root.fill_(True)
    at_inference = losses(model, history.expand(30, -1), torch.arange(30))
    assert torch.exp(-at_inference.sum(1)[seen]).sum().item() < 1


def test_item_dropout_leaves_out_the_same_items_as_input_and_as_output() -> None:
    model = model_of_random_ids(50, item_dropout=0.4).train()
    assert model.items.learned is not None
    fractions = []
    for step in range(200):
        torch.manual_seed(step)
        model.items.begin_step()
        every = torch.arange(50)
        content, text = model.items.content(every), model.items.project_text(model.items.vectors)
        dropped = (content - text).abs().sum(1) < 1e-6
        assert torch.equal(dropped[[7, 3]], (model.items.content(every[[7, 3]]) - text[[7, 3]]).abs().sum(1) < 1e-6)
        fractions.append(float(dropped.float().mean()))
    assert np.mean(fractions) == pytest.approx(0.4, abs=0.02)
    model.eval().items.begin_step()
    assert ((model.items.content(every) - text).abs().sum(1) > 1e-6).all()


def test_the_decoder_does_not_see_the_code_it_predicts() -> None:
    """Changing a code changes the states of later levels, never that of its own or of earlier ones."""
    model = model_of_random_ids(20)
    encoded = model.encode(torch.tensor([[1, 2, 3]]))
    position = encoded.next_position
    states = [
        model.decoder(model.items, torch.tensor([[codes]]), encoded.key_values, encoded.mask, position)
        for codes in ([0, 5, 10], [0, 6, 11])
    ]
    torch.testing.assert_close(states[0][..., :2, :], states[1][..., :2, :])
    assert not torch.equal(states[0][..., 2, :], states[1][..., 2, :])


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_build(preset: str) -> None:
    config = build(TigerConfig, {"preset": preset, "dropout": 0.3})
    assert config.dropout == 0.3
    assert config.num_layers == PRESETS[preset]["num_layers"]
    ids = random_ids(np.random.default_rng(0), 20, SIZES)
    model = TigerModel(config, Trie(ids), torch.randn(20, 6)).eval()
    user = torch.zeros(2, dtype=torch.int64) if config.num_user_tokens else None
    assert model.encode(torch.tensor([[1, 2], [3, 4]]), user).user_state.shape == (2, config.d_model)


def test_impossible_configurations_are_refused() -> None:
    with pytest.raises(ConfigError, match="preset"):
        build(TigerConfig, {"preset": "huge"})
    with pytest.raises(ConfigError, match="encoder = causal has no user token"):
        build(TigerConfig, {"num_user_tokens": 10})
    ids = random_ids(np.random.default_rng(0), 20, SIZES)
    with pytest.raises(ConfigError, match="text embeddings of all 20 items"):
        TigerModel(build(TigerConfig, {}), Trie(ids))


def test_user_tokens_are_stable() -> None:
    assert hash_users(["a", "b", "a"], 2000).tolist() == [928, 1668, 928]


def test_an_item_token_is_the_sum_of_its_codes() -> None:
    """The order of an item's codes over its levels cannot matter to a sum, and which codes they are must."""
    ids = random_ids(np.random.default_rng(0), 16, (4, 4))
    model = small_model(ids, **PAPER | {"encoder_input": "items"})
    with torch.no_grad():
        model.items.code_embedding.weight[4:] = model.items.code_embedding.weight[:4]  # both levels embed alike
    item = {tuple(codes.tolist()): index for index, codes in enumerate(ids.codes)}
    states = [model.encode(torch.tensor([[item[codes]]])).user_state for codes in ((1, 2), (2, 1), (1, 3))]
    torch.testing.assert_close(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_reference_losses_are_those_of_uniform_and_popularity_over_real_children() -> None:
    ids = random_ids(np.random.default_rng(0), 25, SIZES)
    trie, targets = Trie(ids), np.random.default_rng(1).integers(0, 25, 200)
    found = reference_losses(trie, np.bincount(targets, minlength=25))
    codes = [tuple(row.tolist()) for row in ids.codes]
    for level in range(3):
        uniform, popular = [], []
        for target in targets.tolist():
            prefix = codes[target][:level]
            children = {row[: level + 1] for row in codes if row[:level] == prefix}
            counts = {child: 1 + sum(codes[t][: level + 1] == child for t in targets) for child in children}
            uniform.append(math.log(len(children)))
            popular.append(math.log(sum(counts.values()) / counts[codes[target][: level + 1]]))
        assert found["uniform"][level] == pytest.approx(np.mean(uniform))
        assert found["popularity"][level] == pytest.approx(np.mean(popular))
