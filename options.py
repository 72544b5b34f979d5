"""The options of train.py and eval.py: what each means, its default, presets of the methods, and checks."""

import argparse
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import yaml
from transformers import HfArgumentParser

from data import INSTRUCTION
from distributed import world_size
from reward import FORMATS

TINY = Path(__file__).resolve().parent / "tiny"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


REWARD_HELP = "FILE.py:FUNCTION, a reward of your own: (responses, problems) -> list of numbers; by default right answers earn 1"
ANSWER_HELP = "where the final answer of a response stands: in its last box, behind ####, or in <answer> tags"


def embedded(path: str, file: str) -> Path | str:
    """`path`, where the word tiny stands for a file of the embedded default."""
    return TINY / file if path == "tiny" else path


def option(default, help: str, **more):
    """A dataclass field that HfArgumentParser turns into a command line option."""
    if default not in (None, "", []):   # those two stand for something that the help text explains
        help += " (default: %(default)s)"
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help, **more})
    return field(default=default, metadata={"help": help, **more})


def make_parser(options: type, description: str, **more) -> HfArgumentParser:
    parser = HfArgumentParser(options, description=description, allow_abbrev=False,
                              formatter_class=argparse.HelpFormatter, **more)
    for action in parser._actions:   # --no-x, which it adds to every --x that is on by default, with the help of --x
        if action.option_strings[0].startswith("--no_"):
            action.help = argparse.SUPPRESS
    return parser


def parse(parser: HfArgumentParser, arguments: list[str]):
    """The options as a dataclass; exits with status 2 and a message for one that does not exist."""
    options, rest = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True, look_for_args_file=False)
    if rest:
        parser.error(f"unknown option {rest[0]}{did_you_mean(rest[0], type(options), '--')}")
    return options


def did_you_mean(word: str, options: type, prefix: str = "") -> str:
    close = difflib.get_close_matches(word.lstrip("-").split("=")[0].replace("-", "_"), options.__dataclass_fields__, 1)
    return f"; did you mean {prefix}{close[0].replace('_', '-') if prefix else close[0]}?" if close else ""


DESCRIPTION = "Trains a model with ICPO, GRPO or LUFFY."
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
class TrainingOptions:
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


def parse_options(arguments: list[str], saved: dict | None = None) -> TrainingOptions:
    """`[config.yaml] --option value …`: what is typed goes over the file, and both over `saved`, the settings of a run
    that is resumed. Exits with status 2 and a message on an error."""
    parser = make_parser(TrainingOptions, DESCRIPTION.split("\n")[0], prog="train.py",
                         usage="torchrun [--nproc-per-node N] train.py [config.yaml] [--option value ...]")
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        file = Path(arguments[0])
        if not file.is_file():
            parser.error(f"no configuration file at {file}")
        settings = yaml.safe_load(file.read_text()) or {}
        if not isinstance(settings, dict):
            parser.error(f"{file}: lines of the form 'option: value' were expected")
        for name in settings:
            if name not in TrainingOptions.__dataclass_fields__:
                parser.error(f"{file}: unknown option {name!r}{did_you_mean(name, TrainingOptions)}")
        arguments = _as_arguments(settings) + arguments[1:]
    return parse(parser, _as_arguments(saved or {}) + arguments)


def _as_arguments(settings: dict) -> list[str]:
    """Settings of a file as if they were typed, so that both pass the same checks; PyYAML reads 1e-6 as text, too."""
    return [f"--{name}={value}" for name, value in settings.items() if value is not None]


def resolve(options: TrainingOptions) -> TrainingOptions:
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


@dataclass
class EvaluationOptions:
    model: str = option("tiny", "folder in Hugging Face format, hub name, run of train.py, one of its checkpoints, or tiny "
                        "(the embedded default, untrained)")
    data: list[str] = option(["tiny"], "JSONL files of problems, or tiny (the embedded held-out ones)")
    demonstrations: str = option("tiny", "JSONL file of worked problems to draw demonstrations from, or tiny")
    shots: list[int] = option([0, 1], "numbers of demonstrations in the context, a row of the table each")
    compare_shots: bool = option(False, "the paper's pilot study, which says whether ICPO can help this model: compare answers "
                                 "without and with demonstrations, and at raised --temperatures, in words and a picture")
    temperatures: list[float] = option([1.2, 1.5], "those of --compare-shots")
    samples: int = option(1, "answers sampled for each problem (the k of avg@k and maj@k)")
    k: list[int] = option([], "the k of pass@k, at most --samples; an answer that scores above 0 passes (default: 1 and --samples)")
    limit: int = option(0, "use only the first so many problems; 0 uses all")
    temperature: float = option(1.0, "sampling temperature; 0 is greedy")
    top_p: float = option(1.0, "nucleus sampling: the likeliest tokens that reach this probability")
    top_k: int = option(0, "sample among so many likeliest tokens; 0 is all")
    max_prompt_length: int = option(4096, "longest prompt in tokens; problems beyond it are left out and counted")
    max_new_tokens: int = option(0, "longest answer in tokens; 0 is 48 for tiny data, else 2048")
    instruction: str = option(INSTRUCTION, "text that ends every question")
    chat_template: bool = option(True, "put the tokenizer's chat template around the plain question")
    demo_chat_template: bool = option(True, "put it around demonstrations and question too")
    demo_min_chars: int = option(0, "leave out demonstrations with a shorter solution (the authors' release: 58)")
    output: str = option("", "file for every sample, and with .json for the table; what is there of the same settings is not "
                         "sampled again (default: eval.jsonl, numbered if that holds another evaluation)")
    slots: int = option(0, "sequences that a process samples at the same time; 0 is as many as there are, but at most "
                        "256 and what fits in a third of the free memory")
    reward: str = option("", REWARD_HELP)
    answer_format: str = option("boxed", ANSWER_HELP, choices=list(FORMATS))
    verify_timeout: float = option(5.0, "seconds after which the comparison of two answers counts as wrong")
    seed: int = option(0, "of sampling and of the draw of demonstrations")
    dtype: str = option("float32", "to compute in", choices=list(DTYPES))
    device: str = option("auto", "auto (a GPU if there is one), cpu or cuda")


# What one evaluation may change and still be the same.
FREE_IN_EVALUATION = {"data", "shots", "output", "slots", "device", "k", "temperature", "temperatures", "compare_shots"}
