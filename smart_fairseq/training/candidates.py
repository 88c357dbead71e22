"""Candidates for a pronoun as batches and as outputs of a model: see `smart_fairseq.method.candidates`.

A batch holds G groups of up to K candidates, each in a row of its own of ``src_tokens`` [G * K, T]; a place without a
candidate has a row of one token. What stands under the masks is ``candidates`` [G, K, T], padding elsewhere. To SMART a
group is one example: its candidates' embeddings are perturbed together, and its outputs are the scores [G, K].

For HNN (`smart_fairseq.method.hybrid`) each group has K rows more, behind the first: the sentence with its pronoun, and
the candidate as a second text. There ``candidates`` [G, 2 * K, T] holds the pronoun's first token and the candidate's.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq.data import Dictionary
from torch import Tensor, nn

from ..data.binarize import read_classes, read_indexed, read_manifest
from ..data.lines import located
from ..data.winograd import NOUNS
from ..encoder import encoder_of
from ..method.candidates import best_of_others, candidate_scores, ranked
from ..method.hybrid import hybrid_loss, hybrid_scores, similarities
from .batches import Groups

HEAD, HYBRID = "candidates", "hnn"  # the heads' names among the model's
INIT_STD = 0.02  # BERT's, for the weights that no checkpoint brings
UNKNOWN = -1

Tokens = tuple[int, ...]


@dataclass
class Group:
    """A sentence with a pronoun: the tokens before and after it, and by a candidate's tokens its label and rows.

    ``pronoun``: its tokens; none in data that were prepared without it.
    """

    before: Tokens
    pronoun: Tokens
    after: Tokens
    labels: dict[Tokens, int] = field(default_factory=dict)
    rows: dict[Tokens, list[int]] = field(default_factory=dict)

    def longest(self, separators: int | None) -> int:
        """Tokens of its longest row, those around the texts included; ``separators`` as `CandidateDataset` has it."""
        pair = 0 if separators is None else len(self.pronoun) + separators
        return len(self.before) + len(self.after) + max(map(len, self.labels)) + 2 + pair


def _candidates(folder: Path, split: str) -> list[tuple[Tokens, Tokens, Tokens, Tokens]]:
    """Of each row the tokens before the candidate, the candidate's, those after it, and the pronoun's."""
    texts, starts, ends = (read_indexed(folder / f"input{place}" / split) for place in range(3))
    pronouns = read_indexed(folder / "input3" / split) if (folder / "input3").is_dir() else starts
    if not len(texts) == len(starts) == len(ends) == len(pronouns):
        raise located(folder, f"the texts of its split {split} have different numbers of rows; run preprocess again")
    found = []
    for number, rows in enumerate(zip(texts, starts, ends, pronouns), start=1):
        text, before, until, pronoun = (tuple(row.tolist())[:-1] for row in rows)
        begun = all(longer[: len(before)] == before for longer in (text, pronoun))
        if not begun or text[: len(until)] != until or len(until) <= len(before):
            message = f"row {number} of {split} does not hold its candidate as tokens of its own; run preprocess again"
            raise located(folder, message)
        found.append((before, until[len(before) :], text[len(until) :], pronoun[len(before) :]))
    return found


def read_groups(folder: Path, split: str) -> list[Group]:
    """The groups of a split, with the noun phrases that preprocess found, and but for ``train`` its candidates too.

    The labels of what does not come from the split itself are not known, but for a noun phrase to train on, which is
    wrong. Raises `UsageError` for files that are missing, damaged or do not belong together.
    """
    splits = read_manifest(folder)["rows"]
    if split not in splits:
        raise located(folder, f"has no split {split}; preprocess a folder that holds it")
    rows = _candidates(folder, split)
    labels = [UNKNOWN] * len(rows)
    if (folder / "label" / f"{split}.idx").is_file():
        labels = read_classes(folder / "label" / split)
    elif split == "train":
        raise located(folder / "label" / "train.bin", "is missing, and training needs labels; run preprocess again")
    if len(labels) != len(rows):
        raise located(folder / "label" / f"{split}.bin", f"does not have the {len(rows)} rows of its texts")
    groups: dict[tuple[Tokens, Tokens], Group] = {}
    for number, ((before, candidate, after, pronoun), label) in enumerate(zip(rows, labels)):
        group = groups.setdefault((before, after), Group(before, pronoun, after))
        group.labels.setdefault(candidate, label)
        group.rows.setdefault(candidate, []).append(number)
    for other in (NOUNS, "train"):
        if other != split and other in splits:
            for before, candidate, after, _ in _candidates(folder, other):
                if (before, after) in groups:
                    groups[before, after].labels.setdefault(candidate, 0 if split == "train" else UNKNOWN)
    return list(groups.values())


class CandidateDataset(Groups):
    """Pronouns with their candidates as examples; ``seed`` as `Groups` has it.

    separators: with HNN's rows, in which so many ends of text stand between sentence and candidate; None: without.
    """

    def __init__(
        self, groups: Sequence[Group], dictionary: Dictionary, seed: int | None, separators: int | None
    ) -> None:
        longest, rows = [group.longest(separators) for group in groups], 1 if separators is None else 2
        super().__init__(np.array(longest), np.array([rows * len(group.labels) for group in groups]), seed)
        self.groups, self.dictionary, self.separators = groups, dictionary, separators

    def __getitem__(self, index: int) -> tuple[int, Group]:
        return int(index), self.groups[index]

    def collater(self, samples: Sequence[tuple[int, Group]]) -> dict[str, Any]:
        """A batch; ``target`` are the labels [G, K], ``rows`` [R, 3] a row's number, group and candidate."""
        if not samples:
            return {}
        words, groups = self.dictionary, [group for _, group in samples]
        most, mask, end = max(len(group.labels) for group in groups), words.index("<mask>"), words.eos()
        longest = max(group.longest(self.separators) for group in groups)
        shape = (len(groups), most if self.separators is None else 2 * most, longest)
        tokens, candidates = (torch.full(shape, words.pad(), dtype=torch.long) for _ in range(2))
        tokens[:, :, 0] = words.bos()
        target, rows, lengths = torch.full((len(groups), most), UNKNOWN), [], torch.ones(shape[:2], dtype=torch.long)

        def put(number: int, place: int, row: Sequence[int], marked: Mapping[int, Sequence[int]]) -> None:
            tokens[number, place, 1 : len(row) + 1] = torch.tensor(row)
            lengths[number, place] = len(row) + 1
            for start, part in marked.items():
                candidates[number, place, start : start + len(part)] = torch.tensor(part)

        for number, group in enumerate(groups):
            start = len(group.before) + 1
            for place, (candidate, label) in enumerate(group.labels.items()):
                masked = [*group.before, *[mask] * len(candidate), *group.after, end]
                put(number, place, masked, {start: candidate})
                if self.separators is not None:
                    first = [*group.before, *group.pronoun, *group.after, *[end] * self.separators]
                    marked = {start: group.pronoun[:1], len(first) + 1: candidate}
                    put(number, most + place, [*first, *candidate, end], marked)
                target[number, place] = label
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

    It has no parameters of its own, but trains those that are ``borrowed``.
    """

    name = HEAD

    def __init__(self, lm_head: nn.Module, padding_idx: int) -> None:
        super().__init__()
        self.borrowed = (lm_head,)  # in a tuple it is no module of this one, so that its weights have one name
        self.padding_idx = padding_idx
        self.candidates: Tensor | None = None

    def forward(self, features: Tensor) -> Tensor:
        """[G * K, T, C] -> [G, K]."""
        if self.candidates is None:
            raise RuntimeError("the forward was given no candidates")
        return self.score(features.view(*self.candidates.shape, -1), self.candidates)

    def score(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Features [G, K, T, C] and candidates [G, K, T] -> log-probabilities [G, K]."""
        rows = tokens.flatten(0, 1)
        masked = rows.ne(self.padding_idx)
        logits = self.borrowed[0](features.flatten(0, 1)[masked])
        return candidate_scores(logits, rows[masked], masked.nonzero()[:, 0], len(rows)).view(tokens.shape[:2])

    def note(self, model: nn.Module, args: Any, inputs: dict[str, Any]) -> None:
        """For ``register_forward_pre_hook`` of the model: ``candidates`` of its batch."""
        self.candidates = inputs.get("candidates")


