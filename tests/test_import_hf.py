"""import_hf: exact to the published architectures, in fairseq's order."""

import hashlib
import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fairseq.data import Dictionary
from fairseq.data.encoders.gpt2_bpe_utils import get_encoder
from fairseq.models import ARCH_CONFIG_REGISTRY
from fairseq.models.roberta import RobertaModel
from hf_samples import (
    BERT_TOKENS,
    DIM,
    MERGES,
    fairseq_ids,
    fine_tuning,
    load,
    names_of,
    reference,
    roberta_tokens,
    sentences,
    write_hf,
    write_task_data,
)
from safetensors.torch import load_file, save_file
from toolkit import assert_close, train

from smart_fairseq.errors import UsageError
from smart_fairseq.import_hf import import_hf, main
from smart_fairseq.models.smart_bert import SmartBertModel

DATA = Path(os.environ.get("SMART_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")) / "gpt2_bpe"
MINILM = Path(os.environ.get("SMART_TEST_MINILM", "/nonexistent"))


# Exactness


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_hidden_states_are_those_of_the_published_architecture(
    tmp_path: Path, family: str, head: bool, prefix: bool
) -> None:
    source = write_hf(tmp_path / "hf", family, head=head, prefix=prefix, old_names=prefix and family == "bert")
    import_hf(source, tmp_path / "out")
    hub = load(tmp_path / "out")
    hf_tokens = sentences(family)
    tokens = fairseq_ids(hf_tokens, names_of(family), hub.task.source_dictionary, family)
    with torch.no_grad():
        features = hub.extract_features(tokens)
    assert (features.double() - reference(source, hf_tokens)).abs().max() < 1e-5

    if head:
        with torch.no_grad():
            logits, _ = hub.model(tokens)
        every_row = torch.arange(len(names_of(family)))[None]
        columns = fairseq_ids(every_row, names_of(family), hub.task.source_dictionary, family)[0]
        # two of BERT's rows have no name in dict.txt (test_bert_dictionary)
        nameless = [BERT_TOKENS.index("the"), BERT_TOKENS.index("<s>")] if family == "bert" else []
        named = [row for row in range(len(columns)) if row not in nameless]
        expected = reference(source, hf_tokens, lm_head=True)[..., named]
        actual = logits.double().log_softmax(-1)[..., columns[named]]
        assert (actual - expected).abs().max() < 5e-5


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_padding_changes_nothing(tmp_path: Path, family: str) -> None:
    import_hf(write_hf(tmp_path / "hf", family), tmp_path / "out")
    hub = load(tmp_path / "out")
    tokens = fairseq_ids(sentences(family), names_of(family), hub.task.source_dictionary, family)
    padded = torch.cat([tokens, tokens.new_full((2, 5), hub.task.source_dictionary.pad())], dim=1)
    with torch.no_grad():
        difference = hub.extract_features(padded)[:, :17] - hub.extract_features(tokens)
    assert difference.abs().max() < 1e-5


