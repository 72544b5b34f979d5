"""Runs and evaluations on disk: folders, locks, checkpoints, signals, messages on exit."""

import contextlib
import errno
import fcntl
import gc
import itertools
import math
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
import yaml
from safetensors import SafetensorError
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from datafiles import content_hash
from distributed import barrier, is_main, leave, on_main, rank, world_size
from files import (
    numbered,
    read_lines,
    read_object,
    read_settings,
    replace_file,
    replace_lines,
    write_object,
)
from hf_folders import find_folder, weights_hash
from options import (
    METHODS,
    EvaluationOptions,
    TrainingOptions,
    embedded,
    flag,
    parse_training,
    require,
    resolve,
    samples_of,
    settings_that_stay,
    with_absolute_paths,
)
from own_reward import RewardError

# DCP says this in a run of one process, which needs no process group.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or unin")


# --------------------------------------------------------------------------------------------------
# The folder of a run

class Claim(NamedTuple):
    """A folder that this process holds for a run."""
    folder: Path
    saved: dict | None   # the settings of a run that is resumed
    made: list[Path]     # folders that were not there before
    lock: int | None     # it is held until it is closed; None where the file system has no locks


class InUse(ValueError):
    """Another process holds the folder or file."""


def claim_folder(options: TrainingOptions) -> Claim:
    """Chooses the run's folder, makes it and locks it, so that no other start takes it.

    A folder that holds a run is taken only to resume it. Raises ValueError for one that holds
    something else, is in use, or cannot be written.
    """
    if options.output_dir:
        folder = Path(options.output_dir)
        with _usable(folder):
            if (folder / "config.yaml").is_file():
                require(options.resume, f"{folder} already holds a run: go on with it (--resume) "
                        f"or give another --output-dir")
                return _claim(folder, _saved_settings(folder))
            require(not folder.is_dir() or _is_empty(folder),
                    f"{folder} holds files that are no run of this script; give another "
                    f"--output-dir")
            return _claim(folder, None, options.resume)
    default = Path("runs") / f"{options.method}-seed{options.seed}"
    taken = [folder for folder in sorted(default.parent.glob(f"{default.name}*"))
             if re.fullmatch(r"(-\d+)?", folder.name.removeprefix(default.name))
             and (folder / "config.yaml").is_file()]
    if options.resume and taken:   # every start writes config.yaml
        newest = max(taken, key=lambda folder: (folder / "config.yaml").stat().st_mtime_ns)
        with _usable(newest):
            return _claim(newest, _saved_settings(newest))
    for folder in numbered(default):
        with _usable(folder), contextlib.suppress(InUse):   # another start may have taken it
            if not folder.exists() or folder.is_dir() and _is_empty(folder):
                return _claim(folder, None, options.resume)
    raise AssertionError("the names are endless")


def _is_empty(folder: Path) -> bool:
    """Whether it holds nothing but what a start that was killed, or an evaluation, may leave."""
    return all(file.match(".config.yaml.partial") or file.match(".*.lock")
               for file in folder.iterdir())


def _saved_settings(folder: Path) -> dict[str, Any]:
    return with_absolute_paths(read_settings(folder / "config.yaml"))


def _claim(folder: Path, saved: dict | None, resume: bool = False) -> Claim:
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError:
        _remove_empty(made)
        raise
    lock = _lock(folder, f"{folder} is in use: another process is training there now")
    if resume:
        print(f"nothing to resume in {folder}: starting from the first step")
    return Claim(folder, saved, made, lock)


def give_back(claim: Claim) -> None:
    """Unlocks the folder, and leaves none behind that was made for a run that did not start."""
    _remove_empty(claim.made)
    if claim.lock is not None:
        os.close(claim.lock)


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


@contextlib.contextmanager
def _usable(folder: Path):
    """Turns what the system says of a folder that cannot be written into a ValueError."""
    try:
        yield
    except (OSError, RuntimeError) as error:   # Python 3.11 raises RuntimeError for a loop of links
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"{folder} cannot be the folder of a run ({why}): give another "
                         f"--output-dir") from None


