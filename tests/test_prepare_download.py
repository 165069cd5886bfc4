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
from prepare_fixtures import copy_prepare, english, error_line, load_prepare, profile_row

SHARDS = 6  # of the hub data set: four to train on, then test, then validation


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """The data set: {file name: bytes}."""
    folder, rng = tmp_path_factory.mktemp("shards"), random.Random(8)
    files = {}
    for i in range(SHARDS):
        path = folder / f"shard_{i:05d}.parquet"
        documents = [english(rng, 30) for _ in range(400)]
        pq.write_table(pa.table({"text": documents}), path, row_group_size=150, compression="none")
        files[path.name] = path.read_bytes()
    return files


class Hub:
    """A Hugging Face endpoint. plans: {file name: list of misbehaviours, one for each request, then none}."""

    def __init__(self, shards):
        self.shards, self.plans, self.ranges, self.times = dict(shards), {}, [], defaultdict(list)
        self.linked, self.tokens, self.stall = True, set(), threading.Event()
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_GET(self):
                hub.answer(self)

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # a client that was killed
        self.url = f"http://127.0.0.1:{self.server.server_port}"
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
        if request.path.startswith("/api/"):
            return self.send(request, 200, json.dumps(self.listing()).encode())
        data = self.shards.get(name)
        if data is None:
            self.times[name].append(time.monotonic())
            return self.send(request, 404, b"no such entry")
        if "/resolve/" in request.path and self.linked:  # as the hub: a redirect that knows, to a storage that does not
            self.tokens.add(request.headers.get("Authorization"))
            request.send_response(302)
            request.send_header("Location", f"/cdn/{name}")
            request.send_header("X-Linked-Size", str(len(data)))
            request.send_header("X-Linked-Etag", f'"{hashlib.sha256(data).hexdigest()}"')
            request.send_header("Content-Length", "0")
            return request.end_headers()
        self.times[name].append(time.monotonic())
        plan = self.plans.get(name)
        return self.serve(request, name, data, plan.pop(0) if plan else "well")

    def listing(self):
        urls = [f"https://elsewhere.example/cdn/{name}" for name in sorted(self.shards)]
        return {"default": {"test": ["unused"], "train": urls}}

    def serve(self, request, name, data, how):
        start = 0
        if (asked := request.headers.get("Range")) and how != "no ranges":
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            self.ranges.append((name, start))
            if start >= len(data):
                return self.send(request, 416, b"", {"Content-Range": f"bytes */{len(data)}"})
        body = data[start:]
        headers = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        status = 206 if start else 200
        if how == "silent":
            return self.stall.wait(20)
        if how == "broken":
            return self.send(request, 500, b"")
        if how == "busy":
            return self.send(request, 503, b"", {"Retry-After": "1"})
        if how == "too many":
            return self.send(request, 429, b"", {"Retry-After": "1"})
        if how == "html":
            return self.send(request, 200, b"<html>please sign in</html>")
        if how == "corrupt":
            body = bytes(len(body))
        if how == "too short":  # a wrong Content-Length that nothing reveals but the redirect
            return self.send(request, status, body[: len(body) // 2], headers)
        request.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            request.send_header(key, value)
        request.end_headers()
        if how in ("truncate", "stall"):
            request.wfile.write(body[:20_000])
            request.wfile.flush()
            if how == "stall":
                self.stall.wait(20)
            request.close_connection = True
            return None
        return request.wfile.write(body)

    def send(self, request, status, body, headers=()):
        request.send_response(status)
        for key, value in (dict(headers) | {"Content-Length": str(len(body))}).items():
            request.send_header(key, value)
        request.end_headers()
        request.wfile.write(body)


@pytest.fixture
def hub(shards, monkeypatch):
    hub = Hub(shards)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield hub
    hub.close()


@pytest.fixture
def evaluator(hub, tmp_path):
    path = copy_prepare(tmp_path, profile_row("web", "someone/corpus", hub_shards=SHARDS))
    evaluator = load_prepare(path, "web", tmp_path / "cache")
    evaluator.BACKOFF_SECONDS = 0.01
    return evaluator


def text_files(evaluator):
    return sorted(path.name for path in (evaluator.CACHE / "text").iterdir())


def fetched_well(evaluator, hub, names):
    assert text_files(evaluator) == names
    assert all((evaluator.CACHE / "text" / name).read_bytes() == hub.shards[name] for name in names)


ALL = [f"shard_{i:05d}.parquet" for i in range(SHARDS)]


def test_download_takes_the_first_shards_and_the_two_held_out(evaluator, hub, monkeypatch):
    """Validation is the last shard, test the one before it."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert evaluator.main(["--num-shards", "2", "--download-workers", "3"]) == 0
    assert hub.tokens == {"Bearer hf_secret"}
    fetched_well(evaluator, hub, [ALL[0], ALL[1], ALL[4], ALL[5]])
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
    fetched_well(evaluator, hub, ALL)
    assert len(evaluator._manifest()["train_tokens"]) == 4 and evaluator._manifest()["digest"] == manifest["digest"]
    assert evaluator.main(["--num-shards", "1"]) == 0  # fewer: what is there stays
    assert len(evaluator._manifest()["train_tokens"]) == 4


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
    fetched_well(evaluator, hub, ALL)
    assert hub.requests == {ALL[0]: 2, ALL[1]: 2, ALL[2]: 3, ALL[3]: 2, ALL[4]: 2, ALL[5]: 3}
    for name in (ALL[4], ALL[5]):
        before, again = hub.times[name][-2:]
        assert again - before > 1  # Retry-After
    continued = {name for name, start in hub.ranges if start > 0}
    assert continued == {ALL[0]}  # what came whole and wrong begins again


def test_download_goes_on_through_a_line_that_stalls_or_always_breaks(evaluator, hub):
    evaluator.HTTP_TIMEOUT = (5, 0.5)
    hub.plans = {ALL[0]: ["truncate"] * 3, ALL[1]: ["stall"]}
    evaluator.ATTEMPTS = 2  # more failures than attempts, but each brought new bytes
    assert evaluator.main(["--num-shards", "2"]) == 0
    fetched_well(evaluator, hub, [ALL[0], ALL[1], ALL[4], ALL[5]])
    assert any(name == ALL[1] and start > 0 for name, start in hub.ranges)


def test_download_takes_or_drops_a_part_that_has_no_rest_and_begins_again_where_a_server_knows_no_ranges(
    evaluator, hub
):
    hub.linked = False  # a server without the hub's headers
    hub.plans = {ALL[2]: ["no ranges"], ALL[3]: ["truncate"], ALL[4]: ["html"]}
    text = evaluator.CACHE / "text"
    text.mkdir(parents=True)
    (text / (ALL[0] + ".part")).write_bytes(hub.shards[ALL[0]])
    (text / (ALL[1] + ".part")).write_bytes(hub.shards[ALL[1]] + b"rest")
    (text / (ALL[2] + ".part")).write_bytes(b"x" * 1000)
    assert evaluator.main(["--num-shards", "-1"]) == 0
    fetched_well(evaluator, hub, ALL)
    assert [hub.requests[name] for name in ALL[:4]] == [1, 2, 1, 2]


def test_download_names_what_is_missing_and_the_next_run_resumes(evaluator, hub, capsys):
    missing = hub.shards.pop(ALL[1])
    hub.plans, evaluator.ATTEMPTS = {ALL[3]: ["corrupt"] * 2}, 2
    assert evaluator.main(["--num-shards", "-1"]) == 1
    error = error_line(capsys)
    assert error.startswith("error: 2 of 6 shards are missing: ")
    assert "shard_00001.parquet (404" in error
    assert "shard_00003.parquet (it came with a wrong SHA-256)" in error
    assert error.endswith("Running the same command again resumes")
    assert hub.requests[ALL[1]] == 1  # what is refused is not asked for again
    hub.shards[ALL[1]] = missing
    requests = hub.requests
    assert evaluator.main(["--num-shards", "-1"]) == 0
    fetched_well(evaluator, hub, ALL)
    assert hub.requests[ALL[0]] == requests[ALL[0]]


def test_full_disk_is_refused_before_the_download(evaluator, hub, monkeypatch, capsys):
    monkeypatch.setattr(evaluator.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**5))
    hub.shards = {name: data + bytes(10**6) for name, data in hub.shards.items()}
    assert evaluator.main(["--num-shards", "-1"]) == 1
    error = error_line(capsys)
    assert "6 shards need about 0.0 GB, 0.0 GB are free" in error and "--num-shards" in error
    assert not any((evaluator.CACHE / "text").glob("*.parquet*"))


def test_listed_data_set_is_fetched_and_split(hub, tmp_path):
    path = copy_prepare(tmp_path, profile_row("listed", "some.one/corpus-2"))
    evaluator = load_prepare(path, "listed", tmp_path / "cache")
    assert evaluator.main(["--num-shards", "5"]) == 0
    fetched = sorted((evaluator.CACHE / "download").iterdir())
    assert [path.read_bytes() for path in fetched] == [hub.shards[name] for name in ALL[:5]]
    texts = {
        path.stem: pq.read_table(path)["text"].to_pylist() for path in (evaluator.CACHE / "text").glob("*.parquet")
    }
    assert set(texts) == {"val", "test", *(f"train_{i:05d}" for i in range(8))}
    source = [text for path in fetched for text in pq.read_table(path)["text"].to_pylist()]
    assert sum(map(len, source)) == sum(len(piece) for pieces in texts.values() for piece in pieces)
    assert evaluator.main([]) == 0  # it asks the hub nothing


def test_shard_without_text_and_a_silent_server_are_named_after_so_many_attempts(evaluator, hub, tmp_path, capsys):
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "other.parquet")
    hub.shards[ALL[0]] = (tmp_path / "other.parquet").read_bytes()
    hub.plans = {ALL[1]: ["silent"] * 50}
    evaluator.HTTP_TIMEOUT, evaluator.ATTEMPTS = (5, 0.5), 2
    assert evaluator.main(["--num-shards", "2"]) == 1
    error = error_line(capsys)
    assert "2 of 4 shards are missing: " in error and "shard_00001.parquet (HTTP" in error and "timed out" in error
    assert "not a readable parquet file with a text column (" in error
    assert text_files(evaluator) == [ALL[4], ALL[5]] and hub.requests[ALL[1]] == 2


def test_unknown_source_says_both_things_it_is_not(hub, tmp_path, capsys):
    evaluator = load_prepare(copy_prepare(tmp_path, profile_row("lost", "no/where")), "lost", tmp_path / "cache")
    hub.listing = dict
    assert evaluator.main([]) == 1
    assert error_line(capsys).startswith("error: source 'no/where' is no local path, and http")


def test_two_preparations_at_once_do_the_work_once(evaluator, hub, capsys):
    """A lock is held by an open file, so two threads stand for two processes."""
    with ThreadPoolExecutor(2) as pool:
        codes = list(pool.map(evaluator.main, [["--num-shards", "2"]] * 2))
    assert codes == [0, 0]
    assert f"waiting: another preparation works here (lock {evaluator.CACHE}/prepare.lock)" in capsys.readouterr().err
    assert sum(hub.requests.values()) == 5  # four shards, and one question for the size
    assert evaluator.main(["--verify"]) == 0
