r"""Finds the last \boxed{…} of a text."""

import re

_BOX = re.compile(r"\\f?box(?:ed)?(?![a-zA-Z])\s*")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
_UNBRACED = re.compile(r"(?:[^\s${}]|\{[^\s${}]*\})+")


def last_box(text: str) -> str | None:
    r"""The content of the last \boxed{…} or \fbox{…} with balanced braces.

    Of \boxed 5, it is the text up to a space, $ or unmatched brace, without a final .,; behind it.
    None if there is no box, or if the last one is not closed.
    """
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    box = _BOX.match(text, start) if start >= 0 else None
    if not box:
        return None
    if not text.startswith("{", box.end()):
        content = _UNBRACED.match(text, box.end())
        return content[0].rstrip(".,;") if content else None
    depth = 0
    for brace in _BRACES.finditer(text, box.end()):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)   # \{ and \} do not count
        if depth == 0:
            return text[box.end() + 1:brace.start()].strip()
    return None
