r"""The shape of a final answer, and when two answers are equal.

    equal(r"37.5\%", "37.5")                          # True
    equal("(7, 4)", "x = 4, y = 7")                   # False, because the order differs
    equal(r"\sqrt{8}", r"2\sqrt{2}")                  # raises NeedsAlgebra
    equal(r"\sqrt{8}", r"2\sqrt{2}", algebra.equal)   # True

An answer is read as one of the shapes below. Two answers are equal only if their shapes agree, and
their number of parts, their order where order counts, and their units where both have one. Numbers
are compared as fractions, exactly; expressions by algebra.py. docs/reward.md lists the rules.
"""

import functools
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any


class NeedsAlgebra(Exception):
    """Two expressions have to be compared, and `equal` was given no algebra."""


# (expression, expression, sign) -> whether they are equal; None where one is not understood.
# sign is "" for values; else each expression stands on the left of this sign and 0 on the right.
Algebra = Callable[[str, str, str], bool | None]


# --------------------------------------------------------------------------------------------------
# Shapes

@dataclass(frozen=True)
class Quantity:
    """A number or an expression, with or without a unit."""
    text: str                       # LaTeX without the unit
    value: Fraction | None = None   # of a number; None for an expression
    unit: str = ""
    last: Fraction | None = None    # of a decimal: the worth of a 1 in its last place
    digits: int = 0                 # of a decimal: its significant digits


@dataclass(frozen=True)
class Words:
    text: str                       # one letter as it is written, words in lower case
    bare: bool = False              # it may be a product of variables instead


@dataclass(frozen=True)
class Parts:
    """Several answers. brackets: list, {}, (), [], (], [), union, matrix or row."""
    brackets: str
    parts: tuple[Any, ...]


@dataclass(frozen=True)
class Named:
    """name = value, or name in a set."""
    name: str
    value: Any


@dataclass(frozen=True)
class Relation:
    """text sign 0, where sign is =, >, \\ge or \\ne."""
    sign: str
    text: str


@dataclass(frozen=True)
class Form:
    """kind: time, ratio, date, choice (letter, text) or base (digits, base)."""
    kind: str
    parts: tuple[Any, ...]


Shape = Quantity | Words | Parts | Named | Relation | Form


# --------------------------------------------------------------------------------------------------
# Tidying: what changes only the looks of an answer

_SYMBOLS = {"−": "-", "–": "-", "‐": "-", "‑": "-", "×": r"\times ", "·": r"\cdot ",
            "⋅": r"\cdot ", "÷": "/", "°": r"^\circ ", "º": r"^\circ ", "π": r"\pi ",
            "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∅": r"\emptyset ",
            "∪": r"\cup ", "∈": r"\in ", "±": r"\pm ", "²": "^{2}", "³": "^{3}", "√": r"\sqrt ",
            "€": r"\euro ", "£": r"\pounds ", "½": r"\frac{1}{2}", "\u2009": r"\,",
            "\u202f": r"\,", "\u00a0": " ", "’": "'", "“": "", "”": "", "\ufeff": ""}
_ALIKE = [(re.compile(pattern), same) for pattern, same in (
    (r"\\(?:left|right|displaystyle|textstyle|limits|[Bb]igg?[lr]?|boldsymbol)(?![a-zA-Z])", ""),
    (r"\\(?:(?:text|math)(?:rm|bf|it|sf|tt|up|normal)|operatorname|mbox|emph)\s*\{", r"\\text{"),
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"), (r"\{,\}", ","), (r"\\!", ""),
    (r"\\leq(?:slant)?(?![a-zA-Z])|<=", r"\\le "), (r"\\geq(?:slant)?(?![a-zA-Z])|>=", r"\\ge "),
    (r"\\lt(?![a-zA-Z])", "<"), (r"\\gt(?![a-zA-Z])", ">"), (r"\\neq(?![a-zA-Z])|!=", r"\\ne "),
    (r"\\varnothing(?![a-zA-Z])", r"\\emptyset"), (r"\\bar(?![a-zA-Z])", r"\\overline"),
    (r"(?:\^\s*(?:\{\s*)?)?\\(?:circ|degrees?|deg)(?![a-zA-Z])(?:\s*\})?|\\textdegree",
     r"^\\circ "),
    (r"\\lbrace(?![a-zA-Z])", r"\\{"), (r"\\rbrace(?![a-zA-Z])", r"\\}"), (r"(?<!\\)%", r"\\%"),
    (r"(?<=[0-9])\s*(?:\^\s*\{?\s*)?\\text\{(?:st|nd|rd|th)\}(?:\s*\})?"
     r"|(?<=[0-9])(?:st|nd|rd|th)(?![a-zA-Z])", ""),
    # $5$ is mathematics, $5 is money.
    (r"(?<!\\)\$([^$]*[^$\s\\])\$(?![0-9])", r"\1"), (r"(?<!\\)\$(?=\s*[0-9.])", r"\\$"))]
