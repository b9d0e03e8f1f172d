"""What a training step is made of: its kernels, operations and memory, and on a GPU where its time goes.

    python benchmarks/profiling.py --train_batch_size 8 --arms "cached pixels straightforward"
    python benchmarks/profiling.py --train_batch_size 2 --arms "plain compiled:torch_compile=true"
    python benchmarks/profiling.py --model sdxl --train_batch_size 4 --json profile.json

Models and arms are those of step.py. On a GPU a kernel is what the profiler sees on the device; idle is the share of
the step in which none ran. On a CPU a kernel is an innermost operation that computes or copies (views and allocations
aside), or a loop that the compiler made of several. Kernels that bitsandbytes starts on a CPU are not seen. Kept is the
most that autograd holds at one time, without weights. Operations and memory are not counted for compiled arms.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch
from arm import Arm, PeakSaved
from torch._inductor import config as inductor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# Kinds of kernels by what their names contain; the first that fits.
KINDS = {
    "compiled": r"triton|cpp_fused|graph_\d+",
    "copies to and from the host": r"memcpy (htod|dtoh)",
    "attention": r"flash|fmha|attention|mem_eff",
    "convolutions": r"conv|fprop|dgrad|wgrad|implicit",
    "matrix products": r"gemm|cutlass|cublas|nvjet|wmma|splitk|addmm|matmul|::mm|::bmm",
    "norms": r"norm",
    "optimizer and norm of the gradient": r"optimizer|adam|multi_tensor|foreach",
    "copies and fills": r"memcpy|memset|copy|fill|cat",
    "element by element, and the rest": r"",
}
# Operations of the CPU's list that only describe memory, or only hand on to others.
# fmt: off
NO_WORK = {
    "empty", "empty_like", "empty_strided", "new_empty", "as_strided", "as_strided_", "view", "view_as",
    "reshape", "_reshape_alias", "_unsafe_view", "t", "transpose", "transpose_", "permute", "expand",
    "expand_as", "select", "slice", "narrow", "chunk", "split", "split_with_sizes", "unbind", "unsqueeze",
    "squeeze", "detach", "detach_", "alias", "to", "contiguous", "flatten", "unflatten", "movedim",
    "resolve_conj", "resolve_neg", "result_type", "item", "_local_scalar_dense", "is_nonzero", "set_",
    "resize_", "lift_fresh", "requires_grad_", "type_as", "dropout", "numpy_T", "broadcast_tensors",
    "_nested_tensor_from_mask", "_has_compatible_shallow_copy_type", "stride", "size", "data_ptr",
    "is_same_size", "unfold",
}
# fmt: on


def kind_of(name: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, name.lower()))


def on_the_cpu(events: Any) -> list[Any]:
    """The innermost operations that work, in a profile of a CPU."""

    def works(event: Any) -> bool:
        library, _, name = event.name.partition("::")
        return "cpp_fused" in event.name or (library in ("aten", "mkldnn", "onednn") and name not in NO_WORK)

    def any_below(event: Any) -> bool:
        return any(works(child) or any_below(child) for child in event.cpu_children)

    return [event for event in events if works(event) and not any_below(event)]


def in_the_optimizer(event: Any) -> bool:
    return event is not None and (event.name.startswith("Optimizer.step") or in_the_optimizer(event.cpu_parent))


def busy(kernels: list[Any]) -> float:
    """Seconds in which at least one kernel ran."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted((k.time_range.start, k.time_range.end) for k in kernels):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total / 1e6


def profiled(arm: Arm) -> dict[str, Any]:
    cuda = arm.device.type == "cuda"
    start = time.perf_counter()
    arm.step()
    first = time.perf_counter() - start
    arm.step()
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as run:
        step_s = arm.step()["step"]
    events = run.events()
    kernels = [e for e in events if e.device_type == DeviceType.CUDA] if cuda else on_the_cpu(events)
    seconds: Counter[str] = Counter()
    by_name: Counter[str] = Counter()
    for kernel in kernels:
        duration = (kernel.time_range.end - kernel.time_range.start) / 1e6
        seconds[kind_of(kernel.name)] += duration
        by_name[kernel.name[:100]] += duration
    counted: dict[str, Any] = {}
    if not arm.config.torch_compile:  # the counters look into what a compiler has merged
        with PeakSaved() as kept:
            arm.step()
        counted = {"flops": arm.flops(), "kept_bytes": kept.bytes, "weights_bytes": arm.weights_bytes()}
    return counted | {
        "kernels": len(kernels),
        "optimizer_kernels": None if cuda else sum(map(in_the_optimizer, kernels)),
        "compiled_kernels": sum(kind_of(k.name) == "compiled" for k in kernels),
        "first_step_s": first,
        "step_s": step_s,
        "idle": 1 - busy(kernels) / step_s if cuda else None,
        "seconds_by_kind": dict(seconds.most_common()),
        "longest": by_name.most_common(20),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("tiny", "sd15", "sdxl"), default="tiny")
    parser.add_argument("--arms", default="plain", help="as in step.py, separated by spaces")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args, argv = parser.parse_known_args()
    if not any(a.startswith("--config") for a in argv):
        argv = ["--config", str(ROOT / f"configs/{args.model}_ncp_dpo.yaml"), *argv]
    logging.disable(logging.WARNING)
    if not torch.cuda.is_available():
        inductor.cpp.enable_kernel_profile = True  # gives compiled loops a name in the profile
    figures: dict[str, Any] = {"model": args.model, "arguments": argv, "arms": {}}
    for name in args.arms.split():
        arm = Arm(name, args.model, argv)
        figures["device"], found = str(arm.device), profiled(arm)
        figures["arms"][name] = found
        idle = "" if found["idle"] is None else f", idle {found['idle']:.0%}"
        optimizer = f", {n} in the optimizer" if (n := found["optimizer_kernels"]) is not None else ""
        print(
            f"{arm.name}: {found['kernels']} kernels a step{optimizer}, {found['compiled_kernels']} compiled; first "
            f"step {found['first_step_s']:.1f} s, profiled step {found['step_s']:.3f} s{idle}",
            flush=True,
        )
        if "flops" in found:
            kept, weights = found["kept_bytes"] / 2**20, found["weights_bytes"] / 2**20
            print(f"    {found['flops'] / 1e9:.2f} GFLOP, {kept:.1f} MiB kept, {weights:.1f} MiB of weights")
        for kind, seconds in found["seconds_by_kind"].items():
            print(f"    {seconds / sum(found['seconds_by_kind'].values()):>4.0%} {kind}")
        if args.json:
            args.json.write_text(json.dumps(figures, indent=1))
        del arm
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    from ncp.common.errors import run_program

    run_program(main)
