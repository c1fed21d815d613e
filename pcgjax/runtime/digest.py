"""A digest of an array that is the same however the array is divided among devices and processes.

A checkpoint is written by one topology and read by another, so the bytes of its files differ; this sum over elements
does not. Every element is mixed with its place, so one changed bit, and two exchanged elements, give another sum.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Below this NumPy is done sooner than a program is compiled.
SMALL = 1 << 18  # elements


def digests(tree: Any) -> dict[str, list]:
    """{place in the tree: [shape, dtype, 16 hexadecimal digits]} of every array. Of many processes all call it."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums = [_sums(x) for _, x in leaves]
    hexes = [f"{int(a):08x}{int(b):08x}" for a, b in jax.device_get(sums)]
    return {
        jax.tree_util.keystr(place): [list(x.shape), str(x.dtype), text]
        for (place, x), text in zip(leaves, hexes, strict=True)
    }


def _sums(x: Any) -> Any:
    if isinstance(x, jax.Array) and (x.size > SMALL or not x.is_fully_addressable or x.devices() - set(_cpus())):
        return _compiled(x)
    with np.errstate(over="ignore"):  # modulo 2^32 is meant
        return sums_of(np, np.asarray(x))


@functools.cache
def _cpus() -> tuple[jax.Device, ...]:
    return tuple(jax.local_devices(backend="cpu"))


def sums_of(xp: Any, x: Any) -> Any:
    """Two sums, modulo 2^32, over the elements of x, each mixed with its index. xp: numpy or jax.numpy."""
    place = xp.zeros((), xp.uint32)
    for axis, size in enumerate(x.shape):
        along = xp.arange(size, dtype=xp.uint32).reshape([-1 if a == axis else 1 for a in range(len(x.shape))])
        stride = np.uint32(math.prod(x.shape[axis + 1 :]) & 0xFFFFFFFF)
        place = place + along * stride if axis else along * stride
    first = second = np.uint32(0)
    for n, word in enumerate(_words(xp, x)):
        mixed = _mix(xp, word + place * np.uint32(0x9E3779B9) + np.uint32(0x7F4A7C15 * (n + 1) & 0xFFFFFFFF))
        first = first + mixed.sum(dtype=xp.uint32)
        second = second + _mix(xp, mixed ^ np.uint32(0x85EBCA77)).sum(dtype=xp.uint32)
    return xp.stack([first, second])


_compiled = jax.jit(functools.partial(sums_of, jnp))


def _words(xp: Any, x: Any) -> list[Any]:
    """The bits of each element as one or two uint32, arrays of x's shape."""
    bits = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[x.dtype.itemsize]
    if x.dtype == bool:
        whole = x.astype(bits)
    elif xp is np:
        whole = x.view(bits) if x.ndim else x.reshape(1).view(bits).reshape(())
    else:
        whole = jax.lax.bitcast_convert_type(x, bits)
    if bits is not np.uint64:
        return [whole.astype(np.uint32)]
    return [(whole & np.uint64(0xFFFFFFFF)).astype(np.uint32), (whole >> np.uint64(32)).astype(np.uint32)]


def _mix(xp: Any, h: Any) -> Any:
    """A permutation of the 32-bit numbers in which each bit depends on all (Appleby's MurmurHash3, fmix32)."""
    h = h ^ (h >> np.uint32(16))
    h = h * np.uint32(0x85EBCA6B)
    h = h ^ (h >> np.uint32(13))
    h = h * np.uint32(0xC2B2AE35)
    return h ^ (h >> np.uint32(16))
