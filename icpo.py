"""ICPO, In-Context Steered Policy Optimization (arXiv 2510.26519), equation by equation.

This file needs torch alone; copy it into any trainer. One step of the method, with B responses as
rows, `group` the question of each row, `off_policy` True for responses sampled after [D; q]:

    accepted   = expert_region(rewards, off_policy)                                  # (ERRS)
    rewards    = shaped_rewards(rewards, off_policy, accepted, bonus)                # (RS)
    keep       = mix_groups(off_policy, group, accepted, torch.rand(B))              # G_on ∪ G_off
    advantages = group_advantages(rewards, group, keep)                              # (ADV)
    loss, _    = icpo_loss(logprobs, old_logprobs, advantages, mask * keep[:, None], off_policy)

with bonus = annealed_bonus(t, T). `logprobs` are those of the plain question in every row;
`old_logprobs` are those of the prompt that sampled the row. Both divide logits by the temperature.

Where the paper's text leaves a choice:
1. (ERRS) accepts R ≥ δ, as v3 prints it. R > δ accepts nothing where R is 0 or 1 and δ is 1.
2. (ADV) divides by std + 1e-6 with the unbiased std. A group of equal rewards has advantage 0.
3. (RATIO) is exact for |log r| up to 79 in float32 and constant beyond, so every ratio is finite.
4. (ICPO) takes the number of response tokens that enter the objective as Z.
"""

import math

import torch
from torch import Tensor


def implicit_expert_forcing(policy, demo_prompts):
    """(IEF) π_θ^IEF(τ | q) := π_θ(τ | [D; q]).

    The expert is the policy itself with demonstrations before the question. policy: a function of a
    list of prompts. demo_prompts: the prompts [D; q], through which no gradient flows. Returns what
    policy returns.
    """
    with torch.no_grad():
        return policy(demo_prompts)


def expert_region(rewards: Tensor, off_policy: Tensor, delta: float = 1.0,
                  strict: bool = False) -> Tensor:
    """(ERRS) E_exp = { (x_exp, τ_j) | R(τ_j) ≥ δ }: the responses that may enter the objective.

    rewards: [B], before any bonus. off_policy: [B] bool. strict: use R > δ, as before v3.
    Returns [B] bool, True also for every on-policy row.
    """
    inside = rewards > delta if strict else rewards >= delta
    return inside | ~off_policy.bool()


def annealed_bonus(step: int, total_steps: int, alpha: float = 1.0, decay: str = "linear") -> float:
    """(RS) α·γ(t), with γ(t) = 1 − t/T.

    step: t, the number of steps before this one, so the first step has the whole bonus.
    total_steps: T; from step T on the bonus is 0. decay: "linear"; "cosine", γ = (1 + cos πt/T)/2;
    or "exponential", γ = e^(−5t/T). Raises ValueError for another decay, t < 0 or T < 1.
    """
    if total_steps < 1 or step < 0:
        raise ValueError(f"step must be at least 0 and total_steps at least 1, not {step} and "
                         f"{total_steps}")
    done = min(step / total_steps, 1.0)
    gamma = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2,
             "exponential": math.exp(-5 * done)}
    if decay not in gamma:
        raise ValueError(f"decay must be linear, cosine or exponential, not {decay!r}")
    return alpha * gamma[decay] if done < 1 else 0.0


def shaped_rewards(rewards: Tensor, off_policy: Tensor, accepted: Tensor, bonus: float) -> Tensor:
    """(RS) R_shaped(τ) = R(τ) + α·γ(t) for accepted expert responses; all others keep R(τ).

    rewards: [B]. off_policy: [B] bool. accepted: [B] bool, from `expert_region`, whose δ must lie
    above the reward of a wrong response. bonus: α·γ(t). Returns [B].
    """
    return rewards + bonus * (off_policy.bool() & accepted.bool()).to(rewards.dtype)


