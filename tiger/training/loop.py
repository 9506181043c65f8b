"""One training loop for every model: plain PyTorch, the same in one process and in a process group.

All randomness derives from (seed, step, rank), and the order of the data from (seed, epoch), so resuming from a
checkpoint is bit-exact on a CPU, in the precision of that checkpoint. If `torch.distributed` is initialized, the module
is wrapped with DDP, and local sums are replaced by all-reduced sums.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tiger.core.errors import HealthError
from tiger.core.precision import Choice, Shapes, allow_tf32, choose
from tiger.core.progress import Progress
from tiger.training.batches import Batch, on_device, prefetch, share
from tiger.training.distributed import all_reduce_sum, broadcast, check_replicas_identical, rank, world_size
from tiger.training.schedule import Precision, Schedule, TrainingConfig

__all__ = [  # all that a model needs to be trained
    "Batch", "Callbacks", "FitResult", "Precision", "Schedule", "TrainingConfig", "all_reduce_sum", "broadcast",
    "check_replicas_identical", "fit", "on_device", "prefetch", "rank", "share", "world_size",
]  # fmt: skip

log = logging.getLogger(__name__)

Validate = Callable[[nn.Module], dict[str, float]]


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


def fit(
    module: nn.Module,
    batches: Callable[[int], Iterable[Batch]],
    schedule: Schedule,
    *,
    device: torch.device,
    validate: Validate,
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
    trainer = _Trainer(module, schedule, device, name, hooks or Callbacks(), shapes)
    trainer.validate_at_start(validate, objective)
    with contextlib.closing(trainer.remaining_batches(batches, on_epoch_start)) as remaining:
        for batch in remaining:
            loss = trainer.forward_backward(batch)
            trainer.clip_and_check(loss)
            trainer.optimizer_step()
            if schedule.is_validation_step(trainer.state.step):
                trainer.validate(validate, objective)
    return trainer.finish()


class _Trainer:
    """The module, DDP, the optimizer, and the state restored from a checkpoint.

    The host synchronizes with a GPU only in `clip_and_check`, not at every step, and at validations.
    """

    def __init__(
        self,
        module: nn.Module,
        schedule: Schedule,
        device: torch.device,
        name: str,
        hooks: Callbacks,
        shapes: Shapes | None,
    ) -> None:
        self.module, self.schedule, self.device, self.name, self.hooks = module, schedule, device, name, hooks
        config = schedule.config
        allow_tf32(device)
        module.to(device)
        self.parallel: nn.Module = module
        if world_size() > 1 and schedule.steps:
            # Buffers are not broadcast, at the start or at a step: text embeddings and semantic IDs are some of them,
            # equal on all workers. `check_replicas_identical` compares the state at every validation, the first before
            # a step.
            self.parallel = nn.parallel.DistributedDataParallel(module, forward_sync_buffers=False, init_sync=False)
        self.optimizer = torch.optim.AdamW(
            _parameter_groups(module, config.weight_decay),
            lr=config.learning_rate,
            fused=device.type in ("cpu", "cuda"),
        )
        self.state = _State.restore(hooks.load(), module, self.optimizer, device)
        shapes = shapes or Shapes.of(module, max(1, config.batch_size // world_size()))
        self.state.settle_precision(
            _agreed_precision(config.precision, device, shapes) if schedule.steps else Choice("float32"), name
        )
        self.progress: Progress | None = None
        self.losses: list[Tensor] = []  # of every step since the last validation: this worker's share of the mean

    @property
    def is_done(self) -> bool:
        """Whether all steps are made, or the metric has not improved for `patience` validations."""
        patience = self.schedule.config.patience
        return self.state.step >= self.schedule.steps or self.state.validations_since_best >= patience

    def remaining_batches(
        self, batches: Callable[[int], Iterable[Batch]], on_epoch_start: Callable[[int], None] | None
    ) -> Generator[Batch, None, None]:
        """Yield the batches of the steps to make, on the device, across epochs."""
        while not self.is_done:
            epoch, skip = divmod(self.state.step, self.schedule.steps_per_epoch)
            if on_epoch_start and skip == 0:
                on_epoch_start(epoch)
            with contextlib.closing(on_device(islice(batches(epoch), skip, None), self.device)) as ready:
                for batch in ready:
                    yield batch
                    if self.is_done:
                        break

    def forward_backward(self, batch: Batch) -> Tensor:
        """Compute the gradients of a step; return this worker's summand of the loss, a scalar on the device."""
        _seed_step(self.schedule.seed, self.state.step, self.device)
        bfloat16 = self.state.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16) if bfloat16 else contextlib.nullcontext():
            row_losses = self.parallel(*batch.inputs)
        weights = batch.weights if row_losses.dim() == 1 else batch.weights[:, None]
        parts = (row_losses.float() * weights).sum(0) / batch.total_weight
        loss: Tensor = parts.sum()
        (loss * world_size()).backward()  # DDP averages over workers; the loss is a summand of the global mean
        self.losses.append(parts.detach())
        return loss.detach()

    def clip_and_check(self, loss: Tensor) -> None:
        """Clip the gradient norm, and check that the loss or that norm is finite, before the optimizer's step.

        With several workers the norm is checked at every step: it is identical on all of them, so that they stop
        together, while the loss is local to a worker. `isfinite` synchronizes; on a GPU it is called periodically, and
        before each validation, which may keep the weights.
        """
        max_norm, step = self.schedule.config.max_grad_norm, self.state.step
        is_checked = step % 50 == 0 or self.schedule.is_validation_step(step + 1)
        decisive = loss
        if max_norm or is_checked or world_size() > 1:
            decisive = nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])
            if max_norm:
                nn.utils.clip_grads_with_norm_(self.module.parameters(), max_norm, decisive)
        if (self.device.type == "cpu" or is_checked) and not bool(torch.isfinite(decisive)):
            raise HealthError(
                f"{self.name}: the loss or its gradient is not finite at step {step} (loss {float(loss)}); lower the "
                "learning rate, and check the inputs for NaN or huge values"
            )

    def optimizer_step(self) -> None:
        """Update the parameters with the learning rate of this step."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.learning_rate(self.state.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.state.step += 1
        if self.progress:
            self.progress.add(1)

    def validate_at_start(self, validate: Validate, objective: str) -> None:
        """Validate and report a new training before its first step; start the progress line."""
        if self.state.step == 0 and not self.state.log:
            self._validate_and_track_best(validate, objective, {})
            self.hooks.report(self.state.log[-1])
        if rank() == 0:
            self.progress = Progress(self.name, self.schedule.steps, "steps", done=self.state.step)

    def validate(self, validate: Validate, objective: str) -> None:
        """Validate, log and report the metrics with the losses since the last validation, and save a checkpoint."""
        self._validate_and_track_best(validate, objective, self._reduced_losses())
        summary = {key: value for key, value in self.state.log[-1].items() if key != "losses"}
        if rank() == 0:
            log.info("%s: %s", self.name, ", ".join(f"{k} {_short(v)}" for k, v in summary.items()))
        self.hooks.report(summary | ({"steps_per_second": self.progress.rate} if self.progress else {}))
        self.hooks.save(self.state.checkpoint(self.module, self.optimizer), summary)

    def _reduced_losses(self) -> dict[str, Any]:
        """Return the losses of the steps since the last validation, over all workers; forget them."""
        of_parts = all_reduce_sum(torch.stack(self.losses))
        self.losses.clear()
        losses = (of_parts if of_parts.dim() == 1 else of_parts.sum(1)).tolist()
        metrics = {"loss": sum(losses) / len(losses), "losses": losses}
        if of_parts.dim() > 1:
            metrics |= {f"loss@{part}": mean for part, mean in enumerate(of_parts.mean(0).tolist(), 1)}
        return metrics

    def _validate_and_track_best(self, validate: Validate, objective: str, metrics: dict[str, Any]) -> None:
        """Validate, and keep the weights if they are the best so far.

        Raises:
            HealthError: the workers' states differ.
        """
        state = self.state
        check_replicas_identical(self.module, self.name)
        self.module.eval()
        validated = validate(self.module)
        self.module.train()
        state.log.append({"step": state.step, **metrics, **validated})
        if state.best_step < 0 or validated[objective] > state.best[objective]:
            state.best, state.best_step, state.validations_since_best = validated, state.step, 0
            state.best_weights = {key: tensor.detach().clone() for key, tensor in self.module.state_dict().items()}
        else:
            state.validations_since_best += 1

    def finish(self) -> FitResult:
        """Load the best weights into the module; return the result."""
        state = self.state
        if self.progress:
            self.progress.close()
        self.module.load_state_dict(state.best_weights)
        precision = Choice(state.precision, state.precision_speedup)
        stopped_early = state.step < self.schedule.steps
        return FitResult(state.best, state.best_step, state.step, stopped_early, state.log, precision)


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

    def checkpoint(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return the content of a checkpoint."""
        return {"state": vars(self), "module": module.state_dict(), "optimizer": optimizer.state_dict()}

    @classmethod
    def restore(
        cls,
        saved: dict[str, Any] | None,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
    ) -> _State:
        """Load a checkpoint into the module and the optimizer; return the state, a new one without a checkpoint."""
        if saved is None:
            return cls()
        module.load_state_dict(saved["module"])
        optimizer.load_state_dict(saved["optimizer"])
        state = cls(**saved["state"])
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
