"""Runs and evaluations on disk: folders, locks, checkpoints, signals, and the files of an evaluation."""

import contextlib
import fcntl
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch.distributed.checkpoint as dcp
import yaml
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from tqdm import tqdm

from distributed import barrier, is_main, on_main, world_size
from options import FREE_IN_EVALUATION, EvaluationOptions, TrainingOptions, _require, embedded

def choose_folder(options: TrainingOptions) -> tuple[Path, dict | None]:
    """The run's folder, and its saved settings if it is to be resumed. Never one that holds a run, unless resuming."""
    if options.output_dir:
        folder = Path(options.output_dir)
        taken = [folder] if (folder / "config.yaml").is_file() else []
        if taken and not options.resume:
            raise ValueError(f"{folder} already holds a run: go on with it (--resume) or give another --output-dir")
        if not taken and folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"{folder} holds files that are no run of this script; give another --output-dir")
    else:
        base, taken = Path("runs") / f"{options.method}-seed{options.seed}", []
        for number in itertools.count(1):
            folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
            if not folder.exists():
                break
            taken += [folder] if (folder / "config.yaml").is_file() else []
    if options.resume and taken:
        return taken[-1], yaml.safe_load((taken[-1] / "config.yaml").read_text())
    if options.resume:
        print(f"nothing to resume in {options.output_dir or 'runs'}: starting from the first step")
    return folder, None


