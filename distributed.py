"""Several processes, and models that do not fit one GPU.

The functions of the first part also work without a process group, so callers need not ask how many
processes there are. The class Transformer uses nothing of this file: sharding, recomputation and
compilation are applied to it from outside.
"""

import atexit
import functools
import heapq
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

if TYPE_CHECKING:
    from model_utils import Transformer
    from options import TrainingOptions


# --------------------------------------------------------------------------------------------------
# The process group

def init_distributed(device: str = "auto", needed: bool = False) -> torch.device:
    """Joins the process group that torchrun describes, if there is one; returns the device to use.

    needed: make a group even for one process, because FSDP's mixed precision needs one. Raises
    ValueError for a GPU that is not there, and for more processes than GPUs.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but PyTorch sees no GPU; give cpu or auto")
    on_gpu = device == "cuda" or device == "auto" and torch.cuda.is_available()
    gpus, here = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    enough, local = here <= gpus, torch.device("cpu")
    if on_gpu and enough:
        local = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(local)
        # Flash attention shall serve. On Hopper and Blackwell PyTorch prefers cuDNN's, which takes
        # tens of milliseconds to plan for each new shape, and nearly every packing has new shapes;
        # on Blackwell it was reported to be wrong (pytorch issues 193893 and 196678).
        torch.backends.cuda.enable_cudnn_sdp(False)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if on_gpu and enough else "gloo"
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            store, number, size = next(dist.rendezvous("env://"))
            # After a restart by torchrun --max-restarts the store may still hold the addresses of
            # processes that are gone.
            restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
            store = dist.PrefixStore(f"restart {restart}", store)
            # A process may sample or score for much longer than others.
            dist.init_process_group(backend, store=store, rank=number, world_size=size,
                                    timeout=timedelta(hours=2))
        elif needed:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if on_gpu and not enough:   # the processes know one another now, so one of them says it
        raise ValueError(f"{here} processes on this machine need a GPU each, but PyTorch sees "
                         f"{gpus}: start at most {gpus}, or give --device cpu")
    return local


def leave() -> None:
    """Ends the program with status 0 if it is one of several processes, else ends the group alone.

    A thread of gloo may still hold a finished collective. When Python's own clean-up has begun, a
    thread that frees tensors aborts the process, so several processes end without that clean-up.
    """
    several = world_size() > 1
    if dist.is_initialized():
        dist.destroy_process_group()
    if several:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


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
    """Every process's object in order of rank, on every process."""
    if world_size() == 1:
        return [mine]
    everyone = [None] * world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def gather_lists(mine: list) -> list:
    """The lists of all processes, one behind the other, on every process."""
    return [item for part in gather_objects(mine) for item in part]


def on_main(function: Callable):
    """Calls `function` on rank 0 and returns its result on every process.

    A ValueError that it raises is raised on every process.
    """
    try:
        outcome = function() if is_main() else None
    except ValueError as error:
        outcome = error
    outcome = gather_objects(outcome)[0]
    if isinstance(outcome, ValueError):
        raise outcome
    return outcome


def largest(values: Iterable[float]) -> float:
    """The largest of these; nan if one is nan, over which Python's `max` may pass."""
    return torch.tensor(list(values), dtype=torch.float64).max().item()


class Totals:
    """Named sums, and maxima of numbers ≥ 0, over parts and over processes.

    A value may be a tensor of one number, which is read at the end: reading it waits for a GPU.
    """

    def __init__(self):
        self.sums: dict[str, list] = {}
        self.largest: dict[str, list] = {}

    def add(self, **values: float | torch.Tensor) -> None:
        for name, value in values.items():
            self.sums.setdefault(name, []).append(value)

    def maximum(self, **values: float | torch.Tensor) -> None:
        for name, value in values.items():
            self.largest.setdefault(name, []).append(value)

    def over_processes(self) -> dict[str, float]:
        """The same on every process; each must have named the same numbers."""
        def read(values: list) -> Iterator[float]:
            return (each.item() if torch.is_tensor(each) else each for each in values)

        everyone = gather_objects((
            {name: sum(read(values)) for name, values in self.sums.items()},
            {name: largest(read(values)) for name, values in self.largest.items()}))
        return {**{name: sum(sums[name] for sums, _ in everyone) for name in self.sums},
                **{name: largest(each[name] for _, each in everyone) for name in self.largest}}


