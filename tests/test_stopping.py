"""Stop strings: where they end what is sampled, and what training makes of it."""

import functools
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import run as run_script
from test_rollout import FakeGraphs
from test_train import metrics_of, prepare, sampled_batch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tiny"))
import rollout
import train as trainer
from data import Problem, PromptBuilder, Question, Response
from make import make_tokenizer
from model_utils import ModelConfig, Transformer, token_logprobs
from options import parse_training, stop_strings
from rollout import Sampler, generate
from stopping import StopStrings, check_stops, decode, end_response

V, EOS, NEW = 40, 0, 24
CONFIG = ModelConfig(
    vocab_size=V, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=16, norm_eps=1e-6, rope_theta=1e4, rope_scaling=None, max_position=64,
    tie_embeddings=False, qkv_bias=True, out_bias=False, mlp_bias=False, qk_norm=True)
PROMPTS = [[5, 17, 2, 30, 9], [11], [3, 3, 8, 1, 4, 39, 22, 14, 7], [25, 6, 19]]
# Bytes as byte-level tokenizers write them: Ċ is a line break, Ġ a space, Ã© the two bytes of é,
# and Ŀħ two of the three of U+2745 and others.
PIECES = ["<|end|>", "Ċ", "ĊĊ", "}ĊĊĊ", "}", "Q", "ues", "ĠQ", ":", ":Ċ", "Ã", "©", "Ã©", "â", "Ŀ",
          "ħ", "âĿ", "Ŀħ", "Ġ", "ĠĠ", "x"]
LETTERS = [chr(ord("a") + i) for i in range(V - len(PIECES))]


def byte_level() -> PreTrainedTokenizerFast:
    vocabulary = {piece: i for i, piece in enumerate(PIECES + LETTERS)}
    found = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    found.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=found, eos_token="<|end|>")


def sentence_piece() -> PreTrainedTokenizerFast:
    """Words carry their space, the first loses it, and bytes have tokens of their own."""
    pieces = ["<|end|>", "▁", "▁Q", "ues", ":", "▁:", "x", "<0x0A>", "<0xC3>", "<0xA9>", "é",
              "▁▁", "}", "Q", "<0xE2>", "<0x9D>"]
    pieces += [f"▁{letter}" for letter in LETTERS] + LETTERS
    found = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces[:V])}, merges=[],
                                 byte_fallback=True))
    found.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                       decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=found, eos_token="<|end|>")


STOPS = [["\n\n\n"], ["\n\n\nQ"], ["é"], ["Ques"], [":"], [" Q", "x"], ["\n", "} "], ["  a"],
         ["❅"], [" "], ["a", "ab"]]


def first_end(tokenizer, strings, tokens):
    """What StopStrings finds, from the whole text at every length."""
    return next((end for end in range(1, len(tokens) + 1)
                 if any(each in decode(tokenizer, tokens[:end]) for each in strings)), None)


@pytest.mark.parametrize("strings", STOPS, ids=repr)
@pytest.mark.parametrize("make", [byte_level, sentence_piece, make_tokenizer])
def test_the_first_stop_string_is_found_however_many_tokens_are_new(make, strings):
    tokenizer, draw, found = make(), random.Random(f"{strings}"), 0
    every = range(1, len(tokenizer) + 3)   # ids beyond the tokenizer's have no text
    close = [i for i in every if set(decode(tokenizer, [i])) & {*"".join(strings), "\ufffd"}]
    for _ in range(60):
        few = draw.sample(close, min(len(close), draw.randint(1, 8))) + draw.sample(every, 2)
        tokens = [draw.choice(few) for _ in range(draw.randint(1, 24))]
        wanted, seen, at, stop = first_end(tokenizer, strings, tokens), 0, None, StopStrings(
            tokenizer, strings)
        while at is None and seen < len(tokens):
            new = min(len(tokens), seen + draw.choice([1, 1, 3, 16]))
            at, seen = stop(tokens[:new], seen), new
        assert at == wanted
        found += at is not None
    assert found or make is not byte_level


def make_model() -> Transformer:
    torch.manual_seed(0)
    model = Transformer(CONFIG).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(1.7)
    return model


@functools.cache
def unstopped(temperature):
    return generate(make_model(), PROMPTS, n=12, max_new_tokens=NEW, seed=3, stop_ids=[EOS],
                    temperature=temperature)


