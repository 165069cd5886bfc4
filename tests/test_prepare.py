"""Profiles, sources, splits, tokenizer, token files, manifest, locks and command line of prepare.py.

Run: uv run pytest tests/test_prepare.py
"""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from functools import cache
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

V = 320  # tokens, the vocabulary of the profile "mine"
SMOKE_DIGEST = "6d9a8577d1f7"  # with the pinned torch, on every machine
POCKET_DIGEST = "7c6e746c7088"  # the same


def split_of(text):
    number = int.from_bytes(hashlib.sha256(text.encode()).digest(), "big") % 20
    return {0: "val", 1: "test"}.get(number, "train")


@cache
def corpus():
    """1,300 documents, a hundred of them twice. " wwwwjjjj" is in those to train on, " zzzzqqqq" in held-out ones."""
    rng = random.Random(1)
    documents = []
    while len(documents) < 1200:
        text = english(rng, 60) + " 123456" * 5
        learned = text + " wwwwjjjj" * 5
        held_out = text + " zzzzqqqq" * 30
        if split_of(learned) == "train":
            documents.append(learned)
        if split_of(held_out) != "train":
            documents.append(held_out)
    return documents + documents[:100]


def prepared(folder, source, expect=0, **constants):
    constants = {"vocab_size": V} | constants
    judge = load_prepare(copy_prepare(folder, profile_row("mine", source, **constants)), "mine", folder / "cache")
    assert judge.main([]) == expect
    return judge


def texts_of(judge):
    return {path.stem: pq.read_table(path)["text"].to_pylist() for path in sorted((judge.CACHE / "text").iterdir())}


