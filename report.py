"""What a run reports of its steps: the rows of metrics.jsonl and samples.jsonl, and its end."""

import contextlib
import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict
from statistics import fmean
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from curves import draw, read_metrics, series
from distributed import Totals, gather_lists, is_main, largest, on_main
from files import append_lines
from model_card import write_card
from runs import how_to_go_on

if TYPE_CHECKING:
    from options import TrainingOptions
    from prepare import Run
    from train import Batch


def measure(run: "Run", step: int, batch: "Batch", updates: list[dict], gap: float | None,
            seconds: list[float]) -> dict[str, Any]:
    """The row of metrics.jsonl, over all processes but for the times, which are this process's.

    A mean over nothing is None. updates: what `update` returned for each mini-batch. gap: the
    largest difference between recomputed and sampled log-probabilities, or None. seconds: of
    rollout, reward and update. Every process must call it.
    """
    totals = Totals()
    groups, varied = batch.group.unique(), batch.group[batch.advantages != 0].unique()
    totals.add(groups=len(groups), all_equal=len(groups) - len(varied),
               accepted=(batch.off_policy & batch.accepted).sum().item(),
               sampled=sum(len(r.sampled) for r in batch.responses),
               verify_timeouts=run.notes.timeouts, unsettled=run.notes.responses,
               answered=sum(bool(run.final_answer(r.text)) for r in batch.responses
                            if not r.off_policy))
    for name, value in asdict(run.sampler.work).items():
        (totals.maximum if name.endswith("seconds") else totals.add)(**{name: value})
    for side, off_policy in (("on", False), ("off", True)):
        rows = [(r, reward) for r, reward, *_ in batch.rows() if r.off_policy == off_policy]
        totals.add(**{f"count_{side}": len(rows), f"reward_{side}": sum(each for _, each in rows),
                      f"tokens_{side}": sum(len(r.tokens) for r, _ in rows),
                      f"cut_{side}": sum(not r.finished for r, _ in rows)})
    s = totals.over_processes()
    mean = {name: fmean(u[name] for u in updates) for name in updates[0]}

    def per(total: float, count: float) -> float | None:
        return total / count if count else None

    return {
        "step": step + 1,
        "reward_on": per(s["reward_on"], s["count_on"]),
        "reward_off": per(s["reward_off"], s["count_off"]),
        "errs_accept_rate": per(s["accepted"], s["count_off"]), "bonus": batch.bonus,
        "entropy": per(mean["entropy"], mean["on_policy"]),
        **{name: mean[name] for name in ("clip_fraction", "clip_fraction_off", "off_policy_share")},
        "ratio_max": largest(u["ratio_max"] for u in updates),
        # In the first update θ is still θ_old.
        "logprob_gap": updates[0]["logprob_gap"] if gap is None else gap,
        "clip_at_start": per(updates[0]["beyond"], updates[0]["on_policy"]),
        **{name: mean[name] for name in ("kl", "policy_loss", "grad_norm")},
        "groups_all_equal": s["all_equal"] / s["groups"],
        "response_length": per(s["tokens_on"], s["count_on"]),
        "response_length_off": per(s["tokens_off"], s["count_off"]),
        "truncated": per(s["cut_on"], s["count_on"]),
        "truncated_off": per(s["cut_off"], s["count_off"]),
        "tokens_sampled": s["sampled"],
        "learning_rate": run.optimizer.param_groups[0]["lr"],
        "tokens_per_second": s["sampled"] / sum(seconds),
        "step_seconds": sum(seconds),
        **dict(zip(("rollout_seconds", "reward_seconds", "update_seconds"), seconds, strict=True)),
        "prefill_seconds": s["prefill_seconds"], "decode_seconds": s["decode_seconds"],
        "slot_occupancy": per(s["sequence_steps"], s["slot_steps"]),
        "wasted_positions": s["wasted_positions"] / s["positions"],
        "padding_share": mean["padding"] / mean["cells"],
        "answered": per(s["answered"], s["count_on"]), "unsettled": s["unsettled"],
        "verify_timeouts": s["verify_timeouts"],
        "skipped_updates": sum(u["skipped"] for u in updates),
        "shared_share": mean["shared"] / (mean["cells"] - mean["padding"]),
    }


