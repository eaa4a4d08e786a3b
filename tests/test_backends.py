"""Which backend runs, who decides, and what is said where none can."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys

import pytest
import torch

import pykernels
from pykernels import __main__ as about
from pykernels import _backends, cpp
from pykernels.ops import _calls
from pykernels.testing import check
from pykernels.testing.specs import find

CPU = torch.device("cpu")
VARLEN = {"alibi", "dropout", "large_head", "sinks", "softcap", "v_head_dim", "window"}


def chosen(requested=None, dtype=torch.float32, features=frozenset(), op="rnn"):
    """The package of the backend that a call would run on."""
    return _backends.select(op, requested, CPU, dtype, features).__name__.split(".")[1]


def python(program, **environment):
    """Run a program in a fresh interpreter -> (its output, its exit status)."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYKERNELS_", "TRITON_"))}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=env | environment
    )
    return (done.stdout + done.stderr).strip(), done.returncode


def test_the_extension_is_built():
    """Every other test skips without it; this one does not."""
    assert _backends.available("cpp") is None
    assert _backends.load_extension().__name__ == f"pykernels._C_{_backends.isa()}"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_triton_runs_here():
    """The same for triton, which needs a GPU or its interpreter (conftest.py sees to that)."""
    assert _backends.available("triton") is None


@pytest.mark.parametrize("backend", _backends.BACKENDS)
@pytest.mark.parametrize(
    "op",
    [
        "rnn",
        "gru",
        "lstm",
        "attention",
        "attention_backward",
        "attention_varlen",
        "linear_cross_entropy",
    ],
)
def test_every_backend_serves_its_dtypes(backend, op):
    if reason := _backends.available(backend):
        pytest.skip(reason)
    module = _backends.module(backend, op)
    assert {torch.float16, torch.bfloat16, torch.float32, torch.float64} == module.DTYPES
    # written out: a test of a feature that a backend forgot to list would skip in silence
    assert {
        ("attention", "reference"): {
            "alibi",
            "dropout",
            "large_head",
            "mask_grad",
            "sinks",
            "softcap",
            "v_head_dim",
            "window",
        },
        ("attention", "cpp"): {
            "alibi",
            "dropout",
            "large_head",
            "mask_grad",
            "sinks",
            "softcap",
            "v_head_dim",
            "window",
        },
        ("attention", "triton"): VARLEN - {"large_head"} | {"mask_grad"},
        ("attention_backward", "reference"): VARLEN - {"dropout"} | {"mask_grad"},
        ("attention_backward", "cpp"): VARLEN - {"dropout"} | {"mask_grad"},
        ("attention_backward", "triton"): VARLEN - {"dropout", "large_head"} | {"mask_grad"},
        ("attention_varlen", "reference"): VARLEN,
        ("attention_varlen", "cpp"): VARLEN,
        ("attention_varlen", "triton"): VARLEN - {"large_head"},
        ("linear_cross_entropy", "cpp"): {"ahead"},
        ("linear_cross_entropy", "triton"): {"ahead"},
        ("rnn", "reference"): {"ragged"},
        ("rnn", "cpp"): {"ragged"},
        ("gru", "reference"): {"ragged"},
        ("gru", "cpp"): {"ragged"},
        ("rnn", "triton"): {"ragged"},
        ("gru", "triton"): {"ragged"},
        ("lstm", "triton"): {"ragged"},
        ("lstm", "reference"): {"projection", "ragged"},
        ("lstm", "cpp"): {"projection", "ragged"},
    }.get((op, backend), set()) == module.FEATURES
    assert hasattr(module, f"{op}_fwd")
    # attention_backward is a gradient itself: that of it is the reference's alone
    only_forward = op == "attention_backward" and backend != "reference"
    assert hasattr(module, f"{op}_bwd") != only_forward


