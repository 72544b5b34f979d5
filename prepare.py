"""Prepares training runs and evaluations: users' mistakes are found here, before the first step."""

import functools
import os
import random
import sys
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

import torch
import torch.distributed as dist
import yaml

from data import (
    Demonstrations,
    Problem,
    PromptBuilder,
    epoch_order,
    keep,
    keep_admitted,
    keep_askable,
    load_problems,
)
from datafiles import name_of
from distributed import (
    AdamW,
    check_shard_size,
    frozen_copy,
    gather_model,
    gather_objects,
    init_distributed,
    is_main,
    learning_rate,
    leave,
    on_main,
    shard,
    world_size,
    wrap_blocks,
)
from machine import free_memory, has_bfloat16, own_memory, return_freed_memory
from memory import CONTEXT, Plan, bytes_per_slot, choose_recomputation, choose_slots, needs_group
from model_utils import Transformer, load_model, save_model
from options import (
    PAPER,
    DemoFormat,
    EvaluationOptions,
    SharedOptions,
    TrainingOptions,
    check_ranges,
    embedded,
    parse_training,
    read_columns,
    read_old_names,
    require,
    resolve,
    samples_of,
    stop_strings,
    template_arguments,
    without_effect,
)
from overlap import normalise
from reward import Notes, extract_answer, make_scorer, references
from rollout import Sampler
from runs import (
    check_fingerprint,
    check_output,
    claim_folder,
    discard,
    find_model,
    give_back,
    key_of,
    load_checkpoint,
    read_model,
    settings_of_run,
    write_settings,
)
from timing import find_card, read_cards, time_table
from trackers import Trackers, check_packages


def make_builder(o: SharedOptions, tokenizer: Any, model: Transformer) -> PromptBuilder:
    require(o.chat_template or not (o.system or o.template_args),
            "--system and --template-args act on the chat template: they need --chat-template true")
    build = functools.partial(
        PromptBuilder, tokenizer, o.instruction, o.chat_template, system=o.system,
        vocab_size=model.config.vocab_size, template_args=template_arguments(o.template_args),
        stop=stop_strings(o))
    form = o.demo_format
    if form == "auto":
        form = "turns" if o.chat_template else "text"
        # The folder of the model says which form suits it, and before that the run that made it.
        for known in (model.generation_config or {}, settings_of_run(o.model)):
            if (known.get("demo_format") in get_args(DemoFormat)
                    and known.get("chat_template", True) == o.chat_template):
                form = known["demo_format"]
    try:
        builder = build(demo_format=form)
    except ValueError:
        if o.demo_format != "auto" or not o.chat_template:
            raise
        builder = build(demo_format="one-turn")   # the template may have no turns of an assistant
    o.demo_format = cast(Any, builder.demo_format)
    if builder.depends_on_date() and is_main():
        print(f"warning: the chat template of {o.model} writes today's date, so prompts change "
              f"from day to day: --template-args date_string='26 Jul 2024', or the name that the "
              f"template has for it, fixes the date", file=sys.stderr)
    return builder


def load_data(o: SharedOptions, source: str, embedded_file: str, split: str = "train",
              needs: tuple[str, ...] = ()) -> list[Problem]:
    """The problems of --train-data and the like. split: taken of a data set that has several."""
    columns = {} if source == "tiny" else read_columns(o.columns)
    return load_problems(embedded(source, embedded_file), needs, answer_lists=o.answer_lists,
                         columns=columns, split=split, answer_format=o.answer_format, seed=o.seed)


def load_demonstrations(o: SharedOptions) -> list[Problem]:
    return load_data(o, o.demonstrations, "demonstrations.jsonl", needs=("solution",))


# --------------------------------------------------------------------------------------------------
# Training

