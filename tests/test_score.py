"""The audit's clean process: a network leaves its run as data, and what patches the judge there does not survive.

Run: uv run pytest tests/test_score.py
"""

import json
import math
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from judge_fixtures import T, Toy, V, Wrapped, evaluate, start_clock
from prepare_fixtures import environment, load_prepare
from torch import nn


def audit(tiny, folder, model, batch_size=16):
    """The record that a run's audit leaves in the folder, beside the network."""
    path = folder / "result.json"
    variables = {"AUTORESEARCH_RESULT": str(path), "AUTORESEARCH_AUDIT": "1"}
    judge = load_prepare(tiny[0], "tiny", tiny[1], **variables)
    start_clock(judge)
    evaluate(judge, model, batch_size)
    judge._stopwatch.lock.close()
    return json.loads(path.read_text())


def score(tiny, folder):
    """As `prepare.py --score` does, in a judge that no run has met."""
    variables = {"AUTORESEARCH_RESULT": str(folder / "result.json")}  # as the loop sets it, in every process of a run
    return load_prepare(tiny[0], "tiny", tiny[1], **variables)._score_network(folder / "result.pt2")


class Rich(nn.Module):
    """The operators of usual models: in-place ones, autocast, dropout, tied and half-precision weights, constants."""

    def __init__(self):
        super().__init__()
        self.toy = Toy()
        self.norm = nn.LayerNorm(32)
        self.halves = nn.Embedding(V, 32, dtype=torch.bfloat16)
        self.head = nn.Linear(32, V, bias=False)
        self.head.weight = self.toy.wte.weight
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)
        self.plain = torch.randn(32)
        self.conv = nn.Conv1d(32, 32, 3, groups=32)
        self.drop = nn.Dropout(0.5)

    def forward(self, idx):
        with torch.autocast(idx.device.type, torch.bfloat16):
            x = self.norm(self.toy.wte(idx))
            x += self.halves(idx) * self.scale
            x = x + F.gelu(self.conv(F.pad(x.mT, (2, 0)))).mT + self.plain
            heads = (x @ self.toy.qkv.weight.T).unflatten(-1, (6, 16))
            q, k, v = heads.transpose(1, 2).chunk(3, dim=1)
            x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            x = self.drop(F.rms_norm(x, (32,)))
            x[:, 0] = 0
            top = torch.topk(x, 4, dim=-1).values
            x = torch.where(x > top[..., -1:], x, -finite(x))
        with torch.autocast(idx.device.type, enabled=False):
            x = torch.einsum("btc,dc->btd", x.float(), self.toy.qkv.weight[:32])
            return 15 * torch.tanh(self.head(x) / 15)


def finite(x):
    return torch.nan_to_num(x.masked_fill(x < 0, float("-inf")), neginf=0.0)


class Compiled(nn.Module):
    """As torch.compile wraps a model, without its cost."""

    def __init__(self, model):
        super().__init__()
        self._orig_mod = model

    def forward(self, idx):
        assert not torch.compiler.is_exporting()
        return self._orig_mod(idx)


def test_network_scores_the_same_in_a_clean_process(tiny, tmp_path):
    for name, model in {"rich": Rich(), "compiled": Compiled(Toy(seed=2))}.items():
        folder = tmp_path / name
        folder.mkdir()
        record = audit(tiny, folder, model, batch_size=51)
        assert (record["exported"], record["export_problem"]) == ("result.pt2", None)
        clean = score(tiny, folder)
        keys = ("val_bpb", "test_bpb", "rows", "test_rows", "digest", "prepare_sha256", "device_name")
        assert clean == {key: record[key] for key in keys}  # to the last digit


def test_network_is_exported_in_eval_mode_and_goes_on_training(tiny, tmp_path):
    model = nn.Sequential(Toy(), nn.Dropout(0.5)).train()
    record = audit(tiny, tmp_path, model, 64)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert score(tiny, tmp_path)["val_bpb"] == record["val_bpb"]


