import argparse
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import curves
from benchmarks import experiments, reproduce


def runs(*values):
    return {seed: dict.fromkeys(reproduce.MEASURES, value) for seed, value in enumerate(values)}


def test_intervals_and_differences_follow_from_the_runs():
    results = {"GRPO": runs(0.1, 0.2, 0.3, 0.4, 0.5), "better": runs(0.2, 0.3, 0.4, 0.5, 0.6),
               "worse": runs(0.0, 0.1, 0.2, 0.3, 0.4), "other": runs(0.5, 0.4, 0.3, 0.2, 0.1),
               "few": runs(0.9, 0.9)}
    empty, head, _, *rows = experiments.differences(results, "GRPO", {"end": "at the end"})
    assert [empty, head] == ["", "| points above GRPO | at the end |"]
    assert rows == ["| better | **+10.0 (+10.0 to +10.0)** |",
                    "| worse | **-10.0 (-10.0 to -10.0)** |", "| other | +0.0 (-39.3 to +39.3) |",
                    "| few | +75.0 |"]
    for alone in ("GRPO", "few"):   # without another system, and without the baseline
        assert not experiments.differences({alone: results[alone]}, "GRPO", {"end": "at the end"})
    assert reproduce.table_of(results)[2].startswith("| GRPO | 30.0 (")
    # A single run has no interval.
    single = reproduce.table_of({"GRPO": runs(0.25)}, paper=True)[2]
    assert single == "| GRPO" + 4 * " | 25.0" + " | 62.37 |"


def test_intervals_are_students():
    """With the 97.5 % points of a printed table; there is none of one or two runs."""
    for count, point in {3: 4.3027, 4: 3.1824, 5: 2.7764, 10: 2.2622, 30: 2.0452}.items():
        values = [0.1 * number for number in range(count)]
        mean, low, high = experiments.over_seeds(values)
        assert mean == pytest.approx(statistics.fmean(values)) == pytest.approx((low + high) / 2)
        assert high - mean == pytest.approx(
            point * statistics.stdev(values) / count ** 0.5, rel=1e-4)
    mean, *ends = experiments.over_seeds([0.0, 1.0])
    assert mean == 0.5 and np.isnan(ends).all()
    assert experiments.over_seeds([0.25] * 5) == (0.25, 0.25, 0.25)
    assert experiments.right([0.2, 0.9, 0.7]) == "60.0 (0.0 to 100.0)"
    assert experiments.right([0.2, 0.9]) == "55.0"


def test_finished_work_is_skipped_and_stopped_work_resumes(tmp_path, monkeypatch):
    calls = []

    def run(command, log):
        calls.append((command[0], "--resume" in command))
        if command[0] == "eval.py":
            (job.folder / "longer.json").write_text('{"rows": [{"accuracy": 0.5}]}')
        else:
            (job.folder / "final").mkdir(parents=True)

    monkeypatch.setattr(reproduce, "run", run)
    job = reproduce.Job("rare", "ICPO", 0, "--method icpo",
                        tmp_path / "rare" / "runs" / "ICPO-seed0")
    reproduce.finish(job, 5)
    assert calls == [("train.py", False), ("eval.py", False)]
    reproduce.finish(job, 5)
    assert len(calls) == 2
    (job.folder / "final").rmdir()
    (job.folder / "longer.json").write_text('{"settings": {}, "rows": []}')   # a killed evaluation
    reproduce.finish(job, 5)
    assert calls[2:] == [("train.py", True), ("eval.py", False)]


def test_each_seed_has_its_own_clock_if_the_name_has_a_dot(tmp_path):
    files = {experiments.beside(tmp_path / f"λ_=_0.1-seed{seed}", "seconds") for seed in range(3)}
    assert len(files) == 3
    for _ in range(2):
        with pytest.raises(KeyError), experiments.clock(min(files)):   # a failed run counts, too
            raise KeyError
    assert len(min(files).read_text().split()) == 2


def report_of(tmp_path, seeds):
    """Makes a report on made-up results of two systems with `seeds` seeds each, the last run
    missing, and returns its text."""
    folder = tmp_path / "rare"
    (folder / "runs").mkdir(parents=True)
    (folder / "make.log").write_text("0.83 M parameters\n0 shots:  14.5% right,   0.0% worked out\n"
                                     "1 shot:  77.3% right, 100.0% worked out\n")
    (folder / "seconds").write_text("1.0\n")
    (folder / "pilot.json").write_text(
        json.dumps({"comparison": [{"verdict": "On tiny, they help."}]}))
    jobs = [reproduce.Job("rare", name, seed, "", folder / "runs" / f"{name}-seed{seed}")
            for seed in range(seeds) for name in ("GRPO", "ICPO")]
    for job in jobs[:-1]:
        job.folder.mkdir()
        (job.folder / "metrics.jsonl").write_text(json.dumps(
            {"step": 1, "eval_accuracy": 0.5 + job.seed / 10, "entropy": 1.0,
             "tokens_sampled": 2000 if job.name == "GRPO" else 5000}) + "\n")
        (job.folder / "longer.json").write_text(
            json.dumps({"rows": [{"accuracy": 0.1}, {"accuracy": 0.0}]}))
        experiments.beside(job.folder, "seconds").write_text("10.0\n")
    options = argparse.Namespace(seeds=seeds, steps=1, settings=["rare"], output_dir=tmp_path)
    reproduce.report(options, reproduce.SYSTEMS, {}, jobs, 12.0)
    return (tmp_path / "results.md").read_text()


