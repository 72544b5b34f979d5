"""Accuracy of a model with 0 or more demonstrations in its context.

    python eval.py --model runs/icpo-seed0/final --shots 0 1
    torchrun --nproc-per-node 8 eval.py --model Qwen/Qwen3-1.7B --data test.jsonl --demonstrations train.jsonl --samples 4

Prints one row for each data set and number of shots, and writes every sample to a JSONL file, from which the same command
goes on after a kill.
"""

import functools
import json
import math
import os
import random
import signal
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from statistics import fmean, variance
from typing import NamedTuple

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import yaml
from tqdm import tqdm

from data import Demonstrations, Problem, PromptBuilder, load_problems
from distributed import gather_objects, init_distributed, is_main, on_main, rank, spread, world_size
from model_utils import load_model
from options import DTYPES, EvaluationOptions as Options, embedded, make_parser, parse
from reward import RewardError, extract_answer, load_reward, own_scores, score, settle
from rollout import generate
from runs import find_output, replace_file


def make_scorer(reward: str = "", answer_format: str = "boxed", timeout: float = 5.0, counts: Counter | None = None):
    """The function (responses, problems) -> scores that these options stand for; see reward.score and load_reward."""
    if reward:
        return functools.partial(own_scores, load_reward(reward))
    return lambda responses, problems: score(responses, [problem.answer for problem in problems], timeout,
                                             answer_format=answer_format, counts=counts)


def evaluate(model, builder: PromptBuilder, problems: list[Problem], demonstrations: Demonstrations | None = None, *,
             samples: int = 1, max_new_tokens: int, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0,
             seed: int = 0, slots: int = 0, sampler=None, scorer=None, progress=None, first: int = 0) -> list[dict]:
    """Sample `samples` answers to every problem and score them; the processes share the problems out.

    demonstrations: drawn from for every problem; None asks plainly. slots, sampler, progress: see `generate`.
    scorer: what make_scorer gives; by default the answer in the last box earns 1.0 if it is right, else 0.0.
    first: number of the first problem, where these are a part of a data set.
    Random numbers depend on (seed, problem, sample) alone, so that two evaluations differ by the model only.
    Returns on every process one dict a sample, `samples` consecutive ones a problem: id, sample, response, score,
    tokens, finished.
    """
    prompts = [builder.plain(problem) if demonstrations is None
               else demonstrations.draw(problem, random.Random(f"evaluation {seed} {first + i}"))[1]
               for i, problem in enumerate(problems)]
    mine = spread([len(prompt) + max_new_tokens for prompt in prompts], world_size())[rank()]
    completions = generate(model, [prompts[i] for i in mine], n=samples, max_new_tokens=max_new_tokens,
                           temperature=temperature, top_p=top_p, top_k=top_k, stop_ids=model.stop_ids, seed=seed,
                           stream_ids=[first + i for i in mine], slots=slots, sampler=sampler, progress=progress)
    texts = [builder.tokenizer.decode(c.tokens, skip_special_tokens=True) for c in completions]
    owners = [i for i in mine for _ in range(samples)]
    scores = (scorer or make_scorer())(texts, [problems[i] for i in owners]) if texts else []   # more processes than problems
    records = {(i, j % samples): {"id": problems[i].id, "sample": j % samples, "response": text, "score": right,
                                  "tokens": len(completion.tokens), "finished": completion.finished}
               for j, (i, text, right, completion) in enumerate(zip(owners, texts, scores, completions))}
    everyone = {key: record for part in gather_objects(records) for key, record in part.items()}
    return [everyone[key] for key in sorted(everyone)]


