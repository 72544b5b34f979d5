import inspect
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path
from statistics import fmean

import pytest
import torch
from processes import Script
from processes import run as run_script

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tiny"))
import curves
import eval as evaluation
import pilot
import prepare
import runs
import train
from data import Demonstrations, PromptBuilder, load_problems
from eval import evaluate
from make import make_tokenizer
from model_utils import load_model
from options import METHODS, PAPER, EvaluationOptions, parse_evaluation, parse_training
from prepare import compared_formats, load_any_model, prepare_evaluation
from reward import make_scorer
from runs import settings_of_run
from summary import interval, print_table, summarise

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tiny"
SAMPLES, TABLE = "evals/tiny.jsonl", "evals/tiny.json"   # of the embedded model


@pytest.fixture(scope="module")
def embedded():
    model, tokenizer = load_model(TINY / "model")
    return model, PromptBuilder(tokenizer), load_problems(TINY / "test.jsonl")


def record(score, answer="1", finished=True, tokens=10):
    return {"id": "p", "response": rf"\boxed{{{answer}}}", "score": score, "finished": finished,
            "tokens": tokens}


def test_a_summary_equals_one_computed_by_hand():
    records = [record(1.0, "7"), record(0.0, "5"), record(0.0, "5", finished=False, tokens=20),
               record(1.0, "7.0"),
               record(1.0, "3"), record(1.0, "3"), record(0.0, "4"), record(1.0, "3"),
               record(0.0, "1"), record(0.0, "2"), record(0.0, "3"), record(0.0, "4")]
    summary = summarise(records, samples=4, ks=[1, 2, 4])
    # 2, 3 and 0 of 4 responses are right, so two drawn ones are both wrong with probability
    # 2/4 * 1/3, 0 and 1. 7 and 7.0 are one answer, which is as common as 5 and comes before it. The
    # problems' means 1/2, 3/4 and 0 have variance 0.145833, so their mean varies like that of
    # 5/12 * 7/12 / (0.145833/3) = 5 independent trials, and Wilson's interval is that of 5 trials.
    assert summary == pytest.approx({
        "problems": 3, "accuracy": 5 / 12, "low": 0.12589, "high": 0.77985, "pass@1": 5 / 12,
        "pass@2": (5 / 6 + 1 + 0) / 3, "pass@4": 2 / 3, "majority": 2 / 3, "tokens": 130 / 12,
        "truncated": 1 / 12}, rel=1e-4)


# Scores from 0 to 1 get Wilson's interval, and other scores get the normal interval.
@pytest.mark.parametrize("means, low, high", [
    ([0.0] * 10, 0.0, 0.2775), ([1.0] * 10, 0.7225, 1.0), ([3.0, 5.0], 4 - 1.96, 4 + 1.96),
    ([0.5], 0.0546, 0.9454)])
def test_the_interval_is_wilsons_or_the_normal_one(means, low, high):
    assert interval(means) == pytest.approx((low, high), abs=1e-3)


def test_an_interval_counts_no_more_trials_than_answers():
    means = [16 / 32, 17 / 32, 16 / 32]   # alike by chance
    assert interval(means, 32) == pytest.approx(interval([1.0] * 49 + [0.0] * 47), abs=1e-3)


def test_the_interval_of_partial_scores_follows_their_spread():
    records = [record(0.5 + 0.05 * (-1) ** i, "7") for i in range(100)]
    found = summarise(records, samples=1)
    assert 0.01 < found["high"] - found["low"] < 0.03


def test_an_interval_holds_its_mean():
    """Rounding must not put the mean outside, because matplotlib refuses negative error bars."""
    for n in range(1, 300):
        for mean in (0.0, 1.0):
            low, high = interval([mean] * n)
            assert 0 <= low <= mean <= high <= 1


def test_a_response_without_an_answer_has_no_vote():
    none = {"id": "p", "response": "no box", "score": 0.0, "finished": True, "tokens": 2}
    assert summarise([none, none, record(1.0, "7")], samples=3)["majority"] == 1.0
    assert summarise([none, none], samples=2)["majority"] == 0.0


def test_the_earlier_of_two_equally_common_answers_is_the_majority():
    assert summarise([record(1.0, "7"), record(0.0, "5")], samples=2)["majority"] == 1.0
    assert summarise([record(0.0, "5"), record(1.0, "7")], samples=2)["majority"] == 0.0


