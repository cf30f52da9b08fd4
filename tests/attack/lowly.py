"""`python -m attack.lowly PLAN`: the hostile tenant with little of this machine's time, as if it were on another."""

from __future__ import annotations

import asyncio
import json
import os
import sys

from attack.hostile import Plan, run
from attack.kinds import KINDS

if __name__ == "__main__":
    os.nice(10)
    sys.setrecursionlimit(20_000)  # it writes what is nested deeper than others would read
    asyncio.run(run(Plan(**json.loads(sys.argv[1])), KINDS))
