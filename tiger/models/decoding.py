"""Options of lists of recommendations, shared by evaluation, batch jobs and serving."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from tiger.core.config import Config
from tiger.core.resources import Resources


class DecodingConfig(Config):
    """Options of `Recommender.recommend`. They are not part of a model's identity: no option trains it again."""

    unfingerprinted: ClassVar[frozenset[str]] = frozenset({"batch_size"})

    k: int = Field(10, ge=1, description="items per list; evaluation always makes lists of 50")
    beam: int = Field(50, ge=1, description="width of the beam search; at least k for lists as good as the model")
    exclude_seen: bool = Field(True, description="exclude the items of the history; evaluation reports both")
    new_item_boost: float = Field(
        0.0,
        ge=-100,
        le=100,
        description="added to the log-probability of items that training has not seen, before normalization",
    )
    temperature: float = Field(
        0.0, ge=0, le=1e6, description="sampling temperature of a list; 0: ranked; evaluation always ranks"
    )
    max_per_first_code: int | None = Field(
        None, ge=1, description="maximum items per list with the same first code; evaluation has no limit"
    )
    seed: int = Field(0, ge=0, description="seed of sampling; a user's sample is a function of it and the user's id")
    batch_size: int = Field(64, ge=1, description="histories that are decoded at once")
    resources: Resources = Resources()  # of the actors that decode for evaluations and batch jobs

    def ranked(self, k: int) -> DecodingConfig:
        """Return these options for an evaluation: ranked lists of `k` items that may contain seen ones."""
        changes = {"k": k, "exclude_seen": False, "temperature": 0.0, "max_per_first_code": None, "seed": 0}
        return self.model_copy(update=changes)
