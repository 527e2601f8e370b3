"""Makes what the page searches with: the weights as int8 ONNX, and the gallery with its embeddings.

    python space-static/build_page.py

    checkpoint ── mome.export ── vision_model, text_model, int8 ─┐
                            └─── decoder_model_merged ───────────┤   (of a captioner; downloaded when it is asked for)
    space/gallery.parquet ── names, credits, PNG files ──────────┼─ data/, gzipped where that makes a file smaller
                        └─── embeddings, int8 ───────────────────┘   └─ manifest.json: sizes and hashes
                                                                        version.js: for the service worker

What is there and still belongs to its sources stays. Exported weights are kept in `.cache/`, too.
"""

import argparse
import gzip
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from vendor_packages import PACKAGES, STAMP, is_vendored

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
SPACE = ROOT / "space"
CHECKPOINT = ROOT / "checkpoints" / "mome-icons"
DATA = FOLDER / "data"
CACHE = ROOT / ".cache" / "static-demo"
TOWERS = ("vision_model", "text_model")
DECODER = "decoder_model_merged"
# What a service worker keeps of the page itself; the rest is in the manifest.
SHELL = ("*.js", "*.css", "*.svg", "*.webmanifest", "vendor/*.mjs")
# Rules of captions that exports keep to and the page does not, with the value that changes nothing.
KEPT_BY_EXPORTS = {
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "repetition_penalty": 1,
    "suppress_tokens": None,
}
PACKED_SHARE = 0.95  # a file stays gzipped if that makes it this much smaller


def quantized_parts(checkpoint: Path, embedder: Any) -> dict[str, Path]:
    """The parts of the model as int8 ONNX files, exported once for the same weights and code."""
    from mome.export.folder import parts_of, properties_of

    modules = {part: module for part, module in parts_of(embedder).items() if part in (*TOWERS, DECODER)}
    sources = [path.read_bytes() for path in weights_and_code(checkpoint)]
    kept = CACHE / digest_of([*sources, *(part.encode() for part in modules)])[:32]
    if not kept.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            made = Path(folder) / "onnx"
            made.mkdir()
            export_parts(modules, made, properties_of(embedder))
            made.rename(kept)
    return {part: kept / f"{part}_quantized.onnx" for part in modules}


def weights_and_code(checkpoint: Path) -> list[Path]:
    """What exported parts depend on."""
    code = [*ROOT.glob("*_mome.py"), *(ROOT / "export").glob("*.py")]
    return [checkpoint / "model.safetensors", checkpoint / "config.json", *sorted(code)]


def export_parts(modules: dict[str, Any], folder: Path, properties: dict[str, str]):
    """Writes `vision_model_quantized.onnx` and its like, as `mome.export` does."""
    from mome.export.graphs import graph_of, mark, quantised

    for part, module in modules.items():
        path = folder / f"{part}_quantized.onnx"
        quantised(graph_of(module), path)
        mark(path, properties)


def quantized(embeddings: np.ndarray) -> bytes:
    """Embeddings (icons, dimension) → float32 scales (icons,), then int8 (icons, dimension)."""
    scales = np.abs(embeddings).max(axis=1) / 127
    values = np.round(embeddings / scales[:, None]).astype(np.int8)
    return scales.astype("<f4").tobytes() + values.tobytes()


def gallery_table(gallery: Any) -> dict[str, Any]:
    """The gallery as columns, one value for each icon, without its pictures."""
    sets: dict[tuple, int] = {}
    for entry in gallery.entries:
        sets.setdefault((entry.set, entry.author, entry.set_url, entry.license, entry.license_url), len(sets))
    return {
        "names": [entry.name for entry in gallery.entries],
        "other_names": [list(entry.texts[1:]) for entry in gallery.entries],
        "ids": [entry.id for entry in gallery.entries],
        "sizes": [len(entry.png) for entry in gallery.entries],
        "styles": gallery.styles,
        "style_of": gallery.style_of.tolist(),
        "sets": [dict(zip(("title", "author", "url", "license", "license_url"), key)) for key in sets],
        "set_of": [
            sets[entry.set, entry.author, entry.set_url, entry.license, entry.license_url] for entry in gallery.entries
        ],
    }


