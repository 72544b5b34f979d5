import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import reproduce   # noqa: E402


def runs(*values):
    return {seed: dict.fromkeys(reproduce.MEASURES, value) for seed, value in enumerate(values)}


def test_intervals_and_words():
    assert reproduce.bootstrap([0.25] * 5) == (0.25, 0.25, 0.25)
    mean, low, high = reproduce.bootstrap([0.0, 1.0])   # of two values the mean of two draws is 0, 1/2 or 1
    assert (mean, low, high) == (0.5, 0.0, 1.0)
    results = {"GRPO": runs(0.1, 0.2, 0.3, 0.4, 0.5), "better": runs(0.2, 0.3, 0.4, 0.5, 0.6),
               "worse": runs(0.0, 0.1, 0.2, 0.3, 0.4), "other": runs(0.5, 0.4, 0.3, 0.2, 0.1), "few": runs(0.9, 0.9, 0.9, 0.9)}
    words = [line.split("accuracy at the end ")[1].split(" (")[0] for line in reproduce.differences(results, "GRPO")]
    assert words == ["higher", "lower", "not told apart", "too few seeds"]
    assert reproduce.table_of(results)[2].startswith("| GRPO | 30.0 (")
    assert reproduce.table_of({"GRPO": runs(0.25)}, paper=True)[2] == "| GRPO" + 4 * " | 25.0" + " | 62.37 |"   # one run: no interval


def test_intervals_of_five_seeds_hold_the_mean():
    """Of the plain 2.5 and 97.5 % points only 84 % do."""
    draws = np.random.default_rng(1).standard_normal((500, 5))
    held = [low <= 0 <= high for _, low, high in map(reproduce.bootstrap, draws)]
    assert 0.91 < np.mean(held) < 0.98


def test_what_is_done_is_skipped_and_what_was_stopped_goes_on(tmp_path, monkeypatch):
    calls = []

    def run(command, log):
        calls.append((command[0], "--resume" in command))
        if command[0] == "eval.py":
            (job.folder / "longer.json").write_text("{}")
        else:
            (job.folder / "final").mkdir(parents=True)

    monkeypatch.setattr(reproduce, "run", run)
    job = reproduce.Job("rare", "ICPO", 0, "--method icpo", tmp_path / "rare" / "runs" / "ICPO-seed0")
    reproduce.finish(job, 5)
    assert calls == [("train.py", False), ("eval.py", False)]
    reproduce.finish(job, 5)
    assert len(calls) == 2
    (job.folder / "final").rmdir()
    (job.folder / "longer.json").unlink()
    reproduce.finish(job, 5)
    assert calls[2:] == [("train.py", True), ("eval.py", False)]


def test_a_run_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="no-such-option"):
        reproduce.run(["train.py", "--no-such-option", "1"], tmp_path / "log")
