"""Trains a model with ICPO, GRPO or LUFFY.

    torchrun train.py                                         # the embedded default, ICPO, on whatever is here
    torchrun train.py --method grpo --seed 1
    torchrun --nproc-per-node 8 train.py configs/qwen3-1.7b-icpo.yaml --output-dir runs/mine
    torchrun train.py --resume                                # go on where a killed run stopped

Each step is the procedure of the paper:
1. draw a batch of questions;
2. sample N_on responses to each question, and N_off with demonstrations in the context, from θ_old;
3. an off-policy response that (ERRS) accepts replaces a random on-policy one and gets the bonus (RS);
4. advantages over the mixed group (ADV), objective (ICPO), gradient step;
5. θ_old ← θ.

Every random choice is a function of (seed, step, question), never of a process or of what was drawn before: that is why
1 and 2 processes make the same update, and why a resumed run needs no saved random state.
"""

import contextlib
import copy
import ctypes
import functools
import itertools
import json
import math
import os
import random
import shutil
import signal
import sys
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from tqdm import tqdm

from curves import draw
from data import Demonstrations, Problem, PromptBuilder, load_problems, normalise
from distributed import (AdamW, barrier, full_tensor, gather_model, gather_objects, init_distributed, is_main, on_main, rank,
                         shard, spread, world_size, wrap_blocks)
from eval import evaluate, follow_tokens, make_scorer
from icpo import (annealed_bonus, expert_region, group_advantages, icpo_loss, implicit_expert_forcing, mix_groups,
                  shaped_rewards)
from model_utils import Packing, Transformer, load_model, pack, response_logprobs, save_model, spread_out
from options import DTYPES, FREE_ON_RESUME, TrainingOptions as Options, _require, embedded, parse_options, resolve
from reward import RewardError
from rollout import Sampler, Work, choose_slots, generate
from runs import (NotFinite, append, choose_folder, how_to_go_on, load_checkpoint, lock_folder, save_checkpoint, stop_on_signal,
                  write_settings)


@dataclass
class Run:
    options: Options
    folder: Path
    device: torch.device
    model: Transformer
    reference: Transformer | None       # the initial model, for the KL term
    optimizer: torch.optim.Optimizer
    builder: PromptBuilder
    problems: list[Problem]
    held_out: list[Problem]
    demonstrations: Demonstrations | None
    sampler: Sampler
    scorer: Callable                    # (responses, problems) -> rewards
    counts: Counter                     # its "timeouts", since the last step that was logged
    start: int = 0                      # steps already made
    stop: signal.Signals | None = None  # received: this step is the last one


