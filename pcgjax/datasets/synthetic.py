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
import importlib
import json
import math
import multiprocessing
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.fft

from pcgjax import files
from pcgjax.datasets import DIASTOLE, S1, S2, SYSTOLE, UNANNOTATED, DatasetError, Problem, Recording, state_ans

LAYOUT = "a folder that `python -m pcgjax.datasets.synthetic --out=DIR` wrote, or an empty or missing one"
LAYOUTS = {"cinc2016": 2000, "circor": 4000, "pascal": 4000}  # layout -> its usual rate in Hz

Annotations = list[tuple[float, float, int]]  # (start_s, end_s, state) as in `Recording.annotations`

# Loudness of (mitral, tricuspid, aortic, pulmonary) closure under each auscultation site.
SITES = {
    "AV": (0.55, 0.35, 1.00, 0.35),
    "PV": (0.50, 0.35, 0.90, 0.75),
    "TV": (0.80, 0.60, 0.60, 0.30),
    "MV": (1.00, 0.45, 0.60, 0.20),
}
# The sites on the chest, in cm right of and above the second left intercostal space at the sternum.
_SITE_CM = {"AV": (6.0, 0.0), "PV": (0.0, 0.0), "TV": (1.0, -6.0), "MV": (-5.0, -9.0)}
_FALLOFF_CM = 7.0  # a murmur's amplitude falls by e over this distance
_AUDIBLE = 0.10  # below this amplitude a murmur is not heard at a site, nor simulated there

# timing -> (phase, begin, end), the last two as shares of the silence between the sounds.
TIMINGS = {
    "Early-systolic": (SYSTOLE, 0.0, 0.5),
    "Mid-systolic": (SYSTOLE, 0.2, 0.8),
    "Late-systolic": (SYSTOLE, 0.5, 1.0),
    "Holosystolic": (SYSTOLE, 0.0, 1.0),
    "Early-diastolic": (DIASTOLE, 0.0, 0.45),
    "Mid-diastolic": (DIASTOLE, 0.25, 0.7),
    "Holodiastolic": (DIASTOLE, 0.0, 1.0),
}
SHAPES: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # envelope over the murmur's own time, 0 to 1
    "Crescendo": lambda x: x,
    "Decrescendo": lambda x: 1 - x,
    "Diamond": lambda x: 1 - abs(2 * x - 1),
    "Plateau": np.ones_like,
}
GRADES = {  # phase -> grading -> RMS amplitude at the envelope's peak, at the site where it is loudest
    SYSTOLE: {"I/VI": 0.14, "II/VI": 0.26, "III/VI": 0.48},
    DIASTOLE: {"I/IV": 0.14, "II/IV": 0.22, "III/IV": 0.33, "IV/IV": 0.48},
}
PITCHES = {"Low": (95.0, 130.0), "Medium": (150.0, 210.0), "High": (250.0, 340.0)}  # centre in Hz
QUALITIES = ("Blowing", "Harsh", "Musical")
_BANDWIDTH_OCTAVES = {"Blowing": 0.3, "Harsh": 0.7}  # standard deviation of the noise's spectrum

