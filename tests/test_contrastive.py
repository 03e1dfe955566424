"""Med3DCLIP against the papers' formulas in plain loops, on one process and on four."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DistilBertConfig, DistilBertModel

from med3dvlm import Med3DCLIP, Med3DCLIPConfig
from med3dvlm.contrastive import LOSSES

PAIRS, SIZE = 8, (10, 20, 30)


def siglip_by_loops(images: Tensor, texts: Tensor, log_temperature: Tensor, bias: Tensor) -> Tensor:
    """-1/|B| sum_ij log sigmoid(z_ij (t x_i.y_j + b)) with z = 1 for a pair and -1 else (Med3DVLM paper, section 3.2; SigLIP)."""
    total = torch.zeros((), dtype=images.dtype)
    for i in range(len(images)):
        for j in range(len(texts)):
            z = 1.0 if i == j else -1.0
            score = sum(images[i, k] * texts[j, k] for k in range(images.shape[1]))
            total = total + torch.log(1 / (1 + torch.exp(-z * (torch.exp(log_temperature) * score + bias))))
    return (-total / len(images)).squeeze()


def clip_by_loops(images: Tensor, texts: Tensor, log_temperature: Tensor, bias: Tensor) -> Tensor:
    """Half the cross entropy of finding the text and half that of finding the image (CLIP, figure 3)."""
    n = len(images)
    scores = [[torch.exp(log_temperature) * sum(images[i] * texts[j]) for j in range(n)] for i in range(n)]
    total = torch.zeros((), dtype=images.dtype)
    for i in range(n):
        total = total - torch.log(torch.exp(scores[i][i]) / sum(torch.exp(scores[i][j]) for j in range(n)))
        total = total - torch.log(torch.exp(scores[i][i]) / sum(torch.exp(scores[j][i]) for j in range(n)))
    return (total / (2 * n)).squeeze()


FORMULAS = {"siglip": siglip_by_loops, "clip": clip_by_loops}


def tiny_clip(**settings: object) -> Med3DCLIP:
    torch.manual_seed(0)
    text_config = DistilBertConfig(vocab_size=30, max_position_embeddings=16, dim=8, hidden_dim=12, n_layers=1, n_heads=2)
    options = {"widths": [4, 4, 8, 8, 8], "stem_layers": 1, "layer_scale": 0.1}
    config = Med3DCLIPConfig("dcformer_nano", options, SIZE, text_config=text_config, projection_dim=6, **settings)
    return Med3DCLIP(config, DistilBertModel(text_config)).eval()


def batch_of_pairs() -> dict[str, Tensor]:
    mask = torch.ones(PAIRS, 7, dtype=torch.long)
    mask[1, 4:] = mask[6, 2:] = 0
    return {"pixel_values": torch.rand(PAIRS, 1, *SIZE).double(), "input_ids": torch.randint(0, 30, (PAIRS, 7)), "attention_mask": mask}


@pytest.mark.parametrize("start", [None, 0.3])
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_gradient_are_the_formula(loss: str, start: float | None) -> None:
    """`start`: the papers' own temperature and bias, and others. Worst difference measured: 3e-15 of 7."""
    model = tiny_clip(loss=loss, logit_scale=start, logit_bias=start).double()
    sides = [torch.nn.functional.normalize(torch.randn(PAIRS, 6, dtype=torch.float64), dim=1).requires_grad_() for _ in range(2)]
    parameters = [*sides, model.logit_scale, *([model.logit_bias] if loss == "siglip" else [])]
    ours = model.contrast(*sides)
    theirs = FORMULAS[loss](*sides, model.logit_scale, model.logit_bias)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    for mine, plain in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-10, atol=1e-12)


def test_starts_from_the_papers_temperature_and_bias() -> None:
    siglip, clip = tiny_clip(), tiny_clip(loss="clip")
    assert (siglip.logit_scale.item(), siglip.logit_bias.item()) == (pytest.approx(math.log(10)), -10)
    assert clip.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    assert "logit_bias" in dict(siglip.named_parameters()) and "logit_bias" not in dict(clip.named_parameters())


