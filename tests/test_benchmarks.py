"""The benchmark's own rules: fair turns, no time for a wrong kernel, no figure typed by hand."""

import argparse
import contextlib
import csv
import functools
import gc
import io
import itertools
import os
import platform
import signal
import subprocess
import sys

import commandline
import decoding
import environment
import errors
import gpu
import memory
import numpy as np
import overhead
import peers
import plot
import product
import pytest
import readme
import records
import recurrent
import run
import scaling
import timing
import torch
import workload
from rich.console import Console

from pykernels import _backends, functional
from pykernels.testing import measure, stock

QUICK = ["--quick", "--seconds", "0.02"]
SMALLEST = [*QUICK, "--op", "rnn", "--shapes", "rnn-1024x1x64x64", "--peers"]  # none
SHORT = ["--quick", "--seconds", "0.01", "--threads", "1"]
TINY = [*QUICK, "--sizes", "3", "2", "5", "4"]


class Clock:
    """Stands in for the time module: only the calls that are timed take time."""

    def __init__(self):
        self.now = 0.0
        self.log = []

    def perf_counter(self):
        return self.now

    def call(self, name, seconds):
        def advance():
            self.log.append(name)
            self.now += seconds

        return advance


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(timing, "time", made)
    return made


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_turns_rotate_and_medians_are_per_call(clock):
    calls = {"a": clock.call("a", 0.01), "b": clock.call("b", 0.02)}
    samples = timing.interleave(calls, 0.3)
    warm_up = 4
    assert clock.log[warm_up : warm_up + 6] == ["a", "b", "b", "a", "a", "b"]
    assert samples["a"].median == pytest.approx(0.01)
    assert samples["b"].quartiles == pytest.approx((0.02, 0.02))
    assert len(samples["a"].seconds) == len(samples["b"].seconds) == 10


def test_short_calls_are_timed_many_at_once(clock):
    samples = timing.interleave({"a": clock.call("a", 1e-5)}, 0.05)
    assert samples["a"].calls == pytest.approx(timing.SAMPLE_SECONDS / 1e-5, abs=1)
    assert samples["a"].median == pytest.approx(1e-5)


def test_the_slow_one_stands_back_but_is_timed(clock):
    calls = {"fast": clock.call("fast", 0.01), "slow": clock.call("slow", 1.0)}
    samples = timing.interleave(calls, 2.0, slow=["slow"])
    assert len(samples["slow"].seconds) == 1
    assert len(samples["fast"].seconds) >= 50


def test_least_rounds_and_rates_between(clock):
    seen = []
    samples = timing.interleave(
        {"a": clock.call("a", 3.0)}, 1.0, rounds=4, between=lambda: seen.append(gc.isenabled())
    )
    assert len(samples["a"].seconds) == 4
    assert 1 <= len(seen) <= 5
    assert not any(seen), "the garbage collector is off while it is timed"
    assert gc.isenabled()
    timing.interleave({"a": clock.call("a", 0.01)}, 2.0, between=lambda: seen.append(None))
    assert seen.count(None) == 5


def test_who_follows_another_process_runs_once_before(clock):
    def apart(calls):
        clock.log += ["apart"] * calls
        return 0.01 * calls

    calls = {"a": clock.call("a", 0.01), "b": clock.call("b", 0.01)}
    samples = timing.interleave(calls, 0.02, apart={"apart": apart}, rounds=3)
    warm_up = ["a"] * 2 + ["b"] * 2 + ["apart"] * 2
    rounds = [["a", "b", "apart"], ["b", "b", "apart", "a", "a"], ["apart", "a", "a", "b"]]
    assert clock.log == warm_up + [name for turn in rounds for name in turn]
    assert samples["apart"].median == pytest.approx(0.01)
    assert [len(samples[name].seconds) for name in ("a", "b", "apart")] == [3, 3, 3]


