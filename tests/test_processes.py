"""Our ops among Python threads, forked and spawned processes, and in torch's data parallelism."""

import multiprocessing
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import cases
import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Dataset

from pykernels import functional, nn
from pykernels.testing import evaluate
from pykernels.testing.specs import find

GATES = {"rnn": 1, "gru": 3, "lstm": 4}
LONG = 0.02  # seconds that a kernel must take for a thread beside it to show
LARGE, SMALL = 1024, 64  # some tenths of a second on one thread, and some milliseconds at most
OPS = (
    "rnn",
    "gru",
    "lstm",
    "attention",
    "attention_backward",
    "attention_varlen",
    "linear_cross_entropy",
)


def sized(op, rows):
    """A call of which the kernel takes a time that grows with `rows`."""
    if op == "linear_cross_entropy":
        x, weight = torch.randn(rows, 512), torch.randn(10000, 512)
        return lambda: functional.linear_cross_entropy(x, weight, torch.arange(rows))
    if op.startswith("attention"):
        q = torch.randn(4 * rows, 4, 64)
        if op == "attention_varlen":
            return lambda: functional.attention_varlen(q, q, q, torch.tensor([0, 4 * rows]))
        q = q.transpose(0, 1)[None]
        if op == "attention":
            return lambda: functional.attention(q, q, q)
        lse = torch.randn(q.shape[:3])
        return lambda: functional.attention_backward(q, q, q, q, q, lse)
    gates = GATES[op]
    weights = torch.randn(2, gates * 512, 512)
    args = torch.randn(rows // (4 * gates), 64, 512), *weights
    return lambda: getattr(functional, op)(*args)


@pytest.mark.parametrize("op", OPS)
def test_python_goes_on_beside_a_kernel(op, threads):
    """While one thread is in a kernel, another never waits for as long as the kernel takes."""
    threads(1)
    run, spent = sized(op, LARGE), []

    def work():
        begin = time.perf_counter()
        run()
        spent.append(time.perf_counter() - begin)

    worker = threading.Thread(target=work)
    longest, before = 0.0, time.perf_counter()
    worker.start()
    while worker.is_alive():
        now = time.perf_counter()
        longest, before = max(longest, now - before), now
    assert spent[0] > LONG
    assert longest < spent[0] / 2, f"{longest * 1e3:.0f} of {spent[0] * 1e3:.0f} ms"


@pytest.mark.parametrize("op", OPS)
def test_kernels_run_beside_a_kernel(op, threads):
    """While one thread is in a kernel, another begins and ends kernels for most of that time."""
    threads(1)
    long, short, spans = sized(op, LARGE), sized(op, SMALL), []

    def timed(run):
        begin = time.perf_counter()
        run()
        return begin, time.perf_counter()

    worker = threading.Thread(target=lambda: spans.append(timed(long)))
    worker.start()
    beside = []
    while worker.is_alive():
        beside.append(timed(short))
    ((first, last),) = spans
    within = sum(end - begin for begin, end in beside if first < begin and end < last)
    assert last - first > LONG
    assert within > (last - first) / 2, f"{within * 1e3:.0f} of {(last - first) * 1e3:.0f} ms"


@pytest.mark.parametrize(
    "name",
    [
        "rnn-h340",
        "gru-h340",
        "lstm-h340",
        "attention-s129",
        "attention_varlen-causal",
        "linear_cross_entropy-s193",
    ],
)
def test_the_number_of_threads_changes(name, threads):
    """Between calls, and in Python threads that set their own: right, and the same bits again."""
    spec, found = find(name), {}

    def outcome(count):
        torch.set_num_threads(count)
        assert torch.get_num_threads() == count
        return evaluate.ours(spec, torch.float32, "cpp", "cpu", 0)

    for count in (1, 2, 1, 2):
        threads(count)
        evaluate.check(spec, torch.float32, "cpp")
        cases.same_bits(found.setdefault(count, outcome(count)), outcome(count))
    counts = (1, 2, 1, 2, 2, 1)
    with ThreadPoolExecutor(3) as pool:
        for count, other in zip(counts, pool.map(outcome, counts), strict=True):
            cases.same_bits(found[count], other)


class Model(torch.nn.Module):
    """A layer of every kind, from x [B, T, 6] and classes [B] to a loss."""

    def __init__(self):
        super().__init__()
        self.rnn, self.gru = nn.RNN(6, 8, batch_first=True), nn.GRU(8, 8, batch_first=True)
        self.lstm, self.cell = nn.LSTM(8, 8, batch_first=True), nn.LSTMCell(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.loss = nn.LinearCrossEntropyLoss(8, 5)

    def forward(self, x, target):
        for layer in (self.rnn, self.gru, self.lstm):
            x, _ = layer(x)
        x, _ = self.attention(x, x, x, need_weights=False)
        return self.loss(self.cell(x[:, -1])[0], target)


def batch():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 5, 6, dtype=torch.float64, generator=generator)
    return x, torch.tensor([0, 3, 1, 4])


def trained(model, x, target, wrapped=None):
    """The loss and the parameters after two steps."""
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(2):
        optimizer.zero_grad()
        loss = (wrapped or model)(x, target)
        loss.backward()
        optimizer.step()
    return [loss.detach(), *(p.detach() for p in model.parameters())]


class Losses(Dataset):
    """Items that a worker process computes with the model, forward and backward."""

    def __init__(self, model):
        self.model = model

    def __len__(self):
        return 2

    def __getitem__(self, i):
        x, target = batch()
        loss = self.model(x + i, target)
        return [loss.detach(), *torch.autograd.grad(loss, list(self.model.parameters()))]


@pytest.mark.parametrize("kind", ["fork", "spawn"])
def test_workers_of_a_data_loader(kind, threads):
    """After the parent has run kernels on several threads, workers run them too."""
    threads(2)
    data = Losses(Model().double())
    here = [data[i] for i in range(2)]
    loader = DataLoader(
        data, batch_size=None, num_workers=1, multiprocessing_context=kind, timeout=60
    )
    for found, expected in zip(loader, here, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def small():
    """A call of each op too small for torch's own threads, on numbers made before."""
    torch.manual_seed(0)
    x, q, vocabulary = torch.randn(9, 16, 32), torch.randn(70, 4, 16), torch.randn(400, 32)
    weights = {op: torch.randn(2, gates * 32, 32) / 4 for op, gates in GATES.items()}
    return [
        *(getattr(functional, op)(x, *weights[op])[0] for op in GATES),
        functional.attention(*[q.transpose(0, 1)[None]] * 3),
        functional.attention_varlen(q, q, q, torch.tensor([0, 30, 70])),
        functional.linear_cross_entropy(x[0], vocabulary, torch.arange(16)),
    ]


def forked(expected):
    """In the process itself, and in a thread that it starts."""
    assert torch.get_num_threads() == 2
    with ThreadPoolExecutor(1) as pool:
        for found in (small(), pool.submit(small).result()):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_runs_kernels_that_its_parent_ran_on_threads(threads):
    """The threads stay behind, and the number that torch would use does not change."""
    threads(2)
    child = multiprocessing.get_context("fork").Process(target=forked, args=(small(),))
    child.start()
    child.join(60)
    hangs = child.is_alive()
    child.kill()
    assert not hangs
    assert child.exitcode == 0


def rank(number, folder):
    """One of two processes, each with half of the batch: DDP, then FSDP."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/met", rank=number, world_size=2)
    x, target = (t.chunk(2)[number] for t in batch())
    model = torch.load(f"{folder}/model", weights_only=False)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    ddp = trained(model, x, target, wrapped)

    model = torch.load(f"{folder}/model", weights_only=False)
    for layer in model.children():
        fully_shard(layer)
    fully_shard(model)
    assert all(type(p.data).__name__ == "DTensor" for p in model.parameters())
    loss, *sharded = trained(model, x, target)
    torch.save((ddp, [loss, *(p.full_tensor() for p in sharded)]), f"{folder}/{number}")
    dist.barrier()  # nobody leaves while another still waits for it
    dist.destroy_process_group()
    # Past what a process does at its end: threads of torch's own are sometimes still there then,
    # and abort it (https://github.com/pytorch/pytorch/issues/190489).
    os._exit(0)


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_train_as_one(tmp_path):
    """Data parallel, with whole parameters (DDP) and sharded ones (FSDP2)."""
    model = Model().double()
    torch.save(model, tmp_path / "model")
    loss, *parameters = trained(model, *batch())
    torch.multiprocessing.spawn(rank, (os.fspath(tmp_path),), nprocs=2)
    found = [torch.load(tmp_path / str(number)) for number in range(2)]
    for way in range(2):
        losses = [each[way][0] for each in found]
        torch.testing.assert_close(sum(losses) / 2, loss, rtol=1e-10, atol=1e-12)
        for each in found:
            torch.testing.assert_close(each[way][1:], parameters, rtol=1e-10, atol=1e-12)
