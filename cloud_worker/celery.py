"""`celery -A perllm.cloud_worker worker`: a cloud node."""

from __future__ import annotations

import importlib.util

from perllm.broker import extras
from perllm.broker.errors import BadSetting, exit_with

try:
    from perllm.broker.engine.contract import Engine
    from perllm.broker.engine.emulated import EmulatedEngine
    from perllm.broker.worker.app import worker_app
    from perllm.cloud_worker.nvml import no_gpu
    from perllm.cloud_worker.settings import CloudSettings
except ModuleNotFoundError as error:
    exit_with(extras.lacking("the cloud worker", error, "remote"))


def make_engine(settings: CloudSettings) -> Engine:
    """vLLM on the GPU, an OpenAI-compatible server, or, where there is no GPU, llama.cpp on the CPU.

    Nothing is loaded and CUDA is not touched: the GPU is looked for with NVML. Raises BadSetting.
    """
    match settings.engine:
        case "emulated":
            return EmulatedEngine(settings)
        case "llama":
            return _llama(settings, "as set")
        case "openai":
            from perllm.cloud_worker.remote_engine import RemoteEngine  # noqa: PLC0415  only this needs httpx

            return RemoteEngine(settings)
        case "vllm":
            if missing := no_vllm():
                raise BadSetting(f"PERLLM_ENGINE=vllm cannot be used: {missing}")
            return _vllm(settings)
        case "auto":
            if missing := no_vllm() or _no_model(settings):
                return _llama(settings, missing)
            return _vllm(settings)


def no_vllm() -> str | None:
    """Why vLLM cannot run here, and what to do about it; None when it can."""
    if missing := no_gpu():
        return missing
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed: pip install 'perllm[cloud]'"
    return None


def _no_model(settings: CloudSettings) -> str | None:
    """Why there is nothing for vLLM to serve; None when there is."""
    if settings.model is None:
        return "PERLLM_MODEL names no model for vLLM"
    return "PERLLM_MODEL is a GGUF file" if settings.model.endswith(".gguf") else None


def _vllm(settings: CloudSettings) -> Engine:
    from perllm.cloud_worker.vllm_engine import VLLMEngine  # noqa: PLC0415  only this needs vLLM

    return VLLMEngine(settings)


def _llama(settings: CloudSettings, why: str) -> Engine:
    from perllm.cloud_worker.cpu_stand_in import cpu_engine  # noqa: PLC0415  only this needs llama-cpp-python

    return cpu_engine(settings, why)


app = worker_app("cloud", CloudSettings, make_engine)
