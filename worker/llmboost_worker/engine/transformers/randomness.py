"""Random numbers that depend on where a token stands, not on what was drawn before it.

A resumed sequence must draw what the unbroken one would have drawn, and a sequence must not notice its
neighbours in the batch. So there is no generator with a state: the number for a position is a hash of
(seed, choice, position).

The hash of a position is SplitMix64 (Steele, Lea & Flood, "Fast Splittable Pseudorandom Number
Generators", OOPSLA 2014; constants of its finaliser as in Vigna's public-domain splitmix64.c). Its n-th
output is `mix(state + n * GAMMA)`, so any position is reached in one step. The state of a choice is a mix
of the seed's mix and the choice: neighbouring seeds and choices share nothing.
"""

from functools import lru_cache

import torch
from torch import Tensor

MASK = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15
"""2^64 over the golden ratio, odd."""


def mix(x: int) -> int:
    """SplitMix64's finaliser: a bijection of 64-bit integers."""
    x &= MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def stream(seed: int, choice: int) -> int:
    """The state that all positions of one choice share; any integer is a seed, by its low 64 bits."""
    return mix(mix(seed + GAMMA) + (choice + 1) * GAMMA)


def key(state: int, position: int) -> int:
    """64 random bits for a position."""
    return mix(state + (position + 1) * GAMMA)


def exponentials(keys: list[int], size: int, device: torch.device) -> Tensor:
    """Exponentially distributed numbers (rate 1), each a function of its row's key and its column alone.

    Multiplies and shifts 32-bit integers as MurmurHash3's finaliser does (Appleby, public domain). 31 bits
    make the smallest number 2e-10, with the precision of float32 there, where races are won.

    Returns:
        [len(keys), size], float32, positive and finite
    """
    low = torch.tensor([_int32(key) for key in keys], dtype=torch.int32, device=device)[:, None]
    high = torch.tensor([_int32(key >> 32 | 1) for key in keys], dtype=torch.int32, device=device)[:, None]
    bits = _finalise((_columns(size, device) ^ low) * high) & 0x7FFFFFFF
    uniforms = bits.float().add_(0.5).mul_(2.0**-31)
    # Rounding carries the largest to 1, whose logarithm is infinite.
    return uniforms.clamp_(max=1 - 2.0**-24).neg_().log1p_().neg_()


@lru_cache(maxsize=4)
def _columns(size: int, device: torch.device) -> Tensor:
    """A scrambled number for each column. [size]"""
    return _finalise(torch.arange(1, size + 1, dtype=torch.int32, device=device) * _int32(GAMMA >> 32))


def _finalise(x: Tensor) -> Tensor:
    """MurmurHash3's fmix32 of int32, in place; shifts keep the sign, so it is masked off."""
    x ^= (x >> 16) & 0xFFFF
    x *= _int32(0x85EBCA6B)
    x ^= (x >> 13) & 0x7FFFF
    x *= _int32(0xC2B2AE35)
    x ^= (x >> 16) & 0xFFFF
    return x


def _int32(x: int) -> int:
    """The low 32 bits as a signed integer."""
    x &= 0xFFFFFFFF
    return x - (1 << 32) if x >> 31 else x