def image_settings(processor: Any) -> dict[str, Any]:
    """What pixels.js needs to know.

    Raises:
        ValueError: the image processor does something that pixels.js does not.
    """
    settings = processor.image_processor.to_dict()
    size = settings["size"]
    unknown = [
        name
        for name, known in {
            "resample": settings["resample"] == 3,
            "size": set(size) == {"height", "width"},
            "do_center_crop": not settings["do_center_crop"],
            "do_resize": settings["do_resize"],
            "do_rescale": settings["do_rescale"],
            "do_normalize": settings["do_normalize"],
        }.items()
        if not known
    ]
    if unknown:
        name = unknown[0]
        raise ValueError(f"{name}={settings[name]!r} of the image processor is nothing that the page can do")
    return {
        "height": size["height"],
        "width": size["width"],
        "mean": list(settings["image_mean"]),
        "std": list(settings["image_std"]),
        "rescale_factor": settings["rescale_factor"],
        "trim_to_margin": settings.get("trim_to_margin"),
    }


def text_settings(processor: Any, config: Any) -> dict[str, Any]:
    """What texts.js needs to know."""
    tokenizer = processor.tokenizer
    roles = ("bos", "eos", "cls", "sep", "pad", "unk")
    wordless = {getattr(tokenizer, f"{role}_token_id") for role in roles} - {None}
    limit = min(tokenizer.model_max_length, config.max_position_embeddings)
    return {"limit": limit, "wordless": sorted(wordless)}


def writes_captions(checkpoint: Path) -> bool:
    """Whether the weights are a captioner's."""
    architectures = json.loads((checkpoint / "config.json").read_text()).get("architectures")
    return architectures == ["MomeForConditionalGeneration"]


def caption_settings(model: Any) -> dict[str, Any]:
    """What model.js needs to know of captions.

    Raises:
        ValueError: they have rules, which the page does not keep to.
    """
    from mome.embedder import CAPTION_TOKENS
    from mome.onnx_captions import NOT_KEPT

    for name, neutral in (NOT_KEPT | KEPT_BY_EXPORTS).items():
        value = getattr(model.generation_config, name, None)
        if value not in (None, [], neutral):
            raise ValueError(f"{name}={value!r} of generation_config.json is nothing that captions of the page can do")

    ends = model.generation_config.eos_token_id
    return {
        "bos": model.config.bos_token_id,
        "ends": ends if isinstance(ends, list) else [] if ends is None else [ends],
        "most_tokens": min(CAPTION_TOKENS, model.config.max_position_embeddings - 1),
    }


