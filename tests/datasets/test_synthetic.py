import collections
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import scipy.signal

from pcgjax.datasets import DIASTOLE, S1, S2, SYSTOLE, UNANNOTATED, DatasetError, audio, load, synthetic
from pcgjax.datasets.simulate import (
    GRADES,
    PITCHES,
    QUALITIES,
    SITES,
    TIMINGS,
    Murmur,
    Noise,
    Stethoscope,
    audible_sites,
    draw_noise,
    draw_person,
    simulate_person,
    systole_s,
)

RATE_HZ = 2000
PERSON = dataclasses.replace(
    draw_person(np.random.default_rng(1), 0, murmur_fraction=0),
    heart_rate_bpm=70.0, sinus_arrhythmia=0.05, rr_jitter=0.0, breaths_per_minute=15.0, murmur_site="TV",
)  # fmt: skip
HOLOSYSTOLIC = Murmur("Holosystolic", "Plateau", "III/VI", "Medium", "Blowing", 180.0)


def heart(person=PERSON, site="TV", noise=None, stethoscope=None, duration_s=12.0, rate_hz=RATE_HZ, seed=0):
    samples, annotations = simulate_person(
        person, site, np.random.default_rng(seed), duration_s, rate_hz, noise, stethoscope
    )
    return samples.astype(float), annotations


def murmur_alone(murmur, site="TV", **how):
    """The same beats with and without the murmur: the difference is the murmur."""
    with_it, annotations = heart(dataclasses.replace(PERSON, murmurs=(murmur,)), site, **how)
    return with_it - heart(PERSON, site, **how)[0], annotations


def within(samples, annotations, states, rate_hz=RATE_HZ):
    """Share of the annotated energy that lies in `states`."""
    energy: collections.Counter[int] = collections.Counter()
    for start_s, end_s, state in annotations:
        energy[state] += np.sum(samples[round(start_s * rate_hz) : round(end_s * rate_hz)] ** 2)
    return sum(energy[state] for state in states) / sum(energy.values())


def power(samples):
    return scipy.signal.welch(samples, RATE_HZ, nperseg=1024)


def rms(samples):
    return float(np.sqrt(np.mean(samples**2)))


# The heart


def test_same_generator_state_gives_the_same_bits():
    person = draw_person(np.random.default_rng([3, 7]), 1)
    assert person == draw_person(np.random.default_rng([3, 7]), 1)
    noise = draw_noise(np.random.default_rng(5), 20)
    first, second = (heart(person, noise=noise, seed=9) for _ in range(2))
    assert first[0].tobytes() == second[0].tobytes()
    assert first[1] == second[1]
    assert heart(person, noise=noise, seed=10)[0].tobytes() != first[0].tobytes()


@pytest.mark.parametrize("seed", range(4))
def test_annotations_tile_the_recording_and_hold_the_sounds(seed):
    person = draw_person(np.random.default_rng(seed), 0, murmur_fraction=0)
    samples, annotations = heart(person, seed=seed, duration_s=8.3)
    assert samples.shape == (16600,)
    assert annotations[0][2] in (S1, S2)
    assert 0 <= annotations[0][0] < 60 / person.heart_rate_bpm + 0.2
    assert annotations[-1][1] == 8.3
    for (start_s, end_s, state), (next_start_s, _, next_state) in itertools.pairwise(annotations):
        assert start_s < end_s == next_start_s
        assert next_state == state % 4 + 1
    assert within(samples, annotations, (S1, S2)) > 0.98
    # Each sound is there, and each is annotated no longer than needed: its outer fifths hold little.
    for start_s, end_s, state in annotations[:-1]:
        sound = samples[round(start_s * RATE_HZ) : round(end_s * RATE_HZ)]
        if state in (S1, S2):
            fifth = len(sound) // 5
            middle = rms(sound[fifth:-fifth])
            assert middle > 0.01
            assert rms(sound[-fifth:]) < 0.5 * middle


def test_systole_follows_the_heart_rate():
    assert systole_s(70, "Male") == pytest.approx(0.413 - 0.0017 * 70 + 0.025)
    for rate_bpm in (60.0, 100.0):
        person = dataclasses.replace(PERSON, heart_rate_bpm=rate_bpm, sinus_arrhythmia=0.0)
        _, annotations = heart(person, duration_s=30)
        onsets = [start for start, _, state in annotations if state == S1]
        assert np.diff(onsets) == pytest.approx(60 / rate_bpm, abs=1e-6)
        sounds = [(start, end) for start, end, state in annotations if state in (S1, S2)]
        first = int(annotations[0][2] == S2)
        systoles = [b[0] - a[0] for a, b in zip(sounds[first::2], sounds[first + 1 :: 2], strict=False)]
        assert np.mean(systoles) == pytest.approx(float(systole_s(rate_bpm, person.sex)), abs=0.003)


