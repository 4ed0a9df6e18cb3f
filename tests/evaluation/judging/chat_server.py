"""A server of the tests' own that speaks the OpenAI protocol, well or badly."""

import collections
import http.server
import json
import random
import select
import threading
import time

from dpojax.evaluation.judging.templates import Template

TEMPLATE = Template("test", "{prompt}|{first}|{second}")
FAULTS = (
    "429",
    "429 with Retry-After",
    "500",
    "503",
    "garbage",
    "wrong JSON",
    "no choices",
    "error in the answer",
    "cut off",
    "hung up",
)


def seeded_faults(seed, share=0.4, kinds=FAULTS):
    """(text of the question, number of the attempt) -> fault or None, in any order of threads."""

    def fault(text, attempt):
        chance = random.Random(f"{seed} {text} {attempt}")
        return chance.choice(kinds) if chance.random() < share else None

    return fault


def longer_wins(text):
    _, first, second = text.split("|")
    return f"It is longer.\nPreferred: {'A' if len(first) > len(second) else 'B'}"


class ChatServer:
    """Answers in a thread. `with ChatServer() as server: ... server.url`.

    Attributes:
      answers: how often each question got a whole and good answer.
      requests: how often each question was sent.
      bodies, headers: of all requests.
    """

    def __init__(self, fault=lambda text, attempt: None, answer=longer_wins, delay=0.0):
        self.fault, self.answer, self.delay = fault, answer, delay
        self.answers, self.requests = collections.Counter(), collections.Counter()
        self.bodies, self.headers = [], []
        self.lock = threading.Lock()
        self.at_once = self.most_at_once = 0
        handler = type("Handler", (_Handler,), {"owner": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def completion(self, text):
        return {
            "object": "chat.completion",
            "choices": [
                {
                    "index": 0,
                    "finish_reason": "stop",
                    "message": {"role": "assistant", "content": self.answer(text)},
                }
            ],
            "usage": {"prompt_tokens": len(text), "completion_tokens": 7},
        }


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: ChatServer

    def log_message(self, *args):
        pass

    def do_GET(self):
        self._send(200, {"object": "list", "data": [{"id": "tiny"}, {"id": "other"}]})

    def do_POST(self):
        owner = self.owner
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        with owner.lock:
            owner.bodies.append(body)
            owner.headers.append(dict(self.headers))
            attempt = owner.requests[text]
            owner.requests[text] += 1
            owner.at_once += 1
            owner.most_at_once = max(owner.most_at_once, owner.at_once)
        time.sleep(owner.delay)
        with owner.lock:
            owner.at_once -= 1
        fault = owner.fault(text, attempt)
        if fault is None:
            if self._send(200, owner.completion(text)):
                with owner.lock:
                    owner.answers[text] += 1
        else:
            self._fail(fault, text)

    def _fail(self, fault, text):
        whole = json.dumps(self.owner.completion(text)).encode()
        if fault == "429":
            self._send(429, {"error": {"message": "rate limit"}})
        elif fault == "429 with Retry-After":
            self._send(429, {"error": {"message": "rate limit"}}, {"Retry-After": "0.02"})
        elif fault == "garbage":
            self._send(200, b"\xff<html>a proxy says hello</html>")
        elif fault == "wrong JSON":
            self._send(200, ["not", "a", "completion"])
        elif fault == "no choices":
            self._send(200, {"choices": []})
        elif fault == "error in the answer":
            self._send(200, {"error": {"message": "upstream failed"}})
        elif fault == "cut off":
            self._send(200, whole, {"Content-Length": str(len(whole))}, cut=len(whole) // 2)
        elif fault == "hung up":
            self.close_connection = True
        elif fault == "slow":
            select.select([self.connection], [], [], 20)  # until the client hangs up
            self.close_connection = True
        elif isinstance(fault, tuple):  # status, answer, headers
            self._send(*fault)
        else:
            self._send(int(fault), b"oops")

    def _send(self, status, content, headers=None, cut=None):
        """Return whether all of it was sent."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        try:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data[:cut])
            self.wfile.flush()
        except OSError:  # the client has gone
            self.close_connection = True
            return False
        self.close_connection = self.close_connection or cut is not None
        return True
