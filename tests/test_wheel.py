"""The wheel: what is in it, and what a base install of it answers, in an environment that holds nothing else."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from mome.errors import EXTRAS, missing_package

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRA_REQUIREMENTS = PROJECT["project"]["optional-dependencies"]
# Rooms that a clone has and the wheel hasn't: they need files that are not installed.
NOT_INSTALLED = {"benchmarks", "checkpoints", "docs", "samples", "space", "space-static", "tests"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, which leaves nothing in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    left_out = shutil.ignore_patterns(".*", "build", "runs", "checkpoints", "samples", "*.egg-info", "__pycache__")
    source = shutil.copytree(ROOT, folder / "source", ignore=left_out)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*build, "-w", folder, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (made,) = folder.glob("*.whl")
    return made


def required(names: list[str]) -> set[str]:
    """The installed distributions that these requirements need, and what those need in turn."""
    found, waiting = set(), [Requirement(name) for name in names]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if name in found or not needed:
            continue
        found.add(name)
        waiting += map(Requirement, importlib.metadata.requires(name) or [])
    return found


@pytest.fixture(scope="module")
def base_install(wheel, tmp_path_factory) -> Path:
    """The folder of commands of an environment with the wheel and its base dependencies alone, linked from here."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    for name in required(PROJECT["project"]["dependencies"]):
        distribution = importlib.metadata.distribution(name)
        tops = {path.parts[0] for path in distribution.files if path.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            if not (packages / top).exists():
                (packages / top).symlink_to(distribution.locate_file(top))
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    done = subprocess.run(install, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "bin"


def answer(base_install: Path, cwd: Path, *command: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [base_install / command[0], *command[1:]], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_the_wheel_holds_every_package_and_what_lies_beside_the_code(wheel):
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
        metadata = opened.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    code = {path for path in listed if path.endswith(".py") and path.split("/")[0] not in NOT_INSTALLED}
    data = {path for path in listed if re.fullmatch(r"training/recipes/.*\.yaml|icons/(card\.md|nouns\.txt)", path)}
    assert len(data) > 8
    missing = {path for path in code | data if (ROOT / path).exists() and f"mome/{path}" not in names}
    assert not missing
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert (ROOT / "README.md").read_text().strip() in metadata.replace("\r\n", "\n")
    others = {name.split("/")[1] for name in names if name.startswith("mome/")} & NOT_INSTALLED
    assert not others


def test_a_base_install_answers_help_and_version(base_install, tmp_path):
    for command in (("mome",), ("python", "-m", "mome")):
        shown = answer(base_install, tmp_path, *command, "--help")
        assert shown.returncode == 0 and not shown.stderr, shown.stderr
        assert all(name in shown.stdout for name in ("embed", "search", "caption", "classify", "--version"))
        version = answer(base_install, tmp_path, *command, "--version")
        assert version.returncode == 0 and not version.stderr
        assert version.stdout == f"mome {PROJECT['project']['version']}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("search", "table.parquet", "a dog"), 'is not installed: pip install -e ".[retrieval]"'),
        (("embed", "pictures", "-o", "table.parquet"), 'is not installed: pip install -e ".[retrieval]"'),
        (("caption", "a.png"), "no model: pass --model FOLDER or a Hub id"),
        (("classify", "a.png", "--labels", "a,b"), "no model: pass --model FOLDER or a Hub id"),
        (("caption", "a.png", "--model", "nowhere/at-all"), "nowhere/at-all"),
    ],
)
def test_what_a_base_install_lacks_is_one_line(base_install, tmp_path, arguments, message):
    refused = answer(base_install, tmp_path, "mome", *arguments)
    assert refused.returncode == 1 and not refused.stdout
    (line,) = refused.stderr.splitlines()
    assert line.startswith("mome: ") and message in line


@pytest.mark.parametrize(
    ("module", "extra"),
    [
        ("mome.training", "training"),
        ("mome.experiments.guidance", "eval"),
        ("mome.icons.build", "icons"),
    ],
)
def test_a_module_that_a_base_install_can_not_run_is_one_line(base_install, tmp_path, module, extra):
    refused = answer(base_install, tmp_path, "python", "-m", module, "--help")
    assert refused.returncode == 1 and not refused.stdout
    assert re.fullmatch(rf'{module}: \w+ is not installed: pip install -e "\.\[({extra})\]"\n', refused.stderr)


@pytest.mark.parametrize("module", ["mome.convert", "mome.quickstart", "mome.training.average"])
def test_a_base_install_runs_the_modules_that_need_no_extra(base_install, tmp_path, module):
    shown = answer(base_install, tmp_path, "python", "-m", module, "-h")
    assert shown.returncode == 0 and shown.stdout.startswith("usage: ") and not shown.stderr


def test_a_base_install_captions(base_install, tmp_path):
    model, picture = ROOT / "checkpoints" / "mome-icons", ROOT / "samples" / "eye.png"
    done = answer(base_install, tmp_path, "mome", "caption", str(picture), "--model", str(model), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["results"][0]["generated_text"]


def test_a_wrong_command_line_has_status_2(base_install, tmp_path):
    wrong = answer(base_install, tmp_path, "mome", "serch")
    assert wrong.returncode == 2 and "No such command 'serch'" in wrong.stderr


# ------------------------------------------------------------------------------------------------- extras and Python


def test_the_table_of_extras_agrees_with_the_project():
    imported_as = importlib.metadata.packages_distributions()
    by_distribution: dict[str, set[str]] = {}
    for module, distributions in imported_as.items():
        for name in distributions:
            by_distribution.setdefault(canonicalize_name(name), set()).add(module)
    assert EXTRAS.keys() == EXTRA_REQUIREMENTS.keys() - {"all", "test"}
    (everything,) = map(Requirement, EXTRA_REQUIREMENTS["all"])
    assert everything.name == "mome" and everything.extras == EXTRAS.keys()
    for extra, modules in EXTRAS.items():
        wanted = [Requirement(each) for each in EXTRA_REQUIREMENTS[extra] if not each.startswith("mome[")]
        own = {canonicalize_name(each.name): each for each in wanted}
        named = {name: by_distribution.get(name, {name.replace("-", "_")}) for name in own}
        for name, possible in named.items():
            assert possible & set(modules), f"{extra}: {name} is imported as {possible}"
        parts = {part for each in wanted for part in each.extras}  # daft[ray]
        for each in map(Requirement, EXTRA_REQUIREMENTS[extra]):
            parts |= {module for part in each.extras if each.name == "mome" for module in EXTRAS[part]}  # mome[svg]
        for module in modules:
            assert any(module in possible for possible in named.values()) or module in parts, f"{extra}: {module}"


def test_every_requirement_has_a_lower_bound_and_is_installed_within_its_range():
    """`make test-oldest` installs the lower bounds themselves: what is promised is what was tested."""
    named = [*PROJECT["project"]["dependencies"], *sum(EXTRA_REQUIREMENTS.values(), [])]
    bounds = {}
    for requirement in map(Requirement, named):
        if requirement.name == "mome":
            continue
        (bound,) = [each.version for each in requirement.specifier if each.operator == ">="]
        assert bounds.setdefault(requirement.name, bound) == bound, f"{requirement.name} has two lower bounds"
        installed = Version(importlib.metadata.version(requirement.name))
        assert requirement.specifier.contains(installed), f"{requirement}: {installed} is installed"
        if Path(sys.prefix).name == ".venv-oldest":
            assert Version(installed.public) == Version(bound), f"{requirement}: {installed} is installed"


@pytest.mark.parametrize(
    ("module", "asked", "line"),
    [
        ("pyarrow.parquet", "retrieval", 'pyarrow is not installed: pip install -e ".[retrieval]"'),
        ("pyarrow", "icons", 'pyarrow is not installed: pip install -e ".[icons]"'),
        ("daft", "retrieval", 'daft is not installed: pip install -e ".[daft]"'),
        ("ray", "retrieval", 'ray is not installed: pip install -e ".[daft]"'),
        ("pymilvus", None, 'pymilvus is not installed: pip install -e ".[milvus]"'),
        ("yaml", None, 'yaml is not installed: pip install -e ".[training]"'),
        ("unheard_of", "retrieval", "unheard_of is not installed: pip install unheard_of"),
    ],
)
def test_a_missing_package_is_blamed_on_the_extra_that_has_it(module, asked, line):
    assert missing_package(ModuleNotFoundError(name=module), asked) == line


@pytest.mark.parametrize("target", ["quickstart", "test-oldest", "test-newest"])
def test_make_refuses_an_older_python_in_one_line(tmp_path, target):
    older = tmp_path / "python3.10"
    pretence = "import sys; sys.version_info = (3, 10, 4); sys.version = '3.10.4 (main)'; exec(sys.argv[2])"
    older.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{pretence}" "$@"\n')
    older.chmod(0o755)
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    # `make test` may have started this: its variables would make the inner one tell its folder.
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", target, f"PYTHON={older}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=outside)
    line, of_make = done.stderr.splitlines()
    assert done.returncode == 2 and not done.stdout and of_make.startswith("make: ***")
    assert line == f"Python 3.11 or newer is needed, PYTHON={older} is 3.10.4"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "Makefile",
        "constraints.txt",
        "pyproject.toml",
        "python3.10",
    ]
