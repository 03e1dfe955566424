"""States of findings, present, uncertain or absent, in sentences with a clear meaning."""

import pytest

from med3dvlm.reports.findings import FINDINGS, find_mentions, finding_states, read_findings


@pytest.mark.parametrize(
    ("text", "state"),
    [
        ("Emphysema in both lungs.", "present"),
        ("There is no emphysema.", "absent"),
        ("Emphysema was not observed.", "absent"),
        ("Possible emphysema.", "uncertain"),
        ("Findings suspicious for early emphysema.", "uncertain"),
        ("Emphysema?", "uncertain"),
        ("Emphysema (?) at the apices.", "uncertain"),
        ("Emphysema cannot be excluded.", "uncertain"),
        ("Emphysema is suspected.", "uncertain"),
        ("Emphysema is unlikely.", "uncertain"),
        ("Suspicion of emphysema.", "uncertain"),
        ("Possible emphysema. Emphysema is confirmed on the coronal images.", "present"),
        ("No emphysema. Possible emphysema at the apex.", "uncertain"),
        ("The patient may have been moving during the long examination, but there is emphysema.", "present"),  # doubt about something else
    ],
)
def test_states(text: str, state: str) -> None:
    assert finding_states(text) == {"emphysema": state}


def test_states_of_named_findings_in_the_order_of_the_text() -> None:
    states = finding_states("No pleural effusion. Cardiomegaly. Hiatal hernia may be present.")
    assert list(states.items()) == [("pleural_effusion", "absent"), ("cardiomegaly", "present"), ("hiatal_hernia", "uncertain")]
    assert finding_states("The spine is straight.") == {}
    assert finding_states("Cardiomegaly. Emphysema.", ["emphysema"]) == {"emphysema": "present"}
    with pytest.raises(ValueError, match="Unknown finding"):
        finding_states("Cardiomegaly.", ["headache"])


def test_findings_with_state_present_are_also_labels() -> None:
    for text in ("Emphysema. No nodule. Possible effusion in the pleural space.", "No ascites, gallstone or renal cyst. Splenomegaly?"):
        stated, states = read_findings(text), finding_states(text)
        assert {mention.finding for mention in find_mentions(text)} == set(states)
        assert all(stated[name] for name in FINDINGS if states.get(name) == "present")
        assert not any(stated[name] for name in FINDINGS if states.get(name) == "absent")
