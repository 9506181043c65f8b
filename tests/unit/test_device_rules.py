"""What must hold on a GPU, checked without one: a device that is simulated, with data, behind PyTorch's dispatcher.

A `Simulated` tensor reports the device `meta` and holds its numbers in a CPU tensor. An operation that mixes it with a
CPU tensor raises, as on CUDA; what makes the host wait for the device is recorded; and collectives run in a process
group that, like NCCL's, has no backend for CPU tensors, so that PyTorch itself refuses them. Whole trainings run this
way: k-means, validation by beam search, snapshots, optimizer. What it cannot show is time, and what CUDA's own kernels
wait for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.factories import random_ids, toy_histories
from tiger.core import precision
from tiger.core.config import build
from tiger.core.storage import Folder
from tiger.models.base import InMemoryData
from tiger.models.sasrec import Config as SASRecConfig
from tiger.models.sasrec import SASRec
from tiger.models.tiger.config import TigerConfig
from tiger.models.train import fit_model
from tiger.tokenizers.base import TokenizerConfig
from tiger.tokenizers.train import fit_tokenizer
from tiger.training import loop as training
from tiger.training.checkpoints import CheckpointStore
from tiger.training.loop import Batch, Callbacks, FitResult

pytestmark = pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")  # here it copies
DEVICE, CPU = torch.device("meta"), torch.device("cpu")
aten = torch.ops.aten


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Toy sizes gain nothing from a second thread, and lose much to it on a busy machine. auto is float32 here."""
    monkeypatch.setattr(precision, "has_bfloat16", lambda: False)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Simulated(Tensor):
    """A tensor on the simulated device; `data_on_cpu` holds its numbers."""

    data_on_cpu: Tensor

    @staticmethod
    def __new__(cls, content: Tensor) -> Simulated:
        made = Tensor._make_wrapper_subclass(
            cls, content.shape, strides=content.stride(), storage_offset=content.storage_offset(),
            dtype=content.dtype, device=DEVICE,
        )  # fmt: skip
        made.data_on_cpu = content
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} was called on the simulated device outside of `SimulatedDevice`")


class _NumbersOfPython(TorchFunctionMode):
    """Moves numbers between Python and the simulated device, where PyTorch knows that `meta` has no data."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and torch.device(kwargs.get("device") or CPU) == DEVICE:
            del kwargs["device"]
            return torch.tensor(*args, **kwargs).to(DEVICE)
        if func is Tensor.__getitem__:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            sent = (torch.tensor(part).to(args[0].device) if isinstance(part, list) else part for part in index)
            args = (args[0], tuple(sent))
        if func is Tensor.tolist and isinstance(args[0], Simulated):
            args = (args[0].cpu(),)
        return func(*args, **kwargs)


class SimulatedDevice(TorchDispatchMode):
    """Computes what is asked of the device `meta`, and records when the host waits or sends something.

    Attributes:
        waits: names of the operations that waited for the device, by the section of the program, see `begin`.
        uploads: how many tensors with a dimension were copied to the device, by section.
        collectives: how many tensors went into collectives.
    """

    _DATA_DEPENDENT: ClassVar = {
        aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default,
        aten.bincount.default, aten._unique2.default, aten.repeat_interleave.Tensor, aten.is_nonzero.default,
    }  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.waits: dict[Any, list[str]] = {}
        self.uploads: dict[Any, int] = {}
        self.collectives = 0
        self.begin(None)

    def __enter__(self) -> SimulatedDevice:
        self._function_mode, self._patch = _NumbersOfPython(), pytest.MonkeyPatch()
        # Tensors without data have no inference mode.
        self._patch.setattr(torch._C, "_InferenceMode", lambda mode: torch.no_grad() if mode else torch.enable_grad())
        self._function_mode.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._function_mode.__exit__(*raised)
        self._patch.undo()

    def begin(self, section: Any) -> None:
        self.section = section
        self.waits.setdefault(section, [])
        self.uploads.setdefault(section, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        own = [tensor for tensor in tensors if isinstance(tensor, Simulated)]
        if func.namespace == "c10d":
            return self._collective(func, args, kwargs, own)
        copies = func in (aten._to_copy.default, aten.copy_.default)
        foreign = [tensor for tensor in tensors if not isinstance(tensor, Simulated) and tensor.dim()]
        if own and foreign and not copies:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device")
        named = kwargs.get("device")
        there = bool(own) if named is None else torch.device(named) == DEVICE
        if func is aten.copy_.default:
            there = isinstance(args[0], Simulated)
        by_mask = func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default) and any(
            leaf.dtype in (torch.bool, torch.uint8) for leaf in tree_leaves(args[1]) if isinstance(leaf, Tensor)
        )
        if own and (func in self._DATA_DEPENDENT or by_mask or not there):
            self.waits[self.section].append(str(func))
        if foreign and there:
            self.uploads[self.section] += 1
        inner_args, inner_kwargs = tree_map(_inner, args), tree_map(_inner, kwargs)
        result = func(*inner_args, **inner_kwargs)
        known = {id(tensor.data_on_cpu): tensor for tensor in own}  # operations in place return what they were given
        known |= {id(tensor): tensor for tensor in tensors if not isinstance(tensor, Simulated)}

        def outer(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return known.get(id(value)) if id(value) in known else Simulated(value) if there else value

        return tree_map(outer, result)

    def _collective(self, func: Any, args: Any, kwargs: Any, own: list[Simulated]) -> Any:
        """Call PyTorch's with tensors of the same devices, but without data: in a group of one nothing changes."""
        self.collectives += len(own)
        empty = tree_map(
            lambda leaf: torch.empty(leaf.shape, device=DEVICE) if isinstance(leaf, Simulated) else leaf, args
        )
        return func(*empty, **kwargs)


