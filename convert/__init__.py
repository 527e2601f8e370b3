"""Converters: checkpoints of BEiT-3 and VLMo as MoME checkpoints, and dense checkpoints as routed ones.

    python -m mome.convert (beit3|vlmo|mome) --checkpoint FILE --output DIR [--tokenizer FILE] ...

- `reading`: tensors of an untrusted file, one at a time, without running what is in it;
- `beit3`, `vlmo`: per source a `KEY_MAP`, the named operations behind some of its keys, and how sizes are read;
- `driver`: the one road from a file to a folder: map, check, load strictly, save;
- `upcycling`: copies of an expert under a router; `positions`: position tables for another resolution;
- `processors`, `card`: the tokenizer, the image processor, the model card.

    file ─ reading ─ KEY_MAP, operations ─ (upcycling) ─ strict load ─ folder, whole or not at all
"""

from ..errors import ConversionError
from .driver import convert
from .operations import Options
from .upcycling import upcycle_checkpoint

__all__ = ["ConversionError", "Options", "convert", "upcycle_checkpoint"]
