"""Averages of the metrics between two log entries."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator


class Meter:
    """Averages metrics over micro-batches, processes and the steps between two log entries, and measures time.

    `seconds` is the time between `start` and `stop`: training, without checkpoints and validation images. A resumed run
    continues from the values in its checkpoint. saved: the checkpoint's manifest, or empty.
    """

    def __init__(self, saved: dict[str, Any]) -> None:
        self.seconds = float(saved.get("seconds", 0))
        self._clear()
        if "meter" in saved:
            self.counts.update(saved["meter"]["counts"])
            self.sums.update(saved["meter"]["sums"])
            self.samples, self.before = saved["meter"]["samples"], saved["meter"]["before"]

    def _clear(self) -> None:
        self.sums: dict[str, torch.Tensor | float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)
        self.samples, self.before = 0, self.seconds

    def start(self) -> None:
        self.started = time.perf_counter()

    def stop(self) -> None:
        self.seconds += time.perf_counter() - self.started

    def add(self, metrics: dict[str, torch.Tensor | float], samples: int = 0) -> None:
        """metrics: per-sample tensors or scalars. samples: number of this process's pairs."""
        for name, value in metrics.items():
            # Summed where the value is: the host would wait for the device to read a value, and to hand it a tensor.
            self.sums[name] += value.detach().float().mean() if torch.is_tensor(value) else float(value)
            self.counts[name] += 1
        self.samples += samples

    def state(self, accelerator: Accelerator) -> dict[str, Any]:
        """The meter's entries in a checkpoint: with them a resumed run logs the same values as an uninterrupted one."""
        names, sums = sorted(self.sums), []
        if names:
            sums = accelerator.reduce(self._sums(names, accelerator.device), reduction="mean").tolist()
        meter = {"sums": dict(zip(names, sums, strict=True)), "counts": dict(self.counts)}
        return {"seconds": self.seconds, "meter": {**meter, "samples": self.samples, "before": self.before}}

    def _sums(self, names: list[str], device: torch.device) -> torch.Tensor:
        return stacked([self.sums[n] for n in names], device)

    def flush(self, accelerator: Accelerator) -> dict[str, float]:
        """Means since the last flush over all processes, with samples per second and peak memory in GiB."""
        names = sorted(self.sums)
        sums = self._sums(names, accelerator.device)
        means = torch.stack([total / self.counts[n] for n, total in zip(names, sums, strict=True)])
        means = accelerator.reduce(means, reduction="mean")
        figures = dict(zip(names, means.tolist(), strict=True))
        figures["samples_per_second"] = self.samples * accelerator.num_processes / (self.seconds - self.before)
        figures["peak_memory_gib"] = peak_memory_gib(accelerator.device)
        self._clear()
        return figures


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory in GiB so far: of the GPU's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**30
    import resource  # exists on Unix only

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def stacked(values: Sequence[torch.Tensor | float], device: torch.device) -> torch.Tensor:
    """(N,) float32 on the device. A number is filled in there, because the host waits for a copy."""
    on_device = (
        v.to(device, torch.float32) if torch.is_tensor(v) else torch.full((), float(v), device=device) for v in values
    )
    return torch.stack(list(on_device))