def mix_groups(off_policy: Tensor, group: Tensor, accepted: Tensor, priority: Tensor,
               mode: str = "replace") -> Tensor:
    """Forms each question's mixed group G_on ∪ G_off, over which (ADV) and (ICPO) are computed.

    Off-policy rows that are not accepted leave. mode "replace": each accepted off-policy row takes
    the place of the on-policy row of lowest priority in its group; "append": it joins them.
    off_policy, accepted: [B] bool. group: [B] int, the question of each row. priority: [B] random
    numbers. Returns [B] bool, True for the rows in a group. Raises ValueError for another mode.
    """
    if mode not in ("replace", "append"):
        raise ValueError(f"mode must be replace or append, not {mode!r}")
    off_policy, accepted = off_policy.bool(), accepted.bool()
    if mode == "append":
        return ~off_policy | accepted
    same = group[:, None] == group[None, :]                                    # [B, B]
    order = priority.to(group.device).argsort().argsort()                      # [B] ranks: no ties
    entering = (same & (off_policy & accepted)).sum(1)                         # [B] accepted rows
    before = (same & ~off_policy & (order < order[:, None])).sum(1)            # [B] leave earlier
    return torch.where(off_policy, accepted, before >= entering)


def group_advantages(rewards: Tensor, group: Tensor, keep: Tensor | None = None, eps: float = 1e-6,
                     unbiased: bool = True, divide: bool = True) -> Tensor:
    """(ADV) Â_i = (R(τ_i) − mean(G_on ∪ G_off)) / (std(G_on ∪ G_off) + eps).

    rewards: [B]. group: [B] int ids in any order. keep: [B] bool; rows outside it get 0 and do not
    count. unbiased: divide the sum of squares by n − 1 instead of n. divide: by std + eps; False
    leaves R − mean, as Dr. GRPO does.
    Returns [B] float32 or float64: exactly 0 in a group of one, of equal rewards, or with a NaN.
    """
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    keep = torch.ones_like(rewards, dtype=torch.bool) if keep is None else keep.bool()
    ids, index = group.unique(return_inverse=True)                             # [groups], [B]

    def total(values):                                           # [B] -> sum of the row's group [B]
        return values.new_zeros(len(ids)).index_add(0, index, values)[index]

    def extreme(reduce, fill):
        start = rewards.new_full((len(ids),), fill)
        return start.scatter_reduce(0, index, rewards.where(keep, fill), reduce)[index]

    count = total(keep.to(rewards.dtype))
    mean = total(rewards.where(keep, 0.0)) / count.clamp(min=1)
    centred = (rewards - mean).where(keep, 0.0)
    std = (total(centred ** 2) / (count - float(unbiased)).clamp(min=1)).sqrt()
    # Comparison finds equal rewards, because 1/eps would magnify a rounding error of their mean.
    varied = keep & (extreme("amax", -math.inf) > extreme("amin", math.inf))
    return (centred / (std + eps) if divide else centred).where(varied, 0.0)


def importance_ratio(logprobs: Tensor, old_logprobs: Tensor, off_policy: Tensor,
                     denominator: str = "behaviour",
                     log_ratio_clamp: float | None = None) -> Tensor:
    """(RATIO) on-policy r_{i,t}(θ) = π_θ(τ_{i,t} | q, τ_{i,<t}) / π_θold(τ_{i,t} | q, τ_{i,<t})
              off-policy r̂_{j,t}(θ) = π_θ(τ_{j,t} | q, τ_{j,<t}) / π_θold^IEF(τ_{j,t} | q, τ_{j,<t})

    logprobs: [B, T], of the plain question in every row. old_logprobs: [B, T], of the prompt that
    sampled: q on-policy, [D; q] off-policy. off_policy: [B] bool. denominator of off-policy rows:
    "behaviour", as above, or "one", as in LUFFY. log_ratio_clamp: bound above 0 on |log r|; None is
    0.9 of the largest exponent of the dtype (79 in float32). Returns [B, T], finite for finite
    arguments. Raises ValueError for another denominator and a bound of 0 or less.
    """
    if log_ratio_clamp is not None and log_ratio_clamp <= 0:
        raise ValueError(f"log_ratio_clamp must be above 0 or None, not {log_ratio_clamp}")
    if denominator not in ("behaviour", "one"):
        raise ValueError(f"off-policy denominator must be behaviour or one, not {denominator!r}")
    if denominator == "one":
        old_logprobs = old_logprobs.masked_fill(off_policy.bool()[:, None], 0.0)
    return _bounded(logprobs - old_logprobs, log_ratio_clamp).exp()


