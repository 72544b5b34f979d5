"""The options of train.py and eval.py: their meaning, default, range, and the presets of --method.

An option is a field of a dataclass, declared by `option`. Its type names its range, and its
declaration says whether a run that is resumed may change it.
"""

import argparse
import atexit
import difflib
import functools
import gc
import json
import math
import os
import re
import sys
import time
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn

import yaml

from datafiles import FIELDS, KNOWN, SOURCES

TINY = Path(__file__).resolve().parent / "tiny"
INSTRUCTION = r"Let's think step by step and output the final answer within \boxed{}."
GROUPS = ("Model and data", "Method (parts without a default are set by --method)", "Objective",
          "Sampling", "Optimisation", "Evaluation", "The run")   # the headings of --help


class Range(NamedTuple):
    words: str
    holds: Callable[[Any], bool]


Count = Annotated[int, Range("at least 1", lambda x: x >= 1)]
Natural = Annotated[int, Range("at least 0", lambda x: x >= 0)]
NotNegative = Annotated[float, Range("at least 0", lambda x: x >= 0)]
Positive = Annotated[float, Range("above 0", lambda x: x > 0)]
# Logits divided by a lower temperature would overflow.
Temperature = Annotated[float, Range("above 0, from 1e-6 on", lambda x: x >= 1e-6)]
TemperatureOrZero = Annotated[float, Range("at least 0, and 0 or from 1e-6 on",
                                           lambda x: x == 0 or x >= 1e-6)]
Share = Annotated[float, Range("above 0 and at most 1", lambda x: 0 < x <= 1)]
FromZeroToOne = Annotated[float, Range("from 0 to 1", lambda x: 0 <= x <= 1)]
BelowOne = Annotated[float, Range("at least 0 and below 1", lambda x: 0 <= x < 1)]
ZeroOrAboveOne = Annotated[float, Range("0 (off) or above 1", lambda x: x == 0 or x > 1)]
AnswerFormat = Literal["boxed", "gsm8k", "tags"]
DType = Literal["float32", "bfloat16"]
DemoFormat = Literal["one-turn", "turns", "text"]


# --------------------------------------------------------------------------------------------------
# Declaring and parsing

def option(default, help: str, *, group: str = "options", free: bool = False) -> Any:
    """A dataclass field that becomes a command line option under the heading `group` of --help.

    free: a run that is resumed may change it, since that does not affect the remaining steps, apart
    from rounding; so may an evaluation that goes on.
    """
    values = default if isinstance(default, list) else [default]
    if values and values[0] not in (None, ""):   # the help text says what these stand for
        help += f" (default: {shown(values)})"
    return field(default_factory=lambda: list(default) if isinstance(default, list) else default,
                 metadata=dict(help=help, group=group, free=free))


