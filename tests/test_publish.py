"""Publishing, through huggingface_hub itself against a Hub on the loopback interface."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

import mome
from builders import build_processor
from loopback_hub import LoopbackHub
from models import tiny_captioner
from mome.cards import CAPTIONS, Card, text_of
from mome.publish import build_folder, main

REPO = "ada/tiny-mome"
TOKENS = {"right": "ada", "other": "bob"}


def save_checkpoint(folder: Path, seed: int = 0, **overrides) -> Path:
    processor = build_processor(image_size=16)
    captioner = tiny_captioner(seed=seed, vocab_size=len(processor.tokenizer), max_position_embeddings=16, **overrides)
    captioner.generation_config.rerank_weight = 0.5
    captioner.generation_config.rerank_candidates = 3
    captioner.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def hub(monkeypatch):
    with LoopbackHub(TOKENS) as hub:
        # What the variables of `hub.environment` set before an import; here the import is long done.
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setenv("HF_TOKEN", "right")
        yield hub


def run(hub, home: Path, *command: str, token: str | None = None, package: bool = False, **variables: str):
    """A fresh process; `package=False`: -S keeps the editable install of the package out."""
    packages = [path for path in sys.path if path.endswith("-packages")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(packages), **hub.environment(home, token), **variables}
    start = [sys.executable] if package else [sys.executable, "-S"]
    home.mkdir(exist_ok=True)
    return subprocess.run([*start, *command], cwd=home, env=environment, capture_output=True, text=True)


def push(checkpoint: Path, *options: str, repo_id: str = REPO) -> tuple[int, str]:
    """Exit status and last line of the command."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        status = main([str(checkpoint), "--repo-id", repo_id, *options])
    return status, output.getvalue()


def revision_of(output: str) -> str:
    found = re.search(r"at ([0-9a-f]{40})\n", output)
    assert found, output
    return found[1]


LOAD = """
import json, sys, torch
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline
repo, revision = sys.argv[1:]
options = {"revision": revision, "trust_remote_code": True}
image = Image.new("RGB", (20, 30), "red")
processor = AutoProcessor.from_pretrained(repo, **options)
inputs = processor(text=["red dot", "a cat"], images=[image], return_tensors="pt")
with torch.no_grad():
    logits = AutoModel.from_pretrained(repo, **options)(**inputs).logits_per_image[0].tolist()
captioner = AutoModelForImageTextToText.from_pretrained(repo, **options)
ids = captioner.generate(pixel_values=inputs["pixel_values"], max_new_tokens=4)[0].tolist()
pipe = lambda task: pipeline(task, model=repo, **options)
results = {
    "logits": logits,
    "ids": ids,
    "rerank": captioner.generation_config.rerank_candidates,
    "label": pipe("zero-shot-image-classification")(image, candidate_labels=["red", "blue dot"])[0]["label"],
    "image": len(pipe("image-feature-extraction")(image)[0]),
    "text": len(pipe("feature-extraction")("red")[0]),
    "describe": pipe("image-text-to-text")(image, text="", max_new_tokens=4)[0]["generated_text"],
    "caption": pipe("image-captioning")(image, max_new_tokens=4),
    "labels": len(pipe("open-vocabulary-image-classification")(image, candidate_labels=["red", "dot", "cat"])),
}
assert "mome" not in sys.modules
print(json.dumps(results))
"""


