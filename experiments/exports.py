"""How exported files agree with their checkpoint on the gallery of the Space, two icon sets that no training saw.

python -m mome.experiments.exports --checkpoint DIR --export DIR [--results FILE]

Of each type in the folder: the mean and the lowest cosine of embeddings with the checkpoint's, of pictures and of
their names, and the share of greedy captions that are the same token for token. How well an export finds icons is
measured by `mome.experiments.icons --backend onnx-q8`.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

from ..embedder import Embedder
from ..errors import MomeError
from ..evaluation.results import append_figures
from ..export.check import cosines, same_rows
from ..onnx_embedder import DECODER, SUFFIXES, VISION, OnnxEmbedder, onnx_file
from .arguments import add_results_argument
from .query_forms import read_gallery

BATCH = 32


def caption_ids(embedder: Embedder, pictures: list[Image.Image]) -> list[torch.Tensor]:
    """Greedy captions of each batch, as long as the model writes them: (images, tokens) int64."""
    longest = embedder.config.max_position_embeddings
    batches = embedder.pixel_batches(pictures, BATCH)
    if isinstance(embedder, OnnxEmbedder):
        return [embedder.caption_ids(pixel_values, longest) for pixel_values in batches]
    options = {"max_new_tokens": longest - 1, "do_sample": False, "num_beams": 1}
    with embedder.evaluating():
        return [embedder.model.generate(pixel_values=pixel_values, **options) for pixel_values in batches]


def compare(embedder: Embedder, folder: Path, number: int, captions: int) -> dict[str, float]:
    """`TYPE, figure` → value, of all types that a folder holds.

    Args:
        embedder: the checkpoint's, a captioner.
        folder: as `mome.export` writes it.
        number, captions: how many pictures of the gallery are embedded, and how many of these are captioned.
    """
    names, pictures = (column[:: max(1, len(column) // number)][:number] for column in read_gallery())
    kinds = [kind for kind in SUFFIXES if (folder / onnx_file(VISION, kind)).is_file()]
    if not kinds:
        raise MomeError(f"{folder} holds no export: mome export writes one")
    images, texts = embedder.embed_images(pictures, BATCH), embedder.embed_texts(names, BATCH)
    written, figures = caption_ids(embedder, pictures[:captions]), {}
    for kind in kinds:
        exported = OnnxEmbedder(folder, kind, captions=(folder / onnx_file(DECODER, kind)).is_file())
        if exported.fingerprint != embedder.fingerprint:
            raise MomeError(f"{folder} was made of other weights than {embedder.name}: export the checkpoint again")
        embeds = exported.embed_images(pictures, BATCH), exported.embed_texts(names, BATCH)
        for what, own, others in zip(("images", "texts"), embeds, (images, texts)):
            figures |= zip((f"{kind}, cosine of {what}", f"{kind}, lowest cosine of {what}"), cosines(own, others))
        if DECODER in exported.sessions:
            pairs = zip(caption_ids(exported, pictures[:captions]), written)
            same = [same_rows(*pair, exported.config.pad_token_id) * len(pair[0]) for pair in pairs]
            figures[f"{kind}, same captions"] = sum(same) / captions
    return figures


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR")
    parser.add_argument("--export", type=Path, required=True, metavar="DIR", help="folder that mome.export wrote")
    parser.add_argument("--number", type=int, default=800, help="pictures that are embedded (default: %(default)s)")
    parser.add_argument("--captions", type=int, default=200, help="pictures that are captioned (default: %(default)s)")
    add_results_argument(parser)
    options = parser.parse_args(arguments)
    try:
        embedder = Embedder.load(options.checkpoint, "cpu", captions=True)
        figures = compare(embedder, options.export, options.number, options.captions)
    except MomeError as error:
        raise SystemExit(f"error: {error}") from None
    for name, value in figures.items():
        print(f"{name:32} {value:.5f}")
    if options.results:
        data = f"{options.checkpoint.name}, {options.number} pictures of the gallery, {options.captions} captions"
        append_figures(options.results, "mome.experiments.exports", data, figures, "export, ", arguments)
    return figures


if __name__ == "__main__":
    main()
