"""Tests --report-to with the packages themselves, offline, as far as they are installed, and
--show-samples."""

import html
import json
import os
import signal
import struct
import subprocess
import sys
from collections import Counter

import pytest
import yaml
from processes import ROOT
from processes import run as run_script

import trackers
import train as trainer
from options import parse_training

SMALL = ["--batch-size", "4", "--n-on", "2", "--steps", "4", "--eval-every", "2", "--device", "cpu",
         "--eval-problems", "8", "--checkpoint-every", "2", "--kl-coef", "0"]


@pytest.fixture(autouse=True)
def alone(tmp_path_factory, monkeypatch):
    """No account, and no folder of the user. Returns these variables of the environment.

    trackio reads its folder when it is imported, so that is the same in all tests.
    """
    os.environ.setdefault("TRACKIO_DIR", str(tmp_path_factory.mktemp("trackio")))
    nothing = str(tmp_path_factory.mktemp("nothing") / "nothing")
    for name in ("NETRC", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, nothing)
    monkeypatch.setenv("WANDB_API_KEY", "")
    for name in ("WANDB_MODE", "WANDB_PROJECT", "TRACKIO_SPACE_ID", "TRACKIO_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    return {name: os.environ[name] for name in ("TRACKIO_DIR", "NETRC", "WANDB_CONFIG_DIR",
                                                "WANDB_CACHE_DIR", "WANDB_API_KEY")}


def train(folder, *more):
    trainer.train(trainer.prepare([*SMALL, "--output-dir", str(folder), *map(str, more)]))


def rows_of(folder, name="metrics"):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


# --------------------------------------------------------------------------------------------------
# What each tracker holds: {name of a metric: [(step, value), …]}, in the order of the file, the
# settings, the responses of each step, and the steps that have a picture.

def read_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugin_util import markdown_to_safe_html
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    text = {name: [(each.step, each.tensor_proto.string_val[0].decode())
                   for each in events.Tensors(f"{name}/text_summary")]
            for name in ("settings", "samples")}
    settings = json.loads(text["settings"][-1][1])
    samples = {}
    for step, table in text["samples"]:
        body = markdown_to_safe_html(table).partition("<tbody>")[2]
        cells = [[html.unescape(cell.partition("</td>")[0].strip().replace("<br>", "\n"))
                  for cell in row.split("<td>")[1:]] for row in body.split("<tr>")[1:]]
        samples[step] = [(row[0], row[2], float(row[5])) for row in cells]
    metrics = {name: [(each.step, each.value) for each in events.Scalars(name)]
               for name in events.Tags()["scalars"]}
    return metrics, settings, samples, [each.step for each in events.Images("curves")]


def records(file):
    """The records of a .wandb file, whose blocks are those of LevelDB's logs."""
    from wandb.proto import wandb_internal_pb2
    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4:at + 7])
        whole += data[at + 7:at + 7 + length]
        at += 7 + length
        if kind in (1, 4):   # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def read_wandb(folder):
    metrics, settings, samples, pictures = {}, {}, {}, []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb"))[-1:]:   # it has the whole run
        for record in records(file):
            settings |= {each.key: json.loads(each.value_json) for each in record.run.config.update}
            row = {"/".join(each.nested_key) or each.key: json.loads(each.value_json)
                   for each in record.history.item}
            step = row.get("_step")
            if row.get("samples/_type") == "table-file":
                table = json.loads((file.parent / "files" / row["samples/path"]).read_text())
                samples[step] = [(kind, response, reward)
                                 for kind, _, response, _, _, reward, *_ in table["data"]]
            if row.get("curves/_type") == "image-file":
                assert (file.parent / "files" / row["curves/path"]).is_file()
                pictures.append(step)
            for name, value in row.items():
                if "/" not in name and not name.startswith("_"):
                    metrics.setdefault(name, []).append((step, value))
    return metrics, settings, samples, pictures


def read_trackio(folder):
    from trackio.sqlite_storage import SQLiteStorage
    run = f"{folder.name}-{json.loads((folder / 'trackers.json').read_text())['id']}"
    assert SQLiteStorage.get_runs("icpo").count(run) == 1
    metrics, samples, pictures = {}, {}, []
    for row in SQLiteStorage.get_logs("icpo", run):
        step = row.pop("step")
        for name, value in row.items():
            if isinstance(value, dict) and value["_type"] == "trackio.table":
                samples[step] = [(each["kind"], each["response"], each["reward"])
                                 for each in value["_value"]]
            elif isinstance(value, dict) and value["_type"] == "trackio.image":
                pictures.append(step)
            elif name != "timestamp":
                metrics.setdefault(name, []).append((step, value))
    return metrics, SQLiteStorage.get_run_config("icpo", run), samples, pictures


