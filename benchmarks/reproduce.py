"""Trains every system of the paper on the embedded problems, with several seeds, and compares them.

    python benchmarks/reproduce.py             # the systems, five seeds each, in two settings
    python benchmarks/reproduce.py --sweep     # also the choices that the paper leaves open
    python benchmarks/reproduce.py --quick     # every part once, with few steps
    python benchmarks/reproduce.py --systems GRPO ICPO "ICPO where all are wrong"

The settings are two models made from the embedded one. Plain sampling almost never finds the worked
solution with `rare` (exploration is the bottleneck) and often finds it with `often`. Both models
err in one of twenty running sums, so that some responses with a demonstration are wrong. Both saw
sums of 9 or 10 numbers when they were made, which the training here does not contain; neither ever
saw sums of 11 or 12 numbers. The script keeps as many runs going as there are cores, with one
thread each. It skips finished runs and resumes stopped ones. The output folder holds the runs,
results.md and the pictures. The folder of each setting also holds its model and pilot.png, which
shows how demonstrations change that model's answers.
"""

import argparse
import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import NormalDist, fmean

import matplotlib
import numpy as np
import psutil
from tqdm import tqdm

matplotlib.use("Agg")   # Agg needs no screen.
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from curves import COLOURS, draw_groups, read_metrics, series
from tiny.make import make_problems, write_jsonl

SETTINGS = {"rare": "0.0", "often": "0.3"}   # --worked-share of tiny/make.py
MAKE = "--init tiny/model --learning-rate 1e-3 --slips 0.05 --document-terms 5 10"
TRAIN = "--learning-rate 1e-4"   # At twice the default rate, few steps are enough to learn.
LONGER = {"longer": (9, 10), "longest": (11, 12)}   # The training has problems of 5 to 8 numbers.
SYSTEMS = {"GRPO": "--method grpo", "LUFFY": "--method luffy", "ICPO": "--method icpo",
           "ICPO†": "--method icpo-rs", "ICPO† − ERRS": "--method icpo --errs false"}
# Not of the paper: off-policy responses only where all plain ones are wrong.
SPARING = {"ICPO where all are wrong": "--method icpo --off-policy-when all-wrong"}
SAME = {"ICPO† − RS": "ICPO", "ICPO† − IEF": "GRPO"}   # The paper defines these as the same method.
PAPER = {"GRPO": 62.37, "ICPO": 65.78, "ICPO†": 66.51, "ICPO† − ERRS": 64.99, "ICPO† − RS": 65.78,
         "ICPO† − IEF": 63.76}
CHOICES = {name: f"--method icpo-rs {options}" for name, options in {
    "denominator 1": "--off-policy-denominator one", "λ = 0.1": "--shaping-lambda 0.1",
    "denominator 1, λ = 0.1": "--off-policy-denominator one --shaping-lambda 0.1",
    "append": "--group append --n-on 7", "no off-policy clip": "--clip-off-policy false",
    "k = 0": "--num-demonstrations 0", "k = 2": "--num-demonstrations 2", "N_off = 2": "--n-off 2",
    "N_off = 4": "--n-off 4", "α = 0.5": "--alpha 0.5", "α = 2": "--alpha 2",
    "no ERRS": "--errs false"}.items()}
CHOICES["LUFFY, λ = 0.01"] = "--method luffy --shaping-lambda 0.01"
PANELS = [("reward_on", "Training reward, on-policy", "share right"),
          ("eval_accuracy", "Held-out accuracy", "share right"),
          ("entropy", "Entropy of the policy", "nats a token"),
          ("errs_accept_rate", "Off-policy responses that enter", "share"),
          ("response_length", "Response length, on-policy", "tokens")]
MEASURES = {"end": "accuracy at the end", "mean": "mean of all evaluations",
            "longer": "9 or 10 numbers", "longest": "11 or 12 numbers"}


@dataclass
class Job:
    setting: str
    name: str
    seed: int
    options: str
    folder: Path


def run(command: list[str], log: Path) -> None:
    """Runs a Python command in the project's folder and appends its output to `log`. Raises
    RuntimeError with the end of `log` if the command fails."""
    with log.open("a") as file:
        code = subprocess.run(
            [sys.executable, *command], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}).returncode
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


