"""Text scores against values worked by hand, plain loops and nltk's own BLEU."""

import math
import random
import re
import sys
from pathlib import Path

import pytest

from med3dvlm.metrics import meteor, text

REPORTS = [
    "There is a 22 mm nodule in the right upper lobe.",
    "No pleural effusion; heart size is normal (5.5 cm).",
    "Ill-defined, hypodense mass in segment 7 of the liver - 30 mm!",
    "The lungs are clear & without consolidation or nodule.",
]
ODD_TEXTS = ["", " ", "...", "a", "A a, a!", "Ödem und Erguß", "結節 5 mm", "nodule\n\nnodule - 5.5mm", "l'aorte e\u0301largie", "\u200b"]


def shuffled_pairs() -> tuple[list[str], list[str]]:
    """Return predictions that share some words with their references, partly in order."""
    generator = random.Random(0)
    predictions, references = [], []
    for _ in range(30):
        reference = generator.choice(REPORTS) + " " + generator.choice(REPORTS)
        words = reference.split()
        start = generator.randrange(len(words) - 6)
        predictions.append(" ".join(words[start : start + generator.randrange(5, 12)] + generator.choice(REPORTS).split()[:3]))
        references.append(reference)
    return predictions, references


def bleu(predictions: list[str], references: list[str], order: int = 1) -> float:
    return text.text_scores(predictions, references)[f"bleu{order}"]


def tokens_13a(report: str) -> list[str]:
    """Split words and punctuation as mteval-v13a does; case is kept."""
    report = report.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        report = report.replace(entity, character)
    report = re.sub(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])", r" \1 ", f" {report} ")
    report = re.sub(r"([^0-9])([\.,])", r"\1 \2 ", report)  # a period or comma, unless a digit stands before it
    report = re.sub(r"([\.,])([^0-9])", r" \1 \2", report)  # ... or after it
    return re.sub(r"([0-9])(-)", r"\1 \2 ", report).split()  # a dash after a digit


def meteor_score(prediction: str, reference: str) -> float:
    return float(meteor.meteor_values([prediction], [reference])[0])


def test_bleu_by_hand() -> None:
    # the the the the / the cat is here: one "the" counts, 1 of 4; as long as the reference, so no brevity penalty.
    assert bleu(["the the the the"], ["the cat is here"]) == pytest.approx(1 / 4)
    # a b / a b c d: both words match; half as long, so exp(1 - 4/2).
    assert bleu(["a b"], ["a b c d"]) == pytest.approx(math.exp(-1))
    # bigrams: a b c / a b d: unigrams 2/3, bigrams 1/2.
    assert bleu(["a b c"], ["a b d"], order=2) == pytest.approx(math.sqrt(2 / 3 * 1 / 2))
    assert bleu([""], ["a"]) == 0
    # The mean of samples (1 and 0), not the pooled 2 of 4.
    assert bleu(["a b", "c d"], ["a b", "e f"]) == pytest.approx(0.5)


def test_bleu_equals_nltk() -> None:
    from nltk.translate.bleu_score import corpus_bleu, sentence_bleu

    predictions, references = shuffled_pairs()
    ours, theirs = [list(map(tokens_13a, texts)) for texts in (predictions, references)]
    scores = text.corpus_bleu(predictions, references)
    for order in (1, 2, 3, 4):
        weights = (1 / order,) * order
        expected = corpus_bleu([[reference] for reference in theirs], ours, weights)
        assert scores[f"corpus_bleu{order}"] == pytest.approx(expected, abs=1e-12)
    expected = sum(sentence_bleu([r], p, (1.0,)) for p, r in zip(ours, theirs, strict=True)) / len(ours)
    assert bleu(predictions, references) == pytest.approx(expected, abs=1e-12)


