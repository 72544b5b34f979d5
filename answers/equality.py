"""When two answers are equal. docs/reward.md lists the rules."""

import re
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any

from answers.expressions import THOUSANDS, has_letters, left_undone
from answers.reading import (
    Form,
    Named,
    Parts,
    Quantity,
    Relation,
    Shape,
    Words,
    read,
    spaced_unit,
    tidy,
    without_needless_spaces,
)
from answers.units import same_unit


class NeedsAlgebra(Exception):
    """Two expressions have to be compared, and no algebra is given."""


# (expression, expression, sign) -> whether they are equal; None where one is not understood.
# sign is "" for values; else each expression stands on the left of this sign and 0 on the right.
Algebra = Callable[[str, str, str], bool | None]


def no_algebra(a: str, b: str, sign: str) -> bool | None:
    raise NeedsAlgebra


def equal(given: str, answer: str, algebra: Algebra = no_algebra) -> bool | None:
    """Whether an answer equals the reference; None where one of them is not understood.

    The same text is equal to itself. A calculation that is left undone is not equal to its result,
    or a policy that is asked for a sum would earn by writing the question into the box. Raises
    NeedsAlgebra where expressions have to be compared and no algebra is given.
    """
    given, answer = tidy(given), tidy(answer)
    if without_needless_spaces(given) == without_needless_spaces(answer):
        return bool(given)
    a, b = read(given), read(answer)
    if b is None:
        return None
    a = _read_as(a, given, b)
    if a is None:
        return None
    results = [] if isinstance(b, Relation) else _quantities(b)
    if results and all(each.value is not None or r"\infty" in each.text for each in results) and (
            _undone(a)):
        return False
    if isinstance(a, Quantity) and a.unit and (found := spaced_unit(answer)):   # 5 m for 5 meters
        b = found if found.unit == a.unit else b
    if isinstance(a, Relation) and isinstance(b, Quantity):   # m + n = 5 for 5
        return a.value is not None and same(a.value, b, algebra)
    a, b = _unnumbered(a, b), _unnumbered(b, a)
    if isinstance(a, Named) != isinstance(b, Named) and not isinstance(a, Relation) and (
            not isinstance(b, Relation)):
        a, b = (shape.value if isinstance(shape, Named) else shape for shape in (a, b))
    for shape in (a, b):
        if isinstance(shape, Parts) and shape.brackets == "{}":   # 5 is {5}
            a, b = (each if isinstance(each, Parts) and each.brackets in ("{}", "list", "or")
                    else Parts("list", (each,)) for each in (a, b))
            break
    return same(a, b, algebra)


def is_undone(answer: str) -> bool:
    """Whether an answer holds a calculation that is left undone."""
    return _undone(read(tidy(answer)))


def _undone(shape: Shape | None) -> bool:
    return any(each.value is None and left_undone(each.text) for each in _quantities(shape))


def _quantities(shape: Any) -> list[Quantity]:
    shape = shape.value if isinstance(shape, (Named, Relation)) else shape
    if isinstance(shape, Parts):   # 5 \pm 2 is an answer
        return [each for part in shape.parts * (not shape.by_sign) for each in _quantities(part)]
    if isinstance(shape, Form) and shape.kind == "choice":
        return _quantities(read(tidy(shape.parts[1])))
    return [shape] if isinstance(shape, Quantity) else []


_ROOT = re.compile(r"([xyztrk]|\\lambda)_?[0-9]+")


def _unnumbered(shape: Shape, other: Shape) -> Shape:
    """x_1 = 2, x_2 = 3 as the values of x, if the other answer does not number them.

    Numbered roots have no order; a_1, a_2, the terms of a sequence, have one.
    """
    parts = shape.parts if isinstance(shape, Parts) and shape.brackets == "list" else ()
    numbered = [_ROOT.fullmatch(part.name) if isinstance(part, Named) else None for part in parts]
    names = {match[1] if match else None for match in numbered}
    values = other.value if isinstance(other, Named) and other.name in names else other
    if len(names) != 1 or None in names or len({part.name for part in parts}) < len(parts) or (
            not isinstance(values, Parts) or values.brackets not in ("list", "{}")) or any(
            isinstance(part, Named) for part in values.parts):
        return shape
    found = Parts("list", tuple(part.value for part in parts))
    return Named(other.name, found) if isinstance(other, Named) else found


