"""`python -m tiny_world.pretrain`: run the pretraining.

The stages are tokenizer, autoencoder, base, toys, decoder, refiner and export. Heavy imports stay inside functions, because
worker processes import this module again.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from pathlib import Path

STAGES = ("tokenizer", "autoencoder", "base", "toys", "decoder", "refiner", "export")
MINUTES = {"autoencoder": 6.5, "base": 7.0, "toys": 5.0, "decoder": 3.0, "refiner": 1.0}
SMOKE_MINUTES = 0.03


def main(arguments: list[str] | None = None) -> None:
    """Run one stage or all. Every stage writes its results into WORKDIR/fetch."""
    args = _arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    import torch

    from tiny_world.sheets import save_curve
    from tiny_world.training import Run

    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    smoke = args.size == "smoke"
    for stage in STAGES if args.stage == "all" else (args.stage,):
        if stage == "refiner" and args.stage == "all" and args.no_refiner:
            continue
        given = args.minutes if args.stage != "all" else None
        minutes = given or (SMOKE_MINUTES if smoke else MINUTES.get(stage, 0.0))
        run = Run(
            workdir=args.workdir,
            device=args.device,
            smoke=smoke,
            minutes=minutes,
            this_call=args.this_call or minutes,
            eager=args.eager,
            workers=0 if smoke else min(os.cpu_count() or 1, 16),
        )
        run_stage(stage, run, output=args.output, force=args.force or smoke)
        log = run.fetch / "log.jsonl"
        if log.exists():
            save_curve(log, run.fetch / "loss.png")


def run_stage(stage: str, run, *, output: Path, force: bool) -> None:
    """Run one stage of `STAGES`."""
    if stage == "tokenizer":
        from tiny_world.tokens import build_tokenizers

        for i, tokenizer in enumerate(build_tokenizers()):
            tokenizer.save_pretrained(run.fetch / ("tokenizer", "tokenizer_2")[i])
    elif stage == "autoencoder":
        from tiny_world.autoencoder import train_autoencoder

        train_autoencoder(run, force=force)
    elif stage in ("base", "toys"):
        from tiny_world.base import train_base

        _check_gate(run, force)
        train_base(run, stage=stage)
    elif stage == "decoder":
        from tiny_world.autoencoder import train_decoder

        train_decoder(run, force=force)
    elif stage == "refiner":
        from tiny_world.base import train_refiner

        train_refiner(run)
    else:
        from tiny_world.export import export

        export(run, output)


def _check_gate(run, force: bool) -> None:
    from tiny_world.autoencoder import GATE_DB, GateError

    file = run.fetch / "autoencoder.json"
    numbers = json.loads(file.read_text()) if file.exists() else {}
    if not force and min(numbers.get("subjects_db", 0.0), numbers.get("scenes_db", 0.0)) < GATE_DB:
        raise GateError(f"{file} shows no autoencoder of {GATE_DB} dB ({numbers}); override with --force")


def _arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tiny_world.pretrain", description=__doc__)
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    parser.add_argument(
        "--minutes", type=float, help="total time of the stage; the learning rate anneals over it"
    )
    parser.add_argument(
        "--this-call", type=float, help="stop after this many minutes and save; another call continues"
    )
    parser.add_argument("--workdir", type=Path, default=Path("runs/tiny"))
    parser.add_argument(
        "--output", type=Path, default=Path("base_models"), help="folder for the exported models"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", default="full", choices=("smoke", "full"))
    parser.add_argument("--eager", action="store_true", help="do not capture a CUDA graph")
    parser.add_argument("--no-refiner", action="store_true", help="with --stage all: skip the refiner")
    parser.add_argument(
        "--force", action="store_true", help="continue even if the autoencoder misses its gate"
    )
    return parser.parse_args(given)


if __name__ == "__main__":
    main()
