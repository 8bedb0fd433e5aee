"""What hostile clients and pages try: nothing outside is read, nothing is executed, each gets a 4xx with a sentence."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.conftest import Run
from tests.serve.serving import DEADLINE, Answered, Server

KEY = "a-key-of-the-tests-0123456789"
SITE = "https://a.example"
SECRET = "the secret beside the served folder"
MARKUP = "<script>alert(1)<img src=x onerror=alert(1)>"  # as far as a folder's name can hold it
SAMPLE = "before </script><img src=x onerror=alert(1)> after"
PAGES = ("/", "/runs", "/page/base.css", "/health", "/ready")
API = (
    *("/v1/models", "/v1/models/talker", "/metrics", "/tokenizer_info", "/api/runs", "/api/runs/first/metrics", "/api/events"),
    *("/api/runs/first/samples", "/api/runs/first/checkpoints", "/api/runs/first/options", "/nothing", "/page", "/docs"),
)
POSTS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/api/runs/first/checkpoints/30/verify")
OUTSIDE = (
    *(
        "..",
        ".",
        "../..",
        "../secret.txt",
        "../secret",
        "%2e%2e/",
        "..%2f..",
        "/etc/passwd",
        "//etc/passwd",
        "~",
        "C:\\",
        "..\\",
    ),
    *("first/..", "first/../first", "first@../..", "first@-1", "first@1/../../", "talker@..", "first@", "@30", "first@30/"),
    *("\0", "first\0", "first@30\0", "\ud800", "file:///etc/passwd", "talker/../talker", "a" * 300, "memory://x", "hf://x"),
)


def is_refused(answer: Answered, *statuses: int) -> bool:
    """A 4xx of these, with the error body, and the headers of every answer."""
    assert 400 <= answer.status < 500, (answer.status, answer.body[:300])
    assert not statuses or answer.status in statuses, (answer.status, answer.body[:300])
    assert answer.headers["content-type"] == "application/json"
    return is_guarded(answer) and bool(answer.error)


def is_guarded(answer: Answered) -> bool:
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self';")
    assert "unsafe" not in policy
    assert "server" not in answer.headers
    return answer.headers["x-content-type-options"] == "nosniff"


def raw(server: Server, *pieces: bytes) -> Answered:
    """What bytes are answered with, which no client would send."""
    with socket.create_connection(server.address, timeout=DEADLINE) as connection:
        try:
            for piece in pieces:
                connection.sendall(piece)
        except (BrokenPipeError, ConnectionResetError):  # answered before it had read all
            pass
        answer = b""
        while b"\r\n\r\n" not in answer:
            part = connection.recv(65536)
            assert part, f"closed without an answer after {answer!r}"
            answer += part
        head, _, body = answer.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        while len(body) < int(headers.get("content-length", 0)):
            body += connection.recv(65536)
        return Answered(int(lines[0].split()[1]), headers, body)


def post(server: Server, content: bytes, path: str = "/v1/completions", **headers: str) -> Answered:
    return server.request("POST", path, content, {"Content-Type": "application/json", **headers})


# -- names and paths


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_models_name_reaches_nothing_else(served: Server, name: str) -> None:
    (Path(served.log_path).parent / "secret.txt").write_text(SECRET)
    for path, field in (("/v1/completions", "prompt"), ("/tokenize", "prompt")):
        assert is_refused(served.post(path, {"model": name, field: "the", "max_tokens": 1}), 400, 404)
    if "\ud800" not in name:
        assert is_refused(served.get("/v1/models/" + quote(name, safe="")), 404)
        assert is_refused(served.get("/tokenizer_info?model=" + quote(name, safe="")), 404)


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_runs_name_reaches_nothing_else(served: Server, name: str) -> None:
    if "\ud800" in name or name in (".", ".."):  # no address holds the one; of the others see the next test
        return
    for form in {quote(name, safe=""), quote(quote(name, safe=""), safe="")}:
        for part in ("metrics", "samples/0", "options", "checkpoints"):
            assert is_refused(served.get(f"/api/runs/{form}/{part}"), 404)


@pytest.mark.parametrize(
    "path",
    [
        *(
            "/page/../app.py",
            "/page/%2e%2e/app.py",
            "/page/..%2fapp.py",
            "/page/%2e%2e%2fapp.py",
            "/page/..%5capp.py",
            "/page//etc/passwd",
        ),
        *(
            "/page/%2fetc%2fpasswd",
            "/page/%252e%252e/app.py",
            "/page/uplot/../../app.py",
            "/page/%00",
            "/page/base.css%00",
            "/page/",
        ),
        *("/page/" + "a" * 5000, "/page/uplot", "/../app.py", "//app.py", "/app.py", "/.env"),
        *(
            "/api/runs/../runs",
            "/api/runs/%2e%2e/metrics",
            "/api/runs/first/samples/..%2f..%2frun.json",
            "/api/runs/first/samples/-1",
        ),
        *(
            "/api/runs/first/../../..",
            "/api/runs/first/checkpoints/..",
            "/api/runs/first/samples/%00",
            "/%ff%fe",
            "/api/runs/%ff/metrics",
        ),
    ],
)
def test_no_path_leads_out(served: Server, path: str) -> None:
    answer = served.get(path)
    assert is_refused(answer, 404, 405)
    assert b"import" not in answer.body
    assert b"root:" not in answer.body


def test_a_path_that_is_an_address_is_none(served: Server) -> None:
    host = served.url.removeprefix("http://")
    for target in ("http://evil.example/health", "*", "health", f"http://{host}/etc/passwd"):
        assert is_refused(raw(served, f"GET {target} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()), 400, 404, 421)


# -- bombs


def test_a_bomb_of_headers_is_refused(served: Server) -> None:
    head = f"GET /health HTTP/1.1\r\nHost: {served.url.removeprefix('http://')}\r\n".encode()
    for bomb in (
        b"X: " + b"a" * 100_000 + b"\r\n",
        b"".join(b"X-%d: a\r\n" % number for number in range(20_000)),
        b"\0: a\r\n",
    ):
        assert is_refused(raw(served, head, bomb, b"\r\n"), 400, 431)
    assert is_refused(raw(served, b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"), 400, 404, 414)
    assert is_refused(raw(served, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"), 400)  # a client of https


@pytest.mark.parametrize("path", POSTS[:4])
def test_a_bomb_of_a_body_is_refused(served: Server, path: str) -> None:
    large = b'{"prompt": "' + b"a" * (2 << 20) + b'"}'
    assert is_refused(post(served, large, path), 413)
    assert is_refused(post(served, b"", path, **{"Content-Length": "9" * 30}), 400, 413)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    pieces = [b"10000\r\n" + large[start : start + 65536].ljust(65536) + b"\r\n" for start in range(0, len(large), 65536)]
    assert is_refused(raw(served, head.encode(), *pieces, b"0\r\n\r\n"), 413)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000 + b"]" * 100_000,
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"prompt": "a", "seed": ' + b"9" * 4000 + b"}",
        b'{"prompt": "a", "seed": ' + b"9" * 100_000 + b"}",
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": -Infinity}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "max_tokens": 1e999}',
        b'{"prompt": [' + b"9" * 4000 + b"]}",
        b'{"prompt": [-1]}',
        b'{"prompt": "a", "logit_bias": {"' + b"9" * 5000 + b'": 1}}',
        b'{"prompt": "a", "logit_bias": {"999999": 1}}',
        b'{"prompt": "\\ud800"}',
        b'\xff\xfe{"prompt": "a"}',
        b"",
        b"null",
        b'"text"',
        b'{"prompt": "a", "n": 1000000000}',
        b'{"prompt": ' + json.dumps(["a"] * 10_000).encode() + b"}",
        b'{"prompt": "a", "stop": ' + json.dumps(["a"] * 10_000).encode() + b"}",
        b'{"prompt": "a", "stop": "' + b"a" * 10_000 + b'"}',
    ],
    ids=lambda body: ascii(body[:30])[2:-1],
)
def test_json_that_is_made_to_hurt_is_one_sentence(served: Server, body: bytes) -> None:
    answer = post(served, body)
    assert is_refused(answer, 400)
    assert len(answer.body) < 5000  # at most a number's 4,300 digits


def test_no_depth_of_json_makes_the_server_fail(served: Server) -> None:
    """Where reading it still succeeds, showing it may not."""
    for depth in (300, *range(930, 1000, 2), 3000):
        nested = b"[" * depth + b"]" * depth
        for field in (b"prompt", b"seed", b"tools", b"messages"):
            answer = post(served, b'{"prompt": "a", "%b": %b}' % (field, nested))
            assert answer.status in ((200, 400) if field == b"messages" else (400,)), (depth, field, answer.body)


def test_a_very_long_prompt_or_text_is_refused_with_its_length(served: Server) -> None:
    answer = served.post("/v1/completions", {"model": "talker", "prompt": "the lamp " * 115_000, "max_tokens": 1})
    assert is_refused(answer, 400)
    assert answer.error["code"] == "context_length_exceeded"
    for slide, code in ((False, "context_length_exceeded"), (True, None)):
        body = {"model": "talker", "prompt": "the", "max_tokens": 10**9, "slide": slide}
        answer = served.post("/v1/completions", body)
        assert is_refused(answer, 400)
        assert (answer.error["code"], answer.error["param"]) == (code, "max_tokens")
    served.wait_until_idle()


def test_other_requests_are_answered_while_a_very_long_prompt_is_read(served: Server) -> None:
    """A word of a megabyte takes a tokenizer 0.4 s."""
    answers: list[Answered] = []
    body = {"model": "talker", "prompt": "thelamp" * 149_000, "max_tokens": 1}
    reading = threading.Thread(target=lambda: answers.append(served.post("/v1/completions", body)))
    reading.start()
    others = 0
    while reading.is_alive():
        assert served.get("/health").status == 200
        others += 1
    reading.join()
    assert is_refused(answers[0], 400)
    assert others > 10


def test_stops_are_texts_and_no_patterns(served: Server) -> None:
    whole = served.complete(model="talker", prompt="the", max_tokens=60, seed=1)["choices"][0]
    stops = ["(a+)+$", "(.*)*", "[", "\\"]
    assert served.complete(model="talker", prompt="the", max_tokens=60, seed=1, stop=stops)["choices"][0]["text"] == (
        min((whole["text"].partition(stop)[0] for stop in stops), key=len)
    )
    within = whole["text"][5:8]
    stopped = served.complete(model="talker", prompt="the", max_tokens=60, seed=1, stop=[within])["choices"][0]
    assert stopped["text"] == whole["text"].partition(within)[0]
    assert stopped["finish_reason"] == "stop"


# -- other sites


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "", "[", "a@b"]
)
def test_a_name_that_was_bound_to_this_address_is_not_answered(served: Server, host: str) -> None:
    for method, path in (
        ("GET", "/"),
        ("GET", "/v1/models"),
        ("POST", "/v1/completions"),
        ("GET", "/page/base.css"),
        ("GET", "/health"),
    ):
        assert is_refused(served.request(method, path, headers={"Host": host}), 421)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.0.0.1:1", "localhost", "LOCALHOST:8000", "[::1]:8000", "a.localhost", "192.168.1.2"]
)
def test_addresses_and_this_machines_names_are_answered(served: Server, host: str) -> None:
    assert served.get("/v1/models", Host=host).status == 200


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example", "null", "http://127.0.0.1:1", "http://[", "//", "file://", "http://localhost.evil.example"],
)
def test_a_page_of_another_site_may_not_ask(served: Server, origin: str) -> None:
    body = {"model": "talker", "prompt": "a", "max_tokens": 1}
    for path in API[:6]:
        assert is_refused(served.get(path, Origin=origin), 403)
    for path in POSTS:
        answer = served.post(path, body, Origin=origin)
        assert is_refused(answer, 403)
        assert "access-control-allow-origin" not in answer.headers
    asks = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    answer = served.request("OPTIONS", "/v1/completions", headers=asks)
    assert is_refused(answer, 403)
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_the_servers_own_page_may_ask(served: Server) -> None:
    body = {"model": "talker", "prompt": "a", "max_tokens": 1}
    assert served.post("/v1/completions", body, Origin=served.url, **{"Sec-Fetch-Site": "same-origin"}).status == 200


def test_what_a_form_can_send_is_refused(served: Server) -> None:
    body = b'{"model": "talker", "prompt": "a", "max_tokens": 1}'
    for kind in ("application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/plain", "", "application/jsonx"):
        for path in POSTS:
            assert is_refused(served.request("POST", path, body, {"Content-Type": kind}), 415)
    for site in ("cross-site", "same-site", "anything"):
        assert is_refused(post(served, body, **{"Sec-Fetch-Site": site}), 403)
    assert is_refused(served.request("OPTIONS", "/v1/completions"), 405)


# -- a key, and a site that may ask


@pytest.fixture(scope="module")
def locked(runs_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a key, which pages of one other site may use."""
    folder = tmp_path_factory.mktemp("locked")
    (folder / "key").write_text(KEY + "\n")
    given = (
        "--model",
        f"talker={runs_folder / 'talker'}",
        runs_folder,
        "--api-key-file",
        folder / "key",
        "--allow-origin",
        SITE,
    )
    with Server(folder, *given) as server:
        yield server


