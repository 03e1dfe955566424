"""The names in released checkpoints, and ours: tables of pairs, read from left to right to convert and from right to left to verify.

A pair of patterns fits whole names. In a pattern, {i}, a single letter, stands for a number and {i-1} for that number less one; {tensor}, a
longer word, stands for one component of a name; {rest} for what is left of it. Where the shape differs too, the pair says how the axes go:
"o i k 1 1 -> o i k" drops two axes of length one. A pair without our name is left out: nothing of ours needs it.

The released convolutional encoder works on Conv3d kernels over (H, W, D), whose branches c1, c2, c3 act on H, W and D; ours are 1D kernels by axis.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

Shape = tuple[int, ...]


class Pair(NamedTuple):
    """A pattern of released names, our pattern (None: left out), and the axes where they differ."""

    released: str
    ours: str | None
    axes: str = ""


@dataclass(frozen=True)
class Layout:
    """One kind of released checkpoint.

    Args:
        title: what it holds, in words.
        makes: "clip", "vlm", "encoder" or "projector".
        part: the family of the encoder, or the name of the projector.
        signature: patterns, each of which fits some name of such a checkpoint, and together no other kind's.
        names: the first pair that fits a name counts.
        size: (D, H, W) of the volumes, unless the checkpoint or the user says otherwise.
        recipe: of the VolumeProcessor; the one that the weights were trained with unless the note says otherwise.
        hu_range: its window in HU.
        note: what a user of the weights has to know.
    """

    title: str
    makes: str
    part: str
    signature: tuple[str, ...]
    names: tuple[Pair, ...]
    size: tuple[int, int, int] = (128, 256, 256)
    recipe: str = "m3d"
    note: str = ""
    hu_range: tuple[int, int] = (-1000, 1000)


def _under(released: str, ours: str, pairs: Iterable[Pair]) -> tuple[Pair, ...]:
    """Return the same pairs inside a larger model."""
    return tuple(Pair(released + pair.released, None if pair.ours is None else ours + pair.ours, pair.axes) for pair in pairs)


def _decomposed(released: str, ours: str) -> tuple[Pair, ...]:
    """Return the pairs of three branches, each a convolution and its batch norm."""
    branches = (("c1", "height", "o i k 1 1"), ("c2", "width", "o i 1 k 1"), ("c3", "depth", "o i 1 1 k"))
    kernels = (Pair(f"{released}.{branch}.0.weight", f"{ours}.{axis}.0.weight", f"{axes} -> o i k") for branch, axis, axes in branches)
    others = (Pair(f"{released}.{branch}.{{n}}.{{tensor}}", f"{ours}.{axis}.{{n}}.{{tensor}}") for branch, axis, _ in branches)
    return (*kernels, *others)


def _dcformer(scale: str) -> tuple[Pair, ...]:
    return (
        *_decomposed("encoder.s0.0.{i}", "stem.{i}"),
        Pair("encoder.s{s}.0.proj.weight", "stages.{s-1}.0.project.weight", "o i 1 1 1 -> o i"),
        *_decomposed("encoder.s{s}.{b}.dwconv", "stages.{s-1}.{b+1}.mixer"),
        Pair("encoder.s{s}.{b}.mlp.mlp.0.{tensor}", "stages.{s-1}.{b+1}.mlp.expand.{tensor}"),
        Pair("encoder.s{s}.{b}.mlp.mlp.3.{tensor}", "stages.{s-1}.{b+1}.mlp.reduce.{tensor}"),
        Pair(f"encoder.s{{s}}.{{b}}.{scale}", "stages.{s-1}.{b+1}.scale"),
    )


DCFORMER = _dcformer("scale")
CT_RATE_DCFORMER = (
    *_dcformer("gamma"),
    Pair("encoder.s0.0.{i}.norm.{rest}", None),  # the batch norms of c1, c2, c3 again, by a second name
    Pair("encoder.s{s}.{b}.dwconv.norm.{rest}", None),
    Pair("vq.{rest}", None),
)
CTVIT = (
    *(Pair(f"to_patch_emb.{released}.{{tensor}}", f"patch_embedding.{ours}.{{tensor}}") for ours, released in enumerate((1, 2, 3))),
    *(
        Pair(f"spatial_rel_pos_bias.net.{released}.{{tensor}}", f"position_bias.layers.{ours}.{{tensor}}")
        for released, ours in (("0.0", 0), ("1.0", 2), ("2", 4))
    ),
    *_under(
        "enc_{kind}_transformer.layers.{b}.",
        "{kind}.{b}.",
        (
            Pair("0.dsconv.{tensor}", "positions.{tensor}"),
            Pair("1.norm.gamma", "attention.norm.weight"),
            Pair("1.norm.beta", "attention.norm.bias"),
            Pair("1.to_q.weight", "attention.query.weight"),
            Pair("1.to_kv.weight", "attention.key_value.weight"),
            Pair("1.q_scale", "attention.query_scale"),
            Pair("1.k_scale", "attention.key_scale"),
            Pair("1.to_out.weight", "attention.output.weight"),
            Pair("3.0.{tensor}", "mlp.norm.{tensor}"),
            Pair("3.1.weight", "mlp.expand.weight"),
            Pair("3.4.weight", "mlp.reduce.weight"),
        ),
    ),
    Pair("enc_{kind}_transformer.norm_out.gamma", "{kind}_norm.weight"),
    Pair("enc_{kind}_transformer.norm_out.beta", "{kind}_norm.bias"),
    Pair("vq._codebook.embed", "codebook", "1 n c -> n c"),
    Pair("enc_{kind}_transformer.layers.{b}.1.null_kv", None),  # empty
    Pair("enc_{kind}_transformer.layers.{b}.1.context_norm.{rest}", None),  # of a cross attention that is not there
    Pair("to_patch_emb_first_frame.{rest}", None),  # all layers go through the one patch embedding
    Pair("vq.{rest}", None),  # statistics of the codebook's training
    *(Pair(f"{decoder}{{rest}}", None) for decoder in ("dec_", "to_pixels", "discr.", "vgg.")),
)
VIT3D_M3D = (
    Pair("cls_token", "class_token"),
    Pair("patch_embedding.position_embeddings", "positions"),
    Pair("patch_embedding.patch_embeddings.1.{tensor}", "patch_embedding.{tensor}"),
    *_under(
        "blocks.{b}.",
        "blocks.{b}.",
        (
            Pair("attn.qkv.{tensor}", "mixer.qkv.{tensor}"),
            Pair("attn.out_proj.{tensor}", "mixer.output.{tensor}"),
            Pair("mlp.linear1.{tensor}", "mlp.expand.{tensor}"),
            Pair("mlp.linear2.{tensor}", "mlp.reduce.{tensor}"),
            Pair("norm{n}.{tensor}", "norm{n}.{tensor}"),
        ),
    ),
    Pair("norm.{tensor}", "norm.{tensor}"),
)
MIXER = _under(
    "{stream}_mixer.{l}.",
    "{stream}.{l}.",
    (
        Pair("ln1.{tensor}", "token_norm.{tensor}"),
        Pair("ln2.{tensor}", "channel_norm.{tensor}"),
        *(
            Pair(f"{released}.mm_projector.{layer_there}.{{tensor}}", f"{ours}.{layer_here}.{{tensor}}")
            for released, ours in (("mlp1", "token_mlp"), ("mlp2", "channel_mlp"))
            for layer_there, layer_here in (("0", 0), ("1.1", 2))
        ),
    ),
)
MLP = (Pair("mm_projector.0.{tensor}", "layers.0.{tensor}"), Pair("mm_projector.1.1.{tensor}", "layers.2.{tensor}"))
LOW_HIGH_MLP = (Pair("{stream}_up_mlp.{tensor}", "{stream}.{tensor}"), Pair("mm_projector.1.{tensor}", "shared.1.{tensor}"))
POSITIONS = Pair("{tower}.embeddings.position_ids", None)  # a counter that older libraries stored
CLIP = (
    POSITIONS,
    *_under("vision_encoder.", "vision_encoder.", DCFORMER),
    Pair("language_encoder.{rest}", "text_encoder.{rest}"),
    Pair("mm_vision_proj.{tensor}", "image_projection.{tensor}"),
    Pair("mm_language_proj.{tensor}", "text_projection.{tensor}"),
    Pair("t_prime", "logit_scale", "-> 1"),
    Pair("bias", "logit_bias", "-> 1"),
)
CT_CLIP = (
    POSITIONS,
    *_under("visual_transformer.", "vision_encoder.", CTVIT),
    Pair("text_transformer.{rest}", "text_encoder.{rest}"),
    Pair("to_visual_latent.weight", "image_projection.weight"),
    Pair("to_text_latent.weight", "text_projection.weight"),
    Pair("temperature", "logit_scale", "-> 1"),
    Pair("{projection}_extra.weight", None),  # a second pair of projections that the released model does not use
)
REST = (Pair("{rest}", None),)


def _vlm(projector: tuple[Pair, ...]) -> tuple[Pair, ...]:
    return (
        *_under("model.vision_tower.vision_tower.", "vision_encoder.", DCFORMER),
        *_under("model.mm_projector.", "projector.", projector),
        Pair("model.embed_tokens.weight", "language_model.model.embed_tokens.weight"),
        Pair("model.layers.{rest}", "language_model.model.layers.{rest}"),
        Pair("model.norm.{tensor}", "language_model.model.norm.{tensor}"),
        Pair("lm_head.{tensor}", "language_model.lm_head.{tensor}"),
    )


_PROJECTORS = {  # name -> (its pairs, its signature)
    "mixer": (MIXER, ("{stream}_mixer.0.ln1.weight",)),
    "low_high_mlp": (LOW_HIGH_MLP, ("low_up_mlp.weight",)),
    "mlp": (MLP, ("mm_projector.1.1.weight",)),
}
_STEM = "encoder.s0.0.0.c1.0.weight"
_SCALE, _GAMMA = "encoder.s{s}.{b}.scale", "encoder.s{s}.{b}.gamma"
_SPATIAL = "enc_spatial_transformer.layers.0.1.to_q.weight"
_BLOCK = "blocks.0.attn.qkv.weight"

_CT_RATE_NOTE = (
    "The weights were trained on a window of -1000..200 HU, as the code released with them has it and the recipe saved with them does; "
    "the paper says -1000..1000 HU."
)
_M3D_NOTE = "The weights were trained on volumes of 32 x 256 x 256 voxels, scaled to their minimum and maximum."

LAYOUTS: dict[str, Layout] = {
    **{
        f"vlm_{name}": Layout(
            f"Med3DVLM (projector {name})",
            "vlm",
            name,
            ("model.vision_tower.vision_tower." + _STEM, *("model.mm_projector." + pattern for pattern in signature)),
            _vlm(pairs),
        )
        for name, (pairs, signature) in _PROJECTORS.items()
    },
    "clip": Layout("DCFormer_SigLIP", "clip", "dcformer", ("t_prime", "vision_encoder." + _STEM), CLIP),
    "ct_clip": Layout(
        "CT-CLIP",
        "clip",
        "ctvit",
        ("temperature", "visual_transformer." + _SPATIAL),
        CT_CLIP,
        (240, 480, 480),
        "ct_clip",
    ),
    "dcformer": Layout("DCFormer (pretrained_ViT.bin)", "encoder", "dcformer", (_STEM, _SCALE), DCFORMER),
    **{
        key: Layout(
            title, "encoder", "dcformer", (prefix + _STEM, prefix + _GAMMA), names, (256, 512, 512), "ct_rate", _CT_RATE_NOTE, (-1000, 200)
        )
        for key, title, prefix, names in (
            ("dcformer_ct_rate", "DCFormer for CT-RATE", "", CT_RATE_DCFORMER),
            (
                "dcformer_ct_rate_clip",
                "the encoder of a CLIP for CT-RATE with DCFormer",
                "visual_transformer.",
                (*_under("visual_transformer.", "", CT_RATE_DCFORMER), *REST),
            ),
        )
    },
    "ctvit": Layout("CT-ViT", "encoder", "ctvit", (_SPATIAL,), CTVIT, (240, 480, 480), "ct_clip"),
    **{
        key: Layout(title, "encoder", "vit3d_m3d", (prefix + "cls_token", prefix + _BLOCK), names, (32, 256, 256), "m3d", _M3D_NOTE)
        for key, title, prefix, names in (
            ("vit3d_m3d", "the ViT of M3D-CLIP (pretrained_ViT.bin)", "", VIT3D_M3D),
            ("m3d_clip", "M3D-CLIP (its ViT)", "vision_encoder.", (*_under("vision_encoder.", "", VIT3D_M3D), *REST)),
        )
    },
    **{
        key + name: Layout(
            f"a projector {name}{title}",
            "projector",
            name,
            tuple(prefix + pattern for pattern in signature),
            (*_under(prefix, "", pairs), *(REST if prefix else ())),
        )
        for key, title, prefix in (("projector_", "", ""), ("mm_projector_", " (mm_projector.bin)", "model.mm_projector."))
        for name, (pairs, signature) in _PROJECTORS.items()
    },
}


def recognise(names: Iterable[str]) -> str:
    """Return the key of the layout of tensors with these names.

    Raises:
        ValueError: it is none of those known.
    """
    names = list(names)
    for key, layout in LAYOUTS.items():
        if all(any(_match(pattern, name) is not None for name in names) for pattern in layout.signature):
            return key
    known = ", ".join(dict.fromkeys(layout.title for layout in LAYOUTS.values()))
    raise ValueError(f"a checkpoint with tensors such as {shortened(names)} is of no known layout; known: {known}")


def to_ours(layout: Layout, name: str) -> Pair | None:
    """Return (released name, our name or None, axes) for a released name; None if the layout does not have it."""
    for released, ours, axes in layout.names:
        values = _match(released, name)
        if values is not None:
            return Pair(name, None if ours is None else _fill(ours, values), axes)
    return None


def to_published(layout: Layout, name: str) -> Pair | None:
    """Return the same triple for one of our names."""
    for released, ours, axes in layout.names:
        values = None if ours is None else _match(ours, name)
        if values is not None:
            return Pair(_fill(released, values), name, axes)
    return None


def reshaped(shape: Shape, axes: str, backwards: bool = False) -> Shape | None:
    """Return a released tensor's shape in our layout, or the reverse with `backwards`; None if it has other axes."""
    if not axes:
        return shape
    released, ours = (part.split() for part in axes.split("->"))
    source, target = (ours, released) if backwards else (released, ours)
    if len(shape) != len(source) or any(length != 1 for axis, length in zip(source, shape, strict=True) if axis == "1"):
        return None
    lengths = dict(zip(source, shape, strict=True)) | {"1": 1}
    return tuple(lengths[axis] for axis in target)