def test_rows_of_a_second_run_replace_those_of_the_first(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    records.merge(path, [{"shape": "a", "ms": "1"}, {"shape": "b", "ms": "2"}], ["shape"])
    records.merge(path, [{"shape": "b", "ms": "3", "more": "x"}], ["shape"])
    assert [row["ms"] for row in records.read(path)] == ["1", "3"]


def held(program, **variables):
    """What a program prints that can import the benchmarks."""
    variables = {**os.environ, **variables, "PYTHONPATH": str(records.HERE)}
    command = [sys.executable, "-c", program]
    return subprocess.check_output(command, env=variables, text=True).strip()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_that_was_given_back_is_kept():
    """A large block comes from the heap and not from the system, and the heap does not shrink."""
    program = """
import ctypes, environment
environment.hold()
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
before, block = libc.sbrk(0), libc.malloc(ctypes.c_size_t(2**24))
grown = libc.sbrk(0)
libc.free(ctypes.c_void_p(block))
print(grown - before >= 2**24, libc.sbrk(0) == grown)
"""
    assert held(program) == "True True"


@pytest.mark.parametrize("isa", environment.LIMITS)
def test_others_are_held_to_the_instruction_set_of_ours(isa):
    program = (
        "import torch, environment; environment.hold();"
        "print(torch.backends.cpu.get_cpu_capability())"
    )
    assert (
        held(program, PYKERNELS_ISA=isa).lower() == environment.LIMITS[isa]["ATEN_CPU_CAPABILITY"]
    )


def test_quick_run_writes_a_row_for_each(tmp_path, capsys):
    path = tmp_path / "speed.csv"
    assert run.main([*SMALLEST, "--output", str(path)]) == 0
    with path.open() as lines:
        rows = list(csv.DictReader(lines))
    assert [(row["pass"], row["implementation"]) for row in rows] == [
        (which, each) for which in workload.PASSES for each in workload.IMPLEMENTATIONS
    ]
    for row in rows:
        assert float(row["q1_ms"]) <= float(row["median_ms"]) <= float(row["q3_ms"])
        for column in (
            "commit",
            "date",
            "cpu",
            "cores",
            "isa",
            "torch_isa",
            "python",
            "torch",
            "pykernels",
        ):
            assert row[column]
        assert bool(row["scratch_mb"]) == (row["implementation"] == "ours")
    assert {row["times_torch"] for row in rows if row["implementation"] == "torch"} == {"1"}
    out = capsys.readouterr().out
    assert "rnn-1024x1x64x64" in out
    assert "of FMA" in out
    assert "rnn float32 forward, mean of 1: " in out
    assert plot.main(["--speed", str(path), "--output", str(tmp_path)]) == 0
    assert (tmp_path / "speed.png").stat().st_size > 10_000


def test_means_are_geometric():
    row = {"dtype": "float32", "pass": "forward", "implementation": "ours"}
    ratios = {"times_torch": "2", "times_best_peer": "0.5"}
    rows = [
        row | ratios | {"op": "gru", "shape": "gru-1x2x3x4"},
        row | ratios | {"op": "gru", "shape": "gru-2x2x3x4", "times_torch": "8"},
    ]
    rows.append(rows[0] | {"implementation": "torch", "times_torch": "1"})
    rows += [  # of which a mean would show little but the second and the third
        row | ratios | {"op": "attention", "shape": f"attention-{shape}", "times_torch": torchs}
        for shape, torchs in (("1x8x4x2", "2"), ("1x8x4x2-window2", "9"), ("decode-1x8x1x4x2", "9"))
    ]
    assert [*run.means(rows)] == [
        "gru float32 forward, mean of 2: 4.00 times as fast as torch, 0.50 as the best peer",
        "attention (whole sequences, no window) float32 forward, mean of 1: 2.00 times as fast as "
        "torch, 0.50 as the best peer",
    ]


@pytest.mark.parametrize("width", [80, 100, 200])
def test_the_table_fits_its_terminal(width):
    """Names of columns are never cut, and from 100 columns on no shape is."""
    console = Console(width=width, record=True, file=io.StringIO())
    rows = [r for r in records.read(records.newest("speed")) if r["dtype"] == "float32"]
    console.print(run.fitting(rows, console))
    lines = console.export_text().splitlines()
    text = " ".join(" ".join(lines).split())
    assert max(map(len, lines)) <= width
    assert "…" not in text
    assert ("scratch" in text) == ("onnxruntime" in text) == (width == 200)
    assert sum("forward" in line for line in lines) == 2 * len({r["shape"] for r in rows})
    if width > 80:
        assert "attention-1x8x4096x64-window256 " in text


def test_a_wrong_kernel_is_not_timed(tmp_path, capsys, monkeypatch):
    right = functional.rnn

    def wrong(*tensors, backend=None, **options):
        y, h_n = right(*tensors, backend=backend, **options)
        return (y, h_n) if backend == "reference" else (y * 1.001, h_n)

    monkeypatch.setattr(functional, "rnn", wrong)
    path = tmp_path / "speed.csv"
    assert run.main([*SMALLEST, "--output", str(path)]) == 1
    assert not path.exists()
    assert "WRONG, not timed: rnn-1024x1x64x64 float32 y: error" in capsys.readouterr().out


def test_the_reference_can_be_left_out(tmp_path):
    path = tmp_path / "speed.csv"
    assert run.main([*SMALLEST, "--no-reference", "--output", str(path)]) == 0
    assert {row["implementation"] for row in records.read(path)} == {"ours", "torch"}


@pytest.mark.parametrize("cut", [KeyboardInterrupt, MemoryError])
def test_what_was_measured_is_kept_when_a_run_is_cut_off(cut, tmp_path, capsys, monkeypatch):
    measure, measured = run.measure, []

    def once(case, *rest):
        if measured:
            raise cut
        measured.append(case)
        return measure(case, *rest)

    monkeypatch.setattr(run, "measure", once)
    path = tmp_path / "speed.csv"
    if cut is KeyboardInterrupt:
        assert run.main([*SMALLEST, "--output", str(path)]) == 130
        assert "Interrupted" in capsys.readouterr().out
    else:
        with pytest.raises(cut):
            run.main([*SMALLEST, "--output", str(path)])
    assert len(records.read(path)) == len(workload.IMPLEMENTATIONS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shapes", "nothing"], "matches none of rnn-50x1x300x512"),
        (["--threads", "0"], "--threads: must be positive"),
        (["--seconds", "-1"], "--seconds: must be positive"),
        (["--seconds", "inf"], "--seconds: must be positive and finite"),
        (["--output", "/dev/null/speed.csv"], "--output: /dev/null is not a folder"),
        (["--output", str(records.HERE)], "--output: " + str(records.HERE)),
        (["--output", str(readme.README)], "README.md holds no rows of this benchmark"),
        (["--op", "nothing"], "invalid choice: 'nothing'"),
        (["--peers", "nothing"], "invalid choice: 'nothing'"),
        (["--op", "rnn", "--backend", "nothing"], "invalid choice: 'nothing'"),
    ],
)
def test_refusals(arguments, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        run.main(arguments)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("kept", sorted(records.KEPT.glob("*.csv")), ids=lambda path: path.stem)
def test_no_benchmark_writes_into_the_file_of_another(kept):
    """Its rows would be told apart by fewer columns, and most be lost."""
    programs = {
        "speed": run,
        "gpu": run,
        "errors": errors,
        "scaling": scaling,
        "recurrent": recurrent,
        "product": product,
        "overhead": overhead,
        "decoding": decoding,
    }
    own = programs[kept.stem.rpartition("-")[2]]
    for program in {*programs.values()}:
        if program is own:
            assert commandline.result_file(str(kept), program.KEY) == kept
        else:
            with pytest.raises(argparse.ArgumentTypeError, match="holds no rows"):
                commandline.result_file(str(kept), program.KEY)


@pytest.mark.parametrize(
    "program",
    [decoding, errors, memory, overhead, plot, product, readme, recurrent, run, scaling],
    ids=lambda program: program.__name__,
)
def test_help_is_said_and_nothing_is_run(program, capsys):
    """A summary, the options and then what the docstring goes on to say."""
    with pytest.raises(SystemExit, match="0"):
        program.main(["--help"])
    out = capsys.readouterr().out
    for line in program.__doc__.strip().splitlines():
        assert line in out
    for mark in ("(default: None)", "(default: )", "(default: ["):
        assert mark not in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--speed", "none.csv"], "--speed: none.csv: No such file"),
        (["--errors", str(records.newest("speed"))], "holds no rows of this benchmark"),
        (["--speed", str(records.newest("gpu"))], "has no rows of a cpu device"),
        (["--gpu", str(records.newest("speed"))], "has no rows of a cuda device"),
        (["--output", str(readme.README)], "--output"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_a_line(arguments, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        plot.main(arguments)
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_a_backend_that_cannot_serve_is_said(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    _backends._select.cache_clear()
    with pytest.raises(SystemExit, match="2"):
        run.main(["--quick", "--backend", "triton"])
    assert "rnn: backend 'triton' cannot serve this call" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("program", [run, errors])
def test_no_gpu_is_said(program, capsys):
    with pytest.raises(SystemExit, match="2"):
        program.main(["--device", "cuda"])
    assert "torch sees no GPU" in capsys.readouterr().err


def test_errors_are_measured_and_drawn(tmp_path, capsys):
    path = tmp_path / "errors.csv"
    for op, shape in (("rnn", "plain"), ("attention", "mask-dead")):
        assert errors.main(["--op", op, "--shapes", shape, "--output", str(path)]) == 0
    rows = records.read(path)
    assert {row["dtype"] for row in rows} == set(workload.DTYPES)
    assert {row["tensor"] for row in rows if row["op"] == "attention"} == {
        *("out", "lse", "dq", "dk", "dv")
    }
    assert "0 beyond the tolerance rule" in capsys.readouterr().out
    assert plot.main(["--errors", str(path), "--output", str(tmp_path)]) == 0
    assert (tmp_path / "errors.png").stat().st_size > 10_000


def test_errors_that_were_measured_are_kept_on_interruption(tmp_path, capsys, monkeypatch):
    check, checked = workload.Setting.check, []

    def once(setting):
        if checked:
            raise KeyboardInterrupt
        checked.append(setting)
        return check(setting)

    monkeypatch.setattr(workload.Setting, "check", once)
    path = tmp_path / "errors.csv"
    assert errors.main(["--op", "rnn", "--shapes", "plain", "--output", str(path)]) == 130
    assert {row["dtype"] for row in records.read(path)} == {"float32"}
    assert "what was measured until then is kept" in capsys.readouterr().out


def test_errors_beyond_the_axes_are_at_their_edge():
    """A gradient that is nothing but rounding does not stretch them."""
    row = {"dtype": "float32", "scale": "1"}
    ulp = torch.finfo(torch.float32).eps
    rows = [row | {"error": str(e * ulp), "torch_error": str(e * ulp)} for e in (1, 1e15)]
    _, axis = plot.plt.subplots()
    plot.scatter(axis, rows)
    assert axis.get_xlim()[1] == axis.get_ylim()[1] == pytest.approx(plot.MOST)
    (dots,) = (found for found in axis.collections if found.get_label() == "float32")
    assert dots.get_offsets().max() == plot.MOST
    plot.plt.close()


def arrays(op, **without):
    """What a peer is given, small, with every argument but those that are False in `without`."""
    T, B, I, H, rows = 4, 3, 5, 6, 6 * len(peers.GATES[op])
    shapes = {
        **{"x": (T, B, I), "w_ih": (rows, I), "w_hh": (rows, H)},
        **({"b_ih": (rows,), "b_hh": (rows,)} if without.get("bias", True) else {}),
        **(dict.fromkeys(peers.STATES[op], (B, H)) if without.get("state", True) else {}),
    }
    draw = np.random.default_rng(0)
    return {name: draw.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def needs(peer):
    return pytest.mark.skipif(peer not in peers.installed(), reason=f"{peer} is not installed")


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs(name)) for name in peers.PEERS])
@pytest.mark.parametrize("op", workload.RECURRENT)
@pytest.mark.parametrize(
    ("reverse", "without"),
    [(False, {}), (True, {"bias": False}), (False, {"state": False})],
    ids=["all", "reverse-no-bias", "no-state"],
)
def test_peers_compute_what_torch_computes(name, op, reverse, without):
    given, options = arrays(op, **without), {"reverse": reverse}
    tensors = {n: torch.from_numpy(array) for n, array in given.items()}
    layer = getattr(stock, op)
    stocks, truth = (
        workload.evaluate.flat(layer(**{n: t.to(d) for n, t in tensors.items()}, **options))
        for d in (torch.float32, torch.float64)
    )
    with peers.Peer(name, op, given, {"nonlinearity": "tanh", **options}, 1) as peer:
        assert peer.seconds(2) > 0
    for output, exact, usual in zip(peer.outputs, truth, stocks, strict=True):
        found = measure(torch.from_numpy(output), exact, usual)
        assert found.ok, found
    assert peer.worker.returncode == 0


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs(name)) for name in peers.PEERS])
@pytest.mark.parametrize("is_causal", [False, True])
def test_peers_attend_as_torch_does(name, is_causal):
    draw = np.random.default_rng(0)
    given = {n: draw.standard_normal((2, 3, 7, 8), np.float32) for n in ("q", "k", "v")}
    usual, exact = (
        stock.attention(*(torch.from_numpy(a).to(d) for a in given.values()), is_causal=is_causal)
        for d in (torch.float32, torch.float64)
    )
    with peers.Peer(name, "attention", given, {"is_causal": is_causal}, 1) as peer:
        (out,) = peer.outputs
    found = measure(torch.from_numpy(out), exact, usual)
    assert found.ok, found


