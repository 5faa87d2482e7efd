"""Rewards from a server on this machine, which sometimes fails."""

import datetime
import http.server
import itertools
import json
import math
import threading

import numpy as np
import pytest

from pjrlhf.errors import UserError
from pjrlhf.rewards.server import retry_after
from pjrlhf.rewards.sources import RecordColumns, SourceFailed, reward_source


@pytest.fixture
def server():
    """(URL, sizes of the batches that were answered, list of faults to come, what it heard)."""
    sizes, faults, heard, after = [], [], [], ["0.01"]

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            fault = faults.pop(0) if faults else 200
            heard.append((body, self.headers.get("Authorization")))
            if "down" in body["completions"]:
                fault = 503
            if fault == "noise":
                return self.wfile.write(b"what is this\r\n\r\n")
            if fault == "cut":
                return self.connection.close()
            rewards = [len(text) if text else None for text in body["completions"]]
            text = json.dumps({"rewards": rewards[:-1] if fault == "short" else rewards})
            if fault == "half":
                text = text[:5]
            self.send_response(fault if isinstance(fault, int) else 200)
            self.send_header("Retry-After", after[0])
            if fault == 302:
                self.send_header("Location", "/new")
            if fault == "early":
                self.send_header("Content-Length", "999")
            self.end_headers()
            self.wfile.write(text.encode())
            if fault == 200:
                sizes.append(len(rewards))
            return None

    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{found.server_port}/score", sizes, faults, heard
    found.shutdown()
    found.server_close()


def test_batches_come_back_in_order_whatever_the_server_does(server):
    url, sizes, faults, _ = server
    faults.extend([503, 429, 200, 500, 520, 524, 529])
    source = reward_source("P2A", {"kind": "http", "url": url, "batch_size": 4, "concurrency": 3})
    texts = ["x" * (i % 7) for i in range(22)]
    found = source(["q"] * 22, texts)
    assert [None if value != value else value for value in found.tolist()] == [len(text) or None for text in texts]
    assert sorted(sizes) == [2, 4, 4, 4, 4, 4]


@pytest.mark.parametrize("fault", ["cut", "half", "early", "noise"])
def test_a_cut_reply_is_asked_for_again(server, fault, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    url, sizes, faults, _ = server
    faults.append(fault)
    assert reward_source("P2A", {"kind": "http", "url": url})(["q"], ["abc"]).tolist() == [3] and sizes == [1]


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ([404], "replied HTTP 404"),
        ([302], "replied HTTP 302, it is now "),
        ([401], "replied HTTP 401, it refuses the key; set key_variable to the variable that holds a key"),
        ([403], "replied HTTP 403, it refuses the key"),
        (["short"], 'it must reply {"rewards": [...]} with 1 numbers or nulls'),
        ([503] * 9, "no reply after 2 tries (HTTP 503); check the server"),
    ],
)
def test_errors_name_the_server(server, faults, message):
    server[2].extend(faults)
    with pytest.raises(UserError) as error:
        reward_source("P2A", {"kind": "http", "url": server[0], "retries": 1})(["q"], ["abc"])
    assert f"reward server {server[0]}" in str(error.value) and message in str(error.value)


def test_a_server_that_is_not_there_and_wrong_settings():
    with pytest.raises(UserError, match=r"reward server http://127\.0\.0\.1:9/: no reply after 1 tries \(.*refused"):
        reward_source("P2A", {"kind": "http", "url": "http://127.0.0.1:9/", "retries": 0})(["q"], ["abc"])
    for settings, message in itertools.chain(
        [({"url": url}, "is no address") for url in ("localhost:9", "http://", "http://a b/", "http://h:99999/")],
        [
            ({"url": "http://h", "batch_size": 0}, "of 1 or more"),
            ({"url": "http://me:secret@h/"}, r"http://\*\*\*@h/: has a login in its address, which is not sent"),
            ({"url": None}, r"rewards\.P2A\.url: None is not text"),
        ],
        [
            ({"url": "http://h", "timeout": "5"}, "timeout: '5' is not a number"),
            ({"url": "http://h", "retries": 1.5}, "1.5"),
        ],
        [({"url": "http://h", "tries": 3}, "does not take these settings")],
    ):
        with pytest.raises(UserError, match=message):
            reward_source("P2A", {"kind": "http", **settings})


