"""A fine-tuned checkpoint as a Hugging Face folder for sequence classification, with the same logits.

The way back of importing.py, by the same tables. The folder receives

    config.json             sizes, epsilon, dropout, label names; problem_type "regression" without labels
    model.safetensors       the encoder and one classification head, float32; not the LM head
    tokenizer_config.json   and vocab.json and merges.txt (gpt2) or vocab.txt (bert)

The vocabulary says which family it is: byte-level BPE is RoBERTa's, WordPiece is BERT's. BERT's classifier is fairseq's
head in two parts, whose first one is called the pooler. Where a checkpoint holds no token types, BERT's are zeros: a
model that was trained without them does not heed them. Rows stand in the order of vocab.txt for BERT, and in fairseq's
for RoBERTa, where positions begin behind a padding index of 1 on both sides.
"""

import argparse
import contextlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fairseq.models import ARCH_CONFIG_REGISTRY
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..data.binarize import read_manifest
from ..data.bpe import BpeFiles, find_bpe, load_vocabulary, shared_vocabulary
from ..data.folders import data_of, labels_in
from ..errors import UsageError, refuse
from ..files import whole_folder
from ..models.smart_bert import SmartBertModel
from .checkpoint import check_head, plain
from .config import ACTIVATIONS, FAIRSEQ_LAYER_NORM_EPS, FAIRSEQ_SPECIALS, Config, Sizes, config_json
from .exporting import kind_of
from .vocabulary import gpt2_tokens, read_bert_vocabulary
from .weights import Weights, revert_weights

# by kind of BPE: the family, its padding, token types, and what fairseq puts before the second text of a pair
FAMILIES = {"gpt2": ("roberta", 1, 1, 2), "bert": ("bert", 0, 2, None)}
# the settings that change what is computed, and what Hugging Face's models compute
HELD = {
    "activation_fn": tuple(ACTIVATIONS["bert"].values()),
    "encoder_normalize_before": (False,),
    "pooler_activation_fn": ("tanh",),
    "no_scale_embedding": (True,),
}


def find_folders(
    path: Path, config: dict[str, Any], data_dir: Path | None, bpe_dir: Path | None
) -> tuple[Path, BpeFiles]:
    """The data folder of a checkpoint's run, and the encoder's files that it was prepared with, where not given.

    ``config``: the checkpoint's, plain containers. Raises `UsageError` where they are not there or do not fit.
    """
    data = data_dir or Path(config["task"].get("data") or ".")
    if not (data / "input0" / "dict.txt").is_file():
        refuse(data, "holds no input0/dict.txt", "give the folder that the model was trained on by --data-dir")
    start = config["checkpoint"].get("finetune_from_model") or config["checkpoint"].get("restore_file")
    folder, kind = bpe_dir or Path(start or ".").parent, None
    if not (folder / "bpe.json").is_file():
        with contextlib.suppress(UsageError):  # of a folder that preprocess did not write
            kind = read_manifest(data).get("bpe")
    bpe = find_bpe(kind, folder)
    if bpe.kind not in FAMILIES:
        refuse(bpe.folder, f"is of --bpe {bpe.kind}", f"--format huggingface can write {' and '.join(FAMILIES)}")
    shared_vocabulary(data, bpe)
    _, _, _, separator = FAMILIES[bpe.kind]
    wanted = {"init_token": 0, **({"separator_token": separator} if (data / "input1").is_dir() else {})}
    for name, value in wanted.items():
        found = config["task"].get(name)
        if found != value:
            flag = "--" + name.replace("_", "-")
            refuse(path, f"was trained with {flag} {found}", f"the tokenizer of this family stands for {value}")
    return data, bpe


def read_architecture(path: Path, config: dict[str, Any], bpe: BpeFiles) -> tuple[Config, argparse.Namespace]:
    """What config.json says, and all of fairseq's settings; `UsageError` for what Hugging Face's models cannot hold."""
    kind = kind_of(path, config["model"])
    settings = argparse.Namespace(**config["model"])
    ARCH_CONFIG_REGISTRY[config["model"].get("_name") or config["model"]["arch"]](settings)
    for name, held in HELD.items():
        value = getattr(settings, name)
        if value not in held:
            flag = "--" + name.replace("_", "-")
            refuse(path, f"has {flag} {value}", f"Hugging Face can hold {', '.join(map(str, dict.fromkeys(held)))}")
    family, padding, token_types, _ = FAMILIES[bpe.kind]
    sizes = Sizes(
        layers=settings.encoder_layers,
        embed_dim=settings.encoder_embed_dim,
        ffn_dim=settings.encoder_ffn_embed_dim,
        heads=settings.encoder_attention_heads,
        vocabulary=load_vocabulary(bpe.dictionary).size + 1,  # and <mask>, which the task adds
        position_rows=settings.max_source_positions + (2 if family == "roberta" else 0),
        token_types=token_types,
    )
    eps = settings.smart_layer_norm_eps if kind is SmartBertModel else FAIRSEQ_LAYER_NORM_EPS
    return Config(path, family, sizes, settings.activation_fn, eps, padding, True), settings


