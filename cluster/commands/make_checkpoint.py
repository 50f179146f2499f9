"""`expertmesh make-checkpoint`: a complete random checkpoint to try the system with."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from cluster.commands.sizes import show_size

_PRESETS = {
    "tiny": "under 2 MB, for tests", "demo": "loads in seconds", "bench": "748M parameters, 1.5 GB",
    "m2-layers": "the shapes of MiniMax-M2, 2.5 GB and 7.3 GB for each of --layers",
}  # fmt: skip


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "make-checkpoint",
        help="write a random checkpoint of the family",
        description="Writes a complete checkpoint with random weights, tokenizer and chat template.",
        epilog="Example:  expertmesh make-checkpoint --preset demo --out checkpoints/demo",
    )
    presets = "; ".join(f"{name}: {what}" for name, what in _PRESETS.items())
    parser.add_argument("--preset", choices=_PRESETS, default="demo", help=f"{presets} (default: demo)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to create")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: 0)")
    parser.add_argument("--layers", type=int, metavar="N", help="instead of the preset's (m2-layers: 1)")
    parser.add_argument("--hybrid", action="store_true", help="every other layer attends to a sliding window")
    parser.add_argument(
        "--qk-norm", choices=("per_layer", "per_head", "none"), default="per_layer",
        help="of queries and keys (default: per_layer, as released)",
    )  # fmt: skip
    parser.add_argument("--sinks", action="store_true", help="a learned attention sink for each query head")
    parser.add_argument("--fp8", action="store_true", help="in FP8 blocks, as the released checkpoints")
    parser.add_argument("--force", action="store_true", help="replace a checkpoint that is there")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    # Here, so that every other command starts without torch.
    from model.errors import ModelError
    from model.synthetic import Variant, make_checkpoint

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
    console = Console(stderr=True)
    try:
        with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
            task = bars.add_task(f"{arguments.preset} checkpoint", total=None)
            make_checkpoint(
                arguments.preset, arguments.out, arguments.seed,
                lambda done, total: bars.update(task, completed=done, total=total), force=arguments.force,
                variant=Variant(
                    arguments.layers, arguments.hybrid, arguments.qk_norm, arguments.sinks, arguments.fp8
                ),
            )  # fmt: skip
    except (ModelError, OSError) as error:
        print(f"expertmesh make-checkpoint: {error}", file=sys.stderr)
        return 1
    size = sum(file.stat().st_size for file in arguments.out.rglob("*") if file.is_file())
    kind = f"{arguments.preset} checkpoint{' in FP8' if arguments.fp8 else ''}"
    print(f"{arguments.out}: {kind}, {show_size(size)}, seed {arguments.seed}")
    return 0
