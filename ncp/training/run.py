"""One training run: its state from start to result, and the operations that need all of that state.

The loop and the loss are in the scripts. A run computes neither a loss nor a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from tqdm import tqdm

from ncp.common.lock import release
from ncp.training.cache import open_cache
from ncp.training.checkpoints import State, read_manifest, writing
from ncp.training.engine import effective_batch, learning_rate, make_accelerator, make_optimizer
from ncp.training.guard import Guard, HeldOut, Objective
from ncp.training.kohya import training_facts
from ncp.training.memory import print_estimate
from ncp.training.meter import Meter
from ncp.training.models import Models, load_models
from ncp.training.pairs import describe_filtering, open_pairs
from ncp.training.pictures import Validation
from ncp.training.pipeline import describe
from ncp.training.result import write_result
from ncp.training.resume import choose_checkpoint, fingerprint
from ncp.training.samples import PairDataset, loader, to_device
from ncp.training.settings import TrainingConfig
from ncp.training.summary import print_summary


@dataclass
class Run:
    """The state of one run. `unet` is the policy wrapped by accelerate, `models.unet` the same without the wrapper.

    fingerprint: what the result depends on besides the config. first_step: number of steps finished at the start.
    """

    config: TrainingConfig
    method: str
    accelerator: Accelerator
    models: Models
    unet: torch.nn.Module
    optimizer: Any
    average: EMAModel | None
    dataset: PairDataset
    batches: Iterator[dict[str, Any]]
    fingerprint: dict[str, Any]
    first_step: int
    meter: Meter
    guard: Guard
    heldout: HeldOut | None
    validation: Validation
    shown: Sequence[str]  # metrics on the progress bar
    step: int = field(init=False)  # the current step

    def __post_init__(self) -> None:
        self.step = self.first_step

    def steps(self) -> Iterator[int]:
        """The numbers of the steps to take, counted from 1, until the last or until the guard stops the run."""
        last = self.config.max_train_steps
        # Work that the interrupted run left unfinished.
        if self.guard.owes_look:
            self.check_heldout(self.step)
        if self.first_step and self.validation.is_owed(self.step):
            self.validation.draw(self.step)
        main = self.accelerator.is_main_process
        with tqdm(total=last, initial=self.first_step, desc=self.method, disable=not main) as self.bar:
            while self.step < last and not self.guard.stopped:
                self.step += 1
                self.meter.start()
                for group in self.optimizer.param_groups:
                    group["lr"] = self.learning_rate
                yield self.step

    @property
    def learning_rate(self) -> float:
        """The learning rate of the current step."""
        return learning_rate(self.config, self.step, effective_batch(self.config, self.accelerator.num_processes))

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The metadata of an exported LoRA; checkpoints store it too."""
        return training_facts(self.method, self.models, self.dataset)

    def micro_batches(self) -> Iterator[dict[str, Any]]:
        """The micro-batches of one optimizer step, on this process's device. Raises UserError for a corrupt image."""
        for _ in range(self.config.gradient_accumulation_steps):
            yield to_device(next(self.batches), self.accelerator)

    def record(self, batch: dict[str, Any], losses: torch.Tensor, metrics: dict[str, torch.Tensor]) -> None:
        """Records the losses (B,) and metrics of a micro-batch, for the log and for the guard."""
        self.meter.add({"loss": losses, **metrics, "skipped_images": batch["skipped"]}, samples=len(losses))
        self.guard.add(batch, losses, metrics)

    def check_step(self, grad_norm: torch.Tensor) -> bool:
        """Whether losses and gradient are finite on all processes. Else the step is skipped, reported and counted."""
        finite = self.guard.check_step(self.step, grad_norm)
        self.meter.add({"grad_norm": grad_norm, "skipped_steps": not finite})
        return finite

    def update_average(self) -> None:
        """Updates the moving averages of the LoRA weights, if there are any: of the result, and as the reference."""
        self.models.update_reference()
        if self.average is not None:
            self.average.step(self.models.lora_parameters)

    def log(self, step: int) -> None:
        """Stops the step's clock. Every `logging_steps` passes the metrics since the last entry to the trackers."""
        self.meter.stop()
        self.bar.update()
        if step % self.config.logging_steps == 0 or step == self.config.max_train_steps:
            figures = {**self.meter.flush(self.accelerator), "learning_rate": self.learning_rate}
            self._track(figures, step)
            self.bar.set_postfix({name: f"{figures[name]:.3g}" for name in self.shown})

    def check_heldout(self, step: int) -> None:
        """Every `heldout_steps`, evaluates the held-out pairs. Warns or stops the run if winner drift is too high."""
        if figures := self.guard.watch(step, self.heldout):
            self._track(figures, step)

    def _track(self, figures: dict[str, float], step: int) -> None:
        with writing(Path(self.config.output_dir)):
            self.accelerator.log(figures, step=step)

    def save_checkpoint(self, step: int) -> None:
        """Writes a checkpoint every `checkpointing_steps`, and after the last step."""
        if step % self.config.checkpointing_steps == 0 or step == self.config.max_train_steps:
            self._write_checkpoint(prune=not self.guard.stopped)

    def _write_checkpoint(self, prune: bool) -> None:
        figures = self.meter.state(self.accelerator) | self.guard.state()
        state = State(self.models, self.optimizer, self.accelerator, self.average)
        state.save(self.config, self.step, {**figures, "facts": self.facts, "inputs": self.fingerprint}, prune)

    def draw_validation(self, step: int) -> None:
        """Draws the validation prompts every `validation_steps`."""
        if self.validation.is_due(step) and not self.guard.stopped:
            self.validation.draw(step)

    def finish(self) -> None:
        """Draws the last images and writes the result. For a stopped run, writes the checkpoint to resume from instead.

        Raises Stopped if the run was stopped. `run_program` leaves the process group later.
        """
        config = self.config
        if not self.guard.stopped:
            self.validation.draw(self.step)
        if self.guard.stopped:  # its checkpoint may exist already
            self._write_checkpoint(prune=False)
        else:
            pairs = self.dataset.pairs
            write_result(config, self.method, self.accelerator, self.models, self.average, pairs, self.facts)
        with writing(Path(config.output_dir)):
            for tracker in self.accelerator.trackers:
                tracker.finish()
        release()
        self.guard.close()


