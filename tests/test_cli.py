"""How commands behave in a shell: pipes, Ctrl-C, encodings, odd names, folders, missing packages, statuses."""

import json
import logging as standard_logging
import os
import signal
import subprocess
import sys
import time

import datasets
import pytest
import typer.main
from PIL import Image
from transformers.utils import logging
from typer.testing import CliRunner

from mome import cli, commands
from mome.benchmarks import table as results_tables
from mome.errors import DataError
from mome.training import average
from retrieval_corpora import make_pictures, save_checkpoint

COMMANDS = sorted(typer.main.get_command(cli.app).commands)
LABELS = ("--labels", "red,blue")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`model`, a checkpoint; `pictures`, with what is not a picture; `odd`, files with names that terminals hate."""
    folder = tmp_path_factory.mktemp("cli")
    save_checkpoint(folder / "model")
    (first, *_) = make_pictures(folder / "pictures", 6)
    (folder / "pictures" / "red" / "broken.PNG").write_bytes(b"no picture")
    (folder / "pictures" / "dead.png").symlink_to(folder / "nowhere.png")
    for name in ("notes.txt", ".hidden.png", "paper.pdf"):
        (folder / "pictures" / name).write_bytes(first.read_bytes())
    (folder / "odd").mkdir()
    (folder / "empty").mkdir()
    for name in (b"\xff.png", b"two\nlines.png", "é\u2028.png".encode(), b"-x.png"):
        with open(os.path.join(os.fsencode(folder / "odd"), name), "wb") as file:
            file.write(first.read_bytes())
    return folder


@pytest.fixture
def invoke(folder):
    def run(*arguments, status=0):
        result = CliRunner().invoke(cli.app, [str(each) for each in arguments])
        assert result.exit_code == status, (result.output, result.exception)
        assert "Traceback" not in result.output
        return result

    return run


def start(*arguments, module: str = "mome", cwd=None, **environment) -> subprocess.Popen:
    """`python -m module` with arguments; its output is bytes."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": cwd}
    return subprocess.Popen(command, env={**os.environ, **environment}, **pipes)


# ---------------------------------------------------------------------------------------------------- command lines


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_h_and_help_are_the_same_and_name_every_option(invoke, command):
    short, long = invoke(*command, "-h"), invoke(*command, "--help")
    assert short.stdout == long.stdout and not short.stderr and short.stdout.isascii()
    group = typer.main.get_command(cli.app)
    known = group.commands[command[0]] if command else group
    assert all(option in short.stdout for parameter in known.params for option in parameter.opts if "-" in option)


def test_a_wrong_command_line_has_status_2_and_a_hint(invoke):
    assert "'search'" in invoke("serch", status=2).stderr
    hinted = invoke("caption", "a.png", "--numcaptions", 2, status=2)
    assert "--num-captions" in hinted.stderr and not hinted.stdout
    assert "labels" in invoke("classify", "a.png", status=2).stderr
    assert "--num-captions" in invoke("caption", "a.png", "-n", 0, status=2).stderr


@pytest.mark.parametrize(
    ("model", "message"),
    [("/no/such", "no such folder"), ("./none", "no such folder"), ("none", "OWNER/NAME"), (__file__, "is a file")],
)
@pytest.mark.parametrize("command", ["caption", "classify", "embed"])
def test_a_model_that_is_not_there_is_one_line_at_once(invoke, folder, tmp_path, command, model, message):
    more = {"classify": LABELS, "embed": ("-o", tmp_path / "table.parquet")}.get(command, ())
    begun = time.perf_counter()
    (line,) = invoke(command, folder / "pictures", "-m", model, *more, status=1).stderr.splitlines()
    assert line.startswith("mome: ") and repr(model) in line and message in line
    assert time.perf_counter() - begun < 10  # no network was asked


# ---------------------------------------------------------------------------------------------------- files, folders


def test_a_folder_stands_for_the_images_in_and_below_it(invoke, folder):
    pictures = folder / "pictures"
    again = sorted(pictures.glob("red/*.png"))[0]
    arguments = ("classify", pictures, again, *LABELS, "--model", folder / "model", "--json")
    result = invoke(*arguments, status=1)
    shown = [json.loads(line)["file"] for line in result.stdout.splitlines()]
    readable = [path for path in pictures.rglob("*.png") if path.exists() and not path.name.startswith(".")]
    assert shown == sorted(map(str, readable)) and len(shown) == 6
    assert len(result.stderr.splitlines()) == 2  # each bad file once
    assert result.stderr.count("broken.PNG") == 1 and result.stderr.count("dead.png") == 1
    one_by_one = ("classify", *shown, *LABELS, "--model", folder / "model", "--json")
    assert invoke(*one_by_one).stdout == result.stdout


