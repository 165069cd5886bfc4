"""Downloads against a real HTTP server on loopback that misbehaves, one way at a time.

Run: uv run pytest tests/test_prepare_download.py
"""

import hashlib
import http.server
import json
import random
import shutil
import signal
import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import wait_for
from prepare_fixtures import copy_prepare, die_at, english, error_line, load_prepare, profile_row, started

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
        knows_ranges = how != "no ranges" and not how.startswith("first ")
        if (asked := request.headers.get("Range")) and knows_ranges:
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
        if how in ("truncate", "stall") or how.startswith("first "):
            limit = int(how.removeprefix("first ")) if how.startswith("first ") else 20_000
            request.wfile.write(body[:limit])
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
def judge(hub, tmp_path):
    path = copy_prepare(tmp_path, profile_row("web", "someone/corpus", hub_shards=SHARDS))
    judge = load_prepare(path, "web", tmp_path / "cache")
    judge.BACKOFF_SECONDS = 0.01
    return judge


def text_files(judge):
    return sorted(path.name for path in (judge.CACHE / "text").iterdir())


def fetched_well(judge, hub, names):
    assert text_files(judge) == names
    assert all((judge.CACHE / "text" / name).read_bytes() == hub.shards[name] for name in names)


ALL = [f"shard_{i:05d}.parquet" for i in range(SHARDS)]


def test_download_takes_the_first_shards_and_the_two_held_out(judge, hub):
    """Validation is the last shard, test the one before it."""
    assert judge.main(["--num-shards", "2", "--download-workers", "3"]) == 0
    fetched_well(judge, hub, [ALL[0], ALL[1], ALL[4], ALL[5]])
    tokenizer = judge.Tokenizer.from_directory()
    for split, name in {"val": ALL[5], "test": ALL[4], "shard_00000": ALL[0]}.items():
        text = pq.read_table(judge.CACHE / "text" / name)["text"][0].as_py()
        tokens = judge._read_shard(judge._tokens_path(split)).tokens[: len(text)].tolist()
        assert tokenizer.decode(tokens[1:]).startswith(text[:40])
    manifest = judge._manifest()
    assert list(manifest["train_tokens"]) == ["shard_00000", "shard_00001"]
    requests = hub.requests
    assert judge.main(["--num-shards", "2"]) == 0  # nothing to do
    assert hub.requests == requests and judge._manifest() == manifest
    assert judge.main(["--num-shards", "-1"]) == 0  # more training shards: the metric's digest stays
    fetched_well(judge, hub, ALL)
    assert len(judge._manifest()["train_tokens"]) == 4 and judge._manifest()["digest"] == manifest["digest"]
    assert judge.main(["--num-shards", "1"]) == 0  # fewer: what is there stays
    assert len(judge._manifest()["train_tokens"]) == 4


def test_unfinished_preparation_with_another_vocabulary_trains_the_tokenizer_again(judge):
    assert judge.main(["--num-shards", "1"]) == 0
    (judge.CACHE / "manifest.json").unlink()
    row = profile_row("web", "someone/corpus", hub_shards=SHARDS, vocab_size=320)
    larger = load_prepare(copy_prepare(judge.CACHE_ROOT.parent, row), "web", judge.CACHE_ROOT)
    assert larger.main(["--num-shards", "1"]) == 0
    tokenizer, tokens = larger.Tokenizer.from_directory(), larger._read_shard(larger._tokens_path("val")).tokens
    assert (tokenizer.get_vocab_size(), tokenizer.get_bos_token_id(), tokens[0]) == (320, 316, 316)


def test_download_survives_a_server_that_is_bad_once_in_every_way(judge, hub):
    hub.plans = {
        ALL[0]: ["truncate"],
        ALL[1]: ["too short"],
        ALL[2]: ["broken", "corrupt"],
        ALL[3]: ["html"],
        ALL[4]: ["busy"],
        ALL[5]: ["well", "too many"],  # the first request asks for the size of the last shard
    }
    assert judge.main(["--num-shards", "-1"]) == 0
    fetched_well(judge, hub, ALL)
    # A web page looks like the beginning of a shard: it is continued, found to be wrong, and begun again.
    assert hub.requests == {ALL[0]: 2, ALL[1]: 2, ALL[2]: 3, ALL[3]: 3, ALL[4]: 2, ALL[5]: 3}
    for name in (ALL[4], ALL[5]):
        before, again = hub.times[name][-2:]
        assert again - before > 1  # Retry-After
    continued = {name for name, start in hub.ranges if start > 0}
    assert continued == {ALL[0], ALL[1], ALL[3]}  # the others begin again


