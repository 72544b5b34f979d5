"""Data sets of every form and source; what needs the library datasets is skipped without it."""

import json
import sys
from types import SimpleNamespace

import pytest

import curves
import eval as evaluation
import prepare
import train as trainer
from data import Problem, PromptBuilder, load_problems
from datafiles import KNOWN, content_hash
from options import PAPER, TINY, parse_training, template_arguments
from reward import make_scorer
from rowforms import to_fields

CHOICES = "\nA. ice\nB. iron\nC. salt\nD. wood\nAnswer with the letter of the right option."
# A short name: (the columns of its rows, fields of the problem). The rows below differ in N alone.
ROWS = {
    "openr1-46k": (
        {"data_source": "openr1", "ability": "MATH", "extra_info": {"index": -1},
         "prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": "Add N."}],
         "target": [{"role": "assistant", "content": "<think>\nN\n</think>\n\\boxed{7}"}],
         "reward_model": {"ground_truth": "7", "style": "rule"}},
        {"problem": "Add N.", "answer": "7",
         "expert_response": "<think>\nN\n</think>\n\\boxed{7}"}),
    "math": (
        {"problem": "Add N.", "level": "Level 5", "type": "Algebra",
         "solution": r"First \boxed{1}, then \boxed{\frac{3}{\{4\}}}."},
        {"problem": "Add N.", "answer": r"\frac{3}{\{4\}}"}),
    "gsm8k": (
        {"question": "Add N.", "answer": "It is 1,000*2=<<1000*2=2000>>2,000.\n#### 2,000"},
        {"problem": "Add N.", "answer": "2000",
         "solution": "It is 1,000*2=2,000.\nThe final answer is \\boxed{2000}."}),
    "math500": (
        {"problem": "Add N.", "solution": r"So \boxed{p}.", "answer": "p - q",
         "subject": "Algebra", "level": 2, "unique_id": "test/algebra/N.json"},
        {"problem": "Add N.", "answer": "p - q", "id": "test/algebra/N.json"}),
    "aime24": (
        {"id": "6N", "problem": "Add N.", "solution": "s", "answer": "033", "url": "u",
         "year": "2024"},
        {"problem": "Add N.", "answer": "033", "id": "6N"}),
    "aime25": ({"problem": "Add N.", "answer": "70", "id": "N"},
               {"problem": "Add N.", "answer": "70", "id": "N"}),
    "amc23": ({"problem": "Add N.", "answer": "142.0"}, {"problem": "Add N.", "answer": "142.0"}),
    "minerva": ({"question": "Add N.", "answer": r"1.6\times 10^{4}"},
                {"problem": "Add N.", "answer": r"1.6\times 10^{4}"}),
    "olympiad": (
        {"id": "16N", "question": "Add N.", "solution": ["As follows."],
         "final_answer": ["$2 \\sqrt{3}$"], "is_multiple_answer": False, "subject": "Math"},
        {"problem": "Add N.", "answer": "$2 \\sqrt{3}$", "solution": "As follows.", "id": "16N"}),
    "arc-c": (
        {"id": "MCAS_N", "question": "N: cold?", "answerKey": "3",
         "choices": {"text": ["ice", "iron", "salt", "wood"], "label": ["1", "2", "3", "4"]}},
        {"problem": "N: cold?" + CHOICES, "answer": "C", "id": "MCAS_N"}),
    "mmlu-pro": (
        {"question_id": 7, "question": "N: cold?", "options": ["ice", "iron", "salt", "wood"],
         "answer": "B", "answer_index": 1, "cot_content": "", "category": "chemistry"},
        {"problem": "N: cold?" + CHOICES, "answer": "B"}),
}


def five(row):
    return [json.loads(json.dumps(row).replace("N", str(n))) for n in range(5)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ROWS)
