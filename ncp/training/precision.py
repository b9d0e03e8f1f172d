"""Effects of the chosen precision on this machine: TF32, and bfloat16 where it is slow or too coarse."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F

from ncp.training.settings import TrainingConfig

SLOW = 1.5  # bfloat16 that takes this many times float32's time has no hardware support


def set_tf32(config: TrainingConfig) -> None:
    """Allows TF32 in half-precision runs, for the parts in float32 (SDXL's VAE). A float32 run uses no TF32.

    Both switches are always set, because cuDNN's is on by default.
    """
    tf32 = config.allow_tf32 and config.mixed_precision != "no"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32


def notes(config: TrainingConfig, device: torch.device) -> list[str]:
    """Notes on the precision, printed before anything is loaded, a line each."""
    if config.mixed_precision != "bf16":
        return []
    lines = []
    if device.type == "cpu" and (ratio := bf16_slowdown()) > SLOW:
        lines.append(
            f"bf16 is emulated on this processor: a convolution takes {ratio:.0f} times as long as in float32; "
            'set mixed_precision: "no"'
        )
    if hasattr(config, "beta"):
        lines.append(
            "bf16 rounds the U-Net's predictions coarsely: small margins between winner and loser drown; "
            "fp16 rounds eight times finer (docs/precision.md)"
        )
    return lines


def bf16_slowdown() -> float:
    """Time of a bfloat16 convolution divided by that of a float32 one on this CPU. Measuring takes about 0.1 s."""
    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.ones(8, 64, 16, 16, dtype=dtype), torch.ones(64, 64, 3, 3, dtype=dtype)
        F.conv2d(x, weight, padding=1)  # the first call also selects a kernel
        laps = []
        for _ in range(3):
            start = time.perf_counter()
            F.conv2d(x, weight, padding=1)
            laps.append(time.perf_counter() - start)
        times[dtype] = min(laps)
    return times[torch.bfloat16] / times[torch.float32]