def _read_as(a: Shape | None, given: str, b: Shape) -> Shape | None:
    """The given answer in the form of the reference, where it may have it too."""
    if isinstance(a, Quantity) and "," in given and isinstance(b, Parts) and (
            b.brackets in ("list", "{}")):     # 216,343 for the list 216, 343
        texts = given.split(",")
        parts = [read(text) for text in texts if text == "0" or not text.startswith("0")]
        return Parts("list", tuple(parts)) if len(parts) == len(texts) and None not in parts else a
    if isinstance(a, Parts) and isinstance(b, Parts) and len(a.parts) < len(b.parts) and (
            ",0" not in given):   # 1,000 and 2 is not 1, 0, 2
        again = read(THOUSANDS.sub(lambda match: match[0].replace(",", ", "), given))
        if isinstance(again, Parts) and len(again.parts) == len(b.parts):   # 100,200 and 300
            return again
    if isinstance(a, Form) and a.kind == "time" and isinstance(b, Form) and b.kind == "ratio" and (
            a.parts[2] is None and not a.parts[3]):   # 10:15 for 2:3
        return Form("ratio", tuple(Quantity(str(part), Fraction(part)) for part in a.parts[:2]))
    if isinstance(a, Quantity) and a.value is None and not a.unit and isinstance(b, Quantity) and (
            b.value is not None or b.unit):       # 5 m for 5
        found = spaced_unit(given)
        return found if found and found.value is not None else a
    return a


def understood(answer: str, algebra: Algebra = no_algebra) -> bool:
    """Whether an answer is read, and equals itself without a look at its text."""
    shape = read(tidy(answer))
    return shape is not None and bool(same(shape, shape, algebra))


def same(a: Any, b: Any, algebra: Algebra) -> bool | None:
    if isinstance(a, Quantity) and isinstance(b, Quantity):
        return _same_quantity(a, b, algebra)
    if isinstance(a, (Named, Relation)) or isinstance(b, (Named, Relation)):
        return _same_named(a, b, algebra)
    if isinstance(a, Parts) and isinstance(b, Parts):
        return _same_parts(a, b, algebra)
    if isinstance(a, Form) and isinstance(b, Form):
        return _same_form(a, b, algebra)
    if isinstance(a, Words) and isinstance(b, Words):
        # xE is not xe, nor Mg mg, but Red is red, and XIV is xiv.
        mixed = any(word.product and not (
            word.written.islower() or word.written.isupper()
            or word.written.istitle() and re.search("[aeiouy]", word.text)) for word in (a, b))
        return a.text == b.text and (not mixed or a.written == b.written)
    for one, other in ((a, b), (b, a)):
        if isinstance(one, Words) and isinstance(other, Quantity):
            return bool(one.product) and other.value is None and not other.unit and algebra(
                one.product, other.text, "")
        if isinstance(one, Form) and one.kind == "choice" and not isinstance(other, Form):
            return isinstance(other, Words) and one.parts[0] == other.text or same(
                read(tidy(one.parts[1])), other, algebra)
        if isinstance(one, Form) and one.kind == "base" and isinstance(other, Quantity):
            return one.parts[1] == 10 and other.value == int(one.parts[0])
    return False


# --------------------------------------------------------------------------------------------------
# Quantities

def _same_quantity(a: Quantity, b: Quantity, algebra: Algebra) -> bool | None:
    if not same_unit(a.unit, b.unit):
        return False
    verdict = _same_value(a, b, algebra)
    for one, other in ((a, b), (b, a)):   # 40% is 40 and 0.4
        if not verdict and one.unit == "percent" and not other.unit:
            part = Quantity(rf"\frac{{{one.text}}}{{100}}", _hundredth(one.value), "",
                            _hundredth(one.last), one.digits)
            verdict = _same_value(part, other, algebra)
    return verdict


def _same_value(a: Quantity, b: Quantity, algebra: Algebra) -> bool | None:
    endless = [r"\infty" in quantity.text for quantity in (a, b)]
    if any(endless):
        return all(endless) and a.text == b.text
    if a.value is None or b.value is None:
        return algebra(a.text, b.text, "")
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


# --------------------------------------------------------------------------------------------------
# Names, equations, inequalities

