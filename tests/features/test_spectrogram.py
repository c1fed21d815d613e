"""Log-mel spectrograms against librosa."""

from __future__ import annotations

import pathlib
import sys
import warnings

import jax
import jax.numpy as jnp
import librosa
import numpy as np
import pytest
import scipy.signal

from pcgjax.features import spectrogram

RATE_HZ = 2000


def clips(samples, items=3, seed=0):
    """Noise of a slowly changing colour and very different loudness from item to item."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((items, samples))
    tone = np.sin(2 * np.pi * 60 * np.arange(samples) / RATE_HZ) * np.linspace(0, 5, samples)
    return ((noise + tone) * 10.0 ** -np.arange(items)[:, None]).astype(np.float32)


def oracle(x, rate_hz, ref=np.max, amin=1e-10, top_db: float | None = 80.0, **options):
    """librosa on float64, one item at a time."""
    power = librosa.feature.melspectrogram(y=np.asarray(x, np.float64), sr=rate_hz, **options)
    return librosa.power_to_db(power, ref=ref, amin=amin, top_db=top_db)


@pytest.mark.parametrize("htk", [False, True])
@pytest.mark.parametrize(
    ("rate_hz", "n_fft", "n_mels", "low_hz", "high_hz"),
    [
        (1000, 2048, 128, 0.0, None),  # configs/hinf_lstm.py
        (1000, 512, 128, 0.0, None),  # the image nets
        (2000, 128, 32, 20.0, 1000.0),  # configs/segmenter_small.py
        (2000, 256, 32, 20.0, 500.0),
        (16000, 512, 64, 0.0, 8000.0),
        (1000, 255, 20, 5.5, 499.0),
    ],
)
def test_filterbank_is_triangles_of_unit_area(rate_hz, n_fft, n_mels, low_hz, high_hz, htk):
    def mel_of(hz):
        if htk:
            return 2595 * np.log10(1 + hz / 700)
        return np.where(hz < 1000, 3 * hz / 200, 15 + 27 * np.log(np.maximum(hz, 1000) / 1000) / np.log(6.4))

    grid_hz = np.linspace(0, rate_hz / 2, 1_000_001)
    mels = np.linspace(*mel_of(np.array([low_hz, high_hz or rate_hz / 2])), n_mels + 2)
    edges = np.interp(mels, mel_of(grid_hz), grid_hz)[:, None]
    bins = np.arange(1 + n_fft // 2) * rate_hz / n_fft
    rising, falling = (bins - edges[:-2]) / np.diff(edges[:-1], axis=0), (edges[2:] - bins) / np.diff(edges[1:], axis=0)
    expected = np.minimum(rising, falling).clip(0) * 2 / (edges[2:] - edges[:-2])
    bank = spectrogram.mel_filterbank(rate_hz, n_fft, n_mels, low_hz, high_hz, htk)
    assert bank.dtype == np.float32
    np.testing.assert_allclose(bank, expected, rtol=1e-4, atol=1e-6 * expected.max())


def test_without_librosa_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "librosa", None)
    monkeypatch.setitem(sys.modules, "librosa.filters", None)
    with pytest.raises(ImportError, match=r"mel bands need librosa .*pip install -c constraints.txt librosa"):
        spectrogram.mel_filterbank(1000, 256, 16)


@pytest.mark.filterwarnings("ignore:n_fft=.* is too large")
@pytest.mark.parametrize(
    ("samples", "n_fft", "hop", "n_mels", "htk"),
    [
        (10_000, 2048, 512, 128, False),
        (3333, 256, 128, 32, False),
        (3333, 256, 128, 32, True),
        (3001, 512, 200, 40, True),  # the hop does not divide the window
        (777, 1024, 300, 60, False),  # longer windows than the signal
        (900, 128, 200, 16, True),  # samples between the windows that none covers
        (1, 64, 16, 8, False),
    ],
)
def test_equal_librosa(samples, n_fft, hop, n_mels, htk):
    x = clips(samples)
    run = jax.jit(lambda x: spectrogram.log_mel(x, RATE_HZ, n_fft, hop, n_mels, htk=htk))
    got = np.asarray(run(x))
    assert got.dtype == np.float32
    assert got.shape == (3, n_mels, spectrogram.frames(samples, hop))
    for item, x_T in zip(got, x, strict=True):
        expected = oracle(x_T, RATE_HZ, n_fft=n_fft, hop_length=hop, n_mels=n_mels, htk=htk)
        # At -80 dB float32 transforms are good to a few hundredths of a dB.
        np.testing.assert_allclose(item, expected, atol=0.05)
        loud = expected > -40
        np.testing.assert_allclose(item[loud], expected[loud], atol=1e-3)


@pytest.mark.parametrize("top_db", [None, 30.0])
@pytest.mark.parametrize(("ref", "amin"), [("max", 1e-10), (1.0, 1e-10), (1e-12, 1e-3), (50.0, 1e-2)])
def test_decibels_are_librosas(ref, amin, top_db):
    x = clips(2000)
    got = spectrogram.log_mel(x, RATE_HZ, 256, 64, 24, 25.0, 400.0, ref=ref, amin=amin, top_db=top_db)
    librosas = {"ref": np.max if ref == "max" else ref, "amin": amin, "top_db": top_db}
    bank = {"n_fft": 256, "hop_length": 64, "n_mels": 24, "fmin": 25.0, "fmax": 400.0}
    for item, x_T in zip(got, x, strict=True):
        np.testing.assert_allclose(item, oracle(x_T, RATE_HZ, **librosas, **bank), atol=2e-3)


def test_an_item_does_not_depend_on_the_others():
    x = clips(2001, items=6).reshape(2, 3, 2001)
    together = spectrogram.log_mel(x, RATE_HZ, 256, 128, 32)
    assert together.shape == (2, 3, 32, 16)
    for i, j in np.ndindex(2, 3):
        np.testing.assert_allclose(together[i, j], spectrogram.log_mel(x[i, j], RATE_HZ, 256, 128, 32), atol=1e-3)


@pytest.mark.parametrize("top_db", [None, 80.0])
def test_silence(top_db):
    silent = jnp.zeros(1000)
    for ref, level in (("max", 0.0), (1.0, -100.0)):
        got = spectrogram.log_mel(silent, RATE_HZ, 256, 128, 16, ref=ref, top_db=top_db)
        np.testing.assert_allclose(got, np.full((16, 8), level), atol=1e-4)
        librosas = np.max if ref == "max" else ref
        expected = oracle(silent, RATE_HZ, ref=librosas, top_db=top_db, n_fft=256, hop_length=128, n_mels=16)
        np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("top_db", [None, 80.0])
def test_gradients_are_finite_and_right(top_db):
    gradient = jax.jit(jax.grad(lambda x: spectrogram.log_mel(x, RATE_HZ, 128, 64, 16, top_db=top_db).sum()))
    half_silent = clips(600, items=1)[0] * (np.arange(600) < 300)
    for x in (np.zeros(600, np.float32), half_silent, clips(600, items=1)[0]):
        assert np.isfinite(gradient(x)).all()
    # Against librosa's difference quotient in float64.
    x = clips(600, items=1)[0]
    direction = np.random.default_rng(3).standard_normal(600)
    step = 1e-5

    def value(x):
        return oracle(x, RATE_HZ, top_db=top_db, n_fft=128, hop_length=64, n_mels=16).sum()

    quotient = (value(x + step * direction) - value(x - step * direction)) / (2 * step)
    assert float(gradient(x) @ direction) == pytest.approx(quotient, rel=1e-3)


def test_other_number_types_are_computed_in_float32():
    x = np.round(clips(1000, items=1)[0] * 1000)
    expected = spectrogram.log_mel(x.astype(np.float32), RATE_HZ, 256, 128, 16)
    for kind in (np.int16, np.float64):
        got = spectrogram.log_mel(x.astype(kind), RATE_HZ, 256, 128, 16)
        assert got.dtype == jnp.float32
        np.testing.assert_array_equal(got, expected)


def test_too_many_bands():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bank = librosa.filters.mel(sr=RATE_HZ, n_fft=128, n_mels=128)
    assert any("Empty filters" in str(w.message) for w in caught)
    empty = np.flatnonzero(bank.max(1) == 0)
    message = rf"n_mels=128 is too many for n_fft=128 .* {len(empty)} bands \(the first: {empty[0]}\)"
    with pytest.raises(ValueError, match=message):
        spectrogram.mel_filterbank(RATE_HZ, 128, 128)
    with pytest.raises(ValueError, match=message):
        spectrogram.log_mel(clips(1000), RATE_HZ, 128, 64, 128)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"high_hz": 1000.5}, r"high_hz=1000.5 do not fit a rate of 2000 Hz"),
        ({"low_hz": 500.0, "high_hz": 500.0}, r"low_hz=500.0, high_hz=500.0 do not fit"),
        ({"low_hz": -1.0}, r"low_hz=-1.0"),
        ({"n_fft": 0}, r"n_fft=0"),
        ({"n_fft": 255}, r"n_fft=255.* must be even"),
        ({"hop": 0}, r"hop=0"),
        ({"n_mels": 0}, r"n_mels=0"),
        ({"amin": 0.0}, r"amin=0.0"),
        ({"top_db": -1.0}, r"top_db=-1.0"),
        ({"ref": "mean"}, r"ref='mean'"),
        ({"ref": 0.0}, r"ref=0.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        spectrogram.log_mel(clips(1000), RATE_HZ, **{"n_fft": 256, "hop": 128, "n_mels": 16, **options})


def kaldi(waveform, rate_hz, bands):
    """kaldi-native-fbank's answer with SSAMBA's options."""
    import kaldi_native_fbank as knf

    options = knf.FbankOptions()
    options.frame_opts.samp_freq, options.frame_opts.dither, options.frame_opts.window_type = rate_hz, 0, "hanning"
    options.mel_opts.num_bins = bands
    options.use_energy, options.htk_compat = False, True
    bank = knf.OnlineFbank(options)
    bank.accept_waveform(rate_hz, waveform.tolist())
    bank.input_finished()
    return np.array([bank.get_frame(i) for i in range(bank.num_frames_ready)])


@pytest.mark.parametrize(("rate_hz", "samples", "bands"), [(16000, 24000, 80), (16000, 400, 80), (4000, 7777, 40)])
def test_kaldi_fbank(rate_hz, samples, bands):
    waves = np.stack([wave - wave.mean() for wave in np.random.default_rng(0).normal(size=(2, samples)) * 0.1]).astype(
        np.float32
    )
    got = np.asarray(spectrogram.kaldi_fbank(waves, rate_hz, bands))
    assert got.dtype == np.float32
    for own, wave in zip(got, waves, strict=True):
        np.testing.assert_allclose(own, kaldi(wave, rate_hz, bands), atol=3e-3)
    silent = np.asarray(spectrogram.kaldi_fbank(np.zeros(samples), rate_hz, bands))
    np.testing.assert_allclose(silent, np.log(np.finfo(np.float32).eps), rtol=1e-6)


def test_kaldi_fbank_of_128_bands():
    """torchaudio's float64 answer, as SSAMBA calls it; band 3 holds no bin, which kaldi-native-fbank refuses."""
    with np.load(pathlib.Path(__file__).parents[1] / "fixtures" / "kaldi_fbank.npz") as file:
        got = spectrogram.kaldi_fbank(file["waveform"])
        np.testing.assert_allclose(got, file["fbank"], atol=1e-3)


