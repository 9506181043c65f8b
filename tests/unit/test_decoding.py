"""Beam search against scoring every item without any search, and against a beam search in plain Python."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.factories import KINDS, PAPER, SIZES, losses, model_of_random_ids, random_histories, random_ids, small_model
from tiger.models.tiger.beam_search import (
    beam_search,
    limit_per_group,
    new_item_bonus,
    sample_top_k,
    score_all_items,
)
from tiger.models.tiger.model import TigerModel


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    items=st.integers(2, 40),
    extra=st.integers(0, 5),
    kind=st.sampled_from(KINDS),
    new=st.booleans(),
)
def test_a_wide_beam_is_exact(seed: int, items: int, extra: int, kind: dict[str, object], new: bool) -> None:
    """Eight users a case: 2,400 searches with repeats, new items, filters and exclusions.

    Each equals minus the loss of every item as a target, also with fewer items than the beam.
    """
    rng = np.random.default_rng(seed)
    model = model_of_random_ids(items, seed, **kind)
    if new:
        model.set_training_counts(torch.from_numpy(rng.integers(0, 2, items)))
        if model.config.softmax == "trie":
            model.softmax.known_root.fill_(True)  # a mask of the training loss alone
    history = random_histories(rng, items, users=8, longest=4)
    history[:, -1] = history[:, 0].clamp_min(0)  # repeats
    truth = score_all_items(model, history)
    found, scores = beam_search(model, history, beam=items + extra)
    for row in range(8):
        real = found[row] >= 0
        assert sorted(found[row][real].tolist()) == list(range(items))
        torch.testing.assert_close(scores[row][real], truth[row][found[row][real]], atol=1e-5, rtol=1e-5)
    allowed = torch.from_numpy(rng.random(items) < 0.6)
    excluded = torch.from_numpy(rng.integers(-1, items, (8, 3)))
    found, scores = beam_search(
        model, history, beam=items, allowed_nodes=model.trie.allowed_nodes(allowed), excluded_items=excluded
    )
    for row in range(8):
        real = found[row] >= 0
        wanted = set(torch.arange(items)[allowed].tolist()) - set(excluded[row].tolist())
        assert sorted(found[row][real].tolist()) == sorted(wanted)
        torch.testing.assert_close(scores[row][real], truth[row][found[row][real]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sizes", [(4, 5, 1), (4, 1, 5), (1, 6, 6)])
@pytest.mark.parametrize("kind", [{}, PAPER], ids=str)
def test_a_level_of_one_code_changes_nothing(sizes: tuple[int, ...], kind: dict[str, object]) -> None:
    model, rng = model_of_random_ids(18, sizes=sizes, **kind), np.random.default_rng(7)
    history = random_histories(rng, 18, users=5, longest=4)
    found, scores = beam_search(model, history, beam=18)
    torch.testing.assert_close(scores, score_all_items(model, history).gather(1, found), atol=1e-5, rtol=1e-5)


def test_a_temperature_samples_and_groups_are_limited() -> None:
    items = torch.arange(6).expand(20_000, -1)
    scores = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625, 1e-9]).log().expand(20_000, -1)
    noise = torch.rand(scores.shape, generator=torch.Generator().manual_seed(0)).clamp(1e-7, 1 - 1e-7)
    sampled, score = sample_top_k(items, scores, 3, 1.0, noise)
    fractions = torch.bincount(sampled[:, 0], minlength=6) / len(sampled)
    torch.testing.assert_close(fractions, scores[0].exp(), atol=0.01, rtol=0)  # the first is one from the softmax
    assert torch.equal(score, scores.gather(1, sampled))
    assert all(len(set(row)) == 3 for row in sampled[:100].tolist())
    groups = torch.tensor([0, 0, 0, 1, 1, 2])
    limited, score = limit_per_group(items[:1], scores[:1], 4, groups, 1)
    assert limited.tolist() == [[0, 3, 5, -1]]
    assert torch.isneginf(score[0, 3])
    limited, _ = limit_per_group(items[:1], scores[:1], 4, groups, 2)
    assert limited.tolist() == [[0, 1, 3, 4]]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    items=st.integers(5, 60),
    beam=st.integers(1, 12),
    kind=st.sampled_from(KINDS),
)
def test_a_narrow_beam_equals_plain_python(seed: int, items: int, beam: int, kind: dict[str, object]) -> None:
    """Prefix by prefix, each prefix scored as the sum of the probabilities of what the trie has below it."""
    rng = np.random.default_rng(seed)
    ids = random_ids(rng, items, SIZES)
    model = small_model(ids, seed, **kind)
    history = random_histories(rng, items, users=3, longest=3)
    found, scores = beam_search(model, history, beam=beam)
    by_level = log_probs_by_level(model, history)
    for row in range(3):
        expected = plain_beam(ids.codes, by_level[row], beam)
        got = [(int(item), float(score)) for item, score in zip(found[row], scores[row], strict=True) if item >= 0]
        assert [item for item, _ in got] == [item for item, _ in expected]
        np.testing.assert_allclose([s for _, s in got], [s for _, s in expected], atol=1e-5)


def log_probs_by_level(model: TigerModel, history: torch.Tensor) -> np.ndarray:
    """Return log p of every item's code at every level, given its codes before, [users, items, L]."""
    items = torch.arange(len(model.trie.leaf_items))
    rows = [-losses(model, history[row : row + 1].expand(len(items), -1), items) for row in range(len(history))]
    return torch.stack(rows).detach().numpy()


