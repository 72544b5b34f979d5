"""ICPO's loss in SkyRL, for policy_loss_type=icpo. Import this file before training starts.

docs/losses.md says how rows are marked as off-policy.
"""

import torch
from skyrl.backends.skyrl_train.utils.ppo_utils import register_policy_loss

import icpo


@register_policy_loss("icpo")
def icpo_policy_loss(log_probs, old_log_probs, advantages, config, loss_mask=None,
                     rollout_logprobs=None):
    """All tensors: [B, T]. advantages are divided by Z already, as SkyRL does for token_mean.
    rollout_logprobs: those after [D; q] in off-policy rows, zeros in the others; None if there are
    no off-policy rows. Returns the sum over tokens, and metrics."""
    mask = torch.ones_like(log_probs) if loss_mask is None else loss_mask.to(log_probs.dtype)
    behaviour = torch.zeros_like(log_probs) if rollout_logprobs is None else rollout_logprobs
    off_policy = ((behaviour != 0) & mask.bool()).any(1)                          # [B]
    first = mask.argmax(1, keepdim=True)                    # one advantage holds for a row
    loss, metrics = icpo.icpo_loss(
        log_probs, torch.where(off_policy[:, None], behaviour, old_log_probs),
        advantages.gather(1, first)[:, 0], mask, off_policy, clip_low=config.eps_clip_low,
        clip_high=config.eps_clip_high, normalizer=1.0)
    tokens = mask.sum().clamp(min=1)
    return loss, {"clip_ratio": (metrics["clip_fraction"] / tokens).item(),
                  "off_policy_share": (metrics["off_policy_share"] / tokens).item()}
