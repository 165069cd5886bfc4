"""Profiles, sources, splits, tokenizer, token files, manifest and command line of prepare.py."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepare_fixtures import (  # noqa: F401
    PREPARE,
    copy_prepare,
    english,
    load_prepare,
    locks_given_back,
    profile_row,
    write_jsonl,
)


def corpus(seed=1, documents=1200, words=60):
    rng = random.Random(seed)
    return [english(rng, words) for _ in range(documents)]


def prepared(folder, source, expect=0, **constants):
    judge = load_prepare(copy_prepare(folder, profile_row("mine", source, **constants)), "mine", folder / "cache")
    assert judge.main([]) == expect
    return judge


def texts_of(judge):
    return {path.stem: pq.read_table(path)["text"].to_pylist() for path in sorted((judge.CACHE / "text").iterdir())}


def error_line(capsys):
    """The one error line; progress bars before it are rewritten lines."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepare")
    source = write_jsonl(folder / "source" / "a.jsonl", corpus())
    return prepared(folder, source.parent)


# ----- profiles -----


def run(code, **env):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("AUTORESEARCH")} | env
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=PREPARE.parent, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("AUTORESEARCH_PROFILE", "h100", "use one of climbmix, code, pocket, smoke"),
        ("AUTORESEARCH_SEED", "-1", "use a whole number below 10**9"),
        ("AUTORESEARCH_SEED", "x", "use a whole number below 10**9"),
    ],
)
def test_bad_environment_ends_an_import_with_code_2(variable, value, message):
    done = run("import prepare", **{variable: value})
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {variable} is {value!r}: {message}\n")


def test_profiles_hold_the_published_constants():
    code = "import prepare as p; print([(k, *v[1:5]) for k, v in p.PROFILES.items()]); print(p.SEED, p.TIME_BUDGET)"
    done = run(code, AUTORESEARCH_PROFILE="smoke", AUTORESEARCH_SEED="7")
    assert "('climbmix', 2048, 300, 20971520, 8192), ('code', 2048, 300, 20971520, 8192)" in done.stdout
    assert "('pocket', 256, 30," in done.stdout and done.stdout.endswith("7 2\n")


def test_unprepared_profile_is_an_error_with_a_remedy(tmp_path):
    judge = load_prepare(PREPARE, "pocket", tmp_path)
    missing = rf"{tmp_path}/pocket/tokenizer.tiktoken"
    message = rf"^profile 'pocket' is not prepared \(no {missing}\): run 'uv run prepare.py'$"
    with pytest.raises(judge.UserError, match=message):
        judge.Tokenizer.from_directory()
    with pytest.raises(judge.UserError, match=r"no .*/manifest.json\): run 'uv run prepare.py'"):
        judge._open_split("train", 8)
    described = judge.describe()
    assert described["prepared"] is False and described["digest"] is None and "manifest.json" in described["problem"]
    json.dumps(described)


@pytest.mark.parametrize("arguments", [["--num-shards", "0"], ["--num-shards", "-2"], ["--download-workers", "0"]])
def test_bad_arguments_end_with_code_2(shared, arguments):
    with pytest.raises(SystemExit) as error:
        shared.main(arguments)
    assert error.value.code == 2


def test_smoke_profile_is_prepared_from_the_standard_library(tmp_path):
    judge = load_prepare(PREPARE, "smoke", tmp_path)
    assert judge.main([]) == 0
    texts = texts_of(judge)
    assert 2e6 <= sum(len(text) for pieces in texts.values() for text in pieces) < 3e6
    assert judge.describe()["rows"] == {"val": 128, "test": 128}
    assert judge.Tokenizer.from_directory().get_vocab_size() == 512


# ----- splits -----


def test_document_goes_to_the_split_that_its_digest_says(tmp_path, shared):
    expected = {"val": set(), "test": set(), "train": set()}
    for text in corpus():
        number = int.from_bytes(hashlib.sha256(text.encode()).digest(), "big") % 20
        expected[{0: "val", 1: "test"}.get(number, "train")].update(shared._cut(text, 64))
    found = {"val": set(), "test": set(), "train": set()}
    for name, pieces in texts_of(shared).items():
        found[name.split("_")[0]].update(pieces)
    assert found == expected


