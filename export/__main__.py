"""python -m mome.export CHECKPOINT [--output DIR] [--dtype fp32 q8 fp16]"""

import argparse
import signal
import sys
from pathlib import Path

from transformers.utils import logging

from ..errors import MomeError, first_line, missing_package


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mome.export",
        description="Writes a checkpoint as ONNX files: both towers, and a step of captioning.",
    )
    parser.add_argument("checkpoint", help="folder or Hub id")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder to make (default: ./NAME-onnx)")
    parser.add_argument("--dtype", nargs="+", metavar="TYPE", help="fp32, q8, fp16 (default: fp32 q8)")
    options = parser.parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exit like any other: what was written is removed
    try:
        run(options.checkpoint, options.output, options.dtype)
    except ModuleNotFoundError as error:
        print(f"mome.export: {missing_package(error, 'onnx')}", file=sys.stderr)
        return 1
    except (MomeError, OSError) as error:  # OSError: no space, no permission
        print(f"mome.export: {first_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mome.export: interrupted, nothing was written", file=sys.stderr)
        return 130
    return 0


def run(checkpoint: str, output: Path | None = None, dtypes: list[str] | None = None):
    """Exports and prints what was written."""
    from .folder import DTYPES, export_checkpoint

    output = output or Path(f"{Path(checkpoint).resolve().name}-onnx")
    done = export_checkpoint(checkpoint, output, dtypes or DTYPES, progress=lambda step: print(step, file=sys.stderr))
    for name, size in done.sizes.items():
        print(f"{size / 1e6:8.1f} MB  {name}")
    for dtype, found in done.agreement.items():
        line = f"{dtype}: cosine with the checkpoint {found.images[0]:.6f} for images, {found.texts[0]:.6f} for texts"
        print(line if found.captions is None else f"{line}; {found.captions:.0%} of the captions are the same")
    print(f"wrote {done.output}")


if __name__ == "__main__":
    sys.exit(main())
