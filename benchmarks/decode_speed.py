"""Constrained beam search: users per second next to Hugging Face's `generate`.

    uv run python benchmarks/decode_speed.py [preset=tiger-paper] [users=64] [threads=2] [their_batch=16]
        [data.path=FOLDER]

Test histories are those of Beauty if the files are given, else of the sample; weights are untrained, IDs are random
tuples of 3 x 256. preset=small measures the default, with its softmax over the trie. Hugging Face gets a T5 of the
same size, a Python trie by `prefix_allowed_tokens_fn`, and by default the batch size that suits it best, 16. Both
take turns. Results are checked to be real items, and the search to give the same lists
twice.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from train_speed import histories, random_ids, text_embeddings
from transformers import T5Config, T5ForConditionalGeneration

from tiger.core.config import build
from tiger.models.padding import PAD
from tiger.models.tiger.batches import pad_histories
from tiger.models.tiger.config import TigerConfig
from tiger.models.tiger.model import TigerModel
from tiger.models.tiger.recommender import TigerRecommender
from tiger.semantic_ids.assignment import SemanticIds
from tiger.semantic_ids.trie import Trie

ROUNDS = 3
SIZES = (256, 256, 256, 1)


def hugging_face(
    config: TigerConfig, ids: SemanticIds, batch_size: int
) -> Callable[[list[np.ndarray], int], np.ndarray]:
    starts = np.array([0, *np.cumsum(SIZES)[:-1]]) + 1
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=sum(SIZES) + 1, eos_token_id=None, d_model=config.d_model, d_kv=config.head_dim,
            d_ff=config.d_ff, num_layers=config.num_layers, num_heads=config.num_heads, pad_token_id=0,
            decoder_start_token_id=0,
        )
    ).eval()  # fmt: skip
    tokens = ids.codes.astype(np.int64) + starts
    children: dict[tuple[int, ...], list[int]] = {}
    for row in tokens.tolist():
        for depth in range(len(SIZES)):
            children.setdefault(tuple(row[:depth]), []).append(row[depth])
    allowed = {prefix: sorted(set(codes)) for prefix, codes in children.items()}

    @torch.inference_mode()
    def decode(taken: list[np.ndarray], beam: int) -> np.ndarray:
        lists = []
        for begin in range(0, len(taken), batch_size):
            rows = taken[begin : begin + batch_size]
            history = padded(rows)
            inputs = torch.where(history[..., None] == PAD, 0, torch.from_numpy(tokens)[history]).flatten(1)
            found = model.generate(
                input_ids=inputs, attention_mask=(inputs > 0).long(), num_beams=beam, num_return_sequences=beam,
                max_new_tokens=len(SIZES), min_new_tokens=len(SIZES), do_sample=False,
                prefix_allowed_tokens_fn=lambda _, prefix: allowed[tuple(prefix[1:].tolist())],
            )  # fmt: skip
            lists.append(ids.item_of(found[:, 1:].numpy() - starts).reshape(len(rows), beam))
        return np.concatenate(lists)

    return decode


def padded(rows: list[np.ndarray]) -> torch.Tensor:
    flat, ends = np.concatenate(rows), np.cumsum([len(row) for row in rows])
    return pad_histories(flat, ends - [len(row) for row in rows], ends)


def main() -> None:
    settings = dict(argument.split("=", 1) for argument in sys.argv[1:])
    torch.set_num_threads(int(settings.pop("threads", "2")))
    config = build(TigerConfig, {"preset": settings.pop("preset", "tiger-paper"), "num_user_tokens": 0})
    n_users, their_batch = int(settings.pop("users", "64")), int(settings.pop("their_batch", "16"))
    past, n_items = histories([f"{key}={value}" for key, value in settings.items()])
    ids = random_ids(n_items, SIZES[-1])
    torch.manual_seed(0)
    recommender = TigerRecommender(TigerModel(config, Trie(ids), text_embeddings(n_items)), device="cpu")
    theirs = hugging_face(config, ids, their_batch)
    evaluation = past.evaluation("test").histories()
    drawn = np.random.default_rng(0).permutation(len(evaluation))[:n_users]
    taken = [evaluation[user][-config.max_history_items :].astype(np.int64) for user in drawn]
    for beam in (10, 50):
        rates: dict[str, list[float]] = {"Hugging Face": [], "TIGER on Ray": []}
        for _ in range(ROUNDS):
            begin = time.perf_counter()
            assert (theirs(taken, beam) >= 0).all()
            rates["Hugging Face"].append(n_users / (time.perf_counter() - begin))
            begin = time.perf_counter()
            found = recommender.recommend(taken, k=beam, beam=beam, exclude_seen=False)
            rates["TIGER on Ray"].append(n_users / (time.perf_counter() - begin))
            assert (found.items >= 0).all()
            assert np.array_equal(
                found.items, recommender.recommend(taken, k=beam, beam=beam, exclude_seen=False).items
            )
        ratio = np.median(rates["TIGER on Ray"]) / np.median(rates["Hugging Face"])
        said = ", ".join(f"{name} {np.median(v):.1f} ({min(v):.1f} to {max(v):.1f})" for name, v in rates.items())
        print(f"beam {beam}: users/s {said}; x {ratio:.1f}", flush=True)


if __name__ == "__main__":
    main()
