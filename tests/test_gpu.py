"""Tests of what a GPU runs, on a pretended one (see pretend_cuda.py) and, where there is one, on a
real one. Numbers are compared with the CPU's to rounding, because a GPU adds in another order."""

import contextlib
import gc
import itertools
import json
import random
import re

import pytest
import torch
from pretend_cuda import pretend
from processes import ROOT
from processes import run as run_script
from test_train import TINY, weights_of

import eval as evaluation
import rollout
import train as trainer
from distributed import init_distributed
from model_utils import ModelConfig, Transformer
from rollout import Sampler, generate

V = 40
CONFIG = ModelConfig(
    vocab_size=V, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=16, norm_eps=1e-6, rope_theta=1e4, rope_scaling=None, max_position=128,
    tie_embeddings=False, qkv_bias=True, out_bias=False, mlp_bias=False, qk_norm=True)


@pytest.fixture(params=["pretended", pytest.param("real", marks=pytest.mark.gpu)])
def on_gpu(request):
    return pretend if request.param == "pretended" else contextlib.nullcontext


def make_model(dtype=torch.float32):
    torch.manual_seed(0)
    model = Transformer(CONFIG).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(1.7)
    return model.to(dtype)


def copy_to(device, model):
    with torch.device("meta"):
        copy = Transformer(model.config)
    copy.load_state_dict({name: parameter.to(device) for name, parameter
                          in model.named_parameters()}, assign=True)
    return copy.requires_grad_(False)


# --------------------------------------------------------------------------------------------------
# The pretended GPU itself

def test_the_pretended_gpu_refuses_what_cuda_refuses():
    with pretend(gpus=2) as gpu:
        here, there = torch.ones(3, device="cuda"), torch.ones(3, device="cuda:1")
        for mixed in (torch.ones(3), there):
            with pytest.raises(RuntimeError, match="on the same device"):
                torch.add(here, mixed)
        assert (here + torch.tensor(1.0)).sum().item() == 6 and gpu.waits
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        for step in (lambda: here.sum().item(), lambda: here[here > 0], lambda: here.cpu(),
                     lambda: torch.tensor([1], device="cuda"), lambda: torch.ones(3).add_(1),
                     lambda: there + 1, here.tolist):
            with pytest.raises(RuntimeError), torch.cuda.graph(graph, stream=stream):
                step()
        grouped = [torch.ones(1, heads, 4, 8, device="cuda") for heads in (4, 2, 2)]
        with pytest.raises(RuntimeError, match="no fused kernel"):
            torch.nn.functional.scaled_dot_product_attention(*grouped, enable_gqa=True)
        with pytest.raises(RuntimeError, match="invalid device ordinal"):
            torch.ones(1, device="cuda:2")
        allocated = torch.cuda.memory_allocated()
        more = torch.ones(1000, device="cuda")
        assert torch.cuda.memory_allocated() - allocated == more.nbytes
        del more
        assert torch.cuda.memory_allocated() == allocated


def test_a_pretended_graph_runs_at_its_replays_alone_and_on_the_storages_of_its_capture():
    with pretend() as gpu:
        x, total = torch.ones(2, device="cuda"), torch.zeros(2, device="cuda")
        stream, pool, graphs = torch.cuda.Stream(), torch.cuda.graph_pool_handle(), []
        for factor in (2, 3):
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1], pool=pool, stream=stream):
                product = x * factor
                total += product
        assert total.tolist() == [0, 0]
        graphs[0].replay()
        x += 1
        graphs[0].replay()
        assert total.tolist() == [6, 6] and product.isnan().all()   # another graph's memory
        x.data = torch.zeros(2, device="cuda")
        graphs[1].replay()
        assert total.tolist() == [12, 12]
    assert (gpu.captures, gpu.replays) == (2, 3)


# --------------------------------------------------------------------------------------------------
# Rollouts

def eager(step):
    """Runs the steps of a GPU, with its batches and spans rounded up, without graphs."""
    step()
    return step