def test_columns_and_the_key_are_sent(server, monkeypatch):
    url, _, _, heard = server
    monkeypatch.setenv("REWARD_KEY", "secret")
    source = reward_source("P2A", {"kind": "http", "url": url, "batch_size": 2, "key_variable": "REWARD_KEY"})
    source.check_columns(["level"])
    source(["q", "r", "s"], ["a", "bb", "c"], RecordColumns({"level": [1, 2, 3]}))
    heard.sort(key=lambda one: one[0]["prompts"])
    assert heard == [
        ({"prompts": ["q", "r"], "completions": ["a", "bb"], "columns": {"level": [1, 2]}}, "Bearer secret"),
        ({"prompts": ["s"], "completions": ["c"], "columns": {"level": [3]}}, "Bearer secret"),
    ]
    source(["q"], ["a"])
    assert heard[-1][0] == {"prompts": ["q"], "completions": ["a"]}
    with pytest.raises(UserError, match=r"\$NO_SUCH_KEY is not set; set it to the key of the server"):
        reward_source("P2A", {"kind": "http", "url": url, "key_variable": "NO_SUCH_KEY"})


def test_a_wrong_key_is_not_tried_again_nor_tolerated(server, monkeypatch):
    url, _, faults, heard = server
    faults.extend([401] * 9)
    source = reward_source("P2A", {"kind": "http", "url": url, "batch_size": 1, "concurrency": 1, "missing": 1.0})
    with pytest.raises(UserError, match="it refuses the key"):
        source(["q"] * 3, ["a"] * 3)
    assert len(heard) <= 3


def test_a_part_without_a_reply_has_no_reward_within_the_share(server):
    url, _, _, _ = server
    spec = {"kind": "http", "url": url, "retries": 1, "batch_size": 2}
    texts = ["a", "bb", "down", "d", "eee"]
    found = reward_source("P2A", {**spec, "missing": 0.4})(["q"] * 5, texts)
    np.testing.assert_array_equal(found, np.float32([1, 2, np.nan, np.nan, 3]))
    with pytest.raises(
        UserError, match=r"no reply after 2 tries \(HTTP 503\); check the server; it failed for more than"
    ):
        reward_source("P2A", {**spec, "missing": 0.3})(["q"] * 5, texts)


def test_columns_are_valid_json_whatever_they_hold(server):
    url, _, _, heard = server
    values = [math.nan, 2**70, np.float32(0.5), datetime.date(2026, 3, 1), b"\xff", [np.int64(3), -math.inf]]
    source = reward_source("P2A", {"kind": "http", "url": url})
    source(["q"] * 6, ["a"] * 6, RecordColumns({"level": values}))
    assert heard[0][0]["columns"]["level"] == [None, 2**70, 0.5, "2026-03-01", "/w==", [3, None]]
    with pytest.raises(SourceFailed) as error:
        reward_source("P2A", {"kind": "http", "url": url, "retries": 0})(
            ["q"] * 6, ["down"] * 6, RecordColumns({"level": values})
        )
    json.dumps(error.value.batch, allow_nan=False)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("3", 3),
        ("0.5", 0.5),
        ("0", 7),
        ("-1", 7),
        ("", 7),
        ("inf", 7),
        ("nan", 7),
        ("soon", 7),
        ((1, "%a, %d %b %Y %H:%M:%S GMT"), 3600),  # hours from now, and the form of a date
        ((1, "%a, %d %b %Y %H:%M:%S -0000"), 3600),
        ((-1, "%a, %d %b %Y %H:%M:%S GMT"), 7),
    ],
)
def test_servers_say_when_to_come_back_in_seconds_or_by_a_date(header, seconds):
    if isinstance(header, tuple):
        hours, form = header
        header = (datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=hours)).strftime(form)
    assert retry_after(header, 7) == pytest.approx(seconds, abs=600 if seconds == 3600 else 0)