_WRAPPED = re.compile(r"\\\((.*)\\\)|\\\[(.*)\\\]|\$+((?:[^$\\]|\\.)*)\$+"
                      r"|\\(?:text|f?box(?:ed)?)\s*\{(.*)\}|\{(.*)\}", re.DOTALL)
_THIN = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:\\[,;:][0-9]{3})+(?![0-9])")
_SPACES = re.compile(r"(\\\\)|\\[,;: ]|~|\\q?quad(?![a-zA-Z])|\s|\\$")   # \\ ends a row
# A space beside a character that is no letter or digit separates nothing; "1, 234" is not 1,234.
_NEEDLESS = re.compile(r" (?=\W)|(?<=\W)(?<![0-9],) ")


def tidy(text: str) -> str:
    r"""The answer without delimiters, sizes and fonts, and with one spelling of each symbol."""
    text = "".join(_SYMBOLS.get(c, unicodedata.normalize("NFKC", c) if "！" <= c <= "～" else c)
                   for c in text).strip()
    text = _unwrapped(text)
    for pattern, same in _ALIKE:
        text = pattern.sub(same, text)
    text = _THIN.sub(lambda match: re.sub(r"\\[,;:]", "", match[0]), text)
    text = _unwrapped(" ".join(_SPACES.sub(lambda match: match[1] or " ", text).split()))
    return text if text.endswith("..") else text.removesuffix(".").strip()


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
    """(separator before it, text) of each part, at separators that stand in no brackets."""
    parts, depth, begin, before = [], 0, 0, ""
    for token in re.finditer(rf"\\[{{}}]|\\begin|\\end|[()\[\]{{}}]|{separator}", text):
        mark = token[0]
        if mark in ("(", "[", "{", "\\{", "\\begin"):
            depth += 1
        elif mark in (")", "]", "}", "\\}", "\\end"):
            depth -= 1
        elif depth == 0:
            parts.append((before, text[begin:token.start()].strip()))
            before, begin = mark, token.end()
    return [*parts, (before, text[begin:].strip())]


# --------------------------------------------------------------------------------------------------
# Numbers

_INT = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_DEC = rf"(?:{_INT}(?:\.[0-9]*)?|\.[0-9]+)"
_TEN = r"10\s*\^\s*(?:\{\s*(?P<p>[+-]?[0-9]+)\s*\}|(?P<q>[+-]?[0-9]+))"
_SIGN = r"(?P<sign>[+-]?)\s*"
_NUMBERS = [re.compile(_SIGN + pattern) for pattern in (
    r"(?P<whole>[0-9]*)\.(?P<start>[0-9]*)\\overline\s*(?:\{(?P<period>[0-9]+)\}|(?P<one>[0-9]))",
    rf"(?P<mixed>{_INT})\s*\\frac\s*\{{(?P<top>{_INT})\}}\s*\{{(?P<bottom>{_INT})\}}",
    rf"(?P<mixed>{_INT}) (?P<top>{_INT})/(?P<bottom>{_INT})(?![.,0-9^])",
    rf"\\frac\s*\{{\s*(?P<top>[+-]?{_DEC})\s*\}}\s*\{{\s*(?P<bottom>[+-]?{_DEC})\s*\}}",
    rf"(?P<top>{_DEC})\s*/\s*(?P<bottom>{_DEC})(?!\s*\^)",
    rf"(?P<decimal>{_DEC})\s*(?:\\times|\\cdot|\*|x)\s*{_TEN}",
    rf"(?P<decimal>{_DEC})[eE](?P<p>[+-]?[0-9]+)(?![0-9.a-zA-Z])",
    _TEN, rf"(?P<decimal>{_DEC})")]
_ONE_SIGN = re.compile(r"\\frac\s*(?:\{([^{}]*)\}|([0-9a-z]))\s*"
                       r"(?:\{([^{}]*)\}|([0-9a-z])(?![0-9]))")


def _number(text: str) -> tuple[Quantity, str] | None:
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
        if places or power:
            last = Fraction(10) ** (power - places)
            digits = len(decimal.replace(".", "").lstrip("0"))
    value = -value if found["sign"] == "-" else value
    return Quantity(match[0], value, "", last, digits), text[match.end():]


# --------------------------------------------------------------------------------------------------
# Units

