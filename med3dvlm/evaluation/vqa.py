"""Evaluate visual question answering by a Med3DVLM.

    med3dvlm evaluate vqa --model outputs/demo/model --data outputs/demo/prepared --output outputs/demo/eval/vqa
    med3dvlm evaluate vqa --data outputs/demo/prepared --output outputs/demo/eval/vqa --score-only
    torchrun --nproc_per_node 2 -m med3dvlm.cli evaluate vqa --model outputs/demo/model --data outputs/demo/prepared --output outputs/demo/eval/vqa

    closed   the choice whose text the model finds likeliest after the bare question: highest mean log-probability of its tokens;
             a tie counts against the answer
    letter   the first letter that the model writes after the question with its choices, as the papers count
    strict   the same words, right only if they name the right choice, by letter or by text, and no other
    open     what the model writes after the bare question, against the answer: exact match, F1 of the words, BLEU, ROUGE, METEOR
    yes_no   yes/no questions, as closed

Baselines without the scan stand within `closed` and `yes_no`: `blind`, the same on an empty volume, all air; `shuffled`, on that of another
patient, each volume once; `modal`, the choice that answered this very question most often in training.

A choice that is listed twice is right at both places. A question of more than eight choices has no letters: `left_out` counts those that
`letter` and `strict` are without.

Each is given by kind of question and as the mean of the kinds, "accuracy", and of all questions; an interval is a 95 % bootstrap over
patients. `confusion` counts right answers and chosen ones, by text where a kind has few answers, and by letter.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

from med3dvlm import evaluation
from med3dvlm.datasets.store import PreparedData
from med3dvlm.evaluation.question_scores import YES_NO, question_scores, question_tables
from med3dvlm.inference.chat import Med3DChat
from med3dvlm.inference.out_of_distribution import Features
from med3dvlm.metrics.bertscore import bert_scorer
from med3dvlm.models.vlm_processor import exchange
from med3dvlm.programs import add_flag, positive
from med3dvlm.prompts import closed_prompt
from med3dvlm.records import Question, Study, has_letters


def rank(chat: Med3DChat, questions: Sequence[Question], features: dict[str, Features]) -> dict[Question, list[float]]:
    """Return the likelihood of each choice of questions, which are ordered by study; `features` by study."""
    groups = [[question for question in questions if question.study == study] for study in dict.fromkeys(q.study for q in questions)]
    conversations = [[exchange(question.text, choice) for question in group for choice in question.choices] for group in groups]
    scenes = [features[group[0].study] for group in groups]
    likelihoods = evaluation.answer_likelihoods(chat.model, chat.processor, conversations, scenes) if groups else []
    values = chain.from_iterable(likelihoods)
    return {question: [round(next(values), 4) for _ in question.choices] for question in questions}


def questions_about(data: PreparedData, studies: Sequence[Study], split: str) -> dict[str, list[Question]]:
    """Return the questions about each of the studies.

    Raises:
        ValueError: there is none, or one has no answer.
    """
    asked: dict[str, list[Question]] = {study.id: [] for study in studies}
    for question in data.questions(split):
        if question.study in asked:
            asked[question.study].append(question)
    questions = list(chain.from_iterable(asked.values()))
    if not questions:
        raise ValueError(f"{data.root} has no questions about split {split!r}, so there is nothing to ask the model")
    if unanswered := [question for question in questions if not question.answer.strip()]:
        raise ValueError(f"{len(unanswered)} questions of {data.root} have no answer, the first is about {unanswered[0].study}")
    return asked


def main(argv: Sequence[str] | None = None) -> None:
    parser = evaluation.evaluation_parser(__doc__)
    parser.add_argument("--max-new-tokens", type=positive, default=32, help="maximum length of an answer in tokens (default: %(default)s)")
    add_flag(parser, "blind", True, "ask about an empty volume, too")
    add_flag(parser, "shuffled", True, "ask about another patient's volume, too")
    add_flag(parser, "bertscore", False, "score open answers by BERTScore, too: seconds for a hundred on a CPU")
    arguments = parser.parse_args(argv)
    data, studies = evaluation.open_data(arguments)
    asked = questions_about(data, studies, arguments.split)
    questions = [question for study in studies for question in asked[study.id]]
    predictions_file = arguments.output / "predictions.jsonl"

    def about(question: Question) -> dict[str, Any]:
        return {
            "id": question.study,
            "kind": question.kind,
            "question": question.text,
            "choices": list(question.choices),
            "answer": question.answer,
        }

    def texts_of(row: dict[str, Any]) -> list[str]:
        return [] if row["choices"] == YES_NO else ["open", "letter"] if has_letters(row["choices"]) else ["open"]

    if not arguments.score_only:
        chat = evaluation.load_chat(arguments, data)
        settings = {name: getattr(arguments, name) for name in ("max_new_tokens", "blind", "shuffled")}
        evaluation.begin(arguments, chat.model, data, **settings)
        places = evaluation.other_patients(studies) if arguments.shuffled else None
        other = {study.id: studies[place] for study, place in zip(studies, places, strict=True)} if places else {}
        known: dict[str, Study] = {study.id: study for study in studies}
        empty = chat.encode(evaluation.empty_volume(data))
        uses = {name: place for place, study in enumerate(studies) for name in (study.id, other.get(study.id, study).id)}
        order = {study.id: place for place, study in enumerate(studies)}
        features: dict[str, Features] = {}  # of the volumes that a later question needs, about them or about whom they stand in for

        def answer(batch: Sequence[Question]) -> list[dict[str, Any]]:
            names = list(dict.fromkeys(question.study for question in batch))
            for name in [name for name in features if uses[name] < order[names[0]]]:
                del features[name]
            for name in dict.fromkeys([*names, *(other[name].id for name in names if other)]):
                if name not in features:
                    features[name] = chat.encode(data.volume(known[name]).to(chat.model.device))

            def write(questions: Sequence[Question], prompts: Sequence[str]) -> dict[Question, str]:
                scenes = [features[question.study] for question in questions]
                answers = chat.answers(scenes, prompts, arguments.max_new_tokens, 4 * arguments.batch_size)
                return {question: answer.text for question, answer in zip(questions, answers, strict=True)}

            ranked = [question for question in batch if question.choices]
            others = [question for question in batch if not question.yes_no]
            lettered = [question for question in others if question.lettered]
            columns: dict[str, dict[Question, Any]] = {
                "closed": rank(chat, ranked, features),
                "blind": rank(chat, ranked, dict.fromkeys(names, empty)) if arguments.blind else {},
                "shuffled": rank(chat, ranked, {name: features[other[name].id] for name in names}) if other else {},
                "letter": write(lettered, [closed_prompt(question.text, question.choices) for question in lettered]),
                "open": write(others, [question.text for question in others]),
            }
            return [about(question) | {name: column.get(question) for name, column in columns.items()} for question in batch]

        groups = evaluation.in_batches([study for study in studies if asked[study.id]], arguments.batch_size)
        batches = [[question for study in group for question in asked[study.id]] for group in groups]
        if not evaluation.predict(predictions_file, batches, answer, about):
            return

    rows = evaluation.predictions(predictions_file, [about(question) for question in questions], texts_of)
    split = evaluation.training_split(data, arguments.split)
    train = data.questions(split) if split else []
    scorer = bert_scorer(device=arguments.device) if arguments.bertscore else None
    scores = question_scores(rows, {study.id: study.patient for study in studies}, train, scorer)
    tables = question_tables(scores)
    evaluation.write_scores(arguments.output / "scores.json", scores, tables)
    print(tables)
