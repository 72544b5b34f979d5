"""Times the reward and Math-Verify called pair by pair, on generated pairs like GSM8K's and MATH's.

    python benchmarks/reward.py --check
    python benchmarks/reward.py --fuzz 20000       # also scores this many mutated responses

The last line of the output gives all figures as name=value.
"""

import argparse
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
from reward import score
from tests.test_reward import mutate

TARGETS = [("seconds", "<=", 20.0), ("disagreements", "<=", 0)]


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


def math_verify_alone(given: str, answer: str) -> bool:
    gold, target = (math_verify.parse(f"\\boxed{{{text}}}") for text in (answer, given))
    return math_verify.verify(gold, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pairs", type=int, default=10_000, help="pairs to score (default: %(default)s)")
    add("--workers", type=int, help="processes for Math-Verify (default: 1 per core, at most 4)")
    add("--fuzz", type=int, default=0,
        help="mutated responses to score as well (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of the pairs (default: %(default)s)")
    add("--check", action="store_true", help="exit with status 1 if a target is missed")
    options = parser.parse_args()
    logging.disable(logging.WARNING)   # This silences Math-Verify.
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
    figures = {"pairs": len(pairs), "right": sum(scores) / len(pairs), "seconds": seconds,
               "math_verify_seconds": time.perf_counter() - start}
    figures["ratio"] = figures["math_verify_seconds"] / seconds
    differing = {(*pair, here, there) for pair, here, there in zip(pairs, scores, alone)
                 if here != there}
    figures["disagreements"] = len(differing)
    for given, answer, here, there in list(differing)[:10]:
        print(f"{given} for {answer}: the reward is {here}, Math-Verify says {there}")
    if options.fuzz:
        seeds, counts, before = responses[:200], Counter(), psutil.Process().memory_info().rss
        start = time.perf_counter()
        for _ in tqdm(range(0, options.fuzz, 1000), desc="fuzz", unit="thousand", leave=False):
            score([mutate(rng.choice(seeds), rng) for _ in range(1000)],
                  rng.choices(answers, k=1000), timeout=1.0, workers=options.workers, counts=counts)
        figures |= {"fuzz": options.fuzz, "fuzz_seconds": time.perf_counter() - start,
                    "fuzz_timeouts": counts["timeouts"],
                    "fuzz_memory_mb": (psutil.Process().memory_info().rss - before) / 1e6,
                    "fuzz_processes": len(psutil.Process().children(recursive=True))}
    report(figures, TARGETS, options.check)


if __name__ == "__main__":
    main()
