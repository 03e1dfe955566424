"""Evaluate the reports that a Med3DVLM writes against the radiologist's.

    med3dvlm evaluate report --model outputs/demo/model --data outputs/demo/prepared --output outputs/demo/eval/report
    med3dvlm evaluate report --data outputs/demo/prepared --output outputs/demo/eval/report --score-only --bertscore

Lexical scores see mostly style, so scores.json has besides them `collapse` (does every scan get the same report?) and `findings`: which
ones the written report states as present, against the studies' labels (a finding that a study has no label of counts for nothing), or,
where no study has labels, against what the reference states. A finding that the rules do not know is read by the label's own words.
findings_f1 is the macro average over the findings that occur in either; CRG is left out where a label is unknown. Studies without a report
count in no lexical score. An interval is a 95 % bootstrap over patients.

Baselines that do not look at the scan, or do without this model, scored in the same way:

    blind        what the model writes about an empty volume, all air
    shuffled     what it wrote about the volume of another patient, each volume once
    modal        always the commonest training report; if no two are alike, the first of those that state the commonest set of findings
    best_fixed   always the training report whose findings, stated of every training study, have the highest macro F1 there
    nearest      with --clip: the training report whose embedding lies nearest to the volume's

They are null without a training split, or where all studies are of one patient.
"""

from collections.abc import Sequence
from typing import Any

from med3dvlm import evaluation
from med3dvlm.datasets.features import fingerprint
from med3dvlm.evaluation.report_scores import fixed_reports, report_scores, report_table
from med3dvlm.metrics.bertscore import bert_scorer
from med3dvlm.programs import add_flag, positive
from med3dvlm.prompts import REPORT_PROMPTS
from med3dvlm.records import Study

PROMPT = REPORT_PROMPTS[0]


def main(argv: Sequence[str] | None = None) -> None:
    parser = evaluation.evaluation_parser(__doc__)
    parser.add_argument("--max-new-tokens", type=positive, default=256, help="maximum length of a report in tokens (default: %(default)s)")
    parser.add_argument("--clip", help="directory of a Med3DCLIP, as stage 1 wrote it, to compare with the nearest training report")
    add_flag(parser, "blind", True, "let the model write about an empty volume, too")
    add_flag(parser, "shuffled", True, "score what it wrote about another patient, too")
    add_flag(parser, "bertscore", False, "score by BERTScore, too")
    arguments = parser.parse_args(argv)
    data, studies = evaluation.open_data(arguments)
    if not any(study.report.strip() for study in studies):
        raise ValueError(f"no study of split {arguments.split!r} in {arguments.data} has a report, so there is nothing to compare with")
    split = evaluation.training_split(data, arguments.split)
    train = [study for study in data.studies(split) if study.report.strip()] if split else []
    predictions_file = arguments.output / "predictions.jsonl"

    def about(study: Study) -> dict[str, Any]:
        return {"id": study.id, "prompt": PROMPT, "reference": study.report}

    if not arguments.score_only:
        chat = evaluation.load_chat(arguments, data)
        embedder = evaluation.load_embedder(arguments.clip, data, arguments.device) if arguments.clip else None
        settings = {"max_new_tokens": arguments.max_new_tokens, "blind": arguments.blind}
        settings |= {"clip": fingerprint(embedder.model)} if embedder else {}
        evaluation.begin(arguments, chat.model, data, prompt=PROMPT, **settings)
        extra = {}
        if arguments.blind:
            extra["blind"] = chat.answers([evaluation.empty_volume(data)], [PROMPT], arguments.max_new_tokens)[0].text
        if embedder and split and train:
            has_report = [bool(study.report.strip()) for study in data.studies(split)]
            reports = evaluation.embed_reports(embedder, data, split)[has_report]  # (training studies, P)

        def write(batch: Sequence[Study]) -> list[dict[str, Any]]:
            features = [chat.encode(data.volume(study).to(chat.model.device)) for study in batch]
            answers = chat.answers(features, [PROMPT] * len(batch), arguments.max_new_tokens, len(batch))
            rows = [about(study) | {"prediction": answer.text} | extra for study, answer in zip(batch, answers, strict=True)]
            if embedder and train:
                nearest = (evaluation.embed_volumes(embedder, data, batch) @ reports.T).argmax(dim=1).tolist()
                rows = [row | {"nearest": train[place].id} for row, place in zip(rows, nearest, strict=True)]
            return rows

        if not evaluation.predict(predictions_file, evaluation.in_batches(studies, arguments.batch_size), write, about):
            return

    rows = evaluation.predictions(predictions_file, [about(study) for study in studies], lambda row: ["prediction"])
    texts = [row["prediction"] for row in rows]
    scorer = bert_scorer(device=arguments.device) if arguments.bertscore else None
    fixed = {"blind": rows[0].get("blind"), **dict.fromkeys(("modal", "best_fixed")), **(fixed_reports(train) if train else {})}
    others = evaluation.other_patients(studies) if arguments.shuffled else None
    known = {study.id: study.report for study in train}
    scores = {"samples": len(studies), **report_scores(texts, studies, scorer)}
    for name, text in fixed.items():
        scores[name] = None if text is None else {"report": text, **report_scores([text] * len(studies), studies, scorer)}
    scores["shuffled"] = report_scores([texts[place] for place in others], studies, scorer) if others else None
    found = [known.get(row.get("nearest", ""), "") for row in rows]
    scores["nearest"] = report_scores(found, studies, scorer) if all(found) else None
    names = [name for name in ("blind", "shuffled", "modal", "best_fixed", "nearest") if scores[name]]
    table = report_table({"model": scores, **{name: scores[name] for name in names}})
    evaluation.write_scores(arguments.output / "scores.json", scores, table)
    print(table)
