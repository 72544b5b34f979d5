"""The options of train.py and eval.py: their meaning, default, range, and the presets of --method.

An option is a field of a dataclass, declared by `option`. Its declaration is the only place that
names its range and says whether a run that is resumed may change it.
"""

import argparse
import difflib
import functools
import types
import typing
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

TINY = Path(__file__).resolve().parent / "tiny"
INSTRUCTION = r"Let's think step by step and output the final answer within \boxed{}."
GROUPS = ("Model and data", "Method (parts without a default are set by --method)", "Objective",
          "Sampling", "Optimisation", "Evaluation", "The run")   # the headings of --help
AnswerFormat = Literal["boxed", "gsm8k", "tags"]
DType = Literal["float32", "bfloat16"]


# --------------------------------------------------------------------------------------------------
# Declaring and parsing

def option(default, help: str, *, group: str = "options", at_least=None, above=None, at_most=None,
           free: bool = False) -> Any:
    """A dataclass field that becomes a command line option.

    group: the heading under which --help lists it. at_least, above, at_most: its range. free: a
    run or evaluation that goes on may change it.
    """
    if default not in (None, "", []):   # the help text says what these three stand for
        shown = default if isinstance(default, list) else [default]
        shown = " ".join(str(value).lower() if value in (True, False) else str(value)
                         for value in shown)
        help += f" (default: {shown})"
    metadata = dict(help=help, group=group, at_least=at_least, above=above, at_most=at_most,
                    free=free)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class OptionParser(argparse.ArgumentParser):
    """Parses a command line into a dataclass whose fields are declared by `option`.

    Names may be written with dashes or underscores. A bool takes true or false, or nothing for
    true. Errors exit with status 2 and a message.
    """

    def __init__(self, options: type, description: str, **more):
        super().__init__(description=description, allow_abbrev=False, **more)
        self.options, hints = options, typing.get_type_hints(options)
        titles = {each.metadata["group"] for each in fields(options)}
        groups = {title: self.add_argument_group(title)
                  for title in sorted(titles, key=[*GROUPS, *titles].index)}
        for each in fields(options):
            group = groups[each.metadata["group"]]
            default = each.default_factory() if callable(each.default_factory) else each.default
            group.add_argument(flag(each.name), default=default, help=each.metadata["help"],
                               **_how_to_read(hints[each.name]))
            if default is True:   # accepted, and left out of --help, which says what false means
                group.add_argument(f"--no-{flag(each.name)[2:]}", dest=each.name, default=default,
                                   action="store_false", help=argparse.SUPPRESS)

    def parse(self, arguments: Sequence[str]):
        def with_dashes(argument: str) -> str:
            name, equals, value = argument.partition("=")
            return name.replace("_", "-") + equals + value if name.startswith("--") else argument

        found, rest = self.parse_known_args([with_dashes(argument) for argument in arguments])
        if rest:
            self.error(f"unknown option {rest[0]}{did_you_mean(rest[0], self.options, '--')}")
        return self.options(**vars(found))


