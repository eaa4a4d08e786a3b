"""Which spec runs where and at which dtype, and the test bodies that all ops share."""

import functools
import math
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pykernels import _backends, functional
from pykernels.testing import evaluate, specs
from pykernels.testing.specs import HUGE_STRIDE

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
    if "bench" in tags:
        # Large, and of no other code path: once is enough, and where the reference's float64 scores
        # take a quarter of a gigabyte each, the benchmark's own check is.
        sizes = spec.sizes
        scores = math.prod(sizes.get(axis, 1) for axis in ("B", "N", "S_q", "S_k"))
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
            torch.UntypedStorage(2 * HUGE_STRIDE * dtype.itemsize)
        except RuntimeError as error:
            pytest.skip(f"the address space is too small: {error}")


def check(spec, backend, dtype):
    """Outputs and all gradients, under random upstream gradients, by the tolerance rule."""
    need(spec, backend, dtype)
    evaluate.check(spec, dtype, backend, device(backend))


def leaves(spec, dtype, backend, needing=None):
    """Inputs as leaves; those named in `needing` (default: all floating ones) need a gradient."""
    made = spec.inputs(dtype, device(backend))
    for name, t in made.items():
        floating = t.is_floating_point() and name != "attn_mask"
        t.requires_grad_(floating and (needing is None or name in needing))
    return made


def call(spec, inputs, backend):
    """functional.<op> of the spec on the given inputs -> its two outputs."""
    options = spec.options | ({"return_lse": True} if spec.op == "attention" else {})
    return getattr(functional, spec.op)(**inputs, **options, backend=backend)


def repeats_bitwise(spec, backend, dtype):
    """The same inputs and threads give the same bits, outputs and gradients."""
    need(spec, backend, dtype)
    first = evaluate.ours(spec, dtype, backend, device(backend))
    second = evaluate.ours(spec, dtype, backend, device(backend))
    for name in first:
        assert torch.equal(bits(first[name]), bits(second[name])), (
            f"{name} differs between two runs"
        )


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
    for used in ((0,), (1,), (0, 1)):
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
        outputs = call(spec, inputs | dict(zip(names, tensors, strict=True)), backend)
        # lse is -inf in a row that sees no key, and has no numerical derivative there
        return tuple(out.masked_fill(out == -torch.inf, 0) for out in outputs)

    slow = backend == "triton" and INTERPRETING  # one random direction instead of every element
    assert check(op, [inputs[name] for name in names], fast_mode=slow)


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
                for name in one:
                    assert torch.equal(bits(one[name]), bits(other[name])), name


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