def test_download_gives_up_on_a_stalled_connection_and_resumes(judge, hub):
    judge.HTTP_TIMEOUT = (5, 1)
    hub.plans = {ALL[1]: ["stall"]}
    assert judge.main(["--num-shards", "2"]) == 0
    fetched_well(judge, hub, [ALL[0], ALL[1], ALL[4], ALL[5]])
    assert any(name == ALL[1] and start > 0 for name, start in hub.ranges)


def test_download_makes_progress_through_a_line_that_always_breaks(judge, hub):
    hub.plans = {ALL[1]: ["truncate"] * 3}
    judge.ATTEMPTS = 2
    assert judge.main(["--num-shards", "2"]) == 0  # more failures than attempts, but each brought new bytes
    fetched_well(judge, hub, [ALL[0], ALL[1], ALL[4], ALL[5]])


def test_download_begins_again_where_the_server_knows_no_ranges(judge, hub):
    part = judge.CACHE / "text" / (ALL[1] + ".part")
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 1000)
    hub.plans = {ALL[1]: ["no ranges"]}
    assert judge.main(["--num-shards", "2"]) == 0
    fetched_well(judge, hub, [ALL[0], ALL[1], ALL[4], ALL[5]])
    assert hub.requests[ALL[1]] == 1


def test_download_gives_up_where_each_new_beginning_breaks(judge, hub, capsys):
    """More bytes than the time before are no progress where the server always begins again."""
    hub.plans = {ALL[1]: ["first 20000", "first 10000"] * 30}
    judge.ATTEMPTS = 3
    assert judge.main(["--num-shards", "2"]) == 1
    assert error_line(capsys).startswith("error: 1 of 4 shards are missing: shard_00001.parquet (")
    assert hub.requests[ALL[1]] == 4


@pytest.mark.parametrize("length", ["whole", "longer"])
def test_download_takes_or_drops_a_part_that_has_no_rest(judge, hub, length):
    part = judge.CACHE / "text" / (ALL[1] + ".part")
    part.parent.mkdir(parents=True)
    part.write_bytes(hub.shards[ALL[1]] + (b"rest" if length == "longer" else b""))
    assert judge.main(["--num-shards", "2"]) == 0
    fetched_well(judge, hub, [ALL[0], ALL[1], ALL[4], ALL[5]])
    assert hub.requests[ALL[1]] == (1 if length == "whole" else 2)


def test_token_is_sent_to_the_hub(judge, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert judge.main(["--num-shards", "1"]) == 0
    assert hub.tokens == {"Bearer hf_secret"}


def test_download_without_linked_headers_checks_what_it_can(judge, hub):
    hub.linked = False
    hub.plans = {ALL[1]: ["truncate"], ALL[4]: ["html"]}
    assert judge.main(["--num-shards", "2"]) == 0
    fetched_well(judge, hub, [ALL[0], ALL[1], ALL[4], ALL[5]])
    assert hub.requests[ALL[1]] == 2  # continued: a Range tells the length of the whole


def test_download_names_what_is_missing_and_the_next_run_resumes(judge, hub, capsys):
    missing = hub.shards.pop(ALL[1])
    hub.plans, judge.ATTEMPTS = {ALL[3]: ["corrupt"] * 2}, 2
    assert judge.main(["--num-shards", "-1"]) == 1
    error = error_line(capsys)
    assert error.startswith("error: 2 of 6 shards are missing: ")
    assert "shard_00001.parquet (404" in error
    assert "shard_00003.parquet (it came with a wrong length or SHA-256)" in error
    assert error.endswith("Running the same command again resumes")
    assert hub.requests[ALL[1]] == 1  # what is refused is not asked for again
    hub.shards[ALL[1]] = missing
    requests = hub.requests
    assert judge.main(["--num-shards", "-1"]) == 0
    fetched_well(judge, hub, ALL)
    assert hub.requests[ALL[0]] == requests[ALL[0]]


def test_shard_that_is_no_parquet_with_text_is_named(judge, hub, tmp_path, capsys):
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "other.parquet")
    hub.shards[ALL[0]] = (tmp_path / "other.parquet").read_bytes()
    hub.shards[ALL[1]] = b"<html>hello</html>"
    judge.ATTEMPTS = 2
    assert judge.main(["--num-shards", "2"]) == 1
    error = error_line(capsys)
    assert "shard_00000.parquet" in error and "shard_00001.parquet" in error
    assert error.count("not a readable parquet file with a text column") == 2
    assert text_files(judge) == [ALL[4], ALL[5]]


