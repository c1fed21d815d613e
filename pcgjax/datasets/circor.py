"""CirCor DigiScope, the training set of the PhysioNet Challenge 2022 (Oliveira et al. 2022,
doi:10.1109/JBHI.2021.3137048): up to four auscultation sites a patient, 4 kHz."""

from __future__ import annotations

import os
import pathlib
import re
from typing import NamedTuple

from pcgjax.datasets import DatasetError, Problem, Recording, Span, audio
from pcgjax.datasets.annotations import noted_annotations
from pcgjax.datasets.sources import Folder, SourceError, read_bytes, text_of
from pcgjax.datasets.tables import column_name, read_table, relative

LAYOUT = "training_data/ (or its files themselves) with <patient>.txt, .hea, .wav, .tsv, and training_data.csv beside"
SITES = ("AV", "PV", "TV", "MV", "Phc")
ALLOWED = {
    "murmur": ("Present", "Unknown", "Absent"),
    "outcome": ("Abnormal", "Normal"),
    "systolic murmur grading": ("I/VI", "II/VI", "III/VI"),  # III/VI stands for III and above
    "diastolic murmur grading": ("I/IV", "II/IV", "III/IV", "IV/IV"),
}
LABELS = {
    "campaign": "campaign",
    "age": "age",
    "sex": "sex",
    "height": "height_cm",
    "weight": "weight_kg",
    "most audible location": "most_audible_site",
} | {
    f"{phase} murmur {feature}": f"{phase}_{feature}"
    for phase in ("systolic", "diastolic")
    for feature in ("timing", "shape", "grading", "pitch", "quality")
}


def load(source: pathlib.Path) -> tuple[list[Recording], list[Problem]]:
    """The recordings of `source`. A person is a patient, or the patients whom `Additional ID` links.

    Labels, each left out where unknown: `class` (the outcome, else the murmur, in lower case), `abnormal` (from the
    outcome), `murmur`, `murmur_status` (Present, Unknown or Absent), `murmur_audible` (at this site), `site`,
    `pregnant` ("0" or "1"), and the values of `LABELS`. All but `site` and `murmur_audible` are the patient's.

    Raises:
      DatasetError: `training_data.csv` is malformed as a whole.
    """
    source = pathlib.Path(os.path.abspath(source))
    folder = source / "training_data" if (source / "training_data").is_dir() else source
    there = Folder(folder)
    problems: list[Problem] = []
    table = _table(source, folder, problems)
    patients: dict[str, dict[str, str]] = {}
    files: dict[str, list[Names]] = {}
    listed: dict[str, str] = {}  # .wav -> the patient's .txt
    unread: set[str] = set()
    for path in there.ending(".txt"):
        if not _is_number(path.stem):
            continue  # LICENSE.txt, SHA256SUMS.txt
        try:
            names_of_recordings, fields = _patient(path)
            patients[path.stem] = _merged(fields, table.get(path.stem, {}))
            files[path.stem] = [names for names in names_of_recordings if there[names.wav].name not in listed]
            for wav in (there[names.wav].name for names in names_of_recordings):
                if wav in listed:
                    reason = f"duplicate: {wav} is listed in {listed[wav]} already, which counts"
                    problems.append(Problem(relative(path, source), reason))
                listed.setdefault(wav, path.name)
        except ValueError as error:
            problems.append(Problem(relative(path, source), str(error)))
            unread.add(path.stem)
    for patient in sorted(table.keys() - patients.keys() - unread):
        problems.append(Problem(relative(folder / f"{patient}.txt", source), "missing: no such file"))
    for path in there.ending(".wav"):
        if path.name not in listed and path.stem.split("_")[0] not in unread:
            problems.append(Problem(relative(path, source), "unlisted: no <patient>.txt names this file"))
    if patients and not any("additional id" in fields for fields in patients.values()):
        reason = "no links: no file has 'Additional ID', so a person recorded under two patient ids counts as two"
        problems.append(Problem(relative(folder, source), reason))
    person_of = _persons({patient: fields.get("additional id", "") for patient, fields in patients.items()})
    recordings = []
    for patient, fields in patients.items():
        for names in files[patient]:
            recording = _recording(there, source, patient, names, fields, person_of[patient], problems)
            if recording is not None:
                recordings.append(recording)
    return recordings, problems


