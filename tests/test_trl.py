"""examples/trl_icpo.py against TRL itself, the project's own model, and numbers worked out here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="pip install -r examples/requirements-trl.txt")
from trl import GRPOConfig, GRPOTrainer, chat_template_utils

import icpo
from examples import embedded
from examples.embedded import MODEL, build
from examples.trl_icpo import ICPOConfig, ICPOTrainer
from model_utils import load_model, pack, response_logprobs
from reward import score

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(per_device_train_batch_size=16, num_generations=4, max_steps=2, disable_tqdm=True)


@pytest.fixture
def make(tmp_path):
    def make(trainer=ICPOTrainer, config=ICPOConfig, **settings):
        return build(trainer, config, str(tmp_path), **SMALL | settings)
    return make


def batch_of(side, groups=4):
    """The batch that a trainer makes of the first problems, and its [D; q] as token ids."""
    rows = [row for row in side.train_dataset.select(range(groups)) for _ in range(4)]
    prompts, tokenize = [], side._tokenize_prompts
    side._tokenize_prompts = lambda given: prompts.append(found := tokenize(given)) or found
    side.model.train()
    side.state.max_steps = 4   # train() sets it
    batch = side._generate_and_score_completions(rows)
    # TRL makes the plain prompts first.
    return batch, rows, prompts[1][0]


def row_of(batch, i):
    """The prompt and the response of a row, without padding."""
    return [batch[f"{part}_ids"][i][batch[f"{part}_mask"][i].bool()].tolist()
            for part in ("prompt", "completion")]


def own_logprobs(model, prompts, responses):
    return response_logprobs(model, pack(prompts, responses, model.device))[0]


def test_off_is_exactly_the_grpo_of_trl(make):
    def trained(*kind, **settings):   # a trainer sets the seed when it is made
        side = make(*kind, **settings)
        side.train()
        assert side.state.global_step == 2
        return torch.cat([weights.detach().flatten() for weights in side.model.parameters()])

    theirs = trained(GRPOTrainer, GRPOConfig)
    assert torch.equal(trained(icpo=False), theirs)
    assert not torch.equal(trained(), theirs)


def test_experts_replace_one_row_of_their_group(make):
    side = make()
    batch, rows, demo_prompts = batch_of(side)
    off, model = batch["off_policy"], load_model(MODEL)[0]
    assert off.view(4, 4).sum(1).max() == 1 and off.any()
    texts = side.processing_class.batch_decode(
        [row_of(batch, i)[1] for i in range(16)], skip_special_tokens=True)
    rewards = torch.tensor(score(texts, [row["answer"] for row in rows]))
    group = torch.arange(16) // 4
    torch.testing.assert_close(batch["advantages"], icpo.group_advantages(rewards, group))
    assert batch["num_items_in_batch"] == batch["completion_mask"].sum()
    for i in off.nonzero()[:, 0].tolist():
        prompt, response = row_of(batch, i)
        neighbour = row_of(batch, i - 1 if i % 4 else i + 1)[0]
        assert rewards[i] == 1 and prompt == neighbour != demo_prompts[i // 4]
        for name, given in (("old_per_token_logps", demo_prompts[i // 4]),
                            ("ref_per_token_logps", prompt)):
            expected = own_logprobs(model, [given], [response])[0]
            torch.testing.assert_close(batch[name][i, :len(response)], expected, rtol=0, atol=1e-4)
    assert all(batch[name].shape == batch["completion_ids"].shape for name in (
        "completion_mask", "old_per_token_logps", "ref_per_token_logps"))


def test_the_demo_prompt_is_that_of_the_project(make):
    from data import PromptBuilder, load_problems
    from options import TINY
    side = make()
    _, rows, (first, *_) = batch_of(side)
    builder = PromptBuilder(side.processing_class)
    problem = next(p for p in load_problems(TINY / "train.jsonl") if p.id == rows[0]["id"])
    assert first in [builder.demo_prefixed(problem, [d])
                     for d in load_problems(TINY / "demonstrations.jsonl")]


def test_experts_below_delta_stay_out(make):
    batch, *_ = batch_of(make(errs_delta=2.0))
    assert not batch["off_policy"].any()
    assert batch["old_per_token_logps"].isnan().all()


def test_the_bonus_of_rs_enters_the_advantages(make):
    side = make(alpha=1.0, errs_delta=-1.0)   # every expert enters, so the groups are certain
    batch, rows, _ = batch_of(side)
    texts = side.processing_class.batch_decode(
        [row_of(batch, i)[1] for i in range(16)], skip_special_tokens=True)
    rewards = torch.tensor(score(texts, [row["answer"] for row in rows]))
    assert batch["off_policy"].sum() == 4
    shaped = rewards + batch["off_policy"]
    torch.testing.assert_close(batch["advantages"],
                               icpo.group_advantages(shaped, torch.arange(16) // 4))


def loss_and_gradient(side, compute, batch):
    side.model.zero_grad()
    loss = compute(side.model, batch)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in side.model.parameters()])


def test_without_experts_the_loss_is_that_of_trl(make):
    side = make(errs_delta=2.0)
    batch, *_ = batch_of(side)
    moved = torch.rand_like(batch["old_per_token_logps"]) - 0.5   # so that both clips bind
    with torch.no_grad():
        batch["old_per_token_logps"] = moved + own_logprobs(
            load_model(MODEL)[0], *zip(*(row_of(batch, i) for i in range(16))))
    side.current_gradient_accumulation_steps = 1
    ours = loss_and_gradient(side, side._compute_loss, batch)
    theirs = loss_and_gradient(side, super(ICPOTrainer, side)._compute_loss, batch)
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine, other)


def test_the_loss_of_a_mixed_batch_is_icpo_loss(make):
    side = make(shaping_lambda=0.1)
    batch, *_ = batch_of(side)
    side.current_gradient_accumulation_steps = 1
    loss, gradient = loss_and_gradient(side, side._compute_loss, batch)
    prompts, responses = zip(*(row_of(batch, i) for i in range(16)))
    model = load_model(MODEL)[0]
    logprobs = own_logprobs(model, prompts, responses)
    off, old = batch["off_policy"], batch["old_per_token_logps"]
    mask = batch["completion_mask"]
    expected, _ = icpo.icpo_loss(
        logprobs, torch.where(off[:, None], old, logprobs.detach()), batch["advantages"], mask,
        off, ref_logprobs=batch["ref_per_token_logps"], kl_coef=0.001, shaping_lambda=0.1)
    assert off.any()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=1e-5)
    expected.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    torch.testing.assert_close(gradient.norm(), norm, rtol=1e-3, atol=0)


@pytest.mark.parametrize("settings, message", [
    (dict(loss_type="grpo"), "loss_type='grpo' \\(give 'dapo'\\)"),
    (dict(delta=2.0), "delta=2.0"),
    (dict(use_bias_correction_kl=True), "use_bias_correction_kl=True"),
    (dict(use_vllm=True, vllm_mode="server"), "vllm_mode='server'.*correction=True"),
])
def test_refuses_what_it_does_not_compute(settings, message, tmp_path):
    base = dict(output_dir=str(tmp_path), bf16=False, beta=0.1, use_bias_correction_kl=False)
    with pytest.raises(ValueError, match=message):
        ICPOConfig(**base | settings)
    ICPOConfig(**base | settings, icpo=False)


def test_refuses_a_rollout_function(make):
    with pytest.raises(ValueError, match="does not work with rollout_func"):
        make(lambda *args, **named: ICPOTrainer(*args, **named, rollout_func=print))


def test_refuses_an_environment_without_tools(make, monkeypatch):
    class Environment:
        def reset(self, **_):
            pass

        def get_reward(self):
            return 1.0

    tokenizer = embedded.AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = chat_template_utils.qwen3_chat_template   # TRL wants one with tools
    monkeypatch.setattr(embedded.AutoTokenizer, "from_pretrained", lambda *_: tokenizer)
    with pytest.raises(ValueError, match="does not work with environment_factory"):
        make(lambda *args, **named: ICPOTrainer(*args, **named, environment_factory=Environment))


def test_experts_reach_the_reward_in_the_form_of_plain_responses(make, monkeypatch):
    side, seen = make(), []
    tokenizer = side._tokenizer
    tokenizer.response_template = chat_template_utils.deepseek_r1_distill_template
    tokens = tokenizer("5 + 2</think>\n\n\\boxed{7}")["input_ids"]
    monkeypatch.setattr(side, "_generate_single_turn",
                        lambda prompts, *_: ([tokens[:] for _ in prompts], None))
    rewards = side._calculate_rewards
    monkeypatch.setattr(side, "_calculate_rewards", lambda rows, prompts, texts, *rest: (
        seen.append(texts[0][0]["content"]) or rewards(rows, prompts, texts, *rest)))
    batch_of(side)
    assert seen == ["\\boxed{7}"] * 2


def test_groups_that_span_processes(tmp_path):
    """Two processes of six rows each hold three groups of four."""
    code = f"""
