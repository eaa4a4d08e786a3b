"""Every Triton kernel, compiled for GPUs that need not be there; `-m sweep` takes every block size.

The launchers themselves run, on CPU tensors, under a driver that names a GPU and compiles for it
instead of launching: what is compiled is what would have run. The tools that Triton bundles then
read the machine code: no register may spill, shared memory must fit the chip, and the tensor cores
must do the products that they can do exactly.

Triton decides at import whether it interprets or compiles, so a process of its own compiles: this
file, run as a script, answers one case a line.
"""

import contextlib
import dataclasses
import importlib
import importlib.metadata
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import overflow
import pytest
import torch

_configs = pytest.importorskip("pykernels.kernels._configs", exc_type=ImportError)

TOGETHER = _configs.TOGETHER
RELEASE = tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])

#: Which case launches each kernel; a new kernel must be named here, and its case launch it.
KERNELS = {
    "product_kernel": "recurrent",
    "recurrence_kernel": "recurrent",
    "attention_fwd_kernel": "attention",
    "attention_bwd_delta_kernel": "attention",
    "attention_bwd_dq_kernel": "attention",
    "attention_bwd_dkv_kernel": "attention",
    "attention_bwd_dmask_kernel": "attention",
    "linear_cross_entropy_targets_kernel": "linear_cross_entropy",
    "linear_cross_entropy_logits_kernel": "linear_cross_entropy",
    "linear_cross_entropy_rows_kernel": "linear_cross_entropy",
    "linear_cross_entropy_gradient_kernel": "linear_cross_entropy",
    "linear_cross_entropy_scale_kernel": "linear_cross_entropy",
    "attention_fwd_sm90_kernel": "attention",
    "attention_bwd_dq_sm90_kernel": "attention",
    "attention_bwd_dkv_sm90_kernel": "attention",
}

#: The kernels in Gluon, by the table that says for which head dims they run instead of Triton's.
GLUON = {
    "attention_fwd_kernel": ("attention_fwd_sm90_kernel", _configs.ATTENTION_FWD_SM90),
    "attention_bwd_dq_kernel": ("attention_bwd_dq_sm90_kernel", _configs.ATTENTION_DQ_SM90),
    "attention_bwd_dkv_kernel": ("attention_bwd_dkv_sm90_kernel", _configs.ATTENTION_DKV_SM90),
}

#: What other ops launch too.
SHARED = {"product_kernel"}

#: The chips that each table of block sizes serves, as far as they are compiled for here.
CHIPS = {"sm_80": (80,), "sm_90": (90, 100)}
#: An AMD chip, as its number follows "gfx", and the bytes of shared memory that a block may use.
GFX = 942
GFX_SHARED = 64 * 1024
#: The instructions of tensor cores, all and those of sm_90 and sm_100.
PRODUCTS = r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b"
HALF, BRAIN, SINGLE, DOUBLE = "float16", "bfloat16", "float32", "float64"


@dataclasses.dataclass(frozen=True)
class Case:
    """One forward and backward pass of an op, and the chip that it is compiled for."""

    op: str
    chip: int
    dtype: str
    size: int  # recurrent: H; attention: D; linear_cross_entropy: H
    batch: int = 1
    cell: str = "lstm"
    entry: int = -1  # of the table of shared units, in place of the one that a call would choose
    mask: str = "none"
    is_causal: bool = False
    heads: int = 4  # of queries, on two of keys and values
    queries: int = 64
    everything: bool = False  # what linear_cross_entropy can be asked for
    size_v: int | None = None  # D_v, where it is not D
    gluon: bool = True  # False: as with a Triton that has no Gluon, or not this one
    packed: bool = False  # attention_varlen, in a window
    rules: bool = False  # a cap, ALiBi, sinks and dropout
    huge: bool = False  # tensors of more than 2^31 elements, on the meta device

    @property
    def id(self):
        words = [self.op, f"sm{self.chip}", self.dtype, f"{self.size}"]
        if self.op == "recurrent":
            words[0] = self.cell
            words += [f"b{self.batch}"] + [f"entry{self.entry}"] * (self.entry >= 0)
        elif self.op == "linear_cross_entropy":
            words += [f"n{self.batch}"] + ["everything"] * self.everything
        else:
            words += [self.mask] * (self.mask != "none") + ["causal"] * self.is_causal
            words += ["alone"] * (self.heads == 2) + ["decode"] * (self.queries == 1)
            words += [f"v{self.size_v}"] * (self.size_v is not None)
            words += ["triton"] * (not self.gluon) + ["packed"] * self.packed
            words += ["rules"] * self.rules
        return "-".join(words + ["huge"] * self.huge)

    @property
    def launched(self):
        """The names of the kernels that this case launches."""
        names = {k for k, op in KERNELS.items() if op == self.op}
        sizes = self.size, self.size_v or self.size
        for triton, (gluon, table) in GLUON.items():
            runs = self.chip == 90 and self.dtype in (HALF, BRAIN) and self.mask == "none"
            runs = runs and self.gluon and not self.packed and not self.rules
            names.discard(triton if runs and sizes in table else gluon)
        if self.mask != "float":
            names.discard("attention_bwd_dmask_kernel")
        return names


