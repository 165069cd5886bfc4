"""prepare.py: profiles, data, tokenizer, dataloader, clock, evaluator; no model and no training.

    uv run prepare.py                     # prepare the profile's data; once more: resume, or do nothing
    uv run prepare.py --num-shards 100    # have more training shards (-1: all)
    uv run prepare.py --verify            # recompute the digests of what the metric depends on
    uv run prepare.py --score result.pt2  # score a network that an audit exported, with none of its code

AUTORESEARCH_PROFILE chooses the profile, AUTORESEARCH_CACHE the cache's place, AUTORESEARCH_LOCKS the folder of the
locks that keep two runs off one device (default /tmp/autoresearch-locks, for every user). Each profile has a folder in
the cache:
    download/, text/       parquet files as they came; documents in a column "text", one file a shard
    tokenizer.tiktoken     "base64 rank" lines; tokenizer.json: split pattern and special tokens
    tokens/                the shards as uint16 tokens; val.tokens and test.tokens are what is scored
    manifest.json          written last: constants, row counts, SHA-256. No manifest: not prepared

Shapes: B rows of a batch, T tokens of a row, V vocabulary.
"""

import argparse
import base64
import bisect
import contextlib
import fcntl
import hashlib
import itertools
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np
import tiktoken
import torch
from torch.nn.functional import cross_entropy  # bound here: a run that patches torch's own is not scored by its patch

# requests, pyarrow, rustbpe and tqdm are imported where they are used: train.py starts sooner.

# ----- Profiles -----


class Profile(NamedTuple):
    source: str  # Hugging Face data set id; file or folder of .parquet, .jsonl, .txt, .md; python:torch or python:all
    max_seq_len: int  # tokens, of a row
    time_budget: float  # seconds, of training
    eval_tokens: int  # tokens, scored (fewer if the validation split is smaller)
    vocab_size: int  # tokens, 4 of them special; at most 65536
    hub_shards: int = 0  # number of shard_NNNNN.parquet, the last two test and validation; 0: what the hub lists
    max_chars: int = 10**15  # characters, read of a source that is split here


PROFILES = {  # your own data is one more row
    "climbmix": Profile("karpathy/climbmix-400b-shuffle", 2048, 300, 40 * 524288, 8192, hub_shards=6543),
    "code": Profile("python:all", 2048, 300, 40 * 524288, 8192),
    "pocket": Profile("python:torch", 256, 30, 2**18, 2048),
    "smoke": Profile("python:torch", 64, 2, 2**13, 512, max_chars=3_000_000),
}


def _refuse_environment(variable, value, remedy):
    print(f"error: {variable} is {value!r}: use {remedy}", file=sys.stderr)
    sys.exit(2)


PROFILE = os.environ.get("AUTORESEARCH_PROFILE")
PROFILE_REASON = "AUTORESEARCH_PROFILE"
if not PROFILE:
    _has_cuda = torch.cuda.device_count() > 0  # does not start CUDA
    PROFILE = "climbmix" if _has_cuda else "pocket"
    PROFILE_REASON = f"default {'with' if _has_cuda else 'without'} a CUDA device"
if PROFILE not in PROFILES:
    _refuse_environment("AUTORESEARCH_PROFILE", PROFILE, f"one of {', '.join(PROFILES)}")

_profile = PROFILES[PROFILE]
SOURCE = _profile.source
MAX_SEQ_LEN = _profile.max_seq_len
TIME_BUDGET = _profile.time_budget
EVAL_TOKENS = _profile.eval_tokens
VOCAB_SIZE = _profile.vocab_size
CONSTANTS = _profile._asdict()
MIN_ROWS = 64  # rows, that every split must give

CACHE_ROOT = Path(os.environ.get("AUTORESEARCH_CACHE") or "~/.cache/autoresearch").expanduser().absolute()
CACHE = CACHE_ROOT / PROFILE
# Not under the cache and not under TMPDIR: runs with other caches, and other users' runs, share the same devices.
LOCKS = Path(os.environ.get("AUTORESEARCH_LOCKS") or "/tmp/autoresearch-locks").absolute()

# The loop tells a run these three. They are taken out of the environment: a process that the run starts is no run.
_seed = os.environ.pop("AUTORESEARCH_SEED", "") or "42"
_result = os.environ.pop("AUTORESEARCH_RESULT", "")
_AUDIT = os.environ.pop("AUTORESEARCH_AUDIT", "") == "1"  # score the held-out test split too
_RESULT = Path(_result).absolute() if _result else None  # where the record goes
if not re.fullmatch("[0-9]{1,9}", _seed):
    _refuse_environment("AUTORESEARCH_SEED", _seed, "a whole number below 10**9")
SEED = int(_seed)

# ----- Errors and small things -----


class UserError(Exception):
    """Something that a person can mend."""


class EvaluationRefused(RuntimeError):
    """The evaluator does not score this model or run; the message says why."""


def _progress(iterable=None, **options):
    from tqdm import tqdm

    return tqdm(iterable, mininterval=0.2 if sys.stderr.isatty() else 10, **options)


def _size(path):
    return path.stat().st_size if path.exists() else 0


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_text(path, text):
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _lock(path, waiting_for):
    """Takes an exclusive flock, and says so if it has to wait. It ends when the file is closed or the process dies.

    File and folder are made where they are missing; a device's lock is for every user.
    """
    try:
        if not path.parent.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.parent == LOCKS:
                path.parent.chmod(0o777)
        if not path.exists():
            path.touch()
            path.chmod(0o666)
        file = open(path, "r+")  # noqa: SIM115 (it stays open, and the lock with it)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting: {waiting_for} (lock {path})", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        return file
    except OSError as error:
        remedy = "set AUTORESEARCH_LOCKS (AUTORESEARCH_CACHE, for data) to a folder to write to, on a disk with locks"
        raise UserError(f"lock {path} cannot be taken ({error}): {remedy}") from error


# ----- Download: parquet shards by HTTP, continued and checked -----

ATTEMPTS = 6  # failures in a row, without a new byte, before a shard is given up
BACKOFF_SECONDS = 1.0  # before the first repetition; doubles
HTTP_TIMEOUT = (10, 30)  # seconds, to connect, and without a byte
BUSY = (429, 500, 502, 503, 504)  # answers after which a request is repeated


def _session():
    import requests
    from requests.adapters import HTTPAdapter, Retry

    # Answers that ask for patience are repeated, after the time that Retry-After names.
    options = {"connect": 0, "read": 0, "other": 0, "status_forcelist": BUSY, "raise_on_status": False}
    retry = Retry(ATTEMPTS - 1, backoff_factor=BACKOFF_SECONDS, **options)
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(64, 64, max_retries=retry))
    session.headers["Accept-Encoding"] = "identity"  # lengths are the file's
    token = os.environ.get("HF_TOKEN")
    if token:
        session.headers["Authorization"] = f"Bearer {token}"
    return session


