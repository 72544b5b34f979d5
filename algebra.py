r"""Whether two expressions are equal: Math-Verify's parser reads them, sympy and mpmath compare.

Numbers are compared as fractions where they are rational, else to 1,000 digits; functions at random
points. This runs in the worker processes of verify.py, because a comparison can take forever or all
memory.
"""

import contextlib
import functools
import math
import random
import warnings
from fractions import Fraction
from typing import Any

import sympy
from latex2sympy2_extended import latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from sympy.core.evalf import PrecisionExhausted
from sympy.core.function import AppliedUndef

DIGITS = (30, 120, 1000)   # significant digits to which two numbers must agree, one after another
POINTS, TRIES = 6, 60      # points at which two functions must agree, and those tried
BITS = 1 << 18             # the largest integers that are computed exactly


def equal(a: str, b: str, sign: str = "") -> bool | None:
    """Whether two LaTeX expressions are equal; None where one is not understood.

    sign "": as values, or as functions of their variables. Else they are relations `a sign 0` and
    `b sign 0`, equal if a is a constant times b: any constant but 0 for = and \\ne, one above 0 for
    > and \\ge.
    """
    x, y = _parse(a), _parse(b)
    if x is None or y is None:
        return None
    if x.has(AppliedUndef) or y.has(AppliedUndef):   # f(x) has no value
        return True if x == y else None
    if not x.free_symbols | y.free_symbols:
        return None if sign else _equal_numbers(x, y)
    return _equal_functions(x, y, sign)


@functools.lru_cache(maxsize=1024)
def _parse(text: str) -> sympy.Expr | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = latex2sympy(text, normalization_config=None, conversion_config=ConversionConfig(
                interpret_as_mixed_fractions=False, lowercase_symbols=False))
        except Exception:   # the parser raises bare exceptions where it cannot read
            return None
    if not isinstance(found, sympy.Expr) or found.has(sympy.Float, sympy.nan, sympy.zoo, sympy.oo):
        return None
    return found.subs({sympy.Symbol("e"): sympy.E, sympy.Symbol("i"): sympy.I})


# --------------------------------------------------------------------------------------------------
# Numbers

def _equal_numbers(x: sympy.Expr, y: sympy.Expr) -> bool | None:
    with contextlib.suppress(_NoFraction):
        return _fraction(x) == _fraction(y)
    for digits in DIGITS:
        try:
            u, v = (value.evalf(digits, maxn=4 * digits, strict=True) for value in (x, y))
        except PrecisionExhausted:   # mostly a part that is exactly 0
            return sympy.simplify(x - y) == 0 or None
        if any(not value.is_number or value.has(sympy.nan, sympy.zoo, sympy.oo) for value in (u, v)
               ):
            return None
        if abs(u - v) > max(abs(u), abs(v)) * sympy.Float(10, digits) ** (3 - digits):
            return False
    return True


class _NoFraction(Exception):
    """A number is not rational by its form, or too large."""


def _fraction(x: Any) -> Fraction:
    """The exact value. Raises _NoFraction."""
    if isinstance(x, sympy.Rational):
        return Fraction(x.p, x.q)
    if not isinstance(x, (sympy.Add, sympy.Mul, sympy.Pow, sympy.factorial)):
        raise _NoFraction
    first, *others = parts = [_fraction(part) for part in x.args]
    if any(_bits(part) > BITS for part in parts):
        raise _NoFraction
    if isinstance(x, sympy.Add):
        return sum(parts, Fraction(0))
    if isinstance(x, sympy.Mul):
        return math.prod(parts, start=Fraction(1))
    if isinstance(x, sympy.factorial):
        if first.denominator > 1 or not 0 <= first < 5000:
            raise _NoFraction
        return Fraction(math.factorial(int(first)))
    power = others[0]
    if power.denominator > 1 or abs(power) * _bits(first) > BITS or not first and power <= 0:
        raise _NoFraction
    return first ** int(power)


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


# --------------------------------------------------------------------------------------------------
# Functions

def _equal_functions(x: sympy.Expr, y: sympy.Expr, sign: str) -> bool | None:
    variables, rng = sorted(x.free_symbols | y.free_symbols, key=str), random.Random(0)
    ratios: list[sympy.Expr] = []
    for number in range(TRIES):
        low = 1 if number % 2 else -4000   # roots and logarithms need numbers above 0
        point = {variable: sympy.Rational(rng.randint(low, 4000), 1009) for variable in variables}
        u, v = _value(x, point), _value(y, point)
        if u is None or v is None:         # not real here
            continue
        if not u or not v:
            if u or v:
                return False
            continue
        ratios.append(u / v)
        if abs(ratios[-1] - (ratios[0] if sign else 1)) > abs(ratios[0]) * sympy.Float("1e-30", 40):
            return False
        if len(ratios) == POINTS:
            return not (sign in (">", r"\ge") and ratios[0] < 0)
    return None


def _value(x: sympy.Expr, point: dict) -> Any:
    """The value with 40 digits, 0 where it is 0; None where it is not a real number."""
    value: Any = x.subs(point).evalf(40)
    if not value.is_Float and not value.is_Rational:
        return None
    # evalf marks what cancels to nothing by a precision of a few bits.
    return sympy.Integer(0) if value.is_Float and value._prec < 100 else value
