"""Problems, demonstrations, and the two prompts: the plain question q and the demo-prefixed [D; q].

A row of a data set has `problem`, `answer` (text, a number, or a list of either); `solution` in
demonstrations; `expert_response` for LUFFY; `id` is optional. rowforms.py lists other forms.
"""

import functools
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datafiles import Reading, read_rows
from options import INSTRUCTION
from overlap import find_questions, normalise
from stopping import StopStrings, check_stops, decode
from templates import check_ids, check_template, writes_date

DEMO_SEPARATOR = "\n\n\n"


@dataclass(frozen=True)
class Problem:
    problem: str
    answer: str
    solution: str | None = None
    expert_response: str | None = None
    id: str = ""
    other_answers: tuple[str, ...] = ()   # each is right, too


def load_problems(source: str | Path, needs: tuple[str, ...] = (),
                  **how: Any) -> list[Problem]:
    """The problems of a data set. needs and errors: see read_rows; how: fields of its Reading."""
    return [Problem(**row) for row in read_rows(str(source), needs, Reading(**how))]


# --------------------------------------------------------------------------------------------------
# Prompts

@dataclass(frozen=True)
class PromptBuilder:
    """Makes both prompts as token ids.

    instruction: text that ends every question. chat_template: put the tokenizer's template around
    the plain question. demo_format: how [D; q] is written: "turns", each demonstration a user's and
    an assistant's turn of the template; "one-turn", all in one user turn; "text", no template.
    vocab_size: that of the model. system: text of a system turn where the template is; empty is no
    such turn. template_args: further arguments of the template. stop: stop strings of every
    response; None is DEMO_SEPARATOR for responses to raw text, and none for others. Raises
    ValueError for a template that is missing, fails, does not end or leaves out the question, for a
    stop string that can never occur, and for a token id beyond the vocabulary.
    """
    tokenizer: Any
    instruction: str = INSTRUCTION
    chat_template: bool = True
    demo_format: str = "one-turn"
    vocab_size: int | None = None
    system: str = ""
    template_args: dict[str, Any] = field(default_factory=dict)
    stop: tuple[str, ...] | None = None

    def __post_init__(self):
        check_stops(self.tokenizer, self.stop or ())
        if self.chat_template or self.demo_format != "text":
            check_template(self.tokenizer, self._in_turns, self.demo_format == "turns")

    def plain(self, problem: Problem) -> list[int]:
        """q, the prompt on which the objective conditions every response."""
        return self._encode(self._question(problem), self.chat_template)

    def demo_prefixed(self, problem: Problem, demonstrations: list[Problem]) -> list[int]:
        """(IEF) x_exp = [D; q], the prompt of π^IEF. Without demonstrations it is the plain one."""
        if not demonstrations:
            return self.plain(problem)
        if self.demo_format == "turns":
            turns = [text for d in demonstrations for text in (self._question(d), d.solution or "")]
            return self._known(self.tokenizer.encode(
                self._in_turns([*turns, self._question(problem)]), add_special_tokens=False))
        parts = [self._demonstration(d) for d in demonstrations]
        parts.append(f"Question: {self._question(problem)}\nAnswer:")
        return self._encode(DEMO_SEPARATOR.join(parts), self.demo_format == "one-turn")

    def expert_response(self, problem: Problem) -> list[int]:
        """The response that LUFFY reads from the data, ended as a sampled one ends.

        Where the prompt ends in <think>, the response does not begin with it again.
        """
        text, prompt = problem.expert_response or "", self.tokenizer.decode(self.plain(problem))
        if prompt.rstrip().endswith("<think>") and text.startswith("<think>"):
            text = text.removeprefix("<think>")
            text = text.removeprefix("\n") if prompt.endswith("\n") else text
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        return self._known(tokens + [self.tokenizer.eos_token_id])

    @functools.cached_property
    def stop_at(self) -> list[StopStrings | None]:
        """What ends responses, beside the stop ids: [to q, to [D; q]]. See `generate`."""
        raw = (not self.chat_template, self.demo_format == "text")
        strings = [(DEMO_SEPARATOR,) * each if self.stop is None else self.stop for each in raw]
        return [StopStrings(self.tokenizer, each) if each else None for each in strings]

    def response_text(self, tokens: list[int], stop_ids: Sequence[int],
                      stop_at: StopStrings | None = None) -> str:
        """What the model wrote, without the stop id or the stop string that ended it."""
        ended = bool(tokens) and tokens[-1] in (*stop_ids, self.tokenizer.eos_token_id)
        text = decode(self.tokenizer, tokens[:-1] if ended else tokens)
        return stop_at.before(text) if stop_at else text

    def demonstration_length(self, demonstration: Problem) -> int:
        """The number of tokens that a demonstration takes."""
        return len(self._encode(self._demonstration(demonstration) + DEMO_SEPARATOR, False))

    def _question(self, problem: Problem) -> str:
        return f"{problem.problem} {self.instruction}".strip()

    def _demonstration(self, demonstration: Problem) -> str:
        return f"Question: {self._question(demonstration)}\nAnswer: {demonstration.solution}"

    def _encode(self, text: str, chat_template: bool) -> list[int]:
        if not chat_template:
            return self._known(self.tokenizer.encode(text))
        return self._known(self.tokenizer.encode(self._in_turns([text]), add_special_tokens=False))

    def _known(self, tokens: list[int]) -> list[int]:
        return check_ids(tokens, self.tokenizer, self.vocab_size)

    def _in_turns(self, texts: Sequence[str]) -> str:
        """The texts as turns of the chat template, the user's and the assistant's by turns."""
        turns = [{"role": "system", "content": self.system}] if self.system else []
        turns += [{"role": role, "content": text}
                  for role, text in zip(itertools.cycle(("user", "assistant")), texts)]
        return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True,
                                                  **self.template_args)

    def depends_on_date(self) -> bool:
        """Whether the template writes today's date, so that prompts change from day to day."""
        return self.chat_template and writes_date(self.tokenizer, self._in_turns)


