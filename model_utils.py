"""A decoder-only Transformer, whose weights and code both sample and train.

    model, tokenizer = load_model("Qwen/Qwen3-1.7B")          # or any Hugging Face folder
    logits = model(tokens)                                    # [B, T] -> [B, T, V]
    logprobs = token_logprobs(model, tokens)                  # [B, T] -> [B, T-1], no [B, T, V]
    packing = pack(prompts, responses)                        # to train: no padding, a prompt once
    logprobs, entropy = response_logprobs(model, packing)     # [B, R] each
    save_model(model, tokenizer, "my-model")                  # transformers and vLLM load it

It reads and writes checkpoints of Llama 3, Qwen2.5, Qwen3, SmolLM2, SmolLM3, Mistral without a
sliding window, and others of these architectures, and has their names of parameters.
The class Transformer knows nothing of distribution (distributed.py), and of processors nothing but
wide_product (machine.py).

Shapes: B sequences, T positions, V vocabulary, D hidden size, H query heads, K key-value heads,
G = H/K, E head size, S positions of a cache slot; of a packing N positions, M response tokens, R of
these in the longest response.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from distributed import barrier, full_tensor, is_main, sharded_like
from files import read_object
from hf_folders import find_folder, read_config, read_tensors, read_tokenizer, write_folder
from machine import to_device, wide_product
from memory import LOGITS_CHUNK, LOGITS_IN_CACHES

# --------------------------------------------------------------------------------------------------
# Configuration

@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency scaling.

    It stretches long wavelengths by `factor`, keeps short ones, and blends those between.
    """
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position: int
    tie_embeddings: bool
    qkv_bias: bool      # Qwen2, or Llama and Qwen3 with attention_bias
    out_bias: bool      # Llama and Qwen3 with attention_bias
    mlp_bias: bool
    qk_norm: bool       # Qwen3
    nope_layers: tuple[int, ...] = ()   # of SmolLM3: layers without rotary embedding

    @classmethod
    def from_hf(cls, hf) -> "ModelConfig":
        """The shape that a transformers config gives."""
        rope, scaling = hf.rope_parameters, None
        if rope["rope_type"] == "llama3":
            # transformers prefers a length that stands beside rope_parameters.
            trained = (getattr(hf, "original_max_position_embeddings", None)
                       or rope["original_max_position_embeddings"])
            scaling = RopeScaling(rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"],
                                  trained)
        attention_bias = getattr(hf, "attention_bias", False)
        smollm3 = hf.model_type == "smollm3"   # others ignore the key
        rotary = hf.no_rope_layers if smollm3 else ()   # a 1 for each layer that has it
        return cls(
            vocab_size=hf.vocab_size, hidden_size=hf.hidden_size,
            intermediate_size=hf.intermediate_size, num_layers=hf.num_hidden_layers,
            num_heads=hf.num_attention_heads,
            num_kv_heads=hf.num_key_value_heads or hf.num_attention_heads,
            head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
            norm_eps=hf.rms_norm_eps, rope_theta=rope["rope_theta"] or 1e4, rope_scaling=scaling,
            max_position=hf.max_position_embeddings, tie_embeddings=hf.tie_word_embeddings,
            qkv_bias=hf.model_type == "qwen2" or attention_bias,
            out_bias=hf.model_type != "qwen2" and attention_bias,
            mlp_bias=getattr(hf, "mlp_bias", False), qk_norm=hf.model_type == "qwen3",
            nope_layers=tuple(layer for layer, has in enumerate(rotary) if not has))


# --------------------------------------------------------------------------------------------------
# Layouts: what the queries of a pass see. WholeSequences, Packing and CachedLayer are a use of the
# model each; `attend` takes q [B, H, T, E], k and v [B, K, T, E] and returns [B, T, H, E].

def _causal(q, k, v) -> torch.Tensor:
    if q.is_cuda and q.dtype == torch.float32:
        # The only fused kernel of CUDA that takes float32 does not take grouped queries.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    # The branch keeps the flag a constant under torch.compile, where a comparison is symbolic.
    grouped = True if k.shape[1] < q.shape[1] else False
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)


class WholeSequences:
    """Whole sequences, padded on the right: causal attention never looks at the padding."""

    def attend(self, q, k, v):
        return _causal(q, k, v).transpose(1, 2)