def test_kaldi_fbank_refuses():
    with pytest.raises(ValueError, match="399 samples are shorter than a frame of 25 ms, 400 samples at 16000 Hz"):
        spectrogram.kaldi_fbank(np.zeros(399))
    with pytest.raises(ValueError, match="sample_rate_hz=16100"):
        spectrogram.kaldi_fbank(np.zeros(4000), 16100)
    with pytest.raises(ValueError, match="num_mel_bins=0"):
        spectrogram.kaldi_fbank(np.zeros(4000), num_mel_bins=0)


@pytest.mark.parametrize(("n_fft", "hop", "samples"), [(128, 40, 1088), (64, 20, 1044), (100, 100, 999), (50, 7, 50)])
def test_mel_of_frames_is_a_loop(n_fft, hop, samples):
    x = np.random.default_rng(0).standard_normal((2, samples)).astype(np.float32)
    mel = np.asarray(spectrogram.mel_of_frames(x, 2000, n_fft, hop, 8, 50.0, 900.0))
    bank = spectrogram.mel_filterbank(2000, n_fft, 8, 50.0, 900.0)
    starts = range(0, samples - n_fft + 1, hop)
    window = scipy.signal.get_window("hann", n_fft)
    frames = np.stack([x[:, start : start + n_fft] for start in starts], axis=1) * window
    expected = abs(np.fft.rfft(frames)) ** 2 @ bank.T
    assert mel.shape == (2, len(starts), 8)
    np.testing.assert_allclose(mel, expected, rtol=1e-4, atol=1e-6)