def _how_to_read(hint) -> dict:
    """The arguments of argparse's add_argument for a field of this type."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):   # X | None
        hint = next(each for each in typing.get_args(hint) if each is not type(None))
    if typing.get_origin(hint) is Literal:
        return {"choices": typing.get_args(hint)}
    if typing.get_origin(hint) is list:
        return {"nargs": "+", **_how_to_read(typing.get_args(hint)[0])}
    if hint is bool:
        return {"type": _true_or_false, "nargs": "?", "const": True, "metavar": "true|false"}
    return {"type": hint, "metavar": {int: "N", float: "X"}.get(hint, "TEXT")}


def _true_or_false(text: str) -> bool:
    if text.lower() in ("true", "yes", "t", "y", "1"):
        return True
    if text.lower() in ("false", "no", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"true or false was expected, not {text!r}")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def did_you_mean(word: str, options, prefix: str = "") -> str:
    word = word.lstrip("-").split("=")[0].replace("-", "_")
    close = difflib.get_close_matches(word, [each.name for each in fields(options)], 1)
    if not close:
        return ""
    return f"; did you mean {prefix}{close[0].replace('_', '-') if prefix else close[0]}?"


def require(condition, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_ranges(options) -> None:
    """Raises ValueError for a number outside the range that its option declares."""
    for each in fields(options):
        values, limits = getattr(options, each.name), each.metadata
        for value in values if isinstance(values, list) else [values]:
            for words, limit, holds in (
                    ("at least", limits["at_least"], lambda value, limit: value >= limit),
                    ("above", limits["above"], lambda value, limit: value > limit),
                    ("at most", limits["at_most"], lambda value, limit: value <= limit)):
                require(limit is None or value is None or holds(value, limit),
                        f"{flag(each.name)} must be {words} {limit}, not {value}")


def settings_that_stay(options) -> dict[str, Any]:
    """The options that a run or evaluation cannot change when it goes on, with their values."""
    free = {each.name for each in fields(options) if each.metadata["free"]}
    if getattr(options, "normalizer", "") == "micro-batch":   # the update then depends on it
        free -= {"micro_batch_tokens"}
    return {name: value for name, value in asdict(options).items() if name not in free}


def embedded(path: str, file: str) -> Path | str:
    """`path`, or a file of the embedded default where `path` is the word tiny."""
    return TINY / file if path == "tiny" else path


# --------------------------------------------------------------------------------------------------
# The options

_data, _method, _objective, _sampling, _optimisation, _evaluation, _run = (
    functools.partial(option, group=title) for title in GROUPS)


@dataclass
class SharedOptions:
    """Options of training and evaluation alike."""

    model: str = _data("tiny", "folder in Hugging Face format, hub name, or tiny (the embedded "
                      "default)")
    demonstrations: str = _data("tiny", "JSONL file of worked problems to draw demonstrations "
                                "from, or tiny")
    instruction: str = _data(INSTRUCTION, "text that ends every question")
    chat_template: bool = _data(True, "put the tokenizer's chat template around the plain "
                                "question")
    demo_chat_template: bool = _data(True, "put it around demonstrations and question too "
                                     "(release: false)")
    demo_min_chars: int = _data(0, "leave out demonstrations with a shorter solution (release: 58)",
                               at_least=0)
    max_prompt_length: int = _data(512, "longest prompt in tokens; questions beyond it are left "
                                   "out and counted", at_least=1)
    max_new_tokens: int = _sampling(48, "longest response in tokens", at_least=1)
    temperature: float = _sampling(1.0, "of the policy, in sampling and in the objective", above=0)
    top_p: float = _sampling(1.0, "nucleus sampling: keep the likeliest tokens that reach this "
                            "probability", above=0, at_most=1)
    top_k: int = _sampling(0, "sample among the k likeliest tokens; 0 is all", at_least=0)
    slots: int = _sampling(0, "sequences that a process samples at the same time; 0 is as many as "
                          "there are, but at most 256 and what fits in a third of the free memory",
                          at_least=0, free=True)
    reward: str = _run("", "FILE.py:FUNCTION, a reward of your own: (responses, problems) -> "
                          "list of numbers; by default right answers earn 1")
    answer_format: AnswerFormat = _run("boxed", "where the final answer of a response stands: "
                                          "in its last box, behind ####, or in <answer> tags")
    verify_timeout: float = _run(5.0, "seconds after which the comparison of two answers counts "
                                    "as wrong", above=0)
    seed: int = _run(0, "of the order of questions, demonstrations and sampling")
    dtype: DType = _run("float32", "to compute in; master weights are float32")
    device: str = _run("auto", "auto (a GPU if there is one), cpu or cuda", free=True)


@dataclass
class TrainingOptions(SharedOptions):
    """Options of train.py. A choice between the paper and its release defaults to the paper's."""

    train_data: str = _data("tiny", "JSONL file of problems to train on, or tiny")
    test_data: str = _data("tiny", "JSONL file of held-out problems, or tiny")

    method: Literal["grpo", "luffy", "icpo", "icpo-rs"] = _method(
        "icpo", "preset of the parts below")
    off_policy: Literal["none", "demonstrations", "dataset"] | None = _method(
        None, "source of off-policy responses: none, the policy with demonstrations in its context "
        "(IEF), or expert_response of the data (LUFFY)")
    errs: bool | None = _method(None, "drop off-policy responses outside the expert region, ERRS: "
                               "true or false")
    rs: bool | None = _method(None, "add the annealed bonus to accepted off-policy responses, RS: "
                             "true or false")
    shaping: bool | None = _method(None, "shape the off-policy ratio by f(x) = x/(x + lambda): "
                                   "true or false")
    shaping_lambda: float | None = _method(None, "lambda of f (paper 0.01; release and LUFFY 0.1)",
                                          above=0)
    off_policy_denominator: Literal["behaviour", "one"] | None = _method(
        None, "denominator of the off-policy ratio: the demo-prefixed policy that sampled (paper), "
        "or 1 (release)")
    num_demonstrations: int = _method(1, "k, demonstrations before each off-policy prompt",
                                     at_least=0)
    n_on: int = _method(8, "on-policy responses sampled for each question", at_least=1)
    n_off: int = _method(1, "off-policy responses for each question", at_least=0)
    group: Literal["replace", "append"] = _method(
        "replace", "accepted off-policy responses replace random on-policy ones, or join them "
        "(release, with --n-on 7)")
    delta: float = _method(1.0, "ERRS accepts rewards of at least this")
    errs_strict: bool = _method(False, "ERRS accepts only rewards above delta, as the paper prints "
                               "it")
    alpha: float = _method(1.0, "size of the bonus of RS", at_least=0)
    bonus_decay: Literal["linear", "cosine", "exponential"] = _method(
        "linear", "how the bonus of RS decays")
    bonus_steps: int = _method(0, "T of RS, the step at which the bonus ends; 0 is --steps",
                              at_least=0)

    clip_low: float = _objective(0.2, "epsilon below 1", at_least=0, at_most=1)
    clip_high: float = _objective(0.2, "epsilon above 1", at_least=0)
    clip_off_policy: bool = _objective(True, "clip the off-policy term too, after f (release: "
                                       "false)")
    dual_clip: float = _objective(0.0, "bound on the loss of negative advantages, above 1 "
                                  "(release: 3); 0 is off")
    log_ratio_clamp: float = _objective(0.0, "bound on the log-ratio (release: 20); 0 is none")
    normalizer: Literal["batch", "micro-batch"] = _objective(
        "batch", "Z counts the response tokens of the whole mini-batch, or of each micro-batch, "
        "then averaged (release; the update then depends on the micro-batch size)")
    advantage_eps: float = _objective(1e-6, "added to the standard deviation of a group")
    std_unbiased: bool = _objective(True, "standard deviation of a group with n-1 instead of n")
    kl_coef: float = _objective(0.001, "weight of the KL term to the initial model; 0 does without "
                               "that model", at_least=0)
    old_logprobs: Literal["sampler", "recompute"] = _objective(
        "sampler", "old log-probabilities: those the sampler returned, or a second pass (release)")

    top_p: float = _sampling(1.0, "nucleus sampling; below 1 it needs --old-logprobs recompute",
                            above=0, at_most=1)
    top_k: int = _sampling(0, "sample among the k likeliest tokens; 0 is all; else it needs "
                          "--old-logprobs recompute", at_least=0)
    compile: bool = _sampling(False, "put the decode step through torch.compile", free=True)

    steps: int = _optimisation(60, "training steps", at_least=1, free=True)
    batch_size: int = _optimisation(16, "questions a step, over all processes", at_least=1)
    mini_batch_size: int = _optimisation(0, "questions an optimiser update; 0 is the whole batch",
                                        at_least=0)
    shard_size: int = _optimisation(0, "processes that share one copy of the weights; 0 is all of "
                                   "them; the GPUs of a node keep weights off the network between "
                                   "nodes (HSDP)",
                                   at_least=0, free=True)
    micro_batch_tokens: int = _optimisation(4096, "tokens, prompts included, that a process puts "
                                           "through the model at the same time", free=True)
    learning_rate: float = _optimisation(5e-5, "of AdamW, constant", above=0)
    weight_decay: float = _optimisation(0.01, "of AdamW", at_least=0)
    grad_clip: float = _optimisation(1.0, "largest gradient norm", above=0)
    recompute_activations: Literal["none", "cheap", "all"] = _optimisation(
        "none", "activation checkpointing: the backward pass computes again what is cheap (all but "
        "matrix products and attention), or all of a block but its input, instead of keeping it",
        free=True)
    compile_blocks: bool = _optimisation(False, "put the blocks through torch.compile for the pass "
                                        "that trains", free=True)
    optimizer_state: Literal["float32", "bfloat16", "cpu"] = _optimisation(
        "float32", "AdamW's two moments: in float32, in half the memory, or in the CPU's memory "
        "(for small GPUs)")
    offload_reference: bool = _optimisation(False, "keep the initial model of the KL term in the "
                                           "CPU's memory (for small GPUs)", free=True)
    max_skipped: int = _optimisation(3, "stop after so many steps in a row whose loss or gradient "
                                    "is not finite; such a step leaves the weights alone and its "
                                    "batch in skipped-step-N.jsonl", at_least=1, free=True)

    eval_every: int = _evaluation(5, "evaluate on the held-out problems every so many steps, "
                                  "before the first and after the last; 0 is never", at_least=0,
                                  free=True)
    eval_problems: int = _evaluation(0, "held-out problems to evaluate on; 0 is all", at_least=0)
    eval_samples: int = _evaluation(1, "answers to each", at_least=1)
    eval_temperature: float = _evaluation(1.0, "sampling temperature there; 0 is greedy",
                                          at_least=0)
    eval_top_p: float = _evaluation(1.0, "nucleus sampling there", above=0, at_most=1)
    eval_top_k: int = _evaluation(0, "sample among the k likeliest tokens there; 0 is all",
                                 at_least=0)

    output_dir: str = _run("", "folder of the run; by default runs/METHOD-seedN, numbered if "
                              "that exists", free=True)
    resume: bool = _run(False, "go on from the newest checkpoint of --output-dir, or of the "
                           "newest run of the default name", free=True)
    checkpoint_every: int = _run(20, "write a checkpoint every so many steps; 0 is never",
                                    at_least=0, free=True)
    keep_checkpoints: int = _run(2, "how many checkpoints to keep", at_least=1, free=True)
    log_questions: int = _run(1, "questions a step whose responses go to samples.jsonl",
                                 at_least=0, free=True)


