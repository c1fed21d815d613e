"""Prepared recordings -> clips -> batches of questions: the same shards, splits and order as the JAX systems use."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
import torch
import tqdm

from pcgjax.audio_llm import model as llm
from pcgjax.audio_llm import questions as mc
from pcgjax.data.corpus import Corpus
from pcgjax.data.plan import epoch_order
from pcgjax.datasets import DIASTOLE, S1, UNANNOTATED
from pcgjax.runs.schema import FRONT_ENDS
from pcgjax.runs.streams import EVALUATION, ORDER, STEP
from pcgjax.segmentation.states import Span, read_tsv

_RAMP_S = 0.01  # over which a gate opens, and cropped heartbeats are joined
_SHORTEST_BEAT_S = 0.2  # from S1 to the end of S2
_BUCKETS = 8  # batches whose recordings are sorted by length, so that a batch's clips are about as long


def key_words(seed: int, stream: int, *steps: int) -> list[int]:
    """The words of JAX's key for this stream and step, with which questions and clips are drawn."""
    key = jax.random.fold_in(jax.random.key(seed), stream)
    for step in steps:
        key = jax.random.fold_in(key, step)
    return [int(word) for word in jax.random.key_data(key)]


# -------------------------------------------------------------------------------------------------- the front end


def heartbeats(spans: Sequence[Span]) -> list[tuple[float, float]]:
    """(start_s, end_s) from the onset of each S1 to the end of its S2: a segmenter's `states`, or of its `cycle`
    the spans where it holds. What lies between is diastole, or unknown."""
    beats: list[tuple[float, float]] = []
    for start_s, end_s, state in spans:
        if state in (UNANNOTATED, DIASTOLE):
            continue
        if beats and start_s <= beats[-1][1] + 1e-3 and state != S1:
            beats[-1] = (beats[-1][0], end_s)
        else:
            beats.append((start_s, end_s))
    return beats


