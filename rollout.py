"""Sampling by continuous batching over a static key-value cache. It knows token ids, not text.

    completions = generate(model, prompts, n=8, max_new_tokens=1024, stop_ids=model.stop_ids)

A sequence occupies a slot of the cache. The loop of `generate`:
1. A sequence that has ended leaves its slot to the next one waiting; when none waits, the batch
   shrinks.
2. A new sequence copies the longest prefix that an earlier one has in the cache, and the rest of
   its prompt is prefilled. So the n responses to a prompt prefill it once, and prompts that share
   their demonstrations prefill these once.
3. All slots decode one token, or on a GPU a few tokens, by replaying a CUDA graph.

The model is the one that trains, so the log-probabilities returned here are the old
log-probabilities of the objective; no second pass is needed, unless top_p or top_k cut the
distribution.
"""

import contextlib
import functools
import itertools
import math
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from machine import bucket, faster_sampling, free_memory, make_capture
from memory import PREFILL_POSITIONS, bytes_per_slot, choose_slots
from model_utils import KVCache, ModelConfig, Transformer
from sampling import sample, stream_key, uniform

CHECK_EVERY = 16           # decode steps on a GPU between two checks, which wait for the device
SHARE_AT_LEAST = 32        # positions; copying a shorter common prefix costs more than it saves
StopAt = Callable[[list[int], int], int | None]   # see `generate`


@dataclass
class Completion:
    tokens: list[int]        # the stop id included
    logprobs: list[float]    # of each token, under the distribution it was sampled from
    finished: bool           # True: ended by a stop id or stop_at; False: cut at max_new_tokens


@dataclass
class Work:
    """The cost of rollouts. sequence_steps / slot_steps is the occupancy of the slots."""
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    positions: int = 0           # that went through the model
    wasted_positions: int = 0    # of these, padding and what was decoded behind an end
    sequence_steps: int = 0      # running sequences, added up over decode steps
    slot_steps: int = 0          # slots, no more than there are sequences, times decode steps


@dataclass(eq=False)
class _Sequence:
    index: int                   # its place in the result
    prompt: list[int]
    key: int                     # of its random numbers
    leader: "_Sequence | None"   # the first in the queue that has the same first `shared` tokens
    shared: int                  # tokens to copy from it; all, if both prompts are equal
    slot: int = -1
    count: int = 0               # tokens sampled
    stop_at: "StopAt | None" = None
    seen: list[int] = field(default_factory=list)   # the tokens that stop_at has seen
    stopped: bool = False        # by stop_at


