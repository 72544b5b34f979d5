"""Bad input: what was given and what would be right is said, with status 2, and nothing is lost."""

import functools
import gzip
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import Script
from processes import run as run_script
from safetensors import SafetensorError
from transformers import AutoTokenizer

import templates
import train as trainer
from data import Problem, PromptBuilder
from model_utils import load_model
from options import TINY, EvaluationOptions, TrainingOptions, begin_imports
from runs import (
    _Output,
    check_output,
    claim_folder,
    default_output,
    give_back,
    how_to_go_on,
    messages_on_exit,
    open_output,
)
from verify import run_bounded

SHORT = ["--batch-size", "4", "--n-on", "4", "--eval-every", "0", "--steps", "1",
         "--checkpoint-every", "1", "--device", "cpu"]


def mistake(arguments, capsys) -> str:
    """The message with which train.py ends before training."""
    with pytest.raises((ValueError, SystemExit)) as caught:
        trainer.prepare([*map(str, arguments), "--device", "cpu"])
    if caught.type is SystemExit:
        assert caught.value.code == 2
        return capsys.readouterr().err
    return str(caught.value)


@pytest.mark.parametrize("arguments, words", [
    (["--learning-rate", "inf"], "--learning-rate must be a finite number, not inf"),
    (["--instruction", "L\udcf6se {problem}"], "holds what is no text in utf-8"),
    (["--delta", "nan"], "--delta must be a finite number, not nan"),
    (["--verify-timeout", "nan"], "--verify-timeout must be a finite number, not nan"),
    (["--advantage-eps", "-1"], "--advantage-eps must be at least 0, not -1"),
    (["--log-ratio-clamp", "-3"], "--log-ratio-clamp must be at least 0, not -3"),
    (["--temperature", "inf"], "--temperature must be a finite number, not inf"),
    (["--top-p", "0"], "--top-p must be above 0 and at most 1, not 0"),
    (["--n-on", "1"], "a group of one response has no advantage"),
    (["--num-generations", "8"], "did you mean --n-on?"),
    (["--max-completion-length", "8"], "did you mean --max-new-tokens?"),
    (["--beta", "0.1"], "did you mean --kl-coef?"),
    (["--num-train-epochs", "1"], "did you mean --steps?"),
    (["--val-data", "x.jsonl"], "did you mean --test-data?"),
    (["--steps", "3", "mine.yaml"], "a configuration file comes first: train.py mine.yaml"),
    (["--config", "mine.yaml"], "a configuration file comes first: train.py mine.yaml"),
    (["--n-on", "1000000000"], "are 16,000,000,016 responses at the same time"),
    (["--n-on", "4", "--eval-samples", "1000000000"], "--eval-samples 1000000000 are"),
    (["--method", "luffy", "--max-new-tokens", "5"], "over 5 tokens; raise --max-new-tokens"),
    (["--train-data", TINY / "test.jsonl", "--columns", "question=problem"],
     "--columns question=problem: the names before = are problem, answer"),
    (["--train-data", TINY / "test.jsonl"], "held-out ones too; give other --train-data or"),
])
def test_options_that_cannot_be_right(tmp_path, capsys, arguments, words):
    assert words in mistake([*arguments, "--output-dir", tmp_path / "run"], capsys)
    assert not (tmp_path / "run").exists()


def a_file(path):
    path.write_text("precious")
    return path


def below_a_file(path):
    return a_file(path) / "run"


def a_loop_of_links(path):
    path.symlink_to(path)
    return path


def too_long(path):
    return path / ("x" * 300)


@pytest.mark.parametrize("make", [a_file, below_a_file, a_loop_of_links, too_long])
def test_folders_that_cannot_hold_a_run(tmp_path, capsys, make):
    folder = make(tmp_path / "run")
    before = sorted(tmp_path.iterdir())
    said = mistake(["--output-dir", folder], capsys)
    assert f"{folder} cannot be the folder of a run" in said and "another --output-dir" in said
    assert sorted(tmp_path.iterdir()) == before
    assert not (tmp_path / "run").is_file() or (tmp_path / "run").read_text() == "precious"