def test_demonstrations_help_the_embedded_model(embedded):
    """Without a demonstration the model mostly answers at once, and wrongly; with one it works the
    problem out and is mostly right."""
    model, builder, problems = embedded
    assert sum(p.numel() for p in model.parameters()) <= 3e6
    pool = load_problems(TINY / "demonstrations.jsonl", needs=("solution",))
    demonstrations = Demonstrations(pool, builder, 1, 512)
    demonstrations.admit(problems)
    plain = evaluate(model, builder, problems, max_new_tokens=48)
    steered = evaluate(model, builder, problems, demonstrations, max_new_tokens=48)
    assert summarise(plain, 1)["accuracy"] <= 0.25 and summarise(steered, 1)["accuracy"] >= 0.75
    assert sum(r["response"].startswith("\\boxed{") for r in plain) > 0.9 * len(plain)
    assert sum(r["response"].startswith("\\boxed{") for r in steered) < 0.1 * len(steered)
    # No held-out problem is among the training problems and the demonstrations.
    others = load_problems(TINY / "train.jsonl", needs=("expert_response",)) + pool
    assert not {p.problem for p in problems} & {p.problem for p in others}


def test_an_evaluation_depends_only_on_seed_and_problem(embedded):
    model, builder, problems = embedded
    one = evaluate(model, builder, problems[:6], samples=3, max_new_tokens=48, slots=4)
    two = evaluate(model, builder, problems[:4], samples=3, max_new_tokens=48)
    assert one[:12] == two and [r["sample"] for r in one] == [0, 1, 2] * 6
    assert evaluate(model, builder, problems[:6], samples=3, max_new_tokens=48, seed=1) != one


@pytest.mark.parametrize("change, message", [
    (dict(data=["nowhere.jsonl"]), "no data file at nowhere.jsonl"),
    (dict(model="./nowhere"), "no model at './nowhere'"), (dict(shots=[0, -1]), "at least 0"),
    (dict(samples=-1), "at least 0"), (dict(k=[2]), "k from 1 to the number of samples, 1"),
    (dict(data=["tiny", "tiny"]), "names one twice"), (dict(reward="gone.py:f"), "names no file"),
    (dict(output="x.json"), "give x.jsonl, not x.json"),
    (dict(max_new_tokens=1024), "tiny has 1024 positions"),
    (dict(max_prompt_length=5),
         "no problems of tiny are left: all 256 were left out as problems of tiny with a prompt "
         "over 5 tokens; raise --max-prompt-length")])
