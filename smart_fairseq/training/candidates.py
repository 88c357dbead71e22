"""Candidates for a pronoun as batches and as outputs of a model: see `smart_fairseq.method.candidates`.

A batch holds G groups of up to K candidates, each in a row of its own of ``src_tokens`` [G * K, T]; a place without a
candidate has a row of one token. What stands under the masks is ``candidates`` [G, K, T], padding elsewhere. To SMART a
group is one example: its candidates' embeddings are perturbed together, and its outputs are the scores [G, K].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq.data import Dictionary
from torch import Tensor, nn

from ..data.binarize import read_indexed, read_manifest
from ..data.bpe import SPECIAL_SYMBOLS
from ..data.lines import located
from ..data.winograd import NOUNS
from ..method.candidates import best_of_others, candidate_scores, ranked
from .batches import Groups

__all__ = ["CandidateDataset", "CandidateHead", "Group", "judge", "read_groups", "row_logits"]

HEAD = "candidates"  # its name among the model's classification heads
UNKNOWN = -1

Tokens = tuple[int, ...]


@dataclass
class Group:
    """A sentence with a pronoun: the tokens before and after it, and by a candidate's tokens its label and rows."""

    before: Tokens
    after: Tokens
    labels: dict[Tokens, int] = field(default_factory=dict)
    rows: dict[Tokens, list[int]] = field(default_factory=dict)

    @property
    def longest(self) -> int:
        """Tokens of its longest row, the two at the ends included."""
        return len(self.before) + len(self.after) + max(map(len, self.labels)) + 2


def _candidates(folder: Path, split: str) -> list[tuple[Tokens, Tokens, Tokens]]:
    """Of each row the tokens before the candidate, the candidate's and those after it."""
    texts, starts, ends = (read_indexed(folder / f"input{place}" / split) for place in range(3))
    if not len(texts) == len(starts) == len(ends):
        raise located(folder, 0, f"the texts of its split {split} have different numbers of rows; run preprocess again")
    found = []
    for number, rows in enumerate(zip(texts, starts, ends), start=1):
        text, before, until = (tuple(row.tolist())[:-1] for row in rows)
        if text[: len(before)] != before or text[: len(until)] != until or len(until) <= len(before):
            message = f"row {number} of {split} does not hold its candidate as tokens of its own; run preprocess again"
            raise located(folder, 0, message)
        found.append((before, until[len(before) :], text[len(until) :]))
    return found


def read_groups(folder: Path, split: str) -> list[Group]:
    """The groups of a split, with the noun phrases that preprocess found, and but for ``train`` its candidates too.

    The labels of what does not come from the split itself are not known, but for a noun phrase to train on, which is
    wrong. Raises `UsageError` for files that are missing, damaged or do not belong together.
    """
    splits = read_manifest(folder)["rows"]
    if split not in splits:
        raise located(folder, 0, f"has no split {split}; preprocess a folder that holds it")
    rows = _candidates(folder, split)
    labels = [UNKNOWN] * len(rows)
    if (folder / "label" / f"{split}.idx").is_file():
        labels = [int(row[0]) - len(SPECIAL_SYMBOLS) for row in read_indexed(folder / "label" / split)]
    elif split == "train":
        raise located(folder / "label" / "train.bin", 0, "is missing, and training needs labels; run preprocess again")
    if len(labels) != len(rows):
        raise located(folder / "label" / f"{split}.bin", 0, f"does not have the {len(rows)} rows of its texts")
    groups: dict[tuple[Tokens, Tokens], Group] = {}
    for number, ((before, candidate, after), label) in enumerate(zip(rows, labels)):
        group = groups.setdefault((before, after), Group(before, after))
        group.labels.setdefault(candidate, label)
        group.rows.setdefault(candidate, []).append(number)
    for other in (NOUNS, "train"):
        if other != split and other in splits:
            for before, candidate, after in _candidates(folder, other):
                if (before, after) in groups:
                    groups[before, after].labels.setdefault(candidate, 0 if split == "train" else UNKNOWN)
    return list(groups.values())


