import os
import signal
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
# Torch reads this when it is imported. With one thread here and in every process that a test
# starts, sums round alike in all of them. Models this small gain nothing from more threads.
os.environ["OMP_NUM_THREADS"] = "1"
# A shell that starts the tests in the background makes them and their child processes ignore
# Ctrl-C; this undoes it.
signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch


@pytest.fixture(autouse=True)
def no_process_group():
    """A run that made a process group in this process does not change the tests after it."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def pytest_collection_modifyitems(items):
    """Tests marked gpu need a real one."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="there is no GPU"))
