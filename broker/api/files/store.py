"""Where files are kept: on the local disk, or wherever fsspec reaches (PERLLM_API_FILES). Never in memory."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import IO, cast
from urllib.parse import quote
from uuid import uuid4

import fsspec

from perllm.broker.api.document_store import Document, DocumentStore
from perllm.broker.connection import reaching
from perllm.broker.errors import BadSetting
from perllm.broker.ledger import Ledger
from perllm.broker.settings import Settings

_PIECE = 1 << 20


class FileDocument(Document):
    """A file less its content. `expires` is in s since the epoch."""

    filename: str
    bytes: int
    purpose: str
    expires: float


class Files:
    """Every tenant's files. Names given by users are never part of a path.

    api:files-expiring   zset   file ids by the time they are to be forgotten
    """

    def __init__(self, settings: Settings, ledger: Ledger) -> None:
        self._settings, self._ledger = settings, ledger
        self.shelf: DocumentStore[FileDocument] = DocumentStore(settings, ledger, "file", FileDocument)
        self._expiring = f"{ledger.prefix}api:files-expiring"
        url = settings.api_files or (settings.data_dir / "api" / "files").as_uri()
        here = {"auto_mkdir": True} if url.startswith(("file:", "/")) else {}
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url, **here)
        except (ImportError, ValueError) as error:
            raise BadSetting(f"PERLLM_API_FILES: {url}: {error}") from None

    def path(self, tenant: str, name: str) -> str:
        """Where something of a tenant's lies."""
        return f"{self._root}/{quote(tenant, safe='')}/{name}"

    def open(self, path: str, mode: str = "rb") -> IO[bytes]:
        """A file's content, by its path."""
        return cast("IO[bytes]", self._fs.open(path, mode))

    def exists(self, path: str) -> bool:
        """Whether there is content."""
        return bool(self._fs.exists(path))

    def discard(self, path: str) -> None:
        """Remove content, if it is there."""
        if self._fs.exists(path):
            self._fs.rm(path)

    def read(self, file: FileDocument) -> IO[bytes]:
        """A file's content."""
        return self.open(self.path(file.tenant, file.id))

    def keep(
        self,
        tenant: str,
        filename: str,
        purpose: str,
        contents: Iterator[IO[bytes]],
        *,
        lasts: float | None = None,
        identity: str | None = None,
    ) -> FileDocument:
        """Store a file made of these one after another, for `lasts` s. Its document is written last."""
        identity = identity or f"file-{uuid4().hex}"
        size = 0
        with self.open(self.path(tenant, identity), "wb") as target:
            for content in contents:
                shutil.copyfileobj(content, target, _PIECE)
            size = target.tell()
        now = self._ledger.now()
        file = FileDocument(
            id=identity,
            tenant=tenant,
            created=now,
            filename=filename,
            bytes=size,
            purpose=purpose,
            expires=now + (lasts or self._settings.api_file_retention),
        )
        self.shelf.add(file)
        with reaching(self._settings):
            self._ledger.client.zadd(self._expiring, {identity: file.expires})
        return file

    def remove(self, file: FileDocument) -> None:
        """Forget a file."""
        self.shelf.remove(file)
        with reaching(self._settings):
            self._ledger.client.zrem(self._expiring, file.id)
        self.discard(self.path(file.tenant, file.id))

    def sweep(self, in_use: set[str]) -> None:
        """Forget the files whose time is over."""
        with reaching(self._settings):
            due = self._ledger.client.zrangebyscore(self._expiring, "-inf", self._ledger.now(), 0, 100)
        for identity in (i.decode() for i in cast("list[bytes]", due)):
            if identity in in_use:
                continue
            if (file := self.shelf.get(identity)) is not None:
                self.remove(file)
            else:
                self._ledger.client.zrem(self._expiring, identity)
