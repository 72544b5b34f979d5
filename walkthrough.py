# %% [markdown]
# # One batch through ICPO, number by number
#
# This notebook takes a batch of the [embedded model](docs/embedded.md) through the method. It calls
# the functions that `train.py` calls, prints the numbers of each equation, and computes some of
# them by hand to compare. The names (IEF), (ERRS), (RS), (ADV), (RATIO), (CLIP) and (ICPO) are
# those in [`icpo.py`](icpo.py).
#
# It needs a few minutes on a CPU and no GPU. [`walkthrough.py`](walkthrough.py) has the same cells
# as a script, and `python examples/notebook.py` writes this file from it.

# %%
import tempfile

import matplotlib.pyplot as plt
import torch

import icpo
import train
from model_utils import pack, response_logprobs, to_rows

# %matplotlib inline
folder = tempfile.TemporaryDirectory()
run = train.prepare([
    "--method", "icpo-rs", "--steps", "10", "--batch-size", "32", "--mini-batch-size", "8",
    "--max-new-tokens", "48", "--eval-problems", "128", "--seed", "0", "--device", "cpu",
    "--output-dir", f"{folder.name}/run"])
o = run.options
lam = o.shaping_lambda
assert lam and run.reference   # the options above leave both on


def held_out_accuracy():
    return train.held_out_accuracy(run)["tiny"]["accuracy"]


accuracy = [held_out_accuracy()]   # before training
print(f"{o.batch_size} questions a step, {o.n_on} responses to each from q and {o.n_off} from "
      f"[D; q]; δ = {o.delta:g}, λ = {lam}, ε = {o.clip_low}, α = {o.alpha:g}")
print(f"held-out accuracy before training: {accuracy[0]:.1%}")

# %% [markdown]
# ## Step 1: a batch of questions
#
# A question $q$ is a sum, put into the chat template of the model. The second prompt, $[D; q]$, has
# $k$ demonstrations $D$ before the same question; here $k$ is 1.

# %%
run.begin(0)   # step 0: the learning rate
questions = train.draw_questions(run, 0)
show = questions[26]
read = run.builder.tokenizer.decode
print(f"q, {len(show.prompt)} tokens:\n{read(show.prompt)}\n")
demonstrations, demo_prompt = show.demos[0]
print(f"[D; q], {len(demo_prompt)} tokens:\n{read(demo_prompt)}")

# %% [markdown]
# ## Step 2: responses (IEF)
#
# $$\pi_\theta^{\mathrm{IEF}}(\tau \mid q) := \pi_\theta(\tau \mid [D; q])$$
#
# The expert is the policy itself with demonstrations in its context. Plain responses are on-policy,
# those to $[D; q]$ are off-policy. The sampler returns the log-probability of each token under the
# prompt that it was sampled after. These are the old log-probabilities of the objective.

# %%
responses = train.sample_responses(run, questions, 0)
for r in responses:
    if r.question is show:
        print(f"{'[D; q]' if r.off_policy else 'q':<7}{len(r.tokens):>3} tokens, "
              f"log π_old {sum(r.old_logprobs):>7.2f}:  {r.text}")

# %% [markdown]
# The same response has another probability without the demonstration. The second pass below also
# finds the sampler's log-probabilities again.


# %%
def logprobs_of(responses, prompts, model=run.model):
    """log π(token | prompt, tokens before it) of each response, [B, T], and the mask [B, T]."""
    packing = pack(prompts, [r.tokens for r in responses])
    logprobs, _ = response_logprobs(model, packing, o.temperature)
    return logprobs, packing.mask


expert = next(r for r in responses if r.question is show and r.off_policy)
with torch.no_grad():
    for name, prompt in (("[D; q]", demo_prompt), ("q", show.prompt)):
        found, _ = logprobs_of([expert], [prompt])
        print(f"log π(τ | {name}) = {found.sum():.2f}")
        if prompt is demo_prompt:
            gap = (found[0] - torch.tensor(expert.old_logprobs)).abs().max()
            print(f"largest difference to the sampler at a token: {gap:.0e}")
            assert gap < 1e-4

