"""Beam search against scoring every item without any search, and against a beam search in plain Python."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import random_ids
from hypothesis import given, settings
from hypothesis import strategies as st

from tiger.core.config import build
from tiger.models.tiger.batches import PAD, columns
from tiger.models.tiger.beam_search import beam_search, score_all_items, vary
from tiger.models.tiger.model import ModelConfig, TigerModel
from tiger.semantic_ids.trie import Trie

SIZES = (4, 5, 3)


DENSE = {"encoder": "causal", "encoder_input": "items", "dense": 0.5}


def small_model(sizes: tuple[int, ...], seed: int = 0, items: int = 0, **changes: object) -> TigerModel:
    """Untrained; `items` of them have text embeddings, for a dense head."""
    torch.manual_seed(seed)
    config = build(ModelConfig, {"d_model": 8, "num_heads": 2, "head_dim": 4, "d_ff": 16, "num_layers": 1, **changes})
    model = TigerModel(config, sizes, torch.randn(items, 6) if items else None).eval()
    if config.dense:
        torch.nn.init.normal_(model.item_embedding.weight)  # as different as training would make them
        if model.repeats is not None:
            torch.nn.init.normal_(model.repeats)
    return model


def histories(rng: np.random.Generator, codes: np.ndarray, users: int, longest: int) -> torch.Tensor:
    """Of `columns`, or of codes alone."""
    history = codes[rng.integers(0, len(codes), (users, longest))].astype(np.int64)
    for row in range(users):
        history[row, : rng.integers(0, longest)] = PAD
    return torch.from_numpy(history)


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    items=st.integers(2, 40),
    extra=st.integers(0, 5),
    kind=st.sampled_from(
        [
            {"encoder": "bidirectional"},
            {"encoder": "causal"},
            {**DENSE, "dense_share": 1.0},
            {**DENSE, "dense_share": 0.4},
            {**DENSE, "dense_share": 0.0},
            {**DENSE, "encoder": "bidirectional"},
            {**DENSE, "dense_search": "candidates"},
            {**DENSE, "dense_search": "candidates", "dense_share": 1.0},
        ]
    ),
)
def test_a_wide_beam_is_exact(seed: int, items: int, extra: int, kind: dict[str, object]) -> None:
    """Eight users a case: 2,400 searches, each equal to scoring all items, also with fewer items than the beam."""
    rng = np.random.default_rng(seed)
    ids = random_ids(rng, items, SIZES)
    model = small_model(SIZES, seed, items, **kind)
    read = columns(ids, bool(model.dense))
    history = histories(rng, read, users=8, longest=4)
    truth = score_all_items(model, torch.from_numpy(read), history)
    found, scores = beam_search(model, Trie(ids), history, beam=items + extra)
    for row in range(8):
        real = found[row] >= 0
        assert sorted(found[row][real].tolist()) == list(range(items))
        torch.testing.assert_close(scores[row][real], truth[row][found[row][real]], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(scores[row][real], truth[row].sort(descending=True).values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sizes", [(4, 5, 1), (4, 1, 5), (1, 6, 6)])
def test_a_level_of_one_code_costs_nothing_and_changes_nothing(sizes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(7)
    ids = random_ids(rng, 18, sizes)
    model = small_model(sizes)
    history = histories(rng, ids.codes, users=5, longest=4)
    truth = score_all_items(model, torch.from_numpy(ids.codes.astype(np.int64)), history)
    found, scores = beam_search(model, Trie(ids), history, beam=18)
    torch.testing.assert_close(scores, truth.gather(1, found), atol=1e-5, rtol=1e-5)


def test_a_dense_head_orders_what_generation_found() -> None:
    """With a narrow beam, the candidates are those of generation alone, the order is that of the inner products."""
    rng = np.random.default_rng(3)
    ids = random_ids(rng, 50, SIZES)
    model, read = small_model(SIZES, 1, 50, **DENSE, dense_search="candidates", dense_share=1.0), columns(ids, True)
    history = histories(rng, read, users=6, longest=4)
    truth = score_all_items(model, torch.from_numpy(read), history)
    model.dense_share = 0.0
    generated, _ = beam_search(model, Trie(ids), history, beam=3, results=12)
    model.dense_share = 1.0
    found, _ = beam_search(model, Trie(ids), history, beam=3, results=12)
    for row in range(6):
        items = generated[row][generated[row] >= 0]
        assert found[row][found[row] >= 0].tolist() == items[truth[row][items].argsort(descending=True)].tolist()
    assert not torch.equal(found, generated)


@pytest.mark.parametrize("share", [0.3, 0.7, 1.0])
def test_a_guided_beam_finds_what_scoring_every_item_finds(share: float) -> None:
    """Three beams suffice for the three best items of the head alone, and ten for nearly all of a mixture's best."""
    rng = np.random.default_rng(4)
    ids = random_ids(rng, 55, SIZES)
    model, read = small_model(SIZES, 2, 55, **DENSE, dense_share=share), columns(ids, True)
    history = histories(rng, read, users=40, longest=4)
    best = score_all_items(model, torch.from_numpy(read), history).topk(3, dim=1).indices
    found, _ = beam_search(model, Trie(ids), history, beam=3 if share == 1 else 10, results=3)
    agreement = float((found == best).float().mean())
    assert agreement == 1 if share == 1 else agreement > 0.97
    exclude = best[:, :1]
    without, _ = beam_search(model, Trie(ids), history, beam=3 if share == 1 else 10, results=2, exclude=exclude)
    agreement = float((without == best[:, 1:]).float().mean())
    assert agreement == 1 if share == 1 else agreement > 0.97