def test_default_is_the_fastest():
    assert chosen() == "cpp"
    assert chosen(op="gru") == "cpp"
    assert chosen(op="lstm", features=frozenset({"projection", "ragged"})) == "cpp"
    assert chosen(op="attention") == "cpp"
    assert chosen(op="linear_cross_entropy") == "cpp"


@pytest.fixture
def without_sinks(monkeypatch):
    """The C++ backend lists no sinks."""
    served = _backends.module("cpp", "attention")
    monkeypatch.setattr(served, "FEATURES", served.FEATURES - {"sinks"})
    _backends._select.cache_clear()
    yield
    _backends._select.cache_clear()


def test_features_decide(without_sinks):
    assert chosen(op="attention", features=frozenset({"sinks"})) == "reference"
    assert chosen(op="attention", features=frozenset({"v_head_dim"})) == "cpp"
    with pytest.raises(
        ValueError,
        match=r"attention: backend 'cpp' cannot serve this call: it does not serve sinks; "
        r"these can: (triton, )?reference$",
    ):
        chosen("cpp", op="attention", features=frozenset({"sinks"}))


def test_argument_wins_over_context():
    with pykernels.use_backend("reference"):
        assert chosen() == "reference"
        assert chosen("cpp") == "cpp"
        with pykernels.use_backend("cpp"):
            assert chosen() == "cpp"
        with pykernels.use_backend(None):
            assert chosen() == "cpp"
        assert chosen() == "reference"
    assert chosen() == "cpp"


def test_context_ends_with_an_error():
    with pytest.raises(KeyError), pykernels.use_backend("reference"):
        raise KeyError
    assert chosen() == "cpp"


def test_context_belongs_to_its_thread():
    import threading

    seen = []
    with pykernels.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(chosen()))
        thread.start()
        thread.join()
    assert seen == ["cpp"]


def test_backward_stays_on_the_backend_of_its_forward():
    spec = find("rnn-plain")
    inputs = {name: t.requires_grad_() for name, t in spec.inputs(torch.float64).items()}
    y, _ = pykernels.functional.rnn(**inputs, backend="cpp")
    with pykernels.use_backend("reference"):
        assert y.grad_fn.call.backend.__name__.startswith("pykernels.cpp")
        y.sum().backward()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: pykernels.use_backend("cuda").__enter__(),
            "use_backend: `name` must be one of 'cpp', 'triton', 'reference', got 'cuda'",
        ),
        (
            lambda: chosen("fast"),
            "rnn: `backend` must be one of 'cpp', 'triton', 'reference', got 'fast'",
        ),
        (
            lambda: chosen(""),
            "rnn: `backend` must be one of 'cpp', 'triton', 'reference', got ''",
        ),
        (
            lambda: chosen([]),
            "rnn: `backend` must be one of 'cpp', 'triton', 'reference', got []",
        ),
        (
            lambda: chosen("cpp", torch.float8_e4m3fn),
            "rnn: backend 'cpp' cannot serve this call: it does not serve torch.float8_e4m3fn; "
            "no backend can",
        ),
        (
            lambda: chosen("cpp", op="no_such_op"),
            "no_such_op: backend 'cpp' cannot serve this call: it has no no_such_op; "
            "no backend can",
        ),
        (
            lambda: chosen(dtype=torch.float8_e4m3fn),
            "rnn: no backend serves dtype torch.float8_e4m3fn on device cpu",
        ),
    ],
)
def test_words(call, words):
    with pytest.raises(ValueError, match=re.escape(words) + "$"):
        call()


@pytest.mark.skipif(_backends.available("triton") is not None, reason="triton cannot run here")
def test_a_backend_without_the_op_refuses(monkeypatch):
    monkeypatch.setattr(_backends, "has", lambda name, op: name != "triton")
    monkeypatch.setattr(_backends, "_select", _backends._select.__wrapped__)
    with pytest.raises(
        ValueError,
        match="attention_varlen: backend 'triton' cannot serve this call: it has no "
        "attention_varlen; these can: ",
    ):
        chosen("triton", op="attention_varlen")


