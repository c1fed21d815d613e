"""One's own labelled recordings: a table, and a folder a class."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
import soundfile

from pcgjax import datasets, evaluate
from pcgjax.data import splits
from pcgjax.data.corpus import from_prepared
from pcgjax.data.prepare import PrepareError, prepare
from pcgjax.datasets.own import binary
from pcgjax.training.loop import train

RATE_HZ = 1000


def sound(path: pathlib.Path, seconds: float = 2.0, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.1 * np.random.default_rng(seed).standard_normal(int(seconds * RATE_HZ)), RATE_HZ)


def table(folder: pathlib.Path, text: str, names: str = "abc") -> pathlib.Path:
    for i, name in enumerate(names):
        sound(folder / f"{name}.wav", seed=i)
    (folder / "labels.csv").write_text(text)
    return folder / "labels.csv"


@pytest.mark.parametrize(("words", "labels"), [
    ({"0", "1"}, {"0": "0", "1": "1"}),
    ({"-1", "1", ""}, {"-1": "0", "1": "1"}),
    ({"Normal", "murmur", "extrastole"}, {"Normal": "0", "murmur": "1", "extrastole": "1"}),
    ({"abnormal", "fine"}, {"abnormal": "1", "fine": "0"}),
    ({"present"}, {"present": "1"}),
    (set(), {}),
])  # fmt: skip
def test_words_for_classes(words, labels):
    assert binary(words, "x") == labels


def test_classes_of_which_none_is_normal():
    with pytest.raises(datasets.DatasetError, match=r"t.csv: which of the classes AS, MR is the normal one\?"):
        binary({"AS", "MR"}, "t.csv")
    with pytest.raises(datasets.DatasetError, match="every recording is of class 'AS'"):
        binary({"AS"}, "t.csv")


@pytest.mark.parametrize("text", [
    "path,label,person,thrill,age\na.wav,normal,1,no,12\nb.wav,murmur,2,yes,\nc.wav,,2,,9\n",
    "File;Diagnosis;Patient ID;Thrill;Age\na.wav;normal;1;no;12\nb.wav;murmur;2;yes;\nc.wav;;2;;9\n",
    "\ufefffilename\tclass\tsubject\tthrill\tage\r\na.wav\tnormal\t1\tno\t12\r\nb.wav\tmurmur\t2\tyes\t\r\nc.wav\t\t2\t\t9\r\n",
])  # fmt: skip
def test_a_table(text, tmp_path):
    recordings, problems = datasets.load("table", table(tmp_path, text))
    assert problems == []
    assert [(one.id, one.person, one.person_known, dict(one.labels)) for one in recordings] == [
        ("a", "table-1", True, {"abnormal": "0", "class": "normal", "thrill": "0", "age": "12"}),
        ("b", "table-2", True, {"abnormal": "1", "class": "murmur", "thrill": "1"}),
        ("c", "table-2", True, {"age": "9"}),
    ]


def test_a_table_without_header_or_persons(tmp_path):
    recordings, [note] = datasets.load("table", table(tmp_path, "a.wav,0\nb.wav,1\n"))
    assert [(one.id, one.labels["abnormal"], one.person_known) for one in recordings] == [("a", "0", 0), ("b", "1", 0)]
    assert note.note
    assert note.reason.startswith("persons: who was recorded is not known")
    assert note.reason.endswith("give a column person")


def test_excerpts_annotations_and_databases_of_a_table(tmp_path):
    (tmp_path / "beats.tsv").write_text("0.2\t0.3\t1\n0.3\t0.9\t2\n1.2\t1.3\t1\n")
    text = "path,label,start_s,end_s,annotation,site\na.wav,0,0.25,1.25,beats.tsv,here\na.wav,1,1.25,,beats.tsv,there\n"
    first, second = datasets.load("table", table(tmp_path, text))[0]
    assert (first.id, first.database, second.id, second.database) == ("a@0.25", "here", "a@1.25", "there")
    assert first.annotations == pytest.approx(np.array([(0, 0.05, 1), (0.05, 0.65, 2), (0.95, 1.0, 1)]))
    prepare("table", tmp_path / "labels.csv", tmp_path / "out", workers=1)
    corpus = from_prepared(tmp_path / "out")
    assert [row["num_samples"] for row in corpus.rows] == [1000, 750]
    assert [row["excerpt_s"] for row in corpus.rows] == [[0.25, 1.25], [1.25, 2.0]]
    whole, rate_hz = soundfile.read(tmp_path / "a.wav", dtype="int16")
    peaks = [np.abs(corpus.read(i).astype(float) * corpus.rows[i]["scale"] * 32768 / 32767 - part).max()
             for i, part in enumerate((whole[250:1250], whole[1250:]))]  # fmt: skip
    assert max(peaks) < 1
    assert rate_hz == RATE_HZ
    (tmp_path / "labels.csv").write_text(text.replace("here", "elsewhere"))
    with pytest.raises(PrepareError, match="overwrite"):
        prepare("table", tmp_path / "labels.csv", tmp_path / "out", workers=1)


@pytest.mark.parametrize(("text", "message"), [
    ("label,person\n0,1\n", "no column path among label, person, and no file label beside the table"),
    ("path,label\na.wav,0,1\n", "line 2: not 2 fields as in the header"),
    ("path,label\na.wav,AS\nb.wav,MR\n", "column label: which of the classes AS, MR is the normal one"),
    ("path,age,age\na.wav,1,2\n", "two columns are named age"),
    ("", "the table is empty; give a CSV table"),
    ("path,label\nx.wav,0\n", r"no usable table recording; .*\n  x.wav: missing"),
])  # fmt: skip
def test_a_table_that_is_none(text, message, tmp_path):
    with pytest.raises(datasets.DatasetError, match=message):
        datasets.load("table", table(tmp_path, text))
    with pytest.raises(datasets.DatasetError, match=r"a folder; --source takes the table"):
        datasets.load("table", tmp_path)


def test_rows_of_a_table_that_cannot_be_used(tmp_path):
    text = ("path,label,split,start_s,person\na.wav,0,train,,1\na.wav,1,test,,1\nb.wav,0,trian,,2\nb.wav,0,test,x,2\n"
            "c.wav,1,test,1.8,3\nb.wav,1,val,,2\n")  # fmt: skip
    recordings, problems = datasets.load("table", table(tmp_path, text))
    assert [(one.id, one.labels["split"]) for one in recordings] == [("a", "train"), ("b", "validation")]
    assert [problem.reason.partition(" ")[0] for problem in problems] == [
        "duplicate:",
        *["mislabelled:"] * 2,
        "excerpt:",
    ]
    assert problems[1].reason.endswith("line 4: split is 'trian', need train, validation or test")


def test_a_folder_a_class(tmp_path):
    for i, name in enumerate(("normal/p1_a", "normal/p2_a", "sick/p1_b", "sick/deep/p3_a", "loose")):
        sound(tmp_path / f"{name}.wav", seed=i)
    recordings, [note] = datasets.load("folder", tmp_path, labels="folders")
    assert {one.id: one.labels.get("abnormal") for one in recordings} == {
        "loose": None, "normal/p1_a": "0", "normal/p2_a": "0", "sick/deep/p3_a": "1", "sick/p1_b": "1"
    }  # fmt: skip
    assert not any(one.person_known for one in recordings)
    assert "--persons" in note.reason
    recordings, _ = datasets.load("folder", tmp_path, labels="folders", persons=r"(p\d)_")
    assert [one.person for one in recordings] == ["loose", "folder-p1", "folder-p2", "folder-p3", "folder-p1"]
    plain, problems = datasets.load("folder", tmp_path)
    assert problems == []
    assert {one.person for one in plain if one.person_known} == {"folder-normal", "folder-sick"}
    for persons, message in (("(", "no regular expression"), ("q9", "fits no path below .*, as loose.wav")):
        with pytest.raises(datasets.DatasetError, match=message):
            datasets.load("folder", tmp_path, labels="folders", persons=persons)
    with pytest.raises(datasets.DatasetError, match="of --dataset=folder alone"):
        datasets.load("table", table(tmp_path, "a.wav,0\n"), labels="folders")


def test_own_labels_are_trained_split_and_judged(make_config, corpus_folder, tmp_path):
    """A column of one's own as the target, its parts as another column says."""
    wavs = sorted(corpus_folder.rglob("*.wav"))[:60]
    header = "path;label;person;loud;set;split"
    parts = [("train", "validation", "test")[i % 5 // 2] for i in range(len(wavs))]
    lines = [f"{path};{'AS' if i % 2 else 'normal'};{i};{('no', 'yes')[i // 2 % 2]};x;{parts[i]}"
             for i, path in enumerate(wavs)]  # fmt: skip
    (tmp_path / "own.csv").write_text("\n".join([header, *lines]))
    manifest = prepare("table", tmp_path / "own.csv", tmp_path / "own", workers=1)
    assert manifest["counts"]["databases"]["table"]["recordings"] == len(wavs)
    changes = {"data.prepared": str(tmp_path / "own"), "task.target": "loud", "split.kind": "column", "train.epochs": 1}
    train(make_config(changes), tmp_path / "run")
    split = splits.read(tmp_path / "run" / "split.json")
    assert len(split["test"]) == parts.count("test")
    with pytest.raises(ValueError, match=r"no recording has the label 'lood': .*nearest: loud; labels "):
        train(make_config(changes | {"task.target": "lood"}), tmp_path / "other")
    scores = evaluate.evaluate(str(tmp_path / "run"), "table", str(tmp_path / "own.csv"), str(tmp_path / "s.json"))
    assert (scores["target"], scores["recordings"]) == ("loud", len(wavs))


def test_kind_column_draws_validation_from_the_training_people(tmp_path):
    rows = [{"id": str(i), "person": str(i // 2), "person_known": True, "database": "t", "fingerprint": "",
             "sha256": str(i), "labels": {"abnormal": str(i // 2 % 2), "split": "train" if i < 40 else "test"}}
            for i in range(60)]  # fmt: skip
    split = splits.make(rows, "column", "abnormal", 0)
    assert sorted(map(int, split["train"] + split["validation"])) == list(range(40))
    assert len(split["validation"]) in range(5, 10)
    assert splits.leaks(split, rows) == []
    with pytest.raises(splits.SplitError, match="kind column needs rows whose column `split` says train"):
        splits.make(rows[:40], "column", "abnormal", 0)
