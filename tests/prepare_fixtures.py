"""What the tests of prepare.py share: the judge as a fresh module with profile rows of its own, and a small corpus."""

import importlib.util
import json
import os
import random
import sys
from pathlib import Path

import pytest

PREPARE = Path(__file__).resolve().parent.parent / "prepare.py"
LOADED = []  # modules whose stopwatch may hold a device's lock
TINY = {"max_seq_len": 32, "time_budget": 10, "eval_tokens": 100 * 32, "vocab_size": 300}


def profile_row(name, source, **constants):
    """The line that a user adds to PROFILES."""
    fields = ", ".join(f"{key}={value!r}" for key, value in (TINY | constants).items())
    return f'    "{name}": Profile({str(source)!r}, {fields}),\n'


def copy_prepare(folder, *rows):
    """prepare.py with rows added to its table, in a folder of its own."""
    source = PREPARE.read_text(encoding="utf-8")
    head, table = source.split("PROFILES = {", 1)
    first, rest = table.split("\n", 1)
    path = Path(folder) / "prepare.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{head}PROFILES = {{{first}\n{''.join(rows)}{rest}", encoding="utf-8")
    return path


def load_prepare(path, profile, cache, seed=42):
    """Imports a prepare.py under a name of its own: constants, stopwatch and all are new."""
    before = dict(os.environ)
    os.environ.update(AUTORESEARCH_PROFILE=profile, AUTORESEARCH_CACHE=str(cache), AUTORESEARCH_SEED=str(seed))
    try:
        spec = importlib.util.spec_from_file_location(f"prepare_{profile}_{random.getrandbits(64):x}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        LOADED.append(module)
    finally:
        os.environ.clear()
        os.environ.update(before)
    return module


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


@pytest.fixture(autouse=True)
def locks_given_back():
    """Closes the device locks that a test's judges took, as the end of their process would."""
    yield
    while LOADED:
        if lock := LOADED.pop()._stopwatch.lock:
            lock.close()