def test_what_was_published_loads_without_the_package_and_offline_afterwards(hub, checkpoint, tmp_path):
    command = ["-m", "mome.publish", str(checkpoint), "--repo-id", REPO]
    pushed = run(hub, tmp_path / "here", *command, token="right", package=True)
    revision = revision_of(pushed.stdout + pushed.stderr)
    assert f'revision="{revision}"' in pushed.stdout
    assert len(hub.repositories[REPO].commits) == 2 and not hub.repositories[REPO].private
    later = revision_of(push(save_checkpoint(tmp_path / "later", seed=1))[1])
    assert later != revision  # main has moved on, the pinned revision hasn't

    there = tmp_path / "there"
    loaded = run(hub, there, "-c", LOAD, REPO, revision)
    assert loaded.returncode == 0, loaded.stderr
    results = json.loads(loaded.stdout.splitlines()[-1])
    model = mome.MomeModel.from_pretrained(checkpoint)
    processor = mome.MomeProcessor.from_pretrained(checkpoint)
    image = Image.new("RGB", (20, 30), "red")
    inputs = processor(text=["red dot", "a cat"], images=[image], return_tensors="pt")
    with torch.no_grad():
        assert results["logits"] == model(**inputs).logits_per_image[0].tolist()
    captioner = mome.MomeForConditionalGeneration.from_pretrained(checkpoint)
    ids = captioner.generate(pixel_values=inputs["pixel_values"], max_new_tokens=4)[0].tolist()
    assert results["ids"] == ids and results["rerank"] == 3
    assert results["image"] == results["text"] == 16 and results["labels"] == 3
    caption = processor.decode(ids, skip_special_tokens=True).strip()
    assert results["caption"][0]["generated_text"] == caption and -1 <= results["caption"][0]["score"] <= 1

    hub.requests.clear()
    offline = run(hub, there, "-c", LOAD, REPO, revision, HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert json.loads(offline.stdout.splitlines()[-1]) == results and not hub.requests


USE_CARD = """
import re, sys
from huggingface_hub import ModelCard
from PIL import Image
from transformers import pipeline
Image.new("RGB", (20, 30), "red").save("image.png")
card = ModelCard.load(sys.argv[1])
(block,) = re.findall(r"```python\\n(.*?)```", card.text, flags=re.DOTALL)
exec(block, {})
exec(open(sys.argv[2]).read(), {})
pipeline(card.data.pipeline_tag, model=sys.argv[1], trust_remote_code=True)
assert "mome" not in sys.modules
"""


def test_the_code_of_the_card_and_of_the_command_runs_against_the_hub(hub, checkpoint, tmp_path):
    local = shutil.copytree(checkpoint, tmp_path / "local")
    (local / "README.md").write_text(text_of(Card("tiny", str(local), CAPTIONS, limitations="Knows dots.")))
    pushed = push(local)[1]
    revision = revision_of(pushed)
    printed = tmp_path / "printed.py"
    printed.write_text(pushed.split(revision, 1)[1])
    assert f'revision="{revision}"' in printed.read_text()
    card = hub.files(REPO)["README.md"].decode()
    assert f'path = "{REPO}"' in card and str(local) not in card and "Knows dots." in card
    used = run(hub, tmp_path / "there", "-c", USE_CARD, REPO, str(printed))
    assert used.returncode == 0, used.stderr
    assert used.stdout.count("generated_text") == 2


FINE_TUNE = """
import sys, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
repo, target = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
images = [torch.zeros(3, 16, 16), torch.ones(3, 16, 16)]
batch = processor(text=["red dot", "a cat"], images=images, return_tensors="pt")
model(**batch, labels=batch["input_ids"]).loss.backward()
optimizer.step()
model.push_to_hub(repo)
model.push_to_hub(target)
processor.push_to_hub(target)
"""


def test_a_fine_tuned_model_that_is_pushed_keeps_everything(hub, checkpoint, tmp_path):
    before = hub.files(REPO, revision_of(push(checkpoint)[1]))
    tuned = run(hub, tmp_path / "there", "-c", FINE_TUNE, REPO, "ada/finetuned", token="right")
    assert tuned.returncode == 0, tuned.stderr
    for repo_id in (REPO, "ada/finetuned"):
        after = hub.files(repo_id)
        assert before.keys() - after.keys() <= {"README.md"}
        for name in before.keys() & after.keys() - {"README.md"}:
            assert (before[name] == after[name]) == (name != "model.safetensors"), name
    loaded = run(hub, tmp_path / "elsewhere", "-c", LOAD, "ada/finetuned", "main")
    assert loaded.returncode == 0, loaded.stderr
    assert json.loads(loaded.stdout.splitlines()[-1])["image"] == 16


def test_a_push_that_is_interrupted_leaves_the_repository_whole(hub, checkpoint, tmp_path):
    before = hub.files(REPO, revision_of(push(checkpoint)[1]))
    other = save_checkpoint(tmp_path / "other", seed=1)
    hub.fail = {("POST", "/api/models/ada/tiny-mome/commit/*"): 9}
    status, output = push(other)
    assert status == 1 and hub.files(REPO) == before
    assert output.strip().splitlines()[-1].startswith("HfHubHTTPError: ")
    hub.fail.clear()
    revision_of(push(other)[1])
    assert hub.files(REPO)["model.safetensors"] == (other / "model.safetensors").read_bytes()


def test_a_repeated_push_changes_nothing_and_another_one_leaves_nothing_stale(hub, checkpoint, tmp_path):
    first = revision_of(push(checkpoint)[1])
    assert revision_of(push(checkpoint)[1]) == first
    repository = hub.repositories[REPO]
    assert len(repository.commits) == 2
    blob = repository.commits[-1].files["model.safetensors"]
    stale = ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "forgotten_mome.py")
    kept = ("samples/cat.png", "notes.md", "tool.py")
    repository.commits[-1].files.update(dict.fromkeys((*stale, *kept), blob))
    revision_of(push(save_checkpoint(tmp_path / "other", seed=1))[1])
    names = hub.files(REPO).keys()
    assert not names & set(stale) and names >= set(kept) and len(repository.commits) == 3


