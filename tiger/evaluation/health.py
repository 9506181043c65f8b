"""Check the health of every stage of a finished run against its thresholds.

Representation collapse propagates silently downstream: a broken reader produces identical texts, identical texts give
identical embeddings, and identical embeddings get one code. So each stage checks its own thresholds, and the pipeline
stops at the first one that fails, with the likely cause.

`tiger check RUN` prints all checks and metrics of a finished run; RUN is any of its artifacts, or the folder that
contains them, of which the last evaluated run is checked.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tiger.core.artifacts import Artifact, newest, open_artifact
from tiger.core.errors import ArtifactError, HealthError, TigerError
from tiger.core.storage import MANIFEST, Folder
from tiger.data.histories import Histories, most_popular, sample_users
from tiger.metrics.codes import code_metrics, pairwise_distance
from tiger.metrics.lists import ListSums

log = logging.getLogger(__name__)

_MANY_LISTS = 4  # of users who cannot all have the same taste


@dataclass(frozen=True)
class Check:
    """Comparison of one metric with one threshold.

    Attributes:
        stage: kind of the artifact.
        name: name of the metric.
        value: value of the metric.
        threshold: minimum of the metric; its maximum if `upper` is set.
        cause: the likely cause upstream of a failed check.
        upper: whether the threshold is an upper bound.
    """

    stage: str
    name: str
    value: float
    threshold: float
    cause: str
    upper: bool = False

    @property
    def healthy(self) -> bool:
        """Whether the check passes."""
        return self.value <= self.threshold if self.upper else self.value >= self.threshold

    def record(self) -> dict[str, Any]:
        """Return the check as a record for the manifest."""
        return asdict(self) | {"healthy": self.healthy}


def require(checks: Sequence[Check]) -> list[dict[str, Any]]:
    """Return the checks as records for the manifest, if all of them pass.

    Raises:
        HealthError: one fails; names the stage, the metric, the threshold and the likely cause.
    """
    for check in checks:
        if not check.healthy:
            bound = "at most" if check.upper else "at least"
            raise HealthError(
                f"{check.stage} is unhealthy: {check.name} is {check.value:.4g}, {bound} {check.threshold:.4g} is "
                f"required; likely cause: {check.cause}"
            )
    return [check.record() for check in checks]


# --- checks by stage ----------------------------------------------------------------------------------------------


_NO_VALIDATION = (
    "no history is long enough to be split; with catalog.split = temporal, both split times are equal because times "
    "are too coarse: use finer times, other catalog.valid_fraction and catalog.test_fraction, or leave-one-out"
)


def check_catalog(profile: dict[str, Any]) -> list[Check]:
    """Check that texts and titles differ, few texts are empty, and there are examples for all splits."""
    items, columns = profile["items"], profile["columns"]
    parsing = "the reader found none of the expected fields: check the fields of the raw files and text_fields"
    checks = [
        Check("catalog", "share of distinct texts", columns["text"]["distinct"] / items, 0.5, parsing),
        Check("catalog", "share of empty texts", columns["text"]["missing"] / items, 0.05, parsing, upper=True),
        Check("catalog", "median text length", profile["text_characters"]["50%"], 3, parsing),
        Check("catalog", "training examples", profile["training_examples"], 1, "every history has only two items"),
        Check("catalog", "validation users", profile.get("validation_users", 1), 1, _NO_VALIDATION),
        Check("catalog", "test users", profile["test_users"], 1, "no history is long enough to be split"),
    ]
    if "title" in profile["text_fields"]:
        share = columns["title"]["distinct"] / items
        checks.insert(0, Check("catalog", "share of distinct titles", share, 0.2, parsing))
    return checks


def check_embeddings(vectors: npt.NDArray[np.float32]) -> list[Check]:
    """Check that embeddings are not collapsed; if their root mean square norm is below 1, they are scaled to 1."""
    cause = "the texts are alike (see the catalog's checks), or the model is not a sentence encoder"
    length = float(np.sqrt(np.square(vectors, dtype=np.float64).sum(axis=1).mean()))
    if 0 < length < 1:
        vectors = (vectors / length).astype(np.float32)
    spread = float(vectors.std(axis=0, dtype=np.float64).mean())
    distinct = len(np.unique(vectors.round(6), axis=0)) / len(vectors)
    return [
        Check("embeddings", "mean pairwise distance", pairwise_distance(vectors), 0.01, cause),
        Check("embeddings", "mean standard deviation", spread, 0.001, cause),
        Check("embeddings", "share of distinct vectors", distinct, 0.5, cause),
    ]


def check_tokenizer(latents: npt.NDArray[np.float32], codes: npt.NDArray[Any], codebook_size: int) -> list[Check]:
    """Check that latents are not collapsed, codebooks are used, and codes distinguish items."""
    figures = code_metrics(codes, codebook_size)
    encoder = "the encoder maps all items to one point: try a lower learning rate, a shallower encoder, or less dropout"
    quantizer = "the codebook collapsed: check the embeddings' checks, then lower the learning rate"
    checks = [
        Check("tokenizer", "distance of encoded vectors", pairwise_distance(latents), 0.1, encoder),
        Check("tokenizer", "share of distinct code tuples", figures["unique_ratio"], 0.25, quantizer),
    ]
    for level in range(1, codes.shape[1] + 1):
        checks.append(Check("tokenizer", f"usage of level {level}", figures[f"usage@{level}"], 0.25, quantizer))
        perplexity = figures[f"perplexity@{level}"] / codebook_size
        checks.append(Check("tokenizer", f"perplexity of level {level} / codes", perplexity, 0.05, quantizer))
    return checks


def check_semantic_ids(collisions: npt.NDArray[Any]) -> list[Check]:
    """Check that at most half of the items need a collision code."""
    share = float((collisions > 0).mean())
    cause = "too few codes for the catalog: more tokenizer.num_levels or a larger tokenizer.codebook_size"
    return [Check("semantic_ids", "share of items moved by the collision level", share, 0.5, cause, upper=True)]


def popularity_recall(
    histories: Histories, validation_users: int | None, seed: int, cutoff: int = 10
) -> tuple[float, int]:
    """Return Recall of the most popular items on the validation users of the model, and the number of these users.

    Args:
        histories: all users' histories.
        validation_users: `model.training.validation_users`, the maximum number of users.
        seed: `model.seed`, which determines the sample of users.
        cutoff: number of most popular items in training.
    """
    users = sample_users(histories.evaluation("valid"), validation_users, seed)
    popular = most_popular(histories.training_counts(0), cutoff)
    return float(np.isin(users.targets, popular).mean()), len(users)


def check_model(
    best_recall: float, uniform_recall: float, popularity: float | None = None, users: int | None = None
) -> list[Check]:
    """Check that the trained model is better than chance and not worse than popularity on validation.

    In a small catalog chance level is high, and with few users Recall is noisy: with 100 items or fewer the model must
    only reach half of chance level, and it may be below popularity's Recall by twice its standard error.

    Args:
        best_recall: Recall@10 of the model.
        uniform_recall: Recall@10 of random lists: 10 divided by the number of items.
        popularity: Recall@10 of the most popular items on the same users.
        users: number of these users.
    """
    cause = "training diverged or stopped too early: check the loss curve, lower model.training.learning_rate"
    needed = 1.5 if uniform_recall < 0.1 else 0.5
    checks = [Check("model", "validation Recall@10 / that of guessing", best_recall / uniform_recall, needed, cause)]
    if popularity is not None:
        error = np.sqrt(popularity * (1 - popularity) / users) if users else 0.0
        minimum = max(0.0, popularity - 2 * float(error))
        name = "validation Recall@10 (popularity's, minus twice its error)"
        checks.append(Check("model", name, best_recall, minimum, cause))
    return checks


def check_recommendations(
    sums: ListSums, personalized: bool = True, filtered: bool = False, split: str | None = None
) -> list[Check]:
    """Check that all recommendations are valid items without repetitions, and that users get different lists.

    Args:
        sums: sums over the lists.
        personalized: whether lists depend on histories; see `ModelConfig.personalized`. A few users may get one list.
        filtered: whether only some items are allowed, of which there may be fewer than positions.
        split: split of the histories whose lists these are; the names of the checks end with it.
    """
    suffix = "" if split is None else f" ({split})"
    cutoff, num_items = sums.cutoff, sums.num_items
    filled = sums.filled / (min(cutoff, num_items) * sums.lists)
    wrong, repeated = "trie and model belong to different IDs", "two items share a semantic ID"
    checks = [
        Check("recommendations", f"invalid items{suffix}", sums.invalid_top, 0, wrong, upper=True),
        Check("recommendations", f"repeated items{suffix}", sums.repeated, 0, repeated, upper=True),
    ]
    if not filtered:
        checks.append(Check("recommendations", f"filled positions{suffix}", filled, 0.99, "the beam is too narrow"))
    if personalized and not filtered and sums.lists >= _MANY_LISTS:
        needed = min(cutoff + 1, num_items)
        checks.append(
            Check("recommendations", f"distinct items{suffix}", sums.distinct, needed, "all users get one list")
        )
    return checks


# --- report -----------------------------------------------------------------------------------------------------


def table(artifact: Artifact) -> str:
    """Format all checks and metrics of an artifact and its ancestors, in the order of the stages."""
    lines = [f"{'stage':<16} {'check':<46} {'value':>12} {'threshold':>14}  status"]
    figures = []
    for part in artifact.lineage():
        for check in part.health:
            bound = ("<= " if check["upper"] else ">= ") + f"{check['threshold']:.4g}"
            status = "healthy" if check["healthy"] else f"UNHEALTHY: {check['cause']}"
            lines.append(f"{check['stage']:<16} {check['name']:<46} {check['value']:>12.4g} {bound:>14}  {status}")
        figures += [f"{part.kind:<16} {name:<46} {value:>12}" for name, value in _flat(part.metrics)]
    return "\n".join([*lines, "", f"{'stage':<16} {'metric':<46} {'value':>12}", *figures])


def _newest_run(root: str) -> Artifact:
    """Return the metrics of the last evaluated run; if there are none, the last artifact of any kind."""
    try:
        return newest(root, "evaluation")
    except ArtifactError:
        return newest(root)


def _flat(figures: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name} ")
        elif isinstance(value, (int, float)):
            yield prefix + name, f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def main(arguments: list[str]) -> int:
    """Print all checks and metrics; return the exit code, 6 if a check fails."""
    if len(arguments) != 1 or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    try:
        folder = Folder(arguments[0])
        artifact = open_artifact(arguments[0]) if folder.exists(MANIFEST) else _newest_run(arguments[0])
        print(table(artifact))
        return 0 if all(check["healthy"] for part in artifact.lineage() for check in part.health) else 6
    except TigerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