@pytest.mark.parametrize("text, words", [
    ("steps: 3\nsteps: 4\n", "'steps' stands there twice"),
    ("steps:\t3\n\tseed: 1\n", "is not valid YAML"),
    ("steps: [3\n", "is not valid YAML"),
    ("seed: !!python/object/apply:os.system ['true']\n", "is not valid YAML"),
    ("7: 3\n", "unknown option"),
    ("steps: \xff\xfe3\n", "is not valid YAML"),
    ("- steps\n", "lines of the form 'option: value' were expected"),
    ("beta: 0.1\n", "did you mean kl_coef?"),
    ("train_data: [a.jsonl, b.jsonl]\n", "train_data must be one value, not ['a.jsonl', 'b.jso"),
    ("test_data: [a.jsonl, null]\n", "test_data must be a value or a list of values, not"),
    ("test_data: {a: b}\n", "test_data must be a value or a list of values, not {'a': 'b'}"),
    ("test_data: []\n", "test_data must be a value or a list of values, not []"),
])
def test_configuration_files_that_cannot_be_right(tmp_path, capsys, text, words):
    file = tmp_path / "bad.yaml"
    file.write_bytes(text.encode("latin-1"))
    said = mistake([file, "--output-dir", tmp_path / "run"], capsys)
    assert words in said and str(file) in said


LINE = b'{"problem": "1+1", "answer": "2"}'


@pytest.mark.parametrize("name, data, words", [
    ("data.json", b"[" + LINE, "data.json: not valid JSON"),
    ("data.csv", b"problem,answer\n1+1,\xff\n", "data.csv is no table of UTF-8 text"),
    ("data.csv", b"question\n1+1\n", "row 1: field 'answer' must be text"),
    ("data.jsonl.gz", gzip.compress(LINE, mtime=0), "data.jsonl.gz is compressed"),
    ("openai/gsm8k", None, "no data file at"),
])
def test_data_files_that_cannot_be_read(tmp_path, capsys, name, data, words):
    if data:
        (tmp_path / name).write_bytes(data)
    said = mistake(["--train-data", tmp_path / name, "--output-dir", tmp_path / "run"], capsys)
    assert words in said


@pytest.mark.parametrize("name, data", [("data.parquet", b"PAR1..."), ("empty", None)])
def test_what_the_library_datasets_cannot_read(tmp_path, capsys, name, data):
    pytest.importorskip("datasets")
    file = tmp_path / name
    file.write_bytes(data) if data else file.mkdir()
    said = mistake(["--train-data", file, "--output-dir", tmp_path / "run"], capsys)
    assert f"{file} could not be read" in said


def copy_of_tiny(folder, **files):
    shutil.copytree(TINY / "model", folder)
    for name, text in files.items():
        (folder / f"{name}.json").write_text(text)
    return folder


@pytest.mark.parametrize("name", ["config", "generation_config", "model.safetensors.index",
                                  "tokenizer", "tokenizer_config"])
@pytest.mark.parametrize("text", ["{", "[]"])
def test_model_folders_with_files_that_do_not_parse(tmp_path, name, text):
    folder = copy_of_tiny(tmp_path / "model", **{name: text})
    if "index" in name:   # it is read where the weights are in several files
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    with pytest.raises(ValueError, match=f"{name}.json is damaged"):
        load_model(folder)


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "config.yaml",
                                  "fingerprint.json"])
def test_runs_with_files_that_do_not_parse(tmp_path, capsys, name):
    arguments = [*SHORT, "--output-dir", str(tmp_path / "run")]
    trainer.train(trainer.prepare(arguments))
    (tmp_path / "run" / name).write_text("{\n")
    said = mistake([*arguments, "--resume"], capsys)
    assert f"{tmp_path / 'run' / name}" in said and "is damaged" in said


