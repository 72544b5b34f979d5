"""Times rollouts here and in transformers' generate with the same weights, in turn in one process.

    python benchmarks/rollout.py                                   # the embedded default
    python benchmarks/rollout.py --model path/to/a/model --check   # Hugging Face folder or hub name
    python benchmarks/rollout.py --model qwen3-1.7b-shape --dtype bfloat16 --slots 64 256
                                                                   # random weights, on a GPU

Prints a table and then a line with every figure as name=value. Each rollout is compared with a
limit, the longer of two times: reading the weights once per decode step and the cache of every
sequence at the bandwidth measured here, or making all multiplications at the rate of a large matrix
product measured here.
"""

import ctypes
import gc
import random
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, Qwen3Config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import PromptBuilder, load_problems
from hf_folders import find_folder
from model_utils import ModelConfig, Transformer, load_model, token_logprobs
from options import TINY, DType, OptionParser, option
from rollout import Sampler, Work, generate

# The targets of --check: (figure, at least or at most, bound).
TARGETS = {
    "tiny": [("embedded_ratio", ">=", 3.0)],
    "cpu": [("equal_ratio", ">=", 2.0), ("varying_ratio", ">=", 3.5),
            ("equal_memory_ratio", "<=", 1.0), ("varying_memory_ratio", "<=", 1.0)],
    "cuda": [(f"equal{slots}_{what}", ">=", bound) for slots in (64, 256)
             for what, bound in (("share", 0.6), ("ratio", 10.0))],
}


QWEN3_1_7B: dict = dict(
    vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28,
    num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    max_position_embeddings=40960)


@dataclass
class Options:
    model: str = option("tiny", "folder in Hugging Face format, hub name, tiny (the embedded "
                        "default with its own problems), or qwen3-1.7b-shape (random weights)")
    prompt_length: int = option(64, "random tokens in a prompt; unused with tiny")
    max_new_tokens: int = option(128, "longest response in tokens; unused with tiny")
    slots: list[int] = option([32], "numbers of cache slots, 8 slots per prompt; each number has "
                              "its own cases; unused with tiny")
    repeats: int = option(0, "timed rollouts of each case; 0 is 20 for tiny, else 1")
    compile: bool = option(False, "compile the decode step with torch.compile; this is not timed")
    check: bool = option(False, "exit with status 1 if a target is missed")
    dtype: DType = option("float32", "type of weights and computation")
    device: str = option("auto", "auto (a GPU if there is one), cpu or cuda")
    seed: int = option(0, "seed of prompts, stop ids and sampling")


@dataclass
class Case:
    name: str
    prompts: list[list[int]]
    n: int
    max_new_tokens: int
    slots: int
    stop_ids: tuple[int, ...] = ()
    batches: tuple[int, ...] = ()   # prompts at a time in transformers; its best time counts


# --------------------------------------------------------------------------------------------------
# The machine

def best_time(function, device, repeats: int = 7) -> float:
    times = []
    for _ in range(repeats):
        synchronise(device)
        started = time.perf_counter()
        function()
        synchronise(device)
        times.append(time.perf_counter() - started)
    return min(times)


