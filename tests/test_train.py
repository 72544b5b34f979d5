"""Tests train.py on the embedded model: gradients, the procedure, resuming, users' mistakes."""

import gc
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, pstdev, stdev

import psutil
import pytest
import torch
import yaml
from golden import CLOCK
from processes import Script
from processes import run as run_script
from safetensors.torch import load_file

import distributed
import icpo
import runs
import train as trainer
from distributed import AdamW, learning_rate, micro_batches, round_at_random
from model_utils import load_model
from options import (
    METHODS,
    TrainingOptions,
    begin_imports,
    parse_training,
    resolve,
    settings_that_stay,
    without_effect,
)
from prepare import load_any_model

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tiny"
# The first 200 training problems of the embedded model: fewer prompts to make in each test.
_FEW = tempfile.TemporaryDirectory()
Path(_FEW.name, "few.jsonl").write_text("".join((TINY / "train.jsonl").open().readlines()[:200]))
SMALL = ["--train-data", f"{_FEW.name}/few.jsonl", "--batch-size", "4", "--n-on", "4",
         "--eval-problems", "16", "--steps", "4", "--eval-every", "2", "--checkpoint-every", "2",
         "--kl-coef", "0.01", "--device", "cpu"]

# With these a process has several micro-batches a step; no prompt is longer.
MANY_PARTS = ["--max-prompt-length", "152", "--micro-batch-tokens", "200"]


def test_a_program_collects_garbage_after_its_imports(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))   # It replaces both.
    begin_imports()
    assert not gc.isenabled()
    runs.begin_program()
    assert gc.isenabled()


def prepare(folder, *more):
    return trainer.prepare([*SMALL, "--output-dir", str(folder), *map(str, more)])


def sampled_batch(run, step=0):
    responses = trainer.sample_responses(run, trainer.draw_questions(run, step), step)
    rewards = trainer.score_responses(run, responses)
    return trainer.form_groups(run, responses, rewards, step)


def metrics_of(folder):
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCK}
            for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def weights_of(folder):
    return load_file(Path(folder) / "final" / "model.safetensors")


def torchrun(*arguments, processes=1):
    """Returns a command for the real torchrun, for tests of its restarts and of what it prints."""
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes),
            "--master-port", str(random.randint(20000, 60000)), *map(str, arguments)]


@pytest.fixture(autouse=True, scope="module")
def no_pictures():
    """Pictures take longer than these runs. Runs in processes of their own draw, and test_eval.py.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.report, "draw", lambda runs, output: output.touch())
        yield


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """Returns the folder of an uninterrupted run of four steps; its checkpoints have many files."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "FILE_BYTES", 1 << 20)
        trainer.train(prepare(folder))
    return folder


# --------------------------------------------------------------------------------------------------
# Exactness

@pytest.mark.parametrize("settings", [
    ["--method", "icpo-rs"],
    ["--temperature", "0.7"],
    ["--method", "luffy", "--dual-clip", "1.05", "--clip-low", "0.05"],
    ["--errs", "false", "--max-new-tokens", "30", "--shaping-lambda", "0.5",
     "--clip-off-policy", "false"],
    ["--errs", "false", "--max-new-tokens", "30", "--shaping-lambda", "0.5"],
    ["--shaping", "false", "--log-ratio-clamp", "0.1", "--clip-high", "0.4", "--group", "append"],
    ["--off-policy-denominator", "one", "--normalizer", "micro-batch", "--kl-coef", "0"],
    ["--loss-aggregation", "sequences", "--entropy-coef", "0.3"],
    ["--loss-aggregation", "sequences", "--normalizer", "micro-batch", "--entropy-coef", "0.3"],
    ["--loss-aggregation", "fixed", "--advantage-std", "false", "--temperature", "0.7",
     "--entropy-coef", "0.3", "--errs", "false", "--max-new-tokens", "34", "--mask-truncated"],
], ids=" ".join)
def test_the_gradient_is_that_of_the_objective_row_by_row(tmp_path, settings):
    """Compares with a loop over single rows, without padding, that computes (RATIO), f, (CLIP),
    KL and Z from full logits. The metrics of the objective are compared, too."""
    run = prepare(tmp_path / "run", "--max-prompt-length", 152, "--micro-batch-tokens", 200,
                  *settings)
    o = run.options
    batch = sampled_batch(run)
    reference, _ = load_model(TINY / "model")
    with torch.no_grad():   # gives the KL term a gradient and makes the ratios differ from 1
        for i, parameter in enumerate(run.model.parameters()):
            generator = torch.Generator().manual_seed(i)
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    model, _ = load_model(TINY / "model")
    model.load_state_dict(run.model.state_dict())

    loss = torch.zeros(())
    expected = dict.fromkeys(("policy_loss", "kl", "entropy"), 0.0)
    kept = [(row, advantage) for row, _, _, keep, advantage in batch.rows()
            if keep and (row.finished or not o.mask_truncated)]
    parts = [kept]
    if o.normalizer == "micro-batch":
        lengths = [len(row.question.prompt) + len(row.tokens) for row, _ in kept]
        parts = [[kept[i] for i in part] for part in micro_batches(lengths, 200)]
    for part in parts:
        tokens_of_part = sum(len(row.tokens) for row, _ in part)
        for row, A in part:
            Z = {"tokens": tokens_of_part, "sequences": len(part) * len(row.tokens),
                 "fixed": len(part) * o.max_new_tokens}[o.loss_aggregation] * len(parts)
            prompt = row.question.prompt
            tokens = torch.tensor([prompt + row.tokens])
            places = slice(len(prompt) - 1, len(prompt) + len(row.tokens) - 1)
            every, every_ref = ((each(tokens)[0, places] / o.temperature).log_softmax(-1)
                                for each in (model, reference))
            new, ref = (each[range(len(row.tokens)), row.tokens] for each in (every, every_ref))
            entropy = -(every.exp() * every).sum(-1)
            old = torch.tensor(row.old_logprobs)
            x = new - (0 if row.off_policy and o.off_policy_denominator == "one" else old)
            c = o.log_ratio_clamp
            ratio = (x.clamp(-c, c) if c else x).exp()
            if row.off_policy and o.shaping:
                ratio = ratio / (ratio + o.shaping_lambda)
            objective = torch.minimum(ratio * A, ratio.clamp(1 - o.clip_low, 1 + o.clip_high) * A)
            if o.dual_clip and A < 0:
                objective = objective.clamp(min=o.dual_clip * A)
            if row.off_policy and not o.clip_off_policy:
                objective = ratio * A
            x = ref.detach() - new
            kl = x.exp() - x - 1
            loss = loss + (o.kl_coef * kl - objective - o.entropy_coef * entropy).sum() / Z
            expected["policy_loss"] -= objective.sum().item() / Z
            # This is a mean over tokens where the loss divides by a fixed number.
            of_metric = tokens_of_part if o.loss_aggregation == "fixed" else Z
            expected["kl"] += kl.sum().item() / of_metric if o.kl_coef else 0.0
            expected["entropy"] += 0.0 if row.off_policy else entropy.sum().item()
    loss.backward()

    gradients = {}
    run.optimizer.step = lambda: gradients.update(
        {name: p.grad.clone() for name, p in run.model.named_parameters()})
    o.grad_clip = 1e9
    found = trainer.update(run, batch)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert any(row.off_policy for row, _ in kept) and loss.item() != 0
    for name, parameter in model.named_parameters():
        assert (gradients[name] - parameter.grad).norm() < 2e-4 * parameter.grad.norm(), name