def test_bleu_of_odd_texts_equals_the_formula() -> None:
    """Counts of n-grams in plain loops."""
    for prediction in ODD_TEXTS + REPORTS + ["Mass (5.5 mm), liver-dome; &lt;2 cm. 3-4", "a<skipped> b-\nc"]:
        for reference in REPORTS + ["liver dome < 2 cm, 5.5 mm.", ""]:
            ours, theirs = tokens_13a(prediction), tokens_13a(reference)
            counts = []
            for n in (1, 2, 3, 4):
                grams = [[tuple(words[place : place + n]) for place in range(len(words) - n + 1)] for words in (ours, theirs)]
                counts.append((sum(min(grams[0].count(gram), grams[1].count(gram)) for gram in set(grams[0])), len(grams[0])))
            matches, totals = zip(*counts, strict=True)
            assert text.bleu_counts([prediction], [reference])[0].tolist() == [*matches, *totals, len(ours), len(theirs)]


def test_bleu_of_each_pair_equals_nltk() -> None:
    from nltk.translate.bleu_score import sentence_bleu

    predictions, references = shuffled_pairs()
    values = text.bleu_values(predictions, references)
    for order in (1, 2, 3, 4):
        for value, prediction, reference in zip(values[f"bleu{order}"], predictions, references, strict=True):
            words = tokens_13a(prediction), tokens_13a(reference)
            expected = sentence_bleu([words[1]], words[0], (1 / order,) * order)
            assert value == pytest.approx(expected if expected > 1e-9 else 0, abs=1e-12)  # nltk puts 1e-308 for no match
    assert values["bleu1"].mean() == pytest.approx(bleu(predictions, references))


def test_bleu_of_empty_texts() -> None:
    """The published code divides by 0 where all predictions, or all references, are empty; otherwise it counts empty texts."""
    for pair in (("", "a b"), ("a b", ""), ("", ""), (" \n", "a")):
        assert all(text.bleu_values([pair[0]], [pair[1]])[f"bleu{order}"] == 0 for order in (1, 2, 3, 4))
    # "a b" / "a b" and nothing / "c d e": both words written match, 2 written where 5 are expected.
    assert text.corpus_bleu(["a b", ""], ["a b", "c d e"])["corpus_bleu2"] == pytest.approx(math.exp(1 - 5 / 2))
    assert text.corpus_bleu(["a b", "c d e"], ["a b", ""])["corpus_bleu1"] == pytest.approx(2 / 5)  # longer than expected: no penalty
    # Three words have no 4-gram, so even a perfect copy has no BLEU-4 ...
    assert text.bleu_values(["a b c"], ["a b c"])["bleu4"] == 0 and text.bleu_values(["a b c"], ["a b c"])["bleu3"] == 1
    # ... but does not take that of a corpus away.
    assert text.corpus_bleu(["a b c", "d e f g"], ["a b c", "d e f g"])["corpus_bleu4"] == 1


def test_counts_of_pairs_add_up_to_the_corpus() -> None:
    predictions, references = shuffled_pairs()
    counts = text.bleu_counts(predictions, references)
    twice = text.bleu_of_counts(counts[:3].sum(axis=0) + counts[0])
    expected = text.corpus_bleu(predictions[:3] + predictions[:1], references[:3] + references[:1])
    assert twice.tolist() == pytest.approx(list(expected.values()))


def test_rouge_equals_rouge_score() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    predictions, references = shuffled_pairs()
    predictions += [prediction for prediction in ODD_TEXTS for _ in ODD_TEXTS]
    references += ODD_TEXTS * len(ODD_TEXTS)
    generator = random.Random(1)
    predictions.append(" ".join(generator.choices("abcdefg", k=300)))
    references.append(" ".join(generator.choices("abcdefg", k=200)))
    scorer = RougeScorer(("rouge1", "rouge2", "rougeL"))
    values = text.rouge_values(predictions, references)
    for index, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        expected = scorer.score(reference, prediction)
        assert {name: array[index] for name, array in values.items()} == pytest.approx(
            {name: score.fmeasure for name, score in expected.items()}, abs=1e-12
        )


