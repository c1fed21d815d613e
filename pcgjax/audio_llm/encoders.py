"""Wav2Vec2, HuBERT and DistilHuBERT on raw 16 kHz audio: baselines of the H-infinity LSTM paper.

`pcgjax.train`, `evaluate` and `predict` come here for a config whose task is audio_encoder, such as
configs/wav2vec2.py. A recording's clips go through the encoder, a linear layer on the mean over its frames gives each
clip's probability, and a recording's is the mean over its clips. The loss is over clips. One process, on a GPU where
there is one. Axes: C clips, T samples, P encoder frames, D features.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging as std_logging
import math
import os
import pathlib
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
import torch
import tqdm
from absl import logging
from torch import nn

from pcgjax import checkpoint, evaluate, files, goodput, input_pipeline, metrics, runs
from pcgjax.audio_llm import batches
from pcgjax.audio_llm.model import RATE_HZ, ModelError
from pcgjax.audio_llm.train import full, learning_rate, moments_of, newest, write
from pcgjax.experiment import balance_groups
from pcgjax.input_pipeline import Corpus, Geometry
from pcgjax.runs import ORDER, STEP

# config.model.architecture -> transformers' name of it, and what differs from that one's base size as published.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "wav2vec2": ("wav2vec2", {}),
    "hubert": ("hubert", {}),
    "distilhubert": ("hubert", {"num_hidden_layers": 2, "feat_proj_layer_norm": False}),
}
# config.model.size, of random weights -> what is smaller.
SIZES: dict[str, dict[str, Any]] = {
    "base": {},
    "tiny": {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "conv_dim": (8,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2,
    },
}  # fmt: skip
# No layers or frames left out in training: a small head learns without, and all randomness is PyTorch's.
_NOT_LEFT_OUT = {"layerdrop": 0.0, "mask_time_prob": 0.0, "mask_feature_prob": 0.0}
# How fast it is computed: a run may go on with another value.
FREE = (("train", "portion_clips"),)


# ------------------------------------------------------------------------------------------------------ the model


class Classifier(nn.Module):
    """A speech encoder of transformers with a linear layer on the mean over its frames."""

    def __init__(self, encoder: Any):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, 1)

    def forward(self, samples_CxT: torch.Tensor, mask_CxT: torch.Tensor | None = None) -> torch.Tensor:
        """(C,) float32 logits. mask: 1 where a clip is, 0 where it was padded; None where the encoder takes none."""
        frames_CxPxD = self.encoder(samples_CxT, attention_mask=mask_CxT).last_hidden_state
        if mask_CxT is None:
            mean_CxD = frames_CxPxD.mean(1)
        else:
            real = self.encoder._get_feature_vector_attention_mask(frames_CxPxD.shape[1], mask_CxT)[..., None]
            mean_CxD = (frames_CxPxD * real).sum(1) / real.sum(1)
        return self.head(mean_CxD)[:, 0].float()


def make(model: ml_collections.ConfigDict) -> tuple[Classifier, Any]:
    """(a classifier with a new head, the feature extractor) that `config.model` asks for, weights in float32.

    model: architecture; folder, with a checkpoint as transformers saves it, or empty for random weights of `size`;
      freeze_feature_encoder.
    Raises:
      ModelError: an unknown architecture or size; a folder with another architecture, without safetensors, with
        missing or misshapen weights, or that hears another rate than 16 kHz.
    """
    if model.architecture not in ARCHITECTURES:
        raise ModelError(f"model.architecture={model.architecture!r}: choose one of {', '.join(ARCHITECTURES)}")
    encoder, extractor = _loaded(model) if model.folder else _random(model)
    classifier = Classifier(encoder)
    if model.freeze_feature_encoder:
        # As transformers does it: its input is then not marked for gradients either.
        classifier.encoder.feature_extractor._freeze_parameters()
    return classifier, extractor


def _random(model: ml_collections.ConfigDict) -> tuple[Any, Any]:
    import transformers

    if model.size not in SIZES:
        raise ModelError(f"model.size={model.size!r}: choose one of {', '.join(SIZES)}, or give model.folder")
    kind, differing = ARCHITECTURES[model.architecture]
    config = transformers.AutoConfig.for_model(kind, **{**_NOT_LEFT_OUT, **SIZES[model.size], **differing})
    return transformers.AutoModel.from_config(config), _extractor(config)


def _extractor(config: Any) -> Any:
    """Clips of zero mean and unit variance, and a mask for the models that were pre-trained with one."""
    import transformers

    with_mask = config.feat_extract_norm == "layer"
    return transformers.Wav2Vec2FeatureExtractor(
        sampling_rate=RATE_HZ, do_normalize=True, return_attention_mask=with_mask
    )


def check(folder: str | pathlib.Path, architecture: str) -> pathlib.Path:
    """The folder, when it looks like a checkpoint of this architecture; nothing large is read.

    Raises:
      ModelError: as `make`.
    """
    folder = pathlib.Path(folder)
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"model.folder={folder}: no config.json there; give a local folder with a checkpoint as transformers saves "
            "it, or leave it empty for random weights"
        )
    try:
        told = dict(json.loads((folder / "config.json").read_text()))
    except (ValueError, TypeError) as error:
        raise ModelError(f"{folder}/config.json: no JSON object: {error}") from None
    kind, differing = ARCHITECTURES[architecture]
    # The distilled model is a HuBERT of fewer layers, else of the same name and weights.
    wanted = {"model_type": kind} | {k: v for k, v in differing.items() if k == "num_hidden_layers"}
    for field, value in wanted.items():
        if told.get(field) != value:
            raise ModelError(
                f"{folder}/config.json: {field} is {told.get(field)!r}; model.architecture={architecture} needs "
                f"{value!r}: use the config of what the folder holds, or another folder"
            )
    if not any(folder.glob("*.safetensors")):
        if pickled := sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth")):
            raise ModelError(
                f"{folder}: only {', '.join(pickled)}, pickled weights, which are not opened here; convert them: "
                'python -c "from transformers import AutoModel, AutoFeatureExtractor; '
                f"AutoModel.from_pretrained('{folder}').save_pretrained('OUT'); "
                f"AutoFeatureExtractor.from_pretrained('{folder}').save_pretrained('OUT')\" and give "
                "--config.model.folder=OUT"
            )
        raise ModelError(f"{folder}: no weights there, need *.safetensors; download those of the checkpoint")
    return folder


def _loaded(model: ml_collections.ConfigDict) -> tuple[Any, Any]:
    import transformers
    from safetensors import SafetensorError

    folder = check(model.folder, model.architecture)
    loaded: Any
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        for name, value in _NOT_LEFT_OUT.items():
            setattr(config, name, value)
        with _quiet("transformers"):
            loaded = transformers.AutoModel.from_pretrained(
                folder, config=config, dtype=torch.float32, local_files_only=True, use_safetensors=True,
                output_loading_info=True,
            )  # fmt: skip
        extractor = _extractor(config)
        if (folder / "preprocessor_config.json").is_file():
            extractor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder}: cannot be loaded: {' '.join(str(error).split())[:400]}") from None
    encoder, told = loaded
    # What else the file holds belongs to the heads of its pre-training.
    if lacking := sorted({*told["missing_keys"], *map(str, told["mismatched_keys"])}):
        raise ModelError(
            f"{folder}: {len(lacking)} weights are missing or of another shape than config.json says: "
            f"{', '.join(lacking[:5])}; download the checkpoint again"
        )
    if extractor.sampling_rate != RATE_HZ:
        raise ModelError(
            f"{folder}/preprocessor_config.json: sampling_rate is {extractor.sampling_rate}; only {RATE_HZ} Hz is "
            "understood here"
        )
    return encoder, extractor


@contextlib.contextmanager
def _quiet(name: str):
    """Only errors of this logger: transformers lists the heads that it does not load."""
    logger = std_logging.getLogger(name)
    before = logger.level
    logger.setLevel(std_logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


# ---------------------------------------------------------------------------------------------------------- clips


class Clip(NamedTuple):
    recording: int  # index into the corpus
    begin: int  # samples
    end: int


def geometry_of(config: ml_collections.ConfigDict, corpus: Corpus) -> Geometry:
    """How recordings become clips, one after the other; the rest that does not fill a clip is left out.

    Raises:
      ValueError: data at another rate than 16 kHz, or a clip of less than 0.1 s.
    """
    if corpus.sample_rate_hz != RATE_HZ:
        raise ValueError(
            f"data.prepared is at {corpus.sample_rate_hz} Hz, {config.model.architecture} hears {RATE_HZ} Hz: prepare "
            f"it again with --sample_rate_hz={RATE_HZ}"
        )
    if config.features.window_s < 0.1:
        raise ValueError(f"features.window_s={config.features.window_s}: a clip needs at least 0.1 s")
    window = round(config.features.window_s * RATE_HZ)
    return Geometry(window, window, 0, 0)


def clips_of(corpus: Corpus, indices: Sequence[int] | np.ndarray, geometry: Geometry) -> list[Clip]:
    """The clips of these recordings, in order; one that is shorter than a clip is one."""
    return [
        Clip(int(i), n * geometry.hop, min(n * geometry.hop + geometry.window, int(corpus.lengths[i])))
        for i in indices
        for n in range(int(geometry.windows(corpus.lengths[i])))
    ]


def batch_of(
    corpus: Corpus, clips: Sequence[Clip], extractor: Any, window: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(samples (C, T), mask (C, T) or None) as the encoder takes them: each clip normalised over its own samples
    where the extractor does so, then padded with zeros to `window`, with a mask where the extractor gives one."""
    read = functools.lru_cache(1)(corpus.read)  # a recording's clips come one after another
    waves = [read(clip.recording)[clip.begin : clip.end].astype(np.float32) / 32767 for clip in clips]
    normalised = extractor(waves, sampling_rate=RATE_HZ, return_attention_mask=False)
    # Padded in a second step: without a mask the first would count the zeros in the mean and variance.
    padded = extractor.pad(normalised, padding="max_length", max_length=window, return_tensors="pt")
    return padded["input_values"].float(), padded.get("attention_mask")


