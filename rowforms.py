"""The rows of public data sets as the fields of a problem. A row's columns say what form it has.

| form | columns | what is taken from them |
|---|---|---|
| verl | `prompt`, `reward_model` | last user turn; ground truth; `target`, the expert response |
| GPQA | `Question`, `Correct Answer`, … | options in an order of the seed; letter |
| choices | `question`, `choices` or `options`, key | options; letter |
| OlympiadBench | `question`, `final_answer` | a list of answers |
| GSM8K | `question`, `answer` with `####` | solution, also as expert response; number |
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


def to_fields(row: Mapping[str, Any], answer_format: str, seed: int) -> dict[str, Any]:
    """The problem, answer, solution, expert_response and id of a row, as far as it has them.

    seed: of the order of GPQA's options. Values are not checked. Raises ValueError for choices that
    do not fit together.
    """
    if "prompt" in row and isinstance(row.get("reward_model"), Mapping):
        return _verl(row)
    if "Question" in row and "Correct Answer" in row:
        return _gpqa(row, seed)
    choices = row.get("choices") or row.get("options")
    if "question" in row and choices:
        return _choices(row, choices)
    if "question" in row and row.get("final_answer"):
        solution = row.get("solution")
        solution = solution[0] if isinstance(solution, list) and solution else solution
        return {"problem": row["question"], "answer": row["final_answer"], "solution": solution,
                "id": row.get("id")}
    if "question" in row and "####" in str(row.get("answer")):
        return _gsm8k(row, answer_format)
    fields = {name: row.get(name) for name in ("problem", "answer", "solution", "expert_response")}
    if fields["problem"] is None:
        fields["problem"] = row.get("question")
    if fields["answer"] is None and isinstance(fields["solution"], str):
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


def _gsm8k(row: Mapping[str, Any], answer_format: str) -> dict[str, Any]:
    worked, _, answer = re.sub(r"<<[^<>]*>>", "", row["answer"]).rpartition("####")
    answer = answer.strip().replace(",", "")
    solution = f"{worked.strip()}\n{_ENDING[answer_format] % answer}"
    return {"problem": row["question"], "answer": answer, "solution": solution,
            "expert_response": solution}


def _gpqa(row: Mapping[str, Any], seed: int) -> dict[str, Any]:
    right = str(row["Correct Answer"]).strip()
    options = [right] + [str(row[f"Incorrect Answer {n}"]).strip() for n in (1, 2, 3)]
    # The order depends on the question, so that it is the same in any part of the data set.
    random.Random(f"options {seed} {row['Question']}").shuffle(options)
    return {"problem": _with_options(str(row["Question"]).strip(), options),
            "answer": LETTERS[options.index(right)], "id": row.get("Record ID")}


def _choices(row: Mapping[str, Any], choices: Any) -> dict[str, Any]:
    """Choices are a list, or ARC's {text: list, label: list}; the key is a label, or a place."""
    texts, labels = choices, None
    if isinstance(choices, Mapping):
        texts, labels = choices.get("text"), choices.get("label")
    labels = [str(label) for label in labels or LETTERS[:len(texts or ())]]
    key = str(row.get("answerKey", row.get("answer")))
    place = labels.index(key) if key in labels else int(key) if key.isdecimal() else -1
    if not isinstance(texts, list) or not 0 <= place < len(texts) <= len(LETTERS):
        raise ValueError(f"the answer {key!r} is none of the choices {labels}")
    name = next((row[name] for name in ("id", "question_id") if row.get(name) is not None), None)
    return {"problem": _with_options(row["question"], texts), "answer": LETTERS[place],
            "id": str(name) if name is not None else None}


def _with_options(question: str, options: list[str]) -> str:
    return "\n".join([question, *(f"{letter}. {option}"
                                  for letter, option in zip(LETTERS, options, strict=False)),
                      "Answer with the letter of the right option."])
