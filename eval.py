"""Accuracy of a model with 0 or more demonstrations in its context.

    python eval.py --model runs/icpo-seed0/final --shots 0 1
    torchrun --nproc-per-node 8 eval.py --model Qwen/Qwen3-1.7B --data test.jsonl \\
        --demonstrations train.jsonl --samples 4

It prints a row for each data set and number of shots, and writes every sample to a JSONL file, from
which the same command goes on after a kill.
"""

import os
import random
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from options import EvaluationOptions, begin_imports, end_with_mistake, parse_evaluation, shots_of

ABOUT = "Accuracy of a model with 0 or more demonstrations in its context."
if __name__ == "__main__":   # --help and a misspelt option end here, before torch is loaded
    parse_evaluation(sys.argv[1:], ABOUT)
    begin_imports()

from tqdm import tqdm

from data import Demonstrations, Problem, PromptBuilder
from distributed import gather_objects, is_main, leave, my_share, on_main, world_size
from files import append_lines, read_object, write_object
from memory import choose_slots
from model_utils import Transformer
from own_reward import RewardError
from prepare import Case, prepare_evaluation
from reward import make_scorer
from rollout import Completion, Sampler, generate
from runs import begin_program, find_output, follow_tokens, settings_of_run, write_samples
from summary import print_table, summarise

KEEP_EVERY = 64   # answers that a process scores and appends to the file at the same time

# --------------------------------------------------------------------------------------------------
# Sampling, scoring, summary