@dataclass
class EvaluationOptions(SharedOptions):
    """Options of eval.py."""

    model: str = _data("tiny", "folder in Hugging Face format, hub name, run of train.py, one of "
                      "its checkpoints, or tiny (the embedded default, untrained)")
    max_prompt_length: int = _data(4096, "longest prompt in tokens; problems beyond it are left "
                                   "out and counted", at_least=1)
    max_new_tokens: int = _sampling(0, "longest answer in tokens; 0 is 48 for tiny data, else 2048",
                                   at_least=0)
    temperature: float = _sampling(1.0, "sampling temperature; 0 is greedy", at_least=0, free=True)

    data: list[str] = _data(["tiny"], "JSONL files of problems, or tiny (the embedded held-out "
                           "ones)", free=True)
    shots: list[int] = _evaluation([0, 1], "numbers of demonstrations in the context; each is a "
                                   "row of the table", at_least=0, free=True)
    samples: int = _evaluation(1, "answers sampled for each problem (the k of avg@k and maj@k)",
                              at_least=1)
    k: list[int] = _evaluation([], "the k of pass@k, at most --samples; an answer that scores "
                               "above 0 passes (default: 1 and --samples)", free=True)
    limit: int = _evaluation(0, "use only the first so many problems; 0 uses all", at_least=0)
    compare_shots: bool = _evaluation(False, "the paper's pilot study, which says whether ICPO can "
                                     "help this model: compare answers without and with "
                                     "demonstrations, and at raised --temperatures, in words and a "
                                     "picture", free=True)
    temperatures: list[float] = _evaluation([1.2, 1.5], "those of --compare-shots", free=True)
    output: str = _run("", "file for every sample, and with .json for the table; samples of the "
                          "same settings that it holds are not sampled again (default: eval.jsonl, "
                          "numbered if that holds another evaluation)", free=True)


