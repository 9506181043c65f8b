"""One training loop for every model: plain PyTorch, the same in one process and in a process group.

All randomness derives from (seed, step, rank), and the order of the data from (seed, epoch), so resuming from a
checkpoint is bit-exact on a CPU, in the precision of that checkpoint. If `torch.distributed` is initialized, the module
is wrapped with DDP, and local sums are replaced by all-reduced sums.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn

from tiger.core.config import Config
from tiger.core.errors import HealthError
from tiger.core.precision import Choice, Shapes, allow_tf32, choose
from tiger.core.progress import Progress

log = logging.getLogger(__name__)

Precision = Literal["auto", "float32", "bfloat16"]
T = TypeVar("T")

_PREFETCHED = 2  # batches


class TrainingConfig(Config):
    """Optimizer, learning rate schedule and stopping. Components subclass it with their own defaults."""

    epochs: int = Field(0, ge=0, description="maximum passes over all examples")
    batch_size: int = Field(256, ge=1, description="examples per step, over all workers")
    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate of AdamW")
    weight_decay: float = Field(0.0, ge=0, description="weight decay of AdamW")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up, before cosine decay to zero")
    max_grad_norm: float = Field(1.0, ge=0, description="maximum gradient norm; 0: no clipping")
    validate_every_epochs: float = Field(1.0, gt=0, description="epochs between validations")
    patience: int = Field(10, ge=1, description="validations without improvement before training stops early")
    precision: Precision = Field("float32", description="dtype of autocast; auto: the faster one, measured")

    def schedule(self, examples: int, seed: int) -> Schedule:
        """Return the schedule for a number of examples."""
        steps = max(1, -(-examples // self.batch_size))
        return Schedule(config=self, steps_per_epoch=steps, seed=seed)


@dataclass(frozen=True)
class Batch:
    """One worker's shard of a global batch.

    Attributes:
        inputs: arguments of the module's forward, which returns one loss per row, or several parts of it.
        weights: float32 [rows]; 0 for the padding row of a shard that would be empty.
        total_weight: sum of the weights over all workers.
    """

    inputs: tuple[Tensor, ...]
    weights: Tensor
    total_weight: float

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Return a batch of `change(tensor)` for every tensor."""
        return replace(self, inputs=tuple(change(tensor) for tensor in self.inputs), weights=change(self.weights))


@dataclass(frozen=True)
class Schedule:
    """A `TrainingConfig` applied to a number of examples."""

    config: TrainingConfig
    steps_per_epoch: int
    seed: int

    @property
    def steps(self) -> int:
        """Steps of all epochs."""
        return self.config.epochs * self.steps_per_epoch

    @property
    def validate_every(self) -> int:
        """Steps between two validations."""
        return max(1, round(self.config.validate_every_epochs * self.steps_per_epoch))

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step: linear warm-up, then cosine decay to zero at the last step."""
        peak, warmup = self.config.learning_rate, min(self.config.warmup_steps, self.steps // 4)
        if step < warmup:
            return peak * (step + 1) / warmup
        return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.steps - warmup)))


@dataclass
class Callbacks:
    """Callbacks that report metrics and that save and load checkpoints; by default they do nothing."""

    report: Callable[[dict[str, Any]], None] = field(default=lambda metrics: None)
    save: Callable[[dict[str, Any], dict[str, Any]], None] = field(default=lambda state, metrics: None)
    load: Callable[[], dict[str, Any] | None] = field(default=lambda: None)


@dataclass
class FitResult:
    """Best validation metrics, step counts and history.

    Attributes:
        best: metrics of the best validation.
        best_step: step of the best validation.
        steps: steps made.
        stopped_early: whether training stopped before the last step.
        log: metrics of all validations.
        precision: precision of the training.
        extra: further metrics of the training, JSON values.
    """

    best: dict[str, float]
    best_step: int
    steps: int
    stopped_early: bool
    log: list[dict[str, Any]]
    precision: Choice = field(default_factory=lambda: Choice("float32"))
    extra: dict[str, Any] = field(default_factory=dict)


def rank() -> int:
    """Return this process's rank in the process group; 0 without one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes in the process group; 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over the process group, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def broadcast(module: nn.Module) -> None:
    """Copy the parameters and buffers of rank 0 to every worker."""
    if dist.is_initialized():
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, src=0)


