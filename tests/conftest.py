"""Settings that hold for every test.

Triton's interpreter is chosen before anything can import `pykernels.kernels`: without a GPU it is
how its kernels run.
"""

import torch  # noqa: I001  first: the C++ kernels share its OpenMP runtime

import fcntl
import gc
import os
import tempfile
from pathlib import Path

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Graphs that torch.compile has kept on disk are of some other state of the operators.
os.environ["TORCHINDUCTOR_FX_GRAPH_CACHE"] = os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"

import pytest


def pytest_configure(config):
    # float32 means float32: cuDNN's recurrent layers, a measure here, would round it to TF32
    torch.backends.cudnn.allow_tf32 = False
    # Workers of xdist share the cores; tests that are about threads set their own number.
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def pytest_collection_finish():
    # Modules and tests stay to the end: the collector would look through them all again and again.
    gc.freeze()


@pytest.fixture(autouse=True)
def poison():
    """torch fills every tensor that it returns uninitialised with NaN, or the largest integer.

    So an output that a kernel leaves unwritten, or reads before it has written it, shows in the
    result.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def huge_alone(request):
    """Tensors that only reserve addresses on a CPU take a GPU's memory: a worker at a time."""
    if not torch.cuda.is_available() or "huge-stride-triton" not in request.node.name:
        yield
        return
    path = Path(tempfile.gettempdir(), f"pykernels-huge-{os.getuid()}.lock")
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture
def threads():
    """A function that sets torch's number of threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
