"""Resources of a stage in one shape: how many workers, and what each of them takes."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field, model_validator

from tiger.core.config import Config


class Resources(Config):
    """Workers of a stage, and CPUs and GPUs per worker. They do not affect results, up to rounding.

    A worker is a process that Ray places on one node: an actor that encodes or decodes, a process of a training or of
    a trial, a replica of the service.
    """

    unfingerprinted: ClassVar[frozenset[str]] = frozenset({"min_workers", "max_workers", "cpus", "gpus"})

    min_workers: int | None = Field(
        None, ge=1, description="workers that must be available before work begins; none: 1, or max_workers if fixed"
    )
    max_workers: int | None = Field(
        None,
        ge=1,
        description="maximum number of workers; none: as many encoders and decoders as fit, one in training (with "
        "GPUs one per 1,024 rows of a batch, up to one per GPU), in a trial and in the service",
    )
    cpus: float | None = Field(
        None,
        gt=0,
        description="CPUs per worker; none: 1, in training as many as one node can provide, or 4 with a GPU; encoders "
        "and decoders on a GPU take 1",
    )
    gpus: float | None = Field(
        None,
        ge=0,
        le=1,
        description="GPU, or a fraction of one, per worker; none: if the run uses GPUs, 0.5 per encoder or decoder and "
        "1 in training and in the service, else 0; in a trial 0",
    )

    @model_validator(mode="after")
    def _limits_agree(self) -> Resources:
        if self.min_workers and self.max_workers and self.min_workers > self.max_workers:
            raise ValueError(f"min_workers = {self.min_workers} is more than max_workers = {self.max_workers}")
        return self

    @property
    def num_workers(self) -> int | None:
        """The number of workers if it is fixed, see `FixedResources`; None: the stage's default."""
        return self.max_workers or self.min_workers


def _require_fixed(resources: Resources) -> Resources:
    if resources.min_workers and resources.max_workers and resources.min_workers != resources.max_workers:
        raise ValueError(
            f"min_workers = {resources.min_workers} differs from max_workers = {resources.max_workers}, but the number "
            "of workers does not change while they run; set max_workers alone"
        )
    return resources


FixedResources = Annotated[Resources, AfterValidator(_require_fixed)]
"""Resources of workers that are neither added nor removed: process groups, and replicas of the service."""


def _require_whole_gpus(resources: Resources) -> Resources:
    if resources.gpus:
        raise ValueError(
            f"gpus = {resources.gpus:g} cannot be set: a worker takes one whole GPU if the run uses GPUs (scale.gpus); "
            "leave it out, or set 0 to train on CPUs"
        )
    return resources


TrainingResources = Annotated[FixedResources, AfterValidator(_require_whole_gpus)]
"""Resources of the process groups of Ray Train."""