def lock_folder(folder: Path) -> int | None:
    """Hold the run's folder until this process ends, however it ends. Raises ValueError if another one holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ValueError(f"{folder} is in use: another process is training there now") from None
    except OSError:   # not every network file system can
        os.close(lock)
        return None
    return lock


def write_settings(run) -> None:
    """config.yaml, and the metrics and samples of the steps made so far, without those after the checkpoint."""
    settings = {name: value for name, value in asdict(run.options).items() if name not in ("resume", "output_dir")}
    replace_file(run.folder / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
    for name in ("metrics.jsonl", "samples.jsonl"):
        file = run.folder / name
        lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
        # A kill may have cut the last line short; it is of a step after the checkpoint, as the others dropped here.
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= run.start]
        replace_file(file, "".join(kept))


def append(file: Path, objects: list[dict]) -> None:
    """A line of JSON for each, null for what is not finite."""
    objects = [{name: None if isinstance(value, float) and not math.isfinite(value) else value
                for name, value in each.items()} for each in objects]
    with file.open("a") as stream:
        stream.write("".join(json.dumps(each) + "\n" for each in objects))


def replace_file(file: Path, text: str) -> None:
    """Whatever happens meanwhile, the file is the old one or the new one."""
    aside = file.with_name(f".{file.name}.partial")
    aside.write_text(text)
    aside.replace(file)


@contextlib.contextmanager
def stop_on_signal(run):
    """SIGTERM and SIGINT let the step finish; a second SIGINT, not the same one forwarded by torchrun, does not."""
    received = 0.0

    def handler(number, frame):
        nonlocal received
        if run.stop is None:
            run.stop, received = signal.Signals(number), time.monotonic()
            if is_main():
                tqdm.write(f"{run.stop.name}: finishing this step, then a checkpoint", file=sys.stderr)
        elif number == signal.SIGINT and time.monotonic() - received > 2:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class NotFinite(RuntimeError):
    """Several steps in a row had a loss or gradient that is not finite."""


def how_to_go_on(run) -> str:
    processes = f"--nproc-per-node {world_size()} " if world_size() > 1 else ""
    return f"torchrun {processes}train.py --resume --output-dir {run.folder}"


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: folders checkpoints/step-N, complete or not there

def save_checkpoint(run, step: int) -> None:
    model_state, optimizer_state = get_state_dict(run.model, run.optimizer)
    aside, final = (run.folder / "checkpoints" / name for name in (f".step-{step}.partial", f"step-{step}"))
    if is_main():
        for leftover in (aside, final):   # of a run that was killed while it wrote
            shutil.rmtree(leftover, ignore_errors=True)
    barrier()
    try:
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=aside)
    except BaseException:   # a full disk, above all
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if is_main():
        aside.rename(final)
        for old in find_checkpoints(run.folder)[:-run.options.keep_checkpoints]:
            gone = old.with_name(f".{old.name}.partial")   # out of sight first: a half-deleted one must not look whole
            shutil.rmtree(gone, ignore_errors=True)
            old.rename(gone)
            shutil.rmtree(gone)
    barrier()


def find_checkpoints(folder: Path) -> list[Path]:
    """The complete ones, oldest first."""
    return sorted((folder / "checkpoints").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def load_checkpoint(run) -> int:
    """Continue from the newest checkpoint, written by whatever number of processes; returns the steps it has made."""
    newest = on_main(lambda: (find_checkpoints(run.folder) or [None])[-1])
    if newest is None:
        _require(not (run.folder / "final").exists(), f"{run.folder} is a finished run without a checkpoint to go on from")
        return 0
    model_state, optimizer_state = get_state_dict(run.model, run.optimizer)
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=newest)
    set_state_dict(run.model, run.optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    run.optimizer.put_all_away()
    return int(newest.name.removeprefix("step-"))


# ---------------------------------------------------------------------------------------------------------------------
# The files of an evaluation

def key_of(record: dict) -> tuple:
    return record["data"], record["shots"], record["temperature"], record.get("again", False)


def find_output(options: EvaluationOptions, cases: list) -> tuple[str, dict]:
    """The file, and what open_output finds in it: --output, or the first of the default name with these settings or none."""
    if options.output:
        return options.output, open_output(options.output, options, cases)
    for number in itertools.count(1):
        output = "eval.jsonl" if number == 1 else f"eval-{number}.jsonl"
        with contextlib.suppress(ValueError):
            return output, open_output(output, options, cases)


def open_output(output: str, options: EvaluationOptions, cases: list) -> dict[tuple[str, int], list[dict]]:
    """Records of whole problems that an earlier call with these settings has written; what it left half is dropped.
    Raises ValueError where the file holds another evaluation."""
    output, about = Path(output), Path(output).with_suffix(".json")
    if not output.absolute().parent.is_dir():
        raise ValueError(f"there is no folder {output.absolute().parent} for --output")
    paths = [Path(embedded(options.model, "model")), Path(embedded(options.demonstrations, "demonstrations.jsonl")),
             *(Path(embedded(case.data, "test.jsonl")) for case in cases),
             *([Path(options.reward.rpartition(":")[0])] if options.reward else [])]
    settings = {name: value for name, value in vars(options).items() if name not in FREE_IN_EVALUATION} | {
        "changed": {str(path): when_written(path) for path in paths if path.exists()}}
    lines = output.read_text().splitlines(keepends=True) if output.is_file() else []
    if lines and not about.is_file():
        raise ValueError(f"{output} is there, but no {about} that says of what evaluation it is: give another --output")
    old = json.loads(about.read_text()).get("settings") if about.is_file() else {}
    if old is None:
        raise ValueError(f"{about}, the table's file, holds something else: give another --output")
    found = {}
    for line in lines:
        if line.endswith("\n"):   # a kill may have cut the last one short
            record = json.loads(line)
            found.setdefault(key_of(record), []).append(record)
    found = {key: records[:len(records) // options.samples * options.samples] for key, records in found.items()}
    if old and output.is_file():   # empty, too: another evaluation may have just begun
        was = old.get("changed", {})
        differing = [f"{name}: {old.get(name)}, not {value}" for name, value in settings.items()
                     if name != "changed" and old.get(name) != value]
        differing += [f"{path} has changed" for path, at in settings["changed"].items() if was.get(path, at) != at]
        differing += [f"other problems of {case.data}" for case in cases if any(
            record["id"] != problem.id for record, problem in
            zip(found.get(case.key, [])[::options.samples], case.problems))]
        if differing:
            raise ValueError(f"{output} holds another evaluation ({'; '.join(differing)}): give another --output, or delete it")
        settings["changed"] = was | settings["changed"]
    replace_file(output, "".join(json.dumps(record) + "\n" for records in found.values() for record in records))
    replace_file(about, json.dumps({"settings": settings, "rows": []}, indent=1) + "\n")
    return found


def when_written(path: Path) -> int:
    """Of a file, or of what is loaded from a model folder, run or checkpoint, not of what an evaluation writes there."""
    loaded = [file for pattern in ("*.safetensors", "tokenizer*", "config.*", ".metadata", "final/*", "checkpoints/*/.metadata")
              for file in path.glob(pattern)] if path.is_dir() else []
    return max(file.stat().st_mtime_ns for file in loaded or [path])
