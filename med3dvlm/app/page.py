"""The page: its components (layout.py) connected with what they do (events.py)."""

from typing import Any

import gradio as gr

from med3dvlm.app.api import endpoints
from med3dvlm.app.events import ConversationEvents, PageEvents, ReportEvents, ScanEvents
from med3dvlm.app.layout import lay_out
from med3dvlm.app.turns import MALFORMED, log
from med3dvlm.app.workstation import Workstation


class Page(gr.Blocks):
    """Blocks that answer a malformed call with one sentence, where Gradio would print the call's values and return null."""

    async def process_api(self, *args: Any, **more: Any) -> dict[str, Any]:
        try:
            return await super().process_api(*args, **more)
        except gr.Error as error:
            error.print_exception = False
            raise
        except Exception as error:  # noqa: BLE001  told in a sentence
            log(error)
            raise gr.Error(MALFORMED, print_exception=False) from None


def build(workstation: Workstation, parallel: int = 2, accounts: bool = False) -> gr.Blocks:
    """Build the page of the workstation.

    Args:
        parallel: how many answers are written at a time; the others wait in a queue.
        accounts: whether people log in, and so can log out.
    """
    model_queue: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": parallel}
    with Page(title="Med3DVLM", analytics_enabled=False, fill_width=True, delete_cache=(3600, 3600)) as blocks:
        shared = workstation, lay_out(workstation, accounts), model_queue
        endpoints(workstation, model_queue)  # before the page's own events, which would take their names
        ScanEvents(*shared).connect()
        ConversationEvents(*shared).connect()
        ReportEvents(*shared).connect()
        PageEvents(*shared).connect(blocks)
    blocks.queue(api_open=False)  # so that every call goes through the queue
    return blocks
