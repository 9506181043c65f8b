"""A finished run, as the sections of the report read it: the artifacts of one evaluation, opened when they are used."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tiger.core.artifacts import Artifact, newest, open_artifact
from tiger.core.errors import ArtifactError
from tiger.core.storage import MANIFEST, Folder
from tiger.data.catalog import Catalog
from tiger.evaluation.evaluator import EvaluationResult, MethodResult
from tiger.report.semantic_ids import CodedItems, of_artifact

EVALUATION_FILE = "evaluation.json"
_SMALL_CATALOG = 200_000  # items whose vectors are read at once


@dataclass(frozen=True)
class FinishedRun:
    """The artifacts of an evaluated model.

    Attributes:
        evaluation: the evaluation.
        recommendations: recommendations of the same model; None if there are none.
        dollars_per_hour: price of the machines; None if it is not known.
    """

    evaluation: Artifact
    recommendations: Artifact | None = None
    dollars_per_hour: float | None = None

    @property
    def name(self) -> str:
        """Folder name of the evaluation, by which the run is called."""
        return self.evaluation.home.uri.rpartition("/")[2]

    @cached_property
    def stages(self) -> list[Artifact]:
        """All artifacts in the order in which they were made."""
        own = [self.recommendations] if self.recommendations else []
        return [*self.evaluation.lineage(), *own]

    def artifact(self, kind: str) -> Artifact | None:
        """Return the artifact of a stage; None if the run has none."""
        return next((artifact for artifact in self.stages if artifact.kind == kind), None)

    @property
    def model(self) -> Artifact:
        """The evaluated model."""
        return self.evaluation.inputs["model"]

    @cached_property
    def result(self) -> EvaluationResult:
        """All metrics."""
        return EvaluationResult.model_validate(self.evaluation.folder.read_json(EVALUATION_FILE))

    @property
    def methods(self) -> dict[str, MethodResult]:
        """Results on test; the first one is that of the model."""
        return self.result.splits["test"].methods

    @cached_property
    def catalog(self) -> Catalog:
        """Items and histories."""
        return Catalog(self.model.inputs["catalog"])

    @cached_property
    def profile(self) -> dict[str, Any]:
        """Counts and quantiles of the catalog."""
        profile: dict[str, Any] = self.catalog.artifact.folder.read_json("profile.json")
        return profile

    @cached_property
    def items(self) -> CodedItems | None:
        """Items with codes, titles and vectors; None for a model without semantic IDs, and for a very large catalog."""
        ids = self.artifact("semantic_ids")
        return of_artifact(ids) if ids and ids.metrics["items"] <= _SMALL_CATALOG else None

    def training_log(self, kind: str) -> list[dict[str, Any]]:
        """Return the records of a training, `tokenizer` or `model`, oldest first; none if nothing was trained."""
        artifact = self.artifact(kind)
        if artifact is None or "metrics.jsonl" not in artifact.manifest["files"]:
            return []
        return [json.loads(line) for line in artifact.folder.read_bytes("metrics.jsonl").splitlines()]


def open_run(where: str, dollars_per_hour: float | None = None) -> FinishedRun:
    """Open a run.

    Args:
        where: the folder of all artifacts (its last evaluation is taken), or an evaluation or report in it.
        dollars_per_hour: price of the machines, to report costs.

    Raises:
        ArtifactError: there is no finished evaluation.
    """
    if not Folder(where).exists(MANIFEST):
        evaluation = newest(where, "evaluation")
    else:
        given = open_artifact(where)
        evaluation = given if given.kind == "evaluation" else given.inputs.get("evaluation", given)
    if evaluation.kind != "evaluation":
        raise ArtifactError(
            f"{where} is a {evaluation.kind} artifact; a report is made of a run's folder or of its evaluation-..."
        )
    return FinishedRun(evaluation, _recommendations(evaluation), dollars_per_hour)


def _recommendations(evaluation: Artifact) -> Artifact | None:
    """Return the last recommendations of the evaluated model, if there are any."""
    root = evaluation.home.parent
    found = [info for info in root.entries(recursive=False) if info.base_name.startswith("recommendations-")]
    for info in sorted(found, key=lambda info: -(info.mtime_ns or 0)):
        folder = root.child(info.base_name)
        if folder.exists(MANIFEST):
            artifact = open_artifact(folder)
            if artifact.manifest["inputs"].get("model") == evaluation.manifest["inputs"]["model"]:
                return artifact
    return None
