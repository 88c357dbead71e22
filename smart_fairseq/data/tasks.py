"""The table of tasks: what each one is, how its files are distributed, what is reported and submitted.

Sources: the GLUE benchmark (Wang et al., 2019) and its download script, ANLI's `build_data.py`, the read-me files of
SNLI 1.0, MultiNLI 1.0, SciTail 1.1, the STS benchmark, CoLA 1.1 and the Microsoft paraphrase corpus. Row counts are the
official ones, before rows without a label are left out; sentiment.py says how its tasks are split.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

SENTIMENT = ("movie", "product", "news", "tweet")  # each also as NAME-score

# of a ranking's candidates, the label of one that is right
RIGHT = "1"

Column = str | int  # a name in the header, or a position from 0 in a file without one

# The order of the classes of every three-way inference task here. It is the order that fairseq's recipe gives to MNLI
# (by frequency), hence that of the published roberta.large.mnli: one head fits MNLI, AX, SNLI, ANLI and FEVER.
NLI_LABELS = ("contradiction", "neutral", "entailment")


@dataclass(frozen=True)
class Source:
    """One form in which a split is distributed; several files are read one after the other."""

    files: tuple[str, ...]
    texts: tuple[Column, ...]
    label: Column | None = None
    id: Column | None = None  # without one, a row's id is its position from 0
    form: str = "tsv"  # tsv, csv (with a header), plain (tab-separated, no header), jsonl, rated (see sentiment.py)
    votes: tuple[Column, ...] = ()  # the annotators' labels; in jsonl one key that holds a list
    label_words: Mapping[str, str] = field(default_factory=dict)  # from the file's words to the task's
    hidden_labels: tuple[str, ...] = ()  # the row stays, without a label
    no_labels: tuple[str, ...] = ()  # no gold label: the row is left out, as the official loaders do
    loose: bool = False  # rows of other lengths are left out instead of refused (QQP)
    columns: tuple[int, ...] = ()  # numbers of columns that a plain file may have
    dev_ids: str = ""  # part: rows of the file whose pair of ids is listed in files/dev_ids.tsv (MRPC)
    ratings: str = ""  # the file of the single ratings (rated)
    part: str = ""  # the split of the file, which goes by a hash (rated)
    numbers: bool = False  # labels and ids may be numbers (jsonl)


# by fairseq's names, the forms in which each comes, the usual one first
Splits = Mapping[str, tuple[Source, ...]]


@dataclass(frozen=True)
class Task:
    """One data set."""

    name: str
    folders: tuple[str, ...]
    splits: Splits
    texts: int = 2
    labels: tuple[str, ...] = ()  # in the order of their integer ids; empty for regression
    divisor: float = 1.0  # regression: labels are divided by it, so that they lie in 0..1
    metrics: tuple[str, ...] = ("accuracy",)  # the first one selects checkpoints
    submission: Mapping[str, str] = field(default_factory=dict)  # split to the GLUE server's file name
    ranking: bool = False  # a choice among the rows with the same first text, each labelled right or wrong
    fairseq_recipe: bool = True  # preprocess_GLUE_tasks.sh covers it: label dictionary by frequency
    rows: Mapping[str, int] = field(default_factory=dict)  # official counts
    candidates: bool = False  # rows are candidates for a pronoun, in the four texts of winograd.py

    @property
    def regression(self) -> bool:
        """Are the labels numbers?"""
        return not self.labels

    @property
    def rated(self) -> bool:
        """Are the votes of its rows ratings?"""
        return any(source.ratings for sources in self.splits.values() for source in sources)

    @property
    def num_classes(self) -> int:
        """Outputs of the head; 1 for regression and ranking."""
        return 1 if self.ranking else len(self.labels) or 1


_SPLITS = {"train": "train", "valid": "dev", "test": "test"}  # fairseq's names, and those of the files
_PAIR = ("sentence1", "sentence2")
_VOTES = ("label1", "label2", "label3", "label4", "label5")
_NO_YES, _ENTAILMENT = ("0", "1"), ("entailment", "not_entailment")  # labels
# metrics
_WITH_F1, CORRELATIONS = ("acc_and_f1", "accuracy", "f1"), ("pearson_and_spearman", "pearson", "spearman")


def _glue(file: str, texts: tuple[Column, ...], label: Column | None = "label", **more: Any) -> Source:
    return Source((file,), texts, label, **{"id": "index", **more})


def _glue_splits(texts: tuple[Column, ...] = _PAIR, label: str = "label", **more: Any) -> Splits:
    """Labelled parts, for which ``more`` is said, and the test part without labels."""
    labelled = {split: (_glue(f"{file}.tsv", texts, label, **more),) for split, file in _SPLITS.items()}
    return {**labelled, "test": (_glue("test.tsv", texts, None, id=more.get("id") or "index"),)}


def _three(make: Callable[[str], tuple[Source, ...]]) -> Splits:
    return {split: make(file) for split, file in _SPLITS.items()}


def _nli(file: str, **more: Any) -> Source:
    """A file of SNLI's or MultiNLI's release, with all annotators' labels: tab-separated (.txt) or .jsonl."""
    kind: dict[str, Any] = {"votes": _VOTES}
    if file.endswith(".jsonl"):
        kind = {"form": "jsonl", "votes": ("annotator_labels",)}
    return Source((file,), _PAIR, "gold_label", "pairID", no_labels=("-",), **{**kind, **more})


