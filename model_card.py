"""The model card of a run's final/: README.md, which the Hugging Face hub shows."""

import itertools
import platform
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
import yaml
from huggingface_hub import ModelCardData

from curves import LABELS, read_metrics
from files import replace_file
from options import embedded, template_arguments, without_folders

if TYPE_CHECKING:
    from prepare import Run

CARD = """---
{data}
---

# {name}

{base}, trained with {method} by a reference implementation of ICPO, In-Context Steered Policy \
Optimization ([arXiv 2510.26519](https://arxiv.org/abs/2510.26519)), for {steps} steps.

```python
from transformers import pipeline

generator = pipeline("text-generation", "PATH_OR_NAME_OF_THIS_MODEL")
question = "What is 1+1? " + {instruction!r}
{call}
```

## Data

{data_sets}

## Held-out accuracy

{accuracy}

![Learning curves](curves.png)

## Settings

```yaml
{settings}
```

torch {torch}, transformers {transformers}, Python {python}

## Citation

```bibtex
@article{{icpo2025,
  title = {{Think Outside the Policy: In-Context Steered Policy Optimization}},
  journal = {{arXiv preprint arXiv:2510.26519}},
  year = {{2025}},
  url = {{https://arxiv.org/abs/2510.26519}},
}}
```
"""


def write_card(run: "Run") -> None:
    """Writes final/README.md, and copies the learning curves to which it links.

    base_model, in the metadata, is a name on the hub; a folder's name would be another model there.
    """
    o, folder, final = run.options, run.folder, run.folder / "final"
    at_hub = not Path(embedded(o.model, "model")).exists()
    data = ModelCardData(base_model=o.model if at_hub else None, library_name="transformers",
                         pipeline_tag="text-generation", tags=["icpo", "reinforcement-learning"])
    base = f"[{o.model}](https://huggingface.co/{o.model})" if at_hub else (
        f"The model `{without_folders(o.model)}`")
    asked, more = "question", f"max_new_tokens={o.max_new_tokens}"
    if o.chat_template:
        system = f'{{"role": "system", "content": {o.system!r}}}, ' if o.system else ""
        asked = f'[{system}{{"role": "user", "content": question}}]'
    if o.template_args:
        more += f", tokenizer_encode_kwargs={template_arguments(o.template_args)!r}"
    call = f"generator({asked}, {more})[0]"
    data_sets = [f"- training: {len(run.problems)} problems of `{without_folders(o.train_data)}`"]
    if run.demonstrations is not None:
        data_sets.append(f"- demonstrations: {len(run.demonstrations.pool)} of "
                         f"`{without_folders(o.demonstrations)}`")
    data_sets += [f"- held out: {len(problems)} problems of `{name}`"
                  for name, problems in run.held_out.items()]
    left_out = ("resume", "output_dir", "dry_run", "cards", "report_to", "show_samples")
    paths = ("model", "train_data", "test_data", "demonstrations", "reward")
    settings = {name: without_folders(value) if name in paths else value
                for name, value in asdict(o).items() if name not in left_out}
    shutil.copyfile(folder / "curves.png", final / "curves.png")
    replace_file(final / "README.md", CARD.format(
        data=data.to_yaml(), name=folder.name, base=base, method=LABELS[o.method], steps=o.steps,
        instruction=o.instruction, call=call,
        data_sets="\n".join(data_sets), accuracy=_accuracies(run),
        settings=yaml.safe_dump(settings, sort_keys=False).strip(), torch=torch.__version__,
        transformers=transformers.__version__, python=platform.python_version()))


def _accuracies(run: "Run") -> str:
    """A table of the first and the last evaluation."""
    o, rows = run.options, read_metrics(run.folder)
    found = [("before training", row, "_before") for row in rows[:1]]
    found += [(f"after step {row['step']}", row, "") for row in rows if "eval_accuracy" in row][-1:]
    lines = []
    for (when, row, ending), data in itertools.product(found, run.held_out):
        part = f"/{data}" if len(run.held_out) > 1 else ""
        mean, low, high = (row.get(f"eval_{name}{ending}{part}")
                           for name in ("accuracy", "low", "high"))
        if mean is not None:
            interval = f"{low:.1%} to {high:.1%}" if low is not None else "not recorded"
            lines.append(f"| {when} | `{data}` | {mean:.1%} | {interval} |\n")
    if not lines:
        return "The run made no evaluation."
    answers = f"{o.eval_samples} answers" if o.eval_samples > 1 else "one answer"
    return (f"| | problems | accuracy | 95 % interval |\n|---|---|---|---|\n{''.join(lines)}\n"
            f"The accuracy is the mean score of {answers} to each held-out problem, asked without "
            f"demonstrations at temperature {o.eval_temperature:g}. The interval treats the "
            f"problems as drawn at random.")
