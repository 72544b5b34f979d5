"""The seconds of a step, against numbers worked out by hand."""

from types import SimpleNamespace

import pytest

from benchmarks.train_step import update_operations
from memory import Plan
from model_utils import ModelConfig
from options import TrainingOptions, resolve
from timing import CARDS, Card, find_card, step_seconds

# A block has 4·(4 + 2 + 2 + 4) weights of attention, 3·4·8 of the MLP and 2·4 of norms: 152; the
# two have 304. A norm and 10·4 embeddings are around them: 44; the whole model has 348.
MODEL = ModelConfig(10, 4, 8, 2, 2, 1, 2, 1e-6, 1e4, None, 100, True, False, False, False, False)
# A step reaches 1,000 operations, and 1,000, 100 and 10 bytes a second of memory, link and host.
CARD = Card("", 0, 2500, 5000, 1000 / 0.6, 100 / 0.6, 10 / 0.6)


def test_the_operations_of_an_update_equal_those_counted_by_hand():
    question = type("Question", (), {"prompt": [0] * 3})()
    rows = [SimpleNamespace(question=question, tokens=[0] * n) for n in (2, 4)]
    # A block's products have 48 + 96 weights, the head's 40; a weight takes 6 operations a
    # position: two forward and four backward. The prompt's 3 positions are computed once, and no
    # row's last token goes in: 3 + 1 + 3. Attention has 5²/2 + 7²/2 pairs, each of 12·2·2 a layer.
    assert update_operations(MODEL, rows) == 6 * 2 * 144 * 7 + 6 * 40 * 6 + 2 * 48 * 37


def seconds(card=CARD, fill=1.0, processes=2, **changes):
    options = TrainingOptions(**{
        "method": "icpo", "batch_size": 4, "mini_batch_size": 2, "n_on": 3, "n_off": 1,
        "max_prompt_length": 10, "max_new_tokens": 6, "slots": 4, "micro_batch_tokens": 40,
        "kl_coef": 0.001, "dtype": "bfloat16", **changes})
    return step_seconds(Plan(MODEL, resolve(options, processes), processes, "cuda"), card, fill)


# Each of 2 processes has 2 questions.
# Prefill: 2 plain prompts and 2 with demonstrations, of 10 positions. Two operations for each of
# 304 weights, and 4·2·4 = 32 for each of 10²/2 pairs of query and key, in both layers.
PREFILL = 4 * (2 * 304 * 10 + 32 * 50)
# Decode: 8 sequences in 4 slots are 2 rounds of 6 steps. The mean length is 10 + 6/2 = 13, and the
# head's 40 weights count too.
DECODE = 12 * 4 * (2 * (304 + 40) + 32 * 13)
# Bytes of such a step: 2 for each weight read, and for 2·2·1·2 = 8 numbers of each cached position.
DECODE_BYTES = 12 * 2 * (304 + 40 + 4 * 13 * 8)
# Update: 6 rows of 16 positions. Forward, twice that backward, and the initial model: 4 passes, and
# in the head one more, because its logits are computed again.
BLOCKS, HEAD = 2 * 304 * 16 + 32 * 128, 2 * 40 * 6
UPDATE = 6 * (4 * BLOCKS + 5 * HEAD)
# AdamW, twice: 7 numbers of 4 bytes for each of this process's 174 parameters.
ADAMW = 2 * 174 * 28
# 3 rows a mini-batch, 2 in a micro-batch: 2 micro-batches in each of 2 updates. Half of the weights
# comes from the other process: for the rollout; forward, of both models; of the blocks backward;
# and half of the gradients, in float32.
RECEIVED = 348 + 2 * 2 * (2 * 348 + 304 + 2 * 348)


def test_every_part_of_a_step():
    assert seconds() == pytest.approx({"prefill": PREFILL / 1000, "decode": DECODE / 1000,
                                       "update": UPDATE / 1000 + ADAMW / 1000,
                                       "communication": RECEIVED / 100})


def test_a_decode_step_takes_the_longer_of_reading_and_computing():
    assert DECODE_BYTES / 100 > DECODE / 1000 > DECODE_BYTES / 1000
    slow = Card("", 0, 2500, 5000, 100 / 0.6, 100 / 0.6, 10 / 0.6)
    assert seconds(slow)["decode"] == pytest.approx(DECODE_BYTES / 100)


@pytest.mark.parametrize("changes, part, expected", [
    ({"recompute_activations": "all"}, "update", (UPDATE + 6 * BLOCKS + ADAMW) / 1000),
    ({"recompute_activations": "cheap"}, "update", (UPDATE + ADAMW) / 1000),
    ({"old_logprobs": "recompute"}, "update", (UPDATE + 6 * (BLOCKS + HEAD) + ADAMW) / 1000),
    ({"kl_coef": 0}, "update", (6 * (3 * BLOCKS + 4 * HEAD) + ADAMW) / 1000),
    ({"kl_coef": 0}, "communication", (348 + 2 * 2 * (348 + 304 + 2 * 348)) / 100),
    ({"group": "append"}, "update", (8 * (4 * BLOCKS + 5 * HEAD) + ADAMW) / 1000),
    ({"mini_batch_size": 4}, "update", (UPDATE + ADAMW / 2) / 1000),
    # Both moments travel to the GPU and back, 2·2·4 bytes for each parameter.
    ({"optimizer_state": "cpu"}, "update", (UPDATE + ADAMW) / 1000 + 2 * 174 * 16 / 10),
    # The initial model travels in each of 2·2 micro-batches.
    ({"offload_reference": True}, "update", (UPDATE + ADAMW) / 1000 + 2 * 2 * 2 * 174 / 10),
    ({"method": "grpo"}, "prefill", PREFILL / 2 / 1000),
    ({"method": "grpo", "slots": 6}, "decode", DECODE / 2 * 6 / 4 / 1000),
    # At twice the rate the operations still take longer than the bytes, now 4 a number.
    ({"dtype": "float32"}, "prefill", PREFILL / 2000),
    ({"shard_size": 1}, "communication", 2 * 4 * 348 / 100),
    ({"processes": 1}, "communication", 0),
])
def test_an_option_changes_the_part_that_it_concerns(changes, part, expected):
    assert seconds(**changes)[part] == pytest.approx(expected)


def test_shorter_sequences():
    """Half of the lengths: prompts of 5 tokens and responses of 3."""
    found = seconds(fill=0.5)
    assert found["prefill"] == pytest.approx(4 * (2 * 304 * 5 + 32 * 12.5) / 1000)
    assert found["decode"] == pytest.approx(6 * 4 * (2 * 344 + 32 * 6.5) / 1000)
    # 3 rows of 8 positions are one micro-batch.
    assert found["communication"] == pytest.approx((348 + 2 * (2 * 348 + 304 + 2 * 348)) / 100)


def test_cards_are_found_by_size_and_by_name():
    assert [find_card(str(size)).name for size in (24, 80)] == ["RTX4090", "H100"]
    devices = ["NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA H200", "NVIDIA L40S",
               "NVIDIA GeForce RTX 4090"]
    assert [find_card(each) for each in devices] == CARDS
    assert find_card("16") is None and find_card("Tesla T4") is None