def _mnli(split: str, label: bool = True) -> tuple[Source, ...]:
    votes = _VOTES if "dev" in split else ()
    tsv = _glue(f"{split}.tsv", _PAIR, "gold_label" if label else None, votes=votes, no_labels=("-",))
    return (tsv, *(_nli(f"multinli_1.0_{split}.{end}") for end in ("jsonl", "txt") if label))


def _snli(split: str) -> tuple[Source, ...]:
    # the last is the copy in GLUE's collection
    copy = _nli(f"{split}.tsv", votes=() if split == "train" else _VOTES)
    return (_nli(f"snli_1.0_{split}.jsonl"), _nli(f"snli_1.0_{split}.txt"), copy)


def _scitail(split: str) -> tuple[Source, ...]:
    words = {"entailment": "entails"}
    tsv, txt = f"scitail_1.0_{split}.tsv", f"scitail_1.0_{split}.txt"
    plain = [Source((file,), (0, 1), 2, None, "plain", columns=(3,)) for file in (tsv, f"tsv_format/{tsv}")]
    objects: list[tuple[str, str | None]] = [(txt, "pairID"), (f"snli_format/{txt}", "pairID")]
    objects.append((f"predictor_format/scitail_1.0_structure_{split}.jsonl", None))
    return (*plain, *(Source((file,), _PAIR, "gold_label", id, "jsonl", label_words=words) for file, id in objects))


def _anli(split: str) -> tuple[Source, ...]:
    words, hidden = {"e": "entailment", "n": "neutral", "c": "contradiction"}, ("h", "hidden", "")
    texts, file = ("context", "hypothesis"), f"{split}.jsonl"
    return (Source((file,), texts, "label", "uid", "jsonl", label_words=words, hidden_labels=hidden),)


def _fever(split: str) -> tuple[Source, ...]:
    words = {"SUPPORTS": "entailment", "NOT ENOUGH INFO": "neutral", "REFUTES": "contradiction"}
    texts, hidden, file = ("context", "query"), ("hidden", ""), f"{split}_fitems.jsonl"
    return (Source((file,), texts, "label", "fid", "jsonl", label_words=words, hidden_labels=hidden),)


