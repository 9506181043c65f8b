"""Beam search on random models, compared with an exhaustive search and with plain Python."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.factories import KINDS, SIZES, losses, model_of_random_ids, random_histories, random_ids, small_model
from tiger.models.tiger.beam_search import (
    beam_search,
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
