"""Row classes and the structured arrays they declare."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest

from perllm.scheduler.csucb import rows
from perllm.scheduler.csucb.token_bins import BINS

DECLARED = {
    rows.NODE: rows.NodeRow,
    rows.OUTLOOK: rows.OutlookRow,
    rows.IN_FLIGHT: rows.InFlightRow,
    rows.ARM: rows.ArmRow,
    rows.LENGTHS: rows.LengthsRow,
    rows.OFFER: rows.OfferRow,
    rows.TASK: rows.TaskRow,
    rows.TERMS: rows.TermsRow,
    rows.SCORE: rows.ScoreRow,
    rows.VERDICT: rows.VerdictRow,
    rows.TOLD: rows.ToldRow,
    rows.USUAL: rows.UsualRow,
}


@pytest.mark.parametrize("dtype", DECLARED)
def test_the_columns_are_the_declared_fields_in_order(dtype: np.dtype[np.void]) -> None:
    assert dtype.names == tuple(f.name for f in fields(DECLARED[dtype]))


def test_numbers_flags_and_curves_have_their_kinds() -> None:
    assert rows.NODE["slots"] == np.int64
    assert rows.NODE["heard"] == np.float64
    assert rows.NODE["stalled"] == np.bool_
    assert rows.OUTLOOK["times"] == np.dtype((np.float64, (BINS + 1,)))


def test_a_row_is_written_and_read_back() -> None:
    arms = np.zeros(2, rows.ARM)
    row = rows.ArmRow(step=0.1, sequence=0.2, prefill=0.3, context=0.4, spread=0.5, chunk=6, longest=7, kv_tokens=8)
    arms[1] = rows.values(row)
    assert rows.ArmRow(*arms.item(1)) == row
    assert arms.item(0) == (0.0,) * len(arms.dtype)