def share_out(lengths: Sequence[int], processes: int) -> list[list[int]]:
    """Shares work out by length, not by count: a list of indices for each process.

    It gives each index, longest first, to the process with the least total length.
    """
    shares, loads = [[] for _ in range(processes)], [(0, p) for p in range(processes)]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        load, p = heapq.heappop(loads)
        shares[p].append(i)
        heapq.heappush(loads, (load + lengths[i], p))
    return [sorted(share) for share in shares]


def my_share(lengths: Sequence[int]) -> list[int]:
    """The indices of this process in share_out."""
    return share_out(lengths, world_size())[rank()]


def micro_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of consecutive rows whose lengths add up to at most `budget`, a list for each part.

    Every process gets the same number of parts, because each part is a collective of FSDP; the last
    ones of a process may be empty.
    """
    parts = _fill(enumerate(lengths), budget)
    return parts + [[]] * (max(gather_objects(len(parts))) - len(parts))


def _fill(rows: Iterable[tuple[Any, int]], budget: int) -> list[list]:
    parts, room = [], 0
    for row, length in rows:
        if not parts or length > room:
            parts.append([])
            room = budget
        parts[-1].append(row)
        room -= length
    return parts


def share_rows(rows: list, lengths: Sequence[int], learn: Sequence[bool],
               budget: int) -> list[tuple[list, bool]]:
    """This process's micro-batches of an update over the rows of all processes: (rows, learns).

    A process samples what it was given, and responses of unequal length make unequal shares. So the
    rows are dealt out anew. Each process gets consecutive ones, which often share a prompt, and all
    get about the same number of tokens.
    lengths: tokens of each row. learn: which rows have a gradient. Rows without one have
    micro-batches of their own. These come first, because FSDP ends an update with a backward pass;
    the last micro-batch learns even if no row does. Every process gets the same number of each
    kind, of which the last may be empty.
    """
    everyone = gather_lists(list(zip(rows, lengths, learn, strict=True)))
    micro = []
    for flag in (False, True):
        chosen = [(row, length) for row, length, each in everyone if each == flag]
        shares, total, before = [[] for _ in range(world_size())], sum(n for _, n in chosen), 0
        for row, length in chosen:   # to the process in whose stretch of tokens its middle lies
            shares[(2 * before + length) * len(shares) // (2 * total)].append((row, length))
            before += length
        parts = [_fill(share, budget) for share in shares]
        micro += [(part[rank()], flag) for part in zip_longest(*parts, fillvalue=[])]
    return micro if micro and micro[-1][1] else micro + [([], True)]


# --------------------------------------------------------------------------------------------------
# Sharded models

def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that FSDP may have sharded. Every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_rows(tensor: torch.Tensor) -> slice:
    """The rows that this process keeps of a tensor; all of them if FSDP has not sharded it."""
    if not isinstance(tensor, DTensor):
        return slice(None)
    mesh, rows = tensor.device_mesh, tensor.shape[0]
    each = -(-rows // mesh.size(mesh.ndim - 1))
    begin = each * mesh.get_local_rank(mesh.ndim - 1)
    # Of few rows the last processes keep none; safetensors refuses a slice that begins at the end.
    return slice(begin, min(begin + each, rows)) if begin < rows else slice(0, 0)


def sharded_like(tensor: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """The tensor of which `local` is this process's part, sharded as `tensor` is, if it is."""
    if not isinstance(tensor, DTensor):
        return local
    return DTensor.from_local(local, tensor.device_mesh, tensor.placements, shape=tensor.shape,
                              stride=tensor.stride())


def check_shard_size(size: int, processes: int) -> None:
    """Raises ValueError if groups of `size`, 0 for all, do not divide the number of processes."""
    if size and processes % size:
        raise ValueError(f"--shard-size must divide the number of processes, {processes}, not be "
                         f"{size}")


