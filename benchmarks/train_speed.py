"""Training targets a second: our two modes beside a Hugging Face T5 of the same size, on the same histories.

    uv run python benchmarks/train_speed.py [preset=small] [threads=2] [data.path=../shared/data/amazon-beauty]

Histories are those of Beauty where the files are given, else of the generated sample; semantic IDs are drawn at random,
which changes no speed. The T5 gets what its users give it: random batches of 64 examples, padded to the longest. The
three take turns, so that all see the same noise of a shared machine; the figure is the median of five rounds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from tempfile import TemporaryDirectory

import numpy as np
import torch
from transformers import T5Config, T5ForConditionalGeneration

from tiger.cli import CONFIGS
from tiger.core.config import build, load
from tiger.data.catalog import Catalog
from tiger.data.histories import Histories
from tiger.models.tiger.batches import PAD, SequenceExamples, TargetExamples
from tiger.models.tiger.model import ModelConfig, TigerModel
from tiger.pipeline.prepare import prepare
from tiger.run import RunConfig
from tiger.semantic_ids.assignment import SemanticIds

SECONDS, ROUNDS = 6.0, 5
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


def ours(config: ModelConfig, past: Histories, ids: SemanticIds) -> Step:
    model = TigerModel(config, ids.level_sizes)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    data = (
        SequenceExamples(past, ids, config.max_history_items)
        if config.encoder == "causal"
        else TargetExamples(past, ids, config.max_history_items, 0)
    )

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


def hugging_face(config: ModelConfig, past: Histories, ids: SemanticIds) -> Step:
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
    examples, random = TargetExamples(past, ids, config.max_history_items, 0), np.random.default_rng(0)
    starts = torch.tensor([0, *sizes[:-1]]).cumsum(0) + 1

    def step() -> int:
        history, target = examples.collate(random.integers(0, len(examples), 64))
        tokens = torch.where(history == PAD, 0, history + starts).flatten(1)
        model(input_ids=tokens, attention_mask=(tokens > 0).long(), labels=target + starts).loss.backward()
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
    steps = {"Hugging Face T5": hugging_face(build(ModelConfig, {"preset": preset}), past, ids)}
    for mode in ("bidirectional", "causal"):
        steps[mode] = ours(build(ModelConfig, {"preset": preset, "encoder": mode}), past, ids)
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