def generate(model: Transformer, prompts: list[list[int]], *, n: int | Sequence[int] = 1,
             max_new_tokens: int, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0,
             stop_ids: Sequence[int] = (), seed: int = 0, stream_ids: Sequence[int] | None = None,
             slots: int = 0, sampler: "Sampler | None" = None,
             progress: Callable[[int, int], None] | None = None,
             on_end: Callable[[int, Completion], None] | None = None,
             stop_at: Sequence[StopAt | None] | None = None) -> list[Completion]:
    """Samples n completions of each prompt; n consecutive ones a prompt, in the prompts' order.

    n: one number, or one for each prompt. max_new_tokens: the longest completion. stop_ids: each of
        these ids ends a completion and is its last token.
    temperature: 0 is greedy; every log-probability is then 0, that of a certain event.
    top_k: 0 keeps the whole vocabulary, else only the k likeliest tokens. top_p: keeps the smallest
        set of likeliest tokens whose probability reaches top_p.
    seed, stream_ids: every random number is a function of (seed, the prompt's stream id, sample,
        position), so other prompts, slots or processes change the result by rounding alone.
        stream_ids: one integer a prompt, by default its index.
    slots: sequences sampled at the same time; 0 lets choose_slots choose. Unused with a sampler.
    sampler: slots to use again, rollout after rollout, instead of new ones. A call that fails or is
        interrupted frees their memory.
    progress: called with the number of sequences that have ended and of tokens sampled since the
        last call.
    on_end: called with (index, completion) when one ends; then none is kept, and the result is
        empty.
    stop_at: for each prompt None, or a function of (the tokens sampled, without a stop id; how many
        of them it has seen before) that returns how many of them end the completion, or None.
    Raises ValueError, with the numbers, for prompts, lengths or settings that make no sense and for
    a cache that does not fit.
    """
    counts = [n] * len(prompts) if isinstance(n, int) else list(n)
    _check(model, prompts, counts, max_new_tokens, temperature, top_p, top_k, stream_ids, slots,
           sampler, stop_at)
    if not prompts:
        return []
    longest = max(map(len, prompts)) + max_new_tokens
    if sampler is None:
        slots = slots or choose_slots(model.config, sum(counts), longest, model.device, model.dtype)
        sampler = Sampler(model.config, min(slots, sum(counts)), longest, model.device, model.dtype)
    streams = range(len(prompts)) if stream_ids is None else stream_ids
    keys = [[stream_key(seed, streams[p], s) for s in range(count)]
            for p, count in enumerate(counts)]
    settings = _Settings(temperature, top_p, top_k, tuple(stop_ids), max_new_tokens)
    waiting: deque[_Sequence] = deque(_queue(prompts, keys, stop_at or [None] * len(prompts)))
    running: list[_Sequence] = []   # running[b] is in slot b
    ended: list[int] = []           # slots, ascending
    completions: dict[int, Completion] = {}
    try:
        usable = min(sampler.slots, len(waiting))
        # A compiled step keeps the addresses of the weights, so they must not move.
        products = contextlib.nullcontext() if sampler.compiled else faster_sampling(model)
        with products, torch.inference_mode():
            sampler.prepare(model, settings, usable, longest)
            while waiting or len(ended) < len(running):
                # The next sequences waiting take the slots of those that have ended.
                free = ended + list(range(len(running), sampler.slots))
                admitted = [waiting.popleft() for _ in range(min(len(free), len(waiting)))]
                for sequence, slot in zip(admitted, free, strict=False):
                    sequence.slot = slot
                    running[slot:slot + 1] = [sequence]
                if admitted:
                    sampler.admit(model, admitted, settings)
                # When none waits, the last sequences move into those slots, so that the batch is
                # always the first slots. This comes after admission, because an admitted sequence
                # may copy its prefix from one that moves.
                moved = {}
                for slot in reversed(ended[len(admitted):]):
                    last = running.pop()
                    moved.pop(len(running), None)   # it may itself have just moved there
                    if slot < len(running):
                        moved[slot] = running[slot] = last
                if moved:
                    sampler.move(moved)
                ended, sampled = sampler.decode(model, running, settings, usable)
                done = [running[slot] for slot in ended]
                for sequence, completion in sampler.collect(done, settings):
                    (on_end or completions.__setitem__)(sequence.index, completion)
                if progress:
                    progress(len(ended), len(admitted) + sampled)
    except BaseException:   # after Ctrl-C, too, nothing stays allocated
        sampler.release()
        raise
    return [completions[index] for index in sorted(completions)]


def _queue(prompts, keys, stop_at) -> list[_Sequence]:
    """The sequences in lexicographic order of their prompts.

    Each gets the longest prefix that an earlier one has. In this order all sequences from a leader
    to its follower begin with what these two share. So the prefix is there to copy when the
    follower is admitted, whichever of them then occupies the leader's slot.
    """
    queue: list[_Sequence] = []
    offsets = list(itertools.accumulate(map(len, keys), initial=0))   # of a prompt's results
    common: list[tuple[int, _Sequence]] = []   # (length, leader): prefixes of the last, ascending
    for p in sorted(range(len(prompts)), key=lambda p: prompts[p]):
        for number, key in enumerate(keys[p]):
            leader, shared = None, 0
            if queue:
                leader, shared = queue[-1], _shared_prefix(queue[-1].prompt, prompts[p])
                while common and common[-1][0] >= shared:
                    leader = common.pop()[1]
                common.append((shared, leader))
            rest = len(prompts[p]) - shared
            # A mask for each position of a long rest behind a prefix would take much memory.
            if rest and shared < SHARE_AT_LEAST or rest > PREFILL_POSITIONS:
                leader, shared = None, 0
            queue.append(_Sequence(offsets[p] + number, prompts[p], key, leader, shared,
                                   stop_at=stop_at[p]))
    return queue


