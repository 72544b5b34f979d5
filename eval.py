"""Accuracy of a model with 0 or more demonstrations in its context.

    python eval.py --model runs/icpo-seed0/final --shots 0 1
    torchrun --nproc-per-node 8 eval.py --model Qwen/Qwen3-1.7B --data test.jsonl \\
        --demonstrations train.jsonl --samples 4

It prints a row for each data set and number of shots, and writes every sample to a JSONL file, from
which the same command goes on after a kill.
"""

import math
import os
import random
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, variance

import torch.distributed as dist
from tqdm import tqdm

from data import Demonstrations, Problem, PromptBuilder
from distributed import gather_objects, is_main, my_share, on_main, world_size
from files import append_lines, read_object, write_object
from model_utils import Transformer
from options import EvaluationOptions, OptionParser, end_with_mistake
from own_reward import RewardError
from prepare import Case, prepare_evaluation
from reward import count_votes, extract_answer, make_scorer
from rollout import Sampler, generate
from runs import find_output, follow_tokens, outlive_readers

# --------------------------------------------------------------------------------------------------
# Sampling, scoring, summary

def evaluate(model: Transformer, builder: PromptBuilder, problems: list[Problem],
             demonstrations: Demonstrations | None = None, *, samples: int = 1,
             max_new_tokens: int, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0,
             seed: int = 0, slots: int = 0, sampler: Sampler | None = None,
             scorer: Callable | None = None, progress: Callable | None = None,
             first: int = 0) -> list[dict]:
    """Samples `samples` answers to every problem and scores them; processes share the problems.

    demonstrations: a pool that every problem was admitted to; None asks plainly. slots, sampler,
    progress: see `generate`. scorer: see make_scorer; by default the answer in the last box earns
    1.0 if it is right, else 0.0. first: the number of the first problem, where the problems are a
    part of a data set.
    Random numbers depend on (seed, number of the problem, sample) alone, so two evaluations differ
    by the model only. Returns on every process one dict a sample, `samples` consecutive ones a
    problem: id, sample, response, score, tokens, finished.
    """
    def prompt(number: int, problem: Problem) -> list[int]:
        if demonstrations is None:
            return builder.plain(problem)
        return demonstrations.draw(problem, random.Random(f"evaluation {seed} {number}"))[1]

    prompts = [prompt(first + i, problem) for i, problem in enumerate(problems)]
    mine = my_share([len(prompt) + max_new_tokens for prompt in prompts])
    completions = generate(
        model, [prompts[i] for i in mine], n=samples, max_new_tokens=max_new_tokens,
        temperature=temperature, top_p=top_p, top_k=top_k, stop_ids=model.stop_ids, seed=seed,
        stream_ids=[first + i for i in mine], slots=slots, sampler=sampler, progress=progress)
    texts = [builder.response_text(c.tokens, model.stop_ids) for c in completions]
    owners = [i for i in mine for _ in range(samples)]
    scores = []
    if texts:   # with fewer problems than processes some have none
        scores = (scorer or make_scorer())(texts, [problems[i] for i in owners])
    records = {(i, j % samples): {"id": problems[i].id, "sample": j % samples, "response": text,
                                  "score": right, "tokens": len(completion.tokens),
                                  "finished": completion.finished}
               for j, (i, text, right, completion)
               in enumerate(zip(owners, texts, scores, completions, strict=True))}
    everyone = {key: record for part in gather_objects(records) for key, record in part.items()}
    return [everyone[key] for key in sorted(everyone)]


def summarise(records: list[dict], samples: int, ks: Sequence[int] = (),
              answer_format: str = "boxed", timeout: float = 5.0) -> dict[str, float]:
    """Summary of `samples` consecutive records a problem.

    accuracy: avg@k, the mean score; low, high: its 95 % interval over problems drawn at random.
    pass@K for each of `ks`: the probability that at least one of K answers is right, unbiased (Chen
    et al., arXiv 2107.03374). majority: maj@k, the mean score of the commonest answers, of equally
    common ones the earliest; equal answers count as one, and a response without an answer has no
    vote; see reward.count_votes, which takes the timeout. tokens: mean length. truncated: share cut
    off.
    """
    groups = [records[i:i + samples] for i in range(0, len(records), samples)]
    low, high = interval([fmean(r["score"] for r in group) for group in groups])
    right = [sum(r["score"] > 0 for r in group) for group in groups]
    pass_at = {f"pass@{k}": fmean(1 - math.comb(samples - c, k) / math.comb(samples, k)
                                  for c in right) for k in ks}
    answers = [[extract_answer(r["response"], answer_format) for r in group] for group in groups]
    majority = []
    for group, given, votes in zip(groups, answers, count_votes(answers, timeout), strict=True):
        winner = given.index(max(votes, key=votes.__getitem__)) if votes else 0
        majority.append(group[winner]["score"])
    return {"problems": len(groups), "accuracy": fmean(r["score"] for r in records), "low": low,
            "high": high, **pass_at,
            "majority": fmean(majority),
            "tokens": fmean(r["tokens"] for r in records),
            "truncated": fmean(not r["finished"] for r in records)}


