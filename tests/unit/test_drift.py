"""Metrics of drift against their definitions, and every limit."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from tiger.evaluation.drift import DriftLimits, drift_metrics, judge
from tiger.metrics.codes import nearest_distances
from tiger.semantic_ids.assignment import SemanticIds

QUIET = {
    "new_items": 100.0, "growth": 0.1, "crowded_fraction": 0.0, "crowded_fraction_trained": 0.0, "error_ratio": 1.1,
    "far_fraction": 0.06, "prefix_churn": 0.4, "prefix_churn_trained": 0.4, "moved_fraction": 0.1,
    "moved_fraction_trained": 0.05, "recall_ratio": 20.0,
}  # fmt: skip
"""Metrics of an append without drift."""


def test_against_the_definitions() -> None:
    rng = np.random.default_rng(0)
    flat = rng.choice(4 * 5 * 6, 80, replace=False)
    codes = np.stack(np.unravel_index(flat, (4, 5, 6)), axis=1).astype(np.int16)
    trained, before = 50, 60
    errors, trained_errors = rng.random(20), rng.random(200)
    moved = rng.random(20) < 0.3
    distances, trained_distances = rng.random(20), rng.random(100)
    found = drift_metrics(
        SemanticIds(codes, (4, 5, 6), 3), trained, before, moved, 0.05, errors, trained_errors, distances,
        trained_distances,
    )  # fmt: skip
    prefixes = [tuple(row[:2]) for row in codes.tolist()]
    counts = Counter(prefixes[:trained])
    assert found["new_items"] == 20
    assert found["growth"] == 30 / 50
    assert found["prefix_churn"] == np.mean([prefix not in counts for prefix in prefixes[before:]])
    assert found["prefix_churn_trained"] == np.mean([counts[prefix] == 1 for prefix in prefixes[:trained]])
    every = Counter(prefixes)
    assert found["crowded_fraction"] == np.mean([every[prefix] >= 0.9 * 6 for prefix in prefixes])
    assert found["error_ratio"] == pytest.approx(errors.mean() / trained_errors.mean())
    assert found["far_fraction"] == np.mean(distances > np.quantile(trained_distances, 0.95))
    assert found["moved_fraction"] == moved.mean()
    for level, size in enumerate((4, 5, 6)):
        assert found[f"utilization@{level + 1}"] == len(set(codes[:, level].tolist())) / size
        assert found[f"utilization@{level + 1}_trained"] == len(set(codes[:trained, level].tolist())) / size


def test_deletions_alone_are_no_drift() -> None:
    codes = np.array([[0, 0], [1, 1]], np.int16)
    nothing = np.zeros(0)
    found = drift_metrics(
        SemanticIds(codes, (2, 2), 2), 2, 2, nothing.astype(bool), 0.0, nothing, np.ones(2), nothing, np.ones(2)
    )
    assert found["new_items"] == 0
    assert judge(found, DriftLimits()).verdict == "continue"


def test_no_drift_is_to_continue() -> None:
    report = judge(QUIET, DriftLimits())
    assert (report.verdict, report.reasons) == ("continue", [])
    assert "drift: continue" in str(report)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"error_ratio": 2.1, "far_fraction": 0.2},
            r"2.10 times as far from the codebooks as the trained ones \(append.limits.max_error_ratio",
        ),
        ({"far_fraction": 0.8}, "80% of the new texts are further from all trained ones than 95%"),
        ({"prefix_churn": 0.8}, "80% of the new items have new prefixes, 40% are expected"),
        ({"moved_fraction": 0.6}, "60% of the new items did not get their nearest codes, of the trained ones 5%"),
        ({"crowded_fraction": 0.2}, "nearly full for 20.0% of the items, 0.0% at the training"),
        ({"growth": 0.7}, "70% of the trained items were appended"),
        ({"recall_ratio": 1.2}, "found 1.2 times as often as by chance"),
    ],
)
def test_every_limit_is_a_reason(changes: dict[str, float], reason: str) -> None:
    report = judge(QUIET | changes, DriftLimits())
    assert report.verdict == "retrain now"
    assert len(report.reasons) == 1
    assert re.search(reason, report.reasons[0])
    assert report.reasons[0] in str(report)


def test_large_errors_of_usual_texts_are_those_of_a_tokenizer_of_few_items() -> None:
    assert judge(QUIET | {"error_ratio": 9.0}, DriftLimits()).verdict == "continue"


def test_distances_to_the_nearest_row() -> None:
    rng = np.random.default_rng(1)
    rows, queries = rng.normal(size=(1500, 5)).astype(np.float32), rng.normal(size=(30, 5)).astype(np.float32)

    def cosine(one: np.ndarray, other: np.ndarray) -> float:
        return 1 - float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))

    truth = [min(cosine(query, row) for row in rows) for query in queries]
    np.testing.assert_allclose(nearest_distances(rows, queries), truth, atol=1e-5)
    alone = nearest_distances(rows)
    for row in (0, 1024, 1499):
        expected = min(cosine(rows[row], other) for index, other in enumerate(rows) if index != row)
        assert alone[row] == pytest.approx(expected, abs=1e-5)
    assert len(nearest_distances(rows, queries[:0])) == 0


def test_fractions_of_a_few_items_say_nothing() -> None:
    few = QUIET | {
        "new_items": 3.0,
        "error_ratio": 3.0,
        "far_fraction": 1.0,
        "prefix_churn": 1.0,
        "moved_fraction": 1.0,
    }
    assert judge(few, DriftLimits()).verdict == "continue"
