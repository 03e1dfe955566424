"""Med3DCLIP against the papers' formulas in plain loops, in float64 and bfloat16, on one process and on four."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel, PreTrainedModel

from med3dvlm import Med3DCLIP, Med3DCLIPConfig
from med3dvlm.models.clip import LOSSES
from med3dvlm.training.contrastive import ContrastiveArguments
from tests.encoders.small import SMALL

PAIRS, SIZE = 8, (10, 20, 30)
VIT = {"encoder_options": {"patch": (4, 8, 8), "width": 24, "depth": 2, "heads": 3}, "size": (8, 16, 16)}
POOLER = ["text_encoder.pooler.dense.weight", "text_encoder.pooler.dense.bias"]


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


def tiny_text() -> PreTrainedModel:
    return DistilBertModel(DistilBertConfig(vocab_size=30, max_position_embeddings=16, dim=8, hidden_dim=12, n_layers=1, n_heads=2))


def tiny_text_with_a_pooler() -> PreTrainedModel:
    small = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertModel(BertConfig(vocab_size=30, max_position_embeddings=16, **small))


def tiny_clip(text: Callable[[], PreTrainedModel] = tiny_text, **settings: object) -> Med3DCLIP:
    torch.manual_seed(0)
    text_encoder = text()
    options = {"widths": [4, 4, 8, 8, 8], "stem_layers": 1, "layer_scale": 0.1}
    image = {"encoder": "dcformer_nano", "encoder_options": options, "size": SIZE}
    config = Med3DCLIPConfig(**image | {"text_config": text_encoder.config, "projection_dim": 6} | settings)
    return Med3DCLIP(config, text_encoder).eval()


def batch_of_pairs() -> dict[str, Tensor]:
    mask = torch.ones(PAIRS, 7, dtype=torch.long)
    mask[1, 4:] = mask[6, 2:] = 0
    return {"pixel_values": torch.rand(PAIRS, 1, *SIZE).double(), "input_ids": torch.randint(0, 30, (PAIRS, 7)), "attention_mask": mask}


@pytest.mark.parametrize("start", [None, 0.3])
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_gradient_are_the_formula(loss: str, start: float | None) -> None:
    """`start` holds temperature and bias, those of the papers and others. Worst difference measured: 3e-15 of 7."""
    model = tiny_clip(loss=loss, logit_scale=start, logit_bias=start).double()
    sides = [torch.nn.functional.normalize(torch.randn(PAIRS, 6, dtype=torch.float64), dim=1).requires_grad_() for _ in range(2)]
    parameters = [*sides, model.logit_scale, *([model.logit_bias] if loss == "siglip" else [])]
    ours = model.contrast(*sides)
    theirs = FORMULAS[loss](*sides, model.logit_scale, model.logit_bias)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    for mine, plain in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("autocast", [False, True], ids=["weights in bfloat16", "autocast"])
@pytest.mark.parametrize("loss", LOSSES)
def test_embeddings_and_loss_are_not_computed_in_bfloat16(loss: str, autocast: bool) -> None:
    """Only inputs and resulting gradients are rounded to bfloat16. Largest difference measured: 0.3 % of a gradient."""
    model = tiny_clip(loss=loss, logit_scale=4.4, logit_bias=-10.1)
    with torch.no_grad():  # the projection copies, so that the gradients are those of what follows it
        model.text_projection.weight.copy_(torch.eye(6, 8))
        model.text_projection.bias.zero_()
    common = torch.randn(1, 8)  # all are alike, as in the first steps of a training: the loss sees small differences of large scores
    sides = [(common + 0.3 * torch.randn(PAIRS, 8)).bfloat16().to(torch.float32 if autocast else torch.bfloat16) for _ in range(2)]
    model.to(sides[0].dtype)
    parameters = [*(side.requires_grad_() for side in sides), model.logit_scale, *([model.logit_bias] if loss == "siglip" else [])]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        embeddings = [model.project_text(side) for side in sides]
        ours = model.contrast(*embeddings)
    assert {ours.dtype, *(side.dtype for side in embeddings)} == {torch.float32}

    exact = [value.detach().double().requires_grad_() for value in parameters]
    units = [side[:, :6] / side[:, :6].square().sum(dim=1, keepdim=True).sqrt() for side in exact[:2]]
    theirs = FORMULAS[loss](*units, exact[2], exact[-1])
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-4)
    for mine, plain in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, exact), strict=True):
        assert (mine.double() - plain).norm() < 0.01 * plain.norm()


@pytest.mark.parametrize("start", [-0.5, 0.0, 2.0, math.log(100), 5.0])
@pytest.mark.parametrize("wish", [1.0, -1.0], ids=["wants less", "wants more"])
def test_the_temperature_is_100_at_most(start: float, wish: float) -> None:
    """The gradient passes, also above the bound, unless a step along it would increase the temperature. Released weights may be below 1."""
    model = tiny_clip(logit_scale=start)
    temperature = model.temperature
    (gradient,) = torch.autograd.grad(wish * temperature.sum(), model.logit_scale)
    expected = 100.0 if start > 4.6 else math.exp(start)
    outwards = start > 4.6 and wish < 0
    assert temperature.item() == pytest.approx(expected, rel=1e-6)
    assert gradient.item() == pytest.approx(0.0 if outwards else wish * expected, rel=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_has_the_bounded_temperature(loss: str) -> None:
    sides = [nn.functional.normalize(torch.randn(PAIRS, 6, dtype=torch.float64), dim=1) for _ in range(2)]
    model = tiny_clip(loss=loss, logit_scale=7.0).double()
    theirs = FORMULAS[loss](*sides, torch.tensor(math.log(100), dtype=torch.float64), model.logit_bias)
    assert model.contrast(*sides).item() == pytest.approx(theirs.item(), rel=1e-12)


def test_starts_from_the_papers_temperature_and_bias() -> None:
    siglip, clip = tiny_clip(), tiny_clip(loss="clip")
    assert (siglip.logit_scale.item(), siglip.logit_bias.item()) == (pytest.approx(math.log(10)), -10)
    assert clip.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    assert "logit_bias" in dict(siglip.named_parameters()) and "logit_bias" not in dict(clip.named_parameters())


def test_siglip_loss_by_hand() -> None:
    """Pairs are orthogonal, t = e and b = 0, so each row has one log sigmoid(e) and one log sigmoid(0)."""
    model = tiny_clip(logit_scale=1.0, logit_bias=0.0)
    pairs = torch.eye(6)[:2]
    expected = math.log(1 + math.exp(-math.e)) + math.log(2)
    assert model.contrast(pairs, pairs).item() == pytest.approx(expected, rel=1e-6)


def test_four_processes_equal_one_with_the_whole_batch(tmp_path: Path, shell: Callable[..., str]) -> None:
    """Loss and all gradients are equal, also those of the encoders. Worst difference measured: 2e-14 of 46."""
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


@pytest.mark.parametrize("text", [tiny_text, tiny_text_with_a_pooler])
def test_a_model_saved_in_bfloat16_loads_in_one_type_and_embeds(text: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    """Smallest cosine of an embedding to that of the model in float64 measured: 0.99996."""
    model, batch = tiny_clip(text, encoder="vit3d_naive", **VIT), batch_of_pairs() | {"pixel_values": torch.rand(PAIRS, 1, 8, 16, 16)}
    exact = model.double()(**batch | {"pixel_values": batch["pixel_values"].double()})
    model.bfloat16().save_pretrained(tmp_path)
    for options, dtype in (({}, torch.bfloat16), ({"dtype": torch.float32}, torch.float32)):
        loaded = Med3DCLIP.from_pretrained(tmp_path, **options).eval()
        assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
        output = loaded(**batch)
        for mine, plain in ((output.image_embeds, exact.image_embeds), (output.text_embeds, exact.text_embeds)):
            assert mine.dtype == torch.float32
            assert (mine.double() * plain).sum(dim=1).min() > 0.999
        assert output.loss.item() == pytest.approx(exact.loss.item(), rel=0.01)


def test_the_text_encoder_gets_the_attention_implementation(tmp_path: Path) -> None:
    """A configuration made around a text encoder does not change the encoder's own."""
    model = tiny_clip()
    assert model.text_encoder.config._attn_implementation == "sdpa"
    model.save_pretrained(tmp_path)
    for kind in ("sdpa", "eager"):
        loaded = Med3DCLIP.from_pretrained(tmp_path, attn_implementation=kind)
        assert loaded.text_encoder.config._attn_implementation == kind
    older = json.loads((tmp_path / "config.json").read_text())
    for settings in (older, older["text_config"]):
        settings.pop("dtype", None)
    (tmp_path / "config.json").write_text(json.dumps(older))
    assert {parameter.dtype for parameter in Med3DCLIP.from_pretrained(tmp_path).parameters()} == {torch.float32}


