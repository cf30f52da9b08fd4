"""Where files are kept: on the local disk, or wherever fsspec reaches (PERLLM_API_FILES). Never in memory."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import IO, cast
from urllib.parse import quote
from uuid import uuid4

import fsspec
import redis
from fsspec.implementations.local import LocalFileSystem

from perllm.broker.api.document_store import Document, DocumentStore
from perllm.broker.api.errors import ApiError, over_quota
from perllm.broker.api.settings import ApiSettings
from perllm.broker.api.store import ApiStore
from perllm.broker.connection import reaching
from perllm.broker.errors import BadSetting
from perllm.broker.private_files import Drawers, private_folder

#: Bytes copied at once.
_CHUNK = 1 << 20
#: Seconds after which content without a document is an orphan.
ORPHAN_AGE = 3600.0


class FileDocument(Document):
    """A file less its content. `expires` is in s since the epoch."""

    filename: str
    bytes: int
    purpose: str
    expires: float


class Files:
    """Every tenant's files. Names given by users are never part of a path.

    api:files-expiring   zset   file ids by the time they are to be forgotten
    api:file-bytes       hash   tenant → bytes of its files
    """

    def __init__(self, settings: ApiSettings, store: ApiStore) -> None:
        self._settings, self._store = settings, store
        self.documents: DocumentStore[FileDocument] = DocumentStore(store, "file", FileDocument)
        self._expiring = store.key("files-expiring")
        self._bytes = store.key("file-bytes")
        if settings.api_files is None:
            private_folder(settings.data_dir, given=True)
            private_folder(settings.data_dir / "api")
            private_folder(settings.data_dir / "api" / "files")
        url = settings.api_files or (settings.data_dir / "api" / "files").as_uri()
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise BadSetting(f"PERLLM_API_FILES: {url}: {error}") from None
        self._local: Drawers | None = None
        if isinstance(self._fs, LocalFileSystem):
            self._local = Drawers(private_folder(Path(self._root), given=settings.api_files is not None))

    def path(self, tenant: str, name: str) -> str:
        """Where something of a tenant's lies."""
        return f"{self._root}/{quote(tenant, safe='')}/{name}"

    def open(self, path: str, mode: str = "rb") -> IO[bytes]:
        """A file's content, by its path."""
        if self._local is not None:
            return self._local.open(*_folder_and_name(path), mode)
        return cast("IO[bytes]", self._fs.open(path, mode))

    def exists(self, path: str) -> bool:
        """Whether there is content."""
        if self._local is not None:
            return self._local.exists(*_folder_and_name(path))
        return bool(self._fs.exists(path))

    def discard(self, path: str) -> None:
        """Remove content, if it is there."""
        if self._local is not None:
            self._local.discard(*_folder_and_name(path))
        elif self._fs.exists(path):
            self._fs.rm(path)

    def write(self, path: str, contents: Iterable[IO[bytes]]) -> int:
        """Write these one after another; returns how many bytes. Where that fails, nothing is left."""
        try:
            with self.open(path, "wb") as target:
                for content in contents:
                    shutil.copyfileobj(content, target, _CHUNK)
                return target.tell()
        except BaseException:
            with suppress(Exception):  # the store may be what failed; `sweep_orphans` comes later
                self.discard(path)
            raise

    def check_room(self, tenant: str, size: int = 0) -> None:
        """Raises ApiError where one more file, of that many bytes, is more than the tenant may have."""
        quota = self._settings.quota(tenant)
        hint = "delete some (DELETE /v1/files/ID), or wait until they expire"
        count = self.documents.count(tenant)
        with reaching(self._settings):
            held = int(cast("bytes | None", self._store.client.hget(self._bytes, tenant)) or 0)
        if count >= quota.files:
            raise over_quota(f"this tenant may have {quota.files} files, and has {count}: {hint}")
        if held + size > quota.file_bytes or held >= quota.file_bytes:
            raise over_quota(
                f"the files of this tenant may have {quota.file_bytes} bytes, and have {held}; this one has {size}: "
                f"{hint}"
            )

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
        within_quota: bool = False,
    ) -> FileDocument:
        """Store a file made of these one after another, for `lasts` s. Its document is written last. Raises ApiError
        where it is to be within the tenant's quota and is not; then, and wherever it fails, nothing is left of it."""
        identity = identity or f"file-{uuid4().hex}"
        path = self.path(tenant, identity)
        size = self.write(path, contents)
        now = self._store.now()
        file = FileDocument(
            id=identity,
            tenant=tenant,
            created=now,
            filename=filename,
            bytes=size,
            purpose=purpose,
            expires=now + (lasts or self._settings.api_file_retention),
        )
        try:
            self._add(file, within_quota)
        except ApiError:
            self.discard(path)
            raise
        return file

    def _add(self, file: FileDocument, within_quota: bool) -> None:
        """The document, its index and the bytes held, in one step."""
        index = self.documents.index_key(file.tenant)

        def write(pipe: redis.client.Pipeline) -> None:
            before = cast("bytes | None", pipe.get(self.documents.key(file.id)))
            if within_quota:
                self.check_room(file.tenant, file.bytes)
            pipe.multi()
            pipe.set(self.documents.key(file.id), file.model_dump_json())
            pipe.zadd(index, {file.id: file.created})
            pipe.zadd(self._expiring, {file.id: file.expires})
            old = FileDocument.model_validate_json(before).bytes if before else 0
            pipe.hincrby(self._bytes, file.tenant, file.bytes - old)

        with reaching(self._settings):
            self._store.client.transaction(write, self.documents.key(file.id), index)

    def remove(self, file: FileDocument) -> None:
        """Forget a file."""

        def delete(pipe: redis.client.Pipeline) -> None:
            exists = pipe.exists(self.documents.key(file.id))
            pipe.multi()
            pipe.delete(self.documents.key(file.id))
            pipe.zrem(self.documents.index_key(file.tenant), file.id)
            pipe.zrem(self._expiring, file.id)
            pipe.hincrby(self._bytes, file.tenant, -file.bytes if exists else 0)

        with reaching(self._settings):
            self._store.client.transaction(delete, self.documents.key(file.id))
        self.discard(self.path(file.tenant, file.id))

    def sweep(self, in_use: set[str]) -> None:
        """Forget the files that have expired, but for those of which the ids are `in_use`."""
        with reaching(self._settings):
            due = self._store.client.zrangebyscore(self._expiring, "-inf", self._store.now(), 0, 1000)
        for identity in (i.decode() for i in cast("list[bytes]", due)):
            if identity in in_use:
                continue
            if (file := self.documents.get(identity)) is not None:
                self.remove(file)
            else:
                self._store.client.zrem(self._expiring, identity)

    def sweep_orphans(self, batches_open: set[str]) -> Iterator[None]:
        """Remove content that was written long ago and belongs to no document and no unfinished batch: what a process
        leaves that is killed between the two. Yields after every thousand."""
        long_ago = datetime.now(UTC) - timedelta(seconds=ORPHAN_AGE)
        paths = iter(self._fs.find(self._root))
        while some := list(islice(paths, 1000)):
            names = [path.rpartition("/")[2] for path in some]
            with reaching(self._settings):
                known = cast("list[bytes | None]", self._store.client.mget([self.documents.key(n) for n in names]))
            for path, name, document in zip(some, names, known, strict=True):
                ours = name.startswith(("file-", "batch_"))  # the folder may be another's too
                if document is not None or not ours or name.partition(".")[0] in batches_open:
                    continue
                with suppress(OSError):
                    if self._fs.modified(path) < long_ago:
                        self.discard(path)
            yield


def _folder_and_name(path: str) -> tuple[str, str]:
    folder, _, name = path.rpartition("/")
    return folder.rpartition("/")[2], name
