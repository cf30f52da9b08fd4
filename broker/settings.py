"""All settings, from `PERLLM_*` environment variables (or `.env`). One model, read once per process."""

from __future__ import annotations

import ipaddress
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, overload
from urllib.parse import parse_qs, quote, unquote, urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from perllm.broker.errors import BadSetting, field_errors
from perllm.broker.messages import NodeName


class Quota(BaseModel):
    """What one tenant of the HTTP API may have stored at once."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task_bytes: Annotated[int, Field(ge=0)] = 256 << 20  # its tasks, unfinished and finished, and their results
    file_bytes: Annotated[int, Field(ge=0)] = 10_000_000_000
    files: Annotated[int, Field(ge=0)] = 10_000
    batches: Annotated[int, Field(ge=0)] = 100  # that have not ended


_SCHEMES = ("redis", "rediss", "unix")
_PORT_AND_DATABASE = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\[\]:/]+)(:\d+)?(/\d*)?")
#: A certificate or key that is not given by its whole path.
_FILE_IN_URL = re.compile(r"([?&]ssl_(?:ca_certs|ca_path|certfile|keyfile)=)(?!/|%2F)([^&#]+)", re.IGNORECASE)


def _default_model_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "perllm" / "models"


def default_data_dir() -> Path:
    """Where the embedded server keeps its data and socket: `$XDG_STATE_HOME/perllm` or `~/.local/state/perllm`."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "perllm"


