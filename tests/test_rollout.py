"""These tests compare sampling with transformers' generate and with distributions that they compute
from the full logits."""

import copy
import dataclasses
import functools
import gc
import itertools
import math
import random
import shutil
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

import memory
import rollout
from distributed import share_out
from machine import bucket
from memory import MAX_SLOTS, choose_slots
from model_utils import ModelConfig, Transformer, token_logprobs
from rollout import Completion, Sampler, generate
from sampling import sample, stream_key, uniform

V, NEW = 40, 24
PROMPTS = [[5, 17, 2, 30, 9], [11], [3, 3, 8, 1, 0, 39, 22, 14, 7], [25, 6, 19],
           [1, 2, 3, 4, 5, 6, 7, 8, 9], [28, 33]]


@pytest.fixture(scope="module")
def hf():
    config = Qwen3Config(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                         max_position_embeddings=64, tie_word_embeddings=False,
                         bos_token_id=None, eos_token_id=None)
    g = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.25 * torch.randn(parameter.shape, generator=g) + ("norm" in name))
    return model


@pytest.fixture(scope="module")
def model(hf):
    model = Transformer(ModelConfig.from_hf(hf.config))
    model.load_state_dict(hf.state_dict())
    return model


@pytest.fixture(scope="module")
def reference(hf):
    """Returns a function that generates greedy responses with transformers, prompt by prompt."""
    @functools.cache
    def run(*stop_ids):
        completions = []
        for prompt in PROMPTS:
            tokens = torch.tensor([prompt])
            # Without a mask, generate would take token 0 in a prompt for padding.
            out = hf.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False,
                              max_new_tokens=NEW, pad_token_id=0,
                              eos_token_id=list(stop_ids) or None)
            completions.append(out[0, len(prompt):].tolist())
        return completions
    return run


def uniform_at(keys, position):
    return uniform(keys, torch.full_like(keys, position))


def tokens_of(completions: list[Completion]) -> list[list[int]]:
    return [c.tokens for c in completions]


# --------------------------------------------------------------------------------------------------
# Greedy

@pytest.mark.parametrize("slots", [1, 2, 5, 6, 100])
@pytest.mark.parametrize("stop_at", ["never", "first", "last", "somewhere"])
def test_greedy_equals_transformers(stop_at, slots, model, reference):
    plain, length = reference(), NEW
    if stop_at == "last":   # the response is cut after the last token that is new in it
        length = 1 + max(i for i, token in enumerate(plain[0]) if token not in plain[0][:i])
    stops = {"never": [], "first": plain[2][:1], "last": [plain[0][length - 1]],
             "somewhere": [plain[0][4], plain[3][9], plain[4][7]]}[stop_at]
    completions = generate(model, PROMPTS, temperature=0, max_new_tokens=length, stop_ids=stops,
                           slots=slots)
    assert tokens_of(completions) == [tokens[:length] for tokens in reference(*stops)]
    assert [c.finished for c in completions] == [c.tokens[-1] in stops for c in completions]
    assert all(c.logprobs == [0.0] * len(c.tokens) for c in completions)

    if stop_at == "never":
        assert not any(c.finished for c in completions)
    elif stop_at == "first":
        assert completions[2].finished and len(completions[2].tokens) == 1
    elif stop_at == "last":
        assert completions[0].finished and len(completions[0].tokens) == length > 1
    else:
        assert len({len(c.tokens) for c in completions}) > 2   # the batch shrinks more than once


@pytest.mark.parametrize("slots", [1, 4, 100])
def test_n_responses_to_a_prompt_are_consecutive(slots, model, reference):
    completions = generate(model, PROMPTS, n=3, temperature=0, max_new_tokens=NEW, slots=slots)
    assert tokens_of(completions) == [tokens for tokens in reference() for _ in range(3)]


def test_no_prompts_give_no_responses(model):
    assert generate(model, [], max_new_tokens=5) == []


# --------------------------------------------------------------------------------------------------
# The distribution sampled from

