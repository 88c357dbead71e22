"""The layout: what each part may import and know, and how large it may be."""

import ast
import re
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.models import MODEL_REGISTRY
from fairseq.optim import OPTIMIZER_REGISTRY
from fairseq.tasks import TASK_REGISTRY
from toolkit import ROOT

import smart_fairseq  # noqa: F401  registers its names

PACKAGE = ROOT / "smart_fairseq"
METHOD = sorted((PACKAGE / "method").glob("*.py"))
FILES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").glob("*.py"))
LONGEST_FILE = 400
LARGEST_FOLDER = 1 / 4
# whose business an encoder's insides are: the seam, other formats, and the models themselves
KNOW_AN_ENCODER = ("encoder/", "models/", "convert/", "export", "import_hf")


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else path.name


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def imports(path: Path) -> set[str]:
    """Top-level modules that a file imports; relative imports by their dots and name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or "").split(".")[0])
    return found


def code_of(path: Path) -> str:
    """A file's source without comments and strings that stand alone, which may speak of anything."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            node.value.value = ""
    return ast.unparse(tree)


# --- who imports whom ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", METHOD, ids=name_of)
def test_mathematics_imports_torch_alone(path: Path) -> None:
    siblings = {"." + other.stem for other in METHOD}
    assert imports(path) <= {"torch", *sys.stdlib_module_names, *siblings}


def test_there_is_mathematics_to_hold_to_that() -> None:
    assert {"divergence.py", "adversary.py", "teacher.py"} <= {path.name for path in METHOD}


@pytest.mark.parametrize("path", sorted((PACKAGE / "data").glob("*.py")), ids=name_of)
def test_data_imports_no_part_that_imports_it(path: Path) -> None:
    assert {name for name in imports(path) if name.startswith("..")} <= {"..errors", "..files"}


def loaded_with(path: Path) -> set[str]:
    """The package's parts, folders or modules beside them, that a file imports when it is loaded."""
    inside, found = path.relative_to(PACKAGE).parts[:-1], set()
    todo: list[ast.stmt] = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If | ast.Try | ast.With):
            todo += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
        elif isinstance(node, ast.ImportFrom) and node.level:
            start = inside[: len(inside) - node.level + 1]
            parts = [*start, *(node.module or "").split(".")] if node.module else list(start)
            found |= {parts[0]} if parts else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("smart_fairseq."):
            found.add((node.module or "").split(".")[1])
    return found - {*inside[:1], path.stem}


def test_no_two_parts_import_each_other() -> None:
    """Nor by way of others: there is an order in which each part can be read after those that it needs."""
    needs: dict[str, set[str]] = {}
    for path in FILES:
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        needs.setdefault(part, set()).update(loaded_with(path))
    assert {"terms", "training", "optim"} <= needs.keys() and "config" in needs["optim"]
    order = list(TopologicalSorter(needs).static_order())
    assert order.index("method") < order.index("terms") < order.index("training") < order.index("criterions")


@pytest.mark.parametrize("path", TESTS, ids=name_of)
def test_no_test_file_imports_another(path: Path) -> None:
    """What two of them need stands in a file that is no test's."""
    assert not [module for module in imports(path) if module.startswith("test_")]


# --- who knows what --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [p for p in FILES if not name_of(p).startswith(KNOW_AN_ENCODER)], ids=name_of)
def test_an_encoders_insides_are_known_in_one_place(path: Path) -> None:
    code = code_of(path)
    assert not re.search(r"sentence_encoder|embed_tokens|\.module\b|\"module\"|'module'", code)


@pytest.mark.parametrize(
    "path", [p for p in FILES if name_of(p).startswith(("config/", "training/", "terms/", "criterions/"))], ids=name_of
)
def test_configurations_have_types(path: Path) -> None:
    assert not re.search(r"\b(cfg|config|flags|settings): Any\b", code_of(path))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_postponed_annotations_beside_a_fairseq_dataclass(path: Path) -> None:
    """fairseq reads annotations at run time; as strings they end in `issubclass() arg 1 must be a class`."""
    text = path.read_text(encoding="utf-8")
    assert "@dataclass" not in text or "import fairseq" not in text or "import annotations" not in text


@pytest.mark.parametrize(
    ("folder", "registry"),
    [
        ("criterions", CRITERION_REGISTRY),
        ("optim", OPTIMIZER_REGISTRY),
        ("models", MODEL_REGISTRY),
        ("tasks", TASK_REGISTRY),
    ],
)
def test_one_file_per_registered_name(folder: str, registry: dict[str, type]) -> None:
    files = {path.stem for path in (PACKAGE / folder).glob("*.py")} - {"__init__"}
    ours = {name for name, cls in registry.items() if cls.__module__.startswith("smart_fairseq.")}
    assert files == ours


# --- how large -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_file_is_long(path: Path) -> None:
    assert lines_of(path) <= LONGEST_FILE


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES} - {PACKAGE}), ids=name_of)
def test_no_folder_outweighs_the_rest(folder: Path) -> None:
    whole, part = (sum(lines_of(path) for path in where.rglob("*.py")) for where in (PACKAGE, folder))
    assert part <= LARGEST_FOLDER * whole