def _fingerprint(options: TrainingOptions) -> dict:
    """What a resumed run must find as it was: the settings, and hashes of the data files and of the
    model that is the reference."""
    o = options
    hashes = {"train_data": content_hash(embedded(o.train_data, "train.jsonl"), "train"),
              "test_data": "+".join(content_hash(embedded(each, "test.jsonl"), "test")
                                    for each in o.test_data)}
    if o.off_policy == "demonstrations":
        hashes["demonstrations"] = content_hash(embedded(o.demonstrations, "demonstrations.jsonl"),
                                                "train")
    if o.kl_coef:   # it is the reference, to the end
        model, checkpoint = find_model(o.model)
        hashes["model"] = weights_hash(checkpoint or find_folder(str(model)))
    return {"settings": settings_that_stay(o), "files": hashes}


def check_fingerprint(folder: Path, saved: dict, options: TrainingOptions) -> None:
    """Raises ValueError if a setting that a resumed run cannot change, or a data file, differs.

    saved: of config.yaml. An option that is newer than the run has the value that it has by
    default.
    """
    file = folder / "fingerprint.json"
    if not file.is_file():   # a kill came before it was written, and before the first step
        return
    then, now = read_object(file), _fingerprint(options)
    was = settings_that_stay(resolve(parse_training([], saved))) | then["settings"]
    for name, value in now["settings"].items():
        require(was[name] == value,
                f"{folder} was run with {name}: {was[name]}, not {value}; leave the option out (or "
                f"undo the change of config.yaml), or start another run")
    for name, value in then["files"].items():
        given = getattr(options, name)
        given = ", ".join(given) if isinstance(given, list) else given
        require(now["files"].get(name) == value,
                f"{given} ({flag(name)}) is not the {'model' if name == 'model' else 'data'} with "
                f"which {folder} was run; put that back, or start another run")


