"""Trains the paper's systems on a public task with a real model, several seeds, and compares them.

    pip install -r benchmarks/requirements-real.txt           # reasoning-gym
    python benchmarks/real.py --systems GRPO ICPO --seeds 3   # more of either can follow later
    python benchmarks/real.py --systems --demo-format turns one-turn text   # no training
    python benchmarks/real.py --task bases                    # another task
    python benchmarks/real.py --report                        # results.md of what is finished

The tasks are of reasoning-gym. `sums` is chain_sum: sums and differences of four to six numbers of
one digit. `bases` is base_conversion: a number between 4 and 63 is given in another base and is to
be written in base 10.
The script makes the problems with worked solutions; measures the model with 0, 1, 2 and 4
demonstrations in its context, drawn anew for each problem; trains the systems; and asks each
trained model the held-out problems, larger ones (seven or eight numbers, or numbers between 64 and
127), and the equations of simple_equations, without demonstrations. One process runs at a time,
with all cores or a GPU, or several that share a GPU (--processes). Finished work is skipped and
stopped work resumed. The output folder holds the problems, the runs, results.md, written after each
run, and the pictures.
"""

import argparse
import json
import shutil
import sys
import threading
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.experiments import (
    at_least_1,
    await_runs,
    beside,
    claim,
    clock,
    differences,
    draw_bars,
    draw_tokens,
    end_with_failures,
    over_seeds,
    right,
    rows_of,
    run,
    shown,
    stoppable_pool,
)
from curves import draw_groups, read_metrics, series
from files import append_lines
from options import absolute
from verify import usable_cores


class Task(NamedTuple):
    """A generator of reasoning-gym, with its configurations for two levels of difficulty."""
    generator: str
    trained: dict
    longer: dict
    about_longer: str
    limit: int   # tokens of a response; a lower one cuts off many plain answers of the real model
    train: int   # problems to train on; a step asks 8, none twice until all have been asked
    others: int  # problems of each other set


SUM, BASES = {"min_digits": 1, "max_digits": 1}, {"min_base": 2, "max_base": 16}
TASKS = {"sums": Task("chain_sum", {"min_terms": 4, "max_terms": 6} | SUM,
                      {"min_terms": 7, "max_terms": 8} | SUM, "7 or 8 numbers", 200, 2048, 256),
         "bases": Task("base_conversion", {"min_value": 4, "max_value": 63} | BASES,
                       {"min_value": 64, "max_value": 127} | BASES, "64 to 127", 400, 384, 128)}
EQUATIONS = {"min_terms": 2, "max_terms": 2, "min_value": 1, "max_value": 12}
SETS = ["held-out", "screen", "demonstrations", "train", "longer", "equations"]
ASKED = ["held-out", "longer", "equations"]
SHOTS = "1 2 4"   # beside 0
# Without a KL term there is no second model. With this micro-batch a 0.5 B model takes 18 GB.
TRAIN = ("--num-demonstrations 2 --batch-size 8 --n-on 8 --kl-coef 0 "
         "--micro-batch-tokens 2048 --eval-every 5 --checkpoint-every {} --keep-checkpoints 1 "
         "--keep-best false")
# Processes that share a GPU cannot each choose by the memory that is free when they start.
SHARED = {"train.py": "--slots 72 --recompute-activations all", "eval.py": "--slots 72"}
REPORTING = threading.Lock()   # matplotlib draws in one thread at a time.
SYSTEMS = {"GRPO": "--method grpo", "LUFFY": "--method luffy", "ICPO": "--method icpo",
           "ICPO†": "--method icpo-rs", "ICPO, λ = 0.1": "--method icpo --shaping-lambda 0.1"}
PANELS = [("eval_accuracy", "Held-out accuracy, 0 shots", "share right"),
          ("reward_on", "Training reward, on-policy", "share right"),
          ("reward_off", "Training reward, off-policy", "share right"),
          ("response_length", "Response length, on-policy", "tokens"),
          ("errs_accept_rate", "Off-policy responses that enter", "share"),
          ("entropy", "Entropy of the policy", "nats a token")]
IN_TRAINING = {"reward_on": "plain responses right, %", "answered": "with a final answer, %",
               "response_length": "tokens a response", "errs_accept_rate": "ERRS accepts, %",
               "off_policy_share": "tokens of the update that are off-policy, %",
               "groups_all_equal": "groups without a gradient, %", "bonus": "bonus of RS, %"}


