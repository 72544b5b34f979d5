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
import fcntl
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
from typing import Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import yaml
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from curves import draw
from data import INSTRUCTION, Demonstrations, Problem, PromptBuilder, load_problems, normalise
from eval import (ANSWER_HELP, DTYPES, REWARD_HELP, did_you_mean, embedded, evaluate, follow_tokens, make_parser, make_scorer,
                  option, parse, replace_file)
from icpo import (annealed_bonus, expert_region, group_advantages, icpo_loss, implicit_expert_forcing, mix_groups,
                  shaped_rewards)
from model_utils import (Packing, Transformer, barrier, full_tensor, gather_model, gather_objects, init_distributed, is_main,
                         load_model, on_main, pack, rank, response_logprobs, save_model, shard, spread_out,
                         world_size, wrap_blocks)
from reward import FORMATS, RewardError
from rollout import Sampler, Work, choose_slots, generate, spread

# What each method sets, unless the option is given. ICPO† of the paper is icpo-rs; ICPO† − ERRS is icpo with --errs false.
METHODS = {
    "grpo": dict(off_policy="none", errs=False, rs=False, shaping=False, shaping_lambda=0.01,
                 off_policy_denominator="behaviour"),
    "luffy": dict(off_policy="dataset", errs=False, rs=False, shaping=True, shaping_lambda=0.1,
                  off_policy_denominator="one"),
    "icpo": dict(off_policy="demonstrations", errs=True, rs=False, shaping=True, shaping_lambda=0.01,
                 off_policy_denominator="behaviour"),
    "icpo-rs": dict(off_policy="demonstrations", errs=True, rs=True, shaping=True, shaping_lambda=0.01,
                    off_policy_denominator="behaviour"),
}