def test_a2_p2_splitting_widens_with_inspiration():
    # In inspiration the heart also beats faster, and without jitter nothing else moves the rate.
    person = dataclasses.replace(PERSON, s2_split_s=(0.015, 0.050), s2_hz=(70.0, 60.0))
    samples, annotations = heart(person, "PV", duration_s=60, rate_hz=4000)
    s1 = [start for start, _, state in annotations if state == S1]
    s2 = [(start, end) for start, end, state in annotations if state == S2 and start > s1[0]][: len(s1) - 1]
    length = np.array([end - start for start, end in s2])
    assert np.corrcoef(np.diff(s1), length)[0, 1] < -0.95
    assert np.ptp(length) == pytest.approx(0.035, abs=0.002)

    def spread(start_s, end_s):  # how far the energy of the samples is spread, as a standard deviation
        sound = samples[round(start_s * 4000) : round(end_s * 4000)] ** 2
        time_s = np.arange(len(sound)) / 4000
        return np.sqrt(np.average((time_s - np.average(time_s, weights=sound)) ** 2, weights=sound))

    assert spread(*s2[int(length.argmax())]) > 1.4 * spread(*s2[int(length.argmin())])


def test_s2_is_higher_and_shorter_than_s1():
    samples, annotations = heart(dataclasses.replace(PERSON, s2_split_s=(0.015, 0.02)))
    centroids = collections.defaultdict(list)
    for start_s, end_s, state in annotations[:-1]:
        spectrum = abs(np.fft.rfft(samples[round(start_s * RATE_HZ) : round(end_s * RATE_HZ)], 4096)) ** 2
        centroids[state].append(np.average(np.fft.rfftfreq(4096, 1 / RATE_HZ), weights=spectrum))
    assert 30 < np.median(centroids[S1]) < 80
    assert np.median(centroids[S2]) > 1.2 * np.median(centroids[S1])
    lengths = {s: np.median([end - start for start, end, state in annotations[:-1] if state == s]) for s in (S1, S2)}
    assert lengths[S2] < lengths[S1]


def test_extrasystoles_come_early_and_are_followed_by_a_pause():
    _, annotations = heart(dataclasses.replace(PERSON, extrasystoles=0.001, sinus_arrhythmia=0.0), duration_s=20)
    rr = np.diff([start for start, _, state in annotations if state == S1]) * 70 / 60
    early = int(rr.argmin())
    assert rr[early] == pytest.approx(0.65, abs=0.01)
    assert rr[early + 1] == pytest.approx(1.35, abs=0.01)
    assert np.allclose(np.delete(rr, [early, early + 1]), 1, atol=0.01)


def test_s1_is_loudest_at_the_apex_and_s2_at_the_base():
    peak: dict[int, dict[str, float]] = collections.defaultdict(dict)
    for site in SITES:
        samples, annotations = heart(PERSON, site)
        for wanted in (S1, S2):
            peak[wanted][site] = max(
                abs(samples[round(start * RATE_HZ) : round(end * RATE_HZ)]).max()
                for start, end, state in annotations[:-1]
                if state == wanted
            )
    assert max(peak[S1], key=peak[S1].__getitem__) == "MV"
    assert min(peak[S2]["AV"], peak[S2]["PV"]) > max(peak[S2]["TV"], peak[S2]["MV"])


# Murmurs


@pytest.mark.parametrize("timing", TIMINGS)
def test_murmur_lies_in_its_part_of_its_phase(timing):
    phase, begin, end = TIMINGS[timing]
    grading = "III/VI" if phase == SYSTOLE else "III/IV"
    samples, annotations = murmur_alone(Murmur(timing, "Plateau", grading, "Medium", "Blowing", 180.0))
    assert within(samples, annotations, (phase,)) > 0.95
    inside = total = 0.0
    for start_s, end_s, state in annotations[:-1]:
        if state == phase:
            edges_s = start_s + (end_s - start_s) * np.array([0, begin, end, 1])
            first, low, high, last = np.round(edges_s * RATE_HZ).astype(int)
            inside += np.sum(samples[low:high] ** 2)
            total += np.sum(samples[first:last] ** 2)
    assert inside > 0.95 * total


