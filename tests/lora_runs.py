"""Short runs of the training scripts on tiny random pipelines, and what diffusers draws with their LoRA."""

import pytest
import torch
from diffusers import DiffusionPipeline
from pipelines import SIDE, save_dataset, save_pipeline
from runs import call

import train_ncp_dpo
import train_ncp_sft
from ncp.common import hub


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run on each architecture: its output folder, its base, rank and alpha; SD's alpha is half its rank.

    And what they would have uploaded.
    """
    folder = tmp_path_factory.mktemp("runs")
    save_dataset(folder / "data" / "train.parquet", rows=10, caption=[f"prompt {i // 2}" for i in range(10)])
    found = {}
    for kind, script, rank, alpha in (("xl", train_ncp_dpo, 4, 4), ("sd", train_ncp_sft, 8, 4)):
        base = save_pipeline(folder / kind, xl=kind == "xl")
        settings = {
            "pretrained_model_name_or_path": base,
            "dataset_name": folder / "data",
            "cache_dir": folder / "cache",
            "output_dir": folder / f"{kind} [tuned]",
            "resolution": SIDE,
            "mixed_precision": "no",
            "max_train_steps": 2,
            "train_batch_size": 2,
            "learning_rate": 0.05,
            "scale_lr": "false",
            "dataloader_num_workers": 0,
            "report_to": "none",
            "use_8bit_adam": "false",
            "heldout_pairs": 1,
            "rank": rank,
            "lora_alpha": alpha,
            "push_to_hub": "true",
        }
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hub, "upload", lambda *arguments: found.update(uploaded=arguments[3]))
            call(script.main, [str(x) for key, value in settings.items() for x in (f"--{key}", value)])
        found[kind] = (folder / f"{kind} [tuned]", base, rank, alpha)
    return found


def draw(base, lora=None) -> torch.Tensor:
    """An image (H, W, 3) by the pipeline, with diffusers' loader for the LoRA."""
    pipe = DiffusionPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    if lora is not None:
        pipe.load_lora_weights(lora)
    generator = torch.Generator().manual_seed(0)
    size = {"height": SIDE, "width": SIDE, "num_inference_steps": 3, "output_type": "pt"}
    return pipe("a prompt", generator=generator, **size).images[0]
