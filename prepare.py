"""prepare.py: the judge. Constants, data, tokenizer, dataloader, stopwatch and evaluator; nobody edits it during research.

    uv run prepare.py                     # prepare the profile's data; again: resume, or do nothing
    uv run prepare.py --num-shards 100    # have more training shards (-1: all)
    uv run prepare.py --verify            # recompute the digests of everything that the metric depends on

AUTORESEARCH_PROFILE chooses the profile, AUTORESEARCH_CACHE the cache's place. Each profile has its own folder there:

    download/*.parquet     a Hugging Face data set without splits of its own, as it came
    text/*.parquet         documents by shard, in a column "text"
    tokenizer.tiktoken     one "base64 rank" a line; tokenizer.json: split pattern and special tokens
    tokens/*.tokens        the same shards as uint16 tokens; val.tokens and test.tokens are what is scored
    manifest.json          written last: constants, row counts, SHA-256 (no manifest, not prepared)

Read from top to bottom, as data flows. Shapes: B rows of a batch, T tokens of a row, V vocabulary.
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
import random
import re
import shutil
import signal
import sys
import sysconfig
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F

# requests, pyarrow, rustbpe and tqdm are imported where they are used: training starts sooner without them.

# ----- Profiles: the same code from a data-centre GPU to a laptop -----


class Profile(NamedTuple):
    source: str  # Hugging Face data set id; file or folder of .parquet, .jsonl, .txt, .md; python:stdlib or python:all
    max_seq_len: int  # tokens, of a row
    time_budget: float  # seconds, of training
    eval_tokens: int  # tokens, scored (fewer if the validation split is smaller)
    vocab_size: int  # tokens, 4 of them special; at most 65536
    hub_shards: int = 0  # shards shard_00000.parquet …, the last two test and validation; 0: the data set's listing
    max_chars: float = math.inf  # characters, read from a source that is split here


PROFILES = {  # your own data is one more row
    "climbmix": Profile("karpathy/climbmix-400b-shuffle", 2048, 300, 40 * 524288, 8192, hub_shards=6543),
    "code": Profile("python:all", 2048, 300, 40 * 524288, 8192),
    "pocket": Profile("python:stdlib", 256, 30, 2**16, 2048),
    "smoke": Profile("python:stdlib", 64, 2, 2**13, 512, max_chars=2e6),
}


def _environment() -> tuple[str, str, int]:
    """Profile, why it was chosen, and seed. A bad value ends the program with code 2."""
    profile, reason = os.environ.get("AUTORESEARCH_PROFILE"), "AUTORESEARCH_PROFILE"
    if not profile:
        gpu = torch.cuda.device_count() > 0  # does not start CUDA
        profile, reason = ("climbmix", "default with a CUDA device") if gpu else ("pocket", "default without a CUDA device")
    seed = os.environ.get("AUTORESEARCH_SEED") or "42"
    if profile in PROFILES and re.fullmatch("[0-9]{1,9}", seed):
        return profile, reason, int(seed)
    if profile not in PROFILES:
        problem = f"AUTORESEARCH_PROFILE is {profile!r}: use one of {', '.join(PROFILES)}"
    else:
        problem = f"AUTORESEARCH_SEED is {seed!r}: use a whole number from 0 to 999999999"
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(2)


PROFILE, PROFILE_REASON, SEED = _environment()
SOURCE, MAX_SEQ_LEN, TIME_BUDGET, EVAL_TOKENS, VOCAB_SIZE, HUB_SHARDS, MAX_CHARS = PROFILES[PROFILE]
CACHE_ROOT = Path(os.environ.get("AUTORESEARCH_CACHE") or "~/.cache/autoresearch").expanduser().absolute()
CACHE = CACHE_ROOT / PROFILE
MIN_ROWS = 64  # rows, that every split must give

# ----- Errors and small things -----


class UserError(Exception):
    """Something that a person can mend: what, the value received, what to do next."""


class EvaluationRefused(RuntimeError):
    """The judge does not score this model or this run; the message gives reason and figures."""


class BudgetExceeded(EvaluationRefused):
    """The run trained longer than TIME_BUDGET allows."""


class NotCausal(EvaluationRefused):
    """Logits depend on later tokens, on other rows, on chance, or on what was scored before."""


def _progress(iterable=None, **options):
    from tqdm import tqdm

    return tqdm(iterable, mininterval=0.2 if sys.stderr.isatty() else 10, dynamic_ncols=True, **options)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_text(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _lock(path: Path, waiting: str):
    """Takes an exclusive flock, saying so if it has to wait. Closing the returned file, or dying, gives it back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting: {waiting} (lock {path})", file=sys.stderr, flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    return file


# ----- Download: parquet shards by HTTP, resumed and checked -----

DOWNLOAD_ATTEMPTS = 6  # failures in a row without a new byte, before a shard is given up
BACKOFF_SECONDS = 1.0  # before the first repetition; doubles
HTTP_TIMEOUT = (10, 30)  # seconds, to connect, and between two bytes
DISK_FACTOR = 2.5  # bytes on disk for one of parquet: the shard, its tokens, some air


def _session():
    """A requests session that repeats what was answered with 429 or 5xx, after as long as Retry-After says."""
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.util.retry import Retry

    retry = Retry(total=None, connect=0, read=0, other=0, redirect=10, status=DOWNLOAD_ATTEMPTS - 1, raise_on_status=False,
                  status_forcelist=(429, 500, 502, 503, 504), backoff_factor=BACKOFF_SECONDS)  # fmt: skip
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry, pool_maxsize=64))
    session.headers["Accept-Encoding"] = "identity"  # so that lengths are the file's
    if token := os.environ.get("HF_TOKEN"):
        session.headers["Authorization"] = f"Bearer {token}"
    return session


