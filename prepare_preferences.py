"""Converts a preference dataset to Pick-a-Pic's columns, which filter_pickapic.py and the training scripts read.

    python prepare_preferences.py --format hpdv2 --dataset_name HPDv2/train.json --images HPDv2/train --output_dir OUT
    python filter_pickapic.py --dataset_name OUT --output_dir FILTERED
    accelerate launch train_ncp_dpo.py --config configs/sd15_ncp_dpo.yaml --dataset_name FILTERED

The dataset is on a local disk: a .parquet, .json, .jsonl or .csv file, or a folder of parquet files. It contains the
images (bytes, or the bytes and path of the library `datasets`), or their paths relative to the folder `images`. Image
bytes (JPEG, PNG or WEBP) are copied, never decoded. The formats, and the winner in each:

    hpdv2            ymhao/HPDv2, train.json: the image with human_preference 1
    hpdv3            MizzenAI/HPDv3, *.json: path1, with its share of the votes in choice_dist if there are any
    chosen_rejected  prompt, chosen, rejected (open-image-preferences-v1-binarized and others): chosen
    rapidata         Rapidata's pair sets: the larger share of the votes on `question`: preference, alignment, coherence
    imagereward      zai-org/ImageRewardDB, metadata-*.parquet or train_*.json: all pairs of a prompt's images, the
                     better one by `question`: rank (the default), or one of the three ratings
    table            any table with a prompt, two images and a preference, in columns that options name; for example a
                     CSV file that lists pairs of images in a folder

If shares of votes are known, a winner needs more than one half and at least `min_share`. Otherwise the row is a tie,
which the filter and the training scripts leave out. The share of image 0 is kept in the column share_0 (null if
unknown), for the training scripts' soft_labels.

Columns of Pick-a-Pic that a dataset lacks are derived from its content:

    uid              32 digits of the sha256 of the image's bytes; so the same file in two rows is the same image
    ranking_id       the number of the pair in the input
    created_at       1970-01-01 unless a column has the time; so the filter's `latest` is the last pair in the input

Rows are read and written one row group at a time. After an interruption the same command continues after the last
finished file. The counts in manifest.json add up: pairs = dropped (by reason) + decisive + ties.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from ncp.common.config import parse
from ncp.common.errors import UserError, run_program
from ncp.common.files import explain_write_errors, write_file
from ncp.common.lock import one_writer
from preparing.manifest import (
    describe_output,
    describe_run,
    find_progress,
    save_progress,
    summary,
    write_manifest,
)
from preparing.settings import PrepareConfig
from preparing.source import check_files, find_files, read_units
from preparing.write import output_rows, write_parquet


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(PrepareConfig, argv, description=__doc__)
    files = find_files(config)
    check_files(files.values(), config)
    images = images_folder(config)
    plan, folder = describe_run(files, config), Path(config.output_dir)
    refuse_inside(folder, config)
    before, _, finished = find_progress(folder, plan)
    if finished:
        bad = before.dropped["missing_image"] + before.dropped["unreadable_image"]
        without = f" (bad images: {bad:,} pairs are left out; to try them again, delete it first)" if bad else ""
        print(f"{folder} already holds this{without}; nothing to do")
        return
    with explain_write_errors(f"output_dir: cannot write to {folder}"), one_writer(folder):
        tally, outputs, finished = find_progress(folder, plan)
        if finished:
            raise UserError(f"output_dir: another run has just finished {folder}")
        with tqdm(desc="prepare", unit="row", initial=tally.rows) as bar:
            units = read_units(files.values(), tally.rows, config)
            while (first := next(rows := output_rows(units, tally, images, config), None)) is not None:
                name = f"train-{len(outputs):05d}.parquet"
                write_file(folder / name, partial(write_parquet, rows=chain([first], rows)))
                outputs.append(describe_output(folder, name))
                save_progress(folder, plan, tally, outputs)
                bar.update(tally.rows - bar.n)
        print(summary(tally))
        if not outputs:
            raise UserError(f"{config.dataset_name}: not a single pair is left")
        write_manifest(folder, plan, tally, outputs, config)
    print(f"wrote {tally.written:,} rows to {folder}")


def images_folder(config: PrepareConfig) -> Path:
    """The folder that image paths are relative to. Raises UserError if it does not exist."""
    path = Path(config.dataset_name)
    folder = Path(config.images) if config.images is not None else path if path.is_dir() else path.parent
    if not folder.is_dir():
        raise UserError(f"images: no such folder: {folder}")
    return folder


def refuse_inside(folder: Path, config: PrepareConfig) -> None:
    """Raises UserError for an output folder inside the dataset's folder, where the next run would read it."""
    dataset = Path(config.dataset_name)
    if dataset.is_dir() and folder.resolve().is_relative_to(dataset.resolve()):
        raise UserError(f"output_dir: {folder} lies inside the dataset; choose a folder outside {dataset}")


if __name__ == "__main__":
    run_program(main)
