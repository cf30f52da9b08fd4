"""API processes of one cell keep files in one place, or say that they do not."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path

import pytest

from perllm.broker.api.files.sharing import StoreSharing
from perllm.broker.api.files.store import ContentMissing, Files
from perllm.broker.api.settings import ApiSettings
from perllm.broker.api.store import ApiStore
from perllm.broker.errors import BadSetting


def files_in(folder: Path, store: ApiStore) -> Files:
    given = {"redis_url": store.settings.url, "data_dir": folder, "api_files": folder.as_uri()}
    return Files(ApiSettings.model_validate(given), store)


def test_who_would_keep_files_elsewhere_does_not_start_while_another_runs(store: ApiStore, tmp_path: Path) -> None:
    one, elsewhere = tmp_path / "one", tmp_path / "elsewhere"
    mounted = tmp_path / "mounted"
    one.mkdir()
    mounted.symlink_to(one)
    first, other = StoreSharing(store, files_in(one, store)), StoreSharing(store, files_in(elsewhere, store))
    first.begin()
    StoreSharing(store, files_in(mounted, store)).begin()  # the same folder, by another path
    with pytest.raises(BadSetting, match=f"PERLLM_API_FILES: another HTTP API .* keeps files in .*{tmp_path}"):
        other.begin()
    for sharing in first, StoreSharing(store, files_in(mounted, store)):
        sharing.end()
        asyncio.run(sharing.keep_known())
    other.begin()


def test_a_file_that_is_elsewhere_is_said_to_be(store: ApiStore, tmp_path: Path) -> None:
    one, other = files_in(tmp_path / "one", store), files_in(tmp_path / "other", store)
    file = one.keep("t", "a.jsonl", "batch", iter([io.BytesIO(b"{}")]))
    assert one.read(file).read() == b"{}"
    with pytest.raises(ContentMissing, match=f"it was kept in .*{tmp_path}/one, and this API keeps files in .*/other"):
        other.read(file)
