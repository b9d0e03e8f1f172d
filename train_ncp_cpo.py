"""NCP-CPO: contrastive preference optimization of a diffusion model, without a reference model (paper eq. 15).

As NCP-DPO (train_ncp_dpo.py, which this file follows line by line), except that the policy's own losses
on winner and loser are compared, and a share of the winner's loss holds the policy near the data. The
frozen encoder is the only copy of the old model.

    accelerate launch train_ncp_cpo.py --config configs/sd15_ncp_cpo.yaml [--any_key value ...]

`space: latent` is Diffusion-CPO. The paper gives no lambda: near the centre of the sigmoid the first
term pulls on the winner with weight beta / 2, so a lambda far below beta does nothing (README).
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
from ncp.losses import Metrics, cpo_loss, latent_distance, mean_square
from ncp.training.settings import TrainingConfig


@dataclass(kw_only=True)
class Config(TrainingConfig):
    beta: float = option(2500.0, above=0, doc="the paper's beta T; Diffusion-DPO's code writes 5000 for 2500")
    lam: float = option(2500.0, low=0, doc="lambda, the weight of the winner's own loss; about beta")


def ncp_cpo(
    m: models.Models, unet: torch.nn.Module, batch: dict[str, Any], config: Config
) -> tuple[torch.Tensor, Metrics]:
    """Algorithm 1 without its reference: losses (B,) and metrics. 2B rows hold winners, then losers."""
    x0 = models.latents(m, batch)  # (2B, C, h, w)
    c = models.conditions(m, batch)
    t, eps, z = batch["timestep"].repeat(2), batch["eps"].repeat(2, 1, 1, 1), batch["z"]

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

    return cpo_loss(*loss_theta.chunk(2), beta=config.beta, lam=config.lam)  # eq. 15


def main() -> None:
    config = parse(Config, description=__doc__)
    method = "NCP-CPO" if config.space == "perceptual" else "CPO"

    # Whatever can be wrong with the input comes out before a model is loaded.
    description = models.describe(config)
    pairs = data.open_pairs(config)
    cache = open_cache(config, description, pairs)
    accelerator = training.make_accelerator(config)
    effective = training.effective_batch(config, accelerator.num_processes)
    inputs = checkpoints.what_it_depends_on(config, description, pairs, effective)
    checkpoint = checkpoints.claim_output_dir(config, accelerator, inputs)

    memory.foresee(config, description, accelerator, images_per_sample=2)
    m = models.load_models(config, description, accelerator)
    optimizer = training.make_optimizer(config, m.lora_parameters)
    unet, optimizer = accelerator.prepare(m.unet, optimizer)
    ema = training.make_ema(config, m)
    first_step = checkpoints.load_checkpoint(checkpoint, m, optimizer, accelerator, ema) if checkpoint else 0
    training.announce(config, accelerator, m, pairs, first_step)
    training.start_trackers(config, accelerator, pairs)

    dataset = data.PairDataset(
        config, pairs, description.latent_shape(config.resolution), description.num_timesteps, cache=cache, losers=True
    )
    batches = iter(data.loader(dataset, config, first_step, accelerator.process_index, accelerator.num_processes))
    bar = tqdm(total=config.max_train_steps, initial=first_step, desc=method, disable=not accelerator.is_main_process)
    meter, pictures = training.Meter(checkpoint), {}
    heldout = HeldOut(ncp_cpo, m, dataset, config, accelerator) if config.heldout_pairs else None
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
                losses, metrics = ncp_cpo(m, unet, batch, config)
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
            bar.set_postfix({k: f"{figures[k]:.3g}" for k in ("loss", "accuracy", "margin", "policy_w")})
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