def interval(means: list[float]) -> tuple[float, float]:
    """The 95 % interval of the mean over problems, each with its own mean score.

    It is Wilson's interval, which holds near 0 and 1 too, with an effective number of trials that
    matches the observed variance of the problems' means. For scores outside 0 to 1 it is the normal
    interval.
    """
    n, p = len(means), fmean(means)
    spread, z = (variance(means) / n if n > 1 else 0.0), 1.959964
    if min(means) < 0 or max(means) > 1:
        return p - z * spread ** 0.5, p + z * spread ** 0.5
    trials = p * (1 - p) / spread if spread else n
    centre = p + z * z / (2 * trials)
    width = z * (p * (1 - p) / trials + (z / (2 * trials)) ** 2) ** 0.5
    low, high = ((centre + side * width) / (1 + z * z / trials) for side in (-1, 1))
    # Rounding would leave a mean of 0 or 1 outside.
    return max(0.0, min(p, low)), min(1.0, max(p, high))


# --------------------------------------------------------------------------------------------------
# The command

def sample_case(o: EvaluationOptions, model: Transformer, builder: PromptBuilder, scorer: Callable,
                case: Case, records: list[dict]) -> list[dict]:
    """Samples the problems of a case that have no records yet; returns all records.

    It appends the new ones to the file in parts.
    """
    label = {"data": case.data, "shots": case.shots, "temperature": case.temperature}
    label |= {"again": True} if case.again else {}
    title = f"{case.data}, {case.shots} shots, temperature {case.temperature:g}"
    size = 64 * world_size()
    with tqdm(total=len(case.problems) * o.samples, initial=len(records), desc=title,
              unit="answer", disable=not is_main(), leave=False) as bar:
        def say(ended: int, speed: str) -> None:
            bar.update(world_size() * ended)
            bar.set_postfix_str(speed, refresh=False)

        progress = follow_tokens(say)
        for begin in range(len(records) // o.samples, len(case.problems), size):
            part = evaluate(
                model, builder, case.problems[begin:begin + size], case.demonstrations,
                first=begin, samples=o.samples, max_new_tokens=o.max_new_tokens,
                temperature=case.temperature, top_p=o.top_p, top_k=o.top_k,
                seed=o.seed + 2 ** 31 * case.again, slots=o.slots, scorer=scorer, progress=progress)
            part = [label | record for record in part]
            records = records + part
            if is_main():
                append_lines(Path(o.output), part)
    return records


def print_table(o: EvaluationOptions, rows: list[dict]) -> None:
    print(f"{o.model}, {o.samples} sample{'s' * (o.samples > 1)} a problem")
    width = max(len(row["data"]) for row in rows) + 1
    print(f"{'data':<{width}}{'shots':>5}{'temperature':>13}{'problems':>10}"
          f"{f'avg@{o.samples}':>9}{'95 % interval':>17}"
          + "".join(f"{f'pass@{k}':>9}" for k in o.k)
          + f"{f'maj@{o.samples}':>9}{'tokens':>9}{'truncated':>11}")
    for r in rows:
        print(f"{r['data']:<{width}}{r['shots']:>5}{r['temperature']:>13g}{r['problems']:>10}"
              f"{r['accuracy']:>9.1%}" + f"{r['low']:.1%} to {r['high']:.1%}".rjust(17)
              + "".join(f"{r[f'pass@{k}']:>9.1%}" for k in o.k)
              + f"{r['majority']:>9.1%}{r['tokens']:>9.1f}{r['truncated']:>11.1%}")
    if any(row["truncated"] > 0.5 for row in rows):
        print(f"warning: most answers of some rows were cut off at --max-new-tokens "
              f"{o.max_new_tokens}, before a final answer; raise it", file=sys.stderr)


def main() -> None:
    outlive_readers()
    o = OptionParser(EvaluationOptions, str(__doc__).split("\n")[0]).parse(sys.argv[1:])
    found = None
    signal.signal(signal.SIGTERM, signal.default_int_handler)   # SIGTERM acts as Ctrl-C
    try:
        model, builder, scorer, cases = prepare_evaluation(o)
        output, found = on_main(lambda: find_output(o, cases))
        o.output, rows = str(output), []
        for case in cases:
            records = found.get(case.key, [])[:len(case.problems) * o.samples]
            found[case.key] = sample_case(o, model, builder, scorer, case, records)
            rows.append({"data": case.data, "shots": case.shots, "temperature": case.temperature}
                        | on_main(lambda records=found[case.key]: summarise(
                            records, o.samples, o.k, o.answer_format, o.verify_timeout)))
    except ValueError as error:
        end_with_mistake("eval.py", error)
    except (RewardError, OSError) as error:
        print(f"eval.py: error: {error}", file=sys.stderr)
        os._exit(1)   # at once, because other processes may wait for this one
    except KeyboardInterrupt:
        if is_main():
            where = "" if found is None else (f"; what was sampled is in {o.output}, and the same "
                                              f"command goes on from there")
            print(f"\ninterrupted{where}", file=sys.stderr)
        os._exit(130)   # at once, because other processes may wait for this one
    if is_main():
        print_table(o, rows)
        comparison = {}
        if o.compare_shots:
            import pilot  # it loads matplotlib
            by_key = {case.key: row for case, row in zip(cases, rows, strict=True)}
            comparison = {"comparison": pilot.report(o, found, by_key)}
        about = Path(o.output).with_suffix(".json")
        write_object(about, read_object(about) | {"rows": rows} | comparison)
        print(f"every sample: {o.output}; this table: {about}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
