"""Heart-sound models in JAX: phonocardiogram classification and segmentation built for throughput."""

__version__ = "0.1.0"
