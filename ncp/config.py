"""One parser for YAML files and command lines, and the keys that the three training scripts share.

A configuration is a dataclass whose fields are made with `option`. `parse` reads `--config FILE` and
`--any_key value`, gives both the same types and ranges, lets the command line win, and refuses what
it does not know. A list is written as in YAML in both, `--key "[a, b]"`; a bare text is one item.
Every mistake is a `UserError`: one line that says what is wrong, where, and what would be right.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import os
import re
import reprlib
import sys
import traceback
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from tqdm import tqdm

from ncp.processes import follow_launcher

T = TypeVar("T")
TOKEN = re.compile(r"hf_[A-Za-z0-9]{30,}")  # the hub's access tokens


class UserError(Exception):
    """A mistake in the input: its message is one line, meant for the person at the keyboard.

    everywhere: every process finds it, so that the first alone need say it; otherwise whoever meets it does.
    """

    def __init__(self, message: str, everywhere: bool = True):
        super().__init__(message)
        self.everywhere = everywhere


INTERRUPTED, DIVERGED = 75, 3  # exit statuses; the first is EX_TEMPFAIL of sysexits.h: try again


class Stopped(Exception):
    """A run that ends early as it should: a line for the person at the keyboard, and the exit status."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


def option(
    default: Any = dataclasses.MISSING,
    *,
    doc: str,
    choices: Sequence[Any] | None = None,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
) -> Any:
    """A dataclass field with its documentation and range.

    choices: accepted values (for a list: of its items). low, high: inclusive bounds. above: exclusive lower bound.
    A field without a default is required.
    """
    metadata = {"doc": doc, "choices": choices, "low": low, "high": high, "above": above}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parse(cls: type[T], argv: Sequence[str] | None = None, description: str | None = None) -> T:
    """Builds `cls` from `--config FILE` and `--key value` arguments (default: `sys.argv[1:]`).

    Raises UserError for an unknown or repeated key, a wrong type or value, or a missing file or key.
    If `cls` has a method `check`, it is called last, for rules that span several keys.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    parser = _Parser(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of the keys below")
    for name, field in fields.items():
        # A bare --flag means true; everything else needs its value.
        flag = {"nargs": "?", "const": "true"} if hints[name] is bool else {}
        parser.add_argument(
            f"--{name}", default=dataclasses.MISSING, help=_help(field), metavar=_show(hints[name]), **flag
        )
    known, rest = parser.parse_known_args(argv)
    if rest:
        name = rest[0].split("=")[0]
        raise UserError(f"command line: unknown argument {name}{_nearest(name.lstrip('-'), [*fields, 'config'], '--')}")

    values: dict[str, Any] = {}
    if known.config is not None:
        for name, value in read_yaml(known.config).items():
            if name not in fields:
                raise UserError(f"{known.config}: unknown key '{name}'{_nearest(str(name), fields)}")
            values[name] = _convert(value, hints[name], fields[name], f"{known.config}: {name}")
    for name, field in fields.items():
        if (text := getattr(known, name)) is not dataclasses.MISSING:
            where = f"command line: --{name}"
            value = _as_in_yaml(text, where) if _is_list(hints[name]) else text
            values[name] = _convert(value, hints[name], field, where)
        elif (
            name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        ):
            raise UserError(f"{known.config or 'command line'}: '{name}' is missing ({field.metadata['doc']})")
    config = cls(**values)
    if hasattr(config, "check"):
        config.check()
    return config


def read_yaml(path: str | os.PathLike) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError if it cannot be read, is no mapping, or repeats a key."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the config file ({getattr(error, 'strerror', None) or error})") from None
    try:
        content = yaml.load(text, _UniqueKeyLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # the second: a date that there is not
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected lines of 'key: value', found a {type(content).__name__}")
    return content


def save(config: Any, path: str | os.PathLike) -> None:
    """Writes a configuration as YAML that `parse` reads back to the same values."""
    Path(path).write_text(
        yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True), encoding="utf-8"
    )


def run(main: Callable[[], Any]) -> None:
    """Calls `main`. A UserError, or what the system refuses, becomes one line on standard error and exit status 2.

    A Stopped becomes a line and its own status.
    """
    first = os.environ.get("RANK", "0") == "0"
    follow_launcher()
    try:
        try:
            main()
        except BaseException as error:
            # A data loader ends its workers, which outlive signals, once nothing refers to it.
            traceback.clear_frames(error.__traceback__)
            raise
    except UserError as error:
        if first or not error.everywhere:  # one line, not one per process
            _say(f"error: {error}")
        sys.exit(2)
    except OSError as error:  # a disk or a network, which a traceback would not explain better
        _say(f"error: {error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
        sys.exit(2)
    except Stopped as stop:
        if first:
            _say(str(stop))
        sys.exit(stop.status)
    except KeyboardInterrupt:  # before a run's guard takes signals over, and in programs that have none
        if first:
            _say("interrupted")
        sys.exit(130)  # as a shell reports it
    except RuntimeError as error:
        if not _is_lost_peer(error):
            raise
        # Without the clean-up at exit, which would wait for the one that is gone.
        _say(f"error: another process of this run has ended or does not answer ({str(error).splitlines()[0]})")
        os._exit(2)
    finally:
        _leave_processes()


def _leave_processes() -> None:
    """Leaves the process group, if there is one: now that DDP is gone with `main`'s frame, and Python is still whole.

    Earlier, it would end with DDP's C++ half, which holds the interpreter lock while it waits for gloo's threads, and
    they may wait for that lock to drop a tensor: a deadlock, one time in a few. Later, they find no interpreter and
    abort the process.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _say(line: str) -> None:
    """A line of its own on standard error, even under a progress bar; whatever it quotes, no hub token is in it."""
    tqdm.write(TOKEN.sub("hf_***", " ".join(line.splitlines())), file=sys.stderr)


