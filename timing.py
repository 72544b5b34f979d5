"""The seconds that a training step takes on GPUs, computed from figures that their makers publish.

    read_cards(options)                    # (8, bytes of each) of --cards 8x80
    step_seconds(plan, CARDS[0], 1.0)      # {part: seconds}
    time_table(plan, CARDS[0])             # for --dry-run

docs/gpus.md says what one H100 reached of these figures. Letters as in memory.py.
"""

from dataclasses import dataclass
from math import ceil

from memory import Plan, count_parameters
from options import TrainingOptions, require

RATE = 0.4         # shares of what is published that a step is supposed to reach: of operations,
BANDWIDTH = 0.6    # of every bandwidth
FILLS = {"longest": 1.0, "a quarter": 0.25}   # lengths of prompts and responses, of their limits


@dataclass(frozen=True)
class Card:
    """Operations are those of dense matrix products with float32 sums; bandwidths are one way."""
    name: str
    size: int          # GB, as it is sold
    bfloat16: float    # operations a second
    float32: float
    memory: float      # bytes a second, of its own memory
    link: float        # from the other cards of the machine: NVLink, or PCIe where there is none
    host: float        # from the CPU's memory


CARDS = [Card("H100", 80, 989e12, 67e12, 3.35e12, 450e9, 64e9),    # SXM
         Card("A100", 80, 312e12, 19.5e12, 2.039e12, 300e9, 32e9),   # SXM
         Card("H200", 141, 989e12, 67e12, 4.8e12, 450e9, 64e9),
         Card("L40S", 48, 362e12, 91.6e12, 0.864e12, 32e9, 32e9),
         Card("RTX4090", 24, 165e12, 82.6e12, 1.008e12, 32e9, 32e9)]


def find_card(kind: str) -> Card | None:
    """The card in whose name, or device name, or size in GB this is; None if none is known."""
    kind = kind.replace(" ", "").lower()
    return next((card for card in CARDS if card.name.lower() in kind or kind == str(card.size)),
                None)


def read_cards(options: TrainingOptions) -> tuple[int, float] | None:
    """(number of GPUs, bytes of each) of --cards, or None without it. Raises ValueError."""
    number, _, kind = options.cards.partition("x")
    if not options.cards:
        return None
    require(options.dry_run, "--cards is for --dry-run, which needs no GPU")
    card = find_card(kind)
    size = card.size if card else int(kind) if kind.isdecimal() else 0
    require(number.isdecimal() and int(number) and size,
            f"--cards {options.cards} is no number of GPUs and what they are: give 8x80 for 8 of "
            f"80 GB, or 8x and one of {', '.join(each.name for each in CARDS)}")
    return int(number), size * 2.0 ** 30   # what is sold as 80 GB has 80 GiB


def communication(blocks: int, rest: int, processes: int, shard_size: int, micro_batches: int = 1,
                  reference: int = 0, compute_bytes: int = 2,
                  weights_stay: bool = False) -> dict[str, float]:
    """The bytes that a GPU receives in each part of an update with ring algorithms.

    It sends as many. The model has `blocks` parameters in its blocks and `rest` elsewhere: the
    embeddings, head and last norm, which stay gathered from the forward to the backward pass.
    reference: passes without gradient beside the one that trains. weights_stay: see
    distributed.passes.
    """
    part, replicas, count = (shard_size - 1) / shard_size, processes // shard_size, blocks + rest
    # Weights are gathered, once for the rollout and block by block in the passes. Gradients are in
    # float32; a reduce-scatter sums them within a replica, and after the last micro-batch an
    # all-reduce sums them between the replicas.
    return {"rollout": compute_bytes * count * part,
            "forward": compute_bytes * count * part * (
                micro_batches * reference + (1 if weights_stay else micro_batches)),
            "backward": 0 if weights_stay else compute_bytes * blocks * part * micro_batches,
            "gradients": 4 * count * part * micro_batches
            + 4 * count / shard_size * 2 * (replicas - 1) / replicas}


