"""Visual question answering of a Med3DVLM, question by question.

    python eval/vqa.py --model outputs/demo/model --data outputs/demo/prepared --output outputs/demo/eval/vqa
    python eval/vqa.py --data outputs/demo/prepared --output outputs/demo/eval/vqa --score_only

    closed   the choice whose text the model finds likeliest after the bare question: highest mean log-probability of its tokens
    blind    the same on an empty volume, all zeros: what can be had from the text alone
    letter   the first letter that the model writes after the question with its choices, as the papers count
    open     what the model writes after the bare question: exact match, and F1 of the words
    yes_no   yes/no questions, as closed

Each is given by question kind and as the mean of the kinds; an interval is a 95 % bootstrap of that mean over patients.
"""

import re
from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np
import torch

from med3dvlm import evaluation
from med3dvlm.inference import Features, Med3DChat
from med3dvlm.metrics.intervals import bootstrap_interval
from med3dvlm.metrics.text import exact_match, token_f1
from med3dvlm.prompts import closed_prompt
from med3dvlm.records import LETTERS, QUESTION_KINDS, Question, Study

LETTER_TOKENS = 8  # room for the letter, not for the answer


def rank(chat: Med3DChat, questions: Sequence[Question], features: dict[str, Features]) -> dict[Question, list[float]]:
    """How likely the model finds each choice of questions that stand study by study; `features` by study."""
    groups = [[question for question in questions if question.study == study] for study in dict.fromkeys(q.study for q in questions)]
    conversations = [[evaluation.turn(question.text, choice) for question in group for choice in question.choices] for group in groups]
    scenes = [features[group[0].study] for group in groups]
    likelihoods = evaluation.answer_likelihoods(chat.model, chat.processor, conversations, scenes) if groups else []
    values = chain.from_iterable(likelihoods)
    return {question: [round(next(values), 4) for _ in question.choices] for question in questions}


def first_letter(text: str, choices: int) -> str | None:
    """The first of A, B, ... that stands by itself."""
    found = re.search(rf"\b[{LETTERS[:choices]}]\b", text)
    return found.group() if found else None


def tally(rows: Sequence[dict], measure: Callable[[dict], float], patients: dict[str, str], name: str = "accuracy") -> dict:
    """The mean of the kinds' means under `name`, its interval, and the kinds' means; of kinds that do not occur there is none."""
    if not rows:
        return {name: None, f"{name}_interval": None}
    table = np.array([[QUESTION_KINDS.index(row["kind"]), measure(row)] for row in rows], dtype=float)

    def means(table: np.ndarray) -> np.ndarray:
        kinds = table[:, 0].astype(int)
        counts = np.bincount(kinds, minlength=len(QUESTION_KINDS))
        return np.bincount(kinds, table[:, 1], len(QUESTION_KINDS)) / np.where(counts, counts, np.nan)

    interval = bootstrap_interval(table, [patients[row["id"]] for row in rows], statistic=lambda table: np.nanmean(means(table)))
    by_kind = dict(zip(QUESTION_KINDS, means(table).tolist(), strict=True))
    return {name: float(np.nanmean(means(table))), f"{name}_interval": interval, **{kind: v for kind, v in by_kind.items() if v == v}}


def score(rows: Sequence[dict], patients: dict[str, str]) -> dict:
    yes_no = [row for row in rows if row["choices"] == ["Yes", "No"]]
    others = [row for row in rows if row["choices"] != ["Yes", "No"]]
    closed = [row for row in others if row["choices"]]

    def likeliest(column: str) -> Callable[[dict], float]:
        return lambda row: row["choices"][int(np.argmax(row[column]))] == row["answer"]

    def lettered(row: dict) -> float:
        return first_letter(row["letter"], len(row["choices"])) == LETTERS[row["choices"].index(row["answer"])]

    exact = tally(others, lambda row: exact_match([row["open"]], [row["answer"]]), patients, "exact")
    words = tally(others, lambda row: token_f1([row["open"]], [row["answer"]]), patients, "token_f1")
    by_kind = {kind: {"exact": exact[kind], "token_f1": words[kind]} for kind in QUESTION_KINDS if kind in exact}
    return {
        "closed": {**tally(closed, likeliest("closed"), patients), "blind": tally(closed, likeliest("blind"), patients)},
        "letter": tally(closed, lettered, patients),
        "open": {**exact, **words, **by_kind},
        "yes_no": {**tally(yes_no, likeliest("closed"), patients), "blind": tally(yes_no, likeliest("blind"), patients)},
        "questions": {kind: sum(row["kind"] == kind for row in others) for kind in QUESTION_KINDS} | {"yes_no": len(yes_no)},
    }


