"""What reproduce.py and real.py share: processes, intervals over seeds, tables and pictures.

A system is a method with its settings, and a run trains it once, with one seed. The tables take
{system: {seed: {measure: value}}}.
"""

import argparse
import contextlib
import fcntl
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from statistics import fmean, stdev
from typing import TextIO

import matplotlib
import mpmath  # sympy needs it
import numpy as np
import psutil
from tqdm import tqdm

matplotlib.use("Agg")   # Agg needs no screen.
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from curves import COLOURS, read_metrics, series

# Variables of the environment for one of several runs at the same time.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def claim(folder: Path, settings: dict) -> TextIO:
    """Makes the folder of an experiment, or goes on in one with the same settings. Returns an open
    file that locks it until this script and all processes that it started have ended. Raises
    ValueError for a folder that is locked, has other settings or holds files of others."""
    folder.mkdir(parents=True, exist_ok=True)
    about = folder / "settings.json"
    if not about.is_file() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds files that this script did not write; give another "
                         f"--output-dir")
    lock = about.open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{folder} is in use by this script or by a process that it started "
                         f"before it was killed; wait, or give another --output-dir") from None
    os.set_inheritable(lock.fileno(), True)   # A process that outlives the script holds the lock.
    if not about.read_text():
        about.write_text(json.dumps(settings) + "\n")
    if json.loads(about.read_text()) != settings:
        raise ValueError(f"{folder} holds runs with {about.read_text().strip()}, not with "
                         f"{json.dumps(settings)}; give another --output-dir")
    return lock


def at_least_1(text: str) -> int:
    """The type of an option. Raises ArgumentTypeError for a number below 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


STOPPING = threading.Event()   # Set when `stoppable_pool` stops what it has started.
STARTING = threading.Lock()    # Held while a process starts, so that none starts unseen after that.


def run(command: list[str], log: Path, environment: dict[str, str] = ONE_THREAD) -> None:
    """Runs a Python command in the project's folder and appends its output to `log`. Raises
    RuntimeError with the end of `log` if the command fails, or if `stoppable_pool` is stopping."""
    with log.open("a") as file:
        with STARTING:
            if STOPPING.is_set():
                raise RuntimeError("stopped")
            process = subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                close_fds=False,   # The lock of `claim` is the only file that can be inherited.
                env=os.environ | environment)
        code = process.wait()
    if code:
        raise RuntimeError(f"{' '.join(command)} failed. {log} holds all of its output, which ends "
                           f"with:\n{log.read_text()[-1500:]}")


@contextlib.contextmanager
def clock(file: Path):
    """Appends to a file the seconds that the `with` block took."""
    started = time.time()
    try:
        yield
    finally:
        with file.open("a") as stream:
            stream.write(f"{time.time() - started:.1f}\n")


def rows_of(file: Path, key: str = "rows") -> list[dict]:
    """Returns the rows that an evaluation wrote to `file`, none if it has not finished."""
    return json.loads(file.read_text()).get(key, []) if file.is_file() else []


def beside(folder: Path, kind: str) -> Path:
    return folder.with_name(f"{folder.name}.{kind}")   # with_suffix would cut "λ_=_0.1".


@contextlib.contextmanager
def stoppable_pool(processes: int) -> Iterator[ThreadPoolExecutor]:
    """Yields a pool of threads that start processes. Ctrl-C and SIGTERM, or an error in the `with`
    block, stop these and the script."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)   # SIGTERM stops it as Ctrl-C does.
    pool = ThreadPoolExecutor(processes)
    STOPPING.clear()
    try:
        yield pool
    except (KeyboardInterrupt, Exception) as error:
        with STARTING:
            STOPPING.set()   # Now no process starts when another one ends.
        pool.shutdown(wait=False, cancel_futures=True)
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):
                child.terminate()   # train.py finishes its step and writes a checkpoint.
        pool.shutdown()
        if not isinstance(error, KeyboardInterrupt | RuntimeError | OSError):
            raise   # Its traceback helps more than its words.
        sys.exit(str(error) or "\nThe script was stopped; the same command resumes it.")


def await_runs(futures: dict[str, Future], bar: tqdm) -> list[str]:
    """Waits for runs by name and returns the errors of those that failed."""
    failed = []
    for name, future in futures.items():
        bar.set_postfix_str(name)
        try:
            future.result()
        except RuntimeError as error:
            failed.append(str(error))
            tqdm.write(f"\n{error}\n", file=sys.stderr)
        bar.update()
    return failed


def end_with_failures(failed: list[str], runs: int) -> None:
    if failed:
        sys.exit(f"{len(failed)} of {runs} runs failed with the errors above; the same command "
                 f"tries them again")


@functools.cache
def student(count: int) -> float:
    """Returns the 97.5 % point of Student's distribution for the mean of `count` values."""
    freedom = count - 1
    # Both tails hold the regularised incomplete beta function of ν/2 and 1/2 at ν/(ν + t²).
    return float(mpmath.findroot(lambda t: mpmath.betainc(
        freedom / 2, 0.5, 0, freedom / (freedom + t * t), regularized=True) - 0.05, 2.5))


