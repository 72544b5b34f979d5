"""The memory that a run takes on each GPU, part by part, from the shape of the model alone.

    plan = Plan(config, options, processes=8, device="cuda")
    plan.gathered, plan.moments               # bytes of a part
    plan.rollout(cache), plan.update(cache)   # {part: bytes} at the fullest moment of each phase

Letters: V vocabulary, D hidden size, I intermediate size, H query heads, K key-value heads, E head
size. Every size is that of one process, in bytes. A process on the CPU counts as a GPU.
"""

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch

from machine import free_memory
from options import TrainingOptions

if TYPE_CHECKING:
    from model_utils import ModelConfig

CONTEXT = 10 ** 9        # bytes of a card that CUDA, its libraries and NCCL take
FILL = 0.85              # share of the free memory that is used, because blocks leave gaps
MAX_SLOTS = 256          # even where the free memory would allow more
LOGITS_CHUNK = 1024      # positions whose logits exist at the same time
LOGITS_IN_CACHES = 1 << 20   # logits that a CPU's caches hold from one pass to the next
PREFILL_POSITIONS = 2048   # prefilled in one pass; more of them do not fit in a CPU's caches


def needs_group(options: TrainingOptions) -> bool:
    """Whether even a run of one process uses FSDP: for its mixed precision, and to offload."""
    return options.dtype != "float32" or options.offload_reference


def count_parameters(c: "ModelConfig") -> tuple[int, int]:
    """(parameters of a block, parameters around the blocks)."""
    heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    biases = ((heads + 2 * kv) * c.qkv_bias + c.hidden_size * c.out_bias
              + (2 * c.intermediate_size + c.hidden_size) * c.mlp_bias)
    block = (c.hidden_size * (2 * heads + 2 * kv) + 3 * c.hidden_size * c.intermediate_size
             + 2 * c.hidden_size + 2 * c.head_dim * c.qk_norm + biases)
    return block, c.hidden_size + c.vocab_size * c.hidden_size * (1 if c.tie_embeddings else 2)


def bytes_per_slot(c: "ModelConfig", length: int, dtype: torch.dtype) -> int:
    """Of a cache slot of `length` positions: keys and values, and what sampling from it needs.

    These are the tokens, log-probabilities and random numbers of a response, and its logits in
    float32: after the prompt, of a decode step, and three times to draw a token.
    """
    kv = 2 * c.num_layers * c.num_kv_heads * c.head_dim * dtype.itemsize
    return length * (kv + 8 + 4 + 8) + c.vocab_size * 5 * 4


def choose_slots(config: "ModelConfig", sequences: int, max_length: int, device, dtype: torch.dtype,
                 beside: float = 0, free: float | None = None) -> int:
    """The least of `sequences`, MAX_SLOTS and what 85 % of the free memory holds; at least 1.

    beside: bytes that others will take while the cache is there. free: bytes, by default those of
    the device now.
    """
    free = free_memory(torch.device(device)) if free is None else free
    room = (FILL * free - beside) // bytes_per_slot(config, max_length, dtype)
    return max(1, min(sequences, MAX_SLOTS, int(room)))


