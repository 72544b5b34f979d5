"""What a machine needs: faster products on CPUs, CUDA graphs, copies, allocator settings, memory.

The model takes copies to a device and products with wide sums from here. What else speeds up CPUs
is applied from outside.
"""

import contextlib
import ctypes
import math
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import psutil

# PyTorch reads this at its first allocation: tensors of at least 2 MB ask Linux for huge pages.
# Fresh memory is then mapped by 2 MB instead of by 4 kB, which is most of its cost.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
import torch
import torch.nn as nn
import torch.nn.functional as F

if TYPE_CHECKING:
    from model_utils import Transformer


@contextlib.contextmanager
def faster_sampling(model: "Transformer"):
    """Speeds up sampling on CPUs until the `with` block ends; on a GPU it does nothing.

    In bfloat16 it keeps a float32 copy of the head, which each decode step would make again. In
    float32 two products take the place of PyTorch's kernel of attention where queries are few. The
    rest is for x86, in bfloat16 where the processor has instructions for it. Layers with the same
    input become one product. Weights that are not small go through a kernel of oneDNN, and large
    ones are stored in the order in which that kernel reads them: with the few rows of a decode step
    it can take half the time of the kernel behind F.linear.
    Weights are moved, not copied, and moved back bit for bit. Meanwhile the weights of these layers
    are empty, and only `extend` and `logits` of the model work.
    """
    groups: list[tuple[nn.Module, str, tuple[nn.Linear, ...]]] = []   # (owner, method, its layers)
    cpu, wide = model.device.type == "cpu", model.dtype == torch.float32
    if (cpu and (wide or model.dtype == torch.bfloat16 and has_bfloat16())
            and torch.backends.mkldnn.is_available()
            and platform.machine().lower() in ("x86_64", "amd64")):
        for block in model.model.layers:
            a, m = block.self_attn, block.mlp
            groups += [(a, "project", (a.q_proj, a.k_proj, a.v_proj)),
                       (a.o_proj, "forward", (a.o_proj,)),
                       (m, "gate_and_up", (m.gate_proj, m.up_proj)),
                       (m.down_proj, "forward", (m.down_proj,))]
        if wide and not model.config.tie_embeddings:
            groups.append((model, "logits", (model.lm_head,)))
    moved = []
    try:
        with torch.inference_mode(False), torch.no_grad():
            if cpu and wide:
                model.cached_attention = attention_of_few(model.cached_attention)
            if cpu and model.dtype.itemsize < 4:
                model.logits = wide_product(model.head.detach())
            elif groups and model.config.tie_embeddings:   # the embeddings stay where they are
                model.logits = _product(model.head.detach(), None)
            for owner, method, layers in groups:
                weight, bias = layers[0].weight.detach(), layers[0].bias
                if len(layers) > 1:
                    weight = torch.cat([layer.weight for layer in layers])
                    bias = None if bias is None else torch.cat([layer.bias for layer in layers])
                if weight.numel() >= 1 << 19:   # reordering small ones saves little, leaves holes
                    weight = torch.ops.mkldnn._reorder_linear_weight(weight, 32)   # for ~32 rows
                moved.append((owner, method, layers, weight))
                for layer in layers:
                    layer.weight.data = layer.weight.new_empty(0)
                setattr(owner, method, _product(weight, bias, layers))
        yield
    finally:
        with torch.inference_mode(False), torch.no_grad():
            while moved:   # one by one, so that each old tensor is freed when the new one is there
                owner, method, layers, weight = moved.pop()
                vars(owner).pop(method, None)   # an interrupt may have come before it was set
                weight = weight.to_dense() if weight.is_mkldnn else weight
                for layer, part in zip(layers, weight.split([each.out_features for each in layers]),
                                       strict=True):
                    layer.weight.data = part if part.shape == weight.shape else part.clone()
        for name in ("logits", "cached_attention"):
            vars(model).pop(name, None)


def attention_of_few(kernel: Callable) -> Callable:
    """Returns a replacement for `cached_attention` of the model, which passes a call with more than
    16 queries on to `kernel`. Each query must see at least one position.

    PyTorch's kernel for CPUs works on each head of each sequence by itself. With the few queries of
    a decode step that costs more time than to store their scores.
    """
    def attend(q, keys, values, bias):
        if q.shape[2] > 16:
            return kernel(q, keys, values, bias)
        scores = (q * q.shape[-1] ** -0.5) @ keys.transpose(2, 3)                   # [B, K, N, S]
        return scores.add_(bias).softmax(-1) @ values
    return attend


