"""Random numbers that depend on where a token stands, not on what was drawn before it.

A resumed sequence must draw what the unbroken one would have drawn, and a sequence must not notice its
neighbours in the batch. So there is no generator with a state: the number for a position is a hash of
(seed, choice, position).

The hash is SplitMix64 (Steele, Lea & Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014;
constants of its finaliser as in Vigna's public-domain splitmix64.c). Its n-th output is
`mix(state + n * GAMMA)`, so any position is reached in one step. The state of a choice is a mix of the
seed's mix and the choice: neighbouring seeds and choices share nothing.
"""

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


def uniform(state: int, position: int) -> float:
    """In [0, 1), a multiple of 2^-53."""
    return (mix(state + (position + 1) * GAMMA) >> 11) * 2.0**-53
