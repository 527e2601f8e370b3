"""The README keeps its word: its snippets run, the paths it names exist."""

import re
from pathlib import Path

import torch._inductor.config

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


@torch._inductor.config.patch(freezing=False)  # the last snippet sets it, this takes it back
def test_the_snippets_run_one_after_the_other(monkeypatch):
    monkeypatch.chdir(ROOT)
    namespace = {}
    snippets = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(snippets) == 4
    for snippet in snippets:
        exec(snippet, namespace)
    assert namespace["outputs"].router_logits and namespace["experts"].shape[-1] == 2


def test_every_path_it_names_exists():
    tree = README.split("## The files")[1]
    named = re.findall(r"^(\S+(?:\.\w+|/))\s", tree, flags=re.MULTILINE) + re.findall(r"\]\(([\w./]+)\)", README)
    assert len(named) > 8
    assert not [name for name in named if not (ROOT / name).exists()]


def test_every_make_target_it_names_exists():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make ([a-z-]+)", README)):
        assert f"\n{target}:" in makefile, target
