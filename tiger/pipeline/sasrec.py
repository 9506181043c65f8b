"""Train SASRec, an ID-only baseline, and evaluate it like the generative model."""

from __future__ import annotations

import logging

from tiger.core import artifacts
from tiger.core.artifacts import Artifact, Draft
from tiger.core.config import fingerprint
from tiger.data.catalog import Catalog
from tiger.models.sasrec import SASRec, SASRecJob
from tiger.on_ray.train import train
from tiger.pipeline.evaluate import SPLITS, K, compute_metrics, drop_seen, select_users
from tiger.pipeline.prepare import prepare
from tiger.run import RunConfig
from tiger.training.weights import load_weights

log = logging.getLogger(__name__)


def sasrec(run: RunConfig, catalog: Artifact) -> Artifact:
    """Return the artifact of SASRec trained and evaluated on a catalog."""

    def make(draft: Draft) -> None:
        worker_job = SASRecJob(run.sasrec, catalog.folder, draft.folder)
        draft.metrics = train(worker_job, draft.folder, run.scale, "sasrec", batch_size=run.sasrec.training.batch_size)
        read = Catalog(catalog)
        model = SASRec(run.sasrec, read.n_items).eval()
        load_weights(model, draft.folder)
        counts, figures = read.histories.training_counts(read.n_items), {}
        for split in SPLITS:
            users = select_users(run, read, split)
            taken = users.histories()
            lists = model.best(taken, min(read.n_items, K + max(map(len, taken), default=0)))
            masked = drop_seen(lists, users)
            figures[split] = compute_metrics(lists[:, :K], masked[:, :K], users, counts)
            unmasked, interval = figures[split]["all_items"], figures[split]["ci95"]
            lines = [
                f"{name:<12}{value:>9.4f}  ({interval[name][0]:.4f} to {interval[name][1]:.4f})"
                f"{figures[split]['exclude_seen'][name]:>9.4f} masked"
                for name, value in unmasked.items()
            ]
            log.info("sasrec, %s, %d users\n%s", split, len(users), "\n".join(lines))
        draft.folder.write_json("metrics.json", figures)
        draft.metrics |= {"test": {name: round(value, 5) for name, value in figures["test"]["all_items"].items()}}

    evaluated = {"users": fingerprint(run.evaluation.max_users, run.evaluation.seed)}  # they determine the metrics
    return artifacts.build(run.root, "sasrec", run.sasrec, {"catalog": catalog}, make, source=evaluated)


def job(run: RunConfig) -> Artifact:
    """Train and evaluate SASRec on the catalog of a configuration."""
    return sasrec(run, prepare(run))
