"""Downloads against a real HTTP server on loopback that misbehaves, one way at a time."""

import hashlib
import http.server
import json
import random
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepare_fixtures import copy_prepare, english, error_line, load_prepare

ALL = [f"shard_{i:05d}.parquet" for i in range(6)]  # of the hub data set: four to train on, then test, then validation
REPLIES = {  # a misbehaviour: status, body, headers
    "broken": (500, b"", {}),
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
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Hub(http.server.ThreadingHTTPServer):
    """A Hugging Face endpoint. plans: {file name: list of misbehaviours, one for each request, then none}."""

    daemon_threads = True

    def __init__(self, shards):
        super().__init__(("127.0.0.1", 0), Handler)
        self.shards = dict(shards)
        self.plans = {}
        self.listing = {"default": {"test": ["unused"], "train": [f"https://elsewhere.example/cdn/{n}" for n in ALL]}}
        self.linked = True  # it names the SHA-256 where it redirects
        self.ranges = []
        self.times = defaultdict(list)
        self.tokens = set()
        self.stall = threading.Event()

    def handle_error(self, *_):
        """A client that went away."""

    def requests(self):
        return {name: len(times) for name, times in self.times.items()}


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        hub = self.server
        name = self.path.rpartition("/")[2]
        data = hub.shards.get(name)
        if self.path.startswith("/api/"):
            self.answer(200, json.dumps(hub.listing).encode())
        elif data and hub.linked and "/resolve/" in self.path:  # as the hub: a redirect to a storage
            hub.tokens.add(self.headers.get("Authorization"))
            digest = hashlib.sha256(data).hexdigest()
            self.answer(302, b"", {"Location": f"/cdn/{name}", "X-Linked-Etag": f'"{digest}"'})
        else:
            hub.times[name].append(time.monotonic())
            plan = hub.plans.get(name)
            self.serve(name, data, plan.pop(0) if plan else "well")

    def serve(self, name, data, how):
        start = 0
        if (asked := self.headers.get("Range")) and how != "no ranges":
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            self.server.ranges.append((name, start))
        if data is None:
            self.answer(404, b"no such entry")
        elif start >= len(data):
            self.answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        elif how in REPLIES:
            self.answer(*REPLIES[how])
        elif how == "silent":
            self.server.stall.wait(20)
        else:
            body = bytes(len(data) - start) if how == "corrupt" else data[start:]
            if how == "too short":  # a wrong Content-Length that nothing reveals but the redirect
                body = body[: len(body) // 2]
            headers = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
            self.answer(206 if start else 200, body, headers, sent=20_000 if how in ("truncate", "stall") else None)
            if how == "stall":
                self.server.stall.wait(20)

    def answer(self, status, body, headers=(), sent=None):
        self.send_response(status)
        for key, value in (dict(headers) | {"Content-Length": len(body)}).items():
            self.send_header(key, str(value))
        self.end_headers()
        self.wfile.write(body[:sent])


@pytest.fixture
def hub(shards, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with Hub(shards) as hub:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
        thread = threading.Thread(target=hub.serve_forever, args=(0.01,))
        thread.start()
        yield hub
        hub.stall.set()
        hub.shutdown()
        thread.join()


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
        tokens = evaluator._read_shard(evaluator._tokens_path(split)).tokens[1 : len(text)]
        assert tokenizer.decode(tokens.tolist()).startswith(text[:40])
    manifest = evaluator._manifest()
    assert list(manifest["train_tokens"]) == ["shard_00000", "shard_00001"]
    requests = hub.requests()
    tokens = evaluator._tokens_path("shard_00000")
    written = tokens.stat().st_mtime_ns
    (evaluator.CACHE / "manifest.json").unlink()  # as if it had been broken off: what is done stays
    assert evaluator.main(["--num-shards", "2"]) == 0 and tokens.stat().st_mtime_ns == written
    assert evaluator.main(["--num-shards", "2"]) == 0  # nothing to do
    assert hub.requests() == requests and evaluator._manifest() == manifest
    assert evaluator.main(["--num-shards", "-1"]) == 0  # more training shards: the metric's digest stays
    assert_fetched(evaluator, hub, ALL)
    assert evaluator.main(["--num-shards", "1"]) == 0  # fewer: what is there stays
    assert len(evaluator._manifest()["train_tokens"]) == 4 and evaluator._manifest()["digest"] == manifest["digest"]


def test_download_survives_a_server_that_is_bad_in_every_way(evaluator, hub):
    evaluator.HTTP_TIMEOUT, evaluator.ATTEMPTS = (5, 0.5), 3
    plans = [["truncate"] * 4, ["too short", "stall"], ["broken", "corrupt"], ["html"], [], ["too many"]]
    hub.plans = dict(zip(ALL, plans, strict=True))
    wanted = {name: len(plan) + 1 for name, plan in hub.plans.items()}  # 4 failures: but each brought new bytes
    assert evaluator.main(["--num-shards", "-1"]) == 0
    assert_fetched(evaluator, hub, ALL)
    assert hub.requests() == wanted
    before, again = hub.times[ALL[5]]
    assert again - before > 1  # Retry-After
    assert {name for name, start in hub.ranges} == {ALL[0], ALL[1]}  # what came whole and wrong begins again


def test_download_without_the_hubs_headers_takes_a_whole_part_drops_a_bad_one_and_needs_no_ranges(evaluator, hub):
    hub.linked = False
    hub.plans = {ALL[2]: ["no ranges"], ALL[3]: ["truncate"], ALL[4]: ["html"]}
    text = evaluator.CACHE / "text"
    text.mkdir(parents=True)
    for name, part in {ALL[0]: hub.shards[ALL[0]], ALL[1]: hub.shards[ALL[1]] + b"rest", ALL[2]: b"x" * 1000}.items():
        (text / f"{name}.part").write_bytes(part)
    assert evaluator.main(["--num-shards", "-1"]) == 0
    assert_fetched(evaluator, hub, ALL)
    assert [hub.requests()[name] for name in ALL[:4]] == [1, 2, 1, 2]


def test_download_names_what_is_missing_and_the_next_run_resumes(evaluator, hub, tmp_path, capsys):
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "other.parquet")
    whole = dict(hub.shards)
    hub.shards[ALL[0]] = (tmp_path / "other.parquet").read_bytes()
    del hub.shards[ALL[1]]
    hub.plans = {ALL[2]: ["silent"] * 2, ALL[3]: ["corrupt"] * 2}
    evaluator.HTTP_TIMEOUT, evaluator.ATTEMPTS = (5, 0.5), 2
    with patch.object(hub, "shards", {}):  # the first fails, the others would fare no better
        assert evaluator.main(["--num-shards", "-1", "--download-workers", "1"]) == 1
    assert error_line(capsys).startswith("error: 6 of 6 shards are missing: ") and hub.requests() == {ALL[5]: 1}
    hub.times.clear()
    assert evaluator.main(["--num-shards", "-1"]) == 1
    error = error_line(capsys)
    assert error.startswith("error: 4 of 6 shards are missing: ")
    assert "not a readable parquet file with a text column (" in error and hub.requests()[ALL[0]] == 1
    assert "shard_00001.parquet (404" in error and hub.requests()[ALL[1]] == 1  # what is refused is not asked for again
    assert "shard_00002.parquet (HTTP" in error and "timed out" in error and hub.requests()[ALL[2]] == 2
    assert "shard_00003.parquet (it came with a wrong SHA-256)" in error
    assert "Running the same command again resumes (401, 403: set HF_TOKEN; " in error
    hub.shards = whole
    requests = hub.requests()
    assert evaluator.main(["--num-shards", "-1"]) == 0
    assert_fetched(evaluator, hub, ALL)
    assert hub.requests()[ALL[4]] == requests[ALL[4]]


def test_listed_data_set_is_fetched_and_split_and_an_unknown_one_is_told(hub, tmp_path, capsys):
    evaluator = load_prepare(copy_prepare(tmp_path, "listed", "some.one/corpus-2"), "listed", tmp_path / "cache")
    listing = hub.listing
    hub.listing = {}
    assert evaluator.main([]) == 1
    assert error_line(capsys).startswith("error: source 'some.one/corpus-2' is no local path, and http")
    hub.listing = listing
    assert evaluator.main(["--num-shards", "5"]) == 0
    fetched = sorted((evaluator.CACHE / "download").rglob("*.parquet"))
    assert [path.read_bytes() for path in fetched] == [hub.shards[name] for name in ALL[:5]]
    texts = {path.stem: pq.read_table(path)["text"].to_pylist() for path in evaluator.CACHE.glob("text/*.parquet")}
    assert set(texts) == {"val", "test", *(f"train_{i:05d}" for i in range(8))}
    source = [text for path in fetched for text in pq.read_table(path)["text"].to_pylist()]
    assert sum(map(len, source)) == sum(len(piece) for pieces in texts.values() for piece in pieces)
    requests = hub.requests()
    assert evaluator.main([]) == 0
    assert hub.requests() == requests


def test_two_preparations_at_once_do_the_work_once(evaluator, hub, capsys):
    """A lock is held by an open file, so two threads stand for two processes."""
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(evaluator.main, [["--num-shards", "2"]] * 2)) == [0, 0]
    assert f"waiting: another preparation works here (lock {evaluator.CACHE}/prepare.lock)" in capsys.readouterr().err
    assert sum(hub.requests().values()) == 4