def test_what_goes_wrong_is_one_line_of_the_ecosystem_s_own_class(hub, checkpoint, tmp_path, monkeypatch):
    def assert_refused(name, words, *options, checkpoint=checkpoint, repo_id=REPO):
        status, output = push(checkpoint, *options, repo_id=repo_id)
        line = output.strip().splitlines()[-1]
        assert status == 1 and line.startswith(name + ": ") and words in line, output

    assert_refused("HfHubHTTPError", "rights to create", repo_id="bob/tiny")
    assert_refused("HFValidationError", "a//b", repo_id="a//b")
    assert_refused("FileNotFoundError", "no such folder", checkpoint=tmp_path / "nowhere")
    with monkeypatch.context() as changed:
        changed.setenv("HF_TOKEN", "wrong")
        assert_refused("HfHubHTTPError", "Invalid")
    with monkeypatch.context() as changed:
        changed.setenv("HF_TOKEN", "")
        changed.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        assert_refused("LocalTokenNotFoundError", "oken is required")
    with monkeypatch.context() as changed:
        changed.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        assert_refused("OfflineModeIsEnabled", "offline mode")
    with monkeypatch.context() as changed:
        changed.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
        assert_refused("ConnectError", "refused")
    assert not hub.repositories
    revision_of(push(checkpoint)[1])
    assert_refused("ValueError", "exists and is public", "--private")
    revision_of(push(checkpoint, "--private", repo_id="ada/hidden")[1])
    assert hub.repositories["ada/hidden"].private


CLASSES_OF_ERRORS = """
import sys
from transformers import AutoModel, AutoProcessor
for repo in sys.argv[1:]:
    for auto_class in (AutoModel, AutoProcessor):
        try:
            auto_class.from_pretrained(repo, trust_remote_code=True)
        except Exception as error:
            print(repo, auto_class.__name__, isinstance(error, OSError), type(error.__cause__).__name__)
"""


def test_loading_fails_with_the_ecosystem_s_own_errors(hub, checkpoint, tmp_path):
    revision_of(push(checkpoint, "--private")[1])
    nobody = run(hub, tmp_path / "a", "-c", CLASSES_OF_ERRORS, "ada/missing", REPO)
    expected = [f"{repo} {name} True" for repo in ("ada/missing", REPO) for name in ("AutoModel", "AutoProcessor")]
    lines = nobody.stdout.strip().splitlines()
    assert [line.rsplit(" ", 1)[0] for line in lines] == expected, nobody.stdout + nobody.stderr
    # An endpoint that nobody serves gives the same after a minute of huggingface_hub's retries.
    offline = run(hub, tmp_path / "b", "-c", CLASSES_OF_ERRORS, REPO, HF_HUB_OFFLINE="1")
    assert offline.stdout.count(" True ") == 2, offline.stdout + offline.stderr
    # The rights of a read-only folder do not stop root; a file where the cache should be does.
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    process = run(hub, tmp_path / "c", "-c", CLASSES_OF_ERRORS, REPO, token="right", HF_HOME=str(blocked))
    assert process.stdout.count(" True ") == 2, process.stdout + process.stderr


def test_a_dry_run_shows_the_folder_and_sends_nothing(hub, checkpoint):
    status, output = push(checkpoint, "--dry-run")
    assert status == 0
    for name in ("model.safetensors", "pipeline_mome.py", "processor_config.json", "README.md", "tokenizer.json"):
        assert name in output
    assert "rerank_weight=0.5" in output and "one each, hard routing" in output and "nothing was sent" in output
    assert not hub.requests and not hub.repositories


