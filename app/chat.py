"""Chat with a model about one's own scan, in the browser, on this machine only.

    python app/chat.py --model outputs/demo/model
    python app/chat.py --model outputs/demo/model --port 8080

Nothing leaves the machine: the server listens on 127.0.0.1, the page fetches nothing from elsewhere, an upload is
deleted as soon as it was read, pictures travel inside the page, and each browser session has a scan of its own.
"""

import argparse
import base64
import dataclasses
import html
import io
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import gradio as gr
from PIL import Image
from viewer import EDGES, PLANES, WINDOWS, describe, display_planes, escape, slice_count

from med3dvlm.volume import Volume, VolumeError, read_volume

Messages = list[dict[str, str]]  # {"role": "user" | "assistant", "content": text}

NOTICE = "Research software, not a medical device."
NO_SCAN = "Please open a scan first: drop its file on the field at the top."
NO_QUESTION = "Please type a question first."
NO_ANSWER = "The model gave no answer; please ask in other words."
FIRST_WINDOW = next(iter(WINDOWS))
STORED_AXES = {"axial": "slices", "coronal": "rows", "sagittal": "columns"}  # names where the orientation is unknown
# The browser's own fonts: a theme's may come from a font server.
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif"]
CSS = """
.gradio-container {max-width: 1680px !important; padding: 0 16px !important}
.html-container {padding: 0 !important}
#title {display: flex; align-items: baseline; gap: 14px} #title b {font-size: 20px} #title span {opacity: .75}
.bar {padding: 8px 12px; border-radius: 6px; border-left: 4px solid}
.bar.error {color: #7f1d1d; background: #fee2e2; border-color: #dc2626}
.bar.warning {color: #713f12; background: #fef3c7; border-color: #d97706}
.plane {position: relative; aspect-ratio: 1; margin: 0; background: #000; border-radius: 6px; overflow: hidden}
.plane img {width: 100%; height: 100%; object-fit: contain}
.plane i {position: absolute; color: #cbd5e1; font: 12px ui-monospace, monospace; text-shadow: 0 0 3px #000}
.plane .name {top: 6px; left: 8px; color: #7dd3fc} .plane .count {bottom: 6px; left: 8px}
.plane .top, .plane .bottom {left: 50%; transform: translateX(-50%)} .plane .top {top: 6px} .plane .bottom {bottom: 6px}
.plane .left, .plane .right {top: 50%; transform: translateY(-50%)} .plane .left {left: 8px} .plane .right {right: 8px}
#facts table {width: 100%; font-size: 13px} #facts table, #facts tr {border: 0 !important} #facts thead {display: none}
#facts td {padding: 4px 10px; border: solid #94a3b855 !important; border-width: 0 0 1px !important}
#facts td:first-child {white-space: nowrap; opacity: .7; width: 1%}
"""


