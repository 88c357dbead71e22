"""README and docs against the code: flag tables, and the flags, paths, tests, links and commands that they name."""

import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from fairseq.criterions.sentence_prediction import SentencePredictionConfig
from fairseq.optim.adam import FairseqAdamConfig
from fairseq.tasks.sentence_prediction import SentencePredictionConfig as SentencePredictionTaskConfig
from toolkit import ROOT, parse

from smart_fairseq.config.flags import RegularizedConfig
from smart_fairseq.config.recipes import RECIPES, RECIPES_OF
from smart_fairseq.criterions.freeat_sentence_prediction import FreeATConfig
from smart_fairseq.criterions.freelb_sentence_prediction import FreeLBConfig
from smart_fairseq.criterions.pgd_sentence_prediction import PGDConfig
from smart_fairseq.criterions.r3f_sentence_prediction import R3FConfig
from smart_fairseq.criterions.rdrop_sentence_prediction import RDropConfig
from smart_fairseq.criterions.smart_sentence_prediction import SmartSentencePredictionConfig
from smart_fairseq.optim.mbpp import MBPPConfig
from smart_fairseq.tasks.smart_multitask import MultitaskConfig
from smart_fairseq.tasks.smart_wnli import WnliConfig

README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", *DOCS, *sorted((ROOT / "examples").rglob("*.md"))]
FLAGS = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")
METHODS = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
# by the prefix of a configuration's flags: it, and the one whose flags it inherits
CONFIGS = {
    "smart-": (SmartSentencePredictionConfig, SentencePredictionConfig),
    "mbpp-": (MBPPConfig, FairseqAdamConfig),
    "pgd-": (PGDConfig, RegularizedConfig),
    "freelb-": (FreeLBConfig, RegularizedConfig),
    "freeat-": (FreeATConfig, RegularizedConfig),
    "r3f-": (R3FConfig, RegularizedConfig),
    "rdrop-": (RDropConfig, RegularizedConfig),
    "multitask-": (MultitaskConfig, SentencePredictionTaskConfig),
    "wnli-": (WnliConfig, SentencePredictionTaskConfig),
}
# named to say that they went
REMOVED = {"--smart-reuse", "--smart-bregman-every", "--smart-search-layers"}


def own_fields(config: Any, base: Any) -> dict[str, Any]:
    """Fields that become flags: those with help text."""
    inherited = {field.name for field in fields(base)}
    return {f.name: f for f in fields(config) if f.name not in inherited and "help" in f.metadata}


def table(prefix: str) -> list[list[str]]:
    """Rows of the table of flags whose first cell is a flag with this prefix; a table of recipes comes after it."""
    tables = FLAGS.split("## Recipes")[0] + METHODS
    rows = [line for line in tables.splitlines() if line.startswith(f"| `--{prefix}") and line.count(" | ") == 2]
    cells = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]
    return [row for number, row in enumerate(cells) if row[0] not in [before[0] for before in cells[:number]]]


@pytest.mark.parametrize("prefix", CONFIGS)
def test_flag_tables(prefix: str) -> None:
    """Every flag with its default, in the dataclass's order, and its help text."""
    found = [row for row in table(prefix) if row[0] != "`--smart-layer-norm-eps`"]
    expected = own_fields(*CONFIGS[prefix])
    assert [row[0] for row in found] == [f"`--{name.replace('_', '-')}`" for name in expected]
    for row, field in zip(found, expected.values()):
        value = field.default
        default = "not set" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
        assert row[1] == default, row[0]
        assert row[2] == field.metadata["help"].replace("|", "\\|"), row[0]


def test_the_table_of_recipes() -> None:
    header, *rows = [line.strip("| ").split(" | ") for line in FLAGS.splitlines() if line.count(" | ") == len(RECIPES)]
    rows = rows[1:]
    assert header == [f"`{name}`" for name in RECIPES]
    assert [row[0] for row in rows] == [f"`--{name.replace('_', '-')}`" for name in RECIPES["smart"]]
    for flag, row in zip(RECIPES["smart"], rows):
        values = [recipe[flag] for recipe in RECIPES.values()]
        assert row[1:] == [f"{value:g}" if isinstance(value, float) else value for value in values], flag


