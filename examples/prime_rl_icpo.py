"""ICPO's loss in prime-rl. docs/losses.md says how rows are marked as off-policy.

    [trainer.loss]
    type = "custom"
    import_path = "examples.prime_rl_icpo.icpo_loss"
"""

import icpo


def icpo_loss(inputs, clip_low: float = 0.2, clip_high: float = 0.2, shaping_lambda: float = 0.01):
    """inputs: the tensors of one response, [T]. inference_logprobs are those of the prompt that
    sampled; ref_logprobs is not zero if the response is off-policy, and zero or None else.
    Returns the sum over its tokens, which prime-rl divides by Z, and metrics by token."""
    from prime_rl.trainer.rl.loss import LossOutputs
    mask, marks = inputs.loss_mask.float(), inputs.ref_logprobs
    off_policy = inputs.loss_mask.new_zeros(1) if marks is None else (
        (marks != 0) & inputs.loss_mask).any()[None]                              # [1]
    weights = 1.0 if inputs.loss_weights is None else inputs.loss_weights
    advantage = inputs.advantages[mask.argmax()][None]      # one advantage holds for a response
    loss, metrics = icpo.icpo_loss(
        inputs.trainer_logprobs[None], inputs.inference_logprobs[None], advantage,
        (mask * weights)[None], off_policy, clip_low=clip_low, clip_high=clip_high,
        shaping_lambda=shaping_lambda, normalizer=1.0)
    return LossOutputs(loss=loss, metrics={
        f"icpo/{name}": metrics[name] / mask.sum().clamp(min=1)
        for name in ("clip_fraction", "off_policy_share")})