def prepare(arguments: list[str]) -> Run:
    """Everything that may be wrong with options, data or model comes out here, as a ValueError, before any training."""
    options = parse_options(arguments)
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):   # torchrun --max-restarts, after a process has died
        options.resume = True
    init_distributed(options.device)
    folder, saved = on_main(lambda: choose_folder(options))
    if saved is not None:
        options = parse_options(arguments, saved)
    options = resolve(options)
    device = init_distributed(options.device, needed=options.dtype != "float32" or options.offload_reference)
    for name, on in (("--offload-reference true", options.offload_reference),
                     ("--optimizer-state cpu", options.optimizer_state == "cpu")):
        _require(not on or device.type == "cuda", f"{name} is for GPUs: on this device all is in the CPU's memory anyway")
    free = FREE_ON_RESUME - ({"micro_batch_tokens"} if options.normalizer == "micro-batch" else set())
    for name, value in (saved or {}).items():
        _require(name in free or getattr(options, name) == value, f"{folder} was run with {name}: {value}, "
                 f"not {getattr(options, name)}; leave the option out, or start another run")
    options.output_dir = str(folder)
    if device.type == "cpu" and sys.platform == "linux":   # what large tensors leave goes back, where glibc would keep half
        with contextlib.suppress(AttributeError):          # another C library
            ctypes.CDLL(None).mallopt(-3, 16 << 20)        # M_MMAP_THRESHOLD

    counts = Counter()
    scorer = make_scorer(options.reward, options.answer_format, options.verify_timeout, counts)
    problems = load_problems(embedded(options.train_data, "train.jsonl"),
                             needs=("expert_response",) if options.off_policy == "dataset" else ())
    held_out = load_problems(embedded(options.test_data, "test.jsonl"))
    model, tokenizer = load_model(embedded(options.model, "model"), device)
    _require(bool(model.stop_ids), f"{options.model} names no end-of-text token (eos_token in its tokenizer, or "
             f"eos_token_id in its generation_config.json), so no response would ever end")
    room = model.config.max_position - options.max_new_tokens
    _require(options.off_policy != "dataset" or tokenizer.eos_token_id is not None,
             f"the tokenizer of {options.model} has no eos_token, with which the data's expert responses would end")
    _require(options.max_prompt_length <= room, f"--max-prompt-length {options.max_prompt_length} and --max-new-tokens "
             f"{options.max_new_tokens} pass the model's {model.config.max_position} positions")
    builder = PromptBuilder(tokenizer, options.instruction, options.chat_template, options.demo_chat_template)
    problems, held_out, demonstrations = select_data(options, builder, problems, held_out)

    model.train()
    reference = None
    if options.kl_coef:
        reference = copy.deepcopy(model).requires_grad_(False)
    if dist.is_initialized():
        shard(model, DTYPES[options.dtype], options.shard_size)
        if reference is not None:
            shard(reference, DTYPES[options.dtype], options.shard_size, options.offload_reference)
    if options.recompute_activations != "none" or options.compile_blocks:
        wrap_blocks(model, options.recompute_activations, options.compile_blocks)
    optimizer = AdamW(model.parameters(), options.optimizer_state, lr=options.learning_rate, weight_decay=options.weight_decay)
    sampler = make_sampler(options, model, len(held_out))
    run = Run(options, folder, device, model, reference, optimizer, builder, problems, held_out, demonstrations, sampler,
              scorer, counts)
    lock = on_main(lambda: lock_folder(folder))
    if lock is not None and is_main():
        weakref.finalize(run, os.close, lock)
    if saved is not None:
        run.start = load_checkpoint(run)
        _require(run.start <= options.steps, f"{folder} has made {run.start} steps already, more than --steps "
                 f"{options.steps}")
    on_main(lambda: write_settings(run))
    return run


