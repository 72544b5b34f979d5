"""Checks the README's worked example with icpo.py, its length and the functions that it names, and
the links, paths and options in all pages."""

import ast
import inspect
import re
from dataclasses import fields
from itertools import groupby
from pathlib import Path

import pytest
import torch
import yaml

import icpo
from icpo import (
    clip,
    expert_region,
    group_advantages,
    icpo_loss,
    importance_ratio,
    mix_groups,
    policy_shaping,
)
from options import EvaluationOptions, TrainingOptions, flag, resolve

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
CONFIGS = sorted(ROOT.glob("configs/*.yaml"))
SCRIPTS = sorted([*ROOT.glob("*.py"), ROOT / "tiny/make.py", ROOT / "tests/golden.py",
                  *ROOT.glob("benchmarks/*.py")])
# Options that no script declares itself: argparse's, torchrun's and TensorBoard's.
ELSEWHERE = {"--help", "--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint",
             "--max-restarts", "--shutdown-timeout",
             "--signal",   # Slurm's
             # of docker run and hf download
             "--ipc", "--shm-size", "--local-dir", "--repo-type", "--revision",
             # slime's, in docs/losses.md
             "--calculate-per-token-loss", "--custom-loss-function-path",
             "--custom-reward-post-process-path", "--loss-type", "--use-kl-loss",
             "--rollout-top-p", "--use-rollout-logprobs", "--use-tis",
             # tensorboard's
             "--logdir"}
HEADER = "response     R      Â  π_θ(·|q)  logprob  π_old  old logprob   r, r̂  f(r̂)   CLIP\n"
ROW = re.compile(r"^(on-policy \d|off-policy) +(\d) +(?:leaves|\S+ +(\S+) +\S+ +(\S+) .*)$", re.M)


def section(heading: str) -> str:
    """Returns the text of the README from this heading to the next one."""
    return re.split(r"^#+ ", README.partition(f" {heading}\n")[2], maxsplit=1, flags=re.M)[0]


def default(function, name: str):
    return inspect.signature(function).parameters[name].default


