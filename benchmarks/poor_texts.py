"""Write a copy of Amazon data with poor texts: titles of a few words, no brand, no categories, no description.

    uv run python benchmarks/poor_texts.py data.path=../shared/data/amazon-beauty target=FOLDER [words=3]
    uv run python -m jobs.pipeline beauty-cpu data.path=FOLDER

Shows what a tokenizer and a generator do where texts say little. The reviews are linked, not changed.
"""

from __future__ import annotations

import ast
import gzip
import sys
from pathlib import Path


def main() -> None:
    settings = dict(argument.split("=", 1) for argument in sys.argv[1:])
    source, target = Path(settings["data.path"]).resolve(), Path(settings["target"])
    words = int(settings.get("words", 3))
    target.mkdir(parents=True, exist_ok=True)
    for reviews in source.glob("reviews_*.json.gz"):
        (target / reviews.name).symlink_to(reviews)
    for meta in source.glob("meta_*.json.gz"):
        with gzip.open(meta, "rt", encoding="utf-8") as lines, gzip.open(target / meta.name, "wt") as out:
            for line in lines:
                item = ast.literal_eval(line)
                title = " ".join(str(item.get("title", "")).split()[:words])
                out.write(f"{ ({'asin': item['asin'], 'title': title})!r}\n")


if __name__ == "__main__":
    main()
