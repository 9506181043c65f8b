"""Evaluate a model: Recall, NDCG and MRR on validation and test, next to baselines on the same users."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import nn

from tiger.core import tracking
from tiger.core.artifacts import Artifact, Draft, open_artifact, stage
from tiger.core.config import Config
from tiger.core.errors import ConfigError
from tiger.data.histories import EvalSplit, Histories, Split, sample_users
from tiger.evaluation import evaluator
from tiger.evaluation.evaluator import LIST_LENGTH, EvaluationConfig, EvaluationResult, RankedLists, SplitResult
from tiger.evaluation.health import check_recommendations, invalid, require
from tiger.metrics.ranking import user_metrics
from tiger.models.base import ModelConfig, StoredData, load_family, text_embeddings
from tiger.models.decoding import DecodingConfig
from tiger.models.recommender import Recommender
from tiger.on_ray.recommend import recommend_users
from tiger.pipeline.train import ensure_model
from tiger.run import RunConfig

log = logging.getLogger(__name__)

RESULT = "evaluation.json"

_SPLITS: tuple[Split, ...] = ("valid", "test")
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
    return write_evaluation.build(run.root, config, {"model": model}, run, model, others, source=source)


@stage("evaluation", verb="evaluate")
def write_evaluation(draft: Draft, run: RunConfig, model: Artifact, others: list[Artifact]) -> None:
    """Decode the users of both splits with every model, and compare the lists with those of the baselines."""
    config, options = run.evaluation, run.decoding.ranked(LIST_LENGTH)
    data = StoredData(model.inputs)
    counts = data.histories.training_counts(data.num_items)
    users = {split: sample_users(data.histories.evaluation(split), config.max_users, config.seed) for split in _SPLITS}
    lists = {
        name: _decode(run, artifact, data.histories, users, draft, name, options)
        for name, artifact in _named(model, others)
    }
    for name, recommender in _baselines(config, model):
        if name not in lists:  # the evaluated model may be of that family
            lists[name] = _rank(run, recommender, users, data)
    personalized = ModelConfig.resolve(model.manifest["config"]).personalized
    splits: dict[str, SplitResult] = {}
    for split in _SPLITS:
        found = {name: by_split[split] for name, by_split in lists.items()}
        splits[split] = evaluator.evaluate(found, users[split], counts, config)
        first = next(iter(found.values())).all_items
        log.info("%s", splits[split].table(split))
        invalid_items = {"invalid_beams": invalid(first, data.num_items)}
        tracking.record(split, 0, next(iter(splits[split].methods.values())).metrics | invalid_items)
        draft.health += require(check_recommendations(first, data.num_items, personalized=personalized))
    exact = _compare_with_exact(run, model, users["test"], data)
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


def _decode(
    run: RunConfig,
    model: Artifact,
    histories: Histories,
    users: dict[Split, EvalSplit],
    draft: Draft,
    name: str,
    options: DecodingConfig,
) -> dict[Split, RankedLists]:
    """Return a model's lists by split; both splits go through one pool, because an actor takes long to start."""
    everything, unseen = recommend_users(
        model,
        histories,
        [user for split in users.values() for user in split.users.tolist()],
        [history for split in users.values() for history in split.histories()],
        draft,
        f"lists/{name}",
        options=options,
        with_and_without_seen=True,
        scale=run.scale,
    )
    assert unseen is not None
    lists, begin = {}, 0
    for split, chosen in users.items():
        rows = slice(begin, begin := begin + len(chosen))
        lists[split] = RankedLists(everything, unseen).rows(rows)
    return lists


def _baselines(config: EvaluationConfig, model: Artifact) -> Iterable[tuple[str, Recommender]]:
    """Yield the recommenders of `evaluation.baselines`, by name."""
    for kind in config.baselines:
        family = ModelConfig.of_kind(kind, "evaluation.baselines")(kind=kind)
        assert isinstance(family, ModelConfig)
        module = load_family(family)
        if hasattr(module, "train"):
            raise ConfigError(
                f"evaluation.baselines: {kind} needs training; train it (tiger train model.kind={kind}) and name its "
                "folder in evaluation.compare_with"
            )
        inputs = dict(model.inputs)
        if "embeddings" in family.inputs and "embeddings" not in inputs:
            if "semantic_ids" not in inputs:
                log.info("evaluation: %s left out: the model has no text embeddings", kind)
                continue
            inputs["embeddings"] = text_embeddings(inputs["semantic_ids"])
        recommender = module.recommender(nn.Module(), family, StoredData(inputs), torch.device("cpu"))
        yield kind.rpartition(".")[2], recommender


def _rank(
    run: RunConfig, recommender: Recommender, users: dict[Split, EvalSplit], data: StoredData
) -> dict[Split, RankedLists]:
    names = data.histories.source_ids
    return {split: evaluator.rank(recommender, chosen, names, run.decoding) for split, chosen in users.items()}


def _compare_with_exact(run: RunConfig, model: Artifact, users: EvalSplit, data: StoredData) -> dict[str, float]:
    """Compare beam search with scoring every item, for a sample of the test users of a generative model."""
    asked = sample_users(users, run.evaluation.num_exact_users, run.evaluation.seed)
    is_feasible = len(asked) and data.num_items <= _EXACT_ITEMS
    recommender = Recommender.load(model) if is_feasible else None
    if recommender is None or recommender.groups is None:
        log.info("beam search is not compared with scoring all %s items", f"{data.num_items:,}")
        return {}
    results = evaluator.compare_with_exact(recommender, asked, data.histories.source_ids, run.decoding)
    shown = ", ".join(f"{name} {value:.4f}" for name, value in results.items() if name != "users")
    log.info("beam search, %d test users: recall@10 %s", len(asked), shown)
    return results


on_model = evaluate
SECTIONS_ON_MODEL = ("evaluation", "decoding", "scale", "tracking")


def job(run: RunConfig) -> Artifact:
    """Evaluate the model of a configuration; train it first if needed."""
    return evaluate(run, ensure_model(run))
