import os
import time

import pytest

import reward
from reward import extract_answer, score


@pytest.mark.parametrize("response, expected", [
    (r"so \boxed{42}.", "42"),
    (r"\boxed{1} no, \boxed{2}", "2"),                     # the last one
    (r"\boxed{\frac{1}{2}} done", r"\frac{1}{2}"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),                    # escaped braces do not count
    (r"\boxed{ 7 }", "7"),
    (r"\boxed{7", None),
    (r"\boxed{1} and \boxed{2", None),                     # an unclosed last box is no answer
    ("42", None),
    ("", None),
])
def test_extract_answer(response, expected):
    assert extract_answer(response) == expected


@pytest.mark.parametrize("given, answer, expected", [
    ("42", "42", 1.0), ("42", " 42 ", 1.0), ("042", "42", 1.0), ("42.0", "42", 1.0), ("+42", "42", 1.0),
    (".5", "0.50", 1.0), ("42", "43", 0.0), ("-42", "42", 0.0), ("", "42", 0.0), ("x", "x", 1.0),
])
def test_strings_and_numbers_need_no_worker(given, answer, expected, monkeypatch):
    monkeypatch.setattr(reward, "_pool", lambda count: pytest.fail("a worker was asked for"))
    assert score([rf"\boxed{{{given}}}"], [answer]) == [expected]


def test_math_verify_settles_the_rest_in_order():
    pairs = [(r"\frac{1}{2}", "0.5", 1.0), ("x+1", "1+x", 1.0), (r"\frac{1}{3}", "0.5", 0.0), ("1,000", "1000", 1.0),
             (r"\{1,2\}", r"\{2,1\}", 1.0), ("7", "7", 1.0), (r"\sqrt{8}", r"2\sqrt{2}", 1.0), (r"\frac{", "3", 0.0)]
    assert score([rf"\boxed{{{given}}}" for given, _, _ in pairs], [answer for _, answer, _ in pairs],
                 workers=2) == [expected for *_, expected in pairs]


def test_a_comparison_that_hangs_is_killed_and_the_others_go_on():
    hard = [rf"\boxed{{{text}}}" for text in (r"\frac{2}{4}", "9^{9^{9^{9^{9}}}}", r"\frac{3}{6}")]
    score(hard[:1], ["0.5"], workers=1)   # the worker is up
    first = reward._workers[0].process.pid
    start = time.monotonic()
    assert score(hard, ["0.5", "3", "0.5"], timeout=2.0, workers=1) == [1.0, 0.0, 1.0]
    assert time.monotonic() - start < 30   # 2 s for the one, and a new worker's start
    assert reward._workers[0].process.pid != first
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


def test_a_worker_that_dies_is_replaced():
    score([r"\boxed{\frac{2}{4}}"], ["0.5"], workers=1)
    reward._workers[0].process.kill()
    reward._workers[0].process.wait()
    assert score([r"\boxed{\frac{2}{4}}"], ["0.5"], workers=1) == [1.0]


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="2 responses but 1 answers"):
        score(["a", "b"], ["1"])


def test_no_box_no_reward_even_where_the_text_holds_the_answer():
    assert score(["the answer is 42", "42", ""], ["42", "42", "42"]) == [0.0, 0.0, 0.0]
