"""Time per token against the length of the history."""

from __future__ import annotations

from pathlib import Path

from bench.e2e.report import EndToEndReport

FILE = "latency_per_token.png"


def draw_latency(report: EndToEndReport, directory: Path) -> Path:
    """Draw the memory's median and quartiles over the lengths, and each rival up to the end of its window."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    rows = [row for row in report.decode if row["ms_per_token"] is not None]
    tokens = [row["tokens"] for row in rows]
    axes.plot(tokens, [row["ms_per_token"] for row in rows], "o-", color="C0", label="MegaContext", zorder=3)
    axes.fill_between(
        tokens, [row["spread"][0] for row in rows], [row["spread"][1] for row in rows], color="C0", alpha=0.2
    )
    all_in = [(row["tokens"], row["ms_per_token_all_in"]) for row in rows if row["ms_per_token_all_in"] is not None]
    axes.plot(*zip(*all_in, strict=True), "o:", color="C0", label="MegaContext, refocus and commits included")
    names = dict.fromkeys(row["name"] for row in report.rivals)
    for number, name in enumerate(names, start=1):
        points = [(r["window"], r["ms_per_token"]) for r in report.rivals if r["name"] == name and r["ms_per_token"]]
        if not points:
            continue
        color = f"C{number}"
        axes.plot(*zip(*points, strict=True), "s-", color=color, label=name)
        end, height = points[-1]
        axes.annotate("window ends", (end, height), (6, 6), textcoords="offset points", color=color, fontsize=8)
    axes.margins(y=0.12)
    axes.set(xscale="log", xlabel="tokens of history", ylabel="ms per decoded token", ylim=(0, None))
    axes.set_title(f"{report.settings['model']}, {report.settings['budget']:,} slots; median and quartiles")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / FILE
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path
