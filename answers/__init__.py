r"""When two final answers are equal.

    equal(r"37.5\%", "37.5")                          # True
    equal("(7, 4)", "x = 4, y = 7")                   # False, because the order differs
    equal(r"\sqrt{8}", r"2\sqrt{2}")                  # raises NeedsAlgebra
    equal(r"\sqrt{8}", r"2\sqrt{2}", algebra.equal)   # True

box.py finds the answer in a text. reading.py reads the shape of an answer, with units.py and
expressions.py; equality.py compares two shapes, and docs/reward.md lists its rules. Numbers are
compared as fractions, exactly; algebra.py, which alone imports sympy, compares expressions.
"""

from answers.box import last_box
from answers.equality import NeedsAlgebra, equal, is_undone, understood
from answers.reading import read, tidy

__all__ = ["NeedsAlgebra", "equal", "is_undone", "last_box", "read", "tidy", "understood"]
