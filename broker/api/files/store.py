"""Where files are kept: on the local disk, or wherever fsspec reaches (PERLLM_API_FILES). Never in memory."""

from __future__ import annotations

import io
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast
from urllib.parse import quote
from uuid import uuid4

import fsspec
import redis
import structlog
from fsspec.implementations.local import LocalFileSystem

from perllm.broker.api.document_store import Document, DocumentStore
from perllm.broker.api.errors import ApiError, over_quota
from perllm.broker.api.settings import ApiSettings
from perllm.broker.api.store import ApiStore
from perllm.broker.connection import reaching
from perllm.broker.errors import BadSetting, StoreUnavailable
from perllm.broker.private_files import Drawers, private_folder, write_own

#: Bytes copied at once, and held of a remote file that is read; of one that is written (S3 takes parts of 5 MiB on).
_CHUNK, _PART = 1 << 20, 8 << 20
#: Seconds a remote store has to accept a connection and to answer; times a request is sent.
_CONNECT_TIMEOUT, _READ_TIMEOUT, _ATTEMPTS = 5, 10, 2
#: A store that failed only after so many seconds is left alone for as many: calls that wait to fail hold all threads.
_SLOW = 5.0
#: Seconds after which content without a document is an orphan.
ORPHAN_AGE = 3600.0

log = structlog.get_logger(__name__)


class ContentMissing(FileNotFoundError):
    """A file's content is not there; the message says where it was."""


class FileDocument(Document):
    """A file less its content. `expires` is in s since the epoch."""

    filename: str
    bytes: int
    purpose: str
    expires: float
    kept_in: str = ""  # the store's name


class Files:
    """Every tenant's files. Names given by users are never part of a path. `identity` tells where they are kept from
    other places, whoever looks; `name` is for people.

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
            self._fs, self._root = _file_system(url)
        except (ImportError, ValueError) as error:
            raise BadSetting(f"PERLLM_API_FILES: {url}: {error}") from None
        self._down_until = float("-inf")
        self._local: Drawers | None = None
        if isinstance(self._fs, LocalFileSystem):
            folder = private_folder(Path(self._root), given=settings.api_files is not None)
            self._local = Drawers(folder)
            self.identity, self.name = _identity_of(folder), f"{socket.gethostname()}:{folder}"
        else:
            self.name = str(self._fs.unstrip_protocol(self._root))
            self.identity = quote(self.name, safe="")

    def path(self, tenant: str, name: str) -> str:
        """Where something of a tenant's lies."""
        return f"{self._root}/{quote(tenant, safe='')}/{name}"

    def check(self) -> None:
        """Raises BadSetting where the store answers that nothing can be kept there: no such bucket, no right to it. One
        that cannot be reached now may be later."""
        if self._local is not None:
            return
        path = f"{self._root}/file-{uuid4().hex}"
        try:
            self.write(path, [io.BytesIO(b"PerLLM was here")])
            self.open(path).close()
            with self._reaching():
                self._fs.rm_file(path)
        except (StoreUnavailable, FileNotFoundError) as error:
            cause = error.__cause__ or error
            if isinstance(cause, PermissionError | FileNotFoundError) or "Credentials" in type(cause).__name__:
                reason = f"PERLLM_API_FILES: nothing can be kept in {self._root}: {_said(cause)}"
                raise BadSetting(reason) from None
            log.warning("file_store_unavailable_at_start", store=self._root, reason=_said(cause))

    @contextmanager
    def _reaching(self, *, missing: bool = True) -> Iterator[None]:
        """Turns whatever the store fails with into StoreUnavailable, but for FileNotFoundError where something may be
        `missing`."""
        began = time.monotonic()
        if began < self._down_until:
            raise StoreUnavailable("the file store did not answer a moment ago")
        try:
            yield
        except Exception as error:  # each file system has its own
            if missing and isinstance(error, FileNotFoundError):
                raise
            if self._local is not None and not isinstance(error, OSError):
                raise
            if self._local is None and time.monotonic() > began + _SLOW:
                self._down_until = time.monotonic() + _SLOW
            log.warning("file_store_unavailable", reason=_said(error))
            raise StoreUnavailable(f"the file store cannot be used: {_said(error)}") from error

    def open(self, path: str) -> IO[bytes]:
        """A file's content, by its path. Raises FileNotFoundError; StoreUnavailable, as does reading it."""
        with self._reaching():
            if self._local is not None:
                return self._local.open(*_folder_and_name(path), "rb")
            found = self._fs.open(path, "rb", cache_type="none")
        return cast("IO[bytes]", io.BufferedReader(_Remote(found, self._reaching), _CHUNK))

    def exists(self, path: str) -> bool:
        """Whether there is content. Raises StoreUnavailable."""
        if self._local is not None:
            return self._local.exists(*_folder_and_name(path))
        try:
            with self._reaching():
                self._fs.info(path)
        except FileNotFoundError:
            return False
        return True

    def discard(self, path: str) -> None:
        """Remove content, if it is there. Raises StoreUnavailable."""
        with suppress(FileNotFoundError), self._reaching():
            if self._local is not None:
                self._local.discard(*_folder_and_name(path))
            else:
                self._fs.rm_file(path)

    def write(self, path: str, contents: Iterable[IO[bytes]], going_on: Callable[[], None] = lambda: None) -> int:
        """Write these one after another; returns how many bytes. The content is there when it is whole, or not at all:
        another process may be writing the same. `going_on` is called after each MiB. Raises StoreUnavailable."""
        folder, name = _folder_and_name(path)
        part, size = f"{name}.{uuid4().hex[:8]}", 0
        with self._reaching(missing=False):
            if self._local is not None:
                target: Any = self._local.open(folder, part, "wb")
            else:
                target = self._fs.open(path, "wb", block_size=_PART, autocommit=False)
        try:
            for content in contents:
                while chunk := content.read(_CHUNK):
                    with self._reaching(missing=False):
                        target.write(chunk)
                    size += len(chunk)
                    going_on()
            with self._reaching(missing=False):
                target.close()
                if self._local is not None:
                    self._local.rename(folder, part, name)
                else:
                    target.commit()
        except BaseException:
            with suppress(Exception), self._reaching():  # the store may be what failed
                if self._local is not None:
                    target.close()
                    self._local.discard(folder, part)
                else:
                    target.closed = True  # or what it holds would be sent when it is collected
                    target.discard()
            raise
        return size

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
        """A file's content. Raises ContentMissing."""
        try:
            return self.open(self.path(file.tenant, file.id))
        except FileNotFoundError:
            gone = f"the content of file {file.id} is gone"
            if file.kept_in not in ("", self.name):
                gone += f": it was kept in {file.kept_in}, and this API keeps files in {self.name}"
            raise ContentMissing(gone) from None

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
        going_on: Callable[[], None] = lambda: None,
    ) -> FileDocument:
        """Store a file made of these one after another, for `lasts` s. Its document is written last. Raises ApiError
        where it is to be within the tenant's quota and is not; then, and wherever it fails, nothing is left of it."""
        identity = identity or f"file-{uuid4().hex}"
        path = self.path(tenant, identity)
        size = self.write(path, contents, going_on)
        now = self._store.now()
        file = FileDocument(
            id=identity,
            tenant=tenant,
            created=now,
            filename=filename,
            bytes=size,
            purpose=purpose,
            kept_in=self.name,
            expires=now + (lasts or self._settings.api_file_retention),
        )
        try:
            self._add(file, within_quota)
        except ApiError:
            with suppress(StoreUnavailable):  # `sweep_orphans` will
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
        with suppress(StoreUnavailable):  # `sweep_orphans` will
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
        paths = self._all()
        while some := list(islice(paths, 1000)):
            names = [path.rpartition("/")[2] for path in some]
            with reaching(self._settings):
                known = cast("list[bytes | None]", self._store.client.mget([self.documents.key(n) for n in names]))
            for path, name, document in zip(some, names, known, strict=True):
                ours = name.startswith(("file-", "batch_"))  # the folder may be another's too
                if document is not None or not ours or name.partition(".")[0] in batches_open:
                    continue
                with suppress(FileNotFoundError, StoreUnavailable):
                    with self._reaching():
                        old = self._fs.modified(path) < long_ago
                    if old:
                        self.discard(path)
            yield

    def _all(self) -> Iterator[str]:
        """Every path, a folder at a time. Raises StoreUnavailable."""
        folders = self._fs.walk(self._root, on_error="raise")
        while True:
            with suppress(FileNotFoundError):  # there is nothing yet
                with self._reaching():
                    found = next(folders, None)
                if found is not None:
                    yield from (f"{found[0]}/{name}" for name in found[2])
                    continue
            return


