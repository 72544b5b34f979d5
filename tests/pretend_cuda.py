"""Pretends that the machine has GPUs, so that tests on a CPU run the code paths of one.

    with pretend() as gpu:                       # or pretend(gpus=2)
        model, _ = load_model(folder, "cuda")    # model.device is cuda:0
        ...
    assert gpu.captures == 3 and not gpu.waits

A tensor on a pretended GPU is a CPU tensor whose storage is noted as belonging there; the results
of operations belong where their operands do. What CUDA refuses, or what would be slow there without
a message, is an error:

- operands on different devices;
- inside the capture of a graph: waiting for the device, copies from or to the CPU, operations on
  the CPU, and operations on another GPU than that of the stream;
- attention that no fused kernel serves, whose memory is quadratic.

A graph is recorded operation by operation. As in CUDA the capture runs nothing, so what it changed
is undone, and a replay repeats the operations on the storages that they had at the capture, without
Python in between. All intermediate results of the graphs of a pool are overwritten with NaN before
each replay, because these graphs share their memory. `gpu.waits` counts by place in the project
how often the CPU waited for the device.
"""

import collections
import contextlib
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

ROOT = str(Path(__file__).resolve().parent.parent)
# These wait for the device, because the size of their result or a Python number depends on data.
WAITING = {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.masked_select.default",
           "aten.equal.default", "aten.is_nonzero.default", "aten.bincount.default",
           "aten._unique2.default", "aten.unique_dim.default", "aten.repeat_interleave.Tensor"}
BETWEEN_DEVICES = {"aten.copy_.default", "aten._to_copy.default"}

# Of each storage on a GPU: (index of the GPU, bytes, a weak reference that removes the entry).
_homes: dict[int, tuple[int, int, weakref.ref]] = {}
_bytes = collections.Counter()   # index of a GPU -> bytes of all these storages


@contextlib.contextmanager
def _without_modes():
    with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
        yield


def _key(tensor) -> int:
    return tensor.untyped_storage()._cdata


def _home(tensor) -> int | None:
    """The index of the GPU that holds a tensor; None is the CPU, or meta."""
    tensor = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    if tensor.is_mkldnn or tensor.layout is not torch.strided or tensor.is_meta:
        return None
    found = _homes.get(_key(tensor))
    return found[0] if found else None


_device = torch._C.TensorBase.device.__get__   # what a tensor says by itself


def _device_of(tensor) -> torch.device:
    home = _home(tensor)
    return _device(tensor) if home is None else torch.device("cuda", home)


def _forget(key: int) -> None:
    found = _homes.pop(key, None)
    if found:
        _bytes[found[0]] -= found[1]


def _tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _place() -> str:
    """The innermost line of the project that is running now."""
    frame = sys._getframe(1)
    while frame:
        file = frame.f_code.co_filename
        if file.startswith(ROOT) and file != __file__:
            return f"{Path(file).name}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "?"


class Gpu:
    """The state of the pretended GPUs in a `with` block."""

    def __init__(self, count: int, free: int):
        self.count, self.free = count, free
        self.current = 0                      # the current device
        self.streams = {}                     # the current stream of each device
        self.capturing: Graph | None = None
        self.captures = self.replays = 0
        # Bytes, since reset_peak_memory_stats. A storage counts with the size that it had first.
        self.peak = 0
        self.waits = collections.Counter()    # place in the project -> how often
        self.waited_streams = []              # (stream, the one it waits for)
        self.pools = collections.defaultdict(list)
        self.generators = {}                  # id -> (generator, GPU); kept, so that ids stay

    def index(self, device=None) -> int:
        if device is None:
            return self.current
        if isinstance(device, int):
            return device
        index = torch.device(device).index
        return self.current if index is None else index

    def put(self, tree, home: int | None):
        """Notes that the storages of these tensors belong to this GPU, or to the CPU."""
        for tensor in _tensors(tree):
            if tensor.is_meta:
                continue
            key, storage = _key(tensor), tensor.untyped_storage()
            if home is None:
                _forget(key)
            elif key not in _homes or _homes[key][0] != home:
                if not 0 <= home < self.count:
                    raise RuntimeError("CUDA error: invalid device ordinal")
                _forget(key)
                _homes[key] = (home, storage.nbytes(),
                               weakref.ref(storage, lambda gone, key=key: _forget(key)))
                _bytes[home] += storage.nbytes()
                self.peak = max(self.peak, _bytes[home])
        return tree

    def allocated(self, device=None) -> int:
        return _bytes[self.index(device)]

    def wait(self, what: str) -> None:
        if self.capturing is not None:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing: "
                               f"{what} at {_place()} waits for the device")
        self.waits[_place()] += 1

    def stream(self, device=None) -> "Stream":
        index = self.index(device)
        return self.streams.setdefault(index, Stream(index))


