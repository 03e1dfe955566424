"""Texts of prompts. Training draws one of them for a report, in every epoch anew; evaluation takes the first."""

from collections.abc import Sequence

from med3dvlm.records import LETTERS

RESEARCH_NOTICE = "Research software, not a medical device: no diagnosis or treatment may rest on its output."

REPORT_PROMPTS = (
    "Describe the findings.",
    "Write the report of this scan.",
    "What does the scan show?",
)
# Prompts of presence and absence for zero-shot detection. The first pair is that of CT-CLIP (arXiv 2403.17834) and DCFormer (2502.05091).
FINDING_PROMPTS = (
    ("{Finding} is present.", "{Finding} is not present."),
    ("There is {finding}.", "There is no {finding}."),
    ("{Finding} is seen.", "{Finding} is not seen."),
    ("Findings of {finding}.", "No evidence of {finding}."),
)


def finding_prompts(finding: str, templates: int = 1) -> list[tuple[str, str]]:
    """Return the first pairs of prompts about a finding: "lung_nodule" -> [("Lung nodule is present.", "Lung nodule is not present."), ...]."""
    begin, words = finding_words(finding), finding.replace("_", " ")
    return [
        (present.format(Finding=begin, finding=words), absent.format(Finding=begin, finding=words))
        for present, absent in FINDING_PROMPTS[:templates]
    ]


def finding_words(finding: str) -> str:
    """Write a finding's name in words: "lung_nodule" -> "Lung nodule", "COVID-19" unchanged."""
    words = finding.replace("_", " ")
    return words[:1].upper() + words[1:]


def closed_prompt(question: str, choices: Sequence[str]) -> str:
    """Write a closed question in its published form: 'Where is it? Choices: A. Left lung B. Right lung' (M3D-VQA).

    Raises:
        ValueError: there are more choices than letters.
    """
    listed = " ".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS[: len(choices)], choices, strict=True))
    return f"{question} Choices: {listed}"


def closed_answer(choices: Sequence[str], answer: str) -> str:
    """Write a closed answer in its published form: 'B. Right lung'."""
    return f"{LETTERS[list(choices).index(answer)]}. {answer}"