def shard(model: "Transformer", device: torch.device, compute_dtype: torch.dtype,
          shard_size: int = 0, offload: bool = False, mesh: DeviceMesh | None = None) -> None:
    """FSDP2: splits parameters, gradients and optimiser state over the processes, block by block.

    The model may still be on the meta device; `device` is where it computes, in `compute_dtype`.
    Gradients are averaged over all processes in float32.
    shard_size: processes that share one copy of the weights, 0 for all of them. With fewer (HSDP)
        there are several copies and only gradients travel between them; give the number of GPUs of
        a node where the network between nodes is slow.
    offload: keep the parameters in the CPU's memory and move a block at a time to the GPU.
    mesh: that of a model which is sharded already, so that both share its process groups.
    Needs a process group of any size. Raises ValueError for a shard_size that does not divide the
    number of processes.
    """
    size = shard_size or world_size()
    check_shard_size(size, world_size())
    shape, names = (size,), ("shard",)
    if size < world_size():
        shape, names = (world_size() // size, size), ("replicate", "shard")
    mesh = mesh or init_device_mesh(device.type, shape, mesh_dim_names=names)
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    # What lies around the blocks stays whole until the backward pass, which needs it at once; a
    # frozen model has none.
    trained = next(model.parameters()).requires_grad
    for module in [*model.model.layers, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy,
                    reshard_after_forward=module is not model or not trained,
                    offload_policy=CPUOffloadPolicy() if offload else OffloadPolicy())


def frozen_copy(model: "Transformer", dtype: torch.dtype,
                offload: bool = False) -> "Transformer":
    """A copy in `dtype` that is never trained, sharded if `model` is; see `shard`."""
    copied = _empty_like(model, dtype)
    device = torch.device("cpu") if offload else model.device
    weights = next(model.parameters())
    if isinstance(weights, DTensor):
        shard(copied, model.device, dtype, offload=offload, mesh=weights.device_mesh)
    copied.load_state_dict({name: parameter.detach().to(device=device, dtype=dtype, copy=True)
                            for name, parameter in model.named_parameters()}, assign=True)
    return copied


def _empty_like(model: "Transformer", dtype: torch.dtype) -> "Transformer":
    """A whole frozen model on the meta device with all but the weights of `model`."""
    # FSDP has made the model's class a subclass of its own.
    plain = next(each for each in type(model).__mro__ if not issubclass(each, FSDPModule))
    with torch.device("meta"):
        empty = plain(model.config).to(dtype)
    empty.hf_config, empty.generation_config = model.hf_config, model.generation_config
    empty.stop_ids = model.stop_ids
    return empty.requires_grad_(False)


def passes(model: "Transformer", parts: list, weights_stay: bool) -> Iterator:
    """Yields the micro-batches of one update, each for its passes through the model.

    Copies of the weights (HSDP) sum their gradients over each other in the last pass alone.
    weights_stay: the weights that the first pass gathers stay whole until the last has used them;
    otherwise each forward and each backward pass gathers those of the blocks. The others are
    gathered once for each backward pass.
    """
    if not isinstance(model, FSDPModule):
        yield from parts
        return
    for block in model.model.layers:
        block.set_reshard_after_forward(not weights_stay)
    for number, part in enumerate(parts, 1):
        last = number == len(parts)
        model.set_requires_all_reduce(last)
        model.set_reshard_after_backward(last or not weights_stay)
        yield part
    for block in model.model.layers:
        block.set_reshard_after_forward(True)


def gather_model(model: "Transformer", dtype: torch.dtype,
                 into: "Transformer | None" = None) -> "Transformer":
    """The model to sample with: `model` itself if it is whole and in `dtype`, else a whole copy.

    The copy is in `dtype` and is gathered once here instead of once a token. into: an earlier copy,
    which gets the weights of now and is returned. Every process must call this, with `into` or not;
    drop the copy when done.
    """
    if isinstance(model, FSDPModule):
        model.reshard()   # a forward pass without a backward pass leaves some parameters whole
    elif model.dtype == dtype:
        return model
    if into is not None:
        for old, parameter in zip(into.parameters(), model.parameters(), strict=True):
            old.copy_(full_tensor(parameter.detach().to(dtype)))
        return into
    whole = _empty_like(model, dtype)
    whole.load_state_dict(   # cast before gathering: less travels
        {name: full_tensor(parameter.detach().to(dtype))
         for name, parameter in model.named_parameters()}, assign=True)
    return whole


def wrap_blocks(model: "Transformer", recompute: str = "none", compile: bool = False) -> None:
    """Adds activation checkpointing, torch.compile or both to each block, for passes with gradient.

    recompute: "all": only a block's input is kept, and the backward pass computes the rest again;
    "cheap": the backward pass computes again all but matrix products and attention; "none".
    compile: compiles what lies before attention and what lies behind it. Attention itself would be
    compiled anew for every number of buckets.
    """
    if recompute == "none" and not compile:
        return
    how = {"context_fn": _keep_products} if recompute == "cheap" else {}
    recomputed = functools.partial(functools.partial, checkpoint, use_reentrant=False, **how)
    for block in model.model.layers:
        plain = trained = block.forward
        if compile:
            parts = block.before_attention, _attend, block.after_attention
            if recompute == "cheap":   # in each part: the products in compiled code are not seen
                parts = [recomputed(part) for part in parts]
            before, attend, after = parts
            before, after = (torch.compile(part, dynamic=True) for part in (before, after))
            trained = functools.partial(_block, before, attend, after)
        if recompute == "all" or recompute == "cheap" and not compile:
            trained = recomputed(trained)
        block.forward = functools.partial(_with_gradient_or_not, trained, plain)


def _attend(layout, *heads):
    return layout.attend(*heads)


def _block(before, attend, after, x, cos, sin, layout):
    return after(x, attend(layout, *before(x, cos, sin)))


def _keep_products():
    aten = torch.ops.aten
    return create_selective_checkpoint_contexts([
        aten.mm.default, aten.addmm.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default])


def _with_gradient_or_not(trained, plain, *arguments):
    return (trained if torch.is_grad_enabled() else plain)(*arguments)


# --------------------------------------------------------------------------------------------------
# The optimiser

def clip_gradients(model: torch.nn.Module, largest: float) -> float:
    """Scales the gradients down to a norm of `largest`; returns the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), largest)
    return full_tensor(norm).item()


MOMENTS = ("exp_avg", "exp_avg_sq")


def learning_rate(o: "TrainingOptions", step: int) -> float:
    """The learning rate of step `step`, from 0 on: linear warm-up, then the decay of --lr-schedule.

    The first step of the warm-up has 1/--lr-warmup-steps of the whole.
    """
    if step < o.lr_warmup_steps:
        return o.learning_rate * (step + 1) / o.lr_warmup_steps
    done = min(1.0, (step - o.lr_warmup_steps) / max(1, o.lr_decay_steps - o.lr_warmup_steps))
    return o.learning_rate * {"constant": 1.0, "linear": 1 - done,
                              "cosine": (1 + math.cos(math.pi * done)) / 2}[o.lr_schedule]


class AdamW(torch.optim.AdamW):
    """AdamW that can store its moments elsewhere: `rest` is "float32", "bfloat16" or "cpu".

    It converts each moment to float32 on the parameter's device only while that parameter is
    updated. The second moment changes by a thousandth a step; rounding to the nearest bfloat16
    would always undo that, so it is rounded up or down at random with the right mean. The random
    numbers are a function of step and parameter.
    """

    def __init__(self, parameters, rest: str = "float32", **settings):
        super().__init__(parameters, fused=True, **settings)   # fused makes no copies of weights
        self.rest = rest

    @torch.no_grad()
    def step(self, closure=None):
        if self.rest == "float32":
            return super().step(closure)
        number = self._updates() + 1
        group, = self.param_groups
        parameters = group["params"]
        try:
            for index, parameter in enumerate(parameters):
                state = self.state[parameter]
                for name in MOMENTS:
                    if name in state:
                        state[name] = state[name].to(device=parameter.device, dtype=torch.float32)
                group["params"] = [parameter]
                super().step()
                self._put_away(state, index, number)
        finally:
            group["params"] = parameters

    def put_all_away(self) -> None:
        """Stores the moments as `rest` says after a checkpoint was read, which restores float32."""
        number = self._updates()
        for index, parameter in enumerate(self.param_groups[0]["params"]):
            self._put_away(self.state[parameter], index, number)

    def _updates(self) -> int:
        """Updates made so far; it waits for the device once, not once a parameter."""
        return next((int(state["step"]) for state in self.state.values() if "step" in state), 0)

    def _put_away(self, state: dict, index: int, number: int) -> None:
        if self.rest == "cpu":
            state |= {name: state[name].cpu() for name in MOMENTS if name in state}
        elif self.rest == "bfloat16" and "exp_avg" in state:
            # The CPU's generator ignores the bits of a seed beyond 32.
            seed = (number * 1_000_003 + index) % 2 ** 32
            state |= {"exp_avg": state["exp_avg"].bfloat16(),
                      "exp_avg_sq": round_at_random(state["exp_avg_sq"], seed)}


def round_at_random(x: torch.Tensor, seed: int) -> torch.Tensor:
    """float32 -> bfloat16, up or down with probabilities that keep the mean. x may be sharded."""
    local = x.to_local() if isinstance(x, DTensor) else x
    if local.dtype == torch.float32:
        generator = torch.Generator(local.device).manual_seed(seed)
        noise = torch.randint(1 << 16, local.shape, generator=generator, device=local.device,
                              dtype=torch.int32)
        bits = local.contiguous().view(torch.int32) + noise
        local = (bits & -(1 << 16)).view(torch.float32).bfloat16()
    return sharded_like(x, local)