# --------------------------------------------------------------------------------------------------
# The problems

def worked(problem: dict) -> str | None:
    """Returns the worked solution of a problem of reasoning-gym with every intermediate result, or
    None for a problem that is left out: a number that is not converted to base 10."""
    about = problem["metadata"]
    if "expression" in about:
        return worked_sum(about["expression"])
    if about["target_base"] == 10:
        return worked_base(about["source_repr"], about["source_base"])


def worked_base(digits: str, base: int) -> str:
    """Returns how digits like "203" in base 4 are converted to base 10."""
    pairs = [(int(digit, base), base ** i) for i, digit in enumerate(reversed(digits))][::-1]
    products = " + ".join(f"{number}*{place}" for number, place in pairs)
    values = [number * place for number, place in pairs]
    added = f"{' + '.join(map(str, values))} = " * (len(values) > 1)
    return f"{products} = {added}{sum(values)}. So the answer is \\boxed{{{sum(values)}}}."


def worked_sum(expression: str) -> str:
    """Returns how a sum like "4 - 7 + 2" is computed."""
    first, *rest = expression.split()
    steps, total = [], int(first)
    for sign, number in zip(rest[::2], rest[1::2], strict=True):
        new = total + int(number) if sign == "+" else total - int(number)
        steps.append(f"{total} {sign} {number} = {new}")
        total = new
    return f"{', '.join(steps)}. So the answer is \\boxed{{{total}}}."


def make_problems(task: Task, name: str, count: int, taken: set[str]) -> list[dict]:
    """Makes `count` problems of the set with this name, none of which is in `taken`, and adds their
    texts to it. Raises ValueError if reasoning-gym is not installed."""
    try:
        from reasoning_gym import create_dataset
    except ImportError:
        raise ValueError("the problems are made by reasoning-gym: pip install -r "
                         "benchmarks/requirements-real.txt") from None
    generator = task.generator if name != "equations" else "simple_equations"
    config = {"longer": task.longer, "equations": EQUATIONS}.get(name, task.trained)
    # Problem i of a data set depends on its seed plus i alone, so the seeds lie far apart.
    first, rows = 1_000_000 * SETS.index(name), []
    for problem in create_dataset(generator, seed=first, size=100 * count, **config):
        text = problem["question"].strip()
        solution = worked(problem) if name != "equations" else ""
        if text in taken or solution is None:
            continue
        taken.add(text)
        row = {"id": f"{name}-{len(rows)}", "problem": text, "answer": problem["answer"]}
        if solution:
            row["solution"] = solution
        if name == "train":
            row["expert_response"] = row["solution"]
        rows.append(row)
        if len(rows) == count:
            break
    return rows


def write_problems(folder: Path, task: Task, scale: int) -> None:
    """Writes NAME.jsonl for each of SETS, with 1/scale of the problems, unless they are there."""
    if folder.is_dir():
        return
    aside, taken = folder.with_name(f".{folder.name}.partial"), set()
    shutil.rmtree(aside, ignore_errors=True)   # A kill may have left it.
    aside.mkdir()
    for name in SETS:
        count = (task.train if name == "train" else task.others) // scale
        append_lines(aside / f"{name}.jsonl", make_problems(task, name, count, taken))
    aside.rename(folder)


# --------------------------------------------------------------------------------------------------
# What runs

def ask(o, model: Path | str, sets: list[str], output: Path, *options: str) -> None:
    """Evaluates a model on sets of problems, unless `output` holds the result."""
    if not rows_of(output.with_suffix(".json")):
        run(["eval.py", "--model", str(model), "--data",
             *(str(o.data / f"{name}.jsonl") for name in sets), "--demonstrations",
             str(o.data / "demonstrations.jsonl"), "--max-new-tokens", str(o.limit), "--dtype",
             o.dtype, "--output", str(output), *options, *o.shared["eval.py"].split()],
            beside(output, "log"), o.environment)


def screen(o, demo_format: str | None) -> None:
    """Measures the model before training: plainly, or with demonstrations in this format."""
    if demo_format is None:
        ask(o, o.model, ["screen", *ASKED], o.output_dir / "before.jsonl", "--shots", "0")
    else:
        ask(o, o.model, ["screen"], o.output_dir / f"screen-{demo_format}.jsonl", "--shots",
            *SHOTS.split(), "--demo-format", demo_format)


