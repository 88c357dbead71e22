"""A Hugging Face folder of the RoBERTa or BERT family as a checkpoint that fairseq trains from.

MODEL_DIR holds config.json, model.safetensors and the vocabulary (vocab.json and merges.txt, or vocab.txt, or
tokenizer.json). OUT_DIR receives

    model.pt      the weights and a fairseq configuration, plain containers and tensors only
    dict.txt      fairseq's dictionary. Its counts are not known to Hugging Face: 1 for every symbol, 0 for the
                  fillers of rows that have no token (masked language modelling uses counts with
                  --freq-weighted-replacement; fine-tuning for sentences does not)
    bpe.json      {"bpe": "gpt2"} or {"bpe": "bert", "lowercase": true}
    encoder.json, vocab.bpe (gpt2) or vocab.txt (bert)
    import.json   sizes, the source file's SHA-256, and fairseq-train's flags and hydra's overrides for the model

Where the two models differ, and what is done about it:

- fairseq starts every dictionary with <s> <pad> </s> <unk> and its tasks append <mask>. Rows of the embedding
  (and of the LM head's bias) are permuted to that order; all others keep their order.
- fairseq has no token types. BERT's two are smart_bert's; a third one, which no pair of texts has, is left out. Where
  there is but one, as in RoBERTa, it is added to the word embeddings, in the order in which BERT adds them, so nothing
  is lost. An LM head that shares the embeddings then adds the same number to the logits of all symbols, which no
  probability can see.
- fairseq counts positions from 2 (padding index + 1): BERT's row i becomes row i + 2; RoBERTa's have that offset.
- fairseq's LayerNorm has epsilon 1e-5; other epsilons need `--arch smart_bert` (models/smart_bert.py).
- fairseq's classification head has a dense layer of its own in the place of BERT's pooler: model.pt holds the pooler,
  from which smart_bert starts every head. One that was never trained has the spread with which BERT starts one:
  MiniLM's is flatter, 0.009, and so would a head's first outputs be, and the terms. RoBERTa's is left out.

Sources: Devlin et al. (2019), arXiv:1810.04805; Liu et al. (2019), arXiv:1907.11692; Radford et al. (2019) for
the byte-level vocabulary: ids 0 to 255 are the bytes, 256 + i is merge i, then <|endoftext|>.
"""

import json
from pathlib import Path
from typing import Any

import torch
from fairseq.criterions.masked_lm import MaskedLmConfig
from fairseq.dataclass.configs import FairseqConfig
from fairseq.tasks.masked_lm import MaskedLMConfig
from omegaconf import OmegaConf
from torch import Tensor

from ..errors import refuse
from ..files import sha256, whole_files
from ..models.smart_bert import never_trained
from .checkpoint import EMBEDDINGS, LM_HEAD, POOLER, TOKEN_TYPES, fairseq_checkpoint, plain
from .config import Config, architecture, architecture_flags, recipe_overrides
from .vocabulary import read_bert_vocabulary, read_gpt2_vocabulary
from .weights import LM_HEAD_SEED, POOLER_STD, convert_weights, open_weights

WRITTEN_FILES = ("model.pt", "dict.txt", "encoder.json", "vocab.bpe", "vocab.txt", "bpe.json", "import.json")


def build_checkpoint(state: dict[str, Tensor], settings: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint as fairseq-train writes it after 0 updates, task masked_lm, of plain containers and tensors."""
    config = OmegaConf.structured(FairseqConfig())
    config.task = MaskedLMConfig("masked_lm", data=".", tokens_per_sample=settings["max_positions"])
    config.criterion = MaskedLmConfig("masked_lm")
    config.model = {"_name": settings["arch"], **settings}
    return fairseq_checkpoint(state, plain(config), "MaskedLmLoss")


def convert_folder(model_dir: Path, config: Config, out_dir: Path) -> dict[str, Any]:
    """What `import_hf` does once config.json is read and ``out_dir`` is free; the same report."""
    read_vocabulary = {"bert": read_bert_vocabulary, "roberta": read_gpt2_vocabulary}[config.model_type]
    vocabulary = read_vocabulary(model_dir, config)
    # fairseq computes positions from the padding index, which is 1 in all of its dictionaries
    if config.model_type == "roberta" and not config.pad_token_id == vocabulary.rows[1] == 1:
        what = f"pad_token_id is {config.pad_token_id} and <pad> has the id {vocabulary.rows[1]}"
        refuse(config.path, what, "RoBERTa's positions start at 2 because both are 1; allowed: 1")
    with open_weights(model_dir, config) as weights:
        state, head_from_file, left_out = convert_weights(weights, config, vocabulary.rows)

    settings = architecture(config, untied=state[LM_HEAD] is not state[EMBEDDINGS])
    report: dict[str, Any] = {
        "model_type": config.model_type,
        "sizes": {**config.sizes._asdict(), "max_positions": settings["max_positions"]},
        "layer_norm_eps": config.layer_norm_eps,
        "source": {"file": "model.safetensors", "sha256": sha256(model_dir / "model.safetensors")},
        "lm_head": "file" if head_from_file else "initialised",
        "left_out": left_out,
        "flags": architecture_flags(settings),
        "overrides": recipe_overrides(settings, separator=config.model_type == "roberta"),
    }
    with whole_files(out_dir, WRITTEN_FILES) as staging:
        for name, content in vocabulary.files.items():
            (staging / name).write_bytes(content)
        (staging / "bpe.json").write_text(json.dumps(vocabulary.bpe) + "\n", encoding="utf-8")
        (staging / "dict.txt").write_text(vocabulary.dictionary, encoding="utf-8", newline="\n")
        (staging / "import.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        with open(staging / "model.pt", "wb") as file:  # which tells why it cannot be written
            torch.save(build_checkpoint(state, settings), file)

    initialised = f"the file has none, initialised with seed {LM_HEAD_SEED}; classification does not use it"
    notes = [
        *vocabulary.notes,
        "counts in dict.txt are not known to Hugging Face files: 1 for symbols, 0 for fillers (madeupword)",
        "LM head: " + ("taken from the file" if head_from_file else initialised),
    ]
    if config.model_type == "bert":
        pooler = "the file has none"
        if POOLER + ".weight" in state:
            pooler = "classification heads start from it"
            if never_trained(state[POOLER + ".bias"]):
                pooler += f"; never trained (its biases are 0), so it was given BERT's first spread, {POOLER_STD}"
        notes.append(f"pooler: {pooler}")
        types = "the model goes without" if TOKEN_TYPES not in state else f"the first 2 of {config.sizes.token_types}"
        notes.append(f"token types: {types}")
    if left_out:
        notes.append("left out: " + ", ".join(left_out))
    return {**report, "notes": notes}