class _Operations(TorchDispatchMode):
    """Every operation below autograd: finds mixed devices and waits, notes where results belong."""

    def __init__(self, gpu: Gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):   # its local tensors come here instead
            return NotImplemented
        gpu, kwargs, name = self.gpu, kwargs or {}, str(func)
        operands = [t for t in _tensors((args, kwargs)) if not t.is_meta]
        # A CPU tensor without dimensions is a number.
        homes = {_home(t) for t in operands if t.dim() or _home(t) is not None}
        if len(homes) > 1 and name not in BETWEEN_DEVICES:
            raise RuntimeError(f"Expected all tensors to be on the same device: {name} at "
                               f"{_place()} got {sorted(map(str, homes))}")
        home = next(iter(homes), None) if len(homes) < 2 else _home(operands[0])
        waits = name in WAITING or (
            name.startswith(("aten.index.", "aten.index_put")) and any(
                t.dtype == torch.bool for t in _tensors(args[1])))
        if homes - {None} and (waits or len(homes) > 1):
            gpu.wait(name)
        graph = gpu.capturing
        if graph is not None and operands:
            if homes != {graph.stream.index}:
                raise RuntimeError(f"{name} at {_place()} in a capture on cuda:"
                                   f"{graph.stream.index} has operands on {homes}")
            graph.before(func, args)
        out = func(*args, **kwargs)
        known = {_key(t) for t in operands}
        fresh = [t for t in _tensors(out) if not t.is_meta and _key(t) not in known]
        gpu.put(fresh, home)
        if graph is not None:
            graph.after(func, args, kwargs, out, known)
        return out


