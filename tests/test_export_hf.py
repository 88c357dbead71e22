"""export --format huggingface: what transformers, and the published architectures, make of the folder."""

import functools
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from data_samples import STSB, prepare, write
from hf_samples import fine_tuning, in_transformers, load, needs_transformers, reference, write_hf
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import BertWordPieceTokenizer, ByteLevelBPETokenizer
from toolkit import error_line, train

from smart_fairseq.convert.config import config_json, read_config
from smart_fairseq.export import main
from smart_fairseq.import_hf import import_hf
from smart_fairseq.inference import Model

HEAD = "sentence_classification_head"
CLASSIFIERS = {"bert": ("bert.pooler.dense", "classifier"), "roberta": ("classifier.dense", "classifier.out_proj")}
WORDS = ("the", "cat", "dog", "12", "d", "a", "Unable", "cats", "é", "e,")


class Run(NamedTuple):
    """A fine-tuned checkpoint, where it came from, and the texts of the valid split."""

    checkpoint: Path
    data: Path
    imported: Path
    family: str
    texts: list[list[str]]

    def export(self, out: Path, *flags: str) -> Path:
        assert main([str(self.checkpoint), str(out), "--format", "huggingface", *flags]) == 0
        return out

    def logits(self) -> np.ndarray:
        return Model(self.checkpoint, self.data, cpu=True).predict("valid", 64).logits


def texts(count: int, width: int, seed: int) -> list[list[str]]:
    draw = random.Random(seed)
    return [[" ".join(draw.choices(WORDS, k=draw.randint(1, 3))) for _ in range(width)] for _ in range(count)]


def write_official(folder: Path, task: str, split: str, rows: list[list[str]]) -> None:
    """The rows in the official file's form, labelled in turn."""
    if task == "CoLA":
        lines = [f"gj\t{place % 2}\t\t{text}" for place, (text,) in enumerate(rows)]
    elif task == "RTE":
        lines = ["index\tsentence1\tsentence2\tlabel"]
        lines += [f"{place}\t{a}\t{b}\t{('not_', '')[place % 2]}entailment" for place, (a, b) in enumerate(rows)]
    else:
        lines = ["\t".join([*STSB, "score"])]
        lines += [f"{place}\tg\tf\ty\t0\tn\tn\t{a}\t{b}\t{place % 5}" for place, (a, b) in enumerate(rows)]
    write(folder / task / f"{split}.tsv", *lines)


def fine_tune(folder: Path, family: str, task: str, flags: Sequence[str], **changes: Any) -> Run:
    """Import, prepare and train as a user would: 3 updates that move every weight by far more than 1e-5."""
    import_hf(write_hf(folder / "hf", family, **changes), folder / "imported")
    width = 1 if task == "CoLA" else 2
    valid = texts(9, width, seed=2)
    write_official(folder / "glue", task, "train", texts(12, width, seed=1))
    write_official(folder / "glue", task, "dev", valid)
    data = prepare(task, folder / "glue", folder / "imported", folder / "data", "--workers", "1")
    own = ["--init-token", "0", "--dropout", "0.2", "--lr", "1e-2", "--max-update", "3", *flags]
    train(fine_tuning(data, folder / "imported", folder / "run", *own))
    return Run(folder / "run" / "checkpoint_last.pt", data, folder / "imported", family, valid)


