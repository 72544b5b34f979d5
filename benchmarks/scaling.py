"""Measures how the seconds and the memory of a training step grow, and computes what many GPUs do.

    python benchmarks/scaling.py              # measures, prints a table, draws docs/scaling.png
    python benchmarks/scaling.py --simulate   # Qwen3-8B on 8, 64 and 512 H100, from formulas

The measured steps are those of ICPO by train.py on a CPU, with a small model of random weights
whose responses all have the longest length. One thing grows at a time, to 2, 4, 8 and 16 times: the
group size, the length of responses, the vocabulary, the number of demonstrations, or the processes
that share the cores. Each case runs in processes of its own; its time is the least of three steps.
runs/scaling.jsonl holds the finished cases, which are not measured again: delete it to begin anew.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from math import ceil
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from files import append_lines, read_lines
from timing import BANDWIDTH, CARDS, step_seconds
from verify import usable_cores

FACTORS = (1, 2, 4, 8, 16)
# What grows, by its option: (its name in the table, its value in the base case).
AXES = {"n-on": ("responses of a question", 2), "max-new-tokens": ("tokens of a response", 32),
        "vocabulary": ("vocabulary", 2048), "num-demonstrations": ("demonstrations", 1),
        "processes": ("processes on the same cores", 1)}
BASE = {axis: value for axis, (_, value) in AXES.items()}
STEPS = 3
PARTS = {"seconds": "step", "rollout": "rollout", "update": "update"}
# Of the simulation. A machine has 8 GPUs and, for each, a network card of 400 Gbit/s. LATENCY is
# the time in seconds of a sum over the GPUs of a machine, without that of its bytes.
NETWORK, MACHINE, LATENCY = 50e9, 8, 10e-6


# --------------------------------------------------------------------------------------------------
# Measured

def write_model(folder: Path, vocabulary: int) -> None:
    """Writes a folder with a model of random weights and the tokenizer of the embedded model."""
    import torch

    from model_utils import ModelConfig, Transformer, load_model, save_model
    like, tokenizer = load_model(ROOT / "tiny" / "model", "meta")
    hf = type(like.hf_config)(
        vocab_size=vocabulary, hidden_size=256, intermediate_size=768, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=4096,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, architectures=["Qwen3ForCausalLM"])
    torch.manual_seed(0)
    model = Transformer(ModelConfig.from_hf(hf))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    model.hf_config, model.generation_config = hf, like.generation_config
    save_model(model, tokenizer, folder)


def measure(job: dict) -> None:
    """Runs in each process of a case. Rank 0 prints {seconds, rollout, update, bytes} as JSON."""
    import time

    import torch

    import train as trainer
    from benchmarks.rollout import peak_resident
    from distributed import gather_objects, is_main
    from machine import own_memory
    own = own_memory(torch.device("cpu"))
    run = trainer.prepare([
        "--model", job["model"], "--device", "cpu", "--batch-size", "16", "--max-prompt-length",
        "2048", "--recompute-activations", "none", "--steps", "99", "--eval-every", "0",
        "--output-dir", job["output"], *(
            part for name in ("n-on", "max-new-tokens", "num-demonstrations")
            for part in (f"--{name}", str(job[name])))])
    run.model.stop_ids = ()
    found = []
    for step in range(STEPS + 1):   # one to warm up
        started = time.perf_counter()
        metrics, _ = trainer.train_step(run, step, lambda phase: None)
        found.append({"seconds": time.perf_counter() - started,
                      "rollout": metrics["rollout_seconds"], "update": metrics["update_seconds"]})
    taken = sum(gather_objects(peak_resident() - own))
    if is_main():
        print(json.dumps(min(found[1:], key=lambda each: each["seconds"]) | {"bytes": taken}))


def run_case(case: dict, scratch: Path) -> dict:
    model = scratch / f"model-{case['vocabulary']}"
    if not model.exists():
        write_model(model, case["vocabulary"])
    with tempfile.TemporaryDirectory(dir=scratch) as output:
        job = case | {"model": str(model), "output": f"{output}/run"}
        threads = max(1, usable_cores() // case["processes"])
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
             str(case["processes"]), __file__, "--job", json.dumps(job)], capture_output=True,
            text=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    if done.returncode:
        sys.exit(f"{case} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_all(file: Path) -> dict[str, list[dict]]:
    """{axis: what each of FACTORS measured}. file: the finished cases."""
    cases = {axis: [BASE | {axis: value * n} for n in FACTORS] for axis, value in BASE.items()}
    distinct = {json.dumps(case): case for each in cases.values() for case in each}
    found = {json.dumps(row["case"]): row for row in (read_lines(file) if file.exists() else ())}
    with tempfile.TemporaryDirectory() as scratch:
        for key, case in tqdm(distinct.items(), unit="case"):
            if key not in found:
                found[key] = run_case(case, Path(scratch)) | {"case": case}
                append_lines(file, [found[key]])
    return {axis: [found[json.dumps(case)] for case in each] for axis, each in cases.items()}


def table(results: dict[str, list[dict]]) -> str:
    """Seconds and memory as multiples of the base case, in Markdown."""
    base = results["n-on"][0]
    lines = [f"Base: {', '.join(f'{name}: {value}' for name, value in AXES.values())}. It takes "
             f"{base['seconds']:.2f} s ({base['rollout']:.2f} rollout, {base['update']:.2f} "
             f"update) and {base['bytes'] / 1e6:.0f} MB beside Python and its libraries.", "",
             "| times the base | | " + " | ".join(map(str, FACTORS)) + " |",
             "|---" * (2 + len(FACTORS)) + "|"]
    for axis, found in results.items():
        for key, label in (PARTS | {"bytes": "memory"}).items():
            lines.append(f"| {AXES[axis][0]} | {label} | " + " | ".join(
                f"{each[key] / base[key]:.2f}" for each in found) + " |")
    return "\n".join(lines)


def draw(results: dict[str, list[dict]], output: Path) -> None:
    """Writes a PNG: a column for each axis, seconds above and memory below, both logarithmic."""
    import matplotlib
    matplotlib.use("Agg")   # no screen needed
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    from curves import COLOURS, STYLES
    figure, axes = plt.subplots(2, len(AXES), figsize=(3 * len(AXES), 6), layout="constrained",
                                sharex=True, sharey="row")
    for column, (axis, found) in enumerate(results.items()):
        for row, parts in enumerate((PARTS, {"bytes": "memory"})):
            panel = axes[row][column]
            for (key, label), colour, style in zip(parts.items(), COLOURS, STYLES, strict=False):
                values = [each[key] / (1 if row == 0 else 1e6) for each in found]
                panel.plot(FACTORS, values, color=colour, linestyle=style, marker="o",
                           markersize=3, label=label)
                if key in ("seconds", "bytes"):
                    panel.plot(FACTORS, [values[0] * n for n in FACTORS], color="grey", lw=0.8,
                               linestyle="--", label="in proportion")
            panel.set(xscale="log", yscale="log", xticks=FACTORS, xticklabels=FACTORS)
            panel.minorticks_off()
            panel.grid(alpha=0.3)
        name, value = AXES[axis]
        axes[0][column].set_title(name)
        axes[1][column].set_xlabel(f"times {value}")
    for row, label in enumerate(("seconds", "MB")):
        axes[row][0].set_ylabel(label)
        axes[row][0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes[row][0].yaxis.set_major_formatter("{x:g}")
    lines = {line.get_label(): line for panel in axes.flat for line in panel.lines}
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=5)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)
    plt.close(figure)


# --------------------------------------------------------------------------------------------------
# Computed

def simulate() -> str:
    """Seconds of a step of configs/qwen3-8b.yaml on H100s, as a Markdown table.

    All responses have 8,192 tokens and all prompts 1,024. Each machine of 8 GPUs has a copy of the
    weights (--shard-size 8). More GPUs get few questions each, at least one of each of the two
    mini-batches, or 16 as in the paper.
    """
    import torch

    from memory import Plan, bytes_per_slot, choose_slots
    from model_utils import ModelConfig
    from options import TrainingOptions, parse_training, resolve
    shape = ModelConfig(
        vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_layers=36, num_heads=32,
        num_kv_heads=8, head_dim=128, norm_eps=1e-6, rope_theta=1e6, rope_scaling=None,
        max_position=40960, tie_embeddings=False, qkv_bias=False, out_bias=False, mlp_bias=False,
        qk_norm=True)
    card = CARDS[0]
    size, network = card.size * 2.0 ** 30, BANDWIDTH * NETWORK
    one = replace(card, bfloat16=MACHINE * card.bfloat16, memory=MACHINE * card.memory)
    config = str(ROOT / "configs" / "qwen3-8b.yaml")
    given: TrainingOptions = resolve(parse_training([config, "--max-prompt-length", "1024"]))
    length = given.max_prompt_length + given.max_new_tokens
    slot = bytes_per_slot(shape, length, torch.bfloat16)
    lines = ["| GPUs | questions | prefill | decode | update | communication | sum, s | tokens/s "
             "of a GPU | decode, 8 GPUs as one |", "|---" * 9 + "|"]
    updates = 2
    for gpus, batch in [(8, 128), (64, 128), (512, 1024), (64, 1024), (512, 8192)]:
        machines, sequences = gpus // MACHINE, batch // gpus * (given.n_on + given.n_off)
        # One machine and its part of the questions; the others do the same.
        options = replace(given, batch_size=batch // machines,
                          mini_batch_size=batch // machines // updates)
        plan = Plan(shape, options, MACHINE, "cuda")
        options.slots = choose_slots(shape, sequences, length, "cuda", torch.bfloat16,
                                     plan.beside_cache, size - 1e9 - plan.weights - plan.reference)
        seconds = step_seconds(plan, card, 1.0)
        summed = 4 * plan.parameters / MACHINE * 2 * (machines - 1) / machines
        seconds["communication"] += updates * summed / network
        # An engine that splits each product over the 8 GPUs of a machine reads the weights once for
        # all their sequences. It waits twice a layer until the parts are summed.
        weights = plan.width * plan.parameters
        slots = int((MACHINE * 0.9 * size - weights) // slot)
        engine = replace(plan, processes=1, options=replace(options, slots=slots))
        rounds = ceil(MACHINE * sequences / slots)
        moved = (plan.width * MACHINE * sequences / rounds * shape.hidden_size
                 * 2 * (MACHINE - 1) / MACHINE)
        split = step_seconds(engine, one, 1.0)["decode"] + (
            rounds * given.max_new_tokens * 2 * shape.num_layers
            * (LATENCY + moved / (BANDWIDTH * card.link)))
        total = sum(seconds.values())
        tokens = batch * (given.n_on + given.n_off) * given.max_new_tokens / total / gpus
        lines.append(f"| {gpus} | {batch:,} | " + " | ".join(
            f"{value:,.1f}" for value in (*seconds.values(), total)) + f" | {tokens:,.0f} | "
            f"{split:,.1f} |")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# The command

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "scaling.png",
                        help="PNG to draw (default: %(default)s)")
    parser.add_argument("--simulate", action="store_true", help="measure nothing; compute what 8, "
                        "64 and 512 H100 do")
    parser.add_argument("--job", help="settings that this script passes to its processes")
    options = parser.parse_args()
    if options.job:
        measure(json.loads(options.job))
    elif options.simulate:
        print(simulate())
    else:
        (ROOT / "runs").mkdir(exist_ok=True)
        results = measure_all(ROOT / "runs" / "scaling.jsonl")
        draw(results, options.output)
        print(table(results), options.output, sep="\n")


if __name__ == "__main__":
    main()