# %% [markdown]
# ## Step 3: rewards, and the expert region (ERRS)
#
# The reward $R(\tau)$ is 1 if the final answer is right and 0 if not. Of the off-policy responses,
# those in the expert region may enter the objective:
#
# $$\mathcal{E}_{\mathrm{exp}} =
# \lbrace (x_{\mathrm{exp}}, \tau_j) \mid R(\tau_j) \ge \delta \rbrace$$

# %%
rewards = train.score_responses(run, responses)
off_policy = torch.tensor([r.off_policy for r in responses])
accepted = icpo.expert_region(rewards, off_policy, o.delta)
print(f"mean reward: on-policy {rewards[~off_policy].mean():.3f}, "
      f"off-policy {rewards[off_policy].mean():.3f}")
print(f"ERRS accepts {accepted[off_policy].sum()} of {off_policy.sum()} off-policy responses\n")
for verdict in (True, False):
    i = next(i for i in range(len(responses)) if off_policy[i] and accepted[i] == verdict)
    problem = responses[i].question.problem
    print(f"{'accepted' if verdict else 'rejected'}: R = {rewards[i]:.0f} "
          f"{'≥' if verdict else '<'} δ = {o.delta:g}")
    print(f"   question  {problem.problem}, whose answer is {problem.answer}")
    print(f"   response  {responses[i].text}")

# %% [markdown]
# ## Step 3, continued: the annealed bonus (RS)
#
# $$R_{\mathrm{shaped}}(\tau) = R(\tau) + \alpha \gamma(t), \qquad \gamma(t) = 1 - t/T$$
#
# Accepted off-policy responses get the bonus, which shrinks to 0 over the $T$ steps. It is whole in
# this first step, $t = 0$.

# %%
print("t      " + "".join(f"{t:>6}" for t in range(o.bonus_steps + 1)))
print("α·γ(t) " + "".join(f"{icpo.annealed_bonus(t, o.bonus_steps, o.alpha):>6.2f}"
                          for t in range(o.bonus_steps + 1)))

# %% [markdown]
# ## Step 4: the mixed group and its advantages (ADV)
#
# An accepted response takes the place of a random on-policy response to the same question; a
# rejected one leaves. So each group keeps its size. The advantage compares a response with its
# group:
#
# $$\hat{A}_i = \frac{R(\tau_i) - \mathrm{mean}(G_{\mathrm{on}} \cup G_{\mathrm{off}})}
# {\mathrm{std}(G_{\mathrm{on}} \cup G_{\mathrm{off}})}$$
#
# $R$ is here the reward with its bonus. The code adds $10^{-6}$ to the standard deviation.

# %%
batch = train.form_groups(run, responses, rewards, 0)
shaped = icpo.shaped_rewards(rewards, off_policy, accepted, batch.bonus)
mine = [i for i, r in enumerate(responses) if r.question is show]
inside = torch.tensor([i for i in mine if batch.keep[i]])
mean, std = shaped[inside].mean(), shaped[inside].std()
print(f"mean {mean:.4f}, std {std:.4f} over the {len(inside)} responses in the group\n")
print(f"{'prompt':<8}{'R':>3}{'R + bonus':>11}{'in group':>10}{'Â':>9}{'by hand':>9}")
for i in mine:
    hand = (shaped[i] - mean) / (std + 1e-6) if batch.keep[i] else 0.0
    assert abs(batch.advantages[i] - hand) < 1e-9
    print(f"{'[D; q]' if off_policy[i] else 'q':<8}{rewards[i]:>3.0f}{shaped[i]:>11.2f}"
          f"{'yes' if batch.keep[i] else 'no':>10}{batch.advantages[i]:>9.4f}{hand:>9.4f}")

# %% [markdown]
# Groups with equal rewards have advantage 0 and teach nothing. Plain responses alone, which is
# GRPO, leave more such groups:

# %%
grpo = icpo.group_advantages(rewards, batch.group, ~off_policy)
for name, advantages in (("GRPO", grpo), ("ICPO", batch.advantages)):
    print(f"{name}: {len(batch.group[advantages != 0].unique())} of {o.batch_size} groups have "
          f"advantages")

