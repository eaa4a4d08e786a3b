"""What tests and benchmarks share: named inputs, stock torch's equivalents, the tolerance rule."""

from pykernels.testing import evaluate, specs, stock
from pykernels.testing.evaluate import check
from pykernels.testing.specs import (
    ATTENTION_SPECS,
    ATTENTION_VARLEN_SPECS,
    GRU_SPECS,
    LINEAR_CROSS_ENTROPY_SPECS,
    LSTM_SPECS,
    RNN_SPECS,
    AttentionSpec,
    AttentionVarlenSpec,
    GRUSpec,
    LinearCrossEntropySpec,
    LSTMSpec,
    RNNSpec,
)
from pykernels.testing.tolerance import Measured, assert_close, measure

__all__ = [
    "ATTENTION_SPECS",
    "ATTENTION_VARLEN_SPECS",
    "GRU_SPECS",
    "LINEAR_CROSS_ENTROPY_SPECS",
    "LSTM_SPECS",
    "RNN_SPECS",
    "AttentionSpec",
    "AttentionVarlenSpec",
    "GRUSpec",
    "LSTMSpec",
    "LinearCrossEntropySpec",
    "Measured",
    "RNNSpec",
    "assert_close",
    "check",
    "evaluate",
    "measure",
    "specs",
    "stock",
]