def exact_distribution(logits, temperature, top_p, top_k):
    """Turns logits [V] into probabilities [V] in float64. It keeps tokens one by one, from the
    likeliest down."""
    probs = (logits.double() / temperature).softmax(-1)
    likeliest = sorted(range(len(probs)), key=lambda i: -float(probs[i]))[:top_k or len(probs)]
    enough = top_p * float(probs[likeliest].sum())
    kept = []
    for i in likeliest:
        if kept and float(probs[kept].sum()) >= enough:
            break
        kept.append(i)
    truncated = torch.zeros_like(probs)
    truncated[kept] = probs[kept] / probs[kept].sum()
    return truncated


SETTINGS = [(1.0, 1.0, 0), (0.7, 1.0, 0), (1.6, 1.0, 0), (1.0, 1.0, 6), (0.7, 0.8, 0),
            (1.0, 0.75, 6), (1.3, 0.3, 0), (1.0, 1e-6, 0), (1.0, 1.0, V)]


@pytest.mark.parametrize("temperature, top_p, top_k", SETTINGS)
def test_logprobs_are_those_of_the_distribution_sampled_from(temperature, top_p, top_k, model):
    completions = generate(model, PROMPTS, n=2, max_new_tokens=NEW, temperature=temperature,
                           top_p=top_p, top_k=top_k, stop_ids=[1, 30], seed=4)
    for i, completion in enumerate(completions):
        prompt = PROMPTS[i // 2]
        sequence = torch.tensor([prompt + completion.tokens])
        with torch.no_grad():
            logits = model(sequence)[0, len(prompt) - 1:-1]
            training = token_logprobs(model, sequence, temperature)[0, len(prompt) - 1:]
        exact = [exact_distribution(row, temperature, top_p, top_k)[token].log().item()
                 for row, token in zip(logits, completion.tokens)]
        assert completion.logprobs == pytest.approx(exact, abs=1e-4)
        if top_p == 1 and top_k in (0, V):
            assert completion.logprobs == pytest.approx(training.tolist(), abs=1e-4)


def chi_squared_bound(degrees):
    """A chi-squared variable exceeds this bound with a probability of about 1/30,000. The bound
    comes from Wilson and Hilferty's approximation, which takes the cube root as normal."""
    return degrees * (1 - 2 / (9 * degrees) + 4 * math.sqrt(2 / (9 * degrees))) ** 3


def assert_drawn_from(counts, probs):
    """Compares counts [V] with probabilities [V] by Pearson's test. Tokens of probability 0 must
    have count 0."""
    assert not counts[probs == 0].any()
    expected = (probs * counts.sum())[probs > 0]
    assert expected.min() > 5   # with fewer, the statistic is not chi-squared
    if len(expected) > 1:
        statistic = ((counts[probs > 0] - expected) ** 2 / expected).sum().item()
        assert statistic < chi_squared_bound(len(expected) - 1)


@pytest.mark.parametrize("temperature, top_p, top_k", SETTINGS)
@pytest.mark.parametrize("seed", [0, 1])
def test_tokens_are_sampled_at_their_probabilities(seed, temperature, top_p, top_k):
    logits = torch.randn(V, generator=torch.Generator().manual_seed(seed)).clamp(-1.5)
    probs = exact_distribution(logits, temperature, top_p, top_k)
    keys = torch.tensor([stream_key(seed, i, 0) for i in range(20000)])
    tokens, logprobs = sample(logits.expand(len(keys), V), temperature, top_p, top_k,
                              uniform_at(keys, 3))
    assert_drawn_from(tokens.bincount(minlength=V), probs)
    assert torch.allclose(logprobs.double(), probs[tokens].log(), atol=1e-5)


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2 ** -32])
@pytest.mark.parametrize("top_k, forbidden", [(2, 0.0), (0, -math.inf)])
def test_tokens_of_probability_zero_are_never_sampled(top_k, forbidden, u):
    logits = torch.tensor([[forbidden] * 3 + [5.0, 5.0] + [forbidden] * 3])
    tokens, logprobs = sample(logits, 1.0, 1.0, top_k, torch.tensor([u], dtype=torch.float64))
    assert tokens.item() == (3 if u < 0.5 else 4)
    assert logprobs.item() == pytest.approx(math.log(0.5))