def _inner(value: Any) -> Any:
    if isinstance(value, Simulated):
        return value.data_on_cpu
    return CPU if isinstance(value, torch.device) and value == DEVICE else value


@pytest.fixture
def device_group() -> Iterator[None]:
    """A process group of one that knows no CPU tensors, like the one that Ray Train makes for GPUs."""
    dist.init_process_group("meta:gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


TOKENIZER = {"codebook_size": 8, "kmeans_iterations": 5}
TRAINED = {"epochs": 3, "batch_size": 64, "validate_every_epochs": 1.0}
MODEL = {
    "d_model": 16, "num_heads": 2, "head_dim": 8, "d_ff": 32, "num_layers": 1, "dropout": 0.0,
    "item_dropout": 0.0, "max_history_items": 5,
    "training": {
        "epochs": 2, "batch_size": 64, "warmup_steps": 2, "precision": "auto",
        "validation_users": 40, "validation_beam": 10, "validate_every_epochs": 1.0,
    },
}  # fmt: skip
PAPER = {"encoder": "bidirectional", "encoder_input": "codes", "input_norm": False, "softmax": "codes"}
KINDS: dict[str, dict[str, Any]] = {
    "rqvae": TOKENIZER | {"training": TRAINED, "codebook_update_every": 1},
    "rqvae ema": TOKENIZER | {"codebook_update": "ema", "gradient_estimator": "rotation", "training": TRAINED},
    "rkmeans": TOKENIZER | {"kind": "rkmeans"},
    "opq": TOKENIZER | {"kind": "opq", "num_levels": 4},
    "trie": {},
    "trie item dropout": {"item_dropout": 0.3},
    "trie bidirectional": {"encoder": "bidirectional"},
    "trie text only": {"item_vectors": False},
    "paper": PAPER,
    "paper users": PAPER | {"num_user_tokens": 7},
    "paper causal children": PAPER | {"encoder": "causal", "softmax_support": "children"},
    "sasrec": {"embedding_dim": 16, "max_history_items": 6, "dropout": 0.0, "training": TRAINED | {"batch_size": 16}},
}
STEPPING = [kind for kind in KINDS if kind not in ("rkmeans", "opq")]


def learn(kind: str, device: torch.device, hooks: Callbacks | None = None) -> tuple[torch.nn.Module, FitResult]:
    """Train one kind of module from start to end."""
    rng = np.random.default_rng(0)
    if kind in ("rqvae", "rqvae ema", "rkmeans", "opq"):
        vectors = torch.from_numpy(rng.normal(size=(300, 12)).astype(np.float32))
        return fit_tokenizer(TokenizerConfig.resolve(KINDS[kind]), vectors, device=device, hooks=hooks)
    histories, ids = toy_histories(rng, 101, 60), random_ids(rng, 60, (8, 8, 8))
    if kind == "sasrec":
        config = build(SASRecConfig, KINDS[kind])
        return fit_model(config, InMemoryData(60, histories), device=device, callbacks=hooks)
    vectors = torch.from_numpy(rng.normal(size=(60, 7)).astype(np.float32))
    config = build(TigerConfig, MODEL | KINDS[kind])
    return fit_model(config, InMemoryData(60, histories, ids, vectors), device=device, callbacks=hooks)


def losses(result: FitResult) -> list[float]:
    return [loss for look in result.log for loss in look.get("losses", [])]


class Stopped(Exception):
    pass


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_training_on_a_device_whose_group_knows_no_cpu_tensors(
    kind: str, device_group: None, tmp_path: Path
) -> None:
    """Every collective gets tensors of the training device; stopped and resumed, the losses are those of the CPU."""
    snapshots = CheckpointStore(Folder(str(tmp_path)), {})

    def save(state: dict[str, Any], metrics: dict[str, Any]) -> None:
        snapshots.save(state, metrics)
        raise Stopped

    with SimulatedDevice() as device:
        if kind in STEPPING:
            with pytest.raises(Stopped):
                learn(kind, DEVICE, Callbacks(save=save, load=snapshots.load))
        module, result = learn(kind, DEVICE, Callbacks(save=snapshots.save, load=snapshots.load))
        assert all(isinstance(tensor, Simulated) for tensor in module.state_dict().values())
        assert device.collectives >= len(module.state_dict())
    dist.destroy_process_group()
    try:
        _, expected = learn(kind, CPU)
    finally:
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())  # for the fixture to destroy
    np.testing.assert_allclose(losses(result), losses(expected), rtol=1e-3)


