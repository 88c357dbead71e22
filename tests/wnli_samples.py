"""WNLI's sentences, made up, as files and as prepared data; and what tests of --task smart_wnli do with them."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from data_samples import make_gpt2_bpe
from toolkit import BOLD, NO_DROPOUT, TINY_MODEL, USER_DIR, build, saving

from smart_fairseq.commands import preprocess

NAMES = ("the cat", "the dog", "the old cat", "a seed")
# by the split its rows: sentence, the names put in the pronoun's place, and their labels
SENTENCES = ["{0} saw {1}; it ran.", "{0} fed {1} as it slept.", "{1} and {0} hid. It was there."]
CLAUSES = ["{} ran.", "{} slept.", "{} was there."]


def rows(numbers: Sequence[int], places: Sequence[int]) -> list[tuple[str, str, str]]:
    """Of each sentence the rows for one or both of its names; the first is right."""
    found = []
    for number in numbers:
        names = NAMES[number % 4], NAMES[(number + 1) % 4]
        sentence = SENTENCES[number % 3].format(*names) + f" {number}"
        found += [(sentence, CLAUSES[number % 3].format(names[place]), str(1 - place)) for place in places]
    return found


def official(folder: Path) -> Path:
    """WNLI's files: in train both names but for the last sentence, in dev the name that train has not, in test both."""
    parts = {
        "train": [*rows(range(9), [0, 1]), *rows([9], [0])],
        "dev": rows([9, 10], [1]),
        "test": rows([11, 2], [0, 1]),
    }
    (folder / "WNLI").mkdir(parents=True)
    for part, lines in parts.items():
        head, width = ("index", "sentence1", "sentence2", "label"), 3 if part == "test" else 4
        table = [head, *((str(number), *line) for number, line in enumerate(lines))]
        (folder / "WNLI" / f"{part}.tsv").write_text("".join("\t".join(line[:width]) + "\n" for line in table))
    return folder


def prepared(folder: Path) -> Path:
    """The data folder of `official` files, by a GPT-2 BPE that is made up too."""
    bpe = make_gpt2_bpe(folder / "bpe")
    options = ["--data-dir", str(official(folder)), "--bpe-dir", str(bpe), "--out", str(folder / "bin")]
    assert preprocess.main(["--task", "WNLI-ranking", *options]) == 0
    return folder / "bin"


def command(data: Path, *flags: str, save_dir: Path | None = None, updates: int = 3) -> list[str]:
    """Arguments for fairseq-train on a tiny RoBERTa; later flags win over these."""
    return [
        *(str(data), "--user-dir", USER_DIR, "--task", "smart_wnli", "--wnli-new-lm-head", *TINY_MODEL),
        *("--max-positions", "256", "--criterion", "smart_sentence_prediction", "--optimizer", "mbpp", *BOLD),
        *("--lr", "1e-2", "--lr-scheduler", "fixed", "--batch-size", "4", "--required-batch-size-multiple", "1"),
        *("--seed", "7", "--cpu", "--max-update", str(updates), "--num-workers", "0"),
        *("--log-format", "json", "--log-interval", "1", "--best-checkpoint-metric", "accuracy"),
        *("--maximize-best-checkpoint-metric", *saving(save_dir)),
        *flags,
    ]


def set_up(data: Path, *flags: str) -> tuple[Any, Any, Any]:
    """Task, model and criterion without dropout; the LM head's output is not flat."""
    _, task, model, criterion = build(command(data, "--optimizer", "adam", *NO_DROPOUT, *flags))
    torch.manual_seed(5)
    torch.nn.init.normal_(model.encoder.lm_head.dense.weight)
    torch.nn.init.normal_(model.encoder.sentence_encoder.embed_tokens.weight, std=0.5)
    return task, model.train(), criterion.train()


def assert_worst(model: Any, sample: Any, term: Any, head: str) -> None:
    """A term is the divergence at its perturbation, and signs drawn at random reach less far."""
    assert term.value.item() == pytest.approx(_divergence_at(model, sample, term.perturbation, head), rel=0.03)
    signs = torch.randn(term.perturbation.shape, generator=torch.Generator().manual_seed(1)).sign()
    assert term.value.item() > 10 * _divergence_at(model, sample, signs * term.perturbation.abs(), head) > 0


def _divergence_at(model: Any, sample: Any, perturbation: torch.Tensor, head: str) -> float:
    """Symmetric KL of the groups' shares to the clean ones with something added to the embeddings, by a hook."""

    def shares(added: torch.Tensor) -> torch.Tensor:
        table = model.encoder.sentence_encoder.embed_tokens
        handle = table.register_forward_hook(lambda module, args, x: x + added.reshape_as(x))
        try:
            scores = model(**sample["net_input"], features_only=True, classification_head_name=head)[0]
            return scores.double().log_softmax(1)  # type: ignore[no-any-return]
        finally:
            handle.remove()

    with torch.no_grad():
        clean, moved = shares(torch.zeros_like(perturbation)), shares(perturbation)
    return ((moved.exp() - clean.exp()) * (moved - clean)).sum().item()


def table(path: Path) -> list[list[str]]:
    with open(path, encoding="utf-8") as file:
        return list(csv.reader(file, delimiter="\t"))
