"""The quickstart: learn to read small pictures from scratch, then caption, classify and search unseen ones.

    make quickstart        about a minute on two cores once everything is installed, no network

Draws pictures of a coloured shape at one of four places ("a red circle at the top"), trains a MoME of 0.4 million
parameters on all but a few combinations, and tries those that it never saw. The checkpoint stays in
`.cache/quickstart`, for the snippets of the README.
"""

import random
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tqdm import trange
from transformers import CLIPImageProcessor, PreTrainedTokenizerFast, pipeline

from .configuration_mome import MomeConfig
from .modeling_mome import MomeForConditionalGeneration, MomeModel
from .processing_mome import MomeProcessor

COLOURS = {"red": "#e03131", "green": "#2f9e44", "blue": "#1971c2", "yellow": "#f5d90a", "white": "#ffffff"}
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = {"top": (16, 8), "bottom": (16, 24), "left": (8, 16), "right": (24, 16)}
SIDE, RADIUS = 32, 6
FOLDER = Path(".cache") / "quickstart"


def caption_of(colour: str, shape: str, place: str) -> str:
    return f"a {colour} {shape} at the {place}"


def draw(colour: str, shape: str, place: str, jitter: random.Random) -> Image.Image:
    """One picture of 32 × 32 pixels; place and size vary a little."""
    image = Image.new("RGB", (SIDE, SIDE), "#202020")
    pen, radius = ImageDraw.Draw(image), RADIUS + jitter.uniform(-1, 1)
    x, y = (centre + jitter.uniform(-1.5, 1.5) for centre in PLACES[place])
    box = (x - radius, y - radius, x + radius, y + radius)
    fill = COLOURS[colour]
    if shape == "circle":
        pen.ellipse(box, fill=fill)
    elif shape == "square":
        pen.rectangle(box, fill=fill)
    elif shape == "triangle":
        pen.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=fill)
    else:
        pen.line([(x - radius, y), (x + radius, y)], fill=fill, width=3)
        pen.line([(x, y - radius), (x, y + radius)], fill=fill, width=3)
    return image


def build_processor() -> MomeProcessor:
    """A word-level tokenizer over the words of the captions, and 32-pixel images."""
    words = "[PAD] [BOS] [EOS] <image> [UNK] a at the".split() + [*COLOURS, *SHAPES, *PLACES]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 1), ("[EOS]", 2)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        unk_token="[UNK]",
        extra_special_tokens=["<image>"],
        model_max_length=12,
        model_input_names=["input_ids", "attention_mask"],
    )
    size = {"height": SIDE, "width": SIDE}
    image_processor = CLIPImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_center_crop=False)
    return MomeProcessor(image_processor, fast)


def train(captioner: MomeForConditionalGeneration, processor: MomeProcessor, seen: list, steps: int):
    """Joint contrastive and caption loss, 64 pictures a step."""
    optimizer = torch.optim.AdamW(captioner.parameters(), lr=1.5e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=steps, pct_start=0.1)
    jitter, progress = random.Random(0), trange(steps, desc="training", unit="step")
    for _ in progress:
        chosen = jitter.choices(seen, k=64)
        batch = processor(
            images=[draw(*each, jitter) for each in chosen],
            text=[caption_of(*each) for each in chosen],
            return_tensors="pt",
        )
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        outputs = captioner(**batch, labels=labels)
        optimizer.zero_grad()
        outputs.loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix(
            contrastive=f"{outputs.contrastive_loss:.2f}", caption=f"{outputs.caption_loss:.2f}", refresh=False
        )


def main(folder: Path = FOLDER, steps: int = 500):
    torch.manual_seed(0)
    combinations = [(colour, shape, place) for colour in COLOURS for shape in SHAPES for place in PLACES]
    random.Random(1).shuffle(combinations)
    held_out, seen = combinations[:12], combinations[12:]
    processor = build_processor()
    config = MomeConfig(
        vocab_size=len(processor.tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=8,
        patch_embedding_type="conv_stem",
        max_position_embeddings=12,
        projection_dim=64,
    )
    captioner = MomeForConditionalGeneration(config)
    print(f"MoME with {captioner.num_parameters():,} parameters; {len(seen)} combinations seen, {len(held_out)} not")
    start = time.perf_counter()
    train(captioner.train(), processor, seen, steps)
    print(f"trained in {time.perf_counter() - start:.0f} s")
    captioner.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    show(held_out, folder)
    print(
        f"\nThe checkpoint is in {folder}: AutoModel.from_pretrained, pipeline(…) and the README's snippets take it."
    )


def show(held_out: list, folder: Path):
    """Captions, labels and search hits for pictures of combinations that training never saw."""
    jitter = random.Random(2)
    images, texts = [draw(*each, jitter) for each in held_out], [caption_of(*each) for each in held_out]
    for number, image in enumerate(images):
        image.save(folder / f"unseen-{number}.png")
    describe = pipeline("image-text-to-text", model=str(folder))
    captions = [each["generated_text"] for each in describe(images, text=[""] * len(images), max_new_tokens=8)]
    classify = pipeline("zero-shot-image-classification", model=str(folder))
    labels = [
        classify(image, candidate_labels=list(SHAPES), hypothesis_template=caption_of(colour, "{}", place))[0]
        for image, (colour, _, place) in zip(images, held_out)
    ]
    print("\ncaptions and zero-shot shapes of unseen pictures")
    for truth, caption, label in zip(texts, captions, labels):
        mark = "=" if truth == caption else "≠"
        print(f"  {truth:32s} {mark} {caption:32s}  {label['label']:9s} {label['score']:.2f}")
    model, processor = MomeModel.from_pretrained(folder), MomeProcessor.from_pretrained(folder)
    with torch.no_grad():
        logits = model(**processor(text=texts, images=images, return_tensors="pt")).logits_per_text
    right = sum(truth == caption for truth, caption in zip(texts, captions))
    found = (logits.argmax(dim=1) == torch.arange(len(texts))).sum()
    print(f"\n{right} of {len(texts)} captions word for word; {found} of {len(texts)} texts find their picture first")


if __name__ == "__main__":
    main()
