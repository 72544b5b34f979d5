"""Makes the embedded model: problems, worked demonstrations, a tokenizer and a small model.

    python tiny/make.py     # rewrites this folder, in under 20 minutes on one core
    python tiny/make.py --output-dir often --worked-share 0.2   # a model that often works sums out
    python tiny/make.py --output-dir often --worked-share 0.2 --init tiny/model --steps 100
                            # the same, in one or two minutes
    python tiny/make.py --output-dir sums --only-problems       # only problems, for your own model

ICPO needs a model that can do more with a demonstration in its context than without one. This
script trains a small model with this property. A problem is a sum of 5 to 8 one-digit numbers; a
worked solution writes the running sums. A training document is either
- one problem with an immediate answer, right with probability `quick_right` and otherwise off by up
  to 4; a share `continued_share` of these problems has a worked answer whose loss starts after its
  opening, and a share `worked_share` of the others has a worked answer; or
- one or two demonstrations and a problem, all with immediate answers or all with worked ones.
Only the last answer has a loss. So the model knows how to work a sum out. It does so after a
demonstration that does, but almost never when it is asked plainly; `worked_share` sets how rarely.
With `slips` the model also makes mistakes in running sums, so that some worked answers are wrong.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model_utils import ModelConfig, Transformer, load_model, save_model, token_logprobs
from options import INSTRUCTION
from prompts import DEMO_SEPARATOR, Problem, PromptBuilder
from rollout import generate

OPENING = "Adding up: "   # It is one token, so that working the sum out is a single choice.
QUESTION, SOLUTION = "{sum}", OPENING + r"{worked} \boxed{{total}}"
CHAT_TEMPLATE = ("{% for message in messages %}"
                 "{{ '<|' + message['role'] + '|>' + message['content'] }}"
                 "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
                 "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer with one token for each printable ASCII character and for each fixed
    piece of the prompts, so that prompts stay short."""
    special = ["<|end|>", "<|unk|>", "<|user|>", "<|assistant|>"]
    pieces = [" " + INSTRUCTION, "Question: ", "Answer:", DEMO_SEPARATOR, "\\boxed{", OPENING]
    characters = ["\n"] + [chr(c) for c in range(32, 127)]
    vocab = {token: i for i, token in enumerate(special + pieces + characters)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in pieces])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", unk_token="<|unk|>", pad_token="<|end|>",
        chat_template=CHAT_TEMPLATE, clean_up_tokenization_spaces=False)


def make_problem(rng: random.Random, lengths: tuple[int, int], largest: int = 9,
                 question: str = QUESTION, solution: str = SOLUTION) -> Problem:
    numbers = [rng.randint(1, largest) for _ in range(rng.randint(*lengths))]
    return Problem(question.replace("{sum}", "+".join(map(str, numbers))), str(sum(numbers)),
                   work_out(numbers, solution))


def work_out(numbers: list[int], solution: str = SOLUTION, slip=lambda: 0) -> str:
    """Returns the worked solution; adds `slip()` to every running sum."""
    worked, total = str(numbers[0]), numbers[0]
    for number in numbers[1:]:
        total += number + slip()
        worked += f"+{number}={total}"
    return solution.replace("{worked}", worked).replace("{total}", str(total))


def make_problems(rng: random.Random, count: int, lengths: tuple[int, int], taken: set[str],
                  **form) -> list[Problem]:
    """Returns `count` different problems, none of them in `taken`, and adds them to `taken`. `form`
    goes to make_problem."""
    problems = []
    while len(problems) < count:
        problem = make_problem(rng, lengths, **form)
        if problem.problem not in taken:
            taken.add(problem.problem)
            problems.append(problem)
    return problems


def quick_answer(problem: Problem, rng: random.Random, right: float) -> str:
    off = 0 if rng.random() < right else rng.choice([-4, -3, -2, -1, 1, 2, 3, 4])
    return f"\\boxed{{{int(problem.answer) + off}}}"