def summarise(records: list[dict], samples: int, ks: list[int] = (), answer_format: str = "boxed") -> dict[str, float]:
    """Of `samples` consecutive records a problem.

    accuracy: avg@k, the mean score; low, high: its 95 % interval, problems being drawn at random. pass@K for each of `ks`:
    the probability that of K answers one is right, without the bias of trying just K (Chen et al., arXiv 2107.03374).
    majority: maj@k, the share of problems whose commonest answer is right, the earliest of equally common ones; answers
    that reward.settle finds equal are one, and a response without an answer has no vote. tokens: mean length; truncated:
    share cut off."""
    groups = [records[i:i + samples] for i in range(0, len(records), samples)]
    low, high = interval([fmean(r["score"] for r in group) for group in groups])
    right = [sum(r["score"] > 0 for r in group) for group in groups]

    def majority(group):
        votes = []   # [answer, score, count]
        for r in group:
            answer = extract_answer(r["response"], answer_format)
            if answer is None:
                continue
            vote = next((v for v in votes if v[0] == answer or settle(answer, v[0])), None)
            if vote is None:
                votes.append(vote := [answer, r["score"], 0])
            vote[2] += 1
        return max(votes, key=lambda vote: vote[2])[1] if votes else group[0]["score"]

    return {"problems": len(groups), "accuracy": fmean(r["score"] for r in records), "low": low, "high": high,
            **{f"pass@{k}": fmean(1 - math.comb(samples - c, k) / math.comb(samples, k) for c in right) for k in ks},
            "majority": fmean(majority(group) for group in groups),
            "tokens": fmean(r["tokens"] for r in records), "truncated": fmean(not r["finished"] for r in records)}


def interval(means: list[float]) -> tuple[float, float]:
    """95 % interval of the mean over problems, each with its own mean score: Wilson's, which holds near 0 and 1 too, with
    as many independent trials as would vary like these means; for scores that are no shares, the normal one."""
    n, p = len(means), fmean(means)
    spread, z = (variance(means) / n if n > 1 else 0.0), 1.959964
    if min(means) < 0 or max(means) > 1:
        return p - z * spread ** 0.5, p + z * spread ** 0.5
    trials = p * (1 - p) / spread if spread else n
    centre, width = p + z * z / (2 * trials), z * (p * (1 - p) / trials + (z / (2 * trials)) ** 2) ** 0.5
    low, high = ((centre + side * width) / (1 + z * z / trials) for side in (-1, 1))
    return max(0.0, min(p, low)), min(1.0, max(p, high))   # rounding would leave a mean of 0 or 1 outside


class Case(NamedTuple):
    """A row of the table."""
    data: str
    shots: int
    problems: list[Problem]
    demonstrations: Demonstrations | None
    temperature: float
    again: bool = False   # a second draw, with random numbers of its own

    @property
    def key(self) -> tuple:
        return self.data, self.shots, self.temperature, self.again


def prepare(options: Options):
    """Everything that may be wrong with the options or the data comes out here, as a ValueError."""
    o = options
    if min(o.shots) < 0 or o.samples < 1 or o.limit < 0:
        raise ValueError(f"shots and limit must be at least 0 and samples at least 1, not {o.shots}, {o.limit} and {o.samples}")
    o.k = o.k or sorted({1, o.samples})
    if not all(1 <= k <= o.samples for k in o.k):
        raise ValueError(f"pass@k needs k from 1 to the number of samples, {o.samples}, not {o.k}")
    if Path(o.output).suffix in (".json", ".png"):
        raise ValueError(f"--output is the file of the samples; the table and the picture go beside it, as .json and .png: give "
                         f"{Path(o.output).with_suffix('.jsonl')}, not {o.output}")
    for name, values in (("data", o.data), ("shots", o.shots)):
        if len(set(values)) < len(values):
            raise ValueError(f"{name}: {', '.join(map(str, values))} names one twice")
    if o.compare_shots and (o.shots[0] != 0 or len(o.shots) != 2 or o.temperature in o.temperatures
                            or min(o.temperatures, default=1) <= 0):
        raise ValueError(f"--compare-shots compares --shots 0 with one other number, and with --temperatures above 0 other "
                         f"than {o.temperature:g}; they are {o.shots} and {o.temperatures}")
    o.max_new_tokens = o.max_new_tokens or (48 if o.data == ["tiny"] else 2048)
    make_scorer(o.reward)
    data = {name: load_problems(embedded(name, "test.jsonl"))[:o.limit or None] for name in o.data}
    device = init_distributed(o.device)
    model, tokenizer = load_any_model(o.model, device, DTYPES[o.dtype])
    if model.config.max_position <= o.max_new_tokens:
        raise ValueError(f"--max-new-tokens {o.max_new_tokens} leaves no room for a prompt: {o.model} has "
                         f"{model.config.max_position} positions")
    room = min(o.max_prompt_length, model.config.max_position - o.max_new_tokens)
    builder = PromptBuilder(tokenizer, o.instruction, o.chat_template, o.demo_chat_template)
    pools = {shots: Demonstrations(load_problems(embedded(o.demonstrations, "demonstrations.jsonl"), needs=("solution",)),
                                   builder, shots, room, o.demo_min_chars) for shots in sorted(set(o.shots) - {0})}
    cases = []
    for name, problems in data.items():
        kept = [p for p in problems if len(builder.plain(p)) <= room]
        for shots in pools:   # the rows of a data set are over the same problems
            kept = pools[shots].admit(kept)
        if len(kept) < len(problems) and is_main():
            print(f"left out: {len(problems) - len(kept)} of {len(problems)} problems of {name}, whose prompt passes {room} "
                  f"tokens")
        if not kept:
            raise ValueError(f"no problem of {name} is left: every prompt passes {room} tokens; raise --max-prompt-length "
                             f"or lower --max-new-tokens or --shots")
        cases += [Case(name, shots, kept, pools.get(shots), o.temperature) for shots in o.shots]
        if o.compare_shots:
            cases += [Case(name, 0, kept, None, temperature, again=True)
                      for temperature in [o.temperature, *sorted(o.temperatures)]]
    return model, builder, cases


