"""pcgjax.splits: parts by person, database and fold; every kind of leak is found, and none where there is none."""

from __future__ import annotations

import collections
import json
import pathlib
import subprocess
import sys
import wave
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from pcgjax import prepare
from pcgjax.data import splits
from pcgjax.data.decode import fingerprint
from pcgjax.data.shards import read_rows

QUICK = hypothesis.settings(max_examples=60, deadline=None, database=None)


def row(name: str, person: str = "", database: str = "a", label: object = 0, **more: Any) -> dict[str, Any]:
    return {
        "id": name,
        "person": person or name,
        "person_known": bool(person),
        "database": database,
        "labels": {} if label is None else {"abnormal": str(label)},
        "sha256": f"hash of {name}",
        "fingerprint": "",
    } | more


def people(count: int, database: str = "a", records: int = 1, label: object = None) -> list[dict[str, Any]]:
    """`count` people with `records` recordings each, every third of them abnormal, or all of one label."""
    return [
        row(f"{database}{i:04d}_{j}", f"{database}-{i}", database, int(i % 3 == 0) if label is None else label)
        for i in range(count)
        for j in range(records)
    ]


@st.composite
def corpora(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Two or three databases; people with 1 to 4 recordings of one label, some recordings without one."""
    rows = []
    for database in draw(st.sampled_from(["ab", "abc"])):
        for i in range(draw(st.integers(30, 60))):
            label = int(i % 3 == 0)
            for j in range(draw(st.integers(1, 4))):
                recorded = None if draw(st.integers(0, 19)) == 0 and j else label
                rows.append(row(f"{database}{i:03d}_{j}", f"{database}-{i}", database, recorded))
    return rows


@pytest.mark.parametrize("kind", ["person", "person_kfold", "leave_database_out"])
@QUICK
@hypothesis.given(rows=corpora(), seed=st.integers(0, 1000), fold=st.integers(0, 4))
def test_parts_are_disjoint_cover_all_and_keep_people_together(
    kind: str, rows: list[dict[str, Any]], seed: int, fold: int
) -> None:
    split = splits.make(rows, kind, "abnormal", seed, fold=fold, database="b")
    ids = [name for part in (*splits.PARTS, "unlabelled") for name in split[part]]
    assert sorted(ids) == sorted(row["id"] for row in rows)
    assert split["unlabelled"] == sorted(row["id"] for row in rows if not row["labels"])
    part_of = {name: part for part in splits.PARTS for name in split[part]}
    parts_of_person = collections.defaultdict(set)
    for r in rows:
        if r["id"] in part_of:
            parts_of_person[r["person"]].add(part_of[r["id"]])
    assert all(len(parts) == 1 for parts in parts_of_person.values())
    assert splits.leaks(split, rows) == []
    if kind == "leave_database_out":
        assert split["test"] == sorted(r["id"] for r in rows if r["database"] == "b" and r["labels"])

    shuffled = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]
    assert splits.make(shuffled, kind, "abnormal", seed, fold=fold, database="b") == split


@QUICK
@hypothesis.given(rows=corpora(), seed=st.integers(0, 1000))
def test_classes_and_databases_are_spread(rows: list[dict[str, Any]], seed: int) -> None:
    split = splits.make(rows, "person", "abnormal", seed)
    for database in {r["database"] for r in rows}:
        for label in ("0", "1"):
            all_of = [r["id"] for r in rows if r["database"] == database and r["labels"].get("abnormal") == label]
            for part, fraction in zip(splits.PARTS, (0.7, 0.15, 0.15), strict=True):
                count = len(set(all_of) & set(split[part]))
                assert abs(count - fraction * len(all_of)) <= 2 * 4  # two people with the most recordings
    total = sum(len(split[part]) for part in splits.PARTS)
    assert abs(len(split["test"]) / total - 0.15) < 0.06
    assert split["counts"]["test"]["all"]["recordings"] == len(split["test"])


def test_people_with_recordings_of_both_classes_do_not_starve_a_part() -> None:
    """As on CinC 2016 a's tapes: one with a third of all recordings, both classes on most."""
    rows = [row(f"a{i:03d}", "tape0", label=int(i % 2)) for i in range(60)]
    rows += [row(f"b{i:03d}", f"tape{1 + i // 6}", label=int(i % 3 > 0)) for i in range(120)]
    for seed in range(5):
        counts = splits.make(rows, "person", "abnormal", seed)["counts"]
        for part, share in zip(splits.PARTS, (0.7, 0.15, 0.15), strict=True):
            test_counts = counts[part]["all"]
            assert abs(test_counts["positives"] - share * 110) <= 6
            assert abs(test_counts["recordings"] - test_counts["positives"] - share * 70) <= 6


@pytest.mark.parametrize("kind", ["person", "person_kfold", "leave_database_out"])
def test_without_a_target_all_recordings_are_dealt_out(kind: str) -> None:
    rows = people(30, "a", 3, label=1) + people(20, "b", 2, label=0)
    rows += [row(f"c{i:03d}_{j}", f"c-{i}", "c", None) for i in range(20) for j in range(4)]  # not labelled at all
    split = splits.make(rows, kind, "", 0, database="c")
    assert (split["target"], split["unlabelled"]) == ("", [])
    part_of = {name: part for part in splits.PARTS for name in split[part]}
    assert sorted(part_of) == sorted(r["id"] for r in rows)
    for r in rows:
        assert part_of[r["id"]] == part_of[f"{r['id'][:-1]}0"]  # people are kept together
    assert splits.check(split, rows) == []
    share = {"person": 0.15, "person_kfold": 0.2}.get(kind)
    for database in "abc" if share else "":
        of = [r["id"] for r in rows if r["database"] == database]
        assert abs(sum(part_of[name] == "test" for name in of) - share * len(of)) <= 4
    assert all(of["positives"] == 0 for part in splits.PARTS for of in split["counts"][part].values())
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    assert splits.make(shuffled, kind, "", 0, database="c") == split


def test_without_a_target_what_needs_classes_is_refused() -> None:
    for kind in ("person_250", "paper301"):
        with pytest.raises(splits.SplitError, match=f"kind {kind} draws recordings of two classes"):
            splits.make(people(30), kind, "", 0)
    with pytest.raises(splits.SplitError, match=r"2 people with .*, too few for 3 parts"):
        splits.make(people(2, records=9), "person", "", 0)


@pytest.mark.parametrize(("count", "each"), [(3000, 250), (300, 26)])
def test_a_tuning_set_with_as_many_of_either_class(count: int, each: int) -> None:
    rows = people(count)  # a third of them abnormal
    split = splits.make(rows, "person_250", "abnormal", 0, (0.64, 0.16, 0.2))
    of = split["counts"]["validation"]["all"]
    assert of["positives"] == pytest.approx(each, abs=1)
    assert of["recordings"] == pytest.approx(2 * each, abs=2)
    assert split["counts"]["test"]["all"]["recordings"] == pytest.approx(0.2 * count, abs=2)
    assert sum(len(split[part]) for part in splits.PARTS) == count
    assert splits.check(split, rows) == []
    assert any("as 250 would leave too few to train" in note for note in split["notes"]) == (each < 250)


def test_folds_take_turns() -> None:
    rows = people(60, records=2)
    made = [splits.make(rows, "person_kfold", "abnormal", 3, fold=fold, folds=4) for fold in range(4)]
    assert sorted(name for split in made for name in split["test"]) == [r["id"] for r in rows]
    for fold in range(4):
        assert made[fold]["validation"] == made[(fold + 1) % 4]["test"]


def test_seed_matters() -> None:
    rows = people(60)
    assert splits.make(rows, "person", "abnormal", 0) != splits.make(rows, "person", "abnormal", 1)
    assert splits.make(rows, "person", "abnormal", 1) == splits.make(rows, "person", "abnormal", 1)


def test_paper301_draws_recordings_as_published() -> None:
    rows = people(300, records=2)  # 400 normal, 200 abnormal
    split = splits.make(rows, "paper301", "abnormal", 0)
    assert split["counts"]["test"]["all"]["recordings"] == 301
    assert split["counts"]["test"]["all"]["positives"] == 151
    assert splits.make(rows[::-1], "paper301", "abnormal", 0) == split
    messages = splits.check(split, rows, allow=True)
    assert any(message.startswith("person a-") for message in messages)
    with pytest.raises(splits.LeakError, match="THE SPLIT LEAKS"):
        splits.check(split, rows)


def test_paper301_with_the_published_names(tmp_path: pathlib.Path) -> None:
    rows = people(60)
    (tmp_path / "REFERENCE.csv").write_text("a0000_0,1\na0001_0,-1\na0002_0.wav,-1\nnot-here,1\n\n")
    split = splits.make(rows, "paper301", "abnormal", 0, names=tmp_path / "REFERENCE.csv")
    assert split["test"] == ["a0000_0", "a0001_0", "a0002_0"]
    assert any("1 of the 4 names" in note for note in split["notes"])
    (tmp_path / "other.csv").write_text("x\ny\n")
    with pytest.raises(splits.SplitError, match=r"other.csv: none of its 2 names"):
        splits.make(rows, "paper301", "abnormal", 0, names=tmp_path / "other.csv")
    with pytest.raises(splits.SplitError, match=r"nowhere.csv: cannot be read"):
        splits.make(rows, "paper301", "abnormal", 0, names=tmp_path / "nowhere.csv")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "random"}, "unknown kind 'random': choose one of person"),
        ({"target": "class"}, "no recording has the label 'class': .*labels that are 0 or 1: abnormal"),
        ({"target": "murmur"}, "no recording has the label 'murmur'"),
        ({"fractions": (0.8, 0.1, 0.2)}, "sum 1"),
        ({"fractions": (0.8, 0.2, 0.0)}, "positive"),
        ({"kind": "person_kfold", "fold": 5}, "fold 5: must lie between 0 and 4"),
        ({"kind": "person_kfold", "folds": 2}, "at least 3"),
        ({"kind": "person_kfold", "folds": 11}, "10 people with abnormal 1, too few for 11 parts"),
        ({"kind": "leave_database_out", "database": "x"}, "no database 'x' .*: choose one of a, b"),
        ({"kind": "leave_database_out", "database": "b"}, "test has no recording with abnormal 1"),
        ({"kind": "paper301"}, "30 recordings with abnormal 0; this split tests on 150"),
    ],
)
def test_what_cannot_be_made_says_why(arguments: dict[str, Any], message: str) -> None:
    rows = people(30) + people(10, "b", label=0)
    all_arguments: dict[str, Any] = {"kind": "person", "target": "abnormal", "seed": 0} | arguments
    with pytest.raises(splits.SplitError, match=message):
        splits.make(rows, **all_arguments)


