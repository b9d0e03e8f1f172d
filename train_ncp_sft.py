"""NCP-SFT: supervised fine-tuning on preferred images with the perceptual loss (paper eq. 13).

As NCP-DPO (train_ncp_dpo.py, which this file follows line by line), except that only winners are drawn
from the pairs, and their perceptual diffusion loss is minimised as it is.

    accelerate launch train_ncp_sft.py --config configs/sd15_ncp_sft.yaml [--any_key value ...]

`space: latent` is ordinary fine-tuning on the noise error.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from ncp.cache import open_cache
from ncp.guard import Guard, HeldOut
from tqdm.auto import tqdm

from ncp import checkpoints, data, memory, models, training
from ncp.common.config import option, parse
from ncp.common.errors import run
from ncp.ddpm import add_noise, previous, reverse_step, to_epsilon
from ncp.encoder import displacement
from ncp.losses import Metrics, latent_distance, mean_square, sft_loss
from ncp.training.settings import TrainingConfig


@dataclass(kw_only=True)
class Config(TrainingConfig):
    loss_weight: float | None = option(
        None,
        above=0,
        doc="factor of the loss. Perceptual losses are near 1e-5: without it, gradients underflow in float16 and fall "
        "below AdamW's epsilon. null: 1250 in perceptual space, DPO's pull on a winner at beta 2500; 1 in latent space",
    )

    @property
    def weight(self) -> float:
        """The factor of the loss."""
        return self.loss_weight or (1250.0 if self.space == "perceptual" else 1.0)


def ncp_sft(
    m: models.Models, unet: torch.nn.Module, batch: dict[str, Any], config: Config
) -> tuple[torch.Tensor, Metrics]:
    """Algorithm 1 on winners alone: losses (B,) of B winners, and metrics."""
    x0 = models.latents(m, batch)  # (B, C, h, w)
    c = models.conditions(m, batch)
    t, eps, z = batch["timestep"], batch["eps"], batch["z"]

    x_t = add_noise(m.scheduler, x0, eps, t)  # eq. 1
    eps_theta = to_epsilon(m.scheduler, unet(x_t, t, **c).sample, t, x_t)

    if config.space == "latent":
        loss_theta = latent_distance(eps_theta, eps)  # eq. 3
    else:
        t_prev = previous(t, config.k)
        target = reverse_step(m.scheduler, eps, t, t_prev, x_t, z)  # x_t'
        f = partial(m.encoder, timestep=t_prev.clamp_min(0), **c)
        x = [reverse_step(m.scheduler, eps_theta, t, t_prev, x_t, z)]
        (loss_theta,) = map(mean_square, displacement(f, x, target, m.secant, config.secant_length))  # eq. 12, 13

    return sft_loss(loss_theta, config.weight)


def main() -> None:
    config = parse(Config, description=__doc__)
    method = "NCP-SFT" if config.space == "perceptual" else "SFT"

    # Whatever can be wrong with the input comes out before a model is loaded.
    description = models.describe(config)
    pairs = data.open_pairs(config)
    cache = open_cache(config, description, pairs)
    accelerator = training.make_accelerator(config)
    effective = training.effective_batch(config, accelerator.num_processes)
    inputs = checkpoints.what_it_depends_on(config, description, pairs, effective)
    checkpoint = checkpoints.claim_output_dir(config, accelerator, inputs)

    memory.foresee(config, description, accelerator, images_per_sample=1)
    m = models.load_models(config, description, accelerator)
    optimizer = training.make_optimizer(config, m.lora_parameters)
    unet, optimizer = accelerator.prepare(m.unet, optimizer)
    ema = training.make_ema(config, m)
    first_step = checkpoints.load_checkpoint(checkpoint, m, optimizer, accelerator, ema) if checkpoint else 0
    training.announce(config, accelerator, m, pairs, first_step)
    training.start_trackers(config, accelerator, pairs)

    dataset = data.PairDataset(
        config, pairs, description.latent_shape(config.resolution), description.num_timesteps, cache=cache, losers=False
    )
    batches = iter(data.loader(dataset, config, first_step, accelerator.process_index, accelerator.num_processes))
    bar = tqdm(total=config.max_train_steps, initial=first_step, desc=method, disable=not accelerator.is_main_process)
    meter, pictures = training.Meter(checkpoint), {}
    heldout = HeldOut(ncp_sft, m, dataset, config, accelerator) if config.heldout_pairs else None
    guard = Guard(config, accelerator, dataset, checkpoint)
    save = partial(checkpoints.save_checkpoint, config, m, optimizer, accelerator, ema, inputs=inputs)

    step = first_step
    if guard.owes_look:  # what a signal kept the run before this one from
        training.log(config, accelerator, guard.watch(step, heldout), step)
    if training.pictures_owed(config, accelerator, checkpoint, step):
        training.validate(config, m, accelerator, ema, step, pictures, guard)
    while step < config.max_train_steps and not guard.stopped:
        step += 1
        meter.start()
        training.set_learning_rate(optimizer, lr := training.learning_rate(config, step, effective))
        for _ in range(config.gradient_accumulation_steps):
            batch = training.to_device(next(batches), accelerator)
            with accelerator.accumulate(unet):
                losses, metrics = ncp_sft(m, unet, batch, config)
                accelerator.backward(losses.mean())
            meter.add({"loss": losses, **metrics, "skipped_images": batch["skipped"]}, samples=len(losses))
            guard.add(batch, losses, metrics)
        grad_norm = accelerator.clip_grad_norm_(m.lora_parameters, config.max_grad_norm)
        if finite := guard.may_step(step, grad_norm):
            optimizer.step()
            if ema is not None:
                ema.step(m.lora_parameters)
        optimizer.zero_grad()
        meter.add({"grad_norm": grad_norm, "skipped_steps": not finite})
        meter.stop()
        bar.update()

        last = step == config.max_train_steps
        if step % config.logging_steps == 0 or last:
            figures = {**meter.flush(accelerator), "learning_rate": lr}
            training.log(config, accelerator, figures, step)
            bar.set_postfix({k: f"{figures[k]:.3g}" for k in ("loss", "grad_norm")})
        training.log(config, accelerator, guard.watch(step, heldout), step)
        if step % config.checkpointing_steps == 0 or last:
            save(step=step, figures=meter.state(accelerator) | guard.state(), prune=not guard.stopped)
        if training.pictures_due(config, step) and not guard.stopped:
            training.validate(config, m, accelerator, ema, step, pictures, guard)

    bar.close()
    if not guard.stopped:
        training.validate(config, m, accelerator, ema, step, pictures, guard)
    if guard.stopped:  # its checkpoint may be there already
        save(step=step, figures=meter.state(accelerator) | guard.state(), prune=False)
    else:
        training.finish(config, m, pairs, accelerator, ema, method, step, effective)
    training.end(config, accelerator)
    guard.close()


if __name__ == "__main__":
    run(main)
