"""Records what training and evaluation compute, so that a change can be shown to change nothing.

    python tests/golden.py before.json                  # record: every case below, on this machine
    python tests/golden.py after.json --against before.json
    python tests/golden.py now.json --only luffy eval   # cases whose names have one of these words

Each case runs train.py or eval.py with fixed seeds on the CPU, in processes of one thread. The
script records metrics.jsonl without the fields that depend on the clock, samples.jsonl, a hash of
the final weights, the samples of an evaluation and its table. --against compares to the last bit,
lists the first difference in each part and exits with status 1 if there is one. Another machine or
PyTorch release rounds differently, so both recordings must come from the same one. --root records
another checkout.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))
from processes import ROOT, run

CLOCK = {"step_seconds", "rollout_seconds", "reward_seconds", "update_seconds",
         "tokens_per_second", "prefill_seconds", "decode_seconds"}
BASE = ("--batch-size 4 --n-on 4 --eval-problems 16 --steps 3 --eval-every 2 --checkpoint-every 2 "
        "--kl-coef 0.01 --device cpu")
# With a second mini-batch, a high learning rate and wrong off-policy responses, ratios differ from
# 1, so each option of the objective changes the result.
OBJECTIVE = ("--method icpo-rs --mini-batch-size 2 --learning-rate 1e-3 --errs false "
             "--max-new-tokens 30")
REWARD = '''
def part(responses, problems):
    return [len(text) % 7 / 7 for text in responses]
'''

TRAINING = {   # name: (options, processes)
    **{method: (f"--method {method}", 1) for method in ("grpo", "luffy", "icpo", "icpo-rs")},
    **{f"{method} on 2": (f"--method {method}", 2)
       for method in ("grpo", "luffy", "icpo", "icpo-rs")},
    "mini-batches": ("--mini-batch-size 2", 1),
    "mini-batches on 2": ("--mini-batch-size 2 --micro-batch-tokens 600", 2),
    "append": ("--group append --n-on 3 --errs false", 1),
    "append on 2": ("--method icpo-rs --group append --max-new-tokens 30", 2),
    "bfloat16": ("--dtype bfloat16", 1),
    "bfloat16 on 2": ("--dtype bfloat16", 2),
    "recompute cheap": ("--recompute-activations cheap --micro-batch-tokens 600", 1),
    "recompute all": ("--recompute-activations all --micro-batch-tokens 600", 1),
    "moments in bfloat16": ("--optimizer-state bfloat16", 1),
    "second pass": ("--old-logprobs recompute --top-p 0.9 --top-k 20 --mini-batch-size 2", 1),
    "own reward": ("--reward reward.py:part --delta 0.5", 1),
    "pairs of 4": ("--shard-size 2", 4),
    "prompts": ("--num-demonstrations 2 --n-off 2 --demo-chat-template false "
                "--instruction Think.", 1),
    "no chat template": ("--chat-template false --demo-chat-template false --demo-min-chars 20", 1),
    "sampling": ("--temperature 0.7 --slots 3 --eval-temperature 0 --eval-samples 2", 1),
    "optimiser": ("--weight-decay 0.5 --grad-clip 0.1 --seed 7", 1),
    **{f"objective: {options}": (f"{OBJECTIVE} {options}", 1) for options in (
        "", "--clip-low 0.05", "--clip-high 0.01", "--clip-off-policy false", "--dual-clip 1.05",
        "--log-ratio-clamp 0.1", "--normalizer micro-batch --micro-batch-tokens 560",
        "--advantage-eps 0.5", "--std-unbiased false", "--kl-coef 0", "--shaping false",
        "--shaping-lambda 0.5", "--off-policy-denominator one", "--errs true --errs-strict true",
        "--errs true --delta 0", "--alpha 2", "--bonus-decay cosine", "--bonus-decay exponential",
        "--bonus-steps 9", "--loss-aggregation sequences", "--loss-aggregation fixed",
        "--mask-truncated true", "--entropy-coef 0.1", "--advantage-std false",
        "--off-policy-when all-wrong", "--lr-schedule cosine --lr-warmup-steps 1",
        "--adam-beta1 0.5 --adam-beta2 0.9 --adam-eps 1e-3", "--stop } --system Add.",
        "--demo-format turns", "--eval-top-p 0.5 --eval-top-k 3")},
    "luffy release": ("--method luffy-release", 1),
}
RESUMED = {"resumed": 1, "resumed on 2": 2}   # name: processes; a run of 2 steps goes on to step 4
EVALUATION = {   # name: (options, processes)
    "eval": ("--shots 0 1 2 --samples 2 --limit 30", 1),
    "eval on 2": ("--shots 0 1 --limit 30 --k 1", 2),
    "eval, pilot": ("--compare-shots --limit 40 --temperatures 1.4", 1),
    "eval, settings": ("--shots 1 --limit 20 --temperature 0.7 --top-p 0.9 --top-k 20 --seed 3 "
                       "--samples 3 --k 1 2 --demo-chat-template false --answer-format tags", 1),
}


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def record(root: Path, name: str) -> dict:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "reward.py").write_text(REWARD)
        if name in EVALUATION:
            options, processes = EVALUATION[name]
            said = run("eval.py", *options.split(), "--device", "cpu", "--output", "e.jsonl",
                       processes=processes, cwd=folder, root=root).stdout
            about = json.loads((folder / "e.json").read_text())
            return {"samples": lines_of(folder / "e.jsonl"), "rows": about["rows"],
                    "comparison": about.get("comparison"),
                    "table": [line for line in said.splitlines()
                              if line.startswith(("tiny ", "On tiny"))]}
        stages = [TRAINING[name]] if name in TRAINING else [
            ("--steps 2", RESUMED[name]), ("--steps 4 --resume", RESUMED[name])]
        for options, processes in stages:
            run("train.py", *BASE.split(), *options.split(), "--output-dir", "run",
                processes=processes, cwd=folder, root=root)
        weights = (folder / "run/final/model.safetensors").read_bytes()
        return {"weights": hashlib.sha256(weights).hexdigest(),
                "samples": lines_of(folder / "run/samples.jsonl"),
                "metrics": [{key: value for key, value in row.items() if key not in CLOCK}
                            for row in lines_of(folder / "run/metrics.jsonl")]}


def differences(before, after, where: str):
    """Yields a line for the first difference in each part."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(before.keys() | after.keys(), key=str):
            yield from differences(before.get(key), after.get(key), f"{where}, {key}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for number, pair in enumerate(zip(before, after, strict=True)):
            found = list(differences(*pair, f"{where}, {number}"))
            if found:
                yield from found
                return
    elif before != after or type(before) is not type(after):
        yield f"{where}: {str(before)[:200]} became {str(after)[:200]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="JSON file to write")
    parser.add_argument("--against", type=Path, help="a recording to compare with")
    parser.add_argument("--only", nargs="+", default=[], help="run the cases whose names have one "
                        "of these words")
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout to run (default: this)")
    options = parser.parse_args()
    names = [name for name in (*TRAINING, *RESUMED, *EVALUATION)
             if not options.only or any(word in name for word in options.only)]
    found = {}
    with ThreadPoolExecutor(2) as pool:
        futures = {name: pool.submit(record, options.root.resolve(), name) for name in names}
        for name, future in tqdm(futures.items(), unit="case"):
            found[name] = future.result()
    options.output.write_text(json.dumps(found, indent=1) + "\n")
    if options.against:
        before = json.loads(options.against.read_text())
        missing = [name for name in names if name not in before]
        lines = [line for name in names
                 for line in differences(before.get(name), found[name], name)]
        print(*lines, f"{len(names)} cases, {len(lines)} differences", sep="\n")
        sys.exit(1 if lines or missing else 0)


if __name__ == "__main__":
    main()