@pytest.mark.parametrize(("shape", "low", "high"), [
    ("Crescendo", 0.6, 0.85), ("Decrescendo", 0.15, 0.4), ("Diamond", 0.45, 0.55), ("Plateau", 0.45, 0.55),
])  # fmt: skip
def test_shape_moves_the_envelopes_centroid(shape, low, high):
    samples, annotations = murmur_alone(dataclasses.replace(HOLOSYSTOLIC, shape=shape), duration_s=30)
    centroids, spreads = [], []
    for start_s, end_s, state in annotations[:-1]:
        if state == SYSTOLE:
            energy = samples[round(start_s * RATE_HZ) : round(end_s * RATE_HZ)] ** 2
            x = np.linspace(0, 1, len(energy))
            centroids.append(np.average(x, weights=energy))
            spreads.append(np.sqrt(np.average((x - centroids[-1]) ** 2, weights=energy)))
    assert low < np.mean(centroids) < high
    # A diamond and a plateau have the same centre; 0.29 is the spread of a constant on 0 ... 1.
    assert shape in ("Crescendo", "Decrescendo") or (np.mean(spreads) < 0.2) == (shape == "Diamond")


def test_grades_scale_the_amplitude():
    for phase, timing in ((SYSTOLE, "Holosystolic"), (DIASTOLE, "Holodiastolic")):
        grades = GRADES[phase]
        murmurs = [dataclasses.replace(HOLOSYSTOLIC, timing=timing, grading=grading) for grading in grades]
        levels = [rms(murmur_alone(murmur)[0]) for murmur in murmurs]
        true = list(grades.values())
        assert levels == pytest.approx([levels[0] / true[0] * gain for gain in true], rel=0.01)
        assert levels == sorted(levels)


@pytest.mark.parametrize("quality", QUALITIES)
@pytest.mark.parametrize("pitch", PITCHES)
def test_pitch_is_where_the_energy_is(pitch, quality):
    centre_hz = float(np.mean(PITCHES[pitch]))
    samples, _ = murmur_alone(dataclasses.replace(HOLOSYSTOLIC, pitch=pitch, quality=quality, centre_hz=centre_hz))
    f, p = power(samples)
    inside = (f > centre_hz / 2) & (f < centre_hz * 2)
    assert p[inside].sum() > 0.8 * p.sum()
    assert f[p.argmax()] == pytest.approx(centre_hz, rel=0.05 if quality == "Musical" else 0.4)


def test_musical_blowing_and_harsh_differ_in_bandwidth():
    flatness, octaves = {}, {}
    for quality in QUALITIES:
        f, p = power(murmur_alone(dataclasses.replace(HOLOSYSTOLIC, quality=quality), duration_s=30)[0])
        near = p[(f > 130) & (f < 250)]  # around the pitch of 180 Hz
        flatness[quality] = np.exp(np.mean(np.log(near))) / np.mean(near)
        height = np.log2(f[1:] / 180)
        octaves[quality] = np.sqrt(np.average((height - np.average(height, weights=p[1:])) ** 2, weights=p[1:]))
    assert flatness["Musical"] < 0.2 < 0.6 < flatness["Blowing"]
    assert octaves["Harsh"] > 1.5 * octaves["Blowing"]


def test_murmur_is_heard_at_some_sites_and_loudest_at_its_own():
    murmur = dataclasses.replace(HOLOSYSTOLIC, grading="I/VI")
    person = dataclasses.replace(PERSON, murmurs=(murmur,), murmur_site="AV")
    audible = audible_sites(person)
    level = {site: rms(heart(person, site)[0] - heart(PERSON, site)[0]) for site in SITES}
    assert {site for site in level if level[site] > 0} == set(audible)
    assert 1 <= len(audible) < 4
    assert max(level, key=level.__getitem__) == "AV"
    loud = dataclasses.replace(person, murmurs=(dataclasses.replace(murmur, grading="III/VI"),))
    assert len(audible_sites(loud)) > len(audible)
    assert audible_sites(PERSON) == []


# What the recording adds