def _shared_prefix(a: list[int], b: list[int]) -> int:
    if a == b:
        return len(a)
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


# --------------------------------------------------------------------------------------------------
# The slots

class _Settings(NamedTuple):
    temperature: float
    top_p: float
    top_k: int
    stop_ids: tuple[int, ...]
    limit: int   # tokens of a response


class Sampler:
    """Slots of a static cache, and the decode step over the first of them.

    On a GPU the tensors keep their addresses from one rollout to the next, so that CUDA graphs may
    refer to them. slots: sequences at the same time, at most. max_length: positions of each, prompt
    and response together, at most. compile: put the decode step through torch.compile. keep: on a
    GPU, hold the model of the graphs, see `prepare`. Raises ValueError, with the numbers, where
    the cache does not fit.
    """
    # `prepare` allocates these and `release` frees them; on a CPU for what a rollout needs alone.
    cache: KVCache
    lengths: torch.Tensor         # [slots] positions in the cache
    tokens: torch.Tensor          # [slots] the last token, which is not yet in the cache
    counts: torch.Tensor          # [slots] tokens sampled
    done: torch.Tensor            # [slots] 1: free, or ended and not yet collected
    broken: torch.Tensor          # [1] 1: a sequence has had NaN, and the cache may hold it
    prompt_logits: torch.Tensor   # [slots, V] after the prompt
    sampled: torch.Tensor         # [slots, max_length]
    logprobs: torch.Tensor        # [slots, max_length]
    uniforms: torch.Tensor        # [slots, max_length] the random numbers of a response
    flat: torch.Tensor            # [slots] where each row begins in these three, flattened
    stops: dict[tuple[int, ...], torch.Tensor]

    def __init__(self, config: ModelConfig, slots: int, max_length: int, device,
                 dtype: torch.dtype, compile: bool = False, keep: bool = False):
        self.config, self.slots, self.max_length = config, slots, max_length
        self.device, self.dtype = torch.empty(0, device=device).device, dtype   # with its index
        self.capture = None   # on a GPU, see prepare
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.step, self.compiled = self._step, compile
        if compile:
            # The cached function has no side effect, so Dynamo may trace through the cache.
            warnings.filterwarnings("ignore",
                                    message="Dynamo detected a call to a `functools.lru_cache`")
            self.step = torch.compile(self._step, dynamic=True)
        self.work = Work()
        self.graphs, self.model, self.keeps = {}, lambda: None, keep and self.stream is not None
        needed = slots * bytes_per_slot(config, max_length, dtype)
        free = free_memory(self.device)
        if needed > free:
            raise ValueError(f"a cache of {slots} slots of {max_length} positions takes "
                             f"{needed / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free: fewer "
                             f"slots, or shorter prompts and responses, would fit")

    def prepare(self, model: Transformer, settings: _Settings, slots: int, length: int) -> None:
        """Allocates what is not yet there, and drops the graphs of another model.

        slots, length: what the rollout needs.

        Graphs refer to the weights and the cache they were captured with. Where `keeps` is set, the
        sampler holds a model that is gathered for every rollout, gather_model puts the next weights
        into it, and the graphs serve again.
        """
        if self.stream or self.capture or self.compiled:
            slots, length = self.slots, self.max_length
        if "cache" in vars(self) and (len(self.flat) < slots or self.cache.size < length):
            self.release()
        if "cache" not in vars(self):
            self.cache = KVCache(self.config, slots, length, self.device, self.dtype)
            zeros = functools.partial(torch.zeros, device=self.device, dtype=torch.long)
            self.lengths, self.tokens, self.counts = (zeros(slots) for _ in range(3))
            self.done, self.broken, self.spoiled = torch.ones_like(self.counts), zeros(1), 0
            self.prompt_logits = zeros(slots, self.config.vocab_size,   # as Transformer.logits
                                       dtype=torch.promote_types(self.dtype, torch.float32))
            self.sampled = zeros(slots, length)
            self.logprobs = zeros(slots, length, dtype=torch.float32)
            self.uniforms = zeros(slots, length, dtype=torch.float64)
            self.flat = torch.arange(slots, device=self.device) * length
            self.stops = {}
        if self.model() is not model:
            self.graphs.clear()
            self.model = (lambda: model) if self.keeps else weakref.ref(model)
            if self.stream:
                self.capture = make_capture(self.stream)
        if settings.stop_ids not in self.stops:
            self.stops[settings.stop_ids] = torch.tensor(settings.stop_ids, device=self.device,
                                                         dtype=torch.long)

    def release(self) -> None:
        """Frees all memory; `prepare` allocates it again."""
        self.graphs.clear()
        self.model = lambda: None
        for name in Sampler.__annotations__:
            vars(self).pop(name, None)

    def admit(self, model: Transformer, sequences: list[_Sequence], settings: _Settings) -> None:
        """Gives new sequences their prompt and first token.

        A prefix is copied from its leader and the rest of the prompt is prefilled.
        """
        started = time.perf_counter()
        # A sequence admitted together with its leader waits one round, until the leader's prefix
        # is cached.
        rounds: dict[_Sequence | None, int] = {}
        for s in sequences:
            rounds[s] = rounds.get(s.leader, -1) + 1
        for number in range(max(rounds.values()) + 1):
            members = [s for s in sequences if rounds[s] == number]
            copies = [(s, s.leader.slot) for s in members if s.leader and s.leader.slot != s.slot]
            if copies:   # positions copied beyond a sequence's own share are overwritten later
                sources = self._tensor([slot for _, slot in copies])
                targets = self._tensor([s.slot for s, _ in copies])
                self.cache.copy(sources, targets, max(s.shared for s, _ in copies))
                self.prompt_logits[targets] = self.prompt_logits[sources]
            if self.spoiled:   # NaN behind their prefixes would reach them
                slots = self._tensor([s.slot for s in members])
                self.cache.copy(slots, slots, self.cache.size,
                                self._tensor([s.shared for s in members]))
            # Rows of similar length go together. Rows without a prefix go apart from the others,
            # because their attention is cheaper.
            batch: list[_Sequence] = []
            rest = {s: len(s.prompt) - s.shared for s in members if s.shared < len(s.prompt)}
            for s in sorted(rest, key=lambda s: (s.shared == 0, rest[s]), reverse=True):
                if batch and ((s.shared == 0) != (batch[0].shared == 0)
                              or rest[s] < rest[batch[0]] // 2
                              or rest[batch[0]] * (len(batch) + 1) > PREFILL_POSITIONS):
                    self._prefill(model, batch)
                    batch = []
                batch.append(s)
            if batch:
                self._prefill(model, batch)

        slots = self._tensor([s.slot for s in sequences])
        keys = self._tensor([s.key for s in sequences])
        positions = torch.arange(settings.limit, device=self.device)
        self.uniforms[slots, :settings.limit] = uniform(keys[:, None], positions)
        self.lengths[slots] = self._tensor([len(s.prompt) for s in sequences])
        self.counts[slots] = 0
        self.done[slots] = 0
        self._append(slots, self.prompt_logits[slots], settings)
        for s in sequences:
            s.count = 1
        if self.stream:
            torch.cuda.synchronize(self.device)
        self.work.prefill_seconds += time.perf_counter() - started

    def _prefill(self, model, batch):
        rests = [s.prompt[s.shared:] for s in batch]
        width = max(map(len, rests))
        tokens = self._tensor([rest + rest[-1:] * (width - len(rest)) for rest in rests])  # [B, T]
        slots = self._tensor([s.slot for s in batch])
        starts = self._tensor([s.shared for s in batch]) if batch[0].shared else None
        span = min(width + max(s.shared for s in batch), self.cache.size)
        hidden = model.extend(tokens, self.cache, slots, starts, span)                 # [B, T, D]
        last = self._tensor([len(rest) - 1 for rest in rests])
        rows = torch.arange(len(batch), device=self.device)
        self.prompt_logits[slots] = model.logits(hidden[rows, last])                      # [B, V]
        self.work.positions += tokens.numel()
        self.work.wasted_positions += tokens.numel() - sum(map(len, rests))

    def decode(self, model: Transformer, running: list[_Sequence], settings: _Settings,
               usable: int) -> tuple[list[int], int]:
        """Samples a token for every sequence; on a GPU several, because each check waits for it.

        Returns (slots that have ended, tokens sampled).
        """
        started, batch = time.perf_counter(), len(running)
        left = max(settings.limit - s.count for s in running)
        steps = min(CHECK_EVERY if self.capture else 1, left)
        span = max(len(s.prompt) + s.count - 1 for s in running) + steps
        if self.capture:
            batch = bucket(batch, self.slots)
            span = bucket(max(span, 64), self.max_length)
        key = (batch, span, settings)
        for _ in range(steps):
            if not self.capture:
                self.step(model, *key)
            elif key in self.graphs:
                self.graphs[key]()
            else:
                self.graphs[key] = self.capture(functools.partial(self.step, model, *key))
        state = torch.cat((self.counts[:len(running)], self.done[:len(running)],
                           self.broken)).tolist()
        counts, dones, self.spoiled = state[:len(running)], state[len(running):-1], state[-1]
        watched = [s for s in running if s.stop_at]
        if watched:
            self._stop(watched, counts, dones, settings)
        sampled = sum(counts) - sum(s.count for s in running)
        for s, count in zip(running, counts):
            s.count = count
        self.work.decode_seconds += time.perf_counter() - started
        self.work.sequence_steps += sampled
        self.work.positions += batch * steps
        self.work.wasted_positions += batch * steps - sampled
        self.work.slot_steps += usable * steps
        return [slot for slot, done in enumerate(dones) if done], sampled

    def _stop(self, watched, counts, dones, settings):
        """Asks stop_at where sequences end; it shortens their counts, by slot, and sets dones."""
        slots, seen = [s.slot for s in watched], [len(s.seen) for s in watched]
        width = max(counts[slot] - begin for slot, begin in zip(slots, seen))
        places = self._tensor(seen)[:, None] + torch.arange(width, device=self.device)
        new = self.sampled[self._tensor(slots)[:, None], places.clamp(max=self.cache.size - 1)]
        for s, begin, tokens in zip(watched, seen, new.tolist(), strict=True):
            s.seen += [token for token in tokens[:counts[s.slot] - begin]
                       if token not in settings.stop_ids]
            end = s.stop_at(s.seen, begin)
            if end is not None:
                counts[s.slot], dones[s.slot], s.stopped = end, 1, True
                self.done[s.slot] = 1

    def _step(self, model, batch, span, settings):
        """Samples a token for each of the first `batch` slots, without waiting for the device."""
        hidden = model.extend(self.tokens[:batch, None], self.cache, None, self.lengths[:batch],
                              span)                                                    # [B, 1, D]
        self.lengths[:batch] += 1 - self.done[:batch]
        self._append(slice(batch), model.logits(hidden[:, 0]), settings)

    def _append(self, slots, logits, settings):
        """Samples a token for these slots [B] from logits [B, V].

        A slot that is done writes behind its end, where nothing reads.
        """
        done, place = self.done[slots], self.flat[slots] + self.counts[slots]             # [B]
        tokens, logprobs = sample(logits, settings.temperature, settings.top_p, settings.top_k,
                                  self.uniforms.view(-1)[place])
        self.tokens[slots] = self.sampled.view(-1)[place] = tokens
        self.logprobs.view(-1)[place] = logprobs
        self.broken |= logprobs.isnan().any()
        self.counts[slots] += 1 - done
        ended = ((tokens[:, None] == self.stops[settings.stop_ids]).any(-1)
                 | (self.counts[slots] == settings.limit))
        self.done[slots] = done | ended

    def collect(self, ended: list[_Sequence],
                settings: _Settings) -> list[tuple[_Sequence, Completion]]:
        """The completions of sequences that have ended."""
        if not ended:
            return []
        slots, longest = self._tensor([s.slot for s in ended]), max(s.count for s in ended)
        rows = zip(ended, self.sampled[slots, :longest].tolist(),
                   self.logprobs[slots, :longest].tolist(), strict=True)
        return [(s, Completion(tokens[:s.count], logprobs[:s.count],
                               s.stopped or tokens[s.count - 1] in settings.stop_ids))
                for s, tokens, logprobs in rows]

    def move(self, moved: dict[int, _Sequence]) -> None:
        """Moves sequences to the given slots. No source slot is also a target."""
        sources = self._tensor([s.slot for s in moved.values()])
        targets = self._tensor(list(moved))
        lengths = [len(s.prompt) + s.count for s in moved.values()]
        if self.spoiled:
            self.cache.copy(sources, targets, self.cache.size, self._tensor(lengths))
        else:
            self.cache.copy(sources, targets, max(lengths))
        for state in (self.lengths, self.tokens, self.counts, self.done, self.sampled,
                      self.logprobs, self.uniforms):
            state[targets] = state[sources]
        self.done[sources] = 1
        for slot, sequence in moved.items():
            sequence.slot = slot

    def _tensor(self, numbers) -> torch.Tensor:
        return torch.tensor(numbers, device=self.device)