_UNITS = {word: unit for unit, words in {
    "percent": "percents pct", "degree": "degrees deg", "dollar": "dollars usd bucks",
    "cent": "cents", "euro": "euros eur", "pound": "pounds lb lbs gbp",
    "meter": "meters metre metres m", "centimeter": "centimeters centimetre centimetres cm",
    "millimeter": "millimeters millimetre millimetres mm",
    "kilometer": "kilometers kilometre kilometres km", "inch": "inches in", "foot": "feet ft",
    "yard": "yards yd yds", "mile": "miles mi", "gram": "grams g", "milligram": "milligrams mg",
    "kilogram": "kilograms kg kgs", "ounce": "ounces oz", "ton": "tons tonne tonnes",
    "second": "seconds sec secs s", "minute": "minutes min mins", "hour": "hours hr hrs h",
    "day": "days", "week": "weeks", "month": "months", "year": "years yr yrs",
    "liter": "liters litre litres l L", "milliliter": "milliliters millilitre ml mL",
    "newton": "newtons N", "joule": "joules J", "watt": "watts W", "volt": "volts V",
    "ampere": "amperes amps amp A", "kelvin": "kelvins K", "hertz": "Hz", "ohm": "ohms",
    "person": "people persons", "child": "children", "man": "men", "woman": "women",
    "foot/minute": "fpm", "mile/hour": "mph", "kilometer/hour": "kmh kph",
    "": "unit units of the a an th st nd rd"}.items() for word in [unit, *words.split()]}
_MAGNITUDES = {"dozen": 12, "hundred": 100, "thousand": 10 ** 3, "million": 10 ** 6,
               "billion": 10 ** 9, "trillion": 10 ** 12}
_NAMES = set("pi sqrt sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp "
             "alpha beta gamma delta theta lambda mu phi omega sigma rho tau epsilon inf "
             "infty infinity oo".split())
_NO_UNITS = _NAMES | set("and or not but is are was if than then least most more less no never to "
                         "about between from base plus minus times over mod am pm".split())
_UNIT_SIGNS = [(r"\\text\s*\{([^{}]*)\}", r" \1 "), (r"\\%", " percent "),
               (r"\^\\circ", " degree "), (r"\\\$", " dollar "), (r"\\Omega", " ohm "),
               (r"\\(?:cdot|times)(?![a-zA-Z])", " "), (r"\^\{?(-?[0-9])\}?", r" ^\1 "),
               (r"\b(?:square|sq\.?) ([a-zA-Z]+)", r"\1 ^2"),
               (r"\bcubic ([a-zA-Z]+)", r"\1 ^3"), (r"\bsquared\b", "^2"), (r"\bcubed\b", "^3"),
               (r"\b([ckm]?m|ft|in)([23])\b", r"\1 ^\2"), (r"\bper\b", "/")]
_UNIT_TOKEN = re.compile(r"\s*([a-zA-Z]+\.?|\^-?[0-9]|/|-(?=[a-zA-Z])|\^\{(?:th|st|nd|rd)\})")
_CURRENCY = re.compile(r"([+-]?)\s*(?:\\(\$|euro|pounds)|(USD|US\\\$))\s*")
_TRAILING = re.compile(r"(?:\s*/?\s*\\text\s*\{[^{}]*\}(?:\s*\^\s*\{?-?[0-9]\}?)?|\\%|"
                       r"\^\\circ(?:\s*(?:\\text\s*\{)?[CF]\}?)?|(?<=[\w)}!]) [a-zA-Z]{2,}\.?)+$")


def _unit(text: str) -> tuple[str, int] | None:
    """(the unit in one spelling, what it multiplies the number by); None for what is no unit."""
    if not text.strip():
        return "", 1
    if text.lstrip().startswith("^") and not text.lstrip().startswith(r"^\circ"):
        return None
    written = "\\text" in text           # \text{m} is a unit where a bare m may be a variable
    adjacent = text[0].isalpha()         # 5cm
    for pattern, plain in _UNIT_SIGNS:
        text = re.sub(pattern, plain, text)
    text, tokens, place, factor = text.strip(), [], 0, 1
    while place < len(text):
        token = _UNIT_TOKEN.match(text, place)
        if not token or len(tokens) > 8:
            return None
        place, word = token.end(), token[1].rstrip(".")
        if word.lower() in _MAGNITUDES and not tokens:
            factor *= _MAGNITUDES[word.lower()]
            continue
        if word[0].isalpha():
            known = word if len(word) == 1 else word.lower()
            if word.lower() in _NO_UNITS or word in "ie" or known not in _UNITS and (
                    not written and (adjacent or len(word) < 3)):
                return None
            word = _UNITS.get(known, _singular(word.lower()))
        tokens += [word] if word and "{" not in word and word != "-" else []
    return ("" if tokens in (["^2"], ["^3"]) else " ".join(tokens).replace(" / ", "/")), factor


def _singular(word: str) -> str:
    for ending, end in (("ies", "y"), ("xes", "x"), ("ches", "ch"), ("shes", "sh"), ("sses", "ss")):
        if len(word) > len(ending) + 1 and word.endswith(ending):
            return word.removesuffix(ending) + end
    return word.removesuffix("s") if len(word) > 3 and not word.endswith("ss") else word


