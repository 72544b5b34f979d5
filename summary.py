"""What the samples of an evaluation say: avg@k, pass@k, maj@k, intervals, and the table."""

import math
import sys
from collections.abc import Sequence
from statistics import fmean, variance

from options import PAPER, EvaluationOptions, samples_of, shots_of
from reward import count_votes, extract_answer


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
    right = [sum(r["score"] > 0 for r in group) for group in groups]
    pass_at = {f"pass@{k}": fmean(1 - math.comb(samples - c, k) / math.comb(samples, k)
                                  for c in right) for k in ks}
    answers = [[extract_answer(r["response"], answer_format) for r in group] for group in groups]
    majority = []
    for group, given, votes in zip(groups, answers, count_votes(answers, timeout), strict=True):
        winner = given.index(max(votes, key=votes.__getitem__)) if votes else 0
        majority.append(group[winner]["score"])
    return {"problems": len(groups), **accuracy_of(records, samples), **pass_at,
            "majority": fmean(majority),
            "tokens": fmean(r["tokens"] for r in records),
            "truncated": fmean(not r["finished"] for r in records)}


def accuracy_of(records: list[dict], samples: int) -> dict[str, float]:
    """Returns accuracy, low and high as `summarise` does."""
    scores = [record["score"] for record in records]
    low, high = interval([fmean(scores[i:i + samples]) for i in range(0, len(scores), samples)],
                         samples if {*scores} <= {0, 1} else math.inf)
    return {"accuracy": fmean(scores), "low": low, "high": high}


def interval(means: list[float], samples: float = math.inf) -> tuple[float, float]:
    """The 95 % interval of the mean over problems, each with its own mean score.

    It is Wilson's interval, which holds near 0 and 1 too, with an effective number of trials that
    matches the observed variance of the problems' means. For scores outside 0 to 1 it is the normal
    interval.
    samples: answers to each problem, if all scores are 0 or 1. There are no more trials than such
        answers; few problems can have means that are alike by chance.
    """
    n, p = len(means), fmean(means)
    spread, z = (variance(means) / n if n > 1 else 0.0), 1.959964
    if min(means) < 0 or max(means) > 1:
        return p - z * spread ** 0.5, p + z * spread ** 0.5
    trials = min(p * (1 - p) / spread, n * samples) if spread else n
    centre = p + z * z / (2 * trials)
    width = z * (p * (1 - p) / trials + (z / (2 * trials)) ** 2) ** 0.5
    low, high = ((centre + side * width) / (1 + z * z / trials) for side in (-1, 1))
    # Rounding would leave a mean of 0 or 1 outside.
    return max(0.0, min(p, low)), min(1.0, max(p, high))


def print_table(o: EvaluationOptions, rows: list[dict]) -> None:
    numbers = sorted({samples_of(o, row["data"]) for row in rows})
    # Data sets with different numbers of samples have a column for them.
    number = numbers[0] if len(numbers) == 1 else "k"
    print(f"{o.model}, {' or '.join(map(str, numbers))} sample{'s' * (numbers != [1])} a problem")
    width = max(len(row["data"]) for row in rows) + 1
    shots = [str(row["shots"]) for row in rows]
    if any("demo_format" in row for row in rows):   # then each row says which it has
        shots = [f"{n} {row.get('demo_format', o.demo_format)}" if row["shots"] else n
                 for n, row in zip(shots, rows)]
    wide = max(5, *(len(n) + 1 for n in shots))
    print(f"{'data':<{width}}{'shots':>{wide}}{'temperature':>13}{'problems':>10}"
          + f"{'k':>4}" * (number == "k") + f"{f'avg@{number}':>9}{'95 % interval':>17}"
          + "".join(f"{f'pass@{k}':>9}" for k in o.k)
          + f"{f'maj@{number}':>9}{'tokens':>9}{'truncated':>11}")
    for n, r in zip(shots, rows):
        print(f"{r['data']:<{width}}{n:>{wide}}{r['temperature']:>13g}{r['problems']:>10}"
              + f"{samples_of(o, r['data']):>4}" * (number == "k") + f"{r['accuracy']:>9.1%}"
              + f"{r['low']:.1%} to {r['high']:.1%}".rjust(17)
              + "".join(f"{r[f'pass@{k}']:>9.1%}" if f"pass@{k}" in r else " " * 9 for k in o.k)
              + f"{r['majority']:>9.1%}{r['tokens']:>9.1f}{r['truncated']:>11.1%}")
    first = [row for row in rows if "again" not in row] if o.suite else []
    for n, form in dict.fromkeys((row["shots"], row.get("demo_format", "")) for row in first):
        for kind, names in PAPER.items():   # as the paper prints them: each set counts alike
            average = fmean(r["accuracy"] for r in first if r["data"] in names
                            and (r["shots"], r.get("demo_format", "")) == (n, form))
            print(f"average {kind}, {shots_of(n)}{', ' * bool(form)}{form}: {average:.1%}")
    if any(row["truncated"] > 0.5 for row in rows):
        print(f"warning: most answers of some rows were cut off at --max-new-tokens "
              f"{o.max_new_tokens}, before a final answer; raise it", file=sys.stderr)
