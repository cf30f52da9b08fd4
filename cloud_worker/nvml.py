"""NVIDIA GPUs through NVML: which this process may use, and the joules they take."""

from __future__ import annotations

import os


def no_gpu() -> str | None:
    """Why no CUDA device can be used here; None when there is one. Does not initialise CUDA."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "unset").strip() in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides all GPUs: unset it"
    try:
        import pynvml  # noqa: PLC0415
    except ImportError:
        return "nvidia-ml-py is not installed: pip install nvidia-ml-py"
    try:
        pynvml.nvmlInit()
        count = int(pynvml.nvmlDeviceGetCount())
        pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        return f"no NVIDIA GPU was found (NVML: {error})"
    return None if count else "no NVIDIA GPU was found"
