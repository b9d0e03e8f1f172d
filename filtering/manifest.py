"""manifest.json: what was read, kept and written. Also checks whether an output folder already holds this.

While a folder is unfinished, a file of another name (`UNFINISHED`) holds the manifest without its outputs. With it the
same command can continue, and another command is refused.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from filtering.rules import Decision
from filtering.settings import FilterConfig
from filtering.source import Shard, by_row_group
from ncp import __version__
from ncp.common.errors import UserError
from ncp.common.files import put_in_place, remove, sha256, write_text
from ncp.common.lock import is_empty

NAME, UNFINISHED = "manifest.json", ".unfinished.json"


def describe_run(shards: list[Shard], decision: Decision, commit: str | None, config: FilterConfig) -> dict[str, Any]:
    """What the output depends on, and the counts: the manifest without the hashes of the output files."""
    options = {k: v for k, v in asdict(config).items() if k not in ("dataset_name", "output_dir", "revision", "shard")}
    used = [(shard, number) for shard, number, _, _ in by_row_group(shards, decision.image_sources()[0])]
    inputs = []
    for shard in shards:
        schema = hashlib.sha256(str(shard.schema).encode()).hexdigest()[:16]
        entry = {"file": shard.name, "size": shard.size, "rows": shard.metadata.num_rows, "schema": schema}
        if config.metadata_only:
            entry["row_groups_with_pairs"] = [number for s, number in used if s is shard]
        inputs.append(entry)
    made_up = int(decision.made_up.sum())
    return {
        "tool": "filter_pickapic",
        "version": __version__,
        "commit": commit,
        "options": options,
        "inputs": inputs,
        "rows": {
            "input": len(decision.why),
            "dropped": decision.dropped,
            "kept": len(decision.row) - made_up,
            "contradictory_best_image_uid": decision.contradicting,
        },
        "pairs": {
            "total": len(decision.row),
            "made_up": made_up,
            "unique_prompts": decision.prompts,
            "images": decision.images,
            "sha256": decision.digest,
        },
    }


def summary(plan: dict[str, Any]) -> str:
    """The counts of `describe_run`, a line each, for the screen."""
    rows, pairs = plan["rows"], plan["pairs"]
    lines = [("input rows", rows["input"])]
    lines += [("- " + reason.replace("_", " "), count) for reason, count in rows["dropped"].items() if count]
    lines += [("= rows kept", rows["kept"])] + [("+ made up", pairs["made_up"])] * bool(pairs["made_up"])
    lines += [("= pairs", pairs["total"]), ("prompts", pairs["unique_prompts"]), ("images", pairs["images"])]
    if plan["options"]["best_image_uid"] == "ignore":
        lines.append(("! used despite best image uid", rows["contradictory_best_image_uid"]))
    return "\n".join(f"{name:34} {count:>11,}" for name, count in lines)


def is_finished(folder: Path, dataset_name: str, plan: dict[str, Any]) -> bool:
    """Whether `folder` holds the finished output of this run. False if it is new or holds part of that output.

    Raises UserError if it holds anything else.
    """
    if Path(dataset_name).is_dir() and folder.resolve().is_relative_to(Path(dataset_name).resolve()):
        raise UserError(f"output_dir: {folder} lies inside the dataset; choose a folder outside {dataset_name}")
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise UserError(f"output_dir: {folder} is a file")
    for name in (NAME, UNFINISHED):
        if not (folder / name).exists():
            continue
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8"))
            differs = sorted(k for k in plan if k != "version" and found.get(k) != plan[k])
        except (ValueError, AttributeError, OSError):
            raise UserError(f"output_dir: {folder / name} is not this script's; choose another folder") from None
        if differs:
            raise UserError(
                f"output_dir: {folder} holds another run's output (other {', '.join(differs)}); choose another folder"
            )
        for output in found.get("outputs", []):
            file = folder / output["file"]
            if not file.is_file() or file.stat().st_size != output["size"]:
                raise UserError(f"output_dir: {file} has changed since it was written; delete {folder} and run again")
        return name == NAME
    if not is_empty(folder):
        raise UserError(f"output_dir: {folder} holds something else; choose a new or empty folder")
    return False


def mark_unfinished(folder: Path, plan: dict[str, Any], part: str) -> None:
    """Marks the folder as this run's. plan: from `describe_run`. part: "i/n", which this process holds.

    Machines that start together all write the mark, so each uses its own temporary file.
    """
    if (folder / UNFINISHED).exists():
        return
    temporary = folder / f".{UNFINISHED}.{part.replace('/', '-of-')}.tmp"
    try:
        temporary.write_text(json.dumps(plan), encoding="utf-8")
        put_in_place(temporary, folder / UNFINISHED)
    finally:
        remove(temporary)


def add_outputs(plan: dict[str, Any], names: list[str], hashes: dict[str, str], config: FilterConfig) -> dict[str, Any]:
    """The complete manifest. hashes: known sha256 by file name; other files are read."""
    folder, outputs = Path(config.output_dir), []
    for name in tqdm(names, desc="hash", unit="file", disable=len(hashes) == len(names)):
        digest = hashes.get(name) or sha256(folder / name)  # the file was written by an earlier run or another machine
        outputs.append({"file": name, "size": (folder / name).stat().st_size, "sha256": digest})
    return {"dataset_name": config.dataset_name, "revision": config.revision} | plan | {"outputs": outputs}


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes the last file of a run, and removes the mark that the folder is unfinished."""
    write_text(folder / NAME, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    remove(folder / UNFINISHED)
    for left in folder.glob(f".{UNFINISHED}.*.tmp"):  # from a process that was killed while it wrote the mark
        remove(left)
