"""Draws the learning curves of one or several runs from their metrics.jsonl.

    python curves.py runs/icpo-seed0 runs/icpo-seed1 runs/grpo-seed0 --output curves.png

Runs of the same method and settings are one line, their mean, in a band from the lowest to the
highest. It prints each run's held-out accuracy before and after, and the first evaluation at which
that is 90 % or more.
"""

import argparse
from dataclasses import fields
from pathlib import Path

import matplotlib

from files import read_lines, read_settings
from options import IMPLIED, TrainingOptions, flag, shown

matplotlib.use("Agg")   # no screen needed
import matplotlib.pyplot as plt

# (metric, title, unit): a panel each
PANELS = [("eval_accuracy", "Held-out accuracy, 0 shots", "share right"),
          ("reward_on", "Training reward, on-policy", "share right"),
          ("reward_off", "Training reward, off-policy", "share right"),
          ("entropy", "Entropy of the policy", "nats a token"),
          ("response_length", "Response length, on-policy", "tokens"),
          ("grad_norm", "Gradient norm before clipping", "")]
# The palette of Okabe and Ito, which the colour-blind can tell apart.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
LABELS = {"grpo": "GRPO", "luffy": "LUFFY", "luffy-release": "LUFFY (release)", "icpo": "ICPO",
          "icpo-rs": "ICPO†"}   # --method: name
STYLES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (3, 3))]


def read_metrics(run: Path) -> list[dict]:
    file = Path(run) / "metrics.jsonl"
    if not file.is_file():
        raise ValueError(f"{run} is not a run: it has no metrics.jsonl")
    return read_lines(file)


def series(metrics: list[dict], name: str) -> dict[int, float]:
    """Step -> value, where the step has one. Step 0 is the held-out accuracy before the first."""
    values = {row["step"]: row[name] for row in metrics if row.get(name) is not None}
    before = name.replace("eval_accuracy", "eval_accuracy_before")
    if before != name and metrics and metrics[0].get(before) is not None:
        values = {metrics[0]["step"] - 1: metrics[0][before]} | values
    return values


def draw(runs: list[Path], output: Path) -> None:
    """Writes a PNG with a panel for each of PANELS, and for each of several held-out data sets.

    Raises ValueError for what is not a run.
    """
    groups: dict[str, list[list[dict]]] = {}
    settings = {run: _settings(run) for run in map(Path, runs)}
    for run in map(Path, runs):
        mine = settings[run]
        alike = [each for each in settings.values() if each.get("method") == mine.get("method")]
        differing = [f"{flag(name)} {value}" for name, value in mine.items()
                     if any(each.get(name, value) != value for each in alike)]
        label = " ".join([LABELS.get(mine.get("method", ""), run.name), *differing])
        label = label.replace("$", r"\$")   # which begins a formula in matplotlib
        groups.setdefault(label, []).append(read_metrics(run))
    names = dict.fromkeys(name for group in groups.values() for metrics in group for row in metrics
                          for name in row if name.startswith("eval_accuracy/"))
    sets = [(name, f"Held-out accuracy, {name.partition('/')[2]}", "share right") for name in names]
    draw_groups(groups, PANELS + sets, Path(output))


def _settings(run: Path) -> dict:
    """The settings of a run that make it another system than other runs of its method."""
    config = run / "config.yaml"
    if not config.is_file():
        return {}
    found = read_settings(config)
    found |= {name: 0 for name, base in IMPLIED.items() if found.get(name) == found.get(base)}
    own = {each.name for each in fields(TrainingOptions) if not each.metadata["free"]}
    own -= {"seed", "verify_timeout"}
    return {name: shown(value) for name, value in found.items() if name in own}


def draw_groups(groups: dict[str, list[list[dict]]], panels: list[tuple[str, str, str]],
                output: Path) -> None:
    """Writes a PNG with a panel for each (metric, title, unit).

    A group of runs is one line, their mean, in a band from the lowest to the highest. The legend
    stands below the panels, where it covers no line.
    """
    rows = -(-len(panels) // 3)
    figure, axes = plt.subplots(rows, 3, figsize=(12, 0.5 + 3 * rows), layout="constrained")
    for axis, (name, title, unit) in zip(axes.flat, panels):
        for style, colour, (label, group) in zip(STYLES * len(groups), COLOURS * len(groups),
                                                 groups.items(), strict=False):
            lines = [series(metrics, name) for metrics in group]
            steps = sorted(set.intersection(*(set(line) for line in lines)))
            if not steps:
                continue
            columns = [[line[step] for line in lines] for step in steps]
            label += f", {len(group)} runs" if len(group) > 1 else ""
            axis.plot(steps, [sum(column) / len(column) for column in columns], linestyle=style,
                      color=colour, label=label, marker="o" if len(steps) < 25 else None,
                      markersize=3)
            axis.fill_between(steps, list(map(min, columns)), list(map(max, columns)), color=colour,
                              alpha=0.2, lw=0)
        axis.set(title=title, xlabel="step", ylabel=unit)
        # A reward of one's own may go beyond 0 to 1.
        if unit == "share right" and axis.dataLim.y0 >= 0 and axis.dataLim.y1 <= 1:
            axis.set_ylim(-0.02, 1.02)
        axis.grid(alpha=0.3)
        if not axis.lines:
            axis.text(0.5, 0.5, "none sampled", transform=axis.transAxes, ha="center",
                      color="grey")
    for axis in axes.flat[len(panels):]:
        axis.axis("off")
    lines = {line.get_label(): line for axis in axes.flat for line in axis.lines}
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=5)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)
    plt.close(figure)


def summarise(run: Path) -> str:
    accuracy = series(read_metrics(run), "eval_accuracy")
    if not accuracy:
        return f"{run}: no evaluations"
    steps = sorted(accuracy)
    reached = next((f"90 % at step {step}" for step in steps if accuracy[step] >= 0.9),
                   "90 % not reached")
    return (f"{run}: {accuracy[steps[0]]:.1%} at step {steps[0]}, {accuracy[steps[-1]]:.1%} at "
            f"step {steps[-1]}, {reached}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders that train.py wrote")
    parser.add_argument("--output", type=Path, default=Path("curves.png"),
                        help="PNG to write (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        draw(arguments.runs, arguments.output)
        print(*map(summarise, arguments.runs), sep="\n")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(arguments.output)
