"""The pictures are written, whatever the rows look like; nothing is measured without matplotlib."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from rich.console import Console
from test_report import LIMITS, MIXED, report, row, timed

from bench import plots
from mc_kernels.kv_splice.cases import Case

plt = pytest.importorskip("matplotlib.pyplot")
CPU = torch.device("cpu")


def is_a_picture(path: Path) -> bool:
    """A PNG in which several things are drawn."""
    image = plt.imread(path)
    return (
        image.shape[0] > 400
        and image.shape[1] > 700
        and len({tuple(c) for c in image[::7, ::7, :3].reshape(-1, 3)}) > 5
    )


@pytest.mark.parametrize(
    "rows",
    [
        MIXED,
        (*MIXED, timed("kv_splice", 1e-3, 0.5, case="slots", flops=0)),
        (timed("kv_splice", 1e-3, 0.5, flops=0),),
        tuple(r for r in MIXED if r.median_s is None),
        (),
        (timed("a_new_op", 1e-3, 0.5, backend="a_new_backend"),),
    ],
    ids=["mixed", "with a splice that computes nothing", "only that", "no times", "no rows", "an unknown op"],
)
def test_roofline(rows: tuple[Any, ...], tmp_path: Path) -> None:
    from bench.plots.roofline import roofline

    before = plt.get_fignums()
    roofline(report(*rows), tmp_path / "roofline.png")
    assert is_a_picture(tmp_path / "roofline.png")
    assert plt.get_fignums() == before, "figures are closed"


def test_roofline_marks_each_timed_row_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from bench.plots import roofline as module

    drawn: list[Any] = []
    dot = module._dot
    monkeypatch.setattr(module, "_dot", lambda r: drawn.append(r) or dot(r))
    rows = (*MIXED, timed("kv_splice", 1e-3, 0.5, case="slots", flops=0))
    module.roofline(report(*rows), tmp_path / "roofline.png")
    assert sorted(drawn, key=str) == sorted((r for r in rows if r.median_s), key=str)
    ours, rival = dot(MIXED[0]), dot(MIXED[3])
    assert rival["facecolors"] == "none"
    assert rival["s"] < ours["s"]


def test_roofline_of_a_report_without_matrix_rates(tmp_path: Path) -> None:
    from bench.plots.roofline import roofline

    bare = replace(
        report(*MIXED), limits={k: LIMITS[k] for k in ("read_bandwidth", "copy_bandwidth")} | {"matrix_rate": {}}
    )
    roofline(bare, tmp_path / "roofline.png")
    assert is_a_picture(tmp_path / "roofline.png")


def tail_data(**more: Any) -> dict[str, Any]:
    tails = [2048, 4096]
    series = [
        {"variant": v, "backend": b, "tail": tails, "median_s": [1e-3, 2e-3], "spread": [0.1, 0.1]}
        for v in ("ordered, keys rotated", "ordered", "slots")
        for b in ("torch", "cpu", "ref")
    ]
    floor = [
        {"variant": v, "tail": tails, "seconds": [1e-4, 2e-4]} for v in ("ordered, keys rotated", "ordered", "slots")
    ]
    known = {"machine": {"cpu": "a processor", "threads": 1}, "dtype": "bfloat16", "layers": 30}
    return known | {"series": series, "floor": floor, "skipped": {}} | more


@pytest.mark.parametrize("data", [tail_data(), tail_data(series=[])], ids=["all", "floors only"])
def test_splice_tail_draw(data: dict[str, Any], tmp_path: Path) -> None:
    from bench.plots import splice_tail

    before = plt.get_fignums()
    splice_tail.draw(data, tmp_path / "tail.png")
    assert is_a_picture(tmp_path / "tail.png")
    assert plt.get_fignums() == before


def test_splice_tail_measure(limits: Any, tmp_path: Path) -> None:
    """Small enough to be quick: what comes out has the form that `draw` takes and that JSON can hold."""
    from bench.plots import splice_tail

    data = splice_tail.measure(CPU, lengths=(256, 64), layers=2, seconds=0.001, limits=limits)
    data = json.loads(json.dumps(data, allow_nan=False))
    assert not data["skipped"]
    lines = {(line["variant"], line["backend"]): line for line in data["series"]}
    for variant in splice_tail.VARIANTS:
        for backend in ("torch", "ref"):
            line = lines[variant, backend]
            assert line["tail"] == [64, 256], "in order"
            assert all(s > 0 for s in line["median_s"])
    ordered, slots = ({f["variant"]: f["seconds"] for f in data["floor"]}[v] for v in ("ordered", "slots"))
    assert ordered[1] / ordered[0] == pytest.approx((256 + 1) / (64 + 1), rel=0.02), "the tail moves"
    assert slots[0] == slots[1], "nothing moves but what the edit names"
    splice_tail.draw(data, tmp_path / "tail.png")
    assert is_a_picture(tmp_path / "tail.png")


def test_splice_tail_leaves_out_what_the_oracle_rejects(limits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from small_cases import install

    from bench.plots import splice_tail

    install(monkeypatch, "kv_splice_", lambda *args: None)
    data = splice_tail.measure(CPU, lengths=(64,), layers=2, seconds=0.001, limits=limits)
    assert "cpu" not in {line["backend"] for line in data["series"]}
    assert {name for name in data["skipped"] if name.startswith("cpu")} == {f"cpu, {v}" for v in splice_tail.VARIANTS}


def test_front_collapse_is_the_case_with_one_layer_repeated() -> None:
    from bench.plots.splice_tail import START, FrontCollapse

    case = FrontCollapse("front", 3, 2, 16, START + 32 + 40)
    args = case.make(torch.float32)
    plain = Case.make(replace(case, layers=1), torch.float32)
    for name in ("k", "v"):
        assert args[name].shape == (3, 1, 2, case.capacity, 16)
        for layer in args[name]:
            assert torch.equal(layer, plain[name][0]) or torch.equal(layer.isnan(), plain[name][0].isnan())
    assert args["k"].untyped_storage().data_ptr() == args["v"].untyped_storage().data_ptr(), "views of one cache"
    assert case.plan.edits.tolist() == [[START, 32, 1]]
    assert case.plan.new_length == START + 1 + 40


class Pictures:
    """Replaces the modules that measure."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.measured: list[str] = []
        real = plots.import_module

        def load(name: str, package: str) -> Any:
            name = name.removeprefix(".")
            return self.module(name) if name in plots.MEASURED else real(f".{name}", package)

        monkeypatch.setattr(plots, "import_module", load)

    def module(self, name: str) -> ModuleType:
        module = ModuleType(name)

        def measure(device: torch.device) -> dict[str, Any]:
            self.measured.append(name)
            return {"what": name}

        def draw(data: dict[str, Any], path: Path) -> None:
            assert data == {"what": name}
            path.write_bytes(b"picture")

        module.measure, module.draw = measure, draw  # type: ignore[attr-defined]
        return module