def discard(folder: Path) -> None:
    """Deletes a folder, if it is there. It is renamed first: half of it must not look whole."""
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)   # a kill may have left it
    if folder.is_dir():
        folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def _lock(path: Path, busy: str, flags: int = os.O_RDONLY) -> int | None:
    """Holds the file or folder until this process ends or closes the lock, which it returns.

    Returns None where the file system has no locks. Raises InUse, which says `busy`, if another
    process holds it.
    """
    lock = os.open(path, flags, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise InUse(busy) from None
    except OSError:   # some network file systems cannot lock
        os.close(lock)
        return None
    return lock


_held: dict[Path, int | None] = {}   # locks of evaluations, by their file of samples


def _hold(output: Path) -> None:
    """Keeps other evaluations from this file of samples. Raises ValueError if it cannot.

    The lock is on a file of its own, because the samples' file is replaced.
    """
    if output not in _held:
        file = output.with_name(f".{output.name}.lock")
        # NFS locks only a file that is opened for writing; another user's may only be read.
        how = os.O_RDONLY if file.is_file() and not os.access(file, os.W_OK) else os.O_RDWR
        try:
            _held[output] = _lock(
                file, f"{output} is in use: another evaluation is writing there now",
                how | os.O_CREAT | os.O_NOFOLLOW)
        except OSError as error:
            raise ValueError(f"{file}, the lock, cannot be opened ({error.strerror}): give another "
                             f"--output") from None


def write_settings(folder: Path, options: TrainingOptions, steps: int) -> None:
    """Writes config.yaml and fingerprint.json; drops metrics and samples after step `steps`.

    A resumed run makes those steps again. Without a checkpoint it begins anew, and the earlier
    files are renamed, with a message. A run that goes on beyond its end has no final/ until then.
    """
    settings = {name: value for name, value in asdict(options).items()
                if name not in ("resume", "output_dir", "dry_run", "cards")}
    config = folder / "config.yaml"
    end = read_settings(config)["steps"] if config.is_file() else 0
    if end <= steps < options.steps:   # the checkpoint holds that model, too
        discard(folder / "final")
    replace_file(config, yaml.safe_dump(settings, sort_keys=False))
    fingerprint = folder / "fingerprint.json"
    if not fingerprint.is_file():   # else check_fingerprint has found it equal
        write_object(fingerprint, _fingerprint(options))
    for file in folder.glob("skipped-step-*.jsonl"):
        if int(file.stem.rpartition("-")[2]) > steps:
            file.unlink()
    for name in ("metrics.jsonl", "samples.jsonl"):
        file = folder / name
        rows = read_lines(file)
        if rows and not steps:
            aside = next(path for path in numbered(file.with_stem(f"{file.stem}-before"))
                         if not path.exists())
            file.rename(aside)
            print(f"{folder} has no checkpoint, so the run begins anew; the earlier {file.name} is "
                  f"now {aside}", file=sys.stderr)
            rows = []
        # A last line that a kill has cut short belongs to a step after the checkpoint.
        replace_lines(file, [row for row in rows if row["step"] <= steps])


# --------------------------------------------------------------------------------------------------
# Checkpoints: folders checkpoints/step-N, which are whole or not there. They hold safetensors files
# of each process, because the usual format of DCP has a pickle, which can run code.

FILE_BYTES = 1 << 29   # of a process's file; one that is larger holds a single tensor


def _tensors(model_state: dict, optimizer_state: dict | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by name. The options set all else that an optimiser has."""
    found = {f"model.{name}": tensor for name, tensor in model_state.items()}
    for parameter, state in (optimizer_state or {"state": {}})["state"].items():
        # Slices of safetensors have at least one dimension.
        found |= {f"optimizer.{parameter}.{name}": tensor if tensor.ndim else tensor.view(1)
                  for name, tensor in state.items()}
    return found


def _files_of(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """Tensor -> number of its file, from 1. DCP uses what rank 0 returns; its parts are largest.

    DCP has a file twice in memory while it writes it, beside all that the run holds.
    """
    files, number, used = {}, 1, 0
    for name, tensor in tensors.items():
        size = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes
        if used and used + size > FILE_BYTES:
            number, used = number + 1, 0
        files[name], used = number, used + size
    return files


def read_checkpoint(checkpoint: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Reads a checkpoint into these tensors."""
    dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(checkpoint)))


def read_model(checkpoint: Path, model) -> None:
    """Reads the model of a checkpoint into this one. Raises ValueError if it is damaged."""
    tensors = _tensors(model.state_dict())
    problem = _damage(checkpoint, tensors)
    require(not problem, f"{checkpoint} is damaged ({problem})")
    read_checkpoint(checkpoint, tensors)