def folder_of(o, name: str, seed: int) -> Path:
    return o.output_dir / "runs" / f"{name.replace(' ', '_')}-seed{seed}"


def finish(o, name: str, seed: int) -> None:
    """Trains the system with this seed and evaluates the result; skips what is done."""
    folder = folder_of(o, name, seed)
    if rows_of(folder / "after.json"):
        return
    folder.parent.mkdir(exist_ok=True)
    with clock(beside(folder, "seconds")):
        if not (folder / "final").is_dir():
            run(["train.py", *SYSTEMS[name].split(), *o.train.split(), "--model", o.model,
                 "--dtype", o.dtype, "--train-data", str(o.data / "train.jsonl"), "--test-data",
                 str(o.data / "held-out.jsonl"), "--demonstrations",
                 str(o.data / "demonstrations.jsonl"), "--seed", str(seed), "--output-dir",
                 str(folder), "--resume", *o.shared["train.py"].split()],
                beside(folder, "log"), o.environment)
        if (folder / "final").is_dir():   # If it is missing, a signal has stopped train.py.
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)   # They are large.
            ask(o, folder, ASKED, folder / "after.jsonl", "--shots", "0")
            with REPORTING:
                report(o)


# --------------------------------------------------------------------------------------------------
# The report

def by_set(file: Path) -> dict[str, dict]:
    """Returns the rows of an evaluation by the name of the set."""
    return {Path(row["data"]).stem: row for row in rows_of(file)}


def named(name: str, runs: dict) -> str:
    return f"{name}, {len(runs)} seed{'s' * (len(runs) != 1)}"


def screening_table(o) -> list[str]:
    """Returns the lines of a Markdown table of the untrained model, without and with
    demonstrations."""
    found = [("–", row) for name, row in by_set(o.output_dir / "before.json").items()
             if name == "screen"]
    found += [(file.stem.partition("-")[2], row)
              for file in sorted(o.output_dir.glob("screen-*.json")) for row in rows_of(file)]
    return ["| demonstrations | format | problems | right, % (interval over problems) | tokens | "
            "cut off, % |", "|---" * 6 + "|", *(
                f"| {row['shots']} | {form} | {row['problems']} | "
                f"{shown(row['accuracy'], row['low'], row['high'])} | {row['tokens']:.1f} | "
                f"{100 * row['truncated']:.1f} |" for form, row in found)]


def trained_table(asked: dict[str, str], before: dict[str, dict],
                  done: dict[str, dict[int, dict]]) -> list[str]:
    """Returns the lines of a Markdown table of the answers to the sets `asked`, which are given
    with their titles. before: of the untrained model, by set; done: {system: {seed: the same}}."""
    lines = ["| system | seeds | " + " | ".join(f"{text}, % | tokens" for text in asked.values())
             + " |", "|---" * (2 + 2 * len(asked)) + "|"]
    if before:
        lines.append("| before training | – | " + " | ".join(
            f"{shown(*(before[name][part] for part in ('accuracy', 'low', 'high')))} | "
            f"{before[name]['tokens']:.1f}" for name in asked) + " |")
    for system, runs in done.items():
        cells = []
        for name in asked:
            cells.append(right([each[name]["accuracy"] for each in runs.values()]))
            mean, low, high = over_seeds([each[name]["tokens"] for each in runs.values()])
            cells.append(f"{mean:.1f}" + f" ({low:.1f} to {high:.1f})" * bool(low == low))
        lines.append(f"| {system} | {len(runs)} | " + " | ".join(cells) + " |")
    return lines


def progress_table(runs: dict[str, list[list[dict]]]) -> list[str]:
    """Returns the lines of a Markdown table of the held-out accuracy at each evaluation. runs:
    {system: metrics of each run}."""
    found = {name: [series(metrics, "eval_accuracy") for metrics in each]
             for name, each in runs.items()}
    steps = sorted(set.intersection(*(set(each) for several in found.values() for each in several)))
    return ["| system | seeds | " + " | ".join(f"{step} steps, %" for step in steps) + " |",
            "|---" * (2 + len(steps)) + "|", *(
                f"| {name} | {len(several)} | " + " | ".join(
                    right([each[step] for each in several]) for step in steps) + " |"
                for name, several in found.items())]


