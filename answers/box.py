r"""Finds the last \boxed{…} of a text."""

import re

_BOX = re.compile(r"\\f?box(?:ed)?(?![a-zA-Z])\s*")
_START = re.compile(r"\\(?:boxed|fbox)")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
_UNBRACED = re.compile(r"(?:[^\s${}]|\{[^\s${}]*\})+")


def last_box(text: str) -> str | None:
    r"""The content of the last \boxed{…} or \fbox{…} with balanced braces.

    Of \boxed 5, it is the text up to a space, $ or unmatched brace, without a final .,; behind it.
    An empty box, as in "put it in \boxed{}", does not count. None if there is no other box, or if
    the last one is not closed.
    """
    for found in reversed(list(_START.finditer(text))):
        box = _BOX.match(text, found.start())
        if not box:
            return None
        if not text.startswith("{", box.end()):
            content = _UNBRACED.match(text, box.end())
            return content[0].rstrip(".,;") if content else None
        depth, content = 0, None
        for brace in _BRACES.finditer(text, box.end()):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)   # \{ and \} do not count
            if depth == 0:
                content = text[box.end() + 1:brace.start()].strip()
                break
        if content != "":
            return content
    return None