def digest_of(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


class Writer:
    """Writes files into a folder and notes what they are for the manifest."""

    def __init__(self, folder: Path):
        self.folder, self.files = folder, {}

    def add(self, name: str, file_name: str, data: bytes):
        packed = gzip.compress(data, 9, mtime=0)
        if len(packed) < PACKED_SHARE * len(data):
            data, file_name = packed, f"{file_name}.gz"
        (self.folder / file_name).write_bytes(data)
        self.note(name, self.folder / file_name)

    def note(self, name: str, path: Path):
        data = path.read_bytes()
        self.files[name] = {
            "path": path.relative_to(FOLDER).as_posix(),
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }


def sources_of_page(checkpoint: Path) -> str:
    """Digest of everything that data/ is made of, but for the page itself."""
    named = ("processor_config.json", "tokenizer.json", "tokenizer_config.json")
    files = [*weights_and_code(checkpoint), *(checkpoint / name for name in named), SPACE / "gallery.parquet"]
    files += checkpoint.glob("generation_config.json")
    return digest_of(path.read_bytes() for path in [*files, STAMP, Path(__file__)])


def page_files() -> list[Path]:
    """The page itself, without what is made for it."""
    return [FOLDER / "index.html", *sorted(path for pattern in SHELL for path in FOLDER.glob(pattern))]


def build(checkpoint: Path = CHECKPOINT) -> dict[str, Any]:
    """Fills data/, and returns what its manifest says.

    Raises:
        FileNotFoundError: an incomplete checkpoint.
        ValueError: an image processor that the page can't imitate.
    """
    made_of, manifest_file = sources_of_page(checkpoint), DATA / "manifest.json"
    if (DATA / "version.js").is_file():
        manifest = json.loads(manifest_file.read_text())
        if manifest["made_of"] == made_of:
            write_version(manifest)
            return manifest
    if str(SPACE) not in sys.path:
        sys.path.insert(0, str(SPACE))
    # Only now: they bring torch and gradio, which take seconds.
    from mome.embedder import Embedder
    from mome_space.engine import Engine
    from mome_space.gallery import Gallery, Index

    captions = writes_captions(checkpoint)
    embedder = Embedder.load(checkpoint, "cpu", captions=captions)
    model, processor, gallery = embedder.model, embedder.processor, Gallery()
    index = Index(Engine(model, processor), gallery)
    images, texts = image_settings(processor), text_settings(processor, model.config)
    spoken = caption_settings(model) if captions else None
    index.build()
    parts = quantized_parts(checkpoint, embedder)
    shutil.rmtree(DATA, ignore_errors=True)
    DATA.mkdir()
    writer = Writer(DATA)
    writer.note("runtime", FOLDER / "vendor" / "ort-wasm-simd-threaded.wasm.gz")
    for part, path in parts.items():
        writer.add(part, path.name, path.read_bytes())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        writer.add(Path(name).stem, name, (checkpoint / name).read_bytes())
    writer.add("gallery", "gallery.json", json.dumps(gallery_table(gallery), separators=(",", ":")).encode())
    writer.add("embeddings", "embeddings.bin", quantized(index.embeddings.images))
    writer.add("pictures", "pictures.bin", b"".join(entry.png for entry in gallery.entries))
    manifest = {
        "checkpoint": checkpoint.name,
        "icons": len(gallery),
        "images": images,
        "texts": texts,
        "captions": spoken,
        "files": writer.files,
        "packages": [f"{package.name} {package.version}" for package in PACKAGES],
        "made_of": made_of,
    }
    manifest_file.write_text(json.dumps(manifest, indent=1))
    write_version(manifest)
    return manifest


def write_version(manifest: dict[str, Any]):
    """What the service worker keeps, under a version that changes with any file."""
    pages = [path for path in page_files() if path.name not in ("index.html", "service-worker.js")]
    version = {
        "version": digest_of([*(path.read_bytes() for path in page_files()), json.dumps(manifest).encode()])[:16],
        "shell": ["./", *(path.relative_to(FOLDER).as_posix() for path in pages), "data/manifest.json"],
        "files": [f"{file['path']}?v={file['sha256'][:16]}" for file in manifest["files"].values()],
    }
    (DATA / "version.js").write_text(f"self.BUILD = {json.dumps(version, indent=1)};\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="folder (default: %(default)s)")
    checkpoint = parser.parse_args().checkpoint
    if not is_vendored():
        sys.exit("the JavaScript packages are missing: python space-static/vendor_packages.py")
    try:
        manifest = build(checkpoint)
    except ModuleNotFoundError as error:
        sys.exit(f"{error.name} is missing: pip install -e '.[demo,onnx]'")
    except (OSError, ValueError) as error:
        sys.exit(str(error).strip().splitlines()[0])
    except KeyboardInterrupt:
        print("interrupted: run it again before the page is served", file=sys.stderr)
        sys.exit(130)
    sizes = {name: file["bytes"] for name, file in manifest["files"].items()}
    later = sizes.pop(DECODER, None)
    total = sum(sizes.values())
    print(f"{manifest['checkpoint']}, {manifest['icons']:,} icons: {total / 1e6:.1f} MB over the wire")
    for name, size in sizes.items():
        print(f"  {name} {size / 1e6:.2f} MB")
    if later is not None:
        print(f"  for captions, when one is asked for: {later / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
