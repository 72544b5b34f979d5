"""Measures everything that needs a GPU; it is meant to take less than ten minutes on one H100.

    python benchmarks/gpu.py                      # prints a table, writes gpu.md and gpu.json
    python benchmarks/gpu.py --parts rollouts update

Parts, each in a process of its own: a part that fails says why in its row, and the others go on.
- tests: the tests marked gpu.
- rollouts: Qwen3-1.7B's shape with random weights, bfloat16, 64 and 256 cache slots, beside
  transformers' generate.
- update: the gradient of 64 sequences of 2,048 tokens, and its peak memory beside the estimate.
- vocabulary: the log-probabilities of 16,384 tokens with a vocabulary of 151,936, and their
  gradient.
- types: how far the log-probabilities of sampler and trainer are apart in float32 and in bfloat16.
- default: the run of the embedded model, as `python train.py` makes it.
"""

import contextlib
import gc
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train as trainer
from benchmarks import rollout as rollouts
from benchmarks.rollout import Case, best_time, measure_machine
from benchmarks.train_step import update_operations
from curves import read_metrics, series
from data import Problem
from memory import Plan
from model_utils import pack, response_logprobs
from options import TINY, OptionParser, option
from rollout import Sampler

DEVICE = torch.device("cuda")


class Figure(NamedTuple):
    part: str
    name: str
    value: float | None      # None: the part failed
    unit: str = ""
    target: str = ""         # ">= 0.6"; "" where there is none
    note: str = ""

    @property
    def met(self) -> bool | None:
        if self.value is None or not self.target:
            return None
        how, bound = self.target.split()
        return self.value >= float(bound) if how == ">=" else self.value <= float(bound)


@dataclass
class Options:
    parts: list[str] = option(["tests", "rollouts", "update", "vocabulary", "types", "default"],
                              "the parts to run")
    output: str = option("gpu", "name of the two files to write, without .md and .json")
    slots: list[int] = option([64, 256], "numbers of cache slots of the rollouts")
    max_new_tokens: int = option(512, "tokens of each response in the rollouts")
    sequences: int = option(64, "sequences of the update, 8 to a prompt")
    length: int = option(2048, "tokens of each, half of them the prompt's")
    micro_batch_tokens: int = option(8192, "tokens of a micro-batch of the update")
    tokens: int = option(16384, "tokens of the part vocabulary")
    run_options: str = option("", "more options for the run of the part default")
    update_options: str = option("", "more options for the runs of update and vocabulary, such as "
                                 "--compile-blocks true")
    timeout: int = option(300, "seconds after which a part is ended")


# --------------------------------------------------------------------------------------------------
# The parts; each returns figures

def gpu_tests(options: Options, folder: Path) -> list[Figure]:
    done = subprocess.run([sys.executable, "-m", "pytest", "-n", "0", "-q", "-m", "gpu", "tests"],
                          cwd=ROOT, text=True, capture_output=True)
    print(done.stdout[-3000:], done.stderr[-3000:], file=sys.stderr)
    counts = {word: int(count) for count, word in re.findall(
        r"(\d+) (passed|failed|errors?)", "".join(done.stdout.splitlines()[-1:]))}
    passed = counts.pop("passed", 0)
    return [Figure("tests", "passed", passed, "tests", ">= 1"),
            Figure("tests", "failed", sum(counts.values()), "tests", "<= 0",
                   f"pytest's exit status is {done.returncode}")]


def rollouts_beside_generate(options: Options, folder: Path) -> list[Figure]:
    of = rollouts.Options(model="qwen3-1.7b-shape", dtype="bfloat16", slots=options.slots,
                          max_new_tokens=options.max_new_tokens)
    bandwidth, rate, _ = measure_machine(DEVICE, torch.bfloat16)
    model, tokenizer, hf = rollouts.load(of, DEVICE, torch.bfloat16)
    figures = [Figure("rollouts", "bandwidth", bandwidth / 1e9, "GB/s"),
               Figure("rollouts", "matmul rate", rate / 1e12, "TFLOP/s")]
    for case in rollouts.make_cases(of, model, tokenizer, DEVICE):
        if case.stop_ids:   # responses of varying length have no target
            continue
        with tqdm(disable=True) as bar:
            found = rollouts.measure(of, model, hf, case, bandwidth, rate, bar)
        f, slots = {name.removeprefix(f"{case.name}_"): value for name, value in found.items()}, (
            f"{case.slots} slots")
        figures += [
            Figure("rollouts", f"{slots}: speed", f["tokens_per_second"], "tokens/s"),
            Figure("rollouts", f"{slots}: generate", f["transformers_tokens_per_second"],
                   "tokens/s"),
            Figure("rollouts", f"{slots}: ratio to generate", f["ratio"], "", ">= 10"),
            Figure("rollouts", f"{slots}: share of the limit", f["share"], "", ">= 0.6"),
            Figure("rollouts", f"{slots}: peak memory", f["memory_gb"], "GB"),
            Figure("rollouts", f"{slots}: peak memory of generate", f["transformers_memory_gb"],
                   "GB"),
            Figure("rollouts", f"{slots}: log-probability gap, mean", f["logprob_gap_mean"]),
            Figure("rollouts", f"{slots}: log-probability gap, maximum", f["logprob_gap_max"])]
    return figures