def recurrent_entries():
    for table, chips in CHIPS.items():
        for chip in chips:
            for entry in _configs.ALONE[table]:
                cell = "lstm" if 4 * 2 * entry.block_n**2 <= entry.held else "rnn"
                # one row a program; as many as may be, of a size that fits no vector load
                yield Case("recurrent", chip, HALF, entry.block_n, 1, cell)
                if chip != 100:  # whose products here are those of sm_90
                    rows = 132 * entry.block_b
                    yield Case("recurrent", chip, HALF, entry.block_n - 1, rows, cell)
            for dtype, entries in _configs.TOGETHER[table].items():
                for index, entry in enumerate(entries):
                    # the largest whose slice fits, or more than fits any
                    size = entry.held // (4 * dtype.itemsize * entry.block_n)
                    size = size // entry.block_k * entry.block_k or 1200
                    name, rows = str(dtype)[6:], entry.block_b
                    yield Case("recurrent", chip, name, size, rows, entry=index)


def recurrent_cases():
    for chip in (80, 90, 100):
        for cell, dtype in (("rnn", BRAIN), ("gru", SINGLE)):
            # enough rows for the large tiles of the products
            yield Case("recurrent", chip, dtype, 301, 160, cell)
    yield Case("recurrent", 90, DOUBLE, 301, 160, "gru")


def more_recurrent_cases():
    for chip in (80, 90, 100):
        yield Case("recurrent", chip, HALF, 301, 160, "gru")
        yield Case("recurrent", chip, SINGLE, 64, 1, "rnn")
    for chip in (80, 100):
        yield Case("recurrent", chip, DOUBLE, 301, 160, "gru")


def attention_entries():
    for table, chips in CHIPS.items():
        for dtype, blocks in _configs.ATTENTION_FWD[table].items():
            name = str(dtype)[6:]
            for block_d in blocks:
                for chip in chips:
                    if dtype == torch.float16:
                        yield Case("attention", chip, name, block_d, is_causal=True, gluon=False)
                        if len(blocks[block_d]) > 2:  # entries of their own for whole heads
                            yield Case("attention", chip, name, block_d, mask="float", rules=True)
                    elif chip != 80 and block_d not in (64, 256):
                        continue  # one table serves all chips: these two stand for it
                    # A mask, and a head dim that does not fill its block, take the most registers.
                    # Of 16-bit floats they have entries of their own in the tables.
                    for rules in (False, True):
                        yield Case(
                            *("attention", chip, name, block_d - 3),
                            mask="float",
                            is_causal=True,
                            rules=rules,
                        )


def attention_cases():
    for chip in (80, 90, 100):
        yield Case("attention", chip, BRAIN, 61, mask="float", rules=True)
    for chip in (80, 90):
        yield Case("attention", chip, HALF, 64, heads=2)
        yield Case("attention", chip, HALF, 128, queries=1)
        yield Case("attention", chip, HALF, 128, packed=True)
    yield Case("attention", 90, BRAIN, 64, mask="bool")
    yield Case("attention", 90, SINGLE, 64, is_causal=True)
    yield Case("attention", 90, DOUBLE, 64, mask="bool")
    for size, size_v in _configs.ATTENTION_FWD_SM90:
        yield Case("attention", 90, BRAIN, size, size_v=size_v, is_causal=True)


