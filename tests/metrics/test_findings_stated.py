"""Findings in structured lines, tables, lists, negations, comparisons and uncertain statements: two lists of texts, and forms with every finding."""

from pathlib import Path

import pytest
import yaml

from med3dvlm.reports.findings import finding_states, read_findings

SIGNS = {"present": "+", "uncertain": "?", "absent": "-"}
LISTS = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(Path(__file__).parent.glob("findings_stated*.yaml"))]
TEXTS = [(text, expected) for kinds in LISTS for texts in kinds.values() for text, expected in texts.items()]
# A form of words for each finding, and forms that put it; # is a line end
NAMES = {
    "pleural_effusion": "pleural effusion",
    "pericardial_effusion": "pericardial effusion",
    "cardiomegaly": "cardiomegaly",
    "emphysema": "emphysema",
    "atelectasis": "atelectasis",
    "consolidation": "consolidation",
    "bronchiectasis": "bronchiectasis",
    "lung_nodule": "lung nodules",
    "lung_opacity": "ground-glass opacity",
    "lymphadenopathy": "lymphadenopathy",
    "hiatal_hernia": "hiatal hernia",
    "mosaic_attenuation_pattern": "mosaic attenuation",
    "ascites": "ascites",
    "hydronephrosis": "hydronephrosis",
    "gallstone": "gallstones",
    "splenomegaly": "splenomegaly",
    "renal_cyst": "renal cysts",
    "bowel_obstruction": "bowel obstruction",
    "aortic_aneurysm": "aortic aneurysm",
}
FORMS = {
    "-": """{}: None.|{}: no|{}: absent|{}: negative|{} - none|{} (-)|(-) {}|[ ] {}|{}: [ ]|{}: not seen|{}: not identified|{}: 0|{}: -|{}? No.
        no {}|No evidence of {}.|without {}|negative for {}|free of {}|{} is absent|{} was not observed|no convincing {}|absence of {}
        {} is no longer seen|{} has resolved|{} has cleared|resolution of the {}|history of {}|family history of {}|status post resection of {}
        rules out {}|{} is ruled out|The scan does not show {}.|There is no longer any {}.|1. No {}|* {}: none|NO {}|No evidence of:#- {}""",
    "+": """{}|{}: present|{}: yes|{}: small|{}: moderate, on the left|{} (+)|[x] {}|{}: [x]|{}: +|{}? Yes.|{}: unchanged|{}: no change
        CT without contrast shows {}.|A scan without IV contrast demonstrates {}.|no change in the {}|not only {}|{} without change
        {} has increased|{} has decreased|{} is smaller than before|{} is no larger|{} has not resolved|{} has partially resolved
        there is no absence of {}|not without {}|{} persists|{} which was not seen previously|no doubt about {}""",
    "?": """{} cannot be excluded|{} cannot be ruled out|suspicious for {}|possible {}|may represent {}|questionable {}|{}: possible
        {}: cannot be excluded|{} (?)|{}?|cannot exclude {}|concerning for {}|{} is suspected
        rule out {}|r/o {}|?{}|{}: equivocal|{} vs. motion|evaluate for {}""",
}


@pytest.mark.parametrize(("text", "expected"), TEXTS)
def test_text(text: str, expected: str) -> None:
    assert sorted(SIGNS[state] + name for name, state in finding_states(text).items()) == sorted(expected.split())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sign", FORMS)
def test_form(sign: str, name: str) -> None:
    forms = [form.strip() for line in FORMS[sign].splitlines() for form in line.replace("#", "\n").split("|")]
    texts = [form.format(NAMES[name].capitalize() if form.startswith("{") else NAMES[name]) for form in forms]
    wrong = [text for text in texts if SIGNS.get(finding_states(text, [name]).get(name, ""), "") != sign]
    assert not wrong


def test_uncertain_findings_count_as_absent_only_on_request_or_where_unlikely() -> None:
    for text in ("Possible emphysema.", "Emphysema: possible", "Emphysema?", "Emphysema cannot be excluded."):
        assert read_findings(text)["emphysema"], text
    for text in ("Rule out emphysema.", "Emphysema is unlikely.", "Evaluate for emphysema.", "Emphysema is questionable."):
        assert not read_findings(text)["emphysema"], text