def _table(source: pathlib.Path, folder: pathlib.Path, problems: list[Problem]) -> dict[str, dict[str, str]]:
    """The rows of `training_data.csv` by patient; empty where there is no such file: the .txt files say the same."""
    for parent in dict.fromkeys((source, folder, folder.parent)):
        path = parent / "training_data.csv"
        if not path.is_file():
            continue
        rows, bad = read_table(path, ("patient id", "murmur"), source)
        problems += bad
        patients: dict[str, dict[str, str]] = {}
        for line, row in rows:
            patient = row["patient id"]
            if patient in patients:
                reason = f"duplicate: line {line} is the second for patient {patient}; the first counts"
                problems.append(Problem(relative(path, source), reason))
            else:
                patients[patient] = row
        if not any(map(_is_number, patients)):
            raise DatasetError(
                f"{path}: column 'patient id' holds no number (first: {next(iter(patients))!r}); "
                "put the published table back"
            )
        return patients
    return {}


class Names(NamedTuple):
    """A line of <patient>.txt: the files of a recording, "" where it names none."""

    site: str
    hea: str
    wav: str
    tsv: str


def _patient(path: pathlib.Path) -> tuple[list[Names], dict[str, str]]:
    """(the recordings, {key: value}) from <patient>.txt.

    Raises:
      ValueError: the file is not as published.
    """
    lines = [line.strip() for line in text_of(read_bytes(path)).splitlines()]
    lines = [line for line in lines if line]
    first = lines[0].split() if lines else []
    if len(first) != 3 or not _is_number(first[1]):
        raise ValueError("header: the first line must be patient, number of recordings, rate, as in `9979 4 4000`")
    if first[0] != path.stem:
        raise ValueError(f"header: the first line is about patient {first[0]}")
    files = []
    for words in (line.split() for line in lines[1:] if not line.startswith("#")):
        named = {os.path.splitext(word)[1].lower(): word for word in words[1:]}
        names = Names(words[0], *(named.pop(suffix, "") for suffix in (".hea", ".wav", ".tsv")))
        # 50782_MV_1 as published has no .tsv here.
        if len(words) != sum(map(bool, names)) or names.site not in SITES or not names.wav or "/" in "".join(words):
            raise ValueError(f"header: {' '.join(words)!r} must be a site ({', '.join(SITES)}), .hea, .wav and .tsv")
        files.append(names)
    if len(files) != int(first[1]):
        raise ValueError(f"header: the first line announces {first[1]} recordings, the file lists {len(files)}")
    fields = {}
    for line in lines:
        if line.startswith("#"):
            key, _, value = line[1:].partition(":")
            fields[column_name(key)] = value.strip()
    return files, fields


def _merged(text: dict[str, str], row: dict[str, str]) -> dict[str, str]:
    """A patient's fields from <patient>.txt and from the row in training_data.csv, checked against each other.

    Raises:
      ValueError: they contradict each other, or hold a value that does not exist.
    """
    for key in ("murmur", "outcome"):
        pair = text.get(key, ""), row.get(key, "")
        if all(map(_known, pair)) and pair[0] != pair[1]:
            raise ValueError(f"mislabelled: {key.capitalize()} is {pair[0]} here and {pair[1]} in training_data.csv")
    fields = row | {key: value for key, value in text.items() if _known(value) or not _known(row.get(key, ""))}
    for key, allowed in ALLOWED.items():
        value = fields.get(key, "")
        if _known(value) and value not in allowed:
            raise ValueError(f"mislabelled: {key.capitalize()} is {value!r}, allowed are {', '.join(allowed)}")
    if not _known(fields.get("murmur", "")):
        raise ValueError(f"mislabelled: no Murmur, which must be one of {', '.join(ALLOWED['murmur'])}")
    return fields


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 19


def _known(value: str) -> bool:
    return value not in ("", "nan") and value.lower() != "nan"


def _persons(links: dict[str, str]) -> dict[str, str]:
    """Patient -> person, named after the smallest id among all that `Additional ID` connects, present or not."""
    leader: dict[int, int] = {}

    def find(patient: int) -> int:
        while leader.setdefault(patient, patient) != patient:
            patient = leader[patient]
        return patient

    for patient, link in links.items():
        link = link.removesuffix(".0")  # as a table editor writes a column of numbers with gaps
        if _is_number(link):
            small, large = sorted((find(int(patient)), find(int(link))))
            leader[large] = small
    return {patient: f"circor-{find(int(patient))}" for patient in links}