import json, sys, torch
sys.path[:0] = [{str(ROOT)!r}]
from examples.embedded import build
from examples.trl_icpo import ICPOConfig, ICPOTrainer
side = build(ICPOTrainer, ICPOConfig, {str(tmp_path)!r}, per_device_train_batch_size=6,
             num_generations=4, max_steps=1, disable_tqdm=True, use_cpu=True, errs_delta=-1.0)
make = side._generate_and_score_completions
def keep(inputs):
    batch = make(inputs)
    rank = side.accelerator.process_index
    json.dump({{"off": batch["off_policy"].tolist(), "A": batch["advantages"].tolist(),
               "id": [row["id"] for row in inputs], "items": batch["num_items_in_batch"].item(),
               "tokens": batch["completion_mask"].sum().item(),
               "rewards": side._rewards.tolist()}}, open(f"{tmp_path}/{{rank}}.json", "w"))
    return batch
side._generate_and_score_completions = keep
side.train()
assert side.state.global_step == 1
"""
    (tmp_path / "run.py").write_text(code)
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                    str(tmp_path / "run.py")], check=True, capture_output=True, timeout=300)
    parts = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    ids, off, advantages = (sum((part[key] for part in parts), []) for key in ("id", "off", "A"))
    groups = [range(start, start + 4) for start in (0, 4, 8)]
    assert all(len({ids[i] for i in group}) == 1 for group in groups)
    assert [sum(off[i] for i in group) for group in groups] == [1, 1, 1]
    for group in groups:
        assert abs(sum(advantages[i] for i in group)) < 1e-4
    assert parts[0]["items"] == parts[1]["items"] == sum(part["tokens"] for part in parts)


def test_the_command_reaches_90_percent_within_30_steps(tmp_path):
    run = subprocess.run([sys.executable, str(ROOT / "examples" / "trl_icpo.py")], cwd=tmp_path,
                         check=True, capture_output=True, text=True, timeout=1200)
    line = next(line for line in run.stdout.splitlines() if line.startswith("training reward"))
    assert "; 90 % at step " in line
    assert (tmp_path / "runs" / "trl" / "model.safetensors").is_file()
