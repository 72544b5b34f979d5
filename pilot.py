"""The paper's pilot study, for `eval.py --compare-shots`: what demonstrations change in answers.

Answers are paired by problem and sample: each variant with the plain answers. The variant `again`
is a second plain draw at the same temperature; it shows the distance and flips of chance alone.
"""

import random
import shlex
import textwrap
from pathlib import Path
from statistics import fmean

import matplotlib
from rapidfuzz.distance import Levenshtein

matplotlib.use("Agg")   # no screen needed
import matplotlib.pyplot as plt

from curves import COLOURS
from options import EvaluationOptions, flag, samples_of, shots_of, shown

# What training must have in common with the evaluation, so that its prompts are the same.
OF_PROMPTS = ("chat_template", "system", "template_args", "instruction", "stop", "demo_min_chars")


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


def doubt(*rows: dict) -> str:
    """Why these rows of the table do not say whether demonstrations help, if they do not."""
    if max(row["truncated"] for row in rows) > 0.5:
        return "most answers were cut off, so this says nothing yet; raise --max-new-tokens."
    few = rows[0]["problems"]
    return f"{few} problems are too few to say whether they help." if few < 20 else ""


def verdict(data: str, shots: int, plain: dict, steered: dict, change: dict, accepted: float,
            solved: float, hotter: dict[float, dict], form: str = "") -> str:
    """In words, what this means for training with ICPO.

    accepted: the share of steered answers that ERRS accepts. solved: the share of problems with
    such an answer. hotter: the changes at raised temperatures. form: of the demonstrations, where
    there are several.
    """
    low, high = 100 * change["difference_low"], 100 * change["difference_high"]
    text = (f"On {data}, {shots} demonstration{'s' * (shots > 1)} in the context"
            f"{f' (format {form})' * bool(form)} moved the accuracy from {plain['accuracy']:.1%} "
            f"to {steered['accuracy']:.1%} ({low:+.1f} to {high:+.1f} points): ")
    if doubt(plain, steered):
        text += doubt(plain, steered)
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


def points(change: dict[str, float]) -> str:
    """The difference of the accuracies with its interval, in percentage points."""
    return (f"{100 * change['difference']:+.1f} points ({100 * change['difference_low']:+.1f} to "
            f"{100 * change['difference_high']:+.1f})")


def training_options(o: EvaluationOptions, shots: int) -> str:
    """What train.py needs beside the form of demonstrations to ask as this evaluation did."""
    words, usual = [f"--num-demonstrations {shots}"], EvaluationOptions()
    for name in OF_PROMPTS:
        value = getattr(o, name)
        if value != getattr(usual, name):
            # A text may begin with a dash.
            words.append(f"{flag(name)} {shlex.join(value)}" if isinstance(value, list)
                         else f"{flag(name)}={shlex.quote(shown(value))}")
    return " ".join(words)


def recommend(options: str, ranked: dict[str, dict], ahead: dict) -> str:
    """Which format of demonstrations to train with, in words.

    options: what train.py needs beside the format. ranked: the change against the plain answers by
    format, the best first. ahead: that of the best against the next.
    """
    best, second = list(ranked)[:2]
    text = (f"Of the formats of demonstrations, {best} has the highest accuracy, "
            f"{points(ranked[best])} against plain answers; it is ")
    if ahead["difference_low"] > 0:
        text += f"better than the next, {second}, by {points(ahead)}. "
    else:
        text += f"not told apart from the next, {second}: {points(ahead)}. "
    if ranked[best]["difference_low"] > 0:
        return text + f"Recommended: train.py --demo-format {best} {options}"
    return text + "No format is recommended, because none is shown to help."


