"""Which spec runs where and at which dtype, and the test bodies that all ops share."""

import dataclasses
import functools
import math
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import strategies as st

from pykernels import _backends, functional, nn
from pykernels.testing import evaluate, specs
from pykernels.testing.specs import HUGE_STRIDE

# T, B, I, H of drawn recurrent specs. I and H not from one: the few numbers of a tiny tensor may
# all nearly cancel, and the rule bounds the error by their size; with H = 1 in float32 the C++
# kernels break it at some seeds, and at fewer the reference. The named specs have sizes of one.
RECURRENT_SIZES = st.tuples(
    st.integers(1, 12), st.integers(1, 20), st.integers(4, 40), st.integers(8, 70)
)

ALL = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
EXACT = (torch.float32, torch.float64)

# On a GPU every spec runs; in the interpreter, hundreds of times slower, those that are tagged
# small.
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = {"triton": "cpu" if INTERPRETING else "cuda"}


def device(backend):
    return DEVICE.get(backend, "cpu")


def dtypes(spec, backend):
    """The dtypes at which a spec runs on a backend, () if it does not."""
    tags = spec.tags
    if backend == "triton" and not _backends.has(backend, spec.op):
        return ()
    if "bench" in tags:
        # Large, and of no other code path: once is enough, and where the reference's float64 scores
        # take a quarter of a gigabyte each, the benchmark's own check is.
        sizes = spec.sizes
        scores = math.prod(sizes.get(axis, 1) for axis in ("B", "N", "S_q", "S_k", "V"))
        once = backend == "cpp" and "quick" in tags and scores <= 2**23
        return (torch.float32,) if once else ()
    if backend == "triton" and INTERPRETING and "interpreter" not in tags:
        return ()
    if getattr(spec, "nonlinearity", None) == "relu":
        # relu' jumps at 0, and 16 bits do not tell on which side of it a small number was
        return EXACT
    if backend == "triton" and INTERPRETING:
        return ALL if "gradcheck" in tags else (torch.float32,)
    if backend == "reference" and getattr(spec, "gain", 1.0) > 1:
        # The naive formula rounds the scores to the dtype; 16 bits hold no score of size 50.
        return EXACT
    return ALL


def cases(*selected):
    """Parameters (spec, backend, dtype) of a test."""
    return [
        pytest.param(spec, backend, dtype, id=f"{spec.name}-{backend}-{str(dtype)[6:]}")
        for spec in selected
        for backend in ("reference", "cpp", "triton")
        for dtype in dtypes(spec, backend)
    ]


def gradcheck_cases(selected, interpreted):
    """Parameters (spec, backend): all specs tagged "gradcheck" on cpp, and on triton.

    In the interpreter, where one takes seconds, those named in `interpreted` do.
    """
    return [
        pytest.param(spec, backend, id=f"{spec.name}-{backend}")
        for spec in specs.tagged(selected, "gradcheck")
        for backend in ("cpp", "triton")
        if _backends.has(backend, spec.op)
        if backend == "cpp" or not INTERPRETING or spec.name in interpreted
    ]


def some(reference_and_cpp, triton=()):
    """Parameters (spec, backend) by names of specs; the interpreter, being slow, takes its own."""
    return [
        pytest.param(specs.find(name), backend, id=f"{name}-{backend}")
        for backend, chosen in (
            ("reference", reference_and_cpp),
            ("cpp", reference_and_cpp),
            ("triton", triton if INTERPRETING else reference_and_cpp),
        )
        for name in chosen
    ]


def need(spec, backend, dtype):
    """Skip where a backend says that it cannot serve; test_backends.py holds what each must."""
    where = device(backend)
    if reason := _backends.refusal(backend, spec.op, where, dtype, spec.features(dtype)):
        pytest.skip(f"{backend}: {reason}")
    if spec.layout == "huge":
        try:
            torch.UntypedStorage(2 * HUGE_STRIDE * dtype.itemsize, device=where)
        except RuntimeError as error:
            pytest.skip(f"the memory is too small: {error}")


