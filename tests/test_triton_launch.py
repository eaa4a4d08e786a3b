"""Launches that Triton's own way is spared: they must hand over what it would hand over.

Without a GPU, a process of its own runs the launchers on CPU tensors, as Triton decides at import
whether it interprets: this file, run as a script, under a driver that names an H100 and a compiler
that compiles nothing. All that Triton makes of the arguments before that is its own. With a GPU
the results are compared too.
"""

import contextlib
import importlib
import json
import os
import subprocess
import sys
import traceback
from unittest import mock

import pytest
import torch
from test_triton_compile import KERNELS

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
pytest.importorskip("pykernels.kernels._common", exc_type=ImportError)

from pykernels import functional  # noqa: E402
from pykernels.kernels import _launch, _product  # noqa: E402

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(scope="module")
def answers():
    """What each check of the process says: None, or what is wrong."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    made = subprocess.run(
        [sys.executable, __file__], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(made.stdout.splitlines()[-1])


CHECKS = (
    "direct_is_what_triton_does",
    "a_new_layout_is_looked_at",
    "one_tensor_twice",
    "hooks_and_settings",
    "numbers_of_now",
    "the_oldest_goes",
    "plans_keep_to_their_tensors",
)


@pytest.mark.parametrize("check", CHECKS)
def test_without_a_gpu(check, answers):
    assert answers[check] is None, answers[check]


def random(*shape, dtype=torch.bfloat16):
    return (0.3 * torch.randn(shape, device="cuda")).to(dtype)


def calls():
    """Ops by name, each on inputs of its own at every call."""

    def recurrent(op, gates, H):
        inputs = [random(5, 16, 48), random(gates * H, 48), random(gates * H, H)]
        inputs += [random(gates * H), random(gates * H)]
        return lambda *tensors: getattr(functional, op)(*tensors)[0], inputs

    def attention(D, **options):
        inputs = [random(2, 4, 200, D), random(2, 2, 200, D), random(2, 2, 200, D)]
        options |= {"enable_gqa": True}
        return lambda *tensors: functional.attention(*tensors, **options), inputs

    def loss(dtype):
        inputs = [random(150, 64, dtype=dtype), random(301, 64, dtype=dtype)]
        target = torch.randint(0, 301, (150,), device="cuda")
        return lambda x, w: functional.linear_cross_entropy(x, w, target), inputs

    yield "rnn", lambda: recurrent("rnn", 1, 64)
    yield "gru", lambda: recurrent("gru", 3, 300)
    yield "lstm", lambda: recurrent("lstm", 4, 256)
    yield "attention", lambda: attention(80)
    yield "attention in Gluon", lambda: attention(64, is_causal=True)
    yield "window", lambda: attention(64, window=(30, 0))
    yield "loss", lambda: loss(torch.bfloat16)
    yield "loss in float32", lambda: loss(torch.float32)


@gpu
@pytest.mark.parametrize("name", [name for name, _ in calls()])
def test_results(name, monkeypatch):
    """Bit for bit, forward and backward, on tensors that the remembered launch never saw."""
    make = dict(calls())[name]

    def results(op, inputs):
        own = [t.clone().requires_grad_() for t in inputs]
        out = op(*own)
        return [out, *torch.autograd.grad(out, own, torch.ones_like(out))]

    _launch._ready.clear()
    results(*make())
    known = set(_launch._ready)
    assert known
    op, inputs = make()
    direct = results(op, inputs)
    assert set(_launch._ready) == known
    monkeypatch.setattr(_launch, "_watched", lambda: True)
    for found, expected in zip(direct, results(op, inputs), strict=True):
        assert torch.equal(found, expected)


@gpu
def test_stream():
    """A launch goes to the stream that is current when it is made."""
    a, b = random(128, 128), random(128, 128)
    out, expected = torch.empty_like(a), torch.empty_like(a)
    _product.product(a, b, expected)
    late = torch.zeros_like(a)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)
        late.copy_(a)
        _product.product(late, b, out)
        torch.cuda.current_stream().synchronize()
    assert torch.equal(out, expected)


@gpu
def test_the_host_does_not_wait():
    """Neither for what a loss's targets are, nor for anything else of a call."""
    for name, make in calls():
        op, inputs = make()
        own = [t.requires_grad_() for t in inputs]
        op(*own)
        torch.cuda.set_sync_debug_mode("error")
        try:
            out = op(*own)
            torch.autograd.grad(out, own, torch.ones_like(out))
        except RuntimeError as error:
            pytest.fail(f"{name}: {error}")
        finally:
            torch.cuda.set_sync_debug_mode("default")


