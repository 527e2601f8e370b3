"""The model card of a converted checkpoint."""

import re
from pathlib import Path

from ..configuration_mome import MomeConfig
from .operations import Sizes, Source

CARD = """---
license: {license}
library_name: transformers
pipeline_tag: {task}
tags: [mome, {tag}, custom_code]
---

# {name} as MoME

Weights of {name} ([{paper}](https://arxiv.org/abs/{paper})), converted from `{file}` ({kind}; {shape}).
{routing}
```python
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

path = "path/or/name/of/this/checkpoint"
processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
model = AutoModel.from_pretrained(path, trust_remote_code=True)
outputs = model(**processor(text=["a dog", "a cat"], images=[image], return_tensors="pt"))
outputs.logits_per_image

captioner = AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=True)
captioner.generate(**processor(images=[image], return_tensors="pt"))
```

Images: {images}. Texts: {texts}.
{notes}
## Licence and citation

The weights are those of {name}, published by Microsoft under the MIT License in
[microsoft/unilm](https://github.com/microsoft/unilm); the code beside them is MoME's, Apache-2.0.

```bibtex
{citation}
```
"""


def model_card(
    source: Source, sizes: Sizes, config: MomeConfig, path: Path, dropped: list[str], notes: list[str]
) -> str:
    """Markdown with the front matter that the Hub reads."""
    captions = source.name == "BEiT-3" and not any("caption head" in head for head in sizes.absent)
    shape = f"{config.num_hidden_layers} × {config.hidden_size}, {config.num_attention_heads} heads, "
    shape += f"{config.image_size} px, patch {config.patch_size}"
    routing = ""
    if config.experts_per_group > 1:
        routing = (
            f"\nEvery expert became {config.experts_per_group} copies, of which a token uses "
            f"{config.experts_per_token} ([2212.05055](https://arxiv.org/abs/2212.05055)): outputs are the dense ones "
            "until training parts them.\n"
        )
    lines = [f"- {note}." for note in notes]
    if dropped:
        lines.append(f"- Not taken over: {', '.join(f'`{key}`' for key in summarise(dropped))}.")
    return CARD.format(
        license=source.license,
        task="image-text-to-text" if captions else "zero-shot-image-classification",
        tag=source.name.lower().replace("-", ""),
        name=source.name,
        paper=source.paper,
        file=path.name,
        kind=sizes.kind,
        shape=shape,
        routing=routing,
        images=_images(sizes, config),
        texts=f"up to {sizes.text_length or config.max_position_embeddings} tokens",
        notes="\n" + "\n".join(lines) + "\n" if lines else "",
        citation=source.citation,
    )


def _images(sizes: Sizes, config: MomeConfig) -> str:
    side = f"{config.image_size} × {config.image_size} pixels"
    if sizes.classifier:
        return f"cropped from the centre to {side}, ImageNet's mean and deviation"
    return f"resized to {side} (bicubic), scaled to −1…1"


def summarise(keys: list[str]) -> list[str]:
    """Keys without their last part, once each: `head.dense1.weight`, `head.dense1.bias` → `head.dense1`."""
    return list(dict.fromkeys(re.sub(r"\.(weight|bias)$", "", key) for key in keys))
