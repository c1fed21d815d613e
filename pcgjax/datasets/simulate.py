"""A simulated heart: beats, murmurs, noise and a stethoscope's response.

Amplitudes are relative to the mitral component of S1 at the apex, which is 1. Times are in seconds, frequencies in Hz;
axes: n samples, k beats.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.fft

from pcgjax.datasets import DIASTOLE, S1, S2, SYSTOLE, Span

Response = Callable[[np.ndarray], np.ndarray]  # magnitude at frequencies f > 0 in Hz
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


def _crescendo(x: np.ndarray) -> np.ndarray:
    return x


def _decrescendo(x: np.ndarray) -> np.ndarray:
    return 1 - x


def _diamond(x: np.ndarray) -> np.ndarray:
    return 1 - abs(2 * x - 1)


SHAPES: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # envelope over the murmur's duration, x from 0 to 1
    "Crescendo": _crescendo,
    "Decrescendo": _decrescendo,
    "Diamond": _diamond,
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
        """SYSTOLE or DIASTOLE."""
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
    murmur_site: str  # where a murmur is loudest; drawn for everybody, so that the site is independent of the class
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
    """Draws one person; of persons 0 ... n-1 the share `murmur_fraction` has a murmur, to within one person.

    Args:
      index: the person's number.
      extrasystoles: share of premature beats.
    """
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
    """Draws each feature independently of the others; `phase` is SYSTOLE or DIASTOLE."""
    pitch = str(rng.choice(list(PITCHES)))
    return Murmur(
        timing=str(rng.choice([timing for timing, (its_phase, _, _) in TIMINGS.items() if its_phase == phase])),
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


def simulate_person(
    person: Person,
    site: str,
    rng: np.random.Generator,
    duration_s: float,
    rate_hz: int,
    noise: Noise | None = None,
    stethoscope: Stethoscope | None = None,
) -> tuple[np.ndarray, list[Span]]:
    """One recording at `site` (of SITES). The heart is drawn first, so the same rng state gives it for any noise.

    Returns: (samples float32 (n,) with full scale at 1, annotations without a gap from the first complete sound to
      the end of the recording).
    """
    noise, stethoscope = noise or Noise(), stethoscope or Stethoscope()
    time_s = np.arange(round(duration_s * rate_hz)) / rate_hz
    duration_s = len(time_s) / rate_hz
    breath_phase = rng.uniform(0, 2 * np.pi)
    breath_hz = person.breaths_per_minute / 60

    def breath(t: np.ndarray) -> np.ndarray:
        return np.sin(2 * np.pi * breath_hz * t + breath_phase)

    beats = _beats(person, rng, duration_s, breath)

    heart = _sounds(person, site, beats, rng, time_s, rate_hz)
    for murmur in person.murmurs:
        heart += murmur_gain(person, site, murmur) * _murmur(murmur, beats, rng, time_s, rate_hz)
    filtered = functools.partial(_filtered, rate_hz=rate_hz, response=functools.partial(_response, stethoscope))
    samples = heart = filtered(heart)

    room = noise.breathing * _breathing(breath(time_s), rng, rate_hz)
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


def _annotations(beats: _Beats, duration_s: float, rate_hz: int) -> list[Span]:
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

    def turbulence(f: np.ndarray) -> np.ndarray:
        return np.exp(-0.5 * (np.log2(f / murmur.centre_hz) / octaves) ** 2)

    def flutter(f: np.ndarray) -> np.ndarray:
        return 1 / (1 + (f / 30) ** 4)

    carrier = _noise(len(time_s), rng, rate_hz, turbulence)
    if murmur.quality == "Harsh":
        carrier *= np.exp(0.5 * _noise(len(time_s), rng, rate_hz, flutter))
        carrier /= np.sqrt(np.mean(carrier**2))
    return envelope * carrier


def _breathing(inspiration: np.ndarray, rng: np.random.Generator, rate_hz: int) -> np.ndarray:
    """Lung sound, louder in inspiration than in expiration, pink from 60 to 600 Hz; 1 RMS at its loudest. (n,)."""

    def lung(f: np.ndarray) -> np.ndarray:
        return f**-0.5 / (1 + (60 / f) ** 4) / (1 + (f / 600) ** 4)

    carrier = _noise(len(inspiration), rng, rate_hz, lung)
    return carrier * np.where(inspiration > 0, inspiration, -0.4 * inspiration)


def _speech(rng: np.random.Generator, time_s: np.ndarray, rate_hz: int) -> np.ndarray:
    """Voiced pulses through two formants and the chest, at about four syllables a second; 1 RMS in phrases. (n,)."""
    voice_hz = rng.uniform(110, 240)
    glide = 1 + 0.15 * np.sin(2 * np.pi * 0.7 * time_s + rng.uniform(0, 2 * np.pi))
    cycles = voice_hz * np.cumsum(glide) / rate_hz
    pulses = np.diff(np.floor(cycles), prepend=0)
    formants_hz = (rng.uniform(300, 800), rng.uniform(900, 1800))

    def vocal_tract_and_chest(f: np.ndarray) -> np.ndarray:
        return sum(1 / (1 + ((f - formant) / 80) ** 2) for formant in formants_hz) / (1 + (f / 600) ** 2)

    voice = _filtered(pulses, rate_hz, vocal_tract_and_chest)
    voice /= np.sqrt(np.mean(voice**2))
    syllables = 0.5 + 0.5 * np.sin(2 * np.pi * 4 * time_s + rng.uniform(0, 2 * np.pi))
    phrases = np.sin(2 * np.pi * rng.uniform(0.15, 0.35) * time_s + rng.uniform(0, 2 * np.pi)) > 0
    return voice * syllables * phrases / np.sqrt(3 / 8)


def _rubs(rubs_per_s: float, rng: np.random.Generator, time_s: np.ndarray, rate_hz: int) -> np.ndarray:
    """Friction of the stethoscope on skin or cloth: short broad-band bursts, some louder than S1. Returns (n,)."""

    def friction(f: np.ndarray) -> np.ndarray:
        return 1 / (1 + (40 / f) ** 4) / (1 + (f / 500) ** 2)

    envelope = np.zeros(len(time_s))
    for _ in range(rng.poisson(rubs_per_s * len(time_s) / rate_hz)):
        start, fall = rng.integers(len(time_s)), rng.uniform(0.003, 0.05)
        tail = time_s[: math.ceil(5 * fall * rate_hz)]
        tail = tail[: len(time_s) - start]
        envelope[start : start + len(tail)] += 0.3 * math.exp(rng.normal(0, 0.7)) * np.exp(-tail / fall)
    return envelope * _noise(len(time_s), rng, rate_hz, friction)


def _response(stethoscope: Stethoscope, f: np.ndarray) -> np.ndarray:
    """Magnitude at frequencies f > 0 in Hz."""
    resonance = (10 ** (stethoscope.resonance_db / 20) - 1) * np.exp(
        -0.5 * (np.log2(f / stethoscope.resonance_hz) / 0.4) ** 2
    )
    slopes = np.sqrt(1 + (stethoscope.low_hz / f) ** 4) * np.sqrt(1 + (f / stethoscope.high_hz) ** 4)
    return (1 + resonance) / slopes


def _noise(count: int, rng: np.random.Generator, rate_hz: int, response: Response) -> np.ndarray:
    """Gaussian noise of the given magnitude spectrum, scaled to an RMS of 1. Returns (count,)."""
    samples = _filtered(rng.standard_normal(count), rate_hz, response)
    return samples / np.sqrt(np.mean(samples**2))


def _filtered(samples: np.ndarray, rate_hz: int, response: Response) -> np.ndarray:
    """Zero-phase filter, so that sounds stay where the annotations say: multiplies the spectrum by response(f)."""
    size = scipy.fft.next_fast_len(len(samples) + rate_hz // 4, real=True)
    spectrum = scipy.fft.rfft(samples, size)
    spectrum[0] = 0
    spectrum[1:] *= response(scipy.fft.rfftfreq(size, 1 / rate_hz)[1:])
    return scipy.fft.irfft(spectrum, size)[: len(samples)]


def _chosen(index: int, fraction: float) -> bool:
    """Whether item `index` belongs to the `fraction` of all items, which are spread evenly, not drawn."""
    return math.floor((index + 1) * fraction + 1e-9) > math.floor(index * fraction + 1e-9)
