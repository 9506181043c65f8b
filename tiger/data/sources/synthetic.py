"""Synthetic catalog and histories in the raw Amazon 2014 formats, read by the same readers as real data.

Data-generating process: departments have product types in the order of a routine (cleanser, toner, serum, ...); a brand
makes some items of every type. After an item, a customer buys, with probability 1 - `noise`, the routine's next type
from the same brand, and otherwise an item chosen uniformly at random: a first-order Markov chain. So the next item can
be learned from texts and histories at `noise = 0`, while at `noise = 1` nothing can be learned and every recommender is
at chance level.

Items and users are functions of (seed, block of rows), so the data are generated as a stream, at any size.
"""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from tiger.core.config import fingerprint
from tiger.core.progress import Progress
from tiger.data.sources import amazon
from tiger.data.sources.base import DatasetConfig, Files

log = logging.getLogger(__name__)

FORMAT = 1  # increase it if the generated data change, to invalidate cached files
_BLOCK = 4096
_START = 1_356_998_400  # 2013-01-01
_DAY = 86_400


def _words(text: str) -> list[str]:
    return text.split("|")


_DEPARTMENTS = {
    "Skin Care": "Cleanser|Toner|Serum|Eye Cream|Moisturizer|Sunscreen|Night Cream|Face Mask|Exfoliator|Face Oil",
    "Hair Care": "Shampoo|Conditioner|Hair Mask|Leave-In Spray|Heat Protectant|Styling Gel|Hair Oil|Dry Shampoo|Mousse|"
    "Hairspray",
    "Makeup": "Primer|Foundation|Concealer|Blush|Bronzer|Eyeshadow Palette|Eyeliner|Mascara|Lipstick|Setting Spray",
    "Bath & Body": "Body Wash|Bath Salts|Body Scrub|Body Lotion|Hand Cream|Foot Balm|Deodorant|Bar Soap|Body Oil|"
    "Bubble Bath",
    "Nail Care": "Nail File|Cuticle Oil|Base Coat|Nail Polish|Nail Art Kit|Top Coat|Polish Remover|Nail Strengthener|"
    "Hand Mask|Gel Lamp",
    "Men's Grooming": "Pre-Shave Oil|Shaving Cream|Safety Razor|Aftershave|Beard Oil|Beard Balm|Beard Comb|Hair Pomade|"
    "Face Wash|Cologne",
}
_ROUTINES = [(department, kinds.split("|")) for department, kinds in _DEPARTMENTS.items()]
_TYPES = sum(len(kinds) for _, kinds in _ROUTINES)
_STEPS = len(_ROUTINES[0][1])  # every routine has the same number of steps

_BRAND_FIRST = _words(
    "Alder|Amber|Anise|Aster|Birch|Bloom|Briar|Cedar|Clover|Coral|Dahlia|Dune|Elm|Ember|"
    "Fern|Flora|Fjord|Ginger|Harbor|Hazel|Heath|Iris|Ivory|Jade|Juniper|Laurel|Linden|Lotus|"
    "Lumen|Maple|Marlow|Mint|Moss|Myrtle|Nova|Oak|Olive|Opal|Orchid|Pearl|Petal|Pine|Poppy|"
    "Quartz|Reed|Rowan|Sable|Sage|Sienna|Sorrel|Tansy|Thistle|Umber|Vale|Velvet|Violet|"
    "Willow|Wren|Yarrow|Zephyr"
)
_BRAND_SECOND = _words(
    "& Co|Apothecary|Atelier|Beauty|Botanics|Botanicals|Chemists|Collective|Cosmetics|"
    "Essentials|Formula|Fields|Garden|Grove|Guild|House|Hill|Hollow|Island|Jardin|Labs|Lane|"
    "Laboratories|Market|Meadow|Mill|Naturals|North|Organics|Origins|Paris|Park|Potions|"
    "Provisions|Pure|Remedies|Ritual|River|Science|Skin|Society|Spa|Standard|Studio|Supply|"
    "Terra|Theory|Trading|Tribe|Union|Valley|Village|Wellness|West|Wild|Works|Workshop|Yard|"
    "& Daughters|& Sons"
)
_QUALITIES = _words(
    "Hydrating|Gentle|Intensive|Lightweight|Nourishing|Organic|Professional|Refreshing|Repairing|"
    "Sensitive|Silky|Smooth|Soothing|Ultra|Vegan|Velvet|Volume|Vitamin C|Waterproof|Deluxe"
)
_SCENTS = _words(
    "Almond|Aloe|Argan|Avocado|Bergamot|Chamomile|Charcoal|Citrus|Coconut|Cucumber|Eucalyptus|"
    "Green Tea|Honey|Jasmine|Lavender|Lemongrass|Oatmeal|Peppermint|Rose|Vanilla"
)
_SIZES = ["1 oz", "2 Ounce", "4 Fl Oz", "8.5 oz", "50 ml", "100ml", "Travel Size", "Pack of 2"]
_VARIANTS = len(_QUALITIES) * len(_SCENTS) * len(_SIZES)