def snapshot(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A prepared profile, which tests leave as it is."""
    folder = tmp_path_factory.mktemp("prepare")
    source = write_jsonl(folder / "source" / "a.jsonl", corpus())
    return prepared(folder, source.parent)


@pytest.fixture
def own(shared, tmp_path):
    """A copy of the prepared profile, to spoil."""
    shutil.copytree(shared.CACHE_ROOT, tmp_path / "cache")
    return load_prepare(shared.__file__, "mine", tmp_path / "cache")


# ----- profiles and environment -----


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("AUTORESEARCH_PROFILE", "h100", "climbmix, code, pocket, smoke"),
        ("AUTORESEARCH_SEED", "-1", "a whole number below 10**9"),
        ("AUTORESEARCH_SEED", "x", "a whole number below 10**9"),
    ],
)
def test_bad_environment_ends_an_import_with_code_2(tmp_path, capsys, variable, value, message):
    with pytest.raises(SystemExit) as error:
        load_prepare(PREPARE, "smoke", tmp_path, **{variable: value})
    out, err = capsys.readouterr()
    assert (error.value.code, out) == (2, "")
    assert err.startswith(f"error: {variable} is {value!r}: use ") and err.endswith(f"{message}\n")
    assert err.count("\n") == 1


def test_profiles_are_those_of_the_design(tmp_path):
    judge = load_prepare(PREPARE, "smoke", tmp_path, seed=7)
    design = {
        "climbmix": ("karpathy/climbmix-400b-shuffle", 2048, 300, 40 * 524288, 8192, 6543, 10**15),
        "code": ("python:all", 2048, 300, 40 * 524288, 8192, 0, 10**15),
        "pocket": ("python:torch", 256, 30, 2**18, 2048, 0, 10**15),
        "smoke": ("python:torch", 64, 2, 2**13, 512, 0, 3_000_000),
    }
    assert {name: tuple(judge.PROFILES[name]) for name in design} == design  # a fork has rows of its own beside them
    constants = (judge.SOURCE, judge.MAX_SEQ_LEN, judge.TIME_BUDGET, judge.EVAL_TOKENS, judge.VOCAB_SIZE)
    assert (*constants, judge.HUB_SHARDS, judge.MAX_CHARS) == design["smoke"]
    taken = judge.SEED, judge.CACHE
    assert taken == (7, tmp_path / "smoke")


@pytest.mark.parametrize(("devices", "profile", "word"), [(0, "pocket", "without"), (1, "climbmix", "with")])
def test_profile_and_places_have_a_default_and_the_reason_is_printed(
    tmp_path, monkeypatch, capsys, devices, profile, word
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("torch.cuda.device_count", lambda: devices)
    judge = load_prepare(PREPARE, "", "", seed="", AUTORESEARCH_LOCKS="")
    taken = judge.PROFILE, judge.SEED, judge.CACHE, str(judge.LOCKS)
    assert taken == (profile, 42, tmp_path / ".cache/autoresearch" / profile, "/tmp/autoresearch-locks")
    assert judge.main(["--verify"]) == 1
    assert capsys.readouterr().out == f"profile: {profile} (default {word} a CUDA device)\n"


def test_what_the_loop_tells_a_run_is_taken_out_of_the_environment(tmp_path):
    path = copy_prepare(tmp_path)
    with path.open("a", encoding="utf-8") as file:
        file.write("\nLEFT = {name for name in os.environ if name.startswith('AUTORESEARCH')}\n")
    told = {"AUTORESEARCH_RESULT": str(tmp_path / "r.json"), "AUTORESEARCH_AUDIT": "1"}
    judge = load_prepare(path, "smoke", tmp_path, seed=9, **told)
    taken, left = (judge._RESULT, judge._AUDIT, judge.SEED), sorted(judge.LEFT)
    assert taken == (tmp_path / "r.json", True, 9)
    assert left == ["AUTORESEARCH_CACHE", "AUTORESEARCH_LOCKS", "AUTORESEARCH_PROFILE"]
    by_hand = load_prepare(path, "smoke", tmp_path)
    assert by_hand._RESULT is None and by_hand._AUDIT is False


def test_unprepared_profile_is_an_error_with_a_remedy(tmp_path):
    judge = load_prepare(PREPARE, "pocket", tmp_path)
    missing = rf"{tmp_path}/pocket/tokenizer.tiktoken"
    message = rf"^profile 'pocket' is not prepared \(no {missing}\): run 'uv run prepare.py'$"
    with pytest.raises(judge.UserError, match=message):
        judge.Tokenizer.from_directory()
    with pytest.raises(judge.UserError, match=r"no .*/manifest.json\): run 'uv run prepare.py'"):
        judge._manifest()


@pytest.mark.parametrize("arguments", [["--num-shards", "0"], ["--num-shards", "-2"], ["--download-workers", "0"]])
def test_bad_arguments_end_with_code_2_and_say_what_came(shared, capsys, arguments):
    with pytest.raises(SystemExit) as error:
        shared.main(arguments)
    assert error.value.code == 2
    assert f"{arguments[0]} is {arguments[1]}: give a number over 0" in capsys.readouterr().err


# ----- sources and splits -----


def test_document_goes_to_the_split_that_its_digest_says(shared):
    """So the same text never lands in two splits, however often it comes."""
    expected = {"val": Counter(), "test": Counter(), "train": Counter()}
    for text in corpus():
        expected[split_of(text)].update(shared._cut(text, 64))
    found = {"val": Counter(), "test": Counter(), "train": Counter()}
    for name, pieces in texts_of(shared).items():
        assert len(pieces) > 100
        found[name.split("_")[0]].update(pieces)
    assert found == expected


def test_pieces_are_cut_at_line_ends(shared):
    line = "x" * 39 + "\n"
    assert list(shared._cut(line * 5, 100)) == [line * 2, line * 2, line]
    assert list(shared._cut("y" * 250 + "\n" + line, 100)) == ["y" * 100, "y" * 100, "y" * 50 + "\n" + line]
    assert list(shared._cut("", 100)) == []


def test_local_files_of_every_kind_give_the_same_text_and_digest(tmp_path, shared):
    """In another folder than the shared profile's source: no path is part of the digest."""
    documents, folder = corpus(), tmp_path / "elsewhere"
    (folder / "c" / "deep").mkdir(parents=True)
    (folder / "d").mkdir()
    table = pa.table({"id": list(range(400)), "text": pa.array(documents[:400], pa.large_string())})
    pq.write_table(table, folder / "a.parquet", row_group_size=300)
    write_jsonl(folder / "b.jsonl", documents[400:700])
    for i, text in enumerate(documents[700:]):
        path = folder / (f"c/deep/{i:05d}.txt" if i < 300 else f"d/{i:05d}.md")
        path.write_bytes(text.encode())
    (folder / "notes.pdf").write_bytes(b"not read")
    judge = prepared(tmp_path, folder)
    assert texts_of(judge) == texts_of(shared)
    assert judge._manifest()["digest"] == shared._manifest()["digest"]


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


def test_smoke_profile_has_the_digest_that_it_has_everywhere(tmp_path, capsys):
    judge = load_prepare(PREPARE, "smoke", tmp_path)
    assert judge.main([]) == 0
    assert 3e6 <= sum(len(text) for pieces in texts_of(judge).values() for text in pieces) < 4e6
    manifest = judge._manifest()
    assert manifest["metric"]["rows"] == {"val": 128, "test": 128}
    assert manifest["digest"].startswith(SMOKE_DIGEST)
    assert capsys.readouterr().out.endswith(f"digest: {SMOKE_DIGEST}\n")


@pytest.mark.slow
def test_pocket_profile_has_the_digest_that_it_has_everywhere(tmp_path):
    judge = load_prepare(PREPARE, "pocket", tmp_path)
    assert judge.main([]) == 0
    assert judge._manifest()["digest"].startswith(POCKET_DIGEST)


@pytest.mark.parametrize("line", ["{", '{"body": 1}', '{"text": 5}', "[1]"])
def test_bad_jsonl_line_is_named(tmp_path, capsys, line):
    path = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    path.write_text(path.read_text() + line + "\n")
    prepared(tmp_path, path, expect=1)
    assert error_line(capsys).startswith(f"error: {path}:3 is no JSON object with a string in 'text'")


def test_parquet_with_another_type_or_a_damaged_page_is_named(tmp_path, capsys):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [1, 2]}), path)
    prepared(tmp_path, path, expect=1)
    problem = "is not a readable parquet file with a text column (its type is int64, not string): mend or delete it"
    assert error_line(capsys) == f"error: {path} {problem}"
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
    judge = prepared(tmp_path, write_jsonl(tmp_path / "a.jsonl", corpus()[:100]), expect=1)
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
        assert all(0 <= i < V - 4 for i in ids)
    assert tokenizer.get_vocab_size() == V and tokenizer.get_bos_token_id() == V - 4 == shared.BOS_ID
    assert tokenizer.decode([V - 4, V - 1]) == "<|reserved_0|><|reserved_3|>"
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a�b"  # a lone surrogate
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude42")) == "🙂"  # a pair


