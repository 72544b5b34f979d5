"""Runs the project's scripts in processes that have imported torch and transformers already.

Those imports take most of the time of a short run. A server process makes them once, and each run
is a fork of it. A script sees what it would see under `python script arguments` or torchrun.
"""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# One thread in each process makes sums round alike in all of them, and models this small are no
# faster with more. The server reads this when it starts.
os.environ["OMP_NUM_THREADS"] = "1"
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([
    "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp",
    "transformers.models.qwen3.configuration_qwen3",
    "transformers.models.auto.tokenization_auto", "tokenizers", "huggingface_hub", "psutil",
    "matplotlib.pyplot", "matplotlib.backends.backend_agg", "rapidfuzz"])


def _serve(root: str, script: str, arguments: list[str], environment: dict[str, str], cwd: str,
           output: str) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv[:] = [script, *arguments]
    sys.path[0] = root
    runpy.run_path(str(Path(root) / script), run_name="__main__")


class Script:
    """A script of the checkout `root` that runs in `processes` processes, as under torchrun.

    environment: variables that differ from those of the first script's start.
    """

    def __init__(self, script: str, *arguments, processes: int = 1, cwd: Path | str = ".",
                 root: Path = ROOT, environment: dict[str, str] | None = None):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.command = [script, *map(str, arguments)]
        self.folder = tempfile.TemporaryDirectory()
        self.ranks = []
        for rank in range(processes):
            group = {} if processes == 1 else dict(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes),
                LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR="localhost", MASTER_PORT=str(port))
            self.ranks.append(_context.Process(target=_serve, args=(
                str(root), script, self.command[1:],
                {"CUDA_VISIBLE_DEVICES": ""} | group | (environment or {}),
                str(Path(cwd).resolve()), f"{self.folder.name}/{rank}")))
            self.ranks[-1].start()

    def wait_until(self, holds: Callable[[], object]) -> None:
        """Returns as soon as `holds()` is true; fails if the script ends before, or after 120 s."""
        deadline = time.monotonic() + 120
        while not holds():
            assert all(each.is_alive() for each in self.ranks) and time.monotonic() < deadline
            time.sleep(0.002)

    def signal(self, number: int) -> None:
        for rank in self.ranks:
            os.kill(rank.pid, number)

    def finish(self) -> subprocess.CompletedProcess:
        """Waits, and returns what the processes print. If one fails, it ends the others."""
        running = {each.sentinel: each for each in self.ranks}
        while running:
            for sentinel in wait(list(running)):
                if running.pop(sentinel).exitcode:
                    for other in running.values():
                        other.terminate()
        code = next((each.exitcode for each in self.ranks if each.exitcode), 0)
        out, err = ("".join(Path(f"{self.folder.name}/{rank}.{name}").read_text(errors="replace")
                            for rank in range(len(self.ranks))) for name in ("out", "err"))
        self.folder.cleanup()
        return subprocess.CompletedProcess(self.command, code or 0, out, err)


def run(script: str, *arguments, check: bool = True, **more) -> subprocess.CompletedProcess:
    """Runs a Script to its end; raises CalledProcessError if it fails and `check` is set."""
    done = Script(script, *arguments, **more).finish()
    if check and done.returncode:
        print(done.stderr, file=sys.stderr)
        done.check_returncode()
    return done