@pytest.mark.parametrize("snr_db", [-5.0, 10.0, 30.0])
def test_white_noise_is_as_loud_as_asked(snr_db):
    person = dataclasses.replace(PERSON, murmurs=(HOLOSYSTOLIC,))
    clean, _ = heart(person)
    noise = heart(person, noise=Noise(snr_db=snr_db, gain_db=-20))[0] * 10 - clean
    assert 20 * np.log10(rms(clean) / rms(noise)) == pytest.approx(snr_db, abs=1)
    _, p = power(noise)
    assert p[5:-5].max() < 4 * p[5:-5].min()  # white


def test_breathing_speech_and_rubs_sound_different():
    clean, _ = heart(duration_s=40)
    flat = Stethoscope(5, 5000)
    added = {
        field: heart(noise=Noise(**{field: value}), duration_s=40, stethoscope=flat)[0]
        - heart(duration_s=40, stethoscope=flat)[0]
        for field, value in (("breathing", 0.05), ("speech", 0.05), ("rubs_per_s", 1.0))
    }
    breathing = scipy.signal.sosfiltfilt(scipy.signal.butter(2, 1, fs=RATE_HZ, output="sos"), added["breathing"] ** 2)
    f, p = scipy.signal.periodogram(breathing - breathing.mean(), RATE_HZ)
    assert f[p.argmax()] == pytest.approx(PERSON.breaths_per_minute / 60, abs=0.03)
    assert np.percentile(breathing, 99) ** 0.5 == pytest.approx(0.3 * 0.05, rel=0.25)
    kurtosis = {field: np.mean(x**4) / np.mean(x**2) ** 2 for field, x in added.items()}
    assert kurtosis["rubs_per_s"] > 3 * kurtosis["breathing"]
    syllables = np.abs(added["speech"])
    f, p = scipy.signal.periodogram(syllables - syllables.mean(), RATE_HZ)
    assert f[(f > 2)][p[(f > 2)].argmax()] == pytest.approx(4, abs=0.6)
    assert np.mean(syllables[: len(clean)] < 1e-4) > 0.2  # pauses between the phrases


def test_gain_scales_and_clips():
    clean, _ = heart()
    quiet, _ = heart(noise=Noise(gain_db=-12))
    assert quiet == pytest.approx(clean * 10 ** (-12 / 20), abs=1e-6)
    loud, _ = heart(noise=Noise(gain_db=20))
    assert abs(loud).max() == 1
    assert np.mean(abs(loud) == 1) > 0.005
    assert loud == pytest.approx(np.clip(clean * 10, -1, 1), abs=1e-5)


def test_stethoscopes_resonate_and_cut():
    def spectrum(**how):
        return abs(np.fft.rfft(heart(stethoscope=Stethoscope(**how))[0]))

    f = np.fft.rfftfreq(12 * RATE_HZ, 1 / RATE_HZ)
    near = (f > 98) & (f < 102)
    gain = spectrum(resonance_hz=100, resonance_db=6) / spectrum(resonance_hz=100, resonance_db=0)
    assert np.median(gain[near]) == pytest.approx(10 ** (6 / 20), rel=0.05)
    assert np.median(gain[(f > 25) & (f < 27)]) == pytest.approx(1, rel=0.05)
    cut = spectrum(high_hz=100) / spectrum(high_hz=1e6)
    assert np.median(cut[near]) == pytest.approx(0.5**0.5, rel=0.05)
    assert np.median(cut[(f > 190) & (f < 210)]) < 0.3


# Corpora


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_processes_and_people_are_independent_and_reproducible(tmp_path, monkeypatch):
    settings: dict[str, Any] = dict(people=80, recordings_per_person=1, duration_s=(3, 3), rate_hz=1000, seed=4)
    for cores in (1, 2):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        assert synthetic.write(tmp_path / str(cores), **settings) == 80
    first = contents(tmp_path / "1")
    assert first == contents(tmp_path / "2")
    synthetic.write(tmp_path / "fewer", **settings | {"people": 12})
    # A person stays the same in a smaller corpus; only the tables and settings change.
    fewer = {path: data for path, data in contents(tmp_path / "fewer").items() if path.suffix in (".wav", ".mat")}
    assert len(fewer) == 24
    assert all(first[path] == data for path, data in fewer.items())
    synthetic.write(tmp_path / "other", **settings | {"people": 12, "seed": 5})
    assert all(contents(tmp_path / "other")[path] != data for path, data in fewer.items())


