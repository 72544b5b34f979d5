"""The paper's pilot study, for `eval.py --compare-shots`: what demonstrations change in answers.

Answers are paired by problem and sample: each variant with the plain answers. The variant `again`
is a second plain draw at the same temperature; it shows the distance and flips of chance alone.
"""

import random
import textwrap
from pathlib import Path
from statistics import fmean

import matplotlib
from rapidfuzz.distance import Levenshtein

matplotlib.use("Agg")   # no screen needed
import matplotlib.pyplot as plt

from curves import COLOURS
from options import EvaluationOptions, samples_of, shots_of


def compare(plain: list[dict], other: list[dict], samples: int) -> dict[str, float]:
    """What changes between paired records, `samples` consecutive ones a problem.

    difference: of the accuracies; difference_low, difference_high: its 95 % bootstrap interval over
    problems. distance: the mean edit distance of the texts, as a share of the longer one. gained,
    lost: the shares that turn from wrong to right (a score above 0), and from right to wrong.
    """
    pairs = list(zip(plain, other, strict=True))
    changes = [b["score"] - a["score"] for a, b in pairs]
    differences = [fmean(changes[i:i + samples]) for i in range(0, len(changes), samples)]
    draw = random.Random(0)
    means = sorted(fmean(draw.choices(differences, k=len(differences))) for _ in range(2000))
    flips = [(a["score"] > 0, b["score"] > 0) for a, b in pairs]
    return {"difference": fmean(differences), "difference_low": means[49],
            "difference_high": means[1949],
            "distance": fmean(Levenshtein.normalized_distance(a["response"], b["response"])
                              for a, b in pairs),
            "gained": flips.count((False, True)) / len(flips),
            "lost": flips.count((True, False)) / len(flips)}


def verdict(data: str, shots: int, plain: dict, steered: dict, change: dict, accepted: float,
            solved: float, hotter: dict[float, dict]) -> str:
    """In words, what this means for training with ICPO.

    accepted: the share of steered answers that ERRS accepts. solved: the share of problems with
    such an answer. hotter: the changes at raised temperatures.
    """
    low, high = 100 * change["difference_low"], 100 * change["difference_high"]
    text = (f"On {data}, {shots} demonstration{'s' * (shots > 1)} in the context moved the "
            f"accuracy from {plain['accuracy']:.1%} to {steered['accuracy']:.1%} ({low:+.1f} to "
            f"{high:+.1f} points): ")
    if max(plain["truncated"], steered["truncated"]) > 0.5:
        text += "most answers were cut off, so this says nothing yet; raise --max-new-tokens."
    elif plain["problems"] < 20:
        text += f"{plain['problems']} problems are too few to say whether they help."
    elif low > 0:
        text += ("they help, and ICPO has right answers to learn from that plain sampling gives "
                 "less often.")
    elif high < 0:
        text += ("they do harm, and ICPO should not be expected to help this model; try other "
                 "demonstrations.")
    else:
        text += (f"with {plain['problems']} problems the two cannot be told apart, and whether "
                 f"ICPO helps is open; more problems or samples would narrow it down.")
    text += (f" ERRS would accept {accepted:.1%} of the answers with demonstrations, at least one "
             f"to {solved:.1%} of the problems.")
    if hotter:
        best = max(hotter, key=lambda temperature: hotter[temperature]["gained"])
        text += (f" {change['gained']:.1%} of the plain answers turn from wrong to right, and "
                 f"{hotter[best]['gained']:.1%} at temperature {best:g} instead.")
    return text