def check(spec, backend, dtype, **options):
    """Outputs and all gradients, under random upstream gradients, by the tolerance rule.

    The reference in float64 is the truth itself, and has stock torch to agree with.
    """
    need(spec, backend, dtype)
    if (backend, dtype) == ("reference", torch.float64) and not options:
        return evaluate.check_truth(spec, device(backend))
    evaluate.check(spec, dtype, backend, device(backend), **options)


def leaves(spec, dtype, backend, needing=None):
    """Inputs as leaves; those named in `needing` (default: all floating ones) need a gradient."""
    made = spec.inputs(dtype, device(backend))
    differentiable = evaluate.differentiable(spec, made)
    for name, t in made.items():
        t.requires_grad_(name in differentiable and (needing is None or name in needing))
    return made


def call(spec, inputs, backend):
    """functional.<op> of the spec on the given inputs -> its outputs, in one tuple."""
    options = spec.options | ({"return_lse": True} if spec.op.startswith("attention") else {})
    return evaluate.flat(getattr(functional, spec.op)(**inputs, **options, backend=backend))


def repeats_bitwise(spec, backend, dtype):
    """The same inputs and threads give the same bits, outputs and gradients."""
    need(spec, backend, dtype)
    first = evaluate.ours(spec, dtype, backend, device(backend))
    second = evaluate.ours(spec, dtype, backend, device(backend))
    same_bits(first, second)


def same_bits(first, second):
    """Two results by name are bitwise equal."""
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(bits(first[name]), bits(second[name])), f"{name} differs"


def bits(t):
    return t.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def gradient_alone(spec, backend):
    """Each gradient asked for alone, and from each output alone, is what it is among all."""
    dtype = torch.float64
    need(spec, backend, dtype)
    inputs = leaves(spec, dtype, backend)
    outputs = call(spec, inputs, backend)
    wanted = {name: t for name, t in inputs.items() if t.requires_grad}
    upstream = [torch.randn_like(out) for out in outputs]
    every = range(len(outputs))
    for used in (*((i,) for i in every), every):
        together = torch.autograd.grad(
            [outputs[i] for i in used],
            list(wanted.values()),
            [upstream[i] for i in used],
            retain_graph=True,
            materialize_grads=True,
        )
        for (name, _), whole in zip(wanted.items(), together, strict=True):
            one = leaves(spec, dtype, backend, {name})
            outs = call(spec, one, backend)
            (grad,) = torch.autograd.grad(
                [outs[i] for i in used],
                [one[name]],
                [upstream[i] for i in used],
                materialize_grads=True,
            )
            torch.testing.assert_close(
                grad, whole, rtol=1e-13, atol=1e-13, msg=lambda m, n=name: f"d{n}: {m}"
            )


def leaves_inputs_alone(spec, backend):
    """No pass writes to what it was given or gave before; a second backward gives the same."""
    dtype = torch.float32
    need(spec, backend, dtype)
    inputs = leaves(spec, dtype, backend)
    before = {name: t.detach().clone() for name, t in inputs.items()}
    outputs = call(spec, inputs, backend)
    kept = [out.detach().clone() for out in outputs]
    upstream = [torch.randn_like(out) for out in outputs]
    sent = [d.clone() for d in upstream]
    wanted = [t for t in inputs.values() if t.requires_grad]
    grads = [
        torch.autograd.grad(outputs, wanted, upstream, retain_graph=True, materialize_grads=True)
        for _ in range(2)
    ]
    for name, t in inputs.items():
        assert torch.equal(t.detach(), before[name]), f"{name} was written to"
    for now, then in zip((*outputs, *upstream), (*kept, *sent), strict=True):
        assert torch.equal(bits(now.detach()), bits(then))
    for one, two in zip(*grads, strict=True):
        assert torch.equal(bits(one), bits(two))