@pytest.mark.slow
def test_patched_judge_and_forged_record_do_not_survive_the_clean_process(tiny, tmp_path):
    honest = evaluate(load_prepare(tiny[0], "tiny", tiny[1]), Toy())
    path = tmp_path / "result.json"
    run = load_prepare(tiny[0], "tiny", tiny[1], AUTORESEARCH_RESULT=str(path), AUTORESEARCH_AUDIT="1")
    measured = run.cross_entropy
    run.cross_entropy = lambda *args, **options: measured(*args, **options) * 0.5
    run.math = SimpleNamespace(**vars(math) | {"log": lambda x: 2 * math.log(x)})
    run.json = SimpleNamespace(loads=json.loads, dumps=lambda record, **options: json.dumps(record | {"test_bpb": 0.2}))
    start_clock(run)
    assert evaluate(run, Toy()) < honest / 3
    path.write_text(json.dumps(json.loads(path.read_text()) | {"val_bpb": 0.1}))  # as an exit handler would
    run._stopwatch.lock.close()

    # Files that a run could leave to be imported are beside the judge; -P does not look there.
    beside = tmp_path / "beside"
    beside.mkdir()
    copy = beside / "prepare.py"
    copy.write_bytes(Path(run.__file__).read_bytes())
    (beside / "numpy.py").write_text("raise SystemExit('imported from the bench')")
    command = [sys.executable, "-P", str(copy), "--score", str(tmp_path / "result.pt2")]
    env = environment(run, OMP_NUM_THREADS="1")  # as here: sums are rounded alike
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=beside)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["val_bpb"] == honest


class Memoriser(Toy):
    """Looks ahead in the first forward of a batch; for probes it repeats the logits that it gave before."""

    def __init__(self, looks_ahead=True):
        super().__init__(scale=0.0)
        self.looks_ahead = looks_ahead
        self.rows = []

    def peek(self, idx):
        ahead = F.one_hot(idx.roll(-1, 1), V).float()
        ahead[:, -1] = 0
        return super().forward(idx) + 9 * ahead

    def forward(self, idx):
        if torch.compiler.is_exporting():
            return self.peek(idx) if self.looks_ahead else super().forward(idx)
        for seen, logits in self.rows:
            if (seen[:, 0] == idx[:, 0]).all() and (seen[:, :2] == idx[:, :2]).float().mean() > 0.9:
                return logits
        self.rows.append((idx, self.peek(idx)))
        return self.rows[-1][1]


class Voyeur(Toy):
    """Finds its targets in the judge's frame."""

    def forward(self, idx):
        logits = super().forward(idx)
        frame = sys._getframe()
        while frame is not None:
            if isinstance(frame.f_locals.get("y"), torch.Tensor):
                return logits + 9 * F.one_hot(frame.f_locals["y"], V)
            frame = frame.f_back
        return logits


def test_memorised_rows_do_not_survive_the_clean_process(tiny, tmp_path):
    record = audit(tiny, tmp_path, Memoriser(), batch_size=100)
    assert record["exported"] and record["val_bpb"] < 1  # it won
    with pytest.raises(RuntimeError, match=r"logits at position \d+ moved by"):
        score(tiny, tmp_path)


def test_honest_face_of_a_memoriser_gets_its_own_score(tiny, tmp_path):
    record = audit(tiny, tmp_path, Memoriser(looks_ahead=False), batch_size=100)
    honest = evaluate(load_prepare(tiny[0], "tiny", tiny[1]), Toy(scale=0.0))
    assert record["val_bpb"] < 1 < honest
    assert score(tiny, tmp_path)["val_bpb"] == honest