def test_download_gives_up_on_a_silent_server_after_so_many_attempts(judge, hub, capsys):
    hub.plans = {ALL[0]: ["silent"] * 50}
    judge.HTTP_TIMEOUT, judge.ATTEMPTS = (5, 1), 2
    assert judge.main(["--num-shards", "1"]) == 1
    error = error_line(capsys)
    assert error.startswith("error: 1 of 3 shards are missing: shard_00000.parquet (") and "timed out" in error
    assert hub.requests[ALL[0]] == 2


def test_no_server_at_all_ends_in_an_error(judge, monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    judge.ATTEMPTS = 2
    assert judge.main(["--num-shards", "1"]) == 1
    assert error_line(capsys).startswith("error: 3 of 3 shards are missing: ")


def test_full_disk_is_refused_before_the_download(judge, hub, monkeypatch, capsys):
    monkeypatch.setattr(judge.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**5))
    hub.shards = {name: data + bytes(10**6) for name, data in hub.shards.items()}
    assert judge.main(["--num-shards", "-1"]) == 1
    error = error_line(capsys)
    assert "6 shards need about 0.0 GB, 0.0 GB are free" in error and "--num-shards" in error
    assert not any((judge.CACHE / "text").glob("*.parquet*"))


def test_listed_data_set_is_fetched_and_split(hub, tmp_path):
    path = copy_prepare(tmp_path, profile_row("listed", "some.one/corpus-2"))
    judge = load_prepare(path, "listed", tmp_path / "cache")
    assert judge.main(["--num-shards", "5"]) == 0
    names = sorted(path.name for path in (judge.CACHE / "download").iterdir())
    assert names == [f"{i:05d}.parquet" for i in range(5)]
    texts = {path.stem: pq.read_table(path)["text"].to_pylist() for path in (judge.CACHE / "text").iterdir()}
    assert set(texts) == {"val", "test", *(f"train_{i:05d}" for i in range(8))}
    source = [t for name in ALL[:5] for t in pq.read_table(pa.BufferReader(hub.shards[name]))["text"].to_pylist()]
    assert sum(map(len, source)) == sum(len(piece) for pieces in texts.values() for piece in pieces)


def test_unknown_source_says_both_things_it_is_not(hub, tmp_path, capsys):
    judge = load_prepare(copy_prepare(tmp_path, profile_row("lost", "no/where")), "lost", tmp_path / "cache")
    hub.listing = dict
    assert judge.main([]) == 1
    assert error_line(capsys).startswith("error: source 'no/where' is no local path, and http")


@pytest.mark.slow
def test_interrupted_download_is_continued(judge, hub):
    hub.plans = {ALL[1]: ["stall"]}
    part = judge.CACHE / "text" / (ALL[1] + ".part")
    with started(judge, judge.__file__, "--num-shards", "2") as child:
        wait_for(lambda: (part.exists() and part.stat().st_size) or child.poll() is not None, 60)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=10)
    assert child.returncode == -signal.SIGINT and "Traceback" not in err
    assert judge.main(["--num-shards", "2"]) == 0
    fetched_well(judge, hub, [ALL[0], ALL[1], ALL[4], ALL[5]])
    assert ALL[1] in dict(hub.ranges)


@pytest.mark.slow
def test_killed_preparation_is_completed_from_the_shards_that_are_there(judge, hub, tmp_path):
    die_at(judge, ["tokenizer.tiktoken", "val.tokens", "manifest.json"], "--num-shards", "1")
    requests = hub.requests
    assert judge.main(["--num-shards", "1"]) == 0 and judge.main(["--verify"]) == 0
    assert hub.requests == requests
    whole = load_prepare(judge.__file__, "web", tmp_path / "whole")
    assert whole.main(["--num-shards", "1"]) == 0
    assert judge._manifest() == whole._manifest()


def test_two_preparations_at_once_do_the_work_once(judge, hub, capsys):
    """A lock is held by an open file, so two threads stand for two processes."""
    with ThreadPoolExecutor(2) as pool:
        codes = list(pool.map(judge.main, [["--num-shards", "2"]] * 2))
    assert codes == [0, 0]
    assert f"waiting: another preparation works here (lock {judge.CACHE}/prepare.lock)" in capsys.readouterr().err
    assert sum(hub.requests.values()) == 5  # four shards, and one question for the size
    assert judge.main(["--verify"]) == 0
