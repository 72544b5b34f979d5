"""The trackers of --report-to: TensorBoard, Weights & Biases and trackio.

    trackers = Trackers()
    trackers.begin(["tensorboard", "wandb"], folder, settings, steps_made)
    trackers.step(metrics, samples)      # rows of metrics.jsonl and samples.jsonl
    trackers.end(picture)

Each is imported only where it is asked for. All that a tracker gets is in the run's folder, too, so
one that fails costs a warning and not the run.
"""

import importlib
import json
import os
import re
import secrets
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from files import brief, naming, read_lines, read_object, write_object

IMPORTS = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}


def check_packages(names: Sequence[str]) -> None:
    """Raises ValueError that says what to install if the package of a tracker is missing."""
    for name in set(names) - {"none"}:
        try:
            importlib.import_module(IMPORTS[name])
        except ImportError as error:
            raise ValueError(f"--report-to {name} needs the package {name} ({brief(error)}): "
                             f"pip install {name}") from error


def _table(samples: list[dict]) -> tuple[list[str], list[list[Any]]]:
    """The columns and rows of the table of responses."""
    return (["kind", "problem", "response", "final answer", "answer", "reward", "in group",
             "advantage"],
            [["off-policy" if s["off_policy"] else "on-policy", s["problem"], s["response"],
              s["final_answer"] or "", str(s["answer"]), s["reward"], s["in_group"],
              s["advantage"]] for s in samples])


# A tracker's `last` is the last step of the run that it has. It is made from the run's folder, its
# settings, the steps that the run has made, its identity in trackers, and the last step that the
# tracker was given.

