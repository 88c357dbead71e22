"""The commands in the READMEs of the examples have the flags that they are shown with."""

import re
import shlex

import pytest
from data_samples import ROOT

from smart_fairseq.commands import agreement, download, evaluate, predict, preprocess
from smart_fairseq.commands.download import NAMES
from smart_fairseq.data.tasks import SENTIMENT, TASKS

READMES = {name: (ROOT / "examples" / name / "README.md").read_text(encoding="utf-8") for name in ("glue", "anli")}
MAINS = {
    "glue/download.py": download.glue_main,
    "anli/download.py": download.anli_main,
    "glue/preprocess.py": preprocess.glue_main,
    "anli/preprocess.py": preprocess.anli_main,
    "agreement.py": agreement.main,
    "evaluate.py": evaluate.main,
    "predict.py": predict.main,
}


def commands(text):
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if line and not line.startswith("#"):
                yield shlex.split(line)


def flags_of(script, capsys):
    main = MAINS.get(script) or MAINS[script.split("/")[1]]
    with pytest.raises(SystemExit):
        main(["--help"])
    return set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))


@pytest.mark.parametrize("name", READMES)
def test_commands_have_these_flags(name, capsys):
    seen = 0
    for words in commands(READMES[name]):
        if words[0] == "python":
            assert (ROOT / words[1]).is_file()
            known = flags_of(words[1].split("/", 1)[1], capsys)
            assert {word for word in words if word.startswith("--")} <= known, words
            seen += 1
        else:
            assert words[0] == "fairseq-hydra-train"
            folder, recipe = words[words.index("--config-dir") + 1], words[words.index("--config-name") + 1]
            assert (ROOT / folder / f"{recipe}.yaml").is_file()
    assert seen >= 4


@pytest.mark.parametrize("name", READMES)
def test_flags_in_the_text_exist(name, capsys):
    theirs = {"--init-token", "--separator-token", "--config-name", "--required-batch-size-multiple", "--help"}
    known = theirs.union(*(flags_of(script if "/" in script else f"glue/{script}", capsys) for script in MAINS))
    text = re.sub(r"```.*?```", "", READMES[name], flags=re.DOTALL)
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)) <= known


def test_row_counts_in_the_text():
    """What preprocess compares with: rows of the files, labelled or not."""
    text = re.sub(r", of which .* have a label", "", READMES["glue"])
    rows = re.findall(r"^\| ([\w-]+) \| ([^|]*\d{3}[^|]*) \| [^|]*\| [^|]*\| [^|]*\|$", text, re.MULTILINE)
    assert len(rows) == 12
    for name, counts in rows:
        found = [int(number.replace(",", "")) for number in re.findall(r"\d+(?:,\d{3})*", counts)]
        assert found == list(TASKS[name].rows.values()), name


def test_row_counts_of_rated_sentences():
    for name in SENTIMENT:
        expected = ", ".join(f"{count:,}" for count in TASKS[name].rows.values())
        assert f"| {name} | {expected} | " in READMES["glue"]


def test_downloads_in_the_text():
    listed = re.search(r"`--tasks`\s+names\s+some\s+of\s+(.*?);", READMES["glue"], re.DOTALL)[1]
    assert set(re.split(r",\s+", listed)) == set(NAMES)