def _download_all(urls: dict[Path, str], workers: int) -> None:
    """Fetches every file that is not there yet; UserError with the list of what is still missing at the end."""
    urls = {path: url for path, url in urls.items() if not path.exists()}
    if not urls:
        return
    session, total, failed = _session(), None, []
    for path in urls:
        path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError), session.get(next(iter(urls.values())), stream=True, timeout=HTTP_TIMEOUT) as first:
        total = len(urls) * (_size_and_sha256(first)[0] or 0) if first.ok else None
    needed, free = DISK_FACTOR * (total or 0) / 1e9, shutil.disk_usage(CACHE).free / 1e9
    if needed > free:
        raise UserError(f"{len(urls)} shards need about {needed:.1f} GB, {free:.1f} GB are free in {CACHE}: "
                        "free some, move the cache with AUTORESEARCH_CACHE, or ask for fewer with --num-shards")  # fmt: skip

    def fetch(path):
        try:
            _download(session, urls[path], path, bar)
        except (OSError, UserError) as error:  # requests' errors are OSErrors
            failed.append(f"{path.name} ({error})")

    with _progress(total=total, desc=f"{len(urls)} shards", unit="B", unit_scale=True) as bar:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(fetch, urls))
    if failed:
        raise UserError(f"{len(failed)} of {len(urls)} shards are missing: {'; '.join(sorted(failed))}. "
                        "Running the same command again resumes")  # fmt: skip


def _download(session, url: str, path: Path, bar) -> None:
    """Fetches one shard through path.part, which survives a failure and is continued."""
    import requests

    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    bar.update(have)
    failures = wrong = 0
    while True:
        try:
            _fetch(session, url, part, bar)
            _open_parquet(part)
            return os.replace(part, path)
        except requests.HTTPError:
            raise  # final, or repeated often enough
        except (OSError, UserError) as error:
            wrong += isinstance(error, UserError)  # all of it came, and is bad: once more from the start
            if wrong:
                part.unlink(missing_ok=True)
            before, have = have, part.stat().st_size if part.exists() else 0
            failures = 0 if have > before else failures + 1
            if failures == DOWNLOAD_ATTEMPTS or wrong == 2:
                raise
            time.sleep(BACKOFF_SECONDS * 2 ** max(failures - 1, 0))