def compute(block: str) -> str:
    """Computes the block of the worked example from the rewards and probabilities in it.

    Consecutive rows of the same name are tokens of one response."""
    responses = [list(rows) for _, rows in groupby(ROW.findall(block), key=lambda row: row[0])]
    B, T = len(responses), max(map(len, responses))
    rewards = torch.tensor([float(rows[0][1]) for rows in responses])
    off_policy = torch.tensor([rows[0][0] == "off-policy" for rows in responses])
    names = ["off-policy" if off_policy[i] else f"on-policy {i + 1}" for i in range(B)]
    group = torch.zeros(B, dtype=torch.long)
    # The response marked "leaves" gets the lowest priority, so it is the one that is replaced.
    priority = torch.tensor([float(rows[0][2] != "") for rows in responses])
    p, p_old = torch.ones(2, B, T, dtype=torch.float64)
    mask = torch.zeros(B, T)
    for i, rows in enumerate(responses):
        for t, row in enumerate(rows):
            mask[i, t] = 1.0
            p[i, t], p_old[i, t] = float(row[2] or 1), float(row[3] or 1)
    logprobs, old_logprobs = p.log(), p_old.log()

    accepted = expert_region(rewards, off_policy)
    keep = mix_groups(off_policy, group, accepted, priority)
    advantages = group_advantages(rewards, group, keep)
    ratio = importance_ratio(logprobs, old_logprobs, off_policy).requires_grad_()
    shaped = policy_shaping(ratio)
    slope, = torch.autograd.grad(shaped.sum(), ratio)
    objective = clip(torch.where(off_policy[:, None], shaped, ratio), advantages[:, None])
    loss, _ = icpo_loss(logprobs, old_logprobs, advantages, mask * keep[:, None], off_policy)

    text, terms = HEADER, []
    for i, rows in enumerate(responses):
        if not keep[i]:
            text += f"{names[i]:<13}{rewards[i]:.0f}  leaves\n"
            continue
        for t in range(len(rows)):
            f = f"{shaped[i, t]:.3f}" if off_policy[i] else ""
            text += (f"{names[i]:<13}{rewards[i]:.0f}{advantages[i]:>7.2f}{p[i, t]:>10.3f}"
                     f"{logprobs[i, t]:>9.3f}{p_old[i, t]:>7.3f}{old_logprobs[i, t]:>13.3f}"
                     f"{ratio[i, t]:>7.3f}{f:>7}{objective[i, t]:>7.2f}\n")
            terms.append(objective[i, t])
    on, off, gone = 0, off_policy.int().argmax(), keep.int().argmin()   # rows of the text below
    A, r, f = advantages, ratio, shaped
    delta, eps = default(expert_region, "delta"), default(group_advantages, "eps")
    low = 1 - default(clip, "clip_low")
    assert accepted[off] and low * A[on] < r[on, 0] * A[on]   # as the text below says
    total = f"{terms[0]:.2f}" + "".join(f" {'-' if t < 0 else '+'} {abs(t):.2f}" for t in terms[1:])
    return text + f"""
(ERRS)   {rewards[off]:.0f} ≥ δ = {delta:g}: accepted; it replaces {names[gone]}, drawn at random
(ADV)    mean {rewards[keep].mean():.2f}, std {rewards[keep].std():.2f}: Â = (R - \
{rewards[keep].mean():.2f})/({rewards[keep].std():.2f} + {eps:.0e}) = {A[on]:.2f} or {A[off]:.2f}
(RATIO)  r = {p[on, 0]:.3f}/{p_old[on, 0]:.3f} = {r[on, 0]:.3f}; r̂ = {p[off, 0]:.3f}/\
{p_old[off, 0]:.3f} = {r[off, 0]:.3f}
f        {r[off, 0]:.3f}/({r[off, 0]:.3f} + λ) = {f[off, 0]:.3f}; its slope λ/(r̂ + λ)² is \
{slope[off, 0]:.4g} there and {slope[off, 1]:.4g} at {r[off, 1]:.3f}
(CLIP)   min({r[on, 0]:.3f}·{A[on]:.2f}, {low:g}·{A[on]:.2f}) = {objective[on, 0]:.2f}: \
the clip binds
(ICPO)   loss = -({total})/{len(terms)} = {loss:.2f}
""".replace("e-0", "e-")


def test_the_worked_example():
    text = section("One question by hand")
    block, = re.findall(r"```\n(response.*?)```", text, re.S)
    assert block == compute(block)
    assert f"λ = {default(policy_shaping, 'lam')}, ε = {default(clip, 'clip_low')}" in text
    assert default(clip, "clip_low") == default(clip, "clip_high")
    plain = torch.tensor([float(row[1]) for row in ROW.findall(block) if row[0] != "off-policy"])
    assert "Four plain responses are wrong; all of GRPO's advantages would be 0." in text
    assert plain.tolist() == group_advantages(plain, torch.zeros(4)).tolist() == [0.0] * 4


def test_the_readme_is_short():
    assert len(README.split()) <= 1300   # as `wc -w` counts


def test_the_equation_table_has_the_functions_of_icpo():
    table = section("From equation to code").partition("---|---")[2]
    public = {name for name, value in vars(icpo).items() if inspect.isfunction(value)
              and value.__module__ == "icpo" and not name.startswith("_")}
    assert set(re.findall(r"`(\w+)`", table)) == public


