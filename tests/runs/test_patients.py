"""CirCor's patients: rolled up, and judged by the Challenge's formulas."""

from __future__ import annotations

import numpy as np
import pytest

from pcgjax import metrics
from pcgjax.runs.patients import judge_patients


def rows(*people: str, database: str = "circor") -> list[dict]:
    return [{"person": person, "database": database} for person in people]


def test_murmurs_of_patients():
    found = judge_patients(
        rows("a", "a", "b", "c", "c"), [1, 1, 0, 0, 0], [0.9, 0.2, 0.6, 0.1, 0.2], "murmur", 0.5, 50, 0
    )
    assert (found["score"], found["patients"], found["recordings"]) == ("weighted_accuracy", 3, 5)
    # Present 5, Absent 1: a is found and b is not, by the maximum; c is right.
    assert found["rules"]["max"]["weighted_accuracy"]["value"] == pytest.approx(6 / 7)
    assert found["rules"]["mean"]["auc"]["value"] == 0.5  # a .55, b .6, c .15
    assert found["rules"]["max"]["auc"]["value"] == 1
    assert found["trivial"] == {
        "all_present": {"weighted_accuracy": pytest.approx(5 / 7)},
        "all_absent": {"weighted_accuracy": pytest.approx(2 / 7)},
    }


def test_the_cost_of_screening_is_the_challenges():
    rng = np.random.default_rng(0)
    people = [str(i // 2) for i in range(60)]
    labels, p = np.repeat(rng.integers(2, size=30), 2), rng.random(60)
    found = judge_patients(rows(*people), labels, p, "abnormal", 0.5, 200, 0)
    decided = p.reshape(30, 2).max(1) >= 0.5
    wanted = metrics.challenge_cost(
        np.eye(2, dtype=int)[1 - labels[::2]], np.eye(2, dtype=int)[1 - decided.astype(int)]
    )
    cost = found["rules"]["max"]["cost"]
    assert cost["value"] == pytest.approx(wanted)
    assert cost["low"] < wanted < cost["high"]
    assert found["trivial"]["all_normal"]["cost"] > found["trivial"]["all_abnormal"]["cost"]


def test_where_there_are_none():
    assert judge_patients(rows("a", "b", database="cinc2016-a"), [0, 1], [0.1, 0.9], "murmur", 0.5, 10, 0) is None
    assert judge_patients(rows("a", "b"), [0, 1], [0.1, 0.9], "thrill", 0.5, 10, 0) is None
    one = judge_patients(rows("a", "a"), [1, 1], [0.1, 0.9], "murmur", 0.5, 10, 0)
    assert one["rules"]["max"]["weighted_accuracy"] == {"value": 1, "low": None, "high": None}