def without_gradients(spec, backend):
    """no_grad and inference_mode take another road to the same numbers."""
    dtype = torch.float32
    need(spec, backend, dtype)
    inputs = leaves(spec, dtype, backend)
    expected = call(spec, inputs, backend)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            for out, want in zip(call(spec, inputs, backend), expected, strict=True):
                assert not out.requires_grad
                assert torch.equal(bits(out), bits(want.detach()))


def gradcheck(spec, backend, check=torch.autograd.gradcheck):
    """Analytic against numerical derivatives, in float64, through the real Function."""
    need(spec, backend, torch.float64)
    inputs = leaves(spec, torch.float64, backend)
    names = [name for name, t in inputs.items() if t.requires_grad]

    def op(*tensors):
        torch.manual_seed(0)  # of dropout
        outputs = call(spec, inputs | dict(zip(names, tensors, strict=True)), backend)
        # lse is -inf in a row that sees no key, and has no numerical derivative there
        return tuple(out.masked_fill(out == -torch.inf, 0) for out in outputs)

    # One random direction instead of every element: in the interpreter, which is slow, and of the
    # reference, whose second derivative is the one that the C++ kernels' is made of.
    fast = backend == "reference" or (backend == "triton" and INTERPRETING)
    assert check(op, [inputs[name] for name in names], fast_mode=fast)


def rejects_mutants(spec, monkeypatch, mutants):
    """`check` fails for each mutant of the reference: (name of a function, wrong version of it)."""
    dtype = torch.float32
    module = _backends.module("reference", spec.op)
    evaluate.check(spec, dtype, "reference")  # keeps truth and stock, which no mutant may touch
    for name, wrong in mutants:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, functools.partial(wrong, getattr(module, name)))
            with pytest.raises(AssertionError, match="exceeds"):
                evaluate.check(spec, dtype, "reference")


def saved_bytes(spec, backend, dtype):
    """Bytes that autograd keeps between the passes beyond the inputs' own storages, by storage."""
    inputs = leaves(spec, dtype, backend)
    own = {t.untyped_storage().data_ptr() for t in inputs.values()}
    kept = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = call(spec, inputs, backend)
    return sum(kept.values()), outputs


def concurrently(spec, backend, dtype, workers=4, repeats=3):
    """Calls from several Python threads at once, as the kernels release the GIL, stay apart."""
    need(spec, backend, dtype)
    alone = [evaluate.ours(spec, dtype, backend, device(backend), seed) for seed in range(workers)]
    with ThreadPoolExecutor(workers) as pool:
        for _ in range(repeats):
            together = list(
                pool.map(
                    lambda seed: evaluate.ours(spec, dtype, backend, device(backend), seed),
                    range(workers),
                )
            )
            for one, other in zip(alone, together, strict=True):
                same_bits(one, other)


def scaled_gradient(index, factor):
    """A mutant of a backward pass: one gradient times `factor`."""

    def wrong(run, *args, **options):
        grads = list(run(*args, **options))
        grads[index] = grads[index] * factor
        return tuple(grads)

    return wrong


def forget(index):
    """A mutant of a backward pass: one upstream gradient is not looked at."""

    def wrong(run, saved, grads, **options):
        grads = [None if i == index else grad for i, grad in enumerate(grads)]
        return run(saved, grads, **options)

    return wrong


# --- the recurrent family


def states(made):
    """The names of the first states among the inputs of a spec."""
    return [name for name in ("h0", "c0") if name in made]


def last_states_are_copies(spec, backend):
    """h_n is the last of y, and c_n that of c where they are asked for, in memory of their own."""
    need(spec, backend, torch.float32)
    y, h_n, *cells = call(spec, spec.inputs(torch.float32, device(backend)), backend)
    pairs = [(h_n, y), *([(cells[0], cells[1])] if len(cells) == 2 else [])]
    for last, every in pairs:
        assert torch.equal(last, every[0 if spec.reverse else -1])
        assert last.untyped_storage().data_ptr() != every.untyped_storage().data_ptr()


