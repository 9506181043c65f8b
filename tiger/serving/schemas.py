"""What the service is asked and what it answers, as pydantic models; the OpenAPI document is made from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

MAX_HISTORY, MAX_HISTORIES, MAX_LISTED_ITEMS, MAX_NAME = 200, 64, 4096, 256

Name = Annotated[str, StringConstraints(max_length=MAX_NAME)]
History = Annotated[list[Name], Field(max_length=MAX_HISTORY)]


class Filters(BaseModel):
    """Which items may be recommended; an item must pass all filters that are given."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    allow: list[Name] | None = Field(None, max_length=MAX_LISTED_ITEMS, description="only these item ids")
    deny: list[Name] = Field([], max_length=MAX_LISTED_ITEMS, description="none of these item ids")
    category: Name | list[Name] | None = Field(
        None, description="items of this category, or of one of these: any name of an item's category paths"
    )
    min_price: float | None = Field(None, description="items that cost at least this; without a price: excluded")
    max_price: float | None = Field(None, description="items that cost at most this; without a price: excluded")
    only_new: bool = Field(False, description="only items that training has not seen")

    @model_validator(mode="after")
    def _range_is_not_empty(self) -> Filters:
        if self.min_price is not None and self.max_price is not None and self.min_price > self.max_price:
            raise ValueError(f"min_price = {self.min_price:g} is more than max_price = {self.max_price:g}")
        return self


class Request(BaseModel):
    """One history, or the histories of several users, as the catalog's item ids in time order, oldest first."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    history: History | None = Field(None, description="item ids; without a known one: the most popular items")
    histories: list[History] | None = Field(
        None, min_length=1, max_length=MAX_HISTORIES, description="in place of `history`: one per user"
    )
    user: Name | None = Field(None, description="user id, for a model with user tokens and for samples")
    users: list[Name] | None = Field(None, description="with `histories`: one user id per history")
    k: int = Field(10, ge=1, le=2**31 - 1, description="items per list, at most the server's beam")
    exclude_seen: bool | None = Field(
        None, description="exclude the items of the history; none: as the server is configured"
    )
    filters: Filters = Field(Filters(), description="which items may be recommended")
    temperature: float | None = Field(
        None, ge=0, le=1e6, description="sampling temperature; 0: ranked; none: as the server is configured"
    )
    seed: int | None = Field(None, ge=0, le=2**31 - 1, description="seed of samples; equal requests get equal samples")
    max_per_first_code: int | None = Field(
        None, ge=1, le=2**31 - 1, description="maximum items per list with the same first code of the semantic ID"
    )
    explain: bool = Field(False, description="with `history`: return the prefixes that the beam search kept")

    @model_validator(mode="after")
    def _one_kind_of_history(self) -> Request:
        if (self.history is None) == (self.histories is None):
            raise ValueError("give either history, or histories for several users")
        if self.histories is not None:
            if self.user is not None or self.explain:
                raise ValueError("user and explain go with history; with histories give users")
            if self.users is not None and len(self.users) != len(self.histories):
                raise ValueError(f"{len(self.users)} users for {len(self.histories)} histories")
        elif self.users is not None:
            raise ValueError("users goes with histories; with history give user")
        return self

    def rows(self) -> list[tuple[list[str], str | None]]:
        """Return every history with its user."""
        if self.history is not None:
            return [(self.history, self.user)]
        histories = self.histories or []
        users: Sequence[str | None] = self.users or [None] * len(histories)
        return list(zip(histories, users, strict=True))


class Recommendation(BaseModel):
    """One item: its score (a log-probability of generative models) and its semantic ID, if the model has such IDs."""

    item: str
    title: str
    score: float
    semantic_id: list[int] | None


class BeamPrefix(BaseModel):
    """A prefix of semantic IDs that the beam search kept.

    Attributes:
        prefix: its codes.
        score: the log-probability of the prefix after this history.
        num_items: items of the catalog with this prefix.
        recommended: how many of the returned items have it.
        words: words that set the titles of these items apart; only of prefixes with recommended items.
    """

    prefix: list[int]
    score: float
    num_items: int
    recommended: int
    words: list[str]


class RankedList(BaseModel):
    """The top items after one history, best first; ids of the history that the catalog does not have (`ignored`).

    `by_popularity` marks the most popular items, with the logarithms of their frequencies as scores: what a history
    without a known item gets.
    """

    items: list[Recommendation]
    by_popularity: bool
    ignored: list[str]


class Answer(RankedList):
    """The list of one history, the model artifact, and ids in `allow` and `deny` that the catalog does not have."""

    model: str
    unknown_in_filters: list[str]
    beam: list[list[BeamPrefix]] | None = Field(None, description="with explain: the kept prefixes of every level")


class Answers(BaseModel):
    """The lists of several histories, in their order; the rest as in `Answer`."""

    answers: list[RankedList]
    model: str
    unknown_in_filters: list[str]


class ItemSummary(BaseModel):
    """An item in a list; `shared_codes`: with neighbors, the length of the prefix of the ID that both have."""

    item: str
    title: str
    semantic_id: list[int] | None = None
    shared_codes: int | None = None


class ItemDetails(BaseModel):
    """An item of the catalog.

    Attributes:
        seen_in_training: interactions of the training data with it; 0: a new item.
        neighbors: items with the longest common prefixes of the semantic ID, longest first.
    """

    item: str
    title: str
    semantic_id: list[int] | None
    price: float | None
    categories: list[str]
    seen_in_training: int
    neighbors: list[ItemSummary]
    model: str


class Found(BaseModel):
    """Items of a search: every word of the query begins a word of the title; most popular first."""

    items: list[ItemSummary]


class PrefixChild(BaseModel):
    """A prefix that is one code longer: items below it, and the words that set their titles apart."""

    code: int
    num_items: int
    words: list[str]
    example: str


class PrefixDetails(BaseModel):
    """A prefix of semantic IDs.

    Attributes:
        num_children: its children; `children` has the largest of them.
        items: if the prefix is one code short of whole IDs, or whole: the items below it, in the order of their IDs.
    """

    prefix: list[int]
    depth: int
    num_items: int
    num_children: int
    words: list[str]
    children: list[PrefixChild]
    items: list[ItemSummary]
    model: str


class Swap(BaseModel):
    """The last change of the model: `state` is loading, done or refused; `reason`: why it was refused.

    `model` and `semantic_ids` are URIs; without `semantic_ids` the items are those of the model's training.
    """

    model: str
    semantic_ids: str | None = None
    state: str
    reason: str | None = None


class Ready(BaseModel):
    """What everybody may know: that the service answers, with which model and which semantic IDs."""

    status: str
    model: str
    semantic_ids: str | None


class Status(BaseModel):
    """The model that answers, what it can do, and the last change of the model.

    Attributes:
        model: kind and fingerprint of the model; with appended items, `+` and those of their semantic IDs.
        semantic_ids: kind and fingerprint of the semantic IDs; null for a model without.
        num_items: items that are not deleted.
    """

    model: str
    semantic_ids: str | None
    num_items: int
    beam: int
    has_semantic_ids: bool
    has_prices: bool
    has_categories: bool
    needs_users: bool
    swap: Swap | None = None