@pytest.fixture
def written(monkeypatch):
    """What was simulated, by record: (person, site, annotations)."""
    truth = {}
    save = synthetic._save

    def spy(path, corpus, rng, person, site, *rest):
        annotations, count = save(path, corpus, rng, person, site, *rest)
        truth[path.stem] = (person, site, list(annotations))
        return annotations, count

    monkeypatch.setattr(synthetic, "_save", spy)
    return truth


def same_annotations(found, true, tolerance_s):
    assert [state for _, _, state in found] == [state for _, _, state in true]
    assert np.array(found)[:, :2] == pytest.approx(np.array(true)[:, :2], abs=tolerance_s)


def grouped(recordings, truth):
    """The loader's persons and the simulated ones are the same partition, where the loader knows persons."""
    known = [(r.person, truth(r)) for r in recordings]
    assert len(set(known)) == len({a for a, _ in known}) == len({b for _, b in known})


def test_cinc2016_round_trip(tmp_path, written):
    count = synthetic.write(tmp_path / "c", people=24, recordings_per_person=2, duration_s=(3, 4), seed=2)
    recordings, problems = load("synthetic", tmp_path / "c")
    assert problems == []
    assert count == len(recordings) == len(written) == 8 * 2 + 16
    classes: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    sites = {word: site for site, word in synthetic._TRANSDUCER_SITES.items()}
    for recording in recordings:
        person, site, annotations = written[recording.id]
        assert recording.rate_hz == 2000
        assert recording.labels["abnormal"] == str(int(bool(person.murmurs)))
        assert sites[recording.labels["site"]] == site
        assert not person.murmurs or site in audible_sites(person)
        same_annotations(recording.annotations, annotations, 0.5 / 2000 + 1e-9)
        assert audio.read(recording.path)[1] == 2000
        assert recording.person_known == (recording.database[-1] in "abc")
        classes[recording.database][recording.person, recording.labels["class"]] += 1
    assert sorted(classes) == [f"synthetic-{letter}" for letter in "abcdef"]
    for database, people in classes.items():
        assert collections.Counter(label for _, label in people) == {"normal": 2, "abnormal": 2}
        assert set(people.values()) == {2 if database[-1] in "ab" else 1}
    grouped(recordings, lambda r: written[r.id][0])


def test_circor_round_trip(tmp_path, written):
    synthetic.write(tmp_path / "c", "circor", people=30, recordings_per_person=5, duration_s=(3, 3), seed=1)
    recordings, problems = load("synthetic", tmp_path / "c")
    assert problems == []
    assert len(recordings) == len(written) == 5 * (30 + 3)  # three people came back under a second id
    for recording in recordings:
        person, site, annotations = written[recording.id]
        labels = recording.labels
        assert (recording.database, recording.rate_hz, recording.person_known) == ("synthetic", 4000, True)
        assert labels["site"] == site
        assert labels["abnormal"] == str(int(bool(person.murmurs)))
        same_annotations(recording.annotations, [(0.0, annotations[0][0], UNANNOTATED), *annotations], 1e-6)
        if labels["murmur_status"] == "Unknown":
            assert not any(key.startswith(("systolic", "diastolic", "murmur_audible")) for key in labels)
            continue
        assert labels["murmur"] == labels["abnormal"]
        assert labels["murmur_audible"] == str(int(site in audible_sites(person)))
        assert labels.get("most_audible_site") == (person.murmur_site if person.murmurs else None)
        by_phase = {murmur.phase: murmur for murmur in person.murmurs}
        for phase, word in ((SYSTOLE, "systolic"), (DIASTOLE, "diastolic")):
            for feature in ("timing", "shape", "grading", "pitch", "quality"):
                assert labels.get(f"{word}_{feature}") == getattr(by_phase.get(phase), feature, None)
    status = collections.Counter(recording.labels["murmur_status"] for recording in recordings)
    assert all(status[word] for word in ("Present", "Absent", "Unknown"))
    grouped(recordings, lambda r: written[r.id][0])
    twice = [r for r in recordings if r.path.name.startswith("50005_")]
    other = [r for r in recordings if r.path.name.startswith("80005_")]
    assert twice[0].person == other[0].person
    assert twice[0].labels["campaign"] != other[0].labels["campaign"]
    assert sum(r.id.endswith("_2") for r in twice) == 1  # five recordings at four sites