def _quantity(text: str) -> Quantity | None:
    """A number or expression, with or without a unit."""
    text = _ONE_SIGN.sub(lambda m: rf"\frac{{{m[1] or m[2]}}}{{{m[3] or m[4]}}}", text)
    unit = ""
    if money := _CURRENCY.match(text):
        unit = {"euro": "euro", "pounds": "pound"}.get(money[2], "dollar")
        text = money[1] + text[money.end():]
    if (found := _number(text)) and (after := _unit(found[1])):
        number, (trailing, factor) = found[0], after
        if unit and trailing and unit != trailing:
            unit = f"{unit} {trailing}"
        if factor != 1 and number.value is not None:
            number = replace(number, value=number.value * factor, last=None)
        return replace(number, unit=unit or trailing)
    if (trailing := _TRAILING.search(text)) and trailing.start() > 0:
        after = _unit(trailing[0])
        if after and after[1] == 1:
            unit, text = unit or after[0], text[:trailing.start()].strip()
    latex = _latex(text)
    return Quantity(latex, None, unit) if latex else None


# --------------------------------------------------------------------------------------------------
# Expressions

_COMMANDS = set(r"frac sqrt pi cdot times binom infty ln log lg sin cos tan cot sec csc arcsin "
                r"arccos arctan sinh cosh tanh alpha beta gamma delta theta lambda mu phi omega "
                r"sigma rho tau epsilon varphi Delta Gamma lvert rvert lfloor rfloor lceil rceil "
                r"vert mid div".split())
_PLAIN = re.compile(r"(?<![\\a-zA-Z])(pi|sqrt|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|"
                    r"cosh|tanh|log|ln|exp|alpha|beta|gamma|theta|lambda|phi|omega)(?![a-zA-Z])")
_MIXED = re.compile(r"(?<![\w.}])([0-9]+)\s*(\\frac\{[0-9]+\}\{[0-9]+\})")
# 1/2x, \\frac123 and \\sqrt12 may each mean two things.
_UNCLEAR = re.compile(r"/\s*(?:[0-9]+|[a-zA-Z])\s*(?:[a-zA-Z(]|\\(?!cdot|times))"
                      r"|\\frac\s*(?![\s{])|\\sqrt\s*[0-9]{2}")
_ILL = re.compile(r"[0-9] +\.?[0-9]|[a-zA-Z]{4}|[^\w\s+\-*/^(){}\[\].!|\\]|[^\x00-\x7f]|\.(?![0-9])"
                  r"|^[*/^_!]|[+\-*/^_]$")


def _latex(text: str) -> str | None:
    """The expression as algebra.py reads it; None for what is not understood."""
    text = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", text)
    text = _MIXED.sub(r"(\1+\2)", re.sub(r"\\log\s*_\s*([0-9a-z])", r"\\log_{\1}", text))
    text = _PLAIN.sub(r"\\\1", text.replace("**", "^"))
    for command, before, after in (("\\sqrt", "\\sqrt{", "}"), ("\\exp", "e^{", "}"),
                                   ("^", "^{", "}")):
        text = _braced(text, command, before, after)
    text = re.sub(r"\\exp(?![a-zA-Z])\s*(?=\{)", "e^", text)
    text = re.sub(r"\^\s*([+-]?[0-9]{2,}|-[0-9a-z])", r"^{\1}", text)
    text = re.sub(r"\\sqrt\s*([0-9a-zA-Z])(?![0-9])", r"\\sqrt{\1}", text)
    commands = set(re.findall(r"\\([a-zA-Z]+|.)", text))
    bare = re.sub(r"\\[a-zA-Z]+", " \\\\ ", text)
    if (not text or commands - _COMMANDS or _ILL.search(bare) or _UNCLEAR.search(text)
            or not _balanced(text) or text.count("(") != text.count(")")):
        return None
    return re.sub(r"([0-9]*)\.([0-9]+)", lambda m: rf"\frac{{{int(m[1] + m[2])}}}"
                  rf"{{1{'0' * len(m[2])}}}", text.replace("*", r"\cdot "))


def _braced(text: str, command: str, before: str, after: str) -> str:
    """command(…) becomes before…after, at the bracket that closes."""
    pattern = re.compile(re.escape(command) + r"\s*\(")
    while start := pattern.search(text):
        depth, end = 1, start.end()
        while end < len(text) and depth:
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        if depth:
            return text
        text = text[:start.start()] + before + text[start.end():end - 1] + after + text[end:]
    return text


# --------------------------------------------------------------------------------------------------
# Reading

_BASES = {word: base for base, word in enumerate(
    "two three four five six seven eight nine ten eleven twelve".split(), 2)} | {"sixteen": 16}
_BASED = re.compile(r"\(?([0-9A-F]+)\)?\s*(?:_|\(?base )\s*\{?\s*([0-9]+|[a-z]+)\s*[})]?")
_TIME = re.compile(r"([0-9]{1,2}):([0-9]{2})(?::([0-9]{2}))?|([0-9]{1,2})(?=\s*[ap]\.?m)")
_HALF = re.compile(r"\s*([ap])\.?\s*m\.?", re.IGNORECASE)
_MONTHS = {name: number for number, name in enumerate(
    "jan feb mar apr may jun jul aug sep oct nov dec".split(), 1)}
