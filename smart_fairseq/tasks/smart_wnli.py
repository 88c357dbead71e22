"""`smart_wnli`: candidates for a pronoun, ranked by the encoder's masked-LM head (`smart_fairseq.method.candidates`).

The data are what preprocess makes of ``--task WNLI-ranking`` and ``--task WSC``. The scores of a group's candidates
stand where a classification head's logits do, so that SMART's terms are those of the softmax over the group, and the
teacher, the forms of the term and the precisions are the criterion's own. With ``--wnli-hnn`` a similarity that shares
the encoder scores them too (`smart_fairseq.method.hybrid`).
"""

import contextlib
import functools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairseq import models
from fairseq.dataclass import FairseqDataclass
from fairseq.tasks import register_task
from fairseq.tasks.sentence_prediction import SentencePredictionTask
from omegaconf import II, MISSING, OmegaConf, open_dict

from ..config.flags import flag
from ..data.binarize import read_manifest
from ..data.folders import task_of
from ..data.lines import located
from ..encoder import encoder_of
from ..errors import UsageError, require
from ..method.candidates import margin_loss
from ..training.candidates import (
    HEAD,
    HYBRID,
    CandidateDataset,
    CandidateHead,
    HybridHead,
    judge,
    judge_hybrid,
    read_groups,
)
from ..training.metrics import REPORTED
from ..training.objective import Objective

logger = logging.getLogger(__name__)


# fairseq reads these annotations at run time: no `from __future__ import annotations` in this file
@dataclass
class WnliConfig(FairseqDataclass):
    data: str = flag(MISSING, "folder that preprocess wrote for WNLI-ranking or WSC")
    wnli_alpha: float = flag(20.0, "weight of the margin between right and wrong candidate")
    wnli_beta: float = flag(0.2, "the margin, in nats")
    wnli_hnn: bool = flag(False, "score by HNN: LM head and similarity, and its loss in place of the margin's")
    wnli_hnn_beta: float = flag(0.6, "of HNN, the margin between scores from 0 to 1")
    wnli_hnn_gamma: float = flag(10.0, "of HNN, what scores are multiplied by to be ranked")
    wnli_new_lm_head: bool = flag(False, "train with an encoder whose checkpoint holds no trained LM head")
    no_shuffle: bool = flag(False, "keep the groups in the order of the file")
    max_positions: int = flag(512, "max tokens per row")
    # a bare interpolation, so that it does not become a flag
    seed: int = II("common.seed")


