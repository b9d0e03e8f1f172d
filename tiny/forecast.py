"""Estimates the time of the four steps of `make demo` on this machine, from measurements of a few seconds.

    python -m tiny.forecast output/demo/forecast.txt      one line per step, as the Makefile shows it

Measured on random data: loading Python's packages and the model; `ncp_dpo` on 8 pairs, with and without its backward
pass; the U-Net and the VAE's decoder on 32 images; the oracle on 32 images. Each is run twice and the second time is
used: the first run also allocates memory and selects kernels, which a whole step does once.

    filter    a quarter of a start: it does not load PyTorch
    train     two starts (loading; the data and the first step) + pairs trained x time of a pair
              + evaluations of the held-out pairs x number of them x time of one + validation images
    draw      a start per model + images x (sampler steps x rows x time of a row + time of decoding)
    judge     two starts + images x judges x time of the oracle

Small contributions are left out: reading images, writing files, intervals. The estimate assumes the machine's current
load.
"""

# ruff: noqa: E402 (the clock starts before the imports, which are measured too)
from __future__ import annotations

import time

BEGAN = time.perf_counter()

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import train_ncp_dpo
from evaluation.prompts import read_prompts
from evaluation.protocol import EvaluationConfig
from ncp.common.config import parse
from ncp.common.errors import run_program
from ncp.training.engine import make_accelerator
from ncp.training.models import Models, load_models
from ncp.training.pipeline import describe
from tiny import oracle, world

TRAIN, EVALUATE = "configs/tiny_ncp_dpo.yaml", "configs/eval_tiny.yaml"
PAIRS, PICTURES = 8, 32  # per measurement; the U-Net gets twice as many rows


def second_time(work: Callable[[], Any]) -> float:
    """Seconds of the second of two calls of `work`."""
    work()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def random_batch(m: Models, config: train_ncp_dpo.Config) -> dict[str, Any]:
    """A batch of PAIRS pairs as from the loader, filled with noise."""
    side, shape = config.resolution, m.description.latent_shape(config.resolution)
    among = m.description.timesteps(config.k).among
    return {
        "pixels": torch.randint(0, 256, (2 * PAIRS, 3, side, side), dtype=torch.uint8),
        "posterior": torch.randn(2 * PAIRS, *shape),
        "prompt": [world.all_scenes()[n].prompt() for n in range(PAIRS)],
        "time_ids": torch.zeros(2 * PAIRS, 6),
        "timestep": torch.randint(among.start, among.stop, (PAIRS,)),
        "eps": torch.randn(PAIRS, *shape),
        "z": torch.randn(2 * PAIRS, *shape),
    }


def measure(config: train_ncp_dpo.Config) -> dict[str, float]:
    """Seconds of a `start`, a training `pair`, a held-out pair `looked` at, a U-Net `row`, an image `decoded` and
    `judged`."""
    accelerator = make_accelerator(config)
    m = load_models(config, describe(config), accelerator)
    start = time.perf_counter() - BEGAN
    batch = random_batch(m, config)

    def forward() -> torch.Tensor:
        return train_ncp_dpo.ncp_dpo(m, m.unet, batch, config)[0].mean()

    assert m.pipe is not None  # without a cache
    vae = m.pipe.vae
    latents = torch.randn(PICTURES, *m.description.latent_shape(config.resolution), dtype=m.dtype)
    text = torch.randn(2 * PICTURES, *m.description.text_shape, dtype=m.dtype)
    pictures = [torch.rand(config.resolution, config.resolution, 3).numpy() for _ in range(PICTURES)]
    prompts = [world.all_scenes()[n].prompt() for n in range(PICTURES)]
    with accelerator.autocast():
        pair = second_time(lambda: forward().backward()) / PAIRS
        with torch.no_grad():
            looked = second_time(forward) / PAIRS
            row = second_time(lambda: m.reference(latents.repeat(2, 1, 1, 1), 500, text)) / (2 * PICTURES)
            decoded = second_time(lambda: vae.decode(latents)) / PICTURES
    judged = second_time(lambda: oracle.score(pictures, prompts)) / PICTURES
    return {"start": start, "pair": pair, "looked": looked, "row": row, "decoded": decoded, "judged": judged}


def forecast(unit: dict[str, float], train: train_ncp_dpo.Config, evaluate: EvaluationConfig) -> dict[str, float]:
    """Seconds by step, from the output of `measure` and the amount of work in the two configs."""
    pairs = train.max_train_steps * train.train_batch_size * train.gradient_accumulation_steps
    looks = train.max_train_steps // train.heldout_steps * train.heldout_pairs
    count = len(evaluate.model_names) * len(read_prompts(evaluate)[0]) * evaluate.samples_per_prompt

    def drawn(steps: int, guidance: float) -> float:
        return steps * (2 if guidance > 1 else 1) * unit["row"] + unit["decoded"]

    picture = drawn(train.validation_num_inference_steps, train.validation_guidance_scale)
    shown = 2 * len(train.validation_prompts) * picture
    draw = count * drawn(evaluate.num_inference_steps, evaluate.guidance_scale)
    return {
        "filter": unit["start"] / 4,
        "train": 2 * unit["start"] + pairs * unit["pair"] + looks * unit["looked"] + shown,
        "draw": len(evaluate.model_names) * unit["start"] + draw,
        "judge": 2 * unit["start"] + count * len(evaluate.scorers) * unit["judged"],
    }


def in_words(seconds: float) -> str:
    """45 s; 3 min 20 s, to the nearest ten seconds."""
    if seconds < 55:
        return f"{max(5, 5 * round(seconds / 5))} s"
    minutes, rest = divmod(10 * round(seconds / 10), 60)
    return f"{minutes} min" + (f" {rest} s" if rest else "")


def main() -> None:
    train = parse(train_ncp_dpo.Config, ["--config", TRAIN, "--train_batch_size", str(PAIRS), "--report_to", "none"])
    unit = measure(train)
    train = parse(train_ncp_dpo.Config, ["--config", TRAIN])
    expected = forecast(unit, train, parse(EvaluationConfig, ["--config", EVALUATE]))
    file = Path(sys.argv[1])
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{in_words(seconds)}\n" for seconds in expected.values()))
    each = ", ".join(f"{name} {in_words(seconds)}" for name, seconds in expected.items())
    took = time.perf_counter() - BEGAN - unit["start"]
    print(f"about {in_words(sum(expected.values()))} on this machine, by a measurement of {took:.0f} s: {each}")


if __name__ == "__main__":
    run_program(main)
