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
POINTS = 8                 # points at which two functions must agree
BITS = 1 << 22             # the largest integers that are computed exactly


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
        return _fraction(x, {}) == _fraction(y, {})
    if x == y:
        return True
    for digits in DIGITS:
        try:
            u, v = (value.evalf(digits, maxn=4 * digits, strict=True) for value in (x, y))
        except PrecisionExhausted:   # mostly a part that is exactly 0
            return sympy.simplify(sympy.expand_complex(x - y)) == 0 or None
        if any(not value.is_number or value.has(sympy.nan, sympy.zoo, sympy.oo) for value in (u, v)
               ):
            return None
        if abs(u - v) > max(abs(u), abs(v)) * sympy.Float(10, digits) ** (3 - digits):
            return False
    # Small numbers that differ do so within 1,000 digits.
    return True if not _large(x) and not _large(y) else sympy.simplify(x - y) == 0 or None


def _large(x: sympy.Expr) -> bool:
    """Whether it has large integers, exponents or arguments."""
    exponents: list[Any] = [each.args[-1] for each in x.atoms(sympy.Pow, sympy.Function)]
    return (any(abs(each) > 10 ** 50 for each in x.atoms(sympy.Rational))
            or any(abs(each.evalf(15)) > 200 for each in exponents))


class _NoFraction(Exception):
    """A number is not rational by its form, or too large."""


def _fraction(x: Any, point: dict) -> Fraction:
    """The exact value at a point. Raises _NoFraction."""
    x = point.get(x, x)
    if isinstance(x, sympy.Rational):
        return Fraction(x.p, x.q)
    if not isinstance(x, (sympy.Add, sympy.Mul, sympy.Pow, sympy.factorial)):
        raise _NoFraction
    first, *others = parts = [_fraction(part, point) for part in x.args]
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
    """Compares them at points. Where both are complex, a point counts only if they agree."""
    variables, rng = sorted(x.free_symbols | y.free_symbols, key=str), random.Random(0)
    rough = _rough(x) or _rough(y)
    needed, agreed, ratio = POINTS * (3 if rough else 1), 0, None
    scale = max([300, *(abs(each) for each in x.atoms(sympy.Integer) | y.atoms(sympy.Integer)
                        if abs(each) < 10 ** 9)])
    steps = x.has(sympy.floor, sympy.ceiling) or y.has(sympy.floor, sympy.ceiling)
    for number in range(4 * needed):
        kind = 5 if rough and number % 2 else number % 8
        point = {variable: _coordinate(kind, rng, int(scale), steps) for variable in variables}
        u, v = _value(x, point), _value(y, point)
        if u is None or v is None:
            continue
        if u.is_real != v.is_real:
            # One that writes |x| means numbers below 0, too: \ln|x| is not \ln x. Without it, the
            # domain is mostly left unsaid, as in \ln x^2 = 2\ln x.
            if x.has(sympy.Abs) != y.has(sympy.Abs) and _needs_domain(y if u.is_real else x):
                return False
            continue
        if u == 0 or v == 0:
            if u != v:
                return False
            agreed += not sign
        elif sign and ratio is None:
            if not (u / v).is_real and sign in (">", r"\ge"):
                continue
            ratio, agreed = u / v, agreed + 1
        elif _near(u, v * ratio if sign else v):
            agreed += 1
        elif u.is_real:
            return False
        if agreed == needed:
            return sign not in (">", r"\ge") or bool(ratio is not None and ratio > 0)
    return None


def _needs_domain(x: sympy.Expr) -> bool:
    """Whether it has a logarithm or an even root."""
    return x.has(sympy.log) or any(isinstance(power.exp, sympy.Rational) and power.exp.q % 2 == 0
                                   for power in x.atoms(sympy.Pow))


def _rough(x: sympy.Expr) -> bool:
    """Whether it may change its form from one region to the next, as |x| does."""
    return x.has(sympy.floor, sympy.ceiling, sympy.Abs) or any(
        not power.exp.is_Integer for power in x.atoms(sympy.Pow))


def _coordinate(kind: int, rng: random.Random, scale: int, steps: bool) -> Any:
    """A number for a variable. `kind` chooses its size and sign, and whether it is whole.

    Most kinds are above 0, because roots and logarithms need that. scale: the largest constant of
    the expressions, near which |x - 1000| changes its form. steps: whether whole numbers may be
    larger; they show where a floor or ceiling differs, but 2^{2^n} would take too long.
    """
    low, high, parts = ((0, 4, 1009), (-4, 4, 1009), (1, 12, 1), (0, 60, 1009), (-12, 12, 1),
                        (-3 * scale, 3 * scale, 1009), (1, 40 if steps else 9, 1),
                        (0, 1, 1009))[kind]
    return sympy.Rational(rng.randint(low * parts + (parts > 1), high * parts), parts)


def _value(x: sympy.Expr, point: dict) -> Any:
    """The value: exact if it is rational, else with 250 digits; None where there is none."""
    with contextlib.suppress(_NoFraction):
        exact = _fraction(x, point)
        return sympy.Rational(exact.numerator, exact.denominator)
    parts: Any = x.evalf(250, subs=point).as_real_imag()   # x.subs may try to factor large numbers
    if not all(part.is_Float or part.is_Rational for part in parts):
        return None
    # evalf marks what cancels to nothing by a precision of a few bits.
    real, imaginary = (part if part.is_Rational or part._prec > 100 else sympy.Integer(0)
                       for part in parts)
    return real + imaginary * sympy.I


def _near(u: Any, v: Any) -> bool:
    if u.is_Rational and v.is_Rational:
        return u == v
    return abs(u - v) <= abs(u) * sympy.Float("1e-230", 250)
