"""The verifiable reward: 1.0 if the response's final answer equals the reference answer, else 0.0.

    score([r"... so \\boxed{\\frac{1}{2}}"], ["0.5"])         # [1.0]

The final answer is the last box of the response. Equal texts and plain numbers are settled in place; all else goes to
Math-Verify, which can hang or take all memory, so it runs in worker processes (this same file, run as a script) that are
killed when a comparison passes its limits.
"""

import atexit
import contextlib
import importlib.util
import json
import math
import os
import queue
import re
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

FORMATS = ("boxed", "gsm8k", "tags")
MAX_LENGTH = 10_000          # characters of an answer that Math-Verify is asked about
MEMORY_LIMIT = 1 << 30       # bytes that a comparison may take
START_SECONDS = 120          # for a worker to import sympy on a busy machine

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
        with _lock:
            verdicts |= zip(hard, _compare(hard, timeout, workers, counts if counts is not None else Counter()))
    return [float(verdicts[pair]) for pair in pairs]


# ---------------------------------------------------------------------------------------------------------------------
# Workers

class _Worker:
    """A process that compares, over a pair of pipes, a line each way; see _serve. It ends when its input closes."""

    def __init__(self):
        # A session of its own: Ctrl-C reaches the trainer, which then closes the pipes, and not the worker.
        self.process = subprocess.Popen([sys.executable, os.path.abspath(__file__), str(MEMORY_LIMIT)], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
                                        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
        self.number = 0
        self._await_child()

    def _await_child(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while line := self._read_line(deadline):
            if line[0] == "ready":
                self.child = int(line[1])
                return
        self.kill()
        raise RuntimeError(f"a Math-Verify worker did not start; try: {sys.executable} {os.path.abspath(__file__)}")

    def compare(self, pair: tuple[str, str], timeout: float) -> bool | None:
        """Math-Verify's verdict; None where a limit was passed."""
        if line := self._read_line(0.0):   # the child has died meanwhile, of nothing that it was asked
            self.child = int(line[1])
        self.number += 1
        deadline = time.monotonic() + timeout
        self.process.stdin.write(json.dumps([self.number, *pair]).encode() + b"\n")
        self.process.stdin.flush()
        line = self._read_line(deadline)
        if line and line[0] == str(self.number):
            return line[1] == "True"
        if line[:1] == ["ready"]:   # the one that was asked has died, and this is the next
            self.child = int(line[1])
            return None
        if self.process.poll() is not None:
            raise BrokenPipeError("the worker is gone")
        os.kill(self.child, signal.SIGKILL)
        self._await_child()
        return None

    def kill(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()

    def _read_line(self, deadline: float) -> list[str]:
        """The words of the worker's next line; none if none comes in time or the worker is gone."""
        line, output = b"", self.process.stdout.fileno()
        waiting = select.poll()
        waiting.register(output, select.POLLIN)
        while not line.endswith(b"\n"):
            if not waiting.poll(max(0.0, 1000 * (deadline - time.monotonic()))):
                return []
            piece = os.read(output, 1)
            if not piece:
                return []
            line += piece
        return line.decode().split()


_workers: list[_Worker] = []
_lock = threading.Lock()


def _compare(pairs: list[tuple[str, str]], timeout: float, count: int | None, counts: Counter) -> list[bool]:
    """Math-Verify's verdict on each pair, by `count` workers."""
    if importlib.util.find_spec("math_verify") is None:
        raise ImportError("comparing these answers needs Math-Verify: pip install math-verify")
    count = min(count or default_workers(), len(pairs))
    idle = queue.SimpleQueue()
    for worker in _workers[:count] + [None] * (count - len(_workers)):
        idle.put(worker)
    stopping = threading.Event()

    def compare(pair):
        worker = idle.get()
        try:
            for _ in range(2):   # once more if the worker was gone before it was asked: no fault of the pair
                if stopping.is_set():
                    return None
                if worker is None:
                    worker = _Worker()
                    _workers.append(worker)
                try:
                    return worker.compare(pair, timeout)
                except OSError:
                    _workers.remove(worker)
                    worker.kill()
                    worker = None
            return None
        finally:
            idle.put(worker)

    threads = ThreadPoolExecutor(count)
    try:
        verdicts = list(threads.map(compare, pairs))
    except BaseException:   # Ctrl-C, above all: nobody waits for what hangs
        stopping.set()
        for worker in list(_workers):
            worker.kill()
        raise
    finally:
        threads.shutdown(cancel_futures=True)
    counts["timeouts"] += verdicts.count(None)
    return [bool(verdict) for verdict in verdicts]


def default_workers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(4, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def _stop_workers() -> None:
    while _workers:
        _workers.pop().kill()


def _forget_workers() -> None:
    """In a forked process: the workers are its parent's."""
    global _lock
    _workers.clear()
    _lock = threading.Lock()


atexit.register(_stop_workers)
os.register_at_fork(after_in_child=_forget_workers)


def _serve(memory_limit: int) -> None:
    """The worker process imports Math-Verify once and forks a child that compares; when the child dies, it forks another,
    in a millisecond. When the trainer is gone, however it went, the child goes too, busy or not."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())   # what the libraries print must not pass for a reply
    import math_verify
    while True:
        here, there = os.pipe()
        child = os.fork()
        if child == 0:
            _serve_pairs(math_verify, replies, memory_limit)
            os._exit(0)
        os.close(there)   # now only the child holds it
        waiting = select.poll()
        waiting.register(here, 0)   # for its end alone, as of the other
        waiting.register(sys.stdin.fileno(), 0)
        gone = {number for number, _ in waiting.poll()}
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(here)
        if sys.stdin.fileno() in gone:
            return


def _serve_pairs(math_verify, replies, memory_limit: int) -> None:
    import resource
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError):   # not every system knows it
        resource.setrlimit(resource.RLIMIT_AS, (2 * memory_limit, 2 * memory_limit))
    unit = 1 if sys.platform == "darwin" else 1024
    replies.write(b"ready %d\n" % os.getpid())
    for line in sys.stdin.buffer:
        try:
            number, given, answer = json.loads(line)
        except ValueError:   # the rest of a line of which a child that was killed had read a part
            continue
        try:   # time limits off: they use signals, and the parent's limit is the one that holds
            gold, target = (math_verify.parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (answer, given))
            verdict = bool(math_verify.verify(gold, target, timeout_seconds=None))
        except Exception:   # whatever a response makes the parser do, it is not the right answer
            verdict = False
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit > memory_limit:
            return   # with all that it holds; the next one starts afresh
        replies.write(b"%d %s\n" % (number, str(verdict).encode()))


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


if __name__ == "__main__":
    _serve(int(sys.argv[1]) if len(sys.argv) > 1 else MEMORY_LIMIT)
