"""`python -m perllm.scheduler`: the scheduler service, until SIGTERM or SIGINT."""

from __future__ import annotations

import signal
import sys

from perllm.broker import connection, extras, logs
from perllm.broker.errors import PerLLMError, exit_with
from perllm.broker.ledger import Ledger
from perllm.broker.settings import load_settings

try:
    from perllm.scheduler.core.scheduler import SchedulerCore
    from perllm.scheduler.policies import core_options, make_policy
    from perllm.scheduler.service import Service
    from perllm.scheduler.settings import SchedulerSettings
    from perllm.scheduler.warm_up import warm_up
except ModuleNotFoundError as error:
    exit_with(extras.lacking("the scheduler", error, "scheduler"))


def main() -> int:
    """Run it. Status 2, and one line on stderr, for a wrong setting or an unusable server."""
    try:
        settings = load_settings(SchedulerSettings)
        logs.configure(settings)
        connection.check(settings)

        def make_core() -> SchedulerCore:
            policy = make_policy(settings.policy)
            return SchedulerCore(policy, reject_on_error=True, **core_options(settings.queue_beyond_slots))

        warm_up(make_core())  # an unknown policy is an error now, and the first real task finds everything compiled
    except PerLLMError as error:
        exit_with(error)
    service = Service(settings, Ledger(settings, reply_timeout=connection.NEAR_REPLY_TIMEOUT), make_core)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: service.stop())
    service.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