def nan_stays_in_its_row_and_shows(spec, backend):
    """A NaN input is neither hidden by a nonlinearity nor spread to other sequences."""
    need(spec, backend, torch.float32)
    inputs = spec.inputs(torch.float32, device(backend))
    clean, *_ = call(spec, inputs, backend)
    inputs["x"][2, 1, 3] = torch.nan
    y, *last = call(spec, inputs, backend)
    others = [b for b in range(spec.b) if b != 1]
    assert y[2:, 1].isnan().all()
    assert all(state[1].isnan().all() for state in last)
    assert torch.equal(y[:, others], clean[:, others])
    assert torch.equal(y[:2], clean[:2])


def cell_is_one_step(spec, backend):
    """The cell is a sequence of one step, batched or not, and None stands for zero states."""
    need(spec, backend, torch.float32)
    made = spec.inputs(torch.float32, device(backend))
    weights = [made[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh")]
    cell = functools.partial(getattr(functional, f"{spec.op}_cell"), backend=backend)
    before = [made[name] for name in states(made)]

    def step(x, before):
        hx = None if before is None else before[0] if len(before) == 1 else tuple(before)
        return evaluate.flat(cell(x, hx, *weights))

    _, *last = call(spec, made, backend)
    after = step(made["x"][0], before)
    assert len(after) == len(last)
    for one, two in zip(after, last, strict=True):
        assert torch.equal(one, two)
    for one, two in zip(step(made["x"][0, 1], [t[1] for t in before]), last, strict=True):
        torch.testing.assert_close(one, two[1], rtol=1e-6, atol=1e-6)
    zeros = step(made["x"][0], [torch.zeros_like(t) for t in before])
    for one, two in zip(step(made["x"][0], None), zeros, strict=True):
        assert torch.equal(one, two)


def cell_gradients(spec, backend):
    """Those of a sequence of one step."""
    need(spec, backend, torch.float64)
    made = leaves(spec, torch.float64, backend)
    weights = [made[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh")]
    before = tuple(made[name] for name in states(made))
    cell = getattr(functional, f"{spec.op}_cell")
    hx = before[0] if len(before) == 1 else before
    after = evaluate.flat(cell(made["x"][0], hx, *weights, backend=backend))
    _, *last = call(spec, made, backend)
    upstream = [torch.randn_like(t) for t in after]
    ours = torch.autograd.grad(after, list(made.values()), upstream)
    for one, two in zip(
        ours, torch.autograd.grad(last, list(made.values()), upstream), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-13)


def gradient_penalty_is_torchs(spec, backend, stock):
    """A penalty on a gradient does not lose its own gradient in silence."""
    need(spec, backend, torch.float64)
    results = []
    for op in (functools.partial(getattr(functional, spec.op), backend=backend), stock):
        inputs = leaves(spec, torch.float64, backend)
        with torch.backends.cudnn.flags(enabled=False):  # it has no second derivatives
            y, *last = evaluate.flat(op(**inputs, **spec.options))
        loss = (y.sum(0) * last[0] * last[-1].sum()).sum()
        (dx,) = torch.autograd.grad(loss, inputs["x"], create_graph=True)
        penalised = y.sum() + dx.square().sum()
        results.append(torch.autograd.grad(penalised, list(inputs.values())))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-10)


def in_pieces(spec, backend):
    """The last states of one piece are the first of the next: values and gradients of the whole."""
    need(spec, backend, torch.float64)
    made = leaves(spec, torch.float64, backend)
    names = states(made)
    whole, *last = call(spec, made, backend)
    now, pieces = [made[name] for name in names], []
    for x in made["x"].split(37):
        y, *now = call(spec, {**made, "x": x, **dict(zip(names, now, strict=True))}, backend)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-12, atol=1e-13)
    for one, two in zip(now, last, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-13)
    sums = [sum(t.sum() for t in found) for found in (last, now)]
    grads = [torch.autograd.grad(total, list(made.values())) for total in sums]
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-13)


def reverse_is_a_flip_of_time(spec, backend):
    need(spec, backend, torch.float32)
    made = spec.inputs(torch.float32, device(backend))
    y, *last = call(spec, made, backend)
    forward = dataclasses.replace(spec, reverse=not spec.reverse)
    flipped, *same = call(forward, {**made, "x": made["x"].flip(0)}, backend)
    assert torch.equal(bits(y), bits(flipped.flip(0)))
    for one, two in zip(last, same, strict=True):
        assert torch.equal(one, two)


def padding_does_not_matter(spec, backend):
    """NaN after the end of a sequence reaches nothing, and its gradient is zero."""
    dtype = torch.float64
    need(spec, backend, dtype)
    past = torch.arange(spec.t)[:, None] >= torch.tensor(spec.lengths)  # [T, B]
    past = past.to(device(backend))
    results = []
    for fill in (0.0, torch.nan):
        made = spec.inputs(dtype, device(backend))
        made["x"] = made["x"].masked_fill(past[..., None], fill)
        made = {name: t.requires_grad_() for name, t in made.items()}
        outputs = call(spec, made, backend)
        generator = torch.Generator().manual_seed(1)
        upstream = [torch.randn(t.shape, generator=generator, dtype=dtype) for t in outputs]
        upstream = [t.to(device(backend)) for t in upstream]
        results.append((*outputs, *torch.autograd.grad(outputs, list(made.values()), upstream)))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
    y, dx = results[0][0], results[0][len(outputs)]
    assert (y[past] == 0).all()
    assert (dx[past] == 0).all()
    assert all(t.isfinite().all() for t in results[1])


def each_alone(spec, backend):
    """A ragged batch is its sequences one by one."""
    need(spec, backend, torch.float64)
    made = spec.inputs(torch.float64, device(backend))
    outputs = call(spec, made, backend)
    whole = dataclasses.replace(spec, lengths=None)
    for b, length in enumerate(spec.lengths):
        one = {**made, "x": made["x"][:length, b : b + 1]}
        one |= {name: made[name][b : b + 1] for name in states(made)}
        for name, many, alone in zip(spec.outputs, outputs, call(whole, one, backend), strict=True):
            many = many[:length, b : b + 1] if name in ("y", "c") else many[b : b + 1]
            torch.testing.assert_close(many, alone, rtol=1e-12, atol=1e-13)


def packed_rows(spec, backend):
    """The rows of a PackedSequence with batch_sizes: as a list, a tuple and a tensor."""
    need(spec, backend, torch.float64)
    made = spec.inputs(torch.float64, device(backend))
    lengths = torch.tensor(spec.lengths)
    packed = torch.nn.utils.rnn.pack_padded_sequence(made["x"], lengths, enforce_sorted=False)
    order = packed.sorted_indices
    rows = {**made, "x": packed.data} | {name: made[name][order] for name in states(made)}
    options = {name: value for name, value in spec.options.items() if name != "lengths"}
    outputs = call(spec, made, backend)
    for kind in (list, tuple, torch.tensor):
        sizes = kind(packed.batch_sizes.tolist())
        op = functools.partial(getattr(functional, spec.op), **options, backend=backend)
        found = evaluate.flat(op(**rows, batch_sizes=sizes))
        for name, one, two in zip(spec.outputs, found, outputs, strict=True):
            if name in ("y", "c"):
                padded = packed._replace(data=one)
                one, _ = torch.nn.utils.rnn.pad_packed_sequence(padded, total_length=spec.t)
            else:
                one = one[packed.unsorted_indices]
            # sequences of one length may come in another order: the same rows, other products
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-13)