def training_table(runs: dict[str, list[list[dict]]]) -> list[str]:
    """Returns the lines of a Markdown table of the first and last quarter of the steps. runs:
    {system: metrics of each run}."""
    def part(metrics: list[list[dict]], key: str, quarter: slice) -> str:
        values = [row[key] for each in metrics for row in each[quarter] if row[key] is not None]
        scale = 1 if key == "response_length" else 100
        return f"{scale * fmean(values):.1f}" if values else "–"

    lines = ["| system | seeds | " + " | ".join(IN_TRAINING.values()) + " |",
             "|---" * (2 + len(IN_TRAINING)) + "|"]
    for name, metrics in runs.items():
        size = -(-min(map(len, metrics)) // 4)
        first, last = slice(size), slice(-size, None)
        cells = [f"{part(metrics, key, first)} → {part(metrics, key, last)}" for key in IN_TRAINING]
        lines.append(f"| {name} | {len(metrics)} | " + " | ".join(cells) + " |")
    return lines


def report(o) -> None:
    """Writes results.md and draws the pictures of the runs that are finished, whoever asked."""
    folders, metrics, done, clocks, unfinished = {}, {}, {}, [], []
    task = o.settings.get("task", "sums")
    titles = "held-out problems", TASKS[task].about_longer, "simple_equations"
    asked = dict(zip(ASKED, titles, strict=True))
    words = o.settings["train"].split()
    wanted = int(words[words.index("--steps") + 1])
    for name in SYSTEMS:
        for folder in sorted((o.output_dir / "runs").glob(f"{folder_of(o, name, 0).name[:-1]}*")):
            if not folder.is_dir():   # Its log and its clock lie beside it.
                continue
            seed = int(folder.name.rpartition("seed")[2])
            clocks.append(beside(folder, "seconds"))
            rows = read_metrics(folder) if (folder / "metrics.jsonl").is_file() else []
            if len(rows) == wanted:
                folders.setdefault(name, {})[seed] = folder
                metrics.setdefault(name, {})[seed] = rows
                if after := by_set(folder / "after.json"):
                    done.setdefault(name, {})[seed] = after
            elif rows:
                unfinished.append(f"{name}, seed {seed} ({len(rows)} steps)")
    hours = sum(float(line) for file in clocks if file.is_file()
                for line in file.read_text().split()) / 3600
    lines = [f"# The task {task} with a real model", "", f"`{json.dumps(o.settings)}`", "",
             "Intervals hold 95 %. Differences are seed by seed; bold ones have an interval "
             "without 0.", "", "## The model before training", "", *screening_table(o),
             "", "## After training", "",
             f"Answers without demonstrations. Intervals are Student's over seeds, none for "
             f"fewer than three; of the untrained model over problems. "
             f"The runs took {hours:.1f} hours, added up."
             + f" Not finished: {'; '.join(unfinished)}." * bool(unfinished), ""]
    lines += trained_table(asked, by_set(o.output_dir / "before.json"), done)
    if done:
        results = {named(name, runs): {seed: {part: row["accuracy"] for part, row in sets.items()}
                                       for seed, sets in runs.items()}
                   for name, runs in done.items()}
        if "GRPO" in done:
            lines += differences(results, named("GRPO", done["GRPO"]), asked)
        draw_bars(results, asked, "After training", o.output_dir / "systems.png")
    if metrics:
        of_runs = {name: list(runs.values()) for name, runs in metrics.items()}
        draw_groups(of_runs, PANELS, o.output_dir / "curves.png")
        lines += ["", "## Held-out accuracy in training", "", *progress_table(of_runs)]
        ends = {name: {seed: {"end": rows[-1]["eval_accuracy"]} for seed, rows in runs.items()}
                for name, runs in metrics.items()}
        lines += differences(ends, "GRPO", {"end": "after the last step"})
        lines += ["", "## Tokens sampled in training", "",
                  *draw_tokens({named(name, runs): list(runs.values())
                                for name, runs in folders.items()}, o.output_dir / "tokens.png",
                               named("GRPO", folders.get("GRPO", {})))]
        lines += ["", "## In training", "", "Means over the first quarter of the steps → over the "
                  "last quarter.", "", *training_table(of_runs)]
    (o.output_dir / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


# --------------------------------------------------------------------------------------------------
# The command

def fast_dtype() -> str:
    """Returns bfloat16 for a GPU and for a processor with instructions for it, else float32."""
    import torch  # It takes seconds.

    from machine import has_bfloat16
    return "bfloat16" if torch.cuda.is_available() or has_bfloat16() else "float32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    forms = ["turns", "one-turn", "text"]
    add("--output-dir", type=Path, help="folder of problems, runs and results (default: runs/real "
        "for sums and runs/real-bases for bases, with -quick behind it with --quick)")
    add("--task", choices=list(TASKS), default="sums", help="what to train (default: %(default)s)")
    add("--model", default="Qwen/Qwen2.5-Coder-0.5B-Instruct", help="Hugging Face folder or hub "
        "name (default: %(default)s)")
    add("--systems", nargs="*", choices=SYSTEMS, default=list(SYSTEMS)[:4],
        help="systems to train; without a name there is no training (default: GRPO LUFFY ICPO "
        "ICPO†)")
    add("--seeds", type=int, help="runs of each system (default: 3, with --quick 1)")
    add("--steps", type=int, help="training steps of each run (default: 20, with --quick 2)")
    add("--processes", type=at_least_1, default=1, help="processes at the same time, which share "
        "the cores and the GPU; four of the default model fit into 80 GB of a GPU (default: "
        "%(default)s)")
    add("--checkpoint-every", type=int, default=5, help="steps between checkpoints; 0 writes none "
        "before a signal. On a GPU one of 7.5 GB, as the default model has, can take longer than "
        "the steps (default: %(default)s)")
    add("--learning-rate", type=float, default=5e-6, help="of the training (default: %(default)s)")
    add("--demo-format", nargs="+", choices=forms, default=forms[:1], help="formats of the prompt "
        "with demonstrations to screen; the systems are trained with the first (default: turns)")
    add("--dtype", choices=["float32", "bfloat16"], help="to compute in (default: bfloat16 on a "
        "GPU or a processor with AVX512_BF16 or AMX, else float32)")
    add("--report", action="store_true", help="write results.md of what is there, and end")
    add("--quick", action="store_true", help="run every part with one seed, few steps and "
        "few problems")
    o = parser.parse_args()
    o.seeds, o.steps = o.seeds or (1 if o.quick else 3), o.steps or (2 if o.quick else 20)
    folder = "real" + f"-{o.task}" * (o.task != "sums") + "-quick" * o.quick
    o.output_dir = (o.output_dir or ROOT / "runs" / folder).absolute()
    o.data, o.model = o.output_dir / "data", absolute(o.model)
    o.dtype = o.dtype or fast_dtype()
    o.environment = {"OMP_NUM_THREADS": str(max(usable_cores() // o.processes, 1))}
    o.shared = SHARED if o.processes > 1 else dict.fromkeys(SHARED, "")
    try:
        if o.report:
            about = o.output_dir / "settings.json"
            if not about.is_file():
                raise ValueError(f"{o.output_dir} holds no runs of this script; give their folder "
                                 f"as --output-dir")
            o.settings = json.loads(about.read_text())
        else:
            o.limit = TASKS[o.task].limit
            o.train = (f"--max-new-tokens {o.limit} {TRAIN.format(o.checkpoint_every)} "
                       f"--demo-format {o.demo_format[0]} --learning-rate {o.learning_rate:g} "
                       f"--steps {o.steps}")
            scale = 32 if o.quick else 1
            o.settings = {"model": o.model, "dtype": o.dtype, "train": o.train,
                          "share of the problems": f"1/{scale}"}
            if o.task != "sums":   # Folders of earlier versions do not name it and can go on.
                o.settings["task"] = o.task
            _lock = claim(o.output_dir, o.settings)
            write_problems(o.data, TASKS[o.task], scale)
    except ValueError as error:
        parser.error(str(error))
    failed, tasks = [], {}
    if not o.report:
        with stoppable_pool(o.processes) as pool:
            tasks = {"before training": pool.submit(screen, o, None)}
            tasks |= {f"demonstrations as {form}": pool.submit(screen, o, form)
                      for form in o.demo_format}
            tasks |= {f"{name}, seed {seed}": pool.submit(finish, o, name, seed)
                      for seed in range(o.seeds) for name in o.systems}
            with tqdm(total=len(tasks), unit="task") as bar:
                failed = await_runs(tasks, bar)
    report(o)
    print((o.output_dir / "results.md").read_text(encoding="utf-8"))
    print(f"results and pictures: {o.output_dir}")
    end_with_failures(failed, len(tasks))


if __name__ == "__main__":
    main()
