"""Problems and demonstrations: which can be used, and which are drawn for a question.

A row of a data set has `problem`, `answer` (text, a number, or a list of either); `solution` in
demonstrations; `expert_response` for LUFFY; `id` is optional. rowforms.py lists other forms.
"""

import functools
import itertools
import random
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from datafiles import read_rows
from overlap import find_questions, normalise
from prompts import Problem, PromptBuilder


def load_problems(source: str | Path, needs: tuple[str, ...] = (),
                  **how: Any) -> list[Problem]:
    """The problems of a data set. needs, how and errors: see read_rows."""
    return [Problem(**row) for row in read_rows(str(source), needs, **how)]


class Demonstrations:
    """Draws k demonstrations at random for a question.

    A draw never contains the question itself, and its prompt never passes `max_prompt_length`
    tokens. Demonstrations with a link, or with a solution shorter than `min_chars`, are left out.
    `excluded` counts those by reason, `never_together` those that contain a question, for which
    they are not drawn. Raises ValueError if fewer than k are left.
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
        return [p for p in problems if self._shortest(p) is not None]

    @property
    def never_together(self) -> int:
        return len(set().union(*self.containing.values()))

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

    def row(self, advantage: float) -> "Row":
        return Row(array("i", self.question.prompt), array("i", self.tokens),
                   array("f", self.old_logprobs), self.off_policy, advantage)


class Row(NamedTuple):
    """What an update needs of a response, in arrays, which travel fast between processes."""
    prompt: array           # int
    tokens: array           # int
    old_logprobs: array     # float32
    off_policy: bool
    advantage: float


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
