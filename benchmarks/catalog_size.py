"""What a catalog's size costs the default model: loading, one training step, one decoding step, and memory.

    uv run python benchmarks/catalog_size.py [sizes=12000,250000,1000000,10000000] [learned_up_to=1000000] [codes=256]

Semantic IDs are random distinct tuples of 3 x 256 codes (codes=64: 4 x 64), text embeddings random vectors of 384
16-bit floats in a memory-mapped file, histories ten random items, weights untrained: what is learned changes no work.
Catalogs above `learned_up_to` have no learned vector per item (`model.item_vectors = false`). Every size has a process
of its own; GB is the peak of its memory without the mapped file. Steps of all sizes take turns on one thread. A
training step is 1,024 targets, a decoding step one level of a beam search of 32 users x 50 beams.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

import tiger.on_ray  # noqa: F401  its defaults for environment variables hold in every job
from tiger.core.config import build
from tiger.core.memory import watch_memory
from tiger.data.histories import Histories
from tiger.models.tiger.batches import make_examples
from tiger.models.tiger.beam_search import beam_search
from tiger.models.tiger.config import TigerConfig
from tiger.models.tiger.model import TigerModel
from tiger.semantic_ids.assignment import SemanticIds
from tiger.semantic_ids.trie import Trie

ROUNDS, SEQUENCE, TEXT_DIM = 15, 10, 384


def random_ids(items: int, codes: int) -> SemanticIds:
    levels = 3 if codes == 256 else 4
    flat = np.sort(np.random.default_rng(0).choice(codes**levels, items, replace=False))
    tuples = np.stack(np.unravel_index(flat, (codes,) * levels), axis=1).astype(np.int16)
    return SemanticIds(tuples, (codes,) * levels)


def random_text(items: int, folder: str) -> torch.Tensor:
    file, generator = Path(folder) / f"{items}.f16", torch.Generator().manual_seed(0)
    vectors = torch.from_file(str(file), shared=True, size=items * TEXT_DIM, dtype=torch.float16).view(-1, TEXT_DIM)
    for part in vectors.split(1 << 16):
        part.copy_(torch.randn(part.shape, generator=generator))
    return vectors


def decoding(model: TigerModel, items: int) -> Callable[[], object]:
    with torch.inference_mode():
        node_vectors = model.node_vectors()
    history = torch.from_numpy(np.random.default_rng(1).integers(0, items, (32, SEQUENCE)))
    return lambda: beam_search(model, history, beam=50, node_vectors=node_vectors)


def training(model: TigerModel, items: int) -> Callable[[], object]:
    users = 1024 // (SEQUENCE - 3) * 4
    flat = np.random.default_rng(2).integers(0, items, users * SEQUENCE).astype(np.int32)
    offsets = np.arange(users + 1) * SEQUENCE
    past = Histories([str(user) for user in range(users)], offsets, flat, offsets[1:] - 2, offsets[1:] - 1)
    known = model.set_training_counts(torch.ones(items, dtype=torch.int64))
    examples = make_examples(past, model.config, model.trie, known)
    batch = next(iter(examples.batches(0, 0, 1024)))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        (model(*batch.inputs).sum() / batch.total_weight).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(items: int, codes: int, learned: bool, folder: str, pipe: Connection) -> None:
    """Load, and then answer each name of a step with its seconds, and "memory" with the peak."""
    torch.set_num_threads(1)
    ids, vectors = random_ids(items, codes), random_text(items, folder)
    with watch_memory(0.05) as memory:
        begin = time.perf_counter()
        model = TigerModel(build(TigerConfig, {"item_vectors": learned}), Trie(ids), vectors).eval()
        steps: dict[str, Callable[[], object]] = {"decode": decoding(model, items)}
        pipe.send(time.perf_counter() - begin)
        while (asked := pipe.recv()) != "end":
            if asked == "memory":
                pipe.send((memory.bytes or 0) / 2**30)
                memory.bytes = None
                continue
            if asked not in steps:
                steps = {"train": training(model.train(), items)}  # a training holds no table of a search
            begin = time.perf_counter()
            steps[asked]()
            pipe.send(time.perf_counter() - begin)


def main() -> None:
    settings = dict(argument.split("=", 1) for argument in sys.argv[1:])
    sizes = [int(size) for size in settings.get("sizes", "12000,250000,1000000,10000000").split(",")]
    learned_up_to, codes = int(settings.get("learned_up_to", 1_000_000)), int(settings.get("codes", 256))
    with TemporaryDirectory() as folder:
        compare(sizes, learned_up_to, codes, folder)


def compare(sizes: list[int], learned_up_to: int, codes: int, folder: str) -> None:
    spawn = multiprocessing.get_context("spawn")
    pipes, processes, loading = [], [], []
    for size in sizes:
        ours, theirs = spawn.Pipe()
        processes.append(spawn.Process(target=measure, args=(size, codes, size <= learned_up_to, folder, theirs)))
        processes[-1].start()
        pipes.append(ours)
        loading.append(ours.recv())  # one after the other, so that they do not disturb each other

    def ask(pipe: Connection, what: str) -> float:
        pipe.send(what)
        answer: float = pipe.recv()
        return answer

    memory, times = {}, {}
    for what in ("decode", "train"):
        rounds = np.array([[ask(pipe, what) for pipe in pipes] for _ in range(ROUNDS + 2)])[2:]
        times[what], memory[what] = rounds * 1000, [ask(pipe, "memory") for pipe in pipes]
    times["decode"] /= 3 if codes == 256 else 4
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send("end")
        process.join()
    print("items       learned  load s  decode ms   x first            GB   train ms   x first            GB")
    for column, size in enumerate(sizes):
        row = f"{size:<11,} {'yes' if size <= learned_up_to else 'no':<7}{loading[column]:>8.1f}"
        for what in ("decode", "train"):
            ratio = times[what][:, column] / times[what][:, 0]
            low, middle, high = np.quantile(ratio, (0.25, 0.5, 0.75))
            ratios = f"{middle:.2f} ({low:.2f} to {high:.2f})"
            row += f"{np.median(times[what][:, column]):>11.1f}   {ratios}{memory[what][column]:>6.1f}"
        print(row, flush=True)


if __name__ == "__main__":
    main()