class Settings(BaseSettings):
    """Every field can be set as `PERLLM_<FIELD>`. Times in seconds, sizes in bytes."""

    model_config = SettingsConfigDict(
        env_prefix="PERLLM_", env_file=".env", extra="ignore", frozen=True, allow_inf_nan=False
    )

    # Where everything meets
    redis_url: SecretStr | None = None  # redis://, rediss:// (user:password@ for ACL users) or unix://; None: embedded
    data_dir: Path = Field(default_factory=default_data_dir)
    server_memory: Annotated[int, Field(ge=16 << 20)] | None = None  # bytes of the embedded server; None: a quarter
    cell: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")] = "perllm"

    # Ledger
    max_prompt_bytes: Annotated[int, Field(ge=1)] = 1 << 20
    lease: Annotated[float, Field(ge=0.5, le=300)] = 4.0
    heartbeat: Annotated[float, Field(ge=0.05, le=60)] = 1.0
    max_strikes: Annotated[int, Field(ge=1, le=100)] = 3  # attempts that may end without a result before a task fails
    retention: Annotated[float, Field(ge=1)] = 86_400.0  # finished tasks are kept this long …
    retention_tasks: Annotated[int, Field(ge=1)] = 1_000_000  # … and at most so many of each final state
    stream_length: Annotated[int, Field(ge=1_000)] = 1_000_000  # events kept, about

    # Scheduler
    policy: str = "cs-ucb"
    queue_beyond_slots: Annotated[int, Field(ge=0, le=1_000)] = 2  # tasks a node's queue may hold beyond its slots
    snapshot_every: Annotated[float, Field(ge=0.1)] = 5.0
    leader_ttl: Annotated[float, Field(ge=0.5, le=60)] = 3.0

    # Worker
    node_name: NodeName | None = None
    slots: Annotated[int, Field(ge=1, le=4096)] | None = None
    grace: Annotated[float, Field(ge=0, le=3600)] = 10.0  # running work may finish for so long after SIGTERM
    engine: Literal["auto", "llama", "vllm", "openai", "emulated"] = "auto"
    model: str | None = None  # a GGUF path (edge), a Hugging Face folder or name (vLLM)
    model_cache: Path = Field(default_factory=_default_model_cache)  # models made from others are kept here
    model_name: str | None = None  # the name producers use; default: derived from the model
    variants: str | None = None  # edge: quantisations of the model to offer, e.g. "q8_0,q4_0"; the first is the default
    model_memory: Annotated[int, Field(gt=0)] | None = None  # edge: bytes loaded models may take; default: what is free
    emulated_speed: Annotated[float, Field(gt=0)] | None = None  # tokens/s of the emulated engine; None: at once
    context: Annotated[int, Field(ge=64)] | None = None  # tokens per sequence
    threads: Annotated[int, Field(ge=1)] | None = None
    bandwidth: Annotated[float, Field(gt=0)] = 12.5e6  # bytes/s of the node's link, until measured
    joules_per_byte: Annotated[float, Field(ge=0)] = 0.0
    idle_watts: Annotated[float, Field(ge=0)] | None = None
    tdp_watts: Annotated[float, Field(gt=0)] | None = None

    # vLLM
    vllm_args: dict[str, Any] = Field(default_factory=dict)  # JSON: further fields of vLLM's AsyncEngineArgs
    adapters: dict[str, Path] = Field(default_factory=dict)  # JSON: LoRA folders, offered as "<model>:<name>"

    # An OpenAI-compatible server (PERLLM_ENGINE=openai); `model` is its name there
    openai_base_url: str | None = None  # up to and with the version: https://host/v1
    openai_api_key: SecretStr | None = None
    openai_api_key_file: Path | None = None  # holds the key and nothing else
    openai_timeout: Annotated[float, Field(gt=0)] = 60.0  # a request counts as hung after so long without a byte
    openai_joules_per_token: Annotated[float, Field(ge=0)] | None = None  # what a generated token is to cost, and …
    openai_joules_per_prompt_token: Annotated[float, Field(ge=0)] = 0.0  # … a prompt's; of a price in money: its worth

    # HTTP API
    api_host: str = "127.0.0.1"
    api_port: Annotated[int, Field(ge=1, le=65535)] = 8000
    api_open: bool = False  # who gives no key is the tenant "default"; on a loopback address only
    api_max_body: Annotated[int, Field(ge=1024)] = 8 << 20
    api_max_file: Annotated[int, Field(ge=1024)] = 200_000_000
    api_batch_lines: Annotated[int, Field(ge=1)] = 50_000  # of one batch
    api_patience: Annotated[float, Field(gt=0)] = 20.0  # a request's head and body may take so long, and 100 kB/s
    api_files: str | None = (
        None  # where files are kept, as an fsspec URL (s3://bucket/folder); default: the data folder
    )
    api_file_retention: Annotated[float, Field(ge=3600)] = 30 * 86_400.0
    api_connections: Annotated[int, Field(ge=1)] = 4096  # open at once, and …
    api_connections_per_address: Annotated[int, Field(ge=1)] = 1024  # … from one address: behind a proxy, as many
    api_waiting: Annotated[int, Field(ge=1)] = 2000  # requests that stream or wait for a result at once, and …
    api_waiting_per_key: Annotated[int, Field(ge=1)] = 500  # … of one key (of all who need none)
    api_body_memory: Annotated[int, Field(ge=1 << 20)] = 256 << 20  # bytes of all request bodies at once
    api_quota: Quota = Quota()  # JSON: what a tenant may have stored, e.g. {"task_bytes": 1000000000}; …
    api_quotas: dict[str, Quota] = Field(default_factory=dict)  # … JSON: of certain tenants, {"acme": {"files": 10}}
    api_cors: tuple[str, ...] = ()  # JSON: origins whose pages may use the API from a browser
    webhook_allow: tuple[str, ...] = ()  # JSON: private networks webhooks may reach, e.g. ["10.1.0.0/16"]
    webhook_dns: tuple[str, ...] = ()  # JSON: DNS servers asked for webhooks' names; default: the system's

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_json: bool = False

    @field_validator("redis_url")
    @classmethod
    def _usable(cls, url: SecretStr | None) -> SecretStr | None:
        if url is None:
            return None
        parts = urlsplit(url.get_secret_value())
        if parts.scheme not in _SCHEMES:
            raise ValueError("must begin with redis://, rediss:// or unix://")
        if parts.scheme == "unix":
            if not parts.path or parts.netloc.rpartition("@")[2]:
                raise ValueError("must name a socket by its whole path, as in unix:///run/redis.sock")
        elif not _PORT_AND_DATABASE.fullmatch(f"{parts.netloc.rpartition('@')[2]}{parts.path}"):
            raise ValueError("must name a host, and may name a port and a database's number: redis://host:6379/0")
        else:
            _ = parts.port  # raises ValueError when out of range
        whole = _FILE_IN_URL.sub(lambda m: m[1] + quote(str(_whole(Path(unquote(m[2]))))), url.get_secret_value())
        return SecretStr(whole)

    @field_validator("data_dir", "model_cache", "openai_api_key_file")
    @classmethod
    def _whole_path(cls, path: Path | None) -> Path | None:
        return _whole(path) if path is not None else None

    @field_validator("adapters")
    @classmethod
    def _whole_paths(cls, paths: dict[str, Path]) -> dict[str, Path]:
        return {name: _whole(path) for name, path in paths.items()}

    @field_validator("webhook_allow")
    @classmethod
    def _networks(cls, networks: tuple[str, ...]) -> tuple[str, ...]:
        for network in networks:
            ipaddress.ip_network(network)  # raises ValueError naming it
        return networks

    @field_validator("webhook_dns")
    @classmethod
    def _servers(cls, servers: tuple[str, ...]) -> tuple[str, ...]:
        for server in servers:
            address_and_port(server)  # raises ValueError naming it
        return servers

    def environment(self) -> dict[str, str]:
        """What was set, secrets included, as variables: for a process that runs in another folder, without this one's
        `.env`."""
        given = {name: getattr(self, name) for name in sorted(self.model_fields_set)}
        for name in ("model", "api_files"):  # a file or folder here, or a name elsewhere
            if given.get(name) and Path(given[name]).exists():
                given[name] = Path(given[name]).absolute()
        return {f"PERLLM_{name.upper()}": _as_variable(value) for name, value in given.items() if value is not None}

    def quota(self, tenant: str) -> Quota:
        """What a tenant may have stored."""
        return self.api_quotas.get(tenant, self.api_quota)

    @property
    def socket(self) -> Path:
        """The embedded server's Unix socket."""
        return self.data_dir / "valkey.sock"

    @property
    def url(self) -> str:
        """The Redis URL in force, secrets included: never log it, use `address`."""
        return self.redis_url.get_secret_value() if self.redis_url else f"unix://{quote(str(self.socket))}"

    @property
    def address(self) -> str:
        """The server's address without user or password, for people and logs."""
        parts = urlsplit(self.url)
        if parts.scheme == "unix":
            return f"unix://{unquote(parts.path)}"
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        return f"{parts.scheme}://{host}:{parts.port or 6379}"

    @property
    def celery_url(self) -> str:
        """The same server in kombu's spelling (it calls a Unix socket `redis+socket://`)."""
        parts = urlsplit(self.url)
        if parts.scheme == "rediss" and "ssl_cert_reqs" not in parts.query:
            return f"{self.url}{'&' if parts.query else '?'}ssl_cert_reqs=required"  # Celery asks to be told
        if parts.scheme != "unix":
            return self.url
        query = parse_qs(parts.query)
        login = f"{parts.netloc.rsplit('@', 1)[0]}@" if "@" in parts.netloc else ""
        return f"redis+socket://{login}{parts.path}?virtual_host={query.get('db', ['0'])[0]}"


def address_and_port(server: str) -> tuple[str, int]:
    """A DNS server's: `10.0.0.53`, `10.0.0.53:5353`, `[fd00::53]`. Raises ValueError."""
    parts = urlsplit(f"//{server}")
    if not parts.hostname or parts.netloc != server or parts.username is not None:
        raise ValueError(f"{server!r}: an IP address, and a port if it is not 53, is required")
    return str(ipaddress.ip_address(parts.hostname)), parts.port or 53


def _whole(path: Path) -> Path:
    try:
        return path.expanduser().absolute()
    except RuntimeError as error:  # ~somebody who is not known
        raise ValueError(str(error)) from None


def _as_variable(value: object) -> str:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    return json.dumps(value, default=str) if isinstance(value, bool | dict | tuple) else str(value)


S = TypeVar("S", bound=Settings)


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
