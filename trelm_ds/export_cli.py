"""``launch/export.py``: a checkpoint as a Hugging Face folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

from trelm_ds.arguments import LineParser
from trelm_ds.checkpoint import LATEST, STATE, load_model_state
from trelm_ds.errors import EXIT_DONE, CheckpointError, TrelmError, report
from trelm_ds.export import export_model, last_evaluation


def resolve_checkpoint(path: Path) -> Path:
    """A checkpoint folder, or the newest one of a run's OUTPUT_DIR."""
    for folder in (path, path / "checkpoints"):
        if (folder / LATEST).is_file():
            return folder / (folder / LATEST).read_text().strip()
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    return path


def main(argv: list[str] | None = None) -> int:
    """Entry point; the exit code."""
    parser = LineParser(
        prog="launch/export.py", description="Write a checkpoint's model as a Hugging Face folder."
    )
    parser.add_argument("checkpoint", type=Path, help=".../checkpoints/step_N, or a run's folder")
    parser.add_argument("output_dir", type=Path, help="Hugging Face folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed's conversion needs no accelerator
    try:
        args = parser.parse_args(argv)
        checkpoint = resolve_checkpoint(args.checkpoint)
        state = load_model_state(checkpoint)
        step = json.loads((checkpoint / STATE).read_text())["step"]
        metrics = last_evaluation(checkpoint.parent.parent / "metrics.jsonl", step)
        export_model(state, checkpoint, args.output_dir, metrics=metrics, overwrite=args.overwrite)
    except (TrelmError, OSError) as error:
        return report(error)
    print(args.output_dir)
    return EXIT_DONE
