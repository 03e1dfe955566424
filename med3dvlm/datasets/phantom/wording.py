"""The report of a phantom and the questions about it."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from importlib.resources import files

import numpy as np
import yaml

from med3dvlm.datasets.phantom.body import PHASES, Body
from med3dvlm.datasets.phantom.canvas import PLANES
from med3dvlm.datasets.phantom.places import COUNTS
from med3dvlm.records import Question

KINDS: dict[str, dict] = yaml.safe_load(files(__package__).joinpath("findings.yaml").read_text(encoding="utf-8-sig"))  # type: ignore[type-arg]

TECHNIQUE = (
    "{Plane} CT of the {region}, {phase}.",
    "CT of the {region} in the {plane} plane, {phase}.",
    "{Plane} {region} CT: {phase}.",
)
PHASE_WORDS = {
    "non-contrast": ("without contrast", "non-contrast"),
    "arterial phase": ("arterial phase", "in the arterial phase"),
    "portal venous phase": ("portal venous phase", "in the portal venous phase"),
    "delayed phase": ("delayed phase", "in the delayed phase"),
}
ABSENT = ("No {} or {}.", "There is no {} or {}.", "Without {} or {}.")
ASKED = {
    "plane": ("Which plane is this scan?", "What is the imaging plane?"),
    "phase": ("Which contrast phase is this?", "What is the phase of contrast?"),
    "organ": ("Which organ is abnormal?", "Which organ shows an abnormality?"),
    "abnormality": ("What abnormality is seen?", "Which abnormality does the scan show?"),
    "location": ("Where is the {name}?", "What is the location of the {name}?"),
    "yes_no": ("Is there a {name}?", "Does the scan show a {name}?"),
}


def kinds_of(region: str) -> list[str]:
    return [kind for kind, facts in KINDS.items() if facts["region"] == region]


def write_report(body: Body, plane: str, phase: str, random: np.random.Generator) -> str:
    """Write technique, every finding, then two to four findings that are absent."""
    technique = str(random.choice(TECHNIQUE)).format(
        Plane=plane.capitalize(), plane=plane, region=body.region, phase=random.choice(PHASE_WORDS[phase])
    )
    kinds = kinds_of(body.region)
    present = sorted(body.findings, key=lambda finding: kinds.index(finding.kind))
    sentences = [
        str(random.choice(KINDS[finding.kind]["present"])).format(place=finding.place, size=finding.size_mm, count=COUNTS[finding.count])
        for finding in present
    ]
    missing = [KINDS[kind]["name"] for kind in kinds if kind not in {finding.kind for finding in present}]
    *listed, last = random.permutation(missing)[: random.integers(2, 5)]
    return " ".join([technique, *sentences, str(random.choice(ABSENT)).format(", ".join(listed), last)])


class Questioner:
    """Asks about one study after another and keeps the answers balanced, so that nothing can be guessed from the text.

    The answer is the one given least so far among those that fit the study. A wrong choice is drawn as often as it is right elsewhere:
    then four choices say nothing about which of them is the answer.
    """

    def __init__(self, random: np.random.Generator) -> None:
        self.random = random
        self.given: dict[str, Counter[str]] = defaultdict(Counter)

    def ask(self, study: str, body: Body, plane: str, phase: str) -> list[Question]:
        """Return the study's questions: of each kind that has an answer one, of location one for every finding, and yes/no questions."""
        present = {finding.kind: finding for finding in body.findings}
        questions = []
        # More scans are axial; asking about the plane of each would make "axial" the answer to guess.
        others = [self.given["plane"][name] for name in PLANES if name != plane]
        if self.given["plane"][plane] <= min(others):
            questions.append(self._closed(study, "plane", "plane", [plane], PLANES))
        questions.append(self._closed(study, "phase", "phase", [phase], PHASES))
        if present:
            questions.append(self._closed(study, "organ", "organ", [KINDS[kind]["organ"] for kind in present], ORGANS))
            questions.append(self._closed(study, "abnormality", "abnormality", [KINDS[kind]["name"] for kind in present], NAMES))
            for kind, finding in present.items():
                facts = KINDS[kind]
                if len(facts["places"]) == 4:
                    questions.append(self._closed(study, "location", kind, [finding.place], facts["places"], name=facts["name"]))
            missing = [kind for kind in kinds_of(body.region) if kind not in present]
            for answer, kind in self._yes_no(sorted(present), missing):
                self.given[answer.lower()][kind] += 1
                questions.append(Question(study, "abnormality", self._text("yes_no", KINDS[kind]["name"]), ("Yes", "No"), answer))
        return questions

    def _yes_no(self, present: Sequence[str], missing: Sequence[str]) -> list[tuple[str, str]]:
        """Return answers and kinds of finding: as many that are there as are not, for each kind as often one as the other over the studies."""
        count = min(len(present), len(missing))
        there = sorted(self.random.permutation(present).tolist(), key=lambda kind: self.given["yes"][kind])
        not_there = sorted(self.random.permutation(missing).tolist(), key=lambda kind: self.given["no"][kind] - self.given["yes"][kind])
        return [("Yes", kind) for kind in there[:count]] + [("No", kind) for kind in not_there[:count]]

    def _closed(self, study: str, kind: str, ledger: str, right: Sequence[str], known: Sequence[str], name: str = "") -> Question:
        answer = min(self.random.permutation(sorted(set(right))), key=lambda text: self.given[ledger][text])
        self.given[ledger][answer] += 1
        others = [text for text in known if text not in right]
        weights = np.array([1.0 + self.given[ledger][text] for text in others])
        wrong = self.random.choice(others, size=3, replace=False, p=weights / weights.sum())
        choices = tuple(str(text).capitalize() for text in self.random.permutation([answer, *wrong]))
        return Question(study, kind, self._text(kind, name), choices, str(answer).capitalize())

    def _text(self, kind: str, name: str) -> str:
        return str(self.random.choice(ASKED[kind])).format(name=name)


ORGANS = sorted({facts["organ"] for facts in KINDS.values()})
NAMES = sorted(facts["name"] for facts in KINDS.values())
