"""A scripted model server on loopback: what a coding agent's CLI talks to in a test, instead of a model.

    with ModelServer() as server:
        server.play(Run("sed -i s/8/10/ train.py"), Say("done"))
        subprocess.run(["claude", "-p"], env={"ANTHROPIC_BASE_URL": server.url, ...})
    assert "the prompt" in server.requests[0].user_text

It speaks as much of three streaming APIs as the CLIs need: Anthropic Messages (claude), OpenAI Responses (codex) and
Chat Completions (the others). A script is a list of turns; every request that offers tools takes one, and the last
turn answers for ever. Requests without tools (a CLI asks for a title, a count, a health check) take none.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from typing import NamedTuple, Self


class Run(NamedTuple):  # calls the CLI's own shell tool
    command: str


class Call(NamedTuple):  # calls another of the CLI's own tools: claude's Edit, Write or Read
    tool: str
    arguments: dict


class Say(NamedTuple):  # answers with text, which ends the agent's work
    text: str


class Status(NamedTuple):  # refuses with an HTTP status
    code: int


class Hang:  # accepts the request and never answers
    pass


Turn = Run | Call | Say | Status | Hang


class Request(NamedTuple):
    body: dict

    @property
    def tools(self) -> dict[str, dict]:
        """Name -> JSON schema of the arguments of each tool on offer; the APIs differ in where they put both."""
        tools = [tool.get("function", tool) for tool in self.body.get("tools") or []]
        return {tool["name"]: tool.get("parameters") or tool.get("input_schema") for tool in tools if "name" in tool}

    @property
    def user_text(self) -> str:
        """All that the user's side said, joined: a prompt must be in it whole."""
        said = []
        for message in self.body.get("messages") or self.body.get("input") or []:
            content = message.get("content") or []
            if isinstance(content, str):
                content = [{"text": content}]
            if message.get("role") == "user":
                said += [part["text"] for part in content if "text" in part]
        return "\n".join(said)


def tool_call(request: Request, turn: Run | Call) -> tuple[str, dict]:
    """The name of the CLI's tool and its arguments: of its shell those that its schema wants for the command."""
    if isinstance(turn, Call):
        return turn.tool, turn.arguments
    name = next(name for name in SHELL_TOOLS if name in request.tools)
    required = request.tools[name].get("required", [])
    return name, {field: turn.command if field in ("command", "cmd") else "an edit" for field in required}


SHELL_TOOLS = ("Bash", "bash", "exec_command", "run_shell_command", "Execute")  # of claude; others; codex; qwen; droid

# The three streams. Each takes the request, its number and a turn, and gives the data of its events.


def anthropic_messages(request: Request, number: int, turn: Run | Call | Say):
    if isinstance(turn, Say):
        stop_reason, block = "end_turn", {"type": "text", "text": ""}
        delta = {"type": "text_delta", "text": turn.text}
    else:
        name, arguments = tool_call(request, turn)
        stop_reason, block = "tool_use", {"type": "tool_use", "id": f"toolu_{number}", "name": name, "input": {}}
        delta = {"type": "input_json_delta", "partial_json": json.dumps(arguments)}
    message = {"id": f"msg_{number}", "type": "message", "role": "assistant", "model": request.body["model"]}
    usage = {"input_tokens": 1, "output_tokens": 1}
    message |= {"content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
    yield {"type": "message_start", "message": message}
    yield {"type": "content_block_start", "index": 0, "content_block": block}
    yield {"type": "content_block_delta", "index": 0, "delta": delta}
    yield {"type": "content_block_stop", "index": 0}
    yield {"type": "message_delta", "delta": {"stop_reason": stop_reason}, "usage": usage}
    yield {"type": "message_stop"}


def openai_responses(request: Request, number: int, turn: Run | Call | Say):
    if isinstance(turn, Say):
        item = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": turn.text}]}
    else:
        name, arguments = tool_call(request, turn)
        item = {"type": "function_call", "call_id": f"call_{number}", "name": name, "arguments": json.dumps(arguments)}
    item["id"] = f"item_{number}"
    usage = {"input_tokens": 1, "output_tokens": 1, "total_tokens": 2}
    yield {"type": "response.created", "response": {"id": f"resp_{number}"}}
    yield {"type": "response.output_item.done", "output_index": 0, "item": item}
    yield {"type": "response.completed", "response": {"id": f"resp_{number}", "usage": usage}}


def chat_completions(request: Request, number: int, turn: Run | Call | Say):
    if isinstance(turn, Say):
        finish_reason, delta = "stop", {"role": "assistant", "content": turn.text}
    else:
        name, arguments = tool_call(request, turn)
        call = {"index": 0, "id": f"call_{number}", "type": "function"}
        call["function"] = {"name": name, "arguments": json.dumps(arguments)}
        finish_reason, delta = "tool_calls", {"role": "assistant", "content": "", "tool_calls": [call]}
    chunk = {"id": f"chat_{number}", "object": "chat.completion.chunk", "created": 0, "model": request.body["model"]}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    yield chunk | {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
    yield chunk | {"choices": [{"index": 0, "delta": {}, "finish_reason": finish_reason}], "usage": usage}


STREAMS = {"/messages": anthropic_messages, "/responses": openai_responses, "/chat/completions": chat_completions}


class ModelServer(ThreadingHTTPServer):
    """Serves a script from a thread on 127.0.0.1, port and all in `url`, until the `with` block ends."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests: list[Request] = []  # those that took a turn of the present script, in order
        self.numbers = count()
        self.closing = threading.Event()  # lets go of the requests that hang

    def play(self, *script: Turn) -> None:
        """Begin a script."""
        self.script = list(script)
        self.requests = []

    def turn(self, request: Request) -> Turn:
        if not request.tools:
            return Say("a title")
        self.requests.append(request)
        return self.script.pop(0) if len(self.script) > 1 else self.script[0]

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exc) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address) -> None:
        pass  # a CLI that was killed in the middle of an answer


class Handler(BaseHTTPRequestHandler):
    server: ModelServer

    def do_POST(self):
        request = Request(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        path = self.path.partition("?")[0]
        stream = next((STREAMS[end] for end in STREAMS if path.endswith(end)), None)
        turn = self.server.turn(request) if stream else Status(404)
        if isinstance(turn, Hang):
            self.server.closing.wait()
        elif isinstance(turn, Status):
            error = {"type": "error", "error": {"type": "scripted", "message": f"scripted {turn.code}"}}
            self.send("application/json", json.dumps(error), turn.code)
        else:
            text = ""
            for data in stream(request, next(self.server.numbers), turn):
                event = f"event: {data['type']}\n" if "type" in data else ""
                text += f"{event}data: {json.dumps(data)}\n\n"
            if stream is chat_completions:
                text += "data: [DONE]\n\n"
            self.send("text/event-stream", text)

    def send(self, kind: str, text: str, code: int = 200) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args) -> None:
        pass
