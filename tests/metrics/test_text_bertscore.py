"""BERTScore by the MiniLM that a package ships, against bert-score itself."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from med3dvlm.metrics import bertscore, text

PAIRS = [
    ("There is a nodule in the right upper lobe.", "A 22 mm nodule is seen in the right upper lobe."),
    ("No effusion.", "Large pleural effusion on the left, with compressive atelectasis of the lower lobe and mediastinal shift."),
    ("The heart is of normal size. " * 12, "Cardiomegaly."),
    ("Ödem", "oedema"),
]


@pytest.fixture(scope="module")
def scorer() -> bertscore.BertScorer:
    pytest.importorskip(bertscore.SUBSTITUTE_PACKAGE)
    folder = Path(str(sys.modules[bertscore.SUBSTITUTE_PACKAGE].__file__)).parent / "model"
    return bertscore.bert_scorer(str(folder), layers=6, device="cpu")


def test_values_equal_bert_score(scorer: bertscore.BertScorer) -> None:
    import bert_score

    predictions, references = map(list, zip(*PAIRS, strict=True))
    values = scorer.values(predictions, references, batch_size=2)
    expected = bert_score.score(predictions, references, model_type=scorer._scorer.model_type, num_layers=6, device="cpu")
    for array, tensor in zip(values.values(), expected, strict=True):
        assert array == pytest.approx(tensor.numpy(), abs=1e-5)
    assert values["bertscore_f1"].std() > 0.05


def test_by_hand(scorer: bertscore.BertScorer) -> None:
    """Equations 1 to 3: each word is matched with the nearest of the other text; [CLS] and [SEP] do not count."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    path = scorer._scorer.model_type
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()
    words = []
    for sentence in PAIRS[0]:
        with torch.no_grad():
            vectors = model(**tokenizer(sentence, return_tensors="pt")).last_hidden_state[0]
        words.append(torch.nn.functional.normalize(vectors, dim=-1))
    similarity = words[0] @ words[1].T
    # bert-score lets [CLS] and [SEP] be matched, with a weight of 0.
    precision, recall = float(similarity.amax(1)[1:-1].mean()), float(similarity.amax(0)[1:-1].mean())
    values = scorer.values([PAIRS[0][0]], [PAIRS[0][1]])
    assert values["bertscore_precision"] == pytest.approx(precision, abs=1e-5)
    assert values["bertscore_recall"] == pytest.approx(recall, abs=1e-5)
    assert values["bertscore_f1"] == pytest.approx(2 * precision * recall / (precision + recall), abs=1e-5)


def test_empty_and_very_long_texts(scorer: bertscore.BertScorer) -> None:
    values = scorer.values(["", "a nodule", " \n", "", "nodule " * 4000], ["a nodule", "", "a nodule", "", "nodule " * 600])
    assert all(np.all(array[:4] == 0) for array in values.values())
    assert values["bertscore_f1"][4] == pytest.approx(1, abs=1e-5)  # cut at 512 word pieces, both are the same


def test_scores_do_not_depend_on_the_batch(scorer: bertscore.BertScorer) -> None:
    predictions, references = map(list, zip(*PAIRS, strict=True))
    together = scorer.values(predictions, references)["bertscore_f1"]
    alone = [scorer.values([p], [r])["bertscore_f1"][0] for p, r in PAIRS]
    assert together == pytest.approx(alone, abs=1e-5)
    assert scorer.values(predictions[::-1], references[::-1])["bertscore_f1"][::-1] == pytest.approx(together, abs=1e-6)


def test_text_scores_name_the_model(scorer: bertscore.BertScorer) -> None:
    scores = text.text_scores([PAIRS[0][0]], [PAIRS[0][1]], scorer)
    assert scores["bertscore_model"] == "model, layer 6" and 0.5 < scores["bertscore_f1"] < 1
    assert "bertscore_f1" not in text.text_scores(["a"], ["a"])


def test_model_is_found_loaded_once_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(bertscore.SUBSTITUTE_PACKAGE)
    loaded: list[tuple[Any, ...]] = []

    class Loaded:
        def __init__(self, *arguments: Any) -> None:
            loaded.append(arguments)

    monkeypatch.setattr(bertscore, "BertScorer", Loaded)
    monkeypatch.setattr(bertscore, "_local", lambda model: None)
    bertscore._load.cache_clear()
    assert bertscore.bert_scorer() is bertscore.bert_scorer(None, 6) and len(loaded) == 1
    assert loaded[0][1:] == ("all-MiniLM-L6-v2", 6, None)
    bertscore._load.cache_clear()
    monkeypatch.setattr(bertscore, "_local", lambda model: "/cache/snapshot")
    bertscore.bert_scorer()
    assert loaded[1] == ("/cache/snapshot", "roberta-large", 17, None)  # the papers' model and layer come first
    bertscore._load.cache_clear()


def test_missing_model_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bertscore, "SUBSTITUTE_PACKAGE", "no_such_package")
    monkeypatch.setattr(bertscore, "_local", lambda model: None)
    bertscore._load.cache_clear()
    with pytest.raises(FileNotFoundError, match="hf download roberta-large"):
        bertscore.bert_scorer()
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match="neither a folder nor cached"):
        bertscore.bert_scorer(str(tmp_path / "absent"))


def test_the_first_word_is_tokenized_with_a_space_in_roberta(tmp_path: Path) -> None:
    """bert-score encodes " word", but transformers 5 ignores the option by which it requests the space."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import RobertaConfig, RobertaModel, RobertaTokenizer

    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(ByteLevel.alphabet())]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    RobertaTokenizer(vocab=vocabulary, merges=[], model_max_length=64).save_pretrained(tmp_path)
    size = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8, "max_position_embeddings": 70}
    RobertaModel(RobertaConfig(vocab_size=len(vocabulary), pad_token_id=1, **size)).save_pretrained(tmp_path)
    scorer = bertscore.BertScorer(str(tmp_path), "tiny", 2, "cpu")
    from bert_score.utils import sent_encode

    pieces = scorer._scorer._tokenizer.convert_ids_to_tokens(sent_encode(scorer._scorer._tokenizer, "ab"))
    assert pieces == ["<s>", "Ġ", "a", "b", "</s>"]
