"""Downloads against a real HTTP server on loopback that misbehaves, one way at a time.

Run: uv run pytest tests/test_prepare_download.py
"""

import hashlib
import http.server
import json
import random
import shutil
import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepare_fixtures import copy_prepare, english, error_line, load_prepare

ALL = [f"shard_{i:05d}.parquet" for i in range(6)]  # of the hub data set: four to train on, then test, then validation
REPLIES = {  # a misbehaviour: status, body, headers
    "broken": (500, b"", {}),
    "busy": (503, b"", {"Retry-After": "1"}),
    "too many": (429, b"", {"Retry-After": "1"}),
    "html": (200, b"<html>please sign in</html>", {}),
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """The data set: {file name: bytes}."""
    folder, rng = tmp_path_factory.mktemp("shards"), random.Random(8)
    for name in ALL:
        table = pa.table({"text": [english(rng, 30) for _ in range(400)]})
        pq.write_table(table, folder / name, row_group_size=150, compression="none")
    return {name: (folder / name).read_bytes() for name in ALL}


class Hub:
    """A Hugging Face endpoint. plans: {file name: list of misbehaviours, one for each request, then none}."""

    def __init__(self, shards):
        self.shards = dict(shards)
        self.plans = {}
        self.listing = {"default": {"test": ["unused"], "train": [f"https://elsewhere.example/cdn/{n}" for n in ALL]}}
        self.linked = True  # it names size and SHA-256 where it redirects
        self.ranges = []
        self.times = defaultdict(list)
        self.tokens = set()
        self.stall = threading.Event()
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_GET(self):
                hub.answer(self)

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # a client that went away
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    @property
    def requests(self):
        return Counter({name: len(times) for name, times in self.times.items()})

    def close(self):
        self.stall.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def answer(self, request):
        name = request.path.rpartition("/")[2]
        data = self.shards.get(name)
        if request.path.startswith("/api/"):
            self.send(request, 200, json.dumps(self.listing).encode())
        elif data and self.linked and "/resolve/" in request.path:  # as the hub: a redirect to a storage
            self.tokens.add(request.headers.get("Authorization"))
            digest = hashlib.sha256(data).hexdigest()
            headers = {"Location": f"/cdn/{name}", "X-Linked-Size": len(data), "X-Linked-Etag": f'"{digest}"'}
            self.send(request, 302, b"", headers)
        else:
            self.times[name].append(time.monotonic())
            plan = self.plans.get(name)
            self.serve(request, name, data, plan.pop(0) if plan else "well")

    def serve(self, request, name, data, how):
        start = 0
        if (asked := request.headers.get("Range")) and how != "no ranges":
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            self.ranges.append((name, start))
        if data is None:
            return self.send(request, 404, b"no such entry")
        if start >= len(data):
            return self.send(request, 416, b"", {"Content-Range": f"bytes */{len(data)}"})
        if how in REPLIES:
            return self.send(request, *REPLIES[how])
        if how == "silent":
            return self.stall.wait(20)
        body = data[start:]
        if how == "corrupt":
            body = bytes(len(body))
        if how == "too short":  # a wrong Content-Length that nothing reveals but the redirect
            body = body[: len(body) // 2]
        sent = 20_000 if how in ("truncate", "stall") else len(body)
        headers = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        self.send(request, 206 if start else 200, body, headers, sent)
        if how == "stall":
            self.stall.wait(20)
        return None

    def send(self, request, status, body, headers=(), sent=None):
        request.send_response(status)
        for key, value in (dict(headers) | {"Content-Length": len(body)}).items():
            request.send_header(key, str(value))
        request.end_headers()
        request.wfile.write(body[:sent])
        request.wfile.flush()
        request.close_connection = True


@pytest.fixture
def hub(shards, monkeypatch):
    hub = Hub(shards)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield hub
    hub.close()


@pytest.fixture
def evaluator(hub, tmp_path):
    path = copy_prepare(tmp_path, "web", "someone/corpus", hub_shards=len(ALL))
    evaluator = load_prepare(path, "web", tmp_path / "cache")
    evaluator.BACKOFF_SECONDS = 0.01
    return evaluator


def assert_fetched(evaluator, hub, names):
    folder = evaluator.CACHE / "text"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {name: hub.shards[name] for name in names}


def test_download_takes_the_first_shards_and_the_two_held_out(evaluator, hub):
    """Validation is the last shard, test the one before it."""
    assert evaluator.main(["--num-shards", "2", "--download-workers", "3"]) == 0
    assert hub.tokens == {"Bearer hf_secret"}
    assert_fetched(evaluator, hub, [ALL[0], ALL[1], ALL[4], ALL[5]])
    tokenizer = evaluator.Tokenizer.from_directory()
    for split, name in {"val": ALL[5], "test": ALL[4], "shard_00000": ALL[0]}.items():
        text = pq.read_table(evaluator.CACHE / "text" / name)["text"][0].as_py()
        tokens = evaluator._read_shard(evaluator._tokens_path(split)).tokens[: len(text)].tolist()
        assert tokenizer.decode(tokens[1:]).startswith(text[:40])
    manifest = evaluator._manifest()
    assert list(manifest["train_tokens"]) == ["shard_00000", "shard_00001"]
    requests = hub.requests
    assert evaluator.main(["--num-shards", "2"]) == 0  # nothing to do
    assert hub.requests == requests and evaluator._manifest() == manifest
    assert evaluator.main(["--num-shards", "-1"]) == 0  # more training shards: the metric's digest stays
    assert_fetched(evaluator, hub, ALL)
    assert evaluator.main(["--num-shards", "1"]) == 0  # fewer: what is there stays
    assert len(evaluator._manifest()["train_tokens"]) == 4 and evaluator._manifest()["digest"] == manifest["digest"]


def test_download_survives_a_server_that_is_bad_once_in_every_way(evaluator, hub):
    hub.plans = {
        ALL[0]: ["truncate"],
        ALL[1]: ["too short"],
        ALL[2]: ["broken", "corrupt"],
        ALL[3]: ["html"],
        ALL[4]: ["busy"],
        ALL[5]: ["well", "too many"],  # the first request asks for the size of the last shard
    }
    assert evaluator.main(["--num-shards", "-1"]) == 0
    assert_fetched(evaluator, hub, ALL)
    assert hub.requests == {ALL[0]: 2, ALL[1]: 2, ALL[2]: 3, ALL[3]: 2, ALL[4]: 2, ALL[5]: 3}
    for name in (ALL[4], ALL[5]):
        before, again = hub.times[name][-2:]
        assert again - before > 1  # Retry-After
    assert {name for name, start in hub.ranges if start > 0} == {ALL[0]}  # what came whole and wrong begins again


def test_download_goes_on_through_a_line_that_stalls_or_always_breaks(evaluator, hub):
    evaluator.HTTP_TIMEOUT = (5, 0.5)
    evaluator.ATTEMPTS = 2  # more failures than attempts, but each brought new bytes
    hub.plans = {ALL[0]: ["truncate"] * 3, ALL[1]: ["stall"]}
    assert evaluator.main(["--num-shards", "2"]) == 0
    assert_fetched(evaluator, hub, [ALL[0], ALL[1], ALL[4], ALL[5]])
    assert any(name == ALL[1] and start > 0 for name, start in hub.ranges)


def test_download_without_the_hubs_headers_takes_a_whole_part_drops_a_bad_one_and_needs_no_ranges(evaluator, hub):
    hub.linked = False
    hub.plans = {ALL[2]: ["no ranges"], ALL[3]: ["truncate"], ALL[4]: ["html"]}
    text = evaluator.CACHE / "text"
    text.mkdir(parents=True)
    for name, part in {ALL[0]: hub.shards[ALL[0]], ALL[1]: hub.shards[ALL[1]] + b"rest", ALL[2]: b"x" * 1000}.items():
        (text / f"{name}.part").write_bytes(part)
    assert evaluator.main(["--num-shards", "-1"]) == 0
    assert_fetched(evaluator, hub, ALL)
    assert [hub.requests[name] for name in ALL[:4]] == [1, 2, 1, 2]


def test_download_names_what_is_missing_and_the_next_run_resumes(evaluator, hub, tmp_path, capsys):
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "other.parquet")
    whole = dict(hub.shards)
    hub.shards[ALL[0]] = (tmp_path / "other.parquet").read_bytes()
    del hub.shards[ALL[1]]
    hub.plans = {ALL[2]: ["silent"] * 2, ALL[3]: ["corrupt"] * 2}
    evaluator.HTTP_TIMEOUT, evaluator.ATTEMPTS = (5, 0.5), 2
    assert evaluator.main(["--num-shards", "-1"]) == 1
    error = error_line(capsys)
    assert error.startswith("error: 4 of 6 shards are missing: ")
    assert "not a readable parquet file with a text column (" in error
    assert "shard_00001.parquet (404" in error and hub.requests[ALL[1]] == 1  # what is refused is not asked for again
    assert "shard_00002.parquet (HTTP" in error and "timed out" in error and hub.requests[ALL[2]] == 2
    assert "shard_00003.parquet (it came with a wrong SHA-256)" in error
    assert error.endswith("Running the same command again resumes")
    hub.shards = whole
    requests = hub.requests
    assert evaluator.main(["--num-shards", "-1"]) == 0
    assert_fetched(evaluator, hub, ALL)
    assert hub.requests[ALL[4]] == requests[ALL[4]]


def test_full_disk_is_refused_before_the_download(evaluator, hub, monkeypatch, capsys):
    monkeypatch.setattr(evaluator.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**5))
    hub.shards = {name: data + bytes(10**7) for name, data in hub.shards.items()}
    assert evaluator.main(["--num-shards", "-1"]) == 1
    error = error_line(capsys)
    assert "6 shards need about 0.2 GB, 0.0 GB are free" in error and "--num-shards" in error
    assert not any((evaluator.CACHE / "text").glob("*.parquet*"))


