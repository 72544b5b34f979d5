r"""Reads the shape of a final answer.

    read(tidy(r"\left[ 2, 5 \right)"))     # Parts("[)", (Quantity("2", 2), Quantity("5", 5)))
    read(tidy("3 hours 20 minutes"))       # Parts("sum", of two quantities)
    read(tidy("at least 5"))               # None, because it is not understood
"""

import functools
import re
import unicodedata
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from answers.expressions import FUNCTIONS, GROUPED, SYMBOL, THOUSANDS, has_letters, rewrite
from answers.units import UNITS, read_unit, same_unit

# --------------------------------------------------------------------------------------------------
# Shapes

@dataclass(frozen=True)
class Quantity:
    """A number or an expression, with or without a unit."""
    text: str                       # what `rewrite` makes of it, without the unit
    value: Fraction | None = None   # of a number; None for an expression
    unit: str = ""
    last: Fraction | None = None    # the worth of a 1 in its last place; None for a fraction
    digits: int = 0                 # of a decimal: its significant digits


@dataclass(frozen=True)
class Words:
    """Text. A single letter keeps its case; longer text is in lower case."""
    text: str
    written: str = ""
    product: str = ""               # what it is as a product of variables, if it may be one


@dataclass(frozen=True)
class Parts:
    r"""Several answers.

    brackets: list, or (a list of names or units joined by "or"), sum (4 hours 10 minutes), {}, (),
    [], (], [), union, matrix or row.
    """
    brackets: str
    parts: tuple[Any, ...]
    by_sign: bool = False           # a list that \pm has made: two of the answers of a longer list


@dataclass(frozen=True)
class Named:
    """name = value, or name in a set."""
    name: str
    value: Any
    text: str = ""                  # the name as `rewrite` makes it


@dataclass(frozen=True)
class Relation:
    r"""text sign 0, where sign is =, >, \ge or \ne."""
    sign: str
    text: str
    value: Any = None               # 5 of m + n = 5; None if the left side has one letter only


@dataclass(frozen=True)
class Form:
    """kind: time, ratio, date, choice (letter, text) or base (digits, base)."""
    kind: str
    parts: tuple[Any, ...]


Shape = Quantity | Words | Parts | Named | Relation | Form


# --------------------------------------------------------------------------------------------------
# Tidying: what changes only the looks of an answer