def test_same_text_never_lands_in_two_splits(tmp_path):
    documents = corpus(words=30)
    judge = prepared(tmp_path, write_jsonl(tmp_path / "a.jsonl", documents * 3), max_seq_len=200)
    texts = texts_of(judge)
    train = {piece for name, pieces in texts.items() if name.startswith("train") for piece in pieces}
    assert not set(texts["val"]) & set(texts["test"]) and not train & (set(texts["val"]) | set(texts["test"]))
    assert len(texts["val"]) == 3 * len(set(texts["val"]))


def test_pieces_are_cut_at_line_ends(shared):
    line = "x" * 39 + "\n"
    assert list(shared._cut(line * 5, 100)) == [line * 2, line * 2, line]
    assert list(shared._cut("y" * 250 + "\n" + line, 100)) == ["y" * 100, "y" * 100, "y" * 50 + "\n" + line]
    assert list(shared._cut("short", 100)) == ["short"] and list(shared._cut("z" * 100, 100)) == ["z" * 100]
    assert list(shared._cut("", 100)) == []
    text = "".join(corpus(documents=20))
    assert "".join(shared._cut(text, 64)) == text and max(map(len, shared._cut(text, 64))) <= 64


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "txt", "md"])
def test_local_sources_of_every_kind_give_the_same_splits(tmp_path, kind, shared):
    documents, folder = corpus(), tmp_path / "source" / "deep"
    folder.mkdir(parents=True)
    if kind == "parquet":
        table = pa.table({"id": list(range(len(documents))), "text": pa.array(documents, pa.large_string())})
        pq.write_table(table, folder / "a.parquet", row_group_size=300)
    elif kind == "jsonl":
        write_jsonl(folder / "a.jsonl", documents)
    else:
        for i, text in enumerate(documents):
            (folder / f"{i:05d}.{kind}").write_bytes(text.encode())
    (folder / "notes.pdf").write_bytes(b"not read")
    judge = prepared(tmp_path, tmp_path / "source")
    assert texts_of(judge) == texts_of(shared)


@pytest.mark.skipif("not (Path(__file__).resolve().parents[2] / 'shared/data/wikitext2_test.txt').exists()")
def test_english_articles_in_md_files_work(tmp_path):
    data = Path(__file__).resolve().parents[2] / "shared" / "data"
    (tmp_path / "source").mkdir()
    text = (data / "wikitext2_test.txt").read_text() + (data / "wikitext2_valid.txt").read_text()
    for i, article in enumerate(text.split("\n = ")):
        (tmp_path / "source" / f"{i:04d}.md").write_text(article)
    judge = prepared(tmp_path, tmp_path / "source", vocab_size=1024, max_seq_len=128, eval_tokens=2**14)
    assert judge.describe()["rows"]["val"] == 128
    sample = judge.Tokenizer.from_directory().decode(judge._open_split("train", 128).take(1)[0].tolist())
    assert sample.isprintable() or "\n" in sample


@pytest.mark.parametrize(
    "line",
    ["{", '{"body": 1}', '{"text": 5}', "[1]"],
)
def test_bad_jsonl_line_is_named(tmp_path, capsys, line):
    path = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    path.write_text(path.read_text() + line + "\n")
    prepared(tmp_path, path, expect=1)
    assert error_line(capsys).startswith(f"error: {path}:3 is no JSON object with a string in 'text'")


def test_bad_local_parquet_is_named(tmp_path, capsys):
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    prepared(tmp_path, tmp_path / "a.parquet", expect=1)
    problem = "is not a readable parquet file with a text column (of another type than string)"
    assert f"{tmp_path / 'a.parquet'} {problem}" in error_line(capsys)


