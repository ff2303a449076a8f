"""Random numbers that depend on where a token stands, not on what was drawn before it.

A resumed sequence must draw what the unbroken one would have drawn, and a sequence must not notice its
neighbours in the batch. So there is no generator with a state: each candidate at a position has a number of
its own, a hash of (seed, choice, position, candidate).

The hash is SplitMix64 (Steele, Lea & Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014;
constants of its finaliser as in Vigna's public-domain splitmix64.c). Its n-th output is
`mix(state + n * GAMMA)`, so any position is reached in one step. The state of a choice is a mix of the
seed's mix and the choice: neighbouring seeds and choices share nothing.
"""

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
    """The state that all positions of one choice share, as a signed 64-bit integer; any integer is a seed, by
    its low 64 bits."""
    return _signed(mix(mix(seed + GAMMA) + (choice + 1) * GAMMA))


def keys(states: Tensor, positions: Tensor) -> Tensor:
    """The states that all candidates for one position share.

    Args:
        states: [rows], int64, of `stream`
        positions: [rows], int64

    Returns:
        [rows], int64
    """
    return _mix_all(states + (positions + 1) * _signed(GAMMA))


def exponentials(keys: Tensor, candidates: Tensor) -> Tensor:
    """Independent draws of the exponential distribution of mean 1, none of them 0.

    Args:
        keys: [rows], of `keys`
        candidates: [rows or 1, n], int64, not negative

    Returns:
        [rows, n], float64
    """
    bits = _mix_all(keys[:, None] + (candidates + 1) * _signed(GAMMA))
    return -((_shift(bits, 12).double() + 0.5) * 2.0**-52).log()


def _mix_all(x: Tensor) -> Tensor:
    """`mix` of int64s, whose products wrap around as they should."""
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, by: int) -> Tensor:
    """To the right, filled with zeros: torch's own fills with the sign."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _signed(x: int) -> int:
    """The int64 of the same 64 bits."""
    return x - (1 << 64) if x >> 63 else x