@gpu
def test_alignment():
    """An address that is no multiple of 16 bytes has a kernel of its own."""
    memory, b = random(64 * 64 + 8), random(64, 64)
    found = []
    for start in (0, 8, 1, 3, 0):
        a = memory[start : start + 64 * 64].view(64, 64)
        found.append(_product.product(a, b, torch.empty_like(b)))
        expected = _product.product(a.clone(), b, torch.empty_like(b))
        assert torch.equal(found[-1], expected)
    assert torch.equal(found[0], found[-1])


# Below: the process.


class Driver:
    """An H100, as far as Triton asks."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 7

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


launched = []


def plainly(arg):
    """An argument of a launch with the address in place of a tensor."""
    if isinstance(arg, torch.Tensor):
        return arg.data_ptr()
    if isinstance(arg, tuple):
        return tuple(map(plainly, arg))
    return arg


def as_map(descriptor, address):
    fields = {**vars(descriptor), "base": address}
    return [(name, str(value)) for name, value in fields.items()]


def flat(args):
    """What a launcher hands over: descriptors as their maps, sizes and strides."""
    for arg in args:
        if hasattr(arg, "block_shape"):
            yield as_map(arg, arg.base.data_ptr())
            yield from arg.shape
            yield from arg.strides
        else:
            yield plainly(arg)


def pretend():
    """Has Triton launch into `launched`."""
    import triton
    from triton.runtime import driver

    class Compiled(triton.compiler.CompiledKernel):
        def __init__(self, src, **_):
            self.src, self.name, self.module = src, src.fn.__name__, object()
            self.function, self.packed_metadata = object(), object()
            described = sum(str(kind).startswith("tensordesc") for kind in src.signature.values())
            self.metadata = mock.Mock(tensordesc_meta=[{}] * described)

        def __del__(self):
            pass

        @property
        def run(self):
            def record(x, y, z, stream, function, packed, metadata, enter, leave, *args):
                assert (function, packed) == (self.function, self.packed_metadata)
                launched.append((self.name, (x, y, z), stream, function, tuple(flat(args))))

            return record

    triton.compiler.compile = Compiled
    _launch._map_launcher = lambda compiled: compiled.run
    _launch._map_maker = lambda descriptor, _: lambda t: as_map(descriptor, t.data_ptr())
    driver.set_active(Driver())
    torch._assert_async = lambda *_: None  # no kernel runs, so its number may be any
    for op in ("rnn", "gru", "lstm", "attention", "linear_cross_entropy"):
        importlib.import_module(f"pykernels.kernels.{op}")
    for name, module in list(sys.modules.items()):
        if name.startswith("pykernels.kernels."):
            fakes = {
                "on_device_of": lambda tensor: contextlib.nullcontext(),
                "capability": lambda device: 90,
                "multiprocessors": lambda device: 132,
            }
            vars(module).update({k: v for k, v in fakes.items() if hasattr(module, k)})


def ops():
    """One forward and backward pass of everything, on new tensors."""
    from pykernels.kernels import attention, attention_varlen, gru, linear_cross_entropy, lstm, rnn

    z = torch.zeros
    for dtype, H in ((torch.bfloat16, 64), (torch.float32, 300)):
        for module, gates, own, extra in (
            (rnn, 1, {"nonlinearity": "tanh"}, ()),
            (gru, 3, {}, ()),
            (lstm, 4, {"return_cell_states": True}, (None, None)),
        ):
            op = module.__name__.rpartition(".")[2]
            w = [z(gates * H, n, dtype=dtype) for n in (48, H)]
            b = [z(gates * H, dtype=dtype), None]
            x = z(3, 4, 48, dtype=dtype)
            forward, backward = getattr(module, f"{op}_fwd"), getattr(module, f"{op}_bwd")
            outputs, saved = forward(x, *w, *b, None, *extra, reverse=False, **own)
            backward(saved, outputs, needs=(True,) * (6 + len(extra)), reverse=False, **own)
        for D in (64, 80):
            for band in ((None, None), (None, 0), (-3, 0)):
                q, k = z(2, 4, 33, D, dtype=dtype), z(2, 2, 33, D, dtype=dtype)
                own = {"band": band, "scale": 0.125}
                outputs, saved = attention.attention_fwd(q, k, k, None, **own)
                needs = (True,) * 3 + (False,) * 4
                attention.attention_bwd(saved, outputs, needs=needs, **own)
        more = (z(2, 4, 33, 33, dtype=dtype), z(4), z(4), torch.tensor([7]))  # mask ... seed
        own |= {"softcap": 5.0, "diagonal": 0, "dropout_p": 0.5}
        outputs, saved = attention.attention_fwd(q, k, k, *more, **own)
        attention.attention_bwd(saved, outputs, needs=(True,) * 5 + (False,) * 2, **own)
        rows, starts = z(64, 4, 64, dtype=dtype), torch.tensor([0, 30, 64])
        own = {"band": (None, 0), "ends_meet": True, "scale": 0.125}
        given = (rows, rows, rows, None, None, None, starts, starts, None, None)
        outputs, saved = attention_varlen.attention_varlen_fwd(*given, **own)
        needs = (True,) * 3 + (False,) * 7
        attention_varlen.attention_varlen_bwd(saved, outputs, needs=needs, **own)
        loss = linear_cross_entropy
        x, weight, target = z(150, H, dtype=dtype), z(301, H, dtype=dtype), z(150).long()
        own = {"ignore_index": -100, "reduction": "mean", "label_smoothing": 0.1, "z_loss": 0.1}
        inputs, asked = (x, weight, target, None, None), (True,) * 5
        outputs, saved = loss.linear_cross_entropy_fwd(
            *inputs, **own, return_lse=True, return_argmax=True, ahead=asked
        )
        loss.linear_cross_entropy_scale(saved[6:], outputs[0])
        loss.linear_cross_entropy_bwd(saved[:6], (outputs[0], None, None), needs=asked, **own)


@triton.jit(do_not_specialize=["first"])
def kernel(a_ptr, pair, b_ptr, size, first, BLOCK: tl.constexpr):
    pass


def plan(a, b, c, block, first=0):
    return _launch.Call(kernel, (2,), (a, (b, None), c, a.numel(), first), {"BLOCK": block})


def made(*tensors, block=16, **now):
    """What a launch of `kernel` handed over, and whether Triton was asked."""
    asked, run = [], kernel.run

    def spy(*args, **options):
        asked.append(True)
        return run(*args, **options)

    kernel.run = spy
    try:
        _launch.launch(plan, tensors, block, **now)
    finally:
        del kernel.run
    name, grid, stream, _, args = launched.pop()
    assert (name, grid, stream) == ("kernel", (2, 1, 1), 7)
    size = tensors[0].numel()
    plain = [None if t is None else t.data_ptr() for t in tensors]
    assert args == (plain[0], (plain[1], None), plain[2], size, now.get("first", 0), block)
    return bool(asked)


def direct_is_what_triton_does():
    """Every kernel, on tensors that the remembered launch never saw."""
    run, layouts, compared, last = _launch._Ready.__call__, _launch._layouts, set(), []

    def listen(function, tensors, options):
        last[:] = function, options
        return layouts(function, tensors, options)

    def both(self, places, tensors, now):
        run(self, places, tensors, now)
        direct = launched.pop()
        function, options = last
        call = function(*tensors, *options, **now)
        call.kernel[call.grid](*call.args, **call.constants)
        assert direct == launched.pop()
        compared.add(direct[0])

    ops()
    with (
        mock.patch.object(_launch._Ready, "__call__", both),
        mock.patch.object(_launch, "_layouts", listen),
    ):
        ops()
    assert compared == set(KERNELS)


def a_new_layout_is_looked_at():
    t = torch.zeros(100)
    assert made(t, t, t)
    assert not made(t.clone(), t.clone(), t.clone())
    for other in (t[:64], t[1:], t.half(), t[::2], t.view(10, 10), None):
        asked = made(t, other, t)
        assert asked, other
        assert not made(t.clone(), other, t)
    assert made(t, t, t, block=32)
    assert not made(t, t, t)


def one_tensor_twice():
    t = torch.zeros(50)
    made(t, t, t)
    assert not made(t, t.clone(), t.clone())


def hooks_and_settings():
    t, runtime = torch.zeros(60), triton.knobs.runtime
    made(t, t, t)
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        hook.add(print)
        assert made(t, t, t)
        hook.remove(print)
        assert not made(t, t, t)
    runtime.debug = True
    assert made(t, t, t)
    runtime.debug = False
    assert not made(t, t, t)


def numbers_of_now():
    t = torch.zeros(70)
    assert made(t, t, t, first=0)
    for first in (1, 16, 7):
        assert not made(t, t, t, first=first)


def the_oldest_goes():
    t = torch.zeros(80)
    with mock.patch.object(_launch, "CAPACITY", 2):
        _launch._ready.clear()
        for block in (1, 2, 4):
            assert made(t, t, t, block=block)
        assert len(_launch._ready) == 2
        assert not made(t, t, t, block=2)
        assert made(t, t, t, block=1)


def plans_keep_to_their_tensors():
    """An address that is none of a tensor given would never be renewed."""
    t = torch.zeros(90)

    def stray(a):
        return _launch.Call(kernel, (1,), (a[1:], (a, None), a, 1, 0), {"BLOCK": 1})

    with pytest.raises(KeyError):
        _launch.launch(stray, (t,))


if __name__ == "__main__":
    torch.set_num_threads(1)
    pretend()
    found = {}
    for check in CHECKS:
        try:
            globals()[check]()
            found[check] = None
        except Exception:
            found[check] = traceback.format_exc()
    print(json.dumps(found))
