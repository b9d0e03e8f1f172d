"""Which parquet files make up a split of a dataset: the same rule for the filter and the training scripts."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ncp.common.errors import UserError

# Words that name a split, as in the datasets library.
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
NUMBER = re.compile(r"\d*|of")  # 00000_of_00002


def splits_of(name: str, split: str) -> set[str]:
    """The splits that a file's path (with /) names, including `split` if the path contains it as a word.

    Words consist of letters and digits. Case, and a number at the end, are ignored. `data/pickapic-train-0.parquet`
    names train; `0000.validation_unique.parquet` names a different split, validation_unique.
    """
    rest, asked = re.subn(rf"(?<!\w){re.escape(split)}(?!\w)", " ", name.lower().removesuffix(".parquet"))
    found = [split] if asked else []
    for token in re.findall(r"\w+", rest):
        inside = False
        for part in token.split("_"):
            word = re.sub(r"(?<=[a-z])(set)?\d*$", "", part)
            if word in SPLITS:
                found.append(SPLITS[word])
                inside = True
            elif inside and not NUMBER.fullmatch(part):
                found[-1] += f"_{part}"
    return set(found)


def files_of_split(names: Iterable[str], split: str, dataset_name: str) -> list[str]:
    """The names (relative, with /) of the split's files, sorted. If no name contains a split, all are train.

    A file without a split in its name is left out, unless its folder has files that name a split: then it is unclear.
    A file that names this and another split is unclear too. Raises UserError, with the files found, if anything is
    unclear or no file is left.
    """
    wanted = SPLITS.get(split.lower(), split.lower())
    visible = sorted(n for n in names if not any(part.startswith(".") for part in n.split("/")))
    if not visible:
        raise UserError(f"dataset_name: no parquet files in {dataset_name}")
    found = {name: splits_of(name, wanted) for name in visible}
    if wanted == "train" and not any(found.values()):
        return visible
    folder = {name: name.rpartition("/")[0] for name in visible}
    with_names = {folder[name] for name in visible if found[name]}
    unclear = any((wanted in s and len(s) > 1) or (not s and folder[n] in with_names) for n, s in found.items())
    chosen = [name for name in visible if found[name] == {wanted}]
    if chosen and not unclear:
        return chosen
    kinds: dict[str, list[str]] = {}
    for name in visible:
        kinds.setdefault(" and ".join(sorted(found[name])) or "no split in the name", []).append(name)
    shown = "; ".join(
        f"{kind}: {', '.join(files[:3])}" + f" and {len(files) - 3} more" * (len(files) > 3)
        for kind, files in sorted(kinds.items())
    )
    raise UserError(
        f"dataset_name: {'unclear which are the' if unclear else 'no'} parquet files for split '{split}' in "
        f"{dataset_name} ({shown}); rename them, give a file or a folder of one split, or set dataset_split"
    )


def local_files(dataset_name: str, split: str) -> dict[str, Path] | None:
    """Name to path of the split's parquet files in a folder, or of the one file. None if it looks like a hub id.

    Raises UserError for a path that does not exist, or a folder without such files.
    """
    path = Path(dataset_name)
    if path.is_file():
        return {path.name: path}
    if path.is_dir():
        found = {p.relative_to(path).as_posix(): p for p in path.rglob("*.parquet")}
        return {name: found[name] for name in files_of_split(found, split, dataset_name)}
    # output/filtered, where there is a folder output, is a dataset that was not made yet, and no hub id.
    in_a_folder = path.parent != Path(".") and path.parent.is_dir()
    if path.suffix == ".parquet" or in_a_folder or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", dataset_name):
        raise UserError(f"dataset_name: no such file or folder: {dataset_name}")
    return None