def answers(
    model: Classifier,
    extractor: Any,
    corpus: Corpus,
    indices: np.ndarray,
    config: ml_collections.ConfigDict,
    device: torch.device,
) -> np.ndarray:
    """(n, 2) float64 log p, log (1 - p) of each of these recordings being positive, p the mean over its clips."""
    geometry = geometry_of(config, corpus)
    clips, size = clips_of(corpus, indices, geometry), config.train.portion_clips
    pieces = [clips[i : i + size] for i in range(0, len(clips), size)]
    training, logits = model.training, []
    model.eval()
    try:
        with torch.no_grad(), _precision(config, device):
            made = batches.prefetched(lambda n: batch_of(corpus, pieces[n], extractor, geometry.window), len(pieces))
            for samples, mask in made:
                logits.append(model(samples.to(device), None if mask is None else mask.to(device)).cpu().numpy())
    finally:
        model.train(training)
    z = np.concatenate(logits).astype(np.float64)
    counts = geometry.windows(corpus.lengths[indices])
    log_pairs = np.stack([-np.logaddexp(0, -z), -np.logaddexp(0, z)], axis=-1)
    of_recording = np.split(log_pairs, np.cumsum(counts)[:-1])
    return np.stack([np.logaddexp.reduce(pairs, axis=0) - math.log(len(pairs)) for pairs in of_recording])


