"""Trains a model with ICPO, GRPO or LUFFY.

    torchrun train.py                                       # the embedded model, ICPO
    torchrun --nproc-per-node 8 train.py configs/qwen3-1.7b.yaml --output-dir runs/mine
    torchrun train.py --resume                              # goes on where a killed run stopped

`train_step` is the procedure of the paper:
1. Draw a batch of questions.
2. Sample N_on responses to each from θ_old, and N_off with demonstrations in the context.
3. An off-policy response in the expert region (ERRS) replaces a random on-policy one and gets the
   bonus (RS); other off-policy responses are dropped.
4. Compute advantages over the mixed group (ADV), the objective (ICPO) and its gradient; update θ.
5. θ_old ← θ.

Every random choice is a function of (seed, step, question), so any number of processes makes the
same update, apart from rounding, and a resumed run needs no random state.
"""

import contextlib
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from options import begin_imports, end_with_mistake, parse_training

if __name__ == "__main__":   # --help and a misspelt option end here, before torch is loaded
    parse_training(sys.argv[1:])
    begin_imports()

import torch
from torch import Tensor

import distributed
import icpo
import report
import runs
from data import Problem, Question, Response, epoch_order
from eval import evaluate
from machine import prepare_gradients, to_device
from model_utils import pack, response_logprobs, to_rows
from prepare import Run, prepare
from rollout import Work, generate
from stopping import end_response, fold
from summary import accuracy_of


def train_step(run: Run, step: int, say: Callable[[str], Any]) -> tuple[dict, "Batch"]:
    """Steps 1 to 4; 5 is that the next call samples with the updated θ.

    Returns the metrics over all processes and this process's batch.
    """
    o, phases = run.options, runs.Phases(say)
    run.begin(step)
    phases.start("sampling")
    questions = draw_questions(run, step)                                              # 1
    responses = sample_responses(run, questions, step, say)                            # 2     (IEF)
    phases.start("scoring")
    rewards = score_responses(run, responses)                                          # 3
    batch = form_groups(run, responses, rewards, step)                    # 3, 4  (ERRS) (RS) (ADV)
    phases.start("updating")
    gap = recompute_logprobs(run, responses) if o.old_logprobs == "recompute" else None
    updates = [update(run, part) for part in batch.mini_batches(o.mini_batch_size)]    # 4    (ICPO)
    return report.measure(run, step, batch, updates, gap, phases.seconds()), batch


@dataclass
class Batch:
    """Responses, and in the same order the results of steps 3 and 4, [B] each."""
    responses: list[Response]
    group: Tensor                   # int, the index of the question
    off_policy: Tensor              # bool
    rewards: Tensor                 # float64, without the bonus
    accepted: Tensor                # bool (ERRS)
    keep: Tensor                    # bool, in the mixed group
    advantages: Tensor              # float64 (ADV)
    bonus: float                    # (RS)

    def select(self, rows: Sequence[int]) -> "Batch":
        chosen = {name: value[torch.tensor(rows, dtype=torch.long)]
                  for name, value in vars(self).items() if torch.is_tensor(value)}
        return replace(self, responses=[self.responses[i] for i in rows], **chosen)

    def mini_batches(self, size: int) -> Iterator["Batch"]:
        """Yields this process's part of each mini-batch of `size` questions."""
        parts = (self.group // size).tolist()
        for part in sorted(set(parts)):
            yield self.select([i for i, each in enumerate(parts) if each == part])

    def rows(self) -> Iterator[tuple[Response, float, bool, bool, float]]:
        """(response, reward, accepted, keep, advantage) of each row."""
        return zip(self.responses, self.rewards.tolist(), self.accepted.tolist(),
                   self.keep.tolist(), self.advantages.tolist(), strict=True)


def draw_questions(run: Run, step: int) -> list[Question]:
    """Step 1: this process's share of the batch. Questions come in a random order each epoch."""
    o, count = run.options, len(run.problems)

    def question(index: int) -> Question:
        epoch, place = divmod(step * o.batch_size + index, count)
        problem = run.problems[epoch_order(o.seed, epoch, count)[place]]
        demos = [] if run.demonstrations is None else [run.demonstrations.draw(
            problem, random.Random(f"demonstrations {o.seed} {step} {index} {j}"))
            for j in range(o.n_off)]
        return Question(index, problem, run.builder.plain(problem), demos)

    mine = []
    for begin in range(0, o.batch_size, o.mini_batch_size):
        part = [question(index) for index in range(begin, begin + o.mini_batch_size)]
        lengths = [sum(len(prompt) + o.max_new_tokens for prompt in [q.prompt] * o.n_on
                       + [prompt for _, prompt in q.demos]) for q in part]
        mine += [part[i] for i in distributed.my_share(lengths)]
    return mine


def sample_responses(run: Run, questions: list[Question], step: int,
                     say: Callable[[str], Any] = lambda text: None) -> list[Response]:
    """Step 2: N_on responses of π_θold(·|q) to each question, and N_off off-policy ones."""
    o, solved = run.options, set()
    demo = [(q, j, prompt) for q in questions for j, (_, prompt) in enumerate(q.demos)]
    builder, stop_ids = run.builder, run.model.stop_ids

    def stream(kind: int, number: int) -> int:   # evaluation uses the streams below 2^32
        return ((2 * step + kind) << 32) + number

    def sample(plain, demo) -> list[Response]:
        def policy(demo_prompts):   # it samples the plain prompts too: no cache slot stays idle
            counts = [o.n_on] * len(plain) + [1] * len(demo)
            return generate(
                model, [q.prompt for q in plain] + demo_prompts, n=counts,
                max_new_tokens=o.max_new_tokens, temperature=o.temperature, top_p=o.top_p,
                top_k=o.top_k, stop_ids=stop_ids, seed=o.seed,
                stream_ids=[stream(1, q.index) for q in plain]
                + [stream(2, q.index * o.n_off + j) for q, j, _ in demo], sampler=run.sampler,
                progress=runs.say_sampling(say, sum(counts)),
                stop_at=builder.stop_at[:1] * len(plain) + builder.stop_at[1:] * len(demo))

        rows = [(q, False, q.prompt) for q in plain for _ in range(o.n_on)]
        rows += [(q, True, prompt) for q, _, prompt in demo]
        found = icpo.implicit_expert_forcing(policy, [prompt for *_, prompt in demo])
        return [end_response(Response(*row, c.tokens, c.logprobs, c.finished, ""), run)
                for row, c in zip(rows, found, strict=True)]

    with behaviour_policy(run) as model:
        responses = sample(questions, demo if o.off_policy_when == "always" else [])
        if o.off_policy_when == "all-wrong":   # a question with a right response gets none
            right = icpo.expert_region(score_responses(run, responses), torch.ones(len(responses)),
                                       o.delta, o.errs_strict)
            solved = {responses[i].question.index for i in right.nonzero()[:, 0].tolist()}
            responses += sample([], [each for each in demo if each[0].index not in solved])
    for q in questions if o.off_policy == "dataset" else ():
        if q.index not in solved:   # LUFFY's denominator is 1, a log-probability of 0
            tokens = builder.expert_response(q.problem)
            responses.append(Response(q, True, q.prompt, tokens, [0.0] * len(tokens), True,
                                      builder.response_text(tokens, stop_ids)))
    return sorted(responses, key=lambda r: (r.question.index, r.off_policy))


@contextlib.contextmanager
def behaviour_policy(run: Run):
    """Yields θ_old as a whole model, then frees the sampler's memory unless graphs use it again."""
    model, run.sampler.work = run.whole_model(), Work()
    yield model
    if run.device.type == "cpu" or model is not run.model and not run.sampler.keeps:
        run.sampler.release()


def score_responses(run: Run, responses: list[Response]) -> Tensor:
    """Step 3: the rewards R(τ), [B] float64; run.notes is what could not be settled."""
    new = [r for r in responses if r.reward is None]
    rewards = run.scorer([r.text for r in new], [r.question.problem for r in new]) if new else []
    for response, reward in zip(new, rewards, strict=True):
        response.reward = reward
    return torch.tensor([r.reward for r in responses], dtype=torch.float64)


def form_groups(run: Run, responses: list[Response], rewards: Tensor, step: int) -> Batch:
    """Steps 3 and 4: which responses form each mixed group, and their advantages."""
    o = run.options
    group = torch.tensor([r.question.index for r in responses])
    off_policy = torch.tensor([r.off_policy for r in responses])
    region = icpo.expert_region(rewards, off_policy, o.delta, o.errs_strict)              # (ERRS)
    accepted = region if o.errs else torch.ones_like(region)
    bonus = icpo.annealed_bonus(step, o.bonus_steps, o.alpha, o.bonus_decay) if o.rs else 0.0
    draws = {i: random.Random(f"replace {o.seed} {step} {i}") for i in set(group.tolist())}
    priority = torch.tensor([draws[i].random() for i in group.tolist()], dtype=torch.float64)
    keep = icpo.mix_groups(off_policy, group, accepted, priority, o.group)
    shaped = icpo.shaped_rewards(rewards, off_policy, region, bonus)                      # (RS)
    advantages = icpo.group_advantages(shaped, group, keep, o.advantage_eps, o.std_unbiased,
                                       o.advantage_std)                                   # (ADV)
    return Batch(responses, group, off_policy, rewards, accepted, keep, advantages, bonus)


def update(run: Run, batch: Batch) -> dict[str, float]:
    """Step 4 for one mini-batch: (ICPO), its gradient, and an optimiser step, if both are finite.

    Returns sums and maxima over all processes, the norm of the gradient, and whether it `skipped`.
    """
    o = run.options
    rows = [r.row(advantage) for r, _, _, keep, advantage in batch.rows()
            if keep and (r.finished or not o.mask_truncated)]
    # Without a KL term or an entropy bonus, a row whose advantage is 0 has no gradient. Where Z is
    # that of a micro-batch, rows with and without a gradient stay together.
    every = o.kl_coef + o.entropy_coef > 0 or o.normalizer != "batch"
    parts = distributed.share_rows(rows, [len(row.prompt) + len(row.tokens) for row in rows],
                                   [every or row.advantage != 0 for row in rows],
                                   o.micro_batch_tokens)
    totals, size = distributed.Totals(), distributed.Totals()
    size.add(tokens=sum(len(row.tokens) for row in rows), rows=len(rows),
             parts=sum(bool(micro) for micro, _ in parts))
    size = size.over_processes()
    share = 1.0 if o.normalizer == "batch" else 1.0 / max(size["parts"], 1)
    total = {"tokens": size["tokens"], "sequences": size["rows"],
             "fixed": size["rows"] * o.max_new_tokens}[o.loss_aggregation]
    prepare_gradients(run.model, run.device)
    for micro, learns in distributed.passes(run.model, parts, run.weights_stay):
        prompts, tokens, old, off_policy, advantages = map(list, zip(*(micro or [NOTHING])))
        packing = pack(prompts, tokens, run.device)
        old, off_policy, advantages = (to_device(torch.tensor(each), run.device) for each in (
            [logprob for row in old for logprob in row], off_policy, advantages))
        mask = packing.mask & bool(micro)                                                  # [B, R]
        old_logprobs, = to_rows(packing.mask, old)                                         # [B, R]
        lengths = mask.sum(1, keepdim=True).clamp(min=1)                                   # [B, 1]
        weights = mask / (lengths if o.loss_aggregation == "sequences" else 1)             # [B, R]
        Z = (weights.new_full((), total) if o.normalizer == "batch" else weights.sum()).clamp(min=1)
        logprobs, entropy = response_logprobs(run.model, packing, o.temperature, gradient=learns,
                                              entropy_gradient=o.entropy_coef > 0)         # [B, R]
        ref_logprobs = None if run.reference is None else response_logprobs(
            run.reference, packing, o.temperature, gradient=False)[0]                      # [B, R]
        loss, metrics = icpo.icpo_loss(                                                    # (ICPO)
            logprobs, old_logprobs, advantages, weights, off_policy, clip_low=o.clip_low,
            clip_high=o.clip_high, shaping_lambda=o.shaping_lambda if o.shaping else None,
            off_policy_denominator=o.off_policy_denominator or "behaviour",
            normalizer=Z, dual_clip=o.dual_clip or None, ref_logprobs=ref_logprobs,
            kl_coef=o.kl_coef, clip_off_policy=o.clip_off_policy,
            log_ratio_clamp=o.log_ratio_clamp or None)
        loss = loss - o.entropy_coef * (entropy * weights).sum() / Z if o.entropy_coef else loss
        if learns:   # FSDP averages over the processes, and Z is already that of all of them
            (loss * share * distributed.world_size()).backward()
        on_policy = mask & ~off_policy[:, None]
        gap = (logprobs.detach() - old_logprobs) * on_policy                               # [B, R]
        ratio = gap.exp()
        totals.maximum(ratio_max=metrics.pop("ratio_max"), logprob_gap=gap.abs().max())
        totals.add(**{name: value * share for name, value in metrics.items()},
                   entropy=(entropy.detach() * on_policy).sum(), on_policy=on_policy.sum(),
                   beyond=(ratio != ratio.clamp(1 - o.clip_low, 1 + o.clip_high)).sum(),
                   cells=sum(bucket.numel() for bucket in packing.buckets),
                   padding=packing.padding, shared=packing.shared)
    norm = distributed.clip_gradients(run.model, o.grad_clip)
    found = totals.over_processes() | {"grad_norm": norm}
    if o.loss_aggregation == "fixed":   # these are shares of tokens, or means over them
        for name in ("kl", "clip_fraction", "clip_fraction_off", "off_policy_share"):
            found[name] *= total / max(size["tokens"], 1)
    found["skipped"] = not math.isfinite(found["policy_loss"] + norm)
    if not found["skipped"]:
        run.optimizer.step()
    run.optimizer.zero_grad()
    return found


# A dummy for a process that has no rows left while others have; the update masks it.
_DUMMY = Response(Question(0, Problem("", ""), [0], []), False, [0], [0], [0.0], True, "", 0, [0])
NOTHING = _DUMMY.row(0.0)


def recompute_logprobs(run: Run, responses: list[Response]) -> float:
    """Replaces old log-probabilities, except a data set's, by those of a second pass.

    Returns the largest difference to the sampler's, over all processes.
    """
    gaps, o, responses = [0.0], run.options, [r for r in responses if r.sampled]
    for rows in distributed.micro_batches(
            [len(r.behaviour_prompt) + len(r.sampled) for r in responses], o.micro_batch_tokens):
        micro = [responses[i] for i in rows] or [_DUMMY]
        packing = pack([r.behaviour_prompt for r in micro], [r.sampled for r in micro], run.device)
        logprobs, _ = response_logprobs(run.model, packing, o.temperature, gradient=False)
        for r, row in zip(micro, logprobs.tolist() if rows else (), strict=False):
            old, r.old_logprobs = r.old_logprobs, fold(row, r)
            gaps += [abs(a - b) for a, b in zip(old, r.old_logprobs, strict=True)]
    return distributed.largest(distributed.gather_objects(distributed.largest(gaps)))


# --------------------------------------------------------------------------------------------------
# The run around it

def held_out_accuracy(run: Run) -> dict[str, dict[str, float]]:
    """Returns accuracy_of for the answers to the plain problems of each --test-data."""
    o, model = run.options, run.whole_model()
    return {name: accuracy_of(evaluate(
        model, run.builder, problems, samples=o.eval_samples, max_new_tokens=o.max_new_tokens,
        temperature=o.eval_temperature, top_p=o.eval_top_p, top_k=o.eval_top_k, seed=o.seed,
        sampler=run.sampler, scorer=run.scorer), o.eval_samples)
        for name, problems in run.held_out.items()}


def train(run: Run) -> None:
    """Makes all steps from run.start on, or until a signal. Errors: see messages_on_exit."""
    o, last = run.options, True
    accuracies, best, skipped = report.read_progress(run)
    with runs.stop_on_signal() as stop, report.step_bar(run) as bar:
        def say(phase: str) -> None:
            bar.set_description(f"{o.method}, {phase}")

        def evaluate_now(step: int) -> dict[str, float]:
            say("evaluating")
            stop.at_once, ending = step == 0, "" if step else "_before"   # nothing is lost at 0
            found = report.evaluation_row(held_out_accuracy(run), ending)
            stop.at_once = False
            accuracies.append(found[f"eval_accuracy{ending}"])
            return found

        for step in range(run.start, o.steps):
            before = evaluate_now(0) if step == 0 and o.eval_every else {}
            metrics, batch = train_step(run, step, say)
            last = step + 1 == o.steps
            if o.eval_every and (last or (step + 1) % o.eval_every == 0):
                before |= evaluate_now(step + 1)
                best = report.keep_best(run, accuracies[-1], best)
            report.write_rows(run, batch, metrics | before)
            report.show(bar, metrics, accuracies)
            skipped = skipped + 1 if report.unchanged(o, metrics) else 0
            # The signal may have reached one process alone.
            stopped = skipped >= o.max_skipped or any(distributed.gather_objects(stop.received))
            if stopped or o.checkpoint_every and (last or (step + 1) % o.checkpoint_every == 0):
                say("saving")
                runs.save_checkpoint(run.folder, run.model, run.optimizer, step + 1,
                                     o.keep_checkpoints)
                report.draw_curves(run, last)
            bar.update()
            if stopped:
                break
        if skipped >= o.max_skipped:
            raise runs.NotFinite(skipped, run.folder)
        say("done" if last else "stopped")
    if last:
        run.save("final")
        report.say_results(run)
    else:
        report.say_stopped(run, step + 1)


def main() -> None:
    runs.begin_program()
    try:
        run = prepare(sys.argv[1:])
    except (ValueError, OSError) as error:
        end_with_mistake("train.py", error)
    with runs.messages_on_exit(run.folder):
        train(run)


if __name__ == "__main__":
    main()