def _is_lost_peer(error: RuntimeError) -> bool:
    """Whether gloo or NCCL lost the connection to another process, or gave up waiting for it."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return False
    signs = ("closed by peer", "reset by peer", "timed out", "timeout", "connection refused", "remote process exited")
    return any(sign in str(error).lower() for sign in signs)


# ---------------------------------------------------------------- keys shared by the training scripts


@dataclasses.dataclass(kw_only=True)
class TrainingConfig:
    """What the three scripts have in common. Names are diffusers' where diffusers has one."""

    # model
    pretrained_model_name_or_path: str = option(doc="diffusers pipeline folder or hub id, SD or SDXL architecture")
    revision: str | None = option(None, doc="hub revision of the model")
    variant: str | None = option(None, doc="weight file variant, such as fp16")
    pretrained_vae_model_name_or_path: str | None = option(
        None, doc="another VAE (folder or hub id), such as an fp16-safe one for SDXL; null: the model's own"
    )
    # data
    dataset_name: str = option(doc="folder of Pick-a-Pic parquet shards, one parquet file, or a hub id of that schema")
    dataset_split: str = option("train", doc="split: files or folders named for it, or the hub's split")
    cache_dir: str | None = option(None, doc="where downloads and the memory-mapped copy of the dataset go")
    cached_latents: str | None = option(
        None, doc="folder that cache_latents.py wrote with this config; null: encode images and prompts at every step"
    )
    max_train_samples: int | None = option(None, low=1, doc="use only the first pairs, for a quick try")
    heldout_pairs: int = option(
        0, low=0, doc="pairs whose prompts and images never train, evenly spaced, to watch the run by; 0: none"
    )
    resolution: int = option(512, low=8, high=16384, doc="side of the square training images, in pixels")
    center_crop: bool = option(True, doc="crop the centre; false: a random place, which cannot be cached")
    random_flip: bool = option(True, doc="mirror the images, winner and loser together, half of the time")
    time_ids: str = option(
        "image",
        choices=("image", "fixed"),
        doc="SDXL's size and crop conditions: each image's own; fixed: a whole image of resolution, as Diffusion-DPO",
    )
    proportion_empty_prompts: float = option(0.0, low=0, high=1, doc="share of samples trained on the empty prompt")
    corrupt_images: str = option(
        "error", choices=("error", "skip"), doc="stop at an unreadable image, or skip and count"
    )
    dataloader_num_workers: int = option(4, low=0, high=4096, doc="processes that decode images; 0: the main process")
    # objective
    space: str = option(
        "perceptual",
        choices=("perceptual", "latent"),
        doc="compare U-Net features (NCP) or noise (the latent baseline)",
    )
    encoder_blocks: list[str] = option(
        ["last"], doc="features of the encoder: last, mid, or down-block indices from 0; several count equally"
    )
    timestep_offset: str = option("1", doc="k of t' = t - k, or x0 to compare predictions of the clean sample")
    secant: str = option(
        "auto",
        doc="auto: eq. 13 as printed in float32, a derivative that is right in half precision otherwise; a number s: "
        "that secant, 1 being eq. 13 as printed",
    )
    secant_length: float = option(
        0.016, above=0, doc="step length of secant auto in half precision, in latent standard deviations"
    )
    # optimisation
    output_dir: str = option(doc="where weights, checkpoints, logs and pictures go")
    seed: int = option(0, low=0, high=2**63 - 1, doc="everything random is a function of seed, step and sample")
    train_batch_size: int = option(1, low=1, high=65536, doc="pairs per process and forward pass")
    gradient_accumulation_steps: int = option(1, low=1, doc="forward passes per optimizer step")
    effective_batch_size: int | None = option(
        None,
        low=1,
        doc="if given, must equal batch x accumulation x processes: a guard when the number of GPUs changes",
    )
    max_train_steps: int = option(1000, low=1, doc="optimizer steps")
    learning_rate: float = option(1e-8, above=0, high=1e6, doc="learning rate, before scale_lr")
    scale_lr: bool = option(True, doc="multiply the learning rate by the effective batch size")
    lr_warmup_steps: int = option(0, low=0, doc="steps of linear warm-up; constant afterwards")
    use_8bit_adam: bool = option(True, doc="AdamW8bit of bitsandbytes; false: torch's AdamW")
    adam_beta1: float = option(0.9, low=0, high=0.99999, doc="AdamW's first moment decay")
    adam_beta2: float = option(0.999, low=0, high=0.99999, doc="AdamW's second moment decay")
    adam_weight_decay: float = option(1e-2, low=0, high=1e6, doc="AdamW's weight decay")
    adam_epsilon: float = option(1e-8, above=0, high=1e6, doc="AdamW's epsilon")
    max_grad_norm: float = option(1.0, above=0, doc="gradients are clipped to this norm")
    gradient_checkpointing: bool = option(
        False, doc="recompute activations in the backward pass: less memory, more time"
    )
    checkpointed_blocks: list[str] = option(
        ["all"], doc="which blocks do so: all, or some of encoder, mid, down0, down1, ..., up0, up1, ..."
    )
    torch_compile: bool = option(False, doc="compile transformer and ResNet blocks: a slower start, faster steps")
    channels_last: bool = option(False, doc="store convolution weights channels-last, which suits GPUs' half precision")
    mixed_precision: str = option(
        "fp16", choices=("no", "fp16", "bf16"), doc="of frozen weights and arithmetic; LoRA weights stay float32"
    )
    allow_tf32: bool = option(
        True,
        doc="TF32 on Ampere and later GPUs where half precision leaves float32 (SDXL's VAE); mixed_precision no is "
        "float32 throughout",
    )
    deterministic: bool = option(
        False, doc="only kernels that give the same bits every time on the same hardware and software; slower"
    )
    rank: int = option(64, low=1, high=65536, doc="LoRA rank")
    lora_alpha: float | None = option(None, above=0, doc="LoRA alpha; null: equal to rank")
    use_ema: bool = option(False, doc="keep an exponential moving average of the LoRA weights and save that")
    ema_decay: float = option(0.99, low=0, high=0.999999, doc="decay of that average per step")
    # running
    checkpointing_steps: int = option(500, low=1, doc="steps between checkpoints")
    checkpoints_total_limit: int | None = option(None, low=1, doc="keep this many newest checkpoints; null: all")
    resume_from_checkpoint: str | None = option(
        None, doc="latest, a checkpoint folder, or auto: latest if there is one; null: start afresh"
    )
    max_train_hours: float | None = option(
        None,
        above=0,
        doc="checkpoint and stop after so many hours of wall-clock time, loading included; null: no limit",
    )
    max_skipped_steps: int = option(
        10, low=1, doc="stop after so many steps in a row with a loss or gradient that is not finite"
    )
    heldout_steps: int = option(50, low=1, doc="steps between looks at the held-out pairs")
    warn_winner_drift: float = option(
        0.1, above=0, doc="warn when the median held-out winner's loss exceeds the reference's by this share"
    )
    max_winner_drift: float | None = option(None, above=0, doc="stop when it does by this share; null: go on")
    ddp_timeout: int = option(
        1800, low=10, high=10**7, doc="seconds that a process waits for the others before it gives up"
    )
    logging_steps: int = option(1, low=1, doc="steps between log entries, which average over those steps")
    report_to: str = option("tensorboard", doc="tracker: tensorboard, wandb, another of accelerate's, or none")
    tracker_project_name: str = option("ncp", doc="project name given to the tracker")
    # pictures
    validation_prompts: list[str] = option([], doc="prompts drawn before and after, with fixed seeds")
    validation_steps: int | None = option(None, low=1, doc="draw every so many steps; null: only at the end")
    validation_num_inference_steps: int = option(50, low=1, high=999, doc="sampler steps (DDIM) of validation images")
    validation_guidance_scale: float = option(7.5, low=0, doc="classifier-free guidance of validation images")
    validation_seed: int = option(0, low=0, high=2**62, doc="seed of the first validation image; the others count up")
    # sharing
    push_to_hub: bool = option(False, doc="upload the output folder's weights and model card at the end")
    hub_model_id: str | None = option(None, doc="repository to upload to; null: the output folder's name")
    hub_private_repo: bool = option(True, doc="create that repository as private")

    def check(self) -> None:
        """Rules that span keys. Raises UserError."""
        if self.timestep_offset != "x0" and not (
            self.timestep_offset.isdecimal() and 1 <= int(self.timestep_offset) <= 999
        ):
            raise UserError(f"timestep_offset is '{self.timestep_offset}'; expected an integer from 1 to 999, or x0")
        if self.secant != "auto":
            try:
                valid = 1 <= float(self.secant) < math.inf
            except ValueError:
                valid = False
            if not valid:
                raise UserError(
                    f"secant is '{self.secant}'; expected auto, or a number of at least 1 (1: eq. 13 as printed)"
                )
        if self.cached_latents is not None and not self.center_crop:
            raise UserError("cached_latents needs center_crop: true; a random crop is another image every time")
        if self.max_winner_drift is not None and not self.heldout_pairs:
            raise UserError("max_winner_drift needs heldout_pairs: what drifts is measured on them")
        if not re.fullmatch(r"[^./\\][^/\\]*", self.tracker_project_name):  # names a folder below output_dir/logs
            raise UserError(f"tracker_project_name is {self.tracker_project_name!r}; expected a name, not a path")
        if self.hub_model_id is not None and not re.fullmatch(r"([\w-][\w.-]*/)?[\w-][\w.-]*", self.hub_model_id):
            raise UserError(f"hub_model_id is {self.hub_model_id!r}; expected a name, or owner/name")
        one_item_each("encoder_blocks", self.encoder_blocks)
        one_item_each("checkpointed_blocks", self.checkpointed_blocks)
        if not self.encoder_blocks or len(set(self.encoder_blocks)) < len(self.encoder_blocks):
            raise UserError(f"encoder_blocks is {self.encoder_blocks}; expected at least one block, each once")
        if self.lr_warmup_steps > self.max_train_steps:
            raise UserError(
                f"lr_warmup_steps ({self.lr_warmup_steps}) is more than max_train_steps ({self.max_train_steps}): "
                "the learning rate would never be reached"
            )

    @property
    def k(self) -> int | None:
        """The timestep offset; None for x0."""
        return None if self.timestep_offset == "x0" else int(self.timestep_offset)

    @property
    def first_timestep(self) -> int:
        """The smallest t that has a t' = t - k in the schedule (method: t is uniform on {k, ..., T-1})."""
        return self.k or 1


