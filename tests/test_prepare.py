"""Profiles, sources, splits, tokenizer, token files, manifest and command line of prepare.py.

Run: uv run pytest tests/test_prepare.py
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rustbpe
from conftest import wait_for
from prepare_fixtures import (
    PREPARE,
    copy_prepare,
    die_at,
    english,
    environment,
    error_line,
    load_prepare,
    profile_row,
    started,
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


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepare")
    source = write_jsonl(folder / "source" / "a.jsonl", corpus())
    return prepared(folder, source.parent)


# ----- profiles -----


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("AUTORESEARCH_PROFILE", "h100", "climbmix, code, pocket, smoke"),
        ("AUTORESEARCH_SEED", "-1", "a whole number below 10**9"),
        ("AUTORESEARCH_SEED", "x", "a whole number below 10**9"),
    ],
)
def test_bad_environment_ends_an_import_with_code_2(variable, value, message):
    env = {key: value for key, value in os.environ.items() if not key.startswith("AUTORESEARCH")} | {variable: value}
    command = [sys.executable, "-c", "import prepare"]
    done = subprocess.run(command, cwd=PREPARE.parent, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {variable} is {value!r}: use ") and done.stderr.endswith(f"{message}\n")
    assert done.stderr.count("\n") == 1


def test_profiles_are_those_of_the_design(tmp_path):
    judge = load_prepare(PREPARE, "smoke", tmp_path, seed=7)
    design = {
        "climbmix": ("karpathy/climbmix-400b-shuffle", 2048, 300, 40 * 524288, 8192, 6543, 10**15),
        "code": ("python:all", 2048, 300, 40 * 524288, 8192, 0, 10**15),
        "pocket": ("python:torch", 256, 30, 2**18, 2048, 0, 10**15),
        "smoke": ("python:torch", 64, 2, 2**13, 512, 0, 3_000_000),
    }
    assert {name: tuple(judge.PROFILES[name]) for name in design} == design  # a fork has rows of its own beside them
    taken = judge.SEED, judge.TIME_BUDGET, judge.MAX_SEQ_LEN, judge.CACHE
    assert taken == (7, 2, 64, tmp_path / "smoke")


@pytest.mark.parametrize(("devices", "profile", "word"), [(0, "pocket", "without"), (1, "climbmix", "with")])
def test_profile_and_cache_have_a_default_and_the_reason_is_printed(
    tmp_path, monkeypatch, capsys, devices, profile, word
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("torch.cuda.device_count", lambda: devices)
    judge = load_prepare(PREPARE, "", "", seed="")
    taken = judge.PROFILE, judge.SEED, judge.CACHE
    assert taken == (profile, 42, tmp_path / ".cache/autoresearch" / profile)
    assert judge.main(["--verify"]) == 1
    assert capsys.readouterr().out == f"profile: {profile} (default {word} a CUDA device)\n"


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


def test_smoke_profile_is_prepared_from_torch(tmp_path):
    judge = load_prepare(PREPARE, "smoke", tmp_path)
    assert judge.main([]) == 0
    texts = texts_of(judge)
    assert 3e6 <= sum(len(text) for pieces in texts.values() for text in pieces) < 4e6
    assert judge.describe()["rows"] == {"val": 128, "test": 128}
    assert judge.Tokenizer.from_directory().get_vocab_size() == 512


# ----- splits -----


def test_document_goes_to_the_split_that_its_digest_says(shared):
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


def test_installed_packages_come_after_the_standard_library(tmp_path, monkeypatch):
    standard, installed = ["lib/json/decoder.py"], ["lib/site-packages/pip.py", "platform/torch.py"]
    for name in (*standard, *installed, "lib/dist-packages/apt.py", "lib/json/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    folders = {"stdlib": "lib", "purelib": "lib/site-packages", "platlib": "platform"}
    paths = {key: str(tmp_path / folder) for key, folder in folders.items()}
    monkeypatch.setattr("sysconfig.get_paths", lambda: paths)
    judge = load_prepare(PREPARE, "code", tmp_path)
    found = [str(file.relative_to(tmp_path)) for file in judge._local_files()]
    assert found == standard + installed


def test_torch_text_leaves_out_what_differs_between_builds_and_says_another_version(tmp_path, monkeypatch, capsys):
    names = ["__init__.py", "B.py", "_inductor/codegen/cpp.py", "_inductor/ir.py", "a/b.py", "a_b.py", "version.py"]
    for name in [*names, "lib/libtorch.so", "vendor/version.py"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    judge = load_prepare(PREPARE, "pocket", tmp_path)
    monkeypatch.setattr(judge.torch, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(judge.torch, "__version__", f"{judge.TORCH_VERSION}+anything")
    wanted = ["_inductor/ir.py", "vendor/version.py", "B.py", "__init__.py", "a/b.py", "a_b.py"]  # by SHA-256
    assert [file.relative_to(tmp_path).as_posix() for file in judge._local_files()] == wanted
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(judge.torch, "__version__", "9.9.0.dev1+cpu")
    judge._local_files()
    assert capsys.readouterr().out.startswith(f"note: torch is 9.9.0.dev1, not {judge.TORCH_VERSION}: ")
    assert f'"torch=={judge.TORCH_VERSION}"' in (PREPARE.parent / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("line", ["{", '{"body": 1}', '{"text": 5}', "[1]"])
def test_bad_jsonl_line_is_named(tmp_path, capsys, line):
    path = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    path.write_text(path.read_text() + line + "\n")
    prepared(tmp_path, path, expect=1)
    assert error_line(capsys).startswith(f"error: {path}:3 is no JSON object with a string in 'text'")


def test_bad_local_parquet_is_named(tmp_path, capsys):
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    prepared(tmp_path, tmp_path / "a.parquet", expect=1)
    problem = "is not a readable parquet file with a text column (its type is int64, not string)"
    assert f"{tmp_path / 'a.parquet'} {problem}" in error_line(capsys)


def test_parquet_with_a_damaged_page_is_named(tmp_path, capsys):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": corpus()}), path, compression="zstd")
    data = bytearray(path.read_bytes())
    data[1000:2000] = bytes(1000)
    path.write_bytes(data)
    prepared(tmp_path, path, expect=1)
    error = error_line(capsys)
    assert error.startswith(f"error: {path} is damaged (") and error.endswith("): mend or delete it")


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


def test_numbers_are_split_into_pairs_of_digits(tmp_path):
    """In the text that is learned from, 123 and 456 are as frequent as 12, 34 and 56."""
    source = write_jsonl(tmp_path / "a.jsonl", [text + " 123456" * 20 for text in corpus()])
    tokenizer = prepared(tmp_path, source).Tokenizer.from_directory()
    assert [tokenizer.decode([i]) for i in tokenizer.encode("1234565")] == ["12", "34", "56", "5"]


def test_lone_surrogates_are_replaced(shared):
    tokenizer = shared.Tokenizer.from_directory()
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a�b"
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude42")) == "🙂"


@pytest.mark.parametrize(
    "parts",
    [
        ["ba ke\n", "!!\n", " \n", "\r\n", "'s", "  lo", "\n\n", "12", "\t", "é", "x\n"],
        ["ba", " ke", " lo", ", ", "  mi", "'s", "1234", "?!", " é\u0301", " 漢字", "\u00a0"],  # no line end at all
        ["    ba ke\n", "\tlo = mi\r\n", "  \n", "    # nu\n"],  # every line indented
    ],
    ids=["lines", "one line", "indented"],
)
def test_long_documents_encode_as_if_whole(shared, monkeypatch, parts):
    """Chunks end where no token can cross: the ids are those of the undivided text."""
    tokenizer = shared.Tokenizer.from_directory()
    text = "".join(random.Random(4).choices(parts, k=6000))
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


def test_tokenizer_learns_from_the_training_split_only(tmp_path):
    """A word that only held-out documents use becomes no token; one that training uses does."""
    held, kept = [], []
    for text in (f"{english(random.Random(i), 60)} {i}" for i in range(3000)):
        number = int(hashlib.sha256((text + " zzzzqqqq" * 30).encode()).hexdigest(), 16) % 20
        (held if number < 2 else kept).append(text + (" zzzzqqqq" * 30 if number < 2 else " wwwwjjjj" * 30))
    kept = [text for text in kept if int(hashlib.sha256(text.encode()).hexdigest(), 16) % 20 > 1]
    judge = prepared(tmp_path, write_jsonl(tmp_path / "a.jsonl", held + kept))
    tokenizer = judge.Tokenizer.from_directory()
    assert len(tokenizer.encode(" wwwwjjjj")) == 1 and len(tokenizer.encode(" zzzzqqqq")) > 4


def test_tokenizer_learns_from_so_much_in_all_and_of_each_document(tmp_path, monkeypatch):
    judge, path, seen = load_prepare(PREPARE, "smoke", tmp_path), tmp_path / "a.parquet", []
    assert (judge.TOKENIZER_CHARS, judge.TOKENIZER_DOCUMENT_CHARS) == (10**9, 10_000)
    judge.TOKENIZER_CHARS = 25_000
    pq.write_table(pa.table({"text": ["a" * 10_001, "b" * 50, "c" * 20_000, "d" * 9_000, "e"]}), path)
    spy = SimpleNamespace(train_from_iterator=lambda texts, *_, **__: seen.extend(texts), get_mergeable_ranks=list)
    monkeypatch.setattr(rustbpe, "Tokenizer", lambda: spy)
    with pytest.raises(judge.UserError, match="the vocabulary has 0 tokens"):
        judge._train_tokenizer([path])
    assert seen == ["a" * 10_000, "b" * 50, "c" * 10_000, "d" * 4_950]


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
    command = [sys.executable, "-c", code, str(path.parent), str(tmp_path / "big.parquet")]
    env = environment(load_prepare(path, "mine", tmp_path / "cache"))
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


def test_later_preparation_says_that_the_text_is_not_read_again(shared, capsys):
    capsys.readouterr()
    assert shared.main([]) == 0
    told = f"kept {shared.CACHE / 'text'}: delete {shared.CACHE} to read {shared.SOURCE} anew\n"
    assert told in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", '{"metric": {}}', "[1]"])
def test_damaged_manifest_is_named(shared, tmp_path, capsys, text):
    judge = load_prepare(shared.__file__, "mine", tmp_path)
    path = judge.CACHE / "manifest.json"
    path.parent.mkdir()
    path.write_text(text)
    assert judge.main([]) == 1
    error = error_line(capsys)
    assert error.startswith(f"error: {path} is damaged, or of another version of prepare.py (")
    assert error.endswith("): delete it and run 'uv run prepare.py'")
    assert judge.describe()["problem"] in error


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


def test_changed_token_file_under_a_manifest_is_an_error(tmp_path, capsys):
    """It is no new metric under the old name."""
    judge = prepared(tmp_path, write_jsonl(tmp_path / "a.jsonl", corpus()))
    path = judge.CACHE / "tokens/val.tokens"
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    assert judge.main([]) == 1
    assert f"{path} is not what was prepared" in error_line(capsys)


@pytest.mark.parametrize("name", ["text", "tokenizer.tiktoken", "manifest.json"])
def test_killed_preparation_is_completed_by_the_next_run(tmp_path, shared, name):
    judge = load_prepare(shared.__file__, "mine", tmp_path)
    die_at(judge, name)
    assert judge.main([]) == 0 and judge.main(["--verify"]) == 0
    assert snapshot(judge.CACHE) == snapshot(shared.CACHE)


def test_interrupt_ends_preparation_without_a_traceback(tmp_path):
    """Ctrl-C while the tokenizer is being trained in native code."""
    source = write_jsonl(tmp_path / "a.jsonl", corpus(documents=3000, words=100))
    path = copy_prepare(tmp_path, profile_row("mine", source, vocab_size=20000))
    judge = load_prepare(path, "mine", tmp_path / "cache")
    with started(judge, path) as child:
        wait_for(lambda: (judge.CACHE / "text").exists() or child.poll() is not None, 60)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=10)
    assert child.returncode == -signal.SIGINT and "Traceback" not in err


def test_no_word_of_a_traceback_reaches_a_user(tmp_path):
    env = {**os.environ, "AUTORESEARCH_PROFILE": "pocket", "AUTORESEARCH_CACHE": str(tmp_path / "file" / "below")}
    (tmp_path / "file").write_text("in the way")
    done = subprocess.run([sys.executable, str(PREPARE)], env=env, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
