"""The users of compose/users.acl on a server of the tests."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import redis

from perllm.broker import functions
from perllm.broker.connection import connect
from perllm.broker.settings import Settings

FILE = Path(__file__).parents[2] / "compose" / "users.acl"
#: Where the user of an application with Celery workers of its own is described.
APPLICATION = Path(__file__).parents[2] / "docs" / "celery.md"
ROLES = ("producer", "api", "webhooks", "inbox", "scheduler", "worker", "monitor")


def password(role: str) -> str:
    """An obvious one, for tests only."""
    return f"test-{role}-password"


def rules() -> list[str]:
    """The lines of the files for a server of the tests, whose own user stays what it is: the tests'."""
    texts = [file.read_text(encoding="utf-8") for file in (FILE, APPLICATION)]
    lines = [line.strip() for text in texts for line in text.splitlines() if line.strip().startswith("user ")]
    given = [re.sub(r"\$([A-Z]+)_PASSWORD", lambda m: password(m[1].lower()), line) for line in lines]
    return [line for line in given if line.split()[1] in (*ROLES, "application")]


def create(url: str) -> None:
    """Give a running server these users, and the functions they call."""
    with redis.Redis.from_url(url) as admin:
        functions.load_all(admin)
        for line in rules():
            admin.execute_command("ACL", "SETUSER", *line.split()[1:])


def known(url: str) -> bool:
    """Whether the server has these users."""
    with connect(Settings(redis_url=url)) as admin:
        return set(ROLES) <= {_text(u) for u in admin.acl_users()}


def url_of(role: str, url: str) -> str:
    """The same server's URL for one of them."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=f"{role}:{password(role)}@{parts.netloc.rpartition('@')[2]}"))


def denied(url: str) -> list[str]:
    """What the server has refused since last asked: user and what it wanted."""
    with connect(Settings(redis_url=url)) as admin:
        log = admin.acl_log()
        admin.acl_log_reset()
    return sorted({f"{_text(e['username'])}: {_text(e['reason'])} {_text(e['object'])}" for e in log})


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