def make_sampler(options: Options, model: Transformer, held_out: int) -> Sampler:
    """Slots for the larger of a rollout and an evaluation; --slots 0 is resolved to a number, the same on every process."""
    o, length = options, options.max_prompt_length + options.max_new_tokens
    sequences = max(o.batch_size * (o.n_on + o.n_off), held_out * o.eval_samples if o.eval_every else 0)
    found = choose_slots(model.config, -(-sequences // world_size()), length, model.device, DTYPES[o.dtype])
    o.slots = o.slots or min(gather_objects(found))
    sampler = error = None
    try:
        sampler = Sampler(model.config, o.slots, length, model.device, DTYPES[o.dtype], o.compile)
    except ValueError as caught:   # memory may be short on one process alone: all of them end then
        error = caught
    for each in filter(None, gather_objects(error)):
        raise each
    return sampler


def select_data(options: Options, builder: PromptBuilder, problems: list[Problem], held_out: list[Problem]):
    """Leave out what cannot be used, and say how much and why. Returns (problems, held-out problems, demonstrations)."""
    o, left_out = options, {}

    def keep(name, items, reason, test):
        kept = [item for item in items if test(item)]
        if len(kept) < len(items):
            left_out[f"{name} {reason}"] = f"{len(items) - len(kept)} of {len(items)}"
        if not kept:
            raise ValueError(f"no {name} are left: all {len(items)} are {reason}")
        return kept

    too_long = f"with a prompt over {o.max_prompt_length} tokens"
    fits = lambda p: len(builder.plain(p)) <= o.max_prompt_length   # noqa: E731
    held_out = keep("held-out problems", held_out, too_long, fits)
    problems = keep("training problems", problems, too_long, fits)
    tests = {normalise(p.problem) for p in held_out}
    problems = keep("training problems", problems, "that are held-out ones too",
                    lambda p: normalise(p.problem) not in tests)
    held_out = held_out[:o.eval_problems or None]
    demonstrations = None
    if o.off_policy == "dataset":
        problems = keep("training problems", problems, f"with an expert response over {o.max_new_tokens} tokens",
                        lambda p: len(expert_tokens(builder, p)) <= o.max_new_tokens)
    elif o.off_policy == "demonstrations":
        pool = load_problems(embedded(o.demonstrations, "demonstrations.jsonl"), needs=("solution",))
        demonstrations = Demonstrations(pool, builder, o.num_demonstrations, o.max_prompt_length, o.demo_min_chars)
        admitted = {id(p) for p in demonstrations.admit(problems)}
        problems = keep("training problems", problems, f"that leave no room for {o.num_demonstrations} demonstrations "
                        f"in {o.max_prompt_length} tokens", lambda p: id(p) in admitted)
        left_out |= {f"demonstrations {reason}": count for reason, count in demonstrations.excluded.items() if count}
    if len(problems) < o.batch_size:
        raise ValueError(f"{len(problems)} training problems are fewer than --batch-size {o.batch_size}")
    if is_main():
        print(f"{len(problems)} training problems, {len(held_out)} held-out problems"
              + (f", {len(demonstrations.pool)} demonstrations" if demonstrations else ""))
        for what, count in left_out.items():
            print(f"left out: {count} {what}")
    return problems, held_out, demonstrations


def expert_tokens(builder: PromptBuilder, problem: Problem) -> list[int]:
    """The response that LUFFY reads from the data, with the end-of-text token that a sampled one would have."""
    return builder.tokenizer.encode(problem.expert_response, add_special_tokens=False) + [builder.tokenizer.eos_token_id]


# ---------------------------------------------------------------------------------------------------------------------
# One step

@dataclass
class Response:
    """A row of the batch. The objective conditions it on `prompt`, the plain question; `behaviour_prompt` sampled it."""
    slot: int                     # the place of its question in the batch: its group
    off_policy: bool
    prompt: list[int]
    behaviour_prompt: list[int]
    tokens: list[int]
    old_logprobs: list[float]     # of the behaviour policy
    finished: bool
    text: str = ""
    reward: float = 0.0
    accepted: bool = True         # (ERRS)
    keep: bool = True             # in the mixed group
    advantage: float = 0.0


def batch_problem(run: Run, step: int, slot: int) -> Problem:
    """Step 1: the questions come in a random order, another in every epoch."""
    epoch, place = divmod(step * run.options.batch_size + slot, len(run.problems))
    return run.problems[_epoch_order(run.options.seed, epoch, len(run.problems))[place]]


@functools.lru_cache(maxsize=2)   # a batch may reach into the next epoch
def _epoch_order(seed: int, epoch: int, count: int) -> list[int]:
    return random.Random(f"order {seed} {epoch}").sample(range(count), count)


@dataclass
class Prompts:
    plain: list[int]                 # q
    demo_prefixed: list[list[int]]   # [D; q], N_off of them


def make_prompts(run: Run, step: int) -> dict[int, Prompts]:
    """For each question of the batch, by its slot."""
    o, prompts = run.options, {}
    for slot in range(o.batch_size):
        problem, draws = batch_problem(run, step, slot), range(o.n_off if o.off_policy == "demonstrations" else 0)
        prompts[slot] = Prompts(run.builder.plain(problem), [
            run.demonstrations.draw(problem, random.Random(f"demonstrations {o.seed} {step} {slot} {j}"))[1] for j in draws])
    return prompts


def my_share(run: Run, prompts: dict[int, Prompts]) -> dict[int, Prompts]:
    """This process's questions. Each mini-batch is shared out by the positions that its sequences may fill."""
    o, mine = run.options, {}
    for first in range(0, o.batch_size, o.mini_batch_size):
        part = [prompts[slot] for slot in range(first, first + o.mini_batch_size)]
        lengths = [o.n_on * (len(p.plain) + o.max_new_tokens) + sum(len(d) + o.max_new_tokens for d in p.demo_prefixed)
                   for p in part]
        mine |= {first + i: part[i] for i in spread(lengths, world_size())[rank()]}
    return mine


def sample_responses(run: Run, model: Transformer, step: int, prompts: dict[int, Prompts], progress=None) -> list[Response]:
    """Step 2: N_on responses of π_θold(·|q) and N_off off-policy ones for each of these questions."""
    o, builder = run.options, run.builder
    plain = [p.plain for p in prompts.values()]
    owners = [(slot, j, prompt) for slot, p in prompts.items() for j, prompt in enumerate(p.demo_prefixed)]

    def stream(kind, i):   # random numbers of their own for every step, for on- and off-policy, and for evaluation: i alone
        return ((2 * step + kind) << 32) + i

    def policy(x_exp):   # with the plain questions in the same call, so that no slot waits for one of the two kinds
        return generate(model, plain + x_exp, n=[o.n_on] * len(plain) + [1] * len(x_exp), seed=o.seed,
                        stream_ids=[stream(1, slot) for slot in prompts]
                        + [stream(2, slot * o.n_off + j) for slot, j, _ in owners],
                        max_new_tokens=o.max_new_tokens, temperature=o.temperature, top_p=o.top_p, top_k=o.top_k,
                        stop_ids=model.stop_ids, sampler=run.sampler, progress=progress)

    completions = iter(implicit_expert_forcing(policy, [prompt for *_, prompt in owners]))
    rows = [Response(slot, False, p.plain, p.plain, c.tokens, c.logprobs, c.finished)
            for slot, p in prompts.items() for c in itertools.islice(completions, o.n_on)]
    rows += [Response(slot, True, prompts[slot].plain, prompt, c.tokens, c.logprobs, c.finished)
             for (slot, _, prompt), c in zip(owners, completions)]
    if o.off_policy == "dataset":
        for slot, p in prompts.items():
            tokens = expert_tokens(builder, batch_problem(run, step, slot))   # its denominator is 1: a log-probability of 0
            rows.append(Response(slot, True, p.plain, p.plain, tokens, [0.0] * len(tokens), True))
    for row in rows:
        row.text = builder.tokenizer.decode(row.tokens, skip_special_tokens=True)
    return sorted(rows, key=lambda row: (row.slot, row.off_policy))


def mix(run: Run, rows: list[Response], step: int) -> float:
    """Steps 3 and 4: rewards, (ERRS), (RS), the mixed group and (ADV), written into the rows. Returns the bonus."""
    o = run.options
    for row, reward in zip(rows, run.scorer([row.text for row in rows], [batch_problem(run, step, row.slot) for row in rows])):
        row.reward = reward
    rewards = torch.tensor([row.reward for row in rows], dtype=torch.float64)
    off_policy = torch.tensor([row.off_policy for row in rows])
    group = torch.tensor([row.slot for row in rows])
    region = expert_region(rewards, off_policy, o.delta, o.errs_strict)
    accepted = region if o.errs else torch.ones_like(region)
    bonus = annealed_bonus(step, o.bonus_steps, o.alpha, o.bonus_decay) if o.rs else 0.0
    priority = {slot: random.Random(f"replace {o.seed} {step} {slot}") for slot in {row.slot for row in rows}}
    priority = torch.tensor([priority[row.slot].random() for row in rows], dtype=torch.float64)
    keep = mix_groups(off_policy, group, accepted, priority, o.group)
    advantages = group_advantages(shaped_rewards(rewards, off_policy, region, bonus), group, keep,
                                  o.advantage_eps, o.std_unbiased)
    for row, *values in zip(rows, accepted.tolist(), keep.tolist(), advantages.tolist()):
        row.accepted, row.keep, row.advantage = values
    return bonus


def micro_batches(rows: list[Response], budget: int, behaviour: bool = False) -> list[list[Response]]:
    """Rows of at most `budget` tokens together; a question's stay together where they can, since they share its positions.
    Every process gets the same number of micro-batches, as FSDP's collectives want; the last of some may be empty."""
    parts, room = [], 0
    for row in sorted(rows, key=lambda row: (row.slot, row.off_policy)):
        length = len(row.behaviour_prompt if behaviour else row.prompt) + len(row.tokens)
        if not parts or length > room:
            parts.append([])
            room = budget
        parts[-1].append(row)
        room -= length
    return parts + [[]] * (max(gather_objects(len(parts))) - len(parts))


def collate(rows: list[Response], device, behaviour: bool = False) -> tuple[Packing, torch.Tensor, torch.Tensor]:
    """The rows, packed; their mask and old_logprobs, both [B, R].

    behaviour: after the prompts that sampled, instead of the plain questions. No rows give one that counts for nothing."""
    packing = pack([row.behaviour_prompt if behaviour else row.prompt for row in rows] or [[0]],
                   [row.tokens for row in rows] or [[0]], device)
    mask = packing.mask if rows else torch.zeros_like(packing.mask)
    old_logprobs = torch.tensor([logprob for row in rows for logprob in row.old_logprobs], device=device)
    return packing, mask, *spread_out(mask, old_logprobs)


@torch.no_grad()
def recompute_logprobs(run: Run, rows: list[Response]) -> float:
    """The behaviour policy's log-probabilities by a second pass; a data set's responses keep their denominator of 1.
    Returns the largest difference to the sampler's, over all processes."""
    gap = 0.0
    rows = [row for row in rows if not (row.off_policy and run.options.off_policy == "dataset")]
    for micro in micro_batches(rows, run.options.micro_batch_tokens, behaviour=True):
        packing, mask, _ = collate(micro, run.device, behaviour=True)
        logprobs, _ = response_logprobs(run.model, packing, run.options.temperature)
        for i, row in enumerate(micro):
            again = logprobs[i, mask[i]].tolist()
            gap = max(gap, *(abs(new - old) for new, old in zip(again, row.old_logprobs)))
            row.old_logprobs = again
    return max(gather_objects(gap))


def update(run: Run, rows: list[Response], sampled_by_it: bool) -> dict[str, float]:
    """Step 4 for one mini-batch: (ICPO), its gradient, and an optimiser step. `sampled_by_it`: θ is still θ_old.

    A loss or gradient that is not finite leaves the weights as they are and counts as skipped. Returns sums and maxima
    over all processes."""
    o = run.options
    kept = [row for row in rows if row.keep]
    micros = micro_batches(kept, o.micro_batch_tokens)
    Z = sum(gather_objects(sum(len(row.tokens) for row in kept)))
    parts = sum(gather_objects(sum(1 for micro in micros if micro)))
    totals = {name: [0.0, "sum"] for name in ("policy_loss", "kl", "clip_fraction", "clip_fraction_off",
                                              "off_policy_share", "entropy_sum", "entropy_tokens",
                                              "places", "padding", "shared")}
    totals |= {"ratio_max": [0.0, "max"], "logprob_gap": [0.0, "max"]}
    if run.device.type == "cpu":   # in one piece: scattered among the first micro-batch's tensors they would pin its memory
        with contextlib.suppress(AttributeError):   # another C library
            ctypes.CDLL(None).malloc_trim(0)        # what the rollout has left goes back
        for parameter in run.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
    for micro in micros:
        packing, mask, old_logprobs = collate(micro, run.device)
        off_policy = torch.tensor([row.off_policy for row in micro] or [False], device=run.device)
        advantages = torch.tensor([row.advantage for row in micro] or [0.0], device=run.device)
        logprobs, entropy = response_logprobs(run.model, packing, o.temperature)
        ref_logprobs = None
        if run.reference is not None:
            with torch.no_grad():
                ref_logprobs, _ = response_logprobs(run.reference, packing, o.temperature)
        loss, metrics = icpo_loss(
            logprobs, old_logprobs, advantages, mask, off_policy, clip_low=o.clip_low, clip_high=o.clip_high,
            shaping_lambda=o.shaping_lambda if o.shaping else None, off_policy_denominator=o.off_policy_denominator,
            normalizer=Z if o.normalizer == "batch" else None, dual_clip=o.dual_clip or None, ref_logprobs=ref_logprobs,
            kl_coef=o.kl_coef, clip_off_policy=o.clip_off_policy, log_ratio_clamp=o.log_ratio_clamp or None)
        share = 1.0 if o.normalizer == "batch" else 1.0 / parts
        (loss * share * world_size()).backward()   # FSDP averages over the processes; Z is that of them all already

        on_policy = mask & ~off_policy[:, None]
        for name, value in metrics.items():
            if name == "ratio_max":
                totals[name][0] = max(totals[name][0], value.item())
            else:
                totals[name][0] += value.item() * share
        totals["entropy_sum"][0] += (entropy * on_policy).sum().item()
        totals["entropy_tokens"][0] += on_policy.sum().item()
        for name, value in (("places", sum(bucket.numel() for bucket in packing.buckets)), ("padding", packing.padding),
                            ("shared", packing.shared)):
            totals[name][0] += value
        if sampled_by_it:
            gap = ((logprobs.detach() - old_logprobs).abs() * on_policy).max().item()
            totals["logprob_gap"][0] = max(totals["logprob_gap"][0], gap)
    norm = full_tensor(torch.nn.utils.clip_grad_norm_(run.model.parameters(), o.grad_clip,
                                                      error_if_nonfinite=False)).item()
    totals["grad_norm"] = [norm, "max"]   # the same on every process
    totals = combine(totals)
    totals["skipped"] = not math.isfinite(totals["policy_loss"] + totals["grad_norm"])
    if not totals["skipped"]:
        run.optimizer.step()
    run.optimizer.zero_grad()
    return totals


def describe(rows: list[Response]) -> dict[str, list]:
    """Sums over this process's sampled responses, for `combine`."""
    groups = {row.slot for row in rows}
    varied = {row.slot for row in rows if row.advantage}
    totals = {"groups": [len(groups), "sum"], "groups_all_equal": [len(groups - varied), "sum"],
              "errs_accepted": [sum(row.off_policy and row.accepted for row in rows), "sum"]}
    for side, chosen in (("on", [r for r in rows if not r.off_policy]), ("off", [r for r in rows if r.off_policy])):
        totals |= {f"count_{side}": [len(chosen), "sum"], f"reward_{side}": [sum(r.reward for r in chosen), "sum"],
                   f"tokens_{side}": [sum(len(r.tokens) for r in chosen), "sum"],
                   f"cut_{side}": [sum(not r.finished for r in chosen), "sum"]}
    return totals


def combine(totals: dict[str, list]) -> dict[str, float]:
    """Add up, or take the largest of, every process's numbers."""
    everyone = gather_objects(totals)
    return {name: (sum if how == "sum" else max)(each[name][0] for each in everyone) for name, (_, how) in totals.items()}


def follow(say, total: int):
    """What `generate` calls while it runs: says, ten times a second, how many sequences have finished, and tokens/s."""
    said, done = time.perf_counter(), 0

    def report(ended: int, speed: str) -> None:
        nonlocal said, done
        done += ended
        if time.perf_counter() - said > 0.1:
            said = time.perf_counter()
            say(f"sampling {done}/{total}, {speed}")
    return follow_tokens(report)


def train_step(run: Run, step: int, say) -> tuple[dict, list[Response]]:
    """Steps 1 to 5 once. Returns the metrics of the step, on every process, and this process's responses."""
    o, started = run.options, time.perf_counter()
    size = o.mini_batch_size
    say("sampling")
    prompts = my_share(run, make_prompts(run, step))
    run.sampler.work = Work()
    model = gather_model(run.model, DTYPES[o.dtype])
    rows = sample_responses(run, model, step, prompts,
                            follow(say, sum(o.n_on + len(p.demo_prefixed) for p in prompts.values())))
    if model is not run.model or run.device.type == "cpu":   # no CUDA graph would serve again
        run.sampler.release()   # the update can use the cache's memory
    del model   # a copy of the whole model, where there are several processes
    sampled = time.perf_counter()
    bonus = mix(run, rows, step)
    scored = time.perf_counter()
    say("updating")
    gap = recompute_logprobs(run, rows) if o.old_logprobs == "recompute" else None
    updates = [update(run, [row for row in rows if row.slot // size == part], sampled_by_it=part == 0)
               for part in range(o.batch_size // size)]
    ended = time.perf_counter()

    work = {name: [value, "max" if name.endswith("seconds") else "sum"] for name, value in asdict(run.sampler.work).items()}
    s = combine(describe(rows) | work | {"verify_timeouts": [run.counts.pop("timeouts", 0), "sum"]})
    mean = {name: fmean(u[name] for u in updates) for name in updates[0]}
    per = lambda total, count: total / count if count else None   # noqa: E731  (null in the file: there were none)
    return {
        "step": step + 1,
        "reward_on": per(s["reward_on"], s["count_on"]), "reward_off": per(s["reward_off"], s["count_off"]),
        "errs_accept_rate": per(s["errs_accepted"], s["count_off"]), "bonus": bonus,
        "entropy": per(mean["entropy_sum"], mean["entropy_tokens"]),
        "clip_fraction": mean["clip_fraction"], "clip_fraction_off": mean["clip_fraction_off"],
        "off_policy_share": mean["off_policy_share"], "ratio_max": max(u["ratio_max"] for u in updates),
        "logprob_gap": updates[0]["logprob_gap"] if gap is None else gap, "kl": mean["kl"], "policy_loss": mean["policy_loss"],
        "grad_norm": mean["grad_norm"], "groups_all_equal": s["groups_all_equal"] / s["groups"],
        "response_length": per(s["tokens_on"], s["count_on"]), "response_length_off": per(s["tokens_off"], s["count_off"]),
        "truncated": per(s["cut_on"], s["count_on"]), "truncated_off": per(s["cut_off"], s["count_off"]),
        "tokens_per_second": (s["tokens_on"] + s["tokens_off"]) / (ended - started), "step_seconds": ended - started,
        "rollout_seconds": sampled - started, "reward_seconds": scored - sampled, "update_seconds": ended - scored,
        "prefill_seconds": s["prefill_seconds"], "decode_seconds": s["decode_seconds"],
        "slot_occupancy": per(s["sequence_steps"], s["slot_steps"]),
        "wasted_positions": s["wasted_positions"] / s["positions"],
        "padding_share": mean["padding"] / mean["places"],
        "verify_timeouts": s["verify_timeouts"],
        "skipped_updates": sum(u["skipped"] for u in updates),
        "shared_share": mean["shared"] / (mean["places"] - mean["padding"]),
    }, rows


# ---------------------------------------------------------------------------------------------------------------------
# The whole run

def held_out_accuracy(run: Run) -> float:
    """Mean score of answers to the held-out problems, asked plainly."""
    o = run.options
    records = evaluate(gather_model(run.model, DTYPES[o.dtype]), run.builder, run.held_out, samples=o.eval_samples,
                       max_new_tokens=o.max_new_tokens, temperature=o.eval_temperature, top_p=o.eval_top_p,
                       top_k=o.eval_top_k, seed=o.seed, sampler=run.sampler, scorer=run.scorer)
    return fmean(record["score"] for record in records)


def sample_records(run: Run, rows: list[Response], step: int) -> list[dict]:
    """What samples.jsonl keeps of a step: every response to its first questions."""
    return [{"step": step + 1, "problem": batch_problem(run, step, row.slot).problem, "off_policy": row.off_policy,
             "response": row.text, "reward": row.reward, "accepted": row.accepted, "in_group": row.keep,
             "advantage": row.advantage}
            for part in gather_objects([r for r in rows if r.slot < run.options.log_questions])
            for row in part]


def train(run: Run) -> None:
    """All steps from run.start, or until a signal. Raises NotFinite, and OSError where a file cannot be written."""
    o = run.options
    metrics_file = run.folder / "metrics.jsonl"
    accuracies = [row[name] for row in map(json.loads, metrics_file.read_text().splitlines())
                  for name in ("eval_accuracy_before", "eval_accuracy") if name in row]
    skipped = 0
    barrier()   # every process has read the file before rank 0 adds to it
    with stop_on_signal(run), tqdm(total=o.steps, initial=run.start, unit="step", desc=o.method, disable=not is_main()) as bar:
        def say(phase: str) -> None:
            bar.set_description(f"{o.method}, {phase}")

        for step in range(run.start, o.steps):
            before = {}
            if step == 0 and o.eval_every:
                say("evaluating")
                before["eval_accuracy_before"] = held_out_accuracy(run)
                accuracies.append(before["eval_accuracy_before"])
            metrics, rows = train_step(run, step, say)
            metrics |= before
            last = step + 1 == o.steps
            if o.eval_every and (last or (step + 1) % o.eval_every == 0):
                say("evaluating")
                metrics["eval_accuracy"] = held_out_accuracy(run)
                accuracies.append(metrics["eval_accuracy"])
            skipped = skipped + 1 if metrics["skipped_updates"] else 0
            batch = [row for part in gather_objects(rows) for row in part] if skipped else []
            samples = sample_records(run, rows, step)
            stop = any(gather_objects(run.stop is not None))   # the signal may have reached one process alone
            if is_main():
                append(metrics_file, [metrics])
                append(run.folder / "samples.jsonl", samples)
                if skipped:
                    (run.folder / f"skipped-step-{step + 1}.jsonl").unlink(missing_ok=True)   # of a run that was resumed
                    append(run.folder / f"skipped-step-{step + 1}.jsonl", [asdict(row) for row in batch])
                bar.set_postfix(reward=f"{metrics['reward_on']:.2f}",
                                **({"accuracy": f"{accuracies[-1]:.1%}"} if accuracies else {}))
            if skipped == o.max_skipped:
                raise NotFinite(f"the loss or gradient of {skipped} steps in a row was not finite. The weights are those before "
                                f"them; the batches are in {run.folder}/skipped-step-*.jsonl. A smaller --learning-rate, or "
                                f"--dtype float32, may help; so may another model, if it was so from the first step")
            if stop or o.checkpoint_every and (last or (step + 1) % o.checkpoint_every == 0):
                say("saving")
                save_checkpoint(run, step + 1)
                if is_main():
                    draw([run.folder], run.folder / "curves.png")
            bar.update()
            if stop and not last:
                say("stopped")
                break
        else:
            stop = False
            say("done")
    if stop:
        if is_main():
            print(f"stopped after step {step + 1} of {o.steps}; go on with: {how_to_go_on(run)}")
        return
    final = run.folder / "final"
    if is_main():
        shutil.rmtree(final, ignore_errors=True)   # of a shorter run that --resume --steps made longer
    barrier()
    save_model(run.model, run.builder.tokenizer, final)
    if is_main():
        draw([run.folder], run.folder / "curves.png")
        for what, path in (("trained model", final), ("metrics", metrics_file), ("curves", run.folder / "curves.png")):
            print(f"{what + ':':<15}{path}")
        if accuracies:
            print(f"held-out accuracy went from {accuracies[0]:.1%} to {accuracies[-1]:.1%} "
                  f"({len(run.held_out)} problems, 0 shots, temperature {o.eval_temperature})")


def main() -> None:
    # Of DCP in a run without a process group, which is what is meant here.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
    try:
        run = prepare(sys.argv[1:])
    except ValueError as error:
        if is_main():
            print(f"train.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    try:
        train(run)
    except KeyboardInterrupt:
        sys.exit(f"\ninterrupted; go on with: {how_to_go_on(run)}" if is_main() else 130)
    except NotFinite as error:
        sys.exit(f"train.py: error: {error}" if is_main() else 1)
    except RewardError as error:
        print(f"train.py: error: {error}. When it is mended, go on with: {how_to_go_on(run)}", file=sys.stderr)
        os._exit(1)   # at once: other processes wait for this one
    except (OSError, CheckpointException) as error:
        if isinstance(error, CheckpointException):   # which quotes the traceback of every process
            error = next(iter(error.failures.values()))[0]
        free = shutil.disk_usage(run.folder).free / 1e9
        print(f"train.py: error: {run.folder} could not be written ({str(error).splitlines()[0]}); {free:.3f} GB are free there. "
              f"What is there is whole; when it can be written, go on with: {how_to_go_on(run)}", file=sys.stderr)
        os._exit(1)   # at once: other processes wait for this one
    except RuntimeError as error:
        if world_size() == 1 or not any(sign in str(error) for sign in ("gloo", "Gloo", "NCCL", "Connection")):
            raise
        print(f"train.py: error: process {rank()} has lost the others ({str(error).splitlines()[0]}). The one that ended first "
              f"says why; go on with: {how_to_go_on(run)}", file=sys.stderr)
        os._exit(1)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