_SYMBOLS = {"−": "-", "–": "-", "‐": "-", "‑": "-", "×": r"\times ", "·": r"\cdot ",
            "⋅": r"\cdot ", "∙": r"\cdot ", "•": r"\cdot ", "÷": "/", "⁄": "/", "∕": "/",
            "°": r"^\circ ", "º": r"^\circ ", "℃": r"^\circ C", "∞": r"\infty ", "≤": r"\le ",
            "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∅": r"\emptyset ", "∪": r"\cup ",
            "∈": r"\in ", "±": r"\pm ", "√": r"\sqrt ", "€": r"\euro ", "£": r"\pounds ",
            "¢": " cents", "₹": r"\rupee ", "¥": r"\yen ", "Å": " angstrom", "ℝ": r"\mathbb{R}",
            "ℤ": r"\mathbb{Z}",
            "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ",
            "\u2009": r"\,", "\u202f": r"\,", "\u00a0": " ", "’": "'", "′": "'", "“": "", "”": "",
            "\ufeff": "", "\u200b": "", "…": r"\dots ", "⩽": r"\le ", "⩾": r"\ge ", "∶": ":",
            "。": ".", "、": ",", "ϕ": r"\phi ", "∆": r"\Delta "}
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n")
_LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_ENDINGS = {"1": "st", "2": "nd", "3": "rd"}
_TEXT = re.compile(r"\\text\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_ALIGNED = re.compile(r"&(?=\s*=)|(?<==)\s*&")   # x &= 1
# These come first, because the later ones change braces and √.
_FIRST = [(re.compile(pattern), same) for pattern, same in (
    (r"√\s*([0-9]+(?:\.[0-9]+)?|[a-zA-Z])", r"\\sqrt{\1}"), (r"^\s*\*\*(.+)\*\*\s*$", r"\1"),
    (r"\{([^{}]*)\\over(?![a-zA-Z])([^{}]*)\}", r"\\frac{\1}{\2}"),
    (r"\{([^{}]*)\\choose(?![a-zA-Z])([^{}]*)\}", r"\\binom{\1}{\2}"),
    (r"(?s)\\\{\s*\\begin\{(array|aligned)\}(?:\s*\{[^{}]*\})?((?:(?!\\(?:begin|end)).)*)"
     r"\\end\{\1\}(?!\s*(?:\\right\s*)?\\\})",
     lambda match: rf"\begin{{cases}}{_ALIGNED.sub('', match[2])}\end{{cases}}"),
    (r"\\begin\{array\}\s*\{[^{}]*\}|\\begin\{smallmatrix\}", r"\\begin{matrix}"),
    (r"\\end\{(?:array|smallmatrix)\}", r"\\end{matrix}"))]
_ALIKE = [(re.compile(pattern), same) for pattern, same in (
    # Signs of units and primes
    (r"\\AA(?![a-zA-Z])", " angstrom"), (r"\\cents?(?![a-zA-Z])", " cents"),
    (r"\\text\s*\{\s*\\textdollar\s*\}", r"\\$"), (r"\^\s*\{?\s*\\prime\s*\}?", "'"),
    # Sizes, colours and space
    (r"\\(?:left|right)\s*\.", ""),
    (r"\\(?:left|right|displaystyle|textstyle|limits|[Bb]igg?[lr]?|[Ll]arge|boldsymbol|bm)"
     r"(?![a-zA-Z])", ""), (r"\\(?:text)?color\s*\{[^{}]*\}|\\[hv]space\s*\{[^{}]*\}", ""),
    # Fonts: upright letters become \text; functions, numbers and constants leave it
    (r"\{\s*\\(?:rm|bf|it|sf|tt)(?![a-zA-Z])\s*([^{}]*)\}", r"\\text{\1}"),
    (r"\\(?:text(?:rm|bf|it|sf|tt|up|normal)|mathrm|mbox|emph|rm)\s*\{", r"\\text{"),
    (r"\\(?:math|text)?(?:bf|it|sf)\s*(?:\{([^{}a-zA-Z]*)\}|(?=[0-9]))", r"\1"),
    (r"\\operatorname\s*\{([a-z]+)\}", r"\\\1 "),
    (r"\\text\s*\{\s*(arcsin|arccos|arctan|sin|cos|tan|ln|log)\s*\}", r"\\\1 "),
    (r"\\text\s*\{\s*([-0-9.,ie/]*)\s*\}", r" \1"), (r"\\lbrack(?![a-zA-Z])", "["),
    (r"\\rbrack(?![a-zA-Z])", "]"), (r"\\(?:[dtc]|nice|s)frac(?![a-zA-Z])", r"\\frac"),
    (r"\\[dt]binom(?![a-zA-Z])", r"\\binom"), (r"\{,\}", ","), (r"\\!\s*", ""),
    # Relations, sets, infinity
    (r"\\leq(?:slant)?(?![a-zA-Z])|<=", r"\\le "), (r"\\geq(?:slant)?(?![a-zA-Z])|>=", r"\\ge "),
    (r"\\lt(?![a-zA-Z])", "<"), (r"\\gt(?![a-zA-Z])", ">"), (r"\\neq(?![a-zA-Z])|!=", r"\\ne "),
    (r"\\l?(?:or|vee)(?![a-zA-Z])", " or "), (r"\\varnothing(?![a-zA-Z])", r"\\emptyset"),
    (r"\+/-|(?:^|(?<==))\s*\+-", r"\\pm "),
    (r"(?<![a-zA-Z\\])(?:inf|infinity|oo)(?![a-zA-Z])", r"\\infty "),
    (r"(?<=[)\]}]) ?U ?(?=[(\[\\])", r"\\cup "), (r"\\[lr]angle(?![a-zA-Z])", r"\g<0> "),
    # Degrees and percent
    (r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![a-zA-Z])|(?<=[0-9])\s*\\circ(?![a-zA-Z])"
     r"|\^?\s*\\(?:degrees?|deg)(?![a-zA-Z])|\\textdegree", r"^\\circ "),
    (r"\\pmod ?\{ ?([0-9]+) ?\}", r"\\pmod \1"), (r"(?<=[a-zA-Z])(?<!log)_([0-9]{2,})", r"_{\1}"),
    (r"\\lbrace(?![a-zA-Z])", r"\\{"), (r"\\rbrace(?![a-zA-Z])", r"\\}"),
    (r"(?<!\\)%", r"\\%"), (r"\\(?:bar|overline)(?![a-zA-Z])", r"\\overline"),
    (r"\\text\s*\{\s*\}", ""),
    # $5$ is mathematics, $5 is money.
    (r"(?<!\\)\$([^$]*[^$\s\\])\$(?![0-9])", r"\1"), (r"(?<!\\)\$(?=\s*[0-9.])", r"\\$"))]
_WRAPPED = re.compile(r"\\\((.*)\\\)|\\\[(.*)\\\]|\$+((?:[^$\\]|\\.)*)\$+"
                      r"|\\(?:text|f?box(?:ed)?|math(?:bf|sf|it|tt))\s*\{(.*)\}|\{(.*)\}",
                      re.DOTALL)
_ANSWER_IS = r"(?:the )?(?:final )?answer(?: is ?:?| ?:) ?"
_LABEL = re.compile(rf"(?:{_ANSWER_IS}|\\text ?\{{ ?{_ANSWER_IS}\}} ?)(?=.)", re.IGNORECASE)
_THIN = re.compile(r"(?<![0-9.,])[1-9][0-9]{0,2}(?: ?\\[,;:] ?[0-9]{3})+(?![0-9])")
_SPACES = re.compile(r"(\\\\)|\\[,;: ]|~|\\q?quad(?![a-zA-Z])|\s|\\$")   # \\ ends a row
# A space beside a character that is no letter or digit separates nothing; "1, 234" is not 1,234.
_NEEDLESS = re.compile(r" (?=[^\w.,])|(?<=[^\w.,]) |(?<=[^0-9.,],) ")
_ORDINAL = re.compile(r"([0-9]*([0-9]))\s*(?:\^\s*\{?\s*)?(?:\\text\s*\{\s*)?(st|nd|rd|th)\}{0,2}"
                      r"(?= |$)")


