"""What our speed is measured against: the same training as people write it in PyTorch, with SciPy, PyWavelets, librosa.

The networks, batches and losses are ours; the code is the plain one. PyTorch is imported where it is used.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pcgjax.data.corpus import Corpus
from pcgjax.data.plan import Geometry


def _epoch(self: Segmented | Clipped) -> None:
    for batch in self.loader:
        self.step(*batch)


def _loader(dataset: Any, ids: np.ndarray, workers: int) -> Any:
    import torch

    return torch.utils.data.DataLoader(
        dataset,
        batch_sampler=[[int(i) for i in step.reshape(-1) if i >= 0] for step in ids],
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        multiprocessing_context="spawn" if workers else None,  # a fork of a process with JAX's threads can hang
    )


class Segments:
    """The peer's Dataset: one recording's filtered, z-scored windows (S, T) and its label."""

    def __init__(self, samples: list[np.ndarray], labels: np.ndarray, window: int, hop: int, sample_rate_hz: int):
        import scipy.signal

        self.samples, self.labels, self.window, self.hop = samples, labels, window, hop
        self.sos = scipy.signal.butter(4, [25, 400], "bandpass", fs=sample_rate_hz, output="sos")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int):
        import scipy.signal
        import torch

        x = scipy.signal.sosfiltfilt(self.sos, self.samples[index] / 32767)
        x = (x - x.mean()) / x.std()
        count = max(1, (len(x) - self.window) // self.hop + 1)
        x = np.pad(x, (0, max(0, self.window - len(x))))
        cut = np.stack([x[i * self.hop : i * self.hop + self.window] for i in range(count)])
        return torch.tensor(cut, dtype=torch.float32), float(self.labels[index])


def collate(items):
    """Recordings -> (segments (S, 1, T), recording ids (S,), labels (R,))."""
    import torch

    segments = torch.cat([segments for segments, _ in items])[:, None]
    ids = torch.repeat_interleave(torch.arange(len(items)), torch.tensor([len(s) for s, _ in items]))
    return segments, ids, torch.tensor([label for _, label in items])


class Segmented:
    """The 1D CNN's training in PyTorch, on our batches: `ids` (steps, G, R) as `data.plan.Plan` has them."""

    def __init__(self, corpus: Corpus, labels: np.ndarray, ids: np.ndarray, geometry: Geometry, workers: int = 0):
        import torch

        window = geometry.window
        samples = [corpus.read(i) for i in range(len(corpus.rows))]
        self.loader = _loader(Segments(samples, labels, window, geometry.hop, corpus.sample_rate_hz), ids, workers)
        pooled = ((window - 4) // 2 - 4) // 2
        self.net = torch.nn.Sequential(
            torch.nn.Conv1d(1, 16, 5), torch.nn.ReLU(), torch.nn.MaxPool1d(2),
            torch.nn.Conv1d(16, 32, 5), torch.nn.ReLU(), torch.nn.MaxPool1d(2),
            torch.nn.Flatten(), torch.nn.Linear(32 * pooled, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1),
        ).to("cuda" if torch.cuda.is_available() else "cpu")  # fmt: skip
        self.device = next(self.net.parameters()).device
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.01)
        self.torch = torch

    def step(self, segments, ids, labels) -> float:
        """One step on segments (S, 1, T) that are ready; waits for the loss."""
        torch = self.torch
        segments, ids, labels = (x.to(self.device) for x in (segments, ids, labels))
        self.optimizer.zero_grad()
        probability = torch.sigmoid(self.net(segments)[:, 0])
        total = torch.zeros(len(labels), device=self.device).index_add_(0, ids, probability)
        mean = total / torch.bincount(ids, minlength=len(labels))
        loss = torch.nn.functional.binary_cross_entropy(mean, labels)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    epoch = _epoch


# --------------------------------------------------------------------------------- the CNN with the H-infinity LSTM


