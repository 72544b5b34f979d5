"""Compares the reward with Math-Verify alone: its mistakes, and its speed.

    python benchmarks/reward.py --check
    python benchmarks/reward.py --references my_data.jsonl
    python benchmarks/reward.py --fuzz 20000       # also scores this many mutated responses

It prints how many wrong answers earn and how many right ones do not, for each kind of pair in
tests/answers.jsonl, and lists those that this reward gets wrong. Then it compares every pair of
different references of a data file, and lists all that are accepted, for a person to read. Then it
times generated pairs like GSM8K's and MATH's. The last line of the output gives all figures as
name=value.
"""

import argparse
import itertools
import json
import logging
import random
import sys
import time
from collections import Counter
from pathlib import Path

import math_verify
import psutil
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.rollout import report
from data import load_problems
from reward import Notes, extract_answer, score
from tests.test_reward import mutate

PAIRS = ROOT / "tests" / "answers.jsonl"
TARGETS = [("wrong_paid", "<=", 0), ("right_missed_share", "<=", 0.01), ("ratio", ">=", 3.0)]


def make_pair(rng: random.Random) -> tuple[str, str]:
    """Returns (given, reference). Half of the pairs are whole numbers as in GSM8K, half are answers
    of MATH's kinds; a third of the given answers are wrong."""
    a, b, c = rng.randint(2, 60), rng.randint(2, 60), rng.choice([2, 3, 5, 7])
    kinds = [(f"{1000 * a + b:,}", str(1000 * a + b)), (str(a * b), str(a * b)),
             (f"{a}.00", str(a)), (f"{a} cm", str(a)), (rf"\frac{{{a}}}{{{c}}}", f"{a}/{c}"),
             (rf"\dfrac{{{a}}}{{{b}}}", rf"\frac{{{2 * a}}}{{{2 * b}}}"),
             (rf"{a}\sqrt{{{c}}}", rf"\sqrt{{{a * a * c}}}"),
             (f"x^2+{a}x-{b}", f"-{b}+{a}x+x^2"), (rf"\left({a}, {b}\right]", f"({a},{b}]"),
             (f"{b}, {a}", f"{a}, {b}"), (rf"{a}\pi", rf"\pi \cdot {a}"),
             (rf"\begin{{pmatrix}} {a} \\ {b} \end{{pmatrix}}",
              rf"\begin{{pmatrix}} {a} \\ {b} \end{{pmatrix}}"),
             (rf"x = {a}", str(a)), (rf"{a}^\circ", str(a)), (r"\text{even}", "even")]
    given, answer = rng.choice(kinds[:4] if rng.random() < 0.5 else kinds[4:])
    if rng.random() < 1 / 3:
        given = given.replace(str(a), str(a + 1)) if str(a) in given else str(b)
    return given, answer


def parse(text: str) -> list:
    return math_verify.parse(f"\\boxed{{{text}}}")


def math_verify_alone(given: str | None, answer: str) -> bool:
    return bool(given) and math_verify.verify(parse(answer), parse(given))


def compare_mistakes() -> dict[str, float]:
    """Prints the table over tests/answers.jsonl, and the mistakes of this reward."""
    pairs = [json.loads(line) for line in PAIRS.read_text().splitlines()]
    table: dict[str, Counter] = {}
    for pair in tqdm(pairs, desc="tests/answers.jsonl", unit="pair", leave=False):
        form, right = pair.get("answer_format", "boxed"), pair["score"] == 1
        here = score([pair["response"]], [pair["answer"]], answer_format=form)[0] == 1
        there = math_verify_alone(extract_answer(pair["response"], form), extract_answer(
            pair["answer"], "gsm8k") or pair["answer"])
        row = table.setdefault(pair["kind"], Counter())
        row[f"right {right}"] += 1
        row[f"here {right}"] += here != right
        row[f"there {right}"] += there != right
        if here != right:
            tqdm.write(f"{'missed' if right else 'paid'}: {pair['response']!r} for "
                       f"{pair['answer']!r}")
    total = Counter()
    print(f"{'kind of pair':<24}{'wrong':>7}{'paid':>7}{'Math-Verify':>13}{'right':>9}{'missed':>8}"
          f"{'Math-Verify':>13}")
    for kind, row in [*sorted(table.items()), ("all", total)]:
        print(f"{kind:<24}{row['right False']:>7}{row['here False']:>7}{row['there False']:>13}"
              f"{row['right True']:>9}{row['here True']:>8}{row['there True']:>13}")
        total += row if row is not total else Counter()
    return {"pairs": len(pairs), "wrong_paid": total["here False"],
            "math_verify_wrong_paid": total["there False"],
            "right_missed_share": total["here True"] / total["right True"],
            "math_verify_right_missed_share": total["there True"] / total["right True"]}


