"""examples/verl_icpo.py against verl's own GRPO, icpo_loss, and what verl hands on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("verl", reason="pip install -r examples/requirements-verl.txt")
import numpy as np
from tensordict import TensorDict
from verl import DataProto
from verl.trainer.ppo.core_algos import (
    compute_grpo_outcome_advantage,
    compute_policy_loss_vanilla,
    get_adv_estimator_fn,
    get_policy_loss_fn,
)
from verl.trainer.ppo.ray_trainer import compute_advantage
from verl.workers.config import FSDPActorConfig
from verl.workers.utils import losses

import icpo
from examples.verl_icpo import icpo_advantages, icpo_policy_loss

ROOT = Path(__file__).resolve().parent.parent
LENGTHS = [5, 2, 3, 1, 4, 5, 2, 3]
MASK = (torch.arange(5) < torch.tensor(LENGTHS)[:, None]).long()
UIDS = np.array(["b"] * 4 + ["a"] * 4, dtype=object)


def actor(**settings):
    return FSDPActorConfig(strategy="fsdp", rollout_n=4, ppo_micro_batch_size_per_gpu=1,
                           use_dynamic_bsz=True, **settings)


def token_rewards(rewards):
    found = torch.zeros(len(rewards), 5)
    found[torch.arange(len(rewards)), torch.tensor(LENGTHS) - 1] = torch.tensor(rewards)
    return found


def tensors(seed=0):
    """old_log_prob, log_prob (with gradient) and advantages, in verl's layout."""
    torch.manual_seed(seed)
    old = -2 * torch.rand(8, 5)
    return old, (old + torch.randn(8, 5)).requires_grad_(), torch.randn(8, 1) * MASK


def test_advantages_are_those_of_grpo_without_off_policy_rows():
    rewards = token_rewards([1.0, 0.0, 0.5, 0.0, 1.0, 1.0, 1.0, 1.0])
    expected, _ = compute_grpo_outcome_advantage(rewards, MASK, UIDS)
    advantages, returns = icpo_advantages(rewards, MASK.clone(), UIDS)
    torch.testing.assert_close(advantages, expected)
    assert torch.equal(advantages, returns) and advantages.any()


def test_settings_of_verl_hold_for_advantages():
    rewards, config = token_rewards([1.0, 0.0, 0.5, 0.0] * 2), {"norm_adv_by_std_in_grpo": False}
    expected, _ = compute_grpo_outcome_advantage(rewards, MASK, UIDS, **config)
    torch.testing.assert_close(icpo_advantages(rewards, MASK.clone(), UIDS, config=config)[0],
                               expected)
    with pytest.raises(ValueError, match="use_kl_in_reward"):
        icpo_advantages(rewards, MASK, UIDS, config={"use_kl_in_reward": True})


@pytest.mark.parametrize("settings", [
    {}, dict(clip_ratio_low=0.1, clip_ratio_high=0.3), dict(clip_ratio=0.3, clip_ratio_c=1.5)])
@pytest.mark.parametrize("info", [
    {}, dict(dp_size=2, batch_num_tokens=70, global_batch_size=16, loss_scale_factor=None)])
def test_the_loss_is_that_of_grpo_without_off_policy_rows(settings, info):
    config, found = actor(**settings), []
    config.global_batch_info.update(info)
    for function in (icpo_policy_loss, compute_policy_loss_vanilla):
        old, new, advantages = tensors()
        loss, _ = function(old, new, advantages, MASK.bool(), "token-mean", config)
        loss.backward()
        found.append((loss.detach(), new.grad))
    torch.testing.assert_close(found[0], found[1])
    assert found[0][1].any()


def test_the_loss_of_a_mixed_batch_is_icpo_loss():
    old, new, advantages = tensors()
    off = torch.tensor([False, True] * 4)
    loss, metrics = icpo_policy_loss(old, new, advantages, MASK.bool(), "token-mean", actor(),
                                     off[:, None] * MASK.float())
    expected, _ = icpo.icpo_loss(old_logprobs=old, logprobs=new, advantages=advantages[:, 0],
                                 mask=MASK.float(), off_policy=off, dual_clip=3.0)
    torch.testing.assert_close(loss, expected)
    assert metrics["actor/icpo_off_policy_share"] == pytest.approx(11 / 25)
    plain, _ = icpo_policy_loss(old, new, advantages, MASK.bool(), "token-mean", actor())
    assert not torch.allclose(loss, plain)


def test_refuses_another_aggregation():
    with pytest.raises(ValueError, match="'seq-mean-token-sum'; ICPO takes 'token-mean'"):
        icpo_policy_loss(*tensors(), MASK.bool(), "seq-mean-token-sum", actor())


def test_compute_advantage_of_verl_hands_the_mark_on():
    """Row 3 is an accepted off-policy row, row 7 a wrong one."""
    off = torch.tensor([0.0, 0, 0, 1, 0, 0, 0, 1])
    data = DataProto.from_dict(
        {"token_level_rewards": token_rewards([0.0, 0, 0, 1, 1, 0, 0, 0]),
         "response_mask": MASK.clone(), "reward_baselines": off}, {"uid": UIDS})
    batch = compute_advantage(data, "icpo", config={}).batch
    kept = batch["response_mask"].any(1)
    assert kept[:3].sum() == 2 and kept[3] and kept[4:7].all() and not kept[7]
    assert torch.equal(batch["response_mask"], MASK * kept[:, None])
    third, two = 1 / 3, 2 / 3
    std = ((two ** 2 + 2 * third ** 2) / 2) ** 0.5
    expected = torch.tensor([-third, -third, -third, two, two, -third, -third, 0]) / std
    torch.testing.assert_close(batch["advantages"], (expected * kept)[:, None] * MASK,
                               rtol=1e-4, atol=1e-5)


def test_ppo_loss_of_verl_hands_the_mark_on(monkeypatch):
    monkeypatch.setattr(losses, "no_padding_2_padding", lambda padded, data: padded)
    old, new, advantages = tensors()
    off = torch.tensor([False, True] * 4)
    data = TensorDict({"response_mask": MASK, "old_log_probs": old, "advantages": advantages,
                       "rollout_is_weights": off[:, None] * MASK.float(), "off_policy": off},
                      batch_size=8)
    for name, value in dict(dp_size=1, batch_num_tokens=25, global_batch_size=8).items():
        data.set_non_tensor(name, value)
    config = actor(entropy_coeff=0.0)
    object.__setattr__(config.policy_loss, "loss_mode", "icpo")
    loss, _ = losses.ppo_loss(config, {"log_probs": new}, data)
    expected, _ = icpo.icpo_loss(old_logprobs=old, logprobs=new, advantages=advantages[:, 0],
                                 mask=MASK.float(), off_policy=off, dual_clip=3.0)
    torch.testing.assert_close(loss, expected)


def test_verl_registers_the_module_that_the_environment_names():
    code = ("import verl; from verl.trainer.ppo import core_algos as c; "
            "print(c.get_policy_loss_fn('icpo').__name__, c.get_adv_estimator_fn('icpo').__name__)")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                         check=True, env=os.environ | {
                             "VERL_USE_EXTERNAL_MODULES": "examples.verl_icpo"})
    assert run.stdout.split()[-2:] == ["icpo_policy_loss", "icpo_advantages"]
    assert get_policy_loss_fn("icpo") and get_adv_estimator_fn("icpo")