def _precision(config: ml_collections.ConfigDict, device: torch.device) -> Any:
    bfloat16 = config.model.dtype == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16) if bfloat16 else contextlib.nullcontext()


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ---------------------------------------------------------------------------------------------------- checkpoints


def save(workdir: pathlib.Path, kind: str, step: int, model: Classifier, optimizer: Any, meta: dict) -> None:
    """Writes checkpoints/KIND-STEP: model.safetensors, meta.json and, with an optimizer, optimizer.safetensors."""
    from safetensors.torch import save_file

    tensors = {name: full(p) for name, p in model.state_dict().items()}
    moments = moments_of(dict(model.named_parameters()), optimizer)
    write(workdir, kind, step, lambda folder: save_file(tensors, folder / "model.safetensors"), moments, meta)


def put(model: Classifier, folder: pathlib.Path, optimizer: Any = None) -> dict:
    """Sets the weights, and the optimizer's moments, to those of a checkpoint; returns its meta.json.

    Raises:
      checkpoint.CheckpointError: it is damaged, or of another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        model.load_state_dict(load_file(folder / "model.safetensors"))
        if optimizer is not None:
            weights = dict(model.named_parameters())
            for key, value in load_file(folder / "optimizer.safetensors").items():
                name, kind = key.rsplit("|", 1)
                p = weights[name]
                optimizer.state[p][kind] = value.to(p.device) if value.ndim else value
        return json.loads((folder / "meta.json").read_text())
    except (OSError, SafetensorError, RuntimeError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise checkpoint.CheckpointError(
            f"{folder}: not a checkpoint of this run ({reason}); give another --workdir, or remove it"
        ) from None


def load(workdir: str | pathlib.Path) -> tuple[ml_collections.ConfigDict, int, Callable[[Corpus], np.ndarray]]:
    """A run's best model: (config, sample_rate_hz, a function of a corpus that returns `answers` for all of it).

    The folder that the weights came from is not needed.
    Raises:
      checkpoint.CheckpointError: there is none, or it is damaged.
    """
    import transformers

    folder = newest(workdir, "best")
    if folder is None:
        raise checkpoint.CheckpointError(f"{workdir}: no trained encoder there (checkpoints/best-*); train one first")
    try:
        meta = json.loads((folder / "meta.json").read_text())
        config, kind = ml_collections.ConfigDict(meta["config"]), meta["encoder"].pop("model_type")
        encoder = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **meta["encoder"]))
        extractor = transformers.Wav2Vec2FeatureExtractor.from_dict(meta["extractor"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise checkpoint.CheckpointError(f"{folder}/meta.json: cannot be read ({error}); train again") from None
    model, device = Classifier(encoder), _device()
    put(model, folder)
    model.to(device).eval()

    def answer(corpus: Corpus) -> np.ndarray:
        return answers(model, extractor, corpus, np.arange(len(corpus.rows)), config, device)

    return config, RATE_HZ, answer


# ------------------------------------------------------------------------------------------------------- training


class _Task(NamedTuple):
    """All that is asked of a `tasks.Task` where answers are judged."""

    classifies: bool = True


class _Judged(NamedTuple):
    """All that `pcgjax.train.conclude` asks of a `train.Experiment` of a classifier."""

    corpus: Corpus
    parts: dict[str, np.ndarray]
    split: dict
    task: _Task
    labels: np.ndarray
    steps_an_epoch: int


def _refuse(config: ml_collections.ConfigDict) -> None:
    for part, field in (("train", "epochs"), ("train", "batch_recordings"), ("train", "checkpoint_steps"),
                        ("train", "portion_clips"), ("evaluation", "resamples")):  # fmt: skip
        if config[part][field] < 1:
            raise ValueError(f"{part}.{field}={config[part][field]}: must be at least 1")
    if not 0 <= config.evaluation.threshold <= 1:
        raise ValueError(f"evaluation.threshold={config.evaluation.threshold}: must lie between 0 and 1")
    for part, field, only in (("optimizer", "name", "adamw"), ("optimizer", "schedule", "cosine"),
                              ("parallel", "strategy", "torch"), ("parallel", "fsdp", 1)):  # fmt: skip
        if config[part][field] != only:
            raise ValueError(f"{part}.{field}={config[part][field]!r}: only {only!r} is offered here")
    if config.model.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"model.dtype={config.model.dtype!r}: choose float32 or bfloat16")
    selectable = ("loss", *metrics.METRICS)
    if config.train.select not in selectable:
        raise ValueError(f"train.select={config.train.select!r}: choose one of {', '.join(selectable)}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or jax.process_count() > 1:
        raise ValueError(f"task.name={config.task.name}: trains in one process; start it without torchrun or hosts")


def train(config: ml_collections.ConfigDict, workdir: str | pathlib.Path, dry_run: bool = False) -> dict:
    """Trains, judges and reports one run, as `pcgjax.train.train` does; returns what it writes to metrics.json.

    dry_run: build the model, print sizes, and stop.
    Raises:
      ValueError (also ModelError, SplitError, LeakError, CheckpointError): what does not fit, by name.
      FloatingPointError: a loss or gradient that is not finite, naming the step and its recordings.
    """
    from pcgjax import train as jax_train

    clock, began, workdir = goodput.Clock(), time.monotonic(), pathlib.Path(workdir)
    t, o, device = config.train, config.optimizer, _device()
    _refuse(config)
    if config.model.folder and config.model.architecture in ARCHITECTURES:
        check(config.model.folder, config.model.architecture)  # before the data are read
    workdir.mkdir(parents=True, exist_ok=True)

    # ------------------------------------------------------------------------------------------- data and model
    corpus, parts, split = runs.load_data(config, workdir)
    geometry, labels = geometry_of(config, corpus), corpus.labels(config.task.target)
    if geometry.window > corpus.lengths.max():
        raise ValueError(
            f"features.window_s={config.features.window_s}: longer than every recording of {config.data.prepared} "
            f"(at most {corpus.lengths.max() / RATE_HZ:.1f} s)"
        )
    balance = balance_groups(t.balance, corpus, labels, parts["train"])

    @functools.lru_cache(4)
    def order_of(epoch: int) -> np.ndarray:
        """(steps, R): the order that the JAX systems train in."""
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), ORDER), epoch)
        return input_pipeline.epoch_order(parts["train"], balance, key, t.batch_recordings)[:, 0]

    steps_an_epoch = len(order_of(0))
    last_step = t.epochs * steps_an_epoch
    digest = input_pipeline.order_digest(
        corpus, train=split["train"], seed=config.seed, batch=t.batch_recordings, balance=t.balance,
        target=config.task.target, shuffled=config.data.shuffle_labels,
    )  # fmt: skip
    torch.manual_seed(config.seed)
    model, extractor = make(config.model)
    model.to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=o.learning_rate, weight_decay=o.weight_decay)
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained": sum(p.numel() for p in trained),
        "train_recordings": len(parts["train"]),
        "train_clips": int(geometry.windows(corpus.lengths[parts["train"]]).sum()),
        "steps_an_epoch": steps_an_epoch,
    }
    logging.info("%s", json.dumps(facts))
    if dry_run:
        files.write_text(workdir / "dry_run.json", json.dumps(facts, indent=1))
        print(*(f"{name} {value:,}" for name, value in facts.items()), f"wrote {workdir}/dry_run.json", sep="\n")
        return facts

    # ------------------------------------------------------------------------------------------ start or resume
    plain, log = runs.plain_config(config), workdir / "metrics.jsonl"
    meta: dict[str, Any] = {
        "config": plain, "order_sha256": digest, "sample_rate_hz": corpus.sample_rate_hz, "best": None,
        "totals": [0.0, 0.0, 0.0], "encoder": json.loads(model.encoder.config.to_json_string(use_diff=False)),
        "extractor": json.loads(extractor.to_json_string()),
    }  # fmt: skip
    at = 0
    if last := newest(workdir, "last"):
        saved = put(model, last, optimizer)
        runs.refuse_changes(saved["config"], plain, workdir, FREE)
        if saved["order_sha256"] != digest:
            raise checkpoint.CheckpointError(
                f"{workdir}: its checkpoint was trained in another order of data (data or split changed); give "
                "another --workdir, or what it was trained with"
            )
        at, meta["best"], meta["totals"] = saved["step"], saved["best"], saved["totals"]
        logging.info("resuming at step %d", at)
    for unfinished in workdir.glob("checkpoints/.*.tmp"):  # of a process that was killed
        shutil.rmtree(unfinished)
    kept = [line for line in runs.history(log) if line["step"] <= at and line["split"] != "test"] if at else []
    files.write_text(log, "".join(json.dumps(line) + "\n" for line in kept))
    board = runs.open_board(workdir, at)
    tell = functools.partial(runs.log_line, log, board=board)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    machine = {"device": name, "devices": 1, "processes": 1}
    runs.record(workdir, config, at, machine)
    files.write_text(workdir / "config.json", json.dumps(plain, indent=1))

    def made(step: int) -> list[tuple]:
        """(samples, mask, labels) of a step's clips, in portions."""
        epoch, nth = divmod(step, steps_an_epoch)
        ids = order_of(epoch)[nth]
        clips = clips_of(corpus, ids[ids >= 0], geometry)
        pieces = [clips[i : i + t.portion_clips] for i in range(0, len(clips), t.portion_clips)]
        truth = [torch.from_numpy(labels[[clip.recording for clip in piece]]) for piece in pieces]
        return [(*batch_of(corpus, p, extractor, geometry.window), y) for p, y in zip(pieces, truth, strict=True)]

    def validate(step: int, epoch: int) -> None:
        of_validation = answers(model, extractor, corpus, parts["validation"], config, device)
        task: Any = _Task()
        threshold = config.evaluation.threshold
        scores = evaluate.validation_scores(task, of_validation, labels[parts["validation"]], threshold)
        tell(step, "validation", scores | {"epoch": epoch})
        bar.set_postfix({f"val_{t.select}": f"{scores[t.select]:.3f}"})
        better = -scores[t.select] if t.select in ("loss", "brier") else scores[t.select]
        better = better if np.isfinite(better) else -np.inf
        if meta["best"] is None or better > meta["best"]["score"]:
            meta["best"] = {
                "score": better, "step": step, "epoch": epoch, "metric": t.select, "threshold": threshold,
            }  # fmt: skip
            with clock("save"):
                save(workdir, "best", step, model, None, meta)

    # ------------------------------------------------------------------------------------------------- the loop
    stopped: list[int] = []
    previous = {s: signal.signal(s, lambda number, _: stopped.append(number)) for s in (signal.SIGTERM, signal.SIGINT)}
    bar = tqdm.tqdm(total=last_step, initial=at, desc="train", unit="step", mininterval=1.0)
    totals = np.array(meta["totals"])  # loss, right answers, clips, since the epoch began
    stop = 0
    try:
        model.train()
        steps = batches.prefetched(lambda n, first=at: made(first + n), last_step - at)
        while at < last_step and not stop:
            with clock("wait"):
                portions = next(steps)
            with clock("train"):
                words = batches.key_words(config.seed, STEP, at)
                torch.manual_seed(int(np.random.default_rng(words).integers(2**62)))  # of dropout
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(at, last_step, o.learning_rate, o.warmup_steps)
                clips = sum(len(y) for *_, y in portions)
                counted = torch.zeros(2, dtype=torch.float64)
                for samples, mask, y in portions:
                    y = y.to(device)
                    with _precision(config, device):
                        logits = model(samples.to(device), None if mask is None else mask.to(device))
                    loss = nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="sum")
                    (loss / clips).backward()
                    right = ((logits > 0) == (y > 0)).sum()
                    counted += torch.stack([loss.detach().double(), right.double()]).cpu()
                norm = float(nn.utils.clip_grad_norm_(trained, o.clip_norm))
                if not (math.isfinite(float(counted[0])) and math.isfinite(norm)):
                    ids = order_of(at // steps_an_epoch)[at % steps_an_epoch]
                    names = ", ".join(corpus.rows[i]["id"] for i in ids if i >= 0)
                    raise FloatingPointError(
                        f"the loss ({float(counted[0]) / clips:g}) or its gradient ({norm:g}) was not finite at step "
                        f"{at}, recordings {names}; lower optimizer.learning_rate={o.learning_rate} or look at those "
                        "recordings"
                    )
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                totals += [*counted.tolist(), clips]
            at += 1
            bar.update()
            stop = stopped[0] if stopped else 0
            epoch, ended = -(-at // steps_an_epoch), at % steps_an_epoch == 0
            if ended:
                told = clock.told()
                values = {"loss": totals[0] / totals[2], "accuracy": totals[1] / totals[2], "epoch": epoch}
                tell(at, "train", values | {"seconds": told["train"], "waited": told["wait"]})
                totals[:] = 0
                with clock("validate"):
                    validate(at, epoch)
            # Totals of a part of an epoch travel with the checkpoint: the epoch's line is the same after a resume.
            if ended or stop or at % t.checkpoint_steps == 0:
                meta["totals"] = totals.tolist()
                with clock("save"):
                    save(workdir, "last", at, model, optimizer, meta)
    finally:
        bar.close()
        for number, handler in previous.items():
            signal.signal(number, handler)
    seconds = clock.told()
    logging.info("%s", goodput.sentence(seconds))
    if stop:
        if board:
            board.close()
        logging.warning("stopped by signal %d at step %d, saved; the same command goes on", stop, at)
        sys.exit(128 + stop)

    # ---------------------------------------------------------------------------------------- the best, judged
    best = newest(workdir, "best")
    if best is None:
        raise checkpoint.CheckpointError(f"{workdir}: no checkpoints/best-* there any more; give another --workdir")
    saved = put(model, best)
    found = {part: answers(model, extractor, corpus, parts[part], config, device) for part in ("validation", "test")}
    system = machine | {"wall_s": time.monotonic() - began, "seconds": seconds, "goodput": goodput.share(seconds)}
    judged: Any = _Judged(corpus, parts, split, _Task(), labels, steps_an_epoch)
    results = jax_train.conclude(config, workdir, judged, None, None, None, saved, found, facts, system, tell)
    if board:
        board.close()
    return results
