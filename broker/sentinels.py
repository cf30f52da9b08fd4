"""`sentinel://`: a server that moves. Sentinels watch a primary and its replicas, and say which is the primary now
(redis.io, "High availability with Redis Sentinel")."""

from __future__ import annotations

from typing import NamedTuple, Self
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

SCHEME = "sentinel"
PORT = 26379
#: Fields of the query that are for the sentinels themselves.
_LOGIN = {"sentinel_username": "username", "sentinel_password": "password"}
_FORM = "sentinel://user:password@host:26379,other:26379/name-of-the-primary"


class Sentinels(NamedTuple):
    """What a URL `sentinel://[user[:password]@]host[:port],…/name[/database][?option=value&…]` says. User, password and
    options are the server's; `sentinel_username` and `sentinel_password` among the options are the sentinels'."""

    hosts: tuple[tuple[str, int], ...]
    name: str
    login: str  # of the server, "" or "user:password@", quoted as in the URL
    database: int
    query: str
    own: dict[str, str]  # the sentinels' login

    @classmethod
    def of(cls, url: str) -> Self:
        """Raises ValueError for one that is none."""
        parts = urlsplit(url)
        login, at, listed = parts.netloc.rpartition("@")
        name, _, database = parts.path.strip("/").partition("/")
        if not name or not listed or (database and not database.isdecimal()):
            raise ValueError(f"must name sentinels and their primary: {_FORM}")
        hosts = []
        for each in listed.split(","):
            try:
                one = urlsplit(f"//{each}")
                hosts.append((one.hostname or "", one.port or PORT))
            except ValueError:
                raise ValueError(f"the sentinel {each[:80]!r} is no host and port: {_FORM}") from None
        if not all(host for host, _ in hosts):
            raise ValueError(f"a sentinel lacks its host: {_FORM}")
        given = parse_qsl(parts.query)
        own = {_LOGIN[key]: value for key, value in given if key in _LOGIN}
        query = urlencode([(key, value) for key, value in given if key not in _LOGIN])
        return cls(tuple(hosts), unquote(name), f"{login}{at}", int(database or 0), query, own)

    @property
    def address(self) -> str:
        """For people and logs, without secrets."""
        return f"{SCHEME}://{','.join(_joined(*host) for host in self.hosts)}/{self.name}"

    @property
    def server_url(self) -> str:
        """How the server would be written if the first sentinel were it: for its login, database and options."""
        return f"redis://{self.login}{_joined(*self.hosts[0])}/{self.database}{'?' if self.query else ''}{self.query}"

    @property
    def celery_url(self) -> str:
        """In kombu's spelling, which wants the primary's name apart (`master_name`)."""
        return ";".join(f"{SCHEME}://{self.login}{_joined(*host)}/{self.database}" for host in self.hosts)


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