class Config(DatasetConfig):
    """Size and difficulty of the synthetic data."""

    kind: str = Field("synthetic", description="source of raw data: synthetic, amazon, tables, or a dotted module name")
    items: int = Field(1000, ge=200, le=10_000_000, description="items in the catalog")
    users: int = Field(4000, ge=50, le=10_000_000, description="customers, each with at least five purchases")
    mean_length: float = Field(9.0, ge=6, le=30, description="mean purchases per customer")
    noise: float = Field(0.1, ge=0, le=1, description="fraction of random purchases: 0 predictable, 1 pure noise")
    items_per_group: int = Field(5, ge=1, le=50, description="items that share brand and product type")
    seed: int = Field(0, ge=0, description="seed of the generator")


def locate(config: Config, cache: Path) -> Files:
    """Generate the raw files in `cache`, unless they exist."""
    folder = cache / f"raw-synthetic-{fingerprint(FORMAT, config.identity())}"
    files = Files([folder / "meta_Sample.json.gz"], [folder / "reviews_Sample_5.json.gz"])
    folder.mkdir(parents=True, exist_ok=True)
    _write(files.items[0], _item_lines(config), config.items, "items")
    _write(files.interactions[0], _review_lines(config), None, "reviews")
    return files


parts = amazon.parts
read_items = amazon.read_items
read_interactions = amazon.read_interactions


def _write(path: Path, rows: Iterator[str], total: int | None, unit: str) -> None:
    if path.exists():
        return
    progress = Progress(f"generate {path.name}", total, unit)
    partial = path.with_suffix(".partial")
    # mtime and name are part of the gzip header; they are fixed so that equal content gives equal files
    with partial.open("wb") as raw, gzip.GzipFile("", "wb", compresslevel=6, fileobj=raw, mtime=0) as file:
        for row in rows:
            file.write(row.encode())
            progress.add(1)
    partial.replace(path)
    progress.close()


def _groups(config: Config) -> int:
    """Return the number of (brand, type) groups; items are assigned to groups round-robin."""
    brands = max(1, config.items // (config.items_per_group * _TYPES))
    return brands * _TYPES


def _brand(number: int) -> str:
    # Coprime strides through both lists, so that neighboring brands share no word.
    generation, number = divmod(number, len(_BRAND_FIRST) * len(_BRAND_SECOND))
    first = _BRAND_FIRST[number * 7 % len(_BRAND_FIRST)]
    second = _BRAND_SECOND[(number * 11 + number // len(_BRAND_FIRST)) % len(_BRAND_SECOND)]
    return f"{first} {second}" + (f" {generation + 1}" if generation else "")


def _source_id(item: int) -> str:
    return f"B{item:09d}"


def _item_lines(config: Config) -> Iterator[str]:
    groups = _groups(config)
    for begin in range(0, config.items, _BLOCK):
        random = np.random.default_rng([config.seed, 0, begin])
        for item in range(begin, min(begin + _BLOCK, config.items)):
            group, member = item % groups, item // groups
            brand, kind = _brand(group // _TYPES), group % _TYPES
            department, kinds = _ROUTINES[kind // _STEPS]
            variant = (member + 7 * group) * 1009 % _VARIANTS  # 1009 is coprime to it, so members of a group differ
            rest, size = divmod(variant, len(_SIZES))
            quality, scent = divmod(rest, len(_SCENTS))
            name = kinds[kind % _STEPS]
            again = f", No. {member // _VARIANTS + 1}" if member >= _VARIANTS else ""
            price, has_price, has_description = random.lognormal(2.5, 0.6), random.random(), random.random()
            row: dict[str, Any] = {
                "asin": _source_id(item),
                "title": f"{brand} {_QUALITIES[quality]} {name} with {_SCENTS[scent]}, {_SIZES[size]}{again}",
                "brand": brand,
                "categories": [["Beauty", department, name]],
            }
            if "&" in row["title"]:  # the real files contain HTML entities
                row["title"] = row["title"].replace("&", "&amp;")
            if has_price < 0.9:
                row["price"] = round(float(price), 2)
            if has_description < 0.6:
                row["description"] = f"A {_QUALITIES[quality].lower()} {name.lower()} for every day, made by {brand}."
            yield f"{row!r}\n"


def _review_lines(config: Config) -> Iterator[str]:
    groups = _groups(config)
    group_sizes = (config.items - np.arange(groups) + groups - 1) // groups
    for begin in range(0, config.users, _BLOCK):
        random = np.random.default_rng([config.seed, 1, begin])
        users = min(_BLOCK, config.users - begin)
        lengths = np.minimum(5 + random.geometric(1 / (config.mean_length - 4), users) - 1, 50)
        item = random.integers(0, config.items, users)
        time = _START + random.integers(0, 300, users) * _DAY
        history = np.empty((users, lengths.max()), np.int64)
        for step in range(history.shape[1]):
            history[:, step] = item
            # The routine's next step, same department and brand, then a member; low members are more popular.
            group = item % groups
            kind = group % _TYPES
            next_kind = kind // _STEPS * _STEPS + (kind % _STEPS + 1) % _STEPS
            next_group = group - kind + next_kind
            member = np.floor(group_sizes[next_group] * random.random(users) ** 1.5).astype(np.int64)
            at_random = random.random(users) < config.noise
            item = np.where(at_random, random.integers(0, config.items, users), next_group + member * groups)
        for index in range(users):
            for step in range(lengths[index]):
                row = {
                    "reviewerID": f"A{begin + index:09d}",
                    "asin": _source_id(int(history[index, step])),
                    "overall": 5.0,
                    "unixReviewTime": int(time[index] + step * 3 * _DAY),
                }
                yield json.dumps(row) + "\n"
