"""A generated shop, in the raw Amazon 2014 formats and read by the same readers as real data.

Data-generating process. An item has a type (cleanser, toner, shampoo, ...), a brand, a scent, the skin or hair that it
is for, and a size; its title says so. A customer has a taste: one brand, scent, skin and size. The types of a
department form a routine, and the customer buys one item of every type in turn; then comes another department. Of a
type only two properties matter (skin and brand for a cleanser, scent and size for a toner), and the customer buys one
of the items that agree with the taste in these two.

So the next item depends on what the last items mean: its type follows from the last item, its properties from the whole
history, because the last item agrees with the taste in two properties and by accident in the others. Counts of pairs of
items are too sparse to tell: tastes and departments differ in popularity, most items are bought rarely, and
`new_item_fraction` of the items are launched in the last weeks, so that some are bought first by users who are tested.

With probability `noise` a purchase is that of a random other customer. At `noise = 1` nothing can be learned but how
popular items are.

Items are generated at once and users in blocks, as functions of the seed; users are written as a stream.
"""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from tiger.core.config import fingerprint
from tiger.core.progress import Progress
from tiger.data.sources import amazon
from tiger.data.sources.base import DatasetConfig, Files

log = logging.getLogger(__name__)

FORMAT = 2  # increase it if the generated data change, to invalidate cached files
_BLOCK = 4096
_START = 1_356_998_400  # 2013-01-01
_DAY = 86_400
_PERIOD = 360  # days
_LAUNCHES = 14  # days at the end of the period in which new items are launched

Ints = npt.NDArray[np.int64]


def _words(text: str) -> list[str]:
    return text.split("|")


_DEPARTMENTS = {
    "Skin Care": "Cleanser|Toner|Serum|Moisturizer|Sunscreen|Face Mask",
    "Hair Care": "Shampoo|Conditioner|Hair Mask|Leave-In Spray|Styling Gel|Hair Oil",
    "Bath & Body": "Body Wash|Body Scrub|Body Lotion|Hand Cream|Deodorant|Bath Salts",
    "Men's Grooming": "Pre-Shave Oil|Shaving Cream|Aftershave|Beard Oil|Beard Balm|Hair Pomade",
    "Makeup": "Primer|Foundation|Concealer|Blush|Lip Balm|Setting Spray",
    "Baby Care": "Baby Wash|Baby Shampoo|Diaper Cream|Baby Lotion|Baby Oil|Baby Powder",
}
_ROUTINES = [(department, kinds.split("|")) for department, kinds in _DEPARTMENTS.items()]
_STEPS = len(_ROUTINES[0][1])  # every routine has the same number of steps

_SCENTS = _words("Lavender|Rose|Coconut|Citrus|Peppermint|Vanilla|Sandalwood|Unscented")
_CONDITIONS = _words("Dry|Sensitive|Oily|Mature|Normal")
_SIZES = _words("Full Size|Travel Size|Family Pack")
_BODY_PARTS = {"Hair Care": "Hair", "Men's Grooming": "Beards and Skin"}  # others are for skin
_BRAND, _SCENT, _SKIN, _SIZE = range(4)
_PROPERTIES = 4
_MATTERS = np.array(
    [[_SKIN, _BRAND], [_SCENT, _SIZE], [_SKIN, _SCENT], [_BRAND, _SIZE], [_SKIN, _SIZE], [_SCENT, _BRAND]]
)
"""The two properties that matter at every step of a routine."""

