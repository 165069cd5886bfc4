"""Profiles, sources, splits, tokenizer, token files, manifest, locks and command line of prepare.py.

Run: uv run pytest tests/test_prepare.py
"""

import hashlib
import os
import random
import re
import shutil
import signal
from collections import Counter
from functools import cache
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import wait_for
from prepare_fixtures import (
    PREPARE,
    copy_prepare,
    die_at,
    english,
    error_line,
    load_prepare,
    profile_row,
    started,
    write_jsonl,
)

V = 320  # tokens, the vocabulary of the profile "mine"


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
    evaluator = load_prepare(copy_prepare(folder, profile_row("mine", source, **constants)), "mine", folder / "cache")
    assert evaluator.main([]) == expect
    return evaluator


def texts_of(evaluator):
    return {
        path.stem: pq.read_table(path)["text"].to_pylist()
        for path in sorted((evaluator.CACHE / "text").glob("*.parquet"))
    }


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


def test_bad_environment_and_bad_arguments_end_with_code_2_and_say_what_came(tmp_path, capsys):
    profiles = "climbmix, code, pocket, smoke"
    for variable, value, message in (
        ("AUTORESEARCH_PROFILE", "h100", profiles),
        ("AUTORESEARCH_SEED", "-1", "a whole number below 10**9"),
        ("AUTORESEARCH_SEED", "x", "a whole number below 10**9"),
    ):
        with pytest.raises(SystemExit) as error:
            load_prepare(PREPARE, "smoke", tmp_path, **{variable: value})
        out, err = capsys.readouterr()
        assert (error.value.code, out) == (2, "")
        assert err.startswith(f"error: {variable} is {value!r}: use ") and err.endswith(f"{message}\n")
        assert err.count("\n") == 1
    evaluator = load_prepare(PREPARE, "pocket", tmp_path)
    for option, value in (("--num-shards", "0"), ("--num-shards", "-2"), ("--download-workers", "0")):
        with pytest.raises(SystemExit) as error:
            evaluator.main([option, value])
        assert error.value.code == 2
        assert f"{option} is {value}: give a number over 0" in capsys.readouterr().err
    missing = rf"{tmp_path}/pocket/tokenizer.tiktoken"
    with pytest.raises(evaluator.UserError, match=rf"^profile 'pocket' is not prepared \(no {missing}\): run 'uv run"):
        evaluator.Tokenizer.from_directory()


