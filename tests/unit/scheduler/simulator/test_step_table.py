"""Step tables give back what was measured."""

from __future__ import annotations

import json

import pytest

from perllm.scheduler.simulator.step_table import PROFILES, load_table, profile_names


def test_tables_give_back_what_was_measured() -> None:
    rows = json.loads((PROFILES / "vllm-0.25.1_h200_llama-33b-bf16_phases.json").read_text())
    table = load_table("vllm-0.25.1_h200_llama-33b-bf16", 256, time=1.0, power=1.0)
    for row in rows["rows"]:
        if row["phase"] == "decode":
            context = row["B"] * row["ctx"]
            assert table.decode(row["B"], context) == pytest.approx(row["step_s"], rel=1e-6), row
        if row["phase"] == "prefill" and row["par"] == 1:
            assert table.prefill(row["prompt"]) == pytest.approx(row["s_per_request"]), row
        if row["phase"] == "mixed":  # never used to make the table: a check that a chunk's price is right
            grown = row["B"] * (64 + row["steps"] / 2)
            extra = row["joined"] * (table.prefill(row["joining_prompt"]) - table.prefill(0)) / row["steps"]
            assert table.decode(row["B"], grown) + extra == pytest.approx(row["step_s"], rel=0.12), row


def test_the_cpu_table_gives_back_the_rates_at_12_threads() -> None:
    table = load_table("llamacpp-0.3.36_xeon-spr_llama-8b-q4_0", 16, time=1.0, power=1.0, cpu_watts=(15, 60))
    assert [round(n / table.decode(n, 999), 2) for n in (1, 2, 4, 8, 16)] == [10.84, 13.5, 32.67, 40.54, 61.64]
    assert 256 / table.prefill(256) == pytest.approx(59.6)


@pytest.mark.parametrize("profile", profile_names())
def test_a_boot_calibration_is_near_the_table_it_was_fitted_to(profile: str) -> None:
    table = load_table(profile, 8, time=1.0, power=1.0, cpu_watts=(15, 60))
    cal = table.calibration(prompt=250, output=60)
    for batch in (1, 4, 8):
        linear = cal.step + batch * (cal.sequence + cal.context * 280)
        assert linear == pytest.approx(table.decode(batch, batch * 280), rel=0.35)
