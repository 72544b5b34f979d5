"""Compares the memory that memory.py computes with what is allocated: by a pass on the CPU and by
processes that share a model; and with what the configurations and docs/gpus.md say."""

import json
import math
import re
import shlex
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import run as run_script
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train as trainer
from distributed import wrap_blocks
from machine import control_group_memory
from memory import CONTEXT, Plan, bytes_per_slot, choose_recomputation, count_parameters
from model_utils import ModelConfig, Transformer, load_model, pack, response_logprobs
from options import EvaluationOptions, OptionParser, TrainingOptions, parse_training, resolve
from prepare import _check_evaluation, fill_slots
from rollout import Sampler, _Settings
from timing import FILLS, find_card, read_cards, step_seconds, time_table

ROOT = Path(__file__).resolve().parent.parent
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
QWEN3 = ModelConfig(151936, 2048, 6144, 28, 16, 8, 128, 1e-6, 1e6, None, 40960, True, False, False,
                    False, True)
SMOLLM2 = ModelConfig(49152, 576, 1536, 30, 9, 3, 64, 1e-5, 1e5, None, 8192, True, False, False,
                      False, False)
SHAPES = {   # by what the configurations call them
    "Qwen/Qwen3-1.7B": QWEN3,
    "Qwen/Qwen3-8B": replace(QWEN3, hidden_size=4096, intermediate_size=12288, num_layers=36,
                             num_heads=32, tie_embeddings=False),
    "Qwen/Qwen3-14B": replace(QWEN3, hidden_size=5120, intermediate_size=17408, num_layers=40,
                              num_heads=40, tie_embeddings=False),
    "models/Qwen2.5-Math-7B-16k": ModelConfig(152064, 3584, 18944, 28, 28, 4, 128, 1e-6, 4e4, None,
                                              16384, False, True, False, False, False),
    "HuggingFaceTB/SmolLM2-135M-Instruct": SMOLLM2,
}
SMALL = replace(QWEN3, vocab_size=3000, hidden_size=64, intermediate_size=192, num_layers=6,
                num_heads=4, num_kv_heads=2, head_dim=16)


# --------------------------------------------------------------------------------------------------
# Against what is allocated

@pytest.mark.parametrize("config", [
    *SHAPES.values(), replace(SMALL, out_bias=True, mlp_bias=True, qkv_bias=True)],
    ids=[*SHAPES, "biases"])
def test_parameters_are_counted(config):
    with torch.device("meta"):
        model = Transformer(config)
    block, rest = count_parameters(config)
    assert block == sum(p.numel() for p in model.model.layers[0].parameters())
    assert config.num_layers * block + rest == sum(p.numel() for p in model.parameters())


def test_a_slot_takes_what_the_sampler_allocates():
    sampler = Sampler(SMALL, 8, 100, "cpu", torch.bfloat16)
    sampler.prepare(torch.nn.Module(), _Settings(1.0, 1.0, 0, (0,), 50), 8, 100)
    tensors = [*sampler.cache.keys, *sampler.cache.values,
               *(value for value in vars(sampler).values() if isinstance(value, torch.Tensor))]
    allocated = sum(t.nbytes for t in tensors)
    decoding = 8 * SMALL.vocab_size * 4 * 4   # logits, and three times to draw a token
    assert bytes_per_slot(SMALL, 100, torch.bfloat16) * 8 == pytest.approx(
        allocated + decoding, rel=0.01)


@pytest.mark.skipif(not HUGE_PAGES.is_file() or "[never]" in HUGE_PAGES.read_text(),
                    reason="needs huge pages")
def test_large_tensors_lie_in_huge_pages(tmp_path):
    (tmp_path / "pages.py").write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import model_utils   # as every script of the project does before its first tensor
import torch
large = torch.ones(2 ** 25)
print(open("/proc/self/smaps_rollup").read())
""")
    shown = run_script("pages.py", root=tmp_path).stdout
    kilobytes, = re.findall(r"AnonHugePages: +(\d+) kB", shown)
    # Fragmented memory may lack some of them; without the setting there are none.
    assert int(kilobytes) > 2 ** 26 // 1024


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
def test_what_the_rollout_of_a_small_model_has_freed_stays(tmp_path):
    (tmp_path / "faults.py").write_text(f"""
