"""How long outputs get by what is asked: the part of `csucb.output_lengths` that reads texts' codes.

Per tenant, two linear models over hashed codes (`broker.text_features`) give the place of an output length on the scale
of token bins, in bins, and the logarithm of how far off that will be; a small table remembers lengths of exact prompts.
Per service class, histograms say how far lengths really were from the place given, apart for each degree of certainty:
a class's row shifted, so that every task has a distribution of its own that is right in the mean of those alike. Three
experts thus name a distribution: today's histogram by class and prompt size (awake always), the text (awake where there
are codes), the repeat (awake where the prompt was seen before). They are mixed by their past likelihood in the class,
fixed share as Herbster and Warmuth (1998), sleeping experts as Freund et al. (1997): over any run of n tasks of a class
the log score is at most ln(1 / START[HISTOGRAM]) + n·ln(1 / (1 − SHARE)) nats worse than the histogram's alone.

The models learn by normalised adaptive gradient steps: a code's rate falls with the square root of how often it was
seen. Cut tasks enter with what is expected beyond the cut.
"""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from perllm.broker.text_features import DIGEST_BYTES, Sketch
from perllm.scheduler.core.compiled import compiled
from perllm.scheduler.csucb.token_bins import BINS, Floats

Codes = NDArray[np.int64]
Digests = NDArray[np.uint64]
Weights = NDArray[np.float32]

#: Hashed codes a tenant's models have weights for (power of two).
BUCKETS = 1 << 14
_SENT = np.dtype("<u2")
#: What has codes beside the text.
BESIDE = ("size", "limit", "model")  # of the prompt and in the task, by doublings
#: Rates of a code never seen, of the place and of the log spread; and how often a code counts as seen at most, so that
#: what has changed is learned anew.
RATE, SPREAD_RATE, MOST_SEEN = 3.0, 1.0, 1000.0
#: What a code counts, so that those of a usual text together count 1. Not less in a longer text: what a word says does
#: not depend on how many there are.
CODE = 1.0 / math.sqrt(48)
#: A class's own place and spread follow their mean over this many tasks at least.
CLASS_MEMORY = 100.0
#: The place of a length nobody knows anything of, bins, and the log spread there.
PLACE, SPREAD = 24.0, 1.8

#: Prompts a tenant's table remembers: so many sets of WAYS each.
SETS, WAYS = 512, 4
#: The weight of the newest length of a prompt, at least.
NEWEST = 0.2

#: Bins a histogram of errors reaches to either side; errors beyond count there.
REACH = 64
WIDTH = 2 * REACH + 1
#: Degrees of certainty: of the text's place by its spread, e^SPREAD_STEP apart; of a prompt by how often it was seen
#: and how much its lengths differed.
SPREADS, SPREAD_STEP, LEAST_SPREAD = 8, 0.4, -0.2
REPEATS = 5
#: Memory of a histogram of errors, and what the shape it begins with counts for, tasks.
ERROR_MEMORY, ERROR_PRIOR = 400.0, 8.0

#: Experts, their weights at the start, and the share of the awake ones' weight that is dealt out anew after each task.
HISTOGRAM, TEXT, REPEAT = 0, 1, 2
START: Floats = np.array([0.3, 0.3, 0.4])
SHARE = 0.001
#: Probability an expert leaves to lengths it holds impossible.
FLOOR = 1e-6

#: The column of `TenantText.weights` that says how often a code was seen, after the weights for place and spread.
_SEEN = 2


def _student(scale: float) -> Floats:
    """Shares (WIDTH,) of a Student t with 3 degrees of freedom about 0."""
    x = (np.arange(WIDTH) - REACH) / scale
    shape: Floats = (1.0 + x * x / 3.0) ** -2.0
    shape /= shape.sum()
    return shape


#: What the histograms of errors begin with: the SPREADS of the text, then the REPEATS.
ERRORS: Floats = np.array(
    [_student(1.3 * math.exp(LEAST_SPREAD + SPREAD_STEP * i)) for i in range(SPREADS)]
    + [_student(scale) for scale in (2.0, 0.4, 1.0, 3.0, 8.0)]
)


class Place(NamedTuple):
    """What text says of a length: the bin it is about and the degree of certainty; −1: nothing."""

    bin: int = -1
    spread: int = -1
    repeat_bin: int = -1
    repeat: int = -1


NOWHERE = Place()


