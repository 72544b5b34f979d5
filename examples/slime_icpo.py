"""ICPO's loss in slime. docs/losses.md says how rows are marked as off-policy.

    --loss-type custom_loss --custom-loss-function-path examples.slime_icpo.icpo_loss \\
        --calculate-per-token-loss
"""

import torch

import icpo


def icpo_loss(args, batch, logits, sum_of_sample_mean):
    """batch: lists of one tensor a response. Each rollout_log_probs holds the log-probabilities
    after [D; q] if the response is off-policy, and zeros else. Returns the loss and metrics.
    Raises ValueError for --rollout-top-p below 1."""
    if getattr(args, "rollout_top_p", 1.0) != 1:
        raise ValueError(f"--rollout-top-p must be 1, not {args.rollout_top_p}: the tokens that it "
                         f"leaves differ after [D; q]")
    from slime.backends.megatron_utils.loss import get_log_probs_and_entropy
    # Earlier versions have max_seq_lens, in the batch and here.
    names = "unconcat_tokens", "total_lengths", "response_lengths", "max_seq_lens"
    found = get_log_probs_and_entropy(logits, args=args, with_entropy=False,
                                      **{name: batch[name] for name in names if name in batch})
    found = found[-1] if isinstance(found, tuple) else found     # newer versions return a pair
    logprobs, behaviour, old, advantages = (torch.cat(list(x)) for x in (
        found["log_probs"], batch["rollout_log_probs"], batch["log_probs"], batch["advantages"]))
    off = torch.cat([(x != 0).any().expand(len(x)) for x in batch["rollout_log_probs"]])
    old = torch.where(off, behaviour, old)                                        # [M] tokens
    ratio = icpo.importance_ratio(logprobs[:, None], old[:, None], off)[:, 0]     # (RATIO)
    shaped = torch.where(off, icpo.policy_shaping(ratio), ratio)
    loss = -sum_of_sample_mean(icpo.clip(shaped, advantages, args.eps_clip, args.eps_clip_high))
    if args.use_kl_loss:
        kl = sum_of_sample_mean(icpo.kl_k3(logprobs, torch.cat(list(batch["ref_log_probs"]))))
        loss = loss + args.kl_loss_coef * kl
    return loss, {"loss": loss.detach(), "off_policy": sum_of_sample_mean(off.float())}
