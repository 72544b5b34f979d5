"""A problem, and its two prompts: the plain question q and the demo-prefixed [D; q]."""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from options import INSTRUCTION
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


@dataclass(frozen=True)
class PromptBuilder:
    """Makes both prompts as token ids.

    instruction: text that ends every question. chat_template: put the tokenizer's template around
    the plain question. demo_format: how [D; q] is written: "turns", each demonstration a user's and
    an assistant's turn of the template; "one-turn", all in one user turn; "text", no template;
    prepare.make_builder chooses one for a model. vocab_size: that of the model. system: text of a
    system turn where the template is; empty is no such turn. template_args: further arguments of
    the template. stop: stop strings of every response; None is DEMO_SEPARATOR for responses to raw
    text, and none for others. Raises ValueError for a template that is missing, fails, does not end
    or leaves out the question, for a stop string that can never occur, and for a token id beyond
    the vocabulary.
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
            check_template(self.tokenizer, self._in_turns, self.demo_format == "turns",
                           self.system)

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
        """Whether a template writes today's date, so that prompts change from day to day."""
        templated = self.chat_template or self.demo_format != "text"
        return templated and writes_date(self.tokenizer, self._in_turns)
