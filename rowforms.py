"""The rows of public data sets as the fields of a problem. A row's columns say what form it has.

| form | columns | what is taken from them |
|---|---|---|
| verl | `prompt`, `reward_model` | last user turn; ground truth; `target`, the expert response |
| GPQA | `Question`, `Correct Answer`, … | options in an order of the seed; letter |
| choices | `question`, `choices` or `options`, key | options; letter |
| OlympiadBench | `question`, `final_answer` | a list of answers |
| GSM8K | …, `answer` with `####` | solution, also as expert response; number |
| plain | `problem` or `question`, … | as it is; without `answer`, the last box |
"""

import random
import re
from collections.abc import Mapping
from typing import Any

from answers import last_box

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_ENDING = {"boxed": r"The final answer is \boxed{%s}.", "gsm8k": "#### %s",
           "tags": "<answer>%s</answer>"}   # --answer-format: how a solution ends


def to_fields(row: Mapping[str, Any], answer_format: str, seed: int,
              given: dict[str, Any] | None = None) -> dict[str, Any]:
    """The problem, answer, solution, expert_response and id of a row, as far as it has them.

    seed: of the order of GPQA's options. given: fields that --columns names. Values are not
    checked. Raises ValueError for choices that do not fit together.
    """
    given = given or {}
    if "prompt" in row and isinstance(row.get("reward_model"), Mapping):
        return _verl(row) | given
    if "Question" in row and "Correct Answer" in row:
        return _gpqa(row, seed) | given
    row = {**row, **given}
    question = given.get("problem", row.get("question"))
    more = {name: value for name, value in given.items() if name not in ("problem", "answer")}
    choices = row.get("choices") or row.get("options")
    if question is not None and choices:
        key = row["answer"] if "answer" in given else row.get("answerKey", row.get("answer"))
        try:
            return _choices(row, question, choices, key) | more
        except ValueError:
            if "problem" not in given:   # else the column may be something else
                raise
    if question is not None and row.get("final_answer") and (
            "question" in row or "answer" not in row):
        solution = row.get("solution")
        solution = solution[0] if isinstance(solution, list) and solution else solution
        return {"problem": question, "answer": row["final_answer"], "solution": solution,
                "id": row.get("id")} | given
    fields = {name: row.get(name) for name in ("problem", "answer", "solution", "expert_response")}
    if fields["problem"] is None:
        fields["problem"] = question
    if isinstance(fields["answer"], str) and "####" in fields["answer"]:
        own = {name: row[name] for name in ("solution", "expert_response", "id") if row.get(name)}
        return _gsm8k(fields["problem"], fields["answer"], answer_format) | own | more
    if fields["answer"] in (None, "") and isinstance(fields["solution"], str):
        fields["answer"] = last_box(fields["solution"])
    return fields | {"id": row.get("id", row.get("unique_id"))}


def _verl(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row's own system turn is not used: --system gives one to every prompt."""
    turns = row["prompt"]
    if isinstance(turns, list):   # of {role, content}
        turns = next((turn["content"] for turn in reversed(turns) if turn["role"] == "user"), None)
    fields = {"problem": turns, "answer": row["reward_model"].get("ground_truth")}
    target = row.get("target")
    if isinstance(target, list) and target:
        target = target[0]["content"]
    return fields | {"expert_response": target or None}


def _gsm8k(problem: Any, answer: str, answer_format: str) -> dict[str, Any]:
    worked, _, answer = re.sub(r"<<[^<>]*>>", "", answer).rpartition("####")
    answer = answer.strip().replace(",", "")
    solution = f"{worked.strip()}\n{_ENDING[answer_format] % answer}"
    return {"problem": problem, "answer": answer, "solution": solution,
            "expert_response": solution}


def _gpqa(row: Mapping[str, Any], seed: int) -> dict[str, Any]:
    right = str(row["Correct Answer"]).strip()
    options = [right] + [str(row[f"Incorrect Answer {n}"]).strip() for n in (1, 2, 3)]
    # The order depends on the question, so that it is the same in any part of the data set.
    random.Random(f"options {seed} {row['Question']}").shuffle(options)
    return {"problem": _with_options(str(row["Question"]).strip(), options),
            "answer": LETTERS[options.index(right)], "id": row.get("Record ID")}


def _choices(row: Mapping[str, Any], question: str, choices: Any, key: Any) -> dict[str, Any]:
    """Choices are a list of texts or of {text, label}, ARC's {text: list, label: list}, or
    {label: text}; the key is a label, the text of an option, or a place from 0 on."""
    if isinstance(choices, Mapping) and "text" not in choices:
        there = {label: text for label, text in choices.items() if text is not None}
        choices = {"text": list(there.values()), "label": list(there)}
    elif isinstance(choices, list) and all(isinstance(each, Mapping) for each in choices):
        choices = {name: [each.get(name) for each in choices] for name in ("text", "label")}
    texts, labels = choices, None
    if isinstance(choices, Mapping):
        texts, labels = choices["text"], choices.get("label")
    if not isinstance(texts, list) or not all(isinstance(each, str | int | float)
                                              for each in texts):
        raise ValueError(f"the choices {choices!r} are no list of texts")
    texts = [str(text).strip() for text in texts]
    if not labels or None in labels:
        labels = LETTERS[:len(texts)]
    labels = [str(label) for label in labels]
    name = str(key).strip()
    bare = name.strip("(). ").upper()   # as in (b)
    if name in labels:
        place = labels.index(name)
    elif type(key) is str and name in texts:   # a number of the file, as MMLU has, is a place
        place = texts.index(name)
    else:
        place = labels.index(bare) if bare in labels else int(name) if name.isdecimal() else -1
    if not 0 <= place < len(texts) <= len(LETTERS):
        raise ValueError(f"the answer {name!r} is none of the choices {labels}")
    own = next((row[each] for each in ("id", "question_id") if row.get(each) is not None), None)
    # Other columns of these names, such as the place of the right option, are no worked solutions.
    worked = {each: row[each] for each in ("solution", "expert_response")
              if type(row.get(each)) is str and row[each].strip() not in ("", name)}
    return {"problem": _with_options(question, texts), "answer": LETTERS[place],
            "id": str(own) if own is not None else None} | worked


def _with_options(question: str, options: list[str]) -> str:
    return "\n".join([question, *(f"{letter}. {option}"
                                  for letter, option in zip(LETTERS, options, strict=False)),
                      "Answer with the letter of the right option."])