@dataclass(eq=False)
class Run:
    """What the steps of a run need."""
    options: TrainingOptions
    folder: Path
    device: torch.device
    model: Transformer
    reference: Transformer | None       # the initial model, for the KL term
    optimizer: AdamW
    builder: PromptBuilder
    problems: list[Problem]
    held_out: dict[str, list[Problem]]  # by the name of the data set
    demonstrations: Demonstrations | None
    sampler: Sampler
    weights_stay: bool                  # whether an update gathers them once, see passes
    scorer: Callable[..., list[float]]  # (responses, problems) -> rewards
    notes: Notes                        # what the scorer could not settle in this step
    start: int = 0                      # steps already made
    trackers: Trackers = field(default_factory=Trackers)   # rank 0 reports to them

    def begin(self, step: int) -> None:
        """Clears the notes and sets the learning rate for step `step`, counted from 0."""
        self.notes.clear()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.options, step)

    def whole_model(self) -> Transformer:
        """The model to sample with, see gather_model; where graphs refer to one, that one again."""
        return gather_model(self.model, getattr(torch, self.options.dtype), self.sampler.model())

    def save(self, name: str) -> None:
        """Writes the model as a Hugging Face folder in the run's, in place of an earlier one.

        Every process must call it.
        """
        folder, new = self.folder / name, self.folder / f".{name}.new"
        on_main(lambda: discard(new))   # a save that was killed leaves one
        save_model(self.model, self.builder.tokenizer, new)   # the earlier one stays until then
        on_main(lambda: (discard(folder), new.rename(folder)))

    def final_answer(self, response: str) -> str | None:
        return extract_answer(response, self.options.answer_format)

    def references(self, problem: Problem) -> list[str]:
        return references(problem, self.options.answer_format)


def prepare(arguments: list[str]) -> Run:
    """The run of a command line, ready for its next step. Raises ValueError for users' mistakes.

    A dry run ends here, with SystemExit, and has read no weights and written nothing.
    """
    o = parse_training(arguments)
    # torchrun starts the processes again if one dies.
    require(o.output_dir or not int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)),
            "torchrun --max-restarts needs --output-dir: the processes that it starts again would "
            "not know which run is theirs")
    # The agents of several nodes count restarts apart, so the processes would wait for one another.
    require(not int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
            or int(os.environ.get("GROUP_WORLD_SIZE", 1)) == 1,
            "torchrun --max-restarts is for one node: with several, leave it out, and after a "
            "failure give the same command with --resume")
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        o.resume = True
    init_distributed(o.device)
    claim = on_main(lambda: claim_folder(o))
    try:
        if claim.saved:
            o = parse_training(arguments, claim.saved)
        processes, _ = read_cards(o) or (world_size(), 0)
        resolve(o, processes)
        check_shard_size(o.shard_size, processes)
        idle = without_effect(arguments, o)
        if idle and is_main():
            print(f"warning: without effect: {', '.join(idle)}", file=sys.stderr)
        run = _prepare_in(claim.folder, claim.saved, o)
    except BaseException as error:
        if is_main():
            give_back(claim)
        if isinstance(error, SystemExit) and not error.code:   # of a dry run
            leave()   # several processes end here
        raise
    if claim.lock is not None and is_main():
        weakref.finalize(run, os.close, claim.lock)
    return run