def test_the_rows_of_a_known_data_set_are_recognised(tmp_path, name):
    row, fields = ROWS[name]
    problems = load_problems(write(tmp_path / "five.jsonl", five(row)))
    for problem, wanted in zip(problems, five(fields), strict=True):
        assert {key: getattr(problem, key) for key in wanted} == wanted
    assert len({problem.id for problem in problems}) == 5
    # What the data set calls right earns.
    answers = [f"\\boxed{{{problem.answer}}}" for problem in problems]
    assert make_scorer()(answers, problems) == [1.0] * 5


def test_every_short_name_is_tested():
    assert {*ROWS, "gpqa"} == set(KNOWN)


def test_the_order_of_gpqa_options_is_that_of_the_seed(tmp_path):
    row = {"Question": "N: cold?", "Correct Answer": "ice", "Incorrect Answer 1": "iron",
           "Incorrect Answer 2": "salt\n", "Incorrect Answer 3": "wood", "Record ID": "recN"}
    file = write(tmp_path / "five.jsonl", five(row))
    problems = [load_problems(file, seed=seed) for seed in range(8)]
    assert problems[3] == load_problems(file, seed=3)
    assert len({p.answer for each in problems for p in each}) == 4
    for p in problems[0]:
        lines = p.problem.split("\n")
        assert lines[0].endswith(": cold?") and f"{p.answer}. ice" in lines and len(lines) == 6


@pytest.mark.parametrize("choices, key, answer", [
    (["ice", "iron", "salt", "wood"], 2, "C"), (["ice", "iron"], "A", "A"),
    (["b", "a"], "a", "B"), ({"A": "ice", "B": "iron", "C": None}, "B", "B"),
    (["ice", "iron"], "(b)", "B"), (["ice", "iron"], "iron", "B"), (["0", "1", "2"], "1", "B"),
    (["1", "2", "3"], "2", "B"), (["1", "2", "3"], 2, "C"), ({"A": "ice", "B": "iron"}, "B", "B"),
    ([{"label": "A", "text": "ice"}, {"label": "B", "text": "iron"}], "B", "B"),
    ({"text": ["ice", "iron"], "label": ["A", "B"]}, "B", "B")])
def test_choices_have_a_label_a_text_or_a_place_as_key(choices, key, answer):
    problem = to_fields({"question": "?", "choices": choices, "answer": key}, "boxed", 0)["problem"]
    assert problem.startswith("?\nA. ") and not {"{", "'"} & set(problem)
    assert to_fields({"question": "?", "choices": choices, "answer": key}, "boxed", 0)[
        "answer"] == answer
    row = {"question": "?", "choices": choices, "answer": key}
    assert to_fields(row | {"solution": "It melts."}, "boxed", 0)["solution"] == "It melts."
    for other in (str(key), 2, " ", None):   # not worked out
        assert "solution" not in to_fields(row | {"solution": other}, "boxed", 0)
    with pytest.raises(ValueError, match="none of the choices"):
        to_fields({"question": "?", "choices": choices, "answerKey": "E"}, "boxed", 0)


@pytest.mark.parametrize("answer_format, ending", [
    ("gsm8k", "#### 2000"), ("tags", "<answer>2000</answer>")])
def test_a_gsm8k_solution_ends_as_the_answer_format_asks(tmp_path, answer_format, ending):
    file = write(tmp_path / "five.jsonl", five(ROWS["gsm8k"][0]))
    solution = load_problems(file, answer_format=answer_format)[0].solution
    assert solution is not None and solution.endswith("\n" + ending)


