"""The verifiable reward: 1.0 if the response's final answer equals the reference answer, else 0.0.

    score([r"... so \\boxed{\\frac{1}{2}}"], ["0.5"])         # [1.0]

The final answer is the last box of the response. Equal texts and plain numbers are compared here;
all else goes to Math-Verify in the worker processes of verify.py.
"""

import functools
import importlib.util
import math
import re
import traceback
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import get_args

from options import AnswerFormat
from verify import compare

FORMATS = get_args(AnswerFormat)
MAX_LENGTH = 10_000          # the longest answer, in characters, that Math-Verify gets

_BOX = re.compile(r"\\f?box(?:ed)?(?![a-zA-Z])\s*")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
_UNBRACED = re.compile(r"(?:[^\s${}]|\{[^\s${}]*\})+")
# A space beside a character that is no letter or digit separates nothing; "1, 234" is not 1,234.
_SPACE = re.compile(r" (?=\W)|(?<=\W)(?<![0-9],) ")
_SIZE = re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])")
# Python refuses to read integers of more than 4,300 digits.
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3}){1,99}|[0-9]{1,999})"
_DECIMAL = re.compile(rf"([+-]?)(?:({_DIGITS})\.?([0-9]{{0,999}})|\.([0-9]{{1,999}}))")
_FRACTION = re.compile(rf"([+-]?)(?:\\frac\{{([+-]?{_DIGITS})\}}\{{({_DIGITS})\}}"
                       rf"|({_DIGITS})/({_DIGITS}))")


# --------------------------------------------------------------------------------------------------
# The final answer of a response

def extract_answer(response: str, answer_format: str = "boxed") -> str | None:
    """The final answer as the response writes it; None if there is none.

    answer_format: "boxed" takes the last \\boxed{...} or \\fbox{...} with balanced braces, or
    \\boxed 5 up to a space, $ or unmatched brace, without a final .,; behind it; a last box that is
    not closed is no answer. "gsm8k" takes the rest of the line behind the last ####. "tags" takes
    the last <answer>...</answer>, and if there is a box in it, what the box holds.
    """
    if answer_format == "gsm8k":
        _, mark, rest = response.rpartition("####")
        return rest.strip().split("\n")[0].strip() if mark else None
    if answer_format == "tags":
        before, closed, _ = response.rpartition("</answer>")
        _, opened, inside = before.rpartition("<answer>")
        return (extract_answer(inside) or inside.strip()) if closed and opened else None
    start = max(response.rfind("\\boxed"), response.rfind("\\fbox"))
    box = _BOX.match(response, start) if start >= 0 else None
    if not box:
        return None
    if not response.startswith("{", box.end()):
        text = _UNBRACED.match(response, box.end())
        return text[0].rstrip(".,;") if text else None
    depth = 0
    for brace in _BRACES.finditer(response, box.end()):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)   # \{ and \} do not count
        if depth == 0:
            return response[box.end() + 1:brace.start()].strip()
    return None


def tidy(answer: str) -> str:
    """Removes what changes only the looks of an answer.

    This is outer $, \\left, \\right, \\displaystyle, \\!, the braces of {,} and spaces that
    separate nothing; \\dfrac and \\tfrac become \\frac.
    """
    answer = _SIZE.sub("", answer.strip().strip("$")).replace("{,}", ",").replace("\\!", "")
    answer = re.sub(r"\\[dt]frac(?![a-zA-Z])", r"\\frac", answer)
    return _SPACE.sub("", " ".join(answer.split()))


def _number(text: str) -> tuple[Fraction, bool] | None:
    """(value, whether it is written as a fraction) of a plain number, with or without commas."""
    if match := _DECIMAL.fullmatch(text):
        sign, whole, decimals, only_decimals = match.groups()
        digits = (whole or "").replace(",", "") + "." + (decimals or only_decimals or "")
        return Fraction(sign + digits if digits[-1] != "." else sign + digits[:-1]), False
    if match := _FRACTION.fullmatch(text):
        parts = [part for part in match.groups()[1:] if part is not None]
        top, bottom = (int(part.replace(",", "")) for part in parts)
        if bottom:
            return Fraction(top, bottom) * (-1 if match[1] == "-" else 1), True
    return None


def settle(given: str, answer: str) -> bool | None:
    """Whether the two are equal, where that needs no algebra; None where it does."""
    if given == answer:
        return True
    if max(len(given), len(answer)) > MAX_LENGTH:
        return False
    given, answer = tidy(given), tidy(answer)
    if given == answer:
        return bool(given)
    number, reference = _number(given), _number(answer)
    if number is None or reference is None:
        return None
    (a, a_fraction), (b, b_fraction) = number, reference
    if a != b and a_fraction != b_fraction and abs(a - b) < Fraction(1, 10 ** 5):
        return None   # Math-Verify decides whether a rounded decimal equals a fraction
    return a == b