def _download_all(urls: dict[Path, str], workers: int) -> None:
    """Fetches what is not there; UserError with the list of what is missing in the end."""
    todo = [path for path in urls if not path.exists()]
    if not todo:
        return
    session = _session()
    bar = _progress(desc=f"{len(todo)} shards", unit="B", unit_scale=True)
    failed = []
    in_a_row = []  # of these, since one came whole

    def fetch(path):
        if len(in_a_row) >= workers:  # the network is down, or the disk full: no other will fare better
            return
        try:
            _download(session, urls[path], path, bar)
            in_a_row.clear()
        except (OSError, UserError) as error:  # what requests raises are OSErrors
            failed.append(f"{path.name} ({error})")
            in_a_row.append(path)

    with bar, ThreadPoolExecutor(workers) as pool:
        list(pool.map(fetch, todo))
    if failed:
        missing = f"{sum(not path.exists() for path in urls)} of {len(urls)} shards are missing"
        hints = "401, 403: set HF_TOKEN; without a network: AUTORESEARCH_PROFILE=code"
        raise UserError(f"{missing}: {'; '.join(sorted(failed)[:4])}. Running the same command again resumes ({hints})")


def _download(session, url, path, bar):
    """Fetches one shard by way of path.part, which is continued after a failure."""
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    failures = 0
    most_bytes = _size(part)
    while True:
        try:
            _fetch(session, url, part, bar)
            _open_parquet(part)
            os.replace(part, path)
            return
        except (OSError, UserError) as error:
            if isinstance(error, UserError):  # all has come, and it is bad: from the start again
                part.unlink()
            # More than ever before: the line breaks, but it gets there.
            failures = 0 if _size(part) > most_bytes else failures + 1
            most_bytes = max(most_bytes, _size(part))
            # What the session has repeated, or what came whole and is other data, will not get better.
            is_final = getattr(error, "response", None) is not None or isinstance(error.__cause__, KeyError)
            if is_final or failures == ATTEMPTS:
                raise
            time.sleep(BACKOFF_SECONDS * 2 ** max(failures - 1, 0))


def _fetch(session, url, part, bar):
    """Appends what `part` lacks (all, if the server knows no ranges); checks its SHA-256 where the hub names it."""
    have = _size(part)
    asked = {"Range": f"bytes={have}-"} if have else {}
    with session.get(url, headers=asked, stream=True, timeout=HTTP_TIMEOUT) as answer:
        if answer.status_code != 416:  # 416: there is nothing after what we have
            answer.raise_for_status()
            continued = answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
            with open(part, "ab" if continued else "wb") as file:
                for chunk in answer.iter_content(2**14):  # a broken connection loses one of these
                    file.write(chunk)
                    bar.update(len(chunk))
    # The hub names the SHA-256 where it redirects to its storage.
    sha256 = "".join(one.headers.get("X-Linked-Etag", "") for one in (*answer.history, answer)).strip('"')
    if re.fullmatch("[0-9a-f]{64}", sha256) and _sha256(part) != sha256:
        raise UserError("it came with a wrong SHA-256")


# ----- Texts: every document into one split -----

TRAIN_SHARDS = 8  # of a source that is split here; a seed chooses the shard that training starts with
SHUFFLE_CHARS = 2**26  # characters, shuffled together
BATCH_DOCUMENTS = 128  # most documents that enter the packing buffer together
LONG_TEXT_CHARS = 100 * MAX_SEQ_LEN  # characters; a longer .txt or .md file is cut into documents,
TEXT_DOCUMENT_CHARS = 8 * MAX_SEQ_LEN  # of at most so many
TEXT_KINDS = (".parquet", ".jsonl", ".txt", ".md")
# One document in twenty is for each held-out split, a token has about 4 bytes; half as much again, as chance cuts.
NEEDED_MB = 1.5 * 20 * 4 * MIN_ROWS * MAX_SEQ_LEN / 1e6
HUB = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
MORE_TEXT = f"give {SOURCE} more text (about {NEEDED_MB:.1f} MB, in many documents) and run again"

_flaws: Counter[Path] = Counter()  # documents without text, or not in UTF-8, of each file read


def _texts(num_shards: int, workers: int) -> dict[str, Path]:
    """The parquet file of every shard, "val", "test" and the training shards in order; made if missing."""
    if _profile.hub_shards:
        return _hub_texts(num_shards, workers)
    folder = CACHE / "text"
    if not (CACHE / "manifest.json").exists():  # what is there may be of another text
        for stale in (folder, CACHE / "tokens"):
            shutil.rmtree(stale, ignore_errors=True)
    if folder.exists():
        print(f"kept {folder}: to read {SOURCE} anew, delete {CACHE} and run again")
    else:
        files = _local_files() or _listed_files(num_shards, workers)
        _split(_read_documents(files), folder)
    return {path.stem: path for path in sorted(folder.glob("*.parquet"))}


def _hub_texts(num_shards, workers):
    """Downloads numbered shards. Those of an earlier preparation stay, even if fewer are asked for now."""
    shards = [CACHE / "text" / f"shard_{i:05d}.parquet" for i in range(_profile.hub_shards)]
    *train, test, val = shards
    texts = {"val": val, "test": test}
    texts |= {path.stem: path for i, path in enumerate(train) if i < num_shards or path.exists()}
    _download_all({path: f"{HUB}/datasets/{SOURCE}/resolve/main/{path.name}" for path in texts.values()}, workers)
    return texts


def _listed_files(num_shards, workers):
    """Downloads the first parquet files that the hub lists for the data set, of split "train" where it has one."""
    answer = _session().get(f"{HUB}/api/datasets/{SOURCE}/parquet", timeout=HTTP_TIMEOUT)
    configs = answer.json() if answer.ok else None
    if not configs:
        said = f"source {SOURCE!r} is no local path, and {HUB} lists no such data (HTTP {answer.status_code})"
        raise UserError(f"{said}: mend it in PROFILES (401, 403: set HF_TOKEN; 429, 5xx: run it again)")
    splits = configs.get("default") or next(iter(configs.values()))
    listed = splits.get("train") or next(iter(splits.values()))
    folder = CACHE / "download" / SOURCE
    urls = {folder / f"{i:05d}.parquet": HUB + urlsplit(url).path for i, url in enumerate(listed[:num_shards])}
    _download_all(urls, workers)
    return list(urls)


def _local_files() -> list[Path]:
    """The files of a local source, in an order that depends on no file system or locale; none for a hub's id."""
    if SOURCE == "python:torch":
        return _torch_files()
    if SOURCE == "python:all":
        return _installed_files()
    source = Path(SOURCE).expanduser()
    if SOURCE.startswith(("/", "~", ".")) and not source.exists():
        raise UserError(f"source {source.absolute()} does not exist: mend it in PROFILES (from / or ~)")
    candidates = [source] if source.is_file() else _sorted_files(source, "*")
    files = [file for file in candidates if file.suffix in TEXT_KINDS]
    if source.exists() and not files:
        raise UserError(f"source {source} holds no {', '.join(TEXT_KINDS)} file: mend it in PROFILES")
    return files


def _sorted_files(folder, pattern) -> list[Path]:
    files = [file for file in folder.rglob(pattern) if file.is_file()]
    return sorted(files, key=lambda file: file.relative_to(folder).as_posix())


def _torch_files() -> list[Path]:
    """The .py files of torch that are the same in the wheels of one version for every system, chip and Python.

    Another version is another text, with another digest.
    """
    folder = Path(torch.__file__).parent
    # version.py names the build; builds for AMD's GPUs translate CUDA's names in files of the code generator.
    codegen = folder / "_inductor" / "codegen"
    files = [file for file in folder.rglob("*.py") if file != folder / "version.py" and codegen not in file.parents]

    # Not in the order of names: the first files would be of one or two packages, and `smoke` reads only the first.
    return sorted(files, key=lambda file: hashlib.sha256(file.relative_to(folder).as_posix().encode()).digest())