def test_too_little_to_divide() -> None:
    with pytest.raises(splits.SplitError, match="2 people with abnormal 1, too few for 3 parts"):
        splits.make(people(20, label=0) + people(2, "b", label=1), "person", "abnormal", 0)
    with pytest.raises(splits.SplitError, match="a is the only database"):
        splits.make(people(30), "leave_database_out", "abnormal", 0, database="a")
    with pytest.raises(splits.SplitError, match="an id twice"):
        splits.make(people(30) + people(1), "person", "abnormal", 0)


def test_unknown_people_are_said() -> None:
    rows = people(30) + [row(f"e{i}", database="e", label=i % 2) for i in range(30)]
    notes = splits.make(rows, "person", "abnormal", 0)["notes"]
    assert len(notes) == 1
    assert notes[0].startswith("e: people are not known")


def test_a_person_of_the_left_out_database_is_not_trained_on() -> None:
    rows = people(30) + people(30, "b")
    rows[0]["person"] = "b-1"
    split = splits.make(rows, "leave_database_out", "abnormal", 0, database="b")
    assert all("a0000_0" not in split[part] for part in splits.PARTS)
    assert any("a0000_0" in note for note in split["notes"])
    assert splits.leaks(split, rows) == []


def three_parts() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    rows = [row(name, f"person {name}") for name in "abcdef"]
    return rows, {"train": ["a", "b"], "validation": ["c", "d"], "test": ["e", "f"], "unlabelled": []}