READERS = {"tensorboard": read_tensorboard, "wandb": read_wandb, "trackio": read_trackio}


def check(name, folder, steps=4):
    metrics, settings, samples, pictures = READERS[name](folder)
    rows = rows_of(folder)
    expected = {}
    for row in rows:
        for key, value in row.items():
            if key.endswith("_before"):
                expected.setdefault(key.removesuffix("_before"), []).insert(0, (0, value))
            elif key != "step" and value is not None:
                expected.setdefault(key, []).append((row["step"], value))
    assert metrics.keys() == expected.keys()
    for key, values in expected.items():
        assert [step for step, _ in metrics[key]] == [step for step, _ in values], key
        assert [value for _, value in metrics[key]] == pytest.approx(
            [value for _, value in values], rel=1e-6), key   # TensorBoard keeps float32
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert {key: settings[key] for key in saved} == saved
    assert set(samples) == set(range(1, steps + 1))
    for step, found in samples.items():
        responses = [(["on-policy", "off-policy"][row["off_policy"]], row["response"].strip(),
                      row["reward"]) for row in rows_of(folder, "samples") if row["step"] == step]
        assert [(kind, text.strip(), reward) for kind, text, reward in found] == responses
        assert Counter(kind for kind, *_ in found) == {"on-policy": 2, "off-policy": 1}
    assert pictures == [steps]


@pytest.mark.parametrize("name", READERS)
def test_a_tracker_gets_all_of_a_run_and_goes_on_when_it_is_resumed(name, tmp_path, alone):
    """The second start makes step 3 again, as after a kill: its checkpoint is that of step 2."""
    pytest.importorskip(name)
    folder = tmp_path / "run"
    start = ["train.py", *SMALL, "--eval-every", "0", "--output-dir", folder]
    run_script(*start, "--steps", "3", "--report-to", name, environment=alone)
    check(name, folder, 3)
    (folder / "checkpoints" / "step-3").rename(tmp_path / "lost")
    first = json.loads((folder / "trackers.json").read_text())
    run_script(*start, "--resume", environment=alone)
    metrics, settings, samples, pictures = READERS[name](folder)
    assert [step for step, _ in metrics["reward_on"]] == [1, 2, 3, 4]
    assert [value for _, value in metrics["reward_on"]] == pytest.approx(
        [row["reward_on"] for row in rows_of(folder)])
    assert set(samples) == {1, 2, 3, 4} and settings["steps"] == 4
    assert pictures[-1] == 4
    assert json.loads((folder / "trackers.json").read_text()) == first | {name: 4}
    if name == "wandb":
        assert {file.name.rpartition("-")[2] for file in folder.glob("wandb/offline-run-*")} == {
            first["id"]}


def test_all_trackers_at_once_in_two_processes(tmp_path, alone):
    """Evaluations, too, that before the first step at step 0. Rank 0 alone reports."""
    names = [name for name in READERS if pytest.importorskip(name)]
    run_script("train.py", *SMALL, "--output-dir", tmp_path / "run", "--report-to", *names,
               processes=2, environment=alone)
    for name in names:
        check(name, tmp_path / "run")
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1


def test_a_signal_ends_the_reports_after_the_step(tmp_path):
    """wandb has a process of its own in the terminal's group, which gets Ctrl-C, too."""
    pytest.importorskip("wandb")
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "train.py", *SMALL, "--steps", "500", "--eval-every", "0", "--report-to",
         "wandb", "--output-dir", folder], cwd=ROOT, stderr=subprocess.PIPE, text=True,
        stdin=subprocess.DEVNULL, start_new_session=True)
    assert process.stderr
    for line in process.stderr:
        if line.startswith("step 2/"):
            os.killpg(process.pid, signal.SIGINT)
            break
    said = process.stderr.read()
    assert process.wait() == 0, said
    made = len(rows_of(folder))
    metrics, *_ = read_wandb(folder)
    assert [step for step, _ in metrics["reward_on"]] == list(range(1, made + 1))
    assert "has failed" not in said


# --------------------------------------------------------------------------------------------------
# Without the packages