def _first_line(error: BaseException) -> str:
    if isinstance(error, CheckpointException):   # it quotes the traceback of every process
        error = next(iter(error.failures.values()))[0]
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def save_checkpoint(folder: Path, model, optimizer, step: int, keep: int) -> None:
    """Writes checkpoints/step-N and deletes all but the newest `keep`. Every process calls it.

    Raises OSError if parts of it are missing, because a process has another folder of that name.
    """
    began = bool(optimizer.state)
    tensors = _tensors(*get_state_dict(model, optimizer))
    if not began:   # it has made a step with a gradient of 0, to have something to save
        for state in optimizer.state.values():
            state["step"].zero_()
    folder = on_main(folder.absolute)   # processes may have started in different folders
    final = folder / "checkpoints" / f"step-{step}"
    aside = final.with_name(f".{final.name}.partial")
    if is_main():
        for leftover in (*final.parent.glob(".step-*.partial"), final):   # of an earlier start
            shutil.rmtree(leftover, ignore_errors=True)
    barrier()
    try:
        writer = HuggingFaceStorageWriter(str(aside), _files_of(tensors), save_distributed=True)
        dcp.save(tensors, storage_writer=writer)
        problem = on_main(lambda: _damage(aside, tensors))   # all have written when save returns
        if problem:
            raise OSError(f"of {final.name}, {problem}" + ": --output-dir must be on a file system "
                          "that all processes share" * (world_size() > 1))
    except BaseException:   # mostly a full disk
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if is_main():
        aside.rename(final)
        for old in find_checkpoints(folder)[:-keep]:
            discard(old)
    barrier()


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [path for path in (folder / "checkpoints").glob("step-*")
             if path.name.removeprefix("step-").isdigit()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def load_checkpoint(folder: Path, model, optimizer) -> int:
    """Loads the newest whole checkpoint, of any number of processes; returns its step, or 0.

    A damaged one is renamed, with a message. Raises ValueError for a finished run without a
    checkpoint, and if all are damaged.
    """
    checkpoints = on_main(lambda: find_checkpoints(folder.absolute()))
    damaged = (f"{folder} has no whole checkpoint to go on from; the damaged ones are in "
               f"{folder / 'checkpoints'}. Give another --output-dir")
    if not checkpoints:
        require(not on_main(lambda: list((folder / "checkpoints").glob("damaged-step-*"))), damaged)
        require(not (folder / "final").exists(),
                f"{folder} is a finished run without a checkpoint to go on from")
        return 0
    model_state, optimizer_state = get_state_dict(model, optimizer)
    tensors = _tensors(model_state, optimizer_state)
    for checkpoint in reversed(checkpoints):
        if on_main(lambda path=checkpoint: _set_aside_if_damaged(path, tensors)):
            continue
        read_checkpoint(checkpoint, tensors)
        set_state_dict(model, optimizer, model_state_dict=model_state,
                       optim_state_dict=optimizer_state)
        optimizer.put_all_away()
        return step_of(checkpoint)
    raise ValueError(damaged)


def _set_aside_if_damaged(checkpoint: Path, tensors: dict[str, torch.Tensor]) -> bool:
    problem = _damage(checkpoint, tensors)
    if problem:
        aside = next(path for path in numbered(checkpoint.with_name(f"damaged-{checkpoint.name}"))
                     if not path.exists())
        checkpoint.rename(aside)
        print(f"{checkpoint} is damaged ({problem}); it is now {aside}, and the run goes on from "
              f"an earlier one", file=sys.stderr)
    return bool(problem)


def _damage(checkpoint: Path, tensors: dict[str, torch.Tensor]) -> str:
    """What is wrong with a checkpoint; "" if it has these tensors."""
    if (checkpoint / ".metadata").exists():
        return "it has a pickle, which may run code, so it is not read"
    try:   # this reads the beginning of each file and compares its length
        metadata = HuggingFaceStorageReader(str(checkpoint)).read_metadata()
    except Exception as error:
        return _first_line(error)
    for name, tensor in tensors.items():
        found: Any = metadata.state_dict_metadata.get(name)
        if found is None:
            return f"{name} is missing"
        parts = sum(math.prod(chunk.sizes) for chunk in found.chunks)
        if found.size != tensor.size() or parts < tensor.numel():
            return f"{name} has {parts} numbers, not {tensor.numel()}"
    return ""


def find_model(path: str) -> tuple[Path | str, Path | None]:
    """(model folder or hub name, checkpoint to load over it or None) of what eval.py is given.

    For a run of train.py this is its final/, else its newest checkpoint. Raises ValueError for a
    run that has neither, and for a checkpoint that is in no run.
    """
    folder = Path(embedded(path, "model"))
    if (folder / "final").is_dir():
        return folder / "final", None
    if _settings_in(folder):
        checkpoints = find_checkpoints(folder)
        if not checkpoints:
            raise ValueError(f"{folder} is a run that has written neither final/ nor a checkpoint "
                             f"yet")
        folder = checkpoints[-1]
    if folder.parent.name != "checkpoints" or not re.fullmatch(r"(damaged-)?step-[0-9-]+",
                                                               folder.name):
        return folder if path == "tiny" else path, None
    config = folder.parent.parent / "config.yaml"
    if not config.is_file():
        raise ValueError(f"{folder} is a checkpoint, but there is no {config} that says of which "
                         f"model")
    return embedded(read_settings(config)["model"], "model"), folder


def settings_of_run(path: str) -> dict[str, Any]:
    """The settings of the run that this is, or of which it is a model or a checkpoint, else {}."""
    return _settings_in(_run_of(path))


def _settings_in(folder: Path) -> dict[str, Any]:
    """The settings of the run in this folder, else {}: other programs write a config.yaml, too."""
    config = folder / "config.yaml"
    settings = read_settings(config) if config.is_file() else {}
    return settings if settings.get("method") in list(METHODS) else {}


def _run_of(path: str) -> Path:
    """The folder of the run that `path` would be, or of which it would be a part."""
    folder = Path(path)
    if folder.name in ("final", "best"):
        return folder.parent
    return folder.parent.parent if folder.parent.name == "checkpoints" else folder


# --------------------------------------------------------------------------------------------------
# Signals and messages

class Stop:
    """The signal that asks a run to stop after this step, if one has come."""
    received: signal.Signals | None = None
    at_once = False   # do not wait for the end of the step


class StoppedAtOnce(BaseException):
    """A signal has come while Stop.at_once was set."""


@contextlib.contextmanager
def stop_on_signal():
    """Makes SIGTERM and SIGINT set the Stop that it yields, so that the step can finish.

    A second SIGINT interrupts at once, except one within two seconds, which torchrun may forward.
    """
    stop, when = Stop(), 0.0

    def handler(number, frame):
        nonlocal when
        if stop.received is None:
            stop.received, when = signal.Signals(number), time.monotonic()
            if stop.at_once:
                raise StoppedAtOnce(f"{stop.received.name}: stopped before the first step")
            if is_main():
                tqdm.write(f"{stop.received.name}: finishing this step, then a checkpoint",
                           file=sys.stderr)
        elif number == signal.SIGINT and time.monotonic() - when > 2:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class NotFinite(RuntimeError):
    """Several steps in a row had no update with a finite loss and gradient."""

    def __init__(self, steps: int, folder: Path):
        super().__init__(
            f"the loss or gradient of {steps} steps in a row was not finite. The batches are in "
            f"{folder}/skipped-step-*.jsonl; the newest of {folder}/checkpoints has the weights "
            f"before them. Another run may begin with it (--model), with a smaller --learning-rate "
            f"or with --dtype float32; or give another model, if it was so from the first step")


class _Output:
    """A stream that writes at once, and drops what is written after its reader has gone.

    stream: None if the process was started without it.
    """

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w", encoding="utf-8")   # noqa: SIM115

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):   # EIO: a terminal that was closed
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        return len(text)

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def begin_program() -> None:
    """Collects garbage from now on (see options.begin_imports), and outlives readers.

    When what reads the output of this process, such as head, ends, the process goes on.
    """
    gc.enable()
    sys.stdout, sys.stderr = _Output(sys.stdout), _Output(sys.stderr)


