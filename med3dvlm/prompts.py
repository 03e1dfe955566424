"""Words that the model is asked with, as data. Training draws one for a report, in every epoch anew; evaluation takes the first."""

from collections.abc import Sequence

from med3dvlm.records import LETTERS

RESEARCH_NOTICE = "Research software, not a medical device: no diagnosis or treatment may rest on its output."

REPORT_PROMPTS = (
    "Describe the findings.",
    "Write the report of this scan.",
    "What does the scan show?",
)


def closed_prompt(question: str, choices: Sequence[str]) -> str:
    """The published form of a closed question: 'Where is it? Choices: A. Left lung B. Right lung' (M3D-VQA)."""
    listed = " ".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    return f"{question} Choices: {listed}"


def closed_answer(choices: Sequence[str], answer: str) -> str:
    """The published form of a closed answer: 'B. Right lung'."""
    return f"{LETTERS[list(choices).index(answer)]}. {answer}"