def test_folder_without_text_is_an_error(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    prepared(tmp_path, tmp_path / "empty", expect=1)
    assert "holds no .parquet, .jsonl, .txt, .md file" in error_line(capsys)


def test_too_little_text_says_how_much_is_needed(tmp_path, capsys):
    judge = prepared(tmp_path, write_jsonl(tmp_path / "a.jsonl", corpus(documents=100)), expect=1)
    error = error_line(capsys)
    assert "rows, 64 are needed: give " in error and "more text, about 0.2 MB in many documents" in error
    assert not (judge.CACHE / "manifest.json").exists()
    write_jsonl(tmp_path / "a.jsonl", corpus())  # more text, and the same command again
    assert judge.main([]) == 0


def test_text_too_poor_for_the_vocabulary_is_an_error(tmp_path, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", [chr(97 + i % 3) for i in range(9000)])
    prepared(tmp_path, source, expect=1, vocab_size=1000)
    assert "996 are needed" in error_line(capsys)


# ----- tokenizer -----


def test_tokenizer_round_trips_and_keeps_special_strings_ordinary(shared):
    tokenizer = shared.Tokenizer.from_directory()
    for text in ["", "ba ke lo", "naïve 漢字 🙂", "a\x00b", "  \n\n\t x", "<|reserved_0|><|reserved_3|>", "12345 1 22"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < 296 for i in ids)
    assert tokenizer.get_vocab_size() == 300 and tokenizer.get_bos_token_id() == 296 == shared.BOS_ID
    assert tokenizer.decode([296, 299]) == "<|reserved_0|><|reserved_3|>"


def test_tokenizer_encodes_lists_and_prepends(shared):
    tokenizer = shared.Tokenizer.from_directory()
    one, two = tokenizer.encode("ba ke"), tokenizer.encode("lo")
    assert tokenizer.encode(["ba ke", "lo"]) == [one, two]
    assert tokenizer.encode("ba ke", prepend=7) == [7, *one]
    assert tokenizer.encode(["ba ke", ""], prepend="<|reserved_0|>") == [[296, *one], [296]]


def test_numbers_are_split_into_two_digits_at_most(shared):
    tokenizer = shared.Tokenizer.from_directory()
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode("1234567")]
    assert "".join(pieces) == "1234567" and max(map(len, pieces)) <= 2


def test_lone_surrogates_are_replaced(shared):
    tokenizer = shared.Tokenizer.from_directory()
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a�b"
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude42")) == "🙂"


def test_long_documents_encode_as_if_whole(shared, monkeypatch):
    """Chunks end where no token can cross: the ids are those of the undivided text."""
    tokenizer = shared.Tokenizer.from_directory()
    rng = random.Random(4)
    parts = ["ba ke\n", "!!\n", " \n", "\r\n", "'s", "  lo", "\n\n", "12", "\t", "é", "x\n"]
    text = "".join(rng.choices(parts, k=6000))
    whole = tokenizer.encoding.encode_ordinary(text)
    for size in (50, 333, 4000):
        monkeypatch.setattr(shared, "CHUNK_CHARS", size)
        assert max(map(len, shared._chunks(text))) <= size
        assert tokenizer.encode(text) == whole


@pytest.mark.parametrize("character", ["a", " ", "\n", "!", "漢", "\x00"])
def test_long_runs_of_one_character_are_no_problem(shared, character):
    tokenizer = shared.Tokenizer.from_directory()
    assert tokenizer.decode(tokenizer.encode(character * 1_500_000)) == character * 1_500_000


def test_tokenizer_files_are_text(shared):
    lines = (shared.CACHE / "tokenizer.tiktoken").read_text().splitlines()
    assert [int(line.split()[1]) for line in lines] == list(range(296))
    assert json.loads((shared.CACHE / "tokenizer.json").read_text()) == {
        "pattern": shared.SPLIT_PATTERN,
        "special_tokens": {f"<|reserved_{i}|>": 296 + i for i in range(4)},
    }


def test_tokenizer_learns_from_the_training_split_only(tmp_path, monkeypatch):
    """A word that only held-out documents use becomes no token; one that training uses does."""
    held, kept = [], []
    for text in (f"{english(random.Random(i), 60)} {i}" for i in range(3000)):
        number = int(hashlib.sha256((text + " zzzzqqqq" * 30).encode()).hexdigest(), 16) % 20
        (held if number < 2 else kept).append(text + (" zzzzqqqq" * 30 if number < 2 else " wwwwjjjj" * 30))
    kept = [text for text in kept if int(hashlib.sha256(text.encode()).hexdigest(), 16) % 20 > 1]
    judge = prepared(tmp_path, write_jsonl(tmp_path / "a.jsonl", held + kept))
    tokenizer = judge.Tokenizer.from_directory()
    assert len(tokenizer.encode(" wwwwjjjj")) == 1 and len(tokenizer.encode(" zzzzqqqq")) > 4


# ----- tokens -----


def test_token_files_hold_every_document_and_batch(tmp_path):
    """Nulls, empty and ill-formed documents, large strings, row groups of 1 to 300."""
    documents = ["", None, "a\x00b", "<|reserved_0|> text", "x" * 300_000, *corpus(documents=395)]
    raw = [None if d is None else d.encode() for d in documents] + [b"\xed\xa0\x80 lone", b"\xff\xfe bytes"]
    path = tmp_path / "odd.parquet"
    table = pa.table({"text": pa.Array.from_buffers(pa.string(), len(raw), pa.array(raw, pa.binary()).buffers())})
    with pq.ParquetWriter(path, table.schema) as writer:
        for start, length in [(0, 1), (1, 300), (301, 101)]:
            writer.write_table(table.slice(start, length), row_group_size=10**6)
    judge = prepared(tmp_path, write_jsonl(tmp_path / "a.jsonl", corpus()))
    judge._tokenize({"odd": path})
    shard, tokenizer = judge._read_shard(judge._tokens_path("odd")), judge.Tokenizer.from_directory()
    assert shard.batches.tolist() == [1, 128, 128, 44, 101]
    ends = np.cumsum(shard.lengths)
    found = [shard.tokens[end - n : end].tolist() for n, end in zip(shard.lengths, ends, strict=True)]
    wanted = [d or "" for d in documents] + ["��� lone", "�� bytes"]
    assert found == tokenizer.encode(wanted, prepend=judge.BOS_ID)
    assert ends[-1] == len(shard.tokens)


@pytest.mark.slow
def test_document_of_50_mb_is_tokenized_in_little_memory(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", corpus())
    path = copy_prepare(tmp_path, profile_row("mine", source))
    text = "".join(corpus(documents=50)) * 50
    text *= 50_000_000 // len(text)
    pq.write_table(pa.table({"text": [text, "a" * 10**7, " " * 10**7]}), tmp_path / "big.parquet")
    code = (
        "import resource, sys; sys.path.insert(0, sys.argv[1]); import prepare; from pathlib import Path\n"
        "assert prepare.main([]) == 0\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "before = peak(); prepare._tokenize({'big': Path(sys.argv[2])}); print(peak() - before)\n"
        "print(prepare._read_shard(prepare._tokens_path('big')).lengths.tolist())"
    )
    env = {**os.environ, "AUTORESEARCH_PROFILE": "mine", "AUTORESEARCH_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", code, str(path.parent), str(tmp_path / "big.parquet")]
    output = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.splitlines()
    peak_mb, lengths = int(output[-2]), json.loads(output[-1])
    assert peak_mb < 1000
    assert len(lengths) == 3 and min(lengths) > 10**5


def test_truncated_token_file_is_named(shared, tmp_path):
    path = tmp_path / "x.tokens"
    path.write_bytes((shared.CACHE / "tokens/val.tokens").read_bytes()[:-8])
    with pytest.raises(shared.UserError, match=r"x\.tokens is not a token file"):
        shared._read_shard(path)
    path.write_bytes(b"")
    with pytest.raises(shared.UserError, match=r"x\.tokens is not a token file"):
        shared._read_shard(path)


# ----- manifest and the whole preparation -----


def snapshot(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_preparation_is_deterministic_and_idempotent(shared, tmp_path):
    before = snapshot(shared.CACHE)
    times = {path: path.stat().st_mtime_ns for path in shared.CACHE.rglob("*.tokens")}
    assert shared.main([]) == 0
    assert snapshot(shared.CACHE) == before
    assert {path: path.stat().st_mtime_ns for path in shared.CACHE.rglob("*.tokens")} == times
    again = load_prepare(shared.__file__, "mine", tmp_path)
    assert again.main([]) == 0
    assert snapshot(again.CACHE) == before
    assert not list(shared.CACHE.rglob("*.part"))


def test_metric_files_are_read_only_and_verified(shared, capsys):
    for name in shared.METRIC_FILES:
        assert (shared.CACHE / name).stat().st_mode & 0o222 == 0
    assert shared.main(["--verify"]) == 0
    assert capsys.readouterr().out.startswith("profile: mine (AUTORESEARCH_PROFILE)\nverified: tokenizer.tiktoken ")


def test_rows_in_the_manifest_are_all_full_rows_of_a_small_split(tmp_path):
    judge = prepared(tmp_path, write_jsonl(tmp_path / "a.jsonl", corpus()), eval_tokens=10**7)
    stream = judge._open_split("val", 32)
    rows = sum(len(stream.take(50)) for _ in range(1000))
    assert judge.describe()["rows"]["val"] == rows > 64


def test_changed_constants_ask_for_a_new_preparation(tmp_path, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", corpus())
    first = prepared(tmp_path, source)
    digest = first.describe()["digest"]
    path = copy_prepare(tmp_path, profile_row("mine", source, time_budget=60))
    budget = load_prepare(path, "mine", tmp_path / "cache")
    assert "was made with time_budget 10, now it is 60: run 'uv run prepare.py'" in budget.describe()["problem"]
    assert budget.main([]) == 0 and budget.describe()["problem"] is None
    assert budget.describe()["digest"] != digest
    assert "now it is 10:" in first.describe()["problem"]
    size = load_prepare(copy_prepare(tmp_path, profile_row("mine", source, vocab_size=320)), "mine", tmp_path / "cache")
    capsys.readouterr()
    assert size.main([]) == 1
    assert "was made with vocab_size 300, now it is 320: delete " in error_line(capsys)


def test_missing_token_file_is_made_again_and_is_the_same(tmp_path):
    judge = prepared(tmp_path, write_jsonl(tmp_path / "a.jsonl", corpus()))
    before, digest = snapshot(judge.CACHE), judge.describe()["digest"]
    (judge.CACHE / "tokens/val.tokens").unlink()
    (judge.CACHE / "tokens/train_00003.tokens").unlink()
    assert judge.main(["--verify"]) == 1
    assert judge.main([]) == 0
    assert snapshot(judge.CACHE) == before and judge.describe()["digest"] == digest


def test_retrained_tokenizer_does_not_pass_for_the_old_one(tmp_path, capsys):
    """Changed files under a manifest are an error, not a new metric under the old name."""
    judge = prepared(tmp_path, write_jsonl(tmp_path / "a.jsonl", corpus()))
    path = judge.CACHE / "tokens/val.tokens"
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    assert judge.main([]) == 1
    assert f"{path} is not what was prepared" in error_line(capsys)


def test_kill_at_any_moment_leaves_what_the_next_run_completes(tmp_path, shared):
    reference = snapshot(shared.CACHE)
    env = {**os.environ, "AUTORESEARCH_PROFILE": "mine", "AUTORESEARCH_CACHE": str(tmp_path)}
    cache = tmp_path / "mine"
    steps = ["text.part", "tokenizer.tiktoken"]
    for step in steps:
        command = [sys.executable, shared.__file__]
        child = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (cache / step).exists() and child.poll() is None:
            time.sleep(0.0005)
        child.send_signal(signal.SIGKILL)
        child.wait(10)
        judge = load_prepare(shared.__file__, "mine", tmp_path)
        assert judge.main([]) == 0 and judge.main(["--verify"]) == 0
        assert {k: v for k, v in snapshot(cache).items() if not k.name.endswith(".part")} == reference
        shutil.rmtree(cache)


def test_interrupt_ends_preparation_at_once(tmp_path):
    """Ctrl-C while the tokenizer is being trained in native code."""
    source = write_jsonl(tmp_path / "a.jsonl", corpus(documents=3000, words=100))
    path = copy_prepare(tmp_path, profile_row("mine", source, vocab_size=20000))
    env = {**os.environ, "AUTORESEARCH_PROFILE": "mine", "AUTORESEARCH_CACHE": str(tmp_path / "cache")}
    child = subprocess.Popen([sys.executable, path], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "cache/mine/text").exists():
        assert child.poll() is None
        time.sleep(0.001)
    child.send_signal(signal.SIGINT)
    assert child.wait(2) == -signal.SIGINT


def test_no_word_of_a_traceback_reaches_a_user(tmp_path):
    env = {**os.environ, "AUTORESEARCH_PROFILE": "pocket", "AUTORESEARCH_CACHE": str(tmp_path / "file" / "below")}
    (tmp_path / "file").write_text("in the way")
    done = subprocess.run([sys.executable, str(PREPARE)], env=env, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