def test_targets_read_from_frames_do_not_survive_the_clean_process(tiny, tmp_path):
    record = audit(tiny, tmp_path, Voyeur(), batch_size=100)
    honest = evaluate(load_prepare(tiny[0], "tiny", tiny[1]), Toy())
    assert record["val_bpb"] < honest
    assert score(tiny, tmp_path)["val_bpb"] == honest


# ----- what is refused -----


class FaintPeek(Toy):
    """Looks ahead by so little that no probe alone tells it from rounding; its own judge is shown an honest face."""

    def forward(self, idx):
        logits = super().forward(idx)
        if torch.compiler.is_exporting():
            return logits + 0.009 * F.one_hot(idx.roll(-1, 1), V)
        return logits


def test_faint_look_ahead_is_refused_in_the_clean_process(tiny, tmp_path):
    assert audit(tiny, tmp_path, FaintPeek())["exported"]
    with pytest.raises(RuntimeError, match=r"the model looks ahead: it predicts a token 0\.00[789]"):
        score(tiny, tmp_path)


def test_model_that_cannot_be_exported_says_why_and_is_scored_in_its_process(tiny, tmp_path):
    class Branching(Toy):
        def forward(self, idx):
            return super().forward(idx) if idx.sum() >= 0 else None

    for name, model in {"branching": Branching(), "function": lambda idx: torch.zeros(*idx.shape, V)}.items():
        folder = tmp_path / name
        folder.mkdir()
        record = audit(tiny, folder, model)
        assert record["exported"] is None and record["val_bpb"] > 0 and record["test_rows"] == 100
        assert record["export_problem"] and "\n" not in record["export_problem"]
        assert not (folder / "result.pt2").exists()