def build(chat: Any) -> gr.Blocks:
    """The page around `chat`, which has `stream` and `familiarity` as `Med3DChat` has. Start it with `launch`."""
    # Gradio names an upload by its content: two sessions that send the same file share one path, and the first to
    # read it deletes it. The second gets the first one's Volume, which nothing changes, while that is alive.
    volumes: WeakValueDictionary[str, Volume] = WeakValueDictionary()

    def read(upload: str) -> dict[Any, Any]:
        path = Path(upload)
        try:
            if path.suffix.lower() == ".mhd":
                raise VolumeError(f"{path.name}: an .mhd file has its voxels in another file; save the scan as one .mha file.")
            volume = volumes[upload] = volumes.get(upload) or without_folder(read_volume(path), path)
        except VolumeError as error:  # the scan that was open stays open
            return {loader: None, status: bar("error", str(error).replace(f"{path.parent}{os.sep}", ""))}
        finally:
            path.unlink(missing_ok=True)
        page = {loader: None, status: bar("error", ""), scan: volume, facts: describe(volume)}
        page |= {conversation: [], history: []}  # answers about the scan before
        page[windows] = gr.update(value=FIRST_WINDOW, visible=volume.unit == "HU")
        for plane, picture, slider in zip(PLANES, pictures, sliders, strict=True):
            middle = (slice_count(volume, plane) + 1) // 2
            page[picture] = show(plane, volume, FIRST_WINDOW, middle)
            page[slider] = gr.update(value=middle, maximum=slice_count(volume, plane), interactive=True)
        return page

    def familiarity(volume: Volume | None) -> dict[str, Any]:
        try:
            known = volume and chat.familiarity(volume)  # None where the model does not know what it was trained on
            return bar("warning", (known and known.message) or "")
        except ValueError as error:  # a scan that the model cannot take
            return bar("warning", str(error))

    def ask(text: str, volume: Volume | None, past: Messages) -> Iterator[tuple[str, Messages, Messages]]:
        text = text.strip()
        if volume is None or not text:
            yield text, shown(past, NO_SCAN if volume is None else NO_QUESTION), past
            return
        turn, answer = [*past, {"role": "user", "content": text}], ""
        yield "", shown(turn), past
        try:
            for piece in chat.stream(volume, text, history=past):
                answer += piece
                yield "", shown(turn, answer), [*turn, {"role": "assistant", "content": answer}]
            if not answer.strip():
                raise ValueError(NO_ANSWER)
        except ValueError as error:  # told to the user, not to the model
            yield text, shown(turn, str(error)), past

    with gr.Blocks(title="Med3DVLM", analytics_enabled=False, fill_width=True) as blocks:
        scan, history = gr.State(), gr.State([])
        gr.HTML(f'<div id="title"><b>Med3DVLM</b><span>{NOTICE}</span></div>')
        with gr.Row():
            with gr.Column(scale=5, min_width=560):
                loader = gr.File(label="Open a scan: NIfTI, a zip of DICOM or of pictures, NRRD, MHA or NumPy", height=140)
                status, notice = gr.HTML(visible=False), gr.HTML(visible=False)
                pictures, sliders = [], []
                with gr.Row():
                    for plane in PLANES:
                        with gr.Column(min_width=170):
                            pictures.append(gr.HTML(show(plane, None, None, 1)))
                            label = plane.capitalize()
                            sliders.append(gr.Slider(1, 2, 1, step=1, label=label, interactive=False, buttons=[]))
                windows = gr.Radio(list(WINDOWS), label="Window", visible=False)
                facts = gr.Markdown(elem_id="facts", latex_delimiters=[])
            with gr.Column(scale=3, min_width=340):
                conversation = gr.Chatbot(
                    label="Conversation",
                    placeholder="Open a scan, then ask about it.",
                    height="64vh",
                    render_markdown=False,
                    latex_delimiters=[],
                    buttons=[],
                    feedback_options=None,
                )
                question = gr.Textbox(show_label=False, placeholder="Ask about the scan", submit_btn="Ask", max_lines=4)
                clear = gr.Button("Clear conversation", size="sm")

        talk = [conversation, history]
        answering = question.submit(ask, [question, scan, history], [question, *talk], concurrency_id="model", api_name="ask")
        filled = [status, facts, *pictures, *sliders, windows, loader, scan, *talk]
        reading = loader.upload(read, loader, filled, cancels=answering, show_progress_on=status, api_name="read")
        quiet: dict[str, Any] = {"show_progress": "hidden"}
        reading.then(familiarity, scan, notice, concurrency_id="model", api_name="familiarity", **quiet)
        clearing = [clear.click, conversation.clear]
        gr.on(clearing, lambda: ([], []), None, talk, cancels=answering, api_name="clear", **quiet)
        quiet |= {"queue": False, "trigger_mode": "always_last"}
        for plane, picture, slider in zip(PLANES, pictures, sliders, strict=True):
            slider.input(partial(show, plane), [scan, windows, slider], picture, api_name=plane, **quiet)
        windows.input(show_all, [scan, windows, *sliders], pictures, api_name="window", **quiet)
    return blocks


