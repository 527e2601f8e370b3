"""The house: imports go up the list in CONTRIBUTING.md, in no circle, and no file or function outgrows its reader."""

import ast
import re
import subprocess
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = ("tests", "checkpoints")  # tests import everything; checkpoints hold links to the flat files
LONGEST_FILE, LONGEST_FUNCTION, MOST_PARAMETERS = 600, 60, 9
# Where splitting would hurt: (file, function) -> why.
LONG_FUNCTIONS: dict[tuple[str, str], str] = {}
MANY_PARAMETERS: dict[tuple[str, str], str] = {
    ("benchmarks/layouts.py", "vlmo_shapes"): "every size that a VLMo file can have, by keyword",
    ("cli.py", "embed"): "each is an option of the command",
    ("cli.py", "search"): "each is an option of the command",
    ("icons/compose.py", "compose_icons"): "an augmentation: its keywords are what a recipe may set",
    ("modeling_coca.py", "forward"): "the keywords that transformers passes to a model that generates",
    ("modeling_mome.py", "forward"): "the keywords that transformers passes to a model that generates",
}


@cache
def sources() -> dict[str, Path]:
    """Module name, such as `mome.data.images`, → file."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [Path(line) for line in listed.split() if Path(line).parts[0] not in OUTSIDE]
    return {module_name(path): ROOT / path for path in files if (ROOT / path).is_file()}


def module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(("mome", *parts[:-1], *(() if parts[-1] == "__init__" else parts[-1:])))


def imports_of(name: str, path: Path) -> list[tuple[str, bool]]:
    """(project module, whether the import stands at the module's top level) of a file."""
    tree, found = ast.parse(path.read_text()), []
    top_level = set(map(id, tree.body))
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            targets = [".".join([*base, alias.name]) for alias in node.names]
            # A name of a module, or a module of a package.
            modules = [target if target in sources() else ".".join(base) for target in targets]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            continue
        found += [(module, id(node) in top_level) for module in modules if module in sources() and module != name]
    return found


@cache
def listed() -> dict[str, int]:
    """What the tree in CONTRIBUTING.md names, root files and rooms, by its place from the top."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    tree = re.search(r"<!-- tree -->\n```\n(.*?)```", text, re.DOTALL).group(1)
    names = re.findall(r"^(?:  )?([\w./-]+)", tree, re.MULTILINE)
    return {name: place for place, name in enumerate(names) if "/" not in name.rstrip("/")}


def room_of(module: str) -> str:
    """The line of the list that a module belongs to: `data/`, or `errors.py`."""
    parts = module.split(".")
    if len(parts) == 1:
        return "__init__.py"
    return f"{parts[1]}/" if (ROOT / parts[1]).is_dir() else f"{parts[1]}.py"


@pytest.mark.parametrize("module", sources())
def test_no_import_goes_down_the_list(module):
    own = listed()[room_of(module)]
    if module == "mome":
        return  # gathers the names of the package
    for imported, _ in imports_of(module, sources()[module]):
        if imported == "mome" or room_of(imported) == room_of(module):
            continue
        place = listed()[room_of(imported)]
        assert place < own, f"{module} imports {imported}, which stands below it in CONTRIBUTING.md"


def test_no_import_goes_in_a_circle():
    graph = {
        module: {imported for imported, _ in imports_of(module, path) if imported != "mome"}
        for module, path in sources().items()
        if module != "mome"
    }
    # A package's __init__ imports its modules, which may not import it in turn.
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("circle: " + " → ".join(error.args[1]))


def test_the_tree_in_contributing_names_every_file_and_nothing_else():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    tree = re.search(r"<!-- tree -->\n```\n(.*?)```", text, re.DOTALL).group(1)
    for name in listed():
        assert (ROOT / name).exists(), f"CONTRIBUTING.md names {name}, which is not there"
    for module, path in sources().items():
        if path.name != "__init__.py" or path.parent == ROOT:
            assert re.search(rf"\b{re.escape(path.name)}\b", tree), f"CONTRIBUTING.md does not name {module}"


@pytest.mark.parametrize("module", sources())
def test_no_file_and_no_function_outgrows_its_reader(module):
    text = sources()[module].read_text()
    name = sources()[module].relative_to(ROOT).as_posix()
    assert text.count("\n") <= LONGEST_FILE, f"{name} has {text.count(chr(10))} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= LONGEST_FUNCTION or (name, node.name) in LONG_FUNCTIONS, (
                f"{name}: {node.name}, {lines} lines"
            )
            arguments = node.args
            number = len(arguments.posonlyargs + arguments.args + arguments.kwonlyargs)
            number -= bool(arguments.args) and arguments.args[0].arg in ("self", "cls")
            excused = (name, node.name) in MANY_PARAMETERS
            assert number <= MOST_PARAMETERS or excused, f"{name}: {node.name}, {number} parameters"


def test_every_excuse_is_still_needed():
    functions = {
        (path.relative_to(ROOT).as_posix(), node.name): node
        for path in sources().values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    for key in LONG_FUNCTIONS:
        assert functions[key].end_lineno - functions[key].lineno + 1 > LONGEST_FUNCTION, key
    for key in MANY_PARAMETERS:
        assert len(functions[key].args.args + functions[key].args.kwonlyargs) > MOST_PARAMETERS, key