def test_a_diagonal_of_twos_is_told_from_noise() -> None:
    """A hand-worked case: orthogonal pairs, t = e, b = 0; each row has one log sigmoid(e) and one log sigmoid(0)."""
    model = tiny_clip(logit_scale=1.0, logit_bias=0.0)
    pairs = torch.eye(6)[:2]
    expected = math.log(1 + math.exp(-math.e)) + math.log(2)
    assert model.contrast(pairs, pairs).item() == pytest.approx(expected, rel=1e-6)


def test_four_processes_are_one_with_the_whole_batch(tmp_path: Path, shell: Callable[..., str]) -> None:
    """Loss and every gradient, of the encoders too. Worst difference measured: 2e-14 of 46."""
    batch, expected = batch_of_pairs(), {}
    torch.save(batch, tmp_path / "batch.pt")
    for loss in LOSSES:
        tiny_clip(loss=loss).save_pretrained(tmp_path / loss)
        model = Med3DCLIP.from_pretrained(tmp_path / loss).double().eval()
        expected[loss] = model(**batch).loss
        expected[loss].backward()
        expected[loss] = (expected[loss], {name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    shell("python", "tests/drivers/contrastive_processes.py", tmp_path)
    for loss, (value, gradients) in expected.items():
        result = torch.load(tmp_path / loss / "result.pt")
        torch.testing.assert_close(result["loss"], value.detach(), rtol=1e-12, atol=0)
        assert result["gradients"].keys() == gradients.keys()
        assert ("logit_bias" in gradients) == (loss == "siglip")
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                result["gradients"][name], gradient, rtol=1e-9, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_text_may_be_encoded_before() -> None:
    model, batch = tiny_clip().double(), batch_of_pairs()
    features = model.pool_text(batch["input_ids"], batch["attention_mask"])
    ahead = model(batch["pixel_values"], text_features=features)
    torch.testing.assert_close(ahead.loss, model(**batch).loss)


def test_mean_pooling_leaves_padding_out() -> None:
    model, batch = tiny_clip(text_pooling="mean").double(), batch_of_pairs()
    short = model.pool_text(batch["input_ids"][6:7, :2], batch["attention_mask"][6:7, :2])
    torch.testing.assert_close(model.pool_text(batch["input_ids"], batch["attention_mask"])[6:7], short)


def test_embeddings_are_of_length_one_and_follow_the_image() -> None:
    model, batch = tiny_clip().double(), batch_of_pairs()
    output = model(**batch, return_loss=False)
    for side in (output.image_embeds, output.text_embeds):
        torch.testing.assert_close(side.norm(dim=1), torch.ones(PAIRS, dtype=torch.float64))
    turned = model.encode_image(batch["pixel_values"].transpose(-1, -2).contiguous())
    assert (turned - output.image_embeds).abs().max() > 1e-4  # swapped axes are seen


def test_save_and_load_give_equal_embeddings(tmp_path: Path) -> None:
    model, batch = tiny_clip(image_stages=2), batch_of_pairs()
    batch["pixel_values"] = batch["pixel_values"].float()
    model.save_pretrained(tmp_path)
    assert torch.equal(Med3DCLIP.from_pretrained(tmp_path).eval()(**batch).image_embeds, model(**batch).image_embeds)


@pytest.mark.parametrize("settings", [{"loss": "sigclip"}, {"text_pooling": "max"}, {"encoder": "dcformer_tinny"}])
def test_unknown_names_are_errors_that_list_the_known(settings: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="known: .*(siglip, clip|cls, mean|dcformer_nano)"):
        Med3DCLIP(Med3DCLIPConfig(**{"text_config": {"model_type": "distilbert"}, **settings}))