def main() -> None:
    parser = evaluation.evaluation_parser(__doc__)
    parser.add_argument("--max_new_tokens", type=evaluation.positive, default=32, help="length of an open answer (default: %(default)s)")
    arguments = parser.parse_args()
    data, studies = evaluation.open_data(arguments)
    asked: dict[str, list[Question]] = {study.id: [] for study in studies}
    for question in data.questions(arguments.split):
        if question.study in asked:
            asked[question.study].append(question)
    questions = [question for study in studies for question in asked[study.id]]
    if not questions:
        raise ValueError(f"{arguments.data} has no questions about split {arguments.split!r}, so there is nothing to ask the model")
    written = arguments.output / "predictions.jsonl"

    if not arguments.score_only:
        chat = evaluation.load_chat(arguments, data)
        evaluation.begin(arguments, chat.model, data, max_new_tokens=arguments.max_new_tokens)
        known: dict[str, Study] = {study.id: study for study in studies}
        empty = chat.encode(torch.zeros(data.processor.size))

        def answer(batch: Sequence[Question]) -> list[dict]:
            features = {name: chat.encode(data.volume(known[name])) for name in dict.fromkeys(question.study for question in batch)}

            def write(questions: Sequence[Question], prompts: Sequence[str], tokens: int) -> dict[Question, str]:
                answers = chat.answers([features[question.study] for question in questions], prompts, tokens, 4 * arguments.batch_size)
                return {question: answer.text for question, answer in zip(questions, answers, strict=True)}

            ranked = [question for question in batch if question.choices]
            others = [question for question in batch if not question.yes_no]
            closed = [question for question in others if question.choices]
            columns = {
                "closed": rank(chat, ranked, features),
                "blind": rank(chat, ranked, dict.fromkeys(features, empty)),
                "letter": write(closed, [closed_prompt(question.text, question.choices) for question in closed], LETTER_TOKENS),
                "open": write(others, [question.text for question in others], arguments.max_new_tokens),
            }
            return [
                {"id": q.study, "kind": q.kind, "question": q.text, "choices": q.choices, "answer": q.answer}
                | {name: column.get(q) for name, column in columns.items()}
                for q in batch
            ]

        groups = evaluation.in_batches([study for study in studies if asked[study.id]], arguments.batch_size)
        batches = [[question for study in group for question in asked[study.id]] for group in groups]
        evaluation.predict(written, batches, answer, lambda question: question.study)

    rows = evaluation.predictions(written, [question.study for question in questions])
    scores = score(rows, {study.id: study.patient for study in studies})
    evaluation.write_scores(arguments.output / "scores.json", scores)
    closed, letter, written_out, yes_no = (scores[name] for name in ("closed", "letter", "open", "yes_no"))
    table = [
        [kind, count, closed[kind], closed["blind"][kind], letter[kind], written_out[kind]["exact"]]
        for kind, count in scores["questions"].items()
        if kind in closed
    ]
    table += [
        [
            "mean",
            len(rows) - scores["questions"]["yes_no"],
            closed["accuracy"],
            closed["blind"]["accuracy"],
            letter["accuracy"],
            written_out["exact"],
        ]
    ]
    table += [["yes/no", scores["questions"]["yes_no"], yes_no["accuracy"], yes_no["blind"]["accuracy"], None, None]]
    print(evaluation.markdown_table(("kind", "questions", "closed", "blind", "letter", "open, exact"), table))


if __name__ == "__main__":
    evaluation.script(main)
