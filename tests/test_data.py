import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tiny"))
from data import Demonstrations, Problem, PromptBuilder, load_problems
from make import make_tokenizer
from options import INSTRUCTION, parse_training, resolve
from prepare import make_builder
from runs import settings_of_run


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n"
                            for line in lines))
    return path


GOOD = {"problem": "1+1", "answer": "2", "solution": "1 2 \\boxed{2}"}


def test_load_problems_skips_blank_lines_and_fills_in_ids(tmp_path):
    path = write(tmp_path / "d.jsonl", GOOD, "",
                 GOOD | {"id": "x", "answer": 2, "expert_response": "e"})
    assert load_problems(path, needs=("solution",)) == [
        Problem("1+1", "2", GOOD["solution"], None, "d-1"),
        Problem("1+1", "2", GOOD["solution"], "e", "x")]


@pytest.mark.parametrize("line, message", [
    ('{"problem": "1+1", ', "not valid JSON"), ("[1, 2]", "a JSON object was expected, not list"),
    ({"answer": "2"}, "field 'problem'"), ({"problem": "1+1"}, "field 'answer'"),
    (GOOD | {"answer": True}, "field 'answer'.*not True"),
    (GOOD | {"answer": []}, "field 'answer'"), (GOOD | {"answer": ["2", ""]}, "field 'answer'"),
    ('{"problem": "1+1", "answer": NaN}', "NaN is not a finite number"),
    ('{"problem": "1+1", "answer": -Infinity}', "-Infinity is not a finite number"),
    ('{"problem": "1+1", "answer": 1e999}', "1e999 is not a finite number"),
    (GOOD | {"problem": "a\ud800"}, r"field 'problem' has a lone surrogate, '\\ud800'"),
    (GOOD | {"solution": "\udc00"}, "field 'solution' has a lone surrogate"),
    (GOOD | {"problem": 3}, "field 'problem'"),
    (GOOD | {"problem": " "}, "field 'problem'"), (GOOD | {"solution": ["1"]}, "field 'solution'"),
    ({"problem": "1+1", "answer": "2"}, "field 'solution'"),
])
def test_a_broken_line_is_named(tmp_path, line, message):
    path = write(tmp_path / "d.jsonl", GOOD, line, GOOD)
    with pytest.raises(ValueError, match=rf"d\.jsonl, line 2: .*{message}"):
        load_problems(path, needs=("solution",))


@pytest.mark.parametrize("number", ["0.00004", "-1.50", "3e-8", "12345678901234567890", "1.0"])
def test_a_number_stays_as_it_is_written(tmp_path, number):
    path = write(tmp_path / "d.jsonl", f'{{"problem": "1+1", "answer": {number}}}')
    assert load_problems(path)[0].answer == number


def test_ids_that_are_given_twice_differ(tmp_path):
    path = write(tmp_path / "d.jsonl", *[GOOD | {"id": name} for name in ("a", "a-3", "a", "a")])
    assert [p.id for p in load_problems(path)] == ["a", "a-3", "a-3-3", "a-4"]