def _product(weight, bias, layers: tuple[nn.Linear, ...] = ()) -> Callable:
    """x -> x·weightᵀ + bias; with several layers a tuple, split as their outputs are."""
    def linear(x):
        return F.linear(x, weight, bias)

    def onednn(x):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    # torch.compile uses the same threshold for a frozen model.
    product = onednn if weight.is_mkldnn or weight.numel() >= 1 << 17 else linear
    if len(layers) < 2:
        return product
    sizes = [layer.out_features for layer in layers]
    return lambda x: product(x).split(sizes, dim=-1)


Step = Callable[[], None]


def make_capture(stream: "torch.cuda.Stream") -> Callable[[Step], Step]:
    """Returns a function that runs a step once and returns the replay of its CUDA graph.

    The run is the warm-up that capturing needs. The graphs can share their memory, because they are
    never replayed at the same time.
    """
    pool = torch.cuda.graph_pool_handle()

    def capture(step):
        current = torch.cuda.current_stream(stream.device)   # of the sampler's GPU
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            step()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):   # records without running
            step()
        return graph.replay
    return capture


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU on this device, without a wait for what a GPU still has to do."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def bucket(number: int, most: int) -> int:
    """Rounds up to the next of 1, 2, 3, 4, 6, 8, 12, 16, 24, …, but at most `most`.

    These are few enough to capture a graph for each.
    """
    power = 1 << (number - 1).bit_length()
    return min(power * 3 // 4 if power > 2 and number <= power * 3 // 4 else power, most)


def has_bfloat16() -> bool:
    """Whether the processor has instructions for bfloat16 products; others compute in float32."""
    return bool(torch.backends.mkldnn.is_available() and (
        getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
        or getattr(torch.cpu, "_is_amx_tile_supported", bool)()))


def wide_product(weight: torch.Tensor) -> Callable:
    """The function x [..., D] -> x·weightᵀ [..., V] in float32, of x in the type of weight [V, D].

    A processor's instructions for bfloat16 compute exact products of such numbers and sum them in
    float32. Their result differs from that of float32 in the order of the sum alone.
    """
    instructions = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and has_bfloat16()
    weight, mkldnn = weight.float(), cast(Any, torch.backends.mkldnn)

    def product(x):
        return F.linear(x.float(), weight)

    def with_instructions(x):
        if torch.compiler.is_compiling():   # it cannot trace the setting
            return product(x)
        matmul = mkldnn.matmul
        before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
        try:
            return product(x)
        finally:
            matmul.fp32_precision = before

    return with_instructions if instructions else product


_STAYS = 256 << 20   # bytes of freed small tensors


def return_freed_memory(device: torch.device) -> None:
    """Makes glibc return freed large tensors to the system; by default it may keep about half.

    Small ones stay in the process, up to 256 MB, because mapping them again takes time.
    """
    if device.type == "cpu" and sys.platform == "linux":
        with contextlib.suppress(AttributeError):       # another C library
            ctypes.CDLL(None).mallopt(-3, 16 << 20)     # M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(-1, _STAYS)       # M_TRIM_THRESHOLD


def prepare_gradients(model: nn.Module, device: torch.device) -> None:
    """On CPUs, allocates all gradients before the first backward pass.

    If they were allocated one by one during that pass, they would keep its freed memory from being
    returned. If they are large, the memory that the rollout has freed is returned first.
    """
    if device.type != "cpu":
        return
    if 4 * sum(parameter.numel() for parameter in model.parameters()) > _STAYS:
        with contextlib.suppress(AttributeError):         # another C library
            ctypes.CDLL(None).malloc_trim(0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take; the processes on one CPU share its free memory."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    free = min(psutil.virtual_memory().available, control_group_memory())
    return int(free) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def control_group_memory(root: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes that a container, or another Linux control group, may still take; inf without a limit.

    The group's files that the system holds in memory count as free, because it drops them.
    """
    version_2 = root, "memory.max", "memory.current", ""
    version_1 = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
    for folder, limit, used, kind in (version_2, version_1):
        with contextlib.suppress(OSError, ValueError):   # ValueError: the limit is "max"
            held = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            files = sum(int(held.get(f"{kind}{each}_file", 0)) for each in ("active", "inactive"))
            room = int((folder / limit).read_text()) - int((folder / used).read_text())
            return max(room + files, 0)
    return math.inf


def own_memory(device: torch.device) -> int:
    """Bytes of the device's memory that this process has taken."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss
