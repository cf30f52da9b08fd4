"""`python -m scheduler`: the scheduler service, until SIGTERM or SIGINT."""

from __future__ import annotations

import signal
import sys

from broker import connection, logs
from broker.errors import PerLLMError
from broker.ledger import Ledger
from broker.settings import load_settings
from scheduler.core.core import Core
from scheduler.policies import make_policy
from scheduler.rehearsal import rehearse
from scheduler.service import Service


def main() -> int:
    """Run it. Status 2, and one line, for a wrong setting or an unusable server."""
    try:
        settings = load_settings()
        logs.configure(settings)
        connection.check(settings)

        def make_core() -> Core:
            policy = make_policy(settings.policy)
            return Core(policy, queue_beyond_slots=settings.queue_beyond_slots, forgiving=True)

        rehearse(make_core())  # an unknown policy is an error now, and the first real task finds all compiled
    except PerLLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    service = Service(settings, Ledger(settings, reply_timeout=connection.NEAR_REPLY_TIMEOUT), make_core)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: service.stop())
    service.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