@pytest.mark.parametrize("seeds, row, difference", [
    (2, "| GRPO | 55.0 | 55.0 | 10.0 | 0.0 | 62.37 |", "| ICPO | +0.0 | +0.0 | +0.0 | +0.0 |"),
    (6, "| GRPO | 75.0 (", "| ICPO | +0.0 (+0.0 to +0.0) | +0.0 (+0.0 to +0.0) |")])
def test_the_report_names_missing_runs_and_draws_the_others(tmp_path, seeds, row, difference):
    text = report_of(tmp_path, seeds)
    assert ("The model before training: 0 shots: 14.5% right, 0.0% worked out; "
            "1 shot: 77.3% right, 100.0% worked out.\n") in text
    assert row in text and difference in text and f"Not done: ICPO, seed {seeds - 1}." in text
    done = 2 * seeds - 1
    assert f"{done} runs, and the making of the model: {10 * done + 1} s" in text
    assert text.count("points above") == 1   # each pair once
    assert "| GRPO | 2 | 2 |\n| ICPO | 5 | " in text
    for name in ("curves", "systems", "tokens"):
        assert (tmp_path / f"rare-{name}.png").stat().st_size > 10_000


def test_pictures_and_results_name_the_systems_alike():
    """curves.py names runs by their method; the page has the systems and choices of the script."""
    methods = {options: name for name, options in reproduce.SYSTEMS.items()}
    labels = {f"--method {method}": name for method, name in curves.LABELS.items()}
    labels.pop("--method luffy-release")   # it is no system of the paper
    assert labels.items() <= methods.items()
    page = (reproduce.ROOT / "RESULTS.md").read_text(encoding="utf-8")
    for setting in reproduce.SETTINGS:
        part = page.partition(f"\n## {setting}\n")[2].partition("\n## ")[0]
        tables = [re.findall(r"^\| ([^|]+) \| \d.* \| ([^|]+) \|$", table, re.M)
                  for table in part.split("### The choices")]
        names = [name.split(" (")[0] for name, _ in tables[0]]
        assert names == [*reproduce.SYSTEMS, *reproduce.SPARING, *reproduce.SAME]
        assert [figure for _, figure in tables[0]] == [
            str(reproduce.PAPER.get(name, "–")) for name in names]
        assert [name for name, _ in tables[1]] == ["ICPO†", *reproduce.CHOICES]


def test_a_run_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="no-such-option"):
        experiments.run(["train.py", "--no-such-option", "1"], tmp_path / "log")


STOPPED = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from benchmarks.experiments import run, stoppable_pool

log = Path({log!r})

def two_processes():
    try:
        run(["-c", "print('first', flush=True); import time; time.sleep(60)"], log)
    except RuntimeError:   # It was terminated.
        run(["-c", "print('second')"], log)

with stoppable_pool(1) as pool:
    pool.submit(two_processes)
    while not log.is_file() or not log.read_text():
        time.sleep(0.01)
    raise {error}
"""


@pytest.mark.parametrize("error, words", [
    ("KeyboardInterrupt", "the same command resumes it"), ("KeyError('held-out')", "Traceback")])
def test_no_process_starts_after_the_script_is_stopped(tmp_path, error, words):
    log, root = tmp_path / "log", str(Path(__file__).resolve().parent.parent)
    script = STOPPED.format(root=root, log=str(log), error=error)
    stopped = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    assert stopped.returncode == 1 and words in stopped.stderr
    assert log.read_text() == "first\n"


def test_a_folder_is_locked_until_the_started_processes_have_ended(tmp_path):
    settings, folder = {"train": "--steps 1"}, tmp_path / "out"
    lock = experiments.claim(folder, settings)
    with pytest.raises(ValueError, match="in use"):
        experiments.claim(folder, settings)
    code = "import sys; sys.stdin.read()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, close_fds=False)
    lock.close()   # as a kill of the script does
    with pytest.raises(ValueError, match="in use"):
        experiments.claim(folder, settings)
    child.communicate()
    experiments.claim(folder, settings).close()
    with pytest.raises(ValueError, match="--steps 1.*, not with .*--steps 2"):
        experiments.claim(folder, {"train": "--steps 2"})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(ValueError, match="did not write"):
        experiments.claim(tmp_path / "other", settings)
