"""What a machine needs: faster kernels on CPUs, settings of the memory allocator, and how much memory is free."""

import contextlib
import os
import platform
from collections.abc import Callable
from typing import TYPE_CHECKING

import psutil
import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from model_utils import Transformer


def _kernel(weight, bias) -> Callable:
    if weight.is_mkldnn or weight.numel() >= 1 << 17:   # as torch.compile does for a frozen model
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return lambda x: F.linear(x, weight, bias)


@contextlib.contextmanager
def pack_weights(model: "Transformer"):
    """On CPUs in float32, until the `with` block ends, layers with the same input are one product, weights that are not small
    go through a kernel of oneDNN, and large ones lie in the order in which it reads them: with the few rows of a decode
    step it needs half the time of the one behind F.linear.

    Weights are moved, not copied, and moved back bit for bit: meanwhile the parameters are empty, and only `extend` and
    `logits` work."""
    groups = []
    if (model.device.type == "cpu" and model.dtype == torch.float32 and torch.backends.mkldnn.is_available()
            and platform.machine().lower() in ("x86_64", "amd64")):
        for block in model.model.layers:
            a, m = block.self_attn, block.mlp
            groups += [(a.q_proj, a.k_proj, a.v_proj), (a.o_proj,), (m.gate_proj, m.up_proj), (m.down_proj,)]
        if not model.config.tie_embeddings:
            groups.append((model.lm_head,))
    moved = []
    try:
        with torch.inference_mode(False), torch.no_grad():
            for group in groups:
                weight = torch.cat([linear.weight for linear in group]) if len(group) > 1 else group[0].weight.detach()
                bias = None if group[0].bias is None else torch.cat([linear.bias for linear in group])
                if weight.numel() >= 1 << 19:   # to move smaller ones leaves holes in memory and saves little
                    weight = torch.ops.mkldnn._reorder_linear_weight(weight, 32)   # for about 32 rows
                moved.append((group, weight))
                for linear in group:
                    linear.weight.data = linear.weight.new_empty(0)
                group[0].packed = _kernel(weight, bias)
            if groups:   # embeddings that are the head too stay where they are
                model.packed_head = _kernel(model.head.detach(), None) if model.config.tie_embeddings else model.lm_head.packed
        yield
    finally:
        with torch.inference_mode(False), torch.no_grad():
            while moved:   # one by one: the old goes when the new is there
                group, weight = moved.pop()
                group[0].packed = None
                weight = weight.to_dense() if weight.is_mkldnn else weight
                for linear, part in zip(group, weight.split([linear.out_features for linear in group])):
                    linear.weight.data = part if part.shape == weight.shape else part.clone()
        model.packed_head = None


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take; processes on one CPU share what it has."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)   # by PyTorch's allocator
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
