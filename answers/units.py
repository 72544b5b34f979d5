"""Reads what stands behind a number: a unit, and words such as million that multiply it."""

import re

from answers.expressions import FUNCTIONS, GREEK

_BASE = {"m": "meter", "g": "gram", "s": "second", "L": "liter", "l": "liter", "W": "watt",
         "J": "joule", "N": "newton", "V": "volt", "A": "ampere", "Hz": "hertz", "Pa": "pascal",
         "eV": "electronvolt", "mol": "mole", "K": "kelvin", "C": "coulomb", "F": "farad",
         "T": "tesla", "Wb": "weber", "B": "byte", "bit": "bit", "cal": "calorie", "pc": "parsec"}
_PREFIXES = {"p": "pico", "n": "nano", "u": "micro", "m": "milli", "c": "centi", "d": "deci",
             "k": "kilo", "M": "mega", "G": "giga", "T": "tera"}
_SPELLINGS = {
    "percent": "percents pct", "degree": "degrees deg", "dollar": "dollars usd bucks",
    "cent": "cents", "euro": "euros eur", "pound": "pounds lb lbs", "sterling": "gbp",
    "rupee": "rupees inr", "yen": "jpy", "meter": "meters metre metres", "gram": "grams",
    "centimeter": "centimeters centimetre centimetres", "kilometer": "kilometers kilometre "
    "kilometres", "millimeter": "millimeters millimetre millimetres", "kilogram": "kilograms kgs",
    "liter": "liters litre litres", "milliliter": "milliliters millilitre millilitres",
    "inch": "inches in", "foot": "feet ft", "yard": "yards yd yds", "mile": "miles mi",
    "ounce": "ounces oz", "ton": "tons tonne tonnes", "second": "seconds sec secs",
    "minute": "minutes min mins", "hour": "hours hr hrs", "day": "days", "week": "weeks",
    "month": "months", "year": "years yr yrs", "newton": "newtons", "joule": "joules",
    "watt": "watts", "volt": "volts", "ampere": "amperes amp amps", "ohm": "ohms",
    "mole": "moles", "person": "people persons", "child": "children", "man": "men",
    "woman": "women", "mouse": "mice", "foot/minute": "fpm", "mile/hour": "mph",
    "kilometer/hour": "kmh kph", "degree celsius": "celsius", "degree fahrenheit": "fahrenheit",
    "angstrom": "angstroms", "mmHg": "mmHg", "atmosphere": "atmospheres atm", "bar": "bars",
    "radian": "radians rad", "": "of the a an US"}
# These short units count without \text. Other short ones may be products of variables.
_BARE = set("cm mm km dm kg mg mL ml ms nm Hz kHz MHz GHz eV keV MeV GeV mol kJ kW MW kPa Pa GB MB "
            "kB cal kcal Wb bit".split())
_ADJACENT = set("cm mm km kg Hz".split())   # 5cm
_RATES = set("m/s m/s^2 km/h km/s cm/s m/min L/min g/L g/mL g/cm^3 kg/m^3 J/K J/mol kJ/mol N/m "
             "mol/L V/m W/m^2 rad/s km/hr".split())
_NOUNS = set("egg car cat dog box cup bag hat toy pie pen bus row cow hen pig can jar key".split())
_SPELLED = {word: unit for unit, words in _SPELLINGS.items() for word in [unit, *words.split()]
            if len(word) > 1}
UNITS = {p + u: prefix + name for p, prefix in _PREFIXES.items() for u, name in _BASE.items()} | (
    _BASE | _SPELLED | {"h": "hour", "a": ""})
_MAGNITUDES = {"dozen": 12, "hundred": 100, "thousand": 10 ** 3, "million": 10 ** 6,
               "billion": 10 ** 9, "trillion": 10 ** 12}
# These would change the number, or say that it is none.
_NO_UNITS = set(
    "and or not but is are was if than then least most more less fewer no never none to about "
    "between from plus minus over out mod am pm point remainder repeating recurring base "
    "binary octal hex hexadecimal decimal negative positive false wrong incorrect factorial choose "
    "half halves third thirds quarter quarters double triple twice squared cubed score scores "
    "billions trillions quadrillion lakh lakhs crore crores dozens hundreds thousands millions "
    "tenth tenths hundredth hundredths thousandth thousandths millionth millionths fourth fourths "
    "fifth fifths sixth sixths seventh sevenths eighth eighths ninth ninths zero one two three "
    "four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety ago root sqrt pi "
    "infinity infty inf power powers roots doubled halved tripled thrice quintillion googol "
    "myriad mille grand thou gross tens permille inverse reciprocal conjugate imaginary modulo "
    "ternary duodecimal exponent undefined without except until onward bn mn mil under above "
    "below till through larger smaller kilo mega square cube loss maximum minimum rest arcsec "
    "arccsc arccot det dim".split()) | {name.lower() for name in GREEK | FUNCTIONS - {"sec"}}
_NUMERAL = re.compile(   # 3 elevenths, 5 billionths, 3 twos
    r"[a-z]*illion(?:th)?s?|(?:eleven|twelf|(?:thir|four|fif|six|seven|eigh|nine)teen"
    r"|(?:twen|thir|for|fif|six|seven|eigh|nine)tie)ths?"
    r"|(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve)e?s")
_FUNCTION = re.compile(r"(?:sin|cos|tan|log|ln|exp|sqrt)[a-z]{0,2}")
_REWRITES = [(re.compile(pattern), plain) for pattern, plain in (
    (r"\\frac\s*\{\s*(\\text\s*\{[^{}]*\})\s*\}\s*\{\s*(\\text\s*\{[^{}]*\}\S*)\s*\}", r"\1/\2"),
    (r"\\mu\s*\\text\s*\{", r"\\text{u"), (r"\\text\s*\{([^{}]*)\}", r" \1 "),
    (r"[\\]%", " percent "), (r"\^\\circ\s*C\b", " degree celsius "),
    (r"\^\\circ\s*F\b", " degree fahrenheit "), (r"\^\\circ", " degree "), (r"\\\$", " dollar "),
    (r"\\euro(?![a-zA-Z])", " euro "), (r"\\Omega", " ohm "),
    (r"\\(?:cdot|times)(?![a-zA-Z])|·", " "),
    (r"\^\s*\{?(-?[0-9])\}?", r" ^\1 "),
    (r"\b(?:square|sq\.?) ([a-zA-Z]+)\.?", r"\1 ^2"), (r"\bcubic ([a-zA-Z]+)\.?", r"\1 ^3"),
    (r"\b([a-z]{2,}) squared\b", r"\1 ^2"), (r"\b([a-z]{2,}) cubed\b", r"\1 ^3"),
    (r"\b([ckm]?m|ft|in)([23])\b", r"\1 ^\2"), (r"\bper cent\b", " percent "),
    (r"\bper\b", "/"), (r"[()]", " "))]
_PER = re.compile(r"\s*(?:\\text\s*\{)?\s*per\b")
_TOKEN = re.compile(r"\s*(?:(?P<word>[a-zA-Z]+)\.?|(?P<power>\^-?[0-9])|(?P<over>/)"
                    r"|(?P<hyphen>(?<=[a-zA-Z])-(?=[a-zA-Z])))\s*")


def read_unit(text: str) -> tuple[str, int] | None:
    """(the unit in one spelling, what it multiplies the number by); None for what is no unit.

    text: what follows the number, in LaTeX. A bare letter is no unit, since it may be a variable.
    """
    if not text.strip():
        return "", 1
    adjacent = text[0].isalpha()
    written = "\\text" in text or re.sub(r"[\s{}]", "", text) in _RATES and not adjacent
    rate = bool(_PER.match(text))   # 18 per hour
    for pattern, plain in _REWRITES:
        text = pattern.sub(plain, text)
    found, place, factor, text = [], 0, 1, text.strip()
    if not text:
        return None
    while place < len(text):
        token = _TOKEN.match(text, place)
        if token is None or len(found) > 8:
            return None
        place, word = token.end(), token["word"]
        if word is None:
            # A sign stands behind a word, and / also before one: 18/hour.
            if not found and token["over"]:
                after = _TOKEN.match(text, place)
                if after is None or not rate and after["word"] not in _SPELLED or (
                        _SPELLED.get(after["word"]) in ("percent", "degree")):
                    return None
            elif not found or not found[-1][0].isalpha() and not (
                    token["over"] and found[-1].startswith("^")):
                return None
            if token["power"] and found[-1].split()[0] in ("percent", "degree", "dollar", "cent"):
                return None   # (40%)^2 is not 40
            found += [] if token["hyphen"] else [(token["power"] or "/").strip()]
        elif word.lower() in _MAGNITUDES:
            if any(found):
                return None
            factor *= _MAGNITUDES[word.lower()]
        elif (unit := _unit(word, written or rate, adjacent, bool(found))) is None:
            return None
        else:
            found += [unit] if unit else []
            adjacent = False
    if found and found[-1] == "/":
        return None
    return re.sub(" ?/ ?", "/", " ".join(found)), factor


def _unit(word: str, written: bool, adjacent: bool, behind: bool) -> str | None:
    """The word in one spelling; None for what is no unit. behind: it stands behind another one."""
    lower = word.lower()
    if lower in _NO_UNITS or _FUNCTION.fullmatch(lower) or _NUMERAL.fullmatch(lower):
        return None
    known = UNITS.get(word)
    if known is None and (len(word) > 3 or len(word) == 3 and word.isupper()):
        known = UNITS.get(lower)
    if known is not None:
        bare = word in _BARE or word in _SPELLED or lower in _SPELLED
        return known if written or bare and (not adjacent or word in _ADJACENT) else None
    short = written or behind or lower in _NOUNS   # years old
    if adjacent or len(word) < (3 if short else 4) or not written and (
            not re.search("[aeiou]", lower)):
        return None
    for ending, end in (("ies", "y"), ("xes", "x"), ("ches", "ch"), ("shes", "sh"), ("sses", "ss")):
        if len(word) > len(ending) + 1 and lower.endswith(ending):
            return lower.removesuffix(ending) + end
    lower = lower if len(word) > 3 else word
    return lower.removesuffix("s") if len(word) > 3 and not lower.endswith("ss") else lower


def same_unit(a: str, b: str) -> bool:
    """Whether two units agree: one is missing, or a kind of the other, or says unit."""
    if a == b or not a or not b:
        return True
    for one, other in ((a, b), (b, a)):
        if one in ("percent", "degree") and other.startswith(one + " "):   # 20% increase, 5 °C
            return True
        if one.startswith("/") and other.endswith(one):   # 18 per hour
            return True
        if one.split()[0] == "unit" and one.split()[1:] == other.split()[1:]:   # square units
            return True
    return False
