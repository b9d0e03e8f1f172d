"""Selects clean preference pairs from a dataset in Pick-a-Pic's format, and copies them out.

People's judgements of two images for one caption contradict each other: an image that won one comparison
lost another. Training on both gives opposite gradients. This script reads the judgements, keeps the pairs
that a rule of the paper (below) selects, and writes them as parquet in the same schema:

    python filter_pickapic.py --config configs/filter_pickapic.yaml --dataset_name FOLDER --output_dir FOLDER

A *game* is a labeled row on two different images; an image is a pair (caption, uid). The rules:

    no_ties             every decisive game
    contradiction_free  decisive games neither of whose images is both a winner and a loser
    absolute_winners    games won by an image with `min_wins` wins, no loss and no tie; the latest of each
                        winner or (pairs_per_winner: all) every one
    x_y                 x > y: x an absolute winner with two wins or more, y the loser of x's latest win
    x_y_xz              and x > z, z the loser of y's latest win, if y has one
    x_y_yz              and y > z

The work has two parts.

The *decision* reads nine metadata columns, 200 MB for Pick-a-Pic v2's 959,040 rows, and no image. It is a few NumPy
operations on integer codes of captions and uids, and takes seconds on one machine.

The *copy* streams the images of the kept pairs in output order. In memory it holds one row group of the input, one of
the output, and up to 256 MB of images that were read before they are needed. More of these go to an anonymous temporary
file in the output folder. Several machines can share the output files (`--shard`). Output order is (created_at,
ranking_id), so it does not depend on how the input is split into files. JPEG bytes are copied, never decoded.

A pair x > z may never have been judged. Then its row is synthesised: the columns of the row x > y, with x as image 0,
and as image 1 z, taken from a row that contains it; labels 1 and 0; user_id null; ranking_id ~r (negative), where r is
that of x > y.

Malformed rows are dropped and counted by kind (`decide` in filtering/rules.py), before wins are counted. Two rows
that agree in all nine columns are one judgement: the first is used, in order of file name. The authors of the method
do not use `best_image_uid`; `best_image_uid: ignore` does the same. The counts in `manifest.json` add up to the
input. `report.html` shows them, with samples of kept and removed pairs. docs/filtering.md has measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from filtering.copy import copy_pairs, output_names
from filtering.findings import gather
from filtering.manifest import add_outputs, describe_run, is_finished, mark_unfinished, summary, write_manifest
from filtering.metadata import metadata_of_pairs
from filtering.report import write_report
from filtering.rules import decide
from filtering.settings import FilterConfig
from filtering.source import open_shards, read_metadata
from ncp.common.config import parse
from ncp.common.errors import UserError, run_program
from ncp.common.files import explain_write_errors
from ncp.common.lock import one_writer


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(FilterConfig, argv, description=__doc__)
    shards, commit = open_shards(config)
    judgements = read_metadata(shards, config)
    decision = decide(judgements, config)
    if not len(decision.row):
        reasons = ", ".join(f"{count} {reason}" for reason, count in decision.dropped.items() if count)
        raise UserError(
            f"{config.dataset_name}: rule {config.rule} leaves no pair of {len(decision.why)} rows ({reasons})"
        )
    plan = describe_run(shards, decision, commit, config)
    print(summary(plan), flush=True)

    folder = Path(config.output_dir)
    if is_finished(folder, config.dataset_name, plan):
        print(f"{folder} already holds these pairs; nothing to do")
        return
    findings = gather(judgements, decision)
    del judgements  # frees 250 MB for the copy
    names = output_names(len(decision.row), config)
    with explain_write_errors(f"output_dir: cannot write to {folder}"), one_writer(folder, config.shard):
        if is_finished(folder, config.dataset_name, plan):
            raise UserError(f"output_dir: another run has just finished {folder}")
        mark_unfinished(folder, plan, config.shard)
        hashes = copy_pairs(shards, decision, metadata_of_pairs(shards, decision), names, config)
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            print(f"wrote part {config.shard}; {len(missing)} of {len(names)} files are still to come")
            print(f"with all of them in {folder}, run once without --shard to write manifest.json")
            return
        manifest = add_outputs(plan, names, hashes, config)
        write_report(shards, manifest, findings, config)
        write_manifest(folder, manifest)
    print(f"wrote {len(decision.row):,} pairs to {folder}; what was kept and removed: {folder / 'report.html'}")


if __name__ == "__main__":
    run_program(main)
