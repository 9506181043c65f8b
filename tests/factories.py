"""Build what tests of models need: random semantic IDs and histories, and small untrained models."""

from __future__ import annotations

import numpy as np
import torch

from tiger.core import tracking
from tiger.core.config import build
from tiger.data.histories import Histories
from tiger.models.padding import PAD
from tiger.models.tiger.config import TigerConfig
from tiger.models.tiger.model import TigerModel
from tiger.models.tiger.softmax import TrieSoftmax
from tiger.semantic_ids.assignment import SemanticIds
from tiger.semantic_ids.trie import Trie

SIZES = (4, 5, 3)
SMALL = {"d_model": 8, "num_heads": 2, "head_dim": 4, "d_ff": 16, "num_layers": 1}
PAPER = {"encoder": "bidirectional", "encoder_input": "codes", "input_norm": False, "softmax": "codes"}
"""The model as published; without these keys it is the default, with a softmax over the trie."""

KINDS: list[dict[str, object]] = [
    {},
    {"encoder": "bidirectional"},
    {"encoder_input": "codes"},
    {"item_vectors": False},
    PAPER,
    PAPER | {"encoder": "causal"},
    PAPER | {"softmax_support": "children", "encoder_input": "items"},
]


def random_ids(rng: np.random.Generator, items: int, sizes: tuple[int, ...]) -> SemanticIds:
    """Distinct random semantic IDs."""
    flat = rng.choice(int(np.prod(sizes)), size=items, replace=False)
    return SemanticIds(np.stack(np.unravel_index(flat, sizes), axis=1).astype(np.int16), sizes)


def toy_histories(rng: np.random.Generator, users: int, items: int, longest: int = 12) -> Histories:
    """Random histories of 3 to `longest` items, split leave-one-out."""
    lengths = rng.integers(3, longest + 1, users)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Histories(
        [f"user{u}" for u in range(users)],
        offsets,
        rng.integers(0, items, offsets[-1]).astype(np.int32),
        offsets[1:] - 2,
        offsets[1:] - 1,
    )


def small_model(ids: SemanticIds, seed: int = 0, **changes: object) -> TigerModel:
    """Return an untrained model in eval mode, with weights as different as training would make them."""
    torch.manual_seed(seed)
    model = TigerModel(build(TigerConfig, SMALL | changes), Trie(ids), torch.randn(len(ids), 6)).eval()
    if isinstance(model.softmax, TrieSoftmax):
        torch.nn.init.normal_(model.softmax.repeats)
        for part in (model.items.learned, *model.softmax.inner):
            if part is not None:
                torch.nn.init.normal_(part.get_parameter("weight"), std=0.5)
    return model


def model_of_random_ids(items: int, seed: int = 0, sizes: tuple[int, ...] = SIZES, **changes: object) -> TigerModel:
    """Return `small_model` for `items` random semantic IDs."""
    return small_model(random_ids(np.random.default_rng(seed), items, sizes), seed, **changes)


def random_histories(rng: np.random.Generator, items: int, users: int, longest: int) -> torch.Tensor:
    """Return histories int64 [users, longest] of 1 to `longest` random items, PAD in front."""
    history = rng.integers(0, items, (users, longest))
    for row in range(users):
        history[row, : rng.integers(0, longest)] = PAD
    return torch.from_numpy(history)


def losses(model: TigerModel, history: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return minus the log-probability of one target [B] after each history [B, N], float32 [B, L]."""
    siblings = model.trie.sibling_tensors(targets.numpy())
    if not model.encoder.causal:
        return model(history[:, -model.encoder.context :], targets, None, *siblings)
    sequence = torch.cat([history, targets[:, None]], dim=1)
    positions = torch.arange(1, len(targets) + 1) * history.shape[1] - 1
    return model(sequence, torch.ones_like(targets), positions, *siblings)


def clusters() -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.normal(size=(20, 8)).repeat(20, axis=0) + 0.2 * rng.normal(size=(400, 8))).astype(np.float32)


def record() -> None:
    tracking.record("tokenizer", 47, {"loss": 1.5, "usage@1": 1.0, "said": "no number"})
    tracking.record("tokenizer", 94, {"loss": 1.25, "usage@1": 0.75})