def check_replicas_identical(module: nn.Module, name: str) -> None:
    """Check that all parameters and buffers are bitwise equal on all workers.

    Args:
        module: the module.
        name: the stage, for messages.

    Raises:
        HealthError: on every worker, if one differs; lists the tensors. DDP averages gradients only, so divergence
            would otherwise go unnoticed.
    """
    if not dist.is_initialized():
        return
    state = module.state_dict()
    device = next(iter(state.values())).device
    minimum = torch.tensor([_digest(tensor) for tensor in state.values()], device=device)
    maximum = minimum.clone()
    dist.all_reduce(minimum, dist.ReduceOp.MIN)
    dist.all_reduce(maximum, dist.ReduceOp.MAX)
    differing = [key for key, low, high in zip(state, minimum.tolist(), maximum.tolist(), strict=True) if low != high]
    if differing:
        raise HealthError(
            f"{name}: the workers' states diverged in {', '.join(differing[:5])} ({len(differing)} of {len(state)} "
            "tensors); something modifies the module outside of DDP gradients on some workers only"
        )


def _digest(tensor: Tensor) -> int:
    """Return 63 bits of the sha256 of a tensor's bytes."""
    content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") >> 1


def share(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return this worker's rows of a global batch, and their weights; every row belongs to exactly one worker.

    Empty shards are padded with the first row at weight 0, so that every rank joins the collective operations.
    """
    own = rows[rank() :: world_size()]
    return (own, torch.ones(len(own))) if len(own) else (rows[:1], torch.zeros(1))


def fit(
    module: nn.Module,
    batches: Callable[[int], Iterable[Batch]],
    schedule: Schedule,
    *,
    device: torch.device,
    validate: Callable[[nn.Module], dict[str, float]],
    objective: str,
    on_epoch_start: Callable[[int], None] | None = None,
    hooks: Callbacks | None = None,
    name: str = "train",
    shapes: Shapes | None = None,
) -> FitResult:
    """Train `module` in place; at the end it has the weights of the best validation.

    Args:
        module: its forward takes a batch's inputs and returns one loss per row [B], or its parts [B, P], which are
            logged one by one as loss@1 to loss@P. Equal on every worker.
        batches: epoch -> this worker's shards of that epoch's global batches, `schedule.steps_per_epoch` of them.
        schedule: number of steps and learning rate.
        device: where to compute.
        validate: called on every worker with the unwrapped module in eval mode; returns metrics, equal on all workers.
        objective: name of the metric to maximize.
        on_epoch_start: called on every worker before an epoch's first batch; must leave the module equal on all.
        hooks: callbacks for metrics and checkpoints.
        name: the stage, for log lines.
        shapes: sizes of the model, which determine `precision = "auto"` on a CPU; by default those of the module's
            largest linear layer.

    Raises:
        HealthError: the workers' states differ at a validation; or a loss is not finite, in which case the optimizer
            has not made that step, and the last checkpoint is valid.
    """
    hooks, config = hooks or Callbacks(), schedule.config
    allow_tf32(device)
    module.to(device)
    parallel: nn.Module = module
    if world_size() > 1 and schedule.steps:
        # Buffers are not broadcast, at the start or at a step: text embeddings and semantic IDs are some of them, equal
        # on all workers. `check_replicas_identical` compares the state at every validation, the first before a step.
        parallel = nn.parallel.DistributedDataParallel(module, forward_sync_buffers=False, init_sync=False)
    optimizer = torch.optim.AdamW(
        _parameter_groups(module, config.weight_decay),
        lr=config.learning_rate,
        fused=device.type in ("cpu", "cuda"),
    )
    state = _State.restore(hooks.load(), module, optimizer, device)
    shapes = shapes or Shapes.of(module, max(1, config.batch_size // world_size()))
    state.settle_precision(
        _agreed_precision(config.precision, device, shapes) if schedule.steps else Choice("float32"), name
    )
    bfloat16 = state.precision == "bfloat16"
    if state.step == 0 and not state.log:
        _validate_and_track_best(state, module, validate, objective, {}, name)
        hooks.report(state.log[-1])
    progress = Progress(name, schedule.steps, "steps", done=state.step) if rank() == 0 else None
    losses: list[Tensor] = []  # of every step since the last validation: this worker's share of the mean
    while state.step < schedule.steps and state.validations_since_best < config.patience:
        epoch, skip = divmod(state.step, schedule.steps_per_epoch)
        if on_epoch_start and skip == 0:
            on_epoch_start(epoch)
        # The host synchronizes with a GPU only twice in this loop: in `bool(torch.isfinite(...))`, and at validations.
        with contextlib.closing(on_device(islice(batches(epoch), skip, None), device)) as ready:
            for batch in ready:
                _seed_step(schedule.seed, state.step, device)
                for group in optimizer.param_groups:
                    group["lr"] = schedule.learning_rate(state.step)
                with torch.autocast(device.type, torch.bfloat16) if bfloat16 else contextlib.nullcontext():
                    row_losses = parallel(*batch.inputs)
                weights = batch.weights if row_losses.dim() == 1 else batch.weights[:, None]
                parts = (row_losses.float() * weights).sum(0) / batch.total_weight
                loss = parts.sum()
                (loss * world_size()).backward()  # DDP averages over workers; the loss is a summand of the global mean
                losses.append(parts.detach())
                is_validation_step = (state.step + 1) % schedule.validate_every == 0 or state.step + 1 == schedule.steps
                thorough, decisive = is_validation_step or state.step % 50 == 0, loss.detach()
                # With several workers check the gradient norm at every step: it is identical on all workers, so that
                # they stop together, while the loss is local to a worker.
                if config.max_grad_norm or thorough or world_size() > 1:
                    decisive = nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
                    if config.max_grad_norm:
                        nn.utils.clip_grads_with_norm_(module.parameters(), config.max_grad_norm, decisive)
                # isfinite() synchronizes; on a GPU check periodically, and before each validation, which may keep the
                # weights.
                if (device.type == "cpu" or thorough) and not bool(torch.isfinite(decisive)):
                    raise HealthError(
                        f"{name}: the loss or its gradient is not finite at step {state.step} (loss "
                        f"{float(loss.detach())}); lower the learning rate, and check the inputs for NaN or huge values"
                    )
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                state.step += 1
                if progress:
                    progress.add(1)
                if is_validation_step:
                    of_parts = all_reduce_sum(torch.stack(losses))
                    losses.clear()
                    global_losses = (of_parts if of_parts.dim() == 1 else of_parts.sum(1)).tolist()
                    figures = {"loss": sum(global_losses) / len(global_losses), "losses": global_losses}
                    if of_parts.dim() > 1:
                        means = enumerate(of_parts.mean(0).tolist(), 1)
                        figures |= {f"loss@{part}": mean for part, mean in means}
                    _validate_and_track_best(state, module, validate, objective, figures, name)
                    summary = {key: value for key, value in state.log[-1].items() if key != "losses"}
                    if rank() == 0:
                        log.info("%s: %s", name, ", ".join(f"{k} {_short(v)}" for k, v in summary.items()))
                    hooks.report(summary | ({"steps_per_second": progress.rate} if progress else {}))
                    hooks.save(state.snapshot(module, optimizer), summary)
                    if state.validations_since_best >= config.patience:
                        break
                if state.step >= schedule.steps:
                    break
    if progress:
        progress.close()
    module.load_state_dict(state.best_weights)
    precision = Choice(state.precision, state.precision_speedup)
    return FitResult(state.best, state.best_step, state.step, state.step < schedule.steps, state.log, precision)


def _validate_and_track_best(
    state: _State,
    module: nn.Module,
    validate: Callable[[nn.Module], dict[str, float]],
    objective: str,
    figures: dict[str, Any],
    name: str,
) -> None:
    """Validate, and keep the weights if they are the best so far.

    Raises:
        HealthError: the workers' states differ.
    """
    check_replicas_identical(module, name)
    module.eval()
    found = validate(module)
    module.train()
    state.log.append({"step": state.step, **figures, **found})
    if state.best_step < 0 or found[objective] > state.best[objective]:
        state.best, state.best_step, state.validations_since_best = found, state.step, 0
        state.best_weights = {key: tensor.detach().clone() for key, tensor in module.state_dict().items()}
    else:
        state.validations_since_best += 1


@dataclass
class _State:
    """Training state in a checkpoint, in addition to the module and the optimizer."""

    step: int = 0
    best: dict[str, float] = field(default_factory=dict)
    best_step: int = -1
    validations_since_best: int = 0
    log: list[dict[str, Any]] = field(default_factory=list)
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    precision: str = ""
    """Precision of all steps so far; empty before the first choice, and in checkpoints that did not record it."""
    precision_speedup: float | None = None

    def settle_precision(self, present: Choice, name: str) -> None:
        """Use the precision of the checkpoint if it has one, so that resuming does not change it, else `present`."""
        if not self.precision:
            self.precision, self.precision_speedup = present.name, present.speedup
        elif self.precision != present.name:
            log.info(
                "%s: continuing in %s, the precision of its checkpoint, although %s is the choice for this node",
                name, self.precision, present.name,
            )  # fmt: skip

    def snapshot(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return the content of a checkpoint."""
        return {"state": vars(self), "module": module.state_dict(), "optimizer": optimizer.state_dict()}

    @classmethod
    def restore(
        cls, snapshot: dict[str, Any] | None, module: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
    ) -> _State:
        """Load a checkpoint into the module and the optimizer; return the state, a new one without a checkpoint."""
        if snapshot is None:
            return cls()
        module.load_state_dict(snapshot["module"])
        optimizer.load_state_dict(snapshot["optimizer"])
        state = cls(**snapshot["state"])
        state.best_weights = {key: tensor.to(device) for key, tensor in state.best_weights.items()}
        log.info("resuming from the checkpoint at step %d", state.step)
        return state


def _parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return parameter groups in which only parameters of two or more dimensions have weight decay."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def _agreed_precision(precision: Precision, device: torch.device, shapes: Shapes) -> Choice:
    """Return rank 0's choice on every worker, because CPUs may differ between nodes and the precision must not."""
    if precision != "auto" or not dist.is_initialized():
        return choose(precision, device, shapes)
    choice = choose(precision, device, shapes) if rank() == 0 else Choice("float32")
    sent = torch.tensor([choice.name == "bfloat16", choice.speedup or 0.0], dtype=torch.float64, device=device)
    dist.broadcast(sent, src=0)
    bfloat16, speedup = sent.tolist()
    return Choice("bfloat16" if bfloat16 else "float32", speedup or None)


def prefetch(
    items: Iterator[T], ahead: int = _PREFETCHED, begin: Callable[[], None] | None = None
) -> Generator[T, None, None]:
    """Yield all items in order, computing the next ones in a background thread.

    An exception of `items` is raised here, at its position. Closing this generator ends the thread.

    Args:
        items: the items.
        ahead: maximum number of items computed in advance.
        begin: called once, in the thread.
    """
    end = object()
    executor = ThreadPoolExecutor(1, "prefetch", initializer=begin)
    try:
        coming = deque(executor.submit(next, items, end) for _ in range(ahead))
        while (item := coming.popleft().result()) is not end:
            coming.append(executor.submit(next, items, end))
            yield item  # type: ignore[misc]  # not `end`
    finally:
        executor.shutdown(cancel_futures=True)


def on_device(batches: Iterator[Batch], device: torch.device) -> Generator[Batch, None, None]:
    """Yield batches with their tensors on the device.

    For a GPU, a background thread prepares the next two in pinned memory during a step, and copies are asynchronous.
    """
    if device.type != "cuda":
        yield from (batch.map(lambda tensor: tensor.to(device)) for batch in batches)
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    pinned = (batch.map(Tensor.pin_memory) for batch in batches)
    # A new thread uses GPU 0: pinning there would create another context on it, for every worker of the node.
    with contextlib.closing(prefetch(pinned, begin=lambda: torch.cuda.set_device(index))) as ready:
        for batch in ready:
            yield batch.map(lambda tensor: tensor.to(device, non_blocking=True))


def _seed_step(seed: int, step: int, device: torch.device) -> None:
    """Seed the generator that the step samples from.

    `torch.manual_seed` also seeds every kind of accelerator; if none is initialized, it captures a stack trace for lazy
    initialization, at least 0.1 ms per step.
    """
    value = (seed * 1_000_003 + step) * 4_099 + rank()
    if device.type == "cuda":
        torch.cuda.manual_seed(value)
    else:
        torch.default_generator.manual_seed(value)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
