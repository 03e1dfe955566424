"""The released weights' names, and ours: one table, read from the released layout to this package's.

A released state dict is cut into parts by prefix, and within a part patterns rewrite the names, one after another. Convolutions need a reshape
besides: the released encoder works on Conv3d kernels over (H, W, D), whose branches c1, c2, c3 act on H, W and D; ours are 1D kernels by axis.

Released weights have no activation in the stem and (the whole model) the image one token late: build what they are loaded into with
`encoder_options={"stem_activation": False}` and `image_splice="published"`.
"""

import re
from collections.abc import Mapping

from torch import Tensor, nn

Rules = tuple[tuple[str, str], ...]  # (pattern, replacement) for re.sub, applied in turn
LARGEST = 12  # blocks in a stage of dcformer_large
ENCODER: Rules = (
    (r"^encoder\.s0\.0\.(\d+)\.", r"stem.\1."),
    *((rf"^encoder\.s{stage}\.0\.proj\.", rf"stages.{stage - 1}.0.project.") for stage in range(1, 5)),
    *((rf"^encoder\.s{stage}\.{block}\.", rf"stages.{stage - 1}.{block + 1}.") for stage in range(1, 5) for block in range(LARGEST)),
    (r"\.dwconv\.", r".mixer."),
    (r"\.c1\.([01])\.", r".height.\1."),
    (r"\.c2\.([01])\.", r".width.\1."),
    (r"\.c3\.([01])\.", r".depth.\1."),
    (r"\.mlp\.mlp\.0\.", r".mlp.expand."),
    (r"\.mlp\.mlp\.3\.", r".mlp.reduce."),
)
PROJECTOR: Rules = (
    (r"^(low|high)_mixer\.(\d+)\.", r"\1.\2."),  # mixer
    (r"\.ln1\.", r".token_norm."),
    (r"\.ln2\.", r".channel_norm."),
    (r"\.mlp1\.mm_projector\.", r".token_mlp."),
    (r"\.mlp2\.mm_projector\.", r".channel_mlp."),
    (r"^(low|high)_up_mlp\.", r"\1."),  # low_high_mlp
    (r"^mm_projector\.1\.(weight|bias)$", r"shared.1.\1"),
    (r"^mm_projector\.", r"layers."),  # mlp
    (r"\.1\.1\.", r".2."),
)
# kind -> (prefix there, prefix here, patterns for the rest of the name); the first prefix that fits is taken
PUBLISHED_NAMES: dict[str, tuple[tuple[str, str, Rules], ...]] = {
    "encoder": (("", "", ENCODER),),
    "projector": (("", "", PROJECTOR),),
    "clip": (
        ("vision_encoder.", "vision_encoder.", ENCODER),
        ("language_encoder.", "text_encoder.", ()),
        ("mm_vision_proj.", "image_projection.", ()),
        ("mm_language_proj.", "text_projection.", ()),
        ("t_prime", "logit_scale", ()),
        ("bias", "logit_bias", ()),
    ),
    "vlm": (
        ("model.vision_tower.vision_tower.", "vision_encoder.", ENCODER),
        ("model.mm_projector.", "projector.", PROJECTOR),
        ("model.", "language_model.model.", ()),
        ("lm_head.", "language_model.lm_head.", ()),
    ),
}
# how many leading axes of a released tensor stay; the rest become one: kernels (C_out, C_in, k, 1, 1), 1x1x1 kernels, scalars
KEPT_AXES = ((r"\.c[123]\.0\.weight$", 2), (r"\.s\d\.0\.proj\.weight$", 1), (r"^(t_prime|bias)$", 0))


def from_published(state_dict: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """A released state dict under our names and shapes; the tensors are views of those given.

    Args:
        kind: "encoder" (DCFormer), "projector", "clip" (DCFormer_SigLIP) or "vlm" (Med3DVLM).

    Raises:
        ValueError: the kind is unknown, or names belong to no part of that layout.
    """
    if kind not in PUBLISHED_NAMES:
        raise ValueError(f"published layout {kind!r} is unknown; known: {', '.join(PUBLISHED_NAMES)}")
    renamed = {name: _rename(name, kind) for name in state_dict}
    if strangers := [name for name, new in renamed.items() if new is None]:
        raise ValueError(f"the weights are not in the published {kind} layout, which has no {_some(strangers)}")
    return {str(renamed[name]): _reshape(name, tensor) for name, tensor in state_dict.items()}


def load_published(model: nn.Module, state_dict: Mapping[str, Tensor], kind: str) -> None:
    """Load released weights into a model of ours, every tensor of it; a tied output head may be missing.

    Raises:
        ValueError: names are missing or left over, or shapes differ; all are named, and nothing is loaded.
    """
    given, wanted = from_published(state_dict, kind), model.state_dict()
    tied = {str(name) for name in getattr(model, "all_tied_weights_keys", None) or ()}
    problems = {
        "lack": [name for name in wanted if name not in given and name not in tied],
        "have besides": [name for name in given if name not in wanted],
        "have in another shape": [
            f"{name} {tuple(given[name].shape)} instead of {tuple(wanted[name].shape)}"
            for name in wanted
            if name in given and given[name].shape != wanted[name].shape
        ],
    }
    if any(problems.values()):
        found = "; they ".join(f"{verb} {_some(names)}" for verb, names in problems.items() if names)
        raise ValueError(f"the published weights do not fit the {type(model).__name__}: they {found}; check encoder, projector and sizes")
    model.load_state_dict(given, strict=False)


def _rename(name: str, kind: str) -> str | None:
    for published, ours, rules in PUBLISHED_NAMES[kind]:
        if name.startswith(published):
            rest = new = name.removeprefix(published)
            for pattern, replacement in rules:
                new = re.sub(pattern, replacement, new)
            return ours + new if new != rest or not rules else None
    return None


def _reshape(name: str, tensor: Tensor) -> Tensor:
    for pattern, kept in KEPT_AXES:
        if re.search(pattern, name):
            return tensor.reshape(*tensor.shape[:kept], -1)
    return tensor


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