class Fake:
    """A tracker that fails at step 2, and at all that follows."""
    steps = []

    def __init__(self, folder, settings, steps, identity, given):
        self.last = given
        self.steps.clear()

    def log(self, step, metrics, samples):
        if step == 2:
            raise ConnectionError("the network is down")
        self.steps.append(step)

    def picture(self, step, file):
        raise AssertionError("it has failed")

    close = picture


def test_a_tracker_that_fails_costs_one_warning(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(trackers.KINDS, "wandb", Fake)
    monkeypatch.setitem(trackers.IMPORTS, "wandb", "json")
    train(tmp_path / "run", "--report-to", "wandb")
    said = capsys.readouterr().err
    assert Fake.steps == [0, 1] and len(rows_of(tmp_path / "run")) == 4
    assert said.count("warning: wandb has failed") == 1
    assert said.count("ConnectionError: the network is down") == 1
    assert (tmp_path / "run" / "final").is_dir()


@pytest.mark.parametrize("name", READERS)
def test_a_missing_package_is_said_before_training(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, trackers.IMPORTS[name], None)
    with pytest.raises(ValueError, match=f"--report-to {name} needs the package {name} .*: "
                                         f"pip install {name}"):
        train(tmp_path / "run", "--report-to", name)
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_cannot_begin_is_named_and_the_run_goes_on_without(tmp_path, monkeypatch):
    def fail(folder, *arguments):
        (folder / "trackio").mkdir()
        raise OSError("no place")
    monkeypatch.setitem(trackers.KINDS, "trackio", fail)
    monkeypatch.setitem(trackers.IMPORTS, "trackio", "json")
    with pytest.raises(ValueError, match="--report-to trackio: OSError: no place"):
        train(tmp_path / "run", "--report-to", "trackio", "--steps", "1")
    train(tmp_path / "run", "--report-to", "none", "--steps", "1", "--resume")
    assert len(rows_of(tmp_path / "run")) == 1


def test_several_trackers_are_given_on_the_command_line_or_in_a_file(tmp_path, capsys):
    assert parse_training([]).report_to == ["none"]
    assert parse_training(["--report-to", "wandb", "trackio"]).report_to == ["wandb", "trackio"]
    file = tmp_path / "x.yaml"
    for text, names in (("report_to: [tensorboard, wandb]", ["tensorboard", "wandb"]),
                        ("report_to: trackio", ["trackio"])):
        file.write_text(text)
        assert parse_training([str(file)]).report_to == names
        assert parse_training([str(file), "--report-to", "none"]).report_to == ["none"]
    with pytest.raises(SystemExit):
        parse_training(["--report-to", "mlflow"])
    assert "invalid choice: 'mlflow'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--report-to none wandb: none stands alone"):
        train(tmp_path / "run", "--report-to", "none", "wandb")


def test_a_resumed_run_may_report_to_others(tmp_path, monkeypatch):
    monkeypatch.setitem(trackers.KINDS, "wandb", Fake)
    monkeypatch.setitem(trackers.IMPORTS, "wandb", "json")
    train(tmp_path / "run", "--steps", "2", "--eval-every", "0")
    assert not (tmp_path / "run" / "trackers.json").exists()
    monkeypatch.setattr(Fake, "log", lambda self, step, *_: self.steps.append(step))
    monkeypatch.setattr(Fake, "picture", lambda *_: None)
    monkeypatch.setattr(Fake, "close", lambda *_: None)
    train(tmp_path / "run", "--resume", "--eval-every", "0", "--report-to", "wandb",
          "--show-samples", "1")
    assert Fake.steps == [1, 2, 3, 4]   # those before, too


# --------------------------------------------------------------------------------------------------
# The terminal

def test_responses_are_shown_in_turn_and_each_step_has_a_line(tmp_path, capsys):
    train(tmp_path / "run", "--show-samples", "2", "--steps", "2", "--eval-every", "0")
    said = capsys.readouterr().err
    for step in (1, 2):
        rows = [row for row in rows_of(tmp_path / "run", "samples") if row["step"] == step]
        on, off = ([row for row in rows if row["off_policy"] == kind][0] for kind in (False, True))
        for kind, row in (("on-policy", on), ("off-policy", off)):
            assert (f"--- step {step}, {kind}, reward {row['reward']:g}, to: {row['problem']}\n"
                    f"{row['response']}\n") in said
        assert f"step {step}/2: reward " in said
    assert said.count("\n--- step ") + said.startswith("--- step ") == 4
