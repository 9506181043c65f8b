"""Model -> Recall, NDCG and MRR per item on validation and test, with the popularity baseline beside them."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import numpy.typing as npt

from jobs.command import command
from jobs.train import whole_training
from tiger import artifacts, baselines, metrics
from tiger.artifacts import Artifact, Draft
from tiger.catalog import Catalog, EvaluationUsers, Split
from tiger.diagnostics import check_recommendations, require
from tiger.run import RunConfig
from tiger.scale.decode import decode_users

log = logging.getLogger(__name__)

_K = max(metrics.CUTOFFS)
_SPLITS: tuple[Split, ...] = ("valid", "test")


def evaluate(run: RunConfig, model: Artifact) -> Artifact:
    catalog = Catalog(model.inputs["catalog"])

    def make(draft: Draft) -> None:
        histories = catalog.histories
        figures: dict[str, Any] = {}
        splits = {split: _users(run, catalog, split) for split in _SPLITS}
        lists = decode_users(  # both splits through one pool: an actor takes longer to start than to decode thousands
            model,
            histories,
            [user for users in splits.values() for user in users.users.tolist()],
            [history for users in splits.values() for history in users.histories()],
            draft,
            "lists",
            k=_K,
            beam=run.evaluation.beam,
            max_actors=run.evaluation.max_actors,
        )
        popular = baselines.popularity(histories, catalog.n_items, _K)
        for split, users in splits.items():
            items, lists = lists[: len(users)], lists[len(users) :]
            figures[split] = {
                "users": len(users),
                "tiger": _figures(items, users, catalog.n_items),
                "popularity": _figures(np.tile(popular, (len(users), 1)), users, catalog.n_items),
            }
            log.info("%s, %d users\n%s", split, len(users), _table(figures[split]))
            draft.health += require(check_recommendations(items, catalog.n_items))
        draft.folder.write_json("metrics.json", figures)
        test = figures["test"]
        draft.figures = {
            "test": {name: round(value, 5) for name, value in test["tiger"]["unmasked"].items()},
            "popularity": {name: round(value, 5) for name, value in test["popularity"]["unmasked"].items()},
        }

    return artifacts.build(run.root, "metrics", run.evaluation, {"model": model}, make)


def _users(run: RunConfig, catalog: Catalog, split: Split) -> EvaluationUsers:
    users = catalog.histories.evaluation(split)
    limit = run.evaluation.max_users
    if limit is None or limit >= len(users):
        return users
    drawn = np.random.default_rng(run.evaluation.seed).permutation(len(users))[:limit]
    return users.take(np.sort(drawn))


def _figures(items: npt.NDArray[np.int64], users: EvaluationUsers, n_items: int) -> dict[str, Any]:
    """Figures with every item allowed, and with the items of the history taken out of the lists.

    The masked lists come from the same beam, so a cutoff of 50 would miss what the beam did not hold: it is left out.
    """
    ranks = metrics.target_ranks(items, users.targets)
    masked = metrics.target_ranks(_without_history(items, users), users.targets)
    return {
        "unmasked": metrics.ranking(ranks),
        "interval_95": metrics.confidence(ranks),
        "masked": metrics.ranking(masked, cutoffs=tuple(cutoff for cutoff in metrics.CUTOFFS if cutoff <= 10)),
        **metrics.coverage(items, n_items),
    }


def _without_history(items: npt.NDArray[np.int64], users: EvaluationUsers) -> npt.NDArray[np.int64]:
    result = np.full_like(items, -1)
    for row, history in enumerate(users.histories()):
        kept = items[row][~np.isin(items[row], history)]
        result[row, : len(kept)] = kept
    return result


def _table(figures: dict[str, Any]) -> str:
    lines = [f"{'':<12}{'tiger':>9}  {'95 % interval':<18}{'popularity':>11}{'tiger, history masked':>24}"]
    for name, value in figures["tiger"]["unmasked"].items():
        low, high = figures["tiger"]["interval_95"][name]
        masked = figures["tiger"]["masked"].get(name)
        lines.append(
            f"{name:<12}{value:>9.4f}  {f'{low:.4f} to {high:.4f}':<18}{figures['popularity']['unmasked'][name]:>11.4f}"
            + (f"{masked:>24.4f}" if masked is not None else "")
        )
    return "\n".join(lines)


if __name__ == "__main__":
    command(__doc__, lambda run: evaluate(run, whole_training(run)))
