"""Which settings fit into which GPU, by the estimate of ncp/training/memory.py: a Markdown table.

    python benchmarks/memory.py [MODEL ...]

For each memory size and model, with a cache: the largest train_batch_size (a power of two) with and without gradient
checkpointing, if at least one pair fits. Settings: bf16 (fp16 is less, since f has no copy; SD3.5: fp16), rank 64,
8-bit AdamW.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

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


def main() -> None:
    logging.disable(logging.WARNING)
    print("| model | recomputed | " + " | ".join(f"{size} GiB" for size in SIZES) + " |")
    print("|---" * (len(SIZES) + 2) + "|")
    for model in sys.argv[1:] or architectures.NAMES:
        for name, blocks in CHOICES.items():
            needs = {batch: need(model, batch, blocks) for batch in (1, 2, 4, 8, 16, 32, 64)}
            cells = []
            for size in SIZES:
                fits = [batch for batch, gib in needs.items() if gib <= size]
                cells.append(f"{max(fits)} ({needs[max(fits)]:.1f})" if fits else "–")
            print(f"| {model} | {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
