"""Our ops under torch.compile and torch.export: one operator in the graph, whatever the sizes."""

import dataclasses
import functools
import importlib
import importlib.util
import io
import os
import subprocess
import sys
import time

import pytest
import torch
from cases import BAD_CALLS
from cases import flat_tensors as flat
from torch.library import opcheck

import pykernels
from pykernels import _backends, functional, nn, use_backend
from pykernels.testing import specs

GATES = {"rnn": 1, "gru": 3, "lstm": 4}
LAYERS = {
    "plain": {},
    "deep": {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False},
}


@pytest.fixture(autouse=True)
def fresh():
    """Nothing compiled before; and Dynamo's leave to look into RNN, GRU and LSTM, ours or not."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        yield


class Graphs:
    """A backend of torch.compile that keeps the graphs it is given, for another to compile.

    By default that one runs them as they are.
    """

    def __init__(self, then="aot_eager"):
        self.graphs, self.then = [], then

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return torch._dynamo.lookup_backend(self.then)(graph, inputs)

    def ours(self):
        """The names of our operators in all graphs."""
        return [
            str(node.target).split(".")[1]
            for graph in self.graphs
            for node in graph.graph.nodes
            if str(node.target).startswith("pykernels.")
        ]


def step(run, *args):
    """The outputs of a call and all gradients under random upstream ones."""
    leaves = [t for t in flat(args) if t.requires_grad]
    if isinstance(run, torch.nn.Module):
        leaves += [p for p in run.parameters() if p.requires_grad]
    outputs = flat(run(*args))
    if not leaves:
        return outputs
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)]


def same(run, *args, **options):
    """Compiled without a break, `run` gives the same bits as without, gradients too.

    It returns what was compiled.
    """
    graphs = Graphs()
    compiled = torch.compile(run, fullgraph=True, **{"backend": graphs} | options)
    exactly(step(compiled, *args), step(run, *args))
    return compiled, graphs


def exactly(found, expected):
    assert len(found) == len(expected)
    for one, two in zip(found, expected, strict=True):
        assert (one is None) == (two is None)
        assert one is None or (torch.equal(one, two) and one.any())


def arguments(op, T=5, B=3, I=4, H=6, dtype=torch.float32, grad=True):
    """x, w_ih, w_hh, b_ih, b_hh and the first states of a recurrent op."""
    torch.manual_seed(0)
    rows = GATES[op] * H
    shapes = [(T, B, I), (rows, I), (rows, H), (rows,), (rows,)]
    shapes += [(B, H)] * (2 if op == "lstm" else 1)
    return [torch.randn(shape, dtype=dtype).div_(2).requires_grad_(grad) for shape in shapes]


def heads(dtype=torch.float32, grad=True, B=2, N=4, S=7, D=8):
    torch.manual_seed(0)
    return [torch.randn(B, N, S, D, dtype=dtype, requires_grad=grad) for _ in range(3)]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("op", GATES)
def test_functions(op, dynamic, grad):
    run = getattr(functional, op)
    compiled, graphs = same(run, *arguments(op, grad=grad), dynamic=dynamic)
    assert graphs.ours() == [op]
    if dynamic:
        for T, B in ((2, 4), (9, 2)):
            other = arguments(op, T=T, B=B, grad=grad)
            exactly(step(compiled, *other), step(run, *other))
        assert len(graphs.graphs) == 1


@pytest.mark.parametrize("op", GATES)
def test_cells(op):
    x, w_ih, w_hh, b_ih, b_hh, *states = arguments(op)
    run = getattr(functional, f"{op}_cell")
    hx = tuple(states) if op == "lstm" else states[0]
    _, graphs = same(run, x[0], hx, w_ih, w_hh, b_ih, b_hh, dynamic=True)
    assert graphs.ours() == [op]
    same(run, x[0, 0], tuple(t[0] for t in hx) if op == "lstm" else hx[0], w_ih, w_hh)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("lengths", [[2, 5, 1], (5, 5, 5)])
@pytest.mark.parametrize("op", GATES)
def test_lengths_as_numbers(op, lengths, dynamic):
    _, graphs = same(
        lambda *args: getattr(functional, op)(*args, lengths=lengths, reverse=True),
        *arguments(op),
        dynamic=dynamic,
    )
    assert graphs.ours() == [op]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("op", GATES)
def test_lengths_as_a_tensor(op, reverse, dynamic):
    """One graph for all lengths: no size in it hangs on them. What is padding may hold anything."""
    graphs, options = Graphs(), {"return_cell_states": True} if op == "lstm" else {}

    def run(lengths, *args):
        return getattr(functional, op)(*args, lengths=lengths, reverse=reverse, **options)

    def padded(lengths, **sizes):
        x, *rest = arguments(op, dtype=torch.float64, **sizes)
        with torch.no_grad():
            x[torch.arange(len(x))[:, None] >= lengths] = torch.nan
        return x, *rest

    compiled = torch.compile(run, fullgraph=True, backend=graphs, dynamic=dynamic)
    for numbers in ((2, 5, 1), (5, 5, 5), (1, 1, 4), (4, 3, 7, 6)) if dynamic else ((2, 5, 1),):
        lengths = torch.tensor(numbers)
        args = padded(lengths, T=max(5, *numbers), B=len(numbers))
        found, expected = (step(functools.partial(f, lengths), *args) for f in (compiled, run))
        assert len(found) == len(expected)
        for one, two in zip(found, expected, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-12)
    assert graphs.ours() == ["checked_lengths", op]


@pytest.mark.parametrize("op", GATES)
def test_lengths_out_of_range(op):
    """Found where the graph runs, and worded as in an eager call; wrong kinds as it is made."""
    run = lambda lengths, *args: getattr(functional, op)(*args, lengths=lengths)  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for f in (run, compiled):
        with pytest.raises(
            ValueError, match=rf"{op}: `lengths` must be between 1 and T = 5, got 6"
        ):
            f(torch.tensor([2, 6, 1]), *arguments(op))
    for lengths in (torch.tensor([2, 5]), torch.tensor([2.0, 5, 1]), torch.tensor([[2, 5, 1]])):
        with pytest.raises((ValueError, TypeError)) as expected:
            run(lengths, *arguments(op))
        with pytest.raises(expected.type) as found:
            torch.compile(run, backend="aot_eager")(lengths, *arguments(op))
        assert str(found.value) == str(expected.value)


def test_export_with_lengths():
    class Last(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.GRU(4, 6)

        def forward(self, x, lengths):
            return functional.gru(x, *self.layer.all_weights[0], lengths=lengths)

    model, x, lengths = Last(), torch.randn(5, 3, 4), torch.tensor([2, 5, 1])
    program = torch.export.export(model, (x, lengths)).module()
    for given in (lengths, torch.tensor([4, 1, 3])):
        torch.testing.assert_close(program(x, given), model(x, given))


def test_options_of_the_lstm():
    def run(x, w_ih, w_hh, b_ih, b_hh, h0, c0):
        return functional.lstm(x, w_ih, w_hh, b_ih, b_hh, h0, c0, return_cell_states=True)

    same(run, *arguments("lstm"))
    x, w_ih, w_hh, *_ = arguments("lstm")
    w_hr = torch.randn(2, 6, requires_grad=True)
    same(lambda *t: functional.lstm(*t[:3], w_hr=t[3]), x, w_ih, w_hh[:, :2], w_hr, dynamic=True)


ATTENTIONS = {
    "full": {},
    "causal": {"is_causal": True, "causal_alignment": "bottom-right"},
    "window": {"window": (3, None), "softcap": 2.0, "scale": 0.3},
    "slopes": {"alibi_slopes": torch.tensor([0.5, 0.25, 1.0, 2.0])},
    "sinks": {"sinks": torch.tensor([0.5, 0.25, 1.0, 2.0])},
    "mask": {"attn_mask": torch.arange(49).reshape(7, 7) % 3 > 0},
    "lse": {"return_lse": True},
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("options", ATTENTIONS.values(), ids=ATTENTIONS)
def test_attention(options, dynamic):
    _, graphs = same(
        lambda q, k, v: functional.attention(q, k, v, **options), *heads(), dynamic=dynamic
    )
    assert graphs.ours() == ["attention"]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", [name for name in ATTENTIONS if name != "lse"])
def test_attention_backward(name, dynamic, grad):
    """The gradient, and its own gradient; dout, out and lse need not be of a forward pass."""

    def run(q, k, v):
        found = functional.attention_backward(
            k.cos(), q, k, v, v.sin(), q.sum(-1), **ATTENTIONS[name]
        )
        return tuple(t for t in found if t is not None)

    compiled, graphs = same(run, *heads(grad=grad), dynamic=dynamic)
    assert set(graphs.ours()) == {"attention_backward_from_lse"}
    if dynamic:
        made = len(graphs.graphs)
        other = heads(grad=grad, B=3, S=7 if name == "mask" else 19)
        exactly(step(compiled, *other), step(run, *other))
        assert len(graphs.graphs) == made


def test_attention_of_any_length_is_one_graph():
    def run(q, k, v):
        return functional.attention(q, k, v, is_causal=True, causal_alignment="bottom-right")

    compiled, graphs = same(run, *heads(), dynamic=True)
    for S in (4, 19):
        exactly(step(compiled, *heads(S=S, B=3)), step(run, *heads(S=S, B=3)))
    assert graphs.ours() == ["attention"]  # compiled once for all


def test_scaled_dot_product_attention():
    run = functional.scaled_dot_product_attention
    same(run, *heads(), dynamic=True)
    mask = torch.randn(7, 7, requires_grad=True)
    same(run, *heads(), mask)
    same(lambda q: run(q, q[:, :2], q[:, :2], enable_gqa=True), heads()[0])


CLASSES = torch.tensor([3, 0, -100, 10, 7])
LOSSES = {
    "mean": {},
    "sum": {"reduction": "sum", "label_smoothing": 0.1, "z_loss": 0.01},
    "none": {"reduction": "none", "class_weight": torch.linspace(0.5, 1, 11)},
    "lse": {"return_lse": True},
}


def loss_arguments(N=5, grad=True):
    torch.manual_seed(0)
    return [torch.randn(shape, requires_grad=grad) for shape in ((N, 8), (11, 8), (11,))]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)
def test_linear_cross_entropy(options, dynamic, grad):
    def run(x, weight, bias, target):
        return functional.linear_cross_entropy(x, weight, target, bias, **options)

    compiled, graphs = same(run, *loss_arguments(grad=grad), CLASSES, dynamic=dynamic)
    if dynamic:
        other = [*loss_arguments(N=9, grad=grad), torch.arange(9)]
        exactly(step(compiled, *other), step(run, *other))
    assert graphs.ours() == ["linear_cross_entropy"]  # compiled once for all


def test_gradients_of_the_loss_are_made_ahead():
    """Backward has but to scale those asked for; the input without a gradient gets none."""
    x, weight, bias = loss_arguments()
    graphs = Graphs()
    run = torch.compile(functional.linear_cross_entropy, fullgraph=True, backend=graphs)
    step(run, x.detach(), weight, CLASSES, bias)
    (node,) = [n for each in graphs.graphs for n in each.graph.nodes if "ahead" in n.kwargs]
    assert list(node.kwargs["ahead"]) == [False, True, False, True, False]


def test_targets_out_of_range():
    """Found where the graph runs, and worded as in an eager call."""
    x, weight, _ = loss_arguments()
    compiled = torch.compile(functional.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    for run in (functional.linear_cross_entropy, compiled):
        run(x, weight, CLASSES)
        with pytest.raises(ValueError, match=r"`target` must be from 0 .* got 13 at \[0\]"):
            run(x, weight, CLASSES + 10)


VARLENS = {
    "causal": {"is_causal": True},
    "lse": {"return_lse": True, "window": (2, 1)},
    "used": {"seqused_k": torch.tensor([2, 4]), "sinks": torch.tensor([0.5, 0.25])},
}


def packed_heads(T=9, grad=True):
    torch.manual_seed(0)
    return [torch.randn(T, 2, 8, requires_grad=grad) for _ in range(3)]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("options", VARLENS.values(), ids=VARLENS)
def test_attention_varlen(options, dynamic, grad):
    def run(q, k, v, starts):
        return functional.attention_varlen(q, k, v, starts, **options)

    def ran(run, T, *starts):  # without the rows behind the last sequence, whose lse is -inf
        def within(*args):
            found = flat(run(*args))
            return [found[0], *(t[:, : starts[-1]] for t in found[1:])]

        return step(within, *packed_heads(T, grad), torch.tensor(starts))

    graphs = Graphs()
    compiled = torch.compile(run, fullgraph=True, backend=graphs, dynamic=dynamic)
    exactly(ran(compiled, 9, 0, 3, 8), ran(run, 9, 0, 3, 8))
    if dynamic:
        exactly(ran(compiled, 14, 0, 6, 14), ran(run, 14, 0, 6, 14))
    assert graphs.ours() == ["attention_varlen"]


def test_sequences_that_overrun():
    compiled = torch.compile(functional.attention_varlen, fullgraph=True, backend="aot_eager")
    for run in (functional.attention_varlen, compiled):
        run(*packed_heads(), torch.tensor([0, 3, 8]))
        with pytest.raises(ValueError, match=r"`cu_seqlens_q` must be from 0 on, .* up to 9 rows"):
            run(*packed_heads(), torch.tensor([0, 3, 10]))


def test_pages():
    q, k, v = packed_heads(4, grad=False)
    pages = [torch.stack([t, t * 2]) for t in (k, v)]
    places = {
        "seqused_k": torch.tensor([3, 6]),
        "block_table": torch.tensor([[1, 0], [0, 1]]),
    }

    def run(q, k, v, starts):
        return functional.attention_varlen(q, k, v, starts, **places)

    _, graphs = same(run, q, *pages, torch.tensor([0, 1, 4]), dynamic=True)
    assert graphs.ours() == ["attention_varlen"]


def test_dropout_draws_from_torchs_generator():
    q, k, v = heads()

    def run(q, k, v):
        torch.manual_seed(3)
        return functional.scaled_dot_product_attention(q, k, v, dropout_p=0.5)

    compiled = torch.compile(run, backend="aot_eager")
    exactly(step(compiled, q, k, v), step(run, q, k, v))


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_layers(name, options):
    layer = getattr(nn, name)(4, 6, **options)
    x = torch.randn(5, 3, 4, requires_grad=True)
    _, graphs = same(layer, x, dynamic=True)
    assert len(graphs.ours()) == (4 if options else 1)
    same(layer, x[0])
    layer.eval().requires_grad_(False)
    with torch.no_grad():
        layer(x)  # packs the weights, which no graph may know of
        same(layer, x.detach())


def test_dropout_between_layers():
    layer = nn.LSTM(4, 6, num_layers=2, dropout=0.5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, results = torch.randn(5, 3, 4), []
    for run in (compiled, layer):
        torch.manual_seed(3)
        results.append(step(run, x))
    exactly(*results)


@pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "LSTMCell"])
def test_layers_of_one_step(name):
    cell = getattr(nn, name)(4, 6)
    x = torch.randn(3, 4, requires_grad=True)
    hx = torch.randn(3, 6)
    same(cell, x, (hx, hx) if name == "LSTMCell" else hx, dynamic=True)
    same(lambda x: cell(x[0]), x)
    cell.eval().requires_grad_(False)
    with torch.no_grad():
        cell(x)
        same(cell, x.detach())


@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention(need_weights):
    mha = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(3, 5, 8, requires_grad=True)
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mha = mha

        def forward(self, x):
            out, weights = self.mha(x, x, x, attn_mask=mask, need_weights=need_weights)
            return (out, weights) if need_weights else out

    _, graphs = same(Model(), x, dynamic=True)
    assert graphs.ours() == ["attention"]


@torch._dynamo.config.patch(allow_rnn=False)
def test_a_layer_that_dynamo_leaves_alone_still_runs():
    """By default Dynamo breaks the graph at each RNN, GRU and LSTM: then it is an eager call."""
    gru = nn.GRU(4, 6)
    x = torch.randn(5, 3, 4, requires_grad=True)

    def run(x):
        return gru(x * 2)

    exactly(step(torch.compile(run, backend="aot_eager"), x), step(run, x))


@pytest.mark.parametrize("name", ["RNN", "LSTM"])
def test_packed_sequences_break_the_graph_and_run(name):
    layer = getattr(nn, name)(4, 6)
    compiled = torch.compile(layer, backend="aot_eager")
    x = torch.nn.utils.rnn.pack_padded_sequence(torch.randn(5, 3, 4), [5, 2, 1])
    (one, last), (two, other) = compiled(x), layer(x)
    exactly([one.data, *flat(last)], [two.data, *flat(other)])


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("op", [*GATES, "layer"])
def test_the_graph_and_its_making_are_flat_in_time(op, compiler):
    """Of a training step: a graph of the formula would grow with T, and compile for minutes."""
    run = nn.LSTM(4, 6, num_layers=2) if op == "layer" else getattr(functional, op)
    times, sizes = [], []
    for T in (4, 4, 2000):
        torch._dynamo.reset()
        args = [torch.randn(T, 3, 4)] if op == "layer" else arguments(op, T=T)
        graphs = Graphs(compiler)
        begin = time.perf_counter()
        step(torch.compile(run, fullgraph=True, backend=graphs), *args)
        times.append(time.perf_counter() - begin)
        assert graphs.ours() == (["lstm"] * 2 if op == "layer" else [op])
        sizes.append(len(graphs.graphs[0].graph.nodes))
    assert sizes[0] == sizes[2] < 60
    assert times[2] < 3 * max(times[:2]) + 1


INDUCED = [*GATES, "gru_cell", "lstm_cell", "attention", "scaled_dot_product_attention"]
INDUCED += ["attention_backward", "attention_varlen", "linear_cross_entropy"]


@pytest.mark.parametrize("op", INDUCED)
def test_inductor(op):
    """The compiler that torch.compile takes by default, forward and backward."""
    run, args = getattr(functional, op), arguments(op) if op in GATES else heads()
    if op.endswith("_cell"):
        args = arguments(op.removesuffix("_cell"))
        run = lambda x, *rest: getattr(functional, op)(x[0], hx(rest[4:]), *rest[:4])  # noqa: E731
        hx = lambda states: states[0] if len(states) == 1 else tuple(states)  # noqa: E731
    elif op == "attention_backward":
        args = heads(torch.float64)

        def run(q, k, v):
            made = functional.attention(q, k, v, return_lse=True)
            return functional.attention_backward(k.cos(), q, k, v, *made)[:3]

    elif op == "attention_varlen":
        args = packed_heads()
        run = lambda *args: functional.attention_varlen(*args, torch.tensor([0, 3, 8]))  # noqa: E731
    elif op == "linear_cross_entropy":
        args = loss_arguments()
        run = lambda x, w, b: functional.linear_cross_entropy(x, w, CLASSES, b)  # noqa: E731

    def around(*args):
        return [t.sin() * 2 for t in flat(run(*(t * 1.5 for t in args)))]

    compiled = torch.compile(around, fullgraph=True)
    for one, two in zip(step(compiled, *args), step(around, *args), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
        assert one.any()


def test_inductor_on_a_layer_of_any_size():
    layer = nn.LSTM(4, 6, num_layers=2, bidirectional=True)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for T, B in ((5, 3), (2, 7)):
        x = torch.randn(T, B, 4, requires_grad=True)
        for one, two in zip(step(compiled, x), step(layer, x), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op", [*GATES, "attention"])
def test_backend_is_in_the_graph(op):
    run, args = getattr(functional, op), heads() if op == "attention" else arguments(op)
    graphs = Graphs()
    with use_backend("reference"):
        torch.compile(run, fullgraph=True, backend=graphs)(*args)
    torch.compile(lambda *a: run(*a, backend="cpp"), fullgraph=True, backend=graphs)(*args)
    nodes = [node for graph in graphs.graphs for node in graph.graph.nodes]
    chosen = [node.kwargs["backend"] for node in nodes if "backend" in node.kwargs]
    assert chosen == ["reference", "cpp"]
    made_by = {node.kwargs["version"] for node in nodes if "backend" in node.kwargs}
    assert made_by == {pykernels.__version__}  # by which graphs on disk are told apart


OPCHECKS = ["test_schema", "test_autograd_registration", "test_faketensor"]


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize(
    "name",
    [
        "rnn-plain",
        "rnn-bare",
        "rnn-ragged",
        "gru-plain",
        "lstm-plain",
        "lstm-cells",
        "attention-plain",
        "attention-sinks",
        "attention_backward-plain",
        "attention_backward-sinks",
        "attention_varlen-causal",
        "attention_varlen-used",
        "linear_cross_entropy-plain",
        "linear_cross_entropy-all-none",
        "linear_cross_entropy-all-mean",
    ],
)
def test_opcheck(name, backend):
    """torch's own checks of a registration: schema, sizes, gradient, dynamic sizes.

    They compare all results of two runs, so no tensor kept for backward may have room to spare,
    which nothing fills: layers have as many units as the kernels take at once.
    """
    op, _, which = name.partition("-")
    spec = specs.find(f"attention-{which}" if op == "attention_backward" else name)
    if op in GATES and spec.lengths is None:
        spec = dataclasses.replace(spec, t=3, h=16)  # a graph of the formula grows with t
    seen = []

    class See(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "pykernels":
                seen.append((func, args, kwargs))
            return func(*args, **(kwargs or {}))

    inputs = spec.inputs(torch.float64)
    for name, t in inputs.items():
        t.requires_grad_(t.is_floating_point() and name != "class_weight")
    run = functools.partial(getattr(functional, op), **spec.options, backend="cpp")
    if op == "attention_backward":
        out, lse = functional.attention(**inputs, return_lse=True)
        run = functools.partial(functional.attention_backward, out.cos(), out=out, lse=lse)
        run = functools.partial(run, backend="cpp")
    with See():
        outputs = flat(run(**inputs))
        sum(t.sum() for t in outputs if t.requires_grad).backward()
    name = "attention_backward_from_lse" if op == "attention_backward" else op
    assert [func._opname for func, *_ in seen] == [name, f"{name}_backward"]
    for func, args, kwargs in seen:
        args = [t if t is None else t.detach().requires_grad_(t.requires_grad) for t in args]
        # A graph holds the same whichever backend runs in it, so one backend's is traced.
        tests = [*OPCHECKS, "test_aot_dispatch_dynamic"] if backend == "cpp" else OPCHECKS
        opcheck(func, tuple(args), {**kwargs, "backend": backend}, test_utils=tests)


def test_opcheck_of_gradients_made_ahead():
    x, weight, bias = (t.detach().double().requires_grad_() for t in loss_arguments())
    op = torch.ops.pykernels.linear_cross_entropy.default
    options = {"ignore_index": -100, "reduction": "mean", "label_smoothing": 0.1, "z_loss": 0.1}
    options |= {"return_lse": False, "return_argmax": False, "keep": True}
    for backend in ("reference", "cpp"):
        made = {"ahead": [True, True, False, True, False], "backend": backend}
        opcheck(op, (x, weight, CLASSES, bias, None), options | made)


class Model(torch.nn.Module):
    """A layer of every kind."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.RNN(4, 6)
        self.gru = nn.GRU(6, 6, bidirectional=True)
        self.lstm = nn.LSTM(12, 8, num_layers=2)
        self.mha = nn.MultiheadAttention(8, 2)
        self.cells = torch.nn.ModuleList([nn.RNNCell(8, 8), nn.GRUCell(8, 8)])
        self.cell = nn.LSTMCell(8, 6)
        self.loss = nn.LinearCrossEntropyLoss(6, 11)

    def forward(self, x):
        x = self.lstm(self.gru(self.rnn(x)[0])[0])[0]
        x, _ = self.mha(x, x, x, need_weights=False)
        rows = x[0].reshape(-1, 2, 4)
        starts = torch.tensor([0, 1, 2])
        x = x + functional.attention_varlen(rows, rows, rows, starts).reshape(x[0].shape)
        last = x[-1]
        for cell in self.cells:
            last = cell(last, x[0])
        h, c = self.cell(last)
        return h, c, self.loss(h, torch.zeros(h.shape[0], dtype=torch.int64))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_every_layer_in_training(compiler, dynamic):
    """One graph of a model with all kinds of layers, for any sizes where they are dynamic."""
    model, graphs, made = Model(), Graphs(compiler), []
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=graphs)
    for T, B in ((5, 3), (8, 4)) if dynamic else ((5, 3),):
        x = torch.randn(T, B, 4, requires_grad=True)
        for one, two in zip(step(compiled, x), step(model, x), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
        made.append(len(graphs.graphs))
    assert made[-1] == made[0]  # Dynamo may begin a graph anew before it is through
    kinds = {"rnn", "gru", "lstm", "attention", "attention_varlen", "linear_cross_entropy"}
    assert set(graphs.ours()) == kinds


@pytest.mark.parametrize("dynamic", [False, True])
def test_export(dynamic):
    """Export, save, load and run."""
    model, x = Model().eval(), torch.randn(5, 3, 4)
    sizes = ({0: torch.export.Dim("T"), 1: torch.export.Dim("B")},) if dynamic else None
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (x,), dynamic_shapes=sizes), file)
    file.seek(0)
    program = torch.export.load(file)
    names = [str(n.target) for n in program.graph.nodes if str(n.target).startswith("pykernels.")]
    assert sorted(names) == sorted(
        f"pykernels.{op}.default"
        for op in (
            *["rnn"] * 2,
            *["gru"] * 3,
            *["lstm"] * 3,
            "attention",
            "attention_varlen",
            "linear_cross_entropy",
        )
    )
    for given in (x, torch.randn(11, 2, 4)) if dynamic else (x,):
        exactly(flat(program.module()(given)), flat(model(given)))