def test_columns_name_what_no_form_has(tmp_path):
    file = write(tmp_path / "own.jsonl", five({"text": "Add N.", "gold": {"values": ["a", "b"]}}))
    columns = {"problem": "text", "answer": "gold.values.1"}
    assert [(p.problem, p.answer) for p in load_problems(file, columns=columns)][:2] == [
        ("Add 0.", "b"), ("Add 1.", "b")]
    with pytest.raises(ValueError, match="line 1: field 'problem' .*is missing; the row has text, "
                                         "gold, and --columns problem=NAME says which"):
        load_problems(file)
    with pytest.raises(ValueError, match="no column 'gold.text', which --columns names"):
        load_problems(file, columns={"answer": "gold.text"})
    for row, named, found in (
            ({"q": "?", "a": "5+5=10\n#### 10"}, {"problem": "q", "answer": "a"}, ("?", "10")),
            ({"question": "?", "options": ["ice", "iron"], "correct": "B"}, {"answer": "correct"},
             ("?\nA. ice\nB. iron\nAnswer with the letter of the right option.", "B")),
            ({"prompt": "?", "reward_model": {"ground_truth": "7"}, "gold": "8"},
             {"answer": "gold"}, ("?", "8")),
            ({"problem": "?", "answer": "2", "final_answer": "3"}, {"problem": "problem"},
             ("?", "2")),
            ({"q": "?", "gold": "2", "options": {"level": "easy"}}, {"problem": "q",
             "answer": "gold"}, ("?", "2")),
            ({"q": "?", "answer": "about 2", "options": ["1", "2"]}, {"problem": "q"},
             ("?", "about 2"))):
        problem, = load_problems(write(tmp_path / "one.jsonl", [row]), columns=named)
        assert (problem.problem, problem.answer) == found
    optional = columns | {"solution": "worked"}   # where it is not needed, it may lack
    assert load_problems(file, columns=optional)[0].solution is None
    with pytest.raises(ValueError, match="no column 'worked'"):
        load_problems(file, ("solution",), columns=optional)


def test_csv_and_json_files_keep_answers_as_they_are_written(tmp_path):
    (tmp_path / "a.csv").write_text('problem,answer,solution\n"1+1, or\n2",2.50,\nb,1/2,s\n')
    (tmp_path / "a.json").write_text('[{"problem": "1+1, or\\n2", "answer": 2.50},\n'
                                     '{"problem": "b", "answer": "1/2", "solution": "s"}]')
    for name in ("a.csv", "a.json"):
        problems = load_problems(tmp_path / name)
        assert [(p.problem, p.answer, p.solution) for p in problems] == [
            ("1+1, or\n2", "2.50", None), ("b", "1/2", "s")]
    (tmp_path / "bad.csv").write_text("problem,answer\na,\n")
    with pytest.raises(ValueError, match="bad.csv, row 1: field 'answer'"):
        load_problems(tmp_path / "bad.csv")
    (tmp_path / "bad.csv").write_text("problem,answer\na,5,\n")   # an empty cell is no surplus
    assert load_problems(tmp_path / "bad.csv")[0].answer == "5"
    (tmp_path / "bad.csv").write_text("problem,answer\na,(1, 2)\n")
    with pytest.raises(ValueError, match="bad.csv, row 1 has more cells than the header: quote"):
        load_problems(tmp_path / "bad.csv")
    (tmp_path / "bad.json").write_text('[{"problem": "a", "answer": "1"}, 3]')
    with pytest.raises(ValueError, match="bad.json, item 2: a JSON object was expected"):
        load_problems(tmp_path / "bad.json")


@pytest.fixture
def saved(tmp_path):
    """A Parquet file, and folders of save_to_disk, with rows of every form."""
    datasets = pytest.importorskip("datasets")
    folder = {}
    for name, (row, _) in ROWS.items():
        data = datasets.Dataset.from_list(five(row))
        data.to_parquet(tmp_path / f"{name}.parquet")
        data.save_to_disk(tmp_path / name)
        folder[name] = data
    both = datasets.DatasetDict(train=folder["math"], test=folder["minerva"])
    both.save_to_disk(tmp_path / "both")
    return tmp_path