def test_without_the_key_only_the_pages_are_answered(locked: Server) -> None:
    answers = []
    for header in (
        *({}, {"Authorization": f"Bearer {KEY}x"}, {"Authorization": f"Bearer {KEY[:-1]}"}, {"Authorization": "Bearer "}),
        *({"Authorization": KEY}, {"Authorization": f"Basic {KEY}"}, {"Authorization": "Bearer \xe9\xff"}, {"X-Api-Key": KEY}),
    ):
        given: dict[str, str] = dict(header)
        for path in API:
            answers.append(locked.get(path, **given))
            assert is_refused(answers[-1], 401), path
            assert answers[-1].headers["www-authenticate"] == "Bearer"
        for path in POSTS:
            answers.append(locked.post(path, {"model": "talker", "prompt": "a", "max_tokens": 1}, **given))
            assert is_refused(answers[-1], 401), path
    for path in (
        "/page/../metrics",
        "/page/%2e%2e/metrics",
        "//metrics",
        "/runs/",
        "/health/",
        "/metrics/",
        "/Page/x",
        "/v1/models?key=" + KEY,
    ):
        answers.append(locked.get(path))
        assert is_refused(answers[-1], 401, 404), path
    for path in PAGES:
        answers.append(locked.get(path))
        assert answers[-1].status == 200, path
    bearer = {"Authorization": f"Bearer {KEY}"}
    for path in ("/v1/models", "/metrics", "/api/runs", "/api/runs/first/metrics", "/api/runs/first/options", "/nothing"):
        answers.append(locked.get(path, **bearer))
        assert answers[-1].status == (404 if path == "/nothing" else 200), path
    answers.append(
        locked.post("/v1/completions", {"model": "talker", "prompt": "a", "max_tokens": 1}, Authorization=f"bearer  {KEY}")
    )
    assert answers[-1].status == 200
    assert KEY not in locked.log
    assert not [answer for answer in answers if KEY.encode() in answer.body or KEY in str(answer.headers)]