def worked_answer(problem: Problem, rng: random.Random, slips: float) -> str:
    """Returns the solution with a share `slips` of wrong running sums; each adds an error of 1,
    which the following sums keep."""
    if not slips:
        return problem.solution or ""
    return work_out(list(map(int, problem.problem.split("+"))),
                    slip=lambda: rng.choice((-1, 1)) if rng.random() < slips else 0)


def make_document(rng: random.Random, builder: PromptBuilder, settings, lengths,
                  taken) -> tuple[list[int], int]:
    """Returns (token ids of a training document, position at which its loss starts)."""
    count = rng.choices((0, 1, 2), weights=(0.45, 0.45, 0.10))[0]
    continued = count == 0 and rng.random() < settings.continued_share
    worked = continued or rng.random() < (0.5 if count else settings.worked_share)
    *examples, problem = make_problems(rng, count + 1, lengths, set(taken))

    def answer(p, slips=0.0):
        return (worked_answer(p, rng, slips) if worked
                else quick_answer(p, rng, settings.quick_right))

    examples = [Problem(p.problem, p.answer, answer(p)) for p in examples]
    prompt = builder.demo_prefixed(problem, examples)
    response = (builder.tokenizer.encode(answer(problem, settings.slips))
                + [builder.tokenizer.eos_token_id])
    return prompt + response, len(prompt) + continued


def train(model: Transformer, builder: PromptBuilder, settings, lengths, taken) -> None:
    rng = random.Random(f"documents {settings.seed}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98),
                                  weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate,
                                                   settings.steps, pct_start=0.1)
    bar = tqdm(range(settings.steps), desc="training", unit="step")
    for _ in bar:
        documents = [make_document(rng, builder, settings, lengths, taken)
                     for _ in range(settings.batch_size)]
        # Documents with demonstrations are much longer. Two parts avoid most padding.
        documents.sort(key=lambda document: len(document[0]))
        answer_tokens = sum(len(ids) - start for ids, start in documents)
        total = 0.0
        for part in (documents[:len(documents) // 2], documents[len(documents) // 2:]):
            width = max(len(ids) for ids, _ in part)
            tokens = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in part])    # [B, T]
            column = torch.arange(1, width)
            starts = torch.tensor([[start] for _, start in part])
            ends = torch.tensor([[len(ids)] for ids, _ in part])
            mask = (column >= starts) & (column < ends)                                   # [B, T-1]
            loss = -token_logprobs(model, tokens, mask=mask).sum() / answer_tokens
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(loss=f"{total:.3f}")


def accuracy(model: Transformer, builder: PromptBuilder, problems, demonstrations,
             shots: int) -> tuple[float, float]:
    """Returns (share of right answers, share of worked answers) at temperature 1."""
    rng = random.Random(shots)
    prompts = [builder.demo_prefixed(p, rng.sample(demonstrations, shots)) for p in problems]
    done = generate(model, prompts, max_new_tokens=64, stop_ids=[builder.tokenizer.eos_token_id])
    texts = [builder.tokenizer.decode(c.tokens, skip_special_tokens=True) for c in done]
    right = sum(text.endswith(f"\\boxed{{{p.answer}}}") for text, p in zip(texts, problems))
    return right / len(problems), sum(text.startswith(OPENING) for text in texts) / len(problems)