def test_the_defaults_in_the_readme_are_those_of_train():
    o = resolve(TrainingOptions())
    table = section("Where the paper's text and the authors' release differ")
    default = {point: text for point, text in re.findall(r"^\|(.+?) \| (.+?) \| ", table, re.M)}
    assert default["λ in f"] == f"{o.shaping_lambda}"
    assert default["KL"] == f"k3, {o.kl_coef}"
    assert default["bonus"] == f"α = {o.alpha:g}, {o.bonus_decay}, T = all steps"
    assert default["standard deviation"].startswith(f"unbiased, + {o.advantage_eps:.0e}".replace(
        "e-0", "e-")) and o.std_unbiased
    assert (o.off_policy_denominator, o.errs_strict, o.group, o.normalizer, o.old_logprobs) == (
        "behaviour", False, "replace", "batch", "sampler")
    assert (o.dual_clip, o.entropy_coef, o.log_ratio_clamp) == (0, 0, 0) and o.clip_off_policy
    # The runs of its commands have these, too.
    assert (o.learning_rate, o.weight_decay, o.bonus_steps) == (5e-5, 0.01, o.steps)


def anchors(page: Path) -> set[str]:
    """Returns the names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_point_at_what_exists(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}"


def text_of(file: Path) -> str:
    """Returns what a reader is told: a page, a configuration, or the docstring of a script."""
    text = file.read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(text)) or "" if file.suffix == ".py" else text


@pytest.mark.parametrize("file", [*PAGES, *CONFIGS, *SCRIPTS],
                         ids=lambda file: str(file.relative_to(ROOT)))
def test_paths_are_of_files_that_exist_or_that_a_configuration_names(file):
    named = {value for config in CONFIGS for value in yaml.safe_load(config.read_text()).values()
             if isinstance(value, str)}
    for path in re.findall(r"[\w./-]+/[\w.-]+\.(?:jsonl|yaml|py|png)\b", text_of(file)):
        if not path.startswith(("runs/", "evals/")):   # what the reader's own commands write
            places = ROOT / path, file.parent / path
            assert path in named or any(place.is_file() for place in places), path


def test_the_page_names_the_options_that_a_resumed_run_may_change():
    page = (ROOT / "docs" / "survives.md").read_text()
    listed = page.partition("Beside it, `--resume` may change")[2].partition("All other")[0]
    free = {flag(each.name) for each in fields(TrainingOptions) if each.metadata["free"]}
    said = {"--recompute-activations"}   # in the sentence before
    of_one_call = {"--resume", "--output-dir", "--dry-run", "--cards", "--demo-chat-template"}
    assert set(re.findall(r"`(--[a-z-]+)`", listed)) == free - said - of_one_call


def test_options_in_pages_exist():
    """In pages, comments of configurations and docstrings of scripts alike."""
    known = ELSEWHERE | {flag(each.name) for options in (TrainingOptions, EvaluationOptions)
                           for each in fields(options)}
    for script in SCRIPTS:
        text = script.read_text(encoding="utf-8")
        known |= set(re.findall(r'add\w*\(\s*"(--[\w-]+)"', text))
        known |= {flag(name) for name in re.findall(r"^    (\w+): .* = option\(", text, re.M)}
    used = {(option, file.name) for file in [*PAGES, *CONFIGS, *SCRIPTS]
            for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", text_of(file))}
    assert not {(option, name) for option, name in used if option not in known}


@pytest.mark.parametrize("script, options", [("train", TrainingOptions),
                                             ("eval", EvaluationOptions)])
def test_options_in_commands_are_those_of_the_script(script, options):
    known = {"--help"} | {flag(each.name) for each in fields(options)}
    text = "\n".join(text_of(file) for file in [*PAGES, *CONFIGS])
    commands = re.findall(rf"(?<!\w){script}\.py((?:[^`\n|&;\\]|\\\n)*)", text)
    used = {option for command in commands for option in re.findall(r"--[a-z][\w-]*", command)}
    assert len(used) > 15 and used <= known, used - known


def test_the_procedure_shows_the_lines_of_train_step():
    lines = re.findall(r"`(\w+ = [^`]+)`", section("The method"))
    assert len(lines) == 5
    source = (ROOT / "train.py").read_text().partition("def train_step")[2].partition("\ndef ")[0]
    assert all(line in source for line in lines)
