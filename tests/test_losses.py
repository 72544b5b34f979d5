"""The losses of examples/ for slime, prime-rl and SkyRL on tensors of those trainers' layouts.

None of the three installs on a CPU. A stand-in takes the place of the one name that each imports.
"""

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
import torch

import icpo

LENGTHS = [4, 2, 5]
MASK = (torch.arange(5) < torch.tensor(LENGTHS)[:, None]).float()
OFF = torch.tensor([False, True, False])
A = torch.tensor([0.7, 1.4, -2.1])


@pytest.fixture
def stand_in(monkeypatch):
    def stand_in(path, **names):
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(parts[end - 1]))
        vars(sys.modules[path]).update(names)
    return stand_in


@pytest.fixture
def rows():
    """logprobs with gradient, old ones after q, those after [D; q], and the loss of icpo_loss."""
    torch.manual_seed(0)
    old, behaviour = -2 * torch.rand(3, 5), -torch.rand(3, 5) - 0.1
    logprobs = (old + torch.randn(3, 5)).requires_grad_()

    def expected(**more):
        return icpo.icpo_loss(logprobs, torch.where(OFF[:, None], behaviour, old), A, MASK, OFF,
                              **more)[0]
    return SimpleNamespace(logprobs=logprobs, old=old, behaviour=behaviour, expected=expected)


def same_loss_and_gradient(rows, loss, expected):
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(x, rows.logprobs, retain_graph=True)
                    for x in (loss, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("kl", [False, True])
def test_slime(stand_in, rows, pair, kl):
    """slime's reducer with --calculate-per-token-loss sums the tokens of the mask."""
    def split(values):
        return [row[:length] for row, length in zip(values, LENGTHS)]

    def earlier(logits, *, args, unconcat_tokens, total_lengths, response_lengths, with_entropy,
                max_seq_lens):
        return {"log_probs": split(rows.logprobs)}

    def newer(logits, *, args, unconcat_tokens, total_lengths, response_lengths, with_entropy):
        return torch.empty(0), {"log_probs": split(rows.logprobs)}

    stand_in("slime.backends.megatron_utils.loss",
             get_log_probs_and_entropy=newer if pair else earlier)
    from examples.slime_icpo import icpo_loss
    batch = {"unconcat_tokens": [], "total_lengths": [9, 9, 9], "response_lengths": LENGTHS,
             "log_probs": split(rows.old), "ref_log_probs": split(rows.old),
             "rollout_log_probs": split(rows.behaviour * OFF[:, None]),
             "advantages": [a.expand(length) for a, length in zip(A, LENGTHS)]}
    if not pair:
        batch["max_seq_lens"] = None
    args = SimpleNamespace(eps_clip=0.2, eps_clip_high=0.3, use_kl_loss=kl, kl_loss_coef=0.1)
    loss, metrics = icpo_loss(args, batch, torch.empty(1, 9, 3), lambda x: x.sum())
    more = dict(ref_logprobs=rows.old, kl_coef=0.1) if kl else {}
    same_loss_and_gradient(rows, loss, rows.expected(clip_high=0.3, normalizer=1.0, **more))
    assert metrics["off_policy"] == 2
    args.rollout_top_p = 0.9
    with pytest.raises(ValueError, match="--rollout-top-p must be 1, not 0.9"):
        icpo_loss(args, batch, torch.empty(1, 9, 3), lambda x: x.sum())


def test_prime_rl(stand_in, rows):
    """prime-rl calls the loss once a response, adds up, and divides by Z."""
    @dataclass
    class LossOutputs:
        loss: torch.Tensor
        metrics: dict

    stand_in("prime_rl.trainer.rl.loss", LossOutputs=LossOutputs)
    from examples.prime_rl_icpo import icpo_loss
    found = []
    for i in range(3):   # a prompt of two tokens stands before the response
        def whole(values, i=i):
            return torch.cat([torch.zeros(2), values[i]])
        found.append(icpo_loss(SimpleNamespace(
            trainer_logprobs=whole(rows.logprobs), loss_weights=None,
            inference_logprobs=whole(rows.behaviour if OFF[i] else rows.old),
            ref_logprobs=whole(rows.behaviour) if OFF[i] else None,
            advantages=whole(A[:, None] * MASK), loss_mask=whole(MASK).bool())))
    loss = sum(each.loss for each in found) / MASK.sum()
    same_loss_and_gradient(rows, loss, rows.expected())
    assert [each.metrics["icpo/off_policy_share"].item() for each in found] == [0, 1, 0]


def test_skyrl(stand_in, rows):
    """SkyRL divides the advantages by Z before, and the loss is a sum."""
    registered = {}
    stand_in("skyrl.backends.skyrl_train.utils.ppo_utils", register_policy_loss=lambda name: (
        lambda function: registered.setdefault(name, function)))
    sys.modules.pop("examples.skyrl_icpo", None)
    from examples.skyrl_icpo import icpo_policy_loss
    config = SimpleNamespace(eps_clip_low=0.1, eps_clip_high=0.3)
    advantages = A[:, None].expand(3, 5) / MASK.sum()
    loss, metrics = icpo_policy_loss(rows.logprobs, rows.old, advantages, config, MASK,
                                     rows.behaviour * OFF[:, None])
    same_loss_and_gradient(rows, loss, rows.expected(clip_low=0.1, clip_high=0.3))
    assert metrics["off_policy_share"] == pytest.approx(2 / 11)
    assert registered == {"icpo": icpo_policy_loss}
    plain, _ = icpo_policy_loss(rows.logprobs, rows.old, advantages, config, MASK)
    expected, _ = icpo.icpo_loss(rows.logprobs, rows.old, A, MASK, torch.zeros(3).bool(),
                                 clip_low=0.1, clip_high=0.3)
    torch.testing.assert_close(plain, expected)