@register_task("smart_wnli", dataclass=WnliConfig)
class SmartWnli(SentencePredictionTask):
    """The task; its flags are `WnliConfig`. Raises `UsageError` for data of another task, or damaged ones.

    separators: of HNN's rows, as `CandidateDataset` has it; None without HNN.
    """

    def __init__(self, cfg: WnliConfig, data_dictionary: Any, label_dictionary: Any, separators: int | None) -> None:
        for name in ("wnli_alpha", "wnli_beta", "wnli_hnn_beta"):
            require(getattr(cfg, name) >= 0, f"--{name.replace('_', '-')}", getattr(cfg, name), "0 or above")
        require(cfg.wnli_hnn_gamma > 0, "--wnli-hnn-gamma", cfg.wnli_hnn_gamma, "above 0")
        for name in ("wnli_alpha", "wnli_beta") if cfg.wnli_hnn else ():
            if getattr(cfg, name) != getattr(WnliConfig, name):
                given = f"--{name.replace('_', '-')} is {getattr(cfg, name)}"
                raise UsageError(f"{given} with --wnli-hnn, whose loss has another margin; give --wnli-hnn-beta")
        super().__init__(cfg, data_dictionary, label_dictionary)
        if cfg.wnli_hnn:
            head, judged = HYBRID, functools.partial(judge_hybrid, beta=cfg.wnli_hnn_beta, gamma=cfg.wnli_hnn_gamma)
        else:
            loss = functools.partial(margin_loss, alpha=cfg.wnli_alpha, beta=cfg.wnli_beta)
            head, judged = HEAD, functools.partial(judge, loss_of=loss)
        self.objectives = [Objective(self, head, num_classes=2, regression=False, judge=judged)]
        self._separators = separators
        self._checked = False

    @classmethod
    def setup_task(cls, cfg: WnliConfig, **kwargs: Any) -> "SmartWnli":
        folder = Path(cfg.data)
        task = task_of(folder)
        if not task.candidates:
            other = "--task smart_wnli needs what preprocess --task WNLI-ranking or --task WSC writes"
            raise located(folder, f"holds {task.name}; {other}")
        if cfg.wnli_hnn and not (folder / "input3").is_dir():
            raise located(folder, "holds no pronouns, which --wnli-hnn needs; run preprocess again")
        separators = 1 if read_manifest(folder).get("bpe") == "bert" else 2
        return cls(
            cfg,
            cls.load_dictionary(str(folder / "input0" / "dict.txt")),
            cls.load_dictionary(str(folder / "label" / "dict.txt")),
            separators if cfg.wnli_hnn else None,
        )

    def load_dataset(
        self, split: str, combine: bool = False, *, whole: bool = False, **kwargs: Any
    ) -> CandidateDataset:
        """The groups of a split; of ``train``, unless it is wanted ``whole``, those that have something to rank."""
        folder = Path(self.cfg.data)
        groups = read_groups(folder, split)
        if split == "train" and not whole:
            used = [group for group in groups if {0, 1} <= set(group.labels.values())]
            if len(used) < len(groups):
                logger.info(
                    f"training uses {len(used)} of {len(groups)} pronouns: the others lack a right or a wrong candidate"
                )
            if not used:
                raise located(folder, "no pronoun of train has a right and a wrong candidate; there is nothing to rank")
            groups = used
        else:
            alone = sum(len(rows) for group in groups if len(group.labels) == 1 for rows in group.rows.values())
            if alone:
                logger.warning(f"{alone} rows of {split} have no other candidate, so that their own is the best")
        if not groups:
            raise located(folder, f"its split {split} has no rows; preprocess a file that has some, or remove it")
        longest = max(group.longest(self._separators) for group in groups)
        if longest > self.cfg.max_positions:
            raise located(
                folder, f"{split} has rows of {longest} tokens, above --max-positions {self.cfg.max_positions}"
            )
        shuffle = split == "train" and not self.cfg.no_shuffle
        dataset = CandidateDataset(groups, self.source_dictionary, self.cfg.seed if shuffle else None, self._separators)
        self.datasets[split] = dataset
        return dataset

    def build_model(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        with open_dict(cfg) if OmegaConf.is_config(cfg) else contextlib.nullcontext():
            cfg.max_positions = self.cfg.max_positions
        model = models.build_model(cfg, self, from_checkpoint)
        encoder, padding_idx = encoder_of(model), self.source_dictionary.pad()
        head: CandidateHead
        if self.cfg.wnli_hnn:
            head = HybridHead(encoder.lm_head, padding_idx, encoder.table.shape[1], self.cfg.wnli_hnn_gamma)
        else:
            head = CandidateHead(encoder.lm_head, padding_idx)
        model.classification_heads[head.name] = head
        # a bound method goes along where a model is copied
        model.register_forward_pre_hook(head.note, with_kwargs=True)
        return model

    def build_criterion(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        if cfg._name != "smart_sentence_prediction":
            raise UsageError(
                f"--criterion is {cfg._name} with --task smart_wnli, which needs smart_sentence_prediction (with "
                "--smart-weight 0 without its term)"
            )
        for name in ("regression_target", "smart_report_calibration", *REPORTED):
            if getattr(cfg, name):
                raise UsageError(f"--{name.replace('_', '-')} is set with --task smart_wnli, which ranks; leave it out")
        return super().build_criterion(cfg, from_checkpoint)

    def begin_epoch(self, epoch: int, model: Any) -> None:
        super().begin_epoch(epoch, model)
        if not self._checked:
            self._check_lm_head(model)
        self._checked = True

    def _check_lm_head(self, model: Any) -> None:
        """An LM head that no one has trained says nothing of candidates: its bias is still 0 for every token."""
        bias: Any = encoder_of(model).lm_head.bias
        if bool(bias.detach().any()):
            return
        about = "the encoder's LM head is untrained: the checkpoint holds none, or there is no checkpoint"
        if not self.cfg.wnli_new_lm_head:
            raise UsageError(
                f"{about}. Candidates are scored by it: take an encoder with its masked-LM head (roberta.base, "
                "roberta.large, BERT), or give --wnli-new-lm-head to train one from these sentences alone"
            )
        logger.warning(f"{about}; --wnli-new-lm-head trains one from these sentences alone, whose scores mean little")
