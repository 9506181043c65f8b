"""Recommend items to users, given the whole history: items with ids, titles and scores, as Parquet.

The users are those of the model's catalog, or of interaction files of your own (`recommend.histories`).
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tiger.core.artifacts import SCRATCH, Artifact, Draft, Folder, stage
from tiger.core.config import Config, fingerprint, load_plugin
from tiger.core.errors import DataError
from tiger.data.catalog import CatalogConfig
from tiger.data.grown_catalog import items_folder, open_append, open_catalog
from tiger.data.history_blocks import read_blocks
from tiger.data.history_files import HistoryFiles
from tiger.data.item_names import ItemNames, shortened
from tiger.data.readers.reading import read_rows
from tiger.data.sources.base import DatasetConfig, Files, RawFile, RowCounts, expand, log_files
from tiger.data.user_tables import USERS, catalog_users, shard_files, write_users
from tiger.evaluation.health import check_recommendations, require
from tiger.metrics.lists import ListSums
from tiger.models.base import ModelConfig
from tiger.models.decoding import DecodingConfig
from tiger.models.shard import SUMS, TABLE
from tiger.on_ray.recommend import recommend_users
from tiger.pipeline.train import ensure_model
from tiger.run import RecommendConfig, RunConfig

log = logging.getLogger(__name__)

_SHOWN = 5  # users, and items of their lists
_USERS, _COUNTS = "users.parquet", "users.json"


class RecommendStageConfig(Config):
    """The options that determine recommendations."""

    recommend: RecommendConfig
    decoding: DecodingConfig


class HistoriesStageConfig(RecommendStageConfig):
    """The options that determine recommendations to users of files."""

    data: DatasetConfig


def recommend(run: RunConfig, model: Artifact) -> Artifact:
    """Return the recommendations artifact of a model."""
    allowed = _names(run.recommend.allowed_items_file)
    inputs = {"model": model} | open_append(run.recommend.semantic_ids, model, "recommend.semantic_ids")
    source = {"allowed": fingerprint(sorted(allowed))} if allowed is not None else {}
    config = RecommendStageConfig(recommend=run.recommend, decoding=run.decoding)
    files: list[RawFile] = []
    if run.recommend.histories:
        files = expand(run.recommend.histories, "recommend.histories")
        source |= {f"histories/{position}": file.digest() for position, file in enumerate(files)}
        config = HistoriesStageConfig(recommend=run.recommend, decoding=run.decoding, data=run.data)
    return write_recommendations.build(run.root, config, inputs, run, inputs, allowed, files, source=source or None)


@stage("recommendations", verb="recommend")
def write_recommendations(
    draft: Draft, run: RunConfig, inputs: dict[str, Artifact], allowed: set[str] | None, files: list[RawFile]
) -> None:
    """Recommend to the first users of the catalog, or to those of files, with `allowed` source ids only.

    The lists are written by the actors that make them; what comes here is how often they show each item.
    """
    model, ids, options = inputs["model"], inputs.get("semantic_ids"), run.decoding
    catalog = model.inputs["catalog"]
    names, scratch = ItemNames(items_folder(catalog, ids)), draft.folder.child(SCRATCH)
    if not scratch.exists(_COUNTS):  # an earlier attempt may have been killed
        scratch.write_json(_COUNTS, _write_users(scratch, run, catalog, names, files))
    counts = scratch.read_json(_COUNTS)
    recommend_users(
        scratch, _USERS, draft.folder, model, options, run.scale,
        fields=list(run.recommend.fields), json_lines=run.recommend.json_lines, allowed_items=_filter(allowed, names),
        semantic_ids=ids,
    )  # fmt: skip
    sums = ListSums(open_catalog(catalog, ids).n_items, options.k)
    for file in shard_files(draft.folder.child(TABLE)):
        sums.add(draft.folder.read_table(f"{SUMS}/{file}"))
    draft.metrics = counts | {"k": options.k, "items_shown": sums.distinct}
    personalized = ModelConfig.resolve(model.manifest["config"]).personalized
    draft.health = require(check_recommendations(sums, personalized, filtered=allowed is not None))


def _write_users(
    scratch: Folder, run: RunConfig, catalog: Artifact, names: ItemNames, files: list[RawFile]
) -> dict[str, object]:
    """Write the table of users, and return what is reported of them."""
    if not files:
        users = min(catalog.metrics["users"], run.recommend.users or catalog.metrics["users"])
        write_users(scratch, _USERS, catalog_users(catalog.folder, users), users, USERS)
        return {"users": users}
    log_files(Files([], files))
    source, ledger = load_plugin(DatasetConfig.plugin_package, run.data.kind), RowCounts("histories")
    sizes = [(file, file.size()) for file in files]
    rules = CatalogConfig.model_validate(catalog.manifest["config"]["catalog"])
    spills = scratch.child("events")
    histories = HistoryFiles(names, rules, spills, sum(size for _, size in sizes))
    interactions = source.read_interactions(run.data, Files([], files), ledger)
    histories.read(read_rows(interactions, sizes, ledger, run.data.max_bad_row_fraction))
    write_users(scratch, _USERS, histories.users(), 0, USERS)
    spills.delete()
    counts = histories.counts
    log.info(
        "recommend: %s users, %s of whom have no item of the catalog; of %s interactions %s are with unknown items%s, "
        "%s are repeated",
        f"{counts.users:,}", f"{counts.users_without_items:,}", f"{counts.events:,}", f"{counts.unknown:,}",
        f" such as {', '.join(counts.unknown_examples)}" if counts.unknown else "", f"{counts.repeated:,}",
    )  # fmt: skip
    return counts.record() | {"rows": ledger.record()}


def _names(file: str | None) -> set[str] | None:
    """Read a file of item ids, one per line.

    Raises:
        DataError: the file cannot be read, or is not UTF-8.
    """
    if file is None:
        return None
    try:
        return {line.strip() for line in Path(file).read_text("utf-8").splitlines()} - {""}
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"recommend.allowed_items_file = {file} cannot be read ({error}); it must contain one source id per "
            "line, in UTF-8"
        ) from None


def _filter(allowed: set[str] | None, names: ItemNames) -> npt.NDArray[np.bool_] | None:
    """Return which items have allowed source ids, bool [items], and log the number of unknown ids.

    Raises:
        DataError: none of the ids is in the catalog.
    """
    if allowed is None:
        return None
    found = names.indices(pa.array(sorted(allowed), pa.string())).drop_null()
    if not len(found):
        raise DataError(
            f"recommend.allowed_items_file: none of its {len(allowed)} ids is in the catalog; "
            "it must contain one source id per line"
        )
    log.info("recommend: %d items allowed, %d ids are not in the catalog", len(found), len(allowed) - len(found))
    mask = np.zeros(len(names.ids), bool)
    mask[np.asarray(found)] = True
    return mask


def print_examples(recommendations: Artifact) -> None:
    """Log the first users' recommendations with titles, and their histories if they are users of the catalog."""
    catalog = recommendations.inputs["model"].inputs["catalog"]
    names = ItemNames(items_folder(catalog, recommendations.inputs.get("semantic_ids")))
    found = recommendations.folder.read_table(f"{TABLE}/{shard_files(recommendations.folder.child(TABLE))[0]}")
    shown = found.slice(0, _SHOWN)
    histories: list[npt.NDArray[np.int32]] = [np.zeros(0, np.int32)] * len(shown)
    if "events" not in recommendations.metrics:
        block = next(read_blocks(catalog.folder, block_users=_SHOWN)).histories
        histories = [block.of(user)[-5:] for user in range(len(shown))]
    items = np.array(shown["items"].to_pylist())
    scores = shown["scores"].to_pylist() if "scores" in shown.column_names else [[None] * items.shape[1]] * len(shown)
    for row, user in enumerate(shown["user"].to_pylist()):
        lines = [f"  history {name:<12} {shortened(title, 90)}" for name, title in _named(names, histories[row])]
        for rank, (name, title) in enumerate(_named(names, items[row][items[row] >= 0][:_SHOWN])):
            score = "" if scores[row][rank] is None else f"{scores[row][rank]:>7.2f} "
            lines.append(f"  {rank + 1:>2}. {score}{name:<12} {shortened(title, 90)}")
        log.info("user %s\n%s", user, "\n".join(lines))


def _named(names: ItemNames, items: npt.NDArray[np.integer]) -> list[tuple[str, str]]:
    """Return ids and titles of items."""
    wanted = pa.array(items, pa.int32())
    return list(zip(names.ids.take(wanted).to_pylist(), names.titles.take(wanted).to_pylist(), strict=True))


def on_model(run: RunConfig, model: Artifact) -> Artifact:
    """Recommend items to users with a trained model and log the first lists."""
    artifact = recommend(run, model)
    print_examples(artifact)
    return artifact


SECTIONS_ON_MODEL = ("recommend", "data", "decoding", "scale", "tracking")


def job(run: RunConfig) -> Artifact:
    """Recommend items to users and log the first lists; train the model first if needed."""
    return on_model(run, ensure_model(run))
