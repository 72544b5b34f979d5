"""The verifiable reward: 1.0 if the response's final answer equals the reference answer, else 0.0.

    score([r"... so \\boxed{\\frac{1}{2}}"], ["0.5"])         # [1.0]

The final answer is the last \\boxed{...} of the response. Equal strings and plain numbers are settled in place; all else
goes to Math-Verify, which can hang, so it runs in worker processes (this same file, run as a script) that are killed
when a comparison passes its time limit.
"""

import atexit
import importlib.util
import json
import os
import queue
import re
import select
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

_NUMBER = re.compile(r"[+-]?([0-9]{1,999}\.?[0-9]{0,999}|\.[0-9]{1,999})")   # Python refuses integers of 4,300 digits
_START_SECONDS = 120   # for a worker to import sympy on a busy machine


def extract_answer(response: str) -> str | None:
    """What stands in the last \\boxed{...}, braces balanced; None if there is none or it is not closed."""
    start = response.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth, escaped = 1, False
    for end in range(start, len(response)):
        character = response[end]
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = True
        elif character in "{}":
            depth += 1 if character == "{" else -1
            if depth == 0:
                return response[start:end].strip()
    return None


def score(responses: list[str], answers: list[str], timeout: float = 5.0, workers: int | None = None) -> list[float]:
    """One score, 1.0 or 0.0, for each response, in order.

    responses: what the policy wrote, without the prompt. answers: the reference answers, LaTeX or plain, without a box.
    timeout: seconds that Math-Verify may take for one comparison; past it the score is 0.0.
    workers: processes for Math-Verify, by default one a core and at most 4; they are started when first needed and kept.
    Raises ValueError if the lists differ in length, ImportError if Math-Verify is needed and not installed.
    """
    if len(responses) != len(answers):
        raise ValueError(f"{len(responses)} responses but {len(answers)} answers: give one answer for each response")
    scores, hard = [0.0] * len(responses), []
    for i, (response, answer) in enumerate(zip(responses, answers)):
        given, answer = extract_answer(response), answer.strip()
        if not given:
            continue
        if given == answer:
            scores[i] = 1.0
        elif _NUMBER.fullmatch(given) and _NUMBER.fullmatch(answer):
            scores[i] = float(Fraction(given) == Fraction(answer))
        else:
            hard.append((i, given, answer))
    if hard:
        pool = _pool(workers or min(4, os.cpu_count() or 1))

        def settle(item):
            worker = pool.get()
            try:
                return float(worker.equal(item[1], item[2], timeout))
            finally:
                pool.put(worker)

        with ThreadPoolExecutor(pool.qsize()) as threads:
            for (i, _, _), result in zip(hard, threads.map(settle, hard)):
                scores[i] = result
    return scores


# ---------------------------------------------------------------------------------------------------------------------
# Workers

class _Worker:
    """One process that compares, over a pair of pipes, a JSON line each way. It ends when its input closes."""

    def __init__(self):
        self.process = None

    def equal(self, given: str, answer: str, timeout: float) -> bool:
        """Math-Verify's verdict; False if it takes longer than `timeout` seconds or the process dies of it."""
        if self.process is None or self.process.poll() is not None:
            self.start()
        try:
            self.process.stdin.write(json.dumps([given, answer]).encode() + b"\n")
            self.process.stdin.flush()
            reply = self._read_line(timeout)
        except OSError:
            reply = b""
        if not reply:
            self.kill()
        return reply == b"1"

    def start(self) -> None:
        # A session of its own: Ctrl-C reaches the trainer, which then closes the pipes, and not the worker.
        self.process = subprocess.Popen([sys.executable, os.path.abspath(__file__)], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
        if self._read_line(_START_SECONDS) != b"ready":
            self.kill()
            raise RuntimeError(f"a Math-Verify worker did not start; try: {sys.executable} {os.path.abspath(__file__)}")

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()
            self.process = None

    def _read_line(self, timeout: float) -> bytes:
        """The next line of the worker without its end; empty if none comes in time or the worker is gone."""
        deadline, line = time.monotonic() + timeout, b""
        output = self.process.stdout.fileno()
        while not line.endswith(b"\n"):
            if not select.select([output], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return b""
            piece = os.read(output, 1)
            if not piece:
                return b""
            line += piece
        return line[:-1]


_workers: list[_Worker] = []


def _pool(count: int) -> queue.SimpleQueue:
    """The first `count` workers, made as needed; each starts its process at its first comparison."""
    if importlib.util.find_spec("math_verify") is None:
        raise ImportError("comparing these answers needs Math-Verify: pip install math-verify")
    while len(_workers) < count:
        _workers.append(_Worker())
        atexit.register(_workers[-1].kill)
    pool = queue.SimpleQueue()
    for worker in _workers[:count]:
        pool.put(worker)
    return pool


def _serve() -> None:
    """The worker process: compare pair after pair until the input closes."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())   # what the libraries print must not pass for a reply
    from math_verify import parse, verify
    replies.write(b"ready\n")
    for line in sys.stdin.buffer:
        given, answer = json.loads(line)
        try:   # time limits off: they use signals, and the parent's limit is the one that holds
            gold, target = (parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (answer, given))
            verdict = bool(verify(gold, target, timeout_seconds=None))
        except Exception:   # whatever a response makes the parser do, it is not the right answer
            verdict = False
        replies.write(b"1\n" if verdict else b"0\n")


if __name__ == "__main__":
    _serve()
