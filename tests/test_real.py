import argparse
import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import processes

import curves
import machine
from benchmarks import real, reproduce
from files import read_lines
from reward import extract_answer
from verify import usable_cores


@pytest.mark.parametrize("about, solution", [
    ({"expression": "4 - 7 + 2 - 9"},
     r"4 - 7 = -3, -3 + 2 = -1, -1 - 9 = -10. So the answer is \boxed{-10}."),
    ({"expression": "0 + 0 + 9 + 3 - 1 - 5"}, r"0 + 0 = 0, 0 + 9 = 9, 9 + 3 = 12, 12 - 1 = 11, "
                                              r"11 - 5 = 6. So the answer is \boxed{6}."),
    ({"source_repr": "203", "source_base": 4, "target_base": 10},
     r"2*16 + 0*4 + 3*1 = 32 + 0 + 3 = 35. So the answer is \boxed{35}."),
    ({"source_repr": "3c", "source_base": 16, "target_base": 10},
     r"3*16 + 12*1 = 48 + 12 = 60. So the answer is \boxed{60}."),
    ({"source_repr": "203", "source_base": 4, "target_base": 9}, None)])
def test_a_worked_solution_has_every_intermediate_result(about, solution):
    assert real.worked({"metadata": about}) == solution


def stub(monkeypatch):
    """Puts a stand-in for reasoning-gym in its place and returns the list of (seed, size) that it
    is asked for. Every second problem is the one before it again."""
    asked = []

    def create_dataset(generator, seed, size, **config):
        asked.append((seed, size))
        for i in range(size):
            number = (seed + i) // 2
            numbers = [int(digit) for digit in f"{number:08d}"[-config["max_terms"]:]]
            yield {"question": f"State the sum {' + '.join(map(str, numbers))} = ",
                   "answer": str(sum(numbers)),
                   "metadata": {"expression": " + ".join(map(str, numbers))}}

    module = types.ModuleType("reasoning_gym")
    module.create_dataset = create_dataset
    monkeypatch.setitem(sys.modules, "reasoning_gym", module)
    return asked


SUMS = real.TASKS["sums"]


def check_problems(folder, scale, task=SUMS):
    """Fails unless the files in `folder` are what a run needs; returns the problems by set."""
    found = {name: read_lines(folder / f"{name}.jsonl") for name in real.SETS}
    assert {name: len(rows) for name, rows in found.items()} == {
        name: (task.train if name == "train" else task.others) // scale for name in real.SETS}
    texts = [row["problem"] for rows in found.values() for row in rows]
    assert len(set(texts)) == len(texts)
    for name, rows in found.items():
        for row in rows:
            assert ("expert_response" in row) == (name == "train")
            assert row.get("expert_response", row.get("solution")) == row.get("solution")
            assert ("solution" in row) == (name != "equations")
            if name != "equations":
                assert extract_answer(row["solution"]) == row["answer"]
    return found


def test_the_sets_share_no_problem(tmp_path, monkeypatch):
    asked = stub(monkeypatch)
    real.write_problems(tmp_path / "data", SUMS, 16)
    check_problems(tmp_path / "data", 16)
    ranges = sorted((seed, seed + size) for seed, size in asked)
    assert len(ranges) == len(real.SETS)
    assert all(end <= start for (_, end), (start, _) in zip(ranges, ranges[1:]))
    real.write_problems(tmp_path / "data", SUMS, 16)   # They are there.
    assert len(asked) == len(real.SETS)


def test_reasoning_gym_makes_the_problems(tmp_path):
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed: "
                        "pip install -r benchmarks/requirements-real.txt")
    real.write_problems(tmp_path / "data", SUMS, 4)
    found = check_problems(tmp_path / "data", 4)
    for name, terms in {"held-out": (4, 6), "train": (4, 6), "longer": (7, 8)}.items():
        for row in found[name]:
            expression = row["problem"].partition(": ")[2].removesuffix(" =")
            assert eval(expression) == int(row["answer"])
            numbers = re.findall(r"\d+", expression)
            assert terms[0] <= len(numbers) <= terms[1] and all(len(each) == 1 for each in numbers)
    for row in found["equations"]:
        variable, = set(re.findall(r"(?:for|of) (\w)\b", row["problem"]))
        left, right = row["problem"].split(": ")[1].split(" = ")
        assert eval(left, {variable: int(row["answer"])}) == int(right)
    bases = real.TASKS["bases"]
    real.write_problems(tmp_path / "bases", bases, 1)
    for name, rows in check_problems(tmp_path / "bases", 1, bases).items():
        for row in rows if name != "equations" else ():
            base, number = re.search(r"(binary|hexadecimal|base-\d+) number (\w+) to base-10",
                                     row["problem"]).groups()
            base = {"binary": 2, "hexadecimal": 16}.get(base) or int(base[5:])
            assert int(number, base) == int(row["answer"])
            assert (int(row["answer"]) >= 64) == (name == "longer")


