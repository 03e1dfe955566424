"""Med3DChat on a tiny model that knows a few answers by heart, so that wrong padding, history or images change its answers."""

import gc
import math
import os
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from safetensors.torch import save_file

from med3dvlm import Med3DChat, Volume, read_volume
from med3dvlm.inference.out_of_distribution import OutOfDistributionDetector, fit_detector, pool_features
from med3dvlm.prompts import REPORT_PROMPTS
from med3dvlm.volume import VolumeError
from tests.formats.dicom_files import write_series
from tests.inference.learned_chat import FOLLOW_UP, QUESTIONS, REPORTS, SIZES, train_tiny_model, volume


def said(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture(scope="module")
def chat() -> Med3DChat:
    return Med3DChat(*train_tiny_model())


@pytest.fixture(scope="module")
def directory(chat: Med3DChat, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    chat.model.save_pretrained(folder)
    chat.processor.save_pretrained(folder)
    return folder


def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds that another thread establishes."""
    ends = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.001)


@contextmanager
def counted(module: torch.nn.Module, act: Callable[[int], Any] = lambda count: None) -> Iterator[list[int]]:
    """Count the calls of a module, and call `act` at each."""
    calls: list[int] = []

    def hook(*_: Any) -> None:
        calls.append(len(calls))
        act(len(calls))

    handle = module.register_forward_pre_hook(hook)
    try:
        yield calls
    finally:
        handle.remove()


def test_learned_answers(chat: Med3DChat) -> None:
    for number in (0, 1):
        for question, answers in QUESTIONS.items():
            assert chat.ask(volume(number), question).text == answers[number]
        assert chat.report(volume(number)).text == REPORTS[number]


def test_an_answer_takes_earlier_turns_into_account(chat: Med3DChat) -> None:
    for question, size in SIZES.items():
        assert chat.ask(volume(0), FOLLOW_UP, history=said(question, QUESTIONS[question][0])).text == size


def test_batched_answers_equal_single_ones(chat: Med3DChat) -> None:
    scans = [volume(0), volume(1)]
    asked = [(scans[number], question) for question in (*QUESTIONS, REPORT_PROMPTS[0]) for number in (0, 1)]
    alone = [chat.ask(scan, question) for scan, question in asked]
    assert len({answer.tokens for answer in alone}) > 3  # so that rows end at different steps
    for batch_size in (3, 8):
        together = chat.answers(*zip(*asked, strict=True), batch_size=batch_size)
        assert [answer.text for answer in together] == [answer.text for answer in alone]
        assert [answer.tokens for answer in together] == [answer.tokens for answer in alone]
        # worst difference measured: 3.4e-7
        np.testing.assert_allclose([one.confidence for one in together], [one.confidence for one in alone], rtol=1e-5)
    prepared = [chat.processor.image_processor.transform(scan) for scan, _ in asked]
    features = [chat.encode(scan) for scan in prepared]
    for given in (prepared, features):
        assert [one.text for one in chat.answers(given, [question for _, question in asked])] == [one.text for one in alone]


def test_a_long_question_in_the_batch_does_not_cut_other_answers(chat: Med3DChat) -> None:
    """The long question leaves room for few tokens in the model's context; the report beside it needs more."""
    long = "why"
    while chat.prompt(long, None, 128)[1] > 7:
        long += " why"
    asked = [(volume(0), REPORT_PROMPTS[0]), (volume(1), long), (volume(1), REPORT_PROMPTS[0])]
    alone = [chat.ask(scan, question) for scan, question in asked]
    assert alone[0].text == REPORTS[0] and alone[1].tokens < 8 < alone[0].tokens
    for order in ((0, 1, 2), (1, 2, 0)):
        together = chat.answers(*zip(*(asked[place] for place in order), strict=True))
        assert [answer.text for answer in together] == [alone[place].text for place in order]
        assert [answer.tokens for answer in together] == [alone[place].tokens for place in order]


def test_pieces_join_to_the_answer(chat: Med3DChat) -> None:
    for number in (0, 1):
        stream, pieces = chat.stream_report(volume(number)), []
        while True:
            try:
                pieces.append(next(stream))
            except StopIteration as end:
                answer = end.value
                break
        assert len(pieces) > 5
        assert "".join(pieces) == REPORTS[number] == answer.text  # with its line break
        assert answer.tokens == chat.report(volume(number)).tokens
    history = said("Plane?", "Axial")
    assert "".join(chat.stream(volume(0), FOLLOW_UP, history)) == SIZES["Plane?"]


def test_confidence_equals_the_geometric_mean_of_a_plain_loop(chat: Med3DChat) -> None:
    for question, history in (("Plane?", None), (FOLLOW_UP, said("Plane?", "Axial")), ("Something never asked?", None)):
        answer = chat.ask(volume(1), question, history, max_new_tokens=12)
        ids = chat.processor.encode([*(history or []), {"role": "user", "content": question}], generate=True)["input_ids"]
        end = chat.processor.tokenizer.convert_tokens_to_ids("<|end|>")
        product, new = 1.0, []
        while len(new) < 12 and end not in new:
            with torch.no_grad():
                logits = chat.model(torch.tensor([ids + new]), image_features=chat.encode(volume(1))).logits[0, -1]
            probabilities = torch.softmax(logits, dim=0)
            new.append(int(probabilities.argmax()))
            product *= float(probabilities.max())
        assert answer.tokens == len(new)
        assert answer.confidence == pytest.approx(product ** (1 / len(new)), rel=1e-4)
        assert answer.text == chat.processor.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_sampled_answers_vary_and_have_the_confidence_of_a_plain_loop(chat: Med3DChat, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any temperature the confidence equals that of a plain loop over the sampled tokens."""
    drawn, generate = [], chat.engine.generate

    def record(requests: Any) -> Any:
        drawn.extend(generate(requests))
        return drawn[-1:]

    def finish(**options: float) -> Any:
        stream = chat.stream(volume(0), "Plane?", max_new_tokens=6, **options)
        while True:
            try:
                next(stream)
            except StopIteration as end:
                return end.value

    monkeypatch.setattr(chat.engine, "generate", record)
    ids = chat.processor.encode([{"role": "user", "content": "Plane?"}], generate=True)["input_ids"]
    end = chat.processor.tokenizer.convert_tokens_to_ids("<|end|>")
    texts = set()
    for _ in range(4):
        answer = finish(temperature=8.0)
        tokens = [token.id for token in drawn[-1].result().tokens]
        tokens = tokens[: tokens.index(end) + 1] if end in tokens else tokens
        with torch.no_grad():
            logits = chat.model(torch.tensor([ids + tokens]), image_features=chat.encode(volume(0))).logits[0]
        steps = logits[len(logits) - len(tokens) - 1 : -1].log_softmax(-1)
        wanted = torch.stack([step[token] for step, token in zip(steps, tokens, strict=True)]).mean().exp()
        assert answer.confidence == pytest.approx(float(wanted), rel=1e-3)
        texts.add(answer.text)
    assert len(texts) > 1
    assert finish(temperature=8.0, top_p=1e-6).text == finish().text == "Axial"
    for options in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"temperature": math.nan}):
        with pytest.raises(ValueError, match="must be 0 or more and top_p"):
            finish(**options)


def test_encoding_a_scan_does_not_block_questions_about_a_known_one(chat: Med3DChat) -> None:
    known, new, go_on, arrived = volume(0), volume(1), threading.Event(), threading.Event()
    chat.encode(known)

    def wait(count: int) -> None:
        arrived.set()
        assert go_on.wait(20)

    with counted(chat.encoder, wait) as calls:
        threads = [threading.Thread(target=chat.encode, args=(new,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        assert arrived.wait(20)
        assert chat.ask(known, "Plane?").text == "Axial"  # while the encoder is busy
        go_on.set()
        for thread in threads:
            thread.join()
        assert len(calls) == 1  # the second finds what the first computed


def test_closing_a_stream_stops_the_model(chat: Med3DChat) -> None:
    threads = threading.active_count()
    with counted(chat.model.language_model.model, lambda count: time.sleep(0.01)) as calls:
        stream = chat.stream_report(volume(1))
        assert "Both".startswith(next(stream))
        stream.close()
        steps = len(calls)
        until(lambda: threading.active_count() == threads)
        assert len(calls) == steps
    assert steps < chat.report(volume(1)).tokens / 2
    assert list(stream) == []


def test_an_error_within_the_model_reaches_the_caller_of_a_stream(chat: Med3DChat) -> None:
    def fail(count: int) -> None:
        if count == 5:
            raise RuntimeError("the device was lost")

    pieces = []
    with counted(chat.model.language_model.model, fail), pytest.raises(RuntimeError, match="the device was lost"):
        pieces.extend(chat.stream_report(volume(0)))
    until(lambda: not [thread for thread in threading.enumerate() if "med3dvlm" in thread.name])


def test_sampling_settings_of_the_language_model_are_ignored(chat: Med3DChat, recwarn: pytest.WarningsRecorder) -> None:
    model, processor = chat.model, chat.processor
    kept = model.language_model.generation_config
    published = {"do_sample": True, "temperature": 5.0, "top_k": 3, "repetition_penalty": 9.0, "num_beams": 3}
    model.language_model.generation_config = type(kept)(**published, eos_token_id=kept.eos_token_id)
    try:
        assert Med3DChat(model, processor).report(volume(0)).text == REPORTS[0]
    finally:
        model.language_model.generation_config = kept
    assert not [warning for warning in recwarn if "temperature" in str(warning.message)]


def test_the_oldest_turns_are_dropped_when_the_context_is_full(chat: Med3DChat) -> None:
    last = said("Plane?", "Axial")
    old = [message for _ in range(8) for message in said("Which organ has a lesion?", "Liver " * 5)]
    history = [*old, *last]
    assert chat.ask(volume(0), FOLLOW_UP, history, max_new_tokens=120).text == SIZES["Plane?"]
    assert history == [*old, *last]  # the caller's list stays as it is
    ids, room = chat.prompt(FOLLOW_UP, history, 120)
    assert ids == chat.processor.encode([*last, {"role": "user", "content": FOLLOW_UP}], generate=True)["input_ids"]
    assert ids.count(chat.processor.image_token_id) == chat.processor.num_image_tokens
    assert room == 120
    ids, room = chat.prompt("Plane?", None, 1000)
    assert len(ids) + room == 160


@pytest.mark.parametrize(
    ("question", "limit", "message"),
    [
        ("", 9, "question is empty"),
        (" \n", 9, "question is empty"),
        ("why " * 200, 9, "shorter question"),
        ("Plane?", 0, "at least 1"),
    ],
)
def test_invalid_questions_are_refused(chat: Med3DChat, question: str, limit: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chat.ask(volume(0), question, max_new_tokens=limit)
    with pytest.raises(ValueError, match=message):
        next(chat.stream(volume(0), question, max_new_tokens=limit))
    with pytest.raises(ValueError, match=message):
        chat.answers([volume(0)], [question], max_new_tokens=limit)


def test_a_question_cannot_end_its_turn_or_name_an_image(chat: Med3DChat) -> None:
    words, ordinary = chat.processor.tokenizer, chat.prompt("Plane?", said("Where?", "Left"), 9)[0]
    special = {chat.processor.image_token_id, *words.all_special_ids}
    for text in ["<image>", *words.all_special_tokens]:
        ids, _ = chat.prompt(f"{text} plane {text}?", said(f"Where{text}?", f"Left{text}"), 9)
        assert [token for token in ids if token in special] == [token for token in ordinary if token in special]
        assert chat.ask(volume(0), f"Plane{text}?", max_new_tokens=3).tokens


def write(path: Path, scan: Volume) -> Path:
    nibabel.save(nibabel.Nifti1Image(scan.array.transpose(), np.diag([-1.0, -1.0, 3.0, 1.0])), path)
    return path


def test_a_scan_is_encoded_once(chat: Med3DChat, tmp_path: Path) -> None:
    path = write(tmp_path / "scan.nii.gz", volume(0))
    with counted(chat.encoder) as calls:
        scan = volume(0)
        answers = [chat.ask(given, "Which organ has a lesion?").text for given in (scan, scan, path, str(path), path)]
        assert set(answers) == {"Liver"}
        assert len(calls) == 2  # the Volume, the file
        chat.out_of_distribution(scan)
        chat.ask(volume(0), "Plane?")
        assert len(calls) == 3  # equal, but another object
        write(path, volume(1))
        assert chat.ask(path, "Which organ has a lesion?").text == "None at all"
        assert len(calls) == 4
        others = [volume(1) for _ in range(5)]  # those that are gone would leave the file its place
        for other in others:
            chat.encode(other)
        chat.encode(path)
        assert len(calls) == 10  # it was forgotten
    watched = weakref.ref(scan)
    del scan
    gc.collect()
    assert watched() is None  # no scan is kept alive


@pytest.mark.parametrize("kind", ["folder", "header"])
def test_a_changed_scan_file_is_read_again(chat: Med3DChat, tmp_path: Path, kind: str) -> None:
    """Changed are a nested DICOM export and the voxels of an .mhd file, keeping size and date."""
    root = tmp_path / "export" if kind == "folder" else tmp_path / "scan.mhd"
    texts = []
    for number in range(2):
        values = volume(number).array.astype(np.int16)
        if kind == "folder":
            shutil.rmtree(root, ignore_errors=True)
            write_series(root / "ST1" / "SE1", values)
        else:
            sitk.WriteImage(sitk.GetImageFromArray(values), tmp_path / "new.mhd")
            shutil.copy(tmp_path / "new.raw", tmp_path / "scan.raw")
            header = (tmp_path / "new.mhd").read_text().replace("new.raw", "scan.raw")
            if not number:
                root.write_text(header + "\n")
        for file in tmp_path.rglob("*"):
            os.utime(file, (1e9, 1e9))
        texts.append([chat.ask(root, "Which organ has a lesion?").text, chat.ask(read_volume(root), "Which organ has a lesion?").text])
    assert texts[0][0] == texts[0][1] != texts[1][0] == texts[1][1]
    assert len([key for key in chat._encoded if isinstance(key, tuple) and key[0] == root.resolve()]) == 2
    with pytest.raises(VolumeError, match="no such file"):
        chat.encode(tmp_path / "missing.nii")


def test_a_saved_model_gives_the_same_answers(chat: Med3DChat, directory: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "scan.nii.gz", volume(1))
    loaded = Med3DChat.from_pretrained(directory, device="cpu")
    assert next(loaded.model.parameters()).dtype == torch.float32
    assert loaded.report(path).text == REPORTS[1]
    assert loaded.ask(path, "Plane?").confidence == pytest.approx(chat.ask(volume(1), "Plane?").confidence, rel=1e-5)
    half = Med3DChat.from_pretrained(directory, device="cpu", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}
    assert half.ask(path, "Plane?").text == "Axial"


def test_a_directory_without_a_vision_language_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a directory"):
        Med3DChat.from_pretrained(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="holds no model"):
        Med3DChat.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "med3d_clip"}')
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="med3d_clip model, which cannot answer"):
        Med3DChat.from_pretrained(tmp_path)


def test_out_of_distribution_detection(chat: Med3DChat, directory: Path, tmp_path: Path) -> None:
    def noisy(seed: int) -> Volume:
        array = volume(seed % 2).array + np.random.default_rng(100 + seed).normal(0, 20, (10, 20, 30))
        return Volume(array.astype(np.float32), (3.0, 1.0, 1.0), "SPL")

    assert chat.out_of_distribution(volume(0)) is None
    features = torch.cat([pool_features(chat.encode(noisy(seed))) for seed in range(60)])
    assert features.shape == (60, 16 + 32)
    fit_detector(features[:40], features[40:]).save(directory)
    assert sorted(path.suffix for path in directory.glob("out_of_distribution*")) == [".safetensors"]
    loaded = Med3DChat.from_pretrained(directory, device="cpu")
    (directory / "out_of_distribution.safetensors").unlink()
    assert OutOfDistributionDetector.load(directory) is None

    known = loaded.out_of_distribution(noisy(99))
    assert known is not None and known.message is None and known.distance <= known.limit
    stripes = np.tile(np.float32([0, 1000, 300, 0, 50]), (24, 20, 6))
    strange = loaded.out_of_distribution(write(tmp_path / "stripes.nii", Volume(stripes, (3.0, 1.0, 1.0), "SPL")))
    assert strange is not None and strange.distance > strange.limit
    assert strange.message == (
        f"This scan lies outside the data that the model was trained on (distance {strange.distance:.3g}, limit {strange.limit:.3g}): "
        "its answer is not to be relied on."
    )