@dataclass
class Options:
    """Every option, its default that of the embedded model; a choice between paper and release has the paper's."""

    # Model and data
    model: str = option("tiny", "folder in Hugging Face format, hub name, or tiny (the embedded default)")
    train_data: str = option("tiny", "JSONL file of problems to train on, or tiny")
    test_data: str = option("tiny", "JSONL file of held-out problems, or tiny")
    demonstrations: str = option("tiny", "JSONL file of worked problems to draw demonstrations from, or tiny")
    instruction: str = option(INSTRUCTION, "text that ends every question")
    chat_template: bool = option(True, "put the tokenizer's chat template around the plain question")
    demo_chat_template: bool = option(True, "put it around demonstrations and question too (release: false)")
    demo_min_chars: int = option(0, "leave out demonstrations with a shorter solution (release: 58)")
    max_prompt_length: int = option(512, "longest prompt in tokens; questions beyond it are left out and counted")

    # Method: each part is its own switch, and those without a value are as --method says
    method: Literal["grpo", "luffy", "icpo", "icpo-rs"] = option("icpo", "preset of the parts below")
    off_policy: Literal["none", "demonstrations", "dataset"] | None = option(
        None, "where off-policy responses come from: nowhere, the policy with demonstrations in its context (IEF), or "
        "expert_response of the data (LUFFY) (default: of --method)")
    errs: bool | None = option(None, "drop off-policy responses outside the expert region, ERRS: true or false "
                               "(default: of --method)")
    rs: bool | None = option(None, "add the annealed bonus to accepted off-policy responses, RS: true or false "
                             "(default: of --method)")
    shaping: bool | None = option(None, "shape the off-policy ratio by f(x) = x/(x + lambda): true or false "
                                  "(default: of --method)")
    shaping_lambda: float | None = option(None, "lambda of f (default: of --method; paper 0.01, release and LUFFY 0.1)")
    off_policy_denominator: Literal["behaviour", "one"] | None = option(
        None, "denominator of the off-policy ratio: the demo-prefixed policy that sampled (paper), or 1 (release) "
        "(default: of --method)")
    num_demonstrations: int = option(1, "k, demonstrations before each off-policy prompt")
    n_on: int = option(8, "on-policy responses sampled for each question")
    n_off: int = option(1, "off-policy responses for each question")
    group: Literal["replace", "append"] = option(
        "replace", "accepted off-policy responses replace random on-policy ones, or join them (release, with --n-on 7)")
    delta: float = option(1.0, "ERRS accepts rewards of at least this")
    errs_strict: bool = option(False, "ERRS accepts rewards above delta only, as the paper prints it")
    alpha: float = option(1.0, "size of the bonus of RS")
    bonus_decay: Literal["linear", "cosine", "exponential"] = option("linear", "how the bonus of RS decays")
    bonus_steps: int = option(0, "T of RS, the step at which the bonus ends; 0 is --steps")

    # Objective
    clip_low: float = option(0.2, "epsilon below 1")
    clip_high: float = option(0.2, "epsilon above 1")
    clip_off_policy: bool = option(True, "clip the off-policy term too, after f (release: false)")
    dual_clip: float = option(0.0, "bound on the loss of negative advantages, above 1 (release: 3.0); 0 is off")
    log_ratio_clamp: float = option(0.0, "bound on the log-ratio (release: 20); 0 is none")
    normalizer: Literal["batch", "micro-batch"] = option(
        "batch", "Z counts the response tokens of the whole mini-batch, or of each micro-batch, then averaged (release; "
        "the update then depends on the micro-batch size)")
    advantage_eps: float = option(1e-6, "added to the standard deviation of a group")
    std_unbiased: bool = option(True, "standard deviation of a group with n-1 instead of n")
    kl_coef: float = option(0.001, "weight of the KL term to the initial model; 0 does without that model")
    old_logprobs: Literal["sampler", "recompute"] = option(
        "sampler", "old log-probabilities: those the sampler returned, or a second pass (release)")

    # Sampling
    temperature: float = option(1.0, "of the policy, in sampling and in the objective")
    top_p: float = option(1.0, "nucleus sampling; below 1 it needs --old-logprobs recompute")
    top_k: int = option(0, "sample among so many likeliest tokens; 0 is all; else it needs --old-logprobs recompute")
    max_new_tokens: int = option(48, "longest response in tokens")
    slots: int = option(0, "sequences that a process samples at the same time; 0 is as many as there are, but at most "
                        "256 and what fits in a third of the free memory")
    compile: bool = option(False, "put the decode step through torch.compile")

    # Optimisation
    steps: int = option(60, "training steps")
    batch_size: int = option(16, "questions a step, over all processes")
    mini_batch_size: int = option(0, "questions an optimiser update; 0 is the whole batch")
    shard_size: int = option(0, "processes that share one copy of the weights; 0 is all of them, the GPUs of a node keep "
                             "them off the network between nodes (HSDP)")
    micro_batch_tokens: int = option(4096, "tokens, prompts included, that a process puts through the model at the same time")
    learning_rate: float = option(5e-5, "of AdamW, constant")
    weight_decay: float = option(0.01, "of AdamW")
    grad_clip: float = option(1.0, "largest gradient norm")
    recompute_activations: Literal["none", "cheap", "all"] = option(
        "none", "activation checkpointing: the backward pass computes again, instead of keeping it, what is cheap (all but "
        "matrix products and attention), or all of a block but its input")
    compile_blocks: bool = option(False, "put the blocks through torch.compile for the pass that trains")
    optimizer_state: Literal["float32", "bfloat16", "cpu"] = option(
        "float32", "AdamW's two moments: as they are, in half the memory, or in the CPU's memory (for small GPUs)")
    offload_reference: bool = option(False, "keep the initial model of the KL term in the CPU's memory (for small GPUs)")
    max_skipped: int = option(3, "stop after so many steps in a row whose loss or gradient is not finite; such a step "
                              "leaves the weights alone and its batch in skipped-step-N.jsonl")

    # Evaluation on held-out problems
    eval_every: int = option(5, "evaluate every so many steps, before the first and after the last; 0 is never")
    eval_problems: int = option(0, "held-out problems to evaluate on; 0 is all")
    eval_samples: int = option(1, "answers to each")
    eval_temperature: float = option(1.0, "sampling temperature there; 0 is greedy")
    eval_top_p: float = option(1.0, "nucleus sampling there")
    eval_top_k: int = option(0, "sample among so many likeliest tokens there; 0 is all")

    # The run
    output_dir: str = option("", "folder of the run; by default runs/METHOD-seedN, numbered if that exists")
    resume: bool = option(False, "go on from the newest checkpoint of --output-dir, or of the newest run of that name")
    checkpoint_every: int = option(20, "write a checkpoint every so many steps; 0 is never")
    keep_checkpoints: int = option(2, "how many checkpoints to keep")
    log_questions: int = option(1, "questions a step whose responses go to samples.jsonl")
    reward: str = option("", REWARD_HELP)
    answer_format: Literal[FORMATS] = option("boxed", ANSWER_HELP)
    verify_timeout: float = option(5.0, "seconds after which the comparison of two answers counts as wrong")
    seed: int = option(0, "of the order of questions, demonstrations and sampling")
    dtype: Literal["float32", "bfloat16"] = option("float32", "to compute in; master weights are float32")
    device: str = option("auto", "auto (a GPU if there is one), cpu or cuda")