def how_to_go_on(folder: Path) -> str:
    """The command that continues the run; "..." are the options by which several nodes meet."""
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", 1))
    several = f"--nnodes {nodes} ... " if nodes > 1 else ""
    processes = f"--nproc-per-node {world_size() // nodes} " if world_size() > nodes else ""
    return f"torchrun {several}{processes}train.py --resume --output-dir {shlex.quote(str(folder))}"


@contextlib.contextmanager
def messages_on_exit(folder: Path):
    """Turns the errors of a run in this folder into a message and an exit status.

    Where other processes would wait for this one, it ends at once.
    """
    go_on = how_to_go_on(folder)
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(f"\ninterrupted; go on with: {go_on}" if is_main() else 130)
    except StoppedAtOnce as error:
        if is_main():
            print(f"{error}; start with: {go_on}", file=sys.stderr, flush=True)
        os._exit(0)   # at once, because the signal may have reached one process alone
    except NotFinite as error:
        sys.exit(f"train.py: error: {error}" if is_main() else 1)
    except RewardError as error:
        print(f"train.py: error: {error}. When it is mended, go on with: {go_on}", file=sys.stderr)
        os._exit(1)
    except (OSError, CheckpointException, SafetensorError) as error:
        free, why = shutil.disk_usage(folder).free / 1e9, _first_line(error)
        if "No space left" in why:
            why = "the disk is full"
        print(f"train.py: error: {folder} could not be written ({why}); {free:.3f} GB are free "
              f"there. The files there are whole; when it can be written, go on with: {go_on}",
              file=sys.stderr)
        os._exit(1)
    except RuntimeError as error:
        lost = any(sign in str(error) for sign in ("gloo", "Gloo", "NCCL", "Connection"))
        if world_size() == 1 or not lost:
            raise
        print(f"train.py: error: process {rank()} has lost the others "
              f"({str(error).splitlines()[0]}). The one that ended first says why; go on with: "
              f"{go_on}", file=sys.stderr)
        os._exit(1)
    leave()