def _same_named(a: Any, b: Any, algebra: Algebra) -> bool | None:
    if isinstance(a, Named) and isinstance(b, Named):
        if a.name == b.name:
            return same(a.value, b.value, algebra)
        if not any(map(_may_be_equation, (a, b))):
            return False
    if isinstance(a, (Named, Relation)) and isinstance(b, (Named, Relation)):
        x, y = _as_relation(a), _as_relation(b)
        if x is None or y is None or x.sign != y.sign:
            return False
        return algebra(x.text, y.text, x.sign)
    if isinstance(a, Relation) or isinstance(b, Relation):
        return False
    a, b = (shape.value if isinstance(shape, Named) else shape for shape in (a, b))
    return same(a, b, algebra)


def _may_be_equation(named: Named) -> bool:
    """y = 2x + 1 may be solved for x; y = 3 is a value."""
    return isinstance(named.value, Words) or (isinstance(named.value, Quantity)
                                              and has_letters(named.value.text))


def _as_relation(shape: Named | Relation) -> Relation | None:
    if isinstance(shape, Relation):
        return shape
    value = shape.value
    text = (value.text if isinstance(value, Quantity) and not value.unit
            else value.product if isinstance(value, Words) else "")
    return Relation("=", f"({shape.text})-({text})") if shape.text and text else None


# --------------------------------------------------------------------------------------------------
# Forms

def _same_form(a: Form, b: Form, algebra: Algebra) -> bool | None:
    if a.kind != b.kind or len(a.parts) != len(b.parts):
        return False
    if a.kind == "time":
        minutes = [(time.parts[1], time.parts[2] or 0) for time in (a, b)]
        return bool(_hours(a) & _hours(b)) and minutes[0] == minutes[1] and (
            bool(a.parts[3] or b.parts[3]) or a.parts[0] == b.parts[0])
    if a.kind == "date":
        return a.parts[1:] == b.parts[1:] and (a.parts[0] == b.parts[0]
                                               or None in (a.parts[0], b.parts[0]))
    if a.kind == "choice":
        return a.parts[0] == b.parts[0] and equal(a.parts[1], b.parts[1], algebra)
    if a.kind == "base":
        return a.parts == b.parts
    nothing = Quantity("0", Fraction(0))
    if any(_same_value(part, nothing, algebra) is not False for part in (*a.parts, *b.parts)):
        return _in_order(a.parts, b.parts, algebra)   # there is no common factor
    return _every(_same_value(_product(a.parts[0], y), _product(b.parts[0], x), algebra)
                  for x, y in zip(a.parts[1:], b.parts[1:], strict=True))


def _hours(time: Form) -> set[int]:
    """The hours of the day that a time may mean."""
    hour, half = time.parts[0], time.parts[3]
    if half:
        return {hour % 12 + 12 * (half == "p")}
    return {hour % 12, hour % 12 + 12} if 1 <= hour <= 12 else {hour % 24}


def _product(a: Quantity, b: Quantity) -> Quantity:
    value = None if a.value is None or b.value is None else a.value * b.value
    return Quantity(rf"({a.text})\cdot({b.text})", value)


# --------------------------------------------------------------------------------------------------
# Several parts

def _same_parts(a: Parts, b: Parts, algebra: Algebra) -> bool | None:
    for one, other in ((a, b), (b, a)):   # x = 4, y = 7 is (4, 7)
        if one.brackets == "list" and other.brackets == "()" and all(
                isinstance(part, Named) for part in one.parts):
            in_order = sorted(one.parts, key=lambda part: [
                int(piece) if piece.isdigit() else piece   # x_2 stands before x_10
                for piece in re.split("([0-9]+)", part.name)])
            return _in_order([part.value for part in in_order], other.parts, algebra)
    kinds = {a.brackets, b.brackets}
    if len(kinds) > 1 and kinds not in ({"list", "{}"}, {"list", "sum"}):
        return False
    if not kinds <= {"list", "or", "sum", "{}", "union"} or any(   # 1, 2, 3, … has an order
            isinstance(part, Words) and part.text == "dots" for part in (*a.parts, *b.parts)):
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
        verdicts = [same(part, other, algebra) for other in rest]
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
        if not any(same(part, other, algebra) for other in found):
            found.append(part)
    return found


def _in_order(a: Any, b: Any, algebra: Algebra) -> bool | None:
    return len(a) == len(b) and _every(same(x, y, algebra) for x, y in zip(a, b, strict=True))


def _every(verdicts: Iterable[bool | None]) -> bool | None:
    """False if one is False, else None if one is None, else True."""
    unsure = False
    for verdict in verdicts:
        if verdict is False:
            return False
        unsure |= verdict is None
    return None if unsure else True