# Options that a resumed run may change: beyond rounding they move no number of the steps still to come.
FREE_ON_RESUME = {"steps", "output_dir", "resume", "checkpoint_every", "keep_checkpoints", "log_questions", "device", "slots",
                  "compile", "micro_batch_tokens", "eval_every", "shard_size", "recompute_activations", "compile_blocks",
                  "offload_reference", "max_skipped"}


def parse_options(arguments: list[str], saved: dict | None = None) -> Options:
    """`[config.yaml] --option value …`: what is typed goes over the file, and both over `saved`, the settings of a run
    that is resumed. Exits with status 2 and a message on an error."""
    parser = make_parser(Options, __doc__.split("\n")[0], prog="train.py",
                         usage="torchrun [--nproc-per-node N] train.py [config.yaml] [--option value ...]")
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        file = Path(arguments[0])
        if not file.is_file():
            parser.error(f"no configuration file at {file}")
        settings = yaml.safe_load(file.read_text()) or {}
        if not isinstance(settings, dict):
            parser.error(f"{file}: lines of the form 'option: value' were expected")
        for name in settings:
            if name not in Options.__dataclass_fields__:
                parser.error(f"{file}: unknown option {name!r}{did_you_mean(name, Options)}")
        arguments = _as_arguments(settings) + arguments[1:]
    return parse(parser, _as_arguments(saved or {}) + arguments)


def _as_arguments(settings: dict) -> list[str]:
    """Settings of a file as if they were typed, so that both pass the same checks; PyYAML reads 1e-6 as text, too."""
    return [f"--{name}={value}" for name, value in settings.items() if value is not None]


def resolve(options: Options) -> Options:
    """Fill in what --method and the other options imply. Raises ValueError for settings that do not fit together."""
    o, preset = options, METHODS[options.method]
    if (o.off_policy or preset["off_policy"]) == "none":   # ICPO − IEF: the parts that act on off-policy responses go, too
        for part in ("errs", "rs", "shaping"):
            _require(not getattr(o, part), f"--{part} true acts on off-policy responses, and there are none")
        preset = preset | dict(errs=False, rs=False, shaping=False)
    for name, value in preset.items():
        if getattr(o, name) is None:
            setattr(o, name, value)
    o.mini_batch_size = o.mini_batch_size or o.batch_size
    o.bonus_steps = o.bonus_steps or o.steps
    for name in ("n_on", "steps", "batch_size", "mini_batch_size", "max_new_tokens",
                 "max_prompt_length", "keep_checkpoints", "eval_samples", "bonus_steps", "max_skipped"):
        _require(getattr(o, name) >= 1, f"--{name.replace('_', '-')} must be at least 1, not {getattr(o, name)}")
    for name in ("n_off", "slots", "shard_size", "num_demonstrations", "eval_every", "eval_problems", "checkpoint_every",
                 "log_questions", "kl_coef", "weight_decay", "alpha", "demo_min_chars", "top_k", "eval_top_k",
                 "eval_temperature"):
        _require(getattr(o, name) >= 0, f"--{name.replace('_', '-')} must be at least 0, not {getattr(o, name)}")
    for name in ("learning_rate", "grad_clip", "temperature", "verify_timeout", "shaping_lambda"):
        _require(getattr(o, name) > 0, f"--{name.replace('_', '-')} must be above 0, not {getattr(o, name)}")
    _require(o.dual_clip == 0 or o.dual_clip > 1, f"--dual-clip must be 0 (off) or above 1, not {o.dual_clip}")
    _require(0 <= o.clip_low <= 1 and o.clip_high >= 0, f"--clip-low must be from 0 to 1 and --clip-high at least 0, "
             f"not {o.clip_low} and {o.clip_high}")
    if o.off_policy == "none":
        o.n_off = 0
    _require(o.off_policy == "none" or o.n_off, "--n-off 0 leaves no off-policy responses; that is --method grpo")
    _require(o.group == "append" or o.n_off <= o.n_on, f"--n-off {o.n_off} responses cannot replace --n-on {o.n_on}; "
             f"give at most as many, or --group append")
    _require(o.off_policy != "dataset" or o.off_policy_denominator == "one",
             "responses of a data set have no known behaviour policy: give --off-policy-denominator one")
    _require(o.off_policy != "dataset" or o.n_off == 1, f"a problem has one expert response: --n-off must be 1, "
             f"not {o.n_off}")
    _require(o.micro_batch_tokens >= o.max_prompt_length + o.max_new_tokens, f"--micro-batch-tokens {o.micro_batch_tokens} does "
             f"not hold one sequence of --max-prompt-length {o.max_prompt_length} and --max-new-tokens {o.max_new_tokens}")
    _require(o.old_logprobs == "recompute" or (o.top_p == 1 and o.top_k == 0), "with --top-p or --top-k the sampler's "
             "log-probabilities are not those of the policy in the objective: give --old-logprobs recompute")
    _require(o.batch_size % o.mini_batch_size == 0, f"a batch of {o.batch_size} questions does not divide into "
             f"mini-batches of {o.mini_batch_size}")
    _require(o.mini_batch_size % world_size() == 0, f"a mini-batch of {o.mini_batch_size} questions does not divide "
             f"among {world_size()} processes: give a multiple as --mini-batch-size (or --batch-size)")
    return options


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