@needs("onnxruntime")
def test_an_interruption_is_not_for_a_peer():
    """Ctrl-C reaches every process of a terminal's session; what a peer is at is not waited for."""
    peer = peers.Peer("onnxruntime", "rnn", arrays("rnn"), {"nonlinearity": "tanh"}, 1)
    assert os.getsid(peer.worker.pid) != os.getsid(0)
    with contextlib.suppress(KeyboardInterrupt), peer:
        raise KeyboardInterrupt
    assert peer.worker.returncode == -signal.SIGKILL


@needs("onnxruntime")
def test_a_peer_ends_with_its_parent():
    program = """
import os, peers, numpy as np
ones = np.ones((1, 1, 1), np.float32)
given = {"x": ones, "w_ih": ones[0], "w_hh": ones[0]}
peer = peers.Peer("onnxruntime", "rnn", given, {"nonlinearity": "tanh"}, 1)
os.kill(os.getpid(), 9)
"""
    around = {**os.environ, "PYTHONPATH": str(records.HERE)}
    command = [sys.executable, "-c", program]
    # The worker writes its errors where the parent does, and that ends when both are gone.
    done = subprocess.run(command, env=around, stderr=subprocess.PIPE, timeout=60)
    assert (done.returncode, done.stderr) == (-signal.SIGKILL, b"")