@pytest.mark.parametrize(("devices", "profile", "word"), [(0, "pocket", "without"), (1, "climbmix", "with")])
def test_profile_and_places_have_a_default_and_the_reason_is_printed(
    tmp_path, monkeypatch, capsys, devices, profile, word
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("torch.cuda.device_count", lambda: devices)
    evaluator = load_prepare(PREPARE, "", "", seed="", AUTORESEARCH_LOCKS="")
    taken = evaluator.PROFILE, evaluator.SEED, evaluator.CACHE, str(evaluator.LOCKS)
    assert taken == (profile, 42, tmp_path / ".cache/autoresearch" / profile, "/tmp/autoresearch-locks")
    assert evaluator.main(["--verify"]) == 1
    assert capsys.readouterr().out == f"profile: {profile} (default {word} a CUDA device)\n"


def test_what_the_loop_tells_a_run_is_taken_out_of_the_environment(tmp_path):
    path = copy_prepare(tmp_path)
    with path.open("a", encoding="utf-8") as file:
        file.write("\nLEFT = {name for name in os.environ if name.startswith('AUTORESEARCH')}\n")
    told = {"AUTORESEARCH_RESULT": str(tmp_path / "r.json"), "AUTORESEARCH_AUDIT": "1"}
    evaluator = load_prepare(path, "smoke", tmp_path, seed=9, **told)
    taken, left = (evaluator._RESULT, evaluator._AUDIT, evaluator.SEED), sorted(evaluator.LEFT)
    assert taken == (tmp_path / "r.json", True, 9)
    names = ("CACHE", "ISOLATION", "LOCKS", "PROFILE")
    assert left == [f"AUTORESEARCH_{name}" for name in names]
    by_hand = load_prepare(path, "smoke", tmp_path)
    assert by_hand._RESULT is None and by_hand._AUDIT is False


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
    evaluator = prepared(tmp_path, folder)
    assert texts_of(evaluator) == texts_of(shared)
    assert evaluator._manifest()["digest"] == shared._manifest()["digest"]


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_one_big_text_is_cut_into_documents_at_blank_lines(tmp_path, line_end):
    """As much as the error for too little text asks for."""
    rng = random.Random(5)
    paragraphs = []
    size = 0
    while size < 1.5 * 20 * 4 * 64 * 32:
        paragraphs.append(re.sub(r"\s*\n\s*", line_end, english(rng, 40)).strip() + line_end)
        size += len(paragraphs[-1])
    path = tmp_path / "book.txt"
    path.write_bytes(line_end.join(paragraphs).encode())
    evaluator = prepared(tmp_path, path)
    assert len(paragraphs) > 500 and evaluator.describe()["rows"]["val"] >= 64
    whole = set(paragraphs) | {paragraph + line_end for paragraph in paragraphs}
    documents = list(evaluator._read_documents([path]))
    assert "".join(documents) == path.read_bytes().decode()
    assert max(map(len, documents)) <= 8 * 32
    assert sum(document in whole for document in documents) > len(paragraphs) / 2


# Three letters with a space before each: too few pairs for a vocabulary.
POOR = "".join(f'{{"text": " {" ".join("abc"[(i >> k) % 3] for k in range(12))}"}}\n' for i in range(4000)).encode()
BAD_SOURCES = {  # file of the source and its bytes; the error line; {} stands for the file
    "jsonl": ("a.jsonl", b'{"text": "x"}\n{"body": 1}\n', "{}:2 is no JSON object with a string in 'text': mend it"),
    "number": ("a.jsonl", b'{"text": 5}\n', "{}:1 is no JSON object with a string in 'text': mend it"),
    "parquet": ("a.parquet", b"PAR1 and no more", "{} is not a readable parquet file with a text column ("),
    "no text": ("a.pdf", b"x", "source {} holds no .parquet, .jsonl, .txt, .md file: mend it in PROFILES"),
    "one document": (
        "a.md",
        b"word " * 600,
        "split 'val' is empty (of 1 documents one in twenty is for 'val', one for",
    ),
    "poor": (
        "a.jsonl",
        POOR,
        "316 are needed: give {} more text (about 0.2 MB, in many documents) and run again; text",
    ),
    "little": (
        "a.jsonl",
        None,
        "rows, 64 are needed: give {} more text (about 0.2 MB, in many documents) and run again",
    ),
}


@pytest.mark.parametrize("kind", BAD_SOURCES)
def test_bad_source_is_one_error_line(tmp_path, capsys, kind):
    name, data, error = BAD_SOURCES[kind]
    path = tmp_path / name
    if data is None:
        write_jsonl(path, corpus()[:100])
    else:
        path.write_bytes(data)
    evaluator = prepared(tmp_path, path, expect=1)
    assert error.format(path) in error_line(capsys)
    assert not (evaluator.CACHE / "manifest.json").exists()
    path.unlink()
    source = write_jsonl(path.with_suffix(".jsonl"), corpus())  # mended: the same command again
    assert prepared(tmp_path, source).main(["--verify"]) == 0


@pytest.mark.parametrize("source", ["~/no-such-folder", "./no-such-folder"])
def test_missing_path_is_not_asked_of_the_hub(tmp_path, capsys, source):
    prepared(tmp_path, source, expect=1)
    assert error_line(
        capsys
    ) == f"error: source {os.path.expanduser(source)} does not exist: mend it in PROFILES".replace(
        "./no", "no", source.startswith("./")
    )


def test_bytes_that_are_no_text_and_nulls_are_told_with_file_and_count(tmp_path, capsys):
    folder = tmp_path / "source"
    path = write_jsonl(folder / "a.jsonl", corpus())
    with path.open("ab") as file:
        file.write(b'{"text": null}\n{"text": null}\n{"text": "caf\xe9"}\n')
    (folder / "b.txt").write_bytes("naïve café".encode("latin-1"))
    (folder / "c.txt").write_bytes("naïve café \ufffd".encode())
    pq.write_table(pa.table({"text": [None, "x"]}), folder / "d.parquet")
    prepared(tmp_path, folder)
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert notes == [
        f"note: 3 documents without text (null) in {path} and 1 more files",
        f"note: 3 places that are not UTF-8 (replaced by U+FFFD) in {path} and 1 more files",
    ]


def test_changed_source_is_told_and_what_was_prepared_stays(tmp_path, capsys):
    path = write_jsonl(tmp_path / "source" / "a.jsonl", corpus())
    evaluator = prepared(tmp_path, path.parent)
    before = snapshot(evaluator.CACHE)
    remedy = f": to read {path.parent} anew, delete {evaluator.CACHE} and run again"

    def said():
        capsys.readouterr()
        assert evaluator.main([]) == 0
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("kept"))

    assert said() == f"kept {evaluator.CACHE / 'text'}{remedy}"
    size = path.stat().st_size
    (path.parent / "b.txt").write_text("more")
    changed = (
        rf"kept \S+; {path.parent} has changed since it was read: it was 1 files, {size:,} bytes, the newest of .*, "
    )
    assert re.fullmatch(changed + rf"now it is 2 files, {size + 4:,} bytes, .*{remedy}", said())
    shutil.rmtree(path.parent)
    assert re.fullmatch(changed + f"now it is gone{remedy}", said())
    assert snapshot(evaluator.CACHE) == before


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


def test_truncated_token_file_is_named(shared, tmp_path):
    path = tmp_path / "x.tokens"
    for lost_bytes in (8, 24, 10**9):
        path.write_bytes((shared.CACHE / "tokens/val.tokens").read_bytes()[:-lost_bytes])
        with pytest.raises(shared.UserError, match=r"x\.tokens is not a token file"):
            shared._read_shard(path)


# ----- manifest and the whole preparation -----


