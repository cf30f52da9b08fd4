"""What compiled code reads and writes: rows of structured arrays, and the bundles they are passed in.

A row class declares the fields of one structured array, in order. numba compiles `node.slots` on such a row to one
load, so compiled code reads like Python at the cost of a column of numbers. Times s, sizes tokens and bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any, NamedTuple, get_type_hints

import numpy as np
from numpy.typing import NDArray

from perllm.scheduler.csucb.token_bins import Floats

Matrix = NDArray[np.float64]
Ints = NDArray[np.int64]
#: A structured array: one record per row.
Records = NDArray[np.void]


def dtype_of(row: type[Any]) -> np.dtype[np.void]:
    """The structured dtype of a row class: int → int64, float → float64, bool → bool."""
    return np.dtype(list(get_type_hints(row).items()), align=True)


@dataclass(slots=True)
class NodeRow:
    """A node. `forecast_node` fills what has a default."""

    first: int  # row in `in_flight` of its first task; the others follow
    count: int  # tasks in flight
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
    """A task on a node; those of one node are in order of dispatch. `forecast_node` fills what has a default."""

    dispatched: float  # s
    claimed: float  # s; 0: not yet
    generated: float  # tokens, as of the last heartbeat
    prompt_tokens: float
    payload_bytes: float
    deadline: float  # s
    max_tokens: float
    value: float
    lengths: int  # row of its output-length distribution
    arm: int  # row in `arms`
    ready: float = 0.0  # when its payload is there, s; once decoding, when that began
    prefill_left: float = 0.0  # prompt tokens
    prefill_end: float = 0.0  # s of prefills on the node, from its last heartbeat until this task's was over
    start: float = 0.0  # the step at which it starts to decode; −1: not in the batch yet
    tokens: float = 0.0  # its tokens at that step
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
    kv_used: float = 0.0  # tokens its tasks will probably need; filled by `forecast_node`


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


NODE, IN_FLIGHT, ARM, SCORE = (dtype_of(row) for row in (NodeRow, InFlightRow, ArmRow, ScoreRow))

_VALUES = {row: attrgetter(*(f.name for f in fields(row))) for row in (NodeRow, InFlightRow, ArmRow)}


def values(row: NodeRow | InFlightRow | ArmRow) -> tuple[Any, ...]:
    """The row's fields in order, to be assigned to a record."""
    found: tuple[Any, ...] = _VALUES[type(row)](row)
    return found


class LengthTable(NamedTuple):
    """Output-length distributions, (rows, BINS + 1) each: functions of tokens x, by their values at the bins' edges."""

    tail: Matrix  # P(L > x)
    mean: Matrix  # ∫₀ˣ P(L > u) du
    moment: Matrix  # ∫₀ˣ u·P(L > u) du


class Outlook(NamedTuple):
    """A node's future over the number of steps taken from now on, (BINS + 1,) each."""

    times: Floats  # when so many steps are done, s
    taken: Floats  # expected slots taken or queued for, in the bin that begins there
    idle: Floats  # P(no sequence is active) in it


class ClusterRows(NamedTuple):
    """All that is known of the cluster, as compiled code takes it."""

    nodes: Records  # NodeRow
    in_flight: Records  # InFlightRow
    arms: Records  # ArmRow
    times: Matrix  # (nodes, BINS + 1), as in Outlook
    taken: Matrix
    idle: Matrix
    lengths: LengthTable


class Candidates(NamedTuple):
    """Nodes a task may go to: the rows of the nodes, and of their arms for its model."""

    nodes: Ints
    arms: Ints


class NewTask(NamedTuple):
    """A task before it is placed."""

    prompt_tokens: float
    payload_bytes: float
    deadline: float  # s
    max_tokens: float
    value: float
    lengths: int  # row of its output-length distribution


class Terms(NamedTuple):
    """What the index is made of beside the forecast."""

    own_weight: float  # of the task's on-time value: V, times its urgency
    harm_weight: float  # of the on-time value others lose
    energy_scale: float  # E₀, J
    min_p_on_time: float  # a node must give
    needs_slot: bool  # it must have a slot free
