"""Problems, demonstrations, and the two prompts of the method: the plain question q and the demo-prefixed [D; q].

A data file is JSONL, one object a line: `problem`, `answer`, and where they are needed `solution` (of demonstrations)
and `expert_response` (for LUFFY); `id` is optional.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

INSTRUCTION = r"Let's think step by step and output the final answer within \boxed{}."
DEMO_SEPARATOR = "\n\n\n"


@dataclass(frozen=True)
class Problem:
    problem: str
    answer: str
    solution: str | None = None
    expert_response: str | None = None
    id: str = ""


def load_problems(path: str, needs: tuple[str, ...] = ()) -> list[Problem]:
    """Read a JSONL file. `needs` names the optional fields that every line must have here.

    Raises ValueError naming file and line for a line that is not an object, lacks a field or has one of the wrong type.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no data file at {path}")
    problems = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line.decode("utf-8"))
        except ValueError as error:   # JSON that does not parse, or bytes that are not UTF-8
            raise ValueError(f"{where}: not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}: a JSON object was expected, not {type(row).__name__}")
        fields = {}
        for name in ("problem", "answer", "solution", "expert_response", "id"):
            value = row.get(name)
            if name in ("answer", "id") and isinstance(value, (int, float)) and not isinstance(value, bool):
                value = str(value)
            if value is None and name not in ("problem", "answer", *needs):
                continue
            if not isinstance(value, str) or name != "id" and not value.strip():
                raise ValueError(f"{where}: field {name!r} must be text that is not empty, "
                                 + ("and is missing" if value is None else f"not {value!r}"))
            fields[name] = value
        fields.setdefault("id", f"{path.stem}-{number}")
        problems.append(Problem(**fields))
    if not problems:
        raise ValueError(f"{path} holds no problems")
    return problems


@dataclass(frozen=True)
class PromptBuilder:
    """Both prompts as token ids. `chat_template`: the tokenizer's template around the plain question;
    `demo_chat_template`: around [D; q] too, all of it in one user turn."""
    tokenizer: object
    instruction: str = INSTRUCTION
    chat_template: bool = True
    demo_chat_template: bool = True

    def __post_init__(self):
        if (self.chat_template or self.demo_chat_template) and not self.tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template; give --chat-template false --demo-chat-template false")

    def plain(self, problem: Problem) -> list[int]:
        return self._encode(self._question(problem), self.chat_template)

    def demo_prefixed(self, problem: Problem, demonstrations: list[Problem]) -> list[int]:
        """x_exp = [D; q] of (IEF); with no demonstrations it is the plain prompt."""
        if not demonstrations:
            return self.plain(problem)
        parts = [self._demonstration(d) for d in demonstrations]
        parts.append(f"Question: {self._question(problem)}\nAnswer:")
        return self._encode(DEMO_SEPARATOR.join(parts), self.demo_chat_template)

    def demonstration_length(self, demonstration: Problem) -> int:
        """Tokens that a demonstration takes."""
        return len(self._encode(self._demonstration(demonstration) + DEMO_SEPARATOR, chat_template=False))

    def _question(self, problem: Problem) -> str:
        return f"{problem.problem} {self.instruction}".strip()

    def _demonstration(self, demonstration: Problem) -> str:
        return f"Question: {self._question(demonstration)}\nAnswer: {demonstration.solution}"

    def _encode(self, text: str, chat_template: bool) -> list[int]:
        if not chat_template:
            return self.tokenizer.encode(text)
        text = self.tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False,
                                                  add_generation_prompt=True)
        return self.tokenizer.encode(text, add_special_tokens=False)


class Demonstrations:
    """Draws k demonstrations at random for a question, never one that contains the question itself, never so long that
    the prompt passes `max_prompt_length` tokens.

    Demonstrations with a link in them or a solution shorter than `min_chars` are left out at once. `excluded` counts
    every exclusion by its reason.
    """

    def __init__(self, pool: list[Problem], builder: PromptBuilder, k: int, max_prompt_length: int, min_chars: int = 0):
        self.builder, self.k, self.max_prompt_length = builder, k, max_prompt_length
        self.excluded = {"with a link": 0, f"shorter than {min_chars} characters": 0}
        self.pool = []
        for demonstration in pool:
            if "http" in demonstration.problem + demonstration.solution:
                self.excluded["with a link"] += 1
            elif len(demonstration.solution) < min_chars:
                self.excluded[f"shorter than {min_chars} characters"] += 1
            else:
                self.pool.append(demonstration)
        if len(self.pool) < k:
            raise ValueError(f"{k} demonstrations a prompt, but only {len(self.pool)} of {len(pool)} are usable "
                             f"(left out: {self.excluded})")
        lengths = [builder.demonstration_length(d) for d in self.pool]
        self.by_length = sorted(range(len(self.pool)), key=lengths.__getitem__)
        self.contain: dict[str, set[int]] = {}

    def admit(self, problems: list[Problem]) -> list[Problem]:
        """Those of `problems` for which k demonstrations fit, having noted which demonstrations contain each question.
        Call it before any `draw`."""
        found = _find_questions([normalise(p.problem) for p in problems],
                                [normalise(d.problem + "\0" + d.solution) for d in self.pool])
        self.contain.update(found)
        self.excluded["that contain the question (never drawn for it)"] = len(set().union(*self.contain.values()))
        return [p for p in problems if self._shortest(p) is not None]

    def draw(self, problem: Problem, rng: random.Random) -> tuple[list[Problem], list[int]]:
        """k demonstrations and the token ids of [D; q]. Raises ValueError where none fit; `admit` has told before."""
        containing = self._containing(problem)
        allowed = [i for i in range(len(self.pool)) if i not in containing]
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

    def _containing(self, problem: Problem) -> set[int]:
        return self.contain.get(normalise(problem.problem), set())

    def _shortest(self, problem: Problem) -> list[Problem] | None:
        """The k shortest demonstrations, if they fit."""
        allowed = (i for i in self.by_length if i not in self._containing(problem))
        chosen = [self.pool[i] for _, i in zip(range(self.k), allowed)]
        fits = len(chosen) == self.k and len(self.builder.demo_prefixed(problem, chosen)) <= self.max_prompt_length
        return chosen if fits else None


def normalise(text: str) -> str:
    """Without spaces and case: a question reformatted is the same question."""
    return "".join(text.split()).casefold()


def _find_questions(questions: list[str], texts: list[str], prefix: int = 32) -> dict[str, set[int]]:
    """For each question that stands in some text, the indices of those texts. Every window of a text is looked up among
    the questions' first `prefix` characters, so the time grows with the texts' length, not with texts x questions."""
    by_length: dict[int, dict[str, list[str]]] = {}
    for question in set(questions):
        head = question[:prefix]
        by_length.setdefault(len(head), {}).setdefault(head, []).append(question)
    found: dict[str, set[int]] = {}
    for index, text in enumerate(texts):
        for length, heads in by_length.items():
            for start in range(len(text) - length + 1):
                for question in heads.get(text[start:start + length], ()):
                    if text.startswith(question, start):
                        found.setdefault(question, set()).add(index)
    return found
