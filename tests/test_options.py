"""Every value of every option runs, is read by what it is for, and makes another run where it should."""

import dataclasses
import itertools
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import SCRIPTS, arguments, run_here, weights
from support import ROOT

from ncp.training.settings import TrainingConfig
from ncp.training.weights import lora_state

MODELS = {"dpo": "sd", "cpo": "xl", "sft": "sd-v"}
OTHER, SAME = "other weights", "the same weights"  # as the run without the option
OPTIONS = [
    (["--space", "latent"], OTHER),
    (["--encoder_blocks", "0"], OTHER),
    (["--encoder_blocks", "mid"], OTHER),
    (["--encoder_blocks", "[0, 1, last, mid]"], OTHER),
    (["--timestep_offset", "2"], OTHER),
    (["--timestep_offset", "5"], OTHER),
    (["--timestep_offset", "x0"], OTHER),
    (["--secant", "1"], SAME),  # which is what auto means in float32
    (["--secant", "16"], OTHER),
    (["--secant_length", "0.05"], SAME),  # of auto in half precision
    (["--mixed_precision", "bf16", "--gradient_checkpointing", "true", "--channels_last", "true"], OTHER),
    (["--gradient_checkpointing", "true", "--checkpointed_blocks", "[encoder, down0, up2]"], None),  # but for rounding
    (["--proportion_empty_prompts", "1"], OTHER),
    (["--max_train_samples", "3", "--checkpoints_total_limit", "1", "--checkpointing_steps", "1"], OTHER),
    (["--time_ids", "fixed"], None),  # SDXL's alone
]
# What the same lines do for each script: tried with one of them, in turn.
SHARED = [
    (["--allow_tf32", "false", "--logging_steps", "2"], SAME),
    (["--deterministic", "--ddp_timeout", "60", "--max_train_hours", "1"], SAME),
    (["--random_flip", "false"], OTHER),
    (["--center_crop", "false"], OTHER),
    (["--seed", "7"], OTHER),
    (["--rank", "4"], None),  # other shapes
    (["--lora_alpha", "8"], OTHER),
    (["--use_ema", "true"], OTHER),
    (["--use_ema", "true", "--ema_decay", "0.05"], OTHER),
    (["--use_8bit_adam", "false"], OTHER),
    (["--scale_lr", "true", "--effective_batch_size", "2"], OTHER),
    (["--lr_warmup_steps", "2"], OTHER),
    (["--lr_scheduler", "linear"], OTHER),
    (["--lr_scheduler", "cosine"], OTHER),
    (["--max_grad_norm", "1e-6"], OTHER),
    (["--adam_beta1", "0.5"], OTHER),
    (["--adam_beta2", "0.5"], OTHER),
    (["--adam_epsilon", "1e-3"], OTHER),
    (["--adam_weight_decay", "0.5"], OTHER),
    (["--prediction_type", "epsilon"], None),  # of two of the three models
    (["--prediction_type", "sample"], OTHER),
    (["--prediction_type", "v_prediction", "--rescale_betas_zero_snr", "true"], OTHER),
    (["--report_to", "tensorboard", "--tracker_project_name", "mine"], SAME),
]
CASES = [(kind, *option) for kind in SCRIPTS for option in OPTIONS]
CASES += [(kind, *option) for kind, option in zip(itertools.cycle(SCRIPTS), SHARED, strict=False)]
NAMES = [f"{kind}{'-'.join(extra)}" for kind, extra, _ in CASES]
OWN = {
    "dpo": [
        ["--beta", "5"],
        ["--winner_preserving_mu", "0.9"],
        ["--utility", "linear"],
        ["--utility", "linear", "--eta", "0.45", "--space", "latent"],
        ["--reference_decay", "0"],
    ],
    "cpo": [["--beta", "5"], ["--lam", "1"], ["--winner_preserving_mu", "0.9"]],
    "sft": [["--loss_weight", "3"]],
}
# Tests of their own: SD3's, files, resuming, held-out pairs, pictures, uploads, trackers, compilers, loader's workers.
ELSEWHERE = frozenset(
    """
    soft_labels
    max_sequence_length single_file_config revision variant pretrained_vae_model_name_or_path dataset_split
    cached_latents corrupt_images torch_compile
    resume_from_checkpoint heldout_pairs heldout_steps warn_winner_drift max_winner_drift
    validation_prompts validation_steps validation_num_inference_steps validation_guidance_scale validation_seed
    push_to_hub hub_model_id hub_private_repo max_skipped_steps gradient_accumulation_steps
    """.split()  # noqa: SIM905 (a list of twenty quoted names is harder to read)
)