@needs("onnxruntime")
def test_a_peer_that_fails_says_why():
    given = arrays("rnn") | {"w_ih": np.zeros((6, 7), np.float32)}
    with pytest.raises(RuntimeError, match="onnxruntime: "):
        peers.Peer("onnxruntime", "rnn", given, {"nonlinearity": "tanh"}, 1)


@needs("onnxruntime")
def test_a_wrong_peer_is_not_timed(tmp_path, capsys, monkeypatch):
    path = tmp_path / "speed.csv"
    arguments = [*SMALLEST, "onnxruntime", "--passes", "forward", "--output", str(path)]
    assert run.main(arguments) == 0
    by = {row["implementation"]: row for row in records.read(path)}
    assert set(by) == {*workload.IMPLEMENTATIONS, "onnxruntime"}
    rivals = [by["torch"], by["onnxruntime"]]
    assert (
        by["ours"]["best_peer"]
        == min(rivals, key=lambda row: float(row["median_ms"]))["implementation"]
    )
    assert "onnxruntime" in capsys.readouterr().out
    right = peers.Peer
    monkeypatch.setattr(
        peers,
        "Peer",
        lambda name, op, given, *rest: right(
            name, op, given | {"b_ih": given["b_ih"] + 1e-4}, *rest
        ),
    )
    path.unlink()
    assert run.main(arguments) == 0
    assert {row["implementation"] for row in records.read(path)} == {*workload.IMPLEMENTATIONS}
    assert "Left out: onnxruntime, rnn-1024x1x64x64 y: error" in capsys.readouterr().out


