"""What ran where: all that a reader needs to repeat a run or to doubt it, and nothing that names a person.

Host names, user names and paths stay out.
"""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "bitsandbytes", "chatterbox-tts", "diffusers", "hydra-core", "jiwer", "librosa", "numpy", "pocketsphinx",
    "resemble-perth", "resemblyzer", "s3tokenizer", "torch", "torchaudio", "transformers", "triton", "vocos",
)  # fmt: skip
FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "sve", "bf16", "i8mm")
"""What a processor's vector units can do, as Linux names it: processors of one name differ in it, and in speed."""
VARIABLES = ("CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


def describe(config_hash: str, device: dict[str, Any]) -> dict[str, Any]:
    """The content of environment.json. `device` is what `describe_device` said in a child."""
    return {
        "device": device,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release().split('-')[0]} {platform.machine()}",
        "cpu": {
            "model": _cpu_model(),
            "cores": os.cpu_count(),
            "features": _cpu_features(),
            "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        },
        "packages": {name: _version(name) for name in PACKAGES},
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "git": git(),
        "config_hash": config_hash,
    }


def describe_device(device: torch.device) -> dict[str, Any]:
    """Name, kind and limits of the device that measures."""
    if device.type != "cuda":
        return {"name": f"CPU ({_cpu_model()})", "type": device.type, "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "type": "cuda",
        "memory_mb": round(properties.total_memory / 1e6),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "driver": _driver(),
        "threads": torch.get_num_threads(),
    }


def _driver() -> str | None:
    import pynvml

    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return None


def _cpu_model() -> str:
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _cpu_features() -> list[str]:
    flags = (_cpu_info("flags") or _cpu_info("Features")).split()
    return [name for name in FEATURES if name in flags]


def _cpu_info(name: str) -> str:
    """What Linux says of the first core; empty where it says nothing, or where there is no Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == name), "")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git() -> dict[str, Any]:
    """Commit, and whether tracked files differ from it; empty outside a repository."""
    commit = _ask_git("rev-parse", "HEAD")
    return {"commit": commit, "dirty": bool(_ask_git("status", "--porcelain", "-uno"))} if commit else {}


def _ask_git(*arguments: str) -> str:
    try:
        answer = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""