class Clips:
    """A Dataset: one recording's log-mel clips (S, F, T) and its label."""

    def __init__(self, samples: list[np.ndarray], labels: np.ndarray, f: Any, sample_rate_hz: int):
        import scipy.signal

        self.samples, self.labels, self.f, self.rate = samples, labels, f, sample_rate_hz
        self.sos = scipy.signal.butter(f.filter_order, f.high_hz, fs=sample_rate_hz, output="sos")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int):
        import librosa
        import pywt
        import scipy.signal
        import torch

        f, clip = self.f, round(self.f.window_s * self.rate)
        x = self.samples[index] / 32767
        approximation, *details = pywt.wavedec(x, "db4", level=f.wavelet_level)
        threshold = np.median(np.abs(details[-1])) / 0.6745 * np.sqrt(2 * np.log(len(x)))
        details = [np.sign(d) * np.maximum(np.abs(d) - threshold, 0) for d in details]  # pywt's gives NaN for zeros
        x = pywt.waverec([approximation, *details], "db4")[: len(x)]
        x = scipy.signal.sosfiltfilt(self.sos, x).astype(np.float32)
        x = np.pad(x, (0, max(0, clip - len(x))))
        clips = []
        for begin in range(0, len(x) - clip + 1, clip):
            power = librosa.feature.melspectrogram(
                y=x[begin : begin + clip], sr=self.rate, n_fft=f.n_fft, hop_length=f.hop, n_mels=f.n_mels
            )
            clips.append(librosa.power_to_db(power, ref=np.max, top_db=f.top_db) / f.top_db + 1)
        return torch.tensor(np.stack(clips)), float(self.labels[index])


def hinf_cell_layer(inputs: int, hidden: int) -> Any:
    """The H-infinity LSTM (convex) as a PyTorch module that loops over time in Python, as custom cells are written."""
    import torch

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.x, self.h = torch.nn.Linear(inputs, 3 * hidden), torch.nn.Linear(hidden, 3 * hidden, bias=False)
            self.theta = torch.nn.Parameter(torch.zeros(hidden))

        def forward(self, x):
            h = c = x.new_zeros(len(x), hidden)
            rate, out = torch.sigmoid(self.theta), []
            for t in range(x.shape[1]):
                i, o, g = (self.x(x[:, t]) + self.h(h)).chunk(3, dim=1)
                c = (1 - rate) * c + rate * torch.sigmoid(i) * torch.tanh(g)
                h = torch.sigmoid(o) * torch.tanh(c)
                out.append(h)
            return torch.stack(out, 1)

    return Layer()


class Clipped:
    """The CNN with the H-infinity LSTM in PyTorch, on our batches, trained with the penalty-weighted loss and Adam."""

    def __init__(self, corpus: Corpus, labels: np.ndarray, ids: np.ndarray, config: Any, workers: int = 0):
        import torch

        samples = [corpus.read(i) for i in range(len(corpus.rows))]
        self.loader = _loader(Clips(samples, labels, config.features, corpus.sample_rate_hz), ids, workers)
        m, channels = config.model, 1
        layers: list[Any] = []
        for block in m.blocks:
            for i, features in enumerate(block):
                layers.append(torch.nn.Conv2d(channels, features, 3, padding=1, bias=i + 1 < len(block)))
                layers.append(torch.nn.ReLU() if i + 1 < len(block) else torch.nn.BatchNorm2d(features))
                channels = features
            layers += [torch.nn.ReLU(), torch.nn.MaxPool2d(2), torch.nn.Dropout(m.dropout)]
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.cnn = torch.nn.Sequential(*layers).to(self.device)
        inputs = config.features.n_mels // 2 ** len(m.blocks) * channels
        self.recurrent = hinf_cell_layer(inputs, m.hidden).to(self.device)
        self.head = torch.nn.Sequential(torch.nn.Dropout(m.dropout), torch.nn.Linear(m.hidden, 1)).to(self.device)
        modules = (self.cnn, self.recurrent, self.head)
        self.optimizer = torch.optim.Adam([p for module in modules for p in module.parameters()], 1e-3)
        self.torch, self.loss = torch, config.loss

    def step(self, segments, ids, labels) -> float:
        """One step on clips (S, 1, F, T) that are ready; waits for the loss."""
        torch = self.torch
        clips, ids, labels = (x.to(self.device) for x in (segments, ids, labels))
        self.optimizer.zero_grad()
        h = self.cnn(clips).permute(0, 3, 2, 1).flatten(2)
        p, y = torch.sigmoid(self.head(self.recurrent(h)[:, -1])[:, 0]), labels[ids]
        missed, false = (y * (p < 0.5)).sum(), ((1 - y) * (p >= 0.5)).sum()
        penalty = 1 + self.loss.alpha * missed + (1 - self.loss.alpha) * false
        loss = penalty * torch.nn.functional.binary_cross_entropy(p, y)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    epoch = _epoch


