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
    places: int  # those, and as many more as it works through in a moment: whoever gets one does not wait for long
    heard: float  # when its last heartbeat came, s
    changed: float  # when it last changed, a heartbeat included, s: its outlook counts from here
    watts: float  # beyond idle, while it steps
    joules_per_byte: float  # of its link
    bandwidth: float  # bytes/s
    latency: float  # of a transfer, beyond its bytes, s
    dispatch_delay: float  # from a decision until the task is in its queue, s
    stalled: bool
    trusted: bool  # it takes up what it is sent
    first_arm: int  # row in `arms` of its first model; the others follow
    arms: int  # how many it has
    arrival_rate: float  # tasks/s that usually come
    arrival_prompt: float  # mean prompt of those, tokens
    arrival_output: float  # mean output of those, tokens
    slot_price: float  # of a second in a slot, in units of the index
    usual: int  # row in `usual`
    stay: float  # of the mean task, s; 0: not known
    throughput: float  # tasks/s its slots and its KV cache let it finish
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
    chunk: float  # prompt tokens of a step, at most
    longest: float  # context, tokens
    kv_tokens: float  # its KV cache holds
    kv_used: float = 0.0  # tokens its tasks will probably need; filled by `forecast_nodes`


@dataclass(slots=True)
class OutlookRow:
    """A node's future over the number of steps taken from now on, for a task on one of its arms."""

    times: Curve  # when so many steps are done, s, if its model is in each
    taken: Curve  # expected slots of the node taken or queued for, in the bin that begins there
    idle: Curve  # P(no sequence of its model is active) in it
    prefilled: float  # steps after which its model's prompts there are prefilled


@dataclass(slots=True)
class LengthsRow:
    """A distribution of output lengths L, as functions of tokens x."""

    tail: Curve  # P(L > x)
    mean: Curve  # ∫₀ˣ P(L > u) du
    moment: Curve  # ∫₀ˣ u·P(L > u) du


@dataclass(slots=True)
class OfferRow:
    """A node that serves a demand, and the model it does so with."""

    node: int  # row in `nodes`
    arm: int  # row in `arms`


@dataclass(slots=True)
class TaskRow:
    """A task before it is placed."""

    prompt_tokens: float
    payload_bytes: float
    deadline: float  # s
    max_tokens: float  # of an answer
    least_context: float  # tokens it must fit into
    n: float  # answers
    value: float
    lengths: int  # row of the distribution of an answer's length


@dataclass(slots=True)
class TermsRow:
    """What a decision is made by, beside the forecast."""

    value_weight: float  # of on-time value: V
    harm_weight: float  # of that which others lose
    energy_scale: float  # E₀, J
    patience: bool  # whether it may be worth waiting
    backlog: float  # tasks that wait


@dataclass(slots=True)
class ScoreRow:
    """What one node would make of one more task."""

    finish: float  # from now until it is probably done, s
    p_on_time: float
    p_later: float  # the same if it were to wait (`admission.time_after_waiting`)
    busy: float  # busy time it adds, s
    joules: float  # it adds
    stay: float  # it is in a slot, s
    slot_cost: float  # what that costs, in units of the index
    harm: float  # on-time value other tasks lose; UNKNOWN until worked out
    index: float  # INFEASIBLE where it cannot go


@dataclass(slots=True)
class ToldRow:
    """A score as an explanation gives it, numbers rounded."""

    offer: int  # its position
    feasible: bool
    note: int  # position in `scoring.NOTES`
    index: float
    finish: float  # from now, s
    p_on_time: float
    joules: float
    deadline: float  # slacks of the constraints C1 to C3
    compute: float
    memory: float
    bandwidth: float
    confidence: float


@dataclass(slots=True)
class UsualRow:
    """What a second of a node's busy time usually costs others."""

    cost: float  # in units of the index …
    at: float  # … when that was last noted, s; 0: never


@dataclass(slots=True)
class VerdictRow:
    """What comes of a task's scores."""

    best: int  # position of the best node to place it on now; −1: none
    possible: bool  # some node could take it now, and give it a chance
    worth: float  # of that, less what waiting is worth
    waiting: float  # what waiting is worth
    joules: float  # it adds there …
    least_joules: float  # … and where it adds the least, room or no room


NODE, OUTLOOK, IN_FLIGHT, ARM, LENGTHS = map(dtype_of, (NodeRow, OutlookRow, InFlightRow, ArmRow, LengthsRow))
OFFER, TASK, TERMS, SCORE, VERDICT = map(dtype_of, (OfferRow, TaskRow, TermsRow, ScoreRow, VerdictRow))
TOLD, USUAL = map(dtype_of, (ToldRow, UsualRow))

_WRITTEN = (NodeRow, InFlightRow, ArmRow, TaskRow, TermsRow)
_VALUES = {row: attrgetter(*(f.name for f in fields(row))) for row in _WRITTEN}


def values(row: NodeRow | InFlightRow | ArmRow | TaskRow | TermsRow) -> tuple[Any, ...]:
    """The row's fields in order, to be assigned to a record."""
    found: tuple[Any, ...] = _VALUES[type(row)](row)
    return found


class ClusterRows(NamedTuple):
    """All that is known of the cluster."""

    nodes: Records  # NodeRow
    outlooks: Records  # OutlookRow, in the rows of their arms
    in_flight: Records  # InFlightRow
    arms: Records  # ArmRow
    lengths: Records  # LengthsRow
    usual: Records  # UsualRow
