"""Attributes by which the stacks of one study differ: acquisition, phase, echo, kernel, thickness and others. They separate stacks and
describe them.

Values are kept as texts and compared. What is shown of them is a number, a code or a known word; texts that may hold a name, times and UIDs
are numbered instead ("study 1 of 2").
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

Attributes = Mapping[str, str]  # values by name


class Attribute(NamedTuple):
    """An attribute under any of several keywords, which in a multi-frame file stand below a sequence; {} in `words` is the value."""

    words: str
    keywords: str
    often: bool = True  # listed wherever it differs, not only where nothing else tells two stacks apart


# Where several separate the slices of a series equally well, the first is used.
ATTRIBUTES = {
    "series": Attribute("series {}", "SeriesNumber"),
    "phase": Attribute("temporal position {}", "TemporalPositionIdentifier FrameContentSequence/TemporalPositionIndex"),
    "cardiac phase": Attribute("cardiac phase {} %", "CardiacSynchronizationSequence/NominalPercentageOfCardiacPhase"),
    "delay": Attribute("trigger delay {} ms", "TriggerTime CardiacSynchronizationSequence/NominalCardiacTriggerDelayTime"),
    "frame time": Attribute("frame time {} ms", "FrameReferenceTime"),
    "contrast": Attribute("contrast agent", "ContrastBolusAgent"),
    "acquisition": Attribute("acquisition {}", "AcquisitionNumber FrameContentSequence/FrameAcquisitionNumber"),
    "echo": Attribute("echo {}", "EchoNumbers"),
    "echo time": Attribute("echo time {} ms", "EchoTime MREchoSequence/EffectiveEchoTime"),
    "inversion time": Attribute("inversion time {} ms", "InversionTime"),
    "flip angle": Attribute("flip angle {}", "MRTimingAndRelatedParametersSequence/FlipAngle"),
    "b-value": Attribute("b-value {}", "MRDiffusionSequence/DiffusionBValue"),
    "component": Attribute("{}", "MRImageFrameTypeSequence/ComplexImageComponent"),
    "kernel": Attribute("kernel {}", "CTReconstructionSequence/ConvolutionKernel"),
    "voltage": Attribute("{} kV", "CTXRayDetailsSequence/KVP"),
    "thickness": Attribute("{} mm thick", "PixelMeasuresSequence/SliceThickness"),
    "diameter": Attribute("field of {} mm", "CTReconstructionSequence/ReconstructionDiameter"),
    "type": Attribute("{}", "CTImageFrameTypeSequence/FrameType MRImageFrameTypeSequence/FrameType ImageType"),
    "description": Attribute("description", "SeriesDescription"),
    "centre": Attribute("reconstruction centre", "CTReconstructionSequence/ReconstructionTargetCenterPatient", False),
    "direction": Attribute(
        "diffusion direction", "MRDiffusionSequence/DiffusionGradientDirectionSequence/DiffusionGradientOrientation", False
    ),
    "stack": Attribute("stack", "FrameContentSequence/StackID", False),
    "study": Attribute("study", "StudyInstanceUID", False),
    "reference": Attribute("frame of reference", "FrameOfReferenceUID", False),
}
PATHS = {name: [path.split("/") for path in attribute.keywords.split()] for name, attribute in ATTRIBUTES.items()}
INDEX = [["FrameContentSequence", "DimensionIndexValues"]]  # several, each of which is an attribute
# When a slice was taken, by the first of these that is stated; day and hour make one text.
TIMES = (
    [["FrameContentSequence", "FrameAcquisitionDateTime"]],
    [["AcquisitionDateTime"]],
    [["AcquisitionDate"], ["AcquisitionTime"]],
    [["ContentTime"]],
)
# What else may stand among the attributes; numbered. Fields (where the image begins within its plane) and passes are found, not stated.
OTHERS = {"field": "field", "time": "time", "file": "file", "pass": "pass in the order of acquisition"}
KEYWORDS = {path[-1] for paths in (*PATHS.values(), INDEX, *TIMES) for path in paths}
# Words of a SeriesDescription that name no one.
PLAIN_WORDS = frozenset(
    """abdomen abdominal adrenal angio aorta arterial arteriell ax axial axiale bone brain breath bolus cardiac cerebral cervical chest
    contrast cor coronal coronar coronary cta ctpa delayed diastole diffusion dwi enhanced exp expiration extremity face flair foot hand head
    heart hip hr hrct inspiration insp iv kidney knee late leg liver lumbar lung lungs mediastinum mip mpr nativ native neck non noncontrast
    orbit pancreas parenchyma pelvis perfusion phase plain portal post pre prone pulmonary recon reformat renal sag sagittal sella sharp
    shoulder sinus skull soft spine standard supine systole t1 t2 temporal thin thick thorax thoracic tissue trauma urography venous vrt with
    without wrist""".split()
)
CODE = re.compile(r"[\w.+/ -]{1,16}")
REFORMATS = {"SECONDARY", "MIP", "MINIP", "MPR", "REFORMATTED", "AVERAGE", "PROJECTION IMAGE", "VRT", "SSD"}


def attributes_of(places: Sequence[Any]) -> dict[str, str]:
    """Return the attributes of a frame by name, from its functional groups, those of all frames, or the header itself."""
    found = {name: value for name, paths in PATHS.items() if (value := _stated(places, paths))}
    if index := _stated(places, INDEX):
        found.update({f"index {number}": value for number, value in enumerate(index.split("\\"), start=1)})
    for parts in TIMES:
        if hour := _stated(places, parts[-1:]):
            found["time"] = "".join([*(_stated(places, [path]) for path in parts[:-1]), hour])
            break
    return found


def _stated(places: Sequence[Any], paths: Iterable[Sequence[str]]) -> str:
    """Return the first value of a keyword, below its sequences or beside them, as a text; "" for none."""
    for place in places:
        for *sequences, keyword in paths:
            inner = place
            for sequence in sequences:
                inner = (inner.get(sequence) or [inner])[0]
            if (value := inner.get(keyword)) is not None and (text := text_of(value)):
                return text
    return ""


def text_of(value: Any) -> str:
    """Return a value of a header as one text; several are joined by a backslash, as in DICOM."""
    return "\\".join(texts_of(value))


def texts_of(value: Any) -> list[str]:
    """Return the values of a header, none, one or several, as texts."""
    values = [] if value is None else [value] if isinstance(value, str) or not hasattr(value, "__iter__") else list(value)
    return [f"{each:.10g}" if isinstance(each, float) else str(each).strip() for each in values]


def number_of(text: str | None) -> float | None:
    """Convert a text that is a number."""
    try:
        return float(text or "")
    except ValueError:
        return None


def is_reformat(attributes: Attributes) -> bool:
    """Return whether an image was made of others: a MIP, a reformat, a mean."""
    types = set(attributes.get("type", "").upper().split("\\"))
    return bool(types & REFORMATS) or any(word in REFORMATS for each in types for word in re.split(r"[ _]", each)[1:])


def common_attributes(slices: Iterable[Attributes]) -> dict[str, str]:
    """Return the attributes that all slices share; "" for one that differs among them."""
    every = list(slices)
    names = {name: None for attributes in every for name in attributes}
    values = {name: {attributes.get(name) for attributes in every} for name in names}
    return {name: next(iter(found)) or "" if len(found) == 1 else "" for name, found in values.items()}


def differences(stacks: Sequence[Attributes], known: Sequence[str]) -> list[str]:
    """Describe for each stack, by the attributes that its slices share, how it differs from the other stacks.

    `known` are the words that are there already: what is listed only where it is needed is so where they and the words so far are alike.
    """
    found = [[text] for text in known]
    names = [name for name in {**ATTRIBUTES, **OTHERS, **{name: "" for attributes in stacks for name in sorted(attributes)}}]
    for often in (True, False):
        for name in names:
            attribute = ATTRIBUTES.get(name)
            if (attribute is not None and attribute.often) is not often:
                continue
            words = _shown(name, [attributes.get(name) for attributes in stacks])
            distinct = {tuple(each) for each in found}
            if len(set(words)) > 1 and (often or len({(*each, word) for each, word in zip(found, words, strict=True)}) > len(distinct)):
                for each, word in zip(found, words, strict=True):
                    each.extend([word] if word and word not in each else [])
    return [", ".join(each) for each in found]


def _shown(name: str, values: Sequence[str | None]) -> list[str]:
    """Return the words for each value of an attribute; "" for none, and for all where none may be shown."""
    words = ATTRIBUTES[name].words if name in ATTRIBUTES else OTHERS.get(name, name.replace("index", "dimension index"))
    stated = list(dict.fromkeys(filter(None, values)))
    if name == "description":
        return [" ".join(word for word in re.findall(r"[a-z]+\d?", (value or "").lower()) if word in PLAIN_WORDS) for value in values]
    if words == "{}":
        everywhere = set.intersection(*(set((value or "").split("\\")) for value in values)) if values else set()
        codes = [[each for each in (value or "").split("\\") if each not in everywhere and CODE.fullmatch(each)] for value in values]
        return [" ".join(each).lower() for each in codes]
    if "{}" in words:
        return [words.format(shown) if (shown := _code(name, value)) else "" for value in values]
    if len(stated) == 1:
        return [f"no {words}" if value is None else words if value else "" for value in values]
    return [f"{words} {stated.index(value) + 1} of {len(stated)}" if value else "" for value in values]


def _code(name: str, value: str | None) -> str:
    if name == "kernel":
        return " ".join(each for each in (value or "").split("\\") if CODE.fullmatch(each))
    number = number_of(value)
    return "" if number is None else f"{number:g}"
