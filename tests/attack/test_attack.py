"""The short form of `make attack`: a hostile tenant beside a neighbour, who is to notice nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from attack import campaign
from attack.kinds import KINDS

#: Seconds the neighbour has alone, and of the attack.
ALONE, ATTACKED = 4.0, 12.0
#: What must remain of the share on time: the long form needs more, but this machine may be busy with other things.
SHARE = 0.8
#: Any will do; `make attack ARGS="--seed ..."` does the same again.
SEED = 7


@pytest.mark.timeout(300)
def test_a_hostile_tenant_harms_nobody(tmp_path: Path) -> None:
    verdict = campaign.run(tmp_path / "run", SEED, ALONE, ATTACKED, share=SHARE)
    assert verdict.failures == [], "\n".join(verdict.failures)
    assert len(verdict.kinds) > len(KINDS) / 2