def evaluate(model: Transformer, builder: PromptBuilder, problems: list[Problem],
             demonstrations: Demonstrations | None = None, *, samples: int = 1,
             max_new_tokens: int, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0,
             seed: int = 0, slots: int = 0, sampler: Sampler | None = None,
             scorer: Callable | None = None, progress: Callable | None = None,
             numbers: Sequence[int] | None = None, keep: Callable | None = None) -> list[dict]:
    """Samples `samples` answers to every problem and scores them; processes share the problems.

    demonstrations: a pool that every problem was admitted to; None asks plainly. slots, sampler,
    progress: see `generate`. scorer: see make_scorer; by default the answer in the last box earns
    1.0 if it is right, else 0.0. numbers: those of the problems among all that are asked, by
    default from 0 on. keep: called in this process with new records each time about KEEP_EVERY
    answers to complete problems wait, so that a kill loses little.
    Random numbers depend on (seed, number of the problem, sample) alone, so two evaluations of the
    same problems differ by the model only. Returns on every process one dict a sample, `samples`
    consecutive ones a problem: id, sample, response, score, tokens, finished.
    """
    numbers = range(len(problems)) if numbers is None else numbers
    prompts = [make_prompt(*each, builder, demonstrations, seed)
               for each in zip(numbers, problems, strict=True)]
    mine = my_share([len(prompt) + max_new_tokens for prompt in prompts])
    answers: dict[int, dict[int, Completion]] = {i: {} for i in mine}   # to problem i, by sample
    complete: list[int] = []   # problems that are not scored yet
    records: dict[tuple[int, int], dict] = {}
    scorer = scorer or make_scorer()
    stop_at = demonstrations.builder.stop_at[True] if demonstrations else builder.stop_at[False]

    def end(index: int, completion: Completion) -> None:
        i = mine[index // samples]
        answers[i][index % samples] = completion
        if len(answers[i]) == samples:
            complete.append(i)
        if keep and len(complete) * samples >= KEEP_EVERY:
            keep(score())

    def score() -> list[dict]:
        found = [(i, answers.pop(i)) for i in sorted(complete)]
        complete.clear()
        rows = [(i, j, completions[j]) for i, completions in found for j in range(samples)]
        texts = [builder.response_text(c.tokens, model.stop_ids, stop_at) for *_, c in rows]
        scores = scorer(texts, [problems[i] for i, *_ in rows]) if rows else []
        new = {(i, j): {"id": problems[i].id, "sample": j, "response": text, "score": right,
                        "tokens": len(c.tokens), "finished": c.finished}
               for (i, j, c), text, right in zip(rows, texts, scores, strict=True)}
        records.update(new)
        return list(new.values())

    generate(model, [prompts[i] for i in mine], n=samples, max_new_tokens=max_new_tokens,
             temperature=temperature, top_p=top_p, top_k=top_k, stop_ids=model.stop_ids, seed=seed,
             stream_ids=[numbers[i] for i in mine], slots=slots, sampler=sampler,
             progress=progress, on_end=end, stop_at=[stop_at] * len(mine))
    last = score()
    if keep:
        keep(last)
    everyone = {key: record for part in gather_objects(records) for key, record in part.items()}
    return [everyone[key] for key in sorted(everyone)]


def make_prompt(number: int, problem: Problem, builder: PromptBuilder,
                demonstrations: Demonstrations | None, seed: int) -> list[int]:
    """The prompt of the problem with this number, plain or with demonstrations drawn for it."""
    if demonstrations is None:
        return builder.plain(problem)
    return demonstrations.draw(problem, random.Random(f"evaluation {seed} {number}"))[1]


# --------------------------------------------------------------------------------------------------
# The command

def seed_of(o: EvaluationOptions, case: Case) -> int:
    return o.seed + 2 ** 31 * case.again


def make_sampler(o: EvaluationOptions, model: Transformer, builder: PromptBuilder,
                 cases: list[Case]) -> Sampler:
    """Slots for the largest case and the longest prompt of all cases."""
    longest = max(len(make_prompt(i, problem, builder, case.demonstrations, seed_of(o, case)))
                  for case in cases for i, problem in enumerate(case.problems))
    most = max(-(-len(case.problems) // world_size()) * case.samples for case in cases)
    length = longest + o.max_new_tokens
    slots = o.slots or choose_slots(model.config, most, length, model.device, model.dtype)
    return Sampler(model.config, min(slots, most), length, model.device, model.dtype)


def sample_case(o: EvaluationOptions, model: Transformer, builder: PromptBuilder, scorer: Callable,
                case: Case, records: list[dict], sampler: Sampler) -> list[dict]:
    """Samples the problems of a case that have no records yet; returns all records in order.

    Each process appends its new records to the file as problems are complete.
    """
    title = ", ".join(filter(None, (case.data, shots_of(case.shots), case.demo_format,
                                    f"temperature {case.temperature:g}")))
    place = {problem.id: i for i, problem in enumerate(case.problems)}
    known = {record["id"] for record in records}
    left = [i for problem, i in place.items() if problem not in known]

    def keep(new: list[dict]) -> None:
        # Other nodes may not see the folder, or their lines may mix there with those of the first.
        if os.environ.get("GROUP_RANK", "0") == "0":   # torchrun gives each node a number
            append_lines(Path(o.output), [case.label | record for record in new])

    with tqdm(total=len(case.problems) * case.samples, initial=len(records), desc=title,
              unit="answer", disable=not is_main(), leave=False) as bar:
        def say(ended: int, speed: str) -> None:
            bar.update(world_size() * ended)
            bar.set_postfix_str(speed, refresh=False)

        new = evaluate(
            model, builder, [case.problems[i] for i in left], case.demonstrations, numbers=left,
            samples=case.samples, max_new_tokens=o.max_new_tokens, temperature=case.temperature,
            top_p=o.top_p, top_k=o.top_k, seed=seed_of(o, case), sampler=sampler, scorer=scorer,
            progress=follow_tokens(say), keep=keep)
    return sorted(records + [case.label | record for record in new], key=lambda r: place[r["id"]])


def main() -> None:
    begin_program()
    found = None
    signal.signal(signal.SIGTERM, signal.default_int_handler)   # SIGTERM acts as Ctrl-C
    try:
        o = parse_evaluation(sys.argv[1:], ABOUT, settings_of_run)
        model, builder, scorer, cases = prepare_evaluation(o)
        output, found = on_main(lambda: find_output(o, cases))
        o.output, rows = str(output), []
        sampler = make_sampler(o, model, builder, cases)
        for case in cases:
            found[case.key] = sample_case(o, model, builder, scorer, case,
                                          found.get(case.key, []), sampler)
            on_main(lambda: write_samples(output, found))   # in order
            rows.append(case.label | on_main(lambda case=case, records=found[case.key]: summarise(
                records, case.samples, [k for k in o.k if k <= case.samples], o.answer_format,
                o.verify_timeout)))
    except ValueError as error:
        end_with_mistake("eval.py", error)
    except (RewardError, OSError) as error:
        print(f"eval.py: error: {error}", file=sys.stderr)
        os._exit(1)   # at once, because other processes may wait for this one
    except KeyboardInterrupt:
        if is_main():
            where = "" if found is None else (f"; what was sampled is in {o.output}, and the same "
                                              f"command goes on from there")
            print(f"\ninterrupted{where}", file=sys.stderr)
        os._exit(130)   # at once, because other processes may wait for this one
    if is_main():
        print_table(o, rows)
        comparison = {}
        if o.compare_shots:
            import pilot  # it loads matplotlib
            by_key = {case.key: row for case, row in zip(cases, rows, strict=True)}
            comparison = {"comparison": pilot.report(o, found, by_key)}
        about = Path(o.output).with_suffix(".json")
        write_object(about, read_object(about) | {"rows": rows} | comparison)
        print(f"every sample: {o.output}; this table: {about}")
    leave()


if __name__ == "__main__":
    main()
