"""The pages for people, and the description of all paths."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from typing import Any

import pytest
from starlette.routing import Route

from ppsd.serve import schema
from ppsd.serve.app import create_app
from ppsd.serve.openapi import OPERATIONS, document
from ppsd.serve.site import HERE
from tests.support.http_server import serving

PAGES = {"/": "live.html", "/docs": "docs.html"}


def test_every_route_is_described_and_nothing_else(server) -> None:
    routes = {
        (route.path.replace(":path", ""), frozenset(route.methods or {"POST"}) - {"HEAD"})
        for route in create_app(server.service).routes
        if isinstance(route, Route)
    }
    described = {
        (path, frozenset(method.upper() for method in methods))
        for path, methods in document()["paths"].items()
    }
    assert described == routes


def test_bodies_are_described_by_their_own_models(server) -> None:
    told: dict[str, Any] = server.client.get("/openapi.json").json()
    schemas = told["components"]["schemas"]
    for each in OPERATIONS:
        if each.body is not None:
            assert set(schemas[each.body.__name__]["properties"]) == set(each.body.model_fields)
    references = set(re.findall(r'#/components/schemas/(\w+)"', str(told).replace("'", '"')))
    assert references <= set(schemas)
    assert schemas["TextBody"]["required"] == ["prompt"]
    most = schemas["ChatBody"]["properties"]["n"]["anyOf"][0]["maximum"]
    assert most == schema.MAX_CHOICES


@pytest.mark.parametrize("path", PAGES)
def test_a_page_needs_nothing_from_elsewhere(server, path) -> None:
    response = server.client.get(path)
    assert response.headers["content-type"].startswith("text/html")
    text = (HERE / PAGES[path]).read_text()
    assert response.text == text
    assert set(re.findall(r"https?://[^'\"\s]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\son\w+=|\sstyle=|\ssrc=|@import|url\(", text)
    policy = response.headers["content-security-policy"]
    for element in ("script", "style"):
        [content] = re.findall(f"<{element}>(.*?)</{element}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{element}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_pages_are_open_and_what_they_show_is_not(llm) -> None:
    with serving(llm, api_key="k") as served:
        for path in (*PAGES, "/openapi.json"):
            assert served.client.get(path).status_code == 200
        for path in ("/v1/pipeline", "/v1/pipeline/events", "/metrics", "/v1/models"):
            assert served.client.get(path).status_code == 401
        assert served.post("/v1/pipeline/chat", {}).status_code == 401


FIGURES = """
let now = 0;
const shown = {}, $ = (id) => shown[id] ??= { textContent: "" }, performance = { now: () => now };
let outcomes = [], state;
%s
const told = [];
for (const [time, running, speed] of %s) {
  now = time;
  state = {
    tokens: { per_second: speed, plain_per_second: 10 }, drafts: { acceptance_rate: null },
    requests: { running, concurrent: 8 }, memory: { used_bytes: [], needed_bytes: [] },
  };
  figures();
  told.push(shown.against.textContent.split(" ")[0]);
}
console.log(JSON.stringify(told));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_page_compares_with_plain_decoding_what_one_request_alone_does() -> None:
    """Of eight requests the speed is that of all, and plain decoding's is one request's."""
    text = (HERE / "live.html").read_text()
    [code] = re.findall("(?s)// ---- figures -+\n(.*?)// ---- pictures", text)
    updates = [[3000, 1, 15.0], [4000, 8, 80.0], [5000, 1, 40.0], [6500, 1, 15.0], [7000, 0, None]]
    program = FIGURES % (code, json.dumps(updates))
    done = subprocess.run(["node", "-e", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == ["1.50×", "", "", "1.50×", "1.50×"]
