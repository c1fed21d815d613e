"""Heart-sound models in JAX: phonocardiogram classification and segmentation built for throughput."""

from __future__ import annotations

__version__ = "0.1.0"
