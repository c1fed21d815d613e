"""The bench's suite for the classical chain, small: both sides answer, and alike."""

from __future__ import annotations

import pytest

from pcgjax.bench import classical


@pytest.mark.slow
def test_suite():
    result = classical.classical_suite(clips=6, pairs=1)
    assert result["clips"] == 6
    assert result["difference_db"]["median"] < 0.01
    assert result["features"]["ratio"] > 0
    assert "x the loop" in classical.classical_summary(result)
