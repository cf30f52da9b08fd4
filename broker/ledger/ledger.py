"""The ledger's Python face: one method per operation of `ledger.lua`, and what may be read, typed. Times in s, the
server's clock. Who may call what is in `compose/users.acl`; these parts are its roles."""

from perllm.broker.ledger.producer import Producer
from perllm.broker.ledger.query import Query
from perllm.broker.ledger.scheduler import Scheduler
from perllm.broker.ledger.worker import Worker


class Ledger(Producer, Scheduler, Worker, Query):
    """Every operation on tasks and nodes, each one atomic call. Thread-safe.

    Raises Unreachable when the server cannot be used; nothing is half-done then, and any call may be
    repeated. `reply_timeout` is how long the server may be silent, s.
    """