_MONTH = (r"(jan|feb|mar|apr|may|jun|jul|aug|sept?|oct|nov|dec)(?:[a-z]*)\.?")
_DATES = [re.compile(pattern, re.IGNORECASE) for pattern in (
    r"(?P<y>[0-9]{4})-(?P<m>[0-9]{1,2})-(?P<d>[0-9]{1,2})",
    rf"{_MONTH} (?P<d>[0-9]{{1,2}})(?:st|nd|rd|th)?(?:,? (?P<y>[0-9]{{4}}))?",
    rf"(?P<d>[0-9]{{1,2}})(?:st|nd|rd|th)? (?:of )?{_MONTH}(?:,? (?P<y>[0-9]{{4}}))?")]
_LETTER = re.compile(r"\(?\s*([A-Za-z])\s*\)?\s*[.:]?")
_CHOICE = re.compile(r"\(([A-J])\)\s*([^\s,;()].*)|([A-J])[.:)]\s+(\S.*)")
_WORDS = re.compile(r"[A-Za-z][A-Za-z' -]*[A-Za-z]")
_MATRIX = re.compile(r"\\begin\{([pbB]?)matrix\}(.*)\\end\{\1matrix\}", re.DOTALL)
_AND = r"(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])|\\text\s*\{\s*,?\s*(?:and|or)\s*\}"
_AND_WITHIN = re.compile(r"\\text\s*\{([^{}]*[^{}\s,]) +(and|or) *([^{}]*)\}")
_RELATION = r"=|<|>|\\(?:le|ge|ne|in|approx)(?![a-zA-Z])"
_NAME = re.compile(r"(?:[A-Za-z]|\\(?:alpha|beta|gamma|theta|lambda|mu|phi|omega|angle [A-Z]{1,3}))"
                   r"(?:_\{?[A-Za-z0-9]+\}?)?(?:\([a-zA-Z0-9,]+\))?|[A-Z]{2,3}"
                   r"|\([a-zA-Z](?:,[a-zA-Z])+\)|\\text\{[^{}]*\}|[A-Za-z]{4,}")
_MIRROR = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}


@functools.lru_cache(maxsize=4096)
def read(text: str) -> Shape | None:
    """The shape of an answer that `tidy` returned; None for what is not understood."""
    if not text or not _balanced(text):
        return None
    if (form := _form(text)) is not None:
        return form
    if letter := _LETTER.fullmatch(text):
        return Words(letter[1], bare=True)
    plain = " ".join(re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text).split())
    text = _AND_WITHIN.sub(r"\\text{\1} \2 \\text{\3}", text).replace(r"\text{}", "")
    if (texts := _several(text)) is not None:
        return _list(texts)
    if len(sides := _split(text, _RELATION)) > 1:
        return _relation([side for _, side in sides], [sign for sign, _ in sides[1:]])
    if text == r"\emptyset":
        return Parts("{}", ())
    if len(sets := _split(text, r"\\cup(?![a-zA-Z])")) > 1:
        return _parts("union", [each for _, each in sets])
    if matrix := _MATRIX.fullmatch(text):
        rows = [row for row in re.split(r"\\\\", matrix[2]) if row.strip()]
        return _all("matrix", [_parts("row", row.split("&")) for row in rows])
    if (inside := _bracketed(text)) is not None:
        return inside
    if len(_split(text, r"\\(?:pm|mp)(?![a-zA-Z])")) > 1 or "\\pm" in text:
        return _parts("list", [text.replace(r"\pm", "+").lstrip("+ "), text.replace(r"\pm", "-")]
                      ) if text.count(r"\pm") == 1 and r"\mp" not in text else None
    if _WORDS.fullmatch(plain) and plain.lower() not in _NAMES:
        return Words(plain.lower(), bare=plain == text and plain.isalpha())
    return _compound(plain) or _quantity(text)


def _parts(brackets: str, texts: list[str]) -> Parts | None:
    return _all(brackets, [read(text.strip()) for text in texts])


def _all(brackets: str, parts: list) -> Parts | None:
    return None if None in parts else Parts(brackets, tuple(parts))


def _form(text: str) -> Form | None:
    plain = " ".join(re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text).split())
    if (based := _BASED.fullmatch(plain)) and (base := _BASES.get(based[2], based[2])
                                              ) and str(base).isdigit():
        return Form("base", (based[1].lstrip("0") or "0", int(base)))
    if time := _TIME.match(plain):
        half, rest = _HALF.fullmatch(plain, time.end()), plain[time.end():]
        hour, minute, second = int(time[1] or time[4]), int(time[2] or 0), int(time[3] or 0)
        if (half or not rest.strip()) and hour < 25 and minute < 60 and second < 60:
            return Form("time", (hour, minute, second, half[1].lower() if half else ""))
    for pattern in _DATES:
        if date := pattern.fullmatch(plain):
            named = next((each for each in date.groups() if each and each[:3].lower() in _MONTHS),
                         None)
            month = _MONTHS[named[:3].lower()] if named else int(date["m"])
            if 1 <= month <= 12 and 1 <= int(date["d"]) <= 31:
                return Form("date", (date["y"] and int(date["y"]), month, int(date["d"])))
    if len(terms := _split(text, r":|\\colon(?![a-zA-Z])")) > 1:
        parts = [_quantity(term) if term else None for _, term in terms]
        return None if None in parts else Form("ratio", tuple(parts))
    if choice := _CHOICE.fullmatch(plain):
        return Form("choice", (choice[1] or choice[3], choice[2] or choice[4]))
    return None