_BRAND_FIRST = _words(
    "Alder|Amber|Anise|Aster|Birch|Bloom|Briar|Cedar|Clover|Coral|Dahlia|Dune|Elm|Ember|"
    "Fern|Flora|Fjord|Ginger|Harbor|Hazel|Heath|Iris|Ivory|Jade|Juniper|Laurel|Linden|Lotus|"
    "Lumen|Maple|Marlow|Moss|Myrtle|Nova|Oak|Olive|Opal|Orchid|Pearl|Petal|Pine|Poppy|"
    "Quartz|Reed|Rowan|Sable|Sage|Sienna|Sorrel|Tansy|Thistle|Umber|Vale|Velvet|Violet|"
    "Willow|Wren|Yarrow|Zephyr"
)
_BRAND_SECOND = _words(
    "& Co|Apothecary|Atelier|Beauty|Botanics|Chemists|Collective|Cosmetics|Essentials|Formula|Garden|Grove|Guild|"
    "House|Hill|Island|Jardin|Labs|Laboratories|Market|Meadow|Mill|Naturals|North|Organics|Origins|Park|Potions|"
    "Provisions|Pure|Remedies|Ritual|River|Science|Society|Spa|Standard|Studio|Supply|Theory|Trading|Union|Valley|"
    "Village|Wellness|Wild|Works|Workshop|Yard|& Daughters"
)
_QUALITIES = _words(
    "Hydrating|Gentle|Intensive|Lightweight|Nourishing|Organic|Professional|Refreshing|Repairing|Silky|Smooth|Soothing|"
    "Ultra|Vegan|Classic|Deluxe"
)


class Config(DatasetConfig):
    """Size and difficulty of the synthetic data."""

    kind: str = Field("synthetic", description="source of raw data: synthetic, amazon, tables, or a dotted module name")
    items: int = Field(2000, ge=200, le=10_000_000, description="items in the catalog")
    users: int = Field(4000, ge=50, le=10_000_000, description="customers, each with at least five purchases")
    mean_length: float = Field(9.0, ge=6, le=30, description="mean purchases per customer")
    noise: float = Field(0.1, ge=0, le=1, description="fraction of purchases of a random other customer; 1: pure noise")
    new_item_fraction: float = Field(0.05, ge=0, le=0.5, description="fraction of items launched in the last weeks")
    seed: int = Field(0, ge=0, description="seed of the generator")


def locate(config: Config, cache: Path) -> Files:
    """Generate the raw files in `cache`, unless they exist."""
    folder = cache / f"raw-synthetic-{fingerprint(FORMAT, config.identity())}"
    files = Files([folder / "meta_Sample.json.gz"], [folder / "reviews_Sample_5.json.gz"])
    folder.mkdir(parents=True, exist_ok=True)
    if not all(path.exists() for path in (*files.items, *files.interactions)):
        shop = Shop.generate(config)
        _write(files.items[0], _item_lines(shop, config.seed), config.items, "items")
        _write(files.interactions[0], _review_lines(shop, config), None, "reviews")
    return files


parts = amazon.parts
read_items = amazon.read_items
read_interactions = amazon.read_interactions


def _write(path: Path, rows: Iterator[str], total: int | None, unit: str) -> None:
    progress = Progress(f"generate {path.name}", total, unit)
    partial = path.with_suffix(".partial")
    # mtime and name are part of the gzip header; they are fixed so that equal content gives equal files
    with partial.open("wb") as raw, gzip.GzipFile("", "wb", compresslevel=6, fileobj=raw, mtime=0) as file:
        for row in rows:
            file.write(row.encode())
            progress.add(1)
    partial.replace(path)
    progress.close()