def make_setting(folder: Path, share: str, steps: int) -> None:
    """Makes folder/model, the setting's model, and folder/pilot.png, which shows how demonstrations
    change its answers."""
    if not folder.is_dir():
        aside = folder.with_name(f".{folder.name}.partial")   # A kill then leaves no partial model.
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        with clock(aside / "seconds"):
            run(["tiny/make.py", *MAKE.split(), "--steps", str(steps), "--worked-share", share,
                 "--output-dir", str(aside)], aside / "make.log")
        aside.rename(folder)
    if not rows_of(folder / "pilot.json", "comparison"):   # eval.py resumes a stopped evaluation.
        with clock(folder / "seconds"):
            run(["eval.py", "--compare-shots", "--compare-formats", "one-turn", "--model",
                 str(folder / "model"), "--data", "tiny",
                 *(str(folder.parent / f"{name}.jsonl") for name in LONGER), "--max-new-tokens",
                 "96", "--output", str(folder / "pilot.jsonl")], folder / "pilot.log")


def beside(folder: Path, kind: str) -> Path:
    return folder.with_name(f"{folder.name}.{kind}")   # with_suffix would cut "λ_=_0.1".


def finish(job: Job, steps: int) -> None:
    """Trains the job's system and evaluates the result; skips what is done."""
    if rows_of(job.folder / "longer.json"):
        return
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    log = beside(job.folder, "log")
    with clock(beside(job.folder, "seconds")):
        if not (job.folder / "final").is_dir():
            run(["train.py", *job.options.split(), "--model",
                 str(job.folder.parent.parent / "model"), "--seed", str(job.seed), "--steps",
                 str(steps), *TRAIN.split(), "--output-dir", str(job.folder),
                 *(["--resume"] if job.folder.is_dir() else [])], log)
        if (job.folder / "final").is_dir():   # If it is missing, Ctrl-C has stopped train.py.
            run(["eval.py", "--model", str(job.folder), "--data",
                 *(str(job.folder.parents[2] / f"{name}.jsonl") for name in LONGER), "--shots", "0",
                 "--max-new-tokens", "96", "--output", str(job.folder / "longer.jsonl")], log)


def measure(folder: Path) -> dict[str, float]:
    accuracy = series(read_metrics(folder), "eval_accuracy")
    rows = rows_of(folder / "longer.json")
    return {"end": accuracy[max(accuracy)], "mean": fmean(accuracy.values()),
            **{name: row["accuracy"] for name, row in zip(LONGER, rows)}}


@functools.cache
def expanded_tail(n: int) -> float:
    """Returns the share of the bootstrap distribution to leave out on either side,
    Φ(−√(n/(n−1))·t), where t is the 97.5 % point of Student's distribution with n − 1 degrees of
    freedom (Hesterberg, arXiv 1411.5279). Intervals cut at 2.5 % are much too narrow for as few
    values as there are seeds."""
    t = np.quantile(np.random.default_rng(0).standard_t(n - 1, 1_000_000), 0.975)
    return NormalDist().cdf(-(n / (n - 1)) ** 0.5 * t)


def bootstrap(values: list[float]) -> tuple[float, float, float]:
    """Returns the mean over seeds and both ends of its 95 % bootstrap interval by expanded
    percentiles. The ends are nan for fewer than five values, which have too few different
    resamples."""
    array = np.array(values)
    if len(array) < 5:
        return array.mean(), np.nan, np.nan
    means = array[np.random.default_rng(0).integers(len(array), size=(10_000, len(array)))].mean(1)
    tail = expanded_tail(len(array))
    return array.mean(), *np.quantile(means, [tail, 1 - tail])


def table_of(results: dict[str, dict[int, dict]], paper: bool = False) -> list[str]:
    """Returns the lines of a Markdown table with one row per system."""
    lines = ["| system | " + " | ".join(MEASURES.values()) + " |" + " paper, Qwen3-8B |" * paper,
             "|---" * (1 + len(MEASURES) + paper) + "|"]
    for name, runs in results.items():
        cells = [bootstrap([values[measure] for values in runs.values()]) for measure in MEASURES]
        lines.append(f"| {name} | " + " | ".join(
            f"{100 * m:.1f}" + f" ({100 * a:.1f} to {100 * b:.1f})" * bool(a == a)
            for m, a, b in cells) + " |" + f" {PAPER.get(name.split(' (')[0], '–')} |" * paper)
    return lines


def differences(results: dict[str, dict[int, dict]], baseline: str) -> list[str]:
    """Returns a line per system that says how it differs from the baseline, with runs paired by
    seed."""
    lines = []
    for name, runs in results.items():
        if runs is not results[baseline] and "the runs of" not in name:
            parts = []
            for measure, text in MEASURES.items():
                seeds = sorted(runs.keys() & results[baseline].keys())
                mean, low, high = bootstrap([runs[seed][measure] - results[baseline][seed][measure]
                                             for seed in seeds])
                word = ("too few seeds" if np.isnan(low) else
                        "higher" if low > 0 else "lower" if high < 0 else "not told apart")
                span = "" if np.isnan(low) else f", {100 * low:+.1f} to {100 * high:+.1f}"
                parts.append(f"{text} {word} ({100 * mean:+.1f} points{span})")
            lines.append(f"- {name} against {baseline}: " + "; ".join(parts) + ".")
    return lines


