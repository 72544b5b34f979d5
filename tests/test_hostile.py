"""Bad input: what was given and what would be right is said, with status 2, and nothing is lost."""

import json
import os

import pytest
import torch
from processes import run as run_script
from transformers import AutoTokenizer

import train as trainer
from data import Problem, PromptBuilder
from options import TINY, EvaluationOptions
from runs import open_output


def mistake(arguments, capsys) -> str:
    """The message with which train.py ends before training."""
    with pytest.raises((ValueError, SystemExit)) as caught:
        trainer.prepare([str(argument) for argument in arguments])
    if caught.type is SystemExit:
        assert caught.value.code == 2
        return capsys.readouterr().err
    return str(caught.value)


@pytest.mark.parametrize("arguments, words", [
    (["--learning-rate", "inf"], "--learning-rate must be a finite number, not inf"),
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
    ("- steps\n", "lines of the form 'option: value' were expected"),
    ("beta: 0.1\n", "did you mean kl_coef?"),
])
def test_configuration_files_that_cannot_be_right(tmp_path, capsys, text, words):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    said = mistake([file, "--output-dir", tmp_path / "run"], capsys)
    assert words in said and str(file) in said


@pytest.mark.parametrize("template, words", [
    ("{{ 'Hello' }}", "leaves out the question"),
    ("{% for message in messages %}", "chat template fails"),
    ("{{ raise_exception('only with tools') }}", "chat template fails (only with tools)"),
])
def test_chat_templates_that_cannot_be_used(template, words):
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    tokenizer.chat_template = template
    with pytest.raises(ValueError) as caught:
        PromptBuilder(tokenizer)
    assert words in str(caught.value)
    assert PromptBuilder(tokenizer, "", False, False).plain(Problem("1+1", "2"))


def test_an_evaluation_replaces_no_file_that_it_did_not_write(tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("precious")
    (tmp_path / "link.jsonl").symlink_to(kept)
    (tmp_path / "drawing.png").write_text("precious")
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name, words in (("link.jsonl", "no plain file"), ("pipe.jsonl", "no plain file"),
                        ("drawing.jsonl", "the picture's file, is there")):
        options = EvaluationOptions(output=str(tmp_path / name))
        with pytest.raises(ValueError, match=words):
            open_output(tmp_path / name, options, [])
    assert kept.read_text() == (tmp_path / "drawing.png").read_text() == "precious"
    assert (tmp_path / "link.jsonl").is_symlink() and (tmp_path / "pipe.jsonl").is_fifo()


def test_an_evaluation_that_runs_is_not_started_again(tmp_path):
    output = tmp_path / "samples.jsonl"
    open_output(output, EvaluationOptions(output=str(output)), [])
    again = run_script("eval.py", "--limit", "2", "--output", output, check=False)
    assert again.returncode == 2
    assert "is in use: another evaluation is writing there now" in again.stderr


def test_a_run_is_resumed_with_its_own_settings_and_data_only(tmp_path):
    data, folder = tmp_path / "data.jsonl", tmp_path / "run"
    data.write_text((TINY / "train.jsonl").read_text())
    start = ["--batch-size", "4", "--n-on", "4", "--eval-every", "0", "--checkpoint-every", "1",
             "--output-dir", str(folder)]
    trainer.train(trainer.prepare([*start, "--steps", "1", "--train-data", str(data)]))
    metrics, config = (folder / "metrics.jsonl").read_bytes(), folder / "config.yaml"
    resume = ["--resume", "--steps", "2", "--output-dir", str(folder)]

    text = config.read_text()
    config.write_text(text.replace("clip_high: 0.2", "clip_high: 0.3"))
    with pytest.raises(ValueError, match="config.yaml was edited: clip_high was 0.2, not 0.3"):
        trainer.prepare(resume)
    config.write_text(text)
    data.write_text(data.read_text().replace("+", "-", 1))
    with pytest.raises(ValueError, match=r"data.jsonl \(--train-data\) is not the file with which"):
        trainer.prepare(resume)
    assert (folder / "metrics.jsonl").read_bytes() == metrics
    data.write_text((TINY / "train.jsonl").read_text())
    assert trainer.prepare(resume).start == 1


def test_a_run_that_changed_nothing_says_so(tmp_path, capsys, monkeypatch):
    run = trainer.prepare(["--batch-size", "4", "--n-on", "4", "--steps", "1", "--eval-every", "0",
                           "--max-skipped", "5", "--output-dir", str(tmp_path / "run")])
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
