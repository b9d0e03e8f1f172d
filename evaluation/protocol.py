"""One configuration for generate, score and compare, and what the steps leave for one another.

OUTPUT_DIR/protocol.json    what decides an image, and the models, with the hashes of their weights
OUTPUT_DIR/images/MODEL/    one PNG per prompt and sample
OUTPUT_DIR/index.parquet    one row per image
OUTPUT_DIR/scores.parquet   one row per image and scorer
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ncp.common.config import one_item_each, option
from ncp.common.errors import UserError
from ncp.common.processes import misunderstanding

# An image is a function of these, of the model's weights, of its prompt and of its sample number; of nothing else.
PROTOCOL = (
    "pretrained_model_name_or_path",
    "revision",
    "variant",
    "pretrained_vae_model_name_or_path",
    "seed",
    "scheduler",
    "num_inference_steps",
    "guidance_scale",
    "resolution",
    "mixed_precision",
)
SCHEDULERS = ("pipeline", "ddim", "pndm", "euler", "dpmsolver++")
SCORERS = (
    *("pickscore", "hpsv2", "hpsv2.1", "clip", "aesthetic", "imagereward"),
    *("oracle_overall", "oracle_appeal", "oracle_alignment"),
)
NAME = r"[\w.+-]+"


@dataclass(kw_only=True)
class Config:
    # models
    pretrained_model_name_or_path: str = option(doc="base pipeline: diffusers folder or hub id, SD or SDXL")
    revision: str | None = option(None, doc="hub revision of the base pipeline")
    variant: str | None = option(None, doc="weight file variant, such as fp16")
    pretrained_vae_model_name_or_path: str | None = option(
        None, doc="another VAE (folder or hub id), such as an fp16-safe one for SDXL; null: the model's own"
    )
    models: list[str] = option(
        ["base"], doc="base, and NAME=PATH of LoRA, U-Net or pipeline folders or hub ids; the first is the reference"
    )
    runs: list[str] = option([], doc="NAME=OUTPUT_DIR of training runs: their checkpoints are drawn, for the curves")
    # prompts
    prompts: str = option(doc="tiny (embedded), a text, CSV, TSV, JSON or parquet file, a folder, or a hub dataset id")
    prompts_files: list[str] = option(
        [], doc="which files of the folder or hub dataset, as patterns; a hub id needs it"
    )
    prompt_column: str | None = option(
        None, doc="column of the prompts; null: prompt, caption or text, whichever is there"
    )
    category_column: str | None = option(
        None, doc="column of the categories; null: the file's name, if there are several"
    )
    max_prompts: int | None = option(None, low=1, doc="use only the first prompts; null: all")
    samples_per_prompt: int = option(1, low=1, doc="images per model and prompt, each with a seed of its own")
    # sampling
    seed: int = option(0, low=0, doc="with the prompt's text and the sample's number, decides the noise")
    scheduler: str = option("pipeline", choices=SCHEDULERS, doc="sampler; pipeline: the base model's own")
    num_inference_steps: int = option(50, low=1, doc="sampler steps")
    guidance_scale: float = option(7.5, low=0, doc="classifier-free guidance")
    resolution: int = option(512, low=8, doc="side of the images, in pixels")
    mixed_precision: str = option("fp16", choices=("no", "fp16", "bf16"), doc="of weights and arithmetic")
    batch_size: int = option(8, low=1, doc="images drawn or scored at once, per process")
    output_dir: str = option(doc="where images, scores and the report go")
    # scores
    scorers: list[str] = option(doc="judges: " + ", ".join(SCORERS) + ", or module:function of your own")
    pickscore_model: str = option("yuvalkirstain/PickScore_v1", doc="PickScore: folder or hub id")
    hpsv2_checkpoints: str = option(
        "xswu/HPSv2", doc="folder or hub id with HPS_v2_compressed.pt, HPS_v2.1_compressed.pt"
    )
    clip_h_processor: str = option(
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", doc="tokenizer and preprocessing of PickScore and HPSv2"
    )
    clip_l_model: str = option("openai/clip-vit-large-patch14", doc="CLIP of the CLIP score and the aesthetic score")
    aesthetic_checkpoint: str = option(
        "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth",
        doc="LAION aesthetic predictor: file or URL",
    )
    imagereward_model: str = option(
        "ImageReward-v1.0", doc="ImageReward: file or published name (pip install image-reward)"
    )
    # comparison
    bootstrap_samples: int = option(10_000, low=100, doc="resamples of the prompts behind each 95% interval")
    report_prompts: int = option(
        100, low=1, doc="prompts whose images go into report.html: extremes, and a random rest"
    )
    annotate: bool = option(False, doc="write a blinded page for human judges instead of the report")
    annotate_prompts: int | None = option(100, low=1, doc="prompts on that page, drawn at random; null: all")
    votes: list[str] = option([], doc="votes exported from the page, one JSON file per judge")

    def check(self) -> None:
        """Rules that span keys. Raises UserError."""
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
                    not re.fullmatch(NAME, name)
                    or (equals and not path)
                    or (not equals and (key, name) != ("models", "base"))
                ):
                    also = "base or " if key == "models" else ""
                    raise UserError(
                        f"{key}: '{entry}'; expected {also}NAME=PATH, a name of letters, digits and . _ + -"
                    )
        names = [name for name, _ in entries([*self.models, *self.runs])]
        if repeated := {n for n in names if names.count(n) > 1}:
            raise UserError(f"models, runs: the name '{min(repeated)}' is given twice")

    def protocol(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in PROTOCOL}

    def described(self) -> str:
        """How images are drawn, in words."""
        precision = {"no": "float32"}.get(self.mixed_precision, self.mixed_precision)
        return (
            f"{self.scheduler} scheduler, {self.num_inference_steps} steps, guidance {self.guidance_scale:g}, "
            f"{self.resolution} x {self.resolution} pixels, {precision}"
        )

    @property
    def model_names(self) -> list[str]:
        return [name for name, _ in entries(self.models)]


def entries(listed: list[str]) -> list[tuple[str, str]]:
    """(name, path) of NAME=PATH entries; the path of a bare `base` is empty."""
    return [entry.partition("=")[::2] for entry in listed]


def processes() -> Any:
    """accelerate's view of this process: device, index, how many there are. Without a GPU they meet on the CPU.

    Raises UserError if that is not what the launcher says.
    """
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
    if reason := misunderstanding(state.num_processes):
        raise UserError(reason)
    return state


# ---------------------------------------------------------------- files of a step


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls `write` with a temporary name beside `path`, then renames: whoever finds the file finds it whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    write(temporary)
    os.replace(temporary, path)


def write_table(rows: list[dict[str, Any]], path: Path, schema: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_atomically(path, lambda file: pq.write_table(pa.Table.from_pylist(rows, schema=schema), file))


def read_table(path: Path, step: str) -> Any:
    """A parquet table that an earlier step wrote. Raises UserError naming that step if it is not there, or damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; run evaluate.py {step} first, with this config") from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from None