class Packing(NamedTuple):
    """Rows of prompt and response in which a prompt that several rows share is stored once.

    Everything but attention sees the N distinct positions one behind the other; attention sees
    rows, in buckets of similar length.
    """
    tokens: torch.Tensor          # [1, N]
    positions: torch.Tensor       # [1, N], the position of each in its row
    buckets: list[torch.Tensor]   # [b, t] each: the index in N of each cell; arbitrary in padding
    sources: torch.Tensor         # [N]: the cell, buckets one behind the other, of each position
    predicting: torch.Tensor      # [M]: index in N of the position that predicts each target
    targets: torch.Tensor         # [M]: the response tokens in the order of the rows
    mask: torch.Tensor            # [B, R] bool: the places of response tokens
    padding: int                  # cells of the buckets that are padding
    shared: int                   # positions that are not computed because an earlier row has them

    def attend(self, q, k, v):    # here B is 1 and T is N
        def rows_of(x, rows):                                 # [1, ·, N, E] -> [b, ·, t, E]
            x = x[0].transpose(0, 1).index_select(0, rows.flatten())
            return x.unflatten(0, rows.shape).transpose(1, 2)

        outs = [_causal(*(rows_of(x, rows) for x in (q, k, v))).transpose(1, 2).flatten(0, 1)
                for rows in self.buckets]                                      # [b·t, H, E] each
        return torch.cat(outs).index_select(0, self.sources)[None]             # [1, N, H, E]


class KVCache:
    """Keys and values of `slots` sequences of up to `size` positions for every layer.

    It is allocated once and holds nothing but numbers: its user knows how much of a slot is in use.
    What lies beyond that is overwritten before it is attended to.
    """

    def __init__(self, config: ModelConfig, slots: int, size: int, device, dtype):
        self.size = size
        shape = (slots, config.num_kv_heads, size, config.head_dim)   # [slots, K, S, E] for a layer
        # Zeros, because NaN would spread from behind the mask. One tensor for each layer, because
        # torch.compile copies a part of a larger one.
        self.keys, self.values = (
            [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]
            for _ in range(2))

    def copy(self, sources: torch.Tensor, targets: torch.Tensor, length: int,
             shares: torch.Tensor | None = None) -> None:
        """Copies the first `length` positions of some slots into as many others.

        shares: how many of them each target may have; it gets zeros for the others.
        """
        for cached in (*self.keys, *self.values):
            part = cached[sources, :, :length]                               # [n, K, length, E]
            if shares is not None:
                beyond = torch.arange(length, device=shares.device) >= shares[:, None]
                part.masked_fill_(beyond[:, None, :, None], 0.0)
            cached[targets, :, :length] = part


class CachedLayer(NamedTuple):
    """New positions of some slots of the cache, and what the cache holds of them, in one layer."""
    keys: torch.Tensor            # [slots, K, S, E]
    values: torch.Tensor          # [slots, K, S, E]
    written: tuple                # index of the new positions
    read: tuple                   # index of what is attended to, if `bias` says what is visible
    bias: torch.Tensor | None     # [B, 1, 1 or G·T, span]: 0 or -inf; None: the slots were empty
    attention: Callable           # `cached_attention` of the model

    def attend(self, q, k, v):
        self.keys[self.written], self.values[self.written] = k.transpose(1, 2), v.transpose(1, 2)
        if self.bias is None:
            return _causal(q, k, v).transpose(1, 2)
        # Folds the G query heads that share a key-value head into the query dimension.
        B, H, T, E = q.shape
        q = q.reshape(B, k.shape[1], -1, E)                                       # [B, K, G·T, E]
        out = self.attention(q, self.keys[self.read], self.values[self.read], self.bias)
        # A kernel of CUDA gives the result with the heads behind the queries.
        return out.reshape(B, H, T, E).transpose(1, 2)


# --------------------------------------------------------------------------------------------------
# The Transformer

