"""WNLI and WSC as candidates for a pronoun: alignment, SuperGLUE's spans, noun phrases, what is refused."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from data_samples import make_gpt2_bpe

from smart_fairseq.commands import preprocess
from smart_fairseq.data import winograd
from smart_fairseq.data.lines import Row
from smart_fairseq.data.readers import read_task
from smart_fairseq.data.tasks import TASKS
from smart_fairseq.data.winograd import align, noun_rows, pronouns_to_rank
from smart_fairseq.errors import UsageError

# the sentence with its pronoun in brackets, sentence2, the candidate as it belongs there
FORMS = {
    "begins the sentence": ("The box broke under the stone. [It] was soft.", "The box was soft.", "The box"),
    "an article": ("Ann met the nurse because [she] was ill.", "The nurse was ill.", "the nurse"),
    "a name": ("Ann met Beth because [she] was ill.", "Beth was ill.", "Beth"),
    "possessive": ("Ann met Beth near [her] house.", "Ann met Beth near Beth's house.", "Beth's"),
    "possessive of a pronoun": ("Ann saw that [his] hat fell.", "His father's hat fell.", "his father's"),
    "words left out between": ("The big red box fell since [it] was wet.", "The red box was wet.", "the red box"),
    "two of a kind": (
        "It rained, so Ann hid the map when she saw [it].",
        "Ann hid the map when she saw the rain.",
        "the rain",
    ),
    "agreement": ("The Swiss beat Rome; [they] were tired.", "Rome was tired.", "Rome"),
    "misspelt": ("The Swiss say they must pay to regulate [them].", "They must pay to regular the Swiss.", "the Swiss"),
    "a word dropped": ("There is a gap here. Cats look over [it].", "Cats look the gap.", "the gap"),
    "an adverb dropped": ("Ann met Beth; now, [she] sleeps.", "Now Beth sleeps.", "Beth"),
}


@pytest.mark.parametrize("marked, clause, candidate", FORMS.values(), ids=FORMS)
def test_the_pronoun_and_its_candidate_are_found(marked: str, clause: str, candidate: str) -> None:
    before, pronoun, after = re.split(r"[\[\]]", marked)
    sentence = before + pronoun + after
    found = align(sentence, clause)
    assert found is not None
    assert (sentence[: found.start], sentence[found.end :], found.candidate) == (before, after, candidate)
    assert found.texts(sentence) == (before + candidate + after, before, before + candidate, before + pronoun)


def test_a_sentence_that_is_no_clause_of_the_other_is_not_aligned() -> None:
    assert align("The box broke under the stone.", "The box was soft.") is None  # no pronoun
    assert align("It broke.", "Snow melts.") is None


def write(folder: Path, **splits: list[tuple[str, ...]]) -> Path:
    """WNLI's files, rows of sentence1, sentence2 and label."""
    (folder / "WNLI").mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        head = ("index", "sentence1", "sentence2", "label")[: 3 if split == "test" else 4]
        lines = [head, *((str(number), *row) for number, row in enumerate(rows))]
        (folder / "WNLI" / f"{split}.tsv").write_text("".join("\t".join(line) + "\n" for line in lines))
    return folder


def test_a_row_that_cannot_be_aligned_is_named_or_left_out_and_counted(tmp_path: Path) -> None:
    good = ("Ann met Beth because she was ill.", "Beth was ill.", "1")
    write(tmp_path, dev=[good, ("Ann met Beth.", "Beth was ill.", "0")])
    with pytest.raises(UsageError, match=r"dev.tsv:3: sentence2 'Beth was ill.' is no clause of sentence1"):
        read_task(TASKS["WNLI-ranking"], tmp_path)
    rows, reports = read_task(TASKS["WNLI-ranking"], tmp_path, skip_bad_rows=True)
    assert [row.id for row in rows["valid"]] == ["0"]
    assert sum(reports["valid"].left_out.values()) == 1


def wsc(**change: object) -> dict[str, object]:
    target = {"span1_index": 0, "span1_text": "Ann", "span2_index": 5, "span2_text": "she"}
    target |= {key: value for key, value in change.items() if key in target}
    about = {"idx": 7, "text": "Ann said, she and Beth, she is tired.", "target": target, "label": True}
    return about | {key: value for key, value in change.items() if key not in target}


