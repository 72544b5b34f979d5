"""Tests that transformers and the hub's library read what a finished run leaves in final/."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
import transformers
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import train as trainer
from model_card import write_card
from options import INSTRUCTION, TrainingOptions
from prepare import load_any_model
from rollout import generate

SMALL = ["--batch-size", "4", "--n-on", "2", "--steps", "3", "--eval-every", "2", "--device", "cpu",
         "--eval-problems", "8", "--kl-coef", "0"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "mine"
    more = ["--output-dir", str(folder), "--template-args", "thinking=false"]
    run = trainer.prepare([*SMALL, *more])
    trainer.train(run)
    return run


def test_transformers_samples_with_the_settings_and_the_template(run):
    final, question = run.folder / "final", run.problems[0]
    ours, tokenizer = load_any_model(str(final), "cpu", torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(final)
    # The generation settings are those of the model that was trained.
    assert theirs.generation_config.max_new_tokens == 48
    assert theirs.generation_config.eos_token_id is not None
    assert AutoTokenizer.from_pretrained(final).chat_template == run.builder.tokenizer.chat_template

    turn = [{"role": "user", "content": f"{question.problem} {INSTRUCTION}"}]
    prompt = run.builder.plain(question)
    inputs = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True,
                                           return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == prompt
    completion, = generate(ours, [prompt], temperature=0, max_new_tokens=48,
                           stop_ids=ours.stop_ids)
    assert completion.finished
    output = theirs.generate(**inputs, do_sample=False)[0, len(prompt):].tolist()
    assert output == completion.tokens
    generator = pipeline("text-generation", str(final))
    answer = generator(turn, do_sample=False)[0]["generated_text"][-1]
    assert answer["role"] == "assistant"
    assert answer["content"] == tokenizer.decode(completion.tokens, skip_special_tokens=True)


def test_the_model_card_says_how_the_model_was_made(run):
    final = run.folder / "final"
    card = ModelCard.load(final / "README.md")
    assert card.data.library_name == "transformers" and "icpo" in card.data.tags
    assert card.data.pipeline_tag == "text-generation"
    assert "max_new_tokens=48, tokenizer_encode_kwargs={'thinking': False})[0]" in card.text
    assert card.data.base_model is None   # tiny is a folder, and no name on the hub
    assert (final / "curves.png").read_bytes() == (run.folder / "curves.png").read_bytes()
    assert "](curves.png)" in card.text
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    last = rows[-1]
    assert last["eval_low"] <= last["eval_accuracy"] < last["eval_high"]
    for name, row, ending in (("before training", rows[0], "_before"), ("after step 3", last, "")):
        mean, low, high = (row[f"eval_{each}{ending}"] for each in ("accuracy", "low", "high"))
        assert f"| {name} | `tiny` | {mean:.1%} | {low:.1%} to {high:.1%} |" in card.text
    assert f"training: {len(run.problems)} problems of `tiny`" in card.text
    assert "held out: 8 problems of `tiny`" in card.text
    assert f"torch {torch.__version__}, transformers {transformers.__version__}" in card.text
    assert "arXiv:2510.26519" in card.text.partition("```bibtex")[2]
    block, = re.findall(r"```yaml\n(.*?)```", card.text, re.S)
    settings = yaml.safe_load(block)
    assert settings["steps"] == 3 and settings["method"] == "icpo"


def test_the_code_in_the_model_card_runs(run):
    card = (run.folder / "final" / "README.md").read_text()
    code, = re.findall(r"```python\n(.*?)```", card, re.S)
    code = code.replace("PATH_OR_NAME_OF_THIS_MODEL", str(run.folder / "final"))
    *lines, call = code.strip().splitlines()
    names = {}
    exec("\n".join(lines), names)
    answer = eval(call, names)["generated_text"]
    assert [turn["role"] for turn in answer] == ["user", "assistant"]
    assert answer[0]["content"] == f"What is 1+1? {INSTRUCTION}"


def test_the_card_of_a_model_from_the_hub_names_it_and_no_folder_of_the_user(tmp_path):
    (tmp_path / "run" / "final").mkdir(parents=True)
    (tmp_path / "run" / "curves.png").write_bytes(b"")
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    o = TrainingOptions(model="Qwen/Qwen3-1.7B", train_data=str(tmp_path / "train.jsonl"),
                        test_data=[str(tmp_path / "a.jsonl"), "amc23"], method="grpo",
                        chat_template=False)
    run = SimpleNamespace(options=o, folder=tmp_path / "run", problems=[1, 2],
                          held_out={"a": [1], "amc23": [1, 2]}, demonstrations=None)
    write_card(run)
    card = ModelCard.load(tmp_path / "run" / "final" / "README.md")
    assert card.data.base_model == "Qwen/Qwen3-1.7B"
    assert "GRPO" in card.text and "made no evaluation" in card.text
    assert "2 problems of `train.jsonl`" in card.text and str(tmp_path) not in str(card)
    # With several held-out data sets, each has rows of its own.
    row = {"step": 1, "eval_accuracy_before": 0.5, "eval_accuracy": 0.75} | {
        f"eval_{name}{ending}/{data}": value for ending in ("_before", "") for data in run.held_out
        for name, value in (("accuracy", 0.5), ("low", 0.25), ("high", 0.75))}
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    write_card(run)
    card = ModelCard.load(tmp_path / "run" / "final" / "README.md")
    for when in ("before training", "after step 1"):
        for data in run.held_out:
            assert f"| {when} | `{data}` | 50.0% | 25.0% to 75.0% |" in card.text
