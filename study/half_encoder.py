"""train_ncp_dpo.py with f in the precision of the U-Net, bf16 too, as where everything is under autocast: for claim 7.

The script itself never computes f in bf16 (`precision_of_f`). Arguments are those of train_ncp_dpo.py. An arm of a plan
is trained with it by `program: study/half_encoder.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> None:
    sys.path[:1] = [str(Path(__file__).parents[1])]  # in place of this folder, which has a statistics.py
    import ncp.training.memory
    import ncp.training.models
    import train_ncp_dpo
    from ncp.common.errors import run_program

    for module in (ncp.training.models, ncp.training.memory):
        vars(module).update(precision_of_f=lambda weights, device: weights)
    run_program(train_ncp_dpo.main)


if __name__ == "__main__":
    main()
