"""Histories -> SASRec, the baseline that a user would pick instead, trained and evaluated like the generative model."""

from __future__ import annotations

import logging

from jobs.command import command
from jobs.evaluate import SPLITS, K, evaluation_users, figures_of, without_history
from jobs.prepare import prepare
from tiger import artifacts, baselines
from tiger.artifacts import Artifact, Draft
from tiger.catalog import Catalog
from tiger.config import fingerprint
from tiger.learning import sasrec_worker
from tiger.recommender import load_weights
from tiger.run import RunConfig
from tiger.sasrec import SASRec
from tiger.scale.train import train

log = logging.getLogger(__name__)


def sasrec(run: RunConfig, catalog: Artifact) -> Artifact:
    def make(draft: Draft) -> None:
        arguments = {
            "config": run.sasrec.model_dump(mode="json"),
            "catalog": catalog.folder.uri,
            "target": draft.folder.uri,
        }
        draft.figures = train(
            sasrec_worker, arguments, draft.folder, run.scale, "sasrec", batch_size=run.sasrec.training.batch_size
        )
        read = Catalog(catalog)
        model = SASRec(run.sasrec, read.n_items).eval()
        load_weights(model, draft.folder)
        counts, figures = baselines.training_counts(read.histories, read.n_items), {}
        for split in SPLITS:
            users = evaluation_users(run, read, split)
            taken = users.histories()
            lists = model.best(taken, min(read.n_items, K + max(map(len, taken), default=0)))
            masked = without_history(lists, users)
            figures[split] = figures_of(lists[:, :K], masked[:, :K], users, counts)
            unmasked, interval = figures[split]["unmasked"], figures[split]["interval_95"]
            lines = [
                f"{name:<12}{value:>9.4f}  ({interval[name][0]:.4f} to {interval[name][1]:.4f})"
                f"{figures[split]['masked'][name]:>9.4f} masked"
                for name, value in unmasked.items()
            ]
            log.info("sasrec, %s, %d users\n%s", split, len(users), "\n".join(lines))
        draft.folder.write_json("metrics.json", figures)
        draft.figures |= {"test": {name: round(value, 5) for name, value in figures["test"]["unmasked"].items()}}

    evaluated = {"users": fingerprint(run.evaluation.max_users, run.evaluation.seed)}  # decide the metrics written here
    return artifacts.build(run.root, "sasrec", run.sasrec, {"catalog": catalog}, make, source=evaluated)


if __name__ == "__main__":
    command(__doc__, lambda run: sasrec(run, prepare(run)))