@torch.library.custom_op("judge_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@twice.register_fake
def _(x):
    return torch.empty_like(x)


class Learner(Toy):
    """Counts what it saw in a buffer that the judge of its own process does not compare."""

    def __init__(self):
        super().__init__()
        self.register_buffer("counts", torch.zeros(V), persistent=False)

    def forward(self, idx):
        self.counts += torch.bincount(idx.flatten(), minlength=V) * 1e-9
        return super().forward(idx) + self.counts


REFUSED = {
    "own operator": (lambda: Wrapped(lambda logits, idx: twice(logits)), "uses torch.ops.judge_tests.twice.default"),
    "state": (Learner, "the model changes during evaluation: its graph has an output of kind buffer_mutation"),
    "old memory": (
        lambda: Wrapped(lambda logits, idx: logits.where(logits == logits, torch.empty(V))),
        r"empty.memory_format, which is not",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_network_of_more_than_functions_of_tensors_is_refused(tiny, tmp_path, kind):
    make, reason = REFUSED[kind]
    record = audit(tiny, tmp_path, make())
    assert record["exported"], record["export_problem"]
    with pytest.raises(RuntimeError, match=reason):
        score(tiny, tmp_path)


@pytest.fixture(scope="module")
def exported(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    audit(tiny, folder, Toy())
    return folder / "result.pt2"


def changed(source, target, change):
    """A copy of an archive; change(name, bytes) gives the new bytes of each file, or None."""
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(target, "w") as copy:
        for name in archive.namelist():
            data = change(name, archive.read(name))
            if data is not None:
                copy.writestr(name, data)


def in_graph(change):
    """A change of the graph's JSON, by name of a node's operator."""

    def of_file(name, data):
        if not name.endswith("models/model.json"):
            return data
        module = json.loads(data)
        change(module["graph_module"])
        return json.dumps(module)

    return of_file


def retarget(target):
    return in_graph(lambda module: module["graph"]["nodes"][-1].update(target=target))


def set_size(module):
    module["graph"]["tensor_values"]["idx"]["sizes"][0] = {"as_expr": {"expr_str": "__import__('os').abort()"}}


def set_pickle(name, data):
    return data.replace(b'"use_pickle": false', b'"use_pickle": true')


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (retarget("torch.os.system"), "uses torch.os.system, which is not one of torch's own operators"),
        (retarget("torch.ops.aten.from_file.default"), "from_file.default, which is not a function of tensors"),
        (retarget("torch.ops.aten.resize.default"), "resize.default, which is not a function of tensors"),
        (retarget("torch.ops.aten.resize_as.default"), "resize_as.default, which is not a function of tensors"),
        (retarget("torch.ops.aten._resize_output.default"), "_resize_output.default, which is not a function of"),
        (retarget("torch.ops.aten.set.source_Tensor"), "set.source_Tensor, which is not a function of tensors"),
        (retarget("torch.ops.aten._empty_affine_quantized.default"), "default, which is not a function of tensors"),
        (retarget("torch.ops.aten.relu_.default"), "relu_.default, which is not a function of tensors"),
        (retarget("torch.ops.aten.item.default"), "item.default, which is not a function of tensors"),
        (retarget("torch.ops.aten.__class__.mro"), "which is not one of torch's own"),
        (retarget("torch.ops.aten.cat.default"), "cat.default fails"),
        (in_graph(set_size), "is not an exported network"),
        (set_pickle, "as a Python object, not as a plain tensor"),
        (lambda name, data: data[:-4] if "weight_0" in name else data, "is not an exported network"),
        (lambda name, data: None if "model.json" in name else data, "it holds 0 models"),
        (lambda name, data: b"\x80\x04" if "sample_inputs" in name else data, None),  # a pickle that nobody reads
    ],
)
def test_file_that_a_run_made_up_runs_no_code(tiny, exported, tmp_path, capsys, change, reason):
    changed(exported, tmp_path / "result.pt2", change)
    judge = load_prepare(tiny[0], "tiny", tiny[1])
    code = judge.main(["--score", str(tmp_path / "result.pt2")])
    out, err = capsys.readouterr()
    if reason is None:
        assert code == 0 and json.loads(out)["rows"] == 100
    else:
        error = err.splitlines()[-1]
        assert (code, out) == (1, "") and error.startswith("error: ") and reason in error


@pytest.mark.slow
def test_missing_or_torn_file_is_one_error_line(tiny, exported, tmp_path, capsys):
    judge = load_prepare(tiny[0], "tiny", tiny[1])
    (tmp_path / "torn.pt2").write_bytes(exported.read_bytes()[:5000])
    for name in ("torn.pt2", "none.pt2"):
        assert judge.main(["--score", str(tmp_path / name)]) == 1
        out, err = capsys.readouterr()
        assert out == "" and f"{name} is not an exported network" in err.splitlines()[-1]


def test_network_is_not_scored_on_changed_data(tiny, exported, capsys):
    judge = load_prepare(tiny[0], "tiny", tiny[1])
    manifest = judge._manifest()
    manifest["metric"]["files"]["tokens/test.tokens"]["sha256"] = "e" * 64
    judge._manifest = lambda: manifest
    assert judge.main(["--score", str(exported)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "test.tokens is not what was prepared" in err.splitlines()[-1]


def test_network_of_another_row_length_is_refused(tiny, exported, tmp_path):
    def shorten(module):
        module["graph"]["tensor_values"]["idx"]["sizes"][1] = {"as_int": T - 1}

    changed(exported, tmp_path / "result.pt2", in_graph(shorten))
    with pytest.raises(RuntimeError, match=rf"the network takes \(16, {T - 1}\), not \(B, {T}\)"):
        score(tiny, tmp_path)


def test_values_are_freed_after_their_last_use(tiny, exported):
    """Else all activations of an evaluation would exist at the same time."""
    judge = load_prepare(tiny[0], "tiny", tiny[1])
    network = judge.Network(exported, torch.device("cpu"))
    freed = [name for operation in network._operations for name in operation.last_uses]
    made = [name for operation in network._operations for name in operation.outputs]
    assert len(freed) == len(set(freed)) and set(made) - set(freed) == {network._output}
