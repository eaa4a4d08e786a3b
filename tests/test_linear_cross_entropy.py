"""The `linear_cross_entropy` op: every spec on every backend, then what is special to it."""

import math
import subprocess
import sys

import cases
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pykernels import functional, nn, testing
from pykernels.testing import LINEAR_CROSS_ENTROPY_SPECS, LinearCrossEntropySpec
from pykernels.testing.specs import find

BACKENDS = ("reference", "cpp", "triton")


def spec_of(name):
    return find(f"linear_cross_entropy-{name}")


@pytest.mark.parametrize(("spec", "backend", "dtype"), cases.cases(*LINEAR_CROSS_ENTROPY_SPECS))
def test_values_and_gradients(spec, backend, dtype):
    cases.check(spec, backend, dtype)


@pytest.mark.parametrize(
    ("spec", "backend"), cases.gradcheck_cases(LINEAR_CROSS_ENTROPY_SPECS, {"plain"})
)
def test_gradcheck(spec, backend):
    cases.gradcheck(spec, backend)
    cases.gradcheck(spec, backend, torch.autograd.gradgradcheck)


NAMES = [
    f"linear_cross_entropy-{name}"
    for name in ("plain", "all-mean", "all-sum", "all-none", "s33", "rows", "strided", "n0-sum")
]


SMALL = [f"linear_cross_entropy-{name}" for name in ("plain", "all-none", "strided", "n0-sum")]


@pytest.mark.parametrize(("spec", "backend"), cases.some(NAMES, SMALL))
def test_each_gradient_alone(spec, backend):
    cases.gradient_alone(spec, backend)


@pytest.mark.parametrize(("spec", "backend"), cases.some(NAMES, SMALL))
def test_leaves_inputs_alone(spec, backend):
    """And a second backward pass, which has nothing made ahead, gives the same bits."""
    cases.leaves_inputs_alone(spec, backend)
    cases.without_gradients(spec, backend)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("name", ["plain", "all-none", "v2", "s193", "h1030", "rows", "words"])
def test_threads(name, count, threads):
    """One, two, and more threads than there are tiles of words: right, the same bits twice."""
    threads(count)
    for dtype in (torch.float32, torch.bfloat16):
        cases.check(spec_of(name), "cpp", dtype)
        cases.repeats_bitwise(spec_of(name), "cpp", dtype)


@pytest.mark.parametrize("name", ["plain", "all-none"])
def test_repeats_bitwise_triton(name):
    for dtype in (torch.float32, torch.bfloat16):
        cases.repeats_bitwise(spec_of(name), "triton", dtype)


def test_concurrent_calls(threads):
    threads(2)
    cases.concurrently(spec_of("s127"), "cpp", torch.float32)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    sizes=st.tuples(st.integers(1, 60), st.integers(1, 40), st.integers(2, 90)),
    bias=st.booleans(),
    class_weight=st.booleans(),
    ignored=st.sampled_from([0.0, 0.3]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    label_smoothing=st.sampled_from([0.0, 0.1]),
    z_loss=st.sampled_from([0.0, 0.01]),
    return_lse=st.booleans(),
)
def test_any_sizes(sizes, **options):
    n, h, v = sizes
    spec = LinearCrossEntropySpec("drawn", "drawn", (n + 1,), h, v, **options)
    cases.check(spec, "cpp", torch.float64)


