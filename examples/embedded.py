"""The embedded model (docs/embedded.md) in TRL."""

import sys
from pathlib import Path
from random import Random

from datasets import Dataset
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import Demonstrations, load_problems
from options import INSTRUCTION, TINY
from prompts import DEMO_SEPARATOR, PromptBuilder
from reward import score

MODEL = str(TINY / "model")


def build(trainer, config, output_dir: str = "runs/trl", seed: int = 0, **settings):
    """trainer, config: classes of TRL, or of trl_icpo.py. settings: options of config."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    drawer = Demonstrations(load_problems(TINY / "demonstrations.jsonl"), PromptBuilder(tokenizer),
                            k=1, max_prompt_length=512)
    problems = {p.id: p for p in drawer.admit(load_problems(TINY / "train.jsonl"))}
    rows = [{"prompt": turn(f"{p.problem} {INSTRUCTION}"), "answer": p.answer, "id": p.id}
            for p in problems.values()]
    rng = Random(seed)

    def demo_prompt(row: dict) -> list[dict]:   # [D; q] in one user turn
        drawn, _ = drawer.draw(problems[row["id"]], rng)
        parts = [f"Question: {d.problem} {INSTRUCTION}\nAnswer: {d.solution}" for d in drawn]
        parts.append(f"Question: {row['prompt'][0]['content']}\nAnswer:")
        return turn(DEMO_SEPARATOR.join(parts))

    args = config(**dict(
        output_dir=output_dir, seed=seed, num_generations=8, per_device_train_batch_size=128,
        max_completion_length=48, learning_rate=5e-5, lr_scheduler_type="constant",
        weight_decay=0.01, beta=0.001, use_bias_correction_kl=False, bf16=False,
        gradient_checkpointing=False, max_steps=30, logging_steps=1, save_strategy="no",
        report_to="none") | settings)
    more = {"demo_prompt": demo_prompt} if hasattr(args, "icpo") else {}
    return trainer(MODEL, reward_funcs=reward, args=args, train_dataset=Dataset.from_list(rows),
                   processing_class=tokenizer, **more)


def reward(completions: list[list[dict]], answer: list[str], **_) -> list[float]:
    return score([turns[0]["content"] for turns in completions], answer)


def turn(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def main(trainer, config, **settings) -> None:
    side = build(trainer, config, **settings)
    side.train()
    side.save_model()
    rewards = [entry["reward"] for entry in side.state.log_history if "reward" in entry]
    at = next((i for i, mean in enumerate(rewards, start=1) if mean >= 0.9), None)
    print(f"training reward {rewards[0]:.3f} at step 1, {rewards[-1]:.3f} at step {len(rewards)}; "
          + (f"90 % at step {at}" if at else "never 90 %"))
    print(f"the model is in {side.args.output_dir}")