def _fetch(session, url: str, part: Path, bar) -> None:
    """Appends what is missing to `part`, or writes it anew if the server knows no ranges; checks length and SHA-256."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    with session.get(url, headers=headers, stream=True, timeout=HTTP_TIMEOUT) as answer:
        size, sha256 = _size_and_sha256(answer)
        if answer.status_code != 416:  # 416: there is nothing after what we have
            answer.raise_for_status()
            resumed = answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
            bar.update(0 if resumed else -have)
            with open(part, "ab" if resumed else "wb") as file:
                for chunk in answer.iter_content(2**14):
                    bar.update(file.write(chunk))
    have = part.stat().st_size
    if size is not None and have < size:
        raise OSError(f"{have} of {size} bytes came")
    if (size is not None and have > size) or (sha256 and _sha256(part) != sha256):
        bar.update(-have)
        raise UserError("it came with a wrong length or SHA-256")


def _size_and_sha256(answer) -> tuple[int | None, str | None]:
    """Of the whole file, where the server says so; the hub does in the redirect to its storage."""
    headers = {key.lower(): value for one in (answer, *answer.history) for key, value in one.headers.items()
               if one is answer or key.lower().startswith("x-linked-")}  # fmt: skip
    etag = headers.get("x-linked-etag", "").strip('"')
    sizes = headers.get("x-linked-size"), headers.get("content-range", "").rpartition("/")[2], headers.get("content-length")
    size = next((int(size) for size in sizes if size and size.isdigit()), None)
    return size, etag if re.fullmatch("[0-9a-f]{64}", etag) else None


# ----- Texts: every document into one split -----

TRAIN_SHARDS = 8  # of a source that is split here: a seed chooses the shard that training starts with
SHUFFLE_CHARS = 2**26  # characters, shuffled together
BATCH_DOCUMENTS = 128  # that enter the packing buffer together, at most


def _texts(num_shards: float, workers: int) -> dict[str, Path]:
    """The parquet file of every shard: "val", "test" and the training shards by name, downloaded or split if missing."""
    endpoint, folder = os.environ.get("HF_ENDPOINT") or "https://huggingface.co", CACHE / "text"
    if HUB_SHARDS:
        *train, test, val = (f"shard_{i:05d}" for i in range(HUB_SHARDS))
        train = [name for i, name in enumerate(train) if i < num_shards or (folder / f"{name}.parquet").exists()]
        texts = {name: folder / f"{shard}.parquet" for name, shard in [("val", val), ("test", test), *((name, name) for name in train)]}
        _download_all({path: f"{endpoint}/datasets/{SOURCE}/resolve/main/{path.name}" for path in texts.values()}, workers)
        return texts
    if not (CACHE / "manifest.json").exists():  # whatever is there may be of another text
        shutil.rmtree(folder, ignore_errors=True)
        (CACHE / "tokenizer.tiktoken").unlink(missing_ok=True)
    if not folder.exists():
        files = _local_files()
        if not files:
            urls = _listed_urls(endpoint, num_shards)
            files = [CACHE / f"download/{i:05d}.parquet" for i in range(len(urls))]
            _download_all(dict(zip(files, urls, strict=True)), workers)
        _split(_read_documents(files), folder)
    return {path.stem: path for path in sorted(folder.glob("*.parquet"))}


def _local_files() -> list[Path]:
    """The files of a local source in the order of their paths; none if there is no such place."""
    if SOURCE.startswith("python:"):
        paths = sysconfig.get_paths()
        files = {f for f in Path(paths["stdlib"]).rglob("*.py") if not {"site-packages", "dist-packages"} & {*f.parts}}
        if SOURCE == "python:all":
            files.update(f for key in ("purelib", "platlib") for f in Path(paths[key]).rglob("*.py"))
        return sorted(files)
    source, kinds = Path(SOURCE).expanduser(), (".parquet", ".jsonl", ".txt", ".md")
    files = sorted(source.rglob("*")) if source.is_dir() else [source]
    files = [f for f in files if f.suffix in kinds and f.is_file()]
    if source.exists() and not files:
        raise UserError(f"source {source} holds no {', '.join(kinds)} file: name another one in PROFILES")
    return files


def _listed_urls(endpoint: str, num_shards: float) -> list[str]:
    """The first parquet files that the hub lists for a data set: configuration "default", split "train", if they exist."""
    url = f"{endpoint}/api/datasets/{SOURCE}/parquet"
    try:
        answer = _session().get(url, timeout=HTTP_TIMEOUT)
        answer.raise_for_status()
        configs = answer.json()
        splits = configs.get("default") or next(iter(configs.values()))
        urls = splits.get("train") or next(iter(splits.values()))
    except (OSError, ValueError, AttributeError, StopIteration) as error:
        raise UserError(f"source {SOURCE!r} is no local file or folder, and {url} lists no parquet files ({error}): "
                        "mend the source in PROFILES, or try again") from error  # fmt: skip
    return [endpoint + urlsplit(url).path for url in urls[: None if num_shards == math.inf else num_shards]]


def _read_documents(files: list[Path]):
    for path in _progress(files, desc="read", unit="file"):
        if path.suffix == ".parquet":
            yield from itertools.chain.from_iterable(_document_batches(path))
        elif path.suffix == ".jsonl":
            for number, line in enumerate(path.open(encoding="utf-8", errors="replace"), 1):
                try:
                    yield _well_formed(json.loads(line)["text"] or "")
                except (ValueError, TypeError, LookupError, AttributeError) as error:
                    raise UserError(f"{path}:{number} is no JSON object with a string in 'text': mend that line") from error
        else:
            yield path.read_bytes().decode("utf-8", "replace")


def _open_parquet(path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(path)
        kind = parquet.schema_arrow.field("text").type
    except (pa.ArrowException, KeyError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is not a readable parquet file with a text column ({reason}): delete or mend it") from error
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UserError(f"{path}: the column text holds {kind}, not strings: mend it")
    return parquet


def _document_batches(path: Path):
    """Yields lists of at most BATCH_DOCUMENTS documents within a row group. A null counts as an empty document."""
    import pyarrow as pa

    parquet = _open_parquet(path)
    for group in range(parquet.num_row_groups):
        for batch in parquet.iter_batches(BATCH_DOCUMENTS, row_groups=[group], columns=["text"], use_threads=False):
            column = batch.column(0)  # read as bytes: nothing in a parquet file ensures UTF-8
            column = column.cast(pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary())
            yield [(text or b"").decode("utf-8", "replace") for text in column.to_pylist()]


def _well_formed(text: str) -> str:
    """Joins surrogate pairs; lone surrogates, which UTF-8 cannot hold, become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _split(documents, folder: Path) -> None:
    """Writes val, test and the training shards: the document's SHA-256 says which, so a text is never in two splits."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    part = folder.with_name("text.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    pieces = {name: [] for name in ("val", "test", *(f"train_{i:05d}" for i in range(TRAIN_SHARDS)))}
    chars, shuffled, rng = 0, 0, random.Random(42)
    with contextlib.ExitStack() as stack:
        schema = pa.schema([("text", pa.string())])
        writers = {name: stack.enter_context(pq.ParquetWriter(part / f"{name}.parquet", schema)) for name in pieces}
        for document in itertools.chain(documents, [None]):
            if document is None or chars >= shuffled + SHUFFLE_CHARS or chars >= MAX_CHARS:
                for name, texts in pieces.items():
                    rng.shuffle(texts)
                    writers[name].write_table(pa.table({"text": texts}, schema), row_group_size=1024)
                    texts.clear()
                shuffled = chars
            if document is None or chars >= MAX_CHARS:
                break
            number = int(hashlib.sha256(document.encode()).hexdigest(), 16)
            name = {0: "val", 1: "test"}.get(number % 20, f"train_{number // 20 % TRAIN_SHARDS:05d}")
            pieces[name] += _cut(document, 2 * MAX_SEQ_LEN)
            chars += len(document)
    os.replace(part, folder)


def _cut(document: str, limit: int):
    """Yields pieces of at most `limit` characters, cut at line ends; a single longer line is cut hard."""
    start = 0
    while start < len(document):
        end = start + limit
        if end < len(document):
            end = document.rfind("\n", start, end) + 1 or end
        yield document[start:end]
        start = end


# ----- Tokenizer: byte-pair encoding, trained on the training split -----

SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = {f"<|reserved_{i}|>": VOCAB_SIZE - 4 + i for i in range(4)}
BOS_ID = SPECIAL_TOKENS["<|reserved_0|>"]
TRAINING_CHARS = 10**9  # characters, the tokenizer is trained on at most
TRAINING_DOCUMENT_CHARS = 10_000  # characters, of one document
CHUNK_CHARS = 100_000  # characters, handed to tiktoken at once (its regex overflows on a million spaces)


class Tokenizer:
    """Text to token ids and back. The last four ids are special tokens; text never encodes to them."""

    def __init__(self, encoding: tiktoken.Encoding):
        self._encoding = encoding

    @classmethod
    def from_directory(cls, directory: Path | None = None) -> "Tokenizer":
        """Reads tokenizer.tiktoken and tokenizer.json (default: from the profile's cache). UserError if there is none."""
        directory = Path(directory or CACHE)
        try:
            lines = (directory / "tokenizer.tiktoken").read_bytes().splitlines()
            meta = json.loads((directory / "tokenizer.json").read_bytes())
            ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
            names = {"pat_str": meta["pattern"], "special_tokens": meta["special_tokens"], "mergeable_ranks": ranks}
            return cls(tiktoken.Encoding("autoresearch", **names))
        except FileNotFoundError as error:
            raise UserError(_not_prepared(error.filename)) from error

    def get_vocab_size(self) -> int:
        return self._encoding.n_vocab

    def get_bos_token_id(self) -> int:
        return self._encoding.encode_single_token("<|reserved_0|>")

    def encode(self, text: str | list[str], prepend: int | str | None = None) -> list:
        """Token ids of a text, or a list of them for a list; prepend: a token (id or special name) put before each."""
        if not isinstance(text, str):
            return [self.encode(one, prepend) for one in text]
        first = self._encoding.encode_single_token(prepend) if isinstance(prepend, str) else prepend
        return ([] if first is None else [first]) + self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """Token ids of one text, uint32. Leaves the interpreter lock free, so that threads use all cores."""
        try:
            return np.concatenate([self._encoding.encode_to_numpy(c, disallowed_special=()) for c in _chunks(text)])
        except UnicodeEncodeError:  # lone surrogates
            return self.encode_array(_well_formed(text))

    def decode(self, ids) -> str:
        return self._encoding.decode(list(ids))

    def byte_lengths(self) -> list[int]:
        special = self._encoding._special_tokens.values()
        tokens = range(self.get_vocab_size())
        return [0 if t in special else len(self._encoding.decode_single_token_bytes(t)) for t in tokens]


def _chunks(text: str):
    """Yields a long text in chunks cut before a line that begins without white space, which no token crosses."""
    start = 0
    while len(text) - start > CHUNK_CHARS:
        cut = text.rfind("\n", start, start + CHUNK_CHARS) + 1
        while cut and text[cut].isspace():
            cut = text.rfind("\n", start, cut - 1) + 1
        cut = cut or start + CHUNK_CHARS  # there is no such line: cut hard
        yield text[start:cut]
        start = cut
    yield text[start:]


def get_token_bytes(device="cpu") -> torch.Tensor:
    """Raw byte length of each token, int32 (V,), 0 for special tokens; computed from the tokenizer's file at every call."""
    return torch.tensor(Tokenizer.from_directory().byte_lengths(), dtype=torch.int32, device=device)


def _train_tokenizer(shards: list[Path]) -> None:
    import rustbpe

    def texts(left=TRAINING_CHARS):
        for path in _progress(shards, desc="tokenizer", unit="shard"):
            for document in itertools.chain.from_iterable(_document_batches(path)):
                text = document[: min(left, TRAINING_DOCUMENT_CHARS)]
                left -= len(text)
                yield text
                if not left:
                    return

    shutil.rmtree(CACHE / "tokens", ignore_errors=True)  # another tokenizer's
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(texts(), BOS_ID, pattern=SPLIT_PATTERN)
    tokens = [base64.b64encode(bytes(token)).decode() for token, _ in trainer.get_mergeable_ranks()]  # by rank
    if len(tokens) != BOS_ID:
        raise UserError(f"the text gives {len(tokens)} tokens, {BOS_ID} are needed: {MORE_TEXT}")
    _write_text(CACHE / "tokenizer.json", json.dumps({"pattern": SPLIT_PATTERN, "special_tokens": SPECIAL_TOKENS}))
    _write_text(CACHE / "tokenizer.tiktoken", "".join(f"{token} {rank}\n" for rank, token in enumerate(tokens)))


# ----- Tokens: one file a shard, memory-mapped -----
# uint16 tokens, padded to 8 bytes; then, in int64, the length of each document (with BOS), the number of documents of
# each batch, and the numbers of tokens, documents and batches, which are known last.


class Shard(NamedTuple):
    tokens: np.ndarray  # uint16, of all documents, each BOS + its text
    lengths: np.ndarray  # int64, tokens of each document
    batches: np.ndarray  # int64, documents of each batch


def _read_shard(path: Path) -> Shard:
    try:
        data = np.asarray(np.memmap(path, np.uint8, "r"))
        num_tokens, num_documents, num_batches = data[-24:].view(np.int64).tolist()
        end = -(-2 * num_tokens // 8) * 8
        if len(data) != end + 8 * (num_documents + num_batches + 3):
            raise ValueError(f"{len(data)} bytes do not fit its counts")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a token file ({error}): delete it and run 'uv run prepare.py'") from error
    index = data[end:].view(np.int64)
    return Shard(data[: 2 * num_tokens].view(np.uint16), index[:num_documents], index[num_documents:-3])


def _tokenize(texts: dict[str, Path]) -> None:
    """Writes the token file of every shard that has none, in parallel, batch by batch."""
    threads = os.cpu_count() or 1
    todo = {name: path for name, path in texts.items() if not _tokens_path(name).exists()}
    documents = sum(_open_parquet(path).metadata.num_rows for path in todo.values())
    if not todo:
        return
    tokenizer = Tokenizer.from_directory()
    (CACHE / "tokens").mkdir(exist_ok=True)

    def encode(batch):
        return [np.append(np.uint16(BOS_ID), tokenizer.encode_array(text).astype(np.uint16)) for text in batch]

    with ThreadPoolExecutor(threads) as pool, _progress(total=documents, desc="tokens", unit="doc") as bar:
        for name, path in todo.items():
            lengths, batches, part = [], [], _tokens_path(name).with_suffix(".part")
            with open(part, "wb") as file:
                for encoded in _map_in_order(pool, encode, _document_batches(path), 2 * threads):
                    np.concatenate(encoded).tofile(file)
                    lengths += map(len, encoded)
                    batches.append(len(encoded))
                    bar.update(len(encoded))
                file.write(bytes(-file.tell() % 8))
                np.array([*lengths, *batches, sum(lengths), len(lengths), len(batches)]).tofile(file)
            os.replace(part, _tokens_path(name))


def _map_in_order(pool: ThreadPoolExecutor, function, items, ahead: int):
    """pool.map with at most `ahead` items in flight, so that memory stays bounded."""
    flying = deque()
    for item in items:
        flying.append(pool.submit(function, item))
        if len(flying) == ahead:
            yield flying.popleft().result()
    while flying:
        yield flying.popleft().result()


def _tokens_path(name: str) -> Path:
    return CACHE / f"tokens/{name}.tokens"


# ----- Manifest: what the metric depends on -----

METRIC_FILES = ("tokenizer.tiktoken", "tokenizer.json", "tokens/val.tokens", "tokens/test.tokens")
CONSTANTS = PROFILES[PROFILE]._asdict()
MORE_TEXT = (
    f"about {MIN_ROWS * (MAX_SEQ_LEN + 1) * 20 * 5 / 1e6:.1f} MB of text in many documents are needed: give the source "
    f"{SOURCE} more, delete {CACHE} and run 'uv run prepare.py'"
)


def _not_prepared(missing) -> str:
    return f"profile {PROFILE!r} is not prepared (no {missing}): run 'uv run prepare.py'"


def _manifest() -> dict:
    """Reads manifest.json; UserError if there is none, or one with other constants."""
    path = CACHE / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
        for name, value in manifest["metric"]["constants"].items():
            if CONSTANTS[name] != value:
                raise UserError(f"{path} has {name} {value!r}, prepare.py {CONSTANTS[name]!r}: run 'uv run prepare.py'")
    except FileNotFoundError:
        raise UserError(_not_prepared(path)) from None
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} is no manifest ({error!r}): delete it and run 'uv run prepare.py'") from error
    return manifest


def _digest(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest["metric"], sort_keys=True).encode()).hexdigest()


