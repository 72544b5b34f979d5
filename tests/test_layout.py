"""Checks which file imports which, the length of the method, and the names that others call."""

import ast
import inspect
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
READING_ORDER = ["icpo", "prompts", "data", "rollout", "reward", "model_utils", "summary", "train",
                 "eval"]
SUPPORT = ["options", "runs", "files", "rowforms", "datafiles", "templates", "stopping", "overlap",
           "hf_folders", "distributed", "machine", "memory", "sampling", "timing", "verify",
           "own_reward", "report", "trackers", "model_card", "pilot", "curves"]
# A file of the method may also import these: model_utils.py and eval.py, which come later in the
# reading order, and prepare.py, which builds runs and evaluations from the files of the method.
FORWARD = {("rollout", "model_utils"), ("train", "eval"), ("train", "prepare"), ("eval", "prepare")}


def imports_of(module: str) -> set[str]:
    """Returns the project's modules that a module imports, without those only annotations need."""
    tree = ast.parse((ROOT / f"{module}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names |= {each.name for node in ast.walk(tree) if isinstance(node, ast.Import)
              for each in node.names}
    return {name for name in names if name and (ROOT / f"{name}.py").is_file()}


def test_every_file_is_of_the_method_or_supports_it():
    assert {file.stem for file in ROOT.glob("*.py")} == {
        *READING_ORDER, *SUPPORT, "prepare", "walkthrough"}


@pytest.mark.parametrize("module", READING_ORDER)
def test_the_method_imports_files_read_before_or_supporting_ones(module):
    before = READING_ORDER[:READING_ORDER.index(module)]
    allowed = {*before, *SUPPORT} | {taken for taker, taken in FORWARD if taker == module}
    assert imports_of(module) <= allowed


@pytest.mark.parametrize("module", SUPPORT)
def test_supporting_files_import_only_each_other(module):
    assert imports_of(module) <= set(SUPPORT)


def test_the_package_answers_imports_nothing_else_of_the_project():
    files = {file.stem for file in (ROOT / "answers").glob("*.py")}
    assert {"reading", "equality"} <= files
    assert not any(imports_of(f"answers/{file}") for file in files)


def test_the_method_stays_under_640_lines():
    lines = sum(len((ROOT / name).read_text().splitlines()) for name in ("icpo.py", "train.py"))
    assert lines <= 640


@pytest.mark.parametrize("module, name, parameters", [
    ("icpo", "annealed_bonus", "step total_steps alpha=1.0"),
    ("icpo", "expert_region", "rewards off_policy delta=1.0 strict=False"),
    ("icpo", "group_advantages", "rewards group keep=None eps=1e-06"),
    ("icpo", "policy_shaping", "ratio lam=0.01"),
    ("icpo", "icpo_loss", "logprobs old_logprobs advantages mask off_policy clip_low=0.2 "
     "clip_high=0.2 shaping_lambda=0.01 off_policy_denominator='behaviour' normalizer=None "
     "dual_clip=None ref_logprobs=None kl_coef=0.0"),
    ("model_utils", "load_model", "path device='cpu' dtype=torch.float32"),
    ("model_utils", "save_model", "model tokenizer path"),
    ("model_utils", "token_logprobs", "model tokens"),
    ("rollout", "generate", "model prompts n=1 max_new_tokens temperature=1.0 top_p=1.0 top_k=0 "
     "stop_ids=() seed=0"),
    ("reward", "score", "responses answers timeout=5.0 workers=None"),
])
def test_outside_code_finds_names_and_parameters(module, name, parameters):
    """More parameters may follow these."""
    signature = inspect.signature(getattr(__import__(module), name))
    found = [each.name if each.default is each.empty else f"{each.name}={each.default!r}"
             for each in signature.parameters.values()]
    assert found[:len(parameters.split())] == parameters.split()