# %% [markdown]
# ## Step 4, continued: ratios (RATIO) and their shaping f
#
# $$r_{i,t}(\theta) = \frac{\pi_\theta(\tau_{i,t} \mid q, \tau_{i,<t})}
# {\pi_{\theta_{\mathrm{old}}}(\tau_{i,t} \mid q, \tau_{i,<t})}, \qquad
# \hat{r}_{j,t}(\theta) = \frac{\pi_\theta(\tau_{j,t} \mid q, \tau_{j,<t})}
# {\pi^{\mathrm{IEF}}_{\theta_{\mathrm{old}}}(\tau_{j,t} \mid q, \tau_{j,<t})}, \qquad
# f(x) = \frac{x}{x + \lambda}$$
#
# The numerator has the plain question in both. The denominator of $\hat{r}$ has the demonstrations,
# with which the response was sampled. In the first mini-batch $\theta$ is still
# $\theta_{\mathrm{old}}$, so every $r$ is 1. The others show more: `train.update` makes the first
# three updates, and the cells below compute the fourth themselves.

# %%
*earlier, last = batch.mini_batches(o.mini_batch_size)
for part in earlier:
    done = train.update(run, part)
    print(f"policy loss {done['policy_loss']:+.4f}, gradient norm {done['grad_norm']:.3f}, "
          f"largest |log r| on-policy {done['logprob_gap']:.4f}")

# %%
last = last.select([i for i, keep in enumerate(last.keep.tolist()) if keep])
A, off = last.advantages.float(), last.off_policy                                # [B], [B]
with torch.no_grad():
    logprobs, mask = logprobs_of(last.responses, [r.question.prompt for r in last.responses])
old = [logprob for r in last.responses for logprob in r.old_logprobs]
old_logprobs, = to_rows(mask, torch.tensor(old))                                 # [B, T]

ratio = icpo.importance_ratio(logprobs, old_logprobs, off)                       # [B, T]
f = icpo.policy_shaping(ratio, lam)
used = torch.where(off[:, None], f, ratio)   # f for off-policy rows alone
clipped = icpo.clip(used, A[:, None], o.clip_low, o.clip_high)
on_tokens, off_tokens = mask & ~off[:, None], mask & off[:, None]
print(f"{on_tokens.sum()} on-policy tokens: r from {ratio[on_tokens].min():.3f} to "
      f"{ratio[on_tokens].max():.3f}")
print(f"{off_tokens.sum()} off-policy tokens: r̂ from {ratio[off_tokens].min():.1e} to "
      f"{ratio[off_tokens].max():.3f}, f(r̂) from {f[off_tokens].min():.3f} to "
      f"{f[off_tokens].max():.3f}")

# %%
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
left.hist(ratio[on_tokens], bins=40, color="#0072B2")
left.axvspan(1 - o.clip_low, 1 + o.clip_high, color="0.9", zorder=0)
left.set(title="r of on-policy tokens", xlabel="r (grey: 1 − ε to 1 + ε)", ylabel="tokens",
         yscale="log")
middle.hist(ratio[off_tokens].log10(), bins=40, color="#D55E00")
middle.set(title="r̂ of off-policy tokens", xlabel="log₁₀ r̂", ylabel="tokens", yscale="log")
x = torch.logspace(min(-4.0, ratio[off_tokens].log10().min().item()), 1, 200)
right.plot(x, icpo.policy_shaping(x, lam), color="#D55E00", label="f(x)")
right.plot(x, lam * x / (x + lam) ** 2, color="#009E73", ls="--",
           label="x·f′(x), weight of ∇ log π")
right.plot(ratio[off_tokens], f[off_tokens], ".", color="black", ms=3, label="r̂ of this batch")
right.set(title=f"f, λ = {lam}", xlabel="x", xscale="log", ylim=(0, 1.45))
right.legend(fontsize=8, loc="upper left")
plt.show()