def _installed_files() -> list[Path]:
    """The .py files of the standard library, then those of site-packages."""
    paths = sysconfig.get_paths()
    standard = _sorted_files(Path(paths["stdlib"]), "*.py")
    files = [file for file in standard if not {"site-packages", "dist-packages"} & set(file.parts)]
    for folder in dict.fromkeys([paths["purelib"], paths["platlib"]]):  # one folder, most often
        files += _sorted_files(Path(folder), "*.py")
    return files


def _read_documents(files):
    for path in _progress(files, desc="read", unit="file"):
        if path.suffix == ".parquet":
            yield from itertools.chain.from_iterable(_document_batches(path))
        elif path.suffix == ".jsonl":
            yield from _read_jsonl(path)
        else:
            text = _decode(path.read_bytes(), path)
            if path.suffix != ".py" and len(text) > LONG_TEXT_CHARS:
                yield from _cut(text, TEXT_DOCUMENT_CHARS, places=("\n\n", "\r\n\r\n", "\n"))
            else:
                yield text


def _read_jsonl(path):
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = json.loads(_decode(line, path))["text"]
                _flaws[path] += text is None
                # Joins surrogate pairs; lone surrogates, which UTF-8 cannot hold, become U+FFFD.
                yield (text or "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            except (ValueError, TypeError, LookupError, AttributeError):
                raise UserError(f"{path}:{number} is no JSON object with a string in 'text': mend it") from None


def _decode(data: bytes, path: Path) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        _flaws[path] += 1
        return data.decode("utf-8", "replace")


def _say_flaws():
    files = [path for path, number in _flaws.items() if number]
    if files:
        more = f" and {len(files) - 1} more files" if len(files) > 1 else ""
        told = f"{_flaws.total():,} documents without text (null) or not in UTF-8 (U+FFFD stands there)"
        print(f"note: {told} in {files[0]}{more}", file=sys.stderr)


def _open_parquet(path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(path)
        text_type = parquet.schema_arrow.field("text").type
        if text_type not in (pa.string(), pa.large_string()):
            raise KeyError(f"its type is {text_type}, not string")
    except (pa.ArrowException, KeyError, OSError) as error:
        problem = f"is not a readable parquet file with a text column ({error})"
        raise UserError(f"{path} {problem}: mend or delete it, or choose a source with strings in 'text'") from error
    return parquet


def _document_batches(path):
    """Yields lists of documents, each of one row group. A null is an empty document."""
    parquet = _open_parquet(path)
    _flaws[path] = 0  # a shard is read twice
    try:
        for group in range(parquet.num_row_groups):
            for batch in parquet.iter_batches(BATCH_DOCUMENTS, [group], ["text"], use_threads=False):
                _flaws[path] += batch.column(0).null_count
                documents = batch.column(0).cast("large_binary").to_pylist()  # parquet does not ensure UTF-8
                yield [_decode(document or b"", path) for document in documents]
    except (ValueError, OSError) as error:  # pyarrow's, of a damaged page
        raise UserError(f"{path} is damaged ({error}): mend or delete it") from error


def _split(documents, folder):
    """Writes the shards. A document's SHA-256 chooses its split, so no text is in two splits."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    part = folder.with_name("text.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    train = [f"train_{i:05d}" for i in range(TRAIN_SHARDS)]
    pieces = {name: [] for name in ("val", "test", *train)}
    schema = pa.schema([("text", pa.string())])
    rng = random.Random(42)

    def write_pieces():
        for name, texts in pieces.items():
            rng.shuffle(texts)
            writers[name].write_table(pa.table({"text": texts}, schema), row_group_size=1024)
            texts.clear()

    with contextlib.ExitStack() as stack:
        writers = {name: stack.enter_context(pq.ParquetWriter(part / f"{name}.parquet", schema)) for name in pieces}
        chars = 0
        waiting_chars = 0
        for document in documents:
            if chars >= _profile.max_chars:
                break
            if waiting_chars >= SHUFFLE_CHARS:
                write_pieces()
                waiting_chars = 0
            held_out = _held_out_split(document)
            for piece in _cut(document, 2 * MAX_SEQ_LEN):
                # A short run sees only one training shard, so each shard gets pieces of every document.
                name = held_out or train[rng.randrange(TRAIN_SHARDS)]
                pieces[name].append(piece)
            chars += len(document)
            waiting_chars += len(document)
        write_pieces()
    os.replace(part, folder)


def _held_out_split(document):
    """Of twenty documents, one is for "val" and one for "test"; None: it is to train on."""
    number = int(hashlib.sha256(document.encode()).hexdigest(), 16) % 20
    return {0: "val", 1: "test"}.get(number)


def _cut(document, limit, places=("\n",)):
    """Yields pieces of at most `limit` characters. Each ends after the last place of the first kind in it, or hard."""
    start = 0
    while start < len(document):
        end = start + limit
        if end < len(document):
            for place in places:
                at = document.rfind(place, start, end)
                if at >= 0:
                    end = at + len(place)
                    break
        yield document[start:end]
        start = end


# ----- Tokenizer: byte-pair encoding -----

SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = {f"<|reserved_{i}|>": VOCAB_SIZE - 4 + i for i in range(4)}
BOS_ID = SPECIAL_TOKENS["<|reserved_0|>"]
TOKENIZER_CHARS = 10**9  # characters that it is trained on, at most
TOKENIZER_DOCUMENT_CHARS = 10_000  # characters of one document, at most
CHUNK_CHARS = 100_000  # characters for tiktoken at once: its regex overflows on a million spaces


class Tokenizer:
    """Text to token ids and back. The last four ids are special tokens, and no text encodes to them."""

    def __init__(self, encoding: tiktoken.Encoding):
        self.encoding = encoding

    @classmethod
    def from_directory(cls) -> "Tokenizer":
        """The profile's tokenizer."""
        lines = (CACHE / "tokenizer.tiktoken").read_bytes().splitlines()
        meta = json.loads((CACHE / "tokenizer.json").read_bytes())
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
        special = meta["special_tokens"]
        return cls(tiktoken.Encoding("bpe", pat_str=meta["pattern"], mergeable_ranks=ranks, special_tokens=special))

    def get_vocab_size(self) -> int:
        return self.encoding.n_vocab

    def get_bos_token_id(self) -> int:
        return self.encoding.encode_single_token("<|reserved_0|>")

    def encode(self, text: str | list[str], prepend: int | str | None = None) -> list:
        """Ids of a text, or a list of them for a list. prepend: a token (id or special name) put before each text."""
        if not isinstance(text, str):
            return [self.encode(one, prepend) for one in text]
        ids = self.encode_array(text).tolist()
        if prepend is None:
            return ids
        first = self.encoding.encode_single_token(prepend) if isinstance(prepend, str) else prepend
        return [first, *ids]

    def encode_array(self, text: str) -> np.ndarray:
        """Ids of one text, uint32. The interpreter lock stays free, so threads use all cores."""
        arrays = [self.encoding.encode_to_numpy(chunk, disallowed_special=()) for chunk in _chunks(text)]
        return np.concatenate(arrays)

    def decode(self, ids) -> str:
        return self.encoding.decode(list(ids))


def _chunks(text):
    """Cuts a text where SPLIT_PATTERN never matches across: before an unindented line, or before a space after a word.

    So the ids are those of the uncut text. Only a chunk's length without such a place is cut hard.
    """
    exact_place = r"\Z|(?<=\n)(?=\S)|(?<=\S)(?= )"
    return re.findall(rf"(?s).{{1,{CHUNK_CHARS}}}(?:{exact_place})|.{{{CHUNK_CHARS}}}", text) or [""]


def get_token_bytes(device="cpu") -> torch.Tensor:
    """Raw byte length of each token, int32 (V,), 0 for special tokens; from the tokenizer's file."""
    encoding = Tokenizer.from_directory().encoding
    lengths = [len(encoding.decode_single_token_bytes(token)) for token in range(BOS_ID)]
    lengths += [0] * len(SPECIAL_TOKENS)
    return torch.tensor(lengths, dtype=torch.int32, device=device)


def _train_tokenizer(shards):
    import rustbpe

    bpe = rustbpe.Tokenizer()
    bpe.train_from_iterator(_tokenizer_texts(shards), BOS_ID, pattern=SPLIT_PATTERN)
    tokens = [bytes(token) for token, _ in bpe.get_mergeable_ranks()]  # by rank
    if len(tokens) < BOS_ID:
        remedy = f"{MORE_TEXT}; text that repeats itself needs a smaller vocab_size in PROFILES"
        raise UserError(f"the vocabulary has {len(tokens)} tokens, {BOS_ID} are needed: {remedy}")
    text = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    path = CACHE / "tokenizer.tiktoken"
    if not path.exists() or path.read_bytes() != text.encode():  # else the token files are this tokenizer's
        shutil.rmtree(CACHE / "tokens", ignore_errors=True)
    for split in ("val", "test"):  # of the last two shards, of whatever number of them was asked for
        _tokens_path(split).unlink(missing_ok=True)
    _write_text(CACHE / "tokenizer.json", json.dumps({"pattern": SPLIT_PATTERN, "special_tokens": SPECIAL_TOKENS}))
    _write_text(path, text)


def _tokenizer_texts(shards):
    """The beginning of each document, until TOKENIZER_CHARS have been given out."""
    chars_left = TOKENIZER_CHARS
    for path in _progress(shards, desc="tokenizer", unit="shard"):
        for document in itertools.chain.from_iterable(_document_batches(path)):
            text = document[: min(chars_left, TOKENIZER_DOCUMENT_CHARS)]
            yield text
            chars_left -= len(text)
            if chars_left == 0:
                return


# ----- Tokens: one memory-mapped file a shard -----


class Shard(NamedTuple):
    """In the file: tokens, padded to 8 bytes; then, as int64, lengths, batches, and the three arrays' sizes."""

    tokens: np.ndarray  # uint16; each document is BOS + its text
    lengths: np.ndarray  # int64, tokens of each document
    batches: np.ndarray  # int64, documents of each batch


def _tokens_path(name):
    return CACHE / f"tokens/{name}.tokens"


def _read_shard(path: Path) -> Shard:
    try:
        data = np.asarray(np.memmap(path, np.uint8, "r"))
        num_tokens, num_documents, num_batches = data[-24:].view(np.int64).tolist()
        index = data[-8 * (num_documents + num_batches + 3) :].view(np.int64)
        token_bytes = 2 * num_tokens
        padding = -token_bytes % 8
        if len(data) != token_bytes + padding + index.nbytes:
            raise ValueError(f"{len(data)} bytes do not fit its counts")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a token file ({error}): delete it and run 'uv run prepare.py'") from error
    tokens = data[:token_bytes].view(np.uint16)
    return Shard(tokens, lengths=index[:num_documents], batches=index[num_documents:-3])


def _tokenize(texts: dict[str, Path]) -> None:
    """Writes the missing token files, on all cores."""
    todo = [name for name in texts if not _tokens_path(name).exists()]
    if not todo:
        return
    tokenizer = Tokenizer.from_directory()
    (CACHE / "tokens").mkdir(exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for name in _progress(todo, desc="tokens", unit="shard"):
            _write_shard(_tokens_path(name), _encoded_batches(tokenizer, _document_batches(texts[name]), pool))


def _encoded_batches(tokenizer, batches, pool):
    """Yields each batch as a list of uint16 arrays. A few batches for each core at a time, so memory is bounded."""

    def encode(documents):
        arrays = [tokenizer.encode_array(text) for text in documents]
        return [np.append(np.uint16(BOS_ID), array.astype(np.uint16)) for array in arrays]

    while group := list(itertools.islice(batches, 8 * (os.cpu_count() or 1))):
        yield from pool.map(encode, group)


def _write_shard(path, batches):
    lengths = []
    sizes = []
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        for documents in batches:
            np.concatenate(documents).tofile(file)
            lengths += [len(document) for document in documents]
            sizes.append(len(documents))
        padding = -file.tell() % 8
        file.write(bytes(padding))
        index = [*lengths, *sizes, sum(lengths), len(lengths), len(sizes)]
        np.array(index, dtype=np.int64).tofile(file)
    os.replace(part, path)


# ----- Manifest: what the metric depends on -----

SCORING = ("time_budget", "eval_tokens")  # constants on which no file depends
METRIC_FILES = ("tokenizer.tiktoken", "tokenizer.json", "tokens/val.tokens", "tokens/test.tokens")


def _manifest(may_change=()):
    """Reads manifest.json; UserError if there is none, or one with other constants."""
    path = CACHE / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
        constants = {"source": manifest["source"], **manifest["metric"]["constants"]}
    except FileNotFoundError:
        raise UserError(f"profile {PROFILE!r} is not prepared (no {path}): run 'uv run prepare.py'") from None
    except (ValueError, LookupError, TypeError) as error:
        problem = f"is damaged, or of another version of prepare.py ({error})"
        raise UserError(f"{path} {problem}: delete it and run 'uv run prepare.py'") from error
    for name, value in CONSTANTS.items():
        if constants.get(name) != value and name not in may_change:
            change = f"{name} {constants.get(name)!r}, now it is {value!r}"
            remedy = "run" if name in SCORING else f"delete {CACHE} and run"
            raise UserError(f"{path} was made with {change}: {remedy} 'uv run prepare.py'")
    return manifest


def check_data(manifest: dict | None = None) -> None:
    """Recomputes the SHA-256 of each file that the metric depends on. UserError names one that has changed.

    A run calls it before it trains: what a score depends on is then known to be right.
    """
    for name, file in (manifest or _manifest())["metric"]["files"].items():
        path = CACHE / name
        found = _sha256(path) if path.exists() else "none"
        if found != file["sha256"]:
            change = f"SHA-256 {found[:12]}, was {file['sha256'][:12]}"
            raise UserError(f"{path} is not what was prepared ({change}): delete {CACHE} and run 'uv run prepare.py'")


def _write_manifest(train: list[str]) -> dict:
    """train: names of the training shards. Makes what the metric depends on read-only."""
    scored_rows = max(EVAL_TOKENS // MAX_SEQ_LEN, 1)
    rows = {}
    for split, names in {"val": ["val"], "test": ["test"], "train": train}.items():
        stream = RowStream(names, MAX_SEQ_LEN)
        rows[split] = len(stream.take(max(scored_rows, MIN_ROWS)))  # full rows; no more are counted than are enough
        if rows[split] < MIN_ROWS:
            raise UserError(f"split {split!r} has {rows[split]} rows, {MIN_ROWS} are needed: {MORE_TEXT}")
    for name in METRIC_FILES:
        (CACHE / name).chmod(0o444)
    # Nothing of the machine enters the digest: the source may be a folder's path, and the files say what was in it.
    metric = {
        "profile": PROFILE,
        "constants": {name: value for name, value in CONSTANTS.items() if name != "source"},
        "rows": {split: min(rows[split], scored_rows) for split in ("val", "test")},
        "files": {name: {"bytes": _size(CACHE / name), "sha256": _sha256(CACHE / name)} for name in METRIC_FILES},
    }
    digest = hashlib.sha256(json.dumps(metric, sort_keys=True).encode()).hexdigest()
    train_tokens = {name: len(_read_shard(_tokens_path(name)).tokens) for name in train}
    manifest = {"source": SOURCE, "metric": metric, "digest": digest, "train_tokens": train_tokens}
    _write_text(CACHE / "manifest.json", json.dumps(manifest, indent=1))
    return manifest


# ----- Packing: the rows, exactly -----

PACKING_BUFFER = 1000  # documents, below which the buffer is refilled
LOW_32_BITS = 2**32 - 1


class RowStream:
    """Best-fit packing of documents into rows of T + 1 places; every row is full and starts with BOS.

    A row takes the longest document that fits the places left. If none fits, it takes the shortest, cropped to those
    places. Of documents of equal length it takes the one that came first. The buffer is refilled, a batch at a time,
    whenever it holds fewer than PACKING_BUFFER documents.

    Each buffered document is one sortable key: length << 32 | reversed arrival. The buffer is a sorted list of keys, so
    a pick is one bisection, and the last key of a length is the document of that length that came first.
    """

    def __init__(self, names: list[str], T: int, forever: bool = False):
        self.epoch = 1  # pass over the shards, of the newest document in the buffer
        self._width = T + 1
        self._next_arrival = LOW_32_BITS  # counts down
        self._keys = []  # sorted
        self._documents = {}  # key -> its tokens
        self._batches = self._read_batches(names, forever)
        self._rows = self._pack_rows()

    def take(self, rows: int) -> np.ndarray:
        """The next rows, int64 (rows, T + 1); fewer where a stream that does not go round has run out."""
        pieces = [np.empty(0, np.int64), *itertools.chain.from_iterable(itertools.islice(self._rows, rows))]
        return np.concatenate(pieces, dtype=np.int64).reshape(-1, self._width)

    def _pack_rows(self):
        """Yields for each row the pieces of documents that fill it, until the stream has run out."""
        keys = self._keys
        while True:
            pieces = []
            left = self._width
            while left > 0:
                if len(keys) < PACKING_BUFFER:
                    self._refill()
                if not keys:
                    return  # what remains does not fill a row
                at = bisect.bisect(keys, left << 32 | LOW_32_BITS) - 1  # the longest that fits
                if at < 0:
                    at = bisect.bisect(keys, keys[0] | LOW_32_BITS) - 1  # none fits: the shortest
                key = keys.pop(at)
                pieces.append(self._documents.pop(key)[:left])
                left -= len(pieces[-1])
            yield pieces

    def _refill(self) -> None:
        for epoch, tokens, lengths, starts in self._batches:
            keys = ((lengths << 32) + self._next_arrival - np.arange(len(lengths))).tolist()
            # Copies: a document that is kept for long must not keep its shard open.
            ends = (starts + lengths).tolist()
            documents = [tokens[start:end].copy() for start, end in zip(starts.tolist(), ends, strict=True)]
            self._keys += keys
            self._documents.update(zip(keys, documents, strict=True))
            self._next_arrival -= len(keys)
            self.epoch = epoch
            if len(self._keys) >= PACKING_BUFFER:
                break
        self._keys.sort()

    def _read_batches(self, names, forever):
        """Yields for each batch of documents: epoch, tokens of the shard, lengths and starts of the documents."""
        for epoch in itertools.count(1):
            for name in names:  # one is open at a time: there may be thousands
                tokens, lengths, batches = _read_shard(_tokens_path(name))
                starts = np.cumsum(lengths) - lengths
                ends = np.cumsum(batches)
                for first, end in zip(ends - batches, ends, strict=True):
                    yield epoch, tokens, lengths[first:end], starts[first:end]
            if not forever:
                return


def _open_split(split, T):
    if split != "train":
        return RowStream([split], T)
    names = list(_manifest()["train_tokens"])
    first = 0
    if SEED != 42 and len(names) > 1:  # another seed sees the shards from another one on
        first = 1 + SEED % (len(names) - 1)
    return RowStream(names[first:] + names[:first], T, forever=True)


# ----- Dataloader -----


def default_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def make_dataloader(tokenizer: Tokenizer, B: int, T: int, split: str, device=None):
    """Yields (x, y, epoch): int64 (B, T) on the device (default: CUDA, MPS or CPU), y shifted by one, epoch from 1.

    "train" goes round for ever, from a shard that the seed chooses; "val" and "test" end after one pass, with a shorter
    last batch. The rows do not depend on B. The first batch of any split takes the device's lock and starts the clock;
    no token file is read before. A training run has no other split than "train", and nothing after its evaluation:
    EvaluationRefused.
    """
    if split not in ("train", "val", "test") or min(B, T) < 1:
        raise ValueError(f"make_dataloader got B={B}, T={T}, split={split!r}: give sizes over 0; train, val or test")
    _manifest()  # UserError here, not at the first batch
    _stopwatch.check_loader(split)
    return _load(lambda: _open_split(split, T), B, torch.device(device or default_device()), split)


def _load(open_stream, B, device, split):
    """A thread packs one batch ahead: on CUDA into pinned memory, which torch uses again once it has been copied."""
    on_cuda = device.type == "cuda"
    _stopwatch.start(device, split)
    stream = open_stream()

    def pack():
        rows = torch.from_numpy(stream.take(B))
        return rows.pin_memory() if on_cuda else rows, stream.epoch

    with ThreadPoolExecutor(1, "loader") as thread:
        ahead = thread.submit(pack)
        while True:
            rows, epoch = ahead.result()
            if len(rows) == 0:
                return
            ahead = thread.submit(pack)
            rows = rows.to(device, non_blocking=on_cuda)
            x = rows[:, :-1].clone(memory_format=torch.contiguous_format)
            y = rows[:, 1:].clone(memory_format=torch.contiguous_format)
            _stopwatch.check_loader(split)
            yield x, y, epoch


# ----- Stopwatch: the run's only clock -----

_now = time.perf_counter  # a test puts its own clock here


class Stopwatch:
    """The clock of a run, and what the run may have by that clock.

    A process is a training run if the loop started it, or once it has asked for a training batch. A run is evaluated
    once; after that it has no more data. In a process that only looks at data or scores models, nothing is refused.
    """

    def __init__(self):
        self.started = None  # seconds of _now
        self.stopped = None
        self.lock = None  # on the device, until the process ends
        self.is_run = _RESULT is not None  # or once a training batch was asked for

    def start(self, device, split) -> None:
        """Begins to count, once, when the device is free; marks the moment beside the record."""
        self.is_run = self.is_run or split == "train"
        if self.started is None:
            hold_device(device)
            _touch_mark("started")
            self.started = _now()

    def check_loader(self, split) -> None:
        """Raises EvaluationRefused where a loader may not hand out this split now."""
        self.check_not_evaluated()
        if split != "train" and self.is_run:
            remedy = "to choose between models, keep some rows of split 'train' out of training"
            raise EvaluationRefused(f"split {split!r} is the evaluator's alone in a training run: {remedy}")

    def check_not_evaluated(self) -> None:
        if self.is_run and self.stopped is not None:
            raise EvaluationRefused("this run was evaluated: after that nothing is trained and nothing is scored again")


_stopwatch = Stopwatch()


def hold_device(device: torch.device) -> None:
    """Waits until no other run is on the device, and keeps it for this one until the process ends.

    A run calls it before it compiles: that would slow one that trains there.
    """
    if _stopwatch.lock is None:
        _stopwatch.lock = _lock(_device_lock(device), f"another run holds {device}")


def training_seconds() -> float:
    """Seconds from the first batch asked for of any split (0.0 before) to the evaluation."""
    if _stopwatch.started is None:
        return 0.0
    end = _now() if _stopwatch.stopped is None else _stopwatch.stopped
    return end - _stopwatch.started


def _touch_mark(name):
    """Sets the time of an empty file beside the record, by which the loop measures the run itself."""
    if _RESULT is not None:
        _RESULT.with_name(f"{_RESULT.name}.{name}").touch()


# ----- The device: its lock and its name -----


def _device_lock(device):
    name = device.type
    if device.type == "cuda":
        name = torch.cuda.get_device_properties(device).uuid
    return LOCKS / f"{name}.lock"


def device_name(device: torch.device) -> str:
    """What a score is compared by: scores of two machines compare only where it is equal."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        model = found[1].strip() if found else model
    if sys.platform == "darwin":  # Apple M3 Max
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        model = subprocess.run(command, capture_output=True, text=True).stdout.strip() or model
    return f"{model} ({os.cpu_count()} cores{', mps' if device.type == 'mps' else ''})"


# ----- Evaluator: bits per byte -----

PROBE_TOLERANCE = 1e-2  # largest change of a logit that is no leak (causal bf16 kernels: 0; leaks: 2.7 or more)
REPEAT_TOLERANCE = 1e-4  # nats, mean change of the first batch's losses when it is scored again
GAIN_TOLERANCE = 1e-3  # nats, by which a token's mean loss may be lower when the model is given that token
FLOAT32_ELEMENTS = 2**25  # logits, held in float32 at once
# Training ends before a step that may not fit, so only a last step that was slower than the one before goes over the
# budget; on a GPU also what of the last step is still computed when its loss is known. Ten runs of smoke and three of
# pocket, others on the machine, ended 3 to 112 ms before it.
CLOCK_TOLERANCE_SECONDS = 0.2  # over the budget, and
CLOCK_TOLERANCE_FRACTION = 0.005  # of it


def evaluate_bpb(model, tokenizer: Tokenizer, batch_size: int) -> float:
    """Bits per byte on the validation split: nats / (ln 2 * bytes), summed over the targets that have bytes.

    model(idx) -> logits, int64 (B, T) -> (B, T, V) of any float type, causal, on its first parameter's device; put in
    eval mode and back. The manifest's number of rows is scored, whatever batch_size is: a short last batch is filled up
    with rows that do not count. Stops the clock, once the model is in eval mode: from then on its parameters and
    persistent buffers must stay as they are. A training run is evaluated once.

    Under the loop it writes a record; in an audit it scores the held-out test split too, and leaves the network beside
    the record for `--score`. Raises EvaluationRefused with the reason, UserError if a file that the metric depends on
    has changed.
    """
    was_training = getattr(model, "training", False)
    try:
        if was_training:
            model.eval()  # before the clock stops: what a model does here is training
        return _evaluate(model, tokenizer, batch_size)
    finally:
        if was_training:
            model.train()


def _evaluate(model, tokenizer, batch_size):
    if batch_size < 1 or tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"batch_size is {batch_size}, the vocabulary {tokenizer.get_vocab_size()}, not {VOCAB_SIZE}")
    first = next(iter(getattr(model, "parameters", list)()), None)  # a plain function has none
    device = torch.device("cpu") if first is None else first.device
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    _stopwatch.check_not_evaluated()
    seconds = training_seconds()
    _touch_mark("stopped")
    manifest = _manifest()
    constants = manifest["metric"]["constants"]
    _check_clock(seconds, constants["time_budget"])
    if _stopwatch.started is not None:  # there is no way back: from here on there are no batches, and code of the run's
        _stopwatch.stopped = _stopwatch.started + seconds
    if constants["max_seq_len"] != MAX_SEQ_LEN:
        problem = f"prepare.MAX_SEQ_LEN is {MAX_SEQ_LEN}, rows of {constants['max_seq_len']} tokens are scored"
        raise EvaluationRefused(f"{problem}: leave it, and give make_dataloader another T to train on other rows")
    check_data(manifest)
    weights = _weight_digests(model)
    record = {
        "profile": PROFILE,
        "split": "val",
        "seed": SEED,
        "training_seconds": seconds,
        "digest": manifest["digest"],
        "prepare_sha256": _sha256(Path(__file__)),
        "device_name": device_name(device),
        "weights_sha256": hashlib.sha256(json.dumps(sorted(weights.items())).encode()).hexdigest(),
    }
    rows = manifest["metric"]["rows"]
    B = min(batch_size, max(rows.values()))  # one shape for both splits: nothing recompiles
    record |= _score(model, "val", rows["val"], B, device)
    if _AUDIT:
        test = _score(model, "test", rows["test"], B, device)
        record |= {"test_bpb": test["test_bpb"], "test_rows": test["rows"]}
    _check_weights(model, weights)
    if _AUDIT and _RESULT is not None:
        record |= _export(model, B, device)  # last: what the model keeps of an export, it is not scored with
    if _RESULT is not None:
        _write_text(_RESULT, json.dumps(record, indent=1))
    return record["val_bpb"]


def _check_clock(seconds, time_budget):
    """time_budget is the manifest's: a run may set prepare.TIME_BUDGET to what it likes."""
    limit = time_budget * (1 + CLOCK_TOLERANCE_FRACTION) + CLOCK_TOLERANCE_SECONDS
    if seconds > limit:
        raise EvaluationRefused(
            f"trained for {seconds:.2f} s by the evaluator's clock, {limit:.2f} s is the most (TIME_BUDGET is "
            f"{time_budget} s): the clock counts from the first batch, compilation too: warm up on random tokens "
            "before next(loader), and end by prepare.training_seconds() before a step that may not fit"
        )
    if _RESULT is not None and _stopwatch.started is None:
        raise EvaluationRefused("the clock never started: training takes its batches from make_dataloader")


def _weight_digests(model) -> dict[str, str]:
    """SHA-256 of type, shape and bytes of each parameter and persistent buffer, by name.

    Tensors that are sharded, quantised, sparse or without data are left out: not all have bytes to read.
    """
    digests = {}
    for name, tensor in getattr(getattr(model, "_orig_mod", model), "state_dict", dict)().items():
        is_plain = type(tensor) is torch.Tensor and tensor.layout == torch.strided
        if is_plain and not tensor.is_meta and not tensor.is_quantized:
            data = tensor.cpu().contiguous().flatten().view(torch.uint8).numpy()
            head = f"{tensor.dtype} {tuple(tensor.shape)} "
            digests[name] = hashlib.sha256(head.encode() + data.tobytes()).hexdigest()
    return digests


def _check_weights(model, before):
    """Refuses a model that trained, or kept what it saw, while it was scored."""
    after = _weight_digests(model)
    changed = [name for name, digest in before.items() if after.get(name) != digest]
    if changed:
        raise EvaluationRefused(
            f"the model changes while it is scored: {changed[0]} is not what it was ({len(changed)} of {len(before)} "
            "tensors): a forward in eval mode must not learn; a buffer that it fills needs persistent=False"
        )


@torch.no_grad()
def _score(model, split, num_rows, B, device):
    """Scores the first num_rows rows of a split, B at a time, and probes random batches for leaks."""
    stream = _open_split(split, MAX_SEQ_LEN)
    token_bytes = get_token_bytes().numpy()
    num_batches = math.ceil(num_rows / B)
    num_probes = max(2, math.ceil(max(128, num_rows // 10) / B))
    rng = np.random.default_rng()  # the model can neither foresee nor disturb it
    probes = Counter(rng.integers(num_batches, size=num_probes).tolist())
    nats = 0.0
    num_tokens = 0
    num_bytes = 0
    gains = []
    for batch in range(num_batches):
        rows = stream.take(min(B, num_rows - batch * B))
        filled = np.resize(rows, (B, rows.shape[1]))  # fewer rows than B are repeated
        # Copies: x must be no view of what holds its targets.
        x = torch.from_numpy(filled[:, :-1].copy()).to(device)
        y = torch.from_numpy(filled[:, 1:].copy()).to(device)
        logits = _forward(model, x)
        losses = _by_position(_nats, logits, y)[: len(rows)]
        if not np.isfinite(losses).all():
            cause = "a logit is NaN or inf" if np.isnan(losses).any() else "a token that occurs has the logit -inf"
            raise EvaluationRefused(f"the loss on batch {batch} of split {split!r} is not finite: {cause}")
        lengths = token_bytes[rows[:, 1:]]
        counted = lengths > 0
        nats += float(losses[counted].sum(dtype=np.float64))
        num_tokens += int(counted.sum())
        num_bytes += int(lengths.sum())
        if batch == 0:
            first_x, first_y, first_losses = x, y, losses
            _check_repeats(model, x, logits)
        for _ in range(probes[batch]):
            gains += _probe(model, x, logits, rng)
        del logits  # memory: before the next batch's
    _check_unchanged(model, first_x, first_y, first_losses)
    _check_gains(gains)
    bpb = nats / (math.log(2) * num_bytes)
    return {f"{split}_bpb": bpb, "rows": num_rows, "tokens": num_tokens, "bytes": num_bytes}


def _forward(model, x):
    logits = model(x)
    shape = (*x.shape, VOCAB_SIZE)
    if type(logits) is not torch.Tensor:  # a subclass could answer every later question itself
        raise EvaluationRefused(f"model(idx) gave {type(logits).__name__}, not a plain torch.Tensor of logits")
    if logits.shape != shape or not logits.is_floating_point():
        got = f"{logits.dtype} {tuple(logits.shape)}"
        raise EvaluationRefused(f"model(idx) gave {got}, not logits of a float type and of shape (B, T, V) = {shape}")
    return logits


def _by_position(function, logits, other):
    """function(logits, other) at every position, float32 (B, T), in pieces that bound the memory."""
    positions = max(1, FLOAT32_ELEMENTS // VOCAB_SIZE)
    pieces = zip(logits.flatten(0, 1).split(positions), other.flatten(0, 1).split(positions), strict=True)
    results = [function(a.float(), b) for a, b in pieces]
    return torch.cat(results).view(logits.shape[:2]).cpu().numpy()


def _nats(logits, targets):
    return cross_entropy(logits, targets, reduction="none")


def _change(logits, again):
    """Largest change over V. Equal infinities are no change; NaN is one."""
    return torch.where(logits == again, 0, logits - again).abs().amax(-1)


LEFT_BEHIND = "something that a forward leaves for later ones: a cache, running statistics, learning, a thread"


def _check_repeats(model, x, logits):
    change = _by_position(_change, logits, _forward(model, x)).max()
    if not change <= PROBE_TOLERANCE:  # NaN too
        raise EvaluationRefused(
            f"two identical forwards in eval mode differ by {change:.3g} in a logit: look for randomness that stays on "
            f"in eval mode (dropout), or {LEFT_BEHIND}"
        )


def _check_unchanged(model, x, y, losses):
    again = _by_position(_nats, _forward(model, x), y)[: len(losses)]
    change = np.abs(again - losses).mean()
    if not change <= REPEAT_TOLERANCE:
        moved = f"scored again at the end, the first batch moved by {change:.3g} nats"
        raise EvaluationRefused(f"the model changes while it is scored: {moved}: look for {LEFT_BEHIND}")


def _probe(model, x, logits, rng) -> list[float]:
    """Changes each row from a position of its own, one row not at all: the logits before must stay as they were.

    Returns, for each changed row, how many nats better the first changed token was predicted when it could be seen.
    """
    B, T = x.shape
    # Half begin anywhere, half at a multiple of some power of two, where chunked models leak.
    exponent = rng.integers(math.floor(math.log2(T - 1)) + 1, size=B)
    aligned = rng.integers(2, size=B)
    step = 2 ** (exponent * aligned)
    begin = step * rng.integers(1, (T - 1) // step + 1)
    if B > 1:
        begin[rng.integers(B)] = T
    after = np.arange(T) >= begin[:, None]
    shift = torch.from_numpy(rng.integers(1, VOCAB_SIZE, size=(B, T)) * after).to(x.device)
    blind = _forward(model, (x + shift) % VOCAB_SIZE)
    change = _by_position(_change, logits, blind)
    change = np.where(after, 0, np.nan_to_num(change, nan=np.inf))
    row, position = np.unravel_index(change.argmax(), change.shape)
    if change[row, position] > PROBE_TOLERANCE:
        _check_repeats(model, x, logits)  # logits that move by themselves are no leak
        cause = "other rows" if begin[row] == T else f"tokens from position {begin[row]} on"
        moved = f"logits at position {position} moved by {change[row, position]:.3g}"
        raise EvaluationRefused(f"{moved} when only {cause} changed")
    changed_rows = np.flatnonzero(begin < T)
    first = begin[changed_rows]
    targets = x[changed_rows, first]
    losses = _nats(logits[changed_rows, first - 1].float(), targets)
    blind_losses = _nats(blind[changed_rows, first - 1].float(), targets)
    return (blind_losses - losses).tolist()


def _check_gains(gains):
    """Refuses look-ahead that is too weak for PROBE_TOLERANCE: unlike rounding, it lowers the mean loss."""
    gain = np.mean(gains)
    # Noise whose mean is 0 exceeds four standard errors once in 30,000 evaluations.
    standard_error = np.std(gains) / math.sqrt(len(gains))
    if not gain - 4 * standard_error <= GAIN_TOLERANCE:
        raise EvaluationRefused(f"the model looks ahead: it predicts a token {gain:.3g} nats better when it can see it")


# ----- Audit: the network as data, scored by a process that runs none of train.py's code -----


def _export(model, B, device) -> dict:
    """Writes the network and its weights beside the record with torch.export; what cannot be exported says why."""
    path = _RESULT.with_name("result.pt2")  # beside the record
    network = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    idx = torch.zeros((B, MAX_SEQ_LEN), dtype=torch.int64, device=device)
    try:
        with torch.no_grad():
            program = torch.export.export(network, (idx,), strict=False)
            # In-place operators and autocast become plain operators and casts; each keeps its kernel. (Only einsum and
            # its like, which autocast reaches inside, are computed in their arguments' type.)
            program = program.run_decompositions({})
            torch.export.save(program, path)
        _check_graph(path)
    except Exception as error:  # whatever the model is made of
        path.unlink(missing_ok=True)
        reason = str(error).strip().partition("\n")[0][:200]
        remedy = (
            "forward must be tensor operations of torch alone: no .item() or `if` on a tensor's values, no numpy, no "
            "operator of one's own, no tensors that one forward keeps for the next outside the module"
        )
        return {"exported": None, "export_problem": f"{type(error).__name__}: {reason}: {remedy}"}
    return {"exported": path.name, "export_problem": None}


def _check_graph(path: Path) -> None:
    """Refuses an exported network with an operator that is not one of torch's own (aten)."""
    with zipfile.ZipFile(path) as archive:
        (model,) = [name for name in archive.namelist() if name.endswith("/models/model.json")]
        nodes = json.loads(archive.read(model))["graph_module"]["graph"]["nodes"]
    allowed = ("torch.ops.aten.", "_operator.")  # the second: arithmetic of sizes
    foreign = sorted({node["target"] for node in nodes if not node["target"].startswith(allowed)})
    if foreign:
        raise EvaluationRefused(f"the network uses {foreign[0]}, which is not one of torch's own operators (aten)")


def _load_network(path: Path):
    """The network as a function of idx, and the shape (B, T) that it was exported for."""
    try:
        _check_graph(path)  # before anything of the file is run
        program = torch.export.load(path)
        (idx,), _ = program.example_inputs
        network = program.module()
    except EvaluationRefused:
        raise
    except Exception as error:  # whatever a file can be
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise UserError(f"{path} is not an exported network ({reason}): run the audit again") from error
    changed = list(program.graph_signature.buffers_to_mutate.values())
    if changed:
        raise EvaluationRefused(f"the model changes while it is scored: its forward fills the buffer {changed[0]}")
    if idx.ndim != 2 or idx.shape[1] != MAX_SEQ_LEN:
        raise EvaluationRefused(f"the network takes {tuple(idx.shape)}, not (B, {MAX_SEQ_LEN})")
    return network, idx.shape[0]


def _score_network(path: Path) -> dict:
    """What `--score` prints: an exported network probed and scored on the validation and the held-out test split."""
    device = torch.device(default_device())
    network, B = _load_network(path)
    manifest = _manifest()
    check_data(manifest)
    rows = manifest["metric"]["rows"]
    with _lock(_device_lock(device), f"another run holds {device}"):
        record = _score(network, "val", rows["val"], B, device)
        record["test_bpb"] = _score(network, "test", rows["test"], B, device)["test_bpb"]
    return record | {
        "test_rows": rows["test"],
        "digest": manifest["digest"],
        "prepare_sha256": _sha256(Path(__file__)),
        "device_name": device_name(device),
    }


# ----- For the loop and for people -----


def describe() -> dict:
    """What the evaluator says of itself, the data and this machine, JSON-able; the loop asks for it in a child process.

    Of the data only the manifest is read.
    """
    try:
        manifest = _manifest()
        problem = None
    except UserError as error:
        manifest = {}
        problem = str(error)
    kind = default_device()
    name, devices = _devices(kind)
    return {
        "profile": PROFILE,
        "reason": PROFILE_REASON,
        "time_budget": TIME_BUDGET,
        "cache": str(CACHE),
        "prepared": problem is None,
        "problem": problem,
        "digest": manifest.get("digest"),
        "rows": manifest["metric"]["rows"] if manifest else {},
        "device": kind,
        "device_name": name,
        "devices": devices,
        "prepare_sha256": _sha256(Path(__file__)),
    }


def _devices(kind: str) -> tuple[str, dict[str, dict]]:
    """The name of this machine's first device that can be used, and those of that name, each by the value of
    CUDA_VISIBLE_DEVICES that gives it to a run."""
    if kind != "cuda":
        device = torch.device(kind)
        return device_name(device), {kind: {"lock": str(_device_lock(device)), "free_gb": 0.0}}
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in visible.split(",")] if visible else [str(i) for i in range(count)]
    chosen = ""
    devices = {}
    for i, name in enumerate(names[:count]):
        device = torch.device("cuda", i)
        try:
            free_bytes, _ = torch.cuda.mem_get_info(device)
        except RuntimeError as error:  # it is full, or somebody else's alone
            problem = f"GPU {name} cannot be used: {str(error).splitlines()[0]}"
            continue
        chosen = chosen or device_name(device)
        if device_name(device) == chosen:  # scores of another one do not compare
            devices[name] = {"lock": str(_device_lock(device)), "free_gb": free_bytes / 1e9}
    if not devices:
        raise UserError(f"{problem}: free it, or choose others by CUDA_VISIBLE_DEVICES")
    return chosen, devices


def _prepare(num_shards: int, workers: int) -> None:
    """Makes what is missing. What the metric depends on, once prepared, must come out as it was."""
    if VOCAB_SIZE > 2**16:
        raise UserError(f"vocab_size is {VOCAB_SIZE}: a token has 16 bits, give 65536 or less in PROFILES")
    is_prepared = (CACHE / "manifest.json").exists()
    if is_prepared:
        check_data(_manifest(may_change=SCORING))
    texts = _texts(num_shards, workers)
    train = [name for name in texts if name not in ("val", "test")]
    if not is_prepared:  # a tokenizer that is there may be of other text, or of another size
        _train_tokenizer([texts[name] for name in train])
    _tokenize(texts)
    manifest = _write_manifest(train)
    if torch.cuda.is_available():  # a run then needs no network
        sys.path.append(str(Path(__file__).parent))  # python -P, as the loop calls this file, leaves it out
        from harness.device import fetch_attention_kernel

        fetch_attention_kernel()
    val_rows = manifest["metric"]["rows"]["val"]
    tokens = sum(manifest["train_tokens"].values())
    print(f"prepared: {tokens:,} training tokens in {len(train)} shards, {val_rows} validation rows in {CACHE}")
    print(f"digest: {manifest['digest'][:12]}")


def _arguments(argv):
    parser = argparse.ArgumentParser(description="Prepares a profile's data: download, splits, tokenizer, tokens.")
    parser.add_argument("--num-shards", type=int, default=10, help="training shards to have; -1: all (default 10)")
    parser.add_argument("--download-workers", type=int, default=8, help="downloads at a time (default 8)")
    parser.add_argument("--verify", action="store_true", help="recompute the digests of what the metric depends on")
    parser.add_argument("--score", type=Path, metavar="FILE", help="score a network that an audit exported; print JSON")
    args = parser.parse_args(argv)
    if args.num_shards < -1 or args.num_shards == 0:
        parser.error(f"--num-shards is {args.num_shards}: give a number over 0, or -1 for all")
    if args.download_workers < 1:
        parser.error(f"--download-workers is {args.download_workers}: give a number over 0")
    return args


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    # What --score prints is read by the loop: JSON alone.
    print(f"profile: {PROFILE} ({PROFILE_REASON})", flush=True, file=sys.stderr if args.score else sys.stdout)
    try:
        if args.score:
            print(json.dumps(_score_network(args.score)))
        elif args.verify:
            check_data()
            print("verified:", *METRIC_FILES)
        else:
            num_shards = sys.maxsize if args.num_shards == -1 else args.num_shards
            with _lock(CACHE / "prepare.lock", "another preparation works here"):
                _prepare(num_shards, args.download_workers)
    except (UserError, EvaluationRefused) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error}: mend that and run the same command again", file=sys.stderr)
        return 1
    finally:
        _say_flaws()
    return 0


if __name__ == "__main__":
    # Ctrl-C ends the process at once, threads and all: no file is in its place before it is whole.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(main())