class Matrix(nn.Module):
    """A linear map without a bias, not even the name of one: fairseq would report it as shared. Starts as BERT's do."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.out_features = channels
        self.weight = nn.Parameter(torch.empty(channels, channels).normal_(std=INIT_STD))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


class HybridHead(CandidateHead):
    """HNN's in its place: [2 * G * K, T, C] -> [G, K]; ``gamma`` as in `hybrid_scores`.

    ``dense`` and ``out_proj``, by whose sizes fairseq tells heads apart, are W_1 and W_2.
    """

    name = HYBRID

    def __init__(self, lm_head: nn.Module, padding_idx: int, channels: int, gamma: float) -> None:
        super().__init__(lm_head, padding_idx)
        self.dense, self.out_proj = Matrix(channels), Matrix(channels)
        self.gamma = gamma
        self._kept: list[tuple[Tensor, Tensor]] | None = None

    @contextmanager
    def keeping(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """The log-probabilities and similarities, [G, K] each, of the passes within the block, for the loss."""
        self._kept = []
        try:
            yield self._kept
        finally:
            self._kept = None

    def score(self, features: Tensor, tokens: Tensor) -> Tensor:
        (of_masks, of_pairs), (masked, pairs) = features.chunk(2, dim=1), tokens.chunk(2, dim=1)
        logs = super().score(of_masks, masked)
        marked = pairs.flatten(0, 1).ne(self.padding_idx)
        similarity = similarities(of_pairs.flatten(0, 1), marked, self.dense, self.out_proj).view_as(logs)
        if self._kept is not None:
            self._kept.append((logs, similarity))
        return hybrid_scores(logs, similarity, self.gamma)


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
    return _judged(scores, loss_of(scores, sample["target"]), sample)


def judge_hybrid(model: Any, sample: dict[str, Any], beta: float, gamma: float) -> tuple[Tensor, int, dict[str, Any]]:
    """The same by HNN's head and loss; ``beta`` and ``gamma`` as in `hybrid_loss`."""
    head: Any = encoder_of(model).model.classification_heads[HYBRID]
    with head.keeping() as kept:
        scores, _ = model(**sample["net_input"], features_only=True, classification_head_name=HYBRID)
    (logs, similarity), target = kept[-1], sample["target"]
    return _judged(scores, hybrid_loss(scores, logs, similarity, target, beta, gamma), sample)


def _judged(scores: Tensor, losses: Tensor, sample: dict[str, Any]) -> tuple[Tensor, int, dict[str, Any]]:
    target = sample["target"]
    loss, size = losses.sum(), int(ranked(target).sum())
    labels = target[sample["rows"][:, 1], sample["rows"][:, 2]]
    wrong, right = row_logits(scores, sample["rows"]).unbind(-1)
    correct = ((right >= wrong) == (labels == 1)) & (labels != UNKNOWN)
    log = {
        "loss": loss.detach(),
        "ntokens": sample["ntokens"],
        "nsentences": int((labels != UNKNOWN).sum()),
        "sample_size": size,
        "ncorrect": correct.sum(),
    }
    return loss, size, log