@pytest.mark.parametrize("strings", [["\n\n\n"], ["é"], [" Q", "x"], ["first"]], ids=repr)
@pytest.mark.parametrize("slots, check_every", [(1, 0), (5, 0), (48, 0), (5, 1), (5, 4), (48, 16)])
def test_completions_end_at_stop_strings_in_any_slots(strings, slots, check_every, monkeypatch):
    """check_every: decode steps between two checks of a GPU, with fake graphs; 0 is a CPU. Every
    other prompt has no stop string."""
    tokenizer, model, calls = byte_level(), make_model(), []
    sampler = Sampler(CONFIG, slots, 64, "cpu", torch.float32)
    if check_every:
        monkeypatch.setattr(rollout, "CHECK_EVERY", check_every)
        sampler.capture = FakeGraphs(sampler)
    if strings == ["first"]:   # the text of the first token of a completion
        strings = [decode(tokenizer, unstopped(1.0)[0].tokens[:1])]
    stop = StopStrings(tokenizer, strings)
    found = generate(model, PROMPTS, n=12, max_new_tokens=NEW, seed=3, stop_ids=[EOS],
                     sampler=sampler, stop_at=[stop, None, stop, None],
                     progress=lambda *numbers: calls.append(numbers))
    ends = []
    for i, (c, whole) in enumerate(zip(found, unstopped(1.0), strict=True)):
        text = whole.tokens[:-1] if whole.tokens[-1] == EOS else whole.tokens
        end = None if i // 12 % 2 else first_end(tokenizer, strings, text)
        assert c.tokens == whole.tokens[:end]
        assert c.logprobs == pytest.approx(whole.logprobs[:end], abs=1e-4)
        assert c.finished == (whole.finished or end is not None)
        ends.append(end)
    assert len(set(ends)) > 1
    work = sampler.work
    assert [sum(each) for each in zip(*calls)] == [48, sum(len(c.tokens) for c in found)]
    assert work.sequence_steps == sum(len(c.tokens) - 1 for c in found)