import resource
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from machine import prepare_gradients, return_freed_memory

def pages():   # that Linux maps for 100 MB of tensors
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    [torch.ones(250_000) for _ in range(100)].clear()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

cpu, model = torch.device("cpu"), torch.nn.Module()
return_freed_memory(cpu)
found = [pages()]
for parameters in (10 ** 6, 10 ** 8):
    model.weight = torch.nn.Parameter(torch.zeros(parameters))
    prepare_gradients(model, cpu)
    found.append(pages())
print(*found)
""")
    first, small, large = map(int, run_script("faults.py", root=tmp_path).stdout.split())
    assert first > 20_000 and small < 10_000 and large > 20_000


@pytest.mark.parametrize("folder, names, kind", [
    ("", ("memory.max", "memory.current"), ""),
    ("memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_")])
@pytest.mark.parametrize("limit, room", [("1000", 450), ("600", 50), ("500", 0), ("max", math.inf)])
def test_a_container_leaves_what_its_limit_says(tmp_path, folder, names, kind, limit, room):
    """Of 700 bytes in use, 150 are files that the system can drop."""
    (tmp_path / folder).mkdir(exist_ok=True)
    assert control_group_memory(tmp_path) == math.inf
    stat = f"anon 550\n{kind}active_file 100\n{kind}inactive_file 50"
    for name, text in zip((*names, "memory.stat"), (limit, "700", stat), strict=True):
        (tmp_path / folder / name).write_text(text + "\n")
    assert control_group_memory(tmp_path) == room


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, while they live."""

    def __init__(self, known):
        super().__init__()
        self.now = self.peak = 0
        self.sizes = dict.fromkeys((t.untyped_storage()._cdata for t in known), 0)

    def forget(self, key):
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for storage in (t.untyped_storage() for t in tree_leaves(out)
                        if isinstance(t, torch.Tensor)):
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.forget, storage._cdata)
        return out


@pytest.mark.parametrize("vocabulary", [100, 6000])
@pytest.mark.parametrize("recompute", ["none", "cheap", "all"])
def test_a_pass_takes_what_is_computed(recompute, vocabulary):
    """Responses are nearly all of the tokens, as the estimate supposes."""
    config = replace(SMALL, vocab_size=vocabulary)
    model = Transformer(config)
    wrap_blocks(model, recompute)
    packing = pack([[1], [2], [3], [4]], [[5] * 256] * 4)
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    with Live([*parameters, *(p.grad for p in parameters)]) as live:
        logprobs, _ = response_logprobs(model, packing)
        held = live.now
        logprobs.sum().backward()
    options = TrainingOptions(micro_batch_tokens=1024, recompute_activations=recompute, kl_coef=0)
    plan = Plan(config, options, 1, "cpu")
    parts = plan.update(0)
    expected = sum(parts.values()) - 16 * plan.parameters
    assert held == pytest.approx(1024 * plan.kept, rel=0.05)
    assert live.peak == pytest.approx(expected, rel=0.1)


def test_recomputation_is_the_least_with_which_an_update_fits():
    plan = Plan(QWEN3, TrainingOptions(micro_batch_tokens=16384), 1, "cpu", own=1e9)
    room = {how: (sum(replace(plan, options=replace(plan.options, recompute_activations=how))
                      .update(0).values()) - plan.own) / 0.85 for how in ("none", "cheap", "all")}
    assert room["none"] > room["cheap"] > room["all"]
    for free, how in ((room["none"] + 1, "none"), (room["none"] - 1, "cheap"),
                      (room["cheap"] + 1, "cheap"), (room["cheap"] - 1, "all"), (0, "all")):
        assert choose_recomputation(plan, free) == how


