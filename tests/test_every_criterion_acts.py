"""What every criterion does to the weights, by the table in toolkit.py: all with its terms, nothing without."""

from pathlib import Path

import pytest
import torch
from toolkit import CRITERIA, assert_equal, command, train


@pytest.mark.parametrize("name", CRITERIA)
def test_the_terms_move_the_weights_and_weight_0_does_not(name: str, class_data: Path, tmp_path: Path) -> None:
    """After six updates, dropout on, against plain `sentence_prediction`; without its terms bit for bit."""
    way, weights = CRITERIA[name], {}
    for run, criterion, flags in (
        ("plain", "sentence_prediction", []),
        ("off", way.criterion, [*way.flags, *way.off]),
        ("on", way.criterion, way.flags),
    ):
        options = {"criterion": criterion, "optimizer": "adam", "save_dir": tmp_path / run}
        log = train(command(class_data, *flags, **options))["train_inner"]
        weights[run] = torch.load(tmp_path / run / "checkpoint_last.pt")["model"]
    assert len(log) == 6 and all(line[f"{term}_loss"] > 1e-5 for line in log for term in way.terms)
    assert weights["plain"].keys() == weights["off"].keys() == weights["on"].keys()
    for parameter, weight in weights["plain"].items():
        assert_equal(weights["off"][parameter], weight)
    # the embeddings, which a term's gradient reaches last
    table = "encoder.sentence_encoder.embed_tokens.weight"
    assert float((weights["on"][table] - weights["plain"][table]).norm()) > 1e-4