@pytest.mark.parametrize(("pooling", "stages"), [("mean", 1), ("mean", 2), ("frames", 1)])
@pytest.mark.parametrize("family", sorted(SMALL))
def test_every_parameter_that_trains_gets_a_gradient(family: str, pooling: str, stages: int) -> None:
    """With several processes, a parameter without a gradient would block training."""
    name, size, options = SMALL[family]
    text = tiny_text_with_a_pooler()
    settings = {"image_pooling": pooling, "image_stages": stages, "text_config": text.config, "projection_dim": 6}
    model = Med3DCLIP(Med3DCLIPConfig(name, options, size, **settings), text).double().train()
    batch = {key: values[:2] for key, values in batch_of_pairs().items()} | {"pixel_values": torch.rand(2, 1, *size).double()}
    model(**batch).loss.backward()
    assert [name for name, value in model.named_parameters() if value.requires_grad and value.grad is None] == []
    assert [name for name, value in model.named_parameters() if not value.requires_grad] == POOLER


@pytest.mark.parametrize("train_text", [True, False])
@pytest.mark.parametrize("text", [tiny_text, tiny_text_with_a_pooler])
def test_no_process_waits_for_a_parameter_without_a_gradient(text: Callable[[], PreTrainedModel], train_text: bool, tmp_path: Path) -> None:
    """Two steps with checkpointing, with which DistributedDataParallel may not search for unused parameters."""
    model, batch = tiny_clip(text).double().train(), batch_of_pairs()
    if not train_text:
        model.text_encoder.requires_grad_(False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(model)
        for _ in range(2):
            parallel(**batch).loss.backward()
    finally:
        distributed.destroy_process_group()


def test_accumulated_gradients_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="gradient_accumulation_steps is 4 but must be 1.* raise per_device_train_batch_size, .* more processes"
    ):
        ContrastiveArguments(output_dir=str(tmp_path), data="x", gradient_accumulation_steps=4)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("pixel_values",), "as input_ids with attention_mask, or as text_features; pass one of the two"),
        (("pixel_values", "input_ids"), "pass one of the two"),
        (("pixel_values", "input_ids", "attention_mask", "text_features"), "pass one of the two"),
        (("pixel_values", "text_features"), "there are 9 texts for 8 volumes; pass equally many for each volume"),
    ],
)
def test_wrong_arguments(given: tuple[str, ...], sentence: str) -> None:
    batch = batch_of_pairs() | {"text_features": torch.rand(9, 8).double()}
    with pytest.raises(ValueError, match=sentence):
        tiny_clip().double()(**{name: batch[name] for name in given})


@pytest.mark.parametrize("settings", [{"loss": "sigclip"}, {"text_pooling": "max"}, {"encoder": "dcformer_tinny"}])
def test_unknown_names_are_errors_that_list_the_known(settings: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="known: .*(siglip, clip|cls, mean|dcformer_nano)"):
        Med3DCLIP(Med3DCLIPConfig(**{"text_config": {"model_type": "distilbert"}, **settings}))