def test_the_folder_has_everything_and_the_card_its_results(checkpoint, tmp_path):
    results = tmp_path / "results.csv"
    command = f"python -m mome.experiments.guidance --checkpoint {checkpoint} --data x.parquet"
    results.write_text(
        "commit,date,command,hardware,data,metric,value,peer,peer_value,ratio\n"
        f'a,2024-01-01,"{command}",cpu,icons held out,rerank: R@1,0.25,unguided,0.2,1.25\n'
        f'b,2024-01-02,"{command}",cpu,icons held out,rerank: R@1,0.26,unguided,0.2,1.3\n'
        'c,2024-01-02,"python -m mome.benchmarks.inference",cpu,random,speed,9,CLIP,8,1.1\n'
    )
    folder = build_folder(checkpoint, tmp_path / "folder", REPO, results=results)
    code = {path.name for path in Path(mome.__file__).parent.glob("*_mome.py")}
    assert {path.name for path in folder.glob("*.py")} == code
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"] == mome.configuration_mome.AUTO_MAP
    assert config["custom_pipelines"] == mome.configuration_mome.CUSTOM_PIPELINES
    assert json.loads((folder / "processor_config.json").read_text())["auto_map"]["AutoProcessor"]
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers" and {"mome", "custom_code"} <= set(card.data.tags)
    (evaluation,) = card.data.eval_results
    assert (evaluation.dataset_name, evaluation.metric_value) == ("icons held out", 0.26)
    assert "| icons held out | rerank: R@1 | 0.26 |" in card.text and REPO in card.text

    republished = shutil.copytree(folder, tmp_path / "republished")
    again = build_folder(republished, tmp_path / "again", REPO)  # without new results the old ones stay
    assert (again / "README.md").read_text() == (folder / "README.md").read_text()

    own = shutil.copytree(checkpoint, tmp_path / "own")
    words = "My own words. ![A dot](dot.png) ![Gone](gone.png) ![Elsewhere](../dot.png)"
    (own / "README.md").write_text(f"---\nlicense: mit\ntags: [icons]\n---\n\n{words}\n")
    Image.new("RGB", (4, 4), "red").save(own / "dot.png")
    card = ModelCard.load(build_folder(own, tmp_path / "with own card", REPO) / "README.md")
    assert [path.name for path in (tmp_path / "with own card").glob("*.png")] == ["dot.png"]
    assert "My own words." in card.text and card.data.license == "mit" and {"icons", "mome"} <= set(card.data.tags)


def test_embeddings_alone_are_published_as_such(checkpoint, tmp_path):
    mome.MomeModel.from_pretrained(checkpoint).save_pretrained(tmp_path / "model")
    mome.MomeProcessor.from_pretrained(checkpoint).save_pretrained(tmp_path / "model")
    folder = build_folder(tmp_path / "model", tmp_path / "folder", REPO)
    card = (folder / "README.md").read_text()
    assert "AutoModel.from_pretrained" in card and 'pipeline("image-captioning"' not in card
    assert (folder / "pipeline_mome.py").exists()
    assert torch.equal(
        mome.MomeModel.from_pretrained(folder).logit_scale, mome.MomeModel.from_pretrained(checkpoint).logit_scale
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no tokenizer", "has no tokenizer_config.json"),
        ("no weights", "model.safetensors"),
        ("another model", "model of type 'bert'"),
        ("an adapter", "is an adapter"),
        ("other images", "makes images of 32×32, image_size is 16"),
        ("other ids", "eos_token_id is 2 in the tokenizer, 3 in the config"),
    ],
)
def test_a_checkpoint_that_would_not_work_is_not_published(change, message, checkpoint, tmp_path, capsys):
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    if change == "no tokenizer":
        (broken / "tokenizer_config.json").unlink()
    elif change == "no weights":
        (broken / "model.safetensors").unlink()
    elif change == "another model":
        (broken / "config.json").write_text('{"model_type": "bert"}')
    elif change == "an adapter":
        (broken / "adapter_config.json").write_text("{}")
    elif change == "other images":
        build_processor(image_size=32).save_pretrained(broken)
    else:
        config = json.loads((broken / "config.json").read_text())
        (broken / "config.json").write_text(json.dumps({**config, "eos_token_id": 3, "image_token_id": 2}))
    assert main([str(broken), "--repo-id", REPO, "--dry-run"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and error.split(":")[0].endswith("Error")


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_several_ids_may_end_a_caption(file, checkpoint, tmp_path, capsys):
    several = shutil.copytree(checkpoint, tmp_path / "several")
    settings = json.loads((several / file).read_text())
    (several / file).write_text(json.dumps({**settings, "eos_token_id": [4, 2]}))
    folder = build_folder(several, tmp_path / "folder", REPO)
    assert json.loads((folder / file).read_text())["eos_token_id"] == [4, 2]
    (several / "config.json").write_text(
        json.dumps({**json.loads((several / "config.json").read_text()), "eos_token_id": [4, 5]})
    )
    assert main([str(several), "--repo-id", REPO, "--dry-run"]) == 1
    assert "eos_token_id is 2 in the tokenizer, [4, 5] in the config" in capsys.readouterr().err