SEPARATOR = ["--separator-token", "2"]
KINDS = ["roberta", "bert", "regression", "tanh"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """RoBERTa and BERT on pairs, RoBERTa of another epsilon with one output, BERT's other gelu on single sentences."""
    asked: dict[str, tuple[str, str, list[str], dict[str, Any]]] = {
        "roberta": ("roberta", "RTE", [*SEPARATOR, "--num-classes", "2"], {}),
        "bert": ("bert", "RTE", ["--num-classes", "2"], {}),
        "regression": (
            *("roberta", "STS-B", [*SEPARATOR, "--num-classes", "1", "--regression-target"]),
            {"layer_norm_eps": 1e-6},
        ),
        "tanh": ("bert", "CoLA", ["--num-classes", "2"], {"hidden_act": "gelu_new"}),
    }
    folder = tmp_path_factory.mktemp("runs")
    return {
        name: fine_tune(folder / name, family, task, flags, **changes)
        for name, (family, task, flags, changes) in asked.items()
    }


# What the folder says, without transformers


def inputs_of(folder: Path, rows: list[list[str]]) -> list[tuple[list[int], list[int]]]:
    """Ids and token types: Devlin et al. (2019), section 3, and Liu et al. (2019), section 4, by `tokenizers`."""
    if (folder / "vocab.txt").exists():
        word_pieces = BertWordPieceTokenizer(str(folder / "vocab.txt"), lowercase=True)
        return [(pieces.ids, pieces.type_ids) for pieces in (word_pieces.encode(*row) for row in rows)]
    bpe = ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    parts = [[bpe.encode(text).ids for text in row] for row in rows]
    ids = [[0, *first, 2, *(token for part in more for token in (2, *part, 2))] for first, *more in parts]
    return [(row, [0] * len(row)) for row in ids]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_published_architecture(runs: dict[str, Run], tmp_path: Path, kind: str) -> None:
    """In float64, from the texts: a pooler and a linear layer on the first token."""
    folder = runs[kind].export(tmp_path / "out")
    weights = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    dense, out = CLASSIFIERS[runs[kind].family]
    found = []
    for ids, types in inputs_of(folder, runs[kind].texts):
        first = reference(folder, torch.tensor([ids]), types=torch.tensor([types]))[:, 0]
        pooled = torch.tanh(first @ weights[f"{dense}.weight"].T + weights[f"{dense}.bias"])
        found.append(pooled @ weights[f"{out}.weight"].T + weights[f"{out}.bias"])
    expected = runs[kind].logits()
    assert np.abs(torch.cat(found).numpy() - expected).max() < 1e-5
    assert expected.std(0).min() > 1e-3  # rows that differ by much more than that


@pytest.mark.parametrize("kind", KINDS)
def test_import_gives_back_every_weight(runs: dict[str, Run], tmp_path: Path, kind: str) -> None:
    """Bit for bit, the LM head aside; features by them too, and the files of the BPE."""
    folder = runs[kind].export(tmp_path / "out")
    report = import_hf(folder, tmp_path / "back")
    before = torch.load(runs[kind].checkpoint, weights_only=True)["model"]
    after = torch.load(tmp_path / "back" / "model.pt", weights_only=True)["model"]
    encoder = [name for name in after if name.startswith("encoder.sentence_encoder.")]
    bert = runs[kind].family == "bert"  # it has token types
    assert len(encoder) == 2 + bert + 1 + 2 + 2 * 16
    assert all(torch.equal(after[name], before[name]) for name in encoder)
    written = load_file(folder / "model.safetensors")
    for ours, theirs in zip(CLASSIFIERS[runs[kind].family], ("dense", "out_proj")):
        for part in ("weight", "bias"):
            assert torch.equal(written[f"{ours}.{part}"], before[f"classification_heads.{HEAD}.{theirs}.{part}"])
    assert len(report["left_out"]) == (2 if bert else 4)
    for part in ("weight", "bias") if bert else ():
        assert torch.equal(after[f"pooler.{part}"], before[f"classification_heads.{HEAD}.dense.{part}"])

    model = Model(runs[kind].checkpoint, runs[kind].data, cpu=True)
    tokens = next(model.samples("valid", 64))[1]["net_input"]["src_tokens"]
    with torch.no_grad():
        expected = model.model(tokens, features_only=True)[0]
        assert torch.equal(load(tmp_path / "back").model(tokens, features_only=True)[0], expected)

    for path in runs[kind].imported.iterdir():
        if path.name not in ("model.pt", "import.json"):
            assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_configuration(runs: dict[str, Run], tmp_path: Path) -> None:
    """As it stands in the file; BERT's differs where BERT does."""
    folder = runs["roberta"].export(tmp_path / "roberta")
    expected = {
        "architectures": ["RobertaForSequenceClassification"],
        "model_type": "roberta",
        "hidden_act": "gelu",
        "hidden_size": 16,
        "intermediate_size": 40,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 26,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "pad_token_id": 1,
        "type_vocab_size": 1,
        "vocab_size": 4 + 8 + 256 + 1 + 2 + 1,
        "problem_type": "single_label_classification",
        "id2label": {"0": "entailment", "1": "not_entailment"},
        "label2id": {"entailment": 0, "not_entailment": 1},
        "hidden_dropout_prob": 0.2,
        "attention_probs_dropout_prob": 0.1,
        "classifier_dropout": 0.0,
    }
    assert json.loads((folder / "config.json").read_text()) == expected
    tokenizer = {"model_max_length": 24, "tokenizer_class": "RobertaTokenizer", "add_prefix_space": False}
    assert json.loads((folder / "tokenizer_config.json").read_text()) == tokenizer
    files = {"config.json", "model.safetensors", "tokenizer_config.json", "vocab.json", "merges.txt"}
    assert {path.name for path in folder.iterdir()} == files
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1

    folder = runs["tanh"].export(tmp_path / "bert")
    bert = json.loads((folder / "config.json").read_text())
    changed = {
        "architectures": ["BertForSequenceClassification"],
        "model_type": "bert",
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 24,
        "pad_token_id": 0,
        "type_vocab_size": 2,
        "vocab_size": 27,
        "id2label": {"0": "0", "1": "1"},
        "label2id": {"0": 0, "1": 1},
    }
    assert bert == {**expected, **changed}
    tokenizer = {"model_max_length": 24, "tokenizer_class": "BertTokenizer", "do_lower_case": True}
    assert json.loads((folder / "tokenizer_config.json").read_text()) == tokenizer

    folder = runs["regression"].export(tmp_path / "regression")
    one = json.loads((folder / "config.json").read_text())
    assert one["problem_type"] == "regression" and one["id2label"] == {"0": "LABEL_0"}
    assert one["layer_norm_eps"] == 1e-6 and "label2id" not in one
    for name in ("roberta", "bert", "regression"):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config_json(read_config(tmp_path / name)).items() <= config.items()


def test_the_teacher(runs: dict[str, Run], tmp_path: Path) -> None:
    """The same weights as in the teacher's export to plain fairseq, and not the student's."""
    assert main([str(runs["roberta"].checkpoint), str(tmp_path / "plain.pt"), "--teacher"]) == 0
    teacher = torch.load(tmp_path / "plain.pt", weights_only=True)["model"]
    found = load_file(runs["roberta"].export(tmp_path / "teacher", "--teacher") / "model.safetensors")
    student = load_file(runs["roberta"].export(tmp_path / "student") / "model.safetensors")
    for ours, theirs in (
        ("classifier.out_proj.weight", f"classification_heads.{HEAD}.out_proj.weight"),
        ("roberta.encoder.layer.1.output.dense.bias", "encoder.sentence_encoder.layers.1.fc2.bias"),
        ("roberta.embeddings.word_embeddings.weight", "encoder.sentence_encoder.embed_tokens.weight"),
    ):
        assert torch.equal(found[ours], teacher[theirs]) and not torch.equal(found[ours], student[ours])


def test_folders_that_were_moved(runs: dict[str, Run], tmp_path: Path) -> None:
    """Named by flags, they give the same folder."""
    run = runs["bert"]
    state = torch.load(run.checkpoint, weights_only=False)
    state["cfg"]["task"]["data"], state["cfg"]["checkpoint"]["restore_file"] = "gone", "gone/model.pt"
    torch.save(state, tmp_path / "moved.pt")
    flags = ["--data-dir", str(run.data), "--bpe-dir", str(run.imported)]
    moved = Run(tmp_path / "moved.pt", *run[1:]).export(tmp_path / "moved", *flags)
    for path in run.export(tmp_path / "here").iterdir():
        assert (moved / path.name).read_bytes() == path.read_bytes()


def test_classes_stay_in_the_heads_order(runs: dict[str, Run], tmp_path: Path) -> None:
    """A data folder that was written anew may have another."""
    run = runs["bert"]
    anew = shutil.copytree(run.data, tmp_path / "anew") / "label" / "dict.txt"
    write(anew, *reversed(anew.read_text().splitlines()))
    here, flags = run.export(tmp_path / "here"), ["--data-dir", str(anew.parents[1])]
    there = run.export(tmp_path / "there", *flags)
    anew.unlink()  # as in a folder of rows to predict
    unlabelled = run.export(tmp_path / "unlabelled", *flags)
    for folder in (there, unlabelled):
        assert (folder / "config.json").read_bytes() == (here / "config.json").read_bytes()


def test_bpe_of_an_encoder_that_is_elsewhere(
    runs: dict[str, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As behind a second stage, which starts from a checkpoint of the first: the data folder says which kind."""
    state = torch.load(runs["bert"].checkpoint, weights_only=False)
    state["cfg"]["checkpoint"]["restore_file"] = str(tmp_path / "stage.pt")
    torch.save(state, tmp_path / "second.pt")
    said = refused([tmp_path / "second.pt", tmp_path / "out", "--format", "huggingface"], capsys)
    assert f"{tmp_path / 'vocab.txt'}: is missing; --bpe bert needs vocab.txt, dict.txt in --bpe-dir" in said


TRANSFORMERS = """
from transformers import AutoModelForSequenceClassification, AutoTokenizer
for name, (folder, rows) in asked.items():
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, report = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    batch = tokenizer(*map(list, zip(*rows)), padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model.eval()(**batch).logits
    found[name] = {
        "ids": [tokenizer(*row)["input_ids"] for row in rows],
        "logits": logits.tolist(),
        "labels": [model.config.id2label[place] for place in range(model.config.num_labels)],
        "problem": model.config.problem_type,
        "classes": [type(model).__name__, tokenizer.model_max_length],
    }
"""


@needs_transformers
def test_transformers_gives_the_same_logits_from_the_texts(runs: dict[str, Run], tmp_path: Path) -> None:
    """Padded batches, pairs with BERT's second token type; the ids are those of the data folder."""
    asked = {name: (str(run.export(tmp_path / name)), run.texts) for name, run in runs.items()}
    found = in_transformers(TRANSFORMERS, asked, tmp_path)
    for name, run in runs.items():
        assert found[name]["ids"] == [ids for ids, _ in inputs_of(tmp_path / name, run.texts)]
        assert np.abs(np.array(found[name]["logits"]) - run.logits()).max() < 1e-5
        model = {"bert": "Bert", "roberta": "Roberta"}[run.family] + "ForSequenceClassification"
        assert found[name]["classes"] == [model, 24]
    assert found["bert"]["labels"] == ["entailment", "not_entailment"]
    assert found["bert"]["problem"] == "single_label_classification"
    assert found["regression"]["labels"] == ["LABEL_0"] and found["regression"]["problem"] == "regression"


# Errors


refused = functools.partial(error_line, "export", main)


IN_HEAD = f"classification_heads.{HEAD}."
FC1 = "encoder.sentence_encoder.layers.1.fc1.bias"
CANNOT_HOLD: list[tuple[str, dict[str, Any], str]] = [
    ("model", {"_name": "bart_large"}, "its architecture is bart_large; allowed"),
    ("model", {"encoder_normalize_before": True}, "--encoder-normalize-before True; Hugging Face can hold False"),
    ("model", {"pooler_activation_fn": "relu"}, "--pooler-activation-fn relu; Hugging Face can hold tanh"),
    ("model", {"activation_fn": "tanh"}, "--activation-fn tanh; Hugging Face can hold gelu, gelu_accurate, relu"),
    ("task", {"init_token": None}, "was trained with --init-token None"),
    ("task", {"separator_token": None}, "was trained with --separator-token None"),
    ("task", {"data": "gone"}, "gone: holds no input0/dict.txt; give the folder that the model was trained on by --d"),
    ("checkpoint", {"restore_file": "gone/model.pt"}, "--bpe-dir"),
    ("weights", {"encoder.sentence_encoder.layer_norm.weight": torch.ones(16)}, "roberta has no place for it"),
    ("weights", {IN_HEAD + "out_proj.weight_orig": torch.ones(2, 16)}, "has no place for it"),
    ("weights", {IN_HEAD + "dense.weight": torch.ones(8, 16)}, "dense.weight has shape [8, 16]"),
    ("weights", {IN_HEAD + "out_proj.weight": None}, "has no out_proj.weight of its classification head"),
    ("weights", {FC1: None}, f"has no tensor {FC1}; with "),
]


@pytest.mark.parametrize("section, changes, message", CANNOT_HOLD, ids=[row[2][-40:] for row in CANNOT_HOLD])
def test_what_hugging_face_cannot_hold(
    runs: dict[str, Run],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    section: str,
    changes: dict[str, Any],
    message: str,
) -> None:
    state = torch.load(runs["roberta"].checkpoint, weights_only=False)
    if section == "weights":
        changed = {**state["model"], **changes}
        state["model"] = {name: tensor for name, tensor in changed.items() if tensor is not None}
    else:
        found = state["cfg"][section]
        (vars(found) if section == "model" else found).update(changes)
    torch.save(state, tmp_path / "damaged.pt")
    assert message in refused([tmp_path / "damaged.pt", tmp_path / "out", "--format", "huggingface"], capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["damaged.pt"]


def test_folders_of_another_model(runs: dict[str, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def line(*flags: Any) -> str:
        return refused([runs["roberta"].checkpoint, tmp_path / "out", "--format", "huggingface", *flags], capsys)

    assert "give the --bpe-dir of preprocess" in line("--bpe-dir", runs["bert"].imported)
    assert "give the --bpe-dir of preprocess" in line("--data-dir", runs["bert"].data)
    both = line("--data-dir", runs["bert"].data, "--bpe-dir", runs["bert"].imported)
    assert "was trained with --separator-token 2" in both

    cut = tmp_path / "cut"
    for part in ("input0", "input1", "label"):
        write(cut / part / "dict.txt", *(runs["roberta"].data / part / "dict.txt").read_text().splitlines())
    lines = (cut / "label" / "dict.txt").read_text().splitlines()
    write(cut / "label" / "dict.txt", lines[0])
    said = line("--data-dir", cut)
    assert "has the classes entailment; " in said and "trained with entailment, not_entailment; name its own" in said

    # of a checkpoint that does not say its classes the folder's count
    state = torch.load(runs["roberta"].checkpoint, weights_only=False)
    state["task_state"].pop("smart_data")
    torch.save(state, cut / "unsaid.pt")
    unsaid = [cut / "unsaid.pt", tmp_path / "out", "--format", "huggingface", "--data-dir", cut]
    assert "holds 1 labels; the head of" in refused(unsaid, capsys)

    # a dictionary without one of the merges' products: fairseq reads <unk> there, and Hugging Face would not
    symbols = (runs["roberta"].imported / "dict.txt").read_text().splitlines()[1:]
    for name in ("encoder.json", "vocab.bpe", "bpe.json"):
        (cut / name).write_bytes((runs["roberta"].imported / name).read_bytes())
    write(cut / "dict.txt", *symbols)
    write(cut / "input0" / "dict.txt", *symbols)
    assert "'Ġd' is not in dict.txt; Hugging Face's BPE needs each" in line("--data-dir", cut, "--bpe-dir", cut)
    assert {path.name for path in tmp_path.iterdir()} == {"cut"}


def test_impossible_places(runs: dict[str, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = runs["roberta"].checkpoint
    write(tmp_path / "full" / "mine.txt", "kept")
    format = ["--format", "huggingface"]
    assert "exists already; OUT must be an empty folder" in refused([source, tmp_path / "full", *format], capsys)
    assert "exists already" in refused([source, source, *format], capsys)
    assert "they are for huggingface" in refused([source, tmp_path / "a.pt", "--bpe-dir", tmp_path], capsys)
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "mine.txt"]
    (tmp_path / "empty").mkdir()
    runs["roberta"].export(tmp_path / "empty")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_full_disk_leaves_nothing(
    runs: dict[str, Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:
    def full(_: Any, path: Path, **__: Any) -> None:
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr("smart_fairseq.convert.hugging_face.save_file", full)
    arguments = [runs["roberta"].checkpoint, tmp_path / "new" / "out", "--format", "huggingface"]
    assert "No space left" in refused(arguments, capsys)
    assert not list(tmp_path.iterdir())
