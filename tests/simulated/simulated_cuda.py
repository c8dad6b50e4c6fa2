"""A CUDA device made of host memory: real values, and mistakes of device code are errors.

Python sees tensors on ``cuda:0``, PyTorch's C++ sees tensors on ``meta``, and the CPU computes.
What a GPU refuses is an error here, and so is what it would only sometimes get wrong:

* operations on tensors of host and device together; NumPy arrays of device tensors;
* a host that waits for the device, inside ``refuse_waiting`` and inside a graph capture;
* two streams that use the same memory, and neither waits for the other;
* outputs that are read before they arrived: a copy to the host is garbage until it is waited for;
* host memory that changes while it is copied to the device;
* a CUDA graph that uses memory which was freed after the capture.

Not simulated: bfloat16 autocast, cuDNN, NCCL, the size of the memory, and time: an event measures
how many operations were launched.
"""

import contextlib
import functools
import itertools
import sys
import threading
import types
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# after torch, as in the package
import faiss  # isort: skip

CUDA = torch.device("cuda", 0)
_CPU, _META = torch.device("cpu"), torch.device("meta")
_aten = torch.ops.aten
_INDEXING = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}
# operations whose result, or its shape, is a value on the device
_WAITING = {
    _aten._local_scalar_dense.default,
    _aten.equal.default,
    _aten.is_nonzero.default,
    _aten.masked_select.default,
    _aten.nonzero.default,
    _aten._unique2.default,
}
# by the number of a stream, how many of its operations are known to be complete
_Clock: TypeAlias = dict[int, int]


class Stream:
    """Stands in for ``torch.cuda.Stream``: knows what its next operation comes after."""

    _numbers = itertools.count()

    def __init__(self, device: object = None, **_: object) -> None:
        self.device, self.cuda_stream = CUDA, 0
        self.number = next(self._numbers)
        self.clock: _Clock = {self.number: 0}

    def wait_stream(self, other: "Stream") -> None:
        _merge(self.clock, other.clock)

    def wait_event(self, event: "Event") -> None:
        _merge(self.clock, event.clock)

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        _device.wait("Stream.synchronize", self.clock)


class Event:
    """Stands in for ``torch.cuda.Event``."""

    def __init__(self, **_: object) -> None:
        self.clock: _Clock = {}
        self.num_launches = 0

    def record(self, stream: Stream | None = None) -> None:
        self.clock = dict((stream or _device.stream).clock)
        self.num_launches = _device.num_launches

    def wait(self, stream: Stream | None = None) -> None:
        (stream or _device.stream).wait_event(self)

    def synchronize(self) -> None:
        if self.clock:
            _device.wait("Event.synchronize", self.clock)

    def elapsed_time(self, other: "Event") -> float:
        """Return a millisecond for each operation launched between the two."""
        return float(other.num_launches - self.num_launches)


@dataclass
class _Copy:
    """A copy between host and device that is complete when an operation of a stream is."""

    stream: int
    position: int
    complete: Callable[[], object]


@dataclass
class _Access:
    """Who used memory of the device last: streams, and the positions of operations on them."""

    write: tuple[int, int]
    reads: _Clock = field(default_factory=dict)


@dataclass
class _Node:
    """An operation of a graph, on host memory."""

    run: Callable[[], Any]
    out: Any
    reads: set[int]
    writes: set[int]