def lengths_in_any_form(spec, backend):
    """A list, a tuple and a tensor are the same lengths; all steps of all is no lengths."""
    need(spec, backend, torch.float32)
    made = spec.inputs(torch.float32, device(backend))
    for kind in (list, tuple, torch.tensor):
        other = dataclasses.replace(spec, lengths=kind(spec.lengths))
        for one, two in zip(call(other, made, backend), call(spec, made, backend), strict=True):
            assert torch.equal(one, two)
    full = dataclasses.replace(spec, lengths=(spec.t,) * spec.b)
    none = dataclasses.replace(spec, lengths=None)
    for one, two in zip(call(full, made, backend), call(none, made, backend), strict=True):
        assert torch.equal(one, two)


def recurrent_mutants(op, tensors, outputs):
    """Zeros or a stale state for an output, a gradient gone or off by 0.1 %, one not looked at."""

    def zero(index):
        def wrong(run, *args, **options):
            found, saved = run(*args, **options)
            return tuple(t * (i != index) for i, t in enumerate(found)), saved

        return wrong

    def stale(run, *args, **options):
        (y, h_n, *rest), saved = run(*args, **options)
        return (y, y[0, : len(h_n)].clone(), *rest), saved

    mutants = [(f"{op}_fwd", zero(i)) for i in range(outputs)] + [(f"{op}_fwd", stale)]
    for i in range(tensors):
        mutants += [(f"{op}_bwd", scaled_gradient(i, factor)) for factor in (0.0, 1.001)]
    return mutants + [(f"{op}_bwd", forget(i)) for i in range(outputs)]