def test_only_the_site_that_was_named_may_read_the_answers(locked: Server) -> None:
    bearer = {"Authorization": f"Bearer {KEY}"}
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, content-type"}
    answer = locked.request("OPTIONS", "/v1/completions", headers={"Origin": SITE, **asks})
    assert answer.status == 204
    assert answer.headers["access-control-allow-origin"] == SITE
    assert answer.headers["access-control-allow-headers"] == "authorization, content-type"
    for path in ("/v1/models", "/nothing", "/api/runs"):
        answer = locked.get(path, Origin=SITE, **bearer)
        assert answer.headers["access-control-allow-origin"] == SITE
        assert "Origin" in answer.headers["vary"]
    assert locked.get("/v1/models", Origin=SITE).headers["access-control-allow-origin"] == SITE  # the page has to read the 401
    for origin in (f"{SITE}.evil.example", "http://a.example", f"{SITE}:8000", "null", "https://b.example"):
        for answer in (
            locked.get("/v1/models", Origin=origin, **bearer),
            locked.request("OPTIONS", "/v1/completions", headers={"Origin": origin, **asks}),
        ):
            assert is_refused(answer, 403)
            assert not [name for name in answer.headers if name.startswith("access-control")]
    assert "access-control-allow-origin" not in locked.get("/v1/models", **bearer).headers


