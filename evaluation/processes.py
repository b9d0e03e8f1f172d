"""The processes that generate or score together."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from ncp.common.errors import UserError
from ncp.common.processes import launcher_mismatch


def processes() -> Any:
    """accelerate's state of this process: device, index, number of processes. Without a GPU they use the CPU.

    Raises UserError if this does not match the launcher's processes.
    """
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
    if reason := launcher_mismatch(state.num_processes):
        raise UserError(reason)
    return state