def test_a_tokenizer_larger_than_the_vocabulary(tmp_path, capsys):
    folder = copy_of_tiny(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["What"])
    tokenizer.save_pretrained(folder)
    arguments = ["--model", folder, "--device", "cpu", "--output-dir", tmp_path / "run"]
    assert trainer.prepare([*map(str, arguments), "--instruction", ""])   # it is not used
    said = mistake([*arguments[:2], "--instruction", "What"], capsys)
    assert "the tokenizer makes the token 'What', 106, but the model's vocabulary has 106" in said


def test_an_end_of_text_token_beyond_the_vocabulary(tmp_path, capsys):
    folder = copy_of_tiny(tmp_path / "model")
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"eos_token": "<new>"})
    tokenizer.save_pretrained(folder)
    said = mistake(["--model", folder, "--output-dir", tmp_path / "run"], capsys)
    assert "has 107 tokens and the model 106; the end-of-text token, 106, is beyond them" in said


@pytest.mark.parametrize("template, words", [
    ("{{ 'Hello' }}", "leaves out the question"),
    ("{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
     "it takes more than 1 seconds"),
    ("{{ 'x' * 20000000000 }}", "it takes more than 1 GiB"),
    ("{% for message in messages %}", "chat template fails"),
    ("{{ messages[-1].content }}", "leaves out a turn"),
    ("{{ raise_exception('only with tools') }}", "chat template fails (only with tools)"),
])
def test_chat_templates_that_cannot_be_used(monkeypatch, template, words):
    monkeypatch.setattr(templates, "run_bounded", functools.partial(run_bounded, seconds=1))
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    tokenizer.chat_template = template
    with pytest.raises(ValueError) as caught:
        PromptBuilder(tokenizer, demo_format="turns")
    assert words in str(caught.value)
    assert PromptBuilder(tokenizer, "", False, "text").plain(Problem("1+1", "2"))


def test_a_chat_template_without_a_system_turn_has_no_use_for_system():
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    tokenizer.chat_template = ("{% for message in messages if message.role != 'system' %}"
                               "{{ message.content }}{% endfor %}")
    assert PromptBuilder(tokenizer).plain(Problem("1+1", "2"))
    with pytest.raises(ValueError, match="the text of --system; leave that option out"):
        PromptBuilder(tokenizer, system="Be brief.")


