"""The README against the code: flag tables, flags, paths and commands that it names."""

import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from fairseq.criterions.sentence_prediction import SentencePredictionConfig
from fairseq.optim.adam import FairseqAdamConfig
from toolkit import ROOT, parse

from smart_fairseq.criterions.smart_sentence_prediction import SmartSentencePredictionConfig
from smart_fairseq.optim.mbpp import MBPPConfig

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "examples").rglob("*.md"))]


def own_fields(config: Any, base: Any) -> dict[str, Any]:
    """Fields that become flags: those with help text."""
    inherited = {field.name for field in fields(base)}
    return {f.name: f for f in fields(config) if f.name not in inherited and "help" in f.metadata}


def table(prefix: str) -> list[list[str]]:
    """Rows of the README's table whose first cell is a flag with this prefix."""
    rows = [line for line in README.splitlines() if line.startswith(f"| `--{prefix}")]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


@pytest.mark.parametrize(
    ("prefix", "config", "base"),
    [("smart-", SmartSentencePredictionConfig, SentencePredictionConfig), ("mbpp-", MBPPConfig, FairseqAdamConfig)],
)
def test_flag_tables(prefix: str, config: Any, base: Any) -> None:
    """Every flag with its default, in the dataclass's order, and its help text."""
    found = [row for row in table(prefix) if row[0] != "`--smart-layer-norm-eps`"]
    expected = own_fields(config, base)
    assert [row[0] for row in found] == [f"`--{name.replace('_', '-')}`" for name in expected]
    for row, field in zip(found, expected.values()):
        value = field.default
        default = "not set" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
        assert row[1] == default, row[0]
        assert row[2] == field.metadata["help"].replace("|", "\\|"), row[0]


@pytest.mark.parametrize("config", [SmartSentencePredictionConfig, MBPPConfig])
def test_every_field_has_help_or_is_an_interpolation(config: Any) -> None:
    base = SentencePredictionConfig if config is SmartSentencePredictionConfig else FairseqAdamConfig
    inherited = {field.name for field in fields(base)}
    for field in fields(config):
        if field.name not in inherited:
            assert field.name.startswith(("smart_", "mbpp_"))
            assert field.metadata.get("help") or str(field.default).startswith("${"), field.name
            assert field.default is not True


def test_plugin_flags_named_anywhere_exist() -> None:
    known = {f"--{name.replace('_', '-')}" for c in (SmartSentencePredictionConfig, MBPPConfig) for name in
             (field.name for field in fields(c))} | {"--smart-layer-norm-eps"}  # fmt: skip
    for document in DOCUMENTS:
        named = set(re.findall(r"--(?:smart|mbpp)-[a-z0-9-]*[a-z0-9]", document.read_text(encoding="utf-8")))
        assert named <= known, document


def test_training_commands_parse(class_data: Path) -> None:
    """Each `fairseq-train` line of the README, with tiny data in the place of the user's."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    commands = [
        line
        for block in blocks
        for line in block.replace("\\\n", " ").splitlines()
        if line.startswith("fairseq-train ")
    ]
    assert commands
    for line in commands:
        arguments = shlex.split(line, comments=True)[1:]
        arguments[0] = str(class_data)
        cfg = parse(arguments)
        assert cfg.criterion._name and cfg.optimizer._name


def test_paths_named_exist() -> None:
    """Files and folders of the project that a document names in code style."""
    for document in DOCUMENTS:
        for name in re.findall(
            r"`((?:smart_fairseq|examples|tests|benchmarks)/[\w./*-]*)`", document.read_text("utf-8")
        ):
            assert list(ROOT.glob(name.rstrip("/"))), f"{document.name}: {name}"


def test_make_targets_named_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in [*DOCUMENTS, ROOT / "CONTRIBUTING.md", ROOT / ".ci" / "run"]:
        text = document.read_text(encoding="utf-8")
        named = re.findall(r"(?:`|^|\s{4})make ([a-z-]+)", text, re.MULTILINE)
        assert set(named) <= targets, document