def synchronise(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure_machine(device, dtype) -> tuple[float, float]:
    """Returns (bytes read from memory, operations) per second. A multiply-add counts twice."""
    block = torch.ones((4 if device.type == "cuda" else 1) * 2 ** 28, device=device)
    bandwidth = block.nbytes / best_time(block.sum, device)
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return bandwidth, 2 * size ** 3 / best_time(lambda: a @ b, device)


def block_weights(c: ModelConfig) -> int:
    """Returns the number of weights in a block's matrix products."""
    return (c.hidden_size * c.head_dim * 2 * (c.num_heads + c.num_kv_heads)
            + 3 * c.hidden_size * c.intermediate_size)


def limit_seconds(config: ModelConfig, case: Case, lengths: list[int], steps: int, rollouts: int,
                  dtype, bandwidth, rate) -> float:
    """Returns the seconds that these rollouts, with responses of these lengths in this many decode
    steps, would take if only memory bandwidth or only arithmetic limited them, whichever is
    longer."""
    c, block = config, block_weights(config)
    weights = c.num_layers * block + c.vocab_size * c.hidden_size
    prompt_positions = rollouts * sum(map(len, case.prompts))
    # A token attends to its prompt and the tokens before it.
    prompt_lengths = [len(prompt) for prompt in case.prompts for _ in range(case.n)] * rollouts
    attended = sum(prompt * length + length * (length + 1) / 2
                   for prompt, length in zip(prompt_lengths, lengths))
    read = (steps * weights * dtype.itemsize
            + attended * 2 * c.num_layers * c.num_kv_heads * c.head_dim * dtype.itemsize)
    operations = (2 * weights * sum(lengths) + 2 * c.num_layers * block * prompt_positions
                  + attended * 4 * c.num_layers * c.num_heads * c.head_dim)
    return max(read / bandwidth, operations / rate)


def peak_resident() -> int:
    """Returns the most bytes of memory that this process has held; works only on Linux."""
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


class PeakMemory:
    """Measures the most bytes that a `with` block takes beyond those taken before; for the CPU only
    on Linux, elsewhere nan."""

    def __init__(self, device):
        self.device, self.bytes = device, 0

    def __enter__(self):
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return self
        if sys.platform != "linux":
            return self
        ctypes.CDLL(None).malloc_trim(0)   # Reuse of freed memory would not raise the peak.
        Path("/proc/self/clear_refs").write_text("5")   # This resets the peak.
        self.before = peak_resident()
        return self

    def __exit__(self, *error):
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated() - self.before
        else:
            self.bytes = peak_resident() - self.before if sys.platform == "linux" else float("nan")


# --------------------------------------------------------------------------------------------------
# The two samplers; each returns the responses

def ours(model: Transformer, case: Case, sampler: Sampler, seed: int) -> list[list[int]]:
    completions = generate(model, case.prompts, n=case.n, max_new_tokens=case.max_new_tokens,
                           stop_ids=case.stop_ids, seed=seed, sampler=sampler)
    return [c.tokens for c in completions]


@torch.no_grad()
def theirs(hf, case: Case, at_a_time: int) -> list[list[int]]:
    responses = []
    for first in range(0, len(case.prompts), at_a_time):
        prompts = case.prompts[first:first + at_a_time]
        width = max(map(len, prompts))   # `generate` needs padding on the left.
        tokens = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=hf.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts],
                            device=hf.device)
        out = hf.generate(tokens, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0,
                          top_p=1.0, num_return_sequences=case.n, pad_token_id=0,
                          max_new_tokens=case.max_new_tokens,
                          eos_token_id=list(case.stop_ids) or None)
        for row in out[:, width:].tolist():
            end = next((i + 1 for i, token in enumerate(row) if token in case.stop_ids), len(row))
            responses.append(row[:end])
    return responses


@torch.no_grad()
def find_stop_ids(model: Transformer, case: Case, mean: float, seed: int) -> tuple[int, ...]:
    """Returns random token ids, one of which the model samples about once in `mean` tokens."""
    completions = generate(model, case.prompts, max_new_tokens=case.max_new_tokens, seed=seed + 1,
                           slots=case.slots)
    probs = torch.zeros(model.config.vocab_size, device=model.device)
    for prompt, completion in zip(case.prompts, completions):
        tokens = torch.tensor([prompt + completion.tokens], device=model.device)
        logits = model(tokens)[0, len(prompt) - 1:-1]
        probs += logits.float().softmax(-1).mean(0) / len(case.prompts)
    chosen, left = [], 1 / mean
    for token in random.Random(seed).sample(range(len(probs)), len(probs)):
        if probs[token] < left / 8:   # No single token decides the lengths.
            chosen.append(token)
            left -= probs[token].item()
    return tuple(chosen)


# --------------------------------------------------------------------------------------------------

def load(options: Options, device, dtype):
    """Returns (the model here, its tokenizer or None, the model of transformers)."""
    if options.model == "qwen3-1.7b-shape":
        hf_config = Qwen3Config(**QWEN3_1_7B, bos_token_id=None, eos_token_id=None)
        with torch.device(device):
            hf = AutoModelForCausalLM.from_config(hf_config, dtype=dtype)
            model = Transformer(ModelConfig.from_hf(hf_config)).to(dtype)
        model.load_state_dict(hf.state_dict(), strict=False)   # lm_head is tied to the embeddings.
        tokenizer = None
    else:
        folder = TINY / "model" if options.model == "tiny" else find_folder(options.model)
        model, tokenizer = load_model(folder, device, dtype)
        hf = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    hf.generation_config.eos_token_id = None   # Responses end only at the stop ids of the case.
    return model.requires_grad_(False), tokenizer, hf.eval()