def test_tokenizer_encodes_lists_and_prepends(shared):
    tokenizer = shared.Tokenizer.from_directory()
    one, two = tokenizer.encode("ba ke"), tokenizer.encode("lo")
    assert tokenizer.encode(["ba ke", "lo"]) == [one, two]
    assert tokenizer.encode("ba ke", prepend=7) == [7, *one]
    assert tokenizer.encode(["ba ke", ""], prepend="<|reserved_0|>") == [[V - 4, *one], [V - 4]]


def test_numbers_are_split_into_pairs_of_digits(shared):
    """In the text that is learned from, 123 and 456 are as frequent as 12, 34 and 56."""
    tokenizer = shared.Tokenizer.from_directory()
    assert [tokenizer.decode([i]) for i in tokenizer.encode("1234565")] == ["12", "34", "56", "5"]


def test_tokenizer_learns_from_the_training_split_only(shared):
    """A word that only held-out documents use becomes no token; one that training uses does."""
    tokenizer = shared.Tokenizer.from_directory()
    assert len(tokenizer.encode(" wwwwjjjj")) == 1 and len(tokenizer.encode(" zzzzqqqq")) > 4


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
    assert [int(line.split()[1]) for line in lines] == list(range(V - 4))
    assert json.loads((shared.CACHE / "tokenizer.json").read_text()) == {
        "pattern": shared.SPLIT_PATTERN,
        "special_tokens": {f"<|reserved_{i}|>": V - 4 + i for i in range(4)},
    }


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


