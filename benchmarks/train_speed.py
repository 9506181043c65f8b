"""Training targets per second: the default, and TIGER as published, next to a Hugging Face T5 of the same size.

    uv run python benchmarks/train_speed.py [preset=small] [threads=2] [data.path=../shared/data/amazon-beauty]

Histories are those of Beauty if the files are given, else of the generated sample; semantic IDs and text embeddings
are random. Random IDs of three codes give a trie with more children per node than real ones do. The T5 gets what its
users give it: random batches of 64 examples, padded to the longest. The three take turns, so that all see the same
noise of a shared machine; the rate is the median of five rounds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from tempfile import TemporaryDirectory

import numpy as np
import torch
from transformers import T5Config, T5ForConditionalGeneration

from tiger.core.config import build, load
from tiger.data.catalog import Catalog
from tiger.data.histories import Histories
from tiger.models.padding import PAD
from tiger.models.tiger.batches import make_examples
from tiger.models.tiger.config import TigerConfig
from tiger.models.tiger.model import TigerModel
from tiger.pipeline.prepare import prepare
from tiger.run import CONFIGS, RunConfig
from tiger.semantic_ids.assignment import SemanticIds
from tiger.semantic_ids.trie import Trie

SECONDS, ROUNDS = 6.0, 5
PAPER = {"encoder": "bidirectional", "encoder_input": "codes", "softmax": "codes", "num_user_tokens": 0}
KINDS: dict[str, dict[str, object]] = {"TIGER as published": PAPER, "default": {}}
Step = Callable[[], int]


def histories(overrides: list[str]) -> tuple[Histories, int]:
    name = "beauty-cpu" if overrides else "sample"
    with TemporaryDirectory() as root:
        catalog = Catalog(prepare(load(RunConfig, name, [*overrides, f"root={root}"], CONFIGS)))
        return catalog.histories, catalog.n_items


def random_ids(items: int, last: int = 256) -> SemanticIds:
    """Three drawn codes of 256, no two items alike, and a last code that is 0 of `last`."""
    flat = np.random.default_rng(0).choice(256**3, items, replace=False)
    codes = np.stack([*np.unravel_index(flat, (256, 256, 256)), np.zeros(items, int)], axis=1).astype(np.int16)
    return SemanticIds(codes, (256, 256, 256, last))


def text_embeddings(items: int) -> torch.Tensor:
    """Random vectors of the bundled encoder's dimension."""
    return torch.randn(items, 384, generator=torch.Generator().manual_seed(0))


def tiger(config: TigerConfig, past: Histories, ids: SemanticIds) -> Step:
    model = TigerModel(config, Trie(ids), text_embeddings(len(ids)))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    known = model.set_training_counts(torch.from_numpy(past.training_counts(len(ids))))
    data = make_examples(past, config, Trie(ids), known)

    def endless() -> Iterator[tuple[tuple[torch.Tensor, ...], float]]:
        epoch = 0
        while True:
            for batch in data.batches(0, epoch, config.training.batch_size):
                yield batch.inputs, batch.total_weight
            epoch += 1

    batches = endless()

    def step() -> int:
        inputs, targets = next(batches)
        (model(*inputs).sum() / targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return int(targets)

    return step


def hugging_face(config: TigerConfig, past: Histories, ids: SemanticIds) -> Step:
    sizes = ids.level_sizes
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=sum(sizes) + 1,
            d_model=config.d_model,
            d_kv=config.head_dim,
            d_ff=config.d_ff,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            dropout_rate=config.dropout,
            pad_token_id=0,
            decoder_start_token_id=0,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters())
    examples, random = make_examples(past, config, Trie(ids), []), np.random.default_rng(0)
    starts, codes = torch.tensor([0, *sizes[:-1]]).cumsum(0) + 1, torch.from_numpy(ids.codes.astype(np.int64))

    def step() -> int:
        history, target, _ = examples.collate(random.integers(0, len(examples), 64))
        tokens = torch.where(history[..., None] == PAD, 0, codes[history] + starts).flatten(1)
        model(input_ids=tokens, attention_mask=(tokens > 0).long(), labels=codes[target] + starts).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return 64

    return step


def main() -> None:
    settings = dict(argument.split("=", 1) for argument in sys.argv[1:])
    torch.set_num_threads(int(settings.pop("threads", "2")))
    preset = settings.pop("preset", "small")
    past, n_items = histories([f"{key}={value}" for key, value in settings.items()])
    ids = random_ids(n_items)
    torch.manual_seed(0)
    steps = {"Hugging Face T5": hugging_face(build(TigerConfig, {"preset": preset} | PAPER), past, ids)}
    for name, changes in KINDS.items():
        config = build(TigerConfig, {"preset": preset, "training": {"batch_size": 1024}} | changes)
        steps[name] = tiger(config, past, ids)
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            step()
            begin, done = time.perf_counter(), 0
            while time.perf_counter() - begin < SECONDS:
                done += step()
            rates[name].append(done / (time.perf_counter() - begin))
    base = float(np.median(rates["Hugging Face T5"]))
    print(f"preset {preset}, {torch.get_num_threads()} threads, {past.training_examples():,} examples")
    for name, values in rates.items():
        median = float(np.median(values))
        print(f"{name:<16} {median:>8,.0f} targets/s ({min(values):,.0f} to {max(values):,.0f})  x {median / base:.1f}")


if __name__ == "__main__":
    main()
