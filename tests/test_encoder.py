"""A model of no known kind: what is refused, what trains all the same, and how it is taught to the plugin."""

from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq.models import BaseFairseqModel, register_model, register_model_architecture
from toolkit import (
    BOLD,
    HEAD,
    NO_DROPOUT,
    TINY_MODEL,
    assert_close,
    assert_equal,
    batch,
    build,
    command,
    set_up,
    train,
)
from torch import Tensor, nn

from smart_fairseq import encoder
from smart_fairseq.encoder import Encoder, encoder_of
from smart_fairseq.encoder.base import Insides
from smart_fairseq.errors import UsageError


@register_model("bag_of_words")
class BagOfWords(BaseFairseqModel):
    """As little as `sentence_prediction` asks of a model: a layer over each word, the mean, a head."""

    def __init__(self, args: Any, vocabulary: Any) -> None:
        super().__init__()
        channels = args.encoder_embed_dim
        self.words = nn.Embedding(len(vocabulary), channels, padding_idx=vocabulary.pad())
        self.layer = nn.Sequential(nn.Dropout(args.dropout), nn.Linear(channels, channels), nn.Tanh())
        self.classification_heads = nn.ModuleDict()

    @classmethod
    def build_model(cls, args: Any, task: Any) -> "BagOfWords":
        return cls(args, task.source_dictionary)

    @staticmethod
    def add_args(parser: Any) -> None:
        for flag in TINY_MODEL[2::2]:
            parser.add_argument(flag, type=int)
        parser.add_argument("--dropout", type=float, default=0.1)

    def register_classification_head(self, name: str, num_classes: int, **_: Any) -> None:
        self.classification_heads[name] = nn.Linear(self.words.embedding_dim, num_classes)

    def forward(self, src_tokens: Tensor, classification_head_name: Any = None, **_: Any) -> tuple[Tensor, Any]:
        real = src_tokens.ne(self.words.padding_idx).unsqueeze(-1)
        states = self.layer(self.words(src_tokens)) * real
        if classification_head_name is None:
            return states, {}
        return self.classification_heads[classification_head_name](states.sum(dim=1) / real.sum(dim=1)), {}

    def max_positions(self) -> int:
        return 512


@register_model_architecture("bag_of_words", "bag_of_words")
def bag_of_words(args: Any) -> None:
    """No defaults of its own."""


class BagEncoder(Encoder):
    """What its kind takes to be perturbed, and no more."""

    @classmethod
    def fits(cls, model: Any) -> bool:
        return isinstance(model, BagOfWords)

    def find_insides(self) -> Insides:
        return Insides(
            {"token": self.model.words, "input": self.model.layer[0]}, [self.model.layer], self.model.words.padding_idx
        )


@pytest.fixture
def taught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "KINDS", [*encoder.KINDS, BagEncoder])


def arguments(data: Path, *flags: str, **options: Any) -> list[str]:
    return command(data, *BOLD, "--arch", "bag_of_words", *flags, **options)


def test_an_unknown_kind_is_refused_by_what_to_implement(class_data: Path) -> None:
    """Before the first update."""
    with pytest.raises(
        UsageError, match=r"BagOfWords takes no perturbation .*Encoder with fits and find_insides, .*KINDS"
    ):
        train(arguments(class_data))


def test_the_teacher_alone_needs_no_known_kind(class_data: Path) -> None:
    log = train(arguments(class_data, "--smart-weight", "0"))["train_inner"]
    assert len(log) == 6 and log[-1]["bregman_loss"] > 0 and "smart_loss" not in log[-1]


@pytest.mark.parametrize(
    "flags",
    [[], ["--smart-embedding", "input"], ["--smart-recompute"], ["--smart-mode", "tangent"]],
    ids=" ".join,
)
@pytest.mark.usefixtures("taught")
def test_a_kind_that_is_taught_trains(flags: list[str], class_data: Path, tmp_path: Path) -> None:
    """Its term is there and moves the weights."""
    weights = []
    for weight in ("0", "10"):
        folder = tmp_path / weight
        log = train(arguments(class_data, *flags, "--smart-weight", weight, save_dir=folder))["train_inner"]
        weights.append(torch.load(folder / "checkpoint_last.pt")["model"])
    assert all(line["smart_loss"] > 1e-6 for line in log)
    assert all(line["smart_delta"] == pytest.approx(1e-2, rel=1e-3) for line in log)
    assert not torch.equal(weights[0]["words.weight"], weights[1]["words.weight"])


@pytest.mark.parametrize("place", ["token", "input"])
@pytest.mark.usefixtures("taught")
def test_the_perturbation_arrives(place: str, class_data: Path) -> None:
    """It moves the logits, and those of its own example alone."""
    _, task, model, criterion = build(arguments(class_data))
    inputs = {**batch(task, 4)["net_input"], "classification_head_name": "sentence_classification_head"}
    found = criterion.encoder_for(model.eval())
    assert isinstance(found, BagEncoder) and criterion.encoder_for(model) is found
    perturbation = torch.zeros(*inputs["src_tokens"].shape, 16)
    perturbation[1] = 0.1
    with torch.no_grad():
        clean = model(**inputs)[0]
        with found.perturbed(perturbation, place):
            moved = model(**inputs)[0]
    assert_equal(moved[[0, 2, 3]], clean[[0, 2, 3]])
    assert float((moved[1] - clean[1]).abs().min()) > 1e-4


def test_with_layerdrop_the_encoder_holds_every_layer(class_data: Path) -> None:
    """Whose walk leaves layers out at random; a lean pass runs those that fairseq's own does, with the same loss."""
    task, model, _ = set_up(class_data, "--encoder-layers", "4", "--encoder-layerdrop", "0.5", *NO_DROPOUT)
    inner, encoder = model.encoder.sentence_encoder, encoder_of(model)
    layers = list(inner.layers.children())
    assert len(layers) == 4 and encoder.insides.layers == layers
    assert encoder.lean_parts.keys() == {*layers, inner}
    inputs = batch(task, 4)["net_input"]
    outputs: set[float] = set()
    for seed in range(8):
        torch.manual_seed(seed)
        expected = model(**inputs, features_only=True, classification_head_name=HEAD)[0]
        torch.manual_seed(seed)
        with encoder.lean():
            found = model(**inputs, features_only=True, classification_head_name=HEAD)[0]
        assert_close(found, expected)
        outputs.add(round(float(found.detach().sum()), 4))
    assert len(outputs) > 2
