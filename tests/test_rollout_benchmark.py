"""Runs benchmarks/rollout.py with the embedded model and a stand-in for an engine of its own
environment."""

import math
import re
import sys

import pytest
import torch

from benchmarks import rollout as benchmark
from model_utils import ModelConfig
from options import TINY

# It answers every case with as many tokens as are wanted, or with fewer, at a rate of its own.
STAND_IN = '''#!{python}
import json, pathlib, sys
assert pathlib.Path(sys.argv[1]).is_file() and pathlib.Path(sys.argv[1]).name == "peer_vllm.py"
print("vllm: no such device", file=sys.stderr)
setup = json.loads(input())
assert setup["dtype"] == "float32" and setup["slots"] == 8 and setup["cache_gb"] == 1
with open({log!r}, "w") as log:
    print(json.dumps(setup), file=log)
    print(json.dumps(dict(version="1.2")), flush=True)
    for line in sys.stdin:
        print(line.strip(), file=log)
        case = json.loads(line)
        responses = len(case["prompts"]) * case["n"]
        tokens = responses * case["max_new_tokens"] - {missing}
        seconds = tokens / (300, 100, 20)[case["seed"]]
        print(json.dumps(dict(tokens=tokens, responses=responses, seconds=seconds)), flush=True)
'''


def run(tmp_path, monkeypatch, capsys, *arguments, missing=0):
    """Returns (what the benchmark printed, its figures, the cases that the stand-in was sent)."""
    engine, log = tmp_path / "python", tmp_path / "log"
    engine.write_text(STAND_IN.format(python=sys.executable, log=str(log), missing=missing))
    engine.chmod(0o755)
    monkeypatch.setattr(benchmark, "measure_machine", lambda *arguments: (1e10, 1e11, "a kernel"))
    monkeypatch.setattr(sys, "argv", [
        "rollout.py", "--model", str(TINY / "model"), "--prompt-length", "3", "--max-new-tokens",
        "4", "--slots", "8", "--device", "cpu", "--vllm-python", str(engine), *arguments])
    with pytest.raises(SystemExit) as end:
        benchmark.main()
    if isinstance(end.value.code, str):
        return end.value.code, {}, []
    printed = capsys.readouterr().out
    figures = {name: float(value)
               for name, value in re.findall(r"(\w+)=(\S+)", printed.splitlines()[-1])}
    return printed, figures, list(map(benchmark.json.loads, log.read_text().splitlines()))


@pytest.mark.parametrize("bandwidth, rate, seconds", [(1, 1e9, 6240), (1e9, 1, 6656)])
def test_the_limit_equals_one_worked_out_by_hand(bandwidth, rate, seconds):
    config = ModelConfig(10, 4, 8, 2, 2, 1, 2, 1e-6, 1e4, None, 100, True, False, False, False,
                         False)
    case = benchmark.Case("", [[1, 2, 3]], 2, 4, 2)
    # Blocks have 2·144 weights in products, the head 40. Responses of 2 and 4 tokens after 3 attend
    # to 3·2 + 2·3/2 and 3·4 + 4·5/2 positions, 31, each of 2·2·1·2 numbers of 4 bytes.
    # Read: 4·328·4 + 31·32. Operations: 2·328·6, 2·288·3 for the prompt, and 31·4·2·2·2.
    assert benchmark.limit_seconds(config, case, [2, 4], 4, 1, torch.float32, bandwidth,
                                   rate) == seconds


