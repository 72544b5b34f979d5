"""Batched sampling with a key-value cache. Knows token ids and nothing of text.

    completions = generate(model, prompts, n=8, max_new_tokens=1024, stop_ids=model.stop_ids, seed=0)

The n responses to a prompt share its prefill. The model is the one that trains, so the log-probabilities returned here
are the old log-probabilities of the objective; no second pass is needed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from model_utils import KVCache, Transformer


@dataclass
class Completion:
    tokens: list[int]        # the stop id included
    logprobs: list[float]    # of each token, under the distribution it was sampled from
    finished: bool           # True: ended by a stop id; False: cut at max_new_tokens


@torch.no_grad()
def generate(model: Transformer, prompts: list[list[int]], *, n: int = 1, max_new_tokens: int,
             temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, stop_ids: Sequence[int] = (), seed: int = 0,
             stream_ids: Sequence[int] | None = None, max_batch: int = 256,
             progress: Callable[[int], None] | None = None) -> list[Completion]:
    """Sample n completions of each prompt; they come n consecutive per prompt, in the order of the prompts.

    temperature: 0 is greedy (then every log-probability is 0: the distribution sampled from is a point).
    top_k: 0 keeps the whole vocabulary, else only the k likeliest tokens. top_p: of those, the smallest set of
        likeliest tokens whose probability reaches top_p.
    seed, stream_ids: every random number is a function of (seed, the prompt's stream id, sample, position), so what is
        sampled does not depend on which other prompts, batches or processes there are. stream_ids: one integer per
        prompt, by default its index.
    max_batch: sequences sampled at the same time.
    progress: called with the number of sequences that have just ended.
    Raises ValueError for prompts, lengths or sampling settings that make no sense, with the numbers.
    """
    _check(model, prompts, n, max_new_tokens, temperature, top_p, top_k, stream_ids, max_batch)
    streams = range(len(prompts)) if stream_ids is None else stream_ids
    sequences = [(p, s) for p in range(len(prompts)) for s in range(n)]
    # Prompts of like length go together, so that little of the cache is padding.
    order = sorted(range(len(sequences)), key=lambda i: len(prompts[sequences[i][0]]))
    completions: list[Completion] = [None] * len(sequences)
    for start in range(0, len(order), max_batch):
        chosen = order[start:start + max_batch]
        batch = _generate_batch(model, prompts, [sequences[i] for i in chosen],
                                [_stream_key(seed, streams[sequences[i][0]], sequences[i][1]) for i in chosen],
                                max_new_tokens, temperature, top_p, top_k, stop_ids, progress)
        for i, completion in zip(chosen, batch):
            completions[i] = completion
    return completions


def _check(model, prompts, n, max_new_tokens, temperature, top_p, top_k, stream_ids, max_batch):
    for name, value, least in (("n", n, 1), ("max_new_tokens", max_new_tokens, 1), ("max_batch", max_batch, 1),
                               ("top_k", top_k, 0), ("temperature", temperature, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, not {value}")
    if not math.isfinite(temperature):
        raise ValueError(f"temperature must be a finite number, not {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, not {top_p}")
    if stream_ids is not None and len(stream_ids) != len(prompts):
        raise ValueError(f"{len(stream_ids)} stream_ids for {len(prompts)} prompts: give one each")
    vocab, room = model.config.vocab_size, model.config.max_position - max_new_tokens
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {i} is empty: there is nothing to continue")
        if len(prompt) > room:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens; with max_new_tokens={max_new_tokens} the model's "
                             f"{model.config.max_position} positions leave room for {max(room, 0)}")
        if min(prompt) < 0 or max(prompt) >= vocab:
            raise ValueError(f"prompt {i} has token ids from {min(prompt)} to {max(prompt)}; "
                             f"the vocabulary is 0 to {vocab - 1}")


def _generate_batch(model, prompts, sequences, keys, max_new_tokens, temperature, top_p, top_k, stop_ids, progress):
    device = model.device
    # Prefill each prompt once, then give each of its samples a copy of its cache row.
    unique = sorted({p for p, _ in sequences})
    lengths = torch.tensor([len(prompts[p]) for p in unique], device=device)
    padded = torch.zeros(len(unique), int(lengths.max()), dtype=torch.long)
    for row, p in enumerate(unique):
        padded[row, :len(prompts[p])] = torch.tensor(prompts[p])
    size = padded.shape[1] + max_new_tokens
    cache = KVCache(model.config, len(unique), size, device, model.dtype)
    logits = model(padded.to(device), cache=cache, lengths=lengths)                               # [unique, V]
    rows = torch.tensor([unique.index(p) for p, _ in sequences], device=device)
    cache.select(rows)
    logits = logits[rows]                                                                         # [B, V]

    keys = torch.tensor(keys, device=device)                                                      # [B]
    stops = torch.tensor(list(stop_ids), device=device, dtype=torch.long)
    alive = torch.arange(len(sequences), device=device)     # the sequence that each row of the batch belongs to
    done = torch.zeros(len(alive), dtype=torch.bool, device=device)                               # [B]
    tokens = torch.zeros(len(alive), max_new_tokens, dtype=torch.long, device=device)             # [all, new]
    logprobs = torch.zeros(len(alive), max_new_tokens, device=device)
    counts = torch.zeros(len(alive), dtype=torch.long, device=device)
    finished = torch.zeros(len(alive), dtype=torch.bool, device=device)
    for position in range(max_new_tokens):
        chosen, chosen_logprobs = sample(logits, temperature, top_p, top_k, uniform(keys, position))
        live = alive[~done]
        tokens[live, position], logprobs[live, position] = chosen[~done], chosen_logprobs[~done]
        counts[live] += 1
        stopped = torch.isin(chosen, stops) & ~done
        finished[alive[stopped]] = True
        done |= stopped
        left = len(done) - int(done.sum())
        if progress and int(stopped.sum()):
            progress(int(stopped.sum()))
        if left == 0 or position == max_new_tokens - 1:
            if progress and left:
                progress(left)
            break
        if left <= 0.75 * len(done):   # shrink the batch to the rows still going, when it saves more than it copies
            kept = (~done).nonzero()[:, 0]
            cache.select(kept)
            alive, keys, chosen, done = alive[kept], keys[kept], chosen[kept], done[kept]
        logits = model(chosen[:, None], cache=cache, lengths=1, span=padded.shape[1] + position + 1)
    tokens, logprobs, counts, finished = tokens.tolist(), logprobs.tolist(), counts.tolist(), finished.tolist()
    return [Completion(tokens[i][:counts[i]], logprobs[i][:counts[i]], finished[i]) for i in range(len(sequences))]


def sample(logits: torch.Tensor, temperature: float, top_p: float, top_k: int, uniforms: torch.Tensor):
    """One token a row: logits [B, V], uniforms [B] in [0, 1) -> tokens [B], their log-probabilities [B] float32.

    By inversion: the first token at which the cumulative probability passes the uniform number.
    """
    if temperature == 0:
        return logits.argmax(-1), torch.zeros(len(logits), device=logits.device)
    logprobs = (logits.float() / temperature).log_softmax(-1)
    if top_k or top_p < 1:
        ranked, ids = logprobs.sort(dim=-1, descending=True, stable=True)
        if top_k:
            ranked[:, top_k:] = -torch.inf
        if top_p < 1:
            probs = ranked.softmax(-1)
            ranked[probs.cumsum(-1) - probs >= top_p] = -torch.inf   # the likelier tokens alone reach top_p
        logprobs = torch.full_like(logprobs, -torch.inf).scatter(-1, ids, ranked).log_softmax(-1)
    cumulative = logprobs.double().exp().cumsum(-1)                                               # [B, V]
    targets = uniforms[:, None] * cumulative[:, -1:]   # scaled to the sum, which rounding keeps from being exactly 1
    tokens = torch.searchsorted(cumulative, targets, right=True).clamp(max=logits.shape[-1] - 1)  # [B, 1]
    return tokens[:, 0], logprobs.gather(-1, tokens)[:, 0]


# ---------------------------------------------------------------------------------------------------------------------
# Random numbers by counting: the finaliser of splitmix64 (Steele, Lea, Flood, 2014) over the key of a sequence and the
# position in it. Any number can be had without the ones before it.

_GOLDEN, _MIX_1, _MIX_2, _64_BITS = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, (1 << 64) - 1


def _signed(x: int) -> int:
    """The int64 with the same 64 bits: tensors hold signed integers, and their products wrap as unsigned ones do."""
    return (x & _64_BITS) - (1 << 64) * ((x >> 63) & 1)


def _stream_key(*parts: int) -> int:
    """One int64 from (seed, stream id, sample)."""
    key = 0
    for part in parts:
        key = (key + int(part) + 1) * _GOLDEN & _64_BITS
        key = (key ^ key >> 30) * _MIX_1 & _64_BITS
        key = (key ^ key >> 27) * _MIX_2 & _64_BITS
        key ^= key >> 31
    return _signed(key)


def uniform(keys: torch.Tensor, position: int) -> torch.Tensor:
    """keys [B] int64 -> [B] float64 in [0, 1), 32 random bits each."""
    x = keys + _signed(_GOLDEN * (position + 1))
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * _signed(_MIX_1)    # the masks make the shifts of signed numbers logical
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * _signed(_MIX_2)
    return ((x ^ (x >> 31 & (1 << 33) - 1)) >> 32 & 0xFFFFFFFF).double() / 2 ** 32
