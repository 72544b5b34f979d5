"""These tests compare the equations with numbers worked by hand, with finite differences in float64
and with other splits of the same batch."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import tensor

import icpo
from icpo import (
    annealed_bonus,
    clip,
    expert_region,
    group_advantages,
    icpo_loss,
    implicit_expert_forcing,
    importance_ratio,
    kl_k3,
    mix_groups,
    mixed_policy_objective,
    policy_shaping,
    shaped_rewards,
)

F64 = torch.float64


def random_batch(B=6, T=5, seed=0, spread=0.5, advantages=None):
    """Returns a float64 batch with masks of various lengths; every other row is off-policy."""
    g = torch.Generator().manual_seed(seed)
    logprobs = -torch.rand(B, T, generator=g, dtype=F64) * 3
    old = logprobs + spread * torch.randn(B, T, generator=g, dtype=F64)
    mask = (torch.arange(T) < torch.randint(1, T + 1, (B, 1), generator=g)).to(F64)
    advantages = torch.randn(B, generator=g, dtype=F64) if advantages is None else advantages
    off_policy = torch.arange(B) % 2 == 1
    return logprobs.requires_grad_(), old, advantages, mask, off_policy


# --------------------------------------------------------------------------------------------------
# (IEF), (ERRS), (RS), the mixed group

def test_ief_scores_the_demo_prompt_without_gradient():
    weight = torch.ones(2, requires_grad=True)
    out = implicit_expert_forcing(lambda prompts: weight * len(prompts[0]), [[1, 2, 3]])
    assert out.tolist() == [3.0, 3.0] and not out.requires_grad


@pytest.mark.parametrize("strict, delta, expected", [
    (False, 1.0, [True, True, True, False]),
    (True, 1.0, [True, True, False, False]),     # R > δ accepts no reward of 0 or 1 with δ = 1
    (True, 0.5, [True, True, True, False]),
    (False, 0.0, [True, True, True, True]),
])
def test_errs_accepts_rewards_that_reach_delta(strict, delta, expected):
    rewards, off_policy = tensor([0.0, 1.0, 1.0, 0.0]), tensor([False, False, True, True])
    assert expert_region(rewards, off_policy, delta, strict).tolist() == expected


def test_the_bonus_matches_hand_calculation():
    assert [annealed_bonus(t, 4) for t in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert annealed_bonus(1, 4, alpha=2.0) == 1.5
    assert annealed_bonus(2, 4, decay="cosine") == pytest.approx(0.5)
    assert annealed_bonus(1, 4, decay="cosine") == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert annealed_bonus(2, 4, decay="exponential") == pytest.approx(math.exp(-2.5))
    for decay in ("linear", "cosine", "exponential"):
        assert annealed_bonus(0, 7, decay=decay) == 1.0 and annealed_bonus(7, 7, decay=decay) == 0.0


@pytest.mark.parametrize("arguments", [(0, 0), (-1, 5), (1, 5, 1.0, "quadratic")])
def test_the_bonus_refuses_wrong_arguments(arguments):
    with pytest.raises(ValueError):
        annealed_bonus(*arguments)


def test_the_bonus_goes_to_accepted_off_policy_rows_only():
    shaped = shaped_rewards(tensor([1.0, 0.0, 1.0, 0.0]), tensor([False, False, True, True]),
                            tensor([True, True, True, False]), 0.25)
    assert shaped.tolist() == [1.0, 0.0, 1.25, 0.0]


def test_accepted_rows_replace_or_join_on_policy_rows():
    # Two off-policy rows of group 7 are accepted, and none of group 3.
    group = tensor([7, 7, 7, 3, 3, 7, 3, 7])
    off_policy = tensor([False, False, False, False, False, True, True, True])
    accepted = tensor([True, True, True, True, True, True, False, True])
    priority = tensor([0.5, 0.1, 0.3, 0.2, 0.4, 0.9, 0.0, 0.0])
    replaced = mix_groups(off_policy, group, accepted, priority)
    assert replaced.tolist() == [True, False, False, True, True, True, False, True]
    appended = mix_groups(off_policy, group, accepted, priority, mode="append")
    assert appended.tolist() == [True, True, True, True, True, True, False, True]
    with pytest.raises(ValueError, match="swap"):
        mix_groups(off_policy, group, accepted, priority, mode="swap")


def test_replacement_is_uniform():
    off_policy, group = tensor([False, False, False, True]), torch.zeros(4, dtype=torch.long)
    g = torch.Generator().manual_seed(0)
    kept = [mix_groups(off_policy, group, torch.ones(4), torch.rand(4, generator=g))[:3]
            for _ in range(3000)]
    left = [rows.logical_not().nonzero().item() for rows in kept]
    # The bound is four standard deviations.
    assert all(abs(left.count(i) - 1000) < 4 * math.sqrt(3000 * 2 / 9) for i in range(3))


# --------------------------------------------------------------------------------------------------
# (ADV)

def test_advantages_match_hand_calculation():
    # Group 0 has rewards 1, 0, 0, mean 1/3 and unbiased variance 1/3; group 5 has rewards 2 and 1,
    # mean 3/2 and variance 1/2.
    rewards, group = tensor([1.0, 2.0, 0.0, 1.0, 0.0], dtype=F64), tensor([0, 5, 0, 5, 0])
    expected = tensor([2 / 3 / math.sqrt(1 / 3), math.sqrt(0.5), -1 / 3 / math.sqrt(1 / 3),
                       -math.sqrt(0.5), -1 / 3 / math.sqrt(1 / 3)], dtype=F64)
    torch.testing.assert_close(group_advantages(rewards, group, eps=0.0), expected)
    # The biased variances are 2/9 and 1/4.
    biased = group_advantages(rewards, group, eps=0.0, unbiased=False)
    torch.testing.assert_close(biased[:2], tensor([2 / 3 / math.sqrt(2 / 9), 1.0], dtype=F64))
    centred = group_advantages(rewards, group, divide=False)
    torch.testing.assert_close(centred, tensor([2 / 3, 0.5, -1 / 3, -0.5, -1 / 3], dtype=F64))


def test_rows_outside_keep_do_not_count():
    rewards, group = tensor([1.0, 0.0, math.nan, 0.0]), tensor([0, 0, 0, 0])
    keep = tensor([True, True, False, True])
    expected = group_advantages(tensor([1.0, 0.0, 0.0]), tensor([0, 0, 0]))
    assert group_advantages(rewards, group, keep).tolist() == [
        *expected[:2].tolist(), 0.0, expected[2].item()]


@pytest.mark.parametrize("rewards, keep", [
    ([0.1] * 3, None),                       # their float32 mean is not 0.1
    ([1.9] * 7, None),
    ([1.0], None),                           # the group has one row
    ([1.0, 0.0], [True, False]),             # one row is left after rejection
    ([1.0, 0.0], [False, False]),            # all rows are rejected
    ([1.0, 0.0, math.nan], None),            # a reward is not known
])
def test_groups_without_variation_get_exactly_zero(rewards, keep):
    keep = None if keep is None else tensor(keep)
    group = torch.zeros(len(rewards), dtype=torch.long)
    assert group_advantages(tensor(rewards), group, keep).tolist() == [0] * len(rewards)


# --------------------------------------------------------------------------------------------------
# (RATIO), f, (CLIP), KL

def test_ratios_match_hand_calculation():
    logprobs = tensor([[0.5, 0.25], [0.5, 0.25]]).log()
    old, off_policy = tensor([[0.25, 0.5], [0.8, 0.5]]).log(), tensor([False, True])
    torch.testing.assert_close(importance_ratio(logprobs, old, off_policy),
                               tensor([[2.0, 0.5], [0.625, 0.5]]))
    torch.testing.assert_close(importance_ratio(logprobs, old, off_policy, "one"),
                               tensor([[2.0, 0.5], [0.5, 0.25]]))
    with pytest.raises(ValueError, match="expert"):
        importance_ratio(logprobs, old, off_policy, "expert")
    for bound in (0.0, -5.0):
        with pytest.raises(ValueError, match="log_ratio_clamp"):
            importance_ratio(logprobs, old, off_policy, log_ratio_clamp=bound)


@pytest.mark.parametrize("log_ratio", [-1e4, -50.0, 50.0, 1e4])
@pytest.mark.parametrize("bound", [None, 20.0])
def test_ratios_are_finite_and_exact_within_the_bound(log_ratio, bound):
    ratio = importance_ratio(tensor([[log_ratio]]), tensor([[0.0]]), tensor([False]),
                             log_ratio_clamp=bound)
    effective = max(-(bound or 79.85), min(bound or 79.85, log_ratio))
    assert math.isfinite(ratio) and math.log(ratio) == pytest.approx(effective, abs=0.01)


def test_policy_shaping_matches_hand_calculation():
    x = tensor([0.0, 0.01, 0.99, 1e30])
    torch.testing.assert_close(policy_shaping(x), tensor([0.0, 0.5, 0.99, 1.0]))
    torch.testing.assert_close(policy_shaping(x[1:2], lam=0.1), tensor([1 / 11]))
    x = tensor([0.003], dtype=F64, requires_grad=True)
    policy_shaping(x).backward()
    assert x.grad.item() == pytest.approx(0.01 / (0.003 + 0.01) ** 2)
    with pytest.raises(ValueError):
        policy_shaping(x, 0.0)


@pytest.mark.parametrize("ratio, advantage, expected", [
    (1.5, 2.0, 2.4), (0.5, 2.0, 1.0), (1.1, 2.0, 2.2),        # A > 0: ratios above 1.2 gain nothing
    (1.5, -2.0, -3.0), (0.5, -2.0, -1.6), (0.9, -2.0, -1.8),  # A < 0: ratios below 0.8 gain nothing
])
def test_clip_matches_hand_calculation(ratio, advantage, expected):
    assert clip(tensor([[ratio]]), tensor([[advantage]])).item() == pytest.approx(expected)


def test_clip_obeys_its_options():
    ratio, A = tensor([[1.3, 5.0]]), tensor([[1.0]])
    torch.testing.assert_close(clip(ratio, A, 0.2, 0.4), tensor([[1.3, 1.4]]))
    torch.testing.assert_close(clip(ratio, -A, dual_clip=3.0), tensor([[-1.3, -3.0]]))
    torch.testing.assert_close(clip(ratio, A, dual_clip=3.0), tensor([[1.2, 1.2]]))
    for bad in (dict(clip_low=1.5), dict(clip_high=-0.1), dict(dual_clip=0.5)):
        with pytest.raises(ValueError):
            clip(ratio, A, **bad)


def test_weights_aggregate_the_loss():
    """A row of 1 token with A = 2 and one of 3 tokens with A = −1; every ratio is 1."""
    mask = tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    arguments = torch.zeros(2, 3), torch.zeros(2, 3), tensor([2.0, -1.0])
    for weights, Z, expected in ((mask, None, -(2 - 3) / 4),                             # tokens
                                 (mask / mask.sum(1, keepdim=True), 2, -(2 - 1) / 2),    # sequences
                                 (mask, 2 * 5, -(2 - 3) / 10)):                          # fixed
        loss, _ = icpo_loss(*arguments, weights, tensor([False, False]), normalizer=Z)
        assert loss.item() == pytest.approx(expected)


def test_kl_matches_hand_calculation():
    # With x = log 2 the estimate is 2 − log 2 − 1; it is 0 where the policies agree.
    torch.testing.assert_close(kl_k3(tensor([0.25, 0.5]).log(), tensor([0.5, 0.5]).log()),
                               tensor([1 - math.log(2), 0.0]))
    assert torch.isfinite(kl_k3(tensor([0.0, -200.0]), tensor([-200.0, 0.0]))).all()
    x = tensor([1e-4, -1e-4, 1e-3])   # e^x − x − 1 = x²/2 + x³/6 + …; e^x − 1 would be off by 1e-8
    torch.testing.assert_close(kl_k3(torch.zeros(3), x), x ** 2 / 2 + x ** 3 / 6, rtol=0,
                               atol=1e-10)


# --------------------------------------------------------------------------------------------------
# (MIXED), (ICPO)

def two_rows():
    """Row 0 is on-policy with r = 2, 0.5 and A = 1; row 1 is off-policy with r̂ = 0.5 and A = 2.
    The second token of row 1 is masked."""
    logprobs = tensor([[0.5, 0.25], [0.25, 1.0]], dtype=F64).log()
    old = tensor([[0.25, 0.5], [0.5, 1.0]], dtype=F64).log()
    mask = tensor([[1.0, 1.0], [1.0, 0.0]])
    return logprobs, old, tensor([1.0, 2.0], dtype=F64), mask, tensor([False, True])


def test_mixed_objective_matches_hand_calculation():
    # The on-policy term is (1.2 + 0.5)/2, the off-policy term 0.5·2/1.
    assert mixed_policy_objective(*two_rows()).item() == pytest.approx(0.85 + 1.0)
    logprobs, old, A, mask, off_policy = two_rows()
    mask = mask * ~off_policy[:, None]
    A = A.masked_fill(off_policy, math.nan)   # of rows that do not count
    assert mixed_policy_objective(logprobs, old, A, mask, off_policy).item() == pytest.approx(0.85)


def test_mixed_objective_divides_by_weights_below_1():
    logprobs, old, A, mask, off_policy = two_rows()
    assert mixed_policy_objective(logprobs, old, A, 0.25 * mask, off_policy).item() == (
        pytest.approx(0.85 + 1.0))


@pytest.mark.parametrize("objective", [
    mixed_policy_objective, lambda *rows: icpo_loss(*rows)[0],
    lambda logprobs, ref, *rest: icpo_loss(logprobs, logprobs.detach(), *rest,
                                           ref_logprobs=ref + 0.1, kl_coef=1.0)[0]])
def test_no_gradient_goes_through_the_old_policy_or_the_reference(objective):
    logprobs, _, A, mask, off_policy = two_rows()
    logprobs.requires_grad_()
    objectives = [objective(logprobs, other, A, mask, off_policy)
                  for other in (logprobs, logprobs.detach())]
    mine, expected = (torch.autograd.grad(each, logprobs)[0] for each in objectives)
    assert torch.equal(mine, expected) and expected.abs().sum() > 0


def test_icpo_loss_matches_hand_calculation():
    loss, metrics = icpo_loss(*two_rows())
    shaped = 0.5 / 0.51
    assert loss.item() == pytest.approx(-(1.2 + 0.5 + 2 * shaped) / 3)
    assert metrics["clip_fraction"].item() == pytest.approx(1 / 3)      # only r = 2 is clipped
    assert metrics["off_policy_share"].item() == pytest.approx(1 / 3)
    assert metrics["ratio_max"].item() == pytest.approx(2.0)
    # The first of these losses leaves out f; the second has denominator 1, another λ and another Z.
    unshaped = icpo_loss(*two_rows(), shaping_lambda=None)[0]
    assert unshaped.item() == pytest.approx(-(1.2 + 0.5 + 1.0) / 3)
    one = icpo_loss(*two_rows(), off_policy_denominator="one", shaping_lambda=0.1, normalizer=10)[0]
    assert one.item() == pytest.approx(-(1.2 + 0.5 + 2 * 0.25 / 0.35) / 10)
    # In the KL term, x = log(ref/π) is log 2 at the first token and 0 at the other two that count.
    logprobs, *rest = two_rows()
    ref = logprobs + tensor([[math.log(2), 0.0], [0.0, 5.0]])
    with_kl, metrics = icpo_loss(logprobs, *rest, ref_logprobs=ref, kl_coef=0.5)
    assert metrics["kl"].item() == pytest.approx((1 - math.log(2)) / 3)
    assert with_kl.item() == pytest.approx(loss.item() + 0.5 * (1 - math.log(2)) / 3)


def test_off_policy_clip_after_shaping_is_an_option():
    # Â < 0. With λ = 1, f(3) is 3/4, and the clip raises it to 0.8.
    logprobs, old, _, mask, off_policy = two_rows()
    logprobs[1, 0], old[1, 0] = math.log(0.75), math.log(0.25)
    rows = (logprobs, old, tensor([0.0, -1.0], dtype=F64), mask, off_policy)
    loss, metrics = icpo_loss(*rows, shaping_lambda=1.0)
    assert loss.item() == pytest.approx(0.8 / 3)
    assert metrics["clip_fraction_off"].item() == pytest.approx(1 / 3)
    assert metrics["ratio_max"].item() == pytest.approx(3.0)   # before f
    unclipped, metrics = icpo_loss(*rows, shaping_lambda=1.0, clip_off_policy=False)
    assert unclipped.item() == pytest.approx(0.75 / 3) and metrics["clip_fraction_off"] == 0


@pytest.mark.parametrize("settings", [
    dict(), dict(shaping_lambda=0.1, off_policy_denominator="one"), dict(shaping_lambda=None),
    dict(dual_clip=3.0), dict(clip_off_policy=False), dict(kl_coef=0.3), dict(normalizer=11.0),
    dict(log_ratio_clamp=20.0)])
def test_gradient_matches_finite_differences(settings):
    logprobs, old, A, mask, off_policy = random_batch()
    ref = old + 0.1 if "kl_coef" in settings else None
    assert torch.autograd.gradcheck(lambda x: icpo_loss(
        x, old, A, mask, off_policy, ref_logprobs=ref, **settings)[0], (logprobs,))


@pytest.mark.parametrize("lam", [1e-4, 0.01, 0.1, 10.0])
@pytest.mark.parametrize("denominator", ["behaviour", "one"])
def test_off_policy_clip_never_binds_for_positive_advantages(lam, denominator):
    """f never exceeds 1 + ε, and min(f·A, clip(f)·A) is f·A where f < 1 − ε and A ≥ 0. So the loss
    and its gradient equal those without the clip. The clip does bind in an on-policy row."""
    log_ratios = torch.linspace(-30, 30, 601, dtype=F64).repeat(2, 1)
    results = []
    for clipped in (True, False):
        logprobs = log_ratios.clone().requires_grad_()
        for A in (0.0, 1.3):
            loss, metrics = icpo_loss(
                logprobs, torch.zeros_like(log_ratios), tensor([A, A], dtype=F64),
                torch.ones_like(log_ratios), tensor([True, False]), shaping_lambda=lam,
                off_policy_denominator=denominator, clip_off_policy=clipped)
            assert metrics["clip_fraction_off"] == 0 and (metrics["clip_fraction"] > 0) == (A > 0)
            results.append((loss, *torch.autograd.grad(loss, logprobs)))
    for with_clip, without in zip(results[:2], results[2:]):
        assert all(torch.equal(a, b) for a, b in zip(with_clip, without))


def test_the_loss_without_off_policy_rows_is_that_of_grpo():
    logprobs, old, _, mask, _ = random_batch()
    rewards = tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0], dtype=F64)
    A = group_advantages(rewards, tensor([0, 0, 0, 1, 1, 1]))
    loss, _ = icpo_loss(logprobs, old, A, mask, torch.zeros(6, dtype=torch.bool))
    # This computes the loss of GRPO token by token in plain Python.
    total = 0.0
    for i, rows in ((i, range(i // 3 * 3, i // 3 * 3 + 3)) for i in range(6)):
        mean = sum(rewards[j].item() for j in rows) / 3
        std = math.sqrt(sum((rewards[j].item() - mean) ** 2 for j in rows) / 2)
        advantage = (rewards[i].item() - mean) / (std + 1e-6)
        for t in range(5):
            if mask[i, t]:
                ratio = math.exp(logprobs[i, t].item() - old[i, t].item())
                total += min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
    assert loss.item() == pytest.approx(-total / mask.sum().item())


def test_the_loss_of_the_release_is_a_setting():
    """The authors' release, token by token: an off-policy token has p/(p + 0.1) without a clip, an
    on-policy one the dual clip, and both a log-ratio of at most 20."""
    logprobs, old, A, mask, off_policy = random_batch(B=8, spread=2.0)
    with torch.no_grad():
        logprobs[0, 0] = old[0, 0] + 25
    loss, metrics = icpo_loss(
        logprobs, old, A, mask, off_policy, shaping_lambda=0.1, dual_clip=3.0,
        off_policy_denominator="one", clip_off_policy=False, log_ratio_clamp=20.0)
    assert metrics["ratio_max"].item() == pytest.approx(math.exp(20))
    total, bound = 0.0, 0
    for i, t in mask.nonzero().tolist():
        advantage, x = A[i].item(), logprobs[i, t].item()
        if off_policy[i]:
            total += math.exp(x) / (math.exp(x) + 0.1) * advantage
        else:
            ratio = math.exp(min(max(x - old[i, t].item(), -20.0), 20.0))
            kept = min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
            bound += advantage < 0 and kept < 3 * advantage
            total += max(kept, 3 * advantage) if advantage < 0 else kept
    assert loss.item() == pytest.approx(-total / mask.sum().item()) and bound


@pytest.mark.parametrize("split", [[6], [1] * 6, [2, 4], [5, 1], [3, 3]])
def test_the_losses_of_any_split_sum_to_the_whole(split):
    logprobs, old, A, mask, off_policy = random_batch()
    settings = dict(ref_logprobs=old + 0.1, kl_coef=0.3, normalizer=mask.sum())
    whole, whole_metrics = icpo_loss(logprobs, old, A, mask, off_policy, **settings)
    gradient, = torch.autograd.grad(whole, logprobs)
    columns = zip(*(x.split(split) for x in (logprobs, old, A, mask, off_policy, old + 0.1)))
    parts = [icpo_loss(*part, ref_logprobs=ref, kl_coef=0.3, normalizer=mask.sum())
             for *part, ref in columns]
    total = sum(loss for loss, _ in parts)
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(torch.autograd.grad(total, logprobs)[0], gradient)
    for name, value in whole_metrics.items():
        combined = (max if name == "ratio_max" else sum)(metrics[name] for _, metrics in parts)
        torch.testing.assert_close(combined, value)


def test_rejected_rows_leave_the_objective():
    logprobs, old, A, mask, off_policy = random_batch()
    keep = tensor([True, False, True, True, False, True])
    rejected, _ = icpo_loss(logprobs, old, A, mask * keep[:, None], off_policy)
    without, _ = icpo_loss(logprobs[keep], old[keep], A[keep], mask[keep], off_policy[keep])
    torch.testing.assert_close(rejected, without)


@pytest.mark.parametrize(
    "what", ["empty mask", "garbage behind the mask", "e^50", "e^-50", "e^200"])
def test_loss_and_gradient_are_always_finite(what):
    logprobs, old, A, mask, off_policy = random_batch()
    logprobs, old, mask = logprobs.detach().float(), old.float(), mask.float()
    if what == "empty mask":
        mask = torch.zeros_like(mask)
    elif what == "garbage behind the mask":
        logprobs = logprobs.masked_fill(mask == 0, math.nan)
        old, A = old.masked_fill(mask == 0, -math.inf), A.clone()
        mask[1], A[1] = 0, math.nan
    else:
        old = logprobs - float(what[2:])
    logprobs.requires_grad_()
    loss, metrics = icpo_loss(logprobs, old, A.float(), mask, off_policy, ref_logprobs=old,
                              kl_coef=0.001)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logprobs.grad).all()
    assert all(torch.isfinite(value) for value in metrics.values())
    if what == "empty mask":
        assert loss == 0 and not logprobs.grad.any()


def test_tokens_in_bfloat16_are_counted_in_float32():
    """The loss has 3,333 tokens of ratio 1; bfloat16 would round the count to 3,328."""
    logprobs = torch.zeros(3, 1111, dtype=torch.bfloat16, requires_grad=True)
    arguments = (logprobs, logprobs.detach(), torch.ones(3), torch.ones_like(logprobs).detach(),
                 torch.zeros(3, dtype=torch.bool))
    assert icpo_loss(*arguments)[0].item() == pytest.approx(-1.0, abs=1e-6)
    assert mixed_policy_objective(*arguments).item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("change, culprit", [
    (dict(old_logprobs=torch.zeros(6, 4)), "old_logprobs"),
    (dict(logprobs=torch.zeros(6)), r"logprobs must be \[B, T\]"),
    (dict(advantages=torch.zeros(5)), "advantages"), (dict(mask=torch.ones(6)), "mask"),
    (dict(kl_coef=0.1), "ref_logprobs"), (dict(shaping_lambda=-1.0), "λ"),
    (dict(off_policy_denominator="two"), "two")])
def test_wrong_arguments_are_named(change, culprit):
    logprobs, old, A, mask, off_policy = random_batch()
    arguments = dict(logprobs=logprobs, old_logprobs=old, advantages=A, mask=mask,
                     off_policy=off_policy) | change
    with pytest.raises(ValueError, match=culprit):
        icpo_loss(**arguments)


def test_a_normalizer_of_nan_or_0_shows():
    for Z in (math.nan, 0.0):
        assert not icpo_loss(*random_batch(), normalizer=Z)[0].isfinite()


def test_mixed_objective_names_wrong_shapes():
    logprobs, old, A, mask, off_policy = random_batch()
    with pytest.raises(ValueError, match="advantages"):
        mixed_policy_objective(logprobs, old, A[:, None].expand(mask.shape), mask, off_policy)


def test_the_file_works_alone(tmp_path):
    """icpo.py imports only torch and math, so it can be copied into another code base."""
    (tmp_path / "icpo.py").write_bytes(Path(icpo.__file__).read_bytes())
    code = ("import sys, torch; before = set(sys.modules); import icpo; "
            "print({m.split('.')[0] for m in set(sys.modules) - before} - {'icpo', 'math'})")
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                         check=True)
    assert out.stdout.strip() == "set()"