class _TensorBoard:
    """Event files in RUN/tensorboard. Readers drop the steps from purge_step on that lie in files
    of earlier starts."""

    def __init__(self, folder: Path, settings: dict, steps: int, identity: str, given: int):
        from torch.utils.tensorboard import SummaryWriter
        self.last = min(given, steps)
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=steps and steps + 1)
        text = json.dumps(settings, indent=1, ensure_ascii=False)
        self.writer.add_text("settings", re.sub("^", "    ", text, flags=re.M), steps)

    def log(self, step: int, metrics: dict, samples: list[dict]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        if samples:
            columns, rows = _table(samples)
            lines = [columns, ["---"] * len(columns),
                     *([self._as_it_is(str(cell)) for cell in row] for row in rows)]
            self.writer.add_text("samples", "\n".join(map(" | ".join, lines)), step)
        self.writer.flush()

    @staticmethod
    def _as_it_is(text: str) -> str:
        """Markdown in a cell of a table that shows this text."""
        text = re.sub(r"[^A-Za-z0-9\s]", lambda found: f"&#{ord(found[0])};", text.strip())
        return re.sub(r"\s*\n", "<br>", text)

    def picture(self, step: int, file: Path) -> None:
        from matplotlib.image import imread
        self.writer.add_image("curves", imread(file)[..., :3], step, dataformats="HWC")

    def close(self, failed: bool) -> None:
        self.writer.close()


class _WithTables:
    """What wandb and trackio have in common: a `package` with tables and images, and a `run`."""
    package: Any
    run: Any

    def log(self, step: int, metrics: dict, samples: list[dict]) -> None:
        columns, rows = _table(samples)
        table = {"samples": self.package.Table(columns=columns, data=rows)} if rows else {}
        self.run.log(metrics | table, step=step)

    def picture(self, step: int, file: Path) -> None:
        self.run.log({"curves": self.package.Image(str(file))}, step=step)


class _WandB(_WithTables):
    """Files in RUN/wandb, uploaded meanwhile if a user is logged in and the network is there."""

    def __init__(self, folder: Path, settings: dict, steps: int, identity: str, given: int):
        import wandb
        self.package = wandb
        how = dict(project=os.environ.get("WANDB_PROJECT", "icpo"), name=folder.name, id=identity,
                   config=settings, dir=folder, resume="allow", allow_val_change=True,
                   # The end of a run waits so many seconds for uploads. Lines of the terminal are
                   # not captured.
                   settings=wandb.Settings(finish_timeout=60, console="off"))
        try:
            self.run = wandb.init(**how)
        except Exception as error:
            print(f"wandb: {brief(error)}. The run is written to {folder / 'wandb'} alone; "
                  f"`wandb sync` uploads it", file=sys.stderr)
            self.run = wandb.init(mode="offline", **how)
        # A run that goes on has the server's steps. Without a server it has none, since each start
        # writes files of its own.
        self.last = self.run.starting_step - 1

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class _Trackio(_WithTables):
    """A database in TRACKIO_DIR, or the Space that TRACKIO_SPACE_ID names."""

    def __init__(self, folder: Path, settings: dict, steps: int, identity: str, given: int):
        import trackio
        self.last = given
        self.package = trackio
        self.run = trackio.init(project=os.environ.get("TRACKIO_PROJECT", "icpo"), embed=False,
                                name=f"{folder.name}-{identity}", config=settings, resume="allow")

    def close(self, failed: bool) -> None:
        self.package.finish()


KINDS = {"tensorboard": _TensorBoard, "wandb": _WandB, "trackio": _Trackio}


class Trackers:
    """The trackers that a run reports to, none until they begin.

    RUN/trackers.json has the run's identity in them, and the last step that each was given.
    """

    def __init__(self):
        self.open: dict[str, Any] = {}

    def begin(self, names: Sequence[str], folder: Path, settings: dict, steps: int) -> None:
        """Opens the trackers of these names; "none" is none.

        settings: those of the run. steps: that the run has made; without any it gets an identity of
        its own, else it goes on under the old one, and each tracker gets the steps that it lacks.
        Raises ValueError, which names the tracker, for one that cannot begin.
        """
        self.folder, self.file = folder, folder / "trackers.json"
        self.state = read_object(self.file) if steps and self.file.is_file() else {}
        self.state.setdefault("id", secrets.token_hex(4))
        for name in set(names) - {"none"}:
            with naming(f"--report-to {name}"):
                self.open[name] = KINDS[name](folder, settings, steps, self.state["id"],
                                              self.state.get(name, 0))
        if self.open:
            samples: dict[int, list[dict]] = {}
            for row in read_lines(self.folder / "samples.jsonl"):
                samples.setdefault(row["step"], []).append(row)
            for metrics in read_lines(self.folder / "metrics.jsonl"):
                self.step(metrics, samples.get(metrics["step"], []))

    def step(self, metrics: dict, samples: list[dict]) -> None:
        """Reports a step. Names of metrics are those of metrics.jsonl; a name of the first step
        that has _before is of step 0."""
        step = metrics["step"]
        given = {name: value for name, value in metrics.items()
                 if isinstance(value, (int, float)) and name != "step"}
        before = {name: given.pop(name) for name in list(given)
                  if name.partition("/")[0].endswith("_before")}

        def log(name: str, tracker) -> None:
            if step <= tracker.last:   # a run that was killed makes some steps again
                return
            if before:
                start = {each.replace("_before", "", 1): value for each, value in before.items()}
                tracker.log(step - 1, start, [])
            tracker.log(step, given, samples)
            self.state[name] = step

        self._each(log)
        if self.open:
            write_object(self.file, self.state)

    def end(self, picture: Path | None = None, failed: bool = False) -> None:
        """Closes the trackers. picture: the learning curves, of a run that is complete."""
        if picture:
            self._each(lambda name, tracker: tracker.picture(self.state.get(name, 0), picture))
        self._each(lambda name, tracker: tracker.close(failed))
        self.open = {}

    def _each(self, act: Callable[[str, Any], None]) -> None:
        for name, tracker in list(self.open.items()):
            try:
                act(name, tracker)
            except Exception as error:
                del self.open[name]
                tqdm.write(f"warning: {name} has failed and gets no more of this run "
                           f"({brief(error)}); all of it is in {self.folder}", file=sys.stderr)
