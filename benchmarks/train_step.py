"""Times a whole training step (rollout, reward, update) here and in TRL's GRPOTrainer. Both train
by GRPO without a KL term with the same weights, prompts, group size and lengths, one after the
other in processes of their own.

    pip install -r benchmarks/requirements.txt
    python benchmarks/train_step.py --model path/to/a/model --check   # Hugging Face folder or name
    python benchmarks/train_step.py --model qwen3-1.7b-shape --dtype bfloat16 --prompts 8 \\
        --prompt-length 1024 --max-new-tokens 1024
    python benchmarks/train_step.py --communication   # bytes that a GPU receives in a step

Prints a table and then a line with every figure as name=value. TRL runs twice, with gradient
checkpointing (its default) and without; the table has the time of the faster run and the memory of
the leaner one. Peak memory is that of the whole process, with weights and optimiser. The update is
compared with the rate of a large matrix product measured here. The column "halved" is the time of
an update in which all rewards are equal in half of the groups, over that of the others, as if both
had responses of the same lengths.
"""

import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train as trainer
from benchmarks.rollout import (
    QWEN3_1_7B,
    Case,
    block_weights,
    find_stop_ids,
    measure_machine,
    peak_resident,
    report,
    synchronise,
)
from hf_folders import find_folder
from machine import own_memory
from memory import Plan, bytes_per_slot, count_parameters
from model_utils import ModelConfig, load_model
from options import TINY, DType, OptionParser, option
from reward import score
from timing import communication

# The targets of --check for a real model: (figure, at least or at most, bound).
TARGETS = {
    "cpu": [("equal_time_ratio", "<=", 0.65), ("varying_time_ratio", "<=", 0.45),
            ("equal_memory_ratio", "<=", 0.7), ("varying_memory_ratio", "<=", 0.7)],
    "cuda": [("equal_update_share", ">=", 0.45)],
}
# The memory that memory.py computes, over that measured.
ESTIMATE = [("equal_estimate_ratio", ">=", 0.85), ("equal_estimate_ratio", "<=", 1.15)]
SIDES = {"here": {}, "trl": {"gradient_checkpointing": True},
         "trl_plain": {"gradient_checkpointing": False}}


@dataclass
class Options:
    model: str = option("tiny", "folder in Hugging Face format, hub name, tiny, or "
                        "qwen3-1.7b-shape (random weights)")
    prompts: int = option(4, "questions in a step, with 8 responses each")
    prompt_length: int = option(64, "tokens of a prompt, which consists of random words")
    max_new_tokens: int = option(64, "longest response in tokens")
    steps: int = option(2, "timed steps, after one step that is not timed; as many follow in which "
                        "all rewards are equal in half of the groups")
    micro_batch_tokens: int = option(1024, "as in train.py, but at least one sequence; TRL takes 8 "
                                     "sequences at a time, its default")
    recompute_activations: Literal["none", "cheap", "all"] = option("all", "as in train.py")
    check: bool = option(False, "exit with status 1 if a target is missed")
    communication: bool = option(False, "print the bytes that GPUs exchange; do not time anything")
    dtype: DType = option("float32", "type of the computation; master weights are float32")
    device: str = option("auto", "auto (a GPU if there is one), cpu or cuda")
    seed: int = option(0, "seed of prompts, stop ids and sampling")
    job: str = option("", "settings that this script passes to the processes that it starts")


# --------------------------------------------------------------------------------------------------
# The two sides; each runs in its own process and returns {seconds, tokens, ...} of the timed steps

