"""Are the U-Net's features perceptual? Compares distances of its features, of latents and of pixels, without training.

    python -m study.perception

Three tables, by block of the frozen base U-Net and by timestep, on the embedded preference dataset:

  closer      Which of two images of a prompt is more similar to a third? The true answer is from the oracle
              (tiny/oracle.py), which measures size, position, colours, texture and finish. The table has the share of
              triplets in which a distance agrees with it. All images have the same noise added. 50% is chance.
  preferred   Which image of a judged pair has the smaller diffusion loss under the base model, in features (eq. 13 at
              t-1) and in latent space (eq. 3), with the same noise? The table has the share of decisive pairs in which
              it is the annotators' winner.
  mean loss   How large are these losses?

Intervals are over prompts, because triplets and games of one prompt are not independent.
"""

from __future__ import annotations

import io
from collections import defaultdict
from functools import partial
from itertools import permutations
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from tqdm import tqdm

import train_ncp_dpo
from ncp.common.config import parse
from ncp.common.errors import run_program
from ncp.ddpm import add_noise, previous, reverse_step, to_epsilon, to_x0
from ncp.encoder import Displacement, Features
from ncp.losses import latent_distance
from ncp.training.engine import make_accelerator
from ncp.training.inputs import embed_prompts, vae_moments
from ncp.training.models import Models, load_models
from ncp.training.pipeline import describe
from study.report import as_markdown
from tiny import oracle
from tiny.preferences import DATA

TIMESTEPS = (20, 100, 300, 500, 700, 900)
BLOCKS = ("0", "1", "2", "mid")
PROMPTS = 200
BATCH = 64


def load() -> Models:
    argv = [
        "--config",
        "configs/tiny_ncp_dpo.yaml",
        "--encoder_blocks",
        f"[{', '.join(BLOCKS)}]",
        "--report_to",
        "none",
    ]
    config = parse(train_ncp_dpo.Config, argv)
    return load_models(config, describe(config), make_accelerator(config))


def read_images() -> tuple[dict[str, dict[str, bytes]], list[tuple[str, str, str]]]:
    """(JPEGs by prompt and uid, for PROMPTS prompts; their decisive games (prompt, winner, loser))."""
    columns = ["caption", "image_0_uid", "image_1_uid", "jpg_0", "jpg_1", "label_0", "label_1", "has_label"]
    images: dict[str, dict[str, bytes]] = defaultdict(dict)
    games = []
    for file in sorted(DATA.glob("train-*.parquet")):
        for row in pq.read_table(file, columns=columns).to_pylist():
            if row["caption"] not in images and len(images) == PROMPTS:
                continue
            uids = [row[f"image_{side}_uid"] for side in (0, 1)]
            images[row["caption"]] |= {uid: row[f"jpg_{side}"] for side, uid in enumerate(uids)}
            if row["has_label"] and {row["label_0"], row["label_1"]} == {0.0, 1.0}:
                winner = 0 if row["label_0"] == 1 else 1
                games.append((row["caption"], uids[winner], uids[1 - winner]))
    return images, games


def appearance(picture: np.ndarray) -> np.ndarray:
    """The oracle's measurements of an image: size, position, texture, finish, colours; (10,) float64."""
    m = oracle.measure(picture)
    spread = [min(m["offset"], 32.0) / 8, min(m["object_std"], 0.5) / 0.08, min(m["background_std"], 0.5) / 0.06]
    return np.array([np.sqrt(m["area"]) / 0.14, *spread, *np.nan_to_num(m["colour"]) / 0.12, *m["background"] / 0.12])


def pairwise(values: torch.Tensor) -> np.ndarray:
    """Euclidean distances (n, n) of rows (n, ...)."""
    flat = values.flatten(1).double()
    return torch.cdist(flat, flat).numpy()


def closer(distance: np.ndarray, truth: np.ndarray) -> tuple[int, int]:
    """(agreements, triplets) of one prompt's images: reference r, and a nearer than b by `truth`."""
    triplets = [(r, a, b) for r, a, b in permutations(range(len(truth)), 3) if truth[r, a] < truth[r, b]]
    return sum(distance[r, a] < distance[r, b] for r, a, b in triplets), len(triplets)


