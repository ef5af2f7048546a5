"""As much of a W&B server as `wandb sync` asks for: it remembers what runs were sent, line by line."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HISTORY = "wandb-history.jsonl"


@dataclass
class Received:
    """What has been sent."""

    url: str = ""
    history: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # by run
    said: dict[str, dict[str, Any]] = field(default_factory=dict)  # what UpsertBucket told, by run
    alerts: list[str] = field(default_factory=list)
    files: set[str] = field(default_factory=set)  # their names

    def answer(self, operation: str, given: dict[str, Any]) -> dict[str, Any]:
        """To a GraphQL question."""
        owner = {"id": "1", "name": "me"}
        if operation == "RunResumeStatus":
            bucket = self._bucket(given["name"]) if given["name"] in self.history else None
            return {"model": {"id": "2", "name": "keel", "entity": owner, "bucket": bucket}}
        if operation == "UpsertBucket":
            told = {name: value for name, value in given.items() if value is not None}
            self.said[given["name"]] = self.said.get(given["name"], {}) | told
            bucket = {"id": "3", "name": given["name"], "project": {"name": "keel", "entity": owner}}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in given["files"]]
            return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}
        if operation == "NotifyScriptableRunAlert":
            self.alerts.append(given["title"])
            return {"notifyScriptableRunAlert": {"success": True}}
        return {}

    def _bucket(self, run: str) -> dict[str, Any]:
        """A run that is there already, so that the next attempt goes on in it."""
        rows = self.history[run]
        return {
            "id": "3", "name": run, "displayName": "mine", "tags": [], "notes": "", "summaryMetrics": "{}",
            "config": "{}", "wandbConfig": json.dumps({"t": 1}),
            "historyLineCount": len(rows), "eventsLineCount": 0,
            "logLineCount": 0, "historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]),
            "eventsTail": "[]",
        }  # fmt: skip

    def stream(self, run: str, sent: dict[str, Any]) -> None:
        """Lines of a run's history, from where they say they belong."""
        rows = self.history.setdefault(run, [])
        lines = sent.get("files", {}).get(HISTORY, {"offset": len(rows), "content": []})
        rows[lines["offset"] :] = [json.loads(line) for line in lines["content"]]


@contextmanager
def server() -> Iterator[Received]:
    """Runs in a thread, on a port of its own."""
    received = Received()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.body()
            if self.path == "/graphql":
                asked = json.loads(body)
                self.reply({"data": received.answer(asked["operationName"], asked["variables"])})
                return
            if self.path.endswith("/file_stream"):
                received.stream(self.path.split("/")[-2], json.loads(body))
            self.reply({})

        def do_PUT(self) -> None:
            self.body()
            received.files.add(self.path.removeprefix("/upload/"))
            self.reply({})

        def body(self) -> bytes:
            data = self.rfile.read(int(self.headers.get("content-length") or 0))
            return gzip.decompress(data) if self.headers.get("content-encoding") == "gzip" else data

        def reply(self, value: object) -> None:
            data = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None: ...

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """`wandb` leaves without closing its connections."""

    with Quiet(("127.0.0.1", 0), Handler) as listening:
        received.url = f"http://127.0.0.1:{listening.server_port}"
        thread = threading.Thread(target=listening.serve_forever, daemon=True)
        thread.start()
        yield received
        listening.shutdown()
        thread.join()
