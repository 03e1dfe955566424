"""The finding rules on typical sentences of reports: present, negated, listed, past and uncertain findings."""

import re
import time

import pytest
import yaml

from med3dvlm.reports.findings import (
    FINDINGS,
    FINDINGS_CT_RATE,
    RULES_FILE,
    find_mentions,
    findings_table,
    read_findings,
)

# (sentence, the findings that it states as present)
SENTENCES = [
    ("There is a 22 mm nodule in the right upper lobe.", "lung_nodule"),
    ("No pleural effusion.", ""),
    ("The lungs are clear without consolidation or nodule.", ""),
    ("Ill-defined hypodense mass in the right lobe of the liver", "liver_mass"),
    ("simple cyst of the left kidney, upper pole", "renal_cyst"),
    ("free fluid around the liver consistent with ascites", "ascites"),
    ("heart size is enlarged", "cardiomegaly"),
    ("pleural spaces are free of fluid", ""),
    ("The heart is enlarged.", "cardiomegaly"),
    ("The heart is not enlarged.", ""),
    ("Heart size is normal.", ""),
    ("There is a small right pleural effusion.", "pleural_effusion"),
    ("Fluid in the left pleural space.", "pleural_effusion"),
    ("Right-sided effusion layering posteriorly.", "pleural_effusion"),
    ("Pericardial effusion is present. No pleural effusion.", "pericardial_effusion"),
    ("Fluid surrounding the heart.", "pericardial_effusion"),
    ("Patchy ground-glass opacity in the left lower lobe.", "lung_opacity"),
    ("Dense consolidation in the right middle lobe with air bronchograms.", "consolidation"),
    ("A stone of 6 mm in the left kidney.", "kidney_stone"),
    ("Right renal calculus, 5 mm.", "kidney_stone"),
    ("No renal calculi.", ""),
    ("Gallstone in the gallbladder.", "gallstone"),
    ("The gallbladder contains a 12 mm calculus.", "gallstone"),
    ("Spleen is enlarged, 16 cm.", "splenomegaly"),
    ("The spleen is not enlarged.", ""),
    ("Infrarenal abdominal aortic aneurysm of 45 mm.", "aortic_aneurysm"),
    ("Aorta is of normal calibre without aneurysm.", ""),
    ("Dilated small bowel loops, in keeping with obstruction.", "bowel_obstruction"),
    ("Left hydronephrosis.", "hydronephrosis"),
    ("Dilatation of the right renal collecting system.", "hydronephrosis"),
    ("Hypodense mass in the pancreatic head.", "pancreatic_mass"),
    ("No mass in the liver, pancreas or spleen.", ""),
    ("The liver, spleen and pancreas are unremarkable. No free fluid.", ""),
    ("Wall calcifications of the thoracic aorta.", "arterial_wall_calcification"),
    ("Calcified plaque in the coronary arteries.", "coronary_artery_wall_calcification"),
    ("Calcified plaques in the aorta and coronary arteries.", "arterial_wall_calcification coronary_artery_wall_calcification"),
    ("Calcified lymph nodes in the aortopulmonary window.", "lymphadenopathy"),
    ("Small mediastinal lymph nodes, 5 mm.", "lymphadenopathy"),
    ("Nothing pathological was detected in the mediastinal lymph node stations.", ""),
    ("Fibroatelectasis in the middle lobe.", "pulmonary_fibrotic_sequela"),
    ("Pleuroparenchymal sequelae density increases in both apices.", "pulmonary_fibrotic_sequela"),
    ("Patchy density increases in the right lung.", "lung_opacity"),
    ("Pneumonic infiltration in the left lower lobe.", ""),
    ("Crazy paving in the right upper lobe.", ""),
    ("Hypodense nodules in the left thyroid lobe.", ""),
    ("Traction bronchiectasis and septal thickening at the bases.", "bronchiectasis interlobular_septal_thickening"),
    ("An effusion of 12 mm was seen in the deepest part of the pericardial sac.", "pericardial_effusion"),
    ("Ascites - no hydronephrosis was found.", ""),
    ("Consolidation-nodule not found.", ""),
    ("Fluid around the left kidney.", ""),
    ("The nodule, which was observed in the previous examination, was not seen in the current one.", ""),
    ("The catheter that was seen in the previous CT was removed.", ""),
    ("The consolidation of March shows complete regression.", ""),
    ("The nodule that was seen in the previous CT is of the same size.", "lung_nodule"),
    ("Nodule (granuloma?) in the right lung was not seen in the current scan.", ""),
    ("A nodule in the right lung that was not seen in the previous examination.", "lung_nodule"),
    ("Findings may be compatible with emphysema.", "emphysema"),
    ("Bronchiectasis (?) in the lingula.", "bronchiectasis"),
    ("Hiatal hernia.", "hiatal_hernia"),
    ("A pacemaker lead is seen.", "medical_material"),
    ("Central venous catheter in place.", "medical_material"),
    ("Enlarged mediastinal lymph node, 18 mm.", "lymphadenopathy"),
    ("No enlarged lymph nodes.", ""),
    ("Mediastinal lymph nodes are not enlarged.", ""),
    ("Centrilobular emphysema in both upper lobes.", "emphysema"),
    ("Band-like atelectasis at the left base.", "atelectasis"),
    ("History of kidney stone. No hydronephrosis.", ""),
    ("The previously described nodule has resolved.", ""),
    ("No pleural effusion, but a 5 mm nodule in the left lower lobe.", "lung_nodule"),
    ("No effusion, consolidation or nodule is seen; however, there is mild cardiomegaly.", "cardiomegaly"),
    ("Pleural effusion and consolidation were not observed.", ""),
    ("5.5 mm nodule in the right lung, no effusion.", "lung_nodule"),
    ("Neither ascites nor hydronephrosis.", ""),
    ("Ascites is absent.", ""),
    ("A hypodense lesion of 30 mm is seen in segment VI of the liver.", "liver_mass"),
    ("Cyst in the lower pole of the right kidney, 32 mm.", "renal_cyst"),
    ("Both kidneys are normal without stone or cyst.", ""),
    ("Gallbladder without stones.", ""),
    ("There is fluid in both pleural cavities.", "pleural_effusion"),
    ("There is no fluid in the pleural cavities or around the heart.", ""),
    ("Pulmonary nodule of 9 mm, left upper lobe. Liver is normal.", "lung_nodule"),
    ("Nodule, left lower lobe, 12 mm; liver mass, right lobe, 40 mm.", "liver_mass lung_nodule"),
    ("Findings: a rounded mass in the liver; the lungs show no nodule.", "liver_mass"),
    ("Cardiomegaly is present with a pericardial effusion.", "cardiomegaly pericardial_effusion"),
    ("The cardiac silhouette is enlarged.", "cardiomegaly"),
    ("Cardiothoracic ratio is increased.", "cardiomegaly"),
    ("Free fluid in the abdomen.", "ascites"),
    ("Perihepatic free fluid.", "ascites"),
    ("No ascites or free fluid.", ""),
    ("Large volume ascites with pleural effusion on the right.", "ascites pleural_effusion"),
    ("Stone in the gallbladder; no kidney stone.", "gallstone"),
    ("Calculus in the right kidney and gallstone.", "gallstone kidney_stone"),
    ("No focal liver lesion.", ""),
    ("No evidence of a renal or liver mass.", ""),
    ("Consolidation of the right lower lobe could not be excluded.", "consolidation"),
    ("Emphysema cannot be seen.", ""),
    ("Nodule is not seen in the lung.", ""),
    ("There are no nodules, and the heart is enlarged.", "cardiomegaly"),
    ("The lungs are clear. The heart is of normal size. The pleural spaces are clear of fluid.", ""),
    ("The abdominal aorta is dilated to 48 mm.", "aortic_aneurysm"),
    ("The abdominal aorta is aneurysmal.", "aortic_aneurysm"),
    ("Hepatic mass measuring 35 mm", "liver_mass"),
    ("The urinary tract is not dilated.", ""),
    ("The renal pelvis is dilated on the left.", "hydronephrosis"),
    ("Surgical clips in the upper abdomen", "medical_material"),
    ("The left lower lobe contains a solid nodule and ground glass.", "lung_nodule lung_opacity"),
    ("Mediastinal lymph nodes are of normal size.", ""),
    ("Lymph nodes are within normal limits; a large hiatal hernia.", "hiatal_hernia"),
    (
        "Mosaic attenuation pattern with air trapping, peribronchial thickening and bronchiectasis.",
        "bronchiectasis mosaic_attenuation_pattern peribronchial_thickening",
    ),
    ("Interlobular septal thickening without pleural effusion.", "interlobular_septal_thickening"),
    ("Fibrotic sequela changes at both apices.", "pulmonary_fibrotic_sequela"),
]