@functools.lru_cache(maxsize=4096)
def tidy(text: str) -> str:
    r"""The answer without delimiters, sizes and fonts, and with one spelling of each symbol."""
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]+", lambda m: f"^{{{m[0].translate(_RAISED)}}}", text)
    text = re.sub("[₀-₉]+", lambda m: f"_{{{m[0].translate(_LOWERED)}}}", text)
    for pattern, same in _FIRST:
        text = pattern.sub(same, text)
    text = _unwrapped("".join(map(_symbol, text)).strip())
    for pattern, same in _ALIKE:
        text = pattern.sub(same, text)
    text = _TEXT.sub(lambda m: f"\\text{{{m[1].replace('{', '').replace('}', '')}}}", text)
    text = _THIN.sub(lambda match: re.sub(r" ?\\[,;:] ?", "", match[0]), text)
    text = _unwrapped(" ".join(_SPACES.sub(lambda match: match[1] or " ", text).split()))
    text = text if text.endswith("..") else text.removesuffix(".").strip()
    if (ordinal := _ORDINAL.match(text)) and ordinal[3] == (
            "th" if ordinal[1][-2:-1] == "1" else _ENDINGS.get(ordinal[2], "th")):
        text = ordinal[1] + text[ordinal.end():]
    text = text.removeprefix("=").strip()
    label = _LABEL.match(text)
    return text[label.end():] if label else text


def without_needless_spaces(text: str) -> str:
    return _NEEDLESS.sub("", text)


def _symbol(c: str) -> str:
    if c in _SYMBOLS:
        return _SYMBOLS[c]
    if c.isascii():
        return c
    if "！" <= c <= "～":   # fullwidth forms
        return unicodedata.normalize("NFKC", c)
    if c in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞":
        return _as_latex(Fraction(unicodedata.numeric(c)).limit_denominator(8))
    name = unicodedata.name(c, "").split()
    if name[:2] == ["GREEK", "SMALL"] or name[:2] == ["GREEK", "CAPITAL"]:
        letter = name[-1].lower().replace("lamda", "lambda")
        return f"\\{letter if name[1] == 'SMALL' else letter.capitalize()} "
    return c


def _unwrapped(text: str) -> str:
    for _ in range(4):
        whole = _WRAPPED.fullmatch(text)
        inside = next(filter(None, whole.groups()), "") if whole else ""
        if not inside.strip() or not _balanced(inside):
            break
        text = inside.strip()
    return text


def _balanced(text: str) -> bool:
    depth = 0
    for brace in re.findall(r"\\.|[{}]", text):
        depth += {"{": 1, "}": -1}.get(brace, 0)
        if depth < 0:
            return False
    return depth == 0


def _split(text: str, separator: str) -> list[tuple[str, str]]:
    """(separator before it, text) of each part, at separators that stand in no brackets.

    Commas without a space part thousands if something else parts the answers: 1,234 and 5,678.
    """
    if "," in separator and re.search(rf",\s|{_AND}", text):
        separator = f"{THOUSANDS.pattern}|{separator}"
    parts, depth, begin, before = [], 0, 0, ""
    for token in re.finditer(rf"\\[{{}}]|\\begin|\\end|[()\[\]{{}}]|{separator}", text):
        mark = token[0]
        if mark in ("(", "[", "{", "\\{", "\\begin"):
            depth += 1
        elif mark in (")", "]", "}", "\\}", "\\end"):
            depth -= 1
        elif depth == 0 and not mark[0].isdigit():
            parts.append((before, text[begin:token.start()].strip()))
            before, begin = mark, token.end()
    return [*parts, (before, text[begin:].strip())]


# --------------------------------------------------------------------------------------------------
# Numbers and quantities

_INT = rf"(?:{GROUPED}(?![0-9])|[0-9]+)"
_DEC = rf"(?:{_INT}(?:\.[0-9]*)?|\.[0-9]+)"
_TEN = r"10\s*\^\s*(?:\{\s*(?P<p>[+-]?[0-9]+)\s*\}|(?P<q>[+-]?[0-9]+)(?!\.[0-9]))"
_NUMBERS = [re.compile(r"(?P<sign>[+-]?)\s*" + pattern) for pattern in (
    r"(?P<whole>[0-9]*)\.(?P<start>[0-9]*)\{?\\(?:overline|dot)\s*"
    r"(?:\{(?P<period>[0-9]+)\}|(?P<one>[0-9]))\}?",
    rf"(?P<mixed>{_INT})\s*\\frac\s*\{{(?P<top>{_INT})\}}\s*\{{(?P<bottom>{_INT})\}}",
    rf"(?P<mixed>{_INT}) (?P<top>{_INT})/(?P<bottom>{_INT})(?![.,0-9^])",
    rf"\\frac\s*\{{\s*(?P<top>[+-]?{_DEC})\s*\}}\s*\{{\s*(?P<bottom>[+-]?{_DEC})\s*\}}",
    rf"(?P<top>{_DEC})\s*/\s*(?P<bottom>{_DEC})(?!\s*\^)",
    rf"(?P<decimal>{_DEC})\s*(?:\\times|\\cdot|\*|x)\s*{_TEN}",
    rf"(?P<decimal>{_DEC})[eE](?P<p>[+-]?[0-9]+)(?![0-9.a-zA-Z])",
    _TEN, rf"(?P<decimal>{_DEC})")]