class Phases:
    """Says which phase of a step runs, and measures how long each takes."""

    def __init__(self, say):
        self.say, self.starts = say, {}

    def start(self, name: str) -> None:
        self.starts[name] = time.perf_counter()
        self.say(name)

    def seconds(self) -> list[float]:
        """Of each phase, the last of which ends now."""
        times = [*self.starts.values(), time.perf_counter()]
        return [end - start for start, end in itertools.pairwise(times)]


def follow_tokens(say: Callable[[int, str], None]) -> Callable[[int, int], None]:
    """A `progress` of `generate` that calls say(sequences that have just ended, "N tokens/s")."""
    tokens, started = 0, time.perf_counter()

    def progress(ended: int, sampled: int) -> None:
        nonlocal tokens
        tokens += sampled
        say(ended, f"{tokens / (time.perf_counter() - started):,.0f} tokens/s")
    return progress


def say_sampling(say: Callable[[str], None], total: int) -> Callable[[int, int], None]:
    """A `progress` of `generate` that says, at most ten times a second, how many have ended."""
    said, done = time.perf_counter(), 0

    def report(ended: int, speed: str) -> None:
        nonlocal said, done
        done += ended
        if time.perf_counter() - said > 0.1:
            said = time.perf_counter()
            say(f"sampling {done}/{total}, {speed}")
    return follow_tokens(report)


# --------------------------------------------------------------------------------------------------
# The files of an evaluation: the samples, and the table in .json beside them. `cases` are the rows
# of its table.

def key_of(record: dict) -> tuple:
    """The case that a record belongs to."""
    return (record["data"], record["shots"], record["temperature"], record.get("again", False),
            record.get("demo_format", ""))


def find_output(options: EvaluationOptions, cases: list) -> tuple[Path, dict]:
    """The file of the samples, and what open_output finds in it.

    It is --output, or the first of the default names that is new or holds this evaluation.
    """
    if options.output:
        return Path(options.output), open_output(Path(options.output), options, cases)
    default = default_output(options.model)
    with contextlib.suppress(OSError):   # _check_folder says it
        default.parent.mkdir(exist_ok=True)
    _check_folder(default)   # in a folder that cannot be written, no name would do
    for output in numbered(default):
        with contextlib.suppress(ValueError):
            check_output(output)
            return output, open_output(output, options, cases)
        lock = _held.pop(output.absolute(), None)   # of a file that holds another evaluation
        if lock is not None:
            os.close(lock)
    raise AssertionError("the names are endless")


def default_output(model: str) -> Path:
    """eval.jsonl in the run that is evaluated, or evals/MODEL.jsonl for another model."""
    folder = _run_of(model)
    if _settings_in(folder):
        return folder / "eval.jsonl"
    return Path("evals") / f"{Path(model).resolve().name}.jsonl"


def _check_folder(output: Path) -> None:
    folder = output.absolute().parent
    require(folder.is_dir(), f"there is no folder {folder} for --output")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{output} cannot be written ({error.strerror}): give another "
                         f"--output") from None


