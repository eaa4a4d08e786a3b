"""What is timed: one spec at one dtype, as calls of ours, of the reference and of stock torch."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import gpu
import peers
import timing
import torch
from torch import Tensor

from pykernels import __main__ as about
from pykernels import _backends, cost, functional
from pykernels.testing import evaluate, stock
from pykernels.testing.specs import (
    ATTENTION_SPECS,
    GPU_SPECS,
    GRU_SPECS,
    LINEAR_CROSS_ENTROPY_SPECS,
    LSTM_SPECS,
    RNN_SPECS,
    AttentionSpec,
    LinearCrossEntropySpec,
    Spec,
    tagged,
)
from pykernels.testing.tolerance import Measured, measure

SPECS: dict[str, list[Spec]] = {
    "rnn": [*RNN_SPECS],
    "gru": [*GRU_SPECS],
    "lstm": [*LSTM_SPECS],
    "attention": [*ATTENTION_SPECS],
    "linear_cross_entropy": [*LINEAR_CROSS_ENTROPY_SPECS],
}
RECURRENT = ("rnn", "gru", "lstm")
IMPLEMENTATIONS = ("ours", "torch", "reference")
PASSES = ("forward", "forward+backward")
FMA_SECONDS = 0.02
#: Scores or logits of the inputs that are compared on a GPU: a gigabyte in float64.
COMPARED = 2**27
#: Numbers of a copy that is timed: 128 MiB, more than caches hold.
COPIED = 2**25
DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}


def timed_on(device: str) -> dict[str, list[Spec]]:
    """The specs that are timed there, by op; the tag "quick" marks those of a quick run."""
    return GPU_SPECS if device == "cuda" else {op: tagged(of, "bench") for op, of in SPECS.items()}


def full_precision() -> None:
    """float32 means float32: cuDNN's recurrent layers would round it to TF32 by default."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def fma_rate(dtype: str, threads: int) -> list[float]:
    """Floating-point operations a second that registers alone reach; empty without C++ kernels."""
    if _backends.available("cpp") is not None:
        return []
    kind = "float64" if dtype == "float64" else "float32"  # 16 bits compute in it
    return [_backends.load_extension().fma_rate(kind, threads, FMA_SECONDS)]


