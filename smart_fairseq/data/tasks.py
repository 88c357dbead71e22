"""The table of tasks: what each one is, how its files are distributed, what is reported and submitted.

Sources: the GLUE benchmark (Wang et al., 2019) and its download script, ANLI's `build_data.py`, the read-me files of
SNLI 1.0, MultiNLI 1.0, SciTail 1.1, the STS benchmark, CoLA 1.1 and the Microsoft paraphrase corpus. Row counts are the
official ones, before rows without a label are left out; sentiment.py says how its tasks are split.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

SENTIMENT = ("movie", "product", "news", "tweet")  # each also as NAME-score

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
    form: str = "tsv"  # tsv (with a header), plain (tab-separated, no header), jsonl, rated (see sentiment.py)
    votes: tuple[Column, ...] = ()  # the annotators' labels; in jsonl one key that holds a list
    label_words: Mapping[str, str] = field(default_factory=dict)  # from the file's words to the task's
    hidden_labels: tuple[str, ...] = ()  # the row stays, without a label
    no_labels: tuple[str, ...] = ()  # no gold label: the row is left out, as the official loaders do
    loose: bool = False  # rows of other lengths are left out instead of refused (QQP)
    columns: tuple[int, ...] = ()  # numbers of columns that a plain file may have
    dev_ids: str = ""  # part: rows of the file whose pair of ids is listed in files/dev_ids.tsv (MRPC)
    ratings: str = ""  # the file of the single ratings (rated)
    part: str = ""  # the split of the file, which goes by a hash (rated)


@dataclass(frozen=True)
class Task:
    """One data set. `splits` maps fairseq's split names to the forms in which they come, the usual one first."""

    name: str
    folders: tuple[str, ...]
    splits: Mapping[str, tuple[Source, ...]]
    texts: int = 2
    labels: tuple[str, ...] = ()  # in the order of their integer ids; empty for regression
    divisor: float = 1.0  # regression: labels are divided by it, so that they lie in 0..1
    metrics: tuple[str, ...] = ("accuracy",)  # the first one selects checkpoints
    submission: Mapping[str, str] = field(default_factory=dict)  # split to the GLUE server's file name
    fairseq_recipe: bool = True  # preprocess_GLUE_tasks.sh covers it: label dictionary by frequency
    rows: Mapping[str, int] = field(default_factory=dict)  # official counts

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
        """Outputs of the head; 1 for regression."""
        return len(self.labels) or 1


def _glue(files: str, texts: tuple[Column, ...], label: Column | None = "label", **more: object) -> Source:
    return Source((files,), texts, label, **{"id": "index", **more})  # type: ignore[arg-type]


_PAIR = ("sentence1", "sentence2")
_VOTES = ("label1", "label2", "label3", "label4", "label5")


def _jsonl_nli(file: str, **more: object) -> Source:
    return Source(
        (file,),
        _PAIR,
        "gold_label",
        "pairID",
        "jsonl",
        votes=("annotator_labels",),
        no_labels=("-",),
        **more,  # type: ignore[arg-type]
    )


def _txt_nli(file: str) -> Source:
    # the tab-separated release of SNLI and MultiNLI; annotators' cells may be empty
    return Source((file,), _PAIR, "gold_label", "pairID", "tsv", votes=_VOTES, no_labels=("-",))


def _mnli(split: str, label: bool) -> tuple[Source, ...]:
    tsv = _glue(
        f"{split}.tsv",
        _PAIR,
        "gold_label" if label else None,
        votes=_VOTES if "dev" in split else (),
        no_labels=("-",),
    )
    if not label:
        return (tsv,)
    return (tsv, _jsonl_nli(f"multinli_1.0_{split}.jsonl"), _txt_nli(f"multinli_1.0_{split}.txt"))


def _snli(split: str) -> tuple[Source, ...]:
    return (
        _jsonl_nli(f"snli_1.0_{split}.jsonl"),
        _txt_nli(f"snli_1.0_{split}.txt"),
        # the copy in GLUE's collection
        Source(
            (f"{split}.tsv",),
            _PAIR,
            "gold_label",
            "pairID",
            votes=_VOTES if split != "train" else (),
            no_labels=("-",),
        ),
    )


def _scitail(split: str) -> tuple[Source, ...]:
    tsv = Source((f"scitail_1.0_{split}.tsv",), (0, 1), 2, None, "plain", columns=(3,))
    words = {"entailment": "entails"}
    return (
        tsv,
        Source((f"tsv_format/{tsv.files[0]}",), (0, 1), 2, None, "plain", columns=(3,)),
        Source((f"scitail_1.0_{split}.txt",), _PAIR, "gold_label", "pairID", "jsonl", label_words=words),
        Source((f"snli_format/scitail_1.0_{split}.txt",), _PAIR, "gold_label", "pairID", "jsonl", label_words=words),
        Source(
            (f"predictor_format/scitail_1.0_structure_{split}.jsonl",),
            _PAIR,
            "gold_label",
            None,
            "jsonl",
            label_words=words,
        ),
    )