# ------------------------------------------------------------------------------------------ the segmenter and SSAMBA


def mambapy_scan(u, delta, A, B, C) -> Any:
    """The selective scan by mambapy's parallel scan: u, delta (B, L, D), A (D, N), B, C (B, L, N) -> (B, L, D)."""
    import torch
    from mambapy.pscan import pscan

    states = pscan(torch.exp(delta[..., None] * A), (delta * u)[..., None] * B[:, :, None])
    return (states @ C[..., None])[..., 0]


def mamba_mixer(width: int, states: int, expand: int = 2) -> Any:
    """A bidirectional Mamba mixer as a PyTorch module, (B, L, width) -> (B, L, width); the scan is mambapy's."""
    import torch
    from torch.nn import functional as F

    inner, rank = expand * width, -(-width // 16)

    class Direction(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv1d(inner, inner, 4, padding=3, groups=inner)
            self.project = torch.nn.Linear(inner, rank + 2 * states, bias=False)
            self.delta = torch.nn.Linear(rank, inner)
            self.A_log = torch.nn.Parameter(torch.arange(1.0, states + 1).log().repeat(inner, 1))
            self.D = torch.nn.Parameter(torch.ones(inner))

        def forward(self, u):
            u = F.silu(self.conv(u.transpose(1, 2))[..., : u.shape[1]].transpose(1, 2))
            dt, B, C = self.project(u).split([rank, states, states], dim=-1)
            return mambapy_scan(u, F.softplus(self.delta(dt)), -self.A_log.exp(), B, C) + self.D * u

    class Mixer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.leave = (
                torch.nn.Linear(width, 2 * inner, bias=False),
                torch.nn.Linear(inner, width, bias=False),
            )
            self.ahead, self.back = Direction(), Direction()

        def forward(self, x):
            u, z = self.enter(x).chunk(2, dim=-1)
            return self.leave((self.ahead(u) + self.back(u.flip(1)).flip(1)) / 2 * F.silu(z))

    return Mixer()


class Framed:
    """configs/segmenter_small.py's training in PyTorch, on frames that are ready. `m`: the config's `model`."""

    def __init__(self, bands: int, outputs: int, m: Any):
        import torch

        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.embed = torch.nn.Linear(bands, m.width)
                self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(m.width) for _ in range(m.depth))
                self.mixers = torch.nn.ModuleList(mamba_mixer(m.width, m.d_state, m.expand) for _ in range(m.depth))
                self.drop = torch.nn.Dropout(m.dropout)
                self.norm, self.head = torch.nn.LayerNorm(m.width), torch.nn.Linear(m.width, outputs)

            def forward(self, x):
                x = self.embed(x)
                for norm, mixer in zip(self.norms, self.mixers, strict=True):
                    x = x + self.drop(mixer(norm(x)))
                return self.head(self.norm(x))

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.net, self.torch = Net().to(self.device), torch
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=0.003, weight_decay=0.01)

    def step(self, frames, wanted) -> float:
        """One step on frames (B, T, bands) and their states (B, T); waits for the loss."""
        torch = self.torch
        self.optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(self.net(frames).flatten(0, 1), wanted.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()


class Patched:
    """configs/ssamba_pretrain.py's training in PyTorch, on filter banks and masks that are ready.

    frames: of a filter bank; the encoder is the public code's, but that the scan is mambapy's.
    """

    def __init__(self, width: int, depth: int, frames: int):
        import torch

        patches = (frames // 16) * 8

        def predictor() -> Any:
            return torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, 256))

        def small(*shape: int) -> Any:
            return torch.nn.Parameter(0.02 * torch.randn(*shape))

        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.embed = torch.nn.Linear(256, width)
                self.class_token, self.mask_token = small(1, 1, width), small(1, 1, width)
                self.position = small(1, 1 + patches, width)
                self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(width) for _ in range(depth))
                self.mixers = torch.nn.ModuleList(mamba_mixer(width, 16) for _ in range(depth))
                self.norm = torch.nn.LayerNorm(width)
                self.contrast, self.reconstruction = predictor(), predictor()

            def forward(self, patch, masked):
                x = self.embed(patch)
                is_masked = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device).scatter(1, masked, True)
                x = torch.where(is_masked[..., None], self.mask_token, x)
                x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + self.position
                hidden, residual = torch.zeros_like(x), x
                for i in range(0, depth, 2):
                    residual = residual + hidden
                    forward = self.mixers[i](self.norms[i](residual))
                    backward = self.mixers[i + 1](self.norms[i + 1](residual.flip(1))).flip(1)
                    hidden, residual = forward + backward, 2 * residual
                x = self.norm(self.norm(residual + hidden))[:, 1:]
                tokens = x.gather(1, masked[..., None].expand(-1, -1, width))
                return self.contrast(tokens), self.reconstruction(tokens)

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.net, self.torch = Net().to(self.device), torch
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=0.0003, weight_decay=0.01)

    def step(self, fbank, masked) -> float:
        """One step on filter banks (B, T, 128) and the numbers (B, M) of masked patches; waits for the loss."""
        torch = self.torch
        self.optimizer.zero_grad()
        clips, frames, bins = fbank.shape
        patch = fbank.transpose(1, 2).reshape(clips, bins // 16, 16, frames // 16, 16).transpose(2, 3).flatten(3)
        patch = patch.flatten(1, 2)
        contrast, rebuilt = self.net(patch, masked)
        target = patch.gather(1, masked[..., None].expand(-1, -1, 256))
        log_p = torch.log_softmax(target @ contrast.transpose(1, 2), dim=-1)
        loss = 10 * (rebuilt - target).square().mean() - log_p.diagonal(dim1=1, dim2=2).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()


# ----------------------------------------------------------------------------------------------------- reading alone


def recordings_loader(read: Any, batches: list[list[int]], workers: int = 0) -> Any:
    """A DataLoader over prepared recordings alone: their int16 samples, padded to the longest of the batch.

    read: an index -> int16 (n,); what the worker processes are sent of it must be picklable.
    """
    import torch

    dataset: Any = Recordings(read)
    return torch.utils.data.DataLoader(
        dataset, batch_sampler=batches, collate_fn=padded, num_workers=workers,
        persistent_workers=workers > 0, multiprocessing_context="spawn" if workers else None,
    )  # fmt: skip


class Recordings:
    """A Dataset of the samples alone."""

    def __init__(self, read: Any):
        self.read = read

    def __getitem__(self, index: int):
        return self.read(index)


def padded(items):
    """Recordings (n,) int16 -> (R, the longest's n) int16."""
    import torch

    out = torch.zeros((len(items), max(map(len, items))), dtype=torch.int16)
    for row, samples in zip(out, items, strict=True):
        row[: len(samples)] = torch.from_numpy(np.array(samples))  # a copy: the reader's bytes cannot be written to
    return out