class _Remote(io.RawIOBase):
    """A remote file that is read. Buffered, it is a file like any other: those of fsspec read lines of any length."""

    def __init__(self, file: Any, reaching: Callable[[], AbstractContextManager[None]]) -> None:
        self._file, self._reaching = file, reaching

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return int(self._file.tell())

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def readinto(self, buffer: Any) -> int:
        with self._reaching():
            return int(self._file.readinto(buffer))

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _file_system(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path there. Raises ImportError, ValueError. Listings are not remembered:
    another process may write."""
    options: dict[str, Any] = {"use_listings_cache": False}
    s3 = url.startswith(("s3://", "s3a://"))
    if s3:
        client = {
            "connect_timeout": _CONNECT_TIMEOUT,
            "read_timeout": _READ_TIMEOUT,
            "retries": {"total_max_attempts": _ATTEMPTS},
        }
        options["config_kwargs"] = client | fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    system, root = fsspec.core.url_to_fs(url, **options)
    if s3:
        system.retries = _ATTEMPTS  # it repeats requests that botocore has repeated already
    return system, root


def _identity_of(folder: Path) -> str:
    """A folder's own, the same on every machine that mounts it; made at first use. Raises BadSetting."""
    path = folder / "store-id"
    try:
        if not path.exists():
            new = folder / f".{uuid4().hex}"
            write_own(new, uuid4().hex)
            with suppress(FileExistsError):  # another process was faster
                path.hardlink_to(new)
            new.unlink()
        return quote(path.read_text(encoding="utf-8").strip(), safe="")
    except OSError as error:
        raise BadSetting(f"PERLLM_API_FILES: nothing can be kept in {folder}: {error.strerror}") from None


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def _folder_and_name(path: str) -> tuple[str, str]:
    folder, _, name = path.rpartition("/")
    return folder.rpartition("/")[2], name