class Demonstrations:
    """Draws k demonstrations at random for a question.

    A draw never contains the question itself, and its prompt never passes `max_prompt_length`
    tokens. Demonstrations with a link, or with a solution shorter than `min_chars`, are left out.
    `excluded` counts those, and those never drawn for some question, by reason. Raises ValueError
    if fewer than k are left.
    """

    def __init__(self, pool: list[Problem], builder: PromptBuilder, k: int, max_prompt_length: int,
                 min_chars: int = 0):
        self.builder, self.k, self.max_prompt_length = builder, k, max_prompt_length
        short = f"shorter than {min_chars} characters"
        self.excluded = {"with a link": 0, short: 0}
        self.pool: list[Problem] = []
        for demonstration in pool:
            solution = demonstration.solution or ""
            if "http" in demonstration.problem + solution:
                self.excluded["with a link"] += 1
            elif len(solution) < min_chars:
                self.excluded[short] += 1
            else:
                self.pool.append(demonstration)
        if len(self.pool) < k:
            raise ValueError(f"{k} demonstrations a prompt, but only {len(self.pool)} of "
                             f"{len(pool)} are usable (left out: {self.excluded})")
        lengths = [builder.demonstration_length(d) for d in self.pool]
        self.by_length = sorted(range(len(self.pool)), key=lengths.__getitem__)
        # Each admitted question, normalised, to the indices of the demonstrations that contain it.
        self.containing: dict[str, set[int]] = {}

    def admit(self, problems: list[Problem]) -> list[Problem]:
        """Finds the demonstrations that contain each question; `draw` needs this first.

        Returns the problems for which k demonstrations fit.
        """
        questions = [normalise(p.problem) for p in problems]
        found = find_questions(questions, [normalise(f"{d.problem}\0{d.solution}")
                                            for d in self.pool])
        self.containing |= {question: found.get(question, set()) for question in questions}
        self.excluded["that contain the question (never drawn for it)"] = len(
            set().union(*self.containing.values()))
        return [p for p in problems if self._shortest(p) is not None]

    def draw(self, problem: Problem, rng: random.Random) -> tuple[list[Problem], list[int]]:
        """Returns k random demonstrations and the token ids of [D; q].

        After 20 draws that are too long it takes the k shortest. Raises ValueError for a problem
        that `admit` was not given or did not return.
        """
        question = normalise(problem.problem)
        if question not in self.containing:
            raise ValueError(f"problem {problem.id!r} was not given to admit(), which finds the "
                             f"demonstrations that contain it: call admit([problem]) first")
        allowed = [i for i in range(len(self.pool)) if i not in self.containing[question]]
        for _ in range(20):
            chosen = [self.pool[i] for i in rng.sample(allowed, self.k)]
            prompt = self.builder.demo_prefixed(problem, chosen)
            if len(prompt) <= self.max_prompt_length:
                return chosen, prompt
        chosen = self._shortest(problem)
        if chosen is None:
            raise ValueError(f"no {self.k} demonstrations leave room for problem {problem.id!r} "
                             f"in {self.max_prompt_length} tokens")
        return chosen, self.builder.demo_prefixed(problem, chosen)

    def _shortest(self, problem: Problem) -> list[Problem] | None:
        """The k shortest demonstrations, if they fit."""
        containing = self.containing[normalise(problem.problem)]
        allowed = (i for i in self.by_length if i not in containing)
        chosen = [self.pool[i] for i in itertools.islice(allowed, self.k)]
        prompt = self.builder.demo_prefixed(problem, chosen)
        fits = len(chosen) == self.k and len(prompt) <= self.max_prompt_length
        return chosen if fits else None