def _several(text: str) -> list[tuple[str, str]] | None:
    """(mark before it, text) of each answer of a list; None if there is one only.

    The commas of one number part thousands.
    """
    if (number := _number(_CURRENCY.sub("", text, count=1))) and _unit(number[1]):
        return None
    marks = ";" if len(_split(text, ";")) > 1 else ","
    found = _split(text, rf"{marks}|{_AND}")
    if len(found) == 1:
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
    if names[0] and (not any(names[1:]) or set(names) == {names[0]}):
        values = tuple(shape.value if isinstance(shape, Named) else shape for shape in shapes)
        rays = all(isinstance(value, Parts) and len(value.brackets) == 2 for value in values)
        union = rays and all("or" in mark for mark, _ in found[1:])
        return Named(names[0], Parts("union" if union else "list", values))
    return Parts("list", tuple(shapes))


def _relation(sides: list[str], signs: list[str]) -> Shape | None:
    names = [_name(side) for side in sides]
    if r"\approx" in signs:
        return read(sides[1]) if not sides[0] and len(sides) == 2 else None
    if not all(sides):
        return None
    if len(sides) == 3:   # a < x < b
        ways = [_MIRROR.get(sign) for sign in signs]
        if names[1] and None not in ways and signs[0][-1:] + signs[1][-1:] in (
                "<<", "<e", "e<", ">>", ">e", "e>", "ee"):
            ends, lows = [sides[0], sides[2]], signs
            if ">" in "".join(signs) or r"\ge" in signs:
                ends, lows = ends[::-1], [_MIRROR[sign] for sign in signs[::-1]]
            if not set(lows) <= {"<", r"\le"}:
                return None
            interval = _parts(("(" if lows[0] == "<" else "[") + (")" if lows[1] == "<" else "]"),
                              ends)
            return interval and Named(names[1], interval)
        return None
    if len(sides) > 3:
        return None
    (left, right), sign = sides, signs[0]
    if sign == r"\in":
        value = read(right)
        return Named(names[0], value) if names[0] and value is not None else None
    if names[1] and not names[0]:
        left, right, sign, names = right, left, _MIRROR.get(sign, sign), names[::-1]
    if names[0] and not names[1]:
        value = read(right)
        if value is None:
            return None
        if sign == "=":
            return Named(names[0], value)
        if isinstance(value, Quantity) and sign in _MIRROR and not _letters(value):
            end = [Quantity(r"-\infty"), value] if sign in ("<", r"\le") else [
                value, Quantity(r"\infty")]
            brackets = {"<": "()", r"\le": "(]", ">": "()", r"\ge": "[)"}[sign]
            return Named(names[0], Parts(brackets, tuple(end)))
    latex = [_latex(each) for each in (left, right)]
    if None in latex:
        return None
    if sign in ("<", r"\le"):
        latex, sign = latex[::-1], _MIRROR[sign]
    return Relation(sign, f"({latex[0]})-({latex[1]})")


def _name(text: str) -> str:
    """The name, if the text is one, without braces and spaces."""
    text = re.sub(r"\s+(?=\()|(?<=\()\s+|\s+(?=\))|(?<=,)\s+", "", text)
    plain = re.sub(r"\\text\s*\{([^{}]*)\}|[{}]", r"\1", text).strip()
    named = _NAME.fullmatch(text) and plain.lower() not in _NAMES and text not in ("e", "i")
    return plain if named else ""


def _letters(quantity: Quantity) -> bool:
    """Whether an expression holds a variable."""
    return bool(re.search(r"[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", quantity.text)))


def _bracketed(text: str) -> Shape | None:
    pairs = {"(": ")]", "[": ")]", r"\{": (r"\}",)}
    opening = text[:2] if text.startswith("\\") else text[:1]
    closing = text[-2:] if text.endswith(r"\}") else text[-1:]
    inside = text[len(opening):-len(closing)]
    if closing not in pairs.get(opening, ()) or not _closes_at_end(text):
        return None
    if opening != r"\{" and not inside.strip():
        return None
    marks = ";" if len(_split(inside, ";")) > 1 else ","
    texts = [each for _, each in _split(inside, marks)]
    if opening == "(" and closing == ")" and len(texts) == 1:
        shape = read(inside.strip())
        return None if isinstance(shape, Quantity) and shape.value is None else shape
    if opening == r"\{":
        return _parts("{}", texts if inside.strip() else [])
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
    texts = re.findall(rf"{_DEC}\s*[a-zA-Z]+\.?", text)
    if len(texts) < 2 or "".join(texts).replace(" ", "") != text.replace(" ", ""):
        return None
    parts = [_quantity(each) for each in texts]
    named = all(part is not None and part.value is not None and part.unit for part in parts)
    return Parts("list", tuple(parts)) if named else None