def policy_shaping(ratio: Tensor, lam: float = 0.01) -> Tensor:
    """f(x) = x / (x + λ). Its slope λ/(x + λ)² is largest at 0: unlikely tokens gain weight over x.

    ratio: any shape, ≥ 0. lam: λ > 0. Returns the same shape, with values from 0 to 1.
    Raises ValueError for λ ≤ 0.
    """
    if lam <= 0:
        raise ValueError(f"λ must be above 0, not {lam}")
    return ratio / (ratio + lam)


def clip(ratio: Tensor, advantages: Tensor, clip_low: float = 0.2, clip_high: float = 0.2,
         dual_clip: float | None = None) -> Tensor:
    """(CLIP) CLIP(r, A, ε) = min(r·A, clip(r, 1 − ε, 1 + ε)·A), ε = clip_low or clip_high.

    ratio: [B, T]. advantages: broadcastable to it. dual_clip: c > 1 bounds the result below by c·A
    where A < 0. Returns [B, T]. Raises ValueError for clip_low not in [0, 1], clip_high < 0, c ≤ 1.
    """
    if not 0 <= clip_low <= 1 or clip_high < 0:
        raise ValueError(f"clip_low must be from 0 to 1 and clip_high at least 0, not {clip_low} "
                         f"and {clip_high}")
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip must be above 1, not {dual_clip}")
    A = advantages
    clipped = torch.minimum(ratio * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A)
    if dual_clip is not None:
        clipped = torch.where(A < 0, torch.maximum(clipped, dual_clip * A), clipped)
    return clipped


