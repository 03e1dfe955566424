"""Reports that a Med3DVLM writes, against the radiologist's.

    python eval/report_gen.py --model outputs/demo/model --data outputs/demo/prepared --output outputs/demo/eval/report
    python eval/report_gen.py --data outputs/demo/prepared --output outputs/demo/eval/report --score_only

Lexical scores see mostly style, so scores.json has besides them `collapse` (does every scan get the same report?) and `findings`: which
ones the written report states as present, against the studies' labels (a finding that a study has no label of counts for nothing), or,
where no study has labels, against what the reference states. findings_f1 is the macro average over the findings that occur in either,
its interval a 95 % bootstrap over patients. Two baselines, null without a training split, show what can be had without looking at the scan:

    modal        always the commonest training report; if no two are alike, the first of those that state the commonest set of findings
    best_fixed   always the training report whose findings, stated of every training study, have the highest macro F1 there
"""

from collections import Counter

import numpy as np

from med3dvlm import evaluation
from med3dvlm.metrics.classification import precision_recall_f1
from med3dvlm.metrics.findings import FINDINGS, findings_table
from med3dvlm.metrics.intervals import bootstrap_interval
from med3dvlm.metrics.text import collapse, text_scores
from med3dvlm.prompts import REPORT_PROMPTS
from med3dvlm.records import Study

PROMPT = REPORT_PROMPTS[0]


def labels_of(studies: list[Study]) -> tuple[np.ndarray, np.ndarray, list[str], str]:
    """(studies, findings) of 0 and 1, which of these are known, the findings' names, and where they come from."""
    names = [name for name in FINDINGS if any(name in study.labels for study in studies)]
    if not names:
        stated = findings_table([study.report for study in studies])
        return stated, np.ones_like(stated, dtype=bool), list(FINDINGS), "reference reports"
    known = np.array([[name in study.labels for name in names] for study in studies])
    return np.array([[study.labels.get(name, 0) for name in names] for study in studies]), known, names, "labels"


def fixed_reports(studies: list[Study]) -> dict[str, str]:
    """The two baselines' reports, from the training studies."""
    labels, known, names, _ = labels_of(studies)
    stated = findings_table([study.report for study in studies], names)
    modal, times = Counter(study.report for study in studies).most_common(1)[0]
    if times == 1:
        sets = [tuple(row) for row in stated.tolist()]
        modal = studies[sets.index(Counter(sets).most_common(1)[0][0])].report
    share = labels.sum(axis=0) / known.sum(axis=0)
    macro = (stated * 2 * share / (1 + share)).sum(axis=1)  # F1 of a finding stated of everyone: precision `share`, recall 1
    return {"modal": modal, "best_fixed": studies[int(macro.argmax())].report}


def score(texts: list[str], studies: list[Study]) -> dict:
    labels, known, names, source = labels_of(studies)
    chosen = known.any(axis=1)
    # Neither stated nor true: what is not known is in none of the sums of precision, recall and F1.
    labels, stated = labels[chosen], (findings_table(texts, names) * known)[chosen]
    findings = precision_recall_f1(labels, stated, names)

    def macro_f1(rows: np.ndarray) -> float:
        value = precision_recall_f1(labels[rows], stated[rows], names)["macro"]["f1"]
        return np.nan if value is None else value

    f1, patients = findings["macro"]["f1"], [study.patient for study, one in zip(studies, chosen, strict=True) if one]
    return {
        "findings_f1": f1,
        "findings_f1_interval": None if f1 is None else bootstrap_interval(np.arange(len(patients)), patients, statistic=macro_f1),
        "findings": {"against": source, "studies": len(patients), **findings},
        "text": text_scores(texts, [study.report for study in studies]),
        "collapse": collapse(texts),
    }


def main() -> None:
    parser = evaluation.evaluation_parser(__doc__)
    parser.add_argument(
        "--max_new_tokens", type=evaluation.positive, default=256, help="length of a report, at most (default: %(default)s)"
    )
    arguments = parser.parse_args()
    data, studies = evaluation.open_data(arguments)
    written = arguments.output / "predictions.jsonl"

    if not arguments.score_only:
        chat = evaluation.load_chat(arguments, data)
        evaluation.begin(arguments, chat.model, data, prompt=PROMPT, max_new_tokens=arguments.max_new_tokens)

        def write(batch: list[Study]) -> list[dict]:
            features = [chat.encode(data.volume(study)) for study in batch]
            answers = chat.answers(features, [PROMPT] * len(batch), arguments.max_new_tokens, len(batch))
            return [
                {
                    "id": study.id,
                    "prompt": PROMPT,
                    "reference": study.report,
                    "prediction": answer.text,
                    "seconds": round(answer.seconds, 3),
                }
                for study, answer in zip(batch, answers, strict=True)
            ]

        evaluation.predict(written, evaluation.in_batches(studies, arguments.batch_size), write, lambda study: study.id)

    texts = [row["prediction"] for row in evaluation.predictions(written, [study.id for study in studies])]
    scores = {"samples": len(studies), **score(texts, studies)}
    fixed = fixed_reports(data.studies("train")) if "train" in data.summary["splits"] else {}
    for name in ("modal", "best_fixed"):
        scores[name] = {"report": fixed[name], **score([fixed[name]] * len(studies), studies)} if fixed else None
    evaluation.write_scores(arguments.output / "scores.json", scores)
    columns = {"model": scores} | {name: scores[name] for name in fixed}
    rows = [["findings F1, macro", *(column["findings_f1"] for column in columns.values())]]
    rows += [["findings F1, micro", *(column["findings"]["micro"]["f1"] for column in columns.values())]]
    rows += [[name, *(column["text"].get(name) for column in columns.values())] for name in ("bleu1", "rouge1", "meteor")]
    rows += [["distinct reports", *(column["collapse"]["distinct"] for column in columns.values())]]
    print(evaluation.markdown_table(("score", *columns), rows))
    print(f"findings against the {scores['findings']['against']} of {scores['findings']['studies']} of {len(studies)} studies")


if __name__ == "__main__":
    evaluation.script(main)
