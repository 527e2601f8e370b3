"""README, docs and cards keep their word: code runs, commands parse, links and paths lead somewhere."""

import argparse
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import datasets
import pytest
import torch
import torch._inductor.config
import typer.main
import yaml
from accelerate.commands.launch import launch_command_parser
from typer.testing import CliRunner

from mome import cli
from mome.training.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
DOCS = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))]
CARDS = ["checkpoints/mome-icons/README.md", "checkpoints/mome-icons-small/README.md"]
OTHERS = ["CONTRIBUTING.md", "CHANGELOG.md", "icons/README.md", "space/README.md", *CARDS]
TEXTS = {name: (ROOT / name).read_text() for name in (*DOCS, *OTHERS)}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
# Commands of `mome` that need a server, a cluster, an export or another package; the others run.
PARSED_ONLY = ("--backend", "--daft", "--index")


def blocks(name: str, language: str) -> list[str]:
    return [text for found, text in BLOCK.findall(TEXTS[name]) if found == language]


def commands(name: str) -> list[str]:
    """Every command of the shell blocks, lines that end in a backslash joined."""
    lines = "\n".join(blocks(name, "sh")).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


@pytest.fixture
def clone(tmp_path, monkeypatch) -> Path:
    """A folder that looks like a clone, in which nothing that is written stays."""
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name not in ("build", "runs"):
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / ".datasets-cache"))
    return tmp_path


# ------------------------------------------------------------------------------------------------------------- code


def test_the_readme_is_short_and_its_first_code_too():
    assert TEXTS["README.md"].count("\n") <= 150
    lines = [line for line in blocks("README.md", "python")[0].splitlines() if line.strip()]
    assert len(lines) <= 12


@pytest.mark.parametrize("name", [name for name in DOCS if blocks(name, "python")])
@torch._inductor.config.patch(freezing=False)  # a snippet of search.md sets it, this takes it back
def test_python_blocks_run_one_after_the_other(name, clone, capsys, monkeypatch):
    if name == "docs/search.md":  # the same is compiled for docs/export.md
        monkeypatch.setattr(torch, "compile", lambda function: function)
    namespace = {}
    for block in blocks(name, "python"):
        exec(block, namespace)
    if name == "README.md":
        printed = capsys.readouterr().out
        assert "torch.Size([4, 256])" in printed and "tensor([0, 2])" in printed and "circus tent" in printed
    if name == "docs/training.md":
        assert namespace["outputs"].router_logits and namespace["experts"].shape[-1] == 2
    if name == "docs/search.md":
        assert namespace["report"].rows == 24 and namespace["hits"]


def test_recipes_in_the_docs_are_valid(clone):
    found = blocks("docs/training.md", "yaml")
    assert found and all(Recipe.from_dict(yaml.safe_load(text)).output for text in found)


# --------------------------------------------------------------------------------------------------------- commands


class Parsed(Exception):
    """A command line was understood; the command itself is not to run."""


def parse_module(module: str, arguments: list[str], monkeypatch):
    """Runs a module until its arguments are parsed."""
    whole = argparse.ArgumentParser.parse_args

    def parse_args(parser, *given, **keywords):
        whole(parser, *given, **keywords)
        raise Parsed

    with monkeypatch.context() as changed, pytest.raises(Parsed):
        changed.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        changed.setattr(sys, "argv", [module, *arguments])
        for name in (module, f"{module}.__main__"):
            changed.delitem(sys.modules, name, raising=False)
        runpy.run_module(module, run_name="__main__")


def check_python(arguments: list[str], monkeypatch):
    assert arguments[0] == "-m", arguments
    module, rest = arguments[1], arguments[2:]
    if (module, *rest[:1]) == ("mome.convert", "mome") or "--dry-run" in rest:
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif module in ("mome.training", "mome.training.finetune"):
        Recipe.from_command_line(rest)
    else:
        parse_module(module, rest, monkeypatch)


def check_accelerate(arguments: list[str], monkeypatch):
    assert arguments[0] == "launch"
    options = launch_command_parser().parse_args(arguments[1:])
    assert options.module
    check_python(["-m", options.training_script, *options.training_script_args], monkeypatch)


def check_mome(arguments: list[str], monkeypatch):
    group = typer.main.get_command(cli.app)
    if any(option in arguments for option in PARSED_ONLY):
        command = group.commands[arguments[0]]
        command.make_context(arguments[0], arguments[1:])
        return
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, (arguments, result.output)


def check_pip(arguments: list[str], monkeypatch):
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert arguments[:2] == ["install", "-e"], "there is no release yet: install from a clone"
    (extras,) = re.fullmatch(r"\.\[([\w,-]+)\]", arguments[2]).groups()
    assert set(extras.split(",")) <= known.keys()


def check_make(arguments: list[str], monkeypatch):
    makefile = (ROOT / "Makefile").read_text()
    target, *variables = arguments
    assert f"\n{target}:" in makefile and all(f"$({each.split('=')[0]})" in makefile for each in variables)


CHECKS = {
    "accelerate": check_accelerate,
    "make": check_make,
    "mome": check_mome,
    "pip": check_pip,
    "python": check_python,
}


@pytest.mark.parametrize("name", [name for name in TEXTS if commands(name)])
def test_commands_are_understood_and_those_of_mome_run(name, clone, monkeypatch):
    for block in blocks("docs/training.md", "yaml"):
        (clone / "recipe.yaml").write_text(block)
    for command in commands(name):
        words = shlex.split(command, comments=True)
        CHECKS[words[0]](words[1:], monkeypatch)
    if name == "README.md":
        page = (clone / "hits.html").read_text()
        assert "headphones" in page and page.count("<figure>") == 5


def test_every_file_in_a_command_is_there():
    tops = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")} - {"runs"}
    named = [word for name in TEXTS for command in commands(name) for word in shlex.split(command, comments=True)]
    paths = [word for word in named if word.split("/")[0] in tops and not word.startswith("mome")]
    assert len(paths) > 10
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_make_targets_in_texts_exist():
    makefile = (ROOT / "Makefile").read_text()
    for name, text in TEXTS.items():
        for target in set(re.findall(r"`make ([a-z-]+)", text)):
            assert f"\n{target}:" in makefile, (name, target)


# ------------------------------------------------------------------------------------------------------------ links


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", TEXTS)
def test_every_link_leads_somewhere(name):
    links = re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", TEXTS[name]))
    for link in links:
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), f"{name}: {link}"
        assert not anchor or anchor in anchors(target.read_text()), f"{name}: {link}"


@pytest.mark.parametrize("name", [*DOCS, "CONTRIBUTING.md", *CARDS])
def test_paths_and_modules_in_words_exist(name):
    words = re.findall(r"`([^`\n]+)`", BLOCK.sub("", TEXTS[name]))
    tops = {path.name for path in ROOT.iterdir()}
    paths = [word for word in words if re.fullmatch(r"[\w.\-]+(/[\w.\-]*)+", word) and word.split("/")[0] in tops]
    assert not [path for path in paths if not (ROOT / path).exists()]
    modules = [module for word in words for module in re.findall(r"\bmome(?:\.[a-z_]+)+", word)]
    for module in modules:
        path = ROOT.joinpath(*module.split(".")[1:])
        found = path.with_suffix(".py").exists() or path.is_dir() or path.parent.with_suffix(".py").exists()
        assert found or path.parent.is_dir() and path.parent != ROOT, f"{name}: {module}"


def test_every_page_of_the_docs_is_reached_from_the_readme():
    assert not [name for name in DOCS[1:] if f"]({name})" not in TEXTS["README.md"]]