def mixed_policy_objective(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor,
                           off_policy: Tensor, clip_low: float = 0.2,
                           clip_high: float = 0.2) -> Tensor:
    """(MIXED) J(θ) = E_on[ 1/|τ| Σ_t CLIP(r_t, Â, ε) ] + E_off[ 1/|τ| Σ_t CLIP(r̂_t, Â, ε) ].

    J is to be maximised. (ICPO) shapes the off-policy ratio, rejects by (ERRS) and divides by Z
    instead. Arguments: see `icpo_loss`; rows without response tokens do not count.
    """
    _check(logprobs, old_logprobs, advantages, mask, off_policy, None, 0.0)
    counts = mask.bool()
    mask = mask.to(torch.promote_types(logprobs.dtype, torch.float32))   # as icpo_loss does
    logprobs, old = (x.to(mask.dtype).where(counts, 0.0) for x in (logprobs, old_logprobs.detach()))
    ratio = importance_ratio(logprobs, old, off_policy)
    tokens = clip(ratio, advantages[:, None].where(counts, 0), clip_low, clip_high) * mask  # [B, T]
    lengths = mask.sum(1)                                                                  # [B] |τ|
    rows = tokens.sum(1) / lengths.where(lengths > 0, 1)                                   # [B]
    on, off = ((lengths > 0) & side for side in (~off_policy.bool(), off_policy.bool()))
    return (rows * on).sum() / on.sum().clamp(min=1) + (rows * off).sum() / off.sum().clamp(min=1)


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The k3 estimate of KL(π_θ ‖ π_ref) at each token: e^x − x − 1, x = log π_ref − log π_θ."""
    x = ref_logprobs - logprobs
    return _bounded(x).expm1() - x   # e^x − 1 would round small x away


def icpo_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor,
              off_policy: Tensor, *, clip_low: float = 0.2, clip_high: float = 0.2,
              shaping_lambda: float | None = 0.01, off_policy_denominator: str = "behaviour",
              normalizer=None, dual_clip: float | None = None, ref_logprobs: Tensor | None = None,
              kl_coef: float = 0.0, clip_off_policy: bool = True,
              log_ratio_clamp: float | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """(ICPO) J = 1/Z · ( Σ_i Σ_t CLIP(r_{i,t}, A_i, ε) + ρ( Σ_j Σ_t CLIP(f(r̂_{j,t}), Â_j, ε) ) ).

    The loss is −J + β·KL.
    logprobs: [B, T], log π_θ of each response token after the plain question, in every row.
    old_logprobs: [B, T], under the policy and prompt that sampled: q on-policy, [D; q] off-policy.
        Off-policy rows of it are not read where off_policy_denominator is "one".
    advantages: [B], from `group_advantages`. off_policy: [B] bool.
    mask: [B, T], 1.0 on response tokens that count, or their weight; 0.0 elsewhere. ρ is this mask:
        it is 0 in rejected rows. Values where it is 0 are not used.
    clip_low, clip_high: ε below and above 1; GRPO uses 0.2 and 0.2. clip_off_policy: whether (CLIP)
        applies to off-policy rows; with shaping f ≤ 1, so it makes no difference where Â ≥ 0.
    shaping_lambda: λ of f, see `policy_shaping`; None leaves r̂ as it is.
    off_policy_denominator, log_ratio_clamp: see `importance_ratio`. dual_clip: see `clip`.
    normalizer: Z, by default mask.sum(). With the Z of the whole batch, the losses of the parts of
        any split add up to the loss of the whole, and so do all metrics except ratio_max.
    ref_logprobs: [B, T], under the reference policy after the plain question. kl_coef: β.
    Returns (loss, metrics): scalars, the metrics without gradient. policy_loss is −J. ratio_max is
    the largest r or r̂, before f. The others are sums by Z: kl of `kl_k3`, clip_fraction of tokens
    at which a clip binds, clip_fraction_off of the off-policy ones of them, off_policy_share of
    off-policy tokens. An empty mask gives loss 0. Raises ValueError for shapes that do not fit, for
    kl_coef without ref_logprobs, and where the functions above do.
    """
    _check(logprobs, old_logprobs, advantages, mask, off_policy, ref_logprobs, kl_coef)
    counts = mask.bool()
    off = off_policy.bool()[:, None].expand(mask.shape)                                    # [B, T]
    A = advantages[:, None].where(counts, 0.0)                                             # [B, T]
    dtype = torch.promote_types(logprobs.dtype, torch.float32)     # bfloat16 cannot count tokens
    logprobs = logprobs.to(dtype).where(counts, 0.0)
    old_logprobs = old_logprobs.detach().to(dtype).where(counts, 0.0)
    mask = mask.to(dtype)
    Z = mask.sum() if normalizer is None else torch.as_tensor(normalizer, dtype=dtype).to(mask)
    Z = Z.where(counts.any(), 1.0)

    ratio = importance_ratio(logprobs, old_logprobs, off_policy, off_policy_denominator,
                             log_ratio_clamp)                                              # [B, T]
    shaped = ratio if shaping_lambda is None else torch.where(
        off, policy_shaping(ratio, shaping_lambda), ratio)                                 # [B, T]
    objective = clip(shaped, A, clip_low, clip_high, dual_clip)                            # [B, T]
    if not clip_off_policy:
        objective = torch.where(off, shaped * A, objective)
    loss = policy_loss = -(objective * mask).sum() / Z

    kl = loss.new_zeros(())
    if ref_logprobs is not None:
        ref_logprobs = ref_logprobs.detach().to(dtype).where(counts, 0.0)
        kl = (kl_k3(logprobs, ref_logprobs) * mask).sum() / Z
        loss = loss + kl_coef * kl if kl_coef else loss

    with torch.no_grad():
        binds = (objective != shaped * A) * mask
        metrics = {"policy_loss": policy_loss.detach(), "kl": kl.detach(),
                   "clip_fraction": binds.sum() / Z, "clip_fraction_off": (binds * off).sum() / Z,
                   "off_policy_share": (mask * off).sum() / Z,
                   "ratio_max": ratio.where(counts, 0.0).max() if counts.numel() else Z * 0}
    return loss, metrics


def _bounded(x: Tensor, bound: float | None = None) -> Tensor:
    bound = min(bound or math.inf, 0.9 * math.log(torch.finfo(x.dtype).max))
    return x.clamp(-bound, bound)


def _check(logprobs, old_logprobs, advantages, mask, off_policy, ref_logprobs, kl_coef) -> None:
    if logprobs.dim() != 2:
        raise ValueError(f"logprobs must be [B, T], not of shape {list(logprobs.shape)}")
    B, T = logprobs.shape
    for name, value, shape in (("old_logprobs", old_logprobs, (B, T)), ("mask", mask, (B, T)),
                               ("advantages", advantages, (B,)), ("off_policy", off_policy, (B,)),
                               ("ref_logprobs", ref_logprobs, (B, T))):
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(f"{name} has shape {list(value.shape)}; with logprobs {[B, T]} it "
                             f"must have {list(shape)}")
    if kl_coef and ref_logprobs is None:
        raise ValueError(f"kl_coef is {kl_coef}, but there are no ref_logprobs")