def check_output(output: Path) -> None:
    """Raises ValueError for a file of samples that an evaluation cannot write, or must not."""
    _check_folder(output)
    about, picture = output.with_suffix(".json"), output.with_suffix(".png")
    written = output.is_file() and output.stat().st_size
    for file in (output, about, picture):
        require(not file.is_symlink() and (file.is_file() or not file.exists()),
                f"{file} is no plain file, so the evaluation is not written there: give another "
                f"--output")
    require(about.is_file() or not picture.exists(),
            f"{picture}, the picture's file, is there, but no {about} of an evaluation that drew "
            f"it: give another --output")
    require(about.is_file() or not written,
            f"{output} is there, but no {about} that says of what evaluation it is: give another "
            f"--output")
    require(not about.is_file() or read_object(about).get("settings") is not None,
            f"{about}, the table's file, holds something else: give another --output")


def open_output(output: Path, options: EvaluationOptions,
                cases: list) -> dict[tuple, list[dict]]:
    """The records of whole problems that an earlier call with these settings has written, by case.

    Problems that it left half are dropped from the file. Raises ValueError where the file holds
    another evaluation or is in use.
    """
    about = output.with_suffix(".json")
    _hold(output.absolute())
    settings = settings_that_stay(options) | {"changed": _when_read_files_changed(options, cases)}
    old = read_object(about)["settings"] if about.is_file() else {}
    answers: dict[tuple, dict[str, list[dict]]] = {}   # of each case, by problem
    for record in read_lines(output):
        answers.setdefault(key_of(record), {}).setdefault(record["id"], []).append(record)
    found = {key: [record for records in problems.values()
                   if len(records) == samples_of(options, key[0]) for record in records]
             for key, problems in answers.items()}
    if old and output.is_file():   # also where it is empty: another evaluation may have just begun
        differing = _differences(old, settings, options, cases, found)
        if differing:
            raise ValueError(f"{output} holds another evaluation ({'; '.join(differing)}): give "
                             f"another --output, or delete it")
        settings["changed"] = old.get("changed", {}) | settings["changed"]
    write_samples(output, found)
    write_object(about, {"settings": settings, "rows": []})
    return found


def write_samples(output: Path, found: dict[tuple, list[dict]]) -> None:
    """Replaces the file of the samples by these."""
    replace_lines(output, [record for records in found.values() for record in records])


def _differences(old: dict, settings: dict, options, cases: list, found: dict) -> list[str]:
    was = old.get("changed", {})
    if not any(case.shots for case in cases):
        old = old | {"demo_format": options.demo_format}   # it plays no part
    then = replace(options, samples=old.get("samples", 0))
    if all(samples_of(then, case.data) == samples_of(options, case.data) for case in cases):
        old = old | {"samples": options.samples}   # 0 and the number that it stands for are equal
    lines = [f"{name}: {old[name]}, not {value}" for name, value in settings.items()
             if name != "changed" and name in old and old[name] != value]
    lines += [f"{path} has changed" for path, at in settings["changed"].items()
              if was.get(path, at) != at]
    for case in cases:
        known = {problem.id for problem in case.problems}
        if any(record["id"] not in known for record in found.get(case.key, [])):
            lines.append(f"other problems of {case.data}")
    return lines


def _when_read_files_changed(options: EvaluationOptions, cases: list) -> dict[str, int]:
    """When the files that the evaluation reads were last written."""
    paths = [Path(embedded(options.model, "model")),
             Path(embedded(options.demonstrations, "demonstrations.jsonl")),
             *(Path(embedded(case.data, "test.jsonl")) for case in cases)]
    if options.reward:
        paths.append(Path(options.reward.rpartition(":")[0]))
    # Only those files of a model folder, run or checkpoint count that are loaded, not those that an
    # evaluation writes there.
    patterns = ("*.safetensors", "tokenizer*", "config.*", "final/*", "checkpoints/*/*.safetensors")
    times = {}
    for path in paths:
        if path.exists():
            loaded = [file for pattern in patterns for file in path.glob(pattern)]
            times[str(path)] = max(file.stat().st_mtime_ns for file in loaded or [path])
    return times