def test_a_missing_peer_is_left_out_with_a_word(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(peers, "installed", dict)
    path = tmp_path / "speed.csv"
    arguments = [*SMALLEST, "openvino", "--passes", "forward", "--output", str(path)]
    assert run.main(arguments) == 0
    assert "openvino is not installed and left out" in capsys.readouterr().out
    assert {row["implementation"] for row in records.read(path)} == {*workload.IMPLEMENTATIONS}


def test_recurrent_measures_every_part(tmp_path, capsys):
    path = tmp_path / "recurrent.csv"
    assert recurrent.main([*TINY, "--op", "lstm", "--output", str(path)]) == 0
    rows = records.read(path)
    ways = {}
    for row in rows:
        ways.setdefault(row["part"], set()).add(row["implementation"])
        assert float(row["q1"]) <= float(row["median"]) <= float(row["q3"])
        assert row["commit"]
    ways.pop("memory", None)  # not every system tells the peak
    assert ways == {
        "cells": {"ours", "torch"},
        "ragged": {"ours dense", "ours lengths=", "ours packed", "torch dense", "torch packed"},
        "layers": {"ours", "ours one by one", "torch"},
        "streaming": {"ours", "torch"},
    }
    assert {row["times_base"] != "" for row in rows if row["base"]} == {True}
    assert "ragged: us a token" in capsys.readouterr().out


def test_recurrent_does_not_time_a_wrong_kernel(tmp_path, capsys, monkeypatch):
    right = functional.rnn

    def wrong(*tensors, **options):
        y, h_n = right(*tensors, **options)
        return (y, h_n * 1.001) if options.get("reverse") else (y, h_n)

    monkeypatch.setattr(functional, "rnn", wrong)
    path = tmp_path / "recurrent.csv"
    arguments = [*TINY, "--op", "rnn", "--part", "layers", "--output", str(path)]
    assert recurrent.main(arguments) == 1
    assert {row["shape"] for row in records.read(path)} == {"3x2x5x4 2 layers"}
    assert "3x2x5x4 2 directions forward ours one by one, result 1" in capsys.readouterr().out


def test_scaling_times_and_draws_every_curve(tmp_path, capsys):
    path = tmp_path / "scaling.csv"
    assert scaling.main([*SHORT, "--output", str(path)]) == 0
    rows = records.read(path)
    found = scaling.curves(rows)
    assert set(found) == {(name, which) for name in scaling.CURVES for which in workload.PASSES}
    for by in found.values():
        assert set(by) == set(scaling.LAYERS)
        assert {len(points) for points in by.values()} == {2}
    for row in rows:
        assert float(row["model_ms"]) > 0
        assert float(row["copy_gbyte_per_s"]) > 0
        assert row["commit"]
    assert "growth: t ~ size^exponent" in capsys.readouterr().out
    assert plot.main(["--scaling", str(path), "--output", str(tmp_path)]) == 0
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def test_scaling_ends_at_a_wrong_kernel(tmp_path, capsys, monkeypatch):
    right = functional.rnn

    def wrong(*tensors, backend=None, **options):
        y, h_n = right(*tensors, backend=backend, **options)
        return (y, h_n) if backend == "reference" else (y * 1.001, h_n)

    monkeypatch.setattr(functional, "rnn", wrong)
    path = tmp_path / "scaling.csv"
    for curve in ("rnn-T", "rnn-V"):
        assert scaling.main([*SHORT, "--curve", curve, "--output", str(path)]) == 1
        assert not path.exists()
        assert f"WRONG, ended here: {curve}=" in capsys.readouterr().out


def test_overhead_of_every_function_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 1e-4)
    path = tmp_path / "overhead.csv"
    overhead.main(["--seconds", "1e-3", "--output", str(path)])
    rows = overhead.records.read(path)
    ops = {row["op"] for row in rows}
    functions = {*functional.__all__} - {"AttentionGradients", "PackedWeights"}
    free = {f"scaled_dot_product_attention{overhead.AUTOCAST}", overhead.LAYER}
    assert ops == functions | free
    assert len(rows) == 3 * len(ops) - 4  # two layers and attention_backward are not trained
    for row in rows:
        has_limit = row["pass"] != "training" and row["op"] not in free
        assert row["limit_us"] == (f"{overhead.LIMITS[row['pass']]:g}" if has_limit else "")
        ours, kernel = float(row["ours_us"]), float(row["kernel_us"])
        assert kernel > 0
        assert float(row["overhead_us"]) == pytest.approx(ours - kernel, abs=0.02 * ours)
    out = capsys.readouterr().out
    assert "overhead_us" in out
    assert f"[{len(rows)}/{len(rows)}] " in out  # it says how far it is
    monkeypatch.setattr(records, "newest", lambda kind: path)
    monkeypatch.setattr(readme, "README", tmp_path / "README.md")
    table = [line.split(" | ") for line in readme.overhead().splitlines() if "|" in line]
    cells = {line[0].strip("| "): line[1:] for line in table}
    first = next(row for row in rows if row["op"] == "attention")
    shown = ("overhead_us", "whole_us", "torch_us")
    assert cells["attention"][:3] == [first[column] for column in shown]
    assert cells["attention_varlen"][2] == "-"  # what is timed there is another call
    assert cells[overhead.LAYER][3] == "-"


