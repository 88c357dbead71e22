"""The layout: what each part may import and know, and how large it may be."""

import ast
import re
import sys
from collections import Counter
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


def test_mathematics_imports_torch_alone() -> None:
    assert {"divergence.py", "adversary.py", "teacher.py"} <= {path.name for path in METHOD}
    allowed = {"torch", *sys.stdlib_module_names, *("." + path.stem for path in METHOD)}
    assert not {name_of(path): others for path in METHOD if (others := imports(path) - allowed)}


def test_data_imports_no_part_that_imports_it() -> None:
    above = {
        name_of(path): {name for name in imports(path) if name.startswith("..")} - {"..errors", "..files"}
        for path in (PACKAGE / "data").glob("*.py")
    }
    assert above and not any(above.values()), above


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


def test_no_test_file_imports_another() -> None:
    """What two of them need stands in a file that is no test's."""
    assert not [path.name for path in TESTS if any(module.startswith("test_") for module in imports(path))]


# --- who knows what --------------------------------------------------------------------------------


def with_code(pattern: str, files: list[Path]) -> list[str]:
    assert files
    return [name_of(path) for path in files if re.search(pattern, code_of(path))]


def test_an_encoders_insides_are_known_in_one_place() -> None:
    others = [path for path in FILES if not name_of(path).startswith(KNOW_AN_ENCODER)]
    assert not with_code(r"sentence_encoder|embed_tokens|\.module\b|\"module\"|'module'", others)


def test_configurations_have_types() -> None:
    typed = [path for path in FILES if name_of(path).startswith(("config/", "training/", "terms/", "criterions/"))]
    assert not with_code(r"\b(cfg|config|flags|settings): Any\b", typed)


def test_no_postponed_annotations() -> None:
    """fairseq reads those of a dataclass at run time; as strings they end in `issubclass() arg 1 must be a class`."""
    assert not with_code("import annotations", FILES)


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


def test_no_file_is_long() -> None:
    assert not [name_of(path) for path in FILES if lines_of(path) > LONGEST_FILE]


def test_no_folder_outweighs_the_rest() -> None:
    sizes = Counter[str]()
    for path in FILES:
        sizes[path.relative_to(PACKAGE).parts[0]] += lines_of(path)
    assert max(sizes.values()) <= LARGEST_FOLDER * sizes.total(), sizes
