"""Encoders give the symbols that fairseq's own give, and dict.txt is read as fairseq reads it."""

import json

import pytest
from data_samples import WORDS, make_bert_bpe, make_gpt2_bpe, make_pairs, make_sentencepiece, prepare, sentences, write

from smart_fairseq.data.binarize import read_indexed
from smart_fairseq.data.bpe import BpeFiles, find_bpe, load_vocabulary, make_encoder


def test_gpt2_equals_fairseqs_encoder(tmp_path):
    from fairseq.data.encoders.gpt2_bpe_utils import get_encoder

    folder = make_gpt2_bpe(tmp_path)
    fairseqs = get_encoder(str(folder / "encoder.json"), str(folder / "vocab.bpe"))
    ours = make_encoder(find_bpe("gpt2", folder))
    odd = [
        "",
        "the dog\u2028the cat",
        "a\tb\x0bc\x1cd\x85e\xa0f",
        "  two   spaces ",
        "👍🏽 ok",
        "I'LL we'll",
        "\ufeffx",
    ]
    for text in [*sentences(100), *WORDS, *odd]:
        assert ours(text) == [str(number) for number in fairseqs.encode(text)]


def test_bert_symbols(tmp_path):
    encoder = make_encoder(find_bpe(None, make_bert_bpe(tmp_path)))
    assert encoder("The Dogs, see!") == ["the", "dog", "##s", ",", "see", "!"]
    assert encoder("Café \u2603") == ["c", "##a", "##f", "##e", "[UNK]"]


def test_bert_cased(tmp_path):
    encoder = make_encoder(find_bpe("bert", make_bert_bpe(tmp_path, lowercase=False)))
    assert encoder("The dog")[0] == "T"


def test_sentencepiece_equals_fairseqs_encoder(tmp_path):
    from fairseq.data.encoders.sentencepiece_bpe import SentencepieceBPE, SentencepieceConfig

    folder = make_sentencepiece(tmp_path)
    fairseqs = SentencepieceBPE(SentencepieceConfig(sentencepiece_model=str(folder / "spm.model")))
    ours = make_encoder(find_bpe("sentencepiece", folder))
    for text in sentences(50):
        assert ours(text) == fairseqs.encode(text).split()


def test_dictionary_is_numbered_as_fairseqs(tmp_path):
    from fairseq.data import Dictionary

    path = write(tmp_path / "dict.txt", "a 3", "b 2", "two words 1", "b 7 #fairseq:overwrite", "c 0")
    ours, fairseqs = load_vocabulary(path), Dictionary.load(str(path))
    assert dict(ours) == fairseqs.indices
    assert ours.size == len(fairseqs)
    assert ours["nothing"] == fairseqs.unk()


@pytest.mark.parametrize("kind, make", [("bert", make_bert_bpe), ("sentencepiece", make_sentencepiece)])
def test_folder_in_other_encoders(tmp_path, kind, make):
    """The ids read back are the dictionary's for the encoder's symbols, and the unknown one where it lacks them."""
    bpe = make(tmp_path / "bpe")
    data = make_pairs(tmp_path / "RTE", ("entailment", "not_entailment"))
    out = prepare("RTE", data, bpe, tmp_path / "RTE-bin", "--bpe", kind)
    encoder, vocabulary = make_encoder(find_bpe(kind, bpe)), load_vocabulary(bpe / "dict.txt")
    texts = [line.split("\t")[1] for line in (data / "train.tsv").read_text(encoding="utf-8").split("\n")[1:-1]]
    for text, row in zip(texts, read_indexed(out / "input0" / "train")):
        assert row.tolist() == [*(vocabulary[symbol] for symbol in encoder(text)), 2]
    assert json.loads((out / "preprocess.json").read_text())["bpe"] == kind


def test_bpe_json_decides(tmp_path):
    assert find_bpe(None, make_bert_bpe(tmp_path)) == BpeFiles("bert", tmp_path, True)
