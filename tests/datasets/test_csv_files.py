"""CSV and JSONL tables: read as Python's csv module does, with stray quotes, missing names and other encodings."""

import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from med3dvlm.datasets.csv_files import csv_rows, json_rows, label_value

TEXTS = st.text(alphabet='ab é,;\t\n"', max_size=20)
ROWS = st.lists(st.tuples(TEXTS, TEXTS), max_size=6)


def rows(path: Path, content: str | bytes, *columns: str) -> list[dict[str, str]]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [row for _, row in csv_rows(path, columns or ("image", "report"))]


@settings(max_examples=150, deadline=None)
@given(ROWS, st.sampled_from(",;\t"), st.sampled_from(["\n", "\r\n"]), st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]), st.booleans())
def test_a_valid_table_is_read_as_pythons_csv_reads_it(
    tmp_path_factory: pytest.TempPathFactory, texts: list[tuple[str, str]], delimiter: str, end: str, encoding: str, trailing: bool
) -> None:
    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter, lineterminator=end)
    writer.writerow(["IMAGE", " Report", "other", *[""] * trailing])
    for number, row in enumerate(texts):
        writer.writerow([f"{number}.nii", *row, *["  "] * trailing])
        if trailing:
            file.write(end + delimiter * 3 + end)  # an empty line and an empty row
    path = tmp_path_factory.getbasetemp() / "valid.csv"
    found = rows(path, file.getvalue().encode(encoding))
    _, *expected = (row for row in csv.reader(io.StringIO(file.getvalue(), newline=""), delimiter=delimiter, strict=True) if any(row))
    assert [[row["image"], row["report"], row["other"]] for row in found] == [row[:3] for row in expected if row[0]]


def written(names: list[str], delimiter: str) -> str:
    reports = [
        "Normal.", '"Mass, 5 cm;\nno effusion, no ""stone"".\nHeart normal."', "Nodule of 5 mm", '"Liver, spleen, kidneys normal."', '""', "x"
    ]  # fmt: skip
    lines = [delimiter.join((name, report, f"p{name}")) for name, report in zip(names, reports, strict=True)]
    return "\n".join([delimiter.join(("image", "report", "patient")), *lines]) + "\n"


@pytest.mark.parametrize("delimiter", [",", ";"])
@pytest.mark.parametrize(
    "names",
    [
        ["a.nii.gz", "b.nii.gz", "c.nii.gz", "d.nii", "e.mha", "f.nii.gz"],
        ["s/1.mha", "s/2", "s/3", "s/4", "s/5", "s/6"],
        ["anna", "bert", "carl", "dora", "emil", "fritz"],
        ["1.2.3", "1.2.4", "2.3.4", "11.2.3", "1.22.3", "3.3.3"],
    ],
)
def test_no_stray_quote_loses_a_row(tmp_path: Path, names: list[str], delimiter: str) -> None:
    """Wherever a quote is inserted or removed, each study keeps its patient or the table is refused."""
    whole = written(names, delimiter)
    path, expected, refused = tmp_path / "table.csv", [(name, f"p{name}") for name in names], 0
    assert [(row["image"], row["patient"]) for row in rows(path, whole)] == expected
    for place in range(whole.index("\n") + 1, len(whole) + 1):
        for text in [
            whole[:place] + '"' + whole[place:],
            *([whole[:place] + whole[place + 1 :]] if whole[place : place + 1] == '"' else []),
        ]:
            try:
                found = [(row["image"].replace('"', ""), row["patient"].replace('"', "")) for row in rows(path, text)]
            except ValueError as error:
                refused += 1
                assert f"{path} line " in str(error)
            else:
                assert found == expected, text
    assert refused > 100