def test_a_stop_string_that_is_complete_at_the_limit_finishes_the_completion():
    tokenizer, model, checked = byte_level(), make_model(), 0
    for index, whole in enumerate(unstopped(1.0)):
        limit = first_end(tokenizer, ["x"], whole.tokens)
        if limit is None:
            continue
        prompt, sample = PROMPTS[index // 12], index % 12
        for length, finished in ((limit, True), (limit - 1, False)):
            if length:
                c = generate(model, [prompt], n=sample + 1, max_new_tokens=length, seed=3,
                             stop_ids=[EOS], stream_ids=[index // 12],
                             stop_at=[StopStrings(tokenizer, ["x"])])[-1]
                assert c.tokens == whole.tokens[:length] and c.finished == finished
                checked += 1
    assert checked > 4


# --------------------------------------------------------------------------------------------------
# Which stop strings

def test_raw_text_has_the_separator_of_demonstrations_by_default():
    tokenizer = make_tokenizer()

    def strings(**settings):
        builder = PromptBuilder(tokenizer, **settings)
        return [each and each.strings for each in builder.stop_at]

    assert strings() == strings(demo_format="turns") == [None, None]
    assert strings(demo_format="text") == [None, ("\n\n\n",)]
    assert strings(chat_template=False) == [("\n\n\n",), None]
    assert strings(chat_template=False, demo_format="text") == [("\n\n\n",)] * 2
    assert strings(chat_template=False, demo_format="text", stop=()) == [None, None]
    assert strings(stop=("}",)) == [("}",)] * 2


def test_stop_strings_are_read_with_line_breaks():
    def read(*words):
        return stop_strings(parse_training(["--stop", *words]))

    assert read("auto") is stop_strings(parse_training([])) is None and read("none") == ()
    assert read(r"\n\nQ", "\t}", r"\boxed") == ("\n\nQ", "\t}", r"\boxed")
    with pytest.raises(ValueError, match="--stop none Q: auto and none stand alone"):
        read("none", "Q")


@pytest.mark.parametrize("string, message", [
    ("", "--stop '' is empty"), ("é", "'é' can never be in a response: the tokenizer makes '"),
    ("x<|end|>", r"'x<\|end\|>' has <\|end\|>, which ends every response by itself"),
    ("\ufffd", "has the sign U.FFFD")])
def test_a_stop_string_that_can_never_occur_is_an_error(string, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        check_stops(make_tokenizer(), ["\n", string])
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path / "run", f"--stop={string}")


# --------------------------------------------------------------------------------------------------
# Training and evaluation

# The embedded model writes "3 4 7 \boxed{7}<|end|>". Wrong off-policy responses stay, too.
STOPPED = ["--stop", "}", r"\boxed{1", "--errs", "false"]


@pytest.mark.parametrize("strings", [["}"], [r"xed{1", "5", "}"], ["4"]], ids=repr)
def test_the_tokens_of_a_stop_string_are_cut_and_old_logprobs_are_those_of_what_was_sampled(
        tmp_path, strings):
    run = prepare(tmp_path / "run", "--stop", *strings)
    rows, tokenizer, ended = sampled_batch(run).responses, run.builder.tokenizer, set()
    for r in rows:
        text = decode(tokenizer, r.sampled)
        place = min((text.index(each) for each in strings if each in text), default=None)
        if place is None or r.sampled[-1] in run.model.stop_ids:
            assert r.tokens == r.sampled and r.finished == (r.sampled[-1] in run.model.stop_ids)
            continue
        assert r.finished and r.text == text[:place]
        kept = max(1, next(k for k in range(len(r.sampled) + 1)
                           if decode(tokenizer, r.sampled[:k]).startswith(text[:place])))
        end = [tokenizer.eos_token_id] if r.off_policy else []
        assert r.tokens == r.sampled[:kept] + end
        ended.add((r.off_policy, kept))
    assert {off for off, _ in ended} == {False, True}
    before = [r.old_logprobs for r in rows]
    assert trainer.recompute_logprobs(run, rows) < 1e-4
    for r, sampled in zip(rows, before):
        assert len(sampled) == len(r.tokens) and r.old_logprobs == pytest.approx(sampled, abs=1e-4)
        if r.off_policy:   # in all it is the log-probability of what was sampled
            tokens = torch.tensor([r.behaviour_prompt + r.sampled])
            logprobs = token_logprobs(run.model, tokens)[0, -len(r.sampled):]
            assert sum(sampled) == pytest.approx(logprobs.sum().item(), abs=1e-3)


def test_an_end_of_text_token_takes_the_place_of_a_stop_string_inside_a_kept_token():
    """Its log-probability is 0, because the response ends there with certainty. At the limit there
    is no room for it."""
    tokenizer = byte_level()
    x, closing = (tokenizer.convert_tokens_to_ids(each) for each in ("x", "}ĊĊĊ"))
    builder = PromptBuilder(tokenizer, chat_template=False, demo_format="text")

    def ended(tokens, off_policy, limit=9):
        run = SimpleNamespace(builder=builder, model=SimpleNamespace(stop_ids=(EOS,)),
                              options=SimpleNamespace(max_new_tokens=limit))
        r = end_response(Response(Question(0, Problem("", ""), [1], []), off_policy, [1], tokens,
                                  [-1.0 - i for i in range(len(tokens))], True, ""), run)
        return r.tokens, r.old_logprobs, r.text

    assert ended([x, closing], True) == ([x, closing, EOS], [-1.0, -2.0, 0], "x}")
    assert ended([x, closing], True, 2) == ended([x, closing], False) == (
        [x, closing], [-1.0, -2.0], "x}")
    assert ended([x, 2, 1], True) == ([x, EOS], [-1.0, -5.0], "x")
    assert ended([x, 2, 1], False) == ([x], [-1.0], "x")
    assert ended([2, 1], False) == ([2], [-1.0], "")       # a response has a token
    assert ended([2, 1], True) == ([2, EOS], [-1.0, -2.0], "")
    assert ended([x, EOS], False) == ended([x, EOS], True) == ([x, EOS], [-1.0, -2.0], "x")


def test_runs_with_stop_strings_are_alike_in_any_layout_and_resume(tmp_path):
    for name, steps, slots in (("one", 3, 0), ("two", 2, 3)):
        run = prepare(tmp_path / name, *STOPPED, "--steps", steps, "--slots", slots)
        assert run.builder.stop == ("}", r"\boxed{1")
        trainer.train(run)
    del run   # unlocks its folder
    with pytest.raises(ValueError, match="was run with stop"):
        prepare(tmp_path / "two", "--resume", "--stop", "}")
    run_script("train.py", "--resume", "--steps", 3, "--output-dir", tmp_path / "two", "--device",
               "cpu", processes=2)
    for one, two in zip(metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two"), strict=True):
        assert one["logprob_gap"] < 1e-4 and one["truncated"] == 0 < one["tokens_sampled"]
        for name in ("reward_on", "response_length", "response_length_off", "tokens_sampled",
                     "grad_norm", "ratio_max"):
            assert one[name] == pytest.approx(two[name], rel=1e-3), name
    samples = [json.loads(line) for line in (tmp_path / "one/samples.jsonl").open()]
    assert samples and not any("}" in row["response"] for row in samples)


def test_an_evaluation_ends_answers_at_stop_strings(tmp_path):
    def evaluate(*more, check=True):
        return run_script("eval.py", "--limit", 12, "--device", "cpu", *more, cwd=tmp_path,
                          check=check)

    evaluate()
    assert "evals/tiny-2.jsonl" in evaluate("--stop", "}").stdout
    assert "evals/tiny-3.jsonl" in evaluate("--stop", "}", "--slots", 2, "--output",
                                            "evals/tiny-3.jsonl").stdout
    plain, stopped, two = ([json.loads(line) for line in (tmp_path / f"evals/{name}.jsonl").open()]
                           for name in ("tiny", "tiny-2", "tiny-3"))
    assert stopped == two
    for row, whole in zip(stopped, plain, strict=True):
        assert row["response"] == whole["response"].partition("}")[0]
        assert row["finished"] or "}" not in whole["response"]
