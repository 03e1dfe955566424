"""The published text classifier, on a tiny random stand-in of the same layout."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import RobertaConfig, RobertaModel, RobertaTokenizerFast

from med3dvlm.reports.classifiers import RadBertClassifier

TEXTS = ["Pleural effusion is seen.", "The lungs are clear. " * 300, "", "Nodule"]


class AsPublished(torch.nn.Module):
    """Encoder under "model", linear layer under "classifier": the published file is this module's state_dict."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        self.model = RobertaModel(config)
        self.classifier = torch.nn.Linear(config.hidden_size, 18)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.model(input_ids=input_ids, attention_mask=attention_mask).pooler_output)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[AsPublished, Path, Path]:
    """Return the model, its file, and the folder with the encoder's config and tokenizer."""
    from tokenizers import ByteLevelBPETokenizer

    folder = tmp_path_factory.mktemp("radbert")
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(TEXTS, vocab_size=400, special_tokens=special)
    bpe.save_model(str(folder))
    RobertaTokenizerFast.from_pretrained(folder, model_max_length=512).save_pretrained(folder)
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=bpe.get_vocab_size(), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=514, pad_token_id=1, bos_token_id=0, eos_token_id=2, initializer_range=0.5,
    )  # fmt: skip
    config.save_pretrained(folder)
    model = AsPublished(config).eval()
    # The published file is of an older transformers, which stored the positions' numbers too.
    tensors = model.state_dict() | {"model.embeddings.position_ids": torch.arange(514)[None]}
    torch.save(tensors, folder / "RadBertClassifier.pth")
    return model, folder / "RadBertClassifier.pth", folder


def test_predictions_equal_the_published_code(published: tuple[AsPublished, Path, Path]) -> None:
    """The published code pads every report to 512 tokens and reads it alone; here batches are padded to their longest."""
    model, file, folder = published
    classifier = RadBertClassifier(file, folder)
    tokenizer = RobertaTokenizerFast.from_pretrained(folder)
    expected = []
    for text in TEXTS:
        tokens = tokenizer(text, max_length=512, padding="max_length", truncation=True, return_tensors="pt")
        assert tokens["input_ids"].shape == (1, 512)
        with torch.no_grad():
            expected.append(model(tokens["input_ids"], tokens["attention_mask"]).sigmoid()[0].numpy())
    assert np.ptp(expected, axis=0).max() > 0.05, "the stand-in must tell the texts apart, or this proves nothing"
    for batch_size in (1, 3):
        np.testing.assert_allclose(classifier.probabilities(TEXTS, batch_size), expected, atol=1e-5)
    np.testing.assert_array_equal(classifier.table(TEXTS), np.array(expected) >= 0.5)
    assert len(classifier.names) == 18 and classifier.names[0] == "medical_material"


def test_wrong_files_are_refused(published: tuple[AsPublished, Path, Path], tmp_path: Path) -> None:
    model, _, folder = published
    with pytest.raises(FileNotFoundError, match="ibrahimhamamci/CT-RATE"):
        RadBertClassifier(tmp_path / "none.pth", folder)
    file = tmp_path / "weights.pth"
    torch.save(model, file)  # a whole module is code
    with pytest.raises(ValueError, match="more than tensors, which is not run"):
        RadBertClassifier(file, folder)
    file.write_bytes(b"half a file")
    with pytest.raises(ValueError, match="damaged"):
        RadBertClassifier(file, folder)
    torch.save(model.model.state_dict(), file)
    with pytest.raises(ValueError, match="classifier.weight"):
        RadBertClassifier(file, folder)
    tensors = model.state_dict()
    torch.save(tensors | {"classifier.weight": torch.zeros(20, 16), "classifier.bias": torch.zeros(20)}, file)
    with pytest.raises(ValueError, match="does not fit Linear with 18 findings"):
        RadBertClassifier(file, folder)
    del tensors["model.pooler.dense.weight"]
    torch.save(tensors, file)
    with pytest.raises(ValueError, match="pooler.dense.weight"):
        RadBertClassifier(file, folder)