def test_each_kind_of_leak_is_found() -> None:
    rows, split = three_parts()
    assert splits.check(split, rows) == []

    rows, split = three_parts()
    rows[4]["person"] = "person a"
    assert splits.leaks(split, rows) == ["person person a is in train (a) and in test (e)"]

    rows, split = three_parts()
    rows[2]["sha256"] = rows[1]["sha256"]
    rows[1]["fingerprint"] = rows[2]["fingerprint"] = "1 2 3 4"  # said once, as the same audio
    assert splits.leaks(split, rows) == ["the same audio is in train (b) and in validation (c)"]

    rows, split = three_parts()
    split["test"].append("a")
    assert splits.leaks(split, rows) == ["recording a is in train and in test"]
    split = three_parts()[1] | {"unlabelled": ["f"], "train": ["a", "a", "b"]}
    assert splits.leaks(split, rows) == [
        "recording a is in train and in train",
        "recording f is in test and in unlabelled",
    ]

    rows, split = three_parts()
    rows[0]["fingerprint"], rows[5]["fingerprint"] = "1 2 3 4", "2 3 4 5"
    rows[1]["fingerprint"], rows[2]["fingerprint"] = "6 7 7 7", "6 7 7 7"  # two alike are chance
    assert splits.leaks(split, rows) == ["a in train and f in test share audio (3 windows)"]


