"""A decoder-only Transformer (Llama, Qwen2, Qwen3) that samples and trains with the same weights and the same code.

    model, tokenizer = load_model("Qwen/Qwen3-1.7B")          # or any Hugging Face folder
    logits = model(tokens)                                    # [B, T] -> [B, T, V]
    logprobs = token_logprobs(model, tokens)                  # [B, T] -> [B, T-1], never holding [B, T, V]
    packing = pack(prompts, responses)                        # for training: no padding, and each prompt once
    logprobs, entropy = response_logprobs(model, packing)     # [B, R] each
    save_model(model, tokenizer, "my-model")                  # transformers and vLLM load it

Parameter names are those of Hugging Face checkpoints, so that reading and writing one renames nothing. The model knows
nothing of distribution: `shard` applies FSDP2 from outside and `gather_model` undoes it for sampling.

Shapes: B sequences, T positions, V vocabulary, D hidden size, H query heads, K key-value heads, G = H/K, E head size;
of packed sequences N positions, M response tokens, R of these in the longest response.
"""

import contextlib
import functools
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

from distributed import barrier, full_tensor, is_main

FAMILIES = ("llama", "qwen2", "qwen3")


# ---------------------------------------------------------------------------------------------------------------------
# Configuration

@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency scaling: long wavelengths are stretched by `factor`, short ones kept, those between blended."""
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

    @classmethod
    def from_hf(cls, hf) -> "ModelConfig":
        """Read a transformers config. Raises ValueError, naming the setting, for whatever this Transformer does not do."""
        if hf.model_type not in FAMILIES:
            raise ValueError(f"architecture {hf.model_type!r} is not supported; supported: {', '.join(FAMILIES)}")
        if getattr(hf, "quantization_config", None):
            raise ValueError("the model is quantised (config.json has quantization_config); give the unquantised one")
        if hf.hidden_act != "silu":
            raise ValueError(f"hidden_act {hf.hidden_act!r} is not supported; supported: 'silu'")
        if getattr(hf, "use_sliding_window", False):
            raise ValueError("use_sliding_window: true is not supported; supported: full attention in every layer")
        # transformers 5 keeps every RoPE setting in rope_parameters, transformers 4 in rope_theta and rope_scaling.
        rope = getattr(hf, "rope_parameters", None) or getattr(hf, "rope_scaling", None) or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in ("default", "llama3"):
            raise ValueError(f"rope_type {rope_type!r} is not supported; supported: 'default', 'llama3'")
        scaling = None
        if rope_type == "llama3":
            scaling = RopeScaling(rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"],
                                  rope["original_max_position_embeddings"])
        attention_bias = getattr(hf, "attention_bias", False)
        return cls(
            vocab_size=hf.vocab_size, hidden_size=hf.hidden_size, intermediate_size=hf.intermediate_size,
            num_layers=hf.num_hidden_layers, num_heads=hf.num_attention_heads,
            num_kv_heads=hf.num_key_value_heads or hf.num_attention_heads,
            head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
            norm_eps=hf.rms_norm_eps, rope_theta=rope.get("rope_theta") or getattr(hf, "rope_theta", None) or 10_000.0,
            rope_scaling=scaling, max_position=hf.max_position_embeddings, tie_embeddings=hf.tie_word_embeddings,
            qkv_bias=hf.model_type == "qwen2" or attention_bias, out_bias=hf.model_type != "qwen2" and attention_bias,
            mlp_bias=getattr(hf, "mlp_bias", False), qk_norm=hf.model_type == "qwen3")


# ---------------------------------------------------------------------------------------------------------------------
# The Transformer

@functools.lru_cache
def rope_frequencies(config: ModelConfig, device: torch.device) -> torch.Tensor:
    """Angular frequency of each pair of head dimensions, radians per position: [E/2] float32."""
    exponents = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta ** exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    # Turns made within the original context decide: few turns are stretched, many kept, in between linear in the turns.
    turns = scaling.original_max_position * frequencies / (2 * math.pi)
    keep = ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / scaling.factor)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x [B, heads, T, E], pairs being (i, i + E/2). cos and sin: [B, 1, T, E], the latter with a minus
    in its first half."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class KVCache:
    """Keys and values of `slots` sequences of up to `size` positions, for every layer, allocated once.

    It holds nothing but numbers: how much of a slot is in use is for its user to know, and what lies beyond that is
    overwritten before it is ever attended to."""

    def __init__(self, config: ModelConfig, slots: int, size: int, device, dtype):
        self.size = size
        shape = (slots, config.num_kv_heads, size, config.head_dim)   # [slots, K, S, E] for each layer
        # Zeros, since NaN would spread from behind the mask; a tensor a layer, since torch.compile copies what is a part.
        self.keys, self.values = ([torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]
                                  for _ in range(2))

    def copy(self, sources: torch.Tensor, targets: torch.Tensor, length: int) -> None:
        """The first `length` positions of some slots into as many others."""
        for cached in (*self.keys, *self.values):
            cached[targets, :, :length] = cached[sources, :, :length]

    @staticmethod
    def bytes_per_slot(config: ModelConfig, size: int, dtype: torch.dtype) -> int:
        return 2 * config.num_layers * config.num_kv_heads * size * config.head_dim * dtype.itemsize


class Linear(nn.Linear):
    packed: Callable | None = None   # see pack_weights

    def forward(self, x):
        return self.packed(x) if self.packed else F.linear(x, self.weight, self.bias)


def products(x, *linears: Linear):
    """What each of these layers makes of x."""
    if linears[0].packed:
        return linears[0](x).split([linear.out_features for linear in linears], dim=-1)
    return [linear(x) for linear in linears]


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        c = self.config = config
        self.q_proj = Linear(c.hidden_size, c.num_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = Linear(c.num_heads * c.head_dim, c.hidden_size, bias=c.out_bias)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x, cos, sin, context=None):
        """x [B, T, D] -> [B, T, D]. `context`: None for whole sequences; a Packing; or this layer's keys and values and the
        places in them, see Transformer.extend."""
        c, (B, T, _) = self.config, x.shape
        q, k, v = (y.unflatten(-1, (-1, c.head_dim)) for y in products(x, self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (y.transpose(1, 2) for y in (self.q_norm(q), self.k_norm(k), v))                # [B, H or K, T, E]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        causal = functools.partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=c.num_kv_heads < c.num_heads)
        packed, bias = isinstance(context, Packing), None
        if context is not None and not packed:
            keys, values, written, read, bias = context                                           # [slots, K, S, E]
            keys[written], values[written] = k.transpose(1, 2), v.transpose(1, 2)
        if packed:
            outs = []
            for rows in context.buckets:                                                          # [b, t]
                laid_out = (x[0].transpose(0, 1).index_select(0, rows.flatten()).unflatten(0, rows.shape).transpose(1, 2)
                            for x in (q, k, v))                                                   # [b, H or K, t, E]
                outs.append(causal(*laid_out).transpose(1, 2).flatten(0, 1))                      # [b·t, H, E]
            out = torch.cat(outs).index_select(0, context.sources)                                # [T, H, E]
        elif bias is None:   # whole sequences, padded on the right: causal attention never looks at the padding
            out = causal(q, k, v).transpose(1, 2)                                                 # [B, T, H, E]
        else:   # new positions and what the cache held: the G query heads of a group ask the same keys, as queries of one
            q = q.reshape(B, c.num_kv_heads, -1, c.head_dim)                                      # [B, K, G·T, E]
            out = F.scaled_dot_product_attention(q, keys[read], values[read], attn_mask=bias)     # [B, K, span, E] read
            out = out.view(B, c.num_heads, T, c.head_dim).transpose(1, 2)
        return self.o_proj(out.reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x):
        gate, up = products(x, self.gate_proj, self.up_proj)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, context=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, context)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """`config` gives the shape; `hf_config`, `generation_config` and `stop_ids` come from the folder it was read from."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Block(config) for _ in range(config.num_layers)),
            "norm": RMSNorm(config.hidden_size, config.norm_eps)})
        if not config.tie_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.packed_head: Callable | None = None   # see pack_weights
        self.hf_config = None
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
        return self.model.embed_tokens.weight if self.config.tie_embeddings else self.lm_head.weight

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., V]"""
        return self.packed_head(hidden) if self.packed_head else F.linear(hidden, self.head)

    def forward(self, tokens, targets=None, *, temperature: float = 1.0, mask=None, chunk_size: int = 1024):
        """Both uses of the pass that trains go through `forward`, so that FSDP's hooks see each of them.

        - forward(tokens): [B, T] int64 -> logits [B, T, V].
        - forward(tokens, targets): -> (log π(target | tokens up to it), entropy in nats), both [B, T] float32,
          0 where `mask` [B, T] is False; see `token_logprobs`.
        - forward(packing): -> the same, both [M], of the response tokens in the order of the rows.
        """
        if isinstance(tokens, Packing):
            hidden = self._hidden(tokens.tokens, tokens.positions, [tokens] * self.config.num_layers)[0]   # [N, D]
            return _chunked_logprobs(hidden.index_select(0, tokens.predicting), self.head, tokens.targets, temperature,
                                     chunk_size)
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]                     # [1, T]
        x = self._hidden(tokens, positions, [None] * self.config.num_layers)
        if targets is None:
            return self.logits(x)
        mask = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask.bool()
        return spread_out(mask, *_chunked_logprobs(x[mask], self.head, targets[mask], temperature, chunk_size))

    def extend(self, tokens, cache: KVCache, slots=None, starts=None, span: int | None = None) -> torch.Tensor:
        """The pass that samples: append tokens [B, T] to slots of the cache, and return the hidden states after them,
        [B, T, D]. It does without FSDP's hooks; the model must be whole, see `gather_model`.

        slots: [B]; None is the first B, which are read where they lie. starts: [B], the positions that each slot holds
        already; None where they are empty. Padding on the right of a row is written behind its end, and overwritten by
        what comes there. span: a bound on the positions in use afterwards, so that a long cache costs no more than what
        it holds.
        """
        (B, T), device = tokens.shape, tokens.device
        rows = torch.arange(B, device=device) if slots is None else slots
        positions, bias = torch.arange(T, device=device).expand(B, T), None
        read = (slice(B) if slots is None else slots, slice(None), slice(span))
        if starts is not None:
            positions = positions + starts[:, None]                                               # [B, T]
            unseen = torch.arange(span or cache.size, device=device) > positions[:, :, None]            # [B, T, span]
            bias = torch.zeros(unseen.shape, device=device, dtype=self.dtype).masked_fill_(unseen, -torch.inf)
            if T > 1:   # once for each of the G query heads of a group
                bias = bias.repeat(1, self.config.num_heads // self.config.num_kv_heads, 1)
            bias = bias[:, None]                                                                  # [B, 1, 1 or G·T, span]
        # No prompt reaches the last position of its slot: padding may fall there.
        written = (rows[:, None], slice(None), positions.clamp(max=cache.size - 1))
        return self._hidden(tokens, positions, [(keys, values, written, read, bias)
                                                for keys, values in zip(cache.keys, cache.values)])

    def _hidden(self, tokens, positions, contexts):
        """tokens [B, T], positions [B or 1, T], what each layer attends in -> hidden states after the last norm [B, T, D]."""
        x = self.model.embed_tokens(tokens)                                                       # [B, T, D]
        angles = positions[:, None, :, None] * rope_frequencies(self.config, x.device)            # [B or 1, 1, T, E/2]
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)                  # [B or 1, 1, T, E]
        for block, context in zip(self.model.layers, contexts):
            x = block(x, cos, sin, context)
        return self.model.norm(x)


class _ChunkedLogprobs(torch.autograd.Function):
    """hidden [N, D], head [V, D], targets [N] -> log-probabilities and entropies, [N] each, softmax in float32.

    Only a chunk of logits exists at a time. The backward pass computes each again, and adds to one gradient of the head
    where autograd would hold one for each chunk. No gradient flows through the entropy, which is a metric."""

    @staticmethod
    def forward(ctx, hidden, head, targets, temperature, chunk_size):
        ctx.temperature, ctx.chunk_size = temperature, chunk_size
        pieces = []
        for h, t in zip(hidden.split(chunk_size), targets.split(chunk_size)):
            logits = F.linear(h, head).float().div_(temperature)                                  # [n, V]
            log_z = logits.logsumexp(-1)
            logprobs = logits.gather(-1, t[:, None])[:, 0] - log_z
            entropy = log_z - (logits.sub(log_z[:, None]).exp_() * logits).sum(-1)
            pieces.append((logprobs, entropy, log_z))
        logprobs, entropy, log_z = (torch.cat(piece) for piece in zip(*pieces))                   # [N] each
        ctx.save_for_backward(hidden, head, targets, log_z)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, head, targets, log_z = ctx.saved_tensors
        grad_hidden, grad_head = torch.empty_like(hidden), torch.zeros_like(head)
        for h, t, z, g, out in zip(*(each.split(ctx.chunk_size) for each in (hidden, targets, log_z, grad, grad_hidden))):
            # ∂ log π(t) / ∂ logit = [it is that of t] − π
            d = F.linear(h, head).float().div_(ctx.temperature).sub_(z[:, None]).exp_().mul_(-g[:, None])
            d = d.scatter_add_(1, t[:, None], g[:, None]).div_(ctx.temperature).to(head.dtype)    # [n, V]
            torch.mm(d, head, out=out)
            grad_head.addmm_(d.T, h)
        return grad_hidden, grad_head, None, None, None


def _chunked_logprobs(hidden, head, targets, temperature, chunk_size):
    # In a small batch too, never all logits at once.
    return _ChunkedLogprobs.apply(hidden, head, targets, temperature, max(1, min(chunk_size, -(-len(targets) // 4))))


def spread_out(mask, *flat):
    """Values in the order of the True places of mask [B, T] -> [B, T] each, 0 elsewhere."""
    return tuple(each.new_zeros(mask.shape).masked_scatter(mask, each) for each in flat)


def token_logprobs(model: Transformer, tokens: torch.Tensor, temperature: float = 1.0, mask: torch.Tensor | None = None,
                   chunk_size: int = 1024, return_entropy: bool = False):
    """log π(token_{t+1} | tokens_{≤t}) for t = 0 … T-2, with gradient, never holding [B, T, V].

    tokens: [B, T] int64, padded on the right with any id. temperature: that of the distribution sampled from.
    mask: [B, T-1] bool; positions outside it are not computed and come out as 0 (prompts and padding).
    chunk_size: positions whose logits exist at the same time.
    Returns [B, T-1] float32, and with return_entropy also the entropy of each of these distributions (nats, detached).
    Raises ValueError for fewer than two positions or a temperature that is not above 0.
    """
    if tokens.shape[1] < 2 or not temperature > 0:
        raise ValueError(f"token_logprobs needs at least 2 positions and a temperature above 0, not {tokens.shape[1]} "
                         f"and {temperature}")
    logprobs, entropy = model(tokens[:, :-1], tokens[:, 1:], temperature=temperature,
                              mask=mask, chunk_size=chunk_size)
    return (logprobs, entropy) if return_entropy else logprobs


class Packing(NamedTuple):
    """Rows of prompt and response in which what several rows begin with is there once. Everything but attention sees the
    N distinct positions one behind the other; attention sees rows, in buckets of like length. M, R: response tokens of all
    rows, and of the longest."""
    tokens: torch.Tensor          # [1, N]
    positions: torch.Tensor       # [1, N], of each in its row
    buckets: list[torch.Tensor]   # [b, t] each: which of the N stands at each place of these rows; padding is any
    sources: torch.Tensor         # [N]: the place in the buckets, one behind the other, whose attention each takes
    predicting: torch.Tensor      # [M]: which of the N predicts each response token
    targets: torch.Tensor         # [M]: the response tokens, in the order of the rows
    mask: torch.Tensor            # [B, R] bool: where they are in the responses
    padding: int                  # places of the buckets that are padding
    shared: int                   # positions that need not be computed, since an earlier row has them


def pack(prompts: list[list[int]], responses: list[list[int]], device="cpu") -> Packing:
    """Lay out sequences for training: rows that follow one another and have the same prompt share its positions.

    The last token of a response is predicted, but predicts nothing, so it has no position. Raises ValueError for an empty
    prompt or response."""
    tokens, positions, rows, predicting, prompt, first = [], [], [], [], None, 0
    for i, (new, response) in enumerate(zip(prompts, responses, strict=True)):
        if not len(new) or not len(response):
            raise ValueError(f"row {i} has a prompt of {len(new)} tokens and a response of {len(response)}: both need one")
        if new != prompt:
            prompt, first = new, len(tokens)
            tokens += prompt
            positions += range(len(prompt))
        start = len(tokens)
        tokens += response[:-1]
        positions += range(len(prompt), len(prompt) + len(response) - 1)
        rows.append([*range(first, first + len(prompt)), *range(start, len(tokens))])
        predicting += rows[-1][len(prompt) - 1:]
    buckets, sources, places = [], [0] * len(tokens), 0
    for row in sorted(rows, key=len, reverse=True):
        if not buckets or len(row) < 0.75 * width:
            buckets.append([])
            width = len(row)
        for place, index in enumerate(row, places):
            sources[index] = place
        buckets[-1].append(row + [row[-1]] * (width - len(row)))
        places += width
    tensor = functools.partial(torch.tensor, device=device)
    lengths = tensor([len(response) for response in responses])
    return Packing(tensor([tokens]), tensor([positions]), [tensor(bucket) for bucket in buckets], tensor(sources),
                   tensor(predicting), tensor([token for response in responses for token in response]),
                   torch.arange(lengths.max(), device=device) < lengths[:, None],
                   places - sum(map(len, rows)), sum(map(len, rows)) - len(tokens))


def response_logprobs(model: Transformer, packing: Packing, temperature: float = 1.0, chunk_size: int = 1024):
    """log π(response token | prompt, response before it), with gradient, and the entropy of each of these distributions
    (nats, detached): both [B, R] float32, 0 behind a response. What token_logprobs computes, but for rounding.

    temperature: that of the distribution sampled from, above 0. chunk_size: positions whose logits exist at the same time.
    """
    return spread_out(packing.mask, *model(packing, temperature=temperature, chunk_size=chunk_size))


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face folders

def find_folder(path: str) -> Path:
    """The local folder of a model given as a folder or as a hub name. Raises ValueError where there is neither."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]))
    except Exception as error:
        raise ValueError(f"no model at {path!r}: it is not a folder here, and the Hugging Face hub did not give one "
                         f"of that name ({_brief(error)})") from error


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]


