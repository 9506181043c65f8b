"""Evaluate a model: Recall, NDCG and MRR on validation and test, next to baselines on the same users."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import numpy as np

from tiger.core import tracking
from tiger.core.artifacts import SCRATCH, Artifact, Draft, Folder, open_artifact, stage
from tiger.core.config import Config
from tiger.core.errors import ConfigError
from tiger.data.grown_catalog import open_append, open_catalog
from tiger.data.history_blocks import read_blocks, slices, training_counts
from tiger.data.user_tables import TARGETS, evaluation_users, take_test_users, write_users
from tiger.evaluation import evaluator
from tiger.evaluation.evaluator import LIST_LENGTH, EvaluationConfig, EvaluationResult, SplitResult
from tiger.evaluation.health import check_recommendations, require
from tiger.evaluation.shard import read_ranks
from tiger.metrics.ranking import user_metrics
from tiger.models.base import ModelConfig, load_family
from tiger.models.decoding import DecodingConfig
from tiger.models.recommender import Recommender
from tiger.on_ray.recommend import evaluate_users
from tiger.pipeline.train import ensure_model
from tiger.run import RunConfig

log = logging.getLogger(__name__)

RESULT = "evaluation.json"

_USERS = "users.parquet"
_EXACT_ITEMS = 100_000  # scoring every item of a larger catalog takes more than seconds a user


class EvaluationStageConfig(Config):
    """The options that determine an evaluation."""

    evaluation: EvaluationConfig
    decoding: DecodingConfig


def evaluate(run: RunConfig, model: Artifact) -> Artifact:
    """Return the evaluation artifact of a model: evaluation.json, and the ranked lists."""
    user_metrics(run.evaluation.metrics)  # rejects unknown names before anything is decoded
    others = [
        _comparable(open_artifact(folder, expected_kind="model"), model) for folder in run.evaluation.compare_with
    ]
    source = {f"compare_with/{position}": other.fingerprint for position, other in enumerate(others)}
    config = EvaluationStageConfig(evaluation=run.evaluation, decoding=run.decoding.ranked(LIST_LENGTH))
    baselines = _baselines(run.evaluation, model)
    inputs = {"model": model} | open_append(run.evaluation.semantic_ids, model, "evaluation.semantic_ids")
    return write_evaluation.build(run.root, config, inputs, run, inputs, others, baselines, source=source)


@stage("evaluation", verb="evaluate")
def write_evaluation(
    draft: Draft, run: RunConfig, inputs: dict[str, Artifact], others: list[Artifact], baselines: dict[str, ModelConfig]
) -> None:
    """Rank the targets of both splits with every model and baseline, in actors, and compare them.

    Of each user only the ranks come here, 12 bytes and 2 per method; of lists only how often they show each item.
    """
    config, model, ids = run.evaluation, inputs["model"], inputs.get("semantic_ids")
    catalog = model.inputs["catalog"]
    num_items = open_catalog(catalog, ids).n_items
    scratch = draft.folder.child(SCRATCH)
    if not scratch.exists(_USERS):
        sizes, users = evaluation_users(catalog.folder, config.max_users, config.seed)
        write_users(scratch, _USERS, users, sum(sizes.values()), TARGETS)
    models = dict(_named(model, others))
    baselines = {name: family for name, family in baselines.items() if name not in models}
    evaluate_users(scratch, _USERS, draft.folder, models, baselines, run.decoding, run.scale, ids)
    counts = training_counts((block.histories for block in read_blocks(catalog.folder)), num_items)
    personalized = ModelConfig.resolve(model.manifest["config"]).personalized
    splits: dict[str, SplitResult] = {}
    found = read_ranks(draft.folder, [*models, *baselines], counts)
    for split, (methods, users_of_split) in found.items():
        splits[split] = evaluator.evaluate(methods, users_of_split, counts, config)
        first = next(iter(methods.values())).sums
        log.info("%s", splits[split].table(split))
        tracking.record(split, 0, next(iter(splits[split].methods.values())).metrics | {"invalid_beams": first.invalid})
        draft.health += require(check_recommendations(first, personalized, split=split))
    exact = _compare_with_exact(run, model, ids, scratch, len(found["test"][1]))
    result = EvaluationResult(splits=splits, exact_search=exact)
    draft.folder.write_json(RESULT, result.model_dump(mode="json"))
    draft.metrics = {
        name: {metric: round(value, 5) for metric, value in method.metrics.items()}
        for name, method in splits["test"].methods.items()
    }


def _comparable(other: Artifact, model: Artifact) -> Artifact:
    """Return a further model, if it belongs to the same catalog."""
    if other.inputs["catalog"].fingerprint != model.inputs["catalog"].fingerprint:
        raise ConfigError(
            f"evaluation.compare_with: {other.folder.uri} belongs to another catalog than {model.folder.uri}; "
            "train it with the same data and catalog sections"
        )
    return other


def _named(model: Artifact, others: list[Artifact]) -> Iterable[tuple[str, Artifact]]:
    """Yield the models with names for tables: their families, numbered where two are equal."""
    seen: dict[str, int] = {}
    for artifact in [model, *others]:
        kind = str(artifact.manifest["config"]["kind"]).rpartition(".")[2]
        seen[kind] = seen.get(kind, 0) + 1
        yield (kind if seen[kind] == 1 else f"{kind}_{seen[kind]}"), artifact


def _baselines(config: EvaluationConfig, model: Artifact) -> dict[str, ModelConfig]:
    """Return the families of `evaluation.baselines`, by name.

    Raises:
        ConfigError: there is no such family, or it needs training.
    """
    found: dict[str, ModelConfig] = {}
    for kind in config.baselines:
        family = ModelConfig.of_kind(kind, "evaluation.baselines")(kind=kind)
        assert isinstance(family, ModelConfig)
        if hasattr(load_family(family), "train"):
            raise ConfigError(
                f"evaluation.baselines: {kind} needs training; train it (tiger train model.kind={kind}) and name its "
                "folder in evaluation.compare_with"
            )
        if "embeddings" in family.inputs and not {"embeddings", "semantic_ids"} & model.inputs.keys():
            log.info("evaluation: %s left out: the model has no text embeddings", kind)
            continue
        found[kind.rpartition(".")[2]] = family
    return found


def _compare_with_exact(
    run: RunConfig, model: Artifact, ids: Artifact | None, users: Folder, num_test_users: int
) -> dict[str, float]:
    """Compare beam search with scoring every item, for a sample of the test users of a generative model."""
    num_items = open_catalog(model.inputs["catalog"], ids).n_items
    count = min(run.evaluation.num_exact_users, num_test_users)
    recommender = Recommender.load(model, semantic_ids=ids) if count and num_items <= _EXACT_ITEMS else None
    if recommender is None or recommender.groups is None:
        log.info("beam search is not compared with scoring all %s items", f"{num_items:,}")
        return {}
    log.info("evaluate: beam search and scoring all %s items, for %d test users", f"{num_items:,}", count)
    asked = take_test_users(users, _USERS, num_test_users, count, run.evaluation.seed)
    results = evaluator.compare_with_exact(
        recommender, slices(asked["history"]), np.asarray(asked["target"]), asked["source_id"].to_pylist(), run.decoding
    )
    shown = ", ".join(f"{name} {value:.4f}" for name, value in results.items() if name != "users")
    log.info("beam search, %d test users: recall@10 %s", len(asked), shown)
    return results


on_model = evaluate
SECTIONS_ON_MODEL = ("evaluation", "decoding", "scale", "tracking")


def job(run: RunConfig) -> Artifact:
    """Evaluate the model of a configuration; train it first if needed."""
    return evaluate(run, ensure_model(run))
