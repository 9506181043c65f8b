"""TIGER on Ray: generative retrieval with semantic IDs.

recommender = tiger.Recommender.load("runs/model-1a2b3c4d")
print(recommender.recommend([["B000142FVW", "B0009V1YR8"]], k=5))

The glossary, in the order in which the data flows:

item            one entry of the catalog; `item_id` is its dense integer, `source_id` its original id in the raw data.
text            the text encoder's input for an item: its fields (title, brand, categories, ...) in one string.
embedding       the vector of a text.
code            one integer assigned by one level of the quantizer, in [0, codebook size).
semantic ID     the tuple of an item's codes, plus a collision code if needed, unique to the item.
token           one code of a semantic ID as the input of the generative model: a code together with its level.
history         one user's items in time order.
target          the item that the model is to generate from the history before it.
trie            all semantic IDs as a tree of prefixes; beam search walks it, so it can only end on real items.
artifact        the output folder of a finished stage, named kind-fingerprint, with a manifest.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tiger.data.catalog import Catalog
    from tiger.models.recommender import Recommender
    from tiger.pipeline.pipeline import run_pipeline
    from tiger.run import load_config
    from tiger.semantic_ids.assignment import SemanticIds

__version__ = "0.1.0"

__all__ = ["Catalog", "Recommender", "SemanticIds", "load_config", "run_pipeline"]

_HOMES = {
    "Catalog": "tiger.data.catalog",
    "Recommender": "tiger.models.recommender",
    "SemanticIds": "tiger.semantic_ids.assignment",
    "load_config": "tiger.run",
    "run_pipeline": "tiger.pipeline.pipeline",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used: `import tiger` alone loads neither PyTorch nor Ray."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