def test_invalid_options_are_refused_with_the_reason(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        prepare_evaluation(EvaluationOptions(device="cpu", **change))


@pytest.mark.parametrize("processes", [1, 2])
def test_the_command_writes_the_table_and_samples(tmp_path, processes):
    """One process and two, started in another folder, give the same table and samples."""
    done = run_script("eval.py", "--shots", 0, 1, "--limit", 12, "--device", "cpu",
                      processes=processes, cwd=tmp_path)
    table = [line.split() for line in done.stdout.splitlines()[1:4]]
    assert " ".join(table[0]) == (
        "data shots temperature problems avg@1 95 % interval pass@1 maj@1 tokens truncated")
    rows = [json.loads(line) for line in (tmp_path / SAMPLES).read_text().splitlines()]
    assert [row["shots"] for row in rows] == [0] * 12 + [1] * 12
    for line, part in zip(table[1:], (rows[:12], rows[12:])):
        assert line[4] == f"{sum(row['score'] for row in part) / 12:.1%}"
    model, tokenizer = load_model(TINY / "model")
    alone = evaluate(model, PromptBuilder(tokenizer), load_problems(TINY / "test.jsonl")[:12],
                     max_new_tokens=48)
    assert [row["response"] for row in rows[:12]] == [row["response"] for row in alone]


def command(tmp_path, *arguments, check=False):
    return run_script("eval.py", "--limit", 40, "--samples", 2, "--device", "cpu", *arguments,
                      cwd=tmp_path, check=check)


def test_an_evaluation_goes_on_where_it_stopped(tmp_path):
    """The file ends in the middle of a problem and of a line. Other settings get another file and
    are refused where --output names this one."""
    whole = command(tmp_path, "--shots", 0, check=True).stdout
    text = (tmp_path / SAMPLES).read_text()
    lines = text.splitlines(keepends=True)
    (tmp_path / SAMPLES).write_text("".join(lines[:51]) + lines[51][:20])
    again = command(tmp_path, "--shots", 0, check=True)
    assert (tmp_path / SAMPLES).read_text() == text and again.stdout == whole
    more = command(tmp_path, "--shots", 0, 1, check=True)   # only the new row is sampled
    assert (tmp_path / SAMPLES).read_text().startswith(text)
    assert whole.splitlines()[2] in more.stdout
    assert len(json.loads((tmp_path / TABLE).read_text())["rows"]) == 2
    other = command(tmp_path, "--shots", 0, "--seed", 1, "--limit", 4, check=True)
    assert "evals/tiny-2.jsonl" in other.stdout
    refused = command(tmp_path, "--shots", 0, "--seed", 1, "--output", "evals/tiny.jsonl")
    assert refused.returncode == 2 and "holds another evaluation (seed: 0, not 1)" in refused.stderr
    assert (tmp_path / SAMPLES).read_text().startswith(text)


@pytest.mark.parametrize("shots, goes_on", [(1, False), (0, True)])
def test_an_evaluation_goes_on_with_its_form_of_demonstrations(tmp_path, shots, goes_on):
    """Without demonstrations the form plays no part."""
    def evaluate(*more, check=True):
        return run_script("eval.py", "--limit", 3, "--device", "cpu", "--shots", shots, "--output",
                          "one.jsonl", *more, cwd=tmp_path, check=check)

    evaluate()
    done = evaluate("--demo-format", "text", check=False)
    assert (done.returncode == 0) == goes_on
    assert goes_on or "demo_format: one-turn, not text" in done.stderr


def test_samples_may_lie_in_the_folder_of_the_model(tmp_path):
    """Writing the samples does not count as a change of the model; writing the weights does."""
    shutil.copytree(TINY / "model", tmp_path / "model")
    arguments = (tmp_path / "model", "--model", ".", "--shots", 0, "--limit", 3, "--output",
                 "eval.jsonl")
    command(*arguments, check=True)
    text = (tmp_path / "model" / "eval.jsonl").read_text()
    (tmp_path / "model" / "eval.jsonl").write_text(text[:200])
    command(*arguments, check=True)
    assert (tmp_path / "model" / "eval.jsonl").read_text() == text
    (tmp_path / "model" / "model.safetensors").touch()
    assert "has changed" in command(*arguments).stderr


def test_an_evaluation_that_has_just_begun_keeps_its_file(tmp_path):
    """An evaluation writes its settings before its first samples."""
    command(tmp_path, "--shots", 0, "--limit", 3, check=True)
    (tmp_path / SAMPLES).write_text("")
    other = command(tmp_path, "--shots", 0, "--limit", 3, "--seed", 1, check=True)
    assert "evals/tiny-2.jsonl" in other.stdout
    (tmp_path / "other.json").write_text("{}")
    refused = command(tmp_path, "--shots", 0, "--limit", 3, "--output", "other.jsonl")
    assert refused.returncode == 2 and "holds something else" in refused.stderr


def test_a_custom_reward_never_gets_an_empty_list(tmp_path):
    """With two processes and one problem, one process has nothing to score."""
    (tmp_path / "mine.py").write_text(
        "def f(responses, problems):\n"
        "    return [float(len(max(responses)) > 0)] * len(responses)\n")
    done = run_script("eval.py", "--shots", 0, "--limit", 1, "--reward", "mine.py:f",
                      "--device", "cpu", processes=2, cwd=tmp_path)
    assert "100.0%" in done.stdout


def test_ctrl_c_keeps_the_samples(tmp_path):
    script = Script("eval.py", "--samples", 100, "--device", "cpu", cwd=tmp_path)
    output = tmp_path / "evals" / "tiny.jsonl"
    script.wait_until(lambda: output.is_file() and output.stat().st_size)
    script.signal(signal.SIGINT)
    ended = script.finish()
    assert ended.returncode == 130 and "goes on from there" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert output.stat().st_size   # the last line may be incomplete


def test_runs_and_checkpoints_load_as_models(tmp_path):
    """A run loads as its final/ or, without one, as its newest checkpoint."""
    train.train(train.prepare([
        "--batch-size", "2", "--n-on", "2", "--steps", "2", "--checkpoint-every", "1",
        "--eval-every", "0", "--learning-rate", "1e-3", "--device", "cpu", "--output-dir",
        str(tmp_path / "run")]))
    weights = {
        name: load_any_model(str(tmp_path / "run" / name), "cpu", torch.float32)[0].state_dict()
        for name in ("", "final", "checkpoints/step-1", "checkpoints/step-2")}
    same = {name: all(torch.equal(weights[name][key], weights["final"][key])
                      for key in weights["final"]) for name in weights}
    assert same == {"": True, "final": True, "checkpoints/step-2": True,
                    "checkpoints/step-1": False}
    shutil.rmtree(tmp_path / "run" / "final")
    for dtype in (torch.float32, torch.bfloat16):
        newest, _ = load_any_model(str(tmp_path / "run"), "cpu", dtype)
        for name, tensor in newest.state_dict().items():
            assert torch.equal(tensor, weights["final"][name].to(dtype)), name
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(ValueError, match="neither final/ nor a checkpoint"):
        load_any_model(str(tmp_path / "run"), "cpu", torch.float32)


def test_a_comparison_equals_one_computed_by_hand():
    plain, steered = ([{"score": score, "response": text} for score, text in pairs] for pairs in (
        [(0.0, "abcd"), (1.0, "ab"), (0.0, ""), (0.0, "x")],
        [(1.0, "abxd"), (0.0, "abcd"), (1.0, "y"), (0.0, "x")]))
    change = pilot.compare(plain, steered, samples=2)
    # The distances are 1/4, 2/4, 1/1 and 0; the problems' scores change by 0 and 1/2.
    assert change == {"difference": 0.25, "difference_low": 0.0, "difference_high": 0.5,
                      "distance": 1.75 / 4, "gained": 0.5, "lost": 0.25}


@pytest.mark.parametrize("problems, low, high, truncated, said", [
    (100, 0.1, 0.3, 0.5, "they help"), (100, -0.3, -0.1, 0.0, "they do harm"),
    (100, -0.1, 0.1, 0.0, "cannot be told apart"), (5, 1.0, 1.0, 0.0, "too few to say"),
    (100, 0.1, 0.3, 0.6, "raise --max-new-tokens")])
def test_the_verdict_follows_the_interval(problems, low, high, truncated, said):
    text = pilot.verdict("x", 1, {"accuracy": 0.2, "problems": problems, "truncated": truncated},
                         {"accuracy": 0.5, "truncated": 0.0},
                         {"difference_low": low, "difference_high": high, "gained": 0.4},
                         0.3, 0.35, {1.5: {"gained": 0.1}})
    assert said in text and ("accept 30.0% of the answers with demonstrations, "
                             "at least one to 35.0% of the problems") in text


def test_compare_shots_reports_the_change_per_setting(tmp_path):
    done = command(tmp_path, "--compare-shots", "--temperatures", 1.4, "--samples", 1, check=True)
    assert "they help, and ICPO" in done.stdout
    assert (tmp_path / "evals/tiny.png").read_bytes().startswith(b"\x89PNG")
    result, = json.loads((tmp_path / TABLE).read_text())["comparison"]
    rows = [json.loads(line) for line in (tmp_path / SAMPLES).read_text().splitlines()]
    # A second draw without demonstrations has other random numbers, a third another temperature.
    plain = [(row.get("again"), row["temperature"], row["response"])
             for row in rows if row["shots"] == 0]
    draws = [[text for *kind, text in plain if kind == list(each)]
             for each in dict.fromkeys(row[:2] for row in plain)]
    assert list(map(len, draws)) == [40] * 3 and len(set(map(tuple, draws))) == 3
    scores = {shots and row.get("demo_format", "one-turn"): [] for row in rows
              for shots in [row["shots"]]}
    for row in rows:
        if "again" not in row:
            scores[row["shots"] and row.get("demo_format", "one-turn")].append(row["score"])
    assert scores.keys() == {0, "one-turn", "turns", "text"}
    means = {form: fmean(each) for form, each in scores.items()}
    for form in ("one-turn", "turns", "text"):
        difference = result["changes"][f"1 shot, {form}"]["difference"]
        assert difference == pytest.approx(means[form] - means[0])
    assert list(result["changes"]) == ["0 shots again", "temperature 1.4", "1 shot, one-turn",
                                       "1 shot, turns", "1 shot, text"]
    best = max(("one-turn", "turns", "text"), key=means.__getitem__)
    assert result["steered"]["accuracy"] == pytest.approx(means[best])
    assert f"Recommended: train.py --demo-format {best} --num-demonstrations 1" in done.stdout
    table = [line.split() for line in done.stdout.splitlines()[2:7]]
    assert [line[1:3] for line in table[:4]] == [["0", "1"], ["1", "one-turn"], ["1", "turns"],
                                                 ["1", "text"]]
    # A file of one format goes on with the others, and no sample is drawn twice.
    lines = (tmp_path / SAMPLES).read_text().splitlines(keepends=True)
    (tmp_path / SAMPLES).write_text("".join(line for line in lines if "demo_format" not in line))
    again = command(tmp_path, "--compare-shots", "--temperatures", 1.4, "--samples", 1, check=True)
    assert again.stdout == done.stdout
    assert sorted((tmp_path / SAMPLES).read_text().splitlines(keepends=True)) == sorted(lines)
    one = command(tmp_path, "--compare-shots", "--temperatures", 1.4, "--samples", 1,
                  "--compare-formats", "one-turn", check=True)
    assert "Recommended" not in one.stdout and "tiny, 1 shot  " in one.stdout
    refused = command(tmp_path, "--compare-shots", "--shots", 1, 2)
    assert refused.returncode == 2 and "compares --shots 0 with one other number" in refused.stderr
    for more, message in ((["--compare-formats", "text"], "give that, too"),
                          (["--compare-shots", "--compare-formats", "text", "text"], "one twice")):
        refused = command(tmp_path, *more)
        assert refused.returncode == 2 and message in refused.stderr


@pytest.mark.parametrize("gain, lead, said", [
    ((0.1, 0.3), (0.05, 0.2), "better than the next, text, by +12.5 points (+5.0 to +20.0). "
     "Recommended: train.py --demo-format turns --num-demonstrations 2"),
    ((0.1, 0.3), (-0.05, 0.2), "not told apart from the next, text: +7.5 points (-5.0 to +20.0). "
     "Recommended: train.py --demo-format turns"),
    ((-0.1, 0.3), (0.05, 0.2), "No format is recommended, because none is shown to help.")])
def test_the_recommendation_follows_both_intervals(gain, lead, said):
    gain, lead = ({"difference": (low + high) / 2, "difference_low": low, "difference_high": high}
                  for low, high in (gain, lead))
    text = pilot.recommend("--num-demonstrations 2", {"turns": gain, "text": {}, "x": {}}, lead)
    assert said in text and f"turns has the highest accuracy, {pilot.points(gain)}" in text


def test_the_recommended_options_write_the_prompts_of_the_evaluation():
    o = EvaluationOptions(system="Be brief.", instruction="", stop=["\\n", "Q:"], demo_min_chars=58)
    assert pilot.training_options(o, 2) == (
        "--num-demonstrations 2 --system='Be brief.' --instruction='' --stop '\\n' Q: "
        "--demo-min-chars=58")
    assert pilot.training_options(EvaluationOptions(chat_template=False), 1) == (
        "--num-demonstrations 1 --chat-template=false")
    # train.py reads what is recommended, also a text that begins with a dash.
    o = EvaluationOptions(instruction="- be brief", system="a 'b'")
    read = parse_training(shlex.split(pilot.training_options(o, 1)))
    assert (read.instruction, read.system) == (o.instruction, o.system)


def test_the_formats_compared_are_those_that_the_tokenizer_allows(embedded):
    _, builder, _ = embedded
    bare = make_tokenizer()
    bare.chat_template = None
    raw = PromptBuilder(bare, chat_template=False, demo_format="text")

    def compared(builder, *formats):
        options = EvaluationOptions(compare_formats=list(formats), demo_format=builder.demo_format)
        return {form: each.demo_format for form, each in compared_formats(options, builder).items()}

    assert compared(builder) == {"": "one-turn", "turns": "turns", "text": "text"}
    assert compared(builder, "text", "turns") == {"text": "text", "turns": "turns"}
    assert compared(raw) == {"": "text"}
    with pytest.raises(ValueError, match="chat template is missing"):
        compared(raw, "turns")


def test_the_averages_of_a_suite_are_those_of_each_format(capsys):
    options = EvaluationOptions(suite="paper", shots=[0, 1], temperature=0.6, k=[1], samples=1)
    row = {"temperature": 0.6, "problems": 9, "low": 0.0, "high": 1.0, "pass@1": 0.5,
           "majority": 0.5, "tokens": 9.0, "truncated": 0.0}
    kinds = [({"shots": 0}, 0.1), ({"shots": 1}, 0.2), ({"shots": 1, "demo_format": "text"}, 0.3),
             ({"shots": 0, "again": True}, 0.9)]
    names = [name for each in PAPER.values() for name in each]
    print_table(options, [row | {"data": name, "accuracy": accuracy} | kind
                          for name in names for kind, accuracy in kinds])
    averages = [line for line in capsys.readouterr().out.splitlines() if "average" in line]
    assert averages == [
        f"average {kind}, {shots}: {accuracy}%" for shots, accuracy in (
            ("0 shots", "10.0"), ("1 shot", "20.0"), ("1 shot, text", "30.0"))
        for kind in ("in-distribution", "out-of-distribution")]


def drawn(monkeypatch, module, *arguments):
    """Calls module.draw, checks that the legend covers nothing, and returns the figure and the
    legend's names."""
    with monkeypatch.context() as patch:
        patch.setattr(curves.plt, "close", lambda figure: None)
        module.draw(*arguments)
    figure = curves.plt.gcf()
    curves.plt.close(figure)
    legend, = figure.legends
    box = legend.get_window_extent()
    assert not any(axis.get_legend() or box.overlaps(axis.get_tightbbox()) for axis in figure.axes)
    return figure, [text.get_text() for text in legend.get_texts()]


def test_the_picture_of_a_comparison_has_bars_and_a_legend_that_covers_none(tmp_path, monkeypatch):
    change = {"distance": 0.5, "gained": 0.3, "lost": 0.2}
    formats = [f"2 shots, {form}" for form in ("one-turn", "turns", "text")]
    others = ["0 shots again", "temperature 1.2", "temperature 1.5", *formats]
    result = {"accuracies": {"0 shots": {"accuracy": 0.4, "low": 0.3, "high": 0.5},
                             **dict.fromkeys(formats, {"accuracy": 0.8, "low": 0.7, "high": 0.9})},
              "changes": dict.fromkeys(others, change)}
    figure, names = drawn(monkeypatch, pilot, [result | {"data": "tiny"}, result | {"data": "b/c"}],
                          tmp_path / "out.png")
    assert names == ["tiny", "c"]
    edge = figure.bbox.width   # titles are whole
    assert all(axis.title.get_window_extent().x1 <= edge for axis in figure.axes)
    accuracy, distance, flips = figure.axes
    for axis, kinds in ((accuracy, ["0 shots", *formats]), (distance, others), (flips, others)):
        assert [text.get_text().replace("\n", " ") for text in axis.get_xticklabels()] == kinds
        boxes = [text.get_window_extent() for text in axis.get_xticklabels()]
        assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))   # each can be read
    assert [bar.get_height() for bar in accuracy.patches] == [0.4, 0.8, 0.8, 0.8] * 2
    assert [bar.get_height() for bar in distance.patches] == [0.5] * 12
    assert [bar.get_height() for bar in flips.patches] == ([0.3] * 6 + [-0.2] * 6) * 2
    # No line joins kinds of answers, which have no order: the only one is that of 0.
    assert not distance.lines and [list(line.get_ydata()) for line in flips.lines] == [[0, 0]]