@functools.cache
def copy_rate(threads: int) -> float:
    """Bytes a second that a copy reads and writes, on arrays that no cache holds."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    source, target = torch.ones(COPIED), torch.empty(COPIED)
    target.copy_(source)  # the first touch of a page is no copy
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        best = max(best, 2 * source.nbytes / (time.perf_counter() - start))
    torch.set_num_threads(before)
    return best


@dataclass(frozen=True)
class Setting:
    """One spec at one dtype on one backend; None is the fastest backend that serves it."""

    spec: Spec
    dtype: str
    device: str = "cpu"
    backend: str | None = None

    def check(self) -> dict[str, Measured]:
        """The error of ours in every output and gradient, and what the tolerance rule allows."""
        spec = compared(self.spec) if self.device == "cuda" else self.spec
        dtype = DTYPES[self.dtype]
        truth, stocks = (get(spec, dtype, self.device) for get in (evaluate.truth, evaluate.stock))
        actual = evaluate.ours(spec, dtype, self.backend, self.device)
        floor = evaluate.floor(spec, dtype)
        found = {
            name: measure(actual[name], truth[name], stocks[name], dtype, floor=floor[name])
            for name in truth
        }
        if self.device == "cuda":  # the large ones are not needed twice
            evaluate.truth.cache_clear()
            evaluate.stock.cache_clear()
            torch.cuda.empty_cache()
        return found

    def takes_peers(self, which: str) -> bool:
        """Whether `peers` know how to run this: plain, forward, float32, on the CPU."""
        return (
            self.spec.op in (*RECURRENT, "attention")
            and (which, self.dtype, self.device) == ("forward", "float32", "cpu")
            and not self.spec.features(DTYPES[self.dtype])
        )

    def peer(self, name: str, threads: int) -> peers.Peer:
        """Another library's op on the same inputs, in its own process."""
        inputs = self.spec.inputs(DTYPES[self.dtype])
        arrays = {n: t.numpy() for n, t in inputs.items()}
        return peers.Peer(name, self.spec.op, arrays, self.spec.options, threads)

    def check_peer(self, peer: peers.Peer) -> dict[str, Measured]:
        """`check` of a peer's outputs."""
        spec, dtype = self.spec, DTYPES[self.dtype]
        truth, stocks = evaluate.truth(spec, dtype), evaluate.stock(spec, dtype)
        return {
            name: measure(torch.from_numpy(output), truth[name], stocks[name], dtype)
            for name, output in zip(spec.outputs, peer.outputs, strict=False)  # none gives an lse
        }

    def backend_of(self, implementation: str) -> str:
        """The backend behind an implementation's calls; empty for stock torch and the peers."""
        if implementation != "ours":
            return "reference" if implementation == "reference" else ""
        device, dtype = torch.device(self.device), DTYPES[self.dtype]
        features = self.spec.features(dtype)
        return about.serving(self.spec.op, self.backend, device, dtype, features)

    def cost(self, which: str) -> cost.Cost:
        """The operations of one call and the bytes that it must move."""
        return count(self.spec, which, DTYPES[self.dtype].itemsize)

    def calls(self, which: str) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
        """Calls without arguments, by implementation, on tensors that they share.

        They return the outputs if `which` is "forward", else the gradients of all inputs but the
        mask under random upstream gradients. Ours forward is that of frozen weights, which it packs
        in the first call alone. Attention is asked for no log-sum-exp: torch's gives
        none. On a GPU, calls take sets of inputs in turn that its cache does not hold together.
        """
        inputs = self.spec.inputs(DTYPES[self.dtype], self.device)
        copies = gpu.sets(inputs.values()) if self.device == "cuda" else 1
        given = [inputs, *({n: t.clone() for n, t in inputs.items()} for _ in range(copies - 1))]
        ours = functools.partial(getattr(functional, self.spec.op), **self.spec.options)
        torchs = functools.partial(getattr(stock, self.spec.op), **self.spec.options)
        functions = {
            "ours": functools.partial(ours, backend=self.backend),
            "torch": torchs,
            "reference": functools.partial(ours, backend="reference"),
        }
        if self.device == "cuda":
            functions |= gpu.peers(self.spec.op, torchs)
        if which == "forward":
            if self.spec.op in RECURRENT:
                # As our layers in evaluation, and as the peers, which pack when they are built.
                packed = functional.PackedWeights()
                functions["ours"] = functools.partial(functions["ours"], packed=packed)
            make = _forward
        else:
            upstream = [torch.randn_like(out) for out in _forward(torchs, inputs)()]
            wanted = [n for n in evaluate.differentiable(self.spec, inputs) if n != "attn_mask"]
            make = functools.partial(_both, wanted=wanted, upstream=upstream)
        if self.device == "cpu":
            return {name: make(f, inputs) for name, f in functions.items()}
        flat = self.spec.op in RECURRENT
        laid = [gpu.flattened(self.spec.op, each) for each in given] if flat else given
        return {
            name: timing.in_turn([make(f, each) for each in (laid if name == "torch" else given)])
            for name, f in functions.items()
        }


def compared(spec: Spec) -> Spec:
    """`spec` with fewer heads or rows and words, if the truth of all would not fit a GPU.

    Heads, as rows and words, are independent pieces of the same work.
    """
    if isinstance(spec, AttentionSpec):
        heads = max(1, COMPARED // (spec.s_q * spec.s_k))
        if heads < spec.b * spec.n:
            return dataclasses.replace(spec, b=1, n=heads, n_kv=heads)
    if isinstance(spec, LinearCrossEntropySpec):
        words = min(spec.v, 2**15)
        return dataclasses.replace(spec, lead=(min(spec.sizes["N"], COMPARED // words),), v=words)
    return spec


def count(spec: Spec, which: str, itemsize: int) -> cost.Cost:
    """The cost of one call of `spec`."""
    if spec.op in RECURRENT:
        rest = {"bias": spec.bias, "initial_state": spec.h0, "lengths": spec.lengths}
        if spec.op == "lstm":
            rest["proj_size"] = spec.proj_size
    elif spec.op == "attention":
        rest = {"is_causal": spec.is_causal, "window": spec.window}
    else:
        rest = {"bias": spec.bias}
    return getattr(cost, spec.op)(**spec.sizes, **rest, itemsize=itemsize, which=which)


def _forward(function: Callable, inputs: dict[str, Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    @torch.no_grad()
    def forward() -> tuple[Tensor, ...]:
        return evaluate.flat(function(**inputs))

    return forward


def _both(
    function: Callable, inputs: dict[str, Tensor], wanted: list[str], upstream: list[Tensor]
) -> Callable[[], tuple[Tensor, ...]]:
    leaves = {n: inputs[n].detach().requires_grad_() for n in wanted}

    def both() -> tuple[Tensor, ...]:
        outputs = evaluate.flat(function(**{**inputs, **leaves}))
        return torch.autograd.grad(outputs, list(leaves.values()), upstream)

    return both