class Graph:
    """Stands in for ``torch.cuda.CUDAGraph``: computes again on the memory of the capture."""

    def __init__(self) -> None:
        self.nodes: list[_Node] = []
        # memory that was there before the capture, and memory that was made in it
        self.outside: set[int] = set()
        self.inside: set[int] = set()
        self.is_valid = True

    def add(self, node: _Node, made: set[int]) -> None:
        """Append an operation that made new memory."""
        self.inside |= made
        self.outside |= (node.reads | node.writes) - self.inside
        self.nodes.append(node)

    def replay(self) -> None:
        if any(not _device.num_owners[memory] for memory in self.outside):
            raise AssertionError("the graph uses memory that was freed after its capture")
        reads, writes = (
            set().union(*(getattr(node, name) for node in self.nodes))
            for name in ("reads", "writes")
        )
        _device.launch(reads, writes)
        for node in self.nodes:
            for old, new in zip(tree_leaves(node.out), tree_leaves(node.run()), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class _Device:
    """What has been launched, what is complete, and who uses which memory."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.default = self.stream = Stream()
        self.host: _Clock = {}
        self.num_launches = 0
        self.num_emptied = 0
        self.capture: Graph | None = None
        # the thread that must not wait
        self.refusing: int | None = None
        self.copies: list[_Copy] = []
        self.accesses: dict[int, _Access] = {}
        self.num_owners: Counter[int] = Counter()
        # keeps pinned memory, so that pageable memory is never at its address
        self.pinned: dict[int, Tensor] = {}

    def wait(self, what: str, clock: _Clock | None = None) -> None:
        """Let the host wait, by default for the current stream.

        Raises:
            RuntimeError: A graph is being captured, or this thread must not wait.
        """
        if self.capture is not None:
            self.capture.is_valid = False
            raise RuntimeError(f"operation not permitted when stream is capturing ({what})")
        if self.refusing == threading.get_ident():
            raise RuntimeError(f"called a synchronizing CUDA operation ({what})")
        with self.lock:
            _merge(self.host, self.stream.clock if clock is None else clock)
            arrived = [item for item in self.copies if self._is_complete(item)]
            self.copies = [item for item in self.copies if not self._is_complete(item)]
            for item in arrived:
                item.complete()

    def _is_complete(self, item: _Copy) -> bool:
        return item.position <= self.host.get(item.stream, 0)

    def launch(self, reads: set[int], writes: set[int]) -> None:
        """Put an operation on the current stream.

        Raises:
            AssertionError: It could run at the same time as another that uses the same memory.
        """
        with self.lock:
            clock, number = self.stream.clock, self.stream.number
            _merge(clock, self.host)
            clock[number] += 1
            self.num_launches += 1
            for memory in reads | writes:
                self._check_order(memory, clock, is_write=memory in writes)
            for memory in reads - writes:
                access = self.accesses.setdefault(memory, _Access((number, 0)))
                access.reads[number] = clock[number]
            for memory in writes:
                self.accesses[memory] = _Access((number, clock[number]))

    def _check_order(self, memory: int, clock: _Clock, *, is_write: bool) -> None:
        access = self.accesses.get(memory)
        if access is None:
            return
        others = [access.write, *(access.reads.items() if is_write else ())]
        if any(position > clock.get(number, 0) for number, position in others):
            raise AssertionError("two streams use the same memory and neither waits for the other")

    def start_copy(self, complete: Callable[[], object]) -> None:
        """Note an asynchronous copy, the last operation that was launched."""
        number = self.stream.number
        with self.lock:
            self.copies.append(_Copy(number, self.stream.clock[number], complete))

    def pin(self, tensor: Tensor) -> Tensor:
        self.pinned[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.pinned

    def empty_cache(self) -> None:
        if self.capture is not None:
            self.wait("empty_cache")
        self.num_emptied += 1


_device = _Device()


class DeviceTensor(torch.Tensor):
    """A tensor on the simulated device.

    Args:
        elem: Its values, on the host.
    """

    elem: Tensor
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, elem: Tensor) -> "DeviceTensor":
        # in inference mode a view of a weight could not be wrapped
        with torch.inference_mode(False):
            made: DeviceTensor = torch.Tensor._make_wrapper_subclass(
                cls,
                elem.size(),
                strides=elem.stride(),
                storage_offset=elem.storage_offset(),
                dtype=elem.dtype,
                layout=elem.layout,
                device=_META,
            )
        made.elem = elem
        memory = _memory(elem)
        _device.num_owners[memory] += 1
        weakref.finalize(made, _device.num_owners.subtract, [memory]).atexit = False
        return made

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return f"DeviceTensor({self.elem!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        _device.wait("pickle")
        return self.elem.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Also sees the operations that make a tensor out of nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute an operation where its tensors are."""
    tensors = [item for item in tree_leaves((args, kwargs)) if isinstance(item, Tensor)]
    ours = [item for item in tensors if isinstance(item, DeviceTensor)]
    if not ours and not _is_device(kwargs.get("device")):
        return func(*args, **kwargs)
    if func is _aten.copy_.default:
        return _copy(*args, **kwargs)
    _check_operands(func, args, tensors, len(ours))
    return _compute(func, args, kwargs, {id(item.elem): item for item in ours})


def _compute(func: Any, args: Any, kwargs: Any, ours: dict[int, DeviceTensor]) -> Any:
    """Compute an operation on the values, note it, and return its results on the device."""

    def to_device(item: Any) -> Any:
        if not isinstance(item, Tensor):
            return item
        return ours[id(item)] if id(item) in ours else DeviceTensor(item)

    run = functools.partial(func, *tree_map(_to_elem, args), **tree_map(_to_elem, kwargs))
    out = run()
    if not func.is_view:
        written = [kwargs.get(name, args[i : i + 1]) for i, name in _written(func)]
        _note(run, out, {_memory(item.elem) for item in ours.values()}, _memories(written))
    return tree_map(to_device, out)


def _note(run: Callable[[], Any], out: Any, used: set[int], writes: set[int]) -> None:
    """Note an operation that has been computed: on a stream, or in a graph."""
    made = {_memory(item) for item in tree_leaves(out) if isinstance(item, Tensor)} - used
    for memory in made:
        # what was here before has been freed
        _device.accesses.pop(memory, None)
    if _device.capture is None:
        _device.launch(used - writes, writes | made)
    else:
        _device.capture.add(_Node(run, out, used - writes, writes | made), made)


@functools.cache
def _written(func: Any) -> tuple[tuple[int, str], ...]:
    """Return the positions and names of the arguments that an operation writes to."""
    return tuple(
        (i, argument.name)
        for i, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def _check_operands(func: Any, args: Any, tensors: list[Tensor], num_ours: int) -> None:
    """Refuse what a GPU refuses, and note what makes the host wait."""
    on_host = [item for item in tensors if not isinstance(item, DeviceTensor) and item.dim()]
    if func in _INDEXING and num_ours:
        indices = [item for item in args[1] if item is not None]
        if any(item.dtype in (torch.bool, torch.uint8) for item in indices):
            _device.wait("indexing by a mask")
        if any(item is index for item in on_host for index in indices):
            _device.wait("indexing by a tensor of the host")
        on_host = [item for item in on_host if not any(item is index for index in indices)]
    if on_host and num_ours:
        raise RuntimeError(f"{func}: Expected all tensors to be on the same device, cuda:0 and cpu")
    if func in _WAITING:
        _device.wait(str(func))


def _copy(to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy within the device, or between host and device."""
    if isinstance(to, DeviceTensor) and isinstance(source, DeviceTensor):
        run = functools.partial(to.elem.copy_, source.elem)
        _note(run, run(), {_memory(source.elem), _memory(to.elem)}, {_memory(to.elem)})
    elif isinstance(to, DeviceTensor):
        _copy_to_device(to, source, non_blocking)
    else:
        assert isinstance(source, DeviceTensor)
        _copy_to_host(to, source, non_blocking)
    return to


def _copy_to_device(to: DeviceTensor, source: Tensor, non_blocking: bool) -> None:
    is_asynchronous = non_blocking and _device.is_pinned(source)
    run = functools.partial(to.elem.copy_, source)
    _note(run, run(), {_memory(to.elem)}, {_memory(to.elem)})
    if not is_asynchronous:
        _device.wait("copy from pageable memory")
        return
    before = source.clone()

    def check() -> None:
        if before.numpy().tobytes() != source.numpy().tobytes():
            raise AssertionError("host memory changed while it was copied to the device")

    _device.start_copy(check)


def _copy_to_host(to: Tensor, source: DeviceTensor, non_blocking: bool) -> None:
    values = source.elem.clone()
    _note(values.clone, None, {_memory(source.elem)}, set())
    if non_blocking and _device.is_pinned(to):
        to.fill_(77)
        _device.start_copy(lambda: to.copy_(values))
    else:
        _device.wait("copy to pageable memory")
        to.copy_(values)


class _Functions(TorchFunctionMode):
    """Sees what does not reach the operations: pinned memory, moves between devices, NumPy."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), dict(kwargs or {})
        special = _METHODS.get(name)
        if special is not None and args and isinstance(args[0], Tensor):
            return special(func, args, kwargs)
        if kwargs.pop("pin_memory", False):
            return _device.pin(func(*args, **kwargs))
        if not _is_device(kwargs.get("device")):
            return func(*args, **kwargs)
        if not isinstance(kwargs.get("generator"), Generator | None):
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        if name in ("tensor", "as_tensor"):
            return _move(func(*args, **{**kwargs, "device": _CPU}), CUDA, non_blocking=False)
        # what C++ is told; the operations see it there
        return func(*args, **{**kwargs, "device": _META})


def _to(func: Any, args: Any, kwargs: Any) -> Any:
    """Stand in for ``Tensor.to``."""
    rest = {name: item for name, item in kwargs.items() if name != "copy"}
    target, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args[1:], **rest)
    if target is None:
        return func(*args, **kwargs)
    moved = _move(args[0], target, non_blocking)
    moved = moved if dtype is None else moved.to(dtype)
    moved = moved if memory_format is None else moved.to(memory_format=memory_format)
    return moved.clone() if moved is args[0] and kwargs.get("copy") else moved


def _move(tensor: Tensor, target: torch.device, non_blocking: bool) -> Tensor:
    """Return a tensor on another device, or itself."""
    if isinstance(tensor, DeviceTensor) == _is_device(target):
        return tensor
    with torch._C.DisableTorchFunction(), torch.inference_mode(False):
        out = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    # as PyTorch does
    out = _device.pin(out) if non_blocking and not _is_device(target) else out
    return _copy(DeviceTensor(out) if _is_device(target) else out, tensor.detach(), non_blocking)


def _numpy(func: Any, args: Any, kwargs: Any) -> Any:
    if isinstance(args[0], DeviceTensor):
        raise TypeError("can't convert cuda:0 device type tensor to numpy.")
    return func(*args, **kwargs)


def _tolist(func: Any, args: Any, kwargs: Any) -> Any:
    return func(_move(args[0], _CPU, non_blocking=False))


def _data_ptr(func: Any, args: Any, kwargs: Any) -> Any:
    return func(args[0].elem if isinstance(args[0], DeviceTensor) else args[0])


_METHODS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "to": _to,
    "cpu": lambda func, args, kwargs: _move(args[0], _CPU, non_blocking=False),
    "cuda": lambda func, args, kwargs: _move(args[0], CUDA, non_blocking=False),
    "pin_memory": lambda func, args, kwargs: _device.pin(args[0].clone()),
    "is_pinned": lambda func, args, kwargs: _device.is_pinned(args[0]),
    "numpy": _numpy,
    "__array__": _numpy,
    "tolist": _tolist,
    "data_ptr": _data_ptr,
}


class Generator(torch.Generator):
    """Stands in for ``torch.Generator``; draws on the device what one of the host draws there."""

    @staticmethod
    def __new__(cls, device: torch.device | str = "cpu") -> torch.Generator:  # type: ignore[misc]
        if not _is_device(device):
            return _HostGenerator(device)
        return super().__new__(cls, "cpu")  # type: ignore[call-arg]

    device = property(lambda self: CUDA)


_HostGenerator = torch.Generator


class Autocast(torch.autocast):
    """Stands in for ``torch.autocast``: the device computes in float32."""

    def __init__(
        self, device_type: str, dtype: torch.dtype | None = None, enabled: bool = True
    ) -> None:
        super().__init__(device_type, dtype, enabled and device_type != "cuda")


@contextlib.contextmanager
def _current_stream(stream: Stream) -> Iterator[None]:
    before, _device.stream = _device.stream, stream
    try:
        yield
    finally:
        _device.stream = before


@contextlib.contextmanager
def _capturing(graph: Graph, stream: Stream, **_: object) -> Iterator[None]:
    """Stand in for ``torch.cuda.graph``, which leaves its stream only if the capture succeeds."""
    _device.wait("synchronize", _everything())
    before, _device.stream = _device.stream, stream
    _device.capture = graph
    try:
        yield
    finally:
        _device.capture = None
        if not graph.is_valid:
            raise RuntimeError("operation failed due to a previous error during capture")
        _device.stream = before


def _everything() -> _Clock:
    """Return a clock behind all that has been launched."""
    return dict.fromkeys(range(next(Stream._numbers)), _device.num_launches)


def _is_device(device: object) -> bool:
    """Return whether a device is the simulated one, which C++ calls ``meta``."""
    if isinstance(device, str):
        device = torch.device(device)
    return isinstance(device, torch.device) and device.type in ("cuda", "meta")


def _to_elem(item: Any) -> Any:
    """Return what the CPU computes with."""
    if isinstance(item, DeviceTensor):
        return item.elem
    return _CPU if isinstance(item, torch.device) and _is_device(item) else item


def _memory(elem: Tensor) -> int:
    """Return what tells memory apart: the address of a storage."""
    address: int = elem.untyped_storage()._cdata
    return address


def _memories(items: Iterable[Any]) -> set[int]:
    leaves = tree_leaves(list(items))
    return {_memory(item.elem) for item in leaves if isinstance(item, DeviceTensor)}


def _merge(clock: _Clock, other: _Clock) -> None:
    for number, position in other.items():
        clock[number] = max(position, clock.get(number, 0))


class _Resources:
    """Stands in for ``faiss.StandardGpuResources``."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


def _knn_gpu(
    resources: _Resources, queries: Tensor, bank: Tensor, k: int, **_: object
) -> tuple[Tensor, Tensor]:
    """Stand in for ``faiss.knn_gpu`` with tensors: runs on the current stream."""
    assert isinstance(queries, DeviceTensor)
    assert isinstance(bank, DeviceTensor)
    with torch._C.DisableTorchFunction():
        found = faiss.knn(queries.elem.numpy(), bank.elem.numpy(), k)
    outs = tuple(map(torch.from_numpy, found))
    used = {_memory(queries.elem), _memory(bank.elem)}
    _note(lambda: outs, outs, used, set())
    return DeviceTensor(outs[0]), DeviceTensor(outs[1])


_FUNCTIONS: dict[str, Any] = {
    "CUDAGraph": Graph,
    "Event": Event,
    "Stream": Stream,
    "current_device": lambda: 0,
    "current_stream": lambda device=None: _device.stream,
    "device": lambda device: contextlib.nullcontext(),
    "device_count": lambda: 1,
    "empty_cache": lambda: _device.empty_cache(),  # noqa: PLW0108 - of the one there is then
    "get_device_name": lambda device=None: "a simulated GPU",
    "graph": _capturing,
    "is_current_stream_capturing": lambda: _device.capture is not None,
    "max_memory_reserved": lambda device=None: 0,
    "mem_get_info": lambda device=None: (80 << 30, 80 << 30),
    "set_device": lambda device: None,
    "stream": _current_stream,
    "synchronize": lambda device=None: _device.wait("synchronize", _everything()),
}
_FAISS_FUNCTIONS: dict[str, Any] = {
    "StandardGpuResources": _Resources,
    "knn_gpu": _knn_gpu,
}
# on import, lets FAISS take tensors of a GPU
_TORCH_UTILS = "faiss.contrib.torch_utils"


@contextlib.contextmanager
def simulated_cuda() -> Iterator[_Device]:
    """Put a simulated GPU into ``torch.cuda`` for the block; yield its state.

    Raises:
        AssertionError: At the end, host memory has changed while it was copied to the device.
    """
    global _device  # noqa: PLW0603
    _device = _Device()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.multiple(torch.cuda, **_FUNCTIONS))
            stack.enter_context(mock.patch.object(torch, "Generator", Generator))
            stack.enter_context(mock.patch.object(torch, "autocast", Autocast))
            stack.enter_context(mock.patch.multiple(faiss, create=True, **_FAISS_FUNCTIONS))
            stack.enter_context(mock.patch.dict(sys.modules, {_TORCH_UTILS: types.ModuleType("")}))
            stack.enter_context(_Operations())  # type: ignore[no-untyped-call]
            stack.enter_context(_Functions())
            yield _device
            _device.wait("synchronize", _everything())
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


@contextlib.contextmanager
def refuse_waiting(device: torch.device) -> Iterator[None]:
    """Make it an error that this thread waits for a GPU, simulated or not."""
    if device.type == "cuda" and not issubclass(torch.cuda.Stream, Stream):
        with _refuse_waiting_for_a_gpu():
            yield
        return
    before, _device.refusing = _device.refusing, threading.get_ident()
    try:
        yield
    finally:
        _device.refusing = before


@contextlib.contextmanager
def _refuse_waiting_for_a_gpu() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