def test_curves_name_the_systems_and_their_legend_covers_no_line(tmp_path, monkeypatch):
    assert curves.LABELS.keys() == METHODS.keys()
    for method in METHODS:
        (tmp_path / method).mkdir()
        (tmp_path / method / "config.yaml").write_text(f"method: {method}\n")
        (tmp_path / method / "metrics.jsonl").write_text('{"step": 1, "reward_on": 0.5}\n')
    for count in (1, 2, 5):
        runs = [tmp_path / method for method in METHODS][-count:]
        _, names = drawn(monkeypatch, curves, runs, tmp_path / "out.png")
        assert names == ["GRPO", "LUFFY", "LUFFY (release)", "ICPO", "ICPO†"][-count:]


def test_curves_keep_systems_apart_that_have_the_same_method(tmp_path, monkeypatch):
    """Seeds are one line; a reward beyond 0 to 1 is not cut off."""
    systems = [("seed: 0", "errs: true", "test_data: tiny", "steps: 60\nbonus_steps: 60"),
               ("seed: 1", "errs: true", "test_data: [tiny]", "steps: 70\nbonus_steps: 70"),
               ("seed: 0", "errs: true", "test_data: [tiny]", "steps: 60\nbonus_steps: 20"),
               ("seed: 0", "errs: false", "test_data: [tiny]", "steps: 60\nbonus_steps: 60"),
               ("seed: 0", "errs: true", "model: /a/model", "bonus_steps: 20\nsystem: $\\boxed{}$"),
               ("seed: 0", "errs: true", "model: /b/model", "bonus_steps: 20\nsystem: /b")]
    for number, settings in enumerate(systems):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "config.yaml").write_text("\n".join(["method: icpo", *settings]))
        (tmp_path / str(number) / "metrics.jsonl").write_text('{"step": 1, "reward_on": -1.5}\n')
    figure, names = drawn(monkeypatch, curves, [tmp_path / name for name in "0123"],
                          tmp_path / "out.png")
    assert len(drawn(monkeypatch, curves, [tmp_path / name for name in "45"],
                     tmp_path / "out.png")[1]) == 2
    assert names == [f"ICPO {each}" for each in (
        "--errs true --bonus-steps 0, 2 runs", "--errs true --bonus-steps 20",
        "--errs false --bonus-steps 0")]
    low, high = figure.axes[1].get_ylim()
    assert low < -1.5 < high


