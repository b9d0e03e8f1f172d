"""The evaluation's settings: one configuration for all its steps, and checks of the configuration alone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.questions import QUESTIONS, VLM_QUESTION, find_endpoints, question_of
from ncp.common.config import one_item_each, option
from ncp.common.errors import UserError

# Keys that decide an image, together with the model's weights, the prompt and the sample's number. Nothing else does.
PROTOCOL = (
    "pretrained_model_name_or_path",
    "revision",
    "variant",
    "prediction_type",
    "rescale_betas_zero_snr",
    "pretrained_vae_model_name_or_path",
    "seed",
    "scheduler",
    "num_inference_steps",
    "guidance_scale",
    "max_sequence_length",
    "resolution",
    "mixed_precision",
)
OLDER = {"max_sequence_length": 256}  # what protocols mean that older versions wrote
SCHEDULERS = ("pipeline", "ddim", "pndm", "euler", "dpmsolver++")
SCORERS = (
    *("pickscore", "hpsv2", "hpsv2.1", "clip", "aesthetic", "imagereward", "mps"),
    *QUESTIONS,
    *("oracle_overall", "oracle_appeal", "oracle_alignment"),
)
# The keys with the location of a scorer's weights.
WEIGHT_KEYS = {
    "pickscore": ("pickscore_model", "clip_h_processor"),
    "hpsv2": ("hpsv2_checkpoints", "clip_h_processor"),
    "hpsv2.1": ("hpsv2_checkpoints", "clip_h_processor"),
    "clip": ("clip_l_model",),
    "aesthetic": ("aesthetic_checkpoint", "clip_l_model"),
    "imagereward": ("imagereward_model", "imagereward_tokenizer"),
    "mps": ("mps_checkpoint", "clip_h_processor"),
}
MODEL_NAME = r"[\w.+-]+"


@dataclass(kw_only=True)
class EvaluationConfig:
    """What is drawn, by which judges it is scored, and what is compared. Each key has its documentation."""

    pretrained_model_name_or_path: str = option(
        group="models",
        doc="base pipeline, of the architecture of Stable Diffusion 1.x, 2.x, SDXL or SD3: diffusers folder, hub id or "
        "(not SD3) .safetensors checkpoint as on Civitai",
    )
    single_file_config: str | None = option(
        None,
        doc="for such checkpoints: diffusers pipeline folder or hub id whose configs and tokenizers fit; null: those "
        "of SD 1.x, SD 2.x or SDXL, and CLIP's tokenizer from the hub",
    )
    prediction_type: str | None = option(
        None,
        choices=("epsilon", "v_prediction", "sample"),
        doc="what the base's U-Net predicts; null: what its scheduler's config or its file says",
    )
    rescale_betas_zero_snr: bool | None = option(
        None,
        doc="whether the base's noise schedule has zero terminal SNR; null: what its scheduler's config or its file "
        "says",
    )
    revision: str | None = option(
        None, doc="branch, tag or commit of the base pipeline, if it is a hub id; null: the main branch"
    )
    variant: str | None = option(
        None, doc="variant of the weight files, such as fp16 for files named NAME.fp16.safetensors; null: no variant"
    )
    pretrained_vae_model_name_or_path: str | None = option(
        None,
        doc="VAE to use instead of the base pipeline's own: folder or hub id, such as an fp16-safe one for SDXL; null: "
        "the pipeline's own",
    )
    models: list[str] = option(
        ["base"],
        doc="models to compare: base (the base pipeline), and NAME=PATH for each other, where PATH is a folder or hub "
        "id of a LoRA, a U-Net or a pipeline, or a file (on the hub OWNER/NAME/FILE) of a LoRA, of a U-Net's weights "
        "or, here, of a whole checkpoint. The first one is the reference",
    )
    runs: list[str] = option(
        [],
        doc="training runs whose checkpoints are drawn and scored too, for curves over training: NAME=FOLDER, their "
        "output folder",
    )
    prompts: str = option(
        group="prompts",
        doc="where prompts come from: tiny (those of the embedded world), a text, CSV, TSV, JSON, JSON lines or "
        "parquet file, a folder of such files, or a hub dataset id",
    )
    prompts_files: list[str] = option(
        [],
        doc="patterns of the files to take from that folder or hub dataset; none: all files of a folder (a hub dataset "
        "needs some)",
    )
    prompt_column: str | None = option(
        None, doc="column of the prompts in files with columns; null: prompt, caption or text, the first that is there"
    )
    category_column: str | None = option(
        None,
        doc="column of the prompts' categories, each of which is compared by itself too; null: the file's name, if "
        "there are several files. A prompt that occurs in several categories counts in each",
    )
    max_prompts: int | None = option(None, low=1, doc="use only the first so many different prompts; null: all")
    samples_per_prompt: int = option(
        1, low=1, doc="images per model and prompt, each from noise of its own that all models share"
    )
    seed: int = option(
        0,
        low=0,
        group="sampling",
        doc="seed of the noise, which follows from it, the prompt's text and the sample's number",
    )
    scheduler: str = option(
        "pipeline",
        choices=SCHEDULERS,
        doc="sampler that draws the images; pipeline: the base pipeline's own; SD3: euler",
    )
    num_inference_steps: int = option(50, low=1, doc="steps of the sampler per image")
    guidance_scale: float = option(7.5, low=0, doc="scale of classifier-free guidance; up to 1: no guidance")
    max_sequence_length: int = option(
        256, low=0, high=512, doc="tokens that SD3's T5 adds to CLIP's; without T5 so many zeros, as in diffusers"
    )
    resolution: int = option(512, low=8, doc="side of the square images in pixels, a multiple of 8")
    mixed_precision: str = option(
        "fp16",
        choices=("no", "fp16", "bf16"),
        doc="precision of weights and arithmetic in drawing; no (quoted in YAML) is float32",
    )
    batch_size: int = option(8, low=1, doc="number of images that a process draws or scores at once")
    output_dir: str = option(doc="folder for images, scores, the report and the judges' page")
    scorers: list[str] = option(
        group="scores", doc="judges: " + ", ".join(SCORERS) + ", or module:function of your own"
    )
    pickscore_model: str = option("yuvalkirstain/PickScore_v1", doc="weights of PickScore: folder or hub id")
    hpsv2_checkpoints: str = option(
        "xswu/HPSv2",
        doc="weights of HPSv2: folder or hub id with HPS_v2_compressed.pt (version 2.0) and HPS_v2.1_compressed.pt",
    )
    clip_h_processor: str = option(
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        doc="tokenizer and image preprocessing of PickScore, HPSv2 and MPS: folder or hub id",
    )
    clip_l_model: str = option(
        "openai/clip-vit-large-patch14", doc="CLIP model of the CLIP score and of the aesthetic score: folder or hub id"
    )
    aesthetic_checkpoint: str = option(
        "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth",
        doc="weights of LAION's aesthetic predictor: file or URL",
    )
    imagereward_model: str = option(
        "zai-org/ImageReward",
        doc="weights of ImageReward: folder or hub id with ImageReward.pt and med_config.json, or a .pt file with that "
        "config beside it",
    )
    imagereward_tokenizer: str = option(
        "google-bert/bert-base-uncased", doc="tokenizer of ImageReward, BERT's without capitals: folder or hub id"
    )
    mps_checkpoint: str = option(
        "RE-N-Y/mpsv1",
        doc="weights of MPS for overall preference: the authors' MPS_overall_checkpoint.pth, a .safetensors file, or a "
        "folder or hub id with model.safetensors",
    )
    endpoints: list[str] = option(
        [],
        doc="where judges behind an OpenAI-compatible HTTP endpoint are asked: JUDGE=MODEL@URL, where JUDGE is one of "
        + ", ".join(QUESTIONS)
        + ", MODEL is the model's name on the server, and URL ends before /chat/completions, as in "
        "vqascore=Qwen/Qwen2.5-VL-7B-Instruct@http://localhost:8000/v1. A key for the server is read from the "
        "environment variable ENDPOINT_API_KEY",
    )
    vlm_question: str = option(
        VLM_QUESTION,
        doc="what the judge vlm is asked about an image, with {prompt} where the prompt belongs; the score is the "
        "number in the reply",
    )
    endpoint_timeout: float = option(120.0, above=0, doc="seconds without a sign of an endpoint's reply before a retry")
    endpoint_attempts: int = option(
        5, low=1, doc="times that an endpoint is asked about an image, with growing pauses, before scoring ends"
    )
    bootstrap_samples: int = option(
        10_000,
        low=100,
        group="comparison",
        doc="number of resamples of the prompts that each 95% interval is taken from",
    )
    report_prompts: int = option(
        100,
        low=1,
        doc="number of prompts whose images are shown in report.html, half of them extremes, half drawn at random",
    )
    annotate_prompts: int | None = option(
        100, low=1, group="human judges", doc="number of prompts on the human judges' page, drawn at random; null: all"
    )
    votes: list[str] = option(
        [], doc="files with the human judges' votes, which the page exports, one JSON file per judge"
    )

    def check(self) -> None:
        """Raises UserError for keys that contradict each other."""
        if self.resolution % 8:
            raise UserError(f"resolution is {self.resolution}; Stable Diffusion needs a multiple of 8")
        if not self.models:
            raise UserError("models is empty; expected base or NAME=PATH entries")
        if not self.scorers:
            raise UserError(f"scorers is empty; expected some of: {', '.join(SCORERS)}")
        for key in ("models", "runs", "scorers"):
            parts = [entry.partition("=") for entry in getattr(self, key)]
            one_item_each(key, ["".join(p) for p in parts if "," in p[0] or not Path(p[2]).exists()])
        for key in ("models", "runs"):
            for entry in getattr(self, key):
                name, equals, path = entry.partition("=")
                if (
                    not re.fullmatch(MODEL_NAME, name)
                    or (equals and not path)
                    or (not equals and (key, name) != ("models", "base"))
                ):
                    also = "base or " if key == "models" else ""
                    raise UserError(
                        f"{key}: '{entry}'; expected {also}NAME=PATH, a name of letters, digits and . _ + -"
                    )
        found = find_endpoints(self.endpoints)
        if missing := [name for name in self.scorers if name in QUESTIONS and name not in found]:
            raise UserError(f"scorer '{missing[0]}' needs an entry in endpoints: {missing[0]}=MODEL@URL")
        if "{prompt}" not in self.vlm_question:
            raise UserError("vlm_question does not say where the prompt belongs; expected {prompt} in it")
        names = [name for name, _ in named_paths([*self.models, *self.runs])]
        if repeated := {n for n in names if names.count(n) > 1}:
            raise UserError(f"models, runs: the name '{min(repeated)}' is given twice")

    def protocol(self) -> dict[str, Any]:
        """The keys of PROTOCOL and their values."""
        return {key: getattr(self, key) for key in PROTOCOL}

    def described(self) -> str:
        """A description of how images are drawn."""
        precision = {"no": "float32"}.get(self.mixed_precision, self.mixed_precision)
        return (
            f"{self.scheduler} scheduler, {self.num_inference_steps} steps, guidance {self.guidance_scale:g}, "
            f"{self.resolution} x {self.resolution} pixels, {precision}"
        )

    @property
    def model_names(self) -> list[str]:
        """The configured models, reference first, without the checkpoints of runs."""
        return [name for name, _ in named_paths(self.models)]

    def source_of(self, scorer: str) -> str:
        """The source of a scorer's weights or code, which must not change within one score table."""
        if scorer in WEIGHT_KEYS:
            return " and ".join(getattr(self, key) for key in WEIGHT_KEYS[scorer])
        if scorer in QUESTIONS:  # not the URL, which may change
            asked = question_of(scorer, self.vlm_question).text
            return f"{find_endpoints(self.endpoints)[scorer].model}, asked {' '.join(asked.split())!r}"
        return "tiny/oracle.py" if scorer in SCORERS else scorer


def named_paths(listed: list[str]) -> list[tuple[str, str]]:
    """(name, path) of NAME=PATH entries; the path of a bare `base` is empty."""
    return [(name, path) for name, _, path in (entry.partition("=") for entry in listed)]