@pytest.mark.parametrize(("sentence", "expected"), SENTENCES)
def test_sentence(sentence: str, expected: str) -> None:
    present = {name for name, stated in read_findings(sentence).items() if stated}
    assert present == set(expected.split()), find_mentions(sentence)


def test_a_report_is_the_union_of_its_sentences() -> None:
    """All sentences above form one report; a negation must not reach the next sentence."""
    report = " ".join(sentence.rstrip(".") + "." for sentence, _ in SENTENCES)
    stated = {name for _, names in SENTENCES for name in names.split()}
    assert {name for name, present in read_findings(report).items() if present} == stated


def test_one_present_mention_is_enough() -> None:
    assert read_findings("No nodule in the left lung. Nodule in the right lung.", ["lung_nodule"]) == {"lung_nodule": True}


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ("Clinical information: known emphysema. Findings: A nodule in the right lung.", "lung_nodule"),
        ("Indication: pleural effusion?\nThe lungs are clear.", ""),
        ("INDICATION: Cough. Pleural effusion.\n\nFINDINGS: Emphysema.\nIMPRESSION: Hiatal hernia.", "emphysema hiatal_hernia"),
        ("Comparison: CT with a nodule of 5 mm. Atelectasis at the left base.", "atelectasis"),
        ("History: emphysema.\n\nFindings: no nodule. Impression: emphysema.", "emphysema"),
        ("A finding of note: emphysema.", "emphysema"),
    ],
)
def test_sections_with_the_clinical_question_are_not_read(report: str, expected: str) -> None:
    assert {name for name, stated in read_findings(report).items() if stated} == set(expected.split())