@pytest.mark.parametrize("settings, alike", [
    ("", False), ("--temperature 0", True), ("--top-k 1", True), ("--top-p 1e-6", True)])
def test_an_evaluation_samples_with_its_settings(tmp_path, settings, alike):
    o = parse_evaluation(["--shots", "0", "--limit", "12", "--samples", "3", "--device", "cpu",
                          "--output", str(tmp_path / "a.jsonl"), *settings.split()], "")
    model, builder, scorer, (case,) = prepare_evaluation(o)
    sampler = evaluation.make_sampler(o, model, builder, [case])
    records = evaluation.sample_case(o, model, builder, scorer, case, [], sampler)
    answers = {(record["id"], record["response"]) for record in records}
    assert len(records) == 36 and (len(answers) == 12) == alike


def test_the_options_of_the_reward_reach_the_scorer_and_the_votes(tmp_path, monkeypatch):
    options = ["--answer-format", "tags", "--verify-timeout", "3", "--reward-timeout", "4",
               "--device", "cpu"]
    found = []

    def watched(function):
        def call(*given, **named):
            found.append(inspect.signature(function).bind(*given, **named).arguments)
            return function(*given, **named)
        return call

    monkeypatch.setattr(prepare, "make_scorer", watched(make_scorer))
    monkeypatch.setattr(evaluation, "summarise", watched(summarise))
    monkeypatch.setattr(sys, "argv", [
        "eval.py", *options, "--shots", "0", "--limit", "1", "--max-new-tokens", "2", "--output",
        str(tmp_path / "a.jsonl")])
    evaluation.main()
    with pytest.raises(ValueError, match="no data file"):   # this is found next
        train.prepare([*options, "--train-data", "gone.jsonl", "--output-dir", str(tmp_path / "b")])
    names = ("answer_format", "timeout", "reward_timeout")
    assert [[each.get(name) for name in names] for each in found] == [
        ["tags", 3, 4], ["tags", 3, None], ["tags", 3, 4]]   # votes call no reward of one's own