def test_the_library_datasets_reads_the_same_rows(saved):
    for name, (row, _) in ROWS.items():
        wanted = [vars(p) | {"id": ""} for p in load_problems(
            write(saved / f"{name}.jsonl", five(row)))]
        for source in (saved / f"{name}.parquet", saved / name):
            assert [vars(p) | {"id": ""} for p in load_problems(source)] == wanted
            assert content_hash(str(source), "train") == content_hash(str(source), "train")
    math, minerva = (load_problems(saved / f"{name}.jsonl") for name in ("math", "minerva"))
    for split, rows in (("train", math), ("test", minerva)):
        for problems in (load_problems(saved / "both", split=split),
                         load_problems(f"{saved}/both:{split}")):
            assert [p.problem for p in problems] == [p.problem for p in rows]
    with pytest.raises(ValueError, match="both could not be read: ValueError: it has the splits "
                                         "train, test: add one"):
        load_problems(saved / "both", split="validation")


def test_a_short_name_is_read_from_the_hub(saved, monkeypatch):
    """The library is asked for the data set, configuration and split of the table."""
    import datasets
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *where, **more: asked.append(
        (*where, more["split"])) or datasets.load_from_disk(str(saved / "gsm8k")))
    for source, split, wanted in (
            ("gsm8k", "train", ("openai/gsm8k", "main", "train")),
            ("gsm8k", "test", ("openai/gsm8k", "main", "test")),
            ("gsm8k:train", "test", ("openai/gsm8k", "main", "train")),
            ("aime24", "test", ("HuggingFaceH4/aime_2024", None, "train")),
            ("mine/own:part:dev", "test", ("mine/own", "part", "dev")),
            ("mine/own::dev", "test", ("mine/own", None, "dev")),
            ("mine/own-1.5::dev", "test", ("mine/own-1.5", None, "dev"))):
        columns = {} if source.startswith("mine") else {"problem": "text"}   # not used
        assert len(load_problems(source, split=split, columns=columns)) == 5
        assert asked.pop() == wanted
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *where: ["all"])
    assert load_problems("mine/own")[0].id == "own-1" and asked.pop() == ("mine/own", None, "all")


def test_files_of_the_hub_are_read_from_a_folder_of_the_same_form(saved):
    (saved / "hub" / "data").mkdir(parents=True)
    (saved / "gsm8k.parquet").rename(saved / "hub" / "data" / "test-00000-of-00001.parquet")
    problems = load_problems(saved / "hub", split="test")
    assert [p.answer for p in problems] == ["2000"] * 5


def test_without_the_library_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="library datasets reads gsm8k: pip install datasets"):
        load_problems("gsm8k")
    with pytest.raises(ValueError, match="no data file at math-500; did you mean math500?"):
        load_problems("math-500")


def test_the_options_of_data_reach_the_reader(monkeypatch):
    monkeypatch.setattr(prepare, "load_problems", lambda source, needs, **how: how)
    o = parse_training(["--answer-lists", "all", "--columns", "problem=q", "--answer-format",
                        "gsm8k", "--seed", "3"])
    how = {"answer_lists": "all", "split": "test", "answer_format": "gsm8k", "seed": 3}
    assert prepare.load_data(o, "x", "test.jsonl", "test") == how | {"columns": {"problem": "q"}}
    assert prepare.load_data(o, "tiny", "test.jsonl", "test") == how | {"columns": {}}


def test_a_prompt_that_ends_in_think_takes_it_from_the_expert_response(tmp_path):
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    problem = load_problems(write(tmp_path / "o.jsonl", five(ROWS["openr1-46k"][0])))[0]
    response = tokenizer.decode(PromptBuilder(tokenizer).expert_response(problem))
    template = tokenizer.chat_template
    for think in ("<think>", "<think>\n"):
        tokenizer.chat_template = template + "{{ think }}"
        builder = PromptBuilder(tokenizer, template_args={"think": think})
        assert tokenizer.decode(builder.plain(problem)).endswith(think)
        assert think + tokenizer.decode(builder.expert_response(problem)) == response