_ONE_SIGN = re.compile(r"\\frac\s*(?:\{([^{}]*)\}|([0-9a-z]))\s*"
                       r"(?:\{([^{}]*)\}|([0-9a-z])(?![0-9.]))")
_CURRENCY = re.compile(r"([+-]?)\s*(?:\\(\$|euro|pounds|rupee|yen)(?![a-zA-Z])"
                       r"|(?:USD|(?:\\text\{)?US\\\$\}?))\s*")
_MONEY = {"euro": "euro", "pounds": "sterling", "rupee": "rupee", "yen": "yen"}
_TRAILING = re.compile(r"(?:/?\s*\\text\s*\{[^{}]*\}(?:\s*\^\s*\{?-?[0-9]\}?)?|\\%|\\euro"
                       r"|\^\\circ(?:\s*(?:\\text\s*\{\s*)?[CF]\}?)?"
                       r"|(?<=[\w)}!]) [a-zA-Z]{2,}\.?(?:\^\{?[23]\}?)?)$")


def _as_latex(value: Fraction) -> str:
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def read_number(text: str) -> tuple[Quantity, str] | None:
    """The number at the beginning of the text, and what follows it."""
    match = next(filter(None, (pattern.match(text) for pattern in _NUMBERS)), None)
    if match is None:
        return None
    found: dict[str, str] = {name: part.replace(",", "") for name, part in
                             match.groupdict().items() if part is not None}
    last, digits = None, 0
    if "start" in found:
        period = found.get("period") or found["one"]
        shift = 10 ** len(found["start"])
        value = (Fraction(int(found["whole"] + found["start"] or "0"))
                 + Fraction(int(period), 10 ** len(period) - 1)) / shift
    elif "top" in found:
        top, bottom = Fraction(found["top"]), Fraction(found["bottom"])
        if not bottom or "mixed" in found and top >= bottom:
            return None
        value = Fraction(found.get("mixed", 0)) + top / bottom
    else:
        power = int(found.get("p") or found.get("q") or 0)
        if abs(power) > 999:
            return None
        decimal = found.get("decimal", "1")
        value = Fraction("0" + decimal.removesuffix(".")) * Fraction(10) ** power
        places = len(decimal.partition(".")[2])
        last = Fraction(10) ** (power - places)
        digits = len(decimal.replace(".", "").lstrip("0")) if places or power else 0
    value = -value if found["sign"] == "-" else value
    return Quantity(_as_latex(value), value, "", last, digits), text[match.end():]


def quantity(text: str) -> Quantity | None:
    """A number or expression, with or without a unit; None if the text is neither."""
    if endless := re.fullmatch(r"\+?\s*(-?)\s*(\\infty)", text):
        return Quantity(endless[1] + endless[2])
    text = _ONE_SIGN.sub(lambda m: rf"\frac{{{m[1] or m[2]}}}{{{m[3] or m[4]}}}", text)
    unit = ""
    if money := _CURRENCY.match(text):
        unit, text = _MONEY.get(money[2], "dollar"), (money[1] or "") + text[money.end():]
    number = read_number(text)
    if number and (after := read_unit(number[1])):
        found, (trailing, factor) = number[0], after
        if unit and trailing and unit != trailing:
            unit = unit + trailing if trailing.startswith("/") else f"{unit} {trailing}"
        if factor != 1 and found.value is not None:
            value = found.value * factor
            found = replace(found, text=_as_latex(value), value=value,
                            last=found.last and found.last * factor)
        return replace(found, unit=unit or trailing)
    end = len(text)
    while not re.search(r"\\(?:sin|cos|tan|sec|csc|cot)(?![a-zA-Z])", text) and (
            piece := _TRAILING.search(text[:end])) and piece.start() > 0:
        end = len(text[:piece.start()].rstrip())
    after = read_unit(text[end:])
    if end < len(text) and after and after[1] == 1:
        unit, text = unit or after[0], text[:end]
    if unit in ("percent", "degree") and len(_split(text[1:], "[+-]")) > 1:
        return None   # 1 + 5%
    latex = rewrite(text)
    return Quantity(latex, None, unit) if latex else None


