"""Questions that occur in other texts: in a demonstration, or in another data set."""


def normalise(text: str) -> str:
    """The text without spaces and case, because a question that is reformatted is the same one."""
    return "".join(text.split()).casefold()


PREFIX = 32   # characters


def find_questions(questions: list[str], texts: list[str]) -> dict[str, set[int]]:
    """For each question that occurs in some text, the indices of those texts.

    It looks up every window of a text among the questions' first PREFIX characters, so the time
    grows with the length of the texts, not with texts times questions.
    """
    by_length: dict[int, dict[str, list[str]]] = {}
    for question in set(questions):
        head = question[:PREFIX]
        by_length.setdefault(len(head), {}).setdefault(head, []).append(question)
    found: dict[str, set[int]] = {}
    for index, text in enumerate(texts):
        for length, heads in by_length.items():
            for start in range(len(text) - length + 1):
                for question in heads.get(text[start:start + length], ()):
                    if text.startswith(question, start):
                        found.setdefault(question, set()).add(index)
    return found