def over_seeds(values: list[float]) -> tuple[float, float, float]:
    """Returns the mean over seeds and both ends of Student's 95 % interval, which are nan for fewer
    than three values. A bootstrap of five values stays inside their range, and so holds the mean in
    at most 94 % of cases."""
    if len(values) < 3:
        return fmean(values), np.nan, np.nan
    mean, half = fmean(values), student(len(values)) * stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


Results = dict[str, dict[int, dict[str, float]]]


def shown(mean: float, low: float, high: float) -> str:
    """Returns a share and its interval, if there is one, in per cent."""
    return f"{100 * mean:.1f}" + f" ({100 * low:.1f} to {100 * high:.1f})" * bool(low == low)


def right(shares: list[float]) -> str:
    """Returns the text of the mean of shares over seeds, with its interval cut at 0 and 100 %."""
    mean, low, high = over_seeds(shares)
    return shown(mean, *np.clip([low, high], 0.0, 1.0))


def differences(results: Results, baseline: str, measures: dict[str, str]) -> list[str]:
    """Returns an empty line and those of a Markdown table with a row per system, the points by
    which it is above the baseline, with runs paired by seed. Bold ones have an interval without 0.
    There are no lines without the baseline or another system. measures: those to compare, with
    their names in the text."""
    if baseline not in results:   # as where all its runs have failed
        return []
    lines = ["", f"| points above {baseline} | " + " | ".join(measures.values()) + " |",
             "|---" * (1 + len(measures)) + "|"]
    for name, runs in results.items():
        seeds = sorted(runs.keys() & results[baseline].keys())
        if name != baseline and "the runs of" not in name:
            cells = [_difference([runs[seed][measure] - results[baseline][seed][measure]
                                  for seed in seeds]) for measure in measures]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines if len(lines) > 3 else []


def _difference(values: list[float]) -> str:
    if not values:
        return "no seed in common"
    mean, low, high = (100 * value for value in over_seeds(values))
    text = f"{mean:+.1f}" + f" ({low:+.1f} to {high:+.1f})" * bool(low == low)
    return f"**{text}**" if low > 0 or high < 0 else text


def tokens_until(folder: Path) -> dict[int, float]:
    """Returns step -> tokens sampled in training until its end."""
    total, found = 0.0, {0: 0.0}
    for row in read_metrics(folder):
        total += row["tokens_sampled"]
        found[row["step"]] = total
    return found


def draw_tokens(runs: dict[str, list[Path]], output: Path, baseline: str = "GRPO") -> list[str]:
    """Draws held-out accuracy against the tokens sampled in training, means over seeds, and returns
    the lines of a Markdown table: a system's tokens in all, and until it reaches the accuracy that
    GRPO, here named `baseline`, has at the end."""
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    curves = {}
    for number, (name, folders) in enumerate(runs.items()):
        accuracies = [series(read_metrics(folder), "eval_accuracy") for folder in folders]
        tokens = [tokens_until(folder) for folder in folders]
        steps = sorted(set.intersection(*map(set, accuracies)))
        curves[name] = [(fmean(each[step] for each in tokens),
                         fmean(each[step] for each in accuracies)) for step in steps]
        axis.plot([1e-3 * x for x, _ in curves[name]], [100 * y for _, y in curves[name]],
                  color=COLOURS[number % len(COLOURS)], label=name, marker="o", markersize=3)
    axis.set(xlabel="thousand tokens sampled in training", ylabel="held-out accuracy, %")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(output, dpi=110)
    plt.close(figure)
    goal = curves[baseline][-1][1] if baseline in curves else None
    lines = ["| system | thousand tokens sampled | thousand until an evaluation first reaches "
             "GRPO's last |", "|---|---|---|"]
    for name, curve in curves.items():
        reached = "–" if goal is None else next(
            (f"{1e-3 * x:,.0f}" for x, y in curve if y >= goal), "not reached")
        lines.append(f"| {name} | {1e-3 * curve[-1][0]:,.0f} | {reached} |")
    return lines


def draw_bars(results: Results, measures: dict[str, str], title: str, output: Path) -> None:
    """Draws a bar with its interval and its runs for every system and every measure, of which there
    are several."""
    figure, axes = plt.subplots(1, len(measures), figsize=(12, 0.9 + 0.36 * len(results)),
                                layout="constrained", sharey=True)
    for axis, (measure, text) in zip(axes, measures.items()):
        for row, runs in enumerate(results.values()):
            values = [100 * values[measure] for values in runs.values()]
            mean, low, high = over_seeds(values)
            axis.barh(row, mean, color=COLOURS[row % len(COLOURS)], alpha=0.75)
            axis.errorbar(mean, row, xerr=[[mean - low], [high - mean]], capsize=3, color="black",
                          linewidth=1)
            axis.plot(values, [row] * len(values), "|", color="black", alpha=0.5, markersize=5)
            axis.annotate(f"{mean:.1f}", (np.nanmax([high, *values]), row), (5, 0),
                          textcoords="offset points", va="center", fontsize=9)
        axis.set(title=text, xlabel="% right", yticks=range(len(results)),
                 yticklabels=list(results))
        axis.set_xlim(0, 118)   # This leaves room for the figures beside the bars.
        axis.grid(alpha=0.3, axis="x")
    axes[0].invert_yaxis()
    figure.suptitle(title)
    figure.savefig(output, dpi=110)
    plt.close(figure)