@functools.lru_cache
def rope_frequencies(config: ModelConfig, device: torch.device) -> torch.Tensor:
    """Angular frequency of each pair of head dimensions in radians per position: [E/2] float32."""
    exponents = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta ** exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    # The number of turns within the original context decides: frequencies with few turns are
    # divided by `factor`, those with many are kept, and between them the blend is linear.
    turns = scaling.original_max_position * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / scaling.factor)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x [B, heads, T, E]; the pairs are (i, i + E/2).

    cos and sin: [B or 1, 1, T, E]; the first half of sin is negative.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        c = self.config = config
        self.q_proj = nn.Linear(c.hidden_size, c.num_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.num_heads * c.head_dim, c.hidden_size, bias=c.out_bias)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()

    def project(self, x):
        """x [B, T, D] -> queries [B, T, H·E], keys and values [B, T, K·E]."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def heads(self, x, cos, sin):
        """x [B, T, D] -> queries [B, H, T, E], keys and values [B, K, T, E]."""
        q, k, v = (y.unflatten(-1, (-1, self.config.head_dim)) for y in self.project(x))
        q, k, v = (y.transpose(1, 2) for y in (self.q_norm(q), self.k_norm(k), v))
        return rotate(q, cos, sin), rotate(k, cos, sin), v


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        c = config
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def gate_and_up(self, x):
        return self.gate_proj(x), self.up_proj(x)

    def forward(self, x):
        gate, up = self.gate_and_up(x)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def before_attention(self, x, cos, sin):
        return self.self_attn.heads(self.input_layernorm(x), cos, sin)

    def after_attention(self, x, attended):
        x = x + self.self_attn.o_proj(attended.flatten(2))
        return x + self.mlp(self.post_attention_layernorm(x))

    def forward(self, x, cos, sin, layout):
        """x [B, T, D] -> [B, T, D]. layout: WholeSequences, a Packing or a CachedLayer."""
        return self.after_attention(x, layout.attend(*self.before_attention(x, cos, sin)))


class Body(nn.Module):
    """All but the head; the name of the attribute that holds it is `model`, as in checkpoints."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers: Any = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)


class Transformer(nn.Module):
    """`config` is the shape; `hf_config`, `generation_config` and `stop_ids` come from a folder."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Body(config)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.hf_config: Any = None
        self.generation_config: dict | None = None
        self.stop_ids: tuple[int, ...] = ()

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

    @property
    def head(self) -> torch.Tensor:
        """[V, D]"""
        tied = self.config.tie_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.weight

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., V], in float32 or the model's dtype, whichever is wider."""
        return head_product(self.head)(hidden)

    def cached_attention(self, q, keys, values, bias) -> torch.Tensor:
        """q [B, K, N, E], keys and values [B, K, S, E], bias as of CachedLayer -> [B, K, N, E]."""
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=bias)

    def forward(self, tokens, targets=None, *, temperature: float = 1.0, mask=None,
                chunk_size: int = LOGITS_CHUNK, entropy_gradient: bool = False):
        """All uses with gradient go through `forward`, so that FSDP's hooks run in each.

        - forward(tokens): [B, T] int64 -> logits [B, T, V], see `logits`.
        - forward(tokens, targets): -> (log π(target | tokens up to it), entropy in nats), both
          [B, T] float32, 0 where `mask` [B, T] is False; see `token_logprobs`.
        - forward(packing): -> the same, both [M], of the response tokens in the order of the rows.
        """
        if isinstance(tokens, Packing):
            packing = tokens
            x = self._hidden(packing.tokens, packing.positions, lambda layer: packing)[0]   # [N, D]
            return _chunked_logprobs(x.index_select(0, packing.predicting), self.head,
                                     packing.targets, temperature, chunk_size, entropy_gradient)
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]               # [1, T]
        x = self._hidden(tokens, positions, lambda layer: WholeSequences())              # [B, T, D]
        if targets is None:
            return self.logits(x)
        mask = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask.bool()
        return to_rows(mask, *_chunked_logprobs(x[mask], self.head, targets[mask], temperature,
                                                chunk_size, entropy_gradient))

    def extend(self, tokens, cache: KVCache, slots=None, starts=None,
               span: int | None = None) -> torch.Tensor:
        """The pass that samples: appends tokens [B, T] to slots of the cache.

        It runs without FSDP's hooks, so the model must be whole, see `gather_model`.
        slots: [B]; None is the first B, which are read in place. starts: [B], the positions that
        each slot holds already; None if they are empty. Padding on the right of a row is written
        behind its end and overwritten by what follows. span: a bound on the positions in use
        afterwards, so that a long cache costs no more than what it holds.
        Returns the hidden states after the new tokens, [B, T, D].
        """
        (B, T), device = tokens.shape, tokens.device
        rows = torch.arange(B, device=device) if slots is None else slots
        positions, bias = torch.arange(T, device=device).expand(B, T), None
        read = (slice(B) if slots is None else slots, slice(None), slice(span))
        if starts is not None:
            positions = positions + starts[:, None]                                         # [B, T]
            seen = torch.arange(span or cache.size, device=device)
            unseen = seen > positions[:, :, None]                                     # [B, T, span]
            bias = torch.zeros(unseen.shape, device=device, dtype=self.dtype)
            bias = bias.masked_fill_(unseen, -torch.inf)
            if T > 1:   # once for each of the G query heads of a group
                bias = bias.repeat(1, self.config.num_heads // self.config.num_kv_heads, 1)
            bias = bias[:, None]                                           # [B, 1, 1 or G·T, span]
        # No prompt reaches the last position of its slot, so padding may be written there.
        written = (rows[:, None], slice(None), positions.clamp(max=cache.size - 1))
        return self._hidden(tokens, positions, lambda layer: CachedLayer(
            cache.keys[layer], cache.values[layer], written, read, bias, self.cached_attention))

    def _hidden(self, tokens, positions, layout_of: Callable[[int], Any]):
        """tokens [B, T], positions [B or 1, T] -> hidden states after the last norm [B, T, D].

        layout_of: the number of a layer -> what its queries see.
        """
        x = self.model.embed_tokens(tokens)                                           # [B, T, D]
        angles = positions[:, None, :, None] * rope_frequencies(self.config, x.device)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)        # [B or 1, 1, T, E/2]
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)      # [..., E]
        rotation, none = (cos, sin), (torch.ones_like(cos), torch.zeros_like(sin))
        for number, block in enumerate(self.model.layers):
            chosen = none if number in self.config.nope_layers else rotation
            x = block(x, *chosen, layout_of(number))
        return self.model.norm(x)


