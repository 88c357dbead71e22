"""The mathematics imports torch alone; the glue is thin, one file per registered name."""

import ast
import sys
from pathlib import Path

import pytest
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.models import MODEL_REGISTRY
from fairseq.optim import OPTIMIZER_REGISTRY
from toolkit import ROOT

PACKAGE = ROOT / "smart_fairseq"
METHOD = sorted((PACKAGE / "method").glob("*.py"))


def imports(path: Path) -> set:
    """Top-level modules that a file imports; relative imports by their dots and name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("path", METHOD, ids=lambda path: path.name)
def test_mathematics_imports_torch_alone(path: Path) -> None:
    siblings = {"." + other.stem for other in METHOD}
    assert imports(path) <= {"torch", *sys.stdlib_module_names, *siblings}


def test_there_is_mathematics_to_hold_to_that() -> None:
    assert {"divergence.py", "adversary.py", "teacher.py"} <= {path.name for path in METHOD}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_postponed_annotations_beside_a_fairseq_dataclass(path: Path) -> None:
    """fairseq reads annotations at run time; as strings they end in `issubclass() arg 1 must be a class`."""
    text = path.read_text()
    assert "@dataclass" not in text or "import fairseq" not in text or "import annotations" not in text


@pytest.mark.parametrize(
    ("folder", "registry"),
    [("criterions", CRITERION_REGISTRY), ("optim", OPTIMIZER_REGISTRY), ("models", MODEL_REGISTRY)],
)
def test_one_file_per_registered_name(folder: str, registry: dict) -> None:
    files = {path.stem for path in (PACKAGE / folder).glob("*.py")} - {"__init__"}
    ours = {name for name, cls in registry.items() if cls.__module__.startswith("smart_fairseq.")}
    assert files == ours
