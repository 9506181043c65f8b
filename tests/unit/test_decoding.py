"""Beam search against scoring every item without any search, and against a beam search in plain Python."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.factories import PAPER, model_of_random_ids, random_histories
from tiger.models.sampling import limit_per_group, sample_top_k
from tiger.models.tiger.beam_search import beam_search, new_item_bonus, score_all_items


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
