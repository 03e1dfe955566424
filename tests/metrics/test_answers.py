"""Letters and names in answers, means by group, confusions: by hand."""

import numpy as np
import pytest

from med3dvlm.metrics.answers import confusion, first_letter, grouped_means, named_choices, right_choices
from tests.metrics.bootstrap import bootstrap_interval

CHOICES = ("Lung", "Left lung", "Liver", "Cyst of the kidney")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B. Right lung", "B"),
        ("The answer is C", "C"),
        ("(D)", "D"),
        ("Axial", None),
        ("", None),
        ("E. Other", None),
        ("b.", None),
        ("C or A", "C"),
    ],
)
def test_first_letter(text: str, letter: str | None) -> None:
    assert first_letter(text, 4) == letter


def test_first_letter_knows_how_many_choices_there_are() -> None:
    assert first_letter("C. B.", 2) == "B"


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("B. Left lung", {1}),
        ("B. Liver", {1, 2}),  # the letter and the text disagree
        ("C", {2}),
        ("(C)", {2}),
        ("The answer is C because of its density", {2}),
        ("option C of these", {2}),
        ("A cyst of the kidney", {3}),  # an article, not a letter
        ("It is in the left lung.", {1}),  # not "lung" too
        ("the LIVER!", {2}),
        ("lung, and the left lung", {0, 1}),
        ("not the liver but the lung", {0, 2}),  # what is denied is named
        ("A. Lung or B. Left lung", {0, 1}),
        ("delivery", set()),
        ("E.", set()),
        ("", set()),
        ("Hepatitis B", set()),
        ("Chronic hepatitis B.", set()),
        ("Hepatitis B or C", set()),
        ("Vitamin D deficiency", set()),
        ("Type A, likely", set()),
        ("Grade C", set()),
        ("C-spine", set()),
        ("C.T. scan", set()),
        ("B12 deficiency", set()),
        ("The answer is A cyst", set()),
        ("Hepatitis B. Liver", {2}),
        ("The patient has hepatitis B. The answer is C.", {2}),
        ("B) Left lung", {1}),
        ("B Liver", {1, 2}),
        ("A: Lung", {0}),
        ("C - the organ below the diaphragm", {2}),
        ("Answer: **B**", {1}),
        ("The correct answer is option (B).", {1}),
        ("It's B", {1}),
        ("I would go with D", {3}),
        ("left lung (B)", {1}),
        ("left lung (C)", {1, 2}),
        ("B or C", {1, 2}),
        ("B, C", {1, 2}),
        ("not B but C", {1, 2}),
        ("Both B and D", {1, 3}),
        ("Either A or hepatitis", {0}),
    ],
)
def test_named_choices(text: str, places: set[int]) -> None:
    assert named_choices(text, CHOICES) == places


@pytest.mark.parametrize(
    ("text", "choices", "places"),
    [
        ("Hepatitis B", ("Hepatitis C", "Cirrhosis", "Hepatitis B"), {2}),
        ("C. Hepatitis B", ("Hepatitis C", "Cirrhosis", "Hepatitis B"), {2}),
        ("5 mm", ("<5 mm", "5 mm", "1.5 mm", "> 5 mm"), {1}),
        ("< 5 mm", ("<5 mm", "5 mm", "1.5 mm", "> 5 mm"), {0}),
        ("about 1.5 mm", ("<5 mm", "5 mm", "1.5 mm", "> 5 mm"), {2}),
        ("T+", ("T", "T+"), {1}),
        ("-20 HU", ("20 HU", "-20 HU"), {1}),
        ("ÖDEM, sağ", ("Ödem sağ", "Ödem"), {0}),
        ("Left.", ("Left", "Right", "Left"), {0}),
        ("C", ("Left", "Right", "Left"), {2}),
    ],
)
def test_choices_that_resemble_each_other(text: str, choices: tuple[str, ...], places: set[int]) -> None:
    assert named_choices(text, choices) == places


def test_right_choices() -> None:
    assert right_choices(("Left", "Right", "left."), "Left") == [0, 2]
    assert right_choices(("<5 mm", "5 mm", ">5 mm"), "5 mm") == [1] and right_choices(("?", "!"), "!") == [1]


def test_grouped_means_in_plain_loops() -> None:
    generator = np.random.default_rng(0)
    groups = [["a", "b", "c"][number] for number in generator.integers(3, size=60)]
    values, patients = generator.integers(2, size=60).astype(float), generator.integers(12, size=60).tolist()
    found = grouped_means({"right": values}, groups, ["a", "b", "c", "never"], patients)["right"]

    def mean_of_groups(rows: np.ndarray) -> float:
        return float(
            np.mean([values[[row for row in rows if groups[row] == name]].mean() for name in "abc" if name in {groups[r] for r in rows}])
        )

    assert found["mean"] == pytest.approx(mean_of_groups(np.arange(60))) and found["of_questions"] == pytest.approx(values.mean())
    assert found["mean_interval"] == pytest.approx(bootstrap_interval(np.arange(60), patients, statistic=mean_of_groups))
    assert found["of_questions_interval"] == pytest.approx(bootstrap_interval(values, patients))
    assert found["a"] == pytest.approx(np.mean([value for value, name in zip(values, groups, strict=True) if name == "a"]))
    assert set(found["intervals"]) == set("abc") and "never" not in found


def test_no_questions_have_no_means() -> None:
    assert grouped_means({"right": []}, [], ["a"], [])["right"]["mean"] is None


def test_confusion() -> None:
    table = confusion([("b", "a"), ("b", "a"), ("a", "none"), ("a", "a")])
    assert table == {"right": ["a", "b"], "chosen": ["a", "b", "none"], "counts": [[1, 0, 1], [2, 0, 0]]}
    assert confusion([("a", "b")])["chosen"] == ["a", "b"]
