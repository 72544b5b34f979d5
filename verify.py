"""Processes that can be killed, for work that can hang or take all memory.

Comparisons of answers with algebra run in worker processes, which run this file as a script. A chat
template runs in a fork of this process, see run_bounded.
"""

import atexit
import contextlib
import json
import os
import queue
import resource
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Pipe
from pathlib import Path

from own_reward import RewardError

MEMORY_LIMIT = 1 << 30   # bytes that the process that compares may hold
START_SECONDS = 120      # limit for the start of a worker, which imports sympy
LIMIT = "limit"          # the verdict where a limit was passed


class _Worker:
    """A process that compares pairs: one line to its input, one line from its output; see _serve.

    It ends when its input closes.
    """

    def __init__(self):
        # The worker has a session of its own, so that Ctrl-C reaches only the trainer, which then
        # closes the pipes.
        try:
            self.process = subprocess.Popen(
                [sys.executable, os.path.abspath(__file__), str(MEMORY_LIMIT)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                start_new_session=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
        except OSError as error:   # memory or the number of processes is short
            raise RewardError(f"a worker of the reward did not start: {error}") from None
        assert self.process.stdin and self.process.stdout
        self.input, self.output = self.process.stdin, self.process.stdout.fileno()
        self.number = 0
        self._await_child()

    def _await_child(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while line := self._read_line(deadline):
            if line[0] == "ready":
                self.child = int(line[1])
                return
        self.kill()
        raise RewardError(f"a worker of the reward did not start; try: {sys.executable} "
                          f"{shlex.quote(os.path.abspath(__file__))}")

    def compare(self, pair: tuple[str, str | None], timeout: float) -> bool | str | None:
        """The verdict on a pair; see compare below."""
        while line := self._read_line(0.0):   # of a new child, or a reply that came too late
            if line[0] == "ready":
                self.child = int(line[1])
        self.number += 1
        deadline = time.monotonic() + timeout
        self.input.write(json.dumps([self.number, *pair]).encode() + b"\n")
        self.input.flush()
        while (line := self._read_line(deadline)) and line[0] not in ("ready", str(self.number)):
            pass   # the reply to an earlier pair
        if line and line[0] == str(self.number):
            return {"True": True, "False": False}.get(line[1])
        if line[:1] == ["ready"]:   # the child that was asked has died; this is the next one
            self.child = int(line[1])
            return LIMIT
        if self.process.poll() is not None:
            raise BrokenPipeError("the worker is gone")
        os.kill(self.child, signal.SIGKILL)
        self._await_child()
        return LIMIT

    def kill(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()

    def _read_line(self, deadline: float) -> list[str]:
        """Returns the words of the next line, or [] if none comes in time or the worker is gone."""
        line, waiting = b"", select.poll()
        waiting.register(self.output, select.POLLIN)
        while not line.endswith(b"\n"):
            left = 1000 * (deadline - time.monotonic())
            if not waiting.poll(max(0.0, min(left, 2e9))):   # it takes 31 bits
                return []
            piece = os.read(self.output, 1)
            if not piece:
                return []
            line += piece
        return line.decode().split()


_workers: list[_Worker] = []
_lock = threading.Lock()


def compare(pairs: Sequence[tuple[str, str | None]], timeout: float,
            workers: int | None = None) -> list[bool | str | None]:
    """answers.equal of each pair (given, answer), or LIMIT where a limit was passed.

    An answer None asks for answers.understood(given) instead.
    timeout: seconds for each. workers: processes, None for default_workers(). Calls from several
    threads take turns. Raises RewardError if a worker does not start, as without Math-Verify.
    """
    count = min(workers or default_workers(), len(pairs))
    idle: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
    stopping = threading.Event()

    def ask(pair):
        worker = idle.get()
        try:
            for _ in range(2):   # again if the worker was gone before it was asked
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
            return LIMIT
        finally:
            idle.put(worker)

    with _lock:
        for worker in _workers[:count] + [None] * (count - len(_workers)):
            idle.put(worker)
        threads = ThreadPoolExecutor(count)
        try:
            return list(threads.map(ask, pairs))
        except BaseException:   # on Ctrl-C nobody waits for a comparison that hangs
            stopping.set()
            for worker in list(_workers):
                worker.kill()
            raise
        finally:
            threads.shutdown(cancel_futures=True)


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers() -> int:
    return max(1, min(4, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def _stop_workers() -> None:
    while _workers:
        _workers.pop().kill()


def _forget_workers() -> None:
    """A forked process calls this: the workers belong to its parent."""
    global _lock
    _workers.clear()
    _lock = threading.Lock()


def run_bounded(function: Callable[[], str], seconds: float = 10.0) -> str:
    """What `function` returns in a fork of this process, which ends with it.

    Raises ValueError with the message of an exception in it, and where it takes more than so many
    seconds or MEMORY_LIMIT bytes. The limit on memory holds on Linux.
    """
    def run() -> list:
        with contextlib.suppress(OSError, ValueError):
            held = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_DATA, (held + MEMORY_LIMIT, held + MEMORY_LIMIT))
        try:
            return [function(), ""]
        except MemoryError:
            return ["", f"it takes more than {MEMORY_LIMIT / 2 ** 30:g} GiB"]
        except BaseException as error:
            return ["", str(error) or type(error).__name__]

    here, there = Pipe(duplex=False)
    with warnings.catch_warnings():   # Python 3.12 warns of threads; the child uses none of them
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            there.send(run())
        finally:
            os._exit(0)
    there.close()
    try:
        result, error = here.recv() if here.poll(seconds) else (
            "", f"it takes more than {seconds:g} seconds")
    except EOFError:
        error = "it ended the process"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if error:
        raise ValueError(error)
    return result


atexit.register(_stop_workers)
os.register_at_fork(after_in_child=_forget_workers)


def _serve(memory_limit: int) -> None:
    """The worker process: it imports sympy once and forks a child that compares.

    When the child dies, the worker forks another in a millisecond. When the trainer is gone, the
    worker kills the child, busy or not, and ends.
    """
    trainer = os.getppid()
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())   # the libraries' prints are no replies
    import answers
    from answers import algebra
    while True:
        here, there = os.pipe()
        child = os.fork()
        if child == 0:
            _serve_pairs(answers, algebra, replies, memory_limit)
            os._exit(0)
        os.close(there)   # now only the child holds it, and its death closes it
        waiting = select.poll()
        waiting.register(here, select.POLLIN)
        waiting.register(sys.stdin.fileno(), 0)   # 0: wake up only when the other end closes
        while not (gone := dict(waiting.poll(1000))) and os.getppid() == trainer:
            pass   # macOS does not wake up for 0
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(here)
        # The child ends with 0 when stdin has ended.
        if sys.stdin.fileno() in gone or status == 0 or os.getppid() != trainer:
            return


def _serve_pairs(answers, algebra, replies, memory_limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError):   # not every system knows it
        resource.setrlimit(resource.RLIMIT_AS, (2 * memory_limit, 2 * memory_limit))
    unit = 1 if sys.platform == "darwin" else 1024
    replies.write(b"ready %d\n" % os.getpid())
    for line in sys.stdin.buffer:
        try:
            number, given, answer = json.loads(line)
        except ValueError:   # a child that was killed had read the beginning of this line
            continue
        try:
            verdict = (answers.understood(given, algebra.equal) if answer is None
                       else answers.equal(given, answer, algebra.equal))
        except MemoryError:
            os._exit(1)
        except Exception:   # sympy has errors of its own
            verdict = None
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit > memory_limit:
            os._exit(1)   # this frees the memory; the next child starts afresh
        replies.write(b"%d %s\n" % (number, str(verdict).encode()))


if __name__ == "__main__":
    _serve(int(sys.argv[1]) if len(sys.argv) > 1 else MEMORY_LIMIT)
