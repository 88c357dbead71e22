"""Made-up data for the tests of smart_fairseq.data, and fairseq's own route to compare with."""

import json
import os
import random
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import toolkit
import torch

from smart_fairseq.commands.preprocess import glue_main
from smart_fairseq.data.tasks import NLI_LABELS, TASKS
from smart_fairseq.inference import Model

ROOT = Path(__file__).resolve().parents[1]
REAL = Path(os.environ.get("SMART_TEST_DATA") or ROOT.parent / "shared" / "data")
needs_real_files = pytest.mark.skipif(not (REAL / "glue_data").is_dir(), reason="no real files (SMART_TEST_DATA)")

STSB = "index genre filename year old_index source1 source2 sentence1 sentence2".split()
WORDS = (
    "the a small dog cat bird river house sees likes finds old green quick 42 3.5 don't "
    'it\'s "quoted" café naïve 東京 e-mail (so) 100% \u2028 end.'
).split(" ")


# id, text, ratings
Sentence = tuple[str, str, list[int]]


def sentence(generator: random.Random, most: int = 9) -> str:
    return " ".join(generator.choice(WORDS) for _ in range(generator.randint(1, most)))


def sentences(count: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    return [sentence(generator) for _ in range(count)]


def write(path: Path, *lines: str, end: str = "\n", mark: bool = False) -> Path:
    """Write lines as they are; ``mark`` puts a byte-order mark before them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((b"\xef\xbb\xbf" if mark else b"") + "".join(line + end for line in lines).encode())
    return path


def make_gpt2_bpe(folder: Path) -> Path:
    """A byte-level BPE with a few merges, in GPT-2's two files, and a dictionary for it."""
    from fairseq.data.encoders.gpt2_bpe_utils import bytes_to_unicode

    merges = ["t h", "th e", "Ġ the", "Ġ d", "o g", "Ġd og", "Ġ c", "a t", "Ġc at", "e e", "s ee", "Ã ©"]
    symbols = [*bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in merges)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "encoder.json").write_text(json.dumps({symbol: number for number, symbol in enumerate(symbols)}))
    write(folder / "vocab.bpe", "#version: 0.2", *merges)
    order = list(range(len(symbols)))
    random.Random(5).shuffle(order)
    write(folder / "dict.txt", *(f"{number} {1000 - place}" for place, number in enumerate(order)))
    return folder


def make_bert_bpe(folder: Path, lowercase: bool = True) -> Path:
    """A WordPiece vocabulary as smart_fairseq.import_hf leaves it: vocab.txt, dict.txt, bpe.json."""
    letters = [chr(code) for code in range(33, 127)] + ["é", "東", "京"]
    words = ["the", "dog", "cat", "river", "##s", "house", "see", "like"]
    symbols = [*letters, *(f"##{letter}" for letter in letters), *words]
    symbols = list(dict.fromkeys(symbols))
    write(folder / "vocab.txt", "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *symbols)
    write(folder / "dict.txt", *(f"{symbol} {len(symbols) - place}" for place, symbol in enumerate(symbols)))
    write(folder / "bpe.json", json.dumps({"bpe": "bert", "lowercase": lowercase}))
    return folder


def make_sentencepiece(folder: Path) -> Path:
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    text = write(folder / "text", *sentences(400))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "spm"), vocab_size=120, hard_vocab_limit=False, minloglevel=3
    )
    symbols = [line.split("\t")[0] for line in (folder / "spm.vocab").read_text(encoding="utf-8").split("\n")]
    write(folder / "dict.txt", *(f"{symbol} 1" for symbol in symbols if symbol and not symbol.startswith("<")))
    return folder


