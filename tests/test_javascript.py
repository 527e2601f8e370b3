"""What docs/export.md says of exports in JavaScript, in Node.

With MOME_TRANSFORMERS_JS=folder, in whose node_modules lies @huggingface/transformers (`npm install` it there), its
code runs, and each line of its table is tried. Without, only what is ours.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import build_page
from mome.embedder import Embedder
from mome.export.folder import export_checkpoint
from mome.onnx_embedder import OnnxEmbedder
from static_page import CHECKPOINT, PAGE, ROOT, needs_onnx

NODE, PACKAGES = shutil.which("node"), os.environ.get("MOME_TRANSFORMERS_JS")
DOCS = (ROOT / "docs" / "export.md").read_text()
needs_node = pytest.mark.skipif(NODE is None, reason="no Node on this machine")
needs_transformers_js = pytest.mark.skipif(
    NODE is None or PACKAGES is None, reason="MOME_TRANSFORMERS_JS names no folder with transformers.js"
)
SETTINGS = """
import { settingsOf } from "./pixels.js";
import { readFileSync } from "node:fs";
const answers = JSON.parse(readFileSync(0)).map((config) => {
  try { return settingsOf(config); } catch (error) { return error.message; }
});
console.log(JSON.stringify(answers));
"""
CLAIMS = """
import * as transformers from "@huggingface/transformers";
const { AutoModel, AutoProcessor, AutoTokenizer, env, pipeline, RawImage } = transformers;
env.localModelPath = "./";
env.allowRemoteModels = false;
const [folder, q8] = ["icons-onnx", { dtype: "q8" }];
const image = await RawImage.read("samples/eye.png");
const found = {};
const attempt = async (name, run) => {
  found[name] = await run().then((value) => value ?? null, (error) => error.message);
};
const loaded = (name) => async () => (await transformers[name].from_pretrained(folder, q8)).constructor.name;
const ran = (task, given, options) => async () =>
  (await pipeline(task, folder, { ...q8, ...options }))(given, ["bee"]);
await attempt("ids", async () => (await AutoTokenizer.from_pretrained(folder))("heartAttack café").input_ids.tolist()
  .map((row) => row.map(Number)));
for (const name of ["AutoProcessor", "AutoModelForVision2Seq", "AutoModelForImageTextToText"]) {
  await attempt(name, loaded(name));
}
for (const name of ["CLIPTextModelWithProjection", "CLIPVisionModelWithProjection", "AutoModel"]) {
  await attempt(name, loaded(name));
}
await attempt("zero-shot-image-classification", ran("zero-shot-image-classification", image));
await attempt("image-to-text", ran("image-to-text", image));
await attempt("feature-extraction", ran("feature-extraction", "bee"));
await attempt("feature-extraction of texts", ran("feature-extraction", "bee", { model_file_name: "text_model" }));
console.log(JSON.stringify(found));
"""


def run_in_node(folder: Path, code: str, given: str = "") -> dict | list:
    """What code prints last, as JSON."""
    (folder / "code.mjs").write_text(code)
    done = subprocess.run([NODE, "code.mjs"], cwd=folder, input=given, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@needs_node
def test_settings_of_an_exported_processor_are_those_of_the_page(tmp_path):
    shutil.copy(PAGE / "pixels.js", tmp_path)
    processor = Embedder.load(CHECKPOINT, "cpu").processor
    config = processor.image_processor.to_dict()
    other = [{"resample": 2}, {"do_center_crop": True}, {"size": {"shortest_edge": 64}}, {"do_normalize": False}]
    answers = run_in_node(tmp_path, SETTINGS, json.dumps([config, *(config | changed for changed in other)]))
    assert answers[0] == build_page.image_settings(processor)
    for changed, answer in zip(other, answers[1:]):
        ((name, value),) = changed.items()
        assert answer.startswith(f"{name}: {json.dumps(value, separators=(',', ':'))} is nothing"), answer


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the code of the docs runs."""
    folder = tmp_path_factory.mktemp("javascript")
    export_checkpoint(CHECKPOINT, folder / "icons-onnx", ["q8"])
    shutil.copy(PAGE / "pixels.js", folder)
    (folder / "samples").symlink_to(ROOT / "samples")
    (folder / "node_modules").symlink_to(Path(PACKAGES).resolve() / "node_modules")
    return folder


@needs_transformers_js
@needs_onnx
def test_the_code_of_the_docs_embeds_and_captions_as_python_does(folder):
    (code,) = re.findall(r"^```js\n(.*?)^```", DOCS, flags=re.DOTALL | re.MULTILINE)
    found = run_in_node(folder, code)
    embedder = OnnxEmbedder.load(folder / "icons-onnx", "q8", captions=True)
    image, texts = (
        embedder.embed_images([str(ROOT / "samples" / "eye.png")]),
        embedder.embed_texts(["an eye", "a bee"]),
    )
    assert found["cosines"] == pytest.approx((image @ texts.T)[0].tolist(), abs=0.01)
    assert found["caption"] == embedder.caption_images([str(ROOT / "samples" / "eye.png")])[0]


@needs_transformers_js
@needs_onnx
def test_transformers_js_makes_of_an_export_what_the_docs_say(folder):
    version = json.loads((folder / "node_modules/@huggingface/transformers/package.json").read_text())["version"]
    assert f'"@huggingface/transformers"; // {version}' in DOCS and f"transformers.js {version} makes" in DOCS
    found = run_in_node(folder, CLAIMS)
    tokenizer = OnnxEmbedder.load(folder / "icons-onnx", "q8").processor.tokenizer
    assert found["ids"] == [tokenizer("heartAttack café")["input_ids"]]
    assert found["AutoModel"] == "PreTrainedModel"
    for name in ("CLIPTextModelWithProjection", "CLIPVisionModelWithProjection"):
        assert found[name] == name
    unknown, unsupported = "Unknown image_processor_type: 'MomeImageProcessor'", "Unsupported model type: mome"
    assert unknown in DOCS and unsupported in DOCS
    for name in ("AutoProcessor", "zero-shot-image-classification"):
        assert unknown in found[name]
    for name in ("image-to-text", "AutoModelForVision2Seq", "AutoModelForImageTextToText"):
        assert found[name] == unsupported
    assert found["feature-extraction of texts"] is None and "pixel_values" in found["feature-extraction"]
