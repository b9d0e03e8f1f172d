"""Training samples, as a pure function of (seed, position).

A run is a sequence of positions n = 0, 1, 2, ... With effective batch E, step s takes the positions
[sE, (s+1)E), for any number of processes. Position n decides everything random about its sample:
the pair, crop, flip, dropped prompt, timestep and all noise. So the result of a run does not depend
on how it is split over processes or workers, and the run can continue exactly from any step.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from ncp.common.errors import UserError
from ncp.common.processes import end_with_parent
from ncp.training.cache import Cache
from ncp.training.images import CorruptImage, Unreadable, decode_image, resize_crop_flip, unreadable
from ncp.training.pairs import Pairs
from ncp.training.pipeline import Timesteps
from ncp.training.settings import TrainingConfig

ORDER, SAMPLE, HELDOUT = 0, 1, 2  # independent random streams


class PairDataset(Dataset):
    """Training samples by position n. images: 2 for winner and loser, 1 for the winner alone.

    A sample is a dict: `pixels` uint8 (2, 3, R, R) winner first, or (1, 3, R, R) without losers; `time_ids` (2, 6)
    original size, crop, target size in pixels (height before width), each image's own or fixed; `prompt`; `timestep`
    int64; and standard normal noise float32 (C, h, w): `eps`, one per pair; `z` and `posterior`, (2, C, h, w), one per
    image. With a cache, the output of `Cache.pair` replaces pixels and prompt. With soft labels also `share_w` float32,
    the share of the annotators who prefer the winner. On failure only `error`, a line.
    """

    def __init__(
        self,
        config: TrainingConfig,
        pairs: Pairs,
        latent_shape: tuple[int, int, int],
        timesteps: Timesteps,
        images: int,
        cache: Cache | None = None,
    ):
        self.config, self.pairs, self.latent_shape, self.timesteps = config, pairs, latent_shape, timesteps
        self.images, self.cache = images, cache
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    def pair_index(self, position: int) -> int:
        """The index of the pair at a position. Each epoch is a permutation drawn from (seed, epoch)."""
        epoch, offset = divmod(position, len(self.pairs))
        if self._order[0] != epoch:
            seed = np.random.SeedSequence([self.config.seed, ORDER, epoch])
            self._order = (epoch, np.random.default_rng(seed).permutation(len(self.pairs)))
        return int(self._order[1][offset])

    def __getitem__(self, position: int) -> dict[str, Any]:
        return self._sample([SAMPLE, position], self.pair_index(position), range(len(self.pairs)))

    def heldout(self, k: int) -> dict[str, Any]:
        """Held-out sample k, the same at every call. The timesteps of the held-out samples are spread evenly."""
        among, count = self.timesteps.among, self.pairs.heldout
        held = range(len(self.pairs), len(self.pairs) + count)
        timestep = among[(2 * k + 1) * len(among) // (2 * count)]
        return self._sample([HELDOUT, k], held[k], held) | {"timestep": torch.tensor(timestep)}

    def _sample(self, stream: list[int], index: int, among: range) -> dict[str, Any]:
        """The sample of pair `index`, or of the next readable pair of `among`, with the randomness of `stream`."""
        config = self.config
        rng = np.random.default_rng(np.random.SeedSequence([config.seed, *stream]))
        flip = config.random_flip and rng.random() < 0.5
        place = rng.random(2)  # always drawn, so that the numbers after it do not depend on center_crop
        drop_prompt = rng.random() < config.proportion_empty_prompts
        timestep = self.timesteps.draw(rng)
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))

        skipped = 0
        while True:
            try:
                if self.cache is not None:
                    content = self.cache.pair(index, flip, drop_prompt, self.images)
                else:
                    content = self._pixels(index, flip, place, drop_prompt)
                break
            except CorruptImage as error:
                skipped += 1
                if config.corrupt_images == "error" or skipped == len(among):
                    return {"error": str(error)}
                index = among[(index + 1 - among.start) % len(among)]
        if config.time_ids == "fixed":
            fixed = [config.resolution, config.resolution, 0, 0, config.resolution, config.resolution]
            content["time_ids"] = torch.tensor([fixed] * self.images)
        if self.pairs.share is not None:
            content["share_w"] = torch.tensor(self.pairs.share[index])
        return {
            **content,
            "pair": index,
            "skipped": skipped,
            "timestep": torch.tensor(timestep),
            "eps": torch.randn(self.latent_shape, generator=generator),
            "z": torch.randn((2, *self.latent_shape), generator=generator)[: self.images],
            "posterior": torch.randn((2, *self.latent_shape), generator=generator)[: self.images],
        }

    def _pixels(self, index: int, flip: bool, place: np.ndarray, drop_prompt: bool) -> dict[str, Any]:
        number = int(self.pairs.rows[index])
        try:
            row = self.pairs.table[number]
        except Unreadable as error:
            raise CorruptImage(unreadable(self.pairs.source(number), error)) from None
        winner = int(self.pairs.winner[index])
        place = np.array([0.5, 0.5]) if self.config.center_crop else place
        crops = []
        for side in (winner, 1 - winner)[: self.images]:
            try:
                crops.append(resize_crop_flip(decode_image(row[f"jpg_{side}"]), self.config.resolution, place, flip))
            except Unreadable as error:
                where = f"{self.pairs.source(number)}, jpg_{side}, uid {row[f'image_{side}_uid']}"
                raise CorruptImage(unreadable(where, error)) from None
        return {
            "prompt": "" if drop_prompt else row["caption"],
            "pixels": torch.stack([torch.from_numpy(c.pixels) for c in crops]).permute(0, 3, 1, 2),
            "time_ids": torch.tensor([c.time_ids for c in crops]),
        }


def loader(
    dataset: PairDataset, config: TrainingConfig, first_step: int, process_index: int, num_processes: int
) -> DataLoader:
    """Batches of this process from `first_step` to the end of the run, in order."""
    return DataLoader(
        dataset,
        batch_sampler=_Positions(config, first_step, process_index, num_processes),
        collate_fn=collate,
        num_workers=config.dataloader_num_workers,
        worker_init_fn=_leave_signals_to_the_run,
        pin_memory=torch.cuda.is_available(),
    )


def _leave_signals_to_the_run(worker: int) -> None:
    # A job scheduler or a terminal sends the signal to all processes at once. The last step still needs its batches.
    for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    end_with_parent()


@dataclass
class _Positions:
    """The positions of this process in each micro-batch, step by step."""

    config: TrainingConfig
    first_step: int
    process_index: int
    num_processes: int

    def __len__(self) -> int:
        return (self.config.max_train_steps - self.first_step) * self.config.gradient_accumulation_steps

    def __iter__(self) -> Iterator[list[int]]:
        batch, accumulation = self.config.train_batch_size, self.config.gradient_accumulation_steps
        for micro in range(self.first_step * accumulation, self.config.max_train_steps * accumulation):
            start = (micro * self.num_processes + self.process_index) * batch
            yield list(range(start, start + batch))


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """One batch, winners' images first, then losers': pixels, time_ids, z, posterior (2B, ...); eps, timestep (B, ...),
    with soft labels share_w (B,).

    With a cache, moments (2B, ...), text and pooled (B, ...) replace pixels and prompt. An error in any sample becomes
    {"error": line}, because an exception would come out of a worker as a traceback.
    """
    for sample in samples:
        if "error" in sample:
            return {"error": sample["error"]}
    batch: dict[str, Any] = {}
    for key in samples[0].keys() & {"eps", "timestep", "text", "pooled", "share_w"}:
        batch[key] = torch.stack([s[key] for s in samples])
    for key in samples[0].keys() & {"pixels", "moments", "time_ids", "z", "posterior"}:
        batch[key] = torch.stack([s[key] for s in samples], dim=1).flatten(0, 1)
    if "prompt" in samples[0]:
        batch["prompt"] = [s["prompt"] for s in samples]
    batch["pair"] = [s["pair"] for s in samples]
    batch["skipped"] = sum(s["skipped"] for s in samples)
    return batch


def to_device(batch: dict[str, Any], accelerator: Accelerator) -> dict[str, Any]:
    """The batch on this process's device. Raises UserError if the loader met a corrupt image."""
    if "error" in batch:
        raise UserError(batch["error"], everywhere=False)
    return {k: v.to(accelerator.device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}
