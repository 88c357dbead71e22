"""Calibration, intervals, labels and typing errors against numbers derived by hand and other libraries."""

import doctest
import random

import numpy as np
import pytest
from data_samples import make_bert_bpe, make_gpt2_bpe, make_sentencepiece, write
from toolkit import write_data

from smart_fairseq.data.bpe import UNKNOWN, find_bpe
from smart_fairseq.data.pool import Pool
from smart_fairseq.data.readers import Row
from smart_fairseq.errors import UsageError
from smart_fairseq.evaluation import calibration, intervals, metrics, report, typos
from smart_fairseq.evaluation.calibration import (
    HIGHEST,
    LOWEST,
    brier,
    calibration_error,
    cross_entropy,
    divergence_from,
    fit_line,
    fit_temperature,
    reliability,
)
from smart_fairseq.evaluation.labels import annotator_shares, write_shares
from smart_fairseq.evaluation.texts import decoder
from smart_fairseq.evaluation.typos import NEIGHBOURS, misspelt, with_typos


@pytest.mark.parametrize("module", [calibration, intervals, metrics, report, typos], ids=lambda m: m.__name__)
def test_examples_of_the_docstrings(module):
    assert doctest.testmod(module).failed == 0 < doctest.testmod(module).attempted


LABELS = ("negative", "positive")


def logits_of(*probabilities: float) -> np.ndarray:
    """Two classes, the second with these probabilities."""
    second = np.array(probabilities)
    return np.log(np.stack([1 - second, second], axis=1))


def once(statistic: intervals.Statistic, rows: int) -> float:
    return float(statistic(np.ones((1, rows)))[0])


# Calibration ------------------------------------------------------------------------------------------------------


def test_calibration_error_by_hand():
    """Bins (11/15, 12/15] with 0.75, 0.75 (one right) and (14/15, 1] with 0.95, 0.99 (both right).

    |0.5 - 0.75| * 2/4 + |1 - 0.97| * 2/4 = 0.125 + 0.015.
    """
    logits, gold = logits_of(0.75, 0.75, 0.05, 0.99), np.array([1, 0, 0, 1])
    assert once(calibration_error(logits, gold), 4) == pytest.approx(14.0)
    first = np.array([True, True, False, False])
    assert once(calibration_error(logits, gold, first), 4) == pytest.approx(25.0)
    # the second row twice and the first not at all: |0 - 0.75| * 2/4 + 0.015
    assert calibration_error(logits, gold)(np.array([[0.0, 2, 1, 1]]))[0] == pytest.approx(39.0)
    found = reliability(logits, gold)
    assert found["rows"] == [0] * 11 + [2, 0, 0, 2]
    assert found["accuracy"][11] == 0.5 and found["confidence"][14] == pytest.approx(0.97)
    assert found["accuracy"][0] is None


def test_bins_are_closed_above():
    """Three classes alike: confidence 1/3 is the upper end of the bin (4/15, 5/15]."""
    assert reliability(np.zeros((1, 3)), np.array([0]))["rows"].index(1) == 4
    assert reliability(np.array([[1000.0, 0.0]]), np.array([0]))["rows"][14] == 1


def test_scores_by_hand():
    logits, gold = logits_of(0.75, 0.2), np.array([1, 1])
    np.testing.assert_allclose(cross_entropy(logits, gold), [-np.log(0.75), -np.log(0.2)])
    np.testing.assert_allclose(brier(logits, gold), [2 * 0.25**2, 2 * 0.8**2])
    # 0.5 log(0.5 / 0.25) + 0.5 log(0.5 / 0.75); all for one class: -log 0.2
    shares = np.array([[0.5, 0.5], [0.0, 1.0]])
    np.testing.assert_allclose(divergence_from(shares, logits), [0.5 * np.log(4 / 3), -np.log(0.2)])
    # without overflow
    assert cross_entropy(np.array([[2000.0, 0.0]]), np.array([1]))[0] == pytest.approx(2000)


@pytest.mark.parametrize("gap, right, rows", [(2.0, 3, 4), (0.5, 9, 10), (8.0, 6, 10)])
def test_temperature_of_equal_gaps(gap, right, rows):
    """sigmoid(gap / T) must be the share that is right, s: T = gap / log(s / (1 - s))."""
    logits = np.array([[gap, 0.0]] * rows)
    gold = np.array([0] * right + [1] * (rows - right))
    assert fit_temperature(logits, gold) == pytest.approx(gap / np.log(right / (rows - right)))


def test_temperature_of_labels_drawn_at_another():
    """Labels drawn from softmax(logits / 3): it is found again, and equals the least of a search by scipy."""
    from scipy.optimize import minimize_scalar

    draw = np.random.default_rng(0)
    logits = draw.normal(size=(20000, 4)) * 5
    gold = (logits / 3 + draw.gumbel(size=logits.shape)).argmax(1)
    found = fit_temperature(logits, gold)
    assert found == pytest.approx(3, rel=0.03)
    least = minimize_scalar(lambda t: cross_entropy(logits / t, gold).mean(), bounds=(0.1, 50), method="bounded")
    assert found == pytest.approx(least.x, rel=1e-4)


