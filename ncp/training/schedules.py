"""DDPM noise schedules: what of a pipeline's scheduler config the method can use, and schedulers made from it."""

from __future__ import annotations

import inspect
from typing import Any

from ncp.common.errors import UserError
from ncp.ddpm import PREDICTION_TYPES, VARIANCE_TYPES

# Keys of a scheduler's config that belong to the trained weights, SD3's too; the others are sampler settings.
SCHEDULE = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
    *("prediction_type", "rescale_betas_zero_snr", "shift"),
)


def check_schedule(name: str, scheduler: dict[str, Any]) -> None:
    """Raises UserError for a noise schedule or prediction type that the method cannot use."""
    if "FlowMatch" in (found := scheduler.get("_class_name", "")):
        raise UserError(f"{name}: {found} is a flow-matching scheduler; the method needs a DDPM schedule")
    if found.startswith("EDM"):
        raise UserError(f"{name}: {found} has EDM's noise levels (Playground 2.5); the method needs a DDPM schedule")
    check_prediction(name, scheduler)
    if (variance := scheduler.get("variance_type") or "fixed_small") not in VARIANCE_TYPES:
        raise UserError(f"{name}: scheduler variance_type '{variance}'; expected one of: {', '.join(VARIANCE_TYPES)}")


def check_prediction(name: str, scheduler: dict[str, Any]) -> None:
    """Raises UserError for an unknown prediction type, or one that zero terminal SNR does not allow."""
    if (kind := scheduler.get("prediction_type", "epsilon")) not in PREDICTION_TYPES:
        raise UserError(f"{name}: scheduler prediction_type '{kind}'; expected one of: {', '.join(PREDICTION_TYPES)}")
    if kind == "epsilon" and scheduler.get("rescale_betas_zero_snr"):
        raise UserError(
            f"{name}: zero terminal SNR with epsilon, which says nothing of the image where x_t is pure noise; set "
            "prediction_type: v_prediction, or rescale_betas_zero_snr: false"
        )


def scheduler_like(kind: type, source: dict[str, Any], **changes: Any) -> Any:
    """A scheduler of class `kind` with the noise schedule of a pipeline's scheduler config, which may name any class.

    diffusers' `from_config` takes keys that the config does not state from the defaults of `kind`, and some of these
    are not Stable Diffusion's. Key by key:

        clip_sample             False: DDPM and DDIM would by default clip to [-1, 1], but latents exceed it
        steps_offset            1, as in all of Stable Diffusion's own configs
        set_alpha_to_one        as stated, else False: DDIM ends at abar of t = 0, as in Stable Diffusion's configs
        variance_type           as stated; null (DPM-Solver's) or not stated is fixed_small
        timestep_spacing        trailing with zero terminal SNR, where sampling must begin at T-1, in pure noise; else
                                as stated, else the default of `kind`
        thresholding            as stated, else False
        prediction_type, betas  as stated; all classes have the same defaults
        rescale_betas_zero_snr  as stated; raises UserError if it is on and `kind` does not support it

    StableDiffusionPipeline sets the first two to these values too, with long warnings. `changes` are applied last.
    """
    known = inspect.signature(kind).parameters
    if source.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in known:
        raise UserError(f"the pipeline's schedule has zero terminal SNR, which {kind.__name__} cannot sample; DDIM can")
    settings = {"set_alpha_to_one": False, **source, "clip_sample": False, "steps_offset": 1}
    if source.get("rescale_betas_zero_snr"):
        settings["timestep_spacing"] = "trailing"
    settings["variance_type"] = source.get("variance_type") or "fixed_small"
    return kind(**{k: v for k, v in {**settings, **changes}.items() if k in known})
