"""A routed checkpoint made of a dense one gives the same outputs, and training parts its experts."""

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForImageTextToText

from models import VARIANTS, random_batch, tiny_captioner
from mome.convert import upcycle_checkpoint
from mome.convert.__main__ import main
from upstream import golden, run, under


@torch.no_grad()
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in ("routed", "top1")])
def test_upcycling_leaves_the_outputs_of_any_checkpoint_as_they_are(variant, tmp_path):
    dense = tiny_captioner(variant)
    dense.save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "notes.txt").write_text("kept")
    command = ["mome", "--checkpoint", str(tmp_path / "dense"), "--output", str(tmp_path / "routed")]
    assert main([*command, "--experts-per-group", "4"]) == 0
    routed = AutoModelForImageTextToText.from_pretrained(tmp_path / "routed")
    assert (routed.config.experts_per_group, routed.config.experts_per_token) == (4, 2)
    assert (tmp_path / "routed" / "notes.txt").read_text() == "kept"
    batch = random_batch(dense.config)
    for name in ("logits_per_image", "image_embeds", "text_embeds"):
        assert_close(getattr(routed.model(**batch), name), getattr(dense.model(**batch), name), atol=1e-5, rtol=0)
    fused = [model.model.get_multimodal_features(**batch).last_hidden_state for model in (routed, dense)]
    assert_close(*fused, atol=1e-5, rtol=0)
    assert_close(routed(**batch).logits, dense(**batch).logits, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind, name", [("beit3", "retrieval_sd/"), ("vlmo", "relpos/sd/")])
def test_conversion_and_upcycling_in_one_go_equal_the_dense_conversion(kind, name, tmp_path):
    state = under(name, golden(kind))
    dense = AutoModelForImageTextToText.from_pretrained(run(kind, state, tmp_path / "dense"))
    routing = ("--experts-per-group", "4", "--experts-per-token", "2")
    folder = run(kind, state, tmp_path / "routed", *routing)
    routed = AutoModelForImageTextToText.from_pretrained(folder)
    batch = {key: golden(kind)[key] for key in ("input_ids",)} | {"pixel_values": golden(kind)["image"]}
    outputs = [model.model(**batch) for model in (routed, dense)]
    assert_close(outputs[0].image_embeds, outputs[1].image_embeds, atol=1e-5, rtol=0)
    assert_close(outputs[0].text_embeds, outputs[1].text_embeds, atol=1e-5, rtol=0)
    assert "4 copies, of which a token uses 2" in (folder / "README.md").read_text()


@torch.no_grad()
def test_a_checkpoint_of_embeddings_alone_stays_one(tmp_path):
    dense = tiny_captioner("vlmo").model
    dense.save_pretrained(tmp_path / "dense")
    upcycle_checkpoint(tmp_path / "dense", tmp_path / "routed", experts_per_group=3)
    routed, batch = AutoModel.from_pretrained(tmp_path / "routed"), random_batch(dense.config)
    assert routed.config.experts_per_group == 3
    assert_close(routed(**batch).logits_per_image, dense(**batch).logits_per_image, atol=1e-5, rtol=0)


def test_training_separates_upcycled_experts(tmp_path):
    tiny_captioner("dense").save_pretrained(tmp_path / "dense")
    command = ["mome", "--checkpoint", str(tmp_path / "dense"), "--output", str(tmp_path / "routed")]
    main([*command, "--experts-per-group", "4", "--experts-per-token", "2"])
    captioner = AutoModelForImageTextToText.from_pretrained(tmp_path / "routed")
    experts = [layer.feed_forward["image"] for layer in captioner.model.encoder.layers]
    routers = [expert.router.weight.detach().clone() for expert in experts]
    assert all((each.experts.up_proj == each.experts.up_proj[:1]).all() for each in experts)
    optimizer, batch = torch.optim.AdamW(captioner.parameters(), lr=1e-3), random_batch(captioner.config, size=8)
    losses = []
    for _ in range(20):
        loss = captioner(**batch, labels=batch["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for expert, router in zip(experts, routers):
        weights = expert.experts.up_proj.detach().flatten(1)
        distances = torch.cdist(weights, weights) / weights.norm(dim=1).mean()
        assert distances[~torch.eye(4, dtype=torch.bool)].min() > 1e-3
        assert (expert.router.weight - router).abs().max() > 1e-3
