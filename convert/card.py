"""What the model card of a converted checkpoint tells."""

import re
from pathlib import Path

from ..cards import CAPTIONS, EMBEDDINGS, IMAGES, Card, facts_of, text_of
from .operations import Conversion, Sizes, Source

ENDING = """## Licence and citation

The weights are those of {name}, {origin};
the code beside them is MoME's, Apache-2.0.

```bibtex
{citation}
```"""


def model_card(
    source: Source, sizes: Sizes, done: Conversion, path: Path, parameters: int, with_tokenizer: bool
) -> str:
    """Markdown with the front matter that the Hub reads.

    Args:
        source, sizes: what was converted.
        done: what it became.
        path: the file of the weights.
        parameters: their number.
        with_tokenizer: whether the folder can embed texts.
    """
    config = done.config
    captions = source.name == "BEiT-3" and not any("caption head" in head for head in sizes.absent)
    summary = f"Weights of {source.name} ([{source.paper}](https://arxiv.org/abs/{source.paper})), converted from "
    summary += f"`{path.name}` ({sizes.kind})."
    if config.experts_per_group > 1:
        summary += (
            f" Every expert became {config.experts_per_group} copies, of which a token uses "
            f"{config.experts_per_token} ([2212.05055](https://arxiv.org/abs/2212.05055)): outputs equal those of the "
            "dense model until training makes the copies differ."
        )
    facts = facts_of(config, parameters)
    facts["images"] += _preprocessing(sizes)
    facts["text"] = f"up to {sizes.text_length or config.max_position_embeddings} tokens"
    facts["patches"] = f"{config.patch_size} × {config.patch_size} pixels"
    lines = [f"- {note[:1].upper()}{note[1:]}." for note in done.notes]
    if done.dropped:
        lines.append(f"- Not taken over: {', '.join(f'`{key}`' for key in summarise(done.dropped))}.")
    card = Card(
        name=f"{source.name} as MoME",
        path=str(done.output),
        task=(CAPTIONS if captions else EMBEDDINGS) if with_tokenizer else IMAGES,
        summary=summary,
        facts=facts,
        sections={"Notes on the conversion": "\n".join(lines)} if lines else {},
        ending=ENDING.format(name=source.name, origin=source.origin, citation=source.citation),
        metadata={"license": source.license, "tags": [source.name.lower().replace("-", "")]},
    )
    return text_of(card)


def _preprocessing(sizes: Sizes) -> str:
    if sizes.classifier:
        return ", cropped from the centre, ImageNet's mean and deviation"
    return f", resized ({sizes.resampling}), scaled to −1…1"


def summarise(keys: list[str]) -> list[str]:
    """Keys without their last part, once each: `head.dense1.weight`, `head.dense1.bias` → `head.dense1`."""
    return list(dict.fromkeys(re.sub(r"\.(weight|bias)$", "", key) for key in keys))