def test_a_byte_order_mark_is_no_error(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert load_problems(tmp_path / "d.jsonl")[0].problem == "1+1"


def test_a_list_of_answers_means_any_or_all_of_them(tmp_path):
    path = write(tmp_path / "d.jsonl", GOOD | {"answer": ["2", 3]}, GOOD | {"answer": ["4"]})
    assert [(p.answer, p.other_answers) for p in load_problems(path)] == [("2", ("3",)), ("4", ())]
    assert [(p.answer, p.other_answers) for p in load_problems(path, answer_lists="all")] == [
        ("2; 3", ()), ("4", ())]


def test_special_tokens_stay_in_the_text_of_a_response(tokenizer):
    builder = PromptBuilder(tokenizer)
    tokens = tokenizer.encode("1+1", add_special_tokens=False)
    special = next(i for i in tokenizer.all_special_ids if i != tokenizer.eos_token_id)
    text = builder.response_text([special, *tokens, tokenizer.eos_token_id], ())
    assert text == tokenizer.decode([special]) + "1+1"
    assert builder.response_text([special, *tokens], tokens[-1:]) == text[:-1]


def test_bytes_that_are_not_utf8_are_a_broken_line(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(json.dumps(GOOD).encode() + b'\n{"problem": "\xff"}\n')
    with pytest.raises(ValueError, match="line 2"):
        load_problems(tmp_path / "d.jsonl")


def test_a_missing_or_empty_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no data file at .*none.jsonl"):
        load_problems(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="holds no problems"):
        load_problems(write(tmp_path / "empty.jsonl", ""))


def test_prompts_have_exactly_this_text(tokenizer):
    builder = PromptBuilder(tokenizer)
    question, demonstration = Problem("3+4", "7"), Problem("1+1", "2", "1 2 \\boxed{2}")
    assert tokenizer.decode(builder.plain(question)) == f"<|user|>3+4 {INSTRUCTION}<|assistant|>"
    assert tokenizer.decode(builder.demo_prefixed(question, [demonstration] * 2)) == (
        "<|user|>" + f"Question: 1+1 {INSTRUCTION}\nAnswer: 1 2 \\boxed{{2}}\n\n\n" * 2
        + f"Question: 3+4 {INSTRUCTION}\nAnswer:<|assistant|>")
    assert builder.demo_prefixed(question, []) == builder.plain(question)
    raw = PromptBuilder(tokenizer, instruction="", chat_template=False, demo_format="text")
    assert tokenizer.decode(raw.plain(question)) == "3+4"
    assert tokenizer.decode(raw.demo_prefixed(question, [demonstration])) == (
        "Question: 1+1\nAnswer: 1 2 \\boxed{2}\n\n\nQuestion: 3+4\nAnswer:")


def test_demonstrations_as_turns_are_what_the_template_makes_of_a_conversation(tokenizer):
    builder = PromptBuilder(tokenizer, demo_format="turns", system="Be brief.")
    demonstrations = [Problem("1+1", "2", "1 2 \\boxed{2}"), Problem("2+3", "5", "\\boxed{5}")]
    turns = [("system", "Be brief."), ("user", f"1+1 {INSTRUCTION}"),
             ("assistant", "1 2 \\boxed{2}"), ("user", f"2+3 {INSTRUCTION}"),
             ("assistant", "\\boxed{5}"), ("user", f"3+4 {INSTRUCTION}")]
    assert tokenizer.decode(builder.demo_prefixed(Problem("3+4", "7"), demonstrations)) == (
        tokenizer.apply_chat_template([{"role": role, "content": text} for role, text in turns],
                                      tokenize=False, add_generation_prompt=True))
    assert builder.demo_prefixed(Problem("3+4", "7"), []) == builder.plain(Problem("3+4", "7"))


@pytest.mark.parametrize("given, form", [
    ([], "auto"), (["--demo-chat-template", "true"], "one-turn"),
    (["--demo-chat-template", "false"], "text"), (["--demo-format", "turns"], "turns")])
def test_the_earlier_name_of_the_form_of_demonstrations_is_accepted(given, form):
    options = resolve(parse_training(given))
    assert (options.demo_format, options.demo_chat_template) == (form, None)


@pytest.mark.parametrize("wanted, chat, template, form", [
    (None, True, None, "turns"), ("one-turn", True, None, "one-turn"),
    ("one-turn", False, None, "text"),
    (None, True, "{{ messages[-1].content }}", "one-turn"), ("nonsense", True, None, "turns")])
def test_the_form_of_demonstrations_follows_the_model(wanted, chat, template, form):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    model: Any = SimpleNamespace(config=SimpleNamespace(vocab_size=None),
                                 generation_config={"demo_format": wanted})
    options = resolve(parse_training(["--chat-template", str(chat).lower()]))
    assert make_builder(options, tokenizer, model).demo_format == options.demo_format == form


def test_the_form_of_demonstrations_is_that_of_the_run_that_made_the_model(tmp_path):
    model = tmp_path / "run"
    for folder in ("final", "checkpoints/step-2", "elsewhere"):
        (model / folder).mkdir(parents=True)
    assert settings_of_run(str(model)) == {}
    (model / "config.yaml").write_text("method: icpo\ndemo_format: text")
    for each in (model, model / "final", model / "checkpoints" / "step-2"):
        assert settings_of_run(str(each))["demo_format"] == "text"
    assert settings_of_run(str(model / "elsewhere")) == settings_of_run("tiny") == {}
    (model / "config.yaml").write_text("model: {path: x}\nmethod: [ppo]\n")   # of another program
    assert settings_of_run(str(model)) == {}


@pytest.mark.parametrize("trained, asked, of_folder, form", [
    ((False, "one-turn"), False, None, "one-turn"), ((False, "one-turn"), True, None, "turns"),
    ((True, "turns"), False, None, "text"), ((True, "text"), True, None, "text"),
    ((True, "text"), True, "one-turn", "text"), ((False, "text"), True, "one-turn", "one-turn")])
def test_a_run_is_asked_with_its_own_form_where_the_template_is_the_same(tmp_path, trained, asked,
                                                                         of_folder, form):
    chat, of_run = trained
    (tmp_path / "config.yaml").write_text(
        f"method: icpo\nchat_template: {chat}\ndemo_format: {of_run}".lower())
    model: Any = SimpleNamespace(config=SimpleNamespace(vocab_size=None),
                                 generation_config={"demo_format": of_folder})
    options = resolve(parse_training(["--model", str(tmp_path), "--chat-template",
                                      str(asked).lower()]))
    assert make_builder(options, make_tokenizer(), model).demo_format == form


def test_a_missing_chat_template_is_an_error_that_names_the_option(tokenizer):
    bare = make_tokenizer()
    bare.chat_template = None
    with pytest.raises(ValueError, match="--chat-template false"):
        PromptBuilder(bare)
    assert PromptBuilder(bare, chat_template=False, demo_format="text").plain(
        Problem("1", "1"))


def demonstrations(tokenizer, pool, k=1, limit=1000, min_chars=0):
    return Demonstrations(pool, PromptBuilder(tokenizer), k, limit, min_chars)


def test_links_and_short_solutions_are_left_out_and_counted(tokenizer):
    pool = [Problem("1+1", "2", "see http://x.y"), Problem("1+1", "2", "2"),
            Problem("1+2", "3", "1 3 \\boxed{3}")]
    drawn_from = demonstrations(tokenizer, pool, min_chars=5)
    assert drawn_from.pool == pool[2:]
    assert drawn_from.excluded == {"with a link": 1, "shorter than 5 characters": 1}
    with pytest.raises(ValueError, match="only 1 of 3 are usable"):
        demonstrations(tokenizer, pool, k=2, min_chars=5)


def test_a_demonstration_that_contains_the_question_is_never_drawn_for_it(tokenizer):
    question = Problem("What is 3 + 4?", "7")
    # The first problem is the question in another notation; the second quotes it in its solution.
    pool = [Problem("what is 3+4?", "7", "7"),
            Problem("Easy.", "7", "As for 'What is 3 + 4?', it is 7."),
            Problem("What is 3 + 5?", "8", "8"), Problem("What is 2 + 2?", "4", "4")]
    drawn_from = demonstrations(tokenizer, pool, k=2)
    assert drawn_from.admit([question]) == [question]
    assert drawn_from.never_together == 2
    draws = [drawn_from.draw(question, random.Random(seed))[0] for seed in range(20)]
    assert all(sorted(d.problem for d in draw) == ["What is 2 + 2?", "What is 3 + 5?"]
               for draw in draws)
    admitted = demonstrations(tokenizer, pool[:3], k=2).admit([question, Problem("2+2", "4")])
    assert admitted == [Problem("2+2", "4")]


def test_draws_fit_the_limit_or_the_question_is_not_admitted(tokenizer):
    pool = [Problem("1+1", "2", "2" * n) for n in (5, 400)]
    question = Problem("3+4", "7")
    drawn_from = demonstrations(tokenizer, pool, limit=100)
    assert drawn_from.admit([question]) == [question]
    for seed in range(20):
        chosen, prompt = drawn_from.draw(question, random.Random(seed))
        assert chosen == pool[:1] and len(prompt) <= 100
    long = Problem("3+" * 100 + "4", "304")
    assert drawn_from.admit([long, question]) == [question]
    with pytest.raises(ValueError, match="no 1 demonstrations leave room"):
        drawn_from.draw(long, random.Random(0))


def test_draws_depend_on_the_random_number_generator_alone(tokenizer):
    pool = [Problem(f"{i}+1", str(i + 1), "0") for i in range(50)]
    one, other = (demonstrations(tokenizer, pool, k=2) for _ in range(2))
    question = Problem("9+9", "18")
    for each in (one, other):
        with pytest.raises(ValueError, match="was not given to admit"):
            each.draw(question, random.Random(0))
        each.admit([question])
    draws = [[each.draw(question, random.Random(seed))[0] for seed in range(10)]
             for each in (one, other)]
    assert draws[0] == draws[1] and len({d[0].problem for d in draws[0]}) > 5