# --------------------------------------------------------------------------------------------------
# Equality

def no_algebra(a: str, b: str, sign: str) -> bool | None:
    raise NeedsAlgebra


def equal(given: str, answer: str, algebra: Algebra = no_algebra) -> bool | None:
    """Whether two answers are equal; None where one of them is not understood.

    The same text is equal to itself. Raises NeedsAlgebra where expressions have to be compared and
    no algebra is given.
    """
    given, answer = tidy(given), tidy(answer)
    if _NEEDLESS.sub("", given) == _NEEDLESS.sub("", answer):
        return bool(given)
    a, b = read(given), read(answer)
    if isinstance(b, Parts):
        a = _as_list(a, given, b)
    elif isinstance(a, Parts):
        b = _as_list(b, answer, a)
    return None if a is None or b is None else _same(a, b, algebra)


def _as_list(shape: Shape | None, text: str, other: Parts) -> Shape | None:
    """One answer as the list of one, beside a set; 100,200 as two numbers, beside two."""
    if isinstance(shape, Quantity) and "," in text and other.brackets in ("list", "{}"):
        return _parts("list", text.split(","))
    one = isinstance(shape, (Quantity, Words)) and other.brackets == "{}"
    return Parts("list", (shape,)) if one else shape


def understood(answer: str, algebra: Algebra = no_algebra) -> bool:
    """Whether an answer is read, and equals itself without a look at its text."""
    shape = read(tidy(answer))
    return shape is not None and bool(_same(shape, shape, algebra))


def _same(a: Any, b: Any, algebra: Algebra) -> bool | None:
    if isinstance(a, Quantity) and isinstance(b, Quantity):
        return _same_quantity(a, b, algebra)
    if isinstance(a, Named) or isinstance(b, Named):
        return _same_named(a, b, algebra)
    if isinstance(a, Parts) and isinstance(b, Parts):
        return _same_parts(a, b, algebra)
    if isinstance(a, Form) and isinstance(b, Form):
        return _same_form(a, b, algebra)
    if isinstance(a, Relation) and isinstance(b, Relation):
        return a.sign == b.sign and algebra(a.text, b.text, a.sign)
    if isinstance(a, Words) and isinstance(b, Words):
        return a.text == b.text
    for one, other in ((a, b), (b, a)):
        if isinstance(one, Words) and one.bare and isinstance(other, Quantity):
            return other.value is None and algebra(one.text, other.text, "")
        if isinstance(one, Form) and one.kind == "choice" and isinstance(other, Words):
            return one.parts[0] == other.text
        if isinstance(one, Form) and one.kind == "base" and isinstance(other, Quantity):
            return one.parts[1] == 10 and _same_quantity(
                Quantity(one.parts[0], Fraction(one.parts[0])), other, algebra)
    return False


def _same_quantity(a: Quantity, b: Quantity, algebra: Algebra) -> bool | None:
    if a.unit and b.unit and a.unit != b.unit:   # 20% increase is 20%
        if not any(one.unit == "percent" and other.unit.startswith("percent ")
                   for one, other in ((a, b), (b, a))):
            return False
    verdict = _same_value(a, b, algebra)
    for one, other in ((a, b), (b, a)):   # 40% is 40 and 0.4
        if not verdict and one.unit == "percent" and not other.unit:
            part = Quantity(rf"\frac{{{_exact(one)}}}{{100}}", _hundredth(one.value), "",
                            _hundredth(one.last), one.digits)
            verdict = _same_value(part, other, algebra)
    return verdict


def _same_value(a: Quantity, b: Quantity, algebra: Algebra) -> bool | None:
    endless = [quantity.text.replace(" ", "").lstrip("+") in (r"\infty", r"-\infty")
               for quantity in (a, b)]
    if any(endless):
        return all(endless) and a.text.lstrip("+ ") == b.text.lstrip("+ ")
    if a.value is None or b.value is None:
        return algebra(_exact(a), _exact(b), "")
    if a.value == b.value:
        return True
    decimal, other = (a, b) if a.last is not None else (b, a)
    if decimal.last is None or other.last is not None or decimal.value is None:
        return False   # both are decimals, or none is
    # A rounded decimal counts for a fraction.
    return (decimal.digits >= 3 and decimal.value.denominator > 1
            and 2 * abs(a.value - b.value) <= decimal.last)


def _hundredth(value: Fraction | None) -> Fraction | None:
    return None if value is None else value / 100