@dataclass(slots=True, eq=False)
class TenantText:
    """What is learned of one tenant's words and prompts."""

    weights: Weights = field(default_factory=lambda: np.zeros((BUCKETS, 3), np.float32))
    digests: Digests = field(default_factory=lambda: np.zeros((SETS, WAYS), np.uint64))
    # Of each prompt: times seen, mean bin, mean distance from it, credit (see `_remember`).
    prompts: Weights = field(default_factory=lambda: np.zeros((SETS, WAYS, 4), np.float32))
    _kept: dict[str, Any] | None = None  # the last snapshot, while nothing was learned since

    def learned(self) -> None:
        self._kept = None

    def snapshot(self) -> dict[str, Any]:
        if self._kept is None:
            rows, used = np.flatnonzero(self.weights[:, _SEEN]), self.digests.ravel() != 0
            self._kept = {
                "codes": _packed(rows.astype(np.uint16)),
                "weights": _packed(self.weights[rows]),
                "slots": _packed(np.flatnonzero(used).astype(np.uint16)),
                "digests": _packed(self.digests.ravel()[used]),
                "prompts": _packed(self.prompts.reshape(-1, 4)[used]),
            }
        return self._kept

    @classmethod
    def restored(cls, state: dict[str, Any]) -> TenantText:
        """Raises ValueError or KeyError for a foreign one."""
        text = cls()
        try:
            rows, slots = _unpacked(state["codes"], np.uint16), _unpacked(state["slots"], np.uint16)
            text.weights[rows] = _unpacked(state["weights"], np.float32).reshape(-1, 3)
            text.digests.ravel()[slots] = _unpacked(state["digests"], np.uint64)
            text.prompts.reshape(-1, 4)[slots] = _unpacked(state["prompts"], np.float32).reshape(-1, 4)
        except IndexError as error:
            raise ValueError(f"not what was learned of texts: {error}") from None
        return text


def _packed(array: NDArray[Any]) -> str:
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode()


def _unpacked(text: str, kind: type[Any]) -> NDArray[Any]:
    return np.frombuffer(base64.b64decode(text), np.dtype(kind).newbyteorder("<")).astype(kind)


@dataclass(slots=True, eq=False)
class ClassText:
    """What is learned of the texts of one service class."""

    state: Floats = field(
        default_factory=lambda: np.array([PLACE, SPREAD, 0.0])
    )  # its own place and spread, tasks seen
    errors: Floats = field(default_factory=lambda: np.zeros((SPREADS + REPEATS, WIDTH)))  # decayed counts
    experts: Floats = field(default_factory=START.copy)

    def snapshot(self) -> dict[str, Any]:
        at = np.flatnonzero(self.errors)
        return {
            "state": self.state.tolist(),
            "experts": self.experts.tolist(),
            "errors": {str(i): float(self.errors.flat[i]) for i in at},
        }

    @classmethod
    def restored(cls, given: dict[str, Any]) -> ClassText:
        text = cls(np.array(given["state"], float), experts=np.array(given["experts"], float))
        for i, count in given["errors"].items():
            text.errors.flat[int(i)] = float(count)
        return text


@lru_cache(maxsize=4096)
def _beside(service: str, size: int, limit: int, model: str | None) -> tuple[int, int, int, int]:
    """A class's own number, and the codes of what is known beside the text, as BESIDE has it."""
    own, a, b, c = (crc32(name.encode()) for name in (service, f"size {size}", f"limit {limit}", f"model {model}"))
    return own, a, b, c


@lru_cache(maxsize=4096)  # a task is asked about when it is decided, when it is placed, and when it ends
def codes_of(sketch: Sketch, service: str, size: int, max_tokens: int, model: str | None) -> Codes:
    """The rows of the tenant's weights that a task with this text has: the same word has another in another class.
    Nobody may change them."""
    own, a, b, c = _beside(service, max(size, 1).bit_length(), max_tokens.bit_length(), model)
    return _rows(np.frombuffer(sketch, _SENT, offset=DIGEST_BYTES), own, a, b, c)


@compiled
def _rows(sent: NDArray[np.uint16], own: int, a: int, b: int, c: int) -> Codes:
    n = len(sent)
    codes = np.empty(n + 3, np.int64)
    for i in range(n):
        codes[i] = (sent[i] ^ own) & (BUCKETS - 1)
    codes[n], codes[n + 1], codes[n + 2] = a, b, c
    for i in range(n, n + 3):
        codes[i] = (codes[i] ^ own) & (BUCKETS - 1)
    return codes


def text_codes(sketch: Sketch) -> list[int]:
    """The codes as they were sent."""
    codes: list[int] = np.frombuffer(sketch, _SENT, offset=DIGEST_BYTES).tolist()
    return codes


def digest_of(sketch: Sketch) -> np.uint64:
    """Of the whole text; 0: none."""
    return np.uint64(int.from_bytes(sketch[:DIGEST_BYTES], "little"))


# --- compiled


@compiled
def _linear(weights: Weights, codes: Codes, state: Floats) -> tuple[float, float]:
    """Place (bins) and log spread."""
    place, spread = 0.0, 0.0
    for code in codes:
        place += weights[code, 0]
        spread += weights[code, 1]
    return state[0] + place * CODE, state[1] + spread * CODE