# --- what compilers and transforms are given


def flat_tensors(value):
    """The tensors of any nested result."""
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]


Z = torch.zeros
LAYERS = {name: getattr(nn, name)(5, 5) for name in nn.__all__}
#: A wrong call of every function of `functional`, of a random x [5, 3, 4], and of every layer.
BAD_CALLS = {
    "rnn": lambda x: functional.rnn(x, x[0], x[0]),
    "rnn_cell": lambda x: functional.rnn_cell(x[0], None, Z(6, 4), Z(6, 5)),
    "gru": lambda x: functional.gru(x, Z(9, 4), Z(9, 4)),
    "gru_cell": lambda x: functional.gru_cell(x[0], x[1], Z(9, 4), Z(9, 3)),
    "lstm": lambda x: functional.lstm(x.long(), Z(12, 4), Z(12, 3)),
    "lstm_cell": lambda x: functional.lstm_cell(x, None, Z(12, 4), Z(12, 3)),
    "attention": lambda x: functional.attention(x, x, x),
    "attention_backward": lambda x: functional.attention_backward(*[x[None]] * 5, x),
    "attention_varlen": lambda x: functional.attention_varlen(x, x, x, Z(2)),
    "scaled_dot_product_attention": lambda x: functional.scaled_dot_product_attention(
        x, x, x[:, :2]
    ),
    "linear_cross_entropy": lambda x: functional.linear_cross_entropy(x, Z(7, 5), x[..., 0].long()),
    "RNN": lambda x: LAYERS["RNN"](x),
    "GRU": lambda x: LAYERS["GRU"](x[0, 0]),
    "LSTM": lambda x: LAYERS["LSTM"](x.repeat(1, 1, 2)[..., :5], x),
    "RNNCell": lambda x: LAYERS["RNNCell"](x),
    "GRUCell": lambda x: LAYERS["GRUCell"](x[0]),
    "LSTMCell": lambda x: LAYERS["LSTMCell"](x[0], x[0]),
    "MultiheadAttention": lambda x: LAYERS["MultiheadAttention"](x, x, x),
    "LinearCrossEntropyLoss": lambda x: LAYERS["LinearCrossEntropyLoss"](x, x[..., 0]),
    "mask": lambda x: functional.attention(x[None], x[None], x[None], Z(9, 9)),
    "backend": lambda x: functional.rnn(x, x[0], Z(3, 3), backend="metal"),
    "device": lambda x: functional.attention(x[None], x[None], x[None].to("meta")),
}
assert set(BAD_CALLS) >= {name for name in functional.__all__ if name.islower()} | {*nn.__all__}
