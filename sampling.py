"""One token from logits, and random numbers for it that depend on nothing but their place."""

import torch
import torch.nn.functional as F


def sample(logits: torch.Tensor, temperature: float, top_p: float, top_k: int,
           uniforms: torch.Tensor):
    """One token a row: logits [B, V], uniforms [B] in [0, 1) -> tokens [B], logprobs [B] float32.

    It inverts the distribution: the token is the first one at which the cumulative probability
    passes the uniform number.
    """
    if temperature == 0:
        tokens = logits.argmax(-1, keepdim=True)
        best = logits.gather(-1, tokens)[:, 0].float()
        return tokens[:, 0], best - best   # 0, or NaN
    logits = logits.float() if temperature == 1 else logits.float() / temperature
    if top_k or top_p < 1:
        count = min(top_k, logits.shape[-1])
        ranked, ids = logits.topk(count) if top_k else logits.sort(descending=True)
        if top_p < 1:
            probs = ranked.softmax(-1)
            likelier = probs.cumsum(-1) - probs   # of the tokens before this one
            ranked = ranked.masked_fill(likelier >= top_p, -torch.inf)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, ids, ranked)
    probs = logits.softmax(-1)                                                            # [B, V]
    # First the block of the vocabulary is found, then the token in it, so that only sums of blocks
    # are cumulated in float64. The clamps keep the NaN of a diverged model from becoming an index
    # out of bounds.
    padding = -probs.shape[-1] % _BLOCK
    blocks = (F.pad(probs, (0, padding)) if padding else probs).unflatten(-1, (-1, _BLOCK))
    cumulative = blocks.sum(-1).double().cumsum(-1)                                   # [B, V/128]
    # The sum is not exactly 1, because of rounding.
    targets = uniforms[:, None] * cumulative[:, -1:]                                      # [B, 1]
    block = torch.searchsorted(cumulative, targets, right=True)
    block = block.clamp(max=cumulative.shape[-1] - 1)                                     # [B, 1]
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK))[:, 0]
    inside = inside.double().cumsum(-1)                                                 # [B, 128]
    targets = targets - F.pad(cumulative, (1, 0)).gather(1, block)
    targets = targets.minimum(inside[:, -1:] * (1 - 1e-15))   # both sums of a block are rounded
    tokens = block * _BLOCK + torch.searchsorted(inside, targets, right=True)             # [B, 1]
    tokens = tokens.clamp(max=probs.shape[-1] - 1)
    return tokens[:, 0], probs.gather(-1, tokens)[:, 0].log()


_BLOCK = 128   # it divides the vocabularies of most models


# --------------------------------------------------------------------------------------------------
# Random numbers: the finaliser of splitmix64 (Steele, Lea, Flood, 2014) over the key of a sequence
# and the position in it. Each number is computed without the ones before it.

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