@compiled
def _find(digests: Digests, digest: np.uint64) -> int:
    """Where in its set a prompt is, or −1."""
    mine = digests[digest % np.uint64(SETS)]
    for way in range(WAYS):
        if mine[way] == digest:
            return way
    return -1


@compiled
def _degree(prompt: Weights) -> int:
    """How certain the lengths of a prompt seen before are."""
    if prompt[0] < 2.0:
        return 0
    off = prompt[2]
    if off < 0.3:
        return 1
    if off < 1.5:
        return 2
    return 3 if off < 4.0 else 4


@compiled
def locate(
    weights: Weights,
    digests: Digests,
    prompts: Weights,
    codes: Codes,
    digest: np.uint64,
    state: Floats,
) -> tuple[int, int, int, int]:
    """The fields of `Place`."""
    place, spread = _linear(weights, codes, state)
    where = min(max(math.floor(place), 0), BINS - 1)
    certainty = min(max(math.floor((spread - LEAST_SPREAD) / SPREAD_STEP + 0.5), 0), SPREADS - 1)
    way = _find(digests, digest) if digest != 0 else -1
    if way < 0:
        return where, certainty, -1, -1
    prompt = prompts[digest % np.uint64(SETS), way]
    return where, certainty, min(max(int(prompt[1]), 0), BINS - 1), _degree(prompt)


@compiled
def shift(errors: Floats, degree: int, where: int, mass: Floats) -> None:
    """Fill `mass` (BINS,) with the histogram of errors of this degree about the bin `where`."""
    counts, prior = errors[degree], ERRORS[degree]
    total = 0.0
    for j in range(WIDTH):
        total += counts[j]
    mass[:] = FLOOR / BINS
    keep = (1.0 - FLOOR) / (total + ERROR_PRIOR)
    for j in range(WIDTH):
        i = min(max(where + j - REACH, 0), BINS - 1)
        mass[i] += (counts[j] + ERROR_PRIOR * prior[j]) * keep


@compiled
def heed(mass: Floats, likelihood: Floats) -> None:
    """Weigh the probabilities (BINS,) by a likelihood of each bin and make them sum to 1."""
    total = 0.0
    for i in range(BINS):
        mass[i] = (mass[i] + 1e-12) * likelihood[i]
        total += mass[i]
    for i in range(BINS):
        mass[i] /= total


@compiled
def mix(histogram: Floats, likelihood: Floats, errors: Floats, experts: Floats, place: Codes, mixed: Floats) -> Floats:
    """Fill `mixed` (BINS,) with the experts' distributions, each weighed by `likelihood` (that of a hint), mixed; where
    there is a hint. Returns the three distributions, one per row; those asleep are zero."""
    each = np.zeros((3, BINS))
    for i in range(BINS):
        each[HISTOGRAM, i] = histogram[i]
    awake = experts[HISTOGRAM]
    if place[1] >= 0:
        shift(errors, place[1], place[0], each[TEXT])
        awake += experts[TEXT]
    if place[3] >= 0:
        shift(errors, SPREADS + place[3], place[2], each[REPEAT])
        awake += experts[REPEAT]
    mixed[:] = 0.0
    for k in range(3):
        if k == HISTOGRAM or (k == TEXT and place[1] >= 0) or (k == REPEAT and place[3] >= 0):
            if not math.isnan(likelihood[0]):
                heed(each[k], likelihood)
            for i in range(BINS):
                mixed[i] += experts[k] / awake * each[k, i]
    return each


@compiled
def _judge(each: Floats, experts: Floats, place: Codes, target: Floats) -> None:
    """Weights of the experts that are awake by the probability each gave to `target` (BINS,): one, at the bin the
    length was in, or of those beyond a cut the share that lies beyond."""
    awake = np.array([True, place[1] >= 0, place[3] >= 0])
    before, after, start = 0.0, 0.0, 0.0
    for k in range(3):
        if awake[k]:
            p = 0.0
            for i in range(BINS):
                p += each[k, i] * target[i]
            before += experts[k]
            start += START[k]
            experts[k] *= max(p, 1e-12)
            after += experts[k]
    for k in range(3):
        if awake[k]:
            experts[k] = before * ((1.0 - SHARE) * experts[k] / after + SHARE * START[k] / start)


@compiled
def _count(errors: Floats, degree: int, where: int, shares: Floats) -> None:
    """One more error of this degree: the shares (BINS,) of a length placed at `where`, a quarter to each neighbour."""
    mine = errors[degree]
    for j in range(WIDTH):
        mine[j] *= 1.0 - 1.0 / ERROR_MEMORY
    for i in range(BINS):
        if shares[i] > 0.0:
            j = min(max(i - where, -REACH + 1), REACH - 1) + REACH
            mine[j] += 0.8 * shares[i]
            mine[j - 1] += 0.1 * shares[i]
            mine[j + 1] += 0.1 * shares[i]