def make_pairs(folder: Path, labels: Sequence[str], rows: int = 30, seed: int = 1) -> Path:
    """RTE's form: index, sentence1, sentence2, label, without the latter in test.tsv."""
    generator = random.Random(seed)
    for split, count in (("train", rows), ("dev", rows // 2), ("test", rows // 2)):
        lines = ["index\tsentence1\tsentence2" + ("" if split == "test" else "\tlabel")]
        for number in range(count):
            label = "" if split == "test" else "\t" + labels[(number * number + number // 3) % len(labels)]
            lines.append(f"{number}\t{sentence(generator)}\t{sentence(generator)}{label}")
        write(folder / f"{split}.tsv", *lines)
    return folder


def make_glue(folder: Path) -> Path:
    """RTE, CoLA, MRPC, STS-B, MNLI and AX with a few rows each."""
    make_pairs(folder / "RTE", ("entailment", "not_entailment"))
    texts = sentences(400, seed=9)

    def two(number):
        return f"{texts[number]}\t{texts[number + 1]}"

    write(folder / "CoLA" / "train.tsv", *(f"gj\t{number % 2}\t\t{texts[number]}" for number in range(30)))
    write(folder / "CoLA" / "dev.tsv", *(f"gj\t{number % 3 % 2}\t\t{texts[number + 40]}" for number in range(25)))
    write(folder / "CoLA" / "test.tsv", "index\tsentence", *(f"{number}\t{texts[number]}" for number in range(12)))
    mrpc = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"
    for split, count in (("train", 30), ("dev", 27)):
        rows = (f"{int(number % 3 > 0)}\t1\t2\t{two(number)}" for number in range(count))
        write(folder / "MRPC" / f"{split}.tsv", mrpc, *rows)
        rows = (f"{number}\tg\tf\ty\t0\tn\tn\t{two(number)}\t{number % 11 / 2}" for number in range(count))
        write(folder / "STS-B" / f"{split}.tsv", "\t".join([*STSB, "score"]), *rows)
    rows = (f"{number}\tg\tf\ty\t0\tn\tn\t{two(number)}" for number in range(14))
    write(folder / "STS-B" / "test.tsv", "\t".join(STSB), *rows)
    mnli = "index\tsentence1\tsentence2"
    for split in ("train", "dev_matched", "dev_mismatched"):
        votes = "".join(f"\tlabel{number}" for number in range(1, 6)) if "dev" in split else ""
        rows = []
        for number in range(30):
            label = NLI_LABELS[number % 3]
            cast = "".join(f"\t{vote}" for vote in [label] * 3 + ["neutral", "entailment"]) if votes else ""
            rows.append(f"{number}\t{two(number)}{cast}\t{label}")
        write(folder / "MNLI" / f"{split}.tsv", f"{mnli}{votes}\tgold_label", *rows)
    for split in ("MNLI/test_matched", "MNLI/test_mismatched", "AX/AX"):
        write(folder / f"{split}.tsv", mnli, *(f"{number}\t{two(number + 3)}" for number in range(9)))
    return folder


def make_anli(folder: Path) -> Path:
    """ANLI's three rounds with a few rows each, and as much of SNLI and FEVER."""
    texts = iter(sentences(1000, seed=2))

    def nli(path, count, **names):
        rows = []
        for number in range(count):
            label = "enc"[number % 3]
            row = {"uid": f"{path.parent.name}{path.stem}{number}", "reason": "", "context": next(texts)}
            rows.append({**row, "hypothesis": next(texts), "label": label})
        write(path, *(json.dumps(row) for row in rows))

    for place, name in enumerate(("R1", "R2", "R3")):
        for split, count in (("train", 4 + place), ("dev", 3), ("test", 3 + place)):
            nli(folder / "anli_v1.0" / name / f"{split}.jsonl", count)
    pairs = [
        {"gold_label": label, "pairID": f"s{number}", "sentence1": "the dog", "sentence2": "a cat"}
        for number, label in enumerate(("neutral", "-", "entailment"))
    ]
    write(folder / "snli_1.0" / "snli_1.0_train.jsonl", *map(json.dumps, pairs))
    claim = {"fid": "f0", "query": "dog", "context": "cat", "label": "SUPPORTS"}
    write(folder / "nli_fever" / "train_fitems.jsonl", json.dumps(claim))
    return folder


def with_ratings(folder: Path, rows: list[Sentence], task: str = "movie", **means: str) -> Path:
    """A data folder with the two files of one domain; ``means`` stands in for what the ratings' mean is."""
    source = TASKS[task].splits["train"][0]
    texts, votes = [], []
    for identity, text, given in rows:
        mean = means.get(f"id{identity}", f"{sum(given) / len(given):.11g}")
        texts.append(f"{identity}\t{mean}\t{text}")
        votes.append(f"{identity}\t{mean}\t0.5\t{given}")
    write(folder / "vader_sentiment" / source.files[0], *texts, end="\r\n")
    write(folder / "vader_sentiment" / source.ratings, *votes, end="\r\n", mark=True)
    return folder


def prepare(task: str, data_dir: Path, bpe: Path, out: Path, *more: str) -> Path:
    """Our own preprocess of one task; the folder that it wrote."""
    flags = ["--task", task, "--data-dir", str(data_dir), "--bpe-dir", str(bpe), "--out", str(out), *more]
    assert glue_main(flags) == 0
    return Path(out)


def train(data: Path, save_dir: Path, classes: int, *flags: str) -> Path:
    """Two updates of a tiny RoBERTa; its head is then changed so that predictions differ from row to row."""
    longer = ["--arch", "roberta", "--max-positions", "256", "--seed", "3", "--max-update", "2"]
    plain = {} if data.name == "RTE-bin" else {"criterion": "sentence_prediction", "optimizer": "adam"}
    toolkit.train(toolkit.command(data, *longer, *flags, save_dir=save_dir, num_classes=classes, **plain))
    path = save_dir / "checkpoint_last.pt"
    state = torch.load(path)
    for name, weight in state["model"].items():
        if name.startswith("classification_heads") and name.endswith("weight"):
            weight.mul_(20)
    torch.save(state, path)
    if classes > 1:
        scores = Model(path, data, cpu=True).predict("valid", 8192).scores
        # of an even number of rows, so that it lies between two: a row on it would be a tie, which rounding decides
        middle = torch.from_numpy(np.median(np.log(scores[: len(scores) // 2 * 2]), axis=0))
        state["model"]["classification_heads.sentence_classification_head.out_proj.bias"] -= middle
        torch.save(state, path)
    return path


TRAININGS: dict[str, tuple[int, list[str]]] = {  # classes, and flags
    "RTE": (2, ["--separator-token", "2"]),
    "CoLA": (2, ["--report-mcc"]),
    "MRPC": (2, ["--separator-token", "2", "--report-acc-and-f1"]),
    "STS-B": (1, ["--separator-token", "2", "--regression-target", "--report-pearson-and-spearman"]),
    "MNLI": (3, ["--separator-token", "2"]),
}


def make_place(place: Path, names: Sequence[str] = tuple(TRAININGS)) -> Path:
    """Official files in glue/, data folders in bins/, the BPE in bpe/, and a checkpoint for each of ``names``."""
    make_gpt2_bpe(place / "bpe")
    make_glue(place / "glue")
    flags = ["--data-dir", str(place / "glue"), "--bpe-dir", str(place / "bpe"), "--out", str(place / "bins")]
    assert glue_main(["--task", "all", *flags]) == 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more only stand in each other's way on matrices this small
    for name in names:
        classes, more = TRAININGS[name]
        train(place / "bins" / f"{name}-bin", place / "checkpoints" / name, classes, *more)
    torch.set_num_threads(threads)
    return place


def checkpoint(place: Path, name: str) -> str:
    """The checkpoint of a task in `make_place`'s folder."""
    return str(place / "checkpoints" / name / "checkpoint_last.pt")


def fairseq_route(
    texts: dict[str, list[list[str]]], labels: dict[str, list[str]], bpe: Path, out: Path, regression: bool = False
) -> Path:
    """fairseq's recipe: texts[split][input] and labels[split] through its BPE encoder and fairseq-preprocess.

    The same calls as in examples/roberta/preprocess_GLUE_tasks.sh, but for the number of workers.
    """
    from fairseq.data.encoders.gpt2_bpe_utils import get_encoder

    encoder = get_encoder(str(bpe / "encoder.json"), str(bpe / "vocab.bpe"))
    work = out / "processed"
    work.mkdir(parents=True)
    inputs = len(next(iter(texts.values())))
    for split, columns in texts.items():
        for place, column in enumerate(columns):
            # multiprocessing_bpe_encoder.encode_lines
            lines = (" ".join(map(str, encoder.encode(line.strip()))) for line in column)
            write(work / f"{split}.input{place}", *lines)
    for split, words in labels.items():
        write(work / f"{split}.label", *words)
    data = out / "data-bin"

    def flags(name: str, splits: Sequence[str]) -> list[str]:
        found = ["--trainpref", str(work / f"train.{name}")]
        for kind in ("valid", "test"):
            prefixes = [str(work / f"{split}.{name}") for split in splits if split.startswith(kind)]
            if prefixes:
                found += [f"--{kind}pref", ",".join(prefixes)]
        return found

    for place in range(inputs):
        name = f"input{place}"
        preprocess(*flags(name, list(texts)), "--destdir", str(data / name), "--srcdict", str(bpe / "dict.txt"))
    if not regression:
        preprocess(*flags("label", list(labels)), "--destdir", str(data / "label"))
    else:
        (data / "label").mkdir()
        for split in labels:
            with open(data / "label" / f"{split}.label", "w") as target:
                subprocess.run(["awk", "{print $1 / 5.0 }", str(work / f"{split}.label")], stdout=target, check=True)
    return data


def preprocess(*flags: str) -> None:
    """fairseq-preprocess in this process."""
    from fairseq import options
    from fairseq_cli.preprocess import main

    main(options.get_preprocessing_parser().parse_args(["--only-source", "--workers", "1", *flags]))


def assert_same_folder(ours: Path, fairseqs: Path) -> None:
    """input0/, input1/ and label/ hold the same files, byte for byte (its log aside)."""
    names = sorted(path.relative_to(fairseqs) for path in fairseqs.rglob("*") if path.is_file())
    names = [name for name in names if name.name != "preprocess.log"]
    for name in names:
        assert (ours / name).read_bytes() == (fairseqs / name).read_bytes(), name
    extra = {path.relative_to(ours) for part in ("input0", "input1", "label") for path in (ours / part).rglob("*")}
    assert extra == set(names)


def cut(path: Path, columns: Sequence[int], header: bool = True) -> list[list[str]]:
    """What `tail -n +2 | cut -f` gives: the columns from 1."""
    lines = path.read_bytes().decode("utf-8").replace("\r\n", "\n").split("\n")
    lines = lines[1 if header else 0 :]
    if not lines[-1]:
        lines.pop()
    return [[line.split("\t")[column - 1] for line in lines] for column in columns]
