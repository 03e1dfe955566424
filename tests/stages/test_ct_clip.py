"""Settings of the CT-CLIP path: new text encoders and CXR-BERT's layout, sentences of reports, gradient checkpointing."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer

from med3dvlm import Med3DCLIP, Med3DCLIPConfig, programs
from med3dvlm.checkpoints import load_clip
from med3dvlm.datasets.store import PreparedData
from med3dvlm.datasets.torch import PairDataset
from med3dvlm.training import ct_clip
from med3dvlm.training.contrastive import common_words


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, repository: Path, prepared: Path, tmp_path: Path):  # type: ignore[no-untyped-def]
    """train("--flag", value, ...) trains two steps of the smoke recipe and returns the output folder."""

    def run(*flags: object) -> Path:
        config = repository / "stages" / "configs" / "smoke" / "ct_clip.yaml"
        given = (
            "--config",
            config,
            "--data",
            prepared,
            "--output-dir",
            tmp_path / "out",
            "--train-split",
            "train",
            "--max-steps",
            2,
            *flags,
        )
        if code := programs.run(ct_clip.main, [*map(str, given)], "ct_clip.py"):
            sys.exit(code)
        return tmp_path / "out"

    return run


def test_cxr_bert_loads_as_a_bert_without_its_own_code(train, prepared: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The published repository names a model type and code of its own; CT-CLIP reads it as a BERT."""
    folder = tmp_path / "cxr"
    words = sorted({word for study in PreparedData(prepared).studies("train") for word in study.report.lower().replace(".", " ").split()})
    tokenizer = BertTokenizer(vocab={word: place for place, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *words])})
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    bert = BertModel(BertConfig(vocab_size=len(tokenizer), **sizes))
    for part in (bert, tokenizer):
        part.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "configuration_cxrbert.CXRBertConfig", "AutoModel": "modeling_cxrbert.CXRBertModel"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "cxr-bert", "auto_map": code}))
    for name in ("configuration_cxrbert.py", "modeling_cxrbert.py"):
        (folder / name).write_text("raise SystemExit('remote code was run')\n")

    clip, processor = load_clip(train("--text-encoder", folder, "--text-options", '{"num_hidden_layers": 1}', "--train-text", "false"))
    assert processor.tokenizer("effusion")["input_ids"] == tokenizer("effusion")["input_ids"]
    assert clip.config.text_config.num_hidden_layers == 1
    weights = clip.text_encoder.state_dict()
    assert len(weights) < len(bert.state_dict())
    for name, value in weights.items():
        assert torch.equal(value, bert.state_dict()[name]), name


def test_a_new_text_encoder_has_the_words_of_the_training_reports(train, prepared: Path) -> None:  # type: ignore[no-untyped-def]
    clip, processor = load_clip(train("--text-options", '{"vocab_size": 90, "hidden_size": 8, "num_attention_heads": 1}'))
    tokenizer = processor.tokenizer
    assert isinstance(clip.text_encoder, BertModel)
    assert len(tokenizer) == clip.config.text_config.vocab_size <= 90 and clip.config.text_config.hidden_size == 8
    assert processor.max_text_length == 256
    report = PreparedData(prepared).studies("train")[0].report
    assert tokenizer.unk_token_id not in tokenizer(report)["input_ids"]


def test_the_vocabulary_has_special_tokens_characters_and_the_most_frequent_words() -> None:
    texts = ["Mass, no mass.", "A mass is no cyst.", "Cyst: 12 mm"]
    vocabulary = common_words(texts, 1000)
    assert vocabulary == common_words(reversed(texts), 1000)
    assert list(vocabulary.values()) == list(range(len(vocabulary)))
    characters = sorted(set("mass,noais.cyt:12"))
    assert list(vocabulary)[5:] == [*characters, *(f"##{c}" for c in characters), "mass", "cyst", "no", "12", "is", "mm"]
    assert BertTokenizer(vocabulary).tokenize("Mass, moss") == ["mass", ",", "m", "##o", "##s", "##s"]
    assert list(common_words(texts, len(vocabulary) - 2)) == list(vocabulary)[:-2]