def spaced_unit(text: str) -> Quantity | None:
    """A number and a unit of few letters, 5 m or 5 ns, which may be a product instead."""
    match = re.fullmatch(r"([-+]?[0-9][0-9.,]*) ([a-zA-Z]{1,3})(\^\{?[23]\}?)?", text)
    if match is None or match[2] not in UNITS:
        return None
    return quantity(rf"{match[1]}\text{{ {match[2]}}}{match[3] or ''}")


# --------------------------------------------------------------------------------------------------
# All shapes

_BASES = {word: base for base, word in enumerate(
    "two three four five six seven eight nine ten eleven twelve".split(), 2)} | {"sixteen": 16}
_BASED = re.compile(r"\(?([0-9A-F]+)\)?\s*(?:_|\(?base )\s*\{?\s*\(?([0-9]+|[a-z]+)\)?\s*[})]?")
_TIME = re.compile(r"([0-9]{1,2}):([0-9]{2})(?::([0-9]{2}))?|([0-9]{1,2})(?=\s*[apAP]\.?\s?[mM])")
_HALF = re.compile(r"\s*([ap])\.?\s*m\.?", re.IGNORECASE)
_MONTHS = {name[:length]: number for number, name in enumerate(
    "january february march april may june july august september october november december".split(),
    1) for length in (3, 4 if name == "september" else 3, len(name))}
_MONTH = rf"(?P<month>{'|'.join(sorted(_MONTHS, key=len, reverse=True))})\.?"
_DATES = [re.compile(pattern, re.IGNORECASE | re.ASCII) for pattern in (
    r"(?P<y>[0-9]{4})-(?P<m>[0-9]{1,2})-(?P<d>[0-9]{1,2})",
    rf"{_MONTH} (?P<d>[0-9]{{1,2}})(?:st|nd|rd|th)?(?:,? (?P<y>[0-9]{{4}}))?",
    rf"(?P<d>[0-9]{{1,2}})(?:st|nd|rd|th)? (?:of )?{_MONTH}(?:,? (?P<y>[0-9]{{4}}))?")]
_LETTER = re.compile(r"(?:(?:option|choice|answer) )?\(?\s*([A-Za-z])\s*\)?\s*[.:]?",
                     re.IGNORECASE | re.ASCII)
_CHOICE = re.compile(
    r"(?:\(([A-J])\)|([A-J])[.:)])"
    r"(?: |(?<!:)(?=(?:\\\$)?[0-9.,/]+$|\\frac(?:[0-9]{2}|\{[0-9]+\}\{[0-9]+\})$))"
    r"(?!(?:is |are )?(?:and|or|not|nor|vs|then|through|only|but|"
    r"wrong|false|incorrect|no|none)\b)(?!.*(?:\b[A-J]\b|\([A-J]\)))([^\s,;()\[\]&+*/^=-].*)",
    re.ASCII)
_WORDS = re.compile(r"[A-Za-z]+(?:'[a-z]+)?(?:[ -]+[A-Za-z]+(?:'[a-z]+)?)*")
_MATRIX = re.compile(r"[(\[]?\s*\\begin\{([pbB]?)matrix\}(.*)\\end\{\1matrix\}\s*[)\]]?", re.DOTALL)
_SYSTEM = re.compile(r"\\begin\{cases\}([^&]*)\\end\{cases\}")
_AND = (r"(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])|\\text\s*\{\s*,?\s*(?:and|or)\s*\}"
        r"|\\text\s*\{\s*,\s*\}")
_AND_WITHIN = re.compile(r"\\text\s*\{([^{}]*[^{}\s,]),? +(and|or) *([^{}]*)\}")
_RELATION = r"=|<|>|\\(?:le|ge|ne|in|approx)(?![a-zA-Z])"
_NAME = re.compile(
    rf"{SYMBOL}(?:\^\{{?(?:-1|\*)\}}?)?(?:[(\[](?:[a-zA-Z](?:,[a-zA-Z])*|-?[0-9]+"
    rf"|\\frac(?:\{{[0-9]+\}}\{{[0-9]+\}}|[0-9][0-9]))[)\]])?(?:_\{{[^{{}}]*\}})?"
    rf"|m?\\(?:angle|triangle) ?[A-Z](?: ?[A-Z]){{0,2}}|([A-Z])(?: ?(?!\1)[A-Z]){{1,2}}"
    rf"|\((?:{SYMBOL}(?:,|$|(?=\)))){{2,}}\)|\\text\{{[^{{}}]*\}}(?:_\{{[^{{}}]*\}})?"
    rf"|(?=[a-zA-Z]*[aeiouAEIOU][a-zA-Z]*[aeiou])[A-Za-z]{{4,}}|\\Delta [A-Za-z]")
_NO_NAME = re.compile(rf"(?:{'|'.join(FUNCTIONS)}|sqrt|pi).*|.*\b(?:not|never|wrong|false)\b.*",
                      re.IGNORECASE)
_OF_WHOLE = re.compile(r"(.+?)[,;]? ?(?P<bracket>\()?(?P<name>[a-z]) ?\\in ?(?:\\mathbb ?\{?Z\}?|Z)"
                       r"(?(bracket)\))")