# --------------------------------------------------------------------------------------------------
# Training: presets, files of options, and what must fit together

_METHOD = dict(off_policy="demonstrations", errs=True, rs=False, shaping=True, shaping_lambda=0.01,
               off_policy_denominator="behaviour")
# The settings of each method, unless the option is given. icpo-rs is ICPO† of the paper;
# ICPO† − ERRS is icpo with --errs false.
METHODS = {
    "grpo": _METHOD | dict(off_policy="none", errs=False, shaping=False),
    "luffy": _METHOD | dict(off_policy="dataset", errs=False, shaping_lambda=0.1,
                            off_policy_denominator="one"),
    "icpo": _METHOD,
    "icpo-rs": _METHOD | dict(rs=True),
}


def parse_training(arguments: Sequence[str], saved: dict | None = None) -> TrainingOptions:
    """Reads `[config.yaml] --option value …`; `saved` are the settings of a run that is resumed.

    The command line goes before the file, and both before `saved`. Exits with status 2 and a
    message on an error.
    """
    parser = OptionParser(TrainingOptions, "Trains a model with ICPO, GRPO or LUFFY.",
                          prog="train.py", usage="torchrun [--nproc-per-node N] train.py "
                          "[config.yaml] [--option value ...]")
    arguments = list(arguments)
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        file = Path(arguments[0])
        if not file.is_file():
            parser.error(f"no configuration file at {file}")
        settings = yaml.safe_load(file.read_text()) or {}
        if not isinstance(settings, dict):
            parser.error(f"{file}: lines of the form 'option: value' were expected")
        for name in settings:
            if name not in TrainingOptions.__dataclass_fields__:
                parser.error(f"{file}: unknown option {name!r}"
                             f"{did_you_mean(name, TrainingOptions)}")
        arguments = _as_arguments(settings) + arguments[1:]
    return parser.parse(_as_arguments(saved or {}) + arguments)


