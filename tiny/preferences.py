"""The embedded preference dataset: images drawn by the tiny model, compared by simulated annotators.

The annotators follow the Bradley-Terry model with Davidson's ties, on `overall` of `tiny/oracle.py`. Each annotator has
a different weight between alignment and appeal. `python -m tiny.build preferences` makes the dataset.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from tiny import oracle, world

HERE = Path(__file__).parent
MODEL, DATA = HERE / "model", HERE / "data"
SEED = 0
KAPPA = 9.0  # logits per unit of score: how reliably the better image wins
TIE_STRENGTH = 0.3
MODELS = {"tiny-sd-guidance-2": 2.0, "tiny-sd-guidance-5": 5.0}  # Pick-a-Pic mixes models; here two guidance scales


def make_preferences(train_prompts: int = 560, images_per_prompt: int = 5) -> None:
    """Writes `tiny/data`: a train split in two shards, and a validation split with other scenes, one game a prompt."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(SEED + 3)
    clock = Clock()
    DATA.mkdir(exist_ok=True)
    for split, scenes in zip(("train", "validation"), world.split_scenes(), strict=True):
        every = [s.prompt(t) for s in scenes for t in range(len(world.TEMPLATES))]
        training = split == "train"
        prompts = [every[i] for i in rng.permutation(len(every))[: train_prompts if training else len(scenes)]]
        images = on_policy(prompts, images_per_prompt if training else 2, first_seed=0 if training else 10**6)
        rows = [row for prompt in prompts for row in annotate(prompt, images[prompt], clock, rng)]
        table = pa.Table.from_pylist(rows, schema=schema())
        shards = 2 if training else 1
        cut = [round(i * len(rows) / shards) for i in range(shards + 1)]
        for s in range(shards):
            # One dictionary page per column stores each image once, even if it was judged several times.
            pq.write_table(
                table.slice(cut[s], cut[s + 1] - cut[s]),
                DATA / f"{split}-{s:05d}-of-{shards:05d}.parquet",
                compression="zstd",
                dictionary_pagesize_limit=64 << 20,
            )
        ties = np.mean([r["label_0"] == 0.5 for r in rows if r["has_label"]])
        drawn = [i for group in images.values() for i in group]
        print(f"{split}: {len(prompts)} prompts, {len(drawn)} images, {len(rows)} games, {ties:.1%} ties")
        for question in oracle.QUESTIONS:
            values = np.array([i.scores[question] for i in drawn])
            print(f"  {question} {values.mean():.3f} ± {values.std():.3f}")


@dataclass
class Drawn:
    """A sampled image: its JPEG, the model that drew it, and the oracle's scores of the JPEG, as people saw JPEGs."""

    jpeg: bytes
    model: str
    scores: dict[str, float]

    @property
    def uid(self) -> str:
        return hashlib.sha256(self.jpeg).hexdigest()[:32]


def on_policy(prompts: list[str], per_prompt: int, first_seed: int) -> dict[str, list[Drawn]]:
    """`per_prompt` images of each prompt, alternating between the MODELS, each image from its own seed."""
    jpegs: dict[tuple[str, int], bytes] = {}
    for m, guidance in enumerate(MODELS.values()):
        keys = [(p, k) for p in range(len(prompts)) for k in range(per_prompt) if k % len(MODELS) == m]
        seeds = [first_seed + p * per_prompt + k for p, k in keys]
        for (p, k), image in zip(keys, sample([prompts[p] for p, _ in keys], seeds, guidance), strict=True):
            jpegs[prompts[p], k] = to_jpeg(image)
    scores = oracle.score([Image.open(io.BytesIO(j)) for j in jpegs.values()], [prompt for prompt, _ in jpegs])
    images: dict[str, list[Drawn]] = {prompt: [] for prompt in prompts}
    for i, ((prompt, k), jpeg) in sorted(enumerate(jpegs.items()), key=lambda item: item[1][0][1]):
        model = list(MODELS)[k % len(MODELS)]
        images[prompt].append(Drawn(jpeg, model, {q: float(v[i]) for q, v in scores.items()}))
    return images


