"""transformers' own model, config and processor tests, of the version that is installed.

`pip install transformers` leaves its tests out; the source distribution of the same version holds those that concern
every model. They are fetched once, into a folder that git ignores, as a package `transformers_tests`:

    .cache/peer_suite/<version>/transformers_tests/test_modeling_common.py     ModelTesterMixin
                                                   test_configuration_common.py    ConfigTester
                                                   test_processing_common.py       ProcessorTesterMixin
                                                   exporters, generation, utils    stubs: not in the distribution
                                utils/fetch_hub_objects_for_ci.py              a stub as well
"""

import importlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "peer_suite"
PACKAGE = "transformers_tests"
SOURCES = ("test_modeling_common.py", "test_configuration_common.py", "test_processing_common.py")

# What the sources import from files that the distribution leaves out.
STUBS = {
    f"{PACKAGE}/__init__.py": "",
    f"{PACKAGE}/exporters/__init__.py": "",
    f"{PACKAGE}/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    f"{PACKAGE}/generation/__init__.py": "",
    f"{PACKAGE}/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    f"{PACKAGE}/utils/__init__.py": "",
    # Arguments that any config takes, each with another value than its default.
    f"{PACKAGE}/utils/test_configuration_utils.py": """config_common_kwargs = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["MomeModel"],
    "id2label": {0: "label"},
    "label2id": {"label": "0"},
    "problem_type": "regression",
}
""",
    "utils/fetch_hub_objects_for_ci.py": "def url_to_local_path(url):\n    return url\n",
}


def fetch_peer_suite() -> Path:
    """The folder with the tests of the installed transformers, fetched if it is not there yet.

    Raises:
        RuntimeError: the source distribution cannot be had.
    """
    installed = version("transformers")
    folder = CACHE / installed
    if not folder.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            unpacked = _unpack(_download(installed, Path(scratch)), Path(scratch) / "unpacked")
            try:
                os.replace(unpacked, folder)
            except OSError:  # another test process was first
                if not folder.is_dir():
                    raise
    _write_stubs(folder)
    return folder


def load(module: str) -> ModuleType:
    """One of `SOURCES`, imported: `load("test_modeling_common").ModelTesterMixin`."""
    folder = str(fetch_peer_suite())
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(f"{PACKAGE}.{module}")


def _download(installed: str, target: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", f"transformers=={installed}", "--dest", str(target)]
    command += ["--no-deps", "--no-binary", "transformers", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True)
    archive = target / f"transformers-{installed}.tar.gz"
    if done.returncode or not archive.is_file():
        reason = (done.stderr.strip() or done.stdout.strip() or "no archive").splitlines()[-1]
        raise RuntimeError(
            f"transformers' test suite: can't download the source distribution of transformers {installed}: {reason}"
        )
    return archive


def _unpack(archive: Path, folder: Path) -> Path:
    tests = folder / PACKAGE
    tests.mkdir(parents=True)
    with tarfile.open(archive) as files, tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        prefix = archive.name.removesuffix(".tar.gz")
        members = [files.getmember(f"{prefix}/tests/{name}") for name in SOURCES]
        files.extractall(scratch, members=members, filter="data")
        for name in SOURCES:
            shutil.move(Path(scratch) / prefix / "tests" / name, tests / name)
    return folder


def _write_stubs(folder: Path):
    for name, text in STUBS.items():
        path = folder / name
        if path.is_file() and path.read_text() == text:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_text(text)
        os.replace(unfinished, path)


if __name__ == "__main__":
    try:
        print(fetch_peer_suite())
    except RuntimeError as error:
        sys.exit(str(error))