def load_any_model(path: str, device, dtype):
    """load_model, also of a run of train.py (its final/, or else its newest checkpoint) and of one of its checkpoints."""
    folder = Path(embedded(path, "model"))
    if (folder / "final").is_dir():
        return load_model(folder / "final", device, dtype)
    if (folder / "config.yaml").is_file():
        checkpoints = sorted((folder / "checkpoints").glob("step-*"), key=lambda each: int(each.name.removeprefix("step-")))
        if not checkpoints:
            raise ValueError(f"{folder} is a run that has written neither final/ nor a checkpoint yet")
        folder = checkpoints[-1]
        if is_main():
            print(f"{path} is not finished: this is {folder.name}")
    if not (folder / ".metadata").is_file():
        return load_model(path if path != "tiny" else folder, device, dtype)
    config = folder.parent.parent / "config.yaml"
    if not config.is_file():
        raise ValueError(f"{folder} is a checkpoint, but there is no {config} that says of which model")
    model, tokenizer = load_model(embedded(yaml.safe_load(config.read_text())["model"], "model"), device)
    with warnings.catch_warnings():   # that one process needs no process group
        warnings.simplefilter("ignore")
        dcp.load({"model": model.state_dict()}, checkpoint_id=folder)   # into the model's own tensors
    return model.to(dtype), tokenizer