MEASURE = """
import gc, json, sys
sys.path.insert(0, {root!r})
import torch
import torch.distributed as dist
import train as trainer
from distributed import gather_model
from model_utils import pack, response_logprobs
from torch.distributed.tensor import DTensor

def local(tensors):
    return sum(t.to_local().nbytes if isinstance(t, DTensor) else t.nbytes for t in tensors)

def alive():
    storages = {{t.untyped_storage()._cdata: t.nbytes for t in gc.get_objects()
                 if type(t) in (torch.Tensor, torch.nn.Parameter)}}
    return sum(storages.values())

gc.collect()
before = alive()
run = trainer.prepare(sys.argv[1:])
gc.collect()
found = {{"alive": alive() - before}}
responses = trainer.sample_responses(run, trainer.draw_questions(run, 0), 0)
batch = trainer.form_groups(run, responses, trainer.score_responses(run, responses), 0)
step = run.optimizer.step
def measured_step():
    found["gradients"] = local(p.grad for p in run.model.parameters())
    step()
run.optimizer.step = measured_step
trainer.update(run, batch)
found["whole"] = sum(not isinstance(p, DTensor) for p in run.reference.parameters())
found["weights"] = local(run.model.parameters())
found["reference"] = local(run.reference.parameters())
found["moments"] = local(t for state in run.optimizer.state.values()
                         for name, t in state.items() if name != "step")
packing = pack([[1, 2]], [[3, 4]])
with torch.no_grad():   # a pass without a backward pass leaves parameters whole
    expected, _ = response_logprobs(run.model, packing)
found["left whole"] = sum(not isinstance(p, DTensor) for p in run.model.parameters())
copy = gather_model(run.model, getattr(torch, run.options.dtype))
found["gathered"] = local(copy.parameters())
found["same"] = torch.equal(response_logprobs(copy, packing)[0], expected)
everyone = [None] * dist.get_world_size()
dist.all_gather_object(everyone, found)
if dist.get_rank() == 0:
    print("\\n" + json.dumps(everyone))
"""


@pytest.mark.parametrize("processes, settings", [
    (2, ["--dtype", "bfloat16", "--optimizer-state", "bfloat16"]), (3, []),
    (2, ["--shard-size", "1"])])
def test_every_process_keeps_its_own_part(processes, settings, tmp_path):
    (tmp_path / "measure.py").write_text(MEASURE.format(root=str(ROOT)))
    arguments = ["--batch-size", 6, "--n-on", 2, "--eval-every", 0, "--device", "cpu", *settings]
    said = run_script("measure.py", *arguments, "--output-dir", tmp_path / "run",
                      processes=processes, root=tmp_path).stdout
    everyone = json.loads([line for line in said.splitlines() if line.startswith("[{")][-1])
    options = resolve(parse_training(list(map(str, arguments))), processes)
    plan = Plan(load_model(ROOT / "tiny" / "model", "meta")[0].config, options, processes, "cpu")
    expected = {"weights": plan.weights, "gradients": 4 * plan.share, "reference": plan.reference,
                "moments": plan.moments}
    for found in everyone:
        assert found["gathered"] == plan.gathered and found["same"]
        # Weights around the blocks are whole only between a forward and a backward pass.
        assert found["whole"] == 0 and found["left whole"] > 0
        for name, size in expected.items():
            # Rows that do not divide make parts unequal.
            assert found[name] == pytest.approx(size, rel=0.02 if processes == 3 else 0), name
        # Nothing else of the model is left of the loading.
        assert found["alive"] < 1.1 * (plan.weights + plan.reference) + 100_000
    assert sum(found["weights"] for found in everyone) == pytest.approx(
        4 * plan.parameters * processes / (options.shard_size or processes), rel=1e-9)


LARGE = """
import json, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from distributed import frozen_copy, own_rows, shard
from model_utils import Transformer
from test_memory import SHAPES
from test_model_utils import make_model

dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=8)
found = {{}}
for name in ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-8B", "Qwen/Qwen3-14B"):
    with torch.device("meta"):
        model = Transformer(SHAPES[name])
    shard(model, torch.device("cpu"), torch.bfloat16)
    found[name] = sum(p.to_local().numel() * 4 for p in model.parameters())
shard(model := make_model(head_dim=16), torch.device("cpu"), torch.float32, 4)
meshes = [next(each.parameters()).device_mesh
          for each in (model, frozen_copy(model, torch.float32))]
shard(few := make_model(head_dim=4), torch.device("cpu"), torch.float32)   # 4 rows of norms
found["rows of few"] = str(own_rows(few.model.layers[0].self_attn.q_norm.weight))
found["groups of a copy"] = meshes[0].shape == (2, 4) and meshes[1] is meshes[0]
print(json.dumps(found))
"""