def test_decoding_is_held_against_reading(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(decoding, "KEYS", 64)
    monkeypatch.setattr(decoding, "TOTAL", 2**20)
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 1e-4)
    path = tmp_path / "decoding.csv"
    decoding.main(["--seconds", "0.01", "--threads", "2", "--output", str(path)])
    rows = {(row["dtype"], row["implementation"]): row for row in records.read(path)}
    assert len(rows) == 6
    for (dtype, _), row in rows.items():
        moved = float(row["gb_per_s"]) * float(row["median_us"]) * 1e3
        assert moved == pytest.approx(2 * 8 * 64 * 64 * workload.DTYPES[dtype].itemsize, rel=1e-2)
        read = float(rows[dtype, "read"]["median_us"])
        assert float(row["read_share"]) == pytest.approx(read / float(row["median_us"]), rel=1e-2)
    out = capsys.readouterr().out
    assert "of the read rate" in out
    assert "[2/2] bfloat16: " in out
    monkeypatch.setattr(records, "newest", lambda kind: path)
    monkeypatch.setattr(readme, "README", tmp_path / "README.md")
    assert "| bfloat16 |" in readme.decoding()


def test_exponents_of_growth():
    """Linear in T for an RNN, quadratic for attention: what the model's lines say."""
    for name, power in (("rnn-T", 1.0), ("attention-T", 2.0), ("attention-h", 1.0)):
        counts = {
            str(value): scaling.CURVES[name].point(value, "cpu").cost("forward").multiply_adds
            for value in scaling.CURVES[name].values
        }
        rows = [
            {"value": value, "multiply_adds": str(count), "none": ""}
            for value, count in counts.items()
        ]
        assert scaling.exponent(rows, "multiply_adds") == pytest.approx(power)
        assert scaling.exponent(rows[:1], "multiply_adds") != power
        assert np.isnan(scaling.exponent(rows, "none"))