def test_an_evaluation_replaces_no_file_that_it_did_not_write(tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("precious")
    (tmp_path / "link.jsonl").symlink_to(kept)
    (tmp_path / "drawing.png").write_text("precious")
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name, words in (("link.jsonl", "no plain file"), ("pipe.jsonl", "no plain file"),
                        ("drawing.jsonl", "the picture's file, is there")):
        with pytest.raises(ValueError, match=words):
            check_output(tmp_path / name)
    assert kept.read_text() == (tmp_path / "drawing.png").read_text() == "precious"
    assert (tmp_path / "link.jsonl").is_symlink() and (tmp_path / "pipe.jsonl").is_fifo()


def test_an_evaluation_that_runs_is_not_started_again(tmp_path):
    output = tmp_path / "samples.jsonl"
    open_output(output, EvaluationOptions(output=str(output)), [])
    again = run_script("eval.py", "--limit", "2", "--output", output, "--device", "cpu",
                       check=False)
    assert again.returncode == 2
    assert "is in use: another evaluation is writing there now" in again.stderr


def test_a_run_is_resumed_with_its_own_settings_and_data_only(tmp_path):
    data, folder = tmp_path / "data.jsonl", tmp_path / "run"
    data.write_text((TINY / "train.jsonl").read_text())
    start = ["--batch-size", "4", "--n-on", "4", "--eval-every", "0", "--checkpoint-every", "1",
             "--device", "cpu", "--output-dir", str(folder)]
    trainer.train(trainer.prepare([*start, "--steps", "1", "--train-data", str(data)]))
    metrics, config = (folder / "metrics.jsonl").read_bytes(), folder / "config.yaml"
    resume = ["--resume", "--steps", "2", "--device", "cpu", "--output-dir", str(folder)]

    text = config.read_text()
    config.write_text(text.replace("clip_high: 0.2", "clip_high: 0.3"))
    with pytest.raises(ValueError, match="was run with clip_high: 0.2, not 0.3; leave the option"):
        trainer.prepare(resume)
    config.write_text(text)
    data.write_text(data.read_text().replace("+", "-", 1))
    with pytest.raises(ValueError, match=r"data.jsonl \(--train-data\) is not the data with which"):
        trainer.prepare(resume)
    assert (folder / "metrics.jsonl").read_bytes() == metrics
    data.write_text((TINY / "train.jsonl").read_text())
    assert trainer.prepare(resume).start == 1


def test_two_starts_at_once_take_two_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = TrainingOptions()
    claims = [claim_folder(options) for _ in range(2)]
    assert [str(claim.folder) for claim in claims] == ["runs/icpo-seed0", "runs/icpo-seed0-2"]
    with pytest.raises(ValueError, match="another process is training there now"):
        claim_folder(TrainingOptions(output_dir="runs/icpo-seed0"))
    (claims[0].folder / "config.yaml").write_text("steps: 3\n")
    claims.append(claim_folder(options))
    assert str(claims[-1].folder) == "runs/icpo-seed0-3"
    (claims[0].folder / "config.yaml").unlink()
    for claim in reversed(claims):
        give_back(claim)
    assert not (tmp_path / "runs").exists()


def test_a_run_is_resumed_from_any_folder(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    shutil.copy(TINY / "train.jsonl", "mine.jsonl")
    copy_of_tiny(tmp_path / "model")
    Path("own.py").write_text("def mine(responses, problems):\n    return [0] * len(responses)\n")
    trainer.train(trainer.prepare([
        *SHORT, "--train-data", "mine.jsonl", "--model", "model", "--reward", "own.py:mine",
        "--output-dir", "run"]))
    monkeypatch.chdir("elsewhere")
    assert trainer.prepare(["--resume", "--device", "cpu", "--output-dir",
                            str(tmp_path / "run")]).start == 1


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_mistake_is_said_once_for_all_processes(tmp_path, capsys, monkeypatch, rank):
    """torchrun ends the others when rank 0 has ended, and prints what stands in the error file."""
    message = "train.py: error: unknown option --stepz; did you mean --steps?"
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit, match="2"):
        trainer.prepare(["--stepz", "3"])
    assert capsys.readouterr().err == message + "\n" and slept == [8] * (rank == "1")
    found = json.loads((tmp_path / "error.json").read_text())["message"]
    assert found["message"] == found["extraInfo"]["py_callstack"] == message


def test_output_without_a_reader_is_dropped():
    reading, writing = os.pipe()
    stream = os.fdopen(writing, "w")
    os.close(reading)
    output = _Output(stream)
    assert output.write("one\n") == 4
    print("two", file=output, flush=True)
    stream.close()


def test_output_to_a_closed_terminal_or_to_nothing_is_dropped():
    terminal, process = os.openpty()
    stream = os.fdopen(process, "w")
    os.close(terminal)
    for output in (_Output(stream), _Output(None)):
        assert output.write("one\n") == 4
        print("two", file=output, flush=True)
    stream.close()


@pytest.mark.parametrize("nodes, processes, expected", [
    (1, 1, "torchrun "), (1, 8, "torchrun --nproc-per-node 8 "), (2, 2, "torchrun --nnodes 2 ... "),
    (2, 16, "torchrun --nnodes 2 ... --nproc-per-node 8 ")])
def test_the_command_that_goes_on_suits_a_shell_and_the_nodes(tmp_path, monkeypatch, nodes,
                                                              processes, expected):
    monkeypatch.setenv("GROUP_WORLD_SIZE", str(nodes))
    monkeypatch.setattr("runs.world_size", lambda: processes)
    command = how_to_go_on(tmp_path / "my run")
    assert command.startswith(f"{expected}train.py --resume --output-dir ")
    assert shlex.split(command)[-1] == str(tmp_path / "my run")


def test_files_are_utf_8_whatever_the_locale(tmp_path):
    """Python warns where the encoding of the locale would count."""
    (tmp_path / "c.yaml").write_text("instruction: Löse {problem}\n", encoding="utf-8")
    script = """if 1:
        import sys, options, files
        from pathlib import Path
        o = options.parse_training(["c.yaml"])
        files.replace_file(Path("out.yaml"), f"instruction: {o.instruction}")
        assert files.read_settings(Path("out.yaml"))["instruction"] == "L\\xf6se {problem}"
    """
    latin = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
                          "PYTHONPATH": str(TINY.parent)}
    subprocess.run([sys.executable, "-X", "warn_default_encoding", "-W", "error::EncodingWarning",
                    "-c", script], cwd=tmp_path, env=latin, check=True)