# ---------------------------------------------------------------------------------------------------------------------
# Before the first step

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


def choose_folder(options: Options) -> tuple[Path, dict | None]:
    """The run's folder, and its saved settings if it is to be resumed. Never one that holds a run, unless resuming."""
    if options.output_dir:
        folder = Path(options.output_dir)
        taken = [folder] if (folder / "config.yaml").is_file() else []
        if taken and not options.resume:
            raise ValueError(f"{folder} already holds a run: go on with it (--resume) or give another --output-dir")
        if not taken and folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"{folder} holds files that are no run of this script; give another --output-dir")
    else:
        base, taken = Path("runs") / f"{options.method}-seed{options.seed}", []
        for number in itertools.count(1):
            folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
            if not folder.exists():
                break
            taken += [folder] if (folder / "config.yaml").is_file() else []
    if options.resume and taken:
        return taken[-1], yaml.safe_load((taken[-1] / "config.yaml").read_text())
    if options.resume:
        print(f"nothing to resume in {options.output_dir or 'runs'}: starting from the first step")
    return folder, None


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


def lock_folder(folder: Path) -> int | None:
    """Hold the run's folder until this process ends, however it ends. Raises ValueError if another one holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ValueError(f"{folder} is in use: another process is training there now") from None
    except OSError:   # not every network file system can
        os.close(lock)
        return None
    return lock


def write_settings(run: Run) -> None:
    """config.yaml, and the metrics and samples of the steps made so far, without those after the checkpoint."""
    settings = {name: value for name, value in asdict(run.options).items() if name not in ("resume", "output_dir")}
    replace_file(run.folder / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
    for name in ("metrics.jsonl", "samples.jsonl"):
        file = run.folder / name
        lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
        # A kill may have cut the last line short; it is of a step after the checkpoint, as the others dropped here.
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= run.start]
        replace_file(file, "".join(kept))


# ---------------------------------------------------------------------------------------------------------------------
# The optimiser

class AdamW(torch.optim.AdamW):
    """AdamW whose moments may rest in bfloat16 or in the CPU's memory, and come to their parameter, in float32, for its
    update alone.

    The second moment changes by a thousandth a step, which rounding to the nearest bfloat16 would always undo; so it is
    rounded up or down at random, such that the mean is right. The random numbers are a function of step and parameter."""

    def __init__(self, parameters, rest: str = "float32", **settings):
        super().__init__(parameters, fused=True, **settings)   # without copies of the weights' size
        self.rest = rest

    @torch.no_grad()
    def step(self, closure=None):
        if self.rest == "float32":
            return super().step(closure)
        group, = self.param_groups
        parameters = group["params"]
        try:
            for index, parameter in enumerate(parameters):
                state = self.state[parameter]
                for name in ("exp_avg", "exp_avg_sq"):
                    if name in state:
                        state[name] = state[name].to(device=parameter.device, dtype=torch.float32)
                group["params"] = [parameter]
                super().step()
                self.put_away(state, index)
        finally:
            group["params"] = parameters

    def put_away(self, state: dict, index: int) -> None:
        if self.rest == "cpu":
            state |= {name: state[name].cpu() for name in ("exp_avg", "exp_avg_sq") if name in state}
        elif self.rest == "bfloat16" and "exp_avg" in state:
            seed = (int(state["step"]) * 1_000_003 + index) % 2 ** 32   # of more bits the CPU's generator ignores the rest
            state |= {"exp_avg": state["exp_avg"].bfloat16(), "exp_avg_sq": round_at_random(state["exp_avg_sq"], seed)}

    def put_all_away(self) -> None:
        """After a checkpoint has been read, which brings all of them to their parameters."""
        for index, parameter in enumerate(self.param_groups[0]["params"]):
            self.put_away(self.state[parameter], index)


def round_at_random(x: torch.Tensor, seed: int) -> torch.Tensor:
    """float32 -> bfloat16, up or down with the probabilities that keep the mean. `x` may be sharded."""
    local = x.to_local() if isinstance(x, DTensor) else x
    if local.dtype == torch.float32:
        generator = torch.Generator(local.device).manual_seed(seed)
        noise = torch.randint(1 << 16, local.shape, generator=generator, device=local.device, dtype=torch.int32)
        local = ((local.contiguous().view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).bfloat16()
    if isinstance(x, DTensor):
        return DTensor.from_local(local, x.device_mesh, x.placements, shape=x.shape, stride=x.stride())
    return local


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: folders checkpoints/step-N, complete or not there

def save_checkpoint(run: Run, step: int) -> None:
    model_state, optimizer_state = get_state_dict(run.model, run.optimizer)
    aside, final = (run.folder / "checkpoints" / name for name in (f".step-{step}.partial", f"step-{step}"))
    if is_main():
        for leftover in (aside, final):   # of a run that was killed while it wrote
            shutil.rmtree(leftover, ignore_errors=True)
    barrier()
    try:
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=aside)
    except BaseException:   # a full disk, above all
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if is_main():
        aside.rename(final)
        for old in find_checkpoints(run.folder)[:-run.options.keep_checkpoints]:
            gone = old.with_name(f".{old.name}.partial")   # out of sight first: a half-deleted one must not look whole
            shutil.rmtree(gone, ignore_errors=True)
            old.rename(gone)
            shutil.rmtree(gone)
    barrier()


def find_checkpoints(folder: Path) -> list[Path]:
    """The complete ones, oldest first."""
    return sorted((folder / "checkpoints").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def load_checkpoint(run: Run) -> int:
    """Continue from the newest checkpoint, written by whatever number of processes; returns the steps it has made."""
    newest = on_main(lambda: (find_checkpoints(run.folder) or [None])[-1])
    if newest is None:
        _require(not (run.folder / "final").exists(), f"{run.folder} is a finished run without a checkpoint to go on from")
        return 0
    model_state, optimizer_state = get_state_dict(run.model, run.optimizer)
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=newest)
    set_state_dict(run.model, run.optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    run.optimizer.put_all_away()
    return int(newest.name.removeprefix("step-"))


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


def append(file: Path, objects: list[dict]) -> None:
    """A line of JSON for each, null for what is not finite."""
    objects = [{name: None if isinstance(value, float) and not math.isfinite(value) else value
                for name, value in each.items()} for each in objects]
    with file.open("a") as stream:
        stream.write("".join(json.dumps(each) + "\n" for each in objects))


def sample_records(run: Run, rows: list[Response], step: int) -> list[dict]:
    """What samples.jsonl keeps of a step: every response to its first questions."""
    return [{"step": step + 1, "problem": batch_problem(run, step, row.slot).problem, "off_policy": row.off_policy,
             "response": row.text, "reward": row.reward, "accepted": row.accepted, "in_group": row.keep,
             "advantage": row.advantage}
            for part in gather_objects([r for r in rows if r.slot < run.options.log_questions])
            for row in part]


@contextlib.contextmanager
def stop_on_signal(run: Run):
    """SIGTERM and SIGINT let the step finish; a second SIGINT, not the same one forwarded by torchrun, does not."""
    received = 0.0

    def handler(number, frame):
        nonlocal received
        if run.stop is None:
            run.stop, received = signal.Signals(number), time.monotonic()
            if is_main():
                tqdm.write(f"{run.stop.name}: finishing this step, then a checkpoint", file=sys.stderr)
        elif number == signal.SIGINT and time.monotonic() - received > 2:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class NotFinite(RuntimeError):
    """Several steps in a row had a loss or gradient that is not finite."""


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


def how_to_go_on(run: Run) -> str:
    processes = f"--nproc-per-node {world_size()} " if world_size() > 1 else ""
    return f"torchrun {processes}train.py --resume --output-dir {run.folder}"


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
