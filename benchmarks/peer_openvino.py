"""Samples with OpenVINO GenAI for benchmarks/rollout.py, which starts this script in an environment
of its own (benchmarks/requirements-openvino.txt) and sends it lines of JSON.

The first line is the set-up, and each later line is a case. The answer to each is a line of JSON:
the tokens sampled and the seconds that they took.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy
import openvino
import openvino_genai as genai

# Libraries print on standard output too, so the answers get a copy of it and the rest goes to
# standard error.
ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


def converted(model: str) -> Path:
    """Returns the folder with this model in OpenVINO's format, which is made where it is missing;
    the weights stay in float32."""
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns)
             for file in sorted(Path(model).iterdir())]
    key = hashlib.sha256(json.dumps([str(Path(model).resolve()), files]).encode()).hexdigest()[:16]
    folder = Path.home() / ".cache" / "benchmark-openvino" / key
    if not folder.exists():
        part = folder.with_name(f"{key}-{os.getpid()}")
        if subprocess.run([Path(sys.executable).with_name("optimum-cli"), "export", "openvino",
                           "--model", model, "--task", "text-generation-with-past",
                           "--weight-format", "fp32", part]).returncode:
            sys.exit(1)   # Its own message stays the last one.
        part.rename(folder)
    return folder


def sample(pipeline, case: dict) -> list[list[int]]:
    config = genai.GenerationConfig()
    config.do_sample, config.temperature, config.top_p, config.top_k = True, 1.0, 1.0, 0
    config.num_return_sequences, config.max_new_tokens = case["n"], case["max_new_tokens"]
    config.logprobs = 1   # This makes it compute the log-probability of each token.
    config.rng_seed = case["seed"]
    if case["stop_ids"]:
        config.stop_token_ids = set(case["stop_ids"])
        config.eos_token_id = case["stop_ids"][0]   # else it takes the model's
    else:
        config.ignore_eos = True
    prompts = [openvino.Tensor(numpy.array([prompt], dtype=numpy.int64))
               for prompt in case["prompts"]]
    results = pipeline.generate(prompts, [config] * len(prompts))
    return [list(tokens) for result in results for tokens in result.m_generation_ids]


def main() -> None:
    setup = json.loads(sys.stdin.readline())
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size, scheduler.max_num_seqs = setup["cache_gb"], setup["slots"]
    scheduler.dynamic_split_fuse = True
    # The responses to a prompt share it without this. It would keep prompts for the next rollout,
    # where in training the weights are others.
    scheduler.enable_prefix_caching = False
    precision = {"float32": "f32", "bfloat16": "bf16"}[setup["dtype"]]
    pipeline = genai.ContinuousBatchingPipeline(
        converted(setup["model"]), scheduler, "CPU",
        {"INFERENCE_PRECISION_HINT": precision, "KV_CACHE_PRECISION": precision})
    print(json.dumps({"version": genai.__version__}), file=ANSWERS, flush=True)
    for line in sys.stdin:
        case = json.loads(line)
        started = time.perf_counter()
        responses = sample(pipeline, case)
        seconds = time.perf_counter() - started
        print(json.dumps({"tokens": sum(map(len, responses)), "responses": len(responses),
                          "seconds": seconds}), file=ANSWERS, flush=True)


if __name__ == "__main__":
    main()