def _check_files(manifest: dict) -> dict[str, str]:
    """SHA-256 of each metric file, recomputed; UserError naming one that is not as it was prepared."""
    digests = {}
    for name, prepared in manifest["metric"]["files"].items():
        path = CACHE / name
        digests[name] = _sha256(path) if path.exists() else "none: it is missing"
        if digests[name] != prepared["sha256"]:
            raise UserError(
                f"{path} is not what was prepared (SHA-256 {prepared['sha256'][:16]}, now {digests[name][:19]}): "
                f"delete {CACHE} and run 'uv run prepare.py'"
            )
    return digests


def _write_manifest(train: list[str]) -> dict:
    """Counts the rows of each split, makes the metric files read-only and writes manifest.json."""
    scored = max(EVAL_TOKENS // MAX_SEQ_LEN, 1)
    rows = {}
    for split, names in {"val": ["val"], "test": ["test"], "train": train}.items():
        stream = RowStream([_read_shard(_tokens_path(name)) for name in names], MAX_SEQ_LEN)
        rows[split] = len(stream.take(max(scored, MIN_ROWS)))
        if rows[split] < MIN_ROWS:
            raise UserError(f"split {split!r} has {rows[split]} rows of {MAX_SEQ_LEN} tokens, not {MIN_ROWS}: {MORE_TEXT}")
    files = {name: {"bytes": (CACHE / name).stat().st_size, "sha256": _sha256(CACHE / name)} for name in METRIC_FILES}
    metric = {
        "profile": PROFILE,
        "constants": CONSTANTS,
        "rows": {split: min(rows[split], scored) for split in ("val", "test")},
        "files": files,
    }
    for name in METRIC_FILES:
        (CACHE / name).chmod(0o444)
    shards = {name: len(_read_shard(_tokens_path(name)).tokens) for name in train}
    manifest = {"metric": metric, "train_tokens": shards}
    _write_text(CACHE / "manifest.json", json.dumps(manifest, indent=1))
    return manifest


# ----- Packing: the rows, exactly -----

PACKING_BUFFER = 1000  # documents, below which the buffer is refilled
LOW_32_BITS = 2**32 - 1


class RowStream:
    """Best-fit packing of documents into rows of T + 1 places; every row is full and starts with BOS.

    The longest document that fits the places left is picked (of equal ones, the one that came first). If none fits, the
    shortest (of equal ones, the one that came first) is cropped to the places left and its tail dropped. Before each pick
    the buffer is refilled, a batch at a time, while it holds fewer than PACKING_BUFFER documents.

    A buffered document is one integer in a sorted list: length in the high bits, arrival counting down in the low ones.
    So a pick is one bisection, and of equal lengths the last is the one that came first.
    """

    def __init__(self, shards: list[Shard], T: int, forever: bool = False):
        self.epoch = 1  # pass over the shards that the newest buffered document is of
        self._width, self._arrival = T + 1, LOW_32_BITS
        self._keys: list[int] = []
        self._places: dict[int, tuple[np.ndarray, int]] = {}  # key -> tokens of its shard, start
        self._batches = self._read_batches(shards, forever)

    def _read_batches(self, shards, forever):
        for epoch in itertools.count(1) if forever else [1]:
            for tokens, lengths, batches in shards:
                starts, ends = np.cumsum(lengths) - lengths, np.cumsum(batches)
                for a, b in zip(ends - batches, ends, strict=True):
                    yield epoch, tokens, lengths[a:b], starts[a:b].tolist()

    def _refill(self) -> None:
        for self.epoch, tokens, lengths, starts in self._batches:
            keys = ((lengths << 32) + np.arange(self._arrival, self._arrival - len(lengths), -1)).tolist()
            self._arrival -= len(keys)
            self._keys += keys
            self._places.update(zip(keys, zip(itertools.repeat(tokens), starts), strict=False))
            if len(self._keys) >= PACKING_BUFFER:
                break
        self._keys.sort()

    def take(self, rows: int) -> np.ndarray:
        """The next rows, int64 (rows, T + 1); fewer where a stream that does not go round has run out."""
        keys, places, width = self._keys, self._places, self._width
        parts, full = [], 0
        while full < rows:
            left, complete = width, len(parts)
            while left:
                if len(keys) < PACKING_BUFFER:
                    self._refill()
                if not keys:  # what remains does not fill a row
                    del parts[complete:]
                    rows = full
                    break
                pick = bisect.bisect(keys, left << 32 | LOW_32_BITS) - 1
                if pick < 0:
                    pick = bisect.bisect(keys, keys[0] | LOW_32_BITS) - 1
                key = keys.pop(pick)
                tokens, start = places.pop(key)
                length = min(key >> 32, left)
                parts.append(tokens[start : start + length])
                left -= length
            else:
                full += 1
        flat = np.concatenate(parts, dtype=np.int64) if parts else np.empty(0, np.int64)
        return flat.reshape(full, width)


def _open_split(split: str, T: int) -> RowStream:
    train = list(_manifest()["train_tokens"])
    shards = [_read_shard(_tokens_path(name)) for name in (train if split == "train" else [split])]
    first = 1 + SEED % (len(shards) - 1) if SEED != 42 and len(shards) > 1 else 0
    return RowStream(shards[first:] + shards[:first], T, forever=split == "train")


# ----- Dataloader -----

LOADER_SLOTS = 4  # host batches (pinned on CUDA) that copies to the device start from; two are the least


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def make_dataloader(tokenizer: Tokenizer, B: int, T: int, split: str, device=None):
    """Yields (x, y, epoch): int64 (B, T) on the device (default: CUDA, MPS, CPU), y shifted by one, epoch from 1.

    "train" goes round for ever, from a shard that AUTORESEARCH_SEED chooses; "val" and "test" end after one pass, with a
    shorter last batch. The rows are RowStream's, whatever B is. The tensors are new ones every time. The first batch of
    any split takes the device's lock and starts the run's clock.
    """
    if split not in ("train", "val", "test") or min(B, T) < 1:
        raise ValueError(f"make_dataloader got B={B}, T={T}, split={split!r}: give sizes over 0, and train, val or test")
    return _load(_open_split(split, T), B, T, torch.device(device or default_device()))


def _load(stream: RowStream, B: int, T: int, device: torch.device):
    """A thread packs one batch ahead, into a slot whose last copy to the device has completed."""
    cuda = device.type == "cuda"
    slots = [torch.empty((B, T + 1), dtype=torch.int64, pin_memory=cuda) for _ in range(LOADER_SLOTS)]
    copied = [torch.cuda.Event() if cuda else None for _ in slots]

    def pack(slot):
        if cuda:
            copied[slot].synchronize()
        rows = stream.take(B)
        slots[slot][: len(rows)] = torch.from_numpy(rows)
        return len(rows), stream.epoch

    with ThreadPoolExecutor(1, "loader") as thread:
        ahead = thread.submit(pack, 0)
        for slot in itertools.cycle(range(LOADER_SLOTS)):
            num_rows, epoch = ahead.result()
            if not num_rows:
                return
            ahead = thread.submit(pack, (slot + 1) % LOADER_SLOTS)
            rows = slots[slot][:num_rows].to(device, non_blocking=True)
            if cuda:
                copied[slot].record()
            x, y = (half.clone(memory_format=torch.contiguous_format) for half in (rows[:, :-1], rows[:, 1:]))
            _stopwatch.start(device)
            yield x, y, epoch


# ----- Stopwatch: the run's only clock -----

_now = time.perf_counter  # a test puts its own clock here


class Stopwatch:
    """Starts with the first batch handed out, under the device's lock; stops where the evaluation that scored began."""

    def __init__(self):
        self.started = self.stopped = self.lock = None

    def start(self, device: torch.device) -> None:
        if self.started is None:
            self.lock = _lock(_device_lock(device), f"another run holds {device}")  # until the process ends
            self.started = _now()

    def seconds(self) -> float:
        if self.started is None:
            return 0.0
        return (_now() if self.stopped is None else self.stopped) - self.started


_stopwatch = Stopwatch()


def training_seconds() -> float:
    """Seconds since the first batch of any split was handed out (0.0 before), until evaluation began."""
    return _stopwatch.seconds()


def _device_lock(device: torch.device) -> Path:
    name = torch.cuda.get_device_properties(device).uuid if device.type == "cuda" else device.type
    return CACHE_ROOT / f"locks/{name}.lock"


# ----- Evaluator: bits per byte -----

PROBE_TOLERANCE = 1e-2  # largest change of a logit that is no leak (causal bf16 kernels: 0; leaks: 2.7 or more)
REPEAT_TOLERANCE = 1e-4  # nats, mean change of the first batch's losses when it is scored again
FLOAT32_ELEMENTS = 2**25  # logits, held in float32 at once


def evaluate_bpb(model, tokenizer: Tokenizer, batch_size: int) -> float:
    """Bits per byte on the validation split: nats / (ln 2 * bytes), summed over the targets that have bytes.

    model(idx) -> logits, int64 (B, T) -> (B, T, V) of any float type, causal, on its first parameter's device; it is put
    in eval mode and back. The rows scored are the manifest's number, whatever batch_size is; a short last batch is filled
    up with rows that do not count, so that all calls have one shape.
    Stops the run's clock. Raises BudgetExceeded, NotCausal or EvaluationRefused with the reason, and UserError if a file
    that the metric depends on has changed. Where AUTORESEARCH_RESULT=PATH is set (by the loop) it writes a record there,
    once a run; AUTORESEARCH_AUDIT=1 scores the sealed test split as well.
    """
    is_module = isinstance(model, torch.nn.Module)
    device = next((p.device for p in model.parameters()), torch.device("cpu")) if is_module else torch.device("cpu")
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    seconds, result = training_seconds(), os.environ.get("AUTORESEARCH_RESULT")
    limit = 1.01 * TIME_BUDGET + 0.5
    if seconds > limit:
        raise BudgetExceeded(f"trained for {seconds:.2f} s with a TIME_BUDGET of {TIME_BUDGET} s (refused over {limit:.2f} s)")
    if result and _stopwatch.started is None:
        raise EvaluationRefused("the clock never started: no batch came from make_dataloader")
    if result and Path(result).exists():
        raise EvaluationRefused(f"a run is scored once, and {result} holds this run's record")
    if batch_size < 1 or tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"batch_size is {batch_size}, the tokenizer's size {tokenizer.get_vocab_size()}, not {VOCAB_SIZE}")
    manifest, was_training = _manifest(), is_module and model.training
    record = {"profile": PROFILE, "split": "val", "seed": SEED, "training_seconds": seconds, "digest": _digest(manifest)}
    record |= {"files": _check_files(manifest), "prepare_sha256": _sha256(Path(__file__))}
    try:
        if is_module:
            model.eval()
        record |= _score(model, "val", manifest["metric"]["rows"]["val"], batch_size, device)
        if os.environ.get("AUTORESEARCH_AUDIT") == "1":
            test = _score(model, "test", manifest["metric"]["rows"]["test"], batch_size, device)
            record |= {"test_bpb": test["test_bpb"], "test_rows": test["rows"]}
    finally:
        if was_training:
            model.train()
    if _stopwatch.started is not None:
        _stopwatch.stopped = _stopwatch.started + seconds
    if result:
        _write_text(Path(result), json.dumps(record, indent=1))
    return record["val_bpb"]