def test_values_are_finite_and_their_means_are_the_scores() -> None:
    predictions = [prediction for prediction in ODD_TEXTS for _ in ODD_TEXTS] + ["nodule " * 4000, "a"]
    references = ODD_TEXTS * len(ODD_TEXTS) + ["a nodule of 4 mm. " * 1000, "word " * 4000]
    values, scores = text.text_values(predictions, references), text.text_scores(predictions, references)
    for name, array in values.items():
        assert array.shape == (len(predictions),) and array.min() >= 0 and array.max() <= 1, name
        assert scores[name] == pytest.approx(array.mean())
    assert values["token_f1"][0] == 1 and values["rouge1"][0] == 0  # two empty texts: token F1 calls them equal, ROUGE does not


def test_rouge_by_hand() -> None:
    # Prediction: a nodule is in the lung (6 words); reference: the lung has a nodule (5 words).
    scores = text.text_scores(["A nodule is in the lung."], ["The lung has a nodule"])
    assert scores["rouge1"] == pytest.approx(2 * 4 / (6 + 5))  # a, nodule, the, lung
    assert scores["rouge2"] == pytest.approx(2 * 2 / (5 + 4))  # "a nodule", "the lung"
    assert scores["rougeL"] == pytest.approx(2 * 2 / (6 + 5))  # longest common subsequence: 2 words


def test_exact_match_and_token_f1_set_case_and_punctuation_aside() -> None:
    assert text.exact_match_values(["Right  lung.", "1.5 mm", "15 mm"], ["right lung", "15 mm", "15 mm"])["exact_match"].tolist() == [
        1,
        0,
        1,
    ]
    values = text.token_f1_values(["the right lung", "", "", "a"], ["Right lung!", "", "a", "b"])
    assert values["token_f1"].tolist() == pytest.approx([2 * 2 / 5, 1, 0, 0])


def test_collapse() -> None:
    # Of the 6 pairs the 3 among the equal ones share all words, the others none.
    assert text.collapse(["Same.", "same", "Same!", "other"]) == {"distinct": 0.5, "commonest": 0.75, "similarity": 0.5}
    # {a, b} and {b, c}: 2 * 1 / 4; with {}: 0, twice.
    assert text.collapse(["a b", "b c b", ""])["similarity"] == pytest.approx(0.5 / 3)
    assert text.collapse(["a"])["similarity"] == 1
    assert text.collapse(["", "."]) == {"distinct": 0.5, "commonest": 1, "similarity": 1}
    with pytest.raises(ValueError, match="at least one"):
        text.collapse([])


def test_text_scores_without_wordnet_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meteor, "_find_wordnet", lambda: None)
    scores = text.text_scores(REPORTS, REPORTS)
    assert "meteor" not in scores and "wordnet-base" in scores["unavailable"]["meteor"]
    assert all(scores[name] == 1 for name in ("bleu1", "corpus_bleu4", "rouge1", "rougeL", "exact_match", "token_f1"))
    assert scores["samples"] == len(REPORTS)
    with pytest.raises(RuntimeError, match="METEOR needs WordNet"):
        meteor.meteor_values(REPORTS, REPORTS)


def test_meteor_with_this_machines_wordnet() -> None:
    if reason := meteor.meteor_available():
        pytest.skip(reason)
    # Two words in one chunk: F 1, penalty 0.5 * (1/2)^3.
    assert meteor_score("big mass", "big mass") == pytest.approx(1 - 0.5 / 8)
    # A synonym counts in full, if the Porter stemmer leaves it as it is: nltk looks synonyms up by stem.
    assert meteor_score("tumour mass", "tumor mass") == pytest.approx(1 - 0.5 / 8)
    assert meteor_score("word", "other") == 0
    assert text.text_scores(["a b"], ["a b"])["unavailable"] == {}


