"""Importing a worker's module reads no setting and ends no process; what asks Celery for its configuration does."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

APPS = ("perllm.edge_worker.celery", "perllm.cloud_worker.celery", "perllm.broker.celery")


@pytest.mark.parametrize("module", APPS)
def test_a_wrong_setting_shows_when_celery_is_configured_and_not_at_import(module: str) -> None:
    code = f"import {module} as m; print('imported', flush=True); m.app.conf.worker_concurrency"
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PERLLM_LEASE": "soon"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.stdout == "imported\n"
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: PERLLM_LEASE: ")
    assert ended.stderr.count("\n") == 1
