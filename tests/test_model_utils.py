"""Compares the Transformer with transformers' models, and tests reading and writing of folders."""

import contextlib
import copy
import functools
import json
import platform
import random
import re
import shutil
from typing import Any

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.utils import filter_repo_objects
from processes import ROOT
from processes import run as run_script
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

import hf_folders
import machine
import model_utils
from distributed import gather_model, wrap_blocks
from hf_folders import find_folder
from machine import faster_sampling
from model_utils import (
    KVCache,
    ModelConfig,
    Transformer,
    head_product,
    load_model,
    pack,
    response_logprobs,
    save_model,
    token_logprobs,
)
from rollout import Sampler, generate

V, STOP = 100, 3
# The original length is so short that some frequencies are divided, some kept and some blended.
LLAMA3_SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                  "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def make_config(family="qwen3", **changes):
    kind = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config,
            "smollm3": SmolLM3Config, "mistral": MistralConfig}[family]
    shape = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
                 bos_token_id=None, eos_token_id=None)
    return kind(**shape | changes)


def randomise(model, seed=0):
    """Sets all parameters at random, biases and norm weights too: at 0 and 1 they would have no
    effect, and a model that ignores them would pass."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.25 * torch.randn(parameter.shape, generator=g) + ("norm" in name))
    return model


def make_folder(path, config, generation=None, **how):
    """Writes a folder as transformers does and returns the model written there."""
    hf = randomise(AutoModelForCausalLM.from_config(config)).eval()
    for name, value in (generation or {}).items():
        setattr(hf.generation_config, name, value)
    hf.save_pretrained(path, **how)
    vocab = {f"<{i}>": i for i in range(V)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<0>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=f"<{STOP}>").save_pretrained(path)
    return hf


def make_model(vocab=V, **changes):
    return randomise(Transformer(ModelConfig.from_hf(make_config(vocab_size=vocab, **changes))))


def random_tokens(*shape, vocab=V, seed=0):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------------------------
# Against transformers

@pytest.mark.parametrize("family, changes", [
    ("llama", {}),
    ("llama", dict(num_key_value_heads=1, tie_word_embeddings=True)),
    ("llama", dict(num_key_value_heads=4, head_dim=16, attention_bias=True)),
    ("llama", dict(mlp_bias=True, rms_norm_eps=0.1)),
    ("llama", dict(rope_parameters=LLAMA3_SCALING | {"rope_theta": 5e5}, head_dim=16)),
    ("llama", dict(rope_parameters=LLAMA3_SCALING | {"rope_theta": 5e5}, head_dim=16,
                   original_max_position_embeddings=16)),
    ("llama", dict(no_rope_layers=[0, 1])),
    ("qwen2", {}),
    ("qwen2", dict(num_key_value_heads=1,
                   rope_parameters={"rope_type": "default", "rope_theta": 1e6})),
    ("qwen2", dict(num_key_value_heads=4, head_dim=16, tie_word_embeddings=True)),
    ("qwen3", {}),   # head_dim is 128 by default
    ("qwen3", dict(num_key_value_heads=1, head_dim=16, tie_word_embeddings=True,
                   num_hidden_layers=3)),
    ("qwen3", dict(num_key_value_heads=4, head_dim=8, attention_bias=True)),
    ("qwen3", dict(head_dim=16, rope_parameters=LLAMA3_SCALING | {"rope_theta": 1e3},
                   hidden_size=64)),
    ("smollm3", dict(pad_token_id=None)),   # no layer of two is without rotary embedding
    ("smollm3", dict(pad_token_id=None, num_hidden_layers=4)),   # the fourth is
    ("smollm3", dict(pad_token_id=None, num_hidden_layers=3, no_rope_layers=[0, 1, 0],
                     attention_bias=True, mlp_bias=True)),
    ("mistral", dict(sliding_window=None)),
    ("mistral", dict(sliding_window=None, num_key_value_heads=4, head_dim=16)),
], ids=str)
def test_logits_and_greedy_generation_equal_those_of_transformers(family, changes, tmp_path):
    hf = make_folder(tmp_path, make_config(family, **changes))
    model, _ = load_model(tmp_path)
    tokens = random_tokens(3, 80)
    with torch.no_grad():
        assert_close(model(tokens), hf(tokens).logits, atol=1e-4, rtol=0)
    prompts = tokens[:, :7]
    expected = hf.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False,
                           max_new_tokens=64, pad_token_id=0)[:, 7:].tolist()
    completions = generate(model, prompts.tolist(), temperature=0, max_new_tokens=64)
    assert [c.tokens for c in completions] == expected


# config.json of these checkpoints as the hub has them, but for sizes, which are small, and what has
# no effect on the model. Those of transformers 4 name the type torch_dtype, and RoPE's settings
# rope_theta and rope_scaling.
CHECKPOINTS = {
    "Llama-3.1-8B": dict(
        model_type="llama", architectures=["LlamaForCausalLM"], attention_bias=False,
        hidden_act="silu", mlp_bias=False, num_attention_heads=4, num_key_value_heads=1,
        pretraining_tp=1, rms_norm_eps=1e-5, rope_theta=500000.0, tie_word_embeddings=False,
        rope_scaling=LLAMA3_SCALING),
    "Llama-3.2-1B": dict(
        model_type="llama", architectures=["LlamaForCausalLM"], attention_bias=False, head_dim=16,
        hidden_act="silu", mlp_bias=False, num_attention_heads=4, num_key_value_heads=1,
        rms_norm_eps=1e-5, rope_theta=500000.0, tie_word_embeddings=True,
        rope_scaling=LLAMA3_SCALING | {"factor": 32.0}),
    "Qwen2.5-1.5B": dict(
        model_type="qwen2", architectures=["Qwen2ForCausalLM"], hidden_act="silu",
        max_window_layers=2, num_attention_heads=6, num_key_value_heads=1, hidden_size=48,
        rms_norm_eps=1e-6, rope_theta=1000000.0, sliding_window=131072, tie_word_embeddings=True,
        use_mrope=False, use_sliding_window=False),
    "Qwen3-1.7B": dict(
        model_type="qwen3", architectures=["Qwen3ForCausalLM"], attention_bias=False, head_dim=16,
        hidden_act="silu", max_window_layers=3, num_attention_heads=4, num_key_value_heads=2,
        rms_norm_eps=1e-6, rope_scaling=None, rope_theta=1000000, sliding_window=None,
        tie_word_embeddings=True, use_sliding_window=False),
    "SmolLM2-135M": dict(
        model_type="llama", architectures=["LlamaForCausalLM"], attention_bias=False,
        hidden_act="silu", is_llama_config=True, mlp_bias=False, num_attention_heads=3,
        num_key_value_heads=1, hidden_size=48, rms_norm_eps=1e-5, rope_interleaved=False,
        rope_scaling=None, rope_theta=100000, tie_word_embeddings=True),
    "SmolLM3-3B": dict(
        model_type="smollm3", architectures=["SmolLM3ForCausalLM"], attention_bias=False,
        hidden_act="silu", layer_types=["full_attention"] * 8, max_window_layers=8, mlp_bias=False,
        no_rope_layer_interval=4, no_rope_layers=[1, 1, 1, 0, 1, 1, 1, 0], num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=1, pad_token_id=4, rms_norm_eps=1e-6,
        rope_scaling=None, rope_theta=5000000.0, sliding_window=None, tie_word_embeddings=True,
        use_sliding_window=False),
    "Mistral-7B-v0.3": dict(
        model_type="mistral", architectures=["MistralForCausalLM"], hidden_act="silu",
        num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5, rope_theta=1000000.0,
        sliding_window=None, tie_word_embeddings=False),
    "Mistral-Nemo-2407": dict(   # heads are wider than the hidden size divided by their number
        model_type="mistral", architectures=["MistralForCausalLM"], head_dim=16, hidden_act="silu",
        num_attention_heads=4, num_key_value_heads=1, rms_norm_eps=1e-5, rope_theta=1000000.0,
        sliding_window=None, tie_word_embeddings=False),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_load_train_and_are_written(name, tmp_path):
    """Weights at random; logits, log-probabilities of a packing, and the folder that is written."""
    sizes = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                 max_position_embeddings=131072, bos_token_id=1, eos_token_id=[STOP, 7],
                 torch_dtype="bfloat16", transformers_version="4.45.0")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text(json.dumps(sizes | CHECKPOINTS[name]))
    config = AutoConfig.from_pretrained(tmp_path / "hub")
    make_folder(tmp_path / "a", config, dtype=torch.float32)
    shutil.copy(tmp_path / "hub" / "config.json", tmp_path / "a")   # that of transformers 4
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    model, tokenizer = load_model(tmp_path / "a")
    tokens = random_tokens(2, 80)
    with torch.no_grad():
        expected = hf(tokens).logits
        assert_close(model(tokens), expected, atol=1e-4, rtol=0)
        rows = tokens.tolist()
        logprobs, _ = response_logprobs(model, pack([row[:40] for row in rows],
                                                    [row[40:] for row in rows]))
        wanted = expected[:, 39:-1].log_softmax(-1).gather(-1, tokens[:, 40:, None])[..., 0]
        assert_close(logprobs, wanted, atol=1e-4, rtol=0)
    save_model(model, tokenizer, tmp_path / "b")
    found: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "b", output_loading_info=True)
    again, report = found
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert again.config.architectures == config.architectures
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, expected)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "gemma",
                                    "gemma2", "gemma3_text", "phi", "phi3", "ministral", "gpt_oss",
                                    "olmo2", "granite", "deepseek_v3"])
def test_other_architectures_are_refused_by_name(family, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    with pytest.raises(ValueError, match=f"architecture '{family}' is not supported; supported: "
                                         f"llama, qwen2, qwen3, smollm3, mistral$"):
        load_model(tmp_path)


@pytest.mark.parametrize("family, changes, words", [
    ("mistral", dict(sliding_window=4096), "sliding_window: 4096 is not supported; .*null"),
    ("mistral", {}, "sliding_window: 4096 is not supported"),   # as in version 0.1
    ("qwen2", dict(use_sliding_window=True), "use_sliding_window: true is not supported"),
    ("qwen3", dict(use_sliding_window=True), "use_sliding_window: true is not supported"),
    ("smollm3", dict(use_sliding_window=True, sliding_window=64), "use_sliding_window: true"),
    ("smollm3", dict(layer_types=["sliding_attention", "full_attention"], sliding_window=8,
                     num_hidden_layers=2), "sliding_attention in layer_types"),
    ("qwen3", dict(is_causal=False), "is_causal: false"),
])
def test_a_sliding_window_is_refused(family, changes, words, tmp_path):
    make_config(family, **changes).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"config.json: {words}"):
        load_model(tmp_path)


def test_mistral_that_transformers_takes_for_ministral_is_refused(tmp_path):
    make_config("mistral", sliding_window=None).save_pretrained(tmp_path)
    edit_config(tmp_path, layer_types=["full_attention"] * 2)
    with pytest.raises(ValueError, match="architecture 'ministral' is not supported"):
        load_model(tmp_path)


def test_an_index_of_an_earlier_save_is_not_read(tmp_path):
    hf = make_folder(tmp_path, make_config(), max_shard_size="10KB")
    torch.nn.init.normal_(hf.lm_head.weight)
    hf.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert torch.equal(load_model(tmp_path)[0].head, hf.lm_head.weight)


@pytest.mark.parametrize("type_key", ["rope_type", "type"])
def test_folders_of_transformers_4_are_read(type_key, tmp_path):
    config = make_config("llama", rope_parameters=LLAMA3_SCALING | {"rope_theta": 5e5}, head_dim=16)
    hf = make_folder(tmp_path, config)
    old = json.loads((tmp_path / "config.json").read_text())
    del old["rope_parameters"]
    old |= {"rope_theta": 5e5,
            "rope_scaling": {type_key: "llama3"} | dict(list(LLAMA3_SCALING.items())[1:])}
    (tmp_path / "config.json").write_text(json.dumps(old))
    tokens = random_tokens(2, 80)
    with torch.no_grad():
        assert_close(load_model(tmp_path)[0](tokens), hf(tokens).logits, atol=1e-4, rtol=0)


@pytest.mark.gpu
def test_bfloat16_on_a_gpu_is_as_near_to_float32_as_transformers_is(tmp_path):
    hf = make_folder(tmp_path, make_config(head_dim=16))
    tokens = random_tokens(4, 64)
    with torch.no_grad():
        exact = hf(tokens).logits.log_softmax(-1)
        theirs = hf.to("cuda", torch.bfloat16)(tokens.cuda()).logits.float().log_softmax(-1).cpu()
        model, _ = load_model(tmp_path, device="cuda", dtype=torch.bfloat16)
        ours = model(tokens.cuda()).float().log_softmax(-1).cpu()
    assert (ours - exact).abs().mean() < 1.5 * (theirs - exact).abs().mean() + 1e-3
    completions = generate(model, tokens[:, :9].tolist(), n=2, max_new_tokens=32, seed=1)
    for prompt, completion in zip(tokens[:, :9].repeat_interleave(2, 0).tolist(), completions):
        whole = torch.tensor([prompt + completion.tokens], device="cuda")
        again = token_logprobs(model, whole)[0, 8:]
        assert (again.detach().cpu() - torch.tensor(completion.logprobs)).abs().mean() < 0.1


def test_right_padding_does_not_change_the_real_positions():
    model, tokens, lengths = make_model(head_dim=16), random_tokens(3, 12), (12, 7, 1)
    logits = model(tokens)   # the tokens past each length serve as padding
    for row, length in enumerate(lengths):
        alone = model(tokens[row:row + 1, :length])[0]
        assert_close(logits[row, :length], alone, atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------------------------------
# Folders

def test_a_sharded_folder_is_loaded(tmp_path):
    hf = make_folder(tmp_path, make_config(hidden_size=64), max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    tokens = random_tokens(2, 20)
    assert_close(load_model(tmp_path)[0](tokens), hf(tokens).logits, atol=1e-4, rtol=0)


def test_other_copies_of_the_weights_are_neither_loaded_nor_read(tmp_path, monkeypatch):
    hf = make_folder(tmp_path, make_config(hidden_size=64))
    save_file({"layers.0.wq": torch.zeros(2)}, tmp_path / "consolidated.safetensors")
    tokens = random_tokens(2, 20)
    assert_close(load_model(tmp_path)[0](tokens), hf(tokens).logits, atol=1e-4, rtol=0)

    wanted = {}
    monkeypatch.setattr(hf_folders, "snapshot_download",
                        lambda path, **patterns: wanted.update(patterns) or tmp_path)
    find_folder("someone/model")
    names = ["config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors",
             "model.safetensors.index.json", "model-00001-of-00002.safetensors",
             "model.safetensors-00001-of-00002.safetensors"]
    others = ["consolidated.safetensors", "original/model.safetensors", "model.gguf", "README.md",
              "adapter_model.safetensors", "model.fp16.safetensors",
              "model.fp16-00001-of-00002.safetensors"]
    assert list(filter_repo_objects(names + others, **wanted)) == names


def test_what_the_hub_says_of_a_model_is_passed_on(monkeypatch):
    """Its messages have the reason in a later line."""
    def refuse(path, **patterns):
        raise OSError("401 Client Error.\n\nCannot access gated repo.\nPlease log in.\nMore.")

    monkeypatch.setattr(hf_folders, "snapshot_download", refuse)
    with pytest.raises(ValueError, match=re.escape(
            "(OSError: 401 Client Error. Cannot access gated repo. Please log in.)")):
        find_folder("someone/model")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_libraries_read_what_save_model_writes(dtype, tied, tmp_path):
    generation = {"eos_token_id": [7, 5], "temperature": 0.6, "do_sample": True}
    config = make_config("llama", attention_bias=True, tie_word_embeddings=tied)
    make_folder(tmp_path / "a", config, generation)
    model, tokenizer = load_model(tmp_path / "a", dtype=dtype)
    save_model(model, tokenizer, tmp_path / "new" / "b")
    # No temporary folder remains.
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["b"]

    again, tokenizer_again = load_model(tmp_path / "new" / "b", dtype=dtype)
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    # The ids come from generation_config and from the tokenizer.
    assert again.stop_ids == model.stop_ids == (STOP, 5, 7)
    assert tokenizer_again.get_vocab() == tokenizer.get_vocab()

    config = json.loads((tmp_path / "new" / "b" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "b", dtype=torch.float32)
    assert theirs.generation_config.eos_token_id == [STOP, 5, 7]
    assert theirs.generation_config.temperature == 0.6
    tokens = random_tokens(2, 20)
    assert_close(theirs(tokens).logits, model.float()(tokens), atol=1e-4, rtol=0)


def test_save_model_refuses_an_existing_path(tmp_path):
    make_folder(tmp_path / "a", make_config())
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "a").iterdir()}
    with pytest.raises(ValueError, match="a exists already"):
        save_model(*load_model(tmp_path / "a"), tmp_path / "a")
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "a").iterdir()} == before


@pytest.mark.parametrize("config_stops, generation_stops, expected", [
    (None, None, (STOP,)), (9, None, (STOP, 9)), (9, 8, (STOP, 8)), (None, [8, STOP], (STOP, 8))])
def test_stop_ids_join_tokenizer_and_configs(config_stops, generation_stops, expected, tmp_path):
    make_folder(tmp_path, make_config(eos_token_id=config_stops))
    if generation_stops is None:
        (tmp_path / "generation_config.json").unlink()
    else:
        (tmp_path / "generation_config.json").write_text(
            json.dumps({"eos_token_id": generation_stops}))
    assert load_model(tmp_path)[0].stop_ids == expected


def test_a_stop_id_that_is_a_text_is_refused(tmp_path):
    make_folder(tmp_path, make_config(), {"eos_token_id": "7"})
    with pytest.raises(ValueError, match="eos_token_id must be a token id or several, not"):
        load_model(tmp_path)


def test_harmless_extra_tensors_are_ignored(tmp_path):
    make_folder(tmp_path, make_config(tie_word_embeddings=True))
    embeddings = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    edit_tensor(tmp_path, "lm_head.weight", embeddings.clone())
    edit_tensor(tmp_path, "model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4))
    assert "lm_head.weight" not in load_model(tmp_path)[0].state_dict()
    edit_tensor(tmp_path, "lm_head.weight", embeddings + 1)   # transformers would use this one
    with pytest.raises(ValueError, match="lm_head.weight is another tensor"):
        load_model(tmp_path)


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def edit_tensor(folder, name, tensor=None):
    """Replaces or adds the tensor of this name; None removes it."""
    files = sorted(folder.glob("*.safetensors"))
    file = next((file for file in files if name in load_file(file)), files[0])
    tensors = load_file(file) | {name: tensor}
    save_file({n: t for n, t in tensors.items() if t is not None}, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def sound_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    make_folder(folder, make_config("qwen2"), max_shard_size="10KB")
    return folder


@pytest.mark.parametrize("spoil, culprit", [
    (lambda f: edit_config(f, model_type="gpt2"), "'gpt2'"),
    (lambda f: edit_config(f, model_type=None), "None"),
    (lambda f: edit_config(f, quantization_config={"quant_method": "fp8"}), "quantization_config"),
    (lambda f: edit_config(f, use_sliding_window=True, sliding_window=16, max_window_layers=0),
     "use_sliding_window"),
    (lambda f: edit_config(f, rope_parameters={"rope_type": "yarn", "factor": 4.0,
                                               "rope_theta": 1e4}), "'yarn'"),
    (lambda f: edit_config(f, hidden_act="gelu"), "'gelu'"),
    (lambda f: edit_tensor(f, "model.norm.weight"), "lacks 1 tensor: model.norm.weight"),
    (lambda f: edit_tensor(f, "lm_head.weight", torch.ones(V, 31)),
     r"lm_head.weight .*\[100, 31\].*\[100, 32\]"),
    (lambda f: edit_tensor(f, "model.layers.2.extra", torch.ones(1)),
     "1 tensor: model.layers.2.extra"),
    (lambda f: edit_config(f, num_hidden_layers=3, layer_types=None),
     r"lacks 12 tensors: model.layers.2.*, …"),
    (lambda f: edit_config(f, num_key_value_heads=4), r"k_proj.* \[16\].*\[32\]"),
    (lambda f: sorted(f.glob("model-*.safetensors"))[1].unlink(), "model-00002-of-.* is missing"),
    (lambda f: [file.unlink() for file in f.glob("model*")], "no .safetensors file"),
    (lambda f: (f / "config.json").unlink(), "has no config.json"),
    (lambda f: (f / "config.json").write_text("{"), "config.json is damaged: .*JSON"),
    (lambda f: edit_config(f, rope_parameters={"rope_type": "llama3", "factor": 8.0,
                                               "rope_theta": 1e4}), "config.json: "),
    (lambda f: sorted(f.glob("*.safetensors"))[0].write_text("version https://git-lfs"),
     "model-00001-of-.*safetensors: "),
    (lambda f: [file.unlink() for file in f.glob("tokenizer*")], "the tokenizer of "),
], ids=lambda x: x if isinstance(x, str) else "")
def test_an_unusable_folder_is_refused_with_its_reason(spoil, culprit, sound_folder, tmp_path):
    folder = shutil.copytree(sound_folder, tmp_path / "m")
    load_model(folder)
    spoil(folder)
    with pytest.raises(ValueError, match=culprit):
        load_model(folder)


@pytest.mark.parametrize("name", ["no-such-owner/no-such-model", "/no/such/folder", "no such name"])
def test_a_name_without_a_model_is_refused(name):
    with pytest.raises(ValueError, match=f"no model at '{name}'"):
        load_model(name)


# --------------------------------------------------------------------------------------------------
# token_logprobs

def full_logprobs(model, tokens, temperature):
    logprobs = (model(tokens[:, :-1]) / temperature).log_softmax(-1)
    return logprobs.gather(-1, tokens[:, 1:, None])[..., 0], -(logprobs.exp() * logprobs).sum(-1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tied, temperature", [(False, 1.0), (True, 0.6)])
@pytest.mark.parametrize("chunk_size, at_once", [(1, 9), (3, 2), (7, 3), (1024, 1), (1024, 99)])
def test_token_logprobs_equals_the_full_softmax(chunk_size, at_once, tied, temperature, masked,
                                                monkeypatch):
    """`at_once` positions of a chunk get their softmax at a time."""
    monkeypatch.setattr(model_utils, "LOGITS_IN_CACHES", at_once * V)
    model, tokens = make_model(head_dim=16, tie_word_embeddings=tied), random_tokens(3, 11)
    g = torch.Generator().manual_seed(1)
    weights = torch.randn(3, 10, generator=g)
    mask = torch.rand(3, 10, generator=g) < 0.4 if masked else None
    inside = mask if masked else torch.ones(3, 10)

    expected, expected_entropy = full_logprobs(model, tokens, temperature)
    logprobs, entropy = token_logprobs(model, tokens, temperature, mask, chunk_size,
                                       return_entropy=True)
    assert_close(logprobs, expected * inside, atol=1e-5, rtol=0)
    assert_close(entropy, (expected_entropy * inside).detach(), atol=1e-5, rtol=0)
    assert not entropy.requires_grad

    names, parameters = zip(*model.named_parameters())
    expected_gradients = torch.autograd.grad((expected * inside * weights).sum(), parameters)
    gradients = torch.autograd.grad((logprobs * weights).sum(), parameters)
    for name, gradient, wanted in zip(names, gradients, expected_gradients):
        assert_close(gradient, wanted, atol=1e-4, rtol=1e-4,
                     msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_bfloat16_logits_are_not_rounded(device):
    """Those of the model, of the sampler and of the log-probabilities are the product in float32:
    bfloat16 would be off by up to a hundredth here, and each of these rounded by itself."""
    model = make_model(head_dim=16).to(device, torch.bfloat16)
    tokens = random_tokens(2, 9).to(device)
    exact, of_norm = [], lambda module, args, out: exact.append(
        out.detach().double() @ model.head.detach().double().T)
    hook = model.model.norm.register_forward_hook(of_norm)
    logits = model(tokens)
    assert logits.dtype == torch.float32 and logits.abs().max() > 3
    assert_close(logits.double(), exact[-1], atol=1e-5, rtol=0)
    logits.sum().backward()   # it has a gradient, too

    logprobs = token_logprobs(model, tokens)
    expected = exact[-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    assert_close(logprobs.double(), expected, atol=1e-5, rtol=0)

    prompt = tokens[0].tolist()
    sampler = Sampler(model.config, 1, 16, device, torch.bfloat16)
    completion, = generate(model, [prompt], max_new_tokens=2, sampler=sampler)
    del exact[:]
    hook.remove()
    assert sampler.prompt_logits.dtype == torch.float32
    with torch.inference_mode(), faster_sampling(model):
        cache = KVCache(model.config, 1, 16, device, torch.bfloat16)
        hidden = model.extend(tokens[:1], cache)[:, -1]
        first = hidden.double() @ model.head.double().T
        assert_close(model.logits(hidden).double(), first, atol=1e-5, rtol=0)
    assert completion.logprobs[0] == pytest.approx(
        first.log_softmax(-1)[0, completion.tokens[0]].item(), abs=1e-5)


def test_float16_logits_are_not_rounded_to_bfloat16():
    g = torch.Generator().manual_seed(0)
    head, hidden = (torch.randn(rows, 512, generator=g).half() for rows in (64, 32))
    assert_close(head_product(head)(hidden).double(), hidden.double() @ head.double().T,
                 atol=1e-4, rtol=0)


def test_an_empty_mask_gives_zeros_and_zero_gradients():
    model = make_model(head_dim=16)
    mask = torch.zeros(2, 4, dtype=torch.bool)
    logprobs, entropy = token_logprobs(model, random_tokens(2, 5), mask=mask, return_entropy=True)
    assert logprobs.tolist() == entropy.tolist() == [[0.0] * 4] * 2
    logprobs.sum().backward()
    for name, parameter in model.named_parameters():   # FSDP needs a gradient for each parameter
        assert parameter.grad is not None and not parameter.grad.any(), name


ROWS = {   # name: (prompts, lengths of the responses)
    "one": ([[5]], [1]),
    "none shared": ([[5, 6, 7], [8], [9, 10]], [4, 7, 2]),
    "all shared": ([[5, 6, 7, 8, 9]] * 5, [1, 30, 9, 4, 4]),
    "some": ([[5, 6, 7]] * 2 + [[5, 6]] + [[5, 6, 7]] * 3, [20, 2, 5, 1, 6, 6]),
}


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("recompute", ["none", "all", "cheap"])
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_a_packing_gives_the_same_as_each_row_alone(rows, recompute, temperature):
    """Compares outputs and gradients in float64, also with blocks that are recomputed in the
    backward pass."""
    model = make_model(head_dim=16).double()
    prompts, lengths = ROWS[rows]
    responses = [random_tokens(1, length, seed=i)[0].tolist() for i, length in enumerate(lengths)]
    weights = torch.randn(len(prompts), max(lengths), dtype=torch.float64,
                          generator=torch.Generator().manual_seed(1))
    expected, loss = [], 0
    for prompt, response, weight in zip(prompts, responses, weights):
        logprobs, entropy = full_logprobs(model, torch.tensor([prompt + response]), temperature)
        expected.append((logprobs[0, len(prompt) - 1:], entropy[0, len(prompt) - 1:]))
        loss = loss + (expected[-1][0] * weight[:len(response)]).sum()
    expected_gradients = torch.autograd.grad(loss, list(model.parameters()))

    wrap_blocks(model, recompute)
    packing = pack(prompts, responses)
    logprobs, entropy = response_logprobs(model, packing, temperature, chunk_size=3)
    for i, (row, row_entropy) in enumerate(expected):
        assert packing.mask[i].tolist() == (
            [True] * lengths[i] + [False] * (max(lengths) - lengths[i]))
        assert_close(logprobs[i, :lengths[i]].double(), row, atol=1e-5, rtol=0)
        assert_close(entropy[i, :lengths[i]].double(), row_entropy.detach(), atol=1e-5, rtol=0)
    assert not logprobs[~packing.mask].any() and not entropy.requires_grad
    gradients = torch.autograd.grad((logprobs * weights).sum(), list(model.parameters()))
    for (name, _), gradient, wanted in zip(model.named_parameters(), gradients, expected_gradients):
        assert_close(gradient, wanted, atol=1e-5, rtol=1e-5,
                     msg=lambda text, name=name: f"{name}: {text}")


def packing_with_buckets(count, seed):
    """`count` rows of such lengths that there are many different numbers of buckets."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(V) for _ in range(rng.randrange(1, 9))] for _ in range(count)]
    return pack(prompts, [[rng.randrange(V) for _ in range(rng.choice([1, 2, 5, 10, 20, 40, 80]))]
                          for _ in prompts])


