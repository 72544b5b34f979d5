"""Chat templates are programs of a tokenizer: whether one works, and whether it writes the date."""

import re
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from verify import run_bounded

Render = Callable[[Sequence[str]], str]   # texts, the user's and the assistant's by turns -> prompt


def check_template(tokenizer: Any, render: Render, answered: bool, system: str) -> None:
    """Raises ValueError for a template that is missing, fails, does not end or leaves out a text.

    answered: the prompts hold turns of the assistant too. system: the system turn, which `render`
    puts first, or nothing.
    """
    turns = ["What is 2+3?", "It is 5."] * answered + ["What is 1+1?"]
    problem = "" if tokenizer.chat_template else "is missing"
    instead = "give --chat-template false --demo-format text"
    if not problem:
        try:
            shown = run_bounded(lambda: render(turns))
            lacks = [text for text in turns if text not in shown]
            if lacks:
                problem = f"leaves out {'the question' if turns[-1] in lacks else 'a turn'}"
            elif system.strip() not in shown:
                problem, instead = "leaves out the text of --system", "leave that option out"
        except Exception as error:
            problem = f"fails ({error})"
    if problem:
        raise ValueError(f"the tokenizer's chat template {problem}; {instead}")


def writes_date(tokenizer: Any, render: Render) -> bool:
    """Whether the template writes today's date, so that prompts change from day to day."""
    forms = re.findall(r"strftime_now\(\s*['\"](.+?)['\"]", str(tokenizer.chat_template))
    return any(datetime.now().strftime(form) in render(["1+1"]) for form in forms)


def check_ids(tokens: list[int], tokenizer: Any, vocab_size: int | None) -> list[int]:
    """Returns the tokens. Raises ValueError for one beyond the model's vocabulary."""
    if vocab_size and max(tokens, default=0) >= vocab_size:
        name = tokenizer.convert_ids_to_tokens(max(tokens))
        raise ValueError(f"the tokenizer makes the token {name!r}, {max(tokens)}, but the model's "
                         f"vocabulary has {vocab_size} tokens: give the model its own tokenizer, "
                         f"or resize its embeddings")
    return tokens