def _anli(split: str) -> tuple[Source, ...]:
    words = {"e": "entailment", "n": "neutral", "c": "contradiction"}
    return (
        Source(
            (f"{split}.jsonl",),
            ("context", "hypothesis"),
            "label",
            "uid",
            "jsonl",
            label_words=words,
            hidden_labels=("h", "hidden", ""),
        ),
    )


def _fever(split: str) -> tuple[Source, ...]:
    words = {"SUPPORTS": "entailment", "NOT ENOUGH INFO": "neutral", "REFUTES": "contradiction"}
    return (
        Source(
            (f"{split}_fitems.jsonl",),
            ("context", "query"),
            "label",
            "fid",
            "jsonl",
            label_words=words,
            hidden_labels=("hidden", ""),
        ),
    )


def _mrpc(split: str) -> tuple[Source, ...]:
    texts = ("#1 String", "#2 String")
    if split == "test":
        # the release holds the answers of the test part too; GLUE's does not, and nothing here reads them
        return (_glue("test.tsv", texts, None), Source(("msr_paraphrase_test.txt",), texts))
    released = Source(("msr_paraphrase_train.txt",), texts, "Quality", dev_ids=split)
    return (Source((f"{split}.tsv",), texts, "Quality"), released)


def _three(make: object) -> dict[str, tuple[Source, ...]]:
    return {"train": make("train"), "valid": make("dev"), "test": make("test")}  # type: ignore[operator]


def _sentence_pairs(texts: tuple[Column, ...] = _PAIR) -> dict[str, tuple[Source, ...]]:
    return {
        "train": (_glue("train.tsv", texts),),
        "valid": (_glue("dev.tsv", texts),),
        "test": (_glue("test.tsv", texts, None),),
    }


def _cola(file: str, *released: str) -> tuple[Source, ...]:
    plain = Source((file,), (3,), 1, None, "plain", columns=(4,))
    return (plain, Source(tuple(f"raw/{name}" for name in released), (3,), 1, None, "plain", columns=(4,)))


def _stsb(split: str) -> tuple[Source, ...]:
    glue = _glue(f"{split}.tsv", _PAIR, None if split == "test" else "score")
    # the STS benchmark's own files: some rows carry two more columns, the sentences' sources; GLUE has no test scores
    score = None if split == "test" else 4
    return (glue, Source((f"sts-{split}.csv",), (5, 6), score, None, "plain", columns=(7, 8, 9)))


def _rated(domain: str) -> dict[str, tuple[Source, ...]]:
    texts, ratings = f"{domain}_GroundTruth.txt", f"{domain}_anonDataRatings.txt"
    return {
        split: (Source((texts,), (2,), 1, 0, "rated", ratings=ratings, part=split),)
        for split in ("train", "valid", "test")
    }


def _sentiment(name: str, domain: str, *rows: int) -> tuple[Task, Task]:
    """The sign of the mean rating, and the mean itself, from 0 (-4, extremely negative) to 8 (4)."""
    sign = Task(
        name,
        ("vader_sentiment", "hutto_ICWSM_2014"),
        _rated(domain),
        texts=1,
        labels=("negative", "positive"),
        fairseq_recipe=False,
        rows=dict(zip(("train", "valid", "test"), rows)),
    )
    metrics = ("pearson_and_spearman", "pearson", "spearman")
    return sign, replace(sign, name=f"{name}-score", labels=(), divisor=8.0, metrics=metrics)


_QQP_TEXTS = ("question1", "question2")

