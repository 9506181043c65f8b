"""Run the pipeline on a generated shop of 300 items, and compare what two runs leave."""

from __future__ import annotations

from pathlib import Path

import tiger
from tests.paths import ROOT
from tiger.core.artifacts import Artifact
from tiger.core.config import load
from tiger.run import RunConfig

TINY = [
    "data.items=300",
    "data.users=600",
    "data.noise=0.0",
    "embedding.max_tokens=24",
    "embedding.resources.max_workers=1",
    "tokenizer.codebook_size=16",
    "tokenizer.training.epochs=20",
    "model.d_model=32",
    "model.training.epochs=12",
    "model.training.batch_size=64",
    "model.training.learning_rate=3e-3",
    "model.training.warmup_steps=50",
    "model.training.validate_every_epochs=4",
    "model.training.validation_users=100",
    "decoding.resources.max_workers=1",
    "recommend.users=20",
    'recommend.fields=["ids", "titles", "scores"]',
    "recommend.json_lines=true",
]


def run_pipeline(root: Path, *overrides: str) -> Artifact:
    return tiger.run_pipeline(load(RunConfig, None, [*TINY, f"root={root}", *overrides], ROOT / "tiger/configs"))


def digests(artifact: Artifact) -> dict[str, dict[str, str]]:
    """sha256 of every file of every artifact, the logs of trainings left out: they hold no times, but say so."""
    return {
        part.kind: {name: file["sha256"] for name, file in part.manifest["files"].items()}
        for part in artifact.lineage()
    }