def more_attention_cases():
    for chip in (80, 100):
        yield Case("attention", chip, BRAIN, 64, mask="bool")
        yield Case("attention", chip, DOUBLE, 64, mask="bool")
    yield Case("attention", 100, HALF, 64, heads=2)
    yield Case("attention", 100, HALF, 128, queries=1)
    yield Case("attention", 100, HALF, 128, packed=True)
    yield Case("attention", 90, HALF, 128, rules=True, packed=True)
    yield Case("attention", 90, SINGLE, 64, mask="float", rules=True, is_causal=True)
    yield Case("attention", 90, DOUBLE, 64, packed=True)
    for size, size_v in _configs.ATTENTION_FWD_SM90:
        yield Case("attention", 90, HALF, size, size_v=size_v)
        yield Case("attention", 90, HALF, size, size_v=size_v, is_causal=True)


def loss_cases():
    for chip in (80, 90, 100):
        yield Case("linear_cross_entropy", chip, HALF, 64, batch=9)  # tiles for few rows
        # rows that descriptors can address, with the registers of the largest tiles
        yield Case("linear_cross_entropy", chip, BRAIN, 64, batch=300)
    yield Case("linear_cross_entropy", 90, SINGLE, 64, batch=160, everything=True)


def more_loss_cases():
    for chip in (80, 90, 100):
        for dtype in (SINGLE, DOUBLE):
            yield Case("linear_cross_entropy", chip, dtype, 64, batch=9)
        for dtype in (HALF, SINGLE, DOUBLE):
            if (chip, dtype) != (90, SINGLE):
                yield Case("linear_cross_entropy", chip, dtype, 64, batch=160, everything=True)
        # rows that descriptors cannot address
        yield Case("linear_cross_entropy", chip, BRAIN, 67, batch=300, everything=True)


def amd_cases():
    """Every kernel once: that they lower to AMD's instructions, and fit."""
    yield Case("recurrent", GFX, HALF, 64)
    if RELEASE >= (3, 7):  # a pass of 3.6 for AMD fails where a pointer is into one of two tensors
        yield Case("recurrent", GFX, SINGLE, 301, 160, "gru")
    yield Case("attention", GFX, HALF, 64, is_causal=True)
    yield Case("attention", GFX, HALF, 64, mask="float", rules=True)
    yield Case("linear_cross_entropy", GFX, HALF, 64, batch=160)


CASES = [*recurrent_cases(), *attention_cases(), *loss_cases(), *amd_cases()]
#: Every entry of the tables and what differs little: minutes, so that they are compiled where
#: `-m sweep` asks for them.
SWEEP = [
    *recurrent_entries(),
    *attention_entries(),
    *more_recurrent_cases(),
    *more_attention_cases(),
    *more_loss_cases(),
]


def test_every_kernel_is_listed():
    package = importlib.import_module("pykernels.kernels")
    found = set()
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"pykernels.kernels.{info.name}")
        found |= {name for name in vars(module) if name.endswith("_kernel")}
    assert found == set(KERNELS)
    assert {case.op for case in CASES} == set(KERNELS.values())
    for chip in (80, 90, 100):
        launched = set().union(*(case.launched for case in CASES if case.chip == chip))
        assert launched == {k for k in KERNELS if chip == 90 or "sm90" not in k}