def _mrpc(split: str) -> tuple[Source, ...]:
    texts = ("#1 String", "#2 String")
    if split == "test":
        # the release holds the answers of the test part too; GLUE's does not, and nothing here reads them
        return (_glue("test.tsv", texts, None), Source(("msr_paraphrase_test.txt",), texts))
    released = Source(("msr_paraphrase_train.txt",), texts, "Quality", dev_ids=split)
    return (Source((f"{split}.tsv",), texts, "Quality"), released)


def _cola(file: str, *released: str) -> tuple[Source, ...]:
    raw = tuple(f"raw/{name}" for name in released)
    return tuple(Source(files, (3,), 1, None, "plain", columns=(4,)) for files in ((file,), raw))


def _stsb(split: str) -> tuple[Source, ...]:
    # the STS benchmark's own files: some rows carry two more columns, the sentences' sources; GLUE has no test scores
    label, score = ("score", 4) if split != "test" else (None, None)
    own = Source((f"sts-{split}.csv",), (5, 6), score, None, "plain", columns=(7, 8, 9))
    return (_glue(f"{split}.tsv", _PAIR, label), own)


def _wsc(split: str) -> tuple[Source, ...]:
    return (Source((f"{'val' if split == 'dev' else split}.jsonl",), (), form="wsc"),)


def _task(name: str, folders: tuple[str, ...], splits: Splits, rows: Sequence[int], **more: Any) -> Task:
    """A task with its official number of rows in each split, in their order."""
    return Task(name, folders, splits, rows=dict(zip(splits, rows)), **more)


def _of_glue(name: str, splits: Splits, rows: Sequence[int], released: Sequence[str] = (), **more: Any) -> Task:
    """A task of GLUE, whose folder and file for the server have its name; ``released``: folders of other releases."""
    return _task(name, (name, *released), splits, rows, **{"submission": {"test": f"{name}.tsv"}, **more})


def _inference(
    name: str,
    folders: tuple[str, ...],
    make: Callable[[str], tuple[Source, ...]],
    rows: Sequence[int],
    labels: tuple[str, ...] = NLI_LABELS,
) -> Task:
    """An inference task outside of GLUE."""
    return _task(name, folders, _three(make), rows, labels=labels, fairseq_recipe=False)


def _winograd(name: str, folder: str, splits: Splits, rows: Sequence[int], **more: Any) -> Task:
    """Candidates for a pronoun (winograd.py), right or wrong."""
    return _task(name, (folder,), splits, rows, texts=4, labels=_NO_YES, fairseq_recipe=False, candidates=True, **more)


def _sentiment(name: str, domain: str, *rows: int) -> tuple[Task, Task]:
    """The sign of the mean rating, and the mean itself, from 0 (-4, extremely negative) to 8 (4)."""
    texts, ratings = f"{domain}_GroundTruth.txt", f"{domain}_anonDataRatings.txt"
    sign = _task(
        name,
        ("vader_sentiment", "hutto_ICWSM_2014"),
        {split: (Source((texts,), (2,), 1, 0, "rated", ratings=ratings, part=split),) for split in _SPLITS},
        rows,
        texts=1,
        labels=("negative", "positive"),
        fairseq_recipe=False,
    )
    return sign, replace(sign, name=f"{name}-score", labels=(), divisor=8.0, metrics=CORRELATIONS)


def _ranking(task: Task, right: str) -> Task:
    """Which of the second texts that come with a first one has the label ``right`` (Liu et al., 2019)."""
    words = {label: RIGHT if label == right else "0" for label in task.labels}
    return replace(
        task,
        name=f"{task.name}-ranking",
        splits={
            split: tuple(replace(source, label_words=words, votes=()) for source in sources)
            for split, sources in task.splits.items()
        },
        labels=("0", RIGHT),
        metrics=("top1",),
        submission={},
        ranking=True,
        fairseq_recipe=False,
    )