def report(o: EvaluationOptions, found: dict[tuple, list[dict]],
           rows: dict[tuple, dict]) -> list[dict]:
    """Prints and draws what demonstrations change; returns it for the file of the table.

    found: the records, and rows: the rows of the table, both by case (data, shots, temperature,
    again, format of demonstrations).
    """
    results, k = [], o.shots[1]
    formats = {form or o.demo_format: form for _, shots, *_, form in rows if shots}
    steered_name = {form: f"{shots_of(k)}, {form}" if len(formats) > 1 else shots_of(k)
                    for form in formats}
    print(f"\nAgainst the plain answers at temperature {o.temperature:g}:")
    for name in o.data:
        plain = name, 0, o.temperature, False, ""
        steered = {form: (name, k, o.temperature, False, key) for form, key in formats.items()}
        others = {"0 shots again": (name, 0, o.temperature, True, ""),
                  **{f"temperature {t:g}": (name, 0, t, True, "") for t in sorted(o.temperatures)},
                  **{steered_name[form]: key for form, key in steered.items()}}
        samples = samples_of(o, name)
        changes = {label: compare(found[plain], found[key], samples)
                   for label, key in others.items()}
        width = max(map(len, changes))
        for label, c in changes.items():
            print(f"{name}, {label:<{width}} accuracy {points(c)}, "
                  f"edit distance {c['distance']:.2f}, {c['gained']:.1%} turn right, "
                  f"{c['lost']:.1%} turn wrong")
        ranked = {form: changes[steered_name[form]] for form in sorted(
            formats, key=lambda form: -changes[steered_name[form]]["difference"])}
        best = next(iter(ranked))
        accepted = [r["score"] >= 1 for r in found[steered[best]]]   # by ERRS
        solved = fmean(any(accepted[i:i + samples])
                       for i in range(0, len(accepted), samples))
        hotter = {t: changes[f"temperature {t:g}"] for t in o.temperatures}
        text = verdict(name, k, rows[plain], rows[steered[best]], ranked[best], fmean(accepted),
                       solved, hotter, best if len(formats) > 1 else "")
        if len(formats) > 1:
            ahead = compare(found[steered[list(ranked)[1]]], found[steered[best]], samples)
            unclear = doubt(rows[plain], *(rows[key] for key in steered.values()))
            text += f" No format is recommended: {unclear}" if unclear else " " + recommend(
                training_options(o, k), ranked, ahead)
        results.append({"data": name, "plain": rows[plain], "steered": rows[steered[best]],
                        "accuracies": {shots_of(0): rows[plain], **{
                            steered_name[form]: rows[key] for form, key in steered.items()}},
                        "changes": changes, "verdict": text})
    picture = Path(o.output).with_suffix(".png")
    draw(results, picture)
    print("", *(result["verdict"] for result in results), f"picture: {picture}", sep="\n")
    return results


def draw(results: list[dict], output: Path) -> None:
    """A PNG. results: for each data set its name, and rows of the table and changes by kind.

    A kind of answers is a group of bars, one for each data set.
    """
    # The widths leave room for the names of the bars and for the titles.
    kinds, others = len(results[0]["accuracies"]), len(results[0]["changes"])
    figure, axes = plt.subplots(1, 3, figsize=(max(12, 1.2 + kinds + 2.2 * others), 4),
                                layout="constrained", width_ratios=[kinds, others, others])
    names, width = [Path(result["data"]).stem for result in results], 0.8 / len(results)
    if len(set(names)) < len(names):
        names = [result["data"] for result in results]
    for i, (name, result) in enumerate(zip(names, results)):
        rows, changes = result["accuracies"].values(), result["changes"].values()
        errors = [[row["accuracy"] - row["low"] for row in rows],
                  [row["high"] - row["accuracy"] for row in rows]]
        for axis, heights, style in (
                (axes[0], [row["accuracy"] for row in rows], {"yerr": errors, "capsize": 4}),
                (axes[1], [change["distance"] for change in changes], {}),
                (axes[2], [change["gained"] for change in changes], {"label": name}),
                (axes[2], [-change["lost"] for change in changes], {"alpha": 0.5})):
            places = [kind + (i - (len(results) - 1) / 2) * width for kind in range(len(heights))]
            axis.bar(places, heights, width, color=COLOURS[i % len(COLOURS)], **style)
    for axis, title, unit, kinds in (
            (axes[0], "Accuracy, 95 % intervals", "share right", results[0]["accuracies"]),
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
