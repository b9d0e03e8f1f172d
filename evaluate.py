"""Did it get better? Images by every model from the same seeds, scores by several judges, win-rates with intervals.

    accelerate launch evaluate.py generate --config configs/eval_tiny.yaml
    accelerate launch evaluate.py score --config configs/eval_tiny.yaml
    python evaluate.py compare --config configs/eval_tiny.yaml

One config describes the whole protocol. Each step leaves files in `output_dir` that the next one reads, continues
after an interruption, and refuses to mix protocols. `compare --annotate` writes a blinded page for human judges,
`compare --votes A.json B.json C.json` counts their votes. docs/evaluation.md says more.
"""

import json
import sys
from pathlib import Path

from evaluation.protocol import Config, processes
from ncp.common.config import parse
from ncp.common.errors import UserError, run_program
from ncp.common.lock import one_writer

STEPS = ("generate", "score", "compare")


def main() -> None:
    step, argv = (sys.argv[1:2] or ["--help"])[0], sys.argv[2:]
    if step in ("-h", "--help"):
        print(__doc__ + f"\nevaluate.py {STEPS[0]} --help lists the keys.")
        return
    if step not in STEPS:
        raise UserError(f"command line: '{step}'; expected one of: {', '.join(STEPS)}")
    config = parse(Config, join_lists(argv), description=__doc__)
    # Imported late: only what a step needs is loaded.
    if step == "compare":
        from evaluation.compare import compare

        with one_writer(Path(config.output_dir)):
            compare(config)
        return
    from evaluation.generate import generate
    from evaluation.score import score

    with one_writer(Path(config.output_dir), processes=processes()):
        (generate if step == "generate" else score)(config)


def join_lists(argv: list[str]) -> list[str]:
    """`--votes a.json b.json`, as a shell writes `--votes *.json`, in the form of every other list."""
    if "--votes" not in argv:
        return argv
    start = argv.index("--votes") + 1
    stop = next((i for i in range(start, len(argv)) if argv[i].startswith("--")), len(argv))
    several = [json.dumps(argv[start:stop], ensure_ascii=False)] if stop > start + 1 else argv[start:stop]
    return [*argv[:start], *several, *argv[stop:]]


if __name__ == "__main__":
    run_program(main)