_ROWS: tuple[Task, ...] = (
    Task(
        "CoLA",
        ("CoLA", "cola_public"),
        {
            "train": _cola("train.tsv", "in_domain_train.tsv"),
            "valid": _cola("dev.tsv", "in_domain_dev.tsv", "out_of_domain_dev.tsv"),
            "test": (_glue("test.tsv", ("sentence",), None),),
        },
        texts=1,
        labels=("0", "1"),
        metrics=("mcc", "accuracy"),
        submission={"test": "CoLA.tsv"},
        rows={"train": 8551, "valid": 1043, "test": 1063},
    ),
    Task(
        "SST-2",
        ("SST-2",),
        {
            "train": (_glue("train.tsv", ("sentence",), id=None),),
            "valid": (_glue("dev.tsv", ("sentence",), id=None),),
            "test": (_glue("test.tsv", ("sentence",), None),),
        },
        texts=1,
        labels=("0", "1"),
        submission={"test": "SST-2.tsv"},
        rows={"train": 67349, "valid": 872, "test": 1821},
    ),
    Task(
        "MRPC",
        ("MRPC",),
        _three(_mrpc),
        labels=("0", "1"),
        metrics=("acc_and_f1", "accuracy", "f1"),
        submission={"test": "MRPC.tsv"},
        rows={"train": 3668, "valid": 408, "test": 1725},
    ),
    Task(
        "STS-B",
        ("STS-B", "stsbenchmark"),
        _three(_stsb),
        divisor=5.0,
        metrics=("pearson_and_spearman", "pearson", "spearman"),
        submission={"test": "STS-B.tsv"},
        rows={"train": 5749, "valid": 1500, "test": 1379},
    ),
    Task(
        "QQP",
        ("QQP",),
        {
            "train": (_glue("train.tsv", _QQP_TEXTS, "is_duplicate", id="id", loose=True),),
            "valid": (_glue("dev.tsv", _QQP_TEXTS, "is_duplicate", id="id", loose=True),),
            "test": (_glue("test.tsv", _QQP_TEXTS, None, id="id"),),
        },
        labels=("0", "1"),
        metrics=("acc_and_f1", "accuracy", "f1"),
        submission={"test": "QQP.tsv"},
        rows={"train": 363846, "valid": 40430, "test": 390965},
    ),
    Task(
        "MNLI",
        ("MNLI", "multinli_1.0"),
        {
            "train": _mnli("train", True),
            "valid": _mnli("dev_matched", True),
            "valid1": _mnli("dev_mismatched", True),
            "test": _mnli("test_matched", False),
            "test1": _mnli("test_mismatched", False),
        },
        labels=NLI_LABELS,
        submission={"test": "MNLI-m.tsv", "test1": "MNLI-mm.tsv"},
        rows={"train": 392702, "valid": 9815, "valid1": 9832, "test": 9796, "test1": 9847},
    ),
    Task(
        "QNLI",
        ("QNLI", "QNLIv2"),
        _sentence_pairs(("question", "sentence")),
        labels=("entailment", "not_entailment"),
        submission={"test": "QNLI.tsv"},
        rows={"train": 104743, "valid": 5463, "test": 5463},
    ),
    Task(
        "RTE",
        ("RTE",),
        _sentence_pairs(),
        labels=("entailment", "not_entailment"),
        submission={"test": "RTE.tsv"},
        rows={"train": 2490, "valid": 277, "test": 3000},
    ),
    Task(
        "WNLI",
        ("WNLI",),
        _sentence_pairs(),
        labels=("0", "1"),
        submission={"test": "WNLI.tsv"},
        fairseq_recipe=False,
        rows={"train": 635, "valid": 71, "test": 146},
    ),
    Task(
        "AX",
        ("AX", "diagnostic", "MNLI"),
        {"test": (_glue("AX.tsv", _PAIR, None), _glue("diagnostic.tsv", _PAIR, None))},
        labels=NLI_LABELS,
        metrics=("mcc",),
        submission={"test": "AX.tsv"},
        fairseq_recipe=False,
        rows={"test": 1104},
    ),
    *(
        Task(
            f"ANLI-{part}",
            (f"anli_v1.0/{part}", f"anli_v0.1/{part}", part),
            _three(_anli),
            labels=NLI_LABELS,
            fairseq_recipe=False,
            rows={"train": train, "valid": valid, "test": valid},
        )
        for part, train, valid in (("R1", 16946, 1000), ("R2", 45460, 1000), ("R3", 100459, 1200))
    ),
    Task(
        "SNLI",
        ("SNLI", "snli_1.0"),
        _three(_snli),
        labels=NLI_LABELS,
        fairseq_recipe=False,
        rows={"train": 550152, "valid": 10000, "test": 10000},
    ),
    Task(
        "SciTail",
        ("SciTail", "SciTailV1.1", "scitail"),
        _three(_scitail),
        labels=("neutral", "entails"),
        fairseq_recipe=False,
        rows={"train": 23596, "valid": 1304, "test": 2126},
    ),
    Task(
        "FEVER",
        ("nli_fever", "FEVER"),
        _three(_fever),
        labels=NLI_LABELS,
        fairseq_recipe=False,
        rows={"train": 208346, "valid": 19998, "test": 19998},
    ),
    *_sentiment("movie", "movieReviewSnippets", 8506, 1030, 1069),
    *_sentiment("product", "amazonReviewSnippets", 2979, 459, 270),
    *_sentiment("news", "nytEditorialSnippets", 4234, 442, 514),
    *_sentiment("tweet", "tweets", 3347, 426, 427),
)

TASKS: dict[str, Task] = {task.name: task for task in _ROWS}
GLUE = ("CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI", "QNLI", "RTE", "WNLI", "AX")
ANLI = ("ANLI-R1", "ANLI-R2", "ANLI-R3")
ANLI_JOINED = replace(TASKS["ANLI-R1"], name="ANLI", rows={})  # the rounds as one task
