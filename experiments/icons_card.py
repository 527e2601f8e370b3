"""The card of the shipped weights: what they were trained on, what they can't do, and their figures.

`python -m mome.benchmarks.table` writes it to `checkpoints/mome-icons/README.md`, with figures of the results file.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from ..cards import CAPTIONS, SUMMARY, Card, Figure, facts_of, text_of
from ..configuration_mome import MomeConfig
from ..modeling_mome import MomeForConditionalGeneration

CHECKPOINT = Path("checkpoints", "mome-icons")
# What `mome.experiments.icons` measures → what the tables call it.
ROWS = {
    "unseen set healthicons": "unseen set `healthicons`",
    "unseen set freehand": "unseen set `streamline-freehand-color`",
    "unseen concepts": "unseen concepts, research weights",
    "seen pictures": "training images, for comparison",
}
# Checkpoints whose figures are shown, in the results file: the shipped weights have seen the held-out concepts.
SHIPPED, RESEARCH = "mome-icons test, mome-icons", "mome-icons test, mome-icons-research"

KNOWS = """\
This one knows icons, emoji, pictograms and cliparts: it finds them by meaning, captions them and classifies them by
any labels. It is not for photographs.

![Pictures of two unseen icon sets with captions, labels and search hits](quickstart.png)

Which patches and words of an unseen set each expert takes first, in the layers 1 and 3. In layer 1 image expert 2
takes mostly empty ground, 3 strokes, and text expert 4 endings of words:

![Patches and words by expert](routing.png)"""

DATA = """\
mome-icons: 250,000 openly licensed icons, emoji, pictograms and cliparts of 178 sets, with their names and tags, and
with synonyms, broader words and definitions from WordNet 3.0. The data card with counts, splits and licences is
`icons/README.md` of the project, the attribution `icons/ATTRIBUTION.md`. The text encoder all-MiniLM-L6-v2
(Apache-2.0) was the teacher for names.

Two whole sets, `healthicons` and `streamline-freehand-color`, were never trained on. One name in twenty (the splits
validation and test) was held out at first and **joined in a second stage: these weights have seen the held-out
concepts.** What they can do is therefore measured on the unseen sets."""

TRAINING = """\
On one NVIDIA H200 in 381 seconds, from scratch, by `mome.training.device` with the recipe `icons-gpu.yaml`, the step
recorded as one CUDA graph and nothing compiled: 5.3 million pairs, 15,650 a second while six patches of ten were
computed and 13,170 with all of them. In bfloat16, with AdamW and the losses contrastive × 1 + caption × 1 + teacher ×
1 (of texts) and × 0.5 (of images):

| part | seconds | trained on |
| --- | --- | --- |
| texts alone | 19 | 291 steps of 4,096 texts |
| first stage | 255 | 1,835 steps: 3,758,080 pairs of the split train |
| second stage | 107 | 738 steps: 1,511,424 pairs of train, validation and test (these two four times as often) |

Of the texts, 15 % were synonyms or broader words and 4 % definitions. The first pictures were black and white with
names alone; colours, other drawings of the icons, scenes and sentences came when the model could tell names apart.
Weights are means over the steps. Black and white pictures were kept with four levels of grey, colour ones as lossy
WebP. The weights after the first stage, "research weights" below, are not shipped; they
were kept with 8 bits a weight, and are measured so."""

FIGURES = """\
By `python -m mome.experiments.icons`, on images of different names. R@k: the share of names (or images) whose image
(or name) is among the first k of all in the row. Zero-shot: the right one of 100 names comes first. Caption F1:
words that the caption and the name share. Many names of the unseen sets are known from other drawings. The row of
unseen concepts belongs to the research weights of the same run, which had not seen these names."""

LIMITATIONS = """\
- **Captions are often wrong**: trust the embeddings more. A cosine of caption and image below 0.3 mostly
  means a wrong one, a high one says little.
- **Not sentences.** Names and short phrases are found ("a part of the body"), descriptions mostly are not
  ("something to write with").
- **Not photographs**, people, brands, text in images or other languages.
- **Emoji and other multicoloured images** do worse than black and white ones, of which training had most.
- **It can't count**, and it is unsure of what is left and right.
- Names of functions that can't be seen ("objective", "kernel") are not found.
- Sets differ: the figures of the next one may be lower than those of these two."""

STORED = "stored in float16; loaded and computed in float32 unless `dtype` says otherwise"


def icons_figures(rows: Iterable[dict], metrics: Sequence[str]) -> list[Figure]:
    """What the shipped weights reach on icons, and the research weights on unseen concepts.

    Args:
        rows: of the results file; the last one of a measurement counts.
        metrics: besides the number of images.
    """
    latest = {(row["data"], row["metric"]): float(row["value"]) for row in rows if row["data"] in (SHIPPED, RESEARCH)}
    figures = []
    for name, label in ROWS.items():
        data = RESEARCH if name == "unseen concepts" else SHIPPED
        figures.append(Figure(label, "images", int(latest[data, f"icons, {name}: images"])))
        figures += [Figure(label, metric, latest[data, f"icons, {name}: {metric}"]) for metric in metrics]
    return figures


def icons_card(figures: Sequence[Figure], folder: Path) -> str:
    """The card as Markdown.

    Args:
        figures: see `icons_figures`.
        folder: of the checkpoint, whose config says how large the model is.
    """
    config = MomeConfig.from_pretrained(folder)
    with torch.device("meta"):
        parameters = MomeForConditionalGeneration(config).num_parameters()
    return text_of(
        Card(
            CHECKPOINT.name,
            CHECKPOINT.as_posix(),
            CAPTIONS,
            summary=f"{SUMMARY} {KNOWS}",
            facts={**facts_of(config, parameters), "weights": STORED},
            sections={"Data": DATA, "Training": TRAINING},
            figures=figures,
            figures_note=FIGURES,
            limitations=LIMITATIONS,
            metadata={"license": "apache-2.0", "language": "en"},
        )
    )