def test_cpp_refuses_other_devices():
    with pytest.raises(
        ValueError, match="backend 'cpp' cannot serve this call: it runs on cpu tensors, not meta"
    ):
        pykernels.functional.rnn(
            *(t.to("meta") for t in find("rnn-bare").inputs(torch.float32).values()), backend="cpp"
        )


WHICH = (
    "import torch; from pykernels import _backends;"
    "print(_backends.select('rnn', {}, torch.device('cpu'), torch.float32).__name__)"
)


def test_environment_is_the_contexts_twin():
    out, code = python(WHICH.format(None), PYKERNELS_BACKEND="reference")
    assert (out, code) == ("pykernels.reference.rnn", 0)
    out, code = python(WHICH.format("'cpp'"), PYKERNELS_BACKEND="reference")
    assert (out, code) == ("pykernels.cpp.rnn", 0)


def test_environment_of_no_backend():
    out, code = python(WHICH.format(None), PYKERNELS_BACKEND="gpu")
    assert code
    assert out.endswith(
        "rnn: `PYKERNELS_BACKEND` must be one of 'cpp', 'triton', 'reference', got 'gpu'"
    )
    out, code = python(WHICH.format("'gpu'"), PYKERNELS_BACKEND="gpu")
    assert code
    assert out.endswith("rnn: `backend` must be one of 'cpp', 'triton', 'reference', got 'gpu'")


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="a GPU is here, so the kernels need no interpreter"
)
def test_triton_on_cpu_needs_the_interpreter():
    out, code = python(WHICH.format("'triton'"))
    assert code
    assert "TRITON_INTERPRET=1" in out
    assert "these can: cpp, reference" in out


ON_EVERY_ISA = [
    f"{op}-{name}"
    for ops, names in (
        (
            "rnn gru lstm",
            "plain bare t0 b0 h17 h33 h340 b50 i600 rows offset long "
            "ragged ragged-reverse ragged-one-long ragged-wide",
        ),
        ("rnn", "relu all1 b33"),
        ("lstm", "proj-wide proj-ragged-reverse cells-h340"),
        (
            "attention",
            "plain causal sk0 b0 d7 d33 d100 dv-wider gqa-causal mask-2d mask-causal bias-dead "
            "s129 s257-causal tiles-mask saturated offset mqa-decode",
        ),
        ("linear_cross_entropy", "plain all-mean all-none s33 s193 h1030 rows words"),
    )
    for op in ops.split()
    for name in names.split()
]


def others():
    """The builds for this kind of machine that other tests do not run on, by instruction set."""
    for isa in _backends.ISAS:
        built = importlib.util.find_spec(f"pykernels._C_{isa}") is not None
        if built and isa != _backends.isa() and _backends.load_extension().cpu_runs(isa):
            yield isa, importlib.import_module(f"pykernels._C_{isa}")


@pytest.fixture
def builds(monkeypatch):
    """A function that makes a build the one in use."""

    def use(extension):
        monkeypatch.setattr(_backends, "load_extension", lambda: extension)
        _calls.forget()

    yield use
    _calls.forget()


@pytest.mark.parametrize("name", ON_EVERY_ISA)
def test_every_instruction_set(name, builds):
    """Each build that this processor runs, over specs that reach every tail and block."""
    for isa, extension in list(others()):
        builds(extension)
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            print(isa, dtype)  # shown where it fails
            check(find(name), dtype, "cpp")


@pytest.mark.parametrize("isa", _backends.ISAS)
def test_an_instruction_set_is_forced(isa):
    out, code = python(
        "import torch\nfrom pykernels import _backends\n"
        "from pykernels.testing import check\n"
        "from pykernels.testing.specs import find\n"
        "check(find('rnn-plain'), torch.float32, 'cpp')\n"
        "print(_backends.isa())",
        PYKERNELS_ISA=isa,
    )
    runs = isa in (_backends.isa(), *dict(others()))
    assert (code == 0) == runs, out
    assert not runs or out == isa