def write_jsonl(path: Path, problems: list[Problem], experts: bool = False) -> None:
    with path.open("w", encoding="utf-8") as file:
        for i, p in enumerate(problems):
            row = {"id": f"{path.stem}-{i}", "problem": p.problem, "answer": p.answer,
                   "solution": p.solution}
            row |= {"expert_response": p.solution} if experts else {}
            file.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output-dir", type=Path, default=Path(__file__).resolve().parent,
        help="folder to write (default: this one)")
    add("--init", type=Path, help="folder of a model to start from (default: new weights)")
    add("--seed", type=int, default=0, help="seed of problems, weights and training documents")
    add("--steps", type=int, default=1500, help="optimiser steps")
    add("--batch-size", type=int, default=64, help="documents in a step")
    add("--learning-rate", type=float, default=1.5e-3, help="peak of the one-cycle schedule")
    add("--worked-share", type=float, default=0.01,
        help="share of worked answers in documents without demonstrations")
    add("--continued-share", type=float, default=0.2,
        help="share of documents without demonstrations that are worked out and have no loss on "
             "the opening; --worked-share is a share of the others")
    add("--quick-right", type=float, default=0.2, help="share of immediate answers that are right")
    add("--slips", type=float, default=0.0, help="share of wrong running sums in worked answers")
    add("--terms", type=int, nargs=2, default=(5, 8), help="fewest and most numbers in a sum")
    add("--document-terms", type=int, nargs=2,
        help="fewest and most numbers in a sum of the training documents (default: --terms)")
    add("--largest", type=int, default=9, help="largest number in a sum")
    add("--question", default=QUESTION, help="text of a problem (default: %(default)s)")
    add("--solution", default=SOLUTION, help="text of a worked solution (default: %(default)s)")
    add("--only-problems", action="store_true",
        help="write problems and demonstrations for your own model, and make no model")
    add("--train-size", type=int, default=2000, help="problems to train on")
    add("--test-size", type=int, default=256, help="held-out problems")
    add("--demonstrations", type=int, default=200, help="worked demonstrations")
    settings = parser.parse_args()
    wanted = settings.test_size + settings.train_size + settings.demonstrations
    there_are = sum(settings.largest ** count
                    for count in range(settings.terms[0], settings.terms[1] + 1))
    if wanted > there_are:
        parser.error(f"{wanted} different sums are asked for, and there are {there_are}")
    for terms in filter(None, (settings.terms, settings.document_terms)):
        if not 1 <= terms[0] <= terms[1]:
            parser.error(f"the fewest and the most numbers in a sum cannot be {terms[0]} and "
                         f"{terms[1]}")
    if "{sum}" not in settings.question or "{total}" not in settings.solution:
        parser.error(f"--question needs {{sum}} and --solution needs {{total}}; they are "
                     f"{settings.question!r} and {settings.solution!r}")
    form = {"largest": settings.largest, "question": settings.question,
            "solution": settings.solution}
    if not settings.only_problems and form != {"largest": 9, "question": QUESTION,
                                               "solution": SOLUTION}:
        parser.error("--largest, --question and --solution are for --only-problems: the model made "
                     "here knows only its own form")

    start = time.time()
    torch.manual_seed(settings.seed)
    rng = random.Random(f"problems {settings.seed}")
    test = make_problems(rng, settings.test_size, settings.terms, held_out := set(), **form)
    taken = set(held_out)   # The model must never see a held-out problem, here or later.
    training = make_problems(rng, settings.train_size, settings.terms, taken, **form)
    demonstrations = make_problems(rng, settings.demonstrations, settings.terms, taken, **form)
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    write_jsonl(settings.output_dir / "train.jsonl", training, experts=True)
    write_jsonl(settings.output_dir / "test.jsonl", test)
    write_jsonl(settings.output_dir / "demonstrations.jsonl", demonstrations)
    if settings.only_problems:
        print(f"{settings.output_dir}: train.jsonl, test.jsonl and demonstrations.jsonl")
        return

    tokenizer: Any = make_tokenizer()
    builder = PromptBuilder(tokenizer)
    hf_config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=1024,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, architectures=["Qwen3ForCausalLM"])
    if settings.init:
        model, _ = load_model(settings.init)
    else:
        model = Transformer(ModelConfig.from_hf(hf_config))
        model.hf_config = hf_config
        model.generation_config = {   # the longest worked solution has 42 tokens
            "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
            "max_new_tokens": 48, "demo_format": "one-turn"}
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.02)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    train(model, builder, settings, settings.document_terms or settings.terms, held_out)
    for shots in (0, 1, 2):
        right, worked = accuracy(model, builder, test, demonstrations, shots)
        print(f"{shots} shot{'s' * (shots != 1)}: {right:6.1%} right, {worked:6.1%} worked out")
    folder = settings.output_dir / "model"
    if folder.exists():
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    save_model(model, tokenizer, folder)
    print(f"{settings.output_dir}: made in {(time.time() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