# %% [markdown]
# $x f'(x)$ is largest at $x = \lambda$, where it is 1/4: the tokens that the plain policy finds
# unlikely get the largest share of the gradient, and those that it would write anyway get little.
#
# ## Step 4, continued: (CLIP)
#
# $$\mathrm{CLIP}(r, A, \varepsilon) =
# \min(r A, \mathrm{clip}(r, 1 - \varepsilon, 1 + \varepsilon) A)$$
#
# The clip binds where CLIP differs from the unclipped product. It never binds off-policy, since
# $f < 1$ and $\hat{A} \ge 0$ there. The first tokens of an off-policy response and of an on-policy
# one in which the clip binds:


# %%
def token_table(row, count=10):
    response = last.responses[row]
    name = "off-policy" if off[row] else "on-policy"
    print(f"{name}, {response.question.problem.problem}: {response.text}   Â = {A[row]:+.4f}")
    print(f"{'token':<13}{'π_old':>9}{'π_θ(·|q)':>11}{'ratio':>9}{'f':>8}{'CLIP':>9}{'by hand':>9}")
    for t, token in enumerate(response.tokens[:count]):
        p, p_old = logprobs[row, t].exp().item(), old_logprobs[row, t].exp().item()
        r = p / p_old
        r = r / (r + lam) if off[row] else r
        bounded = min(max(r, 1 - o.clip_low), 1 + o.clip_high)
        hand = min(r * A[row].item(), bounded * A[row].item())
        assert abs(hand - clipped[row, t]) < 1e-4
        print(f"{read([token])!r:<13}{p_old:>9.4f}{p:>11.4f}{p / p_old:>9.4f}"
              f"{f'{f[row, t]:.4f}' if off[row] else '':>8}{clipped[row, t]:>9.4f}{hand:>9.4f}"
              f"{'   the clip binds' if binds[row, t] else ''}")
    print(f"and {max(0, len(response.tokens) - count)} tokens more\n")


binds = (clipped != used * A[:, None]) & mask
group = [i for i, r in enumerate(last.responses) if r.question is show]
token_table(next(i for i in group if off[i]))
token_table(max((i for i in range(len(off)) if not off[i]), key=lambda i: binds[i].sum()))
print(f"the clip binds at {(binds & on_tokens).sum()} of {on_tokens.sum()} on-policy tokens and "
      f"at {(binds & off_tokens).sum()} of {off_tokens.sum()} off-policy tokens")

# %% [markdown]
# ## Step 4, continued: the objective (ICPO)
#
# $$\mathcal{J}_{\mathrm{ICPO}}(\theta) = \frac{1}{Z} \Big( \sum_i \sum_t
# \mathrm{CLIP}(r_{i,t}, A_i, \varepsilon) + \rho\Big( \sum_j \sum_t
# \mathrm{CLIP}(f(\hat{r}_{j,t}), \hat{A}_j, \varepsilon) \Big) \Big)$$
#
# $\rho$ keeps the accepted responses, the only ones left here. $Z$ is the number of response tokens
# that enter. The loss is $-\mathcal{J} + \beta \mathrm{KL}$; the KL term is that to the initial
# model.

# %%
leaf = logprobs.clone().requires_grad_()   # the loss as a function of the log-probabilities
with torch.no_grad():
    prompts = [r.question.prompt for r in last.responses]
    ref_logprobs, _ = logprobs_of(last.responses, prompts, run.reference)
loss, metrics = icpo.icpo_loss(
    leaf, old_logprobs, A, mask, off, clip_low=o.clip_low, clip_high=o.clip_high,
    shaping_lambda=lam, ref_logprobs=ref_logprobs, kl_coef=o.kl_coef)
Z = mask.sum()
on_sum, off_sum = (clipped[tokens].sum() for tokens in (on_tokens, off_tokens))
print(f"J by hand: ({on_sum:+.3f} on-policy {off_sum:+.3f} off-policy) / {Z} = "
      f"{(on_sum + off_sum) / Z:.5f}")
print(f"icpo_loss: −J = {metrics['policy_loss']:.5f}, KL = {metrics['kl']:.2e}, "
      f"loss = −J + {o.kl_coef}·KL = {loss:.5f}")
assert abs(metrics["policy_loss"] + (on_sum + off_sum) / Z) < 1e-6