@pytest.mark.parametrize("settings, all_learn", [
    (["--kl-coef", "0"], False),
    (["--kl-coef", "0", "--loss-aggregation", "sequences"], False),
    (["--kl-coef", "0.01"], True),
    (["--kl-coef", "0", "--entropy-coef", "0.1"], True),
    (["--kl-coef", "0", "--normalizer", "micro-batch"], True),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_rows_without_a_gradient_are_in_the_metrics_only(tmp_path, monkeypatch, settings,
                                                         all_learn):
    """The gradient and the metrics are those of an update that computes every row's gradient."""
    run = prepare(tmp_path, *MANY_PARTS, "--errs", "false", *settings)
    batch, share_rows = sampled_batch(run), distributed.share_rows
    with torch.no_grad():   # ratios differ from 1
        for parameter in run.model.parameters():
            parameter.mul_(1.01)
    batch.advantages = torch.linspace(-1, 1, len(batch.advantages)) * (batch.group % 2)
    trained, gradients, found = [], [], []
    run.optimizer.step = lambda: gradients.append(
        [parameter.grad.clone() for parameter in run.model.parameters()])

    def watched(rows, *more):
        parts = share_rows(rows, *more)
        trained.append(sum(len(part) for part, learns in parts if learns))
        assert sorted(row for part, _ in parts for row in part) == sorted(rows)
        return parts

    monkeypatch.setattr(distributed, "share_rows", watched)
    found.append(trainer.update(run, batch))
    monkeypatch.setattr(distributed, "share_rows", lambda rows, lengths, learn, budget: share_rows(
        rows, lengths, [True] * len(rows), budget))
    found.append(trainer.update(run, batch))
    kept = batch.keep.sum().item()
    assert trained == [kept if all_learn else (batch.keep & (batch.advantages != 0)).sum().item()]
    assert 0 < (batch.keep & (batch.advantages != 0)).sum() < kept
    for name in found[0].keys() - {"cells", "padding", "shared"}:   # these are of the packing
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-4, abs=1e-6), name
    for one, other in zip(*gradients, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize("of_each, expected", [
    # Rows of each process as (tokens, learns); expected: each process's micro-batches of up to 20
    # tokens, as the numbers of the rows among all of them.
    ([[(10, True)] * 4], [[([0, 1], True), ([2, 3], True)]]),
    ([[(10, False)] * 3], [[([0, 1], False), ([2], False), ([], True)]]),
    ([[(10, True)] * 6, []], [[([0, 1], True), ([2], True)], [([3, 4], True), ([5], True)]]),
    ([[(10, True), (10, False)] * 2, [(10, True)] * 2],
     [[([1], False), ([0, 2], True)], [([3], False), ([4, 5], True)]]),
    ([[(40, True)], [(10, True)] * 2], [[([0], True)], [([1, 2], True)]]),
    ([[], [(10, False)]], [[([], False), ([], True)], [([0], False), ([], True)]]),
    ([[], []], [[([], True)]] * 2),
])
def test_each_process_gets_as_many_tokens_and_micro_batches(monkeypatch, of_each, expected):
    numbered = iter(range(100))
    of_each = [[(next(numbered), *row) for row in rows] for rows in of_each]
    monkeypatch.setattr(distributed, "gather_lists", lambda mine: [
        (number, length, learns) for rows in of_each for number, length, learns in rows])
    monkeypatch.setattr(distributed, "world_size", lambda: len(of_each))
    for process, rows in enumerate(of_each):
        monkeypatch.setattr(distributed, "rank", lambda process=process: process)
        found = distributed.share_rows(*(map(list, zip(*rows)) if rows else ([], [], [])), 20)
        assert found == expected[process]


def test_an_empty_micro_batch_changes_nothing(tmp_path, monkeypatch):
    """A process whose rows are used up makes one where others still have some."""
    share_rows, updates = distributed.share_rows, []
    run = prepare(tmp_path / "run", "--entropy-coef", "0.1", "--errs", "false")
    batch = sampled_batch(run)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.mul_(1.01)
    run.optimizer.step = lambda: None
    for more in ([], [([], True)]):
        monkeypatch.setattr(distributed, "share_rows", lambda *arguments, more=more: (
            share_rows(*arguments) + more))
        updates.append(trainer.update(run, batch))
    for name in ("entropy", "on_policy", "kl", "policy_loss", "grad_norm"):
        assert updates[0][name] == pytest.approx(updates[1][name], rel=1e-5), name


def test_every_process_makes_as_many_micro_batches(monkeypatch):
    monkeypatch.setattr(distributed, "gather_objects", lambda mine: [mine, 3])
    assert distributed.micro_batches([10, 10], 20) == [[0, 1], [], []]


def test_an_update_without_any_gradient_is_one_of_zeros(tmp_path):
    run = prepare(tmp_path, "--kl-coef", 0)
    batch = sampled_batch(run)
    batch.advantages.zero_()
    found = trainer.update(run, batch)
    assert found["grad_norm"] == 0 and not found["skipped"] and found["entropy"] > 0
    assert {state["step"].item() for state in run.optimizer.state.values()} == {1}


def test_weights_that_stay_are_gathered_once_and_make_the_same_gradient(tmp_path, monkeypatch):
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
    gathered, gradients, plain = [], [], FSDPParam.init_all_gather_outputs
    monkeypatch.setattr(FSDPParam, "init_all_gather_outputs", lambda *each, **more: (
        gathered.append(1), plain(*each, **more)))
    run = prepare(tmp_path, "--dtype", "bfloat16", "--kl-coef", 0, *MANY_PARTS)
    batch = sampled_batch(run)
    batch.advantages += torch.linspace(-1, 1, len(batch.advantages))
    run.optimizer.step = lambda: gradients.append(
        [distributed.full_tensor(p.grad).clone() for p in run.model.parameters()])
    count = []
    for run.weights_stay in (False, True, False):
        gathered.clear()
        trainer.update(run, batch)
        count.append(len(gathered))
    assert count[1] == len(gradients[0]) < count[0] / 4 == count[2] / 4
    for of_one in zip(*gradients, strict=True):
        assert torch.equal(of_one[0], of_one[1]) and torch.equal(of_one[0], of_one[2])


def test_gradients_are_averaged_in_float32(monkeypatch):
    policies = []
    monkeypatch.setattr(distributed, "fully_shard", lambda module, mesh, mp_policy, **more: (
        policies.append((mp_policy.param_dtype, mp_policy.reduce_dtype))))
    model, _ = load_model(TINY / "model")
    distributed.shard(model, model.device, torch.bfloat16, mesh=object())
    assert set(policies) == {(torch.bfloat16, torch.float32)}


@pytest.mark.parametrize("processes, settings, layout", [
    (1, [], ["--recompute-activations", "cheap", "--micro-batch-tokens", "600"]),
    (2, [], ["--micro-batch-tokens", "560"]),
    (2, ["--method", "icpo-rs", "--group", "append", "--max-new-tokens", "30", "--kl-coef", "0"],
     ["--micro-batch-tokens", "1000"]),
    (2, [], ["--shard-size", "1", *MANY_PARTS]),
    (4, [], ["--shard-size", "2", "--recompute-activations", "all"]),
])
def test_other_layouts_make_the_same_run(whole_run, tmp_path, processes, settings, layout):
    """Sharding over all processes, over pairs or not at all, and other micro-batches, give the same
    samples, metrics and weights to float32 rounding. With `settings`, only the shorter off-policy
    responses are right and join their groups, so the processes sample different numbers of rows,
    and three of four groups have no gradient."""
    if settings:
        whole_run = tmp_path / "one"
        trainer.train(prepare(whole_run, "--steps", 2, *settings))
    run_script("train.py", *SMALL, "--steps", 2, *settings, *layout, "--output-dir",
               tmp_path / "two", "--slots", 7, processes=processes)
    assert (tmp_path / "two" / "curves.png").read_bytes().startswith(b"\x89PNG")
    rows = metrics_of(tmp_path / "two")
    assert len(rows) == 2
    for one, two in zip(metrics_of(whole_run), rows):
        assert one.keys() == two.keys()
        assert one.pop("logprob_gap") < 1e-4 and two.pop("logprob_gap") < 1e-4
        # These depend on which rows each process holds.
        for name in ("slot_occupancy", "wasted_positions", "padding_share", "shared_share"):
            assert 0 <= one.pop(name) <= 1 and 0 <= two.pop(name) <= 1
        assert one == pytest.approx(two, rel=2e-4, abs=1e-5)
    texts = [sorted((r["step"], r["off_policy"], r["response"], r["in_group"])
                    for r in map(json.loads, file.open()) if r["step"] <= 2)
             for file in (whole_run / "samples.jsonl", tmp_path / "two" / "samples.jsonl")]
    assert texts[0] == texts[1]
    start, one, two = (
        load_any_model(str(folder), torch.device("cpu"), torch.float32)[0].state_dict()
        for folder in (TINY / "model", whole_run / "checkpoints" / "step-2",
                       tmp_path / "two" / "checkpoints" / "step-2"))
    moved = sum((one[name] - start[name]).norm() ** 2 for name in start) ** 0.5
    apart = sum((one[name] - two[name]).norm() ** 2 for name in start) ** 0.5
    # Adam divides by the gradient's size, so rounding shows where gradients are near 0.
    assert apart < 0.01 * moved


@pytest.mark.parametrize("processes", [1, 2])
def test_a_resumed_run_equals_an_uninterrupted_one(whole_run, tmp_path, processes):
    folder = tmp_path / "resumed"
    shutil.copytree(whole_run, folder)
    shutil.rmtree(folder / "final")
    shutil.rmtree(folder / "checkpoints" / "step-4")
    for step in (3, 4):   # a kill during writing leaves these
        (folder / "checkpoints" / f".step-{step}.partial").mkdir()
    (folder / "metrics.jsonl").open("a").write('{"step": 5, "rewa')
    run_script("train.py", "--resume", "--output-dir", folder, "--device", "cpu",
               processes=processes)
    assert list((folder / "checkpoints" / "step-4").glob("*.safetensors"))
    assert not list((folder / "checkpoints").glob(".*"))
    if processes == 1:
        assert metrics_of(folder) == metrics_of(whole_run)
        for name, tensor in weights_of(whole_run).items():
            assert torch.equal(weights_of(folder)[name], tensor)
    else:
        for one, two in zip(metrics_of(whole_run), metrics_of(folder), strict=True):
            assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)


IN_OTHER_FOLDERS = """
import os, sys
sys.path[0] = {root!r}
from pathlib import Path
os.makedirs(os.environ["RANK"], exist_ok=True)
os.chdir(os.environ["RANK"])
import runs
if sys.argv.pop() == "unshared":   # the file system of the second process is another one
    writer = runs.HuggingFaceStorageWriter
    runs.HuggingFaceStorageWriter = lambda path, *args, **more: writer(
        path if os.environ["RANK"] == "0" else "elsewhere", *args, **more)
import train
train.main()
"""


@pytest.mark.parametrize("disk", ["shared", "unshared"])
def test_processes_may_start_in_other_folders_but_share_a_disk(tmp_path, disk):
    (tmp_path / "elsewhere.py").write_text(IN_OTHER_FOLDERS.format(root=str(ROOT)))
    done = run_script("elsewhere.py", *SMALL, "--steps", 1, "--eval-every", 0, "--output-dir",
                      "run", disk, processes=2, root=tmp_path, cwd=tmp_path,
                      check=disk == "shared")
    found = [list((tmp_path / rank).glob("run/checkpoints/*")) for rank in "01"]
    if disk == "shared":
        assert [path.name for path in found[0]] == ["step-1"] and not found[1]
        assert not runs._damage(found[0][0], {})
        run_script("elsewhere.py", "--resume", "--steps", 2, "--output-dir", "run", disk,
                   processes=2, root=tmp_path, cwd=tmp_path)
        assert [row["step"] for row in metrics_of(tmp_path / "0" / "run")] == [1, 2]
    else:
        assert done.returncode and found == [[], []]
        assert "must be on a file system that all processes share" in done.stderr


def test_no_file_of_a_checkpoint_is_large(whole_run):
    """Writing one takes twice its size in memory."""
    files = [load_file(path) for path in (whole_run / "checkpoints" / "step-4").iterdir()]
    assert len(files) > 4
    for tensors in files:
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 1 << 20


def cut(checkpoint):
    file = next(checkpoint.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1000])


