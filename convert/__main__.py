"""python -m mome.convert (beit3|vlmo|siglip|coca|mome) --checkpoint FILE --output DIR [...]"""

import argparse
import signal
import sys
from pathlib import Path

from transformers.utils import logging

from ..errors import ConversionError, first_line
from .card import summarise
from .clip_tokenizer import HINT
from .coca import CONFIG_FILE
from .driver import SOURCES, convert
from .open_clip import convert_coca
from .operations import Options
from .upcycling import upcycle_checkpoint


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mome.convert",
        description="Makes checkpoints of those of BEiT-3, VLMo, SigLIP and CoCa, and routed MoME ones.",
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="{beit3,vlmo,siglip,coca,mome}")
    _add_siglip(kinds.add_parser("siglip", help="a SigLIP or SigLIP 2 checkpoint of fixed resolution"))
    for kind, source in SOURCES.items():
        if source.load is not None:
            continue
        sub = kinds.add_parser(kind, help=f"a {source.name} checkpoint as published")
        sub.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="weights (.pth, .safetensors)")
        sub.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to make")
        sub.add_argument(
            "--tokenizer", type=Path, metavar="FILE", help=f"{source.tokenizer_hint} (default: beside the checkpoint)"
        )
        sub.add_argument("--no-tokenizer", action="store_true", help="make a checkpoint without a tokenizer")
        sub.add_argument("--num-attention-heads", type=int, metavar="N", help="default: width / 64")
        sub.add_argument("--image-size", type=int, metavar="N", help="resize the position tables to N pixels")
        if kind == "vlmo":
            sub.add_argument(
                "--checkpoint-image-size",
                type=int,
                metavar="N",
                help="pixels of the checkpoint, where they are in doubt",
            )
        sub.add_argument(
            "--caption",
            action="store_true",
            help="give a file without a caption head one of its own, a copy of the word embeddings, to be fine-tuned "
            "(default: one tied to them)",
        )
        _add_routing(sub, required=False)
    _add_coca(kinds.add_parser("coca", help="an open_clip CoCa as published"))
    sub = kinds.add_parser("mome", help="a dense MoME checkpoint, made routed")
    sub.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="folder of the checkpoint")
    sub.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    _add_routing(sub, required=True)
    return parser


def _add_siglip(parser: argparse.ArgumentParser):
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR|ID", help="folder, or id of a repository on the Hub"
    )
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of the repository")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="default: that of the checkpoint")
    parser.add_argument("--no-tokenizer", action="store_true", help="make a checkpoint without a tokenizer")
    parser.add_argument("--image-size", type=int, metavar="N", help="resize the position table to N pixels")
    parser.add_argument("--strip-punctuation", action="store_true", help="SigLIP 2: leave punctuation out of texts")
    parser.add_argument(
        "--caption",
        action="store_true",
        help="add what captions are learnt with: experts of their own, copies of those of texts, and a caption head",
    )
    _add_routing(parser, required=False)


def _add_coca(parser: argparse.ArgumentParser):
    parser.add_argument(
        "--checkpoint", required=True, metavar="FILE|OWNER/NAME", help="weights, their folder, or a repository's id"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help=f"{CONFIG_FILE} (default: beside the checkpoint, or none)"
    )
    parser.add_argument("--tokenizer", metavar="FILE|OWNER/NAME", help=f"{HINT} (default: beside the checkpoint)")
    parser.add_argument("--no-tokenizer", action="store_true", help="make a checkpoint without a tokenizer")
    parser.add_argument("--revision", metavar="NAME", help="of a repository: branch, tag or commit")


def _add_routing(parser: argparse.ArgumentParser, required: bool):
    parser.add_argument(
        "--experts-per-group", type=int, required=required, metavar="N", help="copies of every expert, under a router"
    )
    parser.add_argument(
        "--experts-per-token", type=int, default=2, metavar="K", help="copies that a token uses (default: 2)"
    )


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    logging.set_verbosity_error()  # what transformers tells about itself is no news of this conversion
    logging.disable_progress_bar()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exit like any other: what was written is removed
    try:
        done = _run(arguments)
    except (ConversionError, OSError) as error:  # OSError: no space, no permission
        print(f"mome.convert: {first_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mome.convert: interrupted, nothing was written", file=sys.stderr)
        return 130
    for note in done.notes:
        print(f"note: {note}")
    if done.dropped:
        print(f"not taken over: {', '.join(summarise(done.dropped))}")
    print(f"wrote {done.output}")
    return 0


def _run(arguments: argparse.Namespace):
    if arguments.kind == "coca":
        return convert_coca(
            arguments.checkpoint,
            arguments.output,
            config=arguments.config,
            tokenizer=arguments.tokenizer,
            with_tokenizer=not arguments.no_tokenizer,
            revision=arguments.revision,
        )
    routing = {"experts_per_group": arguments.experts_per_group, "experts_per_token": arguments.experts_per_token}
    if arguments.kind == "mome":
        return upcycle_checkpoint(arguments.checkpoint, arguments.output, **routing)
    return convert(
        arguments.kind,
        arguments.checkpoint,
        arguments.output,
        tokenizer=arguments.tokenizer,
        with_tokenizer=not arguments.no_tokenizer,
        options=Options(
            num_attention_heads=getattr(arguments, "num_attention_heads", None),
            image_size=arguments.image_size,
            checkpoint_image_size=getattr(arguments, "checkpoint_image_size", None),
            caption=arguments.caption,
            strip_punctuation=getattr(arguments, "strip_punctuation", False),
        ),
        revision=getattr(arguments, "revision", None),
        **routing,
    )


if __name__ == "__main__":
    sys.exit(main())