def test_temperature_where_there_is_none():
    assert fit_temperature(logits_of(0.9, 0.8), np.array([1, 1])) == pytest.approx(LOWEST)
    assert fit_temperature(logits_of(0.9, 0.8), np.array([0, 0])) == pytest.approx(HIGHEST)


# Intervals --------------------------------------------------------------------------------------------------------


def test_samples_hold_as_many_rows_and_are_the_same_at_every_call():
    blocks = list(intervals.samples(5, 7, seed=3))
    assert np.concatenate(blocks).shape == (7, 5)
    assert (np.concatenate(blocks).sum(1) == 5).all()
    np.testing.assert_array_equal(blocks[0], next(intervals.samples(5, 7, seed=3)))
    assert not np.array_equal(blocks[0], next(intervals.samples(5, 7, seed=4)))


def test_blocks_are_joined(monkeypatch):
    monkeypatch.setattr(intervals, "_BLOCK", 10)
    found = intervals.resampled({"mean": intervals.mean_of(np.arange(5.0))}, 5, resamples=7)["mean"]
    assert found.shape == (8,) and found[0] == 2.0


def test_interval_of_a_share_is_the_binomials():
    """The mean of n zeros and ones, resampled, is binomial(n, share) / n."""
    from scipy.stats import binom

    values = np.repeat([1.0, 0.0], [160, 40])
    found = intervals.resampled({"share": intervals.mean_of(values)}, 200, resamples=20000)["share"]
    expected = binom.ppf([0.025, 0.975], 200, 0.8) / 200
    np.testing.assert_allclose(intervals.interval(found), expected, atol=0.005)
    assert found[0] == 0.8


def test_intervals_cover_the_truth_as_often_as_they_say():
    """Means of 40 normal numbers: percentile intervals are a little narrow there, 93 to 95 %."""
    draw, hits = np.random.default_rng(1), 0
    for number in range(400):
        mean = intervals.mean_of(draw.normal(size=40))
        low, high = intervals.interval(intervals.resampled({"m": mean}, 40, 400, seed=number)["m"])
        hits += low <= 0 <= high
    assert 0.90 <= hits / 400 <= 0.97


def test_samples_without_the_rows_of_a_mean_do_not_count():
    """Of 40 rows one is among those meant: a third of the samples lacks it, and in the others it is the mean."""
    values, some = np.arange(40.0), np.arange(40) == 7
    found = intervals.resampled({"m": intervals.mean_of(values, some)}, 40, 400)["m"]
    assert 0.25 < np.isnan(found).mean() < 0.5 and intervals.interval(found) == (7.0, 7.0)


def test_mean_of_some_rows():
    values, some = np.array([1.0, np.nan, 5.0]), np.array([True, False, True])
    assert intervals.mean_of(values, some)(np.array([[3.0, 1, 1]]))[0] == 2.0


@pytest.mark.parametrize("classes", [2, 3])
def test_metrics_of_weighted_rows_are_those_of_rows_that_stand_there_as_often(classes):
    draw = np.random.default_rng(2)
    weights = draw.integers(0, 4, (6, 60)).astype(float)
    weights[0] = 1
    labels = draw.integers(0, classes, (2, 60)).astype(str)
    numbers = np.array([draw.integers(0, 9, 60) / 2, draw.normal(size=60)])
    for name, metric in metrics.METRICS.items():
        pair = numbers if name in ("pearson", "spearman", "pearson_and_spearman") else labels
        for row, value in zip(weights.astype(int), metric(*pair)(weights)):
            repeated = [np.repeat(side, row) for side in pair]
            assert value == pytest.approx(metrics.value_of(name, *repeated)), name


def test_a_correlation_with_a_constant_is_not_a_number_whatever_is_rounded():
    """0.3 is no sum of powers of two: a mean of many is not 0.3, and the deviations are no zeros."""
    constant, draw = np.full(1500, 0.3), np.random.default_rng(1)
    varied = draw.normal(size=1500)
    assert constant.mean() != 0.3
    for pair in ((constant, varied), (varied, constant)):
        assert np.isnan(metrics.value_of("pearson", *pair)) and np.isnan(metrics.value_of("spearman", *pair))
    # in a sample that holds none of the row that differs
    weights = np.ones((2, 1500))
    weights[0, 7], varied_once = 0, np.where(np.arange(1500) == 7, 1.0, constant)
    assert np.isnan(metrics.METRICS["pearson"](varied_once, varied)(weights)).tolist() == [True, False]
    assert fit_line(constant, varied) == (0.0, pytest.approx(varied.mean()))


def test_matthews_of_many_classes_needs_no_table_of_pairs():
    """A table of 3,000 classes by 3,000 has 9 million entries for each row."""
    labels = np.arange(3000).astype(str)
    assert metrics.value_of("mcc", labels, labels) == pytest.approx(100)


# Annotators -------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_rows(tmp_path):
    """What of a data folder says how many rows a split has."""
    write_data(tmp_path, valid=2)
    write(tmp_path / "ids" / "valid.tsv", "id\tfile\tline", "0\tf\t1", "1\tf\t2")
    return tmp_path


