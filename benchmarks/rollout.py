"""Times rollouts here and in other engines with the same weights and prompts, in turn.

    python benchmarks/rollout.py                                   # the embedded model
    python benchmarks/rollout.py --model path/to/a/model --check   # Hugging Face folder or hub name
    python benchmarks/rollout.py --model path/to/a/model --peers transformers openvino \\
        --openvino-python ENV/bin/python
    python benchmarks/rollout.py --model qwen3-1.7b-shape --dtype bfloat16 --slots 64 256
                                                                   # random weights, on a GPU

The generate of transformers runs in this process. OpenVINO GenAI and vLLM run in a process and an
environment of their own and compute log-probabilities too. Prints a table and then a line with
every figure as name=value. Each rollout is compared with a limit, the longer of two times: reading
the weights once per decode step and the cache of every sequence at the bandwidth measured here, or
making all multiplications at the rate of a large matrix product by the fastest kernel here.
"""

import ctypes
import gc
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Literal

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, Qwen3Config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import PromptBuilder, load_problems
from hf_folders import find_folder
from memory import bytes_per_slot
from model_utils import ModelConfig, Transformer, load_model, token_logprobs
from options import TINY, DType, OptionParser, option
from rollout import Completion, Sampler, Work, generate

# The targets of --check: (figure, at least or at most, bound).
TARGETS = {
    "tiny": [("embedded_ratio", ">=", 3.0)],
    "cpu": [("equal_ratio", ">=", 2.0), ("varying_ratio", ">=", 3.5),
            ("equal_memory_ratio", "<=", 1.0), ("varying_memory_ratio", "<=", 1.0),
            *((f"{case}_vllm_ratio", ">=", 1.2) for case in ("equal", "varying", "long"))],
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
    repeats: int = option(0, "timed rollouts of each case, of which medians count; 0 is 20 for "
                          "tiny, else 3 with openvino or vllm among the peers, else 1")
    peers: list[Literal["transformers", "openvino", "vllm"]] = option(
        ["transformers"], "engines to compare with; openvino and vllm only on a CPU")
    openvino_python: str = option("", "python of an environment with "
                                  "benchmarks/requirements-openvino.txt, for --peers openvino")
    vllm_python: str = option("", "python of an environment with "
                              "benchmarks/requirements-vllm.txt, for --peers vllm")
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


def measure_machine(device, dtype) -> tuple[float, float, str]:
    """Returns (bytes read from memory per second, operations per second, the kernel that makes
    them), of the fastest kernel for this type. A multiply-add counts twice."""
    block = torch.ones((4 if device.type == "cuda" else 1) * 2 ** 28, device=device)
    bandwidth = block.nbytes / best_time(block.sum, device)
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    kernels = {"F.linear": lambda: F.linear(a, b)}
    if device.type == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        kernels["oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    times = {name: best_time(kernel, device) for name, kernel in kernels.items()}
    fastest = min(times, key=lambda name: times[name])
    return bandwidth, 2 * size ** 3 / times[fastest], fastest


def few_rows_rate(c: ModelConfig, rows: int, dtype) -> float:
    """Returns the operations per second of products as a decode step on a CPU makes them: of a few
    rows, with as many weights one after the other as the model has."""
    cpu, x = torch.device("cpu"), torch.randn(rows, c.hidden_size, dtype=dtype)
    shape = 2 * c.intermediate_size, c.hidden_size
    count = math.ceil((c.num_layers * block_weights(c) + c.vocab_size * c.hidden_size)
                      / (shape[0] * shape[1]))
    weights = [torch.randn(shape, dtype=dtype) for _ in range(count)]
    seconds = best_time(lambda: [F.linear(x, weight) for weight in weights], cpu)
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        for i in range(count):
            weights[i] = torch.ops.mkldnn._reorder_linear_weight(weights[i], rows)
        seconds = min(seconds, best_time(lambda: [torch.ops.mkldnn._linear_pointwise(
            x, weight, None, "none", [], "") for weight in weights], cpu))
    return 2 * rows * shape[0] * shape[1] * count / seconds


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
# The samplers

def ours(model: Transformer, case: Case, sampler: Sampler, seed: int) -> list[Completion]:
    torch.backends.cuda.enable_cudnn_sdp(False)   # Training does so, see init_distributed.
    return generate(model, case.prompts, n=case.n, max_new_tokens=case.max_new_tokens,
                    stop_ids=case.stop_ids, seed=seed, sampler=sampler)


@torch.no_grad()
def theirs(hf, case: Case, at_a_time: int) -> list[list[int]]:
    """Returns the responses of transformers."""
    torch.backends.cuda.enable_cudnn_sdp(True)   # It is PyTorch's default.
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


class Engine:
    """A peer in a process and an environment of its own, which runs benchmarks/peer_NAME.py.

    Raises ValueError where it does not start, and with the end of its messages where it fails.
    """

    def __init__(self, name: str, python: str, setup: dict):
        self.name, self.messages = name, tempfile.TemporaryFile("w+")
        script = Path(__file__).with_name(f"peer_{name}.py")
        try:
            self.process = subprocess.Popen(
                [python, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=self.messages, text=True)
        except OSError as error:
            raise ValueError(f"{python} does not start: {error.strerror}") from None
        self.version = self.ask(setup)["version"]

    def ask(self, question: dict) -> dict:
        assert self.process.stdin and self.process.stdout
        with suppress(BrokenPipeError):   # The messages say why it ended.
            print(json.dumps(question), file=self.process.stdin, flush=True)
        if line := self.process.stdout.readline():
            return json.loads(line)
        self.messages.seek(0)
        messages = self.messages.read()[-3000:].strip()
        self.close()
        raise ValueError(f"{self.name} failed: {messages}")

    def sample(self, case: Case, seed: int) -> tuple[int, float]:
        """Returns (tokens, seconds). Raises ValueError if responses or tokens are missing."""
        found = self.ask({"prompts": case.prompts, "n": case.n, "stop_ids": case.stop_ids,
                          "max_new_tokens": case.max_new_tokens, "seed": seed})
        responses = len(case.prompts) * case.n
        if found["responses"] != responses or not case.stop_ids and (
                found["tokens"] != responses * case.max_new_tokens):
            raise ValueError(f"{self.name} returned {found['responses']} responses with "
                             f"{found['tokens']} tokens instead of {responses} of "
                             f"{case.max_new_tokens} tokens each")
        return found["tokens"], found["seconds"]

    def close(self) -> None:
        assert self.process.stdin
        with suppress(BrokenPipeError):
            self.process.stdin.close()   # It ends at the end of its input.
        self.process.wait()
        self.messages.close()


def start_engines(options: Options, config: ModelConfig, cases: list[Case]) -> list[Engine]:
    """Starts the peers that have an environment, and says which one is skipped and why."""
    engines = []
    length = max(max(map(len, case.prompts)) + case.max_new_tokens for case in cases)
    slots = max(case.slots for case in cases)
    # An eighth more than needed is for blocks of the cache that are partly filled.
    cache = slots * bytes_per_slot(config, length, getattr(torch, options.dtype)) * 9 / 8
    setup = {"model": str(model_folder(options)), "dtype": options.dtype, "slots": slots,
             "length": length, "cache_gb": math.ceil(cache / 1e9)}
    for name in ("openvino", "vllm"):
        if name not in options.peers:
            continue
        python = vars(options)[f"{name}_python"]
        if not python:
            print(f"{name} is skipped because it has no environment. To make one: python -m venv "
                  f"ENV && ENV/bin/pip install -r benchmarks/requirements-{name}.txt; then give "
                  f"--{name}-python ENV/bin/python")
            continue
        try:
            engines.append(Engine(name, python, setup))
        except ValueError as error:
            print(f"{name} is skipped because it does not start: {str(error).splitlines()[-1]}")
    return engines


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

def model_folder(options: Options) -> Path:
    return TINY / "model" if options.model == "tiny" else find_folder(options.model)


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
        folder = model_folder(options)
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
    if device.type == "cpu":
        slots = options.slots[0]
        long = [[draw.randrange(model.config.vocab_size) for _ in range(8 * options.prompt_length)]
                for _ in range(slots)]
        cases.append(Case("long", long, 1, 2 * options.max_new_tokens, slots, batches=(slots,)))
    return cases


def measure(options: Options, model: Transformer, hf, case: Case, bandwidth: float, rate: float,
            bar, engines: Sequence[Engine] = ()) -> dict[str, float]:
    """Returns the figures of a case. hf: the model of transformers, or None to leave it out."""
    device, dtype = model.device, model.dtype
    length = max(map(len, case.prompts)) + case.max_new_tokens
    sampler = Sampler(model.config, case.slots, length, device, dtype, compile=options.compile)
    here, there = Runs(), {at_a_time: Runs() for at_a_time in case.batches if hf}
    rates = {engine.name: [] for engine in engines}
    lengths = {engine.name: [] for engine in engines}
    short = replace(case, prompts=case.prompts[:1], max_new_tokens=2)
    completions = []   # of the last rollout here

    def sample_here(seed: int) -> list[list[int]]:
        completions[:] = ours(model, case, sampler, seed)
        return [completion.tokens for completion in completions]

    if hf:
        theirs(hf, short, 1)
    for engine in engines:
        engine.sample(short, options.seed)
    if options.compile or device.type == "cuda":   # The first run compiles or captures graphs.
        warm = Runs()
        warm.add(partial(sample_here, options.seed), device)
        here.memory = warm.memory
    else:
        ours(model, short, sampler, options.seed)
        sampler.release()   # The measured peak must include the cache.
    sampler.work = Work()
    rounds = 20 if case.name == "embedded" else 3 if engines else 1
    for repeat in range(options.repeats or rounds):
        torch.manual_seed(options.seed + repeat)
        bar.set_description(f"{case.name}: here")
        here.add(partial(sample_here, options.seed + repeat), device)
        for at_a_time, runs in there.items():
            bar.set_description(
                f"{case.name}: transformers, {at_a_time * case.n} sequences at a time")
            runs.add(partial(theirs, hf, case, at_a_time), device)
        for engine in engines:
            bar.set_description(f"{case.name}: {engine.name}")
            tokens, seconds = engine.sample(case, options.seed + repeat)
            rates[engine.name].append(tokens / seconds)
            lengths[engine.name].append(tokens / len(case.prompts) / case.n)
        bar.update()
    work, gap = sampler.work, logprob_gap(model, case, completions)
    steps = work.slot_steps // case.slots
    limit = limit_seconds(model.config, case, here.lengths, steps, here.count, dtype, bandwidth,
                          rate)
    figures = {"tokens_per_second": here.tokens_per_second,
               "seconds": here.seconds / here.count, "share": limit / here.seconds,
               "memory_gb": here.memory / 1e9, "mean_length": fmean(here.lengths),
               "prefill_seconds": work.prefill_seconds / here.count,
               "decode_seconds": work.decode_seconds / here.count,
               "decode_steps": steps / here.count,
               "slot_occupancy": work.sequence_steps / work.slot_steps,
               "wasted_positions": work.wasted_positions / work.positions,
               "logprob_gap_mean": gap[0], "logprob_gap_max": gap[1]}
    if there:
        best = max(there.values(), key=lambda runs: runs.tokens_per_second)
        figures |= {"transformers_tokens_per_second": best.tokens_per_second,
                    "ratio": here.tokens_per_second / best.tokens_per_second,
                    "transformers_seconds": best.seconds / best.count,
                    "transformers_memory_gb": best.memory / 1e9,
                    "memory_ratio": here.memory / best.memory,
                    "transformers_mean_length": fmean(best.lengths)}
    for name in rates:
        rate = median(rates[name])
        figures |= {f"{name}_tokens_per_second": rate,
                    f"{name}_ratio": here.tokens_per_second / rate,
                    f"{name}_mean_length": fmean(lengths[name])}
    return {f"{case.name}_{name}": value for name, value in figures.items()}


class Runs:
    """The rollouts of one case by one sampler in this process."""

    def __init__(self):
        self.count, self.seconds, self.lengths, self.memory = 0, 0.0, [], 0
        self.rates = []   # tokens per second of each rollout

    def add(self, function, device) -> None:
        synchronise(device)
        # Measuring empties the allocator's cache, which costs time, so only the first is measured.
        memory = PeakMemory(device)
        with memory if not self.count else nullcontext():
            started = time.perf_counter()
            responses = function()
            synchronise(device)
            seconds = time.perf_counter() - started
        self.seconds += seconds
        self.rates.append(sum(map(len, responses)) / seconds)
        self.count += 1
        self.lengths += map(len, responses)
        self.memory = max(self.memory, memory.bytes)   # It is 0 for all but the first.

    @property
    def tokens_per_second(self) -> float:
        return median(self.rates)


@torch.no_grad()
def logprob_gap(model: Transformer, case: Case,
                completions: list[Completion]) -> tuple[float, float]:
    """Returns (mean, maximum) over tokens of the difference between the sampler's log-probabilities
    and those that training computes."""
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
    if (gpu or options.model == "qwen3-1.7b-shape") and options.peers != ["transformers"]:
        sys.exit("benchmarks/rollout.py: error: --peers openvino and vllm run on a CPU and read a "
                 "folder in Hugging Face format: give --device cpu and another --model")
    bandwidth, rate, kernel = measure_machine(device, dtype)
    engines = []
    try:
        model, tokenizer, hf = load(options, device, dtype)
        if "transformers" not in options.peers:
            hf = None
        cases = make_cases(options, model, tokenizer, device)
        engines = start_engines(options, model.config, cases)
        figures = {"bandwidth_gb_per_second": bandwidth / 1e9,
                   "matmul_gflop_per_second": rate / 1e9}
        few = ""
        if device.type == "cpu":
            rows = max(case.slots for case in cases)
            figures["few_rows_gflop_per_second"] = few_rows_rate(model.config, rows, dtype) / 1e9
            few = f"; {figures['few_rows_gflop_per_second']:,.0f} with {rows} rows"
        with tqdm(unit="rollout", leave=False) as bar:
            for case in cases:
                figures |= measure(options, model, hf, case, bandwidth, rate, bar, engines)
    except ValueError as error:
        sys.exit(f"benchmarks/rollout.py: error: {error}")
    finally:
        for engine in engines:
            engine.close()
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    versions = "".join(f", {engine.name} {engine.version}" for engine in engines)
    print(f"{options.model}, {options.dtype}, {machine}{threads}, torch {torch.__version__}"
          f"{versions}: {bandwidth / 1e9:.1f} GB/s, {rate / 1e9:,.0f} GFLOP/s by {kernel}{few}")
    peers = [("generate", "transformers_tokens_per_second", "ratio")] * (hf is not None) + [
        (engine.name, f"{engine.name}_tokens_per_second", f"{engine.name}_ratio")
        for engine in engines]
    print(f"{'':<12}{'tokens/s':>10}" + "".join(f"{name:>10}{'ratio':>7}" for name, *_ in peers)
          + f"{'of limit':>10}{'peak MB':>9}" + f"{'generate':>10}" * (hf is not None)
          + f"{'tokens':>8}")
    for case in cases:
        f = {name.removeprefix(case.name + "_"): value for name, value in figures.items()
             if name.startswith(case.name + "_")}
        print(f"{case.name:<12}{f['tokens_per_second']:>10,.0f}"
              + "".join(f"{f[speed]:>10,.0f}{f[ratio]:>7.2f}" for _, speed, ratio in peers)
              + f"{f['share']:>10.0%}{1e3 * f['memory_gb']:>9,.0f}"
              + (f"{1e3 * f['transformers_memory_gb']:>10,.0f}" if hf else "")
              + f"{f['mean_length']:>8.1f}")
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