def test_a_folder_without_images_is_refused(invoke, folder):
    (line,) = invoke("caption", folder / "empty", "--model", folder / "model", status=1).stderr.splitlines()
    assert line.startswith(f"mome: no image in folder '{folder / 'empty'}'")


def test_a_bad_file_is_told_once_by_the_process_too(folder):
    broken = folder / "pictures" / "red" / "broken.PNG"
    process = start("classify", broken, broken, *LABELS, "--model", folder / "model")
    output, errors = process.communicate()
    assert process.returncode == 1 and not output
    (line,) = errors.decode().splitlines()
    assert line.startswith("mome: ") and str(broken) in line


# ------------------------------------------------------------------------------------------------ pipes and signals


def test_a_reader_that_stops_ends_the_command_quietly(folder):
    pictures = sorted((folder / "pictures").glob("*/*.png"))
    process = start("classify", *pictures, *LABELS, "--model", folder / "model")
    process.stdout.close()  # before the first line: one that is read may be followed by the rest at once
    assert process.stderr.read() == b"" and process.wait() == commands.UNREAD


def test_embed_names_the_first_five_files_that_it_could_not_read(folder, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (8, 8), "red").save(pictures / "good.png")
    for number in range(7):
        (pictures / f"bad-{number}.png").write_bytes(b"no picture")
    process = start("embed", pictures, "--output", tmp_path / "table.parquet", "--model", folder / "model")
    output, errors = (each.decode() for each in process.communicate())
    named = [line for line in errors.splitlines() if line.startswith("mome: ")]
    assert named == [f"mome: bad-{number}.png: not an image that Pillow can read" for number in range(5)]
    assert "7 could not be read (see " in output and process.returncode == 0


WAITING = """
import sys, time
from mome import cli

def wait(model):  # what takes long is made to take for ever
    print("begun", flush=True)
    time.sleep(600)

cli.checkpoint = wait
cli.main()
"""