def load_model(path: str, device="cpu", dtype=torch.float32):
    """Read a Hugging Face folder or hub name: (Transformer, tokenizer).

    Raises ValueError for another architecture, a quantised model, a setting that is not supported, a tensor that is
    missing, left over or of another shape than config.json says; the message names it.
    """
    folder = find_folder(str(path))
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: not a Hugging Face model folder")
    with _naming(folder / "config.json"):
        family = json.loads((folder / "config.json").read_text()).get("model_type")
    if family not in FAMILIES:   # before AutoConfig, which may not know it or may run code from the folder
        raise ValueError(f"{folder}: architecture {family!r} is not supported; supported: {', '.join(FAMILIES)}")
    with _naming(folder / "config.json"):
        hf_config = AutoConfig.from_pretrained(folder)
        config = ModelConfig.from_hf(hf_config)
    with torch.device("meta"):
        model = Transformer(config)
    model.load_state_dict(_read_tensors(folder, model, device, dtype), assign=True)
    with _naming(f"the tokenizer of {folder}"):   # without files transformers would make up an empty one
        if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            raise ValueError("there is no tokenizer.json, tokenizer.model or vocab.json")
        tokenizer = AutoTokenizer.from_pretrained(folder)
    model.hf_config = hf_config
    if (folder / "generation_config.json").is_file():
        model.generation_config = json.loads((folder / "generation_config.json").read_text())
    # Chat models often end a turn with another token than a text; generation_config.json lists both.
    stops = (model.generation_config or {}).get("eos_token_id", hf_config.eos_token_id)
    stops = set(stops if isinstance(stops, list) else [stops]) | {tokenizer.eos_token_id}
    model.stop_ids = tuple(sorted(stops - {None}))
    return model, tokenizer


