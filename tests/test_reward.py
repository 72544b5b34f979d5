import json
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reward
import verify
from data import Problem
from own_reward import OwnReward, RewardError
from reward import Notes, count_votes, extract_answer, find_unclear, score, settle

ROOT = Path(__file__).resolve().parent.parent


def box(answer: str) -> str:
    return rf"So it is \boxed{{{answer}}}."


# --------------------------------------------------------------------------------------------------
# Extraction

@pytest.mark.parametrize("response, expected", [
    (r"so \boxed{42}.", "42"),
    (r"\boxed{1} no, \boxed{2}", "2"),                     # the last box counts
    (r"\boxed{\frac{1}{2}} done", r"\frac{1}{2}"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),                    # escaped braces do not count
    (r"\boxed{\\{1}}", r"\\{1}"),                          # braces after an escaped backslash count
    (r"\boxed{ 7 }", "7"),
    (r"\fbox{7}", "7"),
    (r"\boxed{6} or \fbox{7}", "7"),
    (r"\boxed {7}", "7"),
    (r"\boxed 5", "5"),
    (r"$\boxed 5$ apples", "5"),
    (r"\boxed5.", "5"),
    (r"\boxed\frac12$", r"\frac12"),
    (r"$\boxed\frac{1}{2}$", r"\frac{1}{2}"),
    (r"\boxed{1 \boxed{2}}", "2"),                         # the inner box counts
    (r"\boxed{}", None),
    (r"\boxed{3}" + r"\boxed{}" * 100_000, "3"),
    (r"\boxed{5}, as asked, in \boxed{}.", "5"),          # an empty box does not count
    (r"\boxed{7", None),
    (r"\boxed", None),
    (r"\boxed{1} and \boxed{2", None),                     # an unclosed last box is no answer
    (r"\boxedness{3}", None),
    ("42", None),
    ("", None),
])
def test_the_last_box_holds_the_answer(response, expected):
    assert extract_answer(response) == expected


@pytest.mark.parametrize("answer_format, response, expected", [
    ("gsm8k", "2 + 2 = 4\n#### 4", "4"),
    ("gsm8k", "#### 4\n#### 1,234\nmore", "1,234"),
    ("gsm8k", r"\boxed{4}", None),
    ("tags", "<think>5</think><answer> 4 </answer>", "4"),
    ("tags", r"<answer>it is \boxed{4}</answer>", "4"),
    ("tags", "<answer>3</answer><answer>4", "3"),
    ("tags", "4</answer>", None),
])
def test_gsm8k_and_tags_answers_are_extracted_and_scored(answer_format, response, expected):
    assert extract_answer(response, answer_format) == expected
    assert score([response], ["4"], answer_format=answer_format) == [float(expected == "4")]
    if answer_format == "gsm8k":   # GSM8K's references are worked solutions
        assert score([response], ["2 + 2 is 4\n#### 4"],
                     answer_format=answer_format) == [float(expected == "4")]


# --------------------------------------------------------------------------------------------------
# Scores

@pytest.mark.parametrize("given, answer, expected", [
    ("42", "42", 1.0), ("42", " 42 ", 1.0), ("042", "42", 1.0), ("42.0", "42", 1.0),
    ("+42", "42", 1.0), ("42.", "42", 1.0), (".5", "0.50", 1.0), ("42", "43", 0.0),
    ("-42", "42", 0.0), ("", "42", 0.0), ("x", "x", 1.0), ("x + 1", "x+1", 1.0),
    ("1,234,567", "1234567", 1.0), ("12{,}345", "12345", 1.0), (r"\frac{1}{2}", "0.5", 1.0),
    (r"\dfrac{1}{2}", "1/2", 1.0), (r"-\frac{6}{4}", "-1.5", 1.0), (r"\frac{-1}{2}", "0.5", 0.0),
    ("$7$", "7", 1.0), ("1/3", "2/3", 0.0), (r"\left( 1, 2 \right)", "(1, 2)", 1.0),
    ("123456789.123456789", "123456789.123456788", 0.0),
])
def test_strings_and_numbers_need_no_worker(given, answer, expected, monkeypatch):
    monkeypatch.setattr(reward, "compare", lambda *arguments: pytest.fail("score used a worker"))
    assert score([box(given)], [answer]) == [expected]