def choose_recomputation(plan: "Plan", free: float) -> Literal["none", "cheap", "all"]:
    """The least recomputation with which an update takes at most 85 % of the free memory.

    free: the bytes that this process may take before it has weights; plan.own is beside them.
    """
    o, cache = plan.options, 0
    if plan.cache_stays:   # The slots that are wanted need room beside the update.
        slots = o.slots or min(MAX_SLOTS, -(-o.batch_size * (o.n_on + o.n_off) // plan.processes))
        cache = slots * bytes_per_slot(plan.config, o.max_prompt_length + o.max_new_tokens,
                                       getattr(torch, o.dtype))

    def fits(how: Literal["none", "cheap"]) -> bool:
        tried = replace(plan, options=replace(o, recompute_activations=how))
        return sum(tried.update(cache).values()) <= plan.own + FILL * free

    return "none" if fits("none") else "cheap" if fits("cheap") else "all"


@dataclass(frozen=True)
class Plan:
    """Sizes of a run. Properties are bytes of a part on the GPU, 0 where it is in the CPU's memory.

    options: as resolved. device: cpu or cuda. own: bytes that a process takes without a run.
    """
    config: "ModelConfig"
    options: TrainingOptions
    processes: int
    device: str
    own: float = 0

    @property
    def fsdp(self) -> bool:
        return self.processes > 1 or needs_group(self.options)

    @property
    def width(self) -> int:
        """Bytes of a number in the type of the computation."""
        return 2 if self.options.dtype == "bfloat16" else 4

    @property
    def parameters(self) -> int:
        block, rest = count_parameters(self.config)
        return self.config.num_layers * block + rest

    @property
    def share(self) -> float:
        """Parameters that this process keeps."""
        return self.parameters / (self.options.shard_size or self.processes)

    @property
    def weights(self) -> float:
        return 4 * self.share

    @property
    def _reference(self) -> float:   # wherever it is
        return self.width * self.share if self.options.kl_coef else 0

    @property
    def reference(self) -> float:
        return 0 if self.options.offload_reference else self._reference

    @property
    def moments(self) -> float:
        """They are there from the first update on."""
        return {"float32": 8, "bfloat16": 4, "cpu": 0}[self.options.optimizer_state] * self.share

    @property
    def in_cpu_memory(self) -> float:
        """Bytes of what was taken off the GPU."""
        return (self._reference * self.options.offload_reference
                + 8 * self.share * (self.options.optimizer_state == "cpu"))

    @property
    def gathered(self) -> float:
        """The whole copy that samples; a model that is whole samples itself."""
        return self.width * self.parameters if self.fsdp else 0

    @property
    def cache_stays(self) -> bool:
        """Whether the sampler keeps its memory during the update; see train.behaviour_policy."""
        return self.device == "cuda" and not self.fsdp

    @property
    def beside_cache(self) -> float:
        """What is not yet there when a run begins and will be there together with the cache."""
        beside = self.moments + self.gathered + self._prefill
        if self.cache_stays:
            there = self.own + self.weights + self.reference + self.moments
            beside += sum(self.update(0).values()) - there
        return beside

    def fits_beside_update(self, more: float, free: float) -> bool:
        """Whether a run with FSDP has room for `more` bytes during the update.

        free: the bytes that weights and reference have left.
        """
        update = sum(self.update(0).values()) - self.own - self.weights - self.reference
        return self.fsdp and update + more <= FILL * free

    @property
    def _prefill(self) -> float:
        c, longest = self.config, self.options.max_prompt_length
        # Each query head of a prompt behind a prefix has a mask of its own, see Transformer.extend.
        mask = PREFILL_POSITIONS * c.num_heads // c.num_kv_heads * longest
        positions = max(PREFILL_POSITIONS, longest)
        return self.width * (positions * (4 * c.intermediate_size + 6 * c.hidden_size) + mask)

    @property
    def kept(self) -> float:
        """Bytes that a position keeps for the backward pass.

        Beside the blocks' these are the hidden states after the last norm, and those that predict.
        """
        recompute = self.options.recompute_activations
        block = block_activations(self.config, self.width, self.device, recompute)
        return self.config.num_layers * block + 4 * self.width * self.config.hidden_size

    def rollout(self, cache: float) -> dict[str, float]:
        """{part: bytes} while responses are sampled with a cache of so many bytes."""
        return {"process": self.own, "weights": self.weights, "reference": self.reference,
                "moments": self.moments, "gathered copy": self.gathered, "cache": cache,
                "activations": self._prefill}

    def update(self, cache: float) -> dict[str, float]:
        """{part: bytes} at the fullest moment of the pass that trains.

        Candidates are the end of the forward pass, the log-probabilities' backward pass, that of
        the last block, and the end, when the gradients of head and embeddings are added. The
        micro-batch has as many tokens as it may, and no prompt is shared.
        """
        o, c, b = self.options, self.config, self.width
        block, rest = count_parameters(c)
        table = c.vocab_size * c.hidden_size
        rows = -(-(o.mini_batch_size or o.batch_size) // self.processes) * (
            o.n_on + o.n_off * (o.group == "append"))
        tokens = min(o.micro_batch_tokens, rows * (o.max_prompt_length + o.max_new_tokens))
        always: dict[str, float] = {
            "process": self.own, "weights": self.weights, "reference": self.reference,
            "moments": self.moments, "gradients": 4 * self.share,
            "cache": cache if self.cache_stays else 0}
        kept, now = tokens * self.kept, functools.partial(block_activations, c, b, self.device)
        # The backward pass of a block has all of its activations, and the first gradients in it.
        again = tokens * (now("none") - now(o.recompute_activations))
        passing = tokens * b * (c.intermediate_size + c.hidden_size)
        logits, cpu = min(LOGITS_CHUNK, -(-tokens // 4)) * c.vocab_size, self.device == "cpu"
        # A GPU also holds the probabilities of the whole chunk. A CPU holds those of a few
        # positions, and a float32 copy of a bfloat16 head.
        beside = min(4 * logits, 4 * LOGITS_IN_CACHES) if cpu else 4 * logits
        head = 4 * table * (cpu and b == 2)
        of_entropies = 4 * logits * (o.entropy_coef > 0 and not cpu)
        # FSDP has one block whole, the next arriving, and the buffer in which it arrives; what lies
        # around the blocks stays whole from the forward pass to the backward pass.
        blocks, root = (3 * b * block, b * rest) if self.fsdp else (0, 0)
        reducing = b * block + 2 * 4 * block if self.fsdp else 0
        moments: list[dict[str, float]] = [
            {"activations": kept, "logits": 4 * logits + beside + head,
             "gathered for a pass": root + (blocks + root) * bool(o.kl_coef)},
            {"activations": kept, "logits": (4 if b == 4 else 6) * logits + of_entropies + head,
             "gathered for a pass": root, "gradients in a pass": b * table},
            {"activations": kept + again + passing, "gathered for a pass": root + blocks,
             "gradients in a pass": b * table + reducing},
            {"gradients in a pass": (b + 4) * rest + 4 * rest / (o.shard_size or self.processes)
             if self.fsdp else 4 * table * (1 + c.tie_embeddings)}]
        return always | max(moments, key=lambda each: sum(each.values()))

    def peak(self, cache: float) -> float:
        return max(sum(phase(cache).values()) for phase in (self.rollout, self.update))

    def table(self, cache: float, slots: int, free: float) -> str:
        """Both phases in GB, and whether they fit in `free` bytes."""
        rollout, update = self.rollout(cache), self.update(cache)
        rows = [["GB", "rollout", "update"]]
        for part in {**rollout, **update}:
            sizes = [phase.get(part, 0) / 1e9 for phase in (rollout, update)]
            if any(sizes):
                name = f"{part} of {slots} slots" if part == "cache" else part
                rows.append([name, *(f"{size:.2f}" if size else "" for size in sizes)])
        rows.append(["sum", *(f"{sum(each.values()) / 1e9:.2f}" for each in (rollout, update))])
        kind = "GPUs" if self.device == "cuda" else "processes"
        peak = self.peak(cache)
        lines = [f"Memory of each of {self.processes} {kind} at the fullest moment of both phases:",
                 *(f"{name:<28}{a:>10}{b:>10}".rstrip() for name, a, b in rows),
                 f"{peak / 1e9:.2f} of {free / 1e9:.2f} GB: "
                 f"{'it fits' if peak <= free else 'it does not fit'}"]
        if self.in_cpu_memory:
            lines.append(f"{self.in_cpu_memory / 1e9:.2f} GB more are in the CPU's memory")
        return "\n".join(lines)


def block_activations(c: "ModelConfig", b: int, device: str, recompute: str) -> int:
    """What a block keeps of a position for the backward pass, with b bytes a number.

    On the CPU a norm keeps its input in float32, and the same divided by its norm.
    """
    heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    attention = b * heads + 4 * c.num_heads                # its result, and a sum in float32
    if recompute == "all":
        return b * c.hidden_size
    if recompute == "cheap":
        return b * (3 * c.hidden_size + heads + 2 * kv + 2 * c.intermediate_size) + attention
    norm = 8 if device == "cpu" else b
    normed = 2 * c.hidden_size + (heads + kv) * c.qk_norm
    # float32 on a GPU repeats keys and values for the query heads that share them.
    repeated = heads if device == "cuda" and b == 4 else kv
    return (norm * normed + b * 2 * c.hidden_size + b * (heads + 2 * repeated) + attention
            + b * heads + 4 * b * c.intermediate_size)