def test_shares_come_in_the_models_order(two_rows):
    tmp_path = two_rows
    assert annotator_shares(tmp_path, "valid", LABELS) is None
    write_shares(tmp_path, "valid", LABELS, np.array([[0.25, 0.75], [0.0, 0.0]]))
    found = annotator_shares(tmp_path, "valid", LABELS[::-1])
    np.testing.assert_array_equal(found, [[0.75, 0.25], [0.0, 0.0]])
    write(tmp_path / "annotators" / "valid.tsv", "id\tnegative\tpositive\traters", "0\t1\t0\t20", "1\t0.4\t0.6\t19")
    np.testing.assert_array_equal(annotator_shares(tmp_path, "valid", LABELS), [[1, 0], [0.4, 0.6]])


@pytest.mark.parametrize(
    "lines, message",
    [
        (
            ["negative\tneutral", "1\t0", "1\t0"],
            r"valid.tsv:1: the header is 'negative\\tneutral'; it must name negative, pos",
        ),
        (["negative\tpositive", "1\t0", "1"], "valid.tsv:3: 2 shares with the sum 1 are needed, not '1'"),
        (["negative\tpositive", "half\t0", "1\t0"], "valid.tsv:2: 2 shares with the sum 1"),
        (["negative\tpositive", "0.5\t0.4", "1\t0"], "valid.tsv:2: 2 shares with the sum 1"),
        (["negative\tpositive", "-1\t2", "1\t0"], "valid.tsv:2: 2 shares with the sum 1"),
        (["negative\tpositive", "nan\t1", "1\t0"], "valid.tsv:2: 2 shares with the sum 1"),
        (["negative\tpositive", "1\t0"], "valid.tsv: holds 1 rows, and valid has 2"),
        (["id\tnegative\tpositive", "0\t1\t0", "2\t1\t0"], "valid.tsv:3: is about the row '2', and valid has '1' here"),
    ],
)
def test_shares_that_are_not_in_order(two_rows, lines, message):
    write(two_rows / "annotators" / "valid.tsv", *lines)
    with pytest.raises(UsageError, match=message):
        annotator_shares(two_rows, "valid", LABELS)


# Typing errors ----------------------------------------------------------------------------------------------------


def test_typing_errors_belong_to_the_row():
    texts = ["The clerk weighed an old kayak in winter, and nobody knew why she had done so."]
    assert with_typos(texts, "17") == with_typos(texts, "17") != with_typos(texts, "18")
    assert with_typos(texts, "17", seed=2) != with_typos(texts, "17")


def test_a_share_of_the_words_is_changed():
    words = ["river"] * 50
    changed = with_typos([" ".join(words[:30]), " ".join(words[:20])], "a", share=0.2)
    assert sum(word != "river" for text in changed for word in text.split()) == 10
    assert all(text != before for text, before in zip(with_typos(["river"], "a"), ["river"]))  # one at least


def test_what_holds_no_word_stays():
    assert with_typos(["It is 42.", "¡東京!", ""], "a") == ["It is 42.", "¡東京!", ""]


def test_each_kind_of_error():
    seen = {misspelt("abc", random.Random(number)) for number in range(400)}
    swaps, drops = {"bac", "acb"}, {"bc", "ac", "ab"}
    keys = {f"{key}bc" for key in "qwsz"} | {f"a{key}c" for key in "ghvn"} | {f"ab{key}" for key in "dfxv"}
    assert seen == swaps | drops | keys
    assert {misspelt("東東東", random.Random(number)) for number in range(9)} == {"東東"}
    assert {word[0] for word in (misspelt("Qqq", random.Random(number)) for number in range(99))} <= set("QqWA")


def test_neighbouring_keys_neighbour_each_other():
    assert NEIGHBOURS["g"] == "fhtyvb" and NEIGHBOURS["p"] == "ol" and NEIGHBOURS["q"] == "wa"
    assert all(key in NEIGHBOURS[other] for key, others in NEIGHBOURS.items() for other in others)


@pytest.mark.parametrize("kind, make", [("gpt2", make_gpt2_bpe), ("bert", make_bert_bpe), ("sp", make_sentencepiece)])
def test_texts_from_symbols(tmp_path, kind, make):
    """GPT-2's byte for byte; the others give the same symbols again."""
    make(tmp_path)
    bpe = find_bpe("sentencepiece" if kind == "sp" else None, tmp_path)
    decode = decoder(bpe)
    pool = Pool(bpe, 1, None, 1)
    names = list(pool.vocabulary)

    def encode(text: str) -> list[str]:
        ((ids, *_), _) = next(pool.encode([Row("0", (text,), None)]))
        return ["[UNK]" if number == UNKNOWN else names[number] for number in ids[0][:-1]]

    for text in ("the dogs like a river.", "café houses, don't see 42"):
        symbols = encode(text)
        assert encode(decode(symbols)) == symbols
        if kind == "gpt2":
            assert decode(symbols) == text
    if kind == "bert":
        assert decode(encode("The dogs, [UNK]!")) == "the dogs , [UNK] !"