# --------------------------------------------------------------------------------------------------
# Log-probabilities

def head_product(head: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """head [V, D] -> the function hidden [..., D] -> logits [..., V].

    Products of bfloat16 are summed and left in float32. A logit of 20 rounded to bfloat16 is off by
    up to 1/16. The sampler and the trainer compute slightly different hidden states, so they would
    round some logits to different sides.
    """
    if head.dtype.itemsize >= 4:
        return lambda hidden: F.linear(hidden, head)
    if head.is_cuda and not torch.is_grad_enabled():
        return lambda hidden: torch.mm(hidden.flatten(0, -2), head.T, out_dtype=torch.float32
                                       ).unflatten(0, hidden.shape[:-1])
    # The product above has neither a kernel for CPUs nor a derivative. The copy of the head holds
    # V·D numbers, which is about as many as a chunk of logits.
    return wide_product(head)


def _statistics(logits, targets):
    """[n, V] and [n] -> log π(target), the entropy, and the log of the sum of exp(logit): [n]."""
    most = logits.amax(-1, keepdim=True)                                                   # [n, 1]
    exponentials = logits.sub(most).exp_()                                                 # [n, V]
    z = exponentials.sum(-1)                                                               # [n]
    log_z = most[:, 0] + z.log()
    logprobs = logits.gather(-1, targets[:, None])[:, 0] - log_z
    return logprobs, log_z - exponentials.mul_(logits).sum(-1) / z, log_z


def _logit_gradient(temperature, g_entropy, result, logits, targets, log_z, entropy, g):
    """Writes the gradient of the logits [n, V] into `result`, and overwrites them.

    g: the gradient of the log-probabilities, [n]; g_entropy: that of the entropies, or None.
    """
    # ∂ log π(t) / ∂ logit is [the logit is that of t] − π; ∂ H / ∂ logit is −π·(log π + H).
    log_p = logits.div_(temperature).sub_(log_z[:, None])                                  # [n, V]
    weight = -g[:, None]
    if g_entropy is not None:
        weight = (log_p + entropy[:, None]).mul_(-g_entropy[:, None]).add_(weight)
    d = log_p.exp_().mul_(weight).scatter_add_(1, targets[:, None], g[:, None])
    torch.div(d, temperature, out=result)


class _ChunkedLogprobs(torch.autograd.Function):
    """hidden [N, D], head [V, D], targets [N] -> log-probabilities and entropies, [N] float32 each.

    Only a chunk of logits exists at a time. The backward pass computes each chunk again and adds to
    one gradient of the head, where autograd would hold one for each chunk. A gradient flows through
    the entropies only if entropy_gradient is set.
    """

    @staticmethod
    def forward(ctx, hidden, head, targets, temperature, chunk_size, entropy_gradient):
        ctx.temperature, ctx.chunk_size = temperature, chunk_size
        ctx.entropy_gradient = entropy_gradient
        # Positions whose softmax is computed at a time: on a CPU few, so that its caches hold them.
        cpu = head.device.type == "cpu"
        ctx.rows = rows = max(1, LOGITS_IN_CACHES // len(head)) if cpu else chunk_size
        pieces, product = [], head_product(head)
        for h, t in zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True):
            pieces += [_statistics(logits.div_(temperature), part) for logits, part in zip(
                product(h).float().split(rows), t.split(rows), strict=True)]
        logprobs, entropy, log_z = (torch.cat(piece) for piece in zip(*pieces, strict=True))   # [N]
        ctx.save_for_backward(hidden, head, targets, log_z, entropy)
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, *gradients):
        hidden, head, targets, log_z, entropy = ctx.saved_tensors
        grad_hidden, grad_head = torch.empty_like(hidden), torch.zeros_like(head)
        product = head_product(head)
        chunks = (each.split(ctx.chunk_size)
                  for each in (hidden, targets, log_z, entropy, *gradients, grad_hidden))
        for h, *of_positions, out in zip(*chunks, strict=True):
            logits = product(h).float()                                                    # [n, V]
            d = logits if head.dtype == logits.dtype else torch.empty_like(logits, dtype=head.dtype)
            parts = [each.split(ctx.rows) for each in (d, logits, *of_positions)]
            for *part, g_entropy in zip(*parts, strict=True):
                _logit_gradient(ctx.temperature, g_entropy if ctx.entropy_gradient else None, *part)
            del logits, parts, part
            torch.mm(d, head, out=out)
            grad_head.addmm_(d.T, h)
            del d   # before the next chunk of logits
        return grad_hidden, grad_head, None, None, None, None