# --------------------------------------------------------------------------------------------------
# Arguments

def _check(model, prompts, counts, max_new_tokens, temperature, top_p, top_k, stream_ids, slots,
           sampler, stop_at) -> None:
    for name, value, least in (*(("n", count, 1) for count in counts),
                               ("max_new_tokens", max_new_tokens, 1), ("slots", slots, 0),
                               ("top_k", top_k, 0), ("temperature", temperature, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, not {value}")
    if not math.isfinite(temperature) or 0 < temperature < 1e-6:   # logits would overflow
        raise ValueError(f"temperature must be 0 or a finite number from 1e-6, not {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, not {top_p}")
    for name, values in (("n", counts), ("stream_ids", stream_ids), ("stop_at", stop_at)):
        if values is not None and len(values) != len(prompts):
            raise ValueError(f"{len(values)} {name} for {len(prompts)} prompts: give one each")
    config = model.config
    if sampler is not None and (sampler.config, sampler.dtype, sampler.device) != (
            config, model.dtype, model.device):
        raise ValueError("the sampler was made for a model of another shape, data type or device")
    whose, positions = "the model's", config.max_position
    if sampler is not None and sampler.max_length < positions:
        whose, positions = "the sampler's", sampler.max_length
    room = positions - max_new_tokens
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {i} is empty: there is nothing to continue")
        if len(prompt) > room:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens; with max_new_tokens="
                             f"{max_new_tokens} {whose} {positions} positions leave room for "
                             f"{max(room, 0)}")
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise ValueError(f"prompt {i} has token ids from {min(prompt)} to {max(prompt)}; "
                             f"the vocabulary is 0 to {config.vocab_size - 1}")