@torch.no_grad()
def _score(model, split: str, num_rows: int, batch_size: int, device: torch.device) -> dict:
    """Scores the first num_rows rows of a split and probes random batches for leaks."""
    stream, token_bytes = _open_split(split, MAX_SEQ_LEN), get_token_bytes().numpy()
    B = min(batch_size, num_rows)
    num_batches, num_probes = -(-num_rows // B), max(2, -(-max(128, num_rows // 10) // B))
    rng = np.random.default_rng()  # of its own: a model can neither foresee the probes nor find torch's chance disturbed
    probes = Counter(rng.integers(num_batches, size=num_probes).tolist())
    nats, num_tokens, num_bytes = 0.0, 0, 0
    for batch in range(num_batches):
        rows = stream.take(min(B, num_rows - batch * B))
        filled = np.resize(rows, (B, MAX_SEQ_LEN + 1))  # copies: x must not be a view that leads to its targets
        x, y = (torch.from_numpy(half.copy()).to(device) for half in (filled[:, :-1], filled[:, 1:]))
        logits = _forward(model, x)
        losses = _by_position(_nats, logits, y)[: len(rows)]
        if not np.isfinite(losses).all():
            raise EvaluationRefused(f"the loss on batch {batch} of split {split!r} is not finite")
        lengths = token_bytes[rows[:, 1:]]
        nats += float(losses[lengths > 0].sum(dtype=np.float64))
        num_tokens += int((lengths > 0).sum())
        num_bytes += int(lengths.sum())
        if batch == 0:
            first = x, y, losses
            change = _by_position(_change, logits, _forward(model, x)).max()
            if not change <= PROBE_TOLERANCE:
                raise NotCausal(f"two identical forwards in eval mode differ by {change:.3g}: switch off dropout and chance")
        for _ in range(probes[batch]):
            _probe(model, x, logits, rng)
        del logits
    x, y, losses = first
    change = np.abs(_by_position(_nats, _forward(model, x), y)[: len(losses)] - losses).mean()
    if not change <= REPEAT_TOLERANCE:
        raise NotCausal(f"scored again at the end, the first batch changed by {change:.3g} nats: the model learns from validation")
    bpb = nats / (math.log(2) * num_bytes)
    return {f"{split}_bpb": bpb, "rows": num_rows, "tokens": num_tokens, "bytes": num_bytes}


def _forward(model, x: torch.Tensor) -> torch.Tensor:
    logits, shape = model(x), (*x.shape, VOCAB_SIZE)
    if not isinstance(logits, torch.Tensor) or tuple(logits.shape) != shape or not logits.is_floating_point():
        got = f"{logits.dtype} {tuple(logits.shape)}" if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise EvaluationRefused(f"model(idx) gave {got}, not logits of a float type and of shape (B, T, V) = {shape}")
    return logits


def _by_position(function, logits: torch.Tensor, other: torch.Tensor) -> np.ndarray:
    """function(logits, other) at every position, float32 (B, T), in pieces that bound the memory."""
    size = max(1, FLOAT32_ELEMENTS // VOCAB_SIZE)
    pieces = zip(logits.flatten(0, 1).split(size), other.flatten(0, 1).split(size), strict=True)
    return torch.cat([function(a, b) for a, b in pieces]).view(logits.shape[:2]).cpu().numpy()


def _nats(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="none")


def _change(logits: torch.Tensor, again: torch.Tensor) -> torch.Tensor:
    return (logits.float() - again.float()).abs().amax(-1)


def _probe(model, x: torch.Tensor, logits: torch.Tensor, rng: np.random.Generator) -> None:
    """Changes each row from a position of its own on, one row not at all: the logits before must stay as they were."""
    B, T = x.shape
    # Half of the changes begin anywhere, half at a multiple of some power of two: chunked models leak there.
    step = 2 ** (rng.integers(math.floor(math.log2(T - 1)) + 1, size=B) * rng.integers(2, size=B))
    begin = step * rng.integers(1, (T - 1) // step + 1)
    begin[rng.integers(B)] = T if B > 1 else begin[0]
    after = np.arange(T) >= begin[:, None]
    shift = torch.from_numpy(rng.integers(1, VOCAB_SIZE, size=(B, T)) * after).to(x.device)
    change = _by_position(_change, logits, _forward(model, (x + shift) % VOCAB_SIZE))
    change = np.where(after, 0, np.nan_to_num(change, nan=np.inf))
    row, position = np.unravel_index(change.argmax(), change.shape)
    if change[row, position] > PROBE_TOLERANCE:
        cause = "other rows" if begin[row] == T else f"tokens from position {begin[row]} on"
        raise NotCausal(f"logits at position {position} moved by {change[row, position]:.3g} when only {cause} changed")


# ----- For loop.py and for people -----


def describe() -> dict:
    """What loop.py asks once, in a child process: JSON-able, and nothing but the manifest is read."""
    manifest, problem, device = None, None, torch.device(default_device())
    try:
        manifest = _manifest()
    except UserError as error:
        problem = str(error)
    metric = manifest["metric"] if manifest else {"files": {}, "rows": {}}
    return {
        "profile": PROFILE,
        "reason": PROFILE_REASON,
        "time_budget": TIME_BUDGET,
        "seed": SEED,
        "cache": str(CACHE),
        "prepared": manifest is not None,
        "problem": problem,
        "manifest": str(CACHE / "manifest.json"),
        "digest": _digest(manifest) if manifest else None,
        "files": {name: file["sha256"] for name, file in metric["files"].items()},
        "rows": metric["rows"],
        "device": device.type,
        "device_name": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "lock": str(_device_lock(device)),
        "prepare_sha256": _sha256(Path(__file__)),
    }


def _prepare(num_shards: float, workers: int) -> None:
    path = CACHE / "manifest.json"
    before = json.loads(path.read_bytes())["metric"] if path.exists() else None
    for name, value in before["constants"].items() if before else ():
        if CONSTANTS[name] != value and name not in ("time_budget", "eval_tokens"):  # these two touch no file
            raise UserError(f"{CACHE} was made with {name} {value!r}, now it is {CONSTANTS[name]!r}: delete it and run again")
    texts = _texts(num_shards, workers)
    train = [name for name in texts if name not in ("val", "test")]
    if not (CACHE / "tokenizer.tiktoken").exists():
        _train_tokenizer([texts[name] for name in train])
    _tokenize(texts)
    manifest = _write_manifest(train)
    rows = manifest["metric"]["rows"]
    print(f"prepared: {len(train)} training shards of {sum(manifest['train_tokens'].values()):,} tokens, {rows['val']} "
          f"validation and {rows['test']} test rows of {MAX_SEQ_LEN}, in {CACHE}")


def _verify() -> None:
    manifest = _manifest()
    _check_files(manifest)
    for name, tokens in manifest["train_tokens"].items():
        if len(_read_shard(_tokens_path(name)).tokens) != tokens:
            raise UserError(f"{_tokens_path(name)} is not what was prepared: delete it and run 'uv run prepare.py'")
    print(f"verified: {', '.join(METRIC_FILES)} and {len(manifest['train_tokens'])} training shards in {CACHE}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Prepares the data of a profile: download, splits, tokenizer, tokens.")
    parser.add_argument("--num-shards", type=int, default=10, help="training shards to have; -1: all (default 10)")
    parser.add_argument("--download-workers", type=int, default=8, help="downloads at a time (default 8)")
    parser.add_argument("--verify", action="store_true", help="recompute the digests of what the metric depends on")
    args = parser.parse_args(argv)
    if args.num_shards < 1 and args.num_shards != -1 or args.download_workers < 1:
        parser.error("--num-shards is over 0 or -1, --download-workers over 0")
    print(f"profile: {PROFILE} ({PROFILE_REASON})", flush=True)
    try:
        if args.verify:
            _verify()
        else:
            with _lock(CACHE / "prepare.lock", "another preparation works here"):
                _prepare(math.inf if args.num_shards == -1 else args.num_shards, args.download_workers)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    # Ctrl-C ends the process at once, threads and all: every file is written beside its place and then renamed.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(main())
