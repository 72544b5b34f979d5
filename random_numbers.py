"""Random numbers that are a function of (seed, stream, sample, position) alone.

Each is the finaliser of splitmix64 (Steele, Lea, Flood, 2014) over the key of a sequence and the
position in it, so it is computed without the ones before it.
"""

import torch

_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_64_BITS = (1 << 64) - 1


def _signed(x: int) -> int:
    """The int64 with the same 64 bits; products of tensors of these wrap as unsigned ones do."""
    return (x & _64_BITS) - (1 << 64) * ((x >> 63) & 1)


def stream_key(*parts: int) -> int:
    """One int64 from (seed, stream id, sample)."""
    key = 0
    for part in parts:
        key = (key + int(part) + 1) * _GOLDEN & _64_BITS
        key = (key ^ key >> 30) * _MIX_1 & _64_BITS
        key = (key ^ key >> 27) * _MIX_2 & _64_BITS
        key ^= key >> 31
    return _signed(key)


def uniform(keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """keys, positions int64, of shapes that broadcast -> float64 in [0, 1), 32 random bits each."""
    x = keys + (positions + 1) * _signed(_GOLDEN)
    # The masks turn the arithmetic shifts of signed numbers into logical ones.
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * _signed(_MIX_1)
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * _signed(_MIX_2)
    return ((x ^ (x >> 31 & (1 << 33) - 1)) >> 32 & 0xFFFFFFFF).double() / 2 ** 32