def _recording(
    there: Folder,
    source: pathlib.Path,
    patient: str,
    names: Names,
    fields: dict[str, str],
    person: str,
    problems: list[Problem],
) -> Recording | None:
    """One recording; None, and an entry in `problems`, where it cannot be used."""
    path = there[names.wav]
    try:
        if names.wav not in there:
            raise audio.AudioError("missing: no such file")
        rate_hz, frames, _ = audio.header(path)
    except audio.AudioError as error:
        problems.append(Problem(relative(path, source), str(error)))
        return None
    header = there[names.hea or f"{path.stem}.hea"]
    try:
        if header.name not in there:
            raise SourceError("missing: no such file")
        # Record, signals, rate; a counter may follow after a slash.
        declared = text_of(read_bytes(header)).split()
    except SourceError as error:
        problems.append(Problem(relative(header, source), f"{error}; the rate is the .wav file's"))
    else:
        if len(declared) < 3 or re.split("[/(]", declared[2])[0] not in (f"{rate_hz}", f"{rate_hz}.0"):
            reason = f"header: the first line is {' '.join(declared[:4])!r}, {path.name} has a rate of {rate_hz} Hz"
            problems.append(Problem(relative(header, source), reason))
            return None
    annotations, notes = _annotations(there, source, patient, names, path, frames / rate_hz, problems)
    return Recording(
        id=path.stem,
        person=person,
        person_known=True,
        database="circor",
        rate_hz=rate_hz,
        labels=_labels(fields, names.site),
        annotations=annotations,
        path=path,
        notes=notes,
    )


def _annotations(
    there: Folder,
    source: pathlib.Path,
    patient: str,
    names: Names,
    path: pathlib.Path,
    duration_s: float,
    problems: list[Problem],
) -> tuple[tuple[Span, ...], tuple[str, ...]]:
    """(spans, notes) of one recording; the notes, and why there are no spans, are also added to `problems`."""
    spans: tuple[Span, ...] = ()
    notes: tuple[str, ...] = ()
    found_as: tuple[str, ...] = ()  # as published, and so not listed as a problem
    tsv, other = there[names.tsv or f"{path.stem}.tsv"], there[f"{patient}_{names.site}.tsv"]
    where = relative(tsv, source)
    if not names.tsv:
        lies = f"; {other.name}, which no line names, may be its own" if other.name in there else ""
        notes = (f"annotation: {patient}.txt names no .tsv for {path.name}, so it has no annotations{lies}",)
    else:
        try:
            if tsv.name not in there and other.name in there:
                # 50782_MV_1.wav: one of two recordings was dropped, the annotation kept the name without a number.
                found_as = (f"annotation: {tsv.name} is missing, {other.name} is read in its place",)
                tsv = other
            if tsv.name not in there:
                notes = (f"missing: no such file as {tsv.name}, so no annotations",)
            else:
                spans, notes = noted_annotations(tsv, duration_s)
        except SourceError as error:
            problems.append(Problem(where, f"{error}, so no annotations"))
        except ValueError as error:
            problems.append(Problem(relative(tsv, source), f"annotation: {error}"))
    problems += [Problem(where, note, True) for note in notes]
    return spans, found_as + notes


def _labels(fields: dict[str, str], site: str) -> dict[str, str]:
    """`Recording.labels` of a recording at `site`, as `load` describes them."""
    known = {key: value for key, value in fields.items() if _known(value)}
    murmur, outcome = known["murmur"], known.get("outcome")
    labels = {"class": (outcome or murmur).lower(), "murmur_status": murmur, "site": site}
    if outcome:
        labels["abnormal"] = "1" if outcome == "Abnormal" else "0"
    if murmur != "Unknown":
        labels["murmur"] = "1" if murmur == "Present" else "0"
    if murmur == "Absent":
        labels["murmur_audible"] = "0"
    elif murmur == "Present" and "murmur locations" in known:
        labels["murmur_audible"] = "1" if site in known["murmur locations"].split("+") else "0"
    if known.get("pregnancy status") in ("True", "False"):
        labels["pregnant"] = "1" if known["pregnancy status"] == "True" else "0"
    return labels | {label: known[key] for key, label in LABELS.items() if key in known}