# Where a key is read in passing: checked, said, written down, compared. Nothing depends on it there.
IN_PASSING = {
    "dataclasses", "ncp.common.config", "ncp.training.cache", "ncp.training.memory", "ncp.training.result",
    "ncp.training.resume", "ncp.training.settings", "ncp.training.summary",
}  # fmt: skip
PROPERTIES = {"timestep_offset": {"k"}}


def recording(config: type[TrainingConfig], read: set[str]) -> type[TrainingConfig]:
    """The script's keys, noting in `read` each that is read where something depends on it."""

    class Recorded(config):
        def __getattribute__(self, name: str):
            if sys._getframe(1).f_globals["__name__"] not in IN_PASSING:
                read.add(name)
            return super().__getattribute__(name)

    return Recorded


def given(argv: list[str]) -> set[str]:
    return {word.removeprefix("--") for word in argv if word.startswith("--")}


@pytest.fixture(scope="module")
def plain(assets, tmp_path_factory) -> Callable[[str], dict[str, torch.Tensor]]:
    """The weights of each script's run without an option."""
    made: dict[str, dict[str, torch.Tensor]] = {}

    def of(kind: str) -> dict[str, torch.Tensor]:
        if kind not in made:
            folder = tmp_path_factory.mktemp("plain") / "out"
            run_here(kind, arguments(assets, folder, model=MODELS.get(kind, "sd")))
            made[kind] = weights(folder)
        return made[kind]

    return of


def run_with(assets, folder, kind: str, extra: list[str]) -> None:
    """Runs the script; every key that it was given must have been read."""
    read: set[str] = set()
    argv = arguments(assets, folder, *extra, model=MODELS.get(kind, "sd"))
    run = run_here(kind, argv, estimate=True, Config=recording(SCRIPTS[kind].Config, read))
    assert all(v.isfinite().all() for v in lora_state(run.models.unet).values())
    # cache_dir is for datasets that are copied: tests/test_training_tables.py.
    assert {key for key in given(argv) if not read & {key, *PROPERTIES.get(key, ())}} <= {"cache_dir"}


@pytest.mark.parametrize(("kind", "extra", "effect"), CASES, ids=NAMES)
def test_every_value_of_every_option_runs(assets, plain, tmp_path, kind, extra, effect):
    if "--time_ids" in extra:
        effect = OTHER if MODELS.get(kind) == "xl" else SAME
    run_with(assets, tmp_path / "out", kind, extra)
    found, expected = weights(tmp_path / "out"), plain(kind)
    if effect:
        same = all(torch.equal(found[k], expected[k]) for k in expected)
        assert same == (effect == SAME)
    if "--rank" in extra:
        assert {min(v.shape) for v in found.values()} == {4}
    if "--tracker_project_name" in extra:
        assert any((tmp_path / "out" / "logs" / "mine").glob("events*"))
    if "--checkpoints_total_limit" in extra:
        assert [p.name for p in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize(("kind", "extra"), [(kind, extra) for kind, lines in OWN.items() for extra in lines])
def test_every_option_of_one_script_runs(assets, plain, tmp_path, kind, extra):
    run_with(assets, tmp_path / "out", kind, extra)
    found, expected = weights(tmp_path / "out"), plain(kind)
    assert any(not torch.equal(found[k], expected[k]) for k in expected)


@pytest.mark.parametrize("kind", SCRIPTS)
def test_no_option_is_left_out_here(assets, tmp_path, kind):
    tried = given(
        [*arguments(assets, tmp_path), *(word for extra, *_ in [*OPTIONS, *SHARED, *zip(OWN[kind])] for word in extra)]
    )
    keys = {f.name for f in dataclasses.fields(SCRIPTS[kind].Config)}
    assert keys - tried == ELSEWHERE & keys and tried <= keys


@pytest.mark.parametrize("key", sorted(ELSEWHERE))
def test_another_file_tries_what_is_left_out_here(key):
    """As `--key`, or as the name of a setting that a test puts together."""
    files = [f for f in (ROOT / "tests").glob("*.py") if f.name != Path(__file__).name]
    assert any(re.search(rf"--{key}\b|[\"'{{ ]{key}[\"']?[:=]", f.read_text(encoding="utf-8")) for f in files)
