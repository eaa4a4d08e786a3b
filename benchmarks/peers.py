"""Other libraries' recurrent layers and attention, forward, each in a process of its own.

A pool of threads may spin for a while after its work, and slows whoever runs next. So every peer
has its own process and is timed in turn: before and after, both sides wait until their threads rest
(`rest`). This file is also the worker program,

    python benchmarks/peers.py <peer> <threads>

which reads pickled messages from its input and answers each: an op, its inputs and options with the
outputs, a number of calls with the seconds that they took. Nothing here needs torch.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]

#: Which of torch's gates (h; r, z, n; i, f, g, o) comes where in ONNX (h; z, r, h; i, o, f, c).
GATES = {"rnn": (0,), "gru": (1, 0, 2), "lstm": (0, 3, 1, 2)}
STATES = {"rnn": ("h0",), "gru": ("h0",), "lstm": ("h0", "c0")}
REST_SECONDS = 0.005
PATIENCE_SECONDS = 2.0


def installed() -> dict[str, str]:
    """The peers that can be run here, with their versions."""
    found = {}
    for name in PEERS:
        try:
            importlib.metadata.version("onnx")
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class Peer:
    """A worker with one op loaded; use it as a context manager."""

    def __init__(
        self, name: str, op: str, arrays: Arrays, options: Mapping[str, Any], threads: int
    ) -> None:
        """Starts it, and takes its result.

        Args:
            name: one of `PEERS`.
            op: "rnn", "gru", "lstm" or "attention".
            arrays: float32, by the argument names of `functional.<op>`.
            options: those of `functional.<op>`: nonlinearity, reverse and is_causal count.
            threads: of its pool.
        """
        self.worker = subprocess.Popen(
            [sys.executable, __file__, name, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the parent: a worker ends when its input does
        )
        try:
            #: As `functional.<op>` returns them: y [T, B, H] and the last states [B, H]; or out.
            self.outputs: list[np.ndarray] = self._ask((op, arrays, dict(options)))
        except BaseException as error:
            self.__exit__(type(error))
            raise

    def seconds(self, calls: int) -> float:
        """How long `calls` calls take."""
        rest()
        return self._ask(calls)

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # it is gone, with a message half read
            self.worker.stdin.close()
        self.worker.stdout.close()
        self.worker.wait()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.worker.kill()  # it may be at work, and nobody waits for its answer
        self.close()

    def _ask(self, message: object) -> Any:
        pickle.dump(message, self.worker.stdin)
        self.worker.stdin.flush()
        answer = pickle.load(self.worker.stdout)
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer


def rest() -> None:
    """Returns when no thread of this process runs any more."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        before = time.process_time()
        time.sleep(REST_SECONDS)
        if time.process_time() - before < 0.1 * REST_SECONDS:
            return
    raise RuntimeError(
        "a thread pool never stops spinning (OMP_WAIT_POLICY?): no peer can be timed"
    )


def onnx_model(op: str, arrays: Arrays, options: Mapping[str, Any]) -> bytes:
    """An ONNX model of one node that is fed `inputs_of` the op."""
    from onnx import TensorProto, helper

    if op in STATES:
        return recurrent_model(op, arrays, options)
    shapes = {name: arrays[name].shape for name in ("q", "k", "v")}
    shapes["out"] = (*arrays["q"].shape[:3], arrays["v"].shape[3])
    q, k, v, out = (
        helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in shapes.items()
    )
    causal = int(options["is_causal"])
    node = helper.make_node("Attention", ["q", "k", "v"], ["out"], is_causal=causal)
    graph = helper.make_graph([node], op, [q, k, v], [out])
    opset = helper.make_opsetid("", 23)
    return helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString()


def inputs_of(op: str, arrays: Arrays) -> Arrays:
    """What a model is fed: x [T, B, I] and the first states [1, B, H], or q, k and v."""
    states = {n: arrays[n][None] for n in STATES.get(op, ()) if n in arrays}
    others = {n: arrays[n] for n in ("x", "q", "k", "v") if n in arrays}
    return {n: np.ascontiguousarray(array) for n, array in {**others, **states}.items()}


def outputs_of(op: str, found: list[np.ndarray]) -> list[np.ndarray]:
    """The outputs of a model in the shapes of `functional.<op>`."""
    if op not in STATES:
        return found
    y, *last = found
    return [y[:, 0], *(state[0] for state in last)]