def labels_json(path: Path, config: dict[str, Any], known: Sequence[str], data: Path, count: int) -> dict[str, Any]:
    """config.json's entries about the outputs of the head, ``count`` of them; ``known``: their labels, if they are.

    The head's own order counts, as in `inference`: the folder may have been written anew with another.
    """
    if config["task"].get("regression_target"):
        return {"problem_type": "regression", "id2label": {str(place): f"LABEL_{place}" for place in range(count)}}
    here = (labels_in(data) or [])[:count]
    labels = list(known[:count]) or here
    if len(labels) < count:
        refuse(data / "label" / "dict.txt", f"holds {len(labels)} labels", f"the head of {path} has {count} outputs")
    if here and set(labels) != set(here):
        advice = f"{path} was trained with {', '.join(labels)}; name its own data folder by --data-dir"
        refuse(data, f"has the classes {', '.join(here)}", advice)
    return {
        "problem_type": "single_label_classification",
        "id2label": {str(place): label for place, label in enumerate(labels)},
        "label2id": {label: place for place, label in enumerate(labels)},
    }


def write_hugging_face(
    path: Path, state: dict[str, Any], out: Path, data_dir: Path | None = None, bpe_dir: Path | None = None
) -> None:
    """Write ``state``, read from ``path``, to the folder ``out``, completely or not at all.

    Raises `UsageError` for what Hugging Face's RoBERTa and BERT cannot hold, and where label names or vocabulary are
    not to be found or belong to another model.
    """
    config = plain(state["cfg"])
    kind_of(path, config["model"])
    head = (config.get("criterion") or {}).get("classification_head_name") or "sentence_classification_head"
    check_head(path, state["model"], head)
    output = state["model"][f"classification_heads.{head}.out_proj.weight"]
    data, bpe = find_folders(path, config, data_dir, bpe_dir)
    architecture, settings = read_architecture(path, config, bpe)
    family = architecture.model_type

    symbols = [*load_vocabulary(bpe.dictionary)][len(FAIRSEQ_SPECIALS) - 1 :]
    tokenizer: dict[str, Any] = {"model_max_length": settings.max_source_positions}
    if family == "bert":
        vocabulary = read_bert_vocabulary(bpe.folder, architecture)
        if vocabulary.symbols != symbols:
            refuse(bpe.dictionary, "is not vocab.txt's", "the folder that import-hf wrote is needed")
        rows, files = vocabulary.rows, vocabulary.files
        tokenizer |= {"tokenizer_class": "BertTokenizer", "do_lower_case": bpe.lowercase}
    else:
        tokens = gpt2_tokens(bpe.folder / "encoder.json", symbols)
        rows, merges = list(tokens.values()), (bpe.folder / "vocab.bpe").read_bytes()
        files = {"vocab.json": json.dumps(tokens, ensure_ascii=False).encode(), "merges.txt": merges}
        tokenizer |= {"tokenizer_class": "RobertaTokenizer", "add_prefix_space": False}

    model = state["model"]
    weights = Weights(path, f"with {bpe.dictionary}, its configuration", {k: k for k in model}, model.get)
    tensors = revert_weights(weights, architecture, rows, head, len(output))
    about = {
        "architectures": [f"{ {'bert': 'Bert', 'roberta': 'Roberta'}[family] }ForSequenceClassification"],
        **config_json(architecture),
        **labels_json(path, config, data_of(state).get("labels", ()), data, len(output)),
        "hidden_dropout_prob": settings.dropout,
        "attention_probs_dropout_prob": settings.attention_dropout,
        "classifier_dropout": settings.pooler_dropout,
    }
    with whole_folder(out) as staging:
        for name, content in files.items():
            (staging / name).write_bytes(content)
        for name, value in (("config.json", about), ("tokenizer_config.json", tokenizer)):
            text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
            (staging / name).write_text(text, encoding="utf-8")
        try:
            save_file(tensors, staging / "model.safetensors", metadata={"format": "pt"})
            shutil.copymode(staging / "config.json", staging / "model.safetensors")  # it is made for its owner alone
        except SafetensorError as error:
            refuse(out, f"cannot be written ({error})", "nothing was kept")