def annotate(prompt: str, images: list[Drawn], clock: Clock, rng: np.random.Generator) -> list[dict]:
    """The games of one prompt, as on Pick-a-Pic's page: the winner stays, and the other image is replaced.

    Afterwards about one pair in two prompts is judged again by another annotator. 1% of the rows have no label.
    """
    rows: list[dict] = []
    played: list = []
    best, rest = images[0], images[1:]
    while rest or (len(images) > 2 and rng.random() < 0.4):
        pair = (best, rest.pop(0)) if rest else played[int(rng.integers(len(played)))]
        pair = pair if rng.random() < 0.5 else pair[::-1]
        played.append(pair)
        user = int(rng.integers(60))
        taste = 0.5 + 0.2 * np.random.default_rng(1000 + user).uniform(-1, 1)  # weight of alignment against appeal
        value = [taste * i.scores["alignment"] + (1 - taste) * i.scores["appeal"] for i in pair]
        outcome = judge(KAPPA * (value[0] - value[1]), TIE_STRENGTH, rng)
        if len(played) < len(images):
            best = best if outcome == 0.5 else pair[0] if outcome == 1 else pair[1]
        labeled = rng.random() >= 0.01
        winner = {1.0: pair[0].uid, 0.0: pair[1].uid, 0.5: ""}[outcome]
        clock.tick(rng)
        row = {
            "are_different": pair[0].uid != pair[1].uid,
            "best_image_uid": winner if labeled else "",
            "caption": prompt,
            "created_at": clock.now,
            "has_label": bool(labeled),
            "label_0": outcome if labeled else None,
            "label_1": 1 - outcome if labeled else None,
            "ranking_id": clock.count,
            "user_id": user,
            "__index_level_0__": clock.count - 1,
        }
        for side, image in enumerate(pair):
            row |= {
                f"image_{side}_uid": image.uid,
                f"image_{side}_url": f"https://example.invalid/{image.uid}.jpg",
                f"jpg_{side}": image.jpeg,
                f"model_{side}": image.model,
            }
        rows.append(row)
    return [{**row, "num_example_per_prompt": len(rows)} for row in rows]


class Clock:
    """Time and number of each judgement, in the order in which they are made."""

    def __init__(self) -> None:
        self.now, self.count = np.datetime64("2024-01-01T00:00:00", "ns"), 0

    def tick(self, rng: np.random.Generator) -> None:
        self.now += np.timedelta64(int(rng.integers(1, 90)), "s")
        self.count += 1


def judge(advantage: float, tie_strength: float, rng: np.random.Generator) -> float:
    """1.0 if the first image wins, 0.0 if the second does, 0.5 for a tie (Davidson 1970); advantage in logits."""
    first, second = np.exp(advantage / 2), np.exp(-advantage / 2)
    return float(
        rng.choice([1.0, 0.0, 0.5], p=np.array([first, second, tie_strength]) / (first + second + tie_strength))
    )


@torch.no_grad()
def sample(prompts: list[str], seeds: list[int], guidance: float, steps: int = 20, batch_size: int = 64) -> list:
    """PIL images from the base model, one seed per image."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(MODEL, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    images = []
    for i in tqdm(range(0, len(prompts), batch_size), desc=f"sample at guidance {guidance}"):
        generators = [torch.Generator().manual_seed(s) for s in seeds[i : i + batch_size]]
        images += pipe(
            prompts[i : i + batch_size], num_inference_steps=steps, guidance_scale=guidance, generator=generators
        ).images
    return images


def to_jpeg(image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90, subsampling=0, optimize=True)
    return buffer.getvalue()


def schema():
    """Pick-a-Pic v2's columns, in its order."""
    import pyarrow as pa

    string, i64, f64, binary, boolean = pa.string(), pa.int64(), pa.float64(), pa.binary(), pa.bool_()
    return pa.schema(
        [
            ("are_different", boolean),
            ("best_image_uid", string),
            ("caption", string),
            ("created_at", pa.timestamp("ns")),
            ("has_label", boolean),
            ("image_0_uid", string),
            ("image_0_url", string),
            ("image_1_uid", string),
            ("image_1_url", string),
            ("jpg_0", binary),
            ("jpg_1", binary),
            ("label_0", f64),
            ("label_1", f64),
            ("model_0", string),
            ("model_1", string),
            ("ranking_id", i64),
            ("user_id", i64),
            ("num_example_per_prompt", i64),
            ("__index_level_0__", i64),
        ]
    )
