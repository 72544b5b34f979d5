"""Runs a reward of the user's own in a process that can be killed.

The process runs this file as a script. It imports the user's file and answers one batch at a time.
"""

import contextlib
import importlib.util
import inspect
import math
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import Any


class RewardError(RuntimeError):
    """A reward cannot be computed: the user's own fails, or a worker does not start."""


class OwnReward:
    """The function that `FILE.py:FUNCTION` names: (responses, problems) -> a number for each.

    timeout: seconds that loading the file, and each call, may take. Raises ValueError where there
    is no such function, and RewardError, which names file and line, where a call fails or does not
    return finite numbers.
    """

    def __init__(self, name: str, timeout: float = 600.0):
        file, _, function = name.rpartition(":")
        if not file.endswith(".py") or not Path(file).is_file():
            raise ValueError(f"a reward is given as FILE.py:FUNCTION, and {name!r} names no file "
                             f"that is there")
        self.name, self.timeout = name, timeout
        self.here, there = Pipe()
        # A session of its own, so that Ctrl-C reaches only the trainer, which then ends it.
        self.process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), str(there.fileno()), file, function],
            pass_fds=[there.fileno()], stdin=subprocess.DEVNULL, start_new_session=True)
        there.close()
        self.close = weakref.finalize(self, _kill, self.process)   # at the latest when Python ends
        try:
            self._receive("load")
        except RewardError as error:
            raise ValueError(str(error)) from None

    def __call__(self, responses: Sequence[str], problems: Sequence[Any]) -> list[float]:
        try:
            self.here.send((list(responses), [vars(each) for each in problems]))
        except OSError:   # it has ended since the last call; _receive says how
            pass
        return self._receive("return")

    def _receive(self, what: str) -> Any:
        if not self.here.poll(min(self.timeout, 2e6)):   # poll counts milliseconds in 31 bits
            self.close()
            raise RewardError(f"the reward {self.name} did not {what} within {self.timeout:g} "
                              f"seconds; --reward-timeout is the limit")
        try:
            result, error = self.here.recv()
        except (EOFError, OSError):
            raise RewardError(f"the process of the reward {self.name} ended by itself, with status "
                              f"{self.process.wait()}") from None
        if error:
            raise RewardError(error)
        return result


def _kill(process: subprocess.Popen) -> None:
    """Ends the process, and those that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# --------------------------------------------------------------------------------------------------
# The process

def load_function(file: str, function: str) -> Callable:
    """Imports the file as Python runs a script: modules in its folder can be imported, too.

    Raises RewardError.
    """
    sys.path.insert(0, str(Path(file).resolve().parent))
    spec = importlib.util.spec_from_file_location("user_reward", file)
    assert spec is not None and spec.loader is not None   # the file is there and ends in .py
    module = sys.modules["user_reward"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException as error:   # sys.exit, too
        raise RewardError(f"{file} does not load: {_where(error, file)}") from error
    if not callable(getattr(module, function, None)):
        raise RewardError(f"{file} has no function {function!r}")
    return getattr(module, function)


def scores_of(reward: Callable, file: str, responses: list[str], problems: list[Any]) -> list:
    """What the reward returns: a finite number for each response. Raises RewardError."""
    code = getattr(reward, "__code__", None)
    where = f"{file}, line {code.co_firstlineno}, {code.co_name}" if code else file
    try:
        found = _call(reward, responses, problems)
        scores = None if found is None else list(found)
    except BaseException as error:   # sys.exit, too
        raise RewardError(f"the reward failed: {_where(error, file)}") from error
    if scores is None:
        raise RewardError(f"{where}: it returned None; a list of numbers was expected")
    if len(scores) != len(responses):
        raise RewardError(f"{where}: {len(scores)} scores for {len(responses)} responses; one each "
                          f"was expected")
    for i, value in enumerate(scores):
        try:
            scores[i] = float(value)
        except (TypeError, ValueError):
            scores[i] = math.nan
        if not math.isfinite(scores[i]):
            raise RewardError(f"{where}: score {i} is {value!r}; a finite number was expected")
    return scores


def _call(reward: Callable, responses: list[str], problems: list[Any]) -> Any:
    """reward(responses, problems), or as TRL calls it, where a parameter is named `completions`.

    TRL passes every column of the data by name; a function without **kwargs gets those it names.
    """
    try:
        parameters = inspect.signature(reward).parameters
    except (TypeError, ValueError):   # of some functions written in C
        parameters = {}
    if "completions" not in parameters:
        return reward(responses, problems)
    columns = {name: [getattr(problem, name) for problem in problems]
               for name in ("problem", "answer", "solution", "id")}
    columns |= {"completions": responses, "prompts": columns["problem"]}
    if all(each.kind != each.VAR_KEYWORD for each in parameters.values()):
        columns = {name: column for name, column in columns.items() if name in parameters}
    return reward(**columns)


def _where(error: BaseException, file: str) -> str:
    """The error, and the last line of that file that it passed."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)
              if frame.filename == os.path.abspath(file)]
    line = frames[-1].lineno if frames else getattr(error, "lineno", None)
    function = f", in {frames[-1].name}" if frames else ""
    return f"{file}, line {line}{function}: {type(error).__name__}: {error}"


def _end_with(parent: int) -> None:
    """Ends this process and those that it has started when the trainer is gone, even in a call."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(os.getpid(), signal.SIGKILL)   # it leads its group


def _serve(trainer: Connection, file: str, function: str) -> None:
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        reward = load_function(file, function)
        trainer.send((None, ""))
    except RewardError as error:
        trainer.send((None, str(error)))
        return
    with contextlib.suppress(EOFError):   # the trainer has closed its end
        while True:
            responses, problems = trainer.recv()
            try:
                problems = [SimpleNamespace(**each) for each in problems]
                trainer.send((scores_of(reward, file, responses, problems), ""))
            except RewardError as error:
                trainer.send((None, str(error)))


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])), *sys.argv[2:4])