@contextlib.contextmanager
def _naming(what):
    """Whatever goes wrong with a file becomes a ValueError that names it: the libraries' errors are of many kinds."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {error if type(error) is ValueError else _brief(error)}") from error


def _read_tensors(folder: Path, model: Transformer, device, dtype) -> dict[str, torch.Tensor]:
    wanted = {name: parameter.shape for name, parameter in model.named_parameters()}
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no .safetensors file; convert the model with transformers' save_pretrained")
    tensors, left_over, copies = {}, [], []
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} is missing, though model.safetensors.index.json lists it")
        with _naming(file), safe_open(file, framework="pt") as reader:
            for name in reader.keys():
                if name.endswith("inv_freq"):   # RoPE frequencies, which old Llama checkpoints carry
                    continue
                if name == "lm_head.weight" and model.config.tie_embeddings:
                    copies.append(reader.get_tensor(name))
                elif name not in wanted:
                    left_over.append(name)
                else:
                    tensor = reader.get_tensor(name)
                    if tensor.shape != wanted[name]:
                        raise ValueError(f"tensor {name} has shape {list(tensor.shape)}, "
                                         f"config.json says {list(wanted[name])}")
                    # A copy, or one tensor would hold the mapped file, and all of it, in memory.
                    tensors[name] = nn.Parameter(tensor.to(device=device, dtype=dtype, copy=True))
    missing = sorted(wanted.keys() - tensors.keys())
    for problem, names in (("lacks", missing), ("has, beyond what config.json says,", left_over)):
        if names:
            raise ValueError(f"{folder} {problem} {len(names)} tensor{'s' * (len(names) > 1)}: {', '.join(names[:5])}"
                             + (", …" if len(names) > 5 else ""))
    for head in copies:   # harmless as long as it is a second copy of the embeddings
        if not torch.equal(head.to(device=device, dtype=dtype), tensors["model.embed_tokens.weight"]):
            raise ValueError(f"{folder}: config.json ties the embeddings, but lm_head.weight is another tensor; "
                             f"set tie_word_embeddings to false to use it")
    return tensors


def save_model(model: Transformer, tokenizer, path: str) -> None:
    """Write a Hugging Face folder: config.json, tokenizer, safetensors of at most 5 GB each, in the model's dtype.

    It is written aside and then renamed, so a folder at `path` is always whole. With several processes every one must
    call this; rank 0 writes. Raises ValueError if `path` exists.
    """
    path = Path(path)
    if path.exists():
        raise ValueError(f"{path} exists already; give a new path")
    if model.hf_config is None:
        raise ValueError("the model has no hf_config to write as config.json; load_model sets it")
    barrier()   # every process has looked before rank 0 writes
    state = {}
    for name, parameter in model.named_parameters():
        full = full_tensor(parameter)   # a collective: every rank takes part
        if is_main():
            state[name] = full.detach().to("cpu", copy=True)   # a gathered tensor is a view of a longer storage
    if is_main():
        from huggingface_hub import save_torch_state_dict
        aside = path.with_name(f".{path.name}.partial")
        shutil.rmtree(aside, ignore_errors=True)   # of a save that was killed
        aside.mkdir(parents=True)
        save_torch_state_dict(state, aside)
        # The dtype goes on a copy: the model in memory may be saved again in another.
        hf_config = type(model.hf_config).from_dict(model.hf_config.to_dict())
        hf_config.dtype = model.dtype
        hf_config.save_pretrained(aside)
        if model.generation_config is not None:
            (aside / "generation_config.json").write_text(json.dumps(model.generation_config, indent=2) + "\n")
        tokenizer.save_pretrained(aside)
        aside.rename(path)
    barrier()
