"""The settings of the HTTP API and its webhooks, beside those every process has."""

from __future__ import annotations

import ipaddress
from typing import Annotated, ClassVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator

from perllm.broker.settings import Settings


class Quota(BaseModel):
    """What one tenant of the HTTP API may have stored at once."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    task_bytes: Annotated[int, Field(ge=0)] = 256 << 20
    """Its tasks, unfinished and finished, and their results, bytes."""
    file_bytes: Annotated[int, Field(ge=0)] = 10_000_000_000
    """Its files, bytes."""
    files: Annotated[int, Field(ge=0)] = 10_000
    """Its files."""
    batches: Annotated[int, Field(ge=0)] = 100
    """Its batches that have not ended."""


class ApiSettings(Settings):
    """Every field can be set as `PERLLM_<FIELD>`. Times in seconds, sizes in bytes."""

    files_or_names: ClassVar[tuple[str, ...]] = (*Settings.files_or_names, "api_files")

    api_host: str = "127.0.0.1"
    """Address the HTTP API listens on."""
    api_port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """Port it listens on."""
    api_open: bool = False
    """Requests without a key are the tenant `default`'s; on a loopback address only."""
    api_max_body: Annotated[int, Field(ge=1024)] = 8 << 20
    """Largest request body, bytes."""
    api_max_file: Annotated[int, Field(ge=1024)] = 200_000_000
    """Largest uploaded file, bytes."""
    api_batch_lines: Annotated[int, Field(ge=1)] = 50_000
    """Most lines of one batch."""
    api_patience: Annotated[float, Field(gt=0)] = 20.0
    """Seconds a request's head and body may take, beyond 100 kB/s."""
    api_files: str | None = None
    """Where files are kept, an fsspec URL (`s3://bucket/folder`); unset: the data folder."""
    api_file_retention: Annotated[float, Field(ge=3600)] = 30 * 86_400.0
    """Seconds files are kept."""
    api_connections: Annotated[int, Field(ge=1)] = 4096
    """Connections open at once, and …"""
    api_connections_per_address: Annotated[int, Field(ge=1)] = 1024
    """… from one address; behind a reverse proxy, as many as in all."""
    api_waiting: Annotated[int, Field(ge=1)] = 2000
    """Requests that stream or wait for a result at once, and …"""
    api_waiting_per_key: Annotated[int, Field(ge=1)] = 500
    """… with one key (of all without one)."""
    api_body_memory: Annotated[int, Field(ge=1 << 20)] = 256 << 20
    """Bytes of all request bodies at once, and of all embeddings that are waited for."""
    api_quota: Quota = Quota()
    """JSON: what a tenant may have stored, e.g. `{"task_bytes": 1000000000}`; …"""
    api_quotas: dict[str, Quota] = Field(default_factory=dict)
    """… JSON: of certain tenants, e.g. `{"acme": {"files": 10}}`."""
    api_cors: tuple[str, ...] = ()
    """JSON: origins whose pages may use the API from a browser."""
    webhook_allow: tuple[str, ...] = ()
    """JSON: private networks webhooks may reach, e.g. `["10.1.0.0/16"]`."""
    webhook_dns: tuple[str, ...] = ()
    """JSON: DNS servers asked for webhooks' names; unset: the system's."""

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

    def quota(self, tenant: str) -> Quota:
        """What a tenant may have stored."""
        return self.api_quotas.get(tenant, self.api_quota)


def address_and_port(server: str) -> tuple[str, int]:
    """A DNS server's: `10.0.0.53`, `10.0.0.53:5353`, `[fd00::53]`. Raises ValueError."""
    parts = urlsplit(f"//{server}")
    if not parts.hostname or parts.netloc != server or parts.username is not None:
        raise ValueError(f"{server!r}: an IP address, and a port if it is not 53, is required")
    return str(ipaddress.ip_address(parts.hostname)), parts.port or 53