def recurrent_model(op: str, arrays: Arrays, options: Mapping[str, Any]) -> bytes:
    """An ONNX model of one node, with the weights inside.

    Its outputs are y [T, 1, B, H] and the last states [1, B, H].
    """
    from onnx import TensorProto, helper, numpy_helper

    T, B, I = arrays["x"].shape
    H = arrays["w_hh"].shape[1]

    def gates(name: str) -> np.ndarray:
        """[1, G H, ...] in the order of ONNX."""
        blocks = np.split(arrays[name], len(GATES[op]))
        return np.concatenate([blocks[k] for k in GATES[op]])[None]

    constants = {"W": gates("w_ih"), "R": gates("w_hh")}
    if "b_ih" in arrays:
        constants["B"] = np.concatenate([gates("b_ih"), gates("b_hh")], 1)
    fed = {"x": [T, B, I]} | {n: [1, B, H] for n in STATES[op] if n in arrays}
    made = {"y": [T, 1, B, H]} | {n.replace("0", "_n"): [1, B, H] for n in STATES[op]}
    attributes: dict[str, Any] = {"hidden_size": H}
    if options.get("reverse"):
        attributes["direction"] = "reverse"
    if op == "rnn":
        attributes["activations"] = [options["nonlinearity"].capitalize()]
    if op == "gru":
        attributes["linear_before_reset"] = 1  # torch's: the reset gate is on W_hn h + b_hn
    states = [n if n in fed else "" for n in STATES[op]]
    inputs = ["x", "W", "R", "B" if "B" in constants else "", "", *states]  # "": no lengths
    node = helper.make_node(op.upper(), inputs, [*made], **attributes)
    values = [
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in named.items()]
        for named in (fed, made)
    ]
    weights = [numpy_helper.from_array(array, n) for n, array in constants.items()]
    graph = helper.make_graph([node], op, *values, weights)
    opset = helper.make_opsetid("", 14)
    return helper.make_model(graph, opset_imports=[opset], ir_version=8).SerializeToString()


Loaded = tuple[Callable[[], object], Callable[[], list[np.ndarray]]]  # a call; its outputs


def _onnxruntime(op: str, arrays: Arrays, settings: Mapping[str, Any], threads: int) -> Loaded:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    model = onnx_model(op, arrays, settings)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, array in inputs_of(op, arrays).items():
        binding.bind_cpu_input(name, array)
    for output in session.get_outputs():
        array = np.full(output.shape, np.nan, np.float32)
        binding.bind_ortvalue_output(output.name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
    return lambda: session.run_with_iobinding(binding), binding.copy_outputs_to_cpu


def _openvino(op: str, arrays: Arrays, settings: Mapping[str, Any], threads: int) -> Loaded:
    import openvino
    from openvino import opset13

    core = openvino.Core()
    fed = inputs_of(op, arrays)
    if op == "attention":  # its own node is faster than what it makes of ONNX's
        places = [opset13.parameter(array.shape, np.float32, name) for name, array in fed.items()]
        causal = bool(settings["is_causal"])
        node = opset13.scaled_dot_product_attention(*places, causal=causal)
        for place, name in zip(places, fed, strict=True):
            place.output(0).set_names({name})
        model = openvino.Model([node], places, op)
    else:
        model = core.read_model(onnx_model(op, arrays, settings))
    compiled = core.compile_model(
        model,
        "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16 where the processor has it
        },
    )
    request = compiled.create_infer_request()
    for name, array in fed.items():
        request.set_tensor(name, openvino.Tensor(array))
    return request.infer, lambda: [request.get_tensor(o).data.copy() for o in compiled.outputs]


PEERS = {"onnxruntime": _onnxruntime, "openvino": _openvino}


def main() -> None:
    """Serves until its input ends."""
    load, threads = PEERS[sys.argv[1]], int(sys.argv[2])
    # What a library prints must not fall between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def answer(value: object) -> None:
        pickle.dump(value, answers)
        answers.flush()

    try:
        op, arrays, options = pickle.load(sys.stdin.buffer)
        call, outputs = load(op, arrays, options, threads)
        call()
        answer(outputs_of(op, outputs()))
        while True:
            calls = pickle.load(sys.stdin.buffer)
            call()  # this process was asleep
            start = time.perf_counter()
            for _ in range(calls):
                call()
            took = time.perf_counter() - start
            rest()
            answer(took)
    except (EOFError, BrokenPipeError):  # the parent is gone
        pass
    except Exception as error:
        answer(f"{sys.argv[1]}: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