def _as_arguments(settings: dict) -> list[str]:
    """Settings of a file as typed arguments: they pass the same checks, and 1e-6, which PyYAML
    reads as text, becomes a number."""
    return [f"{flag(name)}={value}" for name, value in settings.items() if value is not None]


def resolve(options: TrainingOptions, processes: int = 1) -> TrainingOptions:
    """Fills in, in place, what --method and other options imply, for this number of processes.

    Raises ValueError for a number out of range and for settings that do not fit together.
    """
    o, preset = options, METHODS[options.method]
    if (o.off_policy or preset["off_policy"]) == "none":   # ICPO − IEF
        for part in ("errs", "rs", "shaping"):
            require(not getattr(o, part),
                    f"--{part} true acts on off-policy responses, and there are none")
        preset = preset | dict(errs=False, rs=False, shaping=False)
    for name, value in preset.items():
        if getattr(o, name) is None:
            setattr(o, name, value)
    check_ranges(o)
    o.mini_batch_size = o.mini_batch_size or o.batch_size
    o.bonus_steps = o.bonus_steps or o.steps
    require(o.dual_clip == 0 or o.dual_clip > 1,
            f"--dual-clip must be 0 (off) or above 1, not {o.dual_clip}")
    if o.off_policy == "none":
        o.n_off = 0
    require(o.off_policy == "none" or o.n_off,
            "--n-off 0 leaves no off-policy responses; that is --method grpo")
    require(o.group == "append" or o.n_off <= o.n_on,
            f"--n-off {o.n_off} responses cannot replace --n-on {o.n_on}; give at most as many, or "
            f"--group append")
    require(o.off_policy != "dataset" or o.off_policy_denominator == "one",
            "responses of a data set have no known behaviour policy: give "
            "--off-policy-denominator one")
    require(o.off_policy != "dataset" or o.n_off == 1,
            f"a problem has one expert response: --n-off must be 1, not {o.n_off}")
    require(o.micro_batch_tokens >= o.max_prompt_length + o.max_new_tokens,
            f"--micro-batch-tokens {o.micro_batch_tokens} does not hold one sequence of "
            f"--max-prompt-length {o.max_prompt_length} and --max-new-tokens {o.max_new_tokens}")
    require(o.old_logprobs == "recompute" or (o.top_p == 1 and o.top_k == 0),
            "with --top-p or --top-k the sampler's log-probabilities are not those of the policy "
            "in the objective: give --old-logprobs recompute")
    require(o.batch_size % o.mini_batch_size == 0,
            f"a batch of {o.batch_size} questions does not divide into mini-batches of "
            f"{o.mini_batch_size}")
    require(o.mini_batch_size % processes == 0,
            f"a mini-batch of {o.mini_batch_size} questions does not divide among {processes} "
            f"processes: give a multiple as --mini-batch-size (or --batch-size)")
    return options