def run(options: Options, model, builder, case: Case, records: list[dict]) -> list[dict]:
    """The records of a row, those of its first problems being there already; what is new goes to the file bit by bit."""
    o, scorer, size = options, make_scorer(options.reward, options.answer_format, options.verify_timeout), 64 * world_size()
    title = f"{case.data}, {case.shots} shots, temperature {case.temperature:g}"
    label = {"data": case.data, "shots": case.shots, "temperature": case.temperature} | ({"again": True} if case.again else {})
    with tqdm(total=len(case.problems) * o.samples, initial=len(records), desc=title, unit="answer", disable=not is_main(),
              leave=False) as bar:
        follow = follow_tokens(lambda done, text: (bar.update(world_size() * done), bar.set_postfix_str(text, refresh=False)))
        for first in range(len(records) // o.samples, len(case.problems), size):
            part = evaluate(model, builder, case.problems[first:first + size], case.demonstrations, first=first,
                            samples=o.samples, max_new_tokens=o.max_new_tokens, temperature=case.temperature, top_p=o.top_p,
                            top_k=o.top_k, seed=o.seed + 2 ** 31 * case.again, slots=o.slots, scorer=scorer, progress=follow)
            part = [label | record for record in part]
            records = records + part
            if is_main():
                with open(o.output, "a") as file:
                    file.write("".join(json.dumps(record) + "\n" for record in part))
    return records


def follow_tokens(say):
    """What `generate` calls while it runs, for say(sequences that have just ended, tokens per second so far)."""
    tokens, started = 0, time.perf_counter()

    def progress(ended: int, sampled: int) -> None:
        nonlocal tokens
        tokens += sampled
        say(ended, f"{tokens / (time.perf_counter() - started):,.0f} tokens/s")
    return progress


def compare_shots(o: Options, cases: list[Case], found: dict, rows: list[dict]) -> dict:
    """Print what demonstrations change, and draw it; returns it for the file of the table."""
    import pilot
    results, by_key = [], {case.key: row for case, row in zip(cases, rows)}
    print(f"\nAgainst the plain answers at temperature {o.temperature:g}:")
    for name in o.data:
        plain, steered = (name, 0, o.temperature, False), (name, o.shots[1], o.temperature, False)
        others = {"0 shots again": (name, 0, o.temperature, True), **{f"temperature {t:g}": (name, 0, t, True)
                  for t in sorted(o.temperatures)}, f"{o.shots[1]} shot{'s' * (o.shots[1] > 1)}": steered}
        changes = {label: pilot.compare(found[plain], found[key], o.samples) for label, key in others.items()}
        for label, c in changes.items():
            print(f"{name}, {label:<16} accuracy {100 * c['difference']:+.1f} points ({100 * c['difference_low']:+.1f} to "
                  f"{100 * c['difference_high']:+.1f}), edit distance {c['distance']:.2f}, {c['gained']:.1%} turn right, "
                  f"{c['lost']:.1%} turn wrong")
        accepted = [r["score"] >= 1 for r in found[steered]]   # by ERRS
        solved = fmean(any(accepted[i:i + o.samples]) for i in range(0, len(accepted), o.samples))
        results.append({"data": name, "plain": by_key[plain], "steered": by_key[steered], "changes": changes,
                        "verdict": pilot.verdict(name, o.shots[1], by_key[plain], by_key[steered], changes[list(changes)[-1]],
                                                 fmean(accepted), solved,
                                                 {t: changes[f"temperature {t:g}"] for t in o.temperatures})})
    picture = Path(o.output).with_suffix(".png")
    pilot.draw(results, picture)
    print("", *(result["verdict"] for result in results), f"picture: {picture}", sep="\n")
    return {"comparison": results}


def main() -> None:
    o = options = parse(make_parser(Options, __doc__.split("\n")[0]), sys.argv[1:])
    found = None
    signal.signal(signal.SIGTERM, signal.default_int_handler)   # as Ctrl-C
    try:
        model, builder, cases = prepare(options)
        o.output, found = on_main(lambda: find_output(options, cases))
        rows = []
        for case in cases:
            found[case.key] = run(o, model, builder, case, found.get(case.key, [])[:len(case.problems) * o.samples])
            rows.append({"data": case.data, "shots": case.shots, "temperature": case.temperature}
                        | summarise(found[case.key], o.samples, o.k, o.answer_format))
    except ValueError as error:
        if is_main():
            print(f"eval.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except (RewardError, OSError) as error:
        print(f"eval.py: error: {error}", file=sys.stderr)
        os._exit(1)   # at once: other processes may wait for this one
    except KeyboardInterrupt:
        if is_main():
            print("\ninterrupted" + ("" if found is None else f"; what was sampled is in {o.output}, and the same command goes on "
                                                              f"from there"), file=sys.stderr)
        os._exit(130)   # at once: other processes may wait for this one
    if is_main():
        print(f"{o.model}, {o.samples} sample{'s' * (o.samples > 1)} a problem")
        width = max(len(row["data"]) for row in rows) + 1
        print(f"{'data':<{width}}{'shots':>5}{'temperature':>13}{'problems':>10}{f'avg@{o.samples}':>9}{'95 % interval':>17}"
              + "".join(f"{f'pass@{k}':>9}" for k in o.k) + f"{f'maj@{o.samples}':>9}{'tokens':>9}{'truncated':>11}")
        for r in rows:
            print(f"{r['data']:<{width}}{r['shots']:>5}{r['temperature']:>13g}{r['problems']:>10}{r['accuracy']:>9.1%}"
                  + f"{r['low']:.1%} to {r['high']:.1%}".rjust(17) + "".join(f"{r[f'pass@{k}']:>9.1%}" for k in o.k)
                  + f"{r['majority']:>9.1%}{r['tokens']:>9.1f}{r['truncated']:>11.1%}")
        about = Path(o.output).with_suffix(".json")
        extra = compare_shots(o, cases, found, rows) if o.compare_shots else {}
        replace_file(about, json.dumps(json.loads(about.read_text()) | {"rows": rows} | extra, indent=1) + "\n")
        print(f"every sample: {o.output}; this table: {about}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