AGES = {  # age, in CirCor's words -> (share, resting heart rate in bpm, height in cm)
    "Infant": (0.10, (105.0, 135.0), (60.0, 90.0)),
    "Child": (0.40, (75.0, 115.0), (95.0, 145.0)),
    "Adolescent": (0.25, (62.0, 95.0), (145.0, 180.0)),
    "Young Adult": (0.25, (55.0, 90.0), (155.0, 190.0)),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Murmur:
    """A murmur as a cardiologist describes it, in CirCor's words, and the one number the words leave open."""

    timing: str  # of TIMINGS
    shape: str  # of SHAPES
    grading: str  # of GRADES
    pitch: str  # of PITCHES
    quality: str  # of QUALITIES
    centre_hz: float

    @property
    def phase(self) -> int:
        return TIMINGS[self.timing][0]


@dataclasses.dataclass(frozen=True, slots=True)
class Person:
    """The physiology that all recordings of a person share."""

    age: str  # of AGES
    sex: str  # Female or Male
    height_cm: float
    heart_rate_bpm: float
    sinus_arrhythmia: float  # RR shortens by this share in inspiration and lengthens in expiration
    rr_jitter: float  # random share of RR, standard deviation
    breaths_per_minute: float
    s1_hz: tuple[float, float]  # mitral, tricuspid
    s1_split_s: float
    s2_hz: tuple[float, float]  # aortic, pulmonary
    s2_split_s: tuple[float, float]  # A2-P2 at full expiration, at full inspiration
    s2_loudness: float
    brightness: float  # loudness of the sounds' overtones
    murmur_site: str  # where a murmur is loudest; drawn for everybody, so that a site tells nothing of the class
    murmurs: tuple[Murmur, ...] = ()  # none, systolic, diastolic, or both
    extrasystoles: float = 0.0  # share of premature beats; above 0 each recording holds one at least


@dataclasses.dataclass(frozen=True, slots=True)
class Noise:
    """What a recording adds to the heart."""

    snr_db: float = math.inf  # power of heart sounds and murmur over that of the white background, whole recording
    breathing: float = 0.0  # RMS in full inspiration
    speech: float = 0.0  # RMS while somebody speaks
    rubs_per_s: float = 0.0  # friction transients
    gain_db: float = 0.0  # at 0 dB the reference S1 peaks at 0.3 of full scale; samples beyond full scale are clipped


@dataclasses.dataclass(frozen=True, slots=True)
class Stethoscope:
    """Magnitude response: second-order slopes below and above the pass band, and one resonance."""

    low_hz: float = 20.0
    high_hz: float = 800.0
    resonance_hz: float = 150.0
    resonance_db: float = 0.0


# One clinic for each database of CinC 2016: (stethoscope, gain_db, change of snr_db, factor on breathing).
CLINICS = {
    "a": (Stethoscope(25, 700, 120, 3), 0.0, 0.0, 1.0),
    "b": (Stethoscope(35, 450, 200, 2), -8.0, -3.0, 1.0),
    "c": (Stethoscope(20, 900, 90, 4), 3.0, 3.0, 0.6),
    "d": (Stethoscope(30, 600, 250, 3), -4.0, 0.0, 1.4),
    "e": (Stethoscope(20, 500, 60, 4), 5.0, 2.0, 0.8),
    "f": (Stethoscope(40, 800, 160, 0), -2.0, -2.0, 1.2),
}


def draw_person(
    rng: np.random.Generator, index: int, murmur_fraction: float = 0.5, extrasystoles: float = 0.0
) -> Person:
    """Draws one person; of persons 0 ... n-1 the share `murmur_fraction` has a murmur, to within one person."""
    shares = np.array([share for share, _, _ in AGES.values()])
    age = str(rng.choice(list(AGES), p=shares / shares.sum()))
    _, rate_bpm, height_cm = AGES[age]
    m1_hz, a2_hz = rng.uniform(34, 48), rng.uniform(60, 85)
    both = rng.random()
    drawn = (draw_murmur(rng, SYSTOLE), draw_murmur(rng, DIASTOLE))
    murmurs = drawn[:1] if both < 0.65 else drawn[1:] if both < 0.9 else drawn
    return Person(
        age=age,
        sex=str(rng.choice(["Female", "Male"])),
        height_cm=round(rng.uniform(*height_cm), 1),
        heart_rate_bpm=rng.uniform(*rate_bpm),
        sinus_arrhythmia=rng.uniform(0.01, 0.07),
        rr_jitter=rng.uniform(0.005, 0.025),
        breaths_per_minute=rng.uniform(12, 20) * (1.6 if age == "Infant" else 1.0),
        s1_hz=(m1_hz, m1_hz * rng.uniform(1.05, 1.3)),
        s1_split_s=rng.uniform(0.018, 0.030),
        s2_hz=(a2_hz, a2_hz * rng.uniform(0.8, 0.95)),
        s2_split_s=(rng.uniform(0.012, 0.022), rng.uniform(0.035, 0.050)),
        s2_loudness=rng.uniform(0.6, 1.0),
        brightness=math.exp(rng.normal(0, 0.25)),
        murmur_site=str(rng.choice(list(SITES))),
        murmurs=murmurs if _chosen(index, murmur_fraction) else (),
        extrasystoles=extrasystoles,
    )


def draw_murmur(rng: np.random.Generator, phase: int) -> Murmur:
    """Draws each feature by itself, so that no word can be guessed from another; `phase` is SYSTOLE or DIASTOLE."""
    pitch = str(rng.choice(list(PITCHES)))
    return Murmur(
        timing=str(rng.choice([timing for timing, (of, _, _) in TIMINGS.items() if of == phase])),
        shape=str(rng.choice(list(SHAPES))),
        grading=str(rng.choice(list(GRADES[phase]))),
        pitch=pitch,
        quality=str(rng.choice(QUALITIES)),
        centre_hz=rng.uniform(*PITCHES[pitch]),
    )


def draw_noise(rng: np.random.Generator, snr_db: float, bad: bool = False) -> Noise:
    """Draws a recording's noise: snr_db within ±5 dB, sometimes speech or clipping; `bad`: hardly usable."""
    clips = rng.random() < 0.03
    speaks = rng.random() < (0.8 if bad else 0.12)
    return Noise(
        snr_db=rng.uniform(-5, 5) + (min(snr_db, 0.0) if bad else snr_db),
        breathing=(0.15 if bad else 0.012) * math.exp(rng.normal(0, 0.5)),
        speech=(rng.uniform(0.1, 0.3) if bad else rng.uniform(0.02, 0.06)) if speaks else 0.0,
        rubs_per_s=rng.uniform(1.5, 3.0) if bad else rng.exponential(0.15),
        gain_db=rng.uniform(14, 20) if clips else rng.normal(0, 3),
    )


def murmur_gain(person: Person, site: str, murmur: Murmur) -> float:
    """RMS amplitude of the murmur at its envelope's peak under `site`; 0 where it cannot be heard."""
    gain = GRADES[murmur.phase][murmur.grading] * math.exp(
        -math.dist(_SITE_CM[site], _SITE_CM[person.murmur_site]) / _FALLOFF_CM
    )
    return gain if gain >= _AUDIBLE else 0.0


def audible_sites(person: Person) -> list[str]:
    """The sites where a murmur of this person is heard, in the order of SITES."""
    return [site for site in SITES if any(murmur_gain(person, site, murmur) for murmur in person.murmurs)]


def systole_s(heart_rate_bpm: float | np.ndarray, sex: str) -> np.ndarray:
    """Onset of S1 to onset of S2: ejection time (Weissler 1968), preceded by 25 ms of isovolumetric contraction.

    Weissler: 413 - 1.7 HR ms for men, 418 - 1.6 HR ms for women.
    """
    at_zero, slope = {"Male": (0.413, 0.0017), "Female": (0.418, 0.0016)}[sex]
    return at_zero - slope * np.asarray(heart_rate_bpm) + 0.025


def simulate(
    person: Person,
    site: str,
    rng: np.random.Generator,
    duration_s: float,
    rate_hz: int,
    noise: Noise | None = None,
    stethoscope: Stethoscope | None = None,
) -> tuple[np.ndarray, Annotations]:
    """One recording at `site` (of SITES). The heart is drawn first, so the same rng state gives it for any noise.

    Returns: (samples float32 (n,) with full scale at 1, annotations without a gap from the first complete sound to
      the end of the recording).
    """
    noise, stethoscope = noise or Noise(), stethoscope or Stethoscope()
    time_s = np.arange(round(duration_s * rate_hz)) / rate_hz
    duration_s = len(time_s) / rate_hz
    breath_phase = rng.uniform(0, 2 * np.pi)
    breath_hz = person.breaths_per_minute / 60
    beats = _beats(person, rng, duration_s, lambda t: np.sin(2 * np.pi * breath_hz * t + breath_phase))

    heart = _sounds(person, site, beats, rng, time_s, rate_hz)
    for murmur in person.murmurs:
        heart += murmur_gain(person, site, murmur) * _murmur(murmur, beats, rng, time_s, rate_hz)
    filtered = functools.partial(_filtered, rate_hz=rate_hz, response=functools.partial(_response, stethoscope))
    samples = heart = filtered(heart)

    inspiration = np.sin(2 * np.pi * breath_hz * time_s + breath_phase)
    room = noise.breathing * _breathing(inspiration, rng, rate_hz)
    if noise.speech:
        room += noise.speech * _speech(rng, time_s, rate_hz)
    if noise.rubs_per_s:
        room += _rubs(noise.rubs_per_s, rng, time_s, rate_hz)
    samples = heart + filtered(room)
    samples += rng.standard_normal(len(samples)) * np.sqrt(np.mean(heart**2) / 10 ** (noise.snr_db / 10))
    samples *= 0.3 * 10 ** (noise.gain_db / 20)
    return np.clip(samples, -1, 1).astype(np.float32), _annotations(beats, duration_s, rate_hz)


class _Beats(NamedTuple):
    """Per beat (k,): bounds in seconds of S1 and S2 as annotated, and when each valve closes."""

    s1: np.ndarray  # (k, 2) start, end
    s2: np.ndarray  # (k, 2) start, end
    closures: np.ndarray  # (k, 4) mitral, tricuspid, aortic, pulmonary


# A valve's sound rises and falls as the halves of two Gaussians, in s; its end is where 4 % of it is left.
_RISE_FALL_S = {S1: (0.009, 0.020), S2: (0.006, 0.013)}
_END = 2.5
# Overtones of a closure: multiple of its pitch, amplitude, and length relative to the fundamental's.
_MODES = ((1.0, 1.0, 1.0), (2.3, 0.2, 0.7), (4.1, 0.05, 0.5))


def _beats(
    person: Person, rng: np.random.Generator, duration_s: float, breath: Callable[[np.ndarray], np.ndarray]
) -> _Beats:
    """Beats that cover the recording, with one before it and some after; `breath`: time -> -1 ... 1 (inspiration)."""
    rr = 60 / person.heart_rate_bpm
    count = math.ceil(1.3 * duration_s / rr) + 6
    first = -rr * rng.uniform(1, 2)
    about = first + rr * np.arange(count)  # close enough to find the breath's phase
    intervals = rr * (1 - person.sinus_arrhythmia * breath(about) + person.rr_jitter * rng.standard_normal(count))
    systole = systole_s(60 / intervals, person.sex) * (1 + 0.01 * rng.standard_normal(count))
    premature = np.flatnonzero(rng.random(count) < person.extrasystoles)
    if person.extrasystoles:
        premature = np.union1d(premature, [1 + round((duration_s / 2 - first) / rr)])
    for beat in premature[(premature > 0) & (np.diff(premature, prepend=-2) > 1)]:  # never two in a row
        intervals[beat - 1], intervals[beat] = 0.65 * rr, 1.35 * rr  # early, then the compensatory pause
    split = np.interp(breath(about), [-1, 1], person.s2_split_s)
    rise, fall = (_END * x for x in _RISE_FALL_S[S2])
    s2_length = rise + split + fall
    intervals = np.maximum(intervals, systole + s2_length + 0.04)  # diastole never vanishes
    s1_start = first + np.concatenate([[0], np.cumsum(intervals)[:-1]])
    s2_start = s1_start + systole
    mitral, aortic = s1_start + _END * _RISE_FALL_S[S1][0], s2_start + rise
    return _Beats(
        s1=np.stack([s1_start, mitral + person.s1_split_s + _END * _RISE_FALL_S[S1][1]], 1),
        s2=np.stack([s2_start, s2_start + s2_length], 1),
        closures=np.stack([mitral, mitral + person.s1_split_s, aortic, aortic + split], 1),
    )


def _annotations(beats: _Beats, duration_s: float, rate_hz: int) -> Annotations:
    starts = np.stack([beats.s1[:, 0], beats.s1[:, 1], beats.s2[:, 0], beats.s2[:, 1]], 1).ravel()
    states = np.tile([S1, SYSTOLE, S2, DIASTOLE], len(beats.s1))
    first = np.flatnonzero((starts >= 0) & np.isin(states, [S1, S2]))[0]
    # A last piece shorter than a sample would have no length in a layout that counts samples.
    inside = slice(first, np.searchsorted(starts, duration_s - 1 / rate_hz))
    bounds = [*starts[inside].tolist(), duration_s]
    return list(zip(bounds[:-1], bounds[1:], states[inside].tolist(), strict=True))


def _sounds(
    person: Person, site: str, beats: _Beats, rng: np.random.Generator, time_s: np.ndarray, rate_hz: int
) -> np.ndarray:
    """S1 and S2: each of the four closures is a sum of damped oscillations. Returns (n,)."""
    loudness = np.array(SITES[site]) * np.array([1, 1, person.s2_loudness, person.s2_loudness])
    pad = rate_hz  # beats reach over both ends of the recording
    samples = np.zeros(len(time_s) + 2 * pad)
    for valve, pitch_hz in enumerate((*person.s1_hz, *person.s2_hz)):
        rise, fall = _RISE_FALL_S[S1 if valve < 2 else S2]
        closure = beats.closures[:, valve]
        closure = closure[(closure > -0.5) & (closure < len(time_s) / rate_hz + 0.5)]
        index = np.round((closure - 4 * rise) * rate_hz).astype(int)[:, None] + np.arange(
            math.ceil(4 * (rise + fall) * rate_hz)
        )
        time = index / rate_hz - closure[:, None]  # (beats, samples)
        pitch = pitch_hz * (1 + 0.01 * rng.standard_normal((len(closure), 1)))
        burst = np.zeros_like(time)
        for order, (multiple, amplitude, length) in enumerate(_MODES):
            envelope = np.exp(-0.5 * (time / (length * np.where(time < 0, rise, fall))) ** 2)
            amplitude *= person.brightness if order else 1.0
            burst += amplitude * envelope * np.cos(2 * np.pi * multiple * pitch * time + 1.3 * order)
        burst *= loudness[valve] * (1 + 0.06 * rng.standard_normal((len(closure), 1)))
        np.add.at(samples, index + pad, burst)
    return samples[pad:-pad]


def _murmur(murmur: Murmur, beats: _Beats, rng: np.random.Generator, time_s: np.ndarray, rate_hz: int) -> np.ndarray:
    """The murmur with an RMS of 1 where its envelope is 1. Returns (n,)."""
    phase, begin, end = TIMINGS[murmur.timing]
    if phase == SYSTOLE:
        silence = np.stack([beats.s1[:, 1], beats.s2[:, 0]], 1)[:-1]
    else:
        silence = np.stack([beats.s2[:-1, 1], beats.s1[1:, 0]], 1)
    start = silence[:, 0] + begin * np.diff(silence, axis=1)[:, 0]
    length = (end - begin) * np.diff(silence, axis=1)[:, 0]
    loudness = 1 + 0.08 * rng.standard_normal(len(start))
    beat = np.clip(np.searchsorted(start, time_s, side="right") - 1, 0, None)
    x = (time_s - start[beat]) / length[beat]  # the murmur's own time
    edge = np.clip(np.minimum(x, 1 - x) / 0.08, 0, 1)
    envelope = loudness[beat] * edge * SHAPES[murmur.shape](x)
    if murmur.quality == "Musical":
        vibrato = 1 + 0.01 * np.sin(2 * np.pi * 5 * time_s + rng.uniform(0, 2 * np.pi))
        phase_rad = 2 * np.pi * murmur.centre_hz * np.cumsum(vibrato) / rate_hz
        overtones = np.array([1, 0.35, 0.12])
        carrier = overtones @ np.cos(np.arange(1, 4)[:, None] * phase_rad) / np.sqrt((overtones**2).sum() / 2)
        return envelope * carrier
    octaves = _BANDWIDTH_OCTAVES[murmur.quality]
    carrier = _noise(len(time_s), rng, rate_hz, lambda f: np.exp(-0.5 * (np.log2(f / murmur.centre_hz) / octaves) ** 2))
    if murmur.quality == "Harsh":  # turbulence that flutters
        carrier *= np.exp(0.5 * _noise(len(time_s), rng, rate_hz, lambda f: 1 / (1 + (f / 30) ** 4)))
        carrier /= np.sqrt(np.mean(carrier**2))
    return envelope * carrier


def _breathing(inspiration: np.ndarray, rng: np.random.Generator, rate_hz: int) -> np.ndarray:
    """Lung sound, louder in inspiration than in expiration, pink from 60 to 600 Hz; 1 RMS at its loudest. (n,)."""
    carrier = _noise(len(inspiration), rng, rate_hz, lambda f: f**-0.5 / (1 + (60 / f) ** 4) / (1 + (f / 600) ** 4))
    return carrier * np.where(inspiration > 0, inspiration, -0.4 * inspiration)


def _speech(rng: np.random.Generator, time_s: np.ndarray, rate_hz: int) -> np.ndarray:
    """Voiced pulses through two formants and the chest, at about four syllables a second; 1 RMS in phrases. (n,)."""
    voice_hz = rng.uniform(110, 240)
    glide = 1 + 0.15 * np.sin(2 * np.pi * 0.7 * time_s + rng.uniform(0, 2 * np.pi))
    cycles = voice_hz * np.cumsum(glide) / rate_hz
    pulses = np.diff(np.floor(cycles), prepend=0)
    formants_hz = (rng.uniform(300, 800), rng.uniform(900, 1800))
    voice = _filtered(
        pulses,
        rate_hz,
        lambda f: sum(1 / (1 + ((f - formant) / 80) ** 2) for formant in formants_hz) / (1 + (f / 600) ** 2),
    )
    voice /= np.sqrt(np.mean(voice**2))
    syllables = 0.5 + 0.5 * np.sin(2 * np.pi * 4 * time_s + rng.uniform(0, 2 * np.pi))
    phrases = np.sin(2 * np.pi * rng.uniform(0.15, 0.35) * time_s + rng.uniform(0, 2 * np.pi)) > 0
    return voice * syllables * phrases / np.sqrt(3 / 8)


def _rubs(rubs_per_s: float, rng: np.random.Generator, time_s: np.ndarray, rate_hz: int) -> np.ndarray:
    """Friction of the stethoscope on skin or cloth: short broad-band bursts, some louder than S1. Returns (n,)."""
    envelope = np.zeros(len(time_s))
    for _ in range(rng.poisson(rubs_per_s * len(time_s) / rate_hz)):
        start, fall = rng.integers(len(time_s)), rng.uniform(0.003, 0.05)
        tail = time_s[: math.ceil(5 * fall * rate_hz)]
        tail = tail[: len(time_s) - start]
        envelope[start : start + len(tail)] += 0.3 * math.exp(rng.normal(0, 0.7)) * np.exp(-tail / fall)
    return envelope * _noise(len(time_s), rng, rate_hz, lambda f: 1 / (1 + (40 / f) ** 4) / (1 + (f / 500) ** 2))


def _response(stethoscope: Stethoscope, f: np.ndarray) -> np.ndarray:
    """Magnitude at frequencies f > 0 in Hz."""
    resonance = (10 ** (stethoscope.resonance_db / 20) - 1) * np.exp(
        -0.5 * (np.log2(f / stethoscope.resonance_hz) / 0.4) ** 2
    )
    slopes = np.sqrt(1 + (stethoscope.low_hz / f) ** 4) * np.sqrt(1 + (f / stethoscope.high_hz) ** 4)
    return (1 + resonance) / slopes


def _noise(
    count: int, rng: np.random.Generator, rate_hz: int, response: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Gaussian noise of the given magnitude spectrum, scaled to an RMS of 1. Returns (count,)."""
    samples = _filtered(rng.standard_normal(count), rate_hz, response)
    return samples / np.sqrt(np.mean(samples**2))


def _filtered(samples: np.ndarray, rate_hz: int, response: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Zero-phase filter, so that the annotations stay true: multiplies the spectrum by response(f), f > 0 in Hz."""
    size = scipy.fft.next_fast_len(len(samples) + rate_hz // 4, real=True)
    spectrum = scipy.fft.rfft(samples, size)
    spectrum[0] = 0
    spectrum[1:] *= response(scipy.fft.rfftfreq(size, 1 / rate_hz)[1:])
    return scipy.fft.irfft(spectrum, size)[: len(samples)]


def _chosen(index: int, fraction: float) -> bool:
    """Whether item `index` belongs to the `fraction` of all items, spread evenly and without chance."""
    return math.floor((index + 1) * fraction + 1e-9) > math.floor(index * fraction + 1e-9)


# Corpora


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
    recordings, problems = importlib.import_module(f"pcgjax.datasets.{layout}").load(source)
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
) -> tuple[Annotations, int]:
    """Simulates one recording into a 16-bit WAV. Returns (annotations, samples written)."""
    import soundfile

    rate_hz = rate_hz or corpus.rate_hz
    samples, annotations = simulate(person, site, rng, rng.uniform(*corpus.duration_s), rate_hz, noise, stethoscope)
    soundfile.write(str(path), samples, rate_hz, subtype="PCM_16")
    return annotations, len(samples)


def _rngs(corpus: _Corpus, person: int) -> tuple[np.random.Generator, Callable[[int], np.random.Generator]]:
    """Generators of the person and of recording r: people and recordings can be made in any order."""
    return (
        np.random.default_rng([corpus.seed, person]),
        lambda recording: np.random.default_rng([corpus.seed, person, 1 + recording]),
    )


def _sites(corpus: _Corpus, person: int) -> list[str]:
    """Where the person is recorded: where the murmur is heard, or of a normal person would be if there were one.

    The site then tells nothing of the class.
    """
    return audible_sites(draw_person(_rngs(corpus, person)[0], 0, murmur_fraction=1.0))


def _table(path: pathlib.Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows] if header else rows)


_STATE_WORDS = {S1: "S1", SYSTOLE: "systole", S2: "S2", DIASTOLE: "diastole"}
_TRANSDUCER_SITES = {  # database a's own words
    "AV": "2nd right intercostal space",
    "PV": "Superior of Parasternum",
    "TV": "Left of parasternum",
    "MV": "Left of apex",
}


def _cinc_person(out: pathlib.Path, corpus: _Corpus, person_index: int) -> list[dict[str, Any]]:
    # Clinics take turns, and each has its own quota of murmurs: the clinic tells nothing of the class.
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
        heard = [site for site in audible_sites(person) if site in sites] if described else []
        table = {
            "Patient ID": patient,
            "Locations": "+".join(sites),
            "Age": person.age,
            "Sex": person.sex,
            "Height": person.height_cm,
            "Weight": round(17 * (person.height_cm / 100) ** 2, 1),  # a body mass index of 17, usual in children
            "Pregnancy status": False,
            "Murmur": "Unknown" if unknown else "Present" if described else "Absent",
            "Murmur locations": "+".join(sorted(heard)) or "nan",
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
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}: every setting is a --flag")
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
    flags.DEFINE_integer("seed", 0, "The same seed and settings give the same bytes.")
    flags.DEFINE_float("snr_db", 25.0, "Heart over white noise; each recording draws within 5 dB of it.")
    flags.DEFINE_float("murmur_fraction", 0.5, "Share of people with a murmur, in every database alike.")


if __name__ == "__main__":
    _define_flags()
    files.run(main)
