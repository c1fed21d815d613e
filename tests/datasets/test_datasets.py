"""Official layouts in small, with each trap that the published files hold, and damaged tables."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Callable

import numpy as np
import pytest
import scipy.io
import soundfile

from pcgjax import datasets
from pcgjax.data import splits
from pcgjax.data.shards import read_rows
from pcgjax.datasets import DIASTOLE, S1, S2, SYSTOLE, UNANNOTATED, DatasetError, Problem, Recording

Loaded = tuple[dict[str, Recording], list[Problem]]
Change = Callable[[pathlib.Path], object]  # damages the corpus in a folder


def sound(path: pathlib.Path, rate_hz: int, seconds: float = 2.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).standard_normal(round(seconds * rate_hz)) / 10
    soundfile.write(path, noise, rate_hz, subtype="PCM_16")


def load(name: str, source: pathlib.Path) -> Loaded:
    recordings, problems = datasets.load(name, source)
    assert [recording.id for recording in recordings] == sorted(recording.id for recording in recordings)
    return {recording.id: recording for recording in recordings}, problems


def replace(path: pathlib.Path, old: str, new: str) -> None:
    text = path.read_text("latin-1")
    assert old in text
    path.write_text(text.replace(old, new), "latin-1")


def reasons(problems: list[Problem], path: str) -> list[str]:
    return [problem.reason for problem in problems if problem.path == path]


# ---------------------------------------------------------------------------------------------- all data sets


def test_unknown_data_set() -> None:
    with pytest.raises(DatasetError, match="unknown dataset 'cinc2017': choose one of cinc2016, circor, pascal"):
        datasets.load("cinc2017", ".")


@pytest.mark.parametrize("name", ["cinc2016", "circor", "pascal", "folder"])
def test_missing_and_empty_folders(tmp_path: pathlib.Path, name: str) -> None:
    with pytest.raises(DatasetError, match="nowhere: no such folder"):
        datasets.load(name, tmp_path / "nowhere")
    with pytest.raises(DatasetError, match=f"no usable {name} recording; expected "):
        datasets.load(name, tmp_path)


# ---------------------------------------------------------------------------------------------------- CinC 2016

APPENDIX_HEADER = (
    "Challenge record name,Database,Original record name,Diagnosis,Class (-1=normal 1=abnormal),"
    "Subject ID,Transducer site on body\r\n"
)
APPENDIX_ROWS = """\
a0001,training-a,C45S1,MVP,1,,Left of apex
a0002, training-a ,C45S12b ,Normal ,-1,,Apex when sit \x20
a0003,training-a,odd name,Normal,-1,,
b0001,training-b,S179f1_data,CAD,1, 179 ,
b0002,training-b,S179f2_data,Normal,-1,179,
b0003,training-b,S18f2_data,Normal,-1,,
c0001,training-c,c1,Valvé,1,,
e00001,training-e,e00105,Normal: 25 °C,-1,,
"""
CINC_LABELS = {
    "a": {"a0001": "1", "a0002": "-1", "a0003": "-1"},
    "b": {"b0001": "1", "b0002": "-1", "b0003": "-1"},
    "c": {"c0001": "1"},
    "e": {"e00001": "-1", "e00002": "1"},
}


def states(path: pathlib.Path, rows: list[tuple[object, object]], variable: str = "state_ans") -> None:
    """A state file; a list in a row becomes a cell inside the cell, as in the published files."""
    table = np.empty((len(rows), 2), dtype=object)
    for row, values in enumerate(rows):
        for column, value in enumerate(values):
            cell: object = value
            if isinstance(value, list):
                cell = np.empty((1, len(value)), dtype=object)
                cell[0, :] = value
            table[row, column] = cell
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, {variable: table})


@pytest.fixture
def cinc(tmp_path: pathlib.Path) -> pathlib.Path:
    source = tmp_path / "challenge"
    for database, labels in CINC_LABELS.items():
        folder = source / f"training-{database}"
        for record in labels:
            sound(folder / f"{record}.wav", 2000)
        (folder / "REFERENCE.csv").write_text("".join(f"{record},{label}\n" for record, label in labels.items()))
        good = "".join(f"{record},{label},1\n" for record, label in labels.items())
        (folder / "REFERENCE_withSQI.csv").write_text(good.replace("-1,1\n", "-1,0\n"))
    (source / "annotations").mkdir()
    (source / "annotations" / "online_appendix_training_set.csv").write_bytes(
        (APPENDIX_HEADER + APPENDIX_ROWS.replace("\n", "\r\n")).encode("latin-1")
    )
    states(
        source / "annotations/hand_corrected/training-a_StateAns/a0001_StateAns.mat",
        [
            (201.0, ["S1"]),
            (np.uint16(401), "systole"),
            ([np.int32(801)], ["S2"]),
            (1001, "diastole"),
            (2001, "(N"),
            (2401, ["N)"]),
            (3001, "S1"),
        ],
    )
    return source


def test_cinc_as_published(cinc: pathlib.Path) -> None:
    recordings, problems = load("cinc2016", cinc)
    assert problems == []
    assert len(recordings) == 9
    first = recordings["a0001"]
    assert first.database == "cinc2016-a"
    assert first.rate_hz == 2000
    assert first.path == cinc / "training-a" / "a0001.wav"
    assert first.labels == {
        "class": "abnormal",
        "abnormal": "1",
        "sqi": "1",
        "diagnosis": "MVP",
        "site": "Left of apex",
    }


def test_cinc_one_is_abnormal(cinc: pathlib.Path) -> None:
    recordings, _ = load("cinc2016", cinc)
    for labels in CINC_LABELS.values():
        for record, label in labels.items():
            assert recordings[record].labels["abnormal"] == {"1": "1", "-1": "0"}[label]
            assert recordings[record].labels["class"] == {"1": "abnormal", "-1": "normal"}[label]


def test_cinc_persons(cinc: pathlib.Path) -> None:
    recordings, _ = load("cinc2016", cinc)
    assert {record: (r.person, r.person_known) for record, r in recordings.items()} == {
        "a0001": ("cinc2016-a-C45", True),  # the tape
        "a0002": ("cinc2016-a-C45", True),
        "a0003": ("a0003", False),
        "b0001": ("cinc2016-b-179", True),
        "b0002": ("cinc2016-b-179", True),
        "b0003": ("b0003", False),
        "c0001": ("c0001", True),  # one recording a subject
        "e00001": ("e00001", False),
        "e00002": ("e00002", False),
    }


def test_cinc_persons_that_are_inferred_count_as_unknown(tmp_path: pathlib.Path) -> None:
    rows = {
        "d0001": "C014PRAU ,Pathologic,1,", "d0002": "C014PRAU2,Pathologic,1,", "d0003": "C014NATO,Normal: NHC,-1,",
        "d0004": "42402,Normal: MARS500,-1,", "d0005": "KamSuKhC,Normal: MARS500,-1,", "d0006": "42405,Pathologic,1,",
        "e00001": "e01268,Normal,-1,94", "e00002": "e01270,Normal,-1, 94 ", "e00003": "e00001,CAD,1,94",
        "e00004": "e00002,CAD,1,",
    }  # fmt: skip
    for record, row in rows.items():
        sound(tmp_path / f"training-{record[0]}" / f"{record}.wav", 2000)
        with (tmp_path / f"training-{record[0]}" / "REFERENCE.csv").open("a") as file:
            file.write(f"{record},{row.split(',')[2]}\n")
    columns = "Challenge record name,Original record name,Diagnosis,Class (-1=normal 1=abnormal),# Raw record,"
    table = [columns + "Subject ID", *(f"{record},{row}," for record, row in rows.items())]
    (tmp_path / "online_appendix_training_set.csv").write_text("\n".join(table))
    recordings, problems = load("cinc2016", tmp_path)
    assert problems == []
    assert not any(recording.person_known for recording in recordings.values())
    assert [recording.person for recording in recordings.values()] == [
        "cinc2016-d-C014PRAU", "cinc2016-d-C014PRAU", "cinc2016-d-C014NATO",
        "cinc2016-d-MARS500", "cinc2016-d-MARS500", "d0006",
        "cinc2016-e-n94", "cinc2016-e-n94", "cinc2016-e-a94", "e00004",
    ]  # fmt: skip


def test_cinc_blanks_and_latin_1_in_the_appendix(cinc: pathlib.Path) -> None:
    recordings, _ = load("cinc2016", cinc)
    assert recordings["a0002"].labels["diagnosis"] == "Normal"
    assert recordings["a0002"].labels["site"] == "Apex when sit"
    assert recordings["c0001"].labels["diagnosis"] == "Valvé"
    assert "site" not in recordings["a0003"].labels
    assert "diagnosis" not in recordings["e00002"].labels


@pytest.mark.parametrize("place", ["annotations", ".", "../annotations"])
def test_cinc_places_of_the_appendix(cinc: pathlib.Path, place: str) -> None:
    (cinc / place).mkdir(exist_ok=True)
    name = "online_appendix_training_set.csv"
    (cinc / "annotations" / name).rename(cinc / place / name)
    recordings, problems = load("cinc2016", cinc)
    assert problems == []
    assert recordings["b0001"].person == "cinc2016-b-179"


def test_cinc_without_the_appendix_nobody_is_known(cinc: pathlib.Path) -> None:
    name = "annotations/online_appendix_training_set.csv"
    (cinc / name).unlink()
    recordings, problems = load("cinc2016", cinc)
    assert not any(recording.person_known for recording in recordings.values())
    assert all(recording.person == record for record, recording in recordings.items())
    (problem,) = problems
    assert problem.path == name
    assert problem.reason.startswith("no subjects: ")


def test_cinc_reference_counts_where_the_appendix_contradicts(cinc: pathlib.Path) -> None:
    replace(cinc / "annotations/online_appendix_training_set.csv", "MVP,1,", "MVP,-1,")
    recordings, problems = load("cinc2016", cinc)
    assert recordings["a0001"].labels["abnormal"] == "1"
    (problem,) = problems
    assert problem.reason == "mislabelled: a0001 is '-1' here and 1 in REFERENCE.csv, which counts"


def test_cinc_states(cinc: pathlib.Path) -> None:
    recordings, _ = load("cinc2016", cinc)
    assert recordings["a0001"].annotations == (  # sample 1 is at 0 s
        (0.1, 0.2, S1),
        (0.2, 0.4, SYSTOLE),
        (0.4, 0.5, S2),
        (0.5, 1.0, DIASTOLE),
        (1.0, 1.2, UNANNOTATED),  # noise
        (1.2, 1.5, UNANNOTATED),  # between the noise's end and the next sound
        (1.5, 2.0, S1),  # until the recording ends
    )
    assert recordings["a0002"].annotations == ()


@pytest.mark.parametrize("place", ["training-a/annotations", "../annotations"])
def test_cinc_places_of_the_states(cinc: pathlib.Path, place: str) -> None:
    (cinc / place).mkdir()
    shutil.move(cinc / "annotations/hand_corrected", cinc / place)
    assert len(load("cinc2016", cinc)[0]["a0001"].annotations) == 7


def test_cinc_one_training_folder_alone(cinc: pathlib.Path) -> None:
    recordings, problems = load("cinc2016", cinc / "training-a")
    assert problems == []
    assert list(recordings) == ["a0001", "a0002", "a0003"]
    assert recordings["a0001"].person == "cinc2016-a-C45"
    assert len(recordings["a0001"].annotations) == 7


def test_cinc_validation_holds_copies_and_is_not_read(cinc: pathlib.Path) -> None:
    shutil.copytree(cinc / "training-a", cinc / "validation")
    recordings, problems = load("cinc2016", cinc)
    assert problems == []
    assert len(recordings) == 9


def test_cinc_windows_line_ends_blank_lines_and_a_byte_order_mark(cinc: pathlib.Path) -> None:
    path = cinc / "training-a" / "REFERENCE.csv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\r\n") + b" , \r\n")
    recordings, problems = load("cinc2016", cinc)
    assert problems == []
    assert len(recordings) == 9


def test_cinc_labels_from_the_table_with_sqi(cinc: pathlib.Path) -> None:
    (cinc / "training-a" / "REFERENCE.csv").unlink()
    recordings, problems = load("cinc2016", cinc)
    assert problems == []
    assert recordings["a0001"].labels["abnormal"] == "1"
    assert (recordings["a0001"].labels["sqi"], recordings["a0002"].labels["sqi"]) == ("1", "0")


def test_cinc_labels_from_headers(cinc: pathlib.Path) -> None:
    folder = cinc / "training-a"
    for path in folder.glob("REFERENCE*"):
        path.unlink()
    for record, word in (("a0001", "# Abnormal"), ("a0002", "#Normal ")):
        text = f"{record} 1 2000 4000\r\n{record}.wav 16+44 1 16 0 0 0 0 PCG\r\n{word}\r\n"
        (folder / f"{record}.hea").write_text(text)
    recordings, problems = load("cinc2016", cinc)
    assert (recordings["a0001"].labels["class"], recordings["a0002"].labels["class"]) == ("abnormal", "normal")
    assert problems == [Problem("training-a/a0003.wav", "unlabelled: no label in the .hea file")]


def test_cinc_without_labels(cinc: pathlib.Path) -> None:
    for path in (cinc / "training-b").glob("REFERENCE*"):
        path.unlink()
    with pytest.raises(DatasetError, match=r"training-b: no labels; it needs REFERENCE\.csv"):
        load("cinc2016", cinc)


def cinc_write(name: str, text: str) -> Change:
    def change(folder: pathlib.Path) -> None:
        (folder / name).write_text(text)

    return change


def cinc_states(*rows: tuple[object, object], variable: str = "state_ans") -> Change:
    def change(folder: pathlib.Path) -> None:
        path = folder.parent / "annotations/hand_corrected/training-a_StateAns/a0001_StateAns.mat"
        states(path, list(rows), variable)

    return change


def cinc_bytes(name: str, change: Callable[[bytes], bytes]) -> Change:
    def write(folder: pathlib.Path) -> None:
        path = folder.parent / name
        path.write_bytes(change(path.read_bytes()))

    return write


MAT = "annotations/hand_corrected/training-a_StateAns/a0001_StateAns.mat"
REFERENCE = "training-a/REFERENCE.csv"
WAV = "training-a/a0001.wav"
# What is done to training-a, where it is listed, as what, and whether record a0001 is left out.
CINC_LISTED: dict[str, tuple[Change, str, str, bool]] = {
    "no wav": (lambda f: (f / "a0001.wav").unlink(), WAV, "missing: ", True),
    "wav cut": (cinc_bytes(WAV, lambda b: b[:-99]), WAV, "truncated: ", True),
    "wav empty": (cinc_bytes(WAV, lambda _: b""), WAV, "empty: ", True),
    "wav is text": (cinc_bytes(WAV, lambda _: b"not found" * 99), WAV, "not audio: ", True),
    "no row": (
        cinc_write("REFERENCE.csv", "a0002,-1\na0003,-1\n"),
        WAV,
        "unlabelled: no label in REFERENCE.csv",
        True,
    ),
    "unknown label": (
        cinc_write("REFERENCE.csv", "a0001,2\na0002,-1\na0003,-1\n"),
        REFERENCE,
        "mislabelled: line 1, record a0001: label '2', allowed are 1 (abnormal) and -1 (normal)",
        True,
    ),
    "no label": (
        cinc_write("REFERENCE.csv", "\na0001\na0002,-1\na0003,-1\n"),
        REFERENCE,
        "mislabelled: line 2, record a0001: label ''",
        True,
    ),
    "two labels": (
        cinc_write("REFERENCE.csv", "a0001,1\na0002,-1\na0001,-1\na0003,-1\n"),
        REFERENCE,
        "mislabelled: line 3, record a0001: label -1 is the second for this record (first: 1)",
        True,
    ),
    "same label twice": (
        cinc_write("REFERENCE.csv", "a0001,1\na0002,-1\na0001,1\na0003,-1\n"),
        REFERENCE,
        "mislabelled: line 3, record a0001: label 1 is the second",
        False,
    ),
    "sqi table contradicts": (
        cinc_write("REFERENCE_withSQI.csv", "a0001,-1,1\n"),
        WAV,
        "mislabelled: REFERENCE.csv says 1, REFERENCE_withSQI.csv says -1",
        True,
    ),
    "header contradicts": (
        cinc_write("a0001.hea", "a0001 1 2000 4000\na0001.wav 16+44 1 16 0 0 0 0 PCG\n# Normal\n"),
        WAV,
        "mislabelled: REFERENCE.csv says 1, REFERENCE_withSQI.csv says 1, the .hea file says -1",
        True,
    ),
    "unknown sqi": (
        cinc_write("REFERENCE_withSQI.csv", "a0001,1,good\n"),
        "training-a/REFERENCE_withSQI.csv",
        "mislabelled: line 1, record a0001: sqi 'good', allowed are 0 and 1",
        False,
    ),
    "appendix row too long": (
        cinc_bytes("annotations/online_appendix_training_set.csv", lambda b: b.replace(b"MVP", b"MVP,mild")),
        "annotations/online_appendix_training_set.csv",
        "mislabelled: line 2 has 8 fields, the header 7",
        False,
    ),
    "states unsorted": (
        cinc_states((201, "S1"), (101, "systole")),
        MAT,
        "annotation: sample index 101 follows 201",
        False,
    ),
    "states repeat": (cinc_states((201, "S1"), (201, "systole")), MAT, "annotation: sample index 201 foll", False),
    "state before the start": (cinc_states((0, "S1"), (9, "systole")), MAT, "annotation: sample indices 0 to", False),
    "state after the end": (cinc_states((1, "S1"), (4001, "S2")), MAT, "annotation: sample indices 1 to 4", False),
    "unknown state": (cinc_states((1, "S1"), (9, "S5")), MAT, "annotation: unknown state 'S5'", False),
    "index is text": (cinc_states((1, "S1"), ("9", "S2")), MAT, "annotation: sample index 9 is not", False),
    "index is no number": (cinc_states((1, "S1"), (np.nan, "S2")), MAT, "annotation: sample index", False),
    "index between samples": (cinc_states((1, "S1"), (9.5, "S2")), MAT, "annotation: sample index", False),
    "cell with two values": (cinc_states((1, "S1"), ([9, 10], "S2")), MAT, "annotation: a cell of 'state_", False),
    "another variable": (cinc_states((1, "S1"), variable="states"), MAT, "annotation: the file has no vari", False),
    "states cut": (cinc_bytes(MAT, lambda b: b[: len(b) // 2]), MAT, "annotation: not a MATLAB file", False),
    "states are text": (cinc_bytes(MAT, lambda _: b"S1 systole" * 99), MAT, "annotation: not a MATLAB file", False),
    "states empty": (cinc_bytes(MAT, lambda _: b""), MAT, "annotation: not a MATLAB file", False),
}


@pytest.mark.parametrize("kind", CINC_LISTED)
def test_cinc_lists_what_is_damaged(cinc: pathlib.Path, kind: str) -> None:
    change, path, reason, left_out = CINC_LISTED[kind]
    change(cinc / "training-a")
    recordings, problems = load("cinc2016", cinc)
    (problem,) = problems
    assert problem.path == path
    assert problem.reason.startswith(reason)
    assert set(recordings) == {record for labels in CINC_LABELS.values() for record in labels} - (
        {"a0001"} if left_out else set()
    )
    if path == MAT:
        assert recordings["a0001"].annotations == ()
    if kind == "unknown sqi":
        assert "sqi" not in recordings["a0001"].labels


APPENDIX = "annotations/online_appendix_training_set.csv"
CINC_REFUSED = {
    "0 and 1": (REFERENCE, "a0001,1\na0002,0\na0003,0\n", "column 2 .label. holds 0 and 1, .*1 is abnormal, -1 is"),
    "words": (REFERENCE, "a0001,Abnormal\na0002,Normal\n", "column 2 .label. holds 'Abnormal', 'Normal'"),
    "semicolons": (REFERENCE, "a0001;1\na0002;-1\n", "no row has two fields with a comma between"),
    "empty": (REFERENCE, "\n \n", "the table is empty"),
    "binary": (REFERENCE, "a0001,1\0\0", "not a CSV table .it holds zero bytes"),
    "open quote": (REFERENCE, 'a0001,"1\na0002,-1\n', "not a CSV table .line 2: unexpected end of data"),
    "sqi table re-coded": ("training-a/REFERENCE_withSQI.csv", "a0001,1,1\na0002,0,1\n", "holds 0 and 1"),
    "appendix without subjects": (APPENDIX, APPENDIX_HEADER.replace("Subject ID", "Id"), "no column 'subject id'"),
    "appendix header only": (APPENDIX, APPENDIX_HEADER, "no row has the 7 fields"),
    "appendix is another file": (APPENDIX, "<html>404</html>", "no column 'challenge record name'"),
}


@pytest.mark.parametrize("kind", CINC_REFUSED)
def test_cinc_refuses_a_malformed_table(cinc: pathlib.Path, kind: str) -> None:
    path, text, message = CINC_REFUSED[kind]
    (cinc / path).write_text(text)
    with pytest.raises(DatasetError, match=f"{path}: .*{message}"):
        load("cinc2016", cinc)


# ------------------------------------------------------------------------------------------------------- CirCor

CIRCOR_KEYS = [
    "Age", "Sex", "Height", "Weight", "Pregnancy status", "Murmur", "Murmur locations", "Most audible location",
    "Systolic murmur timing", "Systolic murmur shape", "Systolic murmur grading", "Systolic murmur pitch",
    "Systolic murmur quality", "Diastolic murmur timing", "Diastolic murmur shape", "Diastolic murmur grading",
    "Diastolic murmur pitch", "Diastolic murmur quality", "Campaign", "Additional ID", "Outcome",
]  # fmt: skip
PRESENT = {
    "Age": "Child", "Sex": "Female", "Height": "115.0", "Weight": "19.1", "Pregnancy status": "False",
    "Murmur": "Present", "Murmur locations": "AV+TV", "Most audible location": "TV",
    "Systolic murmur timing": "Holosystolic", "Systolic murmur shape": "Plateau",
    "Systolic murmur grading": "II/VI", "Systolic murmur pitch": "Low", "Systolic murmur quality": "Harsh",
    "Campaign": "CC2015", "Outcome": "Abnormal",
}  # fmt: skip
PATIENTS = {  # patient -> (its recordings, what is known)
    "2530": (["AV", "MV", "Phc"], PRESENT),
    "9979": (["AV_1", "AV_2", "MV"], {"Murmur": "Absent", "Outcome": "Normal", "Additional ID": "50782"}),
    "50782": (["MV_1", "PV"], {"Murmur": "Absent", "Outcome": "Abnormal", "Pregnancy status": "True"}),
    "68001": (["TV"], {"Murmur": "Unknown", "Outcome": "Normal", "Additional ID": "1234.0"}),
    "68002": (
        ["PV"],
        {"Murmur": "Present", "Murmur locations": "PV", "Diastolic murmur grading": "I/IV", "Additional ID": "68001"},
    ),
}
TSV = "0\t0.25\t0\n0.25\t0.35\t1\n0.3493\t0.6\t2\n0.6\t0.7\t3\n0.7\t0.7\t0\n0.7\t1.5\t4\n1.5\t2\t0\n"


def circor_write(source: pathlib.Path, patients: dict[str, tuple[list[str], dict[str, str]]]) -> None:
    folder = source / "training_data"
    folder.mkdir(parents=True)
    table = ["Patient ID,Locations," + ",".join(CIRCOR_KEYS)]
    for patient, (names, known) in patients.items():
        lines = [f"{patient} {len(names)} 4000"]
        for name in names:
            stem, site = f"{patient}_{name}", name.split("_")[0]
            lines.append(f"{site} {stem}.hea {stem}.wav {stem}.tsv")
            sound(folder / f"{stem}.wav", 4000)
            (folder / f"{stem}.hea").write_text(f"{stem} 1 4000 8000\n{stem}.wav 16+44 1 16 0 0 0 0 {site}\n")
            (folder / f"{stem}.tsv").write_text(TSV)
        values = [known.get(key, "nan") for key in CIRCOR_KEYS]
        lines += [f"#{key}: {value}" for key, value in zip(CIRCOR_KEYS, values, strict=True)]
        (folder / f"{patient}.txt").write_text("\n".join(lines) + "\n\n")
        table.append(f"{patient},{'+'.join(name.split('_')[0] for name in names)}," + ",".join(values))
    (source / "training_data.csv").write_text("\n".join(table) + "\n")
    (source / "LICENSE.txt").write_text("ODC Attribution License (ODC-By)\n")


@pytest.fixture
def circor(tmp_path: pathlib.Path) -> pathlib.Path:
    source = tmp_path / "circor"
    circor_write(source, PATIENTS)
    # As published: the one recording numbered _1 whose annotation is not.
    (source / "training_data/50782_MV_1.tsv").rename(source / "training_data/50782_MV.tsv")
    return source


def test_circor_as_published(circor: pathlib.Path) -> None:
    recordings, problems = load("circor", circor)
    assert problems == []
    assert len(recordings) == 10
    first = recordings["2530_AV"]
    assert (first.database, first.rate_hz) == ("circor", 4000)
    assert first.path == circor / "training_data" / "2530_AV.wav"
    assert first.labels == {
        "class": "abnormal",
        "abnormal": "1",
        "murmur": "1",
        "murmur_status": "Present",
        "murmur_audible": "1",
        "site": "AV",
        "most_audible_site": "TV",
        "systolic_timing": "Holosystolic",
        "systolic_shape": "Plateau",
        "systolic_grading": "II/VI",
        "systolic_pitch": "Low",
        "systolic_quality": "Harsh",
        "age": "Child",
        "sex": "Female",
        "height_cm": "115.0",
        "weight_kg": "19.1",
        "pregnant": "0",
        "campaign": "CC2015",
    }


def test_circor_murmur_is_audible_only_at_its_locations(circor: pathlib.Path) -> None:
    recordings, _ = load("circor", circor)
    assert {record: recordings[record].labels.get("murmur_audible") for record in recordings} == {
        "2530_AV": "1", "2530_MV": "0", "2530_Phc": "0",
        "9979_AV_1": "0", "9979_AV_2": "0", "9979_MV": "0", "50782_MV_1": "0", "50782_PV": "0",
        "68001_TV": None,  # unknown
        "68002_PV": "1",
    }  # fmt: skip


def test_circor_unknown_is_neither_present_nor_absent(circor: pathlib.Path) -> None:
    recordings, _ = load("circor", circor)
    assert recordings["68001_TV"].labels == {
        "class": "normal", "abnormal": "0", "murmur_status": "Unknown", "site": "TV",
    }  # fmt: skip
    assert recordings["9979_MV"].labels["murmur"] == "0"
    assert recordings["50782_PV"].labels["pregnant"] == "1"
    assert recordings["68002_PV"].labels["diastolic_grading"] == "I/IV"


def test_circor_without_an_outcome_the_class_is_the_murmur(circor: pathlib.Path) -> None:
    recordings, _ = load("circor", circor)
    assert recordings["68002_PV"].labels["class"] == "present"
    assert "abnormal" not in recordings["68002_PV"].labels


def test_circor_additional_id_links_two_ids_of_one_person(circor: pathlib.Path) -> None:
    recordings, _ = load("circor", circor)
    assert recordings["2530_AV"].person == "circor-2530"
    assert recordings["9979_MV"].person == "circor-9979"
    assert recordings["50782_PV"].person == "circor-9979"
    assert recordings["68001_TV"].person == "circor-1234"  # the linked id is not in this folder
    assert recordings["68002_PV"].person == "circor-1234"  # linked by way of 68001
    assert all(recording.person_known for recording in recordings.values())


def test_circor_locations_repeat(circor: pathlib.Path) -> None:
    recordings, _ = load("circor", circor)
    assert recordings["9979_AV_1"].labels["site"] == recordings["9979_AV_2"].labels["site"] == "AV"
    assert recordings["9979_AV_1"].path != recordings["9979_AV_2"].path


def test_circor_annotation_under_the_name_without_a_number(circor: pathlib.Path) -> None:
    (circor / "training_data/50782_MV.tsv").write_text("0\t2\t4\n")
    recordings, problems = load("circor", circor)
    assert problems == []
    assert recordings["50782_MV_1"].annotations == ((0.0, 2.0, DIASTOLE),)


def test_circor_folders_are_not_files(circor: pathlib.Path) -> None:
    paths = [sorted((circor / "training_data").glob(f"*{suffix}"))[0] for suffix in (".hea", ".tsv")]
    for path in paths:
        path.unlink()
        path.mkdir()
    recordings, problems = datasets.load("circor", circor)
    missing = [problem.path for problem in problems if problem.reason.startswith("missing: no such file")]
    assert sorted(missing) == sorted(f"training_data/{path.name}" for path in paths)
    assert recordings


def test_circor_states(circor: pathlib.Path) -> None:
    recordings, _ = load("circor", circor)
    assert recordings["2530_AV"].annotations == (
        (0.0, 0.25, UNANNOTATED),
        (0.25, 0.35, S1),
        (0.35, 0.6, SYSTOLE),  # 0.7 ms of overlap, from rounding
        (0.6, 0.7, S2),
        (0.7, 1.5, DIASTOLE),  # the empty interval before it is gone
        (1.5, 2.0, UNANNOTATED),
    )


@pytest.mark.parametrize("layout", ["the folder itself", "flat", "no table", "table inside"])
def test_circor_layouts(circor: pathlib.Path, layout: str) -> None:
    expected, _ = load("circor", circor)
    source = circor
    if layout == "the folder itself":
        source = circor / "training_data"
    elif layout == "flat":
        for path in (circor / "training_data").iterdir():
            path.rename(circor / path.name)
        (circor / "training_data").rmdir()
    elif layout == "no table":
        (circor / "training_data.csv").unlink()
    else:
        (circor / "training_data.csv").rename(circor / "training_data/training_data.csv")
    recordings, problems = load("circor", source)
    assert problems == []
    assert {r.id: (r.person, r.labels, r.annotations) for r in recordings.values()} == {
        r.id: (r.person, r.labels, r.annotations) for r in expected.values()
    }


def test_circor_headers_of_another_release(circor: pathlib.Path) -> None:
    expected, _ = load("circor", circor)
    replace(circor / "training_data.csv", "Patient ID,Locations,Age,Sex", "Patient ID,Recording locations:,AGE,sex:")
    replace(circor / "training_data/2530.txt", "#Murmur locations:", "#murmur  Locations:")
    assert load("circor", circor) == (expected, [])


def drop(circor: pathlib.Path, keys: tuple[str, ...]) -> None:
    """Rewrites a corpus as in a release that did not have these fields."""
    for path in (circor / "training_data").glob("*.txt"):
        lines = path.read_text().splitlines()
        path.write_text("\n".join(line for line in lines if not line.startswith(tuple(f"#{key}:" for key in keys))))
    rows = [line.split(",") for line in (circor / "training_data.csv").read_text().splitlines()]
    columns = [column for column, name in enumerate(rows[0]) if name not in keys]
    table = "\n".join(",".join(row[column] for column in columns) for row in rows)
    (circor / "training_data.csv").write_text(table)


def test_circor_first_release(circor: pathlib.Path) -> None:
    drop(circor, ("Outcome", "Campaign", "Additional ID"))
    recordings, problems = load("circor", circor)
    assert len(recordings) == 10
    assert recordings["9979_MV"].labels == {
        "class": "absent", "murmur": "0", "murmur_status": "Absent", "murmur_audible": "0", "site": "MV",
    }  # fmt: skip
    assert recordings["50782_PV"].person == "circor-50782"
    (problem,) = problems
    assert problem.path == "training_data"
    assert problem.reason.startswith("no links: no file has 'Additional ID'")


def test_circor_what_one_file_lacks_the_other_gives(circor: pathlib.Path) -> None:
    replace(circor / "training_data/2530.txt", "#Outcome: Abnormal", "#Outcome: nan")
    replace(circor / "training_data/9979.txt", "#Outcome: Normal\n", "")
    recordings, problems = load("circor", circor)
    assert problems == []
    assert recordings["2530_AV"].labels["abnormal"] == "1"
    assert recordings["9979_MV"].labels["abnormal"] == "0"


def circor_replace(name: str, old: str, new: str) -> Change:
    return lambda source: replace(source / name, old, new)


def circor_text(name: str, text: str) -> Change:
    def change(source: pathlib.Path) -> None:
        (source / name).write_text(text)

    return change


TXT = "training_data/2530.txt"
ALL_2530 = {"2530_AV", "2530_MV", "2530_Phc"}
# What is done, what is listed, as what, and which recordings are left out.
CIRCOR_LISTED: dict[str, tuple[Change, str, str, set[str]]] = {
    "no wav": (lambda s: (s / "training_data/2530_AV.wav").unlink(), "2530_AV.wav", "missing: ", {"2530_AV"}),
    "wav cut": (
        lambda s: (s / "training_data/2530_AV.wav").write_bytes((s / "training_data/2530_AV.wav").read_bytes()[:999]),
        "2530_AV.wav",
        "truncated: ",
        {"2530_AV"},
    ),
    "wav not listed": (lambda s: sound(s / "training_data/77_AV.wav", 4000), "77_AV.wav", "unlisted: ", set()),
    "wav listed twice": (
        circor_replace(TXT, "MV 2530_MV.hea 2530_MV.wav", "MV 2530_MV.hea 9979_AV_1.wav"),
        "9979.txt",
        "duplicate: 9979_AV_1.wav is listed in 2530.txt already",
        {"2530_MV"},
    ),
    "no hea": (lambda s: (s / "training_data/2530_AV.hea").unlink(), "2530_AV.hea", "missing: ", set()),
    "no tsv": (lambda s: (s / "training_data/2530_AV.tsv").unlink(), "2530_AV.tsv", "missing: ", set()),
    "no txt": (lambda s: (s / "training_data/68001.txt").unlink(), "68001.txt", "missing: ", {"68001_TV"}),
    "other rate": (
        circor_replace("training_data/2530_AV.hea", "1 4000 8000", "1 2000 4000"),
        "2530_AV.hea",
        "header: the first line is '2530_AV 1 2000 4000', 2530_AV.wav has a rate of 4000 Hz",
        {"2530_AV"},
    ),
    "hea empty": (circor_text("training_data/2530_AV.hea", ""), "2530_AV.hea", "header: the first", {"2530_AV"}),
    "txt empty": (circor_text(TXT, ""), "2530.txt", "header: the first line must be", ALL_2530),
    "txt of another": (circor_replace(TXT, "2530 3 4000", "2531 3 4000"), "2530.txt", "header: ", ALL_2530),
    "txt counts wrong": (
        circor_replace(TXT, "2530 3 4000", "2530 4 4000"),
        "2530.txt",
        "header: the first line announces 4 recordings, the file lists 3",
        ALL_2530,
    ),
    "unknown site": (circor_replace(TXT, "MV 2530_MV.hea", "XV 2530_MV.hea"), "2530.txt", "header: 'XV 2", ALL_2530),
    "murmur contradicts": (
        circor_replace(TXT, "#Murmur: Present", "#Murmur: Absent"),
        "2530.txt",
        "mislabelled: Murmur is Absent here and Present in training_data.csv",
        ALL_2530,
    ),
    "outcome contradicts": (
        circor_replace(TXT, "#Outcome: Abnormal", "#Outcome: Normal"),
        "2530.txt",
        "mislabelled: Outcome is Normal here and Abnormal in training_data.csv",
        ALL_2530,
    ),
    "systolic grade": (
        circor_replace(TXT, "II/VI", "II/IV"),
        "2530.txt",
        "mislabelled: Systolic murmur grading is 'II/IV', allowed are I/VI, II/VI, III/VI",
        ALL_2530,
    ),
    "diastolic grade": (
        circor_replace("training_data/68002.txt", "I/IV", "1/4"),
        "68002.txt",
        "mislabelled: Diastolic murmur grading is '1/4'",
        {"68002_PV"},
    ),
    "tsv unsorted": (
        circor_text("training_data/2530_AV.tsv", "1\t1.5\t4\n0.2\t1\t1\n"),
        "2530_AV.tsv",
        "annotation: line 2: it starts at 0.2 s, before the previous end at 1.5 s",
        set(),
    ),
    "tsv overlaps": (
        circor_text("training_data/2530_AV.tsv", "0\t1.5\t4\n1.48\t1.8\t1\n"),
        "2530_AV.tsv",
        "annotation: line 2: it starts at 1.48 s",
        set(),
    ),
    "tsv backwards": (circor_text("training_data/2530_AV.tsv", "1\t0.5\t4\n"), "2530_AV.tsv", "annotation: ", set()),
    "tsv too long": (
        circor_text("training_data/2530_AV.tsv", "0\t2.1\t4\n"),
        "2530_AV.tsv",
        "annotation: line 1: it ends at 2.1 s, the recording at 2.000 s",
        set(),
    ),
    "tsv unknown state": (
        circor_text("training_data/2530_AV.tsv", "0\t1\t5\n"),
        "2530_AV.tsv",
        "annotation: line 1: unknown state '5'",
        set(),
    ),
    "tsv words": (
        circor_text("training_data/2530_AV.tsv", "start\tend\tstate\n"),
        "2530_AV.tsv",
        "annotation: line 1 must be start, end and state as numbers",
        set(),
    ),
    "tsv nan": (circor_text("training_data/2530_AV.tsv", "0\tnan\t1\n"), "2530_AV.tsv", "annotation: line 1", set()),
    "tsv two columns": (circor_text("training_data/2530_AV.tsv", "0\t1\n"), "2530_AV.tsv", "annotation: line", set()),
}


@pytest.mark.parametrize("kind", CIRCOR_LISTED)
def test_circor_lists_what_is_damaged(circor: pathlib.Path, kind: str) -> None:
    everything, _ = load("circor", circor)
    change, path, reason, left_out = CIRCOR_LISTED[kind]
    change(circor)
    recordings, problems = load("circor", circor)
    listed = reasons(problems, f"training_data/{path}")
    assert len(listed) == 1
    assert listed[0].startswith(reason)
    # A recording that is no longer listed is itself among the problems.
    follows = {"no txt": ["68001_TV.wav"], "wav listed twice": ["2530_MV.wav"]}.get(kind, [])
    assert {problem.path for problem in problems} == {f"training_data/{name}" for name in (path, *follows)}
    assert everything.keys() - recordings.keys() == left_out
    if path.endswith(".tsv"):
        used = {"tsv unsorted": ((0.2, 1.0, S1), (1.0, 1.5, DIASTOLE)),
                "tsv overlaps": ((0.0, 1.48, DIASTOLE), (1.48, 1.5, UNANNOTATED), (1.5, 1.8, S1))}  # fmt: skip
        assert recordings["2530_AV"].annotations == used.get(kind, ())


@pytest.mark.parametrize("value", ["Maybe", "nan"])
def test_circor_murmur_must_be_known(circor: pathlib.Path, value: str) -> None:
    (circor / "training_data.csv").unlink()
    replace(circor / TXT, "#Murmur: Present", f"#Murmur: {value}")
    recordings, problems = load("circor", circor)
    (problem,) = problems
    assert problem.path == TXT
    assert problem.reason.startswith("mislabelled: ")
    assert problem.reason.endswith("Present, Unknown, Absent")
    assert not any(record.startswith("2530") for record in recordings)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("2530,AV+MV+Phc,Child", "2530,AV+MV+Phc,Child,Child"), "mislabelled: line 2 has 24 fields, the header 23"),
        (("50782,MV+PV", "9979,MV+PV"), "duplicate: line 4 is the second for patient 9979; the first counts"),
    ],
)
def test_circor_lists_a_bad_row_and_falls_back_on_the_txt(
    circor: pathlib.Path, change: tuple[str, str], reason: str
) -> None:
    expected, _ = load("circor", circor)
    replace(circor / "training_data.csv", *change)
    assert load("circor", circor) == (expected, [Problem("training_data.csv", reason)])


CIRCOR_REFUSED = {
    "no murmur": ("Patient ID,Age\n2530,Child\n", "no column 'murmur' among patient id, age"),
    "no patient": ("Patient,Murmur\n2530,Present\n", "no column 'patient id'"),
    "names for ids": ("Patient ID,Murmur\nJohn,Present\n", "column 'patient id' holds no number .first: 'John'"),
    "semicolons": ("Patient ID;Murmur\n2530;Present\n", "no column 'patient id'"),
    "all rows short": ("Patient ID,Murmur,Outcome\n2530,Present\n9979,Absent\n", "no row has the 3 fields"),
    "empty": ("", "the table is empty"),
}


@pytest.mark.parametrize("kind", CIRCOR_REFUSED)
def test_circor_refuses_a_malformed_table(circor: pathlib.Path, kind: str) -> None:
    text, message = CIRCOR_REFUSED[kind]
    (circor / "training_data.csv").write_text(text)
    with pytest.raises(DatasetError, match=rf"training_data\.csv: {message}"):
        load("circor", circor)


# ------------------------------------------------------------------------------------------------------- PASCAL

SET_A = """\
dataset,fname,label,sublabel
a,set_a/artifact__201105040918.wav,artifact,
a,set_a/extrahls__201101070538.wav,extrahls,
a,set_a/murmur__201101051104.wav,murmur,
a,set_a/normal__201102081321.wav,normal,
a,set_a/__201012172010.wav,,
"""
FILES_A = [
    "artifact__201105040918", "extrahls__201101070538", "murmur__201101051104", "normal__201102081321",
    "Aunlabelledtest__201012172010",
]  # fmt: skip
TIMING = """\
fname,cycle,sound,location
set_a/normal__201102081321.wav,1,S1,4410
set_a/normal__201102081321.wav,1,S2,17640
set_a/normal__201102081321.wav,2,S2,66150
set_a/normal__201102081321.wav,2,S1,44100
"""
# The published table, and the names that the published files have.
SET_B = """\
dataset,fname,label,sublabel
b,set_b/Btraining_extrastole_127_1306764300147_C2.wav,extrastole,
b,set_b/Btraining_murmur_171_1307971016233_D.wav,murmur,
b,set_b/Btraining_murmur_noisymurmur_171_1307971016233_D.wav,murmur,noisymurmur
b,set_b/Btraining_murmur_Btraining_noisymurmur_162_1307101835989_B_1.wav,murmur,noisymurmur
b,set_b/Btraining_noisynormal_101_1305030823364_B.wav,normal,noisynormal
b,set_b/Btraining_normal_127_1306764300147_A.wav,normal,
b,set_b/Bunlabelledtest_101_1305030823364_A.wav,,
b,set_b/Bunlabelledtest_101_1305030823364_D.wav,,
"""
FILES_B = [
    "extrastole__127_1306764300147_C2", "murmur__171_1307971016233_D", "murmur_noisymurmur_171_1307971016233_D",
    "murmur_noisymurmur_162_1307101835989_B_1", "normal_noisynormal_101_1305030823364_B",
    "normal__127_1306764300147_A",
    "Bunlabelledtest__101_1305030823364_A", "Bunlabelledtest__101_1305030823364_D",
]  # fmt: skip
UNLABELLED = Problem(
    "set_a.csv, set_b.csv", "unlabelled: 3 recordings have no label (the challenge kept them for its test)"
)


@pytest.fixture
def pascal(tmp_path: pathlib.Path) -> pathlib.Path:
    source = tmp_path / "pascal"
    for name in FILES_A:
        sound(source / "set_a" / f"{name}.wav", 44100)
    for name in FILES_B:
        sound(source / "set_b" / f"{name}.wav", 4000)
    (source / "set_a.csv").write_text(SET_A)
    (source / "set_b.csv").write_text(SET_B)
    (source / "set_a_timing.csv").write_text(TIMING)
    return source


def test_pascal_as_published(pascal: pathlib.Path) -> None:
    recordings, problems = load("pascal", pascal)
    assert set(recordings) == {f"a_{name}" for name in FILES_A[:-1]} | {f"b_{name}" for name in FILES_B[:-2]}
    assert problems == [UNLABELLED]
    normal, murmur = recordings["a_normal__201102081321"], recordings["b_murmur__171_1307971016233_D"]
    assert (normal.database, normal.rate_hz) == ("pascal-a", 44100)
    assert (murmur.database, murmur.rate_hz) == ("pascal-b", 4000)
    assert murmur.path == pascal / "set_b" / "murmur__171_1307971016233_D.wav"


def test_pascal_labels(pascal: pathlib.Path) -> None:
    recordings, _ = load("pascal", pascal)
    expected = {
        "a_artifact__201105040918": ("artifact", None, None),
        "a_extrahls__201101070538": ("extrahls", "1", None),
        "a_murmur__201101051104": ("murmur", "1", "1"),
        "a_normal__201102081321": ("normal", "0", "0"),
        "b_extrastole__127_1306764300147_C2": ("extrastole", "1", None),
    }
    for record, labels in expected.items():
        read = recordings[record].labels
        assert (read["class"], read.get("abnormal"), read.get("murmur")) == labels


def test_pascal_noisy_clips(pascal: pathlib.Path) -> None:
    recordings, _ = load("pascal", pascal)
    clean, noisy = (recordings[f"b_murmur_{kind}_171_1307971016233_D"].labels for kind in ("", "noisymurmur"))
    assert (clean["noisy"], clean.get("sublabel")) == ("0", None)
    assert (noisy["noisy"], noisy["sublabel"]) == ("1", "noisymurmur")


def test_pascal_a_noisy_name_or_sublabel_suffices(pascal: pathlib.Path) -> None:
    replace(pascal / "set_b.csv", "normal,noisynormal", "normal,")
    replace(pascal / "set_b.csv", "A.wav,normal,", "A.wav,normal,noisy")
    recordings, _ = load("pascal", pascal)
    assert recordings["b_normal_noisynormal_101_1305030823364_B"].labels["noisy"] == "1"
    assert recordings["b_normal__127_1306764300147_A"].labels["noisy"] == "1"


def test_pascal_persons(pascal: pathlib.Path) -> None:
    recordings, _ = load("pascal", pascal)
    assert recordings["a_normal__201102081321"].person == "a_normal__201102081321"
    assert not recordings["a_normal__201102081321"].person_known
    assert {(r.person, r.person_known) for r in recordings.values() if r.database == "pascal-b"} == {
        ("pascal-b-101", True), ("pascal-b-127", True), ("pascal-b-162", True), ("pascal-b-171", True),
    }  # fmt: skip
    # One subject, two labels: both stay.
    assert recordings["b_normal__127_1306764300147_A"].person == "pascal-b-127"
    assert recordings["b_extrastole__127_1306764300147_C2"].person == "pascal-b-127"


def test_pascal_timing_is_in_samples_at_44100_hz(pascal: pathlib.Path) -> None:
    sound(pascal / "set_a" / "normal__201102081321.wav", 4000)  # whatever the file was resampled to
    recordings, _ = load("pascal", pascal)
    assert recordings["a_normal__201102081321"].annotations == (
        (0.1, 0.1, S1), (0.4, 0.4, S2), (1.0, 1.0, S1), (1.5, 1.5, S2),
    )  # fmt: skip
    assert recordings["a_murmur__201101051104"].annotations == ()


def test_pascal_names_as_on_disk(pascal: pathlib.Path) -> None:
    expected, _ = load("pascal", pascal)
    rows = [row.split(",") for row in SET_B.splitlines()]
    for row, name in zip(rows[1:], FILES_B, strict=True):
        row[1] = f"set_b/{name}.wav"
    (pascal / "set_b.csv").write_text("\r\n".join(map(",".join, rows)))
    assert load("pascal", pascal) == (expected, [UNLABELLED])


@pytest.mark.parametrize("letter", ["a", "b"])
def test_pascal_either_set_alone(pascal: pathlib.Path, letter: str) -> None:
    other = {"a": "b", "b": "a"}[letter]
    (pascal / f"set_{other}.csv").unlink()
    shutil.rmtree(pascal / f"set_{other}")
    (pascal / "set_a_timing.csv").unlink()
    recordings, _ = load("pascal", pascal)
    assert {recording.database for recording in recordings.values()} == {f"pascal-{letter}"}


def pascal_replace(name: str, old: str, new: str) -> Change:
    return lambda source: replace(source / name, old, new)


A_NORMAL, B_NORMAL = "set_a/normal__201102081321.wav", "set_b/normal__127_1306764300147_A.wav"
PASCAL_LISTED: dict[str, tuple[Change, str, str, set[str]]] = {
    "no wav": (
        lambda s: (s / B_NORMAL).unlink(),
        "set_b/Btraining_normal_127_1306764300147_A.wav",
        "missing: ",
        {"b_normal__127_1306764300147_A"},
    ),
    "wav cut": (
        lambda s: (s / B_NORMAL).write_bytes((s / B_NORMAL).read_bytes()[:-200]),
        B_NORMAL,
        "truncated: ",
        {"b_normal__127_1306764300147_A"},
    ),
    "wav not listed": (
        lambda s: sound(s / "set_b/murmur__300_1.wav", 4000),
        "set_b/murmur__300_1.wav",
        "unlisted: set_b.csv does not name this file",
        set(),
    ),
    "unknown label": (
        pascal_replace("set_a.csv", "murmur,\n", "systole,\n"),
        "set_a/murmur__201101051104.wav",
        "mislabelled: set_a.csv line 4 says 'systole', allowed are normal, murmur, extrastole, extrahls, artifact",
        {"a_murmur__201101051104"},
    ),
    "label contradicts the name": (
        pascal_replace("set_b.csv", "A.wav,normal,", "A.wav,murmur,"),
        B_NORMAL,
        "mislabelled: set_b.csv line 7 says murmur, the file name normal",
        {"b_normal__127_1306764300147_A"},
    ),
    "label contradicts the noisy name": (
        pascal_replace("set_b.csv", "B.wav,normal,noisynormal", "B.wav,murmur,noisymurmur"),
        "set_b/normal_noisynormal_101_1305030823364_B.wav",
        "mislabelled: set_b.csv line 6 says murmur, the file name normal",
        {"b_normal_noisynormal_101_1305030823364_B"},
    ),
    "named twice": (
        pascal_replace("set_a.csv", "a,set_a/__", "a,set_a/normal__201102081321.wav,normal,\na,set_a/__"),
        A_NORMAL,
        "duplicate: set_a.csv names it in lines 5 and 6; the first counts",
        set(),
    ),
    "row too short": (
        pascal_replace("set_b.csv", "171_1307971016233_D.wav,murmur,\n", "171_1307971016233_D.wav,murmur\n"),
        "set_b.csv",
        "mislabelled: line 3 has 3 fields, the header 4",
        {"b_murmur__171_1307971016233_D"},
    ),
    "unknown sound": (
        pascal_replace("set_a_timing.csv", "2,S2", "2,S3"),
        "set_a_timing.csv",
        "annotation: line 4, normal__201102081321.wav: sound is 'S3', allowed are S1 and S2",
        set(),
    ),
    "sound at no number": (
        pascal_replace("set_a_timing.csv", "4410\n", "0.1 s\n"),
        "set_a_timing.csv",
        "annotation: line 2, normal__201102081321.wav: location is '0.1 s'",
        set(),
    ),
    "sound before the start": (
        pascal_replace("set_a_timing.csv", "4410\n", "-4410\n"),
        "set_a_timing.csv",
        "annotation: line 2, normal__201102081321.wav: location is '-4410'",
        set(),
    ),
    "sound after the end": (
        pascal_replace("set_a_timing.csv", "66150", "88201"),
        "set_a_timing.csv",
        "annotation: normal__201102081321.wav has a sound at 2.000 s and ends at 2.000 s",
        set(),
    ),
}


@pytest.mark.parametrize("kind", PASCAL_LISTED)
def test_pascal_lists_what_is_damaged(pascal: pathlib.Path, kind: str) -> None:
    everything, _ = load("pascal", pascal)
    change, path, reason, left_out = PASCAL_LISTED[kind]
    change(pascal)
    recordings, problems = load("pascal", pascal)
    assert UNLABELLED in problems
    (listed,) = reasons(problems, path)
    assert listed.startswith(reason)
    follows = ["set_b/murmur__171_1307971016233_D.wav"] if kind == "row too short" else []  # now unlisted
    assert {problem.path for problem in problems} == {UNLABELLED.path, path, *follows}
    assert everything.keys() - recordings.keys() == left_out
    if path == "set_a_timing.csv":
        assert recordings["a_normal__201102081321"].annotations == ()


PASCAL_REFUSED = {
    "no label": ("set_b.csv", SET_B.replace("label,sublabel", "class,sublabel", 1), "no column 'label' among"),
    "no name": ("set_a.csv", SET_A.replace("fname", "file", 1), "no column 'fname' among dataset, file, label"),
    "no sublabel": ("set_a.csv", "dataset,fname,label\na,set_a/a.wav,normal\n", "no column 'sublabel'"),
    "semicolons": ("set_b.csv", SET_B.replace(",", ";"), "no column 'fname' among dataset;fname;label;sublabel"),
    "other fields": ("set_b.csv", "dataset,fname,label,sublabel\nb,x.wav\n", "no row has the 4 fields dataset"),
    "empty": ("set_a.csv", "", "the table is empty"),
    "spreadsheet": ("set_a.csv", "PK\x03\x04\0\0", "not a CSV table"),
    "timing without places": ("set_a_timing.csv", TIMING.replace("location", "at"), "no column 'location'"),
}


@pytest.mark.parametrize("kind", PASCAL_REFUSED)
def test_pascal_refuses_a_malformed_table(pascal: pathlib.Path, kind: str) -> None:
    name, text, message = PASCAL_REFUSED[kind]
    (pascal / name).write_text(text)
    with pytest.raises(DatasetError, match=f"{name}: {message}"):
        load("pascal", pascal)


# --------------------------------------------------------------------------------------- a folder of unlabelled files


@pytest.fixture
def unlabelled(tmp_path: pathlib.Path) -> pathlib.Path:
    for name, rate_hz in (("ann/a.wav", 4000), ("ann/later/b.flac", 2000), ("bob/A.WAV", 8000), ("c.wav", 1000)):
        sound(tmp_path / name, rate_hz)
    (tmp_path / "ann" / "a.tsv").write_text("0\t0.5\t0\n0.5\t0.6\t1\n0.6\t0.8\t2\n")
    (tmp_path / "notes.txt").write_text("a.wav: after lunch")
    return tmp_path


def test_folder(unlabelled: pathlib.Path) -> None:
    recordings, problems = load("folder", unlabelled)
    assert problems == []
    assert list(recordings) == ["ann/a", "ann/later/b", "bob/A", "c"]
    assert {r.person for r in recordings.values() if r.person_known} == {"folder-ann", "folder-bob"}
    assert recordings["ann/a"].person == recordings["ann/later/b"].person == "folder-ann"
    assert (recordings["c"].person, recordings["c"].person_known) == ("c", False)
    assert [r.rate_hz for r in recordings.values()] == [4000, 2000, 8000, 1000]
    assert all(r.database == "folder" and r.labels == {} for r in recordings.values())
    assert recordings["ann/later/b"].path == unlabelled / "ann" / "later" / "b.flac"
    assert recordings["ann/a"].annotations == ((0.0, 0.5, UNANNOTATED), (0.5, 0.6, S1), (0.6, 0.8, SYSTOLE))
    assert [r.annotations for r in list(recordings.values())[1:]] == [()] * 3


def test_folder_lists_what_cannot_be_used(unlabelled: pathlib.Path) -> None:
    sound(unlabelled / "ann" / "a.flac", 4000)
    (unlabelled / "bob" / "text.wav").write_text("no sound")
    (unlabelled / "bob" / "A.tsv").write_text("0\t9\t1\n")
    (unlabelled / "bob" / "folder.wav").mkdir()
    whole = (unlabelled / "c.wav").read_bytes()
    (unlabelled / "cut.wav").write_bytes(whole[:900])
    recordings, problems = load("folder", unlabelled)
    assert list(recordings) == ["ann/a", "ann/later/b", "bob/A", "c"]
    assert recordings["ann/a"].path.name == "a.flac"
    assert recordings["bob/A"].annotations == ()
    assert {problem.path for problem in problems} == {"ann/a.wav", "bob/text.wav", "bob/A.tsv", "cut.wav"}
    (reason,) = reasons(problems, "ann/a.wav")
    assert reason == "duplicate: a.flac has the same name and counts; rename one of the two"
    assert reasons(problems, "bob/text.wav")[0].startswith("not audio: ")
    assert reasons(problems, "bob/A.tsv")[0].startswith("annotation: line 1: it ends at 9.0 s")
    assert reasons(problems, "cut.wav")[0].startswith("truncated: ")


def test_folder_is_prepared_and_divided(unlabelled: pathlib.Path, run_command: Callable) -> None:
    out = unlabelled.parent / f"{unlabelled.name}-prepared"
    for i in range(8):
        noise = np.random.default_rng(i + 1).standard_normal(3000) / 10
        (unlabelled / f"p{i // 2}").mkdir(exist_ok=True)
        soundfile.write(unlabelled / f"p{i // 2}" / f"{i}.wav", noise, 1000)
    sound(unlabelled / "ann" / "other.wav", 4000, 0.2)
    done = run_command("prepare", "--dataset=folder", f"--source={unlabelled}", f"--out={out}")
    assert done.returncode == 0, done.stderr
    manifest, rows = read_rows(out)
    assert [row["id"] for row in rows][:2] == ["ann/a", "ann/later/b"]
    assert [row["id"] for row in rows][-8:] == [f"p{i // 2}/{i}" for i in range(8)]
    assert f"folder: {len(rows)} recordings, 6 people" in done.stdout
    assert [problem["reason"][:9] for problem in manifest["problems"]] == ["too short"]
    split = splits.make(rows, "person", "", 0, (0.5, 0.25, 0.25))
    assert splits.check(split, rows) == []
    assert sum(len(split[part]) for part in splits.PARTS) == len(rows)
