"""What the benchmark needs of a GPU: its clock, its rates, its cache, and whom else it times.

Needs nothing but torch: it runs on a machine without a network.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

#: A set of inputs comes again after this many times what the second-level cache holds.
CACHES = 2
#: M = N = K of the products that show the matrix rate, and bytes of the copy: each takes
#: milliseconds, and the arrays are many times the cache.
MATRIX = 8192
COPIED = 2**31
SAMPLES = 7

SDPA = {
    "torch cudnn": SDPBackend.CUDNN_ATTENTION,
    "torch flash": SDPBackend.FLASH_ATTENTION,
    "torch efficient": SDPBackend.EFFICIENT_ATTENTION,
}
COMPILED = "torch.compile"
#: Implementations beside stock torch's default.
PEERS = (*SDPA, COMPILED)


def seconds(call: Callable[[], object], count: int) -> float:
    """The time of `count` calls between two events on the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@functools.cache
def matrix_rate(dtype: torch.dtype) -> float:
    """Floating-point operations a second of torch's large product of random matrices."""
    a, b = (torch.randn(MATRIX, MATRIX, device="cuda", dtype=dtype) for _ in range(2))
    return 2 * MATRIX**3 / _median(functools.partial(torch.matmul, a, b, out=torch.empty_like(a)))


@functools.cache
def copy_rate() -> float:
    """Bytes a second that a copy within the device reads and writes."""
    source = torch.randint(256, (COPIED,), device="cuda", dtype=torch.uint8)
    return 2 * COPIED / _median(functools.partial(torch.empty_like(source).copy_, source))


def _median(call: Callable[[], object]) -> float:
    seconds(call, 2)
    return statistics.median(seconds(call, 1) for _ in range(SAMPLES))


def sets(inputs: Iterable[Tensor]) -> int:
    """How many sets of such inputs the cache cannot hold."""
    cache = torch.cuda.get_device_properties().L2_cache_size
    held = sum(tensor.untyped_storage().nbytes() for tensor in inputs)
    return 1 + math.ceil(CACHES * cache / max(held, 1))


def flattened(op: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs of a recurrent op with the weights in one piece, as torch.nn lays them for cuDNN.

    Else cuDNN's layers gather them at each call.
    """
    names = [name for name in ("w_ih", "w_hh", "b_ih", "b_hh") if name in inputs]
    x, w_hh = inputs["x"], inputs["w_hh"]
    kind, sizes = getattr(torch.nn, op.upper()), (x.shape[2], w_hh.shape[1])
    # not on the device at once, which would draw weights, hundreds of times
    layer = kind(*sizes, bias="b_ih" in inputs, device="meta", dtype=x.dtype)
    layer.to_empty(device=x.device)
    with torch.no_grad():
        for name, parameter in zip(names, layer.parameters(), strict=True):
            parameter.copy_(inputs[name])
    layer.flatten_parameters()
    return {**inputs, **{n: p.detach() for n, p in zip(names, layer.parameters(), strict=True)}}


def peers(op: str, stock: functools.partial[object]) -> dict[str, Callable[..., object]]:
    """What torch offers for `op` besides its default, by name."""
    if op == "attention":
        options = stock.keywords
        return {name: functools.partial(_attention, sdpa, **options) for name, sdpa in SDPA.items()}
    return {COMPILED: torch.compile(stock)} if op == "linear_cross_entropy" else {}


def _attention(
    backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, **_: object
) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