def test_a_temperature_draws_and_groups_spread() -> None:
    items = torch.arange(6).expand(20_000, -1)
    scores = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625, 1e-9]).log().expand(20_000, -1)
    same, _ = vary(items, scores, 3)
    assert torch.equal(same, items[:, :3])
    uniform = torch.rand(scores.shape, generator=torch.Generator().manual_seed(0)).clamp(1e-7, 1 - 1e-7)
    drawn, of_drawn = vary(items, scores, 3, temperature=1.0, uniform=uniform)
    shares = torch.bincount(drawn[:, 0], minlength=6) / len(drawn)
    torch.testing.assert_close(shares, scores[0].exp(), atol=0.01, rtol=0)  # the first draw is one from the softmax
    assert torch.equal(of_drawn, scores.gather(1, drawn))
    assert all(len(set(row)) == 3 for row in drawn[:100].tolist())
    groups = torch.tensor([0, 0, 0, 1, 1, 2])
    spread, _ = vary(items[:1], scores[:1], 4, groups=groups, per_group=1)
    assert spread.tolist() == [[0, 3, 5, -1]]
    spread, _ = vary(items[:1], scores[:1], 4, groups=groups, per_group=2)
    assert spread.tolist() == [[0, 1, 3, 4]]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), items=st.integers(5, 60), beam=st.integers(1, 12))
def test_a_narrow_beam_equals_plain_python(seed: int, items: int, beam: int) -> None:
    rng = np.random.default_rng(seed)
    ids = random_ids(rng, items, SIZES)
    model = small_model(SIZES, seed)
    history = histories(rng, ids.codes, users=3, longest=3)
    found, scores = beam_search(model, Trie(ids), history, beam=beam)
    for row in range(3):
        expected = plain_beam(model, ids.codes, history[row : row + 1], beam)
        got = [(int(item), float(score)) for item, score in zip(found[row], scores[row], strict=True) if item >= 0]
        assert [item for item, _ in got] == [item for item, _ in expected]
        np.testing.assert_allclose([s for _, s in got], [s for _, s in expected], atol=1e-5)


def plain_beam(model: TigerModel, codes: np.ndarray, history: torch.Tensor, beam: int) -> list:
    """Prefix by prefix, each scored from scratch by the training-time forward pass."""
    memory = model.encode(history)
    prefixes: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    for level in range(codes.shape[1]):
        longer = []
        for prefix, score in prefixes:
            allowed = {int(row[level]) for row in codes if tuple(row[:level].tolist()) == prefix}
            target = torch.zeros(1, codes.shape[1], dtype=torch.int64)
            target[0, :level] = torch.tensor(prefix, dtype=torch.int64)
            x = model._decoder_input(target)
            for layer, key_value in zip(model.decoder, memory.key_values, strict=True):
                x = layer(x, len(SIZES), key_value, memory.mask, None)
            log_p = model._logits(model.decoder_norm(x)[:, level], level).log_softmax(-1)[0]
            longer += [((*prefix, code), score + float(log_p[code].detach())) for code in sorted(allowed)]
        prefixes = sorted(longer, key=lambda pair: -pair[1])[:beam]
    item_of = {tuple(row.tolist()): item for item, row in enumerate(codes)}
    return [(item_of[prefix], score) for prefix, score in prefixes]


@pytest.mark.parametrize("users", [1, 5])
def test_excluded_items_do_not_come_back_and_the_list_stays_full(users: int) -> None:
    rng = np.random.default_rng(0)
    ids = random_ids(rng, 50, SIZES)
    model, trie = small_model(SIZES), Trie(ids)
    history = histories(rng, ids.codes, users, longest=3)
    free, _ = beam_search(model, trie, history, beam=50)
    exclude = torch.cat([free[:, :3], torch.full((users, 1), -1)], dim=1)
    found, _ = beam_search(model, trie, history, beam=50, exclude=exclude)
    assert torch.equal(found[:, :47], free[:, 3:])
    assert (found[:, 47:] == -1).all()


def test_results_do_not_depend_on_the_batch() -> None:
    rng = np.random.default_rng(1)
    ids = random_ids(rng, 40, SIZES)
    model, trie = small_model(SIZES), Trie(ids)
    history = histories(rng, ids.codes, users=7, longest=5)
    together, _ = beam_search(model, trie, history, beam=5)
    alone = torch.cat([beam_search(model, trie, history[row : row + 1], beam=5)[0] for row in range(7)])
    assert torch.equal(together, alone)


def test_user_tokens_change_the_answer() -> None:
    rng = np.random.default_rng(2)
    ids = random_ids(rng, 40, SIZES)
    model, trie = small_model(SIZES, num_user_tokens=16), Trie(ids)
    history = histories(rng, ids.codes, users=1, longest=5)
    scores = [beam_search(model, trie, history, beam=5, user=torch.tensor([user]))[1] for user in (0, 1)]
    assert not torch.allclose(scores[0], scores[1])
    with pytest.raises(ValueError, match="user token"):
        beam_search(model, trie, history, beam=5)