def test_workers_settle_the_rest_in_order():
    pairs = [(r"\frac{2}{\sqrt{16}}", "0.5", 1.0), ("x+1", "1+x", 1.0),
             (r"\frac{1}{3}", "0.333333", 1.0), ("5 cm", "5", 1.0), (r"\{1,2\}", r"\{2,1\}", 1.0),
             ("7", "7", 1.0), (r"\sqrt{8}", r"2\sqrt{2}", 1.0), (r"\frac{", "3", 0.0),
             ("1, 234", "1234", 0.0)]
    assert score([box(given) for given, _, _ in pairs], [answer for _, answer, _ in pairs],
                 workers=2) == [expected for *_, expected in pairs]


@pytest.mark.parametrize("response, answer", [
    (" ".join(rf"\boxed{{{i}}}" for i in range(50)), "42"),   # the last of 50 boxes is wrong
    (box("x"), "42"),                                          # x could stand for any number
    (box("42 or 43"), "42"), (box("1, 2, 42"), "42"), (box(r"\{41, 42\}"), "42"),
    (box(r"42 \text{ or } 43"), "42"), (r"\boxed{41}\boxed{42}\boxed{43}", "42"),
    (box(r"41}\boxed{42}\boxed{43"), "42"), (box("42=43"), "42"), (box(r"42\pm 1"), "42"),
    (box("42;43"), "42"), (box(r"\text{the right answer}"), "42"),
    ("42", "42"), ("the answer is 42", "42"), ("", "42"),      # there is no box
])
def test_guessing_earns_nothing(response, answer):
    assert score([response], [answer]) == [0.0]


def test_unequal_lengths_and_unknown_formats_are_errors():
    with pytest.raises(ValueError, match="2 responses but 1 answers"):
        score(["a", "b"], ["1"])
    with pytest.raises(ValueError, match="'xml'"):
        score(["a"], ["1"], answer_format="xml")


whole = st.integers(-10 ** 12, 10 ** 12)
decimals = st.decimals(-10 ** 6, 10 ** 6, places=3, allow_nan=False).map(str)
fractions = st.tuples(whole, st.integers(1, 10 ** 6)).map(
    lambda pair: rf"\frac{{{pair[0]}}}{{{pair[1]}}}")
numbers = whole.map(str) | decimals | fractions | whole.map("{:,}".format)
expressions = st.recursive(numbers | st.sampled_from(["x", "y", r"\pi"]), lambda parts: st.one_of(
    st.tuples(parts, parts).map(" + ".join), parts.map(r"\sqrt{{{}}}".format),
    parts.map(r"\left( {} \right)".format),
    st.tuples(parts, parts).map(lambda pair: rf"\dfrac{{{pair[0]}}}{{{pair[1]}}}")), max_leaves=4)


@pytest.mark.parametrize("given, answer", [
    ("4 2", "42"), ("4  2", "42"), ("4 \n 2", "42"), ("1, 234", "1,234"),
    (r"\pi  x", r"\pix"), (r"\leftarrow", "arrow"), ("arrow", r"\leftarrow")])
def test_spaces_that_separate_are_kept(given, answer):
    assert not settle(given, answer)


def value(number: str) -> Fraction:
    top, bottom = re.fullmatch(r"\\frac\{(.*)\}\{(.*)\}|(.*)", number).expand(r"\1\3 \2").split(" ")
    return Fraction(top.replace(",", "")) / Fraction(bottom or 1)


@settings(max_examples=200, deadline=None)
@given(numbers, numbers)
def test_plain_numbers_are_settled_as_fractions(a, b):
    rounded = ("." in a) != ("." in b) and abs(value(a) - value(b)) <= Fraction(1, 2000)
    assert rounded or settle(a, b) == (value(a) == value(b))
    assert settle(a, a) is True