def rewards(texts: list[str], equal_groups: int = 0) -> list[float]:
    """Scores the responses, 8 to a question, for the time that this takes, and returns other
    rewards: the same in each of the first groups, different within the others. Random responses are
    all wrong, so no group would have a gradient."""
    score(texts, ["0"] * len(texts))
    return [float(i // 8 >= equal_groups and i % 2) for i in range(len(texts))]


def run_here(job: dict) -> dict:
    folder, device = Path(job["folder"]), torch.device(job["device"])
    own = own_memory(device)
    run = trainer.prepare([
        "--method", "grpo", "--kl-coef", "0", "--model", job["model"], "--train-data",
        str(folder / "train.jsonl"), "--test-data", str(folder / "test.jsonl"), "--instruction=",
        "--chat-template", "false", "--demo-format", "text", "--batch-size",
        str(job["prompts"]), "--max-prompt-length", str(job["prompt_length"]), "--max-new-tokens",
        str(job["max_new_tokens"]), "--steps", "99", "--eval-every", "0", "--micro-batch-tokens",
        str(max(job["micro_batch_tokens"], job["prompt_length"] + job["max_new_tokens"])),
        "--dtype", job["dtype"], "--recompute-activations", job["recompute_activations"],
        "--device", job["device"], "--seed", str(job["seed"]),
        "--output-dir", str(folder / f"run-{job['case']}")])
    run.model.stop_ids = tuple(job["stop_ids"])
    results, steps = [], job["steps"]
    for step in range(2 * steps + 1):
        equal_groups = job["prompts"] // 2 if step > steps else 0
        run.scorer = lambda texts, _, equal=equal_groups: rewards(texts, equal)
        synchronise(run.device)
        started = time.perf_counter()
        metrics, batch = trainer.train_step(run, step, lambda phase: None)
        rows = batch.responses
        synchronise(run.device)
        results.append({"seconds": time.perf_counter() - started,
                        "tokens": sum(len(row.tokens) for row in rows),
                        **{name: metrics[f"{name}_seconds"]
                           for name in ("rollout", "reward", "update")},
                        "operations": update_operations(run.model.config, rows)})
    length = run.options.max_prompt_length + run.options.max_new_tokens
    cache = run.options.slots * bytes_per_slot(run.model.config, length,
                                               getattr(torch, job["dtype"]))
    plan = Plan(run.model.config, run.options, 1, device.type, own)
    # On a GPU the sampler's copy and cache stay during the update where they have room.
    staying = sum(plan.update(0).values()) + plan.gathered + cache if run.sampler.keeps else 0
    timed, halved = results[1:steps + 1], results[steps + 1:]
    return {name: sum(each[name] for each in timed) for name in results[0]} | {
        "halved": sum(each["update"] for each in halved) * sum(
            each["operations"] for each in timed) / sum(each["operations"] for each in halved),
        "estimate": max(plan.peak(cache), staying)}


def update_operations(config: ModelConfig, rows) -> float:
    """Returns how many multiplications and additions these rows' gradient needs, without
    recomputation. All but attention computes a prompt once for the rows of its question."""
    c, prompts = config, {row.question: len(row.question.prompt) for row in rows}
    responses = sum(len(row.tokens) for row in rows)
    positions = sum(prompts.values()) + responses - len(rows)
    attended = sum((len(row.question.prompt) + len(row.tokens)) ** 2 / 2 for row in rows)
    return (6 * c.num_layers * block_weights(c) * positions
            + 6 * c.vocab_size * c.hidden_size * responses
            + 12 * c.num_layers * c.num_heads * c.head_dim * attended)


def run_trl(job: dict) -> dict:
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    device, results = torch.device(job["device"]), []

    class Clock(TrainerCallback):
        def on_step_begin(self, *arguments, **more):
            synchronise(device)
            results.append({"seconds": -time.perf_counter(), "tokens": 0})

        def on_step_end(self, *arguments, **more):
            synchronise(device)
            results[-1]["seconds"] += time.perf_counter()

    def reward(completions, completion_ids, **more):
        results[-1]["tokens"] += sum(map(len, completion_ids))
        return rewards(completions)

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    lines = (Path(job["folder"]) / "train.jsonl").read_text().splitlines()
    texts = [json.loads(line)["problem"] for line in lines]
    side = GRPOTrainer(
        job["model"], reward_funcs=reward, processing_class=tokenizer, callbacks=[Clock()],
        train_dataset=Dataset.from_list([{"prompt": text} for text in texts]),
        args=GRPOConfig(
            output_dir=str(Path(job["folder"]) / "trl"), num_generations=8,
            max_completion_length=job["max_new_tokens"], per_device_train_batch_size=8,
            gradient_accumulation_steps=job["prompts"], max_steps=job["steps"] + 1,
            learning_rate=5e-5, weight_decay=0.01, beta=0.0, temperature=1.0,
            bf16=job["dtype"] == "bfloat16", use_cpu=job["device"] == "cpu",
            dataloader_pin_memory=False, save_strategy="no", report_to="none",
            disable_tqdm=True, logging_steps=1000, seed=job["seed"],
            model_init_kwargs={"dtype": "float32"}, **job["settings"]))
    side.generation_config.eos_token_id = job["stop_ids"] or None
    side.eos_token_ids = job["stop_ids"]
    side.train()
    return {name: sum(each[name] for each in results[1:]) for name in results[0]}


def serve(job: dict) -> None:
    result = (run_here if job["side"] == "here" else run_trl)(job)
    if job["device"] == "cuda":
        result["memory"] = torch.cuda.max_memory_allocated()
    elif sys.platform == "linux":   # ru_maxrss would include the parent's memory.
        result["memory"] = peak_resident()
    else:
        result["memory"] = float("nan")
    print("\n" + json.dumps(result))


# --------------------------------------------------------------------------------------------------

def make_prompts(tokenizer, count: int, length: int, seed: int) -> list[str]:
    """Returns `count` texts of exactly `length` tokens: random words, or digits if the tokenizer
    has no words. Raises ValueError if it does not find enough."""
    draw, texts = random.Random(seed), []
    words = [text for token in range(len(tokenizer))
             if (text := tokenizer.decode([token]))[:1] == " "
             and text[1:].isalpha() and text.isascii()] or list("123456789")
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
    for _ in range(100 * count):
        chosen = draw.choices(words, k=length)
        while len(encode("".join(chosen).strip())) > length:
            chosen.pop()
        text = "".join(chosen).strip()
        if len(encode(text)) == length:
            texts.append(text)
        if len(texts) == count:
            return texts
    raise ValueError(f"no texts of {length} tokens were found for this tokenizer")


def make_random_model(folder: Path) -> None:
    """Saves random weights of Qwen3-1.7B's shape and the tokenizer of the embedded model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    config = Qwen3Config(**QWEN3_1_7B, bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure(options: Options, folder: Path, device: str, bar) -> dict[str, float]:
    if options.model == "qwen3-1.7b-shape":
        make_random_model(folder / "model")
        path = folder / "model"
    else:
        path = TINY / "model" if options.model == "tiny" else find_folder(options.model)
    model, tokenizer = load_model(path, device, getattr(torch, options.dtype))
    texts = make_prompts(tokenizer, options.prompts + 1, options.prompt_length, options.seed)
    for name, chosen in (("train", texts[1:]), ("test", texts[:1])):
        (folder / f"{name}.jsonl").write_text("".join(
            json.dumps({"problem": text, "answer": "0"}) + "\n" for text in chosen))
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in texts[1:]]
    sampled = Case("", prompts, 8, options.max_new_tokens, 8 * options.prompts)
    stop_ids = find_stop_ids(model.requires_grad_(False), sampled, options.max_new_tokens / 4,
                             options.seed)
    del model
    _, rate, _ = measure_machine(torch.device(device), getattr(torch, options.dtype))
    if device == "cuda":   # the processes below need this memory
        torch.cuda.empty_cache()
    figures = {"matmul_gflop_per_second": rate / 1e9}
    for case, stops in (("equal", ()), ("varying", stop_ids)):
        found = {}
        for side, settings in SIDES.items():
            bar.set_description(f"{case}: {side}")
            job = vars(options) | {"side": side, "settings": settings, "case": case,
                                   "stop_ids": stops, "model": str(path), "folder": str(folder),
                                   "device": device}
            process = subprocess.run([sys.executable, __file__, "--job", json.dumps(job)],
                                     capture_output=True, text=True)
            if process.returncode:
                raise ValueError(f"{side} failed:\n{process.stderr[-3000:]}")
            found[side] = json.loads(process.stdout.splitlines()[-1])
            bar.update()
        here, trl = found["here"], [found["trl"], found["trl_plain"]]
        fastest = min(trl, key=lambda each: each["seconds"])
        memory = min(each["memory"] for each in trl)
        count = options.steps
        values = {"seconds": here["seconds"] / count, "trl_seconds": fastest["seconds"] / count,
                  "trl_default_seconds": found["trl"]["seconds"] / count,
                  "time_ratio": here["seconds"] / fastest["seconds"],
                  "tokens_per_second": here["tokens"] / here["seconds"],
                  "trl_tokens_per_second": fastest["tokens"] / fastest["seconds"],
                  "mean_length": here["tokens"] / count / (8 * options.prompts),
                  "trl_mean_length": fmean(each["tokens"] for each in trl) / count
                  / (8 * options.prompts),
                  "memory_gb": here["memory"] / 1e9, "trl_memory_gb": memory / 1e9,
                  "memory_ratio": here["memory"] / memory,
                  "estimate_gb": here["estimate"] / 1e9,
                  "estimate_ratio": here["estimate"] / here["memory"],
                  **{f"{name}_seconds": here[name] / count
                     for name in ("rollout", "reward", "update")},
                  "update_share": here["operations"] / here["update"] / rate,
                  "halved_ratio": here["halved"] / here["update"]}
        figures |= {f"{case}_{name}": value for name, value in values.items()}
    return figures


# --------------------------------------------------------------------------------------------------
# Bytes that a GPU receives in a step; it sends as many

SHAPES = {   # Qwen3-1.7B and Qwen3-8B
    "1.7B": ModelConfig(151936, 2048, 6144, 28, 16, 8, 128, 1e-6, 1e6, None, 40960,
                        True, False, False, False, True),
    "8B": ModelConfig(151936, 4096, 12288, 36, 32, 8, 128, 1e-6, 1e6, None, 40960,
                      False, False, False, False, True),
}


def parts_of(config: ModelConfig) -> tuple[int, int]:
    """Returns (parameters in the blocks, parameters elsewhere)."""
    block, rest = count_parameters(config)
    return config.num_layers * block, rest


def print_communication() -> None:
    print("Each GPU receives these GB in a step of one micro-batch in bfloat16 without a reference "
          "model. With HSDP, a replica spans 8 GPUs.")
    print(f"{'model':<7}{'GPUs':>5}  {'sharding':<10}{'rollout':>9}{'forward':>9}{'backward':>9}"
          f"{'gradients':>10}{'sum':>8}")
    for name, config in SHAPES.items():
        for processes in (8, 64, 512):
            for sharding, size in (("all", processes), ("8, HSDP", 8))[:1 if processes == 8 else 2]:
                parts = communication(*parts_of(config), processes, size)
                received = [*parts.values(), sum(parts.values())]
                print(f"{name:<7}{processes:>5}  {sharding:<10}" + "".join(
                    f"{value / 1e9:>{width}.2f}"
                    for value, width in zip(received, (9, 9, 9, 10, 8))))


def main() -> None:
    options = OptionParser(Options, str(__doc__).split("\n\n")[0]).parse(sys.argv[1:])
    if options.job:
        return serve(json.loads(options.job))
    if options.communication:
        return print_communication()
    gpu = options.device == "cuda" or options.device == "auto" and torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    folder = Path(tempfile.mkdtemp(prefix="train_step-"))
    try:
        with tqdm(total=2 * len(SIDES), unit="process", leave=False) as bar:
            figures = measure(options, folder, device, bar)
    except ValueError as error:
        sys.exit(f"benchmarks/train_step.py: error: {error}")
    finally:
        shutil.rmtree(folder)
    import trl
    machine = torch.cuda.get_device_name() if gpu else "CPU"
    print(f"{options.model}, {options.dtype}, {machine}, torch {torch.__version__}, "
          f"trl {trl.__version__}: {figures['matmul_gflop_per_second']:,.0f} GFLOP/s")
    print(f"{'':<9}{'seconds':>9}{'TRL':>9}{'ratio':>7}{'tokens/s':>10}{'TRL':>8}{'peak GB':>9}"
          f"{'estimate':>9}{'TRL':>7}{'ratio':>7}"
          f"{'rollout':>9}{'update':>8}{'of rate':>9}{'halved':>8}{'tokens':>8}{'TRL':>7}")
    for case in ("equal", "varying"):
        f = {name.removeprefix(case + "_"): value for name, value in figures.items()
             if name.startswith(case)}
        print(f"{case:<9}{f['seconds']:>9.2f}{f['trl_seconds']:>9.2f}{f['time_ratio']:>7.2f}"
              f"{f['tokens_per_second']:>10,.0f}{f['trl_tokens_per_second']:>8,.0f}"
              f"{f['memory_gb']:>9.2f}{f['estimate_gb']:>9.2f}{f['trl_memory_gb']:>7.2f}"
              f"{f['memory_ratio']:>7.2f}"
              f"{f['rollout_seconds']:>9.2f}{f['update_seconds']:>8.2f}{f['update_share']:>9.0%}"
              f"{f['halved_ratio']:>8.2f}"
              f"{f['mean_length']:>8.1f}{f['trl_mean_length']:>7.1f}")
    report(figures, ESTIMATE + ([] if options.model == "tiny" else TARGETS[device]), options.check)


if __name__ == "__main__":
    main()
