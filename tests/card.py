"""A pretend GPU: tensors that say they are on the device "card" and hold their values in a tensor of the CPU.

Inside `with Card() as waits`, an operation on tensors of both devices is an error where a GPU would refuse it, and
`waits` lists what a real GPU would be waited for: values that the host reads, and shapes that depend on values.
Graph and capture() stand for torch.cuda.CUDAGraph and torch.cuda.graph.
It knows nothing of kernels, speed or memory. inference_mode is beyond it, and so is a copy of parameters that have
gradients.
"""
from contextlib import contextmanager

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("card")
torch._C._set_only_lift_cpu_tensors(True)               # torch.tensor(values, device="card") is dispatched, too

aten = torch.ops.aten
COPY = {aten._to_copy.default, aten.copy_.default}
INDEX = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default,
         aten._unsafe_index.Tensor}                     # a GPU's tensor may be indexed by a CPU's
WAITS = {aten._local_scalar_dense.default: "item", aten.nonzero.default: "nonzero"}


class OnCard(torch.Tensor):
    @staticmethod
    def __new__(cls, held):
        self = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device="card:0")
        self.held = held
        return self

    def __repr__(self):
        return f"OnCard({self.held})"

    def tolist(self):
        if Card.now is not None:
            Card.now.waits.append("tolist")
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        """Outside a with block, as in a backward pass."""
        return ran(operation, args, kwargs or {}, Card.now.waits if Card.now else [])


class Graph:
    """What a captured graph does: replay() runs the same operations on the same memory, whatever has become of it."""

    now = None                                          # the one that is being captured

    def __init__(self):
        self.kernels, self.made, self.before, self.replayed = [], set(), [], 0

    def pool(self):
        return None

    def record(self, operation, args, kwargs):
        """Run an operation on tensors of the CPU, and note it."""
        if operation in WAITS:
            raise RuntimeError(f"{operation}: a captured operation cannot be waited for")
        for given, argument in zip(args, operation._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write and address(given) not in self.made:
                self.before.append((given, given.clone()))
        out = operation(*args, **kwargs)
        read = {address(x) for x in tensors_of((args, kwargs))}
        kept = [x if address(x) not in read else None for x in tensors_of(out)]         # None: a view, or in place
        self.made |= {address(x) for x in kept if x is not None}
        args, kwargs = tree_map_only(torch.Tensor, lambda x: x if address(x) in self.made else Place(x), (args, kwargs))
        self.kernels.append((operation, args, kwargs, kept))
        return out

    def replay(self):
        self.replayed += 1
        with _disable_current_modes():
            for operation, args, kwargs, kept in self.kernels:
                args, kwargs = tree_map_only(Place, Place.tensor, (args, kwargs))
                for old, new in zip(kept, tensors_of(operation(*args, **kwargs))):
                    if old is not None:
                        old.copy_(new)


class Place:
    """Memory that a graph does not own: it may be freed before the graph is replayed."""

    def __init__(self, x):
        self.storage, self.dtype = StorageWeakRef(x.untyped_storage()), x.dtype
        self.where = x.storage_offset(), x.shape, x.stride()

    def tensor(self):
        if self.storage.expired():
            raise RuntimeError("a graph reads memory that was freed")
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.where)


@contextmanager
def capture(graph, pool=None):
    """Nothing is computed while a graph is captured: afterwards all memory is what it was before."""
    Graph.now = graph
    try:
        yield
    finally:
        Graph.now = None
        for x, before in reversed(graph.before):
            x.copy_(before)


def tensors_of(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def address(x):
    return x.untyped_storage().data_ptr()


class Card(TorchDispatchMode):
    now = None                                          # the one whose with block is open

    def __enter__(self):
        self.waits, Card.now = [], self
        super().__enter__()
        return self.waits

    def __exit__(self, *error):
        Card.now = None
        return super().__exit__(*error)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return ran(operation, args, kwargs or {}, self.waits)


def ran(operation, args, kwargs, waits):
    """The result of an operation, on the device where a GPU's would be."""
    tensors = tensors_of((args, kwargs))
    there = [x for x in tensors if isinstance(x, OnCard)]
    here = [x for x in tensors if not isinstance(x, OnCard) and x.dim()]               # numbers may come from anywhere
    if there and here and operation not in COPY | INDEX:
        raise RuntimeError(f"{operation}: tensors of shape {[tuple(x.shape) for x in here]} are on the CPU, others not")
    if operation in INDEX and there and not isinstance(args[0], OnCard):
        raise RuntimeError(f"{operation}: a tensor on the CPU is indexed by one on the card")
    asked = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else ""
    if there and operation in WAITS:
        waits.append(WAITS[operation])
    if there and operation in INDEX and any(x is not None and x.dtype == torch.bool for x in args[1]):
        waits.append("index by a mask")
    if there and (asked == "cpu" or operation is aten.copy_.default and not isinstance(args[0], OnCard)):
        waits.append("copy to the CPU")
    kwargs = kwargs | ({"device": "cpu"} if asked else {})
    held, named = tree_map_only(OnCard, lambda x: x.held, (args, kwargs))
    out = Graph.now.record(operation, held, named) if Graph.now is not None else operation(*held, **named)
    if operation is aten.copy_.default:
        return args[0]
    if asked == "cpu":
        return out.clone() if any(out is x.held for x in there) else out
    if not there and asked != "card":
        return out
    known = {id(x.held): x for x in there}              # what an operation in place returns is its own argument
    return tree_map_only(torch.Tensor, lambda x: known.get(id(x)) if id(x) in known else OnCard(x), out)
