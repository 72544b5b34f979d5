"""Tests benchmarks/scaling.py: a case, the finished ones, the picture, and the computed table."""

import json

import pytest
from processes import ROOT

from benchmarks import scaling


def test_a_case_is_measured(tmp_path, capsys):
    scaling.write_model(tmp_path / "model", 512)
    scaling.measure({"model": str(tmp_path / "model"), "output": str(tmp_path / "run"), "n-on": 2,
                     "max-new-tokens": 3, "num-demonstrations": 2})
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["seconds"] > found["rollout"] + found["update"] > 0 and found["bytes"] > 0


def test_finished_cases_are_not_measured_again(tmp_path, monkeypatch):
    asked = []

    def run_case(case, scratch):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(case)
        size = case["n-on"] * case["max-new-tokens"] * case["vocabulary"]
        return {"seconds": 2 * size, "rollout": size, "update": size, "bytes": size}

    monkeypatch.setattr(scaling, "run_case", run_case)
    monkeypatch.setattr(scaling, "FACTORS", (1, 4))
    with pytest.raises(KeyboardInterrupt):
        scaling.measure_all(tmp_path / "cases.jsonl")
    first, asked[:] = asked[:], []
    results = scaling.measure_all(tmp_path / "cases.jsonl")
    assert len(first) == len(asked) == 3 and not any(case in first for case in asked)
    assert "| vocabulary | step | 1.00 | 4.00 |" in (table := scaling.table(results))
    assert "| demonstrations | memory | 1.00 | 1.00 |" in table
    scaling.draw(results, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_the_computed_table_is_that_of_the_page():
    assert scaling.simulate() in (ROOT / "benchmarks" / "README.md").read_text()