def report(o: EvaluationOptions, found: dict[tuple, list[dict]],
           rows: dict[tuple, dict]) -> list[dict]:
    """Prints and draws what demonstrations change; returns it for the file of the table.

    found: the records, and rows: the rows of the table, both by case (data, shots, temperature,
    again).
    """
    results, steered_name = [], shots_of(o.shots[1])
    print(f"\nAgainst the plain answers at temperature {o.temperature:g}:")
    for name in o.data:
        plain, steered = (name, 0, o.temperature, False), (name, o.shots[1], o.temperature, False)
        others = {"0 shots again": (name, 0, o.temperature, True),
                  **{f"temperature {t:g}": (name, 0, t, True) for t in sorted(o.temperatures)},
                  steered_name: steered}
        samples = samples_of(o, name)
        changes = {label: compare(found[plain], found[key], samples)
                   for label, key in others.items()}
        for label, c in changes.items():
            print(f"{name}, {label:<16} accuracy {100 * c['difference']:+.1f} points "
                  f"({100 * c['difference_low']:+.1f} to {100 * c['difference_high']:+.1f}), "
                  f"edit distance {c['distance']:.2f}, {c['gained']:.1%} turn right, "
                  f"{c['lost']:.1%} turn wrong")
        accepted = [r["score"] >= 1 for r in found[steered]]   # by ERRS
        solved = fmean(any(accepted[i:i + samples])
                       for i in range(0, len(accepted), samples))
        hotter = {t: changes[f"temperature {t:g}"] for t in o.temperatures}
        text = verdict(name, o.shots[1], rows[plain], rows[steered], changes[steered_name],
                       fmean(accepted), solved, hotter)
        results.append({"data": name, "plain": rows[plain], "steered": rows[steered],
                        "changes": changes, "verdict": text})
    picture = Path(o.output).with_suffix(".png")
    draw(results, picture)
    print("", *(result["verdict"] for result in results), f"picture: {picture}", sep="\n")
    return results


def draw(results: list[dict], output: Path) -> None:
    """A PNG. results: for each data set its name, the rows of the table and the changes by name.

    A kind of answers is a group of bars, one for each data set.
    """
    # The widths leave room for the names of the bars and for the titles.
    others = len(results[0]["changes"])
    figure, axes = plt.subplots(1, 3, figsize=(max(12, 3.2 + 2.2 * others), 4),
                                layout="constrained", width_ratios=[2, others, others])
    names, width = [Path(result["data"]).stem for result in results], 0.8 / len(results)
    if len(set(names)) < len(names):
        names = [result["data"] for result in results]
    for i, (name, result) in enumerate(zip(names, results)):
        rows, changes = (result["plain"], result["steered"]), result["changes"].values()
        errors = [[row["accuracy"] - row["low"] for row in rows],
                  [row["high"] - row["accuracy"] for row in rows]]
        for axis, heights, style in (
                (axes[0], [row["accuracy"] for row in rows], {"yerr": errors, "capsize": 4}),
                (axes[1], [change["distance"] for change in changes], {}),
                (axes[2], [change["gained"] for change in changes], {"label": name}),
                (axes[2], [-change["lost"] for change in changes], {"alpha": 0.5})):
            places = [kind + (i - (len(results) - 1) / 2) * width for kind in range(len(heights))]
            axis.bar(places, heights, width, color=COLOURS[i % len(COLOURS)], **style)
    answers = [shots_of(results[0][kind]["shots"]) for kind in ("plain", "steered")]
    for axis, title, unit, kinds in (
            (axes[0], "Accuracy, 95 % intervals", "share right", answers),
            (axes[1], "Edit distance to the plain answers", "share", results[0]["changes"]),
            (axes[2], "Answers that turn right (up) or wrong (down)", "share",
             results[0]["changes"])):
        axis.set(title=title, ylabel=unit, xticks=range(len(kinds)),
                 xticklabels=[textwrap.fill(kind, 12) for kind in kinds])
        axis.grid(alpha=0.3, axis="y")
        axis.set_axisbelow(True)
    axes[2].axhline(0, color="black", linewidth=0.8)
    axes[2].yaxis.set_major_formatter(lambda share, _: f"{abs(share):.2g}")
    figure.legend(*axes[2].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(output, dpi=110)
    plt.close(figure)