def index_schema() -> Any:
    import pyarrow as pa

    text, number = pa.string(), pa.int64()
    columns = {"model": text, "weights": text, "prompt_number": number, "prompt": text, "category": text}
    return pa.schema(list((columns | {"sample": number, "seed": number, "file": text}).items()))


def read_protocol(config: Config) -> dict[str, Any]:
    """What `generate` noted in the output folder. Raises UserError if it is missing or of another protocol."""
    path = Path(config.output_dir) / "protocol.json"
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
        was = noted["protocol"]
    except FileNotFoundError:
        raise UserError(f"{path} is missing; run evaluate.py generate first, with this config") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not readable ({error})") from None
    if changed := [f"{k} {was.get(k)!r}, now {v!r}" for k, v in config.protocol().items() if was.get(k) != v]:
        raise UserError(
            f"output_dir: the images in {config.output_dir} were drawn with another protocol ({'; '.join(changed)}); "
            "restore it, or choose another output_dir"
        )
    return noted


def read_index(config: Config) -> list[dict[str, Any]]:
    """One row per image, as `generate` left them.

    Raises UserError if they are of another protocol or other models than the config's, or if images are missing.
    """
    folder, noted = Path(config.output_dir), read_protocol(config)["models"]
    rows = read_table(folder / "index.parquet", "generate").to_pylist()
    if absent := sorted(set(config.model_names) - {r["model"] for r in rows}):
        raise UserError(f"models: no images of {', '.join(absent)} in {folder}; run evaluate.py generate")
    for name, path in entries(config.models):
        if path and (was := noted.get(name, {}).get("path")) != path:
            raise UserError(f"models: the images of '{name}' are by {was}, not by {path}; run evaluate.py generate")
    if missing := [r["file"] for r in rows if not (folder / r["file"]).is_file()]:
        raise UserError(
            f"{folder}: {len(missing)} of {len(rows)} images are missing, such as {missing[0]}; "
            "run evaluate.py generate again, which draws what is missing"
        )
    return rows
