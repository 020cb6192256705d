"""Preloaded by a test's forkserver: a driver that reports one GPU, as on a GPU host."""

import torch

torch.cuda._device_count_nvml = lambda: 1
