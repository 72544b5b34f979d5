"""Tests the files of the embedded model, and the script that makes them."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from processes import run as run_script

from data import load_problems
from reward import extract_answer, score

TINY = Path(__file__).resolve().parent.parent / "tiny"


@pytest.mark.parametrize("name, needs", [("train", ("solution", "expert_response")), ("test", ()),
                                         ("demonstrations", ("solution",))])
def test_every_problem_and_solution_is_right(name, needs):
    problems = load_problems(TINY / f"{name}.jsonl", needs)
    assert len({p.problem for p in problems}) == len(problems)
    for p in problems:
        assert sum(map(int, p.problem.split("+"))) == int(p.answer)
        if needs:
            steps = [list(map(int, re.findall(r"\d+", step)))
                     for step in re.findall(r"(?=\b(\d+\+\d=\d+))", p.solution)]
            assert all(a + b == c for a, b, c in steps) and len(steps) == p.problem.count("+")
            assert extract_answer(p.solution) == p.answer
    if name == "train":
        scores = score([p.expert_response for p in problems], [p.answer for p in problems])
        assert scores == [1.0] * len(problems)


def make(folder, *more):
    return run_script("tiny/make.py", "--output-dir", folder, "--steps", 2, "--batch-size", 8,
                      "--train-size", 20, "--test-size", 8, "--demonstrations", 5, *more).stdout


def test_the_script_makes_the_same_from_the_same_seed(tmp_path):
    said = make(tmp_path / "a")
    make(tmp_path / "b")
    make(tmp_path / "c", "--seed", "1", "--terms", "2", "3")
    assert "0 shots:" in said and "1 shot:" in said
    for name in ("train.jsonl", "model/model.safetensors", "model/tokenizer.json"):
        a, b, c = ((tmp_path / run / name).read_bytes() for run in "abc")
        assert a == b and (name == "model/tokenizer.json") == (a == c)
    assert {json.loads(line)["problem"].count("+")
            for line in (tmp_path / "c" / "train.jsonl").open()} == {1, 2}


def test_only_problems_are_made_in_a_custom_form(tmp_path):
    make(tmp_path, "--only-problems", "--terms", "2", "2", "--largest", "6",
         "--question", "What is {sum}?", "--solution", r"{worked}, so \boxed{{total}}.",
         "--train-size", "20")
    assert not (tmp_path / "model").exists()
    problems = [p for name in ("train", "test", "demonstrations")
                for p in load_problems(tmp_path / f"{name}.jsonl", ("solution",))]
    assert len({p.problem for p in problems}) == 33
    for p in problems:
        a, b = map(int, re.fullmatch(r"What is ([1-6])\+([1-6])\?", p.problem).groups())
        assert p.answer == str(a + b) and p.solution == rf"{a}+{b}={a + b}, so \boxed{{{a + b}}}."


@pytest.mark.parametrize("options, said", [
    (["--only-problems", "--terms", "2", "2", "--largest", "5"],
     "33 different sums are asked for, and there are 25"),
    (["--only-problems", "--question", "What?"], "--question needs {sum}"),
    (["--largest", "20"], "are for --only-problems")])
def test_impossible_options_are_refused_and_nothing_is_written(tmp_path, options, said):
    with pytest.raises(subprocess.CalledProcessError) as raised:
        make(tmp_path / "out", *options)
    assert said in raised.value.stderr and not (tmp_path / "out").exists()
