"""The verifiable reward: 1.0 if the response's final answer equals the reference answer, else 0.0.

    score([r"... so \\boxed{\\frac{1}{2}}"], ["0.5"])         # [1.0]

    python reward.py --check data.jsonl     # lists the references that this reward cannot check

The final answer is the last box of the response. The package answers has the rules of equality;
what needs algebra goes to the worker processes of verify.py.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import get_args

from answers import NeedsAlgebra, equal, is_undone, last_box, understood
from data import Problem, load_problems
from options import AnswerFormat, read_columns
from own_reward import OwnReward, RewardError
from verify import LIMIT, compare

FORMATS = get_args(AnswerFormat)
MAX_LENGTH = 10_000   # a longer answer, in characters, is right only as the same text
SHORT = 200           # a longer one is read in a worker, which can be killed
VOTES = 8             # of the answers to a problem, how many of the commonest algebra compares


# --------------------------------------------------------------------------------------------------
# The final answer of a response

def extract_answer(response: str, answer_format: str = "boxed") -> str | None:
    """The final answer as the response writes it; None if there is none.

    answer_format: "boxed" takes the last box, see answers.last_box. "gsm8k" takes the
    first line behind the last #### that is not empty. "tags" takes the last <answer>...</answer>,
    and if there is a box in it, what the box holds.
    """
    if answer_format == "gsm8k":
        _, mark, rest = response.rpartition("####")
        return rest.strip().split("\n")[0].strip() if mark else None
    if answer_format == "tags":
        before, closed, _ = response.rpartition("</answer>")
        _, opened, inside = before.rpartition("<answer>")
        return (extract_answer(inside) or inside.strip()) if closed and opened else None
    return last_box(response)


# --------------------------------------------------------------------------------------------------
# Whether it is right

@dataclass
class Notes:
    """What `score` could not settle. A response without a verdict earns nothing."""
    timeouts: int = 0                                     # comparisons that passed a limit
    responses: int = 0                                    # without a verdict
    unsettled: Counter = field(default_factory=Counter)   # (answer, reference) -> responses

    def clear(self) -> None:
        self.timeouts, self.responses, self.unsettled = 0, 0, Counter()


def settle(given: str, answer: str | None) -> bool | None:
    """Whether two answers are equal; None where one is not understood.

    An answer None asks whether `given` is understood. Raises NeedsAlgebra where a worker has to
    decide.
    """
    if given == answer:
        return True
    longest = max(len(given), len(answer or ""))
    if longest > MAX_LENGTH:
        return False
    if longest > SHORT:
        raise NeedsAlgebra
    try:
        return understood(given) if answer is None else equal(given, answer)
    except Exception:   # a worker reads it once more, and counts what it cannot read as unsettled
        raise NeedsAlgebra from None


def _verdicts(pairs: set[tuple[str, str | None]], timeout: float, workers: int | None = None):
    """Pair (given, answer) -> True, False, None (not understood) or LIMIT; see settle."""
    verdicts, hard = {}, []
    for pair in pairs:
        try:
            verdicts[pair] = settle(*pair)
        except NeedsAlgebra:
            hard.append(pair)
    if hard:
        verdicts |= zip(hard, compare(hard, timeout, workers), strict=True)
    return verdicts


def score(responses: list[str], answers: Sequence[str | Sequence[str]], timeout: float = 5.0,
          workers: int | None = None, *, answer_format: str = "boxed",
          notes: Notes | None = None) -> list[float]:
    """One score, 1.0 or 0.0, for each response, in order.

    responses: what the policy wrote, without the prompt. answers: the reference answers, LaTeX or
        plain, without a box; for each response one, or several of which any is right.
    timeout: seconds that a comparison with algebra may take. One that takes longer or more than
        1 GiB, or dies, scores 0.0.
    workers: processes for algebra, by default one a core, at most 4, shared among the processes of
        torchrun; they start when first needed and stay. Calls from several threads take turns.
    answer_format: see extract_answer. notes: is told what could not be settled.
    Raises ValueError if the lists differ in length or the format is unknown, RewardError if a
    worker does not start. No response makes it raise.
    """
    if len(responses) != len(answers):
        raise ValueError(f"{len(responses)} responses but {len(answers)} answers: give one answer "
                         f"for each response")
    if answer_format not in FORMATS:
        raise ValueError(f"answer_format must be one of {', '.join(FORMATS)}, "
                         f"not {answer_format!r}")
    rows: list[list[tuple[str, str]]] = []   # for each response, the pairs of which one must agree
    for response, reference in zip(responses, answers, strict=True):
        given = extract_answer(response, answer_format)
        several = [reference] if isinstance(reference, str) else reference
        rows.append([(given, _reference(each, answer_format)) for each in several if given])
    # A set, because the responses to a question often agree.
    verdicts = _verdicts({pair for row in rows for pair in row}, timeout, workers)
    right = [any(verdicts[pair] is True for pair in row) for row in rows]
    if notes is not None:
        notes.timeouts += sum(verdict == LIMIT for verdict in verdicts.values())
        for row, earned in zip(rows, right, strict=True):
            pairs = [pair for pair in row if not earned and verdicts[pair] in (None, LIMIT)]
            notes.responses += bool(pairs)
            notes.unsettled.update(pairs)
    return [float(earned) for earned in right]


def references(problem: Problem, answer_format: str) -> list[str]:
    """The references of a problem as they are compared."""
    return [_reference(text, answer_format) for text in (problem.answer, *problem.other_answers)]


def _reference(answer: str, answer_format: str) -> str:
    worked = extract_answer(answer, "gsm8k") if answer_format == "gsm8k" else None
    return (worked or answer).strip()   # GSM8K's references may be worked solutions


def count_votes(groups: list[list[str | None]], timeout: float = 5.0) -> list[dict[str, int]]:
    """For each group of answers, the votes for each answer, which stands for those equal to it.

    An empty answer and None are no votes. Algebra compares only the VOTES commonest of a group.
    """
    counts, doubts = [], []
    for group in groups:
        found: Counter[str] = Counter()
        unsure: dict[tuple[str, str], None] = {}
        for answer in sorted(filter(None, group), key=_undone):   # 12 is no vote for 5+7
            for other in found:
                try:
                    if settle(answer, other):
                        found[other] += 1
                        break
                except NeedsAlgebra:
                    unsure[answer, other] = None
            else:
                found[answer] += 1
        common = {answer for answer, _ in found.most_common(VOTES)}
        counts.append(found)
        doubts.append([pair for pair in unsure if common.issuperset(pair)])
    pairs = [pair for each in doubts for pair in each]
    verdicts = iter(compare(pairs, timeout) if pairs else [])
    for found, each in zip(counts, doubts, strict=True):
        for (answer, other), verdict in zip(each, verdicts, strict=False):
            if verdict is True and answer in found and other in found:
                found[other] += found.pop(answer)
    return [dict(found) for found in counts]


def _undone(answer: str) -> bool:
    try:
        return len(answer) <= SHORT and is_undone(answer)
    except Exception:   # as in settle
        return False


def find_unclear(answers: Sequence[str], timeout: float = 5.0) -> list[str]:
    """Those references that are not understood, or are not equal to themselves but as text."""
    verdicts = _verdicts({(each, None) for each in answers}, timeout)
    return [each for each in answers if verdicts[each, None] is not True]


def make_scorer(reward: str = "", answer_format: str = "boxed", timeout: float = 5.0,
                notes: Notes | None = None, reward_timeout: float = 600.0) -> Callable:
    """The function (responses, problems) -> scores of these options; see score and OwnReward."""
    if reward:
        return OwnReward(reward, reward_timeout)
    return lambda responses, problems: score(
        responses, [references(problem, answer_format) for problem in problems], timeout,
        answer_format=answer_format, notes=notes)


# --------------------------------------------------------------------------------------------------
# The command

def main() -> None:
    parser = argparse.ArgumentParser(
        prog="reward.py", description="Lists the reference answers of a data set that the reward "
        "does not understand: only a response with the same text earns there.")
    parser.add_argument("--check", metavar="DATA", required=True,
                        help="data set, as --train-data of train.py")
    parser.add_argument("--columns", default="", metavar="problem=NAME,answer=NAME",
                        help="as in train.py")
    parser.add_argument("--answer-lists", choices=("any", "all"), default="any",
                        help="as in train.py (default: %(default)s)")
    parser.add_argument("--answer-format", choices=FORMATS, default="boxed",
                        help="as in train.py (default: %(default)s)")
    parser.add_argument("--verify-timeout", type=float, default=5.0, metavar="SECONDS",
                        help="limit for the comparison of two answers (default: %(default)s)")
    o = parser.parse_args()
    try:
        problems = load_problems(o.check, columns=read_columns(o.columns),
                                 answer_lists=o.answer_lists)
    except ValueError as error:
        parser.error(str(error))
    texts = [(problem.id, text) for problem in problems
             for text in references(problem, o.answer_format)]
    try:
        unclear = set(find_unclear([text for _, text in texts], o.verify_timeout))
    except RewardError as error:
        parser.error(str(error))
    found = [(name, text) for name, text in texts if text in unclear]
    for name, text in found:
        print(f"{name}: {text}")
    print(f"{len(found)} of {len(texts)} references ({len(found) / len(texts):.1%}) are not "
          f"understood" + ("; only a response with the same text earns there" if found else ""))


if __name__ == "__main__":
    main()