def test_pascal_round_trip(tmp_path, written):
    synthetic.write(tmp_path / "c", "pascal", people=40, recordings_per_person=2, duration_s=(3, 3), seed=3)
    recordings, problems = load("synthetic", tmp_path / "c")
    assert problems == []
    assert len(recordings) == len(written) == 20 + 2 * 20
    for recording in recordings:
        person, _, annotations = written[recording.path.stem]
        in_a = recording.database == "synthetic-a"
        assert recording.rate_hz == (44100 if in_a else 4000)
        assert recording.person_known != in_a
        expected = "murmur" if person.murmurs else "extrastole" if person.extrasystoles else "normal"
        assert recording.labels["class"] == expected
        sounds = [mark for mark in annotations[:-1] if mark[2] in (S1, S2)]
        if sounds[0][2] == S2:
            sounds = sounds[1:]
        assert len(recording.annotations) == (len(sounds) if in_a else 0)
        for (at_s, _, state), (start_s, end_s, true_state) in zip(recording.annotations, sounds, strict=False):
            assert state == true_state
            assert start_s < at_s < end_s
    in_b = [r.labels for r in recordings if r.database == "synthetic-b"]
    assert {labels["class"] for labels in in_b} == {"normal", "murmur", "extrastole"}
    assert {labels["noisy"] for labels in in_b} == {"0", "1"}
    grouped(recordings, lambda r: written[r.path.stem][0])


def test_default_corpus_is_written_where_there_is_none(tmp_path, monkeypatch):
    small = functools.partial(synthetic.write, people=6, recordings_per_person=1, duration_s=(3, 3))
    monkeypatch.setattr(synthetic, "write", small)
    (tmp_path / "empty").mkdir()
    for name in ("missing", "empty"):
        recordings, _ = load("synthetic", tmp_path / name)
        assert len(recordings) == 6
    before = contents(tmp_path / "missing")
    load("synthetic", tmp_path / "missing")
    assert contents(tmp_path / "missing") == before


def test_interrupted_write_is_refused(tmp_path, monkeypatch):
    def cut(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(synthetic, "_cinc_tables", cut)
    with pytest.raises(KeyboardInterrupt):
        synthetic.write(tmp_path / "c", people=6, recordings_per_person=1, duration_s=(3, 3))
    monkeypatch.undo()
    assert contents(tmp_path / "c")
    with pytest.raises(DatasetError, match=r"interrupted.*delete the folder"):
        load("synthetic", tmp_path / "c")
    with pytest.raises(DatasetError, match="not an empty folder"):
        synthetic.write(tmp_path / "c", people=6)


@pytest.mark.parametrize("text", ["{", "[]", '{"layout": "circus"}'])
def test_damaged_settings_are_refused(tmp_path, text):
    (tmp_path / "synthetic.json").write_text(text)
    with pytest.raises(DatasetError, match="layout"):
        load("synthetic", tmp_path)


@pytest.mark.parametrize(("field", "value"), [
    ("layout", "mp3"), ("people", 0), ("recordings_per_person", 0), ("duration_s", (6, 5)), ("duration_s", (1, 5)),
    ("rate_hz", 500), ("seed", -1), ("snr_db", float("nan")), ("murmur_fraction", 1.5),
])  # fmt: skip
def test_settings_out_of_range_are_named(tmp_path, field, value):
    with pytest.raises(DatasetError, match=field):
        synthetic.write(tmp_path / "c", **{field: value})
    assert not (tmp_path / "c").exists()


def test_command_line(tmp_path):
    command = [sys.executable, "-m", "pcgjax.datasets.synthetic", f"--out={tmp_path / 'c'}", "--people=2"]
    options = ["--layout=circor", "--recordings_per_person=2", "--duration_s=3,4", "--seed=6", "--snr_db=12"]
    root = pathlib.Path(synthetic.__file__).parents[2]
    done = subprocess.run([*command, *options], cwd=root, capture_output=True, text=True, check=True)
    assert "4 recordings of 2 people" in done.stdout
    settings = json.loads((tmp_path / "c" / "synthetic.json").read_text())
    assert settings == {
        "layout": "circor", "people": 2, "recordings_per_person": 2, "duration_s": [3.0, 4.0], "rate_hz": 4000,
        "seed": 6, "snr_db": 12.0, "murmur_fraction": 0.5,
    }  # fmt: skip
    again = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert again.returncode == 1
    assert again.stderr.startswith("error: ")
    assert "not an empty folder" in again.stderr