@contextlib.contextmanager
def step_bar(run: "Run") -> Iterator[tqdm]:
    """The progress bar of training. Without a terminal there is none; write_rows prints lines.

    An error in the `with` block ends the reports to the trackers, too.
    """
    o = run.options
    with tqdm(total=o.steps, initial=run.start, unit="step", desc=o.method,
              disable=not is_main() or not sys.stderr.isatty()) as bar:
        try:
            yield bar
        except BaseException:
            run.trackers.end(failed=True)
            raise


def show(bar: tqdm, metrics: dict, accuracies: list[float]) -> None:
    accuracy = f", accuracy={accuracies[-1]:.1%}" if accuracies else ""
    bar.set_postfix_str(f"reward={metrics['reward_on']:.2f}{accuracy}")


def _line(metrics: dict, steps: int) -> str:
    """One step in one readable line."""
    shown = [f"{name} {metrics[key]:{form}}" for name, key, form in (
        ("reward", "reward_on", ".2f"), ("off-policy reward", "reward_off", ".2f"),
        ("accuracy", "eval_accuracy", ".1%"), ("length", "response_length", ".1f"),
        ("seconds", "step_seconds", ".1f")) if metrics.get(key) is not None]
    return f"step {metrics['step']}/{steps}: {', '.join(shown)}"


def write_rows(run: "Run", batch: "Batch", metrics: dict) -> None:
    """Appends to metrics.jsonl and samples.jsonl; writes the whole batch of a skipped step.

    samples.jsonl gets the responses to the first --log-questions questions, and one for each pair
    of answer and reference that could not be settled. Every process must call it.
    """
    o, step, rows, unsettled = run.options, metrics["step"], [], dict(run.notes.unsettled)
    for r, reward, accepted, keep, advantage in batch.rows():
        given, problem = run.final_answer(r.text), r.question.problem
        pairs = [(given, each) for each in run.references(problem)]
        unclear = reward == 0 and any(pair in run.notes.unsettled for pair in pairs)
        new = [unsettled.pop(pair) for pair in pairs if unclear and pair in unsettled]
        if r.question.index < o.log_questions or new:
            drawn = next((d for d, prompt in r.question.demos if prompt is r.behaviour_prompt), [])
            rows.append({
                "step": step, "id": problem.id, "problem": problem.problem,
                "prompt": run.builder.tokenizer.decode(r.behaviour_prompt),
                "demonstrations": [each.id for each in drawn], "off_policy": r.off_policy,
                "response": r.text, "final_answer": given, "answer": problem.answer,
                "reward": reward, "unsettled": unclear,
                **({"accepted": accepted} if r.off_policy else {}), "in_group": keep,
                "advantage": advantage})
    samples = gather_lists(rows)
    skipped = gather_lists([
        vars(r) | {"question": r.question.index, "prompt": r.question.prompt, "reward": reward,
                   "accepted": accepted, "keep": keep, "advantage": advantage}
        for r, reward, accepted, keep, advantage in batch.rows()
    ]) if metrics["skipped_updates"] else []   # the same on every process
    if is_main():
        append_lines(run.folder / "metrics.jsonl", [metrics])
        append_lines(run.folder / "samples.jsonl", samples)
        if skipped:
            file = run.folder / f"skipped-step-{step}.jsonl"
            file.unlink(missing_ok=True)   # a run that was resumed may have left one
            append_lines(file, skipped)
        run.trackers.step(metrics, samples)
        if not sys.stderr.isatty():
            print(_line(metrics, o.steps), file=sys.stderr, flush=True)
        _show(samples, o.show_samples)
        if step <= 3:
            _warn(run, metrics)


def unchanged(o: "TrainingOptions", metrics: dict) -> bool:
    """Whether a step left the weights alone: no loss and gradient of its updates was finite."""
    return metrics["skipped_updates"] == o.batch_size // o.mini_batch_size


def _show(samples: list[dict], number: int) -> None:
    """Prints so many of the rows of samples.jsonl, on- and off-policy responses in turn."""
    on, off = ([row for row in samples if row["off_policy"] == kind] for kind in (False, True))
    in_turn = [row for pair in itertools.zip_longest(on, off) for row in pair if row]
    for row in in_turn[:number]:
        kind = "off-policy" if row["off_policy"] else "on-policy"
        tqdm.write(f"--- step {row['step']}, {kind}, reward {row['reward']:g}, to: "
                   f"{row['problem']}\n{row['response']}", file=sys.stderr)