def tokens_until(folder: Path) -> dict[int, float]:
    """Returns step -> tokens sampled in training until its end."""
    total, found = 0.0, {0: 0.0}
    for row in read_metrics(folder):
        total += row["tokens_sampled"]
        found[row["step"]] = total
    return found


def draw_tokens(runs: dict[str, list[Path]], output: Path) -> list[str]:
    """Draws held-out accuracy against the tokens sampled in training, means over seeds, and returns
    a line per system: tokens in all, and until it reaches GRPO's accuracy at the end."""
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
    goal = curves["GRPO"][-1][1] if "GRPO" in curves else None
    lines = []
    for name, curve in curves.items():
        line = f"- {name}: {1e-3 * curve[-1][0]:,.0f} thousand tokens sampled"
        reached = next((x for x, y in curve if goal is not None and y >= goal), None)
        lines.append(line + (f", {1e-3 * reached:,.0f} thousand until the evaluation that first "
                             f"reaches GRPO's accuracy at the end" if reached is not None else ""))
    return lines


def draw_bars(results: dict[str, dict[int, dict]], title: str, output: Path) -> None:
    """Draws a bar with its interval and its runs for every system and every measure but the last,
    which is about 0 everywhere."""
    drawn = list(MEASURES.items())[:-1]
    figure, axes = plt.subplots(1, len(drawn), figsize=(12, 0.9 + 0.36 * len(results)),
                                layout="constrained", sharey=True)
    for axis, (measure, text) in zip(axes, drawn):
        for row, runs in enumerate(results.values()):
            values = [100 * values[measure] for values in runs.values()]
            mean, low, high = bootstrap(values)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    add("--output-dir", type=Path, help="folder of runs and results (default: runs/reproduce, or "
        "runs/reproduce-quick with --quick)")
    add("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS),
        help="settings to run (default: both)")
    add("--systems", nargs="+", choices=SYSTEMS | SPARING, default=list(SYSTEMS),
        help="systems to train (default: those of the paper)")
    add("--sweep", action="store_true", help="also train with choices that the paper leaves open")
    add("--seeds", type=int, help="runs of each system (default: 5, with --quick 1)")
    add("--steps", type=int, help="training steps of each run (default: 60, with --quick 5)")
    add("--model-steps", type=int, help="optimiser steps that make a setting's model (default: "
        "300, with --quick 100)")
    add("--processes", type=int, default=cores, help="runs at the same time (default: 1 per core)")
    add("--quick", action="store_true", help="run every part once, with one seed and few steps, "
        "too few to learn in `rare`")
    o = parser.parse_args()
    o.seeds, o.steps = o.seeds or (1 if o.quick else 5), o.steps or (5 if o.quick else 60)
    o.model_steps = o.model_steps or (100 if o.quick else 300)
    folder = "reproduce-quick" if o.quick else "reproduce"
    o.output_dir = (o.output_dir or ROOT / "runs" / folder).absolute()
    o.output_dir.mkdir(parents=True, exist_ok=True)
    about = o.output_dir / "settings.json"
    settings = {"make": f"{MAKE} --steps {o.model_steps}", "train": f"{TRAIN} --steps {o.steps}"}
    if not about.is_file():
        if any(o.output_dir.iterdir()):
            parser.error(f"{o.output_dir} holds files that this script did not write; give another "
                         f"--output-dir")
        about.write_text(json.dumps(settings) + "\n")
    if json.loads(about.read_text()) != settings:
        parser.error(f"{o.output_dir} holds runs with {about.read_text().strip()}, not with "
                     f"{json.dumps(settings)}; give another --output-dir")
    for name, terms in LONGER.items():
        if not (o.output_dir / f"{name}.jsonl").is_file():
            write_jsonl(o.output_dir / f"{name}.jsonl",
                        make_problems(Random(f"{name} problems"), 256, terms, set()))
    systems = {name: (SYSTEMS | SPARING)[name] for name in o.systems}
    variants = CHOICES if o.sweep or o.quick else {}
    jobs = [Job(setting, name, seed, options,
                o.output_dir / setting / "runs" / f"{name.replace(' ', '_')}-seed{seed}")
            for seed in range(o.seeds) for setting in o.settings
            for name, options in (systems | variants).items()]
    started, failed = time.time(), []
    signal.signal(signal.SIGTERM, signal.default_int_handler)   # SIGTERM stops it as Ctrl-C does.
    pool = ThreadPoolExecutor(o.processes)
    try:
        with tqdm(total=len(o.settings) + len(jobs), unit="run") as bar:
            made = {setting: pool.submit(make_setting, o.output_dir / setting, SETTINGS[setting],
                                         o.model_steps)
                    for setting in o.settings}
            futures = [pool.submit(lambda job: (made[job.setting].result(), finish(job, o.steps)),
                                   job) for job in jobs]
            for each in made.values():
                each.result()
                bar.update()
            for future, job in zip(futures, jobs):
                bar.set_postfix_str(f"{job.setting}, {job.name}, seed {job.seed}")
                try:
                    future.result()
                except RuntimeError as error:
                    failed.append(str(error))
                    tqdm.write(f"\n{error}\n", file=sys.stderr)
                bar.update()
    except (KeyboardInterrupt, RuntimeError, OSError) as error:
        pool.shutdown(wait=False, cancel_futures=True)   # Now no run starts when another one ends.
        for child in psutil.Process().children():
            child.terminate()   # train.py finishes its step and writes a checkpoint.
        pool.shutdown()
        sys.exit(str(error) or "\nThe script was stopped; the same command resumes it.")
    report(o, systems, variants, jobs, time.time() - started)
    if failed:
        sys.exit(f"{len(failed)} of {len(jobs)} runs failed with the errors above; the same "
                 "command tries them again")