_ROWS: tuple[Task, ...] = (
    _of_glue(
        "CoLA",
        {
            "train": _cola("train.tsv", "in_domain_train.tsv"),
            "valid": _cola("dev.tsv", "in_domain_dev.tsv", "out_of_domain_dev.tsv"),
            "test": (_glue("test.tsv", ("sentence",), None),),
        },
        (8551, 1043, 1063),
        ("cola_public",),
        texts=1,
        labels=_NO_YES,
        metrics=("mcc", "accuracy"),
    ),
    _of_glue("SST-2", _glue_splits(("sentence",), id=None), (67349, 872, 1821), texts=1, labels=_NO_YES),
    _of_glue("MRPC", _three(_mrpc), (3668, 408, 1725), labels=_NO_YES, metrics=_WITH_F1),
    _of_glue("STS-B", _three(_stsb), (5749, 1500, 1379), ("stsbenchmark",), divisor=5.0, metrics=CORRELATIONS),
    _of_glue(
        "QQP",
        _glue_splits(("question1", "question2"), "is_duplicate", id="id", loose=True),
        (363846, 40430, 390965),
        labels=_NO_YES,
        metrics=_WITH_F1,
    ),
    _of_glue(
        "MNLI",
        {
            "train": _mnli("train"),
            "valid": _mnli("dev_matched"),
            "valid1": _mnli("dev_mismatched"),
            "test": _mnli("test_matched", label=False),
            "test1": _mnli("test_mismatched", label=False),
        },
        (392702, 9815, 9832, 9796, 9847),
        ("multinli_1.0",),
        labels=NLI_LABELS,
        submission={"test": "MNLI-m.tsv", "test1": "MNLI-mm.tsv"},
    ),
    _of_glue("QNLI", _glue_splits(("question", "sentence")), (104743, 5463, 5463), ("QNLIv2",), labels=_ENTAILMENT),
    _of_glue("RTE", _glue_splits(), (2490, 277, 3000), labels=_ENTAILMENT),
    _of_glue("WNLI", _glue_splits(), (635, 71, 146), labels=_NO_YES, fairseq_recipe=False),
    _winograd("WNLI-ranking", "WNLI", _glue_splits(), (635, 71, 146), submission={"test": "WNLI.tsv"}),
    _winograd("WSC", "WSC", _three(_wsc), (554, 104, 146)),
    _of_glue(
        "AX",
        {"test": (_glue("AX.tsv", _PAIR, None), _glue("diagnostic.tsv", _PAIR, None))},
        (1104,),
        ("diagnostic", "MNLI"),
        labels=NLI_LABELS,
        metrics=("mcc",),
        fairseq_recipe=False,
    ),
    *(
        _inference(f"ANLI-{part}", (f"anli_v1.0/{part}", f"anli_v0.1/{part}", part), _anli, (train, valid, valid))
        for part, train, valid in (("R1", 16946, 1000), ("R2", 45460, 1000), ("R3", 100459, 1200))
    ),
    _inference("SNLI", ("SNLI", "snli_1.0"), _snli, (550152, 10000, 10000)),
    _inference("SciTail", ("SciTail", "SciTailV1.1", "scitail"), _scitail, (23596, 1304, 2126), ("neutral", "entails")),
    _inference("FEVER", ("nli_fever", "FEVER"), _fever, (208346, 19998, 19998)),
    *_sentiment("movie", "movieReviewSnippets", 8506, 1030, 1069),
    *_sentiment("product", "amazonReviewSnippets", 2979, 459, 270),
    *_sentiment("news", "nytEditorialSnippets", 4234, 442, 514),
    *_sentiment("tweet", "tweets", 3347, 426, 427),
)

TASKS: dict[str, Task] = {task.name: task for task in _ROWS}
TASKS |= {task.name: task for task in (_ranking(TASKS[name], "entailment") for name in ("QNLI", "SNLI"))}
GLUE = ("CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI", "QNLI", "RTE", "WNLI", "AX")
ANLI = ("ANLI-R1", "ANLI-R2", "ANLI-R3")
ANLI_JOINED = replace(TASKS["ANLI-R1"], name="ANLI", rows={})  # the rounds as one task