@pytest.fixture
def ctrl_c():
    """Commands take Ctrl-C, also where the tests run as a shell's background job, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("classify", "a.png", *LABELS), "mome: interrupted"),
        (("embed", "pictures", "-o", "t.parquet"), "mome: interrupted; run the same command again to resume"),
    ],
)
def test_ctrl_c_is_one_line(arguments, line, tmp_path, ctrl_c):
    command = [sys.executable, "-c", WAITING, *arguments]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate()
    assert errors == f"{line}\n" and not output and process.returncode == commands.INTERRUPTED


def test_ctrl_c_while_python_still_imports_is_one_line(ctrl_c):
    process = start("--help", PYTHONUNBUFFERED="1", PYTHONVERBOSE="1")
    for line in process.stderr:  # -v tells of every import
        if b"import 'torch" in line:
            break
    process.send_signal(signal.SIGINT)
    errors = process.stderr.read().decode(errors="replace")
    assert "mome: interrupted" in errors and "Traceback" not in errors
    assert process.wait() == commands.INTERRUPTED


# ------------------------------------------------------------------------------------------------ names and encodings


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_odd_names_are_printed_in_any_encoding(folder, encoding):
    names = sorted(os.listdir(folder / "odd"), key=os.fsencode)
    shown = {
        "-x.png": "-x.png",
        "two\nlines.png": "two\\nlines.png",
        "\udcff.png": "\\udcff.png",
        "é\u2028.png": "\\xe9\\u2028.png" if encoding == "ascii" else "é\\u2028.png",
    }
    options = (*LABELS, "--top-k", 1, "--model", folder / "model")
    for form in ((), ("--json",)):
        process = start("classify", *options, *form, "--", *names, cwd=folder / "odd", PYTHONIOENCODING=encoding)
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        lines = output.decode(encoding).split("\n")[:-1]
        if form:
            assert [json.loads(line)["file"] for line in lines] == names
        else:
            assert [line.split(": ")[0] for line in lines] == [shown[name] for name in names]


def test_files_whose_names_no_table_can_hold_are_counted(folder, invoke, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets-cache"))
    done = invoke("embed", folder / "odd", "-o", tmp_path / "table.parquet", "--model", folder / "model")
    assert ": 3 images embedded, 0 could" in done.stdout and "1 files whose names are not UTF-8" in done.stdout
    found = invoke("search", tmp_path / "table.parquet", "red").stdout.splitlines()
    assert sorted(line.split("  ")[2] for line in found) == ["-x.png", "two\\nlines.png", "é\\u2028.png"]
    assert done.stdout.count("\n") == 1


def test_bytes_of_a_name_come_back_where_the_terminal_takes_them(folder):
    options = (*LABELS, "--model", folder / "model")
    process = start("classify", folder / "odd", *options, PYTHONIOENCODING="utf-8:surrogateescape")
    output, _ = process.communicate()
    assert os.fsencode(folder / "odd") + b"/\xff.png: " in output


# ------------------------------------------------------------------------------------------------ what libraries say


@pytest.mark.parametrize("wanted", [None, "error", "info"])
def test_transformers_verbosity_is_obeyed(wanted, monkeypatch):
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY", raising=False)
    if wanted:
        monkeypatch.setenv("TRANSFORMERS_VERBOSITY", wanted)
    before, seen = logging.get_verbosity(), []
    monkeypatch.setattr(cli, "pipeline", lambda *_, **__: seen.append(logging.get_verbosity()))
    cli._load("image-captioning", "folder")
    assert seen == [before if wanted else standard_logging.ERROR] and logging.get_verbosity() == before
    with cli._quiet_pipeline():
        assert not logging.is_progress_bar_enabled() and logging.get_verbosity() == before
    if wanted == "error":
        code = "import logging, mome; print(logging.getLogger('mome.processing_mome').getEffectiveLevel())"
        told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert int(told) == standard_logging.ERROR


# -------------------------------------------------------------------------------------------------- python -m mome.x


@pytest.mark.parametrize(
    ("argv", "original", "command"),
    [
        (["-m", "a"], ["python", "-m", "mome.training", "a"], "mome.training"),
        (["-m"], ["python", "-X", "dev", "-mmome"], "mome"),
        (["-m", "-h"], ["python", "-m", "mome.convert.__main__", "-h"], "mome.convert"),
        (["/usr/bin/mome", "embed"], ["python", "/usr/bin/mome", "embed"], "mome"),
        (["-m", "mome"], ["python", "-m", "pytest", "mome"], None),
        (["train.py", "-m"], ["python", "train.py", "-m"], None),
        (["/code/mome.py"], ["python", "/code/mome.py"], None),
        (["-c"], ["python", "-c", "import mome"], None),
    ],
)
def test_a_command_knows_its_name_and_a_program_is_none(argv, original, command, monkeypatch):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", original)
    assert commands.running() == command


@pytest.mark.parametrize(
    ("command", "error", "line"),
    [
        (
            "mome",
            ModuleNotFoundError(name="pyarrow.parquet"),
            'pyarrow is not installed: pip install -e ".[retrieval]"',
        ),
        ("mome.training", ModuleNotFoundError(name="tqdm"), 'tqdm is not installed: pip install -e ".[training]"'),
        ("mome.experiments.icons", ModuleNotFoundError(name="tqdm"), 'pip install -e ".[eval]"'),
        ("mome.icons.build", ModuleNotFoundError(name="resvg_py"), 'pip install -e ".[icons]"'),
        ("mome.benchmarks.inference", ModuleNotFoundError(name="torchscale"), "-r benchmarks/requirements.txt"),
        ("mome.benchmarks.retrieval", ModuleNotFoundError(name="datasets"), 'pip install -e ".[retrieval]"'),
        ("mome.experiments.guidance", DataError("no column 'text'"), "no column 'text'"),
        ("mome.experiments.guidance", FileNotFoundError(2, "No such file", "a.csv"), "'a.csv'"),
        ("mome.experiments.guidance", OSError("nope is no model\nmore"), "nope is no model"),
        ("mome.convert", KeyboardInterrupt(), "interrupted"),
    ],
)
def test_what_ends_a_command_is_one_line(command, error, line, capsys):
    assert commands.explain(command, error) in (commands.FAILED, commands.INTERRUPTED)
    said = capsys.readouterr()
    assert said.err.startswith(f"{command}: ") and said.err.endswith(f"{line}\n") and said.err.count("\n") == 1
    assert not said.out


@pytest.mark.parametrize("error", [ValueError("a bug"), ModuleNotFoundError(name="mome.gone"), OSError(28, "full")])
def test_a_mistake_of_ours_keeps_its_traceback(error, capsys):
    assert commands.explain("mome.training", error) is None
    assert capsys.readouterr() == ("", "")


def test_a_pipe_that_is_not_stdout_is_no_reason_to_be_quiet(capfd):
    assert commands.explain("mome.publish", BrokenPipeError(32, "Broken pipe")) is None


def test_asking_for_help_writes_no_tables(monkeypatch, capsys):
    monkeypatch.setattr(results_tables, "filled", lambda rows: pytest.fail("tables were made"))
    with pytest.raises(SystemExit) as left:
        results_tables.main(["--help"])
    assert left.value.code == 0 and "results.csv" in capsys.readouterr().out


def test_a_mean_of_what_is_not_there_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        average.main(["nowhere", "--output", str(tmp_path / "mean")])
    *_, line = capsys.readouterr().err.splitlines()
    assert left.value.code == 2 and "'nowhere' is no checkpoint" in line and not (tmp_path / "mean").exists()