def without_a_file(checkpoint):
    min(checkpoint.glob("*.safetensors")).unlink()   # it has weights, which eval.py reads, too


def without_its_files(checkpoint):
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def of_another_model(checkpoint):
    for file in checkpoint.glob("*.safetensors"):
        file.unlink()
    shutil.copy(TINY / "model" / "model.safetensors", checkpoint)


class Executes:
    def __reduce__(self):
        return os.mkdir, (os.environ["ICPO_TEST_FOLDER"],)


def with_a_pickle(checkpoint):
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Executes()))


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for step in (2, 9, 10):
        (tmp_path / "checkpoints" / f"step-{step}").mkdir(parents=True)
    assert [runs.step_of(each) for each in runs.find_checkpoints(tmp_path)] == [2, 9, 10]


@pytest.mark.parametrize("damage", [cut, without_a_file, without_its_files, of_another_model,
                                    with_a_pickle])
def test_the_checkpoint_before_a_damaged_one_serves(whole_run, tmp_path, monkeypatch, capsys,
                                                    damage):
    monkeypatch.setenv("ICPO_TEST_FOLDER", str(tmp_path / "executed"))
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    (folder / "checkpoints" / "step-3-kept").mkdir()   # a stray folder is no checkpoint
    damage(folder / "checkpoints" / "step-4")
    with pytest.raises(ValueError, match="step-4 is damaged|step-4 has"):
        prepare_eval_model(folder / "checkpoints" / "step-4")
    run = prepare(folder, "--resume")
    assert run.start == 2
    assert "step-4 is damaged" in capsys.readouterr().err
    assert (folder / "checkpoints" / "damaged-step-4").is_dir()
    trainer.train(run)
    assert metrics_of(folder) == metrics_of(whole_run)
    assert not (tmp_path / "executed").exists()