def ends_at_a_sum(tokens, seen):
    """A stop_at."""
    return next((end for end in range(seen + 1, len(tokens) + 1)
                 if sum(tokens[max(0, end - 2):end]) % 7 == 0), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_rollouts_equal_those_of_the_cpu(seed, dtype, monkeypatch):
    """Sequences end, move, wait and take the slots of others; batches and spans change; the weights
    change in place between two rollouts."""
    draw = random.Random(seed)
    monkeypatch.setattr(rollout, "SHARE_AT_LEAST", draw.choice([1, 2, 5]))
    monkeypatch.setattr(rollout, "PREFILL_POSITIONS", draw.choice([1, 20, 4096]))
    monkeypatch.setattr(rollout, "CHECK_EVERY", draw.choice([1, 2, 4]))
    monkeypatch.setattr(rollout, "bucket", lambda number, most, plain=rollout.bucket: (
        plain(number if number < 64 else 16, most)))   # else every span here would be 64 positions
    moves, slots = [], draw.randint(2, 7)
    move = Sampler.move
    monkeypatch.setattr(Sampler, "move", lambda *each: (moves.append(1), move(*each)))
    model = make_model(dtype)
    with pretend() as gpu:
        there = copy_to("cuda", model)
        sampler = Sampler(CONFIG, slots, 40, "cuda", dtype)
    plain = Sampler(CONFIG, slots, 40, "cpu", dtype)
    plain.capture = eager
    for _ in range(3):
        stems = [[draw.randrange(V) for _ in range(draw.randint(1, 12))] for _ in range(3)]
        prompts = [(draw.choice(stems) + [draw.randrange(V)] * draw.randint(0, 3))[:28]
                   for _ in range(6)]
        n = [draw.randint(1, 4) for _ in prompts]
        settings = dict(max_new_tokens=draw.randint(6, 12), stop_ids=draw.sample(range(V), 4),
                        temperature=draw.choice([0, 1.0, 0.7]), top_k=draw.choice([0, 5]),
                        top_p=draw.choice([1.0, 0.8]), seed=draw.randrange(99),
                        stop_at=[draw.choice([None, ends_at_a_sum]) for _ in prompts])
        wanted = generate(model, prompts, n=n, sampler=plain, **settings)
        with pretend() as gpu:
            found = generate(there, prompts, n=n, sampler=sampler, **settings)
            for parameter in there.parameters():
                parameter.mul_(1.01)
        assert [c.tokens for c in found] == [c.tokens for c in wanted]
        assert [c.finished for c in found] == [c.finished for c in wanted]
        for one, two in zip(found, wanted):
            assert one.logprobs == pytest.approx(two.logprobs, abs=1e-4)
        assert gpu.captures and gpu.replays
        for parameter in model.parameters():
            parameter.mul_(1.01)
    assert moves and len({key[0] for key in sampler.graphs}) > 1


def test_a_sampler_on_another_gpu_than_the_current_one_uses_that_ones_streams():
    model, prompts = make_model(), [[1, 2, 3], [4, 5]]
    wanted = generate(model, prompts, n=2, max_new_tokens=8)
    with pretend(gpus=2) as gpu:
        there = copy_to("cuda:1", model)
        sampler = Sampler(CONFIG, 4, 20, "cuda:1", torch.float32)
        found = generate(there, prompts, n=2, max_new_tokens=8, sampler=sampler)
        assert [c.tokens for c in found] == [c.tokens for c in wanted]
        assert gpu.captures and {stream.device.index for pair in gpu.waited_streams
                                 for stream in pair} == {1}
        with pytest.raises(ValueError, match="another shape, data type or device"):
            generate(copy_to("cuda:0", model), prompts, max_new_tokens=8, sampler=sampler)


# --------------------------------------------------------------------------------------------------
# Training

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Options that name a few problems and demonstrations, which are read in no time."""
    folder = tmp_path_factory.mktemp("data")
    for name, count in (("train", 12), ("test", 4), ("demonstrations", 8)):
        lines = (TINY / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:count]))
    return ["--batch-size", "2", "--n-on", "3", "--max-new-tokens", "16", "--max-prompt-length",
            "200", "--kl-coef", "0.01", "--learning-rate", "1e-3", "--checkpoint-every", "1",
            "--steps", "3", "--eval-every", "1", *itertools.chain(*(
                (f"--{name.replace('_', '-')}", str(folder / file)) for name, file in (
                    ("train_data", "train.jsonl"), ("test_data", "test.jsonl"),
                    ("demonstrations", "demonstrations.jsonl"))))]


def prepare(folder, device, *options):
    if torch.distributed.is_initialized():   # of the other device
        torch.distributed.destroy_process_group()
    return trainer.prepare([*options, "--device", device, "--output-dir", str(folder)])


def sampled_batch(run, step):
    responses = trainer.sample_responses(run, trainer.draw_questions(run, step), step)
    rewards = trainer.score_responses(run, responses)
    if run.options.old_logprobs == "recompute":
        trainer.recompute_logprobs(run, responses)
    return trainer.form_groups(run, responses, rewards, step)


def whole_weights(run):
    return {name: trainer.distributed.full_tensor(parameter.detach()).cpu()
            for name, parameter in run.model.named_parameters()}


BFLOAT16 = "--dtype bfloat16 --slots 6"
CASES = [
    "--method grpo --kl-coef 0", "--method icpo",
    "--method luffy --mini-batch-size 1 --max-new-tokens 48",
    "--method icpo-rs --errs false --recompute-activations cheap --micro-batch-tokens 300",
    "--optimizer-state bfloat16 --recompute-activations all --errs false",
    "--optimizer-state cpu --errs false --group append --n-off 2 --normalizer micro-batch",
    "--old-logprobs recompute --top-p 0.9 --top-k 20 --temperature 0.7 --errs false",
    f"{BFLOAT16} --optimizer-state bfloat16 --offload-reference true --errs false",
]


@pytest.mark.parametrize("options", CASES)
def test_two_steps_equal_those_of_the_cpu(options, on_gpu, data, tmp_path):
    """Both devices make the update of the same batch, so that a token sampled otherwise, where
    bfloat16 rounds, does not matter; the GPU samples, too."""
    here = re.sub("--optimizer-state cpu|--offload-reference true", "", options).split()
    exact = "bfloat16 --slots" not in options
    run = prepare(tmp_path / "cpu", "cpu", *data, *here)
    batches = []
    for step in range(2):
        batches.append(sampled_batch(run, step))
        batches[-1].advantages += torch.linspace(-1, 1, len(batches[-1].advantages))
        wanted = [trainer.update(run, part)
                  for part in batches[-1].mini_batches(run.options.mini_batch_size)]
    expected = whole_weights(run)
    with on_gpu():
        run = prepare(tmp_path / "gpu", "cuda", *data, *options.split())
        assert run.model.device.type == "cuda" and not torch.backends.cuda.cudnn_sdp_enabled()
        for step, batch in enumerate(batches):
            sampled = sampled_batch(run, step)
            if exact:
                assert [r.tokens for r in sampled.responses] == [r.tokens for r in batch.responses]
            found = [trainer.update(run, part)
                     for part in batch.mini_batches(run.options.mini_batch_size)]
        for state in run.optimizer.state.values():
            rest = run.options.optimizer_state
            assert state["exp_avg"].device.type == ("cpu" if rest == "cpu" else "cuda")
            assert (state["exp_avg_sq"].dtype == torch.bfloat16) == (rest == "bfloat16")
        weights = whole_weights(run)
    for one, two in zip(wanted, found, strict=True):
        assert two == pytest.approx(one, rel=2e-3 if exact else 0.1, abs=1e-3 if exact else 0.05)
    # A step moves a weight by about the learning rate, 1e-3, whatever its gradient.
    changed = [(weights[name] - expected[name]).abs().mean() for name in weights]
    assert max(changed) < (2e-5 if "bfloat16" not in options else 3e-4)


@pytest.mark.parametrize("state", ["bfloat16", "cpu"])
def test_a_resumed_run_on_a_gpu_equals_an_uninterrupted_one(on_gpu, data, state, tmp_path,
                                                            monkeypatch):
    # The pictures take seconds.
    monkeypatch.setattr(trainer.report, "draw", lambda runs, output: output.touch())
    with on_gpu():
        for folder, steps in (("whole", "2"), ("resumed", "1")):
            trainer.train(prepare(tmp_path / folder, "cuda", *data, "--steps", steps,
                                  "--optimizer-state", state, "--eval-every", "0"))
        trainer.train(prepare(tmp_path / "resumed", "cuda", "--resume", "--steps", "2"))
    for name, weights in weights_of(tmp_path / "whole").items():
        assert torch.allclose(weights_of(tmp_path / "resumed")[name], weights, atol=1e-4)
    rows = [[json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").open()]
            for folder in ("whole", "resumed")]
    assert [row["reward_on"] for row in rows[0]] == [row["reward_on"] for row in rows[1]]


def test_graphs_serve_rollout_after_rollout_where_memory_allows(data, tmp_path):
    """A gathered model stays at its place and gets the new weights; where it does not fit beside
    the update, it goes before that, and the graphs with it."""
    for room, kept in ((1 << 40, True), (50 << 20, False)):
        gc.collect()   # the runs of earlier tests
        with pretend() as gpu:
            gpu.free = torch.cuda.memory_allocated() + room
            run = prepare(tmp_path / str(kept), "cuda", *data, *BFLOAT16.split(),
                          "--recompute-activations", "none")
            captures = []
            for step in range(2):
                trainer.train_step(run, step, lambda phase: None)
                trainer.held_out_accuracy(run)
                captures.append(gpu.captures)
                assert run.sampler.keeps == run.weights_stay == kept
            model = run.sampler.model()
            assert (captures[1] < 2 * captures[0]) == kept
            if kept:
                whole = trainer.distributed.gather_model(run.model, torch.bfloat16)
                again = trainer.distributed.gather_model(run.model, torch.bfloat16, model)
                assert again is model
                for one, two in zip(model.parameters(), whole.parameters(), strict=True):
                    assert torch.equal(one, two)


@pytest.mark.parametrize("normalizer", ["batch", "micro-batch"])
def test_no_micro_batch_waits_for_the_one_before(data, tmp_path, monkeypatch, normalizer):
    waits, passes = [], trainer.distributed.passes
    with pretend() as gpu:
        monkeypatch.setattr(trainer.distributed, "passes", lambda *each: (
            (waits.append(gpu.waits.copy()), part)[1] for part in passes(*each)))
        run = prepare(tmp_path / "run", "cuda", *data, "--normalizer", normalizer, "--errs",
                      "false", "--max-prompt-length", "100", "--micro-batch-tokens", "120")
        trainer.update(run, sampled_batch(run, 0))
    assert len(waits) > 1 and waits[0] == waits[-1]


def test_an_update_of_adamw_waits_for_the_device_once(data, tmp_path):
    with pretend() as gpu:
        run = prepare(tmp_path / "run", "cuda", *data, "--optimizer-state", "bfloat16")
        for parameter in run.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        for _ in range(2):
            gpu.waits.clear()
            run.optimizer.step()
            assert gpu.waits.total() <= 1


# --------------------------------------------------------------------------------------------------
# Evaluation, and the choice of the device

def test_an_evaluation_has_one_sampler_and_the_samples_of_the_cpu(on_gpu, data, tmp_path,
                                                                 monkeypatch):
    """It appends problems as they are complete, before the longest answer has ended."""
    made, appended, at = [], [], {}
    monkeypatch.setattr(evaluation, "KEEP_EVERY", 4)
    monkeypatch.setattr(evaluation, "Sampler",
                        lambda *each: made.append(Sampler(*each)) or made[-1])
    append = evaluation.append_lines
    monkeypatch.setattr(evaluation, "append_lines", lambda file, rows: (
        appended.append(len(rows)), append(file, rows)))
    for device in ("cpu", "cuda"):
        output = tmp_path / f"{device}.jsonl"
        monkeypatch.setattr("sys.argv", [
            "eval.py", "--limit", "12", "--shots", "0", "1", "--samples", "2", "--slots", "4",
            "--demonstrations", data[-1], "--device", device, "--output", str(output)])
        with on_gpu() if device == "cuda" else contextlib.nullcontext():
            evaluation.main()
        assert len(made) == 1 and made.pop().slots == 4
        assert len(appended) > 6 and sum(appended) == 48
        appended.clear()
        at[device] = output.read_text()
    assert at["cuda"] == at["cpu"]


TWO = '''
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from pretend_cuda import pretend
import train
with pretend(gpus=1):
    train.main()
'''


def test_more_processes_than_gpus_are_one_clear_error(tmp_path, monkeypatch):
    (tmp_path / "two.py").write_text(TWO.format(root=str(ROOT)))
    done = run_script("two.py", "--output-dir", tmp_path / "run", processes=2, check=False,
                      root=tmp_path)
    message = ("2 processes on this machine need a GPU each, but PyTorch sees 1: start at most 1, "
               "or give --device cpu")
    assert done.returncode == 2 and done.stderr.count(message) == 1
    assert "Traceback" not in done.stderr
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pretend(gpus=2):
        assert init_distributed("cuda") == torch.device("cuda", 0)
    with pretend(gpus=1):
        assert init_distributed("cpu") == torch.device("cpu")


# --------------------------------------------------------------------------------------------------
# The benchmark

def test_the_benchmark_runs_from_end_to_end_and_a_part_that_fails_ends_no_other(
        data, tmp_path, monkeypatch):
    from benchmarks import gpu as benchmark
    from benchmarks import rollout as rollouts
    small = dict(vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    monkeypatch.setattr(rollouts, "QWEN3_1_7B", rollouts.QWEN3_1_7B | small)
    monkeypatch.setattr(benchmark, "measure_machine", lambda *arguments: (1e12, 1e15, ""))
    monkeypatch.setitem(benchmark.PARTS, "tests", lambda *arguments: 1 / 0)
    monkeypatch.setattr(trainer.report, "draw", lambda runs, output: output.touch())
    with pretend():
        benchmark.main([
            "--output", str(tmp_path / "gpu"), "--slots", "8", "--max-new-tokens", "4",
            "--sequences", "8", "--length", "32", "--micro-batch-tokens", "200", "--tokens", "64",
            "--run-options", " ".join([*data, "--steps", "1", "--checkpoint-every", "0"])],
            run=benchmark.run_part)
    written = json.loads((tmp_path / "gpu.json").read_text())["figures"]
    found = {(row["part"], row["name"]): row for row in written}
    assert [key[0] for key, row in found.items() if key[1] == "failed"] == ["tests"]
    assert "ZeroDivisionError" in found["tests", "failed"]["note"]
    for key in (("rollouts", "8 slots: ratio to generate"), ("update", "share of the matmul rate"),
                ("rollouts", "8 slots: share of the limit"), ("update", "distance of the estimate"),
                ("vocabulary", "peak memory beyond the weights"), ("default", "seconds"),
                ("types", "float32: log-probability gap, maximum"),
                ("types", "bfloat16: log-probability gap, maximum")):
        assert found[key]["value"] >= 0
    assert found["types", "float32: log-probability gap, maximum"]["met"] is True
    text = (tmp_path / "gpu.md").read_text()
    assert "| rollouts | 8 slots: ratio to generate |" in text and "| >= 10 |" in text


def test_a_part_of_the_benchmark_that_dies_is_a_line_of_the_table(monkeypatch):
    from benchmarks import gpu as benchmark
    monkeypatch.setattr(benchmark.sys, "executable", "false")
    row, = benchmark.run_process("update", benchmark.Options())
    assert row.value is None and row.note == "its process ended with status 1"
    assert "| update | failed | not measured (its process ended with status 1) |" in (
        benchmark.table([row], ""))
