"""The teacher of texts: its geometry is kept, unknown texts are left alone, and texts are drawn to it."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from builders import build_processor
from mome.data.teacher import Teacher
from mome.errors import RecipeError
from mome.losses_mome import distillation_loss
from mome.training.batches import Collator
from test_training_data import as_dataset

TEXTS = ["cat", "dog", "house", "tree", "car", "road", "sun", "moon"]


def write(folder, texts=TEXTS, dimension=6, **columns):
    values = np.random.default_rng(0).normal(size=(len(texts), dimension)).astype(np.float16)
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), dimension)
    path = folder / "teacher.parquet"
    pyarrow.parquet.write_table(pa.table({"text": texts, "embedding": embedding} | columns), path)
    return str(path), torch.tensor(values, dtype=torch.float32)


def test_all_axes_keep_every_cosine_of_the_centred_embeddings(tmp_path):
    path, values = write(tmp_path)
    centred = torch.nn.functional.normalize(values - values.mean(dim=0), dim=1)
    found = Teacher(path, 6).embed(TEXTS)
    torch.testing.assert_close(found @ found.T, centred @ centred.T, atol=1e-4, rtol=0)


def test_fewer_axes_are_those_that_vary_most(tmp_path):
    path, values = write(tmp_path)
    centred = values - values.mean(dim=0)
    left, sizes, _ = torch.linalg.svd(centred, full_matrices=False)
    best = torch.nn.functional.normalize(left[:, :2] * sizes[:2], dim=1)
    found = Teacher(path, 2).embed(TEXTS)
    torch.testing.assert_close(found @ found.T, best @ best.T, atol=1e-4, rtol=0)


def test_unknown_texts_are_zeros_and_take_no_part(tmp_path):
    teacher = Teacher(write(tmp_path)[0], 4)
    known, unknown = teacher.embed(["dog"]), teacher.embed(["never seen"])
    assert unknown.eq(0).all() and known.norm() == pytest.approx(1)
    student = torch.nn.functional.normalize(torch.randn(2, 4), dim=1).requires_grad_()
    distillation_loss(student, torch.cat([known, unknown])).backward()
    assert student.grad[0].abs().sum() > 0 and student.grad[1].eq(0).all()


def test_the_loss_is_none_at_the_teachers_own_and_two_at_its_opposite(tmp_path):
    embeds = Teacher(write(tmp_path)[0], 4).embed(TEXTS)
    assert distillation_loss(embeds, embeds).item() == pytest.approx(0, abs=1e-5)
    assert distillation_loss(-embeds, embeds).item() == pytest.approx(2 * len(TEXTS), abs=1e-4)


def test_words_start_where_the_teacher_has_them_and_as_large_as_before(tmp_path):
    teacher = Teacher(write(tmp_path)[0], 4)
    words = torch.nn.Embedding(5, 6)
    before = words.weight.detach().clone()
    teacher.initialise_words(words, ["[PAD]", "dog", "##house", "zebra", "sun"])
    known, weight = [1, 2, 4], words.weight.detach()
    assert torch.equal(weight[[0, 3]], before[[0, 3]])
    torch.testing.assert_close(weight.norm(dim=1), before.norm(dim=1))
    direction = torch.nn.functional.normalize(weight[known], dim=1)
    torch.testing.assert_close(direction[:, :4], teacher.embed(["dog", "house", "sun"]))
    assert weight[known, 4:].eq(0).all()


def test_a_batch_carries_the_teachers_embeddings_of_its_texts(tmp_path):
    rows = as_dataset(4)
    texts = rows["text"]
    teacher = Teacher(write(tmp_path, [*texts[:3], "other", "more"])[0], 4)
    collate = Collator(build_processor(), 8, "image", teacher=teacher)
    raw = [rows.cast_column("image", rows.features["image"].__class__(decode=False))[i] for i in range(4)]
    raw[1]["image"] = {"bytes": b"no image", "path": None}
    batch = collate(raw, [f"row {i}" for i in range(4)], np.random.default_rng(0))
    torch.testing.assert_close(batch.teacher_embeds[[0, 2]], teacher.embed([texts[0], texts[2]]))
    assert batch.teacher_embeds[[1, 3]].eq(0).all()  # no image; no text of the teacher's
    assert [len(chunk.teacher_embeds) for chunk in batch.chunks(3)] == [3, 1]


@pytest.mark.parametrize(
    "path, dimension, words",
    [
        ("missing.parquet", 4, "missing.parquet"),
        ("broken.parquet", 4, "can't be read"),
        ("teacher.parquet", 7, "6 dimensions, fewer than projection_dim=7"),
        ("other.parquet", 4, "can't be read"),
    ],
)
def test_what_can_not_teach_is_named(tmp_path, path, dimension, words):
    write(tmp_path)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 cut")
    pyarrow.parquet.write_table(pa.table({"word": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(RecipeError, match=words):
        Teacher(str(tmp_path / path), dimension)