def make_run(options: Options, folder: Path) -> trainer.Run:
    """A run of a folder with Qwen3-1.7B's shape and random weights."""
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    config = Qwen3Config(**rollouts.QWEN3_1_7B, bos_token_id=None,
                         eos_token_id=tokenizer.eos_token_id)
    with torch.device(DEVICE):
        hf = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    hf.cpu().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    del hf
    half = options.length // 2
    return trainer.prepare([
        "--model", str(folder / "model"), "--method", "grpo", "--kl-coef", "0", "--dtype",
        "bfloat16", "--batch-size", str(options.sequences // 8), "--max-prompt-length", str(half),
        "--max-new-tokens", str(half), "--micro-batch-tokens",
        str(max(options.micro_batch_tokens, options.length)), "--eval-every", "0", "--device",
        "cuda", "--output-dir", str(folder / "run"), *shlex.split(options.update_options)])


def make_batch(run: trainer.Run, options: Options) -> trainer.Batch:
    """Random prompts and responses, with rewards that differ within each group."""
    half = options.length // 2
    generator = torch.Generator().manual_seed(0)

    def tokens() -> list[int]:
        return torch.randint(run.model.config.vocab_size, (half,), generator=generator).tolist()

    responses = []
    for index in range(options.sequences // 8):
        question = trainer.Question(index, Problem("", ""), tokens(), [])
        # Random tokens have about the probability of a uniform distribution.
        responses += [trainer.Response(question, False, question.prompt, tokens(), [-12.0] * half,
                                       True, "") for _ in range(8)]
    rewards = torch.arange(len(responses), dtype=torch.float64) % 2
    return trainer.form_groups(run, responses, rewards, 0)


def update_of_long_sequences(options: Options, folder: Path) -> list[Figure]:
    _, rate, _ = measure_machine(DEVICE, torch.bfloat16)
    run = make_run(options, folder)
    batch = make_batch(run, options)
    trainer.update(run, batch)   # it allocates the moments
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    trainer.update(run, batch)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    operations = update_operations(run.model.config, batch.responses)
    peak = torch.cuda.max_memory_allocated()
    plan = Plan(run.model.config, run.options, 1, "cuda")
    parts = plan.update(0)
    if run.weights_stay:   # the estimate of the run counts what one pass gathers
        parts["gathered for a pass"] = plan.gathered
    estimated = sum(parts.values())
    return [Figure("update", "seconds", seconds, "s"),
            Figure("update", "share of the matmul rate", operations / seconds / rate, "",
                   ">= 0.45"),
            Figure("update", "peak memory", peak / 1e9, "GB"),
            Figure("update", "estimated peak memory", estimated / 1e9, "GB"),
            Figure("update", "distance of the estimate", abs(estimated / peak - 1), "",
                   "<= 0.15")]


def logprobs_of_a_large_vocabulary(options: Options, folder: Path) -> list[Figure]:
    """Tokens go through the model's head in chunks; all their logits would not fit."""
    run = make_run(options, folder)
    length = min(options.length, options.tokens)
    row = torch.randint(run.model.config.vocab_size, (length,)).tolist()
    packing = pack([row[i:i + 1] for i in range(options.tokens // length)],
                   [row[1:]] * (options.tokens // length), DEVICE)

    def passes() -> None:
        logprobs, _ = response_logprobs(run.model, packing)
        logprobs.sum().backward()
        run.model.zero_grad()

    passes()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    seconds = best_time(passes, DEVICE, 2)
    whole = 4 * packing.targets.numel() * run.model.config.vocab_size
    return [Figure("vocabulary", f"seconds for {options.tokens:,} tokens, forward and backward",
                   seconds, "s"),
            Figure("vocabulary", "peak memory beyond the weights",
                   (torch.cuda.max_memory_allocated() - before) / 1e9, "GB",
                   note=f"all logits in float32 would take {whole / 1e9:.1f} GB")]


def gaps_of_both_types(options: Options, folder: Path) -> list[Figure]:
    figures = []
    for name in ("float32", "bfloat16"):
        dtype = getattr(torch, name)
        of = rollouts.Options(model="qwen3-1.7b-shape", dtype=name)
        model, *_ = rollouts.load(of, DEVICE, dtype)
        draw = torch.Generator().manual_seed(0)
        prompts = torch.randint(model.config.vocab_size, (4, 64), generator=draw).tolist()
        case = Case("", prompts, 8, min(64, options.max_new_tokens), 32)
        sampler = Sampler(model.config, case.slots, 64 + case.max_new_tokens, DEVICE, dtype)
        completions = rollouts.ours(model, case, sampler, 0)
        mean, largest = rollouts.logprob_gap(model, case, completions)
        figures += [Figure("types", f"{name}: log-probability gap, mean", mean),
                    Figure("types", f"{name}: log-probability gap, maximum", largest, "",
                           "<= 0.01" if name == "float32" else "")]
        del model, sampler, _
        gc.collect()
        torch.cuda.empty_cache()
    return figures


def default_run(options: Options, folder: Path) -> list[Figure]:
    started = time.perf_counter()
    run = trainer.prepare(["--device", "cuda", "--output-dir", str(folder / "run"),
                           *shlex.split(options.run_options)])
    trainer.train(run)
    seconds, rows = time.perf_counter() - started, read_metrics(run.folder)
    accuracy = list(series(rows, "eval_accuracy").values())
    return [Figure("default", "seconds", seconds, "s"),
            Figure("default", "steps", len(rows)),
            Figure("default", "seconds a step", sum(row["step_seconds"] for row in rows)
                   / len(rows), "s"),
            Figure("default", "held-out accuracy before", accuracy[0]),
            Figure("default", "held-out accuracy after", accuracy[-1])]


PARTS: dict[str, Callable[[Options, Path], list[Figure]]] = {
    "tests": gpu_tests, "rollouts": rollouts_beside_generate, "update": update_of_long_sequences,
    "vocabulary": logprobs_of_a_large_vocabulary, "types": gaps_of_both_types,
    "default": default_run}


# --------------------------------------------------------------------------------------------------

def run_part(name: str, options: Options) -> list[Figure]:
    """The figures of a part in this process; one that says why, if it fails."""
    folder = Path(tempfile.mkdtemp(prefix="gpu-"))
    try:
        return PARTS[name](options, folder)
    except Exception as error:
        traceback.print_exc()
        return [failed(name, f"{type(error).__name__}: {error}")]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_process(name: str, options: Options) -> list[Figure]:
    """The same in a process of its own, which may die or hang."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "part"
        given = vars(options) | {"parts": [name], "output": str(output)}
        command = [sys.executable, __file__, "--one-process", json.dumps(given)]
        process = subprocess.Popen(command, start_new_session=True)
        try:
            status = process.wait(options.timeout)
        except subprocess.TimeoutExpired:
            return [failed(name, f"it was ended after {options.timeout} seconds")]
        finally:   # with the processes that it has started, which may use the GPU
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if status or not output.is_file():
            return [failed(name, f"its process ended with status {status}")]
        return [Figure(*values) for values in json.loads(output.read_text())]


def failed(name: str, why: str) -> Figure:
    return Figure(name, "failed", None, note=" ".join(why.split())[:300])


def table(figures: list[Figure], title: str) -> str:
    lines = [title, "", "| part | figure | measured | target | met |", "|---|---|---|---|---|"]
    for f in figures:
        value = "not measured" if f.value is None else f"{f.value:,.4g} {f.unit}".strip()
        note = f" ({f.note})" if f.note else ""
        met = {None: "", True: "yes", False: "**no**"}[f.met]
        lines.append(f"| {f.part} | {f.name} | {value}{note} | {f.target} | {met} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str], run: Callable[[str, Options], list[Figure]] = run_process) -> None:
    options = OptionParser(Options, str(__doc__).split("\n\n")[0]).parse(arguments)
    unknown = set(options.parts) - set(PARTS)
    if unknown or not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py: error: " + (
            f"--parts {' '.join(sorted(unknown))}: the parts are {', '.join(PARTS)}" if unknown
            else "PyTorch sees no GPU"))
    for number in (signal.SIGTERM, signal.SIGHUP):   # as Ctrl-C, so that they end the part, too
        signal.signal(number, signal.default_int_handler)
    started, figures = time.perf_counter(), []
    for name in options.parts:
        print(f"{name} …", file=sys.stderr, flush=True)
        begun = time.perf_counter()
        figures += run(name, options)
        figures.append(Figure(name, "seconds of this part", time.perf_counter() - begun, "s"))
    machine = (f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, CUDA "
               f"{torch.version.cuda}")
    minutes = (time.perf_counter() - started) / 60
    text = table(figures, f"{machine}, {time.strftime('%Y-%m-%d')}, {minutes:.1f} minutes")
    Path(f"{options.output}.md").write_text(text, encoding="utf-8")
    Path(f"{options.output}.json").write_text(json.dumps(
        {"machine": machine, "date": time.strftime("%Y-%m-%d"), "minutes": minutes,
         "figures": [each._asdict() | {"met": each.met} for each in figures]}, indent=1) + "\n")
    print(text)
    print(f"written: {options.output}.md, {options.output}.json")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one-process"]:
        found = Options(**json.loads(sys.argv[2]))
        result = run_part(found.parts[0], found)
        Path(found.output).write_text(json.dumps(result))
    else:
        main(sys.argv[1:])