def test_without_reasoning_gym_an_error_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    monkeypatch.setattr(sys, "argv", ["real.py", "--model", "tiny", "--quick", "--output-dir",
                                      str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        real.main()
    assert end.value.code == 2
    assert "pip install -r benchmarks/requirements-real.txt" in capsys.readouterr().err


@pytest.mark.parametrize("able, dtype", [(True, "bfloat16"), (False, "float32")])
def test_the_type_follows_from_the_processor(monkeypatch, able, dtype):
    monkeypatch.setattr(machine, "has_bfloat16", lambda: able)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert real.fast_dtype() == dtype


def test_finished_work_is_skipped_and_stopped_work_resumes(tmp_path, monkeypatch):
    calls = []
    o = argparse.Namespace(output_dir=tmp_path, data=tmp_path / "data", model="M", dtype="float32",
                           train="--steps 2", environment={}, settings={},
                           limit=200, shared=dict.fromkeys(real.SHARED, ""))
    folder = real.folder_of(o, "ICPO", 1)

    def run(command, log, environment):
        calls.append((command[0], "--resume" in command))
        if command[0] == "eval.py":
            (folder / "after.json").write_text(json.dumps({"rows": after(0.5, 40)}))
        elif len(calls) > 1:   # The first time a signal stops it.
            (folder / "final").mkdir()
        else:
            (folder / "checkpoints").mkdir(parents=True)

    monkeypatch.setattr(real, "run", run)
    monkeypatch.setattr(real, "report", lambda o: calls.append("report"))
    real.finish(o, "ICPO", 1)
    assert calls == [("train.py", True)] and (folder / "checkpoints").is_dir()
    real.finish(o, "ICPO", 1)
    assert calls[1:] == [("train.py", True), ("eval.py", False), "report"]
    assert not (folder / "checkpoints").is_dir()
    real.finish(o, "ICPO", 1)
    assert len(calls) == 4
    (folder / "after.json").write_text('{"settings": {}, "rows": []}')   # a killed evaluation
    real.finish(o, "ICPO", 1)
    assert calls[4:] == [("eval.py", False), "report"]


def after(accuracy, tokens):
    """Returns the rows of an evaluation of a trained model."""
    return [{"data": f"/data/{name}.jsonl", "shots": 0, "problems": 256, "truncated": 0.25,
             "accuracy": accuracy - i / 10, "low": accuracy - i / 10 - 0.05,
             "high": accuracy - i / 10 + 0.05, "tokens": tokens + i}
            for i, name in enumerate(real.ASKED)]


def test_the_report_says_of_how_many_seeds_each_figure_is(tmp_path):
    o = argparse.Namespace(output_dir=tmp_path, settings={"model": "M", "train": "--steps 4"})
    (tmp_path / "before.json").write_text(json.dumps({"rows": [
        after(0.2, 140)[0] | {"data": "/data/screen.jsonl"}, *after(0.3, 150)]}))
    (tmp_path / "screen-turns.json").write_text(json.dumps({"rows": [
        after(0.5, 40)[0] | {"data": "/data/screen.jsonl", "shots": 2}]}))
    for name, accuracies in {"GRPO": [0.4, 0.5, 0.6], "ICPO": [0.7, 0.8, 0.9]}.items():
        for seed, accuracy in enumerate(accuracies):
            folder = real.folder_of(o, name, seed)
            folder.mkdir(parents=True)
            row = {"reward_on": accuracy, "answered": 0.9, "response_length": 60.0, "bonus": 0.0,
                   "errs_accept_rate": 0.75 if name == "ICPO" else None, "off_policy_share": 0.1,
                   "groups_all_equal": 0.5, "entropy": 1.0, "tokens_sampled": 2000.0}
            rows = [row | {"step": step, "eval_accuracy": accuracy} for step in range(1, 5)]
            rows[0]["eval_accuracy_before"] = 0.25
            if name == "ICPO":
                rows[0]["errs_accept_rate"] = 0.25
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            real.beside(folder, "seconds").write_text("3600.0\n")
            if (name, seed) == ("ICPO", 2):
                (folder / "metrics.jsonl").write_text(json.dumps(rows[0]) + "\n")
            if name == "GRPO" or seed == 0:
                (folder / "after.json").write_text(json.dumps({"rows": after(accuracy, 50 + seed)}))
    real.report(o)
    text = (tmp_path / "results.md").read_text()
    for line in (
            "| 0 | – | 256 | 20.0 (15.0 to 25.0) | 140.0 | 25.0 |",
            "| 2 | turns | 256 | 50.0 (45.0 to 55.0) | 40.0 | 25.0 |",
            "| before training | – | 30.0 (25.0 to 35.0) | 150.0 | 20.0 (15.0 to 25.0) | 151.0 | "
            "10.0 (5.0 to 15.0) | 152.0 |",
            "| GRPO | 3 | 50.0 (25.2 to 74.8) | 51.0 (48.5 to 53.5) | 40.0 (15.2 to 64.8) | "
            "52.0 (49.5 to 54.5) | 30.0 (5.2 to 54.8) | 53.0 (50.5 to 55.5) |",
            "| ICPO | 1 | 70.0 | 50.0 | 60.0 | 51.0 | 50.0 | 52.0 |",
            "| GRPO | 3 | 50.0 → 50.0 | 90.0 → 90.0 | 60.0 → 60.0 | – → – | 10.0 → 10.0 | "
            "50.0 → 50.0 | 0.0 → 0.0 |",
            "| GRPO | 3 | 25.0 (25.0 to 25.0) | 50.0 (25.2 to 74.8) | 50.0 (25.2 to 74.8) | "
            "50.0 (25.2 to 74.8) | 50.0 (25.2 to 74.8) |",
            "| ICPO | 2 | 25.0 | 75.0 | 75.0 | 75.0 | 75.0 |",
            "| ICPO | 2 | 75.0 → 75.0 | 90.0 → 90.0 | 60.0 → 60.0 | 25.0 → 75.0 | 10.0 → 10.0 | "
            "50.0 → 50.0 | 0.0 → 0.0 |",
            "| points above GRPO | after the last step |\n|---|---|\n| ICPO | +30.0 |",
            "| ICPO, 2 seeds | 8 | 2 |"):
        assert f"\n{line}\n" in text
    assert "The runs took 6.0 hours, added up. Not finished: ICPO, seed 2 (1 steps)." in text
    assert "| points above GRPO, 3 seeds | " in text
    assert "\n| ICPO, 1 seed | +30.0 | +30.0 | +30.0 |\n" in text
    for name in ("curves", "systems", "tokens"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_an_empty_folder_has_a_report_without_runs(tmp_path):
    real.report(argparse.Namespace(output_dir=tmp_path, settings={"train": "--steps 4"}))
    assert "The runs took 0.0 hours, added up." in (tmp_path / "results.md").read_text()


def test_the_command_from_end_to_end(tmp_path, monkeypatch, capsys):
    """With the embedded model, which cannot do this task, and a stand-in for reasoning-gym."""
    stub(monkeypatch)
    calls, shared = [], {True: [], False: []}

    def run(command, log, environment):
        calls.append(command[0])
        assert command[command.index("--max-new-tokens") + 1] == "200"
        shared[" ".join(command).endswith(real.SHARED[command[0]])].append(
            (command[0], environment["OMP_NUM_THREADS"]))
        done = processes.run(*command, check=False)
        assert not done.returncode, done.stderr

    monkeypatch.setattr(real, "run", run)
    arguments = ["real.py", "--model", "tiny", "--quick", "--steps", "1", "--dtype", "float32",
                 "--output-dir", str(tmp_path / "out")]
    cores = usable_cores()
    monkeypatch.setattr(sys, "argv", [*arguments, "--processes", "2", "--systems", "LUFFY"])
    real.main()
    half = str(max(cores // 2, 1))
    assert sorted(shared[True]) == [("eval.py", half)] * 3 + [("train.py", half)]
    assert not shared[False]
    monkeypatch.setattr(sys, "argv", [*arguments, "--systems", "LUFFY", "ICPO"])
    real.main()
    assert shared[False] == [("train.py", str(cores)), ("eval.py", str(cores))]
    text = (tmp_path / "out" / "results.md").read_text()
    assert text in capsys.readouterr().out
    assert re.findall(r"^\| (\d) \| (\S+) \| 8 \|", text, re.M) == [
        ("0", "–"), ("1", "turns"), ("2", "turns"), ("4", "turns")]
    assert re.findall(r"^\| (\S+) \| 1 \| \d", text, re.M) == ["LUFFY", "ICPO"] * 3
    monkeypatch.setattr(sys, "argv", [*arguments, "--systems"])
    real.main()
    monkeypatch.setattr(sys, "argv", ["real.py", "--report", "--output-dir", str(tmp_path / "out")])
    real.main()
    assert len(calls) == 6 and (tmp_path / "out" / "results.md").read_text() == text
    monkeypatch.setattr(sys, "argv", [*arguments[:-1], str(tmp_path / "other"), "--report"])
    with pytest.raises(SystemExit):
        real.main()
    assert "holds no runs of this script" in capsys.readouterr().err


def test_another_task_has_its_own_problems_and_limit(tmp_path, monkeypatch):
    tasks, commands = [], []
    monkeypatch.setattr(real, "write_problems", lambda folder, task, scale: tasks.append(task))
    monkeypatch.setattr(real, "run", lambda command, log, environment: commands.append(command))
    monkeypatch.setattr(sys, "argv", ["real.py", "--task", "bases", "--model", "tiny", "--systems",
                                      "--dtype", "float32", "--output-dir", str(tmp_path)])
    real.main()
    assert tasks == [real.TASKS["bases"]]
    assert [command[command.index("--max-new-tokens") + 1] for command in commands] == ["400"] * 2
    assert "| 64 to 127, % | tokens |" in (tmp_path / "results.md").read_text()


@pytest.mark.parametrize("script", [real, reproduce])
def test_fewer_processes_than_one_are_refused(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script.py", "--processes", "0"])
    with pytest.raises(SystemExit):
        script.main()
    assert "--processes: must be at least 1, not 0" in capsys.readouterr().err


def test_the_pictures_name_the_systems_as_curves_py_does():
    methods = {options: name for name, options in real.SYSTEMS.items()}
    for method, name in curves.LABELS.items():
        assert methods.get(f"--method {method}", name) == name
