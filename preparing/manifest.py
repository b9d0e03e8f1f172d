"""manifest.json: what was read and written. Also the progress of an unfinished output folder.

While a folder is unfinished, a file of another name (`UNFINISHED`) records the progress after every output file. With
it the same command can continue after the last finished file, and another command is refused.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ncp import __version__
from ncp.common.errors import UserError
from ncp.common.files import remove, sampled_sha256, sha256, write_text
from ncp.common.lock import is_empty
from preparing.settings import PrepareConfig
from preparing.write import Tally

NAME, UNFINISHED = "manifest.json", ".unfinished.json"
MAY_CHANGE = ("dataset_name", "output_dir", "images", "bad_images")  # locations, and how bad images are handled


def describe_run(files: dict[str, Path], config: PrepareConfig) -> dict[str, Any]:
    """What the output depends on."""
    return {
        "tool": "prepare_preferences",
        "version": __version__,
        "options": {k: v for k, v in asdict(config).items() if k not in MAY_CHANGE} | {"question": config.asked},
        "inputs": [
            {"file": name, "size": path.stat().st_size, "sampled_sha256": sampled_sha256([path])}
            for name, path in files.items()
        ],
    }


def find_progress(folder: Path, plan: dict[str, Any]) -> tuple[Tally, list[dict[str, Any]], bool]:
    """(progress of an earlier run of this command, its output files, whether it finished).

    Raises UserError if the folder holds anything else, or a file has changed since it was written.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir: {folder} is a file")
    for name in (NAME, UNFINISHED):
        if not (folder / name).is_file():
            continue
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8"))
            different = sorted(k for k in plan if k != "version" and found.get(k) != plan[k])
            tally = Tally(**found["counts"])
            outputs = list(found["outputs"])
            changed = [o["file"] for o in outputs if not is_as_written(folder / o["file"], o["size"])]
        except (ValueError, LookupError, AttributeError, TypeError, OSError):
            raise UserError(f"output_dir: {folder / name} is not this script's; choose another folder") from None
        if different:
            raise UserError(
                f"output_dir: {folder} holds another run's output (other {', '.join(different)}); choose another folder"
            )
        if changed:
            raise UserError(f"output_dir: {folder / changed[0]} has changed since; delete {folder} and run again")
        return tally, outputs, name == NAME
    if folder.exists() and not is_empty(folder):
        raise UserError(f"output_dir: {folder} holds something else; choose a new or empty folder")
    return Tally(), [], False


def is_as_written(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size


def describe_output(folder: Path, name: str) -> dict[str, Any]:
    return {"file": name, "size": (folder / name).stat().st_size, "sha256": sha256(folder / name)}


def save_progress(folder: Path, plan: dict[str, Any], tally: Tally, outputs: list[dict[str, Any]]) -> None:
    write_text(folder / UNFINISHED, json.dumps({**plan, "counts": asdict(tally), "outputs": outputs}))


def write_manifest(
    folder: Path, plan: dict[str, Any], tally: Tally, outputs: list[dict[str, Any]], config: PrepareConfig
) -> None:
    """Writes the last file of a run, and removes the mark that the folder is unfinished."""
    named = {"dataset_name": config.dataset_name, **plan, "counts": asdict(tally), "outputs": outputs}
    write_text(folder / NAME, json.dumps(named, indent=2, ensure_ascii=False) + "\n")
    remove(folder / UNFINISHED)


def summary(tally: Tally) -> str:
    """The counts, a line each, for the screen."""
    lines = [("input rows", tally.rows), ("pairs in them", tally.pairs)]
    lines += [("- " + reason.replace("_", " "), count) for reason, count in tally.dropped.items() if count]
    lines += [("= rows written", tally.written), ("decisive", tally.decisive), ("ties", tally.ties)]
    return "\n".join(f"{name:34} {count:>11,}" for name, count in lines)
