r"""Reads an expression in LaTeX or plain text, and writes it so that it has one meaning only.

    rewrite("3sqrt(13)")           # 3\cdot\sqrt{13}
    rewrite(r"\sin 2x\cos x")      # \sin(2\cdot x)\cdot\cos(x)
    rewrite("1/2x")                # None, because it may mean two things

The parser behind algebra.py would take d x for a differential, I for the imaginary unit, \gamma(x)
for a function, and 3\frac12 for a product. So all products are written out, decimals become
fractions, and names other than plain letters become q_{number}.
"""

import functools
import re
import zlib
from typing import NamedTuple

FUNCTIONS = set(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log lg exp".split())
GREEK = set("alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda "
            "mu nu xi rho sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi "
            "Pi Sigma Upsilon Phi Psi Omega ell hbar".split())
SYMBOL = (r"(?:[a-zA-Z]|\\(?:" + "|".join(sorted(GREEK)) + r")(?![a-zA-Z])"
          r"|\\(?:vec|hat|bar|overline|dot|ddot|tilde|mathbf|mathit|mathcal)\s*"
          r"(?:\{[^{}]*\}|[a-zA-Z]))"
          r"(?:\s*_\s*(?:\{(?:[^{}]|\{[^{}]*\})*\}|[0-9a-zA-Z]|\\[a-z]+))?'*")
_PLAIN = re.compile(r"(?<![\\a-zA-Z])(pi|sqrt|" + "|".join(sorted(
    FUNCTIONS | GREEK - {"Pi", "ell", "nu", "mu", "xi", "eta"}, key=len, reverse=True))
    + r")(?![a-zA-Z])")
_TOKEN = re.compile(
    r"\s*(?:(?P<number>[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
    r"|(?P<function>\\(?:" + "|".join(sorted(FUNCTIONS, key=len, reverse=True)) + r")(?![a-zA-Z]))"
    r"|(?P<degree>\^\\circ)"
    r"|(?P<command>\\(?:frac|sqrt|binom|pi|cdot|times|div|[lr](?:floor|ceil|vert))(?![a-zA-Z]))"
    rf"|(?P<symbol>{SYMBOL})|(?P<sign>[-+*/^_(){{}}\[\]|!]))")
_WORD = re.compile(r"[a-zA-Z]{4}|(?<![a-zA-Z])(?:ln|lg|log|exp|sin|cos|tan|pi)[a-zA-Z]"
                   r"|(?<![_^])[a-zA-Z](?![0-9.]+\s*\^)[0-9]")   # CO2 is not C2O
_DERIVATIVE = re.compile(   # \\frac{dy}{dx} is no fraction of products
    r"\\frac\s*\{\s*(?:d|\\Delta|\\partial)(?![a-zA-Z]{3})[^{}]*(?:\{[^{}]*\}[^{}]*)*\}"
    r"\s*\{\s*(?:d|\\Delta|\\partial)\s*[a-zA-Z\\]")
_FUNCTIONAL = re.compile(r"f|\\(?:Gamma|zeta|phi|varphi)|.*'")   # f(2x) is not 2f(x)
GROUPED = r"[1-9][0-9]{0,2}(?:,[0-9]{3})+"   # 1,234; 0,123 is no 123
THOUSANDS = re.compile(rf"(?<![0-9.,]){GROUPED}(?![0-9]|,[0-9])")
_CLOSING = {"(": ")", "[": "]", "{": "}", "|": "|", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil",
            r"\lvert": r"\rvert"}
_DEGREE = r"\cdot\frac{\pi}{180}"


class _Unclear(Exception):
    """The text is no expression, or may mean several things."""


class _Item(NamedTuple):
    kind: str        # number, symbol, group, fraction, factorial, power, function, call or sign
    text: str
    whole: int = 0   # of a fraction of whole numbers: -1 if it is above 1, else 1


@functools.lru_cache(maxsize=4096)
def rewrite(text: str) -> str | None:
    """The expression, written in one way; None for what is not understood."""
    text = THOUSANDS.sub(lambda match: match[0].replace(",", ""), text.replace("**", "^"))
    text = _PLAIN.sub(r"\\\1", text)
    bare = re.sub(r"\\(?:frac|binom) ?[a-zA-Z](?=[0-9])|\\[a-zA-Z]+|_\s*\{[^{}]*\}", " ", text)
    if _WORD.search(bare) or _DERIVATIVE.search(text):
        return None
    tokens, place = [], 0
    while place < len(text.rstrip()):
        token = _TOKEN.match(text, place)
        if token is None:
            return None
        tokens.append((str(token.lastgroup), token[0].strip()))
        place = token.end()
    tokens.reverse()   # the next one is popped from the end
    try:
        return _join(_items(tokens, ""))
    except (_Unclear, RecursionError):
        return None


def has_letters(expression: str) -> bool:
    """Whether an expression that `rewrite` returned has a variable."""
    return bool(re.search(r"(?<![\\a-zA-Z])[a-zA-Z](?![a-zA-Z])", re.sub(r"\\[a-zA-Z]+", " ",
                                                                        expression)))


_BRACKETED = re.compile(r"(?<![\w!)}])\(-?([0-9]+)\)(?![!^])")
_PLAIN_NUMBER = re.compile(   # 2\frac12 is (2+\frac{1}{2}) here
    r"\([0-9]+\+\\frac\{[0-9]+\}\{[0-9]+\}\)|\\frac\{-?[0-9]+\}\{-?[0-9]+\}"
    r"|(?<![\w^/])[0-9]+/[0-9]+(?![\w^!/])")
_INNERMOST = re.compile(r"[({\[]([^(){}\[\]]*)[)}\]]")
_BARS = re.compile(r"\||\\[lr](?:floor|ceil|vert)")


def left_undone(expression: str) -> bool:
    r"""Whether an expression from `rewrite` has a sum, product or quotient of plain numbers.

    A fraction, and an operand of !, ^ or a function, is no part of one: 2^{80}+1, 2\cdot 3! and
    \frac{9!}{2} are as far as they go.
    """
    text = _BRACKETED.sub(r"\1", _BARS.sub("", expression).replace(" ", ""))
    text = _PLAIN_NUMBER.sub("1", text)
    while inside := _INNERMOST.search(text):
        if _undone(inside[1]):
            return True
        plain = inside[0][0] == "(" and re.fullmatch("-?[0-9]+", inside[1])
        text = text[:inside.start()] + ("1" if plain else "x") + text[inside.end():]
    return _undone(text)


def _undone(flat: str) -> bool:
    terms = re.split("[-+]", flat)
    return sum(term.isdigit() for term in terms) > 1 or any(
        sum(factor.isdigit() for factor in re.split(r"\\cdot|/", term)) > 1 for term in terms)


def _items(tokens: list, closing: str) -> list[_Item]:
    """The items up to the closing bracket, which is taken too."""
    items: list[_Item] = []
    while tokens:
        kind, text = tokens.pop()
        if text == closing:
            return items
        before = items[-1] if items else _Item("sign", "")
        if kind == "number":
            if before.kind == "number" or text[0] == "." and before.kind != "sign":
                raise _Unclear
            items.append(_Item("number", _number(text)))
        elif kind == "symbol":
            # s(t) is not st, but a(2)^n is a product.
            called = len(tokens) > 2 and tokens[-3][1] == ")" and (
                tokens[-2][0] == "symbol" or tokens[-2][0] == "number" and (
                    len(tokens) < 4 or tokens[-4][1] != "^"))
            if tokens and tokens[-1][1] == "(" and (called or _FUNCTIONAL.fullmatch(text)):
                tokens.pop()
                text += f"({_join(_items(tokens, ')'))})"
            items.append(_Item("symbol", _name(text)))
        elif kind == "function":
            items.append(_Item("function", text))
        elif text == r"\pi":
            items.append(_Item("symbol", r"\pi"))
        elif text == r"\frac":
            items.append(_fraction(tokens))
        elif text == r"\binom":
            items.append(_Item("group", rf"\binom{{{_argument(tokens)}}}{{{_argument(tokens)}}}"))
        elif text == r"\sqrt":
            items.append(_Item("group", _root(tokens)))
        elif kind == "degree":
            items[-1:] = [_Item("group", f"({_value(before)}{_DEGREE})")]
        elif text == "^":
            power = _power(tokens)
            if before.kind == "function":
                items[-1] = before._replace(text=f"{before.text}^{{{power}}}")
            elif before.kind == "power":
                raise _Unclear   # 2^3^2
            else:
                items[-1:] = [_Item("power", f"{_value(before)}^{{{power}}}")]
        elif text == "!":
            if before.kind == "factorial":
                raise _Unclear
            items[-1:] = [_Item("factorial", f"({_value(before)}!)")]
        elif text == "_":
            if before.text != r"\log":
                raise _Unclear
            items[-1] = before._replace(text=rf"\log_{{{_argument(tokens)}}}")
        elif text in _CLOSING and (text != "{" or before.kind in ("sign", "function")):
            inside = _join(_items(tokens, _CLOSING[text]))
            left, right = ("(", ")") if text in "[{" else (text, _CLOSING[text])
            left += " " if left.startswith("\\") else ""
            items.append(_Item("group", f"{left}{inside}{right}"))
        elif text in ("+", "-", "*", "/", r"\cdot", r"\times", r"\div"):
            items.append(_Item("sign", {"*": r"\cdot", r"\times": r"\cdot", r"\div": "/"}.get(
                text, text)))
        else:
            raise _Unclear
    if closing:
        raise _Unclear
    return items


def _value(item: _Item) -> str:
    """The text of an item to which a power, ! or a degree is appended."""
    if item.kind in ("sign", "function", "power", "call"):
        raise _Unclear
    return f"({item.text})" if item.kind == "fraction" else item.text


def _number(text: str) -> str:
    whole, _, decimals = text.partition(".")
    return rf"\frac{{{int(whole + decimals)}}}{{1{'0' * len(decimals)}}}" if decimals else (
        str(int(whole)))


def _name(text: str) -> str:
    if re.fullmatch(r"[a-zA-Z]", text) and text not in "dEI":
        return text
    plain = re.sub(r"\\(?:text|mathrm)(?![a-zA-Z])|[\s{}\\]|(?<=\\)var", "", text)
    return f"(q_{{{1000 + zlib.crc32(plain.encode())}}})"


def _argument(tokens: list) -> str:
    r"""The argument of a command: {…}, or one digit or symbol. \frac12 has two of them."""
    if not tokens:
        raise _Unclear
    kind, text = tokens.pop()
    if text == "{":
        return _join(_items(tokens, "}"))
    if kind == "number" and text.isdigit():
        if len(text) > 1:
            tokens.append(("number", text[1:]))
        return text[0]
    if kind == "symbol" and "_" not in text:
        return _name(text)
    if text == r"\pi":
        return text
    raise _Unclear


def _fraction(tokens: list) -> _Item:
    r"""\frac{a}{b} or \frac12; \frac123 is unclear."""
    top, bottom = _argument(tokens), _argument(tokens)
    if tokens and tokens[-1][0] == "number" and bottom.isdigit():
        raise _Unclear
    whole = top.isdigit() and bottom.isdigit()
    return _Item("fraction", rf"\frac{{{top}}}{{{bottom}}}",
                 (1 if int(top) < int(bottom) else -1) if whole else 0)


def _root(tokens: list) -> str:
    degree = ""
    if tokens and tokens[-1][1] == "[":
        tokens.pop()
        degree = f"[{_join(_items(tokens, ']'))}]"
    following = tokens[-1] if tokens else ("", "")
    if following[1] == "(":
        tokens.pop()
        return rf"\sqrt{degree}{{{_join(_items(tokens, ')'))}}}"
    if following[1] == r"\frac":
        tokens.pop()
        return rf"\sqrt{degree}{{{_fraction(tokens).text}}}"
    if following[0] == "number" and len(following[1]) > 1:
        raise _Unclear   # \sqrt12
    argument = _argument(tokens)
    if degree in ("[3]", "[5]", "[7]") and re.fullmatch(r"-[^-+]*", argument):
        return rf"(-\sqrt{degree}{{{argument[1:]}}})"   # the real root
    return rf"\sqrt{degree}{{{argument}}}"


def _power(tokens: list) -> str:
    """What follows ^: {…}, (…), or a number or symbol with its sign."""
    sign = ""
    if tokens and tokens[-1][1] in ("-", "+"):
        sign = tokens.pop()[1]
    if tokens and tokens[-1][0] == "number":
        return sign + _number(tokens.pop()[1])
    if tokens and tokens[-1][1] == "(":
        tokens.pop()
        return f"{sign}({_join(_items(tokens, ')'))})"
    if tokens and tokens[-1][1] == r"\frac":
        tokens.pop()
        return sign + _fraction(tokens).text
    return sign + _argument(tokens)


def _join(items: list[_Item]) -> str:
    """Writes the items out, with a sign between any two of them."""
    if not items or items[-1].kind in ("sign", "function") or items[0].text in (r"\cdot", "/"):
        raise _Unclear
    items, written = _apply_functions(items), ""
    for i, item in enumerate(items):
        before = items[i - 1] if i else _Item("sign", "")
        if item.kind == "sign" and before.kind == "sign" and i and item.text in (r"\cdot", "/"):
            raise _Unclear
        if item.kind != "sign" and before.kind != "sign":
            if before.kind == "number" and item.whole:   # 3\frac12
                if item.whole < 0 or i > 1 and items[i - 2].kind != "sign":
                    raise _Unclear
                written = written[:-len(before.text)] + f"({before.text}+{item.text})"
                continue
            if i > 1 and items[i - 2].text == "/":       # 1/2x
                raise _Unclear
            written += r"\cdot "
        elif item.kind == "sign" and before.kind == "sign" and i:
            written += " "
        written += item.text + (" " if item.text == r"\cdot" else "")
    return written


def _apply_functions(items: list[_Item]) -> list[_Item]:
    r"""\sin 2x\cos x is \sin(2x)\cos(x): a bare argument ends at a sign or at another function."""
    done: list[_Item] = []
    for item in reversed(items):
        if item.kind == "function":
            bracket = bool(done) and done[0].text.startswith("(") and done[0].kind not in (
                "symbol", "factorial") and (not done[0].text.startswith("(q_"))
            end = next((i for i, each in enumerate(done) if each.kind in ("sign", "call") or i and (
                each.text.startswith("e^") or each.kind == "group" and each.text[0] == "(")),
                       len(done))
            end = 1 if bracket or done and done[0].kind == "call" else end
            if not end:
                raise _Unclear
            if not bracket and end < len(done) and done[end].text == "/":
                raise _Unclear   # \sin x/2
            argument = _join(done[:end])
            del done[:end]
            argument = argument if bracket else f"({argument})"   # \sin(x)^2 is (\sin x)^2
            if item.text.startswith(r"\exp"):
                if item.text != r"\exp" or argument.endswith("}"):
                    raise _Unclear
                item = _Item("call", f"e^{{{argument}}}")
            else:
                item = _Item("call", item.text.replace(r"\lg", r"\log_{10}") + argument)
        done.insert(0, item)
    return done