def test_an_evaluation_of_a_run_asks_as_the_run_did(tmp_path, capsys):
    (tmp_path / "final").mkdir()
    (tmp_path / "config.yaml").write_text(
        "method: icpo\nanswer_format: gsm8k\ninstruction: Think.\nstop: [a, b]\nsystem: Hello\n"
        "max_new_tokens: 100\nseed: 3\ndtype: bfloat16\n")
    model = str(tmp_path / "final")
    found = parse_evaluation(["--model", model, "--instruction", "Reason."], "", settings_of_run)
    assert found == EvaluationOptions(model=model, answer_format="gsm8k", instruction="Reason.",
                                      stop=["a", "b"], system="Hello", max_new_tokens=100,
                                      dtype="bfloat16")
    said = capsys.readouterr().err.strip()
    assert set(said.removeprefix("as the run was trained: ").split(", ")) == {
        "--stop a b", "--answer-format gsm8k", "--system Hello", "--max-new-tokens 100",
        "--dtype bfloat16"}
    raw = parse_evaluation(["--model", model, "--chat-template", "false"], "", settings_of_run)
    assert (raw.instruction, raw.system) == ("Think.", "")
    assert parse_evaluation(["--model", "tiny"], "", settings_of_run) == EvaluationOptions()


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    def refuse(dir):
        raise OSError(30, "Read-only file system")

    (tmp_path / "config.yaml").write_text("method: icpo\n")
    monkeypatch.setattr(runs.tempfile, "TemporaryFile", refuse)
    with pytest.raises(ValueError, match="cannot be written .Read-only file system.: give another"):
        runs.find_output(EvaluationOptions(model=str(tmp_path)), [])


