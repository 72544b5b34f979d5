"""Samples with vLLM on a CPU for benchmarks/rollout.py, which starts this script in an environment
of its own (benchmarks/requirements-vllm.txt) and sends it lines of JSON.

The first line is the set-up, and each later line is a case. The answer to each is a line of JSON:
the tokens sampled and the seconds that they took.
"""

import json
import os
import sys
import time

# Libraries print on standard output too, so the answers get a copy of it and the rest goes to
# standard error.
ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


def main() -> None:
    setup = json.loads(sys.stdin.readline())
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(setup["cache_gb"])   # vLLM reads it on import.
    import vllm
    llm = vllm.LLM(setup["model"], dtype=setup["dtype"], max_model_len=setup["length"],
                   max_num_seqs=setup["slots"], generation_config="vllm")
    print(json.dumps({"version": vllm.__version__}), file=ANSWERS, flush=True)
    for line in sys.stdin:
        case = json.loads(line)
        sampling = vllm.SamplingParams(
            n=case["n"], max_tokens=case["max_new_tokens"], stop_token_ids=case["stop_ids"],
            ignore_eos=True, logprobs=0, detokenize=False, seed=None)
        prompts = [{"prompt_token_ids": prompt} for prompt in case["prompts"]]
        # The responses to a prompt share it through the cache of prefixes. A prompt of an earlier
        # rollout must not stay there: in training the weights are others by then.
        llm.reset_prefix_cache()
        started = time.perf_counter()
        results = llm.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - started
        responses = [output.token_ids for result in results for output in result.outputs]
        print(json.dumps({"tokens": sum(map(len, responses)), "responses": len(responses),
                          "seconds": seconds}), file=ANSWERS, flush=True)


if __name__ == "__main__":
    main()