class _Calls(TorchFunctionMode):
    """Calls that name a device: their CPU twins run, and the results are noted as belonging there.
    """

    def __init__(self, gpu: Gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        gpu, kwargs, name = self.gpu, dict(kwargs or {}), getattr(func, "__name__", "")
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        here = first is not None and not first.is_meta
        home = _home(first) if here else None
        if func == torch.Tensor.get_device:
            return -1 if home is None else home
        if func == torch.Tensor.tolist and home is not None:
            gpu.wait("tolist")
        if func == torch.Tensor.numpy and home is not None:
            raise TypeError("can't convert cuda device type tensor to numpy")
        if func == torch.Tensor.pin_memory:   # the CPU build has no allocator for it
            return first
        if func == torch.Tensor.cpu and here:
            return self._move(first, None)
        if func == torch.Tensor.cuda:
            return self._move(first, gpu.index(args[1] if len(args) > 1 else kwargs.get("device")))
        if func == torch.Tensor.to and here:
            return self._to(first, *args[1:], **kwargs)
        if name == "scaled_dot_product_attention" and home is not None:
            grouped, masked = kwargs.get("enable_gqa"), kwargs.get("attn_mask") is not None
            if grouped and (masked or first.dtype == torch.float32):
                raise RuntimeError(f"no fused kernel serves this attention at {_place()}: those "
                                   f"that take float32 or a mask do not take grouped queries")
            # Kernels give the result with the heads behind the queries in memory.
            out = func(*args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2)
            return gpu.put(out, home)
        if kwargs.get("out_dtype") is not None:   # CUDA alone multiplies into another type
            wider = kwargs.pop("out_dtype")
            return func(*(a.to(wider) if isinstance(a, torch.Tensor) else a for a in args))
        device = kwargs.get("device")
        if name == "_make_wrapper_subclass" or (
                device is None or torch.device(device).type == "meta"):
            return func(*args, **kwargs)
        target = gpu.index(device) if torch.device(device).type == "cuda" else None
        if target is not None:
            kwargs["device"] = "cpu"
            if func in (torch.tensor, torch.as_tensor):
                gpu.wait("copy from the CPU")
            generator = kwargs.get("generator")
            of = gpu.generators.get(id(generator), (None, None))[1]
            if generator is not None and of != target:
                raise RuntimeError(f"the generator and the result are on different devices at "
                                   f"{_place()}")
        return gpu.put(func(*args, **kwargs), target)

    def _to(self, tensor, *args, copy=False, **kwargs):
        others = [a for a in (*args, kwargs.get("other")) if isinstance(a, torch.Tensor)]
        non_blocking = kwargs.get("non_blocking", False)
        if others:
            target, dtype = _home(others[0]), others[0].dtype
        else:
            device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
            if device is not None and device.type == "meta":
                return torch.Tensor.to(tensor, *args, copy=copy, **kwargs)
            target = _home(tensor) if device is None else (
                self.gpu.index(device) if device.type == "cuda" else None)
        same = dtype is None or dtype == tensor.dtype
        if _home(tensor) == target:
            return tensor.to(dtype or tensor.dtype, copy=copy)
        return self._move(tensor if same else tensor.to(dtype), target, non_blocking)

    def _move(self, tensor, target, non_blocking=False):
        home = _home(tensor)
        if home == target:
            return tensor
        if self.gpu.capturing is not None:
            raise RuntimeError(f"copy between devices inside a capture at {_place()}")
        if target is None:
            self.gpu.wait("copy to the CPU")
        if home is None and not non_blocking:
            self.gpu.wait("copy from the CPU")
        if isinstance(tensor, DTensor):
            return DTensor(self._move(tensor._local_tensor, target), tensor._spec,
                           requires_grad=False)
        return self.gpu.put(tensor.clone(), target)


# --------------------------------------------------------------------------------------------------
# Streams, events, graphs, generators

class Stream:
    def __init__(self, device=None, priority=0, **more):
        self.index = _now.index(device)
        self.device = torch.device("cuda", self.index)

    def wait_stream(self, other):
        _now.waited_streams.append((self, other))

    def wait_event(self, event):
        pass

    def record_event(self, event=None):
        return event or Event()

    def synchronize(self):
        _now.wait("synchronize")


class Event:
    def __init__(self, *args, **kwargs):
        pass

    def record(self, stream=None):
        pass

    def wait(self, stream=None):
        pass

    def synchronize(self):
        _now.wait("synchronize")

    def query(self):
        return True


@contextlib.contextmanager
def _on_stream(stream):
    if stream is None:
        yield
        return
    with _on_device(stream.index):
        before = _now.stream(stream.index)
        _now.streams[stream.index] = stream
        try:
            yield
        finally:
            _now.streams[stream.index] = before


@contextlib.contextmanager
def _on_device(device):
    before, _now.current = _now.current, _now.index(device)
    try:
        yield
    finally:
        _now.current = before


class Graph:
    def __init__(self, *args, **kwargs):
        self.operations, self.undo, self.own = [], {}, set()

    def before(self, func, args):
        """Saves what an operation is about to change, unless the capture made it."""
        if not func._schema.is_mutable:
            return
        for value, declared in zip(args, func._schema.arguments):
            if declared.alias_info is not None and declared.alias_info.is_write:
                for tensor in _tensors(value):
                    storage = tensor.untyped_storage()
                    if _key(tensor) not in self.own | self.undo.keys():
                        self.undo[_key(tensor)] = storage, storage.clone()

    def after(self, func, args, kwargs, out, known):
        outs = _tensors(out)
        fresh = [_key(t) not in known for t in outs]
        self.own |= {_key(t) for t, new in zip(outs, fresh) if new}
        with _without_modes():   # aliases: another storage put into a parameter is not seen
            args, kwargs, outs = tree_map_only(torch.Tensor, torch.Tensor.detach,
                                               (args, kwargs, outs))
        if any(fresh) or func._schema.is_mutable:   # else it only makes a view
            self.operations.append((func, args, kwargs, outs, fresh))

    def replay(self):
        _now.replays += 1
        with _without_modes(), torch.no_grad():
            for graph in _now.pools[self.pool]:
                if graph():
                    graph().poison()
            for func, args, kwargs, outs, fresh in self.operations:
                results = _tensors(func(*args, **kwargs))
                for old, result, new in zip(outs, results, fresh):
                    if new:
                        old.copy_(result)

    def poison(self):
        for *_, outs, fresh in self.operations:
            for tensor, new in zip(outs, fresh):
                if new:
                    tensor.fill_(float("nan") if tensor.is_floating_point()
                                 else True if tensor.dtype == torch.bool else 10 ** 6)


@contextlib.contextmanager
def _capture(graph, pool=None, stream=None, **more):
    assert _now.capturing is None, "a capture inside a capture"
    graph.pool, graph.stream = pool, stream or Stream()
    with _on_stream(graph.stream):
        _now.capturing = graph
        try:
            yield
        finally:
            _now.capturing = None
            with _without_modes():
                for storage, before in graph.undo.values():
                    storage.copy_(before)
            graph.undo = {}
    _now.pools[pool].append(weakref.ref(graph))
    _now.captures += 1


_Generator = torch.Generator


class _Real(type):
    def __instancecheck__(cls, instance):
        return isinstance(instance, _Generator)


class Generator(metaclass=_Real):
    def __new__(cls, device="cpu"):
        made = _Generator("cpu")
        if torch.device(device).type == "cuda":
            _now.generators[id(made)] = made, _now.index(device)
        return made


# --------------------------------------------------------------------------------------------------

_now: Gpu   # of the `with` block that is running


@contextlib.contextmanager
def pretend(gpus: int = 1, free: int = 1 << 40):
    """Makes torch.cuda see this many GPUs with so many free bytes; yields a Gpu."""
    global _now
    _now = gpu = Gpu(gpus, free)
    init_process_group = dist.init_process_group

    def init(backend=None, *args, **kwargs):   # the tensors are the CPU's
        return init_process_group((backend or "gloo").replace("nccl", "gloo"), *args, **kwargs)

    def set_device(device):
        if not 0 <= gpu.index(device) < gpus:
            raise RuntimeError("CUDA error: invalid device ordinal")
        gpu.current = gpu.index(device)

    properties = SimpleNamespace(name="pretended GPU", total_memory=free, major=9, minor=0,
                                 multi_processor_count=132)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(
            torch.cuda, is_available=lambda: True, device_count=lambda: gpus,
            current_device=lambda: gpu.current, set_device=set_device, device=_on_device,
            is_current_stream_capturing=lambda: gpu.capturing is not None,
            is_initialized=lambda: True, init=lambda: None, Stream=Stream, Event=Event,
            stream=_on_stream, current_stream=gpu.stream, default_stream=gpu.stream,
            CUDAGraph=Graph, graph=_capture, graph_pool_handle=lambda: object(),
            synchronize=lambda device=None: gpu.wait("synchronize"), empty_cache=lambda: None,
            memory_allocated=gpu.allocated, memory_reserved=gpu.allocated,
            max_memory_allocated=lambda device=None: gpu.peak,
            max_memory_reserved=lambda device=None: gpu.peak,
            reset_peak_memory_stats=lambda device=None: setattr(
                gpu, "peak", gpu.allocated(device)),
            mem_get_info=lambda device=None: (gpu.free - gpu.allocated(device), gpu.free),
            get_device_name=lambda device=None: properties.name,
            get_device_properties=lambda device=None: properties,
            get_device_capability=lambda device=None: (9, 0)))
        for name, get in (("device", _device_of), ("is_cuda", lambda t: _home(t) is not None),
                          ("is_cpu", lambda t: _device_of(t).type == "cpu")):
            stack.enter_context(mock.patch.object(torch.Tensor, name, property(get)))
        stack.enter_context(mock.patch.object(torch, "Generator", Generator))
        stack.enter_context(mock.patch.object(dist, "init_process_group", init))
        cudnn = torch.backends.cuda.cudnn_sdp_enabled()
        stack.callback(lambda: torch.backends.cuda.enable_cudnn_sdp(cudnn))
        stack.enter_context(_Operations(gpu))
        calls, run_backward = _Calls(gpu), torch.autograd._engine_run_backward

        def run(*args, **kwargs):   # a mode is off inside the call that it hands on
            with calls:
                return run_backward(*args, **kwargs)

        stack.enter_context(mock.patch.object(torch.autograd, "_engine_run_backward", run))
        stack.enter_context(calls)
        yield gpu
