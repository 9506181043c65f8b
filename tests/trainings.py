"""Train small modules in this process and in process groups, with checkpoints and planted losses."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.factories import random_ids, toy_histories
from tiger.core.config import build
from tiger.core.errors import HealthError
from tiger.core.precision import Choice
from tiger.core.storage import Folder
from tiger.data.histories import Histories
from tiger.models.base import InMemoryData
from tiger.models.sasrec import Config as SASRecConfig
from tiger.models.tiger.batches import make_examples
from tiger.models.tiger.config import TigerConfig
from tiger.models.train import fit_model
from tiger.semantic_ids.trie import Trie
from tiger.tokenizers.base import TokenizerConfig
from tiger.tokenizers.train import fit_tokenizer
from tiger.training import loop as training
from tiger.training.checkpoints import CheckpointStore
from tiger.training.loop import Callbacks

CPU = torch.device("cpu")
TOKENIZER = {
    "codebook_size": 16,
    "dropout": 0.0,
    "training": {"epochs": 4, "batch_size": 100, "validate_every_epochs": 1.0},
}
MODEL = {
    "d_model": 16, "num_heads": 2, "head_dim": 8, "d_ff": 32, "num_layers": 1, "dropout": 0.0,
    "item_dropout": 0.0, "max_history_items": 5,
    "training": {"epochs": 2, "batch_size": 64, "warmup_steps": 2, "precision": "float32"},
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "trie": {},
    "trie bidirectional": {"encoder": "bidirectional"},
    "paper": {"encoder": "bidirectional", "encoder_input": "codes", "input_norm": False, "softmax": "codes"},
}
SASREC = {
    "embedding_dim": 16, "max_history_items": 6, "dropout": 0.0,
    "training": {"epochs": 4, "batch_size": 32, "validate_every_epochs": 1},
}  # fmt: skip


def learn(which: str, hooks: Callbacks | None = None, **changes: Any) -> tuple[torch.nn.Module, Any]:
    rng = np.random.default_rng(0)
    if which == "tokenizer":
        vectors = torch.from_numpy(rng.normal(size=(551, 12)).astype(np.float32))  # odd: shares are uneven
        config = TokenizerConfig.resolve(TOKENIZER | changes)
        return fit_tokenizer(config, vectors, device=CPU, hooks=hooks)
    if which == "sasrec":
        config = build(SASRecConfig, SASREC | changes)
        return fit_model(config, InMemoryData(60, toy_histories(rng, 201, 60)), device=CPU, callbacks=hooks)
    ids = random_ids(rng, 60, (8, 8, 8))
    config, vectors = (
        build(TigerConfig, MODEL | KINDS[which] | changes),
        torch.from_numpy(rng.normal(size=(60, 7))).float(),
    )
    data = InMemoryData(60, toy_histories(rng, 201, 60), ids, vectors)
    return fit_model(config, data, device=CPU, callbacks=hooks)


def losses(result: Any) -> list[float]:
    return [loss for look in result.log for loss in look.get("losses", [])]


def _worker(rank: int, port: int, workers: int, which: str, changes: dict[str, Any], target: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=workers)
    parallel = torch.nn.parallel.DistributedDataParallel
    sync_buffers, synced = parallel._sync_buffers, []
    parallel._sync_buffers = lambda self: (synced.append(1), sync_buffers(self))
    if "diverging" in changes:
        try:
            _diverge(rank)
        except HealthError as error:
            Path(target, f"{rank}.json").write_text(json.dumps(str(error)))
    else:
        hooks = None
        if "preferred" in changes:  # what the worker's processor would take
            preferred = Choice(*changes.pop("preferred")[rank])
            training.choose = lambda precision, device, shapes: preferred
        if "snapshots" in changes:
            hooks = kept_in(changes.pop("snapshots"), workers, changes.pop("saves"))
        try:
            module, result = learn(which, hooks, **changes)
        except Killed:
            left: dict[str, Any] = {}
        else:
            state = {name: tensor.tolist() for name, tensor in module.state_dict().items()}
            left = {"losses": losses(result), "best": result.best, "state": state} | result.precision.figures()
        Path(target, f"{rank}.json").write_text(json.dumps(left | {"buffers_synced": len(synced)}))
    dist.destroy_process_group()


class Killed(Exception):
    pass


def kept_in(folder: str, workers: int, saves: int) -> Callbacks:
    """Checkpoints of a training whose workers are lost after `saves` of them."""
    snapshots = CheckpointStore(
        Folder(folder), {"scale": {"training": {"max_workers": workers}}}, may_differ={"scale.training.max_workers"}
    )
    made = 0

    def save(state: dict[str, Any], metrics: dict[str, Any]) -> None:
        nonlocal made
        snapshots.save(state, metrics)
        made += 1
        if made == saves:
            raise Killed

    return Callbacks(save=save, load=snapshots.load)


def _diverge(rank: int) -> None:
    """A tokenizer whose refresh is not broadcast: worker 1 adds one millionth to a number of its codebook."""
    module = torch.nn.Linear(3, 1)
    torch.nn.init.ones_(module.weight)
    torch.nn.init.ones_(module.bias)
    module.register_buffer("codebook", torch.ones(4))
    if rank == 1:
        module.codebook[2] += 1e-6
    training.check_replicas_identical(module, "tokenizer")


def group(workers: int, which: str, target: Path, **changes: Any) -> list[Any]:
    """What each worker of a process group left."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_worker, (port, workers, which, changes, str(target)), nprocs=workers)
    return [json.loads((target / f"{rank}.json").read_text()) for rank in range(workers)]


def toy_examples(longest: int = 12, **changes: Any) -> tuple[Any, Histories]:
    """Examples whose encoder is the bidirectional one unless `changes` says otherwise."""
    rng = np.random.default_rng(3)
    histories, ids = toy_histories(rng, 40, 30, longest), random_ids(rng, 30, (4, 4, 4))
    config = build(TigerConfig, MODEL | KINDS["trie bidirectional"] | changes)
    trie = Trie(ids)
    known = trie.allowed_nodes(torch.from_numpy(histories.training_counts(30) > 0))
    return make_examples(histories, config, trie, known), histories


AUTO = {"training": MODEL["training"] | {"precision": "auto"}}
