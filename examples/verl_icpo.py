"""ICPO in verl 0.9: an advantage estimator and a policy loss, both of the name icpo.

    PYTHONPATH=. VERL_USE_EXTERNAL_MODULES=examples.verl_icpo python -m verl.trainer.main_ppo \\
        algorithm.adv_estimator=icpo actor_rollout_ref.actor.policy_loss.loss_mode=icpo ...

Without off-policy rows they are verl's GRPO. docs/verl.md says how rows are marked as off-policy.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from verl.trainer.ppo.core_algos import register_adv_est, register_policy_loss

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import icpo

DELTA = 1.0                # δ of (ERRS)
SHAPING_LAMBDA = 0.01      # λ of f
LOG_RATIO_CLAMP = 20.0     # as in verl's own loss


@register_adv_est("icpo")
def icpo_advantages(token_level_rewards, response_mask, index, reward_baselines=None,
                    config: Any = None, **_):
    """(ERRS), the mixed groups, (ADV).

    token_level_rewards, response_mask: [B, T]. index: [B], the uid of each row's question.
    reward_baselines: [B], above 0 in off-policy rows; None if there are none. verl hands no other
    column on. config: `algorithm` of verl's settings. Rows that leave their group get advantage 0,
    and response_mask becomes 0 in them, in place, so that they do not count in Z. Returns
    advantages and returns, [B, T] each, the same. Raises ValueError for a KL term in the reward,
    with which a right expert would have less than δ.
    """
    config = {} if config is None else config
    if config.get("use_kl_in_reward"):
        raise ValueError("algorithm.use_kl_in_reward is on; ICPO needs rewards without a KL term")
    rewards = token_level_rewards.sum(-1)                                                  # [B]
    off_policy = torch.zeros_like(rewards) if reward_baselines is None else reward_baselines
    off_policy = off_policy > 0
    group = torch.as_tensor(np.unique(index, return_inverse=True)[1], device=rewards.device)
    accepted = icpo.expert_region(rewards, off_policy, DELTA)                              # (ERRS)
    keep = icpo.mix_groups(off_policy, group, accepted, torch.rand(len(rewards)))
    advantages = icpo.group_advantages(                                                    # (ADV)
        rewards, group, keep, divide=config.get("norm_adv_by_std_in_grpo", True))
    response_mask.mul_(keep[:, None].to(response_mask.dtype))
    advantages = advantages[:, None] * response_mask                                       # [B, T]
    return advantages, advantages


@register_policy_loss("icpo")
def icpo_policy_loss(old_log_prob, log_prob, advantages, response_mask,
                     loss_agg_mode="token-mean", config: Any = None, rollout_is_weights=None):
    """(ICPO), without entropy and KL terms, which verl adds.

    old_log_prob, log_prob, advantages, response_mask: [B, T]. In off-policy rows old_log_prob is
    under [D; q] and log_prob under q. rollout_is_weights: [B, T], above 0 on the tokens of
    off-policy rows and 0 elsewhere; None if there are none. verl hands no other column on.
    Returns the loss and the metrics, floats. Raises ValueError for another loss_agg_mode.
    """
    if loss_agg_mode != "token-mean":
        raise ValueError(f"loss_agg_mode is {loss_agg_mode!r}; ICPO takes 'token-mean', whose Z is "
                         f"that of the paper")
    mask = response_mask.to(log_prob.dtype)
    marks = torch.zeros_like(mask) if rollout_is_weights is None else rollout_is_weights
    off_policy = ((marks > 0) & response_mask.bool()).any(1)                               # [B]
    first = response_mask.int().argmax(1, keepdim=True)   # one advantage holds for a whole row
    info = config.global_batch_info
    tokens = info.get("batch_num_tokens") or mask.sum()   # of the update, over all processes
    loss, metrics = icpo.icpo_loss(
        log_prob, old_log_prob, advantages.gather(1, first)[:, 0], mask, off_policy,
        clip_low=config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low,
        clip_high=config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high,
        shaping_lambda=SHAPING_LAMBDA, normalizer=tokens / info.get("dp_size", 1),
        dual_clip=config.get("clip_ratio_c", 3.0), log_ratio_clamp=LOG_RATIO_CLAMP)
    # verl takes the mean of metrics over micro-batches, so these are by token of this one.
    share = tokens / info.get("dp_size", 1) / mask.sum().clamp(min=1)
    return loss, {f"actor/icpo_{name}": (metrics[name] * share).item()
                  for name in ("clip_fraction", "clip_fraction_off", "off_policy_share")}
