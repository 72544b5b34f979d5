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
from multiprocessing.connection import wait
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# One thread in each process makes sums round alike in all of them, and models this small are no
# faster with more. The server reads this when it starts.
os.environ["OMP_NUM_THREADS"] = "1"
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch.distributed.checkpoint", "transformers", "tokenizers",
                                 "matplotlib.pyplot", "rapidfuzz"])


def _serve(root: str, script: str, arguments: list[str], environment: dict[str, str], cwd: str,
           output: str) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv[:] = [script, *arguments]
    sys.path[0] = root
    runpy.run_path(str(Path(root) / script), run_name="__main__")


def run(script: str, *arguments, processes: int = 1, check: bool = True, cwd: Path | str = ".",
        root: Path = ROOT) -> subprocess.CompletedProcess:
    """Runs a script of the checkout `root` in `processes` processes and returns what they print.

    If one fails, it ends the others, and raises CalledProcessError if `check` is set.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(processes):
            group = {} if processes == 1 else dict(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes),
                LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR="localhost", MASTER_PORT=str(port))
            ranks.append(_context.Process(target=_serve, args=(
                str(root), script, [str(each) for each in arguments],
                {"CUDA_VISIBLE_DEVICES": ""} | group, str(Path(cwd).resolve()),
                f"{folder}/{rank}")))
            ranks[-1].start()
        running = {each.sentinel: each for each in ranks}
        while running:
            for sentinel in wait(list(running)):
                if running.pop(sentinel).exitcode:
                    for other in running.values():
                        other.terminate()
        code = next((each.exitcode for each in ranks if each.exitcode), 0)
        out, err = ("".join(Path(f"{folder}/{rank}.{name}").read_text(errors="replace")
                            for rank in range(processes)) for name in ("out", "err"))
    done = subprocess.CompletedProcess([script, *arguments], code or 0, out, err)
    if check and code:
        print(done.stderr, file=sys.stderr)
        done.check_returncode()
    return done