@settings(max_examples=100, deadline=None)
@given(expressions)
def test_notation_does_not_matter(answer):
    for other in (answer.replace(r"\left", "").replace(r"\right", ""), answer.replace(" ", ""),
                  f" {answer}  ", f"${answer}$", answer.replace(r"\dfrac", r"\frac"),
                  answer.replace(" + ", "  +  ")):
        assert settle(other, answer)
    assert score([f"We get 17 and 3. {box(answer)} That is all: 99."], [answer]) == [1.0]


@settings(max_examples=20, deadline=None)
@given(whole, whole, st.sampled_from(
    [" cm", r"\text{ apples}", r"^\circ", r"\text{ km/h}", " kg", r"\,\text{m}"]))
def test_units_do_not_matter_and_numbers_do(a, b, unit):
    assert score([box(f"{a}{unit}"), box(f"{a}{unit}")], [str(a), str(b)]) == [1.0, float(a == b)]


def test_what_is_not_understood_earns_nothing_and_is_noted():
    notes = Notes()
    responses = [box(text) for text in ("at least 5", "at least 5", "5", "6", r"\gcd(5, x)")]
    assert score(responses, ["5"] * 5, notes=notes) == [0.0, 0.0, 1.0, 0.0, 0.0]
    assert notes.unsettled == {("at least 5", "5"): 2, (r"\gcd(5, x)", "5"): 1}
    assert (notes.timeouts, notes.responses) == (0, 3)
    assert score(responses[:1], [["5", "6"]], notes=notes) == [0.0]
    assert (notes.responses, notes.unsettled.total()) == (4, 5)   # two pairs of one response
    notes.clear()
    assert notes == Notes()


def test_any_of_several_references_is_right():
    references = [("2", "3"), ["x+1", "5"], "2; 3"]
    for text, expected in (("3", [1.0, 0.0, 0.0]), ("1+x", [0.0, 1.0, 0.0]),
                           ("3, 2", [0.0, 0.0, 1.0])):
        assert score([box(text)] * 3, references) == expected


def test_equal_answers_are_one_vote():
    half = r"\frac{2}{\sqrt{16}}"
    groups = [["1", None, "", "2", "2.0", "1"], [half, "3", "0.5", "3", "50%"], ["", None],
              ["5 cm", "5", "6", "6 cm^2"], ["5+7", "12", "12"],
              ["12", "5+7", "5+7"]]
    assert count_votes(groups) == [{"1": 2, "2": 2}, {half: 3, "3": 2}, {}, {"5 cm": 2, "6": 2},
                                   {"5+7": 1, "12": 2}, {"12": 1, "5+7": 2}]


def test_votes_cost_a_bounded_number_of_comparisons(monkeypatch):
    asked = []
    monkeypatch.setattr(reward, "compare", lambda pairs, *more: asked.extend(pairs) or [
        False for _ in pairs])
    votes, = count_votes([[rf"\sqrt{{{i}}}" for i in range(100)]])
    assert len(votes) == 100 and len(asked) == reward.VOTES * (reward.VOTES - 1) / 2


def test_references_that_the_reward_cannot_check_are_found():
    answers = ["42", "x+1", r"\frac{", "at least 5", "42", r"\int f"]
    assert find_unclear(answers) == [r"\frac{", "at least 5", r"\int f"]


def test_the_command_lists_the_references_that_are_not_understood(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps({"problem": "?", "answer": answer}) + "\n"
                            for answer in ("42", "at least 5", ["x+1", r"\frac{"], "7 cm")))
    command = [sys.executable, str(ROOT / "reward.py"), "--check"]
    found = subprocess.run([*command, str(file)], capture_output=True, text=True, check=True).stdout
    assert found == ("data-2: at least 5\ndata-3: \\frac{\n2 of 5 references (40.0%) are not "
                     "understood; only a response with the same text earns there\n")
    file.write_text('{"q": "?", "a": ["1", "at least 5"]}\n')
    named = [*command, str(file), "--columns", "problem=q,answer=a", "--answer-lists", "all"]
    found = subprocess.run(named, capture_output=True, text=True, check=True).stdout
    assert found.startswith("data-1: 1; at least 5\n1 of 1 references")
    gone = subprocess.run([*command, "gone.jsonl"], capture_output=True, text=True)
    assert gone.returncode == 2 and "no data file at gone.jsonl" in gone.stderr