def torchs(x, weight, target, bias=None, class_weight=None, **options):
    return F.cross_entropy(F.linear(x, weight, bias), target, class_weight, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("n", [0, 3])
def test_no_row_counts(n, reduction, smoothing, backend):
    """As torch: the mean over nothing is NaN, and gradients are zero."""
    where = {"device": cases.device(backend)}
    x, w, b = (
        torch.randn(s, dtype=torch.float64, requires_grad=True, **where)
        for s in ((n, 4), (7, 4), 7)
    )
    target = torch.full((n,), -100, **where)
    options = {"reduction": reduction, "label_smoothing": smoothing}
    expected = torchs(x, w, target, b, **options)
    found = functional.linear_cross_entropy(x, w, target, b, **options, backend=backend)
    assert torch.equal(found.isnan(), expected.isnan())
    torch.testing.assert_close(found, expected, equal_nan=True)
    for grad in torch.autograd.grad(found.sum(), (x, w, b)):
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("backend", BACKENDS)
def test_argmax_is_the_first_of_the_largest(backend, threads):
    threads(2)
    where = {"device": cases.device(backend)}
    x, w = torch.randn(50, 9, **where), torch.randn(1000, 9, **where)
    w[7] = 3  # no other word is as long
    w[900], w[400] = w[7], w[7]
    x[3] = 40 * w[7]
    target = torch.zeros(50, dtype=torch.int64, **where)
    loss, lse, argmax = functional.linear_cross_entropy(
        x, w, target, return_lse=True, return_argmax=True, backend=backend
    )
    assert argmax[3] == 7
    assert torch.equal(argmax, (x @ w.T).argmax(-1))
    torch.testing.assert_close(lse, (x @ w.T).logsumexp(-1))
    alone = functional.linear_cross_entropy(x, w, target, return_argmax=True, backend=backend)
    assert torch.equal(alone[1], argmax)
    assert torch.equal(alone[0], loss)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", [7, -1, -100])
@pytest.mark.parametrize("grad", [False, True])
def test_target_out_of_range_is_refused(grad, wrong, backend):
    """With its value, and its place in the shape that it came in."""
    where = {"device": cases.device(backend)}
    if where["device"] == "cuda":
        pytest.skip("the host does not wait for a GPU's values; test_triton_values.py has theirs")
    x, w = torch.randn(2, 3, 4, requires_grad=grad, **where), torch.randn(7, 4, **where)
    target = torch.tensor([[6, 0, -9], [-9, wrong, -9]], **where)  # -9 is ignored
    words = rf"`target` must be from 0 to V - 1 = 6 or ignore_index = -9, got {wrong} at \[1, 1\]"
    with pytest.raises(ValueError, match=words):
        functional.linear_cross_entropy(x, w, target, ignore_index=-9, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_words_without_a_chance(smoothing, backend):
    """A bias of -inf takes words out: blocks of them, and in the end the target's own."""
    where = {"device": cases.device(backend)}
    x, w = (torch.randn(n, 4, requires_grad=True, **where) for n in (6, 700))
    bias = torch.zeros(700, **where)
    bias[:500] = -torch.inf
    target = torch.arange(600, 606, **where)
    options = {"label_smoothing": smoothing, "reduction": "none"}
    for classes in (target, target - 200):
        expected = torchs(x, w, classes, bias, **options)
        found = functional.linear_cross_entropy(x, w, classes, bias, **options, backend=backend)
        torch.testing.assert_close(found, expected, equal_nan=True)
        if smoothing:
            continue
        if found.isfinite().all():
            for one, two in zip(
                torch.autograd.grad(found.sum(), (x, w)),
                torch.autograd.grad(expected.sum(), (x, w)),
                strict=True,
            ):
                torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sure_of_every_target(backend):
    """Logits that dwarf the losses, which are what is left of the difference of two of them."""
    where = {"device": cases.device(backend)}
    w = torch.eye(8, **where)
    x, target = 14 * w, torch.arange(8, **where)
    options = {"reduction": "none", "backend": backend}
    found = functional.linear_cross_entropy(x, w, target, **options)
    truth = torchs(x.double(), w.double(), target, reduction="none")
    assert truth.max() < 1e-5
    testing.assert_close(found, truth, torchs(x, w, target, reduction="none"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_shows(backend):
    where = {"device": cases.device(backend)}
    x, w = torch.randn(4, 3, **where), torch.randn(60, 3, **where)
    x[1, 2] = torch.nan
    target = torch.arange(4, **where)
    loss, lse = functional.linear_cross_entropy(
        x, w, target, reduction="none", return_lse=True, backend=backend
    )
    assert loss.isnan().tolist() == lse.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_gradients_in_half_precision(backend):
    """An upstream gradient that lifts them into float16's range comes before any rounding."""
    where = {"device": cases.device(backend)}
    x, w = torch.randn(64, 8, **where).half(), torch.randn(50, 8, **where).half()
    target = torch.arange(64, **where) % 50
    grads = []
    for dtype in (torch.float16, torch.float64):
        leaves = [t.to(dtype).requires_grad_() for t in (x, w)]
        loss = functional.linear_cross_entropy(*leaves, target, backend=backend, reduction="sum")
        up = torch.tensor(2.0**-14, dtype=dtype, **where)
        grads.append(torch.autograd.grad(loss / 64 * 64, leaves, up))
    for half, double in zip(*grads, strict=True):
        assert (half.double() - double).abs().max() < 2e-3 * double.abs().max()


#: Prints the bytes that one call takes at its most, beside what was there before and gradients.
MEMORY = """
import sys, torch
from pathlib import Path
from pykernels import functional
training, N, H, V = sys.argv[1] == "training", 1600, 512, 30000
torch.set_num_threads(2)
def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))
def call(x, w, target):
    with torch.set_grad_enabled(training):
        loss = functional.linear_cross_entropy(x, w, target, backend="cpp")
    if training:
        loss.backward()
call(*(torch.randn(2, 2, requires_grad=True) for _ in range(2)), torch.arange(2))  # loads code
x, w = (torch.randn(n, H, requires_grad=True) for n in (N, V))
target = torch.arange(N)
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
before = resident("VmRSS")
call(x, w, target)
print(resident("VmHWM") - before - sum(t.grad.nbytes for t in (x, w) if training))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells the peak")
@pytest.mark.parametrize(("which", "limit"), [("training", 32e6), ("inference", 3e6)])
def test_memory_beyond_inputs_and_gradients(which, limit):
    """Logits of all rows would be 192 MB; the gradients that inference leaves out 3.3 and 61 MB."""
    command = [sys.executable, "-c", MEMORY, which]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) <= limit, f"{int(done.stdout) / 1e6:.1f} MB"


@pytest.mark.parametrize("backend", ["cpp", "triton"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "return_argmax": True}])
def test_inference_allocates_no_gradient_buffer(options, backend):
    """Under no_grad no tensor is as large as a gradient, let alone the logits."""
    where = {"device": cases.device(backend)}
    x, w, b = (torch.randn(s, requires_grad=True, **where) for s in ((256, 64), (999, 64), 999))
    target = torch.arange(256, **where)
    with torch.profiler.profile(profile_memory=True, acc_events=True) as seen, torch.no_grad():
        functional.linear_cross_entropy(x, w, target, b, **options, backend=backend)
    of = "self_device_memory_usage" if x.is_cuda else "self_cpu_memory_usage"
    largest = max(getattr(event, of) for event in seen.events())
    assert 0 < largest < x.nbytes


def test_autocast_is_torchs():
    """Products of bfloat16, a loss in float32."""
    x, w = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    c, target = torch.rand(9), torch.arange(5)
    with torch.autocast("cpu", torch.bfloat16):
        expected = torchs(x, w, target, None, c)
        found = functional.linear_cross_entropy(x, w, target, class_weight=c)
    assert found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    for grad, leaf in zip(torch.autograd.grad(found, (x, w)), (x, w), strict=True):
        assert grad.dtype == leaf.dtype


@pytest.mark.parametrize("bias", [False, True])
def test_layer(bias):
    """A Linear and a CrossEntropyLoss, whose state_dict it shares."""
    weight = torch.rand(11)
    linear = torch.nn.Linear(6, 11, bias=bias)
    options = {"label_smoothing": 0.1, "ignore_index": 3, "reduction": "sum"}
    theirs = torch.nn.CrossEntropyLoss(weight, **options)
    ours = nn.LinearCrossEntropyLoss(6, 11, bias=bias, weight=weight, **options)
    assert ours.state_dict().keys() == linear.state_dict().keys()
    ours.load_state_dict(linear.state_dict())
    x, target = torch.randn(4, 5, 6), torch.randint(11, (4, 5))
    expected = theirs(linear(x).flatten(0, 1), target.flatten())
    found = ours(x, target)
    torch.testing.assert_close(found, expected)
    assert torch.equal(ours.logits(x), linear(x))
    with torch.no_grad():
        again, lse, argmax = ours(x, target, return_lse=True, return_argmax=True)
    assert torch.equal(again, found)
    torch.testing.assert_close(lse, linear(x).logsumexp(-1))
    assert torch.equal(argmax, linear(x).argmax(-1))
    found.backward()
    expected.backward()
    for one, two in zip(ours.parameters(), linear.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)
    assert "num_classes=11" in repr(ours)


@pytest.mark.skipif(
    not hasattr(torch.nn, "LinearCrossEntropyLoss"), reason="this torch has no such layer"
)
def test_layer_is_torchs():
    theirs = torch.nn.LinearCrossEntropyLoss(6, 11, bias=True, weight=torch.rand(11))
    ours = nn.LinearCrossEntropyLoss(6, 11, bias=True, weight=torch.ones(11), ignore_index=None)
    ours.load_state_dict(theirs.state_dict())
    x, target = torch.randn(5, 6), torch.randint(11, (5,))
    target[1] = -100
    torch.testing.assert_close(ours(x, target), theirs(x, target))
    assert "class_weight" not in ours.state_dict()
    without = nn.LinearCrossEntropyLoss(6, 11, bias=True)
    with pytest.raises(RuntimeError, match="class_weight"):  # nowhere to put them
        without.load_state_dict(theirs.state_dict())


def test_class_weights_that_need_a_gradient():
    """Refused, but where none is asked for."""
    x, w, target = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 4, 2])
    class_weight = torch.rand(5, requires_grad=True)
    with pytest.raises(ValueError, match="class_weight"):
        functional.linear_cross_entropy(x, w, target, class_weight=class_weight)
    with torch.no_grad():
        loss = functional.linear_cross_entropy(x, w, target, class_weight=class_weight)
    want = torch.nn.functional.cross_entropy(x @ w.T, target, class_weight.detach())
    torch.testing.assert_close(loss, want)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_a_word_without_any_chance(backend):
    """A row of W that is -inf gets no gradient of its bias, whatever the kernel pads rows with."""
    x, w = torch.rand(2, 3) + 1, torch.ones(3, 3)
    w[0] = -torch.inf
    bias = torch.zeros(3, requires_grad=True)
    target = torch.tensor([1, 2])
    loss = functional.linear_cross_entropy(x, w, target, bias, backend=backend)
    loss.backward()
    torch.testing.assert_close(loss.item(), math.log(2), rtol=1e-6, atol=0)
    torch.testing.assert_close(bias.grad, torch.zeros(3), rtol=0, atol=1e-7)


def mutants():
    def zero(run, *args, **options):
        outputs, saved = run(*args, **options)
        return tuple(None if t is None else t * 0 for t in outputs), saved

    yield "linear_cross_entropy_fwd", zero
    for index in (0, 1, 3):
        for factor in (0.0, 1.001):
            yield "linear_cross_entropy_bwd", cases.scaled_gradient(index, factor)
    yield from (("linear_cross_entropy_bwd", cases.forget(index)) for index in (0, 1))


def test_harness_rejects_mutants(monkeypatch):
    def skip_none(wrong):
        return wrong

    cases.rejects_mutants(
        spec_of("all-none"), monkeypatch, [(name, skip_none(wrong)) for name, wrong in mutants()]
    )