class CandidateDataset(Groups):
    """Pronouns with their candidates as examples; ``seed`` as `Groups` has it."""

    def __init__(self, groups: Sequence[Group], dictionary: Dictionary, seed: int | None = None) -> None:
        longest, counts = ([group.longest for group in groups], [len(group.labels) for group in groups])
        super().__init__(np.array(longest), np.array(counts), seed)
        self.groups, self.dictionary = groups, dictionary

    def __getitem__(self, index: int) -> tuple[int, Group]:
        return int(index), self.groups[index]

    def collater(self, samples: Sequence[tuple[int, Group]]) -> dict[str, Any]:
        """A batch; ``target`` are the labels [G, K], ``rows`` [R, 3] a row's number, group and candidate."""
        if not samples:
            return {}
        words, groups = self.dictionary, [group for _, group in samples]
        most, mask = max(len(group.labels) for group in groups), words.index("<mask>")
        shape = (len(groups), most, max(group.longest for group in groups))
        tokens, candidates = (torch.full(shape, words.pad(), dtype=torch.long) for _ in range(2))
        tokens[:, :, 0] = words.bos()
        target, rows, lengths = torch.full(shape[:2], UNKNOWN), [], torch.ones(shape[:2], dtype=torch.long)
        for number, group in enumerate(groups):
            for place, (candidate, label) in enumerate(group.labels.items()):
                masked = [*group.before, *[mask] * len(candidate), *group.after, words.eos()]
                tokens[number, place, 1 : len(masked) + 1] = torch.tensor(masked)
                start = len(group.before) + 1
                candidates[number, place, start : start + len(candidate)] = torch.tensor(candidate)
                target[number, place], lengths[number, place] = label, len(masked) + 1
                rows += [(row, number, place) for row in group.rows.get(candidate, ())]
        net_input = {"src_tokens": tokens.flatten(0, 1), "src_lengths": lengths.flatten(), "candidates": candidates}
        return {
            "id": torch.tensor([number for number, _ in samples]),
            "nsentences": len(groups),
            "ntokens": int(lengths.sum()),
            "net_input": net_input,
            "target": target,
            "rows": torch.tensor(rows, dtype=torch.long).reshape(-1, 3),
        }


class CandidateHead(nn.Module):
    """In a classification head's place: from the features of a batch's rows to the scores, by the model's LM head.

    It has no parameters of its own; `attach` puts it into a model.
    """

    def __init__(self, lm_head: nn.Module, padding_idx: int) -> None:
        super().__init__()
        self._lm_head = [lm_head]  # in a list it is no module of this one, so that its weights have one name
        self.padding_idx = padding_idx
        self.candidates: Tensor | None = None

    def forward(self, features: Tensor) -> Tensor:
        """[G * K, T, C] -> [G, K]."""
        if self.candidates is None:
            raise RuntimeError("the forward was given no candidates")
        tokens = self.candidates.flatten(0, 1)
        masked = tokens.ne(self.padding_idx)
        scores = candidate_scores(
            self._lm_head[0](features[masked]), tokens[masked], masked.nonzero()[:, 0], len(tokens)
        )
        return scores.view(self.candidates.shape[:2])

    def note(self, model: nn.Module, args: Any, inputs: dict[str, Any]) -> None:
        """For ``register_forward_pre_hook`` of the model: ``candidates`` of its batch."""
        self.candidates = inputs.get("candidates")

    def attach(self, model: Any) -> None:
        """Make this a head of the model, which from now on takes ``candidates`` [G, K, T] too."""
        model.classification_heads[HEAD] = self
        # a bound method goes along where a model is copied
        model.register_forward_pre_hook(self.note, with_kwargs=True)


def row_logits(scores: Tensor, rows: Tensor) -> Tensor:
    """Two logits for each row of the file, wrong and right: its group's best other score and its own.

    Args:
        scores: [G, K].
        rows: [R, 3], as a batch has them.
    Returns:
        [R, 2]; the second is the larger, or equal, where no other candidate of the group has a higher score.
    """
    both = torch.stack([best_of_others(scores), scores], dim=-1)
    return both[rows[:, 1], rows[:, 2]]


def judge(
    model: Any, sample: dict[str, Any], loss_of: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, int, dict[str, Any]]:
    """Loss, number of groups that have one, and log, as `sentence_prediction`'s; accuracy is that of labelled rows.

    ``loss_of``: scores [G, K] and labels [G, K] -> [G].
    """
    scores, _ = model(**sample["net_input"], features_only=True, classification_head_name=HEAD)
    target = sample["target"]
    loss, size = loss_of(scores, target).sum(), int(ranked(target).sum())
    right = scores >= best_of_others(scores)
    number, place = sample["rows"][:, 1], sample["rows"][:, 2]
    labels = target[number, place]
    correct = (right[number, place] == (labels == 1)) & (labels != UNKNOWN)
    log = {
        "loss": loss.detach(),
        "ntokens": sample["ntokens"],
        "nsentences": int((labels != UNKNOWN).sum()),
        "sample_size": size,
        "ncorrect": correct.sum(),
    }
    return loss, size, log