@torch.no_grad()
def measure() -> tuple[dict[str, list[str]], dict[str, list[str]], dict[str, list[str]]]:
    """The rows of the three tables, by distance or loss: one entry per timestep."""
    models = load()
    assert models.pipe is not None  # without a cache
    images, games = read_images()
    keys = [(prompt, uid) for prompt, by_uid in images.items() for uid in by_uid]
    place = {key: k for k, key in enumerate(keys)}
    pictures = [np.asarray(Image.open(io.BytesIO(images[p][u])).convert("RGB")) for p, u in keys]
    truth = np.array([appearance(p.astype(np.float32) / 255) for p in pictures])
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    scaling = models.description.vae["scaling_factor"]
    x0 = torch.cat([vae_moments(models.pipe.vae, part) for part in pixels.split(BATCH)]).chunk(2, dim=1)[0] * scaling
    text = embed_prompts(models.pipe, [prompt for prompt, _ in keys])[0]
    groups = [[place[prompt, uid] for uid in by_uid] for prompt, by_uid in images.items()]
    generator = torch.Generator().manual_seed(0)
    # The same noise for all images of a prompt, as for winner and loser in training.
    of_prompt = [k for k, by_uid in enumerate(images.values()) for _ in by_uid]

    near: dict[str, list[str]] = defaultdict(list)
    preferred: dict[str, list[str]] = defaultdict(list)
    size: dict[str, list[str]] = defaultdict(list)
    for t in tqdm(TIMESTEPS, desc="timesteps"):
        eps = torch.randn(len(images), *x0.shape[1:], generator=generator)[of_prompt]
        z = torch.randn(x0.shape, generator=generator)
        features: dict[str, list[torch.Tensor]] = defaultdict(list)
        losses: dict[str, list[torch.Tensor]] = defaultdict(list)
        for part in torch.arange(len(x0)).split(BATCH):
            step = one_step(models, x0[part], eps[part], z[part], text[part], t)
            for block, value in zip(BLOCKS, step["features"], strict=True):
                features[f"block {block}"].append(value)
            for name, value in step["losses"].items():
                losses[name].append(value)
        distances = {name: torch.cat(parts) for name, parts in features.items()} | {
            "latent": x0,
            "pixels": pixels.float(),
        }
        for name, values in distances.items():
            found = [closer(pairwise(values[g]), pairwise(torch.from_numpy(truth[g]))) for g in groups]
            near[name].append(share(found))
        for name, parts in losses.items():
            loss = torch.cat(parts)
            size[name].append(f"{loss.mean():.2g}")
            by_prompt: dict[str, list[bool]] = defaultdict(list)
            for prompt, winner, loser in games:
                by_prompt[prompt].append(bool(loss[place[prompt, winner]] < loss[place[prompt, loser]]))
            preferred[name].append(share([(sum(found), len(found)) for found in by_prompt.values()]))
    return near, preferred, size


def one_step(
    models: Models, x0: torch.Tensor, eps: torch.Tensor, z: torch.Tensor, text: torch.Tensor, t: int
) -> dict[str, Any]:
    """features: f of the noised images at t, one (B, ...) per block; losses: (B,) by space and block."""
    time = torch.full((len(x0),), t)
    ddpm, c = models.scheduler, {"encoder_hidden_states": text}
    x_t = add_noise(ddpm, x0, eps, time)
    output = models.reference(x_t, time, **c).sample
    t_prev = previous(time, 1)
    f = partial(models.encoder, timestep=t_prev, **c)
    target = reverse_step(ddpm, x0, time, t_prev, x_t, z)
    stepped = reverse_step(ddpm, to_x0(ddpm, output, time, x_t), time, t_prev, x_t, z)
    displaced: Features = Displacement(f, target, "1")(stepped)
    losses = {"latent": latent_distance(to_epsilon(ddpm, output, time, x_t), eps)}
    losses |= {f"block {b}": d.square().flatten(1).mean(1) for b, d in zip(BLOCKS, displaced, strict=True)}
    return {"features": models.encoder(x_t, time, **c), "losses": losses}


def share(counts: list[tuple[int, int]]) -> str:
    """The share of agreements in (agreements, cases) of each prompt, with the 95% bootstrap interval over prompts."""
    right, total = np.array(counts, dtype=float).T
    rows = np.random.default_rng(0).integers(len(right), size=(2000, len(right)))
    low, high = np.quantile(right[rows].sum(1) / total[rows].sum(1), [0.025, 0.975])
    return f"{right.sum() / total.sum():.1%} [{low:.1%}, {high:.1%}]"


def main() -> None:
    near, preferred, size = measure()
    head = [f"t = {t}" for t in TIMESTEPS]
    print(as_markdown([["which is closer", *head], *([name, *cells] for name, cells in near.items())]), end="\n\n")
    print(
        as_markdown([["which is preferred", *head], *([name, *cells] for name, cells in preferred.items())]), end="\n\n"
    )
    print(as_markdown([["mean loss", *head], *([name, *cells] for name, cells in size.items())]))


if __name__ == "__main__":
    run_program(main)
