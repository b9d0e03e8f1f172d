"""Validation images: the prompts drawn with the original and with the tuned model, during the run."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers.training_utils import EMAModel
from PIL import Image

from ncp.common.files import write_file
from ncp.training.checkpoints import writing
from ncp.training.drawing import draw, grid
from ncp.training.guard import Abandoned, Guard
from ncp.training.models import Models, averaged, load_pipe
from ncp.training.settings import TrainingConfig


@dataclass
class Validation:
    """Draws `validation_prompts`. The main process draws; the others wait, and meet it at every sampler step."""

    config: TrainingConfig
    models: Models
    accelerator: Accelerator
    average: EMAModel | None
    guard: Guard
    _reference: list[Image.Image] = field(default_factory=list)  # the reference's images, drawn once

    def is_due(self, step: int) -> bool:
        """Whether images are drawn after this step."""
        each, last = self.config.validation_steps, self.config.max_train_steps
        return bool(self.config.validation_prompts) and each is not None and step % each == 0 and step < last

    def is_owed(self, step: int) -> bool:
        """Whether an interrupted run did not draw the images that were due at this step. The main process checks."""
        (owed,) = broadcast_object_list([self.is_due(step) and not self.file(step).is_file()])
        return owed

    def file(self, step: int) -> Path:
        return Path(self.config.output_dir) / "validation" / f"step-{step:06d}.png"

    def draw(self, step: int) -> None:
        """Draws both models' images, saves them as one grid, and passes it to the trackers.

        After a signal or at the time limit it returns without images, and `guard.stopped` is set.
        """
        if not self.config.validation_prompts:
            return
        picture = None
        if self.accelerator.is_main_process:
            with suppress(Abandoned):
                picture = self._grid(step)
        self.guard.together(step, iter(()))
        if picture is not None:
            with writing(Path(self.config.output_dir)):
                self.file(step).parent.mkdir(exist_ok=True)
                write_file(self.file(step), lambda path: picture.save(path, "PNG"))
            self._track(picture, step)
        self.accelerator.wait_for_everyone()

    def _grid(self, step: int) -> Image.Image:
        config, prompts = self.config, self.config.validation_prompts
        settings: dict[str, Any] = {
            "prompts": prompts,
            "seeds": [config.validation_seed + i for i in range(len(prompts))],
            "resolution": config.resolution,
            "num_inference_steps": config.validation_num_inference_steps,
            "guidance_scale": config.validation_guidance_scale,
            "accelerator": self.accelerator,
            "between": lambda: self.guard.between(step),
        }
        models = self.models
        # With a cache the run itself needs no pipeline: it is loaded only while images are drawn.
        pipe = models.pipe or load_pipe(config, models.description, self.accelerator)
        if not self._reference:
            self._reference = draw(models, pipe, models.base, **settings)
        with averaged(models, self.average):
            tuned = draw(models, pipe, models.unet, **settings)
        return grid({"reference": self._reference, f"step {step}": tuned}, prompts)

    def _track(self, picture: Image.Image, step: int) -> None:
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
                pixels = pixels.view(picture.height, picture.width, 3)
                tracker.writer.add_image("validation", pixels, step, dataformats="HWC")
            elif tracker.name == "wandb":
                import wandb

                tracker.log({"validation": wandb.Image(picture)}, step=step)
