"""Profiles, sources, splits, tokenizer, token files, manifest, locks and command line of prepare.py."""

import hashlib
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from functools import cache
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from prepare_fixtures import PREPARE, copy_prepare, english, error_line, load_prepare, write_jsonl

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
        if split_of(text + " wwwwjjjj" * 5) == "train":
            documents.append(text + " wwwwjjjj" * 5)
        if split_of(text + " zzzzqqqq" * 30) != "train":
            documents.append(text + " zzzzqqqq" * 30)
    return documents + documents[:100]


def prepared(folder, source, expect=0):
    evaluator = load_prepare(copy_prepare(folder, "mine", source, vocab_size=V), "mine", folder / "cache")
    assert evaluator.main([]) == expect
    return evaluator


def texts_of(evaluator):
    return {path.stem: pq.read_table(path)["text"].to_pylist() for path in (evaluator.CACHE / "text").glob("*.parquet")}


def snapshot(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A prepared profile, which tests leave as it is."""
    folder = tmp_path_factory.mktemp("prepare")
    return prepared(folder, write_jsonl(folder / "source" / "a.jsonl", corpus()).parent)


@pytest.fixture
def own(shared, tmp_path):
    """A copy of the prepared profile, to spoil."""
    shutil.copytree(shared.CACHE_ROOT, tmp_path / "cache")
    return load_prepare(shared.__file__, "mine", tmp_path / "cache")


# ----- profiles and environment -----


@pytest.mark.parametrize(
    ("variable", "value", "remedy"),
    [
        ("AUTORESEARCH_PROFILE", "h100", "one of climbmix, code, pocket, smoke"),
        ("AUTORESEARCH_SEED", "-1", "a whole number below 10**9"),
        ("--num-shards", "0", "give a number over 0, or -1 for all"),
        ("--download-workers", "0", "give a number over 0"),
    ],
)
def test_bad_variable_and_bad_option_end_with_code_2_and_say_what_came(tmp_path, capsys, variable, value, remedy):
    variables = {variable: value} if variable.isupper() else {}
    with pytest.raises(SystemExit, match="2"):
        load_prepare(PREPARE, "smoke", tmp_path, **variables).main([variable, value])
    error = capsys.readouterr().err
    assert f"{variable} is {value}: {remedy}\n" in error or error == f"error: {variable} is {value!r}: use {remedy}\n"


@pytest.mark.parametrize(("devices", "profile", "word"), [(0, "pocket", "without"), (1, "climbmix", "with")])
def test_defaults_have_their_reason_and_missing_data_asks_for_preparation(
    tmp_path, monkeypatch, capsys, devices, profile, word
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("torch.cuda.device_count", lambda: devices)
    evaluator = load_prepare(PREPARE, "", "", seed="", AUTORESEARCH_LOCKS="")
    assert (evaluator.PROFILE, evaluator.SEED, str(evaluator.LOCKS)) == (profile, 42, "/tmp/autoresearch-locks")
    assert str(evaluator.CACHE) == f"{tmp_path}/.cache/autoresearch/{profile}"
    assert evaluator.main(["--verify"]) == 1
    out, err = capsys.readouterr()
    assert out == f"profile: {profile} (default {word} a CUDA device)\n"
    missing = evaluator.CACHE / "manifest.json"
    assert err == f"error: profile '{profile}' is not prepared (no {missing}): run 'uv run prepare.py'\n"


# ----- sources and splits -----


def test_document_goes_to_the_split_that_its_digest_says(shared):
    """So the same text never lands in two splits, however often it comes."""
    expected = defaultdict(Counter)
    for text in corpus():
        expected[split_of(text)].update(shared._cut(text, 64))
    found = defaultdict(Counter)
    for name, pieces in texts_of(shared).items():
        assert len(pieces) > 100
        found[name.split("_")[0]].update(pieces)
    assert found == expected


def test_local_files_of_every_kind_give_the_same_text_and_digest(tmp_path, shared):
    """In another folder than the shared profile's source: no path is part of the digest."""
    documents = corpus()
    folder = tmp_path / "elsewhere"
    (folder / "c/deep").mkdir(parents=True)
    table = pa.table({"id": list(range(400)), "text": pa.array(documents[:400], pa.large_string())})
    pq.write_table(table, folder / "a.parquet", row_group_size=300)
    write_jsonl(folder / "b.jsonl", documents[400:700])
    for i, text in enumerate(documents[700:]):
        (folder / f"c/deep/{i:05d}{'.md' if i % 2 else '.txt'}").write_bytes(text.encode())
    (folder / "notes.pdf").write_bytes(b"not read")
    evaluator = prepared(tmp_path, folder)
    assert texts_of(evaluator) == texts_of(shared)
    assert evaluator._manifest()["digest"] == shared._manifest()["digest"]


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_one_big_text_is_cut_into_documents_at_blank_lines(tmp_path, line_end):
    """As much as the error for too little text asks for."""
    rng = random.Random(5)
    paragraphs = []
    while sum(map(len, paragraphs)) < 1.5 * 20 * 4 * 64 * 32:
        paragraphs.append(re.sub(r"\s*\n\s*", line_end, english(rng, 40)).strip() + 2 * line_end)
    path = tmp_path / "book.txt"
    path.write_bytes("".join(paragraphs).encode())
    evaluator = prepared(tmp_path, path)
    assert evaluator.describe()["rows"]["val"] >= 64
    documents = list(evaluator._read_documents([path]))
    assert "".join(documents) == path.read_bytes().decode()
    assert max(map(len, documents)) <= 8 * 32
    assert len(set(documents) & set(paragraphs)) > len(paragraphs) / 2 > 250


MORE = "give {} more text (about 0.2 MB, in many documents) and run again"
BAD_SOURCES = {  # file of the source and its bytes; the error line; {} stands for the file
    "jsonl": ("a.jsonl", b'{"text": "x"}\n{"body": 1}\n', "{}:2 is no JSON object with a string in 'text': mend it"),
    "parquet": ("a.parquet", b"PAR1 and no more", "{} is not a readable parquet file with a text column ("),
    "no text": ("a.pdf", b"x", "source {} holds no .parquet, .jsonl, .txt, .md file: mend it in PROFILES"),
    "little": ("a.txt", "".join(corpus()[:100]).encode(), f"rows, 64 are needed: {MORE}"),
}


def test_bad_source_is_one_error_line_and_once_mended_the_same_command_works(tmp_path, capsys):
    for name, data, error in BAD_SOURCES.values():
        path = tmp_path / name
        path.write_bytes(data)
        evaluator = prepared(tmp_path, path, expect=1)
        assert error.format(path) in error_line(capsys)
        assert not (evaluator.CACHE / "manifest.json").exists()
        path.unlink()
        prepared(tmp_path, path, expect=1)  # gone: and the hub is not asked for it
        assert error_line(capsys) == f"error: source {path} does not exist: mend it in PROFILES (from / or ~)"
    assert prepared(tmp_path, write_jsonl(tmp_path / "b.jsonl", corpus())).main(["--verify"]) == 0


def test_documents_without_text_or_utf_8_are_told_with_file_and_count(tmp_path, capsys):
    folder = tmp_path / "source"
    path = write_jsonl(folder / "a.jsonl", corpus())
    with path.open("ab") as file:
        file.write(b'{"text": null}\n{"text": null}\n{"text": "caf\xe9"}\n')
    (folder / "b.txt").write_bytes("naïve café".encode("latin-1"))
    (folder / "c.txt").write_bytes("naïve café \ufffd".encode())
    pq.write_table(pa.table({"text": [None, "x"]}), folder / "d.parquet")
    prepared(tmp_path, folder)
    flaws = "5 documents without text (null) or not in UTF-8 (U+FFFD stands there)"
    assert capsys.readouterr().err.endswith(f"note: {flaws} in {path} and 2 more files\n")


# ----- tokenizer -----


def test_tokenizer_round_trips_keeps_special_strings_ordinary_and_learns_from_the_training_split_only(shared):
    tokenizer = shared.Tokenizer.from_directory()
    for text in ["", "naïve 漢字 🙂", "a\x00b", "  \n\n\t x", "<|reserved_0|><|reserved_3|>", "12345 1 22"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and all(0 <= i < V - 4 for i in ids)
    assert tokenizer.get_vocab_size() == V and tokenizer.get_bos_token_id() == V - 4 == shared.BOS_ID
    assert tokenizer.decode([V - 4, V - 1]) == "<|reserved_0|><|reserved_3|>"
    assert len(tokenizer.encode(" wwwwjjjj")) == 1 and len(tokenizer.encode(" zzzzqqqq")) > 4


@pytest.mark.parametrize(
    "parts",
    [
        ["ba ke\n", "!!\n", " \n", "\r\n", "'s", "  lo", "\n\n", "12", "\t", "é", "x\n", "    # nu\n", "\tlo = mi\r\n"],
        ["ba", " ke", " lo", ", ", "  mi", "'s", "1234", "?!", " é\u0301", " 漢字", "\u00a0"],  # no line end at all
    ],
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


def test_token_files_hold_every_document_and_batch_and_a_truncated_one_is_named(own, tmp_path):
    """Nulls, empty and ill-formed documents, large strings, row groups of 1 to 300."""
    documents = ["", None, "a\x00b", "<|reserved_0|> text", "x" * 300_000, *corpus()[:395]]
    raw = [None if d is None else d.encode() for d in documents] + [b"\xed\xa0\x80 lone", b"\xff\xfe bytes"]
    path = tmp_path / "odd.parquet"
    table = pa.table({"text": pa.Array.from_buffers(pa.string(), len(raw), pa.array(raw, pa.binary()).buffers())})
    with pq.ParquetWriter(path, table.schema) as writer:
        for start, length in [(0, 1), (1, 300), (301, 101)]:
            writer.write_table(table.slice(start, length), row_group_size=10**6)
    own._tokenize({"odd": path})
    tokens_path = own._tokens_path("odd")
    shard, tokenizer = own._read_shard(tokens_path), own.Tokenizer.from_directory()
    assert shard.batches.tolist() == [1, 128, 128, 44, 101]
    found = [document.tolist() for document in np.split(shard.tokens, np.cumsum(shard.lengths))]
    wanted = [d or "" for d in documents] + ["��� lone", "�� bytes"]
    assert found == [*tokenizer.encode(wanted, prepend=own.BOS_ID), []]
    whole = tokens_path.read_bytes()
    for lost_bytes in (8, 24, len(whole)):
        tokens_path.write_bytes(whole[:-lost_bytes])
        with pytest.raises(own.UserError, match=r"odd\.tokens is not a token file"):
            own._read_shard(tokens_path)


# ----- manifest and the whole preparation -----


@pytest.mark.parametrize("name", ["tokenizer.tiktoken", "tokens/test.tokens"])
def test_changed_metric_file_is_named_before_a_run_trains(own, capsys, name):
    """The byte table is computed from tokenizer.tiktoken, so that file stands for it."""
    assert own.main(["--verify"]) == 0
    assert "verified: tokenizer.tiktoken tokenizer.json tokens/val.tokens tokens/test.t" in capsys.readouterr().out
    path = own.CACHE / name
    assert path.stat().st_mode & 0o222 == 0
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.write(b"?")
    changed = f"{path} is not what was prepared"
    with pytest.raises(own.UserError, match=changed):
        own.evaluate_bpb(None, SimpleNamespace(get_vocab_size=lambda: V), 1)
    for arguments in (["--verify"], []):  # nor does it become a new metric under the old name
        assert own.main(arguments) == 1
        assert error_line(capsys).startswith(f"error: {changed}")


def test_changed_constants_ask_for_a_new_preparation(own, tmp_path, capsys):
    def changed(source=own.SOURCE, **constants):
        path = copy_prepare(tmp_path / "changed", "mine", source, **{"vocab_size": V} | constants)
        return load_prepare(path, "mine", own.CACHE_ROOT)

    for constants, change in [
        ({"vocab_size": V + 20}, f"vocab_size {V}, now it is {V + 20}"),
        ({"source": tmp_path}, f"source {own.SOURCE!r}, now it is {str(tmp_path)!r}"),
    ]:
        assert changed(**constants).main([]) == 1
        assert f"was made with {change}: delete {own.CACHE} and run" in error_line(capsys)
    budget = changed(time_budget=60, eval_tokens=10**7)
    assert budget.main(["--verify"]) == 1
    assert "was made with time_budget 10, now it is 60: run " in error_line(capsys)
    assert budget.main([]) == 0
    stream = budget._open_split("val", 32)  # more is asked for than there is: all full rows are scored
    assert budget.describe()["rows"]["val"] == len(stream.take(10**6)) > 100


def test_killed_preparation_is_completed_by_the_next_run(shared, tmp_path, monkeypatch):
    """Killed again and again, before a file gets its place, half of it written: the end is the same."""
    evaluator = load_prepare(shared.__file__, "mine", tmp_path)
    replace = os.replace
    for name in ("text", "tokenizer.tiktoken", "val.tokens", "manifest.json"):

        def replace_or_die(source, target, name=name):
            if os.path.basename(target) == name:
                if os.path.isfile(source):
                    os.truncate(source, os.path.getsize(source) // 2)
                raise SystemExit("killed")
            replace(source, target)

        with monkeypatch.context() as patches, pytest.raises(SystemExit, match="killed"):
            patches.setattr(os, "replace", replace_or_die)
            evaluator.main([])
    assert evaluator.main([]) == 0 and evaluator.main(["--verify"]) == 0
    kept = evaluator.CACHE / "tokens/train_00004.tokens"
    written = kept.stat().st_mtime_ns
    (evaluator.CACHE / "tokens/train_00003.tokens").unlink()
    assert evaluator.main([]) == 0 and kept.stat().st_mtime_ns == written  # only what is missing is made
    assert snapshot(evaluator.CACHE) == snapshot(shared.CACHE)


# ----- locks, the device -----


@pytest.mark.slow
def test_preparation_fetches_the_attention_kernel_when_it_is_called_as_the_loop_calls_it(tiny, tmp_path):
    """With -P nothing beside the file is on Python's path. A driver is pretended, and there is no network."""
    shutil.copy(tiny[0], tmp_path)
    (tmp_path / "harness").symlink_to(PREPARE.parent / "harness")
    start = "import runpy, sys, torch; torch.cuda.is_available = lambda: True; sys.argv[0] = 'prepare.py'"
    command = [sys.executable, "-P", "-c", f"{start}; runpy.run_path('prepare.py', run_name='__main__')"]
    env = os.environ | {"AUTORESEARCH_PROFILE": "tiny", "AUTORESEARCH_CACHE": str(tiny[1]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, "no attention kernel was fetched" in done.stderr) == (0, True), done.stderr


def test_lock_is_for_every_user_and_one_that_cannot_be_made_names_the_variable_to_set(tmp_path, capsys):
    evaluator = load_prepare(PREPARE, "smoke", tmp_path / "cache", AUTORESEARCH_LOCKS=str(tmp_path / "locks"))
    path = evaluator.LOCKS / "gpu.lock"
    evaluator._lock(path, "another run holds gpu").close()
    assert (evaluator.LOCKS.stat().st_mode & 0o777, path.stat().st_mode & 0o777) == (0o777, 0o666)
    (tmp_path / "cache").write_text("in the way")
    assert evaluator.main([]) == 1
    error = error_line(capsys)
    assert error.startswith(f"error: lock {evaluator.CACHE}/prepare.lock cannot be taken (")
    assert ": set AUTORESEARCH_LOCKS (AUTORESEARCH_CACHE, for data) to a folder" in error


def test_devices_are_named_as_cuda_visible_devices_names_them(shared, monkeypatch):
    """Against a pretended driver: no machine of ours has two GPUs."""
    pretended = {
        "get_device_properties": lambda device: SimpleNamespace(uuid=f"uuid-{torch.device(device).index}"),
        "mem_get_info": lambda device: (device.index * 10**9, 80 * 10**9),
        "device_count": lambda: 2,
        "get_device_name": lambda device: "H100",
    }
    for name, function in pretended.items():
        monkeypatch.setattr(torch.cuda, name, function)
    locks = [str(shared.LOCKS / f"uuid-{i}.lock") for i in (0, 1)]
    devices = [{"lock": lock, "free_gb": float(i)} for i, lock in enumerate(locks)]
    for visible, names in [("", ["0", "1"]), ("3, GPU-5", ["3", "GPU-5"])]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert shared._devices("cuda") == ("H100", dict(zip(names, devices, strict=True)))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: ("H100", "L4")[device.index])
    assert list(shared._devices("cuda")[1]) == ["3"]  # the other one is of another kind

    def out_of_memory(device):
        raise RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda one: out_of_memory(one) if one.index else (0, 0))
    assert list(shared._devices("cuda")[1]) == ["3"]  # the other one is full
    monkeypatch.setattr(torch.cuda, "mem_get_info", out_of_memory)
    with pytest.raises(shared.UserError, match="GPU GPU-5 cannot be used: CUDA error: out of memory: free it, or"):
        shared._devices("cuda")
