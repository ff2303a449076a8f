"""Structures that the kernels take, as their sources have them."""

import ctypes
from ctypes import c_float, c_int, c_void_p

WIDTH = 16
"""Floats of a vector."""
MAX_DIM = 256
"""Of a head."""


class Attention(ctypes.Structure):
    """How a layer attends. Sizes in elements; `softcap` and `window` 0: none."""

    _fields_ = [  # what ctypes asks for
        *((name, c_int) for name in ("heads", "key_heads", "key_dim", "value_dim", "block_size")),
        ("scale", c_float),
        ("softcap", c_float),
        ("window", c_int),
    ]


class Rotation(ctypes.Structure):
    """Rotary positions of a layer. `rotated`: the first dimensions of each head; `cos` and `sin`: addresses
    of float32 [positions, rotated]; `epsilon`: of the heads' norms."""

    _fields_ = [
        *((name, c_int) for name in ("heads", "key_heads", "dim", "value_dim", "rotated")),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("epsilon", c_float),
    ]