def test_reading_does_not_depend_on_other_reports() -> None:
    """Neither the cache of sentences nor the choice of names may change a result."""
    for sentence, expected in SENTENCES:
        for name in FINDINGS:
            assert read_findings(sentence, [name]) == {name: name in expected.split()}


def test_long_and_odd_texts_are_read_quickly() -> None:
    """4,000 words without a period, many headings and other scripts take seconds."""
    words = "heart lung pleural pericardial effusion enlarged no thickening of the bronchial wall nodule " * 300
    started = time.perf_counter()
    assert read_findings(f"{words}. Emphysema.")["emphysema"]
    assert read_findings("Indication: cough. " * 1000 + "Findings: Emphysema.")["emphysema"]
    assert not any(read_findings("\u80ba\u7ed3\u8282 \u0130\u0131 \x00 ???").values())
    for run in ("-", "a-", " ", "effusion: ", "| ", "[ ] ", "? ", "left 1 ", "history of ", "Emphysema\tnone\n"):
        read_findings(f"Heart {run * 2000}x")
    assert time.perf_counter() - started < 20  # measured 0.7 s on one busy core


def test_mentions_have_a_state_and_a_cue() -> None:
    present, negated = find_mentions("5.5 mm nodule in the right lung. No pleural effusion.")
    assert (present.finding, present.phrase, present.present, present.cue) == ("lung_nodule", "nodule", True, None)
    assert (negated.finding, negated.present, negated.cue) == ("pleural_effusion", False, "No")
    assert negated.sentence == "No pleural effusion"
    assert (present.state, negated.state) == ("present", "absent")


def test_mentions_have_their_position() -> None:
    """In tables, below headings and among unusual characters, `start` is the position of the phrase in the given report."""
    report = "INDICATION: emphysema?\r\nFINDINGS:\r\n\u2022 No pleural\u00a0effusion\r\n| Ascites | none |\r\nAtelectasis \u2013 small"
    mentions = find_mentions(report)
    assert [mention.finding for mention in mentions] == ["pleural_effusion", "ascites", "atelectasis"]
    for mention in mentions:
        assert report[mention.start :].startswith(mention.phrase)


def test_names_and_order() -> None:
    assert len(FINDINGS_CT_RATE) == 18 and len(FINDINGS) == 28 and FINDINGS[:18] == FINDINGS_CT_RATE
    assert list(read_findings("")) == list(FINDINGS)
    table = findings_table(["Ascites.", "No ascites. Gallstone."], ["gallstone", "ascites", "cardiomegaly"])
    assert table.tolist() == [[0, 1, 0], [1, 0, 0]]
    assert findings_table([], ["ascites"]).shape == (0, 1)
    with pytest.raises(ValueError, match="Unknown finding 'nodules'.*lung_nodule"):
        read_findings("text", ["nodules"])


def test_case_hyphens_and_line_breaks_do_not_matter() -> None:
    assert read_findings("LUNG NODULE; GROUND-GLASS\nopacity", ["lung_nodule", "lung_opacity"]) == {
        "lung_nodule": True,
        "lung_opacity": True,
    }


def test_rules_are_complete_and_use_only_the_explained_notation() -> None:
    rules = yaml.safe_load(RULES_FILE.read_text(encoding="utf-8"))
    assert set(rules) == {"sections", "unread", "answers", "cues", "pseudo", "stops", "aside", "findings"}
    for name, rule in rules["findings"].items():
        assert rule["phrases"] and set(rule) <= {"phrases", "context", "unless", "ordinary", "structures", "names"}, name
        for phrase in sum(rule.values(), []):
            assert phrase == phrase.strip() and re.fullmatch(r"[a-z0-9 ,()|?*.<!+^=:\[\]-]+", phrase), (name, phrase)