@pytest.fixture
def compiled_without_code(monkeypatch):
    """torch.compile traces and differentiates, but generates no code, which takes longest."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    yield
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@pytest.mark.parametrize("recompute", ["none", "cheap", "all"])
def test_compiled_blocks_serve_every_packing(recompute, compiled_without_code):
    model = make_model(head_dim=16).double()
    compiled = copy.deepcopy(model)
    wrap_blocks(compiled, recompute, compile=True)
    packings = [packing_with_buckets(count, seed=count) for count in range(2, 22)]
    assert len({len(packing.buckets) for packing in packings}) > 4
    for number, packing in enumerate(packings):
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            logprobs, _ = response_logprobs(compiled, packing)
            gradients = torch.autograd.grad(logprobs.sum(), list(compiled.parameters()))
        expected, _ = response_logprobs(model, packing)
        assert_close(logprobs, expected, atol=1e-6, rtol=0)
        names, parameters = zip(*model.named_parameters())
        for name, gradient, wanted in zip(
                names, gradients, torch.autograd.grad(expected.sum(), parameters)):
            assert_close(gradient, wanted, atol=1e-5, rtol=1e-5,
                         msg=lambda text, name=name: f"{name}: {text}")


COMPILED_AND_SHARDED = """
import functools, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import torch
torch.compile = functools.partial(torch.compile, backend="eager")
from distributed import full_tensor, init_distributed, rank, shard, wrap_blocks
from model_utils import response_logprobs
from test_model_utils import make_model, packing_with_buckets