@pytest.fixture(scope="session")
def compiler(tmp_path_factory):
    """A function from a Case to the resources of every kernel that it launches."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    base = tmp_path_factory.getbasetemp()
    # one cache for all workers of xdist, whose directories lie side by side
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    environment["TRITON_CACHE_DIR"] = str(shared / "triton")
    process = subprocess.Popen(
        [sys.executable, __file__],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def compile_case(case):
        process.stdin.write(json.dumps(dataclasses.asdict(case)) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        assert answer, "the compiling process ended"
        return json.loads(answer)

    yield compile_case
    process.stdin.close()
    process.wait(timeout=60)


#: Offsets past 2^31 elements, through pointers and, where a chip has them, descriptors.
HUGE = [
    *(
        Case("recurrent", chip, HALF, 1024, 2**11, cell, huge=True)
        for chip in (80, 90)
        for cell in ("rnn", "gru", "lstm")
    ),
    *(
        Case("attention", chip, HALF, 64, mask=mask, huge=True)
        for chip in (80, 90)
        for mask in ("none", "bool", "float")
    ),
    Case("attention", 80, HALF, 64, packed=True, huge=True),
    *(
        Case("linear_cross_entropy", chip, HALF, size, 2**17, everything=everything, huge=True)
        for chip, size in ((80, 2**15), (90, 2**15), (90, 2**15 + 1))
        for everything in (False, True)
    ),
]


@pytest.mark.sweep
@pytest.mark.parametrize("case", HUGE, ids=lambda case: case.id)
def test_offsets_past_32_bits(case, compiler):
    answer = compiler(case)
    assert "error" not in answer, answer["error"]
    assert {kernel["name"] for kernel in answer["kernels"]} | SHARED == case.launched | SHARED
    assert not answer["overflows"]


def test_an_overflow_is_found():
    """Rows of 4096 numbers: the offset of row 2^19 takes 32 bits and a sign."""
    ir = """
    tt.func public @kernel(%x: !tt.ptr<f16> {tt.divisibility = 16 : i32} loc("x"), %stride: i32) {
      %row = tt.get_program_id x : i32 loc(#loc1)
      %at = arith.muli %row, %stride : i32 loc(#loc2)
      %wide = arith.extsi %row : i32 to i64 loc(#loc3)
      %stride_0 = arith.extsi %stride : i32 to i64 loc(#loc3)
      %right = arith.muli %wide, %stride_0 : i64 loc(#loc3)
    """
    assert overflow.overflows(ir, {"x": None, "stride": 4096}, (2**19,)) == []
    found = overflow.overflows(ir, {"x": None, "stride": 4096}, (2**19 + 1,))
    assert found == ["%at = arith.muli %row, %stride : i32"]


@pytest.mark.parametrize(
    "case",
    [*CASES, *(pytest.param(case, marks=pytest.mark.sweep) for case in SWEEP)],
    ids=lambda case: case.id,
)
def test_compiles(case, compiler):
    answer = compiler(case)
    assert "error" not in answer, answer["error"]
    kernels = answer["kernels"]
    launched = {kernel["name"] for kernel in kernels}
    assert launched | SHARED == case.launched | SHARED
    amd = case.chip == GFX
    limit = GFX_SHARED if amd else _configs.SHARED_MEMORY[_configs.table(case.chip)]
    for kernel in kernels:
        assert kernel["stack"] == 0, f"spills: {kernel}"
        assert kernel["shared"] <= limit, (
            f"needs more than {limit} bytes of shared memory: {kernel}"
        )
        products = "".join(kernel["products"])
        if amd:
            assert case.dtype != HALF or bool(products) == (kernel["rows"] >= 16), kernel
        elif kernel["rows"] == 0:
            assert not products
        elif case.dtype == SINGLE:
            assert not kernel["tf32"], f"float32 must not be rounded to TF32: {kernel}"
            assert bool(products) == (kernel["precision"] == "bf16x6"), kernel
        elif case.dtype == DOUBLE:
            # older releases do not use the tensor cores of sm_100 for float64
            old = case.chip == 100 and RELEASE < (3, 9)
            assert products == ("" if old else "mma.sync"), kernel
        elif case.op == "recurrent" or case.chip == 80 or kernel["rows"] < 64:
            assert products, kernel
        else:
            assert products == {90: "wgmma.mma_async", 100: "tcgen05.mma"}[case.chip], kernel


# Below: the compiling process.


class Driver:
    """As much of a Triton driver as a compilation asks for: which GPU there is."""

    def __init__(self, chip, huge=False):
        self.chip = chip
        self.huge = huge

    def get_current_device(self):
        return self.chip  # a cache of compiled kernels for each chip

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        if self.chip == GFX:
            return GPUTarget("hip", f"gfx{GFX}", 64)
        return GPUTarget("cuda", self.chip, 32)


def launch_recurrent(case, dtype):
    """Two steps, as a single one needs no other program."""
    op, gates = case.cell, {"rnn": 1, "gru": 3, "lstm": 4}[case.cell]
    module = importlib.import_module(f"pykernels.kernels.{op}")
    T, B, I, H = 2**10 if case.huge else 2, case.batch, 48, case.size
    x, h0 = torch.zeros(T, B, I, dtype=dtype), torch.zeros(B, H, dtype=dtype)
    w_ih, w_hh, b = (torch.zeros(gates * H, *more, dtype=dtype) for more in ((I,), (H,), ()))
    own = {"rnn": {"nonlinearity": "tanh"}, "lstm": {"return_cell_states": True}}.get(op, {})
    states = (h0, h0, None) if op == "lstm" else (h0,)
    if case.entry >= 0:
        storage, entries = _configs.storage(dtype), TOGETHER[_configs.table(case.chip)]
        only = {storage: (entries[storage][case.entry],)}
        _configs.TOGETHER = {_configs.table(case.chip): only}
    else:
        _configs.TOGETHER = TOGETHER
    forward, backward = getattr(module, f"{op}_fwd"), getattr(module, f"{op}_bwd")
    outputs, saved = forward(x, w_ih, w_hh, b, b, *states, reverse=False, **own)
    backward(saved, outputs, needs=(True,) * (5 + len(states)), reverse=False, **own)


def launch_attention(case, dtype):
    from pykernels.kernels import _hopper, attention, attention_varlen

    attention._hopper = _hopper if case.gluon else None
    tokens = 2**24 if case.huge else 64
    rules, asked = [None] * 3, {}
    if case.rules:
        rules = [torch.zeros(case.heads, dtype=dtype)] * 2 + [torch.zeros(1, dtype=torch.int64)]
        asked = {"softcap": 30.0, "dropout_p": 0.1}
    if case.packed:
        q, k = (torch.zeros(tokens, n, case.size, dtype=dtype) for n in (case.heads, 2))
        starts, used = torch.tensor([0, 30, 64]), torch.tensor([9, 34])
        options = {"band": (-20, 0), "ends_meet": True, "scale": 0.125, **asked}
        run = attention_varlen.attention_varlen_fwd
        places = (starts, starts, used, None)
        outputs, saved = run(q, k, k, *rules, *places, **options)
        needs = (True, True, True, case.rules)
        attention_varlen.attention_varlen_bwd(saved, outputs, needs=needs, **options)
        pages = k.reshape(tokens // 16, 16, *k.shape[1:])
        places = (starts, None, used, torch.tensor([[0, 1, 2], [3, 0, 1]], dtype=torch.int32))
        run(q, pages, pages, *rules, *places, **options)
        return
    B, S_q, S_k = (2**8, 2**16, 2**16) if case.huge else (1, case.queries, 64)
    q = torch.zeros(B, case.heads, S_q, case.size, dtype=dtype)
    k = torch.zeros(B, 2, S_k, case.size, dtype=dtype)
    v = torch.zeros(B, 2, S_k, case.size_v or case.size, dtype=dtype)
    mask = {
        "none": None,
        "bool": torch.ones(S_q, S_k) > 0,
        "float": torch.zeros(S_q, S_k, dtype=dtype),
    }[case.mask]
    mask = None if mask is None else mask[None, None]
    options = {"band": (None, 0 if case.is_causal else None), "scale": 0.125, **asked}
    outputs, saved = attention.attention_fwd(q, k, v, mask, *rules, **options)
    needs = (True, True, True, case.mask == "float", case.rules, False, False)
    attention.attention_bwd(saved, outputs, needs=needs, **options)


def launch_linear_cross_entropy(case, dtype):
    from pykernels.kernels import _configs, linear_cross_entropy

    N, H, V = case.batch, case.size, 2**17 if case.huge else 300
    x, weight = torch.zeros(N, H, dtype=dtype), torch.zeros(V, H, dtype=dtype)
    bias = torch.zeros(V, dtype=dtype)
    target = torch.zeros(N, dtype=torch.int64)
    options = {"ignore_index": -100, "reduction": "mean"}
    options |= {"label_smoothing": 0.1 * case.everything, "z_loss": 0.1 * case.everything}
    asked = {"return_lse": case.everything, "return_argmax": case.everything}
    needs = (True, True, False, True, False)
    run = linear_cross_entropy.linear_cross_entropy_fwd
    alone = x, weight, target, None, None  # whose tiles are the widest
    run(*alone, **options, **asked)
    run(*alone, **options, **asked, ahead=needs)
    inputs = (x, weight, target, bias, bias if case.everything else None)
    run(*inputs, **options, **asked)  # without a gradient, so without logits in memory
    (loss, lse, _), saved = run(*inputs, **options, **asked, ahead=needs)
    linear_cross_entropy.linear_cross_entropy_scale(saved[6:], loss)
    run, saved = linear_cross_entropy.linear_cross_entropy_bwd, saved[:6]
    _configs.LOSS_ROWS = 128  # chunks, three of bfloat16, whose gradients add up
    run(saved, (loss, lse, None), needs=needs, **options)


def usage(compiled):
    """The registers and the bytes of stack of a thread, and the instructions of tensor cores."""
    import triton

    if "amdgcn" in compiled.asm:
        code = compiled.asm["amdgcn"]
        registers, stack = (
            int(re.search(rf"\.{name}:\s+(\d+)", code)[1])
            for name in ("vgpr_count", "private_segment_fixed_size")
        )
        return registers, stack, re.findall(r"\bv_mfma", code)
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [cuobjdump, "--dump-resource-usage", file.name]
        found = subprocess.check_output(command, text=True)
    registers, stack = (int(re.search(rf"{name}:(\d+)", found)[1]) for name in ("REG", "STACK"))
    return registers, stack, re.findall(PRODUCTS, compiled.asm["ptx"])


def resources(name, compiled, constants):
    """What is read from the machine code, and what Triton says itself."""
    registers, stack, products = usage(compiled)
    tile = "BLOCK_N" if "dkv" in name else "BLOCK_B" if "recurrence" in name else "BLOCK_M"
    hopper = "sm90" in name  # a warpgroup has 64 rows
    multiplies = "delta" not in name and (hopper or tile in constants)
    return {
        "name": name,
        "warps": compiled.metadata.num_warps,
        "registers": registers,
        "stack": stack,
        "shared": compiled.metadata.shared,
        # the rows of a tile of scores, states or products; the newest instructions want 64 or more
        # and 0 where there is no product
        "rows": (64 if hopper else constants[tile]) if multiplies else 0,
        "products": sorted(set(products)),
        "precision": constants.get("PRECISION", "ieee"),
        "tf32": "tf32" in compiled.asm.get("ptx", ""),
    }


def serve():
    """Answer each case on stdin by one line on stdout."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    for op in ("rnn", "gru", "lstm", "attention", "linear_cross_entropy"):
        importlib.import_module(f"pykernels.kernels.{op}")
    modules = [m for name, m in sys.modules.items() if name.startswith("pykernels.kernels.")]
    known, used, checked, wrong = {}, {}, set(), []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        if driver.active.chip == GFX:
            del options["maxnreg"]  # as `LAUNCH` has none on a torch for AMD
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if kernel.hash not in known:
            known[kernel.hash] = resources(self.__name__, kernel, options)
        used[kernel.hash] = known[kernel.hash]
        values = dict(zip(self.arg_names, args, strict=False)) | options
        sizes = kernel.hash, grid, *(v for v in values.values() if isinstance(v, int))
        if driver.active.huge and sizes not in checked:
            checked.add(sizes)
            ir = kernel.asm.get("ttir", kernel.asm["ttgir"])
            found = overflow.overflows(ir, values, grid)
            wrong.extend(f"{self.__name__}{grid}: {line}" for line in found)

    JITFunction.run = compile_only
    torch._assert_async = lambda *_: None  # no kernel runs, so its number may be any
    for line in sys.stdin:
        case = Case(**json.loads(line))
        driver.set_active(Driver(case.chip, case.huge))
        for module in modules:
            if hasattr(module, "on_device_of"):
                module.on_device_of = lambda tensor: contextlib.nullcontext()
            if hasattr(module, "capability"):
                # AMD's chips have the tables of the lowest
                module.capability = lambda device, chip=case.chip: 80 if chip == GFX else chip
            if hasattr(module, "multiprocessors"):
                module.multiprocessors = lambda device: 132
        for record in (used, checked, wrong):
            record.clear()
        sys.modules["pykernels.kernels._launch"]._found.clear()  # of another chip
        try:
            with torch.device("meta" if case.huge else "cpu"):
                globals()[f"launch_{case.op}"](case, getattr(torch, case.dtype))
            answer = {"kernels": list(used.values()), "overflows": wrong}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve()
