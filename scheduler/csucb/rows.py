"""What compiled code reads and writes: rows of structured arrays.

A row class declares the fields of one structured array, in order. numba compiles `node.slots` on such a row to one
load, so compiled code reads like Python at the cost of a column of numbers. Times s, sizes tokens and bytes.

What crosses into compiled code in a call are structured arrays, even where there is one row (a task, the terms): numba
takes an array of records in 0.1 µs, a NamedTuple in 0.9 µs. numpy, in turn, copies single records and whole fields
quickly, but takes 5 to 10 µs to move or pick several records at once: compiled code does that.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

import numpy as np
from numpy.typing import NDArray

from perllm.scheduler.csucb.token_bins import BINS, Floats

Ints = NDArray[np.int64]
#: A structured array: one record per row.
Records = NDArray[np.void]
#: A field that is a function of tokens or steps, by its values at the bins' edges.
Curve = Annotated[Floats, BINS + 1]


def dtype_of(row: type[Any]) -> np.dtype[np.void]:
    """The structured dtype of a row class: int → int64, float → float64, bool → bool, Curve → float64 (BINS + 1,)."""
    hints = get_type_hints(row, include_extras=True)
    columns = [(name, float, get_args(kind)[1:]) if kind == Curve else (name, kind) for name, kind in hints.items()]
    return np.dtype(columns, align=True)


@dataclass(slots=True)
class NodeRow:
    """A node. `forecast_nodes` fills what has a default."""

    first: int  # row in `in_flight` of its first task; the others follow
    count: int  # tasks in flight
    taken: int  # slots they take or wait for
    slots: int
    heard: float  # when its last heartbeat came, s
    changed: float  # when it last changed, a heartbeat included, s: its outlook counts from here
    watts: float  # beyond idle, while it steps
    joules_per_byte: float  # of its link
    bandwidth: float  # bytes/s
    latency: float  # of a transfer, beyond its bytes, s
    dispatch_delay: float  # from a decision until the task is in its queue, s
    stalled: bool
    first_arm: int  # row in `arms` of its first model; the others follow
    arrival_rate: float  # tasks/s that usually come
    arrival_prompt: float  # mean prompt of those, tokens
    arrival_output: float  # mean output of those, tokens
    slot_price: float  # of a second in a slot, in units of the index
    throughput: float  # tasks/s its slots can finish
    step_floor: float  # the part of a step's time that does not depend on its batch, s
    bytes_coming: float = 0.0  # on their way to it


@dataclass(slots=True)
class InFlightRow:
    """A task on a node; those of one node are in order of dispatch. `forecast_nodes` fills what has a default."""

    dispatched: float  # s
    claimed: float  # s; 0: not yet
    generated: float  # tokens of all answers, as of the last heartbeat
    prompt_tokens: float
    payload_bytes: float
    deadline: float  # s
    max_tokens: float  # of an answer
    n: float  # answers
    width: float  # those of them in the batch at a time, at most
    value: float
    lengths: int  # row in `lengths` of the distribution of an answer's length
    arm: int  # row in `arms`
    ready: float = 0.0  # when its payload is there, s; once decoding, when that began
    prefill_left: float = 0.0  # prompt tokens
    prefill_end: float = 0.0  # s of prefills on the node, from its last heartbeat until this task's was over
    start: float = 0.0  # the step at which it starts to decode; −1: not in the batch yet
    tokens: float = 0.0  # those of an answer at that step
    survival: float = 0.0  # 1 / P(L > those tokens)
    end_step: float = 0.0  # the step at its deadline …
    end_step_time: float = 0.0  # … and that step's time, s
    p_on_time: float = 0.0


@dataclass(slots=True)
class ArmRow:
    """A model on a node: the cost of its steps (see `csucb.step_cost`) and its KV cache."""

    step: float  # s
    sequence: float  # s per active sequence
    prefill: float  # s per token prefilled
    context: float  # s per token of context
    spread: float  # σ of a step's time, as a share of it
    kv_tokens: float  # its KV cache holds
    kv_used: float = 0.0  # tokens its tasks will probably need; filled by `forecast_nodes`


@dataclass(slots=True)
class OutlookRow:
    """A node's future over the number of steps taken from now on."""

    times: Curve  # when so many steps are done, s
    taken: Curve  # expected slots taken or queued for, in the bin that begins there
    idle: Curve  # P(no sequence is active) in it


@dataclass(slots=True)
class LengthsRow:
    """A distribution of output lengths L, as functions of tokens x."""

    tail: Curve  # P(L > x)
    mean: Curve  # ∫₀ˣ P(L > u) du
    moment: Curve  # ∫₀ˣ u·P(L > u) du


@dataclass(slots=True)
class CandidateRow:
    """A node a task may go to."""

    node: int  # row in `nodes`
    arm: int  # row in `arms`, of the task's model there


@dataclass(slots=True)
class TaskRow:
    """A task before it is placed."""

    prompt_tokens: float
    payload_bytes: float
    deadline: float  # s
    max_tokens: float  # of an answer
    n: float  # answers
    value: float
    lengths: int  # row of the distribution of an answer's length


@dataclass(slots=True)
class TermsRow:
    """What the index is made of beside the forecast."""

    own_weight: float  # of the task's on-time value: V, times its urgency
    harm_weight: float  # of the on-time value others lose
    energy_scale: float  # E₀, J
    min_p_on_time: float  # a node must give
    needs_slot: bool  # it must have a slot free


@dataclass(slots=True)
class ScoreRow:
    """What one node would make of one more task."""

    finish: float  # from now until it is probably done, s
    p_on_time: float
    busy: float  # busy time it adds, s
    joules: float  # it adds
    stay: float  # it is in a slot, s
    slot_cost: float  # what that costs, in units of the index
    harm: float  # on-time value other tasks lose; UNKNOWN until worked out
    index: float  # INFEASIBLE where it cannot go
    deadline_slack: float  # of the constraints C1 to C3
    compute_slack: float
    memory_slack: float
    bandwidth_slack: float


NODE, OUTLOOK, IN_FLIGHT, ARM, LENGTHS = map(dtype_of, (NodeRow, OutlookRow, InFlightRow, ArmRow, LengthsRow))
CANDIDATE, TASK, TERMS, SCORE = map(dtype_of, (CandidateRow, TaskRow, TermsRow, ScoreRow))

_WRITTEN = (NodeRow, InFlightRow, ArmRow, TaskRow, TermsRow)
_VALUES = {row: attrgetter(*(f.name for f in fields(row))) for row in _WRITTEN}


def values(row: NodeRow | InFlightRow | ArmRow | TaskRow | TermsRow) -> tuple[Any, ...]:
    """The row's fields in order, to be assigned to a record."""
    found: tuple[Any, ...] = _VALUES[type(row)](row)
    return found


class ClusterRows(NamedTuple):
    """All that is known of the cluster."""

    nodes: Records  # NodeRow
    outlooks: Records  # OutlookRow, in the rows of their nodes
    in_flight: Records  # InFlightRow
    arms: Records  # ArmRow
    lengths: Records  # LengthsRow
