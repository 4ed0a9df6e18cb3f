"""How time, memory and communication of a train step may grow: the mathematics, and the verdicts.

A law is a sum of known terms with non-negative factors. The factors are fitted to all points but
the largest, by relative errors, and foretell the largest: more than that, beyond a limit, is growth
that the mathematics does not explain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import nnls

from benchmarks.train_step import Case
from dpojax.head import CPU_CACHE_LOGITS, MIN_CPU_CHUNK
from dpojax.models.attention import scores_of

TIME, BYTES, EXACT = 1.25, 1.10, 1.02  # largest point / law: noise; XLA's buffers; none
MIB = 2**20

Record = dict[str, Any]  # of growth_programs.measure


class Curve(NamedTuple):
    """What was measured at the points of a study, and what the law says of them."""

    study: str
    mesh: str  # of `devices`; "" elsewhere
    quantity: str
    x: np.ndarray
    measured: np.ndarray
    expected: np.ndarray
    law: str
    limit: float
    factors: np.ndarray

    @property
    def excess(self) -> float:
        """Measured / expected at the largest point; 1 where both are 0."""
        measured, expected = self.measured[-1], self.expected[-1]
        return 1.0 if measured == expected == 0 else float(measured / max(expected, 1e-30))

    @property
    def holds(self) -> bool:
        return self.excess <= self.limit


class Line(NamedTuple):
    name: str
    values: np.ndarray


def fit(terms: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Non-negative factors [K] of terms [N, K], from all N points but the last."""
    known = np.asarray(measured[:-1], float)
    if not known.any():
        return np.zeros(terms.shape[1])
    scale = np.maximum(np.abs(terms[:-1]).max(axis=0), 1e-30)
    rows = terms[:-1] / scale[None] / known[:, None]
    return nnls(rows, np.ones(len(known)))[0] / scale


def step_flops(record: Record) -> float:
    """FLOPs of the products of one step, of all members, from the sizes alone.

    Forward and twice backward: 2 for each token and weight of a layer (12 width^2 weights), and for
    each scored token and weight of the head. A layer's scores and their mix cost 4 width for each
    pair of columns of a row, but for those of a later stretch; they are computed again backward,
    which gives 4 passes and not 3, as the head's logits are where they exceed the cap.
    """
    case = Case(**record["case"])
    members = max(1, record["members"])
    tokens = record["rows"] * case.row_length
    layers = 3 * 2 * 12 * case.layers * case.width**2 * tokens
    scores = 4 * 4 * case.layers * case.width * record["rows"] * scores_of(case.row_length)
    return members * (layers + scores + head_flops(record))


def head_flops(record: Record) -> float:
    """Of the LM head, in parts of the vocabulary that are padded to the same size."""
    case, count = Case(**record["case"]), chunks(record)
    padded = count * math.ceil(case.vocabulary / count)
    again = count > 1 and record["scored"] * case.vocabulary > _cap(record)
    return 2.0 * record["scored"] * case.width * (4 if again else 3) * padded