_ORDER = r"[<>]|\\(?:le|ge|ne|in)(?![a-zA-Z])"
_REALS = re.compile(r"\\mathbb ?\{?R\}?|(?:the set of )?(?:all )?real numbers", re.IGNORECASE)
_SUCH_THAT = re.compile(r" ?([a-zA-Z]) ?(?:\\mid|\\vert|\||:) ?(.+)")
_RANGES = ("()", "(]", "[)", "[]", "union")
_MIRROR = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}


def plain_text(text: str) -> str:
    return " ".join(re.sub(r"\\(?:text|math(?:bf|sf|it))\s*\{([^{}]*)\}", r" \1 ", text).split())


@functools.lru_cache(maxsize=4096)
def read(text: str) -> Shape | None:
    """The shape of an answer that `tidy` returned; None for what is not understood."""
    if not text or not _balanced(text):
        return None
    # k\pi, k\in\mathbb{Z} is read as k\pi. 0 < x < 5, x\in\mathbb{Z} is no interval.
    if (whole := _OF_WHOLE.fullmatch(text)) and not re.search(_ORDER, whole[1]) and re.search(
            rf"(?<![a-zA-Z]){whole['name']}(?![a-zA-Z])", whole[1]):
        text = whole[1]
    text = re.sub(r"\\langle ([^()\[\]]*,[^()\[\]]*?)\s*\\rangle", r"(\1)", text)
    plain = plain_text(text)
    if letter := _LETTER.fullmatch(plain):
        return Words(letter[1], letter[1], letter[1] if letter[1] == text else "")
    text = _AND_WITHIN.sub(r"\\text{\1} \2 \\text{\3}", text).replace(r"\text{}", "")
    if (form := _form(text, plain)) is not None:
        return form
    if (texts := _several(text)) is not None:
        return _list(texts)
    if choice := _CHOICE.fullmatch(plain):
        return Form("choice", (choice[1] or choice[2], choice[3]))
    if (ratio := _ratio(plain)) is not None:
        return ratio
    if len(sides := _split(text, _RELATION)) > 1:
        return _relation([side for _, side in sides], [sign for sign, _ in sides[1:]])
    if text in (r"\emptyset", r"\{ \}"):
        return Parts("{}", ())
    if _REALS.fullmatch(plain):
        return _parts("()", [r"-\infty", r"\infty"])
    if re.fullmatch(r"\\mathbb\s*\{?[A-Z]\}?|\\[lc]?dots|\.\.\.", text):
        return Words("dots" if "." in text or "dots" in text else "mathbb " + text.strip("}")[-1])
    if len(sets := _split(text, r"\\cup(?![a-zA-Z])")) > 1:
        return _parts("union", [each for _, each in sets])
    if system := _SYSTEM.fullmatch(text):
        rows = [row.strip(" ,") for row in system[1].split("\\\\") if row.strip()]
        names = {row.partition("=")[0].strip() for row in rows if "=" in row}
        return _list([(",", row) for row in rows]) if len(names) == len(rows) else None
    if matrix := _MATRIX.fullmatch(text):
        rows = [row for row in matrix[2].split("\\\\") if row.strip()]
        return _all("matrix", [_parts("row", row.split("&")) for row in rows])
    if (inside := _bracketed(text)) is not None:
        return inside
    if "\\pm" in text or "\\mp" in text:
        both = _parts("list", [text.replace(r"\pm", "+").lstrip("+ "), text.replace(r"\pm", "-")]
                      ) if text.count(r"\pm") == 1 and r"\mp" not in text else None
        return both and replace(both, by_sign=True)
    if slashes := re.fullmatch("([0-9]{1,2})/([0-9]{1,2})/([0-9]{4})", plain):
        return Form("date", ("month or day first", *map(int, slashes.groups())))
    return _words(text, plain) or _compound(plain) or quantity(text)


def _parts(brackets: str, texts: list[str]) -> Parts | None:
    return _all(brackets, [read(text.strip()) for text in texts])


def _all(brackets: str, parts: list) -> Parts | None:
    if None in parts:
        return None
    if brackets in ("list", "or", "{}"):
        parts = [each for part in parts for each in (
            part.parts if isinstance(part, Parts) and part.brackets == "list" and part.by_sign
            else [part])]
    return Parts(brackets, tuple(parts))


def _words(text: str, plain: str) -> Words | None:
    words = re.split("[ -]+", plain)
    if not _WORDS.fullmatch(plain) or rewrite(plain) == r"\pi" or plain in FUNCTIONS:
        return None
    if max(map(len, words)) < 3 and (min(map(len, words)) == 1 or "-" in plain):
        return None   # m g h, or a-b
    product = plain if plain == text and plain.isalpha() and len(plain) < 4 and (
        plain.lower() not in ("no", "yes", "odd", "on")) else ""
    return Words(plain.lower(), plain, product and rewrite(product) or "")