def shortened(names: Iterable[str], at_most: int = 8) -> str:
    """Return the first of the names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:at_most]) + (f" and {len(names) - at_most} more" if len(names) > at_most else "")


_PLACEHOLDER = re.compile(r"\{(\w+)([+-]\d+)?\}")


@cache
def _compiled(pattern: str) -> tuple[re.Pattern[str], dict[str, int]]:
    """Compile a pattern to a regular expression, with what is to be subtracted from each number."""
    shifts: dict[str, int] = {}

    def group(found: re.Match[str]) -> str:
        name, shift = found.groups()
        shifts[name] = int(shift or 0)
        return f"(?P<{name}>{'.+' if name == 'rest' else '[0-9]+' if len(name) == 1 else '[^.]+'})"

    return re.compile(_PLACEHOLDER.sub(group, pattern.replace(".", "[.]"))), shifts


def _match(pattern: str, name: str) -> dict[str, str] | None:
    """Return the values of the pattern's placeholders in the name."""
    expression, shifts = _compiled(pattern)
    found = expression.fullmatch(name)
    if found is None or any(shift and int(found[key]) < shift for key, shift in shifts.items()):
        return None
    return {key: str(int(found[key]) - shift) if shift else found[key] for key, shift in shifts.items()}


def _fill(pattern: str, values: dict[str, str]) -> str:
    return _PLACEHOLDER.sub(lambda found: str(int(values[found[1]]) + int(found[2])) if found[2] else values[found[1]], pattern)