def apply_front_end(
    samples_T: np.ndarray, spans: Sequence[Span], kind: str, rate_hz: int, attenuation_db: float = 20.0
) -> np.ndarray:
    """What the front end lets through of a recording (SSAMBA paper, Fig. 1): `none` all of it (N.S), `crop` the
    heartbeats one after another, `gate` all, the rest softer by `attenuation_db` (W.S). (T',) float32.

    A recording without heartbeats passes as it is.
    """
    samples = np.asarray(samples_T, np.float32)
    if kind == "none" or not (beats := heartbeats(spans)):
        return samples
    ramp = max(round(_RAMP_S * rate_hz), 1)
    edges = [(round(a * rate_hz), min(round(b * rate_hz), len(samples))) for a, b in beats]
    rise = (np.arange(ramp, dtype=np.float32) + 0.5) / ramp
    if kind == "crop":
        pieces = []
        for begin, end in edges:
            piece = samples[begin:end].copy()
            n = min(ramp, len(piece) // 2)
            piece[:n] *= rise[:n]
            piece[len(piece) - n :] *= rise[:n][::-1]
            pieces.append(piece)
        return np.concatenate(pieces)
    gain = np.full(len(samples), 10 ** (-attenuation_db / 20), np.float32)
    for begin, end in edges:
        gain[begin:end] = 1
    smooth = np.convolve(np.pad(gain, ramp // 2, mode="edge"), np.full(2 * (ramp // 2) + 1, 1 / (2 * (ramp // 2) + 1)))
    return samples * smooth[2 * (ramp // 2) :][: len(samples)].astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Source:
    """A corpus as the audio LLM hears it: behind the front end, at 16 kHz."""

    corpus: Corpus
    kind: str
    segments: pathlib.Path | None
    attenuation_db: float

    def read(self, index: int) -> np.ndarray:
        """(T,) float32 samples of a recording, behind the front end.

        Raises:
          FileNotFoundError, or ValueError: no .tsv, or one that cannot be read; the message names it.
        """
        samples = self.corpus.read(index).astype(np.float32) / 32767
        if self.segments is None:
            return samples
        spans = read_tsv(self.segments / f"{self.corpus.rows[index]['id']}.tsv")
        return apply_front_end(samples, spans, self.kind, self.corpus.sample_rate_hz, self.attenuation_db)

    def passes_whole(self, index: int) -> bool:
        """Whether the front end found no heartbeat to go by."""
        if self.segments is None:
            return False
        return not heartbeats(read_tsv(self.segments / f"{self.corpus.rows[index]['id']}.tsv"))

    def digest(self) -> str:
        """Of the segments that the front end goes by."""
        digest = hashlib.sha256(self.kind.encode())
        if self.segments is not None:
            for row in self.corpus.rows:
                digest.update((self.segments / f"{row['id']}.tsv").read_bytes())
        return digest.hexdigest()


def make_source(corpus: Corpus, front_end: ml_collections.ConfigDict) -> Source:
    """Raises:
    ValueError: another rate than 16 kHz, an unknown front end, no folder of segments, a recording whose .tsv is not
      there, cannot be read, or holds sounds instead of states or cycles.
    """
    if corpus.sample_rate_hz != llm.RATE_HZ:
        raise ValueError(
            f"data.prepared is at {corpus.sample_rate_hz} Hz, Qwen2-Audio hears {llm.RATE_HZ} Hz: prepare it again "
            f"with --sample_rate_hz={llm.RATE_HZ}"
        )
    kind = front_end.kind
    if kind not in FRONT_ENDS:
        raise ValueError(f"front_end.kind={kind!r}: choose one of {', '.join(FRONT_ENDS)}")
    if kind == "none":
        return Source(corpus, kind, None, 0.0)
    folder = pathlib.Path(front_end.segments)
    if not front_end.segments or not folder.is_dir():
        raise ValueError(
            f"front_end.segments={front_end.segments!r}: no such folder; {kind} needs the .tsv files that "
            "python -m pcgjax.predict --workdir=SEGMENTER --out=DIR/answers.csv WAV... writes to DIR"
        )
    lacking = [row["id"] for row in corpus.rows if not (folder / f"{row['id']}.tsv").is_file()]
    if lacking:
        raise ValueError(
            f"{folder}: {len(lacking)} of {len(corpus.rows)} recordings have no .tsv there, such as {lacking[0]}.tsv; "
            "segment them all"
        )
    spans = [span for row in corpus.rows for span in read_tsv(folder / f"{row['id']}.tsv")]
    beats_s = [end_s - start_s for start_s, end_s, state in spans if state == S1]
    if not any(state > S1 for *_, state in spans) and beats_s and np.median(beats_s) < _SHORTEST_BEAT_S:
        raise ValueError(
            f"{folder}: its spans last {np.median(beats_s):.2f} s: sounds, not heartbeats, and a murmur lies between "
            "them; segment with --config.task.frames=states or cycle"
        )
    return Source(corpus, kind, folder, front_end.attenuation_db)


def windows(samples: int, clip_s: float) -> list[tuple[int, int]]:
    """Where a recording of so many samples is divided into clips of equal length, at most `clip_s` each."""
    most = int(clip_s * llm.RATE_HZ)
    count = max(-(-samples // most), 1)
    edges = [samples * i // count for i in range(count + 1)]
    return list(itertools.pairwise(edges))


# -------------------------------------------------------------------------------------------------------- batches


def tasks_of(names: Sequence[str]) -> tuple[str, ...]:
    """The tasks a config names; `all` for all eleven."""
    if tuple(names) == ("all",):
        return tuple(mc.TASKS)
    if unknown := [name for name in names if name not in mc.TASKS]:
        raise ValueError(f"questions.tasks: {unknown[0]!r} is none of {', '.join(mc.TASKS)}")
    return tuple(names)


def order_of_epoch(
    indices: np.ndarray, lengths: np.ndarray, seed: int, epoch: int, batch: int, portions: int
) -> np.ndarray:
    """(steps, portions, batch // portions) recordings of an epoch, -1 where a batch is not full.

    The order that the JAX systems train in, but that of every 8 batches' recordings those of like length are put
    together: less padding, and no mask where they are equally long.
    """
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), ORDER), epoch)
    flat = epoch_order(indices, None, key, batch).reshape(-1)
    full = flat[flat >= 0]
    parts = np.split(full, range(_BUCKETS * batch, len(full), _BUCKETS * batch))
    by_length = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in parts])
    flat = np.r_[by_length, np.full(len(flat) - len(full), -1, flat.dtype)]
    steps = flat.reshape(-1, portions, batch // portions)
    rng = np.random.default_rng(key_words(seed, ORDER, epoch))
    return steps[rng.permutation(len(steps))]


@dataclasses.dataclass(frozen=True)
class Clip:
    """A clip of a recording, and the questions on it."""

    recording: int  # index into the corpus
    begin: int  # samples behind the front end
    end: int
    questions: tuple[mc.Question, ...]


class Tokenizer:
    """Questions as token ids, and the letter's."""

    def __init__(self, processor: Any):
        self.processor, self.letters = processor, llm.letter_ids(processor)
        self.audio_token, self.pad_token = processor.audio_token_id, processor.tokenizer.pad_token_id

    def __call__(self, question: mc.Question) -> tuple[list[int], int]:
        return llm.tokens_of(self.processor, question.text), self.letters[question.answer]


def batch_of(
    clips: Sequence[Clip], source: Source, tokenize: Tokenizer, share_prefix: bool, multiple: int = 1
) -> llm.Batch:
    """The tensors of these clips and their questions, in this order."""
    waves, recordings = [], dict[int, np.ndarray]()
    for clip in clips:
        if clip.recording not in recordings:
            recordings[clip.recording] = source.read(clip.recording)
        waves.append(recordings[clip.recording][clip.begin : clip.end])
    mels = [llm.mel_of_clip(tokenize.processor.feature_extractor, wave) for wave in waves]
    return llm.make_batch(
        mels, [len(wave) for wave in waves], [[tokenize(q) for q in clip.questions] for clip in clips],
        tokenize.audio_token, tokenize.pad_token, share_prefix, multiple,
    )  # fmt: skip


def training_clips(
    config: ml_collections.ConfigDict, source: Source, lengths: np.ndarray, indices: np.ndarray, step: int
) -> list[Clip]:
    """What a step asks of these recordings: a clip of each, and some of its questions, drawn from the step's key."""
    q, words = config.questions, key_words(config.seed, STEP, step)
    most, clips = int(config.data.clip_s * llm.RATE_HZ), []
    for index in indices:
        row = source.corpus.rows[index]
        possible = mc.questions([row], words, tasks_of(q.tasks), q.sites, q.padding)
        rng = np.random.default_rng([*words, index])
        chosen = sorted(rng.permutation(len(possible))[: q.a_clip])
        begin = int(rng.integers(max(lengths[index] - most, 0) + 1))
        end = min(begin + most, int(lengths[index]))
        clips.append(Clip(int(index), begin, end, tuple(possible[i] for i in chosen)))
    return clips


def evaluation_clips(
    config: ml_collections.ConfigDict, source: Source, lengths: np.ndarray, indices: np.ndarray, clip_s: float
) -> list[Clip]:
    """All questions on all of these recordings, the same every time; of a longer one each window is asked them all."""
    # The same whatever the run's seed, so that runs can be compared.
    q, words = config.questions, key_words(0, EVALUATION)
    clips = []
    for index in indices:
        every = tuple(mc.questions([source.corpus.rows[index]], words, tasks_of(q.tasks), q.sites, q.padding))
        if every:
            clips += [Clip(int(index), a, b, every) for a, b in windows(int(lengths[index]), clip_s)]
    return clips


def lengths_heard(source: Source) -> np.ndarray:
    """(N,) samples of each recording behind the front end.

    Raises:
      ValueError: a recording of which not one audio token is left.
    """
    if source.kind != "crop":
        lengths = np.asarray(source.corpus.lengths, np.int64)
    else:
        lengths = np.array([len(source.read(i)) for i in range(len(source.corpus.rows))])
    short = np.flatnonzero(lengths < llm.shortest())
    if len(short):
        raise ValueError(
            f"{len(short)} recordings are too short for one audio token (20 ms) behind front_end.kind={source.kind}, "
            f"such as {source.corpus.rows[short[0]]['id']}: move their files out of the source and prepare it again"
        )
    return lengths


class Answer(NamedTuple):
    """What the model said to a question."""

    question: mc.Question
    log_p: tuple[float, ...]  # of each letter among the whole vocabulary; over several windows, of the mean probability
    windows: int  # clips that the recording was divided into


def ask_all(
    answerer: llm.Answerer,
    source: Source,
    clips: Sequence[Clip],
    tokenize: Tokenizer,
    config: ml_collections.ConfigDict,
    device: torch.device | str,
    swap: Mapping[int, int] | None = None,
    describe: str = "score",
) -> list[Answer]:
    """The answers to all questions, in the order in which they first come; the same on every process, each of which
    asks its share.

    swap: {recording: whose audio is heard in its place}, a control.
    """
    rank, processes = process()
    if swap is not None:
        clips = [_swapped(clip, swap[clip.recording], source) for clip in clips]
    # Clips of like length together, every process as many batches: FSDP's forward passes are made by all at once.
    order = np.argsort([clip.end - clip.begin for clip in clips], kind="stable")
    size = config.evaluation.batch_recordings
    groups = [order[i : i + size] for i in range(0, len(order), size)]
    rounds = -(-len(groups) // processes)
    own_groups = [groups[min(i * processes + rank, len(groups) - 1)] for i in range(rounds)]

    def make(number: int) -> llm.Batch:
        return batch_of([clips[i] for i in own_groups[number]], source, tokenize, config.model.share_prefix)

    letters = torch.tensor(tokenize.letters, device=device)
    training, log_p_of = answerer.training, dict[tuple[int, int], np.ndarray]()
    answerer.eval()
    try:
        with torch.no_grad():
            bar = tqdm.tqdm(prefetched(make, rounds), desc=describe, total=rounds, disable=rank > 0, mininterval=1.0)
            for number, batch in enumerate(bar):
                log_p = torch.log_softmax(answerer(batch.to(device)), -1)[:, letters].double().cpu().numpy()
                places = [(int(i), n) for i in own_groups[number] for n in range(len(clips[i].questions))]
                log_p_of |= dict(zip(places, log_p, strict=True))
    finally:
        answerer.train(training)
    if processes > 1:
        shares: list[dict] = [{}] * processes
        torch.distributed.all_gather_object(shares, log_p_of)
        log_p_of = {key: value for share in shares for key, value in share.items()}
    return _over_windows(clips, log_p_of)


def _over_windows(clips: Sequence[Clip], log_p_of: Mapping[tuple[int, int], np.ndarray]) -> list[Answer]:
    """An answer to each question, of the mean probability over the clips on which it was asked.

    log_p_of: {(clip, which of its questions): (6,) log-probabilities of the letters}.
    """
    log_p: dict[str, list[np.ndarray]] = {}
    questions: dict[str, mc.Question] = {}
    for i, clip in enumerate(clips):
        for n, question in enumerate(clip.questions):
            questions[question.id] = question
            log_p.setdefault(question.id, []).append(log_p_of[i, n])
    return [
        Answer(question, tuple(np.logaddexp.reduce(log_p[id], 0) - math.log(len(log_p[id]))), len(log_p[id]))
        for id, question in questions.items()
    ]


def _swapped(clip: Clip, other: int, source: Source) -> Clip:
    """The same questions on as long a stretch of another recording, or on all of it where it is shorter."""
    samples = len(source.read(other))
    length = min(clip.end - clip.begin, samples)
    begin = min(clip.begin, samples - length)
    return Clip(other, begin, begin + length, clip.questions)


def process() -> tuple[int, int]:
    """(this process' rank, how many there are)."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def prefetched(make: Any, count: int) -> Iterator[Any]:
    """make(0), make(1), ... in order, made by Grain's threads while earlier ones are in use."""
    import grain

    class Steps:
        def __len__(self) -> int:
            return count

        def __getitem__(self, number: int) -> Any:
            return make(int(number))

    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    yield from grain.MapDataset.source(Steps()).to_iter_dataset(options)
