"""The settings all processes share, from `PERLLM_*` environment variables (or `.env`), read once per process; and the
way to those of the packages."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeVar, overload
from urllib.parse import parse_qs, quote, unquote, urlsplit

from pydantic import AfterValidator, BaseModel, Field, SecretStr, ValidationError, field_validator
from pydantic_core import to_jsonable_python
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from perllm.broker import sentinels
from perllm.broker.errors import BadSetting, field_errors
from perllm.broker.sentinels import Sentinels

_SCHEMES = ("redis", "rediss", "unix", sentinels.SCHEME)
_PORT_AND_DATABASE = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\[\]:/]+)(:\d+)?(/\d*)?")
#: A certificate or key that is not given by its whole path.
_FILE_IN_URL = re.compile(r"([?&]ssl_(?:ca_certs|ca_path|certfile|keyfile)=)(?!/|%2F)([^&#]+)", re.IGNORECASE)


def default_data_dir() -> Path:
    """Where the embedded server keeps its data and socket: `$XDG_STATE_HOME/perllm` or `~/.local/state/perllm`."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "perllm"


def absolute(path: Path) -> Path:
    """`~` resolved, and independent of the working directory. Raises ValueError."""
    try:
        return path.expanduser().absolute()
    except RuntimeError as error:  # ~somebody who is not known
        raise ValueError(str(error)) from None


#: A path that holds in another working directory too.
AbsolutePath = Annotated[Path, AfterValidator(absolute)]


class Settings(BaseSettings):
    """What all processes share. Every field can be set as `PERLLM_<FIELD>`. Times in seconds, sizes in bytes.

    A package with settings of its own adds them in a subclass (see `models`).
    """

    #: Fields that hold a file or folder here, or else a name that means something elsewhere.
    files_or_names: ClassVar[tuple[str, ...]] = ()

    model_config = SettingsConfigDict(
        env_prefix="PERLLM_",
        env_file=".env",
        extra="ignore",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    redis_url: SecretStr | None = None
    """The Redis server: `redis://`, `rediss://` (with `user:password@`), `unix://`, or `sentinel://host,host/name` for
    one that moves; unset: an embedded one."""
    replicas: Annotated[int, Field(ge=0, le=16)] = 0
    """So many of the server's replicas must have a task before it counts as accepted."""
    data_dir: AbsolutePath = Field(default_factory=default_data_dir)
    """The embedded server's data and socket, logs, and the API's files; `~/.local/state/perllm` unless set."""
    server_memory: Annotated[int, Field(ge=16 << 20)] | None = None
    """Bytes the embedded server may hold; unset: a quarter of the memory. Full, it refuses new tasks."""
    cell: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")] = "perllm"
    """Name of this installation on the server: the prefix of all its keys."""

    max_prompt_bytes: Annotated[int, Field(ge=1)] = 1 << 20
    """Longest input of a task, bytes."""
    max_result_bytes: Annotated[int, Field(ge=1024)] = 8 << 20
    """Most bytes the embeddings of one task may take, 16 for 3 numbers."""
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] = 4096
    """Longest answer of a task that does not say, tokens; the context and the deadline may end it before."""
    lease: Annotated[float, Field(ge=0.5, le=300)] = 4.0
    """A worker that is silent for so long, s, has lost its tasks: they are placed anew."""
    heartbeat: Annotated[float, Field(ge=0.05, le=60)] = 1.0
    """Seconds between a worker's heartbeats."""
    grace: Annotated[float, Field(ge=0, le=3600)] = 10.0
    """Seconds for which running work, and answers under way, may go on after SIGTERM."""
    max_strikes: Annotated[int, Field(ge=1, le=100)] = 3
    """Attempts that may end without a result before a task fails."""
    retention: Annotated[float, Field(ge=1)] = 86_400.0
    """Seconds finished tasks are kept, …"""
    retention_tasks: Annotated[int, Field(ge=1)] = 1_000_000
    """… and at most so many of each final state."""
    stream_length: Annotated[int, Field(ge=1_000)] = 1_000_000
    """Events kept, about."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe events that are logged."""
    log_json: bool = False
    """Log as JSON lines instead of text for people."""

    @field_validator("redis_url")
    @classmethod
    def _usable(cls, url: SecretStr | None) -> SecretStr | None:
        if url is None:
            return None
        parts = urlsplit(url.get_secret_value())
        if parts.scheme not in _SCHEMES:
            raise ValueError("must begin with redis://, rediss://, unix:// or sentinel://")
        if parts.scheme == sentinels.SCHEME:
            Sentinels.of(url.get_secret_value())
        elif parts.scheme == "unix":
            if not parts.path or parts.netloc.rpartition("@")[2]:
                raise ValueError("must name a socket by its whole path, as in unix:///run/redis.sock")
        elif not _PORT_AND_DATABASE.fullmatch(f"{parts.netloc.rpartition('@')[2]}{parts.path}"):
            raise ValueError("must name a host, and may name a port and a database's number: redis://host:6379/0")
        else:
            _ = parts.port  # raises ValueError when out of range
        whole = _FILE_IN_URL.sub(lambda m: m[1] + quote(str(absolute(Path(unquote(m[2]))))), url.get_secret_value())
        return SecretStr(whole)

    def environment(self) -> dict[str, str]:
        """What was set, secrets included, as variables: for a process that runs in another folder, without this one's
        `.env`."""
        given = {name: getattr(self, name) for name in sorted(self.model_fields_set)}
        for name in self.files_or_names:
            if given.get(name) and Path(given[name]).exists():
                given[name] = Path(given[name]).absolute()
        return {f"PERLLM_{name.upper()}": _as_variable(value) for name, value in given.items() if value is not None}

    @property
    def socket(self) -> Path:
        """The embedded server's Unix socket."""
        return self.data_dir / "valkey.sock"

    @property
    def url(self) -> str:
        """The Redis URL in force, secrets included: never log it, use `address`."""
        return self.redis_url.get_secret_value() if self.redis_url else f"unix://{quote(str(self.socket))}"

    @property
    def sentinels(self) -> Sentinels | None:
        """Who knows where the server is, if it moves."""
        return Sentinels.of(self.url) if self.url.startswith(f"{sentinels.SCHEME}:") else None

    @property
    def address(self) -> str:
        """The server's address without user or password, for people and logs."""
        if self.sentinels is not None:
            return self.sentinels.address
        parts = urlsplit(self.url)
        if parts.scheme == "unix":
            return f"unix://{unquote(parts.path)}"
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        return f"{parts.scheme}://{host}:{parts.port or 6379}"

    @property
    def celery_url(self) -> str:
        """The same server in kombu's spelling (it calls a Unix socket `redis+socket://`)."""
        if self.sentinels is not None:
            return self.sentinels.celery_url
        parts = urlsplit(self.url)
        if parts.scheme == "rediss" and "ssl_cert_reqs" not in parts.query:
            return f"{self.url}{'&' if parts.query else '?'}ssl_cert_reqs=required"  # Celery asks to be told
        if parts.scheme != "unix":
            return self.url
        query = parse_qs(parts.query)
        login = f"{parts.netloc.rsplit('@', 1)[0]}@" if "@" in parts.netloc else ""
        return f"redis+socket://{login}{parts.path}?virtual_host={query.get('db', ['0'])[0]}"