def test_an_engine_in_a_process_of_its_own_is_compared_in_three_rounds(
        tmp_path, monkeypatch, capsys):
    printed, figures, (setup, *asked) = run(
        tmp_path, monkeypatch, capsys, "--peers", "transformers", "openvino", "vllm")
    assert ("openvino is skipped because it has no environment. To make one: python -m venv ENV && "
            "ENV/bin/pip install -r benchmarks/requirements-openvino.txt; then give "
            "--openvino-python ENV/bin/python") in printed
    assert "vllm 1.2: 10.0 GB/s, 100 GFLOP/s by a kernel" in printed
    assert setup["model"] == str(TINY / "model") and setup["length"] == 8 * 3 + 2 * 4
    timed = [case for case in asked if case["max_new_tokens"] != 2]   # the others are the warm-up
    assert len(asked) == len(timed) + 3
    assert [case["seed"] for case in timed] == [0, 1, 2] * 3
    shapes = [(len(case["prompts"]), case["n"], case["max_new_tokens"], len(case["prompts"][0]),
               bool(case["stop_ids"])) for case in timed[::3]]
    assert shapes == [(1, 8, 4, 3, False), (4, 8, 4, 3, True), (8, 1, 8, 24, False)]
    for case in ("equal", "varying", "long"):
        ours = figures[f"{case}_tokens_per_second"]
        theirs = figures[f"{case}_transformers_tokens_per_second"]
        row, = (line.split() for line in printed.splitlines() if line.startswith(f"{case} "))
        assert figures[f"{case}_vllm_tokens_per_second"] == 100   # the median of 300, 100 and 20
        assert figures[f"{case}_vllm_ratio"] == pytest.approx(ours / 100, rel=1e-4)
        assert figures[f"{case}_ratio"] == pytest.approx(ours / theirs, rel=1e-4)
        assert row[4] == "100" and float(row[5]) == pytest.approx(ours / 100, abs=0.02)
        assert float(row[3]) == pytest.approx(ours / theirs, abs=0.02)
    assert not any("openvino" in name for name in figures)


def test_an_engine_that_does_not_start_is_skipped_with_its_last_message(
        tmp_path, monkeypatch, capsys):
    printed, figures, _ = run(tmp_path, monkeypatch, capsys, "--peers", "vllm", "openvino",
                              "--repeats", "1", "--openvino-python", str(tmp_path / "python"))
    assert "openvino is skipped because it does not start: AssertionError" in printed
    assert figures["equal_vllm_ratio"] > 0 and "equal_ratio" not in figures   # no transformers
    printed, figures, _ = run(tmp_path, monkeypatch, capsys, "--peers", "openvino", "--repeats",
                              "1", "--openvino-python", str(tmp_path / "absent"))
    assert "openvino is skipped because it does not start: " in printed
    assert "No such file or directory" in printed and "equal_tokens_per_second" in figures


def test_an_engine_that_returns_too_few_tokens_is_an_error(tmp_path, monkeypatch, capsys):
    message, *_ = run(tmp_path, monkeypatch, capsys, "--peers", "vllm", missing=1)
    assert message == ("benchmarks/rollout.py: error: vllm returned 8 responses with 15 tokens "
                       "instead of 8 of 2 tokens each")


def test_an_engine_that_ends_early_is_an_error_with_its_messages(tmp_path, monkeypatch, capsys):
    message, *_ = run(tmp_path, monkeypatch, capsys, "--peers", "vllm", missing="1 / 0")
    assert message.startswith("benchmarks/rollout.py: error: vllm failed: vllm: no such device\n")
    assert message.endswith("ZeroDivisionError: division by zero")


def test_engines_need_a_cpu_and_a_folder(tmp_path, monkeypatch, capsys):
    message, *_ = run(tmp_path, monkeypatch, capsys, "--peers", "vllm", "--model",
                      "qwen3-1.7b-shape")
    assert "--peers openvino and vllm run on a CPU and read a folder" in message


def test_the_rate_of_the_machine_is_that_of_the_fastest_kernel(monkeypatch):
    if not hasattr(benchmark.torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this PyTorch has no oneDNN")
    times = iter([1.0, 3.0, 2.0])   # bandwidth, F.linear, oneDNN
    monkeypatch.setattr(benchmark, "best_time", lambda function, device: function() is None or (
        next(times)))
    bandwidth, rate, kernel = benchmark.measure_machine(
        benchmark.torch.device("cpu"), benchmark.torch.float32)
    assert (bandwidth, rate, kernel) == (2 ** 30, 2 * 2048 ** 3 / 2.0, "oneDNN")


def test_the_rate_with_few_rows_counts_the_weights_of_the_model(monkeypatch):
    if not hasattr(benchmark.torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this PyTorch has no oneDNN")
    products = []   # of F.linear, of oneDNN
    monkeypatch.setattr(benchmark, "best_time", lambda function, device: products.append(
        len(function())) or (3.0, 2.0)[len(products) - 1])
    config = benchmark.load_model(TINY / "model", "meta")[0].config
    # The weights of four blocks (attention, MLP) and of the head, over those of a product.
    count = math.ceil((4 * (2 * 128 * 32 * (4 + 2) + 3 * 128 * 384) + 106 * 128) / (768 * 128))
    rate = benchmark.few_rows_rate(config, 5, benchmark.torch.float32)
    assert products == [count, count] and rate == 2 * 5 * 768 * 128 * count / 2.0