def test_such_a_group_refuses_a_collective_of_cpu_tensors(device_group: None) -> None:
    model = SASRec(build(SASRecConfig, KINDS["sasrec"]), 60)
    refusal = re.escape("No backend type associated with device type cpu")
    for mode in (SimulatedDevice(), torch.no_grad()):
        with mode, pytest.raises(RuntimeError, match=refusal):
            training.broadcast(model)


@pytest.mark.parametrize("kind", STEPPING)
def test_a_step_does_not_wait_for_the_device(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Except for thorough steps: every 50th, and those before a look. Nothing but the next batch is sent there."""
    seed_step, before_look = training._seed_step, set()
    look = training._Trainer._validate_and_track_best

    def begin_step(seed: int, step: int, device: torch.device) -> None:
        running.begin(step)
        seed_step(seed, step, device)

    def begin_look(trainer: Any, *arguments: Any) -> None:
        before_look.add(trainer.state.step - 1)
        running.begin("look")
        look(trainer, *arguments)

    monkeypatch.setattr(training, "_seed_step", begin_step)
    monkeypatch.setattr(training._Trainer, "_validate_and_track_best", begin_look)
    with SimulatedDevice() as running:
        _, result = learn(kind, DEVICE)
    quick = [step for step in range(result.steps) if step % 50 and step not in before_look]
    assert len(quick) > 5
    assert {step: running.waits[step] for step in quick} == {step: [] for step in quick}
    _, batch = example_batches(kind)
    assert {running.uploads[step] for step in quick} == {len(batch.inputs) + 1}
    assert all(running.waits[step] for step in before_look - {-1})  # they are seen


def example_batches(kind: str) -> tuple[torch.nn.Module, Batch]:
    """An untrained module, and a batch as its trainer makes it."""
    seen: list[Any] = []

    def fit(module: torch.nn.Module, batches: Any, *arguments: Any, **named: Any) -> None:
        seen.extend([module, next(iter(batches(0)))])
        raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "fit", fit)
        with pytest.raises(Stopped):
            learn(kind, CPU)
    return seen[0], seen[1]


@pytest.mark.parametrize("kind", STEPPING)
def test_forward_and_backward_run_on_tensors_without_data(kind: str) -> None:
    """On `meta` every operation whose result depends on data raises: `nonzero`, `item`, an index by a mask."""
    module, batch = example_batches(kind)
    module.to("meta")
    batch = batch.map(lambda tensor: tensor.to("meta"))
    losses = module(*batch.inputs).float()
    loss = (losses.view(len(batch.weights), -1) * batch.weights[:, None]).sum() / batch.total_weight
    loss.backward()
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)


def test_without_places_of_the_targets_they_are_found() -> None:
    """The index of a batch is an optimization: losses are the same, bit by bit."""
    module, batch = example_batches("sasrec")
    assert isinstance(module, SASRec)
    assert torch.equal(module(*batch.inputs), module(*batch.inputs[:-1]))