def show(plane: str, volume: Volume | None, window: str | None, number: int) -> str:
    """One slice as HTML, `number` counted from 1, with the patient's sides at the edges where they are known."""
    if volume is None:
        return f'<figure class="plane"><i class="name">{plane}</i></figure>'
    slices = display_planes(volume, WINDOWS.get(window or "") if volume.unit == "HU" else None)[plane]
    number = min(max(int(number), 1), len(slices))
    buffer = io.BytesIO()
    Image.fromarray(slices[number - 1]).save(buffer, "png", compress_level=1)
    data = base64.b64encode(buffer.getvalue()).decode()
    marks = {"name": plane if volume.orientation else STORED_AXES[plane], "count": f"{number}/{len(slices)}"}
    if volume.orientation:
        marks |= dict(zip(("top", "bottom", "left", "right"), EDGES[plane], strict=True))
    labels = "".join(f'<i class="{place}">{text}</i>' for place, text in marks.items())
    picture = f'<img alt="{marks["name"]} {marks["count"]}" src="data:image/png;base64,{data}">'
    return f'<figure class="plane">{picture}{labels}</figure>'


def show_all(volume: Volume | None, window: str | None, *numbers: int) -> list[str]:
    return [show(plane, volume, window, number) for plane, number in zip(PLANES, numbers, strict=True)]


def shown(messages: Messages, answer: str | None = None) -> Messages:
    """The conversation for the page, `answer` last; escaped, as a Chatbot renders HTML even without Markdown."""
    said = messages if answer is None else [*messages, {"role": "assistant", "content": answer}]
    return [{**message, "content": html.escape(message["content"], quote=False)} for message in said]


def bar(kind: str, text: str) -> dict[str, Any]:
    """Fills a line that the user should not miss, or takes it away (empty `text`); `kind` is "error" or "warning"."""
    return gr.update(value=f'<div class="bar {kind}" role="alert">{escape(text)}</div>', visible=bool(text))


def without_folder(volume: Volume, path: Path) -> Volume:
    """`volume` with the file's name alone where it says where it came from."""
    warnings = tuple(warning.replace(f"{path.parent}{os.sep}", "") for warning in volume.warnings)
    return dataclasses.replace(volume, source=path.name, warnings=warnings)


def launch(blocks: gr.Blocks, port: int | None = None) -> str:
    """Serve on this machine alone, without blocking; returns the address. Port None: the first free one from 7860."""
    theme = gr.themes.Default(primary_hue="sky", neutral_hue="slate", font=FONTS, font_mono=["monospace"])
    # run_history would keep questions and answers in the browser
    off = dict.fromkeys(("share", "run_history", "enable_monitoring", "ssr_mode", "mcp_server", "pwa"), False)
    look: dict[str, Any] = {"theme": theme, "css": CSS, "footer_links": [], "quiet": True}
    blocks.launch(server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, **look, **off)
    return str(blocks.local_url)


def main(argv: Sequence[str] | None = None) -> int:
    """Load the model once, serve until Ctrl+C or SIGTERM; 2 where there is no model to load or the port is taken."""
    parser = argparse.ArgumentParser(description="Chat with a model about a scan, in the browser.", epilog=NOTICE)
    parser.add_argument("--model", type=Path, required=True, help="directory of a trained model")
    parser.add_argument("--port", type=int, default=7860, help="port on 127.0.0.1 (default: %(default)s)")
    arguments = parser.parse_args(argv)
    try:
        if not arguments.model.is_dir():
            raise FileNotFoundError(f"There is no model directory {arguments.model}; train one with `make demo`.")
        if not any(file.suffix in (".safetensors", ".bin") for file in arguments.model.iterdir()):
            raise FileNotFoundError(f"{arguments.model} holds no weights (*.safetensors); give a trained model.")
        from med3dvlm.allocator import keep_freed_memory
        from med3dvlm.inference import Med3DChat

        keep_freed_memory()

        chat = Med3DChat.from_pretrained(arguments.model)
        with tempfile.TemporaryDirectory(prefix="med3dvlm-chat-") as private:  # only this user can look into it
            os.environ["GRADIO_TEMP_DIR"] = private
            blocks = build(chat)
            address = launch(blocks, arguments.port)
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the private folder goes then, too
            print(f"Med3DVLM listens on {address} (Ctrl+C ends it). {NOTICE}", flush=True)
            blocks.block_thread()
    except (OSError, ValueError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