def _warn(run: "Run", metrics: dict) -> None:
    """Says why nothing can be learned from a step in which all rewards of each group are equal."""
    o, reasons = run.options, []
    if metrics["groups_all_equal"] == 1:
        if metrics["answered"] == 0 and not o.reward:
            reasons.append(f"no plain response has a final answer of the form --answer-format "
                           f"{o.answer_format}")
        if metrics["truncated"] == 1:
            reasons.append(f"all plain responses were cut off at --max-new-tokens "
                           f"{o.max_new_tokens}")
        rewards = {metrics["reward_on"], metrics["reward_off"]} - {None}
        reasons.append("every reward is 0" if rewards == {0} else
                       "the responses to each question have equal rewards")
        tqdm.write(f"warning: step {metrics['step']} had nothing to learn from: "
                   f"{'; '.join(reasons)}. See the responses in {run.folder}/samples.jsonl; the "
                   f"model, the data, the chat template, --instruction or --max-new-tokens may not "
                   f"fit together", file=sys.stderr)


def evaluation_row(found: dict[str, dict[str, float]], ending: str) -> dict[str, float]:
    """The part of a row of metrics.jsonl about held-out problems.

    found: what summary.accuracy_of gives, by the name of the data set; of several there is the mean
    accuracy, and each one's own. ending: of the names.
    """
    row = {f"eval_accuracy{ending}": fmean(each["accuracy"] for each in found.values())}
    for data, values in found.items():
        part = f"/{data}" if len(found) > 1 else ""
        row |= {f"eval_{name}{ending}{part}": value for name, value in values.items()}
    return row


def keep_best(run: "Run", accuracy: float, best: float) -> float:
    """Writes the model to best/ if it is better than the one there; returns the better accuracy.

    Every process must call it.
    """
    if run.options.keep_best and accuracy > best:
        run.save("best")
    return max(accuracy, best)


def read_progress(run: "Run") -> tuple[list[float], float, int]:
    """What the steps made so far have left: the held-out accuracies, that of the model in best/, or
    -inf, and the number of last steps that left the weights alone.

    Every process must call it.
    """
    def read():
        rows = read_metrics(run.folder)
        found = series(rows, "eval_accuracy")
        kept = [accuracy for step, accuracy in found.items() if step]
        best = max(kept if (run.folder / "best").is_dir() else [], default=-math.inf)
        skipped = list(itertools.takewhile(lambda row: unchanged(run.options, row), reversed(rows)))
        return list(found.values()), best, len(skipped)

    return on_main(read)


def draw_curves(run: "Run", last: bool) -> None:
    """Draws the curves of a run that goes on; say_results draws those of one that ends."""
    if is_main() and not last:
        draw([run.folder], run.folder / "curves.png")


def say_stopped(run: "Run", steps: int) -> None:
    run.trackers.end()
    if is_main():
        print(f"stopped after step {steps} of {run.options.steps}; go on with: "
              f"{how_to_go_on(run.folder)}")


def say_results(run: "Run") -> None:
    """Draws the curves, writes the model card, ends the reports, and says where everything is."""
    if not is_main():
        return
    draw([run.folder], run.folder / "curves.png")
    write_card(run)
    run.trackers.end(run.folder / "curves.png")
    rows = read_metrics(run.folder)
    if rows and all(unchanged(run.options, row) for row in rows):
        print("no step changed the model: the loss or gradient of each was not finite; see "
              f"{run.folder}/skipped-step-*.jsonl")
    for what, name in (("trained model", "final"), ("metrics", "metrics.jsonl"),
                       ("curves", "curves.png")):
        print(f"{what + ':':<15}{run.folder / name}")
    if found := list(series(rows, "eval_accuracy").items()):
        count = " + ".join(str(len(problems)) for problems in run.held_out.values())
        ends = [f"{accuracy:.1%}" + f" (step {step})" * (step not in (0, run.options.steps))
                for step, accuracy in (found[0], found[-1])]
        change = (f"was {ends[0]} before the first step" if found[-1][0] == 0
                  else f"went from {' to '.join(ends)}")
        print(f"held-out accuracy {change} ({count} problems, 0 shots, temperature "
              f"{run.options.eval_temperature})")