def _exact(quantity: Quantity) -> str:
    value = quantity.value
    return quantity.text if value is None else (
        rf"\frac{{{value.numerator}}}{{{value.denominator}}}")


def _same_named(a: Any, b: Any, algebra: Algebra) -> bool | None:
    def as_relation(shape: Any) -> Relation | None:
        if isinstance(shape, Named) and isinstance(shape.value, Quantity) and not shape.value.unit:
            return Relation("=", f"({shape.name})-({shape.value.text})")
        return shape if isinstance(shape, Relation) else None

    if isinstance(a, Named) and isinstance(b, Named) and a.name == b.name:
        return _same(a.value, b.value, algebra)
    if isinstance(a, (Named, Relation)) and isinstance(b, (Named, Relation)):
        x, y = as_relation(a), as_relation(b)
        both = [s for s in (a, b) if isinstance(s, Named)]
        numbers = len(both) == 2 and not any(_letters(s.value) for s in both
                                             if isinstance(s.value, Quantity))
        if x is None or y is None or numbers or x.sign != y.sign:
            return False
        return algebra(x.text, y.text, "=")
    a, b = (s.value if isinstance(s, Named) else s for s in (a, b))
    return _same(a, b, algebra)


def _same_form(a: Form, b: Form, algebra: Algebra) -> bool | None:
    if {a.kind, b.kind} == {"time", "ratio"}:
        a, b = (Form("ratio", tuple(Quantity(str(part), Fraction(part)) for part in form.parts[:2]))
                if form.kind == "time" and not form.parts[2] and not form.parts[3] else form
                for form in (a, b))
    if a.kind != b.kind or len(a.parts) != len(b.parts):
        return False
    if a.kind == "time":
        times = [(hour % 12 if half else hour, minute, second, half)
                 for hour, minute, second, half in (a.parts, b.parts)]
        times = [(hour + 12 * (half == "p"), minute, second) if half and all(
            form.parts[3] or form.parts[0] > 12 for form in (a, b)) else (hour, minute, second)
            for hour, minute, second, half in times]
        return times[0] == times[1]
    if a.kind == "date":
        return a.parts[1:] == b.parts[1:] and (a.parts[0] == b.parts[0]
                                               or None in (a.parts[0], b.parts[0]))
    if a.kind == "choice":
        return a.parts[0] == b.parts[0] and equal(a.parts[1], b.parts[1], algebra)
    if a.kind == "base":
        return a.parts == b.parts
    return _every(_same_value(_product(a.parts[0], y), _product(b.parts[0], x), algebra)
                  for x, y in zip(a.parts[1:], b.parts[1:], strict=True))


def _product(a: Quantity, b: Quantity) -> Quantity:
    value = None if a.value is None or b.value is None else a.value * b.value
    return Quantity(rf"({_exact(a)})\cdot({_exact(b)})", value)


def _same_parts(a: Parts, b: Parts, algebra: Algebra) -> bool | None:
    for one, other in ((a, b), (b, a)):   # x = 4, y = 7 is (4, 7)
        if one.brackets == "list" and other.brackets == "()" and all(
                isinstance(part, Named) for part in one.parts):
            names = [part.name for part in one.parts]
            return names == sorted(names) and _in_order(
                [part.value for part in one.parts], other.parts, algebra)
    unordered = {"list", "{}"}
    if a.brackets != b.brackets and not {a.brackets, b.brackets} <= unordered:
        return False
    if a.brackets not in unordered | {"union"}:
        return _in_order(a.parts, b.parts, algebra)
    if len({sum(isinstance(part, Named) for part in each.parts) for each in (a, b)}) > 1:
        return False   # 4, 7 does not say which is x
    units = [[part.unit for part in each.parts if isinstance(part, Quantity)] for each in (a, b)]
    if max(len(set(each)) for each in units) > 1 and sorted(units[0]) != sorted(units[1]):
        return False   # 4 hours 10 minutes needs its units
    parts = [_distinct(each, algebra) if each.brackets == "{}" else list(each.parts)
             for each in (a, b)]
    if len(parts[0]) != len(parts[1]):
        return False
    unsure, rest = False, parts[1]
    for part in parts[0]:
        verdicts = [_same(part, other, algebra) for other in rest]
        if True in verdicts:
            rest.pop(verdicts.index(True))
        elif None in verdicts:
            unsure = True
        else:
            return False
    return None if unsure else True


def _distinct(of: Parts, algebra: Algebra) -> list:
    found = []
    for part in of.parts:
        if not any(_same(part, other, algebra) for other in found):
            found.append(part)
    return found


def _in_order(a: Any, b: Any, algebra: Algebra) -> bool | None:
    if len(a) != len(b):
        return False
    return _every(_same(x, y, algebra) for x, y in zip(a, b, strict=True))


def _every(verdicts: Any) -> bool | None:
    """False if one is False, else None if one is None, else True."""
    unsure = False
    for verdict in verdicts:
        if verdict is False:
            return False
        unsure |= verdict is None
    return None if unsure else True