def score(responses: list[str], answers: list[str], timeout: float = 5.0,
          workers: int | None = None, *, answer_format: str = "boxed",
          counts: Counter | None = None) -> list[float]:
    """One score, 1.0 or 0.0, for each response, in order.

    responses: what the policy wrote, without the prompt. answers: the reference answers, LaTeX or
        plain, without a box.
    timeout: seconds that Math-Verify may take for one comparison. A comparison that takes longer or
        more than 1 GiB, or dies, scores 0.0 and adds one to counts["timeouts"].
    workers: processes for Math-Verify, by default one a core, at most 4, shared among the processes
        of torchrun; they start when first needed and stay. Calls from several threads take turns.
    answer_format: see extract_answer.
    Raises ValueError if the lists differ in length or the format is unknown, ImportError if
    Math-Verify is needed and not installed, RuntimeError if a worker does not start. No response
    makes it raise.
    """
    if len(responses) != len(answers):
        raise ValueError(f"{len(responses)} responses but {len(answers)} answers: give one answer "
                         f"for each response")
    if answer_format not in FORMATS:
        raise ValueError(f"answer_format must be one of {', '.join(FORMATS)}, "
                         f"not {answer_format!r}")
    if answer_format == "gsm8k":   # references may be worked solutions
        answers = [extract_answer(answer, "gsm8k") or answer for answer in answers]
    pairs = [(extract_answer(response, answer_format), answer.strip())
             for response, answer in zip(responses, answers, strict=True)]
    verdicts: dict[tuple, bool | None] = {
        (given, answer): settle(given, answer) if given else False
        for given, answer in set(pairs)}   # a set, because a group's responses often agree
    hard = [pair for pair, verdict in verdicts.items() if verdict is None]
    if hard:
        found = compare(hard, timeout, workers, counts if counts is not None else Counter())
        verdicts |= zip(hard, found, strict=True)
    return [float(verdicts[pair] or False) for pair in pairs]


# --------------------------------------------------------------------------------------------------
# A reward of the user's own

class RewardError(RuntimeError):
    """The user's reward function failed."""


def make_scorer(reward: str = "", answer_format: str = "boxed", timeout: float = 5.0,
                counts: Counter | None = None) -> Callable:
    """The function (responses, problems) -> scores of these options; see score and load_reward."""
    if reward:
        return functools.partial(own_scores, load_reward(reward))
    return lambda responses, problems: score(responses, [problem.answer for problem in problems],
                                             timeout, answer_format=answer_format, counts=counts)


def load_reward(name: str) -> Callable:
    """The function that `FILE.py:FUNCTION` names. Raises ValueError where there is none."""
    file, _, function = name.rpartition(":")
    if not file.endswith(".py") or not Path(file).is_file():
        raise ValueError(f"a reward is given as FILE.py:FUNCTION, and {name!r} names no file that "
                         f"is there")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None and spec.loader is not None   # the file is there and ends in .py
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{file} does not load: {_where(error, file)}") from error
    if not callable(getattr(module, function, None)):
        raise ValueError(f"{file} has no function {function!r}")
    return getattr(module, function)


def own_scores(reward: Callable, responses: list[str], problems: list) -> list[float]:
    """What `reward(responses, problems)` returns: a finite number for each response.

    Raises RewardError, which names file and line, where it fails or returns something else.
    """
    code = getattr(reward, "__code__", None)
    name = repr(reward)
    if code:
        function = getattr(reward, "__name__", code.co_name)
        name = f"{code.co_filename}, line {code.co_firstlineno}, {function}"
    try:
        scores = list(reward(responses, problems))
    except Exception as error:
        where = _where(error, code.co_filename if code else "")
        raise RewardError(f"the reward failed: {where}") from error
    if len(scores) != len(responses):
        raise RewardError(f"{name}: {len(scores)} scores for {len(responses)} responses; one each "
                          f"was expected")
    for i, value in enumerate(scores):
        try:
            scores[i] = float(value)
        except (TypeError, ValueError):
            scores[i] = math.nan
        if not math.isfinite(scores[i]):
            raise RewardError(f"{name}: score {i} is {value!r}; a finite number was expected")
    return scores


def _where(error: Exception, file: str) -> str:
    """The error, and the last line of that file that it passed."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)
              if frame.filename == file]
    line = frames[-1].lineno if frames else getattr(error, "lineno", None)
    function = f", in {frames[-1].name}" if frames else ""
    return f"{file}, line {line}{function}: {type(error).__name__}: {error}"
