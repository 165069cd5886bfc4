"""What the tests of prepare.py share: the evaluator as a fresh module with rows of its own, a small corpus."""

import importlib.util
import json
import os
import random
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

PREPARE = Path(__file__).resolve().parent.parent / "prepare.py"
LOADED = []  # modules whose stopwatch may hold a device's lock
TINY = {"max_seq_len": 32, "time_budget": 10, "eval_tokens": 100 * 32, "vocab_size": 300}


def copy_prepare(folder, name, source, **constants):
    """prepare.py with one more row at the end of its table, in a folder of its own."""
    fields = ", ".join(f"{key}={value!r}" for key, value in (TINY | constants).items())
    head, table = PREPARE.read_text(encoding="utf-8").split("PROFILES = {", 1)
    rows, rest = table.split("\n}\n", 1)
    rows += f'\n    "{name}": Profile({str(source)!r}, {fields}),'
    path = Path(folder) / "prepare.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{head}PROFILES = {{{rows}\n}}\n{rest}", encoding="utf-8")
    return path


def load_prepare(path, profile, cache, seed=42, **variables):
    """Imports a prepare.py under a name of its own: constants, stopwatch and all are new.

    variables: of the environment, for its import only, such as AUTORESEARCH_RESULT.
    """
    own = {"AUTORESEARCH_PROFILE": profile, "AUTORESEARCH_CACHE": str(cache), "AUTORESEARCH_SEED": str(seed)}
    own["AUTORESEARCH_LOCKS"] = str(Path(cache) / "locks")
    name = f"prepare_{profile}_{random.getrandbits(64):x}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    # No bytecode: a file that is changed within a second, at the same length, would look unchanged.
    with patch.dict(os.environ, own | variables), patch.object(sys, "dont_write_bytecode", True):
        sys.modules[name] = module
        spec.loader.exec_module(module)
    LOADED.append(module)
    return module


def environment(evaluator, **changes):
    """For a process that is to run with a loaded evaluator's profile, cache and locks."""
    own = {"PROFILE": evaluator.PROFILE, "CACHE": str(evaluator.CACHE_ROOT), "LOCKS": str(evaluator.LOCKS)}
    return os.environ | {f"AUTORESEARCH_{name}": value for name, value in own.items()} | changes


def error_line(capsys):
    """The one error line; progress bars before it are rewritten lines."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def english(rng, words):
    """Text with a vocabulary of 200 words, lines and paragraphs."""
    syllables = ["ba", "ke", "lo", "mi", "nu", "ra", "se", "ti", "vo", "wy"]
    lexicon = [a + b for a in syllables for b in syllables] + [a + b + "n" for a in syllables for b in syllables]
    text = []
    for _ in range(words):
        text.append(rng.choices(lexicon, range(200, 0, -1))[0] + rng.choice(["", "", "", "", ",", ".\n", "\n\n"]))
    return " ".join(text)


def write_jsonl(path, documents):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


def plain_rows(batches, width, buffer_size=1000):
    """The packing rules, word for word and slow. Yields (row, epoch); batches yields (documents, epoch)."""
    buffer, epoch = [], 1
    while True:
        row = []
        while len(row) < width:
            while len(buffer) < buffer_size:
                batch, batch_epoch = next(batches, (None, None))
                if batch is None:
                    break
                buffer.extend(batch)
                epoch = batch_epoch
            if not buffer:
                return
            left, longest = width - len(row), None
            for i, document in enumerate(buffer):
                if len(document) <= left and (longest is None or len(document) > len(buffer[longest])):
                    longest = i
            if longest is not None:
                row += buffer.pop(longest)
            else:
                shortest = min(range(len(buffer)), key=lambda i: len(buffer[i]))
                row += buffer.pop(shortest)[:left]
        yield row, epoch


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A prepared profile of short documents; returns its prepare.py and cache, which a test leaves as they are."""
    folder, rng = tmp_path_factory.mktemp("tiny"), random.Random(3)
    source = write_jsonl(folder / "source.jsonl", [english(rng, rng.choice([1, 3, 9, 40, 90])) for _ in range(2500)])
    path = copy_prepare(folder, "tiny", source)
    assert load_prepare(path, "tiny", folder / "cache").main([]) == 0
    return path, folder / "cache"


@pytest.fixture
def evaluator(tiny):
    """The evaluator with that profile, as in a process of its own."""
    return load_prepare(tiny[0], "tiny", tiny[1])


@pytest.fixture(autouse=True)
def locks_given_back():
    """Closes the device locks that a test's evaluators took, as the end of their process would."""
    yield
    while LOADED:
        if lock := LOADED.pop()._stopwatch.lock:
            lock.close()