def _chunked_logprobs(hidden, head, targets, temperature, chunk_size, entropy_gradient):
    # At least four chunks, so that a small batch too never holds all its logits at once.
    chunk_size = max(1, min(chunk_size, -(-len(targets) // 4)))
    return _ChunkedLogprobs.apply(hidden, head, targets, temperature, chunk_size, entropy_gradient)


def to_rows(mask, *flat):
    """Scatters values to the True places of mask [B, T], row by row: [B, T] each, 0 elsewhere."""
    return tuple(each.new_zeros(mask.shape).masked_scatter(mask, each) for each in flat)


def token_logprobs(model: Transformer, tokens: torch.Tensor, temperature: float = 1.0,
                   mask: torch.Tensor | None = None, chunk_size: int = LOGITS_CHUNK,
                   return_entropy: bool = False) -> Any:
    """log π(token_{t+1} | tokens_{≤t}) for t = 0 … T-2, with gradient, never holding [B, T, V].

    tokens: [B, T] int64, padded on the right with any id. temperature: that of the distribution
    sampled from. mask: [B, T-1] bool; positions outside it (prompts, padding) are not computed and
    come out as 0. chunk_size: positions whose logits exist at the same time.
    Returns [B, T-1] float32, and with return_entropy also the entropy of each of these
    distributions (nats, detached). Raises ValueError for fewer than two positions or a temperature
    that is not above 0.
    """
    if tokens.shape[1] < 2 or not temperature > 0:
        raise ValueError(f"token_logprobs needs at least 2 positions and a temperature above 0, "
                         f"not {tokens.shape[1]} and {temperature}")
    logprobs, entropy = model(tokens[:, :-1], tokens[:, 1:], temperature=temperature, mask=mask,
                              chunk_size=chunk_size)
    return (logprobs, entropy) if return_entropy else logprobs


def pack(prompts: list[list[int]], responses: list[list[int]],
         device: str | torch.device = "cpu") -> Packing:
    """Lays out sequences for training; consecutive rows with the same prompt share its positions.

    The last token of a response is predicted but predicts nothing, so it has no position. Raises
    ValueError for an empty prompt or response.
    """
    tokens, positions, rows, predicting, prompt, begin = [], [], [], [], [], 0
    for i, (new, response) in enumerate(zip(prompts, responses, strict=True)):
        if not len(new) or not len(response):
            raise ValueError(f"row {i} has a prompt of {len(new)} tokens and a response of "
                             f"{len(response)}: both need one")
        if new != prompt:
            prompt, begin = new, len(tokens)
            tokens += prompt
            positions += range(len(prompt))
        start = len(tokens)
        tokens += response[:-1]
        positions += range(len(prompt), len(prompt) + len(response) - 1)
        rows.append([*range(begin, begin + len(prompt)), *range(start, len(tokens))])
        predicting += rows[-1][len(prompt) - 1:]
    buckets, sources, cells, width = [], [0] * len(tokens), 0, 0
    for row in sorted(rows, key=len, reverse=True):
        if not buckets or len(row) < 0.75 * width:
            buckets.append([])
            width = len(row)
        for cell, index in enumerate(row, cells):
            sources[index] = cell
        buckets[-1].append(row + [row[-1]] * (width - len(row)))
        cells += width
    device = torch.device(device)

    def tensor(numbers: list) -> torch.Tensor:
        return to_device(torch.tensor(numbers), device)

    lengths = tensor([len(response) for response in responses])
    return Packing(tensor([tokens]), tensor([positions]), [tensor(bucket) for bucket in buckets],
                   tensor(sources), tensor(predicting),
                   tensor([token for response in responses for token in response]),
                   torch.arange(max(map(len, responses)), device=device) < lengths[:, None],
                   cells - sum(map(len, rows)), sum(map(len, rows)) - len(tokens))


def response_logprobs(model: Transformer, packing: Packing, temperature: float = 1.0,
                      chunk_size: int = LOGITS_CHUNK, entropy_gradient: bool = False,
                      gradient: bool = True):
    """log π(response token | prompt, response before it), with gradient, and the entropies.

    The entropies are those of the same distributions, in nats, with a gradient only if
    entropy_gradient is set. Both are [B, R] float32, 0 behind a response, and equal to what
    token_logprobs computes apart from rounding. temperature: that of the distribution sampled from,
    above 0. chunk_size: positions whose logits exist at the same time. gradient: False computes
    none, and takes less time and memory.
    """
    with torch.set_grad_enabled(gradient and torch.is_grad_enabled()):
        return to_rows(packing.mask, *model(packing, temperature=temperature, chunk_size=chunk_size,
                                            entropy_gradient=entropy_gradient))


# --------------------------------------------------------------------------------------------------
# Hugging Face folders

def load_model(path: str | Path, device: str | torch.device = "cpu", dtype=torch.float32,
               shard: Callable[[Transformer], Any] = lambda model: None):
    """Reads a Hugging Face folder or hub name: (Transformer, tokenizer).

    device: on "meta" the weights are neither downloaded nor read. shard: may shard the model, which
    is still empty; then each process reads its own part of the weights alone.
    Raises ValueError for a folder without config.json, weights or tokenizer, another architecture,
    a quantised model, a setting that is not supported, and a tensor that is missing, left over or
    of another shape than config.json says; the message names it.
    """
    weights = str(device) != "meta"
    folder = find_folder(str(path), weights)
    hf_config = read_config(folder)
    with torch.device("meta"):
        model = Transformer(ModelConfig.from_hf(hf_config)).to(dtype)
    shard(model)
    if weights:
        wanted = dict(model.named_parameters())
        tensors = read_tensors(folder, wanted, model.config.tie_embeddings, device, dtype)
        model.load_state_dict({name: nn.Parameter(sharded_like(wanted[name], tensor))
                               for name, tensor in tensors.items()}, assign=True)
    tokenizer = read_tokenizer(folder)
    model.hf_config = hf_config
    if (folder / "generation_config.json").is_file():
        model.generation_config = read_object(folder / "generation_config.json")
    # Chat models often end a turn with another token than a text; generation_config.json has both.
    stops = (model.generation_config or {}).get("eos_token_id", hf_config.eos_token_id)
    stops = set(stops if isinstance(stops, list) else [stops]) | {tokenizer.eos_token_id}
    stops -= {None}
    if not all(isinstance(stop, int) for stop in stops):
        raise ValueError(f"{folder}: eos_token_id must be a token id or several, not {stops}")
    model.stop_ids = tuple(sorted(stops))
    return model, tokenizer


def save_model(model: Transformer, tokenizer, path: str | Path) -> None:
    """Writes a Hugging Face folder, with the weights in the model's dtype; it is whole or absent.

    Every process must call this; rank 0 writes. Raises ValueError if `path` exists or the model
    came from no folder.
    """
    path = Path(path)
    if path.exists():
        raise ValueError(f"{path} exists already; give a new path")
    if model.hf_config is None:
        raise ValueError("the model has no hf_config to write as config.json; load_model sets it")
    barrier()   # every process looks at `path` before rank 0 writes
    tensors = {}
    for name, parameter in model.named_parameters():
        full = full_tensor(parameter)   # a collective: every process takes part
        if is_main():
            tensors[name] = full.detach().to("cpu", copy=True)   # a view of a larger storage
    if is_main():
        generation = dict(model.generation_config or {})
        if model.stop_ids:   # `generate` ends at no others
            generation["eos_token_id"] = list(model.stop_ids)
        write_folder(path, tensors, model.hf_config, generation, tokenizer)
    barrier()
