"""The verifiable reward: 1.0 if the response's final answer equals the reference answer, else 0.0.

    score([r"... so \\boxed{\\frac{1}{2}}"], ["0.5"])         # [1.0]

The final answer is the last box of the response. Equal texts and plain numbers are settled in place; all else goes to
Math-Verify, in the worker processes of verify.py.
"""

import importlib.util
import math
import re
import traceback
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

from verify import compare

FORMATS = ("boxed", "gsm8k", "tags")
MAX_LENGTH = 10_000          # characters of an answer that Math-Verify is asked about

_BOX = re.compile(r"\\f?box(?:ed)?(?![a-zA-Z])\s*")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
_UNBRACED = re.compile(r"(?:[^\s${}]|\{[^\s${}]*\})+")
_SPACE = re.compile(r" (?=\W)|(?<=\W)(?<![0-9],) ")   # beside what is no letter or digit; 1, 234 is not 1,234
_SIZE = re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])")
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3}){1,99}|[0-9]{1,999})"   # Python refuses integers of 4,300 digits
_DECIMAL = re.compile(rf"([+-]?)(?:({_DIGITS})\.?([0-9]{{0,999}})|\.([0-9]{{1,999}}))")
_FRACTION = re.compile(rf"([+-]?)(?:\\frac\{{([+-]?{_DIGITS})\}}\{{({_DIGITS})\}}|({_DIGITS})/({_DIGITS}))")


# ---------------------------------------------------------------------------------------------------------------------
# The final answer of a response

def extract_answer(response: str, answer_format: str = "boxed") -> str | None:
    """The final answer as the response writes it; None if there is none.

    answer_format: "boxed" takes the last \\boxed{...} or \\fbox{...}, braces balanced, or \\boxed 5 up to the next space; a
    last box that is not closed is no answer. "gsm8k" takes what follows the last ####, to the end of its line. "tags" takes
    the last <answer>...</answer>, and of a box in it what the box holds.
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
    """The answer without what changes only how it looks: $, \\left and \\right, \\dfrac for \\frac, spaces that separate
    nothing."""
    answer = _SIZE.sub("", answer.strip().strip("$")).replace("{,}", ",").replace("\\!", "")
    return _SPACE.sub("", " ".join(re.sub(r"\\[dt]frac(?![a-zA-Z])", r"\\frac", answer).split()))


def _number(text: str) -> tuple[Fraction, bool] | None:
    """(value, whether it is written as a fraction) of a plain number, thousands apart by commas or not."""
    if match := _DECIMAL.fullmatch(text):
        sign, whole, decimals, only_decimals = match.groups()
        digits = (whole or "").replace(",", "") + "." + (decimals or only_decimals or "")
        return Fraction(sign + digits if digits[-1] != "." else sign + digits[:-1]), False
    if match := _FRACTION.fullmatch(text):
        top, bottom = (int(part.replace(",", "")) for part in match.groups()[1:] if part is not None)
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
    numbers = _number(given), _number(answer)
    if None in numbers:
        return None
    (a, a_fraction), (b, b_fraction) = numbers
    if a != b and a_fraction != b_fraction and abs(a - b) < Fraction(1, 10 ** 5):
        return None   # Math-Verify knows how many places of a decimal make it a fraction
    return a == b


def score(responses: list[str], answers: list[str], timeout: float = 5.0, workers: int | None = None, *,
          answer_format: str = "boxed", counts: Counter | None = None) -> list[float]:
    """One score, 1.0 or 0.0, for each response, in order.

    responses: what the policy wrote, without the prompt. answers: the reference answers, LaTeX or plain, without a box.
    timeout: seconds that Math-Verify may take for one comparison. Past it, and where it takes more than 1 GiB or dies, the
        score is 0.0, and counts["timeouts"] goes up by one.
    workers: processes for Math-Verify, by default one a core, at most 4, shared among the processes of torchrun; they are
        started when first needed and kept. Calls from several threads take turns.
    answer_format: see extract_answer.
    Raises ValueError if the lists differ in length or the format is unknown, ImportError if Math-Verify is needed and not
    installed. Nothing that a response holds raises anything.
    """
    if len(responses) != len(answers):
        raise ValueError(f"{len(responses)} responses but {len(answers)} answers: give one answer for each response")
    if answer_format not in FORMATS:
        raise ValueError(f"answer_format must be one of {', '.join(FORMATS)}, not {answer_format!r}")
    if answer_format == "gsm8k":   # whose references are worked solutions, too
        answers = [extract_answer(answer, "gsm8k") or answer for answer in answers]
    pairs = [(extract_answer(response, answer_format), answer.strip()) for response, answer in zip(responses, answers)]
    verdicts = {pair: settle(*pair) if pair[0] else False for pair in set(pairs)}   # a group's responses often agree
    hard = [pair for pair, verdict in verdicts.items() if verdict is None]
    if hard:
        verdicts |= zip(hard, compare(hard, timeout, workers, counts if counts is not None else Counter()))
    return [float(verdicts[pair]) for pair in pairs]


# ---------------------------------------------------------------------------------------------------------------------
# A reward of the user's own

class RewardError(RuntimeError):
    """The user's reward function failed."""


def load_reward(name: str) -> Callable:
    """The function that `FILE.py:FUNCTION` names. Raises ValueError where there is none."""
    file, _, function = name.rpartition(":")
    if not file.endswith(".py") or not Path(file).is_file():
        raise ValueError(f"a reward is given as FILE.py:FUNCTION, and {name!r} names no file that is there")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{file} does not load: {_where(error, file)}") from error
    if not callable(getattr(module, function, None)):
        raise ValueError(f"{file} has no function {function!r}")
    return getattr(module, function)


def own_scores(reward: Callable, responses: list[str], problems: list) -> list[float]:
    """What `reward(responses, problems)` returns, checked: a finite number for each. Raises RewardError, which says where."""
    code = getattr(reward, "__code__", None)
    name = f"{code.co_filename}, line {code.co_firstlineno}, {reward.__name__}" if code else repr(reward)
    try:
        scores = list(reward(responses, problems))
    except Exception as error:
        raise RewardError(f"the reward failed: {_where(error, code.co_filename if code else '')}") from error
    if len(scores) != len(responses):
        raise RewardError(f"{name}: {len(scores)} scores for {len(responses)} responses; one each was expected")
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
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    line = frames[-1].lineno if frames else getattr(error, "lineno", None)
    return f"{file}, line {line}{f', in {frames[-1].name}' if frames else ''}: {type(error).__name__}: {error}"
