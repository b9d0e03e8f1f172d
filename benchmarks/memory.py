"""Which settings fit into which GPU, by the estimate of ncp/training/memory.py: a Markdown table.

    python benchmarks/memory.py [MODEL ...]
    python benchmarks/memory.py --measure sdxl    # the estimate against what four settings take, on a GPU

For each memory size and model, with a cache: the largest train_batch_size (a power of two) with and without gradient
checkpointing, if at least one pair fits. Settings: bf16 (fp16 is less, since f has no copy; SD3.5: fp16), rank 64,
8-bit AdamW.

Measured is the peak that PyTorch's allocator has handed out in two steps (on a CPU: of the tensors), so the estimate it
is compared with is without CUDA's own memory and without fragments. `reserved` has the fragments.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import architectures

import train_ncp_dpo
from ncp.common.config import parse
from ncp.training import memory

SIZES = (16, 24, 40, 80, 140)  # GiB, as GPUs are sold
CHOICES = {"nothing": [], "the encoder": ["encoder"], "all": ["all"]}


def need(model: str, batch: int, blocks: list[str]) -> float:
    """Memory of an NCP-DPO run in GiB."""
    argv = ["--config", str(ROOT / f"configs/{model[:4]}_ncp_dpo.yaml"), "--cached_latents", "-"]
    argv += ["--train_batch_size", str(batch), "--mixed_precision", "fp16" if model.startswith("sd35") else "bf16"]
    argv += ["--gradient_checkpointing", str(bool(blocks)), "--checkpointed_blocks", ",".join(blocks) or "all"]
    config = parse(train_ncp_dpo.Config, argv)
    return memory.estimate(config, architectures.description(model), 2).total / 2**30


# Four settings of each model: keys of the config.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "sdxl": [
        {"train_batch_size": 1, "gradient_checkpointing": True},
        {"train_batch_size": 8, "gradient_checkpointing": True},
        {"train_batch_size": 2, "gradient_checkpointing": True, "checkpointed_blocks": "encoder"},
        {"train_batch_size": 2, "gradient_checkpointing": False},
    ],
    "sd15": [
        {"train_batch_size": 32, "gradient_checkpointing": True},
        {"train_batch_size": 16, "gradient_checkpointing": True, "checkpointed_blocks": "encoder"},
        {"train_batch_size": 16, "gradient_checkpointing": False},
        {"train_batch_size": 16, "gradient_checkpointing": False, "space": "latent"},
    ],
    "tiny": [
        {"train_batch_size": 2, "gradient_checkpointing": True},
        {"train_batch_size": 2, "gradient_checkpointing": False},
    ],
}


def measure(model: str, argv: list[str], file: Path | None) -> None:
    """Prints a table of estimate and measurement by setting. A setting that does not fit is left out."""
    import torch
    from arm import Arm

    base = ["--config", str(ROOT / f"configs/{model}_ncp_dpo.yaml"), "--mixed_precision", "fp16", *argv]
    rows: list[dict[str, Any]] = []
    print("| model | setting | estimate GiB | measured GiB | measured / estimate | reserved GiB |\n" + "|---" * 6 + "|")
    for keys in SETTINGS[model]:
        name = "cached:" + ",".join(f"{k}={str(v).lower()}" for k, v in keys.items())
        try:
            arm = Arm(name, model, base)
            cuda = arm.device.type == "cuda"
            found = memory.estimate(arm.config, arm.m.description, 2, cuda=cuda)
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            arm.step(), arm.step()
            measured = torch.cuda.max_memory_allocated() / 2**30 if cuda else arm.tensors_gib()
            reserved = torch.cuda.max_memory_reserved() / 2**30 if cuda else None
        except torch.OutOfMemoryError:
            print(f"| {model} | {name} | out of memory | | | |", flush=True)
        else:
            estimate = sum(vars(found).values()) / 2**30
            rows.append({"model": model, "setting": keys, "estimate_gib": estimate, "measured_gib": measured})
            rows[-1] |= {"ratio": measured / estimate, "reserved_gib": reserved, "total_gib": found.total / 2**30}
            shown = "–" if reserved is None else f"{reserved:.2f}"
            sizes = f"{estimate:.2f} | {measured:.2f} | {measured / estimate:.3f} | {shown}"
            print(f"| {model} | {name.partition(':')[2]} | {sizes} |", flush=True)
            if file:
                file.write_text(json.dumps(rows, indent=1))
            del arm
        gc.collect()
        torch.cuda.empty_cache()


def main() -> None:
    logging.disable(logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", choices=SETTINGS, help="measure this model instead, beside its estimate")
    parser.add_argument("--json", type=Path, help="also write what was measured here")
    args, argv = parser.parse_known_args()
    if args.measure:
        measure(args.measure, argv, args.json)
    else:
        table(argv)


def table(models: list[str]) -> None:
    print("| model | recomputed | " + " | ".join(f"{size} GiB" for size in SIZES) + " |")
    print("|---" * (len(SIZES) + 2) + "|")
    for model in models or architectures.NAMES:
        for name, blocks in CHOICES.items():
            needs = {batch: need(model, batch, blocks) for batch in (1, 2, 4, 8, 16, 32, 64)}
            cells = []
            for size in SIZES:
                fits = [batch for batch, gib in needs.items() if gib <= size]
                cells.append(f"{max(fits)} ({needs[max(fits)]:.1f})" if fits else "–")
            print(f"| {model} | {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