def prepare_eval_model(checkpoint):
    return load_any_model(str(checkpoint), torch.device("cpu"), torch.float32)


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(whole_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    for step in (2, 4):
        cut(folder / "checkpoints" / f"step-{step}")
    shutil.rmtree(folder / "final")
    before = metrics_of(folder)
    for _ in range(2):   # the first try has renamed them
        with pytest.raises(ValueError, match="no whole checkpoint to go on from"):
            prepare(folder, "--resume")
        assert metrics_of(folder) == before


def test_a_run_goes_on_with_a_version_that_has_more_options(whole_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    fingerprint = json.loads((folder / "fingerprint.json").read_text())
    config = yaml.safe_load((folder / "config.yaml").read_text())
    for settings in (config, fingerprint["settings"]):
        for name in ("columns", "keep_best", "lr_schedule", "off_policy_when"):
            settings.pop(name, None)
    (folder / "fingerprint.json").write_text(json.dumps(fingerprint))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    shutil.rmtree(folder / "checkpoints" / "step-4")
    run = trainer.prepare(["--resume", "--output-dir", str(folder), "--device", "cpu"])
    assert run.start == 2
    trainer.train(run)
    assert metrics_of(folder) == metrics_of(whole_run)


def test_a_run_without_checkpoints_begins_anew_and_keeps_its_metrics(whole_run, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    shutil.rmtree(folder / "checkpoints")
    shutil.rmtree(folder / "final")
    run = prepare(folder, "--resume")
    assert run.start == 0 and metrics_of(folder) == []
    said = capsys.readouterr().err
    assert "has no checkpoint, so the run begins anew" in said and "metrics-before.jsonl" in said
    for name in ("metrics", "samples"):
        kept = (folder / f"{name}-before.jsonl").read_text()
        assert kept == (whole_run / f"{name}.jsonl").read_text()


def test_a_start_that_was_killed_is_no_run_of_another(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.yaml.partial").write_text("model: ti")
    assert prepare(tmp_path / "run", "--resume").start == 0


def test_a_disk_that_is_full_at_the_start_is_a_message_and_leaves_no_folder(
        tmp_path, monkeypatch, capsys):
    def full(path, text, encoding):
        path.write_bytes(text.encode()[:9])
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setattr(runs, "begin_program", lambda: None)
    monkeypatch.setattr(sys, "argv", ["train.py", *SMALL, "--output-dir", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as end:
        trainer.main()
    assert end.value.code == 2
    assert "train.py: error: [Errno 28] No space left on device" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_that_goes_on_beyond_its_end_has_no_final_model_until_then(whole_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    damaged = tmp_path / "damaged"
    shutil.copytree(whole_run, damaged)
    shutil.rmtree(damaged / "checkpoints" / "step-4")
    for where, more, there in ((damaged, [], True), (folder, ["--steps", "6"], False)):
        prepare(where, "--resume", *more)
        assert (where / "final").is_dir() == there
    assert runs.find_model(str(folder))[1] == folder / "checkpoints" / "step-4"


def test_a_run_killed_in_the_middle_goes_on(whole_run, tmp_path):
    folder = tmp_path / "killed"
    script = Script("train.py", *SMALL, "--checkpoint-every", 1, "--output-dir", folder)
    script.wait_until((folder / "checkpoints" / "step-1").is_dir)
    script.signal(signal.SIGKILL)
    assert script.finish().returncode == -signal.SIGKILL
    assert not (folder / "final").exists()
    trainer.train(prepare(folder, "--checkpoint-every", "1", "--resume"))
    assert metrics_of(folder) == metrics_of(whole_run)
    # The run keeps its last two checkpoints.
    assert len(list((folder / "checkpoints").glob("step-*"))) == 2


def test_a_signal_lets_the_step_finish_and_the_run_goes_on(whole_run, tmp_path):
    folder = tmp_path / "stopped"
    for number in (signal.SIGTERM, signal.SIGINT):
        steps = len(metrics_of(folder)) if folder.exists() else 0
        script = Script("train.py", *SMALL, "--resume", "--output-dir", folder)
        file = folder / "metrics.jsonl"
        script.wait_until(lambda file=file, steps=steps:
                          file.is_file() and len(file.read_text().splitlines()) > steps)
        script.signal(number)
        ended, done = script.finish(), len(metrics_of(folder))
        assert ended.returncode == 0 and done > steps
        assert list((folder / "checkpoints" / f"step-{done}").glob("*.safetensors"))
        if done < 4:
            assert (f"stopped after step {done} of 4; go on with: torchrun train.py --resume "
                    f"--output-dir {folder}") in ended.stdout
    trainer.train(prepare(folder, "--resume"))
    assert metrics_of(folder) == metrics_of(whole_run)
    assert all(torch.equal(weights_of(folder)[name], tensor)
               for name, tensor in weights_of(whole_run).items())


def test_a_signal_to_one_of_two_processes_stops_both(tmp_path):
    folder = tmp_path / "run"
    script = Script("train.py", *SMALL, "--steps", 500, "--eval-every", 0, "--output-dir", folder,
                    processes=2)
    file = folder / "metrics.jsonl"
    script.wait_until(lambda: file.is_file() and file.read_text())
    os.kill(script.ranks[1].pid, signal.SIGTERM)
    for rank in script.ranks:
        rank.join(60)
    stuck = any(rank.is_alive() for rank in script.ranks)
    for rank in script.ranks:
        rank.kill()   # where it is still there
    ended = script.finish()
    assert not stuck and ended.returncode == 0, ended.stderr
    assert (folder / "checkpoints" / f"step-{len(metrics_of(folder))}").is_dir()


@pytest.mark.parametrize("restarts", [0, 1])
def test_a_killed_worker_restarts_or_ends_the_run(tmp_path, restarts):
    """torchrun starts the processes again and they resume the run; without restarts it ends all of
    them soon."""
    folder = tmp_path / "run"
    command = torchrun("--max-restarts", restarts, ROOT / "train.py", *SMALL, "--eval-every", "0",
                       "--checkpoint-every", "1", "--output-dir", folder, processes=2)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints" / "step-1").is_dir():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    worker = psutil.Process(process.pid).children()[-1]
    worker.kill()
    said, _ = process.communicate(timeout=60)
    if restarts:
        assert process.returncode == 0, said
        assert [row["step"] for row in metrics_of(folder)] == [1, 2, 3, 4]
        assert (folder / "final").is_dir()
    else:
        assert process.returncode == 1 and "exitcode  : -9" in said


LIMITED = '''
import resource, sys
sys.path[:0] = [{root!r}]
import train
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
train.main()
'''


def test_a_full_disk_ends_the_run_with_a_message(tmp_path):
    """A limit on the size of files takes the place of a full disk: the checkpoint exceeds it."""
    (tmp_path / "limited.py").write_text(LIMITED.format(root=str(ROOT)))
    settings = ["--steps", "2", "--eval-every", "0"]
    run = run_script("limited.py", *SMALL, *settings, "--output-dir", tmp_path / "run",
                     check=False, root=tmp_path)
    assert run.returncode == 1
    assert f"error: {tmp_path / 'run'} could not be written" in run.stderr
    assert "--resume --output-dir" in run.stderr and "Traceback" not in run.stderr
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    trainer.train(prepare(tmp_path / "run", *settings, "--resume"))
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == [1, 2]


def test_a_loss_that_is_not_finite_skips_its_update(tmp_path, monkeypatch):
    run = prepare(tmp_path / "run", "--max-skipped", "2", "--steps", "9", "--checkpoint-every", "0",
                  "--eval-every", "0")
    before, steps = [], []

    def loss(*arguments, **more):
        steps.append(0)
        if len(steps) <= 2:
            before[:] = [p.detach().clone() for p in run.model.parameters()]
        value, metrics = icpo_loss(*arguments, **more)
        return value * (math.nan if len(steps) != 2 else 1), metrics   # only step 2 is finite

    icpo_loss = icpo.icpo_loss
    monkeypatch.setattr(icpo, "icpo_loss", loss)
    with pytest.raises(runs.NotFinite, match="2 steps in a row.*skipped-step"):
        trainer.train(run)
    rows = metrics_of(tmp_path / "run")
    assert [row["skipped_updates"] for row in rows] == [1, 0, 1, 1]
    assert [row["grad_norm"] is None for row in rows] == [True, False, True, True]
    assert all(p.isfinite().all() for p in run.model.parameters())
    # Step 2 changed the weights.
    assert any((p != old).any() for p, old in zip(run.model.parameters(), before))
    assert {path.name for path in run.folder.glob("skipped*")} == {
        f"skipped-step-{n}.jsonl" for n in (1, 3, 4)}
    batch = [json.loads(line)
             for line in (run.folder / "skipped-step-3.jsonl").read_text().splitlines()]
    assert len(batch) == 20 and all(len(row["tokens"]) == len(row["old_logprobs"]) for row in batch)
    # The finite step is not lost, and what belongs to steps that are made again goes.
    again = tmp_path / "again"
    shutil.copytree(run.folder, again)
    saved = trainer.prepare(["--resume", "--output-dir", str(again), "--steps", "9"])
    assert saved.start == 4
    for mine, theirs in zip(run.model.parameters(), saved.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    runs.write_settings(again, saved.options, 2)
    assert [path.name for path in again.glob("skipped*")] == ["skipped-step-1.jsonl"]


def test_a_run_that_ends_not_finite_is_not_finished_by_a_resume(tmp_path, monkeypatch):
    icpo_loss = icpo.icpo_loss
    monkeypatch.setattr(icpo, "icpo_loss", lambda *arguments, **more: (
        icpo_loss(*arguments, **more)[0] * math.nan, icpo_loss(*arguments, **more)[1]))
    with pytest.raises(runs.NotFinite):
        trainer.train(prepare(tmp_path / "run", "--max-skipped", "2", "--steps", "2",
                              "--eval-every", "0"))
    again = tmp_path / "again"   # the error holds the run's folder
    shutil.copytree(tmp_path / "run", again)
    with pytest.raises(runs.NotFinite, match="2 steps in a row"):
        trainer.train(trainer.prepare(["--resume", "--output-dir", str(again)]))
    assert len(metrics_of(again)) == 2 and not (again / "final").exists()


def test_a_checkpoint_before_the_first_update_leaves_the_optimiser_as_it_is(tmp_path):
    moved = []
    for name, checkpoint in (("with", True), ("without", False)):
        run = prepare(tmp_path / name, "--learning-rate", "1e-3")
        if checkpoint:
            runs.save_checkpoint(run.folder, run.model, run.optimizer, 0, 2)
        trainer.update(run, sampled_batch(run))
        assert {state["step"].item() for state in run.optimizer.state.values()} == {1.0}
        moved.append([p.detach().clone() for p in run.model.parameters()])
    for mine, theirs in zip(*moved, strict=True):
        assert torch.equal(mine, theirs)


def test_a_schedule_that_has_ended_is_said(tmp_path, capsys):
    folder = tmp_path / "run"
    trainer.train(prepare(folder, "--steps", "1", "--lr-schedule", "linear", "--eval-every", "0"))
    capsys.readouterr()
    trainer.prepare(["--resume", "--output-dir", str(folder), "--steps", "2"])
    assert "--lr-schedule linear has ended at step 1, so the" in capsys.readouterr().err


def test_a_resumed_run_needs_its_reference_model(tmp_path):
    trainer.train(prepare(tmp_path / "base", "--steps", "1", "--learning-rate", "1e-3"))
    prepare(tmp_path / "run", "--model", tmp_path / "base")
    # A file that is not read does not matter.
    (tmp_path / "base" / "final" / "adapter_model.safetensors").write_bytes(b"x")
    trainer.prepare(["--resume", "--output-dir", str(tmp_path / "run")])
    trainer.train(trainer.prepare(["--resume", "--output-dir", str(tmp_path / "base"), "--steps",
                                   "2"]))
    with pytest.raises(ValueError, match=r"base \(--model\) is not the model with which .*run"):
        trainer.prepare(["--resume", "--output-dir", str(tmp_path / "run")])


def test_the_last_line_names_the_step_of_an_accuracy_before_the_end(tmp_path, capsys):
    trainer.train(prepare(tmp_path / "run", "--steps", "1", "--eval-every", "1"))
    assert "(step" not in capsys.readouterr().out
    trainer.train(trainer.prepare(["--resume", "--output-dir", str(tmp_path / "run"), "--steps",
                                   "2", "--eval-every", "0"]))
    assert re.search(r"went from [0-9.]+% to [0-9.]+% \(step 1\) \(", capsys.readouterr().out)
    file = tmp_path / "run" / "metrics.jsonl"   # now the only evaluation is before the first step
    file.write_text(file.read_text().replace('"eval_accuracy"', '"of_another_name"'))
    trainer.train(trainer.prepare(["--resume", "--output-dir", str(tmp_path / "run")]))
    assert re.search(r"accuracy was [0-9.]+% before the first step \(", capsys.readouterr().out)


def test_a_step_of_which_one_update_is_finite_is_no_skipped_step(tmp_path, monkeypatch, capsys):
    run = prepare(tmp_path / "run", "--max-skipped", "1", "--mini-batch-size", "2", "--steps", "2",
                  "--checkpoint-every", "0", "--eval-every", "0")
    before = [p.detach().clone() for p in run.model.parameters()]
    icpo_loss, calls = icpo.icpo_loss, []

    def loss(*arguments, **more):
        calls.append(0)
        value, metrics = icpo_loss(*arguments, **more)
        return value * (math.nan if len(calls) % 2 else 1), metrics

    monkeypatch.setattr(icpo, "icpo_loss", loss)
    trainer.train(run)
    assert [row["skipped_updates"] for row in metrics_of(tmp_path / "run")] == [1, 1]
    assert any((p != old).any() for p, old in zip(run.model.parameters(), before))
    assert "no step changed the model" not in capsys.readouterr().out


def test_restarts_need_the_name_of_the_folder(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(ValueError, match="--max-restarts needs --output-dir"):
        trainer.prepare(SMALL)


def test_restarts_are_for_one_node(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--max-restarts is for one node"):
        prepare(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_step_whose_responses_are_all_cut_off_and_masked_changes_little(tmp_path):
    run = prepare(tmp_path / "run", "--mask-truncated", "--max-new-tokens", "3", "--eval-every",
                  "0", "--steps", "2")
    trainer.train(run)
    for row in metrics_of(tmp_path / "run"):
        assert (row["truncated"], row["grad_norm"], row["policy_loss"]) == (1, 0, 0)
        assert row["entropy"] is None


def test_a_resumed_run_cannot_change_options_that_are_newer_than_it(whole_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    fingerprint = json.loads((folder / "fingerprint.json").read_text())
    del config["loss_aggregation"], fingerprint["settings"]["loss_aggregation"]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "fingerprint.json").write_text(json.dumps(fingerprint))
    with pytest.raises(ValueError, match="was run with loss_aggregation: tokens, not fixed"):
        prepare(folder, "--resume", "--loss-aggregation", "fixed")


def test_metrics_are_those_of_the_batch(tmp_path, monkeypatch):
    updates, update = [], trainer.update
    monkeypatch.setattr(trainer, "update", lambda *arguments: (
        updates.append(update(*arguments)), updates[-1])[1])
    run = prepare(tmp_path / "run", "--mini-batch-size", 2, "--learning-rate", "1e-3")
    metrics, batch = trainer.train_step(run, 0, lambda phase: None)
    rows, advantages = list(batch.rows()), {}
    for side, end in (("on", ""), ("off", "_off")):
        mine = [(r, reward) for r, reward, *_ in rows if r.off_policy == bool(end)]
        assert metrics[f"reward_{side}"] == pytest.approx(fmean(reward for _, reward in mine))
        assert metrics[f"response_length{end}"] == pytest.approx(
            fmean(len(r.tokens) for r, _ in mine))
        assert metrics[f"truncated{end}"] == pytest.approx(fmean(not r.finished for r, _ in mine))
    assert metrics["errs_accept_rate"] == fmean(accepted for r, _, accepted, *_ in rows
                                                if r.off_policy)
    assert metrics["answered"] == fmean(bool(run.final_answer(r.text)) for r, *_ in rows
                                        if not r.off_policy)
    assert metrics["tokens_sampled"] == sum(len(r.sampled) for r, *_ in rows)
    for r, *_, advantage in rows:
        advantages.setdefault(r.question.index, []).append(advantage)
    assert metrics["groups_all_equal"] == fmean(not any(each) for each in advantages.values())
    assert updates[0]["grad_norm"] != updates[1]["grad_norm"]
    for name in ("kl", "policy_loss", "grad_norm", "clip_fraction", "off_policy_share"):
        assert metrics[name] == pytest.approx(fmean(u[name] for u in updates))
    assert metrics["ratio_max"] == max(u["ratio_max"] for u in updates)


def test_the_gap_is_the_largest_difference_from_the_sampler(tmp_path, monkeypatch):
    run, sample = prepare(tmp_path / "run"), trainer.sample_responses

    def sample_otherwise(*arguments):
        responses = sample(*arguments)
        for response in responses:
            response.old_logprobs[0] += 0.5
        return responses

    monkeypatch.setattr(trainer, "sample_responses", sample_otherwise)
    metrics, _ = trainer.train_step(run, 0, lambda phase: None)
    assert metrics["logprob_gap"] == pytest.approx(0.5, abs=1e-3)


def test_shares_of_tokens_are_shares_with_every_aggregation(tmp_path):
    for aggregation in ("tokens", "fixed"):
        run = prepare(tmp_path / aggregation, "--loss-aggregation", aggregation)
        metrics, batch = trainer.train_step(run, 0, lambda phase: None)
        lengths = {side: sum(len(r.tokens) for r, *_, keep, _ in batch.rows()
                             if keep and r.off_policy == side) for side in (False, True)}
        assert metrics["off_policy_share"] == pytest.approx(
            lengths[True] / sum(lengths.values()), rel=1e-5)


def test_the_best_model_is_kept_beside_the_last(tmp_path, monkeypatch):
    """Before step 1, and after it, ...: the accuracy of step 2 is the highest, and that of step 4
    is equal."""
    accuracies = iter([0.9, 0.2, 0.6, 0.4, 0.6])
    monkeypatch.setattr(trainer, "held_out_accuracy", lambda run: {
        "tiny": {"accuracy": next(accuracies), "low": 0.0, "high": 1.0}})
    run = prepare(tmp_path / "run", "--eval-every", "1", "--checkpoint-every", "1",
                  "--keep-checkpoints", "4")
    trainer.train(run)
    best, second, last = (
        load_any_model(str(run.folder / part), torch.device("cpu"), torch.float32)[0].head
        for part in ("best", "checkpoints/step-2", "final"))
    assert torch.equal(best, second) and not torch.equal(best, last)
    del run   # unlocks its folder
    kept = (tmp_path / "run" / "best" / "model.safetensors").read_bytes()
    accuracies = iter([0.5])   # the resumed run knows the 0.6 before
    trainer.train(prepare(tmp_path / "run", "--eval-every", "1", "--steps", "5", "--resume"))
    assert (tmp_path / "run" / "best" / "model.safetensors").read_bytes() == kept
    monkeypatch.undo()
    trainer.train(prepare(tmp_path / "without", "--keep-best", "false", "--steps", "2"))
    assert not (tmp_path / "without" / "best").exists()
    # The run goes on; the model of its next evaluation is the best of those that are kept.
    trainer.train(prepare(tmp_path / "without", "--resume", "--keep-best", "--steps", "3"))
    assert (tmp_path / "without" / "best").exists()


def test_a_resumed_run_may_change_what_its_remaining_steps_do_not_depend_on():
    o = TrainingOptions()
    changes = set(vars(o)) - settings_that_stay(o).keys()
    assert changes == {
        "cards", "checkpoint_every", "compile", "compile_blocks", "demo_chat_template", "device",
        "dry_run", "eval_every", "keep_best", "keep_checkpoints", "log_questions", "max_skipped",
        "micro_batch_tokens", "offload_reference", "output_dir", "recompute_activations",
        "report_to", "resume", "reward_timeout", "shard_size", "show_samples", "slots", "steps"}
    o.normalizer = "micro-batch"
    assert changes - settings_that_stay(o).keys() == changes - {"micro_batch_tokens"}


def test_a_resumed_run_chooses_its_cache_slots_anew(tmp_path):
    """It may have fewer GPUs, or smaller ones."""
    run = prepare(tmp_path / "run", "--steps", "1")
    trainer.train(run)
    assert run.sampler.slots > 0
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["slots"] == 0


def test_a_run_is_repeated_from_its_config(whole_run, tmp_path):
    trainer.train(trainer.prepare(
        [str(whole_run / "config.yaml"), "--output-dir", str(tmp_path / "again")]))
    assert metrics_of(tmp_path / "again") == metrics_of(whole_run)


@pytest.mark.parametrize("part, step", [("", 4), ("checkpoints/step-2", 2)])
def test_a_run_begins_with_the_model_of_another(whole_run, tmp_path, part, step):
    run = prepare(tmp_path / "next", "--model", whole_run / part)
    model, _ = load_any_model(str(whole_run / "checkpoints" / f"step-{step}"),
                              torch.device("cpu"), torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), model.parameters()))


def test_bfloat16_moments_train_alike_and_resume(tmp_path):
    """The weights stay close to those with float32 moments, and a resumed run equals an
    uninterrupted one."""
    gradient = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.ones(64, 64)) for _ in range(2)]
    optimizers = [AdamW([w], rest, lr=0.01, weight_decay=0)
                  for w, rest in zip(weights, ("float32", "bfloat16"))]
    for scale in [1.0] * 50 + [0.1] * 1500:   # the second moment falls by a thousandth each step
        grad = scale * (1 + torch.randn(64, 64, generator=gradient))
        for weight, optimizer in zip(weights, optimizers):
            weight.grad = grad.clone()
            optimizer.step()
    exact, rounded = (optimizer.state[weight] for weight, optimizer in zip(weights, optimizers))
    assert rounded["exp_avg"].dtype == rounded["exp_avg_sq"].dtype == torch.bfloat16
    assert rounded["exp_avg_sq"].float().mean() == pytest.approx(
        exact["exp_avg_sq"].mean().item(), rel=0.01)
    assert (weights[0] - weights[1]).norm() < 0.02 * (weights[0] - 1).norm()

    settings = ["--optimizer-state", "bfloat16", "--eval-every", "0"]
    trainer.train(prepare(tmp_path / "whole", *settings))
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-4")
    trainer.train(prepare(tmp_path / "resumed", *settings, "--resume"))
    assert metrics_of(tmp_path / "resumed") == metrics_of(tmp_path / "whole")
    assert all(torch.equal(weights_of(tmp_path / "resumed")[name], tensor)
               for name, tensor in weights_of(tmp_path / "whole").items())


def test_a_custom_reward_scores_and_its_errors_name_the_line(tmp_path):
    (tmp_path / "own.py").write_text(
        "def short(responses, problems):\n    return [1 / len(text) for text in responses]\n"
        "def wrong(responses, problems):\n    return [len(problems[0].gone)]\n")
    run = trainer.prepare([*SMALL, "--reward", f"{tmp_path}/own.py:short", "--errs", "false",
                           "--output-dir", str(tmp_path / "a")])
    metrics, batch = trainer.train_step(run, 0, lambda phase: None)
    assert all(reward == 1 / len(row.text) for row, reward, *_ in batch.rows())
    assert metrics["verify_timeouts"] == 0
    done = run_script("train.py", *SMALL, "--reward", f"{tmp_path}/own.py:wrong", "--output-dir",
                      tmp_path / "b", check=False)
    assert done.returncode and f"{tmp_path}/own.py, line 4, in wrong: AttributeError" in done.stderr
    assert "When it is mended, go on with: torchrun train.py --resume" in done.stderr


def test_answers_that_the_reward_cannot_check_are_counted_and_shown(tmp_path):
    problems = [json.loads(line) for line in (TINY / "train.jsonl").read_text().splitlines()]
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row | {"answer": f"at least {row['answer']}"}) + "\n"
                            for row in problems))
    trainer.train(prepare(tmp_path / "run", "--train-data", file, "--steps", 1, "--log-questions",
                          0, "--eval-every", 0))
    row, = metrics_of(tmp_path / "run")
    samples = [json.loads(line)
               for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    pairs = [(each["final_answer"], each["answer"]) for each in samples]
    assert 0 < len(samples) <= row["unsettled"] <= 20 and len(set(pairs)) == len(pairs)
    assert all(each["unsettled"] and each["reward"] == 0 for each in samples)
    assert all(given and answer.startswith("at least ") for given, answer in pairs)
    assert row["reward_on"] == 0 and row["answered"] > 0


def test_a_run_without_final_answers_warns_in_its_first_steps(tmp_path, capsys):
    trainer.train(prepare(tmp_path / "run", "--answer-format", "tags", "--eval-every", 0))
    assert [row["answered"] for row in metrics_of(tmp_path / "run")] == [0] * 4
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning:" in line]
    assert [line.partition(" step ")[2].split()[0] for line in warnings] == ["1", "2", "3"]
    assert ("no plain response has a final answer of the form --answer-format tags; every reward "
            "is 0") in warnings[0]


def test_a_run_whose_responses_are_all_cut_off_warns(tmp_path, capsys):
    run = prepare(tmp_path / "run", "--max-new-tokens", 2, "--eval-every", 0, "--steps", 1)
    trainer.train(run)
    assert "all plain responses were cut off at --max-new-tokens 2; every reward is 0" in (
        capsys.readouterr().err)


@pytest.mark.parametrize("values", [[math.nan, 0.5], [0.5, math.nan], [math.nan]])
def test_the_largest_of_values_with_nan_is_nan(values):
    totals = distributed.Totals()
    for value in values:
        totals.maximum(gap=torch.tensor(value))
    assert math.isnan(totals.over_processes()["gap"])
    assert distributed.largest([0.25, 0.5, 0.0]) == 0.5


def test_rounding_at_random_keeps_the_mean():
    x = torch.full((100_000,), 1 + 2 ** -9)   # x is 1/4 of the way from 1 to the next bfloat16
    rounded = round_at_random(x, seed=0)
    assert set(rounded.tolist()) == {1.0, 1 + 2 ** -7}
    assert (rounded > 1).float().mean().item() == pytest.approx(0.25, abs=0.005)
    assert torch.equal(round_at_random(x, seed=0), rounded)
    assert not torch.equal(round_at_random(x, seed=1), rounded)


def test_a_run_in_bfloat16_is_resumed_in_bfloat16(tmp_path):
    """FSDP's mixed precision needs a process group even in a single process, which makes one after
    it has read the settings of the run. Options that a model decides may be given as at first."""
    run_script("train.py", *SMALL, "--eval-every", "0", "--dtype", "bfloat16", "--output-dir",
               tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-4")
    run_script("train.py", "--resume", "--output-dir", tmp_path / "resumed", "--device", "cpu",
               "--demo-format", "auto", "--max-new-tokens", "0")
    assert metrics_of(tmp_path / "resumed") == metrics_of(tmp_path / "whole")


# --------------------------------------------------------------------------------------------------
# The procedure

def test_a_run_folder_holds_all_files_and_metrics(whole_run):
    assert {path.name for path in whole_run.iterdir()} == {
        "config.yaml", "fingerprint.json", "metrics.jsonl", "samples.jsonl", "checkpoints", "final",
        "best", "curves.png"}
    rows = [json.loads(line) for line in (whole_run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    promised = {"reward_on", "reward_off", "errs_accept_rate", "bonus", "entropy", "clip_fraction",
                "ratio_max", "logprob_gap", "clip_at_start", "kl", "grad_norm", "response_length",
                "tokens_per_second", "step_seconds", "prefill_seconds", "decode_seconds",
                "slot_occupancy", "wasted_positions"}
    assert all(promised <= row.keys() for row in rows)
    assert [row["step"] for row in rows if "eval_accuracy" in row] == [2, 4]
    assert [row["tokens_per_second"] * row["step_seconds"] for row in rows] == pytest.approx(
        [row["tokens_sampled"] for row in rows])
    assert "eval_accuracy_before" in rows[0]
    assert max(row["logprob_gap"] for row in rows) < 1e-4   # sampler and trainer compute the same
    load_model(whole_run / "final")
    modes = {file.stat().st_mode for file in (whole_run / "final").iterdir()}
    assert len(modes) == 1   # others may read the weights if they may read the rest


@pytest.mark.parametrize("arguments, off_policy, sampled, kept", [
    (["--method", "grpo"], 0, 16, 16),
    (["--method", "icpo"], 4, 20, 16),
    (["--method", "icpo-rs"], 4, 20, 16),
    (["--method", "luffy"], 4, 20, 16),
    (["--method", "icpo", "--errs", "false", "--n-off", "2"], 8, 24, 16),
    (["--method", "icpo", "--errs", "false", "--group", "append", "--n-on", "3"], 4, 16, 16),
    (["--method", "icpo", "--errs-strict", "true"], 4, 20, 16),
    (["--method", "icpo", "--num-demonstrations", "0"], 4, 20, 16),
    (["--method", "icpo-rs", "--errs", "false", "--max-new-tokens", "30", "--alpha", "0.5",
      "--bonus-steps", "8", "--bonus-decay", "cosine"], 4, 20, 16),
    (["--delta", "0", "--max-new-tokens", "30"], 4, 20, 16),
    (["--method", "icpo", "--advantage-eps", "0.5", "--std-unbiased", "false",
      "--temperature", "0.5"], 4, 20, 16),
])
def test_mixed_groups_follow_the_options(tmp_path, arguments, off_policy, sampled, kept):
    run = prepare(tmp_path / "run", *arguments)
    o = run.options
    step = 6 if o.bonus_steps == 8 else 0
    batch = sampled_batch(run, step)
    bonus, rows = batch.bonus, list(batch.rows())
    assert (len(rows), batch.off_policy.sum(), batch.keep.sum()) == (sampled, off_policy, kept)
    # The cosine at 6 of 8 steps; the whole bonus at step 0.
    gamma = (1 + math.cos(0.75 * math.pi)) / 2 if step else 1.0
    assert bonus == (o.alpha * gamma if o.method == "icpo-rs" else 0.0)
    for index in range(4):
        group = [row for row in rows if row[0].question.index == index]
        shaped = []
        for row, reward, accepted, keep, advantage in group:
            problem, prompt = row.question.problem, row.question.prompt
            # The objective conditions every row on the plain prompt.
            assert prompt == run.builder.plain(problem)
            right = row.text.endswith(f"\\boxed{{{problem.answer}}}")
            assert reward == right
            if row.off_policy:
                enters = not o.errs or reward >= o.delta and not o.errs_strict
                assert accepted == keep == enters
                longer = len(row.behaviour_prompt) > len(prompt)
                assert longer == (o.off_policy == "demonstrations" and o.num_demonstrations > 0)
                if o.off_policy == "dataset":
                    assert row.text == problem.expert_response
                    assert row.tokens[-1] in run.model.stop_ids
                    assert row.finished and not any(row.old_logprobs)
            else:
                assert row.behaviour_prompt == prompt
            if keep:
                shaped.append(reward + bonus * (row.off_policy and right))
            else:
                assert advantage == 0
        std = (stdev if o.std_unbiased else pstdev)(shaped)
        assert [advantage for *_, keep, advantage in group if keep] == pytest.approx(
            [(reward - fmean(shaped)) / (std + o.advantage_eps) for reward in shaped])


def test_each_mini_batch_is_updated_with_its_own_questions(tmp_path, monkeypatch):
    run = prepare(tmp_path / "run", "--mini-batch-size", "2")
    seen, update = [], trainer.update
    monkeypatch.setattr(trainer, "update", lambda run, batch: seen.append(
        set(batch.group.tolist())) or update(run, batch))
    metrics, _ = trainer.train_step(run, 0, lambda phase: None)
    assert seen == [{0, 1}, {2, 3}]
    # The gap is that of the first update; the second one sees other weights than the sampler did.
    assert metrics["logprob_gap"] < 1e-4 and metrics["clip_at_start"] == 0


def test_clip_at_start_counts_on_policy_tokens_beyond_the_clip_range(tmp_path, monkeypatch):
    """Log-probabilities that are off by 0.5, 0.3 or 0.1 in three tokens of each response stand for
    rounding; of the ratios 1.65, 1.35 and 0.90, the default range of 0.8 to 1.2 leaves out two."""
    run = prepare(tmp_path / "run", "--mini-batch-size", "2")

    def sample(*arguments):
        responses = sampled(*arguments)
        for response in responses:
            for place, error in enumerate((0.5, 0.3, -0.1)):
                response.old_logprobs[place] -= error
        return responses

    sampled = trainer.sample_responses
    monkeypatch.setattr(trainer, "sample_responses", sample)
    metrics, batch = trainer.train_step(run, 0, lambda phase: None)
    first = [r for r, *_, keep, _ in batch.rows()
             if keep and not r.off_policy and r.question.index < 2]
    assert metrics["clip_at_start"] == 2 * len(first) / sum(len(r.tokens) for r in first) > 0


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_sampler_saw_the_demonstrations_and_recomputing_agrees(tmp_path, temperature):
    """The old log-probabilities of off-policy rows are conditional on [D; q]: a second pass over
    these prompts gives the same."""
    run = prepare(tmp_path / "run", "--temperature", temperature)
    rows = sampled_batch(run).responses
    sampled = [list(row.old_logprobs) for row in rows]
    assert 0 < trainer.recompute_logprobs(run, rows) < 1e-4
    for row, before in zip(rows, sampled):
        assert row.old_logprobs == pytest.approx(before, abs=1e-4)


@pytest.mark.parametrize("arguments", [
    ["--top-k", "1"], ["--top-p", "1e-6"], ["--temperature", "0.001"]])
def test_the_sampling_options_reach_the_sampler(tmp_path, arguments):
    """Each of these options makes all on-policy responses to a question equal."""
    run = prepare(tmp_path / "run", *arguments, "--old-logprobs", "recompute")
    rows = sampled_batch(run).responses
    for index in range(4):
        assert len({row.text for row in rows
                    if row.question.index == index and not row.off_policy}) == 1


def test_off_policy_responses_where_all_plain_ones_are_wrong(tmp_path):
    """Those questions get the responses that they would get anyway, and others get none."""
    for method, more in (("icpo", []), ("luffy", ["--max-new-tokens", "48"])):
        always, wrong = (sampled_batch(prepare(
            tmp_path / f"{method}-{when}", "--method", method, "--off-policy-when", when,
            "--batch-size", "12", *more)) for when in ("always", "all-wrong"))
        solved = {r.question.index for r, reward, *_ in always.rows()
                  if not r.off_policy and reward == 1}
        assert 0 < len(solved) < 12
        expected = [r.tokens for r in always.responses
                    if not (r.off_policy and r.question.index in solved)]
        assert [r.tokens for r in wrong.responses] == expected
        assert wrong.rewards.tolist() == [r.reward for r in wrong.responses]


def test_off_policy_responses_of_no_question(tmp_path):
    """A reward of 1 for all leaves nothing to sample; two processes may differ in that."""
    (tmp_path / "own.py").write_text(
        "def one(responses, problems):\n    assert responses\n    return [1.0] * len(responses)\n"
        "def once(responses, problems):\n    return [float('1' in p.id) for p in problems]\n")
    for name, processes in (("one", 1), ("once", 2)):
        folder = tmp_path / name
        run_script("train.py", *SMALL, "--steps", 1, "--eval-every", 0, "--off-policy-when",
                   "all-wrong", "--reward", f"{tmp_path}/own.py:{name}", "--output-dir", folder,
                   processes=processes)
        row, = metrics_of(folder)
        assert (row["reward_off"] is None) == (name == "one")


@pytest.mark.parametrize("settings, expected", [
    ([], [8, 8, 8, 8, 8, 8]),
    (["--lr-warmup-steps", "4"], [2, 4, 6, 8, 8, 8]),
    (["--lr-schedule", "linear", "--lr-warmup-steps", "2"], [4, 8, 8, 6, 4, 2]),
    (["--lr-schedule", "cosine", "--lr-decay-steps", "4"],
     [8, 4 + 8 ** 0.5, 4, 4 - 8 ** 0.5, 0, 0]),
])
def test_the_learning_rate_follows_its_schedule(settings, expected):
    options = resolve(parse_training(["--learning-rate", "8", "--steps", "6", *settings]))
    found = [learning_rate(options, step) for step in range(6)]
    assert found == pytest.approx(expected)


def test_the_optimiser_has_the_settings_of_its_options(tmp_path):
    settings = ["--adam-beta1", "0.8", "--adam-beta2", "0.95", "--adam-eps", "1e-6",
                "--learning-rate", "1e-3", "--lr-warmup-steps", "2", "--eval-every", "0",
                "--steps", "2", "--weight-decay", "0.3", "--grad-clip", "0.01"]
    run, norms = prepare(tmp_path / "run", *settings), []
    group, = run.optimizer.param_groups
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.95), 1e-6, 0.3)
    run.optimizer.register_step_pre_hook(lambda *arguments: norms.append(
        torch.cat([p.grad.flatten() for p in run.model.parameters()]).norm().item()))
    trainer.train(run)
    assert norms == pytest.approx([0.01, 0.01], rel=1e-3)
    assert min(row["grad_norm"] for row in metrics_of(tmp_path / "run")) > 0.01
    assert [row["learning_rate"] for row in metrics_of(tmp_path / "run")] == [5e-4, 1e-3]
    assert parse_training(["--steps", "9"], {"lr_decay_steps": 2}).lr_decay_steps == 2


@pytest.mark.parametrize("name, options, expected", [
    ("wrap_blocks", ["--recompute-activations", "cheap", "--compile-blocks"], ["cheap", True]),
    ("frozen_copy", ["--offload-reference"], [torch.float32, True]),
    ("Sampler", ["--compile"], [torch.float32, True, False])])
def test_what_saves_memory_or_time_reaches_what_does_it(tmp_path, monkeypatch, name, options,
                                                        expected):
    def call(*arguments):
        assert list(arguments)[-len(expected):] == expected
        raise InterruptedError

    monkeypatch.setattr(f"prepare.{name}", call)
    monkeypatch.setattr("prepare.require", lambda *arguments: None)   # some are for GPUs alone
    with pytest.raises(InterruptedError):
        prepare(tmp_path / "run", *options)


def test_evaluations_in_training_sample_with_their_settings(tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(trainer, "evaluate", lambda *arguments, **how: found.append(how) or [])
    monkeypatch.setattr(trainer, "accuracy_of", lambda records, samples: found.append(samples))
    run = prepare(
        tmp_path / "run", "--eval-temperature", "0.3", "--eval-top-p", "0.9", "--eval-top-k", "5",
        "--eval-samples", "2", "--temperature", "0.8", "--max-new-tokens", "20")
    trainer.held_out_accuracy(run)
    how, samples = found
    assert how["scorer"] is run.scorer
    assert [how[name] for name in ("temperature", "top_p", "top_k", "samples", "max_new_tokens")
            ] == [0.3, 0.9, 5, samples, 20] and samples == 2


def test_luffy_release_sets_what_is_not_given():
    o = resolve(parse_training(["--method", "luffy-release", "--entropy-coef", "0.5"]))
    assert (o.off_policy, o.off_policy_denominator, o.shaping_lambda) == ("dataset", "one", 0.1)
    assert (o.n_on, o.n_off, o.group, o.advantage_std) == (7, 1, "append", False)
    assert (o.clip_low, o.clip_off_policy, o.kl_coef, o.entropy_coef) == (1.0, False, 0.0, 0.5)
    ratio, A = torch.rand(2, 50) * 100, torch.randn(2, 50)
    assert torch.equal(icpo.clip(ratio, A, o.clip_low, o.clip_high), ratio * A)   # no clip binds


def test_ief_off_is_grpo():
    options = resolve(parse_training(["--off-policy", "none"]))
    grpo = resolve(parse_training(["--method", "grpo"]))
    assert {name for name in vars(options)
            if getattr(options, name) != getattr(grpo, name)} == {"method"}


def test_random_choices_depend_on_seed_step_question_and_place(tmp_path, monkeypatch):
    """No two responses of a run, evaluations included, have the same stream of random numbers."""
    asked, orders, demonstrations = [], [], {}
    generate = trainer.generate

    def listen(*arguments, **settings):
        asked.append((settings["seed"], settings["stream_ids"]))
        return generate(*arguments, **settings)

    monkeypatch.setattr(trainer, "generate", listen)
    for seed in (0, 1):
        run = prepare(tmp_path / str(seed), "--seed", seed, "--n-off", 2, "--n-on", 2,
                      "--max-new-tokens", 4)
        orders.append([question.problem.id for question in trainer.draw_questions(run, 0)])
        run.problems = run.problems[:1]
        for step in (0, 1):
            questions = trainer.draw_questions(run, step)
            demonstrations |= {(seed, step, question.index, j): tuple(each.id for each in drawn)
                               for question in questions
                               for j, (drawn, _) in enumerate(question.demos)}
            trainer.sample_responses(run, questions, step)
        assert {given for given, _ in asked[-2:]} == {seed}
        streams = [*range(16), *asked[-2][1], *asked[-1][1]]   # the first are an evaluation's
        assert len(set(streams)) == len(streams) == 16 + 2 * 4 * (1 + 2)
    assert orders[0] != orders[1]
    for part in range(4):
        alike = {}
        for key, drawn in demonstrations.items():
            alike.setdefault(key[:part] + key[part + 1:], set()).add(drawn)
        assert any(len(each) > 1 for each in alike.values()), part


def test_questions_come_once_an_epoch(tmp_path):
    run = prepare(tmp_path / "run")
    run.problems = run.problems[:10]
    questions = [question for step in range(5) for question in trainer.draw_questions(run, step)]
    drawn = [question.problem.id for question in questions]
    assert [question.index for question in questions] == [0, 1, 2, 3] * 5
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == sorted(p.id for p in run.problems)
    assert drawn[:10] != drawn[10:]


@pytest.mark.parametrize("arguments", [
    ["--method", "luffy"],
    ["--mini-batch-size", "2", "--old-logprobs", "recompute", "--top-p", "0.9"],
    ["--normalizer", "micro-batch", "--group", "append", "--dual-clip", "3", "--log-ratio-clamp",
     "20", "--clip-off-policy", "false", "--std-unbiased", "false", "--shaping", "false"],
    ["--method", "grpo", "--kl-coef", "0", "--eval-every", "0", "--checkpoint-every", "0"],
    ["--dtype", "bfloat16"]])
def test_other_settings_train(tmp_path, arguments):
    run_script("train.py", *SMALL, "--steps", "2", *arguments, "--output-dir", tmp_path / "run")
    rows = metrics_of(tmp_path / "run")
    assert len(rows) == 2 and all(row["grad_norm"] > 0 for row in rows)
    assert all(row["kl"] == 0 for row in rows) == ("--kl-coef" in arguments)


# --------------------------------------------------------------------------------------------------
# Users' mistakes

@pytest.mark.parametrize("arguments, message", [
    (["--num-demonstrations", "0", "--demo-format", "text"], "without demonstrations .* the chat "),
    (["--batch-size", "6", "--mini-batch-size", "4"],
     "6 questions does not divide into mini-batches of 4"),
    (["--n-on", "0"], "--n-on must be at least 1, not 0"),
    (["--temperature", "0"], "--temperature must be above 0"),
    (["--eval-temperature", "1e-7"], "--eval-temperature must be at least 0, and 0 or from 1e-6"),
    (["--n-off", "0"], "--method grpo"),
    (["--method", "grpo", "--rs", "true"], "--rs true acts on off-policy responses"),
    (["--n-on", "1", "--n-off", "2"], "cannot replace"),
    (["--top-p", "0.5"], "--old-logprobs recompute"),
    (["--method", "luffy", "--off-policy-denominator", "behaviour"], "no known behaviour policy"),
    (["--max-prompt-length", "1000"], "pass the model's 1024 positions"),
    (["--max-prompt-length", "5"], "no held-out problems are left.* over 5 tokens"),
    (["--max-prompt-length", "30"],
     "no training problems are left.*room for 1 demonstrations in 30 tokens"),
    (["--batch-size", "4000"], "fewer than --batch-size 4000"),
    (["--train-data", "nowhere.jsonl"], "no data file at nowhere.jsonl"),
    (["--model", "./nowhere"], "no model at './nowhere'"),
    (["--demo-min-chars", "9999"], "only 0 of .* are usable"),
    (["--micro-batch-tokens", "500"],
     "--micro-batch-tokens 500 does not hold one sequence of --max-prompt-length 512"),
    (["--optimizer-state", "cpu", "--device", "cpu"], "--optimizer-state cpu is for GPUs"),
    (["--offload-reference", "true", "--device", "cpu"], "--offload-reference true is for GPUs"),
])
def test_mistakes_end_before_training_and_say_what_was_given(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path / "run", *arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments, message", [
    (["--lerning-rate", "1"], "unknown option --lerning-rate; did you mean --learning-rate?"),
    (["--learn", "1"], "unknown option --learn"),
    (["--method", "ppo"], "invalid choice: 'ppo'"),
    (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
    (["none.yaml"], "no configuration file at none.yaml"),
])
def test_invalid_options_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_training(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_the_command_line_overrides_a_configuration_file(tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text("learning_rate: 1e-6\nmethod: luffy\nchat_template: false\n"
                    "shaping_lambda: null\n")
    options = resolve(parse_training([str(file), "--method", "grpo"]))
    assert (options.learning_rate, options.method, options.chat_template) == (1e-6, "grpo", False)
    file.write_text("lerning_rate: 1e-6\n")
    with pytest.raises(SystemExit):
        parse_training([str(file)])
    message = "c.yaml: unknown option 'lerning_rate'; did you mean learning_rate?"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("of_file", METHODS)
def test_what_a_file_implies_gives_way_to_the_command_line(tmp_path, of_file, method):
    """config.yaml of a run has every option as resolved."""
    file = tmp_path / "config.yaml"
    (tmp_path / "fingerprint.json").write_text("{}")
    left_out = ("resume", "output_dir", "dry_run", "cards")
    settings = asdict(resolve(parse_training(["--method", of_file, "--lr-schedule", "linear"])))
    file.write_text(yaml.safe_dump({name: value for name, value in settings.items()
                                    if name not in left_out}))
    more = ["--lr-schedule", "linear", "--method", method, "--steps", "90", "--batch-size", "32"]
    assert resolve(parse_training([str(file), *more])) == resolve(parse_training(more))


@pytest.mark.parametrize("of_run, shaping_lambda", [(False, 0.01), (True, 0.1)])
def test_what_a_file_says_beside_what_it_implies_stays(tmp_path, of_run, shaping_lambda):
    file = tmp_path / "config.yaml"
    file.write_text("method: icpo\nerrs: false\nshaping_lambda: 0.01\nmini_batch_size: 4\n")
    if of_run:
        (tmp_path / "fingerprint.json").write_text("{}")
    found = resolve(parse_training([str(file), "--method", "luffy", "--batch-size", "32"]))
    assert (found.off_policy, found.errs, found.shaping_lambda, found.mini_batch_size) == (
        "dataset", False, shaping_lambda, 4)


@pytest.mark.parametrize("arguments, names", [
    (["--method", "grpo", "--n-off", "3", "--num-demonstrations", "0", "--clip-off-policy", "false",
      "--shaping-lambda", "0.1"],
     ["--n-off 3", "--clip-off-policy false", "--num-demonstrations 0", "--shaping-lambda 0.1"]),
    (["--alpha", "0", "--lr-decay-steps", "10"], ["--alpha 0.0", "--lr-decay-steps 10"]),
    (["--errs", "false", "--delta", "0.5"], ["--delta 0.5"]),
    (["--method", "icpo-rs", "--errs", "false", "--delta", "0.5"], []),   # it gets the bonus
    (["--method", "luffy", "--off-policy-when", "all-wrong", "--delta", "0.5"], []),
    ([str(ROOT / "configs" / "qwen3-8b.yaml"), "--method", "grpo"], []),
    (["--method", "luffy", "--demonstrations", "x"], ["--demonstrations x"]),
    (["--method", "icpo-rs", "--alpha", "3", "--steps", "9", "--bonus-steps", "4"], []),
    *((["--method", method, *more], []) for method in METHODS for more in ([], ["--steps", "7"])),
])
def test_options_without_effect_are_named(arguments, names):
    found = without_effect(arguments, resolve(parse_training(arguments)))
    assert [each.partition(" (")[0] for each in found] == names


def test_a_run_says_which_options_have_no_effect(tmp_path, capsys):
    prepare(tmp_path / "run", "--alpha", "3")
    assert "warning: without effect: --alpha 3.0 (--rs is false)\n" in capsys.readouterr().err


def test_two_processes_need_a_batch_that_divides_and_say_so_once(tmp_path):
    command = torchrun(ROOT / "train.py", *SMALL, "--batch-size", "5", "--output-dir",
                       tmp_path / "run", processes=2)
    run = subprocess.run(command, text=True, capture_output=True)
    said = [line for line in run.stderr.splitlines() if "does not divide among 2 processes" in line]
    assert run.returncode and len(said) == 2   # once, and once more at the end of torchrun's pages
    assert said[0].startswith("train.py: error: ") and "traceback : train.py: error: " in said[1]
    assert not (tmp_path / "run").exists()


def test_exclusions_are_counted_and_reported(tmp_path, capsys):
    rows = [json.loads(line) for line in (TINY / "train.jsonl").read_text().splitlines()]
    held_out = json.loads((TINY / "test.jsonl").read_text().splitlines()[0])
    long = rows[0] | {"problem": "+".join("1" * 300)}
    # Spaces do not make it another problem.
    held_out["problem"] = held_out["problem"].replace("+", " + ")
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, [*rows[:20], held_out, long])))
    (tmp_path / "demos.jsonl").write_text("\n".join(map(json.dumps, [rows[3], rows[5], rows[100]])))
    (tmp_path / "second.jsonl").write_text(json.dumps(rows[7]))   # held out, too
    run = prepare(tmp_path / "run", "--train-data", tmp_path / "data.jsonl", "--test-data", "tiny",
                  tmp_path / "second.jsonl", "--demonstrations", tmp_path / "demos.jsonl")
    said = capsys.readouterr().out
    assert "left out: 1 of 22 training problems with a prompt over 512 tokens" in said
    assert "left out: 2 of 21 training problems that are held-out ones too" in said
    assert "2 demonstrations contain a question and are never drawn for it" in said
    assert len(run.problems) == 19


def test_a_model_without_an_end_of_text_token_is_refused(tmp_path):
    shutil.copytree(TINY / "model", tmp_path / "model")
    for name, key in (("config.json", "eos_token_id"), ("tokenizer_config.json", "eos_token"),
                      ("generation_config.json", "eos_token_id")):
        content = json.loads((tmp_path / "model" / name).read_text())
        content[key] = None
        (tmp_path / "model" / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="no end-of-text token"):
        prepare(tmp_path / "run", "--model", tmp_path / "model")


def test_a_folder_with_a_run_is_never_overwritten(whole_run):
    with pytest.raises(ValueError, match="already holds a run: go on with it"):
        prepare(whole_run)
    with pytest.raises(ValueError, match="was run with seed: 0, not 7"):
        prepare(whole_run, "--resume", "--seed", "7")
    with pytest.raises(ValueError, match="has made 4 steps already, more than --steps 3"):
        prepare(whole_run, "--resume", "--steps", "3")
    held = runs.claim_folder(TrainingOptions(output_dir=str(whole_run), resume=True))
    with pytest.raises(ValueError, match="in use: another process is training there"):
        prepare(whole_run, "--resume")
    runs.give_back(held)


def test_a_finished_run_without_checkpoints_is_not_begun_again(tmp_path):
    settings = ["--steps", "1", "--checkpoint-every", "0", "--eval-every", "0"]
    trainer.train(prepare(tmp_path / "run", *settings))
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="finished run without a checkpoint"):
        prepare(tmp_path / "run", *settings, "--resume")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_default_folders_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [trainer.prepare([*SMALL, "--method", "grpo"]).folder.as_posix() for _ in range(2)]
    assert folders == ["runs/grpo-seed0", "runs/grpo-seed0-2"]
    shutil.rmtree(folders[0])
    for other in ("runs/grpo-seed01", "runs/grpo-seed0-2-copy"):
        shutil.copytree(folders[1], other)
        os.utime(Path(other) / "config.yaml", (4e9, 4e9))
    resumed = trainer.prepare([*SMALL, "--method", "grpo", "--resume"])
    assert resumed.folder.as_posix() == "runs/grpo-seed0-2"
    assert trainer.prepare([*SMALL, "--method", "grpo"]).folder.as_posix() == folders[0]
    newest = trainer.prepare([*SMALL, "--method", "grpo", "--resume"])
    assert newest.folder.as_posix() == folders[0]


def test_a_mistake_in_a_saved_configuration_is_no_success(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("newer: 1\n")
    monkeypatch.setattr("prepare.leave", lambda: pytest.fail("it ends with status 0"))
    with pytest.raises(SystemExit) as ended:
        trainer.prepare(["--resume", "--output-dir", str(tmp_path)])
    assert ended.value.code == 2


# --------------------------------------------------------------------------------------------------
# Communication, compared with benchmarks/train_step.py

COUNT_BYTES = """
import json, sys
sys.path.insert(0, {root!r})
import torch, torch.distributed as dist
import train as trainer
received = {{"gathered": 0, "reduced": 0, "micro_batches": 0}}

def count(kind, collective):
    def counting(*arguments, **named):
        # The tensors are the collective's output and input, or both in one. Two processes sum one:
        # each receives half of it twice.
        sizes = [t.nbytes for t in [*arguments, *named.values()] if isinstance(t, torch.Tensor)]
        received[kind] += max(sizes) - min(sizes) if len(sizes) > 1 else sizes[0]
        return collective(*arguments, **named)
    return counting

share_rows = trainer.distributed.share_rows

def count_micro_batches(*arguments):
    parts = share_rows(*arguments)
    received["micro_batches"] += len(parts)
    return parts

trainer.distributed.share_rows = count_micro_batches
run = trainer.prepare(sys.argv[1:])
responses = trainer.sample_responses(run, trainer.draw_questions(run, 0), 0)
batch = trainer.form_groups(run, responses, trainer.score_responses(run, responses), 0)
batch.advantages.fill_(1)   # Every response has a backward pass.
# Newer and older releases of PyTorch use different names.
for kind, names in (("gathered", ("all_gather_single", "all_gather_into_tensor")),
                    ("reduced", ("reduce_scatter_single", "reduce_scatter_tensor", "all_reduce"))):
    for name in names:
        if hasattr(dist, name):
            setattr(dist, name, count(kind, getattr(dist, name)))
trainer.update(run, batch)
if trainer.distributed.is_main():
    print("\\n" + json.dumps(received))
"""


@pytest.mark.parametrize("shard_size, layout", [(2, []), (1, ["--shard-size", "1", *MANY_PARTS])])
def test_the_bytes_sent_match_the_table(tmp_path, shard_size, layout):
    from benchmarks.train_step import communication, parts_of
    (tmp_path / "count.py").write_text(COUNT_BYTES.format(root=str(ROOT)))
    said = run_script("count.py", *SMALL, *layout, "--kl-coef", "0", "--output-dir",
                      tmp_path / "run", processes=2, root=tmp_path).stdout
    received = json.loads([line for line in said.splitlines() if line.startswith("{")][-1])
    model, _ = load_model(TINY / "model")
    blocks, rest = parts_of(model.config)
    assert blocks + rest == sum(p.numel() for p in model.parameters())
    expected = communication(blocks, rest, 2, shard_size, received["micro_batches"],
                             compute_bytes=4, weights_stay=True)
    assert (received["micro_batches"] > 1) == bool(layout)
    assert received["gathered"] == expected["forward"] + expected["backward"]
    assert received["reduced"] == expected["gradients"]