def test_sentences_are_sampled_from_the_report_in_every_epoch(prepared: Path) -> None:
    data = PreparedData(prepared)
    drawn, again = PairDataset(data, "train", sentences=2), PairDataset(data, "train", sentences=2)
    again.set_epoch(1)
    lengths, differs = set(), 0
    for index, study in enumerate(drawn.studies):
        row = drawn[index]
        assert row["text"] == study.report
        parts = [part.removesuffix(".") for part in row["sentences"].split(". ")]
        assert set(parts) <= {part.removesuffix(".") for part in study.report.split(". ")} and len(set(parts)) == len(parts)
        lengths.add(len(parts))
        assert drawn[index]["sentences"] == row["sentences"]
        differs += again[index]["sentences"] != row["sentences"]
    assert lengths == {1, 2} and differs > len(drawn) / 2
    assert "sentences" not in PairDataset(data, "train")[0]


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_the_loss_of_two_texts_is_the_mean_of_each(loss: str) -> None:
    text = BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12)
    model = Med3DCLIP(
        Med3DCLIPConfig("dcformer_nano", {"widths": (4, 4, 8, 8, 8)}, (32, 64, 48), projection_dim=8, loss=loss, text_config=text)
    )
    model.eval()
    volumes, ids = torch.rand(3, 1, 32, 64, 48), torch.randint(1, 30, (6, 7))
    both = model(volumes, ids, torch.ones_like(ids))
    each = [model(volumes, part, torch.ones_like(part)).loss for part in (ids[:3], ids[3:])]
    assert both.text_embeds.shape == (6, 8)
    torch.testing.assert_close(both.loss, (each[0] + each[1]) / 2)
    pairs = torch.nn.functional.log_softmax(both.image_embeds @ both.text_embeds[3:].T * model.logit_scale.exp(), dim=1).diagonal()
    if loss == "clip":
        back = torch.nn.functional.log_softmax(both.text_embeds[3:] @ both.image_embeds.T * model.logit_scale.exp(), dim=1).diagonal()
        torch.testing.assert_close(each[1], -(pairs.mean() + back.mean()) / 2)


def test_recomputed_activations_change_no_gradient() -> None:
    """It is switched on in both towers, as by `gradient_checkpointing: true` in a recipe."""
    config = Med3DCLIPConfig(
        "dcformer_nano", {"widths": (4, 4, 8, 8, 8), "layer_scale": 0.1}, (32, 64, 48), projection_dim=8, loss="clip",
        text_config=BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
                               hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    )  # fmt: skip
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = Med3DCLIP(config).train()
        if recompute:
            model.gradient_checkpointing_enable()
            assert model.vision_encoder.gradient_checkpointing and model.text_encoder.encoder.layer[0].gradient_checkpointing
        volumes, ids = torch.rand(3, 1, 32, 64, 48), torch.randint(0, 30, (3, 7))
        model(volumes, ids, torch.ones_like(ids)).loss.backward()
        gradients.append(SimpleNamespace(grad={n: p.grad for n, p in model.named_parameters()}, state=model.state_dict()))
    for name, value in gradients[0].grad.items():
        torch.testing.assert_close(gradients[1].grad[name], value, rtol=1e-5, atol=1e-7)
    for name, value in gradients[0].state.items():
        torch.testing.assert_close(gradients[1].state[name], value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--sentences", 0), "must be at least 1: leave it out"),
        (("--cache-features", "true", "--train-text", "false", "--text-encoder", "x"), "reads a report once and whole"),
        (("--train-text", "false"), "a new text encoder has to learn"),
        (("--text-options", "small"), "is not valid JSON"),
        (("--train-split", "train_fixed"), "train_fixed"),
    ],
)
def test_wrong_settings(train, flags: tuple[object, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SystemExit) as stopped:
        train(*flags)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
