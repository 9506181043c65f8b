"""Options of a training, and its schedule: number of steps, validations, and learning rate of each step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from tiger.core.config import Config

Precision = Literal["auto", "float32", "bfloat16"]


class TrainingConfig(Config):
    """Optimizer, learning rate schedule and stopping. Components subclass it with their own defaults."""

    epochs: int = Field(0, ge=0, description="maximum passes over all examples")
    max_steps: int | None = Field(
        None, ge=1, description="maximum steps, where the learning rate reaches zero; none: those of all epochs"
    )
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
class Schedule:
    """A `TrainingConfig` applied to a number of examples."""

    config: TrainingConfig
    steps_per_epoch: int
    seed: int

    @property
    def steps(self) -> int:
        """Steps of the whole training."""
        steps = self.config.epochs * self.steps_per_epoch
        return steps if self.config.max_steps is None else min(steps, self.config.max_steps)

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

    def is_validation_step(self, steps: int) -> bool:
        """Return whether a validation follows after this number of steps."""
        return steps % self.validate_every == 0 or steps == self.steps