def test_large_models_are_split_among_eight_processes(tmp_path):
    """On the meta device, in one of eight processes whose others do not exist."""
    (tmp_path / "large.py").write_text(LARGE.format(root=str(ROOT)))
    found = json.loads(run_script("large.py", root=tmp_path).stdout.splitlines()[-1])
    options = resolve(parse_training(["--dtype", "bfloat16"]), 8)
    assert found.pop("groups of a copy")   # a second set would not wait for the first
    assert found.pop("rows of few") == "slice(0, 0, None)"   # safetensors refuses slice(4, 4)
    for name, size in found.items():
        assert size == pytest.approx(Plan(SHAPES[name], options, 8, "cuda").weights, rel=0.002)


# --------------------------------------------------------------------------------------------------
# The dry run, the configurations and docs/gpus.md

def table_of(arguments, held_out):
    """Returns (the plan of a dry run with --cards or on the CPU, its peak, the table)."""
    options = parse_training([*arguments, "--dry-run"])
    number, size = read_cards(options) or (1, 2.0 ** 34)
    resolve(options, number)
    config, length = SHAPES[options.model], options.max_prompt_length + options.max_new_tokens
    kind, own = ("cuda", CONTEXT) if options.cards else ("cpu", 0)
    plan = Plan(config, options, number, kind, own)
    options.slots = fill_slots(plan, held_out, size - own - plan.weights - plan.reference)
    cache = options.slots * bytes_per_slot(config, length, getattr(torch, options.dtype))
    return plan, plan.peak(cache), size, plan.table(cache, options.slots, size)


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")),
                         ids=lambda file: file.stem)
def test_every_configuration_says_what_it_takes(file):
    text = file.read_text()
    cards, claimed = re.search(r"^# .*?(?:--cards (\S+)\D*?|CPU\D*?)([\d.]+) GB", text,
                               re.M).groups()
    plan, peak, size, _ = table_of([str(file), *(["--cards", cards] if cards else [])], 500)
    assert f"{peak / 1e9:.1f}" == claimed and peak <= size
    assert text.splitlines().index(next(line for line in text.splitlines() if claimed in line)) < 3
    times = re.findall(r"On (\w+) it computes\n# ([\d,]+) seconds a step at the longest lengths "
                       r"and ([\d,]+) at a quarter of them; not measured on a GPU", text)
    if cards:
        card = find_card(cards.partition("x")[2])
        sums = (sum(step_seconds(plan, card, fill).values()) for fill in FILLS.values())
        assert times == [(card.name, *(f"{seconds:,.0f}" for seconds in sums))]
    else:
        assert not times


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")),
                         ids=lambda file: file.stem)
def test_the_commands_in_every_configuration_are_accepted(file):
    text = re.sub(r"\\\n#", " ", file.read_text())
    found = re.findall(r"^#   (.*(train|eval)\.py .*)$", text, re.M)
    assert f"train.py configs/{file.name}" in found[0][0]
    seen = set()
    for command, script in found:
        words = shlex.split(command, comments=True)
        arguments = words[words.index(f"{script}.py") + 1:]
        if script == "train":
            assert arguments[0] == f"configs/{file.name}"
            processes = re.search(r"--nproc-per-node (\d+)", command)
            options = parse_training([str(file), *arguments[1:]])
            resolve(options, int(processes.group(1)) if processes else 1)
            # What each command of a file trains differs.
            assert (kind := (options.method, options.errs)) not in seen
            seen.add(kind)
        else:
            _check_evaluation(OptionParser(EvaluationOptions, "").parse(arguments))


def test_the_arithmetic_of_small_cards_is_that_of_the_project():
    page = (ROOT / "docs" / "gpus.md").read_text()
    block, = re.findall(r"```\npython train.py (configs/qwen3-8b.yaml.*?)\n(Memory.*?)\n```", page,
                        re.S)
    arguments = block[0].replace("\\\n", " ").split()
    arguments.remove("--dry-run")
    _, peak, size, table = table_of([str(ROOT / arguments[0]), *arguments[1:]], 500)
    assert table == block[1] and peak < size


