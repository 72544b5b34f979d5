"""The paper's pilot study, for `eval.py --compare-shots`: what demonstrations change, beside raising the temperature.

Answers are paired by problem and sample: every variant with the plain answers at the same place. `again` is a second plain
draw at the same temperature, the distance and the flips that chance alone makes.
"""

import random
from pathlib import Path
from statistics import fmean

import matplotlib
from rapidfuzz.distance import Levenshtein

matplotlib.use("Agg")   # no screen needed
import matplotlib.pyplot as plt

from curves import COLOURS


def compare(plain: list[dict], other: list[dict], samples: int) -> dict[str, float]:
    """Of paired records: difference of the accuracies with its 95 % bootstrap interval over problems; distance: mean edit
    distance of the texts by the length of the longer one; gained and lost: shares that turn from wrong to right and back."""
    def per_problem(values):
        return [fmean(values[i:i + samples]) for i in range(0, len(values), samples)]

    differences = per_problem([b["score"] - a["score"] for a, b in zip(plain, other, strict=True)])
    draw = random.Random(0)
    means = sorted(fmean(draw.choices(differences, k=len(differences))) for _ in range(2000))
    flips = [(a["score"] > 0, b["score"] > 0) for a, b in zip(plain, other)]
    return {"difference": fmean(differences), "difference_low": means[49], "difference_high": means[1949],
            "distance": fmean(Levenshtein.normalized_distance(a["response"], b["response"]) for a, b in zip(plain, other)),
            "gained": flips.count((False, True)) / len(flips), "lost": flips.count((True, False)) / len(flips)}


def verdict(data: str, shots: int, plain: dict, steered: dict, change: dict, accepted: float, solved: float,
            hotter: dict[float, dict]) -> str:
    """What it means for training with ICPO, in words. accepted: share of steered answers that ERRS accepts; solved: share of
    problems with one."""
    interval = f"{100 * change['difference_low']:+.1f} to {100 * change['difference_high']:+.1f} points"
    name = f"{shots} demonstration{'s' * (shots > 1)} in the context"
    text = f"On {data}, {name} moved the accuracy from {plain['accuracy']:.1%} to {steered['accuracy']:.1%} ({interval}): "
    if plain["problems"] < 20:
        text += f"{plain['problems']} problems are too few to say whether they help."
    elif change["difference_low"] > 0:
        text += "they help, and ICPO has right answers to learn from that plain sampling gives less often."
    elif change["difference_high"] < 0:
        text += "they do harm, and ICPO should not be expected to help this model; try other demonstrations."
    else:
        text += (f"with {plain['problems']} problems the two cannot be told apart, and whether ICPO helps is open; more problems "
                 f"or samples would narrow it down.")
    text += (f" ERRS would accept {accepted:.1%} of the answers with demonstrations, at least one to {solved:.1%} of "
             f"the problems.")
    if hotter:
        best = max(hotter, key=lambda temperature: hotter[temperature]["gained"])
        text += (f" {change['gained']:.1%} of the plain answers turn from wrong to right, and {hotter[best]['gained']:.1%} at "
                 f"temperature {best:g} instead.")
    return text


def draw(results: list[dict], output: Path) -> None:
    """A PNG. results: for each data set its name, the rows of the table (plain and steered) and the changes by name."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    names, width = [Path(result["data"]).stem for result in results], 0.38
    if len(set(names)) < len(names):
        names = [result["data"] for result in results]
    for side, kind in enumerate(("plain", "steered")):
        rows = [result[kind] for result in results]
        errors = [[row["accuracy"] - row["low"] for row in rows], [row["high"] - row["accuracy"] for row in rows]]
        axes[0].bar([i + (side - 0.5) * width for i in range(len(rows))], [row["accuracy"] for row in rows], width,
                    yerr=errors, capsize=4, color=COLOURS[side], label=f"{rows[0]['shots']} shots")
    axes[0].set(title="Accuracy, with 95 % intervals", ylabel="share right", ylim=(0, 1.25), yticks=[i / 5 for i in range(6)],
                xticks=range(len(names)), xticklabels=names)
    for axis, title, kinds in (
            (axes[1], "Edit distance to the plain answers", [("distance", "", "-")]),
            (axes[2], "Answers that flip", [("gained", ", wrong to right", "-"), ("lost", ", right to wrong", "--")])):
        for name, result, colour, marker in zip(names, results, COLOURS * len(names), "osD^v<>" * len(names)):
            changes = result["changes"]
            for kind, label, line in kinds:
                axis.plot([each.replace(" ", "\n") for each in changes], [change[kind] for change in changes.values()], line,
                          color=colour, marker=marker, label=name + label)
        axis.set(title=title, ylabel="share", ylim=(-0.02, None))
    for axis in axes:
        axis.grid(alpha=0.3, axis="y")
        axis.legend(fontsize=9, ncols=2 if axis is axes[0] else 1)
    figure.savefig(output, dpi=110)
    plt.close(figure)