def test_draw_writes_pictures_and_their_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pictures = Pictures(monkeypatch)
    folder = tmp_path / "new" / "folder"
    console = Console(record=True, width=20)
    with console.capture() as output:
        paths = plots.draw(report(*MIXED), folder, CPU, console)
    names = ["roofline.png", "splice_tail.png", "splice_tail.json", "drift.png", "drift.json"]
    assert [path.name for path in paths] == names
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    assert json.loads((folder / "drift.json").read_text()) == {"what": "drift"}
    assert pictures.measured == ["splice_tail", "drift"]
    assert all(str(path) in output.get() for path in paths), "a path can be copied: it is not wrapped"


def test_without_matplotlib_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pictures = Pictures(monkeypatch)
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    with pytest.raises(typer.BadParameter, match=r"pip install megacontext\[plot\]"):
        plots.draw(report(*MIXED), tmp_path / "plots", CPU, Console())
    assert pictures.measured == []
    assert not (tmp_path / "plots").exists()


def test_the_package_does_not_import_matplotlib() -> None:
    import subprocess
    import sys

    code = "import sys, bench.plots; sys.exit('matplotlib' in sys.modules)"
    root = Path(plots.__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, timeout=120).returncode == 0


def test_a_row_with_a_time_of_nothing_is_left_out(tmp_path: Path) -> None:
    from bench.plots.roofline import roofline

    roofline(report(row("gist_pool", median_s=0.0)), tmp_path / "roofline.png")
    assert is_a_picture(tmp_path / "roofline.png")