def test_token_files_hold_every_document_and_batch(own, tmp_path):
    """Nulls, empty and ill-formed documents, large strings, row groups of 1 to 300."""
    documents = ["", None, "a\x00b", "<|reserved_0|> text", "x" * 300_000, *corpus()[:395]]
    raw = [None if d is None else d.encode() for d in documents] + [b"\xed\xa0\x80 lone", b"\xff\xfe bytes"]
    path = tmp_path / "odd.parquet"
    table = pa.table({"text": pa.Array.from_buffers(pa.string(), len(raw), pa.array(raw, pa.binary()).buffers())})
    with pq.ParquetWriter(path, table.schema) as writer:
        for start, length in [(0, 1), (1, 300), (301, 101)]:
            writer.write_table(table.slice(start, length), row_group_size=10**6)
    own._tokenize({"odd": path})
    shard, tokenizer = own._read_shard(own._tokens_path("odd")), own.Tokenizer.from_directory()
    assert shard.batches.tolist() == [1, 128, 128, 44, 101]
    ends = np.cumsum(shard.lengths)
    found = [shard.tokens[end - n : end].tolist() for n, end in zip(shard.lengths, ends, strict=True)]
    wanted = [d or "" for d in documents] + ["��� lone", "�� bytes"]
    assert found == tokenizer.encode(wanted, prepend=own.BOS_ID)
    assert ends[-1] == len(shard.tokens)


@pytest.mark.slow
def test_document_of_50_mb_is_tokenized_in_little_memory(own, tmp_path):
    text = "".join(corpus()[:50]) * 50
    text *= 50_000_000 // len(text)
    pq.write_table(pa.table({"text": [text, "a" * 10**7, " " * 10**7]}), tmp_path / "big.parquet")
    code = (
        "import resource, sys; sys.path.insert(0, sys.argv[1]); import prepare; from pathlib import Path\n"
        "assert prepare.main([]) == 0\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "before = peak(); prepare._tokenize({'big': Path(sys.argv[2])}); print(peak() - before)\n"
        "print(prepare._read_shard(prepare._tokens_path('big')).lengths.tolist())"
    )
    command = [sys.executable, "-c", code, os.path.dirname(own.__file__), str(tmp_path / "big.parquet")]
    output = subprocess.run(command, env=environment(own), capture_output=True, text=True, check=True).stdout
    *_, peak_mb, lengths = output.splitlines()
    assert int(peak_mb) < 1000
    assert len(json.loads(lengths)) == 3 and min(json.loads(lengths)) > 10**5


@pytest.mark.parametrize("lost_bytes", [8, 24, 10**9])
def test_truncated_token_file_is_named(shared, tmp_path, lost_bytes):
    path = tmp_path / "x.tokens"
    path.write_bytes((shared.CACHE / "tokens/val.tokens").read_bytes()[:-lost_bytes])
    with pytest.raises(shared.UserError, match=r"x\.tokens is not a token file"):
        shared._read_shard(path)


# ----- manifest and the whole preparation -----


def test_second_preparation_changes_nothing_and_says_that_the_text_is_not_read_again(shared, capsys):
    before = snapshot(shared.CACHE)
    times = {path: path.stat().st_mtime_ns for path in shared.CACHE.rglob("*.tokens")}
    capsys.readouterr()
    assert shared.main([]) == 0
    told = f"kept {shared.CACHE / 'text'}: delete {shared.CACHE} to read {shared.SOURCE} anew\n"
    assert told in capsys.readouterr().out
    assert snapshot(shared.CACHE) == before
    assert {path: path.stat().st_mtime_ns for path in shared.CACHE.rglob("*.tokens")} == times


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


def test_metric_files_are_read_only_and_verified(shared, capsys):
    for name in shared.METRIC_FILES:
        assert (shared.CACHE / name).stat().st_mode & 0o222 == 0
    assert shared.main(["--verify"]) == 0
    assert capsys.readouterr().out.startswith("profile: mine (AUTORESEARCH_PROFILE)\nverified: tokenizer.tiktoken ")


def test_changed_constants_ask_for_a_new_preparation(own, tmp_path, capsys):
    def changed(**constants):
        row = profile_row("mine", own.SOURCE, **({"vocab_size": V} | constants))
        return load_prepare(copy_prepare(tmp_path / "changed", row), "mine", own.CACHE_ROOT)

    digest = own._manifest()["digest"]
    budget = changed(time_budget=60, eval_tokens=10**7)
    with pytest.raises(budget.UserError, match="was made with time_budget 10, now it is 60: run "):
        budget._manifest()
    assert budget.main([]) == 0
    assert budget._manifest()["digest"] != digest
    with pytest.raises(own.UserError, match="now it is 10: run"):
        own._manifest()
    stream = budget._open_split("val", 32)  # more is asked for than there is: all full rows are scored
    rows = sum(len(stream.take(50)) for _ in range(1000))
    assert budget._manifest()["metric"]["rows"]["val"] == rows > 100
    capsys.readouterr()
    for constants, change in [
        ({"vocab_size": V + 20}, f"vocab_size {V}, now it is {V + 20}"),
        ({"max_chars": 5}, f"max_chars {10**15}, now it is 5"),
    ]:
        assert changed(**constants).main([]) == 1
        assert f"was made with {change}: delete {own.CACHE} and run" in error_line(capsys)
    elsewhere = copy_prepare(tmp_path / "elsewhere", profile_row("mine", tmp_path, vocab_size=V, time_budget=60))
    assert load_prepare(elsewhere, "mine", own.CACHE_ROOT).main([]) == 1
    assert f"was made with source {own.SOURCE!r}, now it is {str(tmp_path)!r}: delete" in error_line(capsys)