@pytest.mark.parametrize("top_p, top_k", [(1.0, 0), (0.9, 0), (1.0, 3)])
def test_nan_logits_give_token_ids_within_bounds(top_p, top_k):
    """An index out of bounds would end the process on a GPU before the trainer reports the NaN."""
    tokens, logprobs = sample(torch.full((2, 300), torch.nan), 1.0, top_p, top_k,
                              torch.tensor([0.1, 0.9]).double())
    assert ((0 <= tokens) & (tokens < 300)).all() and logprobs.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_temperature_zero_takes_the_likeliest_token(dtype):
    logits = torch.randn(50, V, generator=torch.Generator().manual_seed(0)).to(dtype)
    tokens, logprobs = sample(logits, 0, 1.0, 0, torch.rand(50, dtype=torch.float64))
    assert torch.equal(tokens, logits.argmax(-1))
    assert not logprobs.any() and logprobs.dtype == torch.float32


# --------------------------------------------------------------------------------------------------
# The random numbers

N = 20000
ALONG = {
    "seeds": lambda: uniform_at(torch.tensor([stream_key(i, 5, 2) for i in range(N)]), 0),
    "streams": lambda: uniform_at(torch.tensor([stream_key(0, i, 0) for i in range(N)]), 0),
    "samples": lambda: uniform_at(torch.tensor([stream_key(7, 1, i) for i in range(N)]), 9),
    "positions": lambda: uniform(torch.tensor([stream_key(0, 0, 0)]), torch.arange(N)),
    "neighbouring keys": lambda: uniform_at(torch.arange(N) - N // 2, 0),
}


@pytest.mark.parametrize("along", ALONG)
def test_uniform_is_uniform_and_uncorrelated(along):
    u = ALONG[along]()
    assert u.dtype == torch.float64 and u.min() >= 0 and u.max() < 1
    assert_drawn_from((u * 64).long().bincount(minlength=64), torch.full((64,), 1 / 64))
    pairs = (u[:-1] * 8).long() * 8 + (u[1:] * 8).long()   # each pair falls into one of 64 squares
    assert_drawn_from(pairs[::2].bincount(minlength=64), torch.full((64,), 1 / 64))
    for lag in (1, 2, 8):
        correlation = torch.corrcoef(torch.stack((u[:-lag], u[lag:])))[0, 1].item()
        assert abs(correlation) < 4 / math.sqrt(N)


@pytest.mark.parametrize("key", [0, 1234567, -5, 2 ** 63 - 1, -2 ** 63])
def test_uniform_is_the_upper_half_of_splitmix64(key):
    for position in range(5):
        z = (key + 0x9E3779B97F4A7C15 * (position + 1)) % 2 ** 64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2 ** 64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2 ** 64
        assert uniform_at(torch.tensor([key]), position).item() == ((z ^ z >> 31) >> 32) / 2 ** 32


def test_stream_keys_differ():
    numbers = (-1, 0, 1, 2, 41, 2 ** 31, 2 ** 63)
    keys = [stream_key(*parts) for parts in itertools.product(numbers, repeat=3)]
    assert len(set(keys)) == len(keys) and torch.tensor(keys).dtype == torch.int64


@pytest.mark.parametrize("slots", [1, 3, 7, 100])
def test_responses_depend_only_on_seed_stream_sample_and_prompt(slots, model):
    def run(chosen, n=3, **changes):
        return generate(model, [PROMPTS[i] for i in chosen], n=n, max_new_tokens=12,
                        stop_ids=[1, 30],
                        **dict(seed=5, stream_ids=list(chosen), slots=slots) | changes)

    base = run(range(6), slots=256)
    for chosen in (range(6), [3, 0, 5], [4], range(5, -1, -1)):
        completions = run(chosen)
        expected = [base[3 * i + s] for i in chosen for s in range(3)]
        assert tokens_of(completions) == tokens_of(expected)
        for completion, wanted in zip(completions, expected):
            assert completion.logprobs == pytest.approx(wanted.logprobs, abs=1e-4)
    assert tokens_of(run(range(6), n=2)) == tokens_of(c for i, c in enumerate(base) if i % 3 < 2)
    assert tokens_of(run(range(6), n=[1, 3, 2, 1, 3, 2])) == tokens_of(
        c for i, c in enumerate(base) if i % 3 < [1, 3, 2, 1, 3, 2][i // 3])
    # A prompt's stream id is its index by default.
    assert tokens_of(run(range(6), stream_ids=None)) == tokens_of(base)


def test_responses_differ_between_seeds_streams_and_samples(model):
    def run(**changes):
        return tokens_of(generate(model, [PROMPTS[0]] * 2, n=2, max_new_tokens=12,
                                  **dict(seed=5, stream_ids=[0, 1]) | changes))

    sampled = run() + run(seed=6) + run(stream_ids=[2, 3])
    assert len({tuple(tokens) for tokens in sampled}) == 12


# --------------------------------------------------------------------------------------------------
# Cache slots

def distinct_prefixes(prompts, least):
    """Counts the positions to prefill when every prefix of at least `least` tokens, and every
    prompt, goes through the model once."""
    total, seen = 0, []
    for prompt in prompts:
        shared = max((next((i for i in range(min(len(a), len(prompt))) if a[i] != prompt[i]),
                           min(len(a), len(prompt))) for a in seen), default=0)
        total += 0 if prompt in seen else len(prompt) - (shared if shared >= least else 0)
        seen.append(prompt)
    return total


LONG = [(7 * i) % V for i in range(34)]
SHARED = {
    "none": [[i] + LONG[:6 + i] for i in range(5)],
    "some": [LONG + [1, 2], LONG + [3], [9] * 36, LONG[:33] + [5, 5, 5], [9] * 35 + [2, 3],
             LONG + [1, 2, 4], [9, 9]],
    "all": [LONG] * 3 + [LONG + [1]],
    "nested": [LONG + [i // 2, *[8] * 3, i] for i in range(6)],
}


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("slots", [1, 2, 5, 100])
@pytest.mark.parametrize("shared", SHARED)
def test_shared_prefixes_are_prefilled_once(shared, slots, shuffled, model):
    prompts = SHARED[shared][::-1] if shuffled else SHARED[shared]
    sampler = Sampler(model.config, slots, 64, "cpu", torch.float32)
    completions = generate(model, prompts, n=3, max_new_tokens=12, stop_ids=[1, 30], seed=2,
                           sampler=sampler)
    for i, prompt in enumerate(prompts):   # here each prompt has a cache of its own
        alone = generate(model, [prompt], n=3, max_new_tokens=12, stop_ids=[1, 30], seed=2,
                         stream_ids=[i])
        assert tokens_of(completions[3 * i:3 * i + 3]) == tokens_of(alone)
        for mine, other in zip(completions[3 * i:], alone):
            assert mine.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    work = sampler.work
    assert work.positions - work.wasted_positions == (
        work.sequence_steps + distinct_prefixes(sorted(prompts), 32))


def test_a_long_rest_behind_a_prefix_needs_no_mask(model, monkeypatch):
    """A mask would take memory that grows with the square of the rest."""
    prompts = [LONG + [1], LONG + [2, *[3] * 9]]
    expected = generate(model, prompts, max_new_tokens=4)
    monkeypatch.setattr(rollout, "PREFILL_POSITIONS", 9)
    starts, extend = [], model.extend
    monkeypatch.setattr(model, "extend", lambda tokens, cache, slots, start=None, span=None: (
        starts.append(start) if slots is not None else None,
        extend(tokens, cache, slots, start, span))[1])
    found = generate(model, prompts, max_new_tokens=4)
    assert starts == [None, None] and tokens_of(found) == tokens_of(expected)


def test_a_model_in_float64_is_sampled_in_float64(model):
    wide = copy.deepcopy(model).double()
    for mine, other in zip(generate(wide, PROMPTS, max_new_tokens=4),
                           generate(model, PROMPTS, max_new_tokens=4), strict=True):
        assert mine.tokens == other.tokens
        assert mine.logprobs == pytest.approx(other.logprobs, abs=1e-5)


@pytest.mark.parametrize("slots", [1, 3, 7, 24])
def test_slots_are_never_idle_while_sequences_wait(slots, model):
    sampler = Sampler(model.config, slots, 64, "cpu", torch.float32)
    completions = generate(model, PROMPTS, n=4, max_new_tokens=NEW, stop_ids=[1, 30],
                           sampler=sampler)
    lengths = [len(c.tokens) for c in completions]
    assert len(set(lengths)) > 5   # with equal lengths the test would prove little
    steps = sampler.work.slot_steps // slots
    # Prefill samples the first token of each sequence.
    assert sampler.work.sequence_steps == sum(lengths) - len(lengths)
    # Graham's bound holds for any order in which no cache slot is idle.
    assert steps <= sum(lengths) / slots + max(lengths)
    assert steps >= max(lengths) - 1


class FakeGraphs:
    """Replaces the capture of CUDA graphs. A replay runs the recorded step again and checks that
    every tensor has the address that it had at the capture."""

    def __init__(self, sampler):
        self.sampler, self.captured, self.replayed = sampler, 0, 0

    def __call__(self, step):
        addresses, self.captured = self.addresses(), self.captured + 1
        step()

        def replay():
            assert self.addresses() == addresses
            self.replayed += 1
            step()
        return replay

    def addresses(self):
        s = self.sampler
        state = [s.lengths, s.tokens, s.uniforms, s.counts, s.done, s.sampled, s.logprobs, s.flat,
                 *s.stops.values()]
        return [tensor.data_ptr() for tensor in state + s.cache.keys + s.cache.values]


@pytest.mark.parametrize("slots, check_every", [
    (1, 5), *itertools.product((3, 20, 24), (1, 5, 100))])
def test_replayed_steps_sample_the_same_tokens(slots, check_every, model, monkeypatch):
    """The sampler works as on a GPU, but with fake graphs: it rounds batches and spans up with
    `bucket` and looks for ended sequences every CHECK_EVERY steps."""
    monkeypatch.setattr(rollout, "CHECK_EVERY", check_every)
    settings = dict(n=4, max_new_tokens=NEW, stop_ids=[1, 30], seed=3)
    sampler = Sampler(model.config, slots, 64, "cpu", torch.float32)
    sampler.capture = FakeGraphs(sampler)
    for _ in range(2):
        completions = generate(model, PROMPTS, sampler=sampler, **settings)
        expected = generate(model, PROMPTS, slots=slots, **settings)
        assert tokens_of(completions) == tokens_of(expected)
        assert [c.finished for c in completions] == [c.finished for c in expected]
        for completion, wanted in zip(completions, expected):
            assert completion.logprobs == pytest.approx(wanted.logprobs, abs=1e-4)
    assert sampler.capture.captured == len(sampler.graphs) <= 8   # the second rollout captures none
    assert sampler.capture.replayed > 10
    # Other settings need graphs of their own.
    generate(model, PROMPTS, sampler=sampler, **settings | dict(temperature=0.5))
    assert sampler.capture.captured == len(sampler.graphs) > 1
    # Graphs refer to the weights that they were captured with; another model drops them.
    other = Transformer(model.config)
    generate(other, PROMPTS, sampler=sampler, **settings)
    assert all(key[2].temperature == 1.0 for key in sampler.graphs)


@pytest.mark.parametrize("seed", range(12))
def test_any_mixture_equals_each_prompt_alone(seed, model, monkeypatch):
    """The prompts overlap in many ways, and several rollouts share one sampler. All sizes are
    small, so that many cases occur together."""
    draw = random.Random(seed)
    monkeypatch.setattr(rollout, "SHARE_AT_LEAST", draw.choice([1, 2, 5]))
    monkeypatch.setattr(rollout, "PREFILL_POSITIONS", draw.choice([1, 20, 4096]))
    monkeypatch.setattr(rollout, "CHECK_EVERY", draw.choice([1, 4]))
    sampler = Sampler(model.config, draw.randint(1, 9), 40, "cpu", torch.float32)
    if seed % 2:
        sampler.capture = FakeGraphs(sampler)
    for _ in range(6):
        stems = [[draw.randrange(V) for _ in range(draw.randint(1, 12))] for _ in range(3)]
        prompts = []
        for _ in range(draw.randint(1, 8)):
            stem = draw.choice(stems + prompts)
            prompts.append((stem[:draw.randint(1, len(stem))]
                            + [draw.randrange(V) for _ in range(draw.randint(0, 3))])[:28])
        n = [draw.randint(1, 4) for _ in prompts]
        settings = dict(max_new_tokens=draw.randint(1, 12),
                        stop_ids=draw.sample(range(V), draw.randint(0, 8)),
                        temperature=draw.choice([0, 1.0, 0.7]), top_k=draw.choice([0, 0, 5]),
                        seed=draw.randrange(99))
        completions = iter(generate(model, prompts, n=n, sampler=sampler, **settings))
        for i, prompt in enumerate(prompts):
            for wanted in generate(model, [prompt], n=n[i], stream_ids=[i], slots=n[i], **settings):
                completion = next(completions)
                assert completion.tokens == wanted.tokens and completion.finished == wanted.finished
                assert completion.logprobs == pytest.approx(wanted.logprobs, abs=1e-4)


@pytest.mark.parametrize("seed", range(8))
def test_nan_in_a_sequence_does_not_reach_others(seed, model, monkeypatch):
    """The embedding of token 39 is NaN, and it is sampled often. Sequences that come after such a
    one in its cache slot, or copy a prefix from it, sample what they would alone."""
    draw = random.Random(seed)
    monkeypatch.setattr(rollout, "SHARE_AT_LEAST", 1)
    monkeypatch.setattr(rollout, "CHECK_EVERY", draw.choice([1, 4]))
    spoiled = Transformer(model.config)
    spoiled.load_state_dict(model.state_dict())
    with torch.no_grad():
        spoiled.model.embed_tokens.weight[39] = torch.nan
        spoiled.lm_head.weight[39] *= 1.5
    sampler, broken = Sampler(model.config, draw.choice([2, 5, 12]), 40, "cpu", torch.float32), 0
    if seed % 2:
        sampler.capture = FakeGraphs(sampler)
    stems = [[draw.randrange(39) for _ in range(draw.randint(1, 14))] for _ in range(4)]
    prompts = [(draw.choice(stems)[:draw.randint(1, 14)]
                + [draw.randrange(39) for _ in range(draw.randint(0, 9))]) for _ in range(12)]
    settings = dict(max_new_tokens=12, stop_ids=[1, 30], temperature=draw.choice([0, 1.0]))
    completions = generate(spoiled, prompts, n=2, sampler=sampler, **settings)
    for i, completion in enumerate(completions):
        wanted = generate(spoiled, [prompts[i // 2]], n=i % 2 + 1, stream_ids=[i // 2], slots=2,
                          **settings)[-1]
        # The tokens behind the first NaN are arbitrary.
        nan, end = (next((t for t, x in enumerate(c.logprobs) if math.isnan(x)), len(c.tokens))
                    for c in (completion, wanted))
        assert nan == end and completion.tokens[:end] == wanted.tokens[:end]
        assert completion.logprobs[:end] == pytest.approx(wanted.logprobs[:end], abs=1e-4)
        broken += nan < len(completion.tokens)
    assert 2 <= broken <= 22


@pytest.mark.gpu
@pytest.mark.parametrize("slots", [3, 24])
def test_cuda_graphs_sample_what_the_cpu_samples(slots, model):
    settings = dict(n=4, max_new_tokens=NEW, stop_ids=[1, 30], seed=3)
    expected = generate(model, PROMPTS, slots=slots, **settings)
    on_gpu = Transformer(model.config).cuda()
    on_gpu.load_state_dict(model.state_dict())
    sampler = Sampler(model.config, slots, 64, "cuda", torch.float32)
    for _ in range(2):
        completions = generate(on_gpu, PROMPTS, sampler=sampler, **settings)
        assert tokens_of(completions) == tokens_of(expected)
        for completion, wanted in zip(completions, expected):
            assert completion.logprobs == pytest.approx(wanted.logprobs, abs=1e-4)
    assert sampler.graphs


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on the CPU")
def test_a_compiled_step_samples_the_same_tokens(model, reference):
    torch._dynamo.utils.counters.clear()
    sampler = Sampler(model.config, 4, 64, "cpu", torch.float32, compile=True)
    completions = generate(model, PROMPTS, temperature=0, max_new_tokens=NEW, sampler=sampler)
    assert tokens_of(completions) == reference()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_an_interrupted_rollout_leaves_nothing_allocated(model):
    sampler = Sampler(model.config, 3, 64, "cpu", torch.float32)
    expected = generate(model, PROMPTS, n=2, max_new_tokens=NEW)
    held = []

    def interrupt(ended, sampled):
        held.extend(weakref.ref(t) for t in (*sampler.cache.keys, *sampler.cache.values,
                                             sampler.prompt_logits, sampler.sampled))
        if len(held) > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, PROMPTS, n=2, max_new_tokens=NEW, sampler=sampler, progress=interrupt)
    gc.collect()
    assert held and not any(reference() is not None for reference in held)
    again = generate(model, PROMPTS, n=2, max_new_tokens=NEW, sampler=sampler)
    assert tokens_of(again) == tokens_of(expected)


def test_a_cache_that_does_not_fit_is_an_error(model, monkeypatch):
    # Keys and values: 2 layers, 2 heads, 64 positions, head size 16, 4 bytes a number. The rest is
    # what sampling needs, see memory.bytes_per_slot.
    per_slot = 2 * 2 * 2 * 64 * 16 * 4 + 64 * (8 + 4 + 8) + model.config.vocab_size * 5 * 4
    monkeypatch.setattr(rollout, "free_memory", lambda device: 10 * per_slot)
    Sampler(model.config, 10, 64, "cpu", torch.float32)
    with pytest.raises(ValueError, match="11 slots of 64 positions takes 0.00 GB, "
                                         "but 0.00 GB are free: fewer slots"):
        Sampler(model.config, 11, 64, "cpu", torch.float32)
    monkeypatch.setattr(rollout, "free_memory", lambda device: per_slot - 1)
    with pytest.raises(ValueError, match="a cache of 1 slots of 64 positions"):
        generate(model, [[1] * 40], max_new_tokens=24)


def test_slots_fill_the_free_memory_but_for_a_margin(model, monkeypatch):
    # Beside keys and values: a response's tokens, log-probabilities and random numbers, and five
    # logits of each token in float32.
    per_slot = 2 * 2 * 2 * 64 * 16 * 4 + 64 * (8 + 4 + 8) + model.config.vocab_size * 5 * 4
    half = 2 * 2 * 2 * 64 * 16 * 2 + 64 * (8 + 4 + 8) + model.config.vocab_size * 5 * 4
    monkeypatch.setattr(memory, "free_memory", lambda device: 100 * per_slot)
    choose = functools.partial(choose_slots, model.config, max_length=64, device="cpu")
    assert choose(1000, dtype=torch.float32) == 85
    assert choose(2, dtype=torch.float32) == 2
    assert choose(1000, dtype=torch.bfloat16) == 85 * per_slot // half
    assert choose(1000, dtype=torch.float32, beside=20 * per_slot) == 65
    assert choose(1000, dtype=torch.float32, beside=200 * per_slot) == 1
    assert choose(1000, dtype=torch.float32, free=10 * per_slot) == 8
    assert choose(1000, dtype=torch.float32, free=1000 * per_slot) == MAX_SLOTS


def test_a_rollout_on_a_cpu_takes_the_memory_that_it_needs(model):
    sampler = Sampler(model.config, 8, 60, "cpu", torch.float32)
    for prompts, new, held in (([[5, 6, 7]], 4, (2, 7)), ([[5, 6, 7]], 2, (2, 7)),
                               ([[5, 6], [9] * 10], 20, (4, 30)), ([[8, 2]] * 6, 30, (8, 32))):
        found = generate(model, prompts, n=2, max_new_tokens=new, sampler=sampler)
        assert found == generate(model, prompts, n=2, max_new_tokens=new)
        assert (len(sampler.cache.keys[0]), sampler.cache.size) == held


def test_a_sampler_for_shorter_prompts_or_another_model_is_refused(model):
    sampler = Sampler(model.config, 2, 20, "cpu", torch.float32)
    with pytest.raises(ValueError, match="prompt 0 has 11 tokens; with max_new_tokens=10 "
                                         "the sampler's 20 .* room for 10"):
        generate(model, [[1] * 11], max_new_tokens=10, sampler=sampler)
    other = Transformer(dataclasses.replace(model.config, num_layers=1))
    with pytest.raises(ValueError, match="another shape"):
        generate(other, [[1]], max_new_tokens=10, sampler=sampler)


def test_buckets_are_at_most_half_too_large():
    steps = sorted({bucket(number, 10 ** 6) for number in range(1, 200)})
    assert steps == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256]
    for most in (1, 5, 100):
        assert all(number <= bucket(number, most) <= min(most, 1.5 * number)
                   for number in range(1, most + 1))


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_share_out_balances_the_total_lengths(processes):
    lengths = [4000, 10, 12, 900, 11, 3000, 10, 700, 13, 2500, 60, 500]
    shares = share_out(lengths, processes)
    assert sorted(itertools.chain(*shares)) == list(range(12))
    assert all(shares) and all(s == sorted(s) for s in shares)
    loads = [sum(lengths[i] for i in share) for share in shares]
    # Graham's bound holds when the longest prompts are shared out first.
    assert max(loads) <= 4 / 3 * max(sum(lengths) / processes, max(lengths))


# --------------------------------------------------------------------------------------------------
# Results, progress and errors

@pytest.mark.parametrize("slots", [1, 4, 100])
def test_finished_and_progress_agree_with_the_tokens(slots, model):
    calls = []
    completions = generate(model, PROMPTS, n=4, max_new_tokens=8, stop_ids=[1, 30, 12], slots=slots,
                           progress=lambda *numbers: calls.append(numbers))
    assert {c.finished for c in completions} == {True, False}   # both cases occur
    for completion in completions:
        assert completion.finished == (completion.tokens[-1] in (1, 30, 12))
        assert completion.finished or len(completion.tokens) == 8
        assert not {1, 30, 12} & set(completion.tokens[:-1])
        assert len(completion.logprobs) == len(completion.tokens)
    ended, sampled = (sum(numbers) for numbers in zip(*calls))
    assert ended == 24 and sampled == sum(len(c.tokens) for c in completions)


@pytest.mark.parametrize("arguments, message", [
    (dict(n=0), "n must be at least 1, not 0"),
    (dict(max_new_tokens=0), "max_new_tokens must be at least 1, not 0"),
    (dict(n=[2, 0]), "n must be at least 1, not 0"),
    (dict(n=[1, 2, 3]), "3 n for 2 prompts"),
    (dict(slots=-3), "slots must be at least 0, not -3"),
    (dict(top_k=-1), "top_k must be at least 0, not -1"),
    (dict(temperature=-0.5), "temperature must be at least 0, not -0.5"),
    (dict(temperature=math.nan), "temperature must be 0 or a finite number from 1e-6, not nan"),
    (dict(temperature=1e-40), "temperature must be 0 or a finite number from 1e-6, not 1e-40"),
    (dict(top_p=0.0), "top_p must be above 0 and at most 1, not 0.0"),
    (dict(top_p=1.5), "top_p must be above 0 and at most 1, not 1.5"),
    (dict(top_p=math.nan), "top_p must be above 0 and at most 1, not nan"),
    (dict(stream_ids=[1, 2, 3]), "3 stream_ids for 2 prompts"),
    (dict(prompts=[[1], []]), "prompt 1 is empty"),
    (dict(prompts=[[1], [2] * 55]),
     "prompt 1 has 55 tokens; with max_new_tokens=10 the model's 64 .* room for 54"),
    (dict(max_new_tokens=70),
     "prompt 0 has 1 tokens; with max_new_tokens=70 the model's 64 .* room for 0"),
    (dict(prompts=[[7, 40, 2], [1]]),
     "prompt 0 has token ids from 2 to 40; the vocabulary is 0 to 39"),
    (dict(prompts=[[1], [7, -2]]),
     "prompt 1 has token ids from -2 to 7; the vocabulary is 0 to 39"),
], ids=lambda x: x if isinstance(x, str) else "")
def test_settings_that_make_no_sense_are_errors(arguments, message, model):
    with pytest.raises(ValueError, match=message):
        generate(model, **dict(prompts=[[1], [2, 3]], max_new_tokens=10) | arguments)


def test_a_prompt_that_just_fits_is_accepted(model):
    assert len(generate(model, [[2] * 54], max_new_tokens=10)[0].tokens) == 10