def test_tanh_gelu(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", "bert", hidden_act="gelu_new")
    assert "gelu_accurate" in import_hf(source, tmp_path / "out")["flags"]
    hub = load(tmp_path / "out")
    tokens = fairseq_ids(sentences("bert"), BERT_TOKENS, hub.task.source_dictionary, "bert")
    with torch.no_grad():
        assert (hub.extract_features(tokens).double() - reference(source, sentences("bert"))).abs().max() < 1e-5


def test_roberta_of_another_epsilon_becomes_smart_bert(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", "roberta", layer_norm_eps=1e-6)
    flags = import_hf(source, tmp_path / "out")["flags"]
    assert flags[:2] == ["--arch", "smart_bert"] and flags[-2:] == ["--smart-layer-norm-eps", "1e-06"]
    hub = load(tmp_path / "out")
    tokens = fairseq_ids(sentences("roberta"), names_of("roberta"), hub.task.source_dictionary, "roberta")
    with torch.no_grad():
        assert (hub.extract_features(tokens).double() - reference(source, sentences("roberta"))).abs().max() < 1e-5


@pytest.mark.parametrize("bias", [0.0, 1e-3])
def test_a_pooler_that_was_never_trained_has_berts_spread(tmp_path: Path, bias: float) -> None:
    """All biases are 0 then. Its directions stay, and one that was trained stays to the bit."""
    source = write_hf(tmp_path / "hf", "bert")
    tensors = load_file(source / "model.safetensors")
    name = next(name for name in tensors if name.endswith("pooler.dense.bias"))
    tensors[name] = torch.tensor([0.0] * (len(tensors[name]) - 1) + [bias])
    save_file(tensors, source / "model.safetensors")
    (note,) = (note for note in import_hf(source, tmp_path / "out")["notes"] if note.startswith("pooler: "))
    before = tensors[name.replace("bias", "weight")]
    after = torch.load(tmp_path / "out" / "model.pt", weights_only=True)["model"]["pooler.weight"]
    assert ("never trained" in note) == (bias == 0)
    if bias:
        assert torch.equal(after, before)
    else:
        assert float(after.std()) == pytest.approx(0.02, rel=1e-5)
        assert_close(after / after.norm(), before / before.norm())


def test_epsilon_matters_here(tmp_path: Path) -> None:
    """Otherwise the tests above could not tell smart_bert from roberta."""
    source = write_hf(tmp_path / "hf", "bert")
    import_hf(source, tmp_path / "out")
    hub = load(tmp_path / "out")
    for module in hub.modules():
        if isinstance(module, torch.nn.LayerNorm):
            assert module.eps == (1e-12)
            module.eps = 1e-5
    tokens = fairseq_ids(sentences("bert"), BERT_TOKENS, hub.task.source_dictionary, "bert")
    with torch.no_grad():
        assert (hub.extract_features(tokens).double() - reference(source, sentences("bert"))).abs().max() > 1e-3


def test_untied_lm_head(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", "roberta", head=True, tie_word_embeddings=False)
    tensors = load_file(source / "model.safetensors")
    decoder = torch.randn_like(tensors["embeddings.word_embeddings.weight"])
    save_file({**tensors, "lm_head.decoder.weight": decoder}, source / "model.safetensors")
    assert import_hf(source, tmp_path / "out")["flags"][-1] == "--untie-weights-roberta"
    assert torch.equal(load(tmp_path / "out").model.encoder.lm_head.weight, decoder)


def test_missing_lm_head_is_the_same_every_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_hf(tmp_path / "hf", "roberta")
    for name in ("one", "two"):
        assert main([str(source), str(tmp_path / name)]) == 0
    assert capsys.readouterr().out.count("LM head: the file has none, initialised with seed 0") == 2
    first, second = (torch.load(tmp_path / name / "model.pt", weights_only=True)["model"] for name in ("one", "two"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# Dictionary and BPE files


def test_bert_dictionary(tmp_path: Path) -> None:
    """[CLS] [PAD] [SEP] [UNK] first, [MASK] last, the others in BERT's order.

    Row 23 is the first of two "the" (BERT uses the last), row 24 a token with the name of one of fairseq's: they
    become fillers in their places.
    """
    import_hf(write_hf(tmp_path / "hf", "bert"), tmp_path / "out")
    dictionary = load(tmp_path / "out").task.source_dictionary
    expected = [name for name in BERT_TOKENS if name not in ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]")]
    expected[expected.index("the")], expected[expected.index("<s>")] = "madeupword0000", "madeupword0001"
    assert dictionary.symbols == ["<s>", "<pad>", "</s>", "<unk>", *expected, "<mask>"]
    assert dictionary.index("the") == 4 + expected.index("the")
    assert dictionary.count[dictionary.index("the")] == 1
    assert dictionary.count[dictionary.index("madeupword0000")] == 0
    assert (tmp_path / "out" / "vocab.txt").read_bytes() == (tmp_path / "hf" / "vocab.txt").read_bytes()
    assert json.loads((tmp_path / "out" / "bpe.json").read_text()) == {"bpe": "bert", "lowercase": True}


def test_rows_without_tokens_become_fillers(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", "bert")
    (source / "vocab.txt").write_text("".join(f"{name}\n" for name in BERT_TOKENS[:-1]), encoding="utf-8")
    import_hf(source, tmp_path / "out")
    assert load(tmp_path / "out").task.source_dictionary.symbols[-2:] == ["madeupword0002", "<mask>"]


def test_tokenizer_json_in_place_of_vocab_txt(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", "bert")
    names = [name for name in BERT_TOKENS if name != "<s>"]
    names[names.index("the")] = "x"
    (source / "vocab.txt").unlink()
    (source / "tokenizer_config.json").unlink()
    content = {
        "normalizer": {
            "type": "BertNormalizer",
            "lowercase": False,
            "strip_accents": None,
            "handle_chinese_chars": True,
        },
        "model": {"type": "WordPiece", "vocab": {name: row for row, name in enumerate(names)}},
    }
    (source / "tokenizer.json").write_text(json.dumps(content))
    import_hf(source, tmp_path / "out")
    assert (tmp_path / "out" / "vocab.txt").read_text(encoding="utf-8").split("\n") == [*names, ""]
    assert json.loads((tmp_path / "out" / "bpe.json").read_text())["lowercase"] is False


def test_roberta_tokenisation(tmp_path: Path) -> None:
    """ "the cat 12": merges t+h, th+e; Ġ+c and a+t, Ġc+at; Ġ alone, 1+2.

    GPT-2's ids: bytes 0 to 255, so merge i is 256 + i: the = 257, Ġcat = 261, 12 = 262; and Ġ, the space, is 220: after
    the 188 printable bytes come the others in order, the 32 control characters before it.
    """
    import_hf(write_hf(tmp_path / "hf", "roberta"), tmp_path / "out")
    encoder = get_encoder(str(tmp_path / "out" / "encoder.json"), str(tmp_path / "out" / "vocab.bpe"))
    ids = encoder.encode("the cat 12")
    assert ids == [257, 261, 220, 262]
    assert encoder.decode(ids) == "the cat 12"
    dictionary = load(tmp_path / "out").task.source_dictionary
    line = " ".join(map(str, ids))
    tokens = dictionary.encode_line(line, add_if_not_exist=False, append_eos=False).tolist()
    assert tokens == [roberta_tokens()[token] for token in ("the", "Ġcat", "Ġ", "12")]
    assert dictionary.symbols[-4:] == ["264", "madeupword0000", "madeupword0001", "<mask>"]
    assert json.loads((tmp_path / "out" / "bpe.json").read_text()) == {"bpe": "gpt2"}
    files = {"gpt2_encoder_json": "encoder.json", "gpt2_vocab_bpe": "vocab.bpe"}
    paths = {setting: str(tmp_path / "out" / name) for setting, name in files.items()}
    assert RobertaModel.from_pretrained(str(tmp_path / "out"), **paths).encode("the cat 12").tolist() == [0, *tokens, 2]


def test_bert_tokenisation(tmp_path: Path) -> None:
    """ "Unable cats, DOG!" lower-cased: un ##able cat ##s , dog !"""
    tokenizers = pytest.importorskip("tokenizers")
    import_hf(write_hf(tmp_path / "hf", "bert"), tmp_path / "out")
    lowercase = json.loads((tmp_path / "out" / "bpe.json").read_text())["lowercase"]
    tokenizer = tokenizers.BertWordPieceTokenizer(str(tmp_path / "out" / "vocab.txt"), lowercase=lowercase)
    pieces = tokenizer.encode("Unable cats, DOG!", add_special_tokens=False).tokens
    assert pieces == ["un", "##able", "cat", "##s", ",", "dog", "!"]
    dictionary = load(tmp_path / "out").task.source_dictionary
    ids = dictionary.encode_line(" ".join(pieces), add_if_not_exist=False, append_eos=False)
    assert dictionary.unk() not in ids.tolist()
    assert [dictionary[i] for i in ids] == pieces


def test_merges_without_header_or_in_tokenizer_json(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", "roberta")
    import_hf(source, tmp_path / "one")
    merges = (source / "merges.txt").read_text(encoding="utf-8")
    (source / "merges.txt").write_text(merges.split("\n", 1)[1], encoding="utf-8")
    import_hf(source, tmp_path / "two")
    for name in ("merges.txt", "vocab.json"):
        (source / name).unlink()
    model = {"type": "BPE", "vocab": roberta_tokens(), "merges": [list(merge) for merge in MERGES]}
    (source / "tokenizer.json").write_text(json.dumps({"model": model}))
    import_hf(source, tmp_path / "three")
    for name in ("encoder.json", "vocab.bpe", "dict.txt"):
        contents = {(tmp_path / run / name).read_bytes() for run in ("one", "two", "three")}
        assert len(contents) == 1, name


@pytest.mark.skipif(not DATA.is_dir(), reason="GPT-2's files are not there (SMART_TEST_DATA)")
def test_real_roberta_vocabulary_gives_the_official_files(tmp_path: Path) -> None:
    """vocab.json as Hugging Face made it from the official files, back to encoder.json, vocab.bpe and dict.txt."""
    encoder = json.loads((DATA / "encoder.json").read_text())
    by_id = {str(number): token for token, number in encoder.items()}
    symbols = [line.split()[0] for line in (DATA / "dict.txt").read_text().splitlines()]
    names = ["<s>", "<pad>", "</s>", "<unk>", *(by_id.get(symbol, symbol) for symbol in symbols), "<mask>"]
    source = write_hf(tmp_path / "hf", "roberta", vocab_size=len(names))
    (source / "vocab.json").write_text(json.dumps({name: row for row, name in enumerate(names)}))
    (source / "merges.txt").write_bytes((DATA / "vocab.bpe").read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors["embeddings.word_embeddings.weight"] = torch.randn(len(names), DIM)
    save_file(tensors, source / "model.safetensors")
    import_hf(source, tmp_path / "out")

    assert (tmp_path / "out" / "encoder.json").read_bytes().strip() == (DATA / "encoder.json").read_bytes().strip()
    assert (tmp_path / "out" / "vocab.bpe").read_bytes() == (DATA / "vocab.bpe").read_bytes()
    written = [line.split()[0] for line in (tmp_path / "out" / "dict.txt").read_text().splitlines()]
    assert written == symbols
    state = torch.load(tmp_path / "out" / "model.pt", weights_only=True)["model"]
    types = tensors["embeddings.token_type_embeddings.weight"][0]
    embeddings = state["encoder.sentence_encoder.embed_tokens.weight"]
    assert torch.equal(embeddings, tensors["embeddings.word_embeddings.weight"] + types)  # no row moved


# Use


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_fairseq_train_starts_from_it(tmp_path: Path, family: str) -> None:
    """The flags that are printed, the strict load of --restore-file, BERT's pooler as the head's start; one update."""
    import_hf(write_hf(tmp_path / "hf", family), tmp_path / "out")
    data = write_task_data(tmp_path / "data", tmp_path / "out" / "dict.txt")
    flags = ["--criterion", "sentence_prediction", "--optimizer", "adam", "--lr", "1e-9", "--max-update", "1"]
    train(fine_tuning(data, tmp_path / "out", tmp_path / "checkpoints", *flags))
    start = torch.load(tmp_path / "out" / "model.pt", weights_only=True)["model"]
    end = torch.load(tmp_path / "checkpoints" / "checkpoint_last.pt", weights_only=True)["model"]
    head = "classification_heads.sentence_classification_head."
    start = {key.replace("pooler.", head + "dense."): tensor for key, tensor in start.items()}
    assert end.keys() - start.keys() == {head + f"out_proj.{part}" for part in ("weight", "bias")} | (
        {head + f"dense.{part}" for part in ("weight", "bias")} if family == "roberta" else set()
    )
    for key, tensor in start.items():
        torch.testing.assert_close(end[key], tensor, rtol=0, atol=1e-7)


def test_no_class_but_containers_and_tensors_in_the_file(tmp_path: Path) -> None:
    """torch's safe loader takes model.pt in a process that allow-lists nothing."""
    import_hf(write_hf(tmp_path / "hf", "bert"), tmp_path / "out")
    code = f"import torch; torch.load({str(tmp_path / 'out' / 'model.pt')!r}, weights_only=True)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_hf(tmp_path / "hf", "bert")
    assert main([str(source), str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "import.json").read_text())
    assert report["source"]["sha256"] == hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest()
    flags = "--arch smart_bert --encoder-layers 2 --encoder-embed-dim 16 --encoder-ffn-embed-dim 40"
    flags += " --encoder-attention-heads 4 --activation-fn gelu --max-positions 24 --smart-layer-norm-eps 1e-12"
    assert report["flags"] == flags.split()
    model = "model._name=smart_bert +model.encoder_layers=2 +model.encoder_embed_dim=16"
    model += " +model.encoder_ffn_embed_dim=40 +model.encoder_attention_heads=4 +model.activation_fn=gelu"
    model += " +model.max_positions=24 +model.smart_layer_norm_eps=1e-12"
    rest = "task.max_positions=24 task.separator_token=null optimization.lr=[1e-4]"  # as narrow ones need
    *_, printed, _, overrides = capsys.readouterr().out.splitlines()
    assert printed == flags and overrides == f"{model} {rest}"
    assert report["left_out"] == []


def test_architectures() -> None:
    for name, layers, dim, ffn, heads in (
        ("smart_bert", 12, 768, 3072, 12),
        ("smart_bert_large", 24, 1024, 4096, 16),
        ("smart_bert_minilm_l6", 6, 384, 1536, 12),
    ):
        args = Namespace()
        ARCH_CONFIG_REGISTRY[name](args)
        sizes = (args.encoder_layers, args.encoder_embed_dim, args.encoder_ffn_embed_dim, args.encoder_attention_heads)
        assert sizes == (layers, dim, ffn, heads) and args.smart_layer_norm_eps == 1e-12


def test_impossible_epsilon_is_refused() -> None:
    args = Namespace(encoder_layers=1, encoder_embed_dim=4, encoder_ffn_embed_dim=4, encoder_attention_heads=1)
    args.max_positions, args.smart_layer_norm_eps = 4, -1.0
    ARCH_CONFIG_REGISTRY["smart_bert"](args)
    with pytest.raises(UsageError, match=r"--smart-layer-norm-eps is -1\.0; it must be a positive number"):
        SmartBertModel.build_model(args, SimpleNamespace(source_dictionary=Dictionary()))


# The real thing


@pytest.mark.skipif(not (MINILM / "model.safetensors").exists(), reason="no MiniLM folder (SMART_TEST_MINILM)")
def test_minilm(tmp_path: Path, record_property: Callable[[str, float | None], None]) -> None:
    """all-MiniLM-L6-v2: below 1e-5 on real token ids, of short sentences and of all 512 positions."""
    from tokenizers import BertWordPieceTokenizer

    import_hf(MINILM, tmp_path / "out")
    hub = load(tmp_path / "out")
    tokenizer = BertWordPieceTokenizer(str(MINILM / "vocab.txt"), lowercase=True)
    names = (MINILM / "vocab.txt").read_text(encoding="utf-8").splitlines()
    texts = [
        "The cat sat on the mat.",
        "Stanford's researchers didn't re-evaluate 3,141 results: naïve, über, 東京!",
        (Path(__file__).parent.parent / "LICENSE").read_text() * 4,
    ]
    worst = 0.0
    for text in texts:
        hf_tokens = torch.tensor([tokenizer.encode(text).ids[:512]])
        tokens = fairseq_ids(hf_tokens, names, hub.task.source_dictionary, "bert")
        with torch.no_grad():
            worst = max(
                worst, (hub.extract_features(tokens).double() - reference(MINILM, hf_tokens)).abs().max().item()
            )
    record_property("max_abs_difference", worst)
    print(f"MiniLM: max abs difference {worst:.2e}")
    assert worst < 1e-5