def report(o, systems: dict, variants: dict, jobs: list[Job], seconds: float) -> None:
    """Writes and prints results.md and draws the pictures of the finished runs."""
    lines = [f"Seeds: {o.seeds}, steps: {o.steps}; mean over seeds (95 % bootstrap interval), in "
             f"per cent. This call took {seconds:,.0f} s."]
    for setting in o.settings:
        done = {}
        for job in jobs:
            if job.setting == setting and rows_of(job.folder / "longer.json"):
                done.setdefault(job.name, {})[job.seed] = job.folder
        results = {name: {seed: measure(folder) for seed, folder in runs.items()}
                   for name, runs in done.items()}
        table = {name: results[name] for name in systems if name in results}
        table |= {f"{name} (the runs of {same})": results[same] for name, same in SAME.items()
                  if same in table}
        made = [line for line in (o.output_dir / setting / "make.log").read_text().splitlines()
                if "worked out" in line]
        clocks = [o.output_dir / setting / "seconds",
                  *(beside(folder, "seconds") for runs in done.values()
                    for folder in runs.values())]
        spent = sum(float(line) for file in clocks for line in file.read_text().split())
        missing = [f"{job.name}, seed {job.seed}" for job in jobs
                   if job.setting == setting and job.seed not in done.get(job.name, {})]
        lines += ["", f"## {setting}", "",
                  f"{len(clocks) - 1} runs, and the making of the model: {spent:,.0f} s of a core."
                  + f" Not done: {'; '.join(missing)}." * bool(missing), "",
                  "The model before training: " + "; ".join(" ".join(line.split()) for line in made)
                  + ".", ""]
        pilot = rows_of(o.output_dir / setting / "pilot.json", "comparison")
        lines += [*(f"- {each['verdict']}".replace(f"{o.output_dir}/", "") for each in pilot), ""]
        lines += table_of(table, paper=True)
        for baseline in ("GRPO", "ICPO†"):
            lines += ["", *differences(table, baseline)] if baseline in table else []
        draw_groups({name: [read_metrics(folder) for folder in done[name].values()]
                     for name in systems if name in done}, PANELS,
                    o.output_dir / f"{setting}-curves.png")
        lines += ["", *draw_tokens({name: list(done[name].values()) for name in systems
                                    if name in done}, o.output_dir / f"{setting}-tokens.png")]
        draw_bars(table, f"Setting '{setting}'", o.output_dir / f"{setting}-systems.png")
        swept = {name: results[name] for name in ("ICPO†", *variants) if name in results}
        if len(swept) > 1:
            title = f"Choices in '{setting}', with ICPO† where no other is named"
            lines += ["", f"### {title}", "", *table_of(swept), "", *differences(swept, "ICPO†")]
            draw_bars(swept, title, o.output_dir / f"{setting}-sweep.png")
    (o.output_dir / "results.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"\nresults and pictures: {o.output_dir}")


if __name__ == "__main__":
    main()
