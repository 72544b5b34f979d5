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
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import fmean

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.experiments import (
    Results,
    at_least_1,
    await_runs,
    beside,
    claim,
    clock,
    differences,
    draw_bars,
    draw_tokens,
    end_with_failures,
    right,
    rows_of,
    run,
    stoppable_pool,
)
from curves import draw_groups, read_metrics, series
from tiny.make import make_problems, write_jsonl
from verify import usable_cores

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
DRAWN = {name: text for name, text in MEASURES.items() if name != "longest"}   # it is about 0


@dataclass
class Job:
    setting: str
    name: str
    seed: int
    options: str
    folder: Path


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


def table_of(results: Results, paper: bool = False) -> list[str]:
    """Returns the lines of a Markdown table with one row per system."""
    lines = ["| system | " + " | ".join(MEASURES.values()) + " |" + " paper, Qwen3-8B |" * paper,
             "|---" * (1 + len(MEASURES) + paper) + "|"]
    for name, runs in results.items():
        cells = [right([values[measure] for values in runs.values()]) for measure in MEASURES]
        lines.append(f"| {name} | " + " | ".join(cells) + " |"
                     + f" {PAPER.get(name.split(' (')[0], '–')} |" * paper)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output-dir", type=Path, help="folder of runs and results (default: runs/reproduce, or "
        "runs/reproduce-quick with --quick)")
    add("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS),
        help="settings to run (default: both)")
    add("--systems", nargs="+", choices=SYSTEMS | SPARING, default=list(SYSTEMS),
        help="systems to train (default: those of the paper)")
    add("--sweep", action="store_true", help="also train with choices that the paper leaves open, "
        "and ICPO†, which they vary")
    add("--seeds", type=int, help="runs of each system (default: 5, with --quick 1)")
    add("--steps", type=int, help="training steps of each run (default: 60, with --quick 5)")
    add("--model-steps", type=int, help="optimiser steps that make a setting's model (default: "
        "300, with --quick 100)")
    add("--processes", type=at_least_1, default=usable_cores(), help="runs at the same time "
        "(default: 1 per core)")
    add("--quick", action="store_true", help="run every part once, with one seed and few steps, "
        "too few to learn in `rare`")
    o = parser.parse_args()
    o.seeds, o.steps = o.seeds or (1 if o.quick else 5), o.steps or (5 if o.quick else 60)
    o.model_steps = o.model_steps or (100 if o.quick else 300)
    folder = "reproduce-quick" if o.quick else "reproduce"
    o.output_dir = (o.output_dir or ROOT / "runs" / folder).absolute()
    try:
        _lock = claim(o.output_dir, {"make": f"{MAKE} --steps {o.model_steps}",
                                     "train": f"{TRAIN} --steps {o.steps}"})
    except ValueError as error:
        parser.error(str(error))
    for name, terms in LONGER.items():
        if not (o.output_dir / f"{name}.jsonl").is_file():
            write_jsonl(o.output_dir / f"{name}.jsonl",
                        make_problems(Random(f"{name} problems"), 256, terms, set()))
    variants = CHOICES if o.sweep or o.quick else {}
    names = dict.fromkeys(o.systems + ["ICPO†"] * bool(variants))   # the choices vary ICPO†
    systems = {name: (SYSTEMS | SPARING)[name] for name in names}
    jobs = [Job(setting, name, seed, options,
                o.output_dir / setting / "runs" / f"{name.replace(' ', '_')}-seed{seed}")
            for seed in range(o.seeds) for setting in o.settings
            for name, options in (systems | variants).items()]
    started = time.time()
    with stoppable_pool(o.processes) as pool, tqdm(total=len(o.settings) + len(jobs),
                                                   unit="run") as bar:
        made = {setting: pool.submit(make_setting, o.output_dir / setting, SETTINGS[setting],
                                     o.model_steps)
                for setting in o.settings}
        futures = {f"{job.setting}, {job.name}, seed {job.seed}": pool.submit(
            lambda job: (made[job.setting].result(), finish(job, o.steps)), job) for job in jobs}
        for each in made.values():
            each.result()
            bar.update()
        failed = await_runs(futures, bar)
    report(o, systems, variants, jobs, time.time() - started)
    end_with_failures(failed, len(jobs))


def report(o, systems: dict, variants: dict, jobs: list[Job], seconds: float) -> None:
    """Writes and prints results.md and draws the pictures of the finished runs."""
    lines = [f"Seeds: {o.seeds}, steps: {o.steps}; mean over seeds (Student's 95 % interval), in "
             f"per cent. Differences are seed by seed; bold ones have an interval without 0. This "
             f"call took {seconds:,.0f} s."]
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
        others = dict(table)   # Each pair is compared once.
        for baseline in ("GRPO", "ICPO", "ICPO†"):
            lines += differences(others, baseline, MEASURES)
            others.pop(baseline, None)
        draw_groups({name: [read_metrics(folder) for folder in done[name].values()]
                     for name in systems if name in done}, PANELS,
                    o.output_dir / f"{setting}-curves.png")
        lines += ["", *draw_tokens({name: list(done[name].values()) for name in systems
                                    if name in done}, o.output_dir / f"{setting}-tokens.png")]
        draw_bars(table, DRAWN, f"Setting '{setting}'", o.output_dir / f"{setting}-systems.png")
        swept = {name: results[name] for name in ("ICPO†", *variants) if name in results}
        if len(swept) > 1:
            title = f"Choices in '{setting}', with ICPO† where no other is named"
            lines += ["", f"### {title}", "", *table_of(swept),
                      *differences(swept, "ICPO†", MEASURES)]
            draw_bars(swept, DRAWN, title, o.output_dir / f"{setting}-sweep.png")
    (o.output_dir / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    print(f"\nresults and pictures: {o.output_dir}")


if __name__ == "__main__":
    main()