def chunks(record: Record) -> int:
    """Parts of the vocabulary whose logits do not exceed the cap, which every device has, nor, on
    one CPU, its cache."""
    case, most = Case(**record["case"]), _cap(record)
    if record["devices"] == 1:
        most = min(most, max(CPU_CACHE_LOGITS, MIN_CPU_CHUNK * record["scored"]))
    return math.ceil(case.vocabulary / (most // record["scored"]))


def _cap(record: Record) -> int:
    return Case(**record["case"]).max_logits * record["devices"]


def vocabulary_bytes(record: Record, first: Record) -> float:
    """Temporary bytes from those of the smallest vocabulary: at most two arrays of logits more, of
    the cap's size, and three of the table's: its gradient as the head, as the embedding, and both.
    """

    def variable(one: Record) -> float:
        case = Case(**one["case"])
        logits = min(one["scored"] * case.vocabulary, case.max_logits)
        return 2 * 4 * logits + 3 * 4 * case.vocabulary * case.width

    return first["temporary"] + variable(record) - variable(first)


def sent_bytes(record: Record) -> float:
    """Bytes of the arrays that a step must reduce or gather, whatever the number of devices.

    data: the gradient is reduced once. fsdp: a layer's weights are gathered forward and backward,
    the tables once, and the gradient is reduced. tensor (Shoeybi et al. 2019): activations are
    reduced twice a layer forward and twice backward, the embedding's once forward, the head's
    hidden states once backward. sweep: nothing.
    """
    case = Case(**record["case"])
    tokens, scored = record["rows"] * case.row_length, record["scored"]
    return (
        4.0
        * {
            "data": record["parameters"],
            "fsdp": record["parameters"] + record["matrices"] + 12 * case.layers * case.width**2,
            "tensor": case.width * ((4 * case.layers + 1) * tokens + scored),
            "sweep": 0,
        }[record["mesh"]]
    )


def held_bytes(record: Record) -> float:
    """Bytes of a device's arguments: weights and two moments, float32, and the rows."""
    count, mesh = record["devices"], record["mesh"]
    weights = record["parameters"]
    if mesh in ("fsdp", "tensor"):
        weights += record["matrices"] * (1 / count - 1)
    shared = count if mesh in ("data", "fsdp") else 1
    return 12 * weights + record["row_bytes"] / shared


class Law(NamedTuple):
    """A law as a person reads it, and the terms of a point whose factors are fitted."""

    text: str
    terms: Callable[[Record, Case], list[float]]


def _sent(record: Record, case: Case) -> list[float]:
    return [sent_bytes(record)]


def _sent_tied(record: Record, case: Case) -> list[float]:
    """XLA may reduce the tied table's two gradients, of head and embedding, one by one."""
    return [sent_bytes(record) + 4 * case.vocabulary * case.width]


def _products(record: Record, case: Case) -> list[float]:
    return [step_flops(record) / record["devices"]]


def _held(record: Record, case: Case) -> list[float]:
    return [held_bytes(record)]


def _constant(record: Record, case: Case) -> list[float]:
    return [1]


def _divided(record: Record, case: Case) -> list[float]:
    return [1, 1 / record["devices"]]


def _by_token(record: Record, case: Case) -> list[float]:
    return [1, scores_of(record["x"]) / record["x"]]


def _by_vocabulary(record: Record, case: Case) -> list[float]:
    return [1, head_flops(record)]


def _by_row(record: Record, case: Case) -> list[float]:
    return [1, case.row_length, scores_of(case.row_length)]


def _by_member(record: Record, case: Case) -> list[float]:
    return [1, record["x"]]


SENT = Law("a x closed form", _sent)
SENT_TIED = Law("a x (closed form + the table once more)", _sent_tied)
PRODUCTS = Law("a x closed form", _products)
HELD = Law("a x closed form", _held)
SAME = Law("a", _constant)
DIVIDED = Law("a + b / devices", _divided)
# Of a study's time, and of its temporary memory (the vocabulary's has a closed form of its own).
TIME_LAWS = {
    "tokens": Law("a + b (scores of a token)", _by_token),
    "vocabulary": Law("a + b (FLOPs of the head)", _by_vocabulary),
    "responses": Law("a + b (P + K R) + c (scores of a row)", _by_row),
    "members": Law("a + b members", _by_member),
}


def curves(records: Sequence[Record]) -> list[Curve]:
    """The curves of every study that `records` hold."""
    studies = dict.fromkeys(record["study"] for record in records)
    all_curves: list[Curve] = []
    for study in studies:
        study_records = [record for record in records if record["study"] == study]
        if study == "chunks":
            sent = _total(study_records, "collective_bytes")
            all_curves.append(_curve(study_records, "collective bytes", sent, SENT_TIED, BYTES))
            all_curves.append(_flops_curve(study_records))
        elif study == "devices":
            all_curves += _device_curves(study_records)
        else:
            all_curves += _curves(study, study_records)
    return all_curves


def seconds(record: Record) -> float:
    """The least of the rounds: other processes only ever add to it."""
    return min(record["samples"])


def instead(curve: Curve, records: Sequence[Record]) -> Line | None:
    """What the study's quantity would be without what keeps it small, where something does."""
    if curve.study == "vocabulary" and curve.quantity == "temporary":
        logits = [2 * 4 * r["scored"] * r["case"]["vocabulary"] for r in records]
        capped = [min(size, 2 * 4 * r["case"]["max_logits"]) for size, r in zip(logits, records)]
        return Line("all logits\nat once", curve.measured + np.subtract(logits, capped))
    if curve.study == "responses":
        table = [
            [1, r["x"] * (c.prompt + c.response), r["x"] * (c.prompt + c.response) ** 2]
            for r in records
            for c in [Case(**r["case"])]
        ]
        return Line("a prompt for\neach response", np.array(table, float) @ curve.factors)
    return None


def _curves(study: str, records: Sequence[Record]) -> list[Curve]:
    law = TIME_LAWS[study]
    memory = _curve(records, "temporary", _field(records, "temporary"), law, BYTES)
    if study == "vocabulary":
        most = np.array([vocabulary_bytes(record, records[0]) for record in records])
        law_of_memory = "the first's + 2 x logits + 3 x table"
        memory = memory._replace(expected=most, law=law_of_memory, factors=np.ones(1))
    times = [seconds(record) for record in records]
    return [_curve(records, "seconds", times, law, TIME), memory, _flops_curve(records)]


def _device_curves(records: Sequence[Record]) -> list[Curve]:
    device_curves = []
    for mesh in dict.fromkeys(record["mesh"] for record in records):
        several = [record for record in records if record["mesh"] == mesh and record["devices"] > 1]
        # One device is the first point of every mesh but the sweep's.
        with_one = several if mesh == "sweep" else [records[0] | {"mesh": mesh}, *several]
        sent, counts = _total(several, "collective_bytes"), _total(several, "collectives")
        arguments, temporary = _field(with_one, "arguments"), _field(with_one, "temporary")
        device_curves += [
            _curve(several, "collective bytes", sent, SENT, BYTES),
            _curve(several, "collectives", counts, SAME, BYTES),
            _flops_curve(with_one),
            _curve(with_one, "arguments", arguments, HELD, BYTES),
            _curve(with_one, "temporary", temporary, DIVIDED, BYTES),
        ]
    return device_curves


def _flops_curve(records: Sequence[Record]) -> Curve:
    return _curve(records, "flops", _field(records, "flops"), PRODUCTS, EXACT)


def _curve(
    records: Sequence[Record], quantity: str, values: Sequence[float], law: Law, limit: float
) -> Curve:
    measured = np.array(values, float)
    terms = np.array([law.terms(record, Case(**record["case"])) for record in records], float)
    factors = fit(terms, measured)
    study = records[0]["study"]
    return Curve(
        study=study,
        mesh=records[0]["mesh"] if study == "devices" else "",
        quantity=quantity,
        x=np.array([record["x"] for record in records]),
        measured=measured,
        expected=terms @ factors,
        law=law.text,
        limit=limit,
        factors=factors,
    )


def _field(records: Sequence[Record], name: str) -> list[float]:
    return [record[name] for record in records]


def _total(records: Sequence[Record], name: str) -> list[float]:
    """The sum over all kinds of collectives, of every record."""
    return [sum(record[name].values()) for record in records]