init_distributed("cpu")
model, whole = make_model(head_dim=16), make_model(head_dim=16)
shard(model, torch.device("cpu"), torch.float32)
wrap_blocks(model, "cheap", compile=True)
for step in range(2):
    with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
        response_logprobs(model, packing_with_buckets(4 + step, rank()))[0].sum().backward()
    for each in range(2):
        loss = response_logprobs(whole, packing_with_buckets(4 + step, each))[0].sum()
        (loss / 2).backward()   # FSDP averages over the processes
for mine, expected in zip(model.parameters(), whole.parameters(), strict=True):
    torch.testing.assert_close(full_tensor(mine.grad), expected.grad, atol=1e-3, rtol=1e-4)
"""


def test_compiled_blocks_work_sharded(tmp_path):
    (tmp_path / "sharded.py").write_text(COMPILED_AND_SHARDED.format(root=str(ROOT)))
    run_script("sharded.py", processes=2, root=tmp_path)


@pytest.mark.parametrize("prompts, lengths, positions, shared", [
    ([[5, 6, 7]] * 4, [2, 2, 2, 2], 3 + 4, 9),
    ([[5, 6, 7], [5, 6], [5, 6, 7]], [2, 2, 2], 8 + 3, 0),   # only neighbouring rows share a prompt
])
def test_neighbouring_rows_share_a_prompt(prompts, lengths, positions, shared):
    packing = pack(prompts, [[9] * length for length in lengths])
    assert (packing.tokens.shape, packing.shared) == ((1, positions), shared)
    assert len(packing.targets) == sum(lengths)


def test_padding_is_a_small_part_of_a_packing():
    lengths = list(range(1, 200, 3))
    packing = pack([[5, 6]] * len(lengths), [[9] * length for length in lengths])
    places = sum(bucket.numel() for bucket in packing.buckets)
    assert packing.padding == places - sum(length + 1 for length in lengths) < 0.15 * places


@pytest.mark.parametrize("prompts, responses", [([[5], []], [[6], [6]]), ([[5], [5]], [[6], []])])
def test_pack_refuses_an_empty_prompt_or_response(prompts, responses):
    with pytest.raises(ValueError, match="row 1 has a prompt of"):
        pack(prompts, responses)


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel] + [t.numel() for t in tree_leaves(out)
                                         if isinstance(t, torch.Tensor)])
        return out


def measure(logprobs_of):
    """Returns the sizes of the largest tensors made in the forward and in the backward pass, and
    the number of elements that the forward pass saves for the backward pass."""
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with LargestTensor() as forward, hooks:
        total = logprobs_of().sum()
    with LargestTensor() as backward:
        total.backward()
    return forward.numel, backward.numel, sum(kept.values())


@pytest.mark.parametrize("B, T, chunk_size", [(2, 3, 1024), (2, 16, 1024), (3, 32, 5)])
def test_the_full_logits_are_never_held(B, T, chunk_size):
    vocab = 5000   # the head has 2 * 5000 weights, as many as two positions have logits
    model = make_model(vocab, hidden_size=2, intermediate_size=2, num_attention_heads=1,
                       num_key_value_heads=1, head_dim=2, num_hidden_layers=1)
    tokens = random_tokens(B, T + 1, vocab=vocab)
    whole = B * T * vocab
    # The measure detects full logits.
    assert min(measure(lambda: full_logprobs(model, tokens, 1.0)[0])) >= whole
    assert max(measure(lambda: token_logprobs(model, tokens, chunk_size=chunk_size))) <= whole / 2


def test_gradients_equal_finite_differences():
    """The step and the tolerances are wide because the softmax is in float32 for every dtype."""
    model = make_model(vocab=5, hidden_size=4, intermediate_size=4, num_attention_heads=2,
                       num_key_value_heads=1, head_dim=2, num_hidden_layers=1).double()
    tokens = random_tokens(2, 4, vocab=5)
    mask = torch.tensor([[True, True, False], [False, True, True]])

    def logprobs(*parameters):
        return torch.func.functional_call(
            model, dict(zip(names, parameters)), (tokens[:, :-1], tokens[:, 1:]),
            dict(temperature=0.8, mask=mask, chunk_size=2))[0]

    names, parameters = zip(*model.named_parameters())
    assert torch.autograd.gradcheck(logprobs, parameters, eps=3e-3, atol=1e-3, rtol=1e-3,
                                    nondet_tol=1e-6)


# --------------------------------------------------------------------------------------------------
# The copy to sample with

def test_gather_model_makes_a_frozen_copy():
    model = make_model(head_dim=16, tie_word_embeddings=True)
    model.stop_ids = (1, 2)
    assert gather_model(model, torch.float32) is model
    copy = gather_model(model, torch.bfloat16)
    assert copy.stop_ids == (1, 2) and model.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in copy.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(copy.state_dict()[name], tensor.bfloat16()), name


def test_the_remains_of_a_killed_save_do_not_enter_the_next_one(tmp_path):
    (tmp_path / ".m.partial").mkdir()
    (tmp_path / ".m.partial" / "generation_config.json").write_text('{"eos_token_id": [77]}')
    make_folder(tmp_path / "source", make_config())
    model, tokenizer = load_model(tmp_path / "source")
    model.generation_config = None
    save_model(model, tokenizer, tmp_path / "m")
    assert load_model(tmp_path / "m")[0].stop_ids == model.stop_ids
    assert not (tmp_path / ".m.partial").exists()


@pytest.mark.parametrize("shape, temperature", [((2, 1), 1.0), ((2, 3), 0.0)])
def test_token_logprobs_refuses_one_token_or_temperature_0(shape, temperature):
    with pytest.raises(ValueError, match=f"not {shape[1]} and {temperature}"):
        token_logprobs(make_model(), random_tokens(*shape), temperature)


# --------------------------------------------------------------------------------------------------
# Sampling

@pytest.mark.skipif(not torch.backends.mkldnn.is_available() or platform.machine() != "x86_64",
                    reason="needs oneDNN on x86")
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)], ids=str)
def test_reordered_weights_compute_the_same_and_are_restored(dtype, close, tied, inference,
                                                             monkeypatch):
    monkeypatch.setattr(machine, "has_bfloat16", lambda: True)   # others compute it, slowly
    model = make_model(vocab=1000, hidden_size=384, intermediate_size=1400, attention_bias=True,
                       tie_word_embeddings=tied).to(dtype)
    tokens = torch.randint(0, 1000, (3, 7), generator=torch.Generator().manual_seed(0))
    parameters = list(model.parameters())
    before = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        whole = model(tokens)
    linears = [module for module in model.model.modules() if isinstance(module, torch.nn.Linear)]
    replaced = lambda: {(type(module).__name__, name) for module in model.modules()
                        for name, value in vars(module).items() if callable(value)
                        and name in ("project", "gate_and_up", "forward", "logits",
                                     "cached_attention")}
    with torch.inference_mode(inference), pytest.raises(KeyboardInterrupt), faster_sampling(model):
        assert all(module.weight.numel() == 0 for module in linears)
        assert replaced() == {("Attention", "project"), ("MLP", "gate_and_up"),
                              ("Linear", "forward"), ("Transformer", "logits")} | (
            {("Transformer", "cached_attention")} if dtype == torch.float32 else set())
        cache = KVCache(model.config, 3, 7, "cpu", dtype)
        with torch.no_grad():
            assert_close(model.logits(model.extend(tokens, cache)), whole, rtol=close, atol=close)
        raise KeyboardInterrupt
    assert not replaced()
    assert all(mine is parameter for mine, parameter in zip(model.parameters(), parameters))
    assert all(torch.equal(parameter, old) for parameter, old in zip(parameters, before))
    model(tokens).logsumexp(-1).sum().backward()
    assert all(parameter.grad.norm() > 0 for parameter in parameters)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available() or platform.machine() != "x86_64",
                    reason="needs oneDNN on x86")
@pytest.mark.parametrize("call", range(6))
def test_an_interrupt_while_products_are_merged_loses_no_weights(call, monkeypatch):
    model, calls, product = make_model(vocab=1000, num_hidden_layers=1), [], machine._product

    def interrupted(*arguments):
        calls.append(0)
        if len(calls) > call:
            raise KeyboardInterrupt
        return product(*arguments)

    before = [parameter.detach().clone() for parameter in model.parameters()]
    monkeypatch.setattr(machine, "_product", interrupted)
    with pytest.raises(KeyboardInterrupt), faster_sampling(model):
        raise KeyboardInterrupt
    assert all(map(torch.equal, model.parameters(), before))
    assert not {"project", "gate_and_up", "forward", "logits", "cached_attention"} & {
        name for module in model.modules() for name in vars(module)}


@pytest.mark.parametrize("faster", [False, True])
@pytest.mark.parametrize("span", [None, 9])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_extending_a_cache_in_parts_equals_one_pass(family, span, faster):
    """Three sequences in scattered cache slots get a padded prefill, then more tokens, and then,
    moved to the first slots, one token at a time."""
    model = make_model(family=family)
    g = torch.Generator().manual_seed(1)
    sequences = [torch.randint(0, V, (9,), generator=g) for _ in range(3)]
    cache = KVCache(model.config, 5, 12, "cpu", torch.float32)
    with torch.inference_mode():
        whole = model(torch.stack(sequences))   # [3, 9, V]
    sampling = faster_sampling(model) if faster else contextlib.nullcontext()
    with torch.inference_mode(), sampling:
        first, second = [2, 5, 3], [7, 8, 4]   # the parts end here; part 2 of row 2 is 1 token
        slots = torch.tensor([2, 0, 4])
        width = max(first)
        rows = [F.pad(s[:e], (0, width - e)) for s, e in zip(sequences, first)]
        hidden = model.extend(torch.stack(rows), cache, slots)
        for i, end in enumerate(first):
            assert_close(model.logits(hidden[i, :end]), whole[i, :end], rtol=1e-4, atol=1e-4)
        width = max(b - a for a, b in zip(first, second))
        rows = [F.pad(s[a:b], (0, width - (b - a))) for s, a, b in zip(sequences, first, second)]
        hidden = model.extend(torch.stack(rows), cache, slots, torch.tensor(first), span)
        for i, (start, end) in enumerate(zip(first, second)):
            assert_close(model.logits(hidden[i, :end - start]), whole[i, start:end],
                         rtol=1e-4, atol=1e-4)
        cache.copy(slots, torch.tensor([0, 1, 2]), 9)
        for _ in range(2):
            tokens = torch.stack([s[min(e, 8)] for s, e in zip(sequences, second)])[:, None]
            hidden = model.extend(tokens, cache, None, torch.tensor(second), span)
            for i, end in enumerate(second):
                if end < 9:
                    assert_close(model.logits(hidden[i, 0]), whole[i, end], rtol=1e-4, atol=1e-4)
            second = [min(end + 1, 8) for end in second]