def plain_beam(codes: np.ndarray, log_probs: np.ndarray, beam: int) -> list[tuple[int, float]]:
    prefixes: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    item_of = {tuple(row.tolist()): item for item, row in enumerate(codes)}
    for level in range(codes.shape[1]):
        longer = {}
        for prefix, score in prefixes:
            for row, item in item_of.items():
                if row[:level] == prefix:
                    longer[row[: level + 1]] = score + float(log_probs[item, level])
        prefixes = sorted(longer.items(), key=lambda pair: -pair[1])[:beam]
    return [(item_of[prefix], score) for prefix, score in prefixes]


@pytest.mark.parametrize("users", [1, 5])
def test_excluded_items_do_not_come_back_and_the_list_stays_full(users: int) -> None:
    model, rng = model_of_random_ids(50), np.random.default_rng(0)
    history = random_histories(rng, 50, users, longest=3)
    free, _ = beam_search(model, history, beam=50)
    excluded = torch.cat([free[:, :3], torch.full((users, 1), -1)], dim=1)
    found, _ = beam_search(model, history, beam=50, excluded_items=excluded)
    assert torch.equal(found[:, :47], free[:, 3:])
    assert (found[:, 47:] == -1).all()


def test_results_do_not_depend_on_the_batch() -> None:
    model, rng = model_of_random_ids(40), np.random.default_rng(1)
    history = random_histories(rng, 40, users=7, longest=5)
    together, _ = beam_search(model, history, beam=5)
    alone = torch.cat([beam_search(model, history[row : row + 1], beam=5)[0] for row in range(7)])
    assert torch.equal(together, alone)


def test_user_tokens_change_the_answer() -> None:
    model, rng = model_of_random_ids(40, **PAPER | {"num_user_tokens": 16}), np.random.default_rng(2)
    history = random_histories(rng, 40, users=1, longest=5)
    scores = [beam_search(model, history, beam=5, user=torch.tensor([user]))[1] for user in (0, 1)]
    assert not torch.allclose(scores[0], scores[1])
    with pytest.raises(ValueError, match="user token"):
        beam_search(model, history, beam=5)


def test_a_boost_moves_probability_to_new_items_and_to_nothing_else() -> None:
    """Probabilities still sum to one; the order among known items, and among new ones of a parent, stays."""
    model, rng = model_of_random_ids(40), np.random.default_rng(3)
    new = torch.from_numpy(rng.random(40) < 0.25)
    model.set_training_counts((~new).long())
    history = random_histories(rng, 40, users=20, longest=4)
    fractions = []
    for boost in (-2.0, 0.0, 1.0, 3.0):
        items, scores = beam_search(model, history, beam=40, bonus=new_item_bonus(model, boost))
        torch.testing.assert_close(scores.exp().sum(1), torch.ones(20), atol=1e-4, rtol=0)
        fractions.append(float(scores.exp()[new[items]].sum()))
    assert fractions == sorted(fractions)
    assert fractions[-1] > 3 * fractions[0]