@pytest.mark.parametrize(
    ("body", "line", "message"),
    [
        ('a.nii,Normal,p1\nb.nii,"Mass of 3 cm,p2\nc.nii,"Normal",p3\n', 3, "a quote opens here that does not close"),
        ('a.nii,"Mass of 3 cm,p2\nb.nii,Normal,p2\n', 2, "a quote opens here that does not close"),
        ('a.nii,"The ""heart"" is\nlarge",p1\nb.nii,"Mass "left" lung",p2\n', 4, "a quote opens here that does not close"),
        ('a.nii,"One\ntwo","p1\nb.nii,x,p2\n', 3, "a quote opens here that does not close"),
        ('a.nii,"Normal,p1\nb.nii,Mass,p2\nc.nii,x\n",p3\n', 2, "the text in it holds line 3, which looks like a row of its own"),
        ('a.nii,"Normal,p1\nb.nii,",p2\n', 2, "the text in it holds line 3, which looks like a row of its own"),
        ('a.nii, "Mass, left"\n', 2, "a quote follows a space and so does not begin a quoted text; delete the space"),
        (
            'a.nii,"Mass,\nleft",p1,x\n',
            2,
            r"the row has more values than there are columns \(it goes on to line 3; is a quote not closed\?\)",
        ),
        ('a.nii,x,p1\nb.nii,"Mass,\nleft"\n', 3, r"the row ends before patient \(it goes on to line 4"),
        ("a.nii,x,p1\nb.nii,x,p2,p3\n", 3, "the row has more values than there are columns$"),
    ],
)
def test_the_line_is_named_where_a_row_or_a_quote_begins(tmp_path: Path, body: str, line: int, message: str) -> None:
    with pytest.raises(ValueError, match=rf"table.csv line {line}: .*{message}"):
        rows(tmp_path / "table.csv", "image,report,patient\n" + body)


def test_a_text_of_several_lines_may_have_as_many_commas_as_a_row(tmp_path: Path) -> None:
    report = "Lungs clear, heart normal, no effusion.\nT12/L1, L2, normal height.\n1, 2 and 3 mm, as before"
    for name in ("a.nii", "s/1", "12", "anna"):
        assert rows(tmp_path / "t.csv", f'image,report,patient\n{name},"{report}",p1\n') == [
            {"image": name, "report": report, "patient": "p1"}
        ]


def test_unnamed_columns_and_other_encodings(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    assert rows(path, ",image,report\n0,a.nii,x\n") == [{"column 1": "0", "image": "a.nii", "report": "x"}]
    for wrong in ("Müller".encode("cp1252"), "Müller".encode("latin-1")):
        with pytest.raises(ValueError, match="table.csv line 3 is not UTF-8 text; save the table as UTF-8"):
            rows(path, "image,report\na.nii,é\nb.nii,".encode() + wrong)
    with pytest.raises(ValueError, match="table.csv is not UTF-8 text; save the table as UTF-8"):
        rows(path, "image,report\na.nii,x\n".encode("utf-16-le"))
    with pytest.raises(ValueError, match=r"lacks the columns \['image', 'report'\]; it has \['image\|report'\]"):
        rows(path, "image|report\na.nii|x\n")


def test_json_lines_may_not_repeat_a_column(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"a": "\u2028é"}).encode() + b"\n\n{}\n")
    assert list(json_rows(path)) == [(f"{path} line 1", {"a": "\u2028é"}), (f"{path} line 3", {})]
    path.write_text('{"a": 1,\n')
    with pytest.raises(ValueError, match=r"table.jsonl line 1 is not valid JSON: .* at character \d+; each line must hold one object"):
        list(json_rows(path))
    path.write_text('{}\n{"a": 1, "a": 2}\n')
    with pytest.raises(ValueError, match=r"table.jsonl line 2: it has \['a'\] twice"):
        list(json_rows(path))


@pytest.mark.parametrize(
    ("text", "value"), [("0", 0), (" 1.0 ", 1), ("", None), ("nan", None), ("NA", None), ("2", ...), ("-1", ...), ("yes", ...)]
)
def test_labels_are_0_or_1_or_empty(text: str, value: object) -> None:
    if value is not ...:
        assert label_value("mass", text) == value
    else:
        with pytest.raises(ValueError, match=f"mass is '{text}' but must be 0, 1 or empty"):
            label_value("mass", text)
