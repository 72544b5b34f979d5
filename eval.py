"""Accuracy of a model with 0 or more demonstrations in its context.

    python eval.py --model runs/icpo-seed0/final --shots 0 1
    torchrun --nproc-per-node 8 eval.py --model Qwen/Qwen3-1.7B --data test.jsonl --demonstrations train.jsonl --samples 4

Prints one row for each number of shots, and writes every sample to a JSONL file.
"""

import argparse
import difflib
import functools
import json
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import HfArgumentParser

from data import INSTRUCTION, Demonstrations, Problem, PromptBuilder, load_problems
from model_utils import gather_objects, init_distributed, is_main, load_model, rank, world_size
from reward import FORMATS, RewardError, extract_answer, load_reward, own_scores, score
from rollout import generate, spread

TINY = Path(__file__).resolve().parent / "tiny"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


REWARD_HELP = "FILE.py:FUNCTION, a reward of your own: (responses, problems) -> list of numbers; by default right answers earn 1"
ANSWER_HELP = "where the final answer of a response stands: in its last box, behind ####, or in <answer> tags"


def embedded(path: str, file: str) -> Path | str:
    """`path`, where the word tiny stands for a file of the embedded default."""
    return TINY / file if path == "tiny" else path


def option(default, help: str, **more):
    """A dataclass field that HfArgumentParser turns into a command line option."""
    if default not in (None, ""):   # those two stand for something that the help text explains
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


def make_scorer(reward: str = "", answer_format: str = "boxed", timeout: float = 5.0, counts: Counter | None = None):
    """The function (responses, problems) -> scores that these options stand for; see reward.score and load_reward."""
    if reward:
        return functools.partial(own_scores, load_reward(reward))
    return lambda responses, problems: score(responses, [problem.answer for problem in problems], timeout,
                                             answer_format=answer_format, counts=counts)


def evaluate(model, builder: PromptBuilder, problems: list[Problem], demonstrations: Demonstrations | None = None, *,
             samples: int = 1, max_new_tokens: int, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0,
             seed: int = 0, slots: int = 0, sampler=None, scorer=None, progress=None) -> list[dict]:
    """Sample `samples` answers to every problem and score them; the processes share the problems out.

    demonstrations: drawn from for every problem; None asks plainly. slots, sampler, progress: see `generate`.
    scorer: what make_scorer gives; by default the answer in the last box earns 1.0 if it is right, else 0.0.
    Random numbers depend on (seed, problem, sample) alone, so that two evaluations differ by the model only.
    Returns on every process one dict a sample, `samples` consecutive ones a problem: id, sample, response, score,
    tokens, finished.
    """
    prompts = [builder.plain(problem) if demonstrations is None
               else demonstrations.draw(problem, random.Random(f"evaluation {seed} {i}"))[1]
               for i, problem in enumerate(problems)]
    mine = spread([len(prompt) + max_new_tokens for prompt in prompts], world_size())[rank()]
    completions = generate(model, [prompts[i] for i in mine], n=samples, max_new_tokens=max_new_tokens,
                           temperature=temperature, top_p=top_p, top_k=top_k, stop_ids=model.stop_ids, seed=seed,
                           stream_ids=mine, slots=slots, sampler=sampler, progress=progress)
    texts = [builder.tokenizer.decode(c.tokens, skip_special_tokens=True) for c in completions]
    owners = [i for i in mine for _ in range(samples)]
    scores = (scorer or make_scorer())(texts, [problems[i] for i in owners])
    records = {(i, j % samples): {"id": problems[i].id, "sample": j % samples, "response": text, "score": right,
                                  "tokens": len(completion.tokens), "finished": completion.finished}
               for j, (i, text, right, completion) in enumerate(zip(owners, texts, scores, completions))}
    everyone = {key: record for part in gather_objects(records) for key, record in part.items()}
    return [everyone[key] for key in sorted(everyone)]


def summarise(records: list[dict], samples: int, answer_format: str = "boxed") -> dict[str, float]:
    """accuracy: avg@k, the mean score; half_width: of its 95 % interval (normal, over problems); pass: pass@k, the
    share of problems with a right answer among k = `samples`; majority: maj@k, the share whose commonest answer is
    right, the earliest of equally common ones counting; tokens: mean length; truncated: share cut off."""
    groups = [records[i:i + samples] for i in range(0, len(records), samples)]
    means = [fmean(r["score"] for r in group) for group in groups]

    def majority(group):
        answers = [extract_answer(r["response"], answer_format) for r in group]
        commonest = Counter(answers).most_common(1)[0][0]
        return group[answers.index(commonest)]["score"]

    return {"accuracy": fmean(means), "half_width": 1.96 * stdev(means) / len(means) ** 0.5 if len(means) > 1 else 0.0,
            "pass": fmean(max(r["score"] for r in group) for group in groups),
            "majority": fmean(majority(group) for group in groups),
            "tokens": fmean(r["tokens"] for r in records), "truncated": fmean(not r["finished"] for r in records)}