@dataclass(frozen=True)
class Shop:
    """All items, and where those of a type with given properties are found.

    Attributes:
        departments, brands: numbers of them.
        kind: [N] type of every item; department kind // steps, step of its routine kind % steps.
        values: [4, N] brand, scent, skin and size of every item.
        launch: [N] day from which on it can be bought; 0 for all but the new items.
        order: [N] items sorted by (key, launch); a key is the type and the values of the two properties that matter.
        launched: [N] key * period + launch in that order, ascending.
        established: items that are not new, sorted by key.
        established_keys: their keys, ascending.
    """

    departments: int
    brands: int
    kind: Ints
    values: Ints
    launch: Ints
    order: Ints
    launched: Ints
    established: Ints
    established_keys: Ints

    @classmethod
    def generate(cls, config: Config) -> Shop:
        """Draw the properties of all items."""
        random, count = np.random.default_rng([config.seed, 0]), config.items
        departments = int(np.clip(count // 500, 1, len(_ROUTINES)))
        brands = int(np.clip(count // 300, 4, len(_BRAND_FIRST) * len(_BRAND_SECOND)))
        kind = np.arange(count) % (departments * _STEPS)
        sizes = (brands, len(_SCENTS), len(_CONDITIONS), len(_SIZES))
        values = np.stack([_zipf(random, size, count, 0.4) for size in sizes])
        new = (random.random(count) < config.new_item_fraction) & (np.arange(count) >= departments * _STEPS)
        launch = np.where(new, _PERIOD - 1 - random.integers(0, _LAUNCHES, count), 0)
        keys = _keys(kind, values, brands)
        order = np.lexsort((random.random(count), launch, keys))
        established = order[launch[order] == 0]
        return cls(
            departments, brands, kind, values, launch, order, (keys * _PERIOD + launch)[order], established,
            keys[established],
        )  # fmt: skip

    def choose(self, kind: Ints, taste: Ints, day: Ints, random: np.random.Generator) -> Ints:
        """Return one item per customer [U], of a type [U] and agreeing with a taste [4, U] in what matters.

        Of the items that were launched by that day [U] the newest are the most popular. If there is none that agrees,
        it is an established item that agrees in the first property only, or any of that type.
        """
        begin, end = self._ranges(kind, taste, day)
        position = end - 1 - np.floor((end - begin) * random.random(len(kind)) ** 1.5).astype(np.int64)
        item: Ints = self.order[position.clip(0)]
        width = _width(self.brands)
        for cells in (width, width * width):
            missing = begin == end
            if not missing.any():
                break
            key = _keys(kind[missing], taste[:, missing], self.brands) // cells * cells
            low, high = (np.searchsorted(self.established_keys, edge) for edge in (key, key + cells))
            position = low + np.floor((high - low) * random.random(len(key))).astype(np.int64)
            item[missing] = self.established[position.clip(max=len(self.established) - 1)]
            begin[missing], end[missing] = low, high
        return item

    def _ranges(self, kind: Ints, taste: Ints, day: Ints) -> tuple[Ints, Ints]:
        keys = _keys(kind, taste, self.brands) * _PERIOD
        return np.searchsorted(self.launched, keys), np.searchsorted(self.launched, keys + day, side="right")


def _keys(kind: Ints, values: Ints, brands: int) -> Ints:
    """Return one number per item or customer: the type, and the values of the two properties that matter for it."""
    width = _width(brands)
    matters, rows = _MATTERS[kind % _STEPS], np.arange(len(kind))
    keys: Ints = (kind * width + values[matters[:, 0], rows]) * width + values[matters[:, 1], rows]
    return keys


def _width(brands: int) -> int:
    """Return a number that no value of any property reaches."""
    return max(brands, len(_SCENTS), len(_CONDITIONS), len(_SIZES)) + 1


def _zipf(random: np.random.Generator, size: int, count: int, power: float) -> Ints:
    """Draw numbers below `size`, the first ones more often: with weights 1 / rank ** power."""
    weights = np.arange(1, size + 1, dtype=np.float64) ** -power
    edges = np.cumsum(weights / weights.sum())
    return np.minimum(np.searchsorted(edges, random.random(count), side="right"), size - 1).astype(np.int64)


# --- items ------------------------------------------------------------------------------------------------------


def _brand(number: int) -> str:
    generation, number = divmod(number, len(_BRAND_FIRST) * len(_BRAND_SECOND))
    row, column = divmod(number, len(_BRAND_FIRST))
    # Strides through both lists: neighboring brands share no word, and no brand comes twice.
    first, second = column * 7 % len(_BRAND_FIRST), (column * 11 + row) % len(_BRAND_SECOND)
    return f"{_BRAND_FIRST[first]} {_BRAND_SECOND[second]}" + (f" {generation + 1}" if generation else "")


def _source_id(item: int) -> str:
    return f"B{item:09d}"


def _item_lines(shop: Shop, seed: int) -> Iterator[str]:
    random, count = np.random.default_rng([seed, 1]), len(shop.kind)
    quality = random.integers(0, len(_QUALITIES), count)
    repeats = _occurrences([*shop.values, shop.kind, quality])
    for begin in range(0, count, _BLOCK):
        block = range(begin, min(begin + _BLOCK, count))
        price, has_price, has_description = (random.random(len(block)) for _ in range(3))
        for row, item in enumerate(block):
            department, kinds = _ROUTINES[shop.kind[item] // _STEPS]
            name, adjective = kinds[shop.kind[item] % _STEPS], _QUALITIES[quality[item]]
            brand, scent = _brand(int(shop.values[_BRAND, item])), _SCENTS[shop.values[_SCENT, item]]
            condition = f"{_CONDITIONS[shop.values[_SKIN, item]]} {_BODY_PARTS.get(department, 'Skin')}"
            number = f", No. {repeats[item] + 1}" if repeats[item] else ""
            title = f"{brand} {adjective} {scent} {name} for {condition}, {_SIZES[shop.values[_SIZE, item]]}{number}"
            record: dict[str, Any] = {
                "asin": _source_id(item),
                "title": title.replace("&", "&amp;"),  # the real files contain HTML entities
                "brand": brand,
                "categories": [["Beauty", department, name]],
            }
            if has_price[row] < 0.9:
                record["price"] = round(float(np.exp(2.5 + 1.2 * (price[row] - 0.5))), 2)
            if has_description[row] < 0.6:
                record["description"] = f"{scent} {name.lower()} for {condition.lower()}, made by {brand}."
            yield f"{record!r}\n"


def _occurrences(columns: list[Ints]) -> Ints:
    """Return for every row how many rows before it are equal."""
    order = np.lexsort(columns)
    ordered = np.stack(columns)[:, order]
    is_first = np.concatenate([[True], (ordered[:, 1:] != ordered[:, :-1]).any(axis=0)])
    begins = np.flatnonzero(is_first)
    numbers = np.empty(len(order), np.int64)
    numbers[order] = np.arange(len(order)) - np.repeat(begins, np.diff([*begins, len(order)]))
    return numbers


# --- customers --------------------------------------------------------------------------------------------------


def _customers(shop: Shop, count: int, random: np.random.Generator) -> tuple[Ints, Ints]:
    """Draw the type that customers buy next [U], and their tastes [4, U]."""
    sizes = (shop.brands, len(_SCENTS), len(_CONDITIONS), len(_SIZES))
    kind = _zipf(random, shop.departments, count, 0.4) * _STEPS + random.integers(0, _STEPS, count)
    return kind, np.stack([_zipf(random, size, count, 0.4) for size in sizes])


def _review_lines(shop: Shop, config: Config) -> Iterator[str]:
    for begin in range(0, config.users, _BLOCK):
        random = np.random.default_rng([config.seed, 2, begin])
        users = min(_BLOCK, config.users - begin)
        lengths = np.minimum(5 + random.geometric(1 / (config.mean_length - 4), users) - 1, 50)
        steps = int(lengths.max())
        gap = random.integers(2, 6, users)  # days between two purchases
        # Many customers are still there at the end of the period.
        last = _PERIOD - 1 - np.floor(250 * random.random(users) ** 2.5).astype(np.int64)
        kind, taste = _customers(shop, users, random)
        history, days = np.empty((users, steps), np.int64), np.empty((users, steps), np.int64)
        for step in range(steps):
            days[:, step] = np.maximum(last - gap * (lengths - 1 - step), 0).clip(max=_PERIOD - 1)
            other_kind, other_taste = _customers(shop, users, random)
            at_random = random.random(users) < config.noise
            chosen_kind, chosen_taste = np.where(at_random, other_kind, kind), np.where(at_random, other_taste, taste)
            history[:, step] = shop.choose(chosen_kind, chosen_taste, days[:, step], random)
            department = np.where(kind % _STEPS == _STEPS - 1, other_kind // _STEPS, kind // _STEPS)
            kind = department * _STEPS + (kind + 1) % _STEPS
        for index in range(users):
            for step in range(lengths[index]):
                row = {
                    "reviewerID": f"A{begin + index:09d}",
                    "asin": _source_id(int(history[index, step])),
                    "overall": 5.0,
                    "unixReviewTime": int(_START + days[index, step] * _DAY + step),
                }
                yield json.dumps(row) + "\n"
