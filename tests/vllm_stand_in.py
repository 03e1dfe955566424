"""A stand-in for a vLLM server (0.32: /v1/models, and streamed /v1/completions with prompt_embeds), on transformers.

It loads an exported folder with plain transformers, without med3dvlm, and answers one request after the other.
"""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

NEEDED = ("model", "prompt_embeds", "max_tokens", "stream", "return_token_ids", "return_tokens_as_token_ids", "logprobs", "temperature")


@contextmanager
def serving(folder: Path, prompt_embeds: bool = True, context: int = 512, key: str | None = None) -> Iterator[SimpleNamespace]:
    """Gives its `url`, the `bodies` of the requests, how many tokens it has `written`, and `die_after`: of them, when connections break."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    seen = SimpleNamespace(bodies=[], written=0, die_after=None, left=0)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/v1/models":
                self.refuse(404, "Not Found")
            elif self.allowed():
                served = {"id": str(folder), "object": "model", "root": str(folder), "parent": None, "max_model_len": context}
                self.give({"object": "list", "data": [served]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.bodies.append(body)
            if self.path != "/v1/completions" or body["model"] != str(folder) or any(name not in body for name in NEEDED):
                self.refuse(404, f"The model `{body.get('model')}` does not exist.")
            elif not prompt_embeds:
                self.refuse(400, "You must set `--enable-prompt-embeds` to input `prompt_embeds`.")
            elif self.allowed():
                embeds = torch.load(BytesIO(base64.b64decode(body["prompt_embeds"], validate=True)), weights_only=True)
                given, wanted = embeds.shape[1], model.config.hidden_size
                if given != wanted:
                    self.refuse(400, f"`prompt_embeds` hidden_size {given} does not match the model's hidden_size {wanted}.")
                elif len(embeds) + body["max_tokens"] > context:
                    self.refuse(400, f"This model's maximum context length is {context} tokens.")
                else:
                    self.write(embeds, body)

        def write(self, embeds: torch.Tensor, body: dict[str, Any]) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            generator = torch.Generator().manual_seed(body["seed"] or 0)
            for number in range(body["max_tokens"]):
                with torch.no_grad():
                    logprobs = model(inputs_embeds=embeds[None]).logits[0, -1].log_softmax(-1)
                likeliest = logprobs.topk(max(1, body["logprobs"]))
                token = int(likeliest.indices[0])
                if body["temperature"]:
                    token = int(torch.multinomial((logprobs / body["temperature"]).softmax(-1), 1, generator=generator))
                listed = {f"token_id:{token}": float(logprobs[token])}
                if body["logprobs"]:
                    listed |= {f"token_id:{id}": float(value) for id, value in zip(likeliest.indices, likeliest.values, strict=True)}
                finish = "stop" if token in body["stop_token_ids"] else "length" if number + 1 == body["max_tokens"] else None
                shown = {"tokens": [f"token_id:{token}"], "token_logprobs": [float(logprobs[token])], "top_logprobs": [listed]}
                event = {"choices": [{"index": 0, "text": "?", "token_ids": [token], "logprobs": shown, "finish_reason": finish}]}
                seen.written += 1
                if seen.die_after is not None and seen.written >= seen.die_after:
                    self.connection.close()
                    return
                last = "data: [DONE]\n\n" if finish else ""
                if not self.send(f"data: {json.dumps(event)}\n\n{last}"):  # the client has left
                    seen.left += not finish
                    return
                if finish:
                    break
                embeds = torch.cat([embeds, model.get_input_embeddings()(torch.tensor([token])).detach()])
            self.send("")

        def send(self, text: str) -> bool:
            """Send a chunk; return whether the client still reads."""
            try:
                self.wfile.write(f"{len(text.encode()):x}\r\n{text}\r\n".encode())
            except OSError:
                return False
            return True

        def allowed(self) -> bool:
            if key is not None and self.headers.get("Authorization") != f"Bearer {key}":
                self.refuse(401, "Unauthorized")
                return False
            return True

        def refuse(self, status: int, words: str) -> None:
            self.give({"error": {"message": words, "type": "BadRequestError", "param": None, "code": status}}, status)

        def give(self, body: dict[str, Any], status: int = 200) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    seen.url, seen.stop = f"http://127.0.0.1:{server.server_address[1]}", server.shutdown
    try:
        yield seen
    finally:
        server.shutdown()
        thread.join(20)
        server.server_close()