def _prepare_in(folder: Path, saved: dict | None, o: TrainingOptions) -> Run:
    cards = read_cards(o)
    device = init_distributed(o.device, needed=needs_group(o))
    for name, on in (("--offload-reference true", o.offload_reference),
                     ("--optimizer-state cpu", o.optimizer_state == "cpu")):
        require(not on or cards or device.type == "cuda",
                f"{name} is for GPUs: on this device all is in the CPU's memory anyway")
    if saved:   # a resumed run keeps what 0 and auto stand for
        o.max_new_tokens = o.max_new_tokens or saved.get("max_new_tokens", 0)
        if o.demo_format == "auto":
            o.demo_format = saved.get("demo_format", "auto")
    if saved:
        on_main(lambda: check_fingerprint(folder, saved, o))
    o.output_dir = str(folder)
    on_main(lambda: check_packages(o.report_to))
    return_freed_memory(device)
    _warn_of_type(o, device)

    notes = Notes()
    scorer = make_scorer(o.reward, o.answer_format, o.verify_timeout, notes, o.reward_timeout)
    needs = ("expert_response",) if o.off_policy == "dataset" else ()
    problems = load_data(o, o.train_data, "train.jsonl", needs=needs)
    names = list(map(name_of, o.test_data))
    if len(set(names)) < len(names):   # m/test.jsonl and g/test.jsonl
        names = [f"{Path(each).absolute().parent.name}-{name_of(each)}" for each in o.test_data]
    require(len(set(names)) == len(names),
            f"two of --test-data {' '.join(o.test_data)} have the same name")
    held_out = {name: load_data(o, each, "test.jsonl", "test")
                for name, each in zip(names, o.test_data)}
    model, tokenizer = load_any_model(o.model, torch.device("meta"), torch.float32)   # no weights
    choose_length(o, model)
    _check_model(o, model, tokenizer)
    _check_memory(o.batch_size * (o.n_on + o.n_off), o,
                  f"--batch-size {o.batch_size} and --n-on {o.n_on} with --n-off {o.n_off}")
    asked = max(len(each[:o.eval_problems or None]) for each in held_out.values())
    _check_memory(o.eval_samples * asked * bool(o.eval_every), o,
                  f"--eval-samples {o.eval_samples}")
    builder = make_builder(o, tokenizer, model)
    require(saved or o.off_policy != "demonstrations" or o.num_demonstrations
            or builder.demo_format != "text" or not o.chat_template,
            "without demonstrations (--num-demonstrations 0) [D; q] is the question in the chat "
            "template, which --demo-format text leaves out: give another form")
    problems, held_out, demonstrations = select_data(o, builder, problems, held_out)
    most = max(map(len, held_out.values()))
    own = CONTEXT if cards else own_memory(device)
    processes, size = cards or (world_size(), own + free_memory(device))
    plan = Plan(model.config, o, processes, "cuda" if cards else device.type, own)
    if o.recompute_activations == "auto":   # alike on all processes
        o.recompute_activations = choose_recomputation(plan, min(gather_objects(size - own)))
    if o.dry_run:
        if is_main():
            say_dry_run(plan, builder, problems, demonstrations, most, size)
        sys.exit()

    dtype: torch.dtype = getattr(torch, o.dtype)
    split = functools.partial(shard, device=device, compute_dtype=dtype, shard_size=o.shard_size)
    model, _ = load_any_model(   # the weights that are trained are float32
        o.model, device, torch.float32, *[split] * dist.is_initialized())
    reference = None
    if o.kl_coef:
        reference = frozen_copy(model, dtype, o.offload_reference)
    wrap_blocks(model, o.recompute_activations, o.compile_blocks)
    optimizer = AdamW(model.parameters(), o.optimizer_state, lr=o.learning_rate,
                      betas=(o.adam_beta1, o.adam_beta2), eps=o.adam_eps,
                      weight_decay=o.weight_decay)
    sampler, stay = make_sampler(o, model, most, dtype)
    run = Run(o, folder, device, model, reference, optimizer, builder, problems, held_out,
              demonstrations, sampler, stay, scorer, notes)
    if saved is not None:
        run.start = load_checkpoint(folder, model, optimizer)
        require(run.start <= o.steps,
                f"{folder} has made {run.start} steps already, more than --steps {o.steps}")
        if o.lr_schedule != "constant" and o.lr_decay_steps <= run.start < o.steps and is_main():
            print(f"warning: --lr-schedule {o.lr_schedule} has ended at step {o.lr_decay_steps}, "
                  f"so the learning rate of all further steps is 0", file=sys.stderr)
    on_main(lambda: write_settings(folder, o, run.start))
    # It comes after, because a kill here must leave a folder that can be resumed.
    on_main(lambda: run.trackers.begin(o.report_to, folder, asdict(o), run.start))
    return run