def test_bench_shapes_count_what_they_do():
    """The counts of the benchmark's shapes, by hand."""
    spec = {s.name: s for specs in workload.SPECS.values() for s in specs}
    forward = workload.count(spec["rnn-50x32x300x512"], "forward", 4)
    assert forward.multiply_adds == 32 * 20_787_200
    for gates, op in ((3, "gru"), (4, "lstm")):
        both = workload.count(spec[f"{op}-50x32x300x512"], "forward+backward", 4)
        assert both.multiply_adds == 3 * gates * forward.multiply_adds
    full = workload.count(spec["attention-1x8x2048x64"], "forward", 4)
    causal = workload.count(spec["attention-1x8x2048x64-causal"], "forward", 4)
    assert full.flops == 4 * 8 * 2048**2 * 64
    assert causal.flops == 4 * 8 * (2048 * 2049 // 2) * 64


def test_what_a_gpu_is_compared_on_fits_it():
    """Fewer heads, rows and words, and the same kernel: head dims, keys and options stay."""
    for op, specs in workload.timed_on("cuda").items():
        assert len({spec.name for spec in specs}) == len(specs)
        assert any("quick" in spec.tags for spec in specs)
        for spec in specs:
            small = workload.compared(spec)
            sizes = small.sizes
            if op == "attention":
                assert sizes["B"] * sizes["N"] * sizes["S_q"] * sizes["S_k"] <= workload.COMPARED
                assert (small.d, small.s_q, small.options) == (spec.d, spec.s_q, spec.options)
            elif op == "linear_cross_entropy":
                assert sizes["N"] * sizes["V"] <= workload.COMPARED
                assert (small.h, small.options) == (spec.h, spec.options)
            else:
                assert small == spec


@pytest.mark.parametrize("op", workload.RECURRENT)
def test_flattened_weights_are_the_same_weights(op):
    (spec, *_) = [s for s in workload.SPECS[op] if s.name == f"{op}-plain"]
    inputs = spec.inputs(torch.float32)
    laid = gpu.flattened(op, inputs)
    assert laid.keys() == inputs.keys()
    for name in inputs:
        assert torch.equal(laid[name], inputs[name]), name


def test_calls_in_turn():
    log = []
    call = timing.in_turn([lambda i=i: log.append(i) for i in range(3)])
    for _ in range(7):
        call()
    assert log == [0, 1, 2, 0, 1, 2, 0]


def test_shared_turns_bring_no_call_twice_in_a_row():
    log = []
    turns = itertools.cycle(range(3))
    calls = [lambda i=i: log.append(i) for i in range(3)]
    first, second = timing.in_turn(calls, turns), timing.in_turn(calls, turns)
    for call in (first, second, second, first):
        call()
    assert log == [0, 1, 2, 0]


def test_numbers_are_read_as_they_are():
    shown = {"0.01234": "0.0123", "99.4": "99.4", "123.4": "123", "1234.5": "1,234"}
    assert {text: records.number(text) for text in shown} == shown
    shares = {"0": "0%", "0.0004": "<1%", "0.0099": "<1%", "0.01": "1%", "0.5": "50%"}
    assert {text: records.percent(text) for text in shares} == shares
    assert (records.threads("1"), records.threads(2)) == ("1 thread", "2 threads")


def test_a_column_without_a_time_is_left_out(tmp_path, monkeypatch):
    path = tmp_path / "speed.csv"
    row = {
        **{"op": "rnn", "shape": "rnn-8x4x2x1", "dtype": "float32", "pass": "forward"},
        **{"cpu": "Some CPU", "isa": "avx2", "torch": "2.0", "date": "2026-01-01T00:00:00Z"},
        **{"median_ms": "1234.5", "fma_share": "0.5", "times_torch": "1", "threads": "1"},
    }
    monkeypatch.setattr(records, "newest", lambda kind: path)
    monkeypatch.setattr(records, "KEPT", tmp_path)
    monkeypatch.setattr(readme, "README", tmp_path / "README.md")
    rows = [row | {"implementation": name, "commit": name} for name in workload.IMPLEMENTATIONS]
    records.merge(path, rows[:2], ["implementation"])
    assert "ours, ms | torch, ms | torch / ours" in readme.speed()
    assert "| forward | 1,234 | 1,234 | 1.00 |" in readme.speed()
    assert "1 thread, torch 2.0, commits ours, torch;" in readme.speed()
    records.merge(path, rows, ["implementation"])
    assert "ours, ms | torch, ms | reference, ms | torch / ours" in readme.speed()


def test_memory_is_shown(tmp_path, capsys, monkeypatch):
    path = tmp_path / "recurrent.csv"
    arguments = [*TINY, "--op", "gru", "--part", "memory", "--output", str(path)]
    assert recurrent.main(arguments) == 0
    if not path.exists():
        pytest.skip("this system does not tell the peak")
    monkeypatch.setattr(records, "newest", lambda kind: path)
    monkeypatch.setattr(readme, "README", tmp_path / "README.md")
    assert "| gru-3x2x5x4 | " in readme.memory()


def test_what_the_readme_says_of_gpus():
    """Its sentences on who is faster there hold for every row that is kept."""
    ours = [
        row
        for path in records.of_gpus()
        for row in records.read(path)
        if row["implementation"] == "ours"
    ]
    recurrent_rows = [row for row in ours if row["op"] in workload.RECURRENT]
    faster = [row for row in recurrent_rows if float(row["times_torch"]) > 1]
    assert len(faster) > len(recurrent_rows) / 2
    assert all(float(row["times_torch"]) < 1 for row in ours if row not in recurrent_rows)


def test_figures_of_a_gpu_are_shown(tmp_path, monkeypatch):
    path = tmp_path / "a-gpu.csv"
    row = {
        **{"op": "rnn", "shape": "rnn-8x4x2x1", "dtype": "bfloat16", "pass": "forward"},
        **{"device": "cuda", "gpu": "Some GPU", "torch": "2.0", "commit": "abc", "threads": "1"},
        **{"date": "2026-01-01T00:00:00Z", "gflop_per_s": "1500", "best_peer": "torch flash"},
        **{"fma_share": "0.5", "copy_share": "0.25", "backend": "triton"},
    }
    times = {"ours": "2", "torch": "5", "torch flash": "3"}
    rows = [
        {
            **row,
            "implementation": name,
            "median_ms": ms,
            "times_torch": str(5 / float(ms)),
            "times_best_peer": str(3 / float(ms)),
        }
        for name, ms in times.items()
    ]
    monkeypatch.setattr(records, "of_gpus", functools.partial(records.of_gpus, tmp_path))
    assert readme.gpu() == readme.NO_GPU_RESULTS
    records.merge(path, rows, run.KEY)
    older = [{**row, "date": "2025-01-01T00:00:00Z"} for row in rows]
    records.merge(tmp_path / "older-gpu.csv", older, run.KEY)
    others = [{**row, "gpu": "Another"} for row in older]
    records.merge(tmp_path / "other-gpu.csv", others, run.KEY)
    monkeypatch.setattr(readme, "README", tmp_path / "README.md")
    monkeypatch.setattr(records, "KEPT", tmp_path)  # without a picture
    assert records.of_gpus() == [path, tmp_path / "other-gpu.csv"]
    shown = readme.gpu()
    cells = "rnn-8x4x2x1 | bfloat16 | forward | 2 | 5 | 1.50 (torch flash) | 1.5 | 50% | 25% |"
    assert cells in shown
    assert shown.count("on Some GPU") == shown.count("on Another") == 1
    assert plot.main(["--gpu", str(path), "--output", str(tmp_path)]) == 0
    assert (tmp_path / "a-gpu.png").stat().st_size > 10_000
    assert "![a-gpu](a-gpu.png)" in readme.gpu()


def test_readme_is_current():
    """Its tables say what the specs, the backends and the kept results say."""
    pytest.importorskip("triton")
    text = readme.README.read_text(encoding="utf-8")
    assert readme.render(text) == text, "run `make readme`"


def test_readme_blocks_must_be_there():
    with pytest.raises(ValueError, match="must hold <!-- begin:support -->"):
        readme.render("no blocks")
