"""The next training starts where the last one ended: vectors, codes, IDs and weights of the same items."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.factories import PAPER, SMALL, clusters, random_ids
from tiger.core.config import build
from tiger.core.errors import ArtifactError, ConfigError
from tiger.core.storage import Folder
from tiger.embedding.collaborative import KnownFactors, rotation_onto
from tiger.models.tiger.config import TigerConfig
from tiger.models.tiger.growth import common_prefixes, warm_start
from tiger.models.tiger.model import TigerModel
from tiger.models.tiger.recommender import TigerRecommender
from tiger.semantic_ids.assignment import SemanticIds, SemanticIdsConfig, assign
from tiger.semantic_ids.growth import align_ids
from tiger.semantic_ids.trie import Trie
from tiger.tokenizers.base import TokenizerConfig
from tiger.tokenizers.train import encode_dataset, fit_tokenizer
from tiger.training.weights import write_weights

CPU = torch.device("cpu")


def test_cooccurrence_is_rotated_onto_that_of_before() -> None:
    rng = np.random.default_rng(0)
    before = rng.normal(size=(200, 8)).astype(np.float32)
    rotation, _ = np.linalg.qr(rng.normal(size=(8, 8)))
    after = np.concatenate([before[::-1], rng.normal(size=(30, 8))]).astype(np.float32) @ rotation.astype(np.float32)
    items = np.arange(150)
    aligned = after @ rotation_onto(after, KnownFactors(items, before[::-1][items]))
    np.testing.assert_allclose(aligned[:200], before[::-1], atol=1e-4)
    np.testing.assert_allclose(aligned[200:] @ aligned[200:].T, after[200:] @ after[200:].T, atol=1e-4)
    with pytest.raises(ConfigError, match=r"8 dimensions, those of before 4; set collaborative.rank"):
        rotation_onto(after, KnownFactors(items, before[items, :4]))


@pytest.mark.parametrize("kind", ["rqvae", "rkmeans"])
def test_a_tokenizer_continues_with_the_codes_of_before(kind: str, tmp_path: object) -> None:
    folder, vectors = Folder(str(tmp_path)), torch.from_numpy(clusters())
    training = {"training": {"epochs": 0}} if kind == "rqvae" else {}
    config = TokenizerConfig.resolve({"kind": kind, "num_levels": 2, "codebook_size": 16, **training})
    tokenizer, _ = fit_tokenizer(config, vectors[:300], device=CPU)
    write_weights(tokenizer, folder)
    again, _ = fit_tokenizer(config, vectors, device=CPU, start=folder)
    assert torch.equal(encode_dataset(again, vectors, CPU), encode_dataset(tokenizer, vectors, CPU))
    with pytest.raises(ArtifactError, match="does not match its configuration"):
        fit_tokenizer(config.model_copy(update={"codebook_size": 8}), vectors, device=CPU, start=folder)


@pytest.mark.parametrize("policy", ["nearest_free", "extra_code"])
def test_published_ids_stay_where_the_codes_are_those_of_before(policy: str) -> None:
    """Of 60 published items, those with other first codes move; 40 new ones come, in between."""
    rng = np.random.default_rng(1)
    config = SemanticIdsConfig.model_validate({"collision_policy": policy, "collision_codes": 20})
    costs = rng.random((100, 8))
    nearest = rng.integers(0, [3, 8], (100, 2))
    before = np.full(100, -1)
    before[rng.permutation(100)[:60]] = rng.permutation(60)

    def elsewhere(item: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for other in range(3):
            codes = np.stack([np.full(8, other), np.arange(8)], axis=1)
            yield codes, costs[item]

    old_codes = np.empty((60, 2), np.int64)
    old_codes[before[before >= 0]] = nearest[before >= 0]
    if policy == "nearest_free":  # 24 codes cannot be given to 100 items
        config = config.model_copy(update={"items_per_id": 6})
    published = assign(old_codes, 8, config, lambda items: costs[np.argsort(before)[-60:]][items])
    changed = rng.permutation(np.flatnonzero(before >= 0))[:12]
    nearest[changed, 0] = (nearest[changed, 0] + 1) % 3

    def errors(items: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """The nearest codes are perfect, others are not."""
        return np.where((codes == nearest[items]).all(axis=1), 0.0, 1.0)

    assert published.codes.shape[1] == 3  # a collision level, too
    ids = align_ids(nearest, published, before, config, 8, lambda items: costs[items], elsewhere, errors)
    assert len(ids) == 100
    assert ids.level_sizes == published.level_sizes
    stay = np.setdiff1d(np.flatnonzero(before >= 0), changed)
    assert np.array_equal(ids.codes[stay], published.codes[before[stay]])


def test_ids_of_other_sizes_are_assigned_anew() -> None:
    nearest = np.array([[0, 1], [1, 0]])
    published = random_ids(np.random.default_rng(0), 2, (2, 2))
    config = SemanticIdsConfig()

    def free(items: np.ndarray, *_: object) -> np.ndarray:
        return np.zeros((2, 4))

    ids = align_ids(nearest, published, np.array([0, 1]), config, 4, free, lambda item: [], free)
    assert ids.codes.tolist() == nearest.tolist()


@pytest.mark.parametrize("changes", [{}, {"encoder": "bidirectional"}, {"item_vectors": False}, PAPER])
def test_a_model_of_the_same_items_in_another_order_gives_the_same_lists(changes: dict[str, object]) -> None:
    rng = np.random.default_rng(2)
    ids, vectors = random_ids(rng, 40, (4, 5, 3)), torch.randn(40, 6)
    model = TigerModel(build(TigerConfig, SMALL | changes), Trie(ids), vectors).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    model.items.training_counts.copy_(torch.arange(40))
    before = rng.permutation(40)  # the new index of an item -> the old one
    other = TigerModel(model.config, Trie(SemanticIds(ids.codes[before], ids.level_sizes, ids.levels)), vectors[before])
    other.items.training_counts.copy_(model.items.training_counts[before])
    warm_start(other.eval(), model.state_dict(), model.trie, torch.from_numpy(before))
    histories = [rng.integers(0, 40, rng.integers(1, 9)) for _ in range(20)]
    found = TigerRecommender(model).recommend(histories, k=10, users=["u"] * 20)
    new_index = np.argsort(before)
    again = TigerRecommender(other).recommend([new_index[row] for row in histories], k=10, users=["u"] * 20)
    assert np.array_equal(before[again.items], found.items)
    np.testing.assert_allclose(again.scores, found.scores, atol=1e-4)


def test_new_items_and_prefixes_keep_their_initial_weights() -> None:
    rng = np.random.default_rng(3)
    every = random_ids(rng, 40, (4, 5, 3))
    old, new = (
        TigerModel(
            build(TigerConfig, SMALL), Trie(SemanticIds(codes, every.level_sizes, 2)), torch.randn(len(codes), 6)
        )
        for codes in (every.codes[:25], every.codes[5:])
    )
    before = np.arange(5, 40)
    before[before >= 25] = -1
    initial = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    warm_start(new, old.state_dict(), old.trie, torch.from_numpy(before))
    learned, given = new.state_dict()["items.learned.weight"], old.state_dict()["items.learned.weight"]
    assert torch.equal(learned[:20], given[5:25])
    assert torch.equal(learned[20:], initial["items.learned.weight"][20:])
    for level in range(2):
        where, of = common_prefixes(new.trie, old.trie, level)
        name = f"softmax.inner.{level}.weight"
        assert torch.equal(new.state_dict()[name][where], old.state_dict()[name][of])
        others = np.setdiff1d(np.arange(new.trie.num_nodes[level]), where)
        assert torch.equal(new.state_dict()[name][others], initial[name][others])
        prefixes: list[dict[int, tuple[int, ...]]] = [
            dict(zip(trie.paths[:, level].tolist(), map(tuple, trie.codes[:, : level + 1].tolist()), strict=True))
            for trie in (new.trie, old.trie)
        ]
        pairs = zip(where.tolist(), of.tolist(), strict=True)
        assert all(prefixes[0][one] == prefixes[1][other] for one, other in pairs)
        assert len(where) == len(set(prefixes[0].values()) & set(prefixes[1].values()))