@pytest.mark.parametrize("text", ["", '{"metric": {}}', "[1]"])
def test_damaged_manifest_is_named(shared, tmp_path, capsys, text):
    evaluator = load_prepare(shared.__file__, "mine", tmp_path)
    path = evaluator.CACHE / "manifest.json"
    path.parent.mkdir()
    path.write_text(text)
    assert evaluator.main([]) == 1
    error = error_line(capsys)
    assert error.startswith(f"error: {path} is damaged, or of another version of prepare.py (")
    assert error.endswith("): delete it and run 'uv run prepare.py'")


@pytest.mark.parametrize("name", ["tokenizer.tiktoken", "tokens/test.tokens"])
def test_changed_metric_file_is_named_before_a_run_trains(own, capsys, name):
    """The byte table is computed from tokenizer.tiktoken, so that file stands for it."""
    path = own.CACHE / name
    assert set(own.check_data()) == set(own.METRIC_FILES) and path.stat().st_mode & 0o222 == 0
    assert own.main(["--verify"]) == 0
    assert capsys.readouterr().out.endswith(
        "verified: tokenizer.tiktoken tokenizer.json tokens/val.tokens tokens/test.tokens\n"
    )
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    changed = f"{path} is not what was prepared"
    with pytest.raises(own.UserError, match=changed):
        own.check_data()
    with pytest.raises(own.UserError, match=changed):
        own.evaluate_bpb(None, SimpleNamespace(get_vocab_size=lambda: V), 1)
    for arguments in (["--verify"], []):  # nor does it become a new metric under the old name
        assert own.main(arguments) == 1
        assert error_line(capsys).startswith(f"error: {changed}")


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


def test_missing_token_file_is_made_again(own):
    before = snapshot(own.CACHE)
    (own.CACHE / "tokens/val.tokens").unlink()
    (own.CACHE / "tokens/train_00003.tokens").unlink()
    assert own.main(["--verify"]) == 1
    assert own.main([]) == 0
    assert snapshot(own.CACHE) == before


@pytest.mark.slow
def test_killed_preparation_is_completed_by_the_next_run(shared, tmp_path):
    """And what comes out is the same, file for file, as of one that was never killed."""
    evaluator = load_prepare(shared.__file__, "mine", tmp_path)
    die_at(evaluator, ["text", "tokenizer.tiktoken", "val.tokens", "manifest.json"])
    assert evaluator.main([]) == 0 and evaluator.main(["--verify"]) == 0
    assert snapshot(evaluator.CACHE) == snapshot(shared.CACHE)
    assert not list(evaluator.CACHE.rglob("*.part"))


@pytest.mark.slow
def test_interrupt_ends_preparation_without_a_traceback(tmp_path):
    """Ctrl-C while the tokenizer is being trained in native code."""
    path = copy_prepare(tmp_path, profile_row("mine", write_jsonl(tmp_path / "a.jsonl", corpus()), vocab_size=20000))
    evaluator = load_prepare(path, "mine", tmp_path / "cache")
    with started(evaluator, path) as child:
        wait_for(lambda: (evaluator.CACHE / "text").exists() or child.poll() is not None, 60)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=10)
    assert child.returncode == -signal.SIGINT and "Traceback" not in err


def test_cache_that_cannot_be_made_is_one_error_line(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    evaluator = load_prepare(PREPARE, "pocket", tmp_path / "file" / "below")
    assert evaluator.main([]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: lock {evaluator.CACHE}/prepare.lock cannot be opened (") and err.count("\n") == 1
    assert err.endswith("): set AUTORESEARCH_CACHE to a folder that you can write to\n")


# ----- locks, the device -----


def test_lock_of_a_device_can_be_taken_by_every_user(tmp_path, capsys):
    evaluator = load_prepare(PREPARE, "smoke", tmp_path, AUTORESEARCH_LOCKS=str(tmp_path / "locks"))
    path = evaluator.LOCKS / "gpu.lock"
    before = os.umask(0o077)
    try:
        for _ in range(2):
            evaluator._lock(path, "another run holds gpu").close()
    finally:
        os.umask(before)
    assert (evaluator.LOCKS.stat().st_mode & 0o777, path.stat().st_mode & 0o777) == (0o777, 0o666)
    assert capsys.readouterr().err == ""
    path.unlink()
    path.mkdir()
    with pytest.raises(evaluator.UserError, match=r"gpu.lock cannot be opened .*: set AUTORESEARCH_LOCKS to a folder"):
        evaluator._lock(path, "another run holds gpu")


def test_devices_are_named_as_cuda_visible_devices_names_them(shared, monkeypatch):
    """Against a pretended driver: no machine of ours has two GPUs."""
    uuid = lambda device: SimpleNamespace(uuid=f"uuid-{torch.device(device).index}")  # noqa: E731
    monkeypatch.setattr(torch.cuda, "get_device_properties", uuid)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (device.index * 10**9, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for visible, names in [("", ["0", "1"]), ("3, GPU-5", ["3", "GPU-5"])]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        lock = [str(shared.LOCKS / f"uuid-{i}.lock") for i in (0, 1)]
        assert shared._devices("cuda") == {name: {"lock": lock[i], "free_gb": float(i)} for i, name in enumerate(names)}