@pytest.mark.parametrize("method", [method for method in RECIPES_OF if method != "smart"])
def test_the_tables_of_the_methods_recipes(method: str) -> None:
    """Of the values that are not the same in all recipes; the first column is the default's."""
    recipes = RECIPES_OF[method]
    different = [
        flag for flag in next(iter(recipes.values())) if len({str(values[flag]) for values in recipes.values()}) > 1
    ]
    lines = METHODS.splitlines()
    first = f"| `--{different[0].replace('_', '-')}` | "
    (start,) = [i for i, line in enumerate(lines) if line.startswith(first) and line.count(" | ") == len(recipes)][-1:]
    header, _, *rows = [line.strip("| ").split(" | ") for line in lines[start - 2 : start + len(different)]]
    assert header == [f"`{name}`" for name in recipes]
    for row, flag in zip(rows, different, strict=True):
        values = [recipe[flag] for recipe in recipes.values()]
        assert row[0] == f"`--{flag.replace('_', '-')}`"
        assert row[1:] == [value if isinstance(value, str) else f"{value:g}" for value in values]


@pytest.mark.parametrize("prefix", CONFIGS)
def test_every_field_has_help_or_is_an_interpolation(prefix: str) -> None:
    config, base = CONFIGS[prefix]
    inherited = {field.name for field in fields(base)}
    for field in fields(config):
        if field.name not in inherited:
            assert field.name.startswith(prefix.replace("-", "_"))
            assert field.metadata.get("help") or str(field.default).startswith("${"), field.name
            assert field.default is not True


def test_plugin_flags_named_anywhere_exist() -> None:
    names = {field.name for config, _ in CONFIGS.values() for field in fields(config)}
    known = {f"--{name.replace('_', '-')}" for name in names} | {"--smart-layer-norm-eps"}
    flag = rf"--(?:{'|'.join(CONFIGS)})[a-z0-9-]*[a-z0-9]"
    for document in DOCUMENTS:
        assert set(re.findall(flag, document.read_text(encoding="utf-8"))) - REMOVED <= known, document


def commands(document: Path) -> list[list[str]]:
    """The command lines of a document's shell blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", document.read_text("utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line]


def test_training_commands_parse(class_data: Path) -> None:
    """Each `fairseq-train` line, with tiny data in the place of the user's."""
    lines = [line for document in (README, *DOCS) for line in commands(document) if line[0] == "fairseq-train"]
    assert len(lines) >= 2
    for line in lines:
        cfg = parse([str(class_data), *line[2:]])
        assert cfg.criterion._name and cfg.optimizer._name


def test_commands_named_exist() -> None:
    from smart_fairseq.commands.__main__ import COMMANDS

    text = "\n".join(document.read_text("utf-8") for document in DOCUMENTS)
    assert set(re.findall(r"smart_fairseq\.commands ([a-z-]+)", text)) <= set(COMMANDS)
    listed = re.findall(r"^\| `([a-z-]+)` \|", (ROOT / "docs" / "training.md").read_text("utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(COMMANDS)


def test_the_readme_is_read_in_minutes() -> None:
    assert len(README.read_text("utf-8").splitlines()) <= 150


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(document: Path) -> None:
    """Files, and headings where a link names one."""
    text = document.read_text("utf-8")
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", text):
        path = (document.parent / target) if target else document
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text("utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_tests_named_exist() -> None:
    sources = "\n".join(path.read_text("utf-8") for path in (ROOT / "tests").glob("*.py"))
    for document in DOCUMENTS:
        for name in re.findall(r"`(?:tests/)?(test_\w+)(\.py)?`", document.read_text("utf-8")):
            there = (ROOT / "tests" / f"{name[0]}.py").is_file() if name[1] else f"def {name[0]}(" in sources
            assert there, f"{document.name}: {name[0]}"


def test_paths_named_exist() -> None:
    """Files and folders of the project that a document names in code style."""
    for document in DOCUMENTS:
        for name in re.findall(
            r"`((?:smart_fairseq|examples|tests|benchmarks|docs)/[\w./*-]*)`", document.read_text("utf-8")
        ):
            assert list(ROOT.glob(name.rstrip("/"))), f"{document.name}: {name}"


def test_make_targets_named_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in [*DOCUMENTS, ROOT / ".ci" / "run"]:
        text = document.read_text(encoding="utf-8")
        named = re.findall(r"(?:`|^|\s{4})make ([a-z-]+)", text, re.MULTILINE)
        assert set(named) <= targets, document
