"""What only the Triton backend has: blocks and their edges, the forms of the time loop, split sums,
and the guards of its package. Values by the specs are in the tests of the ops.
"""

import math
import os
import subprocess
import sys

import pytest
import torch

from pykernels import functional, testing
from pykernels.testing import evaluate, specs

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
_common = pytest.importorskip("pykernels.kernels._common", exc_type=ImportError)

from pykernels.kernels import _configs, _product, linear_cross_entropy  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EVERY = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


RECURRENT = {"rnn": specs.RNNSpec, "gru": specs.GRUSpec, "lstm": specs.LSTMSpec}
TABLE = _configs.table(_common.capability(torch.device(DEVICE)))


def alone():
    """The last size of an entry, and more rows than a tile has."""
    for entry in _configs.ALONE[TABLE]:
        for op, gates in (("rnn", 1), ("gru", 3), ("lstm", 4)):
            if 2 * gates * entry.block_n**2 <= entry.held and (op == "rnn") == (gates == 1):
                yield op, entry.block_n, entry.block_b + 1


@pytest.mark.parametrize(("op", "H", "B"), list(alone()))
def test_units_of_one_program(op, H, B):
    for reverse in (False, True):
        spec = RECURRENT[op](f"{op}-alone", "see above", 3, B, 5, H, reverse=reverse)
        evaluate.check(spec, torch.float16, "triton", DEVICE)


def together():
    """Every entry, around the edges of its tiles of units, of the state and of the batch."""
    for dtype, entries in _configs.TOGETHER[TABLE].items():
        for index, entry in enumerate(entries):
            for op, H, B in (
                ("rnn", 3 * entry.block_n - 1, entry.block_b + 1),
                ("gru", entry.block_k + 1, 3),
                ("lstm", 2 * entry.block_n + 1, entry.block_b - 1),
            ):
                yield pytest.param(dtype, index, op, H, B, id=f"{dtype}-{index}-{op}-{H}-{B}")


@pytest.mark.parametrize(("dtype", "index", "op", "H", "B"), list(together()))
def test_units_of_many_programs(dtype, index, op, H, B, monkeypatch):
    entry = _configs.TOGETHER[TABLE][dtype][index]
    monkeypatch.setitem(_configs.ALONE, TABLE, ())
    monkeypatch.setitem(_configs.TOGETHER, TABLE, {dtype: (entry,)})
    spec = RECURRENT[op](f"{op}-together", "see above", 3, B, 5, H, reverse=op == "gru")
    evaluate.check(spec, dtype, "triton", DEVICE)


@pytest.mark.parametrize("op", list(RECURRENT))
def test_forms_agree(op, monkeypatch):
    """The same numbers bit for bit, whether programs meet on the chip or between launches."""
    H = 16 if DEVICE == "cpu" else 80  # the interpreter has but one program at a time
    spec = RECURRENT[op](f"{op}-forms", "see above", 8, 3, 5, H)
    chosen, seen = _configs.recurrence, []

    def by_steps(*sizes):
        form, config = chosen(*sizes)
        seen.append(form)
        return "steps", config

    first = evaluate.ours(spec, torch.float32, "triton", DEVICE)
    monkeypatch.setattr(_configs, "recurrence", by_steps)
    second = evaluate.ours(spec, torch.float32, "triton", DEVICE)
    assert seen == ["together"] * 2
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_any_nan_is_a_number_that_is_there():
    """No program waits for a state whose bits are those of memory that was not written yet."""
    h0 = torch.full((1, 16), -1, dtype=torch.int32, device=DEVICE).view(torch.float32)
    x, w = torch.zeros(3, 1, 16, device=DEVICE), torch.eye(16, device=DEVICE)
    y, _ = functional.rnn(x, w, w, h0=h0, nonlinearity="relu", backend="triton")
    assert y.isnan().all()


@pytest.mark.parametrize(
    ("capability", "dtype", "gates", "B", "H", "programs", "form", "held"),
    [
        (90, torch.float16, 4, 1, 64, 132, "alone", True),
        (90, torch.bfloat16, 4, 16, 768, 132, "together", True),
        (90, torch.float16, 4, 16, 2048, 132, "together", False),
        (90, torch.float16, 1, 16, 8192, 132, "steps", False),
        (80, torch.float16, 4, 16, 768, 108, "together", False),
        (90, torch.float32, 3, 16, 512, 132, "together", False),
        (90, torch.float64, 3, 16, 512, 16, "steps", False),
    ],
)
def test_form_by_size(capability, dtype, gates, B, H, programs, form, held):
    found, config = _configs.recurrence(capability, dtype, gates, B, H, programs)
    assert (found, config.held > 0) == (form, held)