def compare_references(answers: list[str]) -> dict[str, float]:
    """Prints all pairs of different references that this reward takes for equal."""
    pairs = list(itertools.combinations(answers, 2))
    boxed = [f"\\boxed{{{answer}}}" for answer in answers]
    accepted = set()
    for i in tqdm(range(len(answers)), desc="references", leave=False):
        others = [*range(i), *range(i + 1, len(answers))]
        right = score([boxed[j] for j in others], [answers[i]] * len(others))
        accepted |= {tuple(sorted((i, j))) for j, each in zip(others, right, strict=True) if each}
    parsed = [parse(answer) for answer in answers]
    there = sum(math_verify.verify(a, b) or math_verify.verify(b, a) for a, b in tqdm(
        itertools.combinations(parsed, 2), "Math-Verify", len(pairs), unit="pair", leave=False))
    print(f"{len(answers)} references, {len(pairs)} pairs of them: {len(accepted)} are equal here, "
          f"{there} by Math-Verify. Those here:")
    for i, j in sorted(accepted):
        print(f"    {answers[i]}  =  {answers[j]}")
    return {"reference_pairs": len(pairs), "references_equal": len(accepted),
            "math_verify_references_equal": there}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pairs", type=int, default=10_000, help="pairs to time (default: %(default)s)")
    add("--references", help="data file (default: the references of tests/answers.jsonl)")
    add("--most-references", type=int, default=250,
        help="of the different references, the first so many (default: %(default)s)")
    add("--workers", type=int, help="processes for algebra (default: 1 per core, at most 4)")
    add("--fuzz", type=int, default=0,
        help="mutated responses to score as well (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of the pairs (default: %(default)s)")
    add("--check", action="store_true", help="exit with status 1 if a target is missed")
    options = parser.parse_args()
    logging.disable(logging.ERROR)   # This silences Math-Verify.
    answers = ([problem.answer for problem in load_problems(options.references)]
               if options.references else
               [json.loads(line)["answer"] for line in PAIRS.read_text().splitlines()])
    answers = list(dict.fromkeys(answers))[:options.most_references]
    figures = compare_mistakes() | compare_references(answers)

    rng = random.Random(options.seed)
    pairs = [make_pair(rng) for _ in range(options.pairs)]
    responses = [rf"We get {rng.randint(1, 99)}, so the answer is $\boxed{{{given}}}$."
                 for given, _ in pairs]
    answers = [answer for _, answer in pairs]

    # This starts the workers, so that their start is not timed.
    score([r"\boxed{1+x}"] * 8, [f"x+{i}" for i in range(8)], workers=options.workers)
    start = time.perf_counter()
    scores = score(responses, answers, workers=options.workers)
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    bar = tqdm(pairs, desc="Math-Verify, one by one", unit="pair", leave=False)
    alone = [float(math_verify_alone(*pair)) for pair in bar]
    figures |= {"timed_pairs": len(pairs), "right": sum(scores) / len(pairs), "seconds": seconds,
                "math_verify_seconds": time.perf_counter() - start}
    figures["ratio"] = figures["math_verify_seconds"] / seconds
    differing = {(*pair, here, there) for pair, here, there in zip(pairs, scores, alone)
                 if here != there}
    figures["disagreements"] = len(differing)
    for given, answer, here, there in list(differing)[:10]:
        print(f"{given} for {answer}: the reward is {here}, Math-Verify says {there}")
    if options.fuzz:
        seeds, notes, before = responses[:200], Notes(), psutil.Process().memory_info().rss
        start = time.perf_counter()
        for _ in tqdm(range(0, options.fuzz, 1000), desc="fuzz", unit="thousand", leave=False):
            score([mutate(rng.choice(seeds), rng) for _ in range(1000)],
                  rng.choices(answers, k=1000), timeout=1.0, workers=options.workers, notes=notes)
        figures |= {"fuzz": options.fuzz, "fuzz_seconds": time.perf_counter() - start,
                    "fuzz_timeouts": notes.timeouts,
                    "fuzz_memory_mb": (psutil.Process().memory_info().rss - before) / 1e6,
                    "fuzz_processes": len(psutil.Process().children(recursive=True))}
    report(figures, TARGETS, options.check)


if __name__ == "__main__":
    main()