# %% [markdown]
# ## The gradient on each token
#
# The gradient of $\mathcal{J}$ with respect to $\log \pi_\theta$ of a token says how strongly the
# update pushes that token up or down:
#
# | token | $\partial \mathcal{J} / \partial \log \pi_\theta$ |
# |---|---|
# | on-policy | $r \hat{A} / Z$, and 0 where the clip binds |
# | off-policy | $\hat{r} f'(\hat{r}) \hat{A} / Z$, with $f'(x) = \lambda / (x + \lambda)^2$ |

# %%
loss, _ = icpo.icpo_loss(   # without the KL term
    leaf, old_logprobs, A, mask, off, clip_low=o.clip_low, clip_high=o.clip_high,
    shaping_lambda=lam)
push = -torch.autograd.grad(loss, leaf)[0]                                       # [B, T]
weight = torch.where(off[:, None], lam * ratio / (ratio + lam) ** 2,
                     ratio.where(~binds, 0.0))
by_hand = weight * A[:, None] / Z * mask
print(f"largest difference to the gradient by hand: {(push - by_hand).abs().max():.0e}")
torch.testing.assert_close(push, by_hand, atol=1e-6, rtol=1e-4)

figure, axes = plt.subplots(figsize=(11, 3.4), layout="constrained")
width = max(len(last.responses[i].tokens) for i in group)
largest = push[group].abs().max().item()
image = axes.imshow(push[group][:, :width].where(mask[group][:, :width], torch.nan), cmap="PuOr_r",
                    vmin=-largest, vmax=largest, aspect="auto")
for y, i in enumerate(group):
    for t, token in enumerate(last.responses[i].tokens):
        text = {"Adding up: ": "Add", "\\boxed{": "\\box", "<|end|>": "end"}.get(read([token]))
        strong = abs(push[i, t]) > largest / 2
        axes.text(t, y, text or read([token]), ha="center", va="center", fontsize=7,
                  color="white" if strong else "black")
axes.set_yticks(range(len(group)), [f"{'[D; q]' if off[i] else 'q'}, R = {last.rewards[i]:.0f}"
                                    for i in group])
axes.set(xlabel="token of the response", title=f"∂J/∂log π of each token; the question is "
         f"{show.problem.problem}")
figure.colorbar(image, label="∂J/∂log π")
plt.show()

# %% [markdown]
# Orange tokens become likelier, and purple ones less likely. Of the off-policy response, the first
# token gets most: the plain policy rarely writes it, and when it does, the rest follows.
# `train.update` computes the same loss from the same rows, takes its gradient through the model and
# makes the optimiser's step:

# %%
done = train.update(run, last)
print(f"policy loss {done['policy_loss']:.5f}, KL {done['kl']:.2e}, gradient norm "
      f"{done['grad_norm']:.3f}")
assert abs(done["policy_loss"] - metrics["policy_loss"]) < 1e-5
accuracy.append(held_out_accuracy())

# %% [markdown]
# ## Ten steps
#
# That was the first step. `train.train_step` does all of it in one call, here for the other nine.

# %%
on, off_ = [rewards[~off_policy].mean().item()], [rewards[off_policy].mean().item()]
for step in range(1, o.steps):
    metrics, _ = train.train_step(run, step, say=lambda phase: None)
    on.append(metrics["reward_on"])
    off_.append(metrics["reward_off"])
    accuracy.append(held_out_accuracy())
print("steps made         " + "".join(f"{step:>7}" for step in range(o.steps + 1)))
print("held-out accuracy  " + "".join(f"{value:>7.1%}" for value in accuracy))

figure, axes = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
steps = range(1, o.steps + 1)
axes.plot(range(o.steps + 1), accuracy, "o-", color="#0072B2", label="held-out accuracy, plain")
axes.plot(steps, on, "s--", color="#D55E00", label="training reward, on-policy")
axes.plot(steps, off_, "^:", color="#009E73", label="training reward, off-policy")
axes.set(xlabel="step", ylabel="share right", ylim=(0, 1.02), title="Ten steps of ICPO†")
axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# `torchrun train.py` makes such a run with a progress bar, checkpoints and a picture of its curves;
# [docs/embedded.md](docs/embedded.md) compares ICPO with GRPO on it, and
# [RESULTS.md](RESULTS.md) has every system of the paper.
