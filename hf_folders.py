"""What stands in a Hugging Face model folder: config.json, tensors, tokenizer, generation settings.

model_utils.load_model and save_model put them together. A setting, a tensor or a file that does not
fit raises ValueError, which names it.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

from distributed import own_rows
from files import brief, naming, read_object

FAMILIES = ("llama", "qwen2", "qwen3", "smollm3", "mistral")


def find_folder(path: str, weights: bool = True) -> Path:
    """The local folder of a model given as a folder or hub name. Raises ValueError for neither.

    weights: download those of a hub name too.
    """
    if Path(path).is_dir():
        return Path(path)
    try:
        # Some repositories hold the weights once more, in another form or type or in subfolders.
        return Path(snapshot_download(path, ignore_patterns=["*/*", "consolidated*", "adapter_*",
                                                             "model.[!s]*.safetensors",
                                                             "model.[!s]*-of-*"],
                                      allow_patterns=["*.json", "*.jinja", "*.txt", "*.model",
                                                      *["*.safetensors"] * weights]))
    except Exception as error:
        raise ValueError(f"no model at {path!r}: it is not a folder here, and could not be taken "
                         f"from the Hugging Face hub ({brief(error, lines=3)})") from error


def read_config(folder: Path) -> Any:
    """The transformers config of a model that this project can run."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no config.json: not a Hugging Face model folder")
    # AutoConfig may not know the family, or may run code from the folder.
    _check_family(folder, read_object(file).get("model_type"))
    with naming(file):
        hf = AutoConfig.from_pretrained(folder)
    _check_family(folder, hf.model_type)   # AutoConfig takes some of mistral for ministral
    with naming(file):
        _check_supported(hf)
    return hf


def _check_family(folder: Path, family: str | None) -> None:
    if family not in FAMILIES:
        raise ValueError(f"{folder}: architecture {family!r} is not supported; supported: "
                         f"{', '.join(FAMILIES)}")


def _check_supported(hf) -> None:
    if getattr(hf, "quantization_config", None):
        raise ValueError("the model is quantised (config.json has quantization_config); give the "
                         "unquantised one")
    if hf.hidden_act != "silu":
        raise ValueError(f"hidden_act {hf.hidden_act!r} is not supported; supported: 'silu'")
    for name, used in (
            ("use_sliding_window: true", getattr(hf, "use_sliding_window", False)),
            ("sliding_attention in layer_types",
             "sliding_attention" in (getattr(hf, "layer_types", None) or ())),
            ("is_causal: false", getattr(hf, "is_causal", True) is False)):
        if used:
            raise ValueError(f"{name} is not supported; supported: full causal attention in every "
                             f"layer")
    if hf.model_type == "mistral" and hf.sliding_window is not None:
        raise ValueError(f"sliding_window: {hf.sliding_window} is not supported; supported: "
                         f"Mistral models whose sliding_window is null (from version 0.2 on)")
    rope_type = hf.rope_parameters["rope_type"]
    if rope_type not in ("default", "llama3"):
        raise ValueError(f"rope_type {rope_type!r} is not supported; supported: 'default', "
                         f"'llama3'")


def read_tokenizer(folder: Path) -> Any:
    with naming(f"the tokenizer of {folder}"):   # without files transformers makes an empty one
        names = ("tokenizer.json", "tokenizer.model", "vocab.json")
        if not any((folder / name).is_file() for name in names):
            raise ValueError("there is no tokenizer.json, tokenizer.model or vocab.json")
        for name in ("tokenizer", "tokenizer_config", "special_tokens_map", "added_tokens"):
            if (folder / f"{name}.json").is_file():   # transformers would not say which is damaged
                read_object(folder / f"{name}.json")
        return AutoTokenizer.from_pretrained(folder)


def read_tensors(folder: Path, wanted: dict[str, torch.nn.Parameter], tied: bool, device,
                 dtype) -> dict[str, torch.Tensor]:
    """The tensors of these names, or this process's rows of those that are sharded.

    wanted: parameters on the meta device. tied: the head is the embeddings, so a tensor of its own
    must equal them.
    """
    tensors, left_over, copies = {}, [], []
    for file in _tensor_files(folder):
        with naming(file), safe_open(file, framework="pt") as reader:
            for name in reader.keys():
                if name.endswith("inv_freq"):   # old Llama checkpoints carry RoPE frequencies
                    continue
                if name == "lm_head.weight" and tied:
                    copies.append(reader.get_tensor(name))
                elif name not in wanted:
                    left_over.append(name)
                else:
                    part, parameter = reader.get_slice(name), wanted[name]
                    if part.get_shape() != list(parameter.shape):
                        raise ValueError(f"tensor {name} has shape {part.get_shape()}, "
                                         f"config.json says {list(parameter.shape)}")
                    # A copy, because one tensor would keep the whole mapped file in memory.
                    tensors[name] = part[own_rows(parameter)].to(device=device, dtype=dtype,
                                                                 copy=True)
    missing = sorted(wanted.keys() - tensors.keys())
    for problem, names in (("lacks", missing),
                           ("has, beyond what config.json says,", left_over)):
        if names:
            more = ", …" if len(names) > 5 else ""
            raise ValueError(f"{folder} {problem} {len(names)} tensor{'s' * (len(names) > 1)}: "
                             f"{', '.join(names[:5])}{more}")
    for head in copies:   # a second copy of the embeddings is harmless
        name = "model.embed_tokens.weight"
        if not torch.equal(head[own_rows(wanted[name])].to(device=device, dtype=dtype),
                           tensors[name]):
            raise ValueError(f"{folder}: config.json ties the embeddings, but lm_head.weight is "
                             f"another tensor; set tie_word_embeddings to false to use it")
    return tensors


def _tensor_files(folder: Path) -> list[Path]:
    usual, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if usual.is_file():   # an index beside it is left from an earlier save
        files = [usual]
    elif index.is_file():
        names = read_object(index).get("weight_map")
        if not isinstance(names, dict):
            raise ValueError(f"{index} has no weight_map that names the files of the tensors")
        files = sorted({folder / name for name in names.values()})
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no .safetensors file; convert the model with "
                         f"transformers' save_pretrained")
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} is missing, though model.safetensors.index.json lists it")
    return files


def weights_hash(folder: Path) -> str:
    """A hash of 64 parts of each file of weights: a training step changes nearly all of them."""
    found = hashlib.sha256()
    for file in _tensor_files(folder):
        size = file.stat().st_size
        found.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            for part in range(64):
                stream.seek(size * part // 64)
                found.update(stream.read(4096))
    return found.hexdigest()


def write_folder(path: Path, tensors: dict[str, torch.Tensor], hf_config: Any, generation: dict,
                 tokenizer: Any) -> None:
    """Writes the folder aside and then renames it, so it is whole whenever it is there.

    The safetensors files have at most 5 GB each.
    """
    aside = path.with_name(f".{path.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)   # a save that was killed leaves one
    aside.mkdir(parents=True)
    save_torch_state_dict(tensors, aside)
    # A copy gets the dtype, because the model in memory may be saved again in another.
    hf_config = type(hf_config).from_dict(hf_config.to_dict())
    hf_config.dtype = next(iter(tensors.values())).dtype
    hf_config.save_pretrained(aside)
    if generation:
        (aside / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n",
                                                      encoding="utf-8")
    tokenizer.save_pretrained(aside)
    for file in aside.glob("*.safetensors"):   # the library lets only the owner read them
        file.chmod((aside / "config.json").stat().st_mode)
    aside.rename(path)