def test_check_is_loud_about_ten() -> None:
    rows = [row(f"{i:02d}{part}", f"person {i}") for i in range(12) for part in "xy"]
    split = {
        "train": [r["id"] for r in rows if r["id"][-1] == "x"],
        "validation": [],
        "test": [r["id"] for r in rows if r["id"][-1] == "y"],
        "unlabelled": [],
    }
    with pytest.raises(splits.LeakError, match="12 findings") as error:
        splits.check(split, rows)
    assert str(error.value).count("\n  person person") == 10
    assert str(error.value).endswith("and 2 more")
    assert len(splits.check(split, rows, allow=True)) == 12


def excerpts(first: tuple[int, int], second: tuple[int, int], seed: int = 0) -> list[dict[str, Any]]:
    whole = (np.random.default_rng(seed).standard_normal(40_000) * 500).astype(np.int16)
    return [
        row(name, f"person {name}", fingerprint=fingerprint(whole[start:stop], 2000))
        for name, (start, stop) in {"a": first, "e": second}.items()
    ]


@QUICK
@hypothesis.given(st.integers(1, 15_000), st.integers(5_000, 9_000), st.integers(0, 50))
def test_overlapping_excerpts_are_found_at_any_offset(start: int, overlap: int, seed: int) -> None:
    rows = excerpts((start, start + 20_000), (start + 20_000 - overlap, 40_000), seed)
    (message,) = splits.leaks(three_parts()[1], rows)
    assert message.startswith("a in train and e in test share audio")


def test_excerpts_that_only_touch_and_distinct_noise_are_no_alarm() -> None:
    assert splits.overlaps(excerpts((0, 20_000), (20_000, 40_000))) == []
    rng = np.random.default_rng(0)
    coarse = [rng.integers(-2, 3, 20_000).astype(np.int16) for _ in range(20)]  # a few quantisation steps
    hum = (1000 * np.sin(np.arange(20_000) * 0.157)).astype(np.int16)
    fine = [(hum + rng.standard_normal(20_000) * 30).astype(np.int16) for _ in range(20)]
    gaps = [np.where(rng.random(20_000).cumsum() % 100 < 50, 0, values) for values in fine]
    rows = [
        row(str(i), fingerprint=fingerprint(values.astype(np.int16), 2000))
        for i, values in enumerate(coarse + fine + gaps)
    ]
    assert sum(len(r["fingerprint"].split()) for r in rows) > 1000
    assert [pair for pair in splits.overlaps(rows) if abs(int(pair[0]) - int(pair[1])) != 20] == []