def test_a_system_turn_and_template_arguments_reach_the_prompt():
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
        "{% if enable_thinking is defined and not enable_thinking %}quick{% endif %}")
    problem = Problem("1+1", "2")
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=None), generation_config=None)
    builder = prepare.make_builder(parse_training([
        "--instruction", "", "--system", "Be brief.", "--template-args", "enable_thinking=false",
        "--demo-format", "one-turn"]), tokenizer, model)
    assert builder._in_turns(["1+1"]) == "<|system|>Be brief.<|user|>1+1quick"
    assert tokenizer.decode(builder.plain(problem)) == "<|system|>Be brief.<|user|>1+1quick"
    assert template_arguments("a=3, date_string=26 Jul 2024") == {
        "a": 3, "date_string": "26 Jul 2024"}
    assert not builder.depends_on_date()
    with pytest.raises(ValueError, match="--template-args 'a' is not of the form NAME=VALUE"):
        template_arguments("a")


def test_a_template_that_writes_the_date_is_found():
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    tokenizer.chat_template = (
        "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}"
        "{% endif %}{{ date_string }} {{ messages[0].content }}")
    assert PromptBuilder(tokenizer).depends_on_date()
    assert not PromptBuilder(tokenizer, template_args={"date_string": "1"}).depends_on_date()


def test_training_evaluates_on_each_of_several_data_sets(tmp_path, capsys):
    lines = (TINY / "test.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("easy", lines[:6]), ("hard", lines[6:10])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    arguments = ["--test-data", f"{tmp_path}/easy.jsonl", f"{tmp_path}/hard.jsonl", "--device",
                 "cpu", "--batch-size", "2", "--n-on", "2", "--steps", "2", "--eval-every", "1",
                 "--output-dir", str(tmp_path / "run")]
    trainer.train(trainer.prepare(arguments))
    assert "10 held-out problems" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    for row, name in ((rows[0], "eval_accuracy_before"), *((row, "eval_accuracy") for row in rows)):
        assert row[name] == pytest.approx((row[f"{name}/easy"] + row[f"{name}/hard"]) / 2)
        assert round(6 * row[f"{name}/easy"]) == pytest.approx(6 * row[f"{name}/easy"])
    assert curves.series(rows, "eval_accuracy/hard").keys() == {0, 1, 2}
    again = trainer.prepare(["--resume", "--steps", "3", *arguments])
    assert again.start == 2 and list(again.held_out) == ["easy", "hard"]
    with pytest.raises(ValueError, match="have the same name"):
        trainer.prepare([*arguments[:2], *arguments[1:2], *arguments[3:-2]])
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "easy.jsonl").write_text(lines[11])
    run = trainer.prepare([*arguments[:2], f"{tmp_path}/more/easy.jsonl", *arguments[3:-2],
                           "--output-dir", str(tmp_path / "other")])
    assert list(run.held_out) == [f"{tmp_path.name}-easy", "more-easy"]


def test_a_suite_names_data_samples_and_settings(tmp_path, monkeypatch, capsys):
    """`--suite paper` on stand-ins for the data sets of the hub, which are named as there."""
    rows = {name: five(row) for name, (row, _) in ROWS.items()}
    rows["gpqa"] = five({"Question": "N: cold?", "Correct Answer": "ice", "Incorrect Answer 1": "1",
                         "Incorrect Answer 2": "2", "Incorrect Answer 3": "3"})
    for name in rows:
        write(tmp_path / f"{name}.jsonl", rows[name])
    read = prepare.embedded
    monkeypatch.setattr(prepare, "embedded", lambda path, file: str(
        tmp_path / f"{path}.jsonl") if path in rows else read(path, file))
    monkeypatch.setattr("sys.argv", [
        "eval.py", "--suite", "paper", "--device", "cpu", "--limit", "2", "--max-new-tokens", "4",
        "--output", str(tmp_path / "out.jsonl")])
    evaluation.main()
    said = capsys.readouterr().out.splitlines()
    table = {line.split()[0]: line.split() for line in said[2:11]}
    assert {name: (row[1:5]) for name, row in table.items()} == {
        name: ["0", "0.6", "2", str(KNOWN[name].samples)] for names in PAPER.values()
        for name in names}
    assert said[11:13] == ["average in-distribution, 0 shots: 0.0%",
                           "average out-of-distribution, 0 shots: 0.0%"]