def shown(value) -> str:
    """A value as it is typed on the command line."""
    if isinstance(value, list):
        return " ".join(map(shown, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


LITERAL = "\0"   # it begins a value of a list that argparse must not take for an option


class OptionParser(argparse.ArgumentParser):
    """Parses a command line into a dataclass whose fields are declared by `option`.

    Names may be written with dashes or underscores. A bool takes true or false, or nothing for
    true. Errors exit with status 2 and a message.
    """

    def __init__(self, options: type, description: str, **more):
        super().__init__(description=description, allow_abbrev=False, **more)
        self.options, hints, defaults = options, typing.get_type_hints(options), options()
        titles = {each.metadata["group"] for each in fields(options)}
        groups = {title: self.add_argument_group(title)
                  for title in sorted(titles, key=[*GROUPS, *titles].index)}
        for each in fields(options):
            group, default = groups[each.metadata["group"]], getattr(defaults, each.name)
            group.add_argument(flag(each.name), default=default, help=each.metadata["help"],
                               **_how_to_read(hints[each.name]))
            if default is True:   # accepted, but not listed: --help shows true|false
                group.add_argument(f"--no-{flag(each.name)[2:]}", dest=each.name, default=default,
                                   action="store_false", help=argparse.SUPPRESS)

    def error(self, message: str) -> NoReturn:
        end_with_mistake(self.prog, message)

    def parse(self, arguments: Sequence[str]) -> Any:
        def with_dashes(argument: str) -> str:
            name, equals, value = argument.partition("=")
            dashes = name.replace("_", "-")
            return dashes + equals + value if dashes in self._option_string_actions else argument

        found, rest = self.parse_known_args(list(map(with_dashes, arguments)))
        for file in (each for each in rest if each.endswith((".yaml", ".yml"))):
            self.error(f"a configuration file comes first: {self.prog} {file} --option value")
        if rest:
            self.error(f"unknown option {rest[0]}{did_you_mean(rest[0], self.options, '--')}")
        return self.options(**vars(found))


def _how_to_read(hint) -> dict:
    """The arguments of argparse's add_argument for a field of this type."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):   # X | None
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) is Literal:
        return {"choices": typing.get_args(hint)}
    if typing.get_origin(hint) is list:
        how = _how_to_read(typing.get_args(hint)[0])
        kind = how.get("type", str)
        read = functools.wraps(kind)(lambda text: kind(text.removeprefix(LITERAL)))
        return {"nargs": "+", **how, "type": read}
    if hint is bool:
        return {"type": _true_or_false, "nargs": "?", "const": True, "metavar": "true|false"}
    return {"type": hint, "metavar": {int: "N", float: "X"}.get(hint, "TEXT")}


def _true_or_false(text: str) -> bool:
    if text.lower() not in ("true", "yes", "t", "y", "1", "false", "no", "f", "n", "0"):
        raise argparse.ArgumentTypeError(f"true or false was expected, not {text!r}")
    return text.lower() in ("true", "yes", "t", "y", "1")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# What other trainers call these options.
_ELSEWHERE = {"num_generations": "n_on", "max_completion_length": "max_new_tokens",
              "beta": "kl_coef", "num_train_epochs": "steps", "max_steps": "steps",
              "per_device_train_batch_size": "batch_size", "train_batch_size": "batch_size",
              "val_data": "test_data", "val_files": "test_data", "train_files": "train_data",
              "lr": "learning_rate", "max_grad_norm": "grad_clip", "epsilon": "clip_low",
              "epsilon_high": "clip_high", "model_name_or_path": "model"}


def did_you_mean(word: str, options, prefix: str = "") -> str:
    word = word.lstrip("-").split("=")[0].replace("-", "_")
    names = [each.name for each in fields(options)]
    close = [_ELSEWHERE[word]] if _ELSEWHERE.get(word) in names else (
        difflib.get_close_matches(word, names, 1))
    shown = [flag(name)[2:] if prefix else name for name in close]
    return f"; did you mean {prefix}{shown[0]}?" if shown else ""


def begin_imports() -> None:
    """Switches garbage collection off until runs.begin_program, and at exit.

    It also makes Ctrl-C end in a word, and ends the program on Windows, which lacks fork and file
    locks. The imports make many objects and no garbage, which Python would search at exit.
    """
    if os.name == "nt":
        sys.exit("Windows is not supported; WSL, the Linux system in Windows, is")
    gc.disable()
    atexit.register(gc.freeze)
    usual = sys.excepthook

    def say_interrupted(kind, error, trace):
        if issubclass(kind, KeyboardInterrupt):
            print("interrupted", file=sys.stderr)
        else:
            usual(kind, error, trace)

    sys.excepthook = say_interrupted


def end_with_mistake(program: str, message: object) -> NoReturn:
    """Says what the user did wrong, once for all processes, and exits with status 2.

    torchrun ends the other processes when the first has ended, prints pages of its own, and at
    their end the message once more. A mistake on another machine than rank 0's is said by that one.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(8)   # rank 0 may have found the same
    text = f"{program}: error: {message}"
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        more = {"py_callstack": text, "timestamp": str(int(time.time()))}
        Path(file).write_text(json.dumps({"message": {"message": text, "extraInfo": more}}),
                              encoding="utf-8")
    print(text, file=sys.stderr)
    sys.exit(2)


def require(condition, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_ranges(options) -> None:
    """Raises ValueError for a value outside the range that its option declares, inf, nan, and bytes
    that are no text."""
    def range_of(hint) -> Range | None:
        if hasattr(hint, "__metadata__"):
            return hint.__metadata__[0]
        return next(filter(None, map(range_of, typing.get_args(hint))), None)

    for name, hint in typing.get_type_hints(type(options), include_extras=True).items():
        values, limits = getattr(options, name), range_of(hint)
        for value in values if isinstance(values, list) else [values]:
            # Python keeps bytes of the command line that its encoding lacks as surrogates.
            require(not isinstance(value, str) or not re.search("[\ud800-\udfff]", value),
                    f"{flag(name)} {ascii(value)} holds what is no text in "
                    f"{sys.getfilesystemencoding()}, the encoding of this system"
                    + "; set PYTHONUTF8=1" * (sys.getfilesystemencoding() != "utf-8"))
            require(not isinstance(value, float) or math.isfinite(value),
                    f"{flag(name)} must be a finite number, not {value}")
            require(limits is None or value is None or limits.holds(value),
                    f"{flag(name)} must be {limits and limits.words}, not {value}")


def settings_that_stay(options) -> dict[str, Any]:
    """The options that a run or evaluation cannot change when it goes on, with their values."""
    free = {each.name for each in fields(options) if each.metadata["free"]}
    if getattr(options, "normalizer", "") == "micro-batch":   # the update then depends on it
        free -= {"micro_batch_tokens"}
    return {name: value for name, value in asdict(options).items() if name not in free}


def absolute(path: str) -> str:
    """The path from the root where it names what is there, else as it is: a hub name, or tiny."""
    name, colon, rest = path.partition(":")
    there = name and name not in ("tiny", *KNOWN) and Path(name).exists()
    return str(Path(name).absolute()) + colon + rest if there else path


def without_folders(setting):
    """A path without its folders, which may name a user; all else as it is."""
    if isinstance(setting, list):
        return [without_folders(each) for each in setting]
    is_path = isinstance(setting, str) and setting.startswith("/")
    return Path(setting).name if is_path else setting


def read_old_names(options: "SharedOptions") -> None:
    """Resolves an option that was given by an earlier name, in place."""
    if options.demo_chat_template is not None:
        options.demo_format = "one-turn" if options.demo_chat_template else "text"
        options.demo_chat_template = None


def with_absolute_paths(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run as they hold in any folder."""
    paths: dict[str, Any] = {
        name: absolute(settings[name])
        for name in ("model", "train_data", "demonstrations") if name in settings}
    paths["test_data"] = list(map(absolute, settings.get("test_data", [])))
    file, colon, function = settings.get("reward", "").rpartition(":")
    return settings | paths | ({"reward": absolute(file) + colon + function} if colon else {})


def embedded(path: str, file: str) -> str:
    """`path`, or a file of the embedded model where `path` is the word tiny."""
    return str(TINY / file) if path == "tiny" else path


def pairs(text: str, name: str) -> dict[str, str]:
    """Reads "a=b,c=d", the value of an option of this name. Raises ValueError for another form."""
    found = {}
    for part in filter(None, map(str.strip, text.split(","))):
        key, _, value = part.partition("=")
        found[key] = value
    require(all(found) and all(found.values()),
            f"{flag(name)} {text!r} is not of the form NAME=VALUE,NAME=VALUE")
    return found


def read_columns(text: str) -> dict[str, str]:
    """Reads --columns."""
    found = pairs(text, "columns")
    require(set(found) <= set(FIELDS), f"--columns {text}: the names before = are "
            f"{', '.join(FIELDS)}; behind it stand the columns of the data")
    return found


def template_arguments(text: str) -> dict[str, Any]:
    """Reads --template-args. Values that are JSON, such as false and 3, are not left as text."""
    def value(text: str) -> Any:
        try:
            return json.loads(text)
        except ValueError:
            return text

    return {name: value(each) for name, each in pairs(text, "template_args").items()}


def stop_strings(options: "SharedOptions") -> tuple[str, ...] | None:
    """Reads --stop; None is auto. Raises ValueError where auto or none is not the only word."""
    words = options.stop
    require(len(words) == 1 or not {"auto", "none"} & set(words),
            f"--stop {' '.join(words)}: auto and none stand alone")
    return {"auto": None, "none": ()}.get(words[0], tuple(
        each.replace("\\n", "\n").replace("\\t", "\t") for each in words))


# --------------------------------------------------------------------------------------------------
# The options

_data, _method, _loss, _sample, _optim, _eval, _run = (
    functools.partial(option, group=title) for title in GROUPS)


@dataclass
class SharedOptions:
    """Options of training and evaluation alike."""

    model: str = _data("tiny", "Hugging Face folder, hub name, run of train.py, one of its "
                       "checkpoints, or tiny (the embedded model)")
    demonstrations: str = _data("tiny", "worked problems to draw from: a data set, or tiny")
    columns: str = _data("", "columns of data sets without a short name, if they are others than "
                         "known forms have: problem=question,answer=final.text")
    answer_lists: Literal["any", "all"] = _data(
        "any", "of an answer that is a list, any is right, or only all of them together")
    instruction: str = _data(INSTRUCTION, "text that ends every question")
    system: str = _data("", "text of a system turn before every prompt that has the template")
    template_args: str = _data(
        "", "arguments of the chat template: enable_thinking=false,NAME=VALUE")
    chat_template: bool = _data(True, "put the tokenizer's chat template around the plain question")
    demo_format: Literal["auto", "turns", "one-turn", "text"] = _data(
        "auto", "demonstrations and question: each demonstration a user's and an assistant's turn "
        "of the template; all in one user turn; or text without the template (release). auto is "
        "the form of the run that made the model, else that of its generation_config.json, else "
        "turns; one-turn for templates without such turns; text with --chat-template false")
    demo_chat_template: bool | None = _data(
        None, "earlier name: true is --demo-format one-turn, false is --demo-format text",
        free=True)
    demo_min_chars: Natural = _data(
        0, "leave out demonstrations with a shorter solution (release: 58)")
    max_prompt_length: Count = _data(
        512, "longest prompt in tokens; questions beyond it are left out and counted")
    max_new_tokens: Natural = _sample(
        0, "longest response in tokens; 0 is max_new_tokens of the model's generation_config.json "
        "(48 for the embedded model), else 2048, or fewer if the model has fewer positions")
    temperature: Temperature = _sample(1.0, "of the policy, in sampling and in the objective")
    top_p: Share = _sample(1.0, "keep the likeliest tokens that reach this probability; below 1, "
                           "training needs --old-logprobs recompute")
    top_k: Natural = _sample(0, "sample among the k likeliest tokens; 0 is all, and with another "
                             "number training needs --old-logprobs recompute")
    stop: list[str] = _sample(
        ["auto"], "texts that end a response, which is what stands before the first of them; \\n "
        "is a line break; none is no such text; auto is the separator of demonstrations, "
        "\\n\\n\\n, for responses to raw text (to a question with --chat-template false, to "
        "demonstrations with --demo-format text), and none for others")
    slots: Natural = _sample(
        0, "sequences that a process samples at the same time; 0 is as many as there are, but at "
        "most 256 and what fits in the free memory", free=True)
    reward: str = _run("", "FILE.py:FUNCTION, a reward of your own: (responses, problems) -> list "
                       "of numbers; by default right answers earn 1")
    answer_format: AnswerFormat = _run(
        "boxed", "the final answer of a response stands in its last box, behind ####, or in "
        "<answer> tags")
    verify_timeout: Positive = _run(
        5.0, "seconds after which the comparison of two answers counts as wrong")
    reward_timeout: Positive = _run(
        600.0, "seconds after which a call of a --reward of your own ends the run", free=True)
    seed: int = _run(0, "of every random choice: questions, demonstrations, sampling")
    dtype: DType = _run("float32", "to compute in; in training, master weights are float32")
    device: Literal["auto", "cpu", "cuda"] = _run(
        "auto", "auto is a GPU if there is one, else the CPU", free=True)


@dataclass
class TrainingOptions(SharedOptions):
    """Options of train.py. A choice between the paper and its release defaults to the paper's, but
    for demo_format."""

    train_data: str = _data("tiny", f"problems to train on: {SOURCES}, or tiny")
    test_data: list[str] = _data(["tiny"], "held-out problems: one data set or several, or tiny")

    method: Literal["grpo", "luffy", "luffy-release", "icpo", "icpo-rs"] = _method(
        "icpo", "preset of the parts below; luffy-release also sets what LUFFY's scripts set")
    off_policy: Literal["none", "demonstrations", "dataset"] | None = _method(
        None, "source of off-policy responses: none, the policy with demonstrations in its context "
        "(IEF), or expert_response of the data (LUFFY)")
    errs: bool | None = _method(None, "drop off-policy responses outside the expert region, ERRS")
    rs: bool | None = _method(
        None, "add the annealed bonus to off-policy responses in the expert region, RS")
    shaping: bool | None = _method(None, "shape the off-policy ratio by f(x) = x/(x + lambda)")
    shaping_lambda: Positive | None = _method(
        None, "lambda of f (paper 0.01; release and LUFFY 0.1)")
    off_policy_denominator: Literal["behaviour", "one"] | None = _method(
        None, "denominator of the off-policy ratio: the demo-prefixed policy that sampled (paper), "
        "or 1 (release)")
    num_demonstrations: Natural = _method(1, "k, demonstrations before each off-policy prompt")
    n_on: Count = _method(8, "on-policy responses sampled for each question")
    n_off: Natural = _method(1, "off-policy responses for each question")
    off_policy_when: Literal["always", "all-wrong"] = _method(
        "always", "for every question, or only where all plain responses are wrong, as Guide-GRPO "
        "does, which samples fewer tokens")
    group: Literal["replace", "append"] = _method(
        "replace", "accepted off-policy responses replace random on-policy ones, or join them "
        "(release, with --n-on 7)")
    delta: float = _method(1.0, "ERRS accepts rewards of at least this; with RS it must lie above "
                           "the reward of a wrong response")
    errs_strict: bool = _method(
        False, "ERRS accepts only rewards above delta, as the paper printed it before v3")
    alpha: NotNegative = _method(1.0, "size of the bonus of RS")
    bonus_decay: Literal["linear", "cosine", "exponential"] = _method(
        "linear", "how the bonus of RS decays")
    bonus_steps: Natural = _method(0, "T of RS, the step at which the bonus ends; 0 is --steps")

    clip_low: FromZeroToOne = _loss(0.2, "epsilon of (CLIP) for ratios below 1")
    clip_high: NotNegative = _loss(0.2, "epsilon of (CLIP) for ratios above 1")
    clip_off_policy: bool = _loss(True, "clip the off-policy term too, after f (release: false)")
    dual_clip: ZeroOrAboveOne = _loss(
        0.0, "bound on the loss of negative advantages (release: 3); 0 is off")
    log_ratio_clamp: NotNegative = _loss(
        0.0, "bound on the log-ratio (release: 20); 0 is 79, which float32 holds")
    normalizer: Literal["batch", "micro-batch"] = _loss(
        "batch", "Z counts the response tokens of the whole mini-batch, or of each micro-batch, "
        "then averaged (release; the update then depends on the micro-batch size)")
    loss_aggregation: Literal["tokens", "sequences", "fixed"] = _loss(
        "tokens", "the loss is a mean over response tokens, a mean over responses of their means "
        "(release for 8B, whose micro-batches are single responses), or a sum over tokens divided "
        "by responses times --max-new-tokens (Dr. GRPO, LUFFY)")
    mask_truncated: bool = _loss(
        False, "responses that are cut off leave the loss, but not their group (DAPO)")
    entropy_coef: NotNegative = _loss(
        0.0, "weight of an entropy bonus, averaged as the loss is (LUFFY and the release, but "
        "for its GRPO: 0.001)")
    advantage_std: bool = _loss(
        True, "divide advantages by the group's standard deviation (Dr. GRPO, LUFFY: false)")
    advantage_eps: NotNegative = _loss(1e-6, "added to the standard deviation of a group")
    std_unbiased: bool = _loss(True, "standard deviation of a group with n-1 instead of n")
    kl_coef: NotNegative = _loss(
        0.001, "weight of the KL term to the initial model; 0 does without that model")
    old_logprobs: Literal["sampler", "recompute"] = _loss(
        "sampler", "old log-probabilities: those the sampler returned, or a second pass (release)")

    compile: bool = _sample(False, "put the decode step through torch.compile", free=True)

    steps: Count = _optim(60, "training steps", free=True)
    batch_size: Count = _optim(16, "questions a step, over all processes")
    mini_batch_size: Natural = _optim(0, "questions an optimiser update; 0 is the whole batch")
    shard_size: Natural = _optim(
        0, "processes that share one copy of the weights; 0 is all of them; with the GPUs of a "
        "node no weights travel between nodes (HSDP)", free=True)
    micro_batch_tokens: Count = _optim(
        4096, "tokens, prompts included, that a process puts through the model at the same time",
        free=True)
    learning_rate: Positive = _optim(5e-5, "of AdamW, after the warm-up")
    lr_schedule: Literal["constant", "linear", "cosine"] = _optim(
        "constant", "how the learning rate decays to 0 after the warm-up")
    lr_warmup_steps: Natural = _optim(0, "steps over which the learning rate rises linearly")
    lr_decay_steps: Natural = _optim(0, "step at which the decay ends; 0 is --steps")
    adam_beta1: BelowOne = _optim(0.9, "of AdamW: decay of the first moment")
    adam_beta2: BelowOne = _optim(0.999, "of AdamW: decay of the second moment")
    adam_eps: Positive = _optim(1e-8, "of AdamW: added to the root of the second moment")
    weight_decay: NotNegative = _optim(0.01, "of AdamW")
    grad_clip: Positive = _optim(1.0, "largest gradient norm")
    recompute_activations: Literal["auto", "none", "cheap", "all"] = _optim(
        "auto", "activation checkpointing: the backward pass computes again what is cheap (all but "
        "matrix products and attention), or all of a block but its input; auto is the least of "
        "these with which the estimated update fits in the free memory", free=True)
    compile_blocks: bool = _optim(
        False, "put what lies around attention through torch.compile, in the pass that trains",
        free=True)
    optimizer_state: Literal["float32", "bfloat16", "cpu"] = _optim(
        "float32", "AdamW's two moments: in float32, in half the memory, or in the CPU's memory "
        "(for small GPUs)")
    offload_reference: bool = _optim(
        False, "keep the initial model of the KL term in the CPU's memory (for small GPUs)",
        free=True)
    max_skipped: Count = _optim(
        3, "stop after so many steps in a row that changed nothing: an update whose loss or "
        "gradient is not finite leaves the weights alone, and the step's batch goes to "
        "skipped-step-N.jsonl", free=True)

    eval_every: Natural = _eval(
        5, "evaluate on the held-out problems every so many steps, and before the first and after "
        "the last; 0 is never", free=True)
    eval_problems: Natural = _eval(0, "held-out problems to evaluate on; 0 is all")
    eval_samples: Count = _eval(1, "responses to each held-out problem")
    eval_temperature: TemperatureOrZero = _eval(1.0, "as --temperature, in the evaluation; 0 is "
                                                "greedy")
    eval_top_p: Share = _eval(1.0, "as --top-p, in the evaluation")
    eval_top_k: Natural = _eval(0, "as --top-k, in the evaluation; 0 is all")

    keep_best: bool = _eval(True, "write the model to best/ whenever its held-out accuracy is the "
                            "highest so far after a step", free=True)

    output_dir: str = _run(
        "", "folder of the run; by default runs/METHOD-seedN, numbered if that exists", free=True)
    resume: bool = _run(False, "go on from the newest checkpoint of --output-dir, or of the newest "
                        "run of the default name", free=True)
    checkpoint_every: Natural = _run(
        20, "write a checkpoint every so many steps and after the last; with 0 only when the run "
        "is stopped", free=True)
    keep_checkpoints: Count = _run(2, "how many checkpoints to keep", free=True)
    dry_run: bool = _run(False, "print the resolved options, the prompts of the first question, "
                         "the memory that the run would take and the time of a step on known GPUs, "
                         "and end", free=True)
    cards: str = _run("", "GPUs of a dry run: 8x80 is 8 of 80 GB, and 8xA100 is 8 of that kind; by "
                      "default one like that which is there, for each process of torchrun",
                      free=True)
    log_questions: Natural = _run(
        1, "questions a step whose responses go to samples.jsonl", free=True)
    show_samples: Natural = _run(
        0, "print so many of each step's responses in samples.jsonl, on- and off-policy in turn, "
        "with their rewards", free=True)
    report_to: list[Literal["none", "tensorboard", "wandb", "trackio"]] = _run(
        ["none"], "trackers, one or several, that get the settings, metrics, responses and curves, "
        "see docs/trackers.md", free=True)


@dataclass
class EvaluationOptions(SharedOptions):
    """Options of eval.py."""

    max_prompt_length: Count = _data(
        4096, "longest prompt in tokens; problems beyond it are left out and counted")
    temperature: TemperatureOrZero | None = _sample(
        None, "sampling temperature; 0 is greedy (default: 1)", free=True)
    data: list[str] = _data(
        ["tiny"], f"problems: {SOURCES}, or tiny (the embedded held-out ones); several are rows of "
        "the table", free=True)
    shots: list[Natural] = _eval(
        [], "numbers of demonstrations in the context; each is a row of the table (default: 0 1)",
        free=True)
    suite: Literal["", "paper"] = _eval(
        "", "paper: the data sets, numbers of samples and averages of the paper's table, which it "
        "prints; sets --data, and unless given --shots 0 and --temperature 0.6", free=True)
    samples: Natural = _eval(0, "answers sampled for each problem (the k of avg@k and maj@k); 0 is "
                             "32 for aime24, aime25 and amc23, and 1 for other data")
    k: list[int] = _eval([], "the k of pass@k, at most --samples; an answer that scores above 0 "
                         "passes (default: 1 and --samples)", free=True)
    limit: Natural = _eval(0, "use only the first so many problems; 0 uses all")
    compare_shots: bool = _eval(
        False, "the paper's pilot study, which says whether ICPO can help this model: compare "
        "answers without and with demonstrations, and at raised --temperatures; each of these and "
        "of --compare-formats samples answers to all problems once more", free=True)
    compare_formats: list[DemoFormat] = _eval(
        [], "the --demo-format of --compare-shots, one or several; of several it recommends one "
        "(default: all that the tokenizer allows, three with a chat template)", free=True)
    temperatures: list[float] = _eval([1.2, 1.5], "those of --compare-shots", free=True)
    output: str = _run("", "file for every sample, and with .json for the table; samples of the "
                       "same settings that it holds are not sampled again (default: eval.jsonl in "
                       "the run that is evaluated, or evals/MODEL.jsonl; numbered if that holds "
                       "another evaluation)", free=True)


# How a model is asked. An evaluation of a run has these of the run, unless they are given.
ASKED = ("instruction", "system", "template_args", "chat_template", "answer_format", "stop",
         "max_new_tokens", "dtype")


def parse_evaluation(arguments: Sequence[str], about: str,
                     settings_of: Callable[[str], dict[str, Any]] | None = None
                     ) -> EvaluationOptions:
    """Reads the options of eval.py. settings_of: of the run that a model is of, see ASKED."""
    parser = OptionParser(EvaluationOptions, about)
    found = parser.parse(arguments)
    if settings_of is None:
        return found
    usual = EvaluationOptions()
    without_template = () if found.chat_template else ("system", "template_args")
    settings = {name: value for name, value in settings_of(found.model).items()
                if name in ASKED and name not in without_template and value != getattr(usual, name)}
    found = parser.parse(_as_arguments(settings) + list(arguments))
    taken = [f"{flag(name)} {shown(value)}" for name, value in settings.items()
             if value == getattr(found, name)]
    if taken and os.environ.get("RANK", "0") == "0":
        print(f"as the run was trained: {', '.join(taken)}", file=sys.stderr)
    return found


# Data sets of the paper's table, in distribution and out of it.
PAPER = {"in-distribution": ("aime24", "aime25", "amc23", "math500", "minerva", "olympiad"),
         "out-of-distribution": ("arc-c", "gpqa", "mmlu-pro")}


def samples_of(options: EvaluationOptions, data: str) -> int:
    """How many answers are sampled for a problem of this data set."""
    known = KNOWN.get(data.partition(":")[0])
    return options.samples or (known.samples if known else 1)


def shots_of(number: int) -> str:
    """How tables and pictures name this number of demonstrations."""
    return f"{number} shot{'s' * (number != 1)}"


# --------------------------------------------------------------------------------------------------
# Training: presets, files of options, and what must fit together

_METHOD = dict(off_policy="demonstrations", errs=True, rs=False, shaping=True, shaping_lambda=0.01,
               off_policy_denominator="behaviour")
# The settings of each method, unless the option is given. icpo-rs is ICPO† of the paper;
# ICPO† − ERRS is icpo with --errs false.
_LUFFY = _METHOD | dict(off_policy="dataset", errs=False, shaping_lambda=0.1,
                        off_policy_denominator="one")
METHODS = {
    "grpo": _METHOD | dict(off_policy="none", errs=False, shaping=False),
    "luffy": _LUFFY, "luffy-release": _LUFFY,   # and LUFFY_RELEASE
    "icpo": _METHOD,
    "icpo-rs": _METHOD | dict(rs=True),
}
# What LUFFY's scripts set beside its method: 8 responses, one of them the expert's, no division by
# the standard deviation, no clip, no KL term. Options that are given override these.
LUFFY_RELEASE = dict(n_on=7, group="append", advantage_std=False, loss_aggregation="fixed",
                     clip_low=1.0, clip_high=1e9, clip_off_policy=False, kl_coef=0.0,
                     entropy_coef=0.001)


# Options whose 0 stands for the value of another.
IMPLIED = {"mini_batch_size": "batch_size", "bonus_steps": "steps", "lr_decay_steps": "steps"}


def parse_training(arguments: Sequence[str], saved: dict | None = None) -> TrainingOptions:
    """Reads `[config.yaml] --option value …`; `saved` are the settings of a run that is resumed.

    The command line overrides the file, and both override `saved`. Exits with status 2 and a
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
        try:
            settings = yaml.load(file.read_text(encoding="utf-8"), _OptionLoader) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            parser.error(f"{file} is not valid YAML: {' '.join(str(error).split())}")
        if not isinstance(settings, dict):
            parser.error(f"{file}: lines of the form 'option: value' were expected")
        for name in map(str, settings):
            if name not in TrainingOptions.__dataclass_fields__:
                parser.error(f"{file}: unknown option {name!r}"
                             f"{did_you_mean(name, TrainingOptions)}")
            value, several = settings[name], isinstance(getattr(TrainingOptions(), name), list)
            parts = value if several and isinstance(value, list) and value else [value]
            if any(isinstance(part, list | dict) or part is None and part is not value
                   for part in parts):
                form = "a value or a list of values" if several else "one value"
                parser.error(f"{file}: {name} must be {form}, not {value!r}")
        if (file.parent / "fingerprint.json").is_file():   # of a run
            own = parser.parse(_as_arguments(settings))
            found = parser.parse(_as_arguments(settings) + arguments[1:])
            settings = {name: settings[name] for name in settings.keys() - _implied(own, found)}
        arguments = _as_arguments(settings) + arguments[1:]
    arguments = _as_arguments(saved or {}) + arguments
    found = parser.parse(arguments)
    if found.method == "luffy-release":
        found = parser.parse(_as_arguments(LUFFY_RELEASE) + arguments)
    return found


def _implied(own: TrainingOptions, found: TrainingOptions) -> set[str]:
    """Options in config.yaml of a run that follow from others which the command line changes.

    own: what the file says alone; found: the same with the command line.
    """
    names = set()
    if found.method != own.method:
        alone = resolve(parse_training(["--method", own.method]))
        names = {name for name in (*_METHOD, *LUFFY_RELEASE, "n_off")
                 if getattr(own, name) == getattr(alone, name)}
    return names | {name for name, base in IMPLIED.items()
                    if getattr(found, base) != getattr(own, base) == getattr(own, name)}


def without_effect(arguments: Sequence[str], options: TrainingOptions) -> list[str]:
    """The options on the command line that change nothing, with the reason. options: resolved."""
    demonstrations = ["num_demonstrations", "demonstrations", "demo_min_chars"]
    off_policy = ["n_off", "off_policy_when", "off_policy_denominator", "clip_off_policy", "group"]
    all_wrong = options.off_policy != "none" and options.off_policy_when == "all-wrong"
    idle = [("there are no off-policy responses", options.off_policy == "none",
             [*off_policy, *demonstrations]),
            ("the off-policy responses are the data's", options.off_policy == "dataset",
             demonstrations),
            ("--errs is false", not (options.errs or options.rs or all_wrong),
             ["delta", "errs_strict"]),
            ("--rs is false", not options.rs, ["alpha", "bonus_steps", "bonus_decay"]),
            ("--shaping is false", not options.shaping, ["shaping_lambda"]),
            ("--lr-schedule is constant", options.lr_schedule == "constant", ["lr_decay_steps"])]
    file = len(arguments) > 0 and arguments[0].endswith((".yaml", ".yml"))
    given, usual = OptionParser(TrainingOptions, "").parse(arguments[file:]), TrainingOptions()
    return [f"{flag(name)} {shown(getattr(given, name))} ({why})"
            for why, holds, names in idle if holds
            for name in names if getattr(given, name) != getattr(usual, name)]


class _OptionLoader(yaml.SafeLoader):
    """YAML in which a key may stand once only."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"{key!r} stands there twice")
        return super().construct_mapping(node, deep)


def _as_arguments(settings: dict) -> list[str]:
    """Settings of a file as typed arguments: they pass the same checks, and 1e-6, which PyYAML
    reads as text, becomes a number."""
    found = []
    # Lists come first: behind the last one a stray argument would count as part of it.
    for name, value in sorted(settings.items(), key=lambda item: not isinstance(item[1], list)):
        if isinstance(value, list):
            found += [flag(name), *(f"{LITERAL}{each}" for each in value)]
        elif value is not None:
            found.append(f"{flag(name)}={value}")
    return found


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
    read_old_names(o)
    vars(o).update(with_absolute_paths(vars(o)))
    require(o.report_to == ["none"] or "none" not in o.report_to,
            f"--report-to {' '.join(o.report_to)}: none stands alone")
    o.mini_batch_size = o.mini_batch_size or o.batch_size
    o.bonus_steps = o.bonus_steps or o.steps
    o.lr_decay_steps = o.lr_decay_steps or (0 if o.lr_schedule == "constant" else o.steps)
    if o.off_policy == "none":
        o.n_off = 0
    require(o.off_policy == "none" or o.n_off,
            "--n-off 0 leaves no off-policy responses; that is --method grpo")
    require(o.group == "append" or o.n_off <= o.n_on,
            f"--n-off {o.n_off} responses cannot replace --n-on {o.n_on}; give at most as many, or "
            f"--group append")
    size = o.n_on + (o.n_off if o.group == "append" else 0)
    require(size > 1, "a group of one response has no advantage: give --n-on of at least 2")
    require(o.off_policy != "dataset" or o.off_policy_denominator == "one",
            "responses of a data set have no known behaviour policy: give "
            "--off-policy-denominator one")
    require(o.off_policy != "dataset" or o.n_off == 1,
            f"a problem has one expert response: --n-off must be 1, not {o.n_off}")
    require(o.loss_aggregation != "fixed" or o.normalizer == "batch",
            "--loss-aggregation fixed has its own Z: it needs --normalizer batch")
    require(o.lr_schedule == "constant" or o.lr_warmup_steps < o.lr_decay_steps,
            f"--lr-warmup-steps {o.lr_warmup_steps} leaves no steps to decay until "
            f"{o.lr_decay_steps}")
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
