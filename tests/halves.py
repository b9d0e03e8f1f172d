"""fp16 with its gradient scaler on a CPU, where the scripts refuse it: the same code runs, only slower."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from accelerate import Accelerator

import ncp.training.run
from ncp.training.engine import make_accelerator
from ncp.training.settings import TrainingConfig


def float16_on_cpu(patch: pytest.MonkeyPatch) -> None:
    """Runs that are started from here on have float16 weights, autocast to float16, and torch's gradient scaler.

    accelerate makes none of them for a CPU. Here they are made from what it was given, and it uses them from there on.
    """

    def accelerator_of(config: TrainingConfig) -> Accelerator:
        if config.mixed_precision != "fp16":
            return make_accelerator(config)
        accelerator = make_accelerator(dataclasses.replace(config, mixed_precision="no"))
        accelerator.state._mixed_precision = "fp16"
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu", **accelerator.scaler_handler.to_kwargs())
        return accelerator

    patch.setattr(ncp.training.run, "make_accelerator", accelerator_of)