def test_missing_token_file_is_made_again_and_a_changed_one_is_an_error(own, capsys):
    before = snapshot(own.CACHE)
    (own.CACHE / "tokens/val.tokens").unlink()
    (own.CACHE / "tokens/train_00003.tokens").unlink()
    assert own.main(["--verify"]) == 1
    assert own.main([]) == 0
    assert snapshot(own.CACHE) == before
    path = own.CACHE / "tokens/val.tokens"
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    capsys.readouterr()
    assert own.main([]) == 1  # it is no new metric under the old name
    assert f"{path} is not what was prepared" in error_line(capsys)


@pytest.mark.slow
def test_killed_preparation_is_completed_by_the_next_run(shared, tmp_path):
    """And what comes out is the same, file for file, as of one that was never killed."""
    judge = load_prepare(shared.__file__, "mine", tmp_path)
    die_at(judge, ["text", "tokenizer.tiktoken", "val.tokens", "manifest.json"])
    assert judge.main([]) == 0 and judge.main(["--verify"]) == 0
    assert snapshot(judge.CACHE) == snapshot(shared.CACHE)
    assert not list(judge.CACHE.rglob("*.part"))


@pytest.mark.slow
def test_interrupt_ends_preparation_without_a_traceback(tmp_path):
    """Ctrl-C while the tokenizer is being trained in native code."""
    path = copy_prepare(tmp_path, profile_row("mine", write_jsonl(tmp_path / "a.jsonl", corpus()), vocab_size=20000))
    judge = load_prepare(path, "mine", tmp_path / "cache")
    with started(judge, path) as child:
        wait_for(lambda: (judge.CACHE / "text").exists() or child.poll() is not None, 60)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=10)
    assert child.returncode == -signal.SIGINT and "Traceback" not in err


def test_cache_that_cannot_be_made_is_one_error_line(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    judge = load_prepare(PREPARE, "pocket", tmp_path / "file" / "below")
    assert judge.main([]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: lock {judge.CACHE}/prepare.lock cannot be opened (") and err.count("\n") == 1
    assert err.endswith("): set AUTORESEARCH_CACHE to a folder that you can write to\n")


# ----- locks -----


@pytest.fixture
def strict_umask():
    before = os.umask(0o077)
    yield
    os.umask(before)


def test_lock_of_a_device_can_be_taken_by_every_user(tmp_path, strict_umask, capsys):
    judge = load_prepare(PREPARE, "smoke", tmp_path, AUTORESEARCH_LOCKS=str(tmp_path / "locks"))
    path = judge.LOCKS / "gpu.lock"
    judge._lock(path, "another run holds gpu").close()
    assert judge.LOCKS.stat().st_mode & 0o7777 == 0o1777
    assert path.stat().st_mode & 0o777 == 0o666
    os.utime(path, (1, 1))
    judge._lock(path, "another run holds gpu").close()
    assert path.stat().st_mtime > 1e9  # in use: too young to be cleaned away
    assert capsys.readouterr().err == ""


def test_lock_that_cannot_be_opened_says_what_to_do(tmp_path):
    judge = load_prepare(PREPARE, "smoke", tmp_path, AUTORESEARCH_LOCKS=str(tmp_path / "locks"))
    judge.LOCKS.mkdir()
    path = judge.LOCKS / "gpu.lock"
    path.symlink_to(tmp_path / "a file of somebody's")
    with pytest.raises(judge.UserError, match=r"gpu.lock cannot be opened .*: remove it, or set AUTORESEARCH_LOCKS to"):
        judge._lock(path, "another run holds gpu")
    assert not (tmp_path / "a file of somebody's").exists()