def choose_length(o: SharedOptions, model: Transformer) -> None:
    """Resolves --max-new-tokens 0, in place, and says to what."""
    if o.max_new_tokens:
        return
    wanted = (model.generation_config or {}).get("max_new_tokens")
    positions = model.config.max_position
    o.max_new_tokens = min(wanted if isinstance(wanted, int) and wanted > 0 else 2048,
                           positions - min(o.max_prompt_length, positions // 2))
    if is_main():
        print(f"responses of at most {o.max_new_tokens} tokens; --max-new-tokens sets another "
              f"limit", file=sys.stderr)


def _check_model(o: TrainingOptions, model: Transformer, tokenizer: Any) -> None:
    require(o.micro_batch_tokens >= o.max_prompt_length + o.max_new_tokens,
            f"--micro-batch-tokens {o.micro_batch_tokens} does not hold one sequence of "
            f"--max-prompt-length {o.max_prompt_length} and --max-new-tokens {o.max_new_tokens}")
    require(model.stop_ids,
            f"{o.model} names no end-of-text token (eos_token in its tokenizer, or eos_token_id in "
            f"its generation_config.json), so no response would ever end")
    require(min(model.stop_ids) < model.config.vocab_size,
            f"the tokenizer of {o.model} has {len(tokenizer)} tokens and the model "
            f"{model.config.vocab_size}; the end-of-text token, {min(model.stop_ids)}, is beyond "
            f"them, so no response would ever end: give the model its own tokenizer")
    require(o.off_policy != "dataset" or tokenizer.eos_token_id is not None,
            f"the tokenizer of {o.model} has no eos_token, with which the data's expert responses "
            f"would end")
    require(o.max_prompt_length <= model.config.max_position - o.max_new_tokens,
            f"--max-prompt-length {o.max_prompt_length} and --max-new-tokens {o.max_new_tokens} "
            f"pass the model's {model.config.max_position} positions")


def _warn_of_type(o: SharedOptions, device: torch.device) -> None:
    if o.dtype == "bfloat16" and device.type == "cpu" and is_main() and not has_bfloat16():
        print("warning: this processor has no instructions for bfloat16 (AVX512_BF16 or AMX), so "
              "--dtype bfloat16 is slower than float32 here", file=sys.stderr)


def _check_memory(sequences: int, o: SharedOptions, options: str, token_bytes: int = 72) -> None:
    """Raises ValueError if the responses do not fit in the CPU's memory.

    token_bytes: what a token takes: an int and a float of Python, with the pointers to them, 72.
    """
    needed = sequences * (1000 + token_bytes * o.max_new_tokens) // world_size()
    free = free_memory(torch.device("cpu"))
    require(needed <= free,
            f"{options} are {sequences:,} responses at the same time; of up to {o.max_new_tokens} "
            f"tokens each, they take up to {needed / 1e9:,.1f} GB of a process's memory, and "
            f"{free / 1e9:,.1f} GB are free")


def make_sampler(o: TrainingOptions, model: Transformer, held_out: int,
                 dtype: torch.dtype) -> tuple[Sampler, bool]:
    """Returns (the sampler, whether FSDP's weights stay whole between micro-batches).

    The sampler has slots for the larger of a rollout and an evaluation; --slots 0 is a number that
    is the same on every process. What stays from one rollout or micro-batch to the next is what has
    room beside the update: first the sampler's copy and its cache, so that its graphs serve again;
    then the weights that FSDP has gathered.
    """
    plan = Plan(model.config, o, world_size(), model.device.type)
    free = min(gather_objects(free_memory(model.device)))
    slots = min(gather_objects(fill_slots(plan, held_out, free)))
    length = o.max_prompt_length + o.max_new_tokens
    of_sampler = plan.gathered + slots * bytes_per_slot(plan.config, length, dtype)
    keep = plan.device == "cuda" and plan.fits_beside_update(of_sampler, free)
    # One process on a CPU only copies its weights, which takes no time to speak of.
    stay = (plan.device == "cuda" or plan.processes > 1) and plan.fits_beside_update(
        plan.gathered + keep * of_sampler, free)
    sampler = error = None
    try:
        sampler = Sampler(model.config, slots, length, model.device, dtype, o.compile, keep)
    except ValueError as caught:   # memory may be short on one process alone; then all of them end
        error = caught
    for each in filter(None, gather_objects(error)):
        raise each
    assert sampler is not None
    return sampler, stay


def fill_slots(plan: Plan, held_out: int, free: float) -> int:
    """--slots, or with 0 as many as fit in the bytes that weights and reference have left free."""
    o = plan.options
    sequences = max(o.batch_size * (o.n_on + o.n_off),
                    held_out * o.eval_samples if o.eval_every else 0)
    return o.slots or choose_slots(
        plan.config, -(-sequences // plan.processes), o.max_prompt_length + o.max_new_tokens,
        plan.device, getattr(torch, o.dtype), plan.beside_cache, free)


def say_dry_run(plan: Plan, builder: PromptBuilder, problems: list[Problem],
                demonstrations: Demonstrations | None, held_out: int, free: float) -> None:
    """Prints the options, the prompts of the first question, the memory of each process, and the
    seconds of a step where the GPU is a known one.

    free: the bytes that a process may take, plan.own included.
    """
    o = plan.options
    o.slots = fill_slots(plan, held_out, free - plan.own - plan.weights - plan.reference)
    cache = o.slots * bytes_per_slot(plan.config, o.max_prompt_length + o.max_new_tokens,
                                     getattr(torch, o.dtype))
    print("", yaml.safe_dump(asdict(o), sort_keys=False), sep="\n")
    problem = problems[epoch_order(o.seed, 0, len(problems))[0]]
    prompts = {"The first question": builder.plain(problem)}
    if demonstrations is not None:
        prompts["The first question with demonstrations"] = demonstrations.draw(
            problem, random.Random(f"demonstrations {o.seed} 0 0 0"))[1]
    for name, tokens in prompts.items():
        print(f"{name}, {len(tokens)} tokens:", builder.tokenizer.decode(tokens), tokens, "",
              sep="\n")
    print(plan.table(cache, o.slots, free))
    if plan.device == "cuda":
        card = find_card(o.cards.partition("x")[2] or torch.cuda.get_device_name())
        print("", time_table(plan, card) if card else "The time of a step is not computed: "
              "timing.py has no figures of this GPU", sep="\n")


def select_data(o: TrainingOptions, builder: PromptBuilder, problems: list[Problem],
                held_out: dict[str, list[Problem]]):
    """Leaves out what cannot be used, and prints how much and why.

    Returns (problems, held-out problems, demonstrations or None). Raises ValueError if too few are
    left.
    """
    left_out: list[str] = []
    held_out = {name: keep_askable(
        each, "held-out problems" + f" of {name}" * (len(held_out) > 1), builder,
        o.max_prompt_length, left_out) for name, each in held_out.items()}
    problems = keep_askable(problems, "training problems", builder, o.max_prompt_length, left_out)
    questions = {normalise(p.problem) for each in held_out.values() for p in each}
    problems = keep(problems, "training problems", "that are held-out ones too",
                    lambda p: normalise(p.problem) not in questions, left_out,
                    "; give other --train-data or --test-data")
    held_out = {name: each[:o.eval_problems or None] for name, each in held_out.items()}
    demonstrations = None
    if o.off_policy == "dataset":
        problems = keep(problems, "training problems",
                        f"with an expert response over {o.max_new_tokens} tokens",
                        lambda p: len(builder.expert_response(p)) <= o.max_new_tokens, left_out,
                        "; raise --max-new-tokens")
    elif o.off_policy == "demonstrations":
        demonstrations = Demonstrations(load_demonstrations(o), builder, o.num_demonstrations,
                                        o.max_prompt_length, o.demo_min_chars)
        problems = keep_admitted(problems, "training problems", demonstrations, left_out)
        left_out += [f"left out: {count} demonstrations {reason}"
                     for reason, count in demonstrations.excluded.items() if count]
        if demonstrations.never_together:
            left_out.append(f"{demonstrations.never_together} demonstrations contain a question "
                            f"and are never drawn for it")
    require(len(problems) >= o.batch_size,
            f"{len(problems)} training problems are fewer than --batch-size {o.batch_size}")
    if is_main():
        count = f", {len(demonstrations.pool)} demonstrations" if demonstrations else ""
        most = sum(map(len, held_out.values()))
        print(f"{len(problems)} training problems, {most} held-out problems{count}",
              *left_out, sep="\n")
    return problems, held_out, demonstrations


# --------------------------------------------------------------------------------------------------
# Evaluation

class Case(NamedTuple):
    """A row of the table."""
    data: str
    shots: int
    problems: list[Problem]
    demonstrations: Demonstrations | None
    temperature: float
    samples: int          # answers to each problem
    again: bool = False   # a second draw, with random numbers of its own
    demo_format: str = ""   # where it is another than --demo-format

    @property
    def key(self) -> tuple:
        return key_of(self.label)

    @property
    def label(self) -> dict[str, Any]:
        """What stands in each record and in the row of the table."""
        label = {"data": self.data, "shots": self.shots, "temperature": self.temperature,
                 "again": self.again, "demo_format": self.demo_format}
        return {name: value for name, value in label.items()
                if value or name not in ("again", "demo_format")}


def prepare_evaluation(o: EvaluationOptions):
    """(model, its PromptBuilder, scorer, the rows of the table as Cases).

    Raises ValueError for users' mistakes.
    """
    device = init_distributed(o.device)
    _check_evaluation(o)
    scorer = make_scorer(o.reward, o.answer_format, o.verify_timeout,
                         reward_timeout=o.reward_timeout)
    data = {name: load_data(o, name, "test.jsonl", "test")[:o.limit or None] for name in o.data}
    _warn_of_type(o, device)
    empty, tokenizer = load_any_model(o.model, torch.device("meta"), torch.float32)   # no weights
    choose_length(o, empty)
    # Few responses wait as tokens until they are scored; then their texts stay.
    _check_memory(max(len(problems) * samples_of(o, name) for name, problems in data.items()), o,
                  f"--samples {o.samples}", token_bytes=5)
    positions = empty.config.max_position
    require(positions > o.max_new_tokens, f"--max-new-tokens {o.max_new_tokens} leaves no room for "
            f"a prompt: {o.model} has {positions} positions")
    room = min(o.max_prompt_length, positions - o.max_new_tokens)
    builder = make_builder(o, tokenizer, empty)
    numbers = sorted(set(o.shots) - {0})
    worked = load_demonstrations(o) if numbers else []
    formats = compared_formats(o, builder) if o.compare_shots else {"": builder}
    pools = {(k, form): Demonstrations(worked, each, k, room, o.demo_min_chars)
             for k in numbers for form, each in formats.items()}
    cases, left_out = [], []
    assert o.temperature is not None   # _check_evaluation resolved it
    for name, problems in data.items():   # all rows of a data set are over the same problems
        kept = keep_askable(problems, f"problems of {name}", builder, room, left_out,
                            *pools.values())
        number = samples_of(o, name)
        cases += [Case(name, shots, kept, pools.get((shots, form)), o.temperature, number,
                       demo_format=form)
                  for shots in o.shots for form in (formats if shots else [""])]
        if o.compare_shots:
            cases += [Case(name, 0, kept, None, temperature, number, again=True)
                      for temperature in [o.temperature, *sorted(o.temperatures)]]
    if is_main() and left_out:
        print(*left_out, sep="\n")
    model, _ = load_any_model(o.model, device, getattr(torch, o.dtype))
    return model, builder, scorer, cases


def compared_formats(o: EvaluationOptions, builder: PromptBuilder) -> dict[str, PromptBuilder]:
    """The builders of --compare-formats by format; "" is --demo-format.

    Raises ValueError for a format that was given and that the tokenizer does not allow.
    """
    found = {}
    for form in o.compare_formats or get_args(DemoFormat):
        try:
            found["" if form == o.demo_format else form] = replace(builder, demo_format=form)
        except ValueError:
            if o.compare_formats:
                raise
    return found


def _check_evaluation(o: EvaluationOptions) -> None:
    check_ranges(o)
    read_old_names(o)
    if o.suite:
        require(o.data == ["tiny"], f"--suite {o.suite} names the data itself: leave --data out")
        o.data = [name for names in PAPER.values() for name in names]
    o.shots = o.shots or ([0] if o.suite else [0, 1])
    o.temperature = (0.6 if o.suite else 1.0) if o.temperature is None else o.temperature
    most = max(samples_of(o, name) for name in o.data)
    o.k = o.k or sorted({1, *(samples_of(o, name) for name in o.data)})
    require(all(1 <= k <= most for k in o.k),
            f"pass@k needs k from 1 to the number of samples, {most}, not {o.k}")
    output = Path(o.output)
    require(output.suffix not in (".json", ".png"),
            f"--output is the file of the samples; the table and the picture go beside it, as "
            f".json and .png: give {output.parent / output.stem}.jsonl, not {o.output}")
    if o.output:
        on_main(lambda: check_output(output))
    for name, given in (("compare-formats", o.compare_formats),
                        ("temperatures", o.temperatures != EvaluationOptions().temperatures)):
        require(o.compare_shots or not given,
                f"--{name} are those of --compare-shots: give that, too")
    for name, values in (("data", o.data), ("shots", o.shots),
                         ("compare-formats", o.compare_formats)):
        require(len(set(values)) == len(values),
                f"{name}: {', '.join(map(str, values))} names one twice")
    require(not o.compare_shots or (
        o.shots[0] == 0 and len(o.shots) == 2 and o.temperature not in o.temperatures
        and min(o.temperatures, default=1) >= 1e-6),
        f"--compare-shots compares --shots 0 with one other number, and with --temperatures above "
        f"0, from 1e-6 on, other than {o.temperature:g}; they are {o.shots} and {o.temperatures}")


def load_any_model(path: str, device, dtype, *shard: Callable) -> tuple[Transformer, Any]:
    """load_model, also of a run of train.py and of one of its checkpoints; see runs.find_model.

    shard: none, or one as load_model takes it.
    """
    # Another process may be training there, so that the next look finds a newer checkpoint.
    folder, checkpoint = on_main(lambda: find_model(path))
    model, tokenizer = load_model(folder, device, dtype, *shard)
    if checkpoint and str(device) != "meta":
        if is_main() and Path(path) != checkpoint:
            print(f"{path} is not finished: this is {checkpoint.name}")
        read_model(checkpoint, model)
    return model, tokenizer