def test_a_file_of_another_evaluation_stays_free(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, _ = runs.find_output(EvaluationOptions(), [])
    os.close(runs._held.pop(path.absolute()))   # as at the end of the process
    other, _ = runs.find_output(EvaluationOptions(seed=1), [])
    assert (path.name, other.name) == ("tiny.jsonl", "tiny-2.jsonl")
    os.close(runs._lock(path.with_name(f".{path.name}.lock"), "busy"))
    with pytest.raises(runs.InUse):
        runs._lock(other.with_name(f".{other.name}.lock"), "busy")


def test_curves_are_read_summarised_and_drawn(tmp_path, monkeypatch):
    for name, method, shift in (("a", "icpo", 0.0), ("b", "icpo", 0.2), ("c", "grpo", 0.1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(f"method: {method}\n")
        rows = [{"step": 1, "reward_on": 0.1 + shift, "reward_off": None,
                 "eval_accuracy_before": 0.1},
                {"step": 2, "reward_on": 0.2 + shift, "reward_off": None,
                 "eval_accuracy": 0.5 + shift}]
        (tmp_path / name / "metrics.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows))
    assert curves.series(curves.read_metrics(tmp_path / "a"), "eval_accuracy") == {0: 0.1, 2: 0.5}
    assert curves.series(curves.read_metrics(tmp_path / "a"), "reward_off") == {}
    assert curves.summarise(tmp_path / "a").endswith(
        "a: 10.0% at step 0, 50.0% at step 2, 90 % not reached")
    figure, _ = drawn(monkeypatch, curves, [tmp_path / name for name in "abc"],
                      tmp_path / "out.png")
    mean, of_one = (line.get_ydata() for line in figure.axes[1].lines)
    assert mean == pytest.approx([0.2, 0.3]) and of_one == pytest.approx([0.2, 0.3])
    band, _ = figure.axes[1].collections   # of steps 1 to 2, from the lowest run to the highest
    assert band.get_paths()[0].get_extents().extents == pytest.approx([1, 0.1, 2, 0.4])
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="is not a run"):
        curves.draw([tmp_path / "none"], tmp_path / "out.png")


def test_the_example_in_the_readme_runs_and_learns():
    """A policy that is a table of logits learns to prefer the tokens of the right response."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    exec(code, example := {})
    logits = torch.nn.Parameter(torch.zeros(10))
    optimizer = torch.optim.SGD([logits], lr=1.0)
    tokens = torch.tensor([[0, 2, 3], [4, 5, 6], [7, 8, 9], [1, 1, 1]])
    for _ in range(5):
        old = logits.detach().log_softmax(-1)[tokens]
        old[3] = 0.0   # with demonstrations, these tokens had probability 1
        loss, _ = example["icpo_update"](
            lambda t: logits.log_softmax(-1)[t], optimizer, tokens, old, torch.ones(4, 3),
            torch.tensor([0.0, 0.0, 0.0, 1.0]), torch.zeros(4, dtype=torch.long),
            torch.tensor([False, False, False, True]))
        assert torch.isfinite(loss)
    assert logits.argmax() == 1