def test_other_machines_reach_only_a_server_with_a_key(onym: Run, monkeypatch: pytest.MonkeyPatch, runs_folder: Path) -> None:
    monkeypatch.delenv("ONYM_API_KEY", raising=False)
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        done = onym("serve", runs_folder, "--host", host, "--port", 0)
        assert done.returncode == 2
        assert done.stdout == ""
        (sentence,) = done.stderr.splitlines()
        assert "--api-key-file" in sentence
    for key in ("short", "has a space in it", "is not ascii é"):
        done = onym("serve", runs_folder, "--host", "0.0.0.0", "--port", 0, "--api-key", key)
        assert done.returncode == 2
        assert key not in done.stderr


# -- what is shown, and what is written down


def test_markup_in_runs_comes_back_as_json_only(runs_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / MARKUP
    (run / "samples").mkdir(parents=True)
    (run / "run.json").write_text((runs_folder / "first" / "run.json").read_text())
    (run / "samples" / "step-000000001.txt").write_text(SAMPLE)
    with Server(tmp_path, tmp_path / "runs") as server:
        (listed,) = server.get("/api/runs").json["runs"]
        assert listed["name"] == MARKUP
        at = f"/api/runs/{quote(MARKUP, safe='')}"
        assert server.get(f"{at}/samples/1").json == {"step": 1, "text": SAMPLE}
        for path in (
            "/api/runs",
            f"{at}/samples/1",
            f"{at}/samples",
            f"{at}/options",
            "/v1/models",
            f"{at}/metrics",
            f"{at}/{MARKUP}",
            "/" + quote(SAMPLE),
        ):
            answer = server.get(path.replace("<", "%3C").replace(" ", "%20"))
            assert answer.headers["content-type"] == "application/json", path
            assert is_guarded(answer)
        answer = server.post("/v1/completions", {"model": SAMPLE, "prompt": SAMPLE})
        assert is_refused(answer, 404)
        for path in ("/", "/runs"):
            assert b"onerror" not in server.get(path).body


def test_every_answer_has_the_policy(served: Server) -> None:
    for path in (
        *PAGES,
        *(path for path in API if path != "/api/events"),
        "/api/runs/first/metrics.csv",
        "/page/uplot/nothing",
        "/runs/",
    ):
        assert is_guarded(served.get(path)), path
    for path in POSTS:
        assert is_guarded(served.post(path, {}))
        assert is_guarded(served.request("PUT", path))
        assert is_guarded(served.request("HEAD", path))
    connection = served.begin(model="talker", prompt="a", max_tokens=2)
    answer = connection.getresponse()
    assert is_guarded(Answered(200, {name.lower(): value for name, value in answer.getheaders()}, answer.read()))
    connection.close()


def test_no_prompt_is_in_the_log(served: Server) -> None:
    prompt = "xylophone zeppelin"
    wrong: list[dict[str, Any]] = [
        *(
            {},
            {"max_tokens": 10**9},
            {"temperature": -1},
            {"model": prompt},
            {"stop": prompt * 100},
            {"n": prompt},
            {"max_tokens": 2, "unknown": prompt},
        ),
        *({"tools": [prompt]}, {"logit_bias": {prompt: 1}}, {"seed": prompt}),
    ]
    for fields in wrong:
        served.post("/v1/completions", {"model": "talker", "prompt": prompt, **fields})
        served.post("/v1/chat/completions", {"model": "talker", "messages": [{"role": "user", "content": prompt}], **fields})
    served.post("/v1/chat/completions", {"model": "talker", "messages": [{"role": prompt, "content": prompt}]})
    served.post("/tokenize", {"prompt": prompt * 1000})
    post(served, b'{"prompt": "xylophone zeppelin')
    served.get(f"/v1/models/{quote(prompt)}")
    for chunk in served.stream(model="talker", prompt=prompt, max_tokens=3, stream_options={"include_usage": True}):
        assert chunk
    connection = served.begin(model="talker", prompt=prompt, max_tokens=5000, slide=True)
    connection.close()
    served.wait_until_idle()
    assert "xylophone" not in served.log
    assert "Traceback" not in served.log


# -- what a reviewer found


def test_a_picture_on_another_site_opens_no_model(served: Server) -> None:
    """Such a GET has no Origin; a link to a page may be followed from anywhere."""
    for site in ("cross-site", "same-site"):
        for path in ("/tokenizer_info?model=first@10", "/v1/models", "/api/runs"):
            answer = served.get(path, **{"Sec-Fetch-Site": site})
            assert (answer.status, answer.error["code"]) == (403, "wrong_origin")
        assert served.get("/", **{"Sec-Fetch-Site": site}).status == 200
    assert served.get("/v1/models", **{"Sec-Fetch-Site": "same-origin"}).status == 200


def test_a_site_that_is_allowed_may_send_the_headers_of_openais_client(runs_folder: Path, tmp_path: Path) -> None:
    with Server(tmp_path, runs_folder / "talker", "--allow-origin", "https://a.example") as server:
        asked = {"Origin": "https://a.example", "Access-Control-Request-Headers": "authorization, x-stainless-os"}
        answer = server.request("OPTIONS", "/v1/completions", headers=asked)
        assert answer.status == 204
        assert answer.headers["access-control-allow-headers"] == "authorization, x-stainless-os"
        refused = server.request("OPTIONS", "/v1/completions", headers={**asked, "Origin": "https://b.example"})
        assert refused.status == 403


def test_a_step_that_is_a_link_out_of_the_folder_is_not_opened(runs_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(runs_folder / "first", tmp_path / "runs" / "linked")
    step = tmp_path / "runs" / "linked" / "checkpoints" / "step-000000030"
    step.rename(tmp_path / "outside")
    step.symlink_to(tmp_path / "outside")
    with Server(tmp_path, tmp_path / "runs") as server:
        for name in ("linked", "linked@30", "linked@20"):
            assert server.post("/v1/completions", {"model": name}).status == 403


def test_answers_name_no_path_of_this_machine(runs_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(runs_folder / "first", tmp_path / "runs" / "cut")
    for weights in (tmp_path / "runs" / "cut").rglob("*.safetensors"):
        weights.write_bytes(weights.read_bytes()[:1000])
    with Server(tmp_path, tmp_path / "runs") as server:
        for name in ("cut", "cut@10", "cut@11"):
            answer = server.post("/v1/completions", {"model": name})
            assert answer.status == 404
            assert str(tmp_path) not in answer.body.decode()
        assert "'cut' cannot be served" in server.log