# ---------------------------------------------------------------- conversion

_SHORT = reprlib.Repr()  # a few bytes of YAML can stand for gigabytes
_SHORT.maxstring = _SHORT.maxother = 200


def _convert(value: Any, hint: Any, field: dataclasses.Field, where: str) -> Any:
    """`value` (from YAML or, as text, from the command line) as type `hint`, within the field's range."""
    inner, optional = _unwrap(hint)
    if value is None or (isinstance(value, str) and value.lower() in ("null", "none", "") and optional):
        if optional:
            return None
        raise UserError(f"{where} is empty; expected {_show(hint)}")
    if _is_list(hint):
        (item_type,) = typing.get_args(inner)
        return [_scalar(item, item_type, field, where) for item in (value if isinstance(value, list) else [value])]
    return _scalar(value, inner, field, where)


def _is_list(hint: Any) -> bool:
    return typing.get_origin(_unwrap(hint)[0]) is list


def _as_in_yaml(text: str, where: str) -> Any:
    """What `text` means after 'key: ' in a YAML file. Raises UserError if it means nothing there."""
    try:
        content = yaml.load(f"key: {text}", _UniqueKeyLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        content = {}
    if list(content) != ["key"]:
        example = "[first, second], or \"['one, with: odd signs']\""
        raise UserError(f"{where} is {_SHORT.repr(text)}, which YAML cannot read; a list is written {example}")
    return content["key"]


def one_item_each(key: str, items: Sequence[str]) -> None:
    """Raises UserError for an item that looks like several: a, b without the brackets of a list."""
    for item in items:
        if "," in item:
            raise UserError(f"{key}: '{item}' is one item; several are written [{', '.join(re.split(', *', item))}]")


def _scalar(value: Any, kind: Any, field: dataclasses.Field, where: str) -> Any:
    def wrong() -> UserError:
        hint = " (quote it if a word was meant)" if kind is str and isinstance(value, bool) else ""
        return UserError(f"{where} is {_SHORT.repr(value)}; expected {_show(kind)}{hint}")

    if kind is bool:
        words = {
            "true": True,
            "yes": True,
            "on": True,
            "1": True,
            "false": False,
            "no": False,
            "off": False,
            "0": False,
        }
        if not isinstance(value, bool) and (not isinstance(value, str) or value.lower() not in words):
            raise wrong()
        result: Any = value if isinstance(value, bool) else words[value.lower()]
    elif kind in (int, float):
        if isinstance(value, (bool, list, dict)):
            raise wrong()
        try:
            # YAML 1.1 reads 1e-8 as a string, so text is parsed here too.
            result = float(value)
        except (TypeError, ValueError, OverflowError):
            raise wrong() from None
        if not math.isfinite(result) or (kind is int and result != int(result)):
            raise wrong()
        result = kind(value) if isinstance(value, int) else kind(result)  # int() of a float would lose digits
    else:
        if isinstance(value, (bool, list, dict)):
            raise wrong()
        result = str(value)
        if "\0" in result or any("\ud800" <= c <= "\udfff" for c in result):  # in no path, in no UTF-8
            raise wrong()
        if TOKEN.search(result):  # which would end up in config.yaml and the model card
            raise UserError(f"{where} holds an access token; log in with 'hf auth login' or set HF_TOKEN instead")

    limits = field.metadata
    if limits["choices"] is not None and result not in limits["choices"]:
        names = ", ".join(map(str, limits["choices"]))
        raise UserError(f"{where} is {result!r}; expected one of: {names}")
    for bound, broken, words_ in (
        ("low", lambda b: result < b, "at least"),
        ("high", lambda b: result > b, "at most"),
        ("above", lambda b: result <= b, "more than"),
    ):
        if limits[bound] is not None and broken(limits[bound]):
            raise UserError(f"{where} is {result}; expected {words_} {limits[bound]}")
    return result


def _unwrap(hint: Any) -> tuple[Any, bool]:
    """(the type, whether None is allowed too)."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = [a for a in typing.get_args(hint) if a is not type(None)]
        return inner[0], len(inner) < len(typing.get_args(hint))
    return hint, False


def _show(hint: Any) -> str:
    inner, optional = _unwrap(hint)
    if _is_list(inner):
        name = f"list of {_show(typing.get_args(inner)[0])}"
    else:
        name = {bool: "true or false", int: "an integer", float: "a number", str: "text"}.get(inner, str(inner))
    return f"{name} or null" if optional else name


def _help(field: dataclasses.Field) -> str:
    default = "" if field.default is dataclasses.MISSING else f" (default: {field.default})"
    choices = f" One of: {', '.join(map(str, field.metadata['choices']))}." if field.metadata["choices"] else ""
    return (field.metadata["doc"] + "." + choices + default).replace("%", "%%")


def _nearest(name: str, known: Any, prefix: str = "") -> str:
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {prefix}{match[0]}?" if match else "; --help lists the known ones"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"command line: {message}")


class _UniqueKeyLoader(yaml.SafeLoader):
    """A safe loader that refuses a repeated key instead of silently taking the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is not a word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key.value}' is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)