def step_seconds(plan: Plan, card: Card, fill: float) -> dict[str, float]:
    """{part: seconds} of a step in which all prompts and responses have `fill` of their limits.

    plan: with --slots resolved. Off-policy responses are sampled for every question.
    """
    o, c = plan.options, plan.config
    rate = RATE * (card.bfloat16 if plan.width == 2 else card.float32)
    memory, link, host = (BANDWIDTH * each for each in (card.memory, card.link, card.host))
    prompt, response = fill * o.max_prompt_length, fill * o.max_new_tokens
    block, rest = count_parameters(c)
    blocks, head = c.num_layers * block, c.vocab_size * c.hidden_size
    attention = 4 * c.num_layers * c.num_heads * c.head_dim   # operations of a query with a key
    questions = o.batch_size / plan.processes
    with_demos = o.n_off if o.off_policy == "demonstrations" else 0

    # Rollout: a prompt is prefilled once for all its responses.
    prefill = questions * (1 + with_demos) * (2 * blocks * prompt + attention * prompt ** 2 / 2)
    sequences = questions * (o.n_on + with_demos)
    rounds = ceil(sequences / o.slots)
    rows, span = sequences / rounds, prompt + response / 2    # span: mean length at a decode step
    kv = 2 * c.num_layers * c.num_kv_heads * c.head_dim
    operations = rows * (2 * (blocks + head) + attention * span)
    size = plan.width * (blocks + head + rows * span * kv)
    decode = rounds * response * max(operations / rate, size / memory)

    # Update: a backward pass costs two forward passes, and the head's computes its logits again.
    length, updates = prompt + response, o.batch_size / o.mini_batch_size
    alone = bool(o.kl_coef) + (o.old_logprobs == "recompute")   # forward passes without gradient
    inner = (2 * blocks * length + attention * length ** 2 / 2) * (
        3 + (o.recompute_activations == "all") + alone)
    trained = questions * (o.n_on + o.n_off * (o.group == "append"))
    passes = trained * (inner + 2 * head * response * (4 + alone)) / rate
    # AdamW reads weights, gradients and both moments, and writes all but gradients.
    optimizer = updates * plan.share * (28 / memory + 16 / host * (o.optimizer_state == "cpu"))
    parts = ceil(trained / updates / max(1, o.micro_batch_tokens // length))
    offloaded = updates * parts * plan.width * plan.share / host * o.offload_reference
    received = communication(blocks, rest, plan.processes, o.shard_size or plan.processes, parts,
                             alone, plan.width)
    whole = received.pop("rollout") + updates * sum(received.values())
    return {"prefill": prefill / rate, "decode": decode, "update": passes + optimizer + offloaded,
            "communication": whole / link}


def time_table(plan: Plan, card: Card) -> str:
    """The seconds of each part of a step at both lengths of FILLS, and what they suppose."""
    found = {name: step_seconds(plan, card, fill) for name, fill in FILLS.items()}
    rows = [(part, [each[part] for each in found.values()]) for part in found["longest"]]
    rows.append(("sum", [sum(each.values()) for each in found.values()]))
    rate = card.bfloat16 if plan.width == 2 else card.float32
    return "\n".join([
        f"Seconds of a step on {plan.processes} {card.name}, computed and not measured:",
        f"{'seconds':<28}" + "".join(f"{name:>10}" for name in found),
        *(f"{name:<28}" + "".join(f"{value:>10,.0f}" for value in values) for name, values in rows),
        "Every prompt and response has its longest length, or a quarter of it. A GPU reaches",
        f"{RATE:.0%} of {rate / 1e12:g} TFLOP/s and {BANDWIDTH:.0%} of its bandwidths: "
        f"{card.memory / 1e9:,.0f} GB/s of its memory,",
        f"{card.link / 1e9:g} from other GPUs, {card.host / 1e9:g} from the CPU's memory. Parts do "
        f"not overlap. Kernel launches, rewards",
        "and evaluations are left out."])