def test_the_time_in_the_page_is_that_of_the_project():
    page = (ROOT / "docs" / "gpus.md").read_text()
    file, cards, shown = re.search(r"```\npython train.py (\S+) --dry-run --cards (\S+)\n"
                                   r"(Seconds.*?)\n```", page, re.S).groups()
    plan = table_of([str(ROOT / file), "--cards", cards], 500)[0]
    assert time_table(plan, find_card(cards.partition("x")[2])) == shown


def test_a_dry_run_shows_the_first_question_and_writes_nothing(tmp_path):
    arguments = ["--train-data", "tiny", "--seed", "3", "--device", "cpu"]
    done = run_script("train.py", "--dry-run", *arguments, processes=2, cwd=tmp_path)
    assert not list(tmp_path.iterdir())
    arguments += ["--output-dir", tmp_path / "run"]
    question = trainer.draw_questions(trainer.prepare(list(map(str, arguments))), 0)[0]
    for tokens in (question.prompt, question.demos[0][1]):
        assert f"{len(tokens)} tokens:" in done.stdout and f"\n{tokens}\n" in done.stdout
    assert question.problem.problem in done.stdout
    assert "2000 training problems" in done.stdout and "2 demonstrations contain" in done.stdout
    assert "\nmini_batch_size: 16\n" in done.stdout   # as resolved
    assert "it fits" in done.stdout.splitlines()[-1]


def test_a_dry_run_needs_neither_weights_nor_gpus(tmp_path, capsys):
    for file in ("config.json", "generation_config.json", "tokenizer.json",
                 "tokenizer_config.json", "chat_template.jinja"):
        if (ROOT / "tiny" / "model" / file).is_file():
            (tmp_path / file).write_bytes((ROOT / "tiny" / "model" / file).read_bytes())
    arguments = ["--model", str(tmp_path), "--dry-run", "--output-dir", str(tmp_path / "run"),
                 "--dtype", "bfloat16", "--optimizer-state", "cpu", "--device", "cpu"]
    with pytest.raises(SystemExit) as ended:
        trainer.prepare([*arguments, "--cards", "4x24"])
    assert not ended.value.code
    assert "Memory of each of 4 GPUs" in (said := capsys.readouterr().out)
    assert "GB more are in the CPU's memory" in said
    assert "Seconds of a step on 4 RTX4090, computed and not measured" in said
    with pytest.raises(SystemExit):
        trainer.prepare([*arguments, "--cards", "4xA100"])
    said = capsys.readouterr().out
    assert "of 85.90 GB" in said and "Seconds of a step on 4 A100" in said
    with pytest.raises(SystemExit):
        trainer.prepare([*arguments, "--cards", "4x1", "--recompute-activations", "none"])
    said = capsys.readouterr().out
    assert "it does not fit" in said and "timing.py has no figures of this GPU" in said
    checkpoint = tmp_path / "old" / "checkpoints" / "step-2"   # its weights are not read either
    checkpoint.mkdir(parents=True)
    (tmp_path / "old" / "config.yaml").write_text("method: icpo\nmodel: tiny\n")
    with pytest.raises(SystemExit):
        trainer.prepare([*arguments[2:], "--model", str(checkpoint), "--cards", "4x24"])
    assert "it fits" in capsys.readouterr().out
    with pytest.raises(ValueError, match="give 8x80 for 8 of 80 GB"):
        trainer.prepare([*arguments, "--cards", "80"])
    with pytest.raises(ValueError, match="--cards is for --dry-run"):
        trainer.prepare(["--cards", "8x80", "--device", "cpu", "--output-dir",
                         str(tmp_path / "run")])
    with pytest.raises(ValueError, match="must divide the number of processes, 4, not be 8"):
        trainer.prepare([*arguments, "--cards", "4x80", "--shard-size", "8"])
    with pytest.raises(ValueError, match="does not divide among 3 processes"):
        trainer.prepare([*arguments, "--cards", "3x80"])
