"""Several processes, and memory beyond one GPU's. With one process, every function of the first part does nothing, so that
the callers need not ask."""

import functools
import heapq
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

if TYPE_CHECKING:
    from model_utils import Transformer


def init_distributed(device: str = "auto", needed: bool = False) -> torch.device:
    """Join the process group that torchrun describes, if it started more than one process; returns this one's device.

    needed: make a group of one process, too, as FSDP's mixed precision wants."""
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, not {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but PyTorch sees no GPU; give cpu or auto")
    on_gpu = device == "cuda" or device == "auto" and torch.cuda.is_available()
    local = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            store, number, size = next(dist.rendezvous("env://"))
            # After a restart by torchrun --max-restarts the store may still hold the addresses of processes that are gone.
            store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            dist.init_process_group(backend, store=store, rank=number, world_size=size)
        elif needed:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return local


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def gather_objects(mine) -> list:
    """Every process's object, in order of rank, on every process."""
    if not dist.is_initialized():
        return [mine]
    everyone = [None] * world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def on_main(function):
    """What `function` returns on rank 0, on every process; a ValueError of it is raised on every process."""
    try:
        outcome = function() if is_main() else None
    except ValueError as error:
        outcome = error
    outcome = gather_objects(outcome)[0]
    if isinstance(outcome, ValueError):
        raise outcome
    return outcome


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that FSDP may have sharded."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard(model: "Transformer", compute_dtype: torch.dtype, shard_size: int = 0, offload: bool = False) -> "Transformer":
    """FSDP2: parameters, gradients and optimiser state split over the processes, block by block.

    Float32 master weights; forward and backward in `compute_dtype`; gradients averaged over all processes in float32.
    shard_size: processes that share one copy of the weights, 0 for all of them. With fewer (HSDP) there are several copies
        and only gradients cross between them: give the GPUs of a node, where the network between nodes is slow.
    offload: parameters wait in the CPU's memory and come to the GPU a block at a time.
    Needs a process group, of whatever size. Raises ValueError for a shard_size that does not divide the processes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
    size = shard_size or world_size()
    if world_size() % size:
        raise ValueError(f"{world_size()} processes cannot share copies of the weights among {size} each: shard_size must "
                         f"divide their number")
    shape, names = ((size,), ("shard",)) if size == world_size() else ((world_size() // size, size), ("replicate", "shard"))
    settings = dict(mesh=init_device_mesh(model.device.type, shape, mesh_dim_names=names),
                    mp_policy=MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32),
                    offload_policy=CPUOffloadPolicy() if offload else OffloadPolicy())
    for block in model.model.layers:
        fully_shard(block, **settings)
    return fully_shard(model, **settings)


def wrap_blocks(model: "Transformer", recompute: str = "none", compile: bool = False) -> None:
    """From outside, for the pass that trains alone: activation checkpointing, and torch.compile of each block.

    recompute: what the backward pass computes again instead of keeping it: "all" of a block but its input, or what is
    "cheap", all but matrix products and attention."""
    for block in model.model.layers:
        plain = trained = block.forward
        if compile:
            trained = torch.compile(trained, dynamic=True)
        if recompute != "none":
            how = {"context_fn": _keep_products} if recompute == "cheap" else {}
            trained = functools.partial(checkpoint, trained, use_reentrant=False, **how)
        block.forward = functools.partial(_with_gradient_or_not, trained, plain)


def _keep_products():
    aten = torch.ops.aten
    return create_selective_checkpoint_contexts([
        aten.mm.default, aten.addmm.default, aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_flash_attention.default, aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default])


def _with_gradient_or_not(trained, plain, *arguments):
    return (trained if torch.is_grad_enabled() else plain)(*arguments)


def gather_model(model: "Transformer", dtype: torch.dtype) -> "Transformer":
    """The model to sample with: `model` itself if it is whole and in `dtype`, else a whole copy of it in `dtype`.

    Parameters are gathered once here instead of once per token. Every process must call it; drop the copy when done.
    """
    if model.dtype == dtype and not hasattr(model.model.embed_tokens.weight, "full_tensor"):
        return model
    with torch.device("meta"):
        whole = type(model)(model.config)
    whole.load_state_dict({name: full_tensor(parameter.detach().to(dtype))   # cast first: what travels is half as much
                           for name, parameter in model.named_parameters()}, assign=True)
    whole.hf_config, whole.generation_config, whole.stop_ids = model.hf_config, model.generation_config, model.stop_ids
    return whole.requires_grad_(False)


def spread(lengths: Sequence[int], processes: int) -> list[list[int]]:
    """Share prompts out by length, not by count: indices for each process, the longest going first to who has least."""
    shares, loads = [[] for _ in range(processes)], [(0, p) for p in range(processes)]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        load, p = heapq.heappop(loads)
        shares[p].append(i)
        heapq.heappush(loads, (load + lengths[i], p))
    return [sorted(share) for share in shares]


# ---------------------------------------------------------------------------------------------------------------------
# The optimiser

class AdamW(torch.optim.AdamW):
    """AdamW whose moments may rest in bfloat16 or in the CPU's memory, and come to their parameter, in float32, for its
    update alone.

    The second moment changes by a thousandth a step, which rounding to the nearest bfloat16 would always undo; so it is
    rounded up or down at random, such that the mean is right. The random numbers are a function of step and parameter."""

    def __init__(self, parameters, rest: str = "float32", **settings):
        super().__init__(parameters, fused=True, **settings)   # without copies of the weights' size
        self.rest = rest

    @torch.no_grad()
    def step(self, closure=None):
        if self.rest == "float32":
            return super().step(closure)
        group, = self.param_groups
        parameters = group["params"]
        try:
            for index, parameter in enumerate(parameters):
                state = self.state[parameter]
                for name in ("exp_avg", "exp_avg_sq"):
                    if name in state:
                        state[name] = state[name].to(device=parameter.device, dtype=torch.float32)
                group["params"] = [parameter]
                super().step()
                self.put_away(state, index)
        finally:
            group["params"] = parameters

    def put_away(self, state: dict, index: int) -> None:
        if self.rest == "cpu":
            state |= {name: state[name].cpu() for name in ("exp_avg", "exp_avg_sq") if name in state}
        elif self.rest == "bfloat16" and "exp_avg" in state:
            seed = (int(state["step"]) * 1_000_003 + index) % 2 ** 32   # of more bits the CPU's generator ignores the rest
            state |= {"exp_avg": state["exp_avg"].bfloat16(), "exp_avg_sq": round_at_random(state["exp_avg_sq"], seed)}

    def put_all_away(self) -> None:
        """After a checkpoint has been read, which brings all of them to their parameters."""
        for index, parameter in enumerate(self.param_groups[0]["params"]):
            self.put_away(self.state[parameter], index)


def round_at_random(x: torch.Tensor, seed: int) -> torch.Tensor:
    """float32 -> bfloat16, up or down with the probabilities that keep the mean. `x` may be sharded."""
    local = x.to_local() if isinstance(x, DTensor) else x
    if local.dtype == torch.float32:
        generator = torch.Generator(local.device).manual_seed(seed)
        noise = torch.randint(1 << 16, local.shape, generator=generator, device=local.device, dtype=torch.int32)
        local = ((local.contiguous().view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).bfloat16()
    if isinstance(x, DTensor):
        return DTensor.from_local(local, x.device_mesh, x.placements, shape=x.shape, stride=x.stride())
    return local
