"""ICPO in TRL 1.16: in each group, an accepted response to [D; q] replaces one to q.

    python examples/trl_icpo.py        # trains the embedded model
    python examples/trl_icpo.py off    # by TRL's own GRPO
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.utils import gather, gather_object
from trl import GRPOConfig, GRPOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import icpo
from examples.trl_experts import sample_experts

# Options that icpo.py replaces, or that the experts' rows do not fit: other values are refused.
FIXED = dict(loss_type="dapo", scale_rewards="group", importance_sampling_level="token", delta=None,
             multi_objective_aggregation="sum_then_normalize", mask_truncated_completions=False,
             top_entropy_quantile=1.0, off_policy_mask_threshold=None, entropy_coef=0.0,
             use_adaptive_entropy=False, vllm_mode="colocate",
             vllm_importance_sampling_correction=False)


@dataclass
class ICPOConfig(GRPOConfig):
    icpo: bool = True                            # False trains exactly as GRPOTrainer does
    errs_delta: float = 1.0                      # δ of (ERRS); `delta` is another option of TRL
    alpha: float = 0.0                           # α of (RS); above 0 it is ICPO†
    shaping_lambda: float = 0.01                 # λ of f
    off_policy_denominator: str = "behaviour"    # or "one"

    def __post_init__(self):
        super().__post_init__()
        fixed = FIXED | ({"use_bias_correction_kl": False} if self.beta else {})
        wrong = [f"{name}={getattr(self, name)!r} (give {value!r})" for name, value in fixed.items()
                 if getattr(self, name) != value and (self.use_vllm or "vllm" not in name)]
        if self.icpo and wrong:
            raise ValueError(f"ICPO does not work with {', '.join(wrong)}")


class ICPOTrainer(GRPOTrainer):
    """demo_prompt: a function from a row of the data set to [D; q], in the form of `prompt`."""

    def __init__(self, *args, demo_prompt, **named):
        super().__init__(*args, **named)
        self.demo_prompt = demo_prompt
        used = {"tools": self.tools, "environment_factory": self.environment_factories,
                "rollout_func": self.rollout_func, "images": self._is_vlm,
                "router_aux_loss_coef": self.aux_loss_enabled,
                "beta above 0 with an adapter": self.beta and self.ref_model is None}
        if self.args.icpo and any(used.values()):
            raise ValueError(f"ICPO does not work with {', '.join(filter(used.get, used))}")

    def _calculate_rewards(self, *args):
        by_function = super()._calculate_rewards(*args)         # [N, functions], of all processes
        total = (by_function * self.reward_weights.to(by_function)).nansum(1)
        self._rewards = total.where(~by_function.isnan().all(1), torch.nan)                # [N]
        return by_function

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        if not (self.args.icpo and self.model.training):
            return batch
        # A group may span processes, so each process forms all groups and keeps its own B rows.
        B, G, plain_rewards = len(inputs), self.num_generations, self._rewards
        expert_rewards, experts = sample_experts(self, gather_object(inputs)[::G])         # [N/G]
        rewards, N = torch.cat([plain_rewards, expert_rewards]), len(plain_rewards)
        rows = torch.arange(len(rewards), device=rewards.device)
        off_policy, group = rows >= N, torch.where(rows < N, rows // G, rows - N)
        accepted = icpo.expert_region(rewards, off_policy, self.args.errs_delta)           # (ERRS)
        bonus = icpo.annealed_bonus(self.state.global_step, self.state.max_steps, self.args.alpha)
        shaped = icpo.shaped_rewards(rewards, off_policy, accepted, bonus)                 # (RS)
        draw = torch.Generator().manual_seed(self.args.seed + self._step)   # one in all processes
        keep = icpo.mix_groups(off_policy, group, accepted, torch.rand(len(rows), generator=draw))
        advantages = icpo.group_advantages(shaped, group, keep & ~rewards.isnan())         # (ADV)
        mine = rows[:N][B * self.accelerator.process_index:][:B]
        leave = batch["off_policy"] = ~keep[mine]   # these rows now hold the expert of their group
        batch["advantages"] = torch.where(leave, advantages[N + mine // G], advantages[mine])
        # nan stands for the log-probabilities of the update itself, which TRL does not compute.
        batch.setdefault("old_per_token_logps",
                         rewards.new_full(batch["completion_ids"].shape, torch.nan))
        longest = int((experts["completion_mask"][mine // G].sum(1) * leave).max())
        width = max(batch["completion_ids"].shape[1], longest)
        for name, values in experts.items():
            batch[name] = F.pad(batch[name], (0, width - batch[name].shape[1]))            # [B, T]
            batch[name][leave] = F.pad(values, (0, width - values.shape[1]))[mine[leave] // G]
        batch["num_items_in_batch"] = gather(batch["completion_mask"].sum()).sum()
        self._metrics["train"]["icpo/errs_accept_rate"].append(accepted[N:].float().mean().item())
        return batch

    def _compute_loss(self, model, inputs):
        if "off_policy" not in inputs:
            return super()._compute_loss(model, inputs)
        ids, mask = (torch.cat([inputs[f"prompt_{kind}"], inputs[f"completion_{kind}"]], 1)
                     for kind in ("ids", "mask"))
        old, counts = inputs["old_per_token_logps"], inputs["completion_mask"]             # [B, T]
        logps, entropy, _ = self._get_per_token_logps_and_entropies(
            model, ids, mask, old.shape[1], compute_entropy=True)
        parts = self.current_gradient_accumulation_steps
        Z = (inputs["num_items_in_batch"] * parts / self.args.steps_per_generation   # of an update
             / self.accelerator.num_processes)   # because TRL averages gradients over processes
        loss, metrics = icpo.icpo_loss(                                                    # (ICPO)
            logps, old.where(~old.isnan(), logps.detach()), inputs["advantages"], counts,
            inputs["off_policy"], clip_low=self.epsilon_low, clip_high=self.epsilon_high,
            shaping_lambda=self.args.shaping_lambda, normalizer=Z, kl_coef=self.beta,
            off_policy_denominator=self.args.off_policy_denominator,
            ref_logprobs=inputs.get("ref_per_token_logps"))
        metrics["entropy"] = (entropy * counts).sum() / Z
        for name in ("kl", "clip_fraction", "off_policy_share", "entropy"):   # TRL averages parts
            self._metrics["train"][name].append(gather(metrics[name] * parts).mean().item())
        return loss


if __name__ == "__main__":
    from examples.embedded import main
    main(ICPOTrainer, ICPOConfig, icpo="off" not in sys.argv)