# --------------------------------------------------------------------------------------------------
# A question of a batch, and what is sampled for it

@dataclass(eq=False)
class Question:
    index: int                      # its place in the batch; it numbers the group
    problem: Problem
    prompt: list[int]               # q
    demos: list[tuple[list[Problem], list[int]]]   # N_off times D and [D; q], or none


@dataclass(eq=False)
class Response:
    """The objective conditions it on question.prompt; behaviour_prompt, q or [D; q], sampled it."""
    question: Question
    off_policy: bool
    behaviour_prompt: list[int]
    tokens: list[int]
    old_logprobs: list[float]       # of the behaviour policy; 0 for a data set's response
    finished: bool
    text: str
    reward: float | None = None     # R(τ), once it is scored
    # Its tokens as they were sampled, see stopping.end_response; none for a data set's response.
    sampled: list[int] = field(default_factory=list)


# --------------------------------------------------------------------------------------------------
# Which problems can be used, for training and evaluation alike

def keep(problems: list[Problem], name: str, reason: str, test: Callable[[Problem], bool],
         left_out: list[str], remedy: str = "") -> list[Problem]:
    """The problems that pass `test`; what is left out is counted in a line added to `left_out`.

    name and reason are for the messages: "training problems", "with a prompt over 512 tokens".
    Raises ValueError, with the remedy, if none are left.
    """
    kept = [problem for problem in problems if test(problem)]
    if len(kept) < len(problems):
        count = f"{len(problems) - len(kept)} of {len(problems)}"
        left_out.append(f"left out: {count} {name} {reason}")
    if not kept:
        raise ValueError(f"no {name} are left: all {len(problems)} were left out as {name} "
                         f"{reason}{remedy}")
    return kept


def keep_askable(problems: list[Problem], name: str, builder: PromptBuilder, limit: int,
                 left_out: list[str], *pools: Demonstrations) -> list[Problem]:
    """The problems whose plain prompt fits in `limit` tokens, and [D; q] in each pool's own limit.

    They are admitted to the pools. Arguments and errors: see `keep`.
    """
    problems = keep(problems, name, f"with a prompt over {limit} tokens",
                    lambda p: len(builder.plain(p)) <= limit, left_out,
                    "; raise --max-prompt-length or, in eval.py, lower --max-new-tokens")
    for pool in pools:
        problems = keep_admitted(problems, name, pool, left_out)
    return problems


def keep_admitted(problems: list[Problem], name: str, pool: Demonstrations,
                  left_out: list[str]) -> list[Problem]:
    """Admits the problems to the pool; returns those for which k demonstrations fit. See `keep`."""
    admitted = {id(p) for p in pool.admit(problems)}
    return keep(problems, name, f"that leave no room for {pool.k} demonstrations in "
                f"{pool.max_prompt_length} tokens", lambda p: id(p) in admitted, left_out,
                "; raise --max-prompt-length, or lower --num-demonstrations (in eval.py --shots)")


@functools.lru_cache(maxsize=2)   # a batch may reach into the next epoch
def epoch_order(seed: int, epoch: int, count: int) -> list[int]:
    """The order in which an epoch of a run goes through `count` problems."""
    return random.Random(f"order {seed} {epoch}").sample(range(count), count)