def _form(text: str, plain: str) -> Form | None:
    if based := _BASED.fullmatch(plain):
        base = int(_BASES.get(based[2], based[2] if based[2].isdigit() else 0))
        if 2 <= base <= 36 and all(int(digit, 16) < base for digit in based[1]):
            return Form("base", (based[1].lstrip("0") or "0", base))
    if time := _TIME.match(plain):
        half, rest = _HALF.fullmatch(plain, time.end()), plain[time.end():]
        hour, minute, second = int(time[1] or time[4]), int(time[2] or 0), time[3] and int(time[3])
        if (half or not rest.strip()) and hour < 25 and minute < 60 and (second or 0) < 60 and not (
                half and not 1 <= hour <= 12):
            return Form("time", (hour, minute, second, half[1].lower() if half else ""))
    for pattern in _DATES:
        if date := pattern.fullmatch(plain):
            parts = date.groupdict()
            month = _MONTHS[parts["month"].lower()] if parts.get("month") else int(parts["m"])
            if 1 <= month <= 12 and 1 <= int(parts["d"]) <= 31:
                return Form("date", (parts["y"] and int(parts["y"]), month, int(parts["d"])))
    return None


def _ratio(plain: str) -> Form | None:
    terms = [term for _, term in _split(plain, r":|\\colon(?![a-zA-Z])|(?<=[0-9]) to (?=[0-9])")]
    if len(terms) < 2:
        return None
    parts = [quantity(term) if term else None for term in terms]
    plain_numbers = all(part is not None and not part.unit for part in parts)
    return Form("ratio", tuple(parts)) if plain_numbers else None


def _several(text: str) -> list[tuple[str, str]] | None:
    """(mark before it, text) of each answer of a list; None if there is one only.

    The commas of one number part thousands.
    """
    number = read_number(re.sub(r"^[^=]*=\s*", "", _CURRENCY.sub("", text, count=1)))
    if number and read_unit(number[1]):
        return None
    marks = ";" if len(_split(text, ";")) > 1 else ","
    found = _split(text, rf"{marks}|{_AND}")
    if len(found) == 1 or _compound(plain_text(text)):
        return None
    empty = [i for i in range(1, len(found) - 1)   # that between "," and "and" in "2, 3, and 4"
             if not found[i][1] and found[i + 1][0] not in ",;"]
    return [each for i, each in enumerate(found) if i not in empty]


def _list(found: list[tuple[str, str]]) -> Shape | None:
    """A list of answers; x = 2, 3 is x in a list, and so is x = 2 or x = 3."""
    shapes = [read(text) for _, text in found]
    if None in shapes or len(shapes) < 2:
        return None
    names = [shape.name if isinstance(shape, Named) else None for shape in shapes]
    either = any("or" in mark for mark, _ in found[1:])
    several = len(set(filter(None, names))) > 1
    if several and None not in names and len(set(names)) < len(names):
        solutions = _solutions(shapes, names, [mark for mark, _ in found])
        if solutions or either:
            return solutions
    elif several and any(not isinstance(shape, (Named, Relation)) for shape in shapes):
        return None   # x = 1, 2, y = 3
    if names[0] and (not any(names[1:]) or set(names) == {names[0]}):
        values = [shape.value if isinstance(shape, Named) else shape for shape in shapes]
        rays = not names[0].startswith("(") and all(
            isinstance(value, Parts) and len(value.brackets) == 2 for value in values)
        if rays and either and any("and" in mark for mark, _ in found[1:]):
            return None
        value = _all("union" if rays and either else "list", values)
        return Named(names[0], value)
    labelled = any(isinstance(shape, Named) or isinstance(shape, Quantity) and shape.unit
                   for shape in shapes)
    return _all("or" if either and labelled else "list", shapes)


def _solutions(shapes: list[Any], names: list[str | None], marks: list[str]) -> Parts | None:
    """x = 2, y = 3 or x = 5, y = 7: a list of lists with the same names; None if it is none."""
    count = len(set(names))
    groups = [shapes[first:first + count] for first in range(0, len(shapes), count)]
    if any({each.name for each in group} != set(names) for group in groups) or any(
            "or" in mark for i, mark in enumerate(marks) if i % count):
        return None
    return Parts("list", tuple(Parts("list", tuple(group)) for group in groups))