def _as_variable(value: object) -> str:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    return json.dumps(to_jsonable_python(value)) if isinstance(value, bool | dict | tuple | BaseModel) else str(value)


S = TypeVar("S", bound=Settings)


def models() -> dict[str, type[Settings]]:
    """The settings of every package that is installed, by the package's name. Packages register them under the entry
    point group `perllm.settings`, so that the broker knows none that imports it."""
    found = {}
    for entry in sorted(entry_points(group="perllm.settings"), key=lambda e: e.name):
        with suppress(ModuleNotFoundError):  # of an extra that is not installed
            found[entry.name] = entry.load()
    return found


def environment(settings: Settings) -> dict[str, str]:
    """`settings`, and what was set of any package's, as variables: for processes that run in another folder, without
    this one's `.env`. Raises BadSetting."""
    given = {name: value for one in models().values() for name, value in load_settings(one).environment().items()}
    return given | settings.environment()


@overload
def load_settings(**overrides: object) -> Settings: ...
@overload
def load_settings(kind: type[S], /, **overrides: object) -> S: ...
def load_settings(kind: type[Settings] = Settings, /, **overrides: object) -> Settings:
    """The settings in force, of a package's class. Raises BadSetting naming the variable and what is wrong with it."""
    try:
        return kind(**overrides)  # type: ignore[arg-type]
    except ValidationError as error:
        raise BadSetting(field_errors(error, name=lambda field: f"PERLLM_{field.upper()}")) from None
    except SettingsError as error:
        field = re.search(r'field "(\w+)"', str(error))
        raise BadSetting(f"PERLLM_{field[1].upper() if field else '*'}: not valid JSON: {error.__cause__}") from None