# --------------------------------------------------------------------------------------------------
# Limits and processes

@pytest.fixture
def fresh():
    """Stops all workers before and after the test and checks that none remains."""
    verify._stop_workers()
    yield
    verify._stop_workers()
    assert not workers()


def workers():
    return [process for process in psutil.Process().children(recursive=True)
            if verify.__file__ in process.cmdline()]


HANG = box("9^{9^{9^{9^{9}}}}")
HALF = box(r"\frac{2}{\sqrt{16}}")   # a worker has to compare this


def test_a_comparison_that_hangs_is_killed_and_the_others_go_on(fresh):
    score([HALF], ["0.5"], workers=2)
    pid, notes, start = verify._workers[0].process.pid, Notes(), time.monotonic()
    hanging = [HANG.replace("9}}", f"{i}}}}}") for i in range(2, 8)]
    assert score([*hanging, HALF], ["3"] * 6 + ["0.5"], timeout=0.5, workers=2,
                 notes=notes) == [0.0] * 6 + [1.0]
    # Two workers share six timeouts of 0.5 s; 2 s are added for overhead.
    assert time.monotonic() - start < 0.5 * 6 / 2 + 2
    assert notes.timeouts == notes.unsettled.total() == 6
    assert verify._workers[0].process.pid == pid


def test_a_comparison_has_a_memory_limit(tmp_path):
    """The worker runs beside a package `answers` whose comparison takes 200 MB."""
    for name in ("verify.py", "own_reward.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "answers").mkdir()
    (tmp_path / "answers" / "algebra.py").write_text("equal = None")
    (tmp_path / "answers" / "__init__.py").write_text(
        "def equal(given, answer, algebra):\n"
        "    return len(b'x' * (200 << 20)) > 0 if given == 'large' else given == answer\n")
    copy = runpy.run_path(str(tmp_path / "verify.py"), run_name="verify")["compare"].__globals__
    copy["MEMORY_LIMIT"] = 120 << 20
    try:
        pairs = [("a", "a"), ("large", "a"), ("a", "b"), ("large", "b")]
        assert copy["compare"](pairs, 60.0, 1) == [True, verify.LIMIT, False, verify.LIMIT]
        family = psutil.Process(copy["_workers"][0].process.pid).children()
        assert sum(process.memory_info().rss for process in family) < 100 << 20   # it is freed
    finally:
        copy["_stop_workers"]()


@pytest.mark.parametrize("victim", ["parent", "child"])
def test_a_worker_that_dies_is_replaced(fresh, victim):
    score([HALF], ["0.5"], workers=1)
    worker = verify._workers[0]
    os.kill(worker.process.pid if victim == "parent" else worker.child, signal.SIGKILL)
    time.sleep(0.2)
    for _ in range(2):
        assert score([HALF, HANG, HALF], ["0.5", "3", ".5"], workers=1,
                     timeout=0.5) == [1.0, 0.0, 1.0]


def test_a_reply_that_comes_too_late_is_dropped(fresh):
    score([HALF], ["0.5"], workers=1)
    os.kill(verify._workers[0].child, signal.SIGSTOP)   # the next process reads what is sent to it
    assert score([box("x+2")], ["2+x"], workers=1, timeout=0.3) == [0.0]
    time.sleep(0.3)
    pairs = [box("x+3"), box("x+4"), box("x")], ["3+x", "4+x", "2x"]
    assert score(*pairs, workers=1, timeout=1e7) == [1.0, 1.0, 0.0]


def test_threads_take_turns(fresh):
    results = {}

    def work(i):
        results[i] = score([box(f"{i}+2x"), box(f"2x+{i}"), box("x")], [f"2x+{i}"] * 3, workers=2)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert results == {i: [1.0, 1.0, 0.0] for i in range(4)}


def _score_elsewhere(results):
    results.put(score([HALF], ["0.5"], workers=1))


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_other_processes_have_workers_of_their_own(fresh, method):
    score([HALF], ["0.5"], workers=1)
    context = multiprocessing.get_context(method)
    results = context.Queue()
    process = context.Process(target=_score_elsewhere, args=(results,))
    process.start()
    assert results.get(timeout=60) == [1.0]
    process.join(60)
    assert score([HALF], ["0.5"], workers=1) == [1.0]   # this process's workers still answer


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_process_is_left_behind(number):
    code = ("import reward, sys; "
            "reward.score([r'\\boxed{\\frac{2}{\\sqrt{16}}}'], ['0.5'], workers=2); "
            "print('up', flush=True);"
            f"reward.score([{HANG!r}, {HANG.replace('9}', '8}')!r}], ['3', '3'], "
            "timeout=60, workers=2)")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL)
    assert process.stdout.readline() == b"up\n"
    deadline = time.monotonic() + verify.START_SECONDS
    parent = psutil.Process(process.pid)
    while len(parent.children(recursive=True)) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)   # the comparisons hang by then
    family = parent.children(recursive=True)
    assert len(family) == 4   # there are two workers, each with a child
    process.send_signal(number)
    process.wait(70)
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive


NO_HANG_UP = """
import select, sys
poll = select.poll

class Poll:
    def __init__(self):
        self.events = poll()

    def register(self, number, events):
        if events:
            self.events.register(number, events)

    def poll(self, milliseconds):
        return self.events.poll(milliseconds)

select.poll = Poll
sys.path.insert(0, {root!r})
import verify
verify._serve(verify.MEMORY_LIMIT)
"""


def test_a_worker_serves_where_poll_reports_no_hang_up(tmp_path):
    """The poll of macOS reports no closed pipe where no event is asked for."""
    (tmp_path / "worker.py").write_text(NO_HANG_UP.format(root=str(ROOT)))
    with subprocess.Popen([sys.executable, tmp_path / "worker.py"], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as worker:
        word, first = worker.stdout.readline().split()
        os.kill(int(first), signal.SIGKILL)
        again, second = worker.stdout.readline().split()
        assert (word, again) == (b"ready", b"ready") and first != second
        worker.stdin.write(b'[7, "x+1", "1+x"]\n')
        worker.stdin.flush()
        assert worker.stdout.readline() == b"7 True\n"
        worker.stdin.close()
        assert worker.wait(10) == 0


@pytest.mark.parametrize("seconds", [0.4, 60])
def test_a_worker_without_hang_up_ends_when_its_trainer_is_killed(tmp_path, seconds):
    """A comparison takes so many seconds. No later child could say that it is ready."""
    slow = f"import answers, time\nanswers.equal = lambda *pair: time.sleep({seconds})\n"
    (tmp_path / "worker.py").write_text(NO_HANG_UP.format(root=str(ROOT)).replace(
        "import verify\n", f"import verify\n{slow}"))
    (tmp_path / "trainer.py").write_text(f"""
import subprocess, sys, time
worker = subprocess.Popen([sys.executable, {str(tmp_path / "worker.py")!r}],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE)
worker.stdout.readline()
worker.stdin.write(b'[1, "2", "3"]\\n')
worker.stdin.flush()
print(worker.pid, flush=True)
time.sleep(60)
""")
    trainer = subprocess.Popen([sys.executable, tmp_path / "trainer.py"], stdout=subprocess.PIPE)
    worker = psutil.Process(int(trainer.stdout.readline()))
    family = [worker, *worker.children()]
    trainer.kill()
    trainer.wait()
    _, alive = psutil.wait_procs(family, timeout=10)
    [process.kill() for process in alive]
    assert len(family) == 2 and not alive


def test_torchrun_shares_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    assert verify.default_workers() == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert verify.default_workers() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert verify.default_workers() == 1


# --------------------------------------------------------------------------------------------------
# Hostile responses

HOSTILE = [
    box("9^{9^{9^{9}}}"), box("((((99999!)!)!)!)!"), box(r"\sum_{n=1}^{10^{12}} n!"),
    box(r"\binom{10^9}{5 \cdot 10^8}"), box("{" * 10_000 + "1" + "}" * 10_000),
    "\\boxed{" * 10_000, box("(" * 2_000 + "1" + ")" * 2_000), box(r"\sqrt{" * 500),
    box("1" * 5_000_000), "x" * 5_000_000 + box("1"), "{" * 3_000_000, "\\" * 1_000_001 + box("1"),
    box("\0\x01\x1b[2J\r\n"), box("\ud800"), box(r"\frac{1}{"), box(r"\begin{pmatrix} 1 & 2 \\"),
    box(r"\left( 1"),
    box(r"\begin{pmatrix}" + r"\\".join(["&".join(["x"] * 60)] * 60) + r"\end{pmatrix}"),
    box("[" + ",".join(map(str, range(2_000))) + "]"), box(r"(-\infty, " + "9" * 4_000 + "]"),
    box("__import__('os').system('touch /tmp/hacked')"), box("$(rm -rf /)"),
    box("; import sys; sys.exit(0)"), box(r"\boxed{\boxed{}}"), r"\boxed{}", box(" "),
    box("\u202e24\u202c"), box("٤٢"), box("四十二"), "\\boxed", "\\boxed{",
    box(r"x^{x^{x^{x^{x^{x}}}}} = \int_0^1 \int_0^1 \sin(\cos(x y)) dx dy"), box("0^0/0"),
    box("1e999999999"), box("nan"), box("10^{10^{10}} - 10^{10^{10}} + 41"),
    box(r"\lim_{x \to 0} \frac{\sin x}{x}" * 20),
]


def test_hostile_responses_score_zero_in_bounded_time_and_memory(fresh):
    """A second pass over the same responses must add less than 20 MB to this process's memory."""
    notes, memory = Notes(), []
    for _ in range(2):
        start = time.monotonic()
        assert score(HOSTILE, ["42"] * len(HOSTILE), timeout=0.5, workers=2,
                     notes=notes) == [0.0] * len(HOSTILE)
        assert time.monotonic() - start < 0.5 * len(HOSTILE) / 2 + 5
        memory.append(psutil.Process().memory_info().rss)
    assert notes.timeouts < len(HOSTILE)
    assert memory[1] < memory[0] + 20e6
    assert score([box("42"), box(r"\sqrt{1764}")], ["42", "42"], workers=2) == [1.0, 1.0]


def mutate(text: str, rng: random.Random) -> str:
    """Deletes, doubles, moves or replaces one to four pieces of the text."""
    for _ in range(rng.randint(1, 4)):
        a, b = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        b = min(b, a + 8)
        new = rng.choice(["{", "}", "\\", "^", "!", "\\frac", "\\boxed{", "9", "x", "\n", "\0"])
        text = rng.choice([text[:a] + text[b:], text[:b] + text[a:b] + text[b:],
                           text[b:] + text[:a], text[:a] + new + text[b:]])
    return text


def test_mutated_responses_crash_nothing(fresh):
    """Whether the scores are right is not tested here."""
    rng = random.Random(0)
    seeds = [box(r"\frac{1}{2}"), box("1,234"), box("(1, 2]"), box(r"x^2 + 3x = \sqrt{5}"),
             box(r"5\text{ cm}"), "#### 7"]
    # benchmarks/reward.py --fuzz 20000 scores ten times as many.
    responses = [mutate(rng.choice(seeds), rng) for _ in range(2_000)]
    answers = [rng.choice(["0.5", "1234", "(1,2]", "5"]) for _ in responses]
    scores = score(responses, answers, timeout=0.5)
    assert set(scores) == {0.0, 1.0}


# --------------------------------------------------------------------------------------------------
# A reward of the user's own

PROBLEMS = [Problem("q", "1", id="a"), Problem("q", "2", id="b")]


@pytest.mark.parametrize("parameters, body, expected", [
    ("responses, problems", "return [len(r) / 10 for r in responses]", [0.1, 0.2]),
    ("responses, problems", "return [True, 0]", [1.0, 0.0]),
    ("responses, problems", "return (p.id == 'b' for p in problems)", [0.0, 1.0]),
    ("completions, **kwargs", "return [float(a) for a in kwargs['answer']]", [1.0, 2.0]),
    ("prompts, completions, answer", "return [len(c) for c in completions]", [1.0, 2.0]),
    ("responses, problems", "import beside_it; return [beside_it.one, 0]", [1.0, 0.0]),
    ("responses, problems", "return [1.0]", "1 scores for 2 responses"),
    ("responses, problems", "return [1.0, 'good']", "score 1 is 'good'"),
    ("responses, problems", "return [float('nan'), 1]", "score 0 is nan"),
    ("responses, problems", "return [1 / 0 for _ in responses]",
     "own.py, line 2, in .*: ZeroDivisionError"),
    ("responses, problems", "return None", "it returned None; a list of numbers was expected"),
    ("responses, problems", "return 3", "TypeError"),
    ("responses, problems", "import sys; sys.exit('over')", "own.py, line 2.*SystemExit: over"),
    ("responses, problems", "import os; os._exit(3)", "ended by itself, with status 3"),
    ("responses, problems", "while True: pass", "not return within 2 seconds; --reward-timeout"),
])
def test_own_rewards_are_called_and_checked(tmp_path, parameters, body, expected):
    file = tmp_path / "own.py"
    file.write_text(f"def mine({parameters}):\n    {body}\n")
    (tmp_path / "beside_it.py").write_text("one = 1")
    reward = OwnReward(f"{file}:mine", timeout=2.0 if "while" in body else 1e9)
    try:
        if isinstance(expected, list):
            assert reward(["a", "bb"], PROBLEMS) == reward(["a", "bb"], PROBLEMS) == expected
        else:
            with pytest.raises(RewardError, match=expected):
                reward(["a", "bb"], PROBLEMS)
    finally:
        reward.close()
    assert not psutil.pid_exists(reward.process.pid)


def test_an_own_reward_named_from_its_folder_tells_its_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text("def mine(responses, problems):\n    return 1 / 0\n")
    reward = OwnReward("own.py:mine", timeout=60.0)
    with pytest.raises(RewardError, match="own.py, line 2, in mine: ZeroDivisionError"):
        reward(["a"], PROBLEMS[:1])
    reward.close()


def test_what_an_own_reward_has_started_ends_with_the_trainer(tmp_path):
    (tmp_path / "own.py").write_text(
        "import subprocess, sys, time\n"
        "def mine(responses, problems):\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "    print(child.pid, flush=True)\n    time.sleep(60)\n")
    trainer = subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
         "from own_reward import OwnReward\nOwnReward('own.py:mine')([], [])"],
        cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(trainer.stdout.readline()))
    trainer.kill()
    trainer.communicate(timeout=10)   # until all that write there have ended
    psutil.wait_procs([child], timeout=5)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("name, content, message", [
    ("own.py", "", "FILE.py:FUNCTION"), ("gone.py:mine", "", "names no file"),
    ("own.py:mine", "x = 1", "no function 'mine'"),
    ("own.py:mine", "x = 1\nimport nothing_like_it", "own.py, line 2.*nothing_like_it"),
    ("own.py:mine", "def mine(:", "own.py, line 1.*SyntaxError"),
])
def test_an_own_reward_that_does_not_load_is_an_error(tmp_path, name, content, message):
    (tmp_path / "own.py").write_text(content)
    with pytest.raises(ValueError, match=message):
        OwnReward(str(tmp_path / name))