def make_cases(options: Options, model, tokenizer, device) -> list[Case]:
    if options.model == "tiny":
        problems = load_problems(TINY / "train.jsonl")[:16]
        prompts = [PromptBuilder(tokenizer).plain(problem) for problem in problems]
        return [Case("embedded", prompts, 8, 48, 128, model.stop_ids, batches=(4, 16))]
    draw = random.Random(options.seed)
    prompts = [[draw.randrange(model.config.vocab_size) for _ in range(options.prompt_length)]
               for _ in range(4 * max(options.slots) // 8)]
    cases = []
    for slots in options.slots:
        named, together = len(options.slots) > 1 or device.type == "cuda", slots // 8
        suffix = str(slots) if named else ""
        cases.append(Case(f"equal{suffix}", prompts[:together], 8, options.max_new_tokens, slots,
                          batches=(together,)))
        varying = Case(f"varying{suffix}", prompts[:4 * together], 8, options.max_new_tokens, slots,
                       batches=(together, 4 * together))
        varying.stop_ids = find_stop_ids(model, varying, options.max_new_tokens / 4, options.seed)
        cases.append(varying)
    return cases


def measure(options: Options, model: Transformer, hf, case: Case, bandwidth: float, rate: float,
            bar) -> dict[str, float]:
    device, dtype = model.device, model.dtype
    length = max(map(len, case.prompts)) + case.max_new_tokens
    sampler = Sampler(model.config, case.slots, length, device, dtype, compile=options.compile)
    here, there = Runs(), {at_a_time: Runs() for at_a_time in case.batches}
    short = replace(case, prompts=case.prompts[:1], max_new_tokens=2)
    theirs(hf, short, 1)
    if options.compile or device.type == "cuda":   # The first run compiles or captures graphs.
        warm = Runs()
        warm.add(lambda: ours(model, case, sampler, options.seed), device)
        here.memory = warm.memory
    else:
        ours(model, short, sampler, options.seed)
        sampler.release()   # The measured peak must include the cache.
    sampler.work = Work()
    for repeat in range(options.repeats or (20 if case.name == "embedded" else 1)):
        torch.manual_seed(options.seed + repeat)
        bar.set_description(f"{case.name}: here")
        here.add(partial(ours, model, case, sampler, options.seed + repeat), device)
        for at_a_time, runs in there.items():
            bar.set_description(
                f"{case.name}: transformers, {at_a_time * case.n} sequences at a time")
            runs.add(partial(theirs, hf, case, at_a_time), device)
        bar.update()
    there = max(there.values(), key=lambda runs: runs.tokens_per_second)
    work, gap = replace(sampler.work), logprob_gap(model, case, sampler, options.seed)
    steps = work.slot_steps // case.slots
    limit = limit_seconds(model.config, case, here.lengths, steps, here.count, dtype, bandwidth,
                          rate)
    figures = {"tokens_per_second": here.tokens_per_second,
               "transformers_tokens_per_second": there.tokens_per_second,
               "ratio": here.tokens_per_second / there.tokens_per_second,
               "seconds": here.seconds / here.count,
               "transformers_seconds": there.seconds / there.count,
               "share": limit / here.seconds,
               "memory_gb": here.memory / 1e9, "transformers_memory_gb": there.memory / 1e9,
               "memory_ratio": here.memory / there.memory,
               "mean_length": fmean(here.lengths), "transformers_mean_length": fmean(there.lengths),
               "prefill_seconds": work.prefill_seconds / here.count,
               "decode_seconds": work.decode_seconds / here.count,
               "decode_steps": steps / here.count,
               "slot_occupancy": work.sequence_steps / work.slot_steps,
               "wasted_positions": work.wasted_positions / work.positions,
               "logprob_gap_mean": gap[0], "logprob_gap_max": gap[1]}
    return {f"{case.name}_{name}": value for name, value in figures.items()}


class Runs:
    """The sums over rollouts of one case by one sampler."""

    def __init__(self):
        self.count, self.seconds, self.lengths, self.memory = 0, 0.0, [], 0

    def add(self, function, device) -> None:
        synchronise(device)
        # Measuring empties the allocator's cache, which costs time, so only the first is measured.
        memory = PeakMemory(device)
        with memory if not self.count else nullcontext():
            started = time.perf_counter()
            responses = function()
            synchronise(device)
            self.seconds += time.perf_counter() - started
        self.count += 1
        self.lengths += map(len, responses)
        self.memory = max(self.memory, memory.bytes)   # It is 0 for all but the first.

    @property
    def tokens_per_second(self) -> float:
        return sum(self.lengths) / self.seconds


@torch.no_grad()
def logprob_gap(model: Transformer, case: Case, sampler: Sampler, seed: int) -> tuple[float, float]:
    """Returns (mean, maximum) over tokens of the difference between the sampler's log-probabilities
    and those that training computes."""
    completions = generate(model, case.prompts, n=case.n, max_new_tokens=case.max_new_tokens,
                           stop_ids=case.stop_ids, seed=seed, sampler=sampler)
    gaps = []
    for i, completion in enumerate(completions):
        prompt = case.prompts[i // case.n]
        tokens = torch.tensor([prompt + completion.tokens], device=model.device)
        again = token_logprobs(model, tokens)[0, len(prompt) - 1:]
        gaps.append((again.cpu() - torch.tensor(completion.logprobs)).abs())
    gaps = torch.cat(gaps)
    return gaps.mean().item(), gaps.max().item()


def main() -> None:
    options = OptionParser(Options, str(__doc__).split("\n")[0]).parse(sys.argv[1:])
    gpu = options.device == "cuda" or options.device == "auto" and torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    dtype = getattr(torch, options.dtype)
    if any(slots < 8 or slots % 8 for slots in options.slots):
        sys.exit(f"benchmarks/rollout.py: error: --slots must be multiples of 8 because each "
                 f"prompt has 8 responses; they are {options.slots}")
    bandwidth, rate = measure_machine(device, dtype)
    try:
        model, tokenizer, hf = load(options, device, dtype)
        cases = make_cases(options, model, tokenizer, device)
    except ValueError as error:
        sys.exit(f"benchmarks/rollout.py: error: {error}")
    figures = {"bandwidth_gb_per_second": bandwidth / 1e9, "matmul_gflop_per_second": rate / 1e9}
    with tqdm(unit="rollout", leave=False) as bar:
        for case in cases:
            figures |= measure(options, model, hf, case, bandwidth, rate, bar)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    print(f"{options.model}, {options.dtype}, {machine}{threads}, torch {torch.__version__}: "
          f"{bandwidth / 1e9:.1f} GB/s, {rate / 1e9:,.0f} GFLOP/s")
    print(f"{'':<12}{'tokens/s':>10}{'generate':>10}{'ratio':>8}{'of limit':>10}{'peak MB':>9}"
          f"{'generate':>10}{'tokens':>8}")
    for case in cases:
        f = {name.removeprefix(case.name + "_"): value for name, value in figures.items()
             if name.startswith(case.name + "_")}
        print(f"{case.name:<12}{f['tokens_per_second']:>10,.0f}"
              f"{f['transformers_tokens_per_second']:>10,.0f}{f['ratio']:>8.2f}{f['share']:>10.0%}"
              f"{1e3 * f['memory_gb']:>9,.0f}{1e3 * f['transformers_memory_gb']:>10,.0f}"
              f"{f['mean_length']:>8.1f}")
    report(figures, TARGETS["tiny" if options.model == "tiny" else device.type], options.check)


def report(figures: dict[str, float], targets: list[tuple[str, str, float]], check: bool) -> None:
    """Prints the missed targets and, on one line, all figures. Exits with status 1 if `check` is
    set and a target is missed, else with status 0."""
    missed = [f"{name} is {figures[name]:.3g}, the target is {how} {bound:g}"
              for name, how, bound in targets if name in figures
              and not (figures[name] >= bound if how == ">=" else figures[name] <= bound)]
    if missed:
        print("missed: " + "; ".join(missed))
    print(" ".join(f"{name}={value:.6g}" for name, value in figures.items()))
    sys.exit(1 if missed and check else 0)


if __name__ == "__main__":
    main()
