"""Simulated phonocardiograms whose labels are true by construction, written in an official data set's layout.

A person has fixed physiology (rate, pitch and splitting of the sounds, murmur); each recording has its own site,
beats, noise and gain. Amplitudes are relative to the mitral component of S1 at the apex, which is 1.

Where the numbers come from:
  systole   Weissler, Harris and Schoenfeld 1968 (Circulation 37:149): ejection time against heart rate.
  splitting Leatham 1954 (Lancet 267:607): A2-P2 about 20 ms in expiration, 40-50 ms in inspiration.
  murmurs   the words of CirCor DigiScope, Oliveira et al. 2022 (IEEE JBHI 26:2524), table of murmur features.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import functools
import json
import math
import multiprocessing
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from pcgjax.datasets import (
    DIASTOLE,
    S1,
    S2,
    SYSTOLE,
    UNANNOTATED,
    DatasetError,
    Problem,
    Recording,
    Span,
    cinc2016,
    circor,
    pascal,
    state_ans,
)
from pcgjax.datasets.simulate import (
    CLINICS,
    SITES,
    Noise,
    Person,
    Stethoscope,
    audible_sites,
    draw_noise,
    draw_person,
    simulate_person,
)
from pcgjax.runtime import files

LAYOUT = "a folder that `python -m pcgjax.datasets.synthetic --out=DIR` wrote, or an empty or missing one"
LAYOUTS = {"cinc2016": 2000, "circor": 4000, "pascal": 4000}  # layout -> its usual rate in Hz


@dataclasses.dataclass(frozen=True, slots=True)
class _Corpus:
    """What synthetic.json holds: everything that determines the files."""

    layout: str
    people: int
    recordings_per_person: int
    duration_s: tuple[float, float]
    rate_hz: int
    seed: int
    snr_db: float
    murmur_fraction: float


def write(
    out: str | pathlib.Path,
    layout: str = "cinc2016",
    people: int = 360,
    recordings_per_person: int = 3,
    duration_s: tuple[float, float] = (6.0, 12.0),
    rate_hz: int | None = None,
    seed: int = 0,
    snr_db: float = 25.0,
    murmur_fraction: float = 0.5,
) -> int:
    """Writes a corpus in an official layout, on all cores, and `synthetic.json` last. Returns the recordings written.

    The same arguments give the same bytes. Where a layout does not say who was recorded (CinC 2016 c to f, PASCAL
    set_a), a person has one recording whatever `recordings_per_person` is, so that persons are always right.

    Args:
      duration_s: shortest and longest recording.
      rate_hz: default: the layout's own; PASCAL's set_a is always 44100.
      snr_db: over white noise; each recording draws within ±5 dB of it, and each CinC clinic shifts it a little.
    Raises:
      DatasetError: an argument out of range, or `out` is not empty.
    """
    out = pathlib.Path(out)
    if layout not in LAYOUTS:
        raise DatasetError(f"layout={layout!r}: choose one of {', '.join(LAYOUTS)}")
    low_s, high_s = duration_s
    rate_hz = LAYOUTS[layout] if rate_hz is None else rate_hz
    for field, value, valid, need in (
        ("people", people, 1 <= people <= 9000, "1 to 9000, as many as the layouts' ids allow"),
        ("recordings_per_person", recordings_per_person, 1 <= recordings_per_person <= 36, "1 to 36"),
        ("duration_s", duration_s, 3 <= low_s <= high_s, "(low, high) with 3 <= low <= high"),
        ("rate_hz", rate_hz, rate_hz >= 1000, "1000 or more: murmurs reach beyond 400 Hz"),
        ("seed", seed, seed >= 0, "0 or more"),
        ("snr_db", snr_db, snr_db > -math.inf, "a number, or inf for no white noise"),
        ("murmur_fraction", murmur_fraction, 0 <= murmur_fraction <= 1, "0 to 1"),
    ):
        if not valid:
            raise DatasetError(f"{field}={value}: give {need}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DatasetError(f"{out}: not an empty folder; choose another --out or delete it")
    corpus = _Corpus(
        layout, people, recordings_per_person, (low_s, high_s), rate_hz, seed, float(snr_db), float(murmur_fraction)
    )

    write_person, write_tables, folders = {
        "cinc2016": (
            _cinc_person,
            _cinc_tables,
            [f"training-{database}" for database in CLINICS]
            + [f"annotations/hand_corrected/training-{database}_StateAns" for database in CLINICS],
        ),
        "circor": (_circor_person, _circor_tables, ["training_data"]),
        "pascal": (_pascal_person, _pascal_tables, ["set_a", "set_b"]),
    }[layout]
    for folder in folders:
        (out / folder).mkdir(parents=True)
    rows = _map(functools.partial(write_person, out, corpus), people)
    write_tables(out, [row for person_rows in rows for row in person_rows])
    files.write_text(out / "synthetic.json", json.dumps(dataclasses.asdict(corpus), indent=1) + "\n")
    return sum(len(row["recordings"]) for person_rows in rows for row in person_rows)


def load(source: str | pathlib.Path) -> tuple[list[Recording], list[Problem]]:
    """The recordings of a corpus that `write` made; where there is none, the default corpus is written first.

    Databases are named `synthetic-a` where the layout's own loader says `cinc2016-a`.

    Raises:
      DatasetError: `source` holds files but no synthetic.json: writing was interrupted, or it is something else.
    """
    source = pathlib.Path(source)
    if not source.exists() or (source.is_dir() and not any(source.iterdir())):
        from absl import logging

        logging.info("%s holds no corpus: writing the default one", source)
        write(source)
    settings = source / "synthetic.json"
    if not settings.is_file():
        raise DatasetError(
            f"{source}: no synthetic.json, so writing it was interrupted, or it is not a synthetic corpus; delete "
            "the folder and write it again with `python -m pcgjax.datasets.synthetic --out=DIR`"
        )
    try:
        layout = json.loads(settings.read_text())["layout"]
    except (json.JSONDecodeError, KeyError, TypeError):
        layout = None
    if layout not in LAYOUTS:
        raise DatasetError(f"{settings}: field `layout` is not one of {', '.join(LAYOUTS)}; write the corpus again")
    loaders = {"cinc2016": cinc2016.load, "circor": circor.load, "pascal": pascal.load}
    recordings, problems = loaders[layout](source)
    renamed = [
        dataclasses.replace(recording, database="synthetic" + recording.database.removeprefix(layout))
        for recording in recordings
    ]
    return renamed, problems


def _map(function: Callable[[int], list[dict[str, Any]]], people: int) -> list[list[dict[str, Any]]]:
    """function(0) ... function(people - 1), on all cores where that is worth starting processes."""
    import tqdm

    progress = functools.partial(tqdm.tqdm, total=people, desc="simulating", unit="person")
    processes = min(os.cpu_count() or 1, people // 40)
    if processes < 2:
        return list(progress(map(function, range(people))))
    # spawn: the caller may already run JAX's threads, which a fork does not survive.
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return list(progress(pool.imap(function, range(people), chunksize=4)))


def _save(
    path: pathlib.Path,
    corpus: _Corpus,
    rng: np.random.Generator,
    person: Person,
    site: str,
    noise: Noise,
    stethoscope: Stethoscope,
    rate_hz: int | None = None,
) -> tuple[list[Span], int]:
    """Simulates one recording into a 16-bit WAV. Returns (annotations, samples written)."""
    import soundfile

    rate_hz = rate_hz or corpus.rate_hz
    samples, annotations = simulate_person(
        person, site, rng, rng.uniform(*corpus.duration_s), rate_hz, noise, stethoscope
    )
    soundfile.write(str(path), samples, rate_hz, subtype="PCM_16")
    return annotations, len(samples)


def _rngs(corpus: _Corpus, person: int) -> tuple[np.random.Generator, Callable[[int], np.random.Generator]]:
    """(generator of the person, recording number -> its generator): people and recordings can be made in any order."""

    def recording_rng(recording: int) -> np.random.Generator:
        return np.random.default_rng([corpus.seed, person, 1 + recording])

    return np.random.default_rng([corpus.seed, person]), recording_rng


def _sites(corpus: _Corpus, person: int) -> list[str]:
    """Where the person is recorded: where the murmur is audible, or where it would be if a normal person had one.

    So the site is independent of the class.
    """
    return audible_sites(draw_person(_rngs(corpus, person)[0], 0, murmur_fraction=1.0))


def _table(path: pathlib.Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows] if header else rows)


_STATE_WORDS = {S1: "S1", SYSTOLE: "systole", S2: "S2", DIASTOLE: "diastole"}
_TRANSDUCER_SITES = {  # in the words of database a
    "AV": "2nd right intercostal space",
    "PV": "Superior of Parasternum",
    "TV": "Left of parasternum",
    "MV": "Left of apex",
}


def _cinc_person(out: pathlib.Path, corpus: _Corpus, person_index: int) -> list[dict[str, Any]]:
    # Clinics take turns, each with its quota of murmurs, so that the clinic is independent of the class.
    database = list(CLINICS)[person_index % len(CLINICS)]
    index = person_index // len(CLINICS)
    rng, recording_rng = _rngs(corpus, person_index)
    person = draw_person(rng, index, corpus.murmur_fraction)
    stethoscope, gain_db, snr_change_db, breathing = CLINICS[database]
    sites = _sites(corpus, person_index)
    rows = []
    takes = corpus.recordings_per_person if database in "ab" else 1
    for take in range(takes):
        rng = recording_rng(take)
        record = f"{database}{index * takes + take + 1:0{5 if database == 'e' else 4}d}"
        site = str(rng.choice(sites))
        bad = rng.random() < 0.02
        noise = draw_noise(rng, corpus.snr_db + snr_change_db, bad)
        noise = dataclasses.replace(noise, gain_db=noise.gain_db + gain_db, breathing=noise.breathing * breathing)
        path = out / f"training-{database}" / f"{record}.wav"
        annotations, _ = _save(path, corpus, rng, person, site, noise, stethoscope)
        indices = [round(start_s * corpus.rate_hz) + 1 for start_s, _, _ in annotations]
        names = [_STATE_WORDS[state] for _, _, state in annotations]
        folder = out / "annotations" / "hand_corrected" / f"training-{database}_StateAns"
        (folder / f"{record}_StateAns.mat").write_bytes(state_ans.write(indices, names))
        original = {"a": f"C{index + 1}S{take}", "b": f"S{index + 1}f{take + 1}_data"}.get(database, record)
        abnormal = 1 if person.murmurs else -1
        appendix = {
            "Challenge record name": record,
            "Database": f"training-{database}",
            "Original record name": original,
            "Diagnosis": "Pathologic" if person.murmurs else "Normal",
            "Class (-1=normal 1=abnormal)": abnormal,
            "# Beat (automated algorithm)": sum(state == S1 for _, _, state in annotations),
            "# Beats requiring hand correction": 0,
            "Gender": person.sex[0],
            "Subject ID": index + 1 if database == "b" else "",
            "# Recording in each subject": take + 1 if database == "b" else "",
            "Transducer site on body": _TRANSDUCER_SITES[site],
        }
        rows.append({"recordings": [(record, abnormal, int(not bad))], "appendix": appendix})
    return rows


def _cinc_tables(out: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    rows.sort(key=lambda row: row["recordings"])
    for database in CLINICS:
        folder = out / f"training-{database}"
        records = [row["recordings"][0] for row in rows if row["recordings"][0][0][0] == database]
        (folder / "RECORDS").write_text("".join(f"{record}\n" for record, _, _ in records))
        _table(folder / "REFERENCE.csv", [], [(record, label) for record, label, _ in records])
        _table(folder / "REFERENCE_withSQI.csv", [], records)
    appendix = [row["appendix"] for row in rows]
    path = out / "annotations" / "online_appendix_training_set.csv"
    _table(path, list(appendix[0]), [list(row.values()) for row in appendix])


_FEATURES = ("timing", "shape", "grading", "pitch", "quality")


def _circor_person(out: pathlib.Path, corpus: _Corpus, person_index: int) -> list[dict[str, Any]]:
    rng, recording_rng = _rngs(corpus, person_index)
    person = draw_person(rng, person_index, corpus.murmur_fraction)
    unknown = rng.random() < 0.08  # too noisy to say; the person may well have a murmur
    patients = [str(50000 + person_index)]
    if person_index % 12 == 5:  # came back for the second campaign and got a second id
        patients.append(str(80000 + person_index))
    rows = []
    for visit, patient in enumerate(patients):
        sites = list(SITES) * math.ceil(corpus.recordings_per_person / len(SITES))
        sites.remove(person.murmur_site)
        rng.shuffle(sites)
        sites = [person.murmur_site, *sites][: corpus.recordings_per_person]
        sites.sort(key=list(SITES).index)
        names = [
            f"{patient}_{site}" + (f"_{sites[: take + 1].count(site)}" if sites.count(site) > 1 else "")
            for take, site in enumerate(sites)
        ]
        for take, (site, name) in enumerate(zip(sites, names, strict=True)):
            take_rng = recording_rng(visit * len(sites) + take)
            path = out / "training_data" / f"{name}.wav"
            noise = draw_noise(take_rng, corpus.snr_db, bad=unknown)
            annotations, count = _save(path, corpus, take_rng, person, site, noise, Stethoscope(25, 1000, 110, 4))
            path.with_suffix(".hea").write_text(
                f"{name} 1 {corpus.rate_hz} {count}\n{name}.wav 16+44 1 16 0 0 0 0 {site}\n"
            )
            annotations.insert(0, (0.0, annotations[0][0], UNANNOTATED))
            lines = [f"{start_s:.6f}\t{end_s:.6f}\t{state}\n" for start_s, end_s, state in annotations]
            path.with_suffix(".tsv").write_text("".join(lines))
        described = {murmur.phase: murmur for murmur in person.murmurs if not unknown}
        audible = [site for site in audible_sites(person) if site in sites] if described else []
        table = {
            "Patient ID": patient,
            "Locations": "+".join(sites),
            "Age": person.age,
            "Sex": person.sex,
            "Height": person.height_cm,
            "Weight": round(17 * (person.height_cm / 100) ** 2, 1),  # a body mass index of 17, usual in children
            "Pregnancy status": False,
            "Murmur": "Unknown" if unknown else "Present" if described else "Absent",
            "Murmur locations": "+".join(sorted(audible)) or "nan",
            "Most audible location": person.murmur_site if described else "nan",
        }
        for word, phase in (("Systolic", SYSTOLE), ("Diastolic", DIASTOLE)):
            for feature in _FEATURES:
                table[f"{word} murmur {feature}"] = getattr(described.get(phase), feature, "nan")
        table["Campaign"] = ("CC2014", "CC2015")[visit]
        table["Additional ID"] = patients[1 - visit] if len(patients) == 2 else "nan"
        table["Outcome"] = "Abnormal" if person.murmurs else "Normal"
        lines = [f"{patient} {len(names)} {corpus.rate_hz}"]
        lines += [f"{site} {name}.hea {name}.wav {name}.tsv" for site, name in zip(sites, names, strict=True)]
        lines += [f"#{field}: {value}" for field, value in list(table.items())[2:]]
        (out / "training_data" / f"{patient}.txt").write_text("\n".join(lines) + "\n")
        rows.append({"recordings": names, "table": table})
    return rows


def _circor_tables(out: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    tables = sorted((row["table"] for row in rows), key=lambda table: int(table["Patient ID"]))
    _table(out / "training_data.csv", list(tables[0]), [list(table.values()) for table in tables])


def _pascal_person(out: pathlib.Path, corpus: _Corpus, person_index: int) -> list[dict[str, Any]]:
    in_a = person_index % 2 == 0
    index = person_index // 2
    rng, recording_rng = _rngs(corpus, person_index)
    person = draw_person(rng, index, corpus.murmur_fraction)
    if not person.murmurs and not in_a and rng.random() < 0.2:
        person = dataclasses.replace(person, extrasystoles=0.12)
    label = "murmur" if person.murmurs else "extrastole" if person.extrasystoles else "normal"
    sites = _sites(corpus, person_index)
    moment = datetime.datetime(2011, 2, 1, tzinfo=datetime.UTC) + datetime.timedelta(minutes=97 * index)
    rows = []
    for take in range(1 if in_a else corpus.recordings_per_person):
        rng = recording_rng(take)
        site = str(rng.choice(sites))
        noisy = not in_a and label != "extrastole" and rng.random() < 0.25
        noise = draw_noise(rng, corpus.snr_db, bad=noisy)
        sublabel = f"noisy{label}" if noisy else ""
        if in_a:
            name = f"set_a/{label}__{moment:%Y%m%d%H%M}.wav"
        else:
            place = "ABCD"[take % 4] + (str(1 + take // 4) if take >= 4 else "")
            name = f"set_b/{label}_{sublabel}_{101 + index}_{1000 * int(moment.timestamp())}_{place}.wav"
        rate_hz = 44100 if in_a else corpus.rate_hz
        stethoscope = Stethoscope(30, 1500, 180, 4) if in_a else Stethoscope(25, 900, 120, 4)
        annotations, _ = _save(out / name, corpus, rng, person, site, noise, stethoscope, rate_hz)
        cycle, timing = 0, []
        for start_s, end_s, state in annotations[:-1]:  # the last one is cut by the end of the recording
            cycle += state == S1
            if cycle and state in (S1, S2) and in_a:
                timing.append((name, cycle, _STATE_WORDS[state], round((start_s + end_s) / 2 * rate_hz)))
        row = ("a" if in_a else "b", name, label, "noisy" if noisy else "")
        rows.append({"recordings": [name], "table": row, "timing": timing})
    return rows


def _pascal_tables(out: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    for part in "ab":
        tables = sorted(row["table"] for row in rows if row["table"][0] == part)
        _table(out / f"set_{part}.csv", ["dataset", "fname", "label", "sublabel"], tables)
    timing = [line for row in rows for line in row["timing"]]
    _table(out / "set_a_timing.csv", ["fname", "cycle", "sound", "location"], timing)


def main(argv: Sequence[str]) -> None:
    """Writes the corpus that the flags describe."""
    from absl import app, flags

    values = flags.FLAGS
    try:
        low_s, high_s = map(float, values.duration_s)
    except ValueError:
        raise app.UsageError(f"--duration_s={','.join(values.duration_s)}: give two numbers, as in 6,12") from None
    count = write(
        values.out,
        layout=values.layout,
        people=values.people,
        recordings_per_person=values.recordings_per_person,
        duration_s=(low_s, high_s),
        rate_hz=values.rate_hz,
        seed=values.seed,
        snr_db=values.snr_db,
        murmur_fraction=values.murmur_fraction,
    )
    print(f"{count} recordings of {values.people} people in {values.out}")


def _define_flags() -> None:
    # Not at import: other programs import this module and have an --out of their own.
    from absl import flags

    flags.DEFINE_string("out", None, "Folder to write to; it must be missing or empty.", required=True)
    flags.DEFINE_enum("layout", "cinc2016", list(LAYOUTS), "The official data set whose files and tables to imitate.")
    flags.DEFINE_integer("people", 360, "People to simulate.")
    flags.DEFINE_integer(
        "recordings_per_person",
        3,
        "Recordings of each person where the layout says who was recorded: CinC 2016 a and b, CirCor, PASCAL set_b.",
    )
    flags.DEFINE_list("duration_s", ["6", "12"], "Shortest and longest recording in seconds, as in 6,12.")
    flags.DEFINE_integer("rate_hz", None, "Sampling rate; default: the layout's own. PASCAL's set_a stays at 44100.")
    flags.DEFINE_integer("seed", 0, "The same seed and settings give the same bytes.", 0, 2**31 - 1)
    flags.DEFINE_float("snr_db", 25.0, "Heart over white noise; each recording draws within 5 dB of it.")
    flags.DEFINE_float("murmur_fraction", 0.5, "Share of people with a murmur, in every database alike.")


if __name__ == "__main__":
    _define_flags()
    files.run(main)
