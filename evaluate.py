"""Compares models: images by every model from the same seeds, scores by several judges, win-rates with intervals.

    accelerate launch evaluate.py generate --config configs/eval_tiny.yaml
    accelerate launch evaluate.py score --config configs/eval_tiny.yaml
    python evaluate.py compare --config configs/eval_tiny.yaml

For human judges, `annotate` makes a blinded page, and `count` counts the votes that they send back:

    python evaluate.py annotate --config configs/eval_tiny.yaml
    python evaluate.py count --config configs/eval_tiny.yaml --votes A.json B.json C.json

One config describes the whole protocol. Each step writes files into `output_dir` that the next step reads. It can
continue after an interruption, and refuses to mix protocols. Details are in docs/evaluation.md.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from evaluation.protocol import EvaluationConfig
from ncp.common.config import parse, read_yaml
from ncp.common.errors import UserError, run_program
from ncp.common.lock import one_writer

# Each step imports what it needs when it begins: PyTorch and diffusers take seconds to import, and --help and most
# error messages do not need them.


def generate(config: EvaluationConfig) -> None:
    """Draws the images. Several processes may share the work."""
    from evaluation.generate import generate
    from evaluation.processes import processes

    with one_writer(Path(config.output_dir), processes=processes()):
        generate(config)


def score(config: EvaluationConfig) -> None:
    """Scores every image with every judge. Several processes may share the work."""
    from evaluation.processes import processes
    from evaluation.score import score

    with one_writer(Path(config.output_dir), processes=processes()):
        score(config)


def compare(config: EvaluationConfig) -> None:
    """Compares the scores and writes the report, with the human judges' votes if the config names them."""
    from evaluation.compare import compare
    from evaluation.report import write_report
    from evaluation.votes import count_votes

    with one_writer(Path(config.output_dir)):
        votes = count_votes(config) if config.votes else None
        write_report(config, compare(config), votes)


def annotate(config: EvaluationConfig) -> None:
    """Writes the blinded page for human judges."""
    from evaluation.annotate import annotate

    with one_writer(Path(config.output_dir)):
        annotate(config)


def count(config: EvaluationConfig) -> None:
    """Counts the human judges' votes."""
    from evaluation.report import report_votes
    from evaluation.votes import count_votes

    with one_writer(Path(config.output_dir)):
        report_votes(config, count_votes(config))


STEPS = {"generate": generate, "score": score, "compare": compare, "annotate": annotate, "count": count}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the step named by the first argument, with the config given by the others (default: `sys.argv[1:]`)."""
    step, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if step in ("-h", "--help"):
        print(__doc__ + "\nevaluate.py generate --help lists the keys.")
        return
    if step not in STEPS:
        raise UserError(f"command line: '{step}'; expected one of: {', '.join(STEPS)}")
    refuse_annotate_key(arguments)
    STEPS[step](parse(EvaluationConfig, join_lists(arguments), description=__doc__))


def refuse_annotate_key(arguments: Sequence[str]) -> None:
    """Raises UserError for `annotate` as a key, on the command line or in the config file: it is a step."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", nargs="?")
    parser.add_argument("--annotate", nargs="?", const="true")
    given, _ = parser.parse_known_args(arguments)
    instead = "is no key; remove it, and for the judges' page run: evaluate.py annotate --config ..."
    if given.annotate is not None:
        raise UserError(f"command line: --annotate {instead}")
    if given.config and "annotate" in read_yaml(given.config):
        raise UserError(f"{given.config}: 'annotate' {instead}")


def join_lists(arguments: Sequence[str]) -> list[str]:
    """Rewrites `--votes a.json b.json`, which a shell makes of `--votes *.json`, in the form of every other list."""
    arguments = list(arguments)
    if "--votes" not in arguments:
        return arguments
    start = arguments.index("--votes") + 1
    stop = next((i for i in range(start, len(arguments)) if arguments[i].startswith("--")), len(arguments))
    votes = arguments[start:stop]
    joined = [json.dumps(votes, ensure_ascii=False)] if len(votes) > 1 else votes
    return [*arguments[:start], *joined, *arguments[stop:]]


if __name__ == "__main__":
    run_program(main)