def _relation(sides: list[str], signs: list[str]) -> Shape | None:
    names = [_name(side) for side in sides]
    if names[0] and len(sides) == 3 and signs[0] == "=" and signs[1] in ("=", r"\approx"):
        value = _chain(sides[1:], signs[1])
        return value and Named(names[0], value)
    if len(sides) == 2 and not any(names) and all(sides) and signs[0] in ("=", r"\approx") and (
            value := _chain(sides, signs[0])):
        return value
    if r"\approx" in signs:
        value = read(sides[1]) if len(sides) == 2 and (names[0] or not sides[0]) else None
        if names[0]:
            plain = isinstance(value, Quantity) and not has_letters(value.text)
            return Named(names[0], value) if plain else None
        return value
    if not all(sides) or len(sides) > 3:
        return None
    if len(sides) == 3:
        return _between(sides, signs, names[1])
    (left, right), sign = sides, signs[0]
    if sign == r"\in":
        value = read(right)
        return Named(names[0], value) if names[0] and value is not None else None
    if names[1] and not names[0]:
        left, right, sign, names = right, left, _MIRROR.get(sign, sign), names[::-1]
    latex = [rewrite(left) or "", rewrite(right) or ""]
    if names[0]:
        value = read(right)
        if sign == "=" and value is not None:
            return Named(names[0], value, "" if "(" in names[0] else latex[0])
        if isinstance(value, Quantity) and sign in _MIRROR and not has_letters(value.text):
            endless = Quantity(r"-\infty"), Quantity(r"\infty")
            ends = (endless[0], value) if sign in ("<", r"\le") else (value, endless[1])
            return Named(names[0], Parts({"<": "()", r"\le": "(]", ">": "()", r"\ge": "[)"}[sign],
                                         ends))
    if not all(latex):
        return None
    if sign in ("<", r"\le"):
        latex, sign = latex[::-1], _MIRROR[sign]
    value = read(right) if sign == "=" and not has_letters(latex[1]) else None
    letters = set(re.findall("[a-zA-Z]", re.sub(r"\\[a-zA-Z]+|_\{[^{}]*\}|_.", "", left)))
    known = len(letters - {"e", "i"}) > 1 and isinstance(value, Quantity) and value.value != 0
    return Relation(sign, f"({latex[0]})-({latex[1]})", value if known else None)


def _chain(sides: list[str], sign: str) -> Quantity | None:
    r"""\frac72 = 3.5 and 2\pi \approx 6.28 are their first side; None where numbers differ."""
    a, b = read(sides[0]), read(sides[1])
    if not isinstance(a, Quantity) or not isinstance(b, Quantity) or b.value is None or (
            has_letters(a.text) or not same_unit(a.unit, b.unit)):
        return None
    if sign == "=":
        return a if a.value == b.value else None
    rounded = a.value is None or b.last and 2 * abs(a.value - b.value) <= b.last
    return a if rounded else None


def _between(sides: list[str], signs: list[str], name: str) -> Named | None:
    """a < x < b."""
    ends = [sides[0], sides[2]]
    if set(signs) <= {">", r"\ge"}:
        ends, signs = ends[::-1], [_MIRROR[sign] for sign in signs[::-1]]
    if not name or not set(signs) <= {"<", r"\le"}:
        return None
    brackets = ("(" if signs[0] == "<" else "[") + (")" if signs[1] == "<" else "]")
    interval = _parts(brackets, ends)
    return interval and Named(name, interval)


def _name(text: str) -> str:
    """The name, if the text is one, without braces and spaces."""
    text = re.sub(r"\s+(?=[(),])|(?<=[(,])\s+", "", text)
    plain = re.sub(r"\\text\s*\{([^{}]*)\}|[{}]", r"\1", text).strip()
    if not _NAME.fullmatch(text) or _NO_NAME.fullmatch(plain.lstrip("\\")) or text in ("e", "i"):
        return ""
    return plain.replace(" ", "")


def _bracketed(text: str) -> Shape | None:
    pairs = {"(": ")]", "[": ")]", r"\{": (r"\}",)}
    opening = text[:2] if text.startswith("\\") else text[:1]
    closing = text[-2:] if text.endswith(r"\}") else text[-1:]
    inside = text[len(opening):-len(closing)]
    if closing not in pairs.get(opening, ()) or not _closes_at_end(text):
        return None
    if opening == r"\{" and (rule := _SUCH_THAT.fullmatch(inside)):   # {x | x > 2}
        found = read(rule[2].strip())
        value = found.value if isinstance(found, Named) and found.name == rule[1] else None
        return value if isinstance(value, Parts) and value.brackets in _RANGES else None
    if opening == r"\{":
        return _parts("{}", [each for _, each in _split(inside, "[,;]")] if inside.strip() else [])
    marks = ";" if len(_split(inside, ";")) > 1 else ","
    texts = [each for _, each in _split(inside, marks)]
    if opening + closing == "()" and len(texts) == 1:
        shape = read(inside.strip())
        return None if isinstance(shape, Quantity) and shape.value is None else shape
    return _parts(opening + closing, texts)


def _closes_at_end(text: str) -> bool:
    """Whether the bracket that opens the text is closed by its last character."""
    depth, marks = 0, list(re.finditer(r"\\[{}]|[()\[\]{}]", text))
    for mark in marks:
        depth += 1 if mark[0][-1] in "([{" else -1
        if depth == 0:
            return mark is marks[-1]
    return False


def _compound(text: str) -> Parts | None:
    """4 hours 10 minutes."""
    text = re.sub(r",(?![0-9]{3})", " ", text)
    found = re.split(rf"(?<=[a-z.])\s+(?:and\s+)?(?={_DEC}\s*[a-zA-Z])", text)
    if len(found) < 2:
        return None
    parts = [spaced_unit(each) or quantity(each) for each in found]
    named = all(part is not None and part.value is not None and part.unit for part in parts)
    return Parts("sum", tuple(parts)) if named else None
