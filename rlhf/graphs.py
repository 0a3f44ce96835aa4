"""[kit] Decoding steps as CUDA graphs, and engines that are kept for the next sampling of the same policy.

Launching the thousand small kernels of a step takes longer than running them. A graph launches them all at once: what
was captured once is replayed, with the same kernels on the same memory. So an engine that is kept holds its cache and
the weights that its graphs read. Before it is used again, the weights of today are copied there.
"""
from contextlib import contextmanager

import torch

KEPT = .05                              # of the GPU's memory, for all engines that a policy keeps


class Graphs:
    """The graphs of an engine: {what tells steps apart, such as their sizes: graph}. They share their memory."""

    def __init__(self):
        self.captured, self.pool = {}, None

    def run(self, key, step):
        """step(), which is captured when a key is new. Between steps with the same key, only the values of tensors may
        change."""
        if key in self.captured:
            return self.captured[key].replay()
        step()                                          # a real step, which also warms up what cannot be captured cold
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            step()
        self.captured[key], self.pool = graph, graph.pool()


@contextmanager
def kept_engine(policy, Engine, fixed):
    """An engine for a with block in which the policy's weights are fused: the one that an earlier block with the same
    arguments has kept, or a new Engine(gpt, *fixed). fixed: a tuple of all that its graphs cannot change."""
    gpt, layers, engines = policy.gpt, policy.gpt.fused_linears(), policy.engines
    places = tuple(address(p) for p in gpt.parameters())
    for key in [key for key in engines if key[0] != places]:            # their graphs read what is not there any more
        del engines[key]
    key = places, policy.role, fixed
    engine = engines.pop(key, None) or Engine(gpt, *fixed)
    engine.gpt, engine.weights = gpt, engine.weights or [each.fused for each in layers]
    for each, weights in zip(layers, engine.weights):
        for x, now in zip(weights, each.fused):
            if x is not now and address(x) != address(now):         # None has no address, nor have packed weights
                x.copy_(now)
        each.fused = weights
    yield engine
    if engine.graphs is None:
        return
    engine.gpt, engine.bytes = None, held(engine, gpt)  # nothing that is kept holds the model
    room = KEPT * gpu_memory() - engine.bytes
    if room < 0:
        return
    while sum(each.bytes for each in engines.values()) > room:
        del engines[next(iter(engines))]                # used longest ago
    engines[key] = engine


def held(engine, gpt):
    """Bytes that an engine takes: its tensors, copies of weights, and what its graphs need for logits."""
    parameters = {storage(p) for p in gpt.parameters()}
    copies = [x for weights in engine.weights for x in weights if x is not None and storage(x) not in parameters]
    tensors = *engine.cache.k, *engine.cache.v, engine.u, engine.written, engine.p, *copies
    return sum(x.nbytes for x in tensors) + engine.slots * engine.row_logits


def gpu_memory():
    return torch.cuda.get_device_properties(0).total_memory


def address(x):
    """Where the first number of a tensor is in memory."""
    return x.data_ptr()


def storage(x):
    """Where the memory begins of which a tensor is a part."""
    return x.untyped_storage().data_ptr()