def test_people_who_share_audio_are_kept_together() -> None:
    rows = people(60)
    for first, second in ((0, 30), (30, 45)):  # a chain: 0, 30 and 45 belong together
        common = "".join(f" {first}/{i}" for i in range(5))
        rows[first]["fingerprint"] = rows[first]["fingerprint"] + common
        rows[second]["fingerprint"] = rows[second]["fingerprint"] + common
    for seed in range(5):
        split = splits.make(rows, "person", "abnormal", seed)
        together = {rows[i]["id"] for i in (0, 30, 45)}
        assert sum(bool(together & set(split[part])) for part in splits.PARTS) == 1
        assert splits.leaks(split, rows) == []
        assert sum("share audio" in note for note in split["notes"]) == 2


def test_saved_split_is_for_its_own_data(tmp_path: pathlib.Path) -> None:
    rows = people(60)
    split = splits.make(rows, "person", "abnormal", 0)
    path = tmp_path / "deep" / "split.json"
    splits.save(split, path)
    assert splits.load(path, rows[::-1]) == split
    assert [file.name for file in path.parent.iterdir()] == ["split.json"]

    with pytest.raises(splits.SplitError, match=r"split.json: made for a data set with other recordings or labels"):
        splits.load(path, rows + people(1, "b"))
    with pytest.raises(splits.SplitError, match=r"split.json: 1 recordings are not in this data set \(a0000_0\)"):
        splits.load(path, rows[1:])
    relabelled = [rows[0] | {"labels": {"abnormal": "0"}}, *rows[1:]]
    with pytest.raises(splits.SplitError, match=r"other recordings or labels.*make it again"):
        splits.load(path, relabelled)
    path.write_text(json.dumps({"train": []}))
    with pytest.raises(splits.SplitError, match="not a split, it lacks kind"):
        splits.load(path, rows)
    path.write_text("{")
    with pytest.raises(splits.SplitError, match="cannot be read as a split"):
        splits.load(path, rows)
    with pytest.raises(splits.SplitError, match=r"gone.json: cannot be read"):
        splits.load(tmp_path / "gone.json", rows)


def test_command_line(tmp_path: pathlib.Path) -> None:
    training = tmp_path / "source" / "training-e"
    training.mkdir(parents=True)
    whole = (np.random.default_rng(0).standard_normal((40, 2000)) * 900).astype("<i2")
    for i, samples in enumerate(whole):
        with wave.open(str(training / f"e{i:05d}.wav"), "wb") as file:
            file.setparams((1, 2, 2000, 0, "NONE", ""))
            file.writeframes(samples.tobytes())
    (training / "REFERENCE.csv").write_text("".join(f"e{i:05d},{1 if i % 2 else -1}\n" for i in range(40)))
    prepare.prepare("cinc2016", tmp_path / "source", tmp_path / "prepared", workers=1)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "pcgjax.splits", f"--prepared={tmp_path / 'prepared'}", *arguments]
        return subprocess.run(line, capture_output=True, text=True)

    out = tmp_path / "split.json"
    made = run("--kind=person", "--target=abnormal", f"--out={out}")
    assert made.returncode == 0, made.stderr
    assert "no leaks found" in made.stdout
    assert "28 recordings" in made.stdout
    split = splits.load(out, read_rows(tmp_path / "prepared")[1])
    assert len(split["train"]) == 28

    split["test"].append(split["train"][0])
    splits.save(split, out)
    checked = run(f"--check={out}")
    assert checked.returncode == 1
    assert f"LEAK: recording {split['train'][0]} is in train and in test" in checked.stdout

    wrong = run("--kind=leave_database_out", "--target=abnormal", f"--out={out}", "--database=z")
    assert wrong.returncode == 1
    assert "choose one of cinc2016-e" in wrong.stderr
    assert "Traceback" not in wrong.stderr