def attention_sizes():
    for dtype, blocks in _configs.ATTENTION_FWD["sm_80"].items():
        m, n = blocks[32][0].block_m, blocks[32][0].block_n
        yield dtype, m, n
        yield dtype, m + 1, 2 * n - 1
        yield dtype, 2 * m - 1, n + 1


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("dtype", "S_q", "S_k"), list(attention_sizes()))
def test_edges_of_attention_blocks(dtype, S_q, S_k, is_causal):
    spec = specs.AttentionSpec(
        "attention-edge", "see above", b=1, n=1, s_q=S_q, s_k=S_k, d=32, is_causal=is_causal
    )
    evaluate.check(spec, dtype, "triton", DEVICE)


@pytest.mark.parametrize("scale", [-0.7, 0.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scale_of_any_sign(dtype, scale):
    """Scores are kept without their scale, which must not turn a hidden key's -inf around."""
    spec = specs.AttentionSpec(
        "attention-scale", "see above", b=1, n=2, s_q=9, d=16, is_causal=True, scale=scale
    )
    evaluate.check(spec, dtype, "triton", DEVICE)


@pytest.mark.parametrize(
    ("mask_shape", "band"),
    [
        (("1", "N", "S_q", "S_k"), {"is_causal": True}),
        (("N", "S_q", "S_k"), {"window": (30, 20)}),
        (("B", "1", "1", "S_k"), {}),
        (("1", "N", "S_q", "1"), {"is_causal": True}),
        (("1", "1"), {"window": (30, 20)}),
    ],
)
def test_gradient_of_a_mask_sums_over_tiles(mask_shape, band):
    """One program owns a tile of it; what the mask is the same for may be several tiles, too."""
    spec = specs.AttentionSpec(
        "attention-mask-tiles",
        "see above",
        b=2,
        n=2,
        s_q=40,
        s_k=70,
        d=4,
        mask="float",
        mask_shape=mask_shape,
        learned=True,
        softcap=1.5,
        **band,
    )
    evaluate.check(spec, torch.float32, "triton", DEVICE)


class Programs:
    """As much of Gluon's language as says which program has what to do."""

    minimum, maximum, where = min, max, staticmethod(lambda which, a, b: a if which else b)

    def __init__(self, programs, pid):
        self.num_programs, self.program_id = lambda axis: programs, lambda axis: pid


@pytest.mark.parametrize("last_first", [False, True])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize(
    ("heads", "S", "D"),
    [
        (512, 512, 128),
        (32, 8192, 128),
        (64, 2048, 256),
        (64, 8192, 64),
        (12, 1000, 128),
        (4, 65536, 64),
    ],
)
def test_tiles_of_persistent_programs(heads, S, D, group, last_first, monkeypatch):
    """Each tile of each head is done once, and all programs of a full GPU get about the same."""
    hopper = pytest.importorskip(
        "pykernels.kernels._hopper", exc_type=(AttributeError, ImportError)
    )
    monkeypatch.setattr(hopper, "multiprocessors", lambda device: 132)
    q, k = (
        torch.empty(1, n, S, D, dtype=torch.float16, device="meta") for n in (heads, heads // group)
    )
    tiles, programs = hopper.grid(q)
    chunk = hopper.heads_together(k, k, heads, tiles, programs)
    done, work = set(), [0] * programs
    for pid in range(programs):
        monkeypatch.setattr(hopper, "gl", Programs(programs, pid))
        for turn in range(tiles * heads):
            tile, head = hopper.place.fn(turn, tiles, heads, chunk, last_first)
            if head >= heads:
                break
            assert 0 <= tile < tiles
            assert (tile, head) not in done
            done.add((tile, head))
            # two tiles of keys are about what a start and an end take
            work[pid] += 2 + (tile + 1 if last_first else tiles)
    assert len(done) == tiles * heads
    if len(done) > 3 * programs:
        assert sum(work) / programs >= 0.9 * max(work)


@pytest.mark.parametrize("K", [0, 1, _configs.SPLIT_LEAST, _configs.SPLIT_MOST + 3])
@pytest.mark.parametrize("dtype", EVERY)
def test_split_sums(dtype, K):
    """Sums over all time steps are split among programs, and repeat bit for bit."""
    a = torch.randn(K, 7, device=DEVICE, dtype=dtype).t()
    b = torch.randn(K, 70, device=DEVICE, dtype=dtype)
    more = (torch.randn(7, 3, device=DEVICE, dtype=dtype), b.new_ones(3, 70))
    like = a.new_empty(7, 70)
    got = _product.long_product([(a, b), more], like)
    wide = [t.cpu().double().numpy().astype("longdouble") for t in (a, b, *more)]
    truth = torch.from_numpy((wide[0] @ wide[1] + wide[2] @ wide[3]).astype("float64"))
    testing.assert_close(got, truth, a @ b + more[0] @ more[1])
    assert torch.equal(got, _product.long_product([(a, b), more], like))


@pytest.fixture
def described(monkeypatch):
    """Products through tensor descriptors, as on a chip that has them; counts those."""
    monkeypatch.setattr(_product, "capability", lambda device: 90)
    describe, found = _product.describe, []

    def spy(*args):
        found.append(describe(*args))
        return found[-1]

    monkeypatch.setattr(_product, "describe", spy)
    return found


@pytest.mark.parametrize("turned", [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_described_products(dtype, turned, described):
    """Tiles that stick out of the matrices on all sides, and operands that lie transposed."""
    M, N, K = 136, 264, 72
    shapes = ((K, M) if turned[0] else (M, K)), ((N, K) if turned[1] else (K, N))
    a, b = (torch.randn(shape, device=DEVICE, dtype=dtype) for shape in shapes)
    a, b = (t.t() if turn else t for t, turn in zip((a, b), turned, strict=True))
    out = torch.empty(M, N, device=DEVICE, dtype=dtype)
    scale = torch.tensor(0.37, device=DEVICE)
    _product.product(a, b, out, scale=scale)
    assert len(described) == 3
    assert None not in described
    testing.assert_close(out, a.double() @ b.double() * scale.double(), (a @ b) * scale.to(dtype))


def test_what_no_descriptor_takes(described):
    """Rows that start at no multiple of 16 bytes, or overlap, or have gaps between numbers."""
    dense = torch.zeros(80, 72, device=DEVICE, dtype=torch.bfloat16)
    for matrix in (dense[:, 1:], dense[:, ::2], dense[:1].expand(80, 72), dense[:, :7].clone()):
        assert _product.describe(matrix, (64, 64)) is None
    assert _product.describe(dense[:, 8:], (64, 64)) is not None
    assert _product.describe(dense.t(), (64, 64))[1]


def test_sum_with_a_rest(described):
    """Many products that all but cancel, in bfloat16: their sum is good to twice its digits."""
    M, N, K, steps = 72, 64, 64, 5
    out = torch.empty(M, N, device=DEVICE, dtype=torch.bfloat16)
    rest, truth = torch.empty_like(out), 0
    for step in range(steps):
        a, b = (torch.randn(s, device=DEVICE, dtype=torch.bfloat16) for s in ((M, K), (K, N)))
        a = a * 64 if step < steps - 1 else a
        for sign in (1, -1) if step < steps - 1 else (1,):
            first = step == 0 and sign == 1
            _product.product(a * sign, b, out, rest=rest, add=not first)
    truth = a.double() @ b.double()
    assert (out.double() - truth).abs().max() < 2**-7 * truth.abs().max()
    assert ((out.double() + rest.double()) - truth).abs().max() < 2**-8 * truth.abs().max()
    kept = rest.clone()
    _product.product(a, b, out, rest=rest, add=True, final=True)
    assert torch.equal(rest, kept)
    assert (out.double() - 2 * truth).abs().max() < 2**-7 * truth.abs().max()


def test_chunks_take_no_more_memory_than_one():
    """Sums of 16-bit gradients over chunks are as large as the weight again."""
    parts = linear_cross_entropy._parts
    H = 2 * _configs.LOSS_ROWS
    assert parts(2 * H, H, exact=False) == [range(2 * H)]
    assert parts(2 * H, H, exact=True) == [range(H), range(H, 2 * H)]
    assert max(map(len, parts(2 * H + 1, H, exact=False))) <= H
    assert parts(0, H, exact=False) == []


def loss_of(target, weighted=False):
    """The kernels' own, of which nobody has looked at the targets; words are 0 to 6."""
    x, w = torch.ones(len(target), 4, device=DEVICE), torch.ones(7, 4, device=DEVICE)
    class_weight = torch.linspace(0.1, 2, 7, device=DEVICE) if weighted else None
    options = {"reduction": "mean", "label_smoothing": 0.0, "z_loss": 0.0, "ignore_index": -9}
    options |= {"return_lse": False, "return_argmax": False}
    run = linear_cross_entropy.linear_cross_entropy_fwd
    (loss, _, _), _ = run(x, w, torch.tensor(target, device=DEVICE), None, class_weight, **options)
    return loss


WRONG_TARGETS = [7, -1, -100, 2**32 + 3]
OUT_OF_RANGE = "`target` must be from 0 to V - 1 or ignore_index"


@pytest.mark.skipif(DEVICE != "cpu", reason="it would stop the device")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("wrong", WRONG_TARGETS)
def test_a_target_out_of_range_is_asserted(wrong, weighted):
    """In the first and in the last rows that are looked at together; on a CPU it is an error."""
    block = _configs.LOSS_TARGETS.block_r
    assert loss_of([6] * block + [-9] * 3, weighted).isfinite()
    for place in (0, block + 1):
        target = [6] * block + [-9] * 3
        target[place] = wrong
        with pytest.raises(RuntimeError, match=OUT_OF_RANGE):
            loss_of(target, weighted)


@pytest.mark.skipif(DEVICE != "cuda", reason="no GPU")
@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("wrong", WRONG_TARGETS)
def test_a_target_out_of_range_stops_a_gpu(wrong, backend):
    """In a process of its own, which cannot use the GPU any more."""
    code = f"""if True:
    import torch
    from pykernels.functional import linear_cross_entropy
    x, w = torch.ones(9, 4, device="cuda"), torch.ones(7, 4, device="cuda")
    target = torch.full((9,), 6, device="cuda")
    linear_cross_entropy(x, w, target, backend="{backend}").item()
    target[5] = {wrong}
    linear_cross_entropy(x, w, target, ignore_index=-9, backend="{backend}").item()
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode != 0
    assert (OUT_OF_RANGE if backend == "triton" else "Assertion") in run.stderr


@pytest.mark.parametrize("ignored", [-100, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
def test_many_rows_are_counted(weighted, reduction, ignored):
    """More than are looked at together; what is ignored may be the number of a word."""
    N = 2 * _configs.LOSS_TARGETS.block_r + 1
    spec = specs.LinearCrossEntropySpec(
        *("loss-rows", "see above", (N,), 5, 7),
        ignored=0.2,
        ignore_index=ignored,
        reduction=reduction,
        class_weight=weighted,
    )
    evaluate.check(spec, torch.float32, "triton", DEVICE)


@pytest.mark.parametrize("N", [128, 129, 257])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("H", [16, 13])
def test_chunks_of_a_loss(H, dtype, N, described, monkeypatch):
    """One chunk of rows, or more with one row in the last: gradients of the weight add up."""
    monkeypatch.setattr(_configs, "LOSS_ROWS", 128)
    for options in ({}, {"reduction": "none", "return_lse": True, "label_smoothing": 0.1}):
        spec = specs.LinearCrossEntropySpec(
            "loss-chunks", "see above", (N,), H, 275, ignored=0.2, **options
        )
        evaluate.check(spec, dtype, "triton", DEVICE)
    if dtype != torch.float32 and H == 16:
        assert any(found is not None for found in described)


@pytest.mark.parametrize("product", [_product.long_product, _product.deep_product])
def test_splits_end_where_tiles_do(product, monkeypatch):
    """A tile of a descriptor that reached beyond its split would count rows of the next one."""
    seen = []
    launch = _product._split_product
    monkeypatch.setattr(
        _product, "_split_product", lambda *given: seen.append(given[-1]) or launch(*given)
    )
    K = 1568  # a seventh of it is a multiple of 32 and of no more
    a, b = torch.randn(K, 70, device=DEVICE).t(), torch.randn(K, 70, device=DEVICE)
    if product is _product.long_product:
        product([(a, b)], like=a.new_empty(70, 70))
    else:
        product(a, b, a.new_empty(70, 70))
    deepest = max(
        config.block_k
        for table in (_configs.PRODUCT, *_configs.DESCRIBED.values())
        for entries in table.values()
        for config in entries
    )
    assert seen
    assert all(split_k % deepest == 0 for split_k in seen)


@triton.jit
def elementwise_kernel(x_ptr, y_ptr, n, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0)
    if FUNCTION == "tanh":
        y = _common.tanh(x)
    elif FUNCTION == "sigmoid":
        y = _common.sigmoid(x)
    else:
        y = _common.to_storage(x, y_ptr.dtype.element_ty)
    tl.store(y_ptr + at, y, mask=at < n)


def elementwise(x, dtype, function):
    y = torch.empty_like(x, dtype=dtype)
    grid = (triton.cdiv(x.numel(), 1024),)
    elementwise_kernel[grid](x, y, x.numel(), FUNCTION=function, BLOCK=1024)
    return y


@pytest.mark.parametrize(("function", "ulps", "low"), [("tanh", 2, -1.0), ("sigmoid", 3, 0.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nonlinearities_are_good_to_a_few_ulp(dtype, function, ulps, low):
    mpmath = pytest.importorskip("mpmath")
    true = {"tanh": mpmath.tanh, "sigmoid": lambda v: 1 / (1 + mpmath.exp(-v))}[function]
    sizes = torch.logspace(-30, math.log10(80), 1500, dtype=dtype, device=DEVICE)
    near = torch.linspace(0.5, 0.6, 500, dtype=dtype, device=DEVICE)  # where two formulas meet
    x = torch.cat([sizes, near])
    x = torch.cat([x, -x])
    got = elementwise(x, dtype, function)
    with mpmath.workprec(100):
        worst = max(
            abs((mpmath.mpf(y) - true(v)) / true(v))
            for v, y in zip(x.tolist(), got.tolist(), strict=True)
        )
    eps = torch.finfo(dtype).eps
    assert worst <= ulps * eps, f"{float(worst) / eps:.2f} ulp"
    special = torch.tensor([0.0, math.inf, -math.inf, math.nan], dtype=dtype, device=DEVICE)
    expected = torch.tensor([(1 + low) / 2, 1.0, low, math.nan], dtype=dtype, device=DEVICE)
    got = elementwise(special, dtype, function)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_storage_rounds_to_nearest(dtype):
    x = torch.randn(4000, device=DEVICE) * torch.logspace(-8, 4, 4000, device=DEVICE)
    special = [0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 1.9999999, math.inf, -math.inf, math.nan]
    x = torch.cat([x, torch.tensor(special, device=DEVICE)])
    torch.testing.assert_close(
        elementwise(x, dtype, "round"), x.to(dtype), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 256), (torch.float64, 128)])
def test_head_dim_limit(dtype, most):
    q = torch.zeros(1, 1, 2, most, device=DEVICE, dtype=dtype)
    functional.attention(q, q, q, backend="triton")
    q = torch.zeros(1, 1, 2, most + 1, device=DEVICE, dtype=dtype)
    with pytest.raises(
        ValueError, match=r"does not serve large_head; these can: (cpp, )?reference"
    ):
        functional.attention(q, q, q, backend="triton")


def last_line(code):
    """The last line that a fresh process, without the interpreter, writes to stderr."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert run.returncode != 0, run.stdout
    return run.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("before", "message"),
    [
        (
            "import sys; sys.modules['triton'] = None",
            "ImportError: the triton backend needs triton: pip install 'triton>=3.6'",
        ),
        (
            "import triton; triton.__version__ = '3.5.1'",
            "ImportError: the triton backend needs triton 3.6 or newer, found 3.5.1: "
            "pip install --upgrade 'triton>=3.6'",
        ),
    ],
)
def test_says_which_triton_it_needs(before, message):
    assert last_line(f"{before}; import pykernels.kernels") == message


def test_cpu_tensors_need_the_interpreter():
    code = (
        "import torch; from pykernels.kernels import rnn; x = torch.zeros(1, 1, 1);"
        "rnn.rnn_fwd(x, x[0], x[0], None, None, None, nonlinearity='tanh', reverse=False)"
    )
    assert last_line(code) == (
        "RuntimeError: the triton backend needs CUDA tensors, got one on cpu; on cpu tensors it "
        "runs with TRITON_INTERPRET=1 set before Python starts"
    )