def test_isa_of_no_name():
    out, code = python(
        "from pykernels import _backends; _backends.load_extension()", PYKERNELS_ISA="sse9"
    )
    assert code
    assert out.endswith(
        "pykernels: `PYKERNELS_ISA` must be one of 'avx512', 'avx2', 'baseline', got 'sse9'"
    )
    out, code = python(
        "import torch; from pykernels import functional; q = torch.ones(1, 1, 2, 4);"
        "print(functional.attention(q, q, q, backend='reference').shape)",
        PYKERNELS_ISA="sse9",
    )
    assert (out, code) == ("torch.Size([1, 1, 2, 4])", 0)


def test_python_m_pykernels():
    """Prints versions, the build in use, threads and backends, in one screen."""
    out = subprocess.run(
        [sys.executable, "-m", "pykernels"], capture_output=True, text=True, check=True
    ).stdout
    for word in (
        pykernels.__version__,
        torch.__version__,
        _backends.isa(),
        *_backends.BACKENDS,
        "threads",
    ):
        assert word in out
    lines = out.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("variable", ["PYKERNELS_BACKEND", "PYKERNELS_ISA"])
def test_python_m_pykernels_in_an_environment_of_no_name(variable):
    """What names nothing is an error, and the variable is in its words."""
    done = subprocess.run(
        [sys.executable, "-m", "pykernels"],
        capture_output=True,
        text=True,
        env={**os.environ, variable: "none"},
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: pykernels: `{variable}` must be one of ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("more", 2)])
def test_python_m_pykernels_takes_no_arguments(argument, code, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pykernels", argument])
    with pytest.raises(SystemExit) as end:
        about.main()
    assert end.value.code == code
    said = capsys.readouterr()
    assert "usage: python -m pykernels" in said.out + said.err


def test_python_m_pykernels_without_kernels():
    """No built extension: one clear line, and the reference still works."""
    program = (
        "import sys; sys.modules['pykernels._C_baseline'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if '_C_' in name else find(name, *rest)\n"
        "import torch; from pykernels import _backends, functional\n"
        "print(_backends.available('cpp'))\n"
        "w = torch.eye(3); functional.rnn(torch.ones(2, 1, 3), w, w)"
    )
    out, code = python(program)
    assert code == 0, out
    assert (
        out == "the C++ kernels are not built; reinstall pykernels where a C++17 compiler is found"
    )


def test_an_instruction_set_that_is_not_built():
    if not _backends.load_extension().cpu_runs("avx2"):
        pytest.skip("this processor does not run avx2")
    program = (
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if '_C_avx2' in name else find(name, *rest)\n"
        "from pykernels import _backends; print(_backends.available('cpp'))"
    )
    out, code = python(program, PYKERNELS_ISA="avx2")
    assert code == 0, out
    assert out == "no C++ kernels are built for PYKERNELS_ISA=avx2"


@pytest.mark.parametrize("name", ["rnn-strided", "gru-plain", "lstm-proj", "attention-strided"])
def test_memory_that_c_cannot_find(name, monkeypatch):
    """A torch before 2.10 has no exchange functions: each tensor is asked in Python."""
    filled, fill = [], cpp.Plan.fill
    monkeypatch.setattr(cpp, "Tensor", torch._C.TensorBase)  # which has none
    monkeypatch.setattr(cpp.Plan, "fill", lambda *given: filled.append(1) or fill(*given))
    op = find(name).op
    module = _backends.module("cpp", op)
    for plan in (f"{op}_fwd_pass", f"{op}_bwd_pass"):
        # not one that was made before, nor to be found by those that come after
        monkeypatch.setattr(module, plan, getattr(module, plan).__wrapped__)
    _calls.forget()
    check(find(name), torch.float32, "cpp")
    _calls.forget()
    assert len(filled) >= 2  # forward and backward