def start(
    config: TrainingConfig, method: str, objective: Objective, images_per_sample: int, shown: Sequence[str]
) -> Run:
    """Checks all input, then loads the models, then resumes.

    method: its name in latent space. images_per_sample: 2 for winner and loser, 1 for the winner alone. shown: metrics
    on the progress bar. Raises UserError for any wrong input, before a model is loaded.
    """
    method = f"NCP-{method}" if config.space == "perceptual" else method
    description = describe(config)
    pairs = open_pairs(config)
    cache = open_cache(config, description, pairs)
    accelerator = make_accelerator(config)
    effective = effective_batch(config, accelerator.num_processes)
    depends_on = fingerprint(config, description, pairs, effective)
    checkpoint = choose_checkpoint(config, accelerator, depends_on)
    saved = read_manifest(checkpoint) if checkpoint else {}

    print_estimate(config, description, accelerator, images_per_sample)
    models = load_models(config, description, accelerator)
    optimizer = make_optimizer(config, models.lora_parameters)
    unet, optimizer = accelerator.prepare(models.unet, optimizer)
    average = EMAModel(models.lora_parameters, decay=config.ema_decay) if config.use_ema else None
    if checkpoint:
        State(models, optimizer, accelerator, average).load(checkpoint)
    first_step = saved.get("step", 0)
    print_summary(config, accelerator, models, pairs, first_step)
    _start_trackers(config, accelerator, pairs.manifest)

    shape = description.latent_shape(config.resolution)
    dataset = PairDataset(config, pairs, shape, description.timesteps(config.k), images_per_sample, cache)
    batches = iter(loader(dataset, config, first_step, accelerator.process_index, accelerator.num_processes))
    meter = Meter(saved)
    heldout = HeldOut(objective, models, dataset, config, accelerator) if config.heldout_pairs else None
    guard = Guard(config, accelerator, pairs, saved)
    validation = Validation(config, models, accelerator, average, guard)
    return Run(
        config, method, accelerator, models, unet, optimizer, average, dataset, batches, depends_on, first_step, meter,
        guard, heldout, validation, shown,
    )  # fmt: skip


def _start_trackers(config: TrainingConfig, accelerator: Accelerator, manifest: dict[str, Any] | None) -> None:
    if accelerator.log_with:
        settings = asdict(config) | ({"filtered": describe_filtering(manifest)} if manifest else {})
        plain = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in settings.items()}
        with writing(Path(config.output_dir)):
            accelerator.init_trackers(config.tracker_project_name, config=plain)