@dataclass
class Options:
    model: str = option("tiny", "folder in Hugging Face format, hub name, or tiny (the embedded default, untrained)")
    data: str = option("tiny", "JSONL file of problems, or tiny (the embedded held-out ones)")
    demonstrations: str = option("tiny", "JSONL file of worked problems to draw demonstrations from, or tiny")
    shots: list[int] = option([0, 1], "numbers of demonstrations in the context, a row of the table each")
    samples: int = option(1, "answers sampled for each problem (the k of avg@k, pass@k and maj@k)")
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
    output: str = option("eval.jsonl", "file for every sample; an existing one is replaced")
    slots: int = option(0, "sequences that a process samples at the same time; 0 is as many as there are, but at most "
                        "256 and what fits in a third of the free memory")
    reward: str = option("", REWARD_HELP)
    answer_format: str = option("boxed", ANSWER_HELP, choices=list(FORMATS))
    verify_timeout: float = option(5.0, "seconds after which the comparison of two answers counts as wrong")
    seed: int = option(0, "of sampling and of the draw of demonstrations")
    dtype: str = option("float32", "to compute in", choices=list(DTYPES))
    device: str = option("auto", "auto (a GPU if there is one), cpu or cuda")


def prepare(options: Options):
    """Everything that may be wrong with the options or the data comes out here, as a ValueError."""
    if min(options.shots) < 0 or options.samples < 1 or options.limit < 0:
        raise ValueError(f"shots and limit must be at least 0 and samples at least 1, "
                         f"not {options.shots}, {options.limit} and {options.samples}")
    options.max_new_tokens = options.max_new_tokens or (48 if options.data == "tiny" else 2048)
    problems = load_problems(embedded(options.data, "test.jsonl"))[:options.limit or None]
    device = init_distributed(options.device)
    model, tokenizer = load_model(embedded(options.model, "model"), device, DTYPES[options.dtype])
    room = min(options.max_prompt_length, model.config.max_position - options.max_new_tokens)
    builder = PromptBuilder(tokenizer, options.instruction, options.chat_template, options.demo_chat_template)
    kept = [p for p in problems if len(builder.plain(p)) <= room]
    pools = {}
    for shots in sorted(set(options.shots) - {0}):   # every row of the table is over the same problems
        pools[shots] = Demonstrations(load_problems(embedded(options.demonstrations, "demonstrations.jsonl"),
                                                    needs=("solution",)), builder, shots, room, options.demo_min_chars)
        kept = pools[shots].admit(kept)
    if len(kept) < len(problems) and is_main():
        print(f"left out: {len(problems) - len(kept)} of {len(problems)} problems, whose prompt passes {room} tokens")
    if not kept:
        raise ValueError(f"no problem is left: every prompt passes {room} tokens; raise --max-prompt-length "
                         f"or lower --max-new-tokens or --shots")
    return model, builder, kept, pools


def run(options: Options, model, builder, problems, demonstrations, title: str) -> list[dict]:
    """`evaluate` with a progress bar of this process's share, as far as it can be known before."""
    o, tokens, started = options, 0, time.perf_counter()
    with tqdm(total=-(-len(problems) * o.samples // world_size()), desc=title, unit="answer", disable=not is_main(),
              leave=False) as bar:
        def progress(ended: int, sampled: int) -> None:
            nonlocal tokens
            tokens += sampled
            bar.update(ended)
            bar.set_postfix_str(f"{tokens / (time.perf_counter() - started):,.0f} tokens/s", refresh=False)

        return evaluate(model, builder, problems, demonstrations, samples=o.samples, max_new_tokens=o.max_new_tokens,
                        temperature=o.temperature, top_p=o.top_p, top_k=o.top_k, seed=o.seed, slots=o.slots,
                        scorer=make_scorer(o.reward, o.answer_format, o.verify_timeout), progress=progress)


def main() -> None:
    options = parse(make_parser(Options, __doc__.split("\n")[0]), sys.argv[1:])
    rows, written = [], []
    try:
        model, builder, problems, pools = prepare(options)
        for shots in options.shots:
            records = run(options, model, builder, problems, pools.get(shots), f"{shots} shots")
            rows.append((shots, summarise(records, options.samples, options.answer_format)))
            written += [{"shots": shots, **record} for record in records]
    except (ValueError, RewardError) as error:
        if is_main():
            print(f"eval.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    if is_main():
        k = options.samples
        print(f"{options.model} on {options.data}: {len(problems)} problems, {k} samples each, "
              f"temperature {options.temperature}")
        print(f"{'shots':>5} {f'avg@{k}':>16} {f'pass@{k}':>9} {f'maj@{k}':>9} {'tokens':>8} {'truncated':>10}")
        for shots, s in rows:
            print(f"{shots:>5} {s['accuracy']:>8.1%} ± {s['half_width']:<5.1%} {s['pass']:>9.1%} {s['majority']:>9.1%} "
                  f"{s['tokens']:>8.1f} {s['truncated']:>10.1%}")
        Path(options.output).write_text("".join(json.dumps(record) + "\n" for record in written))
        print(f"every sample: {options.output}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