def wsc_folder(folder: Path, *entries: object) -> Path:
    (folder / "WSC").mkdir()
    (folder / "WSC" / "val.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder


def test_wsc_says_itself_where_its_pronoun_is(tmp_path: Path) -> None:
    dog = wsc(
        idx=8, span1_text="The dog", text="The dog and it, it is ours.", span2_index=3, span2_text="it", label=False
    )
    rows, _ = read_task(TASKS["WSC"], wsc_folder(tmp_path, wsc(), dog))
    assert [(row.id, row.texts, row.label) for row in rows["valid"]] == [
        (
            "7",
            (
                "Ann said, she and Beth, Ann is tired.",
                "Ann said, she and Beth, ",
                "Ann said, she and Beth, Ann",
                "Ann said, she and Beth, she",
            ),
            "1",
        ),
        ("8", ("The dog and the dog, it is ours.", "The dog and ", "The dog and the dog", "The dog and it"), "0"),
    ]


@pytest.mark.parametrize(
    "entry, words",
    [
        (wsc(span2_index=1), "span2_text 'she' does not stand at word 1"),
        (wsc(span2_index=50), "span2_text .she. does not stand at word 50"),
        (wsc(span1_text=" "), "span1_text is empty"),
        (wsc(label="yes"), "label 'yes' is not true or false"),
        ({"idx": 1}, "is not an object with text, target"),
        ([1], "is not an object with text, target"),
    ],
)
def test_a_broken_row_of_wsc_is_named(entry: object, words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"val.jsonl:1: {words}"):
        read_task(TASKS["WSC"], wsc_folder(tmp_path, entry))


def test_noun_phrases_are_other_candidates_unless_they_are_the_files_own() -> None:
    before = "Ann met the nurse near the door since "
    rows = [Row("0", (f"{before}Ann was ill.", before, f"{before}Ann", f"{before}she"), "1")]

    def find(text: str) -> list[str]:
        assert text == rows[0].texts[0]
        return ["Ann", "the nurse", "The nurse", "she", "the door", "Ann's friend"]

    found = noun_rows(rows, find)
    assert [row.texts[2].removeprefix(rows[0].texts[1]) for row in found] == ["the nurse", "the door"]
    assert found[0].texts[0] == "Ann met the nurse near the door since the nurse was ill."
    assert found[0].texts[3] == f"{before}she"
    assert [(row.label, row.id) for row in found] == [(None, "0+0"), (None, "0+1")]


def test_the_printed_command_counts_pronouns_that_have_something_to_rank() -> None:
    """Of three pronouns one has both, one a right candidate and a noun phrase, one two right ones."""
    pairs = {"a": ["1", "0"], "b": ["1"], "c": ["1", "1"]}
    rows = {
        "train": [
            Row(f"{end}{n}", (f"Ann{n} is {end}", "", f"Ann{n}", "she"), label)
            for end, labels in pairs.items()
            for n, label in enumerate(labels)
        ]
    }
    assert pronouns_to_rank(rows) == 1
    rows["nouns"] = [
        Row("x", ("a tree is b", "", "a tree", "she"), None),
        Row("y", ("a tree is d", "", "a tree", "she"), None),
    ]
    assert pronouns_to_rank(rows) == 2


def test_preprocess_writes_candidates_and_the_noun_phrases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = ("Ann met the nurse because she was ill.", "The nurse was ill.", "1")
    write(tmp_path, train=[row], dev=[row], test=[row[:2]])
    bpe = make_gpt2_bpe(tmp_path / "bpe")
    command = ["--task", "WNLI-ranking", "--data-dir", str(tmp_path), "--bpe-dir", str(bpe), "--out"]
    monkeypatch.setattr(winograd, "noun_phrases", lambda: lambda text: ["Ann", "the nurse"])
    assert preprocess.main([*command, str(tmp_path / "bin")]) == 0
    assert "spaCy found 1 more candidates" in capsys.readouterr().out
    assert json.loads((tmp_path / "bin/preprocess.json").read_text())["rows"] == {
        "train": 1,
        "valid": 1,
        "test": 1,
        "nouns": 1,
    }
    monkeypatch.setattr(winograd, "noun_phrases", lambda: None)
    assert preprocess.main([*command, str(tmp_path / "bin")]) == 0
    said = capsys.readouterr().out
    assert "--task smart_wnli" in said
    assert "--num-classes" not in said
    assert "nouns" not in json.loads((tmp_path / "bin/preprocess.json").read_text())["rows"]
    for flag in (("--max-tokens", "64"), ("--subsample", "0.5")):
        assert preprocess.main([*command, str(tmp_path / "bin"), *flag]) == 2
        assert f"{flag[0]} is given with --task WNLI-ranking" in capsys.readouterr().err


def test_the_printed_command_trains_an_lm_head_where_the_encoder_has_none(tmp_path: Path) -> None:
    bpe = SimpleNamespace(kind="bert", folder=tmp_path)
    said = {}
    for head in ("file", "initialised"):
        imported = {"flags": ["--arch", "smart_bert", "--encoder-embed-dim", "384"], "lm_head": head}
        (tmp_path / "import.json").write_text(json.dumps(imported))
        said[head] = preprocess.smart_flags(bpe, 9, "run", candidates=True)
        assert "--wnli-new-lm-head" not in preprocess.smart_flags(bpe, 9, "run")
    assert ["--wnli-new-lm-head" in flags for flags in said.values()] == [False, True]
