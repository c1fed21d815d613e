"""CSV: what a spreadsheet would take for a formula is text, and what is read again is what was written."""

from __future__ import annotations

import csv

import pytest

from pcgjax.runs.judge import PREDICTION_COLUMNS, write_table
from pcgjax.runs.results import read_predictions
from pcgjax.runtime.tables import marked, unmarked, write_csv

FORMULAS = ["=1+1", '=HYPERLINK("x")', "+a", "-a", "-1a", "@SUM(1)", "\tx", "\rx", "\n=x", "'=x", "''@x", "＝1", "-"]
PLAIN = ["a0001", "-1.5", "+3", "1e-5", "-inf", "nan", "'a", "", "a=b", " x", "é"]


@pytest.mark.parametrize("text", FORMULAS)
def test_a_formula_is_marked_and_read_again(text):
    assert marked(text) == f"'{text}"
    assert unmarked(marked(text)) == text


@pytest.mark.parametrize("text", PLAIN)
def test_other_text_and_numbers_stay(text):
    assert marked(text) == text
    assert unmarked(text) == text


def test_numbers_stay_numbers():
    assert [marked(x) for x in (-1, -0.5, None, True)] == [-1, -0.5, None, True]


def test_predictions_round_trip(tmp_path):
    row = {"id": "=a", "person": "-p", "database": "@d", "class": "+", "label": 1, "probability": "0.5", "decision": 1,
           "split": "test", "path": "=cmd|' /C calc'!A0.wav"}  # fmt: skip
    write_table([row], tmp_path / "predictions.csv")
    with (tmp_path / "predictions.csv").open(newline="") as file:
        names, cells = csv.reader(file)
    assert tuple(names) == PREDICTION_COLUMNS
    assert not [cell for cell in cells if cell[0] in "=+-@"]
    assert read_predictions(tmp_path / "predictions.csv") == [row | {"probability": 0.5}]


def test_a_name_that_is_no_text_is_written(tmp_path):
    write_csv(tmp_path / "a.csv", ["path"], [["a\udcff.wav"]])
    assert (tmp_path / "a.csv").read_text().splitlines() == ["path", "a\\xff.wav"]