@compiled
def _remember(digests: Digests, prompts: Weights, digest: np.uint64, middle: float) -> None:
    """Note the length of a prompt. In a full set the one with the least credit goes and the others lose some: prompts
    that come again outlast those that do not, and those that came once often do not stay for ever."""
    row = digest % np.uint64(SETS)
    way = _find(digests, digest)
    if way >= 0:
        prompt = prompts[row, way]
        prompt[0] = min(prompt[0] + 1.0, 1000.0)
        off = middle - prompt[1]
        rate = max(1.0 / prompt[0], NEWEST)
        prompt[1] += rate * off
        prompt[2] += rate * (abs(off) - prompt[2])
        prompt[3] = min(prompt[3] + 1.0, 15.0)
        return
    least = 0  # an empty place has no credit, any other has 1 at least
    for way in range(1, WAYS):
        if prompts[row, way, 3] < prompts[row, least, 3]:
            least = way
    if digests[row, least] != 0:
        for way in range(WAYS):
            prompts[row, way, 3] = max(prompts[row, way, 3] - 1.0, 1.0)
    digests[row, least] = digest
    prompts[row, least, 0], prompts[row, least, 1] = 1.0, middle
    prompts[row, least, 2], prompts[row, least, 3] = 0.0, 2.0


@compiled
def learn(
    weights: Weights,
    digests: Digests,
    prompts: Weights,
    codes: Codes,
    digest: np.uint64,
    state: Floats,
    errors: Floats,
    experts: Floats,
    histogram: Floats,
    likelihood: Floats,
    target: Floats,
    ended: bool,
) -> None:
    """One task: its length was in the bin that `target` (BINS,) is 1 at, or (not `ended`) beyond a cut, with `target`
    the part of each bin that lies there. `histogram` and `likelihood` as for `mix`."""
    place = np.array(locate(weights, digests, prompts, codes, digest, state))
    shares = np.empty(BINS)
    each = mix(histogram, likelihood, errors, experts, place, shares)
    total, middle, left = 0.0, 0.0, 0.0
    for i in range(BINS):
        left += target[i] * shares[i]
    for i in range(BINS):  # a share of one task to each bin it may have been in
        shares[i] = target[i] if ended else target[i] * max(shares[i], 1e-9)
        total += shares[i]
        middle += (i + 0.5) * shares[i]
    for i in range(BINS):
        shares[i] /= total
    middle /= total
    _judge(each, experts, place, target)
    _count(errors, place[1], place[0], shares)
    if place[3] >= 0:
        _count(errors, SPREADS + place[3], place[2], shares)
    if digest != 0 and (ended or left > 0.0):
        _remember(digests, prompts, digest, middle)
    _step(weights, codes, state, middle)


@compiled
def _step(weights: Weights, codes: Codes, state: Floats, middle: float) -> None:
    """A step of both models towards a length in the middle of which bin."""
    place, spread = _linear(weights, codes, state)
    off = min(max(middle - place, -24.0), 24.0)
    spread_off = math.log(abs(middle - place) + 0.5) - spread
    state[2] += 1.0
    rate = max(1.0 / (state[2] + 1.0), 1.0 / CLASS_MEMORY)
    pull, spread_pull = 0.0, 0.0
    for code in codes:
        r = CODE * CODE / math.sqrt(1.0 + weights[code, 2])
        pull += RATE * r
        spread_pull += SPREAD_RATE * r
    for code in codes:
        r = CODE / math.sqrt(1.0 + weights[code, 2])
        weights[code, 0] += RATE * r * off / (1.0 + pull)
        weights[code, 1] += SPREAD_RATE * r * spread_off / (1.0 + spread_pull)
        weights[code, 2] = min(weights[code, 2] + 1.0, MOST_SEEN)
    state[0] += rate * off
    state[1] += rate * spread_off


@compiled
def strongest(weights: Weights, codes: Codes, count: int) -> tuple[Codes, Floats]:
    """The positions of the `count` codes that move the place most, and by how many bins."""
    count = min(count, len(codes))
    at, moves = np.zeros(count, np.int64), np.zeros(count)
    for j in range(len(codes)):
        move = weights[codes[j], 0] * CODE
        k = count
        while k > 0 and abs(move) > abs(moves[k - 1]):
            k -= 1
        if k < count:
            for i in range(count - 1, k, -1):
                at[i], moves[i] = at[i - 1], moves[i - 1]
            at[k], moves[k] = j, move
    return at, moves