def test_listed_data_set_is_fetched_and_split_and_an_unknown_one_is_told(hub, tmp_path, capsys):
    evaluator = load_prepare(copy_prepare(tmp_path, "listed", "some.one/corpus-2"), "listed", tmp_path / "cache")
    listing = hub.listing
    hub.listing = {}
    assert evaluator.main([]) == 1
    assert error_line(capsys).startswith("error: source 'some.one/corpus-2' is no local path, and http")
    hub.listing = listing
    assert evaluator.main(["--num-shards", "5"]) == 0
    fetched = sorted((evaluator.CACHE / "download").iterdir())
    assert [path.read_bytes() for path in fetched] == [hub.shards[name] for name in ALL[:5]]
    texts = {path.stem: pq.read_table(path)["text"].to_pylist() for path in evaluator.CACHE.glob("text/*.parquet")}
    assert set(texts) == {"val", "test", *(f"train_{i:05d}" for i in range(8))}
    source = [text for path in fetched for text in pq.read_table(path)["text"].to_pylist()]
    assert sum(map(len, source)) == sum(len(piece) for pieces in texts.values() for piece in pieces)
    requests = hub.requests
    assert evaluator.main([]) == 0
    assert hub.requests == requests


def test_two_preparations_at_once_do_the_work_once(evaluator, hub, capsys):
    """A lock is held by an open file, so two threads stand for two processes."""
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(evaluator.main, [["--num-shards", "2"]] * 2)) == [0, 0]
    assert f"waiting: another preparation works here (lock {evaluator.CACHE}/prepare.lock)" in capsys.readouterr().err
    assert sum(hub.requests.values()) == 5  # four shards, and one question for the size
