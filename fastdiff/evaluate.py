"""Measure how close images are to real ones: FID, sFID, Inception score, precision and recall, KID.

    python fastdiff/evaluate.py --samples FOLDER --reference DIR --metrics fid,kid
    python fastdiff/evaluate.py --reference DIR --reference_out statistics.npz --metrics fid,precision,recall
    torchrun --nproc_per_node 8 fastdiff/evaluate.py --model_path runs/NAME --num_samples 50000 --batch_size auto \\
        --precision bf16 --reference statistics.npz --metrics fid,precision,recall
    python fastdiff/evaluate.py --model_path runs/NAME --num_samples 5000 --reference statistics.npz \\
        --solvers ddim,dpmpp_2m --steps 10,20,50

Prints the scores in a line, and writes them with all that they depend on into a JSON file and a row of evaluations.csv.
Several solvers, steps or guidances give a table and a plot.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file, perhaps of a checkout that isn't installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastdiff.errors import leave_quietly_on_ctrl_c

if __name__ == "__main__":
    leave_quietly_on_ctrl_c()  # before the slow imports

from fastdiff.config.load import load
from fastdiff.config.sections import EvaluateConfig
from fastdiff.runtime.script import run_script


def main(argv: list[str] | None = None) -> None:
    config, _, checkpoint = load(
        argv,
        description=__doc__ or "",
        sections=("evaluate", "sample", "model", "diffusion", "classifier"),
        kind=EvaluateConfig,
        checkpoint=("sample", "model_path"),
    )
    from fastdiff.evaluation.run import evaluate

    assert isinstance(config, EvaluateConfig)
    evaluate(config, checkpoint)


if __name__ == "__main__":
    run_script(main, "evaluate.py")
