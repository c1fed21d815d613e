#!/usr/bin/env bash
# bash findings/pallas_abstract_gpu.sh: lowering a Pallas kernel for an NVIDIA GPU on a machine without one, in JAX
# 0.11.2. 0.10.2 did it unasked (for compute capability 9.0); 0.11.2 raises, and its message asks for an abstract device
# and names `use_abstract_mesh`, but not where that belongs. Needs Python 3.12 or newer (PYTHON=/path/to/it) and a package
# index; makes and removes a venv of its own. Exits with status 1 where JAX behaves otherwise.
#
# Guess, written before the first run: the mesh belongs around `lower`, where the device is asked for, and any kind of
# NVIDIA GPU will do.
# Outcome: both wrong. The mesh that counts is the one of the trace, which `lower` restores: around `lower` alone it has
# no effect and the message is the same. And "NVIDIA GeForce RTX 4090" is known while "NVIDIA GeForce RTX 3090" is not:
# again the same message, "No supported GPU devices found, please specify an abstract GPU device", although one is given.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  jax==0.11.2 jaxlib==0.11.2 numpy==2.4.6 scipy==1.17.1 ml_dtypes==0.6.0 opt_einsum==3.4.0
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import contextlib, sys
import jax, jax.numpy as jnp, jaxlib
from jax.experimental import pallas as pl
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh


def kernel(x_ref, o_ref):
    o_ref[...] = x_ref[...] + 1.0


def lowers(around_trace, around_lower):
    """Whether it lowers, with an abstract GPU of that kind (None: without) at each stage."""
    def on(kind):
        if kind is None:
            return contextlib.nullcontext()
        device = AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
        return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))
    x = jax.ShapeDtypeStruct((128,), jnp.float32)
    add = jax.jit(lambda x: pl.pallas_call(kernel, out_shape=x)(x))
    with on(around_trace):
        traced = add.trace(x)
    try:
        with on(around_lower):
            return "triton" in traced.lower(lowering_platforms=("cuda",)).as_text()
    except RuntimeError as error:
        assert "please specify an abstract GPU device" in str(error), error
        return False


H100 = "NVIDIA H100"
cases = [(None, None, False), (None, H100, False), (H100, None, True), (H100, H100, True),
         ("NVIDIA GeForce RTX 4090", None, True), ("NVIDIA GeForce RTX 3090", None, False)]
print(f"Python {sys.version.split()[0]}, jax {jax.__version__}, jaxlib {jaxlib.__version__}")
changed = False
for trace, lower, expected in cases:
    got = lowers(trace, lower)
    changed |= got != expected
    print(f"around trace {trace!s:24} around lower {lower!s:12} {'lowers' if got else 'RuntimeError'}")
sys.exit(changed)
PY