def test_windows_is_told_what_to_use(monkeypatch):
    monkeypatch.setattr(os, "name", "nt")
    with pytest.raises(SystemExit, match="WSL"):
        begin_imports()


def test_a_signal_in_the_first_evaluation_stops_there(tmp_path):
    folder = tmp_path / "run"
    script = Script("train.py", "--eval-samples", 200, "--device", "cpu", "--output-dir", folder)
    script.wait_until((folder / "config.yaml").is_file)
    time.sleep(1)
    script.signal(signal.SIGTERM)
    ended = script.finish()
    assert ended.returncode == 0
    assert ("SIGTERM: stopped before the first step; start with: torchrun train.py --resume"
            in ended.stderr)
    assert not (folder / "metrics.jsonl").read_text()


@pytest.mark.parametrize("error, words", [
    (OSError(28, "No space left on device"), "the disk is full"),
    (SafetensorError("I/O error: No space left on device (os error 28)"), "the disk is full"),
    (OSError(30, "Read-only file system"), "Read-only file system"),
])
def test_a_disk_that_is_full_is_said_to_be_full(tmp_path, capsys, monkeypatch, error, words):
    def leave(status):
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit, match="1"), messages_on_exit(tmp_path):
        raise error
    said = capsys.readouterr().err
    assert f"{tmp_path} could not be written ({words}); " in said.replace("[Errno 30] ", "")
    assert "GB are free there" in said and "--resume" in said


@pytest.mark.parametrize("model, output", [
    ("run", "run/eval.jsonl"), ("run/final", "run/eval.jsonl"),
    ("run/checkpoints/step-3", "run/eval.jsonl"), ("tiny", "evals/tiny.jsonl"),
    ("Qwen/Qwen3-1.7B", "evals/Qwen3-1.7B.jsonl"),
])
def test_an_evaluation_is_written_into_the_run_or_into_evals(tmp_path, monkeypatch, model, output):
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("run/config.yaml").write_text("method: icpo\n")
    assert default_output(model) == Path(output)


def test_a_run_that_changed_nothing_says_so(tmp_path, capsys, monkeypatch):
    run = trainer.prepare(["--batch-size", "4", "--n-on", "4", "--steps", "1", "--eval-every", "0",
                           "--max-skipped", "5", "--device", "cpu", "--output-dir",
                           str(tmp_path / "run")])
    monkeypatch.setattr(trainer.icpo, "icpo_loss", spoiled(trainer.icpo.icpo_loss))
    trainer.train(run)
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert row["skipped_updates"] == 1
    assert "no step changed the model" in capsys.readouterr().out


def spoiled(loss):
    def not_finite(*arguments, **settings):
        value, metrics = loss(*arguments, **settings)
        return value * torch.nan, metrics
    return not_finite