def test_meteor_as_published() -> None:
    """The example is that of nltk's documentation and of the `meteor` module of `evaluate`."""
    if reason := meteor.meteor_available():
        pytest.skip(reason)
    prediction = "It is a guide to action which ensures that the military always obeys the commands of the party"
    reference = "It is a guide to action that ensures that the military will forever heed Party commands"
    assert meteor_score(prediction, reference) == pytest.approx(0.6944, abs=5e-5)
    values = meteor.meteor_values(["", "a", "", prediction], ["a", "", "", reference])
    assert values[:3].tolist() == [0, 0, 0]


def test_meteor_equals_plain_nltk() -> None:
    """The cache between pairs changes nothing."""
    if reason := meteor.meteor_available():
        pytest.skip(reason)
    from nltk.tokenize import NLTKWordTokenizer
    from nltk.translate.meteor_score import single_meteor_score

    predictions, references = shuffled_pairs()
    predictions += ["Big tumors were seen; the heart was huge", "lesions enlarged lungs"]
    references += ["A large tumour is visible. The heart is big", "The lesion enlarges. Both lung"]
    wordnet, (_, sentences), words = meteor._find_wordnet()(), meteor._punkt(), NLTKWordTokenizer()

    def tokens(report: str) -> list[str]:
        return [word for sentence in sentences.tokenize(report) for word in words.tokenize(sentence)]

    expected = [single_meteor_score(tokens(r), tokens(p), wordnet=wordnet) for p, r in zip(predictions, references, strict=True)]
    assert meteor.meteor_values(predictions, references).tolist() == expected
    assert min(expected[-2:]) > 0.3  # by synonyms and stems


def test_trained_punkt_keeps_abbreviations() -> None:
    if meteor.punkt_model() == "untrained":
        pytest.skip("nltk's punkt_tab is not on this machine")
    if reason := meteor.meteor_available():
        pytest.skip(reason)
    # "Dr." stays one word for the trained model: 2 of 2 words match, in one chunk; untrained, a lone period would be a third.
    assert meteor._punkt()[1].tokenize("Dr. Smith reads.") == ["Dr. Smith reads."]
    assert meteor_score("Dr. Smith", "Dr. Smith") == pytest.approx(1 - 0.5 / 8)


def test_meteor_reads_plain_wordnet_files_without_lexnames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian's wordnet-base has no `lexnames`; the test uses a WordNet of one synset."""
    empty = ["cntlist.rev", *(f"{part}.exc" for part in ("adj", "adv", "noun", "verb"))]
    parts = ["noun", "verb", "adv"]
    for name in empty + [f"{kind}.{part}" for kind in ("data", "index") for part in parts]:
        (tmp_path / name).write_text("")
    line = "{offset:08d} 00 a 02 big 0 tall 0 000 | above average in size  \n"
    header = "  1 WordNet 3.0 Copyright 2006 by Princeton University.\n"
    (tmp_path / "data.adj").write_text(header + line.format(offset=len(header)))
    (tmp_path / "index.adj").write_text("".join(f"{word} a 1 0 1 0 {len(header):08d}  \n" for word in ("big", "tall")))
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setenv("WNSEARCHDIR", str(tmp_path))
    assert meteor.meteor_available() is None
    assert meteor_score("big mass", "tall mass") == pytest.approx(1 - 0.5 / 8)
    assert meteor_score("wide mass", "tall mass") == pytest.approx(0.5 * 0.5)  # one of two words, one chunk


def test_wrong_input() -> None:
    with pytest.raises(ValueError, match="1 predictions and 2 references"):
        bleu(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="0 predictions"):
        text.text_scores([], [])
    with pytest.raises(ValueError, match="1 of the predictions are no text, the first is number 1, of type NoneType"):
        text.text_scores(["a", None], ["a", "b"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="put it in a list"):
        text.text_values("abc", ["a", "b", "c"])


def test_import_is_light() -> None:
    import subprocess

    code = "import sys, med3dvlm.metrics.text; print([m for m in ('nltk', 'rouge_score', 'evaluate', 'sacrebleu') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() in ("[]", "")