RUN = """
import sys
import torch
import pykernels
program = torch.export.load(sys.argv[1] + "/program.pt2")
torch.save(program.module()(torch.load(sys.argv[1] + "/x")), sys.argv[1] + "/found")
"""


def test_export_of_a_window_by_the_length():
    class Local(torch.nn.Module):
        def forward(self, q):
            return functional.attention(q, q, q, window=(q.shape[2] // 2, None))

    length = {"q": {2: torch.export.Dim("S", min=2, max=64)}}
    program = torch.export.export(
        Local(), (torch.randn(1, 2, 8, 4),), dynamic_shapes=length, strict=False
    )
    q = torch.randn(1, 2, 9, 4)
    torch.testing.assert_close(program.module()(q), Local()(q))


def test_export_runs_in_a_fresh_process(tmp_path):
    """Which knows nothing of the model, and has pykernels for its operators alone."""
    model, x = Model().eval(), torch.randn(5, 3, 4)
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "program.pt2")
    torch.save(x, tmp_path / "x")
    subprocess.run([sys.executable, "-c", RUN, os.fspath(tmp_path)], check=True)
    exactly(torch.load(tmp_path / "found"), flat(model(x)))


KEPT = """
import sys
import torch
from pykernels import _backends, functional
torch._dynamo.config.allow_rnn = True
assert _backends.isa() == sys.argv[1]
for op, gates in (("gru", 3), ("lstm", 4)):
    generator = torch.Generator().manual_seed(0)
    shapes = (5, 3, 4), (gates * 5, 4), (gates * 5, 5)
    args = [torch.randn(s, generator=generator, requires_grad=True) for s in shapes]
    run = getattr(functional, op)
    grads = [
        torch.autograd.grad(f(*args)[0].sin().sum(), args)
        for f in (run, torch.compile(run, fullgraph=True))
    ]
    torch.testing.assert_close(*grads)
print(dict(torch._dynamo.utils.counters["aot_autograd"]))
"""


def test_graphs_on_disk_run_on_another_build(tmp_path):
    """Kept by a process that runs one instruction set, a graph serves one that runs another."""
    sets = [isa for isa in _backends.ISAS if runs(isa)]
    if len(sets) < 2:
        pytest.skip("one instruction set runs here")
    said = []
    for isa in sets:
        around = os.environ | {"PYKERNELS_ISA": isa, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        around |= {"TORCHINDUCTOR_FX_GRAPH_CACHE": "1", "TORCHINDUCTOR_AUTOGRAD_CACHE": "1"}
        command = [sys.executable, "-c", KEPT, isa]
        done = subprocess.run(command, env=around, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert "autograd_cache_hit" not in said[0]
    assert all("'autograd_cache_hit': 2" in each for each in said[1:]), said


def runs(isa):
    """Whether there is a build for an instruction set, and the processor runs it."""
    if importlib.util.find_spec(f"pykernels._C_{isa}") is None:
        return False
    return importlib.import_module("pykernels._C_baseline").cpu_runs(isa)


@pytest.mark.parametrize("op", GATES)
def test_sizes_of_weights_may_be_dynamic(op):
    """One graph for any number of units: what is kept for backward has a size by formula."""
    graphs, run = Graphs(), getattr(functional, op)
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=graphs)
    for H in (6, 7, 20):
        args = arguments(op, H=H)
        exactly(step(compiled, *args), step(run, *args))
    assert len(graphs.graphs) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("training", [False, True])
def test_trace(training):
    """torch.jit.trace: an operator in the graph, saved and loaded, right for other sizes."""
    model = Traced().train(training)
    x = torch.randn(5, 3, 8)
    with torch.set_grad_enabled(training):
        traced = torch.jit.trace(model, x)
    kinds = {n.kind() for n in traced.inlined_graph.nodes() if n.kind().startswith("pykernels")}
    assert kinds == {"pykernels::rnn", "pykernels::gru", "pykernels::lstm"}
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    for given in (x, torch.randn(9, 2, 8)):
        given.requires_grad_()
        torch.testing.assert_close(step(traced, given), step(model, given))
        torch.testing.assert_close(torch.jit.load(file)(given), model(given))
        file.seek(0)


class Traced(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.gru, self.lstm = nn.RNN(8, 8), nn.GRU(8, 8, 2), nn.LSTM(8, 8)
        self.attention, self.cell = nn.MultiheadAttention(8, 2), nn.LSTMCell(8, 8)

    def forward(self, x):
        for layer in (self.rnn, self.gru, self.lstm):
            x, _ = layer(x)
        x, _ = self.attention(x, x, x, need_weights=False)
        return self.cell(x[-1])


@pytest.mark.parametrize("name", ["LSTM", "GRUCell", "MultiheadAttention"])
def test_autocast(name):
    """The same dtypes and bits as in an eager call, autocast around the graph or in it."""
    layer = getattr(nn, name)(*((8, 2) if name == "MultiheadAttention" else (8, 6)))
    x = torch.randn(*((3,) if name == "GRUCell" else (5, 3)), 8)

    def run(x):
        found = layer(x, x, x)[0] if name == "MultiheadAttention" else layer(x)
        return flat(found)

    def inside(x):
        with torch.autocast("cpu", torch.bfloat16):
            return run(x)

    expected = inside(x)
    dtype = torch.float32 if name == "GRUCell" else torch.bfloat16
    assert all(t.dtype == dtype for t in expected)
    exactly(torch.compile(inside, fullgraph=True, backend="aot_eager")(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        exactly(torch.compile(run, fullgraph=True, backend="aot_eager")(x), expected)


@pytest.mark.parametrize("run", BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_input(run):
    """Compiled, the error is that of the eager call; where no break is allowed, it is quoted."""
    x = torch.randn(5, 3, 4)
    with pytest.raises((ValueError, TypeError)) as expected:
        run(x)
    with pytest.raises(expected.type) as found:
        torch.compile(run, backend="aot_eager")(x)
    assert str(found.value) == str(expected.value)
    torch._dynamo.reset()
    with pytest.raises((expected.type, torch._dynamo.exc.Unsupported)) as quoted:
        torch.compile(run, backend="aot_eager", fullgraph=True)(x)
    assert str(expected.value)[:20] in str(quoted.value)
