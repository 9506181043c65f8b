"""The whole story: from raw catalog and history files to recommendations.

What is finished already is skipped; a stage that ended in a degenerate state stops the run there.
"""

from __future__ import annotations

from jobs.command import command
from jobs.embed import embed
from jobs.evaluate import evaluate
from jobs.prepare import prepare
from jobs.recommend import recommend, show_some
from jobs.semantic_ids import make_ids
from jobs.train import train_model
from tiger.artifacts import Artifact
from tiger.run import RunConfig


def pipeline(run: RunConfig) -> Artifact:
    catalog = prepare(run)  # raw files -> items with one text each, users with their histories
    embeddings = embed(run, catalog)  # texts -> vectors
    ids = make_ids(run, embeddings)  # vectors -> codes -> one unique semantic ID per item
    model = train_model(run, catalog, ids)  # histories as semantic IDs -> a model that generates the next one
    metrics = evaluate(run, model)  # how often it finds what users took next
    recommendations = recommend(run, model)  # what they may take next
    show_some(recommendations)
    return metrics


if __name__ == "__main__":
    command(__doc__, pipeline)
