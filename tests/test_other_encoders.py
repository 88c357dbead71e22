"""More encoders through the same seam: XLM-R, which is RoBERTa over sentencepieces, and pre-norm RoBERTa."""

from pathlib import Path
from typing import Any

import pytest
import torch
from data_samples import cut, make_pairs, make_sentencepiece, prepare
from data_samples import train as train_pairs
from fairseq.models.roberta import XLMRModel
from toolkit import BOLD, HEAD, NO_DROPOUT, batch, build, command, in_float64, train

from smart_fairseq.encoder import encoder_of
from smart_fairseq.encoder.base import Forward
from smart_fairseq.export import main
from smart_fairseq.inference import Model

PRE_NORM: dict[str, list[str]] = {
    "roberta_prenorm": ["--arch", "roberta_prenorm"],
    "smart_bert": ["--arch", "smart_bert", "--encoder-normalize-before"],
}


def test_xlm_r_from_texts_to_fairseqs_own_interface(tmp_path: Path) -> None:
    """SMART on pairs of sentencepieces; `predict` and the plain export give what fairseq's XLMRModel says."""
    pieces = make_sentencepiece(tmp_path / "spm")
    make_pairs(tmp_path / "glue" / "RTE", ("entailment", "not_entailment"))
    data = prepare("RTE", tmp_path / "glue", pieces, tmp_path / "RTE-bin", "--bpe", "sentencepiece")
    checkpoint = train_pairs(data, tmp_path / "run", 2, "--separator-token", "2", *BOLD)
    expected = torch.from_numpy(Model(checkpoint, data, cpu=True).predict("valid", 8192).logits).float()
    assert main([str(checkpoint), str(tmp_path / "run" / "plain.pt")]) == 0
    texts = list(zip(*cut(tmp_path / "glue" / "RTE" / "dev.tsv", [2, 3])))
    for name in (checkpoint.name, "plain.pt"):
        files: dict[str, Any] = {"data_name_or_path": str(data), "sentencepiece_model": str(pieces / "spm.model")}
        hub = XLMRModel.from_pretrained(str(tmp_path / "run"), name, **files).eval()
        with torch.no_grad():
            found = torch.cat([hub.predict(HEAD, hub.encode(*row), return_logits=True) for row in texts])
        assert (found - expected).abs().max() < 1e-5
    assert expected.std(0).min() > 1e-3


@pytest.mark.parametrize(
    "flags",
    [[], ["--smart-embedding", "input"], ["--smart-recompute"], ["--smart-mode", "tangent"]],
    ids=" ".join,
)
@pytest.mark.parametrize("arch", PRE_NORM)
def test_pre_norm_trains(arch: str, flags: list[str], class_data: Path, tmp_path: Path) -> None:
    """Its terms are there and move the weights, the last LayerNorm's too, which post-norm has not."""
    weights = []
    for weight in ("0", "10"):
        run = command(class_data, *BOLD, *PRE_NORM[arch], *flags, "--smart-weight", weight, save_dir=tmp_path / weight)
        log = train(run)["train_inner"]
        weights.append(torch.load(tmp_path / weight / "checkpoint_last.pt")["model"])
    assert all(line["smart_loss"] > 1e-6 and line["bregman_loss"] >= 0 for line in log)
    assert log[-1]["bregman_loss"] > 1e-6
    assert all(line["smart_delta"] == pytest.approx(1e-2, rel=1e-3) for line in log)
    for name in ("embed_tokens.weight", "layer_norm.weight"):
        name = f"encoder.sentence_encoder.{name}"
        assert not torch.equal(weights[0][name], weights[1][name])


@pytest.mark.parametrize("place", ["token", "input"])
@pytest.mark.parametrize("arch", PRE_NORM)
def test_forward_mode_products_of_pre_norm(arch: str, place: str, class_data: Path) -> None:
    """J d is a central difference of two passes, and u' (J d) = (J' u)' d, in float64."""
    _, task, model, criterion = build(command(class_data, *NO_DROPOUT, *PRE_NORM[arch]))
    model = in_float64(model)
    sample = batch(task, 4)
    forward = Forward(encoder_of(model), model, sample["net_input"], HEAD, place)
    real = sample["net_input"]["src_tokens"].ne(1).unsqueeze(-1)
    direction = torch.randn(*real.shape[:2], 16, dtype=torch.float64) * real
    logits, change, pull_back = forward.products(encoder_of(model).frozen_weights(), direction)
    with torch.no_grad():
        ahead, behind = (forward(perturbation=size * direction) for size in (1e-5, -1e-5))
    torch.testing.assert_close(change, (ahead - behind) / 2e-5, rtol=1e-6, atol=1e-9)
    cotangent = torch.randn_like(logits)
    back = (pull_back(cotangent) * direction).sum()
    torch.testing.assert_close(back, (cotangent * change).sum(), rtol=1e-9, atol=1e-12)
    assert change.abs().max() > 1e-4
